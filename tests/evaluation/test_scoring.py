"""As a program, this file scores a run in child processes that are killed on the way: one order per line of stdin."""

import base64
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from flax_pref.config import UserError
from flax_pref.data.prompts import Prompt, read_prompts
from flax_pref.evaluation import scoring
from flax_pref.evaluation.runs import ImageFile, open_run, read_image
from flax_pref.evaluation.scoring import Scorer, Scores, locked, score_images
from flax_pref.images.image_files import encode_image
from flax_pref.images.image_set import ImageSet, Item
from flax_pref.parallel.mesh import make_mesh
from flax_pref.rewards.jpeg import JpegSize
from flax_pref.rewards.remote import Remote, Service
from tests.services import LocalService

OF = {"name": "brightness", "sha256": "ab", "dtype": "float32"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Brightness:
    """Sees images of any size as one number for each colour; long captions are better."""

    weights: jax.Array
    name = "brightness"
    differentiable = True

    def prepare(self, captions):
        return np.array([len(caption) for caption in captions], np.float32)

    def view(self, images):
        return images.mean((1, 2))

    def score(self, view, prepared):
        return view @ self.weights + prepared

    def image_features(self, view):
        return view / jnp.linalg.norm(view, axis=1, keepdims=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
    """How far the colours of two images are from one another, squared."""

    weights: jax.Array
    name = "apart"

    def view(self, images):
        return images.mean((2, 3))

    def distance(self, view):
        return jnp.square(view[:, 0] - view[:, 1]) @ self.weights


def expected(pixels, caption):
    return np.float32(pixels.reshape(-1, 3).mean(0) / 255 @ np.array([3.0, 2.0, 1.0]) + len(caption))


@pytest.fixture(scope="module")
def scorer():
    return scorer_of(Brightness(jnp.array([3.0, 2.0, 1.0])))


def scorer_of(reward, **options):
    return Scorer(reward, make_mesh("data=-1", jax.devices()[:1]), batch_size=4, **options)


def noise(seed, height=10, width=12):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def prompts(count):
    return [Prompt(i, "x" * (i + 1), ("anime", "photo")[i % 2], {"tag": "t", "n": i}) for i in range(count)]


def draw_run(folder, layout="flat", count=3, seeds=(5, 2), **options):
    """A finished run with the pixels of its images in the order of the manifest."""
    items = [Item(prompt, seed) for prompt in prompts(count) for seed in seeds]
    pixels = np.stack([noise((item.prompt.id, item.seed)) for item in items])
    images = ImageSet(folder, items, {"w": 2.0}, layout=layout, shard_size=4, **options)
    images.begin()
    images.write(range(len(items)), pixels)
    images.finish()
    return items, pixels


def score(folder, scorer, column="score:brightness", of=OF, *, prompts=None):
    """What a program does; the number of images that were read for it."""
    read = []
    scores = Scores(open_run(folder, prompts))
    scores.look_again()
    score_images(scorer, scores, column, of, done=read.append)
    return sum(read)


def table(folder):
    return pq.read_table(Path(folder) / "scores.parquet")


def rows(folder):
    return table(folder).to_pylist()


# Runs


@pytest.mark.parametrize(
    ("layout", "image_format"), [("webdataset", "webp"), ("flat", "png"), ("geneval", "png"), ("hpsv2", "webp")]
)
def test_runs_of_all_layouts_are_scored_in_the_order_of_their_manifest(layout, image_format, scorer, tmp_path):
    seeds = (3,) if layout == "hpsv2" else (5, 2)
    items, pixels = draw_run(tmp_path, layout, seeds=seeds, image_format=image_format)
    assert score(tmp_path, scorer) == len(items)
    found = rows(tmp_path)
    wanted = [expected(image, item.prompt.text) for image, item in zip(pixels, items, strict=True)]
    np.testing.assert_allclose([row["score:brightness"] for row in found], wanted, rtol=1e-6)
    assert [(row["prompt_id"], row["seed"]) for row in found] == [(item.prompt.id, item.seed) for item in items]
    manifest = pq.read_table(tmp_path / "manifest.parquet")
    assert table(tmp_path).select(manifest.column_names).equals(manifest.replace_schema_metadata())
    assert {row["problem"] for row in found} == {""}
    assert json.loads(table(tmp_path).schema.metadata[b"flax_pref"]) == {
        "rewards": {"brightness": OF},
        "features": {},
        "distances": {},
    }


def test_a_manifest_without_records_is_scored_too(scorer, tmp_path):
    draw_run(tmp_path)
    file = tmp_path / "manifest.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["record"]), file)
    score(tmp_path, scorer)
    assert {row["record"] for row in rows(tmp_path)} == {"{}"}


def test_images_that_are_missing_changed_or_damaged_are_named_and_the_others_scored(scorer, tmp_path):
    draw_run(tmp_path / "tars", "webdataset", count=5)
    draw_run(tmp_path / "flat", count=5)
    whole = {name: (score(tmp_path / name, scorer), rows(tmp_path / name)) for name in ("tars", "flat")}
    for name in whole:
        (tmp_path / name / "scores.parquet").unlink()
    tars, flat = (pq.read_table(tmp_path / name / "manifest.parquet").to_pylist() for name in whole)
    tar = bytearray((tmp_path / "tars/00000.tar").read_bytes())
    tar[tars[1]["offset"] + 40] ^= 1
    (tmp_path / "tars/00000.tar").write_bytes(tar)
    (tmp_path / "tars/00001.tar").unlink()  # images 4 to 7
    (tmp_path / "flat" / flat[0]["file"]).unlink()
    (tmp_path / "flat" / flat[2]["file"]).write_bytes(b"")
    wanted = {
        "tars": ["", "changed", "", "", *["missing"] * 4, "", ""],
        "flat": ["missing", "", "changed", *[""] * 7],
    }
    for name, problems in wanted.items():
        assert score(tmp_path / name, scorer) == 10
        found = rows(tmp_path / name)
        assert [row["problem"] for row in found] == problems
        for row, (before, problem) in zip(found, zip(whole[name][1], problems, strict=True), strict=True):
            assert row["score:brightness"] == (None if problem else before["score:brightness"])  # to the last bit
        assert score(tmp_path / name, scorer) == 0
    (tmp_path / "flat" / flat[0]["file"]).write_bytes(encode_image(noise((0, 5)), {}, "png"))  # not what was drawn
    assert score(tmp_path / "flat", scorer) == 0
    assert rows(tmp_path / "flat")[0]["problem"] == "changed"
    draw_run(tmp_path / "again", "webdataset", count=5)
    shutil.copy(tmp_path / "again/00001.tar", tmp_path / "tars")
    assert score(tmp_path / "tars", scorer) == 4
    assert [row["problem"] for row in rows(tmp_path / "tars")] == ["", "changed", *[""] * 8]


def test_a_folder_in_the_place_of_an_image_costs_one_image_and_not_the_set(scorer, tmp_path):
    draw_run(tmp_path)
    (tmp_path / "00001-2.png").unlink()
    (tmp_path / "00001-2.png").mkdir()
    score(tmp_path, scorer)
    assert [row["problem"] for row in rows(tmp_path)] == ["", "", "", "missing", "", ""]
    assert table(tmp_path)["score:brightness"].null_count == 1


def test_a_problem_that_the_table_of_scores_lacks_is_none(scorer, tmp_path):
    with_cells()(tmp_path)
    score(tmp_path, scorer)
    scored = table(tmp_path)
    rows = [row | {"problem": None, "score:brightness": None} for row in scored.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, scored.schema), tmp_path / "scores.parquet")
    assert score(tmp_path, scorer) == 6 and table(tmp_path)["score:brightness"].null_count == 0


def test_a_reward_is_added_without_scoring_the_others_again_and_other_weights_replace_its_scores(scorer, tmp_path):
    draw_run(tmp_path)
    score(tmp_path, scorer)
    first = rows(tmp_path)
    jpeg = scorer_of(JpegSize("compressibility", -1.0))
    assert score(tmp_path, jpeg, "score:compressibility", {"name": "compressibility"}) == 6
    added = rows(tmp_path)
    assert table(tmp_path).column_names[-3:] == ["score:brightness", "score:compressibility", "problem"]
    assert [{k: v for k, v in row.items() if k != "score:compressibility"} for row in added] == first
    assert all(row["score:compressibility"] < 0 for row in added)
    assert score(tmp_path, scorer) == 0
    other = scorer_of(Brightness(jnp.array([9.0, 9.0, 9.0])))
    assert score(tmp_path, other, of={**OF, "sha256": "cd"}) == 6
    for row, before in zip(rows(tmp_path), added, strict=True):
        assert row["score:brightness"] > before["score:brightness"]
        assert row["score:compressibility"] == before["score:compressibility"]


def test_an_image_that_was_drawn_anew_is_scored_again_and_no_other(scorer, tmp_path):
    items, _ = draw_run(tmp_path)
    score(tmp_path, scorer)
    before = rows(tmp_path)
    file, content = tmp_path / before[3]["file"], encode_image(noise(99), {}, "png")
    file.write_bytes(content)
    manifest = pq.read_table(tmp_path / "manifest.parquet").to_pylist()
    manifest[3] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    pq.write_table(pa.Table.from_pylist(manifest), tmp_path / "manifest.parquet")
    assert score(tmp_path, scorer) == 1
    now = rows(tmp_path)
    np.testing.assert_allclose(now[3]["score:brightness"], expected(noise(99), items[3].prompt.text), rtol=1e-6)
    assert [row["score:brightness"] for row in now[:3] + now[4:]] == [
        row["score:brightness"] for row in before[:3] + before[4:]
    ]


def test_features_of_images_are_stored_and_kept(tmp_path):
    _, pixels = draw_run(tmp_path)
    (tmp_path / open_run(tmp_path).rows["file"][1].as_py()).unlink()
    embedder = scorer_of(Brightness(jnp.zeros(3)), column="features:colour")
    assert score(tmp_path, embedder, "features:colour", OF) == 6
    column = table(tmp_path)["features:colour"]
    assert column.type == pa.list_(pa.float32(), 3)
    found = column.to_pylist()
    assert found[1] is None
    for i in (0, 2, 3, 4, 5):
        mean = pixels[i].reshape(-1, 3).mean(0)
        np.testing.assert_allclose(np.array(found[i], np.float32), mean / np.linalg.norm(mean), rtol=1e-5)
    assert json.loads(table(tmp_path).schema.metadata[b"flax_pref"])["features"] == {"colour": OF}
    # They are still there when something is added, and not computed again.
    score(tmp_path, scorer_of(Brightness(jnp.ones(3))))
    assert table(tmp_path)["features:colour"].to_pylist() == found
    assert score(tmp_path, embedder, "features:colour", OF) == 0
    with pytest.raises(ValueError, match="compressibility: has no image features"):
        scorer_of(JpegSize("compressibility", -1.0), column="features:compressibility")


def distances(folder):
    """By prompt and the seeds of both images, those that are not known left out."""
    found, seeds = {}, {}
    for row in table(folder).select(["prompt_id", "seed", "distance:apart"]).to_pylist():
        before = seeds.setdefault(row["prompt_id"], [])
        assert len(row["distance:apart"]) == len(before)
        known = zip(before, row["distance:apart"], strict=True)
        found |= {(row["prompt_id"], row["seed"], seed): value for seed, value in known if value is not None}
        before.append(row["seed"])
    return found


def test_distances_are_those_of_all_pairs_of_a_prompt_and_belong_to_the_bytes_of_both_images(tmp_path):
    items, pixels = draw_run(tmp_path, seeds=(5, 2, 7))
    scorer = scorer_of(Apart(jnp.ones(3)), column="distance:apart")
    assert score(tmp_path, scorer, "distance:apart", OF) == 9
    colours = {(i.prompt.id, i.seed): p.reshape(-1, 3).mean(0) / 255 for i, p in zip(items, pixels, strict=True)}
    wanted = {
        (prompt, later, earlier): np.square(colours[prompt, later] - colours[prompt, earlier]).sum()
        for prompt in range(3)
        for later, earlier in ((2, 5), (7, 5), (7, 2))
    }
    found = distances(tmp_path)
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[key] for key in wanted], list(wanted.values()), rtol=1e-5)
    assert json.loads(table(tmp_path).schema.metadata[b"flax_pref"])["distances"] == {"apart": OF}
    # An image that was drawn again costs its two pairs, one that is gone leaves its two out.
    assert score(tmp_path, scorer, "distance:apart", OF) == 0
    manifest = pq.read_table(tmp_path / "manifest.parquet")
    rows = manifest.to_pylist()
    content = encode_image(noise(99), {}, "png")
    (tmp_path / rows[0]["file"]).write_bytes(content)
    rows[0] |= {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    pq.write_table(pa.Table.from_pylist(rows, manifest.schema), tmp_path / "manifest.parquet")
    (tmp_path / rows[3]["file"]).unlink()
    assert score(tmp_path, scorer, "distance:apart", OF) == 2
    again = distances(tmp_path)
    first = (rows[0]["prompt_id"], rows[0]["seed"])
    assert again.keys() == found.keys()  # of the image that is gone they are still known
    changed = {key for key in found if found[key] != again[key]}
    assert changed == {key for key in found if first in (key[:2], (key[0], key[2]))} and len(changed) == 2
    (tmp_path / "scores.parquet").unlink()
    score(tmp_path, scorer, "distance:apart", OF)
    gone = (rows[3]["prompt_id"], rows[3]["seed"])
    assert distances(tmp_path).keys() == {key for key in found if gone not in (key[:2], (key[0], key[2]))}


def test_images_of_one_prompt_that_have_different_sizes_have_no_distance(tmp_path):
    save(tmp_path / "0-0.png", noise(0)), save(tmp_path / "0-1.png", noise(1, height=20))
    with pytest.raises(UserError) as told:
        score(
            tmp_path,
            scorer_of(Apart(jnp.ones(3)), column="distance:apart"),
            *("distance:apart", OF),
            prompts=prompts(1),
        )
    assert str(told.value) == (
        f"{tmp_path}: apart: 0-1.png has 12 x 20 and 0-0.png has 12 x 10 pixels; expected images of one size for each "
        "prompt: leave it out, or draw them again"
    )


def test_photographs_without_prompts_have_features(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", noise(i))
    with pytest.raises(UserError, match="no prompt for 3 of 3 images"):
        open_run(tmp_path)
    run = open_run(tmp_path, needed=False)
    assert run.told == "without prompts" and run.rows["prompt_id"].to_pylist() == [0, 1, 2]
    (tmp_path / "1.txt").write_text("a cat")
    with pytest.raises(UserError, match="no prompt for 2 of 3 images"):
        open_run(tmp_path, needed=False)


def test_the_table_is_kept_while_scoring_and_written_only_where_it_changes(scorer, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "SAVE_EVERY", 0)
    monkeypatch.setattr(scoring, "SAVE_SHARE", np.inf)
    draw_run(tmp_path, count=6)
    known = []
    monkeypatch.setattr(scoring, "_write", lambda file, content: known.append(pq.read_table(io.BytesIO(content))))
    score(tmp_path, scorer)
    assert [len(t) - t["score:brightness"].null_count for t in known] == [4, 8, 12]
    monkeypatch.undo()
    score(tmp_path, scorer)
    written = (tmp_path / "scores.parquet").stat().st_mtime_ns
    score(tmp_path, scorer)
    assert (tmp_path / "scores.parquet").stat().st_mtime_ns == written


def test_a_second_program_does_not_score_the_same_folder_at_the_same_time(tmp_path):
    (tmp_path / ".scores.parquet.0123").write_bytes(b"left by a program that was killed")
    folder = open_run_of_one_image(tmp_path)
    with locked(folder):
        assert not (tmp_path / ".scores.parquet.0123").exists()
        with pytest.raises(UserError, match=rf"another program writes .*process {os.getpid()} on "), locked(folder):
            pass
    with locked(folder):
        pass


@pytest.mark.parametrize("name", ["manifest.parquet", "scores.parquet"])
def test_a_changed_byte_in_any_column_of_a_table_is_found(name, scorer, tmp_path):
    draw_run(tmp_path)
    score(tmp_path, scorer)
    file = tmp_path / name
    footer, whole = pq.read_metadata(file), file.read_bytes()
    for i in range(footer.num_columns):
        column, data = footer.row_group(0).column(i), bytearray(whole)
        start = column.dictionary_page_offset or column.data_page_offset
        data[start + column.total_compressed_size - 1] ^= 1
        file.write_bytes(data)
        with pytest.raises(UserError, match=rf"^{file}: damaged"):
            Scores(open_run(tmp_path))


def open_run_of_one_image(folder):
    save(folder / "0.png", noise(0))
    (folder / "0.txt").write_text("a")
    return open_run(folder).folder


def test_a_reward_that_fails_or_refuses_a_prompt_is_one_line_and_what_is_scored_is_kept(tmp_path):
    class Failing(Brightness):
        def prepare(self, captions):
            if "x" * 4 in captions:
                raise (RuntimeError if len(captions) > 1 else ValueError)("four is too long\nfor me")
            return super().prepare(captions)

    failing = jax.tree_util.register_dataclass(Failing, ["weights"], [])(jnp.ones(3))
    draw_run(tmp_path, count=4)
    with pytest.raises(UserError, match=rf"^{tmp_path}: brightness: prompt 'xxxx': four is too long"):
        score(tmp_path, scorer_of(failing))
    failing = scorer_of(failing)
    failing.check_captions = lambda captions: None
    with pytest.raises(UserError, match=rf"^{tmp_path}: brightness: RuntimeError: four is too long; what is scored"):
        score(tmp_path, failing)
    assert score(tmp_path, scorer_of(Brightness(jnp.ones(3)))) == 4


def test_a_folder_in_the_place_of_an_image_costs_that_image_only(scorer, tmp_path):
    draw_run(tmp_path)
    file = tmp_path / pq.read_table(tmp_path / "manifest.parquet")["file"][1].as_py()
    file.unlink()
    file.mkdir()
    score(tmp_path, scorer)
    assert table(tmp_path)["problem"].to_pylist() == ["", "missing", "", "", "", ""]


def test_a_block_of_zeros_does_not_end_the_images_of_a_foreign_tar(tmp_path):
    draw_run(tmp_path, "webdataset", count=2)
    for name in ("manifest.parquet", "settings.json"):
        (tmp_path / name).unlink()
    assert len(open_run(tmp_path).rows) == 4
    tar = (tmp_path / "00000.tar").read_bytes()
    with tarfile.open(tmp_path / "00000.tar") as opened:
        place = opened.getmembers()[2].offset
    (tmp_path / "00000.tar").write_bytes(tar[:place] + bytes(512) + tar[place + 512 :])
    with pytest.raises(
        UserError, match=rf"00000\.tar: damaged.*end mark at byte {place}, but at byte {place + 512} more"
    ):
        open_run(tmp_path)


class Bucket(MemoryFileSystem):
    """Files by their names in a bucket."""

    protocol, cachable = ("gs", "gcs"), False

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")


@pytest.mark.parametrize("foreign", [False, True])
def test_images_in_a_bucket_are_scored_there(foreign, scorer, tmp_path, monkeypatch):
    draw_run(tmp_path)
    if foreign:
        (tmp_path / "manifest.parquet").unlink()
        (tmp_path / "settings.json").unlink()
    bucket = Bucket()
    bucket.store, bucket.pseudo_dirs = {}, [""]
    monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: bucket)
    for file in tmp_path.iterdir():
        bucket.pipe(f"gs://bucket/run/{file.name}", file.read_bytes())
    score(tmp_path, scorer)
    score("gs://bucket/run", scorer)
    assert bucket.cat("gs://bucket/run/scores.parquet") == (tmp_path / "scores.parquet").read_bytes()
    with locked(open_run("gs://bucket/run").folder):
        assert score("gs://bucket/run", scorer) == 0


# Images


def save(file, image, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, **options)


def odd_images():
    """Images of many modes and sizes by the names of their files."""
    rgb = Image.fromarray(noise(1, 9, 7))
    alpha = Image.fromarray(np.tile(np.arange(0, 70, 10, dtype=np.uint8), (9, 1)))
    palette = rgb.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray((np.arange(63, dtype=np.uint16) * 1000).reshape(9, 7))
    return {
        "0.png": (rgb.convert("L"), {}),
        "1.png": (Image.merge("LA", [rgb.convert("L"), alpha]), {}),
        "2.png": (palette, {"transparency": bytes(range(16))}),
        "3.png": (Image.merge("RGBA", [*rgb.split(), alpha]), {}),
        "4.jpg": (rgb.convert("CMYK"), {}),
        "5.png": (wide, {}),
        "6.gif": (palette, {"save_all": True, "append_images": [rgb.rotate(180).quantize(16)]}),
        "7.webp": (rgb, {"save_all": True, "append_images": [rgb.rotate(180)], "lossless": True}),
        "8.jpeg": (rgb, {"exif": exif}),
        "9.bmp": (rgb.convert("1"), {}),
        "10.tiff": (rgb.resize((1, 40)), {}),
        "11.PNG": (rgb.resize((300, 2)), {}),
    }


def test_images_of_all_modes_and_sizes_are_scored_as_their_authors_convert_them(scorer, tmp_path):
    for name, (image, options) in odd_images().items():
        save(tmp_path / name, image, **options)
    save(tmp_path / ".hidden/12.png", noise(0))
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "12.png").write_bytes((tmp_path / "11.PNG").read_bytes()[:90])
    score(tmp_path, scorer, prompts=prompts(13))
    found = rows(tmp_path)
    assert [row["file"] for row in found] == [*odd_images(), "12.png"]
    assert [row["problem"] for row in found] == [""] * 12 + ["unreadable"]
    for row, name in zip(found, odd_images(), strict=False):
        with Image.open(tmp_path / name) as opened:
            opened.info.pop("transparency", None)
            pixels = np.asarray(opened.convert("RGB"))
        assert (row["height"], row["width"]) == pixels.shape[:2]
        np.testing.assert_allclose(row["score:brightness"], expected(pixels, row["prompt"]), rtol=1e-5)
        image = ImageFile(*(row[field] for field in ImageFile._fields))
        np.testing.assert_array_equal(read_image(open_run(tmp_path, prompts(13)).folder, image), pixels)
    assert score(tmp_path, scorer, prompts=prompts(13)) == 0


