"""Reading what evaluation tools write: the right rows, verdicts and errors, from any bytes."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftplan.errors import FtplanError, InputError, UnknownNameError
from ftplan.evals import ReadOptions, parse_results, read_results, to_failures
from ftplan.evals.readers import all_readers
from ftplan.evals.reading import UNEXPECTED
from ftplan.evals.values import as_text, as_verdict, metric_key

CASES = Path(__file__).parent / "cases" / "evals"
EXPECTED: dict[str, dict[str, Any]] = json.loads((CASES / "expected.json").read_text("utf-8"))
CORPUS = Path(__file__).parents[2] / "shared" / "data" / "eval-results"

# (rows, failures, errors) of the tools' own files, counted by hand from their contents
CORPUS_COUNTS = {
    "deepeval_4.3.1_latest_test_run.json": ("deepeval", 2, 1, 0),
    "deepeval_4.3.1_test_run.json": ("deepeval", 2, 1, 0),
    "inspect_0.3.285_log.json": ("inspect", 3, 1, 0),
    "lm_eval_0.4.13_results.json": ("lm-evaluation-harness", 0, 0, 0),
    "lm_eval_0.4.13_samples_generate.jsonl": ("lm-evaluation-harness", 2, 1, 0),
    "lm_eval_0.4.13_samples_multiple_choice.jsonl": ("lm-evaluation-harness", 2, 2, 0),
    "mlflow_3.17.2_genai_eval_results.jsonl": ("mlflow", 2, 1, 0),
    "openai_evals_3.0.1_record.jsonl": ("openai-evals", 1, 1, 0),
    "promptfoo_0.121.20_results.csv": ("promptfoo", 6, 4, 0),
    "promptfoo_0.121.20_results.json": ("promptfoo", 6, 4, 0),
    "promptfoo_0.121.20_results.jsonl": ("promptfoo", 6, 4, 0),
    "ragas_0.4.3.csv": ("ragas", 2, 1, 0),
    "ragas_0.4.3.jsonl": ("ragas", 2, 1, 0),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_golden_files_are_read_as_written(name: str) -> None:
    """Every golden file has the tool, rows, failures, errors and suggested kinds it is said to."""
    run = read_results(CASES / name)
    found = {
        "tool": run.tool,
        "rows": len(run.rows),
        "failures": len(run.failures),
        "errors": len(run.errors),
        "unjudged": len(run.unjudged),
        "aggregates": len(run.aggregates),
        "kinds": [failure.kind for failure in to_failures(run).failures],
    }
    assert found == EXPECTED[name]


def test_every_golden_file_is_expected_and_every_tool_has_one() -> None:
    """No case lies unused, and no reader goes without a case."""
    files = {path.name for path in CASES.iterdir()} - {"expected.json"}
    assert files == set(EXPECTED)
    assert {case["tool"] for case in EXPECTED.values()} == {reader.tool for reader in all_readers()}


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus ../shared/data is not here")
def test_corpus_of_real_files() -> None:
    """All result files of the corpus are read, with equal counts where a run was saved twice."""
    names = {path.name for path in CORPUS.iterdir()}
    ran = 0
    for name, (tool, rows, failures, errors) in CORPUS_COUNTS.items():
        run = read_results(CORPUS / name)
        assert (run.tool, len(run.rows), len(run.failures), len(run.errors)) == (
            tool,
            rows,
            failures,
            errors,
        ), name
        ran += 1
    totals = read_results(CORPUS / "lm_eval_0.4.13_results.json")
    assert {(each.task, each.value, each.samples) for each in totals.aggregates} == {
        ("toy_gen", 0.5, 2),
        ("toy_mc", 0.0, 2),
    }
    assert [each.count for each in to_failures(totals).failures] == [1, 2]
    try:
        archive = read_results(CORPUS / "inspect_0.3.285_log.eval")
    except InputError as error:
        assert "zstandard" in error.remedy and "inspect log convert" in error.remedy
    else:
        assert archive.rows == read_results(CORPUS / "inspect_0.3.285_log.json").rows
    ran += 1
    assert ran == 14 == len(names)


@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus ../shared/data is not here")
def test_the_same_run_in_three_formats_has_the_same_items() -> None:
    """promptfoo's json, jsonl and csv of one run give the same items, verdicts and outputs."""
    runs = [
        read_results(CORPUS / f"promptfoo_0.121.20_results.{suffix}")
        for suffix in ("json", "jsonl", "csv")
    ]
    views = [[(row.item, row.passed, row.output, row.variant) for row in run.rows] for run in runs]
    assert views[0] == views[1] == views[2]


