"""From flags to the parts that draw images: checkpoint, modules, rule, solver and size, each resolved once."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from flax_pref.checkpoints.checkpoint import Checkpoint
from flax_pref.checkpoints.diffusers import open_model
from flax_pref.checkpoints.embeddings import add_embedding
from flax_pref.checkpoints.hub import find_checkpoint
from flax_pref.checkpoints.modules import OWN_BASE, find_module, fingerprint, load_modules, merge_modules
from flax_pref.config import UserError
from flax_pref.diffusion.drawing_flags import SPACINGS, DrawingFlags
from flax_pref.diffusion.guidance import Rule, Schedule, merge_weights, parse_strengths, tabulate
from flax_pref.diffusion.rules import CONTRASTING, RULES, find_rule, named_rule
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.diffusion.solvers import Solver
from flax_pref.diffusion.text_to_image import IMITATED_GUIDANCE, TextToImage, trained_size
from flax_pref.models.network import Network, with_attention
from flax_pref.models.quantized import quantize
from flax_pref.models.unet import UNetConfig
from flax_pref.models.vae import VAEConfig

STRENGTH = re.compile(r"-?(\d+\.?\d*|\.\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """What `DrawingFlags` ask for, found and checked; see `resolve_drawing`.

    Attributes:
        flags: that were resolved.
        checkpoint: the model, without its weights.
        embeddings: path of each textual inversion by its word.
        sources: paths of each module by its name, with their strengths.
        rule: that combines the modules.
        terms: arguments of `rules.named_rule` for the rule to sample with, which JSON can hold: those of `rule`, or of
            classifier-free guidance where the modules are merged into the weights.
        sampled: the rule to sample with.
        solver: of the flags or the checkpoint.
        size: height and width in pixels.
        imitated_guidance: guidance scale that a UNet which imitates guidance (LCM) is told.
    """

    flags: DrawingFlags
    checkpoint: Checkpoint
    embeddings: Mapping[str, str]
    sources: Mapping[str, Sequence[tuple[str, float]]]
    rule: Rule
    terms: Mapping[str, Any]
    sampled: Rule
    solver: Solver
    size: tuple[int, int]
    imitated_guidance: float

    def fingerprints(self) -> dict[str, Any]:
        """Names and SHA-256 of the files that the images depend on."""
        parts = {name: [find_module(path, name) for path, _ in parts] for name, parts in self.sources.items()}
        if self.flags.module_base is not None:
            parts[OWN_BASE] = [find_checkpoint(self.flags.module_base)]
        return {
            "modules": {name: _told(parts) for name, parts in self.sources.items()},
            "model_sha256": fingerprint(self.checkpoint.path),
            **{f"{name}_sha256": fingerprint(path) for name, path in self.checkpoint.replaced().items()},
            **{f"embedding_{name}_sha256": fingerprint(file) for name, file in self.embeddings.items()},
            "modules_sha256": {name: "+".join(map(fingerprint, paths)) for name, paths in parts.items()},
        }

    def changed(self, flags: DrawingFlags) -> "Drawing":
        """The same checkpoint with another rule, strengths or steps, and with as many of its modules; reads no file.

        Args:
            flags: which modules, textual inversions and settings of the model are some of those of this drawing.

        Raises:
            UserError, ValueError: as `resolve_drawing`.
        """
        sources = _sources(flags)
        _check_modules(named_rule(**_terms(flags, sources)), sources, flags)
        return _resolved(flags, self.checkpoint, sources, self.embeddings)

    def load(self, *, dtype: str, batch_size: int, mesh: Mesh | None = None) -> TextToImage:
        """The checkpoint with its modules on the devices.

        Args:
            dtype: compute precision.
            batch_size: images on all devices.
            mesh: of the devices; None: one device.

        Raises:
            UserError: a module that is to be merged adapts text encoders.
            FileNotFoundError, ValueError: a file is missing, damaged, or does not fit.
        """
        flags = self.flags
        pipeline = self.checkpoint.load(jnp.dtype(dtype))
        for name, file in self.embeddings.items():
            pipeline = add_embedding(pipeline, name, file)
        guided = load_modules(
            pipeline.unet,
            self.sources,
            text_encoders=pipeline.text_encoders,
            own_base=flags.module_base,
            dtype=jnp.dtype(dtype),
        )
        if flags.merge:
            if guided.text_encoders:
                name = next(iter(guided.text_encoders))
                raise UserError(
                    f"--merge: module {name!r} ({_told(self.sources[name])}) adapts text encoders, whose guidance no "
                    "weights of a UNet can hold; leave out --merge (or --preset fast), or take a file that adapts the "
                    "UNet alone"
                )
            guided = guided._replace(base=merge_modules(pipeline.unet, guided, merge_weights(self.rule)), modules={})

        def prepared(network: Network) -> Network:
            params = network.params if flags.quantize is None else quantize(network.params, flags.quantize)
            return with_attention(network._replace(params=params), flags.attention)

        return TextToImage(
            dataclasses.replace(pipeline, unet=prepared(guided.base)),
            self.solver,
            self.size,
            batch_size=batch_size,
            modules={name: prepared(network) for name, network in guided.modules.items()},
            text_encoders=guided.text_encoders,
            mesh=mesh,
            imitated_guidance=self.imitated_guidance,
        )


def resolve_drawing(flags: DrawingFlags, *, weights: bool = True) -> Drawing:
    """Finds what the flags name and checks that it fits together; reads no weights.

    Args:
        flags: a preset among them is resolved, see `with_preset`.
        weights: False: neither the weights of the model nor the modules need be there; the model is what
            `checkpoints.abstract.describe` takes.

    Raises:
        FileNotFoundError: a file is missing.
        UserError, ValueError: the flags contradict each other, the modules are not those of the rule, the solver cannot
            make so many steps, a strength does not fit the steps, the size is not one of the checkpoint's, or a config
            file is not what the networks need.
    """
    sources, embeddings = _sources(flags), _embeddings(flags)
    rule = named_rule(**_terms(flags, sources))
    if weights:
        _check_modules(rule, sources, flags)
    checkpoint = open_model(flags, weights=weights)
    for name, parts in sources.items():
        for path, _ in parts:
            find_module(path, name)
    for path in (*filter(None, [flags.module_base]), *embeddings.values()):
        find_checkpoint(path)
    return _resolved(flags, checkpoint, sources, embeddings)


def _resolved(
    flags: DrawingFlags,
    checkpoint: Checkpoint,
    sources: Mapping[str, Sequence[tuple[str, float]]],
    embeddings: Mapping[str, str],
) -> Drawing:
    """What follows from the flags and from the config files of a checkpoint."""
    terms = _terms(flags, sources)
    rule = named_rule(**terms)
    unet = checkpoint.config("unet")
    imitated, guiding = IMITATED_GUIDANCE, flags
    if unet.time_cond_proj_dim is not None:
        imitated, guiding = _imitated_guidance(flags)
        terms = _terms(guiding, sources)
        rule = named_rule(**terms)
    size = _size(unet, checkpoint.config("vae"), flags)
    solver = _solver(checkpoint, flags)
    _check_strengths(flags, len(solver.timesteps))
    if flags.merge:
        terms = _terms(dataclasses.replace(guiding, rule="cfg", w=None, every=1, between="hold", merge=False), sources)
    sampled = named_rule(**terms)
    tabulate(sampled, len(solver.timesteps), 1)
    return Drawing(
        **{
            "flags": flags,
            "checkpoint": checkpoint,
            "embeddings": embeddings,
            "sources": sources,
            "rule": rule,
            "terms": terms,
        },
        **{"sampled": sampled, "solver": solver, "size": size, "imitated_guidance": imitated},
    )


# ----------------------------------------------------------------------------------------------------------------------
# Rule and modules


def _sources(flags: DrawingFlags) -> dict[str, list[tuple[str, float]]]:
    """Paths of each module, with their strengths."""
    modules: dict[str, list[tuple[str, float]]] = {}
    for text in flags.module:
        name, _, file = text.partition("=")
        path, _, strength = file.rpartition(":")
        if path and STRENGTH.fullmatch(strength):
            file, strength = path, float(strength)
        else:
            strength = 1.0
        if not name or not file or name in ("base", OWN_BASE):
            raise UserError(f"--module {text}: expected NAME=PATH with a name of its own, e.g. pos=pos.safetensors")
        if any(file == other for other, _ in modules.get(name, ())):
            raise UserError(f"--module {text}: {file} is part of {name} already; expected each file once")
        modules.setdefault(name, []).append((file, strength))
    return modules


def _embeddings(flags: DrawingFlags) -> dict[str, str]:
    """Path of each textual inversion by its word."""
    found: dict[str, str] = {}
    for text in flags.embedding:
        name, _, path = text.partition("=")
        if not name or not path or name in found:
            raise UserError(
                f"--embedding {text}: expected NAME=FILE with a name of its own, e.g. '<toy>=toy.safetensors'"
            )
        found[name] = path
    return found


def _told(parts: Sequence[tuple[str, float]]) -> str:
    """Names of a module's files; strengths other than 1 after a colon."""
    return "+".join(Path(path).name + (f":{strength:g}" if strength != 1 else "") for path, strength in parts)


