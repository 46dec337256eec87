"""The pages as people use them, in headless Chromium; skipped without a browser or playwright, which drives it."""

import base64
import io
import json
import time

import numpy as np
import pytest
from browser import playwright, running_browser
from PIL import Image
from test_pages import HOSTILE, comparison_of, picture

from flax_pref.evaluation.comparison import read_votes
from flax_pref.evaluation.leaderboard import merge_reports
from flax_pref.evaluation.leaderboard_flags import LeaderboardFlags
from flax_pref.evaluation.pages import write_pages

NONE = "\u2013"  # what stands where there is no number
PROMPTS = [*HOSTILE, *(f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("cat", "dog", "owl"))]
PROMPTS += [f"prompt {number}" for number in range(len(PROMPTS), 40)]
METHODS = ("base", "dpo", "cpgd")


@pytest.fixture(scope="module")
def browser():
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Folder of a report on 40 prompts: small drawings, one photograph, and a file that is no image."""
    folder = tmp_path_factory.mktemp("pages")

    def content(place, number):
        if number == 20:
            return picture((600, 400), place)
        return b"no image" if (place, number) == (1, 21) else picture((64, 64), 100 * place + number)

    settings = {"base": {"rule": "cfg"}, "dpo": {"rule": "cpgd", "w": "2"}, "cpgd": {"rule": "cpgd", "w": "4"}}
    records = lambda number: {"Category": ("Animals", "<b>World</b>")[number % 2]}  # noqa: E731
    report, items = comparison_of(
        folder, PROMPTS, methods=METHODS, content=content, settings=settings, records=records, tar=True
    )
    votes = [{"method": "dpo", "votes": 3, "wins": 2, "losses": 1, "ties": 0, "p": 1.0,
              "win_rate": {"value": 2 / 3, "low": 0.3, "high": 0.9}}]  # fmt: skip
    interval = {"value": 0.3, "low": 0.2, "high": 0.4}
    diversity = [
        {
            "method": name,
            "features": "clip",
            "measure": "distance",
            "prompts": 40,
            "value": interval,
            "difference": None,
        }
        for name in METHODS
    ]
    benchmarks = [
        {
            "benchmark": "geneval",
            "measure": measure,
            "method": name,
            "prompts": 40,
            "score": interval,
            "difference": None,
        }
        for measure in ("counting", "overall")
        for name in METHODS
    ]
    sets = [
        {"method": name, "features": "inception", "measure": "FID", "value": {"value": 30.1, "low": None, "high": None},
         "images": 80, "reference_images": None}
        for name in METHODS
    ]  # fmt: skip
    more = {
        "votes": votes,
        "diversity": diversity,
        "benchmarks": benchmarks,
        "sets": sets,
        "reference": "<b>photos",
        "notes": ["FID is <biased>."],
    }
    write_pages(folder, {**report, **more}, items, title="A <i>title</i>")
    write_pages(folder / "embedded", report, items, images="embed")
    return folder


@pytest.fixture
def visit(browser, pages):
    """Opens a page; whatever the browser has to complain about fails the test."""
    complaints, contexts = [], []

    def open_page(name, *, folder=pages, width=1280, context=None, **options):
        if context is None:
            context = browser.new_context(viewport={"width": width, "height": 800}, **options)
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on(
            "request",
            lambda request: request.url.startswith(("file:", "data:", "blob:")) or complaints.append(request.url),
        )
        page.goto(f"{folder.as_uri()}/{name}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def current(page):
    return page.inner_text(".row.current .prompt")


def until(page, expression):
    """Waits for a JavaScript expression; playwright's own way needs eval, which the pages forbid."""
    deadline = time.monotonic() + 5
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(10)


def matches(page):
    return page.inner_text("#matches")


