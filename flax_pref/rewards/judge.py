"""The judge of the demo world as a reward."""

import dataclasses
from collections.abc import Sequence

import jax

from flax_pref.shapes import PerImage, Pixels
from flax_pref.world import judge
from flax_pref.world import scenes as world


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Judge:
    """How well images of 64 x 64 pixels show their captions and how well they are made, 0 to 1; see `world.judge`."""

    name = "judge"
    differentiable = True

    def prepare(self, captions: Sequence[str]) -> judge.Question:
        """What the captions ask for; a ValueError names one that is not of the demo world."""
        return judge.question(captions)

    def view(self, images: Pixels) -> Pixels:
        """The images as they are; a ValueError if they have another size."""
        if images.shape[1:3] != (world.RESOLUTION, world.RESOLUTION):
            raise ValueError(
                f"judge: images of {images.shape[2]} x {images.shape[1]} pixels; expected those of the demo world, "
                f"{world.RESOLUTION} x {world.RESOLUTION}"
            )
        return images

    def score(self, view: Pixels, prepared: judge.Question) -> PerImage:
        """See `rewards.reward.Reward`."""
        return judge.score(view, prepared)
