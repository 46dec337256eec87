"""Flags of what is shared on the Hub. `sharing.push` follows them."""

import dataclasses

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushFlags:
    """Shares a training run, an image set or a report on the Hub, with a card."""

    folder: tyro.conf.Positional[str]
    """Folder of a training run, an image set or a report; which of them it is follows from what lies in it."""
    repo: str
    """Repository as USER/NAME: a model repository for a run, a dataset repository for the others. It is created if it
    does not exist; one that holds anything but an earlier push of a folder of the same name is refused."""
    report: str | None = None
    """Folder of a report, whose metrics with intervals the model card of a run shows (default: no metrics)."""
    grid: str | None = None
    """Image that the model card of a run shows (default: the newest sample images of the run)."""
    license: str | None = None
    """Licence as the Hub names it, e.g. openrail++ (default: that of the base, if it is known)."""
    base_model: str | None = None
    """Hub id of the base of a run, e.g. USER/NAME, where it was trained on a local copy (default: the run's model)."""
    private: bool = False
    """Create the repository as a private one."""
    dry_run: bool = False
    """Write the folder that would be uploaded, and upload nothing."""
    out: str = "runs/push"
    """Folder that --dry-run writes; new or empty."""
