"""The rules of pipeline.py as a guider of modular pipelines of diffusers 0.41 and 0.42, an interface that may change.

    sys.path.insert(0, DIR)
    from guider import PreferenceGuider

    pipeline = StableDiffusionXLAutoBlocks().init_pipeline(BASE)
    pipeline.load_components()
    pipeline.update_components(guider=PreferenceGuider.load(DIR, pipeline.unet))

A modular pipeline predicts with one UNet, as often as its guider asks, and the guider may prepare that UNet before each
prediction: so modules are LoRA, switched in turns.
"""

import json
from pathlib import Path

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from pipeline import Guidance


class PreferenceGuider(BaseGuidance):
    """A rule with LoRA modules, which the UNet has as adapters `module_NAME`.

    Args:
        rule: settings of `Guidance`.
    """

    _input_predictions = []  # noqa: RUF012

    @register_to_config
    def __init__(self, rule, enabled=True):
        super().__init__(enabled=enabled)
        self.rule, self.guidance, self.rows = rule, None, []

    @classmethod
    def load(cls, folder, unet):
        """The guider of an exported folder, whose LoRA modules it adds to a UNet."""
        networks = json.loads((Path(folder) / "networks" / "networks.json").read_text())
        if networks["unets"]:
            raise ValueError(f"{folder}: {networks['unets'][0]} has full weights; a guider takes LoRA modules only")
        for name in networks["lora"]:
            place = {"subfolder": name, "weight_name": "model.safetensors"}
            unet.load_lora_adapter(str(Path(folder) / "networks"), **place, prefix="unet", adapter_name=name)
        return cls(json.loads((Path(folder) / "model_index.json").read_text())["rule"])

    def set_state(self, step, num_inference_steps, timestep):
        """Begins a step."""
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            self.guidance = Guidance(self.rule, num_inference_steps)
        self.rows = self.guidance.rows(step)

    def prepare_inputs(self, data):
        """One batch for each prediction; an input is a pair, for the prompts "text" and "empty"."""
        place = {"text": 0, "empty": 1}
        return [self._prepare_batch(data, place[prompt], f"{network} {prompt}") for network, prompt in self.rows]

    def prepare_models(self, denoiser):
        """Makes the UNet the network of the next prediction."""
        network, _ = self.rows[self._count_prepared]
        super().prepare_models(denoiser)
        if network != "base":
            denoiser.set_adapters(f"module_{network}")
        elif hasattr(denoiser, "peft_config"):
            denoiser.disable_adapters()

    def cleanup_models(self, denoiser):
        """Undoes `prepare_models`."""
        if hasattr(denoiser, "peft_config"):
            denoiser.enable_adapters()

    def forward(self, **predictions):
        """The guided prediction of the step."""
        first = next(iter(predictions.values()))
        named = {tuple(name.split(" ")): prediction.float() for name, prediction in predictions.items()}
        return GuiderOutput(pred=self.guidance.combine(self._step, named).to(first.dtype))

    @property
    def is_conditional(self):
        """Whether the prediction that is made sees the text."""
        return self.rows[self._count_prepared - 1][1] == "text"

    @property
    def num_conditions(self):
        """How many predictions the step needs; before the first step, that prompts of both kinds are encoded."""
        return len(self.rows) or 2
