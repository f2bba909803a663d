"""What a sized job should be told beside its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ftplan.report import Finding, Interval
from ftplan.units import format_bytes

if TYPE_CHECKING:
    from ftplan.front.resolve import Resolved
    from ftplan.memory.estimate import Structure
    from ftplan.memory.job import Job
    from ftplan.spec import Hardware, Plan

__all__ = ["host_findings", "step_findings"]


def host_findings(
    hardware: Hardware, host: Interval, written: Mapping[str, int]
) -> tuple[Finding, ...]:
    """Whether a node's memory and its disk are large enough, where the plan says what there is."""
    return (*_ram(hardware.host_ram, host), *_disk(hardware.disk, written["checkpoint"]))


def _ram(ram: int | None, host: Interval) -> Iterator[Finding]:
    if ram is not None and host.expected > ram:
        yield Finding(
            code="FIT003",
            severity="error",
            message=f"a node needs {format_bytes(host.expected, 'GiB')} of host memory "
            f"and has {format_bytes(ram, 'GiB')}",
            help="load on one rank only, quantise, or offload less",
        )


def _disk(disk: int | None, checkpoint: int) -> Iterator[Finding]:
    if disk is not None and checkpoint > disk:
        yield Finding(
            code="FIT005",
            severity="error",
            message=f"one checkpoint to resume from takes {format_bytes(checkpoint, 'GiB')} of "
            f"disk, and there is {format_bytes(disk, 'GiB')}",
            help="save the weights or the adapter alone (save_only_model), or add disk",
        )


def step_findings(
    resolved: Resolved, structure: Structure, job: Job, sent: Mapping[str, Any]
) -> tuple[Finding, ...]:
    """What the walk of a step shows. ``sent``: bytes on the wire, and how long they take."""
    return (
        *_worst_rank(structure),
        *_slow_wire(resolved, structure, job, sent),
        *_frozen_gradients(resolved.plan, resolved.stack.name),
        *_not_evaluated(structure, job),
    )


def _worst_rank(structure: Structure) -> Iterator[Finding]:
    """Which rank of a pipeline the answer is about."""
    if structure.stage is not None:
        yield Finding(
            code="PAR001",
            severity="info",
            message=f"the worst rank is {structure.stage.name}",
            help="more micro batches in a step (batch.accumulation) shorten the bubble, not this",
        )


def _slow_wire(
    resolved: Resolved, structure: Structure, job: Job, sent: Mapping[str, Any]
) -> Iterator[Finding]:
    """Where what is sent takes longer than what is computed, both at full rate."""
    link, seconds = max(
        (str(sent.get("interconnect", "")), sent.get("least_seconds_per_step", 0)),
        ("the network between nodes", sent.get("least_seconds_per_step_between_nodes", 0)),
        key=lambda way: way[1],
    )
    computed = _seconds_of_compute(resolved, structure, job) if seconds else 0
    if seconds > computed > 0:
        yield Finding(
            code="PAR002",
            severity="warning",
            message=f"it may fit and crawl: a step sends what takes {seconds:.2f} s over {link}, "
            f"and computes for {computed:.2f} s, both at full rate",
            help="use more tokens in a micro batch, reshard_after_forward: false, zero2, or "
            "replicas of a smaller sharded group (dp_replicate)",
        )


def _seconds_of_compute(resolved: Resolved, structure: Structure, job: Job) -> float:
    """Of a step at the card's peak rate; 0: nobody knows that, or what is computed."""
    if resolved.gpu is None or job.task == "embed":  # a head that is not there computes nothing
        return 0
    from ftplan.catalog.throughput import speed_of
    from ftplan.fit.flops import Compute

    dtype = job.environment.autocast or job.compute_dtype
    speed = speed_of(resolved.gpu, mixed_or_weights=dtype)
    if not speed.flops:
        return 0
    work = Compute(structure.program).at(job.micro, job.seq_len, job.loss_chunk)
    return work.total * job.accumulation / speed.flops


def _frozen_gradients(plan: Plan, stack: str) -> Iterator[Finding]:
    """FSDP1 with frozen and trained weights in one flat parameter."""
    flat = plan.sharding.kind == "fsdp" and plan.sharding.version == 1
    adapted = plan.method is not None and plan.method.kind not in ("full", "partial")
    if flat and adapted and stack == "pytorch":
        yield Finding(
            code="FIT004",
            severity="warning",
            message="FSDP1 takes gradients of the frozen weights too: adapters and the weights "
            "beside them are one flat parameter",
            help="wrap what is trained by itself (peft.utils.other.fsdp_auto_wrap_policy), or use "
            "version: 2",
        )


def _not_evaluated(structure: Structure, job: Job) -> Iterator[Finding]:
    if job.eval_micro and structure.evaluation is None:
        yield Finding(
            code="MEM006",
            severity="info",
            message="the evaluation (batch.eval_micro) is not in this answer: for this task or "
            "in a pipeline only training is sized",
            help="keep the evaluation's batch at or below the micro batch of training",
        )
