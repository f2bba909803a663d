"""What ``nvidia-smi`` says of the cards here, and slices of a card (MIG)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ftplan.errors import InputError
from ftplan.units import MIB

__all__ = ["FoundCard", "Slice", "parse_query", "parse_slice", "parse_slices", "slice_of"]

COMPUTE_SLICES = 7
MEMORY_SLICES = 8
"""A card is cut into seven parts of its compute units and eight of its memory."""
_PROFILE = re.compile(r"(\d)g\.(\d+)gb(?:\+\S*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCard:
    """One line of ``nvidia-smi --query-gpu=name,memory.total,memory.free --format=csv``."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A part of a card."""

    usable_bytes: int
    compute_share: float


def parse_query(text: str) -> list[FoundCard]:
    """Cards of the query's CSV, with or without its heading and units (MiB)."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 3:
            continue
        numbers = [re.fullmatch(r"(\d+)(?:\s*MiB)?", cell) for cell in cells[1:]]
        if numbers[0] is None or numbers[1] is None:
            continue
        total, free = (int(match[1]) * MIB for match in numbers if match is not None)
        found.append(FoundCard(name=cells[0], total_bytes=total, free_bytes=free))
    return found


def parse_slices(text: str) -> list[str]:
    """MIG profiles of ``nvidia-smi -L`` (``MIG 3g.40gb Device 0: (UUID: ...)``)."""
    return re.findall(r"^\s*MIG (\d+g\.\d+gb)", text, re.MULTILINE)


def parse_slice(text: str) -> tuple[str, str | None]:
    """``a100-80gb:3g.40gb`` as card and profile; a plain name has no profile."""
    name, sign, profile = text.partition(":")
    return (name, profile) if sign else (text, None)


def slice_of(profile: str, *, usable_bytes: int, label_gb: int) -> Slice:
    """What a profile leaves of a card. Raises InputError for what is no profile of it."""
    match = _PROFILE.fullmatch(profile)
    parts = round(int(match[2]) * MEMORY_SLICES / label_gb) if match is not None else 0
    compute = int(match[1]) if match is not None else 0
    if not (0 < parts <= MEMORY_SLICES and 0 < compute <= COMPUTE_SLICES):
        raise InputError(
            f"{profile!r} is no MIG profile of a card of {label_gb} GB",
            remedy=f"write it like 3g.{label_gb // 2}gb, as nvidia-smi mig -lgip lists them",
        )
    return Slice(
        usable_bytes=usable_bytes * parts // MEMORY_SLICES,
        compute_share=compute / COMPUTE_SLICES,
    )
