"""DiffusionNFT against a transcription in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_formulas import SCHEDULE

from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.methods import DiffusionNFT

COUNT, SHAPE, TOLERANCE = 4, (2, 3, 2), 1e-6
RNG = np.random.default_rng(3)
CLEAN, NEW, OLD, BASE = RNG.standard_normal((4, COUNT, *SHAPE))
ADVANTAGE = np.array([0.4, -7.0, 2.5, 9.0])
STEPS, KEY = np.array([0, 3, 6, 8]), 5


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64():
        yield


def schedule_of(prediction_type):
    fields = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    return {name: getattr(SCHEDULE, name) for name in fields} | {"prediction_type": prediction_type, "steps_offset": 1}


def batch_of(prediction_type):
    config = schedule_of(prediction_type)
    solver = solver_from_config(config, 10, name="dpm++")
    rows = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)[STEPS]), solver)
    timesteps = np.asarray(solver.timesteps, int)[STEPS]
    signal = NoiseSchedule.from_dict(config).alphas_cumprod[timesteps]
    # The solver's rows are rounded to float32; what is tested is the loss.
    exact = (1 / np.sqrt(signal), -np.sqrt(1 / signal - 1))
    if prediction_type == "v_prediction":
        exact = (np.sqrt(signal), -np.sqrt(1 - signal))
    np.testing.assert_allclose([rows.clean_from_latents, rows.clean_from_pred], exact, rtol=1e-5)
    return {
        "clean": CLEAN,
        "advantage": ADVANTAGE,
        "reward": np.arange(COUNT),
        "row": rows,
        "signal": signal,
        "text": {},
    }


def loss_of(method, batch, seen=None):
    def loss(new):
        networks = {"nft": new, "old": OLD, "base": BASE}

        def predict(names, latents, timesteps, text):
            if seen is not None:
                seen.append((names, latents))
            return jnp.stack([networks[name] for name in names], axis=1)

        return method.loss(predict, batch, jax.random.key(KEY))

    return loss


def transcribed(method, batch, new, noise):
    """The loss, image by image; errors are divided by constants, which `weights` fixes for derivatives."""
    row, signal = batch["row"], batch["signal"]
    noisy = np.sqrt(signal)[:, None, None, None] * CLEAN + np.sqrt(1 - signal)[:, None, None, None] * noise
    b, total = method.beta, 0.0
    for i in range(COUNT):
        r = min(max(min(max(ADVANTAGE[i], -5), 5) / 5 / 2 + 0.5, 0), 1)
        parts = []
        for prediction in (b * new[i] + (1 - b) * OLD[i], (1 + b) * OLD[i] - b * new[i]):
            x_0 = float(row.clean_from_latents[i]) * noisy[i] + float(row.clean_from_pred[i]) * prediction
            parts.append(((x_0 - CLEAN[i]) ** 2).mean() / max(abs(x_0.real - CLEAN[i]).mean(), 1e-5))
        total += (r * parts[0] / b + (1 - r) * parts[1] / b) * 5 / COUNT
        total += method.kl * ((new[i] - BASE[i]) ** 2).mean() / COUNT
    return total


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_and_gradient_are_those_of_the_formula(prediction_type, beta):
    method, batch = DiffusionNFT(beta=beta, kl=0.3), batch_of(prediction_type)
    noise = np.asarray(jax.random.normal(jax.random.key(KEY), CLEAN.shape))
    (value, _), found = jax.value_and_grad(loss_of(method, batch), has_aux=True)(jnp.asarray(NEW))
    assert float(value) == pytest.approx(transcribed(method, batch, NEW, noise), rel=TOLERANCE)
    expected = np.zeros_like(NEW)
    for place in np.ndindex(*NEW.shape):  # along the imaginary axis, exact to rounding
        moved = NEW.astype(complex)
        moved[place] += 1e-30j
        expected[place] = transcribed(method, batch, moved, noise).imag / 1e-30
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()


def test_old_policy_and_reference_are_one_pass_and_see_what_the_new_one_sees():
    seen = []
    loss_of(DiffusionNFT(), batch_of("epsilon"), seen)(jnp.asarray(NEW))
    assert [names for names, _ in seen] == [("nft",), ("old", "base")]
    for row in range(2):
        np.testing.assert_array_equal(seen[1][1][:, row], seen[0][1][:, 0])


def test_a_better_image_pulls_the_policy_towards_it_and_a_worse_one_pushes_it_away():
    batch = batch_of("epsilon")
    for advantage, sign in ((5.0, 1), (-5.0, -1)):
        one = {**batch, "advantage": np.full(COUNT, advantage)}
        new = jnp.asarray(OLD)  # as before any update
        gradient = jax.grad(lambda x, one=one: loss_of(DiffusionNFT(kl=0.0), one)(x)[0])(new)
        noise = np.asarray(jax.random.normal(jax.random.key(KEY), CLEAN.shape))
        towards = noise - OLD  # what predicts the clean image exactly
        assert sign * float((-gradient * towards).sum()) > 0


def test_advantages_are_within_a_prompt_and_divided_by_the_deviation_of_all_rewards():
    rewards = np.array([[0.1, 0.3], [0.8, 0.9], [0.5, 0.5]])
    experience = {"clean": np.zeros((3, 2, *SHAPE)), "reward": jnp.asarray(rewards)}
    index = (np.array([0, 1, 2]), np.array([1, 0, 0]), np.array([0, 4, 2]))
    batch = DiffusionNFT(images_per_prompt=2).batch(experience, index)
    np.testing.assert_allclose(batch["advantage"], np.array([0.1, -0.05, 0.0]) / (rewards.std() + 1e-4))
    np.testing.assert_allclose(batch["reward"], [0.3, 0.8, 0.5])


def test_the_old_policy_follows_ever_more_slowly():
    method = DiffusionNFT(ramp=0.01, limit=0.5)
    assert [float(method.kept(jnp.float64(n))) for n in (0, 10, 50, 1000)] == pytest.approx([0, 0.1, 0.5, 0.5])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images_per_prompt": 1}, "DiffusionNFT: images_per_prompt is 1; expected 2 or more"),
        ({"beta": 0.0}, "DiffusionNFT: beta is 0.0; expected a number above 0"),
        ({"eta": 0.5}, "DiffusionNFT: eta is 0.5; expected 0: DPM-Solver"),
        ({"solver": "euler"}, "DiffusionNFT: solver is 'euler'; expected 'ddim' or 'dpm"),
        ({"trained_share": 0.05}, "DiffusionNFT: trained_share is 0.05; expected 1 / 10 to 1"),
        ({"limit": 1.0}, "DiffusionNFT: limit is 1.0; expected 0 to 1, without 1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        DiffusionNFT(**wrong)
