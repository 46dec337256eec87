"""Fields of one record of a preference set: each is what it should be, or the record is rejected with a reason."""

import json
import math
import posixpath
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flax_pref.data.pairs import Drop, Tie
from flax_pref.files import unique_keys

T = TypeVar("T")

MAX_CAPTION = 5000  # characters; text encoders read the first few hundred


class Rejected(Exception):
    """The record gives no pair.

    Attributes:
        drop: says why.
    """

    def __init__(self, reason: str, detail: str = "", *, damaged: bool = True):
        super().__init__(reason, detail, damaged)
        self.drop = Drop(reason, detail, damaged)


def accepted(read: Callable[..., T], *arguments: Any) -> T | Drop:
    """What `read(*arguments)` returns, or why it rejects the record."""
    try:
        return read(*arguments)
    except Rejected as rejected:
        return rejected.drop


def json_object(data: bytes) -> dict[str, Any]:
    """A JSON object that stands for itself: a line, an element of a list, a small file."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise Rejected("not UTF-8", f"{error.reason} at its byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise Rejected("not JSON", str(getattr(error, "msg", error))) from error
    if not isinstance(value, dict):
        raise Rejected("no JSON object", quote(value))
    return value


def caption(value: Any) -> str:
    """A text that is not blank and has at most `MAX_CAPTION` characters, without the mark of UTF-8 before it."""
    if isinstance(value, str):
        value = value.removeprefix("\ufeff")
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Rejected("caption is empty", quote(value))
    if not _is_text(value):
        raise Rejected("caption is no text", quote(value))
    if len(value) > MAX_CAPTION:
        raise Rejected("caption is too long", f"{len(value)} characters; at most {MAX_CAPTION}")
    return value


def identifier(value: Any, name: str) -> str:
    """The id of an image, called `name` in the set: a text or a number."""
    if value is None or value == "":
        raise Rejected("id is missing", name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not _is_text(value):
        raise Rejected("id is no text", f"{name}: {quote(value)}")
    return value


def number(value: Any, name: str) -> float | None:
    """A finite number; None if there is none."""
    return None if value is None else finite(value, name)


def finite(value: Any, name: str) -> float:
    """A finite number, which must be there."""
    if not _is_finite(value):
        raise Rejected(f"{name} is no number", quote(value))
    return float(value)


def confidence(value: Any) -> float | None:
    """A number from 0 to 1; None if there is none."""
    known = number(value, "confidence")
    if known is not None and not 0 <= known <= 1:
        raise Rejected("confidence is not from 0 to 1", quote(value))
    return known


def truth(value: Any, name: str) -> bool | None:
    """A truth value: true or false, 1 or 0, or one of these as a text; None if there is none."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    said = value.strip().lower() if isinstance(value, str) else None
    if said not in ("true", "false", "1", "0"):
        raise Rejected("labels mean nothing", f"{name}: {quote(value)}; expected true or false")
    return said in ("true", "1")


def two_models(first: Any, second: Any) -> tuple[str, str] | None:
    """Names of the models that drew the images; None unless both are known."""
    if first is None or second is None:
        return None
    if not (_is_text(first) and _is_text(second)):
        raise Rejected("model is no text", quote([first, second]))
    return first, second


def models_of_list(value: Any) -> tuple[str, str] | None:
    """`two_models` of a list of two; None if there is none."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise Rejected("models are not two", quote(value))
    return two_models(*value)


def preferred(labels: Any, ties: Sequence[float] = (0.5,)) -> int | Tie:
    """Which image is preferred by labels (1, 0) or (0, 1); twice the same of `ties` is a tie."""
    if isinstance(labels, (list, tuple)) and len(labels) == 2 and all(map(_is_finite, labels)):
        first, second = labels
        if {first, second} == {0, 1}:
            return 0 if first else 1
        if first == second and first in ties:
            return Tie()
    raise Rejected("labels mean nothing", f"{quote(labels)}; expected 1 and 0, or 0.5 twice for a tie")


def relative_path(value: Any, name: str) -> str:
    """A path that stays within the folder of the set."""
    if value is None or value == "":
        raise Rejected("path is missing", name)
    if not _is_text(value):
        raise Rejected("path is no text", f"{name}: {quote(value)}")
    if re.match(r"[/\\]|[A-Za-z]:[/\\]|\w+://", value) or ".." in re.split(r"[/\\]", value):
        raise Rejected("path leaves the folder of the set", f"{name}: {quote(value)}")
    return value


def two_paths(first: Any, second: Any, names: tuple[str, str]) -> tuple[str, str]:
    """Paths of the two images, called `names` in the set."""
    paths = relative_path(first, names[0]), relative_path(second, names[1])
    if posixpath.normpath(paths[0]) == posixpath.normpath(paths[1]):
        raise Rejected("both images are the same", paths[0], damaged=False)
    return paths


def quote(value: Any) -> str:
    """A value as JSON, if it is short."""
    quoted = json.dumps(value, default=repr)
    return quoted if len(quoted) <= 60 else f"{quoted[:60]}..."


def _is_text(value: Any) -> bool:
    """Whether it is a string of whole characters.

    JSON can hold halves of characters, which no other file can. Zeros are in no text: they come from a file in UTF-16,
    or from one that was not written to its end.
    """
    return isinstance(value, str) and "\0" not in value and value.encode(errors="ignore").decode() == value


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of more than a thousand bits
        return False
