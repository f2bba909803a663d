"""What checks suggest about a failure, and what they do not."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftplan.advise.taxonomy import KINDS, kind_of
from ftplan.evals import join_failures, signal_of, signals, suggest, to_failures, with_suggestions
from ftplan.failures import Failure, FailuresFile, State
from ftplan.results import Check, EvalRun, ResultRow


def row(
    *failing: str, passing: tuple[str, ...] = (), output: str = "", kind: str = ""
) -> ResultRow:
    """A failing row on which these metrics say no, and those say yes."""
    checks = [Check(name=name, passed=False) for name in failing]
    checks += [Check(name=name, passed=True) for name in passing]
    return ResultRow(id="r", item="r", passed=False, checks=tuple(checks), output=output, kind=kind)


ALL_METRICS = [metric for signal in signals() for metric in signal.metrics if "*" not in metric]
CORRECTNESS = [
    metric for signal in signals() if signal.evidence == "correctness" for metric in signal.metrics
]


def test_the_mapping_names_kinds_of_the_taxonomy_once() -> None:
    """Every kind of the mapping is in the taxonomy with its class, and no metric stands twice."""
    for signal in signals():
        if signal.kind:
            known = kind_of(signal.kind, None)
            assert known is not None, signal.kind
            assert signal.failure_class in known.classes
    repeated = [name for name, count in Counter(ALL_METRICS).items() if count > 1]
    assert not repeated


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sets(st.sampled_from(CORRECTNESS), min_size=1), st.sets(st.sampled_from(ALL_METRICS)))
def test_correctness_alone_never_decides(failing: set[str], passing: set[str]) -> None:
    """However many correctness metrics fail, and whatever else passes, no kind is suggested."""
    suggestion = suggest(row(*failing, passing=tuple(passing - failing)))
    assert suggestion.kind is None
    assert suggestion.ask


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sets(st.sampled_from(ALL_METRICS)))
def test_upstream_wins(others: set[str]) -> None:
    """A passage that was not retrieved explains everything downstream of it."""
    assert suggest(row("context_recall", *others)).kind == "retrieval_miss"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.permutations(["faithfulness", "is-json", "toxicity", "answer_relevancy", "em"]))
def test_order_of_checks_changes_nothing(names: list[str]) -> None:
    """The suggestion depends on which checks fail, not on their order in the file."""
    assert suggest(row(*names)).kind == "unfaithful_to_context"


@pytest.mark.parametrize(
    ("failing", "passing", "kind"),
    [
        (["faithfulness"], ["context_recall"], "unfaithful_to_context"),
        (["Faithfulness"], [], "unfaithful_to_context"),
        (["context_precision"], ["context_recall"], "retrieval_noise"),
        (["answer_relevancy"], [], "irrelevant_but_correct"),
        (["answer_relevancy", "answer_correctness"], [], None),
        (["is-json"], [], "invalid_json"),
        (["contains-json"], ["factuality"], "invalid_json"),
        (["regex"], [], "wrong_format"),
        (["not-is-refusal"], [], "over_refusal"),
        (["is-refusal"], [], None),
        (["moderation"], [], "unsafe_output"),
        (["latency"], [], "latency"),
        (["latency", "llm-rubric"], [], None),
        (["latency", "some_metric_of_mine"], [], None),
        (["llm-rubric"], [], None),
        (["Faithfulness [GEval]"], [], None),
        (["trajectory:goal-success"], [], "wrong_tool_call"),
        (["llm_sql_equivalence_with_reference"], [], "wrong_code"),
        (["some_metric_of_mine"], [], None),
    ],
)
def test_the_default_mapping(failing: list[str], passing: list[str], kind: str | None) -> None:
    """Each signal suggests its kind under the conditions that its definition needs."""
    assert suggest(row(*failing, passing=tuple(passing))).kind == kind


def test_wrong_though_retrieval_and_faithfulness_pass() -> None:
    """Then the reference or the reasoning is in doubt, and the tests that tell are named."""
    suggestion = suggest(row("answer_correctness", passing=("context_recall", "faithfulness")))
    assert suggestion.kind is None
    assert "audit" in suggestion.ask and "larger model" in suggestion.ask


def test_a_missing_recall_measurement_is_said() -> None:
    """Unfaithful to the context, with nobody having measured recall, carries a caveat."""
    assert "not measured" in suggest(row("faithfulness")).reason
    assert "not measured" not in suggest(row("faithfulness", passing=("context_recall",))).reason


def test_the_type_of_an_assertion_says_more_than_its_name() -> None:
    """promptfoo users name their assertions freely: the type decides."""
    check = Check(name="factual", signal="is-json", passed=False)
    named = ResultRow(id="r", item="r", passed=False, checks=(check,))
    assert suggest(named).kind == "invalid_json"


def test_overrides_precede_the_mapping() -> None:
    """The user's mapping wins, by type or by name, in any spelling."""
    assert suggest(row("is-json"), {"is_json": "wrong_format"}).kind == "wrong_format"
    assert suggest(row("tone", "context_recall"), {"Tone": "wrong_tone_style"}).kind == (
        "wrong_tone_style"
    )


