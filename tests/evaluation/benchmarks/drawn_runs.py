"""Runs of small images of the prompts of a benchmark, for tests."""

from pathlib import Path

import numpy as np

from flax_pref.data.prompts import read_prompts
from flax_pref.images.image_set import ImageSet, Item

HERE = Path(__file__).parent


def draw(folder, prompts, layout="flat", seeds=1, size=4):
    """A finished run, and its prompts; every image has other pixels."""
    shown = read_prompts(prompts)
    items = [Item(prompt, seed) for prompt in shown for seed in range(seeds)]
    keys = [(item.prompt.id, item.seed) for item in items]
    pixels = [np.random.default_rng(key).integers(0, 256, (size, size, 3), np.uint8) for key in keys]
    images = ImageSet(folder, items, {}, layout=layout)
    images.begin()
    images.write(range(len(items)), np.stack(pixels))
    images.finish()
    return shown


def told_scores(text, name):
    """The scores that the program has printed for a benchmark, by category."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.split()[:2] == [name, "score"]:
            break
    next(lines)
    scores = {}
    for line in lines:
        words = line.replace("[", "").split()
        numbers = [place for place, word in enumerate(words) if word.replace(".", "").isdigit() and "." in word]
        if not line.startswith("  ") or not numbers:
            break
        scores[" ".join(words[: numbers[0]])] = float(words[numbers[0]])
    return scores
