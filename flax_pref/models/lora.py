"""Low-rank adapters (arXiv:2106.09685) as a bank: M named modules that share one backbone.

An adapted layer computes `x W + (alpha / r) x A_m B_m`, where `m` is the module that the row of the batch belongs to.
A batch holds the same rows for each image, one image after another, so that base, positive and negative predictions
take *one* pass through the backbone: `x W` is one product over the whole batch, only the rows of modules pay for the
adapters, and where a mesh splits the batch, all rows of an image stay on one device.

    add_lora(unet, ("pos", "neg"), rank=8, alpha=8, rngs=rngs)
    set_rows(unet, ("base", "base", "pos", "neg"))
    noise_pred = unet(latents, timesteps, encoder_hidden_states)  # a batch of 8: two images of four rows
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from flax_pref.models.layers import Conv, Keys, Linear, normal
from flax_pref.models.platform import CACHED, platform, unless_differentiated
from flax_pref.models.quantized import at_use
from flax_pref.models.tree import flatten_dict

BASE = "base"  # the network without adapters
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # every projection of every attention
LEAVES = ("lora_a", "lora_b")
LONG = 1024  # positions from which CPUs take the rows of one module at a time

Rows = tuple[str, ...]  # the network of each row of an image


# ----------------------------------------------------------------------------------------------------------------------
# Layers


class AdaptedRows(NamedTuple):
    """Neighbouring adapted rows in groups of one size: rows `start ... start + len(indices) * size` of an image."""

    start: int
    size: int
    indices: tuple[int, ...]


def adapted_rows(rows: Rows, modules: Sequence[str]) -> list[AdaptedRows]:
    """The adapted rows in as few runs as possible; one run is one batched product."""
    runs, start = [], 0
    for network, group in itertools.groupby(rows):
        count = len(list(group))
        if network != BASE:
            index = modules.index(network)
            previous = runs[-1] if runs else None
            if previous and previous.size == count and previous.start + len(previous.indices) * count == start:
                runs[-1] = previous._replace(indices=(*previous.indices, index))
            else:
                runs.append(AdaptedRows(start, count, (index,)))
        start += count
    return runs


class LoRALayer(nnx.Module):
    """What adapted layers have in common; made from a layer, whose parameters keep their place and name.

    `lora_a [M, ..., in, r]` is drawn from N(0, 1 / r^2) and `lora_b [M, r, out]` is zero: a new module is the base
    network (section 4.1; the spread of A is that of diffusers' training scripts, `init_lora_weights="gaussian"`). All
    modules of a bank begin with the same A, as fully trained networks begin with the same weights: in the difference of
    a positive and a negative module, what both have learned in common then cancels.
    """

    def __init__(self, layer: Linear | Conv, modules: Sequence[str], *, rank: int, alpha: float, param_dtype, rngs):
        self.kernel = layer.kernel
        self.bias = layer.bias
        self.dtype = layer.dtype
        *fan_in, features = layer.kernel.get_value().shape
        a = normal(rngs.params(), (*fan_in, rank), 1 / rank, param_dtype)
        self.lora_a = nnx.LoRAParam(jnp.tile(a, (len(modules), *(1,) * a.ndim)))
        self.lora_b = nnx.LoRAParam(jnp.zeros((len(modules), rank, features), param_dtype))
        self.modules = tuple(modules)
        self.scale = alpha / rank
        self.rows: Rows | None = None

    def down(self, x: jax.Array, a: jax.Array) -> jax.Array:
        """Applies one A to each group of rows: `[n, m, c, ..., in] -> [n, m, c, ..., r]`."""
        raise NotImplementedError

    def layout(self, x: jax.Array) -> tuple[int, Rows]:
        """How many images a batch holds, and the rows of each.

        Raises:
            ValueError: it cannot be divided into rows, or they are not set.
        """
        if self.rows is None:
            raise ValueError(f"LoRA: no rows are set for modules {self.modules}; call set_rows(module, rows) first")
        if x.shape[0] % len(self.rows):
            raise ValueError(f"LoRA: a batch of {x.shape[0]} is no multiple of the {len(self.rows)} rows {self.rows}")
        return x.shape[0] // len(self.rows), self.rows

    def adapt(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Adds the modules' deltas to the base output `y [B, ..., out]` of `x [B, ..., in]`."""
        shape, (images, rows) = y.shape, self.layout(x)
        x = x.astype(self.dtype).reshape(images, len(rows), *x.shape[1:])
        y = y.reshape(images, len(rows), *shape[1:])
        for start, count, indices in adapted_rows(rows, self.modules):
            stop = start + count * len(indices)
            # Slices of static bounds, no gather: XLA joins them again where they are neighbours.
            a, b = (
                jnp.concatenate([bank[...][i : i + 1] for i in indices]).astype(self.dtype)
                for bank in (self.lora_a, self.lora_b)
            )
            low_rank = self.down(x[:, start:stop].reshape(images, len(indices), count, *x.shape[2:]), a)
            delta = self.scale * jnp.einsum("nmc...r,mro->nmc...o", low_rank, b)
            # Padding fuses with the addition, and its gradient is a slice; an update in place would be a scatter.
            padding = ((0, 0), (start, len(rows) - stop), *((0, 0),) * (y.ndim - 2))
            y = y + jnp.pad(delta.reshape(images, stop - start, *y.shape[2:]), padding)
        return y.reshape(shape)


class LoRALinear(LoRALayer, Linear):
    """`Linear` with a bank of adapters: `lora_a [M, in, r]`, `lora_b [M, r, out]`."""

    def down(self, x: jax.Array, a: jax.Array) -> jax.Array:
        """`[n, m, c, ..., in], [m, in, r] -> [n, m, c, ..., r]`."""
        return jnp.einsum("nmc...i,mir->nmc...r", x, a)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, ..., in] -> [B, ..., out]`."""
        if platform() == "tpu":
            graphdef, params = nnx.split(self)

            def inference(params, x):
                return nnx.merge(graphdef, params).in_one_product(x)

            def training(params, x):
                return nnx.merge(graphdef, params).adding(x)

            return unless_differentiated(inference, training)(params, x)
        many = x.ndim > 2 and x.shape[1] >= LONG
        return self.by_group(x) if many and platform() == "cpu" else self.adding(x)

    def adding(self, x: jax.Array) -> jax.Array:
        """The layer's own output plus the deltas of its adapters, `[B, ..., in] -> [B, ..., out]`."""
        return self.adapt(x, Linear.__call__(self, x))

    def in_one_product(self, x: jax.Array) -> jax.Array:
        """`[B, ..., in] -> [B, ..., out]` as one product `[x, x A_1, x A_2, ...] [W; B_1; B_2; ...]`.

        `x A_m` is zero in rows of other networks.

        For TPUs, whose matrix units add faster than another pass over all numbers would, unless a gradient is asked
        for. Two transformer blocks of SDXL with two modules on v5e, in million cycles outside of their kernels: 6 x 64
        x 64 x 640 13.0 and by `adding` 19.9, 6 x 32 x 32 x 1280 7.9 and 10.1; one of SD1.5, 6 x 64 x 64 x 320 3.0 and
        4.1. With gradients, 2 x 32 x 32 x 1280 9.1 and 8.3.
        """
        images, rows = self.layout(x)
        x, kernel, rank = x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.lora_b.get_value().shape[1]
        used = [i for i, name in enumerate(self.modules) if name in rows]
        if used:
            a, b = (
                [bank[...][i].astype(self.dtype) for i in used] for bank in (self.lora_a, self.scale * self.lora_b[...])
            )
            low_rank = x @ jnp.concatenate(a, axis=-1)
            if len(set(rows)) > 1:
                own = np.array([[network == self.modules[i] for i in used] for network in rows])
                own = np.tile(np.repeat(own, rank, axis=1), (images, 1)).reshape(len(x), *(1,) * (x.ndim - 2), -1)
                low_rank = jnp.where(own, low_rank, 0)
            x, kernel = jnp.concatenate([x, low_rank], axis=-1), jnp.concatenate([kernel, *b])
        y = x @ kernel
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)

    def by_group(self, x: jax.Array) -> jax.Array:
        """The same as one product for each group of rows, with weights that contain its adapter.

        For CPUs and many positions: to add a low-rank product to rows that have left the cache takes as long as the
        layer itself, and the weights that this makes are small beside the rows.
        """
        images, rows = self.layout(x)
        x = x.astype(self.dtype).reshape(images, len(rows), *x.shape[1:])
        kernel, products, start = self.kernel[...].astype(self.dtype), [], 0
        bias = 0 if self.bias is None else self.bias[...].astype(self.dtype)
        for network, group in itertools.groupby(rows):
            stop = start + len(list(group))
            own = x[:, start:stop]
            if network == BASE:
                products.append(own @ kernel + bias)
            else:
                i = self.modules.index(network)
                a, b = (bank[...][i].astype(self.dtype) for bank in (self.lora_a, self.lora_b))
                products.append(adapted_product(own, kernel, self.scale * a, b) + bias)
            start = stop
        y = jnp.concatenate(products, axis=1)
        return y.reshape(-1, *y.shape[2:])


@jax.custom_vjp
def adapted_product(x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`x (W + A B)`, `[..., in] -> [..., out]`, with gradients of A and B that never form that of their product."""
    # Weights made here are for here: without the barrier XLA would make those of all layers once and keep them.
    x, a = jax.lax.optimization_barrier((x, a))
    return x @ (kernel + a @ b)


def _forward(x, kernel, a, b):
    return adapted_product(x, kernel, a, b), (x, kernel, a, b)


def _backward(known, gradient):
    x, kernel, a, b = known
    flat, g = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return (gradient @ (kernel + a @ b).T, flat.T @ g, flat.T @ (g @ b.T), (flat @ a).T @ g)


adapted_product.defvjp(_forward, _backward)


class LoRAConv(LoRALayer, Conv):
    """`Conv` with a bank of adapters: `lora_a [M, kh, kw, in, r]`, `lora_b [M, r, out]`.

    As in PEFT, A is a convolution with the layer's kernel size, stride and padding, and B is 1x1.
    """

    def __init__(self, layer: Conv, modules: Sequence[str], **kinds):
        super().__init__(layer, modules, **kinds)
        self.stride = layer.stride
        self.padding = layer.padding

    def down(self, x: jax.Array, a: jax.Array) -> jax.Array:
        """`[n, m, c, H, W, in], [m, kh, kw, in, r] -> [n, m, c, H', W', r]`."""
        n, _, c, *image = x.shape
        convolved = [
            jax.lax.conv_general_dilated(
                x[:, i].reshape(n * c, *image),
                a[i],
                window_strides=(self.stride, self.stride),
                padding=(self.padding, self.padding),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            for i in range(len(a))
        ]
        return jnp.stack([y.reshape(n, c, *y.shape[1:]) for y in convolved], axis=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, in] -> [B, H', W', out]`."""
        return self.adapt(x, Conv.__call__(self, x))


# ----------------------------------------------------------------------------------------------------------------------
# Modules


def add_lora(
    module: nnx.Module,
    modules: Sequence[str],
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = DEFAULT_TARGETS,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs | Keys,
) -> None:
    """Replaces the targeted layers of `module` by adapted ones, in place; works on abstract modules too.

    Args:
        module: a network, or part of one.
        modules: names of the M adapters, e.g. `("pos", "neg")`.
        rank: r.
        alpha: the deltas are scaled by `alpha / rank`.
        targets: names of `Linear` and `Conv` layers, or the ends of their dotted paths: `"to_q"`, `"ff.net.2"`,
            `"mid_block.resnets.0.conv1"`.
        param_dtype: of the adapters, whatever the backbone is kept in.
        rngs: draws A from its `params` stream.

    Raises:
        ValueError: a module's name is taken, a target names no layer, or a layer has adapters already.
    """
    if BASE in modules or len(set(modules)) != len(modules) or not modules or isinstance(modules, str):
        raise ValueError(f"add_lora: modules={modules!r} must be a tuple of different names, none of them {BASE!r}")
    if rank < 1:
        raise ValueError(f"add_lora: rank={rank!r} must be at least 1")
    layers = {path: layer for path, layer in nnx.iter_modules(module) if isinstance(layer, Linear | Conv)}
    chosen = {
        target: [path for path in layers if f".{'.'.join(map(str, path))}".endswith(f".{target}")] for target in targets
    }
    for target, paths in chosen.items():
        if not paths:
            known = ", ".join(sorted({".".join(map(str, _ending(path))) for path in layers}))
            raise ValueError(f"add_lora: target {target!r} is no linear layer or convolution; there are: {known}")
    for path in dict.fromkeys(itertools.chain.from_iterable(chosen.values())):
        layer = layers[path]
        if isinstance(layer, LoRALayer):
            raise ValueError(
                f"add_lora: layer {'.'.join(map(str, path))!r} has adapters {layer.modules} already; "
                "name all modules in one call"
            )
        kinds: dict[str, Any] = {"rank": rank, "alpha": float(alpha), "param_dtype": param_dtype, "rngs": rngs}
        adapted = (
            LoRALinear(layer, modules, **kinds) if isinstance(layer, Linear) else LoRAConv(layer, modules, **kinds)
        )
        _replace(module, path, adapted)


def _ending(path: tuple) -> tuple:
    """The part of a layer's path that tells its role: from the last attribute name on."""
    last = max(i for i, key in enumerate(path) if not isinstance(key, int))
    return path[last:]


