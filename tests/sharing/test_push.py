"""What `flax-pref push` shares: files, cards and records, on a Hub of this machine that records what it is sent."""

import json
import re
import shlex
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard, constants
from PIL import Image
from sharing.hub_server import TOKEN, serving

from flax_pref.checkpoints.diffusers import load_pipeline, save_pipeline
from flax_pref.checkpoints.lora import lora_network, save_lora
from flax_pref.checkpoints.module_info import ModuleInfo
from flax_pref.checkpoints.modules import find_module, fingerprint
from flax_pref.cli import command
from flax_pref.config import dump_config, parse_flags, public
from flax_pref.data.pipeline import InputConfig
from flax_pref.data.prompts import Prompt
from flax_pref.diffusion.drawing import resolve_drawing
from flax_pref.diffusion.rules import named_rule
from flax_pref.evaluation.report_flags import ReportFlags
from flax_pref.evaluation.run_report import report_runs
from flax_pref.evaluation.run_scoring import score
from flax_pref.evaluation.runs import open_run
from flax_pref.images.image_flags import ImageFlags
from flax_pref.images.image_set import ImageSet, Item
from flax_pref.methods import CHATS, NPO, DiffusionDPO, PositiveNegative
from flax_pref.models.lora import select_lora, split_lora
from flax_pref.sharing.contents import gather
from flax_pref.sharing.push import write
from flax_pref.sharing.push_flags import PushFlags
from flax_pref.training.export import NAMES
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.samples import SampleConfig
from flax_pref.training.trainer import TrainConfig, fields_of
from tests.checkpoints.small import small_pipeline

REPO = "anna/modules"
# Of huggingface_hub itself, where it uploads without hf_xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of two modules, two scored image sets and their report."""
    folder = tmp_path_factory.mktemp("world")
    unet = lora_network(load_pipeline("demo").unet, ("pos", "neg"), rank=2, alpha=2, key=jax.random.key(0))
    _, lora = split_lora(unet.params)
    for layout in ("diffusers", "kohya"):
        for i, name in enumerate(("pos", "neg")):
            file = (
                folder
                / "run"
                / "modules"
                / (f"{name}.safetensors" if layout == "diffusers" else f"{name}_kohya.safetensors")
            )
            info = ModuleInfo(name=name, base="demo", method="PositiveNegative", steps=4)
            save_lora(select_lora(lora, i), file, alpha=2, layout=layout, config=unet.config, info=info)
    described = {"settings": {"source": {"layout": "pick_a_pic", "path": "owner/pairs", "split": "train"}}}
    (folder / "secret" / "pairs" / "pairs").mkdir(parents=True)
    (folder / "secret" / "pairs" / "pairs" / "metadata.json").write_text(
        json.dumps({**described, "counts": {"pairs": 5}})
    )
    describe_run(folder / "run", data=folder / "secret" / "pairs")
    (folder / "run" / "metrics.jsonl").write_text('{"step": 3, "loss": 0.7}\n{"step": 4, "loss": 0.625, "x": null}\n')
    (folder / "run" / "samples").mkdir()
    for step, colour in ((2, "red"), (10, "blue")):
        Image.new("RGB", (8, 8), colour).save(folder / "run" / "samples" / f"{step:06}.png")
    prompts = [Prompt(i, text, "", {"prompt": text}) for i, text in enumerate(("a | cat <b>", "a dog"))]
    items = [Item(prompt, seed) for prompt in prompts for seed in range(2)]
    for seed, name in enumerate(("base", "cpgd", "flat")):
        layout = "flat" if name == "flat" else "webdataset"
        images = ImageSet(folder / name, items, {"rule": name, "model": "/home/anna/sd"}, layout=layout)
        images.begin()
        images.write(range(len(items)), np.random.default_rng(seed).integers(0, 256, (len(items), 8, 8, 3), np.uint8))
        images.finish()
    score([str(folder / name) for name in ("base", "cpgd", "flat")], "compressibility")
    runs = tuple(str(folder / name) for name in ("base", "cpgd"))
    report_runs(ReportFlags(runs=runs, out=str(folder / "report")))
    report_runs(ReportFlags(runs=(str(folder / "base"), str(folder / "flat")), out=str(folder / "linked")))
    return folder