def test_suggestions_are_marked_and_labels_are_not() -> None:
    """A kind from checks is marked as suggested; a kind that the file names is not."""
    run = EvalRun(tool="t", rows=(row("is-json"), row("is-json", kind="own_kind")))
    suggested, named = to_failures(run).failures
    assert (suggested.kind, suggested.suggested) == ("invalid_json", True)
    assert (named.kind, named.suggested) == ("own_kind", None)


def test_failures_files_get_suggestions_from_their_checks() -> None:
    """Rows without a kind get the one their checks suggest, marked; labelled rows stay."""
    file = FailuresFile(
        failures=(
            Failure(id="a", checks=("context_recall", "faithfulness")),
            Failure(id="b", checks=("context_recall",), kind="wrong_label"),
            Failure(id="c", checks=("exact_match",)),
            Failure(id="d"),
        )
    )
    kinds = [(each.kind, each.suggested) for each in with_suggestions(file).failures]
    assert kinds == [("retrieval_miss", True), ("wrong_label", None), (None, None), (None, None)]


def test_a_saved_file_suggests_the_same() -> None:
    """The names of checks that are saved with a failure lead to the same suggestion again."""
    for metric in ALL_METRICS:
        first = to_failures(EvalRun(tool="t", rows=(row(metric),))).failures[0]
        again = with_suggestions(
            FailuresFile(failures=(Failure(id=first.id, checks=first.checks),))
        ).failures[0]
        assert again.kind == first.kind


def test_a_persons_label_wins_over_a_result_file() -> None:
    """Joined: hand-written labels and state win, result files fill in what is missing."""
    labelled = FailuresFile(
        task="t",
        state=State(rag="term", accuracy=0.9),
        failures=(Failure(id="r", kind="edge_case"), Failure(id="z", kind="cost")),
    )
    results = to_failures(EvalRun(tool="t", rows=(row("is-json", output="out"),)))
    joined = join_failures([labelled], [results, results])
    assert joined.state.rag == "term" and joined.state.accuracy == 0.9
    assert joined.state.eval_pipeline is True
    assert [(each.id, each.kind, each.output) for each in joined.failures] == [
        ("r", "edge_case", "out"),
        ("z", "cost", None),
        ("r#2", "invalid_json", "out"),
    ]


def test_metrics_of_the_documented_tools_are_known() -> None:
    """Names that tools really write are found in the mapping."""
    for name in (
        "Contextual Recall", "Contextual Precision", "Answer Relevancy", "Json Correctness",
        "context-faithfulness", "noise_sensitivity(mode=relevant)", "factual_correctness(mode=f1)",
        "is-valid-openai-tools-call", "llm_context_precision_with_reference", "pass@1",
        "retrieval_groundedness", "relevance_to_query", "model_graded_qa", "rouge-n", "PII Leakage",
    ):  # fmt: skip
        assert signal_of(name) is not None, name
    assert signal_of("my own metric") is None
    assert set(KINDS)
