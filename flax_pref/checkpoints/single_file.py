"""Stable Diffusion checkpoints as single files in the layout of the original code, in and out, without torch.

Such a file holds the weights of all networks under the names of the code that Stable Diffusion was released with, and
no configs: sizes follow from the shapes of the weights, and what shapes do not tell (heads, activations, the scheduler)
from the family. Tokenizers are CLIP's, which is in this package.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from flax_pref.checkpoints.checkpoint import Checkpoint, Part, Pipeline
from flax_pref.checkpoints.clip_files import PARTS, OpenClipTensors
from flax_pref.checkpoints.model_flags import PredictionType
from flax_pref.checkpoints.module_info import ARCHITECTURES, PREDICTION_KEY, PREDICTIONS, modelspec
from flax_pref.checkpoints.original import openclip_text, unet_layers, vae_layers
from flax_pref.checkpoints.tokenizer import clip_tokenizer
from flax_pref.checkpoints.weights import (
    COMPONENTS,
    Placement,
    abstract_network,
    fill,
    open_tensors,
    read_shapes,
    stored_names,
    to_stored,
)
from flax_pref.files import replacing
from flax_pref.models.clip import CLIPTextConfig
from flax_pref.models.network import Network
from flax_pref.models.presets import SD15, SDXL
from flax_pref.models.unet import UNetConfig
from flax_pref.models.vae import VAEConfig

Shapes = Mapping[str, tuple[int, ...]]


class Layout(NamedTuple):
    """Where the networks of a family lie in a file, and what shapes do not tell.

    Attributes:
        class_name: the class of diffusers that loads it.
        text_encoders: prefix of each text encoder's names, of transformers ("...transformer.") or OpenCLIP
            ("...model."), by its folder in the layout of diffusers.
        text_configs: their configs; the sizes come from the shapes.
        pad_tokens: of their tokenizers.
        scheduler_config: of the scheduler that the family ships with.
        scaling_factor: of its latents.
        architecture: its name in the metadata of files (modelspec).
    """

    class_name: str
    text_encoders: Mapping[str, str]
    text_configs: tuple[CLIPTextConfig, ...]
    pad_tokens: tuple[str, ...]
    scheduler_config: Mapping[str, Any]
    scaling_factor: float
    architecture: str


UNET, VAE = "model.diffusion_model.", "first_stage_model."
VAE_ALONE = "encoder.conv_in.weight"
END = "<|endoftext|>"
LAYOUTS = {
    "sd1": Layout(
        class_name="StableDiffusionPipeline",
        text_encoders={"text_encoder": "cond_stage_model.transformer."},
        text_configs=SD15.text_encoders,
        pad_tokens=(END,),
        scheduler_config=SD15.scheduler_config,
        scaling_factor=SD15.vae.scaling_factor,
        architecture=ARCHITECTURES[768],
    ),
    "sd2": Layout(
        class_name="StableDiffusionPipeline",
        text_encoders={"text_encoder": "cond_stage_model.model."},
        text_configs=(dataclasses.replace(SD15.text_encoders[0], hidden_act="gelu"),),
        pad_tokens=("!",),
        scheduler_config={**SD15.scheduler_config, "_class_name": "DDIMScheduler"},
        scaling_factor=SD15.vae.scaling_factor,
        architecture=ARCHITECTURES[1024],
    ),
    "sdxl": Layout(
        class_name="StableDiffusionXLPipeline",
        text_encoders={
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
        },
        text_configs=SDXL.text_encoders,
        pad_tokens=(END, "!"),
        scheduler_config=SDXL.scheduler_config,
        scaling_factor=SDXL.vae.scaling_factor,
        architecture=ARCHITECTURES[2048],
    ),
}
HEAD_WIDTH = 64  # of all text encoders, and of UNets whose projections are matrices
SD1_HEADS = 8
OTHER_LATENTS = 16  # channels, of the autoencoders of later models
# Tables of the noise schedule, averages of the weights, and parts that training alone uses.
IGNORED = re.compile(
    r"^model_ema\.|^(alphas_cumprod|betas|sqrt_|log_one_minus|posterior_|lvlb_weights|logvar|scale_factor|global_step)|"
    r"^denoiser\.|^(first_stage_model\.)?(loss|model_ema)\.|\.position_ids$|\.logit_scale$|\.attn_mask$"
)
SD2_PROJECTION, SD2_LAYERS = "text_projection", 24
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # keys by which files say how their UNet was trained
TOLD = {told: name for name, told in PREDICTIONS.items()}
# What other files are, by their names.
OTHERS = (
    (r"lora_|\.lora\.|hada_w|lokr_", "adapters, and no checkpoint: pass it as a module, --module NAME=FILE"),
    (r"^(control_model|controlnet_cond_embedding)\.", "a ControlNet, which is not supported"),
    (r"^conditioner\.embedders\.0\.model\.", "SDXL's refiner, which is not supported; expected SDXL's base"),
    (r"^edm_(mean|vpred)", "a model of the EDM formulation (Playground 2.5, CosXL), which is not supported"),
    # Some of the later ones have names of the earlier ones too.
    (
        r"time_stack\.|time_mixer|temporal_|motion_modules\.|patchify_proj\.|head\.modulation|token_refiner\.|qkv_x\.|"
        r"condition_embedder\.",
        "a video model, which is not supported",
    ),
    (
        r"double_blocks\.|single_transformer_blocks\.|single_stream|distilled_guidance_layer",
        "FLUX or a relative, which is not supported",
    ),
    (r"joint_blocks\.|^context_embedder\.", "Stable Diffusion 3, which is not supported"),
    (
        r"^(model\.diffusion_model\.)?(layers|blocks|double_layers|transformer_blocks|cap_embedder|txt_in)\.",
        "a diffusion transformer, which is not supported",
    ),
    (
        r"^(down_blocks|up_blocks|conv_in|text_model|encoder\.down_blocks)\.",
        "a network of a folder in the layout of diffusers: give that folder, with its model_index.json",
    ),
)
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
SUPPORTED = "expected Stable Diffusion 1.x, 2.x or XL in the layout of the original code, or a folder of diffusers"


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read_single_file(
    file: Path, *, prediction_type: PredictionType | None = None, class_name: str | None = None
) -> Checkpoint:
    """Finds the networks of a file; reads no weights.

    Averages of the weights (EMA) beside the weights themselves are left out, as diffusers does.

    Args:
        file: `.safetensors`, or a `.ckpt` or `.pt` of torch, which `checkpoints.torch_files` reads.
        prediction_type: what the UNet predicts, where the file does not say. Without it, Stable Diffusion 1.x and XL
            predict noise unless the file has the key "v_pred".
        class_name: of another checkpoint, which takes parts of this one for its own UNet: the UNet of the file is left
            out. A file that holds an autoencoder alone does not say of which family it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or of another kind; names the file and a key.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: is no file of weights ({', '.join(SUFFIXES)}); {SUPPORTED}")
    shapes = read_shapes(file)
    try:
        return _read(file, shapes, prediction_type, class_name)
    except (LookupError, ValueError) as error:
        text = str(error) if isinstance(error, ValueError) else f"no weight {error.args[0]!r}"
        raise ValueError(text if text.startswith(f"{file}:") else f"{file}: {text}") from error


