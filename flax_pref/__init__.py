"""Preference alignment of Stable Diffusion in JAX/Flax.

The names below are the public surface. Each is imported from its module when it is first used, so `import flax_pref`
alone imports neither JAX nor any other library. Examples in docstrings assume `import flax_pref as fp`:

    pipeline = fp.load_pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5")
    draw = fp.TextToImage(pipeline)
    images = draw(["a lighthouse in a storm"])
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax_pref.checkpoints.diffusers import Pipeline as Pipeline
    from flax_pref.checkpoints.diffusers import load_pipeline as load_pipeline
    from flax_pref.checkpoints.diffusers import save_pipeline as save_pipeline
    from flax_pref.checkpoints.lora import load_lora as load_lora
    from flax_pref.checkpoints.lora import save_lora as save_lora
    from flax_pref.checkpoints.modules import load_modules as load_modules
    from flax_pref.checkpoints.modules import merge_modules as merge_modules
    from flax_pref.data.pipeline import InputConfig as InputConfig
    from flax_pref.diffusion.guidance import Rule as Rule
    from flax_pref.diffusion.guidance import Schedule as Schedule
    from flax_pref.diffusion.guidance import autoguidance as autoguidance
    from flax_pref.diffusion.guidance import cfg as cfg
    from flax_pref.diffusion.guidance import chats as chats
    from flax_pref.diffusion.guidance import cpgd as cpgd
    from flax_pref.diffusion.guidance import cpgd_conditional as cpgd_conditional
    from flax_pref.diffusion.guidance import npo as npo
    from flax_pref.diffusion.guidance import pgd as pgd
    from flax_pref.diffusion.solvers import from_config as solver_from_config
    from flax_pref.diffusion.text_to_image import TextToImage as TextToImage

__version__ = "0.1.0"

_MODULES = {
    "Pipeline": "checkpoints.diffusers",
}
