"""The order of pairs is exact, whatever reads them: one host or two, threads or processes, begun anew or gone on."""

import itertools
import json
import os
import pickle
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import read_pairs
from encoded_records import CAPTIONS, BucketRecords, MemoryRecords

from flax_pref.data.pipeline import InputConfig, PairBatches, host_batches

ROOT = Path(__file__).parents[2]
COUNT, SIZE, SEED = read_pairs.COUNT, read_pairs.BATCH_SIZE, read_pairs.SEED

KINDS = pytest.mark.parametrize("records", [MemoryRecords, BucketRecords], ids=["one size", "three sizes"])
MANY = 120  # pairs for shares of them; bfloat16 has halves up to 128


def undisturbed(steps, *, count=COUNT, seed=SEED, rows=None, records=MemoryRecords, **config):
    """Host batches of steps 0, 1, ..., each read on its own."""
    config = InputConfig(**{"batch_size": SIZE} | config)
    rows = np.arange(config.batch_size) if rows is None else rows
    batches = host_batches(records(count, mirrored=True), config, seed=seed, rows=rows)
    return [batches[step] for step in range(steps)]


def rows_of(batches):
    return np.concatenate([batch["row"] for batch in batches]).tolist()


def same(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


# ----------------------------------------------------------------------------------------------------------------------
# Order


def test_every_epoch_holds_each_pair_once_in_an_order_of_its_own():
    rows = rows_of(undisturbed(3 * COUNT))
    epochs = [rows[i : i + COUNT] for i in range(0, len(rows) - COUNT + 1, COUNT)]
    assert len(epochs) == 3 * SIZE
    for epoch in epochs:
        assert sorted(epoch) == list(range(100, 100 + COUNT))
    assert len(set(map(tuple, epochs))) == len(epochs)
    # No order is another's, moved along: neighbours in one epoch are rarely neighbours in the next.
    neighbours = [set(itertools.pairwise(epoch)) for epoch in epochs]
    assert max(len(one & next) for one, next in itertools.pairwise(neighbours)) < COUNT / 3


def test_another_seed_is_another_order_not_that_of_another_epoch():
    one, other = rows_of(undisturbed(COUNT, seed=0)), rows_of(undisturbed(COUNT, seed=1))
    epochs = [{tuple(rows[i : i + COUNT]) for i in range(0, len(rows), COUNT)} for rows in (one, other)]
    assert not epochs[0] & epochs[1]


def test_the_order_of_a_seed_is_that_of_sets_that_were_encoded_before_there_were_buckets():
    assert rows_of(undisturbed(2)) == [
        *(112, 109, 114, 115, 118, 100, 106, 105),
        *(117, 111, 104, 102, 103, 110, 113, 119),
    ]


@KINDS
@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_what_hosts_read_is_together_what_one_reads(hosts, records):
    how = {"records": records, **read_pairs.CONFIG}
    whole = undisturbed(6, **how)
    parts = [undisturbed(6, rows=rows, **how) for rows in np.split(np.arange(SIZE), hosts)]
    for step, batch in enumerate(whole):
        together = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(part[step] for part in parts))
        assert same(together, batch)


def test_chance_depends_on_the_place_in_the_line_and_not_on_the_batch():
    large, small = (undisturbed(n, batch_size=size, caption_dropout=0.5, flip=True) for n, size in ((1, 24), (6, 4)))
    assert same(jax.tree.map(lambda *leaves: np.concatenate(leaves), *small), large[0])


# ----------------------------------------------------------------------------------------------------------------------
# Several sizes