def holds_network(names: Iterable[str]) -> bool:
    """Whether these are names of the weights of a UNet, alone or in a whole checkpoint."""
    return any(name.startswith((f"{UNET}input_blocks.", "input_blocks.0.")) for name in names)


def _read(file: Path, shapes: Shapes, prediction_type: PredictionType | None, class_name: str | None) -> Checkpoint:
    name = _family(file, shapes)
    if VAE_ALONE in shapes and class_name is not None:
        name = next(name for name, layout in LAYOUTS.items() if layout.class_name == class_name)
    layout = LAYOUTS[name]
    prefixes = {"unet": UNET, "vae": VAE, **layout.text_encoders}
    for part, first in (("unet", "input_blocks.0.0.weight"), ("vae", VAE_ALONE)):
        if first in shapes:  # a file of this network alone
            prefixes = {part: ""}
    found: dict[str, PartShapes] = {}
    for key, shape in shapes.items():
        part = next((part for part, prefix in prefixes.items() if key.startswith(prefix)), None)
        if IGNORED.search(key) or key in (V_PREDICTION, ZERO_SNR):
            continue
        if part is None:
            raise ValueError(f"weight {key!r} has no place in {layout.architecture}; {SUPPORTED}")
        found.setdefault(part, PartShapes(prefixes[part]))[key.removeprefix(prefixes[part])] = shape
    if class_name is not None:
        found.pop("unet", None)
    predicts = _prediction_type(file, name, shapes, prediction_type) if "unet" in found else "epsilon"
    if name == "sd2" and "text_encoder" in found:
        found["text_encoder"] = _without_unused(found["text_encoder"])
    configs = _configs(name, found, predicts)
    networks = {}
    for part, config in configs.items():
        keys = [prefixes[part] + key for key in found[part]]
        networks[part] = Part(config, file, partial(_load, part, config, file, keys, prefixes[part]))
    scheduler = {**layout.scheduler_config, "prediction_type": predicts}
    if ZERO_SNR in shapes:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return Checkpoint(
        path=file,
        class_name=layout.class_name,
        networks=networks,
        read_tokenizers=lambda: tuple(clip_tokenizer(pad_token=token) for token in layout.pad_tokens),
        scheduler_config=scheduler,
        described_by=file,
        force_zeros_for_empty_prompt=name == "sdxl",
    )


