"""Banks of networks: the same images as separate networks, at the price that was promised."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_pref.checkpoints.diffusers import Pipeline
from flax_pref.checkpoints.lora import load_lora_network, lora_network, merge_lora_network, save_lora
from flax_pref.checkpoints.tokenizer import CLIPTokenizer
from flax_pref.diffusion.guidance import cfg, cpgd, cpgd_conditional, pgd, tabulate
from flax_pref.diffusion.latents import decode_latents
from flax_pref.diffusion.sampler import image_keys, sample
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.text_to_image import TextToImage
from flax_pref.diffusion.timestep_solvers import ddim
from flax_pref.models.bank import AXIS, Bank, Member, stack
from flax_pref.models.clip import CLIPTextConfig, CLIPTextModel
from flax_pref.models.lora import join_lora, select_lora, split_lora
from flax_pref.models.network import Network
from flax_pref.models.unet import UNet2DCondition, UNetConfig
from flax_pref.models.vae import AutoencoderKL, VAEConfig

CONFIG = UNetConfig(
    block_out_channels=(8,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    cross_attention_dim=8,
    attention_head_dim=2,
    norm_num_groups=4,
)
SHAPE, IMAGES, TOKENS, STEPS = (12, 8, 4), 8, 5, 4
SOLVER = ddim(
    NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    STEPS,
    steps_offset=1,
    set_alpha_to_one=False,
)
W, S = 2.0, 3.0
RANK, ALPHA = 3, 6.0


# ----------------------------------------------------------------------------------------------------------------------
# Networks, and images of them one after another


@functools.cache
def full(seed: int) -> Network:
    """A network whose weights are all its own."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: UNet2DCondition(CONFIG, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    noise = jax.tree.map(lambda x: np.float32(0.2) * rng.standard_normal(x.shape, np.float32), nnx.to_pure_dict(state))
    return Network(CONFIG, graphdef, noise)


def adapted(network: Network, modules: tuple[str, ...] = ("pos", "neg")) -> Network:
    """The network with adapters that change something, the same ones for every network."""
    bank = lora_network(network, modules, rank=RANK, alpha=ALPHA, key=jax.random.key(0))
    rng = np.random.default_rng(9)
    lora = jax.tree.map(
        lambda x: np.float32(0.3) * rng.standard_normal(x.shape, np.float32), split_lora(bank.params)[1]
    )
    return bank._replace(params=join_lora(network.params, lora))


def merged(network: Network, bank: Network, module: str) -> Network:
    return merge_lora_network(network, bank, {module: 1.0})


def bank_of(**networks: Network) -> Bank:
    return Bank(tuple(Member(name, network.graphdef, network.params) for name, network in networks.items()))


def conditioning() -> tuple[dict, dict]:
    rng = np.random.default_rng(3)
    text = rng.standard_normal((IMAGES, TOKENS, 8), np.float32)
    return {"encoder_hidden_states": text}, {"encoder_hidden_states": rng.standard_normal((TOKENS, 8), np.float32)}


@functools.partial(jax.jit, static_argnames="graphdef")
def predict_alone(graphdef, params, latents, t, text):
    return nnx.merge(graphdef, params)(latents, jnp.broadcast_to(t, len(latents)), **text)


def draw_alone(networks: dict[str, Network], formula, keys, text, empty, shape=SHAPE) -> np.ndarray:
    """The formula as a loop that calls one network after another for one prompt at a time."""
    x = np.stack([jax.random.normal(jax.random.fold_in(key, 0), shape) for key in keys])
    empty = jax.tree.map(lambda text, empty: np.broadcast_to(empty, text.shape), text, empty)
    prompts = {"text": text, "empty": empty}
    for i, t in enumerate(SOLVER.timesteps):

        def eps(network, prompt, x=x, t=t):
            graphdef, params = networks[network].graphdef, networks[network].params
            return np.asarray(predict_alone(graphdef, params, x, t, prompts[prompt]))

        estimate = SOLVER.estimate_from_latents[i] * x + SOLVER.estimate_from_pred[i] * formula(eps)
        x = SOLVER.latents_coef[i] * x + SOLVER.estimate_coefs[i, 0] * estimate
    return x