def test_a_crash_is_not_a_failure() -> None:
    """Rows that crashed have no verdict, are errors, and become infrastructure errors only."""
    run = read_results(CASES / "promptfoo_v3_rag.json")
    (crashed,) = run.errors
    assert crashed.passed is None and "rate limit" in crashed.error
    kinds = {each.id: each.kind for each in to_failures(run).failures}
    assert kinds[crashed.id] == "infrastructure_error"


def test_a_crashed_judge_leaves_the_other_verdicts() -> None:
    """deepeval's success is false when one metric crashed: the metrics that ran decide."""
    run = read_results(CASES / "deepeval_rag.json")
    row = next(row for row in run.rows if row.id == "t7")
    assert row.passed is True and not row.error


def test_filters_of_one_document_are_one_row() -> None:
    """lm-evaluation-harness writes a line per filter; a document is counted once."""
    run = read_results(CASES / "lm_eval_two_filters.jsonl")
    assert [row.id for row in run.rows] == ["0", "1", "2"]
    assert all(len(row.checks) == 2 for row in run.rows)


def test_a_second_opinion_does_not_decide() -> None:
    """acc_norm scores the same answer as acc in another way: acc decides."""
    run = read_results(CASES / "lm_eval_acc_norm.jsonl")
    assert [row.passed for row in run.rows] == [True, False]
    assert run.rows[0].output == "a" and run.rows[0].expected == "b"


def test_a_group_is_not_counted_beside_its_tasks() -> None:
    """The mean over a group's tasks is left out where the tasks are listed."""
    run = read_results(CASES / "lm_eval_groups.json")
    assert {each.task for each in run.aggregates} == {"mmlu_a", "mmlu_b"}
    state = to_failures(run).state
    assert state.eval_examples == 12
    assert state.accuracy == pytest.approx(7 / 12, abs=1e-5)


def test_inspect_values() -> None:
    """Letters, numbers, booleans and mappings are read; an unknown scale is not judged."""
    rows = {row.id: row for row in read_results(CASES / "inspect_values.json").rows}
    verdicts = {name: row.passed for name, row in rows.items()}
    assert verdicts == {
        "1": True, "1-epoch-2": False, "2": False, "2-epoch-2": False, "3": None, "4": True,
        "5": False, "6": None, "7": None, "8": True,
    }  # fmt: skip
    assert rows["4"].checks[0].threshold_assumed
    assert rows["1"].item == rows["1-epoch-2"].item
    assert rows["8"].output == "[reasoning]\nlong text"
    assert rows["8"].input == "system: be brief\nuser: hello"


def test_labels_are_not_scores() -> None:
    """A human expectation in an MLflow table is what was wanted, never a check."""
    rows = read_results(CASES / "mlflow_genai.jsonl").rows
    assert rows[0].expected == "1889"
    assert [check.name for check in rows[0].checks] == ["correctness", "retrieval_groundedness"]
    assert rows[2].contexts == ("passage one",)


def test_assumed_thresholds_are_flagged_and_can_be_given() -> None:
    """A tool without thresholds: 0.5, said so; the user's threshold replaces it."""
    run = read_results(CASES / "ragas_rag.jsonl")
    assert any("assumed" in note for note in run.notes)
    options = ReadOptions(
        thresholds={"context_recall": 0.5, "faithfulness": 0.1, "factual_correctness": 0.0}
    )
    strict = read_results(CASES / "ragas_rag.jsonl", options)
    assert not any("assumed" in note for note in strict.notes)
    assert [row.passed for row in strict.rows] == [True, True, False, True, None, True]


def test_low_is_good_for_some_metrics() -> None:
    """noise_sensitivity and toxicity fail when they are high."""
    rows = read_results(CASES / "ragas_columns.json").rows
    assert [row.passed for row in rows] == [False, True]


def test_columns_may_be_named() -> None:
    """A table of any origin is read through a map of columns, with paths into objects."""
    data = b'{"q": "x", "a": {"text": "y"}, "fb": {"good": false}}\n'
    options = ReadOptions(columns={"input": "q", "output": "a.text", "passed": "fb.good"})
    (row,) = parse_results(data, "own.jsonl", options).rows
    assert (row.input, row.output, row.passed) == ("x", "y", False)


