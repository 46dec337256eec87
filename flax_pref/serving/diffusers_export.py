"""Writes pipelines of diffusers: a base, modules, and a pipeline.py that guides the one by the others.

    model_index.json                     the parts, the rule, and the defaults of a call
    pipeline.py, networks/networks.py    code of torch
    guider.py                            the same rules for modular pipelines
    networks/networks.json               the modules, and the path or Hub id of the base unless its parts are here
    networks/module_pos/                 a module: a LoRA file, or a UNet with full weights
    scheduler/                           that of the flags or the checkpoint
    unet/, vae/, text_encoder/, ...      the base, with --include-base

The code lies in integrations/diffusers; nothing here imports it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from flax_pref.checkpoints.diffusers import write_parts
from flax_pref.checkpoints.embeddings import add_embedding
from flax_pref.checkpoints.hub import DEMO, INDEX, find_checkpoint
from flax_pref.checkpoints.lora import save_lora
from flax_pref.checkpoints.modules import Guided, adapts_text_encoders, load_modules
from flax_pref.checkpoints.weights import save_network
from flax_pref.config import INTEGRATIONS, UserError
from flax_pref.diffusion.drawing import Drawing, resolve_drawing
from flax_pref.diffusion.drawing_flags import with_preset
from flax_pref.diffusion.scheduler_configs import scheduler_config_of
from flax_pref.files import check_new, new_folder
from flax_pref.models.bank import adapters
from flax_pref.models.lora import select_lora, split_lora
from flax_pref.models.tree import flatten_dict
from flax_pref.serving.export_flags import ExportFlags

# As whole weights are called: else diffusers downloads no safetensors of a repository that has no whole network.
LORA_FILE = "model.safetensors"
UNUSED = ("safety_checker", "feature_extractor", "requires_safety_checker")
Listed = Mapping[str, Sequence[str]]
CODE = {"pipeline.py": "pipeline.py", "guider.py": "guider.py", "networks.py": "networks/networks.py"}


def export_diffusers(flags: ExportFlags) -> None:
    """Exports what the flags describe as a folder for `DiffusionPipeline.from_pretrained`.

    The folder appears under its name only when it is complete.

    Raises:
        FileExistsError: the folder holds something.
        UserError, ValueError, FileNotFoundError: what the flags ask for cannot be had.
    """
    flags = with_preset(flags)
    check_new(flags.out)
    drawing = resolve_drawing(flags)
    check_exportable(flags, drawing)
    checkpoint, dtype = drawing.checkpoint, jnp.dtype(flags.compute_dtype)
    pipeline = unet = None
    if flags.include_base:
        pipeline = checkpoint.load()
        for name, file in drawing.embeddings.items():
            pipeline = add_embedding(pipeline, name, file)
        unet = pipeline.unet
    elif drawing.sources:
        unet = checkpoint.part("unet").load(jnp.float32)
    guided = None if unet is None else load_modules(unet, drawing.sources)
    with new_folder(flags.out) as folder:
        index = {} if pipeline is None else write_parts(pipeline, folder, dtype=dtype)
        listed = {"lora": [], "unets": []} if guided is None else _write_modules(guided, folder / "networks", dtype)
        for path, content in described(flags, drawing, index, listed).items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)


def described(flags: ExportFlags, drawing: Drawing, index: Mapping[str, Any], listed: Listed) -> dict[str, bytes]:
    """The files of a pipeline that are no weights, by their paths.

    Args:
        flags: what is exported.
        drawing: what they ask for.
        index: model_index.json of the base, where its weights are written too.
        listed: folders of the modules by kind, LoRA files and UNets.
    """
    config, class_name = drawing.checkpoint.scheduler_config, drawing.checkpoint.class_name
    scheduler = scheduler_config_of(config, name=flags.solver, sigmas=flags.sigmas, spacing=flags.spacing)
    of_base = {"base": None} if flags.include_base else {**_reference(flags.model), "variant": flags.variant}
    index = {
        **{name: part for name, part in index.items() if name not in UNUSED},
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "_class_name": ["pipeline", "GuidedPipeline"],
        "networks": ["networks", "Networks"],
        "rule": dict(drawing.terms),
        "call": default_call(flags, drawing),
    }
    code = {path: (INTEGRATIONS / "diffusers" / name).read_bytes() for name, path in CODE.items()}
    settings = {
        INDEX: index,
        "scheduler/scheduler_config.json": scheduler,
        "networks/networks.json": {**of_base, "class_name": class_name, **listed},
    }
    return code | {path: json.dumps(values, indent=2).encode() + b"\n" for path, values in settings.items()}


def check_exportable(flags: ExportFlags, drawing: Drawing) -> None:
    """Checks what the files and the flags say against what the pipeline can do; reads no weights.

    Raises:
        UserError: it cannot.
    """
    if drawing.checkpoint.config("unet").time_cond_proj_dim is not None:
        raise UserError(
            f"{drawing.checkpoint.path}: its UNet imitates guidance (time_cond_proj_dim), which the pipeline.py of "
            "--format diffusers does not support; expected a model that does not"
        )
    if flags.module_base is not None:
        raise UserError(
            f"--module-base {flags.module_base} does not apply to --format diffusers, whose modules guide one base; "
            "leave it out, and LoRA modules move onto the model"
        )
    for name, parts in drawing.sources.items():
        if not re.fullmatch(r"\w+", name):
            raise UserError(f"--module {name}=...: expected a name of letters, digits and _ with --format diffusers")
        for path, _ in parts:
            if adapts_text_encoders(path, name):
                raise UserError(
                    f"--module {name}={path}: adapts text encoders, which the pipeline.py of --format diffusers does "
                    "not support; expected a file that adapts the UNet alone"
                )
    if flags.include_base:
        return
    own = {"--vae": flags.vae, "--text-encoders": flags.text_encoders, "--embedding": flags.embedding}
    for flag, given in own.items():
        if given:
            raise UserError(f"{flag}: makes a base that no path names; add --include-base to write its weights")
    if drawing.checkpoint.path.is_file():
        raise UserError(
            f"--model {flags.model}: is a single file, which no path can stand for in a folder of diffusers; add "
            "--include-base to write its weights"
        )


def _reference(model: str) -> dict[str, str | None]:
    """The Hub id with its revision, or the absolute path of what lies here."""
    if model == DEMO or Path(model).expanduser().exists():
        return {"base": str(find_checkpoint(model).resolve()), "revision": None}
    name, _, revision = model.partition("@")
    return {"base": name, "revision": revision or None}


def default_call(flags: ExportFlags, drawing: Drawing) -> dict[str, Any]:
    """Arguments of a call of the pipeline that are not given: steps, size in pixels, and where needed more."""
    height, width = drawing.size
    call: dict[str, Any] = {"num_inference_steps": flags.steps, "height": height, "width": width}
    if flags.eta is not None:
        call["eta"] = flags.eta
    # diffusers counts the layers that are left out, for XL from the last but one.
    skipped = (flags.clip_skip or 0) - len(drawing.checkpoint.text_encoders)
    if flags.clip_skip is not None and skipped:
        call["clip_skip"] = skipped
    return call


def _write_modules(guided: Guided, folder: Path, dtype) -> Listed:
    """Writes the modules; their names by kind, as networks.json lists them."""
    folder.mkdir()
    bank = adapters(guided.base.graphdef, guided.base.params)
    _, lora = split_lora(guided.base.params)
    for i, name in enumerate(bank):
        one = select_lora(lora, i)
        rank = next(leaf for path, leaf in flatten_dict(one).items() if path[-1] == "lora_b").shape[1]
        # The bank's alpha is its rank: see `checkpoints.lora.load_lora_network`.
        # In a folder of its own: of a component that holds weights itself, diffusers downloads nothing else.
        save_lora(one, folder / f"module_{name}" / LORA_FILE, alpha=rank)
    for name, network in guided.modules.items():
        save_network(network, folder / f"module_{name}", dtype=dtype)
    return {"lora": [f"module_{name}" for name in bank], "unets": [f"module_{name}" for name in guided.modules]}
