"""``ftplan compare``: one job, as each stack would run it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftplan.cli.flags import JobFlags, with_job_flags
from ftplan.cli.output import FormatOption, OutputOption, emit, screen_width, use_colour


@with_job_flags
def compare(
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
    stacks: Annotated[
        str, typer.Option(metavar="NAMES", help="Stacks to compare, by comma; or all.")
    ] = "all",
    format: FormatOption = "table",
    output: OutputOption = None,
) -> int:
    """One job on many stacks: what each fills in where the plan is silent, and what it takes."""
    from ftplan.cli.reading import read_with_flags
    from ftplan.front.comparing import compare_stacks
    from ftplan.front.jobs import explicit

    job = read_with_flags(file, flags)
    names = None if stacks == "all" else [name for name in stacks.split(",") if name.strip()]
    comparison = compare_stacks(explicit(job.plan), names, base=job.base)
    if format in ("json", "yaml"):
        from ftplan.render import json, yaml

        emit(json.render(comparison) if format == "json" else yaml.render(comparison), output)
        return 0
    from ftplan.render.stacks import render, render_markdown

    if format == "markdown":
        emit(render_markdown(comparison), output)
    else:
        emit(render(comparison, width=screen_width(output), colour=use_colour(output)), output)
    return 0
