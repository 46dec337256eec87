"""Solvers that step from one training timestep to another: DDIM, DDPM, LCM, TCD and PNDM.

Each function makes the table of one, from a noise schedule to a `diffusion.solvers.Solver`. Notation: `abar` is the
share of the signal at a timestep, primes are of the end of a step, `z` is new noise.
"""

import numpy as np

from flax_pref.diffusion.noise_levels import Spacing, distilled_timesteps, spaced_timesteps
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.solver_tables import from_latents, solver_of
from flax_pref.diffusion.solvers import Solver


def ddim(
    schedule: NoiseSchedule,
    steps: int,
    *,
    eta: float = 0.0,
    spacing: Spacing = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
) -> Solver:
    """DDIM (arXiv:2010.02502, equations 12 and 16).

    With `abar'` at the timestep stepped to, `x_0 = (x - sqrt(1 - abar) eps) / sqrt(abar)` and
    `sigma = eta sqrt((1 - abar') / (1 - abar)) sqrt(1 - abar / abar')`:

        x' = sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) eps + sigma z

    Args:
        schedule: that the network was trained with.
        steps: S, from 1 to the number of training timesteps.
        eta: 0 is deterministic, 1 is ancestral sampling (DDPM).
        spacing: "leading", "trailing" or "linspace" (arXiv:2305.08891, table 2).
        steps_offset: added to the timesteps of "leading" spacing.
        set_alpha_to_one: whether the last step ends without noise, or with that of timestep 0.

    Raises:
        ValueError: an argument out of its range.
    """
    _check_share("ddim", eta=eta)
    timesteps = _evenlyspaced_timesteps(schedule, steps, spacing, steps_offset)
    # A whole stride below each timestep, whatever the spacing: so diffusers defines it, and its images depend on it.
    next_abar = _abar(schedule, timesteps - schedule.num_train_timesteps // steps, set_alpha_to_one)
    abar = schedule.alphas_cumprod[timesteps]
    sigma = eta * np.sqrt((1 - next_abar) / (1 - abar) * (1 - abar / next_abar))
    return _one_step(
        schedule,
        timesteps,
        abar,
        clean_coef=np.sqrt(next_abar),
        noise_coef=np.sqrt(1 - next_abar - sigma**2),
        fresh_noise_coef=sigma,
        stochastic=eta > 0,
    )


def ddpm(
    schedule: NoiseSchedule,
    steps: int,
    *,
    spacing: Spacing = "leading",
    steps_offset: int = 0,
    variance_type: str = "fixed_small",
) -> Solver:
    """Ancestral sampling (arXiv:2006.11239, equations 6 and 7), from each timestep to the next one visited.

    With `beta = 1 - abar / abar'`:

        x' = sqrt(abar') beta / (1 - abar) x_0 + sqrt(abar / abar') (1 - abar') / (1 - abar) x + c z

    Args:
        schedule: that the network was trained with.
        steps: S, from 1 to the number of training timesteps.
        spacing: "leading", "trailing" or "linspace" (arXiv:2305.08891, table 2), or the timesteps.
        steps_offset: added to the timesteps of "leading" spacing.
        variance_type: "fixed_small" or "fixed_small_log": `c^2 = (1 - abar') / (1 - abar) beta`; "fixed_large":
            `c^2 = beta`, but 0 in a step from timestep 0.

    Raises:
        ValueError: an argument out of its range.
    """
    timesteps = spaced_timesteps(schedule, steps, spacing, steps_offset).round().astype(int)
    abar = schedule.alphas_cumprod[timesteps]
    next_abar = np.append(abar[1:], 1.0)
    beta = 1 - abar / next_abar
    variance = beta * (timesteps > 0) if variance_type == "fixed_large" else (1 - next_abar) / (1 - abar) * beta
    return _one_step(
        schedule,
        timesteps,
        abar,
        clean_coef=np.sqrt(next_abar) * beta / (1 - abar),
        latents_coef=np.sqrt(abar / next_abar) * (1 - next_abar) / (1 - abar),
        fresh_noise_coef=np.sqrt(variance),
        stochastic=True,
    )


def lcm(
    schedule: NoiseSchedule,
    steps: int,
    *,
    spacing: Spacing = "distilled",
    original_inference_steps: int = 50,
    timestep_scaling: float = 10.0,
) -> Solver:
    """Sampling of consistency models (arXiv:2310.04378, algorithm 3): to the clean latents, and new noise on them.

        clean = c_out x_0 + c_skip x,   x' = sqrt(abar') clean + sqrt(1 - abar') z

    With `s = timestep_scaling t`, `c_skip = 0.25 / (s^2 + 0.25)` and `c_out = s / sqrt(s^2 + 0.25)`. The last step ends
    in the clean latents.

    Args:
        schedule: that the network was trained with.
        steps: S, up to original_inference_steps.
        spacing: "distilled" for the timesteps of `distilled_timesteps`, else as of `ddpm`.
        original_inference_steps: steps of the solver that the model was distilled from.
        timestep_scaling: factor of the timestep in c_skip and c_out.

    Raises:
        ValueError: an argument out of its range.
    """
    timesteps = _distilled(schedule, steps, spacing, original_inference_steps)
    abar = schedule.alphas_cumprod[timesteps]
    next_abar = np.append(abar[1:], 1.0)
    scaled = timesteps * timestep_scaling
    return _one_step(
        schedule,
        timesteps,
        abar,
        clean_coef=np.sqrt(next_abar) * scaled / np.sqrt(scaled**2 + 0.25),
        latents_coef=np.sqrt(next_abar) * 0.25 / (scaled**2 + 0.25),
        fresh_noise_coef=np.sqrt(1 - next_abar),
        stochastic=True,
    )


def tcd(
    schedule: NoiseSchedule,
    steps: int,
    *,
    gamma: float = 0.3,
    spacing: Spacing = "distilled",
    original_inference_steps: int = 50,
) -> Solver:
    """Trajectory consistency sampling (arXiv:2402.19159, algorithm 4): past the next timestep, and noise on that.

    With `abar_s` at timestep `floor((1 - gamma) t')`:

        x' = sqrt(abar' / abar_s) (sqrt(abar_s) x_0 + sqrt(1 - abar_s) eps) + sqrt(1 - abar' / abar_s) z

    The last step ends with the noise of timestep 0.

    Args:
        schedule: that the network was trained with.
        steps: S, up to original_inference_steps.
        gamma: 0 is deterministic, 1 redraws all noise in each step.
        spacing: "distilled" for the timesteps of `distilled_timesteps`, else as of `ddpm`.
        original_inference_steps: steps of the solver that the model was distilled from.

    Raises:
        ValueError: an argument out of its range.
    """
    _check_share("tcd", gamma=gamma)
    timesteps = _distilled(schedule, steps, spacing, original_inference_steps)
    next_timesteps = np.append(timesteps[1:], 0)
    # In float32, as in diffusers: the product may be a whole number up to rounding.
    past = np.floor(np.float32(1 - gamma) * next_timesteps.astype(np.float32)).astype(int)
    abar, next_abar, past_abar = (schedule.alphas_cumprod[t] for t in (timesteps, next_timesteps, past))
    return _one_step(
        schedule,
        timesteps,
        abar,
        clean_coef=np.sqrt(next_abar),
        noise_coef=np.sqrt(next_abar / past_abar) * np.sqrt(1 - past_abar),
        fresh_noise_coef=np.sqrt(1 - next_abar / past_abar),
        stochastic=gamma > 0,
    )


# Of the estimates at one row of PNDM, latest first. The second row predicts at the point that the first row reached,
# only to take the first step once more; no later row uses that prediction again, which is why columns are skipped.
PNDM_WEIGHTS = np.array(
    [
        [1, 0, 0, 0, 0],
        [1 / 2, 1 / 2, 0, 0, 0],
        [3 / 2, 0, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 0, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, 0, -9 / 24],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24, 0],
    ]
)


