"""The weights of MPS: the file of its authors, `MPS_overall_checkpoint.pth`, or safetensors with the same names."""

import math
import re
from pathlib import Path

import jax.numpy as jnp

from flax_pref.checkpoints.clip_files import HEAD_WIDTHS, TEXT_HEAD_WIDTH
from flax_pref.checkpoints.hub import find_weights
from flax_pref.checkpoints.torch_files import read_torch_module
from flax_pref.checkpoints.weights import Component, Placement, Tensors, TorchTensors, fill, open_tensors
from flax_pref.models.clip import CLIPTextConfig
from flax_pref.models.clip_vision import CLIPConfig, CLIPVisionConfig
from flax_pref.models.mps import MPSConfig, MPSModel
from flax_pref.models.network import Network

PUBLISHED, FILE = "RE-N-Y/mpsv1", "model.safetensors"  # the authors' own file is on no Hub
EXPECTED = "expected the weights of MPS (MPS_overall_checkpoint.pth of its authors, or safetensors made of it)"

# Names in the file into those of our modules, one after another.
NAMES = (
    (r"^mps\.", ""),
    (r"^model\.", ""),
    (r"^cross_model\.layers\.(\d+)\.0\.fn\.", r"cross.\1."),
    (r"^cross_model\.layers\.(\d+)\.1\.fn\.", r"own.\1."),
    (r"^(cross\.\d+)\.ff\.0\.", r"\1.ff_in."),
    (r"^(cross\.\d+)\.ff\.2\.", r"\1.ff_out."),
    (r"^(own\.\d+)\.fused_attn_ff_proj\.", r"\1.fused."),
    (r"^(own\.\d+)\.ff_out\.1\.", r"\1.ff_out."),
    (r"^(own\.\d+)\.rotary_emb\.", r"\1."),
)
MPS = Component(
    config=MPSConfig,
    module=MPSModel,
    library=lambda config: ("MPS", "CLIPModel"),
    stem=FILE.removesuffix(".safetensors"),
    old_names=NAMES,
    ignored=r"\.position_ids$|\.pos_emb$",
    described_by="the rest of the file",
)


def find_mps(path_or_id: str | Path | None = None) -> Path:
    """The file of the weights.

    Args:
        path_or_id: the file, or a folder or Hub repository with `model.safetensors`; None: the conversion of the
            authors' file that is on the Hub.

    Raises:
        FileNotFoundError: it is none of these, or it can be neither reached nor found in the cache.
    """
    return find_weights(PUBLISHED if path_or_id is None else path_or_id, FILE, expected=EXPECTED)


def _open(file: Path) -> Tensors:
    """The authors have saved their network whole, others its weights by name."""
    return open_tensors(file) if file.suffix == ".safetensors" else TorchTensors(file, read_torch_module(file))


def load_mps_model(file: str | Path, dtype=jnp.float32, place: Placement | None = None) -> Network:
    """Reads the weights, one by one; the sizes of the network are those of the weights.

    Args:
        file: of the authors, or `.safetensors` with the same names.
        dtype: what the network computes in and keeps its weights in.
        place: says where each weight goes; None: the default device.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: weights are missing, too many, of another shape, or not finite, or the file is damaged.
    """
    file = Path(file)
    with _open(file) as tensors:
        names = list(tensors.keys())
        try:
            network = MPS.abstract(_config(tensors), dtype)
        except (ArithmeticError, LookupError, ValueError) as error:
            raise ValueError(f"{file}: {error}; {EXPECTED}") from error
    fill(network.params, MPS, dict.fromkeys(names, file), file, place, open_file=_open)
    return network


def _config(tensors: Tensors) -> MPSConfig:
    """Sizes from the shapes of weights."""
    stored = {re.sub(r"^(mps\.)?(model\.)?", "", name): name for name in tensors.keys()}  # noqa: SIM118

    def shape(name: str, axes: int) -> tuple[int, ...]:
        found = tensors.get_tensor(stored[name]).shape if name in stored else ()
        if len(found) != axes:
            raise ValueError(f"no weight {name!r} with {axes} axes")
        return found

    def layers(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in stored if name.startswith(prefix)})

    width, _, _, patch = shape("vision_model.embeddings.patch_embedding.weight", 4)
    vocabulary, text_width = shape("text_model.embeddings.token_embedding.weight", 2)
    query, projection = shape("cross_model.layers.0.0.fn.to_q.weight", 2)
    head_width = shape("cross_model.layers.0.0.fn.to_kv.weight", 2)[0] // 2
    if width not in HEAD_WIDTHS:
        raise ValueError(f"a vision transformer of width {width}, whose attention heads the file does not tell")
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shape("vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=layers("vision_model.encoder.layers."),
        num_attention_heads=width // HEAD_WIDTHS[width],
        image_size=math.isqrt(shape("vision_model.embeddings.position_embedding.weight", 2)[0] - 1) * patch,
        patch_size=patch,
        hidden_act="gelu",
    )
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        intermediate_size=shape("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=layers("text_model.encoder.layers."),
        num_attention_heads=max(1, text_width // TEXT_HEAD_WIDTH),
        max_position_embeddings=shape("text_model.embeddings.position_embedding.weight", 2)[0],
        hidden_act="gelu",
        eos_token_id=2,  # the token of the largest id ends a text
    )
    return MPSConfig(
        clip=CLIPConfig(projection_dim=projection, vision_config=vision, text_config=text),
        layers=layers("cross_model.layers."),
        heads=query // head_width,
        head_width=head_width,
        mlp_width=shape("cross_model.layers.0.0.fn.ff.2.weight", 2)[1],
    )
