"""Host memory, disk and the wire: what lies beside the GPUs, and what passes between them.

Host RAM per node is the larger of two moments: loading the weights, and running while a checkpoint
is saved (what is offloaded, and the copy that rank 0 writes). The processes come on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ftplan.dataclass import dataclass
from ftplan.dtypes import find_format
from ftplan.errors import FtplanError
from ftplan.memory.job import Job
from ftplan.memory.optimizer import state_bytes
from ftplan.memory.tape import ITEM_BYTES, Parameter
from ftplan.memory.zero import partition
from ftplan.report import Interval
from ftplan.units import GIB, MIB

__all__ = ["Wire", "disk_bytes", "host_interval", "offloaded_bytes", "pinned", "wire_of"]

Counted = Sequence[tuple[Parameter, int, bool]]

PROCESS = (390 * MIB, 1536 * MIB, 4 * GIB)
"""One training process. Low: the resident set after importing torch 2.13 (CPU build),
transformers 5.23 and peft 0.21 was 386 MiB here (2026-11-28); a worker of a data loader adds 38 MiB
of its own. The CUDA build, a context and its buffers add between one and a few GiB, which nobody
publishes per version: hence the rest."""
SHARD_BYTES = 50 * 10**9
"""transformers 5 writes checkpoint files of at most 50 GB (``max_shard_size``)."""
SWAP_BUFFERS = 5 * 100_000_000
"""DeepSpeed's ``offload_param``: ``buffer_count`` x ``buffer_size`` elements, pinned, for NVMe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """Bytes that each GPU sends (and receives) in one optimizer step."""

    collective: str
    bytes_per_step: int
    slow_bytes: int
    """Those of them that cross nodes, where the job has more than one."""


def _weights(counted: Counted) -> int:
    return sum(_stored(p) * times for p, times, _ in counted)


def _stored(parameter: Parameter) -> int:
    if parameter.dtype in ITEM_BYTES:
        return parameter.numel * ITEM_BYTES[parameter.dtype]
    return sum(find_format(parameter.dtype).storages(parameter.shape))


def _all_ranks(job: Job, counted: Counted) -> list[tuple[Parameter, int, bool]]:
    """Every expert, also those that lie on other ranks."""
    spec = job.sharding
    return [(p, n * (spec.ep if spec.spread and p.expert else 1), m) for p, n, m in counted]


def _trained(counted: Counted) -> list[tuple[Parameter, int, bool]]:
    return [entry for entry in counted if entry[0].trainable]


def pinned(size: int) -> int:
    """Bytes that page-locked memory of ``size`` bytes takes: the next power of two.

    c10/core: ``CachingHostAllocatorImpl::allocate`` (PyTorch 2.13) rounds every block so.
    """
    return 1 << (size - 1).bit_length() if size > 0 else 0


