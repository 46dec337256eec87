"""What the UNet is told: encoded prompts, cut prompts, no prompt."""

import json
import warnings

import numpy as np
import pytest

from flax_pref.checkpoints.tokenizer import CLIPTokenizer
from flax_pref.diffusion import conditioning
from flax_pref.diffusion.conditioning import encode_empty, encode_prompts, size_ids
from flax_pref.models.network import Network

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
TOKENIZER = CLIPTokenizer({token: i for i, token in enumerate(TOKENS)}, [], model_max_length=8)


class Parts:
    """As much of a pipeline as encoding needs."""

    def __init__(self, encoders, force_zeros=False):
        self.text_encoders = (Network(None, None, None),) * encoders
        self.tokenizers = (TOKENIZER,) * encoders
        self.force_zeros_for_empty_prompt = force_zeros
        self.clip_skip = None


@pytest.fixture
def calls(monkeypatch):
    """Counts the texts that are encoded; states are the ids, the pooled text their sum."""
    counted = []

    def encode(graphdef, layer, normalised, params, ids):
        counted.extend({tuple(row) for row in ids})
        states = np.repeat(ids[..., None], 3, -1).astype(np.float32)
        return [states] if normalised else [states, ids.sum(-1, keepdims=True).astype(np.float32)]

    monkeypatch.setattr(conditioning, "_text_encoder", encode)
    return counted


def test_equal_prompts_are_encoded_once(calls):
    encoded = encode_prompts(Parts(1), ["cat", "dog", "cat", "cat"], batch_size=2)["encoder_hidden_states"]
    assert len(calls) == 2
    assert encoded.shape == (4, 8, 3)
    np.testing.assert_array_equal(encoded[0], encoded[3])
    assert (encoded[0] != encoded[1]).any()


def test_two_encoders_give_joined_states_and_the_pooled_text_of_the_second(calls):
    encoded = encode_prompts(Parts(2), ["cat", "dog"])
    assert {name: array.shape for name, array in encoded.items()} == {
        "encoder_hidden_states": (2, 8, 6),
        "text_embeds": (2, 1),
    }


def test_no_prompt_is_zeros_where_the_checkpoint_says_so(calls):
    assert not any(array.any() for array in encode_empty(Parts(2, force_zeros=True)).values())
    np.testing.assert_array_equal(
        encode_empty(Parts(2))["encoder_hidden_states"], encode_prompts(Parts(2), [""])["encoder_hidden_states"][0]
    )


def test_a_cut_prompt_is_quoted_and_a_short_one_is_not(calls):
    with pytest.warns(UserWarning, match=r"reads 6 tokens.*'three' of 'one two three'") as caught:
        encode_prompts(Parts(1), ["one two three", "one two", "one two three"])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_prompts(Parts(1), ["one two"])


def test_a_thousand_cut_prompts_do_not_fill_the_screen(calls):
    prompts = [f"letters {a}{b}" for a in LETTERS for b in LETTERS]
    with pytest.warns(UserWarning, match="and the ends of 671 other prompts") as caught:
        encode_prompts(Parts(1), prompts)
    assert len(str(caught[0].message)) < 500


def test_sizes_are_in_the_order_that_sdxl_was_trained_with():
    assert json.dumps(size_ids((1, 2), (3, 4), (5, 6)).tolist()) == "[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]"
