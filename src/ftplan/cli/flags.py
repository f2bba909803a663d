"""The flags of a job, defined once for ``memory``, ``fit`` and ``check``.

A command takes them all by being decorated with :func:`with_job_flags` and having a parameter
``flags: JobFlags``. :func:`apply_flags` lays them over a plan (or makes one when there is no
file) and says, as assumptions, what they replaced. Every flag acts; one that could not act on
the job at hand is refused and says what it needs.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ftplan.dataclass import dataclass
from ftplan.errors import InputError, UnitError
from ftplan.report import Assumption
from ftplan.spec import (
    Checkpointing,
    Loss,
    Method,
    MethodKind,
    Model,
    Offload,
    OptimizerChoice,
    Plan,
    ShardingKind,
    Task,
)
from ftplan.units import parse_bytes, parse_count, parse_percent

__all__ = ["JobFlags", "apply_flags", "check_values", "with_job_flags"]

_MODEL, _METHOD, _STEP, _WHERE = "Model", "Finetuning", "A step", "Hardware and sharding"
_FILE = "Reading FILE"


def _option(name: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(name, help=help, rich_help_panel=panel, show_default=False, **more)


def _count(name: str, help: str, panel: str, *, most: int = 10**6) -> Any:
    return _option(name, help, panel, min=1, max=most, metavar="N")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFlags:
    """What was given on the command line; ``None`` was not."""

    params: Annotated[
        str | None,
        _option("--params", "Parameter count, as in 13e9 or 13B.", _MODEL, metavar="COUNT"),
    ] = None
    model: Annotated[
        str | None,
        _option("--model", "Catalogue name, alias or hub id.", _MODEL, metavar="NAME"),
    ] = None
    config: Annotated[
        Path | None,
        _option("--config", "A config.json, or a model's folder.", _MODEL, metavar="PATH"),
    ] = None
    hub: Annotated[
        bool | None,
        _option(
            "--hub", "Ask the Hugging Face hub for the model's config.json (extra hub).", _MODEL
        ),
    ] = None
    dtype: Annotated[
        str | None,
        _option(
            "--dtype", "Storage of the base weights: bf16, int8, nf4, ...", _MODEL, metavar="FORMAT"
        ),
    ] = None
    kv_dtype: Annotated[
        str | None,
        _option(
            "--kv-dtype", "Storage of the key-value cache (serving).", _MODEL, metavar="FORMAT"
        ),
    ] = None
    task: Annotated[
        Task | None,
        _option("--task", f"One of {', '.join(typing.get_args(Task))}.", _MODEL, metavar="TASK"),
    ] = None
    stack: Annotated[
        str | None,
        _option(
            "--stack",
            "The trainer whose defaults hold: transformers, trl, axolotl, ...",
            _MODEL,
            metavar="NAME",
        ),
    ] = None
    method: Annotated[
        MethodKind | None,
        _option(
            "--method",
            f"How it is trained: {', '.join(typing.get_args(MethodKind))}. Left out: inference.",
            _METHOD,
            metavar="KIND",
        ),
    ] = None
    trainable: Annotated[
        str | None,
        _option(
            "--trainable", "Trainable parameters of --params: 1e9 or 10%.", _METHOD, metavar="COUNT"
        ),
    ] = None
    last_layers: Annotated[
        int | None, _count("--last-layers", "Train the last N blocks only.", _METHOD)
    ] = None
    rank: Annotated[int | None, _count("--rank", "Rank of the adapter.", _METHOD)] = None
    targets: Annotated[
        str | None,
        _option(
            "--targets",
            "Adapted modules: names with commas, attention, all-linear, or a regular expression.",
            _METHOD,
            metavar="NAMES",
        ),
    ] = None
    modules_to_save: Annotated[
        str | None,
        _option(
            "--modules-to-save", "Modules trained in full, with commas.", _METHOD, metavar="NAMES"
        ),
    ] = None
    adapter_dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        _option("--adapter-dtype", "Storage of the adapter.", _METHOD),
    ] = None
    optimizer: Annotated[
        str | None,
        _option(
            "--optimizer", "An optim name of transformers, or an alias.", _METHOD, metavar="NAME"
        ),
    ] = None
    mixed_precision: Annotated[
        Literal["no", "bf16", "fp16"] | None, _option("--mixed-precision", "Autocast.", _STEP)
    ] = None
    micro_batch: Annotated[
        int | None, _count("--micro-batch", "Sequences per GPU at once.", _STEP)
    ] = None
    seq_len: Annotated[
        int | None, _count("--seq-len", "Tokens per sequence.", _STEP, most=10**9)
    ] = None
    grad_accum: Annotated[
        int | None, _count("--grad-accum", "Micro batches per optimizer step.", _STEP)
    ] = None
    gradient_checkpointing: Annotated[
        bool | None,
        _option(
            "--gradient-checkpointing/--no-gradient-checkpointing", "Recompute activations.", _STEP
        ),
    ] = None
    attention: Annotated[
        Literal["eager", "sdpa", "flash"] | None,
        _option("--attention", "Attention implementation.", _STEP),
    ] = None
    loss: Annotated[
        Literal["full", "chunked", "fused"] | None,
        _option("--loss", "How the loss meets the logits.", _STEP),
    ] = None
    kernels: Annotated[
        Literal["none", "liger", "unsloth", "foak", "automodel"] | None,
        _option("--kernels", "Fused kernels.", _STEP),
    ] = None
    gpu: Annotated[
        str | None, _option("--gpu", "Catalogue name, as in a100-80gb.", _WHERE, metavar="NAME")
    ] = None
    gpus: Annotated[int | None, _count("--gpus", "GPUs in all.", _WHERE)] = None
    nodes: Annotated[int | None, _count("--nodes", "Machines they are in.", _WHERE)] = None
    host_ram: Annotated[
        str | None,
        _option("--host-ram", "Host memory per machine: 512GiB.", _WHERE, metavar="SIZE"),
    ] = None
    headroom: Annotated[
        str | None,
        _option("--headroom", "Share of the GPU to keep free: 5%.", _WHERE, metavar="PERCENT"),
    ] = None
    sharding: Annotated[
        ShardingKind | None,
        _option(
            "--sharding",
            f"How it is spread: {', '.join(typing.get_args(ShardingKind))}.",
            _WHERE,
            metavar="KIND",
        ),
    ] = None
    offload: Annotated[
        Offload | None,
        _option(
            "--offload",
            f"What leaves the GPU: {', '.join(typing.get_args(Offload))}.",
            _WHERE,
            metavar="WHAT",
        ),
    ] = None
    tp: Annotated[int | None, _count("--tp", "Tensor parallel degree.", _WHERE)] = None
    pp: Annotated[int | None, _count("--pp", "Pipeline parallel degree.", _WHERE)] = None
    cp: Annotated[int | None, _count("--cp", "Context parallel degree.", _WHERE)] = None
    ep: Annotated[int | None, _count("--ep", "Expert parallel degree.", _WHERE)] = None
    dp_replicate: Annotated[
        int | None, _count("--dp-replicate", "Replicas of the sharded group.", _WHERE)
    ] = None

    trainer: Annotated[
        str | None,
        _option(
            "--from", "The trainer whose config FILE is, when it is not recognised.", _FILE,
            metavar="TRAINER",
        ),
    ] = None  # fmt: skip
    overlay: Annotated[
        list[Path] | None,
        _option(
            "--overlay", "An accelerate or DeepSpeed file that goes with FILE; repeatable.", _FILE,
            metavar="FILE",
        ),
    ] = None  # fmt: skip

    def given(self) -> dict[str, Any]:
        """The flags about the job that were given, by field name."""
        names = (f.name for f in dataclasses.fields(self))
        values = {n: getattr(self, n) for n in names if n not in ("trainer", "overlay")}
        return {name: value for name, value in values.items() if value is not None}


def with_job_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command every flag of :class:`JobFlags`, handed over as its parameter ``flags``."""
    names = [f.name for f in dataclasses.fields(JobFlags)]

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        flags = JobFlags(**{name: values.pop(name) for name in names})
        return function(flags=flags, **values)

    hints = typing.get_type_hints(JobFlags, include_extras=True)
    own_hints = typing.get_type_hints(function, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        p.replace(annotation=own_hints[p.name], kind=kind)
        for p in inspect.signature(function).parameters.values()
        if p.name != "flags"
    ]
    parameters += [
        inspect.Parameter(name, kind, default=None, annotation=hints[name]) for name in names
    ]
    with_signature: Any = command
    del with_signature.__wrapped__  # or inspect would look at the bare function
    with_signature.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


