"""Prompts with weights, and longer than a text encoder reads, as A1111's and ComfyUI's programs understand them.

    a1111    (word) 1.1, (word:1.3) 1.3, [word] 1 / 1.1; nested weights multiply; BREAK begins a chunk
    comfyui  (word) 1.1, (word:1.3) 1.3; of nested weights the innermost number counts

Both split a prompt into chunks of 75 tokens, each with a start and an end token, which are encoded one by one. a1111
moves up to 20 tokens behind the last comma into the next chunk, comfyui keeps words of fewer than 8 tokens whole. What
a weight does to the states of a token, see `Syntax.weigh`. Backslashes keep brackets as they are: \\(word\\).
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_pref.checkpoints.tokenizer import CLIPTokenizer
from flax_pref.diffusion.drawing_flags import PromptSyntax
from flax_pref.shapes import Bool, Float, Int

ROUND = 1.1  # weight of (word); that of [word] is its inverse
COMMA_REACH = 20  # tokens behind a comma that a1111 moves into the next chunk
SHORT_WORD = 8  # tokens; comfyui splits words from this length on

Parts = list[tuple[str | None, float]]
"""Texts with their weights, in order; None, for BREAK, begins a chunk."""
Chunk = list[tuple[int, float]]
"""Token ids with their weights, start and end token not among them."""


class Tokens(NamedTuple):
    """Prompts for one text encoder, in chunks.

    Attributes:
        ids: with start token, end token and padding.
        weights: of the tokens.
        seen: whether a chunk belongs to the prompt, or fills up its row.
    """

    ids: Int[np.ndarray, "images chunks tokens"]
    weights: Float[np.ndarray, "images chunks tokens"]
    seen: Bool[np.ndarray, "images chunks"]


class Syntax(NamedTuple):
    """A way to read prompts.

    Attributes:
        parse: text to parts; raises a ValueError for what it does not support.
        split: parts to chunks, of the tokenizer's length at most; at least one.
        weigh: `(states [B, T, D], weights [B, T], empty [T, D])` of B chunks and of the empty one to weighted states.
    """

    parse: Callable[[str], Parts]
    split: Callable[[Parts, CLIPTokenizer], list[Chunk]]
    weigh: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def check_prompts(prompts: Iterable[str], syntax: PromptSyntax) -> None:
    """Raises a ValueError if a prompt has what the syntax does not support."""
    if syntax != "plain":
        for prompt in prompts:
            SYNTAXES[syntax].parse(prompt)


def warn_of_weights(prompts: Iterable[str]) -> None:
    """Warns if a prompt that is read as it is looks as if it had weights."""
    for prompt in prompts:
        if found := re.search(r"\([^()]+:\s*\d*\.?\d+\)", prompt):
            warnings.warn(
                f"prompt {prompt!r:.100}: {found.group()!r} is read as text; prompt_syntax (--prompt-syntax) a1111 or "
                "comfyui reads it as a weight",
                stacklevel=4,
            )
            return


def count_chunks(prompts: Iterable[str], tokenizers: Sequence[CLIPTokenizer], syntax: PromptSyntax) -> int:
    """Chunks of the longest prompt; 1 where the syntax is plain, and what does not fit is cut."""
    if syntax == "plain":
        return 1
    parse, split, _ = SYNTAXES[syntax]
    return max((len(split(parse(prompt), own)) for prompt in prompts for own in tokenizers), default=1)


def tokenize(prompts: Sequence[str], tokenizer: CLIPTokenizer, syntax: PromptSyntax, chunks: int) -> Tokens:
    """Prompts as so many chunks each, empty ones behind those of the prompt.

    Raises:
        ValueError: a prompt has more chunks, or what the syntax does not support.
    """
    parse, split, _ = SYNTAXES[syntax]
    special = [tokenizer.id_of(name) for name in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)]
    bos, eos, pad = (id_ for id_ in special if id_ is not None)  # a tokenizer has all three
    shape = len(prompts), chunks, tokenizer.model_max_length
    ids, weights, seen = np.full(shape, pad, np.int32), np.ones(shape, np.float32), np.zeros(shape[:2], bool)
    ids[..., 0], ids[..., 1] = bos, eos
    for row, prompt in enumerate(prompts):
        own = split(parse(prompt), tokenizer)
        if len(own) > chunks:
            raise ValueError(f"prompt {prompt!r:.100}: has {len(own)} chunks of tokens, expected at most {chunks}")
        seen[row, : len(own)] = True
        for number, chunk in enumerate(own):
            end = len(chunk) + 1
            ids[row, number, 1:end] = [token for token, _ in chunk]
            weights[row, number, 1:end] = [weight for _, weight in chunk]
            ids[row, number, end] = eos
    return Tokens(ids, weights, seen)


# ----------------------------------------------------------------------------------------------------------------------
# A1111

# An escaped letter, a bracket, a weight before its bracket, or text between them.
_SIGN = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)|(?P<bracket>[()\[\]])|:\s*(?P<weight>[+-]?(\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|:"
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_UNSUPPORTED = {
    r"<(lora|lyco|hypernet):": "{0} names a network; give LoRA files by --module",
    r"\[[^\[\]]*\|[^\[\]]*\]": "{0} alternates words, which is not supported; write one of them",
    r"\[[^\[\]]*:\s*[\d.]+\s*\]": "{0} edits the prompt while sampling, which is not supported; write one of the words",
    r"\bAND\b": "{0} composes prompts, which is not supported; write one prompt",
}


def _parse_a1111(text: str) -> Parts:
    bare = re.sub(r"\\.", "", text)
    for pattern, reason in _UNSUPPORTED.items():
        if found := re.search(pattern, bare):
            raise ValueError(f"prompt {text!r:.100}: {reason.format(repr(found.group()))}")
    parts: list[tuple[str | None, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, weight: float) -> None:
        start = opened[bracket].pop()
        parts[start:] = [(text, weight * own) for text, own in parts[start:]]

    for found in _SIGN.finditer(text):
        sign, escaped, bracket, weight = found.group(0, "escaped", "bracket", "weight")
        if escaped is not None:
            parts.append((escaped, 1.0))
        elif bracket in ("(", "["):
            opened[bracket].append(len(parts))
        elif weight is not None and opened["("]:
            close("(", float(weight))
        elif bracket == ")" and opened["("]:
            close("(", ROUND)
        elif bracket == "]" and opened["["]:
            close("[", 1 / ROUND)
        else:
            first, *others = _BREAK.split(sign)
            parts.append((first, 1.0))
            for other in others:
                parts += [(None, 1.0), (other, 1.0)]
    for bracket, weight in (("(", ROUND), ("[", 1 / ROUND)):
        while opened[bracket]:
            close(bracket, weight)
    # Neighbours of one weight are one text: a word may go on behind a bracket.
    merged: Parts = []
    for part, weight in parts:
        before, of_before = merged[-1] if merged else (None, 0.0)
        if part is not None and before is not None and of_before == weight:
            merged[-1] = (before + part, weight)
        else:
            merged.append((part, weight))
    return merged


def _split_a1111(parts: Parts, tokenizer: CLIPTokenizer) -> list[Chunk]:
    size, comma = tokenizer.model_max_length - 2, tokenizer.id_of(",</w>")
    chunks: list[Chunk] = []
    chunk: Chunk = []
    behind_comma: int | None = None
    for text, weight in parts:
        if text is None:
            chunks.append(chunk)
            chunk, behind_comma = [], None
            continue
        for piece in tokenizer.pieces(text):
            if piece == (comma,):
                behind_comma = len(chunk) + 1
            elif behind_comma is not None and len(chunk) == size and size - behind_comma < COMMA_REACH:
                chunks.append(chunk[:behind_comma])
                chunk, behind_comma = chunk[behind_comma:], None
            if len(chunk) + len(piece) > size:
                chunks.append(chunk)
                chunk, behind_comma = [], None
            chunk = chunk + [(token, weight) for token in piece]
    return [*chunks, chunk] if chunk or not chunks else chunks


def _weigh_a1111(states: jax.Array, weights: jax.Array, empty: jax.Array) -> jax.Array:
    """Products, scaled so that the mean over a chunk stays what it was."""
    del empty
    weighted = states * weights[..., None]
    return weighted * (states.mean(axis=(1, 2)) / weighted.mean(axis=(1, 2)))[:, None, None]


# ----------------------------------------------------------------------------------------------------------------------
# ComfyUI


def _parse_comfyui(text: str) -> Parts:
    if found := re.search(r"\bembedding:\S+", text):
        raise ValueError(
            f"prompt {text!r:.100}: {found.group()!r} names a textual inversion; give its file by --embedding "
            "NAME=FILE and write NAME"
        )
    # Private characters stand for escaped brackets.
    hidden = text.replace(r"\)", "\0\1").replace(r"\(", "\0\2")
    return [(part.replace("\0\1", ")").replace("\0\2", "("), weight) for part, weight in _nested(hidden, 1.0)]


def _nested(text: str, weight: float) -> Iterator[tuple[str, float]]:
    for group in _groups(text):
        if len(group) < 2 or group[0] != "(" or group[-1] != ")":
            yield group, weight
            continue
        inside, own = group[1:-1], ROUND * weight
        before, colon, number = inside.rpartition(":")
        if before and colon and (given := _number(number)) is not None:
            inside, own = before, given
        yield from _nested(inside, own)


def _groups(text: str) -> Iterator[str]:
    """Texts in outer brackets, with these, and texts between them."""
    start = depth = 0
    for place, letter in enumerate(text):
        if letter == "(":
            if depth == 0 and place > start:
                yield text[start:place]
                start = place
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                yield text[start : place + 1]
                start = place + 1
    if start < len(text):
        yield text[start:]


def _split_comfyui(parts: Parts, tokenizer: CLIPTokenizer) -> list[Chunk]:
    size = tokenizer.model_max_length - 2
    chunks: list[Chunk] = []
    chunk: Chunk = []
    for text, weight in parts:
        for word in filter(None, (text or "").replace("\n", " ").split(" ")):
            whole = tokenizer.id_of(f"{word}</w>")
            ids = [token for piece in tokenizer.pieces(word) for token in piece] if whole is None else [whole]
            tokens = [(token, weight) for token in ids]
            splits = len(tokens) >= SHORT_WORD
            while tokens:
                room = size - len(chunk)
                taken = len(tokens) if len(tokens) <= room else room if splits else 0
                chunk, tokens = chunk + tokens[:taken], tokens[taken:]
                if tokens:
                    chunks.append(chunk)
                    chunk = []
    return [*chunks, chunk]


def _weigh_comfyui(states: jax.Array, weights: jax.Array, empty: jax.Array) -> jax.Array:
    """Distances from the states of the empty prompt, times the weights."""
    weights = weights[..., None]
    return jnp.where(weights == 1, states, (states - empty) * weights + empty)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


SYNTAXES: Mapping[PromptSyntax, Syntax] = {
    "a1111": Syntax(_parse_a1111, _split_a1111, _weigh_a1111),
    "comfyui": Syntax(_parse_comfyui, _split_comfyui, _weigh_comfyui),
}
