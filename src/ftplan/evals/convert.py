"""An evaluation run as a failures file: what fails, with what the checks suggest about why.

Every kind that comes from a check is marked ``suggested``: nobody has confirmed it. Rows without
an answer to judge keep the kind ``infrastructure_error``, which no share counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from ftplan.evals.suggest import signal_of, suggest
from ftplan.failures import Failure, FailuresFile, State, TestResult
from ftplan.results import Aggregate, Check, EvalRun, ResultRow

__all__ = [
    "failure_of",
    "join_failures",
    "run_of",
    "state_of",
    "to_failures",
    "with_suggestions",
]


def to_failures(
    run: EvalRun, *, overrides: Mapping[str, str] | None = None, redact: bool = False
) -> FailuresFile:
    """The failing rows of a run as failures, and what the run says about the project's state.

    ``overrides`` maps checks to kinds and precedes the mapping; ``redact`` keeps ids, kinds and
    names of checks, and none of the texts.
    """
    rows = [row for row in run.rows if row.error or row.passed is False]
    failures = [failure_of(row, overrides=overrides, redact=redact) for row in rows]
    failures += _counted(run)
    return FailuresFile(state=state_of(run), failures=tuple(failures))


def failure_of(
    row: ResultRow, *, overrides: Mapping[str, str] | None = None, redact: bool = False
) -> Failure:
    """One failing row as a failure."""
    suggestion = suggest(row, overrides)
    names = tuple(dict.fromkeys(_check_name(check) for check in row.failing_checks))
    described = row.reason or (f"fails {', '.join(names)}" if names else "")
    if row.description:
        described = f"{row.description}: {described}" if described else row.description
    failure = Failure(
        id=row.id,
        kind=suggestion.kind,
        count=1,
        description=_short(row.error or described) or None,
        input=row.input or None,
        output=row.output or None,
        expected=row.expected or None,
        context=row.contexts or None,
        tests=_tests(row),
        checks=names or None,
        suggested=True if suggestion.kind and not (row.error or row.kind) else None,
    )
    return redacted(failure) if redact else failure


def _tests(row: ResultRow) -> dict[str, TestResult] | None:
    """Checks that are one of the distinguishing tests: recall says what was retrieved."""
    verdicts = [
        check.passed
        for check in row.checks
        if check.passed is not None
        and (signal := signal_of(check.signal or check.name)) is not None
        and signal.group == "retrieval_recall"
    ]
    return {"retrieval": "pass" if all(verdicts) else "fail"} if verdicts else None


def redacted(failure: Failure) -> Failure:
    """The failure without any text of the user's or the model's."""
    return replace(
        failure,
        description=None,
        input=None,
        output=None,
        expected=None,
        context=None,
        note=None,
    )


def with_suggestions(
    file: FailuresFile, *, overrides: Mapping[str, str] | None = None
) -> FailuresFile:
    """A failures file in which rows without a kind get the one that their ``checks`` suggest."""
    return replace(file, failures=tuple(_suggested(each, overrides) for each in file.failures))


def _suggested(failure: Failure, overrides: Mapping[str, str] | None) -> Failure:
    if failure.kind is not None or not failure.checks:
        return failure
    row = ResultRow(
        id=failure.id or "",
        item=failure.id or "",
        passed=False,
        checks=tuple(Check(name=name, passed=False) for name in failure.checks),
    )
    kind = suggest(row, overrides).kind
    return replace(failure, kind=kind, suggested=True) if kind else failure


def run_of(file: FailuresFile, source: str) -> EvalRun:
    """A failures file as a run, so that its rows can be labelled: those that have an id."""
    named = [failure for failure in file.failures if failure.id]
    rows = tuple(_row_of(failure) for failure in named)
    missing = len(file.failures) - len(named)
    notes = (f"{missing} failures without an id are left out: give them one",) if missing else ()
    return EvalRun(tool="failures", source=source, rows=rows, notes=notes)


def _row_of(failure: Failure) -> ResultRow:
    assert failure.id
    results = {name: result == "pass" for name, result in (failure.tests or {}).items()}
    checks = [Check(name=name, passed=False) for name in failure.checks or ()]
    checks += [Check(name=name, passed=ok, decides=False) for name, ok in results.items()]
    return ResultRow(
        id=failure.id,
        item=failure.id,
        passed=False,
        checks=tuple(checks),
        input=failure.input or "",
        output=failure.output or "",
        expected=failure.expected or "",
        contexts=failure.context or (),
        description=failure.description or "",
        kind=failure.kind or "",
    )


def state_of(run: EvalRun) -> State:
    """What a result file alone shows: there is an evaluation, its size, its share of passes."""
    items = {row.item for row in run.rows}
    judged = [row for row in run.rows if row.passed is not None]
    if judged:
        right = sum(row.passed is True for row in judged)
        return State(
            eval_pipeline=True, eval_examples=len(items), accuracy=round(right / len(judged), 6)
        )
    shares = _shares(run)
    samples = sum(each.samples or 0 for each in shares)
    if samples:
        right_share = sum(each.value * (each.samples or 0) for each in shares) / samples
        return State(eval_pipeline=True, eval_examples=samples, accuracy=round(right_share, 6))
    return State(eval_pipeline=True, eval_examples=len(items) or None)


def join_failures(
    labelled: Sequence[FailuresFile], results: Sequence[FailuresFile]
) -> FailuresFile:
    """Hand-written failures files and converted result files as one.

    What a person wrote wins: keys of the state, and the label of an item that a result file holds
    too. Equal ids in different result files are different items (`0` of two tasks).
    """
    files = [*labelled, *results]
    state: dict[str, Any] = {}
    for key in fields(State):
        known = (getattr(file.state, key.name) for file in files)
        state[key.name] = next((value for value in known if value is not None), None)
    by_hand = {each.id: each for file in labelled for each in file.failures if each.id}
    found: dict[str, Failure] = {}
    for file in results:
        for failure in file.failures:
            name = failure.id or "row"
            while name in found:
                name = _next_name(name)
            found[name] = replace(failure, id=name)
    failures = [
        _filled(each, found[each.id]) if each.id and each.id in found else each
        for file in labelled
        for each in file.failures
    ]
    failures += [each for name, each in found.items() if name not in by_hand]
    return FailuresFile(
        task=next((file.task for file in files if file.task), None),
        state=State(**state),
        failures=tuple(failures),
    )


def _next_name(name: str) -> str:
    stem, _, number = name.rpartition("#")
    return f"{stem}#{int(number) + 1}" if stem and number.isdigit() else f"{name}#2"


def _filled(label: Failure, result: Failure) -> Failure:
    """A person's label, with what the result file adds to it."""
    filled = {
        name: getattr(result, name)
        for name in ("description", "input", "output", "expected", "context", "checks", "tests")
        if getattr(label, name) is None
    }
    if label.kind is None:
        filled |= {"kind": result.kind, "suggested": result.suggested}
    if label.count is None and label.share is None:
        filled["count"] = result.count
    return replace(label, **filled)


def _counted(run: EvalRun) -> list[Failure]:
    """Failures known only by their number: a file of means over tasks."""
    if run.rows:
        return []
    counted: list[Failure] = []
    for each in _shares(run):
        samples = each.samples or 0
        wrong = samples - round(each.value * samples)
        if wrong:
            counted.append(
                Failure(
                    id=each.task,
                    count=wrong,
                    description=f"{wrong} of {samples} wrong ({each.metric} {each.value:g})",
                    checks=(each.metric,),
                )
            )
    return counted


def _shares(run: EvalRun) -> list[Aggregate]:
    """One share of right answers for each task: a second metric scores the same answers."""
    first: dict[str, Aggregate] = {}
    for each in run.aggregates:
        if each.share_right and each.samples:
            first.setdefault(each.task, each)
    return list(first.values())


def _check_name(check: Check) -> str:
    """The name under which the mapping knows the check, so that a saved file suggests the same."""
    if check.signal and signal_of(check.signal) is not None:
        return check.signal
    return check.name


def _short(text: str, limit: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3].rstrip() + "..."
