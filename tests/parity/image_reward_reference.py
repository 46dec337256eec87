"""ImageReward transcribed into torch functions of the weights under the names of its file, and random such weights."""

import math

import torch
import torch.nn.functional as F


def linear(name, width, source, *more):
    return {f"{name}.weight": (width, source, *more), f"{name}.bias": (width,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def shapes(sizes):
    """Names and shapes of the weights in ImageReward.pt."""
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    visual, textual, patch = sizes.vision_width, sizes.text_width, sizes.patch_size
    found = {
        f"{vision}.cls_token": (1, 1, visual),
        f"{vision}.pos_embed": (1, 1 + (sizes.image_size // patch) ** 2, visual),
        **linear(f"{vision}.patch_embed.proj", visual, 3, patch, patch),
        **norm(f"{vision}.norm", visual),
        f"{text}.embeddings.word_embeddings.weight": (sizes.vocab_size, textual),
        f"{text}.embeddings.position_embeddings.weight": (sizes.max_position_embeddings, textual),
        **norm(f"{text}.embeddings.LayerNorm", textual),
    }
    for i in range(sizes.vision_layers):
        block = f"{vision}.blocks.{i}"
        found |= norm(f"{block}.norm1", visual) | norm(f"{block}.norm2", visual)
        found |= linear(f"{block}.attn.qkv", 3 * visual, visual) | linear(f"{block}.attn.proj", visual, visual)
        found |= linear(f"{block}.mlp.fc1", sizes.vision_mlp_width, visual)
        found |= linear(f"{block}.mlp.fc2", visual, sizes.vision_mlp_width)
    for i in range(sizes.text_layers):
        layer = f"{text}.encoder.layer.{i}"
        for kind, source in (("attention", textual), ("crossattention", visual)):
            found |= linear(f"{layer}.{kind}.self.query", textual, textual)
            found |= linear(f"{layer}.{kind}.self.key", textual, source)
            found |= linear(f"{layer}.{kind}.self.value", textual, source)
            found |= linear(f"{layer}.{kind}.output.dense", textual, textual)
            found |= norm(f"{layer}.{kind}.output.LayerNorm", textual)
        found |= linear(f"{layer}.intermediate.dense", sizes.text_mlp_width, textual)
        found |= linear(f"{layer}.output.dense", textual, sizes.text_mlp_width)
        found |= norm(f"{layer}.output.LayerNorm", textual)
    # Dropout is at 1, 3 and 5.
    for i, source, width in ((0, textual, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)):
        found |= linear(f"mlp.layers.{i}", width, source)
    return found


def random_weights(sizes):
    """None is zero or one, attention is far from uniform, and scores are around one."""
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, shape in shapes(sizes).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) in (2, 4) and "embeddings" not in name:
            drawn[name] = values * (0.8 if name.startswith("mlp") else 1.5) / math.sqrt(math.prod(shape[1:]))
        else:
            drawn[name] = 0.2 * values + float("norm" in name.lower() and name.endswith("weight"))
    return drawn


# ----------------------------------------------------------------------------------------------------------------------
# The transcription


def affine(weights, name, x):
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def normed(weights, name, x, epsilon):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon)


def numbered(weights, prefix):
    """The prefixes of all layers."""
    numbers = {int(name.removeprefix(f"{prefix}.").split(".")[0]) for name in weights if name.startswith(f"{prefix}.")}
    return [f"{prefix}.{number}" for number in sorted(numbers)]


def attend(q, k, v, added=0.0):
    """Heads of 64 channels."""
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(2, 3) / 8 + added).softmax(-1) @ v).transpose(1, 2).flatten(2)


def image_states(weights, pixels):
    """`[B, 3, H, W] -> [B, T, D]`."""
    prefix = "blip.visual_encoder"
    kernel, bias = (weights[f"{prefix}.patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
    x = F.conv2d(pixels, kernel, bias, stride=kernel.shape[2]).flatten(2).transpose(1, 2)
    x = torch.cat([weights[f"{prefix}.cls_token"].expand(len(x), 1, -1), x], dim=1) + weights[f"{prefix}.pos_embed"]
    for block in numbered(weights, f"{prefix}.blocks"):
        qkv = affine(weights, f"{block}.attn.qkv", normed(weights, f"{block}.norm1", x, 1e-6))
        x = x + affine(weights, f"{block}.attn.proj", attend(*qkv.chunk(3, dim=-1)))
        inner = F.gelu(affine(weights, f"{block}.mlp.fc1", normed(weights, f"{block}.norm2", x, 1e-6)))
        x = x + affine(weights, f"{block}.mlp.fc2", inner)
    return normed(weights, f"{prefix}.norm", x, 1e-6)


def text_states(weights, ids, mask, seen):
    """`[B, T], [B, T], [B, S, D] -> [B, T, E]`."""
    prefix = "blip.text_encoder"
    x = weights[f"{prefix}.embeddings.word_embeddings.weight"][ids]
    x = x + weights[f"{prefix}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = normed(weights, f"{prefix}.embeddings.LayerNorm", x, 1e-12)
    hidden = -10000.0 * (1 - mask.to(x.dtype))[:, None, None, :]
    for layer in numbered(weights, f"{prefix}.encoder.layer"):
        for name, source, added in ((f"{layer}.attention", None, hidden), (f"{layer}.crossattention", seen, 0.0)):
            source = x if source is None else source
            q = affine(weights, f"{name}.self.query", x)
            k, v = (affine(weights, f"{name}.self.{kind}", source) for kind in ("key", "value"))
            x = normed(
                weights,
                f"{name}.output.LayerNorm",
                x + affine(weights, f"{name}.output.dense", attend(q, k, v, added)),
                1e-12,
            )
        inner = F.gelu(affine(weights, f"{layer}.intermediate.dense", x))
        x = normed(weights, f"{layer}.output.LayerNorm", x + affine(weights, f"{layer}.output.dense", inner), 1e-12)
    return x


def scores(weights, pixels, ids, mask):
    """`[B]` of normalised images `[B, 3, H, W]` of the network's size, in their precision."""
    weights = {name: value.to(pixels.dtype) for name, value in weights.items()}
    x = text_states(weights, ids, mask, image_states(weights, pixels))[:, 0]
    for i in (0, 2, 4, 6, 7):
        x = affine(weights, f"mlp.layers.{i}", x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072
