"""From a file to a job and its report: our own plan or any trainer's config, changed or not.

Part of the library's front: it joins files, trainers and the calculator, and knows no terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftplan import __version__, trainers
from ftplan.dataclass import dataclass
from ftplan.errors import FtplanError, InputError, Location
from ftplan.front import api
from ftplan.report import Assumption, Finding, Remedy, Report
from ftplan.spec import Model, Plan

if TYPE_CHECKING:  # yaml is loaded only when there is a file
    from ftplan.difference import Difference
    from ftplan.files.document import Document

__all__ = ["Change", "JobInput", "diff", "estimate_job", "explicit", "load_plan", "read_job"]

Change = Callable[[Plan | None], tuple[Plan, tuple[Assumption, ...]]]
"""Lays something over a plan (None: makes one of nothing) and lists what it replaced."""


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
    stated: frozenset[str] | None = None
    """Plan keys that a trainer's config or a flag says, its reader's defaults left out; None: all
    of the plan's."""


def load_plan(path: str | Path) -> Plan:
    """The plan that a file holds: a plan of ours, or any trainer's config or command line.

    Raises :class:`ftplan.errors.InputError` with file, line and column.
    """
    return read_job(path).plan


def read_job(
    path: str | Path | None,
    *,
    change: Change | None = None,
    text: str | None = None,
    trainer: str | None = None,
    overlays: Sequence[Path] = (),
) -> JobInput:
    """The job of a file, with ``change`` laid over it; ``path`` None: what ``change`` makes.

    ``text`` is the content when it does not come from the file system. ``trainer`` names the
    reader when it is not to be guessed, ``overlays`` the accelerate or DeepSpeed files that go
    with the config. Raises :class:`InputError` and its kin, with the place in the file.
    """
    if path is None:
        plan = change(None)[0] if change is not None else Plan(model=Model())
        if plan.model == Model():
            raise InputError(
                "no model given",
                remedy="give a plan file, or --params 13e9, --model NAME or --config PATH",
            )
        findings = trainers.lint_plan(plan) if plan.method is not None else ()
        return JobInput(plan=plan, file=None, base=Path(), findings=findings)
    job = _read(Path(path), text=text, trainer=trainer, overlays=tuple(overlays))
    if change is None:
        return job
    plan, overrides = change(job.plan)
    changed = {a.key for a in overrides}
    kept = tuple(a for a in job.assumptions if a.key not in changed)
    given = {key for key in job.missing if _is_given(plan, key)}
    # one finding for each missing key, in the same order
    asked = zip((f for f in job.findings if f.code == "IMP001"), job.missing, strict=False)
    answered = [finding for finding, key in asked if key in given]
    findings = tuple(f for f in job.findings if f not in answered)
    if overrides:  # what was wrong with the file may be right with the flags, and the reverse
        before, after = (trainers.lint_plan(p, where=job.locate) for p in (job.plan, plan))
        findings = tuple(f for f in findings if f not in before) + after
    return replace(
        job,
        plan=plan,
        assumptions=overrides + kept,
        findings=findings,
        missing=tuple(key for key in job.missing if key not in given),
        stated=None if job.stated is None else job.stated | changed,
    )


_SCRIPTS = (".sh", ".bash", ".txt", ".slurm", ".sbatch", ".py")


def _read(
    path: Path, *, text: str | None, trainer: str | None, overlays: tuple[Path, ...]
) -> JobInput:
    from ftplan.files.document import parse_document, read_document, read_text
    from ftplan.files.plan import looks_like_plan

    name = str(path)
    base = path.parent if text is None else Path()
    content = read_text(path, file=name) if text is None else text
    document: Document | None = None
    if path.suffix.lower() not in _SCRIPTS and trainer is None:
        document = parse_document(content, file=name)
        if looks_like_plan(document) and not overlays:
            return _own(document, name, base)
    if text is None:
        imported = trainers.import_file(path, overlays=overlays, trainer=trainer)
    else:
        laid_over = [read_document(overlay) for overlay in overlays]
        imported = trainers.import_text(text, file=name, overlays=laid_over, trainer=trainer)
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
        stated=frozenset(imported.places),
    )


