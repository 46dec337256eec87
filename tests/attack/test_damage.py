"""Hundreds of damaged inputs through the functions that the programs read with: nothing is lost or changed silently.

Every damage ends in one of these:

- `REFUSED`: one error of one line that names a file.
- `DROPPED`: what is lost is listed, each with its reason, and all else is what it was.
- `SAME`: all values are those of the whole input.
- `OTHER`: a whole file of other content, which its format cannot tell from what was there, e.g. a letter of a caption.
  Only damages that are marked so may end here, and a hash that the programs keep must be another one.
"""

import collections
import contextlib
import hashlib
import io
import random
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.checkpoints.lora import load_lora, lora_network, save_lora
from flax_pref.checkpoints.modules import fingerprint
from flax_pref.checkpoints.weights import open_tensors
from flax_pref.config import UserError
from flax_pref.data.encode import account, digests, image_digest
from flax_pref.data.images import decode_image
from flax_pref.data.pairs import Drop, pairs
from flax_pref.data.prepared import PreparedSet, caption_features, describe, pair_features, shard_name, write_shard
from flax_pref.data.prompts import Prompt, read_prompts
from flax_pref.data.selection import Choice, select
from flax_pref.data.sources import Source, open_source
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.evaluation.runs import open_run, read_image
from flax_pref.evaluation.scoring import Scores
from flax_pref.images.image_set import ImageSet, Item
from flax_pref.models.lora import select_lora, split_lora
from flax_pref.models.presets import FAMILIES
from tests.attack.damage import DAMAGES, PROMPTS, Damage
from tests.data.preference_sets import examples, write_hpdv2, write_pair_folder, write_pick_a_pic, write_tars
from tests.training.tiny import tiny_checkpoint, tiny_set

REFUSED, DROPPED, SAME, OTHER = "refused", "dropped", "same", "other"
SECONDS = 10
# Begins of messages that programs put the name of the file before, or the list of what was dropped behind.
SOURCES = ("NoiseSchedule:", "scheduler_config:", "solver:", "no pair is left of ")


class Found(NamedTuple):
    """What was read.

    Attributes:
        items: a digest of the value of each thing.
        drops: reasons of what was left out.
        identity: the hash that the programs keep of the input, "" if none.
    """

    items: dict[str, str]
    drops: list[str] = []  # noqa: RUF012
    identity: str = ""


def digest(*values) -> str:
    """SHA-256 of arrays, texts and numbers."""
    sha256 = hashlib.sha256()
    for value in values:
        array = np.asarray(value)
        sha256.update(f"{array.dtype} {array.shape} ".encode())
        sha256.update(array.tobytes() if array.dtype != object else repr(value).encode())
    return sha256.hexdigest()


def tree_digest(tree) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return digest(*(value for path, leaf in leaves for value in (str(path), np.asarray(leaf))))


# ----------------------------------------------------------------------------------------------------------------------
# One whole example of each format, and how the programs read it


def read_pairs(layout):
    """As train.encode reads a set, up to the networks."""

    def read(folder):
        reader = open_source(Source(layout=layout, path=str(folder)))
        selection = select(reader, Choice())
        drops = [drop.reason for drop in selection.drops.values()]
        items, images = {}, hashlib.sha256()
        for pair in pairs(reader, selection.rows):
            images.update(image_digest(pair).encode())
            if isinstance(pair, Drop):
                drops.append(pair.reason)
                continue
            decoded = [decode_image(data) for data in (pair.winner, pair.loser)]
            if broken := [image for image in decoded if isinstance(image, Drop)]:
                drops.append(broken[0].reason)
                continue
            value = (pair.caption, *map(np.asarray, decoded), pair.confidence, pair.margin)
            items[f"{pair.winner_id} over {pair.loser_id}"] = digest(*value)
        assert len(reader) == len(items) + len(drops) + selection.ties
        if not items:
            account(selection, 0, dict(enumerate(Drop(reason) for reason in drops)))
        assert all(reason and "\n" not in reason for reason in drops)
        return Found(items, drops, f"{digests(selection)} {images.hexdigest()}")

    return read