def _pinned_each(counted: Counted, item: int | None = None, ranks: int = 1) -> int:
    """Page-locked shards of weights, each a block of its own."""
    return sum(
        times * pinned(-(-(p.numel * item if item else _stored(p)) // ranks))
        for p, times, _ in counted
    )


def offloaded_bytes(job: Job, counted: Counted) -> int:
    """Bytes on the host for one rank: states, main weights, weights and gradients sent there."""
    spec, offload = job.sharding, job.sharding.offload
    total = _boundaries(job, counted) + _beside_optimizer(job, counted)
    if offload in ("none", "activations") or not (spec.is_zero or spec.kind == "fsdp"):
        moved = offload == "optimizer" and spec.megatron
        return total + (_megatron_states(job, counted) if moved else 0)
    if spec.kind == "fsdp":
        return total + (_fsdp_offloaded(job, counted) if offload == "params" else 0)
    return total + _zero_offloaded(job, counted)


def _boundaries(job: Job, counted: Counted) -> int:
    """Inputs of checkpointed blocks that wait on the host."""
    if not job.environment.offload_checkpoints:
        return 0
    blocks = [(p, times) for p, times, in_block in counted if in_block and len(p.shape) == 2]
    if not blocks or not job.checkpoint_every:
        return 0
    hidden = min(min(p.shape) for p, _ in blocks if not p.added)
    layers = max(times for _, times in blocks)
    return layers // job.checkpoint_every * pinned(job.micro * job.seq_len * hidden * 2)


def _beside_optimizer(job: Job, counted: Counted) -> int:
    """What an optimizer itself keeps on the host: its states, and where it steps there page-locked
    copies of weight and gradient (torchao/optim/cpu_offload.py 0.18)."""
    trained = _trained(counted)
    moved = [entry for entry in trained if job.optimizer.offloads(entry[0])]
    return state_bytes(job.optimizer, trained, on="host") + 2 * _pinned_each(moved)


def _fsdp_offloaded(job: Job, counted: Counted) -> int:
    """``CPUOffloadPolicy``: shards of weights and gradients page-locked, states beside them."""
    trained = _trained(counted)
    parts, page_locked = [], 0
    for parameter, times, matrix in counted:
        ranks = job.sharding.ranks_of(parameter.expert)
        copies = 2 if parameter.trainable else 1
        page_locked += copies * _pinned_each([(parameter, times, matrix)], ranks=ranks)
    for parameter, times, matrix in trained:
        part = partition(parameter, job.sharding.ranks_of(parameter.expert))
        part.dtype = parameter.stored
        parts.append((part, times, matrix))
    return page_locked + state_bytes(job.optimizer, parts)


def _zero_offloaded(job: Job, counted: Counted) -> int:
    """Flat partitions in fp32 (weights, gradients) and in two bytes, page-locked, and states."""
    spec, trained = job.sharding, _trained(counted)
    ranks = spec.data_ranks
    elements = sum(-(-p.numel // ranks) * n for p, n, _ in trained)
    states = state_bytes(job.optimizer, [(partition(p, ranks), n, m) for p, n, m in trained])
    if spec.offload == "nvme":
        sub_group = min(elements, spec.sub_group_elements)
        return 4 * pinned(4 * sub_group) + pinned(2 * SWAP_BUFFERS)
    largest = max((p.numel for p, _, _ in trained), default=0)
    total = 2 * pinned(4 * elements) + pinned(2 * elements) + pinned(2 * largest) + states
    if spec.offload == "params":
        total += pinned(-(-_weights(counted) // ranks))
    return total


def _megatron_states(job: Job, counted: Counted) -> int:
    parts = [
        (partition(p, job.sharding.optimizer_ranks(p.expert)), n, m)
        for p, n, m in _trained(counted)
    ]
    return sum(pinned(4 * p.numel) * n for p, n, _ in parts) + state_bytes(job.optimizer, parts)


def _loaded(job: Job, counted: Counted, ranks: int) -> tuple[int, int, int]:
    """Bytes of loading on one node: low, expected, high.

    transformers 5 maps safetensors files: weights that stay in the checkpoint's dtype are pages of
    the file, one set for all ranks, until they are copied to the GPU; weights that are converted
    are a copy in each rank (measured 2026-11-28: 4 MiB of its own for a model of 1,335 MiB loaded
    as it is, 2,671 MiB when loaded in fp32). FSDP loads on rank 0 alone
    (``cpu_ram_efficient_loading``). Quantised ones are made weight by weight. Pages of files can be
    taken back: they are in ``high`` alone.
    """
    weights = _weights(counted)
    full = sum(p.numel * n for p, n, _ in counted) * ITEM_BYTES.get(job.base_dtype, 2)
    quantised = job.weights.name not in ITEM_BYTES
    largest = max((_stored(p) for p, _, _ in counted), default=0)
    readers = 1 if job.sharding.kind == "fsdp" else ranks
    if quantised:
        return largest, weights * readers, max(full, weights * ranks)
    if not _converts(job):
        return largest, largest, weights * ranks
    return weights, weights * readers, weights * ranks


def _converts(job: Job) -> bool:
    """Whether the weights are loaded in another dtype than the checkpoint has."""
    text = job.config.get("text_config")
    for source in (job.config, text if isinstance(text, dict) else {}):
        name = source.get("dtype") or source.get("torch_dtype")
        if isinstance(name, str):
            try:
                return find_format(name).name != job.weights.name
            except FtplanError:
                return False
    return False


def host_interval(job: Job, counted: Counted, *, gpus_per_node: int) -> Interval:
    """Peak host RAM of one node, in bytes."""
    local = max(1, min(gpus_per_node, job.sharding.world))
    running = offloaded_bytes(job, counted) * local
    counted = _all_ranks(job, counted)
    loading = _loaded(job, counted, local)
    paged = 0
    if job.optimizer.paged:  # unified memory: on the host only where the GPU has no room
        paged = state_bytes(replace(job.optimizer, paged=False), _trained(counted)) * local
    adapter = [entry for entry in _trained(counted) if entry[0].added]
    written = _weights(adapter) if job.method == "adapter" else _weights(counted)
    gathered = job.sharding.kind in ("fsdp", "zero3")
    saving = written if gathered else min(written, SHARD_BYTES)
    low, expected, high = (size * local for size in PROCESS)
    moments = (
        max(loading[0], running // 2),
        max(loading[1], running + saving),
        max(loading[2], running + 2 * saving) + paged,
    )
    return Interval(
        low=low + moments[0], expected=expected + moments[1], high=high + max(moments[1:])
    )


def disk_bytes(job: Job, counted: Counted) -> dict[str, int]:
    """Bytes of what a run writes: the final weights or adapter, and a checkpoint to resume from."""
    counted = _all_ranks(job, counted)
    trained = _trained(counted)
    adapter = [entry for entry in trained if entry[0].added]
    weights = _weights(adapter) if job.method == "adapter" else _weights(counted)
    states = state_bytes(job.optimizer, trained)
    main = (
        sum(p.numel * n * 4 for p, n, _ in trained) if job.sharding.kind.startswith("zero") else 0
    )
    parts = job.sharding.tp * job.sharding.pp  # each rank has a part, and writes it
    return {"weights": weights * parts, "checkpoint": (weights + states + main) * parts}


def wire_of(job: Job, counted: Counted, *, gpus_per_node: int = 8) -> Wire | None:
    """What each GPU sends in a step: ring collectives pass (n - 1) / n of the buffer.

    Tensor, context and expert parallelism send activations; their volume is of one micro batch's
    forward and backward, times the micro batches of a step.
    """
    sent = [*_data_parallel(job, counted), *_model_parallel(job, counted, gpus_per_node)]
    if not sent:
        return None
    nodes = job.sharding.world > gpus_per_node
    return Wire(
        collective="; ".join(name for name, _, _ in sent),
        bytes_per_step=sum(size for _, size, _ in sent),
        slow_bytes=sum(size for _, size, far in sent if far) if nodes else 0,
    )


Sent = tuple[str, int, bool]
"""What is sent, how many bytes a step, and whether it crosses nodes where there are several."""


def _data_parallel(job: Job, counted: Counted) -> Iterable[Sent]:
    spec = job.sharding
    ranks = spec.data_ranks
    if ranks < 2 or spec.kind == "none":
        return
    if spec.kind == "fsdp" and spec.spread:
        yield from _fully_sharded(job, counted)
        return
    item = ITEM_BYTES.get(spec.param_dtype or "", 0)
    gathered = sum(
        p.numel * n * item if item and p.dtype in ITEM_BYTES else _stored(p) * n
        for p, n, _ in counted
    )
    trained = _trained(counted)
    grads = sum(p.numel * n * ITEM_BYTES[spec.reduce_dtype or p.dtype] for p, n, _ in trained)
    if spec.kind in ("fsdp", "zero3"):
        times = 2 if spec.reshard_after_forward else 1
        group = spec.shard_ranks
        reduces = 1 if spec.no_sync else job.accumulation
        total = times * gathered * job.accumulation + grads * reduces
        name = f"{times} all-gathers of the weights, 1 reduce-scatter of the gradients"
        yield name, total * (group - 1) // group, spec.dp_replicate == 1
        if spec.dp_replicate > 1:
            copies = spec.dp_replicate
            share = 2 * grads // group * (copies - 1) // copies
            yield "1 all-reduce of shards across replicas", share * reduces, True
    elif spec.kind == "ddp":
        yield "1 all-reduce of the gradients", 2 * grads * (ranks - 1) // ranks, True
    else:
        batches = job.accumulation if spec.kind == "zero2" else 1
        weights = sum(p.numel * n * ITEM_BYTES[p.dtype] for p, n, _ in trained)
        name = "1 reduce-scatter of the gradients, 1 all-gather of the weights"
        if spec.kind == "zero2" and not spec.megatron:  # it is an all-reduce of buckets by default
            name, batches = (
                "1 all-reduce of the gradients, 1 all-gather of the weights",
                2 * batches,
            )
        yield name, (grads * batches + weights) * (ranks - 1) // ranks, True


def _fully_sharded(job: Job, counted: Counted) -> Iterable[Sent]:
    """FSDP of what is on all ranks, and of experts over those that have the same ones."""
    spec = job.sharding
    alone = replace(job, sharding=replace(spec, ep=1))
    yield from _data_parallel(alone, [entry for entry in counted if not entry[0].expert])
    group = spec.ranks_of(True) * spec.dp_replicate * spec.tp
    experts = replace(job, sharding=replace(spec, ep=1, world=group))
    for name, size, far in _data_parallel(experts, [e for e in counted if e[0].expert]):
        yield f"{name} (experts)", size, far


def _model_parallel(job: Job, counted: Counted, gpus_per_node: int) -> Iterable[Sent]:
    spec = job.sharding
    blocks = [(p, n) for p, n, in_block in counted if in_block and len(p.shape) == 2]
    if not blocks or max(spec.tp, spec.cp, spec.ep, spec.pp) == 1:
        return
    hidden = _hidden(job)
    layers = max(n for _, n in blocks)
    boundary = job.micro * job.seq_len * hidden * 2 * job.accumulation
    if spec.tp > 1:  # an all-reduce sends what an all-gather and a reduce-scatter do
        name, times = "4 all-reduces of activations a layer (tensor)", 8
        if spec.sequence_parallel:
            name, times = "4 all-gathers, 4 reduce-scatters of activations a layer (tensor)", 8
            if spec.megatron:  # inputs of two products are gathered again for their weights
                name = "6 all-gathers, 4 reduce-scatters of activations a layer (tensor)"
                times = 10
        yield name, times * layers * boundary * (spec.tp - 1) // spec.tp, False
    if spec.cp > 1:  # keys and values go round forward, and with their gradients backward
        keys = 2 * _kv_width(job) * boundary // hidden
        yield "keys and values around the ring (context)", 3 * layers * keys * (spec.cp - 1), True
    if spec.ep > 1:
        yield (*_routed(job, counted, boundary), spec.ep > gpus_per_node)
    if spec.pp > 1:
        yield "activations and their gradients between stages", 2 * boundary, True


def _routed(job: Job, counted: Counted, boundary: int) -> tuple[str, int]:
    """Dispatch and combine, forward and backward, and again where a block is run again.

    Each token goes to each of its experts, a balanced share of which is elsewhere.
    """
    spec = job.sharding
    layers = max((n for p, n, _ in counted if p.expert), default=0)
    times = 6 if spec.spread and job.checkpoint_every else 4
    if spec.shares_batch:
        boundary //= spec.token_parts
    sent = times * layers * boundary * _experts_each(job) * (spec.ep - 1) // spec.ep
    return f"{times} all-to-alls a layer (experts)", sent


def _text(job: Job) -> dict[str, object]:
    nested = job.config.get("text_config")
    return {**job.config, **(nested if isinstance(nested, dict) else {})}


def _hidden(job: Job) -> int:
    config = _text(job)
    found = (config.get(name) for name in ("hidden_size", "n_embd", "d_model", "dim"))
    return next((value for value in found if isinstance(value, int)), 0)


def _kv_width(job: Job) -> int:
    config = _text(job)
    named = map(config.get, ("num_attention_heads", "n_head", "n_heads"))
    heads = next((count for count in named if count), 1)
    kv = config.get("num_key_value_heads") or heads
    width = config.get("head_dim")
    assert isinstance(heads, int) and isinstance(kv, int)
    return kv * (width if isinstance(width, int) else _hidden(job) // heads)


def _experts_each(job: Job) -> int:
    config = _text(job)
    names = ("num_experts_per_tok", "experts_per_token", "moe_top_k", "top_k")
    return next((n for n in map(config.get, names) if isinstance(n, int)), 1)
