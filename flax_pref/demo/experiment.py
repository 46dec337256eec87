"""The main job of this project, from end to end on the demo world: draw pairs, label, train, choose w, compare."""

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
from flax_pref.checkpoints.lora import load_lora_network, tell_strength
from flax_pref.config import check_least, check_positive, check_seed, check_share
from flax_pref.data.encode import EncodedSet, Encoding, PairEncoder
from flax_pref.data.images import encode_jpeg
from flax_pref.data.pick_a_pic import LabelledPair, write_pairs
from flax_pref.data.pipeline import InputConfig
from flax_pref.data.prepared import Records
from flax_pref.data.selection import Choice, select
from flax_pref.data.sources import Source, open_source
from flax_pref.demo.report import LABELS, MethodResult, Sweep, WChoice, build_report, write_report
from flax_pref.diffusion.conditioning import chunks
from flax_pref.diffusion.guidance import Rule, cfg, cpgd, pgd, tabulate
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.diffusion.text_to_image import TextToImage
from flax_pref.files import replacing
from flax_pref.methods import DiffusionDPO, Method, PositiveNegative
from flax_pref.models.lora import DEFAULT_TARGETS
from flax_pref.training.export import ExportConfig
from flax_pref.training.networks import LoRA, Weights
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.trainer import TrainConfig, train
from flax_pref.world import judge
from flax_pref.world import scenes as world

_judge = jax.jit(judge.judge)

