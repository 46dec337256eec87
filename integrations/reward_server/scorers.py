"""Judges by the packages of their authors, each behind one call: RGB images and prompts to numbers.

Their packages are imported when a judge is asked for, so that each can have an environment of its own.
"""

import argparse
import ast
import importlib
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from batching import Scorer
from PIL import Image

Images, Prompts, Scores = Sequence[Image.Image], Sequence[str], Sequence[float | None]
FOLDER = Path(__file__).parent


def needed(module: str, scorer: str) -> ModuleType:
    """A module of a scorer's package.

    Raises:
        ValueError: it cannot be imported; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{module} cannot be imported ({error}); install it: python -m pip install -r "
            f"{FOLDER / f'requirements-{scorer}.txt'}"
        ) from error


class HPSv3:
    """HPSv3 (arXiv:2508.03789) by the package `hpsv3`: the mean mu that it predicts of people's preference."""

    name = "hpsv3"
    packages = ("hpsv3", "torch", "transformers")

    def __init__(self, given: argparse.Namespace):
        self._torch = needed("torch", self.name)
        inferencer = needed("hpsv3", self.name).HPSv3RewardInferencer
        self._judge = inferencer(checkpoint_path=given.model, device=given.device)

    def __call__(self, images: Images, prompts: Prompts) -> Scores:
        """See `batching.Scorer`."""
        with self._torch.inference_mode():
            # By name: releases differ in the order. A path may be an image too.
            found = self._judge.reward(image_paths=list(images), prompts=list(prompts))
        return [float(mu_and_sigma[0]) for mu_and_sigma in found]


class VQAScore:
    """VQAScore (arXiv:2404.01291) by the package `t2v_metrics`: P("Yes") to whether the image shows the prompt."""

    name = "vqascore"
    packages = ("t2v-metrics", "torch", "transformers")

    def __init__(self, given: argparse.Namespace):
        package = needed("t2v_metrics", self.name)
        self._score = package.VQAScore(model=given.model or "clip-flant5-xxl", device=given.device)

    def __call__(self, images: Images, prompts: Prompts) -> Scores:
        """See `batching.Scorer`."""
        with tempfile.TemporaryDirectory(prefix="vqascore") as folder:  # the package reads files
            paths = [str(Path(folder) / f"{place}.png") for place in range(len(images))]
            for image, path in zip(images, paths, strict=True):
                image.save(path, compress_level=1)
            # The model inside scores pairs; the score around it every image for every prompt.
            return [float(score) for score in self._score.model.forward(paths, list(prompts))]


class UnifiedReward:
    """UnifiedReward (arXiv:2503.05236), a Qwen2.5-VL that is asked for a score from 1 to 5.

    The question that it was trained on is read from the authors' script of point scores, in a clone of their
    repository. Answers are the likeliest ones, without chance.
    """

    name = "unifiedreward"
    packages = ("qwen-vl-utils", "torch", "transformers")
    SCRIPT = "inference_qwen/image_generation/qwen_point_score_image_generation.py"
    LENGTH = 512  # most tokens of an answer, as in the script

    def __init__(self, given: argparse.Namespace):
        if given.repository is None:
            raise ValueError(
                "no --repository; expected a clone: git clone https://github.com/CodeGoat24/UnifiedReward, then "
                "--repository UnifiedReward"
            )
        self._question = question_of(Path(given.repository) / self.SCRIPT)
        self._torch, transformers = needed("torch", self.name), needed("transformers", self.name)
        self._vision = needed("qwen_vl_utils", self.name).process_vision_info
        model = given.model or "CodeGoat24/UnifiedReward-qwen-7b"
        network = transformers.Qwen2_5_VLForConditionalGeneration
        self._network = network.from_pretrained(model, torch_dtype="auto", device_map={"": given.device}).eval()
        self._processor = transformers.AutoProcessor.from_pretrained(model)
        self._processor.tokenizer.padding_side = "left"  # answers begin where questions end

    def __call__(self, images: Images, prompts: Prompts) -> Scores:
        """See `batching.Scorer`."""
        chats = []
        for image, prompt in zip(images, prompts, strict=True):
            question = {"type": "text", "text": self._question(prompt)}
            chats.append([{"role": "user", "content": [{"type": "image", "image": image}, question]}])
        texts = [
            self._processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
        ]
        seen, _ = self._vision(chats)
        inputs = self._processor(text=texts, images=seen, padding=True, return_tensors="pt").to(self._network.device)
        with self._torch.inference_mode():
            tokens = self._network.generate(**inputs, max_new_tokens=self.LENGTH, do_sample=False)
        answers = self._processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [final_score(answer) for answer in answers]


