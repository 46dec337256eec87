import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import tiny_step
from jax.sharding import AbstractMesh, PartitionSpec
from jax.tree_util import keystr

from flax_pref.models.unet import UNetConfig
from flax_pref.parallel.mesh import TRAINING_AXES, make_mesh
from flax_pref.parallel.sharding import attention_heads, batch_sharding, like_params, partition, shardings

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
RESNET = "mid_block.resnets.1"
HEADS = {640: 10, 1280: 20}
MESH = AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        (f"{BLOCK}.attn1.to_q.kernel", (640, 640), ("fsdp", "tensor")),
        (f"{BLOCK}.attn2.to_k.kernel", (2048, 640), ("fsdp", "tensor")),
        (f"{BLOCK}.attn2.to_v.lora_a", (1, 2048, 256), (None, "fsdp", None)),
        (f"{BLOCK}.attn2.to_v.lora_b", (1, 512, 640), (None, "fsdp", "tensor")),
        (f"{BLOCK}.attn1.to_out.0.kernel", (640, 640), ("tensor", "fsdp")),
        (f"{BLOCK}.attn1.to_out.0.bias", (640,), (None,)),
        (f"{BLOCK}.attn1.to_out.0.lora_a", (1, 640, 8), (None, "tensor", None)),
        (f"{BLOCK}.ff.net.0.proj.kernel", (640, 5120), ("fsdp", "tensor")),
        (f"{BLOCK}.ff.net.0.proj.bias", (5120,), ("tensor",)),
        (f"{BLOCK}.ff.net.2.kernel", (2560, 640), ("tensor", "fsdp")),
        (f"{BLOCK}.norm2.scale", (640,), (None,)),
        (f"{RESNET}.conv1.kernel", (3, 3, 2560, 1280), (None, None, "fsdp", "tensor")),
        (f"{RESNET}.conv2.kernel", (3, 3, 1280, 1280), (None, None, "tensor", "fsdp")),
        (f"{RESNET}.norm2.scale", (1280,), ("tensor",)),
        (f"{RESNET}.time_emb_proj.kernel", (1280, 1280), ("fsdp", "tensor")),
        (f"{RESNET}.conv_shortcut.kernel", (1, 1, 2560, 1280), (None, None, "fsdp", None)),
        ("conv_in.kernel", (3, 3, 4, 320), (None,) * 4),
        ("time_embedding.linear_1.kernel", (320, 1283), ("fsdp", None)),
        ("time_embedding.linear_1.kernel", (1281, 1283), (None, None)),
    ],
)
@pytest.mark.parametrize("prefix", ["", "dpo.unet."])
def test_parameters_are_divided_by_their_place_in_the_network(prefix, path, shape, spec):
    assert partition(prefix + path, shape, MESH, heads=HEADS) == PartitionSpec(*spec)


def test_attention_is_divided_in_whole_heads_or_not_at_all():
    mesh = AbstractMesh((4,), ("tensor",))
    kernels = {size: partition(f"{BLOCK}.attn1.to_q.kernel", (size, size), mesh, heads=HEADS) for size in HEADS}
    assert kernels == {640: PartitionSpec(None, None), 1280: PartitionSpec(None, "tensor")}
    with pytest.raises(ValueError, match=r"to_q.kernel has 320 channels, .* pass heads=attention_heads\(config\)"):
        partition(f"{BLOCK}.attn1.to_q.kernel", (320, 320), mesh, heads=HEADS)


def test_heads_are_those_of_every_level_of_the_network():
    assert attention_heads(UNetConfig()) == {320: 8, 640: 8, 1280: 8}
    assert attention_heads(UNetConfig(attention_head_dim=(5, 10, 20, 8))) == {320: 5, 640: 10, 1280: 4}


def test_on_a_mesh_without_their_axes_parameters_are_whole():
    for path in (f"{BLOCK}.attn1.to_q.kernel", f"{RESNET}.conv1.kernel"):
        assert partition(path, (640, 640), AbstractMesh((8,), ("data",))) == PartitionSpec(None, None)


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("data",), ("data",)),
        (("data", "fsdp", "tensor"), ("data", "fsdp")),
        (("fsdp",), ("fsdp",)),
        (("tensor",), ()),
    ],
)
def test_batches_are_divided_over_all_axes_that_take_images(axes, spec):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape((1,) * len(axes)), axes)
    assert batch_sharding(mesh).spec == PartitionSpec(spec)


