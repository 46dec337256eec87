"""Sample images of a run: the same prompts and the same noise again and again, under the networks as they stand."""

import dataclasses
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_pref.checkpoints.diffusers import Pipeline
from flax_pref.config import check_least, check_seed
from flax_pref.diffusion.conditioning import encode_blank, encode_empty, encode_prompts, with_sizes
from flax_pref.diffusion.guidance import Rule, tabulate
from flax_pref.diffusion.latents import decode_latents
from flax_pref.diffusion.sampler import image_keys, sample
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.models.bank import Bank
from flax_pref.parallel.sharding import batch_sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Images that are drawn during a run."""

    every: int | None = None
    """Steps between two drawings; None: none."""
    prompts: tuple[str, ...] = ()
    steps: int = 25
    """Of the solver, that of the checkpoint."""
    guidance_scale: float = 7.5
    """s; 1 is no guidance."""
    w: float = 1.0
    """Strength of the modules, where the method's rule has one."""
    seed: int = 0

    def __post_init__(self):
        check_least(self, 1, "steps")
        check_seed(self.seed)
        if self.every is not None and (self.every < 1 or not self.prompts):
            raise ValueError(
                f"samples: every={self.every} with {len(self.prompts)} prompts; expected a positive number of steps "
                "and at least one prompt"
            )


class Samples:
    """Draws the images of a run; all processes draw, and each has the result."""

    def __init__(self, pipeline: Pipeline, config: SampleConfig, rule: Rule, size: tuple[int, int], mesh: Mesh):
        """Encodes the prompts.

        Args:
            pipeline: encoders and decoder on a device of this process; its UNet is not used.
            config: what to draw.
            rule: of guidance.
            size: height and width of the images in pixels.
            mesh: where the networks are.
        """
        self._vae = pipeline.vae
        self._whole = NamedSharding(mesh, PartitionSpec())
        divided, count = batch_sharding(mesh), len(config.prompts)
        # What cannot be divided is drawn on every device.
        sharding = self._whole if count % divided.num_devices else divided
        told = encode_prompts(pipeline, config.prompts), encode_empty(pipeline), encode_blank(pipeline)
        text, empty, blank = (with_sizes(conditioning, pipeline.unet.config, size) for conditioning in told)
        solver = solver_from_config(pipeline.scheduler_config, config.steps)
        table = tabulate(rule, len(solver.timesteps), count)
        keys = jax.random.key_data(image_keys(config.seed, range(count)))
        self._inputs = (
            jax.device_put((table, solver), self._whole),
            jax.random.wrap_key_data(jax.device_put(np.asarray(keys), sharding), impl="threefry2x32"),
            jax.device_put(text, sharding),
            *jax.device_put((empty, blank), self._whole),
        )
        factor, channels = pipeline.vae.config.downscale_factor, pipeline.vae.config.latent_channels
        self._shape = (size[0] // factor, size[1] // factor, channels)

    def draw(self, bank: Bank) -> np.ndarray:
        """Images under the networks as they are now, float32 `[N, H, W, 3]` in [0, 1]."""
        latents = _draw(bank, *self._inputs, self._shape, self._whole)
        return np.asarray(decode_latents(self._vae, np.asarray(latents)))


# At module level, so that what is compiled serves every drawing.
@partial(jax.jit, static_argnums=(6, 7))
def _draw(bank, strengths, keys, text, empty, blank, shape, whole):
    table, solver = strengths
    latents = sample(bank, table, solver, keys, text, empty, shape, blank=blank)
    return jax.lax.with_sharding_constraint(latents, whole)
