"""Whether what is planned is what runs: the shapes of everything that the step is compiled for."""

import dataclasses

import jax
import numpy as np
import pytest
from test_trainer import Pull, world  # noqa: F401
from tiny import tiny_run, tiny_set

from flax_pref.checkpoints.abstract import describe
from flax_pref.checkpoints.hub import DEMO
from flax_pref.data.pipeline import InputConfig
from flax_pref.data.prepared import PreparedSet
from flax_pref.methods import DDPO, TailorPO
from flax_pref.planning.rewards import abstract_reward
from flax_pref.planning.training import Blank, records_of, step_job
from flax_pref.rewards.reward import Weighted
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.rollouts import RolloutConfig
from flax_pref.training.sources import OnlineConfig
from flax_pref.training.trainer import Run, TrainConfig


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_plan_compiles_the_step_of_the_run(world, tmp_path, family):  # noqa: F811
    config = tiny_run(tmp_path / "run", world, family, method=Pull(), input=InputConfig(batch_size=4))
    run = Run(config, None)
    with run.open_source() as source:
        batch = source.next(None)
        planned = step_job(config, run.mesh)
        state, frozen, planned_batch = planned.arguments
        assert shapes(planned_batch) == shapes(batch)
        assert shapes(frozen) == shapes(run.frozen)
        with jax.set_mesh(run.mesh):
            run_text = run.program.step(run.objective()).lower(state, run.frozen, batch).as_text()
            assert planned.program.lower(*planned.arguments).as_text() == run_text


def test_of_a_set_with_several_sizes_the_largest_is_planned(world, tmp_path):  # noqa: F811
    config = tiny_run(tmp_path / "run", world, method=Pull(), input=InputConfig(batch_size=4))
    data = tiny_set(tmp_path / "set", "sd15", size=(12, 20), buckets=((16, 16), (10, 24)))
    run = Run(dataclasses.replace(config, data=data), None)
    planned = step_job(run.config, run.mesh)
    assert planned.name == "train step of Pull, 16 x 16 pixels, the largest of 3 sizes"
    with run.open_source() as source:
        while (batch := source.next(None))["winner"].shape[1:3] != (8, 8):
            pass
    assert shapes(planned.arguments[-1]) == shapes(batch)


def test_a_set_that_is_not_there_is_taken_to_be_of_the_checkpoints_resolution(world, tmp_path):  # noqa: F811
    config = tiny_run(tmp_path / "run", world, method=Pull(), input=InputConfig(batch_size=4))
    there, family = PreparedSet(config.data), describe(config.model)
    missing = records_of(dataclasses.replace(config, data=tmp_path / "missing"), family)
    assert isinstance(missing, Blank)
    assert dict(missing.shapes.conditioning) == {n: tuple(s) for n, s in there.shapes.conditioning.items()}
    side = family.resolution // family.vae.downscale_factor
    assert missing.shapes.moments == (1, side, side, there.shapes.moments[-1])


@pytest.mark.parametrize("method", [TailorPO(steps=3, train_steps=3), DDPO(steps=3, images_per_prompt=2)])
def test_examples_that_a_run_would_draw_are_planned_as_they_are(method, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    config = TrainConfig(
        output=tmp_path,
        model=DEMO,
        method=method,
        online=OnlineConfig(
            prompts=str(tmp_path / "prompts.txt"),
            rewards=(Weighted("compressibility"),),
            rollouts=RolloutConfig(prompts=2, at_once=2, batch_size=2),
            size=(64, 64),
        ),
        lora=LoRA(rank=2),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        steps=1,
    )
    run = Run(config, None)
    with run.open_source() as source:
        source._draw_all = lambda *_: source.arrays()  # drawing takes minutes
        batch = source.next(None)
    *_, planned = step_job(config, run.mesh).arguments
    assert shapes(planned) == shapes(batch)


# Of the published weights: CLIP ViT-H/14's, ViT-L/14's images' and a head of 768 and 1, and 1.79 GB of float32.
NUMBERS = {"pickscore": 986_109_441, "aesthetic": 303_966_208 + 769, "imagereward": 446_206_689, "judge": 0}


@pytest.mark.parametrize("name", [*NUMBERS, "mps"])
def test_rewards_are_planned_with_their_published_sizes(name):
    reward = abstract_reward([Weighted(name)])
    told = reward.prepare(["a", "b"])
    images = jax.ShapeDtypeStruct((2, 512, 512, 3), np.float32)
    scores = jax.eval_shape(lambda reward, images: reward.score(reward.view(images), told), reward, images)
    assert (scores.shape, scores.dtype) == ((2,), np.float32)
    assert name not in NUMBERS or sum(leaf.size for leaf in jax.tree.leaves(reward)) == NUMBERS[name]
