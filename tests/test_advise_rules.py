"""Every rule, by the same tests: a registry is only as good as its worst row."""

from __future__ import annotations

import re

import pytest

from ftplan.advice import STEPS
from ftplan.advise import KINDS, RULES, TESTS, Rule, advise, explain_page, rules
from ftplan.advise.explain import HEADINGS
from ftplan.advise.facts import Facts
from ftplan.errors import UnknownNameError

ALL = pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.code)
FROZEN = {"EVL": 7, "PRM": 9, "RAG": 8, "FTN": 9, "MTH": 14, "OPS": 15}
"""Codes are permanent: numbers may be added at the end, never removed or reused."""


@ALL
def test_examples_do_what_they_say(rule: Rule) -> None:
    """The first example fires the rule, the second is known not to."""
    assert rule.when(Facts(rule.fires)).value is True
    assert rule.when(Facts(rule.rests)).value is False
    assert rule.code in advise(rule.fires).fired
    assert rule.code not in advise(rule.rests).fired


@ALL
def test_a_rule_says_everything(rule: Rule) -> None:
    """Title, preconditions, reason, sources with marks, strength, stop and flip are there."""
    assert re.fullmatch(r"(EVL|PRM|RAG|FTN|MTH|OPS)\d{3}", rule.code)
    assert rule.title and not rule.title.endswith(".")
    assert rule.checks.endswith(".") and rule.reason.endswith(".")
    assert rule.sources and rule.stop_when and rule.flips_if
    assert rule.step is None or rule.step in STEPS
    assert set(rule.blocks) <= set(STEPS)
    assert rule.step not in rule.blocks


@ALL
def test_a_page_has_fixed_headings(rule: Rule) -> None:
    """Explain and docs show the same headings in the same order, none of them empty."""
    page = explain_page(rule.code.lower())
    assert tuple(section.heading for section in page.sections) == HEADINGS
    assert all(section.text.strip() for section in page.sections)
    text = page.markdown()
    assert text.startswith(f"# {rule.code}: ")
    assert "__" not in text and "<function" not in text


def test_codes_are_permanent_and_without_gaps() -> None:
    """Each room counts from 001; the numbers that were given stay."""
    for prefix, number in FROZEN.items():
        codes = [code for code in RULES if code.startswith(prefix)]
        assert codes == [f"{prefix}{i:03}" for i in range(1, len(codes) + 1)]
        assert len(codes) >= number


def test_rules_can_be_searched_and_misspelt() -> None:
    """Words narrow the list; a wrong code is answered with near ones."""
    assert [rule.code for rule in rules("BM25")] == ["RAG002"]
    assert len(rules()) == len(RULES)
    with pytest.raises(UnknownNameError) as caught:
        explain_page("RAG02")
    assert "RAG002" in caught.value.suggestions


def test_taxonomy_is_complete() -> None:
    """33 kinds, numbered, each with tests that exist, and no step both called for and useless."""
    assert sorted(kind.number for kind in KINDS.values()) == list(range(1, 34))
    for kind in KINDS.values():
        assert set(kind.tests) <= set(TESTS)
        assert not set(kind.ladder) & set(kind.not_helping), kind.name
        assert kind.ladder and kind.evidence


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_what_does_not_help_is_not_advised(kind: object) -> None:
    """For a kind alone, whatever retrieval is in place, no step of its useless ones is taken."""
    from ftplan.advise.taxonomy import Kind
    from ftplan.failures import Failure, FailuresFile, Rag, State

    assert isinstance(kind, Kind)
    retrieval: tuple[Rag | None, ...] = (None, "none", "full_context", "term", "hybrid")
    for rag in retrieval:
        for labelled in (None, 5, 5_000):
            state = State(eval_pipeline=True, rag=rag, labelled_examples=labelled)
            rows = (Failure(kind=kind.name, count=40),)
            answer = advise(FailuresFile(state=state, failures=rows))
            assert answer.destination.step not in kind.not_helping, (rag, labelled)
