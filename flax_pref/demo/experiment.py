"""The main job of this project, from end to end on the demo world: sample, label, train, choose w, compare."""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import resources
from pathlib import Path

import jax
import numpy as np
import optax

from flax_pref.checkpoints.diffusers import Network, Pipeline, load_pipeline
from flax_pref.checkpoints.lora import lora_network, save_lora
from flax_pref.data.encode import EncodedPairs, encode_pairs
from flax_pref.data.pick_a_pic import LabelledPair, encode_image, read_pairs, write_pairs
from flax_pref.demo import judge, world
from flax_pref.diffusion.guidance import Row, cfg, cpgd, pgd
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.solvers import from_config
from flax_pref.diffusion.text_to_image import TextToImage, chunks
from flax_pref.evaluation.report import MethodResult, Sweep
from flax_pref.models.lora import DEFAULT_TARGETS, bank_predict, join_lora, select_lora, split_lora
from flax_pref.objectives.denoising import positive_negative
from flax_pref.objectives.dpo import diffusion_dpo
from flax_pref.training.loop import fit

MODULES = ("dpo", "pos", "neg")

# Noise of different purposes never meets: each has its own seed, derived from the run's.
PAIR_SEEDS, EVALUATION_SEED, VALIDATION_SEED = (1, 2), 3, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleTraining:
    """How preference modules are trained."""

    steps: int
    batch_size: int
    """Pairs per step."""
    learning_rate: float
    caption_dropout: float = 0.2

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with a short warm-up and a cosine decay."""
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, self.steps // 10, self.steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What `train.demo` runs."""

    output: Path = Path("runs/demo")
    base: Path | None = None
    """Diffusers folder of the base model; None for the one in the package."""
    quick: bool = False
    """Run every part, but too little of it for the figures to mean anything."""
    seed: int = 0

    pairs: int
    sampling_steps: int
    guidance_scale: float
    label_temperature: float
    """Of the Bradley-Terry labels: the better image wins with probability sigmoid(score difference / temperature)."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = DEFAULT_TARGETS
    beta: float
    """Of Diffusion-DPO."""
    dpo: ModuleTraining
    positive_negative: ModuleTraining

    w_pgd: tuple[float, ...]
    w_cpgd: tuple[float, ...]
    """Candidates for w, compared on the validation prompts."""
    validation_prompts: int
    held_out_prompts: int
    train_prompts: int
    """Number of training prompts on which the methods are compared too."""
    batch_size: int = 32
    """Images per call of the sampler."""

    def __post_init__(self):
        if self.held_out_prompts < 2 or self.train_prompts < 2 or self.validation_prompts < 2:
            raise ValueError("held_out_prompts, train_prompts and validation_prompts must be at least 2")
        for w in (*self.w_pgd, *self.w_cpgd):
            if not np.isfinite(w):
                raise ValueError(f"w must be finite, got {w} in w_pgd={self.w_pgd}, w_cpgd={self.w_cpgd}")

    def shrunk(self) -> "DemoConfig":
        """The same run with little of everything."""
        return dataclasses.replace(
            self,
            pairs=32,
            sampling_steps=4,
            dpo=dataclasses.replace(self.dpo, steps=4, batch_size=8),
            positive_negative=dataclasses.replace(self.positive_negative, steps=4, batch_size=8),
            w_pgd=self.w_pgd[:2],
            w_cpgd=self.w_cpgd[:2],
            validation_prompts=8,
            held_out_prompts=16,
            train_prompts=8,
            batch_size=16,
        )


class Demo:
    """One run; its methods are the steps of the job, in order."""

    def __init__(self, config: DemoConfig):
        self.config = config
        folder = config.base if config.base is not None else resources.files("flax_pref.demo") / "base"
        base = load_pipeline(folder)
        unet = lora_network(
            base.unet,
            MODULES,
            rank=config.rank,
            alpha=config.alpha,
            targets=config.targets,
            key=jax.random.key(config.seed),
        )
        self.pipeline = dataclasses.replace(base, unet=unet)
        self.schedule = NoiseSchedule.from_dict(base.scheduler_config)
        self.solver = from_config(base.scheduler_config, config.sampling_steps, name="ddim")
        self.score = jax.jit(judge.score)
