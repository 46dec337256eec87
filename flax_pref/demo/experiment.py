"""The main job of this project, from end to end on the demo world: sample, label, train, choose w, compare."""

import dataclasses
import itertools
import shutil
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jax
import numpy as np

from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.checkpoints.lora import load_lora_network
from flax_pref.config import check_least, check_positive, check_seed, check_share
from flax_pref.data.encode import EncodedSet, Encoding, PairEncoder
from flax_pref.data.images import encode_jpeg
from flax_pref.data.pick_a_pic import LabelledPair, write_pairs
from flax_pref.data.pipeline import InputConfig
from flax_pref.data.prepared import Records
from flax_pref.data.selection import Choice, select
from flax_pref.data.sources import Source, open_source
from flax_pref.demo.report import MethodResult, Sweep, build_report, write_report
from flax_pref.diffusion.conditioning import chunks
from flax_pref.diffusion.guidance import Rule, cfg, cpgd, pgd
from flax_pref.diffusion.solvers import solver_from_config
from flax_pref.diffusion.text_to_image import TextToImage
from flax_pref.methods import DiffusionDPO, PositiveNegative
from flax_pref.models.lora import DEFAULT_TARGETS
from flax_pref.training.export import ExportConfig
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.trainer import TrainConfig, train
from flax_pref.world import judge
from flax_pref.world import scenes as world

_score = jax.jit(judge.score)

