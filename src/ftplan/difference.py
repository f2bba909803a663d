"""What changed between two jobs: the keys of their plans, and the terms of their answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.report import Interval, Report, Verdict

__all__ = ["BytesChange", "Difference", "KeyChange", "Step", "difference"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyChange:
    """A key of the plan (after defaults) whose value differs; None: it is not there."""

    key: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class BytesChange:
    """An amount of memory before and after, in bytes."""

    name: str
    before: int
    after: int
    delta: int
    """``after`` less ``before``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One change on the way from the first plan to the second, and what it does by itself."""

    keys: tuple[KeyChange, ...]
    """Keys that change together: none of them makes a job without the others."""
    delta: int
    """Bytes that the expected allocated peak goes up by, after all earlier steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The answer of ``ftplan diff``."""

    before: str
    """Name of the first file."""
    after: str
    """Name of the second."""
    verdict_before: Verdict | None
    verdict_after: Verdict | None
    plan: tuple[KeyChange, ...]
    totals: tuple[BytesChange, ...]
    """Expected bytes of each counter that both answers have."""
    terms: tuple[BytesChange, ...]
    """Terms alive at either peak whose bytes differ, the largest change first."""
    steps: tuple[Step, ...] = ()
    """From the first plan to the second, one change after another; they add up to the change of
    the allocated peak. None where only one key differs."""
    schema_version: int = 1


def difference(
    before: Report, after: Report, *, names: tuple[str, str] = ("before", "after")
) -> Difference:
    """Compare two reports, term by term."""
    plans = _flat(before.job), _flat(after.job)
    keys = dict.fromkeys([*plans[0], *plans[1]])
    terms = _terms(before), _terms(after)
    changed = [_change(n, terms[0].get(n, 0), terms[1].get(n, 0)) for n in {**terms[0], **terms[1]}]
    return Difference(
        before=names[0],
        after=names[1],
        verdict_before=before.verdict,
        verdict_after=after.verdict,
        plan=tuple(
            KeyChange(key=key, before=plans[0].get(key), after=plans[1].get(key))
            for key in keys
            if plans[0].get(key) != plans[1].get(key)
        ),
        totals=tuple(
            _change(name, old.expected, new.expected)
            for name, old, new in _totals(before, after)
            if old is not None and new is not None
        ),
        terms=tuple(sorted((c for c in changed if c.delta), key=lambda change: -abs(change.delta))),
    )


def _change(name: str, before: int, after: int) -> BytesChange:
    return BytesChange(name=name, before=before, after=after, delta=after - before)


def _totals(a: Report, b: Report) -> list[tuple[str, Interval | None, Interval | None]]:
    return [
        ("allocated", a.allocated_bytes, b.allocated_bytes),
        ("reserved", a.reserved_bytes, b.reserved_bytes),
        ("device", a.device_bytes, b.device_bytes),
        ("host", a.host_bytes, b.host_bytes),
    ]


def _terms(report: Report) -> dict[str, int]:
    found: dict[str, int] = {}
    for term in report.terms:
        if term.at_peak:
            found[term.name] = found.get(term.name, 0) + term.bytes
    return found


def _flat(job: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in job.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