def _replace(module: Any, path: tuple, layer: nnx.Module) -> None:
    for key in path[:-1]:
        module = module[key] if isinstance(key, int) else getattr(module, key)
    if isinstance(path[-1], int):
        module[path[-1]] = layer
    else:
        setattr(module, path[-1], layer)


def set_rows(module: nnx.Module, rows: Rows) -> None:
    """Says which network each row of an image belongs to, in all adapted layers of `module`, in place.

    To be called on a freshly merged module while jax traces; until then adapted layers refuse to run.

    Args:
        module: a network after `add_lora`.
        rows: the network of each row of an image, e.g. `("base", "base", "pos", "pos")`; rows of one network beside
            each other take one product.

    Raises:
        ValueError: a network is neither "base" nor a module of the bank.
    """
    layers = [layer for _, layer in nnx.iter_modules(module) if isinstance(layer, LoRALayer)]
    known = (BASE, *dict.fromkeys(name for layer in layers for name in layer.modules))
    for network in rows:
        if network not in known:
            raise ValueError(f"set_rows: no network {network!r} in rows {rows}; this one has {', '.join(known)}")
    for layer in layers:
        layer.rows = tuple(rows)


def rows_of_an_image(module: nnx.Module) -> int:
    """How many neighbouring rows of a batch make an image for the adapters of a module; 1 if it has none."""
    layers = (layer for _, layer in nnx.iter_modules(module) if isinstance(layer, LoRALayer))
    return next((len(layer.rows) for layer in layers if layer.rows is not None), 1)


