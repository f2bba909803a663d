"""``ftplan report``: the decision and the sizing as one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftplan.cli.flags import JobFlags, with_job_flags
from ftplan.cli.output import OutputOption, emit, note
from ftplan.errors import InputError

if TYPE_CHECKING:
    from ftplan.advice import Advice
    from ftplan.report import Report


@with_job_flags
def report(
    *,
    flags: JobFlags,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Failures files and evaluation results (the decision), plans (the sizing).",
            show_default=False,
        ),
    ],
    title: Annotated[str, typer.Option("--title", help="Heading of the page.")] = "ftplan",
    output: OutputOption = None,
) -> int:
    """The decision and the sizing as one self-contained HTML page."""
    from ftplan.render.html import render

    evidence = [file for file in files if _is_evidence(file)]
    jobs = [file for file in files if file not in evidence]
    advice = _advise(evidence) if evidence else None
    reports = [(str(file), _estimate(file, flags)) for file in jobs]
    emit(render(advice=advice, reports=reports, title=title), output)
    if output is not None:
        note(f"wrote {output}")
    return 0


def _is_evidence(file: Path) -> bool:
    """Whether a file is about failures, and not a job."""
    from ftplan.files.document import parse_document, read_text
    from ftplan.files.failures import looks_like_failures
    from ftplan.files.plan import looks_like_plan
    from ftplan.trainers import detect_file

    text = read_text(file, file=str(file), max_bytes=2**28)
    try:
        document = parse_document(text, file=str(file))
    except InputError:
        document = None
    if document is not None:
        if looks_like_plan(document):
            return False
        if looks_like_failures(document):
            return True
    try:
        detect_file(file)
    except InputError:
        return _is_results(file)
    return False


def _is_results(file: Path) -> bool:
    from ftplan import evals
    from ftplan.cli.results import read_options
    from ftplan.errors import FtplanError

    try:
        evals.read_results(file, read_options(None, None, ""))
    except FtplanError:
        return False  # the reader of jobs says what is wrong with it
    return True


def _advise(files: list[Path]) -> Advice:
    from ftplan import __version__
    from ftplan.advise import advise
    from ftplan.cli.advise import read_inputs

    return advise(read_inputs(files), tool_version=__version__)


def _estimate(file: Path, flags: JobFlags) -> Report:
    from ftplan.cli.reading import read_with_flags
    from ftplan.front.jobs import estimate_job

    return estimate_job(read_with_flags(file, flags))
