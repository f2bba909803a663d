"""Scores without a threshold of their own: when they pass, and when ftplan will not say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ftplan.evals.values import as_number, as_text, as_verdict, metric_key, threshold_for
from ftplan.results import Check, ResultRow

__all__ = ["DEFAULT_THRESHOLD", "judged_check", "lower_is_better", "threshold_note"]

Json = Any
DEFAULT_THRESHOLD = 0.5
"""The middle of a 0..1 scale, for tools that have no thresholds; always flagged."""

_LOWER_IS_BETTER = {
    "noise_sensitivity", "noise_sensitivity_relevant", "noise_sensitivity_irrelevant",
    "hallucination", "bias", "toxicity", "harmfulness", "maliciousness", "harmful_content",
    "error_rate", "word_error_rate", "wer", "cer", "ter", "perplexity", "word_perplexity",
    "byte_perplexity", "bits_per_byte", "brier_score", "latency", "cost",
}  # fmt: skip


def lower_is_better(metric: str) -> bool:
    """Whether a small score of this metric is the good one."""
    return metric_key(metric) in _LOWER_IS_BETTER


def judged_check(
    *,
    name: str,
    value: Json,
    thresholds: Mapping[str, float],
    reason: str = "",
    scale: tuple[float, float] = (0.0, 1.0),
    signal: str = "",
    decides: bool = True,
) -> Check:
    """A check from a bare value: a verdict as it is, a score against a threshold.

    The threshold is the user's, else the middle of ``scale``, marked as assumed. A score outside
    of the scale is shown without a verdict: its scale is not known.
    """
    score = as_number(value)
    given = threshold_for(name, thresholds)
    verdict = as_verdict(value)
    common: dict[str, Any] = {
        "name": name, "signal": signal, "reason": reason, "score": score, "decides": decides,
    }  # fmt: skip
    low, high = scale
    lower = lower_is_better(name)
    if given is not None and score is not None:
        passed = score <= given if lower else score >= given
        return Check(**common, passed=passed, threshold=given)
    if verdict is not None and (score is None or isinstance(value, bool)):
        bad_if_true = lower and isinstance(value, bool)
        return Check(**common, passed=verdict is not bad_if_true)
    if score is None:
        return Check(**(common | {"reason": reason or as_text(value)}))
    if not low <= score <= high:
        return Check(**common)
    middle = (low + high) / 2
    passed = score <= middle if lower else score >= middle
    return Check(**common, passed=passed, threshold=middle, threshold_assumed=True)


def threshold_note(rows: Iterable[ResultRow]) -> tuple[str, ...]:
    """One note that names the metrics whose threshold was assumed."""
    assumed: dict[str, float] = {}
    unjudged: dict[str, None] = {}
    for row in rows:
        for check in row.checks:
            if check.threshold_assumed and check.threshold is not None:
                assumed[check.name] = check.threshold
            elif check.passed is None and check.score is not None and check.decides:
                unjudged[check.name] = None
    notes = []
    if assumed:
        named = ", ".join(f"{name} {value:g}" for name, value in sorted(assumed.items()))
        notes.append(
            f"the tool has no thresholds: passing was assumed at {named}; "
            "say --threshold METRIC=VALUE"
        )
    if unjudged:
        notes.append(
            f"scores on a scale of their own were not judged: {', '.join(sorted(unjudged))}; "
            "say --threshold METRIC=VALUE"
        )
    return tuple(notes)
