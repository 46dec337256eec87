import csv
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from flax_pref.evaluation.comparison import common_rewards, compare, pair_runs, read_run, read_votes
from flax_pref.evaluation.tables import decimals, latex_table, latex_text, printed_tables, write_csv, write_tables

KEYS = [(prompt, seed) for prompt in range(9) for seed in range(1 + prompt % 3)]
SETTINGS = {"rule": "cfg", "steps": 50}
METADATA = {"path": "judge.safetensors", "sha256": "aa"}


def write_run(folder, scores, *, keys=KEYS, settings=SETTINGS, problems=None, records=None, groups=None,
              embeddings=None, rewards=None, order=None):  # fmt: skip
    """A folder with the file that sample.score leaves there."""
    count = len(keys)
    rows = {
        "prompt_id": [prompt for prompt, _ in keys],
        "prompt": [f"prompt {prompt}" for prompt, _ in keys],
        "group": groups or [""] * count,
        "seed": [seed for _, seed in keys],
        "settings": [json.dumps(settings)] * count,
        "model_sha256": ["0" * 64] * count,
        "modules_sha256": ["{}"] * count,
        "file": [f"{prompt}-{seed}.png" for prompt, seed in keys],
        "offset": [0] * count,
        "size": [100] * count,
        "sha256": ["1" * 64] * count,
        "width": [8] * count,
        "height": [8] * count,
        "record": [json.dumps(record) for record in records or [{}] * count],
        "problem": problems or [""] * count,
    }
    table = pa.table(rows)
    for name, values in scores.items():
        table = table.append_column(f"score:{name}", pa.array(values, pa.float32()))
    if embeddings is not None:
        kind = pa.list_(pa.float16(), embeddings.shape[1])
        rows = [list(row) if np.isfinite(row).all() else None for row in embeddings.astype(np.float16)]
        table = table.append_column("features:clip", pa.array(rows, kind))
    described = {"rewards": rewards or dict.fromkeys(scores, METADATA)}
    described["features"] = {} if embeddings is None else {"clip": METADATA}
    table = table.replace_schema_metadata({"flax_pref": json.dumps(described)})
    folder.mkdir(exist_ok=True)
    pq.write_table(table if order is None else table.take(order), folder / "scores.parquet")
    return folder


def draw(number, count=18):
    """Scores with ties, as float32 holds them."""
    return np.random.default_rng(number).integers(0, 8, count).astype(np.float32) / 8


def read(*folders):
    return [read_run(folder, folder.name) for folder in folders]


def report_of(*folders, baseline=None, wanted=(), votes=()):
    runs = read(*folders)
    items = pair_runs(runs, common_rewards(runs, wanted)[0])
    report = compare(runs, items, baseline or runs[0].name, votes)
    json.dumps(report, allow_nan=False)
    return report


def cell(report, method, reward, **where):
    rows = report["categories"] if where else report["overall"]
    wanted = {"method": method, "reward": reward, **where}
    return next(row for row in rows if {name: row[name] for name in wanted} == wanted)


def loop_summary(scores, baseline, keys):
    """Mean, win rate and gain with intervals, and the sign test, one prompt after another."""
    prompts = sorted({prompt for prompt, _ in keys})
    columns = []
    for prompt in prompts:
        mine = [(float(s), float(b)) for s, b, key in zip(scores, baseline, keys, strict=True) if key[0] == prompt]
        won = [1.0 if s > b else 0.5 if s == b else 0.0 for s, b in mine]
        columns.append([sum(s for s, _ in mine), sum(won), sum(s - b for s, b in mine)])
        columns[-1] = [total / len(mine) for total in columns[-1]]
    columns, rng, means = np.array(columns), np.random.default_rng(0), []
    for _ in range(10_000):
        means.append(
            [np.sum(column) / len(prompts) for column in columns[rng.integers(len(prompts), size=len(prompts))].T]
        )
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    wins, losses = sum(columns[:, 2] > 0), sum(columns[:, 2] < 0)
    p = binomtest(wins, wins + losses).pvalue if wins + losses else 1
    return columns.mean(axis=0), low, high, (wins, losses, p)


