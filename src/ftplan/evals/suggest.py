"""From failing checks to a suggested failure kind: what the checks say, and no more.

The mapping is data (``data/signals.json``). Three rules hold over all rows of it:

- upstream wins: a passage that was not retrieved explains an unfaithful answer, not the other way
  round, so the row with the smallest ``order`` decides;
- a wrong answer alone has no cause: correctness never suggests a kind;
- operational limits (latency, cost) are suggested only where nothing calls the answer wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources

from ftplan.dataclass import dataclass
from ftplan.evals.values import metric_key
from ftplan.results import Check, ResultRow, Suggestion

__all__ = ["Signal", "signal_of", "signals", "suggest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """A group of metrics that mean the same when they fail."""

    group: str
    kind: str
    """Suggested failure kind; empty where the metric alone allows none."""
    failure_class: str
    order: int
    """Position in the chain of causes: the smallest wins."""
    evidence: str
    """upstream, generation, operational, correctness or unmapped."""
    why: str
    ask: str
    """The test or question that would settle it."""
    metrics: tuple[str, ...]


@cache
def signals() -> tuple[Signal, ...]:
    """The mapping, in the order in which causes are upstream of each other."""
    text = resources.files("ftplan.evals").joinpath("data/signals.json").read_text("utf-8")
    rows = [
        Signal(
            group=row["group"],
            kind=row["kind"],
            failure_class=row["class"],
            order=row["order"],
            evidence=row["evidence"],
            why=row["why"],
            ask=row["ask"],
            metrics=tuple(row["metrics"]),
        )
        for row in json.loads(text)["signals"]
    ]
    return tuple(sorted(rows, key=lambda signal: signal.order))


@cache
def _by_metric() -> tuple[Mapping[str, Signal], tuple[tuple[str, Signal], ...]]:
    exact: dict[str, Signal] = {}
    prefixes: list[tuple[str, Signal]] = []
    for signal in signals():
        for metric in signal.metrics:
            if metric.endswith("*"):
                prefixes.append((metric.removesuffix("*"), signal))
            else:
                exact[metric] = signal
    return exact, tuple(prefixes)


def signal_of(name: str) -> Signal | None:
    """What a metric or assertion of this name means when it fails, or None: not in the mapping.

    A name in brackets names a judge with its own rubric (`Correctness [GEval]`): the rubric
    decides what it means, so the name does not.
    """
    exact, prefixes = _by_metric()
    key = metric_key(name)
    if "geval" in key or "g_eval" in key:
        return exact["g_eval"]
    if key in exact:
        return exact[key]
    for prefix, signal in prefixes:
        if key.startswith(prefix):
            return signal
    return None


def _meaning(check: Check) -> Signal | None:
    """The check's type says more than the name that a user gave it."""
    return (signal_of(check.signal) if check.signal else None) or signal_of(check.name)


def suggest(row: ResultRow, overrides: Mapping[str, str] | None = None) -> Suggestion:
    """The kind that the failing checks of a row suggest.

    ``overrides`` maps a check's name or type to a kind and precedes the mapping.
    """
    if row.error:
        return Suggestion(kind="infrastructure_error", checks=(), reason=row.error)
    if row.kind:
        return Suggestion(kind=row.kind, checks=(), reason="the file names it")
    failing = row.failing_checks
    if not failing:
        return Suggestion(kind=None, checks=(), reason=row.reason or "no check says what is wrong")
    for check in failing:
        chosen = _override(check, overrides or {})
        if chosen:
            return Suggestion(kind=chosen, checks=(check.name,), reason="your mapping")
    strict = _strict_filter_only(row)
    if strict:
        return Suggestion(
            kind="wrong_format",
            checks=(strict.name,),
            reason="the strict filter does not find the answer that the flexible one does",
            ask="does stating the form in the prompt fix it?",
        )
    return _by_mapping(row, failing)


def _override(check: Check, overrides: Mapping[str, str]) -> str:
    keys = {metric_key(name): kind for name, kind in overrides.items()}
    return keys.get(metric_key(check.name)) or keys.get(metric_key(check.signal), "")


def _strict_filter_only(row: ResultRow) -> Check | None:
    """lm-evaluation-harness: the same metric under a strict filter fails, a flexible one passes."""
    flexible = {
        check.signal
        for check in row.checks
        if check.passed and "flexible" in check.name.rpartition(",")[2]
    }
    for check in row.failing_checks:
        if check.signal in flexible and "strict" in check.name.rpartition(",")[2]:
            return check
    return None


def _by_mapping(row: ResultRow, failing: tuple[Check, ...]) -> Suggestion:
    meanings: list[tuple[Signal, Check]] = []
    unknown: list[Check] = []
    for check in failing:
        signal = _meaning(check)
        if signal is None:
            unknown.append(check)
        else:
            meanings.append((signal, check))
    meanings.sort(key=lambda pair: pair[0].order)
    groups = {signal.group for signal, _ in meanings}
    quality_failed = bool(unknown) or any(
        signal.evidence != "operational" for signal, _ in meanings
    )
    for signal, check in meanings:
        if not signal.kind:
            continue
        if signal.evidence == "operational" and quality_failed:
            continue
        if signal.group == "relevancy" and "correctness" in groups:
            continue  # "irrelevant but correct" needs facts that nothing calls wrong
        reason = signal.why + _recall_caveat(signal, row)
        return Suggestion(kind=signal.kind, checks=(check.name,), reason=reason, ask=signal.ask)
    return _without_kind(row, meanings, unknown)


def _recall_caveat(signal: Signal, row: ResultRow) -> str:
    """Downstream kinds assume that retrieval was right: say when nobody measured that."""
    if signal.group not in ("retrieval_precision", "faithfulness"):
        return ""
    if _passes(row, "retrieval_recall"):
        return ""
    return " (retrieval recall was not measured: a missing passage would explain it too)"


def _passes(row: ResultRow, group: str) -> bool:
    return any(
        check.passed and (signal := _meaning(check)) is not None and signal.group == group
        for check in row.checks
    )


def _without_kind(
    row: ResultRow, meanings: list[tuple[Signal, Check]], unknown: list[Check]
) -> Suggestion:
    names = tuple(check.name for _, check in meanings) + tuple(check.name for check in unknown)
    correctness = any(signal.evidence == "correctness" for signal, _ in meanings)
    if correctness and _passes(row, "retrieval_recall") and _passes(row, "faithfulness"):
        return Suggestion(
            kind=None,
            checks=names,
            reason="wrong, though the passages were there and the answer keeps to them: the "
            "reference or the reasoning",
            ask="is the reference right (label audit)? does a larger model get it right?",
        )
    if meanings:
        signal = meanings[0][0]
        return Suggestion(kind=None, checks=names, reason=signal.why, ask=signal.ask)
    reasons = "; ".join(check.reason for check in unknown if check.reason)
    return Suggestion(
        kind=None,
        checks=names,
        reason=reasons or "these checks are not in the mapping",
        ask="read it and label it by hand",
    )
