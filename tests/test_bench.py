"""The benches with networks of a few channels: their figures mean what they say."""

import functools
import json
from importlib import resources

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from bench import common
from bench.__main__ import main
from bench.all import SMALL
from bench.common import time_in_turns
from bench.guidance import sampler, sampler_inputs
from flax_pref.checkpoints.weights import abstract_network
from flax_pref.diffusion.guidance import cfg
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.models.presets import FAMILIES, SD15
from flax_pref.models.unet import UNetConfig
from flax_pref.models.vae import VAEConfig
from flax_pref.parallel import peak

TINY = SD15._replace(
    unet=UNetConfig(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    ),
    vae=VAEConfig(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    ),
)
BASE = str(resources.files("flax_pref.world") / "base")


@pytest.fixture(autouse=True, scope="module")
def small():
    """A small family, a peak soon measured, and one thread of torch: two wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "sd15", TINY)
        patch.setattr(peak, "measured_peak", functools.partial(peak.measured_peak, 0.0))
        patch.setattr(common, "measured_peak", lambda dtype: 2e12)
        patch.setattr(common, "measured_bandwidth", lambda: 1e10)
        yield
    torch.set_num_threads(threads)


def figures(tmp_path, capsys, *arguments):
    """Those of the file, which are those that are printed."""
    file = tmp_path / "new" / "figures.json"
    main([*map(str, arguments), "--json", str(file)])
    stored = json.loads(file.read_text())
    assert json.loads(capsys.readouterr().out) == stored
    return stored


def measured(name, told):
    """Figures of this bench in the table of all benches."""
    return [measure.read(told) for measure in SMALL[name].measures]


def test_guidance_costs_what_its_rows_cost_and_computes_what_torch_computes(tmp_path, capsys):
    rank, batch_size = 2, 2
    flags = ("--rank", rank, "--batch-size", batch_size, "--size", 64, "--steps", 2, "--rounds", 1, "--rules", "cpgd")
    told = figures(tmp_path, capsys, "guidance", *flags)
    plain, ours = told["rules"]["cfg"], told["rules"]["cpgd"]
    assert (plain["predictions"], ours["predictions"]) == (2 * batch_size, 6 * batch_size)

    assert told["torch"]["largest_relative_difference"] < 1e-5
    assert measured("guidance", told)[-1] == {
        **{"ours": told["each_round"]["cpgd"], "torch": told["each_round"]["torch"]},
        "share_of_measured_peak": [ours["share_of_measured_peak"]],
    }
    assert told["each_round"]["cpgd"] == pytest.approx([ours["step_seconds"]], abs=1e-5)
    ratio = ours["step_seconds"] / told["torch"]["step_seconds"]
    assert told["torch"]["cpgd_ratio_to_torch"] == pytest.approx(ratio, rel=0.05)

    # Two modules of A [in, r] and B [r, out] at q, k, v and out of self- and cross-attention, in four transformers.
    channels, text = 8, 12
    layers = 8 * channels * 2 - 2 * channels + 2 * text
    assert told["adapter_bytes"] == 4 * 2 * 4 * rank * layers
    assert ours["argument_bytes_above_cfg"] == told["adapter_bytes"]  # the backbone is there once
    assert ours["temp_ratio_to_cfg"] <= 3

    assert ours["gflop_per_step"] > 3 * plain["gflop_per_step"]
    assert ours["ratio_to_cfg"] == pytest.approx(ours["step_seconds"] / plain["step_seconds"], rel=0.05)
    assert ours["images_per_second"] == pytest.approx(batch_size / (50 * ours["step_seconds"]), rel=0.05)
    reached = ours["gflop_per_step"] / ours["step_seconds"] / (1000 * told["peak_tflops"])
    assert ours["share_of_peak"] == pytest.approx(reached, rel=0.05, abs=1e-3)
    reached = ours["gflop_per_step"] / ours["step_seconds"] / 2000
    assert ours["share_of_measured_peak"] == pytest.approx(reached, rel=0.05, abs=1e-3)
    assert 0 < ours["share_of_copy_bandwidth"] < 10


def test_operations_of_a_step_are_those_that_torch_counts():
    # At full size in all but depth: loops over blocks, which XLA counts once, begin at 1024 positions.
    config = UNetConfig(
        block_out_channels=(320, 640),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=768,
    )
    network = abstract_network("unet", config)
    solver = solver_from_config(SD15.scheduler_config, 10, name="ddim")
    program = sampler(network, cfg(7.5), solver, 1, 64)
    ours = peak.step_flops(program, network.params, *sampler_inputs(SD15, 1, 64))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
        unet = UNet2DConditionModel.from_config(config.to_dict())
        unet(torch.zeros(2, 4, 64, 64), torch.zeros((), dtype=torch.long), torch.zeros(2, 77, 768))
    # XLA leaves out products with padding, torch everything but products: two hundredths that partly cancel.
    assert ours == pytest.approx(counted.get_total_flops(), rel=0.03)


def test_calls_are_timed_in_turns_after_an_untimed_one():
    calls = []
    seconds = time_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 2, "b": 2}


def test_the_time_of_a_forward_pass_is_told_for_every_batch_size(tmp_path, capsys):
    told = figures(tmp_path, capsys, "unet", "--size", 64, "--batch-sizes", 1, "--rounds", 1)
    (row,) = told["batches"]
    assert row["batch_size"] == 1
    rounds = row["each_round"]
    assert measured("unet", told) == [{"ours": rounds["seconds"], "torch": rounds["torch_seconds"]}]
    assert rounds["seconds"] == pytest.approx([row["seconds"]], abs=1e-4)
    assert row["ratio_to_torch"] == pytest.approx(row["seconds"] / row["torch_seconds"], rel=0.2, abs=2e-3)


def test_loading_is_measured_in_a_process_of_its_own(tmp_path, capsys):
    told = figures(tmp_path, capsys, "load", "--part", "pipeline", "--folder", BASE)
    assert told["largest_file_gb"] <= told["parameters_gb"] < told["peak_gb"]
    assert measured("load", told) == [{"ours": [told["seconds"]]}, {"ours": [told["peak_gb"]]}]


def test_a_device_that_is_slower_than_the_writer_is_waited_for_and_a_faster_one_waits(tmp_path, capsys):
    flags = ("--images", 5, "--batch-size", 2, "--size", 64, "--seconds-per-image", 0.3)
    told = figures(tmp_path, capsys, "writing", *flags, "--folder", tmp_path)
    for row in told["formats"].values():
        assert row["sampling_seconds"] >= 6 * 0.3 - 0.01  # the last batch is filled up
        assert row["share_of_sampling"] == pytest.approx(row["sampling_seconds"] / row["seconds"], abs=0.01)
        assert row["images_per_second"] < 1 / 0.3 < row["most_images_per_second"]
        assert row["kb_per_image"] > 1
    assert set(told["formats"]) == {"png", "webp"}
    assert measured("writing", told) == [{"ours": [1e3 / told["formats"]["png"]["most_images_per_second"]]}]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]  # the images are gone


def test_the_real_sampler_is_measured_with_its_writer(tmp_path, capsys):
    told = figures(
        tmp_path, capsys, "writing", "--real", "--images", 2, "--batch-size", 1, "--size", 16, "--formats", "png"
    )
    assert told["device"] != "simulated"
    assert 0 < told["formats"]["png"]["share_of_sampling"] < 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("guidance", "--batch-size", "0"), "--batch-size 0; expected at least one image"),
        (("guidance", "--steps", "0"), "steps must lie in 1"),
        (("writing", "--images", "0"), "0 images in batches of 4"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(flags, message):
    with pytest.raises(ValueError, match=message):
        main(list(flags))


def test_a_device_waits_for_a_service_once_for_each_group_before_and_less_after(tmp_path, capsys):
    groups, latency, row, steps, rows = 4, 0.2, 0.002, 20, 2
    flags = ("--parts", "service", "--methods", "d3po", "--prompts", groups, "--at-once", 1, "--rounds", 1)
    told = figures(tmp_path, capsys, "rewards", *flags, "--latency", latency, "--row-seconds", row)["service"]
    before, after = told["d3po"]["before"], told["d3po"]["after"]
    drawing = groups * 2 * steps * rows * row  # D3PO draws two images for each prompt
    assert before["waits"] * before["seconds"] > 0.95 * groups * latency
    assert before["seconds"] > drawing + groups * latency
    assert after["seconds"] > drawing + latency and after["waits"] * after["seconds"] > 0.95 * latency
