"""Failures files: what a person says about a system that is not good enough yet.

Read as strictly as a plan, except where reality is: a ``kind`` of the user's own is never
refused, an item's texts may be numbers, lists or mappings (they are kept as text), and a share
may be written as ``12%`` or ``0.12``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from ftplan.errors import UnitError
from ftplan.failures import STATE_BOUNDS, Failure, FailuresFile, State
from ftplan.files.document import Document, Key, read_document
from ftplan.files.plan import scalar
from ftplan.files.typed import build
from ftplan.units import parse_percent

__all__ = [
    "FAILURES_SCHEMA_LINE",
    "dump_failures",
    "looks_like_failures",
    "parse_failures",
    "read_failures",
]

FAILURES_SCHEMA_LINE = "# yaml-language-server: $schema=ftplan-failures.schema.json"

_TEXTS = ("id", "description", "input", "output", "expected", "note", "annotator")
_LISTS = ("context", "checks")
_SHARES = {name for name, (low, high) in STATE_BOUNDS.items() if (low, high) == (0.0, 1.0)}


def read_failures(path: str | Path) -> FailuresFile:
    """Read a failures file (YAML or JSON). Raises :class:`InputError` with file, line, column."""
    return parse_failures(read_document(path))


def looks_like_failures(document: Document) -> bool:
    """Whether a document is meant as a failures file, and not as a tool's results."""
    data = document.data
    if not isinstance(data, dict):
        return False
    return "state" in data or ("failures" in data and "version" in data)


def parse_failures(document: Document) -> FailuresFile:
    """The failures file that a document holds."""
    data = document.mapping("a failures file", remedy="begin with 'version: 1' and 'failures:'")
    spelled = copy.deepcopy(data)
    for key in ("state", "failures"):
        if spelled.get(key, 0) is None:
            del spelled[key]  # a heading without content
    state = spelled.get("state")
    if isinstance(state, dict):
        _shares(document, state, ("state",))
    rows = spelled.get("failures")
    for index, row in enumerate(rows if isinstance(rows, list) else []):
        if isinstance(row, dict):
            _shares(document, row, ("failures", index))
            _texts(document, row, ("failures", index))
    return build(FailuresFile, spelled, document, bounds=STATE_BOUNDS)


def _shares(document: Document, section: dict[str, Any], path: tuple[Key, ...]) -> None:
    for name in _SHARES & section.keys():
        value = section[name]
        if isinstance(value, str) and value.strip().endswith("%"):
            try:
                section[name] = parse_percent(value)
            except UnitError as error:
                raise document.error(error.message, (*path, name), remedy=error.remedy) from error


def _texts(document: Document, row: dict[str, Any], path: tuple[Key, ...]) -> None:
    for name in _TEXTS:
        value = row.get(name)
        if value == "":
            row[name] = None  # an empty answer is common in results; there is nothing to show
        elif value is not None and not isinstance(value, str):
            row[name] = _as_text(document, value, (*path, name))
    for name in _LISTS:
        value = row.get(name)
        if isinstance(value, str):
            row[name] = [value]
        elif isinstance(value, list):
            row[name] = [_as_text(document, item, (*path, name, i)) for i, item in enumerate(value)]


def _as_text(document: Document, value: Any, path: tuple[Key, ...]) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return document.source_text(path)


def dump_failures(failures: FailuresFile) -> str:
    """The failures file as YAML that reads back the same; nothing is written that is not known."""
    lines = [FAILURES_SCHEMA_LINE, f"version: {failures.version}"]
    if failures.task is not None:
        lines.append(f"task: {scalar(failures.task)}")
    state = _given(failures.state)
    if state:
        lines += ["state:", *(f"  {key}: {scalar(value)}" for key, value in state.items())]
    lines.append("failures:" if failures.failures else "failures: []")
    for failure in failures.failures:
        rows = [f"{key}: {scalar(value)}" for key, value in _given(failure).items()] or ["{}"]
        lines.append(f"  - {rows[0]}")
        lines += [f"    {row}" for row in rows[1:]]
    return "\n".join(lines) + "\n"


def _given(value: State | Failure) -> dict[str, Any]:
    items = ((f.name.rstrip("_"), getattr(value, f.name)) for f in dataclasses.fields(value))
    return {name: item for name, item in items if item is not None}
