"""Trained modules as files that other programs read."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import multihost_utils

from flax_pref.checkpoints.checkpoint import Pipeline
from flax_pref.checkpoints.diffusers import load_unet
from flax_pref.checkpoints.lora import FILE_NAMES, READERS, load_lora, merge_lora_network, save_lora
from flax_pref.checkpoints.module_info import ModuleInfo
from flax_pref.checkpoints.single_file import save_single_file
from flax_pref.checkpoints.weights import save_network
from flax_pref.config import check_least
from flax_pref.files import replacing
from flax_pref.models.lora import join_lora, select_lora, stack_lora
from flax_pref.models.network import Network
from flax_pref.parallel.hosts import wait_for_others
from flax_pref.training.networks import LoRA, Trained

Layout = Literal["diffusers", "kohya", "peft", "merged", "single"]
NAMES = FILE_NAMES | {"merged": "{}", "single": "{}_checkpoint.safetensors"}
WHOLE = ("merged", "single")  # layouts that hold the module in the weights of the base


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What a run writes at its end, into the folder modules/."""

    layout: Annotated[tuple[Layout, ...], tyro.conf.UseAppendAction] = ()
    """Layout of LoRA modules, once for each (default: diffusers and kohya). diffusers: NAME.safetensors for diffusers;
    kohya: NAME_kohya.safetensors for ComfyUI, A1111, sd-scripts and diffusers; peft: the folder NAME_peft for PEFT;
    merged: NAME, a UNet folder of diffusers with the module in its weights; single: NAME_checkpoint.safetensors, the
    whole checkpoint with the module in its weights, for ComfyUI and A1111. Modules with weights of their own are always
    such folders and, where asked for, such single files. A base that is kept in bfloat16 while training is merged in
    that: for full precision merge the files, see `merge_lora_network`."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the stored weights."""
    every: int | None = None
    """Steps after which to write them too, into modules/step_000300; None: only at the end."""

    def __post_init__(self):
        check_least(self, 1, "every")
        if isinstance(self.layout, str):
            object.__setattr__(self, "layout", (self.layout,))
        if unknown := [layout for layout in self.layout if layout not in NAMES]:
            raise ValueError(f"export.layout is {unknown[0]!r}; expected {' or '.join(NAMES)}")

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The layouts of LoRA modules."""
        return tuple(dict.fromkeys(self.layout)) or ("diffusers", "kohya")

    @property
    def whole_layouts(self) -> tuple[Layout, ...]:
        """The layouts of modules with weights of their own."""
        return ("merged", "single") if "single" in self.layout else ("merged",)


def export_modules(
    folder: Path,
    trained: Trained,
    base: Network,
    frozen: Any,
    params: Any,
    lora: LoRA,
    config: ExportConfig,
    encoders: Callable[[], Pipeline],
    info: ModuleInfo,
) -> dict[Layout, list[Path]]:
    """Writes every module; all processes call it, and the first one writes.

    Args:
        folder: for `pos.safetensors`, or folders such as `pos/` of diffusers; what it has of these is replaced.
        trained: the networks.
        base: the UNet without adapters; its parameters may be shapes.
        frozen: parameters of the base, for merging.
        params: of what is trained.
        lora: kind of the adapters.
        config: how to write.
        encoders: reads the rest of the checkpoint, for single files.
        info: how the modules were made; their names are filled in.

    Returns:
        the files or folders of each layout.
    """
    layouts = config.whole_layouts if trained.weights == "full" else config.layouts
    written: dict[Layout, list[Path]] = {
        layout: [folder / NAMES[layout].format(name) for name in trained.modules] for layout in layouts
    }
    whole = on_host(params) if trained.weights == "lora" else {}
    for layout in layouts:
        merged = on_host(frozen) if trained.weights == "lora" and layout in WHOLE else None
        for i, (name, path) in enumerate(zip(trained.modules, written[layout], strict=True)):
            network = None
            if trained.weights == "full":
                network = base._replace(params=on_host(params[name]))
            elif merged is not None:
                plain = base._replace(params=merged)
                bank = Network(base.config, trained.graphdef, join_lora(merged, whole))
                network = merge_lora_network(plain, bank, {name: 1.0})
            if jax.process_index() != 0:
                continue
            if network is not None and layout == "single":
                save_single_file(encoders().replace(unet=network), path, dtype=jnp.dtype(config.dtype))
                continue
            if network is not None:
                with replacing(path) as unfinished:
                    save_network(network, unfinished, dtype=jnp.dtype(config.dtype))
                    if path.exists():  # of an earlier export; a folder takes the place of none only
                        shutil.rmtree(path)
                continue
            save_lora(
                select_lora(whole, i),
                path,
                alpha=lora.effective_alpha,
                dtype=jnp.dtype(config.dtype),
                layout=layout,
                config=base.config,
                info=dataclasses.replace(info, name=name),
            )
    wait_for_others("modules are written")
    return written


def summary(written: dict[Layout, list[Path]]) -> str:
    """What was written, a path a line, and as the last line the layouts and who reads them."""
    paths = [path for group in written.values() for path in group]
    readers = READERS | {"merged": "diffusers, as a UNet folder", "single": "ComfyUI, A1111 and diffusers"}
    layouts = [
        f"{'UNet' if layout == 'merged' else layout} ({', '.join(path.name for path in group)}) for {readers[layout]}"
        for layout, group in written.items()
    ]
    return "\n".join([*(f"wrote {path}" for path in paths), f"layouts in {paths[0].parent}: {'; '.join(layouts)}"])


def on_host(tree: Any) -> Any:
    """Arrays of devices, of all hosts, as whole arrays of this one, one by one."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)


def load_exported(folder: Path, trained: Trained, base: Network, lora: LoRA, like: Any) -> Any:
    """Reads what `export_modules` has written, not merged, as parameters to go on from.

    Args:
        folder: with `pos.safetensors` or the same in another layout, or with folders such as `pos/`.
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
        params = stack_lora([_adapters(_stored(folder, name), base, lora) for name in trained.modules])
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, like):
        raise ValueError(f"{folder}: modules of other layers, rank or size than those of this run; expected the same")
    return jax.tree.map(lambda array, leaf: jax.device_put(np.asarray(array), leaf.sharding), params, like)


def _stored(folder: Path, name: str) -> Path:
    """The adapters of a module, in the first layout that is there."""
    paths = [folder / pattern.format(name) for pattern in FILE_NAMES.values()]
    return next((path for path in paths if path.exists()), paths[0])


def _adapters(file: Path, base: Network, lora: LoRA) -> dict:
    """A module whose scale is that of the run."""
    adapters, rank, alpha = load_lora(file, base)
    ratio = (alpha / rank) / (lora.effective_alpha / lora.rank)
    return jax.tree.map_with_path(lambda path, leaf: leaf * ratio if path[-1].key == "lora_b" else leaf, adapters)
