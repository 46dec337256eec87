"""PickScore beside transformers in torch, memory of its gradient, and the time that devices wait for a service."""

import contextlib
import dataclasses
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bench.common import each_round, medians, random_network, time_in_turns
from flax_pref.checkpoints.weights import abstract_network, to_stored
from flax_pref.config import INTEGRATIONS
from flax_pref.diffusion.sampler import Predict
from flax_pref.methods import D3PO, DDPO, SPO, DiffusionNFT, OnlineMethod, TailorPO
from flax_pref.models.network import Network, with_remat
from flax_pref.models.presets import CLIP_VIT_H, FAMILIES
from flax_pref.models.remat import Remat
from flax_pref.models.vae import VAEConfig
from flax_pref.rewards.clip import ClipScore
from flax_pref.rewards.decoded import score_latents
from flax_pref.rewards.remote import Remote, Service
from flax_pref.rewards.reward import Reward
from flax_pref.training.rollouts import Prompts, RolloutConfig, Rollouts

SMALL_VAE = VAEConfig(
    block_out_channels=(4, 4, 4, 4),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=1,
    norm_num_groups=2,
    mid_block_add_attention=False,
)

Name = Literal["d3po", "ddpo", "nft", "spo", "tailorpo", "tailorpo-step"]
METHODS: dict[Name, OnlineMethod] = {
    "d3po": D3PO(),
    "ddpo": DDPO(images_per_prompt=2),
    "nft": DiffusionNFT(images_per_prompt=8),
    "spo": SPO(pool=4),
    "tailorpo": TailorPO(),
    "tailorpo-step": TailorPO(train_steps=10),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewards:
    """Times PickScore, counts the memory of its gradient, and measures how long devices wait for a service."""

    parts: tuple[Literal["gradient", "pickscore", "service"], ...] = ("gradient", "pickscore", "service")
    """Parts to measure."""
    batch_size: int = 8
    """Images that are scored at the same time."""
    rounds: int = 3
    """Timed batches of each, in turns; the median counts."""
    reference: bool = True
    """Also time transformers' CLIP in torch, eager, where it is installed (on the CPU)."""
    family: Literal["sd15", "sdxl"] = "sd15"
    """Whose autoencoder decodes."""
    size: int = 512
    """Side of the images in pixels."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    methods: tuple[Name, ...] = tuple(METHODS)
    """Online methods that draw with a service; tailorpo-step learns inside trajectories."""
    prompts: int = 32
    """Prompts of an iteration."""
    at_once: int = 8
    """Prompts drawn at a time."""
    latency: float = 0.5
    """Seconds that the service takes for an answer."""
    serial: bool = False
    """Take these seconds for each batch of the server, one after the other, and not for each request."""
    row_seconds: float = 0.005
    """Seconds that a simulated device takes for one prediction of one image."""
    json: Path | None = None
    """File for the figures."""


def bench_rewards(bench: Rewards) -> dict:
    """Seconds per batch, ours and theirs, GB per image, and shares of time."""
    measured = {"gradient": gradient_memory, "pickscore": scoring, "service": waiting}
    return {
        **{"device": jax.devices()[0].device_kind, "jax": jax.__version__, "dtype": bench.dtype},
        **{part: measured[part](bench) for part in bench.parts},
    }


def scoring(bench: Rewards) -> dict:
    """ViT-H/14 with random weights, on pixels and token ids that are ready; both have the same weights."""
    network = random_network("clip", CLIP_VIT_H, bench.dtype)
    reward = pickscore(network)
    rng = np.random.default_rng(0)
    view = rng.standard_normal((bench.batch_size, 224, 224, 3), np.float32)
    ids = rng.integers(1, 49000, (bench.batch_size, 77)).astype(np.int32)
    ids[:, -1] = CLIP_VIT_H.text_config.eos_token_id
    theirs = torch_pickscore(network.params, view, ids, bench.dtype) if bench.reference else None
    score = jax.jit(lambda reward, view, ids: reward.score(view, ids))
    candidates = {"seconds": lambda: score(reward, view, ids).block_until_ready()}
    if theirs is not None:
        candidates["torch_seconds"] = theirs
    times = time_in_turns(candidates, bench.rounds)
    seconds = medians(times)
    figures = {"batch_size": bench.batch_size, **{name: round(value, 3) for name, value in seconds.items()}}
    figures["each_round"] = each_round(times)
    if theirs is not None:
        difference = np.abs(np.asarray(score(reward, view, ids)) - theirs()).max()
        figures["ratio_to_torch"] = round(seconds["seconds"] / seconds["torch_seconds"], 3)
        figures["largest_difference"] = float(f"{difference:.2g}")
    return figures


def pickscore(network) -> ClipScore:
    """PickScore of a network; captions come as token ids."""
    return ClipScore(network.params, "pickscore", network.graphdef, CLIP_VIT_H.vision_config.image_size, np.asarray)


def torch_pickscore(params: dict, view: np.ndarray, ids: np.ndarray, dtype: str) -> Callable[[], np.ndarray] | None:
    """The same score by transformers in torch, in eager mode; None where it is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        print("transformers or torch is not installed: timing ours alone", file=sys.stderr)
        return None
    config = transformers.CLIPConfig(**CLIP_VIT_H.to_dict())
    with torch.device("meta"):
        clip = transformers.CLIPModel(config)
    weights = {name: torch.from_numpy(np.array(array, order="C")) for name, array in to_stored(params).items()}
    clip.load_state_dict(weights, strict=False, assign=True)
    for tower in (clip.text_model, clip.vision_model):  # what is no weight was not made on the meta device
        positions = tower.embeddings.position_embedding.num_embeddings
        tower.embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    clip = clip.to(getattr(torch, dtype)).eval()
    pixels = torch.from_numpy(view).permute(0, 3, 1, 2).contiguous().to(getattr(torch, dtype))
    tokens = torch.from_numpy(ids).long()

    def run() -> np.ndarray:
        with torch.inference_mode():
            out = clip(input_ids=tokens, pixel_values=pixels)
            return out.logits_per_image.diagonal().float().numpy()

    return run


def gradient_memory(bench: Rewards) -> dict:
    """What the program of the gradient of PickScore with respect to one latent needs besides weights."""
    vae, clip = (
        abstract_network(kind, config, jnp.dtype(bench.dtype))
        for kind, config in (("vae", FAMILIES[bench.family].vae), ("clip", CLIP_VIT_H))
    )
    side = bench.size // vae.config.downscale_factor
    latents = jax.ShapeDtypeStruct((1, side, side, vae.config.latent_channels), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 77), jnp.int32)

    def gigabytes(remat: Remat) -> float:
        network = with_remat(vae, remat)

        def score(latents, params, reward, ids):
            return score_latents(reward, network._replace(params=params), latents, ids).sum()

        compiled = jax.jit(jax.grad(score)).lower(latents, network.params, pickscore(clip), ids).compile()
        memory = compiled.memory_analysis()
        assert memory is not None  # CPUs and accelerators tell it
        return round(memory.temp_size_in_bytes / 1e9, 2)

    return {
        **{"family": bench.family, "size": bench.size},
        "temporary_gb_per_image": {remat: gigabytes(remat) for remat in ("none", "block")},
    }


