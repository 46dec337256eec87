"""`--features` of sample.score and `--reference` of sample.report, on small networks in the files that users have."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from flax_pref.config import UserError
from flax_pref.data.prompts import Prompt
from flax_pref.evaluation.distances import frechet_distance, moments, vendi_score
from flax_pref.images.image_set import ImageSet, Item
from sample import report, score
from tests.parity.dinov2_reference import authors_weights
from tests.parity.inception_reference import random_weights


def draw_run(folder, seed, count=3, seeds=3):
    """A finished run of noise that is coarser or finer."""
    items = [Item(Prompt(i, f"prompt {i}", "", {}), s) for i in range(count) for s in range(seeds)]
    rng = np.random.default_rng(seed)
    pixels = np.stack([np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((5, 5, 1))).astype(np.uint8) for _ in items])
    images = ImageSet(folder, items, {"rule": "cfg"})
    images.begin()
    images.write(range(len(items)), pixels)
    images.finish()


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Two runs, and photographs without prompts, with the features of two networks; and the flags that gave them."""
    folder = tmp_path_factory.mktemp("features")
    torch.save(random_weights(unit=1), folder / "inception.pth")
    torch.save(authors_weights(layers=1), folder / "dinov2.pth")
    draw_run(folder / "base", 0)
    draw_run(folder / "cpgd", 1)
    (folder / "photos").mkdir()
    for i in range(5):
        noise = np.random.default_rng(10 + i).integers(0, 256, (30, 40 + i, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"photos/{i}.png")
    features = ["--features", f"inception={folder / 'inception.pth'}", f"dinov2={folder / 'dinov2.pth'}"]
    runs = [str(folder / name) for name in ("base", "cpgd")]
    score.main([*runs, "--rewards", "compressibility", *features])
    score.main([str(folder / "photos"), *features])
    return folder, runs, features


def vectors(folder, name):
    return np.array(pq.read_table(folder / "scores.parquet")[f"features:{name}"].to_pylist())


def test_a_report_has_diversity_and_distances_to_a_folder_of_photographs(scored, tmp_path, capsys):
    folder, runs, _ = scored
    report.main([*runs, "--out", str(tmp_path), "--reference", str(folder / "photos")])
    content, told = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out
    rows = {(row["method"], row["features"], row["measure"]): row for row in content["sets"]}
    mine, photos = vectors(folder / "cpgd", "inception"), vectors(folder / "photos", "inception")
    assert mine.shape == (9, 128) and photos.shape == (5, 128)
    fid = rows["cpgd", "inception", "FID"]
    assert fid["value"]["value"] == pytest.approx(frechet_distance(moments(mine), moments(photos)), rel=1e-9)
    assert (fid["images"], fid["reference_images"]) == (9, 5)
    assert "here 9 against 5 of the reference" in told and "5 images are too few for the covariance of 128" in told
    assert re.search(r"^cpgd +inception +FID +\d", told, re.MULTILINE)
    assert content["reference"] == str(folder / "photos")
    page = (tmp_path / "report.html").read_text()
    assert "FID is biased upwards where images are few" in page and 'id="sets-table"' in page
    seeds = {(row["method"], row["features"], row["measure"]): row for row in content["diversity"]}
    scores = [vendi_score(part) for part in np.split(vectors(folder / "cpgd", "dinov2"), 3)]
    assert seeds["cpgd", "dinov2", "Vendi score"]["value"]["value"] == pytest.approx(np.mean(scores), rel=1e-6)
    assert "cpgd,inception,FID,all images," in (tmp_path / "features.csv").read_text()


def test_statistics_that_others_have_written_are_a_reference_of_fid(scored, tmp_path, capsys):
    folder, runs, _ = scored
    photos = vectors(folder / "photos", "inception")
    np.savez(tmp_path / "photos.npz", mu=photos.mean(0), sigma=np.cov(photos, rowvar=False))
    report.main([*runs, "--out", str(tmp_path), "--reference", str(tmp_path / "photos.npz")])
    rows = json.loads((tmp_path / "report.json").read_text())["sets"]
    fid = next(row for row in rows if (row["method"], row["measure"]) == ("base", "FID"))
    mine = vectors(folder / "base", "inception")
    assert fid["value"]["value"] == pytest.approx(frechet_distance(moments(mine), moments(photos)), rel=1e-9)
    assert fid["reference_images"] is None and "against an unknown number" in capsys.readouterr().out


def statistics(length=128, **changes):
    return lambda file: np.savez(file, **{"mu": np.zeros(length), "sigma": np.eye(length)} | changes)


def write(content):
    return lambda file: file.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "place", "message"),
    [
        (None, "/no/such", "/no/such: no such folder"),
        (None, "/no/such.npz", r"--reference /no/such.npz: no such file; expected the arrays mu \[D\]"),
        (write(b"PK"), "HERE/a.npz", "cannot be read .*; expected the arrays mu"),
        (statistics(length=7), "HERE/a.npz", r"has mu \[7\] and sigma \[7, 7\]; expected 128 numbers"),
        (statistics(mu=np.full(128, np.nan)), "HERE/a.npz", "holds numbers that are not finite"),
        (statistics(sigma=np.arange(128.0**2).reshape(128, 128)), "HERE/a.npz", "sigma is not symmetric"),
        (lambda file: np.savez(file, feats=np.zeros(3)), "HERE/a.npz", "cannot be read .*mu.*; expected the arrays mu"),
        (statistics(), "dinov2=HERE/a.npz", "statistics of dinov2 cannot be used; expected of inception$"),
    ],
)
def test_a_reference_that_is_none_is_told_in_one_line(scored, tmp_path, make, place, message):
    _, runs, _ = scored
    if make is not None:
        make(tmp_path / "a.npz")
    with pytest.raises((UserError, ValueError, OSError)) as told:
        report.main([*runs, "--out", str(tmp_path / "out"), "--reference", place.replace("HERE", str(tmp_path))])
    assert re.search(message, str(told.value)) and "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_a_reference_of_other_features_is_told_in_one_line(scored, tmp_path):
    folder, runs, _ = scored
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "photos/a.png")
    reference = ["--out", str(tmp_path / "out"), "--reference", str(tmp_path / "photos")]
    with pytest.raises(FileNotFoundError, match="photos: has not been scored; run"):
        report.main([*runs, *reference])
    other = random_weights(unit=1) | {"Mixed_5b.branch1x1.bn.bias": torch.zeros(4)}
    torch.save(other, tmp_path / "other.pth")
    score.main([str(tmp_path / "photos"), "--features", f"inception={tmp_path / 'other.pth'}"])
    with pytest.raises(UserError, match=r"its features of inception are of other weights .* than those of .*base"):
        report.main([*runs, *reference])
    (tmp_path / "photos/scores.parquet").unlink()
    score.main([str(tmp_path / "photos"), "--features", f"inception-clean={folder / 'inception.pth'}"])
    with pytest.raises(UserError, match="has features of inception-clean, and the runs of inception, dinov2; run"):
        report.main([*runs, *reference])