def guided(eps, network):
    return (1 - S) * eps(network, "empty") + S * eps(network, "text")


CAP = 0.2


def capped(eps):
    added = W * (guided(eps, "pos") - guided(eps, "neg"))
    lengths, most = (np.sqrt(np.square(x).sum((1, 2, 3))) for x in (added, guided(eps, "base") - eps("base", "empty")))
    assert (lengths > CAP * most).all()
    return (CAP * most / lengths)[:, None, None, None] * added


RULES = {
    "cfg": (cfg(S), lambda eps: guided(eps, "base")),
    "pgd": (
        pgd(W, S, "pos", reference="own"),
        lambda eps: guided(eps, "base") + W * (guided(eps, "pos") - guided(eps, "own")),
    ),
    "cpgd": (cpgd(W, S), lambda eps: guided(eps, "base") + W * (guided(eps, "pos") - guided(eps, "neg"))),
    "cpgd_conditional": (
        cpgd_conditional(W, S),
        lambda eps: guided(eps, "base") + W * (eps("pos", "text") - eps("neg", "text")),
    ),
    "cpgd, shaped": (cpgd(W, S, shaping=f"cap:{CAP}"), lambda eps: guided(eps, "base") + capped(eps)),
}


@jax.jit
def draw_together(bank, table, keys, text, empty):
    return sample(bank, table, SOLVER, keys, text, empty, SHAPE)


def arguments(bank, rule):
    return bank, tabulate(rule, STEPS, IMAGES), image_keys(0, range(IMAGES)), *conditioning()


def draw(bank, rule) -> np.ndarray:
    return np.asarray(draw_together(*arguments(bank, rule)))


def expected(networks: dict[str, Network], name: str) -> np.ndarray:
    return draw_alone(networks, RULES[name][1], image_keys(0, range(IMAGES)), *conditioning())


def error(got, want) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def differ(one, other) -> bool:
    """Whether images differ by so much that taking one for the other could not pass."""
    return error(one, other) > 0.05


# ----------------------------------------------------------------------------------------------------------------------
# Images


def test_full_networks_in_turn_draw_what_separate_networks_draw():
    networks = {"base": full(0), "pos": full(1), "neg": full(2)}
    # The order of members decides nothing.
    images = draw(bank_of(neg=networks["neg"], base=networks["base"], pos=networks["pos"]), cpgd(W, S))
    assert error(images, expected(networks, "cpgd")) < 1e-5
    assert differ(images, expected(networks, "cfg"))


def test_adapters_move_to_another_base_and_draw_what_merged_networks_draw(tmp_path):
    own, new = full(0), full(1)
    lora = split_lora(adapted(own).params)[1]
    files = {name: tmp_path / f"{name}.safetensors" for name in ("pos", "neg")}
    for i, file in enumerate(files.values()):
        save_lora(select_lora(lora, i), file, alpha=ALPHA)
    drawn = []
    for base in (own, new):
        unet = load_lora_network(base, files)
        separate = {"base": base, "pos": merged(base, unet, "pos"), "neg": merged(base, unet, "neg")}
        drawn.append(draw(bank_of(base=unet), cpgd(W, S)))
        assert error(drawn[-1], expected(separate, "cpgd")) < 1e-5
        assert differ(drawn[-1], expected(separate, "cfg"))
    assert differ(*drawn)


def tiny_pipeline(unet: Network) -> Pipeline:
    def network(module, config):
        graphdef, state = nnx.split(module(config, rngs=nnx.Rngs(0)))
        return Network(config, graphdef, nnx.to_pure_dict(state))

    text = CLIPTextConfig(
        vocab_size=4,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=2,
        eos_token_id=3,
    )
    return Pipeline(
        unet=unet,
        vae=network(AutoencoderKL, VAEConfig(block_out_channels=(8,), norm_num_groups=4)),
        text_encoders=(network(CLIPTextModel, text),),
        tokenizers=(
            CLIPTokenizer({t: i for i, t in enumerate(["a", "a</w>", "<|startoftext|>", "<|endoftext|>"])}, [], 5),
        ),
        scheduler_config={},
    )


