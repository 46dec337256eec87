"""Tokenizers as they lie on disk: the ids of transformers, and what users see of damaged or mismatched vocabularies."""

import json

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken

from flax_pref.checkpoints.tokenizer import load_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz<>-!_1"
MERGES = [("c", "a"), ("ca", "t</w>"), ("t", "o"), ("to", "y</w>")]
TOKENS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *(left + right for left, right in MERGES)]
TOKENS += ["<|startoftext|>", "<|endoftext|>"]
VOCAB = {token: i for i, token in enumerate(TOKENS)}
START, END = (VOCAB[token] for token in ("<|startoftext|>", "<|endoftext|>"))
FIRST = len(VOCAB)  # id of the first added token
PROMPTS = [
    "a cat",
    "a <cat-toy> on a sks mat",
    "x<cat-toy>y",
    "a <CAT-TOY> cat",
    "wow! so fat!!",
    "masks and SKS",
    "  <cat-toy>  ",
    "<|endoftext|> <|StartOfText|>",
    "<cat-toy>_1",
    "",
]


def flags(content, **change):
    named = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"content": content, **named, **change}


SPECIALS = {str(START): flags("<|startoftext|>", normalized=True, special=True), str(END): flags("<|endoftext|>")}
TOYS = {"<cat-toy>": FIRST, "sks": FIRST + 1}


def write(folder, config=None, files=None, vocab=VOCAB, merges=MERGES):
    """A tokenizer folder as transformers 4 wrote it, with other files beside."""
    folder.mkdir(exist_ok=True)
    settings = {"model_max_length": 16, "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    settings |= {"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"}
    files = {"tokenizer_config.json": settings | (config or {}), "vocab.json": vocab} | (files or {})
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    return folder


def theirs(folder):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    return np.array(tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=16)["input_ids"])


# Settings, files beside, and an id that they put into a row.
ADDED = {
    "none": ({}, {}, (4, VOCAB["!</w>"])),
    "added_tokens.json": ({}, {"added_tokens.json": TOYS}, (1, FIRST)),
    "added_tokens_decoder": (
        {
            "added_tokens_decoder": SPECIALS
            | {str(FIRST): flags("<cat-toy>", normalized=True), str(FIRST + 1): flags("sks", single_word=True)}
        },
        {},
        (1, FIRST + 1),
    ),
    "special": ({}, {"special_tokens_map.json": {"additional_special_tokens": ["<cat-toy>"]}}, (1, FIRST)),
    "padding in prompts": ({"pad_token": "!"}, {}, (4, VOCAB["!"])),  # as in SDXL's second tokenizer
    "padding of the map": ({}, {"special_tokens_map.json": {"pad_token": flags("!")}}, (4, VOCAB["!"])),
    "padding of its own": ({"pad_token": "<pad>"}, {}, (0, FIRST)),
}


@pytest.mark.parametrize("name", ADDED)
def test_prompts_have_the_ids_of_transformers_with_and_without_added_tokens(name, tmp_path):
    config, files, (row, index) = ADDED[name]
    folder = write(tmp_path, config, files)
    expected = theirs(folder)
    tokenizer = load_tokenizer(folder)
    np.testing.assert_array_equal(tokenizer(PROMPTS), expected)
    assert index in expected[row, 1:]
    assert tokenizer.size == len(transformers.CLIPTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("name", ADDED)
def test_a_saved_tokenizer_gives_the_same_ids_here_and_in_transformers(name, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "read", *ADDED[name][:2]))
    tokenizer.save(tmp_path / "saved")
    np.testing.assert_array_equal(load_tokenizer(tmp_path / "saved")(PROMPTS), tokenizer(PROMPTS))
    np.testing.assert_array_equal(theirs(tmp_path / "saved"), tokenizer(PROMPTS))


