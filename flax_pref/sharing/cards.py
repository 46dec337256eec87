"""Cards of repositories: README.md with the front matter that the Hub reads, and what people need to know."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from huggingface_hub import DatasetCardData, ModelCardData

from flax_pref.checkpoints.hub import DEMO, RECORD
from flax_pref.checkpoints.lora import FILE_NAMES
from flax_pref.diffusion.rules import CONTRASTING
from flax_pref.evaluation.markdown import cell, figures_of, table
from flax_pref.images.image_set import MANIFEST, SHEET

PROMPT = "a lighthouse in a storm"  # of the examples
# Rules of methods and of modules; others guide by PGD.
RULES_OF_METHODS = {"CHATS": "chats", "NPO": "npo"}
RULES_OF_MODULES = {("pos", "neg"): "cpgd", ("pos",): "positive_only", ("neg",): "negative_only"}
FAMILY_TAGS = {"stable-diffusion-v1": ("stable-diffusion",), "stable-diffusion-xl-v1-base": ("stable-diffusion-xl",)}
UNPUBLISHED = "PATH_OF_THE_BASE"  # in examples, where the base is on no Hub


class SharedData(NamedTuple):
    """Training data in words, and the dataset of the Hub that they are of, if any."""

    told: str
    dataset: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedRun:
    """Facts for the card of a training run.

    Attributes:
        repository: on the Hub.
        name: of the run.
        base: Hub id of the base, or "demo"; None: a local checkpoint.
        base_name: of the base, where it has no id.
        license: of the base.
        method: its name.
        about: what it does.
        modules: names.
        weights: "lora" or "full".
        rule: that guides with the modules.
        family: of the base, as modelspec names it; None: unknown.
        w: its strength: the one chosen for the modules, or that of the run's sample images.
        guidance_scale: likewise.
        steps: of training.
        settings: all of the run.
        data: what it was trained on.
        last_metrics: of the last step of training.
        grid: its file.
        grid_prompts: of its rows.
        report: what report.json says.
        files: of the repository.
    """

    repository: str
    name: str
    base: str | None
    base_name: str
    license: str
    method: str
    about: str
    modules: tuple[str, ...]
    weights: str
    rule: str
    family: str | None
    w: float
    guidance_scale: float
    steps: int
    settings: Mapping[str, Any]
    data: SharedData
    last_metrics: Mapping[str, Any]
    grid: str | None
    grid_prompts: tuple[str, ...]
    report: Mapping[str, Any] | None
    files: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedImages:
    """Facts for the card of an image set.

    Attributes:
        repository: on the Hub.
        name: of the set.
        license: of the images.
        table: the manifest.
        files: of the repository.
        settings: that the images were drawn with.
        layout: of the files.
        scored: whether scores are among them.
    """

    repository: str
    name: str
    license: str
    table: pa.Table
    files: tuple[str, ...]
    settings: Mapping[str, Any]
    layout: str
    scored: bool


def rule_of(method: str, modules: Sequence[str]) -> str:
    """The name of the rule that guides with the modules of a method."""
    return RULES_OF_METHODS.get(method) or RULES_OF_MODULES.get(tuple(modules), "pgd")


def guiding(rule: str) -> str:
    """The same rule as flags name it: the table's npo has a positive module too."""
    return "negative_only" if rule == "npo" else rule


# ----------------------------------------------------------------------------------------------------------------------
# Training runs