def describe_run(folder, **changes):
    """Writes the config.json of a run."""
    options = {
        **{"output": folder, "model": "demo", "method": PositiveNegative(), "data": Path("runs/pairs"), "steps": 4},
        **{"input": InputConfig(batch_size=4), "optimizer": OptimizerConfig(learning_rate=1e-4)},
        "samples": SampleConfig(every=2, prompts=("a red circle",), w=3.0),
    }
    folder.mkdir(exist_ok=True, parents=True)
    dump_config(fields_of(TrainConfig(**options | changes)), folder / "config.json")


@pytest.fixture
def hub(tmp_path):
    with serving(tmp_path) as hub:
        yield hub


def push(capsys, *arguments):
    """Status, stdout and stderr of `flax-pref push`, in neither of which is a token."""
    try:
        status = command.main(["push", *map(str, arguments)])
    except SystemExit as exit:
        status = exit.code
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err
    return status, printed.out, printed.err


def refusal(capsys, *arguments):
    """The one line that a push ends with."""
    status, _, err = push(capsys, *arguments)
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").strip()


def blocks(card, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


# ----------------------------------------------------------------------------------------------------------------------
# Training runs


def test_a_run_is_shared_with_a_card_and_drawn_from_by_its_id(world, hub, capsys):
    status, out, err = push(capsys, world / "run", "--repo", REPO, "--report", world / "report")
    assert status == 0, err
    assert "a training run (PositiveNegative, modules pos, neg)" in out and f"/{REPO}, commit " in out
    modules = {f"{name}{end}.safetensors" for name in ("pos", "neg") for end in ("", "_kohya")}
    files = hub.files(REPO)
    assert set(files) == modules | {".gitattributes", "README.md", "flax_pref.json", "grid.png", "metrics.jsonl"}
    assert [(message, deleted) for message, _, deleted in hub.commits] == [("Add run", [])] and not hub.private
    assert all(TOKEN.encode() not in data and b"secret" not in data for data in files.values())
    assert files["grid.png"] == (world / "run" / "samples" / "000010.png").read_bytes()
    for name in modules:
        assert files[name] == (world / "run" / "modules" / name).read_bytes()
    revision = out.split()[-1]
    flags = parse_flags(shlex.split(blocks(files["README.md"].decode(), "sh")[0])[2:], ImageFlags)
    assert flags.model == REPO and flags.rule == "cpgd" and flags.w == "3"
    module = tuple(f"{name}={REPO}@{revision}" for name in ("pos", "neg"))
    drawn = resolve_drawing(ImageFlags(model=f"{REPO}@{revision}", module=module, rule="cpgd", w="3", prompt=("a",)))
    local = {name: fingerprint(world / "run" / "modules" / f"{name}.safetensors") for name in ("pos", "neg")}
    assert drawn.fingerprints()["modules_sha256"] == local
    assert drawn.checkpoint.path == resolve_drawing(ImageFlags(model="demo", prompt=("a",))).checkpoint.path


def test_the_card_of_a_run_says_what_the_run_was(world, hub):
    contents = gather(PushFlags(folder=str(world / "run"), repo=REPO, report=str(world / "report")))
    text = contents.files["README.md"].decode()
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.base_model is None
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert {"flax_pref", "PositiveNegative", "lora"} <= set(card.data.tags) and card.data.datasets == ["owner/pairs"]
    assert "| data | 5 pairs of owner/pairs (layout pick\\_a\\_pic, split train) |" in text
    assert "| `optimizer.learning_rate` | 0.0001 |" in text and "| `method.name` | PositiveNegative |" in text
    assert "| `loss` | 0.625 |" in text and "![Images of the modules](grid.png)" in text and "\n- a red circle" in text
    report = json.loads((world / "report" / "report.json").read_text())
    (row,) = [row for row in report["overall"] if row["method"] == "cpgd"]
    shown = re.search(r"\| cpgd \| (\S+) \| \\\[(\S+), (\S+)\\\] \|", text)
    assert [float(x) for x in shown.groups()] == pytest.approx(list(row["mean"].values()), rel=0.02)
    for block in blocks(text, "python"):
        compile(block, "card", "exec")
    assert "rule=fp.cpgd(3, 7.5)" in text and 'weight_name="neg.safetensors", adapter_name="neg"' in text
    assert "`pos_kohya.safetensors`" in text.partition("### ComfyUI")[2]
    record = json.loads(contents.files["flax_pref.json"])
    assert (record["kind"], record["base"], record["modules"], record["rule"]) == (
        "modules",
        "demo",
        ["pos", "neg"],
        "cpgd",
    )
    assert record["files"] == sorted(contents.files) and "output" not in record["settings"]
    assert record["settings"]["data"] == "pairs", "the folders of this machine are nobody's business"


@pytest.fixture
def published_base(tmp_path, hub):
    """A small base on the Hub, and a run of modules that were trained on it."""
    pipeline = small_pipeline("sd1")
    save_pipeline(pipeline, tmp_path / "base")
    files = {
        str(file.relative_to(tmp_path / "base")): file for file in (tmp_path / "base").rglob("*") if file.is_file()
    }
    hub.add("anna/base", {name: file.read_bytes() for name, file in files.items()})
    unet = lora_network(pipeline.unet, ("pos", "neg"), rank=2, alpha=2, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda leaf: jnp.asarray(1.5 * rng.standard_normal(leaf.shape)), split_lora(unet.params)[1])
    for i, name in enumerate(("pos", "neg")):
        for layout in ("diffusers", "kohya"):
            file = tmp_path / "run" / "modules" / NAMES[layout].format(name)
            save_lora(select_lora(lora, i), file, alpha=2, layout=layout, config=unet.config)
    describe_run(tmp_path / "run", model="anna/base")
    return tmp_path / "run"


def test_a_run_on_a_published_base_is_a_pipeline_of_diffusers_too(published_base, hub, capsys):
    status, out, err = push(capsys, published_base, "--repo", REPO, "--license", "mit")
    assert status == 0 and "pipeline.py" not in out + err
    files = hub.files(REPO)
    assert files["networks/module_neg/model.safetensors"] == files["neg.safetensors"]
    index = json.loads(files["model_index.json"])
    assert (index["rule"]["name"], index["rule"]["w"], index["rule"]["guidance_scale"]) == ("cpgd", "3", "7.5")
    assert json.loads(files["networks/networks.json"])["base"] == "anna/base"
    card = files["README.md"].decode()
    guided, alone = blocks(card.partition("### diffusers")[2], "python")
    assert f'"{REPO}", custom_pipeline="{REPO}"' in guided and ", guidance_scale=7.5, w=3)" in guided
    assert "load_lora_weights" in alone
    for block in (guided, alone):
        compile(block, "card", "exec")
    # The repository leads to the base, and not to itself.
    drawing = drawing_of(REPO, {"pos": REPO, "neg": REPO})
    assert (drawing.checkpoint.path / "unet").is_dir()
    assert drawing.sources["pos"] == [(REPO, 1.0)] and find_module(REPO, "pos").name == "pos.safetensors"


@pytest.mark.program
@pytest.mark.filterwarnings("ignore")
def test_diffusers_guides_from_a_repository_as_its_card_says(published_base, hub, capsys):
    diffusers = pytest.importorskip("diffusers")
    assert push(capsys, published_base, "--repo", REPO, "--license", "mit")[0] == 0
    stored = {name: published_base / "modules" / f"{name}.safetensors" for name in ("pos", "neg")}
    drawing = drawing_of("anna/base", stored)
    drawn = drawing.load(dtype="float32", batch_size=1)(["a cat"], rule=drawing.sampled, seed=7)
    pipe = diffusers.DiffusionPipeline.from_pretrained(REPO, custom_pipeline=REPO, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "height": 16, "width": 16, "seed": 7, "output_type": "np"}
    image, plain = (pipe("a cat", guidance_scale=7.5, w=w, **options).images for w in (3, 0))
    assert np.abs(image - drawn).max() < 2 / 255
    assert np.abs(plain - drawn).max() > 8 / 255, "the modules matter"


def drawing_of(model, modules):
    given = tuple(f"{name}={place}" for name, place in modules.items())
    return resolve_drawing(
        ImageFlags(model=model, module=given, rule="cpgd", w="3", steps=10, height=16, width=16, prompt=("a",))
    )


NO_PIPELINE = {
    "a base that nobody else has": ({"model": "./runs/base"}, "its base is on no Hub"),
    "a rule that it has not": ({"method": CHATS()}, "--rule chats"),
}


@pytest.mark.parametrize("what", NO_PIPELINE)
def test_why_there_is_no_pipeline_of_diffusers_is_told(published_base, what, capsys):
    changes, reason = NO_PIPELINE[what]
    describe_run(published_base, **{"model": "anna/base", **changes})
    contents = gather(PushFlags(folder=str(published_base), repo=REPO))
    assert "pipeline.py" not in contents.files
    assert any(note.startswith(f"no pipeline.py for diffusers: {reason}") for note in contents.notes), contents.notes


@pytest.mark.parametrize(
    ("method", "modules", "rule"),
    [
        (DiffusionDPO(), ["dpo"], 'fp.pgd(3, 7.5, "dpo")'),
        (CHATS(), ["pos", "neg"], "fp.chats(7.5)"),
        (NPO(), ["neg"], 'fp.npo(7.5, "base", "neg")'),
        (PositiveNegative(train="pos"), ["pos"], 'fp.cpgd(3, 7.5, negative="base")'),
    ],
    ids=["dpo", "chats", "npo", "positive"],
)
def test_the_card_names_the_rule_of_the_method(world, tmp_path, method, modules, rule):
    describe_run(tmp_path / "run", method=method, model="lab/fine-tune@v2")
    (tmp_path / "run" / "modules").mkdir()
    for name in modules:
        for end in ("", "_kohya"):
            shutil.copy(
                world / "run" / "modules" / f"pos{end}.safetensors",
                tmp_path / "run" / "modules" / f"{name}{end}.safetensors",
            )
    with serving(tmp_path) as hub:
        hub.add("lab/fine-tune", {"model_index.json": b"{}"})
        hub.cards["models/lab/fine-tune"] = {"license": "openrail++"}
        text = gather(PushFlags(folder=str(tmp_path / "run"), repo=REPO)).files["README.md"].decode()
    card = ModelCard(text)
    assert (card.data.base_model, card.data.license) == ("lab/fine-tune", "openrail++")
    assert f"rule={rule})" in text and 'from_pretrained("lab/fine-tune", revision="v2",' in text
    (line,) = [line for block in blocks(text, "sh") for line in block.splitlines()]
    flags = parse_flags(shlex.split(line)[2:], ImageFlags)
    named = named_rule(flags.rule, guidance_scale=flags.guidance_scale, w=flags.w, module=modules[0])
    assert set(named.networks()) == set(method.rule(3.0, 7.5).networks()) and "at revision v2" in text


def test_modules_with_weights_of_their_own_are_folders_of_the_repository(tmp_path, hub, capsys):
    describe_run(
        tmp_path / "run", method=DiffusionDPO(), weights="full", model="stabilityai/stable-diffusion-xl-base-1.0"
    )
    folder = tmp_path / "run" / "modules" / "dpo"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"cross_attention_dim": 2048}')
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    status, out, err = push(capsys, tmp_path / "run", "--repo", "lab/sdxl", "--private")
    assert status == 0 and "note: no report" in out, err
    assert {"dpo/config.json", "dpo/diffusion_pytorch_model.safetensors"} <= set(hub.files("lab/sdxl"))
    card = ModelCard(hub.files("lab/sdxl")["README.md"].decode())
    assert (card.data.license, card.data.base_model_relation) == ("openrail++", "finetune") and hub.private == [
        "lab/sdxl"
    ]
    assert "stable-diffusion-xl" in card.data.tags and 'subfolder="dpo"' in card.text
    assert (find_module("lab/sdxl", "anything") / "diffusion_pytorch_model.safetensors").read_bytes() == b"weights"


