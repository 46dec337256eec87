import itertools

import numpy as np
import pytest

from flax_pref.world import scenes as world


def some_scenes(split="train", count=200, seed=0):
    return list(itertools.islice(world.scenes(split, seed), count))


@pytest.mark.parametrize("split", ["train", "validation", "held_out"])
def test_captions_read_back_to_the_scene_they_were_written_for(split):
    for scene in some_scenes(split):
        assert world.parse(scene.caption) == scene


@pytest.mark.parametrize("caption", ["", "a photo of a cat", "a small red circle, white background", "a small red"])
def test_a_caption_of_another_world_is_refused_with_an_example(caption):
    with pytest.raises(ValueError, match="a small red circle above a large blue square, white background"):
        world.parse(caption)


def test_no_training_or_validation_caption_names_a_held_out_combination():
    for split in ("train", "validation"):
        for scene in some_scenes(split, 500):
            assert not any((thing.colour, thing.shape) in world.HELD_OUT for thing in scene.objects)
    for scene in some_scenes("held_out"):
        assert any((thing.colour, thing.shape) in world.HELD_OUT for thing in scene.objects)


def test_no_training_image_is_captioned_with_a_held_out_combination():
    rng = np.random.default_rng(0)
    for _ in range(200):
        image, caption = world.training_example(rng)
        assert world.parse(caption).split == "train"
        assert image.shape == (64, 64, 3) and image.dtype == np.float32
        assert image.min() >= 0 and image.max() <= 1


def test_training_and_validation_prompts_are_disjoint():
    train, validation = ({scene.caption for scene in some_scenes(split, 400)} for split in ("train", "validation"))
    assert len(train) == len(validation) == 400
    assert not train & validation


@pytest.mark.parametrize(
    ("split", "caption"),
    [
        ("train", "a large yellow square right of a large purple circle, pink background"),
        ("validation", "a large orange cross in the middle, grey background"),
        ("held_out", "a large yellow circle left of a large orange circle, pink background"),
    ],
)
def test_prompt_number_0_is_the_same_on_every_machine(split, caption):
    # Reports of different machines are compared prompt by prompt.
    assert some_scenes(split, 1)[0].caption == caption
    assert world.parse(caption).split == split


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("size", world.SIZES)
def test_all_shapes_of_a_size_have_the_same_area(shape, size):
    # Otherwise a judge of sizes would depend on the shape.
    y, x = np.mgrid[-32:32, -32:32] + 0.5
    area = world.coverage(shape, world.SIZES[size], x, y).sum()
    assert area == pytest.approx(np.pi * world.SIZES[size] ** 2, rel=0.02)
