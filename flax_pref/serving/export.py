"""Writes samplers that `serving/sampler.py` loads: prompts' token ids in, images out, as one StableHLO program.

The program is that of `TextToImage` for one device: text encoders, all steps of the sampler with its rule, and decoder.
Weights, the solver's coefficients and the rule's strengths are its arguments and no constants in it.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh
from safetensors.numpy import save_file

from flax_pref.diffusion.conditioning import encode_ids
from flax_pref.diffusion.drawing import resolve_drawing
from flax_pref.diffusion.drawing_flags import with_preset
from flax_pref.diffusion.guidance import Table, tabulate
from flax_pref.diffusion.latents import decode_latents
from flax_pref.diffusion.rules import named_rule
from flax_pref.diffusion.sampler import sample
from flax_pref.diffusion.text_to_image import TextToImage, to_bytes
from flax_pref.files import check_new, new_folder, write_json
from flax_pref.models.tree import flatten_dict
from flax_pref.serving.export_flags import ExportFlags, Platform
from flax_pref.serving.sampler import DESCRIPTION, FORMAT, WEIGHTS, arrays_of, layout_of, program_file, sha256


def export_drawing(flags: ExportFlags) -> None:
    """Exports the sampler that the flags describe.

    Raises:
        FileExistsError: the folder holds something.
        UserError, ValueError, FileNotFoundError: what the flags ask for cannot be had.
    """
    flags = with_preset(flags)
    check_new(flags.out)
    drawing, dtype = resolve_drawing(flags), flags.compute_dtype
    draw = drawing.load(dtype=dtype, batch_size=flags.batch_size)
    about = {"model": flags.model, "dtype": dtype, "quantize": flags.quantize, "merge": flags.merge}
    about |= drawing.fingerprints()
    export_sampler(draw, drawing.terms, flags.out, platforms=flags.platforms, about=about)


def export_sampler(
    draw: TextToImage,
    terms: Mapping[str, Any],
    folder: str | Path,
    *,
    platforms: Sequence[Platform],
    about: Mapping[str, Any],
) -> None:
    """Writes a folder that appears under its name only when it is complete.

    Args:
        draw: the sampler, for one device.
        terms: of its rule, see `rules.named_rule`; JSON can hold them. Images can be drawn with other strengths that
            ask for the same predictions in the same steps.
        folder: must not exist, or be empty.
        platforms: to write a program for each.
        about: what else the description should say, e.g. hashes of what was exported; JSON can hold it.

    Raises:
        FileExistsError: `folder` holds something.
        ValueError: draw has a mesh or reads weights in prompts, or the rule does not fit.
    """
    if draw.mesh is not None:
        raise ValueError("export_sampler: a program is for one device; expected a TextToImage without mesh")
    if draw.prompt_syntax != "plain":
        raise ValueError(
            f"export_sampler: prompt_syntax={draw.prompt_syntax!r}, but exported samplers read prompts as they are; "
            'expected a TextToImage with prompt_syntax="plain"'
        )
    table = tabulate(named_rule(**terms), len(draw.solver.timesteps), draw.batch_size)
    state = _state(draw)
    leaves = jax.tree.leaves_with_path(state)
    weights = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    tokenizers = {f"tokenizer_{i}": tokenizer for i, tokenizer in enumerate(draw.pipeline.tokenizers, 1)}
    version = None
    with new_folder(folder) as unfinished:
        for platform in platforms:
            exported = _export(draw, table, state, list(weights), platform)
            (unfinished / program_file(platform)).write_bytes(exported.serialize())
            version = exported.calling_convention_version
        # safetensors writes the bytes of a transposed array in the wrong order, and cannot read float8 into numpy.
        stored = {name: np.asarray(leaf, order="C") for name, leaf in weights.items()}
        save_file(
            {name: x.view(np.uint8) if "float8" in x.dtype.name else x for name, x in stored.items()},
            unfinished / WEIGHTS,
        )
        for name, tokenizer in tokenizers.items():
            tokenizer.save(unfinished / name)
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        description = {
            "format": FORMAT,
            "rule": dict(terms),
            "layout": layout_of(table),
            "steps": len(draw.solver.timesteps),
            "size": draw.size,
            "batch_size": draw.batch_size,
            "tokenizers": list(tokenizers),
            "platforms": list(platforms),
            "jax_version": jax.__version__,
            "calling_convention_version": version,
            **about,
            "sha256": {path.relative_to(unfinished).as_posix(): sha256(path) for path in files},
        }
        write_json(unfinished / DESCRIPTION, description)


def _state(draw: TextToImage) -> dict[str, Any]:
    """All arrays that do not differ from call to call."""
    return {
        "text_encoders": [encoder.params for encoder in draw.pipeline.text_encoders],
        "unet": draw.bank,
        "vae": draw.pipeline.vae.params,
        "solver": draw.solver,
        "empty": draw.empty,
        "blank": draw.blank,
        "own_prompts": {name: _own_state(draw, reader) for name, reader in draw.readers.items()},
    }


def _own_state(draw: TextToImage, reader: TextToImage) -> dict[str, Any]:
    """The arrays of a network with text encoders of its own; those that these share with the checkpoint's left out."""
    changed = []
    for own, encoder in zip(reader.pipeline.text_encoders, draw.pipeline.text_encoders, strict=True):
        before = flatten_dict(encoder.params)
        changed.append({path: leaf for path, leaf in flatten_dict(own.params).items() if leaf is not before[path]})
    return {"text_encoders": list(map(unflatten_dict, changed)), "empty": reader.empty, "blank": reader.blank}


