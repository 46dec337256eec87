"""The networks beside the base: LoRA files, UNets with weights of their own, and the base where it is only named.

`networks.json` lists them. diffusers loads this as a component of the pipeline, with the dtype of the others.
"""

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel


class Networks(torch.nn.Module):
    """The networks that ../pipeline.py guides with.

    Attributes:
        folder: of this file.
        lora: names of modules that are LoRA, each a folder with a file.
        unets: modules with full weights, by name, each a folder of a UNet.
        base: the pipeline of the base; None where the folder of the pipeline holds its parts.
    """

    def __init__(self, folder, lora, unets, base, dtype):
        super().__init__()
        self.folder, self.lora, self.base = folder, lora, base
        self.unets = torch.nn.ModuleDict(unets)
        # Follows `to`, so that a component without weights has a device and a dtype too.
        self.register_buffer("place", torch.zeros(0, dtype=dtype), persistent=False)

    @property
    def device(self):
        """Device of the networks."""
        return self.place.device

    @property
    def dtype(self):
        """Precision of the weights."""
        return self.place.dtype

    @classmethod
    def from_pretrained(cls, folder, torch_dtype=None, **options):
        """Reads the folder; a base that is named by its Hub id is downloaded once."""
        dtype = torch.float32 if torch_dtype is None else torch_dtype
        settings = json.loads((Path(folder) / "networks.json").read_text())
        unets = {
            name: UNet2DConditionModel.from_pretrained(folder, subfolder=name, torch_dtype=dtype)
            for name in settings["unets"]
        }
        return cls(str(folder), settings["lora"], unets, _base(settings, dtype), dtype)


def _base(settings, dtype):
    if settings["base"] is None:
        return None
    files = {"torch_dtype": dtype, "variant": settings["variant"], "revision": settings["revision"]}
    if settings["class_name"] == "StableDiffusionXLPipeline":
        return StableDiffusionXLPipeline.from_pretrained(settings["base"], **files, add_watermarker=False)
    unused = {"safety_checker": None, "requires_safety_checker": False}
    return StableDiffusionPipeline.from_pretrained(settings["base"], **files, **unused)