_ADAPTER_FLAGS = ("rank", "targets", "modules_to_save", "adapter_dtype")
_TRAINING_FLAGS = ("optimizer", "grad_accum", "gradient_checkpointing", "loss")
_FULL_PRECISION = {"fp32", "float32", "tf32", "fp16", "float16", "half", "bf16", "bfloat16", "fp64"}
_SERVING = ("serve",)


def apply_flags(
    plan: Plan | None, flags: JobFlags, *, any_method: bool = False
) -> tuple[Plan, tuple[Assumption, ...]]:
    """The plan with the flags laid over it, and each override of a file as an assumption.

    ``plan`` None: the flags alone make the plan. ``any_method``: the command goes through the
    finetuning methods itself (``fit``), so flags of training need no ``--method``.
    Raises :class:`InputError` for flags that contradict each other or that could not act.
    """
    given = flags.given()
    _refuse_contradictions(given)
    base = plan if plan is not None else Plan(model=Model())
    new = _hardware(_step(_method(_model(base, flags), flags, any_method), flags), flags)
    if not any_method:
        _refuse_idle(new, given)
    if plan is None:
        return new, ()
    return new, _overrides(plan, new)


def check_values(flags: JobFlags) -> None:
    """Refuse flags that no file could be right with: a command of many files asks this first."""
    _refuse_contradictions(flags.given())
    _hardware(Plan(model=Model()), replace(flags, gpus=None, nodes=None))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse_contradictions(given: dict[str, Any]) -> None:
    models = [name for name in ("params", "model", "config") if name in given]
    if len(models) > 1:
        raise InputError(
            f"{_flag(models[0])} and {_flag(models[1])} both name the model",
            remedy="give one of --params, --model and --config",
        )
    if "trainable" in given and "last_layers" in given:
        raise InputError(
            "--trainable and --last-layers both say what is trained",
            remedy="give --last-layers for a model of known shape, --trainable for --params",
        )
    method = given.get("method")
    for name in ("trainable", "last_layers"):
        if name in given and method == "full":
            raise InputError(f"--method full trains everything: {_flag(name)} contradicts it")
    if "last_layers" in given and method not in (None, "partial"):
        raise InputError(
            f"--last-layers belongs to --method partial, not to {method}",
            remedy="leave one of the two out",
        )
    for name in _ADAPTER_FLAGS:
        if name in given and method in ("full", "partial"):
            raise InputError(
                f"{_flag(name)} belongs to an adapter; --method {method} has none",
                remedy="use --method lora or qlora, or leave the flag out",
            )
    if given.get("task") in _SERVING and method is not None:
        raise InputError(f"--task serve trains nothing: --method {method} contradicts it")


