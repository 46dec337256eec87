"""Whole runs of tiny networks, in this process; as programs, killed and on several hosts: test_train_modules.py."""

import contextlib
import dataclasses
import json
import re
import resource
import shutil
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import recorded, saved_arrays, tiny_run, tiny_set, tiny_world

from flax_pref.checkpoints.diffusers import load_unet
from flax_pref.config import UserError, run_main
from flax_pref.data.consensus import Consensus
from flax_pref.data.pair_scores import PairScores, scores_file, write_scores
from flax_pref.data.pipeline import InputConfig
from flax_pref.data.prepared import CAPTIONS, PAIRS, PreparedSet
from flax_pref.files import one_writer
from flax_pref.methods import CHATS, SDPO, DiffusionDPO, DiffusionNFT, PairMethod, PositiveNegative
from flax_pref.models.lora import split_lora
from flax_pref.rewards.reward import Weighted
from flax_pref.training import trainer
from flax_pref.training.export import ExportConfig
from flax_pref.training.networks import LoRA
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.records import Recorder
from flax_pref.training.rollouts import RolloutConfig
from flax_pref.training.samples import SampleConfig
from flax_pref.training.sources import OnlineConfig
from flax_pref.training.trainer import CheckpointConfig, ProfileConfig, check_batch, train
from train import modules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pull(PairMethod):
    """Adapters are pulled to a noisy mean of the batch: a method whose step is compiled at once."""

    strength: float = 1.0

    modules: ClassVar[tuple[str, ...]] = ("pos",)
    reference: ClassVar[bool] = False

    def loss(self, predict: Any, batch: Any, key: Any, *, schedule: Any, empty: Any) -> tuple:
        return pull(predict, batch, key, strength=self.strength)


def pull(predict, batch, key, *, strength):
    (member,) = predict.members
    target = batch["winner"].mean() + jax.random.normal(key)
    loss = strength * sum(jnp.mean((leaf - target) ** 2) for leaf in jax.tree.leaves(split_lora(member.params)[1]))
    return loss, {"loss": loss}


@pytest.fixture(autouse=True)
def no_peak(monkeypatch):
    """To measure it takes longer than the runs."""
    monkeypatch.setattr(trainer, "peak_of", lambda device, dtype: (None, "not measured"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("world"), "sd15", "sdxl")


@pytest.fixture
def run(world, tmp_path):
    """Makes runs with the method above, in folders of this test."""

    def make(name="run", **changes):
        return tiny_run(tmp_path / name, world, **{"method": Pull(), "input": InputConfig(batch_size=4)} | changes)

    return make


def train_again(config, **changes):
    config = dataclasses.replace(config, **changes)
    train(config)
    return config


def trained(config, step=None):
    """Parameters of the adapters in a checkpoint."""
    arrays = saved_arrays(config.output, step or config.steps)
    return {name: array for name, array in arrays.items() if ".params" in name}


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def checkpoints_of(config):
    return sorted(int(path.name) for path in (config.output / "checkpoints").iterdir() if path.name.isdecimal())


# ----------------------------------------------------------------------------------------------------------------------
# What a run does


@pytest.fixture(scope="module")
def dpo(world, tmp_path_factory):
    """A run of Diffusion-DPO, with what it printed."""
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "tell", told.append)
        config = tiny_run(
            tmp_path_factory.mktemp("dpo") / "run",
            world,
            optimizer=OptimizerConfig(learning_rate=0.01, schedule="cosine", warmup_steps=1),
            steps=6,
            checkpoints=CheckpointConfig(every=2, keep=2, keep_every=4),
            profile=ProfileConfig(first=2, steps=1),
            export=ExportConfig(every=4),
        )
        train(config)
    return config, "\n".join(told)


def test_a_run_says_at_its_start_what_it_takes(dpo):
    _, told = dpo
    assert re.search(r"^mesh data=\d+: \d+ cpu on 1 host$", told, re.MULTILINE)
    assert re.search(r"^ +numbers +in all +per device$", told, re.MULTILINE)
    for name, numbers in (("base", "12,300"), ("modules", "256"), ("optimizer", "514")):
        assert re.search(rf"^{name} +{numbers} ", told, re.MULTILINE), told


