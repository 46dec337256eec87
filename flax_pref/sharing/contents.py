"""Contents of a repository of the Hub: the files of a training run, an image set or a report, with a card and a record.

    README.md          the card
    flax_pref.json     the record: what the repository is, read by --model, --module and the next push
    pipeline.py        and model_index.json, networks/, scheduler/: guidance in diffusers, where the base is on the Hub
    pos.safetensors    and pos_kohya.safetensors: a LoRA module in both layouts; pos/: one with weights of its own
    grid.png           images of a run
    metrics.jsonl      what training measured

An image set keeps its shards, manifest and scores, a report its tables and pages.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from PIL import Image
from safetensors import safe_open

from flax_pref import __version__, methods
from flax_pref.checkpoints.hub import DEMO, HUB_ID, RECORD, UNREACHABLE
from flax_pref.checkpoints.lora import FILE_NAMES
from flax_pref.checkpoints.module_info import ARCHITECTURES, STRENGTH
from flax_pref.config import UserError, public
from flax_pref.data.prepared import PAIRS
from flax_pref.diffusion.drawing import resolve_drawing
from flax_pref.diffusion.rules import CONTRASTING
from flax_pref.evaluation.runs import SCORES
from flax_pref.files import read_json
from flax_pref.images.image_set import MANIFEST, SETTINGS, SHEET, read_manifest
from flax_pref.programs import command, title
from flax_pref.serving.diffusers_export import LORA_FILE, check_exportable, described
from flax_pref.serving.export_flags import ExportFlags
from flax_pref.sharing import cards
from flax_pref.sharing.push_flags import PushFlags
from flax_pref.training.export import NAMES
from flax_pref.training.records import METRICS, SAMPLES

CARD, CONFIG, REPORT, UNKNOWN = "README.md", "config.json", "report.json", "unknown"
LAYOUTS = ("diffusers", "kohya")  # of shared LoRA modules
# Settings of a run that say something about a machine only.
OF_MACHINES = ("output", "hosts", "host_timeout", "export_only", "profile", "track", "track_project")
REPORT_FILES = ("table.csv", "categories.csv", "table.tex")
LICENSES = {
    DEMO: "apache-2.0",
    **dict.fromkeys(
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4"), "creativeml-openrail-m"
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
}


class SharedKind(NamedTuple):
    """The kind of a folder.

    Attributes:
        name: in records.
        repository: type of its repository on the Hub.
    """

    name: str
    repository: str


RUN, IMAGES, COMPARISON = (
    SharedKind("modules", "model"),
    SharedKind("images", "dataset"),
    SharedKind("report", "dataset"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """Files of a repository.

    Attributes:
        kind: what it is.
        name: of the folder that is shared.
        told: what was found, for the user.
        notes: what the user may want to change.
        files: by their path in the repository, a file of this machine or the bytes themselves.
    """

    kind: SharedKind
    name: str
    told: str
    notes: tuple[str, ...]
    files: Mapping[str, Path | bytes]


def gather(flags: PushFlags) -> Contents:
    """Finds out what a folder holds, and collects what its repository gets.

    Raises:
        UserError, FileNotFoundError, ValueError: it holds nothing to share, is not finished, or is damaged.
    """
    folder = Path(flags.folder).expanduser()
    if "://" in flags.folder:
        raise UserError(f"{flags.folder}: expected a local folder; copy it from there")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a training run, an image set or a report")
    if _is_run(folder):
        return _gather_run(folder, flags)
    for flag in ("report", "grid", "base_model"):
        if getattr(flags, flag) is not None:
            raise UserError(
                f"--{flag.replace('_', '-')} {getattr(flags, flag)}: is of training runs, but {folder} is none"
            )
    if (folder / REPORT).is_file():
        return _gather_report(folder, flags)
    if (folder / MANIFEST).is_file() or (folder / SETTINGS).is_file():
        return _gather_images(folder, flags)
    raise UserError(
        f"{folder}: nothing to share; expected a run of {title('train')} ({CONFIG} and modules/), an image set of "
        f"{title('sample')} ({MANIFEST}) or a report of {title('report')} ({REPORT})"
    )


def _contents(
    kind: SharedKind,
    folder: Path,
    files: Mapping[str, Path | bytes],
    card: str,
    record: Mapping[str, Any],
    told: str,
    notes: tuple[str, ...],
) -> Contents:
    """The files with the card and the record."""
    name = folder.resolve().name
    listed = sorted({*files, CARD, RECORD})
    record = {"kind": kind.name, "name": name, **record, "flax_pref": __version__, "files": listed}
    own = {CARD: card.encode(), RECORD: json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n"}
    return Contents(kind=kind, name=name, told=told, notes=notes, files={**own, **files})


# ----------------------------------------------------------------------------------------------------------------------
# Training runs


def _is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run."""
    if not (folder / CONFIG).is_file():
        return False
    return {"method", "steps", "weights", "model"} <= read_json(folder / CONFIG, expected="that of a run").keys()


