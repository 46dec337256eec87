"""A world in which rollouts compile in a moment: a linear network, a tiny autoencoder, brightness as reward.

As a program it draws an iteration of each method on all devices, and on one, and prints how far they differ.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_pref.methods import D3PO, DDPO, SPO, DiffusionNFT, OnlineMethod, TailorPO
from flax_pref.models.network import Network
from flax_pref.models.vae import AutoencoderKL, VAEConfig
from flax_pref.rewards.remote import Remote
from flax_pref.training.rollouts import Prompts, RolloutConfig, Rollouts

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULER["set_alpha_to_one"] = False  # so that the last step draws noise too
FEATURES, CHANNELS, SIZE, S = 6, 2, (8, 4), 3.0
METHODS = {
    "tailorpo": TailorPO(steps=4, guidance_scale=S, train_steps=4),
    "tailorpo-some": TailorPO(steps=4, guidance_scale=S, train_steps=(3, 2)),
    "tailorpo-g": TailorPO(steps=4, guidance_scale=S, train_steps=2, rate=(4.0, 8.0)),
    "spo": SPO(steps=4, guidance_scale=S, pool=3, skip=1),
    "d3po": D3PO(steps=4, guidance_scale=S),
    "ddpo": DDPO(steps=4, guidance_scale=S, images_per_prompt=3),
    "nft": DiffusionNFT(steps=3, guidance_scale=S, images_per_prompt=2, trained_share=0.7),
}
PROMPTS = Prompts(
    captions=[f"prompt {i}" for i in range(6)],
    ids=[7, 3, 2**31 + 5, 0, 11, 4],
    text={"hidden": np.random.default_rng(1).standard_normal((6, FEATURES), np.float32)},
    empty={"hidden": np.zeros(FEATURES, np.float32)},
)
CONFIG = RolloutConfig(prompts=8, at_once=8, batch_size=8)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "mix": rng.standard_normal((CHANNELS, CHANNELS)).astype(np.float32) / 2,
        "read": rng.standard_normal((FEATURES, CHANNELS)).astype(np.float32) / 2,
    }


def network(params, x, t, hidden):
    """`[B, H, W, C]` of `[B, H, W, C]`, `[B]` and `[B, FEATURES]`; params are weights of one network."""
    return x @ params["mix"] * (1 - t / 2000)[:, None, None, None] + (hidden @ params["read"])[:, None, None, :]


def predict_of(params, frozen):
    """What is trained is added to the base; no other network has that name."""

    def predict(networks, latents, timesteps, text):
        changed = jax.tree.map(jnp.add, frozen, params)
        rows = [
            network(frozen if name == "base" else changed, latents[:, r], timesteps, text["hidden"][:, r])
            for r, name in enumerate(networks)
        ]
        return jnp.stack(rows, axis=1)

    return predict


@functools.cache
def vae() -> Network:
    config = VAEConfig(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=CHANNELS,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    graphdef, state = nnx.split(AutoencoderKL(config, rngs=nnx.Rngs(0)))
    return Network(config, graphdef, nnx.to_pure_dict(state))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Brightness:
    """How near the mean colour of an image is to one that the caption asks for; it has weights, as scorers have."""

    colour: jax.Array = dataclasses.field(default_factory=lambda: np.float32([0.2, 0.5, 0.9]))

    name = "brightness"
    differentiable = True

    def prepare(self, captions):
        return np.float32([len(caption) + int(caption[-1]) for caption in captions])

    def view(self, images):
        return images.mean(axis=(1, 2))

    def score(self, view, prepared):
        wanted = (self.colour * prepared[:, None] / 10) % 1
        return 1 - jnp.square(view - wanted).sum(axis=1)


def judged(images, captions):
    """`Brightness` of images on the host, as a function or a service has it."""
    prepared = Brightness().prepare(captions)
    wanted = (Brightness().colour * prepared[:, None] / 10) % 1
    return 1 - np.square(images.mean(axis=(1, 2)) - wanted).sum(axis=1)


def rollouts(
    method: str | OnlineMethod,
    *,
    config=CONFIG,
    reward=None,
    seed=0,
    sharding=None,
    prompts=PROMPTS,
    predict_of=predict_of,
    tell=print,
) -> Rollouts:
    return Rollouts(
        METHODS.get(method, method),
        predict_of,
        weights(),
        vae(),
        prompts,
        reward or Brightness(),
        SCHEDULER,
        config,
        size=SIZE,
        seed=seed,
        sharding=sharding,
        tell=tell,
    )


if __name__ == "__main__":
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    divided, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(("data", "fsdp")), PartitionSpec()))
    found = {}
    for name in sys.argv[1:]:
        place, _, method = name.rpartition(":")
        reward = Remote("brightness", judged) if place == "elsewhere" else None
        one, many = rollouts(method, reward=reward), rollouts(method, sharding=divided, reward=reward)
        params = jax.tree.map(lambda x: 0.1 * x, weights(1))
        batches = [one.next(params), many.next(jax.device_put(params, whole))]
        pairs = [(one.arrays()[name], many.arrays()[name]) for name in one.arrays()]
        pairs += zip(*map(jax.tree.leaves, batches), strict=True)
        found[name] = {
            "difference": max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs),
            "on_each_device": sorted({x.addressable_shards[0].data.shape[0] for _, x in pairs if x.ndim}),
        }
    print(json.dumps(found))
