"""A Stable Diffusion checkpoint: where its parts lie and what they are, and the same with its weights.

`checkpoints.diffusers` finds the parts in a folder, `checkpoints.single_file` in one file.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
from flax import nnx

from flax_pref.checkpoints.tokenizer import CLIPTokenizer
from flax_pref.checkpoints.weights import Placement
from flax_pref.models.network import Network

# Folders of the text encoders and tokenizers of each supported pipeline class.
FAMILIES = {
    "StableDiffusionPipeline": (("text_encoder", "tokenizer"),),
    "StableDiffusionXLPipeline": (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")),
}


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The parts of a Stable Diffusion checkpoint.

    Attributes:
        unet: predicts the noise.
        vae: between images and latents.
        text_encoders: one (SD1.5), or two (SDXL).
        tokenizers: of the text encoders.
        scheduler_config: scheduler/scheduler_config.json as it is.
        force_zeros_for_empty_prompt: whether the unconditional prediction of SDXL sees zeros instead of an encoded
            empty prompt.
        clip_skip: layer of the text encoders that the UNet sees, counted from the last, which is 1 (default: 1, or 2
            for SDXL).

    Example:
        >>> pipeline = fp.load_pipeline("demo")
        >>> pipeline.class_name, pipeline.unet.config.in_channels
        ('StableDiffusionPipeline', 8)
        >>> unet = fp.load_modules(pipeline.unet, {"dpo": "dpo.safetensors"}).base
        >>> pipeline = pipeline.replace(unet=unet)
    """

    unet: Network
    vae: Network
    text_encoders: tuple[Network, ...]
    tokenizers: tuple[CLIPTokenizer, ...]
    scheduler_config: dict[str, Any]
    force_zeros_for_empty_prompt: bool = False
    clip_skip: int | None = None

    def replace(self, **parts: Any) -> "Pipeline":
        """The pipeline with other parts, e.g. `pipeline.replace(unet=unet)`; arguments are attributes of this class."""
        return dataclasses.replace(self, **parts)

    @property
    def class_name(self) -> str:
        """The class of diffusers that loads this checkpoint."""
        return next(name for name, folders in FAMILIES.items() if len(folders) == len(self.text_encoders))


class Load(Protocol):
    """Reads the weights of a part; arguments as in `weights.load_network`."""

    def __call__(self, dtype: Any, *, param_dtype: Any = None, place: Placement | None = None) -> Network:
        """The network with its weights."""
        ...