def test_modules_guide_another_base_by_their_difference_on_their_own():
    new, own = full(1), full(0)
    modules = adapted(own)
    draw = TextToImage(tiny_pipeline(new), SOLVER, SHAPE[:2], IMAGES, modules={"own": modules})
    prompts, keys = ["a", "a a", "a a a", ""] * 2, image_keys(0, range(IMAGES))
    conditioning = draw.conditioning(prompts, None)
    separate = {"base": new, "own": own, "pos": merged(own, modules, "pos"), "neg": merged(own, modules, "neg")}
    want = {name: draw_alone(separate, RULES[name][1], keys, *conditioning) for name in ("cfg", "cpgd", "pgd")}
    assert differ(want["cfg"], want["cpgd"])
    assert differ(want["cfg"], want["pgd"])

    images = draw(prompts, range(IMAGES), RULES["cpgd"][0], seed=0)
    assert error(images, decode_latents(draw.placed.vae, want["cpgd"])) < 1e-5
    latents = draw_together(draw.bank, tabulate(RULES["pgd"][0], STEPS, IMAGES), keys, *conditioning)
    assert error(latents, want["pgd"]) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# What a bank costs


def inputs(rows: int) -> tuple[jax.Array, jax.Array, dict]:
    rng = np.random.default_rng(5)
    latents = rng.standard_normal((IMAGES, rows, *SHAPE), np.float32)
    text = rng.standard_normal((IMAGES, rows, TOKENS, 8), np.float32)
    return latents, np.arange(IMAGES) * 37, {"encoder_hidden_states": text}


def flops(network: Network, *rows: str) -> float:
    lowered = jax.jit(lambda bank, *inputs: bank(rows, *inputs)).lower(bank_of(base=network), *inputs(len(rows)))
    return lowered.cost_analysis()["flops"]


def test_rows_of_the_base_pay_nothing_for_adapters():
    plain, bank = full(0), adapted(full(0))
    assert flops(bank, "base", "base") == flops(plain, "base", "base")
    without = flops(plain, "base", "base", "base")
    extra = {rows: flops(bank, *rows) - without for rows in (("base", "base", "pos"), ("pos", "pos", "pos"))}
    assert 0 < extra["base", "base", "pos"] < 0.5 * extra["pos", "pos", "pos"]


def test_all_rows_of_base_and_adapters_take_one_pass(monkeypatch):
    passes, call = [], UNet2DCondition.__call__

    def counting(self, latents, *args, **kwargs):
        passes.append(len(latents))
        return call(self, latents, *args, **kwargs)

    monkeypatch.setattr(UNet2DCondition, "__call__", counting)
    rows = ("base", "base", "pos", "pos", "neg", "neg")
    jax.eval_shape(functools.partial(bank_of(base=adapted(full(0))), rows), *inputs(6))
    assert passes == [6 * IMAGES]


def products(jaxpr) -> int:
    """Matrix products of a program, those of a loop once."""
    inner = [value for one in jaxpr.eqns for value in one.params.values()]
    closed = [value.jaxpr for value in inner if hasattr(value, "jaxpr")]
    return sum(one.primitive.name == "dot_general" for one in jaxpr.eqns) + sum(map(products, closed))


@pytest.mark.parametrize("kind", ["adapters", "full"])
def test_what_layers_make_of_a_prompt_is_made_once_and_not_in_every_step(kind):
    full_networks = {"base": full(0), "pos": full(1), "neg": full(2)}
    bank = bank_of(**full_networks) if kind == "full" else bank_of(base=adapted(full(0)))

    def counts(predict) -> tuple[int, int]:
        def drawn(table, keys, text, empty):
            return sample(predict, table, SOLVER, keys, text, empty, SHAPE)

        program = jax.make_jaxpr(drawn)(*arguments(bank, cpgd(W, S))[1:])
        (loop,) = [one for one in program.eqns if one.primitive.name == "scan" and one.params["length"] == STEPS]
        inside = products(loop.params["jaxpr"].jaxpr)
        return products(program.jaxpr) - inside, inside

    before, step = counts(lambda *inputs: bank(*inputs))
    outside, inside = counts(bank)
    layers = len(nnx.merge(bank.members[0].graphdef, bank.members[0].params).attentions_to_text())
    # Keys and values, each with two products more for the adapters, or in each network.
    assert outside - before == step - inside == 2 * 3 * layers > 0


