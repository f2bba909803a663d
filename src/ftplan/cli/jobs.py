"""From FILE and flags to a job: our own plan or any trainer's config, with the flags laid over."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftplan.cli.flags import JobFlags, apply_flags
from ftplan.errors import FtplanError, InputError, Location
from ftplan.report import Assumption, Finding, Report
from ftplan.spec import Plan

if TYPE_CHECKING:
    from ftplan.files.document import Document

__all__ = ["JobInput", "estimate_job", "read_job"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInput:
    """A job as it was given, before any default of ours."""

    plan: Plan
    file: str | None
    """Name of the file, for people; None when the flags alone made the job."""
    base: Path
    """Where the plan's relative paths start."""
    trainer: str | None = None
    """The reader that understood a trainer's config; None for a plan of our own."""
    findings: tuple[Finding, ...] = ()
    assumptions: tuple[Assumption, ...] = ()
    missing: tuple[str, ...] = ()
    """Plan keys that a trainer's config leaves open."""
    locate: Callable[[str], Location | None] = lambda key: None
    """Where the file says a plan key (``batch.micro``), when it does."""
    document: Document | None = None


def read_job(file: Path | None, flags: JobFlags, *, any_method: bool = False) -> JobInput:
    """The job of ``file`` (``-``: standard input) with ``flags`` laid over it, or of flags alone.

    Raises :class:`InputError` and its kin, with the place in the file.
    """
    if file is None:
        plan, _ = apply_flags(None, flags, any_method=any_method)
        if plan.model.name is None and plan.model.config is None and plan.model.params is None:
            raise InputError(
                "no model given",
                remedy="give a plan file, or --params 13e9, --model NAME or --config PATH",
            )
        return JobInput(plan=plan, file=None, base=Path())
    job = _read(file)
    plan, overrides = apply_flags(job.plan, flags, any_method=any_method)
    changed = {a.key for a in overrides}
    kept = tuple(a for a in job.assumptions if a.key not in changed)
    given = {key for key in job.missing if _is_given(plan, key)}
    return replace(
        job,
        plan=plan,
        assumptions=overrides + kept,
        findings=tuple(f for f in job.findings if not _answered(f, given)),
        missing=tuple(key for key in job.missing if key not in given),
    )


def _read(file: Path) -> JobInput:
    from ftplan.files.document import decode, parse_document, read_text
    from ftplan.files.plan import looks_like_plan, parse_plan

    name = "standard input" if str(file) == "-" else str(file)
    if str(file) == "-":
        text = decode(sys.stdin.buffer.read(), file=name)
        base = Path()
    else:
        text = read_text(file, file=name)
        base = file.parent
    document: Any = None
    if file.suffix.lower() not in (".sh", ".bash", ".txt", ".slurm", ".sbatch"):
        document = parse_document(text, file=name)
        if looks_like_plan(document):
            return JobInput(
                plan=parse_plan(document),
                file=name,
                base=base,
                locate=lambda key: document.locate(tuple(key.split("."))),
                document=document,
            )
    return _import(text, name, base, document)


def _import(text: str, name: str, base: Path, document: Document | None) -> JobInput:
    from ftplan import trainers

    imported = trainers.read_text(text, file=name, base=base)
    return JobInput(
        plan=imported.plan,
        file=name,
        base=base,
        trainer=imported.trainer,
        findings=imported.findings,
        assumptions=imported.assumptions,
        missing=imported.missing,
        locate=imported.places.get,
        document=document,
    )


def _is_given(plan: Plan, key: str) -> bool:
    if key == "model":
        return any((plan.model.name, plan.model.config, plan.model.params))
    value: Any = plan
    for step in key.split("."):
        value = getattr(value, step, None)
    return value is not None


def _answered(finding: Finding, given: set[str]) -> bool:
    """Whether a finding asks for something that a flag has answered."""
    return finding.code == "IMP001" and any(key in finding.help for key in given)


def estimate_job(job: JobInput) -> Report:
    """The report of a job: the calculator's, with what reading the file had to say.

    An error of the calculator is placed at the key it is about.
    """
    from ftplan import __version__, api

    model = job.plan.model
    if model.name is None and model.config is None and model.params is None:
        raise InputError(
            "the model is not known",
            location=job.locate("model") or (Location(file=job.file) if job.file else None),
            remedy="pass --model NAME, --config PATH or --params COUNT",
        )
    try:
        report = api.estimate(job.plan, base=job.base)
    except FtplanError as error:
        raise placed(error, job) from error.__cause__
    return replace(
        report,
        findings=job.findings + tuple(_at_file(f, job) for f in report.findings),
        assumptions=job.assumptions + report.assumptions,
        tool_version=report.tool_version or __version__,
    )


def placed(error: FtplanError, job: JobInput) -> FtplanError:
    """The error, at the key of the job's file that it is about."""
    if error.location is not None or job.file is None:
        return error
    if job.document is not None:
        from ftplan.files.plan import place_error

        return place_error(error, job.document)
    error.location = Location(file=job.file)
    return error


def _at_file(finding: Finding, job: JobInput) -> Finding:
    """Findings of the calculator know no file: they are about this one."""
    if finding.location is not None or job.file is None:
        return finding
    return replace(finding, location=Location(file=job.file))
