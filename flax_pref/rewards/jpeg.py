"""JPEG compressibility and incompressibility (arXiv:2305.13301, section 5.1): rewards without a network."""

import dataclasses
import io
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flax_pref.shapes import PerImage, Pixels

QUALITY = 95


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JpegSize:
    """`sign` times the size of an image as JPEG of quality 95, in kB (1000 bytes), as the authors of DDPO have it.

    Encoding takes place on the host that has the image, while devices wait.
    """

    name: str = dataclasses.field(metadata={"static": True})
    sign: float = dataclasses.field(metadata={"static": True})

    differentiable = False

    def prepare(self, captions: Sequence[str]) -> tuple[()]:
        """Nothing: captions do not matter."""
        return ()

    def view(self, images: Pixels) -> Pixels:
        """The images as they are."""
        return images

    def score(self, view: Pixels, prepared: tuple[()]) -> PerImage:
        """See `rewards.reward.Reward`."""
        sizes = jax.ShapeDtypeStruct(view.shape[:1], jnp.float32)
        return self.sign * jax.pure_callback(kilobytes, sizes, view)


def kilobytes(images: np.ndarray) -> np.ndarray:
    """Sizes of images `[B, H, W, 3]` in [0, 1], float32 `[B]`."""
    sizes = []
    for pixels in np.round(255 * np.clip(np.asarray(images), 0, 1)).astype(np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
        sizes.append(buffer.tell() / 1000)
    return np.array(sizes, np.float32)
