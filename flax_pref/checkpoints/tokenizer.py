"""CLIP's byte-pair tokenizer (arXiv:2103.00020, section 2.4), read from a diffusers `tokenizer/` folder."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from flax_pref.files import read_json

WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
MERGES_HEADER = "#version: 0.2"


@dataclasses.dataclass(frozen=True)
class CLIPTokenizer:
    """Turns texts into token ids of one length.

    Attributes:
        vocab: id of each token; the last piece of a word ends in `</w>`.
        merges: pairs of pieces that are joined, the most frequent first.
        model_max_length: length of every row of ids, start and end token included.
        bos_token: begins every text.
        eos_token: ends every text, cut or not.
        pad_token: fills the rest of the row. SD1.5 pads with the end token, SDXL's second tokenizer with "!".
    """

    vocab: Mapping[str, int] = dataclasses.field(repr=False)
    merges: Sequence[tuple[str, str]] = dataclasses.field(repr=False)
    model_max_length: int = 77
    bos_token: str = "<|startoftext|>"
    eos_token: str = "<|endoftext|>"
    pad_token: str = "<|endoftext|>"

    def __post_init__(self):
        for token in (self.bos_token, self.eos_token, self.pad_token):
            if token not in self.vocab:
                raise ValueError(f"CLIPTokenizer: the vocabulary of {len(self.vocab)} tokens has no {token!r}")
        bpe = models.BPE(
            dict(self.vocab),
            [tuple(pair) for pair in self.merges],
            unk_token=self.eos_token,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
        encoder = tokenizers.Tokenizer(bpe)
        encoder.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        encoder.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        bos, eos = ((token, self.vocab[token]) for token in (self.bos_token, self.eos_token))
        encoder.post_processor = processors.TemplateProcessing(
            single=f"{self.bos_token} $A {self.eos_token}", special_tokens=[bos, eos]
        )
        # A text may spell out the special tokens; they are then one token each.
        encoder.add_special_tokens([self.bos_token, self.eos_token])
        encoder.enable_truncation(self.model_max_length)
        encoder.enable_padding(
            length=self.model_max_length, pad_id=self.vocab[self.pad_token], pad_token=self.pad_token
        )
        object.__setattr__(self, "_encoder", encoder)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids, int32 `[B, model_max_length]`: start token, text (cut where too long), end token, padding."""
        ids = [encoding.ids for encoding in self._encode(texts)]
        return np.array(ids, dtype=np.int32).reshape(len(ids), self.model_max_length)

    def cut(self, texts: Sequence[str]) -> list[str]:
        """What of each text does not fit into a row and is not seen; empty where all of it is."""
        starts = [
            encoding.overflowing[0].offsets[1][0] if encoding.overflowing else None for encoding in self._encode(texts)
        ]
        return ["" if start is None else text[start:] for text, start in zip(texts, starts, strict=True)]

    def _encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        if isinstance(texts, str):
            raise TypeError("CLIPTokenizer takes a list of texts, not one string; write tokenizer([text])")
        return self._encoder.encode_batch(list(texts))

    def save(self, folder: str | Path) -> None:
        """Writes vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        special = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "unk_token": self.eos_token,
            "pad_token": self.pad_token,
        }
        config = {
            **special,
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": self.model_max_length,
            "tokenizer_class": "CLIPTokenizer",
        }
        lines = [MERGES_HEADER, *(" ".join(pair) for pair in self.merges)]
        (folder / "vocab.json").write_text(json.dumps(dict(self.vocab), ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """Reads a `tokenizer/` folder: vocab.json and merges.txt, or the tokenizer.json that newer exports hold instead.

    tokenizer_config.json and special_tokens_map.json, where present, give the length and the special tokens.

    Raises:
        FileNotFoundError: neither form of the vocabulary is there.
        ValueError: a file is damaged, a special token is not in the vocabulary, or no usable length is given.
    """
    folder = Path(folder)
    source, vocab, merges = _read_vocabulary(folder)
    settings = _settings(folder / "special_tokens_map.json") | _settings(folder / "tokenizer_config.json")
    config_file = folder / "tokenizer_config.json"
    chosen = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        if settings.get(name) is not None:
            value = settings[name]
            chosen[name] = value.get("content") if isinstance(value, dict) else value
            if not isinstance(chosen[name], str):
                raise ValueError(f"{config_file}: {name}={value!r}; expected a token of the vocabulary")
    length = settings.get("model_max_length", 77)
    # Some exports write 1e30 for "not limited"; the position table of the encoder is limited all the same.
    if not isinstance(length, int | float) or not 2 <= length <= 2**16:
        raise ValueError(f"{config_file}: model_max_length={length!r}; expected 77 for CLIP")
    try:
        return CLIPTokenizer(vocab, merges, model_max_length=int(length), **chosen)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise ValueError(f"{source}: {error}; download it again") from error


def _settings(file: Path) -> dict:
    return read_json(file, expected="settings of a tokenizer") if file.is_file() else {}


def _read_vocabulary(folder: Path) -> tuple[Path, dict[str, int], list[tuple[str, str]]]:
    """(the file to blame, ids, merges)."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        source, merges_file = folder / "vocab.json", folder / "merges.txt"
        vocab = read_json(source, expected="the vocabulary of a tokenizer")
        try:
            lines = merges_file.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{merges_file}: not a text file ({error}); download it again") from error
        merges = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    elif (folder / "tokenizer.json").is_file():
        source = merges_file = folder / "tokenizer.json"
        model = read_json(source, expected="a tokenizer").get("model")
        vocab, merges = (model.get(key) for key in ("vocab", "merges")) if isinstance(model, dict) else (None, None)
        if not isinstance(merges, list):
            raise ValueError(f"{source}: no byte-pair model with vocab and merges; expected CLIP's; download it again")
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    else:
        raise FileNotFoundError(f"{folder}: no tokenizer; expected vocab.json and merges.txt, or tokenizer.json")
    if not isinstance(vocab, dict) or not all(isinstance(index, int) and index >= 0 for index in vocab.values()):
        raise ValueError(f"{source}: expected an id for each token; download it again")
    for number, pair in enumerate(merges, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{merges_file}: merge {number} is {pair!r}, expected two pieces; download it again")
    return source, vocab, [(left, right) for left, right in merges]
