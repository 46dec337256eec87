"""Solvers of the sampling equation, as tables.

Every step of DDIM (arXiv:2010.02502), of Euler's method (arXiv:2206.00364), of PNDM without its Runge-Kutta start
(arXiv:2202.09778) and of DPM-Solver++ 2M (arXiv:2211.01095) is linear in the latents x and in the last few estimates m:

    m_i = r x_i + u noise_pred_i
    x_{i+1} = a x_i + b_0 m_i + b_1 m_{i-1} + ... + c z,    z ~ N(0, 1)

so a solver is the table of r, u, a, b and c over its steps. What the network predicts, noise or velocity, is folded in.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_pref.diffusion.schedule import NoiseSchedule

SPACINGS = ("leading", "trailing", "linspace")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver:
    """A table with one row per step, float32 `[S]` where nothing else is said, in the order of sampling.

    All its arrays have the steps as leading axis, so `lax.scan` runs over it as it is and sees one row, a Solver of
    scalars, at a time. Solvers of one kind and number of steps share what is compiled for them.

    Attributes:
        timesteps: what the network is told; whole numbers except in Euler's "linspace" and with its Karras sigmas.
        input_scale: the network sees `input_scale * latents`.
        estimate_from_latents: r, of the latents in the estimate.
        estimate_from_pred: u, of the network's prediction in the estimate.
        latents_coef: a, of the latents.
        estimate_coefs: b, `[S, K]`: of the step's own estimate and of the K - 1 before it, latest first.
        fresh_noise_coef: c, of newly drawn noise.
        clean_from_latents: of the latents in what a prediction says of the clean ones, whatever m is.
        clean_from_pred: of the network's prediction in that.
        init_noise_sigma: standard deviation of the latents at the start.
        stochastic: whether any step draws noise; static, so that deterministic solvers draw none.
    """

    timesteps: jax.Array
    input_scale: jax.Array
    estimate_from_latents: jax.Array
    estimate_from_pred: jax.Array
    latents_coef: jax.Array
    estimate_coefs: jax.Array
    fresh_noise_coef: jax.Array
    clean_from_latents: jax.Array
    clean_from_pred: jax.Array
    init_noise_sigma: float = dataclasses.field(metadata={"static": True})
    stochastic: bool = dataclasses.field(metadata={"static": True})


def no_history(solver: Solver, latents: jax.Array) -> tuple[jax.Array, ...]:
    """What `step` takes as history at the first step: K - 1 arrays like latents, none for DDIM and Euler."""
    return (jnp.zeros_like(latents),) * (solver.estimate_coefs.shape[-1] - 1)


def step(
    latents: jax.Array,
    noise_pred: jax.Array,
    row: Solver,
    noise: jax.Array | None = None,
    history: tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """One step of sampling: `m = r x + u noise_pred`, then `x' = a x + sum_k b_k m_k + c z`.

    Args:
        latents: x, `[B, H, W, C]`.
        noise_pred: `[B, H, W, C]`, the network's prediction as it is, be it noise or velocity.
        row: one row of a solver; or one of each image, that is, with a leading axis B.
        noise: z, `[B, H, W, C]`; None for the mean of the step, all there is to a solver that is not stochastic.
        history: the estimates of the K - 1 steps before, latest first, each `[B, H, W, C]`; see `no_history`.

    Returns:
        x', `[B, H, W, C]`, and the history for the next step.

    Raises:
        ValueError: the history is not as long as the solver needs it.
    """
    num_estimates = row.estimate_coefs.shape[-1]
    if len(history) != num_estimates - 1:
        raise ValueError(
            f"step: this solver needs the estimates of the last {num_estimates - 1} steps, got {len(history)}; "
            "start with no_history and pass on what step returns"
        )
    estimate = _per_image(row.estimate_from_latents) * latents + _per_image(row.estimate_from_pred) * noise_pred
    estimates = (estimate, *history)
    latents = _per_image(row.latents_coef) * latents
    for k, estimate in enumerate(estimates):
        latents = latents + _per_image(row.estimate_coefs[..., k]) * estimate
    if noise is not None:
        latents = latents + _per_image(row.fresh_noise_coef) * noise
    return latents, estimates[:-1]


def log_prob(next_latents: jax.Array, latents: jax.Array, noise_pred: jax.Array, row: Solver) -> jax.Array:
    """Log-probability that a stochastic step leads from latents to next_latents.

    The step draws from `N(mean, c^2)`; the log-density is averaged, not summed, over the dimensions of an image, as in
    the released code of DDPO (arXiv:2305.13301) and D3PO (arXiv:2311.13231):

        -(x' - mean)^2 / (2 c^2) - log c - log(2 pi) / 2

    A step that draws no noise (c = 0: the last one where it ends without noise) has one outcome and no density. It
    counts as 0 with gradient 0, so that it neither adds to sums nor moves ratios of probabilities.

    Args:
        next_latents: x', `[B, H, W, C]`.
        latents: x, `[B, H, W, C]`.
        noise_pred: `[B, H, W, C]`, the network's prediction as it is, be it noise or velocity.
        row: one row of a stochastic solver; or one of each image, that is, with a leading axis B.

    Returns:
        `[B]`, in no less than float32.

    Raises:
        ValueError: the solver is not stochastic.
    """
    if not row.stochastic:
        raise ValueError("log_prob: the solver draws no noise, so its steps have no density; take ddim with eta > 0")
    dtype = jnp.promote_types(noise_pred.dtype, jnp.float32)
    mean, _ = step(latents.astype(dtype), noise_pred.astype(dtype), row)
    draws = row.fresh_noise_coef > 0
    # A harmless deviation where none is drawn: what jnp.where leaves out must still have finite gradients.
    deviation = jnp.where(draws, row.fresh_noise_coef, 1)
    distance = jnp.square((next_latents.astype(dtype) - mean) / _per_image(deviation)).mean((1, 2, 3))
    return jnp.where(draws, -distance / 2 - jnp.log(deviation) - np.log(2 * np.pi) / 2, 0)


def clean_estimate(schedule: NoiseSchedule, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """r and u, `[S]` each, of the estimate of the clean latents `x_0 = r x + u noise_pred` at trained timesteps `[S]`.

    The latents x are those of DDIM and DPM-Solver++, of variance one.
    """
    return _x_0(schedule, schedule.alphas_cumprod[np.asarray(timesteps, int)])


def ddim(
    schedule: NoiseSchedule,
    steps: int,
    *,
    eta: float = 0.0,
    spacing: str = "leading",
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
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta must lie in [0, 1], got {eta}")
    timesteps = _timesteps(schedule, steps, spacing, steps_offset).round().astype(int)
    # A whole stride below each timestep, whatever the spacing: so diffusers defines it, and its images depend on it.
    next_abar = _abar(schedule, timesteps - schedule.num_train_timesteps // steps, set_alpha_to_one)
    abar = schedule.alphas_cumprod[timesteps]
    sigma = eta * np.sqrt((1 - next_abar) / (1 - abar) * (1 - abar / next_abar))
    latents_coef = np.sqrt(next_abar / abar)
    eps_coef = np.sqrt(1 - next_abar - sigma**2) - latents_coef * np.sqrt(1 - abar)
    return _solver(
        timesteps=timesteps,
        estimate=_eps(schedule, abar),
        clean=_x_0(schedule, abar),
        latents_coef=latents_coef,
        estimate_coefs=eps_coef[:, None],
        fresh_noise_coef=sigma,
        stochastic=eta > 0,
    )


def euler(
    schedule: NoiseSchedule,
    steps: int,
    *,
    spacing: str = "linspace",
    steps_offset: int = 0,
    karras: bool = False,
) -> Solver:
    """Euler's method on `dx/dsigma = eps` (arXiv:2206.00364, algorithm 1 with no noise), down to sigma = 0.

    Here latents are `x = x_0 + sigma eps` with `sigma = sqrt((1 - abar) / abar)`; the network, which knows latents of
    variance one, sees `x / sqrt(sigma^2 + 1)`:

        x' = x + (sigma' - sigma) eps

    Args:
        schedule: that the network was trained with.
        steps: S, from 1 to the number of training timesteps.
        spacing: "leading", "trailing" or "linspace" (arXiv:2305.08891, table 2).
        steps_offset: added to the timesteps of "leading" spacing.
        karras: whether to go from the first to the last sigma of the spacing as arXiv:2206.00364, equation 5, does.

    Raises:
        ValueError: an argument out of its range.
    """
    timesteps = _timesteps(schedule, steps, spacing, steps_offset)
    sigma = np.interp(timesteps, np.arange(schedule.num_train_timesteps), _sigmas(schedule))
    if karras:
        sigma = _karras(sigma[0], sigma[-1], steps)
        timesteps = _sigma_timesteps(schedule, sigma)
    sigma_step = np.append(sigma[1:], 0.0) - sigma
    input_scale = 1 / np.sqrt(sigma**2 + 1)
    eps_from_input, eps_from_pred = _eps(schedule, input_scale**2)
    clean_from_input, clean_from_pred = _x_0(schedule, input_scale**2)
    return _solver(
        timesteps=timesteps,
        input_scale=input_scale,
        estimate=(eps_from_input * input_scale, eps_from_pred),
        clean=(clean_from_input * input_scale, clean_from_pred),
        latents_coef=np.ones(steps),
        estimate_coefs=sigma_step[:, None],
        # As in diffusers: pure noise where sampling starts at the last timestep, noise and unit signal elsewhere.
        init_noise_sigma=float(np.sqrt(sigma[0] ** 2 + 1) if spacing == "leading" else sigma[0]),
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
    spacing: str = "leading",
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
    timesteps = _timesteps(schedule, steps, spacing, steps_offset).round().astype(int)
    timesteps = np.insert(timesteps, 1, timesteps[1:2])
    stride = schedule.num_train_timesteps // steps
    start = timesteps.copy()
    start[1:2] += stride
    next_abar = _abar(schedule, start - stride, set_alpha_to_one)
    abar = schedule.alphas_cumprod[start]
    latents_coef = np.sqrt(next_abar / abar)
    eps_coef = np.sqrt(1 - next_abar) - latents_coef * np.sqrt(1 - abar)

    # Predictions are combined as they are, and a velocity is turned into noise after that: so does diffusers.
    eps_from_latents, eps_from_pred = _eps(schedule, abar)
    latents_coef = latents_coef + eps_coef * eps_from_latents
    pred_coefs = (eps_coef * eps_from_pred)[:, None] * PNDM_WEIGHTS[np.minimum(np.arange(len(start)), 5)]
    if steps > 1:
        # The second row starts where the first one did, at x = (x' - b m) / a in terms of what the first row left.
        pred_coefs[1, 1] -= latents_coef[1] * pred_coefs[0, 0] / latents_coef[0]
        latents_coef[1] /= latents_coef[0]
    return _solver(
        timesteps=timesteps,
        estimate=(np.zeros(len(start)), np.ones(len(start))),
        clean=_x_0(schedule, schedule.alphas_cumprod[timesteps]),
        latents_coef=latents_coef,
        estimate_coefs=pred_coefs,
    )


def dpmpp(
    schedule: NoiseSchedule,
    steps: int,
    *,
    spacing: str = "linspace",
    steps_offset: int = 0,
    karras: bool = False,
    final_sigmas_type: str = "zero",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Solver:
    """DPM-Solver++ 2M (arXiv:2211.01095, algorithm 2).

    With `alpha = sqrt(abar)`, `sigma = sqrt((1 - abar) / abar)`, `h = log(sigma / sigma')` and `h_-1` that of the step
    before, x_0 being what a prediction says of the clean latents:

        D = x_0 + h / (2 h_-1) (x_0 - x_0 of the step before)
        x' = (alpha' sigma') / (alpha sigma) x + alpha' (1 - sigma' / sigma) D

    The first step, and the last where the arguments below say so, is of first order: `D = x_0`.

    Args:
        schedule: that the network was trained with.
        steps: S, from 1 to the number of training timesteps; one less unless the spacing is "trailing".
        spacing: "leading", "trailing" or "linspace" (arXiv:2305.08891, table 2); without their last point where that
            would be the first training timestep.
        steps_offset: added to the timesteps of "leading" spacing.
        karras: whether to go from the largest to the smallest trained sigma as arXiv:2206.00364, equation 5, does,
            instead of by the spacing.
        final_sigmas_type: "zero" to end without noise, the last step being of first order; "sigma_min" to end with
            that of timestep 0.
        lower_order_final: whether the last of fewer than 15 steps is of first order.
        euler_at_final: whether the last step is of first order.

    Raises:
        ValueError: an argument out of its range.
    """
    if final_sigmas_type not in ("zero", "sigma_min"):
        raise ValueError(
            f"dpm++: final_sigmas_type={final_sigmas_type!r} is not supported; supported: 'zero' or 'sigma_min'"
        )
    timesteps = _timesteps(schedule, steps, spacing, steps_offset, leave_out_last=True).round()
    trained_sigmas = _sigmas(schedule)
    sigma = trained_sigmas[timesteps.astype(int)]
    if karras:
        sigma = _karras(trained_sigmas[-1], trained_sigmas[0], steps)
        timesteps = _sigma_timesteps(schedule, sigma).round()
    next_sigma = np.append(sigma[1:], 0.0 if final_sigmas_type == "zero" else trained_sigmas[0])
    alpha, next_alpha = (1 / np.sqrt(sigmas**2 + 1) for sigmas in (sigma, next_sigma))

    first_order = next_alpha * (1 - next_sigma / sigma)
    ends_in_first_order = final_sigmas_type == "zero" or euler_at_final or (lower_order_final and steps < 15)
    i = np.arange(1, steps - ends_in_first_order)
    second_order = np.zeros(steps)
    second_order[i] = first_order[i] / 2 * np.log(sigma[i] / next_sigma[i]) / np.log(sigma[i - 1] / sigma[i])
    return _solver(
        timesteps=timesteps,
        estimate=_x_0(schedule, alpha**2),
        clean=_x_0(schedule, alpha**2),
        latents_coef=next_alpha * next_sigma / (alpha * sigma),
        estimate_coefs=np.stack([first_order + second_order, -second_order], axis=1),
    )


# The solver of each scheduler class, the defaults of fields that a file may leave out, and values that are refused.
SOLVERS = {
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm++",
    "EulerDiscreteScheduler": "euler",
    "PNDMScheduler": "pndm",
}
DEFAULTS = {
    "ddim": {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True},
    "dpm++": {
        "timestep_spacing": "linspace",
        "steps_offset": 0,
        "use_karras_sigmas": False,
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "euler_at_final": False,
    },
    "euler": {"timestep_spacing": "linspace", "steps_offset": 0, "use_karras_sigmas": False},
    "pndm": {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": False},
}
SUPPORTED = {
    "ddim": {"clip_sample": (False,)},
    "dpm++": {
        "algorithm_type": ("dpmsolver++",),
        "lambda_min_clipped": (-float("inf"),),
        "solver_order": (2,),
        "solver_type": ("midpoint",),
        "use_beta_sigmas": (None, False),
        "use_dynamic_shifting": (None, False),
        "use_exponential_sigmas": (None, False),
        "use_flow_sigmas": (None, False),
        "use_lu_lambdas": (None, False),
        "variance_type": (None,),
    },
    "euler": {
        "final_sigmas_type": (None, "zero"),
        "interpolation_type": (None, "linear"),
        "sigma_max": (None,),
        "sigma_min": (None,),
        "timestep_type": (None, "discrete"),
        "use_beta_sigmas": (None, False),
        "use_exponential_sigmas": (None, False),
    },
    "pndm": {"skip_prk_steps": (True,)},
}
BUILDERS = {"ddim": ddim, "dpm++": dpmpp, "euler": euler, "pndm": pndm}
ARGUMENTS = {"timestep_spacing": "spacing", "use_karras_sigmas": "karras"}
NAMES = ("ddim", "dpm++", "dpm++_karras", "euler", "euler_karras", "pndm")


def solver_from_config(
    scheduler_config: Mapping[str, Any], steps: int, *, name: str | None = None, eta: float = 0.0
) -> Solver:
    """The solver that a checkpoint's scheduler asks for, or another one over the same noise schedule.

    Fields that the file leaves out take the defaults of the diffusers class of the *solver*, as diffusers itself does
    when one scheduler is made from another's config.

    Args:
        scheduler_config: the parsed `scheduler_config.json`.
        steps: S, from 1 to the number of training timesteps.
        name: "ddim", "dpm++" (DPM-Solver++ 2M), "euler" or "pndm"; "dpm++_karras" or "euler_karras" for Karras sigmas
            when the file does not ask for them; None for the one that the file's `_class_name` names.
        eta: of DDIM, see `ddim`.

    Raises:
        ValueError: a name, class or field that is not supported, or an argument out of its range.

    Example:
        >>> pipeline = fp.load_pipeline("demo")
        >>> solver = fp.solver_from_config(pipeline.scheduler_config, 25, name="dpm++_karras")
        >>> len(solver.timesteps)
        25
        >>> draw = fp.TextToImage(pipeline, solver)
    """
    class_name = scheduler_config.get("_class_name")
    if name is None and (not isinstance(class_name, str) or class_name not in SOLVERS):
        raise ValueError(
            f"scheduler_config: _class_name={class_name!r:.80} is not supported; supported: "
            f"{' or '.join(SOLVERS)}; pass as name one of {', '.join(NAMES)} to sample with that instead"
        )
    name = name or SOLVERS[str(class_name)]
    if name not in NAMES:
        raise ValueError(f"solver: name must be one of {', '.join(NAMES)}, got {name!r}")
    if name != "ddim" and eta:
        raise ValueError(f'solver: eta={eta} applies to ddim only, {name} draws no noise; pass name="ddim"')

    values = dict(scheduler_config)
    if name.endswith("_karras"):
        name = name.removesuffix("_karras")
        values["use_karras_sigmas"] = True
    # Defaults of diffusers that are refused: a file without the field must be as well.
    if class_name == "DDIMScheduler":
        # Classes other than this one do not clip where the field is missing.
        values.setdefault("clip_sample", True)
    values.setdefault("skip_prk_steps", False)
    for field, supported in SUPPORTED[name].items():
        if field in values and values[field] not in supported:
            raise ValueError(
                f"scheduler_config: {field}={values[field]!r} is not supported with {name}; supported: "
                f"{' or '.join(map(repr, supported))}"
            )

    for field, default in DEFAULTS[name].items():
        value = values.get(field, default)
        if isinstance(default, bool) and not isinstance(value, bool) and (default or value is not None):
            raise ValueError(f"scheduler_config: {field}={value!r:.80} is not supported; supported: True or False")
    schedule = NoiseSchedule.from_dict(scheduler_config)
    offset = values.get("steps_offset", 0)
    if type(offset) is not int or not 0 <= offset < schedule.num_train_timesteps:
        raise ValueError(
            f"scheduler_config: steps_offset={offset!r:.80} is not supported; supported: integers from 0 to "
            f"{schedule.num_train_timesteps - 1}"
        )
    options = {ARGUMENTS.get(field, field): values.get(field, default) for field, default in DEFAULTS[name].items()}
    if name == "ddim":
        options["eta"] = eta
    return BUILDERS[name](schedule, steps, **options)


def _solver(
    *,
    timesteps: np.ndarray,
    estimate: tuple[np.ndarray, np.ndarray],
    clean: tuple[np.ndarray, np.ndarray],
    latents_coef: np.ndarray,
    estimate_coefs: np.ndarray,
    input_scale: np.ndarray | None = None,
    fresh_noise_coef: np.ndarray | None = None,
    init_noise_sigma: float = 1.0,
    stochastic: bool = False,
) -> Solver:
    """The table of float64 columns, rounded here and nowhere else."""
    columns = {
        "timesteps": timesteps,
        "input_scale": np.ones(len(timesteps)) if input_scale is None else input_scale,
        "estimate_from_latents": estimate[0],
        "estimate_from_pred": estimate[1],
        "latents_coef": latents_coef,
        "estimate_coefs": estimate_coefs,
        "fresh_noise_coef": np.zeros(len(timesteps)) if fresh_noise_coef is None else fresh_noise_coef,
        "clean_from_latents": clean[0],
        "clean_from_pred": clean[1],
    }
    columns = {name: jnp.asarray(column, jnp.float32) for name, column in columns.items()}
    return Solver(**columns, init_noise_sigma=init_noise_sigma, stochastic=stochastic)


def _per_image(coef: jax.Array) -> jax.Array:
    """A coefficient, scalar or `[B]`, such that it multiplies `[B, H, W, C]`."""
    return coef[..., None, None, None]


def _timesteps(
    schedule: NoiseSchedule, steps: int, spacing: str, steps_offset: int, *, leave_out_last: bool = False
) -> np.ndarray:
    """Descending timesteps float64 `[steps]` (arXiv:2305.08891, table 2), to the last bit as in diffusers.

    With `leave_out_last`, "leading" and "linspace" are laid out over one step more, whose timestep is left out.
    """
    last = schedule.num_train_timesteps
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


def _abar(schedule: NoiseSchedule, timesteps: np.ndarray, set_alpha_to_one: bool) -> np.ndarray:
    """`abar` at the timesteps stepped to; below 0 the images are done, with `abar` 1 or that of timestep 0."""
    final = 1.0 if set_alpha_to_one else schedule.alphas_cumprod[0]
    return np.where(timesteps >= 0, schedule.alphas_cumprod[np.maximum(timesteps, 0)], final)


def _sigmas(schedule: NoiseSchedule) -> np.ndarray:
    """`sigma = sqrt((1 - abar) / abar)` of the training timesteps, float64 `[T]`, rising."""
    # diffusers has the betas in float32. With Karras sigmas a timestep may lie so close to one half (18 steps of
    # Stable Diffusion visit 575.5) that this decides which way it is rounded.
    return np.sqrt(1 / np.cumprod(1 - schedule.betas.astype(np.float32), dtype=np.float64) - 1)


def _karras(sigma_max: float, sigma_min: float, steps: int) -> np.ndarray:
    """Falling sigmas, float64 `[steps]`, evenly spaced after the seventh root (arXiv:2206.00364, equation 5)."""
    return sigma_max * (1 + np.linspace(0, 1, steps) * ((sigma_min / sigma_max) ** (1 / 7) - 1)) ** 7


def _sigma_timesteps(schedule: NoiseSchedule, sigma: np.ndarray) -> np.ndarray:
    """The timesteps with these sigmas, fractional: linear in log(sigma) between the trained ones, as in diffusers."""
    return np.interp(np.log(sigma), np.log(_sigmas(schedule)), np.arange(schedule.num_train_timesteps))


def _eps(schedule: NoiseSchedule, abar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients of `eps = r x + u noise_pred`, x of variance one, for what the network predicts.

    A velocity is `v = sqrt(abar) eps - sqrt(1 - abar) x_0` (arXiv:2202.00512, appendix D), thus
    `eps = sqrt(1 - abar) x + sqrt(abar) v`.
    """
    if schedule.prediction_type == "epsilon":
        return np.zeros_like(abar), np.ones_like(abar)
    return np.sqrt(1 - abar), np.sqrt(abar)


def _x_0(schedule: NoiseSchedule, abar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients of `x_0 = r x + u noise_pred`, x of variance one: `x_0 = (x - sqrt(1 - abar) eps) / sqrt(abar)`.

    Of a velocity, `x_0 = sqrt(abar) x - sqrt(1 - abar) v` (arXiv:2202.00512, appendix D).
    """
    if schedule.prediction_type == "epsilon":
        return 1 / np.sqrt(abar), -np.sqrt(1 / abar - 1)
    return np.sqrt(abar), -np.sqrt(1 - abar)
