"""Every preference objective trains modules of a bank as it is meant to, with the training loop."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from preference_formulas import SCHEDULE

from flax_pref.checkpoints.lora import lora_network
from flax_pref.demo.loop import fit
from flax_pref.methods import (
    CHATS,
    DMPO,
    DSPO,
    KTO,
    NPO,
    SDPO,
    DiffusionDPO,
    MaPO,
    PositiveNegative,
    PositiveNegativeDPO,
)
from flax_pref.models.layers import Linear
from flax_pref.models.lora import DEFAULT_TARGETS, bank_predict, join_lora, split_lora
from flax_pref.models.network import Network
from flax_pref.models.unet import UNet2DCondition, UNetConfig

CONFIG = UNetConfig(
    block_out_channels=(8,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    cross_attention_dim=8,
    attention_head_dim=2,
    norm_num_groups=4,
)
MODULES = ("dpo", "sdpo", "kto", "mapo", "dspo", "dmpo", "pos", "neg")
PAIRS, STEPS = 16, 30


@pytest.fixture(scope="module", autouse=True)
def short_compilation():
    """Here the compiler takes longer than the steps, however fast it makes them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


class Pixels(nnx.Module):
    """Predicts each pixel from what the UNet is given, in two layers that compile fast."""

    def __init__(self, rngs: nnx.Rngs):
        self.time = Linear(1, 16, rngs=rngs)
        self.text = Linear(8, 16, rngs=rngs)
        self.conv_in = Linear(4, 16, rngs=rngs)
        self.conv_out = Linear(16, 4, rngs=rngs)

    def __call__(self, latents, timesteps, encoder_hidden_states):
        told = self.time(timesteps[:, None] / 1000) + self.text(encoder_hidden_states.mean(axis=1))
        return self.conv_out(jax.nn.silu(self.conv_in(latents) + told[:, None, None]))


@pytest.fixture(scope="module", params=["pixels", pytest.param("unet", marks=pytest.mark.long)])
def bank(request):
    build = {"pixels": Pixels, "unet": lambda rngs: UNet2DCondition(CONFIG, rngs=rngs)}[request.param]
    targets = {"pixels": ("conv_in", "conv_out"), "unet": (*DEFAULT_TARGETS, "conv_in", "conv_out")}[request.param]
    graphdef, state = nnx.split(build(nnx.Rngs(0)))
    base = Network(CONFIG, graphdef, nnx.to_pure_dict(state))
    return lora_network(base, MODULES, rank=4, alpha=4.0, targets=targets, key=jax.random.key(1))


def train(bank, objective):
    """Metrics of every step, and how far each module of the bank went from where it began."""
    rng = np.random.default_rng(0)
    texture = rng.standard_normal((2, PAIRS, 4, 4, 4), np.float32)
    batch = {
        "winner": 1 + 0.2 * texture[0],
        "loser": -1 + 0.2 * texture[1],
        "text": {"encoder_hidden_states": rng.standard_normal((PAIRS, 3, 8), np.float32)},
    }
    backbone, lora = split_lora(bank.params)

    def loss(lora, batch, key):
        return objective(bank_predict(bank.graphdef, join_lora(backbone, lora)), batch, key, schedule=SCHEDULE)

    state, history = fit(loss, lora, itertools.repeat(batch), optimizer=optax.adam(0.01), steps=STEPS, seed=0)
    moved = sum(
        jnp.square(after - before).sum(axis=tuple(range(1, after.ndim)))
        for after, before in zip(jax.tree.leaves(state.params), jax.tree.leaves(lora), strict=True)
    )
    shown = {name: f"{values[0]:.3g} -> {values[-5:].mean():.3g}" for name, values in history.items()}
    print(shown)
    return history, {name: float(distance) for name, distance in zip(MODULES, moved, strict=True)}


def last(history, name):
    return history[name][-5:].mean()


EMPTY = {"encoder_hidden_states": np.zeros((3, 8), np.float32)}


def falls(history, name):
    return last(history, name) < 0.9 * history[name][:5].mean()


@pytest.mark.parametrize(
    ("objective", "trained", "learned"),
    [
        (PositiveNegative().loss, {"pos", "neg"}, lambda h: falls(h, "winner") and falls(h, "loser")),
        (PositiveNegative(train="neg").loss, {"neg"}, lambda h: falls(h, "loser")),
        (MaPO(beta=0.1).loss, {"mapo"}, lambda h: last(h, "winner") < last(h, "loser")),
        (DSPO(beta=0.001).loss, {"dspo"}, lambda h: last(h, "winner") < 0 < last(h, "distance")),
    ],
    ids=["positive and negative", "negative alone", "mapo", "dspo"],
)
def test_training_moves_what_it_is_meant_to_and_only_its_modules(objective, trained, learned, bank):
    history, moved = train(bank, objective)
    assert {name for name, distance in moved.items() if distance > 0} == trained
    assert learned(history)
    assert last(history, "loss") < history["loss"][:5].mean()


@pytest.mark.parametrize(
    ("objective", "trained", "start", "learned"),
    [
        (DiffusionDPO(beta=20.0).loss, {"dpo"}, np.log(2), lambda h: last(h, "winner") < last(h, "loser")),
        (
            SDPO(beta=20.0, mu=0.6).loss,
            {"sdpo"},
            np.log(2),
            # The winner's error falls below the reference's, which DPO does not see to.
            lambda h: last(h, "winner") < min(last(h, "loser"), 0) and 0 < last(h, "safeguard") < 1,
        ),
        (NPO(beta=20.0).loss, {"neg"}, np.log(2), lambda h: last(h, "winner") > last(h, "loser")),
        (
            PositiveNegativeDPO(beta=20.0).loss,
            {"pos", "neg"},
            2 * np.log(2),
            lambda h: (
                last(h, "positive_winner") < last(h, "positive_loser")
                and last(h, "negative_winner") > last(h, "negative_loser")
            ),
        ),
        (
            partial(CHATS(beta=10.0).loss, empty=EMPTY),
            {"pos", "neg"},
            np.log(2),
            lambda h: last(h, "winner") < 0 and last(h, "loser") < 0,
        ),
        (
            KTO(beta=10.0).loss,
            {"kto"},
            0.5,
            lambda h: last(h, "winner") < last(h, "loser"),
        ),
        (
            DiffusionDPO(beta=20.0, poly_alpha=8.0).loss,
            {"dpo"},
            np.log(2) + 4,
            lambda h: last(h, "winner") < last(h, "loser"),
        ),
        (
            DSPO(beta=20.0, form="margin", far=10.0).loss,
            {"dspo"},
            0.25,
            lambda h: last(h, "winner") < last(h, "loser"),
        ),
        (
            DMPO(beta=20.0, alpha=0.01).loss,
            {"dmpo"},
            -np.log(4 * 0.01 * 0.99) / 2,
            lambda h: last(h, "winner") < last(h, "loser"),
        ),
    ],
    ids=["dpo", "sdpo", "npo", "dpo and npo", "chats", "kto", "poly dpo", "dspo of sdxl", "dmpo"],
)
def test_training_moves_modules_from_the_base_as_it_is_meant_to(objective, trained, start, learned, bank):
    history, moved = train(bank, objective)
    assert {name for name, distance in moved.items() if distance > 0} == trained
    assert history["loss"][0] == pytest.approx(start, rel=1e-3), "new modules are the reference"
    assert learned(history)
    assert last(history, "loss") < 0.9 * start
    for name in history:
        if name.endswith("accuracy"):
            assert last(history, name) > 0.8, name
