"""Scores finished folders of images with rewards.

    python -m sample.score runs/base runs/cpgd --rewards pickscore hpsv2.1=HPS_v2.1_compressed.pt --diversity clip
    python -m sample.score my/images --prompts prompts.tsv --rewards aesthetic=head.pth imagereward

A folder is one of `sample.images`, or any with images: with their prompts in a file (--prompts), in a .txt or .json of
the same name beside each, or in the images. `flax_pref.evaluation.runs.open_run` has how prompts are found.

Beside the images there is `scores.parquet` then: a row per image with a column for each reward, to which later calls
add. Killed and started again with the same flags, the program goes on where it was.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from etils import epath
from tqdm import tqdm

from flax_pref.checkpoints.hub import HUB_ID
from flax_pref.checkpoints.modules import PICKLED, SAFE, fingerprint
from flax_pref.config import UserError, check_file_systems, parse_flags, run_main
from flax_pref.data.prompts import Prompt, read_prompts
from flax_pref.evaluation.runs import EMBEDDING, PROBLEMS, SCORE, open_run
from flax_pref.evaluation.scoring import Scorer, Scores, locked, score_images
from flax_pref.files import difference
from flax_pref.parallel.agreement import Content, Fact, agree, begin_together, flat
from flax_pref.parallel.hosts import join, watched
from flax_pref.parallel.mesh import make_mesh
from flax_pref.parallel.signals import stopped_by
from flax_pref.rewards.clip import RECIPES, RESIZED
from flax_pref.rewards.remote import is_remote
from flax_pref.rewards.reward import REWARDS, load_reward

EMBEDDED = (*RECIPES, "aesthetic")  # rewards that have image embeddings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Scores finished folders of images with rewards."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of sample.images, or others with images, local or in a bucket (gs://...)."""
    rewards: tuple[str, ...] = ()
    """Each a NAME, with the weights as published, or NAME=PATH with a file, folder or Hub id of them; or with
    http://..., or python:MODULE:FUNCTION, under any name. Each has the devices to itself, one after the other."""
    diversity: str | None = None
    """NAME or NAME=PATH of a CLIP reward, whose embeddings of the images are stored: reports tell from them how
    different images of a prompt are."""
    prompts: str | None = None
    """File or folder of the prompts of foreign images; None: they are with the images."""
    column: str | None = None
    """Of the file, with the prompts; None: the one that is named so."""
    tokenizer: tuple[str, ...] = ()
    """Folder of a tokenizer, or NAME=FOLDER for one of the rewards; none: beside the weights, or as published."""
    clip: str | None = None
    """Folder or Hub id of CLIP ViT-L/14 for aesthetic; None: as published."""
    batch_size: int = 8
    """Images that a device scores at the same time."""
    mesh: str = "data=-1"
    """How to use the devices: all of them share out the images."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the networks compute in. In float32 TPUs and GPUs multiply in full precision, not in what is fastest."""
    hosts: str | None = None
    """Other processes that share out the folders; None: those of a TPU pod, Slurm or Open MPI, where there are any; or
    auto, none, or ADDRESS:PORT,PROCESSES,NUMBER."""

    def __post_init__(self):
        if not self.runs:
            raise UserError("no folder to score; expected one or more, e.g. runs/images --rewards pickscore")
        if not self.rewards and self.diversity is None:
            raise UserError(f"nothing to score with; expected --rewards with one or more of {', '.join(REWARDS)}")
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: expected at least 1")
        if self.column is not None and self.prompts is None:
            raise UserError(f"--column {self.column}: is of a file of prompts; expected --prompts with one")
        names = {one.name for one in columns_of(self)}
        for text in self.tokenizer:
            name, separator, _ = text.partition("=")
            if separator and name not in names:
                raise UserError(f"--tokenizer {text}: no reward {name!r} is asked for; expected of {', '.join(names)}")
            _check_place("--tokenizer", text, text.removeprefix(f"{name}=") if separator else text)
        if self.clip is not None and "aesthetic" not in names:
            raise UserError(f"--clip {self.clip}: is of aesthetic, which is not asked for; leave it out")
        if self.clip is not None:
            _check_place("--clip", self.clip, self.clip)


