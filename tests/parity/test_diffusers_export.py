"""Folders of `sample.export --format diffusers` draw in diffusers what we draw from the same initial latents."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch_pipelines import sd15, sdxl
from torch_reference import SD15_UNET, SDXL_UNET, nchw, randomised

from flax_pref.checkpoints.checkpoint import Checkpoint
from flax_pref.config import UserError
from flax_pref.diffusion.drawing import resolve_drawing
from flax_pref.diffusion.drawing_flags import DrawingFlags
from flax_pref.diffusion.guidance import GuidanceStep, Table, tabulate
from flax_pref.diffusion.rules import named_rule
from flax_pref.diffusion.sampler import image_keys
from flax_pref.diffusion.scheduler_configs import NAMES, solver_from_config
from flax_pref.diffusion.text_to_image import TextToImage
from flax_pref.serving.export_flags import GUIDED
from sample import export

# diffusers' and transformers' own housekeeping, none of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]
# Smaller ones than in the other tests: most of the time is that of our compilations.
TWO = {"block_out_channels": [8, 16], "layers_per_block": 1}
UNETS = {
    "sd15": SD15_UNET
    | TWO
    | {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "sdxl": SDXL_UNET
    | TWO
    | {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [1, 2],
        "transformer_layers_per_block": [1, 2],
    },
}
PROMPTS, SEED, SIZE = ["a lion, red", "a dog"], 3, (24, 32)
STEPS = 20
NETWORKS = ("base", "pos", "neg", "bad")
STRENGTHS = {name: {"w": "2"} for name in GUIDED} | {
    "cfg": {},
    "fine_tuned": {},
    "npo": {},
    "cpgd_conditional": {"w": "8"},
    "multi": {"w": "pos=1.5,neg=-1"},
}
# Strengths that change, and contrasts that are used again or measured: flags, and whether both families are tried.
COURSES = {
    "schedules": {"w": "linear:4:1@0:0.6", "guidance_scale": "cosine:2:6@0.2:1"},
    "by name": {"w": "pos=3@0:0.5,neg=cosine:0:3@0.3:1"},
    "scale off": {"guidance_scale": "1", "w": "4"},
    "held": {"w": "2@0.2:1", "every": 3},
    "extrapolated": {"w": "2@0.2:1", "every": 3, "between": "extrapolate"},
    "norm": {"w": "pos=norm:0.8@0:0.7,neg=1", "every": 2, "between": "extrapolate", "rescale": 0.6},
    "norm, conditional": {"rule": "cpgd_conditional", "w": "norm:linear:0.2:0.9"},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks of a few channels are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save(family, folder):
    """Writes a base, three LoRA modules and one with full weights."""
    pipeline = {"sd15": sd15, "sdxl": sdxl}[family](folder / "tokenizers")
    pipeline.register_modules(unet=randomised(UNet2DConditionModel.from_config(UNETS[family])))
    pipeline.save_pretrained(folder / "base")
    for seed, name in enumerate(NETWORKS[1:]):
        generator = torch.Generator().manual_seed(seed)
        unet = UNet2DConditionModel.from_pretrained(folder / "base" / "unet")
        if name == "pos":
            for parameter in unet.parameters():
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
            unet.save_pretrained(folder / "full")
            unet = UNet2DConditionModel.from_pretrained(folder / "base" / "unet")
        unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v", "proj_in", "time_emb_proj"]))
        for parameter in (parameter for key, parameter in unet.named_parameters() if "lora_" in key):
            parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
        unet.save_lora_adapter(folder, weight_name=f"{name}.safetensors")
    return folder


def flags_of(folder, rule="cpgd", modules=("pos", "neg"), **flags):
    """As arguments of `DrawingFlags`."""
    paths = {name: folder / f"{name}.safetensors" for name in modules}
    size = {"height": SIZE[0], "width": SIZE[1], "steps": STEPS, "guidance_scale": "5"}
    modules = tuple(f"{name}={path}" for name, path in paths.items())
    return {"model": str(folder / "base"), "module": modules, "rule": rule, **size, **flags}


def write(out, flags, *more):
    arguments = ["--format", "diffusers", "--out", str(out), *more]
    for name, value in flags.items():
        for one in value if isinstance(value, tuple) else (value,):
            arguments += [f"--{name.replace('_', '-')}", str(one)]
    export.main(arguments)
    return out


def load(out, **options):
    pipeline = DiffusionPipeline.from_pretrained(
        out, custom_pipeline=out / "pipeline.py", trust_remote_code=True, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise():
    shape = (SIZE[0] // 4, SIZE[1] // 4, 4)
    keys = image_keys(SEED, range(len(PROMPTS)))
    return nchw(np.stack([jax.random.normal(jax.random.fold_in(key, 0), shape) for key in keys]))


def theirs(pipeline, **options):
    return pipeline(PROMPTS, latents=noise(), output_type="np", **options).images


def under_one_layout(table: Table) -> Table:
    """The same rule as a table of all rows and two contrasts, so that one compiled program draws all rules."""
    rows = tuple((network, prompt) for network in NETWORKS for prompt in ("empty", "text"))
    places = [table.rows.index(row) if row in table.rows else None for row in rows]

    def laid_out(part):  # [..., R, N]
        return np.stack([np.zeros_like(part[..., 0, :]) if r is None else part[..., r, :] for r in places], axis=-2)

    contrast, w = laid_out(table.contrast), table.w
    if w.shape[1] == 1:
        contrast, w = (np.concatenate([part, np.zeros_like(part)], axis=1) for part in (contrast, w))
    plans = (GuidanceStep(tuple(range(len(rows))), "new"),) * len(table.plans)
    return dataclasses.replace(
        table,
        **{"rows": rows, "plans": plans, "steady": laid_out(table.steady), "contrast": contrast, "w": w},
        norms=(False,) * 2,
    )


@dataclasses.dataclass
class Pair:
    """One base with modules pos, neg and bad, in diffusers and here."""

    folder: Path
    pipeline: DiffusionPipeline
    draw: TextToImage

    def register(self, rule, **terms):
        """Makes the pipeline follow a rule; returns the arguments of `named_rule`."""
        terms = {"name": rule, "guidance_scale": "5", "module": "pos", "reference": "base", **terms}
        self.pipeline.register_to_config(rule=terms)
        return terms

    def error(self, **terms):
        """The largest difference of pixels, of 255."""
        rule = named_rule(**self.register(**terms))
        table = tabulate(rule, len(self.draw.solver.timesteps), len(PROMPTS))
        if all(plan.contrast != "reused" for plan in table.plans) and table.text is None:
            table = under_one_layout(table)
        keys = image_keys(SEED, range(len(PROMPTS)))
        return difference(theirs(self.pipeline), np.asarray(self.draw.draw(PROMPTS, keys, table)))


def difference(images, references):
    assert images.shape == references.shape
    assert references.std() > 0.05  # it shows something
    error = 255 * np.abs(images - references).max()
    print(f"{error:.4f} / 255")
    return error


@pytest.fixture(scope="module", params=UNETS)
def pair(request, tmp_path_factory):
    folder = save(request.param, tmp_path_factory.mktemp(request.param))
    flags = flags_of(folder, "multi", NETWORKS[1:], w="pos=1,neg=1,bad=1")
    drawing = resolve_drawing(DrawingFlags(**flags))
    return Pair(
        folder, load(write(folder / "out", flags)), drawing.load(dtype="float32", batch_size=len(PROMPTS))
    )


@pytest.mark.parametrize("rule", GUIDED)
def test_every_rule_draws_what_it_draws_here(rule, pair):
    assert pair.error(rule=rule, **STRENGTHS[rule]) < 2


def test_modules_count_and_strengths_are_those_of_the_call(pair):
    pair.register(rule="cpgd", w="2")
    guided = theirs(pair.pipeline, num_inference_steps=4)
    pair.register(rule="cpgd", w="0")
    assert difference(theirs(pair.pipeline, num_inference_steps=4), guided) > 10
    assert difference(theirs(pair.pipeline, num_inference_steps=4, w=2), guided) == 0


def test_modules_in_turns_draw_the_same(pair):
    pair.register(rule="cpgd", w="2")
    together = theirs(pair.pipeline, num_inference_steps=4)
    assert pair.pipeline.one_batch
    pair.pipeline.one_batch = False
    try:
        assert difference(theirs(pair.pipeline, num_inference_steps=4), together) < 0.1
    finally:
        pair.pipeline.one_batch = True


@pytest.mark.parametrize("course", COURSES)
def test_strengths_along_the_trajectory_are_those_of_flax_pref(course, pair):
    if "sdxl" in str(pair.folder) and course != "norm":
        pytest.skip("the same code for both families")
    assert pair.error(**{"rule": "cpgd", **COURSES[course]}) < 2
