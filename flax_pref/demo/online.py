"""Online methods on the demo world, with its judge as the reward, at equal budgets.

A budget is a number of scored images, or of images that the UNet predicts in drawing and in losses together. One run
of a method reaches the smaller of the two, writes its modules, and goes on to the larger one.
"""

import json
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from flax_pref.demo.experiment import Demo
from flax_pref.methods import D3PO, DDPO, SPO, DiffusionNFT, TailorPO
from flax_pref.rewards.reward import Weighted
from flax_pref.training.export import ExportConfig
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.rollouts import RolloutConfig
from flax_pref.training.sources import OnlineConfig
from flax_pref.training.trainer import TrainConfig, train
from flax_pref.world import scenes as world

STEPS = 10  # of the trajectories that are learned from


class OnlineArm(NamedTuple):
    """How a method trains online.

    Attributes:
        method: with its published settings, but for the steps, and with the demo's guidance scale.
        learning_rate: the best of `rates` on training prompts, see the cell "online tuning" of the study.
        prompts: of an iteration.
        within: whether weights change inside trajectories.
        more: rates beside `RATES`, where the best of these was the first or the last.
    """

    method: TailorPO | SPO | D3PO | DDPO | DiffusionNFT
    learning_rate: float
    prompts: int = 32
    within: bool = False
    more: tuple[float, ...] = ()

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates to choose from."""
        return tuple(sorted((*RATES, *self.more)))


RATES = (3e-4, 1e-3, 3e-3)
_COMMON = {"steps": STEPS, "guidance_scale": 3.0}
ONLINE = {
    "TailorPO": OnlineArm(TailorPO(**_COMMON), 1e-3),
    "TailorPO, updates inside": OnlineArm(TailorPO(**_COMMON), 1e-3, within=True),
    "TailorPO-G": OnlineArm(TailorPO(**_COMMON, rate=(0.1, 0.2)), 1e-3),
    "TailorPO-G through UNet": OnlineArm(TailorPO(**_COMMON, rate=(0.1, 0.2), through_network=True), 1e-3),
    "D3PO": OnlineArm(D3PO(**_COMMON), 1e-4, more=(3e-5, 1e-4)),
    "SPO": OnlineArm(SPO(**_COMMON, skip=2), 1e-3),
    "DDPO": OnlineArm(DDPO(**_COMMON, images_per_prompt=4), 1e-3, prompts=16),
    "DiffusionNFT": OnlineArm(DiffusionNFT(**_COMMON, images_per_prompt=4), 1e-3, prompts=16),
}
CALLS, PREDICTIONS = "equal calls", "equal predictions"
BATCH, TRAINING_PROMPTS = 32, 256


class Budget(NamedTuple):
    """What a method may use.

    Attributes:
        calls: scored images; 0: this budget is not asked for.
        predictions: images that the UNet predicts.
    """

    calls: int
    predictions: int

    def steps(self, arm: OnlineArm) -> dict[str, int]:
        """Steps of training that each budget pays for."""
        cost = arm.method.cost(within=arm.within)
        each = {CALLS: self.calls / cost.rewards, PREDICTIONS: self.predictions / cost.predictions}
        return {name: max(1, round(examples / BATCH)) for name, examples in each.items() if examples}

    def spent(self, arm: OnlineArm, kind: Literal["calls", "predictions"]) -> dict[str, float]:
        """Scored images, or images that the UNet predicts, in training up to each budget."""
        cost = arm.method.cost(within=arm.within)
        each = cost.rewards if kind == "calls" else cost.predictions
        return {name: steps * BATCH * each for name, steps in self.steps(arm).items()}


def train_online(demo: Demo, arm: OnlineArm, rate: float, budget: Budget, output: Path) -> dict[str, dict[str, Path]]:
    """Trains a method up to each budget, and returns the files of its modules by the budget's name."""
    config = demo.config
    output.mkdir(parents=True, exist_ok=True)
    prompts = output / "prompts.txt"
    prompts.write_text("\n".join(demo.prompts("train", TRAINING_PROMPTS)) + "\n", encoding="utf-8")
    drawn = BATCH if arm.within else arm.prompts
    found: dict[str, dict[str, Path]] = {}
    for name, steps in sorted(budget.steps(arm).items(), key=lambda each: each[1]):
        run = TrainConfig(
            output=output,
            model=str(demo.folder),
            method=arm.method,
            online=OnlineConfig(
                prompts=str(prompts),
                rewards=(Weighted("judge"),),
                rollouts=RolloutConfig(
                    **{"prompts": drawn, "at_once": drawn, "batch_size": BATCH},
                    update="step" if arm.within else "iteration",
                ),
                size=(world.RESOLUTION, world.RESOLUTION),
            ),
            lora=LoRA(rank=config.rank, alpha=config.alpha, targets=config.targets),
            optimizer=OptimizerConfig(learning_rate=rate, b2=0.99, warmup_steps=5),
            steps=steps,
            record_every=1,
            seed=config.training_seed,
            export=ExportConfig(layout=("diffusers",)),
        )
        train(run)
        found[name] = {}
        for module in arm.method.modules:
            kept = output / f"{module}_{name.replace(' ', '_')}.safetensors"
            shutil.copy(output / "modules" / f"{module}.safetensors", kept)
            found[name][module] = kept
    return found


def curve(output: Path, arm: OnlineArm) -> dict[str, np.ndarray]:
    """Mean reward of what each step has learned from, and scored images and predictions up to it, `[S]` each."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    cost, steps = arm.method.cost(within=arm.within), np.array([line["step"] for line in lines])
    return {
        "reward": np.array([line["reward"] for line in lines]),
        "calls": steps * BATCH * cost.rewards,
        "predictions": steps * BATCH * cost.predictions,
    }
