"""What an evaluation tool reported, in one shape for every tool.

A reader turns a result file into an :class:`EvalRun`. Nothing is concluded here that the tool did
not say: ``passed`` is ``None`` where it judged nothing, a score without a threshold stays a score
unless one was assumed, and an assumed threshold is marked as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Aggregate", "Check", "EvalRun", "ReadOptions", "ResultRow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One metric, assertion or scorer on one row."""

    name: str
    """As the tool shows it: a metric's own name or the assertion's type."""
    signal: str = ""
    """What the check is, where that differs from its name: an assertion's type (`is-json`)."""
    passed: bool | None = None
    """None: the tool gave no verdict and no threshold could be applied."""
    score: float | None = None
    threshold: float | None = None
    """In units of ``score``."""
    threshold_assumed: bool = False
    """The tool has no threshold here: ftplan's default was used."""
    reason: str = ""
    error: str = ""
    """The check itself crashed (a judge timed out): it says nothing about the answer."""
    decides: bool = True
    """False: shown, but never makes the row pass or fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRow:
    """One answer of one system to one item, with its checks."""

    id: str
    """Unique within the run."""
    item: str
    """Which item was answered: equal in two runs for the same item, equal among repeats."""
    passed: bool | None = None
    """None: not judged, or ``error`` is set."""
    checks: tuple[Check, ...] = ()
    input: str = ""
    output: str = ""
    expected: str = ""
    contexts: tuple[str, ...] = ()
    """Passages that the system was given to answer from."""
    reason: str = ""
    error: str = ""
    """Why there is no answer to judge: a timeout, a rate limit, a crashed harness."""
    description: str = ""
    variant: str = ""
    """Which prompt, model or epoch setting answered, where one file holds several."""
    kind: str = ""
    """A failure kind that the file itself names; empty in all tools' own formats."""
    line: int | None = None
    """1-based line of the file, where rows have one."""

    @property
    def failing_checks(self) -> tuple[Check, ...]:
        """The checks that say no, deciding ones first."""
        failed = [check for check in self.checks if check.passed is False]
        return tuple(sorted(failed, key=lambda check: not check.decides))


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """A number over many rows, from a file that holds no rows."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    samples: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRun:
    """One result file."""

    tool: str
    version: str = ""
    source: str = ""
    """The file's name, as the user gave it."""
    rows: tuple[ResultRow, ...] = ()
    aggregates: tuple[Aggregate, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader of the numbers has to know: assumed thresholds, missing rows."""

    @property
    def failures(self) -> tuple[ResultRow, ...]:
        """Rows with a verdict, and the verdict is no."""
        return tuple(row for row in self.rows if row.passed is False and not row.error)

    @property
    def errors(self) -> tuple[ResultRow, ...]:
        """Rows without an answer to judge: they count for nobody."""
        return tuple(row for row in self.rows if row.error)

    @property
    def unjudged(self) -> tuple[ResultRow, ...]:
        """Rows with an answer on which nothing decided."""
        return tuple(row for row in self.rows if row.passed is None and not row.error)

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of the systems in this file, in order of appearance."""
        return tuple(dict.fromkeys(row.variant for row in self.rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """What the user tells a reader."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Field of a row -> column of the file, for tables of unknown origin (`input: question`)."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Metric -> smallest passing score (largest, where lower is better)."""
    tool: str = ""
    """Read as this tool's file; empty: recognised by content."""
