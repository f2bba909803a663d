"""One way to look a name up: exact, in any usual spelling, ambiguous, or unknown.

A shelf holds the rows of one data file, a line each. A row that is called by its own name is read
alone; for anything else all are, once.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

from ftplan.errors import AmbiguousNameError, UnknownNameError

__all__ = ["Named", "Shelf", "canonical", "read_data", "read_row", "read_rows"]


class Named(Protocol):
    """What every catalogue row has."""

    @property
    def name(self) -> str:
        """Canonical name: lower case, words joined by `-`."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names the row answers to."""


RowT = TypeVar("RowT", bound=Named)


def canonical(name: str) -> str:
    """``name`` in the form in which names are compared: lower case, `_` and spaces as `-`."""
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def read_data(file: str, package: str = "ftplan.catalog") -> Any:
    """What ``data/<file>`` beside a package of ours says, from a folder or from a zip file."""
    # what importlib.resources does, which costs more to import than all rows to parse
    return json.loads(_read(file, package))


def _read(file: str, package: str = "ftplan.catalog") -> bytes:
    spec: Any = sys.modules[package].__spec__
    path = os.path.join(spec.submodule_search_locations[0], "data", file)  # noqa: PTH118
    content: bytes = spec.loader.get_data(path)
    return content


def read_rows(file: str) -> list[Mapping[str, Any]]:
    """The rows of ``data/<file>``, in the order of the file."""
    rows: list[Mapping[str, Any]] = read_data(file)
    return rows


def read_row(file: str, name: str) -> Mapping[str, Any] | None:
    """The row of ``data/<file>`` whose line begins with this name; the others are not parsed."""
    line = re.search(rb'^\{"name": ?"%s",.*?(?=,?$)' % re.escape(name).encode(), _read(file), re.M)
    row: Mapping[str, Any] | None = json.loads(line[0]) if line else None
    return row


class Shelf(Generic[RowT]):
    """The rows of one kind, found by name: ``make`` builds each from what ``file`` says of it.

    ``ids`` gives further names a row answers to exactly (hub ids). ``spellings`` gives those it
    answers to when nothing does exactly (a hub id without its owner); two rows may share such a
    key, and then the name is ambiguous. ``otherwise`` is what helps somebody whose name is on no
    shelf.
    """

    def __init__(
        self,
        kind: str,
        command: str,
        file: str,
        make: Callable[[Mapping[str, Any]], RowT],
        ids: Callable[[RowT], Iterable[str]] = lambda row: (),
        spellings: Callable[[RowT], Iterable[str]] = lambda row: (),
        otherwise: str = "",
    ) -> None:
        self.kind = kind
        self.command = command
        self._file = file
        self._make = make
        self._ids = ids
        self._spellings = spellings
        self._otherwise = otherwise
        self._made: dict[str, RowT] = {}

    @cached_property
    def rows(self) -> tuple[RowT, ...]:
        """All rows, in the order of the data file."""
        known = self._made
        return tuple(known.get(row["name"]) or self._make(row) for row in read_rows(self._file))

    def __iter__(self) -> Iterator[RowT]:
        return iter(self.rows)

    @cached_property
    def _exact(self) -> dict[str, list[RowT]]:
        return _group(
            (canonical(known), row)
            for row in self.rows
            for known in (row.name, *row.aliases, *self._ids(row))
        )

    @cached_property
    def _loose(self) -> dict[str, list[RowT]]:
        return _group((canonical(n), row) for row in self.rows for n in self._spellings(row))

    @cached_property
    def _names(self) -> dict[str, RowT]:
        return {canonical(row.name): row for row in self.rows}

    def lookup(self, name: str) -> Sequence[RowT]:
        """The rows that answer to ``name``: one, several when it is ambiguous, or none."""
        key = canonical(name)
        if row := self._alone(name) or self._alone(key):
            return (row,)
        if key in self._names:
            return (self._names[key],)
        return self._exact.get(key) or self._loose.get(key) or ()

    def _alone(self, name: str) -> RowT | None:
        if "rows" not in vars(self) and name not in self._made:
            row = read_row(self._file, name)
            if row is not None:
                self._made[name] = self._make(row)
        return self._made.get(name)

    def find(self, name: str) -> RowT:
        """The row called ``name``. ``UnknownNameError`` or ``AmbiguousNameError`` otherwise."""
        return self.only(name, self.lookup(name))

    def only(self, name: str, found: Sequence[RowT]) -> RowT:
        """The single row in ``found``, or the error that says why there is not one."""
        if len(found) > 1:
            raise AmbiguousNameError(self.kind, name, candidates=[row.name for row in found])
        if not found:
            raise UnknownNameError(
                self.kind,
                name,
                suggestions=self.suggestions(name),
                remedy=f"`ftplan {self.command}` lists them all" + self._otherwise,
            )
        return found[0]

    def suggestions(self, name: str) -> tuple[str, ...]:
        """Up to three canonical names close to ``name``, nearest first."""
        key = canonical(name).rsplit("/", 1)[-1]
        # difflib is worth its import only after a mistake
        from difflib import get_close_matches

        near = get_close_matches(key, self._names, n=3, cutoff=0.6)
        if len(near) < 3:
            near += get_close_matches(key, self._exact, n=6, cutoff=0.6)
        if not near and len(key) > 3:
            near = [spelling for spelling in self._exact if key in spelling]
        named = dict.fromkeys(row.name for match in near for row in self._exact[match])
        return tuple(named)[:3]

    def search(self, query: str = "") -> tuple[RowT, ...]:
        """Rows whose names hold every word of ``query``, in the order of the file."""
        words = canonical(query).split("-") if query.strip() else []
        return tuple(row for row in self.rows if all(w in self._haystack(row) for w in words))

    def _haystack(self, row: RowT) -> str:
        return " ".join(canonical(n) for n in (row.name, *row.aliases, *self._ids(row)))


def _group(pairs: Iterable[tuple[str, RowT]]) -> dict[str, list[RowT]]:
    groups: dict[str, list[RowT]] = {}
    for key, row in pairs:
        rows = groups.setdefault(key, [])
        if row not in rows:
            rows.append(row)
    return groups
