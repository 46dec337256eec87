"""A prepared set holds what diffusers' encoders make of the same images and captions, for both families."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch_pipelines import sd15, sdxl
from torch_reference import nchw

from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.data.encode import EncodedSet, Encoding, PairEncoder
from flax_pref.data.images import decode_image, encode_jpeg
from flax_pref.data.pick_a_pic import LabelledPair, write_pairs
from flax_pref.data.pipeline import InputConfig, PairBatches
from flax_pref.data.prepared import EMPTY
from flax_pref.data.selection import Choice, select
from flax_pref.data.sources import Source, open_source

# diffusers' and transformers' own housekeeping, none of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]

SIZE = (32, 40)
CAPTIONS = ("a lion, red", "a dog")
HALF = 2.0**-8  # relative error of bfloat16


@pytest.fixture(scope="module", params=[sd15, sdxl], ids=["sd15", "sdxl"])
def encoded(request, tmp_path_factory):
    """Records of four pairs, their images, and diffusers' pipeline."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder / "tokenizers").save_pretrained(folder / "pipeline")
    rng = np.random.default_rng(0)
    jpegs = [encode_jpeg(rng.random((*SIZE, 3))) for _ in range(8)]
    pairs = [
        LabelledPair(CAPTIONS[i % 2], jpegs[2 * i], jpegs[2 * i + 1], 1.0, f"{i}-0", f"{i}-1", "a", "b")
        for i in range(4)
    ]
    write_pairs(folder / "pairs.parquet", pairs)
    reader = open_source(Source(layout="pick_a_pic", path=str(folder / "pairs.parquet")))
    encoder = PairEncoder(load_pipeline(folder / "pipeline", with_unet=False), Encoding(size=SIZE))
    images = np.stack([np.asarray(decode_image(jpeg)) for jpeg in jpegs]) / np.float32(127.5) - 1
    theirs = DiffusionPipeline.from_pretrained(folder / "pipeline", torch_dtype=torch.float32)
    return EncodedSet(encoder, reader, select(reader, Choice())), images, theirs


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(np.float32(ours), theirs, atol=1.5 * HALF * np.abs(theirs).max())


@torch.no_grad()
def test_moments_are_those_of_diffusers(encoded):
    records, images, theirs = encoded
    parameters = theirs.vae.encode(nchw(images)).latent_dist.parameters.permute(0, 2, 3, 1)
    for i in range(4):
        pair = records.pair(i)
        close(pair["winner"][0], parameters[2 * i])
        close(pair["loser"][0], parameters[2 * i + 1])


@torch.no_grad()
def test_embeddings_are_those_of_diffusers_and_no_caption_is_what_guidance_means_by_it(encoded):
    records, _, theirs = encoded
    states, empty, *pooled = theirs.encode_prompt(
        list(CAPTIONS), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    for number, caption in ((EMPTY, 0), (1, 0), (2, 1)):
        ours = records.conditioning(number)
        close(ours["encoder_hidden_states"], (empty if number == EMPTY else states)[caption])
        if pooled:
            close(ours["text_embeds"], pooled[number == EMPTY][caption])
    assert ("text_embeds" in records.shapes.conditioning) == bool(pooled)


@torch.no_grad()
def test_a_dropped_caption_can_be_the_encoded_empty_text_as_in_published_trainers(encoded, tmp_path):
    _, _, theirs = encoded
    states, _, *pooled = theirs.encode_prompt(
        "", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    theirs.save_pretrained(tmp_path)
    pipeline = load_pipeline(tmp_path, with_unet=False)
    (dropped,) = PairEncoder(pipeline, Encoding(size=SIZE, dropped_caption="encoded")).captions([None])
    close(dropped["encoder_hidden_states"], states[0])
    if pooled:
        close(dropped["text_embeds"], pooled[0][0])


def test_a_batch_tells_sdxl_the_sizes_of_both_images(encoded):
    records, *_ = encoded
    with PairBatches(records, InputConfig(batch_size=4), seed=0) as batches:
        batch = next(batches)
    assert batch["time_ids"].shape == (4, 2, 6)
    np.testing.assert_array_equal(batch["time_ids"], np.broadcast_to([*SIZE, 0, 0, *SIZE], (4, 2, 6)))
    assert sorted(batch["row"].tolist()) == [0, 1, 2, 3]
