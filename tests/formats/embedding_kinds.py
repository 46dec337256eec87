"""Kinds of textual inversions: the rows that a file adds to the tables of the text encoders, as in diffusers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from flax_pref.checkpoints.checkpoint import Pipeline
from flax_pref.checkpoints.embeddings import TABLE, add_embedding
from tests.formats.checkpoint_kinds import folder_of, from_folder, pipeline
from tests.formats.kinds import Kind, Made, Numbers

WORD = "<toy>"
RNG = np.random.default_rng(0)
NARROW, WIDE = (RNG.standard_normal((3, width)).astype(np.float32) for width in (64, 128))


def load(family: str) -> Callable[[Path], Pipeline]:
    """Adds a word to the pipeline of a family."""
    return lambda path: add_embedding(pipeline(family), WORD, path)


def rows(read: Pipeline) -> Numbers:
    """The vectors of the new words in each text encoder."""
    found: dict[str, np.ndarray] = {}
    for number, (encoder, words) in enumerate(zip(read.text_encoders, read.tokenizers, strict=True)):
        table: Any = encoder.params
        for key in TABLE:
            table = table[key]
        ids = [words.id_of(word) for word in (WORD, f"{WORD}_1", f"{WORD}_2")]
        found[f"text encoder {number}"] = np.asarray(table)[np.array(ids)]
    return found


def in_diffusers(family: str, path: Path) -> Numbers:
    """The same of diffusers."""
    pipe = from_folder(family, folder_of(family))
    parts = [("tokenizer", "text_encoder", None), ("tokenizer_2", "text_encoder_2", "clip_g")]
    if family == "sdxl":
        from safetensors.torch import load_file

        stored = load_file(path)
        parts[0] = ("tokenizer", "text_encoder", "clip_l")
    else:
        parts, stored = parts[:1], {}
    found = {}
    for number, (words, encoder, name) in enumerate(parts):
        tokenizer, model = getattr(pipe, words), getattr(pipe, encoder)
        source: Any = str(path) if name is None else stored[name]
        pipe.load_textual_inversion(source, token=WORD, tokenizer=tokenizer, text_encoder=model)
        ids = tokenizer.convert_tokens_to_ids([WORD, f"{WORD}_1", f"{WORD}_2"])
        found[f"text encoder {number}"] = model.get_input_embeddings().weight[ids].detach().numpy()
    return found


def stored(name: str, content: Mapping[str, np.ndarray], wrap: Callable[[Any], Any] | None = None, family: str = "sd1"):
    """A file with this content; `wrap` makes of tensors of torch what torch saves."""

    def make(folder: Path) -> Made:
        path = folder / name
        if wrap is None:
            save_file(dict(content), path)
        else:
            import torch

            torch.save(wrap({key: torch.from_numpy(array.copy()) for key, array in content.items()}), path)
        return Made(path, lambda: in_diffusers(family, path))

    return make


def webui(vectors: Mapping[str, Any]) -> dict[str, Any]:
    """A file of A1111."""
    import torch

    (vector,) = vectors.values()
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.nn.Parameter(vector)},
        "name": "toy",
        "step": 500,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }


OTHER = "other"


def embedding(name: str, make: Callable[[Path], Made], family: str = "sd1", **more: Any) -> Kind:
    """A row."""
    return Kind(
        name=name,
        make=make,
        load=load(family),
        numbers=rows,
        read="`--embedding NAME=FILE`",
        reference="diffusers, `load_textual_inversion`",
        stranger="textual inversion for SDXL (`clip_l`, `clip_g`)"
        if family == "sd1"
        else "textual inversion of diffusers",
        surplus=OTHER,
        **more,
    )


ONE = {
    # Files of one word have any name for it, so that none can be missed by its name.
    "names": lambda key: OTHER if key == OTHER else "holds no textual inversion",
    "harmless": {"shape ": "a word may have any number of vectors"},
}
EMBEDDINGS = (
    embedding("textual inversion of diffusers", stored("learned_embeds.safetensors", {"<other>": NARROW}), **ONE),
    embedding("textual inversion of diffusers, `.bin`", stored("learned_embeds.bin", {"<other>": NARROW}, dict), **ONE),
    embedding("textual inversion of A1111, `.pt`", stored("toy.pt", {"*": NARROW}, webui), **ONE),
    embedding("textual inversion of A1111 (`emb_params`)", stored("toy.safetensors", {"emb_params": NARROW}), **ONE),
    embedding(
        "textual inversion for SDXL (`clip_l`, `clip_g`)",
        stored("toy.safetensors", {"clip_l": NARROW, "clip_g": WIDE}, family="sdxl"),
        "sdxl",
    ),
)
