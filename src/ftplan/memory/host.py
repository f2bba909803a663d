"""Host memory and the wire: what lies beside the GPUs, and what passes between them.

Host RAM per node is the larger of two moments: loading the weights, and running (offloaded states
and weights, a gathered checkpoint while it is saved). The processes themselves come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftplan.memory.job import Job
from ftplan.memory.optimizer import state_bytes
from ftplan.memory.tape import ITEM_BYTES, Parameter
from ftplan.memory.zero import partition
from ftplan.report import Interval
from ftplan.units import GIB, MIB

__all__ = ["Wire", "disk_bytes", "host_interval", "offloaded_bytes", "wire_of"]

Counted = Sequence[tuple[Parameter, int, bool]]

PROCESS = (390 * MIB, 1536 * MIB, 4 * GIB)
"""One training process. Low: the resident set after importing torch 2.13 (CPU build),
transformers 5.23 and peft 0.21 was 388 MiB here (2026-11-23). The CUDA build, a context and its
pinned buffers add between one and a few GiB, which nobody publishes per version: hence the rest."""
SHARD_BYTES = 5 * 10**9
"""transformers writes checkpoint files of at most 5 GB (``max_shard_size``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """Bytes that each GPU sends (and receives) in one optimizer step."""

    collective: str
    bytes_per_step: int


def _weights(counted: Counted) -> int:
    return sum(p.numel * times * ITEM_BYTES.get(p.dtype, 1) for p, times, _ in counted)


def _trained(counted: Counted) -> list[tuple[Parameter, int, bool]]:
    return [entry for entry in counted if entry[0].trainable]


def offloaded_bytes(job: Job, counted: Counted) -> int:
    """Bytes on the host for one rank: states, main weights, weights and gradients sent there."""
    spec, offload = job.sharding, job.sharding.offload
    trained = _trained(counted)
    paged = 0
    if job.optimizer.paged:
        paged = sum(p.numel * n for p, n, _ in trained) * 2
    if offload in ("none", "activations", "nvme"):
        return paged
    ranks = spec.data_ranks
    parts = [(partition(p, ranks), n, m) for p, n, m in trained]
    zero = spec.kind.startswith("zero")
    states = state_bytes(job.optimizer, parts)
    total = 0
    if offload == "optimizer" or spec.kind == "fsdp":
        total += states
        total += sum(p.numel * n * 4 for p, n, _ in parts) if zero else 0
        total += sum(p.numel * n * 4 for p, n, _ in parts)  # gradients wait there too
    if offload == "params":
        total += -(-_weights(counted) // ranks)
    return total + paged


def host_interval(job: Job, counted: Counted, *, gpus_per_node: int) -> Interval:
    """Peak host RAM of one node, in bytes."""
    local = max(1, min(gpus_per_node, job.sharding.world))
    weights = _weights(counted)
    quantised = job.weights.name not in ITEM_BYTES
    # the model is put together on the host and then moved, once for each rank; FSDP loads on one
    # rank only (fsdp_cpu_ram_efficient_loading), a quantised model file by file onto the GPU
    copies = 1 if job.sharding.kind == "fsdp" else local
    loading = min(weights, SHARD_BYTES) * local if quantised else weights * copies
    running = offloaded_bytes(job, counted) * local
    saving = weights if job.sharding.kind in ("fsdp", "zero3") else 0
    low, expected, high = (size * local for size in PROCESS)
    return Interval(
        low=low + max(min(loading, SHARD_BYTES), running),
        expected=expected + max(loading, running),
        high=high + max(weights * local, running + saving),
    )


def disk_bytes(job: Job, counted: Counted) -> dict[str, int]:
    """Bytes of what a run writes: the final weights or adapter, and a checkpoint to resume from."""
    trained = _trained(counted)
    adapter = [entry for entry in trained if entry[0].added]
    weights = _weights(adapter) if job.method == "adapter" else _weights(counted)
    states = state_bytes(job.optimizer, trained)
    main = sum(p.numel * n * 4 for p, n, _ in trained) if job.sharding.kind[:4] == "zero" else 0
    return {"weights": weights, "checkpoint": weights + states + main}


def wire_of(job: Job, counted: Counted) -> Wire | None:
    """What each GPU sends in a step: ring collectives pass (n - 1) / n of the buffer."""
    spec = job.sharding
    ranks = spec.world // (spec.tp * spec.pp)
    if ranks < 2 or spec.kind == "none":
        return None
    item = ITEM_BYTES.get(spec.param_dtype or "", 0)
    gathered = sum(p.numel * n * (item or ITEM_BYTES.get(p.dtype, 1)) for p, n, _ in counted)
    grads = sum(
        p.numel * n * ITEM_BYTES[spec.reduce_dtype or p.dtype] for p, n, _ in _trained(counted)
    )
    share = (ranks - 1, ranks)
    if spec.kind in ("fsdp", "zero3"):
        times = 2 if spec.reshard_after_forward else 1
        total = (times * gathered + grads) * job.accumulation
        name = f"{times} all-gathers of the weights, 1 reduce-scatter of the gradients"
    elif spec.kind == "ddp":
        total, name = 2 * grads, "1 all-reduce of the gradients"
    else:
        total = grads * job.accumulation + sum(
            p.numel * n * ITEM_BYTES[p.dtype] for p, n, _ in _trained(counted)
        )
        name = "1 reduce-scatter of the gradients, 1 all-gather of the weights"
    return Wire(collective=name, bytes_per_step=total * share[0] // share[1])
