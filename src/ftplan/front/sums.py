"""The report of a bare parameter count: the textbook's sums, and what they cannot look at.

Beside :mod:`ftplan.front.api`, which answers for models of known shape.
"""

from __future__ import annotations

from fractions import Fraction

from ftplan import __version__
from ftplan.catalog.optimizers import find_optimizer
from ftplan.dtypes import Format, find_format
from ftplan.errors import UnsupportedError
from ftplan.front import api
from ftplan.front.resolve import Resolved
from ftplan.memory import textbook
from ftplan.memory.textbook import Split
from ftplan.memory.ways import ways
from ftplan.report import Finding, Interval, ModelSummary, Report
from ftplan.spec import Plan

__all__ = ["sum_of"]

_LOOKED_AT = ("task", "precision.weights", "optimizer", "sharding.kind", "budget.headroom")
"""Defaults that a sum depends on: the others are not listed as assumptions."""


def sum_of(resolved: Resolved) -> Report:
    """N x M x 1.2 for inference; weights, gradients and optimizer states for training.

    Raises :class:`UnsupportedError` where the trainable count, or what an optimizer keeps, cannot
    be told without a shape.
    """
    plan = resolved.plan
    params = plan.model.params
    assert params is not None
    storage = find_format(plan.precision.weights or "bf16")
    split = _split(plan)
    if plan.method is None:
        result = textbook.inference(params, storage, split)
    else:
        trained = storage if storage.trainable else find_format("bf16")
        trainable = _trainable(plan, params)
        states = _state_bits(plan, trained)
        result = textbook.training(params, trainable, storage, trained, states, split)
    total = result.total
    interval = Interval(low=total, expected=total, high=total)
    gpu = api.gpu_of(resolved)
    return Report(
        verdict=api.verdict_of(interval, gpu),
        model=ModelSummary(
            name=resolved.name, total_params=params, trainable_params=result.trainable_params
        ),
        job=api.job_mapping(plan),
        allocated_bytes=interval,
        reserved_bytes=None,
        device_bytes=None,
        host_bytes=None,
        gpu=gpu,
        peak_phase="step" if plan.method else "serve",
        terms=result.terms,
        findings=(*resolved.findings, *_left_out(resolved)),
        assumptions=tuple(a for a in resolved.assumptions if a.key in _LOOKED_AT),
        details={"basis": "textbook", "ways": ways(params, storage)},
        tool_version=__version__,
    )


def _left_out(resolved: Resolved) -> tuple[Finding, ...]:
    """Activations are not in a sum of training, and what was said of them does nothing."""
    plan, idle = resolved.plan, resolved.shapeless
    if plan.method is None and not idle:
        return ()
    said = "activations are not in this sum: they need the model's shape"
    if plan.method is None:
        said = "this sum takes activations and the key-value cache as 20 % of the weights"
    if idle:
        said += f"; without it {', '.join(idle)} {'does' if len(idle) == 1 else 'do'} nothing"
    return (
        Finding(
            code="MEM001",
            severity="warning" if idle else "info",
            message=said,
            help="pass --model NAME or --config config.json for the exact sum",
        ),
    )


def _split(plan: Plan) -> Split:
    """How ZeRO, FSDP, tensor and pipeline parallelism divide a sum over the GPUs."""
    sharding, hardware = plan.sharding, plan.hardware
    whole = (sharding.tp or 1) * (sharding.pp or 1)
    world = (hardware.count or 1) * (hardware.nodes or 1)
    group = max(1, world // whole // (sharding.dp_replicate or 1))
    stage = {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}.get(sharding.kind or "", 0)
    moved = sharding.offload or "none"
    return Split(
        weights=0 if moved in ("params", "nvme") else whole * (group if stage >= 3 else 1),
        gradients=whole * (group if stage >= 2 else 1),
        states=0 if moved in ("optimizer", "params", "nvme") else whole * (group if stage else 1),
    )


def _state_bits(plan: Plan, trained: Format) -> list[int]:
    """Bits of each value that the optimizer keeps for a trainable parameter; scales not counted."""
    assert plan.optimizer is not None
    row = find_optimizer(plan.optimizer.name)
    bits: list[Fraction | int] = []
    if row.name == "sgd" and plan.optimizer.momentum:
        bits.append(trained.bits)
    for state in row.states:
        if state.shape == "scalar" or state.on == "host":
            continue
        if state.shape != "full":
            raise UnsupportedError(
                f"what {row.name} keeps by rows and columns, on a bare parameter count,",
                remedy="pass --model NAME or --config config.json",
            )
        dtype = plan.optimizer.state_dtype or state.dtype
        if dtype == "param":
            bits.append(trained.bits)
        elif "bit-" in dtype:
            bits.append(int(dtype.partition("bit-")[0]))
        else:
            bits.append(find_format(dtype).bits)
    return [int(count) for count in bits]


def _trainable(plan: Plan, params: int) -> int:
    method = plan.method
    assert method is not None
    if method.kind == "full":
        return params
    if method.trainable is not None:
        return method.trainable
    raise UnsupportedError(
        f"the trainable count of method {method.kind!r} on a bare parameter count",
        remedy="add --trainable 1e9 or --trainable 10%, or name the model with --model",
    )
