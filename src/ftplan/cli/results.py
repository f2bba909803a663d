"""The options of every command that reads evaluation results, defined once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ftplan.errors import InputError

if TYPE_CHECKING:
    from ftplan.evals import ReadOptions

__all__ = [
    "ColumnsOption",
    "MapOption",
    "ThresholdOption",
    "ToolOption",
    "kind_overrides",
    "read_options",
]

_PANEL = "Reading results"

ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="FIELD=COLUMN,...",
        help="Columns of a table of your own: input=question,output=answer,passed=ok.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
ThresholdOption = Annotated[
    list[str] | None,
    typer.Option(
        "--threshold",
        metavar="METRIC=SCORE",
        help="When a score passes, for tools without thresholds (else 0.5, flagged).",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
ToolOption = Annotated[
    str,
    typer.Option(
        "--tool",
        metavar="NAME",
        help="Read as this tool's file; by default it is recognised by its content.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
MapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="CHECK=KIND",
        help="Failure kind to suggest when this check fails, before the built-in mapping.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]


def read_options(
    columns: Sequence[str] | None, threshold: Sequence[str] | None, tool: str
) -> ReadOptions:
    """The options as the readers take them."""
    from ftplan.evals import ReadOptions

    thresholds = {name: _score(name, text) for name, text in _pairs("--threshold", threshold)}
    return ReadOptions(columns=dict(_pairs("--columns", columns)), thresholds=thresholds, tool=tool)


def kind_overrides(mapping: Sequence[str] | None) -> dict[str, str]:
    """`--map` as check -> kind."""
    return dict(_pairs("--map", mapping))


def _pairs(option: str, written: Sequence[str] | None) -> list[tuple[str, str]]:
    pairs = []
    for part in (part for each in written or () for part in each.split(",")):
        name, equals, value = part.partition("=")
        if not (name.strip() and equals and value.strip()):
            raise InputError(f"{option} {part!r} is no NAME=VALUE", remedy=f"{option} name=value")
        pairs.append((name.strip(), value.strip()))
    return pairs


def _score(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"--threshold {name}={text}: not a number", remedy=f"--threshold {name}=0.7"
        ) from None
