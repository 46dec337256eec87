"""Preference modules from disk: LoRA files and full weights, beside the base that they guide or merged into it."""

import functools
import hashlib
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from flax_pref.checkpoints.diffusers import open_unet
from flax_pref.checkpoints.hub import DEMO, INDEX, RECORD, find_checkpoint, find_files, read_record
from flax_pref.checkpoints.lora import (
    FILE_NAMES,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    TEXT_NAMES,
    Files,
    Part,
    load_lora_network,
    merge_lora_network,
    part_of,
    parts_of,
)
from flax_pref.checkpoints.lycoris import fold_adapters, has_other_adapters
from flax_pref.checkpoints.single_file import holds_network, read_single_file
from flax_pref.checkpoints.weights import read_shapes
from flax_pref.models.bank import adapters
from flax_pref.models.lora import split_lora
from flax_pref.models.network import Network

OWN_BASE = "own_base"  # in rules: the base that modules were trained on, where that is not the one they guide
LORA_FILES = ("pytorch_lora_weights.safetensors", PEFT_WEIGHTS)  # in folders of diffusers and PEFT
_WEIGHTS = "diffusion_pytorch_model"
NETWORK_FILES = ("config.json", f"{_WEIGHTS}.safetensors", f"{_WEIGHTS}-*-of-*.safetensors")  # of a UNet folder


class Guided(NamedTuple):
    """A base and what guides it.

    Attributes:
        base: the network "base" of rules, perhaps with adapters.
        modules: networks beside it.
        text_encoders: those of modules that adapt them, by the names of the modules.
    """

    base: Network
    modules: dict[str, Network]
    text_encoders: Mapping[str, tuple[Network, ...]] = MappingProxyType({})


def load_modules(
    base: Network,
    sources: Mapping[str, Files],
    *,
    text_encoders: Sequence[Network] = (),
    own_base: str | Path | None = None,
    dtype=jnp.float32,
) -> Guided:
    """Reads modules by their names in rules.

    Args:
        base: the UNet that is guided.
        sources: for each module a file of adapters (safetensors), a folder with one, the folder of a PEFT adapter, a
            UNet folder of diffusers, a whole checkpoint in that layout or as a single file, or a folder or Hub
            repository (`owner/name`, `owner/name@revision`) of these, see `find_module`. Plain LoRA shares the
            weights of the base; adapters of other kinds, see `checkpoints.lycoris`, are folded into a copy of them.
            Several files with a strength each, `[("a.safetensors", 0.8), ("b.safetensors", 0.5)]`, make one module,
            whose difference from the base is the weighted sum of theirs. Adapters of text encoders count too, also
            where a file has no others.
        text_encoders: of the checkpoint that draws. Adapters of them are folded into copies of the layers that they
            adapt, also where `own_base` is given; the module then sees prompts through these. Empty: files with such
            adapters are refused.
        own_base: the UNet folder or checkpoint that the modules were trained on, where they guide another fine-tune of
            the same family. Given, LoRA modules predict on their own base, and it is there as the network "own_base",
            for rules that compare with it; None: LoRA modules move onto `base`.
        dtype: what networks with weights of their own compute in.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not understood or does not fit the network.

    Example:
        >>> pipeline = fp.load_pipeline("demo")
        >>> guided = fp.load_modules(pipeline.unet, {"pos": "pos.safetensors", "neg": "neg.safetensors"})
        >>> draw = fp.TextToImage(pipeline.replace(unet=guided.base), steps=2, modules=guided.modules)
        >>> images = draw(["a large red circle in the middle, white background"], rule=fp.cpgd(2.0, 7.5))
        >>> images.shape
        (1, 64, 64, 3)

        Files that may adapt text encoders too, as many on Civitai do:

        >>> guided = fp.load_modules(pipeline.unet, {"pos": "pos.safetensors"}, text_encoders=pipeline.text_encoders)
        >>> pipeline = pipeline.replace(unet=guided.base)
        >>> draw = fp.TextToImage(pipeline, steps=2, modules=guided.modules, text_encoders=guided.text_encoders)
    """
    found = {name: [(find_module(path, name), x) for path, x in parts_of(files)] for name, files in sources.items()}
    kinds = {path: _kind(path) for parts in found.values() for path, _ in parts}
    files = {name: parts for name, parts in found.items() if all(kinds[path] == "lora" for path, _ in parts)}
    own = base
    if own_base is not None:
        path = _stored(find_checkpoint(own_base))
        if _kind(path) != "network":
            raise ValueError(f"{own_base}: holds adapters, expected the base that the modules were trained on")
        own = _load_like(base, path, dtype)
    modules = {}
    for name, parts in found.items():
        if name in files:
            continue
        if [kinds[path] for path, _ in parts] != ["network"]:
            told = ", ".join(str(path) for path, _ in parts)
            print(f"{told}: is no plain LoRA; module {name!r} has weights of its own, {_memory(own.params)} more")
        networks = [(_whole(path, kinds[path], base, own, dtype), strength) for path, strength in parts]
        modules[name] = _combined(own, networks)
    adapted = load_lora_network(own, files, with_text=True) if files else own
    texts = {name: _text_encoders(name, parts, text_encoders) for name, parts in found.items()}
    texts = {name: own for name, own in texts.items() if own}
    if own_base is None:
        return Guided(adapted, modules, texts)
    return Guided(base, {OWN_BASE: adapted, **modules}, texts)


