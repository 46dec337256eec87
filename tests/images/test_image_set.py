"""As a program, this file draws image sets: one per line of stdin, in a child process that may be killed on the way."""

import hashlib
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from flax_pref.config import UserError
from flax_pref.data.prompts import Prompt
from flax_pref.images.grid import GAP, MARGIN, TILE
from flax_pref.images.image_files import contact_sheet, encode_image, read_metadata
from flax_pref.images.image_set import ImageSet, Item, Writer

SETTINGS = {"model": "sd/1.5", "w": 4.0, "steps": 50, "model_sha256": "ab" * 32, "negative_prompt": None}
LAYOUTS = ("webdataset", "flat", "geneval", "geneval2", "dpg", "t2i_compbench", "hpsv2")
TEXTS = ("a cat", "猫 & naïve\ncafé 🐈", "x" * 300, "four", "five", "six")
STYLES = ("anime", "photo")


def prompts(count):
    return [
        Prompt(
            i,
            TEXTS[i % len(TEXTS)],
            STYLES[i % 2],
            {"tag": STYLES[i % 2], "prompt": TEXTS[i % len(TEXTS)], "n": i, "item_id": f"item{i}"},
        )
        for i in range(count)
    ]


def items_for(layout, count=3):
    """Seven images or so: `count` prompts with two seeds, seed by seed; where there can be one seed only, as many."""
    if layout in ("hpsv2", "geneval2"):
        return [Item(named(prompt, layout), 3) for prompt in prompts(2 * count)]
    return [Item(named(prompt, layout), seed) for seed in (1, 0) for prompt in prompts(count)]


def named(prompt, layout):
    """With a text that can be the name of a file, where the layout needs it."""
    return prompt._replace(text=f"猫 & café {prompt.id}.") if layout in ("geneval2", "t2i_compbench") else prompt


def draw(items, indices, size=16):
    """Noise that is a function of prompt id and seed."""
    return np.stack(
        [
            np.random.default_rng([items[i].prompt.id, items[i].seed]).integers(0, 256, (size, size, 3), np.uint8)
            for i in indices
        ]
    )


def image_set(folder, layout="webdataset", *, settings=SETTINGS, count=3, shard_size=4, **options):
    return ImageSet(folder, items_for(layout, count), settings, layout=layout, shard_size=shard_size, **options)


def fill(images, batch=2, size=16, log=lambda word, indices: None):
    """What a program does: everything that is pending."""
    images.begin()
    pending = images.pending
    with Writer(images) as writer:
        for chosen in np.split(pending, range(batch, len(pending), batch)):
            if len(chosen):
                log("draws", chosen)
                writer.put(chosen, draw(images._items, chosen, size))
    return images


def draw_all(folder, layout="webdataset", **options):
    fill(image_set(folder, layout, **options)).finish()
    return tree(folder)