def pndm(
    schedule: NoiseSchedule,
    steps: int,
    *,
    spacing: Spacing = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = False,
) -> Solver:
    """PNDM as Stable Diffusion 1.5 ships it: linear multistep (arXiv:2202.09778, equations 9 and 12), no Runge-Kutta.

    A step is that of `ddim` with eta = 0 whose eps is a combination of the last four predictions, in the manner of
    Adams and Bashforth. The first step is taken twice, the second time with the mean of the predictions at both of its
    ends, so S steps are S + 1 rows.

    Args:
        schedule: that the network was trained with.
        steps: S, from 1 to the number of training timesteps.
        spacing: "leading", "trailing" or "linspace" (arXiv:2305.08891, table 2).
        steps_offset: added to the timesteps of "leading" spacing.
        set_alpha_to_one: whether the last step ends without noise, or with that of timestep 0.

    Raises:
        ValueError: an argument out of its range.
    """
    timesteps = _evenlyspaced_timesteps(schedule, steps, spacing, steps_offset)
    timesteps = np.insert(timesteps, 1, timesteps[1:2])
    stride = schedule.num_train_timesteps // steps
    start = timesteps.copy()
    start[1:2] += stride
    next_abar = _abar(schedule, start - stride, set_alpha_to_one)
    abar = schedule.alphas_cumprod[start]

    # Predictions are combined as they are, and a velocity is turned into noise after that: so does diffusers.
    clean, noise = schedule.clean_coefs(abar), schedule.noise_coefs(abar)
    latents_coef, pred_coef = (
        np.sqrt(next_abar) * of_clean + np.sqrt(1 - next_abar) * of_noise
        for of_clean, of_noise in zip(clean, noise, strict=True)
    )
    pred_coefs = pred_coef[:, None] * PNDM_WEIGHTS[np.minimum(np.arange(len(start)), 5)]
    if steps > 1:
        latents_coef[:2], pred_coefs[:2] = from_latents(latents_coef[:2], pred_coefs[:2])
    return solver_of(
        timesteps=timesteps,
        estimate=(np.zeros(len(start)), np.ones(len(start))),
        clean=schedule.clean_coefs(schedule.alphas_cumprod[timesteps]),
        latents_coef=latents_coef,
        estimate_coefs=pred_coefs,
    )


