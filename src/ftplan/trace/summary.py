"""A traced job as plain data: truth beside prediction, for every window."""

from __future__ import annotations

from typing import Any

from ftplan.report import Report
from ftplan.trace.core import TraceResult

__all__ = ["by_module", "summary", "timeline"]

_GROUPS = {
    "weights": ("weights",),
    "adapters": ("adapters",),
    "gradients": ("gradients", "buckets"),
    "optimizer states": ("optimizer",),
}
_REST = "activations and temporaries"


def _group(name: str) -> str:
    first = name.partition("/")[0]
    if first == "buffers":
        return "weights"
    for group, prefixes in _GROUPS.items():
        if first in prefixes:
            return group
    return _REST


def _folded(terms: dict[str, int]) -> dict[str, int]:
    folded = dict.fromkeys((*_GROUPS, _REST), 0)
    for name, size in terms.items():
        folded[_group(name)] += size
    return folded


def summary(result: TraceResult, report: Report | None, job: Any) -> dict[str, Any]:
    """Truth and, where the calculator answers, its prediction, in bytes; ``error`` is a share."""
    predicted = report.allocated_bytes.expected if report and report.allocated_bytes else None
    phases = {phase.name: phase.peak_bytes for phase in report.phases} if report else {}
    terms: dict[str, int] = {}
    for term in report.terms if report else ():
        if term.at_peak:
            terms[term.name] = terms.get(term.name, 0) + term.bytes
    traced_terms = _folded(result.at_peak())
    predicted_terms = _folded(terms) if report else {}
    return {
        "schema_version": 1,
        "job": job,
        "allocated_bytes": {"traced": result.allocated_bytes, "predicted": predicted},
        "error": (
            (predicted - result.allocated_bytes) / result.allocated_bytes
            if predicted is not None
            else None
        ),
        "peak_phase": {
            "traced": result.peak_phase,
            "predicted": report.peak_phase if report else None,
        },
        "phases": [
            {"name": name, "traced": peak, "predicted": phases.get(name)}
            for name, peak in result.phases.items()
        ],
        "terms": [
            {"name": name, "traced": size, "predicted": predicted_terms.get(name)}
            for name, size in traced_terms.items()
        ],
        "traced_terms": result.at_peak(),
        "model": {
            "total_params": result.total_params,
            "trainable_params": result.trainable_params,
        },
        "versions": result.versions,
    }


def by_module(result: TraceResult, depth: int = 3) -> list[dict[str, Any]]:
    """What each module holds at the peak, largest first; layers of one kind are added up.

    ``depth`` counts the parts of a module's path that are kept, a list's index not counted.
    """
    rows: dict[tuple[str, str], int] = {}
    for entry in result.alive():
        module = _short(entry.module, depth)
        key = (module, result.group_of(entry))
        rows[key] = rows.get(key, 0) + entry.bytes
    return [
        {"module": module, "term": term, "bytes": size}
        for (module, term), size in sorted(rows.items(), key=lambda item: -item[1])
    ]


def _short(path: str, depth: int) -> str:
    parts = [part for part in path.split(".") if part not in ("base_model", "base_layer")]
    while parts[:2] == ["model", "model"]:
        parts = parts[1:]
    kept: list[str] = []
    for part in parts:
        if part.isdigit():
            kept.append("*")
            continue
        if sum(item != "*" for item in kept) == depth:
            break
        kept.append(part)
    return ".".join(kept) or "(outside the model)"


def timeline(result: TraceResult, points: int = 200) -> dict[str, Any]:
    """Live bytes over the second step: for each of ``points`` slices the most that lived in it."""
    begin = next(clock for clock, step, _ in result.marks if step == 2)
    end = next(clock for clock, step, phase in result.marks if clock > begin and phase == "end")
    width = max(1, end - begin)
    tops = [0] * points
    live = 0
    position = 0
    for clock, after in [*result.curve, (end, 0)]:
        stop = points if clock >= end else max(0, (clock - begin) * points // width)
        if clock >= begin:
            for index in range(position, min(stop + 1, points)):
                tops[index] = max(tops[index], live)
            position = min(stop, points - 1)
        if clock >= end:
            break
        live = after
        if clock >= begin:
            tops[position] = max(tops[position], live)
    phases = [
        {"name": phase, "at": (clock - begin) * points // width}
        for clock, step, phase in result.marks
        if step == 2 and phase in ("forward", "backward", "step")
    ]
    return {"live_bytes": tops, "phases": phases, "peak_bytes": result.allocated_bytes}
