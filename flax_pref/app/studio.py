"""Draws for a page: one checkpoint with its modules, one drawing at a time, in the order they were asked for."""

import collections
import concurrent.futures
import dataclasses
import json
import logging
import re
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from flax_pref.app.app_flags import AppFlags
from flax_pref.app.offers import Offer, first_offer, offered
from flax_pref.checkpoints.modules import OWN_BASE
from flax_pref.config import UserError, check_seed
from flax_pref.diffusion.conditioning import chunks
from flax_pref.diffusion.drawing import Drawing, resolve_drawing
from flax_pref.diffusion.drawing_flags import DrawingFlags, with_preset
from flax_pref.diffusion.guidance import tabulate
from flax_pref.diffusion.prompt_syntax import check_prompts
from flax_pref.diffusion.sampler import image_keys
from flax_pref.diffusion.text_to_image import to_bytes, watched_steps
from flax_pref.images.image_files import encode_image
from flax_pref.images.image_flags import ImageFlags
from flax_pref.images.set_drawing import check_devices, settings_of
from flax_pref.models.bank import AXIS
from flax_pref.models.platform import default_dtype, platform
from flax_pref.parallel.mesh import make_mesh

Side = Literal["base", "guided"]
SIDES: tuple[Side, ...] = ("base", "guided")
KEPT = 64  # base images that another w does not draw again

# Names of flags in messages, and what stands on the page.
LABELS = {
    "--prompt": "Prompt",
    "--negative-prompt": "Negative prompt",
    "--seed": "Seed",
    "--seeds": "Seed",
    "--guidance-scale": "Guidance scale",
    "--steps": "Steps",
    "--w": "w",
    "--rule": "Rule",
}
OF_MODULES = ("module", "module_base", "w", "shaping", "proxy", "every", "between")  # flags that the base is free of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """A drawing that a visitor orders.

    Attributes:
        prompt: text.
        negative_prompt: text; "": none.
        rule: label of an `Offer`.
        w: strength as `--w` takes it; "" for rules without one.
        guidance_scale: as `--guidance-scale` takes it.
        steps: of the solver.
        seed: of the first image; those of the others follow.
        images: that are drawn, twice each: base and guided.
    """

    prompt: str
    negative_prompt: str
    rule: str
    w: str
    guidance_scale: str
    steps: int
    seed: int
    images: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A finished image.

    Attributes:
        side: base or guided.
        seed: of its noise.
        content: PNG file with all settings as its texts, see `image_files.encode_image`.
    """

    side: Side
    seed: int
    content: bytes


class StoppedByVisitor(Exception):
    """Raised inside of a running sampler, which ends by it."""


class StudioJob:
    """An order on its way; what its attributes say changes while it is drawn.

    Attributes:
        order: that is drawn.
        sides: that are drawn: base and guided, or the base alone.
        pictures: finished so far.
        notes: warnings, such as of a prompt that is cut.
        error: None, or why nothing more is drawn, as a person reads it.
        done, total: steps.
        drawing: side and number of the image that is drawn now.
        since: `time.monotonic()` when that began.
        stepping: whether it has taken a step; before the first one, programs are compiled.
        finished: set when nothing more is drawn.
        future: that of the worker.
    """

    def __init__(self, order: Order, sides: Sequence[Side]):
        self.order = order
        self.sides: tuple[Side, ...] = tuple(sides)
        self.pictures: list[Picture] = []
        self.notes: list[str] = []
        self.error: str | None = None
        self.done, self.total = 0, 0
        self.drawing: tuple[Side, int] | None = None
        self.future: concurrent.futures.Future | None = None
        self.since, self.stepping = 0.0, False
        self.finished = threading.Event()
        self._stop = threading.Event()

    @property
    def stopped(self) -> bool:
        """Whether a visitor has stopped it."""
        return self._stop.is_set()

    def stop(self) -> None:
        """See `Studio.stop`."""
        self._stop.set()

    def update(self) -> None:
        """Counts a step, see `StepBar`."""
        if self.stopped and platform() != "tpu":
            raise StoppedByVisitor
        self.stepping = True
        self.done += 1


