"""Plan files: one job as a person writes it, to a :class:`ftplan.spec.Plan` and back.

The short forms of the format (``model: llama-3.1-8b``, ``optimizer: adamw``, ``host_ram: 512GiB``,
``headroom: 5%``) are spelled out first; what is left is the dataclasses of :mod:`ftplan.spec`,
key for key.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ftplan.errors import FtplanError, Location, UnitError
from ftplan.files.document import Document, Key, describe, parse_document, read_document
from ftplan.files.typed import LARGEST, build, nearest
from ftplan.report import Assumption
from ftplan.spec import Plan
from ftplan.units import parse_bytes, parse_count, parse_percent

__all__ = [
    "SCHEMA_LINE",
    "SIZE_KEYS",
    "WORD_KEYS",
    "dump_plan",
    "looks_like_plan",
    "parse_plan",
    "place_error",
    "plan_to_mapping",
    "read_plan",
]

SCHEMA_LINE = "# yaml-language-server: $schema=ftplan-plan.schema.json"
"""The first line of plans we write: editors then complete and check keys. The schema itself is
printed by ``ftplan schema plan``."""

BOUNDS = {
    "version": (1, 1),
    "alpha": (0, LARGEST),
    "layers_to_transform": (0, LARGEST),
    "dropout": (0, 1),
    "momentum": (0, 1),
    "images": (0, LARGEST),
    "reserved": (0, LARGEST),
    "host_ram": (1, LARGEST),
    "prefetch_elements": (0, LARGEST),
    "max_live_elements": (0, LARGEST),
    "persistence_elements": (0, LARGEST),
    "headroom": (0, 0.99),
    "sampler_share": (0, 1),
    "seq_len": (1, 10**9),
    "micro": (1, 10**6),
    "eval_micro": (1, 10**6),
    "accumulation": (1, 10**7),
    "rank": (1, 10**6),
    "count": (1, 10**6),
    "nodes": (1, 10**6),
}
"""Keys that are not simply a count from 1. The upper ends are generous: they catch slips."""

SIZE_KEYS = (("hardware", "host_ram"), ("hardware", "reserved"), ("hardware", "disk"),
          ("sharding", "bucket_bytes"))  # fmt: skip
_SHARES = (("budget", "headroom"), ("rollout", "sampler_share"))
WORD_KEYS = {
    "model": "name",
    "method": "kind",
    "optimizer": "name",
    "loss": "kind",
    "sharding": "kind",
    "hardware": "gpu",
    "gradient_checkpointing": "kind",
}
"""Sections that may be given as one word, and the key that the word is for."""
_EXAMPLES = {
    "model": "llama-3.1-8b, or model: {params: 13e9}",
    "method": "lora, or method: {kind: lora, rank: 16}",
    "optimizer": "adamw_torch_fused",
    "loss": "full",
    "sharding": "{kind: fsdp}",
    "hardware": "{gpu: a100-80gb, count: 1}",
    "gradient_checkpointing": "true",
}


def read_plan(path: str | Path) -> Plan:
    """Read a plan file (YAML or JSON). Raises :class:`InputError` with file, line and column."""
    return parse_plan(read_document(path))


def looks_like_plan(document: Document) -> bool:
    """Whether a document is meant as our plan, and not as a trainer's config."""
    data = document.data
    return isinstance(data, dict) and "version" in data and "model" in data


def parse_plan(document: Document) -> Plan:
    """The plan that a document holds.

    ``model: null`` is a plan whose model is not known yet (an import may leave it open): it is
    read as an empty :class:`ftplan.spec.Model`. A missing ``model`` or ``version`` is refused.
    """
    data = document.mapping("a plan", remedy="begin with 'version: 1' and 'model: llama-3.1-8b'")
    for key, example in (("version", "1"), ("model", "llama-3.1-8b")):
        if key not in data:
            near = nearest(key, data, limit=1)
            raise document.error(
                f"the plan has no {key!r}",
                (near[0],) if near else (),
                remedy=f"write {key}: {example}",
            )
    spelled = _Speller(document).spell_out(data)
    plan = build(Plan, spelled, document, bounds=BOUNDS)
    targets = plan.method.targets if plan.method is not None else None
    if isinstance(targets, str) and (fault := regex_fault(targets)):
        raise document.error(
            f"method.targets is no regular expression: {fault}",
            ("method", "targets"),
            remedy="write module names as a list, [q_proj, v_proj], or mend the expression",
        )
    return plan