class PartShapes(dict[str, tuple[int, ...]]):
    """The shapes of one network by names without its prefix, which errors have."""

    def __init__(self, prefix: str, shapes: Shapes | None = None):
        super().__init__(shapes or {})
        self.prefix = prefix

    def __missing__(self, key: str) -> tuple[int, ...]:
        raise KeyError(self.prefix + key)


def _without_unused(text_encoder: PartShapes) -> PartShapes:
    """Stable Diffusion 2.x takes the last layer but one; the released files have the last and a projection too."""
    layers = _count(text_encoder, "transformer.resblocks.")
    unused = [SD2_PROJECTION]
    if SD2_PROJECTION in text_encoder or layers == SD2_LAYERS:
        unused.append(f"transformer.resblocks.{layers - 1}.")
    kept = {key: shape for key, shape in text_encoder.items() if not key.startswith(tuple(unused))}
    return PartShapes(text_encoder.prefix, kept)


def _family(file: Path, shapes: Shapes) -> str:
    """Which of `LAYOUTS` a file has."""
    for pattern, what in OTHERS:
        if key := next((key for key in shapes if re.search(pattern, key)), None):
            raise ValueError(f"{file}: is {what} (it holds {key!r})")
    keys = {key.removeprefix(UNET) for key in shapes}
    if "label_emb.0.0.weight" in keys or any(key.startswith("conditioner.embedders.1.model.") for key in shapes):
        return "sdxl"
    if any(key.startswith("cond_stage_model.model.") for key in shapes):
        return "sd2"
    projections = [shape for key, shape in shapes.items() if key.endswith(".1.proj_in.weight")]
    if any(len(shape) == 2 for shape in projections):
        return "sd2"
    if not projections and not {VAE_ALONE, f"{VAE}{VAE_ALONE}"} & set(shapes):
        raise ValueError(f"{file}: holds none of the networks of Stable Diffusion; {SUPPORTED}")
    return "sd1"


