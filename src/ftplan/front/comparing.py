"""One job as each stack would run it, and two jobs one change after another.

Part of the library's front: names from the catalogues in, answers out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ftplan import __version__
from ftplan.catalog.stacks import find_stack, stack_names
from ftplan.difference import KeyChange, Step
from ftplan.errors import FtplanError, InputError
from ftplan.front import api
from ftplan.front.resolve import resolve
from ftplan.report import Report
from ftplan.spec import Plan
from ftplan.stacks import StackComparison, StackRow

__all__ = ["compare_stacks", "steps_between"]


def compare_stacks(
    plan: Plan, stacks: Sequence[str] | None = None, *, base: Path | None = None
) -> StackComparison:
    """Size ``plan`` as each of ``stacks`` (None: all of them) would run it.

    What the plan says holds on every stack; what it leaves out is each stack's own. Raises
    InputError for a plan without a method, which no trainer runs, and when no stack runs it.
    """
    if plan.method is None or plan.model.params is not None:
        raise InputError(
            "stacks differ in how they train a model whose shape is known",
            remedy="give --model NAME (or --config PATH) and --method",
        )
    names = [find_stack(name).name for name in stacks] if stacks else list(stack_names())
    found: list[tuple[str, Report | None, str]] = []
    for name in dict.fromkeys(names):
        try:
            report = api.estimate(replace(plan, stack=name), base=base, with_remedies=False)
            found.append((name, report, ""))
        except FtplanError as error:
            found.append((name, None, error.message))
    reports = [report for _, report, _ in found if report is not None]
    if not reports:
        raise InputError(f"no stack runs this job: {found[0][2]}")
    moving = _differing(reports)
    rows = [_row(name, report, note, moving) for name, report, note in found]
    rows.sort(key=lambda row: (row.allocated_bytes is None, row.allocated_bytes or 0))
    model = reports[0].model
    return StackComparison(
        model=model.name if model else "",
        rows=tuple(rows),
        tool_version=__version__,
    )


def _differing(reports: Sequence[Report]) -> list[str]:
    """Keys that are assumed and not alike on all stacks."""
    assumed = [{a.key: a.value for a in report.assumptions} for report in reports]
    keys = dict.fromkeys(key for one in assumed for key in one)
    return [
        key
        for key in keys
        if key != "stack" and any(one.get(key) != assumed[0].get(key) for one in assumed)
    ]


def _row(name: str, report: Report | None, note: str, moving: Sequence[str]) -> StackRow:
    versions = find_stack(name).versions
    if report is None or report.allocated_bytes is None:
        return StackRow(
            stack=name, versions=versions, allocated_bytes=None, device_bytes=None,
            peak_phase=None, verdict="unknown", defaults={}, note=note,
        )  # fmt: skip
    assumed = {a.key: a.value for a in report.assumptions}
    return StackRow(
        stack=name,
        versions=versions,
        allocated_bytes=report.allocated_bytes.expected,
        device_bytes=report.device_bytes.expected if report.device_bytes else None,
        peak_phase=report.peak_phase,
        verdict=report.verdict,
        defaults={key: assumed[key] for key in moving if key in assumed},
    )


def steps_between(
    before: Plan, after: Plan, *, bases: tuple[Path | None, Path | None] = (None, None)
) -> tuple[Step, ...]:
    """What each difference of two plans does to the peak, one change after another.

    Keys that make no job by themselves (the method of a quantised model, and its format) change
    together. Empty where a plan has no peak, or nothing but one key differs.
    """
    plans = [
        resolve(plan, base=base).plan for plan, base in zip((before, after), bases, strict=True)
    ]
    current, goal = plans[0], plans[1]
    at = _peak(_spelled(current), bases[0])
    paths = list(_differing_paths(current, goal))
    if at is None or len(paths) < 2:
        return ()
    steps: list[Step] = []
    waiting: list[KeyChange] = []
    for path in paths:
        change = KeyChange(key=path, before=_at(current, path), after=_at(goal, path))
        waiting.append(change)
        tried = current
        for one in waiting:
            tried = _with(tried, one.key, one.after)
        peak = _peak(_spelled(tried), bases[1])
        if peak is None:
            continue
        steps.append(Step(keys=tuple(waiting), delta=peak - at))
        current, at, waiting = tried, peak, []
    return tuple(steps) if not waiting else ()


_LATER = ("method.prepare_kbit", "method.double_quant", "method.adapter_dtype", "loss.chunk")
"""What a format or a loss brings along, told apart from it."""


def _spelled(plan: Plan) -> Plan:
    """The plan with what a quantised model is not asked for yet switched off."""
    method = plan.method
    if method is None or method.kind in ("full", "partial"):
        return plan
    return replace(
        plan,
        method=replace(
            method,
            prepare_kbit=method.prepare_kbit or False,
            double_quant=method.double_quant or False,
        ),
    )


def _peak(plan: Plan, base: Path | None) -> int | None:
    try:
        report = api.estimate(plan, base=base, with_remedies=False)
    except FtplanError:
        return None
    return report.allocated_bytes.expected if report.allocated_bytes else None


def _differing_paths(a: Any, b: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys whose values differ, what others bring along last."""
    found = list(_paths(a, b, prefix))
    yield from (path for path in found if path not in _LATER)
    yield from (path for path in found if path in _LATER)


def _paths(a: Any, b: Any, prefix: str) -> Iterator[str]:
    for one in fields(a):
        left, right = getattr(a, one.name), getattr(b, one.name)
        if left == right:
            continue
        if is_dataclass(left) and is_dataclass(right):
            yield from _paths(left, right, f"{prefix}{one.name}.")
        else:
            yield f"{prefix}{one.name}"


def _at(plan: Any, path: str) -> Any:
    for name in path.split("."):
        plan = getattr(plan, name)
    return plan


def _with(plan: Any, path: str, value: Any) -> Any:
    name, _, rest = path.partition(".")
    return replace(plan, **{name: _with(getattr(plan, name), rest, value) if rest else value})