@pytest.mark.parametrize(("count", "batch_size"), [(70, 8), (71, 8), (21, 16), (7, 3)])
def test_batches_are_of_one_size_and_every_epoch_of_a_size_has_each_of_its_pairs_once(count, batch_size):
    records, lines = BucketRecords(count, mirrored=True), {size: [] for size in BucketRecords.SIZES}
    steps = 5 * count  # five rounds, in each of which a size has as many batches as pairs
    for batch in undisturbed(steps, count=count, batch_size=batch_size, records=BucketRecords):
        (size,) = {records.size(row - 100) for row in batch["row"].tolist()}
        assert batch["winner"].shape == (batch_size, size[0] // 24, size[1] // 24, 8)
        assert (batch["time_ids"][:, :, 4:] == size).all()
        lines[size] += batch["row"].tolist()
    for size, pairs in records.buckets().items():
        line, n = lines[size], len(pairs)
        assert len(line) == steps * batch_size * n // count
        epochs = [line[i : i + n] for i in range(0, len(line), n)]
        assert all(sorted(epoch) == (100 + pairs).tolist() for epoch in epochs)
        assert n < 10 or len(set(map(tuple, epochs))) == len(epochs), "each has an order of its own"


def test_sizes_take_turns_in_proportion_to_their_pairs():
    counts = [len(pairs) for pairs in BucketRecords(MANY).buckets().values()]
    sizes = [
        batch["winner"].shape[1] for batch in undisturbed(2 * MANY, count=MANY, batch_size=2, records=BucketRecords)
    ]
    for size, count in zip((1, 2, 4), counts, strict=True):
        seen = np.cumsum(np.array(sizes) == size)
        assert np.abs(seen - np.arange(1, 2 * MANY + 1) * count / MANY).max() < 1.5


def test_a_size_with_fewer_pairs_than_a_batch_repeats_them():
    rows = [
        batch["row"].tolist()
        for batch in undisturbed(21, batch_size=16, records=BucketRecords)
        if batch["winner"].shape[1] == 4
    ]
    assert len(rows) == 3 and set(rows[0]) == {103, 110, 117}
    assert sorted(np.concatenate(rows).tolist()) == sorted([103, 110, 117] * 16)


def test_sizes_with_equally_many_pairs_have_orders_of_their_own():
    lines = {1: [], 4: []}

    class Alike(BucketRecords):
        BUCKETS = (0, 2)

    for batch in undisturbed(40, count=40, batch_size=4, records=Alike):
        lines[batch["winner"].shape[1]] += ((batch["row"] - 100) // 2).tolist()
    assert len(lines[1]) == len(lines[4]) == 80
    assert lines[1] != lines[4]


# ----------------------------------------------------------------------------------------------------------------------
# What is in a batch


def test_a_batch_holds_images_caption_and_sizes_of_each_pair():
    (batch,) = undisturbed(1)
    numbers = batch["row"] - 100.0
    assert (batch["winner"] == numbers[:, None, None, None]).all()
    assert (batch["loser"] == -numbers[:, None, None, None]).all()
    assert (batch["text"]["encoder_hidden_states"] == 1 + numbers[:, None, None] % CAPTIONS).all()
    assert (batch["text"]["text_embeds"] == 1 + numbers[:, None] % CAPTIONS).all()
    ids = [[500, 600, 2, 3, 48, 64], [700, 800, 2, 4, 48, 64]]  # size before, crop, size after; winner and loser
    assert (batch["time_ids"] == np.array([ids] * SIZE)).all()
    described = jax.tree.map(lambda x: (x.shape, x.dtype), batch)
    assert described == {
        **{image: ((SIZE, 2, 3, 8), jnp.bfloat16) for image in ("winner", "loser")},
        "text": {"encoder_hidden_states": ((SIZE, 4, 6), jnp.bfloat16), "text_embeds": ((SIZE, 5), jnp.bfloat16)},
        "time_ids": ((SIZE, 2, 6), np.float32),
        "row": ((SIZE,), np.int32),
    }


def test_a_flip_mirrors_both_images_and_their_crops_of_half_of_the_pairs():
    batches = undisturbed(15, count=MANY, batch_size=MANY, flip=True)
    numbers = np.array(rows_of(batches)) - 100.0
    winner, loser = (np.concatenate([batch[name][:, 0, 0, 0] for batch in batches]) for name in ("winner", "loser"))
    flipped = winner - numbers
    assert set(flipped) == {0, 0.5}
    assert (loser == -winner).all()
    lefts = np.concatenate([batch["time_ids"][:, :, 3] for batch in batches])
    assert (lefts == np.array([3, 4]) + 20 * flipped[:, None]).all()
    assert 2 * flipped.mean() == pytest.approx(0.5, abs=0.036)  # three standard errors of 1,800 coins
    assert not any(np.any(batch["winner"] % 1) for batch in undisturbed(5))


def test_captions_are_dropped_for_a_share_of_pairs_and_anew_in_every_epoch():
    share = 0.3
    batches = undisturbed(40, count=MANY, batch_size=MANY, caption_dropout=share, flip=True)
    order = [np.argsort(batch["row"]) for batch in batches]
    dropped = np.array([batch["text"]["text_embeds"][i, 0] == 0 for batch, i in zip(batches, order, strict=True)])
    flipped = np.array([batch["winner"][i, 0, 0, 0] % 1 > 0 for batch, i in zip(batches, order, strict=True)])
    assert dropped.mean() == pytest.approx(share, abs=0.02)  # three standard errors of 4,800 draws
    # Of no pair always or never, and independent of the epoch before, of other pairs and of flips.
    assert dropped.mean(0).min() > 0 and dropped.mean(0).max() < 0.7
    assert (dropped[1:] & dropped[:-1]).mean() == pytest.approx(share**2, abs=0.015)
    assert (dropped[:, 1:] & dropped[:, :-1]).mean() == pytest.approx(share**2, abs=0.015)
    assert (dropped & flipped).mean() == pytest.approx(share / 2, abs=0.02)
    assert all(batch["text"]["text_embeds"].all() for batch in undisturbed(5, caption_dropout=0.0))
    assert not any(batch["text"]["text_embeds"].any() for batch in undisturbed(5, caption_dropout=1.0))


# ----------------------------------------------------------------------------------------------------------------------
# Batches on the devices, and where they stand


def opened(*, count=COUNT, seed=SEED, fingerprint="memory", records=MemoryRecords, **config):
    records = records(count, mirrored=True, fingerprint=fingerprint)
    return PairBatches(records, InputConfig(**read_pairs.CONFIG | config), seed=seed)


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (8, 3)])
def test_batches_are_on_the_device_in_order_whatever_reads_ahead(threads, prefetch):
    with opened(threads=threads, prefetch=prefetch) as batches:
        for wanted, batch in zip(undisturbed(15, **read_pairs.CONFIG), batches, strict=False):
            assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(batch))
            assert same(batch, wanted)


