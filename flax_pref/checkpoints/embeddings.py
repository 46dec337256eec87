"""Textual inversions (arXiv:2208.01618): vectors that stand for a new word, from the files that people share.

Files are those of diffusers (`learned_embeds`: the word and its vectors), of A1111 (`string_to_param`, or
`emb_params`), and of SDXL (`clip_l` and `clip_g`), as safetensors or as files of torch, which are read without running
any code.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken

from flax_pref.checkpoints.checkpoint import Pipeline
from flax_pref.checkpoints.torch_files import StoredTensor, read_torch_file
from flax_pref.checkpoints.weights import open_tensors
from flax_pref.models.network import Network

TABLE = ("text_model", "embeddings", "token_embedding", "embedding")


def add_embedding(pipeline: Pipeline, name: str, file: str | Path) -> Pipeline:
    """The pipeline with a word for the vectors of a file; prompts that hold the word see them.

    Args:
        pipeline: whose tokenizers and text encoders get the word.
        name: the word. Of several vectors, the others are `name_1`, `name_2` and so on, and a prompt names the first.
        file: with vectors for each text encoder; the word that it holds does not matter.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the name is none, or taken; the file is damaged, holds no textual inversion, or one for text
            encoders of other widths.
    """
    file = Path(file)
    if not name or any(letter.isspace() for letter in name):
        raise ValueError(f"{file}: the name {name!r} is no word; expected one without spaces, e.g. <toy>")
    vectors = _vectors(file)
    encoders, tokenizers = [], []
    for encoder, tokenizer in zip(pipeline.text_encoders, pipeline.tokenizers, strict=True):
        width = encoder.config.hidden_size
        own = [array for array in vectors.values() if array.shape[1] == width]
        if len(own) != 1 or len(vectors) != len(pipeline.text_encoders):
            widths = " and ".join(str(encoder.config.hidden_size) for encoder in pipeline.text_encoders)
            held = " and ".join(f"{array.shape[1]} numbers ({key!r:.80})" for key, array in vectors.items())
            raise ValueError(
                f"{file}: holds vectors of {held}, but the text encoders of this checkpoint take {widths}; expected a "
                f"textual inversion for its family{', with clip_l and clip_g' * (len(pipeline.text_encoders) > 1)}"
            )
        words = [name, *(f"{name}_{i}" for i in range(1, len(own[0])))]
        if taken := [word for word in words if tokenizer.id_of(word) is not None]:
            raise ValueError(
                f"{file}: {taken[0]!r} is a token of this checkpoint already; choose another, e.g. <{name}>"
            )
        encoders.append(_with_rows(encoder, own[0]))
        tokens = (*tokenizer.added_tokens, *(AddedToken(word, normalized=True) for word in words))
        tokenizers.append(dataclasses.replace(tokenizer, added_tokens=tokens))
    return pipeline.replace(text_encoders=tuple(encoders), tokenizers=tuple(tokenizers))


def _with_rows(encoder: Network, rows: np.ndarray) -> Network:
    """A text encoder with more tokens."""
    params: Any = encoder.params
    *path, leaf = TABLE
    copied = found = dict(params)
    for key in path:
        found[key] = dict(found[key])
        found = found[key]
    found[leaf] = jnp.concatenate([found[leaf], jnp.asarray(rows, found[leaf].dtype)])
    config = dataclasses.replace(encoder.config, vocab_size=encoder.config.vocab_size + len(rows))
    return encoder._replace(config=config, params=copied)


def _vectors(file: Path) -> dict[str, np.ndarray]:
    """The vectors of a file for each text encoder, `[N, D]`, by their names."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a textual inversion")
    if file.suffix == ".safetensors":
        with open_tensors(file) as tensors:
            stored = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    else:
        content = read_torch_file(file)
        if isinstance(content, dict) and isinstance(content.get("string_to_param"), dict):
            content = content["string_to_param"]
        content = content if isinstance(content, dict) else {"": content}
        stored = {name: value.read() for name, value in content.items() if isinstance(value, StoredTensor)}
    vectors = {name: np.atleast_2d(array.astype(np.float32)) for name, array in stored.items()}
    names = ", ".join(f"{name!r:.80}" for name in list(vectors)[:4]) or "nothing"
    if not 1 <= len(vectors) <= 2 or any(array.ndim != 2 or not len(array) for array in vectors.values()):
        raise ValueError(
            f"{file}: holds no textual inversion but {names}; expected vectors for one word, as diffusers, A1111 and "
            "trainers of SDXL (clip_l, clip_g) write them"
        )
    if len({len(array) for array in vectors.values()}) != 1 or not all(
        np.isfinite(array).all() for array in vectors.values()
    ):
        raise ValueError(
            f"{file}: the vectors of {names} are not as many for each encoder, or not finite: the file is damaged"
        )
    return vectors
