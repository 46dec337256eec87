"""Flags of the report that compares runs. `evaluation.run_report` follows them."""

import dataclasses
from typing import Literal

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportFlags:
    """Compares methods on the same prompts and seeds."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Scored folders as FOLDER or NAME=FOLDER (default name: that of the folder)."""
    baseline: str | None = None
    """Method, or its folder, that the others are compared with (default: the first)."""
    out: str = "runs/report"
    """Folder for the report."""
    rewards: tuple[str, ...] = ()
    """Names of the rewards to compare (default: all that the runs have in common)."""
    reference: str | None = None
    """Images that the methods' are compared with by FID, KID, CMMD, precision and recall: a folder scored with the same
    --features, or statistics of Inception's features (.npz with mu and sigma) (default: none)."""
    controls: tuple[str, ...] = ()
    """Names of runs of the base model that spend as much as the methods, which these are compared with too; see
    sample.controls."""
    trained_on: str | None = None
    """Reward that the methods were trained on; its gains are drawn against those of the others (default: none)."""
    votes: tuple[str, ...] = ()
    """Files that vote.html has exported, of any number of voters."""
    images: Literal["link", "embed", "none"] = "link"
    """Images of the pages. link: the files where they are; embed: copies in the pages; none: no images."""
    title: str | None = None
    """Title of the pages (default: names of the methods)."""
