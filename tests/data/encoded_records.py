"""Encoded pairs in memory whose numbers tell which they are."""

import jax.numpy as jnp
import numpy as np

from flax_pref.data.prepared import EMPTY, Records, Shapes

CAPTIONS = 5  # of pairs; number 0 is the empty one


class MemoryRecords(Records):
    """Pair i has row 100 + i, i in its winner and -i in its loser, half more in mirror images, and caption 1 + i % 5.

    Every number that the UNet is told of a caption is the caption's; the crop's left is 3 for winners, 4 for losers,
    and 10 more for mirror images.
    """

    image_size = (48, 64)

    def __init__(self, count: int, *, mirrored: bool = False, fingerprint: str = "memory"):
        self.count, self.fingerprint = count, fingerprint
        self.shapes = Shapes((1 + mirrored, 2, 3, 8), {"encoder_hidden_states": (4, 6), "text_embeds": (5,)})

    def __len__(self):
        return self.count

    def pair(self, index):
        k, *rest = self.shapes.moments
        half = np.arange(k).reshape(-1, 1, 1, 1) / 2
        moments = np.broadcast_to(index + half, (k, *rest))
        sizes = np.array([[[500, 600, 2, 3], [700, 800, 2, 4]]], np.int32).repeat(k, 0)
        sizes[1:, :, 3] += 10
        return {
            **{"row": np.array(100 + index), "caption": np.array(1 + index % CAPTIONS), "sizes": sizes},
            **{"winner": moments.astype(jnp.bfloat16), "loser": -moments.astype(jnp.bfloat16)},
            "winner_first": np.array(True),
        }

    def conditioning(self, caption):
        assert EMPTY <= caption <= CAPTIONS
        return {name: np.full(shape, caption, jnp.bfloat16) for name, shape in self.shapes.conditioning.items()}


class BucketRecords(MemoryRecords):
    """The same pairs in three sizes, of which the first has most pairs: pair i has the size number `BUCKETS[i % 7]`."""

    SIZES = ((24, 96), (48, 48), (96, 24))  # 24 pixels per latent
    BUCKETS = (0, 1, 0, 2, 0, 1, 0)

    def buckets(self):
        found = {size: [] for size in self.SIZES}
        for index in range(self.count):
            found[self.size(index)].append(index)
        return {size: np.array(numbers) for size, numbers in found.items() if numbers}

    def size(self, index):
        return self.SIZES[self.BUCKETS[index % len(self.BUCKETS)]]

    def pair(self, index):
        pair, (height, width) = super().pair(index), self.size(index)
        k, *_, channels = self.shapes.moments
        shape = k, height // 24, width // 24, channels
        return pair | {name: np.broadcast_to(pair[name][:, :1, :1], shape) for name in ("winner", "loser")}
