import base64
import functools
import hashlib
import html.parser
import io
import json
import os
import re
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from flax_pref.evaluation.comparison import ScoredRun, compare, pair_runs
from flax_pref.evaluation.pages import write_pages

HOSTILE = [
    "</script><script>window.__pwned = 1</script>",
    "<img src=x onerror=\"window.__pwned = 2\"> & &lt;b&gt; 'quotes'",
    "<!-- <script> \u2028 \u2029 \0 `${window.__pwned = 3}`",
    "\u202eمدينة قديمة عند الغروب",
    "🐙 " + "a very long prompt, " * 100,
    "",
]


def picture(size, number, image_format="PNG", **options):
    """An image file whose content is the same on every run: noise where small, else a gradient."""
    width, height = size
    if max(size) <= 128:
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3))
    else:
        pixels = np.add.outer(np.arange(height), np.arange(width))[..., None] * [1, 2, 3] / 4 + 40 * number
    file = io.BytesIO()
    Image.fromarray((pixels % 256).astype(np.uint8)).save(file, image_format, **options)
    return file.getvalue()


@functools.cache
def size_of(content):
    return Image.open(io.BytesIO(content)).size if content.startswith(b"\x89PNG") else (0, 0)


def comparison_of(folder, prompts, *, methods=("base", "dpo", "cpgd"), rewards=("pickscore", "aesthetic"), seeds=1,
                  settings=None, records=None, ids=None, content=None, name="{number}.png", tar=False,
                  scores=None):  # fmt: skip
    """What sample.report passes on: runs scored at random, and their images.

    Args:
        content: `(method number, image number)` -> bytes; None: no images are written.
        tar: lay the images into one file per run, as in shards.
    """
    prompts = [prompt for prompt in prompts for _ in range(seeds)]
    count, draw = len(prompts), np.random.default_rng(0)
    quality, runs = draw.normal(size=count), []
    for place, method in enumerate(methods):
        run = folder / "runs" / str(place)
        run.mkdir(parents=True, exist_ok=True)
        contents = [b"" if content is None else content(place, number) for number in range(count)]
        files = ["0.tar" if tar else name.format(number=number) for number in range(count)]
        offsets = np.cumsum([512, *(len(data) for data in contents)])[:-1] if tar else [0] * count
        if tar:
            (run / "0.tar").write_bytes(bytes(512) + b"".join(contents))
        elif content is not None:
            for file, data in dict(zip(files, contents, strict=True)).items():
                (run / file).write_bytes(data)
        sizes = [size_of(data) for data in contents]
        rows = {
            "prompt_id": (np.arange(count) // seeds).tolist() if ids is None else ids,
            "prompt": prompts,
            "group": [""] * count,
            "seed": (np.arange(count) % seeds).tolist(),
            "settings": [json.dumps((settings or {}).get(method, {"rule": method, "steps": 50}))] * count,
            "model_sha256": [""] * count,
            "modules_sha256": [""] * count,
            "file": files,
            "offset": offsets,
            "size": [len(data) for data in contents],
            "sha256": [hashlib.sha256(data).hexdigest() for data in contents],
            "width": [width for width, _ in sizes],
            "height": [height for _, height in sizes],
            "record": [json.dumps((records or (lambda i: {}))(number // seeds)) for number in range(count)],
            "problem": [""] * count,
        }
        for reward in rewards:
            drawn = 20 + quality + 0.4 * place + 0.5 * draw.normal(size=count)
            drawn = drawn if scores is None else np.array(scores[reward][method])
            rows[f"score:{reward}"] = pa.array(drawn.astype(np.float32))
        runs.append(ScoredRun(method, str(run), pa.table(rows), {}))
    items = pair_runs(runs, rewards)
    return compare(runs, items, methods[0]), items


class Blocks(html.parser.HTMLParser):
    """The scripts and blocks of a page as a browser splits them, and what its other elements refer to."""

    def __init__(self, file):
        super().__init__()
        self.scripts, self.json, self.links, self.policy, self._open = [], {}, [], "", None
        self.feed(file.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        if tag == "script":
            self._open = attributes.get("id")
            self.scripts += [""] if self._open is None else []
            self.json |= {} if self._open is None else {self._open: ""}

    def handle_data(self, data):
        if self.cdata_elem == "script":
            if self._open is None:
                self.scripts[-1] += data
            else:
                self.json[self._open] += data

    def items(self):
        return json.loads(self.json["items"])


def decoded(coded):
    return [coded["values"][code] for code in coded["codes"]]


@pytest.mark.parametrize("page", ["report", "vote"])
def test_texts_cannot_leave_their_block_and_come_back_as_they_were(tmp_path, page):
    methods = ("</script><b>base", '"dpo"', "c&pgd <!--")
    report, items = comparison_of(tmp_path, HOSTILE, methods=methods, records=lambda i: {"Category": HOSTILE[i]})
    write_pages(tmp_path, report, items, title="<script>window.__pwned = 4</script>")
    read = Blocks(tmp_path / f"{page}.html")
    assert len(read.scripts) == 2  # the theme's and the page's own
    assert set(read.json) == ({"report", "items"} if page == "report" else {"items"})
    assert sorted(decoded(read.items()["prompts"])) == sorted(HOSTILE)
    assert read.items()["methods"] == list(methods)
    if page == "report":
        assert json.loads(read.json["report"]) == report


@pytest.mark.parametrize("page", ["report", "vote"])
def test_a_page_needs_no_network_and_runs_no_script_but_its_own(tmp_path, page):
    write_pages(tmp_path, *comparison_of(tmp_path, ["a", "b"]))
    read = Blocks(tmp_path / f"{page}.html")
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in read.scripts]
    assert "default-src 'none'" in read.policy
    assert re.search("script-src ([^;]*);", read.policy)[1].split() == [f"'sha256-{each}'" for each in hashes]
    assert [link for link in read.links if not link.startswith("#")] in (
        ["data:,", "vote.html"],
        ["data:,", "report.html"],
    )
    assert "url(" not in (tmp_path / f"{page}.html").read_text(encoding="utf-8")


def test_links_lead_to_the_images_whatever_their_files_are_called(tmp_path):
    content = lambda place, number: picture((8, 8), 10 * place + number)  # noqa: E731
    report, items = comparison_of(tmp_path, ["a", "b"], content=content, name="ü #?%20 '\"<{number}>.png")
    write_pages(tmp_path / "deep" / "report", report, items)
    for place, urls in enumerate(Blocks(tmp_path / "deep/report/report.html").items()["images"]["urls"]):
        for number, rest in enumerate(urls["rest"]):
            url = urls["prefix"] + rest
            assert re.fullmatch(r"[\w./%~-]+", url, re.ASCII)
            assert (tmp_path / "deep/report" / unquote(url)).read_bytes() == content(place, number)
    assert not (tmp_path / "deep/report/images").exists()


def test_members_of_tar_files_are_laid_beside_the_pages_once(tmp_path):
    content = lambda place, number: picture((8, 8), 10 * place + number, ("PNG", "WEBP", "JPEG")[place])  # noqa: E731
    # Names that would be one folder if characters were only replaced; two prompts that share an id.
    methods = ("a/b", "a?b", "..")
    report, items = comparison_of(tmp_path, ["x", "y"], methods=methods, content=content, tar=True, ids=[7, 7])
    write_pages(tmp_path / "out", report, items)
    copies = {}
    for place, urls in enumerate(Blocks(tmp_path / "out/report.html").items()["images"]["urls"]):
        for number, rest in enumerate(urls["rest"]):
            file = tmp_path / "out" / unquote(urls["prefix"] + rest)
            assert file.suffix == (".png", ".webp", ".jpg")[place]
            assert file.read_bytes() == content(place, number)
            assert file.resolve().is_relative_to(tmp_path / "out/images")
            copies[file] = file.stat().st_mtime_ns
            if number:
                os.truncate(file, 5)
    assert len(copies) == 6
    write_pages(tmp_path / "out", report, items)
    kept = [file.stat().st_mtime_ns == written for file, written in copies.items()]
    assert kept == [True, False] * 3
    assert all(len(file.read_bytes()) > 5 for file in copies)  # those that were damaged are written again


def test_an_image_that_is_gone_or_changed_since_it_was_scored_is_not_shown(tmp_path):
    content = lambda place, number: picture((8, 8), number)  # noqa: E731
    report, items = comparison_of(tmp_path / "flat", ["a", "b"], content=content)
    (tmp_path / "flat/runs/1/0.png").unlink()
    write_pages(tmp_path / "flat", report, items)
    urls = Blocks(tmp_path / "flat/report.html").items()["images"]["urls"]
    assert [[rest is None for rest in each["rest"]] for each in urls] == [[False, False], [True, False], [False, False]]
    report, items = comparison_of(tmp_path / "tar", ["a", "b"], content=content, tar=True)
    file = tmp_path / "tar/runs/2/0.tar"
    file.write_bytes(file.read_bytes()[:-5] + b"other")
    for images in ("link", "embed"):
        write_pages(tmp_path / images, report, items, images=images)
    last = Blocks(tmp_path / "link/report.html").items()["images"]["urls"][2]["rest"]
    assert [rest is None for rest in last] == [False, True]
    assert json.loads(Blocks(tmp_path / "embed/report.html").json["item-1"])[2] is None


def test_embedded_images_are_small_and_drawings_keep_every_pixel(tmp_path):
    content = lambda place, number: picture(((64, 48), (900, 600), (512, 512))[place], number)  # noqa: E731
    report, items = comparison_of(tmp_path, ["a", "b"], content=content)
    write_pages(tmp_path, report, items, images="embed")
    for page in ("report", "vote"):
        for number in range(2):
            uris = json.loads(Blocks(tmp_path / f"{page}.html").json[f"item-{number}"])
            kind, data = zip(*(uri.split(",") for uri in uris), strict=True)
            images = [Image.open(io.BytesIO(base64.b64decode(each))) for each in data]
            assert set(kind) == {"data:image/webp;base64"}
            assert [image.size for image in images] == [(64, 48), (512, 341), (512, 512)]
            drawing, original = images[0].convert("RGB"), Image.open(io.BytesIO(content(0, number)))
            np.testing.assert_array_equal(np.asarray(drawing), np.asarray(original))


def test_without_images_there_is_a_report_and_nothing_to_vote_on(tmp_path):
    write_pages(tmp_path / "out", *comparison_of(tmp_path, ["a", "b"]), images="none")
    read = Blocks(tmp_path / "out/report.html")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["report.html"]
    assert read.items()["images"] is None
    assert "vote.html" not in read.links


def test_scores_arrive_as_they_are_even_where_they_are_no_numbers(tmp_path):
    scores = {"r": {"base": [0.1, 2.5e-8, np.nan, 4.0], "dpo": [np.inf, -1.0, 3.0, 1e9]}}
    report, items = comparison_of(tmp_path, "abcd", methods=("base", "dpo"), rewards=("r",), scores=scores)
    write_pages(tmp_path, report, items)
    packed = Blocks(tmp_path / "report.html").items()["scores"]
    expected = np.array([scores["r"]["base"], scores["r"]["dpo"]], np.float32)
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed[0]), "<f4").reshape(2, 4), expected)


def test_votes_are_kept_under_the_images_that_they_are_on(tmp_path):
    def identity(folder, out, shift=0):
        content = lambda place, number: picture((8, 8), 10 * place + number + shift)  # noqa: E731
        write_pages(tmp_path / out, *comparison_of(tmp_path / folder, ["a", "b"], content=content))
        return Blocks(tmp_path / out / "vote.html").items()["id"]

    assert identity("here", "one") == identity("there", "two") != identity("here", "one", shift=1)


def test_a_wrong_kind_of_images_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"expected link, embed or none, not 'links'"):
        write_pages(tmp_path, *comparison_of(tmp_path, ["a"]), images="links")