def test_the_report_is_that_of_a_loop_over_the_prompts(tmp_path):
    scores = {name: {"judge": draw(i), "size": -draw(9 - i)} for i, name in enumerate(["base", "dpo", "cpgd"])}
    report = report_of(*(write_run(tmp_path / name, values) for name, values in scores.items()), baseline="dpo")
    assert (report["prompts"], report["pairs"], report["rewards"]) == (9, 18, ["judge", "size"])
    assert [(row["reward"], row["method"]) for row in report["overall"]] == [
        (reward, method) for reward in ("judge", "size") for method in scores
    ]
    p_values = []
    for method, values in scores.items():
        for reward in ("judge", "size"):
            found = cell(report, method, reward)
            means, low, high, (wins, losses, p) = loop_summary(values[reward], scores["dpo"][reward], KEYS)
            kinds = ("mean", "win_rate", "gain") if method != "dpo" else ("mean",)
            for place, kind in enumerate(kinds):
                assert list(found[kind].values()) == pytest.approx([means[place], low[place], high[place]], abs=1e-12)
            if method == "dpo":
                assert found["win_rate"] is found["gain"] is found["sign_test"] is None
            else:
                test = found["sign_test"]
                assert (test["wins"], test["losses"], test["ties"]) == (wins, losses, 9 - wins - losses)
                assert test["p"] == pytest.approx(p)
                p_values.append((test["p"], test["p_corrected"]))
            assert (found["images"], found["prompts"], found["not_finite"]) == (18, 9, 0)
    p_values.sort()
    corrected = np.maximum.accumulate([min(1, (4 - i) * p) for i, (p, _) in enumerate(p_values)])
    assert [p for _, p in p_values] == pytest.approx(corrected)


