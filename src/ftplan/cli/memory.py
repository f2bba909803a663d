"""``ftplan memory``: how much memory a job takes, term by term."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftplan.cli.flags import JobFlags, with_job_flags
from ftplan.cli.output import FormatOption, OutputOption


@with_job_flags
def memory(
    *,
    flags: JobFlags,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="A plan file or a trainer's config.", show_default=False
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print each term's formula and source.")
    ] = False,
    format: FormatOption = "table",
    output: OutputOption = None,
) -> int:
    """How much memory serving or finetuning takes, term by term."""
    print(flags, file, explain, format, output)
    return 0
