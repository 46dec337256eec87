"""The nodes: LoRA files become modules, and the predictions of a model are combined with those of its modules."""

import folder_paths
import torch

from .guidance import RULES, Guidance, parse_strengths
from .modules import Predictor, check_fit, load_module

NONE = "none"
NAMES = [name for name in RULES if name != "cfg"]  # which is what ComfyUI does without these nodes
COMBINES, PREDICTS = "sampler_cfg_function", "sampler_calc_cond_batch_function"


class LoadPreferenceModules:
    """Reads a positive and a negative module, or one of them."""

    @classmethod
    def INPUT_TYPES(cls):
        """Names, types and defaults of the inputs."""
        files = [NONE, *folder_paths.get_filename_list("loras")]
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that the modules guide. It is not changed."}),
                "positive": (files, {"tooltip": "LoRA file of the positive module, or of the one module of pgd."}),
                "negative": (files, {"tooltip": "LoRA file of the negative module."}),
            }
        }

    RETURN_TYPES = ("PREFERENCE_MODULES",)
    RETURN_NAMES = ("modules",)
    FUNCTION = "load"
    CATEGORY = "preference"
    DESCRIPTION = "Reads LoRA files of kohya's sd-scripts, diffusers or PEFT as modules that guide a model."

    def load(self, model, positive, negative):
        """The modules by name, "pos" and "neg"."""
        chosen = {name: file for name, file in (("pos", positive), ("neg", negative)) if file != NONE}
        if not chosen:
            raise ValueError("Load preference modules: no file is chosen; expected a positive or a negative module")
        paths = {name: folder_paths.get_full_path_or_raise("loras", file) for name, file in chosen.items()}
        return ({name: load_module(path, model) for name, path in paths.items()},)


class ContrastiveGuidance:
    """Patches a model so that modules guide it."""

    @classmethod
    def INPUT_TYPES(cls):
        """Names, types and defaults of the inputs."""

        def share(default, tooltip):
            return "FLOAT", {"default": default, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": tooltip}

        w = {"default": 2.0, "min": -100.0, "max": 100.0, "step": 0.1, "tooltip": "Strength of the contrast."}
        every = {"default": 1, "min": 1, "max": 100, "tooltip": "Predict the contrast every k steps, and reuse it."}
        norm = {"default": False, "tooltip": "Make w a share of the length of what cfg adds in the same step."}
        between = {"tooltip": "Reuse a contrast as it is, or on the line through the last two."}
        text = {
            "default": "",
            "tooltip": "Replaces w, start, stop and norm_matched: linear:8:0@0:0.75, pos=3,neg=1 or norm:0.3, for "
            "example.",
        }
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that is guided. The guidance scale is cfg of the sampler."}),
                "modules": ("PREFERENCE_MODULES",),
                "rule": (NAMES, {"default": "cpgd", "tooltip": "How predictions are combined."}),
                "w": ("FLOAT", w),
                "start": share(0.0, "Share of the sampler's steps at which w begins."),
                "stop": share(1.0, "Share of the sampler's steps before which w ends."),
                "every": ("INT", every),
                "norm_matched": ("BOOLEAN", norm),
            },
            "optional": {
                "between": (["hold", "extrapolate"], between),
                "rescale": share(0.0, "Share phi of guidance rescale. 0 is none."),
                "strengths": ("STRING", text),
            },
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "preference"
    DESCRIPTION = "Guides a model by preference modules (arXiv:2602.18799)."

    def patch(
        self, model, modules, rule, w, start, stop, every, norm_matched, between="hold", rescale=0.0, strengths=""
    ):
        """A clone of the model that samplers of ComfyUI call by the rule."""
        terms = {"name": rule, "module": "pos", "every": every, "between": between, "rescale": rescale or None}
        terms["w"] = strengths.strip() or f"{'norm:' if norm_matched else ''}{w}@{start}:{stop}"
        if "neg" in modules:
            modules = {**modules, "bad": modules["neg"]}  # as autoguidance calls it
        guidance = _check(terms, modules)
        check_fit(modules, model)
        patched = model.clone()
        if guidance.names:
            _refuse(model, COMBINES, rule)
            guided = Guided(terms, modules)
            # A function, not a method: ComfyUI makes deep copies of what it holds, and those of functions are cheap.
            # Norms are measured by the prediction for the empty prompt, which ComfyUI leaves out at cfg 1.
            patched.set_model_sampler_cfg_function(
                lambda args: guided(args), disable_cfg1_optimization=bool(guidance.norms)
            )
        else:
            _refuse(model, PREDICTS, rule)
            if rescale:
                raise ValueError(f"rescale does not apply to rule {rule}; expected 0, and the node RescaleCFG instead")
            patched.set_model_sampler_calc_cond_batch_function(_steady(guidance, Predictor(modules)))
        return (patched,)