# ----------------------------------------------------------------------------------------------------------------------
# Devices that wait for a service


class Device:
    """A simulated device, which takes its time for predictions and does one thing at a time."""

    def __init__(self):
        self.busy, self.row_seconds, self._lock = 0.0, 0.0, threading.Lock()

    def predict_of(self, params: Any, frozen: Any) -> Predict:
        """As `Rollouts` takes it: a network that is no more than its time."""

        def predict(networks, latents, timesteps, text):
            rows = latents.shape[0] * latents.shape[1]
            took = jax.pure_callback(partial(self._work, rows), jax.ShapeDtypeStruct((), jnp.float32), latents.mean())
            return 0.1 * latents + 0 * took

        return predict

    def _work(self, rows: int, _: Any) -> np.float32:
        with self._lock:
            begun = time.perf_counter()
            time.sleep(rows * self.row_seconds)
            self.busy += time.perf_counter() - begun
        return np.float32(0)


@dataclasses.dataclass(frozen=True)
class Late(Service):
    """A service whose answers are on their way for some time."""

    latency: float = 0.0

    def _ask_once(self, body: bytes) -> bytes:
        answer = super()._ask_once(body)
        time.sleep(self.latency)
        return answer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InJittedCode:
    """A reward elsewhere that the devices wait for, as all did before they were asked in the background."""

    reward: Remote = dataclasses.field(metadata={"static": True})

    name = "in jitted code"
    differentiable = False

    def prepare(self, captions):
        """See `rewards.reward.Reward`."""
        return self.reward.prepare(captions)

    def view(self, images):
        """See `rewards.reward.Reward`."""
        return self.reward.view(images)

    def score(self, view, prepared):
        """See `rewards.reward.Reward`."""
        return self.reward.score(view, prepared)


