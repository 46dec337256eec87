"""Flags become the parts that draw images, once."""

from importlib import resources

import pytest

from flax_pref.config import UserError
from flax_pref.diffusion import drawing
from flax_pref.diffusion.drawing import resolve_drawing
from flax_pref.diffusion.drawing_flags import DrawingFlags, with_preset
from flax_pref.diffusion.guidance import Schedule, cpgd, merge_weights
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

    counts = dict.fromkeys(("_sources", "describe", "find_checkpoint"), 0)

    def counted(name, function):
        def count(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return count

    for name in counts:
        monkeypatch.setattr(drawing, name, counted(name, getattr(drawing, name)))
    monkeypatch.setattr(drawing, "load_pipeline", load)
    flags = ImageFlags(prompt=("a",), rule="cpgd", w="2", out=str(tmp_path / "out"), **BOTH)
    with pytest.raises(Loading):
        set_drawing.draw_images(flags)
    assert counts == {"_sources": 1, "describe": 1, "find_checkpoint": 3}, "of the checkpoint and two modules"