def test_a_method_against_itself_wins_half(tmp_path):
    report = report_of(*(write_run(tmp_path / name, {"judge": draw(0)}) for name in ("base", "again")))
    again = cell(report, "again", "judge")
    assert again["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert again["gain"] == {"value": 0, "low": 0, "high": 0}
    assert again["sign_test"] == {"wins": 0, "losses": 0, "ties": 9, "p": 1, "p_corrected": 1}


def test_the_order_of_the_images_in_a_run_changes_nothing(tmp_path):
    records = [{"Category": "AB"[prompt % 2]} for prompt, _ in KEYS]
    vectors = np.random.default_rng(0).normal(size=(2, 18, 4))
    folders = [tmp_path / "base", tmp_path / "dpo"]

    def report(order):
        for i, folder in enumerate(folders):
            write_run(folder, {"judge": draw(i)}, records=records, embeddings=vectors[i], order=order[i])
        return report_of(*folders)

    rng = np.random.default_rng(1)
    expected = report([None, None])
    assert report([rng.permutation(18), rng.permutation(18)]) == expected
    assert len(expected["categories"]) == 4 and len(expected["diversity"]) == 6


def test_runs_with_different_prompts_are_compared_on_what_they_share(tmp_path):
    base, dpo = draw(0), draw(1)
    write_run(tmp_path / "base", {"judge": base[:15]}, keys=KEYS[:15])
    write_run(tmp_path / "dpo", {"judge": dpo[4:]}, keys=KEYS[4:])
    report = report_of(tmp_path / "base", tmp_path / "dpo")
    assert report["pairs"] == 11
    assert [(method["images"], method["left_out"]) for method in report["methods"]] == [(15, 4), (14, 3)]
    means, *_ = loop_summary(dpo[4:15], base[4:15], KEYS[4:15])
    assert cell(report, "dpo", "judge")["gain"]["value"] == pytest.approx(means[2])
    write_run(tmp_path / "other", {"judge": draw(0, 2)}, keys=[(20, 0), (21, 0)])
    with pytest.raises(ValueError, match=r'base has prompt 0 "prompt 0", seed 0; \S+other has prompt 20 "prompt 20"'):
        report_of(tmp_path / "base", tmp_path / "other")


def test_an_image_with_a_problem_in_one_run_leaves_the_pair_out_of_all(tmp_path):
    problems = ["missing", "changed", "", "unreadable", *[""] * 14]
    damaged = [None if problem else score for problem, score in zip(problems, draw(1), strict=True)]
    write_run(tmp_path / "base", {"judge": draw(0)})
    write_run(tmp_path / "dpo", {"judge": damaged}, problems=problems)
    report = report_of(tmp_path / "base", tmp_path / "dpo")
    kept = [2, *range(4, 18)]
    means, *_ = loop_summary(draw(1)[kept], draw(0)[kept], [KEYS[i] for i in kept])
    assert cell(report, "base", "judge")["images"] == 15
    assert cell(report, "dpo", "judge")["mean"]["value"] == pytest.approx(means[0])
    counts = [
        [method[name] for name in ("missing", "changed", "unreadable", "left_out")] for method in report["methods"]
    ]
    assert counts == [[0, 0, 0, 3], [1, 1, 1, 3]]
    write_run(tmp_path / "dpo", {"judge": [None] * 18}, problems=["changed"] * 18)
    with pytest.raises(ValueError, match=r"missing, changed or unreadable .*dpo: 18 of 18"):
        report_of(tmp_path / "base", tmp_path / "dpo")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_counted_and_never_averaged(tmp_path, value):
    broken = draw(1)
    broken[[3, 7, 8]] = value
    kept = [i for i in range(18) if i not in (3, 7, 8)]
    write_run(tmp_path / "base", {"judge": draw(0), "size": draw(5)})
    write_run(tmp_path / "dpo", {"judge": broken, "size": draw(6)})
    report = report_of(tmp_path / "base", tmp_path / "dpo")
    for method, scores in (("base", draw(0)), ("dpo", draw(1))):
        means, *_ = loop_summary(scores[kept], draw(0)[kept], [KEYS[i] for i in kept])
        assert cell(report, method, "judge")["mean"]["value"] == pytest.approx(means[0])
        assert cell(report, method, "judge")["images"] == 15 and cell(report, method, "size")["images"] == 18
    assert [cell(report, method, "judge")["not_finite"] for method in ("base", "dpo")] == [0, 3]
    write_run(tmp_path / "dpo", {"judge": [value] * 18, "size": draw(6)})
    with pytest.raises(ValueError, match=r"judge: no pair has finite scores \(dpo has fewest\); leave it out"):
        report_of(tmp_path / "base", tmp_path / "dpo")
    assert report_of(tmp_path / "base", tmp_path / "dpo", wanted=["size"])["rewards"] == ["size"]


# ----------------------------------------------------------------------------------------------------------------------
# Categories, diversity, sweeps


def test_a_category_has_the_numbers_of_a_report_on_its_prompts_alone(tmp_path):
    labels = ["C" if prompt == 8 else "AB"[prompt % 2] for prompt, _ in KEYS]
    records = [
        {"Prompt": "", "Category": label, "Challenge": "xy"[prompt > 3], "style": "one", "Note": 5}
        for label, (prompt, _) in zip(labels, KEYS, strict=True)
    ]
    scores = {"base": draw(0), "dpo": draw(1) + 1}
    folders = [write_run(tmp_path / name, {"judge": values}, records=records) for name, values in scores.items()]
    report = report_of(*folders)
    assert {row["column"] for row in report["categories"]} == {"Category", "Challenge"}  # all styles are one
    for label in "ABC":
        chosen = [i for i in range(18) if labels[i] == label]
        for name, values in scores.items():
            write_run(tmp_path / name, {"judge": values[chosen]}, keys=[KEYS[i] for i in chosen])
        alone = report_of(*folders)
        for name in scores:
            found = cell(report, name, "judge", value=label)
            expected = cell(alone, name, "judge")
            for kind in ("mean", "win_rate", "gain", "prompts", "images"):
                assert found[kind] == expected[kind]
    assert cell(report, "dpo", "judge", value="C")["gain"]["low"] is None  # one prompt has no interval
    tests = {value: cell(report, "dpo", "judge", value=value)["sign_test"] for value in "ABCxy"}
    assert [test["p"] for test in tests.values()] == [0.125, 0.125, 1, 0.125, 0.0625]
    # Corrected within each column.
    assert [test["p_corrected"] for test in tests.values()] == [0.375, 0.375, 1, 0.125, 0.125]


def test_groups_are_the_categories_of_prompts_without_records(tmp_path):
    groups = ["" if prompt == 0 else "xy"[prompt % 2] for prompt, _ in KEYS]
    report = report_of(write_run(tmp_path / "base", {"judge": draw(0)}, groups=groups))
    assert [(row["column"], row["value"], row["prompts"]) for row in report["categories"]] == [
        ("group", "x", 4),
        ("group", "y", 4),
    ]


def test_diversity_is_the_distance_between_the_images_of_a_prompt(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(2, 18, 6)).astype(np.float16).astype(np.float64)
    vectors[1, 1] = np.nan  # the only pair of prompt 1
    folders = [tmp_path / "base", tmp_path / "dpo"]
    for i, folder in enumerate(folders):
        write_run(folder, {"judge": draw(i)}, embeddings=vectors[i])
    base, dpo = [row for row in report_of(*folders)["diversity"] if row["measure"] == "distance"]
    distances = []
    for run in vectors:
        units = run / np.linalg.norm(run, axis=1, keepdims=True)
        of_prompts = []
        for prompt in range(2, 9):
            mine = [units[i] for i, key in enumerate(KEYS) if key[0] == prompt]
            if len(mine) > 1:
                of_prompts.append(np.mean([1 - a @ b for i, a in enumerate(mine) for b in mine[:i]]))
        distances.append(np.array(of_prompts))
    assert base["prompts"] == dpo["prompts"] == len(distances[0]) == 5
    assert base["value"]["value"] == pytest.approx(distances[0].mean(), rel=1e-6)
    assert dpo["difference"]["value"] == pytest.approx((distances[1] - distances[0]).mean(), rel=1e-6)
    assert dpo["difference"]["low"] < dpo["difference"]["value"] < dpo["difference"]["high"]
    assert base["difference"] is None and base["features"] == "clip"
    write_run(folders[1], {"judge": draw(1)})
    assert report_of(*folders)["diversity"] == []


def write_distances(folder, matrix, *, order):
    """A run whose rows are in this order, with the distances of pairs of one prompt, by their places in `KEYS`."""
    write_run(folder, {"judge": draw(0)}, order=order)
    table = pq.read_table(folder / "scores.parquet")
    lists = [[matrix[i, j] for j in order[:row] if KEYS[i][0] == KEYS[j][0]] for row, i in enumerate(order)]
    described = json.loads(table.schema.metadata[b"flax_pref"]) | {"distances": {"lpips": METADATA}}
    table = table.append_column("distance:lpips", pa.array(lists, pa.list_(pa.float32())))
    pq.write_table(table.replace_schema_metadata({"flax_pref": json.dumps(described)}), folder / "scores.parquet")
    return folder


def test_distances_of_pairs_are_averaged_over_the_pairs_of_each_prompt(tmp_path):
    rng = np.random.default_rng(0)
    matrices = np.float32(rng.random((2, 18, 18)))
    matrices = [matrix + matrix.T for matrix in matrices]
    missing = (KEYS.index((4, 0)), KEYS.index((4, 1)))  # the only pair of prompt 4
    matrices[1][missing] = matrices[1][missing[::-1]] = np.nan
    folders = [
        write_distances(tmp_path / name, matrix, order=rng.permutation(18).tolist())
        for name, matrix in zip(("base", "dpo"), matrices, strict=True)
    ]
    base, dpo = report_of(*folders)["diversity"]
    means = []
    for matrix in matrices:
        pairs = {}
        for i, (prompt, _) in enumerate(KEYS):
            for j in range(i):
                if KEYS[j][0] == prompt and prompt != 4:
                    pairs.setdefault(prompt, []).append(matrix[i, j])
        means.append(np.array([np.mean(values) for values in pairs.values()]))
    assert (base["features"], base["measure"], base["prompts"]) == ("lpips", "distance", len(means[0])) and base[
        "prompts"
    ] == 5
    assert base["value"]["value"] == pytest.approx(means[0].mean(), rel=1e-6)
    assert dpo["difference"]["value"] == pytest.approx((means[1] - means[0]).mean(), rel=1e-5)


def test_runs_that_differ_only_in_w_are_a_curve(tmp_path):
    def run(name, **settings):
        return write_run(tmp_path / name, {"judge": draw(len(name))}, settings=SETTINGS | settings)

    report = report_of(
        run("base"),
        run("c10", rule="cpgd", w="10"),
        run("c2", rule="cpgd", w="2"),
        run("c4", rule="cpgd", w="4.0"),
        run("steps", rule="cpgd", w="4", steps=20),
        run("more steps", rule="cpgd", w="8", steps=20),
        run("falling", rule="cpgd", w="linear:8:0"),
        run("npo", rule="npo"),
        run("alone", rule="pgd", w="4"),
    )
    first, second = report["sweeps"]
    assert [(point["method"], point["w"]) for point in first["points"]] == [("c2", 2), ("c4", 4), ("c10", 10)]
    assert [point["w"] for point in second["points"]] == [4, 8]
    assert (first["family"], second["family"]) == ("cpgd, steps=50", "cpgd, steps=20")
    assert first["points"][0]["mean"] == cell(report, "c2", "judge")["mean"]
    assert first["points"][0]["win_rate"] == cell(report, "c2", "judge")["win_rate"]
    assert [method["w"] for method in report["methods"]] == [None, 10, 2, 4, 4, 8, None, None, 4]


# ----------------------------------------------------------------------------------------------------------------------
# Votes


def write_votes(file, votes):
    rows = [
        {"prompt_id": key[0], "prompt": f"prompt {key[0]}", "seed": key[1], "left": left, "right": right, "vote": vote}
        for key, left, right, vote in votes
    ]
    methods = ["base", "dpo", "cpgd"]
    file.write_text(json.dumps({"kind": "flax_pref votes", "methods": methods, "votes": rows}))
    return file


@pytest.fixture
def three(tmp_path):
    return [write_run(tmp_path / name, {"judge": draw(i)}) for i, name in enumerate(("base", "dpo", "cpgd"))]


def test_votes_of_several_people_give_a_win_rate_over_prompts(three, tmp_path):
    anna = write_votes(
        tmp_path / "anna.json",
        [
            ((1, 0), "base", "dpo", "right"),
            ((1, 0), "dpo", "base", "right"),  # she has changed her mind
            ((2, 0), "dpo", "base", "left"),
            ((2, 1), "dpo", "base", "tie"),
            ((3, 0), "dpo", "cpgd", "left"),  # not about the baseline
            ((99, 0), "dpo", "base", "left"),  # not in this report
        ],
    )
    ben = write_votes(tmp_path / "ben.json", [((1, 0), "dpo", "base", "left"), ((5, 0), "base", "dpo", "right")])
    (row,) = report_of(*three, votes=read_votes([anna, ben]))["votes"]
    assert (row["method"], row["votes"], row["prompts"]) == ("dpo", 5, 3)
    assert row["win_rate"]["value"] == pytest.approx((0.5 + 0.75 + 1) / 3)
    assert row["win_rate"]["low"] == 0.5 and row["win_rate"]["high"] == 1
    assert (row["wins"], row["losses"], row["ties"], row["p"], row["p_corrected"]) == (2, 0, 1, 0.5, 0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1", "not valid JSON"),
        ('{"kind": "other", "votes": []}', "not a file of votes"),
        ('{"kind": "flax_pref votes", "votes": {}}', "not a file of votes"),
        ('{"kind": "flax_pref votes", "votes": [{"prompt_id": "0"}]}', "vote 0 is not complete"),
        ([((1, 0), "base", "dpo", "both")], "vote 0 is 'both' of 'base' and 'dpo'"),
        ([((1, 0), "dpo", "dpo", "left")], "vote 0 is 'left' of 'dpo' and 'dpo'"),
    ],
)
def test_a_file_that_holds_no_votes_is_named(tmp_path, content, message):
    file = tmp_path / "v.json"
    write_votes(file, content) if isinstance(content, list) else file.write_text(content)
    with pytest.raises(ValueError, match=rf"v\.json: .*{message}"):
        read_votes([file])


