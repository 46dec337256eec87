import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import AutoencoderKL
from flax import nnx
from torch_reference import VAE, gradient_errors, nchw, nhwc, randomised, relative_error

from flax_pref.checkpoints.diffusers import load_vae
from flax_pref.checkpoints.weights import to_stored


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 3},
    ],
    ids=["sd", "without-attention-and-quant-conv"],
)
def test_a_loaded_autoencoder_encodes_decodes_and_differentiates_as_in_diffusers(change, tmp_path):
    reference = randomised(AutoencoderKL.from_config(VAE | change))
    reference.save_pretrained(tmp_path)
    vae = load_vae(tmp_path)

    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    cotangent = rng.standard_normal((2, 16, 24, 3), dtype=np.float32)

    posterior = reference.encode(nchw(images)).latent_dist
    decoded = reference.decode(posterior.mean + posterior.logvar).sample
    (decoded * nchw(cotangent)).sum().backward()

    @jax.jit
    def autoencode(params):
        def loss(params):
            module = nnx.merge(vae.graphdef, params)
            mean, logvar = module.encode(images)
            decoded = module.decode(mean + logvar)
            return jnp.sum(decoded * cotangent), (mean, logvar, decoded)

        return jax.grad(loss, has_aux=True)(params)

    gradients, (mean, logvar, images_out) = autoencode(vae.params)
    outputs = {
        "mean": relative_error(mean, nhwc(posterior.mean)),
        "logvar": relative_error(logvar, nhwc(posterior.logvar)),
        "decoded": relative_error(images_out, nhwc(decoded)),
    }
    assert max(outputs.values()) < 1e-5, outputs
    errors = gradient_errors(to_stored(gradients), reference)
    worst = max(errors, key=errors.get)
    print(f"worst gradient: {worst} {errors[worst]:.1e}; {outputs}")
    assert errors[worst] < 1e-4, worst