def read_pipeline(folder):
    pipeline = load_pipeline(folder)
    networks = {"unet": pipeline.unet, "vae": pipeline.vae, "text": pipeline.text_encoders[0]}
    items = {
        name: digest(tree_digest(network.params), network.graphdef.__repr__()) for name, network in networks.items()
    }
    items["vae"] = digest(items["vae"], pipeline.vae.config.scaling_factor)
    items["ids"] = digest(pipeline.tokenizers[0](["a cat, a dog", "the sea <toy>", ""]))
    items["empty"] = digest(pipeline.force_zeros_for_empty_prompt)
    schedule = NoiseSchedule.from_dict(pipeline.scheduler_config)
    items["schedule"] = digest(*(str(value) for value in vars(schedule).values()))
    solver = solver_from_config(pipeline.scheduler_config, 4)
    items["solver"] = digest(repr(jax.tree.map(np.asarray, solver)))
    parts = ("unet", "vae", "text_encoder", "tokenizer")
    return Found(items, [], " ".join(fingerprint(folder / part) for part in parts))


def read_prompts_of(folder):
    names = sorted(path for path in folder.iterdir() if path.suffix.lower() not in (".gz", ".part", ".incomplete"))
    benchmark = len(list(folder.iterdir())) > 1
    return Found({str(prompt.id): prompt.text for prompt in read_prompts(folder if benchmark else names[0])})


def read_lora_of(name):
    def read(folder):
        lora, rank, alpha = load_lora(folder / name if name else folder, _unet())
        return Found(
            {"lora": digest(tree_digest(lora), rank, alpha)}, [], fingerprint(folder / name if name else folder)
        )

    return read


def read_prepared(folder):
    records = PreparedSet(folder)
    items = {"size": digest(records.image_size)}
    for i in range(len(records)):
        pair = records.pair(i)
        items[f"pair {i}"] = digest(*(value for name in sorted(pair) for value in (name, np.asarray(pair[name]))))
    for i in range(4):
        items[f"caption {i}"] = digest(
            records.text(i), *(np.float32(value) for value in records.conditioning(i).values())
        )
    return Found(items, [], records.fingerprint)


def read_images(folder):
    """As sample.score reads a set."""
    run = open_run(folder)
    scores = Scores(run)
    scores.look_again()
    items, drops = {}, []
    for place, row in zip(scores.images, run.rows.to_pylist(), strict=True):
        found = read_image(run.folder, place)
        if isinstance(found, str):
            drops.append(found)
        else:
            items[f"{row['prompt_id']} {row['seed']}"] = digest(row["prompt"], found)
    return Found(items, drops)


def read_torch(folder):
    with open_tensors(folder / "weights.pt") as tensors:
        return Found({name: digest(tensors.get_tensor(name)) for name in tensors.keys()})  # noqa: SIM118 (no dict)


_NETWORKS = {}


def _unet():
    return _NETWORKS["unet"]


def write_prepared(folder, seed=0, shards=(4, 2)):
    """A prepared set of two shards, as `tiny_set` in one."""
    whole = tiny_set(folder.parent / f"{folder.name} whole {seed}", "sd15", pairs=sum(shards))
    records = PreparedSet(whole)
    metadata = records.metadata | {"settings": records.metadata["settings"] | {"seed": seed, "shard_size": shards[0]}}
    numbers = records._pairs
    (folder / "pairs").mkdir(parents=True)
    shutil.copytree(whole / "captions", folder / "captions")
    start = 0
    for number, count in enumerate(shards):
        some = [dict(numbers[i]) for i in range(start, start + count)]
        for i, record in enumerate(some):
            # Rows 0, 1, ... as in sets of two shards of `shard_size` rows.
            record["row"] = np.int64(number * shards[0] + i)
            if seed:
                record["winner"], record["loser"] = record["loser"], record["winner"]
        write_shard(folder / "pairs" / shard_name("pairs", number, len(shards)), pair_features(records.shapes), some)
        start += count
    describe(folder / "pairs", pair_features(records.shapes), shards, metadata)
    describe(folder / "captions", caption_features(records.shapes), [6], metadata)
    shutil.rmtree(whole)


def write_images(folder):
    items = [Item(Prompt(i, text, "", {"prompt": text}), seed) for i, text in enumerate(PROMPTS[:3]) for seed in (0, 1)]
    images = ImageSet(folder, items, {"steps": 2}, layout="webdataset")
    images.begin()
    rng = np.random.default_rng(0)
    images.write(range(len(items)), rng.integers(0, 256, (len(items), 16, 16, 3), np.uint8))
    images.finish()


def write_lora(folder, layout="diffusers"):
    if "unet" not in _NETWORKS:
        checkpoint = folder.parent / "checkpoint of the LoRA"
        _NETWORKS["unet"] = load_pipeline(tiny_checkpoint(checkpoint, "sd15")).unet
    network = lora_network(_unet(), ("dpo",), rank=2, alpha=4, key=jax.random.key(0))
    _, lora = split_lora(network.params)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda leaf: leaf + rng.standard_normal(leaf.shape, np.float32), select_lora(lora, 0))
    if layout == "diffusers":
        folder.mkdir(parents=True)
    save_lora(lora, folder / "lora.safetensors" if layout == "diffusers" else folder, alpha=4, layout=layout)