def test_a_run_leaves_metrics_checkpoints_modules_and_a_profile(dpo):
    config, _ = dpo
    lines = recorded(config.output)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    expected = {"loss", "accuracy", "winner", "loser", "gradient_norm", "learning_rate", "skipped", "step_seconds"}
    assert expected | {"pairs_per_second_per_chip", "model_tflops"} <= lines[-1].keys()
    assert abs(lines[0]["loss"] - np.log(2)) < 1e-3, "adapters begin as the base"
    np.testing.assert_allclose([line["learning_rate"] for line in lines[:2]], [0.005, 0.01])
    assert len({line["loss"] for line in lines}) == 6
    assert json.loads((config.output / "config.json").read_text())["steps"] == 6
    assert checkpoints_of(config) == [4, 6]
    assert list((config.output / "profile").rglob("*.xplane.pb"))
    assert (config.output / "modules" / "step_000004" / "dpo.safetensors").exists()
    assert any(
        np.abs(array).max() > 0 for name, array in load_file(config.output / "modules" / "dpo.safetensors").items()
    )


def test_weights_of_sdxl_are_trained_with_adafactor_in_parts_and_their_average_is_written(world, tmp_path):
    config = tiny_run(
        tmp_path / "run",
        world,
        "sdxl",
        method=PositiveNegative(train="pos"),
        weights="full",
        optimizer=OptimizerConfig(name="adafactor", learning_rate=0.01),
        accumulation=2,
        average_decay=0.5,
        steps=2,
    )
    train(config)
    saved = saved_arrays(config.output, 2)
    for path, leaf in jax.tree.leaves_with_path(load_unet(config.output / "modules" / "pos").params):
        average, last = (
            saved[f"['train'].{part}['pos']{jax.tree_util.keystr(path)}"] for part in ("average", "params")
        )
        np.testing.assert_array_equal(leaf, average)
        assert not np.array_equal(leaf, last)
    lines = recorded(config.output)
    assert all(np.isfinite(line["loss"]) and line["skipped"] == 0 for line in lines)
    # Another run begins with them.
    begun = train_again(config, output=tmp_path / "next", init_from=config.output / "modules", steps=1)
    assert recorded(begun.output)[0]["step"] == 1


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_a_module_trained_beside_another_is_the_one_trained_alone(world, tmp_path, weights):
    """Whatever the other's gradients are: here all are clipped."""
    both, alone = (
        tiny_run(
            tmp_path / name,
            world,
            method=PositiveNegative(train=name),
            weights=weights,
            optimizer=OptimizerConfig(learning_rate=0.01, clip_norm=1e-3, epsilon=1e-3),
            steps=2,
        )
        for name in ("both", "neg")
    )
    train(both)
    train(alone)
    file = "neg.safetensors" if weights == "lora" else "neg/diffusion_pytorch_model.safetensors"
    here, there = (load_file(config.output / "modules" / file) for config in (both, alone))
    for name, expected in there.items():
        np.testing.assert_allclose(here[name], expected, rtol=1e-4, atol=1e-6)
    line = recorded(both.output)[0]
    assert line["gradient_norm"] > line["neg_gradient_norm"] > 1e-3
    np.testing.assert_allclose(line["neg_gradient_norm"], recorded(alone.output)[0]["gradient_norm"], rtol=1e-4)


@pytest.fixture(scope="module")
def buckets(world):
    """Prepared sets with pairs of 12 x 20 and 16 x 16 pixels, which take turns."""
    return {
        family: tiny_set(world / f"{family}-buckets", family, size=(16, 16), buckets=((12, 20),))
        for family in ("sd15", "sdxl")
    }


