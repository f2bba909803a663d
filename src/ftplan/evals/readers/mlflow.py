"""MLflow: `result.tables["eval_results"]` of `mlflow.genai.evaluate` as JSON lines, JSON or CSV,
and the `eval_results_table.json` artifact of the older `mlflow.evaluate`.

`<scorer>/value` is a verdict or a score; where the assessment of that name is a human expectation
it is the label, not a score. The older table has scores from 1 to 5 at `<metric>/v1/score`.
Source: https://mlflow.org/docs/latest/genai/eval-monitor/ and files written by 3.17.2.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ftplan.evals.document import Document, python_literal
from ftplan.evals.options import ReadOptions
from ftplan.evals.readers import Reader
from ftplan.evals.scores import judged_check, threshold_note
from ftplan.evals.tables import column_oriented
from ftplan.evals.values import (
    all_crashed,
    as_contexts,
    as_dict,
    as_list,
    as_number,
    as_text,
    as_verdict,
    decide,
    is_missing,
    metric_key,
    reasons,
)
from ftplan.results import Check, EvalRun, ResultRow

Json = Any
_LABELS = ("expected_response", "expected_answer", "expected_output", "ground_truth")
_RUBRIC_SCALE = (1.0, 5.0)
_NOT_QUALITY = {
    "token_count", "latency", "ari_grade_level", "flesch_kincaid_grade_level", "token_usage",
}  # fmt: skip


def recognises(document: Document) -> bool:
    columns = _columns(document)
    return _is_genai(columns) or _is_legacy(columns)


def read(document: Document, options: ReadOptions) -> EvalRun:
    rows = tuple(
        _genai_row(row, number, line, options)
        if _is_genai(set(row))
        else _legacy_row(row, number, line, options)
        for number, (line, row) in enumerate(_table(document))
    )
    return EvalRun(tool="mlflow", rows=rows, notes=threshold_note(rows))


def _is_genai(columns: set[str]) -> bool:
    judged = any(name.endswith("/value") for name in columns)
    answered = columns & {"request", "response", "inputs", "outputs", "trace_id"}
    return (judged and bool(answered)) or ("assessments" in columns and "trace_id" in columns)


def _is_legacy(columns: set[str]) -> bool:
    return any(name.endswith("/score") for name in columns) and bool(
        columns & {"outputs", "predictions", "prediction", "targets", "inputs", "response"}
    )


def _table(document: Document) -> Iterable[tuple[int | None, dict[str, Json]]]:
    if document.table:
        return document.table_objects()
    oriented = column_oriented(document.value)
    if oriented is not None:
        return ((None, row) for row in oriented)
    return ((line or None, row) for line, row in document.objects)


def _columns(document: Document) -> set[str]:
    first = next(iter(_table(document)), None)
    return set(map(str, first[1])) if first else set()


def _nested(value: Json) -> Json:
    """A JSON value that may have been written as a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return python_literal(value)


def _genai_row(
    row: Mapping[str, Json], number: int, line: int | None, options: ReadOptions
) -> ResultRow:
    trace = as_dict(_nested(row.get("trace")))
    info = as_dict(trace.get("info"))
    assessments = [
        as_dict(each)
        for each in as_list(_nested(row.get("assessments"))) or as_list(info.get("assessments"))
    ]
    labels = {
        as_text(each.get("assessment_name") or each.get("name")): as_dict(each["expectation"])
        for each in assessments
        if isinstance(each.get("expectation"), dict)
    }
    checks = tuple(_genai_checks(row, assessments, labels, options))
    state = as_text(row.get("state") or info.get("state")).upper().rpartition(".")[2]
    error = all_crashed(checks)
    if state == "ERROR":
        error = "the traced application raised an exception"
    question = as_text(_nested(row.get("request") or row.get("inputs")))
    tags = as_dict(_nested(row.get("tags")))
    return ResultRow(
        id=as_text(row.get("trace_id")) or f"row-{number}",
        item=question or as_text(tags.get("mlflow.eval.requestId")) or f"row-{number}",
        passed=None if error else decide(checks),
        checks=checks,
        input=question,
        output=as_text(_nested(row.get("response") or row.get("outputs"))),
        expected=_expected(row, labels),
        contexts=_retrieved(row, trace),
        reason=reasons(checks),
        error=error,
        line=line,
    )


