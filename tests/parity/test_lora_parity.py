import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from peft import LoraConfig
from safetensors.numpy import save_file
from torch_reference import SD15_UNET, nchw, nhwc, randomised, relative_error

from flax_pref.checkpoints.diffusers import load_unet
from flax_pref.checkpoints.lora import load_lora, load_lora_network, save_lora
from flax_pref.models.lora import add_lora, join_lora, select_lora, set_rows, split_lora

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "time_emb_proj"]
TARGETS += ["downsamplers.0.conv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    randomised(UNet2DConditionModel.from_config(SD15_UNET)).save_pretrained(folder)
    return folder


@pytest.fixture
def reference(folder):
    return UNet2DConditionModel.from_pretrained(folder).eval()


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 8, 12, 4), dtype=np.float32)
    return latents, np.array([3, 981], np.int32), rng.standard_normal((2, 5, 12), dtype=np.float32)


def predict(network, *names):
    """The prediction of the batch, whose rows are shared out evenly among the named modules."""

    @jax.jit
    def run(params):
        unet = nnx.merge(network.graphdef, params)
        set_rows(unet, [(name, 2 // len(names)) for name in names])
        return unet(*inputs())

    return run(network.params)


def reference_predict(unet):
    latents, timesteps, text = inputs()
    with torch.no_grad():
        return nhwc(unet(nchw(latents), torch.from_numpy(timesteps), torch.from_numpy(text)).sample)


def test_diffusers_predicts_as_we_do_from_a_file_of_ours(folder, reference, tmp_path):
    network = load_unet(folder)

    def build():
        unet = nnx.merge(network.graphdef, network.params)
        add_lora(unet, ("pos", "neg"), rank=4, alpha=10, targets=TARGETS, rngs=nnx.Rngs(params=0))
        return unet

    graphdef, state = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(1)
    lora = jax.tree.map(
        lambda leaf: np.float32(0.1) * rng.standard_normal(leaf.shape, np.float32),
        split_lora(nnx.to_pure_dict(state))[1],
    )
    bank = network._replace(graphdef=graphdef, params=join_lora(network.params, lora))
    before = reference_predict(reference)
    for i, name in enumerate(("pos", "neg")):
        save_lora(select_lora(lora, i), tmp_path / f"{name}.safetensors", alpha=10)

    reference.load_lora_adapter(tmp_path, weight_name="pos.safetensors", prefix="unet")
    pos = reference_predict(reference)
    # The way that StableDiffusionPipeline.load_lora_weights takes.
    reference.unload_lora()
    weights, alphas = StableDiffusionPipeline.lora_state_dict(tmp_path, weight_name="neg.safetensors")
    StableDiffusionPipeline.load_lora_into_unet(weights, alphas, reference)
    neg = reference_predict(reference)
    assert min(relative_error(before, pos), relative_error(before, neg)) > 0.1  # the adapters do something

    expected = np.stack([pos[0], neg[1]])
    stored = load_lora_network(network, {name: tmp_path / f"{name}.safetensors" for name in ("pos", "neg")})
    errors = [relative_error(predict(ours, "pos", "neg"), expected) for ours in (bank, stored)]
    print(f"in memory {errors[0]:.1e}, from our files {errors[1]:.1e}")
    assert max(errors) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["neg.safetensors", "pos.safetensors"]


def test_we_predict_as_diffusers_does_from_a_file_of_diffusers(folder, reference, tmp_path):
    reference.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS, init_lora_weights="gaussian"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in reference.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    reference.save_lora_adapter(tmp_path, weight_name="dpo.safetensors")
    lora, rank, alpha = load_lora(tmp_path / "dpo.safetensors")
    assert (rank, alpha) == (4, 10.0)
    assert all(len(leaf) == 1 for leaf in flatten_dict(lora).values())
    stored = load_lora_network(load_unet(folder), {"dpo": tmp_path / "dpo.safetensors"})
    error = relative_error(predict(stored, "dpo"), reference_predict(reference))
    print(f"{error:.1e}")
    assert error < 1e-5


def test_a_file_that_is_no_plain_lora_of_this_network_is_refused(folder, tmp_path):
    file = tmp_path / "lora.safetensors"
    with pytest.raises(FileNotFoundError, match=r"lora\.safetensors: no such file"):
        load_lora(file)
    file.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"lora\.safetensors: not a complete safetensors file"):
        load_lora(file)
    save_file({"lora_unet_mid_block_to_q.lora_down.weight": np.zeros((4, 16), np.float32)}, file)
    with pytest.raises(ValueError, match=r"'lora_unet_mid_block_to_q\.lora_down\.weight' .* is not understood"):
        load_lora(file)
    with pytest.raises(ValueError, match="adapters of one module"):
        save_lora({}, file, alpha=1)

    path = ("mid_block", "attentions", 0, "transformer_blocks", 0, "attn1", "to_q")
    lora = {(*path, "lora_a"): jnp.zeros((1, 20, 4)), (*path, "lora_b"): jnp.zeros((1, 4, 16))}
    save_lora(unflatten_dict(lora), file, alpha=4)
    with pytest.raises(ValueError, match=r"has shape \[1, 20, 4\], expected \[1, 16, 4\]"):
        load_lora_network(load_unet(folder), {"dpo": file})
