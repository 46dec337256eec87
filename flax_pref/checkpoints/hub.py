"""Where a checkpoint lies: a folder as it is, the one in this package, or a repository of the Hub, downloaded once."""

import re
from importlib import resources
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
DEMO = "demo"  # the small base model of the demo world


def find_checkpoint(path_or_id: str | Path, *, variant: str | None = None) -> Path:
    """The folder of a checkpoint.

    Args:
        path_or_id: a local path, or the id of a repository on the Hub such as
            "stable-diffusion-v1-5/stable-diffusion-v1-5", of which the parts that are needed are downloaded into the
            Hub's cache; or "demo", the small one of this package (a folder of that name is "./demo"). What exists
            locally is never looked for on the Hub.
        variant: of the weight files, e.g. "fp16"; None for the full ones.

    Raises:
        FileNotFoundError: it is neither, or it can be neither reached nor found in the cache.
    """
    name = str(path_or_id)
    if name == DEMO:
        return Path(str(resources.files("flax_pref.demo") / "base"))
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"{name}: no such folder, and not the id of a Hub repository (owner/name); expected a folder in the layout "
            "of diffusers"
        )
    suffix = f".{variant}" if variant else ""
    weights = [
        pattern
        for part in COMPONENTS
        for stem in ("diffusion_pytorch_model", "model")
        for pattern in (
            f"{part}/{stem}{suffix}.safetensors",
            # Shards have been named in both ways.
            f"{part}/{stem}{suffix}-*-of-*.safetensors",
            f"{part}/{stem}-*-of-*{suffix}.safetensors",
        )
    ]
    settings = ["model_index.json", "*/*.json", "tokenizer*/merges.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=settings + weights))
    except (RepositoryNotFoundError, HFValidationError) as error:
        # The Hub answers so for private repositories too.
        raise FileNotFoundError(
            f"{name}: no such folder, and no such repository on the Hub, or one that needs a login (hf auth login)"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name}: no such folder, the Hub cannot be reached, and its cache does not hold the repository; connect "
            "to the network, or give the path of a downloaded folder"
        ) from error
