"""Kinds of reward checkpoints: scores as those of transformers, or of the authors' layers, in float64."""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_pref.checkpoints import lpips_files
from flax_pref.checkpoints.blip_files import IGNORED, NAMES
from flax_pref.checkpoints.clip_files import OPENCLIP_NAMES
from flax_pref.checkpoints.inception_files import GRAPH
from flax_pref.checkpoints.mps_files import NAMES as MPS_NAMES
from flax_pref.checkpoints.tokenizer import clip_tokenizer
from flax_pref.checkpoints.weights import COMPONENTS
from flax_pref.rewards.features import load_distance, load_features
from flax_pref.rewards.mps import CONDITION
from flax_pref.rewards.preprocessing import OPENAI_MEAN, OPENAI_STD
from flax_pref.rewards.reward import Reward, load_reward
from tests.formats.kinds import Kind, Made, Numbers, layer_of

CAPTIONS = ["a photo of a cat", "", "an oil painting of the sea at dawn, " * 3]
SIZE = 12  # of images, as the networks see them, so that nothing is resized


def pixels() -> np.ndarray:
    """Images in [0, 1]."""
    return np.random.default_rng(1).random((len(CAPTIONS), SIZE, SIZE, 3)).astype(np.float32)


def normalised() -> Any:
    """The same as networks in torch take them, in float64."""
    import torch

    images = (pixels() - np.float64(OPENAI_MEAN)) / np.float64(OPENAI_STD)
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def scores(reward: Reward) -> Numbers:
    """Of each image and its caption."""
    score = jax.jit(lambda reward, images, prepared: reward.score(reward.view(images), prepared))
    return {
        "scores": np.asarray(
            score(reward, pixels()[:, : reward.image_size, : reward.image_size], reward.prepare(CAPTIONS))
        )
    }


# ----------------------------------------------------------------------------------------------------------------------
# CLIP and PickScore, HPS v2 and the aesthetic head


@functools.cache
def torch_clip() -> Any:
    """A small CLIP of transformers with CLIP's own tokens."""
    import torch

    from tests.parity.clip_reference import small_clip

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return small_clip(text={"vocab_size": 49408, "max_position_embeddings": 77})


def clip_scores(*, scaled: bool) -> Numbers:
    """Cosines of transformers in float64, for PickScore times the network's own scale."""
    import torch

    model = torch_clip().double()
    ids = torch.from_numpy(np.int64(clip_tokenizer()(CAPTIONS)))
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=normalised())
        cosine = (found.image_embeds * found.text_embeds).sum(-1)
        result = cosine * model.logit_scale.exp() if scaled else cosine
    model.float()
    return {"scores": result.numpy()}