def test_a_second_push_updates_its_own_repository_and_deletes_what_is_no_longer_there(world, hub, tmp_path, capsys):
    shutil.copytree(world / "run", tmp_path / "run")
    push(capsys, tmp_path / "run", "--repo", REPO)
    hub.add(REPO, {"notes.txt": b"of the user"})
    shutil.rmtree(tmp_path / "run" / "samples")
    assert push(capsys, tmp_path / "run", "--repo", REPO)[0] == 0
    message, _, deleted = hub.commits[-1]
    assert (message, deleted) == ("Update run", ["grid.png"])
    assert "notes.txt" in hub.files(REPO) and "grid.png" not in hub.files(REPO)


def test_a_dry_run_writes_what_would_be_uploaded_and_asks_for_no_token(world, tmp_path, capsys):
    arguments = (world / "run", "--repo", REPO, "--license", "mit", "--grid", world / "run" / "samples" / "000002.png")
    with serving(tmp_path, token=None) as hub:
        status, out, err = push(capsys, *arguments, "--dry-run", "--out", tmp_path / "out")
        assert status == 0 and "uploaded nothing (--dry-run)" in out, err
        assert not [asked for asked in hub.asked if asked.startswith(("POST", "PUT"))]
        again = refusal(capsys, *arguments, "--dry-run", "--out", tmp_path / "out")
        assert "out: exists and is not empty" in again
    with serving(tmp_path) as hub:
        assert push(capsys, *arguments)[0] == 0
        written = {
            str(file.relative_to(tmp_path / "out")): file for file in (tmp_path / "out").rglob("*") if file.is_file()
        }
        sent = hub.files(REPO)
        assert {name: file.read_bytes() for name, file in written.items()} == {
            n: sent[n] for n in sent if n != ".gitattributes"
        }
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "mit"
    assert find_module(tmp_path / "out", "neg") == tmp_path / "out" / "neg.safetensors"


