"""Optimizers and learning rates, from optax."""

import dataclasses
from typing import Literal

import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How gradients become updates.

    Example:
        >>> optimizer = fp.OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=100)
    """

    name: Literal["adamw", "adafactor"] = "adamw"
    """adamw (arXiv:1711.05101), or adafactor (arXiv:1804.04235), which keeps a row and a column of second moments for a
    matrix."""
    learning_rate: float
    """The largest, reached after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate after the warm-up; linear and cosine end at zero with the last step."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from zero."""
    b1: float = 0.9
    """adamw: decay of the first moments."""
    b2: float = 0.999
    """adamw: decay of the second moments."""
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    """Times the learning rate, what parameters lose in each step."""
    clip_norm: float | None = 1.0
    """Gradients with a larger norm are scaled down to it: the norm over all parameters, or over those of each module
    where a method trains several independently; None: none are."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """adamw: what the first moments are kept in."""

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise ValueError(f"optimizer: learning_rate is {self.learning_rate}; expected a positive number")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError(
                f"optimizer: warmup_steps={self.warmup_steps}, weight_decay={self.weight_decay}; expected numbers from "
                "0 up"
            )
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"optimizer: {field} is {getattr(self, field)}; expected 0 to 1, without 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"optimizer: clip_norm is {self.clip_norm}; expected a positive number, or None")

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate of update 0 ... steps - 1."""
        decay_steps = max(1, steps - self.warmup_steps)
        after = {
            "constant": optax.constant_schedule(self.learning_rate),
            "linear": optax.linear_schedule(self.learning_rate, 0.0, decay_steps),
            "cosine": optax.cosine_decay_schedule(self.learning_rate, decay_steps),
        }[self.schedule]
        # The first update has a part of the rate too: a step at rate zero would be lost.
        warmup = optax.linear_schedule(
            self.learning_rate / (self.warmup_steps + 1), self.learning_rate, self.warmup_steps
        )
        return optax.join_schedules([warmup, after], [self.warmup_steps]) if self.warmup_steps else after

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optimizer of a run of so many steps."""
        rate = self.rate(steps)
        if self.name == "adamw":
            optimizer = optax.adamw(
                rate,
                b1=self.b1,
                b2=self.b2,
                eps=self.epsilon,
                mu_dtype=self.moment_dtype,
                weight_decay=self.weight_decay,
            )
        else:
            # As the published runs used it: with a learning rate of its own, not one relative to the parameters. optax
            # would let parameters decay by weight_decay itself; its update has its sign already.
            optimizer = optax.chain(
                optax.adafactor(multiply_by_parameter_scale=False),
                optax.add_decayed_weights(-self.weight_decay),
                optax.scale_by_schedule(rate),
            )
        return (
            optimizer if self.clip_norm is None else optax.chain(optax.clip_by_global_norm(self.clip_norm), optimizer)
        )