def _gather_run(folder: Path, flags: PushFlags) -> Contents:
    config = read_json(folder / CONFIG, expected="that of a run")
    method, modules = _method(config), _module_names(folder, config)
    base = flags.base_model or _hub_id(str(config["model"]))
    if flags.base_model and not HUB_ID.fullmatch(flags.base_model.partition("@")[0]):
        raise UserError(f"--base-model {flags.base_model}: expected the id of a repository on the Hub, USER/NAME")
    license_name = flags.license or _license(base, str(config["model"]))
    report = None if flags.report is None else read_report(Path(flags.report))
    grid = _grid(folder, flags.grid)
    data = _data(config)
    family, w = _described(folder / "modules", modules[0])
    strengths = {"w": config.get("samples", {}).get("w", 1.0) if w is None else w}
    strengths["guidance_scale"] = config.get("samples", {}).get("guidance_scale", 7.5)
    rule = cards.rule_of(method, modules)
    pipeline, lacks = _pipeline_files(folder, config, base, modules, rule, strengths)
    files = _run_files(folder, modules, grid) | pipeline
    settings = public({name: value for name, value in config.items() if name not in OF_MACHINES})
    run = cards.SharedRun(
        repository=flags.repo,
        name=folder.resolve().name,
        base=base,
        base_name=PurePath(str(config["model"])).name,
        license=license_name,
        method=method,
        about=_about(method),
        modules=modules,
        weights=config["weights"],
        rule=rule,
        family=family,
        **strengths,
        steps=config["steps"],
        settings=settings,
        data=data,
        last_metrics=_last_metrics(folder / METRICS),
        grid=None if grid is None else f"grid{grid.suffix.lower()}",
        grid_prompts=tuple(config.get("samples", {}).get("prompts", ())) if flags.grid is None else (),
        report=report,
        files=tuple(files),
    )
    notes = [] if lacks is None else [f"no pipeline.py for diffusers: {lacks}"]
    if base is None:
        notes.append("the base is a local checkpoint; name its repository with --base-model, for others to find it")
    if license_name == UNKNOWN:
        notes.append("the licence of the base is not known; name it with --license")
    if report is None:
        notes.append("no report; --report DIR adds metrics with intervals to the card")
    record = {
        **{"base": base, "modules": list(modules), "method": method, "weights": config["weights"]},
        **{"rule": run.rule, "settings": settings},
    }
    told = f"a training run ({method}, {'modules' if len(modules) > 1 else 'module'} {', '.join(modules)})"
    return _contents(RUN, folder, files, cards.model_card(run), record, told, tuple(notes))


def _run_files(folder: Path, modules: tuple[str, ...], grid: Path | None) -> dict[str, Path | bytes]:
    """Modules, metrics and the grid of a run, by their paths in its repository."""
    stored, files = folder / "modules", {}
    for name in modules:
        files |= {path.name: path for layout in LAYOUTS if (path := _stored(stored, name, layout)).is_file()}
        network = stored / NAMES["merged"].format(name)
        if not (stored / FILE_NAMES["diffusers"].format(name)).is_file():
            files |= {f"{name}/{path.name}": path for path in sorted(network.iterdir()) if path.is_file()}
            single = stored / NAMES["single"].format(name)
            files |= {single.name: single} if single.is_file() else {}
    if (folder / METRICS).is_file():
        files[METRICS] = folder / METRICS
    return files | ({} if grid is None else {f"grid{grid.suffix.lower()}": grid})


