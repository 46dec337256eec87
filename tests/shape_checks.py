"""How the signatures of the modules that `conftest.py` lists are checked while tests run."""

from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_typed = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def checked(function):
    """The function with the arrays of its arguments and result checked.

    Nothing else is: tests pass stand-ins for checkpoints and networks, and what fields of dataclasses must be is told
    by the messages of these.
    """
    if function.__name__ == "__init__":
        return function
    annotations = function.__annotations__
    function.__annotations__ = {name: hint if _has_array(hint) else Any for name, hint in annotations.items()}
    return _typed(function)


def _has_array(hint: Any) -> bool:
    parts = hint if isinstance(hint, list) else get_args(hint)  # a list: the arguments of a Callable
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_has_array, parts))
