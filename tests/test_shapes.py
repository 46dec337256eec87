"""A wrong shape is caught where parts of the library meet; that right ones pass, every other test shows."""

import subprocess
import sys
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from flax_pref import methods
from flax_pref.diffusion.conditioning import encode_ids
from flax_pref.diffusion.guidance import cfg, tabulate
from flax_pref.diffusion.latents import decode_latents
from flax_pref.diffusion.sampler import combine, image_keys, sample
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.timestep_solvers import ddim
from flax_pref.methods.online import OnlineMethod
from flax_pref.models.bank import Bank
from flax_pref.models.clip import CLIPTextModel
from flax_pref.rewards.aesthetic import AestheticScore
from flax_pref.rewards.appearance import Appearance
from flax_pref.rewards.clip import ClipScore
from flax_pref.rewards.image_reward import ImageReward
from flax_pref.rewards.jpeg import JpegSize
from flax_pref.rewards.judge import Judge
from flax_pref.rewards.mps import MPSScore
from flax_pref.rewards.remote import Remote
from flax_pref.rewards.reward import WeightedSum

SHAPE, B = (4, 3, 2), 3
SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SOLVER = ddim(SCHEDULE, 2, eta=1.0, steps_offset=1, set_alpha_to_one=False)
KEYS = image_keys(0, range(B))
TEXT, EMPTY = jnp.zeros((B, 5, 6)), jnp.zeros((5, 6))


def predict(networks, latents, timesteps, text):
    return latents / 2


def draw(predict=predict, keys=KEYS):
    return sample(predict, tabulate(cfg(7.5), 2, B), SOLVER, keys, TEXT, EMPTY, SHAPE)


def weighted(rows=2, weights=(1, 2, B), timesteps=(B,)):
    latents = jnp.zeros((B, rows, *SHAPE))
    return combine(predict, jnp.zeros(weights), ("base",) * 2, latents, jnp.zeros(timesteps), TEXT)


def test_right_shapes_pass():
    assert draw().shape == (B, *SHAPE) and weighted().shape == (1, B, *SHAPE)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda latents: latents[:, :1],  # one row of two, which would be broadcast
        lambda latents: latents[..., :1],
        lambda latents: latents[:, :, :1],
        lambda latents: latents[:1],
        lambda latents: latents[:, 0],
        lambda latents: jnp.round(latents).astype(int),
    ],
)
def test_a_prediction_has_the_shape_of_the_latents(wrong):
    def predict_wrongly(networks, latents, timesteps, text):
        return wrong(latents)

    with pytest.raises(TypeCheckError):
        draw(predict_wrongly)


def test_a_bank_takes_rows_of_images():
    with pytest.raises(TypeCheckError):
        Bank(())(("base",), jnp.zeros((B, *SHAPE)), jnp.zeros(B), TEXT)


def test_sample_takes_a_key_for_each_image():
    with pytest.raises(TypeCheckError):
        draw(keys=KEYS[:, None])
    with pytest.raises(TypeCheckError):
        draw(keys=jax.random.key_data(KEYS))


@pytest.mark.parametrize("wrong", [{"weights": (2, B)}, {"weights": (1, 1, B)}, {"rows": 3}, {"timesteps": (B, 1)}])
def test_combine_has_a_weight_for_each_row_and_image(wrong):
    with pytest.raises(TypeCheckError):
        weighted(**wrong)


def batch_of(method):
    """Arrays of the right shapes, as `method.loss` takes them."""
    if not isinstance(method, OnlineMethod):
        return {name: jnp.zeros((B, *SHAPE)) for name in ("winner", "loser")} | {"text": TEXT}
    latents = (B, 2, *SHAPE) if isinstance(method, methods.D3PO) else (B, *SHAPE)
    arrays = {name: jnp.zeros(latents) for name in ("latents", "next_latents", "winner", "loser", "clean")}
    numbers = {name: jnp.zeros(B) for name in ("reward", "log_prob", "advantage", "signal")}
    row = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x[1:]), B, axis=0), SOLVER)
    return {**arrays, **numbers, "rewards": jnp.zeros((B, 2)), "row": row, "text": TEXT, "empty": TEXT}


