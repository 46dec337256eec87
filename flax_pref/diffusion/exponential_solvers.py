"""Solvers that integrate the linear part of the equation exactly: DPM-Solver++, UniPC and DEIS.

Each function makes the table of one, from a noise schedule to a `diffusion.solvers.Solver`. Latents have variance one;
`sigma = sqrt((1 - abar) / abar)` is the noise level, `alpha = 1 / sqrt(sigma^2 + 1)`; primes are of the end of a step,
`z` is new noise.
"""

import numpy as np

from flax_pref.diffusion.noise_levels import Levels, Spacing, dpm_levels
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.solver_tables import from_latents, solver_of
from flax_pref.diffusion.solvers import Solver


def dpmpp(
    schedule: NoiseSchedule,
    steps: int,
    *,
    order: int = 2,
    sde: bool = False,
    solver_type: str = "midpoint",
    spacing: Spacing = "linspace",
    steps_offset: int = 0,
    sigmas: str | None = None,
    final_sigmas_type: str = "zero",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Solver:
    """DPM-Solver++ multistep: 1, 2M and 3M (arXiv:2211.01095, algorithm 2 and appendix), and their SDE forms.

    With `h = log(sigma / sigma')`, `E = exp(-h)` (of the SDE: `exp(-2 h)`), x_0 what a prediction says of the clean
    latents, `D1` and `D2` its first two differences over the steps before, in units of h:

        x' = (alpha' sigma') / (alpha sigma) x + alpha' ((1 - E) x_0 + f1 D1 + f2 D2)

    The latents of the SDE count exp(-h) times, and noise `alpha' sigma' sqrt(1 - E) z` is added. The first step, and
    the last where the arguments below say so, is of first order, the second and the last but one of second order.

    Args:
        schedule: that the network was trained with.
        steps: S, from 1 to the number of training timesteps; one less unless the spacing is "trailing".
        order: 1 to 3.
        sde: whether noise is drawn in each step.
        solver_type: "midpoint" or "heun": f1 of second order.
        spacing: "leading", "trailing" or "linspace" (arXiv:2305.08891, table 2), or the timesteps; without their last
            point where that would be the first training timestep.
        steps_offset: added to the timesteps of "leading" spacing.
        sigmas: other levels, one of `noise_levels.SIGMAS`; see `noise_levels.dpm_levels`.
        final_sigmas_type: "zero" to end without noise, the last step being of first order; "sigma_min" to end with
            that of timestep 0.
        lower_order_final: whether the last of fewer than 15 steps is of first order.
        euler_at_final: whether the last step is of first order.

    Raises:
        ValueError: an argument out of its range.
    """
    levels = dpm_levels(
        schedule, steps, spacing=spacing, steps_offset=steps_offset, sigmas=sigmas, final_sigmas_type=final_sigmas_type
    )
    few = lower_order_final and steps < 15
    orders = np.minimum(np.arange(1, steps + 1), order)
    if few:
        orders[-2:] = np.minimum(orders[-2:], 2)
    if few or euler_at_final or final_sigmas_type == "zero":
        orders[-1] = 1
    coefs = np.zeros((steps, order))
    for i, own in enumerate(orders):
        coefs[i, :own] = _dpm_weights(levels.sigma[i - own + 1 : i + 1][::-1], levels.next_sigma[i], sde, solver_type)
    return _clean_steps(schedule, levels, coefs, sde=sde)


def _dpm_weights(sigma: np.ndarray, next_sigma: float, sde: bool, solver_type: str) -> np.ndarray:
    """Weights of x_0 at this step and at those before, whose levels are given, in `x' / alpha'`."""
    k = 1 + sde
    share = (next_sigma / sigma[0]) ** k  # E
    weights = np.zeros(len(sigma))
    weights[0] = 1 - share
    if len(sigma) == 1 or next_sigma == sigma[0]:
        return weights
    h = np.log(sigma[0] / next_sigma)
    ratios = np.log(sigma[1:] / sigma[:-1]) / h  # of the lengths of the steps before to this one's
    first = 1 - (1 - share) / (k * h)
    if len(sigma) == 2:
        factor = (1 - share) / 2 if solver_type == "midpoint" else first
        return weights + factor / ratios[0] * np.array([1, -1])
    # The sign of 1/2 makes this factor vanish with h; diffusers has the other sign where noise is drawn.
    second = (1 - share - k * h) / (k * h) ** 2 + 1 / 2
    slopes = np.array([[1, -1, 0], [0, 1, -1]]) / ratios[:, None]
    curvature = (slopes[0] - slopes[1]) / ratios.sum()
    return weights + first * (slopes[0] + ratios[0] * curvature) + second * curvature


def dpmpp_single(
    schedule: NoiseSchedule,
    steps: int,
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    spacing: Spacing = "linspace",
    sigmas: str | None = None,
    final_sigmas_type: str = "zero",
    lower_order_final: bool = False,
) -> Solver:
    """DPM-Solver++ singlestep: 2S and 3S (arXiv:2211.01095, algorithm 1 and appendix).

    Steps come in groups as long as the order: the second and third row of a group start again where the first one did,
    with the x_0 of the rows before. S counts rows, that is, predictions.

    Args:
        schedule: that the network was trained with.
        steps: S, from 1 to the number of training timesteps; one less unless the spacing is "trailing".
        order: 1 to 3.
        solver_type: "midpoint" or "heun": the difference that second and third order take.
        spacing: as of `dpmpp`.
        sigmas: as of `dpmpp`.
        final_sigmas_type: as of `dpmpp`.
        lower_order_final: whether the last row is of first order; so it is where final_sigmas_type is "zero" or the
            rows do not make whole groups. Two rows that a group of three leaves over are of orders 1 and 2.

    Raises:
        ValueError: an argument out of its range.
    """
    levels = dpm_levels(
        schedule, steps, spacing=spacing, steps_offset=0, sigmas=sigmas, final_sigmas_type=final_sigmas_type
    )
    orders = np.arange(steps) % order + 1
    lower = (lower_order_final or steps % order) and (order, steps % order) != (3, 2)
    if lower or final_sigmas_type == "zero":
        orders[-1] = 1
    sigma, next_sigma = levels.sigma, levels.next_sigma
    alpha, next_alpha = (1 / np.sqrt(level**2 + 1) for level in (sigma, next_sigma))
    latents_coef, coefs = np.zeros(steps), np.zeros((steps, order))
    for i, own in enumerate(orders):
        begin = i - own + 1
        latents_coef[i] = next_alpha[i] * next_sigma[i] / (alpha[begin] * sigma[begin])
        weights = _single_step_weights(sigma[begin : i + 1], next_sigma[i], solver_type)
        coefs[i, :own] = next_alpha[i] * weights[::-1]
    # In terms of what the row before left, and not of where the group begins.
    for i in np.flatnonzero(orders > 1)[::-1]:
        latents_coef[i - 1 : i + 1], coefs[i - 1 : i + 1] = from_latents(
            latents_coef[i - 1 : i + 1], coefs[i - 1 : i + 1]
        )
    return _clean_steps(schedule, levels, coefs, latents_coef=latents_coef)


def _single_step_weights(sigma: np.ndarray, next_sigma: float, solver_type: str) -> np.ndarray:
    """Weights of x_0 at the rows of a group so far, whose levels are given, in `x' / alpha'`."""
    share = next_sigma / sigma[0]
    weights = np.zeros(len(sigma))
    weights[0] = 1 - share
    if len(sigma) == 1 or next_sigma == sigma[0]:
        return weights
    h = np.log(sigma[0] / next_sigma)
    first, second = 1 - (1 - share) / h, (1 - share - h) / h**2 + 1 / 2
    places = np.log(sigma[0] / sigma[1:]) / h
    slopes = (np.eye(len(sigma))[1:] - np.eye(len(sigma))[0]) / places[:, None]
    if len(sigma) == 2:
        return weights + ((1 - share) / 2 if solver_type == "midpoint" else first) * slopes[0]
    if solver_type == "midpoint":
        return weights + first * slopes[1]
    near, far = places
    slope = (far * slopes[0] - near * slopes[1]) / (far - near)
    return weights + first * slope + second * 2 * (slopes[1] - slopes[0]) / (far - near)


def unipc(
    schedule: NoiseSchedule,
    steps: int,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    spacing: Spacing = "linspace",
    steps_offset: int = 0,
    sigmas: str | None = None,
    final_sigmas_type: str = "zero",
    lower_order_final: bool = True,
) -> Solver:
    """UniPC (arXiv:2302.04867, algorithms 1 and 2): each step is taken, and corrected by what is predicted at its end.

    The correction needs no prediction of its own: row i corrects the step before it and takes the next one.

    Args:
        schedule: that the network was trained with.
        steps: S, from 1 to the number of training timesteps; one less unless the spacing is "trailing".
        order: 1 to 3.
        solver_type: "bh1" or "bh2": B(h) is h, or exp(h) - 1.
        spacing: as of `dpmpp`.
        steps_offset: as of `dpmpp`.
        sigmas: as of `dpmpp`.
        final_sigmas_type: as of `dpmpp`.
        lower_order_final: whether the order falls to 1 at the end.

    Raises:
        ValueError: an argument out of its range.
    """
    if final_sigmas_type == "zero" and not lower_order_final:
        raise ValueError(
            "unipc: lower_order_final=False with final_sigmas_type='zero' is not supported, the last step has no "
            "end; supported: lower_order_final=True"
        )
    levels = dpm_levels(
        schedule, steps, spacing=spacing, steps_offset=steps_offset, sigmas=sigmas, final_sigmas_type=final_sigmas_type
    )
    sigma, next_sigma = levels.sigma, levels.next_sigma
    alpha, next_alpha = (1 / np.sqrt(level**2 + 1) for level in (sigma, next_sigma))
    kept = next_alpha * next_sigma / (alpha * sigma)
    orders = np.minimum(np.arange(1, steps + 1), order)
    if lower_order_final:
        orders = np.minimum(orders, np.arange(steps, 0, -1))
    latents_coef, coefs = kept.copy(), np.zeros((steps, order + 1))
    for i, own in enumerate(orders):
        nodes = sigma[i - own + 1 : i + 1][::-1]
        coefs[i, :own] = next_alpha[i] * _unipc_weights(nodes, next_sigma[i], solver_type, corrects=False)
    predictors = coefs.copy()
    for i in range(1, steps):
        # From x = kept X + ... to the corrected latents, kept X + ..., and from there on.
        own = orders[i - 1]
        nodes = sigma[i - own : i][::-1]
        corrector = alpha[i] * _unipc_weights(nodes, sigma[i], solver_type, corrects=True)
        shift = np.zeros(order + 1)
        shift[: own + 1] = corrector
        shift[1:] -= predictors[i - 1, :-1]
        coefs[i] += kept[i] * shift
    return _clean_steps(schedule, levels, coefs, latents_coef=latents_coef)


def _unipc_weights(sigma: np.ndarray, next_sigma: float, solver_type: str, *, corrects: bool) -> np.ndarray:
    """Weights of x_0 at the start of a step and before, whose levels are given, in `x' / alpha'`.

    A correction has the weight at the end of the step before these.
    """
    share = next_sigma / sigma[0]
    own = len(sigma)
    weights = np.zeros(own + corrects)
    here = int(corrects)  # place of the start of the step
    weights[here] = 1 - share
    if (own == 1 and not corrects) or next_sigma == sigma[0]:
        return weights
    h = np.log(sigma[0] / next_sigma)
    ends = np.append(np.log(sigma[0] / sigma[1:]) / h, 1.0)  # where the other x_0 are, in units of h
    scale = -h if solver_type == "bh1" else share - 1  # B(h)
    phi, factorial, right = (share - 1) / -h - 1, 1, []
    for k in range(1, own + 1):
        right.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    matrix = ends[None, :] ** np.arange(own)[:, None]
    if corrects:
        rho = np.array([0.5]) if own == 1 else np.linalg.solve(matrix, right)
    else:
        rho = np.array([0.5]) if own == 2 else np.linalg.solve(matrix[:-1, :-1], right[:-1])
    slopes = -scale * rho / ends[: len(rho)]
    if corrects:
        weights[0] += slopes[-1]
    weights[here + 1 :] += slopes[: own - 1]
    weights[here] -= slopes.sum()
    return weights


def deis(
    schedule: NoiseSchedule,
    steps: int,
    *,
    order: int = 2,
    spacing: Spacing = "linspace",
    steps_offset: int = 0,
    sigmas: str | None = None,
    lower_order_final: bool = True,
) -> Solver:
    """DEIS with polynomials in log(sigma) (arXiv:2204.13902, equation 15), down to the noise of timestep 0.

    The last eps are interpolated by a polynomial in log(sigma), and that is integrated over sigma:

        x' / alpha' = x / alpha + sum_k b_k eps_k

    Arguments and errors are those of `dpmpp`.
    """
    levels = dpm_levels(
        schedule, steps, spacing=spacing, steps_offset=steps_offset, sigmas=sigmas, final_sigmas_type="sigma_min"
    )
    orders = np.minimum(np.arange(1, steps + 1), order)
    if lower_order_final and steps < 15:
        orders = np.minimum(orders, np.arange(steps, 0, -1))
    alpha, next_alpha = (1 / np.sqrt(level**2 + 1) for level in (levels.sigma, levels.next_sigma))
    coefs = np.zeros((steps, order))
    for i, own in enumerate(orders):
        nodes = levels.sigma[i - own + 1 : i + 1][::-1]
        coefs[i, :own] = next_alpha[i] * _log_integrals(nodes, levels.next_sigma[i])
    return solver_of(
        timesteps=levels.timesteps,
        estimate=schedule.noise_coefs(alpha**2),
        clean=schedule.clean_coefs(alpha**2),
        latents_coef=next_alpha / alpha,
        estimate_coefs=coefs,
    )


def _log_integrals(nodes: np.ndarray, end: float) -> np.ndarray:
    """Integrals from the first node to the end, over sigma, of the Lagrange polynomials in log(sigma), `[K]`."""
    places = np.log(nodes / nodes[0])
    stop = np.log(end / nodes[0])
    integrals = []
    for k, place in enumerate(places):
        others = np.delete(places, k)
        polynomial = np.poly1d(others, r=True) / np.prod(place - others)
        # By parts: the integral of p(u) exp(u) is exp(u) (p - p' + p'' - ...).
        primitive, sign = polynomial, -1
        for times in range(1, polynomial.order + 1):
            primitive, sign = primitive + sign * polynomial.deriv(times), -sign
        integrals.append(end * primitive(stop) - nodes[0] * primitive(0.0))
    return np.array(integrals)


def _clean_steps(
    schedule: NoiseSchedule,
    levels: Levels,
    weights: np.ndarray,
    *,
    latents_coef: np.ndarray | None = None,
    sde: bool = False,
) -> Solver:
    """Steps along x_0 of latents of variance one; without latents_coef, weights are those of `x' / alpha'`."""
    alpha, next_alpha = (1 / np.sqrt(level**2 + 1) for level in (levels.sigma, levels.next_sigma))
    share = levels.next_sigma / levels.sigma
    if latents_coef is None:
        latents_coef = next_alpha / alpha * share ** (1 + sde)
        weights = next_alpha[:, None] * weights
    return solver_of(
        timesteps=levels.timesteps,
        estimate=schedule.clean_coefs(alpha**2),
        clean=schedule.clean_coefs(alpha**2),
        latents_coef=latents_coef,
        estimate_coefs=weights,
        fresh_noise_coef=next_alpha * levels.next_sigma * np.sqrt(1 - share**2) if sde else None,
        stochastic=sde,
    )
