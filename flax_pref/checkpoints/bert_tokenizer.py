"""BERT's word-piece tokenizer, uncased (arXiv:1810.04805, section 3), as BLIP uses it, read from its vocabulary."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from flax_pref.checkpoints.hub import find_file

PUBLISHED = "google-bert/bert-base-uncased"
FILE = "vocab.txt"
START, END, PAD, UNKNOWN, MASK = "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"
ADDED = ("[DEC]", "[ENC]")  # BLIP's, behind the vocabulary


@dataclasses.dataclass(frozen=True, eq=False)
class BertTokenizer:
    """Turns texts into token ids of one length.

    Attributes:
        vocab: id of each token; pieces that continue a word begin with "##".
        length: of every row of ids, start and end token included.
    """

    vocab: Mapping[str, int] = dataclasses.field(repr=False)
    length: int
    _encoder: tokenizers.Tokenizer = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        for token in (START, END, PAD, UNKNOWN, MASK):
            if token not in self.vocab:
                raise ValueError(f"BertTokenizer: the vocabulary of {len(self.vocab)} tokens has no {token!r}")
        encoder = tokenizers.Tokenizer(models.WordPiece(dict(self.vocab), unk_token=UNKNOWN))
        # Lower case, without accents, each Chinese character a word of its own.
        encoder.normalizer = normalizers.BertNormalizer()
        encoder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        encoder.post_processor = processors.TemplateProcessing(
            single=f"{START} $A {END}", special_tokens=[(token, self.vocab[token]) for token in (START, END)]
        )
        # A text may spell out the special tokens; they are then one token each.
        encoder.add_special_tokens([START, END, PAD, UNKNOWN, MASK])
        encoder.add_special_tokens(list(ADDED))
        encoder.enable_truncation(self.length)
        encoder.enable_padding(length=self.length, pad_id=self.vocab[PAD], pad_token=PAD)
        object.__setattr__(self, "_encoder", encoder)

    @property
    def vocab_size(self) -> int:
        """With the tokens that BLIP adds."""
        return self._encoder.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, int32 `[B, length]`: start, text (cut where too long), end, padding; and false where that is."""
        if isinstance(texts, str):
            raise TypeError("BertTokenizer takes a list of texts, not one string; write tokenizer([text])")
        encodings = self._encoder.encode_batch(list(texts))
        ids = np.array([encoding.ids for encoding in encodings], np.int32)
        mask = np.array([encoding.attention_mask for encoding in encodings], bool)
        return ids.reshape(len(encodings), self.length), mask.reshape(len(encodings), self.length)


def load_bert_tokenizer(path: str | Path | None = None, *, length: int) -> BertTokenizer:
    """Reads the vocabulary of BERT, uncased: one token in each line.

    Args:
        path: vocab.txt, or a folder that holds it; None: as published on the Hub.
        length: see `BertTokenizer`.

    Raises:
        FileNotFoundError: there is no such file, or the Hub can be neither reached nor has it been.
        ValueError: it is not such a vocabulary.
    """
    file = _published() if path is None else Path(path).expanduser()
    file = file / FILE if file.is_dir() else file
    try:
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise FileNotFoundError(
            f"{file}: no such file; expected {FILE} of {PUBLISHED}, or a folder that holds it"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: not a text file ({error}); expected {FILE} of {PUBLISHED}: download it again"
        ) from error
    try:
        return BertTokenizer({token.rstrip("\r"): index for index, token in enumerate(lines)}, length)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; expected {FILE} of {PUBLISHED}") from error


def _published() -> Path:
    try:
        return find_file(PUBLISHED, FILE)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, as the tokenizer") from error
