"""``ftplan memory``: how much memory a job takes, term by term."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftplan.cli.flags import JobFlags, with_job_flags
from ftplan.cli.output import FormatOption, OutputOption, emit, screen_width, use_colour


@with_job_flags
def memory(
    *,
    flags: JobFlags,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="A plan file or a trainer's config; - reads standard input.",
            show_default=False,
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print each term's formula and source.")
    ] = False,
    format: FormatOption = "table",
    output: OutputOption = None,
) -> int:
    """How much memory serving or finetuning takes, term by term."""
    from ftplan.cli.reading import read_with_flags
    from ftplan.front.jobs import estimate_job

    report = estimate_job(read_with_flags(file, flags))
    if format == "json":
        from ftplan.render.json import render as render_json

        text = render_json(report)
    elif format == "yaml":
        from ftplan.render.yaml import render as render_yaml

        text = render_yaml(report)
    elif format == "markdown":
        from ftplan.render.markdown import render_report as render_markdown

        text = render_markdown(report, explain=explain)
    else:
        from ftplan.render.table import render_report

        text = render_report(
            report, width=screen_width(output), colour=use_colour(output), explain=explain
        )
    emit(text, output)
    return 0
