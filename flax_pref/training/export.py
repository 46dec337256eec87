"""Trained modules as files that other programs read."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from flax_pref.checkpoints.diffusers import load_unet
from flax_pref.checkpoints.lora import load_lora, merge_lora_network, save_lora
from flax_pref.checkpoints.weights import Network, save_network
from flax_pref.config import check_least
from flax_pref.files import replacing
from flax_pref.models.lora import join_lora, select_lora, stack_lora
from flax_pref.parallel.hosts import wait_for_others
from flax_pref.training.networks import LoRA, Trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What a run writes at its end, into the folder modules/."""

    layout: Literal["diffusers", "kohya", "merged"] = "diffusers"
    """Of LoRA modules: files for diffusers and PEFT, or for kohya's programs, ComfyUI and A1111; or merged into the
    base, each a UNet folder of diffusers, which is what modules with weights of their own always are. A base that is
    kept in bfloat16 while training is merged in that: for full precision merge the files, see `merge_lora_network`."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the stored weights."""
    every: int | None = None
    """Steps after which to write them too, into modules/step_000300; None: only at the end."""

    def __post_init__(self):
        check_least(self, 1, "every")


def export_modules(
    folder: Path, trained: Trained, base: Network, frozen: Any, params: Any, lora: LoRA, config: ExportConfig
) -> list[Path]:
    """Writes every module; all processes call it, and the first one writes.

    Args:
        folder: for `pos.safetensors`, or folders such as `pos/` of diffusers; what it has of these is replaced.
        trained: the networks.
        base: the UNet without adapters; its parameters may be shapes.
        frozen: parameters of the base, for merging.
        params: of what is trained.
        lora: kind of the adapters.
        config: how to write.

    Returns:
        the files or folders.
    """
    whole = {}
    if trained.weights == "full" or config.layout == "merged":
        suffix = ""
    else:
        suffix, whole = ".safetensors", on_host(params)
    paths = [folder / f"{name}{suffix}" for name in trained.modules]
    merged = on_host(frozen) if trained.weights == "lora" and config.layout == "merged" else None
    for i, (name, path) in enumerate(zip(trained.modules, paths, strict=True)):
        if trained.weights == "full":
            network = base._replace(params=on_host(params[name]))
        elif merged is not None:
            plain = base._replace(params=merged)
            bank = Network(base.config, trained.graphdef, join_lora(merged, on_host(params)))
            network = merge_lora_network(plain, bank, {name: 1.0})
        if jax.process_index() != 0:
            continue
        if suffix:
            save_lora(
                select_lora(whole, i),
                path,
                alpha=lora.scale,
                dtype=jnp.dtype(config.dtype),
                layout=config.layout,
                config=base.config,
            )
        else:
            with replacing(path) as unfinished:
                save_network(network, unfinished, dtype=jnp.dtype(config.dtype))
                if path.exists():  # of an earlier export; a folder takes the place of none only
                    shutil.rmtree(path)
    wait_for_others("modules are written")
    return paths


def on_host(tree: Any) -> Any:
    """Arrays of devices, of all hosts, as whole arrays of this one, one by one."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)


def load_exported(folder: Path, trained: Trained, base: Network, lora: LoRA, like: Any) -> Any:
    """Reads what `export_modules` has written, not merged, as parameters to go on from.

    Args:
        folder: with `pos.safetensors`, or with folders such as `pos/`.
        trained: the networks.
        base: the UNet without adapters.
        lora: kind of the adapters.
        like: shapes of the parameters, with shardings.

    Raises:
        FileNotFoundError: a module is missing.
        ValueError: a module does not fit.
    """
    if trained.weights == "full":
        params = {name: load_unet(folder / name, jnp.float32).params for name in trained.modules}
    else:
        params = stack_lora([_adapters(folder / f"{name}.safetensors", base, lora) for name in trained.modules])
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, like):
        raise ValueError(f"{folder}: modules of other layers, rank or size than those of this run; expected the same")
    return jax.tree.map(lambda array, leaf: jax.device_put(np.asarray(array), leaf.sharding), params, like)


def _adapters(file: Path, base: Network, lora: LoRA) -> dict:
    """A module whose scale is that of the run."""
    adapters, rank, alpha = load_lora(file, base)
    ratio = (alpha / rank) / (lora.scale / lora.rank)
    return jax.tree.map_with_path(lambda path, leaf: leaf * ratio if path[-1].key == "lora_b" else leaf, adapters)
