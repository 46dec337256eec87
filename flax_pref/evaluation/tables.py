"""The tables of a comparison: for the terminal, as CSV and as LaTeX."""

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_pref.files import replacing

Interval = Mapping[str, float | None] | None


def text_table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows of text in columns, for a terminal, the header first; all columns but the first `left` to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]

    def line(cells: Iterable[str]) -> str:
        aligned = (
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(rows[0]), line("-" * width for width in widths), *map(line, rows[1:])])


def printed_tables(report: Mapping[str, Any]) -> str:
    """The tables of a report for the terminal, and the sentences that belong to them."""
    tables = [text_table(rows, left=left) for rows, left in report_tables(report)]
    return "\n\n".join([*tables, *filter(None, ["\n".join(report.get("verdicts", []))])])


def report_tables(report: Mapping[str, Any]) -> list[tuple[list[list[str]], int]]:
    """The tables of a report, their headers first, and how many columns of each are texts.

    One for each reward and benchmark, and those of controls, looks, diversity, sets and votes if there are.
    """
    tables = [(reward_rows(report, reward), 1) for reward in report["rewards"]]
    if report.get("controls"):
        tables += [(fair_rows(report, reward), 1) for reward in report["rewards"]]
    tables += [(look_rows(report, look), 1) for look in dict.fromkeys(row["reward"] for row in report.get("looks", []))]
    for benchmark in dict.fromkeys(row["benchmark"] for row in report.get("benchmarks", [])):
        tables.append((benchmark_rows(report, benchmark), 2))
    groups = {(row["features"], row["measure"]): None for row in report["diversity"]}
    for features, measure in groups:
        cells = [row for row in report["diversity"] if (row["features"], row["measure"]) == (features, measure)]
        places = decimals(row["value"] for row in cells)
        rows = [["diversity over seeds", f"{features} {measure}", "", "difference", ""]]
        for row in cells:
            rows.append(
                [row["method"], *with_interval(row["value"], places), *with_interval(row["difference"], places, "+")]
            )
        tables.append((rows, 1))
    if report["sets"]:
        rows = [["all images", "features", "measure", "", "", "images", "reference"]]
        for row in report["sets"]:
            value = row["value"]
            cells = [f"{value['value']:.4g}", ""] if value["low"] is None else with_interval(value, decimals([value]))
            counts = ["" if row[name] is None else f"{row[name]:,}" for name in ("images", "reference_images")]
            rows.append([row["method"], row["features"], row["measure"], *cells, *counts])
        tables.append((rows, 3))
    if report["votes"]:
        rows = [["votes", "votes", "prompts", "win rate", "", "p"]]
        for row in report["votes"]:
            counts = [f"{row[name]:,}" for name in ("votes", "prompts")]
            rows.append([row["method"], *counts, *_percent(row["win_rate"]), f"{row['p_corrected']:.2g}"])
        tables.append((rows, 1))
    return tables


def reward_rows(report: Mapping[str, Any], reward: str) -> list[list[str]]:
    """The table of a reward, its header first: means, win rates and gains with their intervals, corrected p."""
    cells = [row for row in report["overall"] if row["reward"] == reward]
    places, gain_places = (decimals(row[name] for row in cells) for name in ("mean", "gain"))
    rows = [[reward, "mean", "", "win rate", "", "gain", "", "p"]]
    for row in cells:
        test = row["sign_test"]
        rows.append(
            [
                *(row["method"], *with_interval(row["mean"], places), *_percent(row["win_rate"])),
                *(*with_interval(row["gain"], gain_places, "+"), f"{test['p_corrected']:.2g}" if test else ""),
            ]
        )
    return rows


def fair_rows(report: Mapping[str, Any], reward: str) -> list[list[str]]:
    """What a fair comparison says by a reward: the cost of every method beside its gains over the base and controls."""
    gains = {(row["method"], row["control"]): row["gain"] for row in report["controls"] if row["reward"] == reward}
    gains |= {(row["method"], ""): row["gain"] for row in report["overall"] if row["reward"] == reward}
    places, controls = decimals(gains.values()), report["control_runs"]
    over = [cell for name in controls for cell in (f"over {name}", "")]
    rows = [[f"{reward}, fair", "predictions", "seconds", f"over {report['baseline']}", "", *over]]
    for method in report["methods"]:
        cost, name = method["cost"] or {"predictions": None, "seconds": None}, method["name"]
        told = ["" if cost["predictions"] is None else f"{cost['predictions']:,}"]
        told.append("" if cost["seconds"] is None else f"{cost['seconds']:.3g}")
        cells = (cell for over in ("", *controls) for cell in with_interval(gains.get((name, over)), places, "+"))
        rows.append([name, *told, *cells])
    return rows


