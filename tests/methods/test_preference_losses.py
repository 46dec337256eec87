"""Losses and gradients of every preference objective against transcriptions in float64, and of DPO against torch."""

import math
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import preference_formulas as formulas
import pytest
from preference_formulas import IMAGES, SCHEDULE, gradients, safeguards, squared_errors

from flax_pref.methods import (
    CHATS,
    DMPO,
    DSPO,
    KTO,
    NPO,
    SDPO,
    SNPO,
    DiffusionDPO,
    MaPO,
    PairMethod,
    PositiveNegative,
    PositiveNegativeDPO,
)
from flax_pref.methods.errors import LogisticMethod, draw_noise, preference_losses
from flax_pref.methods.mapo import likelihood

KEY = jax.random.key(7)
PAIRS, SHAPE = 6, (2, 2, 2)
TOLERANCE = 1e-6  # relative: of the loss, and of the largest gradient of a network
MU = 0.6
FAR = 1.0  # some pairs are farther from the reference, some are not


@pytest.fixture(autouse=True)
def float64(request):
    with jax.enable_x64(getattr(request, "param", True)):
        yield


def conditioned(latents):
    """A batch as SDXL's, whose `time_ids` tell which image a row is, and whose text is the pair's number."""
    number = np.arange(PAIRS, dtype=np.float32)
    return {
        **latents,
        "text": {"encoder_hidden_states": number[:, None, None], "text_embeds": number[:, None]},
        "time_ids": np.tile(np.float32([[0], [1]]), (PAIRS, 1, 6)),
    }


BATCH = conditioned({image: np.zeros((PAIRS, *SHAPE), np.float32) for image in IMAGES})
EMPTY = {"encoder_hidden_states": np.float32([[-1]]), "text_embeds": np.float32([-1])}


def known_noise():
    return np.asarray(draw_noise(SCHEDULE, BATCH["winner"], KEY)[1], np.float64)


def predictions_of(*networks, seed=0, spread=(0.2, 1.2)):
    """A prediction of every network for winner and loser of every pair, `[B, 2, H, W, C]`, none of them good.

    The quality differs from pair to pair, and from one to the next the residuals of winner and loser agree more.
    """
    rng = np.random.default_rng(seed)
    quality = rng.uniform(*spread, (len(networks), PAIRS, 2, 1, 1, 1))
    drawn = rng.standard_normal((len(networks), PAIRS, 2, *SHAPE))
    agreement = np.linspace(-0.9, 0.9, PAIRS)[:, None, None, None]
    drawn[:, :, 1] = agreement * drawn[:, :, 0] + np.sqrt(1 - agreement**2) * drawn[:, :, 1]
    return dict(zip(networks, known_noise()[:, None] + quality * drawn, strict=True))


def predict_with(predictions):
    """The rows that are asked for, found by what each row is told."""

    def predict(networks, latents, timesteps, text):
        image = text["time_ids"][:, :, 0].astype(int)
        rows = [predictions[name][jnp.arange(PAIRS), image[:, r]] for r, name in enumerate(networks)]
        return jnp.stack(rows, axis=1)

    return predict


def relative(found, expected):
    return float(np.max(np.abs(np.asarray(found) - expected)) / np.max(np.abs(found)))


def compare(objective, formula, predictions):
    """Relative errors of the loss and of the gradients of each network, of an objective against a formula."""

    def loss(predictions):
        return objective(predict_with(predictions), BATCH, KEY)[0]

    value, found = jax.value_and_grad(loss)(jax.tree.map(jnp.asarray, predictions))
    expected = gradients(formula, predictions)
    compared = {"loss": relative(value, formula(predictions).real)}
    for network, gradient in expected.items():
        if network == "base":
            assert not np.any(gradient) and not np.any(found["base"]), "the reference must get no gradient"
        else:
            compared[network] = relative(found[network], gradient)
    print({name: f"{error:.1e}" for name, error in compared.items()})
    return compared


