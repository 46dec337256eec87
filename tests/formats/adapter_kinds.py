"""Kinds of adapters: made for small UNets by diffusers, PEFT and LyCORIS, or from their files by other names.

What counts are the weights of the UNet with the adapter in them: ours against those that the library merges.
"""

import contextlib
import copy
import functools
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_pref.checkpoints.lora import load_lora, merge_lora_network, save_lora
from flax_pref.checkpoints.modules import load_modules
from flax_pref.checkpoints.weights import COMPONENTS, abstract_network, fill, to_stored
from flax_pref.models.network import Network
from flax_pref.models.unet import UNetConfig
from tests.formats.kinds import Kind, Made, Numbers

# Some of every kind: matrices and convolutions of both sizes, inside the blocks and outside.
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = ["to_q", "to_out.0", "attn2.to_k", "proj_in", "conv1", "conv_in", "time_embedding.linear_1"]
RANK, ALPHA = 2, 3.0
# The families of adapters are told by the width of what cross-attention reads.
WIDTHS = {"sd15": 768, "sdxl": 2048}


# ----------------------------------------------------------------------------------------------------------------------
# UNets


def torch_unet(family: str) -> Any:
    """A small UNet of diffusers of its own, with the same weights at each call."""
    return copy.deepcopy(_torch_unet(family))


@functools.cache
def _torch_unet(family: str) -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    from tests.parity.torch_reference import SD15_UNET, SDXL_UNET, randomised

    config = {"sd15": SD15_UNET, "sdxl": SDXL_UNET}[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(UNet2DConditionModel.from_config({**config, "cross_attention_dim": WIDTHS[family]}))


@functools.cache
def base(family: str) -> Network:
    """The same UNet as ours."""
    theirs = torch_unet(family)
    network = abstract_network("unet", UNetConfig.from_dict(dict(theirs.config)))
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    place = Path("unet")
    fill(network.params, COMPONENTS["unet"], dict.fromkeys(state, place), place, open_file=lambda _: Held(state))
    return network


class Held:
    """Weights in memory, as `checkpoints.weights.Tensors`."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self._tensors = tensors

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def keys(self):
        return self._tensors.keys()

    def get_tensor(self, name):
        return self._tensors[name]


def merged(unet: Any) -> Numbers:
    """The weights of a UNet of diffusers into which its adapters were merged."""
    return {name: tensor.detach().float().numpy().copy() for name, tensor in unet.state_dict().items()}


class Read(NamedTuple):
    """A module as it was read.

    Attributes:
        family: of the UNet.
        network: with the module in its weights.
        path: of its file.
    """

    family: str
    network: Network
    path: Path


def load(family: str) -> Callable[[Path], Read]:
    """Reads a module as the programs do."""

    def read(path: Path) -> Read:
        network = base(family)
        with contextlib.redirect_stdout(io.StringIO()):  # of modules with weights of their own
            guided = load_modules(network, {"m": path})
        whole = guided.modules.get("m") or merge_lora_network(network, guided.base, {"m": 1.0})
        return Read(family, whole, path)

    return read


def write(layout: str) -> Callable[[Read, Path], Path]:
    """Writes what was read as a file of plain LoRA."""

    def written(read: Read, folder: Path) -> Path:
        lora, _, alpha = load_lora(read.path, base(read.family))
        path = folder / ("module" if layout == "peft" else "module.safetensors")
        save_lora(lora, path, alpha=alpha, layout=layout, config=read.network.config)
        return path

    return written


# ----------------------------------------------------------------------------------------------------------------------
# Files of diffusers and PEFT


def drawn(parameters: Any) -> None:
    """Gives parameters of an adapter random values."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)


def adapted(family: str, **config: Any) -> Any:
    """A UNet of diffusers with an adapter of PEFT."""
    from peft import LoraConfig

    unet = torch_unet(family)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "init_lora_weights": "gaussian"}
    unet.add_adapter(LoraConfig(**settings | config))
    drawn(parameter for name, parameter in unet.named_parameters() if "lora_" in name)
    return unet


