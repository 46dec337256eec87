"""From prompts to images: text encoders, sampler and decoder of one checkpoint, with any guidance rule."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from flax_pref.checkpoints.diffusers import Pipeline
from flax_pref.diffusion.conditioning import (
    chunks,
    encode_batch,
    encode_blank,
    encode_empty,
    in_chunks,
    warn_of_cuts,
    with_guidance,
    with_sizes,
)
from flax_pref.diffusion.drawing_flags import PromptSyntax
from flax_pref.diffusion.guidance import Rule, Table, cfg, tabulate
from flax_pref.diffusion.latents import decode_latents
from flax_pref.diffusion.prompt_syntax import count_chunks, warn_of_weights
from flax_pref.diffusion.sampler import image_keys, sample
from flax_pref.diffusion.scheduler_configs import solver_from_config
from flax_pref.diffusion.solvers import Solver
from flax_pref.models.bank import AXIS, Bank, Member, Stack, stack
from flax_pref.models.network import Network, replicated
from flax_pref.models.unet import UNetConfig
from flax_pref.models.vae import VAEConfig

STEPS = 50
IMITATED_GUIDANCE = 7.5
FROM_CHECKPOINT: Any = None  # of a field of TextToImage: it takes the checkpoint's


@dataclasses.dataclass(frozen=True)
class TextToImage:
    """Draws images for prompts with any guidance rule.

    It compiles once for every set of rows (network and prompt); strengths may change from call to call.

    Args:
        steps: sampling steps of the checkpoint's own scheduler (default: 50); not with `solver`, which has its steps.

    Attributes:
        pipeline: the checkpoint; its UNet is the network "base" of rules and may carry adapters.
        solver: the sampling steps, see `solver_from_config` (default: those of the checkpoint's scheduler).
        size: height and width of the images in pixels (default: the size that the UNet was trained on).
        batch_size: images per call of the sampler; a multiple of the devices that share a batch.
        modules: networks with weights of their own, by their names in rules. They may carry adapters too: so modules
            guide another base than the one they were trained on.
        text_encoders: those of modules that see prompts through their own, by the names of the modules; see
            `load_modules`. All others see them through those of the pipeline.
        mesh: devices to draw on, each its part of every batch; None for one device. Where the mesh has an axis
            "network", base and modules lie side by side on it, else each device has all of them.
        original_size: for SDXL, height and width in pixels that the image pretends to have had before it was resized;
            None: as `size`.
        crop_top_left: for SDXL, where the image pretends to have been cropped, in pixels from the top and the left.
        imitated_guidance: guidance scale that UNets with `time_cond_proj_dim` (LCM) are told to imitate; others have no
            use for it. Rules for such UNets need no guidance of their own, and the default rule has none.
        prompt_syntax: "plain", or "a1111" or "comfyui": prompts have weights and any length, see `prompt_syntax`.
        watch_steps: whether the progress bar counts steps, not images. The program then calls back to the host in every
            step, and such programs are not kept in JAX's compilation cache.

    Raises:
        ValueError: the size or the batch size is no multiple of what the checkpoint or the mesh needs, the
            checkpoint's scheduler is not supported, or both solver and steps are given.

    Example:
        >>> pipeline = fp.load_pipeline("demo")
        >>> draw = fp.TextToImage(pipeline, steps=2)
        >>> draw.size
        (64, 64)
        >>> images = draw(["a large red circle in the middle, white background"])
        >>> images.shape
        (1, 64, 64, 3)
    """

    pipeline: Pipeline
    solver: Solver = FROM_CHECKPOINT
    size: tuple[int, int] = FROM_CHECKPOINT
    batch_size: int = 1
    modules: Mapping[str, Network] = dataclasses.field(default_factory=dict)
    text_encoders: Mapping[str, tuple[Network, ...]] = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None
    original_size: tuple[int, int] | None = None
    crop_top_left: tuple[int, int] = (0, 0)
    imitated_guidance: float = IMITATED_GUIDANCE
    prompt_syntax: PromptSyntax = "plain"
    watch_steps: bool = False
    steps: dataclasses.InitVar[int | None] = None

    def __post_init__(self, steps: int | None):
        if self.solver is FROM_CHECKPOINT:
            solver = solver_from_config(self.pipeline.scheduler_config, STEPS if steps is None else steps)
            object.__setattr__(self, "solver", solver)
        elif steps is not None:
            raise ValueError(f"steps={steps} beside a solver, which has its own; expected one of the two")
        if self.size is FROM_CHECKPOINT:
            object.__setattr__(self, "size", trained_size(self.pipeline.unet.config, self.pipeline.vae.config))
        factor = self.pipeline.vae.config.downscale_factor
        if any(side < 1 or side % factor for side in self.size):
            raise ValueError(f"size={self.size}: height and width must be multiples of {factor}")
        if "base" in self.modules:
            raise ValueError('modules has a network "base"; expected other names, for the base is the UNet of pipeline')
        if "base" in self.text_encoders:
            raise ValueError('text_encoders has "base"; expected other names, for the base has those of pipeline')
        if self.batch_size < 1 or self.batch_size % self.shards:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of {self.shards}, the devices that share it"
            )

    def __call__(
        self,
        prompts: str | Sequence[str],
        prompt_ids: Sequence[int] | None = None,
        rule: Rule | None = None,
        *,
        seed: int | Sequence[int] = 0,
        negative_prompts: Sequence[str] | None = None,
        second_prompts: Sequence[str] | None = None,
        label: str = "sampling",
    ) -> np.ndarray:
        """Draws one image per prompt.

        Args:
            prompts: N texts, or a single one.
            prompt_ids: N numbers (default: 0 to N - 1); the noise of an image is a function of its id and its seed
                alone.
            rule: guidance rule, see `diffusion.guidance` (default: classifier-free guidance with scale 7.5, or none for
                UNets that imitate it); strengths that differ per image are `[N]`.
            seed: one for all images, or N of them.
            negative_prompts: N texts that the "empty" rows of the rule see; None: what the checkpoint means by no
                prompt.
            second_prompts: N texts for SDXL's second text encoder; None: the prompts.
            label: text of the progress bar.

        Returns:
            float32 `[N, H, W, 3]` in [0, 1].

        Raises:
            ValueError: the lists are not equally long, the rule names a network that there is not, a prompt has what
                its syntax does not support, or there are second prompts for a single text encoder.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        prompt_ids = range(len(prompts)) if prompt_ids is None else prompt_ids
        seeds = np.asarray(seed)
        lists = {"prompt_ids": prompt_ids, "negative_prompts": negative_prompts, "second_prompts": second_prompts}
        lists["seeds"] = seeds if seeds.ndim else None
        for name, given in lists.items():
            if given is not None and len(given) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts, but {len(given)} {name}; expected one for each")
        chunks_each = self.count_chunks([*prompts, *(negative_prompts or ()), *(second_prompts or ())])
        ids, seeds = np.asarray(prompt_ids), np.broadcast_to(seeds, len(prompts))
        imitates = self.pipeline.unet.config.time_cond_proj_dim is not None
        default = cfg(1.0) if imitates else cfg()
        table = tabulate(default if rule is None else rule, len(self.solver.timesteps), len(prompts))
        images = []
        batches, steps = list(chunks(len(prompts), self.batch_size)), len(self.solver.timesteps)
        total, unit = (len(batches) * steps, "step") if self.watch_steps else (len(prompts), "image")
        with tqdm(total=total, desc=label, unit=unit) as progress, watched_steps(progress, self.watch_steps) as bar:
            for chosen, n in batches:
                keys = image_keys(seeds[chosen], ids[chosen])
                batch = self.draw(
                    *([prompts[int(i)] for i in chosen], keys, table.images(chosen)),
                    negative_prompts=None if negative_prompts is None else [negative_prompts[int(i)] for i in chosen],
                    second_prompts=None if second_prompts is None else [second_prompts[int(i)] for i in chosen],
                    chunks=chunks_each,
                    bar=bar,
                )
                images.append(np.asarray(batch)[:n])
                if not self.watch_steps:
                    progress.update(n)
        return np.concatenate(images)

    def draw(
        self,
        prompts: Sequence[str],
        keys: jax.Array,
        table: Table,
        *,
        negative_prompts: Sequence[str] | None = None,
        second_prompts: Sequence[str] | None = None,
        chunks: int = 1,
        bar: np.ndarray | None = None,
        solver: Solver | None = None,
    ) -> jax.Array:
        """Draws one batch and does not wait for it: work for the next can be prepared while devices compute.

        Args:
            prompts: B texts, as many as `batch_size`.
            keys: `[B]`, see `sampler.image_keys`.
            table: the rule for B images, see `guidance.tabulate`.
            negative_prompts: B texts, or None.
            second_prompts: B texts, or None.
            chunks: of tokens, as many as the longest prompt has, see `count_chunks`; a program is compiled for each
                number.
            bar: number of a progress bar that counts steps.
            solver: of other steps than those of this; None: its own.

        Returns:
            float32 `[B, H, W, 3]` in [0, 1], on the devices.
        """
        prompts_seen = self._prompts_seen(prompts, table, negative_prompts, second_prompts, chunks)
        with self._mesh_in_use():
            inputs = self.bank, table, solver or self.solver, jax.device_put(keys, self.sharding), *prompts_seen
            latents = _sampler(*inputs, self._latent_shape, bar)
        return decode_latents(self.placed.vae, latents, shards=self.shards)

    def draw_bytes(
        self,
        prompts: Sequence[str],
        keys: jax.Array,
        table: Table,
        *,
        negative_prompts: Sequence[str] | None = None,
        second_prompts: Sequence[str] | None = None,
        chunks: int = 1,
    ) -> jax.Array:
        """The images of `draw` as they are stored, uint8 `[B, H, W, 3]`, by one program from noise to bytes.

        For sets of many batches: there is one program to compile, to load and to start. `draw` has two, of which other
        numbers of steps compile only the sampler again. The arguments are those of `draw`.
        """
        prompts_seen = self._prompts_seen(prompts, table, negative_prompts, second_prompts, chunks)
        vae = self.placed.vae
        with self._mesh_in_use():
            inputs = self.bank, table, self.solver, jax.device_put(keys, self.sharding), *prompts_seen
            return _image_sampler(*vae, self._latent_shape, self.shards, *inputs)

    def _prompts_seen(
        self,
        prompts: Sequence[str],
        table: Table,
        negative_prompts: Sequence[str] | None,
        second_prompts: Sequence[str] | None,
        chunks: int,
    ) -> tuple[dict, dict, dict, dict]:
        """Conditioning for `sampler.sample`: text, empty, blank and own_prompts."""
        text, empty = self.conditioning(prompts, negative_prompts, second_prompts, chunks=chunks)
        own = self.own_prompts(table, prompts, negative_prompts, second_prompts, chunks=chunks)
        return text, empty, in_chunks(self.blank, chunks), own

    def _mesh_in_use(self) -> contextlib.AbstractContextManager:
        """Kernels, which the compiler does not partition, divide themselves over the mesh that is set."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        vae = self.pipeline.vae.config
        height, width = (side // vae.downscale_factor for side in self.size)
        return height, width, vae.latent_channels

    def count_chunks(self, prompts: Sequence[str]) -> int:
        """Chunks of tokens of the longest prompt. Where the syntax is plain, 1, with warnings of cuts and of weights.

        Raises:
            ValueError: a prompt has what its syntax does not support.
        """
        if self.prompt_syntax == "plain":
            advice = "prompt_syntax (--prompt-syntax) a1111 or comfyui reads all of it, in chunks"
            warn_of_cuts(self.pipeline, prompts, advice)
            warn_of_weights(prompts)
        return count_chunks(prompts, self.pipeline.tokenizers, self.prompt_syntax)

    def conditioning(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        second_prompts: Sequence[str] | None = None,
        *,
        chunks: int = 1,
    ) -> tuple[dict, dict]:
        """Conditioning of the rows "text" and "empty", `[B, ...]` each; see `diffusion.conditioning`."""
        if second_prompts is not None and len(self.pipeline.tokenizers) == 1:
            raise ValueError("second_prompts: this checkpoint has one text encoder; expected them for SDXL only")
        reading = {"syntax": self.prompt_syntax, "chunks": chunks, "sharding": self.sharding}
        text = encode_batch(self.placed, prompts, second_prompts=second_prompts, **reading)
        text = jax.device_put(self.with_sizes(text), self.sharding)
        if negative_prompts is None:
            return text, in_chunks(self.empty, chunks)
        empty = encode_batch(self.placed, negative_prompts, **reading)
        return text, jax.device_put(self.with_sizes(empty), self.sharding)

    def own_prompts(
        self,
        table: Table,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        second_prompts: Sequence[str] | None = None,
        *,
        chunks: int = 1,
    ) -> dict[str, tuple[dict, dict, dict]]:
        """Conditioning of networks with text encoders of their own: of "text" and "empty", and of the empty text "".

        Only of networks that the table asks for, and once for networks with the same text encoders.
        """
        readers = {name: self.readers[name] for name, _ in table.rows if name in self.readers}
        distinct = {id(reader): reader for reader in readers.values()}
        given = prompts, negative_prompts, second_prompts
        seen = {
            key: (*own.conditioning(*given, chunks=chunks), in_chunks(own.blank, chunks))
            for key, own in distinct.items()
        }
        return {name: seen[id(reader)] for name, reader in readers.items()}

    def with_sizes(self, conditioning: Mapping[str, Any]) -> dict[str, Any]:
        """Conditioning with sizes (SDXL) and guidance scale (LCM); see `conditioning.with_sizes`, `with_guidance`."""
        pretended = {"original_size": self.original_size, "crop_top_left": self.crop_top_left}
        unet = self.pipeline.unet.config
        return with_guidance(with_sizes(conditioning, unet, self.size, **pretended), unet, self.imitated_guidance)

    @property
    def shards(self) -> int:
        """Number of devices that share a batch."""
        return 1 if self.mesh is None else self.mesh.size // self.mesh.shape.get(AXIS, 1)

    @property
    def sharding(self) -> NamedSharding | None:
        """Of arrays of a batch."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(tuple(name for name in self.mesh.axis_names if name != AXIS)))

    # What follows is made once: parameters on the devices, and the empty prompt.

    @cached_property
    def placed(self) -> Pipeline:
        """The checkpoint's text encoders and autoencoder where they compute."""
        return dataclasses.replace(
            self.pipeline,
            vae=replicated(self.pipeline.vae, self.mesh),
            text_encoders=tuple(replicated(encoder, self.mesh) for encoder in self.pipeline.text_encoders),
        )

    @cached_property
    def readers(self) -> "dict[str, TextToImage]":
        """A copy of this for each network with text encoders of its own, which encodes the prompts that it sees.

        Arrays that text encoders share with those of the checkpoint are on the devices once.
        """
        before, there = (jax.tree.leaves([net.params for net in p.text_encoders]) for p in (self.pipeline, self.placed))
        placed = dict(zip(map(id, before), there, strict=True))

        def reader(encoders: tuple[Network, ...]) -> TextToImage:
            shared = tuple(
                own._replace(params=jax.tree.map(lambda leaf: placed.get(id(leaf), leaf), own.params))
                for own in encoders
            )
            pipeline = self.placed.replace(text_encoders=shared)
            return dataclasses.replace(self, pipeline=pipeline, modules={}, text_encoders={})

        distinct = {id(own): reader(own) for own in self.text_encoders.values()}
        return {name: distinct[id(own)] for name, own in self.text_encoders.items()}

    @cached_property
    def bank(self) -> Bank | Stack:
        """The UNets where they compute."""
        networks = {"base": self.pipeline.unet, **self.modules}
        if self.mesh is not None and AXIS in self.mesh.shape:
            return stack({name: (network.graphdef, network.params) for name, network in networks.items()}, self.mesh)
        placed = {name: replicated(network, self.mesh) for name, network in networks.items()}
        return Bank(tuple(Member(name, network.graphdef, network.params) for name, network in placed.items()))

    @cached_property
    def empty(self) -> dict[str, np.ndarray]:
        """Conditioning of the rows "empty" without a negative prompt."""
        return self.with_sizes(encode_empty(self.pipeline))

    @cached_property
    def blank(self) -> dict[str, np.ndarray]:
        """Conditioning on the empty text "", which the proxy prompt of CHATS is made of."""
        return self.with_sizes(encode_blank(self.pipeline))


def trained_size(unet: UNetConfig, vae: VAEConfig) -> tuple[int, int]:
    """Height and width in pixels of the images that a UNet was trained on; 64 latents where its config has no size."""
    latents = unet.sample_size or 64
    height, width = latents if isinstance(latents, tuple) else (latents, latents)
    return vae.downscale_factor * height, vae.downscale_factor * width


class StepBar(Protocol):
    """What counts the steps of a sampler, such as a progress bar."""

    def update(self) -> object:
        """Counts one step; on CPUs and GPUs an exception ends the running sampler, whose caller gets JAX's error."""
        ...


_bars: dict[int, StepBar] = {}
_numbers = itertools.count()


@contextlib.contextmanager
def watched_steps(bar: StepBar, watch: bool) -> Iterator[np.ndarray | None]:
    """The number under which a running program finds its progress bar: compiled programs outlive bars."""
    if not watch:
        yield None
        return
    number = next(_numbers)
    _bars[number] = bar
    try:
        yield np.asarray(number, np.int32)
    finally:
        jax.effects_barrier()
        del _bars[number]


# At module level, so that what is compiled outlives a TextToImage: a checkpoint with other weights compiles nothing.


@partial(jax.jit, static_argnums=8)
def _sampler(bank, table, solver, keys, text, empty, blank, own, shape, bar):
    def update():
        def count(number) -> None:
            _bars[int(number)].update()

        if bar is not None:
            jax.debug.callback(count, bar)

    return sample(bank, table, solver, keys, text, empty, shape, blank=blank, own_prompts=own, each_step=update)


@partial(jax.jit, static_argnums=(0, 1, 3, 4))
def _image_sampler(config, graphdef, params, shape, shards, *inputs):
    latents = _sampler(*inputs, shape, None)
    return to_bytes(decode_latents(Network(config, graphdef, params), latents, shards=shards))


@jax.jit
def to_bytes(images: jax.Array) -> jax.Array:
    """Images as they are stored, uint8, of images in [0, 1]; on the device, which has a quarter to send then."""
    return jnp.round(255 * images).astype(jnp.uint8)
