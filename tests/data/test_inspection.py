import base64
import io
import re
import weakref
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from flax_pref.data.images import decode_image
from flax_pref.data.inspection import QUANTILES, write_inspection
from flax_pref.data.pairs import Drop, Judgement, Tie
from flax_pref.data.selection import Choice, select

AWKWARD = (
    "<script>alert('x')</script> & \"quotes\"",
    "a cat 🐈‍⬛ on a\nsecond line",
    "夕暮れの海辺を歩く柴犬",
    "half an emoji \ud83d",
    "word " * 600,
)


class MemoryReader:
    """A set in memory: what rows say, and for each used row a colour and a size of its winner, or its images."""

    def __init__(self, said, images=None, *, listed_first=False):
        self.said, self.encoded, self.asked = said, images or {}, []
        self.winner_listed_first = listed_first

    def __len__(self):
        return len(self.said)

    def where(self, row):
        return f"gs://bucket/set/part-{row // 10}.jsonl", row % 10 + 1

    def judgements(self, rows):
        yield from (self.said[row] for row in rows)

    def images(self, rows):
        self.asked.append(list(rows))
        for row in rows:
            yield self.encoded.get(row) or self.drawn(self.said[row])

    @staticmethod
    def drawn(said):
        return (png("lime"), png("red")) if said.winner == 0 else (png("red"), png("lime"))


