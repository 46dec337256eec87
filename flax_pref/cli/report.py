"""Compares methods on the same prompts and seeds, from runs that are scored."""

from flax_pref.config import parse_flags
from flax_pref.evaluation.report_flags import ReportFlags


def main(arguments: list[str]) -> None:
    """Writes and prints the comparison."""
    flags = parse_flags(arguments, ReportFlags)
    from flax_pref.evaluation.run_report import report_runs

    out = report_runs(flags)
    pages = "" if flags.images == "none" else "vote.html, "
    print(f"\nwrote {out / 'report.html'}, {pages}report.json, table.csv, categories.csv, features.csv and table.tex")
