"""A result file -> :class:`~ftplan.results.EvalRun`, recognised by what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ftplan.errors import FtplanError, InputError, Location, UnknownNameError
from ftplan.evals.document import Document, parse_document
from ftplan.evals.options import ReadOptions
from ftplan.evals.readers import Reader, all_readers
from ftplan.results import EvalRun, ResultRow

__all__ = ["is_result_file", "parse_results", "read_results"]


UNEXPECTED = "a result file of an unexpected shape"
"""Begins the message where a reader met what it does not know; tests look for it."""


def read_results(path: str | Path, options: ReadOptions | None = None) -> EvalRun:
    """Read a result file of any supported tool.

    Raises :class:`~ftplan.errors.InputError` (file:line where there is one) when the file is
    missing, is no result file, or cannot be read by this Python.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot be read: {why}",
            remedy="pass the file that the evaluation tool wrote",
            location=Location(file=str(path)),
        ) from None
    return parse_results(data, str(path), options)


def parse_results(data: bytes, name: str, options: ReadOptions | None = None) -> EvalRun:
    """The same for bytes at hand; ``name`` stands in messages."""
    options = options or ReadOptions()
    try:
        document = parse_document(data, name)
        reader = _reader(document, options)
        run = reader.read(document, options)
    except FtplanError:
        raise
    except RecursionError:
        raise InputError(
            "nested too deeply to be a result file", location=Location(file=name)
        ) from None
    except Exception as error:
        # files of other versions may hold anything anywhere: refuse them by name, never crash
        raise InputError(
            f"{UNEXPECTED} ({type(error).__name__}: {error})",
            remedy="if the tool wrote it as it is, please report it with a row of the file",
            location=Location(file=name),
        ) from error
    return replace(run, source=name, rows=_unique(run.rows))


def is_result_file(data: bytes, name: str) -> bool:
    """Whether a tool's own format is recognised (a table of unknown origin is not)."""
    try:
        return _reader(parse_document(data, name), ReadOptions()).tool != "table"
    except (InputError, RecursionError):
        return False


def _reader(document: Document, options: ReadOptions) -> Reader:
    readers = all_readers()
    if options.tool:
        for reader in readers:
            if reader.tool == options.tool:
                return reader
        raise UnknownNameError(
            "evaluation tool",
            options.tool,
            remedy=f"known are {', '.join(reader.tool for reader in readers)}",
        )
    if options.columns:
        return next(reader for reader in readers if reader.tool == "table")
    for reader in readers:
        if reader.recognises(document):
            return reader
    raise document.error(
        "not a result file of a known evaluation tool",
        remedy=f"known are {', '.join(reader.title for reader in readers)}",
    )


def _unique(rows: Iterable[ResultRow]) -> tuple[ResultRow, ...]:
    """Row ids made unique: the second of a name becomes `name#2`."""
    seen: Counter[str] = Counter()
    taken: set[str] = set()
    unique: list[ResultRow] = []
    for row in rows:
        seen[row.id] += 1
        name = row.id if seen[row.id] == 1 else f"{row.id}#{seen[row.id]}"
        while name in taken:
            seen[row.id] += 1
            name = f"{row.id}#{seen[row.id]}"
        taken.add(name)
        unique.append(row if name == row.id else replace(row, id=name))
    return tuple(unique)
