"""Draws images from a Stable Diffusion checkpoint: of one prompt, or of evaluation sets of tens of thousands.

    python -m sample.images --model PATH_OR_ID --prompt "a lighthouse in a storm" --seed 0 --out runs/images
    python -m sample.images --model PATH_OR_ID --prompts prompts.tsv --seeds 0-3 --module pos=pos.safetensors \\
        --module neg=neg.safetensors --rule cpgd --w 4 --steps 25 --out runs/cpgd

The checkpoint is a folder in the layout of diffusers, or the Hub id of one: Stable Diffusion 1.x, 2.x or XL; "demo" is
the small one of this package. Killed and started again with the same flags, the program goes on where it was.
"""

import dataclasses
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from flax_pref.checkpoints.diffusers import Pipeline, load_pipeline
from flax_pref.checkpoints.hub import find_checkpoint
from flax_pref.checkpoints.modules import OWN_BASE, fingerprint, load_modules, merge_modules
from flax_pref.checkpoints.weights import with_attention
from flax_pref.config import UserError, check_file_systems, parse_flags, run_main
from flax_pref.data.prompts import Prompt, read_prompts
from flax_pref.diffusion.conditioning import chunks, warn_of_cuts
from flax_pref.diffusion.guidance import (
    Rule,
    Schedule,
    autoguidance,
    cfg,
    chats,
    cpgd,
    cpgd_conditional,
    merge_weights,
    npo,
    pgd,
    tabulate,
)
from flax_pref.diffusion.sampler import image_keys
from flax_pref.diffusion.solvers import Solver, from_config
from flax_pref.diffusion.text_to_image import TextToImage, to_bytes, watched
from flax_pref.evaluation.image_files import ImageFormat
from flax_pref.evaluation.image_set import ImageSet, Item, Layout, Writer
from flax_pref.models.attention import Kernel
from flax_pref.models.bank import AXIS
from flax_pref.models.platform import default_dtype
from flax_pref.parallel.hosts import join, wait_for_others
from flax_pref.parallel.mesh import make_mesh
from flax_pref.parallel.signals import stopped_by

RuleName = Literal[
    "cfg",
    "fine_tuned",
    "pgd",
    "cpgd",
    "cpgd_conditional",
    "positive_only",
    "negative_only",
    "npo",
    "chats",
    "autoguidance",
]