def test_keys_and_values_made_before_are_those_of_the_encoded_prompt():
    config = dataclasses.replace(CONFIG, only_cross_attention=True)  # where the first attention sees the text too
    unet = UNet2DCondition(config, rngs=nnx.Rngs(0))
    unet.conv_out.kernel[...] = jnp.ones_like(unet.conv_out.kernel[...])
    latents, timesteps, text = inputs(1)
    latents, text = latents[:, 0], text["encoder_hidden_states"][:, 0]
    want = unet(latents, timesteps, text)
    np.testing.assert_array_equal(unet(latents, timesteps, unet.project_text(text)), want)
    assert len(unet.project_text(text)) == 2 * 4  # of four blocks
    assert differ(unet(latents, timesteps, unet.project_text(text[::-1])), want)


def test_adapters_add_their_own_bytes_to_a_base_that_exists_once():
    plain = full(0)
    bank = jax.tree.leaves(bank_of(base=adapted(plain)))
    base = jax.tree.leaves(plain.params)
    assert {id(leaf) for leaf in base} <= {id(leaf) for leaf in bank}
    names = {"to_q", "to_k", "to_v", "to_out"}
    kernels = [leaf for path, leaf in flatten_dict(plain.params).items() if names & set(path) and path[-1] == "kernel"]
    adapters = sum(2 * RANK * sum(kernel.shape) * 4 for kernel in kernels)
    assert sum(leaf.nbytes for leaf in bank) == sum(leaf.nbytes for leaf in base) + adapters


# ----------------------------------------------------------------------------------------------------------------------
# Devices


COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def collectives(text: str) -> list[tuple[str, int]]:
    """What devices send each other in a compiled program: kind, and elements of one device's result."""
    found = []
    for shapes, kind in COLLECTIVE.findall(text):
        sizes = [np.prod(list(map(int, filter(None, dims.split(","))))) for dims in re.findall(r"\[([\d,]*)\]", shapes)]
        found.append((kind, int(sum(sizes))))
    return found


def compiled(function, *args) -> tuple[np.ndarray, list[tuple[str, int]]]:
    program = function.lower(*args).compile()
    return np.asarray(program(*args)), collectives(program.as_text())