class Column(NamedTuple):
    """A column that the flags name.

    Attributes:
        column: of the table.
        name: of the reward.
        path: of its weights, or None.
    """

    column: str
    name: str
    path: str | None


class Wanted(NamedTuple):
    """A column to be computed: as `Column`, and what its values depend on; see `Scores.begin`."""

    column: str
    name: str
    path: str | None
    of: dict[str, Any]


def main(arguments: list[str]) -> None:
    """Scores what is not scored yet, and tells the means."""
    config = parse_flags(arguments, Config)
    process, processes = join(config.hosts)
    with watched():
        run(config, process, processes)


def run(config: Config, process: int, processes: int) -> None:
    """Scores every `processes`-th folder: the part of one of several processes, or all of it."""
    begin_together(config, FREE_OF_HOSTS)
    check_file_systems(*config.runs, config.prompts)
    make_mesh(config.mesh, jax.local_devices())
    if missing := [folder for folder in config.runs if not epath.Path(folder).is_dir()]:
        raise UserError(f"{missing[0]}: no such folder; expected a finished one of sample.images, or one with images")
    prompts = None if config.prompts is None else read_prompts(config.prompts, column=config.column)
    wanted = [Wanted(*one, identity(one.name, one.path, config)) for one in columns_of(config)]
    agree(lambda: contents_of(config, wanted, prompts))
    folders = list(dict.fromkeys(str(epath.Path(run)) for run in config.runs))[process::processes]
    if not folders:
        print(f"process {process} of {processes}: fewer folders than processes, none is left for this one")
        return
    with contextlib.ExitStack() as held, stopped_by(signal.SIGTERM) as stop:
        tables = []
        for folder in folders:
            run = open_run(folder, prompts)
            if run.told:
                print(f"{folder}: no manifest; {len(run.rows)} images, {run.told}")
            held.enter_context(locked(run.folder))
            tables.append(Scores(run))
            tables[-1].look_again()
        if not any(len(scores.pending(one.column, one.of)) for scores in tables for one in wanted):
            print("all images that can be scored are; nothing to do")
        for one in wanted:
            if not stop():
                score_column(tables, one, config, stop)
        for scores in tables:
            scores.save()  # perhaps a problem is gone
            print("\n".join(summary(scores, wanted)))


def score_column(tables: Sequence[Scores], wanted: Wanted, config: Config, stop: Callable[[], bool]) -> None:
    """Scores with one reward what is pending in all folders."""
    tables = [scores for scores in tables if len(scores.pending(wanted.column, wanted.of))]
    if not tables:
        return
    devices = jax.local_devices()
    print(f"loading {wanted.name} on {len(devices)} x {devices[0].device_kind} in {wanted.of['dtype']}")
    mesh = make_mesh(config.mesh, devices)
    reward = load_reward(
        *(wanted.name, wanted.path),
        clip=config.clip,
        tokenizer=tokenizer_of(config, wanted.name),
        dtype=jnp.dtype(wanted.of["dtype"]),
    )
    scorer = Scorer(reward, mesh, batch_size=config.batch_size, embedding=wanted.column == EMBEDDING)
    del reward  # its weights are those of the scorer now
    bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
    for scores in tables:
        before = scores.of(wanted.column)
        if before not in (None, wanted.of):
            print(f"{scores.folder}: {label(wanted)} is computed anew: was {difference(before, wanted.of)}")
        total = len(scores.pending(wanted.column, wanted.of))
        text = f"{scores.folder.name}: {label(wanted)}"
        with tqdm(desc=text, unit="image", total=total, bar_format=bar_format) as progress:
            score_images(scorer, scores, wanted.column, wanted.of, stop=stop, done=progress.update)
        if stop():
            return


