"""`sample.controls` on the demo world: what it draws, chooses and compares, and what it refuses before it draws."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_images import QUICK, modules  # noqa: F401 (a fixture)

from flax_pref.config import UserError
from flax_pref.images.cost import read_cost
from sample import controls, images

PROMPTS = ("a red circle on the left", "a blue square at the top", "a green triangle")


@pytest.fixture(scope="module")
def world(tmp_path_factory, modules):  # noqa: F811
    """Files of prompts, and runs of the base model and of a method with three times its predictions."""
    folder = tmp_path_factory.mktemp("controls")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "others.txt").write_text("a yellow star\na purple ring\n")
    common = ("--model", "demo", "--prompts", str(folder / "prompts.txt"), "--seeds", "3-4", *QUICK)
    common += ("--batch-size", "2")
    images.main([*common, "--out", str(folder / "base")])
    adapters = [part for name in ("pos", "neg") for part in ("--module", f"{name}={modules}/{name}.safetensors")]
    images.main([*common, "--rule", "cpgd", "--w", "1", *adapters, "--out", str(folder / "cpgd")])
    return folder


def flags_of(world, *more, out="controls"):
    return [
        *(str(world / "base"), str(world / "cpgd"), "--prompts", str(world / "prompts.txt")),
        *("--validation", str(world / "others.txt"), "--rewards", "compressibility", "contrast", "--batch-size", "2"),
        *("--guidance-scales", "2", "3", "4", "--out", str(world / out), *more),
    ]


@pytest.mark.program
def test_controls_are_drawn_scored_and_paired_and_the_same_command_does_nothing_again(world, capsys):
    controls.main(flags_of(world))
    out, printed = world / "controls", capsys.readouterr().out
    assert "controls may spend 12 UNet predictions per image, the base model 4" in printed
    # The guidance scale of the best mean on the validation prompts, by the first reward.
    means = {}
    for scale in (2, 3, 4):
        table = pq.read_table(out / "validation" / f"scale-{scale}" / "scores.parquet")
        means[scale] = np.mean(table["score:compressibility"].to_numpy())
    tuned = pq.read_table(out / "tuned-cfg" / "manifest.parquet")
    best = max(means, key=means.get)
    assert json.loads(tuned["settings"][0].as_py())["guidance_scale"] == str(best)
    assert ("the best guidance scale is at the end of those tried" in printed) == (best in (2, 4))
    assert json.loads(pq.read_table(out / "more-steps" / "manifest.parquet")["settings"][0].as_py())["steps"] == 6
    # The best of the base's own image and two others of the same prompt, pixel by pixel.
    chosen, base, others = (
        pq.read_table(place / "scores.parquet").to_pylist()
        for place in (out / "best-of-3", world / "base", out / "candidates")
    )
    assert {row["seed"] for row in others} == {0, 1, 2, 5}
    for row in chosen:
        assert row["seed"] in (3, 4) and json.loads(row["settings"])["best_of"] == 3
        own = [r for r in base if (r["prompt"], r["seed"]) == (row["prompt"], row["seed"])]
        group = {3: (0, 2), 4: (1, 5)}[row["seed"]]
        own += [r for r in others if r["prompt"] == row["prompt"] and r["seed"] in group]
        assert len(own) == 3
        assert row["score:compressibility"] == max(r["score:compressibility"] for r in own)
    assert {name: read_cost(out / name).predictions for name in ("tuned-cfg", "more-steps", "best-of-3")} == {
        **{"tuned-cfg": 4, "more-steps": 12, "best-of-3": 12}
    }
    report = json.loads((out / "report" / "report.json").read_text())
    assert report["control_runs"] == ["tuned-cfg", "more-steps", "best-of-3"] and report["pairs"] == 6
    assert {row["control"] for row in report["controls"]} == set(report["control_runs"])
    assert {row["reward"] for row in report["looks"]} == {"contrast"}
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    controls.main(flags_of(world))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")} == written


@pytest.mark.program
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda world, flags: flags[1:2] + flags[:1] + flags[2:], "cpgd: is no run of sample.images with a base model"),
        (lambda world, flags: ["--validation", str(world / "prompts.txt"), *flags], "of its prompts are among those"),
        (lambda world, flags: ["--prompts", str(world / "others.txt"), *flags], "expected the file that it was drawn"),
        (lambda world, flags: [*flags, "--by", "pickscore"], "--by pickscore: is none of the rewards"),
        (lambda world, flags: flags[:1] + flags[2:], "expected the run of the base model and one or more of methods"),
        (lambda world, flags: [*flags, "--predictions", "0"], "--predictions 0: expected at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_drawn(world, change, message):
    flags = flags_of(world, out="nothing")
    given = change(world, flags)
    if given[0] in ("--validation", "--prompts"):  # instead of the one that is there
        place = flags.index(given[0])
        flags[place + 1] = given[1]
        given = flags
    if "others.txt" in given[given.index("--prompts") + 1]:
        (world / "third.txt").write_text("a grey cross\n")
        given[given.index("--validation") + 1] = str(world / "third.txt")
    with pytest.raises(UserError, match=message):
        controls.main(given)
    assert not (world / "nothing").exists()
