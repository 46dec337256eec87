"""The shipped configs: each builds, begins with the command that runs it, says what was published, and trains."""

import dataclasses
import importlib
import json
import math
import re
import runpy
from pathlib import Path

import jax
import pytest
from training.tiny import tiny_checkpoint, tiny_scorer, tiny_set

from flax_pref.methods import OnlineMethod, PairMethod
from flax_pref.programs import PROGRAMS
from flax_pref.rewards.reward import Weighted
from flax_pref.training.rollouts import RolloutConfig
from flax_pref.training.trainer import train

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.py"))

# What was published, read in the authors' code; in brackets what is our choice: the code does not say it, or not for
# this model. Method, its numbers, optimizer, learning rate, warm-up, pairs in a batch, steps, caption dropout.
PUBLISHED = {
    # github.com/SalesforceAIResearch/DiffusionDPO, launchers/sd15.sh, sdxl.sh and defaults of train.py:
    # 1e-8 --scale_lr, 16 GPUs x 1 x 128
    "sd15/dpo": ("DiffusionDPO", {"beta": 5000}, "adamw", 2.048e-5, 500, 2048, 2000, 0.2),
    "sdxl/dpo": ("DiffusionDPO", {"beta": 5000}, "adafactor", 2.048e-5, 200, 2048, 2000, 0.2),
    # arXiv:2602.18799: 1e-9 --scale_lr for SDXL; [all of sd15]
    "sd15/modules": ("PositiveNegative", {"train": "both"}, "adamw", 2.048e-6, 200, 2048, 2000, 0.2),
    "sdxl/modules": ("PositiveNegative", {"train": "both"}, "adafactor", 2.048e-6, 200, 2048, 2000, 0.2),
    # github.com/AIDC-AI/Diffusion-SDPO, scripts/train/sd15_diffusion_dpo.sh, sdxl_diffusion_dpo.sh: 1e-8, 1e-9
    # --scale_lr, 8 x 32 for each of [8] GPUs
    "sd15/sdpo": ("SDPO", {"beta": 5000, "mu": 0.9}, "adamw", 2.048e-5, 500, 2048, 2000, 0.2),
    "sdxl/sdpo": ("SDPO", {"beta": 5000, "mu": 0.6}, "adafactor", 2.048e-6, 500, 2048, 2000, 0.2),
    # github.com/G-U-N/Diffusion-NPO, DPO-DPO-NPO/run_sd15.sh, run_sdxl.sh: beta 500 without the factor 1/2
    # (train_sd15.py), 2000 with it (train_sdxl.py); 64, 30 x 2 for each of [1] GPU, [64 for SDXL]
    "sd15/npo": ("NPO", {"beta": 1000}, "adamw", 5e-6, 0, 64, 5000, 0.0),
    "sdxl/npo": ("NPO", {"beta": 2000}, "adamw", 5e-6, 0, 64, 5000, 0.0),
    # [all but the loss]
    "sd15/dpo_small": ("DiffusionDPO", {"beta": 2000}, "adamw", 1e-4, 50, 64, 1000, 0.1),
    "sdxl/dpo_small": ("DiffusionDPO", {"beta": 2000}, "adamw", 1e-4, 50, 32, 500, 0.1),
    "sd15/modules_small": ("PositiveNegative", {"train": "both"}, "adamw", 1e-4, 50, 64, 1000, 0.1),
    "sdxl/modules_small": ("PositiveNegative", {"train": "both"}, "adamw", 1e-4, 50, 32, 500, 0.1),
    # [as dpo]
    "sd15/dpo_modules": ("PositiveNegativeDPO", {"beta": 5000}, "adamw", 2.048e-5, 500, 2048, 2000, 0.2),
    "sdxl/dpo_modules": ("PositiveNegativeDPO", {"beta": 5000}, "adafactor", 2.048e-5, 200, 2048, 2000, 0.2),
    # github.com/AIDC-AI/CHATS, scripts/train_sd15.sh, train_sdxl.sh: 1e-9, 3e-9 --scale_lr, 8 GPUs x 1 x 16
    "sd15/chats": ("CHATS", {"beta": 1000, "dropout": 0.5}, "adamw", 1.28e-7, 100, 128, 2000, 0.0),
    "sdxl/chats": ("CHATS", {"beta": 1000, "dropout": 0.5}, "adafactor", 3.84e-7, 100, 128, 6000, 0.0),
    # github.com/liming-ai/ViPO, index.html, arXiv:2604.24953: alpha 8 on Pick-a-Pic v2 with SD1.5; [alpha of sdxl, the
    # rest as dpo]
    "sd15/poly_dpo": ("DiffusionDPO", {"beta": 5000, "poly_alpha": 8}, "adamw", 2.048e-5, 500, 2048, 2000, 0.2),
    "sdxl/poly_dpo": ("DiffusionDPO", {"beta": 5000, "poly_alpha": 8}, "adafactor", 2.048e-5, 200, 2048, 2000, 0.2),
    # github.com/huaishengzhu/DSPO, launchers/sd15.sh, sdxl.sh and train.py: 1e-8 --scale_lr, 16 x 128 and 8 x 256 for
    # each of [1] GPU; far is 0.1 in the loss for SDXL
    "sd15/dspo": (
        *("DSPO", {"beta": 0.001, "form": "denoising", "far": 0.1}),
        *("adamw", 2.048e-5, 500, 2048, 2000, 0.2),
    ),
    "sdxl/dspo": (
        *("DSPO", {"beta": 5000, "form": "margin", "far": 0.1}),
        *("adafactor", 2.048e-5, 200, 2048, 2000, 0.2),
    ),
    # github.com/AIDC-AI/Diffusion-SDPO, scripts/train/sd15_dmpo.sh, sdxl_dmpo.sh, of others than DMPO's authors: 1e-8,
    # 1e-9 --scale_lr, 8 x 32 for each of [8] GPUs; [without their safeguard]
    "sd15/dmpo": ("DMPO", {"beta": 2000, "alpha": 0.01}, "adamw", 2.048e-5, 500, 2048, 2000, 0.2),
    "sdxl/dmpo": ("DMPO", {"beta": 6000, "alpha": 0.01}, "adafactor", 2.048e-6, 500, 2048, 2000, 0.2),
    # en.papernotes.org on openreview.net/forum?id=CU5EHe1KUt, second-hand; [dropout, warm-up]
    "sd15/snpo": ("SNPO", {"beta": 2000, "mix": 0.9, "dropout": 0.5}, "adamw", 2.048e-8, 750, 512, 3000, 0.0),
    "sdxl/snpo": ("SNPO", {"beta": 5000, "mix": 0.9, "dropout": 0.5}, "adamw", 2.048e-8, 156, 2048, 625, 0.0),
    # github.com/jacklishufan/diffusion-kto, exps/example.sh: 4 GPUs x 2 images; [optimizer and batch of sdxl]
    "sd15/kto": ("KTO", {"beta": 1000}, "adamw", 1e-7, 200, 4, 20000, 0.2),
    "sdxl/kto": ("KTO", {"beta": 1000}, "adafactor", 1e-7, 200, 16, 20000, 0.2),
    # github.com/mapo-t2i/mapo, README.md and defaults of args.py: 8 x 2 for each of 8 GPUs; [all of sd15]
    "sd15/mapo": ("MaPO", {"beta": 0.1, "snr": 0.5}, "adamw", 1e-5, 0, 128, 2000, 0.0),
    "sdxl/mapo": ("MaPO", {"beta": 0.1, "snr": 0.5}, "adamw", 1e-5, 0, 128, 2000, 0.0),
    # of configs/demo/demo.py, which is ours
    "demo/dpo": ("DiffusionDPO", {"beta": 1000}, "adamw", 5e-4, 6, 16, 60, 0.2),
    "demo/modules": ("PositiveNegative", {"train": "both"}, "adamw", 5e-4, 10, 16, 100, 0.2),
}
TAILORPO = {"beta": 0.1, "steps": 20, "eta": 1.0, "guidance_scale": 5.0, "train_steps": 5}
NFT = {"steps": 10, "guidance_scale": 1.0, "beta": 1.0, "kl": 1e-4, "advantage_clip": 5.0, "ramp": 1e-3, "limit": 0.5}
# The same of online methods: method, numbers that its authors' code has, learning rate, rank.
PUBLISHED_ONLINE = {
    # arXiv:2502.01667, and github.com/yk7333/d3po, config/base.py, which it takes the others from; [all of sdxl, ranks]
    **{f"{family}/tailorpo": ("TailorPO", TAILORPO, 3e-5, 4) for family in ("sd15", "sdxl")},
    **{
        f"{family}/tailorpo_g": ("TailorPO", {**TAILORPO, "rate": (0.1, 0.2), "rise": 0.5}, 3e-5, 4)
        for family in ("sd15", "sdxl")
    },
    "sd15/d3po": ("D3PO", {"beta": 0.1, "steps": 20, "guidance_scale": 5.0, "ratio_clip": 0.1}, 3e-5, 4),
    "sdxl/d3po": ("D3PO", {"beta": 0.1, "steps": 20, "guidance_scale": 5.0, "ratio_clip": 0.1}, 3e-5, 4),
    # github.com/RockeyCoss/SPO, basic_config.py and the configs that the docstrings name
    "sd15/spo": ("SPO", {"beta": 10.0, "steps": 20, "pool": 4, "skip": 4, "ratio_clip": 0.1}, 6e-5, 4),
    "sdxl/spo": ("SPO", {"beta": 10.0, "steps": 20, "pool": 2, "skip": 4, "ratio_clip": 0.1}, 1e-5, 64),
    # github.com/kvablack/ddpo-pytorch, config/dgx.py, and arXiv:2305.13301; [learning rates and ranks, all of sdxl]
    "sd15/ddpo": ("DDPO", {"steps": 50, "guidance_scale": 5.0, "ratio_clip": 1e-4}, 3e-4, 4),
    "sdxl/ddpo": ("DDPO", {"steps": 50, "guidance_scale": 5.0, "ratio_clip": 1e-4}, 3e-4, 4),
    # github.com/NVlabs/DiffusionNFT, config/nft.py and config/base.py, and the rank in its trainer; [images of sdxl]
    "sd15/nft": ("DiffusionNFT", {**NFT, "images_per_prompt": 24}, 3e-4, 32),
    "sdxl/nft": ("DiffusionNFT", {**NFT, "images_per_prompt": 8}, 3e-4, 32),
    # ours
    "demo/tailorpo": ("TailorPO", {"beta": 0.1, "steps": 10, "guidance_scale": 3.0}, 3e-4, 16),
}


