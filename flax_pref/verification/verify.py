"""`flax-pref verify`: runs the checks on all processes, and says what is wrong."""

import datetime
import json
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_pref.config import UserError
from flax_pref.files import replacing
from flax_pref.models.platform import default_dtype
from flax_pref.parallel.hosts import join, watched
from flax_pref.verification.checks import CHECKS, Finding, Setting
from flax_pref.verification.verify_flags import VerifyFlags

VERDICTS = {True: "ok", False: "WRONG", None: "told"}


def verify(flags: VerifyFlags) -> list[Finding]:
    """Runs the checks; prints each finding as it is made, and writes them where a folder is named.

    Args:
        flags: what to check.

    Returns:
        the findings, all of which passed or only tell.

    Raises:
        UserError: there is no such check, or a check has failed on one of the processes.
    """
    if unknown := set(flags.only) - set(CHECKS):
        raise UserError(f"--only {sorted(unknown)[0]}: no such check; expected some of {', '.join(CHECKS)}")
    process, _ = join(flags.hosts)
    setting = Setting(default_dtype(flags.dtype))
    findings: list[Finding] = []
    started = time.perf_counter()
    with watched():
        for name in flags.only or CHECKS:
            for finding in CHECKS[name](setting):
                findings.append(finding._replace(passed=_everywhere(finding.passed)))
                if process == 0:
                    print(f"{VERDICTS[findings[-1].passed]:5}  {finding.name}: {finding.told}", flush=True)
    if process == 0 and flags.out is not None:
        flags.out.mkdir(parents=True, exist_ok=True)
        pages = {"verify.json": _as_json(findings), "verify.md": _as_markdown(findings)}
        for file, text in pages.items():
            with replacing(flags.out / file) as new:
                new.write_text(text, encoding="utf-8")
    wrong = [finding.name for finding in findings if finding.passed is False]
    asked = sum(finding.passed is not None for finding in findings)
    if wrong:
        raise UserError(
            f"{len(wrong)} of {asked} checks failed: {'; '.join(wrong)}; expected none: --out FOLDER writes a report "
            "to open an issue with"
        )
    if process == 0:
        print(f"all {asked} checks passed in {time.perf_counter() - started:.0f} s")
    return findings


def _everywhere(passed: bool | None) -> bool | None:
    """Whether a check has passed on all processes, each of which has run it."""
    if passed is None or jax.process_count() == 1:
        return passed
    return bool(np.all(multihost_utils.process_allgather(np.array(passed))))


def _as_json(findings: list[Finding]) -> str:
    listed = [finding._asdict() for finding in findings]
    return json.dumps({"time": _now(), "findings": listed}, indent=2, default=str) + "\n"


def _as_markdown(findings: list[Finding]) -> str:
    rows = [f"| {VERDICTS[finding.passed]} | {finding.name} | {finding.told} |" for finding in findings]
    return (
        "\n".join([f"`flax-pref verify`, {_now()}", "", "| verdict | check | found |", "|---|---|---|", *rows]) + "\n"
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
