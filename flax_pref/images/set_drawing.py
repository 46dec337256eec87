"""Draws image sets: of one prompt, or evaluation sets of tens of thousands, in one process or several."""

import dataclasses
import hashlib
import itertools
import json
import re
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from flax_pref.checkpoints.model_flags import PLACES
from flax_pref.config import UserError, check_file_systems
from flax_pref.data.prompts import Prompt, read_prompts
from flax_pref.diffusion.conditioning import chunks
from flax_pref.diffusion.drawing import Drawing, resolve_drawing
from flax_pref.diffusion.drawing_flags import with_preset
from flax_pref.diffusion.guidance import tabulate
from flax_pref.diffusion.prompt_syntax import check_prompts
from flax_pref.diffusion.sampler import image_keys
from flax_pref.diffusion.text_to_image import TextToImage, to_bytes, watched_steps
from flax_pref.images.cost import ImageCost, write_cost
from flax_pref.images.image_flags import ImageFlags
from flax_pref.images.image_set import ImageSet, Item, Layout, Writer, image_names
from flax_pref.images.layouts import check_square
from flax_pref.models.bank import AXIS
from flax_pref.models.choices import Kernel
from flax_pref.models.platform import default_dtype, platform
from flax_pref.parallel.agreement import Content, agree, begin_together, flat
from flax_pref.parallel.hosts import join, wait_for_others, watched
from flax_pref.parallel.mesh import make_mesh
from flax_pref.parallel.signals import StopTogether, anywhere, stopped_by

SEEDS, MOST_SEEDS = 2**32, 1_000_000  # that there are, and that a set may have

# Flags that say where and how to work, not what to draw: a run may resume under others.
WORKING = (
    *("prompt", "prompts", "column", "seeds", "seed", "out", "layout", "format", "shard_size", "verify", "module"),
    *("batch_size", "mesh", "hosts", "attention"),
)
# What may differ between hosts: how each works, and where inputs lie, of which the content is compared.
NAMED = (*PLACES, "module", "module_base", "embedding")  # files, which may lie elsewhere on another host
LARGE = 10**8  # numbers of a UNet whose steps take a CPU seconds
FREE_OF_HOSTS = ("hosts", *NAMED, "prompts", "batch_size", "mesh", "attention")


def draw_images(flags: ImageFlags) -> int:
    """Draws and writes an image set, or what it lacks.

    Prints what it loads and how it advances. Run again with the same flags after a kill, it resumes. SIGTERM stops it
    after the current batch.

    Args:
        flags: what to draw, and where to.

    Returns:
        number of images in the finished set; 0: a signal stopped the run, or another process reports.

    Raises:
        UserError, ValueError, OSError: what the flags ask for cannot be had.
    """
    flags = with_preset(flags)
    process, processes = join(flags.hosts)
    with watched():
        begin_together(flags, FREE_OF_HOSTS)
        work = resolve_images(flags)
        agree(lambda: flat({**work.settings, "prompts": work.prompts}, free=NAMED))
        images = ImageSet(
            flags.out,
            work.items,
            work.settings,
            layout=work.layout,
            image_format=flags.format,
            shard_size=flags.shard_size,
            process_index=process,
            process_count=processes,
            verify=flags.verify,
        )
        with images.only_writer():
            wait_for_others("the folder is locked")
            finished = _complete(images, work)
    return len(work.items) if finished and process == 0 else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageWork:
    """What `ImageFlags` ask for, found and checked; see `resolve_images`.

    Attributes:
        flags: that were resolved.
        drawing: what the images are drawn with.
        items: the images, by prompt and seed.
        prompts: where the prompts lie, and their SHA-256.
        layout: of the files.
        settings: what the images depend on besides prompt and seed; JSON can hold them.
    """

    flags: ImageFlags
    drawing: Drawing
    items: Sequence[Item]
    prompts: Content
    layout: Layout
    settings: Mapping[str, Any]

    @property
    def predictions(self) -> int:
        """Predictions of the UNet for an image."""
        return tabulate(self.drawing.sampled, len(self.drawing.solver.timesteps), 1).evaluations


