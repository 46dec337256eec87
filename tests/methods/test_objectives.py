"""The objectives against transcriptions of the papers' formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_formulas import SCHEDULE

from flax_pref.demo.losses import autoencoding, denoising, velocity_weights
from flax_pref.methods import DiffusionDPO, PositiveNegative
from flax_pref.methods.errors import draw_noise, noisy_images

KEY = jax.random.key(7)
PAIRS, SHAPE = 5, (4, 4, 3)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    shapes = {"winner": (PAIRS, *SHAPE), "loser": (PAIRS, *SHAPE), "text": (PAIRS, 2, 6)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


# A network whose prediction depends on everything that it is given.
GAIN = {"base": 0.3, "dpo": 0.45, "pos": 0.6, "neg": -0.2}


def predict_with(gain):
    def predict(networks, latents, timesteps, text):
        gains = jnp.array([gain[name] for name in networks])
        shift = text.mean((2, 3)) + timesteps[:, None] / 1000
        return gains[:, None, None, None] * latents + shift[..., None, None, None]

    return predict


def errors(network, latents, text):
    """L of each image in float64, with the timesteps and the noise that the objective draws."""
    timesteps, noise = (np.asarray(x, np.float64) for x in draw_noise(SCHEDULE, latents, KEY))
    abar = SCHEDULE.alphas_cumprod[timesteps.astype(int)][:, None, None, None]
    noisy = np.sqrt(abar) * latents + np.sqrt(1 - abar) * noise
    shift = (text.astype(np.float64).mean((1, 2)) + timesteps / 1000)[:, None, None, None]
    return np.square(GAIN[network] * noisy + shift - noise).mean((1, 2, 3))


def test_denoising_is_the_mean_squared_error_of_the_noise(batch):
    loss, metrics = denoising(
        predict_with(GAIN), {"latents": batch["winner"], "text": batch["text"]}, KEY, schedule=SCHEDULE
    )
    assert float(loss) == pytest.approx(errors("base", batch["winner"], batch["text"]).mean(), rel=1e-5)
    assert metrics["loss"] == loss


def test_weighted_denoising_is_the_error_of_the_velocity_as_far_as_weights_are_not_bounded(batch):
    latents, text = batch["winner"], batch["text"]
    loss, _ = denoising(
        predict_with(GAIN), {"latents": latents, "text": text}, KEY, schedule=SCHEDULE, largest_weight=1e9
    )
    timesteps, _ = draw_noise(SCHEDULE, latents, KEY)
    of_velocity = errors("base", latents, text) / SCHEDULE.alphas_cumprod[np.asarray(timesteps)]
    assert float(loss) == pytest.approx(of_velocity.mean() / (1 / SCHEDULE.alphas_cumprod).mean(), rel=1e-4)
    bounded = velocity_weights(SCHEDULE, 20.0)
    assert bounded.mean() == pytest.approx(1) and bounded.max() / bounded.min() == pytest.approx(20, rel=1e-2)


def test_positive_learns_from_winners_and_negative_from_losers(batch):
    loss, metrics = PositiveNegative().loss(predict_with(GAIN), batch, KEY, schedule=SCHEDULE)
    winner = errors("pos", batch["winner"], batch["text"]).mean()
    loser = errors("neg", batch["loser"], batch["text"]).mean()
    assert float(metrics["winner"]) == pytest.approx(winner, rel=1e-5)
    assert float(metrics["loser"]) == pytest.approx(loser, rel=1e-5)
    assert float(loss) == pytest.approx(winner + loser, rel=1e-5)


def test_a_module_alone_learns_as_it_does_beside_the_other(batch):
    both = PositiveNegative().loss(predict_with(GAIN), batch, KEY, schedule=SCHEDULE)[1]
    winner = PositiveNegative(train="pos").loss(predict_with(GAIN), batch, KEY, schedule=SCHEDULE)[1]
    loser = PositiveNegative(train="neg").loss(predict_with(GAIN), batch, KEY, schedule=SCHEDULE)[1]
    for image, alone in (("winner", winner), ("loser", loser)):
        assert alone.keys() == {"loss", image}
        assert float(alone[image]) == pytest.approx(float(both[image]), rel=1e-6)


def test_each_row_is_its_own_image_under_the_noise_and_the_timestep_of_its_pair(batch):
    images = ("winner", "loser", "winner")
    noisy = noisy_images(batch, KEY, SCHEDULE, images)
    timesteps, noise = draw_noise(SCHEDULE, batch["winner"], KEY)
    np.testing.assert_array_equal(noisy.timesteps, timesteps)
    np.testing.assert_array_equal(noisy.target[:, 0], noise)
    abar = SCHEDULE.alphas_cumprod[np.asarray(timesteps)][:, None, None, None]
    for r, image in enumerate(images):
        np.testing.assert_array_equal(noisy.text[:, r], batch["text"])
        expected = np.sqrt(abar) * batch[image] + np.sqrt(1 - abar) * noise
        np.testing.assert_allclose(noisy.latents[:, r], expected, rtol=1e-5, atol=1e-6)


def test_sdxl_is_told_the_size_of_each_image_and_other_networks_are_not(batch):
    sizes = np.random.default_rng(1).uniform(0, 1024, (PAIRS, 2, 6)).astype(np.float32)
    states, pooled = batch["text"], batch["text"][:, 0]
    sdxl = {**batch, "time_ids": sizes, "text": {"encoder_hidden_states": states, "text_embeds": pooled}}
    text = noisy_images(sdxl, KEY, SCHEDULE, ("loser", "winner")).text
    np.testing.assert_array_equal(text["time_ids"], sizes[:, ::-1])
    np.testing.assert_array_equal(text["text_embeds"][:, 1], pooled)
    other = {**batch, "time_ids": sizes, "text": {"encoder_hidden_states": states}}
    assert noisy_images(other, KEY, SCHEDULE).text.keys() == {"encoder_hidden_states"}


@pytest.mark.parametrize("beta", [1.0, 20.0])
def test_dpo_is_the_papers_loss_per_pair(beta, batch):
    loss, metrics = DiffusionDPO(beta=beta).loss(predict_with(GAIN), batch, KEY, schedule=SCHEDULE)
    winner = errors("dpo", batch["winner"], batch["text"]) - errors("base", batch["winner"], batch["text"])
    loser = errors("dpo", batch["loser"], batch["text"]) - errors("base", batch["loser"], batch["text"])
    # The mean over pairs is taken outside of the log-sigmoid.
    expected = np.log1p(np.exp(beta / 2 * (winner - loser))).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["accuracy"]) == pytest.approx((winner < loser).mean())
    assert float(metrics["winner"]) == pytest.approx(winner.mean(), rel=1e-3)


def test_dpo_of_an_untrained_module_is_log_2_with_accuracy_one_half(batch):
    loss, metrics = DiffusionDPO(beta=5000).loss(
        predict_with(GAIN | {"dpo": GAIN["base"]}), batch, KEY, schedule=SCHEDULE
    )
    assert float(loss) == pytest.approx(np.log(2), rel=1e-6)
    assert float(metrics["accuracy"]) == 0.5


def test_dpo_gives_no_gradient_to_the_reference(batch):
    def loss(gain):
        return DiffusionDPO(beta=2.0).loss(predict_with(gain), batch, KEY, schedule=SCHEDULE)[0]

    gradient = jax.grad(loss)({"base": 0.3, "dpo": 0.45})
    assert gradient["base"] == 0
    assert gradient["dpo"] != 0


def test_autoencoding_is_squared_error_of_pixels_and_differences_with_a_divergence():
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 6, 6, 3)).astype(np.float32)
    logvar = np.full_like(images, -60.0)  # no noise to speak of
    loss, metrics = autoencoding(
        lambda x: (0.5 * x, logvar), lambda z: z + 0.1, {"images": images}, KEY, kl_weight=0.01
    )
    error = 0.5 * images.astype(np.float64) + 0.1 - images
    kl = (np.square(0.5 * images) + np.exp(logvar) - 1 - logvar).mean() / 2
    expected = np.square(error).mean() + np.square(np.diff(error, axis=1)).mean()
    expected += np.square(np.diff(error, axis=2)).mean() + 0.01 * kl
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["kl"]) == pytest.approx(kl, rel=1e-5)
