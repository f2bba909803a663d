"""How long a step takes: operations, bytes and launches against what the card can do.

A step is bound by whichever is slowest: the matrix units, the memory that weights are read from
(and quantised ones expanded in), the host that launches kernels one by one, or the links between
cards. Matrix units reach a share of their rate that grows with the width of the model; the shares
are read off published throughput (``catalog/data/throughput.json``) by generation of the card.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftplan.fit.flops import Work
from ftplan.fitting import Spread, TimeEstimate
from ftplan.memory.estimate import Structure
from ftplan.memory.job import Job

__all__ = ["Speed", "Utilisation", "data_time", "micro_step", "tokens_per_second"]

HALF_WIDTH = 700
"""Hidden size at which matrix units reach half of their best share."""
LAUNCH_SECONDS = Spread(low=3e-6, expected=6e-6, high=14e-6)
"""Host time per kernel: PyTorch eager, one kernel for each tensor that is made."""
OVERLAP = 0.6
"""Share of the communication that hides behind the computation."""


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
    """What share of the card's rate a generation reaches in practice."""

    best: float
    """Of matmuls, for very wide models."""
    attention: float
    """Of fused attention kernels."""
    low: float
    """Slowest to expected."""
    high: float
    """Fastest to expected."""
    source: str

    def linear(self, hidden: int) -> float:
        """Expected share of matmuls at a hidden size."""
        return self.best * hidden / (hidden + HALF_WIDTH)


def _births(structure: Structure) -> int:
    """Tensors that are made in a micro batch: about as many kernels are launched."""
    return structure.program.births()


def _weight_traffic(structure: Structure, job: Job) -> float:
    """Bytes of weights read in a micro batch, and quantised ones written expanded and read."""
    stored = sum(term.bytes for term in structure.static if term.name.startswith("weights/"))
    passes = 3 if job.checkpoint_every else 2
    traffic = float(stored * passes)
    if job.weights.layout != "plain":  # expanded to 2 bytes, written and read
        traffic += structure.total_params * 4.0 * passes
    return traffic


def _wire(structure: Structure, job: Job) -> float:
    """Bytes a card sends in a micro batch (and for its share of the step's reduction)."""
    spec = job.sharding
    if spec.world <= 1:
        return 0.0
    share = (spec.world - 1) / spec.world
    gradients = structure.trainable_params * 2.0
    if spec.kind in ("fsdp", "zero3"):
        weights = sum(t.bytes for t in structure.static if t.name.startswith("weights/"))
        return (2 * weights * spec.world + gradients) * share
    return 2 * gradients * share / max(1, job.accumulation)


def micro_step(
    work: Work, structure: Structure, job: Job, speed: Speed, share: Utilisation, hidden: int
) -> tuple[Spread, str]:
    """Seconds of one micro batch on one card, and what binds it."""
    linear = work.total - work.attention
    compute = linear / (speed.flops * share.linear(hidden)) + work.attention / (
        speed.flops * share.attention
    )
    memory = _weight_traffic(structure, job) / (speed.bandwidth * 0.8)
    births = _births(structure)
    wire = _wire(structure, job) / (speed.link * 0.6) if speed.link else 0.0
    quantised = job.weights.layout != "plain"
    busy = compute + memory if quantised else max(compute, memory)
    bounds = {
        "compute": compute,
        "memory bandwidth": memory,
        "kernel launches": births * LAUNCH_SECONDS.expected,
        "interconnect": wire,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    return (
        Spread(
            low=max(busy / share.high, births * LAUNCH_SECONDS.low, wire),
            expected=max(busy, births * LAUNCH_SECONDS.expected) + max(0.0, wire - OVERLAP * busy),
            high=max(busy / share.low, births * LAUNCH_SECONDS.high) + wire,
        ),
        bound,
    )


def tokens_per_second(seconds: Spread, tokens: int) -> Spread:
    """Tokens a second: the slowest time is the lowest rate."""
    return Spread(
        low=tokens / seconds.high, expected=tokens / seconds.expected, high=tokens / seconds.low
    )


def data_time(
    seconds: Spread,
    bound: str,
    work: Work,
    *,
    micro: int,
    sequences: int,
    seq_len: int,
    accumulation: int,
    gpus: int,
    tokens: int | None,
    price_per_hour: float | None,
    watts: float | None,
) -> TimeEstimate:
    """The rate of a job, and the hours, cost and energy of ``tokens`` where they are known.

    ``sequences`` of one example (a preference pair is two); ``price_per_hour`` and ``watts`` are
    those of one card.
    """
    per_micro = micro * sequences * seq_len
    rate = tokens_per_second(seconds, per_micro * gpus)
    hours = cost = energy = None
    steps = None
    if tokens is not None:
        steps = -(-tokens // (per_micro * gpus * accumulation))
        hours = Spread(
            low=tokens / rate.high / 3600,
            expected=tokens / rate.expected / 3600,
            high=tokens / rate.low / 3600,
        )
        if price_per_hour is not None:
            cost = hours.times(price_per_hour * gpus)
        if watts is not None:
            energy = hours.times(watts * gpus / 1000)
    return TimeEstimate(
        micro=micro,
        seq_len=seq_len,
        flops_per_micro_batch=work.total,
        model_flops_per_micro_batch=work.model,
        seconds_per_micro_batch=seconds,
        tokens_per_second=rate,
        bound=bound,
        tokens=tokens,
        steps=steps,
        hours=hours,
        cost=cost,
        energy_kwh=energy,
    )