# ----------------------------------------------------------------------------------------------------------------------
# Image sets and reports


def test_an_image_set_is_a_dataset_of_its_shards_with_manifest_and_card(world, hub, tmp_path, capsys):
    status, out, err = push(capsys, world / "cpgd", "--repo", "anna/images", "--license", "cc0-1.0")
    assert status == 0 and "an image set (4 images in 1 file)" in out and "/datasets/anna/images, commit" in out, err
    assert "note: settings.json and the metadata of the images name folders of this machine" in out
    files = hub.files("anna/images", kind="datasets")
    assert set(files) == {
        *("00000.tar", "manifest.parquet", "settings.json", "contact_sheet.png", "scores.parquet"),
        *("README.md", "flax_pref.json", ".gitattributes"),
    }
    card = DatasetCard(files["README.md"].decode())
    assert card.data.license == "cc0-1.0" and "webdataset" in card.data.tags and card.data.size_categories == ["n<1K"]
    assert card.data.configs[0]["data_files"] == [{"split": "test", "path": "*.tar"}]
    assert "| images | 4 |" in card.text and "| seeds | 2 (0 to 1) |" in card.text and "| `model` | sd |" in card.text
    for name, data in files.items():
        (tmp_path / "there").mkdir(exist_ok=True)
        (tmp_path / "there" / name).write_bytes(data)
    assert open_run(tmp_path / "there").rows.equals(open_run(world / "cpgd").rows)
    status, out, _ = push(capsys, world / "flat", "--repo", "anna/flat")
    assert status == 0 and "00000-0.png" in hub.files("anna/flat", kind="datasets")


