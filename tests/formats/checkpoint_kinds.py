"""Kinds of checkpoints: folders of diffusers, single files of the original code, autoencoders and tokenizers.

What counts are the weights of all networks, and the sizes and settings in their configs.
"""

import functools
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from flax_pref.checkpoints.checkpoint import Pipeline
from flax_pref.checkpoints.diffusers import load_pipeline, open_vae, save_pipeline
from flax_pref.checkpoints.single_file import IGNORED, UNET, V_PREDICTION, VAE, ZERO_SNR, save_single_file
from flax_pref.checkpoints.tokenizer import load_tokenizer
from flax_pref.checkpoints.weights import to_stored
from flax_pref.diffusion.drawing import resolve_drawing
from flax_pref.diffusion.drawing_flags import DrawingFlags
from flax_pref.models.network import Network
from tests.checkpoints.small import random_network, small_pipeline
from tests.formats.kinds import Kind, Made, Numbers

Change = Callable[[dict[str, np.ndarray]], None]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints and what is said of them


@functools.cache
def pipeline(family: str) -> Pipeline:
    """A small checkpoint: "sd1", "sd2" or "sdxl", "lcm" with a UNet that is told a guidance scale."""
    if family == "lcm":
        small = pipeline("sd1")
        config = type(small.unet.config)(**{**vars(small.unet.config), "time_cond_proj_dim": 32})
        return small.replace(unet=random_network("unet", config))
    return small_pipeline(family)


@functools.cache
def folder_of(family: str) -> Path:
    """The folder of one, for parts and configs that a file lacks; it stays until the process ends."""
    place = tempfile.TemporaryDirectory(prefix="formats-")
    save_pipeline(pipeline(family), Path(place.name) / family)
    KEPT.append(place)
    return Path(place.name) / family


KEPT: list[tempfile.TemporaryDirectory] = []


def numbers(read: Pipeline) -> Numbers:
    """Weights of all networks by part and name in a folder, and what their configs say in numbers."""
    parts = {"unet": read.unet, "vae": read.vae}
    parts |= dict(zip(("text_encoder", "text_encoder_2"), read.text_encoders, strict=False))
    return {name: array for part, network in parts.items() for name, array in of_network(part, network).items()}


def of_network(part: str, network: Network) -> Numbers:
    """The same of one network."""
    return numbers_of(part, to_stored(jax.tree.map(np.asarray, network.params)), vars(network.config))


# Of configs, what shapes do not tell and images depend on.
TOLD = {
    "unet": ("attention_head_dim", "cross_attention_dim", "layers_per_block", "in_channels", "norm_num_groups"),
    "vae": ("scaling_factor", "latent_channels", "norm_num_groups"),
    "text_encoder": ("num_attention_heads", "hidden_size", "num_hidden_layers", "layer_norm_eps"),
}


