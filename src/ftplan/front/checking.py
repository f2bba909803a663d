"""Does each planned job fit its GPU? And what got worse than an earlier answer?

Part of the library's front: files in, a report out; the command line prints it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftplan import __version__
from ftplan.dataclass import dataclass
from ftplan.errors import (
    FtplanError,
    Location,
    UnknownNameError,
    UnsupportedError,
    describe_fault,
)
from ftplan.files.document import read_document
from ftplan.front.jobs import Change, JobInput, estimate_job, read_job
from ftplan.report import CheckReport, Finding, Report, Verdict
from ftplan.units import GIB

__all__ = ["Baseline", "check", "check_one", "exit_code", "read_baseline", "worsened", "worst"]


def check(
    files: Iterable[str | Path],
    *,
    change: Change | None = None,
    trainer: str | None = None,
    overlays: Sequence[Path] = (),
    against: str | Path | None = None,
    raise_faults: bool = False,
) -> CheckReport:
    """The report of every file, in order; a file that is refused does not hide the others.

    ``change`` is laid over each plan (a GPU, a headroom); ``against`` is a plan or an earlier
    answer, and then only what got worse is reported. A fault of our own is an unknown verdict,
    or raised with ``raise_faults``.
    """
    results = tuple(
        (
            str(file),
            check_one(
                file,
                change=change,
                trainer=trainer,
                overlays=overlays,
                raise_faults=raise_faults,
            ),
        )
        for file in files
    )
    if against is not None:
        results = worsened(results, read_baseline(Path(against), change=change))
    return CheckReport(verdict=worst(r.verdict for _, r in results), results=results)


def check_one(
    path: str | Path,
    *,
    change: Change | None = None,
    trainer: str | None = None,
    overlays: Sequence[Path] = (),
    raise_faults: bool = False,
) -> Report:
    """The report of one file. A file that is refused has the verdict unknown and says why."""
    job = None
    try:
        job = read_job(path, change=change, trainer=trainer, overlays=overlays)
        report = estimate_job(job)
    except FtplanError as error:
        return _refused(str(path), error, job=job)
    except Exception as error:  # our own fault in one file must not hide the others
        if raise_faults:
            raise
        return _refused(
            str(path),
            FtplanError(
                describe_fault(error),
                remedy="this is a fault of ftplan; FTPLAN_DEBUG=1 shows where it happened",
            ),
            code="FIT010",
            job=job,
        )
    return _judged(job, report)


def _judged(job: JobInput, report: Report) -> Report:
    """The report, with a finding for a verdict that is not simply "fits"."""
    if report.verdict is not None:
        return replace(report, findings=(*_verdict_finding(job, report), *report.findings))
    if report.gpu is None:
        finding = Finding(
            code="FIT013",
            severity="error",
            message="no GPU is named, so nothing can be said about fitting",
            location=job.locate("hardware") or Location(file=job.file or ""),
            help="write hardware: {gpu: a100-80gb}, or pass --gpu NAME (ftplan gpus lists them)",
        )
        report = replace(report, findings=(finding, *report.findings))
    return replace(report, verdict="unknown")


def _verdict_finding(job: JobInput, report: Report) -> tuple[Finding, ...]:
    """A job that does not fit says so at the place where its GPU is named."""
    peak = report.device_bytes or report.allocated_bytes
    if report.verdict not in ("over", "tight") or report.gpu is None or peak is None:
        return ()
    is_over = report.verdict == "over"
    count = f" on each of {report.gpu.count}" if report.gpu.count > 1 else ""
    need = peak.expected if is_over else peak.high
    return (
        Finding(
            code="FIT001" if is_over else "FIT002",
            severity="error" if is_over else "warning",
            message=(
                f"{'needs' if is_over else 'may need'} {need / GIB:.2f} GiB{count}, "
                f"{report.gpu.name} has {report.gpu.usable_bytes / GIB:.2f} GiB to use"
                + (f"; the peak is in {report.peak_phase}" if report.peak_phase else "")
            ),
            location=job.locate("hardware.gpu") or Location(file=job.file or ""),
            help=_first_remedy(report),
        ),
    )


def _first_remedy(report: Report) -> str:
    fits = [i for i, remedy in enumerate(report.remedies) if remedy.verdict in ("fits", "tight")]
    if not fits:
        return "ftplan fit shows what would fit"
    changes = [
        text
        for remedy in report.remedies[: fits[0] + 1]
        for text in _written(remedy.in_file or remedy.change)
    ]
    return "it would with " + ", ".join(changes)


def _written(change: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A change to a plan, key by key: ``batch.micro: 1``."""
    texts: list[str] = []
    for key, value in change.items():
        if isinstance(value, Mapping):
            texts += _written(value, f"{prefix}{key}.")
        else:
            name = f"{prefix}{key}"
            texts.append(f"no {name}" if value is None else f"{name}: {_shown(value)}")
    return texts


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _refused(
    file: str, error: FtplanError, *, code: str | None = None, job: JobInput | None = None
) -> Report:
    if code is None:
        kinds: tuple[tuple[type[FtplanError], str], ...] = (
            (UnsupportedError, "FIT014"),
            (UnknownNameError, "FIT012"),
            (FtplanError, "FIT011"),
        )
        code = next(code for kind, code in kinds if isinstance(error, kind))
    line = f" ({error.source_line.strip()})" if error.source_line.strip() else ""
    finding = Finding(
        code=code,
        severity="error",
        message=error.message + line,
        location=error.location or Location(file=file),
        help=error.remedy,
    )
    return Report(
        verdict="unknown",
        model=None,
        job={},
        allocated_bytes=None,
        reserved_bytes=None,
        device_bytes=None,
        host_bytes=None,
        gpu=None,
        peak_phase=None,
        findings=(finding, *(job.findings if job is not None else ())),
        assumptions=job.assumptions if job is not None else (),
        tool_version=__version__,
    )


_ORDER: tuple[Verdict, ...] = ("over", "unknown", "tight", "fits")


def worst(verdicts: Iterable[Verdict | None]) -> Verdict:
    """One verdict for all files: over before unknown before tight before fits."""
    found = {verdict or "unknown" for verdict in verdicts}
    return next((verdict for verdict in _ORDER if verdict in found), "fits")


def exit_code(check: CheckReport, fail_on: Iterable[str] = ()) -> int:
    """0 when every job fits (or is tight), 1 when any is over, else 2 when any is unknown.
    The verdicts named in ``fail_on`` count like over."""
    found = {report.verdict or "unknown" for _, report in check.results}
    if found & {"over", *fail_on}:
        return 1
    return 2 if "unknown" in found else 0


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


def read_baseline(path: Path, *, change: Change | None = None) -> Mapping[str, Baseline]:
    """The baselines by file; the key ``""`` is one that every file is held against.

    ``path`` is the JSON (or YAML) of an earlier ``check`` or ``memory``, or a plan or trainer's
    config, which is then estimated with the same ``change``.
    """
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
    job = read_job(path, change=change)
    report = _judged(job, estimate_job(job))
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
                code="FIT015",
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
