"""The nodes of integrations/comfyui, in a stand-in of ComfyUI, guide as flax_pref does."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from comfyui_stand_in import Model, ModelPatcher, Velocity, calc_cond_batch, denoise, euler, load_nodes
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch_pipelines import SCHEDULE
from torch_reference import TWO_BLOCKS as UNETS
from torch_reference import nchw, randomised, relative_error

from flax_pref.checkpoints.diffusers import load_unet
from flax_pref.checkpoints.lora import load_lora, save_lora
from flax_pref.checkpoints.original import unet_layers
from flax_pref.config import INTEGRATIONS
from flax_pref.diffusion.guidance import GuidanceStep, tabulate
from flax_pref.diffusion.rules import named_rule
from flax_pref.diffusion.sampler import draw_normal, image_keys, sample
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.models.tree import flatten_dict

# diffusers' and transformers' own housekeeping, none of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]
# Layers of every kind, some with ranks and alphas of their own.
TARGETS = ["to_q", "to_out.0", "ff.net.0.proj", "proj_in", "time_emb_proj", "conv1", "conv_in", "downsamplers.0.conv"]
RANKS = {"rank_pattern": {"attn2.to_q": 2}, "alpha_pattern": {"conv1": 3}}


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def nodes(loras):
    with pytest.MonkeyPatch.context() as patch:
        yield load_nodes(patch, loras)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks of a few channels are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def guide(nodes, patcher, modules, rule="cpgd", **inputs):
    """The patched model, with the defaults of the node."""
    defaults = {"w": 2.0, "start": 0.0, "stop": 1.0, "every": 1, "norm_matched": False}
    (patched,) = nodes.ContrastiveGuidance().patch(patcher, modules, rule, **{**defaults, **inputs})
    return patched


# ----------------------------------------------------------------------------------------------------------------------
# Rules, in a network of one line

STEPS, SHAPE, SEED = 8, (4, 3, 2), 3
NUMBERS = {name: 0.3 + 0.2 * i for i, name in enumerate(("base", "pos", "neg", "text", "empty"))}


class Line(torch.nn.Module):
    """`tanh(scale x + prompt) + x`, where the scale is a layer that modules change."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Conv2d(SHAPE[-1], SHAPE[-1], 1, bias=False)
        self.scale.weight.data = NUMBERS["base"] * torch.eye(SHAPE[-1])[..., None, None]

    def forward(self, x, prompt):
        return torch.tanh(self.scale(x) + prompt) + x


def predict(networks, latents, timesteps, text):
    """The same here."""
    scale = np.array([NUMBERS["neg" if name == "bad" else name] for name in networks], np.float32)
    return jnp.tanh(scale[:, None, None, None] * latents + text["encoder_hidden_states"]) + latents


def line_modules():
    one = torch.eye(SHAPE[-1])[..., None, None]
    return {name: {"diffusion_model.scale": (one, (NUMBERS[name] - NUMBERS["base"]) * one)} for name in ("pos", "neg")}


def line(prediction="epsilon", **options):
    """A patcher of the network, and the conditionings on the prompts "text" and "empty"."""
    patcher = ModelPatcher(Model(Line(), {}, Velocity() if prediction == "v_prediction" else None))
    patcher.model_options |= options
    conds = [[{"prompt": torch.full((2, *SHAPE[-1:], *SHAPE[:2]), NUMBERS[name])}] for name in ("text", "empty")]
    return patcher, conds


def schedule(prediction="epsilon"):
    return EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing", prediction_type=prediction)


def initial(scheduler):
    scheduler.set_timesteps(STEPS)
    return nchw(np.asarray(draw_normal(image_keys(SEED, [0, 1]), 0, SHAPE))) * scheduler.init_noise_sigma


def under_one_layout(table):
    """The same rule as a table of all rows and two contrasts, so that one compiled program is that of all rules."""
    rows = tuple((network, prompt) for network in ("base", "pos", "neg", "bad") for prompt in ("empty", "text"))
    places = [table.rows.index(row) if row in table.rows else None for row in rows]

    def laid_out(part):  # [..., R, N]
        return np.stack([np.zeros_like(part[..., 0, :]) if r is None else part[..., r, :] for r in places], axis=-2)

    contrast, w = laid_out(table.contrast), table.w
    if w.shape[1] == 1:
        contrast, w = (np.concatenate([part, np.zeros_like(part)], axis=1) for part in (contrast, w))
    return dataclasses.replace(
        table,
        rows=rows,
        plans=(GuidanceStep(tuple(range(len(rows))), "new"),) * len(table.plans),
        **{"steady": laid_out(table.steady), "contrast": contrast, "w": w, "norms": (False,) * 2},
        extrapolation=np.zeros(w.shape[:2], np.float32),
    )