@pytest.mark.parametrize(
    ("vote", "message"),
    [
        (((1, 0), "base", "sdpo", "left"), "about sdpo; expected of base, dpo, cpgd"),
        (((77, 0), "base", "dpo", "left"), "none of the 1 votes"),
    ],
)
def test_votes_about_something_else_are_refused(three, tmp_path, vote, message):
    with pytest.raises(ValueError, match=message):
        report_of(*three, votes=read_votes([write_votes(tmp_path / "v.json", [vote])]))


# ----------------------------------------------------------------------------------------------------------------------
# Runs that cannot be compared


def test_only_rewards_of_the_same_weights_in_all_runs_are_compared(tmp_path):
    write_run(tmp_path / "base", {"judge": draw(0), "size": draw(1), "own": draw(2)})
    write_run(tmp_path / "dpo", {"size": draw(0), "judge": draw(1)})
    runs = read(tmp_path / "base", tmp_path / "dpo")
    assert common_rewards(runs) == (["judge", "size"], ["own"])
    assert common_rewards(runs, ["size", "size"]) == (["size"], [])
    for wanted, message in (
        (["own"], "dpo: is not scored by own"),
        (["clip"], "--rewards clip: no run .* judge, size"),
    ):
        with pytest.raises(ValueError, match=message):
            common_rewards(runs, wanted)
    write_run(tmp_path / "dpo", {"judge": draw(0)}, rewards={"judge": {"path": "judge.pt", "sha256": "bb"}})
    with pytest.raises(ValueError, match=r"weights of judge differ between runs \(\S+base aa, \S+dpo bb\)"):
        report_of(tmp_path / "base", tmp_path / "dpo")
    write_run(tmp_path / "dpo", {"other": draw(0)})
    with pytest.raises(ValueError, match=r"no reward in common .*base: judge, size, own; .*dpo: other"):
        report_of(tmp_path / "base", tmp_path / "dpo")


