"""What files of modules tell other programs beside weights: the keys of sd-scripts (`ss_`) and of modelspec.

A1111 and ComfyUI managers show them, and find by them for which base a file was made.
"""

import dataclasses
import hashlib

from flax_pref.models.unet import UNetConfig

OWN = "flax_pref."
STRENGTH = f"{OWN}w"
# By the width of what cross-attention reads: modelspec's name of the family, and sd-scripts'.
FAMILIES = {
    768: ("stable-diffusion-v1", "sd_v1"),
    1024: ("stable-diffusion-v2", "sd_v2"),
    2048: ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}


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
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.title": self.name,
            "modelspec.prediction_type": "v" if self.prediction_type == "v_prediction" else "epsilon",
            "modelspec.hash_sha256": f"0x{digest}",
            f"{OWN}method": self.method,
            f"{OWN}base": self.base,
        }
        if config.cross_attention_dim in FAMILIES:
            family, version = FAMILIES[config.cross_attention_dim]
            velocity = version == "sd_v2" and self.prediction_type == "v_prediction"
            told |= {
                "ss_base_model_version": f"{version}_v" if velocity else version,
                "ss_v2": str(version == "sd_v2"),
                "modelspec.architecture": f"{family}/lora",
            }
        if self.w is not None:
            told[STRENGTH] = f"{self.w:g}"
        return told
