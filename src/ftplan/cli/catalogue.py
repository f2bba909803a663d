"""What ``models``, ``gpus`` and ``optimizers`` share: search, columns, one way to print."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ftplan.cli.output import Format, emit, screen_width, use_colour

__all__ = ["QueryArgument", "print_rows", "search_or_suggest"]

QueryArgument = Annotated[
    str, typer.Argument(metavar="QUERY", help="Words of the name; left out: all of them.")
]


def search_or_suggest(
    query: str, search: Callable[[str], Sequence[Any]], find: Callable[[str], Any]
) -> list[Any]:
    """The rows that match; when none does, the one row an alias names, or the error that
    suggests near names."""
    rows = list(search(query))
    if rows or not query.strip():
        return rows
    return [find(query)]


def print_rows(
    what: str,
    rows: Sequence[Any],
    shown: Callable[[Any], Mapping[str, Any]],
    *,
    format: Format,
    output: Path | None,
) -> int:
    """Rows as a table of what ``shown`` picks, or whole as JSON and YAML."""
    if format in ("json", "yaml"):
        from ftplan.render import json, yaml

        answer = {"schema_version": 1, what: rows}
        emit(json.render(answer) if format == "json" else yaml.render(answer), output)
        return 0
    from ftplan.render import markdown, table

    picked = [shown(row) for row in rows]
    columns = list(picked[0]) if picked else []
    if format == "markdown":
        emit(markdown.render_rows(picked, columns=columns), output)
    else:
        colour = use_colour(output)
        emit(
            table.render_rows(picked, columns=columns, width=screen_width(output), colour=colour),
            output,
        )
    return 0