def test_a_run_whose_scoring_has_not_come_to_its_end_is_named(tmp_path):
    write_run(tmp_path / "base", {"judge": [*draw(0)[:-2], None, None]})
    with pytest.raises(ValueError, match="base: 2 of 18 images are not scored by judge yet; finish it"):
        report_of(tmp_path / "base")


def test_folders_without_readable_scores_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; run python -m sample\.score"):
        read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has not been scored; run"):
        read(tmp_path)
    file = write_run(tmp_path / "base", {"judge": draw(0)}) / "scores.parquet"
    content = file.read_bytes()
    for damaged in (b"", content[:100], content[:-20], b"x" * len(content)):
        file.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"base/scores\.parquet: not a file of scores .*: remove it and run"
        ) as told:
            read(tmp_path / "base")
        assert "\n" not in str(told.value)
    unnamed = pa.table({"prompt_id": [1]}, metadata={"flax_pref": '{"rewards": {}}'})
    pq.write_table(unnamed, file)
    with pytest.raises(ValueError, match="no column 'prompt'"):
        read(tmp_path / "base")
    write_run(tmp_path / "base", {"judge": draw(0, 2)}, keys=[(1, 0), (1, 0)])
    with pytest.raises(ValueError, match='has prompt 1 "prompt 1", seed 0 more than once'):
        read(tmp_path / "base")
    write_run(tmp_path / "base", {"judge": []}, keys=[])
    with pytest.raises(ValueError, match="no images"):
        read(tmp_path / "base")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"prompt": None}, "row 1 has no prompt"),
        ({"file": None}, "row 1 has no file"),
        ({"file": "../../x.png"}, r"row 1 has file='\.\./\.\./x\.png'; expected a name in this folder"),
        ({"offset": -5}, "row 1 has offset=-5; expected 0 or more"),
        ({"record": "[1]"}, r"record '\[1\]' is no JSON object"),
        ({"record": "{"}, r"record '\{' is not JSON"),
    ],
)
def test_a_row_of_scores_that_says_no_image_is_named(tmp_path, cells, message):
    file = write_run(tmp_path / "base", {"judge": draw(0)}) / "scores.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[1] |= cells
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    with pytest.raises(
        ValueError, match=rf"base/scores\.parquet: not a file of scores .*{message}.*: remove it and run"
    ):
        read(tmp_path / "base")


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def test_the_tables_have_every_number_and_names_as_they_are(tmp_path):
    names = ["base", "50%_w&{more}"]
    groups = ["xy"[prompt % 2] for prompt, _ in KEYS]
    folders = [write_run(tmp_path / name, {"judge": draw(i)}, groups=groups) for i, name in enumerate(names)]
    report = report_of(*folders)
    write_tables(report, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("categories.csv", "features.csv", "table.csv", "table.tex")
    ]
    header, base, other = (line.split(",") for line in (tmp_path / "out" / "table.csv").read_text().splitlines())
    row, expected = dict(zip(header, other, strict=True)), cell(report, names[1], "judge")
    assert row["method"] == names[1]
    for kind in ("mean", "win_rate", "gain"):
        found = [float(row[name]) for name in (kind, f"{kind}_low", f"{kind}_high")]
        assert found == list(expected[kind].values())
    assert float(row["p_corrected"]) == expected["sign_test"]["p_corrected"]
    assert dict(zip(header, base, strict=True))["win_rate"] == ""
    assert len((tmp_path / "out" / "categories.csv").read_text().splitlines()) == 1 + 4
    assert r"50\%\_w\&\{more\} & $" in (tmp_path / "out" / "table.tex").read_text()
    assert (
        latex_text("a\\b~^<c>\n|")
        == r"a\textbackslash{}b\textasciitilde{}\textasciicircum{}\textless{}c\textgreater{} \textbar{}"
    )


FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "=cmd|'/C calc'!A0", "-x", "+"]
PLAIN = ["-1.5", "+2", "-3e-05", "7", "cPGD", "a=1", "'=1", "", "ä"]


def test_no_cell_of_a_table_begins_like_a_formula_and_numbers_stay_numbers(tmp_path):
    rows = [{"method": text, "gain": -0.5, "wins": -3, "p": None} for text in FORMULAS + PLAIN]
    write_csv(rows, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["method"] for row in found] == [f"'{text}".replace("\r", "\n") for text in FORMULAS] + PLAIN
    assert {(row["gain"], row["wins"], row["p"]) for row in found} == {("-0.5", "-3", "")}
    write_csv([{"a": "x\r=1+1"}], tmp_path / "break.csv")
    assert (tmp_path / "break.csv").read_bytes() == b'a\n"x\n=1+1"\n'


def test_names_of_methods_and_categories_cannot_be_formulas_in_the_tables(tmp_path):
    groups = [("=cmd()", "@x")[prompt % 2] for prompt, _ in KEYS]
    for place, name in enumerate(("base", "=1+1")):
        write_run(tmp_path / name, {"judge": draw(place)}, groups=groups)
    write_tables(report_of(tmp_path / "base", tmp_path / "=1+1"), tmp_path / "out")
    cells = set()
    for name in ("table.csv", "categories.csv"):
        with (tmp_path / "out" / name).open(encoding="utf-8", newline="") as file:
            cells |= {cell for row in csv.reader(file) for cell in row}
    assert {"'=1+1", "'=cmd()", "'@x"} <= cells
    assert any(cell.startswith("-0.") for cell in cells)
    assert not [cell for cell in cells if re.match(r"[=+@\t\r]|-(?!\d)", cell)]