def waiting(bench: Rewards) -> dict:
    """Share of the time of drawing in which a simulated device waits, with the server of integrations/reward_server.

    Images have 16 pixels, so that this machine decodes and encodes them in a short time, which counts as waiting: how
    much that is, a service that answers at once tells.
    """
    figures: dict[str, Any] = {
        **{"latency": bench.latency, "row_seconds": bench.row_seconds},
        **{"prompts": bench.prompts, "at_once": bench.at_once, "rounds": bench.rounds},
    }
    vae = random_network("vae", SMALL_VAE)
    with reward_server(bench.latency if bench.serial else 0.0) as slow, reward_server(0.0) as prompt:
        late = Remote("mock", Late(slow, latency=0.0 if bench.serial else bench.latency))
        now = Remote("mock", Service(prompt))
        rewards = {"before": InJittedCode(late), "after": late, "after_without_latency": now}
        for name in bench.methods:
            figures[name] = {when: drawing(bench, name, vae, reward) for when, reward in rewards.items()}
            print(f"{name}: {figures[name]}", file=sys.stderr)
    return figures


def drawing(bench: Rewards, name: Name, vae: Network, reward: Reward) -> dict:
    """Medians over iterations, after one that compiles: seconds, and the share in which the device waits."""
    method, device = METHODS[name], Device()
    within = name == "tailorpo-step"
    config = RolloutConfig(
        prompts=bench.prompts, at_once=bench.at_once, batch_size=bench.prompts, update="step" if within else "iteration"
    )
    hidden = np.zeros((bench.prompts, 4), np.float32)
    prompts = Prompts(
        captions=[f"prompt {n}" for n in range(bench.prompts)],
        ids=range(bench.prompts),
        text={"hidden": hidden},
        empty={"hidden": hidden[0]},
    )
    arguments = device.predict_of, (), vae, prompts, reward, FAMILIES["sd15"].scheduler_config, config
    source = Rollouts(method, *arguments, size=(16, 16), seed=0)

    def iteration() -> tuple[float, float]:
        begun, busy = time.perf_counter(), device.busy
        for _ in range(source.minibatches):
            jax.block_until_ready(source.next({}))
        seconds = time.perf_counter() - begun
        return seconds, 1 - (device.busy - busy) / seconds

    iteration()
    device.row_seconds = bench.row_seconds
    seconds, shares = zip(*(iteration() for _ in range(bench.rounds)), strict=True)
    return {"seconds": round(statistics.median(seconds), 2), "waits": round(statistics.median(shares), 3)}


@contextlib.contextmanager
def reward_server(latency: float) -> Iterator[str]:
    """The address of a server that takes so long for each answer."""
    serve = INTEGRATIONS / "reward_server" / "serve.py"
    flags = ["--scorer", "mock", "--port", "0", "--batch-size", "4096", "--queue", "4096"]
    flags += ["--mock-seconds", str(latency)] if latency else []
    with subprocess.Popen([sys.executable, serve, *flags], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()