def test_what_an_optimizer_keeps_of_a_parameter_is_divided_like_it():
    mesh = AbstractMesh((4,), ("fsdp",))
    params = {"square": np.zeros((8, 8), np.float32), "wide": {"kernel": np.zeros((3, 8, 16), np.float32)}}

    def specs(state):
        placed = like_params(state, params, mesh, min_size=64)
        return {keystr(path): sharding.spec for path, sharding in jax.tree.leaves_with_path(placed)}

    rows_and_columns = jax.eval_shape(optax.scale_by_factored_rms(min_dim_size_to_factor=8).init, params)
    assert specs(rows_and_columns) == {
        ".count": PartitionSpec(),
        ".v_row['square']": PartitionSpec("fsdp"),
        ".v_row['wide']['kernel']": PartitionSpec(None, None),
        ".v_col['square']": PartitionSpec(None),
        ".v_col['wide']['kernel']": PartitionSpec(None, "fsdp"),
        ".v['square']": PartitionSpec(),
        ".v['wide']['kernel']": PartitionSpec(),
    }
    other = {"average": params, "square": np.zeros((8, 9), np.float32)}
    assert specs(other) == {
        "['average']['square']": PartitionSpec("fsdp", None),
        "['average']['wide']['kernel']": PartitionSpec(None, None, "fsdp"),
        "['square']": PartitionSpec(),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Eight devices

ALL_AXES = "data=2,fsdp=2,tensor=2"
MESHES = {"full": ("data=8", "data=2,fsdp=4", "fsdp=8", ALL_AXES), "lora": (ALL_AXES,)}
OPTIMIZERS = {"adam": tiny_step.ADAM, "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8)}


def whole_leaves(tree) -> list[str]:
    """Large leaves that a device has all of; moments of rows and columns are never large."""
    return [
        f"{keystr(path)} {leaf.shape}"
        for path, leaf in jax.tree.leaves_with_path(tree)
        if leaf.size >= tiny_step.MIN_SIZE and leaf.addressable_shards[0].data.size == leaf.size
        if not re.search("v_row|v_col", keystr(path))
    ]


def drawn(shapes: tiny_step.Inputs) -> tiny_step.Inputs:
    """Arrays of the shapes, with an optimizer state as new."""
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32), shapes._replace(key=None))
    optimizer = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.optimizer)
    return values._replace(optimizer=optimizer, key=jax.random.key(0))


def on_devices() -> dict:
    """Losses, differences between parameters and leaves that are whole, as JSON knows it."""
    jax.config.update("jax_disable_most_optimizations", True)  # the compiler takes a third of the time
    report: dict = {"steps": {}, "moved": {}, "whole": {}}
    for lora in (True, False):
        step, results = tiny_step.Step(lora), {}
        values = drawn(step.inputs(8))
        for text in ("data=1", *MESHES["lora" if lora else "full"]):
            mesh = make_mesh(text, jax.devices()[: 1 if text == "data=1" else 8], TRAINING_AXES)
            inputs = jax.device_put(values, step.shardings(mesh))
            trained, optimizer, gradients, metrics = step.compile(mesh, 8)(*inputs)
            results[text] = jax.device_get((trained, metrics["loss"]))
            if "fsdp" in text:
                name = f"{'lora' if lora else 'full'} {text}"
                report["whole"][name] = whole_leaves((trained, optimizer, gradients))
        (one, loss), *others = results.values()
        report["steps"]["lora" if lora else "full"] = {
            text: [
                abs(float(loss - other_loss)),
                max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)),
            ]
            for text, (other, other_loss) in zip(MESHES["lora" if lora else "full"], others, strict=True)
        }
        moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (one, values.trained)), strict=True)]
        report["moved"]["lora" if lora else "full"] = float(max(moved))
        for name, tx in OPTIMIZERS.items():
            report["whole"][f"{'lora' if lora else 'full'} {name}"] = begun(step, tx)
    return report


def begun(step: tiny_step.Step, tx: optax.GradientTransformation) -> list[str]:
    """The leaves of a new optimizer state that are whole."""
    mesh = make_mesh("fsdp=8", jax.devices(), TRAINING_AXES)
    how = {"min_size": tiny_step.MIN_SIZE}
    divided = shardings(step.trained, mesh, **how)
    params = jax.tree.map(lambda x, s: jax.device_put(np.zeros(x.shape, x.dtype), s), step.trained, divided)
    placed = like_params(jax.eval_shape(tx.init, params), params, mesh, **how)
    state = jax.jit(tx.init, out_shardings=placed)(params)
    return whole_leaves((params, state))


@pytest.fixture(scope="module")
def report():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-W", "error", __file__]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.program
def test_a_step_on_any_mesh_is_that_of_one_device(report):
    print(report["steps"], report["moved"])
    assert min(report["moved"].values()) > 1e-3, "or else the same parameters say nothing"
    for what, meshes in report["steps"].items():
        assert set(meshes) == set(MESHES[what])
        for text, (loss, params) in meshes.items():
            assert max(loss, params) < 1e-5, (what, text)


@pytest.mark.program
def test_no_device_has_all_of_a_large_leaf_of_parameters_gradients_or_optimizer(report):
    assert len(report["whole"]) == 8
    assert {name: leaves for name, leaves in report["whole"].items() if leaves} == {}


if __name__ == "__main__":
    print(json.dumps(on_devices()))
