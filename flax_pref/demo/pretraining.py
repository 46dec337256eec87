"""How the base checkpoint of the demo world is made: a small Stable Diffusion, trained from nothing."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx
from tokenizers import models, pre_tokenizers, trainers
from tqdm import tqdm

from flax_pref.checkpoints.diffusers import Pipeline, load_vae
from flax_pref.checkpoints.tokenizer import CLIPTokenizer
from flax_pref.checkpoints.weights import save_network
from flax_pref.config import check_least, check_positive, check_seed, check_share
from flax_pref.demo.loop import fit
from flax_pref.demo.losses import autoencoding, denoising
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.models.clip import CLIPTextConfig, CLIPTextModel
from flax_pref.models.network import Network
from flax_pref.models.unet import UNet2DCondition, UNetConfig
from flax_pref.models.vae import AutoencoderKL, VAEConfig
from flax_pref.world import scenes as world

# The schedule of Stable Diffusion 1.5.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One training run: Adam, a linear warm-up and a cosine decay to zero."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    average_decay: float = 0.0
    """Of the moving average of the weights, which is what is kept; 0 keeps the last weights."""
    largest_weight: float = 1.0
    """Of a timestep in the denoising loss, see `demo.losses.velocity_weights`; for the UNet only."""

    def __post_init__(self):
        check_least(self, 1, "steps", "batch_size")
        check_positive(self, "learning_rate")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be less than steps={self.steps}")

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with the phase's schedule; gradients are clipped to norm 1."""
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, self.warmup_steps, self.steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.01))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Trains the base model of the demo world.

    Vocabulary and end tokens of the text encoder follow from the tokenizer.
    """

    output: Path
    """Folder of the run: `vae/` when the autoencoder is trained, `pipeline/` at the end. A `vae/` that is there already
    is used, so an interrupted run resumes with the second phase."""
    tokenizer_length: int
    vae: VAEConfig
    unet: UNetConfig
    text_encoder: CLIPTextConfig
    autoencoder: Phase
    decoder: Phase
    diffusion: Phase
    layout: Phase
    """UNet and text encoder learn on, with more weight on high noise: what goes where takes them longest."""
    examples: int = 40_000
    """Distinct images that the UNet and the text encoder learn from."""
    caption_dropout: float = 0.1
    """Share of empty captions, from which classifier-free guidance learns its unconditional prediction."""
    seed: int = 0

    def __post_init__(self):
        check_least(self, 1, "tokenizer_length", "examples")
        check_share(self, "caption_dropout")
        check_seed(self.seed)


def train_base(config: BaseConfig) -> Pipeline:
    """Trains every part and writes the autoencoder when it is done; the caller writes the pipeline."""
    folder = config.output / "vae"
    if folder.is_dir():
        print(f"using the autoencoder in {folder}")
        vae = load_vae(folder)
    else:
        vae = train_autoencoder(config.vae, config.autoencoder, config.decoder, config.seed)
        save_network(vae, folder)
    captions = (scene.caption for scene, _ in zip(world.scenes("train", config.seed), range(5000), strict=False))
    tokenizer = train_tokenizer(captions, config.tokenizer_length)
    unet, text_encoder = train_diffusion(config, vae, tokenizer)
    return Pipeline(unet, vae, (text_encoder,), (tokenizer,), SCHEDULER)


def new_network(module: Callable[..., nnx.Module], config: Any, seed: int) -> Network:
    """A network with random weights."""
    graphdef, state = nnx.split(module(config, rngs=nnx.Rngs(params=seed)))
    return Network(config, graphdef, nnx.to_pure_dict(state))


def training_images(batch_size: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of the training mixture: `images [B, 64, 64, 3]` in [-1, 1]."""
    rng = np.random.default_rng([seed, 1])
    while True:
        yield {"images": 2 * np.stack([world.training_example(rng)[0] for _ in range(batch_size)]) - 1}


def train_autoencoder(config: VAEConfig, phase: Phase, decoder_phase: Phase, seed: int) -> Network:
    """The autoencoder, with `scaling_factor` set so that scaled latents have unit variance.

    The decoder learns on after the encoder is frozen, as that of Stable Diffusion did: sharp edges take it longest.
    """
    vae = new_network(AutoencoderKL, config, seed)

    def objective(params, batch, key):
        module = nnx.merge(vae.graphdef, params)
        return autoencoding(module.encode, module.decode, batch, key)

    params = _fit_images(objective, vae.params, phase, seed, "autoencoder")
    frozen = {name: params.pop(name) for name in ("encoder", "quant_conv")}

    def decoder_objective(decoder, batch, key):
        return objective({**jax.lax.stop_gradient(frozen), **decoder}, batch, key)

    params = frozen | _fit_images(decoder_objective, params, decoder_phase, seed + 1, "decoder")
    encode = jax.jit(lambda params, images: nnx.merge(vae.graphdef, params).encode(images)[0])
    latents = encode(params, next(training_images(512, seed + 2))["images"])
    return vae._replace(
        config=dataclasses.replace(config, scaling_factor=round(float(1 / latents.std()), 5)), params=params
    )