class Studio:
    """Draws orders, one after another.

    Attributes:
        flags: that it was opened with; a preset among them is resolved.
        offers: the rules that the modules allow.
        first: what a page begins with.
        about: what is loaded, in a line.
        size: height and width of the images in pixels.
        example: a prompt to begin with.
    """

    def __init__(self, flags: AppFlags):
        """Finds the model and its modules and checks them; reads no weights, see `load`.

        Raises:
            UserError, ValueError, FileNotFoundError: as `resolve_drawing`, or the modules do not allow the rule.
        """
        self.flags = flags = with_preset(flags)
        check_devices(flags.mesh, flags.attention)
        self._mesh = make_mesh(flags.mesh, jax.local_devices())
        names = tuple(dict.fromkeys(text.partition("=")[0] for text in flags.module))
        self.offers = offered(names, flags)
        self.first = first_offer(self.offers, flags)
        # A rule that uses all modules, whatever they are: so all are found, checked and loaded.
        rule = "pgd" if len(names) == 1 else "multi"
        w = "1" if len(names) == 1 else ",".join(f"{name}=1" for name in names)
        changes: dict[str, Any] = {"rule": rule, "w": w, "every": 1, "between": "hold", "shaping": None, "proxy": None}
        self._drawing = resolve_drawing(dataclasses.replace(flags, **changes) if names else flags)
        order = Order(
            prompt="",
            negative_prompt="",
            rule=self.first.label,
            w=flags.w or ",".join(f"{name}=1" if name != "w" else "1" for name in self.first.strengths),
            guidance_scale=flags.guidance_scale,
            steps=flags.steps,
            seed=0,
            images=1,
        )
        for side in self.sides(order):
            self._resolved(order, side)  # what the flags say, checked before weights are read
        devices = jax.local_devices()
        self.dtype = default_dtype(flags.dtype)
        self.size = self._drawing.size
        self.about = (
            f"{flags.model} on {len(devices)} x {devices[0].device_kind} in {self.dtype}, "
            f"{self.size[1]} x {self.size[0]} pixels, " + (f"modules {', '.join(names)}" if names else "no modules")
        )
        self.example = "a large red circle in the middle, white background" if flags.model == "demo" else ""
        self._bases: collections.OrderedDict[str, bytes] = collections.OrderedDict()
        self._queue: list[StudioJob] = []
        self._lock = threading.Lock()
        # One thread computes. So visitors wait for each other, and JAX gets one program at a time.
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="studio")
        logging.getLogger("jax._src.debugging").addFilter(_is_no_stop)

    def load(self) -> None:
        """Reads the weights.

        Raises:
            FileNotFoundError, ValueError: a file is missing, damaged, or does not fit.
        """
        mesh, flags = self._mesh, self.flags
        batch_size = flags.batch_size * (mesh.size // mesh.shape.get(AXIS, 1))
        draw = self._drawing.load(dtype=self.dtype, batch_size=batch_size, mesh=None if mesh.size == 1 else mesh)
        self._draw = dataclasses.replace(draw, prompt_syntax=flags.prompt_syntax)
        self._fingerprints = self._drawing.fingerprints()

    def offer(self, label: str) -> Offer:
        """The offer of a label.

        Raises:
            UserError: there is none.
        """
        for offer in self.offers:
            if offer.label == label:
                return offer
        raise UserError(f"Rule {label!r}: is not offered; expected {', '.join(offer.label for offer in self.offers)}")

    def sides(self, order: Order) -> tuple[Side, ...]:
        """The sides that an order draws: a rule without modules is that of the base."""
        return SIDES if self.offer(order.rule).modules else SIDES[:1]

    def submit(self, order: Order) -> StudioJob:
        """Puts an order into the queue.

        Raises:
            UserError, ValueError: it cannot be drawn; the message is for a terminal, see `readable`.
        """
        if not order.prompt.strip():
            raise UserError("Prompt: empty; describe what to draw")
        check_seed(order.seed, "Seed")
        check_prompts([order.prompt, order.negative_prompt], self.flags.prompt_syntax)
        job = StudioJob(order, self.sides(order))
        work: dict[Side, tuple[ImageFlags, Drawing]] = {side: self._resolved(order, side) for side in job.sides}
        job.total = sum(len(drawing.solver.timesteps) for _, drawing in work.values()) * len(self._batches(order))
        with self._lock:
            self._queue.append(job)
            job.future = self._worker.submit(self._finish, job, work)
        return job

    def stop(self, job: StudioJob) -> None:
        """Ends a job: at once where it waits, else after the current step.

        On TPUs it ends after the current batch, for no exception ends a program there.
        """
        job.stop()
        if job.future is not None and job.future.cancel():
            self._leave(job)

    def ahead(self, job: StudioJob) -> int:
        """Orders that are drawn before this one."""
        with self._lock:
            before = self._queue[: self._queue.index(job)] if job in self._queue else []
        return sum(not other.stopped for other in before)

    def close(self) -> None:
        """Stops what is drawn and what waits."""
        for job in list(self._queue):
            self.stop(job)
        self._worker.shutdown(wait=True)

    # ------------------------------------------------------------------------------------------------------------------

    def _resolved(self, order: Order, side: Side) -> tuple[ImageFlags, Drawing]:
        """The flags of `flax-pref sample` that draw the same image, and what they ask for."""
        flags = self.flags
        given = {field.name: getattr(flags, field.name) for field in dataclasses.fields(DrawingFlags)}
        given |= {"prompt_syntax": flags.prompt_syntax, "guidance_scale": order.guidance_scale, "steps": order.steps}
        defaults = {field.name: field.default for field in dataclasses.fields(DrawingFlags)}
        if side == "base":
            given |= {name: defaults[name] for name in OF_MODULES} | {"rule": "cfg"}
        else:
            offer = self.offer(order.rule)
            used = tuple(text for text in flags.module if text.partition("=")[0] in offer.modules)
            given |= {"module": used, "rule": offer.rule, "w": order.w if offer.strengths else None}
            if not offer.strengths:
                given |= {name: defaults[name] for name in ("every", "between", "shaping")}
            if offer.rule != "chats":
                given |= {"proxy": None}
        asked = ImageFlags(
            **given, prompt=(order.prompt,), seed=order.seed, negative_prompt=order.negative_prompt or None
        )
        drawing = self._drawing.changed(asked)
        return asked, drawing

    def _batches(self, order: Order) -> list[tuple[np.ndarray, int]]:
        shards = 1 if self._mesh.size == 1 else self._mesh.size // self._mesh.shape.get(AXIS, 1)
        return list(chunks(order.images, self.flags.batch_size * shards))

    def _finish(self, job: StudioJob, work: Mapping[Side, tuple[ImageFlags, Drawing]]) -> None:
        try:
            if not job.stopped:
                self._draw_all(job, work)
        except Exception as error:
            if not job.stopped:
                job.error = readable(error)
        finally:
            self._leave(job)

    def _leave(self, job: StudioJob) -> None:
        with self._lock:
            if job in self._queue:  # a job may be stopped twice
                self._queue.remove(job)
        job.finished.set()

    def _draw_all(self, job: StudioJob, work: Mapping[Side, tuple[ImageFlags, Drawing]]) -> None:
        order = job.order
        seeds = [(order.seed + i) % 2**32 for i in range(order.images)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            count = self._draw.count_chunks([order.prompt, order.negative_prompt])
        job.notes += list(dict.fromkeys(str(warning.message) for warning in caught))
        for chosen, n in self._batches(order):
            for side in job.sides:
                flags, drawing = work[side]
                if job.stopped:
                    return
                job.drawing = side, int(chosen[0]) + 1
                job.since, job.stepping = time.monotonic(), False
                wanted = [seeds[i] for i in chosen]
                keys = [self._key(flags, seed) for seed in wanted]
                steps = len(drawing.solver.timesteps)
                if side == "base" and all(key in self._bases for key in keys):
                    job.total -= steps
                    contents = [self._bases[key] for key in keys[:n]]
                else:
                    contents = self._contents(job, flags, drawing, wanted, count)[:n]
                for key, seed, content in zip(keys, wanted, contents, strict=False):
                    job.pictures.append(Picture(side=side, seed=seed, content=content))
                    if side == "base":
                        self._bases[key] = content
                        self._bases.move_to_end(key)
                while len(self._bases) > KEPT:
                    self._bases.popitem(last=False)

    def _contents(
        self, job: StudioJob, flags: ImageFlags, drawing: Drawing, seeds: Sequence[int], count: int
    ) -> list[bytes]:
        """A batch as PNG files."""
        if drawing.imitated_guidance != self._draw.imitated_guidance:
            self._draw = dataclasses.replace(self._draw, imitated_guidance=drawing.imitated_guidance)
        table = tabulate(drawing.sampled, len(drawing.solver.timesteps), len(seeds))
        negative = None if flags.negative_prompt is None else [flags.negative_prompt] * len(seeds)
        before = job.done
        with watched_steps(job, True) as bar:
            keys = image_keys(seeds, [0] * len(seeds))
            prompts = [job.order.prompt] * len(seeds)
            given = {"negative_prompts": negative, "chunks": count, "bar": bar, "solver": drawing.solver}
            images = self._draw.draw(prompts, keys, table, **given)
            pixels = np.asarray(to_bytes(images))
        job.done = before + len(drawing.solver.timesteps)  # on several devices each may have counted
        return [
            encode_image(image, self._metadata(flags, seed), "png") for image, seed in zip(pixels, seeds, strict=True)
        ]

    def _metadata(self, flags: ImageFlags, seed: int) -> dict[str, Any]:
        """The metadata that `flax-pref sample` writes into the same image."""
        used = {text.partition("=")[0] for text in flags.module}
        used |= {OWN_BASE} if flags.module_base is not None else set()
        prints = {
            name: {own: told for own, told in value.items() if own in used} if isinstance(value, dict) else value
            for name, value in self._fingerprints.items()
        }
        described = {"prompt": flags.prompt[0], "prompt_id": 0, "group": "", "seed": seed}
        return described | settings_of(flags) | prints

    def _key(self, flags: ImageFlags, seed: int) -> str:
        return json.dumps([flags.prompt[0], seed, settings_of(flags)])


def readable(error: Exception) -> str:
    """The text of an error for visitors: its own message with the names of the page, or where the traceback is."""
    if isinstance(error, UserError | ValueError | OSError | FloatingPointError):
        text = " ".join(str(error).split())
        return re.sub(r"--[a-z][a-z-]*", lambda flag: LABELS.get(flag[0], flag[0]), text)
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return (
            "The device has not enough memory for this drawing. Start the page with a smaller --height and --width, "
            "with --batch-size 1, or with --dtype bfloat16."
        )
    traceback.print_exception(error)
    first = text.strip().splitlines()[0][:200] if text.strip() else ""
    return (
        f"This is a defect of the program, not of what you asked for ({type(error).__name__}: {first}). The "
        "terminal that serves this page has the details."
    )


def _is_no_stop(record: logging.LogRecord) -> bool:
    """Whether a message of JAX is about anything but a sampler that a visitor has stopped."""
    return not (record.exc_info and isinstance(record.exc_info[1], StoppedByVisitor))