def on_devices() -> dict:
    """What is to be measured with eight devices, as JSON knows it."""
    networks = {"base": full(0), "pos": full(1), "neg": full(2), "own": full(3)}
    separate = {name: expected(networks, name) for name in ("cfg", "cpgd", "cpgd_conditional", "cpgd, shaped")}
    devices, report = np.array(jax.devices()), {}

    def mesh_of(**axes):
        return Mesh(devices[: np.prod(list(axes.values()))].reshape(*axes.values()), tuple(axes))

    def split(mesh, bank, rule):
        """Arguments whose images lie on the mesh as those of TextToImage."""
        sharding = NamedSharding(mesh, PartitionSpec(tuple(name for name in mesh.axis_names if name != AXIS)))
        bank, table, keys, text, empty = arguments(bank, rule)
        return bank, table, *jax.device_put((keys, text), sharding), empty

    def stacked(mesh, *names):
        return stack({name: (networks[name].graphdef, networks[name].params) for name in names}, mesh)

    three = ("base", "pos", "neg")
    for axes, names, name in (
        ({AXIS: 3}, three, "cpgd"),
        ({AXIS: 3, "data": 2}, three, "cpgd_conditional"),
        ({AXIS: 4, "data": 2}, three, "cpgd"),  # one of four idle, for slices whose chips cannot be divided by three
        ({"data": 4, AXIS: 2}, ("own", "neg", "base", "pos"), "cpgd_conditional"),  # two networks each, in turn
        ({AXIS: 1}, three, "cfg"),
        ({AXIS: 3, "data": 2}, three, "cpgd, shaped"),
    ):
        mesh, rule = mesh_of(**axes), RULES[name][0]
        images, sent = compiled(draw_together, *split(mesh, stacked(mesh, *names), rule))
        latents = IMAGES // (mesh.size // mesh.shape[AXIS]) * np.prod(SHAPE)
        report[f"{name} on {axes}"] = {
            "error": error(images, separate[name]),
            "kinds": [kind for kind, _ in sent],
            "latents": max(size for _, size in sent) / latents,
            "rows": len(tabulate(rule, STEPS, 1).rows),
        }

    mesh = mesh_of(**{AXIS: 3, "data": 2})
    bank = stacked(mesh, *three)
    held = Counter()
    for shard in (shard for leaf in jax.tree.leaves(bank) for shard in leaf.addressable_shards):
        held[shard.device.id] += shard.data.nbytes
    report["bytes"] = [sum(leaf.nbytes for leaf in jax.tree.leaves(networks["base"].params)), *held.values()]

    rows = ("neg", "base", "pos", "base")
    weights = np.random.default_rng(0).standard_normal((2, 4, IMAGES), np.float32)
    sums, sent = compiled(
        jax.jit(lambda bank, weights, *inputs: bank.combine(weights, rows, *inputs)), bank, weights, *inputs(4)
    )
    latents, t, text = inputs(4)
    alone = [jax.tree.map(lambda x, r=r: x[:, r], (latents, text)) for r in range(4)]
    members = [(networks[name].graphdef, networks[name].params) for name in rows]
    predictions = [predict_alone(*members[r], alone[r][0], t, alone[r][1]) for r in range(4)]
    report["combine"] = {
        "error": error(sums, np.einsum("krb,rbhwc->kbhwc", weights, predictions)),
        "sent": [[kind, size / (IMAGES // 2 * np.prod(SHAPE))] for kind, size in sent],
    }

    mesh, lora = mesh_of(data=8), adapted(full(0))
    bank = jax.device_put(bank_of(base=lora), NamedSharding(mesh, PartitionSpec()))
    images, sent = compiled(draw_together, *split(mesh, bank, cpgd(W, S)))
    merged_ones = {"base": full(0), **{name: merged(full(0), lora, name) for name in ("pos", "neg")}}
    report["data"] = {"error": error(images, expected(merged_ones, "cpgd")), "sent": sent}

    # A module with text encoders of its own; their first layers are those of the checkpoint.
    pipeline = tiny_pipeline(networks["base"])
    encoder = pipeline.text_encoders[0]
    norm = encoder.params["text_model"]["final_layer_norm"]
    other = {"text_model": encoder.params["text_model"] | {"final_layer_norm": jax.tree.map(lambda x: x - 0.5, norm)}}
    modules = {name: networks[name] for name in ("pos", "neg")}
    own = {"pos": (encoder._replace(params=other),)}
    drawn = []
    for mesh, text_encoders in (
        (None, own),
        (None, {}),
        (mesh_of(data=4), own),
        (mesh_of(**{AXIS: 3, "data": 2}), own),
    ):
        options = {"modules": modules, "mesh": mesh, "text_encoders": text_encoders}
        draw = TextToImage(pipeline, SOLVER, SHAPE[:2], IMAGES, **options)
        drawn.append(draw(["a", "a a", "a a a", ""] * 2, rule=cpgd(W, S), seed=0))
    report["text encoders"] = [error(images, drawn[0]) for images in drawn[1:]]

    try:
        stacked(mesh_of(**{AXIS: 4}), "base", "pos")
    except ValueError as refusal:
        report["refused"] = str(refusal)
    return report


@pytest.fixture(scope="module")
def report():
    command = [sys.executable, "-W", "error", Path(__file__)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.program
def test_networks_side_by_side_draw_what_separate_networks_draw(report):
    found = {name: part for name, part in report.items() if " on " in name}
    print(json.dumps(found, indent=1))
    assert len(found) == 6
    assert {name: part["error"] for name, part in found.items() if part["error"] >= 1e-5} == {}


@pytest.mark.program
def test_networks_side_by_side_send_each_other_one_reduction_of_latents_in_a_step(report):
    for name, part in report.items():
        if " on " in name:
            assert part["kinds"] == ["all-reduce"], name
            # A contrast is shaped by lengths of sums: guided and for the text, both steady and contrast, and empty.
            assert part["latents"] == (5.0 if "shaped" in name else 1.0), name


@pytest.mark.program
def test_weighted_sums_of_predictions_are_reduced_as_sums(report):
    assert report["combine"]["error"] < 1e-5
    assert report["combine"]["sent"] == [["all-reduce", 2.0]]


@pytest.mark.program
def test_side_by_side_each_device_holds_one_network(report):
    one, *held = report["bytes"]
    assert held == [one] * 6


@pytest.mark.program
def test_text_encoders_of_a_module_encode_on_any_mesh(report):
    without, data, side_by_side = report["text encoders"]
    print(report["text encoders"])
    assert without > 1e-3 and max(data, side_by_side) < 1e-5


@pytest.mark.program
def test_devices_that_share_a_batch_send_each_other_nothing(report):
    assert report["data"]["error"] < 1e-5
    assert report["data"]["sent"] == []


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def ask(bank, *rows):
    jax.eval_shape(functools.partial(bank, rows), *inputs(len(rows)))


def test_a_network_that_there_is_not_or_twice_is_named():
    base = full(0)
    with pytest.raises(
        ValueError, match=r"^bank: no network is called 'dpo', expected one; there are base, pos, neg\b"
    ):
        ask(bank_of(base=adapted(base)), "base", "dpo")
    both = bank_of(base=adapted(base), own=adapted(full(1)))
    with pytest.raises(ValueError, match=r"2 networks are called 'pos', .* there are base, pos, neg, own, pos, neg\b"):
        ask(both, "base", "pos")
    # A module under the name of its own adapter would be drawn without it.
    with pytest.raises(ValueError, match=r"2 networks are called 'pos', .* there are base, pos, pos\b"):
        ask(bank_of(base=base, pos=adapted(full(1), ("pos",))), "base", "pos")


def pairs(**networks):
    return {name: (network.graphdef, network.params) for name, network in networks.items()}


def test_networks_that_cannot_lie_side_by_side_are_refused_by_name():
    mesh, base = Mesh(np.array(jax.devices()[:1]), (AXIS,)), full(0)
    unet = nnx.eval_shape(
        lambda: UNet2DCondition(dataclasses.replace(CONFIG, cross_attention_dim=12), rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.split(unet)
    other = Network(CONFIG, graphdef, nnx.to_pure_dict(state))
    half = base._replace(params=jax.tree.map(lambda x: x.astype(np.float16), base.params))
    for network in (other, half):
        with pytest.raises(ValueError, match=r"^stack: network 'pos' differs from 'base' in more than the values of"):
            stack(pairs(base=base, neg=full(1), pos=network), mesh)
    with pytest.raises(ValueError, match=r"^stack: network 'dpo' has adapters pos, neg, expected none"):
        stack(pairs(base=base, dpo=adapted(full(1))), mesh)
    with pytest.raises(ValueError, match=r"no network is called 'dpo', expected one; there are base, pos\b"):
        ask(stack(pairs(base=base, pos=full(1)), mesh), "base", "dpo")


@pytest.mark.program
def test_an_axis_of_which_half_would_be_idle_is_refused(report):
    assert report["refused"] == (
        "stack: 2 network(s), base, pos, for an axis 'network' of 4 in the mesh, most of which would be idle; choose a "
        "smaller axis"
    )


if __name__ == "__main__":
    print(json.dumps(on_devices()))