def model_card(run: SharedRun) -> str:
    """The card of a repository of modules."""
    lora, base = run.weights == "lora", None if run.base == DEMO else run.base
    repository, _, revision = (base or "").partition("@")
    tags = ["flax_pref", "preference-alignment", run.method, *FAMILY_TAGS.get(run.family or "", ())]
    data = ModelCardData(
        base_model=repository or None,
        base_model_relation=("adapter" if lora else "finetune") if repository else None,
        license=run.license,
        tags=[*tags, "text-to-image", *(["lora"] if lora else [])],
        library_name="diffusers",
        pipeline_tag="text-to-image",
        datasets=[run.data.dataset] if run.data.dataset else None,
    )
    kind = "LoRA modules" if lora else "UNets with weights of their own"
    told = f"[{repository}](https://huggingface.co/{repository})" if repository else cell(run.base_name)
    told += f" at revision {cell(revision)}" if revision else ""
    rows = [
        ["base", f"{told} (licence: {cell(run.license)})"],
        ["data", cell(run.data.told)],
        ["method", cell(f"{run.method}: {run.about}" if run.about else run.method)],
        ["modules", ", ".join(f"`{name}`" for name in run.modules) + f" ({kind})"],
        ["steps", f"{run.steps:,}"],
        ["rule", f"`{run.rule}`"],
    ]
    parts = [
        f"# {cell(run.name)}",
        f"Preference modules for text-to-image diffusion, trained with {run.method} by flax_pref. Contrastive guidance "
        "combines the predictions of the modules and of the base in each step.",
        table([["", ""], *rows]),
    ]
    if run.grid is not None:
        prompts = "".join(f"\n- {cell(prompt)}" for prompt in run.grid_prompts)
        caption = f"Sample images of the run under `{run.rule}`, w = {run.w:g}, s = {run.guidance_scale:g}:{prompts}"
        parts += ["## Images", f"![Images of the modules]({run.grid})", *([caption] if prompts else [])]
    parts += ["## Use", *_uses(run)]
    if run.report is not None:
        parts += ["## Metrics", *figures_of(run.report)]
    if run.last_metrics:
        rows = [[f"`{name}`", number(value)] for name, value in run.last_metrics.items() if value is not None]
        parts += ["## Training", "Metrics of the last recorded step:", table([["metric", "value"], *rows])]
    rows = [[f"`{name}`", cell(value)] for name, value in flat(run.settings)]
    parts += ["## Settings", table([["setting", "value"], *rows])]
    parts += [_licence(run.license, "The modules are derived from the base, whose licence applies to them too.")]
    return _card(data, parts)


def _uses(run: SharedRun) -> list[str]:
    """How to use the modules in diffusers, ComfyUI and JAX."""
    base, repository, lora = run.base or UNPUBLISHED, run.repository, run.weights == "lora"
    model, _, revision = (UNPUBLISHED if base == DEMO else base).partition("@")
    at = f', revision="{revision}"' if revision else ""
    first = run.modules[0]
    diffusers = ["import torch", "from diffusers import DiffusionPipeline" + ("" if lora else ", UNet2DConditionModel")]
    if lora:
        loads = [
            f'pipe.load_lora_weights("{repository}", weight_name="{FILE_NAMES["diffusers"].format(name)}", '
            f'adapter_name="{name}")'
            for name in run.modules
        ]
        diffusers += [
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{model}"{at}, torch_dtype=torch.float16).to("cuda")',
            *loads,
            f'pipe.set_adapters("{first}")',
        ]
        comfy = ", ".join(f"`{FILE_NAMES['kohya'].format(name)}`" for name in run.modules)
        comfy = f"Put {comfy} into `ComfyUI/models/loras` and add the node *Load LoRA*."
    else:
        diffusers += [
            "",
            f'unet = UNet2DConditionModel.from_pretrained("{repository}", subfolder="{first}", '
            "torch_dtype=torch.float16)",
            f'pipe = DiffusionPipeline.from_pretrained("{model}"{at}, unet=unet, torch_dtype=torch.float16).to("cuda")',
        ]
        comfy = ", ".join(f"`{name}/diffusion_pytorch_model.safetensors`" for name in run.modules)
        comfy = f"Put {comfy} into `ComfyUI/models/diffusion_models` and add the node *Load Diffusion Model*."
    diffusers.append(f'image = pipe("{PROMPT}").images[0]')
    sources = ", ".join(f'"{name}": "{repository}"' for name in run.modules)
    rule = {
        "cpgd": f"fp.cpgd({run.w:g}, {run.guidance_scale:g})",
        "positive_only": f'fp.cpgd({run.w:g}, {run.guidance_scale:g}, negative="base")',
        "negative_only": f'fp.cpgd({run.w:g}, {run.guidance_scale:g}, positive="base")',
        "pgd": f'fp.pgd({run.w:g}, {run.guidance_scale:g}, "{first}")',
        "chats": f"fp.chats({run.guidance_scale:g})",
        "npo": f'fp.npo({run.guidance_scale:g}, "base", "{first}")',
    }[run.rule]
    jax = [
        "import flax_pref as fp",
        "",
        f'pipeline = fp.load_pipeline("{base}")',
        f"guided = fp.load_modules(pipeline.unet, {{{sources}}})",
        "draw = fp.TextToImage(pipeline.replace(unet=guided.base), modules=guided.modules)",
        f'images = draw(["{PROMPT}"], rule={rule})',
    ]
    shell = [f"flax-pref sample --model {repository if run.base else UNPUBLISHED}"]
    shell += [f"--module {name}={repository}" for name in run.modules]
    named = guiding(run.rule)
    shell += [f"--rule {named}", *([f"--w {run.w:g}"] if named in CONTRASTING else [])]
    shell += [f"--guidance-scale {run.guidance_scale:g}", f'--prompt "{PROMPT}"']
    alone = "One module alone, as any adapter:" if "pipeline.py" in run.files else ALONE
    return [
        *("### JAX", _code("python", jax), "Or from a shell:", _code("sh", [" ".join(shell)])),
        *("### diffusers", *_guided_diffusers(run), alone, _code("python", diffusers)),
        *("### ComfyUI", comfy, COMFYUI if lora else ALONE),
    ]