def _terms(flags: DrawingFlags, sources: Mapping[str, Any]) -> dict[str, Any]:
    """The rule that the flags describe, as arguments of `named_rule` that JSON can hold."""
    if not find_rule(flags.rule).contrasts:
        needless = {"--w": flags.w is not None, "--merge": flags.merge, "--every": flags.every != 1}
        for name, given in {**needless, "--shaping": flags.shaping is not None}.items():
            if given:
                expected = ", ".join(CONTRASTING)
                raise UserError(f"--rule {flags.rule} has no use for {name}; expected one of {expected}")
    elif flags.w is None:
        raise UserError(f"--rule {flags.rule} needs --w, the strength of the modules, e.g. --w 4")
    if flags.between != "hold" and flags.every == 1:
        raise UserError(f"--between {flags.between} needs --every, the steps between contrasts, e.g. --every 4")
    if flags.merge and flags.shaping is not None:
        raise UserError("--merge has no use for --shaping: weights hold a contrast as it is; leave one of them out")
    if flags.proxy is not None and flags.rule != "chats":
        raise UserError(f"--rule {flags.rule} has no use for --proxy; expected --rule chats")
    return {
        "name": flags.rule,
        "guidance_scale": flags.guidance_scale,
        "w": _merged_strengths(flags.w) if flags.merge and flags.w is not None else flags.w,
        "module": next(iter(sources), "module"),
        "reference": "base" if flags.module_base is None else OWN_BASE,
        "every": flags.every,
        "between": flags.between,
        "rescale": flags.rescale,
        **({} if flags.proxy is None else {"proxy": flags.proxy}),
        **({} if flags.shaping is None else {"shaping": flags.shaping}),
    }