def _genai_checks(
    row: Mapping[str, Json],
    assessments: list[dict[str, Json]],
    labels: Mapping[str, Json],
    options: ReadOptions,
) -> Iterable[Check]:
    seen: set[str] = set()
    crashed = {
        as_text(each.get("assessment_name")): error
        for each in assessments
        if (error := _assessment_error(each))
    }
    for column, value in row.items():
        name, _, suffix = column.rpartition("/")
        if suffix != "value" or not name or name in labels or _is_label(name):
            continue
        seen.add(name)
        if name in crashed:
            yield Check(name=name, error=crashed[name])
        elif not is_missing(value):
            yield _judged(name, value, as_text(row.get(f"{name}/rationale")), options)
    for assessment in assessments:
        name = as_text(assessment.get("assessment_name") or assessment.get("name"))
        if not name or name in seen or name in labels or _is_label(name):
            continue
        seen.add(name)
        if name in crashed:
            yield Check(name=name, error=crashed[name])
            continue
        value = as_dict(assessment.get("feedback")).get("value")
        if not is_missing(value):
            yield _judged(name, value, as_text(assessment.get("rationale")), options)


def _judged(name: str, value: Json, reason: str, options: ReadOptions) -> Check:
    if isinstance(value, str) and value.strip()[:1] in "{[":
        value = _nested(value)
    decides = metric_key(name) not in _NOT_QUALITY
    return judged_check(
        name=name, value=value, thresholds=options.thresholds, reason=reason, decides=decides
    )


def _assessment_error(assessment: dict[str, Json]) -> str:
    error = as_dict(assessment.get("feedback")).get("error") or assessment.get("error")
    if not error:
        return ""
    fields = as_dict(error)
    return as_text(fields.get("error_message") or fields.get("error_code") or error)


def _is_label(name: str) -> bool:
    return name.startswith("expected_") or name in _LABELS


def _expected(row: Mapping[str, Json], labels: Mapping[str, Json]) -> str:
    for name in (*_LABELS, *labels):
        if name in labels:
            return as_text(labels[name].get("value", labels[name]))
        if not is_missing(row.get(f"{name}/value")):
            return as_text(row[f"{name}/value"])
    for name in row:
        if name.startswith("expected_") and name.endswith("/value") and not is_missing(row[name]):
            return as_text(row[name])
    return as_text(as_dict(row.get("expectations")) or None)


def _retrieved(row: Mapping[str, Json], trace: dict[str, Json]) -> tuple[str, ...]:
    """What the retriever spans returned."""
    spans = as_list(_nested(row.get("spans"))) or as_list(as_dict(trace.get("data")).get("spans"))
    passages: list[str] = []
    for span in spans:
        attributes = as_dict(as_dict(span).get("attributes"))
        if "RETRIEVER" in as_text(attributes.get("mlflow.spanType")):
            passages += as_contexts(_nested(attributes.get("mlflow.spanOutputs")))
    return tuple(passages)


def _legacy_row(
    row: Mapping[str, Json], number: int, line: int | None, options: ReadOptions
) -> ResultRow:
    checks: list[Check] = []
    for column, value in row.items():
        metric, _, suffix = column.rpartition("/")
        if suffix != "score" or not metric or is_missing(value):
            continue
        name = metric_key(metric)
        score = as_number(value)
        justification = as_text(row.get(f"{metric}/justification"))
        rubric = f"{metric}/justification" in row or (score is not None and score > 1)
        scale = _RUBRIC_SCALE if rubric else (0.0, 1.0)
        checks.append(
            judged_check(
                name=name,
                value=value if as_verdict(value) is None or rubric else score,
                thresholds=options.thresholds,
                reason=justification,
                scale=scale,
                decides=name not in _NOT_QUALITY,
            )
        )
    question = _first(row, ("inputs", "input", "question", "request", "prompt"))
    return ResultRow(
        id=f"row-{number}",
        item=question or f"row-{number}",
        passed=decide(checks),
        checks=tuple(checks),
        input=question,
        output=_first(row, ("outputs", "predictions", "prediction", "response", "output")),
        expected=_first(row, ("targets", "target", "ground_truth", "expected_response")),
        contexts=as_contexts(_nested(row.get("context") or row.get("retrieved_context"))),
        reason=reasons(checks),
        line=line,
    )


def _first(row: Mapping[str, Json], names: Iterable[str]) -> str:
    return next((as_text(row[name]) for name in names if not is_missing(row.get(name))), "")


READER = Reader(
    tool="mlflow",
    title="MLflow",
    files='`result.tables["eval_results"]` as JSONL, JSON or CSV; `eval_results_table.json`',
    how='`result.tables["eval_results"].to_json("mlflow.jsonl", orient="records", lines=True)`',
    recognises=recognises,
    read=read,
    order=15,
)