# Ways to use modules pos and neg, with the time of an image against plain CFG's and the share of full cPGD's gain that
# docs/guidance.md has measured.
PRESETS = {
    "full": {"rule": "cpgd"},  # 3.1, 100 %
    "fast": {"rule": "cpgd", "merge": True},  # 1.0, 107 %
    "light": {"rule": "cpgd_conditional", "every": 5, "between": "extrapolate"},  # 1.1, 105 %
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Draws images from a Stable Diffusion checkpoint."""

    model: str
    """Folder in the layout of diffusers, Hub id, or "demo"."""
    prompt: tuple[str, ...] = ()
    """One text or several."""
    prompts: str | None = None
    """In place of these a file of them (txt, csv, tsv, json, jsonl, parquet), or a folder of such; the files of
    PartiPrompts, HPDv2, Pick-a-Pic and GenEval are known."""
    column: str | None = None
    """Of the file, with the prompts; None: the one that is named so."""
    negative_prompt: str | None = None
    """What to steer away from."""
    seeds: str = "0"
    """One image of every prompt for each: a number, a range such as 0-3, or several with commas."""
    seed: int | None = None
    """The same for a single one."""
    out: str = "runs/images"
    """Folder for the images, local or in a bucket (gs://...)."""
    layout: Layout | None = None
    """Of the images' files: webdataset (tar shards), flat, or what the scorers of GenEval or HPSv2 read; None:
    webdataset for a file of prompts, else flat."""
    format: ImageFormat = "png"
    shard_size: int = 1000
    """Images in a tar shard."""

    module: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=PATH of a preference module, once for each: a LoRA file, or a folder with LoRA or full weights. Names are
    those of the rule: pos and neg, bad in autoguidance, any for pgd and fine_tuned."""
    module_base: str | None = None
    """The checkpoint that the modules were trained on, if it is another than the model: their difference is predicted
    there. None: LoRA modules move onto the model."""
    preset: Literal["full", "fast", "light"] | None = None
    """In place of rule, every, between and merge: full is cPGD, fast cPGD merged into the weights, light cPGD on the
    prompt only, in every fifth step. docs/guidance.md has what they cost and what they gain."""
    rule: RuleName = "cfg"
    """How the predictions of model and modules are combined."""
    w: str | None = None
    """Strength of the modules: 4, linear:8:0, cosine:0:8 or list:8:4:0, the last three along the trajectory; with
    @0.2:0.8 behind it for that part of the trajectory only."""
    guidance_scale: str = "7.5"
    """Of classifier-free guidance; 1 is none. May be a schedule like w."""
    every: int = 1
    """Predict what the modules add in every so many steps only."""
    between: Literal["hold", "extrapolate"] = "hold"
    """What to do in the steps between."""
    merge: bool = False
    """Merge the modules into the weights, w times, and draw with classifier-free guidance."""
    rescale: float | None = None
    """Share of guidance rescale, 0 to 1."""
    proxy: float = 0.5
    """Of the proxy prompt of chats."""

    steps: int = 50
    solver: Literal["ddim", "dpm++", "dpm++_karras", "euler", "euler_karras", "pndm"] | None = None
    """None: the one of the checkpoint's scheduler."""
    eta: float = 0.0
    """Noise in the steps of ddim, 0 to 1."""
    height: int | None = None
    """In pixels; None: the size that the network was trained on."""
    width: int | None = None
    batch_size: int = 1
    """Images that a device draws at the same time."""
    mesh: str = "data=-1"
    """How to use the devices: data=-1 shares out the images, network=3,data=-1 puts base and modules with full weights
    on different devices too."""
    hosts: str | None = None
    """None: joins the other processes of a TPU pod, Slurm or Open MPI, where there are any; or auto, none, or
    ADDRESS:PORT,PROCESSES,NUMBER."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the networks compute in; auto: bfloat16 on TPUs and GPUs, float32 on CPUs."""
    variant: str | None = None
    """Of the weight files, e.g. fp16; None: the full ones, or what is there."""
    attention: Kernel = "auto"
    """Kernel of the UNet's attention; auto: the fastest for the device."""

    def __post_init__(self):
        if bool(self.prompt) == (self.prompts is not None):
            raise UserError("expected either --prompt with texts or --prompts with a file of them")
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: expected at least 1")
        if self.seed is not None and self.seeds != "0":
            raise UserError(f"--seed {self.seed} and --seeds {self.seeds}: expected one of them")


def main(arguments: list[str]) -> None:
    """Draws and writes the images."""
    config = with_preset(parse_flags(arguments, Config))
    process, processes = join(config.hosts)
    check_file_systems(config.out, config.prompts)
    rule, sources = rule_of(config), modules_of(config)
    check_modules(rule, sources, config)
    prompts = prompts_of(config)
    items = [Item(prompt, seed) for prompt in prompts for seed in seeds_of(config)]
    folder = find_checkpoint(config.model, variant=config.variant)
    images = ImageSet(
        config.out,
        items,
        settings_of(config, folder, sources),
        layout=config.layout or ("flat" if config.prompts is None else "webdataset"),
        image_format=config.format,
        shard_size=config.shard_size,
        process_index=process,
        process_count=processes,
    )
    images.begin()
    if images.done:
        print(f"{config.out}: {images.done} of {images.total} images are there")
    if len(images.pending) and not draw_set(load(config, folder, rule, sources), images, items, config):
        print(
            f"{config.out}: stopped after {images.done} of {images.total} images; the same command goes on from there"
        )
        return
    wait_for_others("all images are drawn")
    images.finish()
    if process == 0:
        print(f"wrote {len(items)} images, manifest.parquet and contact_sheet.png to {config.out}")


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


def draw_set(loaded: tuple[TextToImage, Rule], images: ImageSet, items: Sequence[Item], config: Config) -> bool:
    """Draws what is pending; whether it came to the end, that is, was not told to stop.

    Batches are always the same, whatever is there already: so an image comes out the same, bit by bit, in a run that
    was killed and goes on.
    """
    draw, rule = loaded
    own, pending = images.own, set(images.pending.tolist())
    size, steps = draw.batch_size, len(draw.solver.timesteps)
    batches = [(own[chosen], n) for chosen, n in chunks(len(own), size) if pending & set(own[chosen[:n]].tolist())]
    table = tabulate(rule, steps, size)
    warn_of_cuts(draw.pipeline, [item.prompt.text for item in items])
    negative = None if config.negative_prompt is None else [config.negative_prompt] * size
    by_step = config.prompts is None
    total = {"total": len(batches) * steps} if by_step else {"total": images.total, "initial": images.done}
    started, drawn = time.perf_counter(), 0
    bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    def told(count: int) -> None:
        progress.set_postfix_str(f"{images.total - images.done} images left", refresh=False)
        progress.update(0 if by_step else count)

    with (
        stopped_by(signal.SIGTERM) as stop,
        tqdm(desc="drawing", unit="step" if by_step else "image", bar_format=bar_format, **total) as progress,
        watched(progress, by_step) as bar,
        Writer(images, written=told, ahead=1) as writer,
    ):
        for chosen, n in batches:
            batch = [items[i] for i in chosen]
            keys = image_keys([item.seed for item in batch], [item.prompt.id for item in batch])
            texts = [item.prompt.text for item in batch]
            pixels = to_bytes(draw.draw(texts, keys, table, negative_prompts=negative, bar=bar))
            wanted = [place for place, i in enumerate(chosen[:n]) if int(i) in pending]
            writer.put(chosen[wanted], Chosen(pixels, wanted))
            drawn += len(wanted)
            if stop():
                break
    seconds = time.perf_counter() - started
    print(f"drew {drawn} images in {seconds:.0f} s, {drawn / seconds:.3g} images/s")
    return not len(images.pending)


class Chosen:
    """Some images of a batch that is still being drawn."""

    def __init__(self, pixels: jax.Array, places: list[int]):
        self.pixels, self.places = pixels, places

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.pixels)[self.places]


# ----------------------------------------------------------------------------------------------------------------------
# From flags to parts


def with_preset(config: Config) -> Config:
    """The flags with those that the preset stands for."""
    if config.preset is None:
        return config
    for field in dataclasses.fields(config):
        expected, given = PRESETS[config.preset].get(field.name), getattr(config, field.name)
        if expected is not None and given not in (expected, field.default):
            raise UserError(f"--preset {config.preset} is --{field.name} {expected}, but --{field.name} is {given}")
    return dataclasses.replace(config, **PRESETS[config.preset], preset=None)


def load(config: Config, folder: Path, rule: Rule, sources: dict[str, str]) -> tuple[TextToImage, Rule]:
    """The checkpoint with its modules on the devices, and the rule to draw by."""
    dtype = default_dtype(config.dtype)
    devices = jax.local_devices()
    print(f"loading {folder} on {len(devices)} x {devices[0].device_kind} in {dtype}")
    pipeline = load_pipeline(folder, jnp.dtype(dtype), variant=config.variant)
    guided = load_modules(pipeline.unet, sources, own_base=config.module_base, dtype=jnp.dtype(dtype))
    if config.merge:
        guided = guided._replace(base=merge_modules(pipeline.unet, guided, merge_weights(rule)), modules={})
        rule = cfg(rule.guidance_scale, rescale=rule.rescale)
    mesh = make_mesh(config.mesh, devices)
    shards = mesh.size // mesh.shape.get(AXIS, 1)
    draw = TextToImage(
        dataclasses.replace(pipeline, unet=with_attention(guided.base, config.attention)),
        solver_of(pipeline, folder, config),
        size_of(pipeline, config),
        batch_size=config.batch_size * shards,
        modules={name: with_attention(network, config.attention) for name, network in guided.modules.items()},
        mesh=None if mesh.size == 1 else mesh,
    )
    return draw, rule


def rule_of(config: Config) -> Rule:
    """The rule that the flags describe."""
    s = Schedule.parse(config.guidance_scale)
    w = None if config.w is None else Schedule.parse(config.w)
    if config.merge and w is not None:
        if w != Schedule(w.values):
            raise UserError(f"--w {config.w} --merge: only one number can be merged into weights")
        w = w.values[0]
    module = next(iter(modules_of(config)), "module")
    reference = "base" if config.module_base is None else OWN_BASE
    options = {"rescale": config.rescale}
    strong = {**options, "every": config.every, "between": config.between}
    steady = {
        "cfg": lambda: cfg(s, **options),
        "fine_tuned": lambda: cfg(s, module, **options),
        "npo": lambda: npo(s, **options),
        "chats": lambda: chats(s, proxy=config.proxy, **options),
    }
    contrasting = {
        "pgd": lambda: pgd(w, s, module, reference=reference, **strong),
        "cpgd": lambda: cpgd(w, s, **strong),
        "cpgd_conditional": lambda: cpgd_conditional(w, s, **strong),
        "positive_only": lambda: cpgd(w, s, negative=reference, **strong),
        "negative_only": lambda: cpgd(w, s, positive=reference, **strong),
        "autoguidance": lambda: autoguidance(w, **strong),
    }
    if config.rule in steady:
        for name, given in (("--w", w is not None), ("--merge", config.merge), ("--every", config.every != 1)):
            if given:
                raise UserError(f"--rule {config.rule} has no use for {name}; expected one of {', '.join(contrasting)}")
        return steady[config.rule]()
    if w is None:
        raise UserError(f"--rule {config.rule} needs --w, the strength of the modules, e.g. --w 4")
    return contrasting[config.rule]()


def modules_of(config: Config) -> dict[str, str]:
    """Path of each module."""
    modules = {}
    for text in config.module:
        name, _, path = text.partition("=")
        if not name or not path or name in modules or name in ("base", OWN_BASE):
            raise UserError(f"--module {text}: expected NAME=PATH with a name of its own, e.g. pos=pos.safetensors")
        modules[name] = path
    return modules


def check_modules(rule: Rule, sources: dict[str, str], config: Config) -> None:
    """That the modules are those that the rule asks for."""
    there = {"base", *sources} | ({OWN_BASE} if config.module_base is not None else set())
    asked = set(rule.networks())
    if missing := [name for name in rule.networks() if name not in there]:
        raise UserError(
            f"--rule {config.rule} needs a module {missing[0]!r}; expected --module {missing[0]}=PATH"
            + (f", there are {', '.join(sources)}" if sources else "")
        )
    if unused := [name for name in sources if name not in asked]:
        useful = ", ".join(sorted(asked - {"base"})) or "none"
        raise UserError(
            f"--rule {config.rule} has no use for module {unused[0]!r}, only for {useful}; expected another --rule"
        )


def prompts_of(config: Config) -> list[Prompt]:
    """The prompts that the flags name."""
    if config.prompts is not None:
        return read_prompts(config.prompts, column=config.column)
    return [Prompt(i, text, "", {"prompt": text}) for i, text in enumerate(config.prompt)]


def seeds_of(config: Config) -> list[int]:
    """The seeds that the flags name, in order."""
    if config.seed is not None:
        return [config.seed]
    seeds = []
    for part in config.seeds.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--seeds {config.seeds}: expected a number, a range such as 0-3, or several with commas")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(seeds))


# Flags that say where and how to work, not what to draw: a run may go on under others.
WORKING = (
    *("prompt", "prompts", "column", "seeds", "seed", "out", "layout", "format", "shard_size", "module"),
    *("batch_size", "mesh", "hosts", "attention"),
)


def settings_of(config: Config, folder: Path, sources: dict[str, str]) -> dict:
    """What the images depend on besides prompt and seed."""
    settings = {name: value for name, value in vars(config).items() if name not in WORKING and value is not None}
    settings["dtype"] = default_dtype(config.dtype)
    settings["modules"] = {name: Path(path).name for name, path in sources.items()}
    settings["model_sha256"] = fingerprint(folder)
    hashed = sources | ({OWN_BASE: config.module_base} if config.module_base is not None else {})
    settings["modules_sha256"] = {name: fingerprint(path) for name, path in hashed.items()}
    return settings


def solver_of(pipeline: Pipeline, folder: Path, config: Config) -> Solver:
    """The solver that the config names, or the checkpoint."""
    try:
        return from_config(pipeline.scheduler_config, config.steps, name=config.solver, eta=config.eta)
    except (ValueError, TypeError) as error:
        file = folder / "scheduler" / "scheduler_config.json"
        raise UserError(f"{file}: {error}; --solver chooses another one, --steps their number") from error


def size_of(pipeline: Pipeline, config: Config) -> tuple[int, int]:
    """Height and width in pixels."""
    trained = pipeline.unet.config.sample_size or 64
    trained = trained if isinstance(trained, tuple) else (trained, trained)
    sides = (config.height, config.width)
    factor = pipeline.vae.config.downscale_factor
    return tuple(factor * default if side is None else side for side, default in zip(sides, trained, strict=True))


if __name__ == "__main__":
    sys.exit(run_main(main))
