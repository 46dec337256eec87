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
    from flax_pref.checkpoints.checkpoint import Pipeline as Pipeline
    from flax_pref.checkpoints.diffusers import load_pipeline as load_pipeline
    from flax_pref.checkpoints.diffusers import save_pipeline as save_pipeline
    from flax_pref.checkpoints.lora import load_lora as load_lora
    from flax_pref.checkpoints.lora import save_lora as save_lora
    from flax_pref.checkpoints.modules import load_modules as load_modules
    from flax_pref.checkpoints.modules import merge_modules as merge_modules
    from flax_pref.checkpoints.single_file import save_single_file as save_single_file
    from flax_pref.compilation import use_cache as use_cache
    from flax_pref.data.columns import Columns as Columns
    from flax_pref.data.consensus import Consensus as Consensus
    from flax_pref.data.encode_set import encode as encode
    from flax_pref.data.pipeline import InputConfig as InputConfig
    from flax_pref.data.pipeline import PairBatches as PairBatches
    from flax_pref.data.prepared import PreparedSet as PreparedSet
    from flax_pref.diffusion.guidance import Rule as Rule
    from flax_pref.diffusion.guidance import Schedule as Schedule
    from flax_pref.diffusion.guidance import autoguidance as autoguidance
    from flax_pref.diffusion.guidance import cfg as cfg
    from flax_pref.diffusion.guidance import chats as chats
    from flax_pref.diffusion.guidance import cpgd as cpgd
    from flax_pref.diffusion.guidance import cpgd_conditional as cpgd_conditional
    from flax_pref.diffusion.guidance import merge_weights as merge_weights
    from flax_pref.diffusion.guidance import multi as multi
    from flax_pref.diffusion.guidance import npo as npo
    from flax_pref.diffusion.guidance import pgd as pgd
    from flax_pref.diffusion.scheduler_configs import solver_from_config as solver_from_config
    from flax_pref.diffusion.text_to_image import TextToImage as TextToImage
    from flax_pref.evaluation.run_report import compare as compare
    from flax_pref.evaluation.run_scoring import score as score
    from flax_pref.images.grid import image_grid as image_grid
    from flax_pref.methods import CHATS as CHATS
    from flax_pref.methods import D3PO as D3PO
    from flax_pref.methods import DDPO as DDPO
    from flax_pref.methods import DMPO as DMPO
    from flax_pref.methods import DSPO as DSPO
    from flax_pref.methods import KTO as KTO
    from flax_pref.methods import NPO as NPO
    from flax_pref.methods import SDPO as SDPO
    from flax_pref.methods import SNPO as SNPO
    from flax_pref.methods import SPO as SPO
    from flax_pref.methods import DiffusionDPO as DiffusionDPO
    from flax_pref.methods import DiffusionNFT as DiffusionNFT
    from flax_pref.methods import MaPO as MaPO
    from flax_pref.methods import PositiveNegative as PositiveNegative
    from flax_pref.methods import PositiveNegativeDPO as PositiveNegativeDPO
    from flax_pref.methods import TailorPO as TailorPO
    from flax_pref.models.lora import combine_lora as combine_lora
    from flax_pref.models.lora import stack_lora as stack_lora
    from flax_pref.rewards.reward import Weighted as Weighted
    from flax_pref.serving.sampler import load_sampler as load_sampler
    from flax_pref.training.networks import LoRA as LoRA
    from flax_pref.training.optimizers import OptimizerConfig as OptimizerConfig
    from flax_pref.training.sources import OnlineConfig as OnlineConfig
    from flax_pref.training.trainer import TrainConfig as TrainConfig
    from flax_pref.training.trainer import train as train

__version__ = "0.1.0"

_NAMES_OF = {
    "checkpoints.checkpoint": "Pipeline",
    "checkpoints.diffusers": "load_pipeline save_pipeline",
    "checkpoints.lora": "load_lora save_lora",
    "checkpoints.modules": "load_modules merge_modules",
    "checkpoints.single_file": "save_single_file",
    "compilation": "use_cache",
    "data.columns": "Columns",
    "data.consensus": "Consensus",
    "data.encode_set": "encode",
    "data.pipeline": "InputConfig PairBatches",
    "data.prepared": "PreparedSet",
    "diffusion.guidance": "Rule Schedule autoguidance cfg chats cpgd cpgd_conditional merge_weights multi npo pgd",
    "diffusion.scheduler_configs": "solver_from_config",
    "diffusion.text_to_image": "TextToImage",
    "evaluation.run_report": "compare",
    "evaluation.run_scoring": "score",
    "images.grid": "image_grid",
    "methods": "CHATS D3PO DDPO DMPO DSPO KTO NPO SDPO SNPO SPO DiffusionDPO DiffusionNFT MaPO PositiveNegative "
    "PositiveNegativeDPO TailorPO",
    "models.lora": "combine_lora stack_lora",
    "rewards.reward": "Weighted",
    "serving.sampler": "load_sampler",
    "training.networks": "LoRA",
    "training.optimizers": "OptimizerConfig",
    "training.sources": "OnlineConfig",
    "training.trainer": "TrainConfig train",
}
_MODULE_OF = {name: f"flax_pref.{module}" for module, names in _NAMES_OF.items() for name in names.split()}

if not TYPE_CHECKING:  # a checker that saw __getattr__ would take any name for one of the package
    __all__ = ["__version__", *_MODULE_OF]

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULE_OF})