def resolve_images(flags: ImageFlags) -> ImageWork:
    """Finds what the flags name and checks that it fits together; reads weights only for their hash.

    Raises:
        UserError, ValueError, FileNotFoundError: it does not, or something is missing.
    """
    check_file_systems(flags.out, flags.prompts)
    seeds = _seeds(flags)
    if flags.prompts is None:
        prompts = [Prompt(i, text, "", {"prompt": text}) for i, text in enumerate(flags.prompt)]
    else:
        prompts = read_prompts(flags.prompts, column=flags.column)
    items = [Item(prompt, seed) for prompt in prompts for seed in seeds]
    layout = flags.layout or ("flat" if flags.prompts is None else "webdataset")
    image_names(items, layout, flags.format)
    check_prompts(
        [prompt.text for prompt in prompts] + [flags.negative_prompt or "", flags.second_prompt or ""],
        flags.prompt_syntax,
    )
    check_devices(flags.mesh, flags.attention)
    drawing = resolve_drawing(flags)
    if layout == "dpg":
        check_square(*drawing.size)
    if flags.second_prompt is not None and len(drawing.checkpoint.text_encoders) == 1:
        raise UserError(
            f"--second-prompt: {drawing.checkpoint.path} has one text encoder; expected it for Stable Diffusion XL only"
        )
    texts = json.dumps([(prompt.id, prompt.text, prompt.group) for prompt in prompts])
    return ImageWork(
        flags=flags,
        drawing=drawing,
        items=items,
        prompts=Content(flags.prompts or "--prompt", hashlib.sha256(texts.encode()).hexdigest()),
        layout=layout,
        settings=settings_of(flags) | drawing.fingerprints(),
    )


def settings_of(flags: ImageFlags) -> dict[str, Any]:
    """What the flags say of how images look besides prompt and seed, as their metadata tell it."""
    settings = {name: value for name, value in vars(flags).items() if name not in WORKING and value is not None}
    return settings | {"dtype": default_dtype(flags.dtype)}


def _seeds(flags: ImageFlags) -> list[int]:
    """The seeds that the flags name, in order."""
    if flags.seed is not None:
        if not 0 <= flags.seed < SEEDS:
            raise UserError(f"--seed {flags.seed}: expected 0 to {SEEDS - 1}")
        return [flags.seed]
    ranges = []
    for part in flags.seeds.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--seeds {flags.seeds}: expected a number, a range such as 0-3, or several with commas")
        if int(match[2] or match[1]) >= SEEDS:
            raise UserError(f"--seeds {flags.seeds}: expected 0 to {SEEDS - 1}")
        ranges.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    if sum(map(len, ranges)) > MOST_SEEDS:
        raise UserError(f"--seeds {flags.seeds}: expected at most {MOST_SEEDS:,} seeds")
    return list(dict.fromkeys(itertools.chain(*ranges)))