def of_errors(formula):
    return lambda predictions: formula(squared_errors(predictions, known_noise()))


def sdpo(predictions, beta, alpha=0.0):
    predictions = {"base": predictions["base"], "dpo": predictions["sdpo"]}
    weights = safeguards(predictions, known_noise(), MU)
    return formulas.sdpo(squared_errors(predictions, known_noise()), beta, weights, alpha)


def swapped(share=0.5):
    return np.asarray(jax.random.bernoulli(jax.random.split(KEY)[1], share, (PAIRS,)))


CASES = {
    "positive and negative": (
        PositiveNegative().loss,
        of_errors(lambda error: error["pos", "winner"].mean() + error["neg", "loser"].mean()),
        ("pos", "neg"),
    ),
    "positive alone": (
        PositiveNegative(train="pos").loss,
        of_errors(lambda error: error["pos", "winner"].mean()),
        ("pos",),
    ),
    "negative alone": (
        PositiveNegative(train="neg").loss,
        of_errors(lambda error: error["neg", "loser"].mean()),
        ("neg",),
    ),
    "dpo": (DiffusionDPO(beta=3.0).loss, of_errors(partial(formulas.dpo, beta=3.0)), ("base", "dpo")),
    "sdpo": (SDPO(beta=3.0, mu=MU).loss, partial(sdpo, beta=3.0), ("base", "sdpo")),
    "npo": (NPO(beta=3.0).loss, of_errors(partial(formulas.swapped_dpo, beta=3.0)), ("base", "neg")),
    "dpo and npo": (
        PositiveNegativeDPO(beta=3.0).loss,
        of_errors(lambda error: formulas.dpo(error, "pos", 3.0) + formulas.swapped_dpo(error, 3.0)),
        ("base", "pos", "neg"),
    ),
    "chats": (
        partial(CHATS(beta=3.0).loss, empty=EMPTY),
        of_errors(partial(formulas.chats, beta=3.0)),
        ("base", "pos", "neg"),
    ),
    "snpo": (
        partial(SNPO(beta=3.0, mix=0.6).loss, empty=EMPTY),
        of_errors(lambda error: formulas.snpo(error, 3.0, 0.6, swapped(), SCHEDULE.num_train_timesteps)),
        ("base", "snpo"),
    ),
    "dspo": (
        DSPO(beta=0.7).loss,
        lambda predictions: formulas.dspo(predictions, known_noise(), 0.7),
        ("base", "dspo"),
    ),
    "dspo of sdxl": (
        DSPO(beta=3.0, form="margin", far=FAR).loss,
        lambda predictions: formulas.dspo_of_sdxl(predictions, known_noise(), 3.0, FAR),
        ("base", "dspo"),
    ),
    "dmpo": (
        DMPO(beta=3.0, alpha=0.05).loss,
        of_errors(partial(formulas.dmpo, beta=3.0, alpha=0.05)),
        ("base", "dmpo"),
    ),
    "poly dpo": (
        DiffusionDPO(beta=3.0, poly_alpha=8.0).loss,
        of_errors(partial(formulas.dpo, beta=3.0, alpha=8.0)),
        ("base", "dpo"),
    ),
    "poly dpo of easy data": (
        DiffusionDPO(beta=3.0, poly_alpha=-0.5).loss,
        of_errors(partial(formulas.dpo, beta=3.0, alpha=-0.5)),
        ("base", "dpo"),
    ),
    "poly sdpo": (
        SDPO(beta=3.0, mu=MU, poly_alpha=8.0).loss,
        partial(sdpo, beta=3.0, alpha=8.0),
        ("base", "sdpo"),
    ),
    "poly npo": (
        NPO(beta=3.0, poly_alpha=8.0).loss,
        of_errors(partial(formulas.swapped_dpo, beta=3.0, alpha=8.0)),
        ("base", "neg"),
    ),
    "poly dpo and npo": (
        PositiveNegativeDPO(beta=3.0, poly_alpha=8.0).loss,
        of_errors(
            lambda error: formulas.dpo(error, "pos", 3.0, 8.0) + formulas.swapped_dpo(error, beta=3.0, alpha=8.0)
        ),
        ("base", "pos", "neg"),
    ),
    "poly chats": (
        partial(CHATS(beta=3.0, poly_alpha=8.0).loss, empty=EMPTY),
        of_errors(partial(formulas.chats, beta=3.0, alpha=8.0)),
        ("base", "pos", "neg"),
    ),
    "poly snpo": (
        partial(SNPO(beta=3.0, mix=0.6, poly_alpha=8.0).loss, empty=EMPTY),
        of_errors(lambda error: formulas.snpo(error, 3.0, 0.6, swapped(), SCHEDULE.num_train_timesteps, 8.0)),
        ("base", "snpo"),
    ),
    "kto": (KTO(beta=3.0).loss, of_errors(partial(formulas.kto, beta=3.0)), ("base", "kto")),
    "mapo": (MaPO(beta=0.1).loss, of_errors(partial(formulas.mapo, beta=0.1)), ("mapo",)),
}