def test_the_folder_that_transformers_saves_after_textual_inversion_is_read(tmp_path):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(write(tmp_path / "plain"))
    tokenizer.add_tokens(["<cat-toy>", AddedToken("sks", single_word=True)])
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    ids = load_tokenizer(tmp_path / "saved")(PROMPTS)
    np.testing.assert_array_equal(ids, theirs(tmp_path / "saved"))
    assert FIRST in ids[1] and FIRST + 1 in ids[1] and FIRST + 1 not in ids[5, :4]


def test_a_textual_inversion_of_several_vectors_is_spelled_out_as_in_pipelines_of_diffusers(tmp_path):
    loaders = pytest.importorskip("diffusers.loaders")
    vectors = {"<toy>": FIRST, "<toy>_1": FIRST + 1, "<toy>_2": FIRST + 2, "<cat>": FIRST + 3}
    folder = write(tmp_path, files={"added_tokens.json": vectors})
    prompts = ["a <toy>", "<cat> and <toy>, <toy>", "a cat", "<toy>_1", "<TOY>", "fat " * 30 + "<toy>"]
    expected = loaders.TextualInversionLoaderMixin().maybe_convert_prompt(
        prompts, transformers.CLIPTokenizer.from_pretrained(folder)
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.spelled_out(prompts) == expected
    assert expected[0] == "a <toy> <toy>_1 <toy>_2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merges": []}, r"merges\.txt: its 0 merges never make 4 of the tokens in vocab\.json, such as 'ca'"),
        ({"merges": MERGES[:-1]}, r"merges\.txt: its 3 merges never make 1 of the tokens .* 'toy</w>'"),
        ({"vocab": VOCAB | {"b": 0}}, r"vocab\.json: 70 tokens have only 69 different ids"),
        ({"vocab": VOCAB | {"b": True}}, r"vocab\.json: expected an id for each token"),
        ({"files": {"added_tokens.json": {"<toy>": FIRST + 3}}}, r"added_tokens\.json: .*'<toy>' has id 73, .* is 70"),
        ({"files": {"added_tokens.json": {"<toy>": 3}}}, r"added_tokens\.json: .*'<toy>' has id 3, .* is 70"),
        ({"files": {"added_tokens.json": {"<toy>": "x"}}}, r"added_tokens\.json: 'x' is no id of an added token"),
        ({"files": {"added_tokens.json": {"<toy>": None}}}, r"added_tokens\.json: None is no id of an added token"),
        ({"files": {"added_tokens.json": {"": 70}}}, r"added_tokens\.json: .* is no added token"),
        ({"config": {"added_tokens_decoder": []}}, r"tokenizer_config\.json: added_tokens_decoder is no object"),
        ({"config": {"added_tokens_decoder": {"70": "x"}}, "files": {"added_tokens.json": TOYS}}, "adds the token"),
        ({"config": {"added_tokens_decoder": {"70": {"content": 3}}}}, r"tokenizer_config\.json: .* is no added token"),
        ({"config": {"added_tokens_decoder": {"70": flags("x", lstrip=3)}}}, r"tokenizer_config\.json: .* no added"),
        ({"config": {"additional_special_tokens": 3}}, r"tokenizer_config\.json: additional_special_tokens=3"),
        ({"config": {"additional_special_tokens": [3]}}, r"tokenizer_config\.json: 3 is no added token"),
    ],
)  # fmt: skip
def test_a_damaged_vocabulary_is_refused_by_file_and_reason(options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(write(tmp_path, **options))
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_a_cut_tokenizer_json_is_refused(tmp_path):
    transformers.CLIPTokenizer.from_pretrained(write(tmp_path / "plain")).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "tokenizer.json"
    whole = json.loads(file.read_text())
    for change, message in (
        ({"model": whole["model"] | {"merges": whole["model"]["merges"][:2]}}, "its 2 merges never make 2"),
        ({"model": whole["model"] | {"vocab": VOCAB | {"b": 0}}}, "70 tokens have only 69 different ids"),
        ({"added_tokens": {"x": 3}}, "added_tokens is no list"),
        ({"added_tokens": [3]}, "no added token"),
        ({"added_tokens": [flags("x")]}, "None is no id of an added token"),
    ):
        file.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{message}"):
            load_tokenizer(tmp_path / "saved")
