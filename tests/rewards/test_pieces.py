"""Rewards whose weights lie in pieces on the devices of a mesh."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from flax_pref.parallel.pieces import piece_spec

MESH = AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((1280, 5120), (None, ("fsdp", "tensor"))),
        ((49408, 1024), (("fsdp", "tensor"),)),
        ((14, 14, 3, 1280), (None, None, None, ("fsdp", "tensor"))),
        ((1283, 1024), (None, ("fsdp", "tensor"))),
        ((1283, 1284), ()),  # 8 divides neither
        ((1280,), ()),  # small
        ((), ()),
    ],
)
def test_a_weight_is_divided_in_its_largest_dimension_that_can_be(shape, spec):
    assert piece_spec(shape, MESH) == PartitionSpec(*spec)
    assert piece_spec(shape, AbstractMesh((8,), ("data",))) == PartitionSpec()


PROGRAM = """
import sys
from pathlib import Path
import jax, numpy as np
from flax import nnx
from PIL import Image
from flax_pref.evaluation.run_scoring import score_runs
from flax_pref.evaluation.score_flags import ScoreFlags
from flax_pref.models.network import Network
from flax_pref.models.vae import AutoencoderKL, VAEConfig
from flax_pref.parallel import pieces
from flax_pref.parallel.mesh import TRAINING_AXES, make_mesh
from flax_pref.parallel.sharding import batch_sharding
from flax_pref.rewards.decoded import score_gradients, score_latents
from flax_pref.rewards.reward import Weighted, make_reward
from training.tiny import tiny_scorer

folder = Path(sys.argv[1])
clip = str(tiny_scorer(folder / "clip"))
pieces.MIN_SIZE = 32  # elements: these networks are small
whole, mesh = (make_mesh(text, jax.devices(), TRAINING_AXES) for text in ("data=4", "fsdp=2,tensor=2"))

# Weights are read into pieces.
rewards = [Weighted("pickscore", path=clip), Weighted("clip", 0.5, path=clip)]
divided = make_reward(rewards, place=pieces.in_pieces(mesh))
leaves = jax.tree.leaves(divided)
share = sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(leaf.size for leaf in leaves)
assert all(len(leaf.sharding.device_set) == 4 for leaf in leaves) and 0.25 < share < 0.35, share

# Latents.
config = VAEConfig(block_out_channels=(4,), latent_channels=2, norm_num_groups=2, mid_block_add_attention=False)
graphdef, state = nnx.split(AutoencoderKL(config, rngs=nnx.Rngs(0)))
vae = Network(config, graphdef, nnx.to_pure_dict(state))
latents = np.random.default_rng(0).standard_normal((4, 16, 16, 2)).astype(np.float32)
told = divided.prepare(["a", "b", "cat", "dog"])

def of(function, reward, sharding):
    run = jax.jit(lambda *x: function(x[0], vae._replace(params=x[1]), x[2], x[3], sharding=sharding))
    put = (lambda x: x) if sharding is None else (lambda x: jax.device_put(x, sharding))
    return np.asarray(run(reward, vae.params, put(latents), jax.tree.map(put, told)))

# Not to the last bit: "tensor" divides no images, so that a device has another number of them. A gradient is a sum of
# numbers as large as the largest one, each rounded by 1.2e-7 of itself; four roundings are allowed.
for function, rounding in ((score_latents, 1e-7), (score_gradients, 5e-7)):
    one, many = of(function, make_reward(rewards), batch_sharding(whole)), of(function, divided, batch_sharding(mesh))
    assert np.abs(one).max() > 0
    np.testing.assert_allclose(many, one, rtol=1e-5, atol=rounding * np.abs(one).max())

# Folders of images.
images = folder / "images"
images.mkdir()
for number in range(6):
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(images / f"{number}.png")
    (images / f"{number}.txt").write_text("cat")
found = []
for text in ("data=4", "fsdp=-1", "fsdp=2,tensor=2"):
    flags = ScoreFlags(runs=(str(images),), rewards=(f"pickscore={clip}",), mesh=text)
    (scores,) = score_runs(flags)[str(images)].values()
    found.append(np.asarray(scores))
    (images / "scores.parquet").unlink()
assert np.isfinite(found[0]).all() and found[0].std() > 0
np.testing.assert_array_equal(found[1], found[0])
np.testing.assert_array_equal(found[2], found[0])
"""


def test_scores_are_the_same_with_weights_in_pieces(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