# The formulas themselves in float64, and what rounding leaves of them in the float32 that training computes in.
@pytest.mark.parametrize(
    ("float64", "tolerance"), [(True, TOLERANCE), (False, 1e-5)], ids=["float64", "float32"], indirect=["float64"]
)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_formula(case, float64, tolerance):
    objective, formula, networks = CASES[case]
    if case.endswith(("chats", "snpo")):  # noise and dropout have keys of their own
        objective = with_key_of_noise(objective)
    compared = compare(partial(objective, schedule=SCHEDULE), formula, predictions_of(*networks))
    assert max(compared.values()) < tolerance


def with_key_of_noise(objective):
    """An objective that draws noise with a part of the key, given predictions as if it were the noise that is known."""

    def with_known_noise(predict, batch, key, **options):
        noise_key, _ = jax.random.split(key)
        known, drawn = (draw_noise(SCHEDULE, BATCH["winner"], k)[1] for k in (key, noise_key))

        def shifted(networks, latents, timesteps, text):
            return predict(networks, latents, timesteps, text) - known[:, None] + drawn[:, None]

        return objective(shifted, batch, key, **options)

    return with_known_noise


def test_the_data_has_pairs_of_every_kind_that_the_safeguard_tells_apart():
    weights = safeguards(predictions_of("base", "dpo"), known_noise(), MU)
    assert (weights == 1).any() and ((weights > 0) & (weights < 0.9)).any()


def test_the_data_has_pairs_on_either_side_of_what_is_far_for_dspo():
    predictions = predictions_of("base", "dspo")
    distances = ((predictions["dspo"] - predictions["base"])[:, 0] ** 2).mean(axis=(1, 2, 3))
    assert (distances > FAR).any() and (distances < FAR).any()


@pytest.mark.parametrize(("spread", "positive"), [((0.1, 0.3), True), ((2.0, 3.0), False)])
def test_kto_judges_against_the_mean_but_never_below_zero(spread, positive):
    predictions = predictions_of("base") | predictions_of("kto", seed=1, spread=spread)
    objective = partial(KTO(beta=3.0).loss, schedule=SCHEDULE)
    compared = compare(objective, of_errors(partial(formulas.kto, beta=3.0)), predictions)
    assert max(compared.values()) < TOLERANCE
    baseline = float(objective(predict_with(predictions), BATCH, KEY)[1]["baseline"])
    assert (baseline > 0) == positive


