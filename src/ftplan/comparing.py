"""The verb ``compare`` of the library: one job, as each stack would run it.

Part of the library's front: names from the catalogues in, answers out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ftplan import __version__, api
from ftplan.catalog.stacks import find_stack, stack_names
from ftplan.errors import FtplanError, InputError
from ftplan.report import Report
from ftplan.spec import Plan
from ftplan.stacks import StackComparison, StackRow

__all__ = ["compare_stacks"]


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
