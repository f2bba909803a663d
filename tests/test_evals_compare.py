"""Comparing two runs: pairing by item, exact p values, repeats clustered by item."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftplan.errors import UnknownNameError
from ftplan.evals import compare_runs, pick_variant
from ftplan.render.comparison import render_comparison, render_comparison_markdown
from ftplan.render.json import render as render_json
from ftplan.results import Check, EvalRun, ResultRow


def run(*verdicts: bool | None, start: int = 0, name: str = "run", repeats: int = 1) -> EvalRun:
    """A run over items start, start + 1 ..., each answered ``repeats`` times alike."""
    rows = [
        ResultRow(
            id=f"{item}-{repeat}",
            item=f"item {item}",
            passed=verdict,
            error="timeout" if verdict is None else "",
            checks=(Check(name="match", passed=verdict),),
        )
        for item, verdict in enumerate(verdicts, start=start)
        for repeat in range(repeats)
    ]
    return EvalRun(tool="t", source=name, rows=tuple(rows))


verdicts = st.lists(st.sampled_from([True, False, None]), max_size=30)


def test_the_published_table_of_least_evidence() -> None:
    """Six fixed and none broken is the least that is significant; five is not."""
    assert compare_runs(run(*[False] * 6), run(*[True] * 6)).verdict == "better"
    five = compare_runs(run(*[False] * 5), run(*[True] * 5))
    assert five.verdict == "no significant change" and "never" in five.sentence
    worse = compare_runs(run(*[True] * 6), run(*[False] * 6))
    assert worse.verdict == "worse" and len(worse.broke) == 6


def test_p_value_of_two_against_ten() -> None:
    """Ten fixed and two broken: p = 0.03857, as statsmodels computes it."""
    before = run(*[False] * 10, *[True] * 2, *[True] * 20)
    after = run(*[True] * 10, *[False] * 2, *[True] * 20)
    found = compare_runs(before, after)
    assert found.p_value == pytest.approx(0.03857, abs=1e-5)
    assert found.difference == pytest.approx(8 / 32)
    assert found.low is not None and found.high is not None
    assert found.low < 8 / 32 < found.high


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(verdicts, verdicts)
def test_every_item_is_counted_once(before: list[bool | None], after: list[bool | None]) -> None:
    """Paired, unjudged and unpaired items are all the items of both runs."""
    found = compare_runs(run(*before), run(*after, start=3))
    items = {f"item {i}" for i in range(len(before))}
    items |= {f"item {i}" for i in range(3, 3 + len(after))}
    counted = found.paired + len(found.only_before) + len(found.only_after) + len(found.not_judged)
    assert counted == len(items)
    same = found.unchanged_pass + found.unchanged_fail
    assert found.paired == len(found.fixed) + len(found.broke) + same
    assert (found.p_value is None) == (found.paired == 0)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(verdicts)
def test_a_run_compared_with_itself(given_verdicts: list[bool | None]) -> None:
    """Nothing changes against itself."""
    same = run(*given_verdicts)
    found = compare_runs(same, same)
    assert not found.fixed and not found.broke
    assert found.p_value in (None, 1.0)


def test_no_change_seen_is_no_certainty() -> None:
    """The interval of the difference has a width though nothing, or everything, changed."""
    for before, after in ((True, True), (False, True)):
        found = compare_runs(run(*[before] * 3), run(*[after] * 3))
        assert found.low is not None and found.high is not None
        assert found.low < found.high <= 1 and found.high - found.low > 0.3


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(verdicts, verdicts)
def test_the_other_way_round(before: list[bool | None], after: list[bool | None]) -> None:
    """Swapping the runs swaps what got fixed and broke, and keeps the p value."""
    there, back = compare_runs(run(*before), run(*after)), compare_runs(run(*after), run(*before))
    assert [each.item for each in there.fixed] == [each.item for each in back.broke]
    assert there.p_value == back.p_value


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(verdicts, verdicts, st.integers(2, 4))
def test_identical_repeats_prove_nothing_more(
    before: list[bool | None], after: list[bool | None], repeats: int
) -> None:
    """Answering every item several times alike does not make the evidence stronger."""
    once = compare_runs(run(*before), run(*after))
    often = compare_runs(run(*before, repeats=repeats), run(*after, repeats=repeats))
    assert (once.p_value, once.paired) == (often.p_value, often.paired)
    assert once.difference == (
        None if often.difference is None else pytest.approx(often.difference)
    )


def test_repeats_are_averaged() -> None:
    """An item right in one of two epochs before and in both after is an improvement by half."""
    flaky = EvalRun(
        tool="t",
        rows=(
            ResultRow(id="a1", item="a", passed=True),
            ResultRow(id="a2", item="a", passed=False),
        ),
    )
    steady = replace(flaky, rows=tuple(replace(row, passed=True) for row in flaky.rows))
    found = compare_runs(flaky, steady)
    assert found.repeated and found.difference == 0.5
    assert [(each.before, each.after) for each in found.fixed] == [(0.5, 1.0)]


def test_crashes_are_left_out_and_said() -> None:
    """An item without an answer on either side is in no rate, and the notes say so."""
    found = compare_runs(run(True, None), run(True, False))
    assert found.paired == 1 and found.not_judged == ("item 1",)
    assert any("without an answer" in note for note in found.notes)


def test_variants_can_be_picked() -> None:
    """A file with two prompts can be compared with itself, one prompt against the other."""
    rows = tuple(
        ResultRow(id=f"{item}{name}", item=str(item), variant=name, passed=name == "new prompt")
        for item in range(7)
        for name in ("old prompt", "new prompt")
    )
    both = EvalRun(tool="t", source="f.json", rows=rows)
    found = compare_runs(pick_variant(both, "old prompt"), pick_variant(both, "new"))
    assert found.verdict == "better" and not found.repeated
    assert any("variants" in note for note in compare_runs(both, both).notes)
    with pytest.raises(UnknownNameError):
        pick_variant(both, "prompt")
    with pytest.raises(UnknownNameError):
        pick_variant(both, "third")


def test_nothing_in_common() -> None:
    """Runs over different items are not comparable, and no number pretends otherwise."""
    found = compare_runs(run(True), run(True, start=5))
    assert found.verdict == "not comparable"
    assert found.before_rate is found.difference is found.p_value is None
    assert "-" in render_comparison(found)


def test_windows() -> None:
    """Table, markdown and JSON show the same verdict and the items that changed."""
    nasty = run(*[True] * 7, name="b|e\x1b[31mfore")
    after = run(*[False] * 7, name="after")
    found = compare_runs(nasty, after)
    table = render_comparison(found, width=80)
    assert "Worse: 0 fixed, 7 broke of 7 paired items" in table
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "\x1b" not in table
    markdown = render_comparison_markdown(found)
    assert "| broke | 7 |" in markdown and "b\\|e" in markdown
    data = json.loads(render_json(found))
    assert data["schema_version"] == 1 and data["verdict"] == "worse" and len(data["broke"]) == 7
    assert "\x1b[" in render_comparison(found, colour=True)
