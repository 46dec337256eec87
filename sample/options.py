"""Flags that say what is drawn with, and the parts that they stand for: checkpoint, modules, rule, solver, size."""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax.numpy as jnp
import tyro
from jax.sharding import Mesh

from flax_pref.checkpoints.abstract import describe
from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.checkpoints.hub import find_checkpoint
from flax_pref.checkpoints.modules import OWN_BASE, fingerprint, load_modules, merge_modules
from flax_pref.config import UserError
from flax_pref.diffusion.guidance import Rule, Schedule, merge_weights, tabulate
from flax_pref.diffusion.rules import CONTRASTING, STEADY, RuleName, named_rule
from flax_pref.diffusion.solvers import Solver, from_config
from flax_pref.diffusion.text_to_image import TextToImage
from flax_pref.models.attention import Kernel
from flax_pref.models.network import Network, with_attention
from flax_pref.models.quantized import QuantizedType, quantize
from flax_pref.models.unet import UNetConfig
from flax_pref.models.vae import VAEConfig

# Ways to use modules pos and neg, with the time of an image against plain CFG's and the share of full cPGD's gain that
# docs/guidance.md has measured.
PRESETS = {
    "full": {"rule": "cpgd"},  # 3.1, 100 %
    "fast": {"rule": "cpgd", "merge": True},  # 1.0, 107 %
    "light": {"rule": "cpgd_conditional", "every": 5, "between": "extrapolate"},  # 1.1, 105 %
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """What images are drawn with."""

    model: str
    """Folder in the layout of diffusers, Hub id, or "demo"."""
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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the networks compute in; auto: bfloat16 on TPUs and GPUs, float32 on CPUs."""
    quantize: QuantizedType | None = None
    """Keep the UNet's kernels in eight bits: half the memory of bfloat16, the same time. docs/serving.md has the error
    that this makes."""
    variant: str | None = None
    """Of the weight files, e.g. fp16; None: the full ones, or what is there."""
    attention: Kernel = "auto"
    """Kernel of the UNet's attention; auto: the fastest for the device."""

    def __post_init__(self):
        for name in ("batch_size", "steps", "every", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1")
        for name, value in (("eta", self.eta), ("rescale", self.rescale)):
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"--{name} {value}: expected 0 to 1")
        scale = strength("guidance-scale", self.guidance_scale)
        if any(value < 0 for value in scale.values):
            raise UserError(f"--guidance-scale {self.guidance_scale}: expected 0 or more")
        if self.w is not None:
            strength("w", self.w)
        if self.quantize is not None and importlib.util.find_spec("qwix") is None:
            raise UserError(f"--quantize {self.quantize}: needs qwix; pip install 'flax-pref[quantize]'")


def strength(flag: str, text: str) -> Schedule:
    """The strength that a flag gives.

    Raises:
        UserError: it is none; names the flag.
    """
    try:
        return Schedule.parse(text)
    except ValueError as error:
        raise UserError(f"--{flag} {text}: {error}") from error


def with_preset(config: Drawing) -> Drawing:
    """The flags with those that the preset stands for."""
    if config.preset is None:
        return config
    for field in dataclasses.fields(config):
        expected, given = PRESETS[config.preset].get(field.name), getattr(config, field.name)
        if expected is not None and given not in (expected, field.default):
            raise UserError(f"--preset {config.preset} is --{field.name} {expected}, but --{field.name} is {given}")
    return dataclasses.replace(config, **PRESETS[config.preset], preset=None)


# ----------------------------------------------------------------------------------------------------------------------
# Rules and modules


def rule_terms(config: Drawing) -> dict[str, Any]:
    """The rule that the flags describe, as arguments of `named_rule` that JSON can hold."""
    if config.rule in STEADY:
        for name, given in (("--w", config.w is not None), ("--merge", config.merge), ("--every", config.every != 1)):
            if given:
                expected = ", ".join(CONTRASTING)
                raise UserError(f"--rule {config.rule} has no use for {name}; expected one of {expected}")
    elif config.w is None:
        raise UserError(f"--rule {config.rule} needs --w, the strength of the modules, e.g. --w 4")
    w = config.w
    if config.merge:
        schedule = Schedule.parse(w)
        if schedule != Schedule(schedule.values):
            raise UserError(f"--w {config.w} --merge: only one number can be merged into weights")
        w = schedule.values[0]
    return {
        "name": config.rule,
        "guidance_scale": config.guidance_scale,
        "w": w,
        "module": next(iter(modules_of(config)), "module"),
        "reference": "base" if config.module_base is None else OWN_BASE,
        "every": config.every,
        "between": config.between,
        "rescale": config.rescale,
        "proxy": config.proxy,
    }


def drawn_terms(config: Drawing) -> dict[str, Any]:
    """The same of the rule to draw by: classifier-free guidance where modules are merged into the weights."""
    if not config.merge:
        return rule_terms(config)
    return rule_terms(dataclasses.replace(config, rule="cfg", w=None, every=1, merge=False))


def rule_of(config: Drawing) -> Rule:
    """The rule that the flags describe."""
    return named_rule(**rule_terms(config))


def modules_of(config: Drawing) -> dict[str, str]:
    """Path of each module."""
    modules = {}
    for text in config.module:
        name, _, path = text.partition("=")
        if not name or not path or name in modules or name in ("base", OWN_BASE):
            raise UserError(f"--module {text}: expected NAME=PATH with a name of its own, e.g. pos=pos.safetensors")
        modules[name] = path
    return modules


def check_modules(rule: Rule, sources: dict[str, str], config: Drawing) -> None:
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
        rules = " or ".join(f"--rule {rule}" for rule in rules_with(list(sources)) or rules_with(unused[:1]))
        raise UserError(
            f"--rule {config.rule} has no use for module {unused[0]!r}, only for {useful}; expected "
            f"{rules or 'modules that a rule asks for'}"
        )


def rules_with(modules: Sequence[str]) -> list[str]:
    """The rules that need these modules and no others; fine_tuned and pgd go by any single one."""
    rules = {name: named_rule(name, guidance_scale=7.5, w=1.0, module=modules[0]) for name in get_args(RuleName)}
    return [name for name, rule in rules.items() if set(rule.networks()) - {"base"} == set(modules)]


def fingerprints(config: Drawing, folder: Path, sources: dict[str, str]) -> dict[str, Any]:
    """What of the files the images depend on."""
    hashed = _module_files(config, sources)
    return {
        "modules": {name: Path(path).name for name, path in sources.items()},
        "model_sha256": fingerprint(folder),
        "modules_sha256": {name: fingerprint(path) for name, path in hashed.items()},
    }


def _module_files(config: Drawing, sources: dict[str, str]) -> dict[str, str]:
    """Paths of the modules, and of the base that they were trained on where the flags name one."""
    return sources | ({OWN_BASE: config.module_base} if config.module_base is not None else {})


# ----------------------------------------------------------------------------------------------------------------------
# Before weights are read


def check_drawing(config: Drawing, model: str | Path, sources: dict[str, str]) -> None:
    """Checks the flags by the config files of the checkpoint, and that the modules are there; reads no weights.

    Args:
        config: the flags.
        model: folder of the checkpoint, or as `checkpoints.abstract.describe` takes it.
        sources: path of each module.

    Raises:
        FileNotFoundError: a file is missing.
        UserError, ValueError: the solver cannot make so many steps, a strength does not fit them, the size is not one
            of the checkpoint's, or a config file is not what the networks need.
    """
    for path in _module_files(config, sources).values():
        find_checkpoint(path)
    family = describe(str(model))
    size_of(family.unet, family.vae, config)
    steps = len(solver_of(family.scheduler_config, Path(model), config).timesteps)
    for flag, text in (("w", config.w), ("guidance-scale", config.guidance_scale)):
        schedule = None if text is None else strength(flag, text)
        if schedule is not None and not schedule.active(steps).any():
            raise UserError(f"--{flag} {text}: none of the {steps} steps lies in this part of the trajectory")
        if schedule is not None and schedule.shape == "list" and len(schedule.values) != steps:
            raise UserError(
                f"--{flag} {text}: {len(schedule.values)} values, but the solver takes {steps} steps; expected one "
                "for each"
            )
    tabulate(named_rule(**drawn_terms(config)), steps, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def text_to_image(
    config: Drawing,
    folder: Path,
    rule: Rule,
    sources: dict[str, str],
    *,
    dtype: str,
    batch_size: int,
    mesh: Mesh | None = None,
) -> TextToImage:
    """The checkpoint with its modules.

    Args:
        config: the flags.
        folder: of the checkpoint.
        rule: that the flags describe.
        sources: path of each module.
        dtype: what the networks compute in.
        batch_size: images on all devices.
        mesh: of these, or None for one.
    """
    pipeline = load_pipeline(folder, jnp.dtype(dtype), variant=config.variant)
    guided = load_modules(pipeline.unet, sources, own_base=config.module_base, dtype=jnp.dtype(dtype))
    if config.merge:
        guided = guided._replace(base=merge_modules(pipeline.unet, guided, merge_weights(rule)), modules={})

    def prepared(network: Network) -> Network:
        params = network.params if config.quantize is None else quantize(network.params, config.quantize)
        return with_attention(network._replace(params=params), config.attention)

    return TextToImage(
        dataclasses.replace(pipeline, unet=prepared(guided.base)),
        solver_of(pipeline.scheduler_config, folder, config),
        size_of(pipeline.unet.config, pipeline.vae.config, config),
        batch_size=batch_size,
        modules={name: prepared(network) for name, network in guided.modules.items()},
        mesh=mesh,
    )


def solver_of(scheduler_config: Mapping[str, Any], folder: Path, config: Drawing) -> Solver:
    """The solver that the config names, or the checkpoint."""
    try:
        return from_config(scheduler_config, config.steps, name=config.solver, eta=config.eta)
    except (ValueError, TypeError) as error:
        file = folder / "scheduler" / "scheduler_config.json"
        raise UserError(f"{file}: {error}; --solver chooses another one, --steps their number") from error


def size_of(unet: UNetConfig, vae: VAEConfig, config: Drawing) -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
        UserError: a side is no multiple of the autoencoder's factor.
    """
    trained = unet.sample_size or 64
    trained = trained if isinstance(trained, tuple) else (trained, trained)
    for name, side in (("height", config.height), ("width", config.width)):
        if side is not None and side % vae.downscale_factor:
            near = max(1, round(side / vae.downscale_factor)) * vae.downscale_factor
            raise UserError(f"--{name} {side}: expected multiples of {vae.downscale_factor}, e.g. {near}")
    sides = (config.height, config.width)
    return tuple(
        vae.downscale_factor * default if side is None else side for side, default in zip(sides, trained, strict=True)
    )
