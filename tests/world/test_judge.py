import itertools

import jax
import numpy as np
import pytest

from flax_pref.world import judge
from flax_pref.world import scenes as world

COUNT = 64


@pytest.fixture(scope="module")
def scenes():
    return list(itertools.islice(world.scenes("train", 1), COUNT))


@pytest.fixture(scope="module")
def clean(scenes):
    rng = np.random.default_rng(0)
    return np.stack([world.render(scene, rng) for scene in scenes])


@pytest.fixture(scope="module")
def score():
    compiled = jax.jit(judge.judge)
    return lambda images, captions: jax.device_get(compiled(np.asarray(images, np.float32), judge.question(captions)))


def captions(scenes):
    return [scene.caption for scene in scenes]


def test_clean_drawings_score_high(scenes, clean, score):
    scores = score(clean, captions(scenes))["score"]
    assert scores.mean() > 0.93
    assert scores.min() > 0.75
    assert scores.max() <= 1


@pytest.mark.parametrize("fault", world.FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_every_fault_of_web_data_lowers_the_score_of_nearly_every_image(fault, scenes, clean, score):
    rng = np.random.default_rng(0)
    faulty = np.stack([np.clip(fault(image, rng), 0, 1) for image in clean])
    better = score(clean, captions(scenes))["score"] > score(faulty, captions(scenes))["score"]
    assert better.mean() > 0.95


WRONG = {
    "colour": lambda scene, thing: thing._replace(colour=other(world.COLOURS, [o.colour for o in scene.objects])),
    "shape": lambda scene, thing: thing._replace(shape=other(world.SHAPES, [thing.shape])),
    "size": lambda scene, thing: thing._replace(size=other(world.SIZES, [thing.size])),
}


def other(choices, taken):
    return next(choice for choice in choices if choice not in taken)


@pytest.mark.parametrize("attribute", WRONG)
def test_an_object_with_a_wrong_attribute_lowers_faithfulness(attribute, scenes, clean, score):
    wrong = [
        scene._replace(objects=(WRONG[attribute](scene, scene.objects[0]), *scene.objects[1:])) for scene in scenes
    ]
    images = np.stack([world.render(scene) for scene in wrong])
    right, wrong = score(clean, captions(scenes))["faithfulness"], score(images, captions(scenes))["faithfulness"]
    assert (right - wrong > 0.1).mean() > 0.95


def test_the_opposite_place_and_another_background_lower_faithfulness(scenes, clean, score):
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    related = [i for i, scene in enumerate(scenes) if scene.place in mirrored]
    swapped = np.stack([world.render(scenes[i]._replace(place=mirrored[scenes[i].place])) for i in related])
    asked = captions([scenes[i] for i in related])
    right = score(clean[related], asked)["faithfulness"]
    assert (right - score(swapped, asked)["faithfulness"] > 0.2).all()

    backgrounds = [scene._replace(background=other(world.BACKGROUNDS, [scene.background])) for scene in scenes]
    images = np.stack([world.render(scene) for scene in backgrounds])
    right = score(clean, captions(scenes))["background"]
    assert (right > score(images, captions(scenes))["background"] + 0.2).mean() > 0.95


def test_the_score_rises_along_its_gradient(scenes, clean, score):
    # Gradient guidance by the judge needs a gradient that is finite and points the right way.
    rng = np.random.default_rng(0)
    images = np.stack([world.corrupt(image, rng) for image in clean[:16]])
    asked = judge.question(captions(scenes[:16]))
    gradient = np.asarray(jax.jit(jax.grad(lambda x: judge.score(x, asked).sum()))(images))
    assert np.isfinite(gradient).all()
    length = np.sqrt(np.square(gradient).sum((1, 2, 3), keepdims=True))
    moved = images + 0.05 * gradient / length
    gained = score(moved, captions(scenes[:16]))["score"] - score(images, captions(scenes[:16]))["score"]
    assert (gained > 0).all()


@pytest.mark.parametrize("image", ["noise", "black", "white"])
def test_images_of_nothing_are_finite_and_score_low(image, scenes, score):
    images = {
        "noise": np.random.default_rng(0).random((COUNT, 64, 64, 3)),
        "black": np.zeros((COUNT, 64, 64, 3)),
        "white": np.ones((COUNT, 64, 64, 3)),
    }[image]
    scores = score(images, captions(scenes))["score"]
    assert np.isfinite(scores).all()
    assert scores.mean() < 0.3
