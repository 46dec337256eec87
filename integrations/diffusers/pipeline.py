"""Guidance by preference modules (arXiv:2602.18799) of Stable Diffusion 1.5 and XL, for diffusers.

    pipeline = DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR / "pipeline.py", trust_remote_code=True)
    image = pipeline("a lighthouse in a storm", w=4, guidance_scale=7.5).images[0]

Every rule adds contrasts of predictions to a steady part, each with a strength of its own,

    eps_hat(x, t) = steady(s) + sum_j w_j contrast_j(s)

where s is the scale of classifier-free guidance (arXiv:2207.12598; s = 1 is none) and

    CFG_s(N) = (1 - s) eps_N(x, empty) + s eps_N(x, text)

flax_pref wrote this file, and draws the same images from the same initial latents. It needs torch and diffusers, and
peft for LoRA modules. Licence: Apache-2.0.
"""

import contextlib
import inspect
import math
from typing import ClassVar

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils.torch_utils import randn_tensor

# ----------------------------------------------------------------------------------------------------------------------
# Rules


class Sum(dict):
    """A linear combination of predictions: the coefficient of each (network, prompt)."""

    def __add__(self, other):
        return Sum({row: self.get(row, 0.0) + other.get(row, 0.0) for row in {**self, **other}})

    def __sub__(self, other):
        return self + -1.0 * other

    def __rmul__(self, factor):
        return Sum({row: factor * coefficient for row, coefficient in self.items()})


def eps(network, prompt):
    """One prediction: of "base" or a module, for the prompt "text" or "empty"."""
    return Sum({(network, prompt): 1.0})


def cfg(network, s):
    """`CFG_s(network)`."""
    return (1 - s) * eps(network, "empty") + s * eps(network, "text")


def pgd(s, module, reference):
    """Preference-guided denoising: `CFG_s(base) + w (CFG_s(module) - CFG_s(reference))`, reference being the base."""
    return cfg("base", s), {"w": cfg(module, s) - cfg(reference, s)}


def cpgd(s, names, positive, negative):
    """Contrastive preference guidance: `CFG_s(base) + w (CFG_s(pos) - CFG_s(neg))`.

    With strengths a and b by name: `CFG_s(base) + a (CFG_s(pos) - CFG_s(base)) + b (CFG_s(base) - CFG_s(neg))`.
    """
    base, pos, neg = cfg("base", s), cfg(positive, s), cfg(negative, s)
    return base, {"w": pos - neg} if names == ["w"] else {positive: pos - base, negative: base - neg}


def cpgd_conditional(s):
    """cPGD on the prompt only: `CFG_s(base) + w (eps_pos(x, text) - eps_neg(x, text))`."""
    return cfg("base", s), {"w": eps("pos", "text") - eps("neg", "text")}


def multi(s, names, reference):
    """Several modules: `CFG_s(base) + sum_i w_i (CFG_s(i) - CFG_s(reference))` (arXiv:2505.18547)."""
    return cfg("base", s), {name: cfg(name, s) - cfg(reference, s) for name in names}


def npo(s):
    """NPO: `(1 - s) eps_neg(x, empty) + s eps_pos(x, text)` (arXiv:2505.11245)."""
    return (1 - s) * eps("neg", "empty") + s * eps("pos", "text"), {}


def autoguidance():
    """Autoguidance: `eps_bad(x, text) + w (eps_base(x, text) - eps_bad(x, text))` (arXiv:2406.02507)."""
    return eps("bad", "text"), {"w": eps("base", "text") - eps("bad", "text")}


# From s, the names of the strengths, the module of one-module rules and the network that modules are compared with.
RULES = {
    "cfg": lambda s, names, module, reference: (cfg("base", s), {}),
    "fine_tuned": lambda s, names, module, reference: (cfg(module, s), {}),
    "pgd": lambda s, names, module, reference: pgd(s, module, reference),
    "cpgd": lambda s, names, module, reference: cpgd(s, names, "pos", "neg"),
    "cpgd_conditional": lambda s, names, module, reference: cpgd_conditional(s),
    "positive_only": lambda s, names, module, reference: cpgd(s, names, "pos", reference),
    "negative_only": lambda s, names, module, reference: cpgd(s, names, reference, "neg"),
    "npo": lambda s, names, module, reference: npo(s),
    "autoguidance": lambda s, names, module, reference: autoguidance(),
    "multi": lambda s, names, module, reference: multi(s, names, reference),
}