def _pipeline_files(
    folder: Path,
    config: Mapping[str, Any],
    base: str | None,
    modules: tuple[str, ...],
    rule: str,
    strengths: Mapping[str, float],
) -> tuple[dict[str, Path | bytes], str | None]:
    """What diffusers needs to guide with the modules, see `serving.diffusers_export`; or why there is no such."""
    if config["weights"] == "full":
        return {}, f"modules with weights of their own are written by {command('export')} --format diffusers"
    if base is None or base == DEMO:
        return {}, "its base is on no Hub"
    stored = {name: _stored(folder / "modules", name, "diffusers") for name in modules}
    try:
        flags = ExportFlags(
            model=base,
            module=tuple(f"{name}={file}" for name, file in stored.items()),
            rule=cards.guiding(rule),
            w=f"{strengths['w']:g}" if cards.guiding(rule) in CONTRASTING else None,
            guidance_scale=f"{strengths['guidance_scale']:g}",
            format="diffusers",
            out=str(folder),
        )
        drawing = resolve_drawing(flags, weights=False)
        check_exportable(flags, drawing)
        networks = {f"module_{name}": file for name, file in stored.items()}
        files = described(flags, drawing, {}, {"lora": [*networks], "unets": []})
    except (UserError, FileNotFoundError, ValueError) as error:
        return {}, str(error)
    return files | {f"networks/{name}/{LORA_FILE}": file for name, file in networks.items()}, None


def _stored(folder: Path, name: str, layout: str) -> Path:
    return folder / FILE_NAMES[layout].format(name)