def _one_step(
    schedule: NoiseSchedule,
    timesteps: np.ndarray,
    abar: np.ndarray,
    *,
    clean_coef: np.ndarray,
    fresh_noise_coef: np.ndarray,
    stochastic: bool,
    noise_coef: np.ndarray | float = 0.0,
    latents_coef: np.ndarray | float = 0.0,
) -> Solver:
    """Steps that stand alone, of a sum of x_0, eps, x and new noise; without signal none divides by zero."""
    clean, noise = schedule.clean_coefs(abar), schedule.noise_coefs(abar)
    return solver_of(
        timesteps=timesteps,
        estimate=(np.zeros(len(timesteps)), np.ones(len(timesteps))),
        clean=clean,
        latents_coef=clean_coef * clean[0] + noise_coef * noise[0] + latents_coef,
        estimate_coefs=(clean_coef * clean[1] + noise_coef * noise[1])[:, None],
        fresh_noise_coef=fresh_noise_coef,
        stochastic=stochastic,
    )


def _evenlyspaced_timesteps(schedule: NoiseSchedule, steps: int, spacing: Spacing, steps_offset: int) -> np.ndarray:
    """Timesteps of solvers that step a whole stride down, integers `[S]`."""
    if not isinstance(spacing, str):
        raise ValueError(
            "solver: ddim and pndm step by a fixed stride and take no list of timesteps; take lcm or euler"
        )
    return spaced_timesteps(schedule, steps, spacing, steps_offset).round().astype(int)


def _distilled(schedule: NoiseSchedule, steps: int, spacing: Spacing, original_inference_steps: int) -> np.ndarray:
    """Timesteps of consistency models, integers `[S]`."""
    if spacing == "distilled":
        return distilled_timesteps(schedule, steps, original_inference_steps).astype(int)
    return spaced_timesteps(schedule, steps, spacing).round().astype(int)


def _abar(schedule: NoiseSchedule, timesteps: np.ndarray, set_alpha_to_one: bool) -> np.ndarray:
    """`abar` at the timesteps stepped to; below 0 the images are done, with `abar` 1 or that of timestep 0."""
    final = 1.0 if set_alpha_to_one else schedule.alphas_cumprod[0]
    return np.where(timesteps >= 0, schedule.alphas_cumprod[np.maximum(timesteps, 0)], final)


def _check_share(solver: str, **shares: float) -> None:
    """That arguments lie in [0, 1]."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{solver}: {name} must lie in [0, 1], got {value}")
