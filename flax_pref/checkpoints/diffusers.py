"""Stable Diffusion checkpoints as folders in the layout of diffusers, in and out, without torch.

A folder holds `model_index.json` and one subfolder per component: `unet/`, `vae/`, `text_encoder/`, `tokenizer/`,
`scheduler/`, and in SDXL `text_encoder_2/` and `tokenizer_2/`. How a network's folder is read is in
`checkpoints/weights.py`; where a Hub id leads is in `checkpoints/hub.py`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from flax_pref.checkpoints.hub import find_checkpoint
from flax_pref.checkpoints.tokenizer import CLIPTokenizer, load_tokenizer
from flax_pref.checkpoints.weights import COMPONENTS, LAYOUT, Placement, load_network, read_config, save_network
from flax_pref.files import new_folder, read_json, write_json
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

    def replace(self, **parts: Any) -> "Pipeline":
        """The pipeline with other parts, e.g. `pipeline.replace(unet=unet)`; arguments are attributes of this class."""
        return dataclasses.replace(self, **parts)

    @property
    def class_name(self) -> str:
        """The class of diffusers that loads this checkpoint."""
        return next(name for name, folders in FAMILIES.items() if len(folders) == len(self.text_encoders))


def load_pipeline(
    path_or_id: str | Path,
    dtype=jnp.float32,
    *,
    param_dtype=None,
    variant: str | None = None,
    place: Placement | None = None,
    with_unet: bool = True,
) -> Pipeline:
    """Reads a Stable Diffusion 1.x, 2.x or XL checkpoint.

    Args:
        path_or_id: folder in the layout of diffusers, id of a Hub repository, or "demo", the small checkpoint of this
            package (64 x 64 pixels); see `hub.find_checkpoint`.
        dtype: what the networks compute in. An autoencoder that needs float32's range (`force_upcast`) computes in
            float32 where float16 is asked for.
        param_dtype: what their parameters are kept in; None: as `dtype`.
        variant: of the weight files, e.g. "fp16"; None: the full ones if they are there, else the half ones.
        place: says where each parameter goes; None: the default device.
        with_unet: False leaves out the weights of the UNet, by far the most, where only the encoders are needed.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the pipeline, a config field or a weight is not what these networks need, or a file is damaged.

    Example:
        >>> pipeline = fp.load_pipeline("demo")  # or "stable-diffusion-v1-5/stable-diffusion-v1-5"
        >>> pipeline.scheduler_config["_class_name"]
        'DDIMScheduler'
    """
    folder = find_checkpoint(path_or_id, variant=variant)
    if folder.is_file():
        raise ValueError(f"{folder}: {not_a_folder(folder)}")
    index_file = folder / "model_index.json"
    index = read_json(index_file, expected=LAYOUT)
    class_name = index.get("_class_name")
    if class_name not in FAMILIES:
        raise ValueError(
            f"{index_file}: _class_name={class_name!r} is not supported; supported: {' or '.join(map(repr, FAMILIES))}"
        )
    # The default of the class in diffusers; published SDXL folders say true.
    zeros = index.get("force_zeros_for_empty_prompt", True)
    if not isinstance(zeros, bool):
        raise ValueError(f"{index_file}: force_zeros_for_empty_prompt={zeros!r:.80}; expected true or false")
    options = {"param_dtype": param_dtype, "variant": variant, "place": place}
    pipeline = Pipeline(
        unet=load_unet(folder / "unet", dtype, **options) if with_unet else _without_weights(folder / "unet"),
        vae=load_vae(folder / "vae", dtype, **options),
        text_encoders=tuple(load_text_encoder(folder / name, dtype, **options) for name, _ in FAMILIES[class_name]),
        tokenizers=tuple(load_tokenizer(folder / name) for _, name in FAMILIES[class_name]),
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json", expected=LAYOUT),
        force_zeros_for_empty_prompt=class_name == "StableDiffusionXLPipeline" and zeros,
    )
    _check_parts(pipeline, folder)
    return pipeline


def _without_weights(folder: Path) -> Network:
    return Network(read_config("unet", folder), nnx.graphdef(nnx.Module()), params={})


def not_a_folder(file: Path) -> str:
    """Why a single file is no checkpoint, and what to do about it."""
    pickle = "" if file.suffix == ".safetensors" else "may hold code that runs when it is read, and "
    return (
        f"{pickle}is a single file, expected {LAYOUT}; where you trust it, convert it with diffusers: "
        "StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
    )


def _check_parts(pipeline: Pipeline, folder: Path) -> None:
    """That the parts of a pipeline fit each other; each is fine by itself."""
    unet, vae, encoders = pipeline.unet.config, pipeline.vae.config, [part.config for part in pipeline.text_encoders]
    where = folder / "unet" / "config.json"
    if unet.in_channels != vae.latent_channels or unet.out_channels != vae.latent_channels:
        raise ValueError(
            f"{where}: in_channels={unet.in_channels} and out_channels={unet.out_channels} are not supported with the "
            f"{vae.latent_channels} latent_channels of vae/config.json; supported: networks for text to image, "
            "none for inpainting (9 channels), depth or editing"
        )
    if (width := sum(encoder.hidden_size for encoder in encoders)) != unet.cross_attention_dim:
        raise ValueError(
            f"{where}: cross_attention_dim={unet.cross_attention_dim}, but the text encoders give {width} "
            "(hidden_size in their config.json): check that the folders belong together"
        )
    if (len(encoders) == 2) != (unet.addition_embed_type == "text_time"):
        raise ValueError(
            f"{where}: addition_embed_type={unet.addition_embed_type!r} does not go with {pipeline.class_name}: check "
            "that the folders belong together"
        )
    if len(encoders) == 2:
        pooled = encoders[1].projection_dim if encoders[1].with_projection else 0
        if pooled + 6 * unet.addition_time_embed_dim != unet.projection_class_embeddings_input_dim:
            raise ValueError(
                f"{where}: projection_class_embeddings_input_dim={unet.projection_class_embeddings_input_dim}, but the "
                f"pooled prompt of text_encoder_2 has {pooled} and the six sizes {unet.addition_time_embed_dim} each: "
                "check that the folders belong together"
            )
    for (name, tokenizer_name), encoder, tokenizer in zip(
        FAMILIES[pipeline.class_name], encoders, pipeline.tokenizers, strict=True
    ):
        if tokenizer.model_max_length > encoder.max_position_embeddings:
            raise ValueError(
                f"{folder / tokenizer_name}: texts of {tokenizer.model_max_length} tokens, but {name}/config.json says "
                f"max_position_embeddings={encoder.max_position_embeddings}: check that the folders belong together"
            )
        if tokenizer.size != encoder.vocab_size or max(tokenizer.vocab.values()) >= encoder.vocab_size:
            raise ValueError(
                f"{folder / tokenizer_name}: {tokenizer.size} tokens, {tokenizer.size - len(tokenizer.vocab)} of them "
                f"added, but the embedding has vocab_size={encoder.vocab_size} rows in {name}/config.json; expected a "
                "row for each token: check that the folders belong together, and that tokens that were added to one, "
                "e.g. by textual inversion, were saved with both"
            )


def load_unet(folder: str | Path, dtype=jnp.float32, **options) -> Network:
    """Reads a `unet/` folder; arguments and errors as in `weights.load_network`."""
    return load_network("unet", folder, dtype, **options)


def load_vae(folder: str | Path, dtype=jnp.float32, **options) -> Network:
    """Reads a `vae/` folder; arguments and errors as in `weights.load_network`."""
    return load_network("vae", folder, dtype, **options)


def load_text_encoder(folder: str | Path, dtype=jnp.float32, **options) -> Network:
    """Reads a `text_encoder/` or `text_encoder_2/` folder; arguments and errors as in `weights.load_network`."""
    return load_network("text_encoder", folder, dtype, **options)


def save_pipeline(pipeline: Pipeline, folder: str | Path, *, dtype=jnp.float32) -> None:
    """Writes a folder that `DiffusionPipeline.from_pretrained` of diffusers and `load_pipeline` read.

    The folder appears under its name only when it is complete.

    Args:
        pipeline: what to write.
        folder: must not exist, or be empty.
        dtype: of the stored weights, e.g. `jnp.float16`.

    Raises:
        FileExistsError: `folder` holds something.
        ValueError: a network holds parameters that its published form has not, e.g. LoRA matrices.

    Example:
        >>> pipeline = fp.load_pipeline("demo")
        >>> fp.save_pipeline(pipeline, "copy", dtype="float16")
        >>> fp.load_pipeline("copy").unet.config == pipeline.unet.config
        True
    """
    folders = FAMILIES[pipeline.class_name]
    networks = {"unet": pipeline.unet, "vae": pipeline.vae}
    networks |= {name: network for (name, _), network in zip(folders, pipeline.text_encoders, strict=True)}
    index = {
        "_class_name": pipeline.class_name,
        **{name: list(_library(network)) for name, network in networks.items()},
        **{name: ["transformers", "CLIPTokenizer"] for _, name in folders},
        "scheduler": ["diffusers", pipeline.scheduler_config["_class_name"]],
    }
    if pipeline.class_name == "StableDiffusionXLPipeline":
        index["force_zeros_for_empty_prompt"] = pipeline.force_zeros_for_empty_prompt
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    with new_folder(folder) as unfinished:
        for name, network in networks.items():
            save_network(network, unfinished / name, dtype=dtype)
        for (_, name), tokenizer in zip(folders, pipeline.tokenizers, strict=True):
            tokenizer.save(unfinished / name)
        write_json(unfinished / "scheduler" / "scheduler_config.json", pipeline.scheduler_config)
        write_json(unfinished / "model_index.json", index)


def _library(network: Network) -> tuple[str, str]:
    component = next(component for component in COMPONENTS.values() if isinstance(network.config, component.config))
    return component.library(network.config)
