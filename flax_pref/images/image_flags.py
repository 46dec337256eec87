"""Flags that say which images are drawn, and where they go. `images.set_drawing` draws them."""

import dataclasses
from pathlib import Path

from flax_pref.config import UserError
from flax_pref.diffusion.drawing_flags import DrawingFlags, PromptSyntax
from flax_pref.images.choices import ImageFormat, Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFlags(DrawingFlags):
    """Draws images from a Stable Diffusion checkpoint."""

    prompt: tuple[str, ...] = ()
    """One or several prompts."""
    prompts: str | None = None
    """File of prompts (txt, csv, tsv, json, jsonl, parquet) or a folder of such files, instead of prompt. Reads
    PartiPrompts, HPDv2, Pick-a-Pic, GenEval, GenEval 2, DPG-Bench and T2I-CompBench++ as published."""
    column: str | None = None
    """Prompt column (default: prompt, caption or text)."""
    negative_prompt: str | None = None
    """Negative prompt: what to steer away from (default: empty)."""
    second_prompt: str | None = None
    """Prompt of XL's second text encoder (default: the prompt)."""
    prompt_syntax: PromptSyntax = "plain"
    """Reading of prompts. plain: as they are, and cut behind 75 tokens; a1111, comfyui: as these programs read them,
    with weights such as (word:1.3), in a1111 also [word], and prompts of any length in chunks of 75 tokens."""
    seeds: str = "0"
    """Seeds, one image per prompt and seed: a number, a range such as 0-3, or several with commas."""
    seed: int | None = None
    """Shorthand for --seeds with one value."""
    out: str = "runs/images"
    """Folder for the images, local or in a bucket (gs://...)."""
    layout: Layout | None = None
    """Layout of the files: webdataset (tar shards), flat, or what the programs of GenEval, GenEval 2, DPG-Bench,
    T2I-CompBench++ or HPSv2 read (default: webdataset for a file of prompts, else flat)."""
    format: ImageFormat = "png"
    """Image file format."""
    shard_size: int = 1000
    """Images per tar shard."""
    verify: bool = False
    """Compare the bytes of the images that are there with their SHA-256 and draw damaged ones again (default: compare
    file sizes only)."""

    mesh: str = "data=-1"
    """Device mesh. data=-1 divides the images over all devices; network=3,data=-1 also puts base and modules with full
    weights on different devices."""
    hosts: str | None = None
    """Other processes of this run: auto, none, or ADDRESS:PORT,PROCESSES,NUMBER (default: those of a TPU pod, Slurm or
    Open MPI, if any)."""

    def __post_init__(self):
        super().__post_init__()
        if bool(self.prompt) == (self.prompts is not None):
            raise UserError("expected either --prompt with texts or --prompts with a file of them")
        if self.seed is not None and self.seeds != "0":
            raise UserError(f"--seed {self.seed} and --seeds {self.seeds}: expected one of them")
        if self.column is not None and self.prompts is None:
            raise UserError(f"--column {self.column}: is of a file of prompts; expected --prompts with one")
        if self.shard_size < 1:
            raise UserError(f"--shard-size {self.shard_size}: expected at least 1")
        if "://" not in self.out and Path(self.out).exists() and not Path(self.out).is_dir():
            raise UserError(f"--out {self.out}: is a file; expected a folder")
