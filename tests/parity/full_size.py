"""Networks of full size with random weights, against diffusers and transformers: `make parity`.

Every network of Stable Diffusion 1.5 and SDXL, and those of the scorers, is written as a checkpoint, loaded by both
sides in processes of their own, and run on the same inputs in float32. Needs 24 GB of memory and 11 GB of disk; writes
docs/parity.md.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

COMMAND = "make parity"
TOLERANCE = 1e-4  # relative to the largest value
PARTS = ("sd15 unet", "sd15 vae", "sd15 text_encoder", "sdxl unet", "sdxl vae", "sdxl text_encoder_2")
BY_HAND = "<!-- By hand"  # begins the part of the page that is not written here
SCORERS = ("pickscore", "imagereward")


def main(parts) -> int:
    rows = []
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            child("write", part, folder)
            theirs = json.loads(child("theirs", part, folder))
            ours = json.loads(child("ours", part, folder))
            errors = {
                name: relative_error(np.load(f"{folder}/ours-{name}.npy"), np.load(f"{folder}/theirs-{name}.npy"))
                for name in ours.pop("outputs")
            }
        rows.append((part, errors, ours, theirs))
        print(part, {name: f"{error:.1e}" for name, error in errors.items()}, ours, theirs, flush=True)
    if set(parts) == {*PARTS, *SCORERS}:
        _, marker, by_hand = Path("docs/parity.md").read_text().partition(BY_HAND)
        Path("docs/parity.md").write_text(f"{page(rows)}\n{marker}{by_hand}")
    return int(any(error > TOLERANCE for _, errors, _, _ in rows for error in errors.values()))


def child(job: str, part: str, folder: str) -> str:
    """A job in a process of its own: a process remembers its memory peak."""
    command = [sys.executable, "-m", "tests.parity.full_size", "--child", job, part, folder]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip().splitlines()[-1:][0]


def relative_error(ours, theirs) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def scored() -> dict[str, np.ndarray]:
    """Images of the size that scorers take, and captions as token ids of any vocabulary."""
    from bench.writing import random_photos

    ids = np.random.default_rng(2).integers(1000, 30000, (2, 77)).astype(np.int32)
    ids[:, -1] = 49407
    return {"images": random_photos(2, 224), "ids": ids}


def inputs(part: str) -> dict[str, np.ndarray]:
    from bench.common import random_inputs
    from flax_pref.models.presets import FAMILIES

    family, kind = part.split()
    family = FAMILIES[family]
    rng = np.random.default_rng(2)
    size = family.resolution // 8
    if kind == "unet":
        return random_inputs(family, 1, size)
    if kind == "vae":
        return {
            "images": rng.uniform(-1, 1, (1, 8 * size, 8 * size, 3)).astype(np.float32),
            "latents": rng.standard_normal((1, size, size, 4), dtype=np.float32),
        }
    ids = rng.integers(1000, 40000, (2, 77)).astype(np.int32)
    ids[:, 0], ids[0, 9:], ids[1, -1] = 49406, 49407, 49407
    return {"input_ids": ids}


def write(part: str, folder: str) -> None:
    from bench.common import random_network
    from flax_pref.checkpoints.weights import save_network
    from flax_pref.models.presets import FAMILIES

    if part in SCORERS:
        return write_scorer(part, Path(folder))
    family, kind = part.split()
    family = FAMILIES[family]
    if kind.startswith("text_encoder"):
        network = random_network("text_encoder", family.text_encoders[-1 if kind.endswith("_2") else 0])
    else:
        network = random_network(kind, getattr(family, kind))
    save_network(network, Path(folder) / kind)
    print("written")


def write_scorer(part: str, folder: Path) -> None:
    import torch

    from bench.common import random_network
    from flax_pref.checkpoints.weights import save_network
    from flax_pref.models.blip import ImageRewardConfig
    from flax_pref.models.presets import CLIP_VIT_H
    from tests.parity.image_reward_reference import random_weights

    if part == "pickscore":
        save_network(random_network("clip", CLIP_VIT_H), folder / part)
    else:
        torch.save(random_weights(ImageRewardConfig()), folder / "ImageReward.pt")
    print("written")


def ours(part: str, folder: str) -> None:
    import jax
    from flax import nnx

    from flax_pref.checkpoints.weights import load_network

    if part in SCORERS:
        return score_ours(part, Path(folder))
    kind, given = part.split()[1], inputs(part)
    started = time.perf_counter()
    network = load_network(kind.removesuffix("_2"), Path(folder) / kind)
    loaded = time.perf_counter()

    def run(params, given):
        module = nnx.merge(network.graphdef, params)
        if kind == "unet":
            return {"noise_pred": module(**given)}
        if kind == "vae":
            mean, logvar = module.encode(given["images"])
            return {"mean": mean, "logvar": logvar, "decoded": module.decode(given["latents"])}
        output = module(given["input_ids"])
        return {"last": output.last_hidden_state, "penultimate": output.hidden_states[-2]} | (
            {} if output.projected is None else {"projected": output.projected}
        )

    compiled = jax.jit(run).lower(network.params, given).compile()
    ready = time.perf_counter()
    outputs = jax.device_get(compiled(network.params, given))
    report("ours", folder, outputs, load=loaded - started, compile=ready - loaded, run=time.perf_counter() - ready)


def score_ours(part: str, folder: Path) -> None:
    import jax

    from bench.rewards import pickscore
    from flax_pref.checkpoints.blip_files import load_image_reward_model
    from flax_pref.checkpoints.clip_files import load_clip
    from flax_pref.rewards.image_reward import TOKENS, ImageReward

    given, started = scored(), time.perf_counter()
    if part == "pickscore":
        reward, prepared = pickscore(load_clip(folder / part)), given["ids"]
    else:
        network = load_image_reward_model(folder / "ImageReward.pt")
        reward = ImageReward(network.params, network.graphdef, network.config.image_size, None)
        prepared = given["ids"][:, :TOKENS], np.arange(TOKENS)[None] < [[TOKENS], [9]]
    loaded = time.perf_counter()

    def run(reward, images, prepared):
        return {"score": reward.score(reward.view(images), prepared)}

    images = given["images"] / np.float32(255)
    compiled = jax.jit(run).lower(reward, images, prepared).compile()
    ready = time.perf_counter()
    outputs = jax.device_get(compiled(reward, images, prepared))
    report("ours", folder, outputs, load=loaded - started, compile=ready - loaded, run=time.perf_counter() - ready)


def score_theirs(part: str, folder: Path) -> None:
    import torch
    import transformers

    from flax_pref.rewards.image_reward import TOKENS
    from tests.parity import image_reward_reference

    given, started = scored(), time.perf_counter()
    processor = transformers.CLIPImageProcessorPil()
    pixels = torch.from_numpy(np.stack(processor(list(given["images"]))["pixel_values"]))
    ids = torch.from_numpy(given["ids"]).long()
    if part == "pickscore":
        model = transformers.CLIPModel.from_pretrained(folder / part, dtype=torch.float32).eval()
        loaded = time.perf_counter()
        with torch.inference_mode():
            score = model(input_ids=ids, pixel_values=pixels).logits_per_image.diagonal()
    else:
        weights = torch.load(folder / "ImageReward.pt")
        loaded = time.perf_counter()
        mask = torch.arange(TOKENS)[None] < torch.tensor([[TOKENS], [9]])
        with torch.inference_mode():
            score = image_reward_reference.scores(weights, pixels, ids[:, :TOKENS], mask)
    report("theirs", folder, {"score": score.numpy()}, load=loaded - started, run=time.perf_counter() - loaded)


def theirs(part: str, folder: str) -> None:
    import diffusers
    import torch
    import transformers

    if part in SCORERS:
        return score_theirs(part, Path(folder))
    kind, given = part.split()[1], {name: torch.from_numpy(array) for name, array in inputs(part).items()}
    source = Path(folder) / kind
    started = time.perf_counter()
    if kind == "unet":
        model = diffusers.UNet2DConditionModel.from_pretrained(source)
    elif kind == "vae":
        model = diffusers.AutoencoderKL.from_pretrained(source)
    elif kind.endswith("_2"):
        model = transformers.CLIPTextModelWithProjection.from_pretrained(source, dtype=torch.float32)
    else:
        model = transformers.CLIPTextModel.from_pretrained(source, dtype=torch.float32)
    model.eval()
    loaded = time.perf_counter()
    with torch.inference_mode():
        if kind == "unet":
            added = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
            states, steps = given["encoder_hidden_states"], given["timesteps"]
            out = model(nchw(given["latents"]), steps, states, added_cond_kwargs=added or None).sample
            outputs = {"noise_pred": nhwc(out)}
        elif kind == "vae":
            posterior = model.encode(nchw(given["images"])).latent_dist
            decoded = model.decode(nchw(given["latents"])).sample
            outputs = {"mean": nhwc(posterior.mean), "logvar": nhwc(posterior.logvar), "decoded": nhwc(decoded)}
        else:
            out = model(given["input_ids"].long(), output_hidden_states=True)
            outputs = {"last": out.last_hidden_state.numpy(), "penultimate": out.hidden_states[-2].numpy()}
            if kind.endswith("_2"):
                outputs["projected"] = out.text_embeds.numpy()
    report("theirs", folder, outputs, load=loaded - started, run=time.perf_counter() - loaded)


def nchw(tensor):
    # A permuted view would be taken for channels-last memory, where torch's GroupNorm loses digits with every pixel.
    return tensor.permute(0, 3, 1, 2).contiguous()


def nhwc(tensor):
    return tensor.permute(0, 2, 3, 1).numpy()


def report(side: str, folder: str, outputs: dict, **seconds: float) -> None:
    for name, array in outputs.items():
        np.save(f"{folder}/{side}-{name}.npy", array)
    from bench.common import peak_gb

    figures = {name: round(value, 1) for name, value in seconds.items()} | {"peak_gb": round(peak_gb(), 1)}
    print(json.dumps(figures | ({"outputs": list(outputs)} if side == "ours" else {})))


def page(rows) -> str:
    from importlib.metadata import version

    import jax

    lines = [
        "# Parity at full size",
        "",
        "Both sides load the same checkpoint folder with random weights and compute in float32 on the CPU; UNet and",
        "autoencoder at 512 pixels (SD1.5) and 1024 (SDXL), batch 1. The error is the largest difference relative to",
        f"the largest value of the reference; more than {TOLERANCE:g} fails. SDXL's first text encoder is SD1.5's.",
        "PickScore with CLIP ViT-H/14 is compared with transformers, and ImageReward's BLIP with a",
        "transcription into torch.",
        "",
        f"`{COMMAND}`, {datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"jax {jax.__version__}, torch {version('torch')}, diffusers {version('diffusers')}, "
        f"transformers {version('transformers')}.",
        "",
        "| network | relative error | ours: load, compile, run [s] | peak [GB] | torch: load, run [s] | peak [GB] |",
        "|---|---|---|---|---|---|",
    ]
    for part, errors, mine, reference in rows:
        worst = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        lines.append(
            f"| {part} | {worst} | {mine['load']}, {mine['compile']}, {mine['run']} | {mine['peak_gb']} | "
            f"{reference['load']}, {reference['run']} | {reference['peak_gb']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        {"write": write, "ours": ours, "theirs": theirs}[sys.argv[2]](*sys.argv[3:])
    else:
        sys.exit(main(sys.argv[1:] or (*PARTS, *SCORERS)))
