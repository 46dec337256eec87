"""The checks of what a user names: a checkpoint against diffusers, and rewards against recorded scores."""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from flax_pref.checkpoints.checkpoint import Pipeline
from flax_pref.checkpoints.diffusers import open_checkpoint, write_parts
from flax_pref.checkpoints.tokenizer import clip_tokenizer
from flax_pref.checkpoints.weights import abstract_network
from flax_pref.config import INTEGRATIONS
from flax_pref.diffusion.latents import decode_latents
from flax_pref.diffusion.text_to_image import TextToImage
from flax_pref.files import write_json
from flax_pref.models.clip import CLIPTextConfig
from flax_pref.models.clip_vision import CLIPConfig, CLIPVisionConfig
from flax_pref.rewards.aesthetic import AestheticScore
from flax_pref.rewards.clip import ClipScore
from flax_pref.rewards.judge import Judge
from flax_pref.rewards.reward import Reward, load_reward
from flax_pref.verification.findings import Finding, Setting, normal, read_recorded, relative
from flax_pref.world import scenes as world

# ----------------------------------------------------------------------------------------------------------------------
# A checkpoint

PROMPT, TIMESTEP, SIDE = "a lighthouse in a storm, oil on canvas", 500, 16
REFERENCE = INTEGRATIONS / "diffusers" / "reference.py"
# Largest difference relative to the largest value, and of images absolute.
TOLERATED = {"encoder_hidden_states": 1e-4, "text_embeds": 1e-4, "prediction": 1e-3, "image": 2 / 255}
PARTS = {"encoder_hidden_states": "text encoder", "text_embeds": "pooled prompt", "prediction": "UNet", "image": "VAE"}


def check_model(setting: Setting) -> Iterator[Finding]:
    """Text encoders, UNet and autoencoder of a checkpoint against diffusers, all in float32.

    diffusers computes on the CPU, in a process of its own.
    """
    if not setting.model:
        return
    missing = [name for name in ("torch", "diffusers", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        told = f"{' and '.join(missing)} not installed; pip install torch diffusers transformers"
        yield Finding(f"{setting.model} against diffusers", None, told, {})
        return
    checkpoint = open_checkpoint(setting.model)
    pipeline = checkpoint.load(jnp.float32)
    with jax.default_matmul_precision("highest"):
        found = predictions(pipeline)
    with tempfile.TemporaryDirectory() as folder:
        given, expected, configs = Path(folder, "given.safetensors"), Path(folder, "expected.safetensors"), Path(folder)
        save_file({"latents": found["latents"], "timestep": np.array(TIMESTEP)}, given, {"prompt": PROMPT})
        write_json(configs / "model_index.json", write_parts(pipeline, configs, weights=False))
        del pipeline
        command = [sys.executable, str(REFERENCE), str(checkpoint.path), *map(str, (configs, given, expected))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            yield Finding(f"{setting.model} against diffusers", None, f"diffusers cannot read it: {reason}", {})
            return
        reference = load_file(expected)
    for name, part in PARTS.items():
        if name in reference:
            absolute = float(np.abs(found[name] - reference[name]).max())
            error, bound = absolute if name == "image" else relative(found[name], reference[name]), TOLERATED[name]
            told = f"off by {error:.1e} of diffusers, at most {bound:.1e}"
            yield Finding(f"{setting.model}, {part}", error < bound, told, {"error": error, "bound": bound})


def predictions(pipeline: Pipeline) -> dict[str, np.ndarray]:
    """Hidden states and pooled prompt, the UNet's prediction and the decoded latents, as torch arranges them."""
    unet, vae = pipeline.unet.config, pipeline.vae.config
    draw = TextToImage(pipeline, steps=1, size=(SIDE * vae.downscale_factor,) * 2)
    text, _ = draw.conditioning([PROMPT], None)
    latents = normal((1, SIDE, SIDE, unet.in_channels), 0)
    rows = jax.tree.map(lambda x: x[:, None], text)
    predict = jax.jit(lambda bank, *inputs: bank(("base",), *inputs))
    prediction = predict(draw.bank, jnp.asarray(latents)[:, None], jnp.full(1, TIMESTEP), rows)[:, 0]
    found = {"latents": latents, "prediction": prediction, "image": decode_latents(pipeline.vae, latents)}
    found = {name: np.moveaxis(np.asarray(value, np.float32), -1, 1) for name, value in found.items()}
    seen = {
        name: np.asarray(text[name], np.float32) for name in ("encoder_hidden_states", "text_embeds") if name in text
    }
    return {name: np.ascontiguousarray(value) for name, value in (found | seen).items()}


# ----------------------------------------------------------------------------------------------------------------------
# Rewards


REWARD = "reward: "  # and the name of one that a user has named


def check_rewards(setting: Setting) -> Iterator[Finding]:
    """Scores of four drawn pictures: by small networks with fixed weights, and by the rewards that are named."""
    captions, images = pictures()
    recorded = read_recorded("rewards")
    for name, reward in small_rewards().items():
        scores = _scores(reward, captions, images)
        error = relative(scores, recorded[name])
        told = f"error {error:.1e}, at most 1e-04"
        yield Finding(f"{name}, small networks", error < 1e-4, told, {"scores": scores, "error": error})
    for name, path in setting.rewards:
        scores = _scores(load_reward(name, path), captions, images)
        told = ", ".join(f"{score:.4f}" for score in scores)
        passed: bool | None = None
        figures: dict[str, Any] = {"scores": scores}
        if name in setting.recorded:
            error = relative(scores, setting.recorded[name])
            passed, told = error < 1e-3, f"{told}, off by {error:.1e} of the recorded ones, at most 1e-03"
            figures["error"] = error
        yield Finding(f"{REWARD}{name}", passed, told, figures)


def pictures() -> tuple[list[str], np.ndarray]:
    """Captions and images `[4, 64, 64, 3]` of the demo world, drawn without noise."""
    scenes = list(islice(world.scenes("held_out", 0), 4))
    return [scene.caption for scene in scenes], np.stack([world.render(scene) for scene in scenes])


def small_rewards() -> dict[str, Reward]:
    """The judge, and rewards of every kind of view with small networks, whose weights are the same everywhere."""
    words = clip_tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "hidden_act": "gelu"}
    text = CLIPTextConfig(**sizes, vocab_size=len(words.vocab), max_position_embeddings=77)
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    clip = abstract_network("clip", CLIPConfig(projection_dim=32, text_config=text, vision_config=vision))
    leaves, tree = jax.tree.flatten(clip.params)
    # Not smaller: else all pictures would be alike.
    params = jax.tree.unflatten(tree, [0.2 * normal(leaf.shape, i) for i, leaf in enumerate(leaves)])
    found: dict[str, Reward] = {"judge": Judge()}
    found |= {name: ClipScore(params, name, clip.graphdef, 32, words.__call__) for name in ("pickscore", "hpsv2.1")}
    kernel = jnp.asarray(normal((32,), len(leaves)))
    return found | {"aesthetic": AestheticScore(params, kernel, jnp.float32(5.0), clip.graphdef, 32)}


def _scores(reward: Reward, captions: list[str], images: np.ndarray) -> list[float]:
    with jax.default_matmul_precision("highest"):
        score = jax.jit(lambda reward, images, prepared: reward.score(reward.view(images), prepared))
        return np.asarray(score(reward, images, reward.prepare(captions)), np.float64).tolist()
