"""The page, in gradio: fields on the left, images on the right, and what was drawn before under them."""

import dataclasses
import html
import importlib.resources
import re
import shutil
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import gradio as gr
from gradio.themes import Default

from flax_pref.app.app_flags import AppFlags
from flax_pref.app.studio import Order, Picture, Studio, StudioJob, readable
from flax_pref.config import UserError

MOST_IMAGES = 8
REMEMBERED = 30  # orders of a visitor
SMALL = 256  # pixels; smaller images are enlarged pixel by pixel
NUMBER = re.compile(r"-?\d+(\.\d+)?")

EMPTY = "<div class='empty'>Describe what to draw and press <b>Draw</b>. The images appear here.</div>"
# Clicks on buttons within HTML come to Python with the number of the entry.
CHOOSE = """element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-entry]");
  if (button) trigger("click", {entry: button.dataset.entry});
});"""


class Entry(NamedTuple):
    """An order of a visitor with the files of its images.

    Attributes:
        job: that draws or drew it.
        folder: of its files.
        form: values of the fields.
        size: height and width of the images in pixels.
        files: name of the file of each of the job's pictures.
    """

    job: StudioJob
    folder: Path
    form: Mapping[str, Any]
    size: tuple[int, int]
    files: list[str]


class Visitors:
    """Drawings of each tab, newest last; closing a tab deletes its files."""

    def __init__(self, studio: Studio, folder: Path):
        self._studio, self._folder = studio, folder
        self._entries: dict[str, list[Entry]] = {}

    def entries(self, request: gr.Request) -> list[Entry]:
        """Those of the tab that asks."""
        return self._entries.setdefault(str(request.session_hash), [])

    def begin(self, job: StudioJob, form: Mapping[str, Any], size: tuple[int, int], request: gr.Request) -> Entry:
        """A new entry; the oldest goes where there are many."""
        entries = self.entries(request)
        folder = self._folder / uuid.uuid4().hex
        folder.mkdir(parents=True)
        entries.append(Entry(job, folder, form, size, []))
        while len(entries) > REMEMBERED:
            shutil.rmtree(entries.pop(0).folder, ignore_errors=True)
        return entries[-1]

    def leave(self, request: gr.Request) -> None:
        """A tab is closed: what it waits for is stopped, and its files go."""
        for entry in self._entries.pop(str(request.session_hash), []):
            self._studio.stop(entry.job)
            shutil.rmtree(entry.folder, ignore_errors=True)


