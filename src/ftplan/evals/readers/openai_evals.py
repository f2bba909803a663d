"""OpenAI evals: the record of `oaieval` (JSON lines of events) and the Evals API's list of output
items.

The record's first line is `{"spec": ...}`, its last `{"final_report": ...}`; events between are
joined on `sample_id`. A sample passes when all its `match` events are correct; without them its
`metrics` events decide.
Source: https://github.com/openai/evals (evals/record.py), files written by 3.0.1, and
https://platform.openai.com/docs/api-reference/evals/run-output-item-object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftplan.evals.document import Document
from ftplan.evals.options import ReadOptions
from ftplan.evals.readers import Reader
from ftplan.evals.scores import judged_check, threshold_note
from ftplan.evals.values import (
    as_contexts,
    as_dict,
    as_list,
    as_number,
    as_text,
    as_verdict,
    decide,
)
from ftplan.results import Aggregate, Check, EvalRun, ResultRow

Json = Any
Event = tuple[int | None, dict[str, Json]]
_CHOICES = {"Y": True, "Yes": True, "N": False, "No": False}
_STATUSES = {"pass": True, "passed": True, "fail": False, "failed": False}


def recognises(document: Document) -> bool:
    return bool(_items(document)) or _is_record(document)


def read(document: Document, options: ReadOptions) -> EvalRun:
    items = _items(document)
    if items:
        rows = tuple(_item_row(item, number) for number, item in enumerate(items))
        more = as_dict(document.value).get("has_more") is True
        notes = ("only one page of output items: has_more is true",) if more else ()
        return EvalRun(tool="openai-evals", rows=rows, notes=notes)
    return _read_record(document, options)


def _items(document: Document) -> list[dict[str, Json]]:
    listed = as_list(as_dict(document.value).get("data"))
    found = [each for each in listed if isinstance(each, dict)] or [
        each for _, each in document.objects
    ]
    return [
        each
        for each in found
        if each.get("object") == "eval.run.output_item"
        or ("datasource_item" in each and ("results" in each or "status" in each))
    ]


def _is_record(document: Document) -> bool:
    head = [each for _, each in document.objects[:5]]
    if head and isinstance(head[0].get("spec"), dict) and "eval_name" in head[0]["spec"]:
        return True
    return any({"event_id", "sample_id", "type", "data"} <= each.keys() for each in head)


def _read_record(document: Document, options: ReadOptions) -> EvalRun:
    samples: dict[str, list[Event]] = {}
    report: dict[str, Json] = {}
    task = ""
    for line, event in document.objects:
        if "spec" in event:
            task = as_text(as_dict(event["spec"]).get("eval_name"))
        report = as_dict(event.get("final_report")) or report
        if "sample_id" in event and event["sample_id"] is not None:
            samples.setdefault(as_text(event["sample_id"]), []).append((line or None, event))
    rows = tuple(_sample_row(name, events, options) for name, events in samples.items())
    notes = list(threshold_note(rows))
    if not report:
        notes.append("the record has no final report: the run was interrupted")
    aggregates = tuple(
        Aggregate(task=task, metric=as_text(name), value=number)
        for name, value in report.items()
        if (number := as_number(value)) is not None and not isinstance(value, str)
    )
    return EvalRun(
        tool="openai-evals", rows=rows, notes=tuple(notes), aggregates=() if rows else aggregates
    )


def _sample_row(name: str, events: list[Event], options: ReadOptions) -> ResultRow:
    data: dict[str, list[dict[str, Json]]] = {}
    for _, event in events:
        data.setdefault(as_text(event.get("type")), []).append(as_dict(event.get("data")))
    sampled = (data.get("sampling") or data.get("raw_sample") or [{}])[0]
    matches = data.get("match", [])
    checks = [_match_check(match) for match in matches]
    for metrics in data.get("metrics", []):
        checks += _metric_checks(metrics, options, decides=not matches)
    judged = any(check.passed is not None for check in checks)
    errors = data.get("error", [])
    error = ""
    if errors and not judged:
        error = as_text(errors[0].get("message") or errors[0].get("error") or errors[0]) or "error"
    match = matches[0] if matches else {}
    prompt = as_text(sampled.get("prompt") or match.get("prompt"))
    return ResultRow(
        id=name,
        item=name,
        passed=None if error else decide(checks),
        checks=tuple(checks),
        input=prompt,
        output=as_text(sampled.get("sampled") or match.get("sampled") or match.get("picked")),
        expected=_expected(match),
        error=error,
        line=events[0][0],
    )


def _match_check(match: dict[str, Json]) -> Check:
    picked = as_text(match.get("picked"))
    correct = as_verdict(match.get("correct"))
    return Check(
        name="match",
        passed=correct,
        score=None if correct is None else float(correct),
        reason=f"picked {picked}" if picked and correct is False else "",
    )


def _metric_checks(
    metrics: Mapping[str, Json], options: ReadOptions, *, decides: bool
) -> list[Check]:
    checks = []
    for name, value in metrics.items():
        if name == "choice":  # a model-graded eval: the grader's letter
            checks.append(
                Check(name=name, passed=_CHOICES.get(as_text(value)), reason=as_text(value))
            )
        elif as_number(value) is not None and not isinstance(value, str):
            checks.append(
                judged_check(
                    name=as_text(name), value=value, thresholds=options.thresholds, decides=decides
                )
            )
    return checks


def _expected(match: Mapping[str, Json]) -> str:
    expected = match.get("expected")
    if isinstance(expected, list):
        return " | ".join(as_text(each) for each in expected)
    return as_text(expected)


def _item_row(item: dict[str, Json], number: int) -> ResultRow:
    sample = as_dict(item.get("sample"))
    checks = tuple(_result_check(as_dict(each)) for each in as_list(item.get("results")))
    status = as_text(item.get("status")).lower()
    failed = as_dict(sample.get("error"))
    error = ""
    if any(failed.values()) or status in ("error", "errored"):
        error = as_text(failed.get("message") or failed.get("code")) or "error"
    passed = _STATUSES.get(status)
    source = as_dict(item.get("datasource_item"))
    nested = as_dict(source.get("item")) or source
    question = as_text(sample.get("input")) or as_text(
        nested.get("input") or nested.get("question") or nested or None
    )
    position = item.get("datasource_item_id")
    return ResultRow(
        id=as_text(item.get("id")) or f"item-{number}",
        item=as_text(nested) or (as_text(position) if position is not None else f"item-{number}"),
        passed=None if error else (decide(checks) if passed is None else passed),
        checks=checks,
        input=question,
        output=as_text(sample.get("output")),
        expected=as_text(
            nested.get("expected")
            or nested.get("reference")
            or nested.get("ground_truth")
            or nested.get("correct_label")
            or nested.get("label")
            or nested.get("answer")
            or nested.get("ideal")
        ),
        contexts=as_contexts(nested.get("context") or nested.get("contexts")),
        error=error,
    )


def _result_check(result: dict[str, Json]) -> Check:
    name = as_text(result.get("name")) or as_text(result.get("type")) or "grader"
    grader = as_dict(result.get("sample"))
    crashed = as_dict(grader.get("error"))
    error = as_text(crashed.get("message")) if any(crashed.values()) else ""
    return Check(
        name=name,
        signal=as_text(result.get("type")),
        passed=None if error else as_verdict(result.get("passed")),
        score=as_number(result.get("score")),
        threshold=as_number(result.get("threshold")),
        reason=as_text(grader.get("output")),
        error=error,
    )


READER = Reader(
    tool="openai-evals",
    title="OpenAI evals",
    files="the JSONL record of `oaieval`; a JSON list of Evals API output items",
    how="`oaieval gpt-x my-eval --record_path record.jsonl`, or the response of "
    "`client.evals.runs.output_items.list(...)` as JSON",
    recognises=recognises,
    read=read,
    order=10,
)
