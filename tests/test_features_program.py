"""`--features` of sample.score and `--reference` of sample.report, on small networks in the files that users have."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from flax_pref.config import UserError
from flax_pref.data.prompts import Prompt
from flax_pref.evaluation.distances import cmmd, frechet_distance, moments, vendi_score
from flax_pref.images.image_set import ImageSet, Item
from sample import report, score
from tests.formats.reward_kinds import mps
from tests.parity.clip_reference import small_clip
from tests.parity.dinov2_reference import authors_weights
from tests.parity.inception_reference import random_weights
from tests.parity.lpips_reference import distances as lpips_distances
from tests.parity.lpips_reference import random_weights as lpips_weights

ROOT = Path(__file__).parents[1]


def draw_run(folder, seed, count=3, seeds=3):
    """A finished run of noise that is coarser or finer."""
    items = [Item(Prompt(i, f"prompt {i}", "", {}), s) for i in range(count) for s in range(seeds)]
    rng = np.random.default_rng(seed)
    pixels = np.stack([np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((5, 5, 1))).astype(np.uint8) for _ in items])
    images = ImageSet(folder, items, {"rule": "cfg"}, layout="flat")
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
    (folder / "lpips").mkdir()
    for weights, name in zip(lpips_weights("alex"), ("alexnet-owt-7be5be79.pth", "alex.pth"), strict=True):
        torch.save(weights, folder / "lpips" / name)
    small_clip(vision={"image_size": 20}).save_pretrained(folder / "cmmd")
    networks = {"inception": "inception.pth", "dinov2": "dinov2.pth", "cmmd": "cmmd"}
    features = ["--features", *(f"{name}={folder / file}" for name, file in networks.items())]
    runs = [str(folder / name) for name in ("base", "cpgd")]
    score.main([*runs, "--rewards", "compressibility", *features, f"lpips={folder / 'lpips'}"])
    score.main([str(folder / "photos"), *features])
    return folder, runs, features


def pixels_of(folder):
    """Of a run, in the order of its manifest."""
    files = pq.read_table(folder / "manifest.parquet")["file"].to_pylist()
    return np.stack([np.asarray(Image.open(folder / file).convert("RGB"), np.float64) for file in files])


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
    assert rows["base", "cmmd", "CMMD"]["value"]["value"] == pytest.approx(
        cmmd(vectors(folder / "base", "cmmd"), vectors(folder / "photos", "cmmd")), rel=1e-9
    )
    images = torch.from_numpy(pixels_of(folder / "base") / 255).permute(0, 3, 1, 2)
    pairs = [(3 * prompt + i, 3 * prompt + j) for prompt in range(3) for i in range(3) for j in range(i)]
    wanted = lpips_distances(*lpips_weights("alex"), *(images[[pair[end] for pair in pairs]] for end in (0, 1)))
    assert seeds["base", "lpips", "distance"]["value"]["value"] == pytest.approx(float(wanted.mean()), rel=1e-5)
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


def test_runs_without_rewards_are_compared_by_their_features_and_what_is_not_finite_is_left_out(
    scored, tmp_path, capsys
):
    folder, _, _ = scored
    for name in ("base", "cpgd"):
        shutil.copytree(folder / name, tmp_path / name)
        table = pq.read_table(tmp_path / name / "scores.parquet")
        described = json.loads(table.schema.metadata[b"flax_pref"]) | {"rewards": {}}
        values = np.array(table["features:inception"].to_pylist(), np.float32)
        if name == "cpgd":
            values[4, 7] = np.nan
        place = table.column_names.index("features:inception")
        column = pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])
        table = table.drop_columns(["score:compressibility"]).set_column(place - 1, "features:inception", column)
        table = table.replace_schema_metadata({"flax_pref": json.dumps(described)})
        pq.write_table(table, tmp_path / name / "scores.parquet")
    report.main([str(tmp_path / "base"), str(tmp_path / "cpgd"), "--out", str(tmp_path / "out")])
    told, content = capsys.readouterr().out, json.loads((tmp_path / "out/report.json").read_text())
    assert "features of inception: 1 pairs left out, not there or not finite" in told
    assert {row["images"] for row in content["sets"] if row["features"] == "inception"} == {8}
    assert {row["images"] for row in content["sets"] if row["features"] == "dinov2"} == {9}
    assert content["rewards"] == content["overall"] == [] and content["reference"] is None
    assert 'id="results-table"' not in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(
    ("network", "make", "message"),
    [
        ("inception", {"a.weight": torch.ones(2)}, "a.pth: no weight 'Conv2d_1a_3x3.conv.weight' of this network; exp"),
        (
            "inception",
            random_weights(unit=1) | {"fc.weight": torch.ones(1000, 128)},
            "of 1000 classes, as torchvision's",
        ),
        (
            "dinov2",
            lpips_weights("alex")[1],
            r"a.pth: no weight 'patch_embed.proj.weight' with 4 axes; expected weights",
        ),
        (
            "lpips",
            lpips_weights("alex")[1],
            r"a.pth: no weight 'features.0.weight' with 4 axes; expected a folder with",
        ),
        ("lpips", lpips_weights("alex")[0], r"a.pth: no weight 'lins.0.weight' \(5 weights missing\)"),
    ],
)
def test_a_file_of_another_network_is_told_in_one_line(scored, tmp_path, network, make, message):
    torch.save(make, tmp_path / "a.pth")
    shutil.copytree(scored[0] / "base", tmp_path / "base")
    with pytest.raises((UserError, ValueError, OSError), match=message) as told:
        score.main([str(tmp_path / "base"), "--features", f"{network}={tmp_path / 'a.pth'}"])
    assert "\n" not in str(told.value)


def test_a_folder_for_lpips_that_lacks_a_file_is_told_in_one_line(scored, tmp_path):
    shutil.copytree(scored[0] / "base", tmp_path / "base")
    (tmp_path / "lpips").mkdir()
    shutil.copy(scored[0] / "lpips/alex.pth", tmp_path / "lpips")
    with pytest.raises(FileNotFoundError, match=r"lpips: no network with its layers among alex.pth; expected a folder"):
        score.main([str(tmp_path / "base"), "--features", f"lpips={tmp_path / 'lpips'}"])


KILLED = """
import itertools, os, signal, sys
from flax_pref.evaluation import scoring
from sample.score import main
scoring.SAVE_EVERY, scoring.SAVE_SHARE = 0, float("inf")
steps, kill = itertools.count(), int(sys.argv[1])
def watch(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("scores.parquet") and next(steps) == kill:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
main(sys.argv[2:])
"""


@pytest.mark.program
def test_killed_within_each_network_a_run_has_the_values_of_an_undisturbed_one_bit_by_bit(scored, tmp_path):
    folder, _, features = scored
    (tmp_path / "mps").mkdir()
    draw_run(tmp_path / "killed", 5)
    shutil.copytree(tmp_path / "killed", tmp_path / "whole")
    flags = [*features, f"lpips={folder / 'lpips'}", f"inception-clean={folder / 'inception.pth'}"]
    flags += ["--rewards", f"mps={mps('mps.safetensors')(tmp_path / 'mps').path}", "--batch-size", "4"]
    score.main([str(tmp_path / "whole"), *flags])
    unfinished = set()
    for kill in (2, 2, 2, 2, 2, 2, -1):  # before the third time that the table is written
        command = [sys.executable, "-c", KILLED, str(kill), str(tmp_path / "killed"), *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == (0 if kill < 0 else -signal.SIGKILL), done.stderr
        if kill >= 0:
            stored = pq.read_table(tmp_path / "killed/scores.parquet")
            unfinished |= {name for name in stored.column_names if name.startswith(("features:", "score:"))
                           and stored[name].null_count}  # fmt: skip
    assert len(unfinished) >= 4 and "score:mps" in unfinished
    assert (tmp_path / "killed/scores.parquet").read_bytes() == (tmp_path / "whole/scores.parquet").read_bytes()


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
    score.main([str(tmp_path / "photos"), "--features", f"inception={folder / 'inception.pth'}"])
    with pytest.raises(UserError, match="photos: has 1 image with features of inception; expected at least 2"):
        report.main([*runs, *reference])
    (tmp_path / "photos/scores.parquet").unlink()
    score.main([str(tmp_path / "photos"), "--features", f"inception-clean={folder / 'inception.pth'}"])
    with pytest.raises(UserError, match="has features of inception-clean, and the runs of inception, dinov2, cmmd"):
        report.main([*runs, *reference])
