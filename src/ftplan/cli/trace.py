"""``ftplan trace``: the same job run for real on fake tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ftplan.cli.flags import JobFlags, with_job_flags
from ftplan.cli.output import FormatOption, OutputOption, emit, note, screen_width


@with_job_flags
def trace(
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
    by: Annotated[
        Literal["module"] | None,
        typer.Option("--by", help="List what each module holds at the peak."),
    ] = None,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="Chart live bytes over the step; -o x.svg draws it.")
    ] = False,
    layers: Annotated[
        int | None,
        typer.Option("--layers", min=1, help="Cut the model to this many layers (quicker)."),
    ] = None,
    format: FormatOption = "table",
    output: OutputOption = None,
) -> int:
    """Run the job on fake tensors with the real model code: ground truth without a GPU."""
    from ftplan.trace import require

    require("ftplan trace")
    from ftplan.cli.reading import read_with_flags
    from ftplan.trace.run import traced_job

    job = read_with_flags(file, flags)
    result, summary = traced_job(job, layers=layers, progress=note)
    from ftplan.trace.summary import by_module
    from ftplan.trace.summary import timeline as curve_of

    if output is not None and output.suffix.lower() == ".svg":
        from ftplan.render.trace import render_svg

        emit(render_svg(curve_of(result, 400), f"{file or 'job'}: live bytes"), output)
        return 0
    emit(
        _text(
            summary,
            by_module(result) if by else None,
            curve_of(result) if timeline else None,
            format,
            output,
        ),
        output,
    )
    return 0


def _text(
    summary: dict[str, Any],
    modules: list[dict[str, Any]] | None,
    curve: dict[str, Any] | None,
    format: str,
    output: Path | None,
) -> str:
    if format in ("json", "yaml"):
        from ftplan.render import json, yaml

        data = {**summary}
        if modules is not None:
            data["modules"] = modules
        if curve is not None:
            data["timeline"] = curve
        return json.render(data) if format == "json" else yaml.render(data)
    from ftplan.render import trace as window

    if format == "markdown":
        parts = [window.render_markdown(summary)]
    else:
        parts = [window.render(summary)]
    fence = "```\n" if format == "markdown" else ""
    if modules is not None:
        parts.append(fence + window.render_modules(modules) + fence)
    if curve is not None:
        parts.append(fence + window.render_timeline(curve, screen_width(output)) + fence)
    return "\n".join(parts)