def test_a_report_is_a_dataset_of_its_tables_and_pages(world, hub, capsys):
    status, out, err = push(capsys, world / "report", "--repo", "anna/report")
    assert status == 0 and "a report (base, cpgd)" in out, err
    files = hub.files("anna/report", kind="datasets")
    assert {"report.json", "report.html", "vote.html", "table.csv", "images/base/0-0.png"} <= set(files)
    card = DatasetCard(files["README.md"].decode())
    assert "| compressibility | mean | interval | win rate | interval | gain | interval | p |" in card.text
    assert [method["folder"] for method in json.loads(files["report.json"])["methods"]] == ["base", "cpgd"]
    assert str(world).encode() not in b"".join(files.values())
    status, out, _ = push(capsys, world / "linked", "--repo", "anna/linked")
    assert status == 0 and "note: report.html and vote.html are left out: they show images that lie elsewhere" in out
    assert not [name for name in hub.files("anna/linked", kind="datasets") if name.endswith((".html", ".png"))]


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("repo", "reason"),
    [
        ("modules", "no USER/NAME"),
        ("a/b/c", "cannot be the id"),
        ("anna/has space", "cannot be the id"),
        ("anna/--", "cannot be"),
    ],
)
def test_what_is_no_id_of_a_repository_is_refused_before_anything_is_read(repo, reason, hub, capsys):
    line = refusal(capsys, "nowhere", "--repo", repo)
    assert line.startswith(f"--repo {repo}: ") and reason in line and "expected USER/NAME" in line and not hub.asked