def regex_fault(pattern: str) -> str:
    """What is wrong with a regular expression; empty when nothing is."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return ""


class _Speller:
    """The short forms of a plan, spelled out; values that need a unit, with their unit read."""

    def __init__(self, document: Document) -> None:
        self._document = document

    def spell_out(self, data: Mapping[str, Any]) -> dict[str, Any]:
        plan: dict[str, Any] = copy.deepcopy(dict(data))
        for section, key in WORD_KEYS.items():
            value = plan.get(section)
            if isinstance(value, str):
                plan[section] = {key: value}
            elif value is not None and not isinstance(value, dict | bool):
                raise self._document.error(
                    f"{section} is a {key} or a mapping, this is {describe(value)}",
                    (section,),
                    remedy=f"write {section}: {_EXAMPLES[section]}",
                )
        self._special_words(plan)
        # an empty section is what YAML makes of a heading without content
        for section in ("model", "precision", "batch", "hardware", "sharding", "budget"):
            if section in plan and plan[section] is None:
                plan[section] = {}
        for path in SIZE_KEYS:
            self._convert(plan, path, parse_bytes, "a size has a unit, as in 512GiB")
        for path in _SHARES:
            self._convert(plan, path, _share(path), "a share is written as in 5%")
        self._convert(plan, ("model", "params"), parse_count, "a count is written as in 13e9")
        self._trainable_share(plan)
        self._convert(plan, ("method", "trainable"), parse_count, "a count is written as in 1e9")
        self._model(plan["model"])
        return plan

    def _trainable_share(self, plan: dict[str, Any]) -> None:
        """``trainable: 10%`` is a share of the bare parameter count beside it."""
        method, model = plan.get("method"), plan.get("model")
        given = method.get("trainable") if isinstance(method, dict) else None
        if not (isinstance(given, str) and given.strip().endswith("%")):
            return
        params = model.get("params") if isinstance(model, dict) else None
        if not isinstance(params, int):
            raise self._document.error(
                "a share of trainable parameters needs the model as a parameter count",
                ("method", "trainable"),
                remedy="write model: {params: 13e9}, or train whole blocks with last_layers: K",
            )
        assert isinstance(method, dict)
        try:
            method["trainable"] = round(parse_percent(given) * params)
        except UnitError as error:
            raise self._document.error(
                f"method.trainable: {error.message}", ("method", "trainable"), remedy=error.remedy
            ) from error

    def _special_words(self, plan: dict[str, Any]) -> None:
        checkpointing = plan.get("gradient_checkpointing")
        if isinstance(checkpointing, bool):
            plan["gradient_checkpointing"] = {"kind": "full" if checkpointing else "none"}
        batch = plan.get("batch")
        if isinstance(batch, dict) and isinstance(batch.get("lengths"), str):
            batch["lengths"] = {"kind": batch["lengths"]}
        if isinstance(method := plan.get("method"), dict) and method == {"kind": "none"}:
            plan["method"] = None
        precision = plan.get("precision")
        if isinstance(precision, dict) and precision.get("mixed") is False:
            precision["mixed"] = "no"  # an unquoted no is false in YAML
        for key in ("attention", "kernels"):
            if plan.get(key) is False:
                raise self._document.error(
                    f"{key} cannot be false",
                    (key,),
                    remedy=f"write {key}: {'none' if key == 'kernels' else 'eager'}",
                )

    def _convert(
        self,
        plan: dict[str, Any],
        path: tuple[str, str],
        parse: Callable[[Any], Any],
        rule: str,
    ) -> None:
        section = plan.get(path[0])
        if not isinstance(section, dict) or section.get(path[1]) is None:
            return
        value = section[path[1]]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self._document.error(f"{'.'.join(path)}: {rule}, not {describe(value)}", path)
        try:
            section[path[1]] = parse(value)
        except UnitError as error:
            raise self._document.error(
                f"{'.'.join(path)}: {error.message}", path, remedy=error.remedy
            ) from error

    def _model(self, model: Any) -> None:
        if not isinstance(model, dict):
            return
        given = [key for key in ("name", "config", "params") if model.get(key) is not None]
        if len(given) > 1:
            raise self._document.error(
                f"the model is given {len(given)} times: {', '.join(given)}",
                ("model", given[1]),
                remedy="keep one of name, config and params",
            )


def _share(path: tuple[str, str]) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        if value == 0 and not isinstance(value, str):
            return 0.0
        if path[1] == "headroom" and parse_percent(str(value)) > 0.99:
            raise UnitError(f"{value!r} leaves nothing to use", remedy="write it like 5%")
        if path[1] == "sampler_share" and not isinstance(value, str):
            return float(value)  # vLLM's own spelling is a share from 0 to 1
        return parse_percent(str(value))

    return parse


def place_error(error: FtplanError, document: Document) -> FtplanError:
    """The same error, at the key of ``document`` that it is about when that can be told.

    The calculator knows no files: what it refuses is placed here, for the name it did not know
    stands in the document. What came from elsewhere (a flag) is about the file as a whole.
    """
    if error.location is not None:
        return error
    path: tuple[Key, ...] | None = None
    names = [getattr(error, "name", ""), *re.findall(r"'([^']+)'", error.message)]
    for name in names:
        found = find_value(document.data, str(name)) if name else None
        if found is not None:
            path = found
            break
    if path is None:
        error.location = Location(file=document.file)
        return error
    error.location = document.locate(path)
    error.source_line = document.line_text(error.location.line)
    return error


def find_value(data: Any, value: str) -> tuple[Key, ...] | None:
    """The path of the first place where ``value`` stands, or None."""
    if data == value and isinstance(data, str):
        return ()
    items: Iterable[tuple[Key, Any]] = ()
    if isinstance(data, dict):
        items = data.items()
    elif isinstance(data, list):
        items = enumerate(data)
    for key, child in items:
        below = find_value(child, value)
        if below is not None:
            return (key, *below)
    return None


# --- Writing ------------------------------------------------------------------------------------


def plan_to_mapping(plan: Plan) -> dict[str, Any]:
    """The plan as plan-file data: short forms where nothing is lost, nothing that was not given.

    ``parse_plan`` of what this returns is the same plan.
    """
    data: dict[str, Any] = {"version": plan.version}
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if field.name == "version":
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            section = _section(value, field.name)
            nothing = isinstance(section, dict) and not section
            if field.name == "model":
                data[field.name] = None if nothing else section
            elif not nothing or field.default is None:  # an optional section that says nothing
                data[field.name] = section
        elif value is not None:
            data[field.name] = value
    return data


def _section(value: Any, name: str) -> Any:
    given: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        required = field.default is dataclasses.MISSING
        if item is None or (not required and item == field.default and field.name != "kind"):
            continue
        given[field.name] = _written(name, field.name, item)
    if name == "gradient_checkpointing" and set(given) == {"kind"}:
        return {"full": True, "none": False}.get(given["kind"], given["kind"])
    if name in ("model", "optimizer", "loss") and set(given) == {WORD_KEYS[name]}:
        return given[WORD_KEYS[name]]
    return given


def _written(section: str, key: str, value: Any) -> Any:
    if (section, key) in SIZE_KEYS:
        return _exact_bytes(value)
    if (section, key) == ("budget", "headroom"):
        return _exact_percent(value)
    if (section, key) == ("batch", "lengths"):
        told = _section(value, key)
        return value.kind if set(told) == {"kind"} else told
    return list(value) if isinstance(value, tuple) else value


def _exact_bytes(count: int) -> str:
    for unit, size in (
        ("TiB", 2**40),
        ("GiB", 2**30),
        ("GB", 10**9),
        ("MiB", 2**20),
        ("MB", 10**6),
    ):
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return f"{count}B"


def _exact_percent(share: float) -> str:
    for digits in range(2, 18):
        text = f"{share * 100:.{digits}f}".rstrip("0").rstrip(".") + "%"
        if parse_percent(text) == share:
            return text
    return f"{share * 100!r}%"


_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./+-]*(?: [A-Za-z0-9_./+-]+)*|[0-9]+(?:[A-Z][A-Za-z]*|%)")
_WORDS = {"yes", "no", "on", "off", "true", "false", "null", "y", "n"}


def scalar(value: Any) -> str:
    """One value in YAML's flow style; text is quoted when it could be read as anything else."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        safe = _PLAIN.fullmatch(value) is not None and value.lower() not in _WORDS
        return value if safe else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(scalar, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(k)}: {scalar(v)}" for k, v in value.items()) + "}"
    return repr(value)


