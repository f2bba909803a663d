"""``ftplan import``: a trainer's config as a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftplan.cli.flags import JobFlags, with_job_flags
from ftplan.cli.output import Format, OutputOption, emit, note, screen_width, use_colour

if TYPE_CHECKING:
    from ftplan.front.jobs import JobInput


@with_job_flags
def import_(
    *,
    flags: JobFlags,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A trainer's config, a job script, or - for standard input."
        ),
    ],
    format: Annotated[
        Format,
        typer.Option(
            "--format", "-f", help="yaml: the plan. table, markdown: what was understood."
        ),
    ] = "yaml",
    output: OutputOption = None,
) -> int:
    """A trainer's config as a plan; what it leaves open is null, and a finding says so."""
    from ftplan.cli.reading import read_with_flags

    job = read_with_flags(file, flags)
    if format in ("yaml", "json"):
        emit(_plan_text(job, format), output)
    else:
        emit(_understood(job, format, output), output)
    for finding in job.findings:
        where = f"{finding.location}: " if finding.location else ""
        hint = f"\n  help: {finding.help}" if finding.help else ""
        note(f"{finding.severity} {finding.code}: {where}{finding.message}{hint}")
    return 0


def _plan_text(job: JobInput, format: str) -> str:
    from ftplan.files.plan import dump_plan, plan_to_mapping
    from ftplan.render.json import render

    if format == "json":
        return render(plan_to_mapping(job.plan))
    notes = [f"imported from {job.file}" + (f" ({job.trainer})" if job.trainer else "")]
    notes += [f"{f.severity} {f.code}: {f.message}" for f in job.findings]
    return dump_plan(job.plan, assumptions=job.assumptions, notes=notes, missing=job.missing)


def _understood(job: JobInput, format: Format, output: Path | None) -> str:
    """Each key of the plan, its value, and where in the file it was read."""
    from ftplan.files.plan import WORD_KEYS

    rows: list[dict[str, Any]] = []
    assumed = {a.key for a in job.assumptions}
    for key, value in _flat(job):
        full = f"{key}.{WORD_KEYS[key]}" if key in WORD_KEYS else key
        place = job.locate(full) or job.locate(key)
        source = f"line {place.line}" if place is not None and place.line else ""
        if not source and {key, full} & assumed:
            source = "the trainer's default"
        rows.append({"plan key": key, "value": value, "from": source})
    rows += [{"plan key": key, "value": "?", "from": "not in the file"} for key in job.missing]
    from ftplan.render import markdown, table

    title = f"{job.trainer or 'plan'} {job.file}"
    columns = ["plan key", "value", "from"]
    if format == "markdown":
        return markdown.render_rows(rows, columns=columns, title=title)
    return table.render_rows(
        rows, columns=columns, title=title, width=screen_width(output), colour=use_colour(output)
    )


def _flat(job: JobInput) -> list[tuple[str, str]]:
    from ftplan.files.plan import plan_to_mapping, scalar

    rows = []
    for section, value in plan_to_mapping(job.plan).items():
        if section == "version" or value is None:
            continue
        if isinstance(value, dict):
            rows += [(f"{section}.{key}", scalar(item)) for key, item in value.items()]
        else:
            rows.append((section, scalar(value)))
    return rows
