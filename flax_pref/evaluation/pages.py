"""The two pages of a comparison: report.html, to look at what it found, and vote.html, for blind votes by people.

Both are one file each that needs no network: templates, styles and scripts are in `templates`. What a prompt, a name or
a setting says reaches a page as JSON in a block that is never run, and is shown as text; a Content-Security-Policy
allows none but the page's own scripts.
"""

import base64
import collections
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import jinja2
import numpy as np
from etils import epath
from markupsafe import Markup
from PIL import Image

from flax_pref.data.images import decode_image
from flax_pref.data.pairs import Drop
from flax_pref.evaluation.comparison import ImageRef, Items
from flax_pref.files import replacing

Images = Literal["link", "embed", "none"]
EMBEDDED_SIDE = 512  # pixels; larger images are reduced to it
EMBEDDED_QUALITY = 85  # of WebP
DRAWING_SIDE = 128  # pixels; images up to it are embedded without loss, as every pixel of them is looked at
EMBEDDED_AT_ONCE = 64  # items whose images are encoded ahead of the one that is written


def write_pages(
    folder: str | Path, report: Mapping[str, Any], items: Items, *, images: Images = "link", title: str = "Comparison"
) -> None:
    """Writes report.html and vote.html; each appears under its name when it is complete.

    Images that are missing are left out of the pages, and of those that are copied also what their hash disowns.

    Args:
        folder: for the pages.
        report: what is in report.json.
        items: scores and images of each pair of prompt and seed.
        images: "link" refers to image files where they are, relative to `folder`, so that the pages must stay there;
            images within tar files or buckets are copied to `folder`/images/METHOD/PROMPT_ID-SEED.EXTENSION. "embed"
            puts copies of at most 512 pixels into either page, as WebP of quality 85: up to 70 kB for a photograph,
            which is for hundreds of prompts, not thousands. "none" shows scores only; then there is no vote.html.
        title: of the pages.

    Raises:
        ValueError: `images` is none of these.
    """
    if images not in ("link", "embed", "none"):
        raise ValueError(f"images: expected link, embed or none, not {images!r}")
    folder = Path(folder)
    methods = [method["name"] for method in report["methods"]]
    files = [items.files[method] for method in methods]
    shown = {
        "methods": methods,
        "baseline": methods.index(report["baseline"]),
        "ids": [int(number) for number in items.prompt_id],
        "seeds": [int(seed) for seed in items.seed],
        "prompts": _coded(items.prompt),
        "images": None,
    }
    if images == "link":
        shown["images"] = {"urls": [_linked(folder, method, items) for method in methods], "aspect": _aspect(files)}
    elif images == "embed":
        shown["images"] = {"embedded": True, "aspect": _aspect(files)}
    scored = {
        "rewards": list(report["rewards"]),
        "scores": [_packed(items.scores[reward], methods, len(items.prompt)) for reward in report["rewards"]],
        "categories": {column: _coded(values) for column, values in items.categories.items()},
    }
    pages = {"report": {"report": report, "items": {**shown, **scored}}}
    if images != "none":
        pages["vote"] = {"items": {**shown, "id": _identity(methods, files, shown)}}
    with ExitStack() as stack:
        opened = []
        for name, blocks in pages.items():
            unfinished = stack.enter_context(replacing(folder / f"{name}.html"))
            opened.append(stack.enter_context(unfinished.open("w", encoding="utf-8", newline="\n")))
            opened[-1].write(page_of(name, title, blocks, report=report, voted_on="vote" in pages))
        # Behind the page's own script, so that it shows before its images are read.
        for number, uris in enumerate(_embedded(files) if images == "embed" else ()):
            for page in opened:
                page.write(f'<script type="application/json" id="item-{number}">{_json(uris)}</script>\n')


def page_of(name: str, title: str, blocks: Mapping[str, Any], **shown: Any) -> str:
    """A page from the templates NAME.html.jinja, NAME.css and NAME.js, with styles and scripts in it.

    Args:
        name: of the templates.
        title: of the page.
        blocks: values by the ids of the JSON blocks in which the script finds them.
        shown: what the template shows.
    """
    theme = _template("theme.js")
    script = _template("common.js") + _template(f"{name}.js")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = lambda count: f"{count:,}"
    return environment.from_string(_template(f"{name}.html.jinja")).render(
        title=title,
        **shown,
        style=Markup(_template("common.css") + _template(f"{name}.css")),
        theme=Markup(theme),
        script=Markup(script),
        hashes=Markup(" ".join(_source_of(text) for text in (theme, script))),
        blocks={identifier: Markup(_json(values)) for identifier, values in blocks.items()},
    )


def _template(name: str) -> str:
    return (resources.files("flax_pref.evaluation") / "templates" / name).read_text(encoding="utf-8")