def _check(terms, modules):
    """The rule for a trajectory of any length, which shows that its terms can be understood.

    Raises:
        ValueError: they cannot, or a module is missing.
    """
    strengths = parse_strengths(terms["w"])
    if not RULES[terms["name"]](2.0, list(strengths), "pos", "base")[1]:
        terms["w"] = None
    lists = [len(strength.values) for strength in strengths.values() if strength.shape == "list"]
    guidance = Guidance({**terms, "guidance_scale": 2.0}, lists[0] if lists else 1)
    steady, contrasts = guidance.formula(2.0)
    networks = [network for part in (steady, *contrasts.values()) for network, _ in part]
    for network in dict.fromkeys(networks):
        if network not in ("base", *modules):
            kind = {"pos": "positive", "neg": "negative", "bad": "negative"}.get(network)
            told = f"choose a {kind} one in Load preference modules" if kind else "expected pos or neg"
            raise ValueError(f"rule {terms['name']}: there is no module {network!r}; {told}")
    return guidance


def _refuse(model, function, rule):
    if function in model.model_options:
        raise ValueError(
            f"rule {rule}: another node has set {function} of this model, and ComfyUI has one only; remove that node"
        )


def _steady(guidance, predictor):
    """Classifier-free guidance of other networks: only what ComfyUI takes for its two predictions is another one."""
    networks = {prompt: network for network, prompt in guidance.formula(2.0)[0]}
    rows = [(networks["text"], "text"), (networks["empty"], "empty")]

    def predict(args):
        conds = dict(zip(("text", "empty"), args["conds"], strict=True))
        predictions = predictor(rows, conds, args["model"], args["input"], args["sigma"], args["model_options"])
        _release_at_end(predictor, args)
        return predictions

    return predict


class Guided:
    """Combines the predictions of a model with those of its modules, step by step."""

    def __init__(self, terms, modules):
        self.terms, self.predictor = terms, Predictor(modules)
        self.trajectory, self.guidance, self.step, self.group = None, None, 0, None

    def __call__(self, args):
        """The guided prediction as ComfyUI expects it, x without the clean latents, `[N, C, H, W]`.

        Rules are linear and norms are ratios: in one step they are the same for what the network predicts as for the
        estimates of clean latents that ComfyUI hands over. Rescaling, and contrasts that are held from step to step,
        are not. So what the network predicts is recovered first.
        """
        x, sigma, model = args["input"], args["sigma"], args["model"]
        conds = {"text": args["input_cond"], "empty": args["input_uncond"]}
        step, steps = _place(args)
        # ComfyUI predicts nothing for the empty prompt where s is 1.
        self._begin(step, steps, 1.0 if conds["empty"] is None else float(args["cond_scale"]), x.shape)
        asked = self._asked(step)
        rows = list(dict.fromkeys(row for i in asked for row in self.guidance.rows(i)))
        denoised = {("base", "text"): args["cond_denoised"], ("base", "empty"): args["uncond_denoised"]}
        if own := [row for row in rows if row[0] != "base"]:
            predicted = self.predictor(own, conds, model, x, sigma, args["model_options"])
            denoised |= dict(zip(own, predicted, strict=True))
        # Clean latents are linear in what the network predicts: still + slope * prediction.
        calculate = model.model_sampling.calculate_denoised
        still = calculate(sigma, torch.zeros_like(x), x)
        slope = calculate(sigma, torch.ones_like(x), torch.zeros_like(x))
        predictions = {row: (denoised[row].float() - still) / slope for row in rows}
        for i in asked:
            guided = self.guidance.combine(i, predictions)
        _release_at_end(self.predictor, args)
        return (x - (still + slope * guided)).to(x.dtype)

    def _begin(self, step, steps, s, shape):
        """Starts over for another trajectory."""
        trajectory = steps, s, shape
        if self.trajectory != trajectory or step < self.step:
            self.guidance = Guidance({**self.terms, "guidance_scale": s}, steps)
            self.trajectory, self.group = trajectory, None
        self.step = step

    def _asked(self, step):
        """The steps to combine, this one last: before it the first of its group, if a sampler has left that out."""
        guidance = self.guidance
        if not guidance.contrasted[step]:
            return [step]
        group = guidance.order[step] // guidance.every
        first = guidance.order.index(group * guidance.every)
        known, self.group = self.group == group, group
        if known and step == first:  # samplers of higher order predict several times in a step: the last one counts
            guidance.newest = guidance.before
        return [step] if known or step == first else [first, step]


def _place(args):
    """Number of the step, and how many the sampler takes."""
    sigmas = args["model_options"]["transformer_options"]["sample_sigmas"]
    sigma = float(args["sigma"].max()) * (1 - 1e-4)  # rounded
    return max(0, sum(other >= sigma for other in sigmas[:-1].tolist()) - 1), len(sigmas) - 1


def _release_at_end(predictor, args):
    step, steps = _place(args)
    if step == steps - 1:
        predictor.release()
