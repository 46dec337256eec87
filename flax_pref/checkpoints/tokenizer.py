"""CLIP's byte-pair tokenizer (arXiv:2103.00020, section 2.4), read from a diffusers `tokenizer/` folder."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

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
        added_tokens: found in a text before it is split into pieces, e.g. the tokens of textual inversion
            (arXiv:2208.01618). Those that `vocab` lacks take the ids that follow. The start, end and padding token are
            found in the same way, so that a "!" in a prompt is padding to SDXL's second text encoder.
    """

    vocab: Mapping[str, int] = dataclasses.field(repr=False)
    merges: Sequence[tuple[str, str]] = dataclasses.field(repr=False)
    model_max_length: int = 77
    bos_token: str = "<|startoftext|>"
    eos_token: str = "<|endoftext|>"
    pad_token: str = "<|endoftext|>"
    added_tokens: Sequence[AddedToken] = dataclasses.field(default=(), repr=False)
    _encoder: tokenizers.Tokenizer = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        own = dict.fromkeys((self.bos_token, self.eos_token, self.pad_token))
        added = {token.content for token in self.added_tokens}
        for token in own:
            if token not in self.vocab and token not in added:
                raise ValueError(f"CLIPTokenizer: the vocabulary of {len(self.vocab)} tokens has no {token!r}")
        bpe = models.BPE(
            dict(self.vocab),
            [(first, second) for first, second in self.merges],
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
        # A text may spell out the special tokens; they are then one token each.
        encoder.add_tokens(
            [*self.added_tokens, *(AddedToken(token, special=True) for token in own if token not in added)]
        )
        bos, eos = ((token, encoder.token_to_id(token)) for token in (self.bos_token, self.eos_token))
        encoder.post_processor = processors.TemplateProcessing(
            single=f"{self.bos_token} $A {self.eos_token}", special_tokens=[bos, eos]
        )
        encoder.enable_truncation(self.model_max_length)
        encoder.enable_padding(
            length=self.model_max_length, pad_id=encoder.token_to_id(self.pad_token), pad_token=self.pad_token
        )
        object.__setattr__(self, "_encoder", encoder)

    @property
    def size(self) -> int:
        """Number of tokens, added ones included: the rows that the embedding of a text encoder needs."""
        return self._encoder.get_vocab_size(with_added_tokens=True)

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary or an added one; None where it is neither."""
        return self._encoder.token_to_id(token)

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

    def spelled_out(self, texts: Sequence[str]) -> list[str]:
        """The texts with all vectors of a textual inversion for the first of them, as pipelines of diffusers do.

        An inversion of several vectors adds `<toy>`, `<toy>_1`, `<toy>_2` and so on; a prompt names `<toy>`.
        """
        several = self._several
        if not several:
            return list(texts)
        whole = []
        for text, encoding in zip(texts, self._encode(texts), strict=True):
            found = {token for part in (encoding, *encoding.overflowing) for token in part.tokens}
            for token in sorted(found & several.keys()):
                text = text.replace(token, " ".join(several[token]))
            whole.append(text)
        return whole

    def pieces(self, text: str) -> list[tuple[int, ...]]:
        """Ids of a text of any length, without start and end token; the vectors of a textual inversion together."""
        encoding = self._encoder.encode(text, add_special_tokens=False)
        return [
            self._vectors.get(token, (token,))
            for part in (encoding, *encoding.overflowing)
            for token, own in zip(part.ids, part.attention_mask, strict=True)
            if own  # and no padding
        ]

    @cached_property
    def _vectors(self) -> dict[int, tuple[int, ...]]:
        """`_several` in ids."""
        ids = {token.content: index for index, token in self._encoder.get_added_tokens_decoder().items()}
        return {ids[first]: tuple(ids[vector] for vector in vectors) for first, vectors in self._several.items()}

    @cached_property
    def _several(self) -> dict[str, list[str]]:
        """Tokens of textual inversions of several vectors, by the first of them."""
        added = {token.content for token in self.added_tokens}
        several = {token: [token] for token in added if f"{token}_1" in added}
        for token, vectors in several.items():
            while (following := f"{token}_{len(vectors)}") in added:
                vectors.append(following)
        return several

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
        if self.added_tokens:
            found = {str(index): _described(token) for index, token in self._encoder.get_added_tokens_decoder().items()}
            config["added_tokens_decoder"] = found
        lines = [MERGES_HEADER, *(" ".join(pair) for pair in self.merges)]
        (folder / "vocab.json").write_text(json.dumps(dict(self.vocab), ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def clip_tokenizer(*, pad_token: str = CLIPTokenizer.pad_token) -> CLIPTokenizer:
    """CLIP's own tokenizer, whose 49,408 tokens are in this package.

    Args:
        pad_token: fills rows; OpenCLIP's text encoders take "!".
    """
    text = (resources.files("flax_pref.checkpoints") / "clip_vocabulary" / "merges.txt").read_text(encoding="utf-8")
    merges = [(left, right) for left, right in map(str.split, text.splitlines()[1:])]
    # Every byte has a letter, alone and at the end of a word; after them every merge makes a token.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_order)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    special = (CLIPTokenizer.bos_token, CLIPTokenizer.eos_token)
    vocab = {token: index for index, token in enumerate([*tokens, *special])}
    return CLIPTokenizer(vocab, merges, pad_token=pad_token)


def _byte_order(letter: str) -> tuple[bool, int]:
    """Letters that stand for themselves come first; bytes that cannot be printed have those from 256 on."""
    return ord(letter) > 255, ord(letter)


def load_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """Reads a `tokenizer/` folder as transformers does: the same ids for every text.

    The vocabulary is that of tokenizer.json, or of vocab.json and merges.txt. tokenizer_config.json and
    special_tokens_map.json, where present, give the length and the special tokens; they, added_tokens.json and
    tokenizer.json give the tokens that were added to the vocabulary, e.g. by textual inversion.

    Raises:
        FileNotFoundError: neither form of the vocabulary is there.
        ValueError: a file is damaged, vocabulary and merges do not belong together, two files contradict each other on
            an added token, a special token is not in the vocabulary, or no usable length is given.
    """
    folder = Path(folder)
    source, vocab, merges = _read_vocabulary(folder)
    config_file = folder / "tokenizer_config.json"
    settings = _settings(config_file)
    if DECODER not in settings:  # newer files keep the special tokens there, and transformers passes over the map
        settings |= _settings(folder / "special_tokens_map.json")
    declared, undeclared = _added_tokens(folder, settings)
    special, more = _special_tokens(config_file, settings)
    known = {token.content for token in declared.values()}
    added = [declared[index] for index in sorted(declared)]
    added += [token for token in (*special.values(), *more) if token.content not in known]
    length = settings.get("model_max_length", 77)
    # Some exports write 1e30 for "not limited"; the position table of the encoder is limited all the same.
    if not isinstance(length, int | float) or not 2 <= length <= 2**16:
        raise ValueError(f"{config_file}: model_max_length={length!r}; expected 77 for CLIP")
    chosen = {name: special[name].content for name in ("bos_token", "eos_token", "pad_token") if name in special}
    whole = {CLIPTokenizer.bos_token, CLIPTokenizer.eos_token, *(token.content for token in added)}
    _check_merges(source, vocab, merges, whole)
    try:
        tokenizer = CLIPTokenizer(vocab, merges, model_max_length=int(length), added_tokens=tuple(added), **chosen)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise ValueError(f"{source}: {' '.join(str(error).split())}; download it again") from error
    for index, token in declared.items():
        if (given := tokenizer.id_of(token.content)) != index:
            raise ValueError(
                f"{undeclared}: the added token {token.content!r} has id {index}, but its place in the vocabulary is "
                f"{given}; expected ids that follow the vocabulary's without gaps: save the tokenizer again with "
                "transformers"
            )
    return tokenizer


def _settings(file: Path) -> dict:
    return read_json(file, expected="settings of a tokenizer") if file.is_file() else {}


# ----------------------------------------------------------------------------------------------------------------------
# Added tokens

DECODER = "added_tokens_decoder"
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _described(token: AddedToken) -> dict[str, Any]:
    return {"content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}


def _added_token(file: Path, value: Any, **flags: bool) -> AddedToken:
    """A token as files describe it: its text, or an object with flags of how it is found."""
    described = {"content": value, **flags} if isinstance(value, str) else value
    content = described.get("content") if isinstance(described, dict) else None
    given = {flag: described[flag] for flag in FLAGS if flag in described} if content else {}
    if not isinstance(content, str) or not content or not all(isinstance(flag, bool) for flag in given.values()):
        raise ValueError(f"{file}: {value!r:.100} is no added token; expected its text and flags; download it again")
    return AddedToken(content, **given | flags)


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[int, AddedToken], Path]:
    """The added tokens by the ids that files give them, and the file to blame.

    tokenizer_config.json has them all since transformers 4.34, where it has any.
    """
    config_file, old_file, whole_file = (
        folder / name for name in ("tokenizer_config.json", "added_tokens.json", "tokenizer.json")
    )
    entries = settings.get(DECODER, {})
    if not isinstance(entries, dict):
        raise ValueError(f"{config_file}: {DECODER} is no object; expected a token for each id; download it again")
    declared = {_index(config_file, index): _added_token(config_file, value) for index, value in entries.items()}
    elsewhere = {}
    special = {token.content for token in _named(config_file, settings).values()}
    for content, index in _settings(old_file).items():
        flags = {"normalized": content not in special, "special": content in special}
        elsewhere[_index(old_file, index)] = (old_file, _added_token(old_file, content, **flags))
    entries = _settings(whole_file).get("added_tokens") or []
    if not isinstance(entries, list):
        raise ValueError(f"{whole_file}: added_tokens is no list; download it again")
    for value in entries:
        token = _added_token(whole_file, value if isinstance(value, dict) else None)
        elsewhere[_index(whole_file, value.get("id"))] = (whole_file, token)
    if DECODER not in settings:
        source = next((file for file, _ in elsewhere.values()), config_file)
        return {index: token for index, (_, token) in elsewhere.items()}, source
    for index, (file, token) in elsewhere.items():
        if index not in declared or declared[index].content != token.content:
            raise ValueError(
                f"{file}: adds the token {token.content!r} with id {index}, which {DECODER} in {config_file} does not; "
                "expected the same tokens in both: save the tokenizer again with transformers"
            )
    return declared, config_file


def _index(file: Path, value: Any) -> int:
    """An id, which JSON's objects have as text."""
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).isdecimal():
        raise ValueError(f"{file}: {value!r:.100} is no id of an added token; expected an integer; download it again")
    return int(str(value)[:18])


