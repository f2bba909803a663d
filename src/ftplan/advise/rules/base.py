"""What a rule is: a value with a permanent code, and everything its page says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal

from ftplan.advice import Step, Strength
from ftplan.advise.facts import Facts
from ftplan.advise.truth import Truth
from ftplan.dataclass import dataclass
from ftplan.failures import Failure, FailuresFile, State

__all__ = ["MARKS", "STRENGTHS", "Mark", "Rule", "Source", "case", "describe_case"]

Mark = Literal["V", "E", "S", "R", "C", "D"]

MARKS: dict[Mark, str] = {
    "V": "read in the source",
    "E": "read as an excerpt or abstract",
    "S": "a third party's summary",
    "R": "recalled: check before quoting",
    "C": "computed",
    "D": "a design choice of ftplan",
}
STRENGTHS: dict[Strength, str] = {
    "A": "controlled evidence, or a hard limit",
    "B": "several frameworks agree",
    "C": "one framework or one case",
    "D": "a design choice of ftplan",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a rule comes from, and how well that was checked."""

    mark: Mark
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule. ``when`` is a pure function of the facts; nothing else decides."""

    code: str
    title: str
    when: Callable[[Facts], Truth]
    checks: str
    """The preconditions in words."""
    step: Step | None
    """What it concludes; None: it classifies, warns or blocks only."""
    blocks: tuple[Step, ...] = ()
    reason: str
    sources: tuple[Source, ...]
    strength: Strength
    stop_when: str
    flips_if: str
    fires: FailuresFile
    """An example in which it fires."""
    rests: FailuresFile
    """An example in which it does not, for a reason that is known."""


def case(*rows: object, **state: Any) -> FailuresFile:
    """An example: rows are ``"kind"``, ``("kind", count)`` or :class:`Failure`."""
    failures = []
    for row in rows:
        if isinstance(row, Failure):
            failures.append(row)
        elif isinstance(row, tuple):
            failures.append(Failure(kind=row[0], count=row[1]))
        else:
            failures.append(Failure(kind=str(row)))
    return FailuresFile(state=State(**state), failures=tuple(failures))


def describe_case(file: FailuresFile) -> str:
    """An example as the lines of a failures file."""
    lines = ["state:"] if _given(file.state) else ["state: {}"]
    lines += [f"  {key}: {_yaml(value)}" for key, value in _given(file.state)]
    if not file.failures:
        return "\n".join([*lines, "failures: []"])
    lines.append("failures:")
    for failure in file.failures:
        pairs = ", ".join(f"{key.rstrip('_')}: {_yaml(value)}" for key, value in _given(failure))
        lines.append(f"  - {{{pairs}}}")
    return "\n".join(lines)


def _given(value: State | Failure) -> list[tuple[str, Any]]:
    items = ((field.name, getattr(value, field.name)) for field in fields(value))
    return [(name, item) for name, item in items if item is not None]


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    return str(value)