def _imitated_guidance(flags: DrawingFlags) -> tuple[float, DrawingFlags]:
    """The guidance scale that a UNet is told, and the flags of a rule that does not guide a second time."""
    try:
        return float(flags.guidance_scale), dataclasses.replace(flags, guidance_scale="1")
    except ValueError as error:
        raise UserError(
            f"--guidance-scale {flags.guidance_scale}: this UNet is told the scale (time_cond_proj_dim) and imitates "
            "guidance; expected a number"
        ) from error


def _merged_strengths(w: str) -> float | dict[str, float]:
    """Strengths that are numbers, as weights can hold them."""
    strengths = _schedules(w)
    for schedule in strengths.values():
        if schedule.shape != "constant" or schedule != Schedule(schedule.values):
            raise UserError(f"--w {w} --merge: only one number can be merged into weights")
    numbers = {name: schedule.values[0] for name, schedule in strengths.items()}
    return numbers.get("", numbers)


def _schedules(text: str) -> dict[str, Schedule]:
    """Strengths by the names of their modules; one for all has the name ""."""
    strengths = parse_strengths(text)
    return strengths if isinstance(strengths, dict) else {"": strengths}


def _check_strengths(flags: DrawingFlags, steps: int) -> None:
    """Checks that the strengths are for so many steps."""
    for flag, text in (("w", flags.w), ("guidance-scale", flags.guidance_scale)):
        for schedule in _schedules(text).values() if text is not None else ():
            if not schedule.active(steps).any():
                raise UserError(f"--{flag} {text}: none of the {steps} steps lies in this part of the trajectory")
            if schedule.shape == "list" and len(schedule.values) != steps:
                raise UserError(
                    f"--{flag} {text}: {len(schedule.values)} values, but the solver takes {steps} steps; expected one "
                    "for each"
                )


