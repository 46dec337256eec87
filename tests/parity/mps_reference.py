"""MPS in torch, from its paper and the names of its file: CLIP of transformers, then layers of cross-attention."""

import torch
from torch import nn

from tests.parity.clip_reference import small_clip
from tests.parity.torch_reference import randomised

HEADS, HEAD_WIDTH = 3, 8


class LayerNorm(nn.Module):
    """Without a bias that learns: the file has zeros for it, as a buffer."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, x):
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias)


class SwiGLU(nn.Module):
    def forward(self, x):
        value, gate = x.tensor_split(2, dim=-1)
        return value * gate * gate.sigmoid()


class Around(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn


class Cross(nn.Module):
    def __init__(self, width, mlp):
        super().__init__()
        self.norm = LayerNorm(width)
        self.context_norm = nn.Identity()
        self.to_q = nn.Linear(width, HEADS * HEAD_WIDTH, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(HEADS * HEAD_WIDTH, width, bias=False)
        self.ff = nn.Sequential(nn.Linear(width, 2 * mlp, bias=False), SwiGLU(), nn.Linear(mlp, width, bias=False))

    def forward(self, x, words, seen):
        normal = self.norm(x)
        k, v = self.to_kv(words).tensor_split(2, dim=-1)
        return x + self.to_out(heads(self.to_q(normal), k, v, seen)) + self.ff(normal)


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH))

    def forward(self, x):
        """A rotation of each pair of channels (i, i + half), position by position."""
        turn = torch.polar(torch.ones(()).to(x), torch.outer(torch.arange(x.shape[1]).to(x), self.inv_freq.to(x)))
        half = x.shape[-1] // 2
        turned = torch.complex(x[..., :half], x[..., half:]) * turn.reshape(1, len(turn), *[1] * (x.ndim - 3), half)
        return torch.cat([turned.real, turned.imag], dim=-1)


class Own(nn.Module):
    def __init__(self, width, mlp):
        super().__init__()
        self.norm = LayerNorm(width)
        self.widths = (HEADS * HEAD_WIDTH, HEAD_WIDTH, HEAD_WIDTH, 2 * mlp)
        self.rotary_emb = Rotary()
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.widths), bias=False)
        self.attn_out = nn.Linear(HEADS * HEAD_WIDTH, width, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(mlp, width, bias=False))
        self.register_buffer("pos_emb", torch.ones(3, HEAD_WIDTH), persistent=False)

    def forward(self, x):
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.widths, dim=-1)
        q = self.rotary_emb(q.unflatten(-1, (HEADS, HEAD_WIDTH))).flatten(-2)
        return x + self.attn_out(heads(q, self.rotary_emb(k), v)) + self.ff_out(ff)


def heads(q, k, v, seen=None):
    """One head after another, all with the same keys and values."""
    found = []
    for one in q.split(HEAD_WIDTH, dim=-1):
        scores = one @ k.mT / HEAD_WIDTH**0.5
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None], -torch.inf)
        found.append(scores.softmax(dim=-1) @ v)
    return torch.cat(found, dim=-1)


class CrossModel(nn.Module):
    def __init__(self, width, mlp, layers):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([Around(Cross(width, mlp)), Around(Own(width, mlp))]) for _ in range(layers)
        )


class MPS(nn.Module):
    """The authors' two parts under their names."""

    def __init__(self, width=10, mlp=12, layers=2, **clip):
        super().__init__()
        self.model = small_clip(projection_dim=width, **clip)
        self.cross_model = randomised(CrossModel(width, mlp, layers))

    def forward(self, images, ids, condition, near=0.3):
        """Scores `[B]` of normalised images `[B, 3, S, S]` for token ids `[B, T]`, one after another."""
        found = []
        for image, text in zip(images, ids, strict=True):
            words, wanted = (
                self.model.text_projection(self.model.text_model(input_ids=row[None]).last_hidden_state)
                for row in (text, condition)
            )
            similarity = (words[0] @ wanted[0].T).amax(dim=1)
            seen = (similarity / similarity.max() > near)[None]
            x = self.model.visual_projection(self.model.vision_model(pixel_values=image[None]).last_hidden_state)
            for cross, own in self.cross_model.layers:
                x = own.fn(cross.fn(x, words, seen))
            ends = words[0, text.argmax()]
            found.append(self.model.logit_scale.exp() * nn.functional.cosine_similarity(x[0, 0], ends, dim=0))
        return torch.stack(found)
