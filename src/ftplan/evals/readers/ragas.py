"""ragas: `result.to_pandas()` written as JSON lines, JSON (any pandas orient) or CSV, and the
rows that its experiment backends write.

Every column that is not part of the sample is a metric. ragas has no thresholds: a score in 0..1
passes from 0.5 on unless the user says otherwise, and the run says that this was assumed.
Source: https://docs.ragas.io/en/stable/references/evaluation_schema/ and files written by 0.4.3;
before 0.2 the columns were question, answer, contexts, ground_truth.
"""

from __future__ import annotations

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
    as_number,
    as_text,
    as_verdict,
    decide,
    is_missing,
    metric_key,
)
from ftplan.results import Check, EvalRun, ResultRow

Json = Any
_INPUT = ("user_input", "question")
_OUTPUT = ("response", "answer")
_EXPECTED = ("reference", "ground_truth", "ground_truths")
_CONTEXTS = ("retrieved_contexts", "contexts")
_SAMPLE = {
    *_INPUT, *_OUTPUT, *_EXPECTED, *_CONTEXTS,
    "reference_contexts", "reference_tool_calls", "reference_topics", "rubrics", "rubric",
    "multi_responses", "retrieved_context_ids", "reference_context_ids", "synthesizer_name",
    "persona_name", "query_style", "query_length", "metadata", "episode_done", "evolution_type",
    "id", "index", "name", "experiment_name", "trace_url", "trace_id", "run_id", "error",
}  # fmt: skip
_KNOWN_METRICS = {
    "answer_correctness", "answer_relevancy", "answer_similarity", "answer_accuracy",
    "aspect_critic", "bleu_score", "chrf_score", "context_entity_recall", "context_precision",
    "context_recall", "context_relevancy", "context_utilization", "exact_match",
    "factual_correctness", "faithfulness", "faithfulness_with_hhem", "faithful",
    "id_based_context_precision", "id_based_context_recall",
    "llm_context_precision_with_reference", "llm_context_precision_without_reference",
    "llm_sql_equivalence_with_reference", "noise_sensitivity", "noise_sensitivity_relevant",
    "non_llm_context_precision_with_reference", "non_llm_context_recall",
    "non_llm_string_similarity", "nv_accuracy", "nv_context_relevance",
    "nv_response_groundedness", "response_relevancy", "rouge_score", "semantic_similarity",
    "string_present", "summary_score", "tool_call_accuracy", "tool_call_f1", "topic_adherence",
    "agent_goal_accuracy", "harmfulness", "maliciousness", "coherence", "correctness",
    "conciseness", "response_groundedness",
}  # fmt: skip


def recognises(document: Document) -> bool:
    columns = _columns(document)
    if {"user_input", "response"} <= columns or {"user_input", "retrieved_contexts"} <= columns:
        return True
    if not columns.intersection(_INPUT) or not columns.intersection(_OUTPUT):
        return False
    metrics = {metric_key(column) for column in columns - _SAMPLE}
    return bool(columns.intersection(_CONTEXTS)) and bool(metrics & _KNOWN_METRICS)


def read(document: Document, options: ReadOptions) -> EvalRun:
    found = list(_samples(document))
    metrics = _metric_columns(sample for _, sample in found)
    rows = tuple(
        _row(sample, number, line, metrics, options.thresholds)
        for number, (line, sample) in enumerate(found)
    )
    if not metrics:
        raise document.error(
            "a ragas data set without metrics",
            line=1,
            remedy="write result.to_pandas() of evaluate(), not the data set itself",
        )
    return EvalRun(tool="ragas", rows=rows, notes=threshold_note(rows))


def _samples(document: Document) -> Iterable[tuple[int | None, dict[str, Json]]]:
    if document.table:
        return (
            (line, {key: each for key, each in row.items() if key})  # pandas' unnamed index
            for line, row in document.table_objects()
        )
    oriented = column_oriented(document.value)
    if oriented is not None:
        return ((None, row) for row in oriented)
    return ((line or None, row) for line, row in document.objects)


def _columns(document: Document) -> set[str]:
    first = next(iter(_samples(document)), None)
    return set(map(str, first[1])) if first else set()


def _metric_columns(samples: Iterable[Mapping[str, Json]]) -> tuple[str, ...]:
    """Columns outside of the sample that hold scores or verdicts in some row."""
    seen: dict[str, bool] = {}
    for sample in samples:
        for column, value in sample.items():
            if column in _SAMPLE or not column:
                continue
            scored = as_number(value) is not None or as_verdict(value) is not None
            seen[column] = seen.get(column, False) or scored
    return tuple(
        column for column, scored in seen.items() if scored or metric_key(column) in _KNOWN_METRICS
    )


def _row(
    sample: dict[str, Json],
    number: int,
    line: int | None,
    metrics: tuple[str, ...],
    thresholds: Mapping[str, float],
) -> ResultRow:
    checks = tuple(
        _check(metric, sample.get(metric), sample, thresholds)
        for metric in metrics
        if metric in sample
    )
    question = _first(sample, _INPUT)
    given = sample.get("id")
    error = sample.get("error")
    crashed = as_text(error) if not is_missing(error) else all_crashed(checks)
    return ResultRow(
        id=as_text(given) if not is_missing(given) else f"row-{number}",
        item=as_text(given) if not is_missing(given) else question or f"row-{number}",
        passed=None if crashed else decide(checks),
        checks=checks,
        input=question,
        output=_first(sample, _OUTPUT),
        expected=_first(sample, _EXPECTED),
        contexts=next(
            (as_contexts(sample[name]) for name in _CONTEXTS if not is_missing(sample.get(name))),
            (),
        ),
        error=crashed,
        line=line,
    )


def _check(
    metric: str, value: Json, sample: Mapping[str, Json], thresholds: Mapping[str, float]
) -> Check:
    if is_missing(value):
        return Check(name=metric, error="not computed (NaN): the judge failed or timed out")
    reason = next(
        (as_text(sample[name]) for name in (f"{metric}_reason", f"{metric}_reasoning")
         if name in sample),
        "",
    )  # fmt: skip
    return judged_check(name=metric, value=value, thresholds=thresholds, reason=reason)


def _first(sample: Mapping[str, Json], names: Iterable[str]) -> str:
    for name in names:
        value = sample.get(name)
        if not is_missing(value):
            return as_text(python_literal(value) if isinstance(value, str) else value)
    return ""


READER = Reader(
    tool="ragas",
    title="Ragas",
    files="`*.jsonl`, `*.json`, `*.csv` written from `result.to_pandas()`",
    how='`result.to_pandas().to_json("ragas.jsonl", orient="records", lines=True)`',
    recognises=recognises,
    read=read,
    order=20,
)
