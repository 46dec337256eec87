"""The losses of all objectives in float64 numpy, written from the papers, and their derivatives.

A loss is a function of `error[network, image] [B]`, denoising errors. Derivatives are those along the imaginary axis,
`f'(x) = Im f(x + ih) / h`, which has no cancellation: errors may be complex, and what is constant in a loss is a real
part.
"""

import numpy as np

from flax_pref.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
IMAGES = ("winner", "loser")


def squared_errors(predictions, noise):
    """`error[network, image]` of `predictions[network] [B, 2, H, W, C]` (winner, loser) and `noise [B, H, W, C]`."""
    return {
        (network, image): ((prediction[:, i] - noise) ** 2).mean(axis=(1, 2, 3))
        for network, prediction in predictions.items()
        for i, image in enumerate(IMAGES)
    }


def gradients(loss, predictions):
    """Of `loss(predictions)` with respect to each number of the predictions, as a dict of arrays like them."""
    found = {}
    for network, prediction in predictions.items():
        found[network] = np.zeros_like(prediction)
        for place in np.ndindex(prediction.shape):
            moved = prediction.astype(complex)
            moved[place] += 1e-30j
            found[network][place] = loss({**predictions, network: moved}).imag / 1e-30
    return found


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def change(error, network, image):
    return error[network, image] - error["base", image].real  # the reference is a constant


def dpo_logits(error, network, beta):
    return -beta / 2 * (change(error, network, "winner") - change(error, network, "loser"))


def poly(logits, alpha):
    """As Poly-DPO's authors write it, with the probability that the winner is preferred."""
    probability = sigmoid(logits)
    return (-np.log(probability) + alpha * (1 - probability)).mean()


def dpo(error, network="dpo", beta=1.0, alpha=0.0):
    return poly(dpo_logits(error, network, beta), alpha)


def swapped_dpo(error, beta, network="neg", alpha=0.0):
    # As its authors write it, without the factor 1/2 and so with half the beta.
    return poly((beta / 2) * (-change(error, network, "loser") + change(error, network, "winner")), alpha)


def safeguards(predictions, noise, mu):
    """lambda of each pair, from the gradients of the two errors."""
    found = []
    for prediction, own_noise in zip(predictions["dpo"].real, noise, strict=True):
        gradient_winner, gradient_loser = (2 * (row - own_noise).ravel() / own_noise.size for row in prediction)
        product = gradient_winner @ gradient_loser
        bound = (1 - mu) * (gradient_winner @ gradient_winner) / product
        found.append(min(max(bound, 0), 1) if product > 0 else 1)
    return np.array(found)


def sdpo(error, beta, weights, alpha=0.0):
    loser = error["dpo", "loser"]
    scaled = loser.real + weights * (loser - loser.real)
    return dpo({**error, ("dpo", "loser"): scaled}, beta=beta, alpha=alpha)


def snpo(error, beta, mix, swapped, timesteps, alpha=0.0):
    first, second = (change(error, "snpo", image) for image in ("winner", "loser"))
    winner, loser = np.where(swapped, second, first), np.where(swapped, first, second)
    # -log(mix exp(-T x) + 1 - mix) / T, with an exponent that is never above 0.
    rises = loser.real > 0
    small = np.exp(-timesteps * np.where(rises, loser, -loser))
    bounded = (
        np.where(rises, -np.log(mix * small + 1 - mix), timesteps * loser - np.log(mix + (1 - mix) * small)) / timesteps
    )
    return poly(-beta / 2 * (winner - bounded), alpha)


def chats(error, beta, alpha=0.0):
    return poly(-beta * (change(error, "pos", "winner") + change(error, "neg", "loser")), alpha)


def dspo(predictions, noise, beta):
    wrong = 1 - sigmoid(dpo_logits(squared_errors(predictions, noise), "dspo", beta))
    winner = predictions["dspo"][:, 0]
    from_reference = winner - predictions["base"][:, 0].real
    return (((winner - noise) - beta * wrong[:, None, None, None] * from_reference) ** 2).mean()


def dspo_of_sdxl(predictions, noise, beta, far):
    wrong = 1 - sigmoid(dpo_logits(squared_errors(predictions, noise), "dspo", beta))
    each = []
    for weight, (winner, _), (reference, _) in zip(wrong, predictions["dspo"], predictions["base"].real, strict=True):
        distance = ((winner - reference) ** 2).mean()
        each.append(weight**2 * distance if distance.real >= far else weight**2)
    return np.mean(each)


def dmpo(error, beta, alpha):
    """KL(model || labels) of the two outcomes: the winner is preferred, or the loser."""
    probability = sigmoid(dpo_logits(error, "dmpo", beta))
    of_model, of_labels = (probability, 1 - probability), (1 - alpha, alpha)
    return sum(x * (np.log(x) - np.log(y)) for x, y in zip(of_model, of_labels, strict=True)).mean()


def kto(error, beta):
    gains = np.stack([-change(error, "kto", image) for image in IMAGES])
    baseline = max(gains.real.mean(), 0)
    signs = np.array([[1], [-1]])
    return (1 - sigmoid(signs * beta * (gains - baseline))).mean()


def mapo(error, beta, h=0.5, timesteps=1000):
    winner, loser = (error["mapo", image] for image in IMAGES)
    score_winner, score_loser = (h * x / (np.exp(h * x) - 1) for x in (winner, loser))
    # log sigmoid(x) = -log(1 + exp(-x)), where exp may overflow only for x far below zero.
    return (winner + beta * np.log(1 + np.exp(-timesteps * (score_winner - score_loser)))).mean()


# ----------------------------------------------------------------------------------------------------------------------
# What scripts got wrong


def dpo_with_the_mean_inside(error, beta):
    return -np.log(sigmoid(dpo_logits(error, "dpo", beta).mean()))


def dpo_with_a_clipped_ratio(error, beta, largest=0.5):
    logits = dpo_logits(error, "dpo", beta)
    return -np.log(sigmoid(np.where(abs(logits.real) > largest, largest * np.sign(logits.real), logits))).mean()