@jax.jit
def drawn(table, solver, keys, text, empty):
    return sample(predict, table, solver, keys, text, empty, SHAPE)


def ours(scheduler, s, rule, **terms):
    """Latents of flax_pref, and how many predictions they take."""
    solver = solver_from_config({**scheduler.config, "_class_name": "EulerDiscreteScheduler"}, STEPS)
    table = tabulate(named_rule(rule, guidance_scale=s, module="pos", **terms), STEPS, 2)
    evaluations = table.evaluations
    if table.text is None and all(plan.contrast != "reused" for plan in table.plans):
        table = under_one_layout(table)
    prompts = ({"encoder_hidden_states": np.full((2, *SHAPE), NUMBERS[name], np.float32)} for name in ("text", "empty"))
    return nchw(np.asarray(drawn(table, solver, image_keys(SEED, [0, 1]), *prompts))), evaluations


def theirs(nodes, scheduler, s, rule, prediction="epsilon", inner=0, **inputs):
    """Latents of the nodes, and how many predictions they took."""
    patcher, conds = line(prediction)
    x = initial(scheduler)
    patched = guide(nodes, patcher, line_modules(), rule, **inputs)
    latents = euler(patched, x, *conds, s, scheduler.sigmas, inner)
    return latents, sum(map(len, patcher.model.calls))


# Inputs of the node and, where it is another one, w as flags of flax_pref say it.
RULES = {
    "pgd": ({"w": 2.0}, "2"),
    "cpgd": ({"w": 2.0}, "2"),
    "cpgd_conditional": ({"w": 8.0}, "8"),
    "positive_only": ({"w": 2.0}, "2"),
    "negative_only": ({"w": 2.0}, "2"),
    "fine_tuned": ({}, None),
    "npo": ({}, None),
    "autoguidance": ({"w": 2.0}, "2"),
    "multi": ({"strengths": "pos=1.5,neg=-1"}, "pos=1.5,neg=-1"),
}
COURSES = {
    "interval": ({"w": 4.0, "start": 0.25, "stop": 0.7}, {"w": "4@0.25:0.7"}),
    "held": ({"w": 2.0, "start": 0.2, "every": 3}, {"w": "2@0.2:1", "every": 3}),
    "extrapolated": (
        {"w": 2.0, "every": 2, "between": "extrapolate"},
        {"w": "2", "every": 2, "between": "extrapolate"},
    ),
    "norm": ({"w": 0.5, "norm_matched": True}, {"w": "norm:0.5"}),
    "norm, held, rescaled": (
        {"w": 0.5, "norm_matched": True, "every": 2, "rescale": 0.6},
        {"w": "norm:0.5", "every": 2, "rescale": 0.6},
    ),
    "rescaled": ({"w": 3.0, "rescale": 0.7}, {"w": "3", "rescale": 0.7}),
    "schedule": ({"strengths": "linear:4:1@0:0.6"}, {"w": "linear:4:1@0:0.6"}),
    "by name": (
        {"strengths": "pos=3@0:0.5,neg=cosine:0:3@0.3:1", "every": 2},
        {"w": "pos=3@0:0.5,neg=cosine:0:3@0.3:1", "every": 2},
    ),
    "list": ({"strengths": "list:0:1:2:3:4:5:6:7"}, {"w": "list:0:1:2:3:4:5:6:7"}),
}


def test_the_rules_are_those_of_the_pipeline_for_diffusers():
    pipeline, own = ((INTEGRATIONS / name).read_text() for name in ("diffusers/pipeline.py", "comfyui/guidance.py"))
    start = own.index("# -----")
    rules, length = own[start:].split("\n\n\ndef _length")
    assert rules in pipeline and "\n\n\ndef _length" + length in pipeline + "\n"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_that_of_flax_pref(rule, prediction, nodes):
    inputs, w = RULES[rule]
    scheduler = schedule(prediction)
    references, evaluations = ours(scheduler, 5.0, rule, w=w)
    latents, predicted = theirs(nodes, scheduler, 5.0, rule, prediction, **inputs)
    assert relative_error(latents, references) < 1e-5
    assert predicted == evaluations + (STEPS if rule == "autoguidance" else 0)  # which has no use for "empty"


