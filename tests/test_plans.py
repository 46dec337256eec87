"""Whether what is shipped still fits a TPU chip, and is as fast, by its compiler."""

import importlib.util

import pytest
from plans import CHECKED, RECORDED, planned

from flax_pref.files import read_json

GROWTH = 1.1

pytestmark = [
    pytest.mark.plan,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make plan-check"),
]


@pytest.mark.parametrize("name", CHECKED)
def test_a_program_of_full_size_fits_a_chip_and_takes_no_more_time_than_recorded(name):
    recorded, told = read_json(RECORDED, expected="the record of tests/plans.py")[name], planned(CHECKED[name])
    assert told["fits"], f"{name} lacks {told['excess_bytes']} bytes on {told['topology']}"
    assert told["seconds"] <= GROWTH * recorded["seconds"], "if this is wanted: python -m tests.plans --record"
    assert told["copies"] <= GROWTH * recorded["copies"], "layouts change more often than recorded"
