"""The checks of `flax-pref verify`, each a function that yields findings."""

import importlib.util
import math
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.checkpoints.weights import abstract_network
from flax_pref.diffusion.guidance import cfg
from flax_pref.diffusion.sampler import draw_normal, image_keys
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.text_to_image import TextToImage
from flax_pref.methods import DiffusionDPO
from flax_pref.models.attention import attention
from flax_pref.models.choices import QuantizedType
from flax_pref.models.layers import GroupNorm, convolve
from flax_pref.models.platform import platform
from flax_pref.models.presets import SD15
from flax_pref.models.quantized import quantize
from flax_pref.parallel.peak import compile_and_count, measured_bandwidth, measured_peak, peak_flops
from flax_pref.planning.plan import planned_seconds
from flax_pref.planning.topologies import running_on
from flax_pref.training.networks import LoRA, trained_networks
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.step import make_step, new_state
from flax_pref.verification.findings import Finding, Setting, normal, read_recorded, relative

PACKAGES = ("flax-pref", "jax", "jaxlib", "libtpu", "flax", "optax", "numpy")
# Largest error of a kernel relative to the largest value of its float32 reference: forward, and of gradients. In 16
# bits inputs and results are rounded to 8 bits (bfloat16) or 11 (float16).
BOUNDS = {"float32": (1e-5, 1e-4), "bfloat16": (1.6e-2, 4e-2), "float16": (2e-3, 1e-2)}