def load(file):
    return runpy.run_path(str(ROOT / file))


def training_configs(methods):
    """Names of the configs that train with some of the methods."""
    configs = {file[len("configs/") : -len(".py")]: load(file)["config"] for file in CONFIGS}
    return {name for name, config in configs.items() if isinstance(getattr(config, "method", None), methods)}


@pytest.mark.parametrize("file", CONFIGS)
def test_a_config_is_of_the_kind_that_the_program_in_its_docstring_reads(file):
    names = load(file)
    command = re.search(rf"python -m (train\.\w+) {re.escape(file)}", names["__doc__"])
    assert command, f"{file}: its docstring does not say the command that runs it"
    (kind,) = (program.config for program in PROGRAMS.values() if program.module == command[1])
    module, name = kind.split(":")
    assert type(names["config"]) is getattr(importlib.import_module(module), name)


def test_no_config_is_left_out_of_the_tables_of_published_settings():
    assert training_configs(PairMethod) == set(PUBLISHED)
    assert training_configs(OnlineMethod) == set(PUBLISHED_ONLINE)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_has_the_published_settings_to_the_number(name):
    config = load(f"configs/{name}.py")["config"]
    optimizer, batches = config.optimizer, config.input
    numbers = dataclasses.asdict(config.method)
    if numbers.get("poly_alpha") == 0:  # the loss of the method as it was published
        del numbers["poly_alpha"]
    found = (
        *(type(config.method).__name__, numbers),
        *(optimizer.name, optimizer.learning_rate, optimizer.warmup_steps),
        *(batches.batch_size, config.steps, batches.caption_dropout),
    )
    assert found == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED_ONLINE)