def check_devices(mesh: str, attention: Kernel) -> None:
    """Checks the flags that say how to use the devices.

    Raises:
        UserError, ValueError: the devices make up no such mesh, or the kernel is for others.
    """
    make_mesh(mesh, jax.local_devices())
    needed = {"cudnn": "gpu", "flash": "tpu"}.get(attention, platform())
    if needed != platform():
        raise UserError(
            f"--attention {attention}: is a kernel for {needed.upper()}s, but JAX runs on {platform()} here; "
            "expected auto, xla or blocked"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


def _complete(images: ImageSet, work: ImageWork) -> bool:
    """Draws and writes what the folder lacks; whether it is finished, that is, no process was told to stop."""
    images.begin()
    out = work.flags.out
    if images.damaged:
        shown = [f"prompt {work.items[i].prompt.id} with seed {work.items[i].seed}" for i in images.damaged[:3]]
        more = ", ..." if len(images.damaged) > 3 else ""
        count = f"{len(images.damaged)} of {images.total} images"
        print(f"{out}: damaged and drawn again: {count} ({', '.join(shown)}{more})")
    if images.done:
        print(f"{out}: {images.done} of {images.total} images are there")
    # Where one process draws, the others come along: it may be told to stop, and then all do.
    if anywhere(len(images.pending) > 0) and not _draw_set(_load(work), images, work):
        print(f"{out}: stopped after {images.done} of {images.total} images; the same command resumes there")
        return False
    wait_for_others("all images are drawn")
    images.finish()
    if not images.process:
        write_cost(out, ImageCost(work.predictions))
    return True


def _load(work: ImageWork) -> TextToImage:
    """The checkpoint with its modules on the devices."""
    flags, drawing, devices = work.flags, work.drawing, jax.local_devices()
    dtype = default_dtype(flags.dtype)
    print(f"loading {drawing.checkpoint.path} on {len(devices)} x {devices[0].device_kind} in {dtype}")
    mesh = make_mesh(flags.mesh, devices)
    batch_size = flags.batch_size * (mesh.size // mesh.shape.get(AXIS, 1))
    draw = drawing.load(dtype=dtype, batch_size=batch_size, mesh=None if mesh.size == 1 else mesh)
    return dataclasses.replace(draw, prompt_syntax=flags.prompt_syntax)


def _draw_set(draw: TextToImage, images: ImageSet, work: ImageWork) -> bool:
    """Draws what is pending; whether all processes came to the end, that is, none was told to stop.

    Batches are always the same, whatever is there already: so an image comes out the same, bit by bit, in a run that
    was killed and resumes.
    """
    flags, items = work.flags, work.items
    own, pending = images.own, set(images.pending.tolist())
    size, steps = draw.batch_size, len(draw.solver.timesteps)
    batches = [(own[chosen], n) for chosen, n in chunks(len(own), size) if pending & set(own[chosen[:n]].tolist())]
    # A process that has no more batches still asks, in every round, whether to stop.
    rounds = int(np.max(multihost_utils.process_allgather(np.array(len(batches)))))
    table = tabulate(work.drawing.sampled, steps, size)
    given = [text for text in (flags.negative_prompt, flags.second_prompt) if text is not None]
    chunks_each = draw.count_chunks([*(item.prompt.text for item in items), *given])
    negative, second = (
        None if text is None else [text] * size for text in (flags.negative_prompt, flags.second_prompt)
    )
    # A program that reports its steps is never kept in the compilation cache; where steps are short, that costs more.
    numbers = sum(leaf.size for leaf in jax.tree.leaves(draw.pipeline.unet.params))
    by_step = flags.prompts is None and platform() == "cpu" and numbers >= LARGE
    total: dict[str, Any] = (
        {"total": len(batches) * steps} if by_step else {"total": images.total, "initial": images.done}
    )
    started, drawn, first = time.perf_counter(), 0, (0.0, 0)
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
                of_prompts = {"negative_prompts": negative, "second_prompts": second, "chunks": chunks_each}
                if by_step:
                    pixels = to_bytes(draw.draw(texts, keys, table, **of_prompts, bar=bar))
                else:
                    pixels = draw.draw_bytes(texts, keys, table, **of_prompts)
                wanted = [place for place, i in enumerate(chosen[:n]) if int(i) in pending]
                writer.put(chosen[wanted], _Chosen(pixels, wanted))
                drawn += len(wanted)
                if number == 0:  # what follows is compiled
                    jax.block_until_ready(pixels)
                    first = time.perf_counter(), drawn
            if stopping():
                break
    ended = time.perf_counter()
    if images.process == 0 and drawn > first[1]:
        images_each = (drawn - first[1]) * images.processes
        devices = f"{jax.local_device_count() * images.processes} x {jax.local_devices()[0].device_kind}"
        write_cost(flags.out, ImageCost(work.predictions, round((ended - first[0]) / images_each, 4), devices))
    seconds = ended - started
    print(f"drew {drawn} image{'s' * (drawn != 1)} in {seconds:.0f} s, {drawn / seconds:.3g} images/s")
    return not anywhere(len(images.pending) > 0)


class _Chosen:
    """Some images of a batch that is still being drawn."""

    def __init__(self, pixels: jax.Array, places: list[int]):
        self.pixels, self.places = pixels, places

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.pixels)[self.places]