def fused(unet: Any) -> Numbers:
    """What diffusers makes of a UNet with an adapter."""
    unet.fuse_lora()
    unet.unload_lora()
    return merged(unet)


def by_diffusers(family: str, **config: Any) -> Callable[[Path], Made]:
    """A file of `save_lora_weights` of the pipelines."""

    def make(folder: Path) -> Made:
        import diffusers
        from peft import get_peft_model_state_dict

        unet = adapted(family, **config)
        pipeline = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
        settings = unet.peft_config["default"].to_dict()
        layers = get_peft_model_state_dict(unet)
        pipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=settings)
        return Made(folder / "pytorch_lora_weights.safetensors", lambda: fused(unet))

    return make


def by_peft(family: str, **config: Any) -> Callable[[Path], Made]:
    """A folder of `save_pretrained` of PEFT."""

    def make(folder: Path) -> Made:
        from peft import LoraConfig, get_peft_model

        settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "init_lora_weights": "gaussian"}
        model = get_peft_model(torch_unet(family), LoraConfig(**settings | config))
        drawn(parameter for name, parameter in model.named_parameters() if "lora_" in name)
        model.save_pretrained(folder)
        return Made(folder, lambda: merged(model.merge_and_unload()))

    return make


def renamed(family: str, rename: Callable[[str], str], *, alpha: bool = False, **config: Any) -> Callable[[Path], Made]:
    """A file by other names than those of diffusers, `unet.<layer>.lora_A.weight`.

    Args:
        family: of the UNet.
        rename: gives a name in the file.
        alpha: whether the file has an alpha for each layer; without it, it is the rank.
        config: of the adapter.
    """

    def make(folder: Path) -> Made:
        import torch
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        unet = adapted(family, **{"lora_alpha": ALPHA if alpha else RANK, **config})
        tensors = {rename(f"unet.{name}"): tensor for name, tensor in get_peft_model_state_dict(unet).items()}
        if alpha:
            layers = {re.sub(r"\.lora_(up|down)\.weight$", "", name) for name in tensors}
            tensors |= {f"{layer}.alpha": torch.tensor(ALPHA) for layer in layers}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "module.safetensors")
        return Made(folder / "module.safetensors", lambda: fused(unet))

    return make


def kohya(name: str) -> str:
    """`lora_unet_<layer>.lora_down.weight`, as sd-scripts and OneTrainer have it."""
    layer, ending = name.removeprefix("unet.").rsplit(".lora_", 1)
    return f"lora_unet_{layer.replace('.', '_')}.lora_{'down' if ending.startswith('A') else 'up'}.weight"


def older(name: str) -> str:
    """`unet.<layer>.lora.down.weight`, as diffusers before PEFT."""
    return name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")


def processors(name: str) -> str:
    """`unet.<attention>.processor.to_q_lora.down.weight`, as the first versions of diffusers."""
    name = name.replace(".lora_A.", "_lora.down.").replace(".lora_B.", "_lora.up.").replace("to_out.0_", "to_out_")
    return re.sub(r"\.(to_\w+)_lora", r".processor.\1_lora", name)


# Names of layers of SDXL in the original code, as sd-scripts and ComfyUI have them: published key names, by hand.
ORIGINAL = {
    "down_blocks.1.attentions.0.proj_in": "input_blocks.3.1.proj_in",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": "input_blocks.3.1.transformer_blocks.1.attn1.to_q",
    "down_blocks.2.attentions.0.transformer_blocks.2.attn2.to_k": "input_blocks.5.1.transformer_blocks.2.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2": "middle_block.1.transformer_blocks.0.ff.net.2",
    "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_v": "output_blocks.1.1.transformer_blocks.0.attn1.to_v",
    "up_blocks.2.resnets.0.conv1": "output_blocks.4.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "time_embedding.linear_1": "time_embed.0",
    "conv_in": "input_blocks.0.0",
}


def original(name: str) -> str:
    """`lora_unet_input_blocks_3_1_proj_in.lora_down.weight`, as sd-scripts names layers of SDXL."""
    layer, ending = name.removeprefix("unet.").rsplit(".lora_", 1)
    return kohya(f"unet.{ORIGINAL[layer]}.lora_{ending}")