def test_a_click_on_a_heading_sorts_the_table_by_it(visit):
    page = visit("report.html")
    heading = page.locator("#results-table th", has_text="Win rate")
    values = lambda: [  # noqa: E731
        float(text) for text in page.locator("#results-table tr td:nth-of-type(2)").all_inner_texts() if text != NONE
    ]
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert len(values()) == 4 and values() == sorted(values(), reverse=True)
    heading.locator("button").click()
    assert values() == sorted(values())
    assert page.locator("#results-table tbody tr").last.locator("td").nth(1).inner_text() == NONE  # nothing known: last


def test_published_scores_of_benchmarks_have_a_table(visit):
    page = visit("report.html")
    rows = page.locator("#benchmarks-table tbody tr").all_inner_texts()
    assert len(rows) == 2 * len(METHODS) and all("geneval" in row and "[0.2" in row for row in rows)
    assert "counting" in rows[0] and "overall" in rows[-1]


def test_typing_and_categories_filter_at_once(visit):
    page = visit("report.html")
    assert matches(page) == "40 pairs"
    page.keyboard.press("/")
    page.keyboard.type("OWL red")
    assert matches(page) == "1 of 40"
    assert page.locator(".row .prompt").all_inner_texts() == ["a red owl"]
    page.fill("#search", "nothing is like this")
    page.click("#clear")
    page.get_by_label("Filter by category", exact=True).select_option("Category")
    page.get_by_label("Filter by value").select_option(label="<b>World</b> (20)")
    assert matches(page) == "20 of 40"
    page.get_by_label("Column", exact=True).select_option("Category")
    page.get_by_label("Show", exact=True).select_option("Gain")
    assert page.locator("#category-table tbody th").all_inner_texts() == ["<b>World</b>", "Animals"]


def test_the_largest_wins_of_the_chosen_method_and_reward_come_first(visit):
    page = visit("report.html")
    page.keyboard.press("j")
    page.get_by_label("Order by the wins of").select_option("cpgd")
    page.get_by_label("Order by the reward").select_option("aesthetic")
    gains = lambda: page.evaluate(  # noqa: E731
        "list.map((item) => scores[1][2 * 40 + item] - scores[1][item])"
    )
    assert gains() == sorted(gains(), reverse=True)
    shown = page.locator(".row").first.locator(".gain").inner_text()
    assert shown == f"cpgd +{max(gains()):.2f} aesthetic"
    page.get_by_label("Order", exact=True).select_option("losses")
    assert gains() == sorted(gains())
    page.get_by_label("Order", exact=True).select_option("random")
    assert gains() != sorted(gains()) and sorted(page.evaluate("list")) == list(range(40))
    marked = page.locator(".row").first.locator(".scores > :nth-child(2)")
    values = [float(text.split()[0]) for text in marked.all_inner_texts()]
    assert [text.endswith("best") for text in marked.all_inner_texts()] == [value == max(values) for value in values]


def test_keys_go_through_the_images(visit):
    page = visit("report.html#order=id")
    page.keyboard.press("j")  # to the images
    page.keyboard.press("j")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("keyOf(list[state.at])") == "2-0"
    page.keyboard.press("k")
    assert page.evaluate("keyOf(list[state.at])") == "1-0"
    page.keyboard.press("End")
    assert current(page) == PROMPTS[-1]
    assert page.locator(".row.current").bounding_box()["y"] < 800
    page.keyboard.press("Home")
    assert page.evaluate("state.at") == 0
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    until(page, "state.at > 30")  # what is current follows what is scrolled to


def test_images_flip_in_place_in_the_zoom(visit):
    page = visit("report.html#order=id&at=8-0")
    page.keyboard.press("Enter")
    shown = page.locator("#stage img.shown")
    until(page, "document.querySelector('#stage img.small.shown')?.naturalWidth === 64")
    assert shown.evaluate("(image) => getComputedStyle(image).imageRendering") == "pixelated"
    box, first = shown.bounding_box(), shown.get_attribute("src")
    page.keyboard.press("ArrowRight")
    assert shown.bounding_box() == box and shown.get_attribute("src") != first
    pressed = page.locator("#zoom-methods [aria-pressed=true] bdi")
    assert pressed.inner_text() == "cpgd"
    page.keyboard.press("1")
    assert pressed.inner_text() == "base"
    page.keyboard.press("j")
    assert page.inner_text("#zoom-prompt") == PROMPTS[9] and pressed.inner_text() == "base"
    page.keyboard.press("z")
    assert shown.bounding_box()["width"] == 64  # actual size
    page.keyboard.press("Escape")
    assert not page.locator("#zoom").is_visible()
    assert current(page) == PROMPTS[9]
    page.locator(".row.current .frame").nth(2).click()
    assert pressed.inner_text() == "cpgd"


