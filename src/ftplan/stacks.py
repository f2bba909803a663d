"""What ``ftplan compare`` answers: one job, as each stack would run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.report import Verdict

__all__ = ["StackComparison", "StackRow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StackRow:
    """The job on one stack."""

    stack: str
    """Name in a plan."""
    versions: str
    """The versions its profile was read from."""
    allocated_bytes: int | None
    """Expected peak; None: the stack does not run the job, ``note`` says why."""
    device_bytes: int | None
    """What nvidia-smi is expected to show."""
    peak_phase: str | None
    verdict: Verdict | None
    defaults: Mapping[str, Any]
    """What the profile fills in, by key of the plan, where it differs from another stack's."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackComparison:
    """The answer of ``ftplan compare``: a row for each stack, the smallest peak first."""

    model: str
    rows: tuple[StackRow, ...]
    tool_version: str = ""
    schema_version: int = 1