def test_the_step_of_each_size_is_compiled_once_and_has_work_of_its_own(run, buckets, monkeypatch):
    told, added, add = [], [], Recorder.add

    def adds(recorder, step, metrics, flops=None):
        added.append(flops)
        return add(recorder, step, metrics, flops)

    monkeypatch.setattr(trainer, "tell", told.append)
    monkeypatch.setattr(Recorder, "add", adds)
    config = run(method=DiffusionDPO(beta=100.0), data=buckets["sd15"], steps=12)
    train(config)
    (second,) = [line for line in told if line.startswith("the step for ")]  # the first has a table
    assert re.fullmatch(r"the step for 16 x 16 takes [\d.]+ [KM]iB per device", second)
    assert "pairs of 2 sizes in pixels (height x width): 12 of 12 x 20, 12 of 16 x 16" in told
    assert len(added) == 12 and len(set(added)) == 2 and added[:2] * 6 == added
    # What grows with the latents has 8 x 8 for 6 x 10.
    assert 1 < added[1] / added[0] < 1.3
    lines = recorded(config.output)
    assert [line["step"] for line in lines] == list(range(1, 13))
    # A step that was compiled first has no time, nor has the one that followed nothing.
    assert [line["step_seconds"] is None for line in lines] == [True, True] + 10 * [False]
    assert all(line["model_tflops"] > 0 for line in lines[2:])


def test_a_run_on_several_sizes_goes_on_bit_by_bit(run, buckets):
    calm = run("calm", data=buckets["sd15"], steps=7)
    train(calm)
    killed = dataclasses.replace(calm, output=calm.output.with_name("killed"), steps=4)
    train(killed)
    train(dataclasses.replace(killed, steps=7))
    assert equal(trained(calm), trained(killed, 7))
    one, other = (recorded(config.output) for config in (calm, killed))
    assert [line["loss"] for line in one] == [line["loss"] for line in other]


def test_sdxl_learns_from_several_sizes_in_parts_of_a_batch(world, buckets, tmp_path):
    config = tiny_run(tmp_path / "run", world, "sdxl", data=buckets["sdxl"], accumulation=2, steps=3)
    train(config)
    lines = recorded(config.output)
    assert abs(lines[0]["loss"] - np.log(2)) < 1e-3 and len({line["loss"] for line in lines}) == 3
    assert all(line["skipped"] == 0 for line in lines)


def test_buckets_that_the_autoencoder_or_the_mesh_cannot_take_are_refused_before_anything_is_loaded(
    run, world, monkeypatch
):
    odd = tiny_set(world / "odd", "sd15", buckets=((14, 18),))
    for name in (PAIRS, CAPTIONS):  # half latents
        file = odd / name / "metadata.json"
        file.write_text(file.read_text().replace("14", "13"))
    monkeypatch.setattr(trainer.Run, "_load_base", None)
    with pytest.raises(ValueError, match=r"odd: size=\(13, 18\): height and width must be multiples of 2"):
        train(run("odd", data=odd))
    with pytest.raises(ValueError, match=r"a batch of 4 cannot be divided over accumulation=1 and the mesh 'data=3'"):
        check_batch(run(data=odd, mesh="data=3"), jax.sharding.AbstractMesh((3,), ("data",)))


def test_a_second_program_does_not_write_into_the_folder_of_a_run(run):
    config = run()
    config.output.mkdir()
    with one_writer(config.output), pytest.raises(UserError, match=r"run: another program writes into this folder \("):
        train(config)
    assert not list(config.output.glob("[!.]*"))


def test_samples_are_of_the_same_noise_and_of_the_networks_as_they_are(run, monkeypatch):
    drawn = []
    images = Recorder.images
    monkeypatch.setattr(
        Recorder, "images", lambda self, step, x, names: (drawn.append(x.copy()), images(self, step, x, names))
    )
    samples = SampleConfig(every=2, prompts=("a cat", "the sea"), steps=2, guidance_scale=3.0)
    still = run("still", optimizer=OptimizerConfig(learning_rate=1e-30), samples=samples)
    train(still)
    assert {path.name for path in (still.output / "samples").iterdir()} == {"000002.png", "000004.png"}
    moved = run("moved", optimizer=OptimizerConfig(learning_rate=0.3), samples=samples)
    train(moved)
    same, again, *others = drawn
    assert same.shape == (2, 16, 16, 3) and same.dtype == np.uint8
    assert np.array_equal(same, again)
    assert not np.array_equal(same[0], same[1])
    assert not np.array_equal(same, others[0]) and not np.array_equal(*others)


