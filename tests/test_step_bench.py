"""The bench of a training step on a small network: its figures mean what they say."""

import json

import pytest

from bench.__main__ import main
from bench.all import GPU, SMALL
from flax_pref.models.unet import UNetConfig

UNET = UNetConfig(
    block_out_channels=(8,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=2,
    norm_num_groups=4,
)


def figures(tmp_path, capsys, *arguments):
    """Those of the file, which are those that are printed."""
    unet, file = tmp_path / "config.json", tmp_path / "new" / "figures.json"
    unet.write_text(json.dumps(UNET.to_dict()))
    main(["step", "--unet", str(unet), "--size", "64", "--rounds", "1", *map(str, arguments), "--json", str(file)])
    stored = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out) == stored
    return stored


@pytest.mark.program
def test_a_step_of_dpo_is_that_of_torch_and_stands_beside_both_modules_at_once(tmp_path, capsys):
    pytest.importorskip("torch")
    told = figures(tmp_path, capsys, "--rank", 4)
    assert told["steps"].keys() == {"dpo", "torch", "positive_negative"}
    assert told["torch"]["loss_difference"] < 1e-5
    assert told["torch"]["largest_relative_gradient_difference"] < 1e-3
    dpo, both = told["steps"]["dpo"], told["steps"]["positive_negative"]
    # A forward pass with the adapters, one without, and a backward pass of the activations alone.
    assert both["gflop_per_step"] < dpo["gflop_per_step"] < 1.6 * both["gflop_per_step"]
    for row in told["steps"].values():
        assert row["pairs_per_second"] == pytest.approx(1 / row["step_seconds"], rel=0.01)
        assert row["peak_memory_gb"] >= row["memory_before_gb"] > 0
    torch = told["steps"]["torch"]
    told_of = {measure.name: measure.read(told) for measure in GPU["sd15-step"].measures}
    seconds, memory, both_seconds = told_of.values()
    assert seconds["ours"] + seconds["torch"] == pytest.approx([dpo["step_seconds"], torch["step_seconds"]], abs=1e-4)
    assert memory == {"ours": [dpo["peak_memory_gb"]], "torch": [torch["peak_memory_gb"]]}
    assert both_seconds["ours"] == pytest.approx([both["step_seconds"]], abs=1e-4)
    memory = dpo["peak_memory_gb"] / torch["peak_memory_gb"]
    assert told["torch"]["memory_ratio_to_torch"] == pytest.approx(memory, rel=0.01)


@pytest.mark.long
def test_all_weights_are_trained_with_blocks_that_are_computed_again(tmp_path, capsys):
    flags = ("--adapters", "full", "--objective", "positive_negative", "--remat", "block", "--batch-size", 2)
    told = figures(tmp_path, capsys, *flags)
    (row,) = told["steps"].values()
    assert "torch" not in told and row["temp_bytes"] > 0
    assert row["pairs_per_second"] == pytest.approx(2 / row["step_seconds"], rel=0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch-size", "0"), "--batch-size 0; expected at least one pair"),
        (("--rounds", "0"), "--rounds 0; expected at least one timed step"),
    ],
)
def test_a_mistake_is_told_before_a_step_is_made(flags, message):
    with pytest.raises(ValueError, match=message):
        main(["step", *flags])


@pytest.mark.program
def test_the_loss_of_nft_is_the_sum_of_its_parts_and_less_work_than_one_pass(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(UNET.to_dict()))
    main(["online", "--unet", str(tmp_path / "config.json"), "--size", "64", "--rounds", "1", "--rank", "4"])
    told = json.loads(capsys.readouterr().out)
    work = told["gflop"]
    parts = work["new policy"] + work["old policy and reference"]
    assert work["step"] == pytest.approx(parts, rel=0.02)
    assert SMALL["online"].measures[0].read(told) == {"ours": pytest.approx([told["seconds"]["step"]], abs=1e-4)}
    assert work["all in one pass"] > 1.2 * work["step"]