def _export(
    draw: TextToImage, table: Table, state: dict[str, Any], names: Sequence[str], platform: Platform
) -> export.Exported:
    """The program for one platform, `(weights, inputs) -> images`; names are those of the leaves of state."""
    pipeline, batch = draw.pipeline, draw.batch_size
    factor = pipeline.vae.config.downscale_factor
    shape = (*(side // factor for side in draw.size), pipeline.vae.config.latent_channels)
    structure = jax.tree.structure(state)

    def program(weights: dict[str, jax.Array], inputs: dict[str, Any]) -> jax.Array:
        own = jax.tree.unflatten(structure, [weights[name] for name in names])

        def avoided(empty, negative):
            none = inputs["no_negative"].reshape(-1, *(1,) * empty.ndim)
            return jnp.where(none, empty, negative)

        def seen(params: Sequence[dict], given: Mapping[str, Any]) -> tuple[Any, Any, Any]:
            """Text, empty and blank through text encoders with these parameters."""
            encoders = zip(pipeline.text_encoders, params, strict=True)
            placed = pipeline.replace(text_encoders=tuple(net._replace(params=own) for net, own in encoders))
            text, negative = (draw.with_sizes(encode_ids(placed, inputs[name])) for name in ("ids", "negative_ids"))
            return text, jax.tree.map(avoided, given["empty"], negative), given["blank"]

        text, empty, blank = seen(own["text_encoders"], own)
        others = {}
        for name, given in own["own_prompts"].items():
            pairs = zip(own["text_encoders"], given["text_encoders"], strict=True)
            params = [unflatten_dict(flatten_dict(base) | flatten_dict(changed)) for base, changed in pairs]
            others[name] = seen(params, given)
        keys = jax.random.wrap_key_data(inputs["keys"], impl="threefry2x32")
        rule = dataclasses.replace(table, **inputs["table"])
        latents = sample(own["unet"], rule, own["solver"], keys, text, empty, shape, blank=blank, own_prompts=others)
        return to_bytes(decode_latents(pipeline.vae._replace(params=own["vae"]), latents))

    ids = [tokenizer([""] * batch) for tokenizer in pipeline.tokenizers]
    inputs = {
        "keys": np.zeros((batch, 2), np.uint32),
        "ids": ids,
        "negative_ids": ids,
        "no_negative": np.ones(batch, bool),
        "table": arrays_of(table),
    }
    weights = dict(zip(names, jax.tree.leaves(state), strict=True))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), (weights, inputs))
    with tracing_for(platform):
        return export.export(jax.jit(program), platforms=[platform])(*shapes)


def tracing_for(platform: Platform) -> contextlib.AbstractContextManager:
    """While entered, networks are traced as on that platform, see `models.platform`, whatever this machine has.

    For "cuda" that is none of the platforms that `models.platform` tells apart: XLA's own operations, attention among
    them. cuDNN's attention needs the GPU when it is traced, and JAX does not promise that it can be loaded later.
    """
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    # A mesh without axes, or kernels would divide themselves over it.
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