def test_a_table_without_verdicts_is_refused_with_its_columns() -> None:
    """A table that does not judge is refused, with its columns and the remedy."""
    with pytest.raises(InputError) as caught:
        parse_results(b"question,reply\nx,y\n", "own.csv")
    assert "question" in caught.value.message and "--columns" in caught.value.remedy
    with pytest.raises(InputError, match="no row has a column"):
        parse_results(b"a,passed\nx,1\n", "own.csv", ReadOptions(columns={"input": "b"}))
    with pytest.raises(InputError, match="no field"):
        parse_results(b"a,passed\nx,1\n", "own.csv", ReadOptions(columns={"inptu": "a"}))


def test_status_success_is_not_a_verdict() -> None:
    """LangSmith's status says that the run ended; the feedback says whether it was right."""
    run = read_results(CASES / "table_langsmith.json")
    assert [row.passed for row in run.rows] == [False, True]


@pytest.mark.parametrize(
    ("data", "line", "says"),
    [
        (b"", None, "empty"),
        (b'{"doc_id": 0}\n{"doc_id": 1, "resps": [\n', 2, "line 2 is not JSON"),
        (b'{"a": 1,\n "b": }', 2, "not JSON"),
        (b"hello world\n", 1, "not a result file"),
        (b"a,b\n\xff\xfe,c\n", 2, "not a text file"),
        (b"PK\x03\x04 not a zip", None, "zip archive"),
        (b"[" * 100_000, None, ""),
        (b"[]", None, ""),
        (b"\n , \n", 1, ""),
    ],
)
def test_errors_say_where(data: bytes, line: int | None, says: str) -> None:
    """Bytes that are no result file are refused with the file, and the line where there is one."""
    with pytest.raises(InputError) as caught:
        parse_results(data, "results.json")
    assert says in caught.value.message
    assert caught.value.location is not None and caught.value.location.file == "results.json"
    if line is not None:
        assert caught.value.location.line == line


def test_a_missing_file_and_an_unknown_tool(tmp_path: Path) -> None:
    """A path that is not there, a folder, and a tool of no reader are user errors."""
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(InputError):
            read_results(path)
    with pytest.raises(UnknownNameError):
        parse_results(b"{}", "x.json", ReadOptions(tool="nope"))


def test_a_foreign_zip_is_refused(tmp_path: Path) -> None:
    """A zip without Inspect's header is no log."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hi")
    with pytest.raises(InputError, match="no Inspect log"):
        read_results(path)


def test_utf16_and_byte_order_marks() -> None:
    """Files redirected by PowerShell (UTF-16) or saved by Excel (UTF-8 with a mark) are read."""
    text = "input,output,passed\nx,y,no\n"
    for encoding in ("utf-16", "utf-8-sig"):
        assert len(parse_results(text.encode(encoding), "x.csv").failures) == 1


def test_long_cells_and_line_separators() -> None:
    """Cells beyond csv's default limit, and U+2028 within a JSON line, are data."""
    long = "x" * 200_000
    data = f"input,output,passed\n{long},y,no\n".encode()
    assert parse_results(data, "x.csv").rows[0].input == long
    line = json.dumps({"input": "a\u2028b", "passed": False}, ensure_ascii=False)
    assert parse_results(line.encode(), "x.jsonl").rows[0].input == "a\u2028b"


def test_half_a_surrogate_can_be_written_out_again() -> None:
    """A lone surrogate escape, legal in JSON, does not survive into texts."""
    run = parse_results(b'{"input": "a\\ud800", "passed": false}\n', "x.jsonl")
    run.rows[0].input.encode()


def test_row_ids_are_unique() -> None:
    """Rows of the same name are told apart."""
    data = b'{"id": "a", "passed": 0}\n{"id": "a", "passed": 0}\n{"id": "a#2", "passed": 0}\n'
    names = [row.id for row in parse_results(data, "x.jsonl").rows]
    assert len(set(names)) == 3 and names[0] == "a"


def test_redaction_keeps_no_text() -> None:
    """A redacted failures file holds ids, kinds, counts and names of checks, and no text."""
    run = read_results(CASES / "promptfoo_v3_rag.json")
    for failure in to_failures(run, redact=True).failures:
        texts = (failure.input, failure.output, failure.expected, failure.description, failure.note)
        assert not any(texts) and not failure.context
        assert failure.id