ALONE = "One module alone; guidance by the rule needs JAX."
COMFYUI = (
    "That is one module alone. To guide by the rule, copy the folder `integrations/comfyui` of flax_pref into "
    "`ComfyUI/custom_nodes`; its nodes *Load preference modules* and *Contrastive guidance* take the same files."
)


def _guided_diffusers(run: SharedRun) -> list[str]:
    """How to guide in diffusers, with the pipeline.py of the repository."""
    if "pipeline.py" not in run.files:
        return []
    lines = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{run.repository}", custom_pipeline="{run.repository}",',
        '    trust_remote_code=True, torch_dtype=torch.float16).to("cuda")',
        f'image = pipe("{PROMPT}", guidance_scale={run.guidance_scale:g}'
        + (f", w={run.w:g}" if guiding(run.rule) in CONTRASTING else "")
        + ").images[0]",
    ]
    told = f"Guidance by the rule `{guiding(run.rule)}`; `trust_remote_code` runs `pipeline.py` of this repository."
    return [told, _code("python", lines)]


# ----------------------------------------------------------------------------------------------------------------------
# Image sets and reports


def images_card(images: SharedImages) -> str:
    """The card of a dataset repository with an image set."""
    rows, tars = images.table, [name for name in images.files if name.endswith(".tar")]
    sizes = sorted(set(zip(rows["height"].to_pylist(), rows["width"].to_pylist(), strict=True)))
    seeds = sorted(set(rows["seed"].to_pylist()))
    groups = sorted({group for group in rows["group"].to_pylist() if group})
    config = {"config_name": "default", "data_files": [{"split": "test", "path": "*.tar" if tars else MANIFEST}]}
    data = DatasetCardData(
        license=images.license,
        task_categories=["text-to-image"],
        tags=["flax_pref", "text-to-image", *(["webdataset"] if tars else [])],
        pretty_name=images.name,
        size_categories=[_size_category(len(rows))],
        configs=[config],
    )
    facts = [
        ["images", f"{len(rows):,}"],
        ["prompts", f"{len(set(rows['prompt_id'].to_pylist())):,}"],
        ["seeds", f"{len(seeds):,} ({seeds[0]} to {seeds[-1]})"],
        ["size in pixels (height x width)", ", ".join(f"{height} x {width}" for height, width in sizes[:8])],
        *([["groups", cell(", ".join(groups[:20]))]] if groups else []),
        [
            "layout",
            f"WebDataset, {len(tars):,} {'shards' if len(tars) > 1 else 'shard'}" if tars else cell(images.layout),
        ],
    ]
    stored = "Each sample of a shard has the image, its prompt (`.txt`) and its settings (`.json`)." if tars else ""
    scored = " `scores.parquet` has the scores of rewards." if images.scored else ""
    parts = [
        f"# {cell(images.name)}",
        "Images of prompts, drawn by flax_pref: every prompt with the same seeds, to be compared with other sets.",
        table([["", ""], *facts]),
        *([f"![The first images]({SHEET})"] if SHEET in images.files else []),
        "## Files",
        f"`{MANIFEST}` has a row for each image: prompt, seed, settings, hashes of the weights, and in which file and "
        f"at which byte it is, with its SHA-256. {stored}{scored}".strip(),
        "## Use",
        _code(
            "sh",
            [
                f"hf download {images.repository} --repo-type dataset --local-dir images",
                "flax-pref score images --rewards pickscore",
            ],
        ),
        "## Settings",
        table([["setting", "value"], *[[f"`{name}`", cell(value)] for name, value in flat(images.settings)]]),
        _licence(images.license, "The checkpoint that drew the images may restrict their use."),
    ]
    return _card(data, parts)


