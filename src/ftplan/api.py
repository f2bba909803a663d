"""The verbs of the library: names and files in, reports out. The command line calls these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftplan import __version__
from ftplan.assembling import job_of, modules_of, serving_job_of
from ftplan.errors import FtplanError, UnsupportedError
from ftplan.memory import textbook
from ftplan.memory.counters import counters, unexplained, workspace_bytes
from ftplan.memory.ways import ways
from ftplan.report import (
    Finding,
    GpuSummary,
    Interval,
    ModelSummary,
    Phase,
    Remedy,
    Report,
    Verdict,
)
from ftplan.resolve import Resolved, resolve
from ftplan.spec import Plan
from ftplan.units import format_bytes

if TYPE_CHECKING:  # the walk is loaded only for a model whose shape is known
    from ftplan.fit.sizer import Sizer
    from ftplan.memory.estimate import Estimate
    from ftplan.memory.host import Wire

__all__ = ["estimate"]


def estimate(plan: Plan, *, base: Path | None = None, with_remedies: bool = True) -> Report:
    """How much memory a job takes, and whether it fits when the plan names a GPU.

    ``base`` is the folder that relative paths in the plan start at. Without ``with_remedies`` a
    job that does not fit is not searched for a way out, which is what a search itself asks for.
    Raises FtplanError (with a remedy) for names that are unknown and jobs that are not modelled.
    """
    resolved = resolve(plan, base=base)
    report = _sized(resolved)
    over = report.verdict in ("over", "tight") and resolved.config is not None
    if over and with_remedies:
        report = replace(report, remedies=_remedies(plan, resolved, report, base))
    return report


def estimate_summary(resolved: Resolved, sizer: Sizer | None) -> ModelSummary | None:
    """The model of a resolved job, all of its parameters."""
    if sizer is not None:
        total = sizer.structure(sizer.job.seq_len).total_params
    else:
        from ftplan.memory.serving import serve

        total = serve(serving_job_of(resolved)).total_params
    return ModelSummary(name=resolved.name, total_params=total, trainable_params=0)


def _sized(resolved: Resolved) -> Report:
    if resolved.config is None:
        return _textbook(resolved)
    if resolved.plan.task == "serve" or resolved.plan.method is None:
        from ftplan.memory.serving import serve

        return _report(resolved, serve(serving_job_of(resolved)))
    return _training(resolved)


def _training(resolved: Resolved) -> Report:
    """The walk, and what lies beside the GPU: host memory, disk, the wire."""
    from ftplan.memory.estimate import Structure
    from ftplan.memory.host import disk_bytes, host_interval, wire_of

    job = job_of(resolved)
    structure = Structure(job)
    report = _report(resolved, structure.at(job.micro, job.seq_len, job.loss_chunk))
    plan, counted = resolved.plan, structure.counted
    host = host_interval(job, counted, gpus_per_node=plan.hardware.count or 1)
    written = disk_bytes(job, counted)
    details: dict[str, Any] = {"disk_bytes": written}
    wire = wire_of(job, counted)
    if wire is not None:
        details["communication"] = _communication(resolved, wire)
    return replace(
        report,
        host_bytes=host,
        details={**report.details, **details},
        findings=(
            *report.findings,
            *_host_findings(resolved, host, written),
            *(_not_evaluated() if job.eval_micro and structure.evaluation is None else ()),
        ),
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
    return told


def _not_evaluated() -> tuple[Finding, ...]:
    return (
        Finding(
            code="MEM006",
            severity="info",
            message="the evaluation (batch.eval_micro) is not in this answer: for this task or "
            "sharding only training is sized",
            help="keep the evaluation's batch at or below the micro batch of training",
        ),
    )


def _host_findings(
    resolved: Resolved, host: Interval, written: Mapping[str, int]
) -> tuple[Finding, ...]:
    """What the user should know of host memory and of what stands in for something else."""
    findings: list[Finding] = []
    ram = resolved.plan.hardware.host_ram
    if ram is not None and host.expected > ram:
        findings.append(
            Finding(
                code="FIT003",
                severity="error",
                message=f"a node needs {format_bytes(host.expected, 'GiB')} of host memory "
                f"and has {format_bytes(ram, 'GiB')}",
                help="load on one rank only, quantise, or offload less",
            )
        )
    disk = resolved.plan.hardware.disk
    if disk is not None and written["checkpoint"] > disk:
        findings.append(
            Finding(
                code="FIT005",
                severity="error",
                message=f"one checkpoint to resume from takes "
                f"{format_bytes(written['checkpoint'], 'GiB')} of disk, and there is "
                f"{format_bytes(disk, 'GiB')}",
                help="save the weights or the adapter alone (save_only_model), or add disk",
            )
        )
    sharding = resolved.plan.sharding
    if sharding.kind == "fsdp" and sharding.version == 1:
        findings.append(
            Finding(
                code="FIT004",
                severity="warning",
                message="FSDP1 is sized as FSDP2: its flat parameters also take gradients of "
                "frozen weights in a unit that trains anything",
                help="use fsdp_version: 2, or leave headroom",
            )
        )
    return tuple(findings)


def _remedies(
    plan: Plan, resolved: Resolved, report: Report, base: Path | None
) -> tuple[Remedy, ...]:
    """What would help, tried one by one with this same calculator."""
    from ftplan.fit.remedies import Card, Judged, remedies

    def judged(resolved: Resolved, report: Report) -> Judged:
        assert report.verdict and report.allocated_bytes and report.device_bytes
        return Judged(
            plan=resolved.plan,
            allocated_bytes=report.allocated_bytes.expected,
            device_bytes=report.device_bytes.high,
            verdict=report.verdict,
        )

    def judge(changed: Plan) -> Judged | None:
        try:
            after = resolve(changed, base=base)
            return judged(after, _sized(after))
        except FtplanError:  # a change that is not modelled is no remedy
            return None
        except Exception:  # nor is one we fail at, and it must not hide the answer
            return None

    card = Card(
        capability=capability_of(resolved) if resolved.gpu else (8, 0), larger=_larger(resolved)
    )
    return remedies(plan, judged(resolved, report), judge, card)


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
    if (sharding.tp or 1) * (sharding.ep or 1) > 1 and resolved.config is not None:
        from ftplan.memory.families import build

        total = sum(parameter.numel for _, parameter in build(resolved.config).all_parameters())
        if method is not None and method.kind == "full":
            trainable = total
    return ModelSummary(name=resolved.name, total_params=total, trainable_params=trainable)


def _report(resolved: Resolved, result: Estimate) -> Report:
    from ftplan.memory.terms import all_terms

    capability = capability_of(resolved)
    named = resolved.gpu is not None
    workspace = workspace_bytes(capability) if named else 0
    traced = is_traced(resolved)
    shown = counters(
        result.peak_bytes,
        result.static_bytes,
        capability=capability,
        named=named,
        gpus=(resolved.plan.hardware.count or 1) * (resolved.plan.hardware.nodes or 1),
        traced=traced,
        cache_bytes=None if resolved.plan.method else _cache_bytes(result),
    )
    terms = all_terms(result, workspace)
    if not traced:
        terms.append(unexplained(shown.allocated, stack=resolved.stack.title))
    gpu = gpu_of(resolved)
    return Report(
        verdict=_verdict(shown.device, gpu),
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
    if not resolved.stack.own_modules or plan.method is None:
        return True
    modules, checkpointing = modules_of(resolved), plan.gradient_checkpointing
    if not modules or plan.sharding.kind not in (None, "none") or plan.batch.packing:
        return False
    from ftplan.memory.families.native import checkpoints

    if checkpointing is None or checkpointing.kind == "none":
        return True
    return checkpointing.kind in checkpoints(modules) and checkpointing.every == 1


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


def _verdict(device: Interval, gpu: GpuSummary | None) -> Verdict | None:
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


def _textbook(resolved: Resolved) -> Report:
    from ftplan.dtypes import find_format

    plan = resolved.plan
    params = plan.model.params
    assert params is not None
    storage = find_format(plan.precision.weights or "bf16")
    findings: tuple[Finding, ...] = resolved.findings
    if plan.method is None:
        result = textbook.inference(params, storage)
        phase = "serve"
    else:
        trained = storage if storage.trainable else find_format("bf16")
        result = textbook.training(params, _trainable(plan, params), storage, trained)
        findings += (
            Finding(
                code="MEM001",
                severity="info",
                message="activations are not in this sum: they need the model's shape",
                help="pass --model NAME or --config config.json for the exact sum",
            ),
        )
        phase = "step"
    total = result.total
    interval = Interval(low=total, expected=total, high=total)
    gpu = gpu_of(resolved)
    return Report(
        verdict=_verdict(interval, gpu),
        model=ModelSummary(
            name=resolved.name, total_params=params, trainable_params=result.trainable_params
        ),
        job=job_mapping(plan),
        allocated_bytes=interval,
        reserved_bytes=None,
        device_bytes=None,
        host_bytes=None,
        gpu=gpu,
        peak_phase=phase,
        terms=result.terms,
        findings=findings,
        assumptions=resolved.assumptions,
        details={"basis": "textbook", "ways": ways(params, storage)},
        tool_version=__version__,
    )


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
