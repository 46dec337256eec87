"""Paths and Hub ids."""

from pathlib import Path

import pytest

from flax_pref.checkpoints.hub import find_checkpoint


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
        lambda name, allow_patterns: asked.update(p=allow_patterns) or "x",
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
        lambda name, allow_patterns: asked.append(allow_patterns) or tmp_path,
    )
    assert find_checkpoint("owner/name") == tmp_path
    torch_files = [pattern for pattern in asked[-1] if pattern.endswith(".bin")]
    assert len(asked) == 2 and "vae/diffusion_pytorch_model.bin" in torch_files
    assert all(pattern.startswith("vae/") for pattern in torch_files)