def test_the_average_is_what_is_written(run):
    config = run(average_decay=0.9)
    train(config)
    saved = saved_arrays(config.output, 4)
    averages = np.concatenate([x.ravel() for name, x in saved.items() if ".average" in name and "lora_b" in name])
    written = load_file(config.output / "modules" / "pos.safetensors")
    found = np.concatenate([x.ravel() for name, x in written.items() if "lora_B" in name or "up" in name.split(".")])
    np.testing.assert_allclose(np.sort(found), np.sort(averages))


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_the_old_policy_of_nft_draws_and_follows_after_each_iteration(world, tmp_path, weights):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    config = tiny_run(
        tmp_path / "run",
        world,
        method=DiffusionNFT(steps=2, images_per_prompt=2, trained_share=1.0, ramp=0.1, limit=0.3),
        **{"data": None, "input": None, "weights": weights},
        online=OnlineConfig(
            prompts=str(prompts),
            rewards=(Weighted("compressibility"),),
            rollouts=RolloutConfig(prompts=2, at_once=2, batch_size=4),  # two minibatches of eight examples
            size=(16, 16),
        ),
        steps=4,
        checkpoints=CheckpointConfig(every=1, keep=4),
    )
    train(config)
    saved = {step: saved_arrays(config.output, step) for step in (1, 2, 3, 4)}
    names = [name for name in saved[1] if ".params" in name]
    changed = 0
    for name in names:
        old = name.replace(".params", ".average")
        new = {step: saved[step][name] for step in saved}
        np.testing.assert_allclose(saved[2][old], 0.2 * saved[1][old] + 0.8 * new[2], rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(saved[3][old], saved[2][old])
        np.testing.assert_allclose(saved[4][old], 0.3 * saved[3][old] + 0.7 * new[4], rtol=1e-5, atol=1e-7)
        changed += not np.array_equal(new[4], new[1])
    assert changed
    # The new policy is what is written.
    if weights == "lora":
        written = load_file(config.output / "modules" / "nft.safetensors")
        found = np.concatenate([x.ravel() for name, x in written.items() if "lora_B" in name])
        news = np.concatenate([saved[4][name].ravel() for name in names if "lora_b" in name])
        np.testing.assert_allclose(np.sort(found), np.sort(news))
    lines = recorded(config.output)
    assert lines[0]["old_distance"] < 1e-12 < lines[1]["old_distance"], "before the first update both are the base"
    assert all(np.isfinite(line["loss"]) for line in lines)


# ----------------------------------------------------------------------------------------------------------------------
# Runs that go on


def test_a_run_goes_on_bit_by_bit_and_can_be_made_longer(run):
    undisturbed, parted = run("undisturbed", steps=6, average_decay=0.5), run("parted", steps=2, average_decay=0.5)
    train(undisturbed)
    for steps in (2, 3, 6):
        train_again(parted, steps=steps)
    assert equal(*(saved_arrays(config.output, 6) for config in (undisturbed, parted)))
    one, other = (recorded(config.output) for config in (undisturbed, parted))
    assert [line["step"] for line in other] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in one] == [line["loss"] for line in other]
    one, other = ((config.output / "modules" / "pos.safetensors").read_bytes() for config in (undisturbed, parted))
    assert one == other


def test_a_finished_run_is_not_trained_again(run, capsys):
    config = run()
    train(config)
    before = recorded(config.output), trained(config)
    train(config)
    assert recorded(config.output) == before[0] and equal(trained(config), before[1])


