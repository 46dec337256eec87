"""LoRA files of diffusers, kohya's sd-scripts and PEFT, in and out, and networks with a bank of adapters.

A file holds one module: two matrices for each adapted layer of a UNet, with two more axes if it is a convolution.

    layout      lora_a [r, in]                         lora_b [out, r]                        alpha
    diffusers   unet.<layer>.lora_A.weight             unet.<layer>.lora_B.weight             in the metadata
    kohya       lora_unet_<layer>.lora_down.weight     lora_unet_<layer>.lora_up.weight       lora_unet_<layer>.alpha
    peft        base_model.model.<layer>.lora_A.weight base_model.model.<layer>.lora_B.weight in adapter_config.json

diffusers reads the first two. ComfyUI, A1111 and sd-scripts read kohya's only, and PEFT its own only: a folder with
adapter_model.safetensors and adapter_config.json.

In kohya's layout the dots of `<layer>` are underscores, and layers of SDXL go by the names of the original code
(`input_blocks_4_1_proj_in`), as in the files that sd-scripts writes. Reading takes both names for every network.

Files of other programs may adapt text encoders too, under `text_encoder.` and `text_encoder_2.`, or `lora_te_`,
`lora_te1_` and `lora_te2_`: `checkpoints.modules` applies these.
"""

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save

from flax_pref.checkpoints.module_info import STRENGTH, ModuleInfo
from flax_pref.checkpoints.original import unet_layers
from flax_pref.checkpoints.weights import FLOAT8, KERNEL_AXES, SafeTensors
from flax_pref.files import read_json, replacing, unique_keys, write_json
from flax_pref.models.layers import Keys
from flax_pref.models.lora import DEFAULT_TARGETS, LEAVES, LoRALayer, add_lora, join_lora, merge_lora, stack_lora
from flax_pref.models.network import Network
from flax_pref.models.tree import flatten_dict
from flax_pref.models.unet import UNetConfig

T = TypeVar("T")

# ----------------------------------------------------------------------------------------------------------------------
# Networks


def lora_network(
    network: Network,
    modules: Sequence[str],
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = DEFAULT_TARGETS,
    key: jax.Array,
) -> Network:
    """The network with a bank of new adapters, which change nothing yet; arguments as in `models.lora.add_lora`.

    `network` stays as it is: its graphdef is the one for the weights that `merge_lora` returns.
    """
    module = _adapted(network, modules, rank, alpha, targets, key)
    graphdef, state = nnx.split(module)
    return network._replace(graphdef=graphdef, params=nnx.to_pure_dict(state))


def _adapted(network: Network, modules, rank, alpha, targets, key) -> nnx.Module:
    module = nnx.merge(network.graphdef, network.params)
    add_lora(module, modules, rank=rank, alpha=alpha, targets=targets, rngs=Keys(key))
    return module


# What a module is made of: a file, or several with a strength each, whose deltas add up.
Files = str | Path | Sequence[tuple[str | Path, float]]


def parts_of(files: Files) -> list[tuple[Path, float]]:
    """Files of a module with their strengths; that of a single one is 1."""
    single = isinstance(files, str | Path)
    return [(Path(files), 1.0)] if single else [(Path(file), strength) for file, strength in files]


def load_lora_network(network: Network, files: Mapping[str, Files], *, with_text: bool = False) -> Network:
    """The network with a bank of stored adapters, e.g. `{"pos": "pos.safetensors", "neg": "neg.safetensors"}`.

    The bank's rank is the largest of the modules, and its alpha is its rank: the scales `alpha / rank` of the files are
    multiplied into B, and smaller ranks are filled up with zeros. Files are read as by `load_lora`. A module of several
    files, `{"pos": [("a.safetensors", 0.8), ("b.safetensors", 0.5)]}`, has the sum of their ranks.

    Args:
        network: the UNet, without adapters.
        files: of each module.
        with_text: whether files may adapt text encoders too, or these alone. Their weights are left to the caller; a
            module without any for the UNet has an adapter that changes nothing, so that its rows share the batch.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no files, a file is not understood or does not fit the network, or the network has adapters already.
    """
    if not files:
        raise ValueError("load_lora_network: files is empty, expected a file for each module")
    read: dict[Path, dict[tuple, Adapter]] = {}
    for file, _ in (part for parts in files.values() for part in parts_of(parts)):
        if file not in read:
            read[file] = _read_adapters(file, network, "unet" if with_text else None)
    stored = {name: _sum([(read[file], x) for file, x in parts_of(parts)]) for name, parts in files.items()}
    adapted = {path: adapter for adapters in stored.values() for path, adapter in adapters.items()}
    if not adapted:  # all modules adapt text encoders alone
        kernels = {path[:-1]: x for path, x in flatten_dict(network.params).items() if path[-1] == "kernel"}
        path, (fan_in, features) = next((path, x.shape) for path, x in kernels.items() if x.ndim == 2)
        adapted = {path: Adapter(np.zeros((fan_in, 1), np.float32), np.zeros((1, features), np.float32), 1.0)}
    # What a module leaves alone has an adapter that changes nothing.
    idle = {path: Adapter(np.zeros_like(a[..., :1]), np.zeros_like(b[:1]), 1.0) for path, (a, b, _) in adapted.items()}
    rank = max((adapter.rank for adapters in stored.values() for adapter in adapters.values()), default=1)
    lora = stack_lora([_bank(_even(idle | adapters, rank)) for adapters in stored.values()])
    targets = sorted(map(_dotted, adapted))
    key = jax.random.key(0)  # of shapes only
    module = nnx.eval_shape(lambda: _adapted(network, tuple(files), rank, rank, targets, key))
    return network._replace(graphdef=nnx.split(module)[0], params=join_lora(network.params, lora))


