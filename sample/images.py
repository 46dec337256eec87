"""Draws images from a Stable Diffusion checkpoint: of one prompt, or of evaluation sets of tens of thousands.

    python -m sample.images --model PATH_OR_ID --prompt "a lighthouse in a storm" --seed 0 --out runs/images
    python -m sample.images --model PATH_OR_ID --prompts prompts.tsv --seeds 0-3 --module pos=pos.safetensors \\
        --module neg=neg.safetensors --rule cpgd --w 4 --steps 25 --out runs/cpgd

The checkpoint is a folder in the layout of diffusers, or the Hub id of one: Stable Diffusion 1.x, 2.x or XL; "demo" is
the small one of this package. Killed and started again with the same flags, the program goes on where it was.
"""

import dataclasses
import hashlib
import itertools
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from flax_pref.checkpoints.hub import find_checkpoint
from flax_pref.config import UserError, check_file_systems, parse_flags, run_main
from flax_pref.data.prompts import Prompt, read_prompts
from flax_pref.diffusion.conditioning import chunks, warn_of_cuts
from flax_pref.diffusion.guidance import Rule, tabulate
from flax_pref.diffusion.rules import named_rule
from flax_pref.diffusion.sampler import image_keys
from flax_pref.diffusion.text_to_image import TextToImage, to_bytes
from flax_pref.diffusion.text_to_image import watched as watched_steps
from flax_pref.images.image_files import ImageFormat
from flax_pref.images.image_set import ImageSet, Item, Layout, Writer, image_names
from flax_pref.models.bank import AXIS
from flax_pref.models.platform import default_dtype, platform
from flax_pref.parallel.agreement import Content, agree, begin_together, flat
from flax_pref.parallel.hosts import join, wait_for_others, watched
from flax_pref.parallel.mesh import make_mesh
from flax_pref.parallel.signals import StopTogether, anywhere, stopped_by
from sample.options import (
    Drawing,
    check_drawing,
    check_modules,
    drawn_terms,
    fingerprints,
    modules_of,
    rule_of,
    text_to_image,
    with_preset,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Drawing):
    """Draws images from a Stable Diffusion checkpoint."""

    prompt: tuple[str, ...] = ()
    """One text or several."""
    prompts: str | None = None
    """In place of these a file of them (txt, csv, tsv, json, jsonl, parquet), or a folder of such; the files of
    PartiPrompts, HPDv2, Pick-a-Pic and GenEval are known."""
    column: str | None = None
    """Of the file, with the prompts; None: the one that is named so."""
    negative_prompt: str | None = None
    """What to steer away from."""
    seeds: str = "0"
    """One image of every prompt for each: a number, a range such as 0-3, or several with commas."""
    seed: int | None = None
    """The same for a single one."""
    out: str = "runs/images"
    """Folder for the images, local or in a bucket (gs://...)."""
    layout: Layout | None = None
    """Of the images' files: webdataset (tar shards), flat, or what the scorers of GenEval or HPSv2 read; None:
    webdataset for a file of prompts, else flat."""
    format: ImageFormat = "png"
    shard_size: int = 1000
    """Images in a tar shard."""
    verify: bool = False
    """Read the images that are there, and draw again those whose bytes are not the ones that were written; else only
    the sizes of their files are compared."""

    mesh: str = "data=-1"
    """How to use the devices: data=-1 shares out the images, network=3,data=-1 puts base and modules with full weights
    on different devices too."""
    hosts: str | None = None
    """None: joins the other processes of a TPU pod, Slurm or Open MPI, where there are any; or auto, none, or
    ADDRESS:PORT,PROCESSES,NUMBER."""

    def __post_init__(self):
        super().__post_init__()
        if bool(self.prompt) == (self.prompts is not None):
            raise UserError("expected either --prompt with texts or --prompts with a file of them")
        if self.seed is not None and self.seeds != "0":
            raise UserError(f"--seed {self.seed} and --seeds {self.seeds}: expected one of them")
        if self.column is not None and self.prompts is None:
            raise UserError(f"--column {self.column}: is of a file of prompts; expected --prompts with one")
        if self.shard_size < 1:
            raise UserError(f"--shard-size {self.shard_size}: expected at least 1")
        if "://" not in self.out and Path(self.out).exists() and not Path(self.out).is_dir():
            raise UserError(f"--out {self.out}: is a file; expected a folder")
        seeds_of(self)


# What may differ between hosts: how each works, and where inputs lie, of which the content is compared.
FREE_OF_HOSTS = ("hosts", "model", "module", "module_base", "prompts", "batch_size", "mesh", "attention")


