"""Failures files: strict about keys, generous about what a failure is."""

from __future__ import annotations

import pytest

from ftplan.errors import InputError
from ftplan.failures import FailuresFile
from ftplan.files.document import parse_document
from ftplan.files.failures import dump_failures, looks_like_failures, parse_failures
from ftplan.files.starter import STARTERS


def failures(text: str) -> FailuresFile:
    return parse_failures(parse_document(text, file="f.yaml"))


def test_a_full_file() -> None:
    """A kind of the user's own is kept, numbers and structures in an item's texts are texts."""
    found = failures(
        """\
version: 1
state: {accuracy: 85%, rag: none, larger_model_fixes: 0.4, oracle_context_fixes: true}
failures:
  - {id: 17, kind: our own kind, class: behavior, count: 3, output: 1e3, expected: {a: 1}}
  - {kind: outdated_knowledge, share: 12%, context: one passage, tests: {few_shot: fail}}
  - {}
"""
    )
    first, second, empty = found.failures
    assert (first.id, first.kind, first.class_) == ("17", "our own kind", "behavior")
    assert (first.output, first.expected) == ("1e3", '{"a": 1}')
    assert second.share == 0.12
    assert second.context == ("one passage",)
    assert found.state.accuracy == 0.85
    assert found.state.oracle_context_fixes is True
    assert empty.kind is None


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("- 1\n", "1:1", "a list"),
        ("version: 2\n", "1:1", "the number 2"),
        ("state: {acuracy: 1}\n", "1:9", "unknown key 'acuracy'"),
        ("state: {accuracy: 85}\n", "1:9", "cannot be 85"),
        ("state: {accuracy: '85'}\n", "1:9", "the text '85'"),
        ("state: {accuracy: 120%}\n", "1:9", "more than 100%"),
        ("state: {rag: maybe}\n", "1:9", "the text 'maybe'"),
        ("state: {eval_examples: -1}\n", "1:9", "cannot be -1"),
        ("state: {eval_pipeline: 1}\n", "1:9", "true or false"),
        ("failures: 3\n", "1:1", "is a list"),
        ("failures: [3]\n", "1:12", "is a mapping"),
        ("failures:\n- kind: 3\n", "2:3", "is a text"),
        ("failures:\n- class: behaviour\n", "2:3", "the text 'behaviour'"),
        ("failures:\n- tests: {a: yes}\n", "2:11", "the boolean true"),
        ("failures:\n- {count: 1, share: 0.1}\n", "2:3", "not both"),
        ("failures:\n- {count: 1.5}\n", "2:4", "whole number"),
    ],
)
def test_refusals(text: str, place: str, message: str) -> None:
    """A mistake is refused at its key."""
    with pytest.raises(InputError) as caught:
        failures(text)
    assert message in caught.value.message
    assert str(caught.value.location) == f"f.yaml:{place}"


def test_unknown_is_not_false() -> None:
    """What is left out or null is None, never a default."""
    found = failures("version: 1\nstate: {eval_pipeline: null}\nfailures:\n")
    assert found.state.eval_pipeline is None
    assert found.state.finetuned is None
    assert found.failures == ()


@pytest.mark.parametrize("text", [STARTERS["failures"], "version: 1\nfailures:\n- {}\n"])
def test_round_trip(text: str) -> None:
    """What is written reads back the same."""
    found = failures(text)
    assert failures(dump_failures(found)) == found


def test_detection() -> None:
    """A failures file is told from a tool's results."""
    assert looks_like_failures(parse_document("state: {}\n", file="f"))
    assert not looks_like_failures(parse_document("results: []\n", file="f"))