def _whole(path: Path, kind: str, base: Network, own: Network, dtype) -> Network:
    """A network whose weights have a module in them."""
    if kind == "network":
        return _load_like(base, path, dtype)
    if kind == "folded":
        return fold_adapters(path, own)
    return merge_lora_network(own, load_lora_network(own, {"module": path}, with_text=True), {"module": 1.0})


def _text_encoders(
    module: str, parts: Sequence[tuple[Path, float]], text_encoders: Sequence[Network]
) -> tuple[Network, ...]:
    """The text encoders with a module's adapters in their weights; empty if it has none of them."""
    adapted = {path: _adapted_encoders(path, len(text_encoders)) for path, _ in parts}
    if not any(adapted.values()):
        return ()
    own = []
    for part, encoder in zip(TEXT_NAMES, text_encoders, strict=False):
        folded = [(fold_adapters(path, encoder, part), strength) for path, strength in parts if part in adapted[path]]
        own.append(_combined(encoder, folded))
    told = ", ".join(str(path) for path in adapted if adapted[path])
    before, after = ([leaf for net in nets for leaf in jax.tree.leaves(net.params)] for nets in (text_encoders, own))
    more = _memory([leaf for leaf, old in zip(after, before, strict=True) if leaf is not old])
    print(f"{told}: adapts text encoders; module {module!r} has its own copy of the layers that differ, {more} more")
    return tuple(own)


def adapts_text_encoders(source: str | Path, name: str) -> bool:
    """Whether the module of this path and name, see `load_modules`, adapts text encoders; reads no weights.

    Raises:
        FileNotFoundError, ValueError: as `load_modules`.
    """
    path = find_module(source, name)
    return path.suffix == ".safetensors" and bool(_adapted_encoders(path, len(TEXT_NAMES)))


def _adapted_encoders(path: Path, encoders: int) -> set[Part]:
    """The text encoders that a file adapts; there are so many."""
    if path.is_dir():
        return set()  # of a UNet
    names = {part_of(name): name for name in read_shapes(path)}
    found: set[Part] = {part for part in TEXT_NAMES if part in names}
    if found and not encoders:
        raise ValueError(
            f"{path}: weight {names[min(found)]!r} adapts a text encoder, but load_modules was given none; expected "
            "text_encoders=pipeline.text_encoders, or a file that adapts the UNet alone"
        )
    if "text_encoder_2" in found and encoders < 2:
        raise ValueError(
            f"{path}: weight {names['text_encoder_2']!r} adapts a second text encoder, but this checkpoint has one; "
            "the file was made for SDXL: take one for this family"
        )
    return found


