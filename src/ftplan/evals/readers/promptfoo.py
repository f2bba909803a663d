"""promptfoo: `promptfoo eval -o results.json` (also `.jsonl`, `.csv`).

Rows: `results.results[]` (`results.version` 3 and 2), `results[]` of older files, or one JSON line
each with the same keys. `failureReason` is 0 none, 1 assertion, 2 error; the top-level `error`
repeats a failed assertion's reason, so it alone is no infrastructure error.
Source: https://www.promptfoo.dev/docs/configuration/outputs/ and files written by 0.121.20.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ftplan.evals.document import Document
from ftplan.evals.options import ReadOptions
from ftplan.evals.readers import Reader
from ftplan.evals.values import (
    as_contexts,
    as_dict,
    as_list,
    as_number,
    as_text,
    as_verdict,
    is_missing,
)
from ftplan.results import Check, EvalRun, ResultRow

Json = Any
_ERROR = 2
_ROW_KEYS = {"vars", "success", "score"}
_CONTEXT_VARS = ("context", "contexts", "documents", "retrieved_contexts")
_EXPECTING = {"equals", "contains", "icontains", "factuality", "similar", "answer-relevance"}
"""Assertions whose `value` is the wanted answer, most literal first."""


def recognises(document: Document) -> bool:
    if document.table:
        header = document.header
        if "Status" in header and ("Grader Reason" in header or "Named Scores" in header):
            return True
        return bool(_marked_columns(document))
    if _summary(document):
        return True
    return any(_is_row(each) for _, each in document.objects[:5])


def read(document: Document, options: ReadOptions) -> EvalRun:
    if document.table:
        return _read_table(document)
    summary = _summary(document)
    if summary:
        found: Iterable[tuple[int | None, Json]] = ((None, each) for each in summary["results"])
    else:
        found = ((line or None, each) for line, each in document.objects)
    rows = tuple(
        _row(each, number, line)
        for number, (line, each) in enumerate(found)
        if isinstance(each, dict)
    )
    value = as_dict(document.value)
    version = as_text(as_dict(value.get("metadata")).get("promptfooVersion"))
    return EvalRun(tool="promptfoo", version=version, rows=rows)


def _is_row(value: Json) -> bool:
    if not isinstance(value, dict) or "success" not in value:
        return False
    if "failureReason" in value or "gradingResult" in value:
        return True
    return value.keys() >= _ROW_KEYS and "prompt" in value


def _summary(document: Document) -> dict[str, Json]:
    """The mapping that holds the list `results`, wherever this version put it."""
    value = as_dict(document.value)
    for candidate in (as_dict(value.get("results")), value):
        rows = as_list(candidate.get("results"))
        if isinstance(candidate.get("results"), list) and (
            any(_is_row(each) for each in rows[:5])
            or (not rows and ("evalId" in value or {"stats", "version"} <= candidate.keys()))
        ):
            return candidate
    return {}


def _row(row: dict[str, Json], number: int, line: int | None) -> ResultRow:
    grading = as_dict(row.get("gradingResult"))
    components = [as_dict(each) for each in as_list(grading.get("componentResults"))]
    checks = tuple(_check(each) for each in components)
    error = _infrastructure_error(row, grading)
    case = as_dict(row.get("testCase"))
    variables = as_dict(row.get("vars")) or as_dict(case.get("vars"))
    test = row.get("testIdx")
    name = f"test-{test}" if isinstance(test, int) else f"row-{number}"
    if isinstance(row.get("promptIdx"), int):
        name += f"-prompt-{row['promptIdx']}"
    prompt = as_dict(row.get("prompt"))
    response = as_dict(row.get("response"))
    return ResultRow(
        id=name,
        item=_item(variables, case, number),
        passed=None if error else as_verdict(row.get("success")),
        checks=checks,
        input=_asked(variables) or as_text(prompt.get("raw")),
        output=as_text(response.get("output") if response else row.get("output")),
        expected=_expected(case, components),
        contexts=_contexts(variables),
        reason="" if error else as_text(grading.get("reason") or row.get("error")),
        error=error,
        description=as_text(case.get("description") or row.get("description")),
        variant=_variant(prompt, row.get("provider")),
        line=line,
    )


def _infrastructure_error(row: dict[str, Json], grading: dict[str, Json]) -> str:
    response = as_dict(row.get("response"))
    message = as_text(row.get("error") or response.get("error"))
    if row.get("failureReason") == _ERROR:
        return message or "error"
    failed = [
        as_dict(each)
        for each in as_list(grading.get("componentResults"))
        if as_verdict(as_dict(each).get("pass")) is False
    ]
    if failed and all(_grader_error(each) for each in failed):
        return _grader_error(failed[0])  # the judge gave no verdict, and nothing else said no
    if "failureReason" not in row and message and not grading and row.get("success") is not True:
        return message  # older files have no failureReason: an error that nothing graded
    return ""


def _grader_error(component: dict[str, Json]) -> str:
    """Why the judge gave no verdict; promptfoo writes that as a failed assertion with a mark."""
    if as_dict(component.get("metadata")).get("graderError") is not True:
        return ""
    return as_text(component.get("reason")) or "the grader failed"


def _check(component: dict[str, Json]) -> Check:
    assertion = as_dict(component.get("assertion"))
    kind = as_text(assertion.get("type"))
    metric = as_text(assertion.get("metric"))
    return Check(
        name=metric or kind or "assertion",
        signal=kind,
        passed=None if _grader_error(component) else as_verdict(component.get("pass")),
        score=as_number(component.get("score")),
        error=_grader_error(component),
        threshold=as_number(assertion.get("threshold")),
        reason=as_text(component.get("reason")),
    )


def _item(variables: dict[str, Json], case: dict[str, Json], number: int) -> str:
    """The variables are the item: test numbers shift when a test is added above."""
    described = as_text(case.get("description"))
    public = {key: each for key, each in variables.items() if not str(key).startswith("_")}
    if public:
        return " ".join(f"{key}={as_text(each)}" for key, each in sorted(public.items()))
    return described or f"row-{number}"


def _expected(case: dict[str, Json], components: list[dict[str, Json]]) -> str:
    assertions = [as_dict(each) for each in as_list(case.get("assert"))]
    assertions += [as_dict(each.get("assertion")) for each in components]
    for assertion in assertions:
        if as_text(assertion.get("type")) in _EXPECTING and not is_missing(assertion.get("value")):
            return as_text(assertion["value"])
    return ""


def _contexts(variables: dict[str, Json]) -> tuple[str, ...]:
    for name in _CONTEXT_VARS:
        if name in variables:
            return as_contexts(variables[name])
    return ()


def _asked(variables: dict[str, Json]) -> str:
    """The variables without the passages, which are shown as such."""
    asked = {
        name: value
        for name, value in variables.items()
        if name not in _CONTEXT_VARS and not str(name).startswith("_")
    }
    return as_text(asked or None)


def _variant(prompt: dict[str, Json], provider: Json) -> str:
    """`[provider] prompt label`, as promptfoo's own table heads its columns."""
    label = as_text(prompt.get("label") or prompt.get("display"))
    name = as_text(as_dict(provider).get("label") or as_dict(provider).get("id") or provider)
    return f"[{name}] {label}".strip() if name else label