def clip_folder(*, scaled: bool, torch_files: bool = False) -> Callable[[Path], Made]:
    """A folder of transformers with its tokenizer."""

    def make(folder: Path) -> Made:
        import torch

        torch_clip().save_pretrained(folder)
        clip_tokenizer().save(folder)
        if torch_files:  # as transformers wrote it before safetensors
            torch.save(torch_clip().state_dict(), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        return Made(folder, lambda: clip_scores(scaled=scaled))

    return make


def openclip_file(folder: Path) -> Made:
    """A file of OpenCLIP, as the authors of HPS v2 publish it, with CLIP's tokenizer beside it."""
    import torch

    from tests.parity.clip_reference import as_openclip

    clip_tokenizer().save(folder / "tokenizer")
    weights = as_openclip({name: tensor for name, tensor in torch_clip().state_dict().items()})
    torch.save({"state_dict": weights}, folder / "HPS_v2_compressed.pt")
    return Made(folder / "HPS_v2_compressed.pt", lambda: clip_scores(scaled=False))


def aesthetic_head(folder: Path) -> Made:
    """The layers of LAION's aesthetic score, as their author saves them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    width = torch_clip().config.projection_dim
    sizes = {0: (width, 5), 2: (5, 4), 4: (4, 3), 6: (3, 2), 7: (2, 1)}
    head = {
        f"layers.{number}.{kind}": torch.randn(shape, generator=generator)
        for number, (into, out) in sizes.items()
        for kind, shape in (("weight", (out, into)), ("bias", (out,)))
    }
    torch.save(head, folder / "sac+logos+ava1-l14-linearMSE.pth")
    torch_clip().save_pretrained(folder / "clip")

    def expected() -> Numbers:
        model = torch_clip().double()
        with torch.no_grad():
            features = model.visual_projection(model.vision_model(pixel_values=normalised()).pooler_output)
            features = features / features.norm(dim=-1, keepdim=True)
            for number in sizes:
                features = (
                    features @ head[f"layers.{number}.weight"].double().T + head[f"layers.{number}.bias"].double()
                )
        model.float()
        return {"scores": features[:, 0].numpy()}

    return Made(folder / "sac+logos+ava1-l14-linearMSE.pth", expected)


# ----------------------------------------------------------------------------------------------------------------------
# ImageReward


def image_reward(name: str) -> Callable[[Path], Made]:
    """The file of its authors with what else BLIP was trained with, or a safetensors file with the same names."""

    def make(folder: Path) -> Made:
        import torch
        from safetensors.torch import save_file

        from flax_pref.models.blip import ImageRewardConfig
        from tests.parity.image_reward_reference import random_weights, scores

        sizes = ImageRewardConfig(
            **{"image_size": SIZE, "patch_size": 4, "vision_width": 64, "vision_mlp_width": 96, "vision_layers": 1},
            **{"vocab_size": 60, "max_position_embeddings": 40},
            **{"text_width": 64, "text_mlp_width": 96, "text_layers": 1},
        )
        weights = random_weights(sizes)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "an", "oil", "painting", "cat", ","]
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
        if name.endswith(".pt"):
            torch.save(weights | {"blip.vision_proj.weight": torch.ones(3, 3)}, folder / name)
        else:
            save_file(weights, folder / name)

        def expected() -> Numbers:
            from flax_pref.checkpoints.bert_tokenizer import load_bert_tokenizer

            ids, mask = load_bert_tokenizer(folder, length=35)(CAPTIONS)
            with torch.no_grad():
                found = scores(weights, normalised(), torch.from_numpy(ids).long(), torch.from_numpy(mask))
            return {"scores": found.numpy()}

        return Made(folder / name, expected)

    return make


# ----------------------------------------------------------------------------------------------------------------------
# MPS


@functools.cache
def torch_mps() -> Any:
    """A small MPS of torch with CLIP's own tokens."""
    import torch

    from tests.parity.mps_reference import MPS

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MPS(text={"vocab_size": 49408, "max_position_embeddings": 77}).eval().requires_grad_(False)


def mps(name: str) -> Callable[[Path], Made]:
    """The network saved whole, as its authors have it, or its weights by name, as conversions have them."""

    def make(folder: Path) -> Made:
        import torch
        from safetensors.torch import save_file

        clip_tokenizer().save(folder)
        if name.endswith(".pth"):
            torch.save(torch_mps(), folder / name)
        else:
            weights = {f"mps.{key}": weight.contiguous() for key, weight in torch_mps().state_dict().items()}
            save_file(weights, folder / name)

        def expected() -> Numbers:
            ids, condition = (torch.from_numpy(np.int64(clip_tokenizer()(texts))) for texts in (CAPTIONS, [CONDITION]))
            found = torch_mps().double()(normalised(), ids, condition[0]).numpy()
            torch_mps().float()
            return {"scores": found}

        return Made(folder / name, expected)

    return make


# ----------------------------------------------------------------------------------------------------------------------
# Features and distances: Inception, DINOv2, LPIPS


def large(size: int) -> np.ndarray:
    """Images of 8 bits, in [0, 1], of a size that is not changed."""
    return np.random.default_rng(2).integers(0, 256, (2, size, size, 3)).astype(np.float32) / 255


def features(size: int) -> Callable[[Any], Numbers]:
    """Of images of this size."""

    def seen(network: Any) -> Numbers:
        see = jax.jit(lambda network, images: network.image_features(network.view(images)))
        return {"features": np.asarray(see(network, large(size)))}

    return seen


def as_torch(images: np.ndarray) -> Any:
    """The same as networks in torch take them, in float64."""
    import torch

    return torch.from_numpy(np.float64(images).transpose(0, 3, 1, 2).copy())


def inception(name: str, *, script: bool = False) -> Callable[[Path], Made]:
    """The file of pytorch-fid and torch-fidelity, or clean-fid's program, of a narrow network."""

    def make(folder: Path) -> Made:
        import torch

        from tests.parity.inception_reference import features, graph_weights, random_weights, save_script

        weights = random_weights(unit=1)
        if script:
            save_script(graph_weights(weights), folder / name)
            weights = {key: torch.ones_like(w) if key.endswith(".bn.weight") else w for key, w in weights.items()}
        else:
            torch.save(weights, folder / name)

        def expected() -> Numbers:
            with torch.no_grad():
                return {"features": features(weights, (255 * as_torch(large(299)) - 128) / 128).numpy()}

        return Made(folder / name, expected)

    return make


def dinov2_file(folder: Path) -> Made:
    """The state dict of the authors."""
    import torch

    from flax_pref.rewards.preprocessing import IMAGENET_MEAN, IMAGENET_STD
    from tests.parity.dinov2_reference import authors_weights, class_token

    weights = authors_weights(layers=1)
    torch.save(weights, folder / "dinov2_vits14_pretrain.pth")

    def expected() -> Numbers:
        view = as_torch((large(256)[:, 16:240, 16:240] - np.float64(IMAGENET_MEAN)) / np.float64(IMAGENET_STD))
        with torch.no_grad():
            return {"features": class_token(weights, view).numpy()}

    return Made(folder / "dinov2_vits14_pretrain.pth", expected)


def dinov2_folder(folder: Path) -> Made:
    """A folder of transformers."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    from flax_pref.rewards.preprocessing import IMAGENET_MEAN, IMAGENET_STD

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 42}
    model = Dinov2Model(Dinov2Config(**sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)

    def expected() -> Numbers:
        view = as_torch((large(256)[:, 16:240, 16:240] - np.float64(IMAGENET_MEAN)) / np.float64(IMAGENET_STD))
        with torch.no_grad():
            return {"features": model.double()(view).pooler_output.numpy()}

    return Made(folder, expected)


def lpips_file(*, apart: bool) -> Callable[[Path], Made]:
    """AlexNet of torchvision beside the authors' layers, or the state dict of their class."""

    def make(folder: Path) -> Made:
        import torch

        from tests.parity.lpips_reference import distances, random_weights, whole

        network, layers = random_weights("alex")
        if apart:
            torch.save(network, folder / "alexnet-owt-7be5be79.pth")
            torch.save(layers, folder / "alex.pth")
        else:
            torch.save(whole(network, layers), folder / "lpips.pth")

        def expected() -> Numbers:
            images = as_torch(large(48))
            with torch.no_grad():
                return {"distances": distances(network, layers, images, images.flip(0)).numpy()}

        return Made(folder if apart else folder / "lpips.pth", expected)

    return make


def distances(network: Any) -> Numbers:
    """Of pairs of images."""
    pairs = np.stack([large(48), large(48)[::-1]], axis=1)
    return {
        "distances": np.asarray(jax.jit(lambda network, pairs: network.distance(network.view(pairs)))(network, pairs))
    }


# ----------------------------------------------------------------------------------------------------------------------
# The rows


def loads(name: str, **options: str) -> Callable[[Path], Reward]:
    """Reads a reward; options are folders beside its file."""
    return lambda path: load_reward(
        name, str(path), **{key: str(path.parent / place) for key, place in options.items()}
    )


def reward(name: str, make: Callable[[Path], Made], load: Callable[[Path], Reward], **more: Any) -> Kind:
    """A row."""
    settings = {"read": "`Weighted(NAME, path=FOLDER)`", "reference": "transformers in float64", "sort": part_of}
    settings |= {"numbers": scores} | more
    return Kind(name=name, make=make, load=load, needs=("torch", "transformers"), **settings)


def part_of(key: str) -> str | None:
    """The network that a weight belongs to; None where nothing reads it."""
    return None if re.search(IGNORED, key) else re.split(r"[._]", key)[0]


def renamed(table: Sequence[tuple[str, str]]) -> Callable[[str], str]:
    """Messages name a layer as our modules do, of which these are patterns and replacements."""
    return lambda key: layer_of(functools.reduce(lambda name, pair: re.sub(*pair, name), table, key))


FILE = {"read": "`Weighted(NAME, path=FILE)`"}
OF_OPENCLIP = {
    "names": renamed(OPENCLIP_NAMES),
    "harmless": {
        "shape positional_embedding": "more positions are a network for longer texts",
        "shape token_embedding": "more rows are a network for more tokens",
    },
}
OF_AUTHORS = {"read": "`--features NAME=PATH`", "reference": "the authors' layers in float64"}
OF_LPIPS = OF_AUTHORS | {
    "numbers": distances,
    "sort": lambda key: None if re.match(lpips_files.IGNORED, key) else re.split(r"[._]", key)[0],
    "names": renamed([(r"^(features|net\.slice5)\.10\.", "convs.4."), (r"^lin(\d)\.model\.1\.", r"lins.\1.")]),
}
OF_BLIP = {"names": renamed(NAMES), "reference": "the authors' layers in float64"}
OF_MPS = {"names": renamed(MPS_NAMES), "reference": "CLIP of transformers and the authors' layers in float64"}
REWARDS = (
    reward("CLIP, folder of transformers", clip_folder(scaled=False), loads("clip"), damaged="model.safetensors"),
    reward(
        "PickScore, folder of transformers", clip_folder(scaled=True), loads("pickscore"), damaged="model.safetensors"
    ),
    reward(
        "PickScore, weights of torch (`.bin`)",
        clip_folder(scaled=True, torch_files=True),
        loads("pickscore"),
        damaged="pytorch_model.bin",
    ),
    reward(
        "HPS v2, file of OpenCLIP (`.pt`)", openclip_file, loads("hpsv2", tokenizer="tokenizer"), **FILE, **OF_OPENCLIP
    ),
    reward("aesthetic score (`.pth`)", aesthetic_head, loads("aesthetic", clip="clip"), **FILE),
    reward(
        "ImageReward (`.pt`)",
        image_reward("ImageReward.pt"),
        loads("imagereward"),
        **FILE | OF_BLIP,
    ),
    reward(
        "ImageReward, safetensors",
        image_reward("ImageReward.safetensors"),
        loads("imagereward"),
        **FILE | OF_BLIP,
    ),
    reward("MPS, saved whole (`.pth`)", mps("MPS_overall_checkpoint.pth"), loads("mps"), **FILE | OF_MPS),
    reward("MPS, safetensors", mps("model.safetensors"), loads("mps"), **FILE | OF_MPS),
    reward(
        "Inception of FID (`.pth` of pytorch-fid and torch-fidelity)",
        inception("weights-inception-2015-12-05-6726825d.pth"),
        lambda path: load_features("inception", str(path)),
        **OF_AUTHORS | {"numbers": features(299)},
        harmless={
            "missing fc": "the layer of classes is not read",
            "shape fc.bias": "the layer of classes is not read",
        },
    ),
    reward(
        "Inception of FID (TorchScript of clean-fid)",
        inception("inception-2015-12-05.pt", script=True),
        lambda path: load_features("inception-clean", str(path)),
        **OF_AUTHORS | {"numbers": features(299)},
        names=lambda key: GRAPH.get(layer_of(key), key),
        harmless={"missing output": "the layer of classes is not read", "shape output.bias": "it is not read"},
    ),
    reward(
        "DINOv2 of its authors (`.pth`)",
        dinov2_file,
        lambda path: load_features("dinov2", str(path)),
        **OF_AUTHORS | {"numbers": features(256)},
        harmless={"mask_token": "it is of training only"},
    ),
    reward(
        "DINOv2, folder of transformers",
        dinov2_folder,
        lambda path: load_features("dinov2", str(path)),
        read="`--features NAME=PATH`",
        numbers=features(256),
        damaged="model.safetensors",
        names=renamed(COMPONENTS["dinov2"].old_names),
    ),
    reward(
        "LPIPS, AlexNet of torchvision beside its layers (`.pth`)",
        lpips_file(apart=True),
        lambda path: load_distance("lpips", str(path)),
        **OF_LPIPS,
        damaged="alexnet-owt-7be5be79.pth",
    ),
    reward(
        "LPIPS, state dict of its authors' class (`.pth`)",
        lpips_file(apart=False),
        lambda path: load_distance("lpips", str(path)),
        **OF_LPIPS,
    ),
)
