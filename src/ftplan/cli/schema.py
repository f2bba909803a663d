"""``ftplan schema``: the JSON Schema of a file or of an answer."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ftplan.cli.output import Format, OutputOption, emit


def schema(
    *,
    name: Annotated[
        Literal["plan", "failures", "report", "advice"],
        typer.Argument(metavar="NAME", help="Which schema."),
    ],
    format: Annotated[
        Format, typer.Option("--format", "-f", help="json, or the same as yaml.")
    ] = "json",
    output: OutputOption = None,
) -> int:
    """The JSON Schema of plan and failures files, and of the answers."""
    from ftplan.files.schema import schema as make
    from ftplan.render import json, yaml

    text = yaml.render(make(name)) if format == "yaml" else json.render(make(name))
    emit(f"```json\n{text}```\n" if format == "markdown" else text, output)
    return 0
