"""``ftplan check``: does each planned job fit its GPU? Made for CI."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from ftplan.cli.flags import JobFlags, apply_flags, check_values, with_job_flags
from ftplan.cli.output import OutputOption, emit, note, screen_width, use_colour
from ftplan.errors import InputError
from ftplan.report import CheckReport, Finding

CheckFormat = Literal["table", "json", "yaml", "markdown", "github", "gitlab", "sarif", "junit"]
_VERDICTS = ("over", "tight", "unknown")


@with_job_flags
def check(
    *,
    flags: JobFlags,
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Plans and trainers' configs.", show_default=False),
    ],
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            metavar="over|tight|unknown",
            help="A verdict that exits with 1 besides over; repeatable.",
            show_default=False,
        ),
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
    explain: Annotated[
        bool, typer.Option("--explain", help="Print each term's formula and source.")
    ] = False,
    format: Annotated[
        CheckFormat, typer.Option("--format", "-f", help="How the answer is written.")
    ] = "table",
    output: OutputOption = None,
) -> int:
    """Does each planned job fit its GPU? Reads plans and trainers' own configs."""
    from ftplan.front.checking import check as check_files
    from ftplan.front.checking import exit_code

    failing = [part for text in fail_on or () for part in text.split(",")]
    for verdict in failing:
        if verdict not in _VERDICTS:
            raise InputError(
                f"--fail-on cannot be {verdict!r}", remedy=f"write one of {', '.join(_VERDICTS)}"
            )
    check_values(flags)
    report = check_files(
        files,
        change=lambda plan: apply_flags(plan, flags),
        trainer=flags.trainer,
        overlays=flags.overlay or (),
        against=against,
        raise_faults=bool(os.environ.get("FTPLAN_DEBUG")),
    )
    emit(_rendered(report, format, output, explain), output)
    if format == "github":
        _step_summary(report)
    return 0 if exit_zero else exit_code(report, failing)


def _rendered(report: CheckReport, format: CheckFormat, output: Path | None, explain: bool) -> str:
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
            return table.render_check(report, width=width, colour=colour, explain=explain)


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
