"""What we answer with: the report of one job. Bytes are integers, every total has an interval.

The JSON of ``ftplan memory`` and ``ftplan check`` is these classes, field for field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from ftplan.dataclass import dataclass
from ftplan.errors import Location

__all__ = [
    "Assumption",
    "CheckReport",
    "Finding",
    "GpuSummary",
    "Interval",
    "ModelSummary",
    "Phase",
    "Remedy",
    "Report",
    "Severity",
    "Term",
    "Verdict",
]

Severity = Literal["error", "warning", "info"]
Verdict = Literal["fits", "tight", "over", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate in bytes. Most readings fall between ``low`` and ``high``."""

    low: int
    expected: int
    high: int

    def __post_init__(self) -> None:
        assert 0 <= self.low <= self.expected <= self.high, self

    def plus(self, other: Interval) -> Interval:
        """The sum of two estimates whose errors may all point the same way."""
        return Interval(
            low=self.low + other.low,
            expected=self.expected + other.expected,
            high=self.high + other.high,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One named part of the answer, in bytes per GPU (the worst rank)."""

    name: str
    """``weights/frozen``, ``optimizer/states`` ...: a group of the contract, then the detail."""
    bytes: int
    at_peak: bool
    """Alive at the worst moment: these terms add up to ``allocated_bytes.expected``."""
    formula: str
    """The formula with the numbers put in."""
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A phase of the step and the most that is allocated in it, in bytes."""

    name: str
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something the user should know, with a permanent code that ``ftplan explain`` knows."""

    code: str
    severity: Severity
    message: str
    location: Location | None = None
    help: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumption:
    """A value that was not given: which key, what was taken, and where that default comes from."""

    key: str
    value: Any
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A change to the plan. ``verdict`` is the one after this and all earlier remedies."""

    change: Mapping[str, Any]
    saves_bytes: int
    costs: str
    verdict: Verdict | None
    verdict_alone: Verdict | None = None
    """The one after this remedy by itself."""
    in_file: Mapping[str, Any] | None = None
    """The change in the words of the trainer's own file; a key that is None goes. None: the job
    is no trainer's file, or the trainer has no words for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """The model in two numbers (parameters, not bytes)."""

    name: str
    total_params: int
    trainable_params: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSummary:
    """The card the job is planned for; ``usable_bytes`` is after headroom and reservations."""

    name: str
    usable_bytes: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The answer for one job: three counters never mixed, the moment that decides, and why."""

    verdict: Verdict | None
    model: ModelSummary | None
    job: Mapping[str, Any]
    allocated_bytes: Interval | None
    """What ``torch.cuda.max_memory_allocated()`` will show on the worst rank."""
    reserved_bytes: Interval | None
    """What ``torch.cuda.max_memory_reserved()`` will show: the allocator's cache added."""
    device_bytes: Interval | None
    """What ``nvidia-smi`` will show: CUDA context, NCCL and libraries added."""
    host_bytes: Interval | None
    gpu: GpuSummary | None
    peak_phase: str | None
    phases: tuple[Phase, ...] = ()
    terms: tuple[Term, ...] = ()
    findings: tuple[Finding, ...] = ()
    assumptions: tuple[Assumption, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """What only some jobs have: other ways to finetune, tokens a step, bytes on the wire."""
    schema_version: int = 1
    tool_version: str = ""

    def total(self) -> int:
        """The terms alive at the peak, in bytes: equal to ``allocated_bytes.expected``."""
        return sum(term.bytes for term in self.terms if term.at_peak)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The answer of ``check``: one report per file, in order, and the verdict of them all."""

    verdict: Verdict
    results: tuple[tuple[str, Report], ...]
    """Pairs of file name and its report."""
    schema_version: int = 1