def main(arguments: list[str]) -> None:
    """Draws and writes the images."""
    config = with_preset(parse_flags(arguments, Config))
    process, processes = join(config.hosts)
    with watched():
        run(config, process, processes)


def run(config: Config, process: int, processes: int) -> None:
    """Draws and writes the images of one of several processes, or of a single one."""
    begin_together(config, FREE_OF_HOSTS)
    check_file_systems(config.out, config.prompts)
    rule, sources = rule_of(config), modules_of(config)
    check_modules(rule, sources, config)
    prompts = prompts_of(config)
    items = [Item(prompt, seed) for prompt in prompts for seed in seeds_of(config)]
    layout = config.layout or ("flat" if config.prompts is None else "webdataset")
    image_names(items, layout, config.format)
    check_devices(config)
    folder = find_checkpoint(config.model, variant=config.variant)
    check_drawing(config, folder, sources)
    settings = settings_of(config, folder, sources)
    agree(lambda: flat({**settings, **prompts_as_content(config, prompts)}, free=("model", "module_base")))
    images = ImageSet(
        config.out,
        items,
        settings,
        layout=layout,
        image_format=config.format,
        shard_size=config.shard_size,
        process_index=process,
        process_count=processes,
        verify=config.verify,
    )
    with images.only_writer():
        wait_for_others("the folder is locked")
        done = complete(images, items, config, lambda: load(config, folder, rule, sources))
    if process == 0 and done:
        print(f"wrote {len(items)} images, manifest.parquet and contact_sheet.png to {config.out}")


def complete(
    images: ImageSet, items: Sequence[Item], config: Config, loaded: Callable[[], tuple[TextToImage, Rule]]
) -> bool:
    """Draws and writes what the folder lacks; whether it is finished, that is, no process was told to stop."""
    images.begin()
    if images.damaged:
        shown = [f"prompt {items[i].prompt.id} with seed {items[i].seed}" for i in images.damaged[:3]]
        more = ", ..." if len(images.damaged) > 3 else ""
        count = f"{len(images.damaged)} of {images.total} images"
        print(f"{config.out}: damaged and drawn again: {count} ({', '.join(shown)}{more})")
    if images.done:
        print(f"{config.out}: {images.done} of {images.total} images are there")
    # Where one process draws, the others come along: it may be told to stop, and then all do.
    if anywhere(len(images.pending) > 0) and not draw_set(loaded(), images, items, config):
        print(
            f"{config.out}: stopped after {images.done} of {images.total} images; the same command goes on from there"
        )
        return False
    wait_for_others("all images are drawn")
    images.finish()
    return True


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


def draw_set(loaded: tuple[TextToImage, Rule], images: ImageSet, items: Sequence[Item], config: Config) -> bool:
    """Draws what is pending; whether all processes came to the end, that is, none was told to stop.

    Batches are always the same, whatever is there already: so an image comes out the same, bit by bit, in a run that
    was killed and goes on.
    """
    draw, rule = loaded
    own, pending = images.own, set(images.pending.tolist())
    size, steps = draw.batch_size, len(draw.solver.timesteps)
    batches = [(own[chosen], n) for chosen, n in chunks(len(own), size) if pending & set(own[chosen[:n]].tolist())]
    # A process that has no more batches still asks, in every round, whether to stop.
    rounds = int(np.max(multihost_utils.process_allgather(np.array(len(batches)))))
    table = tabulate(rule, steps, size)
    warn_of_cuts(draw.pipeline, [item.prompt.text for item in items])
    negative = None if config.negative_prompt is None else [config.negative_prompt] * size
    # A program that reports its steps is never kept in the compilation cache; where steps are short, that costs more.
    by_step = config.prompts is None and platform() == "cpu"
    total = {"total": len(batches) * steps} if by_step else {"total": images.total, "initial": images.done}
    started, drawn = time.perf_counter(), 0
    bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    def told(count: int) -> None:
        progress.set_postfix_str(f"{images.total - images.done} images left", refresh=False)
        progress.update(0 if by_step else count)

    with (
        stopped_by(signal.SIGTERM) as stop,
        tqdm(desc="drawing", unit="step" if by_step else "image", bar_format=bar_format, **total) as progress,
        watched_steps(progress, by_step) as bar,
        Writer(images, written=told, ahead=1) as writer,
    ):
        stopping = StopTogether(stop)
        for number in range(rounds):
            if number < len(batches):
                chosen, n = batches[number]
                batch = [items[i] for i in chosen]
                keys = image_keys([item.seed for item in batch], [item.prompt.id for item in batch])
                texts = [item.prompt.text for item in batch]
                pixels = to_bytes(draw.draw(texts, keys, table, negative_prompts=negative, bar=bar))
                wanted = [place for place, i in enumerate(chosen[:n]) if int(i) in pending]
                writer.put(chosen[wanted], Chosen(pixels, wanted))
                drawn += len(wanted)
            if stopping():
                break
    seconds = time.perf_counter() - started
    print(f"drew {drawn} images in {seconds:.0f} s, {drawn / seconds:.3g} images/s")
    return not anywhere(len(images.pending) > 0)