def open_page(studio: Studio, folder: Path, flags: AppFlags) -> tuple[Callable[[], None], str | None]:
    """Serves the page in threads of its own.

    Args:
        studio: that draws.
        folder: for images; the page may show what lies in it.
        flags: host, port and whether to share.

    Returns:
        what ends it, and the public address, if one was asked for.

    Raises:
        OSError: the port cannot be listened on, or there is no public address.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = make_page(studio, Visitors(studio, folder))
    settings: dict[str, Any] = {
        **{"server_name": flags.host, "server_port": flags.port, "share": flags.share, "inbrowser": False},
        **{"prevent_thread_lock": True, "quiet": True, "footer_links": [], "run_history": False, "ssr_mode": False},
        **{"pwa": False, "mcp_server": False, "enable_monitoring": False, "allowed_paths": [str(folder)]},
    }
    _, _, public = blocks.launch(
        **settings,
        theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),  # fetches none
        css=importlib.resources.files("flax_pref.app").joinpath("page.css").read_text(encoding="utf-8"),
    )
    if flags.share and not public:
        blocks.close()
        raise OSError("--share: Gradio's servers gave no public address; leave it out, or look at the network")
    return partial(blocks.close, verbose=False), public or None


def make_page(studio: Studio, visitors: Visitors) -> gr.Blocks:
    """The page, not yet served."""
    flags, first = studio.flags, studio.first
    modules = list(dict.fromkeys(name for offer in studio.offers for name in offer.modules))
    plain = flags.w is not None and NUMBER.fullmatch(flags.w) is not None
    w = min(20.0, max(0.0, float(flags.w))) if plain and flags.w else 4.0
    guidance_plain = NUMBER.fullmatch(flags.guidance_scale) is not None
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    at_once = {**private, "queue": False}

    with gr.Blocks(title="flax_pref", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f"<h1>flax_pref</h1><p>{html.escape(studio.about)}</p>", elem_id="title", apply_default_css=False)
        with gr.Row():
            with gr.Column(scale=1, min_width=320, elem_id="settings"):
                prompt = gr.Textbox(
                    label="Prompt", lines=3, max_lines=6, value=studio.example, autofocus=True,
                    placeholder="a lighthouse in a storm",
                )  # fmt: skip
                negative = gr.Textbox(
                    label="Negative prompt", lines=1, max_lines=3, placeholder="what to steer away from (optional)"
                )
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw", scale=2, min_width=100)
                    stop = gr.Button("Stop", elem_id="stop", interactive=False, scale=1, min_width=80)
                rule = gr.Dropdown(
                    [offer.label for offer in studio.offers],
                    **{"value": first.label, "label": "Rule", "info": first.about, "filterable": False},
                    visible=len(studio.offers) > 1,
                )
                strength = gr.Slider(0, 20, value=w, step=0.25, label="w (strength)", visible=first.strengths == ("w",))
                own = [
                    gr.Slider(-20, 20, value=1, step=0.25, label=f"w of {name}", visible=first.rule == "multi")
                    for name in modules
                ]
                guidance = gr.Slider(
                    0, 20, value=float(flags.guidance_scale) if guidance_plain else 7.5, step=0.5,
                    label="Guidance scale",
                )  # fmt: skip
                steps = gr.Slider(1, max(100, flags.steps), value=flags.steps, step=1, label="Steps")
                with gr.Row():
                    seed = gr.Number(value=0, precision=0, label="Seed", scale=2, min_width=120)
                    new_seed = gr.Button("New seed", size="md", elem_id="new-seed", scale=1, min_width=110)
                images = gr.Slider(1, MOST_IMAGES, value=1, step=1, label="Images, each with its own seed")
                with gr.Accordion("Schedules", open=not (plain or flags.w is None) or not guidance_plain):
                    schedule = gr.Textbox(
                        value="" if plain or flags.w is None else flags.w, label="w as a schedule",
                        info="Takes the place of the slider: linear:8:0, 4@0.2:0.8, norm:0.3, pos=3,neg=1",
                        visible=bool(modules),
                    )  # fmt: skip
                    guidance_schedule = gr.Textbox(
                        value="" if guidance_plain else flags.guidance_scale, label="Guidance scale as a schedule",
                        info="Takes the place of the slider: linear:9:5, 7.5@0:0.5",
                    )  # fmt: skip
            with gr.Column(scale=2, min_width=320, elem_id="results"):
                state = gr.HTML("<div class='state'></div>", elem_id="state", apply_default_css=False)
                pairs = gr.HTML(EMPTY, elem_id="pairs", apply_default_css=False)
                archive = gr.DownloadButton("Download all (zip)", visible=False, size="sm", elem_id="archive")
                with gr.Accordion("History of this tab", visible=False) as past:
                    history = gr.HTML("", elem_id="history", js_on_load=CHOOSE, apply_default_css=False)

        fields = {
            "prompt": prompt, "negative": negative, "rule": rule, "strength": strength, "guidance": guidance,
            "steps": steps, "seed": seed, "images": images, "schedule": schedule,
            "guidance_schedule": guidance_schedule,
        }  # fmt: skip
        fields |= {f"w of {name}": slider for name, slider in zip(modules, own, strict=True)}
        shown = [state, pairs, archive, past, history, draw, stop]

        def on_draw(request: gr.Request, *values) -> Iterator[tuple]:
            form = dict(zip(fields, values, strict=True))
            try:
                job = studio.submit(order_of(form, modules, studio))
            except Exception as error:
                yield gr.HTML(state_of(None, readable(error))), *[gr.skip()] * 4, BUTTON_READY, BUTTON_IDLE
                return
            entry = visitors.begin(job, form, studio.size, request)
            try:
                yield from follow(entry, studio, visitors.entries(request))
            except Exception as error:  # such as a full disk
                yield gr.HTML(state_of(None, readable(error))), *[gr.skip()] * 4, BUTTON_READY, BUTTON_IDLE
            finally:  # whatever ends this, such as a tab that is closed
                studio.stop(job)

        def on_stop(request: gr.Request) -> Any:
            for entry in visitors.entries(request):
                studio.stop(entry.job)
            return gr.Button(value="Stopping", interactive=False)

        def on_rule(label: str) -> list[Any]:
            offer = studio.offer(label)
            return [
                gr.Dropdown(info=offer.about),
                gr.Slider(visible=offer.strengths == ("w",)),
                *(gr.Slider(visible=offer.rule == "multi") for _ in modules),
            ]

        def on_choose(event: gr.EventData, request: gr.Request) -> list[Any]:
            entries = visitors.entries(request)
            chosen = [entry for entry in entries if entry.folder.name == event.entry and entry.job.finished.is_set()]
            if not chosen:
                return [gr.skip()] * (len(fields) + 4)
            (entry,) = chosen
            return [
                *entry.form.values(),
                gr.HTML(state_of(entry.job)),
                gr.HTML(pairs_of(entry)),
                archive_of(entry),
                gr.HTML(history_of(entries, entry)),
            ]

        gr.on(
            [draw.click, prompt.submit, negative.submit], on_draw, list(fields.values()), shown,
            concurrency_limit=None, trigger_mode="once", **private,
        )  # fmt: skip
        stop.click(on_stop, None, stop, **at_once)
        rule.change(on_rule, rule, [rule, strength, *own], **at_once)
        new_seed.click(lambda: uuid.uuid4().int % 2**32, None, seed, **at_once)
        history.click(on_choose, None, [*fields.values(), state, pairs, archive, history], **at_once)
        page.unload(visitors.leave)
    return page


def order_of(form: Mapping[str, Any], modules: list[str], studio: Studio) -> Order:
    """The order that the fields describe.

    Raises:
        UserError: a field has no number.
    """
    for name in ("seed", "steps", "images"):
        if not isinstance(form[name], int | float) or form[name] != int(form[name]):
            raise UserError(f"{name.capitalize()}: expected a whole number")
    strengths = studio.offer(form["rule"]).strengths
    if strengths == ("w",):
        w = f"{form['strength']:g}"
    else:
        w = ",".join(f"{name}={form[f'w of {name}']:g}" for name in strengths)
    return Order(
        prompt=form["prompt"],
        negative_prompt=form["negative"].strip(),
        rule=form["rule"],
        w=(form["schedule"].strip() or w) if strengths else "",
        guidance_scale=form["guidance_schedule"].strip() or f"{form['guidance']:g}",
        steps=int(form["steps"]),
        seed=int(form["seed"]),
        images=int(form["images"]),
    )


BUTTON_READY = gr.Button(interactive=True)
BUTTON_BUSY = gr.Button(interactive=False)
BUTTON_STOPS = gr.Button(value="Stop", interactive=True)
BUTTON_IDLE = gr.Button(value="Stop", interactive=False)


def follow(entry: Entry, studio: Studio, entries: list[Entry]) -> Iterator[tuple]:
    """Updates of the page while an order is drawn: state, images, archive, history, and the buttons."""
    job, seen, said = entry.job, -1, ""
    while not job.finished.is_set():
        grown = len(job.pictures) > seen
        if grown:
            seen = len(job.pictures)
            save(entry, seen)
        text = state_of(job, ahead=studio.ahead(job))
        if grown or text != said:
            said = text
            images = gr.HTML(pairs_of(entry)) if grown else gr.skip()
            archive = gr.DownloadButton(visible=False)
            yield gr.HTML(text), images, archive, *[gr.skip()] * 2, BUTTON_BUSY, gr.skip() if seen else BUTTON_STOPS
        job.finished.wait(0.2)
    save(entry, len(job.pictures))
    job.pictures = [dataclasses.replace(picture, content=b"") for picture in job.pictures]  # the files have it
    if not entry.files:
        entries.remove(entry)
    yield (
        gr.HTML(state_of(job)),
        gr.HTML(pairs_of(entry)),
        archive_of(entry),
        gr.Accordion(visible=bool(entries)),
        gr.HTML(history_of(entries, entry)),
        BUTTON_READY,
        BUTTON_IDLE,
    )


def save(entry: Entry, count: int) -> None:
    """Writes the first so many images of an order, where they are not written yet."""
    for picture in entry.job.pictures[len(entry.files) : count]:
        name = file_name(entry.job.order, picture)
        (entry.folder / name).write_bytes(picture.content)
        entry.files.append(name)


def file_name(order: Order, picture: Picture) -> str:
    """A name that tells what an image shows, such as `a-red-circle-seed0-cpgd-w4.png`."""
    words = re.sub(r"[^a-z0-9]+", "-", order.prompt.lower()).strip("-")[:40].strip("-") or "image"
    how = "base" if picture.side == "base" else told(order).replace("w = ", "w")
    how = re.sub(r"[^A-Za-z0-9.=_-]+", "-", how).strip("-")
    return f"{words}-seed{picture.seed}-{how}.png"


def archive_of(entry: Entry) -> Any:
    """The button that downloads all images of an order; hidden where there is none."""
    file = entry.folder / "images.zip"
    if entry.files and not file.exists():
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name in entry.files:
                archive.write(entry.folder / name, name)
    return gr.DownloadButton(value=str(file), visible=True) if entry.files else gr.DownloadButton(visible=False)


# ----------------------------------------------------------------------------------------------------------------------
# HTML


def state_of(job: StudioJob | None, error: str | None = None, *, ahead: int = 0) -> str:
    """How far an order is, or why it is not drawn."""
    error = error or (job.error if job else None)
    parts = []
    if error:
        parts.append(f"<div class='error' role='alert'>{html.escape(error)}</div>")
    elif job is not None and job.finished.is_set():
        drawn = f"{len(job.pictures)} image{'s' * (len(job.pictures) != 1)}"
        parts.append(f"Stopped after {drawn}." if job.stopped else f"Drew {drawn}.")
    elif job is not None:
        parts.append(f"<div aria-live='polite'>{html.escape(doing(job, ahead))}</div>")
        value = f" value='{min(job.done / max(job.total, 1), 1):.3f}'" if job.done and not ahead else ""
        parts.append(f"<progress max='1'{value} aria-label='Progress'></progress>")
    parts += [f"<div class='note'>{html.escape(note)}</div>" for note in (job.notes if job else [])]
    return f"<div class='state'>{''.join(parts)}</div>"


def doing(job: StudioJob, ahead: int) -> str:
    """The current work on an order, in a sentence."""
    if job.stopped:
        return "Stopping after this step"
    if ahead:
        return f"Waiting for {ahead} other drawing{'s' * (ahead != 1)}"
    if job.drawing is None:
        return "Starting"
    side, number = job.drawing
    of = f" {number} of {job.order.images}" if job.order.images > 1 else ""
    what = f"{side.capitalize()} image{of}"
    seconds = f"{time.monotonic() - job.since:.0f} s"
    if not job.stepping:
        return f"{what}: preparing, {seconds}; the first drawing of a rule and number of steps compiles a program"
    return f"{what}: step {min(job.done, job.total)} of {job.total}, {seconds}"


def pairs_of(entry: Entry) -> str:
    """The images of an order in rows of base and guided."""
    job, order = entry.job, entry.job.order
    drawn = {(picture.side, picture.seed): name for picture, name in zip(job.pictures, entry.files, strict=False)}
    seeds = [(order.seed + i) % 2**32 for i in range(order.images)]
    if job.finished.is_set():
        seeds = [seed for seed in seeds if any(seed == other for _, other in drawn)]
    if not seeds:
        return EMPTY
    captions = {"base": f"Base, guidance {order.guidance_scale}", "guided": told(order)}
    single = " single" if len(job.sides) == 1 else ""
    looks, shape = looks_of(entry.size), f"aspect-ratio: {entry.size[1]} / {entry.size[0]}"
    rows = []
    for seed in seeds:
        figures = []
        for side in job.sides:
            caption = f"<span><b>{html.escape(captions[side])}</b></span>"
            if name := drawn.get((side, seed)):
                link = html.escape(address(entry.folder / name))
                alt = html.escape(f"{captions[side]}, seed {seed}: {order.prompt}", quote=True)
                shown = (
                    f"<a href='{link}' target='_blank' title='Open in its own size'>"
                    f"<img class='{looks}' src='{link}' alt='{alt}' style='{shape}'></a>"
                )
                caption += f"<a href='{link}' download='{html.escape(name, quote=True)}'>Download PNG</a>"
            else:
                shown = f"<div class='wait' style='{shape}'>…</div>"
            figures.append(f"<figure data-side='{side}'>{shown}<figcaption>{caption}</figcaption></figure>")
        rows.append(
            f"<div><div class='drawn'>Seed {seed}</div><div class='pair{single}'>{''.join(figures)}</div></div>"
        )
    return f"<div class='drawn'>{html.escape(order.prompt)}</div><div class='pairs'>{''.join(rows)}</div>"


def history_of(entries: list[Entry], current: Entry) -> str:
    """Buttons that bring back what was drawn, newest first."""
    buttons = []
    for entry in reversed(entries):
        if not entry.files:
            continue
        order = entry.job.order
        about = html.escape(f"{told(order)}, seed {order.seed}: {order.prompt}", quote=True)
        link = html.escape(address(entry.folder / entry.files[min(1, len(entry.files) - 1)]))  # the guided one
        buttons.append(
            f"<button type='button' data-entry='{entry.folder.name}' title='{about}' "
            f"aria-current='{str(entry is current).lower()}'><img class='{looks_of(entry.size)}' src='{link}' alt=''>"
            f"<span>{about}</span></button>"
        )
    return f"<div class='history'>{''.join(buttons)}</div>"


def told(order: Order) -> str:
    """The rule and its strength."""
    return f"{order.rule}, w = {order.w}" if order.w else order.rule


def looks_of(size: tuple[int, int]) -> str:
    """Class of images of a height and width."""
    return "small" if max(size) < SMALL else ""


def address(file: Path) -> str:
    """Where the page finds a file."""
    return f"gradio_api/file={quote(str(file))}"