def tree(folder):
    """Every file of a folder, with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def manifest(folder):
    return pq.read_table(folder / "manifest.parquet").to_pylist()


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Waiting for the disk is for a loss of power, which no test here brings about; on a busy disk it takes long."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# The program.


def serve():
    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            draw_and_log(order, writing)
            os._exit(0)
        os.close(writing)
        if order.get("after") is not None:
            time.sleep(order["after"])
            os.kill(child, signal.SIGKILL)
        with os.fdopen(reading) as log:
            told = log.read().splitlines()
        print(json.dumps({"status": os.waitpid(child, 0)[1], "log": told}), flush=True)


def draw_and_log(order, log):
    """Draws, logs every change of the file system before it happens, and is killed at one of them."""
    steps = itertools.count()

    def tell(*words):
        os.write(log, (" ".join(map(str, words)) + "\n").encode())

    def watch(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            path = str(arguments[event == "os.rename"])
            relative = not os.path.isabs(path) and event in ("os.remove", "os.rmdir")  # while a folder is removed
            changes = {
                "open": isinstance(arguments[1], str) and "w" in arguments[1],
                "os.mkdir": not os.path.exists(path),
                "os.remove": relative or os.path.exists(path),
            }
            if (path.startswith(order["folder"]) or relative) and changes.get(event, True):
                tell("step", event, path if relative else os.path.relpath(path, order["folder"]))
                if next(steps) == order.get("kill"):
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    os.fsync = lambda descriptor: None
    if order.get("largest"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"], order["largest"]))
    images = image_set(order["folder"], order["layout"], count=order.get("count", 3))
    write = images.write

    def write_and_log(indices, pixels):
        write(indices, pixels)
        tell("wrote", *indices)

    images.write = write_and_log
    try:
        fill(images, order.get("batch", 2), log=lambda word, indices: tell(word, *indices)).finish()
        tell("finished")
    except UserError as error:
        tell("error", error)


@pytest.fixture(scope="module")
def program():
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )

    def run(folder, **order):
        process.stdin.write(json.dumps({"folder": str(folder), **order}) + "\n")
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    assert process.wait(timeout=10) == 0
    process.stdout.close()


def logged(log, word):
    return [int(index) for line in log if line.startswith(word) for index in line.split()[1:]]


def phase(step):
    """What was about to happen in the line of a log, with all numbers as 0."""
    return re.sub(r"\d+", "0", re.sub(r"\d+\.[0-9a-f]{32}", "unfinished", step.removeprefix("step ")))


@pytest.mark.program
@pytest.mark.parametrize(("layout", "count"), [("webdataset", 3), ("geneval", 2)])
def test_killed_at_any_step_and_repeated_a_run_gives_the_files_of_an_undisturbed_one(program, tmp_path, layout, count):
    whole = program(tmp_path / "whole", layout=layout, count=count)
    expected = tree(tmp_path / "whole")
    steps = [line for line in whole["log"] if line.startswith("step")]
    seen = set()
    for kill in range(len(steps)):
        folder = tmp_path / str(kill)
        killed = program(folder, layout=layout, count=count, kill=kill)
        assert killed["status"] == signal.SIGKILL
        last = [line for line in killed["log"] if line.startswith("step")][-1]
        seen.add(phase(last))
        repeated = program(folder, layout=layout, count=count)
        assert repeated["log"][-1] == "finished", (last, repeated["log"][-1])
        assert tree(folder) == expected, last
        again = set(logged(killed["log"], "wrote")) & set(logged(repeated["log"], "draws"))
        assert not again, (last, again)
        shutil.rmtree(folder)
    renamed = {"settings.json", ".parts/0-0.json", ".parts/0.json", "contact_sheet.png", "manifest.parquet"}
    own = {"webdataset": {".parts/0-0.tar", "0.tar"}, "geneval": {"0/metadata.jsonl", "0/samples/0.png"}}
    assert {f"os.rename {name}" for name in renamed | own[layout]} <= seen
    assert {"os.remove .parts/0-0.json", "os.rmdir .parts", "open .parts/unfinished"} <= seen


@pytest.mark.program
def test_killed_at_random_moments_with_changing_batches_a_run_gives_the_same_files(program, tmp_path):
    chance = random.Random(0)
    started = time.monotonic()
    program(tmp_path / "whole", layout="webdataset", count=8)
    seconds = time.monotonic() - started
    expected, kills = tree(tmp_path / "whole"), 0
    while kills < 20:
        folder = tmp_path / f"from {kills}"
        written = Counter()
        finished = False
        while not finished:
            order = {"layout": "webdataset", "count": 8, "batch": chance.choice([1, 2, 3, 7])}
            result = program(folder, **order, after=chance.uniform(0, seconds) if kills < 20 else None)
            kills += result["status"] == signal.SIGKILL
            written.update(logged(result["log"], "wrote"))
            finished = "finished" in result["log"]
        assert tree(folder) == expected
        assert set(written.values()) <= {1}


# Settings and folders that do not belong together.


def test_other_settings_are_refused_and_the_difference_is_named(tmp_path):
    draw_all(tmp_path, "flat")
    before = tree(tmp_path)
    other = {**{name: value for name, value in SETTINGS.items() if name != "steps"}, "w": 5.0, "eta": 1}
    with pytest.raises(UserError) as error:
        image_set(tmp_path, "flat", settings=other).begin()
    assert str(error.value) == (
        f"{tmp_path}: was begun with w=4.0, now w=5.0; steps=50, now no steps; no eta, now eta=1: choose another "
        "--out, or repeat the settings"
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layout": "webdataset"}, "layout=flat, now layout=webdataset: choose"),
        ({"image_format": "webp"}, "image_format=png, now image_format=webp: choose"),
        ({"shard_size": 5}, "shard_size=4, now shard_size=5: choose"),
        ({"items": items_for("flat", 3)[:5]}, "count=6, now count=5; items="),
        ({"items": [Item(prompt, seed) for prompt, seed in items_for("flat") if seed == 1]}, "seeds=0-1, now seeds=1;"),
        ({"items": [Item(p._replace(text=p.text + "!"), seed) for p, seed in items_for("flat")]}, "with items="),
        ({"items": items_for("flat")[::-1]}, "with items="),
    ],
)
def test_another_layout_format_or_list_of_prompts_is_refused(tmp_path, change, told):
    begun = image_set(tmp_path, "flat")
    begun.begin()
    begun.write([0], draw(items_for("flat"), [0]))
    options = {"items": items_for("flat"), "settings": SETTINGS, "layout": "flat", "shard_size": 4, **change}
    with pytest.raises(UserError, match=re.escape(told)):
        ImageSet(tmp_path, options.pop("items"), options.pop("settings"), **options).begin()


def test_a_folder_without_images_takes_other_settings(tmp_path):
    """Or else a mistake that shows when the model is loaded would need another folder."""
    image_set(tmp_path, "flat", settings={"steps": 0}).begin()
    image_set(tmp_path, "flat", settings={"steps": 10}).begin()
    fill(image_set(tmp_path, "flat", settings={"steps": 10})).finish()
    assert json.loads((tmp_path / "settings.json").read_text())["settings"] == {"steps": 10}


def test_settings_in_another_order_or_as_tuples_continue_the_same_set(tmp_path):
    image_set(tmp_path / "a", "flat", settings={"size": [64, 64], "w": 1}).begin()
    fill(image_set(tmp_path / "a", "flat", settings={"w": 1, "size": (64, 64)})).finish()
    assert tree(tmp_path / "a") == draw_all(tmp_path / "b", "flat", settings={"size": (64, 64), "w": 1})


@pytest.mark.parametrize("name", ["thesis.docx", "settings.json"])
def test_a_folder_with_other_files_is_refused_and_stays_as_it_is(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}: holds {name}, but no settings\.json of an imag"):
        image_set(tmp_path).begin()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layout": "tar"}, "layout='tar': expected one of webdataset, flat, geneval, geneval2, dpg, t2i_compbench, h"),
        ({"image_format": "jpg"}, "image_format='jpg': expected one of png, webp"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"process_index": 2, "process_count": 2}, "process 2 of 2"),
        ({"items": []}, "no images to draw"),
        ({"items": [Item(prompts(1)[0], 1)] * 2}, "prompt 0 with seed 1 is there twice"),
        ({"items": [Item(Prompt(7, "\ud800", "", {}), 1)]}, "prompt 7: its text is not valid Unicode"),
        ({"settings": {"seed": 1}}, "the names seed are taken"),
        ({"settings": {"w": float("nan")}}, "w=nan cannot be written as JSON"),
        ({"settings": {"out": Path("x")}}, "out=PosixPath('x') cannot be written as JSON"),
        ({"settings": {"größe": 1}}, "the name 'größe' is not 1 to 79 printable ASCII"),
        ({"settings": {"": 1}}, "the name '' is not"),
        ({"layout": "geneval", "image_format": "webp"}, "image_format='webp': GenEval reads only files named .png"),
        ({"layout": "hpsv2"}, "layout 'hpsv2' has one image per prompt"),
        ({"layout": "hpsv2", "items": [Item(Prompt(0, "a", "../b", {}), 0)]}, "prompt 0: its style '../b' cannot be"),
        ({"layout": "hpsv2", "items": [Item(Prompt(0, "a", "", {}), 0)]}, "prompt 0: its style '' cannot be"),
        ({"layout": "geneval2"}, "layout 'geneval2' has one image per prompt"),
        ({"layout": "geneval2", "items": [Item(Prompt(i, "a", "", {}), 0) for i in (0, 1)]}, "prompts 0 and 1 are the"),
        (
            {"layout": "dpg", "items": [Item(Prompt(2, "a", "", {}), 0)]},
            "prompt 2: has no item_id that can be the name",
        ),
        (
            {"layout": "dpg", "items": [Item(Prompt(0, "a", "", {"item_id": "../a"}), 0)]},
            "prompt 0: has no item_id that",
        ),
        (
            {"layout": "dpg", "items": [Item(p, 0) for p in (prompts(1)[0], prompts(1)[0]._replace(id=9))]},
            "prompts 0 and 9",
        ),
        ({"layout": "dpg", "items": [Item(prompts(1)[0], i) for i in range(5)]}, "has at most 4 images per prompt"),
        (
            {"layout": "t2i_compbench", "items": [Item(Prompt(0, "a_b", "", {}), 0)]},
            "prompt 0: 'a_b' cannot be the name",
        ),
        (
            {"layout": "t2i_compbench", "items": [Item(Prompt(0, "a/b", "", {}), 0)]},
            "prompt 0: 'a/b' cannot be the name",
        ),
        ({"layout": "t2i_compbench", "items": [Item(Prompt(0, "x" * 245, "", {}), 0)]}, "and at most 244 bytes"),
        (
            {"layout": "t2i_compbench", "items": [Item(Prompt(0, "a", "..", {}), 0)]},
            "prompt 0: its category '..' cannot",
        ),
        ({"layout": "t2i_compbench", "image_format": "webp"}, "T2I-CompBench reads only files named .png"),
    ],
)
def test_what_cannot_be_drawn_or_named_is_refused_before_anything_is_drawn(tmp_path, change, told):
    options = {"items": items_for("flat"), "settings": SETTINGS, **change}
    with pytest.raises(ValueError, match=re.escape(told)):
        ImageSet(tmp_path, options.pop("items"), options.pop("settings"), **options)


@pytest.mark.parametrize(
    ("indices", "pixels", "told"),
    [
        ([0], np.zeros((1, 4, 4, 3)), r"images float64 \[1, 4, 4, 3\] for 1 indices"),
        ([0, 1], np.zeros((1, 4, 4, 3), np.uint8), "for 2 indices"),
        ([0], np.zeros((1, 4, 0, 3), np.uint8), "without pixels"),
        ([6], np.zeros((1, 4, 4, 3), np.uint8), "index 6 is not pending"),
        ([-1], np.zeros((1, 4, 4, 3), np.uint8), "index -1 is not pending"),
        ([1, 1], np.zeros((2, 4, 4, 3), np.uint8), "index 1 is not pending"),
        ([5], np.zeros((1, 4, 4, 3), np.uint8), "index 5 is not pending"),
    ],
)
def test_a_wrong_batch_is_refused_and_writes_nothing(tmp_path, indices, pixels, told):
    images = image_set(tmp_path, "flat")
    with pytest.raises(ValueError, match="call begin before"):
        images.write([5], draw(images._items, [5]))
    images.begin()
    images.write([5], draw(images._items, [5]))
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=told):
        images.write(indices, pixels)
    assert tree(tmp_path) == before


# The layouts.


def test_webdataset_shards_hold_samples_in_the_order_of_the_items(tmp_path):
    draw_all(tmp_path)
    names, items = [], items_for("webdataset")
    for shard in ("00000.tar", "00001.tar"):
        with tarfile.open(tmp_path / shard) as tar:
            members = tar.getmembers()
            assert {(member.mtime, member.uid, member.mode, member.uname) for member in members} == {(0, 0, 0o644, "")}
            content = {member.name: tar.extractfile(member).read() for member in members}
        names += content
        for key in {name.split(".")[0] for name in content}:
            item = next(item for item in items if f"{item.prompt.id:06d}-{item.seed}" == key)
            described = {"prompt": item.prompt.text, "prompt_id": item.prompt.id, "group": item.prompt.group}
            assert content[f"{key}.txt"].decode() == item.prompt.text
            assert json.loads(content[f"{key}.json"]) == {**described, "seed": item.seed, **SETTINGS}
            pixels = np.asarray(Image.open(io.BytesIO(content[f"{key}.png"])))
            np.testing.assert_array_equal(pixels, draw([item], [0])[0])
    keys = [f"{item.prompt.id:06d}-{item.seed}" for item in items]
    assert names == [f"{key}.{kind}" for key in keys for kind in ("txt", "json", "png")]
    assert sorted(tree(tmp_path)) == [
        "00000.tar",
        "00001.tar",
        "contact_sheet.png",
        "manifest.parquet",
        "settings.json",
    ]


ALWAYS = ["contact_sheet.png", "manifest.parquet", "settings.json"]


def test_flat_files_have_prompt_id_and_seed_in_their_names(tmp_path):
    draw_all(tmp_path, "flat")
    names = [f"{prompt:05d}-{seed}.png" for prompt in range(3) for seed in range(2)]
    assert sorted(tree(tmp_path)) == sorted(names + ALWAYS)
    np.testing.assert_array_equal(
        Image.open(tmp_path / "00002-1.png"), draw([Item(prompts(3)[2], 1)], [0])[0], strict=True
    )


def test_geneval_s_scorer_finds_records_and_samples_in_the_order_of_the_seeds(tmp_path):
    draw_all(tmp_path, "geneval")
    names = [f"{i:05d}/{name}" for i in range(3) for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")]
    assert sorted(tree(tmp_path)) == sorted(names + ALWAYS)
    for prompt in prompts(3):
        folder = tmp_path / f"{prompt.id:05d}"
        with (folder / "metadata.jsonl").open() as file:
            assert json.load(file) == prompt.record
        assert [read_metadata(folder / "samples" / f"000{seed}.png")["seed"] for seed in (0, 1)] == [0, 1]


def test_the_program_of_dpg_bench_finds_a_grid_of_each_prompt_and_nothing_else(tmp_path):
    before = draw_all(tmp_path, "dpg")
    samples = [f"samples/item{i}-{place}.png" for i in range(3) for place in range(2)]
    assert sorted(before) == sorted([*samples, *(f"grids/item{i}.png" for i in range(3)), *ALWAYS])
    with Image.open(tmp_path / "grids/item2.png") as image:
        grid = np.asarray(image)
    np.testing.assert_array_equal(grid[:16, :16], draw([Item(prompts(3)[2], 0)], [0])[0], strict=True)
    np.testing.assert_array_equal(grid[:16, 16:], draw([Item(prompts(3)[2], 1)], [0])[0], strict=True)
    assert grid.shape == (32, 32, 3) and not grid[16:].any()
    (tmp_path / "grids/item1.png").unlink()
    (tmp_path / "grids/item0.png").write_bytes(b"damaged")
    fill(image_set(tmp_path, "dpg", verify=True)).finish()
    assert tree(tmp_path) == before


def test_images_that_cannot_be_cut_out_of_a_grid_are_refused_at_the_first(tmp_path):
    images = image_set(tmp_path, "dpg")
    images.begin()
    with pytest.raises(
        ValueError, match="layout 'dpg' has square images, not 8x4: its program cuts grids into squares"
    ):
        images.write([0], np.zeros((1, 4, 8, 3), np.uint8))


def test_a_record_that_a_user_has_deleted_is_written_again(tmp_path):
    before = draw_all(tmp_path, "geneval")
    (tmp_path / "00001" / "metadata.jsonl").unlink()
    assert draw_all(tmp_path, "geneval") == before


def test_hpsv2_s_reader_finds_styles_alone_in_a_folder_and_numbers_within_them(tmp_path):
    draw_all(tmp_path, "hpsv2", image_format="webp")
    names = [f"images/{style}/{i:05d}.jpg" for style in STYLES for i in range(3)]
    assert sorted(tree(tmp_path)) == sorted(names + ALWAYS)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == sorted(STYLES)
    for prompt in prompts(6):
        with Image.open(tmp_path / "images" / prompt.group / f"{prompt.id // 2:05d}.jpg") as image:
            np.testing.assert_array_equal(image, draw([Item(prompt, 3)], [0])[0], strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_manifest_says_where_the_bytes_of_every_image_are(tmp_path, layout):
    draw_all(tmp_path, layout)
    rows, items = manifest(tmp_path), items_for(layout)
    assert len(rows) == len(items)
    for row, item in zip(rows, items, strict=True):
        assert (row["prompt_id"], row["prompt"], row["group"]) == item.prompt[:3]
        assert (row["seed"], json.loads(row["settings"])) == (item.seed, SETTINGS)
        with (tmp_path / row["file"]).open("rb") as file:
            file.seek(row["offset"])
            content = file.read(row["size"])
            assert layout == "webdataset" or (row["offset"] == 0 and not file.read())
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        assert (row["width"], row["height"]) == (16, 16)
        assert read_metadata(content)["prompt"] == item.prompt.text
        np.testing.assert_array_equal(Image.open(io.BytesIO(content)), draw([item], [0])[0], strict=True)


# Continuing.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_batch_sizes_and_numbers_of_processes_continue_the_same_set(tmp_path, layout):
    expected = draw_all(tmp_path / "whole", layout, count=6)
    folder, drawn = tmp_path / "continued", []
    for count, batch in ((1, 3), (2, 2), (3, 1)):
        for process in range(count):
            images = image_set(folder, layout, count=6, process_index=process, process_count=count)
            images.begin()
            chosen = images.pending[:batch].tolist()
            drawn += chosen
            if chosen:
                images.write(chosen, draw(images._items, chosen))
    sets = [image_set(folder, layout, count=6, process_index=process, process_count=2) for process in range(2)]
    with pytest.raises(
        UserError, match=r"images are missing, the first: prompt \d with seed \d, prompt .*run the same"
    ):
        sets[0].finish()
    for images in sets:
        fill(images, 3, log=lambda word, chosen: drawn.extend(chosen.tolist()))
    sets[1].finish()
    assert not (folder / "manifest.parquet").exists()
    sets[0].finish()
    assert tree(folder) == expected
    assert len(drawn) == len(set(drawn)) == 12
    assert (sets[0].done, sets[1].done, sets[0].total + sets[1].total) == (sets[0].total, sets[1].total, 12)


def test_processes_own_different_shards_and_together_all_of_them(tmp_path):
    sets = [image_set(tmp_path, count=10, process_index=process, process_count=3) for process in range(3)]
    assert [images.pending.tolist() for images in sets] == [
        [0, 1, 2, 3, 12, 13, 14, 15],
        [4, 5, 6, 7, 16, 17, 18, 19],
        [8, 9, 10, 11],
    ]
    assert [images.total for images in sets] == [8, 8, 4]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("truncated", [False, True])
def test_images_that_a_user_has_deleted_are_drawn_again_and_no_others(tmp_path, layout, finished, truncated):
    expected = draw_all(tmp_path / "whole", layout)
    folder = tmp_path / "damaged"
    images = fill(image_set(folder, layout))
    if finished:
        images.finish()
    file = folder / images._rows[1].file
    lost = [row.place for row in images._rows.values() if folder / row.file == file]
    if truncated:
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
    images = image_set(folder, layout)
    images.begin()
    assert images.pending.tolist() == lost
    assert images.done == 6 - len(lost)
    fill(images).finish()
    assert tree(folder) == expected


def test_deleted_first_images_of_a_batch_do_not_take_the_record_of_the_others_with_them(tmp_path):
    expected = draw_all(tmp_path / "whole", "flat", shard_size=6)
    folder = tmp_path / "damaged"
    images = image_set(folder, "flat", shard_size=6)
    images.begin()
    images.write(range(4), draw(images._items, range(4)))
    (folder / "00000-1.png").unlink()
    for pending in ([0, 4, 5], [4, 5]):
        images = image_set(folder, "flat", shard_size=6)
        images.begin()
        assert images.pending.tolist() == pending
        images.write(pending[:1], draw(images._items, pending[:1]))
    fill(image_set(folder, "flat", shard_size=6)).finish()
    assert tree(folder) == expected


def test_what_a_kill_leaves_behind_is_removed_at_the_next_start_and_a_whole_shard_stays(tmp_path):
    images = image_set(tmp_path, shard_size=2, count=2)
    images.begin()
    images.write([0], draw(images._items, [0]))
    parts = {path: path.read_bytes() for path in (tmp_path / ".parts").iterdir()}
    images.write([1, 2], draw(images._items, [1, 2]))
    before, shard = tree(tmp_path), (tmp_path / "00000.tar").stat()
    for path, content in parts.items():
        path.write_bytes(content)
    for name in (f"00000.{'0' * 32}", f"00001.{'1' * 32}", "00001-000000003.tar"):
        (tmp_path / ".parts" / name).write_bytes(b"torn")
    image_set(tmp_path, shard_size=2, count=2).begin()
    assert tree(tmp_path) == before and len(parts) == 2
    assert (tmp_path / "00000.tar").stat() == shard


@pytest.mark.parametrize("layout", ["webdataset", "flat"])
def test_whatever_files_are_lost_or_cut_on_the_way_the_end_is_the_same(tmp_path, layout):
    expected = draw_all(tmp_path / "whole", layout, shard_size=3)
    chance = random.Random(1)
    for trial in range(12):
        folder = tmp_path / str(trial)
        for _ in range(3):
            images = image_set(folder, layout, shard_size=3)
            images.begin()
            chosen = images.pending[: chance.randint(0, 4)]
            if len(chosen):
                images.write(chosen, draw(images._items, chosen))
            files = [path for path in folder.rglob("*") if path.is_file() and path.name != "settings.json"]
            for path in chance.sample(files, min(len(files), chance.randint(0, 2))):
                if chance.random() < 0.5:
                    path.unlink()
                else:
                    os.truncate(path, chance.randrange(path.stat().st_size))
        fill(image_set(folder, layout, shard_size=3)).finish()
        assert tree(folder) == expected


def test_a_finished_set_is_left_alone(tmp_path):
    draw_all(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    images = image_set(tmp_path)
    images.begin()
    assert images.pending.tolist() == [] and images.done == images.total == 6
    images.finish()
    images.finish()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verified_a_finished_set_with_a_changed_byte_draws_that_image_again_and_no_other(tmp_path, layout):
    expected = draw_all(tmp_path, layout)
    row = manifest(tmp_path)[2]
    flip(tmp_path / row["file"], row["offset"] + row["size"] // 2)
    images = image_set(tmp_path, layout)
    images.begin()
    assert images.done == 6 and images.damaged == []  # sizes alone do not tell
    images = fill(image_set(tmp_path, layout, verify=True))
    assert images.damaged == [2]
    images.finish()
    assert tree(tmp_path) == expected


def test_verified_a_shard_that_is_damaged_between_its_images_is_written_again_from_them(tmp_path):
    expected = draw_all(tmp_path)
    row = manifest(tmp_path)[1]
    size = (tmp_path / "00000.tar").stat().st_size
    for place in (3, row["offset"] - 700, row["offset"] - 500, row["offset"] + row["size"], size - 1):
        flip(tmp_path / "00000.tar", place)
        images = image_set(tmp_path, verify=True)
        images.begin()
        assert images.done == 6 and images.damaged == []
        images.finish()
        assert tree(tmp_path) == expected, place


@pytest.mark.parametrize("name", ["00001/metadata.jsonl", "contact_sheet.png"])
def test_verified_what_lies_beside_the_images_is_written_again(tmp_path, name):
    expected = draw_all(tmp_path, "geneval")
    flip(tmp_path / name, -8)
    fill(image_set(tmp_path, "geneval", verify=True)).finish()
    assert tree(tmp_path) == expected


def test_a_verified_set_without_damage_is_left_alone(tmp_path):
    draw_all(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    fill(image_set(tmp_path, verify=True)).finish()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_several_processes_verify_their_own_shards(tmp_path):
    expected = draw_all(tmp_path)
    rows = manifest(tmp_path)
    for row in (rows[1], rows[5]):
        flip(tmp_path / row["file"], row["offset"])
    sets = [image_set(tmp_path, process_index=i, process_count=2, verify=True) for i in range(2)]
    assert [fill(images).damaged for images in sets] == [[1], [5]]
    sets[0].finish()
    assert tree(tmp_path) == expected


@pytest.mark.parametrize("kept", [False, True])
def test_a_folder_in_the_place_of_an_image_costs_that_image_and_keeps_what_it_holds(tmp_path, kept):
    expected = draw_all(tmp_path, "flat")
    file = tmp_path / "00001-0.png"
    file.unlink()
    file.mkdir()
    if kept:
        (file / "thesis.txt").write_text("mine")
        expected["00001-0.png.folder/thesis.txt"] = hashlib.sha256(b"mine").hexdigest()
    images = image_set(tmp_path, "flat")
    images.begin()
    assert images.pending.tolist() == [4]
    fill(images).finish()
    assert tree(tmp_path) == expected


def test_a_folder_in_the_place_of_a_shard_costs_that_shard(tmp_path):
    expected = draw_all(tmp_path)
    (tmp_path / "00001.tar").unlink()
    (tmp_path / "00001.tar").mkdir()
    images = image_set(tmp_path)
    images.begin()
    assert images.pending.tolist() == [4, 5]
    fill(images).finish()
    assert tree(tmp_path) == expected


ROWS = [
    *([None] * 7, ["1"] * 7, {"a": 1}, 3, [0, "../x.png", 0, 5, "a", 1, 1], [99, "a.png", 0, 5, "a", 1, 1]),
    *([0, "a.png", -1, 5, "a", 1, 1], [0, "a.png", 0, 2.0**70, "a", 1, 1], [0, "a.png", 0, None, "a", 1, 1]),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_record_that_says_no_image_lists_nothing(tmp_path, row):
    expected = draw_all(tmp_path / "whole", "flat")
    images = image_set(tmp_path / "damaged", "flat")
    images.begin()
    images.write([0, 1], draw(images._items, [0, 1]))
    record = tmp_path / "damaged" / ".parts" / "00000-000000000.json"
    record.write_text(json.dumps([row] if row != 3 else row))
    images = image_set(tmp_path / "damaged", "flat")
    images.begin()
    assert images.done == 0
    fill(images).finish()
    assert tree(tmp_path / "damaged") == expected


def test_one_program_at_a_time_writes_into_a_folder_and_its_processes_share_it(tmp_path):
    folder = tmp_path / "set"
    with image_set(folder).only_writer():
        with image_set(folder, process_index=1, process_count=2).only_writer():
            pass
        message = rf"{folder}: another program writes into this folder \(.*; process {os.getpid()} on .*\); wait for it"
        with pytest.raises(UserError, match=message), image_set(folder).only_writer():
            pass
    with image_set(folder).only_writer():
        fill(image_set(folder)).finish()
    assert {name for name in tree(folder) if not name.startswith(".lock")} == set(draw_all(tmp_path / "whole"))


def test_a_folder_of_something_else_gets_no_lock(tmp_path):
    (tmp_path / "thesis.docx").write_text("")
    with (
        pytest.raises(UserError, match=r"holds thesis\.docx, but no settings\.json"),
        image_set(tmp_path).only_writer(),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.docx"]


def test_a_lock_that_a_killed_program_left_does_not_stand_in_the_way(tmp_path):
    for name in (".lock", ".lock.json", "..lock.json.0123"):
        (tmp_path / name).write_text("")
    with image_set(tmp_path).only_writer():
        fill(image_set(tmp_path)).finish()


def test_changed_bytes_of_a_batch_are_noticed_before_they_get_into_a_shard(tmp_path):
    expected = draw_all(tmp_path / "whole")
    folder = tmp_path / "damaged"
    images = image_set(folder)
    images.begin()
    images.write([0, 1], draw(images._items, [0, 1]))
    row = images._rows[1]
    flip(folder / row.file, row.offset + 100)
    with pytest.raises(UserError, match=r"00000-000000000\.tar: its bytes are not .* written \(image 1\): .*--verify"):
        fill(image_set(folder))
    images = fill(image_set(folder, verify=True))
    assert images.damaged == [1]
    images.finish()
    assert tree(folder) == expected


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", None])
def test_a_damaged_manifest_is_named_and_no_image_is_drawn_over_it(tmp_path, damage):
    draw_all(tmp_path, "flat")
    file = tmp_path / "manifest.parquet"
    if damage:
        file.write_bytes(damage(file.read_bytes()))
    else:
        pq.write_table(pq.read_table(file).slice(0, 3), file)
    with pytest.raises(UserError, match=r"manifest\.parquet: .*restore it, or remove it to draw") as error:
        image_set(tmp_path, "flat").begin()
    assert "\n" not in str(error.value)


# Disks.


class Disk:
    """Has no room when a file is to be made durable for the nth time."""

    def __init__(self, patch, full_at):
        self.calls, self.full_at, self.fsync = 0, full_at, os.fsync
        patch.setattr(os, "fsync", self)

    def __call__(self, descriptor):
        self.calls += 1
        if self.calls > self.full_at:
            raise OSError(28, "No space left on device")
        return self.fsync(descriptor)


@pytest.mark.parametrize("layout", ["webdataset", "geneval"])
def test_a_disk_that_is_full_at_any_file_is_one_line_and_the_set_can_be_continued(tmp_path, monkeypatch, layout):
    expected = draw_all(tmp_path / "whole", layout)
    for full_at in itertools.count():
        folder = tmp_path / str(full_at)
        with monkeypatch.context() as patch:
            Disk(patch, full_at)
            try:
                fill(image_set(folder, layout)).finish()
                break
            except UserError as error:
                told = str(error)
        images = image_set(folder, layout)
        assert not list(folder.glob(".parts/*.????????????????????????????????"))
        images.begin()
        if full_at == 0:
            assert told.startswith(f"{folder}/settings.json: No space left on device: free space, then run")
        else:
            count = int(re.search(r": No space left on device; (\d) of 6 images are safe: free space", told)[1])
            assert count == images.done
        fill(images).finish()
        assert tree(folder) == expected
    assert full_at > 12


def test_a_file_that_may_not_grow_is_one_line_and_the_set_can_be_continued(program, tmp_path):
    expected = draw_all(tmp_path / "whole")
    stopped = program(tmp_path / "small", layout="webdataset", largest=12000)
    assert re.search(r"^error .*00000\.tar: File too large; 4 of 6 images are safe: free space", stopped["log"][-1])
    repeated = program(tmp_path / "small", layout="webdataset")
    assert repeated["log"][-1] == "finished"
    assert not set(logged(stopped["log"], "wrote")) & set(logged(repeated["log"], "draws"))
    assert tree(tmp_path / "small") == expected


def test_a_full_disk_is_one_line_and_the_set_can_be_continued_when_there_is_room(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, timeout=10).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with pytest.raises(UserError, match=r"No space left on device; \d of 6 images are safe: free space"):
            fill(image_set(small / "set", "flat"), size=96)
        images = image_set(small / "set", "flat")
        images.begin()
        assert 0 < images.done < 6
        subprocess.run([*mount[:4], "remount,size=4m", *mount[5:]], check=True, timeout=10)
        fill(images, size=96).finish()
        continued = tree(small / "set")
    finally:
        subprocess.run(["umount", str(small)], check=True, timeout=10)
    fill(image_set(tmp_path / "whole", "flat"), size=96).finish()
    assert continued == tree(tmp_path / "whole")


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match=r"out: Not a directory: remove the cause, then run"):
        image_set(tmp_path / "out").begin()


class ObjectStore(MemoryFileSystem):
    """What one process sees of a store: no folders, and listings that it remembers until it writes something itself."""

    protocol, cachable = ("gs", "gcs"), False

    def __init__(self, objects):
        super().__init__()
        self.store, self.pseudo_dirs, self.listings = objects, [""], {}

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")

    def invalidate_cache(self, path=None):
        self.listings.clear()

    def ls(self, path, detail=True, **options):
        path = self._strip_protocol(path)
        if path not in self.listings:
            self.listings[path] = super().ls(path, True, **options)
        return self.listings[path] if detail else [entry["name"] for entry in self.listings[path]]

    def _open(self, path, mode="rb", **options):
        if mode != "rb":
            self.listings.clear()
        return super()._open(path, mode, **options)

    def _rm(self, path):
        self.listings.clear()
        super()._rm(path)

    def mkdir(self, *arguments, **options):
        raise AssertionError("an object store has no folders")

    makedirs = mv = mkdir


def test_an_object_store_gets_the_same_files_from_several_processes(tmp_path, monkeypatch):
    expected = draw_all(tmp_path, count=6)
    objects = {}
    stores, running = [ObjectStore(objects), ObjectStore(objects)], [0]
    monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: stores[running[0]])

    def process(number):
        running[0] = number
        return image_set(epath.Path("gs://bucket/set"), count=6, process_index=number, process_count=2)

    first = process(0)
    first.begin()
    first.write(first.pending[:3], draw(first._items, first.pending[:3]))
    fill(process(0), 2)
    last = process(0)
    last.begin()
    fill(process(1), 3)
    objects.pop("/bucket/set/00001.tar")
    fill(process(1), 2)
    running[0] = 0
    last.finish()
    files = {name.removeprefix("/bucket/set/"): file.getvalue() for name, file in objects.items()}
    assert {name: hashlib.sha256(content).hexdigest() for name, content in files.items()} == expected


# Writing in the background.


class Slow:
    """Pixels that are still being computed, until `ready`."""

    def __init__(self, pixels):
        self.pixels, self.ready = pixels, threading.Event()

    def __array__(self, dtype=None, copy=None):
        assert self.ready.wait(10)
        return self.pixels


def test_batches_are_written_in_order_while_the_next_ones_are_drawn(tmp_path):
    images = image_set(tmp_path, "flat")
    images.begin()
    counts = []
    pixels = [Slow(draw(images._items, [index])) for index in range(6)]
    with Writer(images, written=counts.append) as writer:
        writer.put([0], pixels[0])
        writer.put([1], pixels[1])
        third = threading.Thread(target=writer.put, args=([2], pixels[2]))
        third.start()
        third.join(0.1)
        assert third.is_alive() and images.done == 0  # no room: two are accepted
        pixels[1].ready.set()
        pixels[0].ready.set()
        third.join(10)
        assert not third.is_alive() and 0 not in images.pending
        pixels[2].ready.set()
    assert counts == [1, 1, 1] and images.pending.tolist() == [3, 4, 5]


def test_an_error_in_the_background_comes_up_at_the_next_batch_or_at_the_end(tmp_path):
    images = image_set(tmp_path, "flat")
    images.begin()
    with pytest.raises(ValueError, match="expected uint8"), Writer(images) as writer:
        writer.put([0], np.zeros((1, 4, 4, 3)))
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            writer.put(images.pending[1:2], draw(images._items, images.pending[1:2]))
            writer._accepted[-1].exception()
    assert images.done == 0 or time.monotonic() < deadline
    with pytest.raises(ValueError, match="expected uint8"), Writer(images) as writer:
        writer.put([0], np.zeros((1, 4, 4, 3)))


def test_what_was_accepted_is_written_when_the_program_fails(tmp_path):
    images = image_set(tmp_path, "flat")
    images.begin()
    slow = Slow(draw(images._items, [0, 1]))
    with pytest.raises(KeyboardInterrupt), Writer(images) as writer:
        writer.put([0, 1], slow)
        writer.put([2], draw(images._items, [2]))
        slow.ready.set()
        raise KeyboardInterrupt
    assert images.pending.tolist() == [3, 4, 5]


# Image files.

METADATA = {
    "prompt": 'Zwölf "Boxkämpfer"\njagen\t猫 🐈 <&>',
    "seed": 3,
    "w": 0.1,
    "sizes": [1, 2],
    "none": None,
    "five": "5",
}


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_pixels_and_metadata_come_back_and_bytes_are_the_same_every_time(tmp_path, image_format):
    pixels = draw(items_for("flat"), [0])[0][:9]
    content = encode_image(pixels, METADATA, image_format)
    (tmp_path / "image").write_bytes(content)
    assert encode_image(pixels, METADATA, image_format) == content
    for file in (content, tmp_path / "image", str(tmp_path / "image")):
        metadata = read_metadata(file)
        assert metadata == METADATA and list(map(type, metadata.values())) == list(map(type, METADATA.values()))
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == image_format.upper()
        np.testing.assert_array_equal(image, pixels, strict=True)


def test_a_png_shows_every_setting_to_other_programs():
    with Image.open(io.BytesIO(encode_image(draw(items_for("flat"), [0])[0], METADATA, "png"))) as image:
        assert dict(image.text) == {
            **{"prompt": METADATA["prompt"], "seed": "3", "w": "0.1", "sizes": "[1, 2]", "none": "null", "five": "5"}
        }


def test_what_is_not_an_image_is_named_and_images_of_others_have_their_texts(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        read_metadata(tmp_path / "a.png")
    with pytest.raises(ValueError, match="the bytes: not a readable image"):
        read_metadata(encode_image(draw(items_for("flat"), [0])[0], METADATA, "png")[:40])
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        read_metadata(tmp_path / "b.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "c.webp")
    assert read_metadata(tmp_path / "c.webp") == {}


def test_the_contact_sheet_shows_the_first_images_in_their_proportions(tmp_path):
    red, wide = np.full((8, 8, 3), (255, 0, 0), np.uint8), np.full((300, 600, 3), (0, 0, 255), np.uint8)
    files = [encode_image(pixels, {}, "png") for pixels in (red, wide)]
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(files, ["one", "two " * 100 + "x" * 500]))))
    assert sheet.shape[1] == 2 * MARGIN + 2 * TILE + GAP
    assert sheet[MARGIN, MARGIN].tolist() == [255, 0, 0]
    column = sheet[MARGIN : MARGIN + TILE, MARGIN + TILE + GAP + TILE // 2]
    assert column[0].tolist() == [255] * 3 and (column == (0, 0, 255)).all(axis=1).sum() == TILE // 2
    assert (sheet[MARGIN + TILE + 2 :] < 128).all(axis=2).any()  # captions
    assert (sheet[:, -MARGIN + 1 :] == 255).all()
    many = [item for seed in range(23) for item in (Item(prompt, seed) for prompt in prompts(3))]
    fill(ImageSet(tmp_path, many, {}, layout="flat"), 32).finish()
    with Image.open(tmp_path / "contact_sheet.png") as image:
        assert image.width == 2 * MARGIN + 8 * (TILE + GAP) - GAP
        eight_rows = image.height
    assert eight_rows == Image.open(io.BytesIO(contact_sheet(files[:1] * 64, ["a"] * 64))).height


if __name__ == "__main__":
    serve()
