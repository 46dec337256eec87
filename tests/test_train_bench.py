"""The benches of training on sets of a few pairs: their figures mean what they say."""

import importlib.util
import json

import numpy as np
import pytest

from bench.__main__ import main
from bench.all import SMALL
from bench.data import TorchPairs
from bench.writing import random_photos
from flax_pref.data.images import decode_image, encode_jpeg, fit_image
from flax_pref.data.prepared import PreparedSet

FEW = ("--pairs", 12, "--captions", 3, "--batch-size", 4, "--batches", 2, "--threads", 1, "--rounds", 1)


def figures(tmp_path, capsys, *arguments):
    """Those of the file, which are those that are printed."""
    file = tmp_path / "new" / "figures.json"
    main(["data", *map(str, arguments), "--folder", str(tmp_path), "--json", str(file)])
    stored = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out) == stored
    assert [path.name for path in tmp_path.iterdir()] == ["new"]  # the sets are gone
    return stored


def test_reading_is_measured_whole_and_in_parts_that_make_it_up(tmp_path, capsys):
    told = figures(tmp_path, capsys, "--parts", "reading", *FEW, "--workers", 0)["reading"]
    assert told["pairs_per_second"].keys() == {"0 workers"} and told["pairs_per_second"]["0 workers"] > 0
    parts = told["microseconds_per_pair"]
    assert min(parts.values()) > 0
    assert parts.pop("sum") == pytest.approx(sum(parts.values()), rel=0.01)
    # Two images of 64 x 64 x 8 numbers of two bytes, which are random but for signs and exponents.
    assert 64 * 1024 < told["bytes_per_pair"] < 128 * 1024


def test_decoding_is_measured_beside_torch(tmp_path, capsys):
    pytest.importorskip("torch")
    flags = ("--photos", 2, "--photo-size", 64, "--size", 48, "--workers", 0)
    both = figures(tmp_path, capsys, "--parts", "reading", "decoding", *FEW, *flags)
    told = both["decoding"]
    rates = told["ours_pairs_per_second_and_core"], told["torch_pairs_per_second_and_core"]
    assert told["ratio_to_torch"] == pytest.approx(rates[0] / rates[1], rel=0.05)
    assert SMALL["data"].measures[1].read(both) == {
        whose: pytest.approx([1e3 / rate], rel=0.01) for whose, rate in zip(("ours", "torch"), rates, strict=True)
    }
    assert SMALL["data"].measures[0].read(both)["ours"][0] > 0


def test_torch_is_given_the_work_that_is_done_here():
    photo = random_photos(1, 96)[0][:80] / np.float32(255)
    data = encode_jpeg(photo)
    theirs = TorchPairs([(data, data)], 64)[0]
    ours = fit_image(decode_image(data), (64, 64), crop="center", resample="bicubic").pixels
    assert theirs.shape == (2, 64, 64, 3) and theirs.dtype == np.uint8
    assert np.abs(theirs[0].astype(float) - ours).mean() < 1


def test_without_torch_ours_is_measured_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    flags = ("--photos", 2, "--photo-size", 64, "--size", 48)
    told = figures(tmp_path, capsys, "--parts", "decoding", *FEW, *flags)["decoding"]
    assert "ratio_to_torch" not in told and told["ours_pairs_per_second_and_core"] > 0


def test_memory_that_grows_with_every_record_is_seen(tmp_path, capsys, monkeypatch):
    flags = ("--parts", "memory", *FEW, "--records", 4000, "--distinct-records", 400, "--sample-every", 500)
    calm = figures(tmp_path, capsys, *flags)["memory"]
    assert calm["looks"] == 8 and len(calm["resident_mb"]) == 8

    kept, pair = [], PreparedSet.pair
    monkeypatch.setattr(PreparedSet, "pair", lambda self, i: kept.append(np.ones(12_500)) or pair(self, i))
    leaking = figures(tmp_path, capsys, *flags)["memory"]
    # So much that what the process gives back of earlier tests meanwhile, tens of MB, does not count. That may also let
    # the calm process shrink.
    assert leaking["bytes_per_record"] == pytest.approx(100_000, rel=0.2)
    assert leaking["growth_mb"] == pytest.approx(0.1 * 3500, rel=0.2)
    assert calm["bytes_per_record"] < 2000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pairs", "0"), "pairs is 0; expected at least 1"),
        (("--rounds", "0"), "rounds is 0; expected at least 1"),
        (("--records", "100"), "100 records and a look at every 20000; expected at least three looks"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(flags, message):
    with pytest.raises(ValueError, match=message):
        main(["data", *flags])