def test_the_state_is_of_batches_handed_out_not_of_those_read_ahead():
    with opened() as batches:
        assert batches.state()["step"] == 0
        for step in range(1, 4):
            next(batches)
            time.sleep(0.05)  # the threads read on
            assert batches.state()["step"] == step
        assert json.loads(json.dumps(batches.state())) == {
            **{"step": 3, "batch_size": SIZE, "seed": SEED, "records": COUNT, "fingerprint": "memory"}
        }


@KINDS
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_a_restored_input_goes_on_with_the_very_pairs_that_remain(stop, records):
    wanted = undisturbed(12, records=records, **read_pairs.CONFIG)
    with opened(records=records) as first:
        for _ in range(stop):
            next(first)
        saved = json.dumps(first.state())
    with opened(records=records) as second:
        next(second)  # what was ahead of it is forgotten
        second.restore(json.loads(saved))
        assert same([next(second) for _ in range(12 - stop)], wanted[stop:])
        second.restore(json.loads(saved))
        assert same(next(second), wanted[stop])


def test_a_closed_input_goes_on_where_it_was():
    wanted = undisturbed(3, **read_pairs.CONFIG)
    batches = opened()
    for batch in wanted:
        assert same(next(batches), batch)
        batches.close()
    batches.close()


class Faulty(MemoryRecords):
    """Its pair 7 cannot be read once."""

    failed = False

    def pair(self, index):
        if index == 7 and not self.failed:
            self.failed = True
            raise OSError("pairs.array_record: cannot be read")
        return super().pair(index)