def _prediction_type(file: Path, name: str, shapes: Shapes, given: PredictionType | None) -> str:
    """Prediction type of the UNet: as given, else as the file records it."""
    told = "v_prediction" if V_PREDICTION in shapes else None
    if told is None and file.suffix == ".safetensors":
        with safe_open(file, framework="numpy") as tensors:
            metadata = tensors.metadata() or {}
        told = TOLD.get(metadata.get(PREDICTION_KEY, ""))
    if given is not None and told is not None and given != told:
        raise ValueError(f"prediction_type={given!r}, but the file says {told!r}; leave it out")
    if (known := given or told) is not None:
        return known
    if name == "sd2":
        raise ValueError(
            "does not say what its UNet predicts; expected --prediction-type v_prediction (Stable Diffusion 2.x for "
            "768 pixels) or epsilon (2.x base, for 512 pixels)"
        )
    return "epsilon"


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


def _configs(name: str, found: Mapping[str, Shapes], predicts: str) -> dict[str, Any]:
    """The configs of the networks of a file, whose shapes have no prefix here."""
    layout, configs = LAYOUTS[name], {}
    for (part, prefix), like in zip(layout.text_encoders.items(), layout.text_configs, strict=True):
        if part in found:
            sized = _openclip_config if prefix.endswith("model.") else _clip_config
            configs[part] = sized(found[part], like)
    if "unet" in found:
        side = {"sd1": 64, "sd2": 96 if predicts == "v_prediction" else 64, "sdxl": 128}[name]
        pooled = configs["text_encoder_2"].projection_dim if "text_encoder_2" in configs else None
        configs["unet"] = _unet_config(found["unet"], side, pooled)
    if "vae" in found:
        sizes = {"scaling_factor": layout.scaling_factor, "sample_size": 1024 if name == "sdxl" else 512}
        configs["vae"] = _vae_config(found["vae"], **sizes)
    return configs


def _unet_config(shapes: Shapes, sample_size: int, pooled: int | None) -> UNetConfig:
    levels: list[list[tuple[int, int]]] = [[]]  # channels and transformer blocks of each resnet on the way down
    for n in range(1, 1 + _count(shapes, "input_blocks.", start=1)):
        if f"input_blocks.{n}.0.op.weight" in shapes:
            levels.append([])
            continue
        depth = _count(shapes, f"input_blocks.{n}.1.transformer_blocks.")
        levels[-1].append((shapes[f"input_blocks.{n}.0.in_layers.2.weight"][0], depth))
    if any(level != level[:1] * len(levels[0]) for level in levels):
        raise ValueError(f"its UNet has blocks of {levels} (channels, transformer blocks), which is not supported")
    channels, depths = zip(*(level[0] for level in levels), strict=True)
    attended = next(depth for depth in depths if depth)
    first = next(key for key in shapes if key.endswith(".1.proj_in.weight"))
    linear = len(shapes[first]) == 2
    layers = tuple(max(depth, 1) for depth in depths)
    kinds = tuple("CrossAttn" * (depth > 0) for depth in depths)
    added: dict[str, Any] = {}
    if "time_embed.cond_proj.weight" in shapes:
        added["time_cond_proj_dim"] = shapes["time_embed.cond_proj.weight"][1]
    if "label_emb.0.0.weight" in shapes:
        width = shapes["label_emb.0.0.weight"][1]
        each = SDXL.unet.addition_time_embed_dim if pooled is None else (width - pooled) // 6
        added |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": each,
            "projection_class_embeddings_input_dim": width,
        }
    return UNetConfig(
        sample_size=sample_size,
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in kinds[::-1]),
        block_out_channels=channels,
        layers_per_block=len(levels[0]),
        cross_attention_dim=shapes[f"{first.removesuffix('proj_in.weight')}transformer_blocks.0.attn2.to_k.weight"][1],
        transformer_layers_per_block=attended if set(layers) == {attended} else layers,
        attention_head_dim=tuple(max(1, width // HEAD_WIDTH) for width in channels) if linear else SD1_HEADS,
        use_linear_projection=linear,
        **added,
    )


def _vae_config(shapes: Shapes, **sizes: Any) -> VAEConfig:
    if (channels := shapes["decoder.conv_in.weight"][1]) == OTHER_LATENTS:
        raise ValueError(
            f"is an autoencoder of {channels} latent channels, as those of Stable Diffusion 3, FLUX and video models "
            "are, which is not supported; expected 4"
        )
    depth = _count(shapes, "encoder.down.")
    return VAEConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        block_out_channels=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(depth)),
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        layers_per_block=_count(shapes, "encoder.down.0.block."),
        latent_channels=channels,
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
        mid_block_add_attention="encoder.mid.attn_1.norm.weight" in shapes,
        **sizes,
    )


