"""Flags that say what images are drawn with. `diffusion.drawing` turns them into parts."""

import dataclasses
import importlib.util
from typing import Annotated, Literal, TypeVar

import tyro

from flax_pref.checkpoints.model_flags import ModelFlags
from flax_pref.config import UserError
from flax_pref.models.choices import Dtype, Kernel, QuantizedType

F = TypeVar("F", bound="DrawingFlags")

# Ways to use modules pos and neg, with their predictions per image beside those of plain CFG; their gains are in
# docs/guidance.md.
PRESETS = {
    "full": {"rule": "cpgd"},  # 3 times as many
    "fast": {"rule": "cpgd", "merge": True},  # as many
    "light": {"rule": "cpgd_conditional", "every": 5, "between": "extrapolate"},  # 1.25
    "late": {"rule": "cpgd_conditional"},  # 1.25
}
# Parts of the trajectory that a preset confines its strengths to: early by the prompt, late by the modules (SGG,
# arXiv:2603.20584).
INTERVALS = {"late": {"guidance_scale": "@0:0.5", "w": "@0.5:1"}}


# `scheduler_configs.NAMES`, which JAX would be imported for.
SolverName = Literal[
    "ddim",
    "ddpm",
    "deis",
    "dpm++",
    "dpm++_karras",
    "dpm++_sde",
    "dpm++_2s",
    "dpm++_3m",
    "dpm++_3m_sde",
    "euler",
    "euler_a",
    "euler_karras",
    "heun",
    "lcm",
    "lms",
    "pndm",
    "tcd",
    "unipc",
]
SPACINGS = ("leading", "trailing", "linspace")
PromptSyntax = Literal["plain", "a1111", "comfyui"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawingFlags(ModelFlags):
    """What images are drawn with."""

    module: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Preference module as NAME=PATH or NAME=PATH:STRENGTH; repeat the flag for each, and for more files of one module,
    whose differences from the base add up. PATH is a file of adapters of UNet, text encoders or both, or a folder or
    Hub repository (USER/NAME or USER/NAME@REVISION) with adapters or full weights; of several, that NAME is taken. The
    rule determines the names: pos and neg, bad for autoguidance, any name for pgd and fine_tuned, any names for
    multi."""
    embedding: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Textual inversion as NAME=FILE; repeat the flag for each. Prompts that hold the word NAME see its vectors."""
    module_base: str | None = None
    """Checkpoint that the modules were trained on, if it is not the model: their difference is predicted on it
    (default: LoRA modules are moved onto the model)."""
    preset: Literal["full", "fast", "light", "late"] | None = None
    """Shorthand for rule, every, between and merge. full: cPGD; fast: cPGD merged into the weights; light: cPGD on the
    prompt only, in every fifth step; late: classifier-free guidance in the first half of the steps, the modules'
    contrast on the prompt in the second. docs/guidance.md lists the cost and the gain of each."""
    rule: str = "cfg"
    """Guidance rule: cfg, fine_tuned, pgd, cpgd, cpgd_conditional, positive_only, negative_only, npo, chats,
    autoguidance, multi, or your own function as python:MODULE:FUNCTION."""
    w: str | None = None
    """Strength of the modules: a number, or a schedule over the steps (linear:8:0, cosine:0:8, list:8:4:0), with
    @0.2:0.8 behind it to restrict it to that part of the trajectory. One strength per module: pos=3,neg=1. norm:0.3 is
    a share of what classifier-free guidance adds in the same step, so that one number fits modules of any strength."""
    shaping: str | None = None
    """Change of the contrast before it is added: cap:SHARE (at most so long as this share of what classifier-free
    guidance adds), orthogonal (to what it adds), apg:PARALLEL:RADIUS:MOMENTUM (APG) or decay:ALPHA (MAMBO-G)."""
    guidance_scale: str = "7.5"
    """Classifier-free guidance scale; 1 turns it off. A number or a schedule, as for w."""
    every: int = 1
    """Recompute the contrast every k steps and reuse it in between."""
    between: Literal["hold", "extrapolate"] = "hold"
    """How the steps in between reuse the contrast: hold the last one, or extrapolate the last two."""
    merge: bool = False
    """Merge the modules into the weights with strength w, and sample with classifier-free guidance."""
    rescale: float | None = None
    """Guidance rescale factor, 0 to 1 (default: no rescaling)."""
    proxy: float | None = None
    """CHATS coefficient a: proxy = (1 + a) * empty - a * text (default: 0.5)."""

    steps: int = 50
    """Sampling steps."""
    solver: SolverName | None = None
    """Solver, whatever the checkpoint's scheduler says (default: the one of the scheduler). docs/solvers.md lists for
    which models each is."""
    sigmas: Literal["karras", "exponential", "beta", "ays"] | None = None
    """Noise levels that the solver visits; ays: Align Your Steps for SD1.5 or SDXL (default: the scheduler's)."""
    spacing: str | None = None
    """Spacing of the timesteps: leading, trailing, linspace, or a list such as 999,749,499,249 (default: the
    scheduler's)."""
    eta: float | None = None
    """Share of new noise in a step, from 0 (deterministic) to 1: of ddim (default: 0), or gamma of tcd (default:
    0.3)."""
    height: int | None = None
    """Image height in pixels (default: the size that the network was trained on)."""
    width: int | None = None
    """Image width in pixels (default: the size that the network was trained on)."""
    batch_size: int = 1
    """Images per device and batch."""
    dtype: Dtype = "auto"
    """Compute precision; auto: bfloat16 on TPUs and GPUs, float32 on CPUs."""
    quantize: QuantizedType | None = None
    """Store the UNet's kernels in eight bits: half the memory of bfloat16 at the same speed (default: off).
    docs/serving.md lists the error."""
    attention: Kernel = "auto"
    """Attention kernel of the UNet; auto: the fastest for the device."""

    def __post_init__(self):
        # These import JAX, which --help does not need.
        from flax_pref.diffusion.guidance import Schedule, parse_strengths
        from flax_pref.diffusion.rules import find_rule
        from flax_pref.diffusion.shaping import parse_shaping

        find_rule(self.rule)
        if self.shaping is not None:
            try:
                parse_shaping(self.shaping)
            except ValueError as error:
                raise UserError(f"--shaping {self.shaping}: {error}") from error
        for name in ("batch_size", "steps", "every", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1")
        for name, value in (("eta", self.eta), ("rescale", self.rescale)):
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"--{name} {value}: expected 0 to 1")
        if self.spacing is not None and self.spacing not in SPACINGS:
            timesteps = self.spacing.split(",")
            if not all(text.strip().isascii() and text.strip().isdigit() for text in timesteps):
                raise UserError(f"--spacing {self.spacing}: expected {', '.join(SPACINGS)} or timesteps as 999,499")
            if len(timesteps) != self.steps:
                raise UserError(
                    f"--spacing {self.spacing}: {len(timesteps)} timesteps for --steps {self.steps}; expected one for "
                    "each step"
                )
        if "=" in self.guidance_scale:
            raise UserError(
                f"--guidance-scale {self.guidance_scale}: expected one strength, it is the same for all modules"
            )
        for flag, text, parse in (
            ("w", self.w, parse_strengths),
            ("guidance-scale", self.guidance_scale, Schedule.parse),
        ):
            try:
                strength = None if text is None else parse(text)
            except ValueError as error:
                raise UserError(f"--{flag} {text}: {error}") from error
            if flag == "guidance-scale" and isinstance(strength, Schedule) and min(strength.values) < 0:
                raise UserError(f"--guidance-scale {text}: expected 0 or more")
        if self.quantize is not None and importlib.util.find_spec("qwix") is None:
            raise UserError(f"--quantize {self.quantize}: needs qwix; pip install 'flax-pref[quantize]'")


def with_preset(flags: F) -> F:
    """The flags with those that the preset stands for.

    Raises:
        UserError: a flag contradicts the preset.
    """
    if flags.preset is None:
        return flags
    for field in dataclasses.fields(flags):
        expected, given = PRESETS[flags.preset].get(field.name), getattr(flags, field.name)
        if expected is not None and given not in (expected, field.default):
            raise UserError(f"--preset {flags.preset} is --{field.name} {expected}, but --{field.name} is {given}")
    confined = {}
    for name, interval in INTERVALS.get(flags.preset, {}).items():
        strength = getattr(flags, name)
        if strength is not None and "@" in strength:
            flag = name.replace("_", "-")
            raise UserError(
                f"--preset {flags.preset} has intervals of its own, but --{flag} is {strength}; leave its @"
            )
        confined[name] = strength and strength + interval
    return dataclasses.replace(flags, **PRESETS[flags.preset], **confined, preset=None)
