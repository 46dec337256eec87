"""The guidance rules, each beside a transcription of its formula in which nothing of ours takes part."""

from flax_pref.diffusion.guidance import autoguidance, cfg, chats, cpgd, cpgd_conditional, multi, npo, pgd

W, S, A = 2.0, 3.0, 0.4


def cfg_of(eps, network, s):
    return (1 - s) * eps(network, "empty") + s * eps(network, "text")


# name: (rule, formula of (eps, w, s)), where eps(network, prompt) is a prediction.
RULES = {
    "cfg": (lambda w, s, **o: cfg(s, **o), lambda eps, w, s: cfg_of(eps, "base", s)),
    "fine-tuned": (lambda w, s, **o: cfg(s, "dpo", **o), lambda eps, w, s: cfg_of(eps, "dpo", s)),
    "pgd": (pgd, lambda eps, w, s: (1 - w) * cfg_of(eps, "base", s) + w * cfg_of(eps, "dpo", s)),
    "pgd of another base": (
        lambda w, s, **o: pgd(w, s, "dpo", reference="neg", **o),
        lambda eps, w, s: cfg_of(eps, "base", s) + w * (cfg_of(eps, "dpo", s) - cfg_of(eps, "neg", s)),
    ),
    "cpgd": (cpgd, lambda eps, w, s: cfg_of(eps, "base", s) + w * (cfg_of(eps, "pos", s) - cfg_of(eps, "neg", s))),
    "cpgd, a strength for each module": (
        lambda w, s, **o: cpgd({"pos": w, "neg": 0.7}, s, **o),
        lambda eps, w, s: (
            cfg_of(eps, "base", s)
            + w * (cfg_of(eps, "pos", s) - cfg_of(eps, "base", s))
            + 0.7 * (cfg_of(eps, "base", s) - cfg_of(eps, "neg", s))
        ),
    ),
    "cpgd conditional": (
        cpgd_conditional,
        lambda eps, w, s: cfg_of(eps, "base", s) + w * (eps("pos", "text") - eps("neg", "text")),
    ),
    "positive only": (
        lambda w, s, **o: cpgd(w, s, negative="base", **o),
        lambda eps, w, s: cfg_of(eps, "base", s) + w * (cfg_of(eps, "pos", s) - cfg_of(eps, "base", s)),
    ),
    "negative only": (
        lambda w, s, **o: cpgd(w, s, positive="base", **o),
        lambda eps, w, s: cfg_of(eps, "base", s) + w * (cfg_of(eps, "base", s) - cfg_of(eps, "neg", s)),
    ),
    "npo": (lambda w, s, **o: npo(s, **o), lambda eps, w, s: (1 - s) * eps("neg", "empty") + s * eps("pos", "text")),
    "chats": (
        lambda w, s, **o: chats(s, proxy=A, **o),
        # With the paper's scale s' = s - 1.
        lambda eps, w, s: (1 + (s - 1)) * eps("pos", "text") - (s - 1) * eps("neg", "proxy"),
    ),
    "multi": (
        lambda w, s, **o: multi({"dpo": w, "pos": 0.7}, s, **o),
        lambda eps, w, s: (
            cfg_of(eps, "base", s)
            + w * (cfg_of(eps, "dpo", s) - cfg_of(eps, "base", s))
            + 0.7 * (cfg_of(eps, "pos", s) - cfg_of(eps, "base", s))
        ),
    ),
    "autoguidance": (
        lambda w, s, **o: autoguidance(w, "base", "neg", **o),
        lambda eps, w, s: eps("neg", "text") + w * (eps("base", "text") - eps("neg", "text")),
    ),
}