def _named(file: Path, settings: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The special tokens with a role."""
    tokens = {}
    for name in SPECIAL:
        if (value := settings.get(name)) is not None:
            if not isinstance(value.get("content") if isinstance(value, dict) else value, str):
                raise ValueError(f"{file}: {name}={value!r}; expected a token of the vocabulary")
            tokens[name] = _added_token(file, value, special=True)
    return tokens


def _special_tokens(file: Path, settings: Mapping[str, Any]) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The special tokens by their roles, and those without one."""
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    more = list(more.values()) if isinstance(more, dict) else more
    if not isinstance(more, list):
        raise ValueError(f"{file}: additional_special_tokens={more!r:.100}; expected a list; download it again")
    return _named(file, settings), [_added_token(file, value, special=True) for value in more]


# ----------------------------------------------------------------------------------------------------------------------
# The vocabulary


def _read_vocabulary(folder: Path) -> tuple[Path, dict[str, int], list[tuple[str, str]]]:
    """(the file to blame, ids, merges)."""
    if (folder / "tokenizer.json").is_file():
        source = merges_file = folder / "tokenizer.json"
        model = read_json(source, expected="a tokenizer").get("model")
        vocab, merges = (model.get(key) for key in ("vocab", "merges")) if isinstance(model, dict) else (None, None)
        if not isinstance(merges, list):
            raise ValueError(f"{source}: no byte-pair model with vocab and merges; expected CLIP's; download it again")
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        source, merges_file = folder / "vocab.json", folder / "merges.txt"
        vocab = read_json(source, expected="the vocabulary of a tokenizer")
        try:
            lines = merges_file.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{merges_file}: not a text file ({error}); download it again") from error
        merges = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    else:
        raise FileNotFoundError(f"{folder}: no tokenizer; expected vocab.json and merges.txt, or tokenizer.json")
    if not isinstance(vocab, dict) or not all(type(index) is int and index >= 0 for index in vocab.values()):
        raise ValueError(f"{source}: expected an id for each token; download it again")
    if len(ids := set(vocab.values())) != len(vocab):
        raise ValueError(
            f"{source}: {len(vocab)} tokens have only {len(ids)} different ids; expected one of its own for each: "
            "download it again"
        )
    if "" in vocab or max(ids, default=-1) >= len(ids):
        missing = next(index for index in range(len(ids) + 1) if index not in ids)
        raise ValueError(
            f"{source}: {'a token is empty' if '' in vocab else f'no token has the id {missing}'}; expected ids 0 to "
            f"{len(ids) - 1} of {len(ids)} tokens: download it again"
        )
    for number, pair in enumerate(merges, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(piece, str) for piece in pair):
            raise ValueError(f"{merges_file}: merge {number} is {pair!r:.100}, expected two pieces; download it again")
    return source, vocab, [(left, right) for left, right in merges]


def _check_merges(source: Path, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], whole: set[str]) -> None:
    """That merges make every token of the vocabulary that is more than one letter and is not found as a whole."""
    made = {left + right for left, right in merges}
    missing = [
        token for token in vocab if len(token.removesuffix("</w>")) > 1 and token not in made and token not in whole
    ]
    if missing:
        file = source if source.name == "tokenizer.json" else source.with_name("merges.txt")
        raise ValueError(
            f"{file}: its {len(merges)} merges never make {len(missing)} of the tokens in {source.name}, such as "
            f"{missing[0]!r}; the file is cut or belongs to another vocabulary: download it again"
        )