def _combined(own: Network, networks: Sequence[tuple[Network, float]]) -> Network:
    """`theta + sum of strength (theta_i - theta)`, in float32; arrays that all share stay as they are."""
    if len(networks) == 1 and networks[0][1] == 1:
        return networks[0][0]
    shares = [strength for _, strength in networks]

    def total(base, *leaves):
        if all(leaf is base for leaf in leaves):
            return base
        scaled = (share * (leaf.astype(jnp.float32) - base) for share, leaf in zip(shares, leaves, strict=True))
        return functools.reduce(operator.add, scaled, base.astype(jnp.float32)).astype(base.dtype)

    return own._replace(params=jax.tree.map(total, own.params, *(network.params for network, _ in networks)))


def _kind(path: Path) -> Literal["lora", "folded", "network"]:
    """Whether modules of a file or a folder are rows of one batch, or UNets with weights of their own."""
    if path.is_dir():
        return "network"
    if not path.is_file() or path.suffix != ".safetensors":
        return "lora"  # whose reader says what is wrong
    names = read_shapes(path)
    if holds_network(names):
        return "network"
    return "folded" if has_other_adapters(name for name in names if part_of(name) == "unet") else "lora"


def find_module(source: str | Path, name: str) -> Path:
    """The LoRA file or the UNet folder of a module.

    Args:
        source: a file; a folder with one module; or a folder with several, such as modules/ of a run, of which the one
            of this name is taken. Also the id of a Hub repository with such files, perhaps with "@" and a revision, of
            which this module is downloaded.
        name: of the module in rules.

    Raises:
        FileNotFoundError: there is no such file, folder or repository, or it has several modules, none of this name.
        ValueError: the folder holds no module.
    """
    path = _module_folder(source, name)
    if path.is_file():
        return path
    if (found := _named(path, name)) is not None:
        return found
    listed = read_record(path).get("modules", [])
    if len(listed) == 1 and listed[0] != name:
        return find_module(source, listed[0])
    if listed and name not in listed:
        raise FileNotFoundError(
            f"{source}: has no module {name!r}, but {', '.join(listed)}; expected one of these names before its path, "
            f"e.g. --module {listed[0]}={source}"
        )
    return _stored(path, source)


def _module_folder(source: str | Path, name: str) -> Path:
    """Where the files of a module are; of a Hub repository those are downloaded that `find_module` chooses from."""
    if source == DEMO:
        return find_checkpoint(DEMO)
    if Path(source).expanduser().exists():
        return Path(source).expanduser()
    named = {layout: pattern.format(name) for layout, pattern in FILE_NAMES.items()}
    network = [f"{folder}{file}" for folder in ("", "unet/", f"{name}/") for file in NETWORK_FILES]
    path = find_files(source, [*network, *LORA_FILES, PEFT_CONFIG, RECORD, named["diffusers"], f"{named['peft']}/*"])
    whole = any((path / file).is_file() for file in ("config.json", "unet/config.json", *LORA_FILES))
    # The same again in kohya's layout is downloaded only where there is no other.
    return path if whole or _named(path, name) is not None else find_files(source, [named["kohya"], RECORD])


def _named(folder: Path, name: str) -> Path | None:
    """The module of this name in a folder of several."""
    files = [folder / pattern.format(name) for pattern in FILE_NAMES.values()]
    found = next((file for file in files if file.exists()), None)
    if found is None and (folder / name / "config.json").is_file() and not (folder / INDEX).is_file():
        found = folder / name
    return found / PEFT_WEIGHTS if found is not None and (found / PEFT_WEIGHTS).is_file() else found


