"""``check --against``: what got worse than a plan, or than an earlier answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftplan.cli.flags import JobFlags
from ftplan.errors import Location
from ftplan.report import Finding, Report
from ftplan.units import GIB

__all__ = ["Baseline", "read_baseline", "worsened"]

_RANK = {"fits": 0, "tight": 1, "unknown": 2, "over": 3}
Results = tuple[tuple[str, Report], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What is remembered of an earlier answer about one job."""

    verdict: str
    peak_bytes: int | None
    """Expected bytes on the device (allocated, where that is all there is)."""
    findings: frozenset[tuple[str, str]]
    """Code and message (its numbers aside) of everything that was found then."""


def read_baseline(path: Path, flags: JobFlags) -> Mapping[str, Baseline]:
    """The baselines by file; the key ``""`` is one that every file is held against.

    ``path`` is the JSON (or YAML) of an earlier ``check`` or ``memory``, or a plan or trainer's
    config, which is then estimated with the same flags.
    """
    from ftplan.files.document import read_document

    if path.suffix.lower() in (".json", ".yaml", ".yml"):
        document = read_document(path)
        data = document.data
        if isinstance(data, dict) and isinstance(data.get("results"), list):
            return {
                str(row.get("file", "")): _remembered(row)
                for row in data["results"]
                if isinstance(row, dict)
            }
        if isinstance(data, dict) and "allocated_bytes" in data:
            return {"": _remembered(data)}
    from ftplan.cli.jobs import estimate_job, read_job

    report = estimate_job(read_job(path, flags))
    peak = report.device_bytes or report.allocated_bytes
    return {
        "": Baseline(
            verdict=report.verdict or "unknown",
            peak_bytes=peak.expected if peak is not None else None,
            findings=frozenset(_known_as(f.code, f.message) for f in report.findings),
        )
    }


def _known_as(code: str, message: str) -> tuple[str, str]:
    """A finding is the same one when only its numbers have changed."""
    return code, re.sub(r"[0-9][0-9.,]*", "#", message)


def _remembered(row: Mapping[str, Any]) -> Baseline:
    peak = row.get("device_bytes") or row.get("allocated_bytes")
    expected = peak.get("expected") if isinstance(peak, dict) else None
    findings = row.get("findings")
    return Baseline(
        verdict=str(row.get("verdict") or "unknown"),
        peak_bytes=expected if isinstance(expected, int) else None,
        findings=frozenset(
            _known_as(str(f.get("code")), str(f.get("message")))
            for f in (findings if isinstance(findings, list) else [])
            if isinstance(f, dict)
        ),
    )


def worsened(results: Results, baselines: Mapping[str, Baseline]) -> Results:
    """Only the files that got worse, each with only what is new, and by how much it grew.

    A file that the baseline does not know is reported whole.
    """
    kept = []
    for file, report in results:
        before = baselines.get(file) or baselines.get("") or _by_name(file, baselines)
        if before is None:
            kept.append((file, report))
            continue
        new = tuple(
            f for f in report.findings if _known_as(f.code, f.message) not in before.findings
        )
        peak = report.device_bytes or report.allocated_bytes
        grew = peak.expected - before.peak_bytes if peak and before.peak_bytes is not None else 0
        worse = _RANK[report.verdict or "unknown"] > _RANK.get(before.verdict, 2)
        if grew > 0 and peak is not None:
            growth = Finding(
                code="CMP001",
                severity="error" if worse and report.verdict == "over" else "warning",
                message=(
                    f"needs {grew / GIB:.2f} GiB more than the baseline "
                    f"({peak.expected / GIB:.2f} GiB, verdict {before.verdict} before and "
                    f"{report.verdict or 'unknown'} now)"
                ),
                location=Location(file=file),
            )
            new = (growth, *new)
        if new or worse:
            kept.append((file, replace(report, findings=new)))
    return tuple(kept)


def _by_name(file: str, baselines: Mapping[str, Baseline]) -> Baseline | None:
    """The same file as another checkout called it, when only one can be meant."""
    ends = [b for name, b in baselines.items() if Path(name).name == Path(file).name]
    return ends[0] if len(ends) == 1 else None