# Noise of different purposes never meets: each has a number of its own, which is added to ten times the run's seed.
PAIR_SEEDS, EVALUATION_SEED, VALIDATION_SEED, LABEL_SEED, GENERATOR_SEED = (1, 2, 7, 8), 3, 4, 5, 6


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
    """Runs the whole path on the demo world: draws pairs, labels them, trains modules, compares methods."""

    output: Path = Path("runs/demo")
    base: Path | None = None
    """Diffusers folder of the base model; None for the one in the package."""
    quick: bool = False
    """Run every part, but too little of it for the figures to mean anything."""
    pairs_only: bool = False
    """Stop when the pairs are drawn, labelled and written."""
    seed: int = 0
    """Seed of validation prompts, held-out prompts and the noise of images."""
    training_seed: int = 0
    """Seed of pairs, labels and training."""

    pairs: int
    generators: tuple[str, ...]
    """What draws the images of pairs, chosen at random: clean, faulty, worn and wrong drawings, or base, the base model
    itself."""
    images: int = 2
    """Images per training prompt, 2 to 4; any two of them make a pair."""
    unique_roles: bool = False
    """Whether an image that has won a pair is left out as the loser of another, and the reverse."""
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
    tuned_scales: tuple[float, ...]
    """Candidates for the guidance scale of the base, the control: what can be had without any module."""
    choice: WChoice = "mean_of_winners"
    """How candidates are chosen on the validation prompts. mean_of_winners: the largest mean score among those whose
    win rate over the base lies in the 95 % interval of the largest win rate; mean: the largest mean score."""
    validation_prompts: int
    held_out_prompts: int
    train_prompts: int
    """Number of training prompts on which the methods are compared too."""
    batch_size: int = 32
    """Images per call of the sampler."""

    def __post_init__(self):
        if self.held_out_prompts < 2 or self.train_prompts < 2 or self.validation_prompts < 2:
            raise ValueError("held_out_prompts, train_prompts and validation_prompts must be at least 2")
        check_least(self, 1, "pairs", "sampling_steps", "rank", "batch_size")
        check_positive(self, "label_temperature", "alpha", "beta")
        check_seed(self.seed)
        check_seed(self.training_seed, "training_seed")
        for name in ("w_pgd", "w_cpgd", "tuned_scales"):
            candidates = getattr(self, name)
            if not candidates or not np.isfinite(candidates).all():
                raise ValueError(f"{name}={candidates}; expected at least one number, all of them finite")
        if not 2 <= self.images <= len(PAIR_SEEDS):
            raise ValueError(f"images={self.images}; expected 2 to {len(PAIR_SEEDS)} of each prompt")
        known = ("base", *world.GENERATORS)
        if not self.generators or not set(self.generators) <= set(known):
            raise ValueError(f"generators={self.generators}; expected some of {', '.join(known)}")

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
            tuned_scales=self.tuned_scales[:2],
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
        pairs = self.read_back(self.draw_pairs())
        self.train(pairs)
        sweep = self.choose_w()
        results = self.compare(sweep)
        self.write_prompts()
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

    def write_prompts(self) -> None:
        """Writes the held-out and the validation prompts, for other programs to draw."""
        counts: dict[world.Split, int] = {
            "held_out": self.config.held_out_prompts,
            "validation": self.config.validation_prompts,
        }
        for split, count in counts.items():
            with replacing(self.config.output / "prompts" / f"{split}.txt") as unfinished:
                unfinished.write_text("\n".join(self.prompts(split, count)) + "\n", encoding="utf-8")

    # Pairs

    def draw_pairs(self) -> Path:
        """Draws the images of each training prompt, labels its pairs, and writes them as Pick-a-Pic parquet."""
        config = self.config
        both = list(itertools.combinations(range(config.images), 2))
        captions = self.prompts("train", -(-config.pairs // len(both)))
        chosen = np.random.default_rng([config.training_seed, GENERATOR_SEED])
        models = chosen.choice(config.generators, (config.images, len(captions)))
        images = [self.generate(models[k], captions, PAIR_SEEDS[k]) for k in range(config.images)]
        scores = np.stack([self.scores(drawn, captions) for drawn in images])
        files = [[encode_jpeg(image) for image in drawn] for drawn in images]
        pairs = [(i, *pair) for i in range(len(captions)) for pair in both][: config.pairs]
        i, first, second = np.transpose(pairs)
        better = scores[first, i] - scores[second, i]
        # Bradley-Terry (1952): the share of judgements that prefer the first image.
        preferred = 1 / (1 + np.exp(-better / config.label_temperature))
        first_wins = np.random.default_rng([config.training_seed, LABEL_SEED]).random(len(pairs)) < preferred
        print(f"labels agree with the judge on {np.mean(first_wins == (better > 0)):.1%} of {len(pairs)} pairs")
        file = config.output / "pairs.parquet"
        write_pairs(
            file,
            (
                LabelledPair(
                    caption=captions[i],
                    jpg_0=files[first][i],
                    jpg_1=files[second][i],
                    label_0=float(wins),
                    image_0_uid=f"{i:06d}-{first}",
                    image_1_uid=f"{i:06d}-{second}",
                    model_0=str(models[first, i]),
                    model_1=str(models[second, i]),
                )
                for (i, first, second), wins in zip(pairs, first_wins, strict=True)
            ),
        )
        return file

    def generate(self, models: np.ndarray, captions: Sequence[str], seed: int) -> np.ndarray:
        """One image per caption, `[N, 64, 64, 3]`, each by its own generator; models are their names `[N]`."""
        images = np.zeros((len(captions), world.RESOLUTION, world.RESOLUTION, 3), np.float32)
        own = np.flatnonzero(models == "base").tolist()
        if own:
            rule, noise = cfg(self.config.guidance_scale), 10 * self.config.training_seed + seed
            images[own] = self.draw([captions[i] for i in own], rule, seed=noise, label="pairs", ids=own)
        for i in np.flatnonzero(models != "base").tolist():
            rng = np.random.default_rng([self.config.training_seed, seed, i])
            images[i] = world.GENERATORS[models[i]](world.parse(captions[i]), rng)
        return images

    def read_back(self, file: Path) -> Records:
        """Reads the pairs as any Pick-a-Pic file is read, and encodes them in memory."""
        reader = open_source(Source(layout="pick_a_pic", path=str(file)))
        encoder = PairEncoder(
            self.pipeline, Encoding(size=(world.RESOLUTION, world.RESOLUTION), batch_size=self.config.batch_size)
        )
        pairs = EncodedSet(encoder, reader, select(reader, Choice(unique_roles=self.config.unique_roles)))
        print(f"read {len(pairs)} pairs from {file}")
        return pairs

    # Training

    def train(self, pairs: Records) -> None:
        """Trains the DPO module, then the positive and negative modules in one run, and joins them to the base."""
        config, runs = self.config, self.config.output / "training"
        shutil.rmtree(runs, ignore_errors=True)  # of another demo: its pairs may be others
        trained = self.train_modules(DiffusionDPO(beta=config.beta), config.dpo, pairs, runs / "dpo")
        trained |= self.train_modules(PositiveNegative(), config.positive_negative, pairs, runs / "pos_neg", seed=1)
        files = {name: config.output / path.name for name, path in trained.items()}
        for name, file in files.items():
            shutil.copy(trained[name], file)
        self.pipeline = dataclasses.replace(self.pipeline, unet=load_lora_network(self.pipeline.unet, files))

    def train_modules(
        self,
        method: Method,
        training: ModuleTraining,
        pairs: Records,
        output: Path,
        *,
        seed: int = 0,
        weights: Weights = "lora",
    ) -> dict[str, Path]:
        """Trains the modules of a method as `train.modules` does; returns a file, or a folder of weights, for each."""
        config = self.config
        run = TrainConfig(
            output=output,
            model=str(self.folder),
            method=method,
            data=config.output / "pairs.parquet",
            input=InputConfig(batch_size=training.batch_size, caption_dropout=training.caption_dropout),
            weights=weights,
            lora=LoRA(rank=config.rank, alpha=config.alpha, targets=config.targets),
            optimizer=training.optimizer(),
            steps=training.steps,
            latents="mode",
            seed=config.training_seed + seed,
            export=ExportConfig(layout=("diffusers",)),
        )
        train(run, records=pairs)
        suffix = ".safetensors" if weights == "lora" else ""
        return {name: output / "modules" / f"{name}{suffix}" for name in method.modules}

    # Comparison

    def choose_w(self) -> Sweep:
        """Scores of the validation prompts under PGD and cPGD for every candidate w, and under CFG for every scale."""
        config, s = self.config, self.config.guidance_scale
        captions = self.prompts("validation", config.validation_prompts)

        def scores(rule: Rule, label: str) -> np.ndarray:
            noise = 10 * config.seed + VALIDATION_SEED
            return self.scores(self.draw(captions, rule, seed=noise, label=f"validation: {label}"), captions)

        scales = dict.fromkeys((s, *config.tuned_scales))
        base = {scale: scores(cfg(scale), f"base, s = {scale:g}") for scale in scales}
        return Sweep(
            scores={
                "cfg": {scale: base[scale] for scale in config.tuned_scales},
                "pgd": {w: scores(pgd(w, s), f"PGD, w = {w:g}") for w in config.w_pgd},
                "cpgd": {w: scores(cpgd(w, s), f"cPGD, w = {w:g}") for w in config.w_cpgd},
            },
            constant={"base": base[s], "dpo": scores(cfg(s, "dpo"), "DPO")},
            choice=config.choice,
        )

    def compare(self, sweep: Sweep) -> list[MethodResult]:
        """Draws held-out and training prompts under every method, from the same noise."""
        config, s = self.config, self.config.guidance_scale
        held_out = self.prompts("held_out", config.held_out_prompts)
        train = self.prompts("train", config.train_prompts)
        best = {name: sweep.best(name) for name in sweep.scores}
        for name, ends in sweep.ends().items():
            print(f"note: {LABELS[name]} is best at {ends:g}, the end of its candidates; name others beyond it")
        for module, rule in (("dpo", "pgd"), ("pos", "cpgd"), ("neg", "cpgd")):
            tell_strength(config.output / f"{module}.safetensors", best[rule])
        rules = {
            "base": cfg(s),
            "cfg": cfg(best["cfg"]),
            "dpo": cfg(s, "dpo"),
            "pgd": pgd(best["pgd"], s),
            "cpgd": cpgd(best["cpgd"], s),
        }
        results: list[MethodResult] = []
        noise = 10 * config.seed + EVALUATION_SEED
        for name, rule in rules.items():
            scale = best["cfg"] if name == "cfg" else s
            if name == "cfg" and scale == s:  # the base is as good as it gets
                results.append(dataclasses.replace(results[0], name=name))
                continue
            images = self.draw(held_out, rule, seed=noise, label=f"held-out prompts: {name}")
            trained = self.draw(train, rule, seed=noise, label=f"training prompts: {name}")
            scores, train_scores = self.scores(images, held_out), self.scores(trained, train)
            predictions = tabulate(rule, config.sampling_steps, 1).evaluations
            w = best[name] if name in ("pgd", "cpgd") else None
            results.append(MethodResult(name, scores, train_scores, images, predictions, scale, w))
        return results

    # Parts

    def prompts(self, split: world.Split, count: int) -> list[str]:
        """The first captions of a split."""
        seed = self.config.training_seed if split == "train" else self.config.seed
        return [scene.caption for scene in itertools.islice(world.scenes(split, seed), count)]

    def draw(
        self,
        captions: Sequence[str],
        rule: Rule,
        *,
        seed: int,
        label: str,
        ids: Sequence[int] | np.ndarray | None = None,
    ) -> np.ndarray:
        """One image per caption, `[N, 64, 64, 3]`; the noise of a caption depends on its number and the seed."""
        ids = range(len(captions)) if ids is None else ids
        draw = TextToImage(self.pipeline, self.solver, (world.RESOLUTION, world.RESOLUTION), self.config.batch_size)
        return draw(captions, [int(i) for i in ids], rule, seed=seed, label=label)

    def judged(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """The judge's terms, `[N]` each."""
        asked = judge.question(captions)
        batches = [
            jax.tree.map(
                lambda term, n=n: np.asarray(term)[:n],
                _judge(images[chosen], judge.Question(*(column[chosen] for column in asked))),
            )
            for chosen, n in chunks(len(images), 64)
        ]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)

    def scores(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """The judge's scores, `[N]`."""
        return self.judged(images, captions)["score"]
