"""The noise schedule of a diffusion model (arXiv:2006.11239): how much noise latents carry at each timestep."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_pref.files import read_json
from flax_pref.models import config as config_io

MOST_TIMESTEPS = 100_000  # published models have a thousand
LEAST_SIGNAL = 1e-30
# What scheduler classes take for the betas where a file leaves them out, if that is not what `NoiseSchedule` takes.
OF_STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}
BETAS = {
    "HeunDiscreteScheduler": OF_STABLE_DIFFUSION,
    "LCMScheduler": {**OF_STABLE_DIFFUSION, "beta_schedule": "scaled_linear"},
    "TCDScheduler": {**OF_STABLE_DIFFUSION, "beta_schedule": "scaled_linear"},
}
SUPPORTED = {
    "beta_schedule": ("linear", "scaled_linear"),
    "prediction_type": ("epsilon", "v_prediction"),
    "thresholding": (None, False),
    "trained_betas": (None,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """Fields of `scheduler_config.json` that the model was trained with; the other fields belong to a solver.

    The tables are float64, so that a solver built from them rounds once, at its end.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    """Whether the last timestep has no signal: zero terminal SNR (arXiv:2305.08891, algorithm 1)."""

    def __post_init__(self):
        for field in ("beta_schedule", "prediction_type"):
            if (value := getattr(self, field)) not in SUPPORTED[field]:
                supported = " or ".join(map(repr, SUPPORTED[field]))
                raise ValueError(f"NoiseSchedule: {field}={value!r} is not supported; supported: {supported}")
        config_io.check_sizes(self, ("num_train_timesteps",), MOST_TIMESTEPS)
        if self.rescale_betas_zero_snr and self.num_train_timesteps == 1:
            raise ValueError(
                "NoiseSchedule: rescale_betas_zero_snr=True over num_train_timesteps=1 is not supported; supported: 2 "
                "timesteps or more, of which the last has no signal"
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"NoiseSchedule: beta_start={self.beta_start!r}, beta_end={self.beta_end!r} is not supported; "
                "supported: 0 < beta_start <= beta_end < 1"
            )
        # Solvers divide by both. Without signal at the last timestep they take other forms of their equations.
        last = self.alphas_cumprod[-2 if self.rescale_betas_zero_snr else -1]
        if not (self.alphas_cumprod[0] < 1 and last > LEAST_SIGNAL):
            raise ValueError(
                f"NoiseSchedule: beta_start={self.beta_start!r}, beta_end={self.beta_end!r} over num_train_timesteps="
                f"{self.num_train_timesteps} is not supported; supported: some noise at the first step, and a share of "
                f"signal over {LEAST_SIGNAL:g} at the last"
            )

    @classmethod
    def from_dict(cls, scheduler_config: Mapping[str, Any]) -> "NoiseSchedule":
        """Reads a parsed `scheduler_config.json`; a ValueError names the field that is not supported."""
        clipped = ("lambda_min_clipped", -np.inf)  # how diffusers writes that nothing is clipped
        values = {key: value for key, value in scheduler_config.items() if (key, value) != clipped}
        values = BETAS.get(str(values.get("_class_name")), {}) | values
        if values.get("rescale_betas_zero_snr", False) is None:
            del values["rescale_betas_zero_snr"]
        return config_io.from_json(cls, values, only=SUPPORTED, strict=False)

    @classmethod
    def from_file(cls, file: Path) -> "NoiseSchedule":
        """Reads `scheduler_config.json`; errors as in `from_dict`, with the name of the file."""
        values = read_json(file, expected="the scheduler of a folder in the layout of diffusers")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @cached_property
    def betas(self) -> np.ndarray:
        """Variance of the noise that timestep t adds, float64 `[T]`."""
        if self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, self.num_train_timesteps)
        else:
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps) ** 2
        if not self.rescale_betas_zero_snr:
            return betas
        abar = _without_terminal_signal(np.cumprod(1 - betas))
        return np.concatenate([1 - abar[:1], 1 - abar[1:] / abar[:-1]])

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """`abar_t = prod over s <= t of (1 - beta_s)`, the share of the signal in the variance, float64 `[T]`."""
        return np.cumprod(1 - self.betas)

    def noise_coefs(self, abar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The coefficients of `eps = r x + u noise_pred`, x of variance one, for what the network predicts.

        A velocity is `v = sqrt(abar) eps - sqrt(1 - abar) x_0` (arXiv:2202.00512, appendix D), thus
        `eps = sqrt(1 - abar) x + sqrt(abar) v`.
        """
        if self.prediction_type == "epsilon":
            return np.zeros_like(abar), np.ones_like(abar)
        return np.sqrt(1 - abar), np.sqrt(abar)

    def clean_coefs(self, abar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The coefficients of `x_0 = r x + u noise_pred`: `x_0 = (x - sqrt(1 - abar) eps) / sqrt(abar)`.

        Of a velocity, `x_0 = sqrt(abar) x - sqrt(1 - abar) v` (arXiv:2202.00512, appendix D).

        Raises:
            ValueError: the network predicts noise, which says nothing about the image where there is no signal.
        """
        if self.prediction_type != "epsilon":
            return np.sqrt(abar), -np.sqrt(1 - abar)
        if not np.all(abar > 0):
            raise ValueError(
                "NoiseSchedule: rescale_betas_zero_snr=True with prediction_type='epsilon' is not supported by this "
                "solver at the last timestep, which has no signal; supported: prediction_type='v_prediction', or the "
                "solver euler or dpm++"
            )
        return 1 / np.sqrt(abar), -np.sqrt(1 / abar - 1)

    def add_noise(self, latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
        """Noisy latents `sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps` (arXiv:2006.11239, equation 4).

        Args:
            latents: `[B, H, W, C]`, clean and scaled.
            noise: `[B, H, W, C]`, standard normal.
            timesteps: `[B]`, integers from 0 to T - 1.

        Returns:
            float32 `[B, H, W, C]`.
        """
        signal_scale, noise_scale = self._scales(timesteps)
        return signal_scale * latents.astype(jnp.float32) + noise_scale * noise.astype(jnp.float32)

    def target(self, latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
        """What the network is to predict: the noise, or the velocity `sqrt(abar) eps - sqrt(1 - abar) x_0`.

        The velocity is that of arXiv:2202.00512, appendix D; without signal it is `-x_0`. Arguments and result are as
        in `add_noise`.
        """
        if self.prediction_type == "epsilon":
            return noise
        signal_scale, noise_scale = self._scales(timesteps)
        return signal_scale * noise.astype(jnp.float32) - noise_scale * latents.astype(jnp.float32)

    def _scales(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`sqrt(abar)` and `sqrt(1 - abar)`, `[B, 1, 1, 1]` each."""
        tables = (np.sqrt(self.alphas_cumprod), np.sqrt(1 - self.alphas_cumprod))
        signal_scale, noise_scale = (jnp.asarray(x, jnp.float32)[timesteps][:, None, None, None] for x in tables)
        return signal_scale, noise_scale


def _without_terminal_signal(abar: np.ndarray) -> np.ndarray:
    """`abar` whose root is shifted to end in zero and scaled to begin where it did (arXiv:2305.08891, algorithm 1)."""
    root = np.sqrt(abar)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