def question_of(script: Path) -> Callable[[str], str]:
    """The question of a script: its f-string that has a place for `prompt`, as a function of the prompt.

    The script is parsed and not run.

    Raises:
        ValueError: it cannot be read, or has not one such string.
    """
    try:
        tree = ast.parse(script.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{script}: cannot be read ({error}); expected a clone of the authors' repository") from error
    found = []
    for node in ast.walk(tree):
        parts = node.values if isinstance(node, ast.JoinedStr) else []
        texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
        names = [part.value.id for part in parts if isinstance(part, ast.FormattedValue) and _is_name(part.value)]
        if names == ["prompt"] and texts.count(None) == 1:
            found.append(texts)
    if len(found) != 1:
        raise ValueError(f"{script}: {len(found)} questions with a place for the prompt; expected one")
    return lambda prompt: "".join(prompt if text is None else str(text) for text in found[0])


def _is_name(node: Any) -> bool:
    return isinstance(node, ast.Name)


def final_score(answer: str) -> float | None:
    """The number behind the last "Final Score:" of an answer; None where there is none from 1 to 5."""
    found = re.findall(r"Final Score:[\s*]*(\d+(?:\.\d+)?)", answer)
    score = float(found[-1]) if found else 0.0
    return score if 1 <= score <= 5 else None


class Mock:
    """For tests: 10 times the mean of an image, plus a hundredth for each letter of the prompt."""

    name = "mock"
    packages = ()

    def __init__(self, given: argparse.Namespace):
        self._seconds = given.mock_seconds or 0.0

    def __call__(self, images: Images, prompts: Prompts) -> Scores:
        """See `batching.Scorer`."""
        time.sleep(self._seconds)
        return [mean_of(image) / 25.5 + len(prompt) / 100 for image, prompt in zip(images, prompts, strict=True)]


def mean_of(image: Image.Image) -> float:
    """Mean of all values of an image, 0 to 255."""
    counts = image.histogram()
    return sum((place % 256) * count for place, count in enumerate(counts)) / sum(counts)


class Function:
    """A function of images and prompts, `python:MODULE:FUNCTION`."""

    packages = ()

    def __init__(self, path: str):
        module, _, attribute = path.removeprefix("python:").partition(":")
        self.name = path
        try:
            self._function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"cannot be imported ({error}); expected a module in PYTHONPATH and its function"
            ) from error

    def __call__(self, images: Images, prompts: Prompts) -> Scores:
        """See `batching.Scorer`."""
        return self._function(images, prompts)


SCORERS: dict[str, Callable[[argparse.Namespace], Scorer]] = {
    scorer.name: scorer for scorer in (HPSv3, VQAScore, UnifiedReward, Mock)
}


def load_scorer(name: str, given: argparse.Namespace) -> Scorer:
    """The scorer of a name, or a function of one's own.

    Raises:
        ValueError: it is not known, or something that it needs is missing.
    """
    if name.startswith("python:"):
        return Function(name)
    if name not in SCORERS:
        raise ValueError(f"not known; expected {', '.join(SCORERS)} or python:MODULE:FUNCTION")
    return SCORERS[name](given)