def _refuse_idle(plan: Plan, given: dict[str, Any]) -> None:
    """Flags that were parsed but could change nothing are refused: no silent no-op."""
    if plan.method is None or plan.task == "serve":
        idle = [name for name in _TRAINING_FLAGS if name in given]
        if idle:
            raise InputError(
                f"{_flag(idle[0])} acts on training, and this job has no method: it is inference",
                remedy="add --method full, lora, qlora, ...",
            )
    elif "kv_dtype" in given and plan.task not in ("serve", "grpo", "ppo"):
        raise InputError("--kv-dtype acts on serving, and this job trains")


def _parsed(name: str, value: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(value)
    except UnitError as error:
        raise UnitError(f"{_flag(name)}: {error.message}", remedy=error.remedy) from error


def _model(plan: Plan, flags: JobFlags) -> Plan:
    model, precision = plan.model, plan.precision
    if flags.params is not None:
        model = Model(params=_parsed("params", flags.params, parse_count))
    elif flags.model is not None:
        if not flags.model.strip():
            raise InputError("--model is empty", remedy="give a name: ftplan models lists them")
        model = Model(name=flags.model)
    elif flags.config is not None:
        # a plan's paths are relative to its file, a flag's to where the user stands
        model = Model(config=str(flags.config.absolute()))
    if flags.hub:
        model = _from_hub(model)
    if flags.dtype is not None:
        precision = replace(precision, weights=flags.dtype)
    if flags.kv_dtype is not None:
        precision = replace(precision, kv_cache=flags.kv_dtype)
    return replace(
        plan,
        model=model,
        precision=precision,
        task=flags.task or plan.task,
        stack=flags.stack or plan.stack,
    )


def _from_hub(model: Model) -> Model:
    """The model's config.json from the hub, for this run: the only thing that asks a network."""
    import atexit
    import shutil
    import tempfile

    from ftplan.hub import fetch_model

    if model.name is None:
        raise InputError("--hub needs the model's name", remedy="add --model OWNER/NAME")
    folder = Path(tempfile.mkdtemp(prefix="ftplan-hub-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Model(config=str(fetch_model(model.name, folder)))


def _names(text: str) -> tuple[str, ...] | str:
    """``q_proj,v_proj`` as names; one word or a regular expression as it stands."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1 and (text in ("attention", "all-linear") or not text.isidentifier()):
        return text
    if all(part and all(c.isalnum() or c in "_.-" for c in part) for part in parts):
        return tuple(parts)
    return text


def _refuse_bad_expression(text: str) -> None:
    import re

    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(
            f"--targets {text!r} is no regular expression: {error}",
            remedy="write names with commas, attention, all-linear, or mend the expression",
        ) from error


_COMMON = ("rank", "alpha", "targets", "dropout", "adapter_dtype", "modules_to_save",
           "rank_pattern", "layers_to_transform", "target_parameters", "use_rslora")  # fmt: skip


def _method(plan: Plan, flags: JobFlags, any_method: bool) -> Plan:
    method, precision = plan.method, plan.precision
    kind = flags.method
    if kind is None and (flags.trainable is not None or flags.last_layers is not None):
        kind = "partial" if method is None or method.kind in ("full", "partial") else method.kind
    if kind is not None and (method is None or method.kind != kind):
        kept = {}
        if method is not None and kind not in ("full", "partial"):
            kept = {name: getattr(method, name) for name in _COMMON}
        was_quantised = (precision.weights or "bf16") not in _FULL_PRECISION
        switches = method is not None and "qlora" in (kind, method.kind)
        if flags.dtype is None and switches and was_quantised != (kind == "qlora"):
            # the stored format was the old method's: a plain one under lora, nf4 under qlora
            precision = replace(precision, weights=None)
        method = Method(kind=kind, **kept)
    changes: dict[str, Any] = {}
    if flags.rank is not None:
        changes["rank"] = flags.rank
    if flags.targets is not None:
        changes["targets"] = _names(flags.targets)
        if isinstance(changes["targets"], str):
            _refuse_bad_expression(flags.targets)
    if flags.modules_to_save is not None:
        names = tuple(part.strip() for part in flags.modules_to_save.split(",") if part.strip())
        changes["modules_to_save"] = names
    if flags.adapter_dtype is not None:
        changes["adapter_dtype"] = flags.adapter_dtype
    if changes and (method is None or method.kind in ("full", "partial")):
        if method is None and any_method:
            method = Method(kind="lora")
        else:
            raise InputError(
                f"{_flag(next(iter(changes)))} belongs to an adapter, and this job has none",
                remedy="add --method lora, qlora, dora, ...",
            )
    if flags.last_layers is not None:
        if method is None or method.kind != "partial":
            raise InputError("--last-layers belongs to --method partial")
        changes["last_layers"] = flags.last_layers
    if flags.trainable is not None:
        changes["trainable"] = _trainable(flags.trainable, plan.model)
    if changes:
        assert method is not None
        method = replace(method, **changes)
    return replace(plan, method=method, precision=precision)


def _trainable(text: str, model: Model) -> int:
    if not text.strip().endswith("%"):
        return int(_parsed("trainable", text, parse_count))
    share: float = _parsed("trainable", text, parse_percent)
    if model.params is None:
        raise InputError(
            "a share of trainable parameters needs the model as --params",
            remedy="for a model of known shape give --last-layers K, or a count as in 1e9",
        )
    count = round(share * model.params)
    if count < 1:
        raise InputError("--trainable: nothing would be trained", remedy="give more than 0%")
    return count


def _step(plan: Plan, flags: JobFlags) -> Plan:
    batch, precision = plan.batch, plan.precision
    if flags.mixed_precision is not None:
        precision = replace(precision, mixed=flags.mixed_precision)
    batch = replace(
        batch,
        micro=flags.micro_batch or batch.micro,
        seq_len=flags.seq_len or batch.seq_len,
        accumulation=flags.grad_accum or batch.accumulation,
    )
    checkpointing = plan.gradient_checkpointing
    if flags.gradient_checkpointing is True:
        if checkpointing is None or checkpointing.kind == "none":
            checkpointing = Checkpointing(kind="full")
    elif flags.gradient_checkpointing is False:
        checkpointing = Checkpointing(kind="none")
    loss = plan.loss
    if flags.loss is not None and (loss is None or loss.kind != flags.loss):
        loss = Loss(kind=flags.loss)
    optimizer = plan.optimizer
    if flags.optimizer is not None and (optimizer is None or optimizer.name != flags.optimizer):
        optimizer = OptimizerChoice(name=flags.optimizer)
    return replace(
        plan,
        batch=batch,
        precision=precision,
        gradient_checkpointing=checkpointing,
        loss=loss,
        optimizer=optimizer,
        attention=flags.attention or plan.attention,
        kernels=flags.kernels or plan.kernels,
    )


_DEGREES = ("tp", "pp", "cp", "ep", "dp_replicate")


def _hardware(plan: Plan, flags: JobFlags) -> Plan:
    hardware, sharding, budget = plan.hardware, plan.sharding, plan.budget
    nodes = flags.nodes or hardware.nodes
    count = hardware.count
    if flags.gpus is not None:
        if flags.nodes is None and flags.gpus % (nodes or 1):
            nodes = 1  # the file's machines do not divide these GPUs: they are all in one
        if flags.gpus % (nodes or 1):
            raise InputError(
                f"{flags.gpus} GPUs cannot be spread evenly over {nodes} machines",
                remedy="--gpus counts them all; give a multiple of --nodes",
            )
        count = flags.gpus // (nodes or 1)
    hardware = replace(hardware, gpu=flags.gpu or hardware.gpu, count=count, nodes=nodes)
    if flags.host_ram is not None:
        hardware = replace(hardware, host_ram=_parsed("host_ram", flags.host_ram, parse_bytes))
    if flags.headroom is not None:
        headroom = _parsed("headroom", flags.headroom, parse_percent)
        if headroom > 0.99:
            raise InputError("--headroom leaves nothing to use", remedy="write it like 5%")
        budget = replace(budget, headroom=headroom)
    if flags.sharding is not None and flags.sharding != sharding.kind:
        kept = {name: getattr(sharding, name) for name in (*_DEGREES, "offload")}
        sharding = type(sharding)(kind=flags.sharding, **kept)
    if flags.offload is not None:
        sharding = replace(sharding, offload=flags.offload)
    degrees = {name: getattr(flags, name) or getattr(sharding, name) for name in _DEGREES}
    return replace(plan, hardware=hardware, sharding=replace(sharding, **degrees), budget=budget)


def _overrides(old: Plan, new: Plan) -> tuple[Assumption, ...]:
    """What the flags changed, key by key, with what the file had said."""
    before, after = _flat(old), _flat(new)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return tuple(
        Assumption(
            key=key,
            value=after.get(key),
            source=f"a flag overrides the file, which says {before[key]}"
            if before.get(key) is not None
            else "a flag; the file does not say",
        )
        for key in changed
    )


def _flat(plan: Plan) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section in dataclasses.fields(plan):
        value = getattr(plan, section.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                flat[f"{section.name}.{field.name}"] = getattr(value, field.name)
        elif value is not None:
            flat[section.name] = value
    return flat
