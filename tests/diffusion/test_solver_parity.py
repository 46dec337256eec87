"""Every solver against the scheduler of diffusers that has its name, from the same predictions and noise."""

import itertools

import diffusers
import numpy as np
import pytest
from diffusers.schedulers import AysSchedules
from scheduler_walks import SD, SHAPE, assert_same_trajectory, trajectory

from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.scheduler_configs import CLASSES, NAMES, solver_from_config

# diffusers' schedulers make arrays of tensors in ways that NumPy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context"),
]
PREDICTIONS = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
SIGMAS = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
STEPS = [4, 7, 15, 50]
PLAIN = {"clip_sample": False}
# Classes, and what else their files may say.
VARIANTS = [
    ("EulerAncestralDiscreteScheduler", [{}], False),
    ("HeunDiscreteScheduler", SIGMAS, False),
    ("LMSDiscreteScheduler", SIGMAS, False),
    ("DEISMultistepScheduler", [{"solver_order": order, **sigmas} for order in (1, 2, 3) for sigmas in SIGMAS], True),
    (
        "UniPCMultistepScheduler",
        [
            *({"solver_order": order, **sigmas} for order in (1, 2, 3) for sigmas in SIGMAS),
            {"solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"},
            {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        ],
        True,
    ),
    (
        "DPMSolverMultistepScheduler",
        [
            *({"solver_order": order, **sigmas} for order in (1, 3) for sigmas in SIGMAS),
            *({"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", **sigmas} for sigmas in SIGMAS),
            {"algorithm_type": "sde-dpmsolver++"},
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 1},
            {"solver_type": "heun", "final_sigmas_type": "sigma_min"},
            {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        ],
        True,
    ),
    (
        "DPMSolverSinglestepScheduler",
        [
            *({"solver_order": order, **sigmas} for order in (1, 2, 3) for sigmas in SIGMAS),
            *({"solver_order": order, "solver_type": "heun"} for order in (2, 3)),
            *({"solver_order": order, "final_sigmas_type": "sigma_min"} for order in (2, 3)),
            {"lower_order_final": True, "final_sigmas_type": "sigma_min", "solver_order": 3},
        ],
        True,
    ),
    ("DDPMScheduler", [{**PLAIN, "variance_type": kind} for kind in ("fixed_small", "fixed_small_log")], False),
    ("DDPMScheduler", [{**PLAIN, "variance_type": "fixed_large"}], False),
    ("LCMScheduler", [{}, {"timestep_scaling": 3.0, "original_inference_steps": 100}], False),
    ("EulerDiscreteScheduler", [{"final_sigmas_type": "sigma_min"}, *SIGMAS[2:]], False),
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("class_name", "variants", "whole"), VARIANTS, ids=[name for name, *_ in VARIANTS])
def test_every_class_walks_as_in_diffusers(class_name, variants, whole, steps):
    scheduler = getattr(diffusers, class_name)
    # One spacing for each variant, another one for another number of steps.
    spacings = itertools.cycle(SPACINGS[steps % 3 :] + SPACINGS[: steps % 3])
    cases = [(variant, kind) for kind in PREDICTIONS for variant in variants * (3 if len(variants) == 1 else 1)]
    for (variant, prediction_type), spacing in zip(cases, spacings, strict=False):
        config = SD | variant | {"prediction_type": prediction_type}
        if class_name != "DPMSolverSinglestepScheduler":
            config |= {"steps_offset": 1, "timestep_spacing": spacing}
        reference = scheduler(**config)
        solver = solver_from_config({**config, "_class_name": class_name}, steps)
        # Spaced timesteps of the first kind are fractions, which diffusers interpolates in float32.
        fractions = 0.0 if whole or not any(name.endswith("_sigmas") for name in variant) else 1e-3
        assert_same_trajectory(solver, reference, steps, fractions, precise=hasattr(reference, "sigmas"))
        np.testing.assert_allclose(solver.init_noise_sigma, reference.init_noise_sigma, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
def test_tcd_walks_as_in_diffusers(steps, eta):
    for prediction_type in PREDICTIONS:
        config = SD | {"_class_name": "TCDScheduler", "prediction_type": prediction_type}
        solver = solver_from_config(config, steps, eta=eta)
        given = {} if eta is None else {"eta": eta}
        assert_same_trajectory(solver, diffusers.TCDScheduler.from_config(config), steps, **given)


@pytest.mark.parametrize("class_name", list(CLASSES))
def test_files_with_nothing_but_what_is_needed_take_the_defaults_of_diffusers(class_name):
    needed = {"PNDMScheduler": {"skip_prk_steps": True}}.get(class_name, PLAIN)
    config = {"_class_name": class_name, **needed}
    reference = getattr(diffusers, class_name).from_config(config)
    assert_same_trajectory(solver_from_config(config, 6), reference, 6, precise=hasattr(reference, "sigmas"))


OTHERS = {
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    **{name: (class_name, {}) for class_name, (name, _) in CLASSES.items()},
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_a_name_decides_whatever_the_file_says(name):
    class_name, given = OTHERS[name]
    for other in CLASSES:
        file = {"solver_order": 1, "algorithm_type": "dpmsolver", "skip_prk_steps": False}
        file |= SD | PLAIN | {"_class_name": other, "timestep_spacing": "trailing", "solver_type": "midpoint"}
        read = file | {"solver_order": 2, "algorithm_type": "dpmsolver++", "skip_prk_steps": True, **given}
        if name in ("deis", "unipc"):  # their order is a field of the file, also in diffusers
            read["solver_order"] = 1
        reference = getattr(diffusers, class_name).from_config(read)
        solver = solver_from_config(file, 6, name=name)
        assert_same_trajectory(solver, reference, 6, precise=hasattr(reference, "sigmas"))


def test_third_order_with_noise_is_the_formula_of_k_diffusion():
    # diffusers subtracts one half in the factor of the second difference, where its other third orders add it.
    solver = solver_from_config(SD, 20, name="dpm++_3m_sde")
    rng = np.random.default_rng(0)
    noise_preds, noises = rng.standard_normal((20, *SHAPE)), rng.standard_normal((21, *SHAPE))
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD, solver_order=3, algorithm_type="sde-dpmsolver++")
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas.double().numpy()
    x, denoised, expected = noises[-1] * np.sqrt(sigmas[0] ** 2 + 1), [], []
    for i in range(20):
        # Of latents x_0 + sigma eps, as there.
        x_0 = x - sigmas[i] * noise_preds[i]
        denoised = [x_0, *denoised[:2]]
        if i == 19:
            x = x_0
        else:
            h, *past = (np.log(sigmas[j] / sigmas[j + 1]) for j in range(i, max(i - 3, -1), -1))
            x = np.exp(-2 * h) * x - np.expm1(-2 * h) * x_0
            x = x + noises[i] * sigmas[i + 1] * np.sqrt(-np.expm1(-2 * h))
            phi_2 = np.expm1(-2 * h) / (2 * h) + 1
            phi_3 = phi_2 / (2 * h) - 0.5
            if len(past) == 2:
                r0, r1 = past[0] / h, past[1] / h
                d1_0, d1_1 = (denoised[0] - denoised[1]) / r0, (denoised[1] - denoised[2]) / r1
                d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
                x = x + phi_2 * d1 - phi_3 * (d1_0 - d1_1) / (r0 + r1)
            elif len(past) == 1:  # of second order, by midpoints as in diffusers
                x = x - np.expm1(-2 * h) / 2 * (denoised[0] - denoised[1]) / (past[0] / h)
        expected.append(x / np.sqrt(sigmas[i + 1] ** 2 + 1))
    ours = trajectory(solver, noise_preds.astype(np.float32), noises.astype(np.float32))[1]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("table", ["ays", "ays_sdxl"])
@pytest.mark.parametrize("name", ["euler", "dpm++", "heun"])
def test_align_your_steps_visits_the_published_timesteps(name, table):
    published = AysSchedules["StableDiffusionTimesteps" if table == "ays" else "StableDiffusionXLTimesteps"]
    class_name = {"euler": "EulerDiscrete", "dpm++": "DPMSolverMultistep", "heun": "HeunDiscrete"}[name]
    reference = getattr(diffusers, f"{class_name}Scheduler")(**SD)
    reference.set_timesteps(timesteps=published)
    assert_same_trajectory(solver_from_config(SD, 10, name=name, sigmas=table), reference, None, precise=True)
    # Other numbers of steps lie on the line through the logarithms of the levels.
    sigmas = AysSchedules["StableDiffusionSigmas" if table == "ays" else "StableDiffusionXLSigmas"]
    places = np.linspace(0, 10, 21)[:-1]
    expected = np.exp(np.interp(places, np.arange(11), np.log([*sigmas[:-1], 0.0292])))
    twenty = solver_from_config(SD, 20, name="euler", sigmas=table)
    np.testing.assert_allclose(1 / np.asarray(twenty.input_scale) ** 2 - 1, expected**2, rtol=0.04)


@pytest.mark.parametrize("name", ["euler", "dpm++", "dpm++_sde", "dpm++_2s", "heun", "lcm", "tcd", "ddpm"])
def test_timesteps_may_be_listed(name):
    listed = [999, 749, 499, 249]
    class_name = next(cls for cls, (own, _) in CLASSES.items() if own == NAMES[name][0])
    given = {"algorithm_type": "sde-dpmsolver++"} if name == "dpm++_sde" else {}
    reference = getattr(diffusers, class_name)(**SD, **given, **(PLAIN if name in ("ddpm", "lcm", "tcd") else {}))
    reference.set_timesteps(timesteps=listed)
    solver = solver_from_config(SD | PLAIN, 4, name=name, spacing=listed)
    assert_same_trajectory(solver, reference, None, precise=hasattr(reference, "sigmas"))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["euler_a", "unipc", "pndm", "dpm++"])
def test_a_spacing_that_is_asked_for_replaces_that_of_the_file(spacing, name):
    file = SD | {"timestep_spacing": "leading", "steps_offset": 1, "skip_prk_steps": True}
    class_name = next(cls for cls, (own, _) in CLASSES.items() if own == name)
    reference = getattr(diffusers, class_name).from_config(file | {"timestep_spacing": spacing})
    solver = solver_from_config(file, 5, name=name, spacing=spacing)
    assert_same_trajectory(solver, reference, 5, precise=hasattr(reference, "sigmas"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ddim", "sigmas": "karras"}, "sigmas=karras applies to deis, dpm.*, not to ddim"),
        ({"name": "euler", "sigmas": "cosine"}, "sigmas must be one of karras, exponential, beta, ays, ays_sdxl, got"),
        ({"name": "euler_a", "eta": 0.0}, r"eta=0\.0 applies to ddim and tcd only, euler_a draws as much noise as it"),
        ({"name": "tcd", "eta": 1.5}, r"tcd: gamma must lie in \[0, 1\], got 1\.5"),
        ({"name": "lcm", "steps": 51}, r"steps must lie in 1 \.\. 50 \(original_inference_steps\), got 51"),
        ({"name": "lcm", "spacing": [999, 499]}, "timesteps 999, 499 for 5 steps; expected one for each step, falling"),
        ({"name": "ddim", "spacing": [4, 3, 2, 1, 0]}, "ddim and pndm step by a fixed stride and take no list"),
        ({"name": "euler", "spacing": "cosine"}, "spacing must be one of leading, trailing, linspace, got 'cosine'"),
    ],
)
def test_what_does_not_fit_together_is_refused(options, message):
    steps = options.pop("steps", 5)
    with pytest.raises(ValueError, match=message):
        solver_from_config(SD, steps, **options)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"_class_name": "DDPMScheduler"}, "clip_sample=True is not supported with ddpm"),
        ({"_class_name": "DDPMScheduler", **PLAIN, "variance_type": "learned"}, "variance_type='learned' is not"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4}, "solver_order=4 is not.*: 1 or 2 or 3"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": True}, "solver_order=True is not supported"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "algorithm_type='dpmsolver'"),
        ({"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "sde-dpmsolver++"}, "algorithm_type='sde-"),
        ({"_class_name": "UniPCMultistepScheduler", "predict_x0": False}, "predict_x0=False is not supported"),
        ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]}, r"disable_corrector=\[0\] is not"),
        ({"_class_name": "UniPCMultistepScheduler", "lower_order_final": False}, "lower_order_final=False with final"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": "50"}, "original_inference_steps='50' is not"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 0}, "original_inference_steps=0 is not supported"),
        ({"_class_name": "LCMScheduler", "timestep_scaling": -1.0}, r"timestep_scaling=-1\.0 is not supported"),
        ({"_class_name": "HeunDiscreteScheduler", "clip_sample": True}, "clip_sample=True is not supported"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": [9, 5, 1]}, r"timestep_spacing=\[9, 5, 1\] is"),
        (
            {"_class_name": "LMSDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True},
            "use_karras_sigmas and use_beta_sigmas are both true",
        ),
    ],
)
def test_fields_that_change_results_and_are_not_supported_are_refused(file, message):
    with pytest.raises(ValueError, match=message):
        solver_from_config(SD | file, 5)


def test_sigmas_that_are_asked_for_replace_those_of_the_file():
    file = SD | {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
    reference = diffusers.DPMSolverMultistepScheduler(**SD, use_exponential_sigmas=True)
    assert_same_trajectory(solver_from_config(file, 8, sigmas="exponential"), reference, 8, precise=True)


def test_every_solver_of_many_steps_is_finite():
    schedule = NoiseSchedule()
    for name in NAMES:
        solver = solver_from_config(SD, 50, name=name)
        assert all(np.isfinite(leaf).all() for leaf in vars(solver).values()), name
        assert np.asarray(solver.timesteps).max() < schedule.num_train_timesteps
