"""``ftplan measure``: the same job for a few steps on the GPU here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftplan.cli.flags import JobFlags, with_job_flags
from ftplan.cli.output import FormatOption, OutputOption, emit, note
from ftplan.errors import InputError


@with_job_flags
def measure(
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
    suite: Annotated[
        Path | None,
        typer.Option("--suite", metavar="FILE", help="A list of plans; readings are appended."),
    ] = None,
    readings: Annotated[
        Path,
        typer.Option("--readings", metavar="FILE", help="Where --suite appends, a JSON a line."),
    ] = Path("validation/readings.jsonl"),
    steps: Annotated[int, typer.Option("--steps", min=2, help="Steps to run.")] = 4,
    format: FormatOption = "table",
    output: OutputOption = None,
) -> int:
    """Run the job for a few steps on this machine's GPU and record what it took."""
    from ftplan.trace import require

    require("ftplan measure")
    from ftplan.trace.measure import measure_job, measure_suite, require_gpu

    require_gpu()
    if suite is not None:
        if file is not None:
            raise InputError("FILE and --suite are two ways to name jobs; give one of them")
        count = measure_suite(suite, readings, steps=steps, progress=note)
        note(f"{count} readings appended to {readings}")
        return 0
    from ftplan.cli.reading import read_with_flags

    reading = measure_job(read_with_flags(file, flags), steps=steps, progress=note)
    if format in ("json", "yaml"):
        from ftplan.render import json, yaml

        emit(json.render(reading) if format == "json" else yaml.render(reading), output)
        return 0
    from ftplan.render.trace import render_reading

    emit(render_reading(reading, markdown=format == "markdown"), output)
    return 0