class Chosen:
    """Some images of a batch that is still being drawn."""

    def __init__(self, pixels: jax.Array, places: list[int]):
        self.pixels, self.places = pixels, places

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.pixels)[self.places]


# ----------------------------------------------------------------------------------------------------------------------
# From flags to parts


def load(config: Config, folder: Path, rule: Rule, sources: dict[str, str]) -> tuple[TextToImage, Rule]:
    """The checkpoint with its modules on the devices, and the rule to draw by."""
    dtype = default_dtype(config.dtype)
    devices = jax.local_devices()
    print(f"loading {folder} on {len(devices)} x {devices[0].device_kind} in {dtype}")
    mesh = make_mesh(config.mesh, devices)
    draw = text_to_image(
        config,
        folder,
        rule,
        sources,
        dtype=dtype,
        mesh=None if mesh.size == 1 else mesh,
        batch_size=config.batch_size * (mesh.size // mesh.shape.get(AXIS, 1)),
    )
    return draw, named_rule(**drawn_terms(config))


def check_devices(config: Config) -> None:
    """Checks the flags that say how to use the devices.

    Raises:
        UserError, ValueError: these devices cannot be used so.
    """
    make_mesh(config.mesh, jax.local_devices())
    needed = {"cudnn": "gpu", "flash": "tpu"}.get(config.attention, platform())
    if needed != platform():
        raise UserError(
            f"--attention {config.attention}: is a kernel for {needed.upper()}s, but JAX runs on {platform()} here; "
            "expected auto, xla or blocked"
        )


def prompts_of(config: Config) -> list[Prompt]:
    """The prompts that the flags name."""
    if config.prompts is not None:
        return read_prompts(config.prompts, column=config.column)
    return [Prompt(i, text, "", {"prompt": text}) for i, text in enumerate(config.prompt)]


def prompts_as_content(config: Config, prompts: Sequence[Prompt]) -> dict[str, Content]:
    """What hosts compare of the prompts."""
    texts = json.dumps([(prompt.id, prompt.text, prompt.group) for prompt in prompts])
    return {"prompts": Content(config.prompts or "--prompt", hashlib.sha256(texts.encode()).hexdigest())}


def seeds_of(config: Config) -> list[int]:
    """The seeds that the flags name, in order.

    Raises:
        UserError: they are not understood, out of their range, or too many.
    """
    if config.seed is not None:
        if not 0 <= config.seed < SEEDS:
            raise UserError(f"--seed {config.seed}: expected 0 to {SEEDS - 1}")
        return [config.seed]
    ranges = []
    for part in config.seeds.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--seeds {config.seeds}: expected a number, a range such as 0-3, or several with commas")
        if int(match[2] or match[1]) >= SEEDS:
            raise UserError(f"--seeds {config.seeds}: expected 0 to {SEEDS - 1}")
        ranges.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    if sum(map(len, ranges)) > MOST_SEEDS:
        raise UserError(f"--seeds {config.seeds}: expected at most {MOST_SEEDS:,} seeds")
    return list(dict.fromkeys(itertools.chain(*ranges)))


SEEDS, MOST_SEEDS = 2**32, 1_000_000  # that there are, and that a set may have

# Flags that say where and how to work, not what to draw: a run may go on under others.
WORKING = (
    *("prompt", "prompts", "column", "seeds", "seed", "out", "layout", "format", "shard_size", "verify", "module"),
    *("batch_size", "mesh", "hosts", "attention"),
)


def settings_of(config: Config, folder: Path, sources: dict[str, str]) -> dict:
    """What the images depend on besides prompt and seed."""
    settings = {name: value for name, value in vars(config).items() if name not in WORKING and value is not None}
    settings["dtype"] = default_dtype(config.dtype)
    settings |= fingerprints(config, folder, sources)
    return settings


if __name__ == "__main__":
    sys.exit(run_main(main))
