"""``ftplan compare-runs``: what a change fixed and broke, and whether that is more than luck."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ftplan.cli.output import FormatOption, OutputOption, emit, screen_width, use_colour
from ftplan.cli.results import ColumnsOption, ThresholdOption, ToolOption, read_options


def compare_runs(
    before: Annotated[Path, typer.Argument(help="Results before the change.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="Results after it.", show_default=False)],
    before_variant: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Which prompt or model of BEFORE, where it holds several.",
            show_default=False,
        ),
    ] = "",
    after_variant: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Which prompt or model of AFTER, where it holds several.",
            show_default=False,
        ),
    ] = "",
    columns: ColumnsOption = None,
    threshold: ThresholdOption = None,
    tool: ToolOption = "",
    format: FormatOption = "table",
    output: OutputOption = None,
) -> int:
    """What a change fixed and broke between two evaluation runs, and is it significant?"""
    from ftplan import evals

    options = read_options(columns, threshold, tool)
    runs = []
    for path, variant in ((before, before_variant), (after, after_variant)):
        run = evals.read_results(path, options)
        runs.append(evals.pick_variant(run, variant) if variant else run)
    comparison = evals.compare_runs(*runs)
    emit(_rendered(comparison, format, output), output)
    return 0 if comparison.paired else 2


def _rendered(comparison: object, format: str, output: Path | None) -> str:
    from ftplan.results import RunComparison

    assert isinstance(comparison, RunComparison)
    if format == "json":
        from ftplan.render.json import render

        return render(comparison)
    if format == "yaml":
        from ftplan.render.yaml import render as render_yaml

        return render_yaml(comparison)
    from ftplan.render.comparison import render_comparison, render_comparison_markdown

    if format == "markdown":
        return render_comparison_markdown(comparison)
    return render_comparison(comparison, width=screen_width(output), colour=use_colour(output))