def write_torch(folder):
    torch = pytest.importorskip("torch")
    folder.mkdir(parents=True)
    torch.save({"a": torch.arange(200.0), "b": torch.ones(3, 5, dtype=torch.float16)}, folder / "weights.pt")


def write_prompts(folder):
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("".join(f"{text}\n" for text in PROMPTS))


ROWS = examples(6)
FORMATS = {
    # Larger than the zeros that a tar file may end with.
    "tar": (lambda folder: write_tars(folder, examples(6, size=(400, 480))), read_pairs("webdataset")),
    "parquet": (lambda folder: write_pick_a_pic(folder, ROWS), read_pairs("pick_a_pic")),
    "jsonl": (lambda folder: write_pair_folder(folder, ROWS), read_pairs("folder")),
    "json": (lambda folder: write_hpdv2(folder, ROWS) and folder, read_pairs("hpdv2")),
    "prompts": (write_prompts, read_prompts_of),
    "safetensors": (lambda folder: tiny_checkpoint(folder, "sd15"), read_pipeline),
    "lora": (write_lora, read_lora_of("lora.safetensors")),
    "tokenizer": (lambda folder: tiny_checkpoint(folder, "sd15"), read_pipeline),
    "config": (lambda folder: tiny_checkpoint(folder, "sd15"), read_pipeline),
    "sdxl": (lambda folder: tiny_checkpoint(folder, "sdxl"), read_pipeline),
    "peft": (lambda folder: write_lora(folder, "peft"), read_lora_of("")),
    "prepared": (write_prepared, read_prepared),
    "images": (write_images, read_images),
    "torch": (write_torch, read_torch),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole(format)`: the folder of a whole example, and what is read of it."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("whole") / name
            write, read = FORMATS[name]
            write(folder)
            if name == "prepared":
                write_prepared(folder.parent / "another", seed=1)
            made[name] = folder, read(folder)
        return made[name]

    return get


# ----------------------------------------------------------------------------------------------------------------------
# Attacks


class Hangs(BaseException):
    """A damaged input takes too long."""


@contextlib.contextmanager
def limited(seconds):
    def late(*_):
        raise Hangs(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def listing(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def outcome(name: str, damage: Damage, seed: int, whole, tmp_path: Path) -> tuple[str, str]:
    """What came of a damaged input, and what was told; a finding is an AssertionError."""
    intact, expected = whole(name)
    folder = tmp_path / "set"
    shutil.copytree(intact, folder, symlinks=True)
    if name == "prepared":
        shutil.copytree(intact.parent / "another", tmp_path / "another")
    damage.make(folder, random.Random(f"{name} {damage.name} {seed}"))
    before, begun, told = listing(folder), time.monotonic(), io.StringIO()
    try:
        with limited(SECONDS), contextlib.redirect_stderr(told):
            found = FORMATS[name][1](folder)
    except (UserError, ValueError, OSError) as error:
        text = str(error)
        assert type(error) in (UserError, ValueError) or isinstance(error, OSError), repr(error)
        assert "\n" not in text.strip(), f"several lines: {text!r}"
        assert len(text) < 1500, f"{len(text)} letters: {text[:300]}"
        assert str(folder) in text or text.startswith(SOURCES), f"names no file: {type(error).__name__}: {text}"
        assert listing(folder) == before, "something was written"
        return REFUSED, text
    assert listing(folder) == before, "something was written"
    assert time.monotonic() - begun < SECONDS
    warned = "".join(line for line in told.getvalue().splitlines(True) if "reading judgements" not in line)
    if found.items == expected.items:
        return SAME, warned
    lost = expected.items.keys() - found.items.keys()
    other = {key for key, value in found.items.items() if expected.items.get(key) != value}
    if not other:
        if name == "jsonl" and found.drops == ["not JSON"]:
            return DROPPED, "one line that holds several rows"  # it is listed; how many were meant, nobody knows
        said = len(found.drops) + ("files" in warned and str(folder) in warned) * len(lost)
        assert said >= len(lost), f"lost without a word: {sorted(lost)[:5]}; drops {found.drops}, told {warned!r}"
        return DROPPED, "; ".join([*found.drops, warned.strip()])
    assert damage.whole, f"changed without a word: {sorted(other)[:5]}; lost {sorted(lost)[:5]}; drops {found.drops}"
    assert found.identity != expected.identity, "changed, and no hash tells"
    assert len(found.drops) + len(other) >= len(lost)
    return OTHER, ""


CASES = [(name, damage, seed) for name in FORMATS for damage in DAMAGES[name] for seed in range(damage.seeds)]


def test_the_attack_is_large_enough():
    assert len(CASES) >= 200 and DAMAGES.keys() == FORMATS.keys()
    for name, damages in DAMAGES.items():
        assert len({damage.name for damage in damages}) == len(damages), name


def attack(name, cases, whole, tmp_path):
    """All damages of a format; a finding does not hide the others."""
    counts, findings = collections.Counter(), []
    for number, (_, damage, seed) in enumerate(cases):
        place = tmp_path / str(number)
        place.mkdir()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                result, told = outcome(name, damage, seed, whole, place)
            counts[result] += 1
            print(f"{name:11} {result:8} {damage.name} {seed}: {told[:400].replace(str(place), '')}")
        except (Exception, Hangs) as error:
            findings.append(f"{name}, {damage.name}, seed {seed}: {type(error).__name__}: {error}"[:600])
        shutil.rmtree(place, ignore_errors=True)
    print(f"{name}: {len(cases)} inputs, " + ", ".join(f"{count} {result}" for result, count in counts.items()))
    assert not findings, "\n".join([f"{len(findings)} findings", *findings])
    return counts


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_no_damage_is_silent(name, whole, tmp_path):
    counts = attack(name, [case for case in CASES if case[0] == name], whole, tmp_path)
    assert counts[REFUSED] + counts[DROPPED] >= 3


# Damages that were silent, or ended in a traceback or not at all, when they were first tried.
FOUND = {
    "tar": [
        *(
            "a_sample_is_there_again_at_the_end",
            "a shard with its suffix in capitals",
            "a compressed shard among others",
        ),
        *("a shard that a download has not finished", "a global name by pax", "a caption with a mark"),
        *("a caption in UTF-16 without a mark", "a caption of Windows", "a caption with zeros"),
        "JSON with contradicting labels",
    ],
    "parquet": [
        *("a caption with a mark", "a caption of UTF-16", "a column twice", "a label column twice"),
        *("a file with its suffix in capitals", "a file that a download has not finished", "a file that is missing"),
    ],
    "jsonl": [
        *("keys that swap", "an escaped zero", "an escaped mark", "the same two files by other names"),
        *("a confidence of 7", "a confidence of -1", "pairs.jsonl is a second half of zeros", "UTF-16"),
    ],
    "json": ["preferences that contradict", "a prompt with an escaped zero"],
    "prompts": [
        *("txt in UTF-16 without a mark", "txt with zeros at the end", "csv with a column twice"),
        *("tsv with a column twice", "json with a key twice", "jsonl with a key twice", "parquet with a column twice"),
        *("parquet with a zero", "a benchmark with a suffix in capitals", "a benchmark that is not downloaded"),
    ],
    "safetensors": [
        *("a dtype of 8 bits", "numbers of float64 beyond float32", "a shard somewhere else"),
        "a shard by an absolute name",
    ],
    "tokenizer": [
        *("vocab with ids of 2^32", "vocab with an empty token", "vocab without the start", "merges with zeros"),
        "vocab with a token twice",
    ],
    "config": ["vae with a key twice"],
    "sdxl": ["force_zeros_for_empty_prompt of 'false'"],
    "peft": ["alpha twice"],
    "prepared": [
        *("pairs of another set", "captions of another set", "a shard of another set", "captions and pairs swapped"),
        *("lengths that are fewer", "a size in metadata of a text", "features without one", "features is a FIFO"),
    ],
    "images": [
        *("a row less", "a file of 5000 letters", "a file that is a FIFO", "an offset beyond", "manifest is a FIFO"),
        "shard is a FIFO",
    ],
}


@pytest.mark.parametrize("name", FOUND)
def test_damage_that_was_silent_once_is_told(name, whole, tmp_path):
    cases = [case for case in CASES if case[0] == name and case[1].name in FOUND[name]]
    assert len(cases) == len(FOUND[name])
    attack(name, cases, whole, tmp_path)


def test_a_scheduler_of_truth_values_that_are_none_is_refused():
    for value in ("false", 0, [], {}):
        with pytest.raises(ValueError, match=r"set_alpha_to_one=.* is not supported; supported: True or False"):
            solver_from_config(FAMILIES["sd15"].scheduler_config | {"set_alpha_to_one": value}, 4)
