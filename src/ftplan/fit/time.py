"""How long a step takes: operations, bytes and launches against what the card can do.

One kernel runs after the other, so times add up: matrix products at the share of the card's rate
that their width reaches, everything else at the speed of the memory (each tensor that is made is
written and read, partly out of a cache). If the host cannot launch the kernels as fast, it decides
instead. What crosses the links between cards hides behind that in part. The shares are read off
published throughput (``catalog/data/utilisation.json``, written by tools/gen_utilisation.py).
"""

from __future__ import annotations

from math import ceil

from ftplan.dataclass import dataclass
from ftplan.fit.flops import Compute, Work, hidden_of
from ftplan.fitting import Spread, TimeEstimate
from ftplan.memory.estimate import Structure
from ftplan.memory.host import offloaded_bytes, wire_of
from ftplan.memory.job import Job

__all__ = [
    "Amount", "Demand", "Load", "Speed", "Utilisation", "data_time", "micro_step",
    "tokens_per_second",
]  # fmt: skip

LAUNCH_SECONDS = Spread(low=3e-6, expected=6e-6, high=14e-6)
"""Host time per kernel: PyTorch eager, one kernel for each tensor that is made."""
HOST_LINK = 20e9
"""Bytes a second between a card and its host: PCIe 4.0 x16 with pinned buffers, one direction."""
LINK_SHARE = 0.68
"""Of a link's rate that collectives reach: 200 to 208 of 300 GB/s on A100s (NVIDIA/nccl-tests,
issues 149 and 178)."""
HOST_MEMORY = 100e9
"""Bytes a second of a host's memory that an optimizer running there reaches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What a card can do."""

    flops: float
    """Dense operations a second in the dtype of the matmuls."""
    bandwidth: float
    """Bytes a second of its memory."""
    link: float
    """Bytes a second to other cards, one direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Utilisation:
    """What share of the card's rate its kind reaches in practice."""

    best: float
    """Of matmuls, for very wide models."""
    half_width: int
    """Hidden size at which matmuls reach half of that."""
    attention: float
    """Of fused attention kernels."""
    traffic: float
    """Bytes that cross the memory for each byte that is allocated."""
    overlap: float
    """Of what crosses the links, hidden behind the computation."""
    spread: float
    """The slowest is this many times the expected time, the fastest that part of it."""
    source: str

    def linear(self, width: int) -> float:
        """Expected share of matmuls at a hidden size."""
        return self.best * width / (width + self.half_width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one micro batch asks of each card."""

    work: Work
    width: int
    """Hidden size."""
    made_bytes: int
    """Tensors that are allocated."""
    update_bytes: float
    """What the optimizer reads and writes, its share of the step."""
    launches: int
    wire_bytes: float
    """Sent to other cards, its share of the step."""
    host_seconds: float
    """Weights, gradients and states that pass to the host and back, and the update there."""


class Demand:
    """What a recorded step asks of each card, as a function of its batch."""

    def __init__(self, structure: Structure, job: Job) -> None:
        self.compute = Compute(structure.program)
        wire = wire_of(job, structure.counted)
        states = sum(
            term.bytes for term in structure.static
            if term.name.startswith(("optimizer/", "weights/trainable", "adapters/"))
        )  # fmt: skip
        self._wire_bytes = wire.bytes_per_step / max(1, job.accumulation) if wire else 0.0
        self._once = wire is not None and job.sharding.kind not in ("fsdp", "zero3", "zero2")
        self._accumulation = max(1, job.accumulation)
        self._update_bytes = 2.0 * states
        self._host_seconds = _host_seconds(structure, job)
        self._width = hidden_of(job.config)

    def at(self, micro: int, seq_len: int, chunk: int, accumulation: int) -> Load:
        """The load of one of ``accumulation`` micro batches."""
        steps = max(1, accumulation)
        # what is sent once a step is shared by its micro batches, what each of them sends is not
        times = self._accumulation / steps if self._once else 1.0
        return Load(
            work=self.compute.at(micro, seq_len, chunk),
            width=self._width,
            made_bytes=self.compute.born_bytes(micro, seq_len, chunk),
            update_bytes=self._update_bytes / steps,
            launches=self.compute.births,
            wire_bytes=self._wire_bytes * times,
            host_seconds=self._host_seconds / steps,
        )


def _host_seconds(structure: Structure, job: Job) -> float:
    """Seconds of one step that wait for the host, where something is kept there."""
    if job.sharding.offload not in ("optimizer", "params", "nvme"):
        return 0.0
    kept = offloaded_bytes(job, structure.counted)
    trained = structure.trainable_params / max(1, job.sharding.world)
    crossing = 4 * trained  # gradients down and weights up, two bytes each
    if job.sharding.offload != "optimizer":
        passes = 3 if job.checkpoint_every else 2
        weights = kept - 20 * trained if kept > 20 * trained else kept
        crossing += passes * weights * job.accumulation
    return float(crossing) / HOST_LINK + 28 * trained / HOST_MEMORY


def micro_step(load: Load, speed: Speed, share: Utilisation) -> tuple[Spread, str]:
    """Seconds of one micro batch on one card, and what takes most of them."""
    work = load.work
    matmuls = (work.total - work.attention) / (speed.flops * share.linear(load.width))
    compute = matmuls + work.attention / (speed.flops * share.attention)
    memory = (share.traffic * load.made_bytes + load.update_bytes) / speed.bandwidth
    wire = load.wire_bytes / (speed.link * LINK_SHARE) if speed.link else 0.0
    bounds = {
        "compute": compute,
        "memory bandwidth": memory,
        "interconnect": wire,
        "host link": load.host_seconds,
        "kernel launches": load.launches * LAUNCH_SECONDS.expected - compute - memory,
    }

    def seconds(factor: float, launch: float) -> float:
        busy = max((compute + memory) * factor, load.launches * launch)
        moved = wire * factor
        shown = max(busy, moved) + (1 - share.overlap) * min(busy, moved)
        return shown + load.host_seconds * factor

    return (
        Spread(
            low=seconds(1 / share.spread, LAUNCH_SECONDS.low),
            expected=seconds(1.0, LAUNCH_SECONDS.expected),
            high=seconds(share.spread, LAUNCH_SECONDS.high),
        ),
        max(bounds, key=lambda name: bounds[name]),
    )


def tokens_per_second(seconds: Spread, tokens: int) -> Spread:
    """Tokens a second: the slowest time is the lowest rate."""
    return Spread(
        low=tokens / seconds.high, expected=tokens / seconds.expected, high=tokens / seconds.low
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """Data to be processed, all passes together."""

    tokens: int
    """Without padding, and without what is cut off."""
    sequences: float
    """That go through the model."""
    seconds: Spread
    """Of one micro batch of them."""


def data_time(
    seconds: Spread,
    bound: str,
    load: Load,
    speed: Speed,
    *,
    micro: int,
    sequences: int,
    seq_len: int,
    accumulation: int,
    gpus: int,
    amount: Amount | None,
    price_per_hour: float | None,
    watts: float | None,
) -> TimeEstimate:
    """The rate of a job, and the hours, cost and energy of the data where they are known.

    ``sequences`` of one example (a preference pair is two); ``price_per_hour`` and ``watts`` are
    those of one card.
    """
    together = micro * sequences * gpus
    rate = tokens_per_second(seconds, together * seq_len)
    hours = cost = energy = each = None
    steps = None
    if price_per_hour is not None:
        seconds_each = Spread(
            low=1e6 / rate.high, expected=1e6 / rate.expected, high=1e6 / rate.low
        )
        each = seconds_each.times(price_per_hour * gpus / 3600)
    if amount is not None:
        steps = ceil(amount.sequences / (together * accumulation))
        hours = amount.seconds.times(amount.sequences / together / 3600)
        if price_per_hour is not None:
            cost = hours.times(price_per_hour * gpus)
        if watts is not None:
            energy = hours.times(watts * gpus / 1000)
    work = load.work
    return TimeEstimate(
        micro=micro,
        seq_len=seq_len,
        flops_per_micro_batch=work.total,
        model_flops_per_micro_batch=work.model,
        flops={
            "forward": work.forward,
            "backward": work.backward,
            "recompute": work.recompute,
            "attention": work.attention,
        },
        model_flops_utilisation=work.model / (speed.flops * seconds.expected),
        seconds_per_micro_batch=seconds,
        tokens_per_second=rate,
        bound=bound,
        tokens=amount.tokens if amount is not None else None,
        steps=steps,
        hours=hours,
        cost=cost,
        cost_per_million_tokens=each,
        energy_kwh=energy,
    )
