"""When does contrastive guidance pay? The demo's settings, one of them varied at a time, with three training seeds.

    python -m train.study configs/demo/study.py

Writes runs/study/evidence.md, and measurements and figures beside it; `make study` writes docs/evidence.md. Hours on
two CPU cores, in as many pieces as you like: a cell that is in the table is not computed again.
"""

import dataclasses

from flax_pref.config import shipped_config
from flax_pref.demo.online import CALLS, ONLINE, PREDICTIONS, Budget
from flax_pref.demo.study import OFFLINE, OFFLINE_TUNING, TUNING, Cell, StudyConfig

METHODS = ("base", "tuned CFG", "DPO", "PGD", "cPGD")
MERGED = ("PGD, merged", "cPGD, merged")
NORMS = ("PGD, norm-matched", "cPGD, norm-matched")
ALL = (
    *METHODS,
    *("DPO, tuned CFG", "CFG, 3 times the steps", "base, best of 3", "pos - base", "base - neg"),
    *("cPGD of a DPO pair", "CHATS", "SNPO"),
    *(*MERGED, "cPGD, full weights"),
    *("cPGD, early", "cPGD, late", "cPGD, prompt only", "preset light", "preset late"),
    *(*NORMS, "cPGD, capped", "cPGD, orthogonal"),
)
OFFLINE_WAYS = ("base", *(f"offline {name}" for name in OFFLINE))
WRONG_LABELS = {  # temperatures at which so many of the labels disagree with the judge
    "offline, no wrong labels": 0.0001,
    "offline, 10 % wrong labels": 0.058,
    "offline, 30 % wrong labels": 0.305,
}
ONLINE_WAYS = [f"{name}, {budget}" for budget in (CALLS, PREDICTIONS) for name in ONLINE]

config = StudyConfig(
    demo=dataclasses.replace(
        shipped_config("demo/demo"), tuned_scales=(1.0, 1.5, 2.0, 3.0, 4.0, 6.0), train_prompts=64
    ),
    w=(0.5, 1.0, 2.0, 3.0, 4.0, 6.0),
    seeds=(0, 1, 2),
    takes="the whole grid takes about nine hours on two cores of an AMD EPYC, added up from cells measured one by one",
    cells=(
        Cell(name="main", ways=ALL, held_out_prompts=512, every_strength=("base", "PGD", "cPGD")),
        Cell(name="64 pairs", pairs=64, ways=METHODS, held_out_prompts=256),
        Cell(name="256 pairs", pairs=256, ways=METHODS, held_out_prompts=256),
        Cell(name="2048 pairs", pairs=2048, ways=METHODS, held_out_prompts=256),
        Cell(name="4096 pairs", pairs=4096, ways=METHODS, held_out_prompts=256),
        Cell(name="half the training", training=0.5, ways=(*METHODS, *MERGED, *NORMS), held_out_prompts=256),
        Cell(name="twice the training", training=2.0, ways=(*METHODS, *MERGED, *NORMS), held_out_prompts=256),
        Cell(name="4 times the training", training=4.0, ways=(*METHODS, *MERGED, *NORMS), held_out_prompts=256),
        Cell(name="labels without noise", label_temperature=0.001, ways=METHODS, held_out_prompts=256),
        Cell(name="noisy labels", label_temperature=0.2, ways=METHODS, held_out_prompts=256),
        Cell(name="several pairs of a prompt", images=4, ways=METHODS, held_out_prompts=256),
        Cell(name="several pairs, roles unique", images=4, unique_roles=True, ways=METHODS, held_out_prompts=256),
        Cell(name="pairs of the base", generators=("base",), ways=METHODS, held_out_prompts=256),
        Cell(name="pairs of one generator", generators=("faulty",), ways=METHODS, held_out_prompts=256),
        Cell(name="offline tuning", seeds=1, ways=("base", *OFFLINE_TUNING), held_out_prompts=64),
        *(
            Cell(name=name, label_temperature=temperature, ways=OFFLINE_WAYS, held_out_prompts=256)
            for name, temperature in WRONG_LABELS.items()
        ),
        Cell(name="online tuning", budget=Budget(0, 20_000), seeds=1, ways=("base", *TUNING), held_out_prompts=64),
        Cell(
            name="online",
            budget=Budget(2_000, 30_000),
            ways=("base", *ONLINE_WAYS),
            held_out_prompts=256,
            every_strength=("base", *ONLINE_WAYS),
        ),
    ),
)
