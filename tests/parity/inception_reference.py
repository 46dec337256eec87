"""FID's Inception transcribed into torch functions of the weights under the names of its file, and random weights.

A block is its branches, each a chain of convolutions; "avg" and "max" are poolings, a tuple two ends of one chain.
"""

import math
import warnings

import torch
import torch.nn.functional as F

from flax_pref.checkpoints.inception_files import GRAPH, GRAPH_PARTS

# (name, channels, kernel, stride) of each convolution; padded where the stride is 1.
_A = {
    "branch1x1": [("branch1x1", 64, (1, 1), 1)],
    "branch5x5": [("branch5x5_1", 48, (1, 1), 1), ("branch5x5_2", 64, (5, 5), 1)],
    "branch3x3dbl": [
        *(("branch3x3dbl_1", 64, (1, 1), 1), ("branch3x3dbl_2", 96, (3, 3), 1)),
        ("branch3x3dbl_3", 96, (3, 3), 1),
    ],
    "branch_pool": ["avg", ("branch_pool", None, (1, 1), 1)],
}
_B = {
    "branch3x3": [("branch3x3", 384, (3, 3), 2)],
    "branch3x3dbl": [
        *(("branch3x3dbl_1", 64, (1, 1), 1), ("branch3x3dbl_2", 96, (3, 3), 1)),
        ("branch3x3dbl_3", 96, (3, 3), 2),
    ],
    "pool": ["max"],
}
_D = {
    "branch3x3": [("branch3x3_1", 192, (1, 1), 1), ("branch3x3_2", 320, (3, 3), 2)],
    "branch7x7x3": [
        *(("branch7x7x3_1", 192, (1, 1), 1), ("branch7x7x3_2", 192, (1, 7), 1)),
        *(("branch7x7x3_3", 192, (7, 1), 1), ("branch7x7x3_4", 192, (3, 3), 2)),
    ],
    "pool": ["max"],
}


def _a(pool):
    return _A | {"branch_pool": ["avg", ("branch_pool", pool, (1, 1), 1)]}


def _c(between):
    sides = [(7, 1), (1, 7)]
    double = [("branch7x7dbl_1", between, (1, 1), 1)]
    double += [(f"branch7x7dbl_{i}", 192 if i == 5 else between, sides[i % 2], 1) for i in range(2, 6)]
    return {
        "branch1x1": [("branch1x1", 192, (1, 1), 1)],
        "branch7x7": [
            *(("branch7x7_1", between, (1, 1), 1), ("branch7x7_2", between, (1, 7), 1)),
            ("branch7x7_3", 192, (7, 1), 1),
        ],
        "branch7x7dbl": double,
        "branch_pool": ["avg", ("branch_pool", 192, (1, 1), 1)],
    }


def _e(pool):
    def ends(name):
        return (f"{name}a", 384, (1, 3), 1), (f"{name}b", 384, (3, 1), 1)

    return {
        "branch1x1": [("branch1x1", 320, (1, 1), 1)],
        "branch3x3": [("branch3x3_1", 384, (1, 1), 1), ends("branch3x3_2")],
        "branch3x3dbl": [
            *(("branch3x3dbl_1", 448, (1, 1), 1), ("branch3x3dbl_2", 384, (3, 3), 1)),
            ends("branch3x3dbl_3"),
        ],
        "branch_pool": [pool, ("branch_pool", 192, (1, 1), 1)],
    }


STEM = [
    *(("Conv2d_1a_3x3", 32, (3, 3), 2), ("Conv2d_2a_3x3", 32, (3, 3), 1), ("Conv2d_2b_3x3", 64, (3, 3), 1)),
    *("pool", ("Conv2d_3b_1x1", 80, (1, 1), 1), ("Conv2d_4a_3x3", 192, (3, 3), 1), "pool"),
]
BLOCKS = {
    **{"Mixed_5b": _a(32), "Mixed_5c": _a(64), "Mixed_5d": _a(64), "Mixed_6a": _B},
    **{"Mixed_6b": _c(128), "Mixed_6c": _c(160), "Mixed_6d": _c(160), "Mixed_6e": _c(192)},
    **{"Mixed_7a": _D, "Mixed_7b": _e("avg"), "Mixed_7c": _e("same max")},
}


def convolution(weights, name, x, stride, padding):
    """Without bias, normalised by stored statistics, and its positive part."""
    x = F.conv2d(x, weights[f"{name}.conv.weight"].to(x.dtype), stride=stride, padding=padding)
    mean, var, scale, bias = (
        weights[f"{name}.bn.{part}"].to(x.dtype) for part in ("running_mean", "running_var", "weight", "bias")
    )
    return F.relu(F.batch_norm(x, mean, var, scale, bias, training=False, eps=0.001))