def dump_plan(
    plan: Plan,
    *,
    assumptions: Iterable[Assumption] = (),
    notes: Iterable[str] = (),
    missing: Iterable[str] = (),
) -> str:
    """The plan as a commented YAML file that reads back as the same plan.

    ``assumptions`` become comments beside the section they are about, ``notes`` comments at the
    top, and each key named in ``missing`` (``hardware.gpu``) is written as null: it is to be
    filled in.
    """
    data = plan_to_mapping(plan)
    for key in missing:
        _put_null(data, key.split("."))
    lines = [SCHEMA_LINE]
    lines += [f"# {line}".rstrip() for note in notes for line in note.splitlines()]
    remarks: dict[str, list[str]] = {}
    for assumption in assumptions:
        text = f"# assumed: {assumption.key} = {scalar(assumption.value)} ({assumption.source})"
        remarks.setdefault(assumption.key.split(".")[0], []).append(" ".join(text.split()))
    for key, value in data.items():
        lines += remarks.pop(key, [])
        lines += _lines(key, value)
    lines += [line for rest in remarks.values() for line in rest]
    text = "\n".join(lines) + "\n"
    assert missing or parse_plan(parse_document(text, file="plan")) == plan, text
    return text


def _put_null(data: dict[str, Any], path: list[str]) -> None:
    section, key = path[0], path[-1]
    if len(path) == 1:
        data.setdefault(key, None)
        return
    if data.get(section) is None:
        data[section] = None if section == "model" else {key: None}
        return
    if not isinstance(data[section], dict):
        data[section] = {WORD_KEYS[section]: data[section]}
    data.setdefault(section, {}).setdefault(key, None)


def _lines(key: str, value: Any) -> list[str]:
    flow = f"{key}: {scalar(value)}"
    if not isinstance(value, dict) or len(flow) <= 88:
        return [flow]
    return [f"{key}:", *(f"  {scalar(k)}: {scalar(v)}" for k, v in value.items())]
