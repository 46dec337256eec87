"""Paths and Hub ids."""

import json
from pathlib import Path

import pytest
from sharing.hub_server import serving

from flax_pref.checkpoints.hub import RECORD, find_checkpoint, find_description
from flax_pref.checkpoints.modules import find_module, fingerprint


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_a_local_folder_is_used_as_it_is(tmp_path):
    assert find_checkpoint(tmp_path) == tmp_path


def test_only_the_text_demo_is_the_checkpoint_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert (find_checkpoint("demo") / "model_index.json").is_file()
    assert find_checkpoint("./demo") == find_checkpoint(Path("./demo")) == Path("demo")


def test_a_downloaded_repository_is_found_without_a_network(cache, monkeypatch):
    import huggingface_hub

    folder = cache / "models--owner--name"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    (snapshot / "model_index.json").write_text("{}")
    found = huggingface_hub.snapshot_download("owner/name", cache_dir=cache, local_files_only=True)
    monkeypatch.setattr("flax_pref.checkpoints.hub.snapshot_download", lambda name, **_: found)
    assert find_checkpoint("owner/name") == snapshot


def test_an_id_that_cannot_be_reached_says_so_in_one_line(cache):
    with pytest.raises(FileNotFoundError, match=r"owner/name: no such file or .*the Hub cannot be reached") as error:
        find_checkpoint("owner/name")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no/such/folder", "stable diffusion", "./missing", "/missing/folder"])
def test_what_is_neither_path_nor_id_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_checkpoint(name)


def test_only_the_files_of_one_variant_are_asked_for(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "flax_pref.checkpoints.hub.snapshot_download",
        lambda name, allow_patterns, **_: asked.update(p=allow_patterns) or "x",
    )
    find_checkpoint("owner/name")
    assert "unet/diffusion_pytorch_model.safetensors" in asked["p"]
    assert not any("fp16" in pattern or pattern.endswith(".bin") for pattern in asked["p"])
    find_checkpoint("owner/name", variant="fp16")
    assert "text_encoder_2/model.fp16.safetensors" in asked["p"]


def test_weights_of_torch_are_asked_for_only_where_a_part_has_no_others(monkeypatch, tmp_path):
    asked = []
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").touch()
    monkeypatch.setattr(
        "flax_pref.checkpoints.hub.snapshot_download",
        lambda name, allow_patterns, **_: asked.append(allow_patterns) or tmp_path,
    )
    assert find_checkpoint("owner/name") == tmp_path
    torch_files = [pattern for pattern in asked[-1] if pattern.endswith(".bin")]
    assert len(asked) == 2 and "vae/diffusion_pytorch_model.bin" in torch_files
    assert all(pattern.startswith("vae/") for pattern in torch_files)


# ----------------------------------------------------------------------------------------------------------------------
# Repositories of several modules


LORA = {f"{name}{end}.safetensors": f"{name}{end}".encode() for name in ("pos", "neg") for end in ("", "_kohya")}


@pytest.fixture
def hub(tmp_path):
    with serving(tmp_path) as hub:
        yield hub


def record(**fields):
    return {RECORD: json.dumps(fields).encode()}


def test_a_module_of_a_repository_is_chosen_by_its_name_and_nothing_else_is_downloaded(hub):
    first = hub.add("anna/modules", LORA | {"README.md": b"x"} | record(modules=["pos", "neg"], base="demo"))
    hub.add("anna/modules", {"pos.safetensors": b"newer"})
    assert find_module("anna/modules", "pos").read_bytes() == b"newer"
    assert find_module(Path(f"anna/modules@{first}"), "pos").read_bytes() == b"pos"
    assert find_module("anna/modules@main", "neg").read_bytes() == b"neg"
    assert not [path for path in hub.asked if "kohya" in path or "README" in path]
    with pytest.raises(FileNotFoundError, match=r"anna/modules: has no module 'dpo', but pos, neg; expected one of"):
        find_module("anna/modules", "dpo")
    with pytest.raises(FileNotFoundError, match=r"anna/modules@v9: .* its repository on the Hub has no such revision"):
        find_module("anna/modules@v9", "pos")
    with pytest.raises(FileNotFoundError, match="anna/nothing: no such file or folder, and nothing of this name on"):
        find_module("anna/nothing", "pos")
    assert fingerprint(find_module("anna/modules", "pos")) != fingerprint(find_module("anna/modules", "neg"))


def test_the_one_module_of_a_repository_may_have_any_name_in_rules(hub):
    hub.add("anna/dpo", {"dpo.safetensors": b"dpo", "dpo_kohya.safetensors": b"k"} | record(modules=["dpo"]))
    assert find_module("anna/dpo", "module").read_bytes() == b"dpo"
    hub.add("anna/full", {"dpo/config.json": b"{}", "dpo/diffusion_pytorch_model.safetensors": b"w"})
    hub.add("anna/full", record(modules=["dpo"]))
    folder = find_module("anna/full", "module")
    assert folder.name == "dpo" and {file.name for file in folder.iterdir()} >= {"config.json"}
    hub.add("anna/kohya", {"pos_kohya.safetensors": b"k"})
    assert find_module("anna/kohya", "pos").read_bytes() == b"k"
    hub.add("anna/other", {"pytorch_lora_weights.safetensors": b"d"})
    assert find_module("anna/other", "pos").read_bytes() == b"d"


def test_a_module_of_a_local_folder_is_chosen_by_its_name(tmp_path):
    for name, content in LORA.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "peft_peft").mkdir()
    (tmp_path / "peft_peft" / "adapter_model.safetensors").write_bytes(b"p")
    assert find_module(tmp_path, "neg").name == "neg.safetensors"
    assert find_module(tmp_path, "peft") == tmp_path / "peft_peft" / "adapter_model.safetensors"
    with pytest.raises(ValueError, match=r"2 safetensors files and no config\.json"):
        find_module(tmp_path, "dpo")


def test_a_repository_of_modules_leads_to_its_base(hub):
    hub.add("anna/modules", LORA | record(modules=["pos", "neg"], base="demo"))
    assert find_checkpoint("anna/modules@main") == find_checkpoint("demo") == find_description("anna/modules")
    hub.add("anna/local", LORA | record(modules=["pos", "neg"], base=None))
    with pytest.raises(FileNotFoundError, match=r"holds modules and no checkpoint, and flax_pref\.json names no base"):
        find_checkpoint("anna/local")


def test_a_revision_that_is_empty_is_no_id():
    with pytest.raises(FileNotFoundError, match=r"owner/name@: no such file or folder, and not the id"):
        find_checkpoint("owner/name@")