def step(weights, block, part, x):
    if part == "avg":
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    if part == "max":
        return F.max_pool2d(x, 3, stride=2)
    if part == "same max":
        return F.max_pool2d(x, 3, stride=1, padding=1)
    name, _, (height, width), stride = part
    padding = (height // 2, width // 2) if stride == 1 else 0
    return convolution(weights, f"{block}.{name}", x, stride, padding)


def features(weights, x):
    """`[B, 3, 299, 299]` in [-1, 1] to `[B, 2048]`, or fewer in a narrow network."""
    for part in STEM:
        if part == "pool":
            x = F.max_pool2d(x, 3, stride=2)
        else:
            name, _, _, stride = part
            x = convolution(weights, name, x, stride, 1 if name == "Conv2d_2b_3x3" else 0)
    for block, branches in BLOCKS.items():
        outputs = []
        for chain in branches.values():
            y = x
            for part in chain:
                if isinstance(part[0], tuple):
                    y = torch.cat([step(weights, block, end, y) for end in part], 1)
                else:
                    y = step(weights, block, part, y)
            outputs.append(y)
        x = torch.cat(outputs, 1)
    return x.mean((2, 3))


def resized(levels):
    """TensorFlow's bilinear resizing of `[B, 3, H, W]` in levels to 299, pixel by pixel of a loop over both axes."""
    for axis in (3, 2):
        length = levels.shape[axis]
        rows = []
        for i in range(299):
            place = i * length / 299
            first = math.floor(place)
            before = levels.select(axis, first)
            after = levels.select(axis, min(first + 1, length - 1))
            rows.append(before + (after - before) * (place - first))
        levels = torch.stack(rows, axis)
    return levels


def random_weights(unit=16):
    """Of a network with `unit` sixteenths of the channels; activations keep their scale, no number is zero or one."""
    generator = torch.Generator().manual_seed(0)
    drawn = {}

    def draw(name, into, out, kernel):
        shape = (out, into, *kernel)
        drawn[f"{name}.conv.weight"] = torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))
        drawn[f"{name}.bn.weight"] = 1 + 0.1 * torch.randn(out, generator=generator)
        drawn[f"{name}.bn.bias"] = 0.1 * torch.randn(out, generator=generator)
        drawn[f"{name}.bn.running_mean"] = 0.1 * torch.randn(out, generator=generator)
        drawn[f"{name}.bn.running_var"] = 1 + 0.2 * torch.rand(out, generator=generator)
        return out

    channels = 3
    for part in STEM:
        if part != "pool":
            channels = draw(part[0], channels, part[1] * unit // 16, part[2])
    for block, branches in BLOCKS.items():
        out = 0
        for chain in branches.values():
            width = channels
            for part in chain:
                if isinstance(part[0], tuple):
                    width = sum(draw(f"{block}.{name}", width, n * unit // 16, kernel) for name, n, kernel, _ in part)
                elif not isinstance(part, str):
                    width = draw(f"{block}.{part[0]}", width, part[1] * unit // 16, part[2])
            out += width
        channels = out
    drawn["fc.weight"] = torch.randn(1008, channels, generator=generator)
    drawn["fc.bias"] = torch.randn(1008, generator=generator)
    return drawn


# ----------------------------------------------------------------------------------------------------------------------
# TorchScript


class Layer(torch.nn.Module):
    """A module of a program: its parts and nothing else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def graph_weights(weights):
    """Weights under the names of clean-fid's program, whose normalisations have no scale."""
    layers = {ours: theirs for theirs, ours in GRAPH.items()}
    parts = {ours: theirs for theirs, ours in GRAPH_PARTS.items()}
    found = {f"output.{part}": weights[f"fc.{part}"] for part in ("weight", "bias")}
    for name, value in weights.items():
        layer = ".".join(name.split(".")[:-2])
        if layer in layers and not name.endswith(".bn.weight"):
            found[f"{layers[layer]}.{parts[name.removeprefix(f'{layer}.')]}"] = value
    return found


def save_script(weights, file):
    """A program whose modules have these names."""
    root = Layer()
    for name, value in weights.items():
        module, (*path, part) = root, name.split(".")
        for step in path:
            if not hasattr(module, step):
                module.add_module(step, Layer())
            module = getattr(module, step)
        module.register_buffer(part, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(root).save(file)
