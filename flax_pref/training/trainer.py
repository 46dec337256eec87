"""The trainer: one loop for every method, from one CPU to many hosts, that resumes after any kill.

runs/dpo/config.json       what the run is
runs/dpo/checkpoints/      what it resumes from
runs/dpo/metrics.jsonl     what it has seen, and tensorboard/, samples/, profile/
runs/dpo/modules/          what it has trained
"""

import contextlib
import dataclasses
import hashlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from flax_pref.checkpoints.checkpoint import Checkpoint, Pipeline
from flax_pref.checkpoints.diffusers import open_model
from flax_pref.checkpoints.model_flags import PLACES, ModelFlags
from flax_pref.checkpoints.module_info import ModuleInfo
from flax_pref.checkpoints.modules import PICKLED, SAFE, fingerprint
from flax_pref.checkpoints.weights import abstract_network
from flax_pref.config import UserError, check_least, check_output_folder, check_seed, dump_config, public
from flax_pref.data.buckets import size_text
from flax_pref.data.consensus import Consensus
from flax_pref.data.pipeline import InputConfig, PairBatches
from flax_pref.data.prepared import EMPTY, PreparedSet, Records
from flax_pref.data.prompts import Prompt, read_prompts
from flax_pref.diffusion.latents import draw_latents, latent_modes
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.text_to_image import to_bytes
from flax_pref.files import one_writer, replacing, writing
from flax_pref.methods import Method, OnlineMethod, PairMethod
from flax_pref.models.attention import Kernel
from flax_pref.models.network import Network, with_attention, with_remat
from flax_pref.models.platform import default_dtype
from flax_pref.models.remat import Remat
from flax_pref.models.unet import UNetConfig
from flax_pref.parallel.agreement import Content, agree, begin_together, flat
from flax_pref.parallel.memory import budget, memory_limit, total_text
from flax_pref.parallel.mesh import TRAINING_AXES, make_mesh
from flax_pref.parallel.peak import compile_and_count, peak_of
from flax_pref.parallel.pieces import in_pieces
from flax_pref.parallel.sharding import attention_heads, batch_sharding, like_params, partition, shardings
from flax_pref.parallel.signals import PREEMPTED, StopTogether, exits_by, stopped_by
from flax_pref.rewards.remote import remote_errors
from flax_pref.rewards.reward import check_rewards, has_gradients, make_reward
from flax_pref.training.checkpoints import RunCheckpoints, read_part
from flax_pref.training.export import ExportConfig, export_modules, load_exported, summary
from flax_pref.training.networks import LoRA, Weights, trained_networks
from flax_pref.training.optimizers import OptimizerConfig
from flax_pref.training.records import Profile, Recorder, last_recorded
from flax_pref.training.rollouts import Rollouts, check_gradients, check_update, minibatches
from flax_pref.training.samples import SampleConfig, Samples
from flax_pref.training.sources import BatchSource, OnlineConfig, Pairs, encode_online_prompts
from flax_pref.training.step import Independent, TrainState, make_step, new_state
from flax_pref.training.trackers import RunTracker, TrackerName, find_package