# ----------------------------------------------------------------------------------------------------------------------
# Strengths along the trajectory


class Strength:
    """A strength in each step: a number, or `linear:8:0`, `cosine:0:8` or `list:8:4:0`.

    `@0.2:0.8` behind it restricts it to that part of the trajectory (arXiv:2404.07724): outside, w is 0 and s is 1.
    `norm:` before it makes it a share of the length of what classifier-free guidance adds in the same step.
    """

    def __init__(self, text):
        text = str(text)
        self.norm = text.startswith("norm:")
        course, at, interval = text.removeprefix("norm:").partition("@")
        self.shape, *values = course.split(":") if ":" in course else ("constant", course)
        try:
            self.values = [float(value) for value in values]
            self.start, self.stop = map(float, interval.split(":")) if at else (0.0, 1.0)
            expected = {"constant": 1, "linear": 2, "cosine": 2, "list": len(values)}[self.shape]
            if len(values) != expected or not all(map(math.isfinite, self.values)):
                raise ValueError
            if not 0 <= self.start < self.stop <= 1:
                raise ValueError
        except (ValueError, KeyError):
            raise ValueError(
                f"{text!r} is no strength; expected a number, linear:FIRST:LAST, cosine:FIRST:LAST or list:A:B:..., "
                "with norm: before it or @START:STOP behind it"
            ) from None

    def active(self, steps):
        """Whether each step lies in the interval; step i of S is at i / S, up to rounding."""
        return [self.start - 1e-9 <= i / steps < self.stop - 1e-9 for i in range(steps)]

    def at(self, steps, off):
        """The strength in each step; `off` outside of the interval."""
        active = self.active(steps)
        if self.shape == "list" and len(self.values) != steps:
            raise ValueError(f"a list of {len(self.values)} strengths, but the scheduler takes {steps} steps")
        course, last = [], max(1, sum(active) - 1)
        for i in range(steps):
            way = (sum(active[: i + 1]) - 1) / last
            if self.shape == "cosine":
                way = (1 - math.cos(math.pi * way)) / 2
            value = (
                self.values[i] if self.shape == "list" else self.values[0] + way * (self.values[-1] - self.values[0])
            )
            course.append(value if active[i] else off)
        return course


def parse_strengths(w):
    """Strengths by the names of their contrasts: of a number, of text such as `4` or `pos=3,neg=1`, or of a dict."""
    if isinstance(w, str) and "=" in w:
        w = dict(part.split("=", 1) for part in w.split(","))
    return {name.strip(): Strength(value) for name, value in (w if isinstance(w, dict) else {"w": w}).items()}


# ----------------------------------------------------------------------------------------------------------------------
# Guidance


