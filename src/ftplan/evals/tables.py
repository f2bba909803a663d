"""The shapes in which pandas writes a table as JSON."""

from __future__ import annotations

from typing import Any

__all__ = ["column_oriented"]

Json = Any


def column_oriented(value: Json) -> list[dict[str, Json]] | None:
    """Rows of a table written with orient `split`, `columns` (the default), `index` or `table`.

    None where the value is no such table. Lists of records need no help.
    """
    if not isinstance(value, dict) or not value:
        return None
    columns, data = value.get("columns"), value.get("data")
    if isinstance(columns, list) and isinstance(data, list):
        return [
            dict(zip(map(str, columns), row, strict=False)) for row in data if isinstance(row, list)
        ]
    if "schema" in value and isinstance(data, list):
        return [row for row in data if isinstance(row, dict)]
    branches = list(value.values())
    if not all(isinstance(branch, dict) and branch for branch in branches):
        return None
    keys = list(branches[0])
    if not all(list(branch) == keys for branch in branches):
        return None
    if all(key.isdigit() for key in keys):  # columns -> {row number: cell}
        return [{name: branch[key] for name, branch in value.items()} for key in keys]
    if all(key.isdigit() for key in value):  # index: {row number: {column: cell}}
        return branches
    return None
