"""The verbs of the library: names and files in, reports out. The command line calls these."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftplan import __version__
from ftplan.errors import FtplanError, InputError
from ftplan.front.resolve import Resolved, resolve
from ftplan.front.unused import TRAINING_TASKS
from ftplan.report import (
    GpuSummary,
    Interval,
    ModelSummary,
    Phase,
    Remedy,
    Report,
    Verdict,
)
from ftplan.spec import Plan

if TYPE_CHECKING:  # the walk is loaded only for a model whose shape is known
    from ftplan.fit.remedies import Judged
    from ftplan.fit.sizer import Sizer
    from ftplan.memory.counters import Counters
    from ftplan.memory.estimate import Estimate, Structure
    from ftplan.memory.host import Wire
    from ftplan.memory.job import Job

__all__ = ["estimate", "needed"]

NETWORK_BYTES_PER_S = 50 * 10**9
"""One direction of a 400 Gb/s port for each GPU, which large clusters have: a lower bound."""


def estimate(
    plan: Plan,
    *,
    base: Path | None = None,
    with_remedies: bool = True,
    stated: Collection[str] | None = None,
) -> Report:
    """How much memory a job takes, and whether it fits when the plan names a GPU.

    ``base`` is the folder that relative paths in the plan start at. Without ``with_remedies`` a
    job that does not fit is not searched for a way out, which is what a search itself asks for.
    ``stated`` are the keys that somebody wrote (None: all): of them those without a use are named.
    Raises FtplanError (with a remedy) for names that are unknown and jobs that are not modelled.
    """
    resolved = resolve(plan, base=base, stated=stated)
    if resolved.plan.method is None and plan.task in TRAINING_TASKS:
        raise InputError(
            f"the task {plan.task!r} trains the model, but no method says how",
            remedy="add a method (--method full, lora, qlora, ...)",
        )
    report = _sized(resolved)
    over = report.verdict in ("over", "tight") and resolved.config is not None
    if over and with_remedies:
        report = replace(report, remedies=_remedies(plan, resolved, report, base))
    return report


def needed(plan: Plan, *, base: Path | None = None) -> Interval:
    """What a job needs of the card, beside which its allocator may hold more where there is room.

    It goes by the kind of card alone, and decides whether the job fits.
    """
    return _needed(resolve(plan, base=base))[0].device


def estimate_summary(resolved: Resolved, sizer: Sizer | None) -> ModelSummary | None:
    """The model of a resolved job, all of its parameters."""
    if sizer is not None:
        total = sizer.structure(sizer.job.seq_len).total_params
    else:
        from ftplan.front.assembling import serving_job_of
        from ftplan.memory.serving import serve

        total = serve(serving_job_of(resolved)).total_params
    return ModelSummary(name=resolved.name, total_params=total, trainable_params=0)


def _sized(resolved: Resolved) -> Report:
    if resolved.config is None:
        from ftplan.front.sums import sum_of

        return sum_of(resolved)
    if resolved.plan.task == "serve" or resolved.plan.method is None:
        from ftplan.front.assembling import serving_job_of
        from ftplan.memory.serving import serve

        return _report(resolved, serve(serving_job_of(resolved)))
    return _training(resolved)


def _training(resolved: Resolved) -> Report:
    """The walk, and what lies beside the GPU: host memory, disk, the wire."""
    from ftplan.front.assembling import job_of
    from ftplan.front.findings import host_findings, step_findings
    from ftplan.memory.estimate import structure_of
    from ftplan.memory.host import disk_bytes, host_interval, wire_of

    job = job_of(resolved)
    structure = structure_of(job)
    report = _report(
        resolved,
        structure.at(job.micro, job.seq_len, job.loss_chunk),
        _held(resolved, structure, job),
        structure,
    )
    plan, counted = resolved.plan, structure.counted
    host = host_interval(job, counted, gpus_per_node=plan.hardware.count or 1)
    written = disk_bytes(job, counted)
    details: dict[str, Any] = {"disk_bytes": written}
    wire = wire_of(job, counted, gpus_per_node=plan.hardware.count or 1)
    if wire is not None:
        details["communication"] = _communication(resolved, wire)
    return replace(
        report,
        host_bytes=host,
        details={**report.details, **details},
        findings=report.findings
        + host_findings(resolved.plan.hardware, host, written)
        + step_findings(resolved, structure, job, details.get("communication") or {}),
    )


def _communication(resolved: Resolved, wire: Wire) -> dict[str, Any]:
    """Bytes on the wire a step and, where the card is known, seconds at its full rate."""
    told: dict[str, Any] = {
        "collective": wire.collective,
        "bytes_per_step": wire.bytes_per_step,
    }
    if resolved.gpu is not None and resolved.gpu.interconnect.bytes_per_s:
        rate = resolved.gpu.interconnect.bytes_per_s // 2  # one direction
        told["interconnect"] = resolved.gpu.interconnect.kind
        told["least_seconds_per_step"] = round(wire.bytes_per_step / rate, 4)
    if wire.slow_bytes:
        told["bytes_per_step_between_nodes"] = wire.slow_bytes
        told["network"] = "400 Gb/s for each GPU (assumed)"
        seconds = round(wire.slow_bytes / NETWORK_BYTES_PER_S, 4)
        told["least_seconds_per_step_between_nodes"] = seconds
    return told


def _remedies(
    plan: Plan, resolved: Resolved, report: Report, base: Path | None
) -> tuple[Remedy, ...]:
    """What would help, tried one by one with this same calculator."""
    from ftplan.fit.remedies import Card, remedies

    def judge(changed: Plan) -> Judged | None:
        try:
            return _judged(resolve(changed, base=base))
        except FtplanError:  # a change that is not modelled is no remedy
            return None
        except Exception:  # nor is one we fail at, and it must not hide the answer
            return None

    assert report.verdict and report.allocated_bytes and report.device_bytes
    card = Card(
        capability=capability_of(resolved) if resolved.gpu else (8, 0), larger=_larger(resolved)
    )
    return remedies(plan, _judged(resolved), judge, card)


def _judged(resolved: Resolved) -> Judged:
    """The verdict of a report, without its terms: what a search asks for many times."""
    from ftplan.fit.remedies import Judged

    need, shown = _needed(resolved)
    gpu = gpu_of(resolved)
    verdict = verdict_of(need.device, gpu)
    if verdict != "fits":  # whether it fits is told by the need
        verdict = "over" if _is_over(need, gpu) else verdict_of(shown().device, gpu)
    return Judged(
        plan=resolved.plan,
        allocated_bytes=need.allocated.expected,
        device_bytes=need.device.high,
        verdict=verdict or "unknown",
    )


def _is_over(need: Counters, gpu: GpuSummary | None) -> bool:
    """Whether tensors alone take too much: then what is held need not be played."""
    around = need.device.expected - need.reserved.expected
    return gpu is not None and need.allocated.expected + around > gpu.usable_bytes


def _needed(resolved: Resolved) -> tuple[Counters, Callable[[], Counters]]:
    """What a job needs, and a way to what the report shows: with all that its allocator holds."""
    if resolved.plan.task == "serve" or resolved.plan.method is None:
        from ftplan.front.assembling import serving_job_of
        from ftplan.memory.serving import serve

        served = serve(serving_job_of(resolved))
        cache = _cache_bytes(served)
        need = _counters(resolved, served.peak_bytes, served.static_bytes, cache_bytes=cache)
        return need, lambda: need
    from ftplan.front.assembling import job_of
    from ftplan.memory.estimate import structure_of

    job = job_of(resolved)
    structure = structure_of(job)
    phases = structure.phases(job.micro, job.seq_len, job.loss_chunk)
    peak = max(level for _, level in phases)
    static = structure.static_bytes
    return _counters(resolved, peak, static, structure=structure), lambda: _counters(
        resolved, peak, static, held=_held(resolved, structure, job), structure=structure
    )


def _larger(resolved: Resolved) -> tuple[str, ...]:
    """Data-centre cards of the same maker that hold more, smallest first."""
    from ftplan.catalog.gpus import search_gpus

    gpu = resolved.gpu
    assert gpu is not None
    rows = [
        row
        for row in search_gpus()
        if row.vendor == gpu.vendor
        and row.kind == "data-centre"
        and row.usable_bytes > gpu.usable_bytes
        and row.supports_bf16
    ]
    return tuple(row.name for row in sorted(rows, key=lambda row: row.usable_bytes))


def _cache_bytes(result: Estimate) -> int:
    return sum(term.bytes for term in result.static if term.name.startswith("kv_cache/"))


def _summary(resolved: Resolved, result: Estimate) -> ModelSummary:
    """The whole model, also where tensor or expert parallelism gives each GPU a part of it."""
    total, trainable = result.total_params, result.trainable_params
    sharding, method = resolved.plan.sharding, resolved.plan.method
    if (sharding.tp or 1) * (sharding.ep or 1) * (
        sharding.pp or 1
    ) > 1 and resolved.config is not None:
        from ftplan.memory.families import build

        total = sum(parameter.numel for _, parameter in build(resolved.config).all_parameters())
        if method is not None and method.kind == "full":
            trainable = total
    return ModelSummary(name=resolved.name, total_params=total, trainable_params=trainable)


def _held(resolved: Resolved, structure: Structure, job: Job) -> Interval:
    """What the caching allocator reserves for the job, played."""
    from ftplan.front.assembling import lengths_of
    from ftplan.memory.counters import workspace_bytes
    from ftplan.memory.reserved import reserved

    gpu = gpu_of(resolved)
    return reserved(
        structure, job.micro, job.seq_len, job.loss_chunk,
        workspace=workspace_bytes(capability_of(resolved)) if gpu else 0,
        capacity=gpu.usable_bytes if gpu else None,
        lengths=lengths_of(resolved),
    )  # fmt: skip


def _counters(
    resolved: Resolved,
    peak: int,
    static: int,
    *,
    cache_bytes: int | None = None,
    held: Interval | None = None,
    structure: Structure | None = None,
) -> Counters:
    from ftplan.memory.counters import counters

    hardware, gpu = resolved.plan.hardware, gpu_of(resolved)
    return counters(
        peak,
        static,
        capability=capability_of(resolved),
        named=gpu is not None,
        gpus=(hardware.count or 1) * (hardware.nodes or 1),
        communicators=_communicators(resolved),
        traced=is_traced(resolved),
        above=resolved.stack.readings_above,
        cache_bytes=cache_bytes,
        prompt_told=resolved.plan.batch.prompt_len is not None,
        held=held,
        usable_bytes=gpu.usable_bytes if gpu is not None else 0,
        uneven=_uneven(resolved, structure),
        beside=structure.beside_bytes if structure is not None else 0,
    )


def _communicators(resolved: Resolved) -> int:
    if resolved.stack.name != "megatron" or resolved.plan.method is None:
        return 1
    from ftplan.front.assembling import job_of

    return job_of(resolved).sharding.communicators


def _uneven(resolved: Resolved, structure: Structure | None) -> int:
    """Bytes of the most uneven routing to experts that are spread."""
    if structure is None:
        return 0
    batch, loss = resolved.plan.batch, resolved.plan.loss
    assert batch.micro and batch.seq_len
    return structure.uneven_bytes(batch.micro, batch.seq_len, (loss.chunk if loss else 0) or 0)


def _report(
    resolved: Resolved,
    result: Estimate,
    held: Interval | None = None,
    structure: Structure | None = None,
) -> Report:
    from ftplan.memory.counters import unexplained, unexplained_routing, workspace_bytes
    from ftplan.memory.terms import all_terms

    cache = None if resolved.plan.method else _cache_bytes(result)
    shown = _counters(
        resolved, result.peak_bytes, result.static_bytes, cache_bytes=cache, held=held,
        structure=structure,
    )  # fmt: skip
    gpu = gpu_of(resolved)
    workspace = workspace_bytes(capability_of(resolved)) if gpu is not None else 0
    terms = all_terms(result, workspace)
    if not is_traced(resolved):
        stack = resolved.stack
        terms.append(unexplained(shown.allocated, stack=stack.title, above=stack.readings_above))
    if uneven := _uneven(resolved, structure):
        terms.append(unexplained_routing(uneven))
    return Report(
        verdict=verdict_of(shown.device, gpu),
        model=_summary(resolved, result),
        job=job_mapping(resolved.plan),
        allocated_bytes=shown.allocated,
        reserved_bytes=shown.reserved,
        device_bytes=shown.device,
        host_bytes=None,
        gpu=gpu,
        peak_phase=result.peak_phase,
        phases=tuple(Phase(name=n, peak_bytes=b + workspace) for n, b in result.phases),
        terms=tuple(terms),
        findings=resolved.findings,
        assumptions=resolved.assumptions,
        tool_version=__version__,
    )


def is_traced(resolved: Resolved) -> bool:
    """Whether the stack's modules are those that the walk was held against."""
    plan = resolved.plan
    if plan.task == "ppo" and resolved.stack.reward_head == "value":
        return False  # LLaMA-Factory's is that of TRL 0.9, which was not traced
    if not resolved.stack.own_modules or plan.method is None:
        return True
    if resolved.stack.name == "nemo":
        return _is_traced_recipe(resolved)
    from ftplan.front.assembling import modules_of

    modules, checkpointing = modules_of(resolved), plan.gradient_checkpointing
    if not modules or plan.batch.eval_micro:
        return False
    from ftplan.memory.families.native import checkpoints, fsdp_version, parallel, shards

    if parallel(modules) and not shards(modules):
        # traced on stand-ins for Transformer Engine and NCCL: published readings are 16 % above
        return False
    unsharded = (None, "none")
    sharded = not {plan.sharding.kind, plan.sharding.offload} <= set(unsharded)
    in_backward = plan.optimizer is not None and plan.optimizer.in_backward
    own = plan.sharding.kind == "fsdp" and plan.sharding.offload in unsharded
    own = own and fsdp_version(modules) == (plan.sharding.version or 2)
    if (sharded and not (own or shards(modules))) or in_backward or plan.batch.packing:
        return False

    if checkpointing is None or checkpointing.kind == "none":
        return True
    kinds = (*checkpoints(modules), *(("full",) if own else ()))
    return checkpointing.kind in kinds and checkpointing.every == 1