def _own(document: Document, name: str, base: Path) -> JobInput:
    from ftplan.files.plan import parse_plan

    def locate(key: str) -> Location:
        return document.locate(tuple(key.split(".")))

    plan = parse_plan(document)
    return JobInput(
        plan=plan,
        file=name,
        base=base,
        findings=trainers.lint_plan(plan, where=locate),
        locate=locate,
        document=document,
    )


def _is_given(plan: Plan, key: str) -> bool:
    if key in ("model", "model.name"):
        return any((plan.model.name, plan.model.config, plan.model.params))
    value: Any = plan
    for step in key.split("."):
        value = getattr(value, step, None)
    return value is not None


def estimate_job(job: JobInput) -> Report:
    """The report of a job: the calculator's, with what reading the file had to say.

    An error of the calculator is placed at the key it is about.
    """
    if job.plan.model == Model():
        raise InputError(
            "the model is not known",
            location=job.locate("model") or (Location(file=job.file) if job.file else None),
            remedy="pass --model NAME, --config PATH or --params COUNT",
        )
    try:
        report = api.estimate(job.plan, base=job.base, stated=job.stated)
    except FtplanError as error:
        raise placed(error, job) from error.__cause__
    return replace(
        report,
        remedies=_reworded(job, report.remedies),
        findings=job.findings + tuple(_at_file(f, job) for f in report.findings),
        assumptions=job.assumptions + report.assumptions,
        tool_version=report.tool_version or __version__,
    )


def _reworded(job: JobInput, remedies: Sequence[Remedy]) -> tuple[Remedy, ...]:
    """Remedies for a trainer's file say what to write there."""
    if not remedies or job.trainer is None:
        return tuple(remedies)
    from ftplan.fit.changes import apply_change
    from ftplan.trainers.rewording import reworded

    plan = explicit(job.plan)
    keys = job.document.data if job.document is not None else {}

    def in_file(change: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return reworded(plan, apply_change(plan, change), job.trainer or "", keys)

    return tuple(replace(remedy, in_file=in_file(remedy.change)) for remedy in remedies)


def explicit(plan: Plan) -> Plan:
    """The plan with our own defaults spelled out, for a reader that has others: the sizes of a
    batch, an adapter's rank and targets, and the model's hub id."""
    from ftplan.catalog.models import resolve_model

    batch, method, model = plan.batch, plan.method, plan.model
    batch = replace(
        batch,
        micro=batch.micro or 1,
        seq_len=batch.seq_len or 2048,
        accumulation=batch.accumulation or 1,
    )
    if method is not None and method.kind in ("lora", "qlora", "dora"):
        method = replace(method, rank=method.rank or 16, targets=method.targets or "all-linear")
    if model.name is not None and "/" not in model.name:
        hub_ids = resolve_model(model.name).row.hub_ids
        model = replace(model, name=hub_ids[0] if hub_ids else model.name)
    return replace(plan, batch=batch, method=method, model=model)


def diff(before: Plan, after: Plan, *, base: Path | None = None) -> Difference:
    """What changed between two plans: their keys after defaults, the answers' terms, and what
    each change does."""
    from ftplan.difference import difference
    from ftplan.front.comparing import steps_between

    change = difference(*(api.estimate(plan, base=base) for plan in (before, after)))
    return replace(change, steps=steps_between(before, after, bases=(base, base)))


def placed(error: FtplanError, job: JobInput) -> FtplanError:
    """The error, at the key of the job's file that it is about."""
    if error.location is not None or job.file is None:
        return error
    if "model_type" in error.message:  # the same word may stand elsewhere, as a chat template
        where = job.locate("model.name") or job.locate("model.config") or job.locate("model")
        error.location = where or Location(file=job.file)
        if job.document is not None:
            error.source_line = job.document.line_text(error.location.line)
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
