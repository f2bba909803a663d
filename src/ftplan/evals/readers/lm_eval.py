"""lm-evaluation-harness: `samples_<task>_<time>.jsonl` (one line per document *and filter*) and
`results_<time>.json` (numbers over tasks, no rows).

A document is one row however many filters scored it. Metrics that count right answers pass at 1;
continuous ones in 0..1 get the flagged default. `acc_norm` and its kin score the same answer as
`acc` in another way, so beside `acc` they are shown and do not decide.
Source: https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/interface.md and files
written by 0.4.13.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ftplan.evals.document import Document
from ftplan.evals.options import ReadOptions
from ftplan.evals.readers import Reader
from ftplan.evals.scores import judged_check, threshold_note
from ftplan.evals.values import (
    as_dict,
    as_list,
    as_number,
    as_text,
    decide,
    metric_key,
    threshold_for,
)
from ftplan.results import Aggregate, Check, EvalRun, ResultRow

Json = Any
_EXACT = {
    "acc", "acc_norm", "acc_mutual_info", "acc_bytes", "exact_match", "em", "exact",
    "pass@1", "pass_at_1", "prompt_level_strict_acc", "prompt_level_loose_acc",
    "inst_level_strict_acc", "inst_level_loose_acc", "mc1", "contains", "quasi_exact_match",
}  # fmt: skip
"""Per document these are 0 or 1 (or a list of them): right means 1."""
_SECOND_OPINION = {
    "acc_norm": "acc", "acc_mutual_info": "acc", "acc_bytes": "acc", "mc2": "mc1",
    "inst_level_strict_acc": "prompt_level_strict_acc",
    "prompt_level_loose_acc": "prompt_level_strict_acc",
    "inst_level_loose_acc": "prompt_level_strict_acc",
    "f1": "exact_match",
}  # fmt: skip
_CORE = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps"}
_KEYS = _CORE | {
    "filter", "metrics", "doc_hash", "prompt_hash", "target_hash", "task_name", "task",
}  # fmt: skip


def recognises(document: Document) -> bool:
    return _is_results(document.value) or any(
        "doc_id" in each and ("resps" in each or "filtered_resps" in each)
        for _, each in document.objects[:5]
    )


def read(document: Document, options: ReadOptions) -> EvalRun:
    if _is_results(document.value):
        return _read_results(document)
    groups: dict[tuple[str, str], list[tuple[int | None, dict[str, Json]]]] = {}
    for line, sample in document.objects:
        if "doc_id" not in sample:
            continue
        task = as_text(sample.get("task_name") or sample.get("task"))
        groups.setdefault((task, as_text(sample["doc_id"])), []).append((line or None, sample))
    rows = tuple(_row(task, name, group, options) for (task, name), group in groups.items())
    return EvalRun(tool="lm-evaluation-harness", rows=rows, notes=threshold_note(rows))


def _is_results(value: Json) -> bool:
    run = as_dict(value)
    tasks = as_dict(run.get("results"))
    return bool(tasks) and (
        "lm_eval_version" in run
        or "n-shot" in run
        or ("configs" in run and "versions" in run)
        or ("config" in run and "versions" in run)
    )


def _row(
    task: str, name: str, group: list[tuple[int | None, dict[str, Json]]], options: ReadOptions
) -> ResultRow:
    line, first = group[0]
    several = len({as_text(sample.get("filter")) for _, sample in group}) > 1
    checks = tuple(
        check
        for _, sample in group
        for check in _checks(sample, options.thresholds, filter_shown=several)
    )
    prefix = f"{task}/" if task else ""
    digest = as_text(first.get("doc_hash"))
    return ResultRow(
        id=f"{prefix}{name}",
        item=f"{prefix}{digest or name}",
        passed=decide(checks),
        checks=checks,
        input=_prompt(first),
        output=_answer(first),
        expected=_target(first),
        line=line,
        variant="",
    )


def _checks(
    sample: Mapping[str, Json], thresholds: Mapping[str, float], *, filter_shown: bool
) -> Iterable[Check]:
    named = [as_text(each) for each in as_list(sample.get("metrics"))]
    metrics = [name for name in named if name in sample] or [
        str(key) for key, value in sample.items()
        if key not in _KEYS and as_number(value) is not None
    ]  # fmt: skip
    for metric in metrics:
        filtered = as_text(sample.get("filter"))
        label = f"{metric},{filtered}" if filter_shown else metric
        decides = _SECOND_OPINION.get(metric) not in metrics
        value = sample[metric]
        if isinstance(value, list) and value and all(as_number(each) is not None for each in value):
            value = min(as_number(each) or 0.0 for each in value)  # every instruction followed
        score = as_number(value)
        given = threshold_for(metric, thresholds)
        if metric_key(metric) in _EXACT and score is not None and given is None:
            yield Check(
                name=label, signal=metric, passed=score >= 1, score=score, threshold=1.0,
                decides=decides,
            )  # fmt: skip
        else:
            known = {label: given} if given is not None else {}
            check = judged_check(
                name=label, signal=metric, value=value, thresholds=known, decides=decides
            )
            yield check


def _prompt(sample: Mapping[str, Json]) -> str:
    arguments = sample.get("arguments")
    if isinstance(arguments, dict):
        first = as_dict(next(iter(arguments.values()), None))
        text = as_text(first.get("arg_0"))
    else:  # before 0.4.2: [[prompt, options], ...]
        text = as_text(next(iter(as_list(next(iter(as_list(arguments)), None))), None))
    return text or as_text(sample.get("doc"))


def _choices(sample: Mapping[str, Json]) -> list[str]:
    arguments = sample.get("arguments")
    if isinstance(arguments, dict):
        return [as_text(as_dict(each).get("arg_1")) for each in arguments.values()]
    return [as_text(as_list(each)[1]) for each in as_list(arguments) if len(as_list(each)) > 1]


def _answer(sample: Mapping[str, Json]) -> str:
    """The generated text, or for multiple choice the option with the highest log likelihood."""
    responses = as_list(sample.get("filtered_resps")) or as_list(sample.get("resps"))
    likelihoods = [_likelihood(each) for each in responses]
    choices = _choices(sample)
    known = [each for each in likelihoods if each is not None]
    if len(known) == len(likelihoods) == len(choices) and len(known) > 1:
        return choices[likelihoods.index(max(known))].strip()
    return as_text(responses)


def _likelihood(response: Json) -> float | None:
    """`["-0.1", "False"]`, perhaps in lists: (log likelihood, is greedy)."""
    while isinstance(response, list) and len(response) == 1:
        response = response[0]
    if isinstance(response, list) and len(response) == 2:
        return as_number(response[0])
    return None


def _target(sample: Mapping[str, Json]) -> str:
    """The wanted text; a multiple-choice target may be the option's number."""
    target = sample.get("target")
    number = as_number(target) if not isinstance(target, bool) else None
    choices = _choices(sample)
    if number is not None and number.is_integer() and len(choices) > 1:
        texts = [choice.strip() for choice in choices]
        if as_text(target) not in texts and 0 <= int(number) < len(texts):
            return texts[int(number)]
    return as_text(target)