def merge_lora_network(network: Network, bank: Network, weights: Mapping[str, float]) -> Network:
    """The network with a bank's adapters merged into its weights, `theta + sum_k weight_k delta_k`.

    `{"dpo": w}` is PGD-merge and `{"pos": w, "neg": -w}` cPGD-merge (arXiv:2602.18799); `save_pipeline` writes the
    result as a checkpoint that needs no adapters.

    Args:
        network: as it was before it got adapters.
        bank: the same with adapters; see `load_lora_network`.
        weights: of the modules; those not named count nothing.

    Raises:
        ValueError: the bank has no adapters, or not one of these modules.
    """
    layers = (layer for _, layer in nnx.iter_modules(nnx.merge(bank.graphdef, bank.params)))
    layer = next((layer for layer in layers if isinstance(layer, LoRALayer)), None)
    if layer is None:
        raise ValueError("merge_lora_network: the bank has no adapters, expected a network of load_lora_network")
    alpha = layer.scale * layer.lora_b.get_value().shape[1]
    return network._replace(params=merge_lora(bank.params, layer.modules, weights, alpha=alpha))


# ----------------------------------------------------------------------------------------------------------------------
# Names

# How the names of A and of B end in the layouts that are written.
LAYOUTS = {
    "diffusers": (".lora_A.weight", ".lora_B.weight"),
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
}
# The programs that read them.
READERS = {
    "diffusers": "diffusers",
    "kohya": "ComfyUI, A1111, sd-scripts and diffusers",
    "peft": "PEFT",
}
# Where a run writes its module NAME.
FILE_NAMES = {"diffusers": "{}.safetensors", "kohya": "{}_kohya.safetensors", "peft": "{}_peft"}
PEFT_WEIGHTS, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
PEFT_FILES = {PEFT_WEIGHTS, PEFT_CONFIG, "README.md"}
PAIRS = (
    *LAYOUTS.values(),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),  # diffusers before PEFT, in text encoders
    (".lora.down.weight", ".lora.up.weight"),  # diffusers before PEFT
    ("_lora.down.weight", "_lora.up.weight"),  # and before that: `<attention>.processor.to_q_lora.down.weight`
)
ALPHA = ".alpha"
# What a name holds by its ending, and the ending of the name that has to be there too.
ENDINGS = {a: "lora_a" for a, _ in PAIRS} | {b: "lora_b" for _, b in PAIRS} | {ALPHA: "alpha"}
PARTNERS = dict(PAIRS) | {b: a for a, b in PAIRS} | {ALPHA: LAYOUTS["kohya"][0]}