def report_card(repository: str, name: str, license_name: str, report: Mapping[str, Any], files: Sequence[str]) -> str:
    """The card of a dataset repository with a report."""
    config = {"config_name": "default", "data_files": [{"split": "test", "path": "table.csv"}]}
    data = DatasetCardData(
        license=license_name,
        task_categories=["text-to-image"],
        tags=["flax_pref", "text-to-image", "evaluation"],
        pretty_name=name,
        configs=[config] if "table.csv" in files else None,
    )
    pages = [name for name in ("report.html", "vote.html") if name in files]
    methods = [
        [
            cell(method["name"]),
            f"{method['images']:,}",
            cell(method["settings"].get("rule", "")),
            "" if method["w"] is None else f"{method['w']:g}",
        ]
        for method in report["methods"]
    ]
    shown = f" {' and '.join(pages)}: the images side by side; download the repository to open them." if pages else ""
    parts = [
        f"# {cell(name)}",
        f"Text-to-image methods compared on the same prompts and seeds, by flax_pref on {report['created']}.",
        "## Metrics",
        *figures_of(report),
        "## Methods",
        table([["method", "images", "rule", "w"], *methods]),
        "## Files",
        f"`report.json` has everything, `table.csv` and `categories.csv` the numbers, `table.tex` a table for papers."
        f"{shown}",
        _code("sh", [f"hf download {repository} --repo-type dataset --local-dir report"]),
    ]
    return _card(data, parts)


def _size_category(count: int) -> str:
    """A number of samples as the Hub files it."""
    ends = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
    return next((name for end, name in ends.items() if count < end), "1M<n<10M")


# ----------------------------------------------------------------------------------------------------------------------
# Markdown


def _card(data: ModelCardData | DatasetCardData, parts: Iterable[str]) -> str:
    body = "\n\n".join(part for part in parts if part)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n\n`{RECORD}` is the record that flax_pref reads.\n"


def _licence(name: str, more: str) -> str:
    told = "not recorded" if name == "unknown" else f"`{name}`"
    return f"## Licence\n\n{told}. {more}"


def _code(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def number(value: Any) -> str:
    """A metric with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else cell(value)


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Settings as `optimizer.learning_rate` and value; without those that are not set."""
    rows = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{name}.")
        elif value not in (None, "", [], ()):
            rows.append((f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list) else value))
    return rows