def test_images_of_different_sizes_share_a_batch_only_where_the_network_sees_them_in_one(scorer):
    sizes = [(8, 8), (9, 4), (8, 8), (0, 0), (8, 8), (9, 4), (8, 8)]
    assert scorer.batches(sizes) == [([0, 2, 4, 6], True), ([1, 5], True)]
    assert scorer.batches(sizes[:3]) == [([0, 2, 1], False)]
    jpeg = scorer_of(JpegSize("compressibility", -1.0))
    assert jpeg.batches(sizes[:3]) == [([0, 2], True), ([1], True)]


# Foreign folders


def texts_of(folder, texts, **given):
    """Ids, seeds, prompts and files that a foreign folder turns out to have."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            save(folder / name, noise(0))
        else:
            (folder / name).write_text(text)
    run = open_run(folder, **given)
    return [(r["prompt_id"], r["seed"], r["prompt"], r["file"]) for r in run.rows.to_pylist()], run.told


@pytest.mark.parametrize(
    ("files", "found"),
    {
        "by their numbers": (["00002.png", "0.jpg", "1 a cat.webp"], [(0, 0), (1, 0), (2, 0)]),
        "by prompt and seed": (["sub/2-7.png", "sub/2-11.png", "sub/0_3.png"], [(0, 3), (2, 7), (2, 11)]),
        "in order": (["x10.png", "x9.png", "x1.png"], [(0, 0), (1, 0), (2, 0)]),
        "counted from one": (["1.png", "2.png", "3.png"], [(0, 0), (1, 0), (2, 0)]),
        "in GenEval's layout": (
            ["00002/samples/0001.png", "00002/samples/0000.png", "00000/samples/0000.png", "00001/samples/0003.png"],
            [(0, 0), (1, 3), (2, 0), (2, 1)],
        ),
        "in HPSv2's layout": (["anime/00001.jpg", "anime/00000.jpg", "photo/00000.jpg"], [(0, 0), (2, 0), (1, 0)]),
        "of one group": (["photo/00000.jpg"], [(1, 0)]),
        "numbered over all groups": (["anime/2.png", "photo/1.png"], [(2, 0), (1, 0)]),
    }.values(),
)
def test_foreign_images_find_their_prompts_in_a_file(files, found, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{i}", "tag": ("anime", "photo")[i % 2], "n": i}) + "\n" for i in range(3))
    )
    given = read_prompts(tmp_path / "prompts.jsonl")
    shown, _ = texts_of(tmp_path / "images", dict.fromkeys(files), prompts=given)
    assert [(i, seed) for i, seed, *_ in shown] == found
    assert [text for _, _, text, _ in shown] == [f"p{i}" for i, _ in found]
    record = open_run(tmp_path / "images", given).rows["record"][0].as_py()
    assert json.loads(record) == given[found[0][0]].record


@pytest.mark.parametrize(
    ("files", "found"),
    {
        "texts beside them": (
            {"b.png": None, "b.txt": "a cat\n", "a.png": None, "a.txt": "two 🐈", "c.png": None, "c.txt": "a cat"},
            [(0, 0, "two 🐈", "a.png"), (1, 0, "a cat", "b.png"), (1, 1, "a cat", "c.png")],
        ),
        "numbers in names": (
            {"00007.png": None, "00007.txt": "seven", "00003-2.jpg": None, "00003-2.txt": "three"},
            [(3, 2, "three", "00003-2.jpg"), (7, 0, "seven", "00007.png")],
        ),
        "numbers that are too large": (
            {f"{10**20}.png": None, f"{10**20}.txt": "one"},
            [(0, 0, "one", f"{10**20}.png")],
        ),
        "JSON beside them": (
            {"a.png": None, "a.json": '{"caption": "one", "prompt_id": 4, "seed": 9}'},
            [(4, 9, "one", "a.png")],
        ),
        "GenEval": (
            {
                "00001/metadata.jsonl": '{"tag": "color", "prompt": "a red cup"}\n',
                **{"00001/samples/0000.png": None, "00001/samples/0001.png": None, "00001/grid.png": None},
            },
            [(1, 0, "a red cup", "00001/samples/0000.png"), (1, 1, "a red cup", "00001/samples/0001.png")],
        ),
    }.values(),
)
def test_foreign_images_have_their_prompts_with_them(files, found, tmp_path):
    assert texts_of(tmp_path, files)[0] == found


def test_images_tell_their_own_prompts_where_nothing_else_does(tmp_path):
    for i in range(3):
        known = {"prompt": f"p{i % 2}", "prompt_id": 10 + i % 2, "seed": i, "group": "g"}
        (tmp_path / f"{'xyz'[i]}.{('png', 'webp')[i % 2]}").write_bytes(
            encode_image(noise(i), known, ("png", "webp")[i % 2])
        )
    found, told = texts_of(tmp_path, {})
    assert [row[:3] for row in found] == [(10, 0, "p0"), (11, 1, "p1"), (10, 2, "p0")]
    assert told == "prompts with the images"


def test_foreign_tar_files_are_scored_where_they_are(scorer, tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(2):
                image = io.BytesIO()
                Image.fromarray(noise((shard, i))).save(image, "PNG")
                key = f"{shard}{i:05d}"
                for suffix, content in (("png", image.getvalue()), ("txt", b"a cat"), ("json", b'{"cfg": 5}')):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    assert score(tmp_path, scorer) == 4
    found = rows(tmp_path)
    assert [(row["prompt_id"], row["seed"], row["file"]) for row in found] == [
        (0, 0, "0.tar"), (1, 0, "0.tar"), (100000, 0, "1.tar"), (100001, 0, "1.tar")
    ]  # fmt: skip
    for row, seed in zip(found, itertools.product(range(2), range(2)), strict=True):
        np.testing.assert_allclose(row["score:brightness"], expected(noise(seed), "a cat"), rtol=1e-6)
        assert json.loads(row["record"]) == {"cfg": 5}


def empty(folder):
    folder.mkdir()


def unfinished(folder):
    images = ImageSet(folder, [Item(prompts(1)[0], 0)], {})
    images.begin()


def damaged(folder):
    draw_run(folder)
    (folder / "manifest.parquet").write_bytes(b"PAR1 and so on")


def with_cells(**cells):
    """A finished run, of whose manifest the second row has other cells."""

    def make(folder):
        draw_run(folder)
        manifest = pq.read_table(folder / "manifest.parquet")
        rows = manifest.to_pylist()
        rows[1] |= cells
        pq.write_table(pa.Table.from_pylist(rows, manifest.schema), folder / "manifest.parquet")

    return make


def with_a_changed_page(folder):
    draw_run(folder)
    file = folder / "manifest.parquet"
    content = bytearray(file.read_bytes())
    content[content.index(b"-5.png") + 1] ^= 1
    file.write_bytes(content)


def foreign(*names, **texts):
    def make(folder):
        for name in names:
            save(folder / name, noise(0))
        for name, text in texts.items():
            (folder / name.replace("_", ".")).write_text(text)

    return make


def strange_scores(folder):
    draw_run(folder)
    pq.write_table(pa.table({"a": [1]}), folder / "scores.parquet")


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (lambda folder: None, None, "no such folder"),
        (empty, None, "no images in it; expected .png"),
        (unfinished, None, "is not finished, it has no manifest.parquet; finish it first with the command"),
        (damaged, None, "manifest.parquet: damaged .*restore it"),
        (foreign("a.png", "b.png", a_txt="A"), None, "no prompt for 1 of 2 images, e.g. b.png; expected .*--prompts"),
        (foreign("a.png", "b.png"), prompts(3), "which of 3 prompts each of 2 images shows, e.g. a.png; expected"),
        (foreign("1.png", "5.png"), prompts(3), "which of 3 prompts each of 2 images"),
        (foreign("a/1.png", "b/1.png"), prompts(3), "which of 3 prompts each of 2 images"),
        (foreign("anime/0.png", "anime/1.png"), prompts(2), "which of 2 prompts each of 2 images"),
        (foreign("a.png", a_json="{"), None, "a.json beside a.png: not UTF-8 or not JSON"),
        (with_cells(prompt=None), None, r"manifest.parquet: damaged \(row 1 has no prompt\): restore it"),
        (with_cells(seed=None), None, "row 1 has no seed"),
        (with_cells(file=None), None, "row 1 has no file"),
        (with_cells(size=None), None, "row 1 has no size"),
        (with_cells(offset=-1), None, "row 1 has offset=-1; expected 0 or more"),
        (with_cells(size=-1), None, "row 1 has size=-1; expected 0 or more"),
        (with_cells(size=2**62), None, "row 1 has size=4611686018427387904; expected 0 or more, and less than"),
        (with_cells(file="/etc/passwd"), None, "row 1 has file='/etc/passwd'; expected a name in this folder"),
        (with_cells(file="../other/0.png"), None, "row 1 has file='../other/0.png'; expected a name in this"),
        (with_cells(file="a/../../0.png"), None, "row 1 has file='a/../../0.png'; expected a name in this"),
        (with_cells(file=""), None, "row 1 has file=''; expected a name in this folder"),
        (with_a_changed_page, None, "manifest.parquet: damaged .*restore it"),
        (foreign("a.png", a_json="[" * 100_000), None, "a.json beside a.png: not UTF-8 or not JSON"),
        (strange_scores, None, "scores.parquet: damaged, or not written by sample.score .*remove it"),
    ],
)
def test_a_folder_that_cannot_be_scored_is_told_in_one_line(make, given, message, tmp_path):
    make(tmp_path / "run")
    with pytest.raises(UserError) as told:
        Scores(open_run(tmp_path / "run", given))
    assert str(told.value).startswith(str(tmp_path / "run"))
    assert re.search(message, str(told.value)) and "\n" not in str(told.value)


# Kills


def serve():
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()  # JAX has not begun to compute in this process
        if not child:
            score_and_die(Path(order["folder"]), order["kill"])
            os._exit(0)
        print(os.waitpid(child, 0)[1], flush=True)


def score_and_die(folder, kill):
    """Is killed before the given change of the file system."""
    steps = itertools.count()

    def watch(event, arguments):
        writes = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        changes = (writes or event == "os.rename") and str(folder) in str(arguments[0])
        if changes and ".lock" not in str(arguments[0]) and next(steps) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    scoring.SAVE_EVERY, scoring.SAVE_SHARE = 0, np.inf
    with locked(open_run(folder).folder):
        score(folder, scorer_of(Brightness(jnp.array([3.0, 2.0, 1.0]))))
        weights = jnp.array([3.0, 2.0, 1.0])
        for column, reward in (
            ("features:colour", Brightness(weights)),
            ("distance:apart", Apart(weights)),
            ("score:compressibility", JpegSize("compressibility", -1.0)),
        ):
            score(folder, scorer_of(reward, column=column), column, {"name": column})


def unfinished_columns(folder):
    """Columns of which some are known, and not all."""
    if not (folder / "scores.parquet").exists():
        return set()
    stored = table(folder)
    columns = {name: stored[name].combine_chunks() for name in stored.column_names if ":" in name}
    columns = {name: column.flatten() if "distance:" in name else column for name, column in columns.items()}
    return {name for name, column in columns.items() if 0 < column.null_count < len(column)}


def test_killed_again_and_again_a_run_has_the_scores_of_an_undisturbed_one_bit_by_bit(tmp_path):
    for name in ("whole", "killed"):
        draw_run(tmp_path / name, "webdataset", count=6)
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as program:

        def run(folder, kill):
            program.stdin.write(json.dumps({"folder": str(folder), "kill": kill}) + "\n")
            return int(program.stdout.readline())

        assert run(tmp_path / "whole", -1) == 0
        unfinished = set()
        for kill in [0, 1, *[2, 3] * 4, 2]:
            assert run(tmp_path / "killed", kill) == signal.SIGKILL
            unfinished |= unfinished_columns(tmp_path / "killed")
        assert unfinished == {"score:brightness", "features:colour", "distance:apart", "score:compressibility"}
        assert run(tmp_path / "killed", -1) == 0
        program.stdin.close()
    assert (tmp_path / "killed/scores.parquet").read_bytes() == (tmp_path / "whole/scores.parquet").read_bytes()
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


if __name__ == "__main__":
    serve()


# ----------------------------------------------------------------------------------------------------------------------
# Services


MOVED, DRIP = b"moved", b"drip"


class Blue(LocalService):
    """A service that scores images by their mean blue, slowly, and fails where it is told to."""

    def __init__(self, seconds=0.0, fails=lambda prompts: None):
        self.now, self.most, self.prompts, self.lock = 0, 0, [], threading.Lock()
        self.seconds, self.fails = seconds, fails
        super().__init__(self.answer)

    def answer(self, handler, body):
        body = json.loads(body)
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.prompts += body["prompts"]
        time.sleep(self.seconds)
        with self.lock:
            self.now -= 1
        files = [Image.open(io.BytesIO(base64.b64decode(image))) for image in body["images"]]
        scores = [float(np.asarray(file)[..., 2].mean()) for file in files]
        content = self.fails(body["prompts"]) or json.dumps({"scores": scores}).encode()
        status, content = (302, content[len(MOVED) :]) if content.startswith(MOVED) else (200, content)
        handler.send_response(status)
        if status == 302:
            handler.send_header("Location", "http://127.0.0.1:1/elsewhere")
        handler.end_headers()
        pieces = [content] if content != DRIP else itertools.repeat(b" ", 100)
        with contextlib.suppress(OSError):  # whoever asked has gone
            for piece in pieces:
                handler.wfile.write(piece)
                time.sleep(0.5 * (content == DRIP))


@pytest.fixture
def blue():
    made = []

    def make(*arguments):
        made.append(Blue(*arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


def service_scorer(url, **settings):
    return scorer_of(Remote("blue", Service(url, **{"request_images": 2, **settings})))


def test_a_service_is_asked_for_several_batches_at_a_time_and_scores_keep_their_order(blue, tmp_path):
    _, pixels = draw_run(tmp_path, count=11)
    there = blue(0.1)
    assert score(tmp_path, service_scorer(there.url), "score:blue") == 22
    np.testing.assert_allclose([row["score:blue"] for row in rows(tmp_path)], pixels[..., 2].mean((1, 2)), rtol=1e-6)
    assert 4 <= there.most <= 8  # connections; a batch has 2 requests


def test_a_service_is_not_asked_for_images_that_have_no_file(blue, tmp_path):
    items, pixels = draw_run(tmp_path, count=3)
    files = sorted(tmp_path.glob("**/*.png"))
    files[2].unlink()
    there = blue()
    score(tmp_path, service_scorer(there.url), "score:blue")
    found = [row["score:blue"] for row in rows(tmp_path)]
    assert found.count(None) == 1 and len(there.prompts) == len(items) - 1
    wanted = pixels[..., 2].mean((1, 2))
    np.testing.assert_allclose([x for x in found if x is not None], wanted[[x is not None for x in found]], rtol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"scores": [1]}', "answered with 1 scores for 2 images"),
        (b" " * 2**20 + b"{}", "answered with more than 1,048,576 bytes"),
        (b"<html>", "expected {.*scores"),
        (b"[" * 100_000, "expected {.*scores"),
        (MOVED, "answered 302 Found, a redirect to http://127.0.0.1:1/elsewhere, which is not followed"),
        (DRIP, r"timed out, no whole answer in 3 s, asked 1 times"),  # a byte every half second
    ],
)
def test_a_hostile_answer_costs_one_line_and_no_image(blue, tmp_path, content, message):
    """What is scored is kept, also of batches after the one that failed, and the same command scores the rest."""
    _, pixels = draw_run(tmp_path, count=11)
    bad = threading.Event()
    bad.set()
    there = blue(0.02, lambda prompts: content if bad.is_set() and "x" * 6 in prompts else None)
    seconds = 3 if content is DRIP else 60  # a busy machine is no hostile answer
    with pytest.raises(UserError, match=message) as told:
        score(tmp_path, service_scorer(there.url, connections=8, timeout=seconds, retries=0), "score:blue")
    assert "\n" not in str(told.value) and str(there.url) in str(told.value)
    known = [row["score:blue"] is not None for row in rows(tmp_path)]
    assert 0 < known.count(False) <= 8 and known.count(True) > 8
    asked, there.prompts = len(there.prompts), []
    bad.clear()
    assert score(tmp_path, service_scorer(there.url), "score:blue") == known.count(False)
    np.testing.assert_allclose([row["score:blue"] for row in rows(tmp_path)], pixels[..., 2].mean((1, 2)), rtol=1e-6)
    assert len(there.prompts) == known.count(False) and asked <= 22


def test_scores_that_are_no_numbers_are_kept_as_they_are(blue, tmp_path):
    draw_run(tmp_path, count=3)
    there = blue(0, lambda prompts: b'{"scores": [NaN, null]}' if "xx" in prompts else None)
    score(tmp_path, service_scorer(there.url), "score:blue")
    found = [row["score:blue"] for row in rows(tmp_path)]
    assert np.isnan(np.array(found, float)).sum() == 2 and None not in found
