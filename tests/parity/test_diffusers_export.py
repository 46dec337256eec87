"""Folders of `sample.export --format diffusers` draw in diffusers what we draw from the same initial latents."""

import dataclasses
import json
import runpy
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionXLAutoBlocks, UNet2DConditionModel
from diffusers.utils import dynamic_modules_utils
from peft import LoraConfig
from safetensors.torch import save_file
from torch_pipelines import SCHEDULE, sd15, sdxl
from torch_reference import TWO_BLOCKS as UNETS
from torch_reference import nchw, randomised, relative_error

from flax_pref.checkpoints.checkpoint import Checkpoint
from flax_pref.config import INTEGRATIONS, UserError
from flax_pref.diffusion.drawing import resolve_drawing
from flax_pref.diffusion.drawing_flags import DrawingFlags
from flax_pref.diffusion.guidance import GuidanceStep, Table, tabulate
from flax_pref.diffusion.rules import named_rule
from flax_pref.diffusion.sampler import draw_normal, image_keys, sample
from flax_pref.diffusion.scheduler_configs import NAMES, scheduler_config_of, solver_from_config
from flax_pref.diffusion.text_to_image import TextToImage
from flax_pref.serving.diffusers_export import default_call
from flax_pref.serving.export_flags import GUIDED, ExportFlags
from sample import export