def _read_results(document: Document) -> EvalRun:
    run = as_dict(document.value)
    counts = as_dict(run.get("n-samples"))
    aggregates: list[Aggregate] = []
    groups = {str(name) for name, tasks in as_dict(run.get("group_subtasks")).items() if tasks}
    for task, numbers in as_dict(run["results"]).items():
        if task in groups:
            continue  # the mean over tasks that are listed too
        scores = as_dict(numbers)
        counted = as_number(as_dict(counts.get(task)).get("effective"))
        counted = counted if counted is not None else as_number(scores.get("sample_len"))
        for key, value in scores.items():
            metric, _, filtered = str(key).partition(",")
            number = as_number(value)
            if number is None or isinstance(value, str) or metric.endswith("_stderr"):
                continue
            if key in ("sample_len", "sample_count"):
                continue
            stderr = scores.get(f"{metric}_stderr,{filtered}" if filtered else f"{metric}_stderr")
            aggregates.append(
                Aggregate(
                    task=as_text(task),
                    metric=as_text(metric) if filtered in ("", "none") else as_text(key),
                    value=number,
                    stderr=as_number(stderr) if not isinstance(stderr, str) else None,
                    samples=int(counted) if counted is not None else None,
                    share_right=metric_key(metric) in _EXACT and 0 <= number <= 1,
                )
            )
    return EvalRun(
        tool="lm-evaluation-harness",
        version=as_text(run.get("lm_eval_version")),
        aggregates=tuple(aggregates),
        notes=(
            "this file holds numbers over tasks, no answers: run with --log_samples and pass "
            "samples_<task>_<time>.jsonl",
        ),
    )


READER = Reader(
    tool="lm-evaluation-harness",
    title="lm-evaluation-harness",
    files="`samples_<task>_<time>.jsonl`; `results_<time>.json` (numbers only)",
    how="`lm_eval ... --log_samples --output_path results`",
    recognises=recognises,
    read=read,
    order=10,
)