def summary(scores: Scores, wanted: Sequence[Wanted]) -> list[str]:
    """What there is to tell about a folder, line by line."""
    total = len(scores.images)
    lines = [f"{scores.folder}: {total} images, scores in {scores.file}"]
    for one in wanted:
        left = len(scores.pending(one.column, one.of))
        known = scores.scores(one.column) if scores.of(one.column) == one.of else np.zeros(0, np.float32)
        parts = [f"{len(known)} images"]
        if one.column != EMBEDDING and len(known):
            finite = known[np.isfinite(known)]
            parts = [f"mean {finite.mean(dtype=np.float64):.6g} of {len(finite)} images"] if len(finite) else []
            parts += [f"{len(known) - len(finite)} not finite"] if len(finite) < len(known) else []
        parts += [f"stopped with {left} left; the same command goes on from there"] if left else []
        lines.append(f"  {label(one)}: {', '.join(parts)}")
    for problem in PROBLEMS:
        images = [scores.images[i] for i in np.flatnonzero(scores.problems == problem)]
        if images:
            shown = [f"{image.file} at {image.offset}" if image.offset else image.file for image in images[:3]]
            more = ", ..." if len(images) > 3 else ""
            lines.append(f"  {len(images)} {problem}, not scored: {', '.join(shown)}{more}")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# From flags to parts


def columns_of(config: Config) -> list[Column]:
    """The columns that the flags name.

    Raises:
        UserError: a reward is not known, is there twice, or has no such file.
    """
    found: dict[str, Column] = {}
    texts = [(text, "--rewards") for text in config.rewards]
    texts += [] if config.diversity is None else [(config.diversity, "--diversity")]
    for text, flag in texts:
        name, given, path = text.partition("=")
        if not re.fullmatch(r"[\w.+-]+", name) or (given and not path):
            raise UserError(f"{flag} {text}: expected NAME or NAME=PATH")
        if name not in REWARDS and not is_remote(path):
            raise UserError(f"{flag} {text}: no reward {name!r}; expected one of {', '.join(REWARDS)}")
        if path and not is_remote(path):
            _check_place(flag, text, path)
        if flag == "--diversity" and (is_remote(path) or name not in EMBEDDED):
            raise UserError(f"{flag} {text}: has no image embeddings; expected one of {', '.join(EMBEDDED)}")
        column = EMBEDDING if flag == "--diversity" else SCORE + name
        if column in found:
            raise UserError(f"{flag}: {name} is there twice; expected each reward once, under a name of its own")
        found[column] = Column(column, name, path or None)
    return list(found.values())


def _check_place(flag: str, text: str, path: str) -> None:
    if not Path(path).expanduser().exists() and not HUB_ID.fullmatch(path):
        raise UserError(f"{flag} {text}: no file or folder {path}; correct the path, or leave it out")


def identity(name: str, path: str | None, config: Config) -> dict[str, Any]:
    """What tells scores of a reward from those of another one under the same name."""
    of = {"name": name, "path": path, "sha256": "", "dtype": config.dtype}
    of |= {"resized": RESIZED[name]} if name in RESIZED and not is_remote(path) else {}
    if path is not None and not is_remote(path) and (local := Path(path).expanduser()).exists():
        of |= {"path": local.resolve().name, "sha256": fingerprint(local.resolve(), SAFE + PICKLED)}
    if name == "aesthetic" and config.clip is not None:
        local = Path(config.clip).expanduser()
        of |= (
            {"clip": local.name, "clip_sha256": fingerprint(local.resolve(), SAFE + PICKLED)}
            if local.exists()
            else {"clip": config.clip}
        )
    return of


# What may differ between hosts: where inputs lie, of which the content is compared.
FREE_OF_HOSTS = ("hosts", "rewards", "diversity", "clip", "prompts")


def contents_of(config: Config, wanted: Sequence[Wanted], prompts: Sequence[Prompt] | None) -> dict[str, Fact]:
    """What the inputs hold, wherever they lie."""
    columns = {label(one): one.of for one in wanted}
    texts = hashlib.sha256(json.dumps([(prompt.id, prompt.text) for prompt in prompts or ()]).encode()).hexdigest()
    return flat({"rewards": ", ".join(columns), "prompts": Content(config.prompts or "none", texts), **columns})


def tokenizer_of(config: Config, name: str) -> str | None:
    """The tokenizer of a reward."""
    given = {}
    for text in config.tokenizer:
        first, separator, path = text.partition("=")
        given |= {first: path} if separator else {"": text}
    return given.get(name, given.get(""))


def label(wanted: Wanted) -> str:
    """A column's name in messages."""
    return f"embedding by {wanted.name}" if wanted.column == EMBEDDING else wanted.name


if __name__ == "__main__":
    sys.exit(run_main(main))
