"""Runs of a `tiny_world`, one after another in one process, on meshes and hosts of choice.

In `python tiny_legs.py WORLD FOLDER dpo:one:data=4:3 dpo:one:fsdp=2,data=2:6` the text `dpo:one:data=4:3` is a leg: the
run FOLDER/one goes on, on this mesh, until 3 steps are made. The rows of its batches are appended to
FOLDER/one/rows.jsonl.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from tiny import tiny_run

from flax_pref.methods import DiffusionDPO, PositiveNegative
from flax_pref.parallel.hosts import join, watched
from flax_pref.training import trainer

METHODS = {"dpo": DiffusionDPO(beta=100.0), "modules": PositiveNegative()}
SMALL = 64  # elements from which the fsdp axis divides a leaf; no parameter of these networks is large


def noted_next(source, params, folder):
    step = source.position()["step"] + 1
    batch = pairs_next(source, params)
    rows = multihost_utils.process_allgather(batch["row"], tiled=True).tolist()
    if jax.process_index() == 0:
        with (folder / "rows.jsonl").open("a") as lines:
            print(json.dumps({"step": step, "rows": rows}), file=lines)
    return batch


pairs_next = trainer.Pairs.next


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("world", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("legs", nargs="+")
    parser.add_argument("--hosts", default="none")
    flags = parser.parse_args()
    join(flags.hosts)
    trainer.partition, trainer.like_params = (
        partial(function, min_size=SMALL) for function in (trainer.partition, trainer.like_params)
    )
    trainer.peak_of = lambda device, dtype: (None, "not measured")
    with watched():
        for leg in flags.legs:
            method, name, mesh, steps = leg.split(":")
            folder = flags.folder / name
            trainer.Pairs.next = lambda source, params, folder=folder: noted_next(source, params, folder)
            trainer.train(tiny_run(folder, flags.world, method=METHODS[method], mesh=mesh, steps=int(steps)))


if __name__ == "__main__":
    main()