class Guidance:
    """A rule for the steps of a trajectory.

    Args:
        rule: name, guidance_scale, w, module, reference, every, between and rescale. Contrasts are predicted in the
            first of `every` steps, and in the others held, or extrapolated on the line through the last two. rescale is
            the share phi of guidance rescale (arXiv:2305.08891, section 3.4).
        steps: S, as many as the scheduler takes.
    """

    def __init__(self, rule, steps):
        if rule["name"] not in RULES:
            raise ValueError(f"no rule {rule['name']!r}; expected {', '.join(RULES)}")
        self.rule, self.every, self.rescale = rule, rule.get("every", 1), rule.get("rescale")
        if type(self.every) is not int or self.every < 1:
            raise ValueError(f"every={self.every!r} must be a whole number from 1 up")
        scale = Strength(rule["guidance_scale"])
        if scale.norm:
            raise ValueError("guidance_scale cannot be norm-matched: a norm is a share of what it adds")
        strengths = {} if rule.get("w") is None else parse_strengths(rule["w"])
        self.names = list(strengths)
        contrasts = self.formula(2.0)[1]
        if contrasts and set(contrasts) != set(strengths):
            raise ValueError(f"w={rule.get('w')!r}: expected strengths for {', '.join(contrasts)}")
        strengths = {name: strengths[name] for name in contrasts}
        self.s = scale.at(steps, off=1.0)
        self.w = {name: strength.at(steps, off=0.0) for name, strength in strengths.items()}
        self.norms = {name for name, strength in strengths.items() if strength.norm}
        if self.norms and self.formula(0.0)[0] == self.formula(1.0)[0]:
            raise ValueError("norm: is measured by what guidance adds, and the rule has no classifier-free guidance")
        active = {name: strength.active(steps) for name, strength in strengths.items()}
        # Which steps have contrasts, and the number of each among them; in the first of `every` they are predicted.
        self.contrasted = [any(active[name][i] for name in active) for i in range(steps)]
        self.order = [sum(self.contrasted[: i + 1]) - 1 for i in range(steps)]
        # The contrasts that count in each group of `every` steps.
        self.counting = {}
        for i in range(steps):
            own = {name for name in active if active[name][i]}
            self.counting[self.order[i] // self.every] = self.counting.get(self.order[i] // self.every, set()) | own
        self.newest, self.before = None, None

    def formula(self, s):
        """Steady, and the contrasts by name."""
        rule = self.rule
        return RULES[rule["name"]](s, self.names, rule.get("module"), rule.get("reference", "base"))

    def __call__(self, i, predict):
        """The guided prediction of step i; predict makes a dict of predictions of a list of rows, see `combine`."""
        return self.combine(i, predict(self.rows(i)))

    def sums(self, i):
        """The sums of step i: steady for each scale, contrasts for each, and steady without guidance."""
        # At s = 1 a guided prediction is the text prediction that it is made of, by which rescaling goes.
        scales = [self.s[i]] + ([] if self.rescale is None else [1.0])
        group, place = divmod(self.order[i], self.every)
        predicted = self.counting[group] if self.contrasted[i] and place == 0 else set()
        terms = [self.formula(s) for s in scales]
        contrasts = [{name: part for name, part in parts.items() if name in predicted} for _, parts in terms]
        unguided = self.formula(0.0)[0] if self.contrasted[i] and self.norms else Sum()
        return [steady for steady, _ in terms], contrasts, unguided

    def rows(self, i):
        """The (network, prompt) of each prediction that step i needs."""
        steady, contrasts, unguided = self.sums(i)
        parts = [*steady, *(part for parts in contrasts for part in parts.values()), unguided]
        return list(dict.fromkeys(row for part in parts for row, coefficient in part.items() if coefficient))

    def combine(self, i, predictions):
        """The guided prediction of step i, float32 `[N, C, H, W]`; steps are asked for in their order.

        Args:
            i: number of the step.
            predictions: of each (network, prompt) of `rows(i)`, float32 `[N, C, H, W]` each.
        """
        steady, contrasts, unguided = self.sums(i)

        def total(part):
            return sum(coefficient * predictions[row] for row, coefficient in part.items() if coefficient)

        guided = [total(part) for part in steady]
        if any(contrasts):
            newest = [{name: total(part) for name, part in parts.items()} for parts in contrasts]
            self.newest, self.before = newest, self.newest
        if self.contrasted[i]:
            empty = total(unguided) if self.norms else None
            guided = [prediction + self.added(i, k, prediction, empty) for k, prediction in enumerate(guided)]
        if self.rescale is None:
            return guided[0]
        deviation, wanted = (x.std(dim=(1, 2, 3), keepdim=True) for x in guided)
        return guided[0] * (self.rescale * (wanted / deviation) + 1 - self.rescale)

    def added(self, i, k, guided, empty):
        """`sum_j w_j contrast_j` of the k-th scale."""
        extrapolates = self.rule.get("between") == "extrapolate" and self.before is not None
        ahead = self.order[i] % self.every / self.every if extrapolates else 0.0
        added = torch.zeros_like(guided)
        for name, contrast in self.newest[k].items():
            if ahead and name in self.before[k]:
                contrast = contrast + ahead * (contrast - self.before[k][name])
            if name in self.norms:  # as long as what classifier-free guidance adds
                length = _length(contrast)
                contrast = torch.where(length == 0, 0.0, _length(guided - empty) / length) * contrast
            added = added + self.w[name][i] * contrast
        return added


def _length(x):
    """Euclidean length of each image, `[N, C, H, W] -> [N, 1, 1, 1]`."""
    return x.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()


# ----------------------------------------------------------------------------------------------------------------------
# Initial latents of flax_pref


def draw_latents(seed, prompt_ids, shape):
    """The initial latents that flax_pref draws, float32 `[N, C, H, W]`, a function of seed and prompt id of each image.

    Random bits are those of Threefry (Salmon et al., 2011) as JAX counts, normal numbers by the inverse error function.

    Args:
        seed: a whole number from 0 to 2^32 - 1.
        prompt_ids: N of them.
        shape: (C, H, W).
    """
    channels, height, width = shape
    count = torch.arange(math.prod(shape))
    images = []
    for prompt_id in prompt_ids:
        key = 0, seed
        for number in (prompt_id, 0):  # of the image, and of its first draw
            key = tuple(int(word) for word in _threefry(key, torch.tensor(0), torch.tensor(number)))
        first, second = _threefry(key, torch.zeros_like(count), count)
        # 23 bits are a number in [0, 1), which is stretched over (-1, 1).
        uniform = ((first ^ second) >> 9).float() / 2**23
        low = -1 + 2.0**-24
        normal = math.sqrt(2) * torch.erfinv((uniform * 2 + low).clamp(min=low))
        images.append(normal.reshape(height, width, channels).permute(2, 0, 1))
    return torch.stack(images)


def _threefry(key, first, second):
    """Threefry-2x32 with 20 rounds: two words of 32 bits from two, as int64."""
    mask = 2**32 - 1
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    first, second = (first + keys[0]) & mask, (second + keys[1]) & mask
    for block in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            first = (first + second) & mask
            second = (((second << turn) | (second >> (32 - turn))) & mask) ^ first
        first = (first + keys[(block + 1) % 3]) & mask
        second = (second + keys[(block + 2) % 3] + block + 1) & mask
    return first, second


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline


class GuidedPipeline(DiffusionPipeline):
    """Text to image by Stable Diffusion 1.5 or XL, guided by preference modules.

    Args:
        networks: the modules, and the base where the folder only names it; see networks/networks.py.
        unet, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2: of the base, where the folder holds it.
        scheduler: any of diffusers; None: that of the base.
        rule: settings of `Guidance`.
        call: what a call does unless it is told otherwise: num_inference_steps, height, width, eta and clip_skip.
        force_zeros_for_empty_prompt: as in StableDiffusionXLPipeline.

    Attributes:
        one_batch: whether LoRA modules and the base are predicted in one batch, which is faster and takes more memory,
            or in turns. At first that is what the installed peft supports.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components: ClassVar = [
        *("unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"),
    ]
    _exclude_from_cpu_offload: ClassVar = ["networks"]
    _callback_tensor_inputs: ClassVar = ["latents"]

    def __init__(
        self,
        networks,
        unet=None,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=None,
        rule=None,
        call=None,
        force_zeros_for_empty_prompt=True,
    ):
        super().__init__()
        parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}
        parts |= {"text_encoder_2": text_encoder_2, "tokenizer_2": tokenizer_2}
        if networks.base is not None:
            of_base = networks.base.components
            parts = {name: of_base.get(name) if part is None else part for name, part in parts.items()}
            force_zeros_for_empty_prompt = networks.base.config.get("force_zeros_for_empty_prompt", True)
            networks.base = None
        self.register_modules(networks=networks, **parts)
        self.register_to_config(rule=rule, call=call or {}, force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        for name in networks.lora:
            place = {"subfolder": name, "weight_name": "model.safetensors"}
            self.unet.load_lora_adapter(networks.folder, **place, prefix="unet", adapter_name=name)
        adapted = [layer for layer in self.unet.modules() if hasattr(layer, "lora_A")]
        self.one_batch = all(hasattr(layer, "_mixed_batch_forward") for layer in adapted)
        self._adapters = None
        for layer in adapted:
            layer.register_forward_pre_hook(self._choose_adapters, with_kwargs=True)

    @property
    def sdxl(self):
        """Whether it is Stable Diffusion XL."""
        return self.text_encoder_2 is not None

    @property
    def plain(self):
        """The pipeline of diffusers with the same parts, which encodes prompts and images."""
        parts = {name: part for name, part in self.components.items() if name != "networks"}
        # It changes fields of the scheduler that it is given.
        parts["scheduler"] = DDIMScheduler(steps_offset=1, clip_sample=False)
        if self.sdxl:
            zeros = self.config.force_zeros_for_empty_prompt
            return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
        parts = {name: part for name, part in parts.items() if not name.endswith("_2")}
        unused = {"safety_checker": None, "feature_extractor": None}
        return StableDiffusionPipeline(**parts, **unused, requires_safety_checker=False)

    @torch.no_grad()
    def __call__(
        self,
        prompt,
        negative_prompt=None,
        *,
        w=None,
        guidance_scale=None,
        every=None,
        num_inference_steps=None,
        height=None,
        width=None,
        prompt_2=None,
        negative_prompt_2=None,
        num_images_per_prompt=1,
        eta=None,
        clip_skip=None,
        generator=None,
        seed=None,
        latents=None,
        output_type="pil",
        return_dict=True,
        callback_on_step_end=None,
    ):
        """Draws images.

        Args:
            prompt: a text, or a list of N.
            negative_prompt: likewise; None: what the base means by no prompt.
            w: strength of the modules, see `Strength` and `parse_strengths`; None: that of the export.
            guidance_scale: s of classifier-free guidance, likewise.
            every: steps between predictions of contrasts, likewise.
            num_inference_steps, height, width, eta, clip_skip: as in the pipelines of diffusers; None: those of the
                export.
            prompt_2, negative_prompt_2: of the second text encoder of Stable Diffusion XL.
            num_images_per_prompt: images for each prompt.
            generator: of torch, for the initial latents and for schedulers that draw noise.
            seed: instead, the initial latents of flax_pref for this seed and the prompt ids 0 to N - 1.
            latents: or initial latents, normal numbers `[N, C, H / 8, W / 8]`.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False: a tuple.
            callback_on_step_end: called as `(pipeline, i, t, {"latents": latents})`; returns a dict, perhaps with other
                latents.

        Returns:
            an object with `images`.
        """
        given = {"num_inference_steps": num_inference_steps, "height": height, "width": width}
        given |= {"eta": eta, "clip_skip": clip_skip}
        call = {**self.config.call, **{name: value for name, value in given.items() if value is not None}}
        asked = {"w": w, "guidance_scale": guidance_scale, "every": every}
        rule = {**self.config.rule, **{name: value for name, value in asked.items() if value is not None}}
        plain, device = self.plain, self._execution_device
        images = num_images_per_prompt * (1 if isinstance(prompt, str) else len(prompt))
        second = {"prompt_2": prompt_2, "negative_prompt_2": negative_prompt_2}
        if not self.sdxl and any(text is not None for text in second.values()):
            raise ValueError(
                "prompt_2 and negative_prompt_2 are for Stable Diffusion XL; this base has one text encoder"
            )
        prompts = self._encode(
            plain,
            {"prompt": prompt, "negative_prompt": negative_prompt, **(second if self.sdxl else {})},
            {"device": device, "num_images_per_prompt": num_images_per_prompt, "clip_skip": call.get("clip_skip")},
            (call["height"], call["width"]),
        )
        self.scheduler.set_timesteps(call["num_inference_steps"], device=device)
        timesteps = self.scheduler.timesteps
        guidance = Guidance(rule, len(timesteps))
        dtype = prompts["text"]["encoder_hidden_states"].dtype
        if latents is None:
            sides = (call[side] // plain.vae_scale_factor for side in ("height", "width"))
            shape = (self.unet.config.in_channels, *sides)
            if seed is None:
                latents = randn_tensor((images, *shape), generator=generator, device=device, dtype=dtype)
            else:
                latents = draw_latents(seed, range(images), shape)
        latents = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        takes = inspect.signature(self.scheduler.step).parameters
        options = {"eta": call.get("eta"), "generator": generator}
        options = {name: value for name, value in options.items() if value is not None and name in takes}
        with self.progress_bar(total=len(timesteps)) as progress:
            for i, t in enumerate(timesteps):
                scaled = self.scheduler.scale_model_input(latents, t)
                noise_pred = guidance(i, lambda rows, x=scaled, t=t: self._predict(rows, x, t, prompts))
                latents = self.scheduler.step(noise_pred.to(dtype), t, latents, **options, return_dict=False)[0].to(
                    dtype
                )
                if callback_on_step_end is not None:
                    latents = (callback_on_step_end(self, i, t, {"latents": latents}) or {}).get("latents", latents)
                progress.update()
        drawn = (
            latents
            if output_type == "latent"
            else plain.image_processor.postprocess(self._decode(latents), output_type=output_type)
        )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=drawn) if return_dict else (drawn,)

    def _encode(self, plain, texts, options, size):
        """Conditioning of the UNets on the prompts "text" and "empty", `[N, ...]` each."""
        skip = options["clip_skip"]
        if skip and not self.sdxl:  # diffusers 0.42 looks for a layer that transformers 5 has elsewhere
            number = 1 if isinstance(texts["prompt"], str) else len(texts["prompt"])
            given = {"prompt_embeds": texts["prompt"], "negative_prompt_embeds": texts["negative_prompt"] or ""}
            given = {name: [text] * number if isinstance(text, str) else text for name, text in given.items()}
            texts = {name: self._hidden_states(plain, text, skip) for name, text in given.items()} | {"prompt": None}
        text, empty, *pooled = plain.encode_prompt(**texts, do_classifier_free_guidance=True, **options)
        prompts = {"text": {"encoder_hidden_states": text}, "empty": {"encoder_hidden_states": empty}}
        if self.sdxl:
            sizes = torch.tensor([[*size, 0, 0, *size]], dtype=text.dtype, device=text.device).repeat(len(text), 1)
            for seen, embeds in zip(prompts.values(), pooled, strict=True):
                seen |= {"text_embeds": embeds, "time_ids": sizes}
        return prompts

    def _hidden_states(self, plain, texts, skip):
        """Hidden states of Stable Diffusion 1.5's text encoder, so many layers before the last, `[N, T, D]`."""
        texts = plain.maybe_convert_prompt(texts, self.tokenizer)
        length = {"max_length": self.tokenizer.model_max_length, "padding": "max_length", "truncation": True}
        ids = self.tokenizer(texts, **length, return_tensors="pt").input_ids.to(self._execution_device)
        states = self.text_encoder(ids, output_hidden_states=True).hidden_states[-(skip + 1)]
        return getattr(self.text_encoder, "text_model", self.text_encoder).final_layer_norm(states)

    def _predict(self, rows, latents, t, prompts):
        """The prediction of each (network, prompt), float32; one call of a UNet for as many as it can take together."""
        turns = {}
        for network, prompt in rows:
            name = "base" if network == "base" else f"module_{network}"
            together = self.one_batch and name not in self.networks.unets
            turns.setdefault("base" if together else name, []).append((network, prompt, name))
        predictions = {}
        for turn, own in turns.items():
            unet = self.networks.unets[turn] if turn in self.networks.unets else self.unet  # noqa: SIM401
            seen = [prompts[prompt] for _, prompt, _ in own]
            seen = {key: torch.cat([part[key] for part in seen]) for key in seen[0]}
            states = seen.pop("encoder_hidden_states")
            with self._adapted(turn, [name for _, _, name in own for _ in range(len(latents))]):
                inputs = torch.cat([latents] * len(own))
                noise_pred = unet(inputs, t, encoder_hidden_states=states, added_cond_kwargs=seen, return_dict=False)[0]
            parts = noise_pred.float().chunk(len(own))
            predictions |= {(network, prompt): part for (network, prompt, _), part in zip(own, parts, strict=True)}
        return predictions

    @contextlib.contextmanager
    def _adapted(self, turn, names):
        """While entered, LoRA layers of the base use these adapters: one for each sample, or that of the turn."""
        if not self.networks.lora:
            yield
        elif self.one_batch:
            self._adapters = ["__base__" if name == "base" else name for name in names]
            try:
                yield
            finally:
                self._adapters = None
        elif turn in self.networks.lora:
            self.unet.set_adapters(turn)
            yield
        else:
            self.unet.disable_adapters()
            try:
                yield
            finally:
                self.unet.enable_adapters()

    def _choose_adapters(self, layer, args, kwargs):
        """Before a LoRA layer of peft computes: names the adapter of each sample of its batch."""
        return args, kwargs if self._adapters is None else {**kwargs, "adapter_names": self._adapters}

    def _decode(self, latents):
        """Images in [-1, 1]; the autoencoder of Stable Diffusion XL overflows in float16."""
        dtype = self.vae.dtype
        upcast = self.sdxl and dtype == torch.float16 and self.vae.config.force_upcast
        if upcast:
            self.vae.to(torch.float32)
        images = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        if upcast:
            self.vae.to(dtype)
        return images
