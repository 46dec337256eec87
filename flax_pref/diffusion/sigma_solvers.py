"""Solvers of `dx/dsigma = eps`: Euler, Euler ancestral, Heun and LMS.

Each function makes the table of one, from a noise schedule to a `diffusion.solvers.Solver`. Latents are
`x_0 + sigma eps`, `sigma = sqrt((1 - abar) / abar)`; primes are of the end of a step, `z` is new noise.
"""

from collections.abc import Sequence

import numpy as np

from flax_pref.diffusion.noise_levels import Levels, Spacing, euler_levels
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.solver_tables import Coefs, from_latents, solver_of
from flax_pref.diffusion.solvers import Solver


def euler(
    schedule: NoiseSchedule,
    steps: int,
    *,
    spacing: Spacing = "linspace",
    steps_offset: int = 0,
    sigmas: str | None = None,
    final_sigmas_type: str = "zero",
) -> Solver:
    """Euler's method on `dx/dsigma = eps` (arXiv:2206.00364, algorithm 1 with no noise).

    Here latents are `x = x_0 + sigma eps`; the network, which knows latents of variance one, sees
    `x / sqrt(sigma^2 + 1)`:

        x' = x + (sigma' - sigma) eps

    Args:
        schedule: that the network was trained with.
        steps: S, from 1 to the number of training timesteps.
        spacing: "leading", "trailing" or "linspace" (arXiv:2305.08891, table 2), or the timesteps.
        steps_offset: added to the timesteps of "leading" spacing.
        sigmas: other levels, one of `noise_levels.SIGMAS`; see `noise_levels.euler_levels`.
        final_sigmas_type: "zero" to end without noise, "sigma_min" with that of timestep 0.

    Raises:
        ValueError: an argument out of its range.
    """
    levels = euler_levels(
        schedule,
        steps,
        spacing=spacing,
        steps_offset=steps_offset,
        sigmas=sigmas,
        final_sigmas_type=final_sigmas_type,
    )
    return _euler_steps(schedule, levels, spacing, levels.next_sigma - levels.sigma)


def euler_ancestral(
    schedule: NoiseSchedule,
    steps: int,
    *,
    spacing: Spacing = "linspace",
    steps_offset: int = 0,
    sigmas: str | None = None,
) -> Solver:
    """Euler's method with ancestral noise: a step further down than sigma', and noise up to it.

    With `up^2 = sigma'^2 (sigma^2 - sigma'^2) / sigma^2` and `down^2 = sigma'^2 - up^2`:

        x' = x + (down - sigma) eps + up z

    Arguments, errors and latents are those of `euler`, down to sigma = 0.
    """
    levels = euler_levels(schedule, steps, spacing=spacing, steps_offset=steps_offset, sigmas=sigmas)
    up = levels.next_sigma * np.sqrt(1 - (levels.next_sigma / levels.sigma) ** 2)
    down = levels.next_sigma**2 / levels.sigma
    return _euler_steps(schedule, levels, spacing, down - levels.sigma, fresh_noise_coef=up)


def heun(
    schedule: NoiseSchedule,
    steps: int,
    *,
    spacing: Spacing = "linspace",
    steps_offset: int = 0,
    sigmas: str | None = None,
) -> Solver:
    """Heun's method on `dx/dsigma = eps` (arXiv:2206.00364, algorithm 1 with no noise), down to sigma = 0.

    A step is taken by Euler's method, then again from where it began, with the mean of the eps at both of its ends. The
    last step is Euler's, so S steps are 2 S - 1 rows. Arguments, errors and latents are those of `euler`.
    """
    levels = euler_levels(schedule, steps, spacing=spacing, steps_offset=steps_offset, sigmas=sigmas)
    change = levels.next_sigma - levels.sigma
    rows = [([change[i]], [change[i] / 2, change[i] / 2]) for i in range(steps - 1)]
    coefs = [from_latents(np.ones(2), _padded(pair, 2)) for pair in rows] + [(np.ones(1), np.array([[change[-1], 0]]))]
    # Predictions are made at the start of the first step, and twice at the start of every other one.
    at = np.repeat(np.arange(steps), [1] + [2] * (steps - 1))
    return _eps_steps(
        schedule,
        Levels(*(x[at] for x in levels)),
        spacing,
        latents_coef=np.concatenate([a for a, _ in coefs]),
        estimate_coefs=np.concatenate([b for _, b in coefs]),
    )