def numbers_of(part: str, weights: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Numbers:
    """Weights and settings of a part; those of transformers 5 have no prefix in text encoders."""
    prefix = "text_model." if part.startswith("text") else ""
    named = {
        f"{part}: {name if name.startswith(('text_', prefix)) else prefix + name}": array
        for name, array in weights.items()
    }
    for field in TOLD[re.sub(r"_2$", "", part)]:
        value = np.atleast_1d(np.float64(config[field]))
        blocks = len(config["block_out_channels"]) if part == "unet" else 1
        named[f"{part}.{field}"] = np.broadcast_to(value, blocks) if field == "attention_head_dim" else value
    return named


def theirs(*models: tuple[str, Any]) -> Numbers:
    """The same of networks in torch, by their parts."""
    found: dict[str, np.ndarray] = {}
    for part, model in models:
        state = {
            name: tensor.float().numpy() for name, tensor in model.state_dict().items() if "position_ids" not in name
        }
        config = model.config if part in ("unet", "vae") else model.config.to_dict()
        found |= numbers_of(part, state, config)
    return found


def class_of(family: str) -> Any:
    """The pipeline of diffusers."""
    import diffusers

    return diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline


def of_pipeline(pipe: Any) -> Numbers:
    """Numbers of a pipeline of diffusers."""
    parts = ("unet", "vae", "text_encoder", *(["text_encoder_2"] if hasattr(pipe, "text_encoder_2") else []))
    return theirs(*((part, getattr(pipe, part)) for part in parts))


def from_folder(family: str, folder: Path, **options: Any) -> Any:
    """A pipeline of diffusers, read from a folder."""
    if family != "sdxl":
        options |= {"safety_checker": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return class_of(family).from_pretrained(folder, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Folders


@functools.cache
def torch_pipeline(family: str) -> Any:
    """The checkpoint in diffusers."""
    return from_folder(family, folder_of(family))


def by_diffusers(family: str, variant: str | None = None, **options: Any) -> Callable[[Path], Made]:
    """A folder of `save_pretrained`."""

    def make(folder: Path) -> Made:
        import torch

        pipe = torch_pipeline(family)
        if variant is not None:
            pipe = from_folder(family, folder_of(family), torch_dtype=torch.float16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe.save_pretrained(folder / "model", variant=variant, **options)
        return Made(folder / "model", lambda: of_pipeline(pipe))

    return make


def with_old_names(folder: Path) -> Made:
    """The autoencoder's attention by its names before diffusers 0.18, as in the folders of SD1.5 on the Hub."""
    made = by_diffusers("sd1")(folder)
    file = made.path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(file)
    for name in list(tensors):
        for new, former in old.items():
            if new in name:
                tensors[name.replace(new, former)] = tensors.pop(name)
    save_file(tensors, file, {"format": "pt"})
    return Made(made.path, lambda: of_pipeline(from_folder("sd1", made.path)))


# ----------------------------------------------------------------------------------------------------------------------
# Single files


def single(
    family: str, dtype: str = "float32", change: Change | None = None, *, known: bool = True, **scheduler: Any
) -> Callable[[Path], Made]:
    """A single file, and what `from_single_file` of diffusers makes of it.

    Args:
        family: of the checkpoint.
        dtype: of the weights.
        change: of the weights, by name.
        known: False where diffusers does not know such a file; the reference is the folder then.
        scheduler: settings other than those of the family.
    """

    def make(folder: Path) -> Made:
        file = folder / "model.safetensors"
        whole = pipeline(family)
        save_single_file(whole.replace(scheduler_config={**whole.scheduler_config, **scheduler}), file, dtype=dtype)
        if change is not None:
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file, {"modelspec.prediction_type": "epsilon"} if family == "sd2" else None)
        return Made(file, lambda: of_pipeline(from_single_file(family, file) if known else torch_pipeline(family)))

    return make


def from_single_file(family: str, file: Path) -> Any:
    """The pipeline that diffusers makes of a file."""
    options = {} if family == "sdxl" else {"safety_checker": None}
    config = str(folder_of(family))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return class_of(family).from_single_file(str(file), config=config, local_files_only=True, **options)


def in_eight_bits(folder: Path) -> Made:
    """A single file of type e4m3, as ComfyUI saves it."""
    import torch
    from safetensors.torch import load_file, save_file

    made = single("sd1")(folder)
    save_file({name: x.to(torch.float8_e4m3fn) for name, x in load_file(made.path).items()}, made.path)
    return made


def as_ckpt(make: Callable[[Path], Made], family: str, **options: Any) -> Callable[[Path], Made]:
    """The same as torch saves it, beside what trainers keep."""

    def made(folder: Path) -> Made:
        import torch

        tensors = {name: torch.from_numpy(array.copy()) for name, array in load_file(make(folder).path).items()}
        file = folder / "model.ckpt"
        torch.save({"state_dict": tensors, "global_step": 840000, "epoch": 1}, file, **options)
        return Made(file, lambda: of_pipeline(from_single_file(family, file)))

    return made


def surplus_of_training(tensors: dict[str, np.ndarray]) -> None:
    """Averages of the weights, tables of the noise schedule and losses."""
    averages = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": array + 1
        for name, array in tensors.items()
        if name.startswith(UNET)
    }
    tables = {"alphas_cumprod": np.zeros(1000, np.float32), "first_stage_model.loss.logvar": np.zeros((), np.float32)}
    ids = {"cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(77)[None]}
    tensors |= averages | tables | ids | {"model_ema.decay": np.array(0.9999, np.float32)}


def without_text_model(tensors: dict[str, np.ndarray]) -> None:
    """Names of the text encoder as some mergers have them."""
    for name in [name for name in tensors if ".text_model." in name]:
        tensors[name.replace(".text_model.", ".")] = tensors.pop(name)


def as_released(tensors: dict[str, np.ndarray]) -> None:
    """Stable Diffusion 2.x with the layer and the projection of OpenCLIP that it does not use."""
    for name in [name for name in tensors if ".resblocks.1." in name]:
        tensors[name.replace(".resblocks.1.", ".resblocks.2.")] = tensors[name]
    tensors["cond_stage_model.model.text_projection"] = np.zeros((64, 64), np.float32)
    tensors["cond_stage_model.model.logit_scale"] = np.zeros((), np.float32)


def only(prefix: str, *, strip: bool = False) -> Change:
    """Keeps one network, perhaps by names without its prefix."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            array = tensors.pop(name)
            if name.startswith(prefix):
                tensors[name.removeprefix(prefix) if strip else name] = array

    return change


def without(prefix: str) -> Change:
    """Leaves one network out."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return change


def part(family: str, change: Change, which: str) -> Callable[[Path], Made]:
    """A file of one network, which diffusers reads; the other parts are those of a folder."""

    def make(folder: Path) -> Made:
        file = single(family, change=change)(folder).path

        def expected() -> Numbers:
            import diffusers

            prefixed = file
            if not any(name.startswith((UNET, VAE)) for name in load_file(file)):  # which diffusers does not know
                prefixed = folder / "prefixed.safetensors"
                prefix = UNET if which == "unet" else VAE
                save_file({prefix + name: array for name, array in load_file(file).items()}, prefixed)
            kind = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[which]
            model = kind.from_single_file(str(prefixed), config=str(folder_of(family)), subfolder=which)
            if which == "vae":
                return theirs(("vae", model))
            others = of_pipeline(torch_pipeline(family)).items()
            own = {name: array for name, array in others if not name.startswith("unet")}
            return own | theirs((which, model))

        return Made(file, expected)

    return make


def vae_folder(folder: Path) -> Made:
    """An autoencoder of diffusers alone, as `vae-ft-mse` on the Hub."""
    vae = torch_pipeline("sd1").vae
    vae.save_pretrained(folder / "vae")
    return Made(folder / "vae", lambda: theirs(("vae", vae)))


def vae_ckpt(folder: Path) -> Made:
    """An autoencoder by its names without a prefix, as `vae-ft-mse-840000-ema-pruned.ckpt`, with its loss."""
    import torch

    made = part("sd1", only(VAE, strip=True), "vae")(folder)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in load_file(made.path).items()}
    torch.save({"state_dict": tensors | {"loss.logvar": torch.zeros(())}}, folder / "vae.ckpt")
    return Made(folder / "vae.ckpt", made.expected)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers and schedulers

PROMPTS = ["a photo of a cat", "A Café at 5pm!! <|endoftext|> naïve", "", "日本 🙂 it's " * 12, "x" * 300]


def tokenizer(form: str) -> Callable[[Path], Made]:
    """CLIP's tokenizer as transformers reads it."""

    def make(folder: Path) -> Made:
        import transformers

        pipeline("sd1").tokenizers[0].save(folder)
        if form == "tokenizer.json":
            words = transformers.CLIPTokenizer.from_pretrained(folder)
            shutil.rmtree(folder)
            words.save_pretrained(folder)
            for name in ("vocab.json", "merges.txt"):
                (folder / name).unlink(missing_ok=True)
        else:
            (folder / "tokenizer.json").unlink(missing_ok=True)

        def expected() -> Numbers:
            words = transformers.CLIPTokenizer.from_pretrained(folder)
            ids = words(PROMPTS, padding="max_length", truncation=True, max_length=77)["input_ids"]
            return {"ids": np.array(ids)}

        return Made(folder, expected)

    return make


def save_tokenizer(read: Any, folder: Path) -> Path:
    """Writes it as `save_pipeline` does."""
    read.save(folder)
    return folder


def scheduler(class_name: str, **config: Any) -> Callable[[Path], Made]:
    """A scheduler_config.json of diffusers, and its steps from the same predictions."""

    def make(folder: Path) -> Made:
        import diffusers

        from tests.diffusion.scheduler_walks import reference_trajectory

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy 2, about arrays of tensors
            reference = getattr(diffusers, class_name)(**BETAS, **config)
        for description in folder_of("sd1").rglob("*.json"):
            place = folder / "model" / description.relative_to(folder_of("sd1"))
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(description, place)
        reference.save_config(folder / "model" / "scheduler")

        def expected() -> Numbers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of NumPy 2, about arrays of tensors
                reference.set_timesteps(STEPS)
                inputs, outputs = reference_trajectory(reference, *drawn_noise(len(reference.timesteps)))
            return {"seen": inputs, "latents": outputs / float(reference.init_noise_sigma)}

        return Made(folder / "model", expected)

    return make


STEPS = 10
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def drawn_noise(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions for each step, and its noise and that at the start."""
    rng = np.random.default_rng(0)
    shape = (2, 4, 3, 2)
    return rng.standard_normal((rows, *shape), np.float32), rng.standard_normal((rows + 1, *shape), np.float32)


def walked(solver: Any) -> Numbers:
    """Every step of our solver."""
    from tests.diffusion.scheduler_walks import trajectory

    seen, latents = trajectory(solver, *drawn_noise(len(solver.timesteps)))
    return {"seen": np.asarray(seen), "latents": np.asarray(latents / solver.init_noise_sigma)}


def read_solver(folder: Path) -> Any:
    """The solver of a folder, as the programs make it."""
    flags = DrawingFlags(model=str(folder), rule="cfg", steps=STEPS)
    return resolve_drawing(flags, weights=False).solver


# ----------------------------------------------------------------------------------------------------------------------
# The rows

CONFIGS = ("UNet2DConditionModel", "AutoencoderKL")
NEEDS = ("torch", "diffusers", "transformers")


def part_of(name: str) -> str | None:
    """The network that a weight belongs to; None where it belongs to none, or to a layer that is not used."""
    if IGNORED.search(name) or name in (V_PREDICTION, ZERO_SNR) or ".resblocks.2." in name or "text_projection" in name:
        return None
    return re.split(r"\.(?=input|middle|output|time|out\.|label|encoder|decoder|quant|post|transformer)|[._]", name)[0]


def checkpoint(name: str, make: Callable[[Path], Made], **more: Any) -> Kind:
    """A row of a whole checkpoint."""
    options = more.pop("options", {})
    settings = {"read": "`--model FOLDER`", "reference": "diffusers, `from_pretrained`", "needs": NEEDS} | more
    return Kind(
        name=name,
        make=make,
        load=lambda path: load_pipeline(path, **{key: value() for key, value in options.items()}),
        numbers=numbers,
        sort=part_of,
        **settings,
    )


def folder(name: str, make: Callable[[Path], Made], **more: Any) -> Kind:
    """A row of a folder of diffusers; damages change its UNet."""
    settings = {"damaged": "unet/diffusion_pytorch_model.safetensors", "stranger": "SD2.x, folder of diffusers"} | more
    return checkpoint(name, make, **settings)


def file(name: str, make: Callable[[Path], Made], **more: Any) -> Kind:
    """A row of a single file."""
    return checkpoint(name, make, **{"read": "`--model FILE`", "reference": "diffusers, `from_single_file`"} | more)


def save_folder(read: Pipeline, place: Path) -> Path:
    """Writes a folder of diffusers."""
    save_pipeline(read, place / "model")
    return place / "model"


def save_file_of(read: Pipeline, place: Path) -> Path:
    """Writes a single file."""
    save_single_file(read, place / "model.safetensors", dtype="float32")
    return place / "model.safetensors"


AS_FOLDER = {"reference": "diffusers, `from_pretrained` of the folder"}  # such files it does not know
NOT_TOLD = {"missing .*cond_proj": "without this weight it is a UNet that is not told a guidance scale"}
FOLDER = {"written": "`fp.save_pipeline`", "write": save_folder}
SINGLE = {"written": "`fp.save_single_file`, `--export.layout single`", "write": save_file_of}
VAE_OF = {"read": "`--vae FILE`"}
SD1 = functools.partial(folder_of, "sd1")

CHECKPOINTS = (
    folder(
        "SD1.x, folder of diffusers",
        by_diffusers("sd1"),
        **FOLDER,
    ),
    folder("SD2.x, folder of diffusers", by_diffusers("sd2"), **FOLDER, stranger="SD1.x, folder of diffusers"),
    folder("SDXL, folder of diffusers", by_diffusers("sdxl"), **FOLDER),
    folder(
        "folder of diffusers, `fp16` variant",
        by_diffusers("sdxl", "fp16"),
        damaged="unet/diffusion_pytorch_model.fp16.safetensors",
    ),
    folder(
        "folder of diffusers, weights in shards",
        by_diffusers("sd1", max_shard_size="1MB"),
        damaged="unet/diffusion_pytorch_model-00001-of-00005.safetensors",
    ),
    folder(
        "folder of diffusers, weights of torch (`.bin`)",
        by_diffusers("sd1", safe_serialization=False),
        damaged="unet/diffusion_pytorch_model.bin",
    ),
    folder("folder of diffusers before 0.18 (`query`, `proj_attn`)", with_old_names),
    folder("LCM, folder of diffusers (`time_cond_proj_dim`)", by_diffusers("lcm"), **FOLDER),
    file("SD1.x, single file", single("sd1"), **SINGLE),
    file("SD1.x, single file in float16", single("sd1", "float16")),
    file("SD1.x, single file in bfloat16", single("sd1", "bfloat16")),
    file("SD1.x, single file in 8 bits (e4m3)", in_eight_bits),
    file("SD1.x, single file with EMA keys and tables of training", single("sd1", change=surplus_of_training)),
    file(
        "SD1.x, single file, text encoder without `text_model.`",
        single("sd1", change=without_text_model, known=False),
        **AS_FOLDER,
    ),
    file("SD1.x, `.ckpt`", as_ckpt(single("sd1", "float16"), "sd1")),
    file("SD1.x, `.ckpt` of torch before 1.6", as_ckpt(single("sd1"), "sd1", _use_new_zipfile_serialization=False)),
    file("LCM, single file (`cond_proj`)", single("lcm", known=False), **AS_FOLDER, **SINGLE, harmless=NOT_TOLD),
    file("SD2.x, single file (OpenCLIP)", single("sd2"), **SINGLE),
    file("SD2.x, single file as released", single("sd2", change=as_released)),
    file("SDXL, single file", single("sdxl"), **SINGLE),
    file("SDXL, single file in float16", single("sdxl", "float16")),
    file(
        "SDXL, single file with `v_pred` and `ztsnr`",
        single("sdxl", prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        **SINGLE,
    ),
    file(
        "SD1.x, single file without VAE",
        part("sd1", without(VAE), "unet"),
        read="`--model FILE --vae OTHER`",
        options={"vae": SD1},
    ),
    file(
        "UNet alone, single file",
        part("sd1", only(UNET), "unet"),
        read="`--model FILE --vae OTHER --text-encoders OTHER`",
        options={"vae": SD1, "text_encoders": SD1},
    ),
    file(
        "UNet alone, names without prefix",
        part("sdxl", only(UNET, strip=True), "unet"),
        read="`--model FILE --vae OTHER --text-encoders OTHER`",
        options={"vae": functools.partial(folder_of, "sdxl"), "text_encoders": functools.partial(folder_of, "sdxl")},
    ),
)
VAES = (
    (
        "VAE alone, folder of diffusers",
        vae_folder,
        "`--vae FOLDER`",
        {"damaged": "diffusion_pytorch_model.safetensors"},
    ),
    ("VAE alone, single file", part("sd1", only(VAE), "vae"), "`--vae FILE`", {}),
    ("VAE alone, names without prefix", part("sd1", only(VAE, strip=True), "vae"), "`--vae FILE`", {}),
    ("VAE alone, `.ckpt`", vae_ckpt, "`--vae FILE`", {}),
)
CHECKPOINTS += tuple(
    Kind(
        name=name,
        make=make,
        load=lambda path: open_vae(path, "StableDiffusionPipeline").load(),
        numbers=lambda network: of_network("vae", network),
        read=read,
        reference="diffusers",
        sort=part_of,
        stranger="UNet alone, single file",
        **more,
    )
    for name, make, read, more in VAES
)
# Messages name tokens by their ids: texts may be any.
VOCABULARY = {"sort": lambda key: key if key == "cat</w>" else None, "names": lambda key: "", "surplus": "other"}
TOKENIZERS = (
    Kind(
        name="tokenizer, `vocab.json` and `merges.txt`",
        make=tokenizer("vocab.json"),
        load=load_tokenizer,
        numbers=lambda words: {"ids": words(PROMPTS)},
        read="`--model FOLDER`",
        reference="transformers",
        needs=("transformers",),
        written="`fp.save_pipeline`",
        write=save_tokenizer,
        damaged="vocab.json",
        **VOCABULARY,
    ),
    Kind(
        name="tokenizer, `tokenizer.json`",
        make=tokenizer("tokenizer.json"),
        load=load_tokenizer,
        numbers=lambda words: {"ids": words(PROMPTS)},
        read="`--model FOLDER`",
        reference="transformers",
        needs=("transformers",),
        damaged="tokenizer.json",
        **VOCABULARY,
    ),
)


def of_scheduler(family: str, class_name: str, **config: Any) -> Kind:
    """A row of a scheduler; tests/diffusion/test_solver_parity.py has every class and its settings."""
    return Kind(
        name=f"scheduler of {family} (`{class_name}`)",
        make=scheduler(class_name, **config),
        load=read_solver,
        numbers=walked,
        read="`--model FOLDER`",
        reference=f"diffusers, {STEPS} steps",
        damaged="scheduler/scheduler_config.json",
        sort=lambda key: key if key == "_class_name" else None,
        harmless={"surplus ": "diffusers too passes over fields that a class does not know"},
    )


SCHEDULERS = (
    of_scheduler("SD1.x", "PNDMScheduler", skip_prk_steps=True, steps_offset=1),
    of_scheduler("SD2.x", "DDIMScheduler", clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    of_scheduler("SDXL", "EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=1),
)
