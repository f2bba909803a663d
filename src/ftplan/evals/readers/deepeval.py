"""deepeval: `test_run_<time>.json` of `DEEPEVAL_RESULTS_FOLDER`, `.deepeval/.latest_test_run.json`
(the same under `testRunData`), and a dumped `EvaluationResult` (`test_results[]`, snake case).

Versions differ in case (`metricsData`, `metrics_data`) and, before 1.0, in the name of the list
(`metricsMetadata` with `metric`). `flaky` metrics never decide.
Source: https://deepeval.com/docs/evaluation-introduction and files written by 4.3.1.
"""

from __future__ import annotations

from typing import Any

from ftplan.evals.document import Document
from ftplan.evals.options import ReadOptions
from ftplan.evals.readers import Reader
from ftplan.evals.values import (
    as_contexts,
    as_list,
    as_number,
    as_text,
    as_verdict,
    decide,
    reasons,
    snake_keys,
)
from ftplan.results import Check, EvalRun, ResultRow

Json = Any
_LISTS = ("test_cases", "conversational_test_cases", "test_results", "test_cases_mllm")


def recognises(document: Document) -> bool:
    run = _run(document)
    cases = _cases(run)
    if any("metrics_data" in each or "metrics_metadata" in each for each in cases[:20]):
        return True
    return "test_cases" in run and ("metrics_scores" in run or "test_passed" in run)


def read(document: Document, options: ReadOptions) -> EvalRun:
    run = _run(document)
    rows = tuple(_row(case, number) for number, case in enumerate(_cases(run)))
    return EvalRun(tool="deepeval", version=as_text(run.get("deepeval_version")), rows=rows)


def _run(document: Document) -> dict[str, Json]:
    run = snake_keys(document.value)
    return snake_keys(run["test_run_data"]) if "test_run_data" in run else run


def _cases(run: dict[str, Json]) -> list[dict[str, Json]]:
    return [
        snake_keys(case)
        for name in _LISTS
        for case in as_list(run.get(name))
        if isinstance(case, dict)
    ]


def _row(case: dict[str, Json], number: int) -> ResultRow:
    metrics = as_list(case.get("metrics_data") or case.get("metrics_metadata"))
    checks = tuple(_check(snake_keys(metric)) for metric in metrics if isinstance(metric, dict))
    turns = [snake_keys(turn) for turn in as_list(case.get("turns"))]
    asked, answered = _conversation(turns)
    passed = as_verdict(case.get("success"))
    if passed is None:
        passed = decide(checks)
    crashed = [check.error for check in checks if check.error]
    nothing_judged = bool(crashed) and not any(
        check.passed is not None and not check.error for check in checks
    )
    wholly = as_text(case.get("error")) or (crashed[0] if nothing_judged else "")
    if crashed and not wholly and passed is False:
        # success is false when a metric crashed: only metrics that ran can fail the answer
        passed = decide(check for check in checks if not check.error)
    name = as_text(case.get("name") or case.get("id")) or f"test_case_{number}"
    question = as_text(case.get("input")) or asked
    return ResultRow(
        id=name,
        item=question or name,
        passed=None if wholly else passed,
        checks=checks,
        input=question,
        output=as_text(case.get("actual_output")) or answered,
        expected=as_text(case.get("expected_output") or case.get("expected_outcome")),
        contexts=as_contexts(case.get("retrieval_context") or case.get("context")),
        reason=reasons(checks),
        error=wholly,
        description=as_text(case.get("scenario") or case.get("comments")),
    )


def _check(metric: dict[str, Json]) -> Check:
    error = as_text(metric.get("error"))
    score = as_number(metric.get("score"))
    least = metric.get("threshold", metric.get("minimum_score"))
    threshold = as_number(least)
    passed = as_verdict(metric.get("success"))
    if "success" not in metric and score is not None and threshold is not None:
        passed = score >= threshold  # before 0.20 only the least passing score was written
    return Check(
        name=as_text(metric.get("name") or metric.get("metric")) or "metric",
        passed=None if error else passed,
        score=score,
        threshold=threshold,
        reason=as_text(metric.get("reason")),
        error=error,
        decides=metric.get("flaky") is not True,
    )


def _conversation(turns: list[dict[str, Json]]) -> tuple[str, str]:
    """(all but the last answer, the last answer) of a conversational case."""
    lines: list[str] = []
    for turn in turns:
        if "actual_output" in turn:  # before 3.0 a turn was a test case of its own
            lines += [f"user: {as_text(turn.get('input'))}"]
            lines += [f"assistant: {as_text(turn['actual_output'])}"]
        else:
            lines += [f"{as_text(turn.get('role'))}: {as_text(turn.get('content'))}"]
    if not lines:
        return "", ""
    return "\n".join(lines[:-1]), lines[-1].removeprefix("assistant: ")


READER = Reader(
    tool="deepeval",
    title="DeepEval",
    files="`test_run_*.json`, `.deepeval/.latest_test_run.json`",
    how="`export DEEPEVAL_RESULTS_FOLDER=results` before `deepeval test run`, or pass "
    "`.deepeval/.latest_test_run.json`, which is always written",
    recognises=recognises,
    read=read,
    order=10,
)
