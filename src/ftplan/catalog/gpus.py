"""GPUs by name: what the driver lets a program use, and how fast the card is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ftplan.catalog.shelf import Shelf, canonical
from ftplan.dataclass import dataclass

__all__ = ["GPUS", "GpuRow", "Interconnect", "find_gpu", "search_gpus"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interconnect:
    """How cards of this kind talk to each other."""

    kind: str
    """`NVLink 4`, `PCIe 4.0 x16`, `unified`, ..."""
    bytes_per_s: int
    """Per GPU, both directions together, as vendors print it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GpuRow:
    """One card, or one device of a board that holds several."""

    name: str
    """Lower case with its label (`a100-80gb`)."""
    label: str
    """Name for people."""
    vendor: Literal["NVIDIA", "AMD", "Intel", "Apple"]
    """Who makes it."""
    generation: str
    """Architecture (`Ampere`)."""
    kind: Literal["data-centre", "workstation", "consumer", "laptop", "embedded"]
    """What it is sold for."""
    compute_capability: str | None
    """NVIDIA's (`8.6`); None for other vendors."""
    label_gb: int
    """The number on the box."""
    usable_bytes: int
    """What a program can use: the total that the driver reports to it."""
    usable_from: Literal["driver", "estimated"]
    """Whether a driver's figure was found, or a sibling's was taken."""
    usable_source: str
    """Where that figure, or the rule of the estimate, comes from."""
    smi_bytes: int | None
    """Total that nvidia-smi prints, which counts what the driver keeps for itself."""
    bandwidth_bytes_per_s: int
    """Memory bandwidth."""
    flops: dict[str, int]
    """Dense operations per second by dtype (`bf16`), sums in fp32 where cards distinguish."""
    interconnect: Interconnect
    """Links to other cards."""
    unified_memory: bool
    """CPU and GPU share one memory."""
    aliases: tuple[str, ...]
    """Other names: product names as drivers print them, short names."""
    source: str
    """Where rates and bandwidth are published."""
    date: str
    """When the row was last checked."""
    notes: str = ""
    """What a reader of the row must know."""
    mig_slices: int | None = None
    """Compute slices that it can be cut into (NVIDIA Multi-Instance GPU User Guide, Supported
    GPUs; A800, H800 and B300 as their siblings); None: it is not."""

    @property
    def supports_bf16(self) -> bool:
        """Whether the card has bfloat16 arithmetic (NVIDIA: capability 8.0 and up)."""
        return "bf16" in self.flops

    @property
    def supports_flash(self) -> bool:
        """Whether PyTorch's flash attention runs (NVIDIA: capability 8.0 and up)."""
        if self.compute_capability is not None:
            return int(self.compute_capability.split(".")[0]) >= 8
        return self.vendor == "AMD"


_VENDOR = re.compile(r"^(?:(?:nvidia|amd|intel|geforce|tesla|instinct|radeon)-)+")
_GLUED = re.compile(r"\b(rtx|gtx|rx)(?=\d)")


def _row(row: Mapping[str, Any]) -> GpuRow:
    link = Interconnect(**row["interconnect"])
    return GpuRow(**{**row, "aliases": tuple(row["aliases"]), "interconnect": link})


def _short(name: str) -> str:
    """``name`` without its maker, and with `80g`, `rtx3090` written `80gb`, `rtx-3090`."""
    key = _GLUED.sub(r"\1-", _VENDOR.sub("", canonical(name)))
    return re.sub(r"(\d)(?:g|gib)$", r"\1gb", key.removesuffix("-gpu"))


def _spellings(row: GpuRow) -> Iterable[str]:
    return (_short(name) for name in (row.name, *row.aliases))


GPUS: Shelf[GpuRow] = Shelf("GPU", "gpus", "gpus.json", _row, spellings=_spellings)
"""All GPUs."""


def find_gpu(name: str) -> GpuRow:
    """The GPU called ``name``: `a100-80gb`, `A10G`, `NVIDIA GeForce RTX 4090`, `rtx4090`.

    Raises ``AmbiguousNameError`` when several cards share the name (`a100`: 40 or 80 GB), and
    ``UnknownNameError`` with suggestions.
    """
    return GPUS.only(name, GPUS.lookup(name) or GPUS.lookup(_short(name)))


def search_gpus(query: str = "") -> tuple[GpuRow, ...]:
    """GPUs whose name or aliases hold every word of ``query``."""
    return GPUS.search(query)