def _module_names(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules of a run, all of which are there.

    Raises:
        UserError: they are not exported, or not in both layouts.
    """
    stored = folder / "modules"
    again = f"finish the run, or write them with {command('train')} CONFIG --output {folder} --export-only"
    if config["weights"] == "full":
        there = {path.parent.name for path in stored.glob(f"*/{CONFIG}")}
        lacking = "with weights of their own"
    else:
        found = {layout: {path.name for path in stored.glob(FILE_NAMES[layout].format("*"))} for layout in LAYOUTS}
        ends = [NAMES[layout].format("") for layout in ("kohya", "single")]
        plain = {name for name in found["diffusers"] if not name.endswith(tuple(ends))}
        there = {name.removesuffix(".safetensors") for name in plain}
        there |= {name.removesuffix(ends[0]) for name in found["kohya"]}
        for layout in LAYOUTS:
            absent = sorted(name for name in there if FILE_NAMES[layout].format(name) not in found[layout])
            if absent:
                raise UserError(
                    f"{stored}: module {absent[0]!r} is not there in the layout {layout}; {again} "
                    "--export.layout diffusers --export.layout kohya"
                )
        lacking = "as LoRA"
    expected = _trained(config) or tuple(sorted(there))
    absent = [name for name in expected if name not in there]
    if absent or not expected:
        raise UserError(f"{stored}: no exported modules {lacking} ({', '.join(absent) or 'none'}); {again}")
    return expected


def _described(stored: Path, name: str) -> tuple[str | None, float | None]:
    """The family of the network that a module is for, as modelspec names it, and the strength chosen for the module."""
    file = _stored(stored, name, "diffusers")
    if not file.is_file():
        config = read_json(stored / name / CONFIG, expected="that of a UNet")
        return ARCHITECTURES.get(config.get("cross_attention_dim", 0)), None
    with safe_open(file, "numpy") as opened:
        told = opened.metadata() or {}
    family = told.get("modelspec.architecture", "").removesuffix("/lora")
    return family or None, float(told[STRENGTH]) if STRENGTH in told else None


def _method(config: Mapping[str, Any]) -> str:
    """The name of the method; runs of older versions do not record it."""
    method = config["method"]
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        raise UserError(
            f"{CONFIG} of the run names no method: it is of an older version; write it again with "
            f"{command('train')} CONFIG --export-only"
        )
    return method["name"]


def _trained(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that the method of a run trains, in its order; empty where this version does not know the method."""
    kind = getattr(methods, _method(config), None)
    with contextlib.suppress(TypeError, ValueError):  # fields of another version
        fields = {name: value for name, value in config["method"].items() if name != "name"}
        return () if kind is None else tuple(kind(**fields).modules)
    return ()


def _about(method: str) -> str:
    """The first line of a method's documentation."""
    doc = getattr(methods, method).__doc__ if hasattr(methods, method) else None
    return (doc or "").strip().partition("\n")[0]


def _hub_id(model: str) -> str | None:
    """The id of a checkpoint on the Hub, perhaps with a revision, or "demo"; None: it is a local one."""
    named = HUB_ID.fullmatch(model.partition("@")[0]) and not Path(model).expanduser().exists()
    return model if named or model == DEMO else None


def _license(base: str | None, model: str) -> str:
    """The licence of a base, as its card names it."""
    repository = None if base is None else base.partition("@")[0]
    if repository in LICENSES:
        return LICENSES[repository]
    found = None
    with contextlib.suppress(*UNREACHABLE, HFValidationError, OSError, ValueError):  # out of reach, or without a card
        if repository is not None:
            card = HfApi().model_info(repository).card_data
            found = None if card is None else card.to_dict().get("license")
        elif (file := Path(model).expanduser() / CARD).is_file():
            found = ModelCard.load(file).data.to_dict().get("license")
    return found if isinstance(found, str) else UNKNOWN


def _data(config: Mapping[str, Any]) -> cards.SharedData:
    """The training data of a run, from the files that are there."""
    if (online := config.get("online")) is not None:
        rewards = ", ".join(str(reward["name"]) for reward in online["rewards"])
        prompts = public(str(online["prompts"]))
        return cards.SharedData(f"images of its own for the prompts of {prompts}, judged by {rewards}", None)
    name = public(str(config["data"]))
    file = Path(str(config["data"])).expanduser() / PAIRS / "metadata.json"
    if not file.is_file():
        return cards.SharedData(f"the prepared set {name}", None)
    metadata = read_json(file, expected="that of a prepared set")
    source, counts = metadata.get("settings", {}).get("source"), metadata.get("counts", {})
    pairs = f"{counts['pairs']:,} pairs" if "pairs" in counts else "pairs"
    if not isinstance(source, dict):
        return cards.SharedData(f"{pairs} of the prepared set {name}", None)
    dataset = _hub_id(source["path"]) if source.get("layout") in ("pick_a_pic", "datasets") else None
    told = f"{pairs} of {public(source['path'])} (layout {source['layout']}, split {source.get('split')})"
    return cards.SharedData(told, dataset)


def _last_metrics(file: Path) -> dict[str, Any]:
    """The last line of the metrics of a run; empty if there is none."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    with contextlib.suppress(ValueError, IndexError):
        last = json.loads(lines[-1])
        return last if isinstance(last, dict) else {}
    return {}


def _grid(folder: Path, given: str | None) -> Path | None:
    """The image of the card: the one that is given, or the newest sample images."""
    if given is None:
        sheets = [sheet for sheet in (folder / SAMPLES).glob("*.png") if sheet.stem.isdecimal()]
        return max(sheets, key=lambda sheet: int(sheet.stem), default=None)
    file = Path(given).expanduser()
    if not file.is_file():
        raise UserError(f"--grid {given}: no such file; expected a PNG, JPEG or WebP image")
    try:
        with Image.open(file) as opened:
            opened.verify()
            kind = opened.format
    except Exception as error:  # damaged files make Pillow raise nearly every kind of exception
        raise UserError(f"--grid {given}: cannot be read as an image; expected a PNG, JPEG or WebP image") from error
    if kind not in ("PNG", "JPEG", "WEBP") or file.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--grid {given}: is a {kind}; expected a PNG, JPEG or WebP image whose name ends so")
    return file


# ----------------------------------------------------------------------------------------------------------------------
# Image sets


def _gather_images(folder: Path, flags: PushFlags) -> Contents:
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder}: is not finished, it has no {MANIFEST}; finish it first with the command of {title('sample')} "
            "that began it"
        )
    try:
        table = read_manifest((folder / MANIFEST).read_bytes())
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST}: damaged ({error}); have {title('sample')} write it again") from error
    names = list(dict.fromkeys(table["file"].to_pylist()))
    if not names:
        raise UserError(f"{folder / MANIFEST}: has no rows; expected those of the images")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(
            f"{folder / missing[0]}: missing, with {len(missing) - 1} more of the manifest; run the command of "
            f"{title('sample')} that drew the set again, which draws what is missing"
        )
    beside = [name for name in (MANIFEST, SETTINGS, SHEET, SCORES) if (folder / name).is_file()]
    files = {name: folder / name for name in (*beside, *names)}
    begun = read_json(folder / SETTINGS, expected="that of an image set") if SETTINGS in files else {}
    settings = begun.get("settings", {})
    license_name = flags.license or UNKNOWN
    card = cards.images_card(
        cards.SharedImages(
            repository=flags.repo,
            name=folder.resolve().name,
            license=license_name,
            table=table,
            files=tuple(files),
            settings=public(settings),
            layout=begun.get("images", {}).get("layout", "flat"),
            scored=SCORES in files,
        )
    )
    notes = [] if flags.license else ["the licence of the images is not known; name it with --license"]
    if public(settings) != settings:
        notes.append(f"{SETTINGS} and the metadata of the images name folders of this machine, as they were drawn")
    told = f"an image set ({len(table):,} images in {len(names):,} {'files' if len(names) > 1 else 'file'})"
    return _contents(IMAGES, folder, files, card, {"settings": public(settings)}, told, tuple(notes))


# ----------------------------------------------------------------------------------------------------------------------
# Reports


def read_report(folder: Path) -> dict[str, Any]:
    """A report, with the folders of its methods by their names only.

    Raises:
        UserError: there is no report, or it is not one of flax-pref.
    """
    file = folder / REPORT if folder.is_dir() else folder
    if not file.is_file():
        raise UserError(f"{folder}: no {REPORT} in it; expected the folder that {title('report')} has written")
    report = read_json(file, expected=f"the report of {title('report')}")
    try:
        cards.figures_of(report)
        report["methods"] = [method | {"folder": PurePath(method["folder"]).name} for method in report["methods"]]
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a report of {title('report')} ({error!r}); write it again") from error
    return report


def _gather_report(folder: Path, flags: PushFlags) -> Contents:
    written = read_json(folder / REPORT, expected=f"the report of {title('report')}")
    report = read_report(folder)
    files: dict[str, Path | bytes] = {name: folder / name for name in REPORT_FILES if (folder / name).is_file()}
    files[REPORT] = json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n"
    pages = {name: _page(folder / name, written, report) for name in ("report.html", "vote.html")}
    linked = [name for name, page in pages.items() if page is not None and b'"../' in page]
    files |= {name: page for name, page in pages.items() if page is not None and not linked}
    if not linked:
        files |= {path.relative_to(folder).as_posix(): path for path in sorted((folder / "images").rglob("*.*"))}
    license_name = flags.license or UNKNOWN
    card = cards.report_card(flags.repo, folder.resolve().name, license_name, report, tuple(files))
    notes = [] if flags.license else ["the licence of the images is not known; name it with --license"]
    if linked:
        notes.append(
            f"{' and '.join(linked)} are left out: they show images that lie elsewhere; {command('report')} ... "
            "--images embed writes pages that hold them"
        )
    told = f"a report ({', '.join(method['name'] for method in report['methods'])})"
    return _contents(COMPARISON, folder, files, card, {"baseline": report["baseline"]}, told, tuple(notes))


def _page(file: Path, written: Mapping[str, Any], report: Mapping[str, Any]) -> bytes | None:
    """A page of the report with the same folders as in `report`; None: there is none."""
    if not file.is_file():
        return None
    page = file.read_text(encoding="utf-8")
    for method, shown in zip(written["methods"], report["methods"], strict=True):
        page = page.replace(f'"folder":{json.dumps(method["folder"])}', f'"folder":{json.dumps(shown["folder"])}')
    return page.encode()
