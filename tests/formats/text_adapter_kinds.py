"""Kinds of adapters of text encoders: made for small ones of transformers by PEFT, or by the names of sd-scripts.

What counts are the weights of the text encoders with the adapter in them.
"""

import contextlib
import copy
import functools
import io
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_pref.checkpoints.diffusers import load_text_encoder
from flax_pref.checkpoints.modules import load_modules
from flax_pref.checkpoints.weights import to_stored
from flax_pref.models.network import Network
from tests.formats.adapter_kinds import ALPHA, NO_ALPHA, RANK, READ, base, drawn, ending, layer
from tests.formats.kinds import Kind, Made, Numbers

LAYERS = ["q_proj", "out_proj", "fc1"]
PARTS = {"sd15": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}
PREFIXES = {"sd15": ("lora_te",), "sdxl": ("lora_te1", "lora_te2")}


def torch_encoder(part: str) -> Any:
    """A small text encoder of transformers of its own, with the same weights at each call."""
    return copy.deepcopy(_torch_encoder(part))


@functools.cache
def _torch_encoder(part: str) -> Any:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from tests.parity.torch_reference import CLIP, randomised

    model = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(model(CLIPTextConfig(**CLIP)))


@functools.cache
def encoder(part: str) -> Network:
    """The same text encoder as ours."""
    with tempfile.TemporaryDirectory() as folder:
        torch_encoder(part).save_pretrained(folder)
        return load_text_encoder(folder)


def load(family: str) -> Callable[[Path], tuple[Network, ...]]:
    """Reads the text encoders with a module in their weights, as the programs do."""

    def read(path: Path) -> tuple[Network, ...]:
        encoders = [encoder(part) for part in PARTS[family]]
        with contextlib.redirect_stdout(io.StringIO()):
            return load_modules(base(family), {"m": path}, text_encoders=encoders).text_encoders["m"]

    return read


def numbers(encoders: tuple[Network, ...]) -> Numbers:
    """The weights of text encoders, by part and by their names in transformers 5."""
    found = {}
    for i, network in enumerate(encoders):
        stored = to_stored(jax.tree.map(np.asarray, network.params))
        found |= {f"{i}.{name.removeprefix('text_model.')}": array for name, array in stored.items()}
    return found


def adapted(part: str) -> Any:
    """A text encoder with an adapter of PEFT."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an older name
        model = get_peft_model(torch_encoder(part), settings)
    drawn(parameter for name, parameter in model.named_parameters() if "lora_" in name)
    return model


def merged(models: list[Any]) -> Numbers:
    """Their weights with the adapters merged by PEFT."""
    found = {}
    for i, model in enumerate(models):
        state = model.merge_and_unload().state_dict()
        found |= {f"{i}.{name.removeprefix('text_model.')}": tensor.numpy() for name, tensor in state.items()}
    return found


def by_peft(folder: Path) -> Made:
    """A folder of `save_pretrained` of PEFT."""
    model = adapted("text_encoder")
    model.save_pretrained(folder)
    return Made(folder, lambda: merged([model]))


def by_diffusers(family: str) -> Callable[[Path], Made]:
    """A file of `save_lora_weights` of the pipelines."""

    def make(folder: Path) -> Made:
        import diffusers
        from peft import get_peft_model_state_dict

        models = [adapted(part) for part in PARTS[family]]
        pipeline = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
        layers: dict[str, Any] = {}
        for part, model in zip(PARTS[family], models, strict=True):
            stored = get_peft_model_state_dict(model)
            layers[f"{part}_lora_layers"] = {bare(name): tensor for name, tensor in stored.items()}
            layers[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
        pipeline.save_lora_weights(folder, **layers)
        return Made(folder / "pytorch_lora_weights.safetensors", lambda: merged(models))

    return make


def by_sd_scripts(family: str) -> Callable[[Path], Made]:
    """A file by the names of sd-scripts, `lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight`."""

    def make(folder: Path) -> Made:
        import torch
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        models, tensors = [adapted(part) for part in PARTS[family]], {}
        for prefix, model in zip(PREFIXES[family], models, strict=True):
            for name, tensor in get_peft_model_state_dict(model).items():
                place, matrix = re.fullmatch(r"(?:text_model\.)?(.*)\.lora_(A|B)\.weight", bare(name)).groups()
                stem = f"{prefix}_text_model_{place.replace('.', '_')}"
                tensors[f"{stem}.lora_{'down' if matrix == 'A' else 'up'}.weight"] = tensor.contiguous()
                tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
        save_file(tensors, folder / "module.safetensors")
        return Made(folder / "module.safetensors", lambda: merged(models))

    return make


def bare(name: str) -> str:
    """Without what PEFT puts before the name of a weight."""
    return name.removeprefix("base_model.model.")


def text_adapter(name: str, family: str, make: Callable[[Path], Made], **more: Any) -> Kind:
    """A row."""
    settings = {"read": READ, "reference": "PEFT, merged", "harmless": NO_ALPHA, "sort": ending, "names": layer} | more
    return Kind(
        name=name,
        make=make,
        load=load(family),
        numbers=numbers,
        needs=("torch", "diffusers", "transformers", "peft"),
        **settings,
    )


TEXT_ADAPTERS = (
    text_adapter("LoRA of a text encoder, of diffusers, SD1.5", "sd15", by_diffusers("sd15")),
    text_adapter("LoRA of two text encoders, of diffusers, SDXL", "sdxl", by_diffusers("sdxl")),
    text_adapter("LoRA of a text encoder, of sd-scripts, SD1.5 (`lora_te_`)", "sd15", by_sd_scripts("sd15")),
    text_adapter("LoRA of two text encoders, of sd-scripts, SDXL (`lora_te1_`)", "sdxl", by_sd_scripts("sdxl")),
    text_adapter(
        "LoRA of a text encoder, of PEFT",
        "sd15",
        by_peft,
        read="`--module NAME=FOLDER`",
        damaged="adapter_model.safetensors",
    ),
)
