"""Aspect-ratio buckets: their sizes, the size of a pair, and sets that are encoded in several."""

import dataclasses
import itertools
import json
import math
from importlib import resources

import numpy as np
import pytest
from PIL import Image
from test_preparation import contents, opened, photo

from flax_pref.checkpoints.checkpoint import Checkpoint
from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.config import UserError, parse_flags
from flax_pref.data import encode_set as encode_set_module
from flax_pref.data.buckets import bucket_sizes, nearest_size, turns
from flax_pref.data.consensus import AgreedPairs
from flax_pref.data.encode import EncodedSet, Encoding, PairEncoder
from flax_pref.data.encode_set import encode_set
from flax_pref.data.images import decode_image, encode_jpeg
from flax_pref.data.pick_a_pic import LabelledPair, write_pairs
from flax_pref.data.pipeline import InputConfig, host_batches
from flax_pref.data.preparation import EncodeConfig, Preparation
from flax_pref.data.prepared import CAPTIONS, PAIRS, PreparedSet
from flax_pref.data.sources import Source
from flax_pref.diffusion.latents import encode_images, latent_modes

BASE = str(resources.files("flax_pref.world") / "base")
HALF = 2.0**-8  # relative error of bfloat16
ENCODING = Encoding(size=(64, 64), bucket_step=16, batch_size=3)
SIZES = ((48, 80), (64, 64), (80, 48))
IMAGES = ((100, 100), (60, 120), (150, 80), (64, 64), (200, 90))  # heights and widths of images of both kinds of row


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


def test_the_sizes_of_sdxl():
    assert bucket_sizes((1024, 1024), 64) == (
        *((768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)),
        *((1088, 960), (1152, 896), (1216, 832), (1344, 768)),
    )


@pytest.mark.parametrize(
    ("size", "step", "aspect"),
    [((1024, 1024), 64, 2.0), ((512, 512), 64, 2.0), ((512, 768), 32, 3.0), ((64, 64), 8, 1.5), ((96, 64), 32, 2.0)],
)
def test_the_rule_is_a_loop_over_all_sizes(size, step, aspect):
    area, sides = math.prod(size), range(step, 3 * max(size), step)
    fit = {(h, w) for h in sides for w in sides if h * w <= area}
    longest = {(h, w) for h, w in fit if ((h, w + step) not in fit if w >= h else (h + step, w) not in fit)}
    longest |= {(w, h) for h, w in longest}
    expected = {(h, w) for h, w in longest if max(h, w) <= aspect * min(h, w)}
    assert bucket_sizes(size, step, aspect) == tuple(sorted(expected | {size}))


def test_a_pair_gets_the_size_nearest_to_its_aspect_ratio():
    sizes, rng = bucket_sizes((1024, 1024), 64), np.random.default_rng(0)
    for images in rng.integers(32, 2000, (300, 2, 2)).tolist():
        # The mean of logarithms of the ratios of two images is that of one image with the geometric mean.
        ratio = math.sqrt(images[0][1] / images[0][0] * images[1][1] / images[1][0])
        nearest, least = None, math.inf
        for height, width in sizes:
            away = max(width / height / ratio, ratio * height / width)
            if away < least:
                nearest, least = (height, width), away
        assert nearest_size(sizes, map(tuple, images)) == nearest
    assert nearest_size(sizes, [(500, 500), (700, 700)]) == (1024, 1024)
    assert nearest_size(sizes, [(1000, 500), (500, 1000)]) == (1024, 1024), "they disagree by as much"
    assert nearest_size(sizes, [(300, 3000), (300, 3000)]) == (768, 1344), "a longer one is cropped"