# Noise of different purposes never meets: each has a number of its own, which `Demo.draw` adds to the run's seed.
PAIR_SEEDS, EVALUATION_SEED, VALIDATION_SEED = (1, 2), 3, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleTraining:
    """How preference modules are trained."""

    steps: int
    batch_size: int
    """Pairs per step."""
    learning_rate: float
    caption_dropout: float = 0.2

    def __post_init__(self):
        check_least(self, 1, "steps", "batch_size")
        check_positive(self, "learning_rate")
        check_share(self, "caption_dropout")

    def optimizer(self) -> OptimizerConfig:
        """Adam with a short warm-up and a cosine decay."""
        return OptimizerConfig(
            learning_rate=self.learning_rate, b2=0.99, schedule="cosine", warmup_steps=self.steps // 10
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Runs the whole path on the demo world: samples pairs, labels them, trains modules, compares methods."""

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
    """Of Diffusion-DPO, with the factor 1/2 as in its authors' code."""
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
        check_least(self, 1, "sampling_steps", "rank", "batch_size")
        check_positive(self, "label_temperature", "alpha", "beta")
        check_seed(self.seed)
        if self.pairs < 1 or not self.w_pgd or not self.w_cpgd:
            raise ValueError("pairs, and the numbers of candidates in w_pgd and w_cpgd, must be at least 1")
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
        folder = config.base if config.base is not None else resources.files("flax_pref.world") / "base"
        self.folder = Path(str(folder))
        self.pipeline = base = load_pipeline(self.folder)
        self.solver = solver_from_config(base.scheduler_config, config.sampling_steps, name="ddim")

    def run(self) -> dict:
        """Does everything and writes the report; returns what report.json holds."""
        started = time.perf_counter()
        config = self.config
        pairs = self.read_back(self.sample_pairs())
        self.train(pairs)
        sweep = self.choose_w()
        results = self.compare(sweep)
        report = build_report(results, round(time.perf_counter() - started, 1))
        write_report(
            report,
            results,
            sweep,
            self.prompts("held_out", config.held_out_prompts),
            config.output,
            title="Preference guidance in the demo world",
            scorer="the judge's score, 0 to 1",
            settings=dataclasses.asdict(config),
        )
        return report

    # Pairs

    def sample_pairs(self) -> Path:
        """Draws two images for each training prompt, labels them, and writes them as Pick-a-Pic parquet."""
        config = self.config
        captions = self.prompts("train", config.pairs)
        images = [
            self.draw(captions, self.base_rule(), seed=seed, label=f"pairs: image {i} of each")
            for i, seed in enumerate(PAIR_SEEDS)
        ]
        scores = [self.scores(drawn, captions) for drawn in images]
        # Bradley-Terry (1952): the share of judgements that prefer the first image.
        preferred = 1 / (1 + np.exp((scores[1] - scores[0]) / config.label_temperature))
        first_wins = np.random.default_rng([config.seed, 5]).random(len(captions)) < preferred
        agreement = np.mean(first_wins == (scores[0] > scores[1]))
        print(f"labels agree with the judge on {agreement:.1%} of {len(captions)} pairs")
        file = config.output / "pairs.parquet"
        write_pairs(
            file,
            (
                LabelledPair(
                    caption=caption,
                    jpg_0=encode_jpeg(images[0][i]),
                    jpg_1=encode_jpeg(images[1][i]),
                    label_0=float(first_wins[i]),
                    image_0_uid=f"{i:06d}-0",
                    image_1_uid=f"{i:06d}-1",
                    model_0="base",
                    model_1="base",
                )
                for i, caption in enumerate(captions)
            ),
        )
        return file

    def read_back(self, file: Path) -> Records:
        """Reads the pairs as any Pick-a-Pic file is read, and encodes them in memory."""
        reader = open_source(Source(layout="pick_a_pic", path=str(file)))
        encoder = PairEncoder(
            self.pipeline, Encoding(size=(world.RESOLUTION, world.RESOLUTION), batch_size=self.config.batch_size)
        )
        pairs = EncodedSet(encoder, reader, select(reader, Choice()))
        print(f"read {len(pairs)} pairs from {file}")
        return pairs

    # Training

    def train(self, pairs: Records) -> None:
        """Trains the DPO module, then the positive and negative modules in one run, and joins them to the base."""
        config, runs = self.config, self.config.output / "training"
        shutil.rmtree(runs, ignore_errors=True)  # of another demo: its pairs may be others
        files = {}
        for seed, (method, training) in enumerate(
            ((DiffusionDPO(beta=config.beta), config.dpo), (PositiveNegative(), config.positive_negative))
        ):
            output = runs / "_".join(method.modules)
            run = TrainConfig(
                output=output,
                model=str(self.folder),
                method=method,
                data=config.output / "pairs.parquet",
                input=InputConfig(batch_size=training.batch_size, caption_dropout=training.caption_dropout),
                lora=LoRA(rank=config.rank, alpha=config.alpha, targets=config.targets),
                optimizer=training.optimizer(),
                steps=training.steps,
                latents="mode",
                seed=config.seed + seed,
                export=ExportConfig(layout=("diffusers",)),
            )
            train(run, records=pairs)
            for name in method.modules:
                files[name] = config.output / f"{name}.safetensors"
                shutil.copy(output / "modules" / files[name].name, files[name])
        unet = load_lora_network(self.pipeline.unet, files)
        self.pipeline = dataclasses.replace(self.pipeline, unet=unet)

    # Comparison

    def choose_w(self) -> Sweep:
        """Scores of the validation prompts under PGD and cPGD for every candidate w."""
        config, s = self.config, self.config.guidance_scale
        captions = self.prompts("validation", config.validation_prompts)

        def scores(rule: Rule, label: str) -> np.ndarray:
            return self.scores(self.draw(captions, rule, seed=VALIDATION_SEED, label=f"validation: {label}"), captions)

        return Sweep(
            scores={
                "pgd": {w: scores(pgd(w, s), f"PGD, w = {w:g}") for w in config.w_pgd},
                "cpgd": {w: scores(cpgd(w, s), f"cPGD, w = {w:g}") for w in config.w_cpgd},
            },
            constant={"base": scores(cfg(s), "base"), "dpo": scores(cfg(s, "dpo"), "DPO")},
        )

    def compare(self, sweep: Sweep) -> list[MethodResult]:
        """Draws held-out and training prompts under every method, from the same noise."""
        config, s = self.config, self.config.guidance_scale
        held_out = self.prompts("held_out", config.held_out_prompts)
        train = self.prompts("train", config.train_prompts)
        w = {name: sweep.best(name) for name in ("pgd", "cpgd")}
        rules = {"base": cfg(s), "dpo": cfg(s, "dpo"), "pgd": pgd(w["pgd"], s), "cpgd": cpgd(w["cpgd"], s)}
        results = []
        for name, rule in rules.items():
            images = self.draw(held_out, rule, seed=EVALUATION_SEED, label=f"held-out prompts: {name}")
            trained = self.draw(train, rule, seed=EVALUATION_SEED, label=f"training prompts: {name}")
            scores, train_scores = self.scores(images, held_out), self.scores(trained, train)
            results.append(MethodResult(name, scores, train_scores, images, w.get(name)))
        return results

    # Parts

    def base_rule(self) -> Rule:
        """Classifier-free guidance of the base model."""
        return cfg(self.config.guidance_scale)

    def prompts(self, split: world.Split, count: int) -> list[str]:
        """The first captions of a split."""
        return [scene.caption for scene in itertools.islice(world.scenes(split, self.config.seed), count)]

    def draw(self, captions: Sequence[str], rule: Rule, *, seed: int, label: str) -> np.ndarray:
        """One image per caption, `[N, 64, 64, 3]`; the noise of a caption depends on its number and the seed."""
        draw = TextToImage(self.pipeline, self.solver, (world.RESOLUTION, world.RESOLUTION), self.config.batch_size)
        return draw(captions, range(len(captions)), rule, seed=10 * self.config.seed + seed, label=label)

    def scores(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """The judge's scores, `[N]`."""
        asked = judge.question(captions)
        scores = [
            np.asarray(_score(images[chosen], judge.Question(*(column[chosen] for column in asked))))[:n]
            for chosen, n in chunks(len(images), 64)
        ]
        return np.concatenate(scores)
