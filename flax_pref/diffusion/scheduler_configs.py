"""From a checkpoint's `scheduler_config.json` to a solver: classes, their fields and defaults, and names of solvers."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from flax_pref.diffusion import exponential_solvers, sigma_solvers, timestep_solvers
from flax_pref.diffusion.noise_levels import SIGMAS, SPACINGS, Spacing
from flax_pref.diffusion.schedule import NoiseSchedule
from flax_pref.diffusion.solvers import Solver


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One function that makes tables, and how it reads a file.

    Attributes:
        build: the function.
        fields: that it takes as arguments, with the values where a file leaves them out: those of diffusers.
        only: values of other fields that its table is right for, if a file has them.
        values: what the values of a field mean as an argument; others are refused.
        sigmas: "fields" where a file can ask for other sigmas, "flag" where only a user can.
        share: name of the argument that is `eta`; its value where no one gives one is that of the function.
    """

    build: Callable[..., Solver]
    fields: Mapping[str, Any]
    only: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    values: Mapping[str, Mapping[Any, Any]] = dataclasses.field(default_factory=dict)
    sigmas: str | None = None
    share: str | None = None


NO = (None, False)
NOT_CLIPPED = {"clip_sample": (False,)}
ORDERS = {1: 1, 2: 2, 3: 3}
STRIDES = {"timestep_spacing": "leading", "steps_offset": 0}
LAID_OUT = {"timestep_spacing": "linspace", "steps_offset": 0}
NO_FLOW = {"use_flow_sigmas": NO, "use_dynamic_shifting": NO}
DPM_ONLY = {**NO_FLOW, "lambda_min_clipped": (-float("inf"),), "use_lu_lambdas": NO, "variance_type": (None,)}
DPM_TYPES = {"midpoint": "midpoint", "heun": "heun", **dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint")}
UNIPC_TYPES = {"bh1": "bh1", "bh2": "bh2", **dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")}

KINDS = {
    "ddim": Kind(
        build=timestep_solvers.ddim,
        fields={**STRIDES, "set_alpha_to_one": True},
        only=NOT_CLIPPED,
        share="eta",
    ),
    "ddpm": Kind(
        build=timestep_solvers.ddpm,
        fields={**STRIDES, "variance_type": "fixed_small"},
        only=NOT_CLIPPED,
        values={"variance_type": {name: name for name in ("fixed_small", "fixed_small_log", "fixed_large")}},
    ),
    "deis": Kind(
        build=exponential_solvers.deis,
        fields={**LAID_OUT, "solver_order": 2, "lower_order_final": True},
        only={
            **NO_FLOW,
            "algorithm_type": ("deis", "dpmsolver", "dpmsolver++"),
            "solver_type": ("logrho", "midpoint", "heun", "bh1", "bh2"),
        },
        values={"solver_order": ORDERS},
        sigmas="fields",
    ),
    "dpm++": Kind(
        build=exponential_solvers.dpmpp,
        fields={
            **LAID_OUT,
            "solver_order": 2,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "final_sigmas_type": "zero",
            "lower_order_final": True,
            "euler_at_final": False,
        },
        only=DPM_ONLY,
        values={
            "solver_order": ORDERS,
            "solver_type": DPM_TYPES,
            "algorithm_type": {"dpmsolver++": False, "deis": False, "sde-dpmsolver++": True},
        },
        sigmas="fields",
    ),
    "dpm++_2s": Kind(
        build=exponential_solvers.dpmpp_single,
        fields={
            "solver_order": 2,
            "solver_type": "midpoint",
            "final_sigmas_type": "zero",
            "lower_order_final": False,
        },
        only={**DPM_ONLY, "algorithm_type": ("dpmsolver++", "deis")},
        values={"solver_order": ORDERS, "solver_type": DPM_TYPES},
        sigmas="fields",
    ),
    "euler": Kind(
        build=sigma_solvers.euler,
        fields={**LAID_OUT, "final_sigmas_type": "zero"},
        only={
            "interpolation_type": (None, "linear"),
            "sigma_max": (None,),
            "sigma_min": (None,),
            "timestep_type": (None, "discrete"),
        },
        sigmas="fields",
    ),
    "euler_a": Kind(build=sigma_solvers.euler_ancestral, fields=LAID_OUT, sigmas="flag"),
    "heun": Kind(build=sigma_solvers.heun, fields=LAID_OUT, only=NOT_CLIPPED, sigmas="fields"),
    "lcm": Kind(
        build=timestep_solvers.lcm,
        fields={"original_inference_steps": 50, "timestep_scaling": 10.0},
        only=NOT_CLIPPED,
    ),
    "lms": Kind(build=sigma_solvers.lms, fields=LAID_OUT, sigmas="fields"),
    "pndm": Kind(
        build=timestep_solvers.pndm,
        fields={**STRIDES, "set_alpha_to_one": False},
        only={"skip_prk_steps": (True,)},
    ),
    "tcd": Kind(
        build=timestep_solvers.tcd,
        fields={"original_inference_steps": 50},
        only=NOT_CLIPPED,
        share="gamma",
    ),
    "unipc": Kind(
        build=exponential_solvers.unipc,
        fields={
            **LAID_OUT,
            "solver_order": 2,
            "solver_type": "bh2",
            "final_sigmas_type": "zero",
            "lower_order_final": True,
        },
        only={
            **NO_FLOW,
            "disable_corrector": (None, []),
            "predict_x0": (True,),
            "sigma_max": (None,),
            "sigma_min": (None,),
            "solver_p": (None,),
        },
        values={"solver_order": ORDERS, "solver_type": UNIPC_TYPES},
        sigmas="fields",
    ),
}

# The kind of each scheduler class, and what the class takes for fields of `only` that a file leaves out.
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIMScheduler": ("ddim", {"clip_sample": True}),
    "DDPMScheduler": ("ddpm", {"clip_sample": True}),
    "DEISMultistepScheduler": ("deis", {}),
    "DPMSolverMultistepScheduler": ("dpm++", {}),
    "DPMSolverSinglestepScheduler": ("dpm++_2s", {}),
    "EulerAncestralDiscreteScheduler": ("euler_a", {}),
    "EulerDiscreteScheduler": ("euler", {}),
    "HeunDiscreteScheduler": ("heun", {}),
    "LCMScheduler": ("lcm", {}),
    "LMSDiscreteScheduler": ("lms", {}),
    "PNDMScheduler": ("pndm", {"skip_prk_steps": False}),
    "TCDScheduler": ("tcd", {}),
    "UniPCMultistepScheduler": ("unipc", {}),
}

# The kind that each name stands for, and fields that the name decides, whatever the file says.
TWO_M = {"solver_order": 2, "solver_type": "midpoint", "algorithm_type": "dpmsolver++"}
KARRAS = {"use_karras_sigmas": True, "use_exponential_sigmas": False, "use_beta_sigmas": False}
NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("ddim", {}),
    "ddpm": ("ddpm", {"variance_type": "fixed_small"}),
    "deis": ("deis", {"algorithm_type": "deis"}),
    "dpm++": ("dpm++", TWO_M),
    "dpm++_karras": ("dpm++", TWO_M | KARRAS),
    "dpm++_sde": ("dpm++", TWO_M | {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_2s": ("dpm++_2s", TWO_M),
    "dpm++_3m": ("dpm++", TWO_M | {"solver_order": 3}),
    "dpm++_3m_sde": ("dpm++", TWO_M | {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    "euler": ("euler", {}),
    "euler_a": ("euler_a", {}),
    "euler_karras": ("euler", KARRAS),
    "heun": ("heun", {}),
    "lcm": ("lcm", {}),
    "lms": ("lms", {}),
    "pndm": ("pndm", {"skip_prk_steps": True}),
    "tcd": ("tcd", {}),
    "unipc": ("unipc", {}),
}
ARGUMENTS = {"timestep_spacing": "spacing", "solver_order": "order", "algorithm_type": "sde"}
SIGMA_FIELDS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}


def solver_from_config(
    scheduler_config: Mapping[str, Any],
    steps: int,
    *,
    name: str | None = None,
    eta: float | None = None,
    sigmas: str | None = None,
    spacing: Spacing | None = None,
) -> Solver:
    """The solver that a checkpoint's scheduler asks for, or another one over the same noise schedule.

    Fields that the file leaves out take the defaults of the diffusers class of the *solver*, as diffusers itself does
    when one scheduler is made from another's config. Where the last timestep has no signal, sampling must begin there:
    "leading" spacing of a file is then read as "trailing", with a warning.

    Args:
        scheduler_config: the parsed `scheduler_config.json`.
        steps: S, from 1 to the number of training timesteps.
        name: one of `NAMES`, see docs/solvers.md; None for the solver that the file's `_class_name` names.
        eta: share of new noise in a step: of ddim, by default 0, or gamma of tcd, by default 0.3.
        sigmas: one of `noise_levels.SIGMAS`; None for those that the file asks for.
        spacing: "leading", "trailing", "linspace" or the timesteps themselves; None for that of the file.

    Raises:
        ValueError: a name, class or field that is not supported, or an argument out of its range.

    Example:
        >>> pipeline = fp.load_pipeline("demo")
        >>> solver = fp.solver_from_config(pipeline.scheduler_config, 25, name="dpm++", sigmas="karras")
        >>> len(solver.timesteps)
        25
        >>> draw = fp.TextToImage(pipeline, solver)
    """
    class_name = scheduler_config.get("_class_name")
    known = isinstance(class_name, str) and class_name in CLASSES
    if name is None and not known:
        raise ValueError(
            f"scheduler_config: _class_name={class_name!r:.80} is not supported; supported: "
            f"{' or '.join(CLASSES)}; pass as name one of {', '.join(NAMES)} to sample with that instead"
        )
    if name is not None and name not in NAMES:
        raise ValueError(f"solver: name must be one of {', '.join(NAMES)}, got {name!r}")
    own, missing = CLASSES[str(class_name)] if known else (None, {})
    kind_name, decided = (str(own), {}) if name is None else NAMES[name]
    kind, shown = KINDS[kind_name], name or kind_name
    values = {**(missing if own == kind_name else {}), **scheduler_config, **decided}
    _check_fields(kind, values, shown)
    schedule = NoiseSchedule.from_dict(scheduler_config)
    arguments = {
        ARGUMENTS.get(field, field): _argument(kind, field, values.get(field, default))
        for field, default in kind.fields.items()
    }
    _check_offset(values.get("steps_offset", 0), schedule.num_train_timesteps)
    if spacing is not None:
        arguments["spacing"] = spacing
    elif schedule.rescale_betas_zero_snr and arguments.get("spacing") == "leading":
        warnings.warn(
            "scheduler_config: timestep_spacing='leading' is read as 'trailing': with rescale_betas_zero_snr, sampling "
            "must begin at the last timestep (arXiv:2305.08891); ask for the spacing to choose another one",
            stacklevel=2,
        )
        arguments["spacing"] = "trailing"
    if (levels := _sigmas(kind, values, sigmas, shown)) is not None:
        arguments["sigmas"] = levels
    if eta is not None and kind.share is not None:
        arguments[kind.share] = eta
    solver = kind.build(schedule, steps, **arguments)
    if kind.share is None and eta is not None and (eta or solver.stochastic):
        draws = "draws as much noise as it needs" if solver.stochastic else "draws no noise"
        raise ValueError(f'solver: eta={eta} applies to ddim and tcd only, {shown} {draws}; pass name="ddim"')
    return solver


def scheduler_config_of(
    scheduler_config: Mapping[str, Any],
    *,
    name: str | None = None,
    sigmas: str | None = None,
    spacing: str | None = None,
) -> dict[str, Any]:
    """The file from which diffusers makes the scheduler that `solver_from_config` makes a solver of.

    Args:
        scheduler_config, name: as for `solver_from_config`.
        sigmas: "karras", "exponential" or "beta"; None for those that the file asks for.
        spacing: "leading", "trailing" or "linspace"; None for that of the file.
    """
    config = dict(scheduler_config)
    if name is not None:
        kind, decided = NAMES[name]
        classes = {own: class_name for class_name, (own, _) in CLASSES.items()}
        config |= {**decided, "_class_name": classes[kind]}
    if sigmas is not None:
        config |= {field: level == sigmas for field, level in SIGMA_FIELDS.items()}
    if spacing is not None:
        config["timestep_spacing"] = spacing
    return config


def _check_fields(kind: Kind, values: Mapping[str, Any], name: str) -> None:
    """That a file says nothing that would change the table and is not supported."""
    supported = {**kind.only, **{field: tuple(meanings) for field, meanings in kind.values.items()}}
    for field, expected in supported.items():
        if field in values and not any(values[field] == one and type(values[field]) is type(one) for one in expected):
            raise ValueError(
                f"scheduler_config: {field}={values[field]!r:.80} is not supported with {name}; supported: "
                f"{' or '.join(map(repr, expected))}"
            )


def _argument(kind: Kind, field: str, value: Any) -> Any:
    """What a field's value means as an argument; its type is that of the default."""
    default = kind.fields[field]
    if value is None and default is False:
        value = False
    if isinstance(default, float):
        fits = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    else:
        fits = type(value) is type(default)
    if not fits:
        kinds = {bool: "True or False", int: "an integer", str: "a name", float: "a number above 0"}
        expected = " or ".join(SPACINGS) if field == "timestep_spacing" else kinds[type(default)]
        raise ValueError(f"scheduler_config: {field}={value!r:.80} is not supported; supported: {expected}")
    return kind.values[field][value] if field in kind.values else value


def _check_offset(offset: Any, num_train_timesteps: int) -> None:
    if type(offset) is not int or not 0 <= offset < num_train_timesteps:
        raise ValueError(
            f"scheduler_config: steps_offset={offset!r:.80} is not supported; supported: integers from 0 to "
            f"{num_train_timesteps - 1}"
        )


def _sigmas(kind: Kind, values: Mapping[str, Any], asked: str | None, name: str) -> str | None:
    """The sigmas that a user or a file asks for."""
    if asked is not None:
        if asked not in SIGMAS:
            raise ValueError(f"solver: sigmas must be one of {', '.join(SIGMAS)}, got {asked!r}")
        if kind.sigmas is None:
            expected = ", ".join(name for name, (own, _) in NAMES.items() if KINDS[own].sigmas is not None)
            raise ValueError(f"solver: sigmas={asked} applies to {expected}, not to {name}; leave it out")
        return asked
    if kind.sigmas != "fields":
        return None
    for field in SIGMA_FIELDS:
        if values.get(field) not in (None, False, True):
            raise ValueError(
                f"scheduler_config: {field}={values[field]!r:.80} is not supported; supported: True or False"
            )
    found = [field for field in SIGMA_FIELDS if values.get(field)]
    if len(found) > 1:
        raise ValueError(f"scheduler_config: {found[0]} and {found[1]} are both true; expected one of them")
    return SIGMA_FIELDS[found[0]] if found else None
