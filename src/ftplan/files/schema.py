"""JSON Schemas of the files and answers, derived from the classes that read and write them.

The classes say what a section holds; here stands only what the readers accept beyond that: the
short forms, and quantities with their units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ftplan.advice import Advice
from ftplan.failures import FailuresFile
from ftplan.files.plan import SIZE_KEYS, WORD_KEYS
from ftplan.files.typed import adapter
from ftplan.report import CheckReport, Report
from ftplan.spec import Plan

__all__ = ["SCHEMAS", "schema"]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SIZE = {
    "type": "string",
    "pattern": r"^\s*[0-9][0-9_,.]*(?:[eE][+-]?[0-9]+)?\s*[KMGTkmgt]?i?[Bb]\s*$",
}
_PERCENT = {"type": "string", "pattern": r"^\s*[0-9][0-9.]*\s*%\s*$"}
_COUNT = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "string", "pattern": r"^\s*[0-9][0-9_,.]*(?:[eE][+-]?[0-9]+)?\s*[KMBTkmbt]?\s*$"},
    ]
}


def _properties(schema: dict[str, Any], section: str) -> dict[str, Any]:
    """The properties of one section, through pydantic's reference to its definition."""
    name = {"optimizer": "OptimizerChoice", "gradient_checkpointing": "Checkpointing"}.get(
        section, section.capitalize()
    )
    found: dict[str, Any] = schema["$defs"][name]["properties"]
    return found


def _described(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {key: old[key] for key in ("description", "default") if key in old} | new


def _plan() -> dict[str, Any]:
    schema: dict[str, Any] = adapter(Plan).json_schema()
    null = {"type": "null"}
    for section, key in WORD_KEYS.items():
        old = schema["properties"][section]
        word = _properties(schema, section)[key]
        choices = [c for c in word.get("anyOf", [word]) if c.get("type") != "null"]
        forms = [*choices, *old.get("anyOf", [{"$ref": old["$ref"]}] if "$ref" in old else [])]
        if section == "gradient_checkpointing":
            forms.insert(0, {"type": "boolean"})
        if section == "method":
            forms.append({"const": "none"})
        if null not in forms:
            forms.append(null)
        schema["properties"][section] = _described(old, {"anyOf": forms})
    for section, key in SIZE_KEYS:
        properties = _properties(schema, section)
        properties[key] = _described(properties[key], {"anyOf": [_SIZE, null]})
    for section, key, form in (
        ("model", "params", _COUNT),
        ("method", "trainable", {"anyOf": [*_COUNT["anyOf"], _PERCENT]}),
        ("budget", "headroom", {"anyOf": [_PERCENT, {"const": 0}]}),
        ("rollout", "sampler_share", {"anyOf": [{"type": "number"}, _PERCENT]}),
    ):
        properties = _properties(schema, section)
        properties[key] = _described(properties[key], {"anyOf": [*form["anyOf"], null]})
    schema["required"] = ["version", "model"]
    return schema


def _failures() -> dict[str, Any]:
    schema: dict[str, Any] = adapter(FailuresFile).json_schema()
    for name in ("State", "Failure"):
        for key, value in schema["$defs"][name]["properties"].items():
            forms = value.get("anyOf", [])
            if {"type": "number"} in forms:
                forms.append(_PERCENT)
            if key in ("id", "input", "output", "expected"):
                value["anyOf"] = [{}]  # any value is kept as its text
    return schema


def _answer(cls: type) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        schema: dict[str, Any] = adapter(cls).json_schema(mode="serialization")
        return _all_required(schema)

    return make


def _all_required(schema: dict[str, Any]) -> dict[str, Any]:
    """Answers are written whole: every field is there, with null where there is nothing."""
    for part in (schema, *schema.get("$defs", {}).values()):
        if "properties" in part:
            part["required"] = list(part["properties"])
            for value in part["properties"].values():
                value.pop("default", None)
    return schema


def _advice() -> dict[str, Any]:
    schema = _answer(Advice)()
    for part in (schema, *schema["$defs"].values()):
        properties = part.get("properties", {})
        if "class_" in properties:
            part["properties"] = {key.rstrip("_"): value for key, value in properties.items()}
            part["required"] = list(part["properties"])
    return schema


def _report() -> dict[str, Any]:
    """The answer of ``memory``, and beside it (``$defs/Check``) that of ``check``."""
    schema = _answer(Report)()
    result = {
        "type": "object",
        "properties": {"file": {"type": "string"}, **schema["properties"]},
        "required": ["file", *schema["required"]],
    }
    version = next(f for f in dataclasses.fields(CheckReport) if f.name == "schema_version")
    schema["$defs"]["Check"] = {
        "type": "object",
        "properties": {
            "schema_version": {"const": version.default},
            "verdict": {"enum": ["fits", "tight", "over", "unknown"]},
            "results": {"type": "array", "items": result},
        },
        "required": ["schema_version", "verdict", "results"],
    }
    return schema


SCHEMAS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "plan": ("A plan of ftplan: one job", _plan),
    "failures": ("Failures of a system, as ftplan reads them", _failures),
    "report": ("The answer of ftplan memory", _report),
    "advice": ("The answer of ftplan advise", _advice),
}
"""Title and maker of each schema, by the name that ``ftplan schema`` takes."""


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) called ``name``: a key of :data:`SCHEMAS`."""
    title, make = SCHEMAS[name]
    body = make()
    body.pop("title", None)
    return {"$schema": _DIALECT, "title": title, **body}
