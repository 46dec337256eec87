"""LPIPS as its users have it: a network of torchvision beside its authors' layers, or a state dict with both."""

from pathlib import Path

import jax.numpy as jnp

from flax_pref.checkpoints.weights import Component, fill, read_shapes
from flax_pref.models.lpips import LPIPS, TRUNKS, LPIPSConfig
from flax_pref.models.network import Network

# Names of the trunks' files of torchvision begin so; those of the layers are the keys.
TRUNK_FILES = {"alex": "alexnet", "vgg": "vgg16"}
EXPECTED = (
    "expected a folder with alex.pth of LPIPS (v0.1) and alexnet-owt-7be5be79.pth of torchvision, or vgg.pth and "
    "vgg16-397923af.pth, or a file with the state dict of lpips.LPIPS"
)
SUFFIXES = (".pth", ".pt", ".safetensors")
# Of torchvision's classes, constants, and the layers under a second name that the state dict has.
IGNORED = r"^(classifier|scaling_layer|lins)\."


def load_lpips(path: str | Path | None, *, dtype=jnp.float32) -> Network:
    """Reads a network and its layers; its module is `models.lpips.LPIPS`.

    Args:
        path: folder that holds `alex.pth` or `vgg.pth` of the authors and the weights of AlexNet or VGG-16 of
            torchvision, or a file with the state dict of both. There is no default.
        dtype: what the network computes in and keeps its weights in; distances are float32.

    Raises:
        FileNotFoundError: there is nothing at this path, or a file is missing.
        ValueError: a weight is missing, too many, of another shape or not finite, or a file is damaged.
    """
    if path is None:
        raise FileNotFoundError(f"LPIPS needs the path of its weights; {EXPECTED}")
    place = Path(path).expanduser()
    files = [place] if place.is_file() else _files_in(place)
    shapes = {name: (shape, file) for file in files for name, shape in read_shapes(file).items()}
    try:
        config, names = _config({name: shape for name, (shape, _) in shapes.items()})
        component = Component(
            config=LPIPSConfig,
            module=LPIPS,
            library=lambda config: ("lpips", "LPIPS"),
            stem="lpips",
            old_names=names,
            ignored=IGNORED,
            described_by="the rest of the file",
        )
        network = component.abstract(config, dtype)
    except ValueError as error:
        raise ValueError(f"{place}: {error}; {EXPECTED}") from error
    fill(network.params, component, {name: file for name, (_, file) in shapes.items()}, place)
    return network


def _files_in(folder: Path) -> list[Path]:
    """The layers and the network of a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such file or folder; {EXPECTED}")
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())
    found = []
    for kind, begin in TRUNK_FILES.items():
        layers = [file for file in files if file.stem == kind]
        trunks = [file for file in files if file.name.startswith(begin)]
        if len(layers) == len(trunks) == 1:
            found.append([*layers, *trunks])
    if len(found) != 1:
        told = ", ".join(file.name for file in files) or "nothing"
        what = "two networks" if found else "no network with its layers"
        raise FileNotFoundError(f"{folder}: {what} among {told}; {EXPECTED}")
    return found[0]


def _config(shapes: dict[str, tuple[int, ...]]) -> tuple[LPIPSConfig, tuple[tuple[str, str], ...]]:
    """Sizes from the shapes of weights, and how stored names become ours."""

    def shape(place: int) -> tuple[int, ...]:
        for slice_ in ("features", *(f"net.slice{i}" for i in range(1, 6))):
            if len(found := shapes.get(f"{slice_}.{place}.weight", ())) == 4:
                return found
        raise ValueError(f"no weight 'features.{place}.weight' with 4 axes")

    kernel = shape(0)[2]
    kind = next((kind for kind, trunk in TRUNKS.items() if trunk.convolutions[0][0] == kernel), None)
    if kind is None:
        raise ValueError(f"a first convolution of {kernel} x {kernel} pixels is of no network that LPIPS has")
    places = TRUNKS[kind].places
    names = [(rf"^(features|net\.slice\d)\.{place}\.", f"convs.{i}.") for i, place in enumerate(places)]
    names.append((r"^lin(\d)\.model\.1\.", r"lins.\1."))
    return LPIPSConfig(trunk=kind, channels=tuple(shape(place)[0] for place in places)), tuple(names)
