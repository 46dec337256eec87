"""The whole path on the demo world: pairs, labels, DPO, positive and negative modules, choice of w, comparison.

    python -m train.demo configs/demo/demo.py

Writes runs/demo/report.html.
"""

from flax_pref.demo.experiment import DemoConfig, ModuleTraining

config = DemoConfig(
    pairs=512,
    sampling_steps=12,
    guidance_scale=3.0,
    label_temperature=0.05,
    rank=16,
    alpha=16.0,
    beta=500.0,
    dpo=ModuleTraining(steps=200, batch_size=32, learning_rate=1e-3),
    positive_negative=ModuleTraining(steps=200, batch_size=32, learning_rate=1e-3),
    w_pgd=(1.0, 1.5, 2.0, 3.0, 4.0),
    w_cpgd=(0.5, 1.0, 2.0, 3.0, 4.0),
    validation_prompts=64,
    held_out_prompts=128,
    train_prompts=128,
)
