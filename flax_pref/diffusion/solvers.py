"""Solvers of the sampling equation, as tables.

Every step of DDIM (arXiv:2010.02502) and of Euler's method on the probability flow (arXiv:2206.00364) is linear:

    x' = a x + b noise_pred + c z,    z ~ N(0, 1)

so a solver is the table of a, b and c over its steps. What the network predicts, noise or velocity, is folded in.
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
    """A table with one row per step, float32 `[S]` each, in the order of sampling.

    All its arrays have the steps as leading axis, so `lax.scan` runs over it as it is and sees one row, a Solver of
    scalars, at a time.

    Attributes:
        timesteps: what the network is told; whole numbers except in Euler's "linspace".
        input_scale: the network sees `input_scale * latents`.
        latents_coef: a, of the latents.
        noise_coef: b, of the network's prediction.
        fresh_noise_coef: c, of newly drawn noise.
        init_noise_sigma: standard deviation of the latents at the start.
        stochastic: whether any step draws noise; static, so that deterministic solvers draw none.
    """

    timesteps: jax.Array
    input_scale: jax.Array
    latents_coef: jax.Array
    noise_coef: jax.Array
    fresh_noise_coef: jax.Array
    init_noise_sigma: float = dataclasses.field(metadata={"static": True})
    stochastic: bool = dataclasses.field(metadata={"static": True})


def step(latents: jax.Array, noise_pred: jax.Array, row: Solver, noise: jax.Array | None = None) -> jax.Array:
    """One step of sampling, `x' = a x + b noise_pred + c z`.

    Args:
        latents: x, `[B, H, W, C]`.
        noise_pred: `[B, H, W, C]`, the network's prediction as it is, be it noise or velocity.
        row: one row of a solver.
        noise: z, `[B, H, W, C]`; None for a solver that is not stochastic.

    Returns:
        x', `[B, H, W, C]`.
    """
    latents = row.latents_coef * latents + row.noise_coef * noise_pred
    return latents if noise is None else latents + row.fresh_noise_coef * noise


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
    next_timesteps = timesteps - schedule.num_train_timesteps // steps

    abar = schedule.alphas_cumprod[timesteps]
    final_abar = 1.0 if set_alpha_to_one else schedule.alphas_cumprod[0]
    next_abar = np.where(next_timesteps >= 0, schedule.alphas_cumprod[np.maximum(next_timesteps, 0)], final_abar)
    sigma = eta * np.sqrt((1 - next_abar) / (1 - abar) * (1 - abar / next_abar))

    latents_coef = np.sqrt(next_abar / abar)
    eps_coef = np.sqrt(1 - next_abar - sigma**2) - latents_coef * np.sqrt(1 - abar)
    eps_from_latents, eps_from_pred = _eps(schedule, abar)
    return Solver(
        timesteps=jnp.asarray(timesteps, jnp.float32),
        input_scale=jnp.ones(steps, jnp.float32),
        latents_coef=jnp.asarray(latents_coef + eps_coef * eps_from_latents, jnp.float32),
        noise_coef=jnp.asarray(eps_coef * eps_from_pred, jnp.float32),
        fresh_noise_coef=jnp.asarray(sigma, jnp.float32),
        init_noise_sigma=1.0,
        stochastic=eta > 0,
    )


def euler(schedule: NoiseSchedule, steps: int, *, spacing: str = "linspace", steps_offset: int = 0) -> Solver:
    """Euler's method on `dx/dsigma = eps` (arXiv:2206.00364, algorithm 1 with no noise), down to sigma = 0.

    Here latents are `x = x_0 + sigma eps` with `sigma = sqrt((1 - abar) / abar)`; the network, which knows latents of
    variance one, sees `x / sqrt(sigma^2 + 1)`:

        x' = x + (sigma' - sigma) eps

    Args:
        schedule: that the network was trained with.
        steps: S, from 1 to the number of training timesteps.
        spacing: "leading", "trailing" or "linspace" (arXiv:2305.08891, table 2).
        steps_offset: added to the timesteps of "leading" spacing.

    Raises:
        ValueError: an argument out of its range.
    """
    timesteps = _timesteps(schedule, steps, spacing, steps_offset)
    trained_sigmas = np.sqrt(1 / schedule.alphas_cumprod - 1)
    sigma = np.interp(timesteps, np.arange(len(trained_sigmas)), trained_sigmas)
    sigma_step = np.append(sigma[1:], 0.0) - sigma

    input_scale = 1 / np.sqrt(sigma**2 + 1)
    eps_from_input, eps_from_pred = _eps(schedule, input_scale**2)
    return Solver(
        timesteps=jnp.asarray(timesteps, jnp.float32),
        input_scale=jnp.asarray(input_scale, jnp.float32),
        latents_coef=jnp.asarray(1 + sigma_step * eps_from_input * input_scale, jnp.float32),
        noise_coef=jnp.asarray(sigma_step * eps_from_pred, jnp.float32),
        fresh_noise_coef=jnp.zeros(steps, jnp.float32),
        # As in diffusers: pure noise where sampling starts at the last timestep, noise and unit signal elsewhere.
        init_noise_sigma=float(np.sqrt(sigma[0] ** 2 + 1) if spacing == "leading" else sigma[0]),
        stochastic=False,
    )


# The solver of each scheduler class, the defaults of fields that a file may leave out, and values that are refused.
SOLVERS = {"DDIMScheduler": "ddim", "EulerDiscreteScheduler": "euler"}
DEFAULTS = {
    "ddim": {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True},
    "euler": {"timestep_spacing": "linspace", "steps_offset": 0},
}
SUPPORTED = {
    "ddim": {"clip_sample": (False,)},
    "euler": {
        "final_sigmas_type": (None, "zero"),
        "interpolation_type": (None, "linear"),
        "timestep_type": (None, "discrete"),
        "use_beta_sigmas": (None, False),
        "use_exponential_sigmas": (None, False),
        "use_karras_sigmas": (None, False),
    },
}


def from_config(
    scheduler_config: Mapping[str, Any], steps: int, *, name: str | None = None, eta: float = 0.0
) -> Solver:
    """The solver that a checkpoint's scheduler asks for, or another one over the same noise schedule.

    Fields that the file leaves out take the defaults of the diffusers class of the *solver*, as diffusers itself does
    when one scheduler is made from another's config.

    Args:
        scheduler_config: the parsed `scheduler_config.json`.
        steps: S, from 1 to the number of training timesteps.
        name: "ddim" or "euler"; None for the one that the file's `_class_name` names.
        eta: of DDIM, see `ddim`.

    Raises:
        ValueError: a name, class or field that is not supported, or an argument out of its range.
    """
    class_name = scheduler_config.get("_class_name")
    if name is None and class_name not in SOLVERS:
        raise ValueError(
            f"scheduler_config: _class_name={class_name!r} is not supported; supported: "
            f'{" or ".join(SOLVERS)}; pass name="ddim" or name="euler" to sample with one of these instead'
        )
    name = name or SOLVERS[class_name]
    if name not in DEFAULTS:
        raise ValueError(f'solver: name must be "ddim" or "euler", got {name!r}')
    if name != "ddim" and eta:
        raise ValueError(f"solver: eta={eta} applies to ddim only; {name} draws no noise")

    values = dict(scheduler_config)
    if class_name == "DDIMScheduler":
        # Clipping is this class's default; classes without the field do not clip.
        values.setdefault("clip_sample", True)
    for field, supported in SUPPORTED[name].items():
        if field in values and values[field] not in supported:
            raise ValueError(
                f"scheduler_config: {field}={values[field]!r} is not supported with {name}; supported: "
                f"{' or '.join(map(repr, supported))}"
            )

    schedule = NoiseSchedule.from_dict(scheduler_config)
    options = {field: values.get(field, default) for field, default in DEFAULTS[name].items()}
    options["spacing"] = options.pop("timestep_spacing")
    return ddim(schedule, steps, eta=eta, **options) if name == "ddim" else euler(schedule, steps, **options)


def _timesteps(schedule: NoiseSchedule, steps: int, spacing: str, steps_offset: int) -> np.ndarray:
    """Descending timesteps float64 `[steps]` (arXiv:2305.08891, table 2), to the last bit as in diffusers."""
    last = schedule.num_train_timesteps
    if not 1 <= steps <= last:
        raise ValueError(f"solver: steps must lie in 1 .. {last} (num_train_timesteps), got {steps}")
    if spacing == "leading":
        timesteps = np.arange(steps)[::-1] * (last // steps) + steps_offset
    elif spacing == "trailing":
        timesteps = np.arange(last, 0, -last / steps)[:steps].round() - 1
    elif spacing == "linspace":
        timesteps = np.linspace(0, last - 1, steps)[::-1]
    else:
        raise ValueError(f"solver: spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    if timesteps[-1] < 0 or timesteps[0] >= last:
        raise ValueError(
            f"solver: {steps} steps with steps_offset={steps_offset} visit {timesteps[-1]:g} .. {timesteps[0]:g}, "
            f"outside the trained 0 .. {last - 1}; take fewer steps or another offset"
        )
    return timesteps.astype(np.float64)


def _eps(schedule: NoiseSchedule, abar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients of `eps = r x + u noise_pred`, x of variance one, for what the network predicts.

    A velocity is `v = sqrt(abar) eps - sqrt(1 - abar) x_0` (arXiv:2202.00512, appendix D), thus
    `eps = sqrt(1 - abar) x + sqrt(abar) v`.
    """
    if schedule.prediction_type == "epsilon":
        return np.zeros_like(abar), np.ones_like(abar)
    return np.sqrt(1 - abar), np.sqrt(abar)
