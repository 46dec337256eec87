"""DINOv2 of its authors transcribed into torch functions of the weights under the names of its file."""

import math

import torch
import torch.nn.functional as F

HEAD = 64


def authors_weights(*, width=128, layers=2, within=96, patch=14, grid=5, gated=False, registers=0):
    """Random weights: attention is far from uniform, and no number is zero or one."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=generator)

    def linear(name, out, into, scale=1.0):
        return {f"{name}.weight": normal(out, into, scale=scale / math.sqrt(into)), f"{name}.bias": normal(out)}

    def norm(name):
        return {f"{name}.weight": 1 + normal(width, scale=0.3), f"{name}.bias": normal(width, scale=0.3)}

    weights = {
        "cls_token": normal(1, 1, width),
        "pos_embed": normal(1, grid**2 + 1, width),
        "mask_token": normal(1, width),
        "patch_embed.proj.weight": normal(width, 3, patch, patch, scale=1 / math.sqrt(3 * patch**2)),
        "patch_embed.proj.bias": normal(width),
        **norm("norm"),
    }
    if registers:
        weights["register_tokens"] = normal(1, registers, width)
    for i in range(layers):
        block = f"blocks.{i}"
        weights |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
        weights |= linear(f"{block}.attn.qkv", 3 * width, width, 2.0) | linear(f"{block}.attn.proj", width, width)
        weights |= {f"{block}.ls{j}.gamma": 0.5 + normal(width, scale=0.2) for j in (1, 2)}
        first, last = ("w12", "w3") if gated else ("fc1", "fc2")
        weights |= linear(f"{block}.mlp.{first}", 2 * within if gated else within, width)
        weights |= linear(f"{block}.mlp.{last}", width, within)
    return weights


def positions(weights, rows):
    """For so many rows of patches; a number close to the wanted one is the scale, but for networks with registers."""
    stored = weights["pos_embed"]
    grid = math.isqrt(stored.shape[1] - 1)
    if rows == grid:
        return stored
    square = stored[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    if "register_tokens" in weights:
        square = F.interpolate(square, size=(rows, rows), mode="bicubic", antialias=True)
    else:
        square = F.interpolate(square, scale_factor=(rows + 0.1) / grid, mode="bicubic")
    assert square.shape[-2:] == (rows, rows)
    return torch.cat([stored[:, :1], square.flatten(2).transpose(1, 2)], 1)


def class_token(weights, x):
    """Normalised images `[B, 3, S, S]` to the class token's last state, normalised, in the precision of the images."""
    weights = {name: value.to(x.dtype) for name, value in weights.items()}
    width, size = weights["norm.weight"].shape[0], weights["patch_embed.proj.weight"].shape[-1]

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    rows = x.shape[-1] // size
    x = F.conv2d(x, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=size)
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + positions(weights, rows)
    if "register_tokens" in weights:
        x = torch.cat([x[:, :1], weights["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
    for i in range(len({name.split(".")[1] for name in weights if name.startswith("blocks.")})):
        block = f"blocks.{i}"
        y = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x))
        q, k, v = y.reshape(*x.shape[:2], 3, width // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        weighed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(HEAD), -1) @ v
        y = linear(f"{block}.attn.proj", weighed.transpose(1, 2).reshape(x.shape))
        x = x + weights[f"{block}.ls1.gamma"] * y
        y = norm(f"{block}.norm2", x)
        if f"{block}.mlp.w12.weight" in weights:
            gate, value = linear(f"{block}.mlp.w12", y).chunk(2, -1)
            y = linear(f"{block}.mlp.w3", F.silu(gate) * value)
        else:
            y = linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", y)))
        x = x + weights[f"{block}.ls2.gamma"] * y
    return norm("norm", x[:, 0])