# ----------------------------------------------------------------------------------------------------------------------
# Parameters


def split_lora(params: dict) -> tuple[dict, dict]:
    """Splits nested parameters into those of the backbone and those of the adapters, `(base, lora)`."""
    flat = flatten_dict(params)
    lora = {path: leaf for path, leaf in flat.items() if path[-1] in LEAVES}
    base = {path: leaf for path, leaf in flat.items() if path[-1] not in LEAVES}
    return unflatten_dict(base), unflatten_dict(lora)


def join_lora(base: dict, lora: dict) -> dict:
    """The inverse of `split_lora`."""
    return unflatten_dict(flatten_dict(base) | flatten_dict(lora))


def stack_lora(banks: Sequence[dict]) -> dict:
    """One bank of adapters that were trained apart; its modules are those of `banks`, in order.

    The modules of a bank share `alpha / rank`: train them with the same, or multiply `lora_b` by the ratio.

    Raises:
        ValueError: the banks differ in adapted layers, rank or shapes.

    Example:
        >>> unet = fp.load_pipeline("demo").unet
        >>> pos, neg = (fp.load_lora(f"{name}.safetensors", unet)[0] for name in ("pos", "neg"))
        >>> bank = fp.stack_lora([pos, neg])
    """
    shapes = [jax.tree.map(lambda leaf: leaf.shape[1:], bank) for bank in banks]
    if differing := [i for i, shape in enumerate(shapes) if shape != shapes[0]]:
        raise ValueError(
            f"stack_lora: bank {differing[0]} differs from bank 0 in its adapted layers or in its rank; "
            "modules of one bank need the same targets and rank"
        )
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *banks)