PATIENCE = 10  # steps in a row that are not finite, which end a run


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a killed run resumes from."""

    every: int = 100
    """Steps between two checkpoints; a kill loses fewer, SIGTERM none."""
    keep: int = 2
    """How many of the newest to keep."""
    keep_every: int | None = None
    """Keep those of steps that this number divides, too, forever."""

    def __post_init__(self):
        check_least(self, 1, "every", "keep", "keep_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A window of steps that JAX's profiler records."""

    first: int | None = None
    """Step to begin with, counted from 1; None: none is recorded."""
    steps: int = 3

    def __post_init__(self):
        check_least(self, 1, "first", "steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelFlags):
    """Trains preference modules.

    Example:
        >>> from pathlib import Path
        >>> config = fp.TrainConfig(
        ...     output=Path("runs/dpo"),
        ...     model="sd15",  # a folder, a Hub id, or "demo"
        ...     method=fp.DiffusionDPO(beta=2000.0),
        ...     data=Path("runs/prepared"),
        ...     input=fp.InputConfig(batch_size=32, caption_dropout=0.2),
        ...     optimizer=fp.OptimizerConfig(learning_rate=1e-4),
        ...     steps=1000,
        ... )
    """

    output: Path
    """Folder of the run. Where it holds checkpoints, the run resumes from the newest one."""
    method: Method
    data: Path | None = None
    """Of methods that train on pairs: folder of a prepared set, as train.encode writes it."""
    input: InputConfig | None = None
    """Of methods that train on pairs: how these become batches."""
    consensus: Consensus = dataclasses.field(default_factory=Consensus)
    """Of methods that train on pairs: which to train on, by how many rewards agree with their label."""
    online: OnlineConfig | None = None
    """Of online methods: what is drawn and judged."""

    weights: Weights = "lora"
    """Train adapters, or a network with weights of its own for each module."""
    lora: LoRA = dataclasses.field(default_factory=LoRA)
    optimizer: OptimizerConfig
    steps: int
    accumulation: int = 1
    """Parts of a batch whose gradients are computed one after another: as many times less memory for activations."""
    average_decay: float = 0.0
    """Of an exponential moving average of what is trained, which is then drawn from and exported; 0: none."""
    latents: Literal["sample", "mode"] = "sample"
    """Latents of an image: a new draw from the autoencoder's distribution at each step, or its most likely value."""
    seed: int = 0
    """Of the order of pairs, adapters, timesteps and noise."""
    init_from: Path | None = None
    """Begin with the modules of another run: its folder (the newest checkpoint), or one with exported modules."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What networks compute in; auto: bfloat16 on TPUs and GPUs, float32 on CPUs. What is trained is always kept
    in float32."""
    attention: Kernel = "auto"
    remat: Remat = "none"
    """block: the backward pass computes the activations inside each block of the UNet again, for less memory."""
    mesh: str = "data=-1"
    """How to use all devices: data and fsdp divide the batch, fsdp large parameters too, tensor layers; -1: the rest of
    the devices."""
    hosts: str | None = None
    """None: joins the other processes of a TPU pod, Slurm or Open MPI, where there are any; or auto, none, or
    ADDRESS:PORT,PROCESSES,NUMBER, see `parallel.hosts.join`."""
    host_timeout: int = 120
    """Seconds after which the others end when a host no longer answers."""

    checkpoints: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    samples: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)
    export_only: bool = False
    """Train nothing; write the modules of the newest checkpoint."""
    record_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    track: TrackerName | None = None
    """Experiment tracker that gets metrics and sample images too: wandb or trackio, each an extra of this package
    (default: none). Environment variables of the tracker say where it sends them, e.g. WANDB_MODE=offline."""
    track_project: str = "flax_pref"
    """Project of the tracker."""
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)

    def __post_init__(self):
        for field in ("steps", "accumulation", "record_every", "host_timeout"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected at least 1")
        check_seed(self.seed)
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay is {self.average_decay}; expected 0 to 1, without 1")
        name, online = type(self.method).__name__, isinstance(self.method, OnlineMethod)
        if online != (self.online is not None) or online == (self.data is not None and self.input is not None):
            needed = "online, and neither data nor input" if online else "data and input, and not online"
            raise ValueError(f"method {name} needs {needed}: see the configs of this method")
        if self.online is not None:
            assert isinstance(self.method, OnlineMethod)
            check_update(self.method, self.online.rollouts)
            for reward in self.online.rewards:
                check_gradients(self.method, reward.name, has_gradients(reward))
            if self.method.old is not None and self.average_decay:
                raise ValueError(
                    f"average_decay is {self.average_decay}; expected 0: {name} keeps an average of its own"
                )
        if online and self.consensus.rewards:
            raise ValueError(
                f"consensus: is of a prepared set, but method {name} trains on its own images; leave it out"
            )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"a batch of {self.batch_size} cannot be divided into accumulation={self.accumulation} parts; choose a "
                "multiple"
            )

    @property
    def batch_size(self) -> int:
        """Pairs, or steps of trajectories, in a batch of all devices together."""
        if self.online is not None:
            return self.online.rollouts.batch_size
        assert self.input is not None  # see above: a config has one of the two
        return self.input.batch_size


