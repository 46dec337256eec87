"""Texts in Markdown: tables, and a report's figures for a model card."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax_pref.evaluation.tables import report_tables


def markdown_report(report: Mapping[str, Any], title: str) -> str:
    """The figures of a report as a page of Markdown, e.g. for a model card or a pull request."""
    return "\n\n".join([f"# {cell(title)}", *figures_of(report)]) + "\n"


def figures_of(report: Mapping[str, Any]) -> list[str]:
    """The figures of a report: how they came about, and a table for each reward and whatever else it compares.

    Raises:
        LookupError, TypeError: it is no report of flax-pref.
    """
    names = ", ".join(cell(method["name"]) for method in report["methods"])
    told = (
        f"{report['pairs']:,} pairs (prompt, seed) of {report['prompts']:,} prompts; methods: {names}; baseline "
        f"{cell(report['baseline'])}; in brackets 95 % bootstrap intervals over prompts; p of the sign test, corrected "
        "(Holm)."
    )
    tables = [
        table([[cell(name) or "interval" for name in header], *[[cell(text) for text in row] for row in rows]])
        for (header, *rows), _ in report_tables(report)
    ]
    return [told, *tables, *(f"- {cell(line)}" for line in report.get("verdicts", []))]


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, the header first; its cells are Markdown too, see `cell`."""
    header, *rest = rows
    lines = [header, ["---"] * len(header), *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """A value as text that Markdown shows as it is, on one line: in tables, headings and lists."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text)
