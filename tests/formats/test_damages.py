"""Every kind of file, damaged: one line names the file and the key, or the table of kinds says why it is read."""

import re
import shutil

import pytest

from flax_pref.config import UserError
from tests.formats.damages import content_of, copied, cut, misshapen, with_surplus, without
from tests.formats.matrix import KINDS

pytestmark = pytest.mark.formats

CHANGES = {"missing": without, "surplus": with_surplus, "shape": misshapen}


def refusal(kind, path):
    """The message that reading gives; "" where it is read."""
    try:
        kind.numbers(kind.load(path))
    except (ValueError, FileNotFoundError, UserError) as error:  # anything else fails the test
        return str(error)
    return ""


def check(kind, path, file, damage, key=""):
    """That a damaged file is refused in one line that names it and the key, or may be read."""
    said = refusal(kind, path)
    reason = next((reason for pattern, reason in kind.harmless.items() if re.search(pattern, f"{damage} {key}")), None)
    if reason is not None:
        assert not said, f"{damage} {key} is refused, but the kind says that {reason}: {said}"
        return
    assert said, f"{damage} {key}: read as if nothing were wrong"
    assert "\n" not in said and len(said) < 1000, said
    assert str(path) in said or str(file) in said or str(file.parent) in said, said
    if key:
        assert key in said or kind.names(key) in said, f"neither {key} nor {kind.names(key)} is in: {said}"


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_cut_is_refused(name, made, tmp_path):
    kind = KINDS[name]
    path, file = copied(made(name).path, kind.damaged, tmp_path)
    cut(file)
    check(kind, path, file, "truncated")


@pytest.mark.parametrize("damage", CHANGES)
@pytest.mark.parametrize("name", KINDS)
def test_a_key_that_is_missing_or_too_much_or_of_another_shape_is_named(name, damage, made, tmp_path):
    kind = KINDS[name]
    whole = made(name).path
    keys = content_of(whole / kind.damaged if kind.damaged else whole).items
    some = {kind.sort(key): key for key in keys}
    some.pop(None, None)
    for number, key in enumerate([kind.surplus] if damage == "surplus" else some.values()):
        place = tmp_path / str(number)
        place.mkdir()
        path, file = copied(whole, kind.damaged, place)
        CHANGES[damage](file, key)
        check(kind, path, file, damage, key)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.stranger])
def test_a_file_of_another_family_is_refused(name, made, tmp_path):
    kind, other = KINDS[name], KINDS[KINDS[name].stranger]
    path, file = copied(made(name).path, kind.damaged, tmp_path)
    stranger = made(other.name).path
    shutil.copy(stranger / other.damaged if other.damaged else stranger, file)
    check(kind, path, file, "stranger")