def look_rows(report: Mapping[str, Any], look: str) -> list[list[str]]:
    """The table of a measure of how images look: means and differences to the baseline."""
    cells = [row for row in report["looks"] if row["reward"] == look]
    places, gain_places = (decimals(row[name] for row in cells) for name in ("mean", "gain"))
    rows = [[look, "mean", "", "difference", ""]]
    for row in cells:
        intervals = with_interval(row["mean"], places), with_interval(row["gain"], gain_places, "+")
        rows.append([row["method"], *intervals[0], *intervals[1]])
    return rows


def benchmark_rows(report: Mapping[str, Any], benchmark: str) -> list[list[str]]:
    """The table of a benchmark's published scores, its header first; every measure has a row for each method."""
    own = [row for row in report["benchmarks"] if row["benchmark"] == benchmark]
    places = max(4, decimals(row["score"] for row in own))
    rows, before = [[benchmark, "method", "score", "", "difference", "", "prompts"]], None
    for row in own:
        name = row["measure"] if row["measure"] != before else ""
        cells = [*with_interval(row["score"], places), *with_interval(row["difference"], places, "+")]
        rows.append([name, row["method"], *cells, f"{row['prompts']:,}"])
        before = row["measure"]
    return rows


def with_interval(interval: Interval, places: int, sign: str = "") -> list[str]:
    """A value and its interval."""
    if interval is None:
        return ["", ""]
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    form = f"{sign}.{places}f"
    return [f"{value:{form}}", "" if low is None else f"[{low:{form}}, {high:{form}}]"]


def _percent(interval: Interval) -> list[str]:
    if interval is None:
        return ["", ""]
    scaled = {name: None if value is None else 100 * value for name, value in interval.items()}
    return [f"{text}%" if text and not text.startswith("[") else text for text in with_interval(scaled, 1)]


def decimals(intervals: Iterable[Interval]) -> int:
    """Digits behind the point that show two digits of the width of the narrowest interval; 3 where there is none."""
    bounds = ((i["low"], i["high"]) for i in intervals if i is not None)
    widths = [high - low for low, high in bounds if low is not None and high is not None and high > low]
    return min(6, max(0, 1 - math.floor(math.log10(min(widths))))) if widths else 3


# ----------------------------------------------------------------------------------------------------------------------
# Files