def test_the_state_that_results_show() -> None:
    """There is an evaluation, so many items, such a share of passes; nothing else is known."""
    state = to_failures(read_results(CASES / "promptfoo_repeats.jsonl")).state
    assert (state.eval_pipeline, state.eval_examples, state.accuracy) == (True, 2, 0.5)
    assert state.prompt_iterations is None and state.rag is None


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([True, "yes", "PASS", "C", 1, 1.0, " correct "]))
def test_yes_is_yes(value: object) -> None:
    """Every way in which a tool writes yes is yes."""
    assert as_verdict(value) is True


def test_metric_keys() -> None:
    """Names of one metric in several spellings meet; different metrics do not."""
    names = ["Contextual Recall", "contextual-recall", "ContextualRecallMetric"]
    assert {metric_key(name) for name in names} == {"contextual_recall"}
    assert metric_key("factual_correctness(mode=f1)") == "factual_correctness"
    assert metric_key("answer_correctness/v1") == "answer_correctness"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=12,
)
KEYS = [
    "results", "testCases", "test_results", "metricsData", "success", "score", "vars", "prompt",
    "user_input", "response", "retrieved_contexts", "faithfulness", "doc_id", "resps", "metrics",
    "acc", "filter", "eval", "task", "model", "samples", "scores", "value", "epoch", "target",
    "spec", "sample_id", "event_id", "type", "data", "match", "trace_id", "assessments",
    "request", "safety/value", "columns", "object", "datasource_item", "status", "version",
    "gradingResult", "componentResults", "assertion", "input", "output", "passed", "turns",
    "arguments", "target", "filtered_resps", "n-shot", "group_subtasks", "error", "contexts",
]  # fmt: skip
tool_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 2),
        st.floats(),
        st.sampled_from(["", "C", "no", "eval.run.output_item", "match", "nan"]),
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)
    ),
    max_leaves=12,
)


def _read_or_refuse(data: bytes, options: ReadOptions | None = None) -> None:
    try:
        run = parse_results(data, "x", options)
    except FtplanError as error:
        assert error.message and UNEXPECTED not in error.message, error
    else:
        assert len({row.id for row in run.rows}) == len(run.rows)
        assert len(run.failures) + len(run.errors) <= len(run.rows)
        for failure in to_failures(run).failures:
            (failure.description or "").encode()


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """No bytes whatever raise anything but an error for users."""
    _read_or_refuse(data)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(json_values)
def test_any_json_is_read_or_refused(value: object) -> None:
    """No JSON value raises anything but an error for users."""
    _read_or_refuse(json.dumps(value).encode())


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.one_of(tool_values, st.dictionaries(st.sampled_from(KEYS), tool_values, max_size=8)),
    st.sampled_from(["", *(reader.tool for reader in all_readers())]),
)
def test_malformed_tool_files_are_read_or_refused(value: object, tool: str) -> None:
    """The keys of tools' files with values of any type never crash a reader, whichever it is."""
    _read_or_refuse(json.dumps(value).encode(), ReadOptions(tool=tool))
    _read_or_refuse(json.dumps(value).encode() + b"\n{}\n", ReadOptions(tool=tool))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(EXPECTED)), st.data())
def test_damaged_files_are_read_or_refused(name: str, data: st.DataObject) -> None:
    """A golden file cut short or with bytes changed never crashes a reader."""
    content = bytearray((CASES / name).read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(content)))
    _read_or_refuse(bytes(content[:cut]))
    _read_or_refuse(bytes(content))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(json_values)
def test_any_value_has_a_text(value: object) -> None:
    """Whatever stands where a text should be is shown as one."""
    assert isinstance(as_text(value), str)
    if isinstance(value, float) and math.isnan(value):
        assert as_text(value) == ""


ODD: tuple[Any, ...] = (
    None, True, 0, -1, 0.5, math.nan, 10**30, "", "C", "no", "[1]", "\ud800", [], {}, [None], [{}],
    {"value": {"x": "C"}}, {"content": [1], "role": None},
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside of a JSON value."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [place for key, each in inner for place in ((*path, key), *_places(each, (*path, key)))]


@pytest.mark.parametrize("name", sorted(name for name in EXPECTED if ".json" in name))
def test_any_value_may_stand_anywhere(name: str) -> None:
    """Whatever a version writes in the place of any one value, its file is read or refused."""
    text = (CASES / name).read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()] if name.endswith("l") else None
    places = _places(lines if lines is not None else json.loads(text))
    for number, place in enumerate(places):
        document = json.loads(json.dumps(lines)) if lines is not None else json.loads(text)
        target = document
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = ODD[number % len(ODD)]
        rows = document if lines is not None else [document]
        _read_or_refuse("\n".join(json.dumps(row) for row in rows).encode())
