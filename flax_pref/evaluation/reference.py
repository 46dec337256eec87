"""The images that a report compares methods with: a scored folder, e.g. of photographs, or a file of statistics."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flax_pref.config import UserError
from flax_pref.evaluation.comparison import ScoredRun, common_networks, features_of, read_run, weights_of
from flax_pref.evaluation.distances import Moments
from flax_pref.evaluation.set_measures import INCEPTIONS, Reference
from flax_pref.programs import command

STATISTICS = "the arrays mu [D] and sigma [D, D], as pytorch-fid and clean-fid write them"


def read_reference(text: str, runs: Sequence[ScoredRun]) -> Reference:
    """Reads the features of a reference that the runs have too.

    Args:
        text: a scored folder, a file `.npz` with the statistics of Inception's features, or NAME=FILE.npz where the
            runs have the features of both ways to resize images for it.
        runs: that are compared with it.

    Raises:
        FileNotFoundError: there is nothing at this place.
        UserError: it has no features that the runs have, theirs are of other weights, or the file is no such file.
    """
    known, _ = common_networks(runs, "features")
    if not known:
        raise UserError(
            f"--reference {text}: the runs have no features in common; run {command('score')} with --features, e.g. "
            "inception=FILE, for them and the reference"
        )
    name, equals, file = text.partition("=")
    if text.endswith(".npz"):
        return _from_statistics(text, file if equals else text, name if equals else None, runs, known)
    run = read_run(text, text)
    again = f"run {command('score')} {text} --features {' '.join(known)} with the weights that the runs have"
    shared = [name for name in known if name in run.features]
    if not shared:
        there = ", ".join(run.features) or "none"
        raise UserError(f"--reference {text}: has features of {there}, and the runs of {', '.join(known)}; {again}")
    features, left_out = {}, {}
    for name in shared:
        theirs, ours = weights_of(run.features[name]), weights_of(runs[0].features[name])
        if theirs != ours:
            raise UserError(
                f"--reference {text}: its features of {name} are of other weights ({theirs[:8] or 'published'}) than "
                f"those of {runs[0].folder} ({ours[:8] or 'published'}); {again}"
            )
        values = features_of(run, name, range(len(run.table)))
        sound = np.isfinite(values).all(axis=1) & values.any(axis=1)
        features[name], left_out[name] = values[sound], int((~sound).sum())
        if not sound.any():
            raise UserError(
                f"--reference {text}: none of its {len(values)} images has finite features of {name}; {again}"
            )
        if sound.sum() < 2:
            raise UserError(
                f"--reference {text}: has 1 image with features of {name}; expected at least 2, and hundreds for FID"
            )
        if (length := features_of(runs[0], name, [0]).shape[1]) != values.shape[1]:
            raise UserError(
                f"--reference {text}: its features of {name} have {values.shape[1]} numbers, those of {runs[0].folder} "
                f"{length}; {again}"
            )
    return Reference(text, features, {}, left_out)


def _from_statistics(
    text: str, file: str, name: str | None, runs: Sequence[ScoredRun], known: Sequence[str]
) -> Reference:
    there = [network for network in known if network in INCEPTIONS]
    if name is not None and name not in there:
        told = ", ".join(there) or f"an Inception, and the runs have those of {', '.join(known)}"
        raise UserError(f"--reference {text}: statistics of {name} cannot be used; expected of {told}")
    if name is None and len(there) != 1:
        told = f"of {' and '.join(there)}; say which, e.g. {there[0]}={file}" if there else "of no Inception"
        raise UserError(f"--reference {text}: is of one Inception's features, and the runs have features {told}")
    network = name or there[0]
    if not Path(file).is_file():
        raise FileNotFoundError(f"--reference {text}: no such file; expected {STATISTICS}")
    try:
        with np.load(file, allow_pickle=False) as stored:
            mean, covariance = (np.asarray(stored[key], np.float64) for key in ("mu", "sigma"))
    except (OSError, LookupError, ValueError, TypeError, zipfile.BadZipFile) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"--reference {text}: cannot be read ({reason:.200}); expected {STATISTICS}") from error
    length = features_of(runs[0], network, [0]).shape[1]
    if mean.shape != (length,) or covariance.shape != (length, length):
        raise UserError(
            f"--reference {text}: has mu {list(mean.shape)} and sigma {list(covariance.shape)}; expected {length} "
            f"numbers, as many as the features of {network} have"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"--reference {text}: holds numbers that are not finite; make it again")
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * np.abs(covariance).max()):
        raise UserError(f"--reference {text}: sigma is not symmetric, so it is no covariance; expected {STATISTICS}")
    return Reference(text, {}, {network: Moments(mean, (covariance + covariance.T) / 2)})