def lms(
    schedule: NoiseSchedule,
    steps: int,
    *,
    spacing: Spacing = "linspace",
    steps_offset: int = 0,
    sigmas: str | None = None,
) -> Solver:
    """Linear multistep of order 4 on `dx/dsigma = eps`, down to sigma = 0.

    The last four eps are interpolated by a polynomial in sigma, and that is integrated over the step. Arguments, errors
    and latents are those of `euler`.
    """
    levels = euler_levels(schedule, steps, spacing=spacing, steps_offset=steps_offset, sigmas=sigmas)
    coefs = np.zeros((steps, 4))
    for i in range(steps):
        past = levels.sigma[max(0, i - 3) : i + 1][::-1]
        coefs[i, : len(past)] = _integrals(past, levels.sigma[i], levels.next_sigma[i])
    return _eps_steps(schedule, levels, spacing, latents_coef=np.ones(steps), estimate_coefs=coefs)


def _euler_steps(
    schedule: NoiseSchedule,
    levels: Levels,
    spacing: Spacing,
    change: np.ndarray,
    *,
    fresh_noise_coef: np.ndarray | None = None,
) -> Solver:
    """`x' = x + change eps + c z`, with eps folded in: differences of large numbers are taken here, in float64."""
    scale = 1 / np.sqrt(levels.sigma**2 + 1)
    from_input, from_pred = schedule.noise_coefs(scale**2)
    # Of a velocity, eps is `scale^2 sigma x + scale v`.
    whole = scale**2 * (1 + levels.sigma * (levels.sigma + change))
    return solver_of(
        timesteps=levels.timesteps,
        input_scale=scale,
        estimate=(np.zeros_like(scale), np.ones_like(scale)),
        clean=_scaled(schedule.clean_coefs(scale**2), scale),
        latents_coef=np.where(from_input > 0, whole, 1.0),
        estimate_coefs=(change * from_pred)[:, None],
        fresh_noise_coef=fresh_noise_coef,
        init_noise_sigma=_initial_sigma(levels, spacing),
        stochastic=fresh_noise_coef is not None,
    )


def _eps_steps(
    schedule: NoiseSchedule, levels: Levels, spacing: Spacing, *, latents_coef: np.ndarray, estimate_coefs: np.ndarray
) -> Solver:
    """Steps along eps of latents `x_0 + sigma eps`."""
    scale = 1 / np.sqrt(levels.sigma**2 + 1)
    return solver_of(
        timesteps=levels.timesteps,
        input_scale=scale,
        estimate=_scaled(schedule.noise_coefs(scale**2), scale),
        clean=_scaled(schedule.clean_coefs(scale**2), scale),
        latents_coef=latents_coef,
        estimate_coefs=estimate_coefs,
        init_noise_sigma=_initial_sigma(levels, spacing),
    )


def _scaled(coefs: Coefs, scale: np.ndarray) -> Coefs:
    """Coefficients for latents of variance one, as coefficients for latents that these are `scale` times."""
    return coefs[0] * scale, coefs[1]


def _initial_sigma(levels: Levels, spacing: Spacing) -> float:
    """As in diffusers: pure noise where sampling starts at the last timestep, noise and unit signal elsewhere."""
    return float(np.sqrt(levels.sigma[0] ** 2 + 1) if spacing == "leading" else levels.sigma[0])


def _integrals(nodes: np.ndarray, start: float, end: float) -> np.ndarray:
    """Integrals from start to end of the Lagrange polynomials of some nodes, `[K]`."""
    polynomials = []
    for k, node in enumerate(nodes):
        others = np.delete(nodes, k)
        # Around the start: powers of large numbers would cancel.
        polynomial = np.poly1d(others - start, r=True) / np.prod(node - others)
        integral = polynomial.integ()
        polynomials.append(integral(end - start) - integral(0.0))
    return np.array(polynomials)


def _padded(rows: Sequence[Sequence[float]], length: int) -> np.ndarray:
    """Rows filled up with zeros."""
    return np.array([[*row, *[0.0] * (length - len(row))] for row in rows])