def _fit_images(objective, params: dict, phase: Phase, seed: int, label: str) -> dict:
    state, _ = fit(
        objective,
        params,
        training_images(phase.batch_size, seed),
        optimizer=phase.optimizer(),
        steps=phase.steps,
        seed=seed,
        average_decay=phase.average_decay,
        label=label,
    )
    return state.average


def train_tokenizer(captions: Iterable[str], model_max_length: int) -> CLIPTokenizer:
    """A byte-pair vocabulary in the layout of CLIP's, in which every word of the captions is one token."""
    trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False)
    encoder = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(encoder.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(piece + "</w>" for piece in alphabet), *("".join(pair) for pair in merges)]
    # The end token has the largest id: transformers looks for it there.
    tokens = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: index for index, token in enumerate(tokens)}, merges, model_max_length)


class Corpus(NamedTuple):
    """Encoded training examples; latents are scaled."""

    mean: np.ndarray  # [N, h, w, Z]
    std: np.ndarray  # [N, h, w, Z]
    input_ids: np.ndarray  # [N, T]


def encode_corpus(vae: Network, tokenizer: CLIPTokenizer, examples: int, seed: int) -> Corpus:
    """Draws examples of the training mixture and encodes each once."""

    @jax.jit
    def encode(params, images):
        mean, logvar = nnx.merge(vae.graphdef, params).encode(images)
        return vae.config.scaling_factor * mean, vae.config.scaling_factor * jnp.exp(logvar / 2)

    rng = np.random.default_rng([seed, 2])
    batch_size, parts, captions = 64, [], []
    with tqdm(total=examples, desc="encoding", unit="image") as progress:
        while len(captions) < examples:
            images, batch = zip(*(world.training_example(rng) for _ in range(batch_size)), strict=True)
            parts.append(jax.device_get(encode(vae.params, 2 * np.stack(images) - 1)))
            captions += batch
            progress.update(batch_size)
    mean, std = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Corpus(mean, std, tokenizer(captions))


def latent_batches(corpus: Corpus, empty: np.ndarray, batch_size: int, caption_dropout: float, seed: int):
    """Endless random batches `{"latents", "text"}`; a share of the captions is replaced by the empty one `[T]`."""
    rng = np.random.default_rng([seed, 3])
    while True:
        rows = rng.integers(len(corpus.mean), size=batch_size)
        noise = rng.standard_normal(corpus.mean[rows].shape, dtype=np.float32)
        dropped = rng.random((batch_size, 1)) < caption_dropout
        yield {
            "latents": corpus.mean[rows] + corpus.std[rows] * noise,
            "text": np.where(dropped, empty, corpus.input_ids[rows]),
        }


def train_diffusion(config: BaseConfig, vae: Network, tokenizer: CLIPTokenizer) -> tuple[Network, Network]:
    """UNet and text encoder, trained together on the encoded mixture."""
    corpus = encode_corpus(vae, tokenizer, config.examples, config.seed)
    text_config = dataclasses.replace(
        config.text_encoder,
        vocab_size=len(tokenizer.vocab),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.vocab[tokenizer.bos_token],
        eos_token_id=tokenizer.vocab[tokenizer.eos_token],
        pad_token_id=tokenizer.vocab[tokenizer.pad_token],
    )
    unet = new_network(UNet2DCondition, config.unet, config.seed)
    text_encoder = new_network(CLIPTextModel, text_config, config.seed + 1)
    schedule = NoiseSchedule.from_dict(SCHEDULER)

    def objective(params, batch, key, *, largest_weight):
        def predict(networks, latents, timesteps, input_ids):
            text = nnx.merge(text_encoder.graphdef, params["text_encoder"])(input_ids[:, 0]).last_hidden_state
            return nnx.merge(unet.graphdef, params["unet"])(latents[:, 0], timesteps, text)[:, None]

        return denoising(predict, batch, key, schedule=schedule, largest_weight=largest_weight)

    trained = {"unet": unet.params, "text_encoder": text_encoder.params}
    for seed, (label, phase) in enumerate([("diffusion", config.diffusion), ("layout", config.layout)], config.seed):
        state, _ = fit(
            partial(objective, largest_weight=phase.largest_weight),
            trained,
            latent_batches(corpus, tokenizer([""])[0], phase.batch_size, config.caption_dropout, seed),
            optimizer=phase.optimizer(),
            steps=phase.steps,
            seed=seed,
            average_decay=phase.average_decay,
            label=label,
        )
        trained = state.average
    return unet._replace(params=trained["unet"]), text_encoder._replace(params=trained["text_encoder"])
