"""The weights of FID's Inception: the `.pth` files of pytorch-fid and torch-fidelity, and clean-fid's TorchScript."""

from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from flax_pref.checkpoints.torch_files import is_torchscript, read_torch_module
from flax_pref.checkpoints.weights import Component, Tensors, TorchTensors, fill, open_tensors
from flax_pref.models.inception import UNIT, InceptionConfig, InceptionV3
from flax_pref.models.network import Network

EXPECTED = (
    "expected pt_inception-2015-12-05-6726825d.pth of pytorch-fid, weights-inception-2015-12-05-6726825d.pth of "
    "torch-fidelity, or inception-2015-12-05.pt of clean-fid"
)
CLASSES = 1008  # of TensorFlow's graph; torchvision's network has 1000
FIRST = "Conv2d_1a_3x3.conv.weight"

# Names of TensorFlow's graph, which the TorchScript program keeps, into those of the .pth files, block by block.
STEM = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
_A = {
    **{"conv": "branch1x1", "tower.conv": "branch5x5_1", "tower.conv_1": "branch5x5_2"},
    **{"tower_1.conv": "branch3x3dbl_1", "tower_1.conv_1": "branch3x3dbl_2", "tower_1.conv_2": "branch3x3dbl_3"},
    "tower_2.conv": "branch_pool",
}
_B = {
    **{"conv": "branch3x3", "tower.conv": "branch3x3dbl_1", "tower.conv_1": "branch3x3dbl_2"},
    "tower.conv_2": "branch3x3dbl_3",
}
_C = {
    **{"conv": "branch1x1", "tower.conv": "branch7x7_1", "tower.conv_1": "branch7x7_2", "tower.conv_2": "branch7x7_3"},
    **{"tower_1.conv": "branch7x7dbl_1", **{f"tower_1.conv_{i}": f"branch7x7dbl_{i + 1}" for i in range(1, 5)}},
    "tower_2.conv": "branch_pool",
}
_D = {
    **{"tower.conv": "branch3x3_1", "tower.conv_1": "branch3x3_2"},
    **{"tower_1.conv": "branch7x7x3_1", **{f"tower_1.conv_{i}": f"branch7x7x3_{i + 1}" for i in range(1, 4)}},
}
_E = {
    **{"conv": "branch1x1", "tower_conv": "branch3x3_1"},
    **{"tower_mixed_conv": "branch3x3_2a", "tower_mixed_conv_1": "branch3x3_2b"},
    **{"tower_1_conv": "branch3x3dbl_1", "tower_1_conv_1": "branch3x3dbl_2"},
    **{"tower_1_mixed_conv": "branch3x3dbl_3a", "tower_1_mixed_conv_1": "branch3x3dbl_3b"},
    "tower_2_conv": "branch_pool",
}
GRAPH = {f"layers.conv{f'_{i}' if i else ''}": f"Conv2d_{name}" for i, name in enumerate(STEM)} | {
    f"layers.mixed{f'_{i}' if i else ''}.{theirs}": f"Mixed_{name}.{ours}"
    for i, (name, branches) in enumerate(zip(BLOCKS, (_A, _A, _A, _B, _C, _C, _C, _C, _D, _E, _E), strict=True))
    for theirs, ours in branches.items()
}
GRAPH_PARTS = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}

INCEPTION = Component(
    config=InceptionConfig,
    module=InceptionV3,
    library=lambda config: ("torch_fidelity", "FeatureExtractorInceptionV3"),
    stem="weights-inception-2015-12-05-6726825d",
    # The layer of classes, and a counter of training.
    ignored=r"^fc\.|\.num_batches_tracked$",
    described_by="the rest of the file",
)


class GraphTensors(TorchTensors):
    """`Tensors` of the TorchScript program under the names of the `.pth` files.

    Its normalisations have no scale; what is not of the network keeps its name.
    """

    def __init__(self, file: Path, tensors: Any):
        super().__init__(file, tensors)
        self._names = {_name_of(name): name for name in self._tensors}
        convolutions = [name for name in self._names if name.endswith(".conv.weight")]
        self._scales = {name.replace(".conv.weight", ".bn.weight"): name for name in convolutions}

    def __enter__(self) -> Self:
        return self

    def keys(self) -> list[str]:
        """The names of the weights."""
        return [*self._names, *self._scales]

    def get_tensor(self, name: str) -> np.ndarray:
        """The weight of this name."""
        if name in self._scales:
            return np.ones(self.get_slice(self._scales[name]).get_shape()[0], np.float32)
        return super().get_tensor(self._names[name])

    def get_slice(self, name: str) -> Any:
        """The weight of this name, not read yet."""
        return super().get_slice(self._names[name])


def _name_of(name: str) -> str:
    layer, _, part = name.rpartition(".")
    if layer == "output":
        return f"fc.{part}"
    return f"{GRAPH[layer]}.{GRAPH_PARTS[part]}" if layer in GRAPH and part in GRAPH_PARTS else name


def load_inception(path: str | Path | None, *, dtype=jnp.float32) -> Network:
    """Reads the network; its module is `models.inception.InceptionV3`.

    Args:
        path: a `.pth` file of pytorch-fid or torch-fidelity, a safetensors file with the same names, or the TorchScript
            program `inception-2015-12-05.pt` of clean-fid, of which only the weights are read. There is no default.
        dtype: what it computes in and keeps its weights in.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a weight is missing, too many, of another shape or not finite, or the file is damaged or of another
            Inception.
    """
    if path is None:
        raise FileNotFoundError(f"Inception needs the path of its weights; {EXPECTED}")
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; {EXPECTED}")
    with _open(file) as tensors:
        names = list(tensors.keys())
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in (FIRST, "fc.weight") if name in names}
    if len(first := shapes.get(FIRST, ())) != 4 or first[0] % 2 or not 2 <= first[0] <= 2 * UNIT:
        raise ValueError(f"{file}: no weight {FIRST!r} of this network; {EXPECTED}")
    if shapes.get("fc.weight", (CLASSES,))[0] != CLASSES:
        raise ValueError(
            f"{file}: weight 'fc.weight' is of {shapes['fc.weight'][0]} classes, as torchvision's Inception, and not "
            f"of the {CLASSES} of FID's; {EXPECTED}"
        )
    network = INCEPTION.abstract(InceptionConfig(unit=first[0] // 2), dtype)
    fill(network.params, INCEPTION, dict.fromkeys(names, file), file, open_file=_open)
    return network


def _open(file: Path) -> Tensors:
    if is_torchscript(file):
        return GraphTensors(file, read_torch_module(file))
    return open_tensors(file)
