"""Online methods on the base of the demo world, with its judge as reward."""

import itertools
from functools import partial

import jax
import numpy as np
import optax
import pytest

from flax_pref.checkpoints.diffusers import load_pipeline
from flax_pref.checkpoints.hub import find_checkpoint
from flax_pref.checkpoints.lora import lora_network
from flax_pref.diffusion.conditioning import encode_empty, encode_prompts
from flax_pref.diffusion.guidance import cfg
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.diffusion.text_to_image import TextToImage
from flax_pref.methods import D3PO, DDPO, SPO, TailorPO
from flax_pref.models.lora import bank_predict, join_lora, split_lora
from flax_pref.rewards.reward import Weighted, make_reward
from flax_pref.training.rollouts import Prompts, RolloutConfig, Rollouts
from flax_pref.world import scenes as world

S = 3.0


class Run:
    """Adapters of the demo's base, and what trains them."""

    def __init__(self, method, num_prompts, config):
        self.method = method
        self.pipeline = load_pipeline(find_checkpoint("demo"))
        self.unet = lora_network(self.pipeline.unet, method.modules, rank=8, alpha=8.0, key=jax.random.key(0))
        self.backbone, self.lora = split_lora(self.unet.params)
        self.captions = [scene.caption for scene in itertools.islice(world.scenes("train", 0), num_prompts)]
        self.prompts = Prompts(
            captions=self.captions,
            ids=range(num_prompts),
            text=encode_prompts(self.pipeline, self.captions),
            empty=encode_empty(self.pipeline),
        )
        self.reward = make_reward((Weighted("judge"),))
        self.source = Rollouts(
            method,
            self.predict_of,
            self.backbone,
            self.pipeline.vae,
            self.prompts,
            self.reward,
            self.pipeline.scheduler_config,
            config,
            size=(64, 64),
            seed=0,
        )

    def predict_of(self, lora, backbone):
        return bank_predict(self.unet.graphdef, join_lora(backbone, lora))

    def loss(self, lora, backbone, batch):
        return self.method.loss(self.predict_of(lora, backbone), batch, jax.random.key(0))

    def mean_reward(self, lora, seeds):
        """Of images of the training prompts, drawn as a user would draw them."""
        unet = self.unet._replace(params=join_lora(self.backbone, lora))
        draw = TextToImage(
            # The pipeline with these adapters; everything else as it is.
            type(self.pipeline)(**{**vars(self.pipeline), "unet": unet}),
            solver_from_config(self.pipeline.scheduler_config, 10, name="ddim"),
            (64, 64),
            len(self.captions),
        )
        score = jax.jit(self.reward.score)
        rule, prepared = cfg(S, *self.method.modules), self.reward.prepare(self.captions)
        images = [draw(self.captions, range(len(self.captions)), rule, seed=seed) for seed in seeds]
        return float(np.mean([score(drawn, prepared) for drawn in images]))


METHODS = {
    "tailorpo": partial(TailorPO, train_steps=3),
    "tailorpo-g": partial(TailorPO, train_steps=2, rate=(0.1, 0.2), through_network=True),
    "spo": partial(SPO, pool=3, skip=1),
    "d3po": D3PO,
    "ddpo": partial(DDPO, images_per_prompt=2),
}


# Each compiles the UNet several times, for half a minute; `test_online` has all methods with tiny networks.
@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_an_iteration_of_every_method_gives_a_loss_that_can_be_learned_from(name):
    run = Run(METHODS[name](steps=3, guidance_scale=S), 2, RolloutConfig(prompts=2, at_once=2, batch_size=2))
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        batch = run.source.next(run.lora)
        (loss, metrics), gradients = jax.jit(jax.value_and_grad(run.loss, has_aux=True))(run.lora, run.backbone, batch)
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
    print({name: float(value) for name, value in metrics.items()})
    assert all(np.isfinite(value) for value in metrics.values())
    assert 0 < metrics["reward"] < 1
    if name != "ddpo":
        assert float(loss) == pytest.approx(np.log(2), abs=1e-4)
        assert metrics["used"] == 1
    assert 0 < optax.tree.norm(gradients) < np.inf


@pytest.mark.long
@pytest.mark.parametrize("through_network", [False, True])
def test_the_gradient_through_the_network_raises_rewards_at_every_t_and_the_other_at_small_t(through_network):
    """Table 1 of arXiv:2502.01667, which counts moves that raise and that lower the reward, by t."""
    method = TailorPO(steps=10, guidance_scale=S, rate=(0.1, 0.2), through_network=through_network)
    run = Run(method, 32, RolloutConfig(prompts=32, at_once=16, batch_size=32))
    run.source.next(run.lora)
    raised = np.asarray(run.source.arrays()["raised"]).mean(axis=0)
    print({f"t = {method.steps - i}": f"{share:.0%}" for i, share in zip(method.trained, raised, strict=True)})
    if through_network:
        assert (raised > 0.9).all()
    else:  # at large t an image's promise depends on its latents mostly through the prediction
        assert (np.diff(raised) > 0).all() and raised[0] < 0.5 and raised[-1] > 0.9


@pytest.mark.long
def test_tailorpo_raises_the_judges_mean_reward():
    config = RolloutConfig(prompts=16, at_once=16, batch_size=32)
    run = Run(TailorPO(steps=8, guidance_scale=S, train_steps=8), 16, config)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    @jax.jit
    def update(lora, state, backbone, batch):
        (_, metrics), gradients = jax.value_and_grad(run.loss, has_aux=True)(lora, backbone, batch)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(lora, updates), state, metrics

    lora, state = run.lora, optimizer.init(run.lora)
    before = run.mean_reward(lora, range(4))
    for _ in range(60):
        lora, state, metrics = update(lora, state, run.backbone, run.source.next(lora))
    after = run.mean_reward(lora, range(4))
    print(f"mean reward {before:.4f} -> {after:.4f}; { ({name: float(value) for name, value in metrics.items()}) }")
    assert after > before + 0.02