def check_devices(setting: Setting) -> Iterator[Finding]:
    """Versions, devices and their memory."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    told = ", ".join(f"{name} {version}" for name, version in found.items())
    yield Finding("versions", None, told, found)
    if (hosts := jax.process_count()) > 1:
        each = multihost_utils.process_allgather(np.uint32(zlib.crc32(told.encode())))
        same = len(set(each.tolist())) == 1
        yield Finding("versions of all hosts", same, f"{'equal' if same else 'not equal'} on {hosts} hosts", {})
    devices = jax.devices()
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    processes = jax.process_count()
    told = f"{len(devices)} x {devices[0].device_kind}, {processes} process{'es' * (processes > 1)}"
    figures = {"devices": len(devices), "kind": devices[0].device_kind, "processes": jax.process_count()}
    if memory is not None:
        told, figures = f"{told}, {memory / 2**30:.1f} GiB each", figures | {"memory_bytes": memory}
    yield Finding("devices", None, told, figures)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels

# Positions, keys and size of a head: of SD1.5 and SDXL at 512 and 1024 pixels, of a text encoder, of an odd image size.
ATTENTION = (
    *((4096, 4096, 40), (1024, 1024, 80), (256, 256, 160), (64, 64, 160), (4096, 77, 40), (1024, 77, 80)),
    *((4096, 4096, 64), (1024, 1024, 64), (4096, 77, 64), (1008, 1008, 64)),
)


def check_attention(setting: Setting) -> Iterator[Finding]:
    """The attention kernel of this device for every size of head, forward and backward."""
    for length, keys, size in ATTENTION:
        drawn = normal((2, length, 2, size), 0), *(normal((2, keys, 2, size), seed) for seed in (1, 2))
        yield _kernel(f"attention {length} x {keys}, heads of {size}", attention, _reference_attention, drawn, setting)


def _reference_attention(q, k, v):
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), v)


# Side of the feature map, channels in and out, side of the kernel, stride.
CONVOLUTIONS = (
    (64, 4, 320, 3, 1),
    (32, 320, 640, 3, 1),
    (8, 1280, 1280, 3, 1),
    (16, 640, 640, 3, 2),
    (8, 1280, 640, 1, 1),
)


def check_convolutions(setting: Setting) -> Iterator[Finding]:
    """Convolutions of large and small feature maps, which may go row by row."""
    for side, ins, outs, kernel, stride in CONVOLUTIONS:
        pad = (kernel // 2, kernel // 2)
        drawn = normal((2, side, side, ins), 0), normal((kernel, kernel, ins, outs), 1) / math.sqrt(kernel**2 * ins)

        def reference(x, weights, stride=stride, pad=pad):
            layout = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(x, weights, (stride, stride), (pad, pad), dimension_numbers=layout)

        def ours(x, weights, stride=stride, pad=pad):
            return convolve(x, weights, stride, pad)

        name = f"convolution {kernel} x {kernel}, {ins} to {outs} channels at {side} x {side}, stride {stride}"
        yield _kernel(name, ours, reference, drawn, setting)


def check_norms(setting: Setting) -> Iterator[Finding]:
    """Group norm of activations whose mean is far from zero."""
    for side, channels in ((64, 320), (8, 1280)):
        layer = GroupNorm(channels, 32, epsilon=1e-5, dtype=setting.dtype)

        def reference(x, channels=channels):
            grouped = x.reshape(len(x), -1, 32, channels // 32)
            centred = grouped - grouped.mean((1, 3), keepdims=True)
            return (centred * jax.lax.rsqrt((centred**2).mean((1, 3), keepdims=True) + 1e-5)).reshape(x.shape)

        drawn = (5 + normal((2, side, side, channels), 0),)
        yield _kernel(f"group norm of {channels} channels at {side} x {side}", layer, reference, drawn, setting)


def check_quantization(setting: Setting) -> Iterator[Finding]:
    """A product with a kernel in 8 bits, made full again."""
    if importlib.util.find_spec("qwix") is None:
        yield Finding("int8", None, "qwix is not installed; pip install 'flax-pref[quantize]'", {})
        return
    bounds: dict[QuantizedType, float] = {"int8": 1.2e-2, "fp8": 6e-2}
    for to, bound in bounds.items():
        x, kernel = normal((64, 640), 0), normal((640, 640), 1)
        with jax.default_matmul_precision("highest"):
            product, expected = x @ quantize({"kernel": kernel}, to)["kernel"].astype(jnp.float32), x @ kernel
        error = relative(product, expected)
        yield Finding(to, error < bound, f"error {error:.1e}, at most {bound:.0e}", {"error": error, "bound": bound})


def _kernel(name: str, ours: Callable, reference: Callable, drawn: Sequence[np.ndarray], setting: Setting) -> Finding:
    """Errors of a kernel in the compute precision, and of its gradients, against float32 in full precision."""
    rounded = [jnp.asarray(x, setting.dtype) for x in drawn]
    started = time.perf_counter()
    with jax.default_matmul_precision("highest"):
        expected = with_gradients(reference)(*(x.astype(jnp.float32) for x in rounded))
    precision = "highest" if setting.dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        found = with_gradients(ours)(*rounded)
    forward, bounds = relative(found[0], expected[0]), BOUNDS[setting.dtype]
    backward = max(relative(a, b) for a, b in zip(found[1], expected[1], strict=True))
    told = f"error {forward:.1e}, gradients {backward:.1e}, at most {bounds[0]:.0e} and {bounds[1]:.0e}"
    figures = {"error": forward, "gradient_error": backward, "seconds": round(time.perf_counter() - started, 2)}
    return Finding(name, forward < bounds[0] and backward < bounds[1], told, figures)


def with_gradients(function: Callable) -> Callable:
    """The value of a function, and the gradients of a loss of it with respect to all arguments; jitted."""

    @jax.jit
    def run(*inputs):
        def loss(*inputs):
            out = function(*inputs).astype(jnp.float32)
            return jnp.sin(out).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, tuple(range(len(inputs))), has_aux=True)(*inputs)
        return out, gradients

    return run


# ----------------------------------------------------------------------------------------------------------------------
# Devices together


def check_collectives(setting: Setting) -> Iterator[Finding]:
    """Collectives of training and sampling, over all devices of all processes."""
    count = jax.device_count()
    mesh = Mesh(np.array(jax.devices()), ("all",))
    each = np.arange(count * count, dtype=np.float32).reshape(count, count)
    placed = jax.make_array_from_callback(
        each.shape, NamedSharding(mesh, PartitionSpec("all")), lambda index: each[index]
    )
    around = [(i, (i + 1) % count) for i in range(count)]
    alone, spread = PartitionSpec(), PartitionSpec("all")
    sends = {
        "sum": (lambda x: jax.lax.psum(x, "all"), alone, each.sum(0, keepdims=True)),
        "gather": (lambda x: jax.lax.all_gather(x, "all", tiled=True), alone, each),
        "pass on": (lambda x: jax.lax.ppermute(x, "all", around), spread, np.roll(each, 1, axis=0)),
        "sum in parts": (lambda x: jax.lax.psum_scatter(x[0], "all", tiled=True), spread, each.sum(0)),
    }
    for name, (send, placement, expected) in sends.items():
        program = jax.jit(jax.shard_map(send, mesh=mesh, in_specs=spread, out_specs=placement, check_vma=False))
        shards = program(placed).addressable_shards
        same = all(np.array_equal(shard.data, expected[shard.index]) for shard in shards)
        told = f"{'right' if same else 'not right'} over {count} devices"
        yield Finding(f"collective: {name}", same, told, {"devices": count})


def check_noise(setting: Setting) -> Iterator[Finding]:
    """The noise of images, which is the same on every machine."""
    recorded = read_recorded("noise")
    keys = image_keys([0, 7], [3, 2**32 - 1])
    bits = np.asarray(jax.vmap(lambda key: jax.random.bits(key, (4,)))(keys)).tolist()
    same = bits == recorded["bits"]
    yield Finding("noise: bits", same, f"{'equal to' if same else 'other than'} the recorded ones", {"bits": bits})
    error = relative(draw_normal(keys, 0, (4,)), np.array(recorded["normal"]))
    yield Finding("noise: normal numbers", error < 1e-5, f"error {error:.1e}, at most 1e-05", {"error": error})


# ----------------------------------------------------------------------------------------------------------------------
# Whole programs

PROMPTS = ("a large red circle in the middle, white background", "a small blue square on the left, black background")


def draw_recorded() -> np.ndarray:
    """Images of the demo model in float32, averaged over blocks of 16 x 16 pixels: `[2, 4, 4, 3]`."""
    with jax.default_matmul_precision("highest"):
        images = TextToImage(load_pipeline("demo"), steps=4, batch_size=2)(list(PROMPTS), rule=cfg(3.0), seed=1)
    return images.reshape(2, 4, 16, 4, 16, 3).mean(axis=(2, 4))


def check_drawing(setting: Setting) -> Iterator[Finding]:
    """Images of the demo model in float32."""
    error = float(np.abs(draw_recorded() - np.array(read_recorded("drawing"))).max())
    told = f"off by {255 * error:.2f} / 255, at most 2 / 255"
    yield Finding("drawing with the demo model", error < 2 / 255, told, {"error": error})


def train_recorded() -> list[float]:
    """Losses of ten steps of Diffusion-DPO on the demo model, in float32."""
    pipeline = load_pipeline("demo")
    unet, method = pipeline.unet, DiffusionDPO(beta=200.0)
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=0)
    trained, begin = trained_networks(unet, method.modules, "lora", LoRA(rank=4))
    params = jax.jit(begin)(unet.params, jax.random.key(0))
    schedule = NoiseSchedule.from_dict(pipeline.scheduler_config)
    shape = (4, unet.config.sample_size, unet.config.sample_size, unet.config.in_channels)
    winner = normal(shape, 3)
    batch = {
        **{"winner": winner, "loser": winner + 0.5 * normal(shape, 4)},
        "text": {"encoder_hidden_states": normal((4, 24, unet.config.cross_attention_dim), 5)},
    }

    def loss(params, frozen, batch, key):
        return method.loss(trained.predict(params, frozen), batch, key, schedule=schedule)

    step = jax.jit(make_step(loss, config.build(10), config.rate(10)))
    state = new_state(params, config.build(10), jax.random.key(0), averaged=False)
    losses = []
    with jax.default_matmul_precision("highest"):
        for _ in range(10):
            state, metrics = step(state, unet.params, batch)
            losses.append(float(metrics["loss"]))
    return losses


def check_training(setting: Setting) -> Iterator[Finding]:
    """Ten steps of training on the demo model in float32."""
    losses, recorded = train_recorded(), read_recorded("training")
    error = relative(np.array(losses), np.array(recorded))
    told = f"loss {losses[0]:.4f} to {losses[-1]:.4f}, off by {error:.1e} of the recorded ones, at most 1e-03"
    yield Finding("ten steps of training the demo model", error < 1e-3, told, {"losses": losses, "error": error})


def check_compilation(setting: Setting) -> Iterator[Finding]:
    """How long programs take to compile, and to load once the compilation cache has them."""
    draw, kept = TextToImage(load_pipeline("demo"), steps=2), jax.config.values["jax_compilation_cache_dir"]

    def seconds() -> float:
        jax.clear_caches()
        started = time.perf_counter()
        draw(PROMPTS[0], label="compiling")
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory() as empty:
        _keep_programs_in(empty)
        try:
            first, again = seconds(), seconds()
        finally:
            _keep_programs_in(kept)
    told = f"{first:.1f} s to the first image, {again:.1f} s with a filled cache; this machine's is {kept or 'off'}"
    yield Finding("compilation", None, told, {"first_seconds": first, "again_seconds": again, "cache": str(kept)})


def _keep_programs_in(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


def check_speed(setting: Setting) -> Iterator[Finding]:
    """A pass of Stable Diffusion 1.5's UNet with random weights, beside what matrix products and copies reach."""
    device, images = jax.local_devices()[0], 1 if platform() == "cpu" else 4
    program, shapes = unet_pass(images, setting.dtype)
    params, *inputs = jax.tree.map(lambda shape: jnp.full(shape.shape, 0.01, shape.dtype), shapes)
    compiled, flops = compile_and_count(program.lower(params, *inputs), program, params, *inputs)
    jax.block_until_ready(compiled(params, *inputs))
    rounds = []
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(compiled(params, *inputs))
        rounds.append(time.perf_counter() - started)
    seconds = sorted(rounds)[1]
    products, copies = measured_peak(dtype=setting.dtype), measured_bandwidth()
    makers, _ = peak_flops(device.device_kind, setting.dtype)
    figures = {
        **{"seconds": seconds, "images": images, "flops": flops, "dtype": setting.dtype},
        **{"products": products, "copies": copies, "peak": makers},
    }
    told = (
        f"{seconds / images:.3f} s an image in {setting.dtype}, {flops / seconds / 1e12:.2f} TFLOP/s; products reach "
        f"{products / 1e12:.2f} TFLOP/s, copies {copies / 1e9:.0f} GB/s"
    )
    if (hosts := jax.process_count()) > 1:
        each = np.sort(multihost_utils.process_allgather(np.float32(seconds / images)))
        told += f"; {each[0]:.3f} to {each[-1]:.3f} s on {hosts} hosts"
        figures["seconds_of_hosts"] = each.tolist()
    if makers is not None:
        told += f"; {flops / seconds / makers:.0%} of the maker's peak"
    slice = running_on([device])
    planned = planned_seconds(compiled.as_text(), slice) if slice is not None else 0.0
    if planned:
        told += f"; planned {planned / images:.3f} s, {seconds / planned:.2f} times as long"
        figures["planned_seconds"] = planned
    else:
        told += f"; no plan is made for {device.device_kind}"
    yield Finding("speed of Stable Diffusion 1.5's UNet", None, told, figures)


def unet_pass(images: int, dtype: str) -> tuple[Any, tuple]:
    """Stable Diffusion 1.5's UNet at 512 x 512 pixels, jitted, and the shapes of its arguments, parameters first."""
    config, network = SD15.unet, abstract_network("unet", SD15.unet, dtype)
    shapes = (
        jax.ShapeDtypeStruct((images, 64, 64, config.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((images,), jnp.int32),
        jax.ShapeDtypeStruct((images, 77, config.cross_attention_dim), jnp.float32),
    )
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), network.params)
    return jax.jit(lambda params, *inputs: nnx.merge(network.graphdef, params)(*inputs)), (params, *shapes)
