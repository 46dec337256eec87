"""Prepared sets: what is in them, and that a kill, other hosts or damaged rows change nothing that they should not."""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import fsspec
import numpy as np
import preference_sets
import pytest
import stored_datasets
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from PIL import Image

from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.config import UserError, load_config
from flax_pref.data import encode_set, pair_folder
from flax_pref.data.encode import EncodedSet, Encoding, PairEncoder
from flax_pref.data.images import decode_image, encode_jpeg
from flax_pref.data.pick_a_pic import LabelledPair, write_pairs
from flax_pref.data.preparation import EncodeConfig, Preparation
from flax_pref.data.prepared import CAPTIONS, EMPTY, ENDS, PAIRS, PreparedSet
from flax_pref.data.selection import Choice, select
from flax_pref.data.sources import Source, open_source
from flax_pref.diffusion.conditioning import encode_empty, encode_prompts
from flax_pref.diffusion.latents import encode_images, latent_modes
from flax_pref.files import one_writer

ROOT = Path(__file__).parents[2]
BASE = str(resources.files("flax_pref.world") / "base")
HALF = 2.0**-8  # relative error of bfloat16
ENCODING = Encoding(size=(64, 64), batch_size=3)


def photo(seed, height=64, width=64):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / 255


def write_set(file, count=30, damaged=(), ties=()):
    """`count` rows of ten captions; images of `damaged` rows are cut off."""

    def pair(i):
        images = [encode_jpeg(photo(2 * i + side)) for side in (0, 1)]
        if i in damaged:
            images[i % 2] = images[i % 2][:300]
        label = 0.5 if i in ties else float(i % 3 == 0)
        return LabelledPair(f"a red circle number {i % 10}", *images, label, f"{i}-0", f"{i}-1", "base", "base")

    write_pairs(file, map(pair, range(count)), rows_per_group=7)
    return file


def examples_from(start, count):
    """Pairs of one caption whose records are of one size."""
    images = [[encode_jpeg(photo(2 * (start + i) + side)) for side in (0, 1)] for i in range(count)]
    return [LabelledPair("a red circle", *both, 1.0, f"{i}-0", f"{i}-1", "b", "b") for i, both in enumerate(images)]


def write_rows(file, rows):
    write_pairs(file, rows, rows_per_group=7)
    return file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    stored_datasets.offline(tmp_path / "cache", monkeypatch)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(BASE, with_unet=False)


@pytest.fixture(scope="module")
def encoder(pipeline):
    return PairEncoder(pipeline, ENCODING)


def source_of(file, layout):
    """Layouts with a colon are ways to store a set for `datasets`; those that end in a star are streamed."""
    layout, _, how = layout.partition(":")
    if layout != "datasets":
        return Source(layout=layout, path=str(file))
    return stored_datasets.source_of(file, how.rstrip("*"), stream=how.endswith("*"))


def opened(file, choice=None, layout="pick_a_pic"):
    reader = open_source(source_of(file, layout))
    return reader, select(reader, choice or Choice())


def prepare(folder, file, encoder, *, max_drop_share=0.2, settings=None, shard_size=8, **how):
    begun = Preparation(
        folder,
        *opened(file, **how),
        {"size": [64, 64]} | (settings or {}),
        shard_size=shard_size,
        max_drop_share=max_drop_share,
    )
    begun.begin()
    begun.encode(encoder)
    return begun.finish(encoder.shapes)


