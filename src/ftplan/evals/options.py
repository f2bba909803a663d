"""What the user tells a reader of result files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from ftplan.dataclass import dataclass

__all__ = ["ReadOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """What the user tells a reader."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Field of a row -> column of the file, for tables of unknown origin (`input: question`)."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Metric -> smallest passing score (largest, where lower is better)."""
    tool: str = ""
    """Read as this tool's file; empty: recognised by content."""
