"""Nodes for ComfyUI: preference modules (arXiv:2602.18799) guide Stable Diffusion 1.5 and XL.

To install, copy this folder to ComfyUI/custom_nodes/preference_guidance and restart ComfyUI. The template browser then
shows the workflow in example_workflows/. The nodes need nothing that ComfyUI does not need itself. flax_pref wrote this
folder and docs/integrations.md describes it. Licence: Apache-2.0.
"""

from .nodes import ContrastiveGuidance, LoadPreferenceModules

NODE_CLASS_MAPPINGS = {
    "LoadPreferenceModules": LoadPreferenceModules,
    "ContrastiveGuidance": ContrastiveGuidance,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadPreferenceModules": "Load preference modules",
    "ContrastiveGuidance": "Contrastive guidance",
}