def test_the_safeguard_changes_gradients_and_not_the_loss():
    predictions = jax.tree.map(jnp.asarray, predictions_of("base", "dpo"))

    def both(method):
        value, gradient = jax.value_and_grad(
            lambda predictions: method.loss(predict_with(predictions), BATCH, KEY, schedule=SCHEDULE)[0]
        )(predictions)
        return float(value), gradient[method.modules[0]]

    predictions["sdpo"] = predictions["dpo"]
    (plain, gradient), (guarded, guarded_gradient) = both(DiffusionDPO(beta=3.0)), both(SDPO(beta=3.0, mu=MU))
    assert guarded == pytest.approx(plain, rel=1e-12)
    np.testing.assert_allclose(guarded_gradient[:, 0], gradient[:, 0], rtol=1e-12, err_msg="winners")
    weights = safeguards(predictions_of("base", "dpo"), known_noise(), MU)
    np.testing.assert_allclose(guarded_gradient[:, 1], weights[:, None, None, None] * gradient[:, 1], rtol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes that the comparison finds


@pytest.mark.parametrize("wrong", [formulas.dpo_with_the_mean_inside, formulas.dpo_with_a_clipped_ratio])
def test_a_known_mistake_would_be_found(wrong):
    objective = partial(DiffusionDPO(beta=3.0).loss, schedule=SCHEDULE)
    compared = compare(objective, of_errors(partial(wrong, beta=3.0)), predictions_of("base", "dpo"))
    assert min(compared.values()) > 1000 * TOLERANCE, "loss and gradient both tell"


def test_no_pair_loses_its_gradient_however_far_it_is_from_the_reference():
    predictions = jax.tree.map(jnp.asarray, predictions_of("base", "dpo"))
    error = squared_errors(predictions_of("base", "dpo"), known_noise())
    logits = formulas.dpo_logits(error, "dpo", 3.0)
    assert (abs(logits) > 0.1).sum() >= PAIRS // 2, "data where clipping at 0.1 would do harm"

    def loss(predictions):
        return DiffusionDPO(beta=3.0).loss(predict_with(predictions), BATCH, KEY, schedule=SCHEDULE)[0]

    assert (jnp.abs(jax.grad(loss)(predictions)["dpo"]).max(axis=(2, 3, 4)) > 1e-6).all()


# ----------------------------------------------------------------------------------------------------------------------
# What docstrings say of the losses

LOGITS = np.array([-300.0, -2.0, 0.0, 0.5, 3.0, 300.0])
LOGISTIC = {
    **{"dpo": DiffusionDPO, "sdpo": partial(SDPO, mu=MU), "npo": NPO, "dpo and npo": PositiveNegativeDPO},
    **{"chats": CHATS, "snpo": SNPO},
}


def test_every_method_with_a_logistic_loss_is_compared_with_the_formula_of_poly_dpo():
    assert {type(make()) for make in LOGISTIC.values()} == {
        kind for kind in PairMethod.__subclasses__() + DiffusionDPO.__subclasses__() if issubclass(kind, LogisticMethod)
    }
    assert all(f"poly {name}" in CASES for name in LOGISTIC)


@pytest.mark.parametrize("name", LOGISTIC)
def test_without_its_term_poly_dpo_is_the_loss_of_the_method_to_the_bit(name, monkeypatch):
    method, (_, _, networks) = LOGISTIC[name](beta=3.0), CASES[name]
    predictions = jax.tree.map(jnp.asarray, predictions_of(*networks))

    def value_and_gradient():
        options = {"schedule": SCHEDULE, "empty": EMPTY}
        return jax.value_and_grad(lambda x: method.loss(predict_with(x), BATCH, KEY, **options)[0])(predictions)

    found = value_and_gradient()
    plain = lambda logits, poly_alpha: -jax.nn.log_sigmoid(logits).mean()  # noqa: E731
    monkeypatch.setattr(sys.modules[type(method).__module__], "logistic_loss", plain)
    assert method.poly_alpha == 0
    jax.tree.map(np.testing.assert_array_equal, found, value_and_gradient())


@pytest.mark.parametrize("alpha", [8.0, -0.5, -3.0])
def test_poly_dpo_weighs_the_gradient_of_a_pair_by_its_probability(alpha):
    logits, probability = jnp.asarray(LOGITS), formulas.sigmoid(LOGITS)
    slopes = jax.grad(lambda logits: preference_losses(logits, alpha).sum())(logits)
    np.testing.assert_allclose(slopes, -(1 - probability) * (1 + alpha * probability), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.001, 0.5, 3.0])