# What may change when a run resumes: it makes the same steps, up to rounding.
FREE = (
    *("output", "dtype", "attention", "remat", "mesh", "hosts", "host_timeout", "checkpoints", "samples", "export"),
    *("export_only", "record_every", "track", "track_project", "profile"),
)
FREE_OF_INPUT = ("threads", "prefetch", "workers")
# What may differ between hosts. Inputs may lie elsewhere on each: `contents_of` has what must be alike of them.
FREE_OF_HOSTS = (
    *("hosts", "host_timeout", "data", *PLACES, "init_from", "online.prompts"),
    *(f"input.{name}" for name in FREE_OF_INPUT),
)


def fields_of(config: TrainConfig) -> dict[str, Any]:
    """The fields of a config, and the name of its method."""
    fields = dataclasses.asdict(config)
    return fields | {"method": {"name": type(config.method).__name__, **fields["method"]}}


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """What the steps of a run depend on."""
    settings = {name: value for name, value in fields_of(config).items() if name not in FREE}
    if config.input is not None:
        settings["input"] = {name: value for name, value in settings["input"].items() if name not in FREE_OF_INPUT}
    if not config.consensus.rewards:  # as before there was such a field
        del settings["consensus"]
    if config.optimizer.schedule == "constant":
        del settings["steps"]  # such a run can be made longer
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


def contents_of(
    config: TrainConfig, checkpoint: Checkpoint, records: Records | None, prompts: Sequence[Prompt]
) -> dict[str, Content]:
    """What the files hold that a run reads, by the names of the settings; see `FREE_OF_HOSTS`.

    Args:
        config: of the run.
        checkpoint: the base.
        records: the prepared set, if there is one.
        prompts: of an online run.
    """
    names = ["unet", "vae", "scheduler"]
    if config.online or config.samples.every:  # images are drawn
        names += checkpoint.text_encoders
    parts = checkpoint.contents(names)
    contents = {f"model.{name}": Content(path, fingerprint(path)) for name, path in parts.items()}
    if records is not None and config.data is not None:
        contents["data"] = Content(config.data, records.fingerprint)
    if config.init_from is not None:
        contents["init_from"] = Content(config.init_from, fingerprint(config.init_from))
    if config.online is not None:
        texts = json.dumps([(prompt.id, prompt.text) for prompt in prompts])
        contents["online.prompts"] = Content(config.online.prompts, hashlib.sha256(texts.encode()).hexdigest())
        for reward in config.online.rewards:
            if reward.path is not None and (path := Path(reward.path).expanduser()).exists():
                contents[f"online.rewards.{reward.name}"] = Content(path, fingerprint(path, SAFE + PICKLED))
    return contents


# ----------------------------------------------------------------------------------------------------------------------
# A run


def train(config: TrainConfig, *, records: Records | None = None) -> None:
    """Trains until the last step, then writes the modules; resumes from the newest checkpoint, if any.

    Args:
        config: of the run.
        records: encoded pairs in memory, which replace the prepared set of `config.data`.

    Raises:
        UserError, ValueError, OSError: what the config asks for cannot be had.
        FloatingPointError: too many steps in a row were not finite.
        SystemExit: with `PREEMPTED`, after SIGTERM; what has been trained is saved.

    Example:
        >>> from pathlib import Path
        >>> config = fp.TrainConfig(
        ...     output=Path("runs/dpo"),
        ...     model="sd15",  # a folder, a Hub id, or "demo"
        ...     method=fp.DiffusionDPO(beta=2000.0),
        ...     data=Path("runs/prepared"),
        ...     input=fp.InputConfig(batch_size=2),
        ...     optimizer=fp.OptimizerConfig(learning_rate=1e-4),
        ...     steps=1,
        ... )
        >>> fp.train(config)
        >>> Path("runs/dpo/modules/dpo.safetensors").exists()
        True
    """
    begin_together(config, FREE_OF_HOSTS)
    writes = jax.process_index() == 0
    if writes:
        check_output_folder(config.output)
        if config.track is not None:
            find_package(config.track)
    kept = {"keep": config.checkpoints.keep, "keep_every": config.checkpoints.keep_every}
    with (
        exits_by(signal.SIGTERM),
        remote_errors(),
        one_writer(config.output) if writes else contextlib.nullcontext(),
        RunCheckpoints(config.output / "checkpoints", settings_of(config), **kept) as checkpoints,
    ):
        run = Run(config, checkpoints, records)
        with run.open_source() as source:
            state, first = run.begin(source)
            if writes:
                file = config.output / "config.json"
                with writing(file), replacing(file) as unfinished:
                    dump_config(fields_of(config), unfinished)
            if config.export_only and first == 0:
                raise UserError(f"{checkpoints.folder}: no checkpoint that is whole; expected one to write modules of")
            if first < config.steps and not config.export_only:
                with run.tracked() as tracker:
                    state = run.train(state, first, source, tracker)
        run.export(state, config.output / "modules")


