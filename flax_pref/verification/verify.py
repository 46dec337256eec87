"""`flax-pref verify`: runs the checks on all processes, and says what is wrong."""

import datetime
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_pref.checkpoints.diffusers import open_checkpoint
from flax_pref.config import UserError
from flax_pref.evaluation.run_scoring import named_reward
from flax_pref.files import read_json, replacing
from flax_pref.models.platform import default_dtype
from flax_pref.parallel.hosts import join, watched
from flax_pref.verification import checks, given
from flax_pref.verification.findings import Finding, Setting
from flax_pref.verification.verify_flags import VerifyFlags

CHECKS: Mapping[str, Callable[[Setting], Iterator[Finding]]] = {
    "devices": checks.check_devices,
    "attention": checks.check_attention,
    "convolutions": checks.check_convolutions,
    "norms": checks.check_norms,
    "quantization": checks.check_quantization,
    "collectives": checks.check_collectives,
    "noise": checks.check_noise,
    "drawing": checks.check_drawing,
    "training": checks.check_training,
    "rewards": given.check_rewards,
    "model": given.check_model,
    "compilation": checks.check_compilation,
    "speed": checks.check_speed,
}
VERDICTS = {True: "ok", False: "WRONG", None: "told"}


def verify(flags: VerifyFlags) -> list[Finding]:
    """Runs the checks; prints each finding as it is made, and writes them where a folder is named.

    Args:
        flags: what to check.

    Returns:
        the findings, all of which passed or only tell.

    Raises:
        UserError: there is no such check or reward, or a check has failed on one of the processes.
        FileNotFoundError, ValueError: the checkpoint or the recorded scores cannot be read.
    """
    if unknown := set(flags.only) - set(CHECKS):
        raise UserError(f"--only {sorted(unknown)[0]}: no such check; expected some of {', '.join(CHECKS)}")
    if flags.model is not None:
        open_checkpoint(flags.model)  # found and described, before minutes of other checks
    rewards = [named_reward(text) for text in flags.rewards]
    recorded = {} if flags.recorded is None else _scores_of(flags.recorded)
    process, _ = join(flags.hosts)
    setting = Setting(default_dtype(flags.dtype), flags.model or "", rewards, recorded)
    findings: list[Finding] = []
    started = time.perf_counter()
    with watched():
        for name in flags.only or CHECKS:
            for finding in _run(name, setting):
                findings.append(finding._replace(passed=_everywhere(finding.passed)))
                if process == 0:
                    print(f"{VERDICTS[findings[-1].passed]:5}  {finding.name}: {finding.told}", flush=True)
    if process == 0:
        flags.out.mkdir(parents=True, exist_ok=True)
        pages = {"verify.json": _as_json(findings), "verify.md": _as_markdown(findings)}
        for file, text in pages.items():
            with replacing(flags.out / file) as new:
                new.write_text(text, encoding="utf-8")
    wrong = [finding.name for finding in findings if finding.passed is False]
    asked = sum(finding.passed is not None for finding in findings)
    if wrong:
        raise UserError(
            f"{len(wrong)} of {asked} checks failed: {'; '.join(wrong)}; expected none: open an issue with "
            f"{flags.out / 'verify.md'}"
        )
    if process == 0:
        result = f"all {asked} checks passed" if asked else "nothing could be checked"
        print(f"{result} in {time.perf_counter() - started:.0f} s; wrote {flags.out / 'verify.md'}")
    return findings


def _run(name: str, setting: Setting) -> Iterator[Finding]:
    """The findings of a check; one that breaks down is wrong, and the others still run.

    On several hosts it ends the run on all, for those that it broke down on no longer answer the others.
    """
    try:
        yield from CHECKS[name](setting)
    except Exception as error:
        if jax.process_count() > 1:
            raise
        said = (str(error).strip().splitlines() or [""])[0]
        yield Finding(f"check of {name}", False, f"broke down: {type(error).__name__}: {said}", {})


def _everywhere(passed: bool | None) -> bool | None:
    """Whether a check has passed on all processes, each of which has run it."""
    if passed is None or jax.process_count() == 1:
        return passed
    return bool(np.all(multihost_utils.process_allgather(np.array(passed))))


def _scores_of(file: Path) -> dict[str, list[float]]:
    """Scores by the names of rewards, as another machine has reported them."""
    findings = read_json(file, expected="the verify.json of another machine").get("findings", [])
    return {
        finding["name"].removeprefix(given.REWARD): finding["figures"]["scores"]
        for finding in findings
        if finding["name"].startswith(given.REWARD)
    }


def _as_json(findings: list[Finding]) -> str:
    listed = [finding._asdict() | {"figures": dict(map(_finite, finding.figures.items()))} for finding in findings]
    return json.dumps({"time": _now(), "findings": listed}, indent=2, default=str, allow_nan=False) + "\n"


def _finite(figure: tuple[str, Any]) -> tuple[str, Any]:
    """JSON has no infinity."""
    name, value = figure
    return name, None if isinstance(value, float) and not math.isfinite(value) else value


def _as_markdown(findings: list[Finding]) -> str:
    rows = [f"| {VERDICTS[finding.passed]} | {finding.name} | {finding.told} |" for finding in findings]
    return (
        "\n".join([f"`flax-pref verify`, {_now()}", "", "| verdict | check | found |", "|---|---|---|", *rows]) + "\n"
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
