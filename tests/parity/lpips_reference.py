"""LPIPS 0.1 transcribed into torch functions of the weights under the names of its files, and random weights."""

import math

import torch
import torch.nn.functional as F

# What torchvision's `features` are up to the last layer compared: (kernel, stride, padding), or the size of a pooling.
LAYERS = {
    "alex": [(11, 4, 2), "relu", 3, (5, 1, 2), "relu", 3, (3, 1, 1), "relu", (3, 1, 1), "relu", (3, 1, 1), "relu"],
    "vgg": [
        *((3, 1, 1), "relu", (3, 1, 1), "relu", 2, (3, 1, 1), "relu", (3, 1, 1), "relu", 2),
        *((3, 1, 1), "relu", (3, 1, 1), "relu", (3, 1, 1), "relu", 2),
        *((3, 1, 1), "relu", (3, 1, 1), "relu", (3, 1, 1), "relu", 2),
        *((3, 1, 1), "relu", (3, 1, 1), "relu", (3, 1, 1), "relu"),
    ],
}
COMPARED = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
CHANNELS = {"alex": (8, 12, 10, 6, 6), "vgg": (4, 4, 6, 6, 8, 8, 8, 10, 10, 10, 12, 12, 12)}


def random_weights(trunk):
    """The state dicts of torchvision's network, with a layer of classes, and of the authors' layers, both narrow."""
    generator = torch.Generator().manual_seed(0)
    features, layers, channels, widths = {}, {}, 3, iter(CHANNELS[trunk])
    for place, layer in enumerate(LAYERS[trunk]):
        if isinstance(layer, tuple):
            shape = (next(widths), channels, layer[0], layer[0])
            scale = math.sqrt(2 / math.prod(shape[1:]))
            features[f"features.{place}.weight"] = scale * torch.randn(shape, generator=generator)
            features[f"features.{place}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
            channels = shape[0]
        if place in COMPARED[trunk]:
            name = f"lin{COMPARED[trunk].index(place)}.model.1.weight"
            layers[name] = torch.rand(1, channels, 1, 1, generator=generator)
    features["classifier.6.weight"] = torch.randn(5, 7, generator=generator)
    return features, layers


def distances(features, layers, one, other):
    """Of images `[B, 3, H, W]` in [0, 1], `[B]`, in their precision."""
    trunk = "alex" if features["features.0.weight"].shape[-1] == 11 else "vgg"
    shift, scale = (
        torch.tensor(values, dtype=one.dtype)[None, :, None, None]
        for values in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
    )
    seen = []
    for x in (one, other):
        x, found = (2 * x - 1 - shift) / scale, []
        for place, layer in enumerate(LAYERS[trunk]):
            if layer == "relu":
                x = F.relu(x)
            elif isinstance(layer, int):
                x = F.max_pool2d(x, layer, 2)
            else:
                weight, bias = (features[f"features.{place}.{part}"].to(x.dtype) for part in ("weight", "bias"))
                x = F.conv2d(x, weight, bias, stride=layer[1], padding=layer[2])
            if place in COMPARED[trunk]:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        seen.append(found)
    total = 0
    for i, (a, b) in enumerate(zip(*seen, strict=True)):
        total = total + F.conv2d((a - b).square(), layers[f"lin{i}.model.1.weight"].to(one.dtype)).mean((1, 2, 3))
    return total


def whole(features, layers):
    """The state dict of the authors' class: slices of the network, the layers twice, and its constants."""
    slices = {"alex": (2, 5, 8, 10, 12), "vgg": (4, 9, 16, 23, 30)}
    trunk = "alex" if features["features.0.weight"].shape[-1] == 11 else "vgg"
    found = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    for name, value in features.items():
        if name.startswith("features."):
            place = int(name.split(".")[1])
            number = 1 + sum(place >= end for end in slices[trunk])
            found[name.replace("features.", f"net.slice{number}.")] = value
    for name, value in layers.items():
        found |= {name: value, name.replace("lin", "lins."): value}
    return found
