"""Where a checkpoint lies: a folder as it is, the one in this package, or a repository of the Hub, downloaded once.

`owner/name@revision` is a repository at a branch, a tag or a commit. A repository that `flax-pref push` has written
holds flax_pref.json, the record of what it is.
"""

import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# Of the HTTP library that this version of huggingface_hub uses.
from huggingface_hub.errors import HTTPError as _HTTPError  # pyright: ignore[reportPrivateImportUsage]

from flax_pref.files import read_json

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
UNREACHABLE = (_HTTPError, ConnectionError)  # errors of requests to the Hub
RECORD = "flax_pref.json"  # of a repository that push has written: kind, base, modules and more
INDEX = "model_index.json"  # of a whole checkpoint
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
DEMO = "demo"  # the small base model of the demo world


def find_checkpoint(path_or_id: str | Path, *, variant: str | None = None) -> Path:
    """The folder of a checkpoint.

    Args:
        path_or_id: a local path, or the id of a repository on the Hub such as
            "stable-diffusion-v1-5/stable-diffusion-v1-5", perhaps with "@" and a revision, of which the parts that are
            needed are downloaded into the Hub's cache; or the text "demo", the small one of this package (a folder of
            that name is "./demo" or a `Path`). What exists locally is never looked for on the Hub. A repository of
            modules, as `flax-pref push` writes it, leads to the checkpoint that they were trained on.
        variant: of the weight files, e.g. "fp16"; None for the full ones.

    Raises:
        FileNotFoundError: it is neither, or it can be neither reached nor found in the cache.
    """
    if path_or_id == DEMO:
        return Path(str(resources.files("flax_pref.world") / "base"))
    settings = [INDEX, RECORD, "*/*.json", "tokenizer*/merges.txt"]
    stems = ("diffusion_pytorch_model", "model")
    found = find_files(path_or_id, settings + _weights(COMPONENTS, stems, variant, "safetensors"))
    if (base := _base_of(found)) is not None:
        return find_checkpoint(base, variant=variant)
    if lacking := [part for part in COMPONENTS if _lacks_weights(found / part)]:
        # Only where there is nothing else: the same weights again, in the order of gigabytes.
        stems = ("diffusion_pytorch_model", "pytorch_model")
        found = find_files(path_or_id, settings + _weights(lacking, stems, variant, "bin"))
    return found


def _weights(parts: Sequence[str], stems: Sequence[str], variant: str | None, kind: str) -> list[str]:
    """Patterns of the weight files of these parts."""
    suffix = f".{variant}" if variant else ""
    return [
        f"{part}/{stem}{ending}.{kind}"
        for part in parts
        for stem in stems
        # Shards have been named in both ways.
        for ending in (suffix, f"{suffix}-*-of-*", f"-*-of-*{suffix}")
    ]


def _lacks_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not list(folder.glob("*.safetensors"))


def find_description(path_or_id: str | Path) -> Path:
    """The folder of a checkpoint, of which a Hub repository need hold no weights; see `find_checkpoint`."""
    if path_or_id == DEMO:
        return find_checkpoint(DEMO)
    found = find_files(path_or_id, [INDEX, RECORD, "*/*.json"])
    base = _base_of(found)
    return found if base is None else find_description(base)


def _base_of(folder: Path) -> str | None:
    """The checkpoint that the modules in a folder were trained on; None: the folder is no record of such.

    Raises:
        FileNotFoundError: its record does not name one that others have.
    """
    if not (record := read_record(folder)).get("modules") or (folder / "unet").is_dir():
        return None
    if (base := record.get("base")) is None or (base != DEMO and not HUB_ID.fullmatch(base.partition("@")[0])):
        raise FileNotFoundError(
            f"{folder}: holds modules and no checkpoint, and {RECORD} names no base that others have; give the "
            "checkpoint that they guide with --model, and these modules with --module"
        )
    return base


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a folder or repository that `flax-pref push` has written; empty where there is none."""
    file = folder / RECORD
    return read_json(file, expected="the record of a pushed repository") if file.is_file() else {}


def find_files(path_or_id: str | Path, patterns: Sequence[str]) -> Path:
    """The path, where there is something, else the folder of those files of a Hub repository that match the patterns.

    Args:
        path_or_id: a local path, `owner/name` or `owner/name@revision`.
        patterns: of the files to download.

    Raises:
        FileNotFoundError: it is neither, or it can be neither reached nor found in the cache.
    """
    path, name = Path(path_or_id).expanduser(), str(path_or_id)
    if path.exists():
        return path
    repository, at, revision = name.partition("@")
    if not HUB_ID.fullmatch(repository) or bool(at) != bool(revision):
        raise FileNotFoundError(
            f"{name}: no such file or folder, and not the id of a Hub repository (owner/name or owner/name@revision)"
        )
    options = {"revision": revision or None, "allow_patterns": list(patterns)}
    return _downloaded(name, lambda: snapshot_download(repository, **options))


def find_file(repository: str, name: str) -> Path:
    """A file of a Hub repository, downloaded once.

    Raises:
        FileNotFoundError: it can be neither reached nor found in the cache.
    """
    return _downloaded(f"{repository}/{name}", lambda: hf_hub_download(repository, name))


def find_weights(path_or_id: str | Path, name: str, *, expected: str) -> Path:
    """A file of weights: the path, the file of this name in a folder, or that of a Hub repository.

    Args:
        path_or_id: the file, a folder, or `owner/name`. What exists locally is never looked for on the Hub.
        name: of the file in a folder or repository.
        expected: ends the message where there is none.

    Raises:
        FileNotFoundError: it is none of these, or it can be neither reached nor found in the cache.
    """
    path = Path(path_or_id).expanduser()
    file = path / name if path.is_dir() else path
    if file.is_file():
        return file
    if path.exists() or not HUB_ID.fullmatch(str(path_or_id)):
        raise FileNotFoundError(f"{file}: no such file; {expected}")
    return find_file(str(path_or_id), name)


def _downloaded(name: str, download: Callable[[], str]) -> Path:
    nowhere = f"{name}: no such file or folder"
    unreachable = (
        f"{nowhere}, the Hub cannot be reached, and its cache does not hold it; connect to the network, or give the "
        "path of what has been downloaded"
    )
    try:
        return Path(download())
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(unreachable) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{nowhere}, and its repository on the Hub has no such revision; expected a branch, a tag or a commit of it"
        ) from error
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError) as error:
        # The Hub answers so for private repositories too.
        raise FileNotFoundError(
            f"{nowhere}, and nothing of this name on the Hub, or it needs a login (hf auth login)"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(unreachable) from error
