"""What integrations/comfyui uses of ComfyUI, as small as can be, with its names, arguments and order of batches."""

import copy
import importlib.util
import itertools
import math
import sys
import types

import torch

from flax_pref.config import INTEGRATIONS


def load_nodes(patch, loras):
    """The package of the nodes, imported beside a stand-in of ComfyUI whose folder of LoRA files is `loras`."""

    def get_full_path_or_raise(kind, name):
        if not (loras / name).is_file():
            raise FileNotFoundError(name)
        return str(loras / name)

    def get_filename_list(kind):
        return sorted(str(path.relative_to(loras)) for path in loras.rglob("*.safetensors"))

    functions = {"get_full_path_or_raise": get_full_path_or_raise, "get_filename_list": get_filename_list}
    modules = {
        "comfy": {"__path__": []},
        "comfy.lora": {"model_lora_keys_unet": model_lora_keys_unet},
        "comfy.samplers": {"calc_cond_batch": calc_cond_batch},
        "folder_paths": functions,
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        patch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules["comfy"], name.partition(".")[2], module)
    folder = INTEGRATIONS / "comfyui"
    spec = importlib.util.spec_from_file_location(
        "comfyui_nodes", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, "comfyui_nodes", package)
    spec.loader.exec_module(package)
    return package


def model_lora_keys_unet(model, key_map):
    """Names of layers in LoRA files, and the weights that they stand for."""
    for layer, original in model.layers.items():
        weight = f"diffusion_model.{layer}.weight"
        for name in (layer, original):
            key_map[f"lora_unet_{name.replace('.', '_')}"] = weight
    return key_map


class Eps:
    """The estimate of the clean latents of a network that predicts the noise."""

    def calculate_denoised(self, sigma, output, x):
        return x - output * sigma.view(-1, 1, 1, 1)


class Velocity:
    """That of a network that predicts the velocity."""

    def calculate_denoised(self, sigma, output, x):
        sigma = sigma.view(-1, 1, 1, 1)
        return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5


class Model(torch.nn.Module):
    """A network as samplers see it.

    Attributes:
        layers: names of layers of LoRA files, each with another one that it may have.
        calls: of each call of the network, cond_or_uncond as patches see it.
    """

    def __init__(self, network, layers, model_sampling=None):
        super().__init__()
        self.diffusion_model, self.layers = network, layers
        self.model_sampling = Eps() if model_sampling is None else model_sampling
        self.calls = []

    def apply_model(self, x, sigma, transformer_options, **conditioning):
        self.calls.append(transformer_options["cond_or_uncond"])
        scaled = x / (sigma.view(-1, 1, 1, 1) ** 2 + 1) ** 0.5
        return self.model_sampling.calculate_denoised(sigma, self.predict(scaled, **conditioning), x)

    def predict(self, x, **conditioning):
        return self.diffusion_model(x, **conditioning)


class ModelPatcher:
    """What nodes pass on as MODEL."""

    def __init__(self, model):
        self.model, self.model_options = model, {"transformer_options": {}}

    def clone(self):
        own = ModelPatcher(self.model)
        own.model_options = copy.deepcopy(self.model_options)
        return own

    def set_model_sampler_cfg_function(self, function, disable_cfg1_optimization=False):
        self.model_options["sampler_cfg_function"] = function
        if disable_cfg1_optimization:
            self.model_options["disable_cfg1_optimization"] = True

    def set_model_sampler_calc_cond_batch_function(self, function):
        self.model_options["sampler_calc_cond_batch_function"] = function

    def set_model_unet_function_wrapper(self, function):
        self.model_options["model_function_wrapper"] = function


def calc_cond_batch(model, conds, x, sigma, model_options):
    """Estimates of the clean latents, of zeros where a conditioning is None; the last one comes first in the batch."""
    out = [torch.zeros_like(x) for _ in conds]
    rows = [i for i in reversed(range(len(conds))) if conds[i] is not None]
    size = model_options.get("rows_that_fit", len(rows))
    for first in range(0, len(rows), size):
        chosen = rows[first : first + size]
        seen = [conds[i][0] for i in chosen]
        c = {name: torch.cat([part[name] for part in seen]) for name in seen[0]}
        c["transformer_options"] = {**model_options["transformer_options"], "cond_or_uncond": chosen}
        inputs, sigmas = torch.cat([x] * len(chosen)), torch.cat([sigma] * len(chosen))
        if wrapper := model_options.get("model_function_wrapper"):
            call = {"input": inputs, "timestep": sigmas, "c": c, "cond_or_uncond": chosen}
            predicted = wrapper(model.apply_model, call)
        else:
            predicted = model.apply_model(inputs, sigmas, **c)
        for i, part in zip(chosen, predicted.chunk(len(chosen)), strict=True):
            out[i] = part
    return out


def denoise(patcher, x, sigma, text, empty, cfg, sigmas):
    """The estimate of the clean latents that a sampler steps to."""
    model, options = patcher.model, copy.deepcopy(patcher.model_options)
    options["transformer_options"]["sample_sigmas"] = sigmas
    uncond = None if math.isclose(cfg, 1) and not options.get("disable_cfg1_optimization") else empty
    args = {"input": x, "sigma": sigma, "model": model, "model_options": options}
    if predict := options.get("sampler_calc_cond_batch_function"):
        cond_pred, uncond_pred = predict({"conds": [text, uncond], **args})
    else:
        cond_pred, uncond_pred = calc_cond_batch(model, [text, uncond], x, sigma, options)
    if combine := options.get("sampler_cfg_function"):
        args |= {"cond": x - cond_pred, "uncond": x - uncond_pred, "cond_scale": cfg, "timestep": sigma}
        args |= {"cond_denoised": cond_pred, "uncond_denoised": uncond_pred}
        return x - combine({**args, "input_cond": text, "input_uncond": uncond})
    return uncond_pred + (cond_pred - uncond_pred) * cfg


@torch.no_grad()
def euler(patcher, x, text, empty, cfg, sigmas, inner=0):
    """Latents by Euler's method; `inner` more predictions in each step, half-way to the next, change nothing."""
    for sigma, following in itertools.pairwise(sigmas):
        denoised = denoise(patcher, x, sigma.expand(len(x)), text, empty, cfg, sigmas)
        d = (x - denoised) / sigma
        for _ in range(inner):
            between = (sigma + following) / 2
            denoise(patcher, x + d * (between - sigma), between.expand(len(x)), text, empty, cfg, sigmas)
        x = x + d * (following - sigma)
    return x