def comfy(name: str) -> str:
    """`diffusion_model.<layer>.lora_A.weight`, as ComfyUI saves LoRA."""
    layer, ending = name.removeprefix("unet.").rsplit(".lora_", 1)
    return f"diffusion_model.{ORIGINAL[layer]}.lora_{ending}"


def in_eight_bits(folder: Path) -> Made:
    """Kohya's names, A of type e4m3 and B of type e5m2."""
    import torch
    from safetensors.torch import load_file, save_file

    path = renamed("sd15", kohya, alpha=True)(folder).path
    tensors = load_file(path)
    kinds = {"lora_down": torch.float8_e4m3fn, "lora_up": torch.float8_e5m2}
    kept = {name: tensor.to(kinds.get(name.split(".")[1], tensor.dtype)) for name, tensor in tensors.items()}
    save_file(kept, path)

    def expected() -> Numbers:
        unet = adapted("sd15")
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                stored = kohya(f"unet.{name.replace('.default', '')}")
                parameter.data = kept[stored].float().reshape(parameter.shape)
        return fused(unet)

    return Made(path, expected)


def by_ours(family: str, layout: str) -> Callable[[Path], Made]:
    """A file of `save_lora`, and what diffusers makes of it."""

    def make(folder: Path) -> Made:
        import diffusers

        made = renamed(family, str)(folder)
        path = write(layout)(load(family)(made.path), folder / "ours")

        def expected() -> Numbers:
            unet = torch_unet(family)
            pipeline = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
            weights, alphas, metadata = pipeline.lora_state_dict(
                path.parent, weight_name=path.name, unet_config=unet.config, return_lora_metadata=True
            )
            pipeline.load_lora_into_unet(weights, alphas, unet, metadata=metadata)
            return fused(unet)

        return Made(path, expected)

    return make


# ----------------------------------------------------------------------------------------------------------------------
# Files of LyCORIS


def by_lycoris(
    algo: str, *, prefix: str = "lora_unet", dtype: str = "float32", **options: Any
) -> Callable[[Path], Made]:
    """A file of a network of LyCORIS around the whole UNet of SD1.5, and what that predicts.

    Its weights are not merged by LyCORIS, which scales the deltas of LoHa and LoKr twice then.
    """

    def make(folder: Path) -> Made:
        with contextlib.redirect_stdout(io.StringIO()):
            import lycoris.logging
            import lycoris.wrapper
        import torch

        lycoris.logging.logger.setLevel("ERROR")
        chosen = {"target_module": ["Transformer2DModel", "ResnetBlock2D"], "target_name": ["conv_in"]}
        lycoris.wrapper.PRESET["matrix"] = {"enable_conv": True, "lora_prefix": prefix, **chosen}
        unet = torch_unet("sd15")
        sizes = {"linear_dim": RANK, "linear_alpha": ALPHA} | options
        shared = lycoris.wrapper.LycorisNetwork  # keeps the settings of the last network, for whatever comes next
        before = {name: value for name, value in vars(shared).items() if name.isupper()}
        network = lycoris.wrapper.create_lycoris(unet, algo=algo, preset="matrix", **sizes)
        network.apply_to()
        drawn(network.parameters())
        path = folder / "module.safetensors"
        network.save_weights(path, getattr(torch, dtype), None)
        if dtype != "float32":
            network.load_weights(path)
        network.double()
        for name, value in before.items():
            setattr(shared, name, value)
        return Made(path, lambda: {"prediction": predicted(unet)})

    return make


def predicted(unet: Any) -> np.ndarray:
    """The prediction of a UNet of diffusers for some latents and prompts, in float64: weights alone are rounded."""
    import torch

    rng = np.random.default_rng(0)
    latents, text = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((2, 4, 8, 8), (2, 5, WIDTHS["sd15"])))
    with torch.no_grad():
        return unet.double()(latents, torch.tensor([3, 981]), text).sample.numpy()


def prediction(read: Read) -> Numbers:
    """What diffusers predicts with our weights."""
    import torch

    unet = torch_unet(read.family)
    unet.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights(read).items()})
    return {"prediction": predicted(unet)}


