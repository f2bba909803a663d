"""``ftplan export``: a plan as a trainer's config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftplan.cli.flags import JobFlags, with_job_flags
from ftplan.cli.output import FormatOption, OutputOption, emit, note


@with_job_flags
def export(
    *,
    flags: JobFlags,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A plan, or another trainer's config.")
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="TRAINER",
            help="axolotl, llamafactory, trl, torchtune, accelerate, deepspeed or ms-swift.",
            show_default=False,
        ),
    ],
    format: FormatOption = "table",
    output: OutputOption = None,
) -> int:
    """A plan as a trainer's config. table and markdown give the config itself."""
    from ftplan import trainers
    from ftplan.cli.reading import read_with_flags
    from ftplan.front.jobs import explicit

    job = read_with_flags(file, flags)
    exported = trainers.export_plan(explicit(job.plan), to=to)
    if format in ("json", "yaml"):
        from ftplan.render import json, yaml

        answer = {"schema_version": 1, **{k: getattr(exported, k) for k in ("trainer", "text")}}
        answer["notes"] = list(exported.notes)
        emit(json.render(answer) if format == "json" else yaml.render(answer), output)
    else:
        emit(exported.text, output)
    for line in exported.notes:
        note(f"note: {line}")
    return 0
