"""A small CLIP of transformers with random weights, and its weights in the form of OpenCLIP."""

import torch
import transformers

from tests.parity.torch_reference import randomised

# The narrowest widths of OpenCLIP: its files tell the number of heads by nothing else.
VISION = {
    "hidden_size": 384,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "image_size": 12,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": 99,
    "hidden_size": 128,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "eos_token_id": 2,
}


def small_clip(act="gelu", text=(), vision=(), projection_dim=10):
    config = transformers.CLIPConfig(
        text_config=TEXT | {"hidden_act": act} | dict(text),
        vision_config=VISION | {"hidden_act": act} | dict(vision),
        projection_dim=projection_dim,
    )
    return randomised(transformers.CLIPModel(config))


def as_openclip(weights, text=""):
    """transformers' weights under the names of OpenCLIP, whose attention has q, k and v in one matrix.

    `text` is the prefix of the text encoder's names.
    """
    weights, renamed = dict(weights), {}

    def move(theirs, ours, change=lambda x: x):
        renamed[ours] = change(weights.pop(theirs)).clone()

    for tower, prefix, config in (("vision_model", "visual.", VISION), ("text_model", text, TEXT)):
        for i in range(config["num_hidden_layers"]):
            layer, block = f"{tower}.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
            for kind in ("weight", "bias"):
                parts = [weights.pop(f"{layer}.self_attn.{part}_proj.{kind}") for part in "qkv"]
                renamed[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
                move(f"{layer}.self_attn.out_proj.{kind}", f"{block}.attn.out_proj.{kind}")
                move(f"{layer}.mlp.fc1.{kind}", f"{block}.mlp.c_fc.{kind}")
                move(f"{layer}.mlp.fc2.{kind}", f"{block}.mlp.c_proj.{kind}")
                move(f"{layer}.layer_norm1.{kind}", f"{block}.ln_1.{kind}")
                move(f"{layer}.layer_norm2.{kind}", f"{block}.ln_2.{kind}")
        move(f"{tower}.embeddings.position_embedding.weight", f"{prefix}positional_embedding")
    for kind in ("weight", "bias"):
        move(f"vision_model.pre_layrnorm.{kind}", f"visual.ln_pre.{kind}")
        move(f"vision_model.post_layernorm.{kind}", f"visual.ln_post.{kind}")
        move(f"text_model.final_layer_norm.{kind}", f"{text}ln_final.{kind}")
    move("vision_model.embeddings.class_embedding", "visual.class_embedding")
    move("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight")
    move("visual_projection.weight", "visual.proj", lambda x: x.T)
    move("text_model.embeddings.token_embedding.weight", f"{text}token_embedding.weight")
    move("text_projection.weight", f"{text}text_projection", lambda x: x.T)
    move("logit_scale", "logit_scale")
    assert not weights
    return renamed