def select_lora(lora: dict, index: int) -> dict:
    """The bank of M = 1 that holds module `index` of `lora`."""
    return jax.tree.map(lambda leaf: leaf[index : index + 1], lora)


def merge_lora(params: dict, modules: Sequence[str], weights: Mapping[str, float], *, alpha: float) -> dict:
    """Merges adapters into the weights: `theta + sum_k weight_k (alpha / r) A_k B_k`, in float32.

    The result belongs to the network as it was before `add_lora`. `{"pos": w}` strengthens or weakens one module;
    `{"pos": w, "neg": -w}` is the contrast of two.

    Args:
        params: nested parameters of a network with adapters.
        modules: names of its M adapters, as given to `add_lora`.
        weights: of the modules; those not named count nothing.
        alpha: as given to `add_lora`.

    Raises:
        ValueError: a weight is for an unknown module, or `modules` are not as many as the bank has.
    """
    if unknown := sorted(weights.keys() - set(modules)):
        raise ValueError(f"merge_lora: no module {unknown[0]!r}; this bank has {', '.join(modules)}")
    base, lora = (flatten_dict(part) for part in split_lora(params))
    for (*path, leaf), a in lora.items():
        if leaf != "lora_a":
            continue
        if len(a) != len(modules):
            raise ValueError(f"merge_lora: {len(modules)} modules {tuple(modules)} for a bank of {len(a)}")
        b, kernel = lora[*path, "lora_b"], base[*path, "kernel"]
        factors = jnp.array([weights.get(name, 0.0) * alpha / a.shape[-1] for name in modules], jnp.float32)
        delta = jnp.einsum(
            "m,m...r,mro->...o",
            factors,
            a.astype(jnp.float32),
            b.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        base[*path, "kernel"] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    return unflatten_dict(base)


def combine_lora(
    lora: dict, modules: Sequence[str], weights: Mapping[str, float], *, alpha: float
) -> tuple[dict, float]:
    """One module that does what several do together: the delta `sum_k weight_k (alpha / r) A_k B_k`, exactly.

    Its matrices are those of the modules side by side, so its rank is the sum of theirs: PGD-merge and cPGD-merge
    (arXiv:2602.18799) as a file that any program can load, see `checkpoints.lora.save_lora`.

    Args:
        lora: nested parameters of M modules; see `split_lora`.
        modules: their names.
        weights: of the modules; those not named are left out.
        alpha: as given to `add_lora`.

    Returns:
        nested parameters of M = 1 module, and its alpha.

    Raises:
        ValueError: a weight is for an unknown module, or there is none.

    Example:
        cPGD-merge with w = 2, as one LoRA file:

        >>> unet = fp.load_pipeline("demo").unet
        >>> (pos, rank, alpha), (neg, _, _) = (fp.load_lora(f"{name}.safetensors", unet) for name in ("pos", "neg"))
        >>> bank = fp.stack_lora([pos, neg])
        >>> merged, alpha = fp.combine_lora(bank, ("pos", "neg"), {"pos": 2.0, "neg": -2.0}, alpha=alpha)
        >>> fp.save_lora(merged, "merged.safetensors", alpha=alpha)
        >>> fp.load_lora("merged.safetensors", unet)[1]  # its rank, the sum of theirs
        4
    """
    if not weights or weights.keys() - set(modules):
        raise ValueError(f"combine_lora: weights for {sorted(weights)}; expected some of {', '.join(modules)}")
    indices = [modules.index(name) for name in weights]
    factors = jnp.array(list(weights.values()), jnp.float32)[:, None, None]
    combined = {}
    for path, leaf in flatten_dict(lora).items():
        chosen = leaf[jnp.array(indices)]
        if path[-1] == "lora_b":  # [M, r, out]: ranks one below another
            combined[path] = (factors * chosen).reshape(1, -1, leaf.shape[-1])
        else:  # [M, ..., in, r]: ranks side by side
            combined[path] = jnp.moveaxis(chosen, 0, -2).reshape(1, *leaf.shape[1:-1], -1)
    return unflatten_dict(combined), alpha * len(indices)


def bank_predict(graphdef: nnx.GraphDef, params: dict) -> Callable:
    """A network with its adapters as one function, `predict(networks, latents, timesteps, text) -> noise_pred`.

    `networks` names the network of each of R rows, `("base", "base", "pos", "pos")`; latents are `[B, R, H, W, C]`,
    timesteps `[B]` (an image's rows share it), and text the other arguments of the UNet by name, `[B, R, ...]` each:
    see `diffusion.conditioning`. To be called while jax traces. It is what samplers and methods take; a UNet without
    adapters is a bank of "base" alone. For networks with weights of their own see `models.bank`.
    """

    def predict_rows(params, networks, latents, timesteps, text):
        module = nnx.merge(graphdef, params)
        set_rows(module, networks)
        timesteps = jnp.repeat(timesteps, len(networks))
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (latents, text))
        return module(flat[0], timesteps, **flat[1]).reshape(latents.shape)

    def predict(networks, latents, timesteps, text):
        inputs, predictions, start = at_use(params, latents, text), [], 0
        for group in _at_once(params, networks, latents):
            rows = slice(start, start := start + len(group))
            own_params, *whole = inputs
            own_latents, own_text = jax.tree.map(lambda x, rows=rows: x[:, rows], whole)
            predictions.append(predict_rows(own_params, group, own_latents, timesteps, own_text))
            # Without the barrier XLA may begin with all groups at once, whose activations would meet in memory.
            inputs, _ = jax.lax.optimization_barrier((inputs, predictions[-1]))
        return jnp.concatenate(predictions, axis=1)

    return predict


