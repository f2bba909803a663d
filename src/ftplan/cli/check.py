"""``ftplan check``: does each planned job fit its GPU? Made for CI."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from ftplan.cli.flags import JobFlags, with_job_flags
from ftplan.cli.jobs import estimate_job, read_job
from ftplan.cli.output import OutputOption, emit, note, screen_width, use_colour
from ftplan.errors import FtplanError, Location, UnknownNameError, UnsupportedError
from ftplan.report import CheckReport, Finding, Report, Verdict

CheckFormat = Literal["table", "json", "yaml", "markdown", "github", "gitlab", "sarif", "junit"]
FailOn = Literal["over", "tight", "unknown"]


@with_job_flags
def check(
    *,
    flags: JobFlags,
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Plans and trainers' configs.", show_default=False),
    ],
    fail_on: Annotated[
        list[FailOn] | None,
        typer.Option("--fail-on", help="Verdicts that exit with 1 besides over; may be repeated."),
    ] = None,
    exit_zero: Annotated[
        bool, typer.Option("--exit-zero", help="Exit with 0 whatever the verdicts are.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="BASELINE",
            help="A plan, or the JSON of an earlier check: report only what got worse.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        CheckFormat, typer.Option("--format", "-f", help="How the answer is written.")
    ] = "table",
    output: OutputOption = None,
) -> int:
    """Does each planned job fit its GPU? Reads plans and trainers' own configs."""
    results = tuple((str(file), check_one(file, flags)) for file in files)
    if against is not None:
        from ftplan.cli.baseline import read_baseline, worsened

        results = worsened(results, read_baseline(against, flags))
    report = CheckReport(verdict=worst(r.verdict for _, r in results), results=results)
    emit(_rendered(report, format, output), output)
    if format == "github":
        _step_summary(report)
    return 0 if exit_zero else exit_code((r.verdict for _, r in results), fail_on or ())


def check_one(file: Path, flags: JobFlags) -> Report:
    """The report of one file. A file that is refused has the verdict unknown and says why."""
    try:
        job = read_job(file, flags)
        report = estimate_job(job)
    except FtplanError as error:
        return _refused(str(file), error)
    except Exception as error:  # our own fault in one file must not hide the others
        if os.environ.get("FTPLAN_DEBUG"):
            raise
        return _refused(
            str(file),
            FtplanError(
                f"internal error: {type(error).__name__}: {error}",
                remedy="this is a fault of ftplan; FTPLAN_DEBUG=1 shows where it happened",
            ),
            code="CFG000",
        )
    if report.verdict is not None:
        return report
    if report.gpu is None:
        finding = Finding(
            code="CFG003",
            severity="error",
            message="no GPU is named, so nothing can be said about fitting",
            location=job.locate("hardware") or Location(file=str(file)),
            help="write hardware: {gpu: a100-80gb}, or pass --gpu NAME (ftplan gpus lists them)",
        )
        report = replace(report, findings=(finding, *report.findings))
    return replace(report, verdict="unknown")


def _refused(file: str, error: FtplanError, code: str | None = None) -> Report:
    if code is None:
        kinds: tuple[tuple[type[FtplanError], str], ...] = (
            (UnsupportedError, "CFG004"),
            (UnknownNameError, "CFG002"),
            (FtplanError, "CFG001"),
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
    from ftplan import __version__

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
        findings=(finding,),
        tool_version=__version__,
    )


_ORDER: tuple[Verdict, ...] = ("over", "unknown", "tight", "fits")


def worst(verdicts: Iterable[Verdict | None]) -> Verdict:
    """One verdict for all files: over before unknown before tight before fits."""
    found = {verdict or "unknown" for verdict in verdicts}
    return next((verdict for verdict in _ORDER if verdict in found), "fits")


def exit_code(verdicts: Iterable[Verdict | None], fail_on: Sequence[FailOn]) -> int:
    """0 when every job fits (or is tight), 1 when any is over, else 2 when any is unknown.
    The verdicts named in ``fail_on`` count like over."""
    found = {verdict or "unknown" for verdict in verdicts}
    if found & {"over", *fail_on}:
        return 1
    return 2 if "unknown" in found else 0


def _rendered(report: CheckReport, format: CheckFormat, output: Path | None) -> str:
    from ftplan import __version__

    match format:
        case "json":
            from ftplan.render import json

            return json.render(report)
        case "yaml":
            from ftplan.render import yaml

            return yaml.render(report)
        case "markdown":
            from ftplan.render import markdown

            return markdown.render_check(report)
        case "github":
            from ftplan.render import github

            return github.render_check(_rebased(report, "GITHUB_WORKSPACE"))
        case "gitlab":
            from ftplan.render import gitlab

            return gitlab.render_check(_rebased(report, "CI_PROJECT_DIR"))
        case "sarif":
            from ftplan.cli.explain import rule_texts
            from ftplan.render import sarif

            based = _rebased(report, "GITHUB_WORKSPACE")
            codes = {f.code for _, r in report.results for f in r.findings}
            return sarif.render_check(based, version=__version__, rules=rule_texts(codes))
        case "junit":
            from ftplan.render import junit

            return junit.render_check(report)
        case "table":
            from ftplan.render import table

            width, colour = screen_width(output), use_colour(output)
            return table.render_check(report, width=width, colour=colour)


def _rebased(report: CheckReport, variable: str) -> CheckReport:
    """Files relative to the project's folder, which CI systems name in a variable."""
    base = Path(os.environ.get(variable) or ".").absolute()

    def relative(file: str) -> str:
        path = Path(os.path.normpath(Path(file).absolute()))
        return path.relative_to(base).as_posix() if path.is_relative_to(base) else file

    def moved(finding: Finding) -> Finding:
        where = finding.location
        if where is None or not where.file:
            return finding
        return replace(finding, location=replace(where, file=relative(where.file)))

    return replace(
        report,
        results=tuple(
            (relative(file), replace(r, findings=tuple(moved(f) for f in r.findings)))
            for file, r in report.results
        ),
    )


def _step_summary(report: CheckReport) -> None:
    """Append to the file that GitHub shows below the step; it is never cut or replaced."""
    target = os.environ.get("GITHUB_STEP_SUMMARY")
    if not target:
        return
    from ftplan.render import github

    path = Path(target)
    try:
        used = path.stat().st_size if path.exists() else 0
        text = github.summary(report, limit=max(0, github.SUMMARY_BYTES - used))
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        note(f"warning: the step summary could not be written: {error.strerror or error}")
