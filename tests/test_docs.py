"""The pages of docs/ and the code that they draw and list."""

import re
import tomllib
from pathlib import Path

from pages import DOCS, ROOT, links

import flax_pref


def test_the_figure_of_the_folders_shows_the_floors_that_the_import_contract_holds():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (
        contract["layers"] for contract in contracts if contract["type"] == "layers" and len(contract["layers"]) > 5
    )
    floors = [name.strip().removeprefix("flax_pref.") for layer in layers for name in layer.split("|")]
    drawn = re.findall(r'font-weight="600">([a-z]+)/?</text>', (DOCS / "floors.svg").read_text())
    assert [name for name in drawn if (Path(flax_pref.__file__).parent / name).exists() or name in floors] == floors


def test_every_public_name_is_in_the_reference():
    listed = {text.strip("`") for text, _ in links("docs/reference/index.md")}
    assert listed >= set(flax_pref.__all__) - {"__version__"}


def test_figures_are_drawn_without_the_network():
    for figure in DOCS.glob("*.svg"):
        assert not re.search(r"href|url\((?!#)|@import|<script", figure.read_text()), figure
