"""Write docs/evals.md from the readers and the mapping, or with --check say whether it is current.

Run: python tools/gen_evals_docs.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from ftplan.evals import signals
from ftplan.evals.readers import all_readers
from ftplan.evals.readers.table import FIELDS

PATH = Path(__file__).resolve().parent.parent / "docs" / "evals.md"
HEAD = """\
# Results of evaluation tools

Generated from the program: `python tools/gen_evals_docs.py` writes it anew.

`ftplan advise`, [`ftplan label`](label.md) and `ftplan compare-runs` take the result files that
evaluation tools write. A file is recognised by what is in it, never by its name; `--tool NAME`
overrules that.

```sh
ftplan label results.json -o failures.yaml      # say what each failure is
ftplan advise failures.yaml                     # what to do about it
ftplan compare-runs before.json after.json      # did it help, or was it luck
```

## Tools and files

| tool | `--tool` | files | how to get them |
| --- | --- | --- | --- |
"""
VERDICTS = """
## When does a row fail?

- A row passes when some check decided and none said no. Where the tool has a verdict of its own
  (promptfoo and deepeval `success`, the Evals API's `status`), that verdict stands.
- A row without an answer (timeout, rate limit, crashed harness or judge) has no verdict. It is
  listed as `infrastructure_error`, counts in no share, and is not for labelling.
- Scores without a threshold (ragas, MLflow scores, numbers in Inspect) pass from the middle of
  their scale on, 0.5 on 0 to 1, and the run says that this was assumed;
  `--threshold METRIC=SCORE` replaces it. A score on an unknown scale is shown and not judged.
- For some metrics low is good: noise sensitivity, toxicity, bias, hallucination, error rates.
- lm-evaluation-harness: a document is one row however many filters scored it; `acc_norm` and the
  loose accuracies are second opinions and do not decide; `results_*.json` holds no answers, so only
  the number of failures is known.
- Inspect: C is right; I, N and P (partial) are not; `.eval` logs compressed with Zstandard need
  Python 3.14 or the package zstandard, or `inspect log convert --to json`.
- MLflow: an assessment that a person wrote as expectation is the wanted answer, not a score.

## Tables of your own

Any CSV, JSON or JSONL with a row per answer. Columns are found by their usual names, or named:
`--columns input=question,output=answer,passed=feedback.correct` (a dot walks into objects).

| field | found under |
| --- | --- |
"""
MAPPING = """
## From checks to a suggested kind

A suggestion is marked as one (`suggested: true`) until a person confirms it, and `--map CHECK=KIND`
replaces it. The first row of this table that applies decides: a passage that was not retrieved
explains an unfaithful answer, not the other way round. A wrong answer alone has no cause, so
correctness never suggests a kind; latency and cost are suggested only where nothing calls the
answer wrong; `irrelevant_but_correct` only where no correctness check fails. A judge with a rubric
of its own (`... [GEval]`) means what its rubric says, so its name suggests nothing.

| failing check | suggested kind | class | what it says | what would settle it |
| --- | --- | --- | --- | --- |
"""


def text() -> str:
    """The whole page."""
    lines = [HEAD]
    lines += [
        f"| {reader.title} | `{reader.tool}` | {reader.files} | {reader.how} |\n"
        for reader in all_readers()
    ]
    lines.append(VERDICTS)
    lines += [
        f"| `{field}` | {', '.join(f'`{name}`' for name in names)} |\n"
        for field, names in FIELDS.items()
    ]
    lines.append(MAPPING)
    for signal in signals():
        metrics = ", ".join(f"`{metric}`" for metric in signal.metrics)
        kind = f"`{signal.kind}`" if signal.kind else "none"
        lines.append(
            f"| {metrics} | {kind} | {signal.failure_class or '-'} | {signal.why} "
            f"| {signal.ask or '-'} |\n"
        )
    return "".join(lines)


def main(check: bool) -> int:
    """Returns 1 when the page is stale and ``check`` was asked for."""
    page = text()
    if PATH.is_file() and PATH.read_text(encoding="utf-8") == page:
        return 0
    if check:
        print("stale: docs/evals.md; run: python tools/gen_evals_docs.py", file=sys.stderr)
        return 1
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