def test_the_first_gradient_of_dspo_is_a_multiple_of_that_of_denoising_winners(beta):
    base = predictions_of("base")["base"]
    method = DSPO(beta=min(beta, 1.0))
    object.__setattr__(method, "beta", beta)  # from 2 on it is refused, for what is shown here

    def loss(module):
        predict = predict_with({"base": jnp.asarray(base), "dspo": module})
        return method.loss(predict, BATCH, KEY, schedule=SCHEDULE)[0]

    winners = 2 * (base[:, 0] - known_noise()) / base[:, 0].size
    found = jax.grad(loss)(jnp.asarray(base))
    np.testing.assert_allclose(found[:, 0], (1 - beta / 2) * winners, rtol=1e-9, atol=1e-12)
    assert not np.any(found[:, 1])


def test_the_divergence_of_dmpo_is_least_at_the_log_odds_of_the_labels_and_finite_everywhere():
    alpha = 0.01
    method, odds = DMPO(alpha=alpha), math.log((1 - alpha) / alpha)
    logits, probability = jnp.asarray([*LOGITS, odds]), formulas.sigmoid(np.array([*LOGITS, odds]))
    values = method.divergence(logits)
    slopes = jax.grad(lambda logits: method.divergence(logits).sum())(logits)
    assert odds == pytest.approx(4.6, abs=0.01) and float(values[-1]) == pytest.approx(0, abs=1e-15)
    assert np.isfinite(values).all() and (values[:-1] > 0).all()
    np.testing.assert_allclose(slopes, probability * (1 - probability) * (logits - odds), rtol=1e-9, atol=1e-12)
    with jax.enable_x64(False):
        assert np.isfinite(jax.grad(lambda u: method.divergence(u).sum())(jnp.float32([-1e4, 1e4]))).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (partial(make, poly_alpha=math.nan), "poly_alpha is nan; expected a finite number")
            for make in LOGISTIC.values()
        ),
        (lambda: DiffusionDPO(poly_alpha=-math.inf), "DiffusionDPO: poly_alpha is -inf; expected a finite number"),
        (lambda: DSPO(beta=0.0), "DSPO: beta is 0.0; expected a positive number"),
        (lambda: DSPO(beta=5000.0), "DSPO: beta is 5000.0; expected less than 2 in the form 'denoising', or"),
        (lambda: DSPO(form="sdxl"), "DSPO: form is 'sdxl'; expected 'denoising' or 'margin'"),
        (lambda: DSPO(far=math.inf), "DSPO: far is inf; expected a positive number"),
        (lambda: DMPO(beta=-1.0), "DMPO: beta is -1.0; expected a positive number"),
        (lambda: DMPO(alpha=0.0), "DMPO: alpha is 0.0; expected above 0 and below 0.5"),
        (lambda: DMPO(alpha=0.5), "DMPO: alpha is 0.5; expected above 0 and below 0.5"),
    ],
)
def test_a_number_that_makes_no_sense_is_one_line(make, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make()
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# torch


def torch_dpo(policy, reference, noise, beta):
    """Diffusion-DPO as a training script for torch would have it: winners first, then losers."""
    torch = pytest.importorskip("torch")
    target = torch.cat([noise, noise])

    def margins(predicted):
        each = torch.nn.functional.mse_loss(predicted, target, reduction="none").flatten(1).mean(dim=1)
        return each[: len(noise)] - each[len(noise) :]

    with torch.no_grad():
        of_reference = margins(reference)
    return -torch.nn.functional.logsigmoid(-0.5 * beta * (margins(policy) - of_reference)).mean()


@pytest.mark.parametrize("beta", [3.0, 5000.0])
def test_dpo_is_that_of_torch_on_the_same_tensors(beta):
    torch = pytest.importorskip("torch")
    # As close to the reference as policies are at the beta of the authors' code.
    predictions = predictions_of("base", "dpo")
    predictions["dpo"] = predictions["base"] + (3 / beta) * (predictions["dpo"] - predictions["base"])
    policy, reference = (
        torch.from_numpy(np.moveaxis(predictions[name], 1, 0).reshape(-1, *SHAPE).copy()) for name in ("dpo", "base")
    )
    policy.requires_grad_()
    expected = torch_dpo(policy, reference, torch.from_numpy(known_noise().copy()), beta)
    expected.backward()

    def loss(policy):
        predict = predict_with({"base": jnp.asarray(predictions["base"]), "dpo": policy})
        return DiffusionDPO(beta=beta).loss(predict, BATCH, KEY, schedule=SCHEDULE)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(predictions["dpo"]))
    of_torch = np.moveaxis(policy.grad.numpy().reshape(2, PAIRS, *SHAPE), 0, 1)
    compared = {"loss": relative(value, expected.item()), "gradient": relative(gradient, of_torch)}
    print({name: f"{error:.1e}" for name, error in compared.items()})
    assert max(compared.values()) < TOLERANCE


