"""What holds of the engine for every failures file, not only for stories that happened."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftplan.advice import CHEAP_STEPS, STEPS, Advice, advice_to_dict
from ftplan.advise import KINDS, RULES, TESTS, advise
from ftplan.failures import Failure, FailuresFile, State

RANK = "ABCD"
FRACTION = st.sampled_from([0.0, 0.1, 0.35, 0.5, 0.57, 0.7, 0.85, 0.9, 0.94, 0.97, 1.0])
COUNT = st.sampled_from([0, 1, 3, 4, 5, 10, 19, 20, 49, 50, 100, 499, 500, 1000, 20_000])
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "annotator_agreement": FRACTION,
    "accuracy": FRACTION,
    "target_accuracy": FRACTION,
    "retrieval_recall": FRACTION,
    "oracle_context_fixes": FRACTION,
    "larger_model_fixes": st.one_of(st.booleans(), FRACTION),
    "sft_gain": st.sampled_from([-2.0, 0.0, 4.0]),
    "rag": st.sampled_from(["none", "full_context", "term", "embedding", "hybrid"]),
    "knowledge_changes": st.sampled_from(["never", "yearly", "monthly", "weekly", "daily"]),
    "base_model_churn": st.sampled_from(["low", "high"]),
    "task_diversity": st.sampled_from(["low", "high"]),
    "corpus_tokens": st.sampled_from([0, 120_000, 5_000_000, 2_000_000_000]),
    "saving_per_call": st.sampled_from([-1.0, 0.0, 0.01]),
    "tuning_cost_per_month": st.sampled_from([0.0, 2_000.0]),
    "monthly_calls": st.sampled_from([0, 10_000, 9_000_000]),
    **dict.fromkeys(
        (
            "eval_examples",
            "prompt_iterations",
            "few_shot_examples",
            "oracle_context_tested",
            "labelled_examples",
            "preference_pairs",
            "unpaired_feedback",
        ),
        COUNT,
    ),
}
KEYS = [f.name for f in dataclasses.fields(State)]


@st.composite
def states(draw: st.DrawFn) -> State:
    """Any state, from empty to complete."""
    keys = draw(st.one_of(st.just(KEYS), st.lists(st.sampled_from(KEYS), unique=True)))
    return State(**{key: draw(VALUES.get(key, st.booleans())) for key in keys})


@st.composite
def failures(draw: st.DrawFn) -> Failure:
    """Any row: kinds of the list and others, with and without counts, classes and tests."""
    kind = draw(st.one_of(st.none(), st.sampled_from([*KINDS, "wrong_label", "my_own"])))
    number = draw(st.sampled_from([{}, {"count": 3}, {"count": 0}, {"count": 30}, {"share": 0.25}]))
    classes = [None, "information", "behavior", "capability", "evaluation", "operational"]
    own = draw(st.sampled_from(classes)) if draw(st.booleans()) else None
    tests = draw(
        st.dictionaries(
            st.sampled_from(sorted(TESTS)), st.sampled_from(["pass", "fail"]), max_size=3
        )
    )
    return Failure(
        id=draw(st.sampled_from([None, "a", "b"])),
        kind=kind,
        class_=own,  # type: ignore[arg-type]
        tests=tests or None,  # type: ignore[arg-type]
        **number,
    )


TOLD_TWICE = {"oracle_context": "oracle_context_fixes", "larger_model": "larger_model_fixes"}


def _file(state: State, rows: list[Failure]) -> FailuresFile:
    """A file in which no experiment is told twice, by the state and by the items, differently:
    to forget one of two contradicting tellings is to learn, not to forget."""
    if state.oracle_context_fixes is not None:
        state = dataclasses.replace(state, gold_context_in_prompt=None)
    told = {test for test, key in TOLD_TWICE.items() if getattr(state, key) is not None}
    if state.gold_context_in_prompt is not None:
        told.add("oracle_context")
    kept = []
    for row in rows:
        tests = {name: result for name, result in (row.tests or {}).items() if name not in told}
        kept.append(dataclasses.replace(row, tests=tests or None))
    return FailuresFile(state=state, failures=tuple(kept))


FILES = st.builds(_file, states(), st.lists(failures(), max_size=5))
MANY = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))


def _surer(less: Advice, more: Advice) -> bool:
    """``less``, which knows less, claims more."""
    stronger = RANK.index(less.recommendation.strength) < RANK.index(more.recommendation.strength)
    waiting = {u.rule for u in more.undetermined} - {u.rule for u in less.undetermined}
    return stronger or bool(waiting)


@MANY
@given(FILES)
def test_any_file_gets_a_consistent_answer(file: FailuresFile) -> None:
    """No state crashes it, and the parts of the answer agree with one another."""
    answer = advise(file)
    closed = {entry.step for entry in answer.blocked}
    assert answer.plan[0] == answer.recommendation.step
    assert answer.plan[-1] == answer.destination.step
    assert len(set(answer.plan)) == len(answer.plan)
    assert not closed & {*answer.plan, *(a.step for a in answer.alternatives)}
    assert set(answer.plan[:-1]) <= set(CHEAP_STEPS)
    open_rules = {u.rule for u in answer.undetermined}
    assert not open_rules & set(answer.fired)
    assert {entry.rule for entry in answer.blocked} <= set(answer.fired)
    assert set(answer.recommendation.rules) <= open_rules | set(answer.fired)
    assert set(answer.destination.rules) <= open_rules | set(answer.fired)
    assert all(u.needs for u in answer.undetermined)
    assert [s.step for s in answer.workflow if s.status == "next"] == [answer.plan[0]]
    assert answer.recommendation.reason and answer.recommendation.stop_when
    assert all(0 <= s.share <= 1 for s in answer.shares if s.share is not None)
    assert set(answer.plan) <= set(STEPS)
    assert advice_to_dict(answer)["recommendation"]["step"] == answer.plan[0]


@MANY
@given(FILES, st.data())
def test_forgetting_a_key_never_makes_it_surer(file: FailuresFile, data: st.DataObject) -> None:
    """Without a key of the state the strength does not rise and no open rule closes."""
    known = [key for key in KEYS if getattr(file.state, key) is not None]
    if not known:
        return
    key = data.draw(st.sampled_from(known))
    less = dataclasses.replace(file, state=dataclasses.replace(file.state, **{key: None}))
    assert not _surer(advise(less), advise(file)), key


@MANY
@given(FILES, st.data())
def test_forgetting_how_often_never_makes_it_surer(file: FailuresFile, data: st.DataObject) -> None:
    """Without the count or share of a row the strength does not rise and no open rule closes."""
    if not file.failures:
        return
    index = data.draw(st.integers(0, len(file.failures) - 1))
    rows = list(file.failures)
    if rows[index].count == 0:  # a kind that did not occur; without its count it did
        return
    rows[index] = dataclasses.replace(rows[index], count=None, share=None)
    assert not _surer(advise(dataclasses.replace(file, failures=tuple(rows))), advise(file))


@MANY
@given(FILES, st.randoms(use_true_random=False))
def test_order_of_failures_changes_nothing(file: FailuresFile, chance: random.Random) -> None:
    """The same rows in another order give the same answer, to the last field."""
    rows = list(file.failures)
    chance.shuffle(rows)
    assert advise(dataclasses.replace(file, failures=tuple(rows))) == advise(file)


@MANY
@given(FILES, st.data())
def test_more_of_a_kind_never_lowers_its_share(file: FailuresFile, data: st.DataObject) -> None:
    """One more failure in a counted row raises that kind's share or leaves it."""
    counted = [i for i, row in enumerate(file.failures) if row.count]
    if not counted:
        return
    index = data.draw(st.sampled_from(counted))
    rows = list(file.failures)
    rows[index] = dataclasses.replace(rows[index], count=(rows[index].count or 0) + 1)
    before = advise(file)
    after = advise(dataclasses.replace(file, failures=tuple(rows)))
    for old in before.shares:
        for new in after.shares:
            same = (old.class_, old.kind) == (new.class_, new.kind)
            if same and old.kind == rows[index].kind and old.share is not None:
                mine = rows[index].class_ in (None, old.class_)
                grew = new.count is not None and old.count is not None and new.count > old.count
                if mine and grew:
                    assert new.share is not None and new.share >= old.share - 1e-12


@MANY
@given(states())
def test_every_rule_can_be_asked_in_every_state(state: State) -> None:
    """No predicate raises, whatever the state."""
    advise(FailuresFile(state=state, failures=tuple(Failure(kind=kind, count=1) for kind in KINDS)))
    assert RULES
