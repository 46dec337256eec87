"""Where a checkpoint lies: a folder as it is, the one in this package, or a repository of the Hub, downloaded once."""

import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
DEMO = "demo"  # the small base model of the demo world


def find_checkpoint(path_or_id: str | Path, *, variant: str | None = None) -> Path:
    """The folder of a checkpoint.

    Args:
        path_or_id: a local path, or the id of a repository on the Hub such as
            "stable-diffusion-v1-5/stable-diffusion-v1-5", of which the parts that are needed are downloaded into the
            Hub's cache; or the text "demo", the small one of this package (a folder of that name is "./demo" or a
            `Path`). What exists locally is never looked for on the Hub.
        variant: of the weight files, e.g. "fp16"; None for the full ones.

    Raises:
        FileNotFoundError: it is neither, or it can be neither reached nor found in the cache.
    """
    if path_or_id == DEMO:
        return Path(str(resources.files("flax_pref.world") / "base"))
    settings = ["model_index.json", "*/*.json", "tokenizer*/merges.txt"]
    stems = ("diffusion_pytorch_model", "model")
    folder = find_files(path_or_id, settings + _weights(COMPONENTS, stems, variant, "safetensors"))
    if lacking := [part for part in COMPONENTS if _lacks_weights(folder / part)]:
        # Only where there is nothing else: the same weights again, in the order of gigabytes.
        stems = ("diffusion_pytorch_model", "pytorch_model")
        folder = find_files(path_or_id, settings + _weights(lacking, stems, variant, "bin"))
    return folder


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
    return find_checkpoint(DEMO) if path_or_id == DEMO else find_files(path_or_id, ["model_index.json", "*/*.json"])


def find_files(path_or_id: str | Path, patterns: Sequence[str]) -> Path:
    """The path, where there is something, else the folder of those files of a Hub repository that match the patterns.

    Raises:
        FileNotFoundError: it is neither, or it can be neither reached nor found in the cache.
    """
    path, name = Path(path_or_id).expanduser(), str(path_or_id)
    if path.exists():
        return path
    if not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{name}: no such file or folder, and not the id of a Hub repository (owner/name)")
    return _downloaded(name, lambda: snapshot_download(name, allow_patterns=list(patterns)))


def find_file(repository: str, name: str) -> Path:
    """A file of a Hub repository, downloaded once.

    Raises:
        FileNotFoundError: it can be neither reached nor found in the cache.
    """
    return _downloaded(f"{repository}/{name}", lambda: hf_hub_download(repository, name))


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
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError) as error:
        # The Hub answers so for private repositories too.
        raise FileNotFoundError(
            f"{nowhere}, and nothing of this name on the Hub, or it needs a login (hf auth login)"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(unreachable) from error
