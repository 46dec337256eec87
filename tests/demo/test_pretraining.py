import dataclasses
import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from flax_pref.checkpoints.diffusers import load_pipeline, save_pipeline
from flax_pref.demo.pretraining import Phase, train_base, train_tokenizer
from flax_pref.world import scenes as world

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def captions():
    return [scene.caption for scene in itertools.islice(world.scenes("train", 0), 2000)]


def test_every_word_of_a_caption_is_one_token(captions, tmp_path):
    tokenizer = train_tokenizer(captions, 24)
    for caption in captions[:50]:
        ids = tokenizer([caption])[0]
        words = len(caption.replace(",", " ,").split())
        assert (ids == tokenizer.vocab["<|endoftext|>"]).argmax() == words + 1
    tokenizer.save(tmp_path)
    texts = [*captions[:20], "", "An unknown café, with 3 words!"]
    theirs = CLIPTokenizer.from_pretrained(tmp_path)(texts, padding="max_length", truncation=True)
    np.testing.assert_array_equal(tokenizer(texts), np.array(theirs["input_ids"]))


@pytest.mark.long  # the recipe is run with the commands of the README too
def test_the_base_recipe_writes_a_checkpoint_and_goes_on_from_its_autoencoder(tmp_path, capsys, monkeypatch):
    config = runpy.run_path(str(ROOT / "configs/demo/base.py"))["config"]
    short = Phase(steps=2, batch_size=2, learning_rate=1e-3, warmup_steps=1)
    config = dataclasses.replace(
        config,
        output=tmp_path,
        examples=64,
        autoencoder=short,
        decoder=short,
        diffusion=short,
        layout=short,
        vae=dataclasses.replace(
            config.vae,
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
        ),
        unet=dataclasses.replace(
            config.unet,
            block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        ),
        text_encoder=dataclasses.replace(config.text_encoder, num_hidden_layers=1),
    )
    pipeline = train_base(config)
    save_pipeline(pipeline, tmp_path / "pipeline")
    assert load_pipeline(tmp_path / "pipeline").vae.config.scaling_factor > 0
    parts = (pipeline.unet, pipeline.text_encoders[0])
    monkeypatch.setattr("flax_pref.demo.pretraining.train_diffusion", lambda *_: parts)
    again = train_base(config)
    assert "using the autoencoder in" in capsys.readouterr().out
    assert again.vae.config == pipeline.vae.config


def test_a_phase_shorter_than_its_warm_up_is_refused():
    with pytest.raises(ValueError, match="warmup_steps=100 must be less than steps=50"):
        Phase(steps=50, batch_size=1, learning_rate=1e-3)
