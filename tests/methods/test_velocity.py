"""Methods that learn from pairs, with networks that predict the velocity: their errors are those of the velocity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from flax_pref import methods
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.methods.errors import PairMethod, draw_noise

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISE = NoiseSchedule(**SD)
VELOCITY = NoiseSchedule(**SD, prediction_type="v_prediction")
ZERO_SNR = dataclasses.replace(VELOCITY, rescale_betas_zero_snr=True)
KEY = jax.random.key(3)
PAIRS, SHAPE = 6, (4, 4, 3)
RNG = np.random.default_rng(0)
BATCH = {name: RNG.standard_normal((PAIRS, *SHAPE)).astype(np.float32) for name in ("winner", "loser")}
# time_ids tell a network which image of the pair a row is.
BATCH["time_ids"] = np.broadcast_to(np.array([0.0, 1.0], np.float32)[None, :, None], (PAIRS, 2, 6))
BATCH["text"] = {
    "encoder_hidden_states": RNG.standard_normal((PAIRS, 2, 6)).astype(np.float32),
    "text_embeds": np.zeros((PAIRS, 4), np.float32),
}
EMPTY = {"encoder_hidden_states": np.zeros((2, 6), np.float32), "text_embeds": np.zeros(4, np.float32)}
GAIN = {"base": 0.3, **dict.fromkeys(("dpo", "dmpo", "dspo", "kto", "mapo", "snpo", "sdpo", "pos"), 0.45), "neg": -0.2}
METHODS = [
    getattr(methods, name)(**({"mu": 0.9} if name == "SDPO" else {}))
    for name in methods.__all__
    if isinstance(getattr(methods, name), type)
    and issubclass(getattr(methods, name), PairMethod)
    and name != "PairMethod"
]


def predict(networks, latents, timesteps, text, gain=GAIN):
    gains = jnp.array([gain[name] for name in networks])
    shift = text["encoder_hidden_states"].mean((2, 3)) + timesteps[:, None] / 1000
    return gains[:, None, None, None] * latents + shift[..., None, None, None]


def predict_noise(networks, latents, timesteps, text):
    """A network that misses the noise by as much as `predict` misses the velocity."""
    abar = jnp.asarray(VELOCITY.alphas_cumprod, jnp.float32)[timesteps][:, None, None, None, None]
    is_loser = text["time_ids"][..., 0, None, None, None] > 0
    clean = jnp.where(is_loser, BATCH["loser"][:, None], BATCH["winner"][:, None])
    noise = (latents - jnp.sqrt(abar) * clean) / jnp.sqrt(1 - abar)
    return noise + predict(networks, latents, timesteps, text) - (jnp.sqrt(abar) * noise - jnp.sqrt(1 - abar) * clean)


def test_all_methods_are_tested():
    assert len(METHODS) == 11


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_loss_takes_errors_of_the_velocity_as_it_takes_errors_of_the_noise(method):
    found, metrics = method.loss(predict, BATCH, KEY, schedule=VELOCITY, empty=EMPTY)
    expected, others = method.loss(predict_noise, BATCH, KEY, schedule=NOISE, empty=EMPTY)
    assert float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    for name, value in metrics.items():
        assert float(value) == pytest.approx(float(others[name]), rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("zero_snr", [False, True])
def test_dpo_takes_the_velocities_of_diffusers(zero_snr):
    """As the DPO example of diffusers does; errors of the noise would be `abar` times these."""
    schedule = ZERO_SNR if zero_snr else VELOCITY
    scheduler = DDPMScheduler(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr)
    timesteps, noise = (np.array(x) for x in draw_noise(schedule, BATCH["winner"], KEY))
    errors = {}
    for network in ("dpo", "base"):
        for image in ("winner", "loser"):
            clean = torch.from_numpy(BATCH[image])
            arguments = clean, torch.from_numpy(noise), torch.from_numpy(timesteps)
            noisy, target = scheduler.add_noise(*arguments).numpy(), scheduler.get_velocity(*arguments).numpy()
            told = {"encoder_hidden_states": BATCH["text"]["encoder_hidden_states"][:, None]}
            given = np.asarray(predict((network,), noisy[:, None], timesteps, told))[:, 0]
            errors[network, image] = np.square((given - target).astype(np.float64)).mean((1, 2, 3))
    change = {image: errors["dpo", image] - errors["base", image] for image in ("winner", "loser")}
    logits = -2.0 / 2 * (change["winner"] - change["loser"])
    expected = np.log1p(np.exp(-logits)).mean()
    loss, metrics = methods.DiffusionDPO(beta=2.0).loss(predict, BATCH, KEY, schedule=schedule)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["winner"]) == pytest.approx(change["winner"].mean(), rel=1e-4)


@pytest.mark.parametrize("schedule", [ZERO_SNR, dataclasses.replace(ZERO_SNR, prediction_type="epsilon")])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_the_timestep_without_signal_has_finite_losses_and_gradients(method, schedule, monkeypatch):
    last = jnp.full(PAIRS, schedule.num_train_timesteps - 1)
    monkeypatch.setattr(methods.errors, "draw_noise", lambda schedule, x, key: (last, jax.random.normal(key, x.shape)))

    def loss(gain):
        def with_gain(*arguments):
            return predict(*arguments, gain=gain)

        return method.loss(with_gain, BATCH, KEY, schedule=schedule, empty=EMPTY)[0]

    value, gradient = jax.value_and_grad(loss)({name: jnp.float32(gain) for name, gain in GAIN.items()})
    assert np.isfinite(value)
    trained = np.array([gradient[name] for name in method.modules])
    assert np.isfinite(trained).all()
    # Without signal, errors of the noise are the same for both images of a pair.
    assert trained.any() or schedule.prediction_type == "epsilon"


@pytest.mark.parametrize("name", ["TailorPO", "SPO", "D3PO", "DDPO", "DiffusionNFT"])
def test_online_losses_are_finite_from_the_timestep_without_signal(name):
    method = getattr(methods, name)(steps=10, guidance_scale=1.0)
    solver = solver_from_config(
        {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        10,
        name=method.solver_name,
        eta=method.eta,
    )
    steps = np.array([0, 0, 5, 9])
    x = {key: RNG.standard_normal((4, *SHAPE)).astype(np.float32) for key in ("latents", "winner", "loser", "clean")}
    text = RNG.standard_normal((4, 2, 6)).astype(np.float32)
    batch = {
        **x,
        "next_latents": x["winner"],
        "row": jax.tree.map(lambda column: column[steps], solver),
        "signal": ZERO_SNR.alphas_cumprod[np.asarray(solver.timesteps, int)[steps]].astype(np.float32),
        **{"text": text, "empty": np.zeros_like(text)},
        **{"rewards": np.tile(np.float32([0.9, 0.1]), (4, 1)), "reward": np.ones(4, np.float32)},
        **{"log_prob": np.full(4, -1.0, np.float32), "advantage": np.float32([1, -1, 1, -1])},
    }
    if name == "D3PO":  # two images of each prompt
        batch |= {key: np.stack([batch[key], x["loser"]], axis=1) for key in ("latents", "next_latents")}

    def loss(gain):
        def predicted(networks, latents, timesteps, text):
            gains = jnp.stack([gain if network in method.modules else jnp.float32(0.4) for network in networks])
            return gains[:, None, None, None] * latents + text.mean((2, 3))[..., None, None, None]

        return method.loss(predicted, batch, KEY)[0]

    assert np.asarray(batch["row"].timesteps)[0] == 999 and batch["signal"][0] == 0
    value, gradient = jax.value_and_grad(loss)(jnp.float32(0.45))
    assert np.isfinite(value) and np.isfinite(gradient) and gradient != 0
