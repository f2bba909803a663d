"""``ftplan diff``: what changed between two plans, term by term."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftplan.cli.flags import JobFlags, with_job_flags
from ftplan.cli.output import FormatOption, OutputOption, emit, screen_width, use_colour

if TYPE_CHECKING:
    from ftplan.front.jobs import JobInput


@with_job_flags
def diff(
    *,
    flags: JobFlags,
    before: Annotated[
        Path, typer.Argument(metavar="A", help="A plan, a trainer's config, or a stack's name.")
    ],
    after: Annotated[Path, typer.Argument(metavar="B", help="The other one.")],
    format: FormatOption = "table",
    output: OutputOption = None,
) -> int:
    """What changed between two plans, term by term. Flags are laid over both."""
    from ftplan.catalog.stacks import is_stack
    from ftplan.cli.reading import read_with_flags
    from ftplan.difference import difference
    from ftplan.front.comparing import steps_between
    from ftplan.front.jobs import estimate_job

    def job_of(name: Path) -> JobInput:
        """A file with the flags over it; a stack's name stands for the flags on that stack."""
        if name.exists() or not is_stack(str(name)):
            return read_with_flags(name, flags)
        return read_with_flags(None, replace(flags, stack=str(name)))

    jobs = [job_of(name) for name in (before, after)]
    change = difference(*map(estimate_job, jobs), names=(str(before), str(after)))
    bases = (jobs[0].base, jobs[1].base)
    change = replace(change, steps=steps_between(jobs[0].plan, jobs[1].plan, bases=bases))
    if format in ("json", "yaml"):
        from ftplan.render import json, yaml

        emit(json.render(change) if format == "json" else yaml.render(change), output)
        return 0
    from ftplan.render.difference import render, render_markdown

    if format == "markdown":
        emit(render_markdown(change), output)
    else:
        emit(render(change, width=screen_width(output), colour=use_colour(output)), output)
    return 0
