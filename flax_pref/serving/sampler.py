"""Exported samplers: a folder with programs, weights and tokenizers, loaded without the code of the networks.

    sampler = load_sampler("runs/exported")
    images = sampler(["a lighthouse in a storm"], [0], seed=0)

`serving/export.py` writes such folders. Nothing here traces a network; the program is compiled for the device that it
runs on, or comes from JAX's compilation cache.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from safetensors import safe_open

from flax_pref.checkpoints.tokenizer import CLIPTokenizer, load_tokenizer
from flax_pref.diffusion.guidance import Strength, Table, tabulate
from flax_pref.diffusion.rules import named_rule
from flax_pref.diffusion.sampler import image_keys
from flax_pref.files import read_json
from flax_pref.programs import command

FORMAT = 4
DESCRIPTION, WEIGHTS = "sampler.json", "weights.safetensors"
# Of the description, what loading and calling ask for.
EXPECTED = {
    **{"rule": dict, "layout": str, "steps": int, "batch_size": int, "tokenizers": list, "platforms": list},
    **{"jax_version": str, "calling_convention_version": int, "sha256": dict},
}
# JAX's name of a platform and that of its programs.
PLATFORMS = {"cpu": "cpu", "tpu": "tpu", "gpu": "cuda"}


@dataclasses.dataclass(frozen=True)
class ExportedSampler:
    """A sampler of one checkpoint, rule, solver, size and batch size, on one device.

    Attributes:
        program: compiled, `(weights, inputs) -> images`.
        weights: its first argument, on the device.
        tokenizers: of the text encoders; `tokenizers[0].cut(prompts)` is what of prompts is too long to be seen.
        description: what `sampler.json` says.
    """

    program: jax.stages.Compiled
    weights: Mapping[str, jax.Array]
    tokenizers: tuple[CLIPTokenizer, ...]
    description: Mapping[str, Any]

    def __call__(
        self,
        prompts: str | Sequence[str],
        prompt_ids: Sequence[int] | None = None,
        *,
        seed: int | Sequence[int] = 0,
        negative_prompts: Sequence[str | None] | None = None,
        w: Strength | str | None = None,
        guidance_scale: Strength | str | None = None,
    ) -> np.ndarray:
        """Draws one image per prompt, in batches of the program's size.

        Args:
            prompts: N texts, or a single one.
            prompt_ids: N numbers (default: 0 to N - 1); the noise of an image is a function of its id and its seed
                alone.
            seed: one for all images, or N of them.
            negative_prompts: N texts; None, for all or for one: what the checkpoint means by no prompt.
            w: strength of the modules: a number, N numbers, a schedule or its text; None: that of the export.
            guidance_scale: likewise.

        Returns:
            uint8 `[N, H, W, 3]`.

        Raises:
            ValueError: lists are not equally long, or a strength asks for other predictions than those exported.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        prompt_ids = range(len(prompts)) if prompt_ids is None else prompt_ids
        negative_prompts = [None] * len(prompts) if negative_prompts is None else negative_prompts
        seeds = np.asarray(seed)
        lists = {"prompt_ids": prompt_ids, "negative_prompts": negative_prompts, "seeds": seeds if seeds.ndim else None}
        for name, given in lists.items():
            if given is not None and len(given) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts, but {len(given)} {name}; expected one for each")
        strengths = {"w": w, "guidance_scale": guidance_scale}
        terms = self.description["rule"] | {name: given for name, given in strengths.items() if given is not None}
        table = tabulate(named_rule(**terms), self.description["steps"], len(prompts))
        if layout_of(table) != self.description["layout"]:  # the program may predict without the prompt all the same
            table = tabulate(named_rule(**terms), self.description["steps"], len(prompts), keep_unguided=True)
        if layout_of(table) != self.description["layout"]:
            asked, exported = (
                f"w={rule.get('w')} and guidance_scale={rule['guidance_scale']}"
                for rule in (terms, self.description["rule"])
            )
            raise ValueError(
                f"{asked} ask for predictions in other steps than the program makes, exported for {exported}; "
                "export a sampler with the other interval"
            )
        keys = image_keys(seed, prompt_ids)
        inputs = {
            "keys": np.asarray(jax.random.key_data(keys)),
            "ids": [tokenizer(tokenizer.spelled_out(prompts)) for tokenizer in self.tokenizers],
            "negative_ids": [
                tokenizer(tokenizer.spelled_out([text or "" for text in negative_prompts]))
                for tokenizer in self.tokenizers
            ],
            "no_negative": np.array([text is None for text in negative_prompts]),
        }
        size = self.description["batch_size"]
        images = []
        # The last batch is filled up by the first images.
        for chosen in np.resize(np.arange(len(prompts)), (-(-len(prompts) // size), size)):
            batch = jax.tree.map(lambda x, chosen=chosen: x[chosen], inputs)
            images.append(np.asarray(self.program(self.weights, batch | {"table": arrays_of(table.images(chosen))})))
        return np.concatenate(images)[: len(prompts)]


def arrays_of(table: Table) -> dict[str, np.ndarray]:
    """The arrays of a table by their names, those that are None left out."""
    names = [field.name for field in dataclasses.fields(table) if not field.metadata.get("static")]
    return {name: array for name in names if (array := getattr(table, name)) is not None}


def layout_of(table: Table) -> str:
    """SHA-256 of what of a table is fixed in a program: the predictions of each step."""
    names = [field.name for field in dataclasses.fields(table) if field.metadata.get("static")]
    return hashlib.sha256(json.dumps([getattr(table, name) for name in names]).encode()).hexdigest()


def sha256(file: Path) -> str:
    """Of a file, as hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_sampler(folder: str | Path) -> ExportedSampler:
    """Loads an exported sampler for JAX's default device, with its weights, and compiles it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the program is for other platforms or versions of JAX.

    Example:
        >>> sampler = fp.load_sampler("runs/exported")
        >>> images = sampler(["a lighthouse in a storm"])
        >>> images.shape, images.dtype.name
        ((1, 16, 16, 3), 'uint8')
    """
    folder = Path(folder)
    description = _description(folder / DESCRIPTION)
    platform = PLATFORMS.get(jax.default_backend(), jax.default_backend())
    if platform not in description["platforms"]:
        raise ValueError(
            f"{folder}: exported for {', '.join(description['platforms'])}, but JAX runs on {platform} here; export it "
            f"with --platforms {platform}"
        )
    oldest = export.minimum_supported_calling_convention_version
    newest = export.maximum_supported_calling_convention_version
    version = description["calling_convention_version"]
    versions = (
        f"exported by jax {description['jax_version']} in calling convention {version}, but jax {jax.__version__} here "
        f"reads {oldest} to {newest}; export it again with this jax, or load it with that one"
    )
    if not oldest <= version <= newest:
        raise ValueError(f"{folder}: {versions}")
    for name, expected in description["sha256"].items():
        if sha256(folder / name) != expected:
            raise ValueError(
                f"{folder / name}: damaged, for its SHA-256 is not that of the export; copy the folder again"
            )
    try:
        exported = export.deserialize(bytearray((folder / program_file(platform)).read_bytes()))
    except Exception as error:  # of no type of their own
        raise ValueError(f"{folder / program_file(platform)}: cannot be read ({error}); {versions}") from error
    (shapes, inputs), _ = jax.tree.unflatten(
        exported.in_tree, [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in exported.in_avals]
    )
    # Compiled before weights are read: both take memory of the host.
    program = jax.jit(exported.call).lower(shapes, inputs).compile()
    with safe_open(folder / WEIGHTS, framework="numpy") as tensors:
        # Float8, which safetensors does not read into numpy, is stored as bytes.
        weights = {name: jax.device_put(tensors.get_tensor(name).view(x.dtype)) for name, x in shapes.items()}
    tokenizers = tuple(load_tokenizer(folder / name) for name in description["tokenizers"])
    return ExportedSampler(program, weights, tokenizers, description)


def _description(file: Path) -> dict[str, Any]:
    """What an exported sampler says about itself, with all that is needed to load and to call it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: something is missing or of another kind, or it names a file outside of the folder.
    """
    description = read_json(file, expected=f"a sampler that {command('export')} has written")
    if description.get("format") != FORMAT:
        raise ValueError(f"{file}: format={description.get('format')!r}, this version reads {FORMAT}; export again")
    for name, kind in EXPECTED.items():
        value = description.get(name)
        if type(value) is not kind:
            found = f"{name}={value!r}"[:80] if name in description else f"no {name}"
            raise ValueError(f"{file}: {found}, expected {kind.__name__}; copy the folder again, or export again")
    for name in ("tokenizers", "platforms"):
        if not description[name] or not all(type(text) is str for text in description[name]):
            raise ValueError(f"{file}: {name}={description[name]!r}, expected names; copy the folder again")
    for name in (*description["sha256"], *description["tokenizers"]):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{file}: {name!r} is outside of the folder; copy the folder again, or export again")
    for name in (WEIGHTS, *map(program_file, description["platforms"])):
        if name not in description["sha256"]:
            raise ValueError(f"{file}: sha256 has no {name!r}; copy the folder again, or export again")
    for name in ("steps", "batch_size"):
        if description[name] < 1:
            raise ValueError(f"{file}: {name}={description[name]}, expected at least 1; copy the folder again")
    try:
        named_rule(**description["rule"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: rule={description['rule']!r} is not one ({error}); copy the folder again") from error
    return description


def program_file(platform: str) -> str:
    """The file of a platform's program."""
    return f"{platform}.stablehlo"