# ----------------------------------------------------------------------------------------------------------------------
# Before any training


@pytest.mark.parametrize(
    ("objective", "loss"),
    [
        (DiffusionDPO(beta=5000.0).loss, np.log(2)),
        (SDPO(beta=5000.0, mu=MU).loss, np.log(2)),
        (NPO(beta=4000.0).loss, np.log(2)),
        (PositiveNegativeDPO(beta=5000.0).loss, 2 * np.log(2)),
        (partial(CHATS(beta=1000.0).loss, empty=EMPTY), np.log(2)),
        (partial(SNPO(beta=2000.0).loss, empty=EMPTY), np.log(2)),
        (KTO(beta=1000.0).loss, 0.5),
        (DiffusionDPO(beta=5000.0, poly_alpha=8.0).loss, np.log(2) + 4),
        (DSPO(beta=0.001).loss, "the winner's error"),
        (DSPO(beta=5000.0, form="margin").loss, 0.25),
        (DMPO(beta=2000.0, alpha=0.01).loss, -np.log(4 * 0.01 * 0.99) / 2),
    ],
    ids=["dpo", "sdpo", "npo", "dpo and npo", "chats", "snpo", "kto", "poly dpo", "dspo", "dspo of sdxl", "dmpo"],
)
def test_an_untrained_module_is_undecided(objective, loss):
    base = predictions_of("base")["base"]
    if isinstance(loss, str):
        loss = squared_errors({"base": base}, known_noise())["base", "winner"].mean()
    modules = ("dpo", "sdpo", "pos", "neg", "snpo", "kto", "dspo", "dmpo")
    same = dict.fromkeys(("base", *modules), jnp.asarray(base))
    found, metrics = objective(predict_with(same), BATCH, KEY, schedule=SCHEDULE)
    assert float(found) == pytest.approx(loss, rel=1e-12)
    decided = {name: float(value) for name, value in metrics.items() if name.endswith("accuracy")}
    assert decided and set(decided.values()) == {0.5}
    changes = [float(value) for name, value in metrics.items() if name.endswith(("winner", "loser"))]
    assert changes and not any(changes)


# ----------------------------------------------------------------------------------------------------------------------
# What networks are asked and told


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_one_prediction_of_the_modules_and_one_of_the_reference(case):
    objective, _, networks = CASES[case]
    calls = []

    def predict(networks, latents, timesteps, text):
        calls.append(networks)
        return latents

    objective(predict, BATCH, KEY, schedule=SCHEDULE)
    modules = {network for network in networks if network != "base"}
    assert set(calls[0]) == modules
    assert calls[1:] == ([("base", "base")] if "base" in networks else [])


