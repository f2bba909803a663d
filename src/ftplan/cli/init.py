"""``ftplan init``: a commented file to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ftplan.cli.output import OutputOption, emit, note
from ftplan.errors import InputError, Location


def init(
    *,
    kind: Annotated[
        Literal["plan", "failures"], typer.Argument(metavar="KIND", help="Which file.")
    ],
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
    emit(STARTERS[kind], output)
    if output is not None:
        verb = "memory" if kind == "plan" else "advise"
        note(f"wrote {output}; edit it, then: ftplan {verb} {_shown(output)}")
    return 0


def _shown(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