def png(colour, size=(48, 40)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def judgement(row, caption="a cat", **more):
    return Judgement(caption, row % 2, (f"{row}-first", f"{row}-second"), **more)


def judgements(count):
    return [judgement(row, f"caption {row}") for row in range(count)]


class Page(HTMLParser):
    """Elements of a page with their attributes and the text in each, as a browser would have them."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag not in ("meta", "img"):
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, texts in self.open:
            texts.append(data)

    def all(self, tag, kind=None):
        found = [(attributes, "".join(texts)) for name, attributes, texts in self.elements if name == tag]
        return [entry for entry in found if kind is None or kind in entry[0].get("class", "").split()]

    def texts(self, tag, kind=None):
        return [" ".join(text.split()).replace("\N{MULTIPLICATION SIGN}", "x") for _, text in self.all(tag, kind)]

    @property
    def text(self):
        return self.texts("body")[0]


@pytest.fixture
def inspect(tmp_path):
    def write(reader, count=4, *, choice=None, **more):
        selection = select(reader, choice or Choice())
        more = {"title": "a set", "decode": decode_image} | more
        write_inspection(tmp_path / "page.html", reader, selection, count, **more)
        assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
        return Page((tmp_path / "page.html").read_text(encoding="utf-8"))

    return write


def shown(page):
    return [int(attributes["id"].removeprefix("row-")) for attributes, _ in page.all("article")]


def test_the_winner_is_left_whichever_image_it_is_in_the_row(inspect):
    page = inspect(MemoryReader(judgements(6)), 6)
    assert shown(page) == list(range(6))
    pictures = [attributes for attributes, _ in page.all("img")]
    for row, left, right in zip(range(6), pictures[::2], pictures[1::2], strict=True):
        assert (left["alt"], right["alt"]) == (f"winner of row {row}", f"loser of row {row}")
        for picture, green in ((left, True), (right, False)):
            image = Image.open(io.BytesIO(base64.b64decode(picture["src"].split(",")[1])))
            red, lime, _ = image.convert("RGB").getpixel((20, 20))
            assert (lime > red) == green and image.size == (48, 40)
        names = [page.texts("bdi", "id")[2 * row + i] for i in (0, 1)]
        assert names == [f"{row}-{place}" for place in (("first", "second"), ("second", "first"))[row % 2]]


def test_a_card_tells_all_that_is_known_of_its_pair(inspect):
    said = [Tie()] * 12 + [judgement(1, confidence=0.75, margin=2.5, models=("<sd>", "xl"))] + [judgement(1)]
    page = inspect(MemoryReader(said, {12: (png("red", (640, 400)), png("lime", (32, 1000)))}))
    known, unknown = page.texts("p", "facts")
    assert known == "Row 12 of the set: part-1.jsonl, row 3 · confidence 0.75 · margin 2.5"
    assert unknown == "Row 13 of the set: part-1.jsonl, row 4"
    assert "Files are in gs://bucket/set/." in page.text
    assert page.texts("bdi", "model") == ["xl", "<sd>"]
    assert page.texts("figcaption")[-4:-2] == ["winner 32 x 1000xl1-second", "loser 640 x 400<sd>1-first"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(a["src"].split(",")[1]))).size for a, _ in page.all("img")]
    assert sizes[:2] == [(10, 320), (320, 200)]


def test_captions_can_hold_anything_and_the_page_loads_nothing(inspect, tmp_path):
    page = inspect(MemoryReader([judgement(row, caption) for row, caption in enumerate(AWKWARD)]), 5, title="a < b")
    captions = [text for _, text in page.all("p", "caption")]
    assert captions == [caption.replace("\ud83d", "\ufffd") for caption in AWKWARD]
    assert not page.all("script") and not page.open and page.texts("title") == ["a < b"]
    links = [value for _, attributes, _ in page.elements for key, value in attributes.items() if key in ("src", "href")]
    assert links.pop(0) == "#pairs"
    assert len(links) == 10 and all(link.startswith("data:image/webp;base64,") for link in links)
    assert not re.search(r"url\(|@import", (tmp_path / "page.html").read_text())


def test_every_row_is_accounted_for(inspect):
    said = [Tie(), Tie(), Tie(), Drop("caption is empty"), Drop("label is damaged", "label is <7>")]
    said += [judgement(row, confidence=row / 100) for row in range(95)]
    said[60] = Drop("caption is empty")
    page = inspect(MemoryReader(said), choice=Choice(min_confidence=0.2))
    assert "100 rows = 74 used + 3 ties + 23 dropped" in page.text
    assert "dropped: damaged 3 (3.0 %) dropped: left out 20 (20.0 %)" in page.text
    reasons = page.texts("td")[-9:]
    assert reasons == [
        *("confidence is too low (left out) e.g. part-0.jsonl, row 6: 0", "20", "20.0 %"),
        *("caption is empty (damaged) e.g. part-0.jsonl, row 4", "2", "2.0 %"),
        *("label is damaged (damaged) e.g. part-0.jsonl, row 5: label is <7>", "1", "1.0 %"),
    ]


def test_damaged_images_are_counted_apart_and_do_not_take_the_place_of_a_pair(inspect):
    damaged = {row: (png("red"), b"broken") for row in range(0, 20, 2)}
    damaged[1] = Drop("image is missing", "images/1.jpg")
    page = inspect(MemoryReader(judgements(30), damaged), 8)
    assert len(shown(page)) == 8 and not set(shown(page)) & set(damaged)
    detail = "6 bytes that begin with b'broken'; expected JPEG, PNG or WebP"
    assert page.texts("td")[-6:] == [
        *(f"not an image (damaged) e.g. part-0.jsonl, row 1: image 0-second: {detail}", "10", "33.3 %"),
        *("image is missing (damaged) e.g. part-0.jsonl, row 2: images/1.jpg", "1", "3.3 %"),
    ]
    assert "30 rows = 30 used + 0 ties + 0 dropped" in page.text
    assert "Of the 48 images that could be read of 30 random pairs" in page.text


def test_rows_are_drawn_by_the_seed_and_read_once_in_order(inspect):
    said = [Tie() if row % 3 else judgement(row) for row in range(300)]
    reader = MemoryReader(said)
    first, again, other = (shown(inspect(reader, 5, seed=seed, sample=40)) for seed in (1, 1, 2))
    assert first == again == sorted(first) and first != other
    for rows in reader.asked:
        assert len(rows) == 40 and rows == sorted(set(rows)) and not any(row % 3 for row in rows)
    assert len({tuple(rows) for rows in reader.asked}) == 2
    inspect(reader, 50, sample=40)
    inspect(reader, 50, sample=400)
    assert [len(rows) for rows in reader.asked[-2:]] == [50, 100]


def test_each_used_row_is_as_likely_to_be_shown(inspect):
    reader, counts = MemoryReader(judgements(10)), np.zeros(10)
    for seed in range(50):
        counts[shown(inspect(reader, 2, seed=seed))] += 1
    assert counts.sum() == 100 and counts.min() > 2 and counts.max() < 20


def test_images_are_not_kept_in_memory(inspect):
    images, most = [], 0

    def watched(data):
        nonlocal most
        image = decode_image(data)
        images.append(weakref.ref(image))
        most = max(most, sum(reference() is not None for reference in images))
        return image

    inspect(MemoryReader(judgements(50)), 20, decode=watched)
    assert len(images) == 100 and most <= 4


def test_an_interrupted_look_leaves_the_page_of_before(inspect, tmp_path):
    (tmp_path / "page.html").write_text("before")

    def failing(data):
        raise ValueError("part-0: damaged")

    with pytest.raises(ValueError, match="part-0: damaged"):
        inspect(MemoryReader(judgements(3)), decode=failing)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("page.html", "before")]


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ([], "The set has no rows."),
        ([Tie(), Tie()], "No pair is used: every row is a tie or dropped."),
        ([Drop("caption is empty")], "No pair is used: every row is a tie or dropped."),
    ],
)
def test_a_set_without_pairs_says_so(inspect, said, text):
    page = inspect(MemoryReader(said))
    assert text in page.text and not shown(page) and "Image sizes" not in page.text


def test_fewer_pairs_than_asked_for_are_explained(inspect):
    page = inspect(MemoryReader(judgements(2)), 32)
    assert shown(page) == [0, 1] and "32 were asked for; no more are used." in page.text
    assert "None, going by what the rows say." in page.text
    assert "All images of 2 random pairs could be read." in page.text
    page = inspect(MemoryReader(judgements(2), {0: (b"broken", b"broken"), 1: Drop("image is missing")}), 2)
    assert not shown(page) and "2 were asked for; no others among those read are whole." in page.text
    assert "None of the images of 2 random pairs could be read" in page.text


@pytest.mark.parametrize("count", [0, -1])
def test_no_pairs_to_show_is_a_mistake(inspect, count):
    with pytest.raises(ValueError, match=f"pairs to inspect: {count} are asked for; expected 1 or more"):
        inspect(MemoryReader(judgements(2)), count)


def test_place_of_the_winner_is_counted_over_all_used_pairs(inspect):
    said = [Judgement("a", int(row % 4 == 0), ("x", "y")) for row in range(2000)] + [Tie()]
    assert "first image of its row in 1,500 of 2,000 pairs (75.0 %)" in inspect(MemoryReader(said), sample=10).text
    page = inspect(MemoryReader(said, listed_first=True), sample=10)
    assert "The set lists the winner first in every row." in page.text and "1,500" not in page.text


def test_pairs_of_a_caption_are_counted(inspect):
    said = [judgement(row, caption) for row, caption in enumerate("a" + "bb" + "cccc" + "ddddd" + "eeeeeeee")]
    page = inspect(MemoryReader(said))
    assert "Distinct captions: 5 in 20 pairs; 4.0 pairs each on average, 4 in the median, 8 at most." in page.text
    cells = page.texts("td")
    for label, count in {"1": "1", "2": "1", "3 to 4": "1", "5 to 8": "2"}.items():
        assert cells[cells.index(label) + 2] == count


@pytest.mark.parametrize("longest", [1, 7, 40, 300, 5000])
def test_histograms_hold_every_caption_once(inspect, longest):
    lengths = np.random.default_rng(0).integers(1, longest + 1, 400)
    captions = {f"{row:x}".ljust(length, "x")[:length]: row for row, length in enumerate(lengths)}
    page = inspect(MemoryReader([judgement(row, caption) for caption, row in captions.items()]), sample=1)
    expected = np.array([len(caption) for caption in captions])
    bars = [a["title"].replace(",", "") for a, _ in page.all("div") if "characters" in a.get("title", "")]
    assert 1 <= len(bars) <= 21
    for bar in bars:
        first, last = re.search(r"(\d+)(?: to (\d+))?", bar).groups()
        last = np.inf if "or more" in bar else int(last or first)
        assert int(bar.split(": ")[1]) == np.sum((expected >= int(first)) & (expected <= last))
    assert sum(int(bar.split(": ")[1]) for bar in bars) == len(captions)
    cells = page.texts("td")
    quantiles = [int(cells[cells.index(name) + 1].replace(",", "")) for name in QUANTILES]
    assert quantiles == np.quantile(expected, list(QUANTILES.values()), method="inverted_cdf").tolist()


def test_a_few_endless_captions_do_not_hide_the_others_in_one_bar(inspect):
    captions = [f"{row:03} ".ljust(20 + row % 60, "x") for row in range(300)] + ["word " * 2000]
    page = inspect(MemoryReader([judgement(row, caption) for row, caption in enumerate(captions)]), sample=1)
    bars = [a["title"] for a, _ in page.all("div") if "characters" in a.get("title", "")]
    assert len(bars) > 10 and bars[-1] == "captions of 80 characters or more: 1"
    assert "the last bar is all 1 of 80 or more" in page.text


def test_the_ten_most_frequent_sizes_are_listed_and_the_rest_together(inspect):
    pixels = {row: (png("lime", (40 + min(row, 11), 40)),) * 2 for row in range(20)}
    page = inspect(MemoryReader(judgements(20), pixels))
    cells = page.texts("td")
    start = cells.index("51 x 40")
    assert cells[start + 2 : start + 4] == ["18", "45.0 %"]
    assert len([cell for cell in cells if re.fullmatch(r"\d+ x 40", cell)]) == 10
    others = cells.index("other sizes (2)")
    assert cells[others + 2 : others + 4] == ["4", "10.0 %"]