def test_chats_drops_prompts_of_losers_for_the_negative_module_and_the_reference_alike():
    calls = []

    def predict(networks, latents, timesteps, text):
        calls.append((networks, {name: np.asarray(x) for name, x in text.items()}))
        return latents

    CHATS(beta=1.0).loss(predict, BATCH, KEY, schedule=SCHEDULE, empty=EMPTY)
    assert [networks for networks, _ in calls] == [("pos", "neg"), ("base", "base")]
    (_, told), (_, told_reference) = calls
    dropped = told["text_embeds"][:, 1, 0] == -1
    assert 0 < dropped.sum() < PAIRS
    for name in ("encoder_hidden_states", "text_embeds"):
        winner, loser = (told[name].reshape(PAIRS, 2)[:, i] for i in (0, 1))
        np.testing.assert_array_equal(winner, np.arange(PAIRS), err_msg="winners keep their prompts")
        np.testing.assert_array_equal(loser, np.where(dropped, -1, np.arange(PAIRS)))
        np.testing.assert_array_equal(told[name], told_reference[name])
    np.testing.assert_array_equal(told["time_ids"], BATCH["time_ids"], err_msg="sizes are no prompt")


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0), (1.0, 1)])
def test_chats_drops_the_share_of_prompts_that_is_asked_for(dropout, share):
    def predict(networks, latents, timesteps, text):
        assert (np.asarray(text["text_embeds"])[:, 1] == -1).mean() == share
        return latents

    CHATS(beta=1.0, dropout=dropout).loss(predict, BATCH, KEY, schedule=SCHEDULE, empty=EMPTY)


def test_snpo_teaches_the_empty_prompt_with_labels_swapped():
    told = []

    def predict(networks, latents, timesteps, text):
        told.append(np.asarray(text["text_embeds"])[..., 0])
        return latents

    SNPO(beta=1.0).loss(predict, BATCH, KEY, schedule=SCHEDULE, empty=EMPTY)
    assert 0 < swapped().sum() < PAIRS
    for text in told:  # of the module and of the reference
        np.testing.assert_array_equal(text, np.where(swapped(), -1, np.arange(PAIRS))[:, None].repeat(2, axis=1))


def test_snpo_of_the_module_alone_is_dpo_and_a_loser_counts_up_to_its_bound():
    predictions = {name: jnp.asarray(x) for name, x in predictions_of("base", "snpo").items()}
    options = {"schedule": SCHEDULE, "empty": EMPTY}
    found, _ = SNPO(beta=3.0, mix=1.0, dropout=0.0).loss(predict_with(predictions), BATCH, KEY, **options)
    noise_key = jax.random.split(KEY)[0]
    same = {"base": predictions["base"], "dpo": predictions["snpo"]}
    expected, _ = DiffusionDPO(beta=3.0).loss(predict_with(same), BATCH, noise_key, schedule=SCHEDULE)
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    bound = SNPO(mix=0.9).bounded(jnp.array([1e-6, 1e3]), 1000)
    assert bound.tolist() == pytest.approx([0.9e-6, -np.log(0.1) / 1000], rel=1e-3)


def test_the_score_of_mapo_does_not_overflow_where_training_has_diverged():
    score, slope = jax.value_and_grad(likelihood)(jnp.float32(500.0))
    assert float(score) == 0 and float(slope) == 0
    assert float(likelihood(jnp.float32(1e-6))) == pytest.approx(1, rel=1e-6)


def test_no_module_to_train_is_an_error():
    with pytest.raises(ValueError, match="train is 'none'; expected 'both', 'pos' or 'neg'"):
        PositiveNegative(train="none")