def contents(folder):
    """SHA-256 of every file except the lock."""
    found = {}
    for file in Path(folder).rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a program that still runs may have removed it
            if file.is_file() and not file.name.startswith((".lock", "..lock")):
                found[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def dropped(folder):
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# What is in a set


def test_a_record_holds_the_moments_of_both_images_and_the_number_of_its_caption(tmp_path, pipeline, encoder):
    file = write_set(tmp_path / "a.parquet", ties=(4,))
    prepare(tmp_path / "set", file, encoder)
    records = PreparedSet(tmp_path / "set")
    assert len(records) == 29 and records.image_size == (64, 64)
    assert records.shapes.moments == (1, 8, 8, 16)
    for index in (0, 3, 4, 28):
        pair = records.pair(index)
        row = index + (index >= 4)
        images = [np.asarray(decode_image(encode_jpeg(photo(2 * row + side)))) / 255 for side in (0, 1)]
        winner = 0 if row % 3 == 0 else 1
        expected = encode_images(pipeline.vae, np.stack([images[winner], images[1 - winner]]).astype(np.float32))
        batch = {"winner": pair["winner"], "loser": pair["loser"]}
        modes = latent_modes(batch, pipeline.vae.config.scaling_factor)
        for name, latents in zip(batch, expected, strict=True):
            np.testing.assert_allclose(modes[name][0], latents, atol=2 * HALF * np.abs(latents).max())
        assert pair["row"] == row and pair["winner_first"] == (winner == 0)
        assert pair["sizes"].tolist() == [[[64, 64, 0, 0]] * 2]
        caption = f"a red circle number {row % 10}"
        assert records.text(int(pair["caption"])) == caption
        states = records.conditioning(int(pair["caption"]))["encoder_hidden_states"]
        expected = encode_prompts(pipeline, [caption])["encoder_hidden_states"][0]
        np.testing.assert_allclose(np.float32(states), expected, atol=HALF * np.abs(expected).max())
    empty = encode_empty(pipeline)["encoder_hidden_states"]
    np.testing.assert_allclose(
        np.float32(records.conditioning(EMPTY)["encoder_hidden_states"]), empty, atol=HALF * np.abs(empty).max()
    )


def test_a_caption_is_encoded_once(tmp_path, encoder):
    metadata = prepare(tmp_path / "set", write_set(tmp_path / "a.parquet"), encoder)
    assert metadata["counts"]["captions"] == 10
    records = PreparedSet(tmp_path / "set")
    assert {int(records.pair(i)["caption"]) for i in range(30)} == set(range(1, 11))


def test_a_set_in_memory_has_the_records_of_the_prepared_one(tmp_path, encoder):
    file = write_set(tmp_path / "a.parquet", damaged=(5,), ties=(4,))
    prepare(tmp_path / "set", file, encoder, shard_size=1000)
    prepared, memory = PreparedSet(tmp_path / "set"), EncodedSet(encoder, *opened(file), max_drop_share=0.1)
    assert len(memory) == len(prepared) == 28 and memory.shapes == prepared.shapes
    for i in range(28):
        one, other = memory.pair(i), prepared.pair(i)
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype
    for caption in range(11):
        for name, array in memory.conditioning(caption).items():
            np.testing.assert_array_equal(array, prepared.conditioning(caption)[name])


def test_every_layout_gives_the_same_records(tmp_path, encoder):
    rows = preference_sets.examples(6)
    prepared = {}
    for layout, write in LAYOUTS.items():
        (tmp_path / layout).mkdir()
        path = write(tmp_path / layout, rows) or tmp_path / layout
        prepare(tmp_path / f"{layout} prepared", path, encoder, layout=layout)
        prepared[layout] = PreparedSet(tmp_path / f"{layout} prepared")
    for layout, records in prepared.items():
        assert len(records) == 6
        for i in range(6):
            one, other = records.pair(i), prepared["pick_a_pic"].pair(i)
            for name in ("row", "caption", "winner", "loser", "sizes"):
                np.testing.assert_array_equal(one[name], other[name], err_msg=f"{layout}, {name}")
            assert records.text(int(one["caption"])) == f"caption {i}"


def test_sizes_and_crops_of_both_images_are_recorded_also_of_their_mirror_images(tmp_path, pipeline):
    def pair(i):
        images = [encode_jpeg(photo(0, 100, 64)), encode_jpeg(photo(1, 80, 200))]
        return LabelledPair("a", *images, 1.0, f"{i}-0", f"{i}-1", "base", "base")

    write_pairs(tmp_path / "a.parquet", map(pair, range(4)))
    encoder = PairEncoder(pipeline, Encoding(size=(64, 64), crop="random", mirrored=True))
    prepare(tmp_path / "set", tmp_path / "a.parquet", encoder)
    records = PreparedSet(tmp_path / "set")
    assert records.shapes.moments == (2, 8, 8, 16)
    places = set()
    for i in range(4):
        (winner, loser), (mirrored_winner, mirrored_loser) = records.pair(i)["sizes"].tolist()
        assert winner[:2] == [100, 64] and loser[:2] == [80, 200]
        assert 0 <= winner[2] <= 36 and winner[3] == 0 and winner == mirrored_winner
        assert loser[2] == 0 and 0 <= loser[3] <= 96  # 80 x 200 becomes 64 x 160
        assert mirrored_loser[:3] == loser[:3] and mirrored_loser[3] == 160 - 64 - loser[3]
        places.add((winner[2], loser[3]))
    assert len(places) > 1, "places are drawn"


def test_mirror_images_are_encoded_not_their_latents_turned(tmp_path, pipeline):
    file = write_set(tmp_path / "a.parquet", count=2)
    prepare(tmp_path / "set", file, PairEncoder(pipeline, Encoding(size=(64, 64), mirrored=True)))
    pair = PreparedSet(tmp_path / "set").pair(0)
    image = np.asarray(decode_image(encode_jpeg(photo(0))), np.float32) / 255
    expected = encode_images(pipeline.vae, np.stack([image, image[:, ::-1]]))
    modes = pipeline.vae.config.scaling_factor * np.float32(pair["winner"])[..., :8]
    np.testing.assert_allclose(modes, expected, atol=2 * HALF * np.abs(expected).max())


# ----------------------------------------------------------------------------------------------------------------------
# Accounting


def test_every_row_is_a_pair_a_tie_or_a_line_of_dropped_jsonl(tmp_path, encoder):
    file = write_set(tmp_path / "a.parquet", damaged=(5, 20), ties=(4, 9))
    metadata = prepare(tmp_path / "set", file, encoder)
    assert metadata["counts"] == {"rows": 30, "pairs": 26, "ties": 2, "dropped": 2, "captions": 10}
    assert metadata["dropped"] == {"image is truncated or damaged": 2}
    assert [(line["file"], line["row"]) for line in dropped(tmp_path / "set")] == [(str(file), 5), (str(file), 20)]
    assert all(line["reason"] == "image is truncated or damaged" for line in dropped(tmp_path / "set"))
    stored = json.loads((tmp_path / "set" / PAIRS / "metadata.json").read_text())
    assert stored == metadata and len(stored["sha256"]) == 4 + 2
    for name, expected in stored["sha256"].items():
        data = (tmp_path / "set" / name.split("-")[0] / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == expected


def test_too_many_damaged_rows_stop_the_run_and_more_may_be_allowed_then(tmp_path, encoder):
    file = write_set(tmp_path / "a.parquet", damaged=(5, 20))
    with pytest.raises(
        UserError, match=r"2 of 30 rows are damaged \(6\.7%\).*2 rows: image is truncated.*first: row 5"
    ):
        prepare(tmp_path / "set", file, encoder, max_drop_share=0.05)
    assert [line["row"] for line in dropped(tmp_path / "set")] == [5, 20]
    assert not (tmp_path / "set" / PAIRS / "dataset_info.json").exists()
    assert prepare(tmp_path / "set", file, encoder, max_drop_share=0.07)["counts"]["pairs"] == 28


def test_rows_that_the_config_leaves_out_are_listed_but_not_damage(tmp_path, encoder):
    def pair(i):
        images = [encode_jpeg(photo(2 * i + side)) for side in (0, 1)]
        return LabelledPair("a", *images, float(i % 2), "one", f"other {i}", "base", "base")

    write_pairs(tmp_path / "a.parquet", map(pair, range(5)))  # image "one" wins twice and loses three times
    choice = Choice(unique_roles=True)
    metadata = prepare(tmp_path / "set", tmp_path / "a.parquet", encoder, max_drop_share=0, choice=choice)
    assert metadata["counts"] == {"rows": 5, "pairs": 3, "ties": 0, "dropped": 2, "captions": 1}
    assert [line["row"] for line in dropped(tmp_path / "set")] == [1, 3]


def test_a_set_without_a_pair_is_refused_with_the_reasons(tmp_path, encoder):
    file = write_set(tmp_path / "a.parquet", count=4, damaged=(0, 1, 2), ties=(3,))
    with pytest.raises(UserError, match="no pair is left of 4 rows, 1 of them ties; 3 rows: image is truncated"):
        prepare(tmp_path / "set", file, encoder, max_drop_share=1)
    with pytest.raises(UserError, match="no pair is left of 4 rows"):
        EncodedSet(encoder, *opened(file), max_drop_share=1)
    with pytest.raises(UserError, match=r"3 of 4 rows are damaged \(75\.0%\), more than max_drop_share=0.01 allows: 3"):
        EncodedSet(encoder, *opened(file))


def test_a_shard_whose_rows_are_all_dropped_does_no_harm(tmp_path, encoder):
    file = write_set(tmp_path / "a.parquet", count=12, damaged=range(4, 8))
    prepare(tmp_path / "set", file, encoder, max_drop_share=0.5, shard_size=4)
    records = PreparedSet(tmp_path / "set")
    assert [int(records.pair(i)["row"]) for i in range(len(records))] == [0, 1, 2, 3, 8, 9, 10, 11]


def test_other_settings_are_refused_with_the_difference_named(tmp_path, encoder):
    file = write_set(tmp_path / "a.parquet", count=4)
    prepare(tmp_path / "set", file, encoder)
    before = contents(tmp_path / "set")
    with pytest.raises(UserError, match="was begun with no crop, now crop=random: choose another"):
        prepare(tmp_path / "set", file, encoder, settings={"crop": "random"})
    with pytest.raises(UserError, match="when the source had other rows, captions, winners, ids, scores: choose"):
        prepare(tmp_path / "set", write_set(tmp_path / "b.parquet", count=5), encoder)
    assert contents(tmp_path / "set") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no prepared set"):
        prepare(tmp_path / "other", file, encoder)


def test_a_shard_that_is_missing_or_cut_is_noticed_when_the_set_is_opened(tmp_path, encoder):
    prepare(tmp_path / "set", write_set(tmp_path / "a.parquet"), encoder)
    shard = sorted((tmp_path / "set" / PAIRS).glob("*array_record*"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"its shards have \d+ bytes, but \d+ were written; copy the folder again"):
        PreparedSet(tmp_path / "set")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"00001-of-00004: no such file, but the prepared set has it"):
        PreparedSet(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="to be a prepared set, finished"):
        PreparedSet(tmp_path / "nothing")


def everything(folder):
    """All records of a prepared set."""
    records = PreparedSet(folder)
    pairs = [records.pair(i) for i in range(len(records))]
    captions = sorted({EMPTY, *(int(pair["caption"]) for pair in pairs)})
    arrays = [*pairs, *map(records.conditioning, captions)]
    return [records.text(i) for i in captions], [array.tobytes() for pair in arrays for array in pair.values()]


def test_a_changed_byte_in_a_shard_is_one_line_that_names_it_or_changes_no_record(tmp_path, encoder):
    prepare(tmp_path / "set", write_set(tmp_path / "a.parquet", count=9), encoder, shard_size=4)
    expected, rng = everything(tmp_path / "set"), random.Random(0)
    for name in (PAIRS, CAPTIONS):
        (tmp_path / "set" / name / ENDS).unlink()  # of which sets of older versions have none
        shard = sorted((tmp_path / "set" / name).glob("*array_record*"))[1]
        whole, named = shard.read_bytes(), 0
        used = [place for place, byte in enumerate(whole) if byte]
        for place in [*used[:40:8], *rng.sample(used, 10), *used[-20::7]]:
            shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
            try:
                assert everything(tmp_path / "set") == expected
            except ValueError as error:
                assert type(error) is ValueError and "\n" not in str(error)
                assert str(error).startswith(f"{shard}: damaged (") and "copy it again" in str(error)
                named += 1
        assert named > 8
        shard.write_bytes(whole)


def test_the_shard_of_another_set_or_another_number_is_noticed_when_the_set_is_opened(tmp_path, encoder):
    for name, start in (("set", 0), ("other", 9)):
        rows = examples_from(start, 8)
        prepare(tmp_path / name, write_rows(tmp_path / f"{name}.parquet", rows), encoder, shard_size=4)
    shards, others = (sorted((tmp_path / name / PAIRS).glob("*array_record*")) for name in ("set", "other"))
    assert {shard.stat().st_size for shard in (*shards, *others)} == {shards[0].stat().st_size}
    whole = shards[0].read_bytes()
    for other in (shards[1], others[0]):
        shards[0].write_bytes(other.read_bytes())
        with pytest.raises(ValueError, match=rf"^{shards[0]}: damaged \(its ends are not those of this shard"):
            PreparedSet(tmp_path / "set")
    shards[0].write_bytes(whole)
    assert len(PreparedSet(tmp_path / "set")) == 8
    shutil.rmtree(tmp_path / "set" / CAPTIONS)
    shutil.copytree(tmp_path / "other" / CAPTIONS, tmp_path / "set" / CAPTIONS)
    with pytest.raises(ValueError, match=r"their metadata\.json differ, so they are damaged or of two sets"):
        PreparedSet(tmp_path / "set")


def test_descriptions_that_are_damaged_are_named(tmp_path, encoder):
    prepare(tmp_path / "set", write_set(tmp_path / "a.parquet", count=4), encoder)
    for name in (PAIRS, CAPTIONS):
        for file in ("dataset_info.json", "features.json", "metadata.json"):
            whole = (tmp_path / "set" / name / file).read_bytes()
            for damage in (b"", whole[: len(whole) // 2], b"{}", b"[]", b"\xff" + whole[1:]):
                (tmp_path / "set" / name / file).write_bytes(damage)
                try:
                    assert everything(tmp_path / "set")
                except (ValueError, FileNotFoundError) as error:
                    assert str(tmp_path / "set" / name) in str(error)
            (tmp_path / "set" / name / file).write_bytes(whole)


# ----------------------------------------------------------------------------------------------------------------------
# Sources that change


LAYOUTS = {
    "pick_a_pic": preference_sets.write_pick_a_pic,
    "hpdv2": preference_sets.write_hpdv2,
    "hpdv3": preference_sets.write_hpdv3,
    "folder": preference_sets.write_pair_folder,
    "webdataset": preference_sets.write_tars,
    **{
        f"datasets:{how}": stored_datasets.STORED[how.rstrip("*")][0]
        for how in ("save_to_disk", "parquet", "images", "json*")
    },
}


def half_prepared(folder, source, encoder, **how):
    """The records of a set as of a run that was killed after its first shards of pairs, four rows."""
    begun = Preparation(
        folder, *opened(source, **how), {"size": [64, 64]}, shard_size=2, max_drop_share=0.2, process_count=1
    )
    begun.begin()
    shards = begun.pending
    begun.pending = lambda: [shard for shard in shards() if shard.name == CAPTIONS or shard.number < 2]
    begun.encode(encoder)
    return contents(folder)


def write_swapped(source, layout, rows, **changes):
    """The set once more, at the same place, with other fields in its second row."""
    shutil.rmtree(source)
    changed = [row._replace(**changes) if i == 1 else row for i, row in enumerate(rows)]
    LAYOUTS[layout](source, changed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_source_with_other_images_or_labels_is_not_mixed_with_what_it_was(tmp_path, encoder, layout):
    rows, source = preference_sets.examples(8, size=(64, 64)), tmp_path / "source"
    LAYOUTS[layout](source, rows)
    before = half_prepared(tmp_path / "set", source, encoder, layout=layout)
    write_swapped(source, layout, rows, winner=rows[1].loser, loser=rows[1].winner)
    with pytest.raises(UserError, match=r"the source has changed since it was begun \(.*, row [12]: its images are"):
        prepare(tmp_path / "set", source, encoder, layout=layout, shard_size=2)
    write_swapped(source, layout, rows, caption="another")
    with pytest.raises(UserError, match="was begun when the source had other captions: choose another --output, or re"):
        prepare(tmp_path / "set", source, encoder, layout=layout, shard_size=2)
    if layout in ("pick_a_pic", "hpdv2", "webdataset") or layout.startswith("datasets"):
        write_swapped(source, layout, rows, winner_first=True)
        with pytest.raises(
            UserError, match=r"was begun when the source had other winners(, ids)?: choose another --outpu"
        ):
            prepare(tmp_path / "set", source, encoder, layout=layout, shard_size=2)
    assert contents(tmp_path / "set") == before
    write_swapped(source, layout, rows)  # the same again, but in files that were written later
    prepare(tmp_path / "set", source, encoder, layout=layout, shard_size=2)
    prepare(tmp_path / "calm", source, encoder, layout=layout, shard_size=2)
    assert contents(tmp_path / "set") == contents(tmp_path / "calm")


def test_sets_of_other_images_or_labels_have_other_fingerprints_in_memory_and_on_disk(tmp_path, encoder):
    rows = preference_sets.examples(3, size=(64, 64))
    others = (
        rows[1]._replace(winner=rows[1].loser, loser=rows[1].winner),
        rows[1]._replace(winner_first=True),
        rows[1]._replace(caption="another"),
    )
    found = set()
    for i, row in enumerate((rows[1], *others)):
        source = preference_sets.write_pick_a_pic(tmp_path / f"source {i}", [rows[0], row, rows[2]])
        prepare(tmp_path / f"{i}", source, encoder)
        found |= {EncodedSet(encoder, *opened(source)).fingerprint, PreparedSet(tmp_path / f"{i}").fingerprint}
    assert len(found) == 8
    assert EncodedSet(encoder, *opened(tmp_path / "source 0")).fingerprint in found


def test_a_damaged_record_of_a_shard_costs_that_shard_only(tmp_path, encoder):
    file = write_set(tmp_path / "a.parquet", count=9)
    prepare(tmp_path / "set", file, encoder)
    before = contents(tmp_path / "set")
    for damage in (b"", b"{}", b"[]", b"\xff"):
        (tmp_path / "set/.parts/pairs-00001.json").write_bytes(damage)
        prepare(tmp_path / "set", file, encoder)
        assert contents(tmp_path / "set") == before


def test_images_of_a_source_that_nobody_touched_are_not_read_again(tmp_path, encoder, monkeypatch):
    rows, source = preference_sets.examples(6, size=(64, 64)), tmp_path / "source"
    preference_sets.write_pair_folder(source, rows)
    half_prepared(tmp_path / "set", source, encoder, layout="folder")
    read, real = [], pair_folder.read_images
    monkeypatch.setattr(pair_folder, "read_images", lambda folder, names: read.append(names) or real(folder, names))
    prepare(tmp_path / "set", source, encoder, layout="folder", shard_size=2)
    assert read == [(f"images/{i}-winner.jpg", f"images/{i}-loser.jpg") for i in (4, 5)]
    (source / "images/2-loser.jpg").rename(source / "x")  # swapped with their times
    (source / "images/2-winner.jpg").rename(source / "images/2-loser.jpg")
    (source / "x").rename(source / "images/2-winner.jpg")
    with pytest.raises(UserError, match=r"pairs\.jsonl, row 3: its images are other ones"):
        prepare(tmp_path / "set", source, encoder, layout="folder", shard_size=2)


def test_ids_scores_and_repaired_images_are_changes_too(tmp_path, encoder):
    source = preference_sets.write_pair_folder(tmp_path / "source", preference_sets.examples(3, size=(64, 64)))
    lines = [json.loads(line) for line in (source / "pairs.jsonl").read_text().splitlines()]
    half_prepared(tmp_path / "set", source, encoder, layout="folder")
    for change, named in (({"winner_id": "w"}, "ids"), ({"margin": 1}, "scores"), ({"tie": True}, "rows, captions")):
        now = [lines[0], lines[1] | change, lines[2]]
        (source / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in now))
        with pytest.raises(UserError, match=f"when the source had other {named}"):
            prepare(tmp_path / "set", source, encoder, layout="folder", shard_size=2)


class Bucket(MemoryFileSystem):
    """Files in a bucket."""

    protocol, store, pseudo_dirs = ("gs", "gcs"), {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if not layout.startswith("datasets")])
def test_a_file_in_a_bucket_that_was_written_again_is_named(tmp_path, encoder, layout, monkeypatch):
    for name in ("gs", "gcs"):
        monkeypatch.setitem(_registry, name, Bucket)
    bucket = fsspec.filesystem("gs")
    Bucket.store.clear()
    LAYOUTS[layout](tmp_path / "source", preference_sets.examples(6, size=(64, 64)))
    source = f"gs://bucket/{layout}"
    bucket.put(str(tmp_path / "source"), source, recursive=True)
    half_prepared(tmp_path / "set", source, encoder, layout=layout)
    file = opened(source, layout=layout)[0].image_files([0])[0]
    bucket.pipe(str(file), bucket.cat(str(file)))
    with pytest.raises(UserError, match=rf"has changed since it was begun \({file}: its size or modification mark is"):
        prepare(tmp_path / "set", source, encoder, layout=layout, shard_size=2)


def test_a_finished_set_that_lost_a_shard_gets_it_back(tmp_path, encoder):
    file = write_set(tmp_path / "a.parquet", count=9)
    prepare(tmp_path / "set", file, encoder)
    before = contents(tmp_path / "set")
    sorted((tmp_path / "set" / PAIRS).glob("*array_record*"))[1].unlink()
    begun = Preparation(tmp_path / "set", *opened(file), {"size": [64, 64]}, shard_size=8, max_drop_share=0.2)
    begun.begin()
    assert not begun.finished
    prepare(tmp_path / "set", file, encoder)
    assert contents(tmp_path / "set") == before
    begun.begin()
    assert begun.finished


# ----------------------------------------------------------------------------------------------------------------------
# Kills and hosts


class Kill(BaseException):
    """Ends a run as a signal would, as far as one process can."""


@pytest.mark.program
def test_killed_before_any_file_appears_and_begun_again_a_run_gives_the_same_files(tmp_path, encoder, monkeypatch):
    file = write_set(tmp_path / "a.parquet", count=9, damaged=(5,), ties=(4,))
    prepare(tmp_path / "calm", file, encoder, shard_size=4)
    expected, real = contents(tmp_path / "calm"), os.replace
    left, finished = 0, set()

    def replace(source, target):
        nonlocal left
        if left == 0:
            raise Kill
        left -= 1
        target = Path(target)
        assert target.name not in finished, "a finished shard was written again"
        if target.parent.name == ".parts":
            name, number = target.stem.split("-")
            finished.add(f"{name}-train.array_record-{number}-of-00003")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for survived in itertools.count():
        folder, left = tmp_path / f"{survived}", survived
        finished.clear()
        with contextlib.suppress(Kill):
            prepare(folder, file, encoder, shard_size=4)
            break
        left = -1  # from now on nothing stops it
        prepare(folder, file, encoder, shard_size=4)
        assert contents(folder) == expected
    assert survived == 1 + 2 * (3 + 3) + 1 + 2 * 4, "settings, shards with their records, drops, two descriptions"
    assert contents(folder) == expected


def test_a_disk_that_fills_up_before_any_file_is_one_line_and_leaves_no_half_file(tmp_path, encoder, monkeypatch):
    file = write_set(tmp_path / "a.parquet", count=5, damaged=(3,))
    prepare(tmp_path / "calm", file, encoder, shard_size=4, max_drop_share=0.5)
    expected, real, left = contents(tmp_path / "calm"), os.replace, 0

    def replace(source, target):
        nonlocal left
        left -= 1
        if left == -1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for steps in range(100):
        folder, left = tmp_path / f"{steps}", steps
        try:
            prepare(folder, file, encoder, shard_size=4, max_drop_share=0.5)
            break
        except UserError as error:
            told = rf"^{folder}.*: No space left on device: free space, then run the same command again, which"
            assert re.search(told, str(error)) and "\n" not in str(error)
        assert not [path for path in folder.rglob(".*") if path.name != ".parts"], "half-written"
        prepare(folder, file, encoder, shard_size=4, max_drop_share=0.5)
        assert contents(folder) == expected
    assert steps > 12


def test_a_full_disk_is_one_line_and_with_more_space_the_set_is_finished(tmp_path, encoder):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, timeout=10).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        file = write_set(tmp_path / "a.parquet", count=60)
        with pytest.raises(UserError, match=r"No space left on device: free space, then run the same command again"):
            prepare(small / "set", file, encoder, shard_size=30)
        assert not [path for path in (small / "set").rglob(".*") if path.name != ".parts"]
        subprocess.run([*mount[:4], "remount,size=8m", *mount[5:]], check=True, timeout=10)
        prepare(small / "set", file, encoder, shard_size=30)
        prepare(tmp_path / "calm", file, encoder, shard_size=30)
        assert contents(small / "set") == contents(tmp_path / "calm")
    finally:
        subprocess.run(["umount", str(small)], check=True, timeout=10)


def test_what_kills_leave_behind_does_not_stay(tmp_path, encoder):
    file = write_set(tmp_path / "a.parquet", count=4)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / ".settings.json.5f").write_text("{")
    prepare(tmp_path / "set", file, encoder)
    expected = contents(tmp_path / "set")
    assert not any(Path(name).name.startswith(".") for name in expected)
    (tmp_path / "set" / ".parts" / ".pairs-00000.json.5f").write_text("{}")
    (tmp_path / "set" / PAIRS / ".pairs-train.5f").write_bytes(b"half")
    again = Preparation(tmp_path / "set", *opened(file), {"size": [64, 64]}, shard_size=8, max_drop_share=0.2)
    again.begin()
    assert again.finished and contents(tmp_path / "set") == expected


@pytest.mark.parametrize("layout", ["pick_a_pic", "datasets:parquet", "datasets:json*"])
def test_processes_write_what_one_writes(tmp_path, encoder, layout):
    rows, source = preference_sets.examples(30, size=(64, 64)), tmp_path / "source"
    rows[5] = rows[5]._replace(winner=rows[5].winner[:300])
    LAYOUTS[layout](source, rows)
    prepare(tmp_path / "one", source, encoder, layout=layout)
    options = {"shard_size": 8, "max_drop_share": 0.2, "process_count": 3}
    begun = [
        Preparation(tmp_path / "three", *opened(source, layout=layout), {"size": [64, 64]}, process_index=i, **options)
        for i in range(3)
    ]
    for process in begun:
        process.begin()
    shards = [process.pending() for process in begun]
    assert sorted(itertools.chain(*shards)) == sorted(
        [(CAPTIONS, i) for i in range(4)] + [(PAIRS, i) for i in range(4)]
    )
    for process in reversed(begun):
        process.encode(encoder)
    for process in reversed(begun):
        process.finish(encoder.shapes)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def program(*flags, devices=1):
    """`python -m train.encode` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "train.encode", "configs/demo/encode.py", *map(str, flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)},
    )


def finish(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err[-2000:]
    return out


def flags_for(file):
    return ("--source.path", file, "--encoding.batch-size", "4", "--max-drop-share", "0.1")


@pytest.mark.program
def test_two_hosts_write_what_one_writes(tmp_path):
    flags = (*flags_for(write_set(tmp_path / "a.parquet", damaged=(5,))), "--shard-size", "8")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = [program(*flags, "--output", tmp_path / "two", "--hosts", f"{address},2,{i}") for i in range(2)]
    told = [finish(process) for process in hosts]
    assert "30 rows = 29 pairs + 0 ties + 1 dropped; 10 captions" in told[0]
    assert "1 dropped: image is truncated or damaged" in told[0] and "pairs" not in told[1]
    finish(program(*flags, "--output", tmp_path / "one"))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert "is complete; nothing to do" in finish(program(*flags, "--output", tmp_path / "one"))


def test_a_second_encode_into_the_same_folder_is_refused_before_it_reads_the_set(tmp_path, monkeypatch):
    config = dataclasses.replace(
        load_config(["configs/demo/encode.py"], EncodeConfig),
        output=tmp_path / "set",
        source=Source(layout="pick_a_pic", path=str(write_set(tmp_path / "a.parquet", count=2))),
    )
    (tmp_path / "set").mkdir()
    monkeypatch.setattr(encode_set, "select", None)
    with one_writer(tmp_path / "set"), pytest.raises(UserError, match=rf"writes into.*; process {os.getpid()} on "):
        encode_set.encode_set(config)


def kill_and_compare(tmp_path, kills):
    flags = (*flags_for(write_set(tmp_path / "a.parquet", count=200 * kills)), "--shard-size", "16")
    finish(program(*flags, "--output", tmp_path / "calm"))
    rng, out, alive, done = random.Random(0), tmp_path / "killed", 0, {}
    for _ in range(kills):
        process, before = program(*flags, "--output", out), contents(out)
        while process.poll() is None and contents(out) == before:  # until it writes
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        alive += process.poll() is None
        process.kill()
        process.communicate()
        for part in (out / ".parts").glob("*.json"):
            assert done.setdefault(part.name, part.stat().st_mtime_ns) == part.stat().st_mtime_ns, "written again"
    finish(program(*flags, "--output", out))
    assert alive >= kills / 2
    assert contents(out) == contents(tmp_path / "calm")


@pytest.mark.program
def test_a_killed_run_goes_on_to_the_same_files(tmp_path):
    kill_and_compare(tmp_path, kills=2)


@pytest.mark.long
def test_a_run_killed_twenty_times_goes_on_to_the_same_files(tmp_path):
    kill_and_compare(tmp_path, kills=20)


def test_a_mesh_of_devices_encodes_the_same(tmp_path, encoder):
    file = write_set(tmp_path / "a.parquet", count=10)
    finish(program(*flags_for(file), "--output", tmp_path / "four", devices=4))
    one, four = EncodedSet(encoder, *opened(file)), PreparedSet(tmp_path / "four")
    for i in range(10):
        for name in ("winner", "loser"):
            expected = np.float32(one.pair(i)[name])
            np.testing.assert_allclose(np.float32(four.pair(i)[name]), expected, atol=4 * HALF * np.abs(expected).max())
