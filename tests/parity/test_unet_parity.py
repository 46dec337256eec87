import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from flax import nnx
from torch_reference import SD15_UNET, SDXL_UNET, gradient_errors, nchw, nhwc, randomised, relative_error

from flax_pref.checkpoints.diffusers import load_unet
from flax_pref.checkpoints.weights import to_stored


# The second size is not a multiple of the downsampling: the up path has to crop.
@pytest.mark.parametrize(("config", "size"), [(SD15_UNET, (8, 12)), (SDXL_UNET, (6, 10))], ids=["sd15", "sdxl"])
def test_a_loaded_unet_predicts_and_differentiates_as_in_diffusers(config, size, tmp_path):
    reference = randomised(UNet2DConditionModel.from_config(config))
    reference.save_pretrained(tmp_path)
    unet = load_unet(tmp_path)

    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, *size, 4), dtype=np.float32)
    timesteps = np.array([3, 981], np.int32)
    text = rng.standard_normal((2, 5, config["cross_attention_dim"]), dtype=np.float32)
    cotangent = rng.standard_normal((2, *size, 4), dtype=np.float32)
    added_cond = {}
    if "addition_embed_type" in config:
        added_cond = {
            "text_embeds": rng.standard_normal((2, 10), dtype=np.float32),
            "time_ids": np.array([[1024, 768, 0, 16, 1024, 1024], [64, 64, 0, 0, 64, 64]], np.float32),
        }

    prediction = reference(
        nchw(latents),
        torch.from_numpy(timesteps),
        torch.from_numpy(text),
        added_cond_kwargs=added_cond and {key: torch.from_numpy(value) for key, value in added_cond.items()},
    ).sample
    (prediction * nchw(cotangent)).sum().backward()

    @jax.jit
    def predict(params):
        def loss(params):
            noise_pred = nnx.merge(unet.graphdef, params)(latents, timesteps, text, **added_cond)
            return jnp.sum(noise_pred * cotangent), noise_pred

        gradients, noise_pred = jax.grad(loss, has_aux=True)(params)
        return noise_pred, gradients

    noise_pred, gradients = predict(unet.params)
    assert relative_error(noise_pred, nhwc(prediction)) < 1e-5
    errors = gradient_errors(to_stored(gradients), reference)
    worst = max(errors, key=errors.get)
    print(f"worst gradient: {worst} {errors[worst]:.1e}; prediction {relative_error(noise_pred, nhwc(prediction)):.1e}")
    assert errors[worst] < 1e-4, worst