def test_a_run_with_changed_settings_is_refused_and_they_are_named(run):
    config = run()
    train(config)
    changes = {
        "optimizer.learning_rate=0.01, now optimizer.learning_rate=0.02": {
            "optimizer": OptimizerConfig(learning_rate=0.02)
        },
        "method.strength=1.0, now method.strength=2.0": {"method": Pull(strength=2.0)},
        "lora.rank=2, now lora.rank=4": {"lora": LoRA(rank=4)},
        "seed=0, now seed=1": {"seed": 1},
        "input.batch_size=4, now input.batch_size=8": {"input": InputConfig(batch_size=8)},
    }
    for message, change in changes.items():
        with pytest.raises(UserError, match=re.escape(message)) as error:
            train_again(config, **change)
        assert "--init-from" in str(error.value)
    # What the steps do not depend on may change.
    train_again(config, steps=5, record_every=2, samples=SampleConfig(), input=InputConfig(batch_size=4, threads=1))


def test_a_run_begins_with_the_modules_of_another_or_with_exported_ones(run):
    first = run("first")
    train(first)
    tiny = {"optimizer": OptimizerConfig(learning_rate=1e-30), "steps": 1}
    for name, source in (("run", first.output), ("modules", first.output / "modules")):
        begun = run(f"from {name}", init_from=source, average_decay=0.5, **tiny)
        train(begun)
        assert equal(trained(begun), trained(first))
        averages = {name: x for name, x in saved_arrays(begun.output, 1).items() if ".average" in name}
        for name, x in averages.items():
            np.testing.assert_allclose(x, trained(first)[name.replace(".average", ".params")], rtol=1e-6)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("nothing", {}, "nothing"),
        ("first", {"lora": LoRA(rank=4)}, r"saved with .*\[1, \d+, 2\].*; expected the modules, adapters and model"),
        ("first/modules", {"lora": LoRA(rank=4)}, "modules of other layers, rank or size"),
        ("first/modules", {"weights": "full"}, "pos"),
    ],
)
def test_what_a_run_cannot_begin_with_is_one_clear_line(run, tmp_path, source, changes, message):
    train(run("first", steps=1))
    with pytest.raises((UserError, ValueError, OSError), match=message) as error:
        train(run(init_from=tmp_path / source, **changes))
    assert len(str(error.value)) < 1000 and source.split("/")[0] in str(error.value)


def test_ten_steps_in_a_row_that_are_not_finite_end_a_run_and_leave_what_was_good(run, monkeypatch):
    config = run(steps=3, checkpoints=CheckpointConfig(every=1))
    train(config)
    good, pair = trained(config), PreparedSet.pair
    with monkeypatch.context() as patch:
        patch.setattr(PreparedSet, "pair", lambda self, i: pair(self, i) | {"winner": np.nan * pair(self, i)["winner"]})
        with pytest.raises(FloatingPointError, match=r"10 steps in a row, up to step 13, .*lower optimizer.learning-"):
            train_again(config, steps=40)
    newest = checkpoints_of(config)[-1]
    assert newest < 3 + 10 and equal(trained(config, newest), good)
    assert not any(line["step"] > 16 for line in recorded(config.output))
    # With data that is good again the run goes on; or another begins with its weights and other settings.
    train_again(config, steps=newest + 2)
    lines = recorded(config.output)
    assert lines[-1]["step"] == newest + 2 and lines[-1]["skipped_in_a_row"] == 0 and np.isfinite(lines[-1]["loss"])
    gentle = run("gentle", init_from=config.output, optimizer=OptimizerConfig(learning_rate=1e-5), steps=2)
    train(gentle)
    assert np.isfinite(recorded(gentle.output)[-1]["loss"])


