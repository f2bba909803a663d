"""Any CSV, JSON or JSONL file of rows: LangSmith, Braintrust, Phoenix exports, your own script.

Columns are found by their usual names, or named by the user (`--columns input=question`); a dot
walks into nested objects (`passed=feedback.correct`). A file in which nothing says whether a row
passed is refused with the list of its columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ftplan.evals.document import Document
from ftplan.evals.options import ReadOptions
from ftplan.evals.readers import Reader
from ftplan.evals.scores import judged_check, threshold_note
from ftplan.evals.tables import column_oriented
from ftplan.evals.values import (
    as_contexts,
    as_dict,
    as_list,
    as_number,
    as_text,
    as_verdict,
    decide,
    is_missing,
    snake,
)
from ftplan.results import Check, EvalRun, ResultRow

Json = Any
FIELDS: dict[str, tuple[str, ...]] = {
    "id": ("id", "example_id", "reference_example_id", "case_id", "test_id", "item_id", "key",
           "sample_id", "run_id", "span_id"),
    "input": ("input", "inputs", "question", "prompt", "query", "user_input", "instruction",
              "request", "attributes.input.value"),
    "output": ("output", "outputs", "answer", "response", "completion", "prediction", "predicted",
               "actual", "actual_output", "model_output", "generated", "generation",
               "attributes.output.value"),
    "expected": ("expected", "expected_output", "reference", "reference_output",
                 "reference_outputs", "target", "gold", "ground_truth", "ideal", "label",
                 "correct_answer"),
    "passed": ("passed", "pass", "success", "correct", "is_correct", "ok", "verdict", "result",
               "outcome", "grade", "match", "status"),
    "score": ("score", "scores", "rating", "accuracy", "feedback", "feedback_stats",
              "evaluations", "metrics"),
    "reason": ("reason", "explanation", "rationale", "comment", "feedback_comment", "critique",
               "justification"),
    "contexts": ("contexts", "context", "retrieved_contexts", "documents", "passages",
                 "retrieval_context", "source_documents"),
    "error": ("error", "exception", "error_message"),
    "kind": ("kind", "failure_kind", "failure_type"),
    "description": ("description", "name", "title"),
}  # fmt: skip
"""Field of a row -> column names by which it is found, likeliest first."""
_ERROR_STATES = {"error", "errored", "exception", "timeout", "crashed"}


def recognises(document: Document) -> bool:
    """Anything with rows; asked last."""
    return any(True for _ in _rows(document))


def read(document: Document, options: ReadOptions) -> EvalRun:
    found = list(_rows(document))
    columns = _columns(document, [row for _, row in found], options)
    if not columns.keys() & {"passed", "score", "kind", "error"}:
        names = ", ".join(sorted({str(key) for _, row in found[:20] for key in row})[:30])
        raise document.error(
            f"not a result file of a known tool, and no column says whether a row passed: {names}",
            remedy="name the columns, for example --columns passed=COLUMN or --columns "
            "score=COLUMN (also input, output, expected, contexts, reason, error, id, kind)",
        )
    rows = tuple(
        _row(row, number, line, columns, options) for number, (line, row) in enumerate(found)
    )
    return EvalRun(tool="table", rows=rows, notes=threshold_note(rows))


def _rows(document: Document) -> Iterable[tuple[int | None, dict[str, Json]]]:
    if document.table:
        return document.table_objects()
    oriented = column_oriented(document.value)
    if oriented is not None:
        return ((None, row) for row in oriented)
    if isinstance(document.value, dict):
        for name in ("results", "rows", "data", "examples", "samples", "items", "records"):
            listed = document.value.get(name)
            if isinstance(listed, list) and listed and all(isinstance(r, dict) for r in listed):
                return ((None, row) for row in listed)
    return ((line or None, row) for line, row in document.objects)


def _columns(
    document: Document, rows: list[dict[str, Json]], options: ReadOptions
) -> dict[str, str]:
    """Field -> column path: the user's, else the first usual name that some row has."""
    present: dict[str, str] = {}
    for row in rows:
        for key in row:
            present.setdefault(snake(str(key)).strip().replace(" ", "_"), str(key))
    columns: dict[str, str] = {}
    for name, path in options.columns.items():
        if name not in FIELDS:
            raise document.error(
                f"--columns: {name!r} is no field of a row",
                remedy=f"the fields are {', '.join(FIELDS)}",
            )
        if not any(_walk(row, path) is not None for row in rows):
            raise document.error(
                f"--columns: no row has a column {path!r}",
                remedy=f"the columns are {', '.join(list(present.values())[:30])}",
            )
        columns[name] = path
    taken = set(columns.values())
    for name, usual in FIELDS.items():
        if name in columns:
            continue
        for candidate in usual:
            column = present.get(candidate.partition(".")[0])
            if column is None or column in taken:
                continue
            path = column if "." not in candidate else candidate
            if name == "passed" and not _judges(candidate, [_walk(row, path) for row in rows]):
                continue
            if any(_walk(row, path) is not None for row in rows):
                columns[name] = path
                taken.add(column)
                break
    return columns


