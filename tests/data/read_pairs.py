"""A program that reads pairs as one of several hosts: `python read_pairs.py RESULT --hosts ADDRESS,2,0 ...`.

It writes what its devices hold of every global batch and, after every step, where the input stands.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from encoded_records import BucketRecords, MemoryRecords
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_pref.data.pipeline import InputConfig, PairBatches
from flax_pref.parallel.hosts import join

COUNT, BATCH_SIZE, SEED = 21, 8, 5  # a batch does not divide an epoch
CONFIG = {"batch_size": BATCH_SIZE, "caption_dropout": 0.3, "flip": True}


def held(array):
    """Rows of a global array on this process's devices, each once, by their place in the batch."""
    found = {}
    for shard in array.addressable_shards:
        rows = range(*shard.index[0].indices(array.shape[0]))
        found |= dict(zip(rows, np.asarray(shard.data, np.float64).reshape(len(rows), -1).tolist(), strict=True))
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("result", type=Path)
    parser.add_argument("--hosts")
    parser.add_argument("--over", default="data,fsdp")
    parser.add_argument("--state", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--buckets", action="store_true")
    flags = parser.parse_args()
    if flags.hosts:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    join(flags.hosts)

    mesh = Mesh(np.array(jax.devices()).reshape(-1, 2), ("data", "fsdp"))
    sharding = NamedSharding(mesh, PartitionSpec(tuple(flags.over.split(","))))
    sum_of_rows = jax.jit(lambda batch: batch["row"].sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    config = InputConfig(**CONFIG, threads=2, workers=flags.workers)
    records = (BucketRecords if flags.buckets else MemoryRecords)(COUNT, mirrored=True)
    with (
        PairBatches(records, config, seed=SEED, sharding=sharding) as batches,
        flags.result.open("a") as result,
    ):
        if flags.state is not None and flags.state.exists():
            batches.restore(json.loads(flags.state.read_text()))
        for batch in batches:
            step = batches.state()["step"] - 1
            values = {jax.tree_util.keystr(path): held(x) for path, x in jax.tree_util.tree_leaves_with_path(batch)}
            values["sum of rows"] = int(sum_of_rows(batch))
            result.write(json.dumps({"step": step, **values}) + "\n")
            result.flush()
            if flags.state is not None and jax.process_index() == 0:
                unfinished = flags.state.with_suffix(".new")
                unfinished.write_text(json.dumps(batches.state()))
                os.replace(unfinished, flags.state)
            if step + 1 >= flags.steps:
                break


if __name__ == "__main__":  # workers import this file
    sys.exit(main())