def test_export_only_writes_the_modules_of_the_newest_checkpoint(run):
    config = run()
    with pytest.raises(UserError, match="no checkpoint that is whole; expected one to write modules of"):
        train_again(config, export_only=True)
    train(config)
    file = config.output / "modules" / "pos.safetensors"
    before = file.read_bytes()
    file.unlink()
    train_again(config, export_only=True, steps=40)
    assert file.read_bytes() == before
    assert any(name.startswith("lora_unet_") for name in load_file(file.with_name("pos_kohya.safetensors")))
    train_again(config, export_only=True, export=ExportConfig(layout=("merged", "peft")))
    assert (config.output / "modules" / "pos_peft" / "adapter_config.json").exists()
    assert (config.output / "modules" / "pos" / "config.json").exists()
    assert checkpoints_of(config) == [4]


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiffusionDPO(beta=0.0), "DiffusionDPO: beta is 0.0; expected a positive number"),
        (lambda: SDPO(mu=2.0), "SDPO: mu is 2.0; expected 0 to 1"),
        (lambda: CHATS(dropout=1.5), "CHATS: dropout is 1.5; expected 0 to 1"),
        (lambda: LoRA(rank=0), "lora: rank=0"),
        (lambda: SampleConfig(every=5), "samples: every=5 with 0 prompts"),
    ],
)
def test_a_number_out_of_range_is_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_damaged_shard_is_one_line_that_names_it(run, world, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(world / "sd15-pairs", tmp_path / "pairs")
    (file,) = (folder / "pairs").glob("*array_record*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    monkeypatch.setattr("sys.argv", ["train.modules"])
    assert run_main(lambda _: train(run(data=folder))) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: {file}: damaged (") and told.endswith("; copy it again, or encode the set again")


@pytest.mark.parametrize(
    ("function", "named", "resumes"),
    [
        ("dump_config", "config.json", False),
        ("RunCheckpoints.save", "checkpoints/settings.json", False),
        ("export_modules", "modules", True),
        ("Run.compile", "metrics.jsonl", True),
    ],
)
def test_a_full_disk_is_one_line_that_names_what_was_written_and_leaves_nothing_half(
    run, tmp_path, monkeypatch, capsys, function, named, resumes
):
    """From the first call of this function on, files cannot grow."""
    *classes, name = function.split(".")
    owner = getattr(trainer, classes[0]) if classes else trainer
    before, called = resource.getrlimit(resource.RLIMIT_FSIZE), getattr(owner, name)

    def full(*arguments):
        if name == "compile":
            compiled = called(*arguments)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
            return compiled
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        return called(*arguments)

    config = run(steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        try:
            with pytest.raises(
                OSError, match=f"^{config.output}/{named}: cannot be written .File too large.; free space and run"
            ) as told:
                train(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(told.value) and ("resumes from the last checkpoint" in str(told.value)) == resumes
    assert {path.name for path in tmp_path.rglob(".*")} == {".lock"}
    train(config)
    assert (config.output / "modules" / "pos.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": InputConfig(batch_size=6), "accumulation": 4}, "cannot be divided into accumulation=4 parts"),
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"average_decay": 1.0}, "average_decay is 1.0"),
        ({"data": "sdxl-pairs"}, "encode the set with --model"),
        ({"data": "nowhere"}, "python -m train.encode"),
        ({"model": "nowhere"}, "nowhere"),
        ({"mesh": "data=3"}, "mesh 'data=3': does not make up"),
        ({"seed": -1}, "seed is -1; expected 0 to 2^32 - 1"),
        ({"init_from": Path("nowhere")}, "nowhere: no such folder; expected a run, or its exported modules"),
        ({"lora": LoRA(targets=("to_x",))}, "add_lora: target 'to_x' is no linear layer or convolution; there are"),
        ({"mesh": "pipeline=2"}, "'pipeline=2' is not understood; expected sizes of data, fsdp and tensor"),
        ({"output": "a file/run"}, "cannot write into this folder"),
    ],
)
def test_a_mistake_is_one_clear_line_and_the_right_command_then_runs(run, world, tmp_path, changes, message):
    (tmp_path / "a file").write_text("")
    places = {"data": world, "model": world, "output": tmp_path}
    changed = {name: places[name] / value if name in places else value for name, value in changes.items()}
    with pytest.raises((UserError, ValueError, OSError), match=re.escape(message)) as error:
        train_again(run(), **changed)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    written = {path.name for path in (tmp_path / "run").rglob("[!.]*") if path.is_file()}
    assert not written, "nothing is half written"
    if "output" not in changes and "data" in changes:
        train(run(steps=1))


