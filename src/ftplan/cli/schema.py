"""``ftplan schema``: the JSON Schema of a file or of an answer."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ftplan.cli.output import OutputOption, emit


def schema(
    *,
    name: Annotated[
        Literal["plan", "failures", "report", "advice"],
        typer.Argument(metavar="NAME", help="Which schema."),
    ],
    output: OutputOption = None,
) -> int:
    """The JSON Schema of plan and failures files, and of the answers."""
    from ftplan.files.schema import schema as make
    from ftplan.render.json import render

    emit(render(make(name)), output)
    return 0
