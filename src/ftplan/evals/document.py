"""Bytes of a result file -> a JSON value, JSON lines, a table or an archive, with line numbers.

Any bytes at all give a :class:`Document` or an :class:`~ftplan.errors.InputError` that says where.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.errors import InputError, Location

__all__ = ["Document", "parse_document", "python_literal"]

Json = Any
_FIELD_LIMIT_CHARS = 2**31 - 1
"""Contexts of a retrieval run are longer than the csv module's default of 131072."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A result file, parsed as far as its syntax goes."""

    name: str
    """The file, as the user wrote it."""
    value: Json = None
    """The whole file as one JSON value; None where it is not one."""
    records: tuple[tuple[int, Json], ...] = ()
    """(1-based line, value) of each JSON line, or of each element of a JSON list (line 0)."""
    table: tuple[tuple[int, tuple[str, ...]], ...] = ()
    """(1-based line, cells) of each row of a CSV file, header first."""
    archive: bytes = b""
    """A zip file."""
    objects: tuple[tuple[int, dict[str, Json]], ...] = field(default=(), compare=False)
    """Those records that are JSON objects; a lone object is its own only record."""

    def error(self, message: str, *, line: int | None = None, remedy: str = "") -> InputError:
        """An error that points into this file."""
        return InputError(
            message, remedy=remedy, location=Location(file=self.name, line=line or None)
        )

    @property
    def header(self) -> tuple[str, ...]:
        """Column names of a table, or nothing."""
        return self.table[0][1] if self.table else ()

    def table_objects(self) -> Iterator[tuple[int, dict[str, Json]]]:
        """(line, column -> cell) of each row below the header. The first of equal names wins."""
        for line, cells in self.table[1:]:
            row: dict[str, Json] = {}
            for column, cell in zip(self.header, cells, strict=False):
                row.setdefault(column, cell)
            yield line, row


def parse_document(data: bytes, name: str) -> Document:
    """Parse the syntax of a result file.

    Raises :class:`~ftplan.errors.InputError` where the bytes are no text, no JSON and no table.
    """
    where = Document(name=name)
    if not data.strip():
        raise where.error("the file is empty", remedy="was the evaluation interrupted?")
    if data[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        if not zipfile.is_zipfile(io.BytesIO(data)):
            raise where.error("a zip archive that is cut short", remedy="copy the file again")
        return Document(name=name, archive=data)
    text = _decode(data, where)
    if text.lstrip()[:1] in ("{", "["):
        return _json_document(text, name)
    return _table_document(text, name)


def _decode(data: bytes, where: Document) -> str:
    encoding = "utf-8-sig"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # what PowerShell's redirection writes
        encoding = "utf-16"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise where.error(
            f"not a text file: byte {error.start} is not {error.encoding}",
            line=line,
            remedy="pass the JSON, JSONL or CSV file that the evaluation tool wrote",
        ) from None


def _json_document(text: str, name: str) -> Document:
    where = Document(name=name)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        lines = _json_lines(text, where)
        if lines is None:
            raise where.error(
                f"not JSON: {error.msg} (column {error.colno})",
                line=error.lineno,
                remedy="is the file cut short? write it again, or pass JSON, JSONL or CSV",
            ) from None
        objects = tuple((line, each) for line, each in lines if isinstance(each, dict))
        return Document(name=name, records=lines, objects=objects)
    except RecursionError:
        raise where.error("not a result file: it is nested too deep") from None
    except ValueError as error:
        raise where.error(f"not a result file: {error}") from None
    if isinstance(value, list):
        records = tuple((0, each) for each in value)
        objects = tuple((0, each) for each in value if isinstance(each, dict))
        return Document(name=name, value=value, records=records, objects=objects)
    objects = ((1, value),) if isinstance(value, dict) else ()
    return Document(name=name, value=value, records=((1, value),), objects=objects)


def _json_lines(text: str, where: Document) -> tuple[tuple[int, Json], ...] | None:
    """JSON lines, or None where the first line is no JSON by itself (then it is broken JSON)."""
    records: list[tuple[int, Json]] = []
    # only \n and \r\n end a JSON line: str.splitlines would break at U+2028 inside of a string
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append((number, json.loads(line)))
        except (RecursionError, ValueError) as error:
            if not records:
                return None
            message = error.msg if isinstance(error, json.JSONDecodeError) else "unreadable value"
            raise where.error(
                f"line {number} is not JSON: {message}",
                line=number,
                remedy="an interrupted run may have cut the line short: delete it, or run again",
            ) from None
    return tuple(records)


def _table_document(text: str, name: str) -> Document:
    where = Document(name=name)
    try:
        with _long_fields():
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
            rows: list[tuple[int, tuple[str, ...]]] = []
            start = 1
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    rows.append((start, tuple(cells)))
                start = reader.line_num + 1
    except csv.Error as error:
        raise where.error(f"not a table: {error}") from None
    if not rows or len(rows[0][1]) < 2:
        raise where.error(
            "not a result file: neither JSON, nor JSON lines, nor a table with columns",
            line=rows[0][0] if rows else 1,
            remedy="pass the JSON, JSONL or CSV file that the evaluation tool wrote",
        )
    return Document(name=name, table=tuple(rows))


def _delimiter(text: str) -> str:
    head = text.lstrip().split("\n", 1)[0]
    return max((",", "\t", ";"), key=head.count)


@contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module's field limit is global: widen it, and put it back."""
    before = csv.field_size_limit(_FIELD_LIMIT_CHARS)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def python_literal(cell: str) -> Json:
    """A cell that pandas wrote as Python's repr (``['a', 'b']``), or the cell itself."""
    if cell[:1] not in ("[", "{", "("):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # "\\d" in a model's answer
            return ast.literal_eval(cell)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return cell