@dataclasses.dataclass(frozen=True)
class Part:
    """A network of a checkpoint whose weights are not read yet.

    Attributes:
        config: of the network.
        path: of its folder, or of the file with the whole checkpoint.
        load: reads the weights.
    """

    config: Any
    path: Path
    load: Load

    @property
    def described_by(self) -> Path:
        """The file that says of which sizes the network is, for messages."""
        return self.path if self.path.is_file() else self.path / "config.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose weights are not read yet.

    Attributes:
        path: folder or file.
        class_name: the class of diffusers that loads it, one of `FAMILIES`.
        networks: its parts by the names of their folders in the layout of diffusers: unet, vae, text_encoder and, for
            SDXL, text_encoder_2. A file may lack some.
        read_tokenizers: reads those of the text encoders.
        scheduler_config: as a scheduler_config.json has it.
        described_by: the file that has the scheduler config, for messages.
        force_zeros_for_empty_prompt, clip_skip: see `Pipeline`.
    """

    path: Path
    class_name: str
    networks: Mapping[str, Part]
    read_tokenizers: Callable[[], tuple[CLIPTokenizer, ...]]
    scheduler_config: dict[str, Any]
    described_by: Path
    force_zeros_for_empty_prompt: bool = False
    clip_skip: int | None = None

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders."""
        return tuple(name for name, _ in FAMILIES[self.class_name])

    def part(self, name: str) -> Part:
        """A network by its name.

        Raises:
            ValueError: the checkpoint lacks it.
        """
        if name not in self.networks:
            option = "--vae" if name == "vae" else "--text-encoders"
            raise ValueError(
                f"{self.path}: holds no {name}; take it from another checkpoint of the family: {option} FOLDER_OR_FILE"
            )
        return self.networks[name]

    def replaced(self) -> dict[str, Path]:
        """Where networks and tokenizers lie that are not the checkpoint's own, by their names."""
        places = self.contents(tuple(self.networks))
        return {name: path for name, path in places.items() if self.path not in (path, path.parent)}

    def contents(self, names: Sequence[str]) -> dict[str, Path]:
        """Folders and files of these parts, with the tokenizers of text encoders; a single file counts once.

        Args:
            names: of networks, and "scheduler".
        """
        tokenizers, places = dict(FAMILIES[self.class_name]), dict[str, Path]()
        for name in names:
            if name == "scheduler":
                places[name] = self.described_by.parent if self.path.is_dir() else self.path
                continue
            places[name] = self.part(name).path
            if name in tokenizers and places[name].is_dir():
                places[tokenizers[name]] = places[name].with_name(tokenizers[name])
        first = {path: name for name, path in reversed(places.items())}
        return {name: path for name, path in places.items() if first[path] == name}

    def with_vae(self, vae: Part) -> "Checkpoint":
        """The checkpoint with another autoencoder."""
        return dataclasses.replace(self, networks={**self.networks, "vae": vae})

    def with_text_encoders(self, other: "Checkpoint") -> "Checkpoint":
        """The checkpoint with the text encoders and tokenizers of another one.

        Raises:
            ValueError: the other one is of another family, or lacks them.
        """
        if other.class_name != self.class_name:
            raise ValueError(
                f"{other.path}: is a {other.class_name}, but {self.path} is a {self.class_name}; expected text "
                "encoders of the same family"
            )
        networks = {**self.networks, **{name: other.part(name) for name in other.text_encoders}}
        return dataclasses.replace(self, networks=networks, read_tokenizers=other.read_tokenizers)

    def with_clip_skip(self, layer: int) -> "Checkpoint":
        """The checkpoint with another layer of its text encoders, see `Pipeline`.

        Raises:
            ValueError: they have fewer layers.
        """
        layers = min(self.config(name).num_hidden_layers for name in self.text_encoders)
        if not 1 <= layer <= layers:
            raise ValueError(f"{self.path}: clip_skip={layer}; expected 1 to {layers}, the layers of its text encoders")
        return dataclasses.replace(self, clip_skip=layer)

    def config(self, name: str) -> Any:
        """The config of a network; errors as in `part`."""
        return self.part(name).config

    def load(
        self, dtype=jnp.float32, *, param_dtype=None, place: Placement | None = None, with_unet: bool = True
    ) -> Pipeline:
        """Reads the weights; arguments and errors as in `diffusers.load_pipeline`."""
        options = {"param_dtype": param_dtype, "place": place}
        unet = self.part("unet")
        # First, for their embeddings are the largest arrays, and one that is read is in memory twice.
        text_encoders = tuple(self.part(name).load(dtype, **options) for name in self.text_encoders)
        pipeline = Pipeline(
            unet=unet.load(dtype, **options) if with_unet else Network(unet.config, nnx.graphdef(nnx.Module()), {}),
            vae=self.part("vae").load(dtype, **options),
            text_encoders=text_encoders,
            tokenizers=self.read_tokenizers(),
            scheduler_config=self.scheduler_config,
            force_zeros_for_empty_prompt=self.force_zeros_for_empty_prompt,
            clip_skip=self.clip_skip,
        )
        self._check(pipeline)
        return pipeline

    def _check(self, pipeline: Pipeline) -> None:
        """That the parts of a pipeline fit each other; each is fine by itself."""
        unet, vae = pipeline.unet.config, pipeline.vae.config
        encoders = [part.config for part in pipeline.text_encoders]
        where = self.part("unet").described_by
        if unet.in_channels != vae.latent_channels or unet.out_channels != vae.latent_channels:
            raise ValueError(
                f"{where}: in_channels={unet.in_channels} and out_channels={unet.out_channels} are not supported with "
                f"the {vae.latent_channels} latent_channels of the autoencoder; supported: networks for text to image, "
                "none for inpainting (9 channels), depth or editing"
            )
        if (width := sum(encoder.hidden_size for encoder in encoders)) != unet.cross_attention_dim:
            raise ValueError(
                f"{where}: cross_attention_dim={unet.cross_attention_dim}, but the text encoders give {width} "
                "(hidden_size in their config.json): check that the folders belong together"
            )
        if (len(encoders) == 2) != (unet.addition_embed_type == "text_time"):
            raise ValueError(
                f"{where}: addition_embed_type={unet.addition_embed_type!r} does not go with {pipeline.class_name}: "
                "check that the folders belong together"
            )
        if len(encoders) == 2:
            pooled = encoders[1].projection_dim if encoders[1].with_projection else 0
            if pooled + 6 * unet.addition_time_embed_dim != unet.projection_class_embeddings_input_dim:
                raise ValueError(
                    f"{where}: projection_class_embeddings_input_dim={unet.projection_class_embeddings_input_dim}, but "
                    f"the pooled prompt of text_encoder_2 has {pooled} and the six sizes "
                    f"{unet.addition_time_embed_dim} each: check that the folders belong together"
                )
        for (name, tokenizer_name), encoder, tokenizer in zip(
            FAMILIES[pipeline.class_name], encoders, pipeline.tokenizers, strict=True
        ):
            source = self.part(name).path
            where = source if source.is_file() else source.with_name(tokenizer_name)
            if tokenizer.model_max_length > encoder.max_position_embeddings:
                raise ValueError(
                    f"{where}: texts of {tokenizer.model_max_length} tokens, but {name}/config.json says "
                    f"max_position_embeddings={encoder.max_position_embeddings}: check that the folders belong together"
                )
            if tokenizer.size != encoder.vocab_size or max(tokenizer.vocab.values()) >= encoder.vocab_size:
                raise ValueError(
                    f"{where}: {tokenizer.size} tokens, {tokenizer.size - len(tokenizer.vocab)} of them added, but the "
                    f"embedding has vocab_size={encoder.vocab_size} rows in {name}/config.json; expected a row for "
                    "each token: check that the folders belong together, and that tokens that were added to one, e.g. "
                    "by textual inversion, were saved with both"
                )
