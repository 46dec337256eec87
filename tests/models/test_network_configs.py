"""Config files of checkpoints: numbers that no network has are refused by name, before anything is built."""

import json
import re

import pytest

from flax_pref.checkpoints.weights import read_config
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.files import read_json
from flax_pref.models.clip import CLIPTextConfig
from flax_pref.models.clip_vision import CLIPConfig
from flax_pref.models.presets import FAMILIES
from flax_pref.models.unet import UNetConfig
from flax_pref.models.vae import VAEConfig

KINDS = {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": CLIPTextConfig, "clip": CLIPConfig}


@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [
        ("unet", "attention_head_dim", (0, -1, [5, 0, 20, 20], True)),
        ("unet", "layers_per_block", (0, 5000)),
        ("unet", "transformer_layers_per_block", (-1, 5000, [1, 2, 5000, 1], 200)),
        ("unet", "block_out_channels", ([0, 8, 8, 8], [-8, 8, 8, 8], [10**30, 8, 8, 8])),
        ("unet", "norm_num_groups", (0,)),
        ("unet", "cross_attention_dim", (0, 10**12)),
        ("unet", "sample_size", (-1, [0, 64])),
        ("unet", "norm_eps", (float("nan"), float("inf"), 10**400)),
        ("vae", "scaling_factor", (float("nan"), float("-inf"), 1e300, 0, -1.0)),
        ("vae", "layers_per_block", (5000,)),
        ("vae", "latent_channels", (0,)),
        ("text_encoder", "num_hidden_layers", (0, 5000)),
        ("text_encoder", "num_attention_heads", (0,)),
        ("text_encoder", "layer_norm_eps", (float("nan"),)),
        ("text_encoder", "initializer_range", (float("nan"),)),  # has no effect on the network; the file is damaged
        ("text_encoder", "vocab_size", (0, 10**12)),
        ("clip", "projection_dim", (0,)),
        ("clip", "logit_scale_init_value", (float("inf"),)),
    ],
)
def test_a_number_that_no_network_has_is_refused_by_name(kind, field, values):
    for value in values:
        with pytest.raises(
            ValueError, match=rf"^{KINDS[kind].__name__}: .*{field}=.* is not supported; supp"
        ) as caught:
            KINDS[kind].from_dict({field: value})
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("field", ["num_attention_heads", "num_hidden_layers", "layer_norm_eps"])
def test_the_towers_of_a_clip_are_checked_too(part, field):
    value = float("nan") if field == "layer_norm_eps" else 0
    with pytest.raises(ValueError, match=rf"CLIP\w+Config: {field}={value} is not supported"):
        CLIPConfig.from_dict({part: {field: value}})


@pytest.mark.parametrize(
    "change",
    [
        *({field: value} for field in ("beta_start", "beta_end") for value in (float("nan"), float("inf"), 10**400)),
        *({"num_train_timesteps": value} for value in (10**12, 1e12, 0, float("nan"))),
        *({"beta_start": 1e-30, "beta_schedule": kind} for kind in ("linear", "scaled_linear")),
        {"num_train_timesteps": 100_000},
        {"beta_end": 0.9999},
        {"steps_offset": float("nan")},
        {"sigma_min": float("inf")},
        {"trained_betas": [0.1, float("nan")]},
    ],
)
def test_a_schedule_of_numbers_that_are_none_is_refused_by_name(change):
    for read in (NoiseSchedule.from_dict, lambda config: solver_from_config(config, 4)):
        with pytest.raises(ValueError, match=rf"{next(iter(change))}=.* is not supported; supported: "):
            read(FAMILIES["sd15"].scheduler_config | change)


@pytest.mark.parametrize(
    ("field", "values"), [("steps_offset", (None, "x", -1, 1000, 10**30, {})), ("_class_name", ([], {}, 3))]
)
def test_a_solver_of_fields_that_are_none_is_refused_by_name(field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"{field}=.* is not supported; supported: "):
            solver_from_config(FAMILIES["sd15"].scheduler_config | {"_class_name": "DDIMScheduler", field: value}, 4)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", '[1, {"x": -1e999}]'])
def test_a_json_file_with_numbers_that_are_none_is_refused(text, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(f'{{"scaling_factor": {text}}}')
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: not valid JSON \(.* is no finite number\)"):
        read_json(file, expected="a config")


def test_a_config_that_is_refused_is_named_with_its_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"attention_head_dim": 0}))
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}/config\.json: UNetConfig: attention_head_dim=0"):
        read_config("unet", tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"num_train_timesteps": 10**12}))
    with pytest.raises(
        ValueError, match=r"/scheduler_config\.json: NoiseSchedule: num_train_timesteps=1000000000000 is"
    ):
        NoiseSchedule.from_file(tmp_path / "scheduler_config.json")


def test_a_scheduler_of_diffusers_that_does_not_clip_passes(tmp_path):
    pytest.importorskip("diffusers").DPMSolverMultistepScheduler().save_pretrained(tmp_path)
    assert "-Infinity" in (tmp_path / "scheduler_config.json").read_text()
    NoiseSchedule.from_file(tmp_path / "scheduler_config.json")
    (tmp_path / "scheduler_config.json").write_text('{"beta_start": -Infinity}')
    with pytest.raises(ValueError, match="beta_start=-inf is not supported"):
        NoiseSchedule.from_file(tmp_path / "scheduler_config.json")


def test_the_published_configs_pass():
    for family in FAMILIES.values():
        assert UNetConfig.from_dict(family.unet.to_dict()) == family.unet
        assert VAEConfig.from_dict(family.vae.to_dict()) == family.vae
        for encoder in family.text_encoders:
            assert CLIPTextConfig.from_dict(encoder.to_dict()) == encoder
