"""Flags of the scoring of folders of images and of prepared sets. `evaluation.run_scoring` follows them."""

import dataclasses
from typing import Literal

import tyro

from flax_pref.config import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreFlags:
    """Scores finished folders of images, or the pairs of prepared sets, with rewards."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of images, local or in a bucket (gs://...): those of sample.images, or any others. Or prepared sets of
    train.encode, both images of each pair."""
    rewards: tuple[str, ...] = ()
    """Rewards as NAME (weights as published), NAME=PATH (file, folder or Hub id of the weights), NAME=http://... or
    NAME=python:MODULE:FUNCTION. They use the devices one after the other."""
    benchmarks: tuple[str, ...] = ()
    """Benchmarks whose prompts the images show: geneval, geneval2, dpg or t2i_compbench. As NAME=FILE, with what the
    benchmark's own program has written about these images; as NAME, where that file is in the folder; or as
    NAME=http://..., a service that answers about each image. Prints the published scores."""
    features: tuple[str, ...] = ()
    """Networks whose features of each image are stored, as NAME or NAME=PATH: clip or another CLIP reward, cmmd,
    dinov2, inception, inception-clean; or lpips=PATH, for distances between the images of a prompt. Reports compute
    diversity and distances to a reference from them."""
    prompts: str | None = None
    """File or folder with the prompts of images that are not from sample.images (default: beside or in the images)."""
    column: str | None = None
    """Prompt column (default: prompt, caption or text)."""
    source: str | None = None
    """Path of the preference set that a prepared set was encoded from, whose images are scored (default: as it was
    encoded)."""
    tokenizer: tuple[str, ...] = ()
    """Tokenizer as FOLDER, or NAME=FOLDER for one of the rewards (default: beside the weights, or as published)."""
    clip: str | None = None
    """Folder or Hub id of CLIP ViT-L/14 for aesthetic (default: as published)."""
    batch_size: int = 8
    """Images per device and batch; questions per request to a service of --benchmarks."""
    mesh: str = "data=-1"
    """Device mesh. Every axis divides the images; fsdp and tensor divide the weights of a reward too, so that fsdp=-1
    scores with one that is too large for a device."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Compute precision. In float32, TPUs and GPUs multiply in full precision instead of their fastest mode."""
    hosts: str | None = None
    """Other processes of this run, which share the folders: auto, none, or ADDRESS:PORT,PROCESSES,NUMBER (default:
    those of a TPU pod, Slurm or Open MPI, if any)."""

    def __post_init__(self):
        if not self.runs:
            raise UserError("no folder to score; expected one or more, e.g. runs/images --rewards pickscore")
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: expected at least 1")
        if self.column is not None and self.prompts is None:
            raise UserError(f"--column {self.column}: is of a file of prompts; expected --prompts with one")