def test_an_error_of_the_disk_comes_to_the_reader_and_no_batch_is_lost():
    wanted = undisturbed(6, **read_pairs.CONFIG)
    got, errors = [], 0
    with PairBatches(Faulty(COUNT, mirrored=True), InputConfig(**read_pairs.CONFIG), seed=SEED) as batches:
        while len(got) < 6:
            try:
                got.append(next(batches))
            except OSError as error:
                assert "cannot be read" in str(error)
                errors += 1
    assert errors == 1
    assert same(got, wanted)


# ----------------------------------------------------------------------------------------------------------------------
# Processes


def program(*arguments, **environment):
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )


def start(*flags):
    devices = 2 if "--hosts" in flags else 4
    return program(read_pairs.__file__, *flags, JAX_NUM_CPU_DEVICES=str(devices))


def finish(process):
    """What the program said, from which nothing was expected."""
    told, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    return told + errors


def two_hosts(folder, *flags):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    for process in [start(folder / f"{i}.jsonl", "--hosts", f"{address},2,{i}", *flags) for i in range(2)]:
        finish(process)
    return [read(folder / f"{i}.jsonl") for i in range(2)]


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


ALL = range(SIZE)


def check(found, first, last, rows=ALL, records=MemoryRecords):
    """What a host held of steps first ... last - 1 is what these rows of undisturbed batches are."""
    assert [step["step"] for step in found] == list(range(first, last))
    wanted = undisturbed(last, records=records, **read_pairs.CONFIG)
    for step in found:
        batch = wanted[step.pop("step")]
        assert step.pop("sum of rows") == batch["row"].sum()
        leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(batch)}
        assert step.keys() == leaves.keys()
        for name, array in leaves.items():
            assert list(map(int, step[name])) == list(rows)
            for row in rows:
                assert step[name][str(row)] == array[row].astype(float).ravel().tolist(), (name, row)


@KINDS
@pytest.mark.program
def test_a_run_on_two_hosts_goes_on_on_one_and_on_two_with_the_very_pairs_that_remain(tmp_path, records):
    halves, flags = (range(4), range(4, 8)), ["--buckets"] if records is BucketRecords else []
    for name in ("begun", "two"):
        (tmp_path / name).mkdir()
    state = tmp_path / "state.json"
    for i, found in enumerate(two_hosts(tmp_path / "begun", "--state", state, "--steps", 3, *flags)):
        check(found, 0, 3, halves[i], records)
    saved = state.read_text()
    assert json.loads(saved)["step"] == 3
    for i, found in enumerate(two_hosts(tmp_path / "two", "--state", state, "--steps", 7, *flags)):
        check(found, 3, 7, halves[i], records)
    state.write_text(saved)
    finish(start(tmp_path / "one.jsonl", "--state", state, "--steps", 7, *flags))
    check(read(tmp_path / "one.jsonl"), 3, 7, records=records)


def test_hosts_whose_devices_hold_the_same_pairs_read_the_same(tmp_path):
    # The axis `data` of the mesh goes over hosts, `fsdp` over the devices of each: a batch that is divided over the
    # latter alone is whole on every host.
    for found in two_hosts(tmp_path, "--over", "fsdp", "--steps", 2):
        check(found, 0, 2)


@KINDS
def test_workers_read_what_threads_read_and_leave_in_silence(tmp_path, records):
    flags = ["--buckets"] if records is BucketRecords else []
    assert finish(start(tmp_path / "found.jsonl", "--workers", 2, "--steps", 7, *flags)) == ""
    check(read(tmp_path / "found.jsonl"), 0, 7, records=records)


