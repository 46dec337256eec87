"""PGD and cPGD against torch networks that are called one after another, with the scheduler of diffusers."""

import functools

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from peft import LoraConfig
from torch_reference import SD15_UNET, nchw, nhwc, randomised, relative_error

from flax_pref.checkpoints.diffusers import load_unet
from flax_pref.checkpoints.lora import load_lora_network
from flax_pref.diffusion.guidance import cpgd, pgd, tabulate
from flax_pref.diffusion.sampler import image_keys, sample
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.models.bank import Bank, Member

CONFIG = SD15_UNET | {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
}
SHAPE, IMAGES, STEPS = (16, 12, 4), 2, 4
W, S = 2.0, 3.0
SCHEDULER = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
NAMES = ("base", "pos", "neg")
# The rule, its formula with (network, prompt) -> prediction, and the predictions of one step.
RULES = {
    "pgd": (pgd(W, S, "pos"), lambda eps: (1 - W) * guided(eps, "base") + W * guided(eps, "pos"), 4),
    "cpgd": (cpgd(W, S), lambda eps: cpgd_of(eps, S), 6),
    # By diffusers' own function, which takes the guided prediction and the text prediction that it is made of.
    "cpgd, rescaled": (
        cpgd(W, S, rescale=0.7),
        lambda eps: rescale_noise_cfg(cpgd_of(eps, S), cpgd_of(eps, 1), guidance_rescale=0.7),
        6,
    ),
}


def guided(eps, network, s=S):
    return (1 - s) * eps(network, "empty") + s * eps(network, "text")


def cpgd_of(eps, s):
    return guided(eps, "base", s) + W * (guided(eps, "pos", s) - guided(eps, "neg", s))


def full_networks(folder) -> tuple[dict, Bank]:
    """Three sets of weights, in torch and in a bank."""
    theirs, members = {}, []
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        theirs[name] = randomised(UNet2DConditionModel.from_config(CONFIG), seed)
        theirs[name].save_pretrained(folder / name)
        members.append(Member(name, *load_unet(folder / name)[1:]))
    return theirs, Bank(tuple(members))


def adapters(folder) -> tuple[dict, Bank]:
    """One set of weights with files of PEFT's adapters, in torch and in a bank."""
    torch.manual_seed(0)
    randomised(UNet2DConditionModel.from_config(CONFIG)).save_pretrained(folder)
    theirs = {"base": UNet2DConditionModel.from_pretrained(folder).eval()}
    for seed, name in enumerate(NAMES[1:]):
        unet = UNet2DConditionModel.from_pretrained(folder)
        unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        generator = torch.Generator().manual_seed(seed)
        for parameter in (parameter for key, parameter in unet.named_parameters() if "lora_" in key):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        unet.save_lora_adapter(folder, weight_name=f"{name}.safetensors")
        theirs[name] = unet.eval()
    network = load_lora_network(load_unet(folder), {name: folder / f"{name}.safetensors" for name in NAMES[1:]})
    return theirs, Bank((Member("base", *network[1:]),))


@pytest.fixture(scope="module", params=[full_networks, adapters])
def networks(request, tmp_path_factory):
    """Networks in torch and in a bank, and what the base alone draws."""
    theirs, bank = request.param(tmp_path_factory.mktemp(request.param.__name__))
    return theirs, bank, draw_theirs(theirs, lambda eps: guided(eps, "base"), keys())[0]


def keys() -> jax.Array:
    return image_keys(0, range(IMAGES))


def prompts() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    text, empty = (rng.standard_normal((n, 5, CONFIG["cross_attention_dim"]), np.float32) for n in (IMAGES, 1))
    return {"text": text, "empty": empty.repeat(IMAGES, 0)}


@torch.no_grad()
def draw_theirs(networks, formula, keys) -> tuple[torch.Tensor, int]:
    """Latents, and how many predictions they took."""
    latents = nchw(np.stack([jax.random.normal(jax.random.fold_in(key, 0), SHAPE) for key in keys]))
    states = {prompt: torch.from_numpy(array) for prompt, array in prompts().items()}
    SCHEDULER.set_timesteps(STEPS)
    calls = 0
    for t in SCHEDULER.timesteps:

        @functools.cache
        def eps(network, prompt, latents=latents, t=t):
            nonlocal calls
            calls += 1
            return networks[network](latents, t, states[prompt]).sample

        latents = SCHEDULER.step(formula(eps), t, latents).prev_sample
    return nhwc(latents), calls


@jax.jit
def draw_ours(bank, table, keys, text, empty):
    solver = solver_from_config(dict(SCHEDULER.config) | {"_class_name": "DDIMScheduler"}, STEPS)
    states = ({"encoder_hidden_states": x} for x in (text, empty))
    return sample(bank, table, solver, keys, *states, SHAPE)


@pytest.mark.parametrize("name", RULES)
def test_torch_networks_one_after_another_draw_what_a_bank_draws(name, networks):
    theirs, bank, unguided = networks
    rule, formula, evaluations = RULES[name]
    expected, calls = draw_theirs(theirs, formula, keys())
    assert calls == STEPS * evaluations
    assert relative_error(unguided, expected) > 0.1
    error = relative_error(draw_ours(bank, tabulate(rule, STEPS, IMAGES), keys(), *prompts().values()), expected)
    print(f"{name}: {error:.1e}")
    assert error < 5e-6