@pytest.mark.parametrize("course", COURSES)
def test_strengths_along_the_trajectory_are_those_of_flax_pref(course, nodes):
    inputs, terms = COURSES[course]
    # Of contrasts that are held, it matters what the network predicts.
    prediction = "v_prediction" if course in ("held", "norm, held, rescaled") else "epsilon"
    scheduler = schedule(prediction)
    references, evaluations = ours(scheduler, 5.0, "cpgd", **terms)
    latents, predicted = theirs(nodes, scheduler, 5.0, "cpgd", prediction, **inputs)
    assert relative_error(latents, references) < 1e-5
    assert predicted == evaluations


@pytest.mark.parametrize("norm", [False, True])
def test_without_a_guidance_scale_only_norms_need_the_empty_prompt(norm, nodes):
    w = "norm:0.5@0:0.5" if norm else "4@0:0.5"
    scheduler = schedule()
    references, _ = ours(scheduler, 1.0, "cpgd", w=w)
    latents, predicted = theirs(nodes, scheduler, 1.0, "cpgd", strengths=w)
    assert relative_error(latents, references) < 1e-5
    # With norms ComfyUI predicts for the empty prompt in every step.
    assert predicted == STEPS * (2 if norm else 1) + STEPS // 2 * 2


@pytest.mark.parametrize("norm", [False, True])
def test_in_one_step_rules_are_the_same_for_clean_latents_as_for_noise(norm, nodes):
    guidance = nodes.nodes.Guidance({"name": "cpgd", "guidance_scale": 5, "w": "norm:0.4" if norm else "2"}, 1)
    x, *noise = torch.randn(7, 2, 4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = dict(zip(guidance.rows(0), noise, strict=True))
    sigma = 3.7
    clean = {row: x - sigma * prediction for row, prediction in noise.items()}
    torch.testing.assert_close(
        guidance.combine(0, clean), x - sigma * guidance.combine(0, noise), rtol=1e-10, atol=1e-10
    )


def test_samplers_that_predict_several_times_in_a_step_get_the_same(nodes):
    for inputs in ({"every": 1}, {"every": 2, "between": "extrapolate"}):
        scheduler = schedule()
        alone, once = theirs(nodes, scheduler, 5.0, "cpgd", w=2.0, **inputs)
        more, thrice = theirs(nodes, scheduler, 5.0, "cpgd", w=2.0, inner=2, **inputs)
        # Of contrasts that are reused, the last prediction in a step counts, which is half-way to the next.
        assert relative_error(more, alone) < (1e-6 if inputs["every"] == 1 else 0.1)
        assert thrice == 3 * once


@torch.no_grad()
def test_a_contrast_is_predicted_in_a_later_step_of_its_group_if_the_sampler_left_out_the_first(nodes):
    scheduler = schedule()
    x, sigmas = initial(scheduler), scheduler.sigmas

    def second_step(every, before):
        patcher, conds = line()
        patched = guide(nodes, patcher, line_modules(), every=every)
        for step in (*before, 1):
            patcher.model.calls.clear()
            denoised = denoise(patched, x, sigmas[step].expand(2), *conds, 5.0, sigmas)
        return denoised, sum(map(len, patcher.model.calls))

    expected, rows = second_step(every=1, before=[])
    found, as_many = second_step(every=4, before=[])
    assert rows == as_many == 6 and relative_error(found, expected) < 1e-6
    _, fewer = second_step(every=4, before=[0])
    assert fewer == 2


def test_a_second_drawing_knows_nothing_of_the_first(nodes):
    scheduler, (patcher, conds) = schedule(), line()
    patched = guide(nodes, patcher, line_modules(), w=2.0, every=5, between="extrapolate")
    x = initial(scheduler)
    first, second = (euler(patched, x, *conds, 5.0, scheduler.sigmas) for _ in range(2))
    assert torch.equal(first, second)
    fewer = euler(patched, x, *conds, 5.0, scheduler.sigmas[3:])
    other, _ = line()
    fresh = guide(nodes, other, line_modules(), w=2.0, every=5, between="extrapolate")
    assert torch.equal(fewer, euler(fresh, x, *conds, 5.0, scheduler.sigmas[3:]))


def test_patches_of_other_nodes_see_their_two_prompts_and_nothing_of_a_module_stays(nodes):
    scheduler, (patcher, conds) = schedule(), line()
    seen = []

    def other(apply, call):
        seen.append(call["cond_or_uncond"])
        return apply(call["input"], call["timestep"], **call["c"])

    patcher.set_model_unet_function_wrapper(other)
    x, sigmas = initial(scheduler), scheduler.sigmas
    euler(guide(nodes, patcher, line_modules(), w=2.0), x, *conds, 5.0, sigmas)
    # The last row comes first in a batch, and the rule asks for "empty" before "text".
    assert seen == patcher.model.calls == [[1, 0], [0, 1, 0, 1]] * STEPS
    layer = patcher.model.diffusion_model.scale
    assert not layer._forward_hooks
    assert torch.equal(layer.weight, Line().scale.weight)


def test_rows_that_do_not_fit_together_are_predicted_in_turns(nodes):
    results = []
    for rows in (1, 3, 4):
        patcher, conds = line(rows_that_fit=rows)
        scheduler = schedule()
        x = initial(scheduler)
        results.append(euler(guide(nodes, patcher, line_modules(), w=2.0), x, *conds, 5.0, scheduler.sigmas))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_the_model_that_comes_in_is_not_patched_and_clones_share_the_modules(nodes):
    patcher, _ = line()
    modules = line_modules()
    patched = guide(nodes, patcher, modules)
    assert patcher.model_options == {"transformer_options": {}}
    function = patched.clone().model_options["sampler_cfg_function"]
    assert function is patched.model_options["sampler_cfg_function"]  # a deep copy would copy the weights


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"strengths": "up"}, "'up' is no strength"),
        ({"strengths": "pos=1"}, "expected strengths for pos, neg"),
        ({"strengths": "a=1", "rule": "multi"}, "rule multi: there is no module 'a'; expected pos or neg"),
        ({"start": 0.7, "stop": 0.3}, "is no strength"),
        ({"rule": "npo", "rescale": 0.5}, "rescale does not apply to rule npo; expected 0"),
        ({"norm_matched": True, "rule": "autoguidance"}, "norm: is measured by what guidance adds"),
        ({"modules": ("pos",)}, "rule cpgd: there is no module 'neg'; choose a negative one in Load preference"),
        ({"modules": ("neg",), "rule": "pgd"}, "rule pgd: there is no module 'pos'; choose a positive one"),
        ({"modules": ("pos",), "rule": "autoguidance"}, "there is no module 'bad'; choose a negative one"),
    ],
)
def test_a_mistake_is_told_by_the_node(inputs, message, nodes):
    modules = {name: module for name, module in line_modules().items() if name in inputs.get("modules", ("pos", "neg"))}
    inputs = {name: value for name, value in inputs.items() if name != "modules"}
    with pytest.raises(ValueError, match=re.escape(message)) as told:
        guide(nodes, line()[0], modules, **inputs)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("rule", ["cpgd", "npo"])