def _check_modules(rule: Rule, sources: Mapping[str, Any], flags: DrawingFlags) -> None:
    """Checks that the modules are those that the rule asks for."""
    there = {"base", *sources} | ({OWN_BASE} if flags.module_base is not None else set())
    asked = set(rule.networks())
    if missing := [name for name in rule.networks() if name not in there]:
        raise UserError(
            f"--rule {flags.rule} needs a module {missing[0]!r}; expected --module {missing[0]}=PATH"
            + (f", there are {', '.join(sources)}" if sources else "")
        )
    if unused := [name for name in sources if name not in asked]:
        useful = ", ".join(sorted(asked - {"base"})) or "none"
        others = _rules_with(list(sources)) or _rules_with(unused[:1])
        # Several modules, whatever their names, have a rule that takes them all.
        rules = " or ".join(f"--rule {rule}" for rule in [*others, *(["multi"] if len(sources) > 1 else [])])
        raise UserError(
            f"--rule {flags.rule} has no use for module {unused[0]!r}, only for {useful}; expected "
            f"{rules or 'modules that a rule asks for'}"
        )


def _rules_with(modules: Sequence[str]) -> list[str]:
    """The rules that need modules of these names and no others; fine_tuned and pgd take any single one."""
    named = [name for name in RULES if name != "multi"]
    rules = {name: named_rule(name, guidance_scale=7.5, w=1.0, module=modules[0]) for name in named}
    return [name for name, rule in rules.items() if set(rule.networks()) - {"base"} == set(modules)]


# ----------------------------------------------------------------------------------------------------------------------
# Solver and size


def _solver(checkpoint: Checkpoint, flags: DrawingFlags) -> Solver:
    """The solver of the flags, or of the checkpoint."""
    sigmas, spacing = flags.sigmas, flags.spacing
    if sigmas == "ays" and checkpoint.config("unet").addition_embed_type is not None:
        sigmas = "ays_sdxl"
    if spacing is not None and spacing not in SPACINGS:
        spacing = [int(text) for text in spacing.split(",")]
    try:
        return solver_from_config(
            checkpoint.scheduler_config, flags.steps, name=flags.solver, eta=flags.eta, sigmas=sigmas, spacing=spacing
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{checkpoint.described_by}: {error}; --solver chooses another one, --steps their number"
        ) from error


def _size(unet: UNetConfig, vae: VAEConfig, flags: DrawingFlags) -> tuple[int, int]:
    """Height and width in pixels."""
    factor = vae.downscale_factor
    for name, side in (("height", flags.height), ("width", flags.width)):
        if side is not None and side % factor:
            near = max(1, round(side / factor)) * factor
            raise UserError(f"--{name} {side}: expected multiples of {factor}, e.g. {near}")
    height, width = trained_size(unet, vae)
    return flags.height or height, flags.width or width