# ----------------------------------------------------------------------------------------------------------------------
# Whole UNets


def whole_unet(folder: Path) -> Made:
    """A fine-tuned UNet, as `save_pretrained` of diffusers writes it."""
    unet = torch_unet("sd15")
    drawn(unet.parameters())
    unet.save_pretrained(folder)
    return Made(folder, lambda: merged(unet))


# ----------------------------------------------------------------------------------------------------------------------
# The rows

# Alphas are the rank where a file has none; a layer that a file leaves out altogether is not adapted.
NO_ALPHA = {r"missing .*\.alpha$": "alpha is the rank where a file does not say it"}
ANY_LAYERS = {r"missing .*\.(diff|diff_b|w_norm|b_norm)$": "a file may hold the differences of any layers"}
READ = "`--module NAME=FILE`"
FOLDER = "`--module NAME=FOLDER`"


def parts_of(name: str) -> tuple[str, str]:
    """The layer and the ending of the name of a weight."""
    match = ENDINGS.search(name)
    return (match[1], match[3]) if match else (name, "")


ENDINGS = re.compile(
    r"^(.*?)(\.|_(?=lora\.))((?:lora|hada|lokr|dora)[_.].*|processor.*|alpha|diff\w*|[ab]\w?\.weight|[wb]_norm|weight|on_input)$"
)


def ending(name: str) -> str:
    """How the name of a weight ends: those that end alike are damaged alike."""
    return parts_of(name)[1]


def layer(name: str) -> str:
    """The layer of a weight, which messages name if not the weight."""
    return parts_of(name)[0]


def weights(read: Read) -> Numbers:
    """Those of the UNet, by their names in diffusers."""
    return to_stored(jax.tree.map(np.asarray, read.network.params))


def adapter(name: str, family: str, make: Callable[[Path], Made], **more: Any) -> Kind:
    """A row."""
    settings = {"read": READ, "harmless": NO_ALPHA, "needs": ("torch", "diffusers", "peft"), "numbers": weights}
    settings |= {"sort": ending, "names": layer} | more
    stranger = "LoRA of diffusers, SDXL" if family == "sd15" else "LoRA of diffusers, SD1.5"
    return Kind(
        name=name,
        make=make,
        load=load(family),
        stranger=stranger,
        **settings,
    )


def lycoris_kind(name: str, algo: str, **options: Any) -> Kind:
    """A row of LyCORIS."""
    more = {key: options.pop(key) for key in ("harmless",) if key in options}
    more |= {"needs": ("torch", "diffusers", "lycoris"), "numbers": prediction}
    return adapter(name, "sd15", by_lycoris(algo, **options), reference="prediction of LyCORIS in float64", **more)


DIFFUSERS = {"reference": "diffusers, fused"}
OF_DIFFUSERS = DIFFUSERS | {"written": '`fp.save_lora(..., layout="diffusers")`', "write": write("diffusers")}
OF_KOHYA = DIFFUSERS | {"written": '`fp.save_lora(..., layout="kohya")`', "write": write("kohya")}
OF_PEFT = {"reference": "PEFT, merged", "read": FOLDER, "damaged": "adapter_model.safetensors"}
PATTERNS = {
    "rank_pattern": {"attn2.to_q": 3, "mid_block.*.to_k": 5},
    "alpha_pattern": {"mid_block.attentions.0.proj_in": 4, "conv1": 0.5},
}
ORIGINAL_TARGETS = {"target_modules": list(ORIGINAL)}