def test_a_second_node_of_the_kind_is_refused(rule, nodes):
    patched = guide(nodes, line()[0], line_modules(), rule)
    with pytest.raises(ValueError, match="another node has set sampler_"):
        guide(nodes, patched, line_modules(), rule)


# ----------------------------------------------------------------------------------------------------------------------
# Files, in small networks of both families


class UNetModel(Model):
    """A model of a UNet of diffusers."""

    def predict(self, x, context, **added):
        return self.diffusion_model(x, 500, context, added_cond_kwargs=added).sample


@pytest.fixture(scope="module", params=UNETS)
def family(request, loras, tmp_path_factory):
    """A UNet, its modules as files in every layout, and a patcher of it."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    randomised(UNet2DConditionModel.from_config(UNETS[name])).save_pretrained(folder)
    network = load_unet(folder)
    for seed, module in enumerate(("pos", "neg")):
        unet = UNet2DConditionModel.from_pretrained(folder)
        config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **(RANKS if module == "pos" else {}))
        unet.add_adapter(config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in (parameter for key, parameter in unet.named_parameters() if "lora_" in key):
            parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
        unet.save_lora_adapter(loras, weight_name=f"{name}_{module}.safetensors")
        lora, _, alpha = load_lora(loras / f"{name}_{module}.safetensors", network)
        # diffusers has written the positive one of its layout, and flax_pref all others.
        layouts = [("kohya", "_kohya.safetensors"), ("peft", "_peft"), ("diffusers", ".safetensors")]
        for layout, ending in layouts[: 2 if module == "pos" else 3]:
            save_lora(lora, loras / f"{name}_{module}{ending}", alpha=alpha, layout=layout, config=network.config)
    unet = UNet2DConditionModel.from_pretrained(folder).eval()
    layers = {key.removesuffix(".weight") for key in unet.state_dict() if key.endswith(".weight")}
    kernels = {".".join(map(str, path[:-1])) for path in flatten_dict(network.params) if path[-1] == "kernel"}
    original = unet_layers(kernels, network.config)
    patcher = ModelPatcher(UNetModel(unet, {layer: original.get(layer, layer) for layer in layers}))
    return name, network, folder, patcher


LAYOUTS = {"diffusers": ".safetensors", "kohya": "_kohya.safetensors", "peft": "_peft/adapter_model.safetensors"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_every_layout_are_the_weights_that_flax_pref_reads(layout, family, nodes, loras):
    name, network, _, patcher = family
    files = [f"{name}_{module}{LAYOUTS[layout]}" for module in ("pos", "neg")]
    (modules,) = nodes.LoadPreferenceModules().load(patcher, *files)
    for module, file in zip(("pos", "neg"), files, strict=True):
        lora, rank, alpha = load_lora(loras / file, network)
        expected = flatten_dict(lora)
        layers = {path[:-1] for path in expected}
        assert len(layers) == len(modules[module]) > 20
        for path in layers:
            a, b = (np.asarray(expected[*path, leaf][0], np.float64) for leaf in ("lora_a", "lora_b"))
            delta = alpha / rank * (a @ b)
            found = modules[module]["diffusion_model." + ".".join(map(str, path))]
            a, b = (matrix.double().flatten(1).numpy() for matrix in found)
            kernel = delta.transpose(-1, -2, *range(delta.ndim - 2)).reshape(len(b), -1)
            np.testing.assert_allclose(b @ a, kernel, rtol=1e-5, atol=1e-7)


def conditionings(network):
    generator = torch.Generator().manual_seed(5)
    conds = []
    for _ in range(2):
        cond = {"context": torch.randn(2, 5, network.config.cross_attention_dim, generator=generator)}
        if network.config.addition_embed_type == "text_time":
            cond |= {"text_embeds": torch.randn(2, 10, generator=generator), "time_ids": torch.ones(2, 6)}
        conds.append([cond])
    return conds


@torch.no_grad()
def test_a_network_with_modules_predicts_as_diffusers_with_adapters(family, nodes, loras):
    name, network, folder, patcher = family
    (modules,) = nodes.LoadPreferenceModules().load(patcher, f"{name}_pos.safetensors", f"{name}_neg_kohya.safetensors")
    x, sigma = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1)), torch.tensor([2.0, 2.0])
    text, empty = conditionings(network)
    conds = {"text": text, "empty": empty}
    rows = [("pos", "text"), ("neg", "empty"), ("neg", "text"), ("pos", "empty")]
    options = {"transformer_options": {}}
    found = nodes.nodes.Predictor(modules)(rows, conds, patcher.model, x, sigma, options)
    for (module, prompt), denoised in zip(rows, found, strict=True):
        unet = UNet2DConditionModel.from_pretrained(folder).eval()
        unet.load_lora_adapter(
            loras, weight_name=f"{name}_{module}.safetensors", prefix=None if module == "pos" else "unet"
        )
        (reference,) = calc_cond_batch(UNetModel(unet, {}), [conds[prompt]], x, sigma, options)
        (base,) = calc_cond_batch(patcher.model, [conds[prompt]], x, sigma, options)
        assert relative_error(denoised, reference) < 1e-5
        assert relative_error(base, reference) > 1e-2


def rewritten(loras, change, metadata=True, source="sd15_pos.safetensors"):
    """A damaged copy of a file."""
    tensors = load_file(loras / source)
    with safe_open(loras / source, "pt") as stored:
        kept = stored.metadata() if metadata else {}
    change(tensors, kept)
    save_file(tensors, loras / "damaged.safetensors", kept)


FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def renamed(tensors, old, new):
    tensors[new] = tensors.pop(old)


DAMAGES = {
    "another layer": (
        lambda tensors, _: renamed(tensors, f"{FIRST}.lora_A.weight", "unet.blocks.7.to_q.lora_A.weight"),
        "weight 'unet.blocks.7.to_q.lora_A.weight' has no place in the model; this model has no such layer",
    ),
    "text encoder": (
        lambda tensors, _: tensors.update({"lora_te_text_model_x.lora_down.weight": torch.ones(1, 1)}),
        "it adapts a text encoder: take a file that adapts the UNet alone",
    ),
    "no LoRA": (
        lambda tensors, _: tensors.update({"lora_unet_conv_in.hada_w1_a": torch.ones(1, 1)}),
        "'lora_unet_conv_in.hada_w1_a' has no place in the model; expected plain LoRA",
    ),
    "no B": (
        lambda tensors, _: tensors.pop(f"{FIRST}.lora_B.weight"),
        f"no weight '{FIRST}.lora_B.weight' beside '{FIRST}.lora_A.weight'",
    ),
    "twice": (
        lambda tensors, _: tensors.update({f"unet.{FIRST}.lora_A.weight": torch.ones(4, 8)}),
        "are the same weight of one layer; expected one of them",
    ),
    "another shape": (
        lambda tensors, _: tensors.update({f"{FIRST}.lora_A.weight": torch.ones(4, 5)}),
        f"weight '{FIRST}.lora_A.weight' has shape [4, 5], expected [4, 8]",
    ),
    "not finite": (
        lambda tensors, _: tensors[f"{FIRST}.lora_A.weight"].fill_(float("nan")),
        f"weight '{FIRST}.lora_A.weight' holds NaN or infinity",
    ),
    "another rank": (
        lambda tensors, kept: kept.update(lora_adapter_metadata='{"unet.r": 3}'),
        "has rank 4, but its configuration says 3",
    ),
    "DoRA": (
        lambda tensors, kept: kept.update(lora_adapter_metadata='{"unet.use_dora": true}'),
        "use_dora=True is not supported; expected plain LoRA",
    ),
    "no JSON": (
        lambda tensors, kept: kept.update(lora_adapter_metadata="{"),
        "the configuration of PEFT is not a JSON object",
    ),
    "alpha": (
        lambda tensors, _: tensors.update({f"{FIRST}.alpha": torch.tensor(0.0)}),
        f"'{FIRST}.alpha' is 0.0; expected one positive number",
    ),
    "only alpha": (
        lambda tensors, _: (tensors.clear(), tensors.update({"lora_unet_conv_in.alpha": torch.tensor(1.0)})),
        "no matrices beside 'lora_unet_conv_in.alpha'",
    ),
}


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_cannot_be_read_whole_is_refused(damage, family, nodes, loras):
    change, message = DAMAGES[damage]
    rewritten(loras, change)
    with pytest.raises(ValueError, match=re.escape(message)) as told:
        nodes.LoadPreferenceModules().load(family[3], "damaged.safetensors", "none")
    assert "damaged.safetensors" in str(told.value) and "\n" not in str(told.value)


def test_modules_of_another_model_are_refused(nodes):
    modules = {"pos": {"diffusion_model.other": line_modules()["pos"]["diffusion_model.scale"]}}
    message = "module pos: its layer 'diffusion_model.other' does not fit the model; connect Load preference modules"
    with pytest.raises(ValueError, match=message):
        guide(nodes, line()[0], modules, "pgd")


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_files_of_other_kinds_are_refused(family, nodes, loras):
    patcher, load = family[3], nodes.LoadPreferenceModules().load
    (loras / "pickle.pt").write_bytes(b"x")
    (loras / "cut.safetensors").write_bytes((loras / "sd15_pos.safetensors").read_bytes()[:99])
    shutil.copy(loras / "sd15_pos_peft" / "adapter_model.safetensors", loras / "adapter_model.safetensors")
    for file, message in (
        ("pickle.pt", "pickle.pt: is no .safetensors file"),
        ("cut.safetensors", "cut.safetensors: not a complete safetensors file"),
        ("adapter_model.safetensors", "needs the adapter_config.json of its folder beside it"),
        ("none", "no file is chosen; expected a positive or a negative module"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load(patcher, file, "none")


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_older_names_of_diffusers_and_rslora_are_read(family, nodes, loras):
    patcher = family[3]
    reference = nodes.LoadPreferenceModules().load(patcher, "sd15_neg.safetensors", "none")[0]["pos"]
    layer = f"diffusion_model.{FIRST}"

    def old(tensors, _):
        a, b = (tensors[f"unet.{FIRST}.lora_{part}.weight"] for part in "AB")
        tensors.clear()
        processor = "unet." + FIRST.replace(".to_q", ".processor.to_q")
        tensors |= {f"{processor}_lora.down.weight": a, f"{processor}_lora.up.weight": b}

    rewritten(loras, old, metadata=False, source="sd15_neg.safetensors")
    found = nodes.LoadPreferenceModules().load(patcher, "damaged.safetensors", "none")[0]["pos"]
    torch.testing.assert_close(1.5 * found[layer][1], reference[layer][1])  # alpha 6 of rank 4, and none in old files
    rewritten(
        loras,
        lambda _, kept: kept.update(lora_adapter_metadata='{"r": 4, "lora_alpha": 6, "use_rslora": true}'),
        source="sd15_neg.safetensors",
    )
    found = nodes.LoadPreferenceModules().load(patcher, "damaged.safetensors", "none")[0]["pos"]
    torch.testing.assert_close(found[layer][1], 2 * reference[layer][1])


# ----------------------------------------------------------------------------------------------------------------------
# The workflow

# Of ComfyUI's own nodes: types by input, names of widgets as their values are listed, and types of outputs.
STOCK = {
    "CheckpointLoaderSimple": ({}, ["ckpt_name"], ["MODEL", "CLIP", "VAE"]),
    "CLIPTextEncode": ({"clip": "CLIP"}, ["text"], ["CONDITIONING"]),
    "EmptyLatentImage": ({}, ["width", "height", "batch_size"], ["LATENT"]),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        ["seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler", "denoise"],
        ["LATENT"],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, [], ["IMAGE"]),
    "SaveImage": ({"images": "IMAGE"}, ["filename_prefix"], []),
}


def interface(nodes, kind):
    """Sockets, widgets and outputs of a class of nodes, and what each widget of ours may be."""
    if kind in STOCK:
        return *STOCK[kind], {}
    node = nodes.NODE_CLASS_MAPPINGS[kind]
    declared = node.INPUT_TYPES()
    inputs = {name: entry for part in ("required", "optional") for name, entry in declared.get(part, {}).items()}
    sockets = {name: entry[0] for name, entry in inputs.items() if entry[0] in ("MODEL", "PREFERENCE_MODULES")}
    widgets = {name: entry for name, entry in inputs.items() if name not in sockets}
    return sockets, list(widgets), list(node.RETURN_TYPES), widgets


def test_the_example_workflow_fits_the_nodes(nodes):
    (file,) = (INTEGRATIONS / "comfyui" / "example_workflows").glob("*.json")
    flow = json.loads(file.read_text())
    by_id = {node["id"]: node for node in flow["nodes"]}
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    assert set(nodes.NODE_CLASS_MAPPINGS) < {node["type"] for node in flow["nodes"]}
    for node in flow["nodes"]:
        sockets, widgets, outputs, choices = interface(nodes, node["type"])
        assert {entry["name"]: entry["type"] for entry in node["inputs"]} == sockets
        assert all(entry["link"] is not None for entry in node["inputs"])
        assert [entry["type"] for entry in node["outputs"]] == outputs
        values = dict(zip(widgets, node["widgets_values"], strict=True))
        for name, (kind, *options) in choices.items():
            if node["type"] == "LoadPreferenceModules":
                assert values[name].endswith(".safetensors")
            elif isinstance(kind, list):
                assert values[name] in kind
            else:
                assert type(values[name]) is {"FLOAT": float, "INT": int, "BOOLEAN": bool, "STRING": str}[kind]
                assert values[name] == options[0]["default"]
    for link, source, slot, target, place, kind in flow["links"]:
        assert link in by_id[source]["outputs"][slot]["links"] and by_id[source]["outputs"][slot]["type"] == kind
        assert by_id[target]["inputs"][place]["link"] == link and by_id[target]["inputs"][place]["type"] == kind
    linked = [entry["link"] for node in flow["nodes"] for entry in node["inputs"]]
    assert sorted(linked) == sorted(link[0] for link in flow["links"])
    assert flow["last_link_id"] == max(linked) and flow["last_node_id"] == max(by_id)