def project_text(graphdef: nnx.GraphDef, params: dict, networks: Rows, text: dict) -> dict:
    """Text for `bank_predict`, for the same networks, whose layers find their keys and values of the prompts in it.

    A sampler whose steps see the same prompts makes them once, outside of its loop.

    Args:
        graphdef: of a UNet, perhaps with adapters.
        params: its parameters.
        networks: of each of R rows.
        text: as `bank_predict` takes it.
    """
    params, text = at_use(params, text)
    module = nnx.merge(graphdef, params)
    set_rows(module, networks)
    states = text["encoder_hidden_states"]
    projected = module.project_text(states.reshape(-1, *states.shape[2:]))
    in_rows = jax.tree.map(lambda x: x.reshape(*states.shape[:2], *x.shape[1:]), projected)
    return {**text, "encoder_hidden_states": in_rows}


def _at_once(params: dict, networks: Rows, latents: jax.Array) -> list[Rows]:
    """Groups of rows that go through the network together: all of them, but on CPUs those of one network.

    There rows gain nothing from each other, and lose as soon as their activations leave the cache.
    """
    width = params["conv_in"]["kernel"].shape[-1]
    activations = 4 * width * latents.size // latents.shape[-1]  # bytes, at full resolution
    if platform() == "cpu" and 2 * activations > CACHED:  # read and written
        return [tuple(group) for _, group in itertools.groupby(networks)]
    return [networks]
