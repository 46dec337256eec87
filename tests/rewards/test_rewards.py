"""Rewards by name, their sums, and rewards of latents."""

import io
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flax_pref.rewards.decoded import in_turns
from flax_pref.rewards.reward import REWARDS, Weighted, make_reward
from flax_pref.world import judge
from flax_pref.world import scenes as world


@pytest.fixture(scope="module")
def images():
    """Noise, which JPEG takes much room for, and a plain image, `[2, 64, 64, 3]`."""
    noise = np.random.default_rng(0).random((64, 64, 3))
    return np.stack([noise, np.full((64, 64, 3), 0.4)]).astype(np.float32)


def kilobytes(image):
    buffer = io.BytesIO()
    Image.fromarray(np.round(255 * image).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return len(buffer.getvalue()) / 1000


def test_compressibility_is_the_size_as_jpeg(images):
    sizes = np.array([kilobytes(image) for image in images])
    assert sizes[0] > 3 * sizes[1]
    for name, sign in (("compressibility", -1), ("incompressibility", 1)):
        reward = make_reward([Weighted(name)])
        score = jax.jit(reward.score)(reward.view(images), reward.prepare(["a", "b"]))
        np.testing.assert_allclose(score, sign * sizes, rtol=1e-6)
        assert score.dtype == np.float32
        assert not reward.differentiable


def test_the_judge_is_that_of_the_demo():
    scenes = [next(iter(world.scenes("train", 0)))] * 2
    pictures = np.stack([world.render(scenes[0]), np.zeros((64, 64, 3))]).astype(np.float32)
    captions = [scene.caption for scene in scenes]
    reward = make_reward([Weighted("judge", 2.0)])
    assert reward.differentiable and reward.name == "2 judge"
    expected = judge.score(pictures, judge.question(captions))
    np.testing.assert_allclose(reward.score(reward.view(pictures), reward.prepare(captions)), 2 * expected, rtol=1e-6)


class Mean:
    """Of a channel, by the caption's number."""

    name, differentiable = "mean", True

    def prepare(self, captions):
        return np.array([int(caption) for caption in captions])

    def view(self, images):
        return images

    def score(self, images, prepared):
        return images.mean(axis=(1, 2))[jnp.arange(len(images)), prepared]


def test_a_sum_weighs_its_parts_and_has_gradients_only_if_all_have(images, monkeypatch):
    mean = jax.tree_util.register_static(Mean)
    monkeypatch.setitem(REWARDS, "mean", lambda name, files: mean())
    reward = make_reward([Weighted("mean", 3.0), Weighted("compressibility", 0.5)])
    assert reward.name == "3 mean + 0.5 compressibility"
    assert not reward.differentiable
    assert make_reward([Weighted("mean"), Weighted("mean", 2.0)]).differentiable
    expected = [
        3 * image[..., channel].mean() - 0.5 * kilobytes(image) for image, channel in zip(images, (2, 0), strict=True)
    ]
    # As an argument of a jitted function, as networks are.
    score = jax.jit(lambda reward, images, prepared: reward.score(reward.view(images), prepared))
    np.testing.assert_allclose(score(reward, images, reward.prepare(["2", "0"])), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "rewards: none are given; expected one or more of clip, pickscore, .*compressibility, .*judge"),
        ([Weighted("beauty")], "rewards: no reward 'beauty'; expected one of clip, pickscore, "),
        ([Weighted("judge", float("inf"))], "rewards: weight of 'judge' is inf; expected a finite number"),
    ],
)
def test_rewards_that_there_are_not_are_named(rewards, message):
    with pytest.raises(ValueError, match=message):
        make_reward(rewards)


@pytest.mark.parametrize(("most", "calls"), [(1, [1]), (4, [4]), (5, [4]), (100, [12]), (0, [1])])
def test_rows_are_taken_in_turns_that_divide_them(most, calls):
    sizes = []

    def double(group):
        sizes.append(len(group["x"]))
        return 2 * group["x"].sum(axis=1)

    x = np.arange(24.0, dtype=np.float32).reshape(12, 2)
    np.testing.assert_array_equal(in_turns(double, {"x": x}, most), 2 * x.sum(axis=1))
    assert sizes == calls


PROGRAM = """
import jax, numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from flax_pref.models.network import Network
from flax_pref.models.vae import AutoencoderKL, VAEConfig
from flax_pref.rewards.decoded import score_latents
from flax_pref.rewards.reward import Weighted, make_reward

config = VAEConfig(block_out_channels=(4,), latent_channels=2, norm_num_groups=2, mid_block_add_attention=False)
graphdef, state = nnx.split(AutoencoderKL(config, rngs=nnx.Rngs(0)))
params = nnx.to_pure_dict(state)
latents = np.random.default_rng(0).standard_normal((8, 16, 16, 2)).astype(np.float32)
reward = make_reward([Weighted("compressibility")])
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "fsdp"))
divided = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

def score(sharding):
    def run(params, latents):
        vae = Network(config, graphdef, params)
        return score_latents(reward, vae, latents, reward.prepare([""] * 8), sharding=sharding)
    return jax.jit(run)

one = np.asarray(score(None)(params, latents))
many = np.asarray(score(divided)(params, jax.device_put(latents, divided)))
assert one.std() > 0 and (one < 0).all()
np.testing.assert_allclose(many, one, rtol=1e-2)
"""


def test_a_reward_on_the_host_serves_every_device():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "4",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
