"""Prompts with weights and of any length: as A1111 and ComfyUI read them, and layers and prompts of text encoders."""

import dataclasses
import re
import warnings

import numpy as np
import pytest
from checkpoints.small import random_network, small_pipeline
from flax import nnx
from safetensors.numpy import save_file

from flax_pref.checkpoints.diffusers import load_pipeline, save_pipeline
from flax_pref.checkpoints.embeddings import add_embedding
from flax_pref.checkpoints.tokenizer import clip_tokenizer
from flax_pref.cli import command
from flax_pref.diffusion.conditioning import encode_batch, encode_ids
from flax_pref.diffusion.guidance import cfg, chats
from flax_pref.diffusion.prompt_syntax import SYNTAXES, check_prompts, count_chunks, tokenize
from flax_pref.diffusion.text_to_image import TextToImage

TOKENIZER = clip_tokenizer()
LONG = "a red cat in a green field, " * 15
HOUSE = "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky)))."


@pytest.fixture(scope="module")
def sd1():
    return small_pipeline("sd1")


@pytest.fixture(scope="module")
def sdxl():
    return small_pipeline("sdxl")


# ----------------------------------------------------------------------------------------------------------------------
# Reading

# What the two programs document of their prompts.
A1111 = {
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", 1.1), (" word", 1)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    HOUSE: [
        *(("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1)),
        *(("sky", 1.4641), (".", 1.1)),
    ],
    "x: y (z: q) [w]": [("x: y ", 1), ("z: q", 1.1), (" ", 1), ("w", 1 / 1.1)],
    "one BREAK two": [("one", 1), (None, 1), ("two", 1)],
    "(one BREAK two:1.5) three": [("one", 1.5), (None, 1.5), ("two", 1.5), (" three", 1)],
}
COMFYUI = {
    "an (important) word": [("an ", 1), ("important", 1.1), (" word", 1)],
    "((a)) [b] (c:0.5)": [("a", 1.21), (" [b] ", 1), ("c", 0.5)],
    "((a:1.3) b)": [("a", 1.3), (" b", 1.1)],
    r"\(literal\) (word:1e-1)": [("(literal) ", 1), ("word", 0.1)],
    "(unbalanced": [("(unbalanced", 1)],
    "(a:nan)": [("a:nan", 1.1)],
}


@pytest.mark.parametrize(
    ("syntax", "prompt", "expected"),
    [("a1111", *item) for item in A1111.items()] + [("comfyui", *item) for item in COMFYUI.items()],
)
def test_weights_are_those_that_the_programs_document(syntax, prompt, expected):
    texts, weights = zip(*SYNTAXES[syntax].parse(prompt), strict=True)
    assert texts == tuple(text for text, _ in expected)
    np.testing.assert_allclose(weights, [weight for _, weight in expected], rtol=1e-9)


@pytest.mark.parametrize(
    ("syntax", "prompt", "reason"),
    [
        ("a1111", "a [cat|dog]", "alternates words"),
        ("a1111", "a [cat:dog:0.5]", "edits the prompt"),
        ("a1111", "a cat AND a dog", "composes prompts"),
        ("a1111", "a cat <lora:pixel:0.8>", "give LoRA files by --module"),
        ("comfyui", "a embedding:toy", "give its file by --embedding"),
    ],
)
def test_what_is_not_supported_is_told_and_not_read_as_words(syntax, prompt, reason):
    with pytest.raises(ValueError, match=reason) as told:
        check_prompts([prompt], syntax)
    assert "\n" not in str(told.value)
    assert repr(prompt) in str(told.value)
    check_prompts([prompt], "plain")


def words(tokens):
    """Tokens of each chunk up to its end token."""
    ends = (tokens.ids[0] == TOKENIZER.id_of(TOKENIZER.eos_token)).argmax(-1)
    return [row[1:end].tolist() for row, end in zip(tokens.ids[0], ends, strict=True)]


def split(prompt, syntax):
    return words(tokenize([prompt], TOKENIZER, syntax, count_chunks([prompt], [TOKENIZER], syntax)))


def test_a1111_moves_what_is_behind_the_last_comma_into_the_next_chunk():
    ids = TOKENIZER.pieces("cat"), TOKENIZER.pieces(",")
    (cat,), (comma,) = (piece[0] for piece in ids)
    assert [len(chunk) for chunk in split("cat " * 70 + ", " + "cat " * 10, "a1111")] == [71, 10]
    assert [len(chunk) for chunk in split("cat " * 50 + ", " + "cat " * 30, "a1111")] == [75, 6]  # 24 tokens behind it
    assert split("cat BREAK , cat", "a1111") == [[cat], [comma, cat]]
    assert split("", "a1111") == split("", "comfyui") == [[]]


def test_comfyui_keeps_short_words_whole_and_splits_long_ones():
    word = "antidisestablishmentarianism"
    length = len(TOKENIZER.pieces(word))
    assert 1 < length < 8
    assert [len(chunk) for chunk in split("cat " * 73 + word, "comfyui")] == [73, length]
    assert [len(chunk) for chunk in split("cat " * 73 + 3 * word, "comfyui")] == [
        75,
        len(TOKENIZER.pieces(3 * word)) - 2,
    ]


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_word_of_several_vectors_stays_in_one_chunk(syntax, sd1, tmp_path):
    save_file({"toy": np.ones((5, 64), np.float32)}, tmp_path / "toy.safetensors")
    tokenizer = add_embedding(sd1, "<toy>", tmp_path / "toy.safetensors").tokenizers[0]
    prompt = "cat " * 72 + "(<toy>:1.5)"
    tokens = tokenize([prompt], tokenizer, syntax, count_chunks([prompt], [tokenizer], syntax))
    vectors = [tokenizer.id_of(name) for name in ("<toy>", "<toy>_1", "<toy>_2", "<toy>_3", "<toy>_4")]
    assert tokens.ids[0, 1, 1:6].tolist() == vectors
    assert tokens.weights[0, 1, :7].tolist() == [1, *[1.5] * 5, 1]


# ----------------------------------------------------------------------------------------------------------------------
# Encoding


def encoded(pipeline, prompts, syntax, **options):
    count = count_chunks(prompts, pipeline.tokenizers, syntax)
    given = encode_batch(pipeline, prompts, syntax=syntax, chunks=count, **options)
    return {name: np.asarray(array) for name, array in given.items()}


def plain(pipeline, ids, encoder=0):
    """States of chunks of ids, float64."""
    network = pipeline.text_encoders[encoder]
    tokens = [np.asarray(ids)] * len(pipeline.text_encoders)
    widths = [each.config.hidden_size for each in pipeline.text_encoders]
    start = sum(widths[:encoder])
    states = np.asarray(encode_ids(pipeline, tokens)["encoder_hidden_states"], np.float64)
    return states[..., start : start + network.config.hidden_size]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_weights_change_states_as_published(syntax, family, request):
    pipeline = request.getfixturevalue(family)
    prompt = f"(a red cat:1.4), {LONG} (ugly:0.3)"
    given = encoded(pipeline, [prompt], syntax)["encoder_hidden_states"][0]
    start = 0
    for number, tokenizer in enumerate(pipeline.tokenizers):
        tokens = tokenize([prompt], tokenizer, syntax, count_chunks([prompt], [tokenizer], syntax))
        states, w = plain(pipeline, tokens.ids[0], number), tokens.weights[0][..., None].astype(np.float64)
        if syntax == "a1111":
            expected = states * w
            expected *= states.mean((1, 2), keepdims=True) / expected.mean((1, 2), keepdims=True)
        else:
            empty = plain(pipeline, tokenizer([""]), number)
            expected = empty + w * (states - empty)
        width = states.shape[-1]
        # float32 knows the mean of a chunk, which is far smaller than its states, less well than these.
        error = (1e-5 if syntax == "a1111" else 2e-6) * np.abs(expected).max()
        np.testing.assert_allclose(given[:, start : start + width].reshape(states.shape), expected, atol=error)
        start += width


@pytest.fixture
def inner_encoder(monkeypatch):
    """transformers' encoder was one inside another until 5.0; diffusers and compel ask for the inner one."""
    pytest.importorskip("torch")
    encoder = pytest.importorskip("transformers").CLIPTextModel
    monkeypatch.setattr(encoder, "text_model", property(lambda self: self), raising=False)


def test_comfyui_weights_and_chunks_are_those_of_compel(sd1, tmp_path, inner_encoder):
    torch, compel = pytest.importorskip("torch"), pytest.importorskip("compel")
    transformers = pytest.importorskip("transformers")
    save_pipeline(sd1, tmp_path)
    encoder = transformers.CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    theirs = compel.Compel(
        tokenizer, encoder, truncate_long_prompts=False, split_long_text_mode=compel.SplitLongTextMode.BRUTAL
    )
    for prompt in ("a (red:1.4) cat in a (green field:1.1)", "cat " * 76 + "(dog:1.5)"):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = theirs(compel_spelling(prompt)).numpy()
        ours = encoded(sd1, [prompt], "comfyui")["encoder_hidden_states"]
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def compel_spelling(prompt):
    """compel has the weight behind the bracket."""
    return re.sub(r":([\d.]+)\)", r")\1", prompt)


def test_the_pooled_prompt_is_that_of_the_first_chunk(sdxl):
    given = encoded(sdxl, ["cat " * 80, "a dog"], "comfyui")
    first = encoded(sdxl, ["cat " * 75], "comfyui")
    np.testing.assert_allclose(given["text_embeds"][:1], first["text_embeds"], atol=1e-6)
    assert given["encoder_attention_mask"].sum(axis=1).tolist() == [154, 77]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_layers_and_second_prompts_are_those_of_diffusers(family, request, tmp_path, inner_encoder):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pipeline = request.getfixturevalue(family)
    pipeline = pipeline.replace(
        text_encoders=tuple(
            random_network("text_encoder", dataclasses.replace(encoder.config, num_hidden_layers=4))
            for encoder in pipeline.text_encoders
        )
    )
    save_pipeline(pipeline, tmp_path)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    first = len(pipeline.text_encoders)  # the layer that diffusers counts as no skip
    options = {} if family == "sd1" else {"prompt_2": "oil on canvas"}
    second = {} if family == "sd1" else {"second_prompts": ["oil on canvas"]}
    for skip in (None, 2):
        with torch.no_grad():
            states, _, *pooled = theirs.encode_prompt(
                "a red cat", **options, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False,
                clip_skip=skip,
            )  # fmt: skip
        ours = load_pipeline(tmp_path, clip_skip=None if skip is None else first + skip)
        given = encode_batch(ours, ["a red cat"], **second)
        np.testing.assert_allclose(given["encoder_hidden_states"], states.numpy(), atol=2e-5)
        if pooled:
            np.testing.assert_allclose(given["text_embeds"], pooled[0].numpy(), atol=2e-5)


def test_a_network_sees_the_states_that_count_as_in_diffusers(sd1, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    save_pipeline(sd1, tmp_path)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    rng = np.random.default_rng(0)
    latents, states = (rng.standard_normal(shape, np.float32) for shape in ((2, 8, 8, 4), (2, 154, 64)))
    seen = np.arange(154) < np.array([[154], [77]])
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(latents.transpose(0, 3, 1, 2)),
            torch.tensor([500, 500]),
            torch.from_numpy(states),
            encoder_attention_mask=torch.from_numpy(seen),
        ).sample.numpy()
    unet = nnx.merge(sd1.unet.graphdef, sd1.unet.params)
    ours = unet(latents, np.array([500, 500]), states, encoder_attention_mask=seen)
    np.testing.assert_allclose(np.moveaxis(ours, -1, 1), expected, atol=2e-5 * np.abs(expected).max())


# ----------------------------------------------------------------------------------------------------------------------
# Images


@pytest.fixture(scope="module")
def demo():
    return TextToImage(load_pipeline("demo"), steps=2, batch_size=2)


SHORT = "a large red circle in the middle, white background"
# More than the 22 tokens that the demo's text encoder reads.
TWO_CHUNKS = f"{SHORT}, and a small blue square on the left of it, and a green triangle"


@pytest.mark.parametrize(("syntax", "rule"), [("a1111", cfg(3.0)), ("comfyui", chats(3.0))], ids=["cfg", "chats"])
def test_an_image_does_not_depend_on_the_length_of_others(syntax, rule, demo):
    modules = {"pos": demo.pipeline.unet, "neg": demo.pipeline.unet} if rule.networks() != ("base",) else {}
    draw = dataclasses.replace(demo, prompt_syntax=syntax, modules=modules)
    alone = draw([SHORT, SHORT], [7, 7], rule)
    beside = draw([SHORT, TWO_CHUNKS], [7, 7], rule)
    assert draw.count_chunks([SHORT, TWO_CHUNKS]) == 2
    np.testing.assert_allclose(beside[0], alone[0], atol=2e-5)
    assert np.abs(beside[1] - alone[1]).max() > 1e-2
    np.testing.assert_allclose(dataclasses.replace(draw, prompt_syntax="plain")([SHORT] * 2, [7, 7], rule), alone)


def test_a_cut_names_the_flag(demo):
    with pytest.warns(UserWarning, match="--prompt-syntax") as told:
        demo([TWO_CHUNKS] * 2)
    assert "green triangle" in str(told[0].message)


def test_weights_in_a_plain_prompt_name_the_flag(demo):
    with pytest.warns(UserWarning, match="'.red:1.4.' is read as text; .*--prompt-syntax") as told:
        demo.count_chunks(["a circle (left)", "a (red:1.4) circle", "a (blue:2) circle"])
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        demo.count_chunks(["a circle (left), 16:9"])


def test_second_prompts_are_for_two_text_encoders(demo):
    with pytest.raises(ValueError, match="one text encoder; expected them for SDXL only"):
        demo([SHORT] * 2, second_prompts=["oil"] * 2)


def test_a_layer_beyond_the_encoder_is_told():
    with pytest.raises(ValueError, match=r"clip_skip=13; expected 1 to [0-9]+, the layers of its text encoders"):
        load_pipeline("demo", clip_skip=13)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--prompt", "a [cat|dog]", "--prompt-syntax", "a1111"], "alternates words"),
        (["--prompt", "a cat", "--second-prompt", "oil"], "has one text encoder"),
        (["--prompt", "a cat", "--clip-skip", "40"], "clip_skip=40"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(flags, told, tmp_path, capsys):
    assert command.main(["sample", "--model", "demo", "--out", str(tmp_path / "images"), *flags]) == 1
    error = capsys.readouterr().err.strip()
    assert told in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "images").exists()