def _read_table(document: Document) -> EvalRun:
    """One line per test, and for each prompt the columns output, Status, Score ... Comment.

    Column names repeat, so columns are found by position: each `Status` ends an output column.
    """
    marked = _marked_columns(document)
    if marked:
        return _read_marked_table(document, marked)
    header = document.header
    starts = [index - 1 for index, name in enumerate(header) if name == "Status" and index > 0]
    if not starts:
        raise document.error("a promptfoo table without an output column", line=1)
    rows: list[ResultRow] = []
    for number, (line, written) in enumerate(document.table[1:]):
        cells = written + ("",) * (len(header) - len(written))
        before = dict(zip(header[: starts[0]], cells, strict=False))
        described = before.pop("Description", "")
        for block, start in enumerate(starts):
            end = starts[block + 1] if block + 1 < len(starts) else len(header)
            block_cells = dict(zip(header[start + 1 : end], cells[start + 1 : end], strict=False))
            output = cells[start]
            if not output and not block_cells.get("Status"):
                continue  # this prompt was not run on this test
            rows.append(
                _table_row(
                    name=f"test-{number}-prompt-{block}",
                    before=before,
                    described=described,
                    variant=header[start],
                    output=output,
                    cells=block_cells,
                    line=line,
                )
            )
    return EvalRun(tool="promptfoo", rows=tuple(rows))


