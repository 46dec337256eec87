"""Losses and gradients of the online objectives against transcriptions in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_formulas import SCHEDULE, gradients, sigmoid

from flax_pref.diffusion.timestep_solvers import ddim
from flax_pref.methods import D3PO, DDPO, SPO, TailorPO
from flax_pref.methods.ddpo import advantages

COUNT, SHAPE, S, CLIP = 5, (2, 2, 2), 4.0, 0.02
TOLERANCE = 1e-6  # relative: of the loss, and of the largest gradient of a network
SOLVER = ddim(SCHEDULE, 20, eta=1.0, steps_offset=1, set_alpha_to_one=False)
STEPS = np.array([0, 5, 11, 17, 19])  # of each example, the first and the last among them


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64():
        yield


def solver_rows(solver=SOLVER, steps=STEPS):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)[steps]), solver)


# What the rows of a solver are, from the schedule: in float32 as the solver has rounded them.
ROW = jax.tree.map(lambda x: np.asarray(x, np.float64)[STEPS], SOLVER)
A, K, SIGMA = ROW.latents_coef, ROW.estimate_coefs[:, 0], ROW.fresh_noise_coef


def test_the_coefficients_of_a_step_are_those_of_the_paper():
    t = ROW.timesteps.astype(int)
    abar = SCHEDULE.alphas_cumprod[t]
    next_abar = np.where(t >= 50, SCHEDULE.alphas_cumprod[np.maximum(t - 50, 0)], SCHEDULE.alphas_cumprod[0])
    sigma = np.sqrt((1 - next_abar) / (1 - abar) * (1 - abar / next_abar))
    k = np.sqrt(1 - next_abar - sigma**2) - np.sqrt(next_abar * (1 - abar) / abar)
    np.testing.assert_allclose(SIGMA, sigma, rtol=1e-6)
    np.testing.assert_allclose(K, k, rtol=1e-6)
    np.testing.assert_allclose(A, np.sqrt(next_abar / abar), rtol=1e-6)


def wide(x):
    return x[:, None, None, None]


RNG = np.random.default_rng(0)


def drawn(*shape):
    return RNG.standard_normal((COUNT, *shape, *SHAPE))


# Two x_t of each example, of which all methods but D3PO have the first; and the predictions of each network for both,
# without and with the prompt, `[B, x_t, prompt, H, W, C]`.
LATENTS = drawn(2)
# Policies close to the reference, some ratios beyond the clip.
PREDICTIONS = {"base": drawn(2, 2)}
PREDICTIONS["policy"] = PREDICTIONS["base"] + np.array([0.003, 0.01, 0.03, 0.1, 0.05])[
    :, None, None, None, None, None
] * drawn(2, 2)
TEXT = {"kind": np.ones((COUNT, 1)), "number": np.arange(COUNT)[:, None]}
REWARDS = np.array([[0.9, 0.1], [0.5, 0.45], [0.7, 0.2], [0.3, 0.3], [1.0, 0.0]])
GUIDED = PREDICTIONS["base"][:, :, 0] + S * (PREDICTIONS["base"][:, :, 1] - PREDICTIONS["base"][:, :, 0])
MEAN = A[:, None, None, None, None] * LATENTS + K[:, None, None, None, None] * GUIDED
NEXT = MEAN + SIGMA[:, None, None, None, None] * drawn(2)  # one step from each x_t
CANDIDATES = MEAN[:, :1] + SIGMA[:, None, None, None, None] * drawn(2)  # two steps from the first


def predict_with(predictions):
    """The rows that are asked for: which x_t by the order of the rows, which prompt by what the row is told."""

    def predict(networks, latents, timesteps, text):
        np.testing.assert_array_equal(timesteps, ROW.timesteps)
        kinds = np.asarray(text["kind"])[:, :, 0].astype(int)
        seen, rows = {0: 0, 1: 0}, []
        for r, name in enumerate(networks):
            kind = int(kinds[0, r])
            assert (kinds[:, r] == kind).all()
            np.testing.assert_array_equal(text["number"][:, r, 0], np.arange(COUNT) if kind else -np.ones(COUNT))
            np.testing.assert_array_equal(latents[:, r], LATENTS[:, seen[kind]])
            rows.append(predictions["base" if name == "base" else "policy"][:, seen[kind], kind])
            seen[kind] += 1
        return jnp.stack(rows, axis=1)

    return predict


def batch_of(method, rewards=REWARDS):
    common = {
        "row": solver_rows(),
        "text": TEXT,
        "empty": {"kind": np.zeros((COUNT, 1)), "number": -np.ones((COUNT, 1))},
        "reward": rewards.mean(axis=1),
    }
    if method in ("tailorpo", "spo"):
        pair = {"latents": LATENTS[:, 0], "winner": CANDIDATES[:, 0], "loser": CANDIDATES[:, 1]}
        return {**common, **pair, "rewards": rewards}
    if method == "d3po":
        return {**common, "latents": LATENTS, "next_latents": NEXT, "rewards": rewards}
    return {**common, "latents": LATENTS[:, 0], "next_latents": NEXT[:, 0], "log_prob": OLD, "advantage": ADVANTAGE}


# ----------------------------------------------------------------------------------------------------------------------
# Transcriptions: log-densities in full


def log_density(next_latents, latents, predicted):
    """Of a step, averaged over dimensions; `predicted [B, prompt, H, W, C]`."""
    guided = (1 - S) * predicted[:, 0] + S * predicted[:, 1]
    mean = wide(A) * latents + wide(K) * guided
    variance = wide(SIGMA**2)
    return (-((next_latents - mean) ** 2) / (2 * variance) - np.log(2 * np.pi * variance) / 2).mean(axis=(1, 2, 3))


def log_ratio(predictions, next_latents, i):
    of_policy, of_base = (log_density(next_latents, LATENTS[:, i], predictions[n][:, i]) for n in ("policy", "base"))
    return of_policy - of_base.real  # the reference is a constant


def clipped(log_ratio, clip):
    ratio = np.exp(log_ratio)
    return np.log(np.where(abs(ratio.real - 1) > clip, 1 + clip * np.sign(ratio.real - 1), ratio))


def mean_of(values, used):
    return values[used].mean() if used.any() else 0.0


def step_pairs(predictions, beta, margin=0.0, clip=None, poly_alpha=0.0):
    ratios = [log_ratio(predictions, CANDIDATES[:, image], 0) for image in (0, 1)]
    winner, loser = ratios if clip is None else (clipped(ratio, clip) for ratio in ratios)
    p = sigmoid(beta * (winner - loser))
    return mean_of(-np.log(p) + poly_alpha * (1 - p), REWARDS[:, 0] - REWARDS[:, 1] > margin)


def trajectories(predictions, beta, margin=0.0, clip=None):
    ratios = [log_ratio(predictions, NEXT[:, image], image) for image in (0, 1)]
    winner, loser = ratios if clip is None else (clipped(ratio, clip) for ratio in ratios)
    return mean_of(-np.log(sigmoid(beta * (winner - loser))), REWARDS[:, 0] - REWARDS[:, 1] > margin)


OLD = log_density(NEXT[:, 0], LATENTS[:, 0], PREDICTIONS["base"][:, 0])
ADVANTAGE = np.array([1.5, -0.7, 20.0, -15.0, 0.3])


def policy_gradient(predictions, clip, largest):
    ratio = np.exp(log_density(NEXT[:, 0], LATENTS[:, 0], predictions["policy"][:, 0]) - OLD)
    limited = np.where(abs(ratio.real - 1) > clip, 1 + clip * np.sign(ratio.real - 1), ratio)
    advantage = np.clip(ADVANTAGE, -largest, largest)
    losses = np.where(
        (-advantage * ratio).real >= (-advantage * limited).real, -advantage * ratio, -advantage * limited
    )
    return losses.mean()


CASES = {
    "tailorpo": (TailorPO, step_pairs, {"beta": 3.0}),
    "tailorpo with a margin": (TailorPO, step_pairs, {"beta": 3.0, "margin": 0.06}),
    "tailorpo with a clip": (TailorPO, step_pairs, {"beta": 3.0, "ratio_clip": CLIP}),
    "tailorpo as poly-dpo": (TailorPO, step_pairs, {"beta": 3.0, "poly_alpha": 8.0}),
    "spo": (SPO, step_pairs, {"beta": 10.0}),
    "spo with a clip": (SPO, step_pairs, {"beta": 10.0, "ratio_clip": CLIP}),
    "d3po": (D3PO, trajectories, {"beta": 3.0}),
    "d3po with a clip": (D3PO, trajectories, {"beta": 3.0, "ratio_clip": CLIP}),
    "ddpo": (DDPO, policy_gradient, {"ratio_clip": CLIP, "advantage_clip": 10.0}),
}
NAMES = {"ratio_clip": "clip", "advantage_clip": "largest"}


def relative(found, expected):
    return float(np.max(np.abs(np.asarray(found) - expected)) / np.max(np.abs(expected)))


def loss_of(objective, options, rewards=REWARDS):
    method = objective.modules[0]

    def loss(predictions):
        batch = batch_of(method, rewards)
        return objective(guidance_scale=S, **options).loss(predict_with(predictions), batch, None)[0]

    return loss


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_formula(case):
    objective, formula, options = CASES[case]
    formula = partial(formula, **{NAMES.get(name, name): value for name, value in options.items()})
    value, found = jax.value_and_grad(loss_of(objective, options))(jax.tree.map(jnp.asarray, PREDICTIONS))
    expected = gradients(formula, PREDICTIONS)
    compared = {
        "loss": relative(value, formula(PREDICTIONS).real),
        "gradient": relative(found["policy"], expected["policy"]),
    }
    print({name: f"{error:.1e}" for name, error in compared.items()})
    assert max(compared.values()) < TOLERANCE
    assert not np.any(found["base"]), "the reference must get no gradient"


def test_the_closed_form_of_a_pair_is_the_difference_of_its_log_densities():
    """To rounding, one pair at a time: the loss gives the logit back."""
    for pair in range(COUNT):
        rewards = np.zeros((COUNT, 2))
        rewards[pair, 0] = 1
        loss = float(loss_of(TailorPO, {"beta": 2.0}, rewards)(PREDICTIONS))
        ratios = [log_ratio(PREDICTIONS, CANDIDATES[:, image], 0)[pair] for image in (0, 1)]
        assert -np.log(np.expm1(loss)) == pytest.approx(2.0 * (ratios[0] - ratios[1]), rel=1e-9, abs=1e-12)


def direction(objective):
    """Cosine of each pair's `-dL / dmu(x_t)` with `x^w - x^l`, of the winner's x_t where each has its own."""
    found = jax.grad(loss_of(objective, {"beta": 0.1}))(jax.tree.map(jnp.asarray, PREDICTIONS))["policy"]
    # The prediction for the prompt has s times the gradient of the guided one, and mu = a x_t + k_t eps.
    used = REWARDS[:, 0] > REWARDS[:, 1]
    step = (-np.asarray(found)[:, 0, 1] / wide(K) / S)[used]
    pair = (CANDIDATES if objective is TailorPO else NEXT)[used]
    apart = pair[:, 0] - pair[:, 1]
    return (step * apart).sum(axis=(1, 2, 3)) / np.sqrt((step**2).sum((1, 2, 3)) * (apart**2).sum((1, 2, 3)))


def test_tailorpo_moves_the_mean_from_the_loser_to_the_winner_and_d3po_elsewhere():
    """Sections 3.1 and 3.2 of arXiv:2502.01667: latents of two trajectories have no common mean to move."""
    np.testing.assert_allclose(direction(TailorPO), 1, rtol=1e-12)
    assert (np.abs(direction(D3PO)) < 0.99).all()


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes that the comparison finds


def with_the_mean_inside(predictions, beta):
    winner, loser = (log_ratio(predictions, CANDIDATES[:, image], 0) for image in (0, 1))
    return -np.log(sigmoid(beta * (winner - loser)[REWARDS[:, 0] > REWARDS[:, 1]].mean()))


def without_guidance_in_the_loss(predictions, beta):
    told = {name: np.stack([x[:, :, 1]] * 2, axis=2) for name, x in predictions.items()}
    return step_pairs(told, beta)


@pytest.mark.parametrize("wrong", [with_the_mean_inside, partial(step_pairs, clip=CLIP), without_guidance_in_the_loss])
def test_a_known_mistake_would_be_found(wrong):
    value, found = jax.value_and_grad(loss_of(TailorPO, {"beta": 3.0}))(jax.tree.map(jnp.asarray, PREDICTIONS))
    assert relative(value, wrong(PREDICTIONS, beta=3.0).real) > 1000 * TOLERANCE
    assert relative(found["policy"], gradients(partial(wrong, beta=3.0), PREDICTIONS)["policy"]) > 1000 * TOLERANCE


@pytest.mark.parametrize("objective", [TailorPO, SPO, D3PO])
def test_only_a_clip_that_is_asked_for_takes_gradients_away(objective):
    def dead(options):
        gradient = jax.grad(loss_of(objective, {"beta": 3.0, **options}))(jax.tree.map(jnp.asarray, PREDICTIONS))
        return jnp.abs(gradient["policy"]).max(axis=(1, 2, 3, 4, 5)) == 0

    used = REWARDS[:, 0] > REWARDS[:, 1]
    np.testing.assert_array_equal(dead({}), ~used)
    assert dead({"ratio_clip": 1e-4})[used].any()


# ----------------------------------------------------------------------------------------------------------------------
# Pairs that do not count


@pytest.mark.parametrize("objective", [TailorPO, SPO, D3PO])
def test_where_no_pair_counts_nothing_is_learned_and_nothing_breaks(objective):
    for rewards in (np.zeros((COUNT, 2)), np.full((COUNT, 2), np.nan)):
        batch = batch_of(objective.modules[0], rewards)

        def loss(predictions, batch=batch):
            return objective(beta=1.0, guidance_scale=S).loss(predict_with(predictions), batch, None)

        (value, metrics), found = jax.value_and_grad(loss, has_aux=True)(jax.tree.map(jnp.asarray, PREDICTIONS))
        assert value == 0 and metrics["used"] == 0
        assert not np.any(found["policy"])


def test_a_step_that_draws_no_noise_does_not_count():
    solver = ddim(SCHEDULE, 20, eta=1.0, steps_offset=1, set_alpha_to_one=True)
    batch = {**batch_of("tailorpo"), "row": solver_rows(solver)}
    assert batch["row"].fresh_noise_coef[-1] == 0

    def loss(predictions):
        return TailorPO(beta=3.0, guidance_scale=S).loss(predict_with(predictions), batch, None)

    (_, metrics), found = jax.value_and_grad(loss, has_aux=True)(jax.tree.map(jnp.asarray, PREDICTIONS))
    assert metrics["used"] == pytest.approx(3 / 5)
    assert np.isfinite(found["policy"]).all() and not np.any(found["policy"][-1])


def test_metrics_tell_how_many_pairs_count_and_how_far_they_are_apart():
    undecided = dict.fromkeys(("base", "policy"), jnp.asarray(PREDICTIONS["base"]))
    method = TailorPO(beta=3.0, guidance_scale=S, margin=0.06)
    loss, metrics = method.loss(predict_with(undecided), batch_of("tailorpo"), None)
    assert float(loss) == pytest.approx(np.log(2), rel=1e-12)
    expected = {"loss": np.log(2), "accuracy": 0.5, "used": 3 / 5, "gap": 0.47, "reward": 0.445}
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected)


# ----------------------------------------------------------------------------------------------------------------------
# Policy gradients


def test_before_an_update_the_policy_gradient_is_that_of_the_advantages_and_nothing_is_clipped():
    same = dict.fromkeys(("base", "policy"), jnp.asarray(PREDICTIONS["base"]))
    loss, metrics = DDPO(guidance_scale=S).loss(predict_with(same), batch_of("ddpo"), None)
    assert float(loss) == pytest.approx(-np.clip(ADVANTAGE, -10, 10).mean(), rel=1e-6)
    assert metrics["clipped"] == 0


def test_advantages_compare_images_of_one_prompt():
    rewards = jnp.array([[1.0, 2.0, 3.0, 2.0], [101.0, 102.0, 103.0, 102.0], [5.0, 5.0, 5.0, 5.0]])
    found = np.asarray(advantages(rewards))
    np.testing.assert_allclose(found[0], [-np.sqrt(2), 0, np.sqrt(2), 0], atol=1e-12)
    np.testing.assert_allclose(found[1], found[0], atol=1e-9)
    np.testing.assert_array_equal(found[2], 0)


# ----------------------------------------------------------------------------------------------------------------------
# What networks are asked


@pytest.mark.parametrize(
    ("objective", "scale", "rows"),
    [(TailorPO, S, 2), (TailorPO, 1.0, 1), (D3PO, S, 4), (D3PO, 1.0, 2), (DDPO, S, 2)],
)
def test_a_step_is_one_prediction_of_the_policy_and_one_of_the_reference(objective, scale, rows):
    calls = []

    def predict(networks, latents, timesteps, text):
        calls.append(networks)
        return jnp.asarray(latents)

    method = objective.modules[0]
    options = {} if method == "ddpo" else {"beta": 1.0}
    objective(guidance_scale=scale, **options).loss(predict, batch_of(method), None)
    reference = [] if method == "ddpo" else [("base",) * rows]
    assert calls == [(method,) * rows, *reference]
