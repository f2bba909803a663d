"""Published training throughput, and the share of a card's rate that it amounts to.

``data/throughput.json`` holds readings with their sources, each as the plan that was run. A source
is kept apart or not by its name alone (:attr:`Reading.kept`); ``data/utilisation.json`` is made
from the others (tools/gen_utilisation.py), and the estimate is tried on those kept apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftplan.catalog.gpus import GpuRow
from ftplan.catalog.shelf import read_rows
from ftplan.dataclass import dataclass
from ftplan.fit.time import Speed, Utilisation

__all__ = ["Reading", "link_of", "readings", "speed_of", "utilisation_of"]

PCIE = 64e9
"""Both directions of PCIe 4.0 x16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One published run."""

    id: str
    source: str
    url: str
    plan: Mapping[str, Any]
    """As a plan file would say it."""
    tokens_per_s_per_gpu: float
    config: Mapping[str, Any] | None = None
    """The shape, where the plan names no model. MPT with a flash kernel has no class of its own:
    an OPT of the same widths stands in for it."""

    @property
    def kept(self) -> bool:
        """Nothing is read off this source: the SHA-256 of its name is odd."""
        from hashlib import sha256

        return sha256(self.source.encode()).digest()[-1] % 2 == 1


def readings() -> tuple[Reading, ...]:
    """All published runs."""
    return tuple(Reading(**row) for row in read_rows("throughput.json"))


def utilisation_of(gpu: GpuRow) -> Utilisation:
    """What cards of this generation and kind reach; a wide interval where nothing is published."""
    row = next(
        row
        for row in read_rows("utilisation.json")
        if (not row["generations"] or gpu.generation in row["generations"])
        and (not row["kinds"] or gpu.kind in row["kinds"])
        and (not row["gpus"] or gpu.name in row["gpus"])
    )
    names = ("best", "half_width", "attention", "traffic", "overlap", "spread", "source")
    return Utilisation(**{name: row[name] for name in names})


def link_of(gpu: GpuRow, gpus: int) -> float:
    """Bytes a second from one of so many cards to the others, one direction.

    A bridge joins two cards, beyond which there is PCIe. GeForce cards do not reach each other
    over PCIe: what they send crosses it twice, by way of the host.
    """
    both = float(gpu.interconnect.bytes_per_s)
    bridged = "bridge" in gpu.interconnect.kind
    if bridged and gpus > 2:
        both = PCIE
    through_host = gpu.kind in ("consumer", "laptop") and not (bridged and gpus <= 2)
    return both / 4 if through_host else both / 2


def speed_of(gpu: GpuRow, *, mixed_or_weights: str, gpus: int = 1, share: float = 1.0) -> Speed:
    """The card's rates for a dtype of matmuls; ``share`` of a card that is sliced."""
    flops = gpu.flops.get(mixed_or_weights) or gpu.flops.get("fp16") or gpu.flops.get("fp32") or 0
    return Speed(
        flops=flops * share,
        bandwidth=gpu.bandwidth_bytes_per_s * share,
        link=link_of(gpu, gpus),
    )