def _judges(candidate: str, values: list[Json]) -> bool:
    """Whether a column holds verdicts on answers.

    `status: success` beside `status: error` says whether the program ran, not whether the answer
    was right: a status column judges where it says pass or fail.
    """
    words = {as_text(value).strip().lower() for value in values}
    if candidate == "status":
        return bool(words & {"pass", "passed", "fail", "failed", "failure"})
    return any(as_verdict(value) is not None for value in values) or bool(words & _ERROR_STATES)


def _walk(row: Mapping[str, Json], path: str) -> Json:
    """The value at a dotted path; a key that itself has dots is found first."""
    if path in row:
        return row[path]
    value: Json = row
    for part in path.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict):
            value = value.get(part)
        else:
            return None
    return value


def _row(
    row: dict[str, Json],
    number: int,
    line: int | None,
    columns: Mapping[str, str],
    options: ReadOptions,
) -> ResultRow:
    def cell(name: str) -> Json:
        return _walk(row, columns[name]) if name in columns else None

    def text(name: str) -> str:
        value = cell(name)
        return "" if is_missing(value) else as_text(value)

    checks = tuple(_checks(cell("score"), columns.get("score", "score"), text("reason"), options))
    verdict = cell("passed")
    passed = as_verdict(verdict)
    error = text("error")
    state = as_text(row.get("status")).strip().lower()
    if not error and state in _ERROR_STATES:
        error = text("reason") or state
    if not error and as_text(verdict).strip().lower() in _ERROR_STATES:
        error = text("reason") or as_text(verdict)
    if passed is None and not is_missing(verdict) and as_number(verdict) is not None:
        checks = (
            judged_check(name=columns["passed"], value=verdict, thresholds=options.thresholds),
            *checks,
        )
    if passed is None and not error:
        passed = decide(checks)
    if passed is None and text("kind") and not error:
        passed = False  # someone already named what is wrong with this row
    return ResultRow(
        id=text("id") or f"row-{number}",
        item=text("id") or text("input") or f"row-{number}",
        passed=None if error else passed,
        checks=checks,
        input=text("input"),
        output=text("output"),
        expected=text("expected"),
        contexts=as_contexts(cell("contexts")),
        reason=text("reason"),
        error=error,
        description=text("description"),
        kind=text("kind") if passed is False else "",
        line=line,
    )


def _checks(value: Json, name: str, reason: str, options: ReadOptions) -> Iterable[Check]:
    """Checks from one score, from a mapping metric -> score, or from a list of named scores."""
    if isinstance(value, dict):
        for metric, each in value.items():
            fields = as_dict(each)
            score = fields.get("score", fields.get("value", fields.get("avg"))) if fields else each
            if not is_missing(score):
                yield judged_check(
                    name=as_text(metric),
                    value=score,
                    thresholds=options.thresholds,
                    reason=as_text(
                        fields.get("explanation") or fields.get("comment") or fields.get("reason")
                    ),
                )
        return
    if isinstance(value, list):
        for each in as_list(value):
            fields = as_dict(each)
            score = fields.get("score", fields.get("value"))
            if not is_missing(score):
                metric = as_text(fields.get("name") or fields.get("key")) or name
                why = as_text(fields.get("explanation") or fields.get("comment"))
                yield judged_check(
                    name=metric, value=score, thresholds=options.thresholds, reason=why
                )
        return
    if not is_missing(value):
        yield judged_check(name=name, value=value, thresholds=options.thresholds, reason=reason)


READER = Reader(
    tool="table",
    title="CSV, JSON or JSONL of rows",
    files="any `.csv`, `.json`, `.jsonl` with a row per answer",
    how="exports of LangSmith, Braintrust, Phoenix, or your own: "
    "`--columns input=question,output=answer,passed=ok`",
    recognises=recognises,
    read=read,
    order=100,
)