UNCLOSED = """
from encoded_records import MemoryRecords
from flax_pref.data.pipeline import InputConfig, PairBatches
batches = PairBatches(MemoryRecords(5000), InputConfig(batch_size=8), seed=0)
for _ in range(3):
    next(batches)
raise SystemExit(3)
"""


def test_a_program_that_ends_without_closing_its_input_ends_in_silence():
    process = program("-c", UNCLOSED)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 3


@pytest.mark.program
def test_a_killed_run_goes_on_with_the_very_pairs_that_remain(tmp_path):
    state, rng = tmp_path / "state.json", random.Random(0)
    for kill in range(2):
        process = start(tmp_path / f"{kill}.jsonl", "--state", state, "--steps", 10**9)
        before = json.loads(state.read_text())["step"] if state.exists() else 0
        while not state.exists() or json.loads(state.read_text())["step"] < before + 3:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        found = (tmp_path / f"{kill}.jsonl").read_text().splitlines(keepends=True)
        found = [json.loads(line) for line in found if line.endswith("\n")]  # the last may be cut short
        check(found, before, before + len(found))
        # A batch is at most once more read than saved: no gap, and no more than one repeated.
        assert json.loads(state.read_text())["step"] <= before + len(found) <= json.loads(state.read_text())["step"] + 1
    step = json.loads(state.read_text())["step"]
    finish(start(tmp_path / "end.jsonl", "--state", state, "--steps", step + 3))
    check(read(tmp_path / "end.jsonl"), step, step + 3)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"threads": 0}, "threads is 0; expected at least 1"),
        ({"prefetch": 0}, "prefetch is 0; expected at least 1"),
        ({"workers": -1}, "workers is -1; expected at least 0"),
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5; expected a share, 0 to 1"),
        ({"caption_dropout": float("nan")}, "caption_dropout is nan; expected a share"),
    ],
)
def test_a_config_that_cannot_be_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        InputConfig(**{"batch_size": 4} | config)


def test_flips_without_mirror_images_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match="flip needs a set with mirror images; encode it again"):
        PairBatches(MemoryRecords(4), InputConfig(batch_size=2, flip=True), seed=0)


def test_an_empty_set_and_a_seed_out_of_range_are_refused():
    with pytest.raises(ValueError, match="the set has no pairs"):
        PairBatches(MemoryRecords(0), InputConfig(batch_size=2), seed=0)
    with pytest.raises(ValueError, match=r"seed is -1; expected 0 to 2\^32 - 1"):
        PairBatches(MemoryRecords(4), InputConfig(batch_size=2), seed=-1)


def test_a_batch_that_the_devices_cannot_divide_is_refused():
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    with pytest.raises(ValueError, match="a batch of 6 pairs cannot be divided over the devices"):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        PairBatches(MemoryRecords(4), InputConfig(batch_size=6), seed=0, sharding=sharding)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 6}, "seed 6, now 5"),
        ({"batch_size": 4}, "batch_size 4, now 8"),
        ({"count": 22}, "records 22, now 21"),
        ({"fingerprint": "another"}, "fingerprint 'another', now 'memory'"),
    ],
)
def test_the_state_of_another_order_is_refused_with_what_differs(other, message):
    batches = opened()
    with pytest.raises(
        ValueError, match=f"another order of batches: {message}; resume with the data, seed and batch size"
    ):
        batches.restore(opened(**other).state())
    assert batches.state()["step"] == 0


@pytest.mark.parametrize("step", [None, -1, 2.5, "3"])
def test_a_state_without_a_number_of_batches_is_refused(step):
    batches = opened()
    with pytest.raises(ValueError, match="expected a number of batches"):
        batches.restore(batches.state() | {"step": step})


def test_what_is_sent_to_workers_can_be_sent():
    batches = host_batches(MemoryRecords(3), InputConfig(batch_size=2), seed=0, rows=np.arange(2))
    assert same(pickle.loads(pickle.dumps(batches))[3], batches[3])
