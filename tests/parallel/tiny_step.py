"""A step of Diffusion-DPO with a tiny UNet, on a mesh of choice; adapters are trained, or all weights."""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.methods import DiffusionDPO
from flax_pref.models.lora import add_lora, bank_predict, join_lora, split_lora
from flax_pref.models.unet import UNet2DCondition, UNetConfig
from flax_pref.parallel.sharding import attention_heads, batch_sharding, like_params, shardings

# Attention in the middle alone: it has every kind of layer, and compiles in half the time.
CONFIG = UNetConfig(
    block_out_channels=(8,),
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    layers_per_block=1,
    cross_attention_dim=8,
    attention_head_dim=4,
    norm_num_groups=4,
)
MIN_SIZE = 32  # elements; small enough for adapters of rank 4
SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
# Of the size of the gradients: a sign is no smooth function, and would not agree between meshes.
ADAM = optax.adam(1e-2, eps=1e-3)


class Inputs(NamedTuple):
    """Of a step: arrays, their shapes or their shardings."""

    trained: Any
    optimizer: Any
    frozen: Any
    batch: Any
    key: Any


class Step:
    """Gradients and an update.

    Attributes:
      trained: shapes of what is trained: all weights, or adapters ("lora").
      frozen: of the other parameters: the reference's, or the backbone's.
    """

    def __init__(self, lora: bool, tx: optax.GradientTransformation = ADAM):
        def build():
            unet = UNet2DCondition(CONFIG, rngs=nnx.Rngs(0))
            if lora:
                add_lora(unet, ("dpo",), rank=4, alpha=4, rngs=nnx.Rngs(1))
            return unet

        self.graphdef, state = nnx.split(nnx.eval_shape(build))
        params = nnx.to_pure_dict(state)
        self.frozen, self.trained = split_lora(params) if lora else (params, params)
        self.lora, self.tx = lora, tx

    def inputs(self, images: int) -> Inputs:
        """Shapes, with a batch of so many pairs."""
        latents = jax.ShapeDtypeStruct((images, 4, 4, 4), np.float32)
        text = {"encoder_hidden_states": jax.ShapeDtypeStruct((images, 3, 8), np.float32)}
        return Inputs(
            self.trained,
            jax.eval_shape(self.tx.init, self.trained),
            self.frozen,
            {"winner": latents, "loser": latents, "text": text},
            jax.eval_shape(jax.random.key, 0),
        )

    def shardings(self, mesh: Mesh) -> Inputs:
        """Of the inputs."""
        how = {"heads": attention_heads(CONFIG), "min_size": MIN_SIZE}
        shapes = self.inputs(1)
        return Inputs(
            shardings(shapes.trained, mesh, **how),
            like_params(shapes.optimizer, shapes.trained, mesh, **how),
            shardings(shapes.frozen, mesh, **how),
            jax.tree.map(lambda _: batch_sharding(mesh), shapes.batch),
            NamedSharding(mesh, PartitionSpec()),
        )

    def predict(self, trained, frozen):
        if self.lora:
            return bank_predict(self.graphdef, join_lora(frozen, trained))
        networks = {"dpo": bank_predict(self.graphdef, trained), "base": bank_predict(self.graphdef, frozen)}
        return lambda rows, *args: networks[rows[0]](("base",) * len(rows), *args)

    def __call__(self, trained, optimizer, frozen, batch, key):
        """`(trained, optimizer, gradients, metrics)`."""

        def loss(trained):
            return DiffusionDPO(beta=100.0).loss(self.predict(trained, frozen), batch, key, schedule=SCHEDULE)

        gradients, metrics = jax.grad(loss, has_aux=True)(trained)
        updates, optimizer = self.tx.update(gradients, optimizer, trained)
        return optax.apply_updates(trained, updates), optimizer, gradients, metrics

    def compile(self, mesh: Mesh, images: int) -> jax.stages.Compiled:
        """Ahead of time."""
        shardings, whole = self.shardings(mesh), NamedSharding(mesh, PartitionSpec())
        shapes = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self.inputs(images),
            shardings,
        )
        results = (shardings.trained, shardings.optimizer, shardings.trained, whole)
        with jax.set_mesh(mesh):
            return jax.jit(self.__call__, out_shardings=results).lower(*shapes).compile()