def test_folders_that_hold_nothing_to_share_are_refused(world, tmp_path, hub, capsys):
    def refused(folder, *arguments):
        return refusal(capsys, folder, "--repo", REPO, *arguments)

    (tmp_path / "empty").mkdir()
    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "nothing to share; expected a run of flax-pref train" in refused(tmp_path / "empty")
    assert "expected a local folder" in refused("gs://bucket/run")
    describe_run(tmp_path / "run")
    assert "modules: no exported modules as LoRA (pos, neg); finish the run, or write them" in refused(tmp_path / "run")
    shutil.copytree(world / "run" / "modules", tmp_path / "run" / "modules")
    (tmp_path / "run" / "modules" / "neg_kohya.safetensors").unlink()
    line = refused(tmp_path / "run")
    assert "module 'neg' is not there in the layout kohya" in line and "--export.layout kohya" in line
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["method"]["name"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert "names no method: it is of an older version" in refused(tmp_path / "run")
    shutil.copytree(world / "cpgd", tmp_path / "set")
    (tmp_path / "set" / "00000.tar").unlink()
    assert "00000.tar: missing" in refused(tmp_path / "set")
    (tmp_path / "set" / "manifest.parquet").unlink()
    assert "is not finished, it has no manifest.parquet" in refused(tmp_path / "set")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text('{"overall": []}')
    assert "not a report of flax-pref report" in refused(tmp_path / "report")
    assert not [asked for asked in hub.asked if asked.startswith(("POST", "PUT"))]


def test_flags_that_do_not_fit_are_refused(world, tmp_path, hub, capsys):
    def refused(*arguments):
        return refusal(capsys, *arguments, "--repo", REPO)

    (tmp_path / "grid.png").write_bytes(b"no image")
    assert "grid.png: cannot be read as an image" in refused(world / "run", "--grid", tmp_path / "grid.png")
    assert "--grid nowhere.png: no such file" in refused(world / "run", "--grid", "nowhere.png")
    assert "no report.json in it" in refused(world / "run", "--report", world / "cpgd")
    assert "--base-model sd15: expected the id" in refused(world / "run", "--base-model", "sd15")
    assert "is of training runs" in refused(world / "cpgd", "--report", world / "report")


def test_a_repository_with_other_content_is_refused(world, hub, capsys):
    before = hub.add(REPO, {"model.safetensors": b"x", "README.md": b"mine"})
    line = refusal(capsys, world / "run", "--repo", REPO)
    assert f"{REPO}: exists and holds model.safetensors; expected a new or empty repository" in line
    hub.add("anna/empty", {".gitattributes": b"", "README.md": b""})
    assert push(capsys, world / "run", "--repo", "anna/empty")[0] == 0
    hub.add("anna/other", {"flax_pref.json": json.dumps({"kind": "modules", "name": "dpo", "files": []}).encode()})
    assert "anna/other: exists and holds the modules dpo; expected" in refusal(
        capsys, world / "run", "--repo", "anna/other"
    )
    assert hub.commit_of(f"models/{REPO}", "main") == before


def test_without_a_token_or_with_one_that_may_not_write_nothing_is_uploaded(world, tmp_path, capsys, monkeypatch):
    with serving(tmp_path, token=None) as hub:
        assert "no token of the Hub; run hf auth login, or set HF_TOKEN" in refusal(
            capsys, world / "run", "--repo", REPO
        )
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        assert "(status 401); the token is not valid" in refusal(capsys, world / "run", "--repo", REPO)
        assert not hub.repositories
    with serving(tmp_path) as hub:
        line = refusal(capsys, world / "run", "--repo", "somebody/modules")
        assert "somebody/modules: the Hub refuses the upload (status 403: " in line and "may not write there" in line


def test_an_upload_that_breaks_off_changes_nothing(world, hub, capsys):
    hub.full = True
    status, _, err = push(capsys, world / "run", "--repo", REPO)
    line = err.splitlines()[-1]  # behind the progress
    assert status == 1 and "Error while uploading" in line and "run the same command again" in line
    assert set(hub.files(REPO)) == {".gitattributes"} and not hub.commits
    hub.full = False
    assert push(capsys, world / "run", "--repo", REPO)[0] == 0


def test_without_a_network_one_line_says_so(world, tmp_path, capsys, monkeypatch):
    with serving(tmp_path):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        assert "http://127.0.0.1:9 cannot be reached" in refusal(capsys, world / "run", "--repo", REPO)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in refusal(capsys, world / "run", "--repo", REPO)


def test_a_file_with_the_token_is_not_shared(world, tmp_path, hub, capsys):
    shutil.copytree(world / "run", tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text(f'{{"step": 1, "note": "{TOKEN}"}}\n')
    for more in ((), ("--dry-run", "--out", tmp_path / "out")):
        assert ": holds your token of the Hub" in refusal(capsys, tmp_path / "run", "--repo", REPO, *more)
    assert not hub.repositories and not (tmp_path / "out").exists()


def test_settings_are_shared_without_folders_of_this_machine_and_secrets_in_urls():
    settings = {"path": "/home/anna/x.bin", "n": [1, "~/y", "owner/name"], "u": "https://me:pw@host:8/score?key=1"}
    assert public(settings) == {"path": "x.bin", "n": [1, "y", "owner/name"], "u": "https://host:8/score"}


def test_a_file_that_cannot_be_written_leaves_no_folder(world, tmp_path, hub):
    contents = gather(PushFlags(folder=str(world / "cpgd"), repo="anna/x"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        write(contents, tmp_path / "file" / "out")