_MARK = re.compile(r"^\[(PASS|FAIL|ERROR)\]\s*(?:\([\d.]+\)\s*)?(.*)$", re.S)


def _marked_columns(document: Document) -> list[int]:
    """Columns of older tables, whose cells begin with their verdict: `[FAIL] reason`, `---`, ..."""
    if len(document.table) < 2:
        return []
    return [index for index, cell in enumerate(document.table[1][1]) if _MARK.match(cell)]


def _read_marked_table(document: Document, columns: list[int]) -> EvalRun:
    rows: list[ResultRow] = []
    for number, (line, cells) in enumerate(document.table[1:]):
        before = dict(zip(document.header[: columns[0]], cells, strict=False))
        described = before.pop("Description", "")
        for block, column in enumerate(columns):
            found = _MARK.match(cells[column]) if column < len(cells) else None
            if not found:
                continue
            status, text = found.groups()
            reason, _, output = text.rpartition("\n---\n")
            rows.append(
                _table_row(
                    name=f"test-{number}-prompt-{block}",
                    before=before,
                    described=described,
                    variant=document.header[column] if column < len(document.header) else "",
                    output=output,
                    cells={"Status": status, "Grader Reason": reason},
                    line=line,
                )
            )
    return EvalRun(tool="promptfoo", rows=tuple(rows))


def _table_row(
    *,
    name: str,
    before: dict[str, str],
    described: str,
    variant: str,
    output: str,
    cells: dict[str, str],
    line: int,
) -> ResultRow:
    status = cells.get("Status", "").strip().upper()
    reason = cells.get("Grader Reason", "")
    error = (reason or output or "error") if status == "ERROR" else ""
    passed = {"PASS": True, "FAIL": False}.get(status)
    checks = tuple(
        Check(
            name=column.removeprefix("Metric: "),
            passed=as_verdict(cell),
            score=as_number(cell),
            reason=reason if as_verdict(cell) is False else "",
        )
        for column, cell in cells.items()
        if column.startswith("Metric: ") and not is_missing(cell)
    )
    signal = _signal_of_reason(reason)
    if passed is False and signal and not any(check.passed is False for check in checks):
        checks += (Check(name=signal, signal=signal, passed=False, reason=reason),)
    elif signal:
        checks = tuple(
            Check(
                name=check.name,
                signal=signal if check.passed is False else "",
                passed=check.passed,
                score=check.score,
                reason=check.reason,
            )
            for check in checks
        )
    return ResultRow(
        id=name,
        item=_item(dict(before), {"description": described}, 0) if before or described else name,
        passed=None if error else passed,
        checks=checks,
        input=_asked(dict(before)),
        output="" if error else output,
        expected=_expected_of_reason(reason),
        contexts=_contexts(dict(before)),
        reason="" if error else reason,
        error=error,
        description=described,
        variant=variant,
        line=line,
    )


_REASONS = (
    (r"^Expected output to (be|contain|have) valid JSON", "is-json"),
    (r"^Expected output to (be|contain) valid XML", "is-xml"),
    (r"^Expected output to (be|contain) valid SQL|SQL statement does not conform", "is-sql"),
    (r"^Expected output to (be|contain) valid HTML", "is-html"),
    (r"^Expected output to match regex", "regex"),
    (r"^Expected output to start with", "starts-with"),
    (r"^Expected output to contain", "contains"),
    (r"^Expected output .* to equal", "equals"),
    (r"^Latency ", "latency"),
    (r"^Cost ", "cost"),
)
"""What 0.121 writes as the reason of its deterministic assertions: the table has no types."""


def _signal_of_reason(reason: str) -> str:
    return next((signal for pattern, signal in _REASONS if re.search(pattern, reason)), "")


def _expected_of_reason(reason: str) -> str:
    found = re.match(r'Expected output to (?:contain|start with|equal) "(.*)"$', reason, re.S)
    return found.group(1) if found else ""


READER = Reader(
    tool="promptfoo",
    title="promptfoo",
    files="`results.json`, `results.jsonl`, `results.csv`",
    how="`promptfoo eval -o results.json`, or `promptfoo export eval latest -o results.json`",
    recognises=recognises,
    read=read,
    order=10,
)
