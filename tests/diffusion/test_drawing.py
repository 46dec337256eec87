"""Flags become the parts that draw images, once."""

from importlib import resources
from typing import get_args

import numpy as np
import pytest

from flax_pref.checkpoints.checkpoint import Checkpoint
from flax_pref.config import UserError
from flax_pref.diffusion import drawing, noise_levels
from flax_pref.diffusion.drawing import resolve_drawing
from flax_pref.diffusion.drawing_flags import SPACINGS, DrawingFlags, SolverName, with_preset
from flax_pref.diffusion.guidance import Schedule, cpgd, merge_weights, tabulate
from flax_pref.diffusion.scheduler_configs import NAMES
from flax_pref.images import set_drawing
from flax_pref.images.image_flags import ImageFlags

BASE = str(resources.files("flax_pref.world") / "base")
BOTH = {"model": "demo", "module": (f"pos={BASE}", f"neg={BASE}"), "steps": 4}


def test_each_module_has_a_strength_of_its_own():
    resolved = resolve_drawing(DrawingFlags(rule="cpgd", w="pos=3,neg=linear:0:1", **BOTH))
    assert resolved.sampled.strengths == {"pos": Schedule((3.0,)), "neg": Schedule((0.0, 1.0), "linear")}
    assert resolved.terms["w"] == "pos=3,neg=linear:0:1", "a JSON file can hold it"


def test_strengths_of_modules_are_merged_into_the_weights():
    resolved = resolve_drawing(DrawingFlags(rule="cpgd", w="pos=3,neg=1", merge=True, **BOTH))
    assert merge_weights(resolved.rule) == merge_weights(cpgd({"pos": 3.0, "neg": 1.0}, 7.5))
    assert resolved.terms["name"] == "cfg" and set(resolved.sampled.networks()) == {"base"}
    preset = with_preset(DrawingFlags(preset="fast", w="pos=3,neg=1", **BOTH))
    assert merge_weights(resolve_drawing(preset).rule) == merge_weights(resolved.rule)


def test_any_number_of_modules_has_a_rule():
    modules = ("faithful", "pretty", "plain")
    flags = {**BOTH, "module": tuple(f"{name}={BASE}" for name in modules)}
    resolved = resolve_drawing(DrawingFlags(rule="multi", w="faithful=1,pretty=norm:0.5,plain=-1", **flags))
    assert resolved.sampled.networks() == ("base", *modules)
    merged = resolve_drawing(DrawingFlags(rule="multi", w="faithful=1,pretty=0.5,plain=-1", merge=True, **flags))
    assert merge_weights(merged.rule) == {"faithful": 1.0, "base": -0.5, "pretty": 0.5, "plain": -1.0}
    with pytest.raises(UserError, match=r"has no use for module 'faithful'.*; expected .*--rule multi"):
        resolve_drawing(DrawingFlags(rule="cfg", **flags))


def test_a_shaping_and_a_norm_are_flags():
    resolved = resolve_drawing(DrawingFlags(rule="cpgd", w="norm:0.3", shaping="cap:0.5", **BOTH))
    assert resolved.sampled.shaping == "cap:0.5" and resolved.sampled.w == Schedule((0.3,), norm=True)
    assert resolved.terms["shaping"] == "cap:0.5", "a JSON file can hold it"


def test_the_late_preset_guides_by_the_prompt_first_and_by_the_modules_then():
    resolved = resolve_drawing(with_preset(DrawingFlags(preset="late", w="4", **BOTH)))
    table = tabulate(resolved.sampled, 4, 1)
    rows = [{table.rows[r] for r in plan.rows} for plan in table.plans]
    early = {("base", "empty"), ("base", "text")}
    late = {("base", "text"), ("pos", "text"), ("neg", "text")}
    assert rows == [early, early, late, late]


