"""Metadata of module files for other programs: the keys of sd-scripts (`ss_`) and of modelspec.

A1111 and ComfyUI managers show them, and find by them for which base a file was made.
"""

import dataclasses
import hashlib

from flax_pref.models.unet import UNetConfig

OWN = "flax_pref."
STRENGTH = f"{OWN}w"
# Names of the families in modelspec and in sd-scripts, by the width of what cross-attention reads.
ARCHITECTURES = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2", 2048: "stable-diffusion-xl-v1-base"}
VERSIONS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}
PREDICTION_KEY = "modelspec.prediction_type"
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def modelspec(architecture: str | None, prediction_type: str) -> dict[str, str]:
    """The keys of modelspec that checkpoints and modules share.

    Args:
        architecture: name of the family, with "/lora" for adapters; None: unknown.
        prediction_type: of the UNet, as a scheduler config names it.
    """
    told = {"modelspec.sai_model_spec": "1.0.0", PREDICTION_KEY: PREDICTIONS.get(prediction_type, prediction_type)}
    return told if architecture is None else told | {"modelspec.architecture": architecture}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleInfo:
    """How a module was made.

    Attributes:
        name: of the module.
        base: checkpoint that it was trained on.
        method: that trained it.
        steps: of training.
        prediction_type: of the base.
        w: strength that was chosen for it, if any was.
    """

    name: str
    base: str
    method: str
    steps: int
    prediction_type: str = "epsilon"
    w: float | None = None

    def metadata(self, config: UNetConfig, *, rank: int, alpha: float, weights: bytes) -> dict[str, str]:
        """The metadata of a safetensors file.

        Args:
            config: of the UNet.
            rank: of the adapters.
            alpha: of the adapters.
            weights: all that follows the header of the file, to be hashed as sd-scripts does.
        """
        digest = hashlib.sha256(weights).hexdigest()
        told = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": f"{alpha:g}",
            "ss_output_name": self.name,
            "ss_sd_model_name": self.base,
            "ss_max_train_steps": str(self.steps),
            "sshs_model_hash": digest,
            "modelspec.title": self.name,
            "modelspec.hash_sha256": f"0x{digest}",
            f"{OWN}method": self.method,
            f"{OWN}base": self.base,
        }
        family, version = (names.get(config.cross_attention_dim) for names in (ARCHITECTURES, VERSIONS))
        told |= modelspec(family and f"{family}/lora", self.prediction_type)
        if version is not None:
            velocity = version == "sd_v2" and self.prediction_type == "v_prediction"
            told |= {
                "ss_base_model_version": f"{version}_v" if velocity else version,
                "ss_v2": str(version == "sd_v2"),
            }
        if self.w is not None:
            told[STRENGTH] = f"{self.w:g}"
        return told