def _is_traced_recipe(resolved: Resolved) -> bool:
    """Whether jobs of this kind are among those that AutoModel's recipe ran."""
    from ftplan.memory.kernels import LIBRARIES

    plan, sharding, config = resolved.plan, resolved.plan.sharding, resolved.config or {}
    checkpointing = plan.gradient_checkpointing
    others = (
        config.get("model_type") not in (*LIBRARIES["automodel"], "mistral"),
        plan.task not in (None, "sft", "pt"),
        plan.method is None or plan.method.kind not in ("full", "lora", "qlora", "dora"),
        sharding.kind not in (None, "none", "fsdp") or sharding.offload not in (None, "none"),
        any((getattr(sharding, degree) or 1) > 1 for degree in ("tp", "pp", "cp", "ep")),
        (sharding.dp_replicate or 1) > 1,
        checkpointing is not None and checkpointing.kind not in ("none", "full"),
        plan.batch.packing,
        plan.batch.eval_micro,
        plan.batch.padding == "right",
    )
    return not any(others)


def capability_of(resolved: Resolved) -> tuple[int, int] | None:
    """CUDA compute capability of the card; Ampere's where none is named."""
    gpu = resolved.gpu
    if gpu is None:
        return (8, 0)
    if gpu.compute_capability is None:
        return None
    major, minor = gpu.compute_capability.split(".")
    return int(major), int(minor)


