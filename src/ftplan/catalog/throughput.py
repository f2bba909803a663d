"""Published training throughput, and the share of a card's rate that it amounts to.

``data/throughput.json`` holds readings with their sources; each source is either ``fitted`` (the
shares of ``data/utilisation.json`` were read off it) or ``kept`` (the estimate is tried on it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftplan.catalog.gpus import GpuRow
from ftplan.catalog.shelf import read_rows
from ftplan.fit.time import Speed, Utilisation

__all__ = ["Reading", "readings", "speed_of", "utilisation_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One published run."""

    id: str
    source: str
    url: str
    part: str
    """`fitted` or `kept`, by source."""
    gpu: str
    gpus: int
    method: str
    micro: int
    seq_len: int
    checkpointing: bool
    sharded: bool
    tokens_per_s_per_gpu: float
    model: str | None = None
    """Catalogue name."""
    config: dict[str, Any] | None = None
    """Or its shape."""
    attention: str = "sdpa"


def readings() -> tuple[Reading, ...]:
    """All published runs."""
    return tuple(Reading(**row) for row in read_rows("throughput.json"))


def utilisation_of(gpu: GpuRow) -> Utilisation:
    """What cards of this generation and kind reach; a wide interval where nothing is published."""
    rows = list(read_rows("utilisation.json"))
    best = next(
        (
            row
            for row in rows
            if row["generation"] in (gpu.generation, "")
            and (not row["kinds"] or gpu.kind in row["kinds"])
        ),
        rows[-1],
    )
    return Utilisation(
        best=best["best"],
        attention=best["attention"],
        low=best["low"],
        high=best["high"],
        source=best["source"],
    )


def speed_of(gpu: GpuRow, *, mixed_or_weights: str, share: float = 1.0) -> Speed:
    """The card's rates for a dtype of matmuls; ``share`` of a card that is sliced."""
    flops = gpu.flops.get(mixed_or_weights) or gpu.flops.get("fp16") or gpu.flops.get("fp32") or 0
    return Speed(
        flops=flops * share,
        bandwidth=gpu.bandwidth_bytes_per_s * share,
        link=gpu.interconnect.bytes_per_s / 2,
    )