@pytest.mark.parametrize("counts", [(5,), (3, 3), (1, 6), (700, 21, 140, 7), (13, 11, 2)])
def test_a_round_has_turns_of_each_bucket_in_proportion_and_evenly_spaced(counts):
    buckets, before = turns(counts)
    common = math.gcd(*counts)
    assert len(buckets) == sum(counts) // common
    for bucket, count in enumerate(counts):
        places = np.flatnonzero(buckets == bucket)
        assert before[places].tolist() == list(range(count // common))
        due = (np.arange(count // common) + 0.5) * len(buckets) * common / count
        assert np.abs(places - due).max() <= (1 + len(counts)) / 2


# ----------------------------------------------------------------------------------------------------------------------
# Encoded sets


def write_set(file, count=20, damaged=()):
    """Rows of five kinds; the loser of the second is square, so that the pair lies between two sizes."""

    def pair(i):
        winner = IMAGES[i % len(IMAGES)]
        loser = (90, 90) if i % len(IMAGES) == 1 else winner
        images = [encode_jpeg(photo(2 * i + side, *size)) for side, size in enumerate((winner, loser))]
        if i in damaged:
            images[1] = images[1][:300]
        return LabelledPair(f"a red circle number {i % 10}", *images, 1.0, f"{i}-0", f"{i}-1", "base", "base")

    write_pairs(file, map(pair, range(count)), rows_per_group=7)
    return file


def size_of_row(row):
    """By hand: the second kind has ratios 2 and 1, in the middle sqrt(2) = 1.41, nearer to 80/48 = 1.67 than to 1."""
    return (SIZES[1], SIZES[0], SIZES[2], SIZES[1], SIZES[2])[row % len(IMAGES)]


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(BASE, with_unet=False)


@pytest.fixture(scope="module")
def encoder(pipeline):
    return PairEncoder(pipeline, ENCODING)


SETTINGS = {"size": [64, 64], "buckets": SIZES}


def preparation(folder, file, **how):
    options = {"shard_size": 8, "max_drop_share": 0.2} | how
    return Preparation(folder, *opened(file), SETTINGS, **options)


def prepare(folder, file, encoder, **how):
    begun = preparation(folder, file, **how)
    begun.begin()
    begun.encode(encoder)
    return begun.finish(encoder.shapes)


def config_of(folder, file, **encoding):
    return EncodeConfig(
        output=folder,
        model=BASE,
        source=Source(layout="pick_a_pic", path=str(file)),
        encoding=dataclasses.replace(ENCODING, **encoding),
        shard_size=8,
        max_drop_share=0.2,
    )


def test_each_pair_is_encoded_in_its_bucket_and_the_set_knows_which(tmp_path, pipeline, encoder):
    assert encoder.sizes == SIZES
    metadata = prepare(tmp_path / "set", write_set(tmp_path / "a.parquet", damaged=(6,)), encoder)
    records = PreparedSet(tmp_path / "set")
    assert len(records) == 19 and records.image_size == (64, 64) and records.shapes.moments == (1, 8, 8, 16)
    # In each shard of eight rows the number of each pair's size.
    assert metadata["buckets"] == {"sizes": [[48, 80], [64, 64], [80, 48]], "shards": ["1021212", "12102121", "0212"]}
    assert [int(records.pair(i)["row"]) for i in range(19)] == [row for row in range(20) if row != 6]
    rows = {size: [int(records.pair(i)["row"]) for i in found] for size, found in records.buckets().items()}
    assert list(rows) == list(SIZES)
    kept = [row for row in range(20) if row != 6]
    assert rows == {size: [row for row in kept if size_of_row(row) == size] for size in SIZES}
    for (height, width), found in records.buckets().items():
        for i in map(int, found):
            pair = records.pair(i)
            image = decode_image(encode_jpeg(photo(2 * int(pair["row"]), *IMAGES[int(pair["row"]) % 5])))
            # Resized to cover the size, the centre cut out.
            scale = max(height / image.height, width / image.width)
            full = max(height, round(image.height * scale)), max(width, round(image.width * scale))
            top, left = (full[0] - height) // 2, (full[1] - width) // 2
            assert pair["sizes"][0, 0].tolist() == [image.height, image.width, top, left]
            resized = np.asarray(image.resize(full[::-1], Image.Resampling.BILINEAR), np.float32) / 255
            pixels = resized[top : top + height, left : left + width]
            expected = encode_images(pipeline.vae, pixels[None])
            assert pair["winner"].shape == (1, height // 8, width // 8, 16)
            mode = latent_modes({"winner": pair["winner"], "loser": pair["loser"]}, pipeline.vae.config.scaling_factor)
            np.testing.assert_allclose(mode["winner"], expected, atol=0.03 * np.abs(expected).max())


def test_time_ids_are_those_of_the_bucket(tmp_path, encoder):
    prepare(tmp_path / "set", write_set(tmp_path / "a.parquet", count=10), encoder)
    batches = host_batches(PreparedSet(tmp_path / "set"), InputConfig(batch_size=1), seed=0, rows=np.arange(1))
    found = {}
    for step in range(10):
        batch = batches[step]
        found[int(batch["row"][0])] = batch["time_ids"][0].tolist()
    # 60 x 120 becomes 48 x 96, of which columns 8 to 87 are cut out; 90 x 90 becomes 80 x 80, of which rows 16 to 63.
    assert found[1] == [[60, 120, 0, 8, 48, 80], [90, 90, 16, 0, 48, 80]]
    # 150 x 80 becomes 90 x 48; 64 x 64 stays.
    assert found[2] == [[150, 80, 5, 0, 80, 48]] * 2
    assert found[3] == [[64, 64, 0, 0, 64, 64]] * 2


def test_a_set_in_memory_has_the_pairs_and_the_order_of_the_prepared_one(tmp_path, encoder):
    file = write_set(tmp_path / "a.parquet", damaged=(6,))
    prepare(tmp_path / "set", file, encoder)
    prepared, memory = PreparedSet(tmp_path / "set"), EncodedSet(encoder, *opened(file), max_drop_share=0.2)
    assert memory.shapes == prepared.shapes and list(memory.buckets()) == list(prepared.buckets())
    for size, found in memory.buckets().items():
        assert list(found) == list(prepared.buckets()[size])
        for i in map(int, found):
            one, other = memory.pair(i), prepared.pair(i)
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])
    config = InputConfig(batch_size=3)
    one, other = (host_batches(records, config, seed=1, rows=np.arange(3)) for records in (prepared, memory))
    assert [one[step]["row"].tolist() for step in range(20)] == [other[step]["row"].tolist() for step in range(20)]
    # Another fingerprint than that of a set in other sizes, whose order is another one.
    square = PairEncoder(load_pipeline(BASE, with_unet=False), dataclasses.replace(ENCODING, bucket_step=None))
    assert memory.fingerprint != EncodedSet(square, *opened(file), max_drop_share=0.2).fingerprint


def test_devices_and_processes_do_not_change_a_byte_and_a_kill_costs_one_shard(tmp_path, pipeline, encoder):
    file = write_set(tmp_path / "a.parquet", damaged=(6,))
    prepare(tmp_path / "one", file, encoder)
    # One pair at a time, as another mesh would take other batches; rounding of latents apart, all is the same.
    prepare(tmp_path / "single", file, PairEncoder(pipeline, dataclasses.replace(ENCODING, batch_size=1)))
    one, single = PreparedSet(tmp_path / "one"), PreparedSet(tmp_path / "single")
    assert [one.pair(i)["row"] for i in range(19)] == [single.pair(i)["row"] for i in range(19)]
    # Two processes, the second of which was killed before it had noted a shard.
    begun = [preparation(tmp_path / "two", file, process_index=i, process_count=2) for i in range(2)]
    for process in begun:
        process.begin()
        process.encode(encoder)
    (tmp_path / "two" / ".parts" / "pairs-00001.json").unlink()
    again = [preparation(tmp_path / "two", file, process_index=i, process_count=2) for i in range(2)]
    for process in again:
        process.begin()
    assert [process.pending() for process in again].count([(PAIRS, 1)]) == 1
    for process in again:
        process.encode(encoder)
    again[0].finish(encoder.shapes)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_consensus_of_rewards_keeps_the_size_of_each_pair(tmp_path, encoder):
    prepare(tmp_path / "set", write_set(tmp_path / "a.parquet"), encoder)
    records, indices = PreparedSet(tmp_path / "set"), np.array([0, 1, 1, 3, 5, 10, 10, 13])
    agreed = AgreedPairs(records, indices, "")
    assert {size: list(found) for size, found in agreed.buckets().items()} == {
        SIZES[0]: [1, 2],
        SIZES[1]: [0, 3, 4, 5, 6, 7],
    }
    batches = host_batches(agreed, InputConfig(batch_size=2), seed=0, rows=np.arange(2))
    rows = [batches[step]["row"].tolist() for step in range(4)]  # as a pair each, of sizes 1, 1, 0, 1 in some order
    assert sorted(itertools.chain(*rows)) == indices.tolist()


def test_the_program_writes_buckets_by_rule_or_as_listed_and_continues_a_set(tmp_path, capsys):
    file = write_set(tmp_path / "a.parquet")
    encode_set(config_of(tmp_path / "rule", file))
    told = capsys.readouterr().out
    for line in ("4 pairs of 48 x 80 pixels (height x width)", "8 pairs of 64 x 64", "8 pairs of 80 x 48"):
        assert line in told
    # The same sizes, however they are asked for, are the same set.
    encode_set(config_of(tmp_path / "rule", file, bucket_step=None, buckets=(SIZES[2], SIZES[0])))
    assert "is complete; nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"was begun with .*buckets"):
        encode_set(config_of(tmp_path / "rule", file, bucket_step=None))


def test_a_set_without_buckets_has_the_settings_and_features_of_sets_that_were_encoded_before(tmp_path):
    encode_set(config_of(tmp_path / "set", write_set(tmp_path / "a.parquet"), bucket_step=None))
    settings = json.loads((tmp_path / "set" / "settings.json").read_text())
    assert list(settings) == [
        *("source", "choice", "model", "model_sha256", "size", "crop", "resample", "mirrored", "smallest_side"),
        *("dropped_caption", "dtype", "shard_size", "source_sha256"),
    ]
    metadata = json.loads((tmp_path / "set" / PAIRS / "metadata.json").read_text())
    assert list(metadata) == ["settings", "counts", "dropped", "dropped_rows", "images_sha256", "sha256"]
    features = json.loads((tmp_path / "set" / PAIRS / "features.json").read_text())
    shape = features["featuresDict"]["features"]["winner"]["tensor"]["shape"]
    assert shape == {"dimensions": ["1", "8", "8", "16"]}
    assert PreparedSet(tmp_path / "set").buckets() == {(64, 64): range(20)}
    part = json.loads((tmp_path / "set" / ".parts" / "pairs-00000.json").read_text())
    assert "buckets" not in part


@pytest.mark.parametrize(
    "buckets",
    [
        {},
        [],
        {"sizes": [[64, 64]], "shards": ["0" * 8, "0" * 8]},
        {"sizes": [[64, 64]], "shards": ["0" * 8, "0" * 8, "0" * 3]},
        {"sizes": [[48, 80]], "shards": ["0" * 8, "0" * 8, "0" * 4]},
        {"sizes": [[64, 64]], "shards": ["0" * 8, "0" * 8, "0001"]},
        {"sizes": [[64, 64]], "shards": ["0" * 8, "0" * 8, "000é"]},
        {"sizes": [[64, 64], [64, 64]], "shards": ["0" * 8, "0" * 8, "0001"]},
        {"sizes": [[64]], "shards": ["0" * 8, "0" * 8, "0" * 4]},
        {"sizes": [[64, 64 + i] for i in range(63)], "shards": ["0" * 8, "0" * 8, "0" * 4]},
        {"sizes": [[64, 64]], "shards": [8, 8, 4]},
        5,
        "none",
    ],
)
def test_buckets_that_are_not_those_of_the_records_are_one_line(tmp_path, whole, buckets):
    for name in (PAIRS, CAPTIONS):
        (tmp_path / name).mkdir()
        for file in (whole / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        metadata = json.loads((tmp_path / name / "metadata.json").read_text())
        (tmp_path / name / "metadata.json").write_text(json.dumps(metadata | {"buckets": buckets}))
    with pytest.raises(ValueError, match=r"metadata\.json: its buckets are not those of the pairs beside it"):
        PreparedSet(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, encoder):
    folder = tmp_path_factory.mktemp("whole")
    prepare(folder / "set", write_set(folder / "a.parquet"), encoder)
    return folder / "set"


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ({"bucket_step": 0}, "bucket_step=0, .*expected a number of pixels that divides both sides"),
        ({"bucket_step": 48}, r"divides both sides of size=\(64, 64\)"),
        ({"bucket_step": 64}, r"gives no size but size=\(64, 64\); choose a smaller step"),
        ({"bucket_step": 16, "bucket_aspect": 0.5}, "an aspect of at least 1"),
        ({"bucket_step": 16, "buckets": ((48, 80),)}, "buckets and bucket_step are both set"),
        ({"buckets": ((0, 80),)}, "expected positive heights and widths"),
        ({"bucket_step": 1, "bucket_aspect": 9}, "sizes; expected at most 62: choose a larger bucket_step"),
    ],
)
def test_buckets_that_cannot_be_are_one_line(encoding, message):
    with pytest.raises(ValueError, match=message):
        Encoding(size=(64, 64), **encoding)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ({"bucket_step": 4}, r"encoding: bucket=\(\d+, \d+\): height and width must be multiples of 8"),
        ({"bucket_step": None, "buckets": ((60, 68),)}, r"encoding: bucket=\(60, 68\): .* multiples of 8"),
    ],
)
def test_sizes_that_the_autoencoder_cannot_take_are_refused_before_the_set_is_read(
    tmp_path, monkeypatch, encoding, message
):
    config = config_of(tmp_path / "set", write_set(tmp_path / "a.parquet", count=2), **encoding)
    monkeypatch.setattr(encode_set_module, "select", None)
    monkeypatch.setattr(Checkpoint, "load", None)
    with pytest.raises(ValueError, match=message):
        encode_set(config)


def test_a_list_of_sizes_is_a_flag():
    @dataclasses.dataclass(frozen=True)
    class Flags:
        encoding: Encoding = dataclasses.field(default_factory=Encoding)

    flags = ["--encoding.size", "1024", "1024", "--encoding.buckets", "832", "1216", "1216", "832"]
    assert parse_flags(flags, Flags).encoding.sizes == ((832, 1216), (1024, 1024), (1216, 832))