def _clip_config(shapes: Shapes, like: CLIPTextConfig) -> CLIPTextConfig:
    model = _text_model(shapes)
    vocabulary, width = shapes[f"{model}embeddings.token_embedding.weight"]
    return dataclasses.replace(
        like,
        vocab_size=vocabulary,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=shapes[f"{model}encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=_count(shapes, f"{model}encoder.layers."),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=_positions(shapes, f"{model}embeddings.position_embedding.weight", like),
    )


def _openclip_config(shapes: Shapes, like: CLIPTextConfig) -> CLIPTextConfig:
    vocabulary, width = shapes["token_embedding.weight"]
    return dataclasses.replace(
        like,
        vocab_size=vocabulary,
        hidden_size=width,
        projection_dim=shapes["text_projection"][1] if like.with_projection else width,
        intermediate_size=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        num_hidden_layers=_count(shapes, "transformer.resblocks."),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=_positions(shapes, "positional_embedding", like),
    )


def _positions(shapes: Shapes, name: str, like: CLIPTextConfig) -> int:
    """Tokens of a text, as CLIP's tokenizer makes them."""
    if (shape := shapes[name])[0] != like.max_position_embeddings:
        raise ValueError(
            f"weight {name!r} of the text encoder has shape {list(shape)}, expected {like.max_position_embeddings} "
            "rows: texts of other lengths are not supported"
        )
    return shape[0]


def _text_model(names: Iterable[str]) -> str:
    """Prefix of the names of a text encoder's weights in transformers, which some files leave out."""
    return "text_model." if any(name.startswith("text_model.") for name in names) else ""


def _count(shapes: Shapes, prefix: str, *, start: int = 0) -> int:
    """How many numbers follow a prefix, from `start` on without gaps."""
    there = {int(match[1]) for key in shapes if (match := re.match(re.escape(prefix) + r"(\d+)\.", key))}
    return next(n for n in range(len(there) + 1) if start + n not in there)


# ----------------------------------------------------------------------------------------------------------------------
# Weights

SQUARE = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight$")  # matrices that files hold as 1x1 convolutions


class OriginalTensors(OpenClipTensors):
    """`Tensors` of a file as linear layers have them, see `OpenClipTensors`; 1x1 convolutions as matrices."""

    def get_tensor(self, name: str) -> np.ndarray:
        """The weight of this name."""
        array = super().get_tensor(name)
        return array[:, :, 0, 0] if SQUARE.search(name) and array.shape[2:] == (1, 1) else array


def _open(file: Path) -> OriginalTensors:
    return OriginalTensors(open_tensors(file))


def _load(
    part: str,
    config: Any,
    file: Path,
    keys: Iterable[str],
    prefix: str,
    dtype=jnp.float32,
    *,
    param_dtype=None,
    place: Placement | None = None,
) -> Network:
    """Reads the weights of a part; arguments as in `weights.load_network`."""
    kind = "text_encoder" if part.startswith("text") else part
    network = abstract_network(kind, config, dtype, param_dtype=param_dtype)
    names = _names(part, network, prefix)
    if (
        kind == "text_encoder"
        and prefix.endswith("transformer.")
        and not _text_model(k.removeprefix(prefix) for k in keys)
    ):
        names = {ours: theirs.replace("text_model.", "") for ours, theirs in names.items()}
    component = dataclasses.replace(COMPONENTS[kind], described_by="the rest of the file")
    packed = {name: file for key in keys for name in OriginalTensors.parts(key)}
    fill(network.params, component, packed, file, place, open_file=_open, names=names)
    return network


def _names(part: str, network: Network, prefix: str) -> dict[str, str]:
    """The name in a file of each weight of a network, by its name in our modules."""
    ours = stored_names(network.params)
    if part.startswith("text"):
        translated = {name: openclip_text(name) if prefix.endswith("model.") else name for name in ours}
        return {name: prefix + theirs for name, theirs in translated.items()}
    layers = (unet_layers if part == "unet" else vae_layers)({name.rpartition(".")[0] for name in ours}, network.config)
    return {name: f"{prefix}{layers[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in ours}


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def save_single_file(pipeline: Pipeline, file: str | Path, *, dtype=jnp.float16) -> None:
    """Writes one safetensors file in the layout of the original code, for ComfyUI, A1111, diffusers and this package.

    The file appears under its name only when it is complete. The scheduler is not kept, but what the UNet predicts and
    zero terminal SNR are: by the keys "v_pred" and "ztsnr", as ComfyUI reads them. Tokenizers must be CLIP's own.

    Args:
        pipeline: what to write.
        file: ends in `.safetensors`; is replaced.
        dtype: of the stored weights.

    Raises:
        ValueError: the file has another ending, a tokenizer has tokens that are not CLIP's, or a network holds
            parameters that its published form has not, e.g. LoRA matrices.

    Example:
        >>> pipeline = fp.load_pipeline("v1-5")
        >>> fp.save_single_file(pipeline, "v1-5.safetensors")
        >>> fp.load_pipeline("v1-5.safetensors").unet.config == pipeline.unet.config
        True
    """
    file = Path(file)
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: expected a name that ends in .safetensors")
    layout = LAYOUTS[_family_of(pipeline)]
    vocab = clip_tokenizer().vocab
    for tokenizer in pipeline.tokenizers:
        if tokenizer.vocab != vocab or tokenizer.size != len(vocab):
            raise ValueError(
                f"{file}: single files have CLIP's {len(vocab)} tokens, but a tokenizer of this pipeline has "
                f"{tokenizer.size} of its own; write a folder instead: save_pipeline"
            )
    networks = {"unet": (UNET, pipeline.unet), "vae": (VAE, pipeline.vae)}
    prefixes = layout.text_encoders.items()
    networks |= {part: (prefix, net) for (part, prefix), net in zip(prefixes, pipeline.text_encoders, strict=True)}
    tensors: dict[str, np.ndarray] = {}
    for part, (prefix, network) in networks.items():
        names = _names(part, network, prefix)
        for ours, array in to_stored(network.params).items():
            tensors[names[ours]] = _as_original(names[ours], np.asarray(array, jnp.dtype(dtype)))
    scheduler = pipeline.scheduler_config
    predicts = scheduler.get("prediction_type", "epsilon")
    if predicts == "v_prediction":
        tensors[V_PREDICTION] = np.zeros(0, np.float32)
    if scheduler.get("rescale_betas_zero_snr"):
        tensors[ZERO_SNR] = np.zeros(0, np.float32)
    metadata = {"format": "pt", **modelspec(layout.architecture, predicts)}
    with replacing(file) as unfinished:
        save_file(_packed(tensors), unfinished, metadata=metadata)


def _family_of(pipeline: Pipeline) -> str:
    if len(pipeline.text_encoders) == 2:
        return "sdxl"
    return "sd2" if pipeline.unet.config.use_linear_projection else "sd1"


def _as_original(name: str, array: np.ndarray) -> np.ndarray:
    """A weight in the axes of the file; safetensors writes the bytes of a transposed array in the wrong order."""
    if SQUARE.search(name):
        array = array[:, :, None, None]
    return np.ascontiguousarray(array.T if name.endswith("text_projection") else array)


def _packed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights with q, k and v of OpenCLIP's attention in one."""
    whole = {name: array for name, array in tensors.items() if not name.endswith("]")}
    for name in tensors:
        if name.endswith(f"[{PARTS[0]}]"):
            stem = name.removesuffix(f"[{PARTS[0]}]")
            whole[stem] = np.concatenate([tensors[f"{stem}[{part}]"] for part in PARTS])
    return whole
