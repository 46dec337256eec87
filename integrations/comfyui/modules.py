"""Preference modules of ComfyUI models: LoRA files, and predictions by a network with a module.

A file holds two matrices for each adapted layer of a UNet:

    layout      A [r, in]                               B [out, r]                              alpha
    diffusers   unet.<layer>.lora_A.weight              unet.<layer>.lora_B.weight              in the metadata
    kohya       lora_unet_<layer>.lora_down.weight      lora_unet_<layer>.lora_up.weight        lora_unet_<layer>.alpha
    peft        base_model.model.<layer>.lora_A.weight  base_model.model.<layer>.lora_B.weight  in adapter_config.json

ComfyUI reads kohya's layout. Of the others it drops names such as `attn1.to_q`, and all alphas, with no more than a
line in its log. So every name is converted to kohya's here, and one that has no place is an error.

A module is not merged into the weights: its layers add `alpha / r B (A x)` to their output while they predict for it.
So one batch holds the rows of all modules, weights stay as they are, and the small difference of two modules, which
guidance multiplies, is not rounded to the weights' precision.
"""

import contextlib
import json
import math
import re
from itertools import groupby
from pathlib import Path

import comfy.lora
import comfy.samplers
import torch
from safetensors import SafetensorError, safe_open

# How names of A and B end: kohya's, those of diffusers and PEFT, and those of older versions of diffusers.
PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
)
ALPHA = ".alpha"
ENDINGS = {a: "A" for a, _ in PAIRS} | {b: "B" for _, b in PAIRS} | {ALPHA: "alpha"}
PARTNERS = dict(PAIRS) | {b: a for a, b in PAIRS}
PREFIXES = re.compile(r"^(diffusion_model\.|lora_unet_|lycoris_|(unet\.)?(base_model\.model\.)?)")
TEXT_ENCODERS = re.compile(r"lora_te\d?_|text_encoder(_2)?\.|(base_model\.model\.)?text_model\.")
METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration, as JSON
# PEFT's settings under which a delta is another one than `scale B A`, or not all that is trained.
UNSUPPORTED = ("use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "modules_to_save")
KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")  # other first weights change the base

# ----------------------------------------------------------------------------------------------------------------------
# Files


def load_module(file, model):
    """A module for a model of ComfyUI: `{layer: (A, B)}`, float32, with `alpha / r` multiplied into B.

    Args:
        file: path of a safetensors file.
        model: a ModelPatcher, whose layers go by the names of its state dict without ".weight".

    Raises:
        ValueError: the file is not complete, is no plain LoRA of a UNet, or does not fit the model.
    """
    file = Path(file)
    tensors, metadata = _read(file)
    places = comfy.lora.model_lora_keys_unet(model.model, {})
    found = {}
    for key in tensors:
        ending = next(filter(key.endswith, ENDINGS), None)
        name = key.removesuffix(ending or "")
        layer = ending and places.get(f"lora_unet_{_flat(name)}")
        if not isinstance(layer, str):
            raise ValueError(f"{file}: weight {key!r} has no place in the model; {_reason(key, ending)}")
        parts = found.setdefault(layer.removesuffix(".weight"), {"name": PREFIXES.sub("", name)})
        if ENDINGS[ending] in parts:
            other = parts[ENDINGS[ending]]
            raise ValueError(f"{file}: {other!r} and {key!r} are the same weight of one layer; expected one of them")
        parts[ENDINGS[ending]] = key
    settings = _settings(file, tensors, metadata)
    return {layer: _pair(file, tensors, parts, settings, model.model, layer) for layer, parts in found.items()}


def _read(file):
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: is no .safetensors file; expected one, which runs no code when it is read")
    try:
        with safe_open(file, "pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            metadata = stored.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error}); download or export it again") from error
    if not tensors:
        raise ValueError(f"{file}: holds no weights; expected those of a LoRA")
    for key, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            raise ValueError(f"{file}: weight {key!r} holds NaN or infinity; its training failed, take another file")
    return tensors, metadata


def _flat(name):
    """The name of a layer with underscores, as in kohya's files and without their prefix."""
    name = PREFIXES.sub("", name)
    # Before PEFT, diffusers named the processor of an attention, and to_out without its number.
    name = re.sub(r"\.processor\.(to_\w+?)(\.0)?$", r".\1", name)
    return re.sub(r"\.to_out$", ".to_out.0", name).replace(".", "_")


def _reason(key, ending):
    if TEXT_ENCODERS.match(key):
        return "it adapts a text encoder: take a file that adapts the UNet alone"
    if ending is None:
        return "expected plain LoRA of kohya's sd-scripts, diffusers or PEFT, such as lora_unet_<layer>.lora_up.weight"
    return "this model has no such layer: check that the file was trained for a model of this family"


def _settings(file, tensors, metadata):
    """PEFT's configuration, from the metadata or the file beside; empty where there is none."""
    config, source = {}, file
    beside = file.with_name("adapter_config.json")
    if METADATA in metadata:
        text = metadata[METADATA]
    elif file.name == "adapter_model.safetensors" or any(key.startswith("base_model.model.") for key in tensors):
        if not beside.is_file():
            raise ValueError(f"{file}: needs the adapter_config.json of its folder beside it, which holds the alpha")
        text, source = beside.read_text(), beside
    else:
        return {}
    try:
        config = {name.removeprefix("unet."): value for name, value in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{source}: the configuration of PEFT is not a JSON object ({error})") from error
    used = [name for name in UNSUPPORTED if config.get(name)]
    used += ["bias"] if config.get("bias") not in (None, "none") else []
    used += ["init_lora_weights"] if config.get("init_lora_weights") not in KEEP_THE_BASE else []
    if used:
        raise ValueError(f"{source}: {used[0]}={config[used[0]]!r} is not supported; expected plain LoRA")
    return config


def _pair(file, tensors, parts, settings, model, layer):
    """A and B of a layer in the shape that it computes with."""
    for part, other in ("AB", "BA"):
        if part in parts and other not in parts:
            key = parts[part]
            ending = next(filter(key.endswith, ENDINGS))
            raise ValueError(
                f"{file}: no weight {key.removesuffix(ending) + PARTNERS[ending]!r} beside {key!r}; export it again"
            )
    if "A" not in parts:
        raise ValueError(f"{file}: no matrices beside {parts['alpha']!r}; export it again")
    a, b = (tensors[parts[part]].float() for part in "AB")
    rank, weight = a.shape[0] if a.ndim else 0, model.get_submodule(layer).weight
    inner = (rank, *weight.shape[1:])
    outer = (weight.shape[0], rank, *(1,) * (weight.ndim - 2))
    # The same numbers make a matrix and a 1x1 convolution, and files have either for layers that can be both.
    for part, matrix, expected in (("A", a, inner), ("B", b, outer)):
        if _matrix(matrix.shape) != _matrix(expected):
            raise ValueError(
                f"{file}: weight {parts[part]!r} has shape {list(matrix.shape)}, expected {list(expected)}; the file "
                "was trained for another model"
            )
    return a.reshape(inner), b.reshape(outer) * _scale(file, tensors, parts, settings, rank)


def _matrix(shape):
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def _scale(file, tensors, parts, settings, rank):
    """`alpha / r`, and `alpha / sqrt(r)` where PEFT's configuration says rslora; 1 where the file says nothing."""
    if "alpha" in parts:
        alpha = tensors[parts["alpha"]]
        if alpha.numel() != 1 or alpha.item() <= 0:
            raise ValueError(f"{file}: {parts['alpha']!r} is {alpha.tolist()}; expected one positive number")
        return alpha.item() / rank
    expected = _of_layer(parts["name"], settings.get("rank_pattern"), settings.get("r"))
    if expected not in (None, rank):
        raise ValueError(f"{file}: weight {parts['A']!r} has rank {rank}, but its configuration says {expected}")
    alpha = _of_layer(parts["name"], settings.get("alpha_pattern"), settings.get("lora_alpha"))
    return 1.0 if alpha is None else alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _of_layer(name, patterns, default):
    """The value of the first pattern that the name ends with, after a dot; that is how PEFT reads them."""
    fits = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(fits, default)


def check_fit(modules, model):
    """That modules were loaded for a model of this kind.

    Raises:
        ValueError: a layer is missing, or of another shape.
    """
    layers = dict(model.model.named_modules())
    for name, module in modules.items():
        for layer, (a, b) in module.items():
            weight = getattr(layers.get(layer), "weight", None)
            if weight is None or (len(b), *a.shape[1:]) != tuple(weight.shape):
                raise ValueError(
                    f"module {name}: its layer {layer!r} does not fit the model; connect Load preference modules to "
                    "the model that is guided"
                )


# ----------------------------------------------------------------------------------------------------------------------
# Predictions


class Predictor:
    """Predicts by a model's network with modules.

    Args:
        modules: of `load_module`, by name.
    """

    def __init__(self, modules):
        self.modules = modules
        self.placed = {}

    def release(self):
        """Forgets the matrices on the device."""
        self.placed = {}

    def __call__(self, rows, conds, model, x, sigma, model_options):
        """The estimate of the clean latents `[N, C, H, W]` of each row, which ComfyUI makes in one batch if it fits.

        Args:
            rows: pairs of a module and of "text" or "empty".
            conds: conditionings of "text" and "empty" as ComfyUI gives them to functions of `set_model_sampler_*`.
            model, x, sigma, model_options: likewise.
        """
        # On other GPUs there are copies of the network, whose layers have no modules.
        options = {name: value for name, value in model_options.items() if name != "multigpu_clones"}
        inner = options.get("model_function_wrapper", _apply)

        def wrapper(apply, call):
            seen = [rows[number] for number in call["cond_or_uncond"]]
            # Patches of other nodes know two numbers: 0, the prompt, and 1, the negative prompt.
            kinds = [int(prompt == "empty") for _, prompt in seen]
            patched = {**call["c"].get("transformer_options", {}), "cond_or_uncond": kinds}
            call = {**call, "cond_or_uncond": kinds, "c": {**call["c"], "transformer_options": patched}}
            with self._adapted(model, [network for network, _ in seen]):
                return inner(apply, call)

        options["model_function_wrapper"] = wrapper
        return comfy.samplers.calc_cond_batch(model, [conds[prompt] for _, prompt in rows], x, sigma, options)

    @contextlib.contextmanager
    def _adapted(self, model, networks):
        """While entered, the layers predict for these networks, one for each equal part of the batch."""
        runs = [(network, len(list(same))) for network, same in groupby(networks)]
        layers = {layer for network in networks for layer in self.modules[network]}
        hooks = []
        try:
            for layer in layers:
                hook = self._hook(layer, runs, len(networks))
                hooks.append(model.get_submodule(layer).register_forward_hook(hook))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, layer, runs, parts):
        def hook(module, inputs, output):
            x, start, out = inputs[0], 0, output.clone()
            size = len(x) // parts
            for network, count in runs:
                rows = slice(start, start + count * size)
                start = rows.stop
                if layer in self.modules[network]:
                    out[rows] += self._delta(module, network, layer, x[rows])
            return out

        return hook

    def _delta(self, module, network, layer, x):
        """`alpha / r B (A x)`."""
        place = network, layer, x.device, x.dtype
        if place not in self.placed:
            self.placed[place] = tuple(matrix.to(x.device, x.dtype) for matrix in self.modules[network][layer])
        a, b = self.placed[place]
        if a.ndim == 2:
            return torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)
        inner = torch.nn.functional.conv2d(x, a, None, module.stride, module.padding, module.dilation)
        return torch.nn.functional.conv2d(inner, b)


def _apply(apply, call):
    return apply(call["input"], call["timestep"], **call["c"])