def _stored(path: Path, source: str | Path | None = None) -> Path:
    """The LoRA file or the UNet folder that a path leads to; messages call it `source`."""
    if path.is_file():
        return path
    for folder in (path / "unet", path):
        if (folder / "config.json").is_file():
            return folder
    stored = [path / name for name in LORA_FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    again = {path / FILE_NAMES["kohya"].format(file.stem) for file in stored}  # the same modules in another layout
    stored = [file for file in stored if file not in again]
    if len(stored) != 1:
        raise ValueError(
            f"{source or path}: {len(stored)} safetensors files and no config.json; expected a LoRA file, a folder "
            "with one or with one of the module's name, or a UNet in the layout of diffusers"
        )
    return stored[0]


def _load_like(base: Network, path: Path, dtype) -> Network:
    part = read_single_file(path).part("unet") if path.is_file() else open_unet(path)
    for field, value in vars(part.config).items():
        expected = getattr(base.config, field)
        if field != "sample_size" and value != expected:
            raise ValueError(
                f"{part.described_by}: {field}={value!r}, but that of the base is {expected!r}; expected a fine-tune "
                "of the same family"
            )
    return part.load(dtype)


def _memory(arrays: Any) -> str:
    return f"{sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)) / 2**30:.2f} GiB"


def merge_modules(base: Network, guided: Guided, weights: Mapping[str, float]) -> Network:
    """`theta_base + sum over networks of weight * theta`, in float32: guidance by weights instead of predictions.

    PGD-merge is `{"dpo": w, "base": -w}` and cPGD-merge `{"pos": w, "neg": -w}` (arXiv:2602.18799); where predictions
    are linear in weights, classifier-free guidance of the result is PGD or cPGD.

    Args:
        base: as it was before it got adapters.
        guided: what `load_modules` gave for it.
        weights: of the networks; see `guidance.merge_weights`.

    Raises:
        ValueError: there is no network of a name, or a module adapts text encoders, whose guidance no weights of a UNet
            can hold.

    Example:
        >>> pipeline = fp.load_pipeline("demo")
        >>> guided = fp.load_modules(pipeline.unet, {"pos": "pos.safetensors", "neg": "neg.safetensors"})
        >>> merged = fp.merge_modules(pipeline.unet, guided, fp.merge_weights(fp.cpgd(2.0, 7.5)))
        >>> fp.save_pipeline(pipeline.replace(unet=merged), "merged")
    """
    if told := [name for name in guided.text_encoders if weights.get(name)]:
        raise ValueError(
            f"merge_modules: module {told[0]!r} adapts text encoders, whose guidance no weights of a UNet can hold; "
            "guide by predictions, or take a file that adapts the UNet alone"
        )
    terms, unknown = [], dict(weights)
    for name, network in {"base": guided.base, **guided.modules}.items():
        names = adapters(network.graphdef, network.params)
        own = {module: unknown.pop(module) for module in names if module in unknown}
        # An adapted network is its backbone and a delta: where weights sum up to zero, deltas are all that is left.
        share = unknown.pop(name, 0.0) + sum(own.values()) + (name == "base")
        backbone = base.params if name == "base" else split_lora(network.params)[0]
        if own:
            terms += [(1.0, merge_lora_network(base, network, own).params), (share - 1.0, backbone)]
        else:
            terms.append((share, backbone))
    if unknown:
        raise ValueError(f"merge_modules: no network {next(iter(unknown))!r}")
    shares, params = zip(*[(share, part) for share, part in terms if share], strict=True)

    def total(*leaves):
        scaled = (share * leaf.astype(jnp.float32) for share, leaf in zip(shares, leaves, strict=True))
        return functools.reduce(operator.add, scaled).astype(leaves[0].dtype)

    return base._replace(params=params[0] if shares == (1.0,) else jax.tree.map(total, *params))


SAFE = (".safetensors", ".json", ".txt")
PICKLED = (".bin", ".pt", ".pth")


def fingerprint(source: str | Path, suffixes: tuple[str, ...] = SAFE) -> str:
    """SHA-256 of a file, or of the names and contents of the weights and settings in a folder, as hexadecimal.

    The weights of a PEFT adapter count with the adapter_config.json beside them, which has their scale.

    Args:
        source: as for `hub.find_checkpoint`.
        suffixes: of the files of a folder that count.
    """
    path = find_checkpoint(source)
    if path.is_file() and not path.with_name(PEFT_CONFIG).is_file():
        return _sha256(path)
    described = hashlib.sha256()
    if path.is_file():
        files, path = sorted([path, path.with_name(PEFT_CONFIG)]), path.parent
    else:
        # A network is read from a file of torch only where there is no other.
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix in suffixes or (file.suffix == ".bin" and not list(file.parent.glob("*.safetensors")))
        )
    for file in files:
        described.update(f"{file.relative_to(path).as_posix()} {_sha256(file)}\n".encode())
    return described.hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
