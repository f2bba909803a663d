"""``ftplan init``: a commented file to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ftplan.cli.output import Format, OutputOption, emit, note
from ftplan.errors import InputError, Location


def init(
    *,
    kind: Annotated[
        Literal["plan", "failures"], typer.Argument(metavar="KIND", help="Which file.")
    ],
    format: Annotated[
        Format, typer.Option("--format", "-f", help="json is the same file without comments.")
    ] = "yaml",
    output: OutputOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace FILE when it is there already.")
    ] = False,
) -> int:
    """A commented starter file: a plan, or a list of failures."""
    from ftplan.files.starter import STARTERS

    if output is not None and output.is_file() and not force:
        raise InputError(
            "the file is there already",
            location=Location(file=str(output)),
            remedy="name another, or replace it with --force",
        )
    emit(_written(STARTERS[kind], format), output)
    if output is not None:
        verb = "memory" if kind == "plan" else "advise"
        note(f"wrote {output}; edit it, then: ftplan {verb} {_shown(output)}")
    return 0


def _written(text: str, format: Format) -> str:
    if format == "markdown":
        return f"```yaml\n{text}```\n"
    if format != "json":
        return text
    from ftplan.files.document import parse_document
    from ftplan.render.json import render

    return render(parse_document(text, file="starter").data)


def _shown(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