class Program:
    """What a run computes: networks on a mesh, the state that is trained, and the step.

    All of it follows from shapes: there are no weights in here, so a run can be planned without any, for a machine that
    is not there.

    Attributes:
        base: the network that training begins from, with shapes and their shardings instead of parameters.
        trained: the networks of the run.
        shapes: of the state, with their shardings.
        frozen: shapes of what `frozen_of` keeps of the base.
        dtype: what networks compute in.
        param_dtype: what the base is kept in.
        independent: how parameters hold modules that are trained independently, see `training.step`; None: there are
            none.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, unet: UNetConfig):
        """Computes nothing.

        Args:
            config: of the run.
            mesh: with axes of `TRAINING_AXES`.
            unet: of the base.

        Raises:
            ValueError: the batch cannot be divided over the mesh, or the config of the network contradicts itself.
        """
        check_batch(config, mesh)
        self.config, self.mesh, self._heads = config, mesh, attention_heads(unet)
        with jax.set_mesh(mesh):
            self.dtype = jnp.dtype(default_dtype(config.dtype))
        # What is frozen is kept in what networks compute in; weights that are trained begin from float32.
        self.param_dtype = self.dtype if config.weights == "lora" else jnp.float32
        base = abstract_network("unet", unet, self.dtype, param_dtype=self.param_dtype)
        placed = shardings(base.params, mesh, heads=self._heads)
        base = base._replace(params=jax.tree.map(_with_sharding, base.params, placed))
        self.base = with_remat(with_attention(base, config.attention), config.remat)
        self.optimizer = config.optimizer.build(config.steps)
        modules = config.method.modules
        self.old = config.method.old if isinstance(config.method, OnlineMethod) else None
        self.trained, self._first_params = trained_networks(
            self.base, modules, config.weights, config.lora, old=self.old
        )
        several = len(modules) > 1
        apart = isinstance(config.method, PairMethod) and config.method.independent
        self.independent: Independent | None = self.trained.independent if several and apart else None
        state = jax.eval_shape(self.new_state, self.base.params, jax.random.key(0))
        # Networks are divided alike, wherever their names stand in the path of a leaf.
        params = state.params if config.weights == "lora" else state.params[modules[0]]
        self.shapes = jax.tree.map(_with_sharding, state, like_params(state, params, mesh, heads=self._heads))
        frozen = jax.eval_shape(self.frozen_of, self.base.params)
        self.frozen = jax.tree.map(_with_sharding, frozen, placed) if frozen else frozen

    def place(self, path: tuple, shape: tuple[int, ...]) -> NamedSharding:
        """Where a parameter of the base goes; see `checkpoints.weights.Placement`."""
        return NamedSharding(self.mesh, partition(".".join(map(str, path)), shape, self.mesh, heads=self._heads))

    def new_state(self, params: dict, key: jax.Array) -> TrainState:
        """The state before the first step, from parameters of the base; to be jitted."""
        return new_state(
            self._first_params(params, key),
            self.optimizer,
            key,
            averaged=self.config.average_decay > 0 or self.old is not None,
            independent=self.independent,
        )

    def frozen_of(self, params: dict) -> Any:
        """What is kept of the base for modules to be compared with and images to be drawn with, as networks compute."""
        config = self.config
        if config.weights == "lora":
            return params
        if not (config.method.reference or config.online or config.samples.every):
            return {}
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype), params)

    @property
    def shardings(self) -> TrainState:
        """Of the state."""
        return jax.tree.map(lambda shape: shape.sharding, self.shapes)

    def pair_objective(self, schedule: NoiseSchedule, empty: Mapping[str, Any], scaling_factor: float) -> Callable:
        """`(params, frozen, batch, key) -> (loss, metrics)` of batches of pairs.

        Args:
            schedule: of the base.
            empty: conditioning on no caption.
            scaling_factor: of the autoencoder.
        """
        config, method = self.config, self.config.method
        assert isinstance(method, PairMethod)  # one without `TrainConfig.online`
        empty = {name: jnp.asarray(array) for name, array in empty.items()}
        drawn = config.latents == "sample"

        def objective(params, frozen, batch, key):
            key, latents_key = jax.random.split(key)
            batch = draw_latents(batch, latents_key, scaling_factor) if drawn else latent_modes(batch, scaling_factor)
            return method.loss(self.trained.predict(params, frozen), batch, key, schedule=schedule, empty=empty)

        return objective

    def online_objective(self) -> Callable:
        """The same of examples that the run draws itself."""
        method = self.config.method
        assert isinstance(method, OnlineMethod)  # one with `TrainConfig.online`

        def objective(params, frozen, batch, key):
            frozen, old = (frozen, None) if self.old is None else frozen
            return method.loss(self.trained.predict(params, frozen, old), batch, key)

        return objective

    def average_decay(self) -> float | Callable[[jax.Array], jax.Array]:
        """Of the moving average; that of an old policy changes after each iteration."""
        config, method = self.config, self.config.method
        if self.old is None:
            return config.average_decay
        assert isinstance(method, OnlineMethod) and config.online is not None
        every = minibatches(method, config.online.rollouts)
        return lambda number: jnp.where(number % every == 0, method.kept(number), 1.0)

    def drawn_with(self, state: TrainState) -> Any:
        """The modules that an online method draws its images with."""
        return state.params if self.old is None else state.average

    def result(self, state: TrainState) -> Any:
        """The modules that are shown and written: their moving average, if the config asks for one."""
        return state.params if not self.config.average_decay else state.average

    def step(self, objective: Callable) -> Any:
        """`(state, frozen, batch) -> (state, metrics)`, jitted; to be called while the mesh is set."""
        config = self.config
        step = make_step(
            objective,
            self.optimizer,
            config.optimizer.rate(config.steps),
            accumulation=config.accumulation,
            average_decay=self.average_decay(),
            sees_average=self.old is not None,
            shardings=self.shardings.params,
            independent=self.independent,
            modules=self.trained.modules,
        )
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, whole))


def held_by(state: TrainState, frozen: Any, batch: Any) -> dict[str, Any]:
    """What devices hold between steps, by name; see `parallel.memory.budget`."""
    return {
        **{"base": frozen, "modules": state.params, "optimizer": state.optimizer},
        **({} if state.average is None else {"average": state.average}),
        **{"batch": batch},
    }


def _with_sharding(shape: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


class Run:
    """One run: networks on a mesh, data, and the loop over its steps."""

    def __init__(self, config: TrainConfig, checkpoints: RunCheckpoints, records: Records | None = None):
        """Reads the base and opens the data; nothing is computed yet."""
        self.config, self.checkpoints = config, checkpoints
        self.mesh = make_mesh(config.mesh, jax.devices(), TRAINING_AXES)
        check_batch(config, self.mesh)
        self.records = open_records(config, records)
        if config.init_from is not None and not config.init_from.is_dir():
            raise UserError(f"{config.init_from}: no such folder; expected a run, or its exported modules: --init-from")
        if config.online is not None:
            check_rewards(config.online.rewards)
        self.checkpoint = open_model(config)
        self.program = Program(config, self.mesh, self.checkpoint.config("unet"))
        self.sizes = {} if self.records is None else self.records.buckets()
        if self.records is not None:
            check_data(self.records, self.program.base.config, config)
            for size in self.sizes:
                self.checkpoint.config("vae").check_size(f"{config.data}: size", size)
        if config.online is not None:
            self.checkpoint.config("vae").check_size("online: size", config.online.size)
        self.prompts = [] if config.online is None else read_prompts(config.online.prompts, column=config.online.column)
        agree(lambda: flat(contents_of(config, self.checkpoint, self.records, self.prompts)))
        self.schedule = schedule_of(self.checkpoint)
        self.base = self._load_base()
        self.frozen = self.program.frozen_of(self.base.params)
        self.judging: dict[str, Any] = {}  # what lies on the devices beside, in an online run
        self.steps: dict[tuple, tuple[Callable, float]] = {}  # that are compiled, by the shapes of their batch

    def _load_base(self) -> Network:
        options = {"param_dtype": self.program.param_dtype, "place": self.program.place}
        unet = self.checkpoint.part("unet").load(self.program.dtype, **options)
        return self.program.base._replace(params=unet.params)

    def begin(self, source: BatchSource) -> tuple[TrainState, int]:
        """The state that the run resumes from, and the number of steps made; puts the source to where it belongs."""
        config, step = self.config, self.checkpoints.latest()
        if step is not None:
            shapes = {"train": self.program.shapes, "source": jax.tree.map(shape_of, source.arrays())}
            saved, position = self.checkpoints.restore(step, shapes)
            source.restore(position, saved["source"])
            state = saved["train"]
            tell(f"{self.checkpoints.folder}: resumes from step {step}")
        else:

            def initial_state(params):  # the key begins in here, for JAX puts no key on the devices of other hosts
                return self.program.new_state(params, jax.random.key(config.seed))

            with jax.set_mesh(self.mesh):
                state = jax.jit(initial_state, out_shardings=self.program.shardings)(self.base.params)
            if config.init_from is not None:
                params = self._params_of(config.init_from)
                average = None if state.average is None else jax.tree.map(jnp.copy, params)
                state = state._replace(params=params, average=average)
        self.base = self.program.base  # without its weights
        return state, step or 0

    def _params_of(self, folder: Path) -> Any:
        """The modules of another run, or exported ones, where those of this run are."""
        tell(f"begins with the modules of {folder}")
        if (folder / "checkpoints").is_dir():
            return read_part(folder / "checkpoints", "['train'].params", self.program.shapes.params)
        return load_exported(folder, self.program.trained, self.base, self.config.lora, self.program.shapes.params)

    # ------------------------------------------------------------------------------------------------------------------
    # Steps

    @contextlib.contextmanager
    def open_source(self) -> Iterator[BatchSource]:
        """The batches of the run."""
        config, sharding = self.config, batch_sharding(self.mesh)
        online = config.online
        if online is None:
            assert self.records is not None and config.input is not None
            with PairBatches(self.records, config.input, seed=config.seed, sharding=sharding) as batches:
                yield Pairs(batches)
        else:
            assert isinstance(config.method, OnlineMethod)
            rollouts = Rollouts(
                config.method,
                self.program.trained.predict,
                self.frozen,
                self.encoders.vae,
                encode_online_prompts(self.prompts, online, self.encoders, self.base.config),
                make_reward(online.rewards, place=in_pieces(self.mesh)),
                self.encoders.scheduler_config,
                online.rollouts,
                size=online.size,
                seed=config.seed,
                sharding=sharding,
                tell=tell,
            )
            self.judging = rollouts.judging
            yield rollouts

    @cached_property
    def encoders(self) -> Pipeline:
        """The checkpoint without its UNet, on a device of this process."""
        return self.checkpoint.load(self.program.dtype, with_unet=False)

    def objective(self) -> Callable:
        """`(params, frozen, batch, key) -> (loss, metrics)` of what the source gives."""
        if self.records is None:
            return self.program.online_objective()
        empty = self.records.conditioning(EMPTY)
        return self.program.pair_objective(self.schedule, empty, self.checkpoint.config("vae").scaling_factor)

    @cached_property
    def _jitted(self) -> Any:
        return self.program.step(self.objective())

    def step_for(self, state: TrainState, batch: Any) -> tuple[Callable, float]:
        """The step for batches of this size, and its floating-point operations; compiled when a size first comes."""
        shapes = shapes_of(batch)
        if shapes not in self.steps:
            self.steps[shapes] = self.compile(state, batch)
        return self.steps[shapes]

    def compile(self, state: TrainState, batch: Any) -> tuple[Callable, float]:
        """The step for this machine, and its floating-point operations; prints what it takes."""
        config, jitted = self.config, self._jitted
        with jax.set_mesh(self.mesh):
            arguments = state, self.frozen, batch
            compiled, flops = compile_and_count(jitted.lower(*arguments), jitted, *arguments)
        held = held_by(state, self.frozen, batch) | self.judging, compiled.memory_analysis(), memory_limit(self.mesh)
        if self.steps:
            tell(f"the step for {self._size_of(batch)} takes {total_text(*held)}")
        else:
            tell(budget(self.mesh, *held))
        return compiled, config.accumulation * flops  # XLA counts one of the parts that a batch is divided into

    def _size_of(self, batch: Any) -> str:
        """Height and width of the images of a batch of pairs, in pixels."""
        _, height, width, _ = batch["winner"].shape
        factor = self.checkpoint.config("vae").downscale_factor
        return size_text((height * factor, width * factor))

    def train(
        self, state: TrainState, first: int, source: BatchSource, tracker: RunTracker | None = None
    ) -> TrainState:
        """The loop, from step `first` to the last."""
        config = self.config
        if len(self.sizes) > 1:
            counts = [f"{len(found)} of {size_text(size)}" for size, found in self.sizes.items()]
            tell(f"pairs of {len(counts)} sizes in pixels (height x width): {', '.join(counts)}")
        batch = source.next(self.program.drawn_with(state))
        self.step_for(state, batch)
        samples = self.samples()
        recorder = Recorder(
            config.output,
            total=config.steps,
            first=first,
            per_step=config.batch_size,
            unit="pair" if self.records is not None else "example",
            chips=self.mesh.size,
            flops=self.step_for(state, batch)[1],
            peak=peak_of(self.mesh.local_devices[0], self.program.dtype.name)[0],
            every=config.record_every,
            tracker=tracker,
        )
        profile = self.profile()
        with recorder, profile, stopped_by(signal.SIGTERM) as come, jax.set_mesh(self.mesh):
            stopping = StopTogether(come)
            for number in range(first + 1, config.steps + 1):
                if batch is None:
                    batch = source.next(self.program.drawn_with(state))
                if shapes_of(batch) not in self.steps:
                    recorder.flush()  # no step's time has the compilation
                step, flops = self.step_for(state, batch)
                profile.at(number, state)
                state, metrics = step(state, self.frozen, batch)
                batch = None
                newest = recorder.add(number, metrics, flops)
                skipped = newest["skipped_in_a_row"] if newest else 0
                if newest and skipped >= PATIENCE:
                    raise FloatingPointError(
                        f"{skipped} steps in a row, up to step {newest['step']}, had a loss or gradients that are not "
                        f"finite; {self.checkpoints.folder} has what was good: lower optimizer.learning-rate, or "
                        "compute in float32"
                    )
                last, told = number == config.steps, stopping()
                if (due(number, config.checkpoints.every) and not skipped) or last or told:
                    recorder.flush()
                    self.checkpoints.save(number, {"train": state, "source": source.arrays()}, source.position())
                if samples is not None and due(number, config.samples.every):
                    recorder.flush()
                    images = samples.draw(self.program.trained.predict(self.program.result(state), self.frozen))
                    recorder.images(number, np.asarray(to_bytes(images)), config.samples.prompts)
                if due(number, config.export.every) and not last:
                    recorder.flush()
                    self.export(state, config.output / "modules" / f"step_{number:06}")
                if told and not last:
                    self.checkpoints.wait()
                    tell(f"told to end: saved step {number}; the same command resumes there")
                    raise SystemExit(PREEMPTED)
        self.checkpoints.wait()
        return state

    @contextlib.contextmanager
    def tracked(self) -> Iterator[RunTracker | None]:
        """The tracker of the run, in the first process, if the config asks for one."""
        config = self.config
        if config.track is None or jax.process_index() != 0:
            yield None
            return
        settings = public(json.loads(json.dumps(fields_of(config), default=str)))
        told = last_recorded(config.output)
        with RunTracker(config.track, config.track_project, config.output, settings, told) as tracker:
            yield tracker

    def profile(self) -> Profile:
        """The window of the profiler; none lies behind the last step."""
        window = self.config.profile
        return Profile(self.config.output, window.first or self.config.steps + 1, window.steps)

    def samples(self) -> Samples | None:
        """What draws the sample images of the run, if there are any."""
        config = self.config
        if config.samples.every is None:
            return None
        rule = config.method.rule(config.samples.w, config.samples.guidance_scale)
        if config.online is not None:
            size = config.online.size
        else:
            assert self.records is not None
            size = self.records.image_size
        return Samples(self.encoders, config.samples, rule, size, self.mesh)

    def export(self, state: TrainState, folder: Path) -> None:
        """Writes the modules."""
        config = self.config
        params = self.program.result(state)
        with writing(folder, "which resumes from the last checkpoint"):
            rest = partial(self.checkpoint.load, with_unet=False)
            info = ModuleInfo(
                name="",
                base=Path(config.model).name,
                method=type(config.method).__name__,
                steps=int(state.step),
                prediction_type=self.schedule.prediction_type,
            )
            modules = self.program.trained, self.base, self.frozen, params, config.lora
            written = export_modules(folder, *modules, config.export, rest, info)
        tell(summary(written))


def open_records(config: TrainConfig, records: Records | None = None) -> Records | None:
    """The pairs of a run, those that a consensus keeps; prints what it keeps.

    Args:
        config: of the run.
        records: pairs in memory, which replace those of `config.data`.

    Raises:
        FileNotFoundError, ValueError: there is no such prepared set, or it is damaged.
        UserError: rewards of the consensus have not scored the set, or it keeps no pair.
    """
    if records is None and config.data is not None:
        records = PreparedSet(config.data)
    if records is not None and config.consensus.rewards:
        records = config.consensus.select(records)
        tell(records.told)
    return records


def schedule_of(checkpoint: Checkpoint) -> NoiseSchedule:
    """The noise schedule that a checkpoint was trained with; a ValueError names its file."""
    try:
        return NoiseSchedule.from_dict(checkpoint.scheduler_config)
    except ValueError as error:
        raise ValueError(f"{checkpoint.described_by}: {error}") from error


def check_data(records: Records, unet: UNetConfig, config: TrainConfig) -> None:
    """That a prepared set was made for networks like this one.

    Raises:
        UserError: it was not.
    """
    text, channels = records.shapes.conditioning, records.shapes.moments[-1] // 2
    kind = ("two text encoders (SDXL)" if "text_embeds" in text else "one text encoder", f"{channels} channels")
    width = text["encoder_hidden_states"][-1]
    sdxl = unet.addition_embed_type == "text_time"
    if channels != unet.in_channels or width != unet.cross_attention_dim or ("text_embeds" in text) != sdxl:
        raise UserError(
            f"{config.data}: was encoded with {kind[0]} of width {width} and latents of {kind[1]}, but {config.model} "
            f"expects width {unet.cross_attention_dim} and {unet.in_channels} channels: encode the set with "
            f"--model {config.model}"
        )


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """That every device has a share of every part of a batch.

    Raises:
        ValueError: it has not; says which batches could be divided.
    """
    parts = config.accumulation * mesh.size // mesh.shape.get("tensor", 1)
    if config.batch_size % parts:
        raise ValueError(
            f"a batch of {config.batch_size} cannot be divided over accumulation={config.accumulation} and the "
            f"mesh {config.mesh!r}; choose a multiple of {parts}"
        )


def due(number: int, every: int | None) -> bool:
    """Whether something that is done every so many steps is done after this one."""
    return every is not None and number % every == 0


def shapes_of(batch: Any) -> tuple[tuple[int, ...], ...]:
    """Shapes of all arrays of a batch."""
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))


def shape_of(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def tell(text: str) -> None:
    """Prints, on one host."""
    if jax.process_index() == 0:
        tqdm.write(text)  # above a progress bar, if there is one
        sys.stdout.flush()
