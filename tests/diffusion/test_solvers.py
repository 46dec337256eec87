import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.solvers import Solver, ddim, euler, from_config, step

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SHAPE = (2, 4, 3, 2)
# diffusers' Euler scheduler makes an array of a tensor in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def trajectory(solver: Solver, noise_preds: np.ndarray, noises: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the network sees and what comes out of every step, for given predictions `[S, ...]`."""

    def advance(latents, table):
        row, noise_pred, noise = table
        after = step(latents, noise_pred, row, noise if solver.stochastic else None)
        return after, (row.input_scale * latents, after)

    return jax.lax.scan(advance, solver.init_noise_sigma * noises[-1], (solver, noise_preds, noises[:-1]))[1]


def reference_trajectory(scheduler, steps: int, noise_preds: np.ndarray, noises: np.ndarray, **extra):
    scheduler.set_timesteps(steps)
    latents = torch.from_numpy(noises[-1]) * scheduler.init_noise_sigma
    inputs, outputs = [], []
    for i, t in enumerate(scheduler.timesteps):
        inputs.append(scheduler.scale_model_input(latents, t))
        if extra:
            extra["variance_noise"] = torch.from_numpy(noises[i])
        latents = scheduler.step(torch.from_numpy(noise_preds[i]), t, latents, **extra).prev_sample
        outputs.append(latents)
    return torch.stack(inputs).numpy(), torch.stack(outputs).numpy()


def assert_same_trajectory(solver: Solver, scheduler, steps: int, **extra):
    rng = np.random.default_rng(steps)
    noise_preds = rng.standard_normal((steps, *SHAPE), dtype=np.float32)
    noises = rng.standard_normal((steps + 1, *SHAPE), dtype=np.float32)
    expected = reference_trajectory(scheduler, steps, noise_preds, noises, **extra)
    np.testing.assert_allclose(solver.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)
    for ours, theirs in zip(trajectory(solver, noise_preds, noises), expected, strict=True):
        # Relative to each step's largest latent: errors do not shrink where latents happen to be close to zero.
        size = np.abs(theirs).max(axis=(1, 2, 3, 4))
        error = np.abs(ours - theirs).max(axis=(1, 2, 3, 4)) / size
        assert error.max() < 1e-5


@pytest.mark.parametrize("steps", [4, 7, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("eta", "set_alpha_to_one"), [(0.0, False), (0.0, True), (0.7, False), (1.0, True)])
def test_ddim_walks_as_in_diffusers(steps, prediction_type, spacing, eta, set_alpha_to_one):
    config = SD | {
        "clip_sample": False,
        "prediction_type": prediction_type,
        "set_alpha_to_one": set_alpha_to_one,
        "steps_offset": 1,
        "timestep_spacing": spacing,
    }
    solver = from_config(config, steps, name="ddim", eta=eta)
    assert solver.stochastic == (eta > 0)
    assert_same_trajectory(solver, DDIMScheduler(**config), steps, **({"eta": eta} if eta else {}))


@pytest.mark.parametrize("steps", [4, 7, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_euler_walks_as_in_diffusers(steps, prediction_type, spacing):
    config = SD | {"prediction_type": prediction_type, "steps_offset": 1, "timestep_spacing": spacing}
    reference = EulerDiscreteScheduler(**config)
    solver = from_config(config | {"_class_name": "EulerDiscreteScheduler"}, steps)
    assert_same_trajectory(solver, reference, steps)
    np.testing.assert_allclose(solver.init_noise_sigma, reference.init_noise_sigma, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 333, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_unusual_numbers_of_steps_visit_the_timesteps_that_diffusers_visits(steps, spacing):
    reference = DDIMScheduler(timestep_spacing=spacing)
    reference.set_timesteps(steps)
    solver = ddim(NoiseSchedule(), steps, spacing=spacing)
    np.testing.assert_array_equal(solver.timesteps, reference.timesteps.numpy())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(solver))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_fields_that_a_file_leaves_out_take_the_defaults_of_diffusers(scheduler):
    extra = {"clip_sample": False} if scheduler is DDIMScheduler else {}
    solver = from_config(SD | extra | {"_class_name": scheduler.__name__}, 5)
    assert_same_trajectory(solver, scheduler(**SD, **extra), 5)


def test_the_scheduler_of_sd15_samples_with_ddim_or_euler_when_asked_to():
    sd15 = SD | {"_class_name": "PNDMScheduler", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    sd15 |= {"skip_prk_steps": True, "trained_betas": None, "_diffusers_version": "0.6.0"}
    with pytest.raises(
        ValueError, match=r"_class_name='PNDMScheduler' is not supported.*pass name=.ddim. or name=.euler."
    ):
        from_config(sd15, 10)
    assert_same_trajectory(from_config(sd15, 10, name="ddim"), DDIMScheduler.from_config(sd15), 10)
    assert_same_trajectory(from_config(sd15, 10, name="euler"), EulerDiscreteScheduler.from_config(sd15), 10)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("DDIMScheduler", "clip_sample", True),
        ("DDIMScheduler", "thresholding", True),
        ("DDIMScheduler", "prediction_type", "sample"),
        ("EulerDiscreteScheduler", "use_karras_sigmas", True),
        ("EulerDiscreteScheduler", "interpolation_type", "log_linear"),
        ("EulerDiscreteScheduler", "timestep_type", "continuous"),
        ("EulerDiscreteScheduler", "final_sigmas_type", "sigma_min"),
    ],
)
def test_an_unsupported_field_is_refused_by_name_and_value(name, field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r} is not supported"):
        from_config({"_class_name": name, "clip_sample": False, field: value}, 5)


def test_clipping_that_diffusers_would_do_by_default_is_refused():
    with pytest.raises(ValueError, match="clip_sample=True is not supported"):
        from_config({"_class_name": "DDIMScheduler"}, 5)


@pytest.mark.parametrize("make", [ddim, euler])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps must lie in 1 \.\. 1000 .*, got 0"),
        ({"steps": 1001}, r"steps must lie in 1 \.\. 1000 .*, got 1001"),
        ({"steps": 5, "spacing": "karras"}, "spacing must be one of leading, trailing, linspace, got 'karras'"),
        ({"steps": 1000, "spacing": "leading", "steps_offset": 1}, "outside the trained 0 .. 999"),
    ],
)
def test_bad_arguments_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(NoiseSchedule(), **options)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_outside_its_range_is_refused(eta):
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], got"):
        ddim(NoiseSchedule(), 5, eta=eta)


def test_eta_and_unknown_names_are_refused_where_they_mean_nothing():
    with pytest.raises(ValueError, match=r"eta=0\.5 applies to ddim only"):
        from_config(SD, 5, name="euler", eta=0.5)
    with pytest.raises(ValueError, match='name must be "ddim" or "euler", got \'heun\''):
        from_config(SD, 5, name="heun")
