import jax.numpy as jnp
import numpy as np
import pytest

from flax_pref.diffusion.schedule import NoiseSchedule

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.mark.parametrize("config", [SD15, {"num_train_timesteps": 100}], ids=["scaled_linear", "defaults"])
def test_latents_are_noised_as_in_diffusers(config):
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("diffusers").DDIMScheduler(**config)
    schedule = NoiseSchedule.from_dict(config | {"_class_name": "DDIMScheduler", "steps_offset": 1})
    rng = np.random.default_rng(0)
    latents, noise = rng.standard_normal((2, 3, 4, 5, 2), dtype=np.float32)
    timesteps = np.array([0, 57, schedule.num_train_timesteps - 1])

    np.testing.assert_allclose(schedule.alphas_cumprod, reference.alphas_cumprod.numpy(), rtol=1e-5)
    expected = reference.add_noise(*map(torch.from_numpy, (latents, noise, timesteps)))
    noisy = schedule.add_noise(jnp.asarray(latents, jnp.float32), jnp.asarray(noise), jnp.asarray(timesteps))
    assert noisy.dtype == jnp.float32
    np.testing.assert_allclose(noisy, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_a_schedule_can_be_closed_over_by_cached_functions():
    assert hash(NoiseSchedule.from_dict(SD15)) == hash(NoiseSchedule.from_dict(dict(SD15)))


@pytest.mark.parametrize(
    ("field", "value", "supported"),
    [
        ("beta_schedule", "squaredcos_cap_v2", "'linear' or 'scaled_linear'"),
        ("prediction_type", "sample", "'epsilon' or 'v_prediction'"),
        ("thresholding", True, "False"),
        ("trained_betas", [0.1, 0.2], "None"),
        ("num_train_timesteps", 0, "integers from 1 to 100000"),
        ("beta_end", 1.0, "0 < beta_start <= beta_end < 1"),
    ],
)
def test_an_unsupported_field_is_refused_by_name(field, value, supported):
    with pytest.raises(ValueError, match=rf"NoiseSchedule: .*{field}=.* is not supported; supported: .*{supported}"):
        NoiseSchedule.from_dict({field: value})


def test_an_unsupported_value_is_refused_without_a_file_too():
    with pytest.raises(ValueError, match="prediction_type='sample' is not supported"):
        NoiseSchedule(prediction_type="sample")
