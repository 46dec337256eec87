"""What a page draws: the images of `flax-pref sample`, one order at a time, and compiled once."""

import io
import threading

import jax
import numpy as np
import pytest
from app_modules import save_modules
from PIL import Image
from training.tiny import tiny_checkpoint

from flax_pref.app.app_flags import AppFlags
from flax_pref.app.studio import Order, Studio, readable
from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.config import UserError
from flax_pref.diffusion import text_to_image
from flax_pref.images.image_files import read_metadata
from flax_pref.images.image_flags import ImageFlags
from flax_pref.images.set_drawing import draw_images

ORDER = Order(
    prompt="a cat", negative_prompt="", rule="cpgd", w="4", guidance_scale="3", steps=3, seed=0, images=1
)  # fmt: skip
SECONDS = 120
pytestmark = pytest.mark.program


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Flags of a tiny model with two modules."""
    folder = tmp_path_factory.mktemp("app")
    model = tiny_checkpoint(folder / "tiny", "sd15")
    save_modules(load_pipeline(model).unet, folder)
    return {"model": str(model), "module": tuple(f"{name}={folder}/{name}.safetensors" for name in ("pos", "neg"))}


@pytest.fixture(scope="module")
def studio(given):
    studio = Studio(AppFlags(**given, steps=3))
    studio.load()
    yield studio
    studio.close()


def changed(**changes):
    return Order(**{**vars(ORDER), **changes})


def draw(studio, **changes):
    job = studio.submit(changed(**changes))
    assert job.finished.wait(SECONDS) and job.error is None
    assert job.done == job.total
    return job


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(picture.content)))


def test_a_new_w_seed_or_prompt_compiles_nothing(studio):
    draw(studio)
    programs, compiled = text_to_image._sampler._cache_size(), []
    listen = lambda event, seconds, **_: "backend_compile" in event and compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        pictures = [
            draw(studio, **changes).pictures[-1].content
            for changes in ({"w": "2"}, {"w": "linear:8:0"}, {"seed": 7}, {"prompt": "a dog"}, {"guidance_scale": "5"})
        ]
        assert len(set(pictures)) == len(pictures)
        assert text_to_image._sampler._cache_size() == programs and not compiled
        draw(studio, steps=2)
        assert compiled, "another number of steps is another program"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_images_are_those_of_flax_pref_sample_and_say_so(studio, given, tmp_path):
    job = draw(studio, images=2, negative_prompt="a dog", seed=4)
    assert [(picture.side, picture.seed) for picture in job.pictures] == [
        ("base", 4), ("guided", 4), ("base", 5), ("guided", 5)
    ]  # fmt: skip
    asked = {"model": given["model"], "prompt": ("a cat",), "seeds": "4-5", "negative_prompt": "a dog", "steps": 3}
    asked |= {"guidance_scale": "3"}
    draw_images(ImageFlags(**asked, out=str(tmp_path / "base")))
    draw_images(ImageFlags(**asked, module=given["module"], rule="cpgd", w="4", out=str(tmp_path / "guided")))
    for picture in job.pictures:
        (file,) = (
            file
            for file in (tmp_path / picture.side).glob("*.png")
            if read_metadata(file).get("seed") == picture.seed and "prompt" in read_metadata(file)
        )
        assert read_metadata(picture.content) == read_metadata(file)
        np.testing.assert_array_equal(pixels(picture), np.asarray(Image.open(file)))


def test_another_w_does_not_draw_the_base_again(studio):
    first = draw(studio, seed=9)
    again = draw(studio, seed=9, w="1")
    assert (first.total, again.total) == (8, 4)  # pndm takes one step more than it is asked for
    assert again.pictures[0].content == first.pictures[0].content
    assert again.pictures[1].content != first.pictures[1].content


def test_a_rule_without_modules_draws_the_base_alone(studio):
    job = draw(studio, rule="cfg", w="")
    assert [picture.side for picture in job.pictures] == ["base"]
    assert read_metadata(job.pictures[0].content)["modules"] == {}


def test_every_offer_draws(studio):
    for offer in studio.offers:
        w = ",".join(f"{name}=1" for name in offer.strengths) if offer.rule == "multi" else "2"
        order = changed(rule=offer.label, w=w if offer.strengths else "")
        flags, drawing = studio._resolved(order, "guided")
        assert set(drawing.rule.networks()) - {"base"} == set(offer.modules)
        assert {text.partition("=")[0] for text in flags.module} == set(offer.modules)


def test_an_order_that_is_stopped_ends_at_once_and_the_next_one_is_drawn(studio, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    count_chunks = type(studio._draw).count_chunks

    def wait(self, prompts):
        begun.set()
        assert go_on.wait(SECONDS)
        return count_chunks(self, prompts)

    monkeypatch.setattr(type(studio._draw), "count_chunks", wait)
    drawn, waits, last = (studio.submit(changed(seed=seed)) for seed in (20, 21, 22))
    assert begun.wait(SECONDS)
    assert [studio.ahead(job) for job in (drawn, waits, last)] == [0, 1, 2]
    studio.stop(waits)
    assert waits.finished.is_set() and studio.ahead(last) == 1
    studio.stop(drawn)
    go_on.set()
    assert last.finished.wait(SECONDS) and len(last.pictures) == 2
    assert drawn.finished.is_set() and not drawn.pictures and drawn.error is None


def test_a_sampler_that_runs_is_stopped_between_two_steps(studio, capfd):
    job = studio.submit(changed(steps=300, seed=30))
    while job.done < 2 and not job.finished.is_set():
        job.finished.wait(0.002)
    studio.stop(job)
    assert job.finished.wait(SECONDS)
    assert job.stopped and job.error is None and job.done < job.total
    draw(studio, seed=31)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "Prompt: empty; describe what to draw"),
        ({"w": "strong"}, "w strong: 'strong' is no strength"),
        ({"w": "list:1:2"}, "w list:1:2: 2 values, but the solver takes 4 steps; expected one for each"),
        ({"guidance_scale": "-1"}, "Guidance scale -1: expected 0 or more"),
        ({"seed": -1}, "Seed is -1; expected 0 to 2^32 - 1"),
        ({"steps": 0}, "Steps 0: expected at least 1"),
        ({"rule": "autoguidance"}, "Rule 'autoguidance': is not offered; expected cfg, "),
    ],
)
def test_mistakes_are_told_with_the_names_on_the_page(studio, changes, message):
    with pytest.raises((UserError, ValueError)) as caught:
        studio.submit(changed(**changes))
    assert message in readable(caught.value) and "--w" not in readable(caught.value)


def test_an_error_while_drawing_reaches_its_order_and_no_other(studio, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(type(studio._draw), "draw", fail)
    job = studio.submit(changed(seed=40))
    assert job.finished.wait(SECONDS)
    assert job.error.startswith("The device has not enough memory for this drawing.")
    monkeypatch.undo()
    draw(studio, seed=40)
    assert "defect of the program" in readable(TypeError("x")) and "TypeError: x" in capsys.readouterr().err


def test_what_is_cut_from_a_prompt_is_said(studio):
    job = draw(studio, prompt="a very long prompt " * 20)
    assert len(job.notes) == 1 and "this is cut and has no effect" in job.notes[0]


@pytest.mark.parametrize("rule", ["multi", "npo", "pgd", "cfg"])
def test_a_page_begins_with_any_rule_that_is_offered(given, rule):
    studio = Studio(AppFlags(**given, steps=3, rule=rule))
    assert studio.first.rule == ("cpgd" if rule == "cfg" else rule)
    studio.close()


def test_syntax_that_is_not_supported_is_refused_before_it_waits(given):
    studio = Studio(AppFlags(**given, steps=3, prompt_syntax="a1111"))
    with pytest.raises(ValueError, match=r"edits the prompt while sampling, which is not supported"):
        studio.submit(changed(prompt="a [cat:dog:0.5]"))
    studio.close()