def test_tables_show_the_digits_that_the_intervals_support_and_the_best_in_bold():
    def row(method, reward, value, half, win=None):
        interval = {"value": value, "low": value - half, "high": value + half}
        test = {"p_corrected": 0.012} if win else None
        rate = win and {"value": win, "low": win - 0.1, "high": win + 0.1}
        return {"method": method, "reward": reward, "mean": interval, "win_rate": rate, "gain": None, "sign_test": test}

    report = {
        "prompts": 5, "pairs": 5, "rewards": ["pick", "hps"], "methods": [{"name": "base"}, {"name": "dpo"}],
        "overall": [row("base", "pick", 20.123, 0.06), row("dpo", "pick", 20.456, 0.06, 0.625),
                    row("base", "hps", 0.28314, 0.0006), row("dpo", "hps", 0.28123, 0.0006, 0.5)],
        "diversity": [], "sets": [], "votes": [],
    }  # fmt: skip
    lines = latex_table(report).splitlines()
    assert lines[2] == r"\begin{tabular}{lrrrr}"
    assert lines[4] == r" & \multicolumn{2}{c}{pick} & \multicolumn{2}{c}{hps} \\"
    assert lines[5] == r"\cmidrule(lr){2-3} \cmidrule(lr){4-5}"
    assert lines[8] == r"base & $20.12_{20.06}^{20.18}$ & -- & $\mathbf{0.2831}_{0.2825}^{0.2837}$ & -- \\"
    assert lines[9].startswith(r"dpo & $\mathbf{20.46}_{20.40}^{20.52}$ & $\mathbf{62.5}_{52.5}^{72.5}$ & $0.2812")
    printed = printed_tables(report).splitlines()
    assert printed[3].split() == ["dpo", "20.46", "[20.40,", "20.52]", "62.5%", "[52.5,", "72.5]", "0.012"]
    assert len({line.rstrip().index("[") for line in printed[2:4]}) == 1
    assert decimals([]) == 3 and decimals([{"low": -30.0, "high": 0.0}]) == 0