@pytest.fixture
def scored(world, tmp_path):
    """A prepared set of which two rewards agree with every second and every third label."""
    folder = shutil.copytree(world / "sd15-pairs", tmp_path / "scored")
    records = PreparedSet(folder)
    pairs = np.arange(len(records))
    for name, every in (("second", 2), ("third", 3)):
        values = np.stack([pairs % every == 0, pairs % every != 0], axis=1).astype(np.float32)
        write_scores(scores_file(folder, name), PairScores({"name": name}, records.fingerprint, pairs, values))
    return folder


def test_a_run_trains_on_the_pairs_of_a_consensus_only_and_resumes_with_no_other(run, scored, capsys, monkeypatch):
    read, pair = set(), PreparedSet.pair
    monkeypatch.setattr(PreparedSet, "pair", lambda self, i: read.add(i) or pair(self, i))
    config = run(data=scored, consensus=Consensus(rewards=("second", "third")), steps=8)
    train(config)
    assert read == {0, 6, 12, 18}
    assert (
        "consensus: 2 of 2 rewards agree with the label on 16.7 % of 24 pairs (4 kept); agreement of each reward: "
        "second 50.0 %, third 33.3 %\n"
    ) in capsys.readouterr().out
    for other, told in (
        (Consensus(rewards=("second", "third"), least=1), "consensus.least=None, now consensus.least=1: repeat"),
        (Consensus(), "consensus.rewards=.*, now no consensus.rewards"),
    ):
        with pytest.raises(UserError, match=f"holds checkpoints of a run with .*{told}"):
            train_again(config, steps=9, consensus=other)
    # The same settings, but the set was scored again meanwhile.
    values, records = np.tile(np.float32([1, 0]), (24, 1)), PreparedSet(scored)
    write_scores(scores_file(scored, "third"), PairScores({}, records.fingerprint, np.arange(24), values))
    with pytest.raises(
        ValueError, match="the saved position is of another order of batches: records 4, now 12; finger"
    ):
        train_again(config, steps=9)


def test_a_run_that_was_begun_without_a_consensus_has_no_setting_of_one(run):
    assert "consensus" not in trainer.settings_of(run())
    assert trainer.settings_of(run(consensus=Consensus(rewards=("a",))))["consensus"]["rewards"] == ("a",)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--consensus.rewards", "second", "fourth"],
            "has no scores of 'fourth'; there are scores of second, third: s",
        ),
        (["--consensus.rewards", "second", "--consensus.least", "2"], "consensus: least is 2; expected 1 to 1, the"),
        (["--consensus.least", "1"], "consensus: least=1 without rewards"),
    ],
)
def test_a_consensus_that_cannot_be_is_one_line_before_anything_is_loaded(
    world, scored, tmp_path, flags, message, capsys, monkeypatch
):
    monkeypatch.setattr(trainer, "open_model", None)
    config = ["configs/demo/dpo.py", "--data", str(scored), "--model", str(world / "sd15"), "--output", str(tmp_path)]
    with contextlib.suppress(SystemExit):
        assert run_main(modules.main, [*config, *flags]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_a_set_that_cannot_be_divided_over_parts_of_a_mesh_says_which_multiple_fits(run):
    config = run(input=InputConfig(batch_size=6), accumulation=3)
    larger = jax.sharding.AbstractMesh((4, 2), ("data", "tensor"))  # than this machine has
    with pytest.raises(ValueError, match="choose a multiple of 12"):
        trainer.check_batch(config, larger)


def test_a_flag_that_is_unknown_is_one_line_with_the_one_that_is_meant(world, tmp_path, capsys):
    file = tmp_path / "config.py"
    file.write_text(
        f"from pathlib import Path\nimport sys\nsys.path.insert(0, {str(tmp_path.parent)!r})\n"
        f"from tiny import tiny_run\nconfig = tiny_run(Path({str(tmp_path / 'run')!r}), Path({str(world)!r}))\n"
    )
    with pytest.raises(SystemExit) as exit:
        modules.main([str(file), "--method.betta", "3"])
    told = capsys.readouterr().err
    assert exit.value.code == 2 and told.count("\n") == 1 and "--method.beta" in told
    assert not (tmp_path / "run").exists()
