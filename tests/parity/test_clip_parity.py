import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_reference import CLIP, gradient_errors, randomised, relative_error
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from flax_pref.checkpoints.diffusers import load_text_encoder
from flax_pref.checkpoints.weights import to_stored

# Two end tokens in the first text, padded with the end token as SD1.5 does; padding with token 0 in the second.
INPUT_IDS = np.array([[97, 5, 6, 98, 98, 98, 98, 98], [97, 3, 4, 5, 6, 7, 98, 0]], np.int32)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos_token_id", [2, 98], ids=["largest-id-ends", "eos-id-ends"])
@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
# The configs on the Hub say eos_token_id=2 and transformers accepts it; tiny vocabularies make it complain of others.
def test_a_loaded_text_encoder_agrees_with_transformers(kind, eos_token_id, act, tmp_path):
    config = CLIPTextConfig(**CLIP | {"eos_token_id": eos_token_id, "hidden_act": act})
    reference = randomised(kind(config))
    reference.save_pretrained(tmp_path)
    encoder = load_text_encoder(tmp_path)

    theirs = reference(torch.from_numpy(INPUT_IDS).long(), output_hidden_states=True)
    rng = np.random.default_rng(0)
    cotangent = rng.standard_normal((2, 8, CLIP["hidden_size"]), dtype=np.float32)
    projects = kind is CLIPTextModelWithProjection
    loss = (theirs.last_hidden_state * torch.from_numpy(cotangent)).sum()
    (loss + theirs.text_embeds.sum() if projects else loss).backward()

    @jax.jit
    def encode(params):
        def loss(params):
            output = nnx.merge(encoder.graphdef, params)(INPUT_IDS)
            projected = output.projected.sum() if projects else 0.0
            return jnp.sum(output.last_hidden_state * cotangent) + projected, output

        return jax.grad(loss, has_aux=True)(params)

    gradients, ours = encode(encoder.params)
    assert relative_error(ours.last_hidden_state, theirs.last_hidden_state) < 1e-5
    for own, their in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert relative_error(own, their) < 1e-5
    if projects:
        assert relative_error(ours.projected, theirs.text_embeds) < 1e-5
    else:
        assert ours.projected is None
        assert relative_error(ours.pooled, theirs.pooler_output) < 1e-5
    # transformers' class without projection leaves out the prefix that its files on the Hub have.
    prefix = "" if projects else "text_model."
    stored = {name.removeprefix(prefix): gradient for name, gradient in to_stored(gradients).items()}
    errors = gradient_errors(stored, reference)
    worst = max(errors, key=errors.get)
    print(f"worst gradient: {worst} {errors[worst]:.1e}")
    assert errors[worst] < 1e-4, worst