def test_an_online_config_has_the_published_settings_to_the_number(name):
    config = load(f"configs/{name}.py")["config"]
    method, numbers, learning_rate, rank = PUBLISHED_ONLINE[name]
    found = {field: getattr(config.method, field) for field in numbers}
    assert (type(config.method).__name__, found) == (method, numbers)
    assert (config.optimizer.learning_rate, config.lora.rank) == (learning_rate, rank)
    examples = config.online.rollouts.prompts * math.prod(config.method.examples)
    assert examples % config.batch_size == config.batch_size % config.accumulation == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_reads_what_the_encoding_command_in_its_docstring_writes(name):
    names = load(f"configs/{name}.py")
    encode = re.search(r"python -m train\.encode\s+(configs/\S+\.py)", names["__doc__"])
    encoding = load(encode[1])["config"]
    assert (names["config"].data, names["config"].model) == (encoding.output, encoding.model)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.startswith("demo/")])
def test_a_batch_can_be_divided_over_the_hardware_that_the_docstring_names(name):
    names = load(f"configs/{name}.py")
    config, hardware = names["config"], re.search(r"Hardware: (\d+) chips .*?or (\d+)\s+GPUs", names["__doc__"], re.S)
    devices_of = map(int, hardware.groups()) if hardware else (1,)  # of small ones
    sizes = {axis: int(size) for axis, size in re.findall(r"(\w+)=(-?\d+)", config.mesh)}
    assert hardware or name.endswith("_small")
    for devices in devices_of:
        assert devices % (sizes.get("fsdp", 1) * sizes.get("tensor", 1)) == 0
        assert config.input.batch_size % (config.accumulation * devices // sizes.get("tensor", 1)) == 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint and a prepared set of each family."""
    folder = tmp_path_factory.mktemp("tiny")
    found = {}
    for family in ("sd15", "sdxl"):
        checkpoint = tiny_checkpoint(folder / family, family)
        found[family] = str(checkpoint), tiny_set(folder / f"{family}_set", family)
    return found


@pytest.fixture
def quickly_compiled(monkeypatch):
    """Programs that are compiled sooner and run slower."""
    monkeypatch.setattr("flax_pref.parallel.peak.step_flops", lambda *arguments: 1.0)  # traces the step again
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.recipe
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_trains_two_steps_of_a_tiny_network_and_writes_its_modules(name, tiny, tmp_path, quickly_compiled):
    config = load(f"configs/{name}.py")["config"]
    model, data = tiny["sdxl" if name.startswith("sdxl/") else "sd15"]
    accumulation = min(2, config.accumulation)
    small = dataclasses.replace(
        config,
        **{"output": tmp_path / "run", "model": model, "data": data, "mesh": "data=1", "record_every": 1},
        **{"steps": 2, "accumulation": accumulation},
        input=dataclasses.replace(config.input, batch_size=2 * accumulation),
    )
    trained(small)


@pytest.mark.recipe
@pytest.mark.parametrize("name", PUBLISHED_ONLINE)
def test_an_online_config_trains_two_steps_of_a_tiny_network_and_writes_its_modules(
    name, tiny, tmp_path, quickly_compiled
):
    (tmp_path / "animals.txt").write_text("cat\ndog\nfox\n")
    config = load(f"configs/{name}.py")["config"]
    model, _ = tiny["sdxl" if name.startswith("sdxl/") else "sd15"]
    scorer = str(tiny_scorer(tmp_path / "scorer"))
    rewards = dict.fromkeys(("aesthetic", "pickscore"), Weighted("pickscore", path=scorer))  # with gradients, both
    fewer = {"images_per_prompt": 2, "train_steps": 2}
    changes = {field: value for field, value in fewer.items() if hasattr(config.method, field)}
    update = config.online.rollouts.update
    small = dataclasses.replace(
        config,
        **{"output": tmp_path / "run", "model": model, "mesh": "data=1", "record_every": 1, "steps": 2},
        accumulation=min(2, config.accumulation),
        method=dataclasses.replace(config.method, steps=getattr(config.method, "skip", 0) + 2, **changes),
        online=dataclasses.replace(
            config.online,
            prompts=str(tmp_path / "animals.txt"),
            rewards=tuple(rewards.get(reward.name, Weighted("compressibility")) for reward in config.online.rewards),
            rollouts=RolloutConfig(prompts=2, at_once=2, batch_size=2 if update == "step" else 4, update=update),
            size=(16, 16),
        ),
    )
    trained(small)


def trained(config):
    """Trains, and checks what a run leaves behind."""
    train(config)
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line[key]) for line in lines for key in ("loss", "gradient_norm"))
    assert lines[-1]["skipped"] == 0
    for module in config.method.modules:
        written = config.output / "modules" / module
        weights = written.with_suffix(".safetensors") if config.weights == "lora" else written / "config.json"
        assert weights.exists()