def test_an_address_brings_back_what_was_looked_at(visit):
    page = visit("report.html")
    page.get_by_label("Order", exact=True).select_option("random")
    page.fill("#search", "prompt")
    page.locator("#search").blur()
    for key in ("j", "j", "j", "3"):
        page.keyboard.press(key)
    until(page, "location.hash.includes('zoom=cpgd')")
    again = visit("report.html" + page.evaluate("location.hash"))
    state = "[state, list, zoom.method, zoom.isOpen()]"
    assert again.evaluate(state) == page.evaluate(state)


@pytest.mark.parametrize("name", ["report.html", "vote.html", "embedded/report.html"])
def test_texts_are_shown_and_never_run(visit, name):
    page = visit(name)
    if "report" in name:
        for number, prompt in enumerate(HOSTILE):
            page.evaluate(f"location.hash = '#order=id&at={number}-0&zoom=dpo'")
            until(page, f"state.at === {number} && zoom.isOpen()")
            assert page.text_content("#zoom-prompt") == prompt
            assert prompt.startswith(page.text_content(".row.current .prompt") or "\0") or prompt == ""
    else:
        page.click("#begin")
        for _ in range(20):
            until(page, "ready")
            assert page.text_content("#prompt") in PROMPTS
            page.keyboard.press("a")
    assert page.evaluate("window.__pwned") is None


@pytest.mark.parametrize("folder", ["", "embedded/"])
def test_images_are_seen_and_one_that_is_broken_is_named(visit, folder):
    page = visit(f"{folder}report.html#order=id&at=20-0")
    until(
        page,
        "[...document.querySelectorAll('.row.current img')].filter((i) => i.complete && i.naturalWidth).length === 3",
    )
    picture_of_page = Image.open(io.BytesIO(page.locator(".row.current .methods").screenshot())).convert("RGB")
    assert len(np.unique(np.asarray(picture_of_page).reshape(-1, 3), axis=0)) > 1000
    page.keyboard.press("j")
    broken = page.locator(".row.current .frame").nth(1)
    playwright.expect(broken).to_be_disabled()
    assert broken.inner_text() == "no image"