def write_tables(report: Mapping[str, Any], folder: str | Path) -> None:
    """Writes table.csv, categories.csv, features.csv and table.tex; each appears under its name when it is complete.

    Of runs with answers to benchmarks also benchmarks.csv, a row for each measure and method.
    """
    folder = Path(folder)
    w = {method["name"]: method["w"] for method in report["methods"]}
    overall = [{"method": row["method"], "reward": row["reward"], "w": w[row["method"]]} for row in report["overall"]]
    categories = [{name: row[name] for name in ("column", "value", "method", "reward")} for row in report["categories"]]
    rows = [head | _numbers(row) for head, row in zip(overall, report["overall"], strict=True)]
    write_csv(rows, folder / "table.csv")
    write_csv(
        [head | _numbers(row) for head, row in zip(categories, report["categories"], strict=True)],
        folder / "categories.csv",
        header=["column", "value", "method", "reward"],
    )
    if report.get("benchmarks"):
        heads = ("benchmark", "measure", "method", "prompts")
        write_csv(
            [
                {name: row[name] for name in heads}
                | _flat("score", row["score"])
                | _flat("difference", row["difference"])
                for row in report["benchmarks"]
            ],
            folder / "benchmarks.csv",
        )
    header = ["method", "features", "measure", "over", *_flat("value", None), *_flat("difference", None)]
    header += ["prompts", "images", "reference_images"]
    measured = [{**row, "over": "seeds"} for row in report["diversity"]]
    measured += [{**row, "over": "all images"} for row in report["sets"]]
    rows = [row | _flat("value", row["value"]) | _flat("difference", row.get("difference")) for row in measured]
    write_csv([{name: row.get(name) for name in header} for row in rows], folder / "features.csv", header=header)
    with replacing(folder / "table.tex") as unfinished:
        unfinished.write_text(latex_table(report), encoding="utf-8")


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a row of the report, flat."""
    flat = {name: row[name] for name in ("prompts", "images", "not_finite")}
    for name in ("mean", "win_rate", "gain"):
        flat |= _flat(name, row[name])
    return flat | (row["sign_test"] or dict.fromkeys(("wins", "losses", "ties", "p", "p_corrected")))


def _flat(name: str, interval: Interval) -> dict[str, float | None]:
    """The cells of an interval."""
    interval = interval or {"value": None, "low": None, "high": None}
    return {name: interval["value"], f"{name}_low": interval["low"], f"{name}_high": interval["high"]}


def write_csv(rows: Sequence[Mapping[str, Any]], file: str | Path, *, header: Sequence[str] = ()) -> None:
    """Writes rows that have the same names; None is an empty cell.

    Programs for tables run a text that begins like a formula. Such texts get an apostrophe before them, see `csv_cell`.

    Args:
        rows: all of the same names.
        file: to be written; it appears under its name when it is complete.
        header: of a file without rows.
    """
    with replacing(file) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]) if rows else header, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)


def csv_cell(value: Any) -> Any:
    """A cell that no program for tables takes for a formula: `'=1+1` for the text `=1+1`.

    Concerns texts that begin with `=`, `+`, `-`, `@`, a tab or a line break. Numbers, and texts that are nothing but a
    number, e.g. `-1.5`, are as they were. Line breaks are `\\n`, or a formula could begin behind another one.
    """
    if not isinstance(value, str):
        return value
    text = re.sub(r"\r\n?", "\n", value)
    number = re.fullmatch(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?", text)
    return f"'{text}" if re.match(r"[=+\-@\t\n]", text) and not number else text


def latex_table(report: Mapping[str, Any]) -> str:
    """A table of methods by rewards for papers, with the package booktabs.

    Mean and win rate over the baseline, with the ends of their intervals as index and exponent; the best in bold.
    """
    rewards, several = report["rewards"], len(report["methods"]) > 1
    width = 2 if several else 1
    cells = {(row["method"], row["reward"]): row for row in report["overall"]}
    columns = []
    for reward in rewards:
        rows = [cells[method["name"], reward] for method in report["methods"]]
        columns.append(_latex_column([row["mean"] for row in rows]))
        if several:
            columns.append(_latex_column([row["win_rate"] for row in rows], 100))
    spans = [f"\\multicolumn{{{width}}}{{c}}{{{latex_text(reward)}}}" for reward in rewards]
    rules = [f"\\cmidrule(lr){{{2 + width * i}-{1 + width * (i + 1)}}}" for i in range(len(rewards))]
    heads = ["Mean", r"Win \%"] if several else ["Mean"]
    lines = [
        f"% {report['prompts']} prompts, {report['pairs']} pairs of prompt and seed. Win rate over the baseline,",
        "% ties one half; index and exponent: 95 % bootstrap interval over prompts. Needs \\usepackage{booktabs}.",
        f"\\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        " & ".join(["", *spans]) + r" \\",
        " ".join(rules),
        " & ".join(["Method", *heads * len(rewards)]) + r" \\",
        r"\midrule",
        *(
            " & ".join([latex_text(method["name"]), *(column[row] for column in columns)]) + r" \\"
            for row, method in enumerate(report["methods"])
        ),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _latex_column(intervals: Sequence[Interval], factor: float = 1) -> list[str]:
    """One cell for each interval; a dash for None."""
    scaled = [
        interval and {name: None if x is None else factor * x for name, x in interval.items()} for interval in intervals
    ]
    places = 1 if factor == 100 else decimals(scaled)
    best = max(value for interval in scaled if interval and (value := interval["value"]) is not None)
    return [_latex_cell(interval, places, best) for interval in scaled]


def _latex_cell(interval: Interval, places: int, best: float) -> str:
    if interval is None:
        return "--"
    value, low, high = (None if x is None else f"{x:.{places}f}" for x in interval.values())
    shown = rf"\mathbf{{{value}}}" if value == f"{best:.{places}f}" else value
    return f"${shown}$" if low is None else f"${shown}_{{{low}}}^{{{high}}}$"


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def latex_text(text: str) -> str:
    """A text that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
