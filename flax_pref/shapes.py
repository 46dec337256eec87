"""Types of the arrays that parts of the library hand to each other: what they hold, and their axes by name.

In one signature, axes of one name have one size. Tests check this in the modules that `tests/conftest.py` lists;
outside of tests these are types for readers and for pyright, and cost nothing.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Key, Num

Array = jax.Array | np.ndarray
"""On a device or on the host."""
Tree = Any
"""A pytree of arrays whose first axis is that of the images."""

ImageKeys = Key[jax.Array, " images"]
"""A key of random numbers for each image."""
Timesteps = Num[Array, " images"]
"""From 0 (clean) up; a solver may have some that are not whole."""
Latents = Float[jax.Array, "images height width channels"]
"""Scaled latents of one image each."""
GivenLatents = Float[Array, "images height width channels"]
"""`Latents` on a device or on the host."""
RowLatents = Float[jax.Array, "images rows height width channels"]
"""Latents, or predictions from them, of several rows for each image: one row for each network and prompt."""
GivenRowLatents = Float[Array, "images rows height width channels"]
"""`RowLatents` on a device or on the host."""
Pixels = Float[Array, "images image_height image_width 3"]
"""Images in [0, 1]."""
Decoded = Float[jax.Array, "images image_height image_width 3"]
"""Pixels on the devices, as an autoencoder gives them."""
Squares = Float[Array, "images size size 3"]
"""Images as a network sees them, normalised."""
PerImage = Float[jax.Array, " images"]
"""A number for each image or pair: a score, a loss, a logit, a log-probability."""
PerRow = Float[jax.Array, "rows images"]
"""A number for each row of each image."""
TokenIds = Int[Array, "images tokens"]
"""Texts as ids of a tokenizer."""
Scalar = Float[jax.Array, ""]

__all__ = [
    "Array",
    "Bool",
    "Decoded",
    "Float",
    "GivenLatents",
    "GivenRowLatents",
    "ImageKeys",
    "Int",
    "Key",
    "Latents",
    "Num",
    "PerImage",
    "PerRow",
    "Pixels",
    "RowLatents",
    "Scalar",
    "Squares",
    "Timesteps",
    "TokenIds",
    "Tree",
]