ADAPTERS = (
    adapter("LoRA of diffusers, SD1.5", "sd15", by_diffusers("sd15"), **OF_DIFFUSERS),
    adapter("LoRA of diffusers, SDXL", "sdxl", by_diffusers("sdxl"), **OF_DIFFUSERS),
    adapter("LoRA of diffusers before PEFT (`.lora.down.`)", "sd15", renamed("sd15", older), **DIFFUSERS),
    adapter(
        "LoRA of the first diffusers (`.processor.to_q_lora.`)",
        "sd15",
        renamed("sd15", processors, target_modules=ATTENTION),
        **DIFFUSERS,
    ),
    adapter("LoRA of sd-scripts, SD1.5", "sd15", renamed("sd15", kohya, alpha=True), **OF_KOHYA),
    adapter(
        "LoRA of sd-scripts, SDXL (`input_blocks`)",
        "sdxl",
        renamed("sdxl", original, alpha=True, **ORIGINAL_TARGETS),
        **OF_KOHYA,
    ),
    adapter("LoRA of OneTrainer, SDXL (`down_blocks`)", "sdxl", renamed("sdxl", kohya, alpha=True), **DIFFUSERS),
    adapter(
        "LoRA of ComfyUI, SDXL (`diffusion_model.`)", "sdxl", renamed("sdxl", comfy, **ORIGINAL_TARGETS), **DIFFUSERS
    ),
    adapter("LoRA in 8 bits (e4m3, e5m2)", "sd15", in_eight_bits, **DIFFUSERS),
    adapter("LoRA of flax_pref for diffusers, SDXL", "sdxl", by_ours("sdxl", "diffusers"), **OF_DIFFUSERS),
    adapter("LoRA of flax_pref for ComfyUI, A1111 and diffusers, SDXL", "sdxl", by_ours("sdxl", "kohya"), **OF_KOHYA),
    adapter(
        "LoRA of PEFT",
        "sd15",
        by_peft("sd15"),
        **OF_PEFT,
        written='`fp.save_lora(..., layout="peft")`',
        write=write("peft"),
    ),
    adapter("LoRA of PEFT, SDXL", "sdxl", by_peft("sdxl"), **OF_PEFT),
    adapter("LoRA of PEFT with `rank_pattern` and `alpha_pattern`", "sd15", by_peft("sd15", **PATTERNS), **OF_PEFT),
    adapter("rsLoRA of PEFT", "sd15", by_peft("sd15", use_rslora=True), **OF_PEFT),
    adapter("DoRA of PEFT", "sd15", by_peft("sd15", use_dora=True), **OF_PEFT),
    adapter("DoRA of diffusers", "sdxl", by_diffusers("sdxl", use_dora=True), **DIFFUSERS),
    lycoris_kind("LoCon: LoRA of linear layers and convolutions", "locon"),
    lycoris_kind("LoCon with a core (Tucker)", "locon", use_tucker=True),
    lycoris_kind("LoCon, half precision, names of LyCORIS (`lycoris_`)", "locon", prefix="lycoris", dtype="float16"),
    lycoris_kind("DoRA, magnitudes of outputs", "locon", dora_wd=True),
    lycoris_kind("DoRA, magnitudes of inputs", "locon", dora_wd=True, wd_on_output=False),
    lycoris_kind("LoHa", "loha"),
    lycoris_kind("LoHa with a core (Tucker)", "loha", use_tucker=True),
    lycoris_kind("LoHa with DoRA", "loha", dora_wd=True),
    lycoris_kind("LoKr", "lokr", linear_dim=1, linear_alpha=0.5),
    lycoris_kind(
        "LoKr, both factors decomposed", "lokr", linear_dim=1, linear_alpha=0.5, decompose_both=True, factor=4
    ),
    lycoris_kind("LoKr with a core (Tucker)", "lokr", linear_dim=1, linear_alpha=0.5, use_tucker=True),
    lycoris_kind("LoKr, whole factors", "lokr", full_matrix=True),
    lycoris_kind("GLoRA", "glora", linear_alpha=0.5),
    lycoris_kind("IA3", "ia3"),
    lycoris_kind("differences of whole weights and biases (`diff`, `diff_b`)", "full", harmless=ANY_LAYERS),
    lycoris_kind("LoRA with norms (`w_norm`, `b_norm`)", "locon", train_norm=True, harmless=NO_ALPHA | ANY_LAYERS),
    adapter(
        "whole UNet as a module, folder of diffusers",
        "sd15",
        whole_unet,
        read=FOLDER,
        reference="diffusers",
        damaged="diffusion_pytorch_model.safetensors",
        harmless={},
        needs=("torch", "diffusers"),
        sort=lambda name: re.sub(r"[\d.].*", "", name),
    ),
)
