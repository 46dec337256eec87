"""Timesteps and noise levels that a solver visits: how they are spaced, float64 and the largest first.

A noise level is `sigma = sqrt((1 - abar) / abar)`, the noise in `x_0 + sigma eps`. Solvers come in two kinds that place
them differently, as their classes in diffusers do: see `euler_levels` and `dpm_levels`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flax_pref.diffusion.schedule import NoiseSchedule

SPACINGS = ("leading", "trailing", "linspace")
Spacing = str | Sequence[int]
"""One of `SPACINGS` (arXiv:2305.08891, table 2), or the timesteps themselves."""

# Align Your Steps (arXiv:2404.14507), the timesteps that its authors published for ten steps; the last one is where
# their tables end before the clean image.
AYS_TIMESTEPS = {
    "ays": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "ays_sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
}
SIGMAS = ("karras", "exponential", "beta", *AYS_TIMESTEPS)


class Levels(NamedTuple):
    """What S steps visit.

    Attributes:
        timesteps: what the network is told, `[S]`.
        sigma: noise levels at the start of the steps, `[S]`.
        next_sigma: at their ends, `[S]`.
    """

    timesteps: np.ndarray
    sigma: np.ndarray
    next_sigma: np.ndarray


def spaced_timesteps(
    schedule: NoiseSchedule, steps: int, spacing: Spacing, steps_offset: int = 0, *, leave_out_last: bool = False
) -> np.ndarray:
    """Descending timesteps float64 `[steps]` (arXiv:2305.08891, table 2), to the last bit as in diffusers.

    Args:
        schedule: that the network was trained with.
        steps: S.
        spacing: see `Spacing`.
        steps_offset: added to the timesteps of "leading" spacing.
        leave_out_last: whether "leading" and "linspace" are laid out over one step more, whose timestep is left out.

    Raises:
        ValueError: the schedule has not so many timesteps, or there is no such spacing.
    """
    last = schedule.num_train_timesteps
    if not isinstance(spacing, str):
        return _listed_timesteps(last, steps, spacing)
    extra = int(leave_out_last and spacing != "trailing")
    if not 1 <= steps <= last - extra:
        raise ValueError(f"solver: steps must lie in 1 .. {last - extra} (num_train_timesteps={last}), got {steps}")
    points = steps + extra
    if spacing == "leading":
        timesteps = np.arange(points)[::-1] * (last // points) + steps_offset
    elif spacing == "trailing":
        timesteps = np.arange(last, 0, -last / points).round() - 1
    elif spacing == "linspace":
        timesteps = np.linspace(0, last - 1, points)[::-1]
    else:
        raise ValueError(f"solver: spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    timesteps = timesteps[:steps]
    if timesteps[-1] < 0 or timesteps[0] >= last:
        raise ValueError(
            f"solver: {steps} steps with steps_offset={steps_offset} visit {timesteps[-1]:g} .. {timesteps[0]:g}, "
            f"outside the trained 0 .. {last - 1}; take fewer steps or another offset"
        )
    return timesteps.astype(np.float64)


def _listed_timesteps(last: int, steps: int, listed: Sequence[int]) -> np.ndarray:
    """Timesteps that a user lists, checked."""
    timesteps = np.asarray(listed, np.float64)
    if len(timesteps) != steps or (np.diff(timesteps) >= 0).any() or timesteps[0] >= last or timesteps[-1] < 0:
        raise ValueError(
            f"solver: timesteps {', '.join(map(str, listed))} for {steps} steps; expected one for each step, falling, "
            f"from 0 to {last - 1}"
        )
    return timesteps


def distilled_timesteps(schedule: NoiseSchedule, steps: int, original_inference_steps: int) -> np.ndarray:
    """Timesteps of consistency models (arXiv:2310.04378, section 5.1): some of those that the teacher's solver took.

    Args:
        schedule: that the network was trained with.
        steps: S, up to original_inference_steps.
        original_inference_steps: steps of the teacher's solver, of equal length.

    Returns:
        float64 `[S]`.

    Raises:
        ValueError: an argument out of its range.
    """
    last = schedule.num_train_timesteps
    if not 1 <= original_inference_steps <= last:
        raise ValueError(
            f"solver: original_inference_steps={original_inference_steps} is not supported; supported: 1 to {last}"
        )
    if not 1 <= steps <= original_inference_steps:
        raise ValueError(
            f"solver: steps must lie in 1 .. {original_inference_steps} (original_inference_steps), got {steps}"
        )
    originals = np.arange(original_inference_steps, 0, -1) * (last // original_inference_steps) - 1
    chosen = np.floor(np.linspace(0, len(originals), steps, endpoint=False)).astype(int)
    return originals[chosen].astype(np.float64)


def trained_sigmas(schedule: NoiseSchedule) -> np.ndarray:
    """Noise levels of the training timesteps, float64 `[T]`, rising and finite."""
    # diffusers has the betas in float32. With Karras sigmas a timestep may lie so close to one half (18 steps of
    # Stable Diffusion visit 575.5) that this decides which way it is rounded.
    abar = np.cumprod(1 - schedule.betas.astype(np.float32), dtype=np.float64)
    if schedule.rescale_betas_zero_snr:
        abar[-1] = 2.0**-24  # of diffusers: the last level, 4096, stands for infinity
    return np.sqrt(1 / abar - 1)


def euler_levels(
    schedule: NoiseSchedule,
    steps: int,
    *,
    spacing: Spacing,
    steps_offset: int,
    sigmas: str | None,
    final_sigmas_type: str = "zero",
) -> Levels:
    """Levels of Euler, Heun and LMS.

    The timesteps need not be whole numbers. Spaced sigmas go from the first to the last level of the timesteps.

    Args:
        schedule: that the network was trained with.
        steps: S.
        spacing: see `Spacing`.
        steps_offset: added to the timesteps of "leading" spacing.
        sigmas: one of `SIGMAS`; None: those of the timesteps.
        final_sigmas_type: "zero" to end without noise, "sigma_min" with that of timestep 0.

    Raises:
        ValueError: an argument out of its range.
    """
    trained = trained_sigmas(schedule)
    timesteps = spaced_timesteps(schedule, steps, spacing, steps_offset)
    sigma = np.interp(timesteps, np.arange(len(trained)), trained)
    if sigmas in AYS_TIMESTEPS:
        timesteps, sigma = _align_your_steps(trained, steps, sigmas)
    elif sigmas is not None:
        sigma = _respaced(sigmas, sigma[0], sigma[-1], steps)
        timesteps = _timesteps_of(sigma, trained)
    return Levels(timesteps, sigma, np.append(sigma[1:], _final_sigma(trained, final_sigmas_type)))


def dpm_levels(
    schedule: NoiseSchedule,
    steps: int,
    *,
    spacing: Spacing,
    steps_offset: int,
    sigmas: str | None,
    final_sigmas_type: str,
) -> Levels:
    """Levels of DPM-Solver++, UniPC and DEIS; arguments as in `euler_levels`.

    The timesteps are whole numbers, and "leading" and "linspace" leave out their last point, which would be the first
    training timestep. Spaced sigmas go from the largest to the smallest trained one, whatever the spacing.
    """
    trained = trained_sigmas(schedule)
    timesteps = spaced_timesteps(schedule, steps, spacing, steps_offset, leave_out_last=True).round()
    sigma = trained[timesteps.astype(int)]
    if sigmas in AYS_TIMESTEPS:
        timesteps, sigma = _align_your_steps(trained, steps, sigmas)
        timesteps = timesteps.round()
    elif sigmas is not None:
        # diffusers rounds Karras timesteps and cuts the others off. The first one is a whole number up to rounding
        # errors, so that levels in float32, as in diffusers, decide what it is.
        rounded = trained.astype(np.float32)
        sigma = _respaced(sigmas, float(rounded[-1]), float(rounded[0]), steps)
        timesteps = _timesteps_of(sigma, rounded)
        timesteps = timesteps.round() if sigmas == "karras" else np.floor(timesteps)
    return Levels(timesteps, sigma, np.append(sigma[1:], _final_sigma(trained, final_sigmas_type)))


def _final_sigma(trained: np.ndarray, final_sigmas_type: str) -> float:
    """Where the last step ends."""
    if final_sigmas_type not in ("zero", "sigma_min"):
        raise ValueError(
            f"solver: final_sigmas_type={final_sigmas_type!r} is not supported; supported: 'zero' or 'sigma_min'"
        )
    return 0.0 if final_sigmas_type == "zero" else trained[0]


def _respaced(sigmas: str, largest: float, smallest: float, steps: int) -> np.ndarray:
    """Levels from the largest to the smallest, `[S]`."""
    ramp = np.linspace(0, 1, steps)
    if sigmas == "karras":  # evenly after the seventh root (arXiv:2206.00364, equation 5)
        return largest * (1 + ramp * ((smallest / largest) ** (1 / 7) - 1)) ** 7
    if sigmas == "exponential":  # evenly in the logarithm
        return largest * (smallest / largest) ** ramp
    if sigmas == "beta":  # quantiles of Beta(0.6, 0.6) (arXiv:2407.12173)
        from scipy.stats import beta  # slow to import

        return smallest + (largest - smallest) * beta.ppf(1 - ramp, 0.6, 0.6)
    raise ValueError(f"solver: sigmas must be one of {', '.join(SIGMAS)}, got {sigmas!r}")


def _align_your_steps(trained: np.ndarray, steps: int, table: str) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and levels of a table of ten steps; other numbers of steps lie between them, linear in log(sigma)."""
    timesteps = np.array(AYS_TIMESTEPS[table]) * (len(trained) - 1) // 999
    if steps == len(timesteps) - 1:
        return timesteps[:-1].astype(np.float64), trained[timesteps[:-1]]
    places = np.linspace(0, len(timesteps) - 1, steps + 1)[:-1]
    sigma = np.exp(np.interp(places, np.arange(len(timesteps)), np.log(trained[timesteps])))
    return _timesteps_of(sigma, trained), sigma


def _timesteps_of(sigma: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """The timesteps with these levels, fractional: linear in log(sigma) between the trained ones, as in diffusers."""
    return np.interp(np.log(sigma), np.log(trained), np.arange(len(trained)))