def gpu_of(resolved: Resolved) -> GpuSummary | None:
    """The card that the job is held against."""
    if resolved.gpu is None:
        return None
    plan = resolved.plan
    free = resolved.gpu.usable_bytes - (plan.hardware.reserved or 0)
    usable = int(free * (1 - (plan.budget.headroom or 0.0)))
    count = (plan.hardware.count or 1) * (plan.hardware.nodes or 1)
    return GpuSummary(name=resolved.gpu.name, usable_bytes=max(0, usable), count=count)


def verdict_of(device: Interval, gpu: GpuSummary | None) -> Verdict | None:
    """The contract's: what the card shows against what a program may use of it."""
    if gpu is None:
        return None
    if device.high <= gpu.usable_bytes:
        return "fits"
    return "tight" if device.expected <= gpu.usable_bytes else "over"


def job_mapping(plan: Plan) -> Mapping[str, Any]:
    """The plan as a mapping, without what was not given and has no default."""

    def pruned(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {key: pruned(item) for key, item in value.items() if item is not None}
            return {key: item for key, item in kept.items() if item != {}}
        return list(value) if isinstance(value, tuple) else value

    mapping = asdict(plan)
    result: dict[str, Any] = pruned(mapping)
    name = plan.model.name
    if name is not None:
        result["model"] = name
    return result