def loss_of(method, batch, predict=predict):
    pairs = {} if isinstance(method, OnlineMethod) else {"schedule": SCHEDULE, "empty": EMPTY}
    return method.loss(predict, batch, jax.random.key(0), **pairs)


REQUIRED = {methods.SDPO: {"mu": 0.01}}
METHODS = [kind(**REQUIRED.get(kind, {})) for kind in get_args(methods.Method)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_methods_take_latents_of_images_and_predictions_like_them(method):
    batch = batch_of(method)
    assert loss_of(method, batch)[0].shape == ()
    online = "clean" if isinstance(method, methods.DiffusionNFT) else "latents"
    first = online if isinstance(method, OnlineMethod) else "winner"
    with pytest.raises(TypeCheckError):
        loss_of(method, {**batch, first: batch[first][..., 0]})
    with pytest.raises(TypeCheckError):
        loss_of(method, batch, lambda networks, latents, timesteps, text: latents[:, :1, :1])


VIEW, SQUARES, IDS = np.zeros((B, 4, 6, 3)), np.zeros((B, 4, 4, 3)), np.zeros((B, 7), int)
REWARDS = {
    ClipScore: (SQUARES, IDS),
    AestheticScore: (SQUARES, ()),
    ImageReward: (SQUARES, (IDS, IDS > 0)),
    MPSScore: (SQUARES, IDS),
    JpegSize: (VIEW, ()),
    Appearance: (VIEW, ()),
    Judge: (VIEW, None),
    Remote: (VIEW, None),
}


# Arguments are checked before anything of the reward is read: it needs no weights, nor be one.
@pytest.mark.parametrize("kind", REWARDS, ids=lambda kind: kind.__name__)
def test_rewards_take_images_with_three_channels(kind):
    view, prepared = REWARDS[kind]
    for wrong in (view[0], view[..., :1], view.astype(np.uint8)):
        with pytest.raises(TypeCheckError):
            kind.score(None, wrong, prepared)
        with pytest.raises(TypeCheckError):
            kind.view(None, wrong)


@pytest.mark.parametrize("kind", [ClipScore, AestheticScore, ImageReward, MPSScore])
def test_networks_that_score_take_squares(kind):
    with pytest.raises(TypeCheckError):
        kind.score(None, VIEW, REWARDS[kind][1])


@pytest.mark.parametrize("prepared", [IDS[0], IDS[:1], IDS.astype(float)])
def test_a_score_takes_the_tokens_of_each_image(prepared):
    with pytest.raises(TypeCheckError):
        ClipScore.score(None, SQUARES, prepared)


class Constant:
    """A reward of the user's own, whose scores have an axis too many."""

    name, differentiable = "constant", True

    def prepare(self, captions):
        return ()

    def view(self, images):
        return images

    def score(self, view, prepared):
        return jnp.zeros((len(view), 1))


def test_a_score_is_one_number_for_each_image():
    reward = WeightedSum((Constant(),), (1.0,))
    with pytest.raises(ValueError, match=r"constant: score returned shape \[3, 1\] for a batch of 3 images"):
        reward.score((VIEW,), ((),))


@pytest.mark.parametrize("ids", [IDS[0], IDS[None], IDS.astype(float)])
def test_text_encoders_take_token_ids_of_texts(ids):
    with pytest.raises(TypeCheckError):
        CLIPTextModel.__call__(None, ids)
    with pytest.raises(TypeCheckError):
        encode_ids(None, [ids])


def test_the_decoder_takes_latents_of_images():
    with pytest.raises(TypeCheckError):
        decode_latents(None, jnp.zeros(SHAPE))


def test_nothing_is_checked_outside_of_tests():
    code = (
        "import sys, flax_pref.training.trainer, flax_pref.diffusion.text_to_image, flax_pref.rewards.reward;"
        "sys.exit('beartype' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
