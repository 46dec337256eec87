"""Textual inversions from the files that people share: the same words and encodings as in diffusers."""

import warnings

import numpy as np
import pytest
from checkpoints.small import small_pipeline
from safetensors.numpy import save_file

from flax_pref.checkpoints.diffusers import save_pipeline
from flax_pref.checkpoints.embeddings import add_embedding
from flax_pref.diffusion.conditioning import encode_prompts

RNG = np.random.default_rng(0)
ONE, THREE = (RNG.standard_normal((n, 64)).astype(np.float32) for n in (1, 3))
WIDE = RNG.standard_normal((3, 128)).astype(np.float32)
PROMPTS = ["a photo of <toy> on a table", "no toy here", "<toy>, <toy>"]


@pytest.fixture(scope="module")
def sd1():
    return small_pipeline("sd1")


def encoded(pipeline):
    return {name: np.asarray(array) for name, array in encode_prompts(pipeline, PROMPTS).items()}


def test_prompts_see_the_vectors_as_in_diffusers(sd1, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    save_pipeline(sd1, tmp_path / "sd1")
    save_file({"<other>": THREE}, tmp_path / "toy.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd1", safety_checker=None)
        theirs.load_textual_inversion(str(tmp_path), weight_name="toy.safetensors", token="<toy>")
        prompts = [theirs.maybe_convert_prompt(prompt, theirs.tokenizer) for prompt in PROMPTS]
        ids = theirs.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected = theirs.text_encoder(ids.input_ids).last_hidden_state.numpy()
    ours = add_embedding(sd1, "<toy>", tmp_path / "toy.safetensors")
    np.testing.assert_allclose(encoded(ours)["encoder_hidden_states"], expected, atol=2e-5)
    plain = encoded(sd1)["encoder_hidden_states"]
    assert np.array_equal(encoded(ours)["encoder_hidden_states"][1], plain[1])
    assert not np.allclose(expected[0], plain[0], atol=1e-2)


def test_files_of_every_program_give_the_same(sd1, tmp_path):
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(ONE.copy())
    save_file({"<x>": ONE[0]}, tmp_path / "diffusers.safetensors")
    save_file({"emb_params": ONE}, tmp_path / "a1111.safetensors")
    torch.save({"<x>": tensor[0]}, tmp_path / "learned_embeds.bin")
    webui = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.nn.Parameter(tensor)},
        "name": "x",
        "step": 500,
    }
    torch.save(webui, tmp_path / "a1111.pt")
    found = [encoded(add_embedding(sd1, "<toy>", file)) for file in sorted(tmp_path.iterdir())]
    assert len(found) == 4
    for other in found[1:]:
        np.testing.assert_array_equal(other["encoder_hidden_states"], found[0]["encoder_hidden_states"])


def test_sdxl_takes_vectors_for_both_encoders(tmp_path):
    pipeline = small_pipeline("sdxl")
    save_file({"clip_g": WIDE, "clip_l": THREE}, tmp_path / "toy.safetensors")
    before, after = encoded(pipeline), encoded(add_embedding(pipeline, "<toy>", tmp_path / "toy.safetensors"))
    for width in (slice(64), slice(64, None)):
        changed = np.abs(after["encoder_hidden_states"] - before["encoder_hidden_states"])[..., width].max((1, 2))
        assert changed[0] > 1e-2 and changed[1] == 0 and changed[2] > 1e-2
    save_file({"clip_l": THREE}, tmp_path / "half.safetensors")
    with pytest.raises(
        ValueError, match=r"half.safetensors: holds vectors of 64 numbers \('clip_l'\), .* take 64 and 128"
    ):
        add_embedding(pipeline, "<toy>", tmp_path / "half.safetensors")


@pytest.mark.parametrize(
    ("name", "stored", "message"),
    [
        ("a toy", {"<x>": ONE}, "the name 'a toy' is no word"),
        ("dog</w>", {"<x>": ONE}, "is a token of this checkpoint already"),
        (
            "<toy>",
            {"<x>": WIDE},
            r"holds vectors of 128 numbers \('<x>'\), but the text encoders of this checkpoint take 64",
        ),
        ("<toy>", {"a": ONE, "b": ONE, "c": ONE}, "holds no textual inversion"),
        ("<toy>", {"<x>": ONE * np.nan}, "not finite"),
        ("<toy>", {"<x>": np.zeros((1, 2, 64), np.float32)}, "holds no textual inversion"),
    ],
)
def test_what_is_no_textual_inversion_is_named(sd1, tmp_path, name, stored, message):
    save_file(stored, tmp_path / "toy.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        add_embedding(sd1, name, tmp_path / "toy.safetensors")
    assert str(error.value).startswith(f"{tmp_path / 'toy.safetensors'}: ")