# diffusers' and transformers' own housekeeping, none of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]
PIPELINE = runpy.run_path(str(INTEGRATIONS / "diffusers" / "pipeline.py"))
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
# Strengths that change, and contrasts that are used again or measured.
COURSES = {
    "schedules": {"w": "linear:4:1@0:0.6", "guidance_scale": "cosine:2:6@0.2:1"},
    "one step each": {"w": "list:0:1:2:3:4:5:6:7"},
    "by name": {"w": "pos=3@0:0.5,neg=cosine:0:3@0.3:1"},
    "scale off": {"guidance_scale": "1", "w": "4"},
    "held": {"w": "2@0.2:1", "every": 3},
    "held by name": {"w": "pos=3@0:0.5,neg=cosine:0:3@0.3:1", "every": 2},
    "extrapolated": {"w": "2@0.2:1", "every": 3, "between": "extrapolate", "guidance_scale": "linear:5:2"},
    "extrapolated, one after another": {"w": "pos=3@0:0.5,neg=1@0.5:1", "every": 2, "between": "extrapolate"},
    "rescaled": {"w": "2", "rescale": 0.7},
    "norm": {"w": "pos=norm:0.8@0:0.7,neg=1", "every": 2, "between": "extrapolate", "rescale": 0.6},
    "norm, conditional": {"rule": "cpgd_conditional", "w": "norm:linear:0.2:0.9"},
    "norm, several": {"rule": "multi", "w": "pos=norm:0.5,neg=norm:-0.2@0:0.5"},
    "norm, scale off in some": {"w": "norm:0.5", "guidance_scale": "5@0:0.5"},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks of a few channels are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def own_cache_of_code(tmp_path_factory):
    """diffusers copies the code of a folder before it runs it, to one place for all processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("code")))
        yield


def save(family, folder):
    """Writes a base, three LoRA modules, and the first with full weights."""
    pipeline = {"sd15": sd15, "sdxl": sdxl}[family](folder / "tokenizers")
    pipeline.register_modules(unet=randomised(UNet2DConditionModel.from_config(UNETS[family])))
    pipeline.save_pretrained(folder / "base")
    for seed, name in enumerate(NETWORKS[1:]):
        generator = torch.Generator().manual_seed(seed)
        unet = UNet2DConditionModel.from_pretrained(folder / "base" / "unet")
        unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v", "proj_in", "time_emb_proj"]))
        for parameter in (parameter for key, parameter in unet.named_parameters() if "lora_" in key):
            parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
        unet.save_lora_adapter(folder, weight_name=f"{name}.safetensors")
        if name == "pos":
            unet.fuse_lora()
            unet.unload_lora()
            unet.save_pretrained(folder / "full")
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
    extrapolation = np.zeros(w.shape[:2], np.float32)
    plans = (GuidanceStep(tuple(range(len(rows))), "new"),) * len(table.plans)
    return dataclasses.replace(
        table,
        **{"rows": rows, "plans": plans, "steady": laid_out(table.steady), "contrast": contrast, "w": w},
        **{"norms": (False,) * 2, "extrapolation": extrapolation},
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
    return Pair(folder, load(write(folder / "out", flags)), drawing.load(dtype="float32", batch_size=len(PROMPTS)))


@pytest.mark.parametrize("rule", GUIDED)
def test_every_rule_draws_what_it_draws_here(rule, pair):
    assert pair.error(rule=rule, **STRENGTHS[rule]) < 2


@pytest.mark.parametrize("layer", [1, 2])
def test_prompts_are_read_from_the_layer_of_the_flags(layer, pair):
    flags = ExportFlags(**flags_of(pair.folder, w="2"), out="out", clip_skip=layer)
    call = default_call(flags, resolve_drawing(flags))
    texts = {"prompt": PROMPTS, "negative_prompt": None}
    size, own = (call["height"], call["width"]), pair.pipeline
    options = {"device": "cpu", "num_images_per_prompt": 1, "clip_skip": call.get("clip_skip")}
    with torch.no_grad():
        found = own._encode(own.plain, texts, options, size)
    draw = dataclasses.replace(pair.draw, pipeline=pair.draw.pipeline.replace(clip_skip=layer))
    for seen, expected in zip(found.values(), draw.conditioning(PROMPTS, None), strict=True):
        for name, array in seen.items():
            np.testing.assert_allclose(array, np.broadcast_to(expected[name], array.shape), atol=1e-5)


def test_the_initial_latents_of_a_seed_are_those_of_flax_pref(pair):
    shape = (5, 7, 4)
    for seed, ids in ((0, [0, 1]), (2**32 - 1, [7, 2**32 - 1])):
        expected = nchw(np.asarray(draw_normal(image_keys(seed, ids), 0, shape)))
        found = PIPELINE["draw_latents"](seed, ids, (4, 5, 7))
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
    pair.register(rule="cpgd", w="2")
    options = {"num_inference_steps": 2, "output_type": "np"}
    seeded = pair.pipeline(PROMPTS, seed=SEED, **options).images
    assert difference(seeded, pair.pipeline(PROMPTS, latents=noise(), **options).images) < 0.1


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


def test_contrasts_that_are_used_again_and_measured_draw_what_they_draw_here(pair):
    # As many steps as fill groups, 20 and 21 (PNDM): fewer kinds of steps are compiled sooner.
    every = 4 if "sdxl" in str(pair.folder) else 3
    course = {"w": "pos=norm:0.8,neg=1", "every": every, "between": "extrapolate", "rescale": 0.6}
    assert pair.error(rule="cpgd", **course) < 2


# Networks of one line, for courses without a compilation of large ones.
NUMBERS = {name: 0.3 + 0.2 * i for i, name in enumerate((*NETWORKS, "text", "empty"))}


def predict(networks, latents, timesteps, text):
    scale = np.array([NUMBERS[name] for name in networks], np.float32)[:, None, None, None]
    return jnp.tanh(scale * latents + text["encoder_hidden_states"]) + latents


@pytest.mark.parametrize("course", COURSES)
def test_strengths_along_the_trajectory_are_those_of_flax_pref(course):
    steps, shape = 8, (4, 3, 2)
    terms = {"name": "cpgd", "guidance_scale": "5", "module": "pos", "reference": "base", **COURSES[course]}
    terms["name"] = terms.pop("rule", "cpgd")
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False)
    solver = solver_from_config({**scheduler.config, "_class_name": "DDIMScheduler"}, steps)
    table = tabulate(named_rule(**terms), steps, 2)
    keys = image_keys(SEED, [0, 1])
    prompts = ({"encoder_hidden_states": np.full((2, *shape), NUMBERS[name], np.float32)} for name in ("text", "empty"))
    references = nchw(np.asarray(sample(predict, table, solver, keys, *prompts, shape)))

    guidance = PIPELINE["Guidance"](terms, steps)
    latents, calls = nchw(np.asarray(draw_normal(keys, 0, shape))), 0
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps):

        def their_predict(rows, x=latents):
            nonlocal calls
            calls += len(rows)
            return {row: torch.tanh(NUMBERS[row[0]] * x + NUMBERS[row[1]]) + x for row in rows}

        latents = scheduler.step(guidance(i, their_predict), t, latents).prev_sample
    assert calls <= table.evaluations
    assert relative_error(latents, references) < 5e-6


def test_full_weights_and_a_base_beside_them_draw_what_adapters_draw(pair, tmp_path):
    flags = flags_of(pair.folder, w="2")
    full = {**flags, "module": (f"pos={pair.folder / 'full'}", flags["module"][1])}
    pair.register(rule="cpgd", w="2")
    references = theirs(pair.pipeline, num_inference_steps=4)
    out = write(tmp_path / "out", full, "--include-base")
    assert json.loads((out / "networks" / "networks.json").read_text())["base"] is None
    (pair.folder / "base").rename(pair.folder / "elsewhere")
    try:
        pipeline = load(out)
    finally:
        (pair.folder / "elsewhere").rename(pair.folder / "base")
    assert (pipeline.networks.lora, list(pipeline.networks.unets)) == (["module_neg"], ["module_pos"])
    assert difference(theirs(pipeline, num_inference_steps=4), references) < 0.1
    negative = ["dull", "dog"]
    avoiding = theirs(pipeline, num_inference_steps=4, negative_prompt=negative)
    expected = theirs(pair.pipeline, num_inference_steps=4, negative_prompt=negative)
    assert difference(avoiding, expected) < 0.1 and difference(avoiding, references) > 1


def test_half_precision_is_that_of_the_call_to_diffusers(pair):
    pipeline = load(pair.folder / "out", torch_dtype=torch.bfloat16)
    pipeline.register_to_config(rule={**pair.register(rule="cpgd", w="2")})
    assert {part.dtype for part in (pipeline, pipeline.unet, pipeline.vae)} == {torch.bfloat16}
    images = pipeline("a dog", num_inference_steps=1, num_images_per_prompt=2, output_type="pt").images
    assert images.shape == (2, 3, *SIZE) and images.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_solver_of_the_flags_is_the_scheduler_of_diffusers(name, pair):
    config = json.loads((pair.folder / "base" / "scheduler" / "scheduler_config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("use_")}
    own = scheduler_config_of(config, name=name)
    scheduler = getattr(diffusers, own["_class_name"]).from_config(own)
    scheduler.set_timesteps(6)
    solver = solver_from_config(config, 6, name=name)
    # Of second-order solvers, diffusers rounds the timesteps between two.
    np.testing.assert_allclose(scheduler.timesteps.numpy(), solver.timesteps, atol=0.51)


def test_the_defaults_of_a_call_are_those_of_the_flags(pair, tmp_path):
    flags = flags_of(pair.folder, w="norm:0.4@0:0.5", solver="tcd", eta=0.4, spacing="trailing", steps=3)
    out = write(tmp_path / "out", flags)
    index = json.loads((out / "model_index.json").read_text())
    size = {"height": SIZE[0], "width": SIZE[1]}
    assert index["call"] == {"num_inference_steps": 3, **size, "eta": 0.4}
    assert index["rule"]["w"] == "norm:0.4@0:0.5"
    pipeline = load(out)
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    steps = []
    images = pipeline("a dog", callback_on_step_end=lambda pipeline, i, t, state: steps.append(i)).images
    assert steps == [0, 1, 2] and images[0].size == SIZE[::-1]


def test_a_wrong_strength_is_told_by_the_call(pair):
    pair.register(rule="cpgd", w="2")
    for w, message in (
        ("up", "'up' is no strength"),
        ("a=1", "expected strengths for pos, neg"),
        ("list:1:2", "takes"),
    ):
        with pytest.raises(ValueError, match=message):
            theirs(pair.pipeline, w=w)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"rule": "chats", "guidance_scale": "5"},
            "--rule chats: the pipeline.py .* does not have it; expected one of",
        ),
        ({"rule": "python:json:dumps"}, "--rule python:json:dumps: the pipeline.py"),
        ({"quantize": "int8"}, "--quantize does not apply to --format diffusers"),
        ({"attention": "xla"}, "--attention does not apply"),
        ({"platforms": "tpu"}, "--platforms does not apply"),
        ({"batch_size": 2}, "--batch-size does not apply"),
        ({"preset": "fast", "w": "2"}, "--merge does not apply .* guide by predictions"),
        ({"shaping": "cap:0.5"}, "--shaping does not apply"),
        ({"sigmas": "ays"}, "--sigmas ays does not apply"),
        ({"spacing": "999,499", "steps": 2}, "--spacing does not apply"),
        ({"dtype": "bfloat16"}, "--dtype bfloat16 does not apply"),
        ({"w": "2", "module_base": "demo"}, "--module-base demo does not apply"),
        ({"w": "2", "vae": "demo"}, "--vae: makes a base that no path names; add --include-base"),
        ({"w": "2", "modules": ("a-b",), "rule": "pgd"}, "--module a-b=...: expected a name of letters"),
        ({"w": "2", "modules": ("text",), "rule": "pgd"}, "adapts text encoders, which the pipeline.py"),
        ({"w": "2", "out": "docs"}, "docs: exists and is not empty"),
        ({"rule": "cpgd"}, "--rule cpgd needs --w"),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(flags, message, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "load", None)
    (pair.folder / "a-b.safetensors").write_bytes((pair.folder / "pos.safetensors").read_bytes())
    save_file({"lora_te_text_model_x.lora_down.weight": torch.zeros(1, 1)}, pair.folder / "text.safetensors")
    out = Path(flags.get("out", tmp_path / "out"))
    asked = {name: value for name, value in flags.items() if name != "out"}
    with pytest.raises((UserError, OSError), match=message) as told:
        write(out, flags_of(pair.folder, **asked))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_include_base_belongs_to_diffusers(tmp_path):
    with pytest.raises(UserError, match="--include-base applies to --format diffusers"):
        export.main(["--model", "demo", "--out", str(tmp_path / "out"), "--include-base"])


def test_the_rules_of_the_flags_are_those_of_the_file():
    assert set(PIPELINE["RULES"]) == set(GUIDED)


@pytest.mark.parametrize("pair", ["sdxl"], indirect=True)  # diffusers has no modular pipeline of Stable Diffusion 1.5
def test_a_guider_of_modular_pipelines_draws_the_same(pair, monkeypatch):
    pair.register(rule="cpgd", w="norm:0.5", every=2)
    references = theirs(pair.pipeline, num_inference_steps=4)
    monkeypatch.syspath_prepend(pair.folder / "out")
    from guider import PreferenceGuider

    whole = DiffusionPipeline.from_pretrained(pair.folder / "base", add_watermarker=False)
    pipeline = StableDiffusionXLAutoBlocks().init_pipeline()
    guider = PreferenceGuider.load(pair.folder / "out", whole.unet)
    guider.rule = dict(pair.pipeline.config.rule)
    pipeline.update_components(**{name: part for name, part in whole.components.items() if part}, guider=guider)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 4}
    images = pipeline(prompt=PROMPTS, latents=noise(), **size, output_type="np", output="images")
    assert difference(np.asarray(images), references) < 0.1
