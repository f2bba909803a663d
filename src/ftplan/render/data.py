"""An answer as plain data: the exact field names that JSON and YAML show and scripts parse."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ftplan.errors import Location
from ftplan.report import CheckReport, Report

__all__ = ["check_data", "plain", "report_data"]


def plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as dicts and lists; a location as file, line, column."""
    if isinstance(value, Report):
        return report_data(value)
    if isinstance(value, CheckReport):
        return check_data(value)
    if isinstance(value, Location):
        return {"file": value.file, "line": value.line, "column": value.column}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value)]
        # the version of the format comes first, wherever the class declares it
        fields.sort(key=lambda name: name not in ("schema_version", "tool_version"))
        return {name.rstrip("_"): plain(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value


def report_data(report: Report) -> dict[str, Any]:
    """The report of one job, its fields in the order of the contract."""
    data = {f.name: plain(getattr(report, f.name)) for f in dataclasses.fields(report)}
    versions = {name: data.pop(name) for name in ("schema_version", "tool_version")}
    return {**versions, **data}


def check_data(check: CheckReport) -> dict[str, Any]:
    """The answer of ``check``: one result per file, in order."""
    return {
        "schema_version": check.schema_version,
        "verdict": check.verdict,
        "results": [{"file": file, **report_data(report)} for file, report in check.results],
    }