def _source_of(script: str) -> str:
    """The source expression that allows an inline script (Content Security Policy Level 2, section 4.2.5)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json(values: Any) -> str:
    """JSON in ASCII that neither ends nor opens an HTML element, whatever the texts in it say."""
    return json.dumps(values, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def _coded(texts: Sequence[str | None]) -> dict[str, list]:
    """Texts of which many are alike, as each one once and a number per text."""
    numbers: dict[str | None, int] = {}
    codes = [numbers.setdefault(text, len(numbers)) for text in texts]
    return {"values": list(numbers), "codes": codes}


def _packed(scores: Mapping[str, np.ndarray], methods: Sequence[str], count: int) -> str:
    """Scores `[methods, count]` as little-endian float32 in base64; NaN where a method has none."""
    unknown = np.full(count, np.nan)
    table = np.stack([np.asarray(scores.get(method, unknown), dtype="<f4") for method in methods])
    return base64.b64encode(table.tobytes()).decode()


def _identity(methods: Sequence[str], files: Sequence[Sequence[ImageRef]], shown: Mapping[str, Any]) -> str:
    """What votes are kept under: the same for the same images, wherever the page is."""
    hashes = [[ref.sha256 for ref in refs] for refs in files]
    return hashlib.sha256(_json([methods, shown["ids"], shown["seeds"], hashes]).encode()).hexdigest()[:16]


def _aspect(files: Sequence[Sequence[ImageRef]]) -> float:
    """Width over height of the first image whose size is known: of the frames that all are shown in."""
    return next((ref.width / ref.height for refs in files for ref in refs if ref.width and ref.height), 1.0)


def _linked(folder: Path, method: str, items: Items) -> dict[str, Any]:
    """URLs of a method's images relative to `folder`, as what they all begin with and the rest of each."""
    names, urls = collections.Counter(), []
    for number, seed, ref in zip(items.prompt_id, items.seed, items.files[method], strict=True):
        name = f"images/{_folder_name(method)}/{number}-{seed}"
        names[name] += 1  # two prompts may have one id
        urls.append(_url(folder, name if names[name] == 1 else f"{name}-{names[name]}", ref))
    prefix = os.path.commonprefix([url for url in urls if url is not None])
    return {"prefix": prefix, "rest": [None if url is None else url[len(prefix) :] for url in urls]}


def _url(folder: Path, copy: str, ref: ImageRef) -> str | None:
    if "://" in ref.folder or ref.file.endswith(".tar"):
        name = _copied(folder, copy, ref)
    else:
        file = os.path.join(ref.folder, ref.file)
        name = os.path.relpath(file, folder) if os.path.isfile(file) else None
    return None if name is None else quote(os.fsencode(name.replace(os.sep, "/")))


def _folder_name(method: str) -> str:
    """A method's name as a folder; where it must be changed for that, with a hash so that no two become one."""
    safe = re.sub(r"[^A-Za-z0-9_.-]|^\.", "_", method)[:60]
    return safe if safe == method else f"{safe}-{hashlib.sha256(method.encode(errors='replace')).hexdigest()[:8]}"


def _copied(folder: Path, name: str, ref: ImageRef) -> str | None:
    """Puts an image of a tar file or a bucket beside the pages, unless it is there; its name, with extension."""
    for there in (f"{name}.{extension}" for extension in ("png", "webp", "jpg")):
        file = folder / there
        if file.is_file() and file.stat().st_size == ref.size and _is(file.read_bytes(), ref):
            return there
    content = _content(ref)
    if content is None or (extension := _extension(content)) is None:
        return None
    with replacing(folder / f"{name}.{extension}") as unfinished:
        unfinished.write_bytes(content)
    return f"{name}.{extension}"


def _content(ref: ImageRef) -> bytes | None:
    """The bytes of an image; None if they are missing, or others than when it was scored."""
    try:
        with (epath.Path(ref.folder) / ref.file).open("rb") as file:
            file.seek(ref.offset)
            content = file.read(ref.size)
    except OSError:
        return None
    return content if _is(content, ref) else None


def _is(content: bytes, ref: ImageRef) -> bool:
    return not ref.sha256 or hashlib.sha256(content).hexdigest() == ref.sha256


def _extension(content: bytes) -> str | None:
    beginnings = {b"\x89PNG": "png", b"RIFF": "webp", b"\xff\xd8\xff": "jpg"}
    return next((extension for start, extension in beginnings.items() if content.startswith(start)), None)


def _embedded(files: Sequence[Sequence[ImageRef]]) -> Iterator[list[str | None]]:
    """Per item, the data URI of its image under every method."""
    rows = list(zip(*files, strict=True))
    with ThreadPoolExecutor() as threads:
        for start in range(0, len(rows), EMBEDDED_AT_ONCE):
            yield from threads.map(lambda refs: [_uri(ref) for ref in refs], rows[start : start + EMBEDDED_AT_ONCE])


def _uri(ref: ImageRef) -> str | None:
    content = _content(ref)
    image = None if content is None else decode_image(content, smallest_side=1)
    if image is None or isinstance(image, Drop):
        return None
    image.thumbnail((EMBEDDED_SIDE, EMBEDDED_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if max(image.size) <= DRAWING_SIDE:
        image.save(file, "WEBP", lossless=True)
    else:
        image.save(file, "WEBP", quality=EMBEDDED_QUALITY, method=2)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
