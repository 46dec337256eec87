"""What a report says of whole sets of images: how diverse each is, and how far from a reference such as photographs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_pref.evaluation.distances import (
    NEIGHBOURS,
    Moments,
    cmmd,
    frechet_distance,
    kernel_distance,
    moments,
    precision_recall,
    vendi_score,
)
from flax_pref.evaluation.statistics import share_interval

INCEPTIONS = ("inception", "inception-clean")
# Which measures are reported of which features; "FD" is the Frechet distance of other features than FID's.
MEASURES = {
    "FID": INCEPTIONS,
    "FD": ("dinov2",),
    "KID": INCEPTIONS,
    "CMMD": ("cmmd", "clip"),
    "precision": (*INCEPTIONS, "dinov2"),
    "recall": (*INCEPTIONS, "dinov2"),
}
VENDI = "Vendi score"


@dataclasses.dataclass(frozen=True)
class Reference:
    """Images that others are compared with, or what a file of statistics says of them.

    Attributes:
        name: as the user gave it.
        features: network -> `[M, D]`, finite.
        moments: network -> mean and covariance.
        left_out: network -> images without features, or whose features are not finite.
    """

    name: str
    features: Mapping[str, np.ndarray]
    moments: Mapping[str, Moments]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)


def set_rows(
    features: Mapping[str, Mapping[str, np.ndarray]], prompts: Mapping[str, np.ndarray], reference: Reference | None
) -> list[dict[str, Any]]:
    """One row per method, features and measure.

    Args:
        features: network -> method -> `[N, D]`, finite, of the same prompts and seeds.
        prompts: network -> `[N]`, the number of the prompt of each image.
        reference: that images are compared with, if any.

    Returns:
        rows with "method", "features", "measure", "value" (an interval, whose ends are None where there is none),
        "images", "length" of the features and "reference_images", None where that is not known.
    """
    rows = []
    for network, by in features.items():
        known = None if reference is None else reference.moments.get(network)
        others = None if reference is None else reference.features.get(network)
        if known is None and others is not None and len(others) > 1:
            known = moments(others)
        for method, mine in by.items():
            found = {VENDI: _alone(vendi_score(mine))}
            if known is not None and len(mine) > 1:
                found["FID" if network in INCEPTIONS else "FD"] = _alone(frechet_distance(moments(mine), known))
            if others is not None:
                found |= _compared(mine, others, prompts[network])
            wanted = {name: value for name, value in found.items() if network in MEASURES.get(name, (network,))}
            count = None if known is None else known.images
            rows += [
                {
                    "method": method,
                    "features": network,
                    "measure": measure,
                    "value": value,
                    "images": len(mine),
                    "length": mine.shape[1],
                    "reference_images": None if measure == VENDI else count if others is None else len(others),
                }
                for measure, value in wanted.items()
            ]
    return rows


def _compared(mine: np.ndarray, others: np.ndarray, prompts: np.ndarray) -> dict[str, dict[str, float | None]]:
    found = {}
    if min(len(mine), len(others)) > 1:
        found["KID"] = _alone(kernel_distance(mine, others))
    if len(others):
        found["CMMD"] = _alone(cmmd(mine, others))
    if min(len(mine), len(others)) > NEIGHBOURS:
        inside, covered = precision_recall(mine, others)
        found["precision"] = _share(inside, prompts)
        found["recall"] = _share(covered, np.arange(len(covered)))
    return found


def _alone(value: float) -> dict[str, float | None]:
    return {"value": value, "low": None, "high": None}


def _share(chosen: np.ndarray, units: np.ndarray) -> dict[str, float | None]:
    """The share of what is chosen, with its interval over units."""
    low, high = share_interval(chosen, units)
    return {"value": float(chosen.mean()), "low": low, "high": high}


LEAST = {"CMMD": 1, "FID": 2, "FD": 2, "KID": 2, "precision": NEIGHBOURS + 1, "recall": NEIGHBOURS + 1}


def set_notes(rows: Sequence[Mapping[str, Any]], reference: Reference | None = None) -> list[str]:
    """What must be known to read the rows of `set_rows`, and what is not among them: a sentence or two for each."""
    notes = []
    for network in dict.fromkeys(row["features"] for row in rows):
        if reference is None or network not in {*reference.features, *reference.moments}:
            continue
        found = {row["measure"]: row for row in rows if row["features"] == network}
        absent = [name for name, of in MEASURES.items() if network in of and name not in found]
        told = f"{', '.join(absent)} of {network} left out"
        if absent and network in reference.features:
            counts = f"{found[VENDI]['images']:,} images and {len(reference.features[network]):,} of the reference"
            notes.append(f"{told}: {counts}; expected {', '.join(f'{LEAST[name]} for {name}' for name in absent)}.")
        elif absent:
            notes.append(f"{told}: the reference is a file of statistics.")
    for measure, networks in (("FID", INCEPTIONS), ("FD", MEASURES["FD"])):
        found = [row for row in rows if row["measure"] == measure and row["features"] in networks]
        if not found:
            continue
        images, length, others = (found[0][key] for key in ("images", "length", "reference_images"))
        against = "an unknown number" if others is None else f"{others:,}"
        notes.append(
            f"{measure} is biased upwards where images are few, by an amount that depends on what is measured: compare "
            f"it only between sets of as many images, here {images:,} against {against} of the reference"
            + (". Published FIDs are of 10,000 to 50,000." if measure == "FID" else ".")
        )
        few = [count for count in (images, others) if count is not None and count <= length]
        if few:
            notes.append(
                f"{min(few):,} images are too few for the covariance of {length:,} features, whose rank is "
                f"{min(few) - 1:,} at most: this {measure} is mostly bias"
                + ("; KID is not biased." if any(row["measure"] == "KID" for row in rows) else ".")
            )
    return notes
