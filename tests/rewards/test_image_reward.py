"""What ImageReward makes of prompts, and where it looks for its files."""

import numpy as np
import pytest
from transformers import BertTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from flax_pref.checkpoints.bert_tokenizer import load_bert_tokenizer
from flax_pref.checkpoints.blip_files import find_image_reward
from flax_pref.rewards.image_reward import load_image_reward

SPECIAL = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [
    *"abcdefghijklmnopqrstuvwxyz0123456789!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~",
    *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"),
    *("cat", "dog", "paint", "##ing", "##ed", "astronaut", "cafe", "unaffable", "un", "##aff", "##able", "of", "the"),
    *("猫", "東", "京", "가", "ᄀ", "ᅡ", "…", "“", "”", "—", "€", "ß", "и", "и", "й", "🙂", "½", "1", "##2", "ﬁ"),
]
TEXTS = [
    "a painting of the cat",
    "",
    " \t\n ",
    "Unaffable ASTRONAUT painted the Café, Ångström & İstanbul straße",
    "cafe\u0301 e\u0301 \u0130 \u0131 й и\u0306 한 가",
    "東京cat猫の写真 ㋿ 𠀀 \U0002a6df",
    "dog's-eye view: 8k, f/1.8 (35mm) [octane] {render} <lora:cat:0.8> \\ ~ ^ `x`",
    "emoji 🙂🙂👩‍🚀 zero\u200bwidth\u00a0space\u3000ideographic \u2028line soft\u00adhyphen \ufeffbom",
    "control \x00 \x07 \ufffd \x7f characters\r\nand lines",
    "“quoted” — dash… €5 ½ ﬁne",
    "a [MASK] [SEP] [CLS] [PAD] [UNK] [unused0] [ENC] [DEC] [enc] [cls]",
    "[CLS]cat[SEP]dog [ENC]cat",
    "z" * 100 + " " + "z" * 101,
    "the cat " * 40,
    "un" * 60,
    "<script>alert('cat')</script> &amp; café",
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    file = tmp_path_factory.mktemp("bert") / "vocab.txt"
    file.write_text("\n".join(dict.fromkeys(SPECIAL + PIECES)) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("reference", [BertTokenizer, BertTokenizerLegacy])
def test_prompts_are_tokenized_and_cut_as_berts_are(vocabulary, reference):
    reference = reference(str(vocabulary))
    # As BLIP's init_tokenizer does.
    reference.add_special_tokens({"bos_token": "[DEC]"})
    reference.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    expected = reference(TEXTS, padding="max_length", truncation=True, max_length=35, return_tensors="np")
    tokenizer = load_bert_tokenizer(vocabulary, length=35)
    ids, mask = tokenizer(TEXTS)
    assert ids.dtype == np.int32 and mask.dtype == bool
    for text, *pair in zip(TEXTS, ids, expected["input_ids"], mask, expected["attention_mask"], strict=True):
        np.testing.assert_array_equal(pair[0], pair[1], err_msg=repr(text))
        np.testing.assert_array_equal(pair[2], pair[3], err_msg=repr(text))
    assert tokenizer.vocab_size == len(reference)
    # A prompt of 80 words ends as every other does.
    assert ids[TEXTS.index("the cat " * 40)].tolist().index(SPECIAL.index("[SEP]")) == 34


def test_ids_are_the_lines_of_the_vocabulary(vocabulary):
    lines = vocabulary.read_text(encoding="utf-8").splitlines()
    ids, mask = load_bert_tokenizer(vocabulary.parent, length=8)(["Painting of [ENC]", "東x"])
    words = [
        [lines[i] if i < len(lines) else i - len(lines) for i in row[seen]] for row, seen in zip(ids, mask, strict=True)
    ]
    assert words == [["[CLS]", "paint", "##ing", "of", 1, "[SEP]"], ["[CLS]", "東", "x", "[SEP]"]]
    assert (ids[~mask] == 0).all()


def test_no_prompts_are_no_rows_and_one_text_is_not_a_list(vocabulary):
    tokenizer = load_bert_tokenizer(vocabulary, length=35)
    assert [part.shape for part in tokenizer([])] == [(0, 35)] * 2
    with pytest.raises(TypeError, match="takes a list of texts"):
        tokenizer("a cat")


def test_a_vocabulary_with_windows_line_ends_is_the_same(vocabulary, tmp_path):
    (tmp_path / "vocab.txt").write_bytes(vocabulary.read_bytes().replace(b"\n", b"\r\n"))
    ours, theirs = (load_bert_tokenizer(path, length=35)(TEXTS)[0] for path in (tmp_path, vocabulary))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\ndog\n", r"the vocabulary of 2 tokens has no '\[CLS\]'; expected vocab.txt of google-bert"),
        (b"", r"has no '\[CLS\]'"),
        (b"\xff\xfe\x00", "not a text file"),
    ],
)
def test_what_is_no_vocabulary_is_refused_in_one_line(tmp_path, content, message):
    file = tmp_path / "words.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_bert_tokenizer(file, length=35)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache of the Hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (
            lambda folder: load_image_reward(),
            "zai-org/ImageReward/ImageReward.pt: no such file or folder, the Hub cannot be reached",
        ),
        (
            lambda folder: load_image_reward("owner/name"),
            "owner/name/ImageReward.pt: no such file or folder, the Hub cannot be reached",
        ),
        (
            lambda folder: load_image_reward(str(folder)),
            r"ImageReward\.pt: no such file; expected the weights of Image",
        ),
        (lambda folder: load_image_reward("no/such/file.pt"), r"no/such/file\.pt: no such file; expected the weights"),
        (
            lambda folder: load_bert_tokenizer(length=35),
            "google-bert/bert-base-uncased/vocab.txt: .*the Hub cannot be reached.* as the tokenizer",
        ),
        (
            lambda folder: load_bert_tokenizer(folder, length=35),
            r"vocab\.txt: no such file; expected vocab\.txt of google",
        ),
    ],
)
def test_files_that_are_nowhere_are_named_in_one_line(offline, tmp_path, load, message):
    with pytest.raises(FileNotFoundError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_repository_of_the_hub_is_asked_for_one_file(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "flax_pref.checkpoints.hub.hf_hub_download",
        lambda *names: asked.append(names) or str(tmp_path / "found"),
    )
    assert find_image_reward() == find_image_reward("owner/name") == tmp_path / "found"
    assert asked == [("zai-org/ImageReward", "ImageReward.pt"), ("owner/name", "ImageReward.pt")]
    (tmp_path / "ImageReward.pt").touch()
    assert find_image_reward(tmp_path) == find_image_reward(tmp_path / "ImageReward.pt") == tmp_path / "ImageReward.pt"
    assert len(asked) == 2