def test_the_theme_is_the_systems_until_one_is_chosen(visit):
    page = visit("report.html", color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    assert max(json.loads(dark.replace("rgb(", "[").replace(")", "]"))) < 64
    page.click("#theme")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    page.reload()
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    page.click("#theme")
    assert page.evaluate(paper) == dark


@pytest.mark.parametrize("width", [400, 1280])
def test_a_page_is_as_wide_as_its_window(visit, width):
    page = visit("report.html#order=id&at=4-0", width=width)
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    assert page.locator(".row.current .frame").count() == 3
    page.keyboard.press("2")
    assert page.evaluate(fits)
    close = page.locator("#zoom-close").bounding_box()
    assert close["x"] + close["width"] <= width
    vote = visit("vote.html", width=width)
    vote.click("#begin")
    assert vote.evaluate(fits)


def test_thousands_of_prompts_under_twenty_methods_open_at_once(visit, tmp_path):
    drawing = picture((64, 64), 0)
    prompts = [f"a prompt like those of PartiPrompts, with number {number}" for number in range(3200)]
    report, items = comparison_of(
        tmp_path, prompts, methods=[f"method {number}" for number in range(20)], rewards=("pickscore", "hpsv2"),
        content=lambda place, number: drawing, name="0.png",
        records=lambda number: {"Category": f"category {number % 4}"},
    )  # fmt: skip
    write_pages(tmp_path, report, items)
    page = visit("report.html", folder=tmp_path)
    opened = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
    painted = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
    until(page, painted)
    assert max(page.evaluate(opened), page.evaluate(painted)) < 2000  # ms
    page.keyboard.press("End")
    page.keyboard.press("Home")
    page.keyboard.press("j")
    assert page.locator(".row").count() < 12
    assert page.evaluate("document.images.length") < 12 * 20


def test_controls_and_hacking_have_their_tables_and_charts(visit, tmp_path):
    report, items = comparison_of(tmp_path, PROMPTS, methods=METHODS)
    reward = report["rewards"][0]
    interval = {"value": 0.3, "low": 0.2, "high": 0.4}
    report["methods"][1]["cost"] = {"predictions": 96, "seconds": 0.25, "devices": "1 x cpu"}
    own = next(row for row in report["overall"] if row["method"] == "dpo")
    report |= {
        "control_runs": ["cpgd"],
        "controls": [{**own, "control": "cpgd", "gain": interval}],
        "verdicts": ["<b>judge</b>: dpo is above cpgd"],
        "looks": [{**own, "reward": "contrast"}],
        "trained_on": reward,
        "standardised": [{"method": m, "reward": r, "gain": interval} for m in METHODS[1:] for r in (reward, "other")],
    }
    report["rewards"] = [reward, "other"]
    report["overall"] = [*report["overall"], *({**row, "reward": "other"} for row in report["overall"])]
    items.scores["other"] = items.scores[reward]
    write_pages(tmp_path / "out", report, items)
    page = visit("report.html", folder=tmp_path / "out")
    rows = page.locator("#fair-table tbody tr").all_inner_texts()
    assert len(rows) == 2 * len(METHODS) and "96" in rows[1] and "0.25" in rows[1] and "+0.30" in rows[1]
    assert page.inner_text(".verdicts li") == "<b>judge</b>: dpo is above cpgd"
    assert page.locator("#hacking-charts circle").count() == len(METHODS) - 1
    assert "contrast" in page.inner_text("#looks-table")


def test_a_leaderboard_sorts_and_filters(visit, tmp_path):
    interval = lambda value: {"value": value, "low": value - 0.01, "high": value + 0.01}  # noqa: E731
    for number, name in enumerate(("one", "two")):
        gains = {"base": None, "<i>dpo</i>": 0.05 + number, "cpgd": 0.08 - number}
        overall = [
            {"method": m, "reward": "judge", "mean": interval(0.7 + (gain or 0)), "win_rate": gain and interval(0.6),
             "gain": gain and interval(gain)}
            for m, gain in gains.items()
        ]  # fmt: skip
        cost = {"predictions": 16, "seconds": None}
        report = {"baseline": "base", "rewards": ["judge"], "weights": {"judge": ""}, "pairs_sha256": "same"}
        report |= {"prompts": 40, "pairs": 80, "overall": overall, "control_runs": ["cpgd"]}
        report |= {"methods": [{"name": m, "w": None, "cost": cost} for m in gains]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    merge_reports(LeaderboardFlags(reports=(str(tmp_path / "one"), str(tmp_path / "two")), out=str(tmp_path / "out")))
    page = visit("leaderboard.html", folder=tmp_path / "out")
    names = lambda: [text.split("\t")[0] for text in page.locator("#board tbody tr").all_inner_texts()]  # noqa: E731
    assert names() == ["base", "<i>dpo</i>", "cpgd control", "<i>dpo</i>", "cpgd control"]  # one row for the same base
    page.click("#board thead button:text-is('judge')")
    assert names() == ["<i>dpo</i>", "cpgd control", "<i>dpo</i>", "cpgd control", "base"]
    page.fill("input[type=search]", "two")
    assert names() == ["<i>dpo</i>", "cpgd control"]
    page.uncheck("input[type=checkbox]")
    assert names() == ["<i>dpo</i>"]
    page.fill("input[type=search]", "nothing")
    page.click("#clear")
    assert len(names()) == 5
    page.select_option("select", label="Mean")
    page.uncheck("input[type=checkbox]")
    assert "0.700" in page.locator("#board tbody tr").all_inner_texts()[-1]


def test_a_single_method_and_a_single_prompt_are_enough_to_look_at(visit, tmp_path):
    drawing = lambda place, number: picture((64, 64), number)  # noqa: E731
    for methods in (("alone",), ("base", "dpo")):
        folder = tmp_path / str(len(methods))
        report, items = comparison_of(folder, ["a cat"], methods=methods, rewards=("r",), content=drawing)
        for images in ("link", "none"):
            write_pages(folder / images, report, items, images=images)
            page = visit("report.html#at=0-0", folder=folder / images)
            assert current(page) == "a cat" and matches(page) == "1 pair"
            assert page.locator("#results-table tbody tr").count() == len(methods)
    page = visit("vote.html", folder=tmp_path / "1" / "link")
    page.click("#begin")
    assert page.inner_text("#done-text") == "There is no pair of images to vote on."


def test_votes_are_blind_survive_a_reload_and_are_read_by_the_report(visit, tmp_path):
    page = visit("vote.html", accept_downloads=True)
    page.fill("#seed", "5")
    page.click("#begin")
    actions = [lambda key=key: page.keyboard.press(key) for key in ("ArrowLeft", "l", " ", "ArrowDown")]
    actions += [lambda: page.locator(".picture").first.click(), lambda: page.get_by_text("Right").click()]
    for act in actions:
        until(page, "ready")
        act()
    until(page, "ready")
    markup = page.evaluate(
        "[...document.body.children].filter((e) => e.tagName !== 'SCRIPT').map((e) => e.outerHTML).join()"
    )
    assert "canvas" in markup and "<img" not in markup
    assert not any(method in markup.replace("baseline", "") for method in METHODS)
    page.keyboard.press("u")
    page.reload()
    assert page.inner_text("#export") == "Export 5 votes"
    assert page.input_value("#seed") == "5"
    page.click("#begin")
    until(page, "ready")
    assert page.inner_text("#progress") == "5 of 79"  # two methods over 40 prompts, less the file that is no image
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "votes.json")
    exported = json.loads((tmp_path / "votes.json").read_text(encoding="utf-8"))
    assert exported["kind"] == "flax_pref votes" and exported["methods"] == list(METHODS)
    assert [vote["vote"] for vote in exported["votes"]] == ["left", "right", "tie", "tie", "left"]
    for vote in exported["votes"]:
        assert vote["prompt"] == PROMPTS[vote["prompt_id"]]
        assert "base" in (vote["left"], vote["right"]) and vote["left"] != vote["right"]
    assert len(read_votes([tmp_path / "votes.json"])) == 5


def test_sides_are_drawn_by_chance_and_the_same_for_the_same_number(visit):
    orders = []
    for seed in ("1", "1", "2"):
        page = visit("vote.html")
        page.fill("#seed", seed)
        page.get_by_label("Compare").select_option(label=f"base  {NONE}  cpgd")
        page.click("#begin")
        orders.append(page.evaluate("tasks"))
    assert orders[0] == orders[1] != orders[2]
    assert {frozenset(task[1:]) for task in orders[0]} == {frozenset((0, 2))}
    assert 8 < sum(left == 0 for _, left, _ in orders[0]) < 32


def test_a_vote_shows_the_images_that_it_is_on(visit):
    page = visit("embedded/vote.html")
    page.click("#begin")
    for _ in range(3):
        until(page, "ready")
        item, *sides = page.evaluate("task")
        drawn = page.evaluate("[...document.querySelectorAll('canvas')].map((canvas) => canvas.toDataURL())")
        for method, uri in zip(sides, drawn, strict=True):
            if item != 20:  # the photograph, which is embedded with loss
                shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))
                expected = picture((64, 64), 100 * method + item)
                np.testing.assert_array_equal(shown, np.asarray(Image.open(io.BytesIO(expected))))
        page.keyboard.press("ArrowLeft")