# How names end in files of adapters that are no plain LoRA, see `checkpoints.lycoris`.
OTHER_ENDINGS = (
    *("lora_mid.weight", "dora_scale", "lora_magnitude_vector.weight", "lora_magnitude_vector"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
    *("diff", "diff_b", "w_norm", "b_norm", "on_input"),
)
# The networks of a checkpoint that a file may adapt, by the names of their folders in the layout of diffusers.
Part = Literal["unet", "text_encoder", "text_encoder_2"]
# Names of weights of text encoders; all others are the UNet's. PEFT and LyCORIS do not say which text encoder of two
# they adapted. CLIPTextModel of transformers 5 lacks the "text_model." of other versions.
TEXT_NAMES: dict[Part, re.Pattern] = {
    "text_encoder": re.compile(
        r"lora_te1?_|text_encoder\.|(base_model\.model\.|lycoris_)(text_model|encoder|text_projection)[._]"
    ),
    "text_encoder_2": re.compile(r"lora_te2_|text_encoder_2\."),
}
TEXT_PREFIXES: dict[Part, tuple[str, ...]] = {
    "text_encoder": ("lora_te_", "lora_te1_", "text_encoder.", PEFT_PREFIX, "lycoris_"),
    "text_encoder_2": ("lora_te2_", "text_encoder_2."),
}
# Why a weight has no place here, by its name.
REFUSED = (
    (
        "|".join(f"^({names.pattern})" for names in TEXT_NAMES.values()),
        "text encoder adapters are applied by --module and load_modules alone: take a file that adapts the UNet alone",
    ),
    (
        "|".join(rf"\.{re.escape(ending)}$" for ending in OTHER_ENDINGS),
        "the file is no plain LoRA: load it with load_modules, which gives such a module weights of its own",
    ),
    (r"oft_|lambda_layer", "OFT, BOFT and T-LoRA are not supported: train or save it as another kind"),
    (
        "|".join(f"{re.escape(ending)}$" for ending in ENDINGS),
        "this network has no such layer: check that the file was made for it",
    ),
    (
        "",
        "expected names such as unet.<layer>.lora_A.weight or lora_unet_<layer>.lora_down.weight: take a file of plain "
        "LoRA from diffusers, kohya's sd-scripts or PEFT",
    ),
)


def part_of(name: str) -> Part:
    """The network that a weight of a file of adapters belongs to."""
    for part, names in TEXT_NAMES.items():
        if names.match(name):
            return part
    return "unet"


def _kohya_names(layers: Iterable[str], config: UNetConfig) -> dict[str, str]:
    """Names of layers in files of sd-scripts: for SDXL after the original code, for SD1.5 and SD2 after diffusers."""
    names = {layer: layer for layer in layers}
    if config.addition_embed_type == "text_time":
        names = unet_layers(names, config)
    return {layer: _flat(name) for layer, name in names.items()}


def _flat(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


def layers_by_name(network: Network, leaves: Sequence[str] = ("kernel",), part: Part = "unet") -> dict[str, tuple]:
    """The path of each layer by all names that it may have in a file.

    Args:
        network: the UNet or a text encoder.
        leaves: what a layer has to have: kernels are those of linear layers and convolutions, scales of norms.
        part: which of the networks of a checkpoint it is.
    """
    paths = {_dotted(path[:-1]): path[:-1] for path in flatten_dict(network.params) if path[-1] in leaves}
    if part != "unet":
        return _text_layers(paths, TEXT_PREFIXES[part])
    original = unet_layers(paths, network.config)
    names = {}
    for layer, path in paths.items():
        processor = re.sub(r"\.(to_q|to_k|to_v|to_out)(\.0)?$", r".processor.\1", layer)
        dotted = (layer, f"unet.{layer}", processor, f"unet.{processor}", f"{PEFT_PREFIX}{layer}")
        flat = (_flat(layer), _flat(original[layer]), _flat(layer).replace("lora_unet_", "lycoris_", 1))
        names |= dict.fromkeys((*dotted, *flat, f"diffusion_model.{original[layer]}"), path)
    return names


def _text_layers(paths: Mapping[str, tuple], prefixes: Sequence[str]) -> dict[str, tuple]:
    """`layers_by_name` of a text encoder."""
    names = {}
    for layer, path in paths.items():
        # Older versions of diffusers had the UNet's names of projections: `self_attn.to_q_lora.down.weight`.
        old = re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", layer)
        for own in (layer, old, layer.removeprefix("text_model.")):
            names |= {prefix + (own if prefix.endswith(".") else own.replace(".", "_")): path for prefix in prefixes}
    return names


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


# ----------------------------------------------------------------------------------------------------------------------
# Writing

METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration, as JSON
# What PEFT's own adapter_config.json says of plain LoRA, beside rank, alpha and layers.
PEFT_DEFAULTS = {
    "peft_type": "LORA",
    "base_model_name_or_path": None,
    "task_type": None,
    "inference_mode": True,
    "bias": "none",
    "lora_dropout": 0.0,
    "init_lora_weights": True,
    "use_dora": False,
    "use_rslora": False,
}
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def save_lora(
    lora: dict,
    file: str | Path,
    *,
    alpha: float,
    dtype=jnp.float32,
    layout: str = "diffusers",
    config: UNetConfig | None = None,
    info: ModuleInfo | None = None,
) -> None:
    """Writes one module; the file or folder appears under its name only when it is complete.

    A, B and alpha are stored as they are, so that `load_lora` gives back the same numbers; multiplying `alpha / rank`
    into B would be exact for powers of two only.

    The layout decides who can read the file:

    - "diffusers": `load_lora_weights` of diffusers. Alpha is in the metadata; older versions, which do not read it,
      take alpha to be the rank. ComfyUI and A1111 know none of these names and change nothing.
    - "kohya": ComfyUI, A1111, sd-scripts, and `load_lora_weights` of diffusers. Alpha is a tensor of each layer.
    - "peft": `PeftModel.from_pretrained(unet, folder)` of PEFT. A folder with two files; alpha is in the config.

    Args:
        lora: nested parameters of M = 1 module; see `split_lora` and `select_lora`.
        file: e.g. `pos.safetensors`; for "peft" a folder. Replaced if it exists.
        alpha: as given to `add_lora`. Kohya's layout keeps it in float32.
        dtype: of the stored matrices: float32, float16 or bfloat16.
        layout: "diffusers", "kohya" or "peft".
        config: of the UNet; kohya's names depend on it, and so does what `info` tells.
        info: how the module was made, for the file's metadata.

    Raises:
        FileExistsError: the folder for "peft" holds other than an adapter of PEFT.
        ValueError: `lora` is not one module of one rank, a number is not finite in `dtype`, or an argument is none of
            those above.

    Example:
        >>> unet = fp.load_pipeline("demo").unet
        >>> lora, rank, alpha = fp.load_lora("pos.safetensors", unet)
        >>> fp.save_lora(lora, "pos_kohya.safetensors", alpha=alpha, layout="kohya", config=unet.config)
    """
    file, dtype = Path(file), jnp.dtype(dtype)
    if layout not in LAYOUTS:
        raise ValueError(f"{file}: layout={layout!r}, expected {' or '.join(map(repr, LAYOUTS))}")
    if dtype.name not in DTYPES.values():
        raise ValueError(f"{file}: dtype={dtype.name}, expected {' or '.join(DTYPES.values())}")
    if not _is_scale(alpha):
        raise ValueError(f"{file}: alpha={alpha!r}, expected a positive number")
    adapters = _one_module(file, lora)
    rank = next(len(b) for _, b in adapters.values())
    try:
        if layout != "kohya":
            prefix = PEFT_PREFIX if layout == "peft" else "unet."
            names = {layer: prefix + layer for layer in adapters}
        elif config is not None:
            names = _kohya_names(adapters, config)
        else:
            raise ValueError("layout='kohya' without config, expected the UNetConfig, for names depend on it")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error

    tensors, metadata = {}, {"format": "pt"}
    for layer, (a, b) in adapters.items():
        b = b.reshape((1,) * (a.ndim - 2) + b.shape)  # of a convolution: 1x1
        for ending, matrix in zip(LAYOUTS[layout], (a, b), strict=True):
            # safetensors writes the bytes of a transposed array in the wrong order without complaint.
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(matrix.transpose(KERNEL_AXES[matrix.ndim]), dtype)
            if not np.isfinite(array).all():
                raise ValueError(
                    f"{file}: weight {names[layer] + ending!r} is not finite in {dtype.name}; expected finite numbers: "
                    "save as float32, and if that fails too, look at the training run"
                )
            tensors[names[layer] + ending] = array
    peft = {"r": rank, "lora_alpha": float(alpha), "target_modules": sorted(adapters)}
    if layout == "peft":
        if file.exists() and not (file.is_dir() and {path.name for path in file.iterdir()} <= PEFT_FILES):
            raise FileExistsError(f"{file}: exists and is no adapter of PEFT; choose another folder or remove it")
        with replacing(file) as unfinished:
            unfinished.mkdir()
            (unfinished / PEFT_WEIGHTS).write_bytes(_serialized(tensors, metadata))
            write_json(unfinished / PEFT_CONFIG, PEFT_DEFAULTS | peft)
            if file.exists():  # a folder takes the place of none only
                shutil.rmtree(file)
        return
    if layout == "kohya":
        tensors |= {name + ALPHA: np.array(alpha, np.float32) for name in names.values()}
    else:
        metadata[METADATA] = json.dumps({f"unet.{key}": value for key, value in peft.items()})
    if info is not None and config is not None:
        weights = _serialized(tensors, {})
        content = weights[8 + int.from_bytes(weights[:8], "little") :]
        rank = len(next(iter(adapters.values()))[1])
        metadata |= info.metadata(config, rank=rank, alpha=alpha, weights=content)
    with replacing(file) as unfinished:
        unfinished.write_bytes(_serialized(tensors, metadata))


def tell_strength(file: str | Path, w: float) -> None:
    """Writes the strength that was chosen for a module into its file, as `flax_pref.w` of the metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged.
    """
    tensors, metadata = read_adapter_file(Path(file))
    with replacing(Path(file)) as unfinished:
        unfinished.write_bytes(_serialized(tensors, {**metadata, STRENGTH: f"{w:g}"}))


def _serialized(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, the same at each call: the library writes metadata in an order of chance."""
    data = save(dict(tensors))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": metadata, **json.loads(data[8:end])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def _one_module(file: Path, lora: dict) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`a [..., in, r]` and `b [r, out]` of each layer in float32."""
    flat = flatten_dict(lora)
    layers = {path[:-1] for path in flat}
    expected = {(*path, leaf) for path in layers for leaf in LEAVES}
    ranks = {leaf.shape[-1 if path[-1] == "lora_a" else 1] for path, leaf in flat.items() if path in expected}
    if not flat or flat.keys() != expected or len(ranks) != 1 or {len(leaf) for leaf in flat.values()} != {1}:
        raise ValueError(
            f"{file}: expected the adapters of one module, lora_a [1, ..., r] and lora_b [1, r, out] of one rank for "
            "each layer; split_lora takes them from the parameters of a network, and select_lora one module from a bank"
        )
    module = {}
    for path in sorted(layers, key=_dotted):
        module[_dotted(path)] = tuple(np.asarray(flat[*path, leaf][0], np.float32) for leaf in LEAVES)
    return module


def _is_scale(value) -> bool:
    # Of float32; by comparison, for integers in a damaged file may be too large to become floats.
    return not isinstance(value, str | bool | list | dict | None) and bool(1e-37 < value < 3e38)


# ----------------------------------------------------------------------------------------------------------------------
# Reading

INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


class Adapter(NamedTuple):
    """A layer's adapter in float32: `a [..., in, r]`, `b [r, out]`; the delta is `alpha / r A B`."""

    a: np.ndarray
    b: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        """The rank r."""
        return len(self.b)


def load_lora(file: str | Path, network: Network) -> tuple[dict, int, float]:
    """Reads one module from a file of `save_lora`, diffusers (any version), kohya's sd-scripts or PEFT.

    Alpha is what the file says, and the rank where it says nothing; what PEFT writes needs the adapter_config.json
    beside it, whose r, lora_alpha, rank_pattern, alpha_pattern and use_rslora count. Layers may differ in rank and
    alpha: then `alpha / rank` is multiplied into B, and smaller ranks are filled up with zeros, which change nothing.

    Args:
        file: a safetensors file, or a folder of PEFT.
        network: the UNet that the file was made for, with or without adapters; names and shapes are held against it.

    Returns:
        (nested parameters of M = 1 module in float32, rank, alpha).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or a pickle, holds other than plain LoRA for a UNet, or does not fit the
            network.

    Example:
        >>> pipeline = fp.load_pipeline("demo")
        >>> lora, rank, alpha = fp.load_lora("pos.safetensors", pipeline.unet)
        >>> rank, alpha
        (2, 2.0)
    """
    adapters = _read_adapters(Path(file), network)
    if len({(adapter.rank, adapter.alpha) for adapter in adapters.values()}) > 1:
        adapters = _even(adapters, max(adapter.rank for adapter in adapters.values()))
    first = next(iter(adapters.values()))
    return _bank(adapters), first.rank, first.alpha


def _even(adapters: Mapping[tuple, Adapter], rank: int) -> dict[tuple, Adapter]:
    """The same deltas with this rank and with alpha = rank."""
    even = {}
    for path, (a, b, alpha) in adapters.items():
        more = rank - len(b)
        a = np.pad(a, ((0, 0),) * (a.ndim - 1) + ((0, more),))
        b = np.pad(b * np.float32(alpha / len(b)), ((0, more), (0, 0)))
        even[path] = Adapter(a, b, float(rank))
    return even


def _sum(parts: Sequence[tuple[Mapping[tuple, Adapter], float]]) -> dict[tuple, Adapter]:
    """The adapters with the sum of deltas times strengths: ranks side by side."""
    if len(parts) == 1 and parts[0][1] == 1:
        return dict(parts[0][0])
    found: dict[tuple, list[Adapter]] = {}
    for adapters, strength in parts:
        for path, (a, b, alpha) in adapters.items():
            found.setdefault(path, []).append(Adapter(a, b * np.float32(strength * alpha / len(b)), float(len(b))))
    return {
        path: Adapter(
            np.concatenate([adapter.a for adapter in adapters], axis=-1),
            np.concatenate([adapter.b for adapter in adapters]),
            float(sum(adapter.rank for adapter in adapters)),
        )
        for path, adapters in found.items()
    }


def _bank(adapters: Mapping[tuple, Adapter]) -> dict:
    leaves = {path: dict(zip(LEAVES, (adapter.a, adapter.b), strict=True)) for path, adapter in adapters.items()}
    return unflatten_dict({(*path, leaf): jnp.asarray(x)[None] for path in leaves for leaf, x in leaves[path].items()})


def _read_adapters(file: Path, network: Network, part: Part | None = None) -> dict[tuple, Adapter]:
    """The adapters of the UNet; `part` as in `read_adapter_file`."""
    if (file / PEFT_CONFIG).is_file() and (file / PEFT_WEIGHTS).is_file():
        file = file / PEFT_WEIGHTS
    stored, metadata = read_adapter_file(file, part)
    check_family(file, stored, network)
    peft = peft_settings(file, stored, metadata)
    kernels = flatten_dict(network.params)
    adapters = {}
    for path, names in _names_by_layer(file, stored, network).items():
        *kernel_size, fan_in, features = kernels[*path, "kernel"].shape
        a, b = (stored[names[leaf]] for leaf in LEAVES)
        rank = max((1, *a.shape[:1]))
        a = _matrix(file, names["lora_a"], a, (rank, fan_in, *kernel_size))
        b = _matrix(file, names["lora_b"], b, (features, rank, *(1 for _ in kernel_size)))
        b = b.reshape(rank, features)
        alpha = rank if peft is None else peft.alpha_of(_dotted(path), rank, names["lora_a"])
        if "alpha" in names:
            if peft is not None and peft.alpha is not None:
                raise ValueError(
                    f"{file}: {names['alpha']!r} and {peft.source} both give alpha; expected one of them: download or "
                    "export the file again"
                )
            alpha = _stored_alpha(file, names["alpha"], stored[names["alpha"]])
        if not float(np.abs(b).max()) * alpha / rank < float(np.finfo(np.float32).max):
            raise ValueError(
                f"{file}: alpha={alpha:g} makes {names['lora_b']!r} too large for float32; the file is damaged: "
                "download or export it again"
            )
        adapters[path] = Adapter(a, b, float(alpha))
    return adapters


def read_adapter_file(file: Path, part: Part | None = None) -> tuple[dict[str, np.ndarray], Mapping[str, str]]:
    """The tensors of a file, all finite, and its metadata; of one network of the checkpoint alone where it is named."""
    if file.is_dir():
        raise ValueError(
            f"{file}: is a folder, expected a safetensors file of LoRA weights: name a file in it; or one of PEFT, "
            f"with {PEFT_CONFIG} and {PEFT_WEIGHTS}"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a safetensors file of LoRA weights")
    if file.suffix.lower() in PICKLES:
        raise ValueError(
            f"{file}: refused, for a {file.suffix} file is a pickle, which can run code while it is read; expected "
            "safetensors: ask its author for that, or convert it where it can do no harm, with "
            "torch.load(file, weights_only=True) and safetensors.torch.save_file"
        )
    stored = {}
    try:
        with SafeTensors(file) as tensors:
            metadata, names = tensors.metadata(), list(tensors.keys())
            for name in names:
                if part not in (None, part_of(name)):
                    continue
                dtype = tensors.get_slice(name).get_dtype()
                numbers = (*DTYPES, *FLOAT8)
                expected = (*numbers, *INTEGERS, "F64") if name.endswith((ALPHA, ".on_input")) else numbers
                if dtype not in expected:
                    raise ValueError(
                        f"{file}: weight {name!r} has dtype {dtype}, expected {' or '.join(expected)}; if the file is "
                        "not damaged, save it as float32"
                    )
                stored[name] = tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: not a complete safetensors file ({_one_line(error)}): download or export it again"
        ) from error
    if not names:
        raise ValueError(f"{file}: holds no weights, expected those of a LoRA: download or export it again")
    for name, array in stored.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"{file}: weight {name!r} holds NaN or infinity, expected finite numbers; the file is damaged or its "
                "training failed: take another"
            )
    return stored, metadata


# ----------------------------------------------------------------------------------------------------------------------
# PEFT's configuration

# Settings under which a delta is not `alpha / r A B` or `alpha / sqrt(r) A B`, or not all that is trained.
UNSUPPORTED = (
    *("lora_bias", "use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config", "modules_to_save", "trainable_token_indices"),
    "target_parameters",
)
# Others, e.g. pissa and olora, take the adapter's first weights out of those of the base.
KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")


MAGNITUDES = ("dora_scale", "lora_magnitude_vector")  # of DoRA, in files of LyCORIS and of PEFT


class PeftSettings(NamedTuple):
    """What PEFT's configuration says of the scale of adapters.

    Attributes:
        source: for messages.
        file: that holds it.
        rank: r, of layers that no pattern of `ranks` names; None where it is not said.
        alpha: likewise.
        ranks: rank by pattern of a layer's name.
        alphas: alpha by pattern.
        rslora: whether deltas are `alpha / sqrt(r) A B` (arXiv:2312.03732), not `alpha / r A B`.
        dora: whether the weights are DoRA, with magnitudes.
    """

    source: str
    file: Path
    rank: int | None
    alpha: float | None
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool

    def alpha_of(self, layer: str, rank: int, name: str) -> float:
        """Alpha of a layer such that its delta is `alpha / rank A B`.

        Raises:
            ValueError: its matrices have another rank than the configuration says; `name` is that of the first.
        """
        expected = _of_layer(layer, self.ranks, self.rank)
        if expected not in (None, rank):
            raise ValueError(
                f"{self.file}: weight {name!r} has rank {rank}, but {self.source} says {expected}; they do not belong "
                "together: download or export both again"
            )
        alpha = _of_layer(layer, self.alphas, self.alpha)
        if alpha is None:
            return rank
        return alpha * math.sqrt(rank) if self.rslora else alpha


def _of_layer(layer: str, patterns: Mapping[str, T], default: T) -> T:
    """Value of the first pattern that names a layer; PEFT matches it with the end of the name, after a dot."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer)), default)


def peft_settings(
    file: Path, stored: Iterable[str], metadata: Mapping[str, str], part: Part = "unet"
) -> PeftSettings | None:
    """PEFT's configuration from the metadata, as diffusers writes it, or from the file beside; None: neither.

    Args:
        file: with the weights.
        stored: names of those of one network.
        metadata: of the file.
        part: the network.

    Raises:
        ValueError: it is damaged, not supported, or does not fit the weights.
    """
    inside = beside = None
    if METADATA in metadata:
        try:
            values = json.loads(metadata[METADATA], object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{file}: {METADATA!r} in the metadata is not valid JSON ({_one_line(error)}): download or export the "
                "file again"
            ) from error
        if not isinstance(values, dict):
            raise ValueError(
                f"{file}: {METADATA!r} in the metadata is no JSON object, expected PEFT's configuration: download or "
                "export the file again"
            )
        values = {
            key.removeprefix(f"{part}."): value
            for key, value in values.items()
            if "." not in key or key.startswith(f"{part}.")
        }
        inside = _parse_peft(file, f"{METADATA!r} in the metadata", values)
    config = file.with_name(PEFT_CONFIG)
    of_peft = file.name == PEFT_WEIGHTS or any(name.startswith(PEFT_PREFIX) for name in stored)
    alone = inside is None and not any(name.endswith(ALPHA) for name in stored)
    if config.is_file() and (of_peft or alone):
        beside = _parse_peft(config, PEFT_CONFIG, read_json(config, expected="the configuration of a PEFT adapter"))
    elif of_peft and alone:
        raise ValueError(
            f"{file}: weights of PEFT without {PEFT_CONFIG}, which has the alpha that they are scaled by; expected it "
            "beside them: copy the whole folder that save_pretrained of PEFT has written"
        )
    if inside and beside and inside[2:] != beside[2:]:
        raise ValueError(
            f"{file}: {METADATA!r} in the metadata says other ranks or alphas than {config}; expected one of them: "
            "export the adapter again"
        )
    found = beside or inside
    if (
        found is not None
        and found.dora
        and stored
        and not any(name.removesuffix(".weight").endswith(MAGNITUDES) for name in stored)
    ):
        raise ValueError(
            f"{found.file}: 'use_dora' is set, but {file} has no lora_magnitude_vector; they do not belong together: "
            "download or export both again"
        )
    return found


def _parse_peft(file: Path, source: str, config: Mapping[str, Any]) -> PeftSettings:
    where = "" if source == PEFT_CONFIG else " in the metadata"
    if config.get("peft_type") not in (None, "LORA"):
        raise ValueError(
            f"{file}: peft_type={config['peft_type']!r:.80}{where} is not supported; expected 'LORA': train plain LoRA"
        )
    used = [key for key in UNSUPPORTED if config.get(key)]
    used += ["bias"] if config.get("bias") not in (None, "none") else []
    used += ["init_lora_weights"] if config.get("init_lora_weights") not in KEEP_THE_BASE else []
    if used:
        raise ValueError(
            f"{file}: {used[0]!r}{where} is not supported (it is {config[used[0]]!r:.80}); expected plain LoRA: train "
            "or save it as such"
        )
    ranks, alphas = ({} if (given := config.get(key)) is None else given for key in ("rank_pattern", "alpha_pattern"))
    for key, patterns, expected, fits in (
        ("rank_pattern", ranks, "integers", _is_rank),
        ("alpha_pattern", alphas, "positive numbers", _is_scale),
    ):
        if not isinstance(patterns, dict) or not all(map(fits, patterns.values())) or not all(map(_is_regex, patterns)):
            raise ValueError(
                f"{file}: {key!r}{where} is {patterns!r:.80}, expected {expected} by patterns of layer names: download "
                "or export the file again"
            )
    rank, alpha, rslora = (config.get(key) for key in ("r", "lora_alpha", "use_rslora"))
    for key, value, fits, expected in (
        ("r", rank, _is_rank, "positive integer"),
        ("lora_alpha", alpha, _is_scale, "positive number"),
        ("use_rslora", rslora, lambda value: isinstance(value, bool), "boolean"),
    ):
        # PEFT's defaults, r = 8 and alpha = 8, are those of no adapter that says nothing: its files say it.
        missing = value is None and (key == "use_rslora" or source != PEFT_CONFIG)
        if not missing and not fits(value):
            raise ValueError(
                f"{file}: {key!r}{where} is no {expected}, expected one: download or export the file again"
            )
    return PeftSettings(source, file, rank, alpha, ranks, alphas, bool(rslora), bool(config.get("use_dora")))


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


# ----------------------------------------------------------------------------------------------------------------------
# Layers

# Families by the width of what their UNet's cross-attention reads.
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL's refiner", 2048: "SDXL"}
# The same of transformers and video models by the names of their layers, with underscores for dots, and their width.
TRANSFORMERS = (
    (r"(^|_)motion_modules_\d|(^|_)blocks_\d+_(self_attn|cross_attn|ffn)_", None, "a video model"),
    (r"^(base_model_model_|transformer_)blocks_\d+_attn[12]_", None, "a video model"),
    (r"(^|_)(single_transformer_blocks|double_blocks|single_blocks)_\d", None, "Flux"),
    (r"(^|_)joint_blocks_\d", None, "Stable Diffusion 3"),
    (r"^(base_model_model_|transformer_)*transformer_blocks_\d+_attn_", (1536, 2432), "Stable Diffusion 3"),
    (r"^(base_model_model_)?transformer_", None, "a transformer"),
)
CROSS_ATTENTION = re.compile(r"attn2[._](processor[._])?to_[kv](_lora)?[._](lora[._])?(lora_A|lora_down|down)\.weight$")


def check_family(file: Path, stored: Mapping[str, np.ndarray], network: Network) -> None:
    """That a file that tells its family is of the network's."""
    width = network.config.cross_attention_dim
    own = FAMILIES.get(width, f"one whose cross-attention reads {width} numbers")
    made_for = _family(stored, several_blocks=FAMILIES[2048] if width in FAMILIES else None)
    if made_for not in (None, own):
        advice = "or load a checkpoint of that" if made_for in FAMILIES.values() else "for only such are supported"
        raise ValueError(
            f"{file}: is a LoRA for {made_for}, but this network is {own}; take a LoRA that was trained for this "
            f"network, {advice}"
        )


def _family(stored: Mapping[str, np.ndarray], several_blocks: str | None) -> str | None:
    """The family that a file was made for; `several_blocks` if nothing but the number of its blocks tells."""
    widths = {
        name.replace(".", "_"): array.shape[1] if array.ndim > 1 else None
        for name, array in stored.items()
        if part_of(name) == "unet"
    }
    for pattern, expected, family in TRANSFORMERS:
        if any(re.search(pattern, name) and (not expected or width in expected) for name, width in widths.items()):
            return family
    read = {array.shape[1] for name, array in stored.items() if CROSS_ATTENTION.search(name) and array.ndim > 1}
    if read:
        return FAMILIES.get(min(read)) if len(read) == 1 else None
    # The others have one transformer block in each attention.
    return several_blocks if any(re.search(r"_transformer_blocks_[1-9]", name) for name in widths) else None


def _names_by_layer(file: Path, stored: Iterable[str], network: Network) -> dict[tuple, dict[str, str]]:
    """The stored names of lora_a, lora_b and perhaps alpha of each adapted layer."""
    layers, found = layers_by_name(network), {}
    for name in stored:
        ending = next(filter(name.endswith, ENDINGS), "")
        path = layers.get(name.removesuffix(ending)) if ending else None
        if path is None:
            reason = next(reason for pattern, reason in REFUSED if re.search(pattern, name))
            raise ValueError(f"{file}: weight {name!r} has no place in the UNet; {reason}")
        names = found.setdefault(path, {})
        if other := names.get(ENDINGS[ending]):
            raise ValueError(
                f"{file}: weights {other!r} and {name!r} are the same of layer {_dotted(path)!r}, expected one of "
                "them: download or export the file again"
            )
        names[ENDINGS[ending]] = name
    for names in found.values():
        if missing := [leaf for leaf in LEAVES if leaf not in names]:
            name = names.get(LEAVES[1 - LEAVES.index(missing[0])], names.get("alpha"))
            ending = next(filter(name.endswith, ENDINGS))
            raise ValueError(
                f"{file}: no weight {name.removesuffix(ending) + PARTNERS[ending]!r}, expected with {name!r}; the file "
                "is incomplete: download or export it again"
            )
    return found


def _matrix(file: Path, name: str, array: np.ndarray, expected: tuple[int, ...]) -> np.ndarray:
    """The matrix or convolution in our axes and in float32."""
    # The same numbers make a matrix and a 1x1 convolution; files have either for layers that can be both.
    shape, same = (shape[:2] if shape[2:] == (1, 1) else shape for shape in (array.shape, expected))
    if shape != same:
        raise ValueError(
            f"{file}: weight {name!r} has shape {list(array.shape)}, expected {list(expected)}; the file is damaged or "
            "was made for another network: check that they belong together"
        )
    return array.reshape(expected).transpose(np.argsort(KERNEL_AXES[len(expected)])).astype(np.float32)


def _stored_alpha(file: Path, name: str, array: np.ndarray) -> float:
    value = array.reshape(-1)[0].item() if array.size == 1 else None
    if not _is_scale(value):
        raise ValueError(
            f"{file}: {name!r} has shape {list(array.shape)}{'' if value is None else f' and is {value:g}'}, expected "
            "one positive number: download or export the file again"
        )
    # The shortest decimal that rounds to the stored float: 0.3 comes back as 0.3.
    return float(str(array.reshape(-1)[0]))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
