"""The autoencoder between images and latents, a few images at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_pref.checkpoints.weights import abstract_network
from flax_pref.diffusion import latents as module
from flax_pref.diffusion.latents import decode_latents, draw_latents, encode_images, latent_modes
from flax_pref.models.vae import VAEConfig

CONFIG = VAEConfig(
    block_out_channels=(8, 8),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
    scaling_factor=0.5,
)


@pytest.fixture(scope="module")
def vae():
    network = abstract_network("vae", CONFIG)
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.3 * rng.standard_normal(leaf.shape, dtype=np.float32))

    return network._replace(params=jax.tree.map(draw, network.params))


IMAGES = np.random.default_rng(1).random((5, 16, 16, 3), dtype=np.float32)


def test_encoding_takes_the_mode_or_samples_each_image_from_its_own_key(vae, monkeypatch):
    mode = encode_images(vae, IMAGES)
    assert mode.shape == (5, 8, 8, 4)
    keys = jax.random.split(jax.random.key(0), 5)
    sampled = encode_images(vae, IMAGES, keys=keys)
    assert np.abs(sampled - mode).max() > 0.01
    # An image's latent does not depend on the images beside it.
    np.testing.assert_allclose(encode_images(vae, IMAGES[3:], keys=keys[3:]), sampled[3:], atol=1e-6)
    many = np.mean([encode_images(vae, IMAGES[:1], keys=jax.random.split(jax.random.key(i), 1)) for i in range(100)], 0)
    assert np.abs(many - mode[:1]).mean() < 0.3 * np.abs(sampled[:1] - mode[:1]).mean()


def test_decoding_in_chunks_gives_the_same_images(vae, monkeypatch):
    latents = jnp.asarray(np.random.default_rng(2).standard_normal((5, 8, 8, 4), dtype=np.float32))
    whole = decode_latents(vae, latents)
    assert whole.shape == (5, 16, 16, 3)
    assert whole.min() >= 0 and whole.max() <= 1
    monkeypatch.setattr(module, "PIXELS", 2 * 16 * 16)
    np.testing.assert_allclose(decode_latents(vae, latents), whole, atol=1e-6)


def test_a_larger_batch_does_not_need_more_memory_to_decode():
    network = abstract_network("vae", CONFIG)

    def peak(images, shards=1):
        calls = []

        def record(graphdef, params, latents):
            calls.append(latents.shape[0])
            return jnp.zeros((latents.shape[0], 1024, 1024, 3))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_decoder", record)
            latents = jax.ShapeDtypeStruct((images, 512, 512, 4), np.float32)
            jax.eval_shape(
                lambda params, latents: decode_latents(network._replace(params=params), latents, shards=shards),
                *(network.params, latents),
            )
        module._decoder_in_turns.clear_cache()  # of programs made with the record
        return max(calls)

    assert peak(1) == peak(8) == 1
    assert peak(8, shards=4) == 4, "one on each device"


@pytest.mark.parametrize(("dtype", "computes"), [(jnp.float16, jnp.float32), (jnp.bfloat16, jnp.bfloat16)])
def test_an_autoencoder_that_needs_range_does_not_compute_in_float16(dtype, computes):
    from flax import nnx

    network = abstract_network("vae", CONFIG, dtype)
    assert nnx.merge(network.graphdef, network.params).decoder.conv_in.dtype == computes
    assert {leaf.dtype for leaf in jax.tree.leaves(network.params)} == {jnp.dtype(dtype)}


# ----------------------------------------------------------------------------------------------------------------------
# Pairs


def pairs_of(rows, *, logvar=0.0):
    """Moments of pairs with these rows: means that tell the row, winners above and losers below zero."""
    rows = jnp.asarray(rows, jnp.int32)
    mean = jnp.broadcast_to(1.0 + rows[:, None, None, None], (len(rows), 16, 16, 4))
    winner, loser = (
        jnp.concatenate([sign * mean, jnp.full_like(mean, logvar)], -1).astype(jnp.bfloat16) for sign in (1, -1)
    )
    return {"winner": winner, "loser": loser, "row": rows, "text": {"encoder_hidden_states": jnp.ones((len(rows), 2))}}


def test_latents_of_pairs_are_drawn_about_their_means_and_scaled():
    batch = pairs_of([0, 1, 2], logvar=np.log(4.0))
    drawn = draw_latents(batch, jax.random.key(0), 0.5)
    assert drawn["winner"].shape == (3, 16, 16, 4) and drawn["winner"].dtype == jnp.float32
    assert drawn["text"] is batch["text"]
    for sign, image in ((1, "winner"), (-1, "loser")):
        noise = np.asarray(drawn[image]) / 0.5 - sign * np.arange(1, 4).reshape(-1, 1, 1, 1)
        assert noise.std() == pytest.approx(2, rel=0.05)
        assert np.abs(noise.mean((1, 2, 3))).max() < 0.2
    modes = latent_modes(batch, 0.5)
    for sign, image in ((1, "winner"), (-1, "loser")):
        assert (modes[image] == sign * 0.5 * np.arange(1, 4).reshape(-1, 1, 1, 1)).all()


def test_an_image_of_a_pair_draws_from_its_own_key_wherever_it_is_in_the_batch():
    key = jax.random.key(0)
    drawn, moved = draw_latents(pairs_of([4, 5, 6]), key, 1.0), draw_latents(pairs_of([6, 7, 4]), key, 1.0)
    noise = {image: drawn[image] - latent_modes(pairs_of([4, 5, 6]), 1.0)[image] for image in ("winner", "loser")}
    for image in noise:
        np.testing.assert_allclose(moved[image][::2], drawn[image][::-2], atol=1e-6)
    images = [np.asarray(noise[image][i]).ravel() for image in noise for i in range(3)]
    # And that of another step.
    images += [np.asarray(draw_latents(pairs_of([4, 5, 6]), jax.random.key(1), 1.0)["winner"][0] - 5).ravel()]
    assert np.abs(np.corrcoef(images) - np.eye(7)).max() < 0.15  # of 1,024 numbers each: five standard errors


def test_latents_without_variance_are_the_modes():
    batch = pairs_of([3, 9], logvar=-30.0)
    drawn, modes = draw_latents(batch, jax.random.key(0), 0.18215), latent_modes(batch, 0.18215)
    for image in ("winner", "loser"):
        np.testing.assert_allclose(drawn[image], modes[image], atol=1e-5)