def test_a_rule_of_the_user_is_a_flag_too(tmp_path, monkeypatch):
    (tmp_path / "rule_of_mine.py").write_text(
        "from flax_pref.diffusion.guidance import cpgd\n"
        "def pull(w, guidance_scale, **options):\n    return cpgd(w, guidance_scale, **options)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    resolved = resolve_drawing(DrawingFlags(rule="python:rule_of_mine:pull", w="2", every=2, **BOTH))
    assert set(resolved.sampled.networks()) == {"base", "pos", "neg"} and resolved.sampled.every == 2
    with pytest.raises(UserError, match=r"--rule python:rule_of_mine:pull needs a module 'pos'"):
        resolve_drawing(DrawingFlags(model="demo", rule="python:rule_of_mine:pull", w="2"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rule": "cpgdd"}, "no rule 'cpgdd'; expected cfg, fine_tuned"),
        ({"rule": "cpgd", "w": "pos=3,neg=list:1:2"}, "--w pos=3,neg=list:1:2: 2 values, but the solver takes 4 steps"),
        ({"rule": "cpgd", "w": "pos=3,neg=linear:0:1", "merge": True}, "only one number can be merged into weights"),
        ({"rule": "cpgd", "w": "3@0.2:0.8", "merge": True}, "--w 3@0.2:0.8 --merge: only one number"),
        ({"rule": "cpgd", "w": "pos=3,pos=1"}, "--w pos=3,pos=1: .*a strength for each name, once"),
        ({"guidance_scale": "pos=3"}, "--guidance-scale pos=3: expected one strength"),
        ({"rule": "cpgd", "w": "2", "shaping": "cup:1"}, "--shaping cup:1: no shaping 'cup'; expected cap, orthogonal"),
        ({"rule": "cpgd", "w": "2", "shaping": "cap:1", "merge": True}, "--merge has no use for --shaping"),
        ({"rule": "cpgd", "w": "norm:2", "merge": True}, "--w norm:2 --merge: only one number"),
        ({"rule": "cfg", "shaping": "cap:1", "module": ()}, "--rule cfg has no use for --shaping"),
        ({"rule": "multi", "w": "2"}, "multi: .* a strength for each by its name"),
        ({"guidance_scale": "norm:2"}, "guidance_scale cannot be norm-matched"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told_with_its_flag(flags, message):
    with pytest.raises((UserError, ValueError), match=message):
        resolve_drawing(DrawingFlags(**{**BOTH, **flags}))


def test_flags_are_resolved_once(tmp_path, monkeypatch):
    class Loading(Exception):
        pass

    def load(*arguments, **options):
        raise Loading

    counts = dict.fromkeys(("_sources", "open_model", "find_module"), 0)

    def counted(name, function):
        def count(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return count

    for name in counts:
        monkeypatch.setattr(drawing, name, counted(name, getattr(drawing, name)))
    monkeypatch.setattr(Checkpoint, "load", load)
    flags = ImageFlags(prompt=("a",), rule="cpgd", w="2", out=str(tmp_path / "out"), **BOTH)
    with pytest.raises(Loading):
        set_drawing.draw_images(flags)
    assert counts == {"_sources": 1, "open_model": 1, "find_module": 4}, "of two modules, and for their hashes"


def test_sigmas_spacing_and_solver_are_flags():
    def timesteps(**flags):
        return np.asarray(resolve_drawing(DrawingFlags(**{"model": "demo", **flags})).solver.timesteps).tolist()

    assert timesteps(steps=3, spacing="900,500,100", solver="lcm") == [900, 500, 100]
    assert timesteps(steps=2, spacing="trailing", solver="euler_a") == [999, 499]
    assert timesteps(steps=10, sigmas="ays", solver="dpm++")[:3] == [999, 850, 736]
    assert timesteps(steps=2, sigmas="karras", solver="euler") == timesteps(steps=2, solver="euler_karras")


def test_the_flags_name_every_solver():
    assert get_args(SolverName) == tuple(NAMES)
    assert SPACINGS == noise_levels.SPACINGS
    listed = get_args(get_args(DrawingFlags.__annotations__["sigmas"])[0])
    assert {*listed, "ays_sdxl"} == set(noise_levels.SIGMAS)


def test_textual_inversions_are_flags(tmp_path):
    (tmp_path / "toy.safetensors").write_bytes(b"")
    found = resolve_drawing(DrawingFlags(model="demo", embedding=(f"<toy>={tmp_path / 'toy.safetensors'}",)))
    assert found.embeddings == {"<toy>": str(tmp_path / "toy.safetensors")}
    for wrong in ("toy", "=toy.safetensors", "toy="):
        with pytest.raises(UserError, match=f"--embedding {wrong}: expected NAME=FILE"):
            resolve_drawing(DrawingFlags(model="demo", embedding=(wrong,)))
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors: no such file"):
        resolve_drawing(DrawingFlags(model="demo", embedding=("<toy>=nowhere.safetensors",)))


@pytest.mark.parametrize(("large", "unit"), [(0, "step"), (10**8, "image")])
def test_the_bar_counts_steps_where_they_are_long(monkeypatch, capsys, tmp_path, large, unit):
    monkeypatch.setattr(set_drawing, "LARGE", large)
    set_drawing.draw_images(ImageFlags(model="demo", prompt=("a",), steps=2, out=str(tmp_path / "out")))
    told = capsys.readouterr().err
    assert ("2/2" if unit == "step" else "1/1") in told
    assert f"{unit}/s" in told or f"s/{unit}" in told
