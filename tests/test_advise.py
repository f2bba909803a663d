"""The engine on stories: golden ones of our own, and the published ones where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from advise_cases import Story, stories

from ftplan.advice import STEPS, advice_to_dict
from ftplan.advise import KINDS, advise, choose_method
from ftplan.failures import Failure, FailuresFile, State

STORIES = stories()
SHARED = Path(__file__).parents[2] / "shared" / "data" / "advice-cases.json"
COARSE = {"full_context": "prompt", "constrain_output": "prompt"}
"""Finer steps that the published stories count under a coarser one."""


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_golden_story(story: Story) -> None:
    """The destination, the recommendation and what must not be advised are as the sources say."""
    answer = advise(story.file)
    steps = {answer.recommendation.step, answer.destination.step}
    assert answer.destination.step in story.destination
    if story.recommendation:
        assert answer.recommendation.step in story.recommendation
    assert not steps & set(story.never)


def test_golden_stories_are_many_and_justified() -> None:
    """At least 40 stories ran; each says why and from where; steps and kinds are all covered."""
    assert len(STORIES) >= 40
    assert all("Why:" in story.header and "Source:" in story.header for story in STORIES)
    expected = {step for story in STORIES for step in story.destination}
    expected |= {step for story in STORIES for step in story.recommendation}
    assert expected == set(STEPS)
    aliases = {alias: kind.name for kind in KINDS.values() for alias in kind.aliases}
    kinds = {aliases.get(f.kind or "", f.kind) for s in STORIES for f in s.file.failures}
    assert set(KINDS) <= kinds


def _published() -> list[dict[str, Any]]:
    if not SHARED.exists():
        return []
    cases: list[dict[str, Any]] = json.loads(SHARED.read_text(encoding="utf-8"))
    return cases


def _file(case: dict[str, Any], *, assumed: bool) -> FailuresFile:
    left_out = () if assumed else case["state_assumed"]
    state = {k: v for k, v in case["state"].items() if v is not None and k not in left_out}
    rows = []
    for row in case["failures"]:
        number = row["count_or_share"]
        if not assumed and case["shares_assumed"]:
            number = None
        how_many: dict[str, Any] = {}
        if number is not None:
            how_many = {"share": number} if isinstance(number, float) else {"count": number}
        rows.append(Failure(kind=row["kind"], class_=row["class"], **how_many))
    return FailuresFile(state=State(**state), failures=tuple(rows))


@pytest.mark.parametrize("assumed", [True, False], ids=["as given", "assumptions removed"])
def test_published_stories(assumed: bool) -> None:
    """20 of 22 published stories end on an accepted step and none on an unacceptable one."""
    cases = _published()
    if not cases:
        pytest.skip("the published stories (shared/data/advice-cases.json) are not here")
    assert len(cases) == 22
    accepted = []
    for case in cases:
        answer = advise(_file(case, assumed=assumed))
        steps = {answer.recommendation.step, answer.destination.step}
        assert not steps & set(case["unacceptable"]), case["id"]
        coarse = steps | {COARSE[step] for step in steps if step in COARSE}
        accepted.append(bool(coarse & set(case["expected_next"])))
    assert sum(accepted) >= 20


def test_unknown_is_not_false() -> None:
    """An empty state fires no gate and closes nothing by what it does not say; and it asks."""
    answer = advise(FailuresFile(failures=(Failure(id="t-1", kind="outdated_knowledge"),)))
    assert {entry.rule for entry in answer.blocked} == {"FTN005"}  # by the kind, not the state
    assert answer.recommendation.step == "evaluate_first"
    assert "EVL001" in {entry.rule for entry in answer.undetermined}
    assert answer.next_test is not None
    assert answer.next_test.items == ("t-1",)
    assert answer.recommendation.strength in "CD"


def test_twenty_labelled_failures_imply_an_evaluation_and_it_says_so() -> None:
    """Behind an unknown evaluation, 20 labelled failures are taken as one, under assumptions."""
    rows = (Failure(kind="wrong_tone_style", count=20),)
    answer = advise(FailuresFile(failures=rows))
    assert answer.recommendation.step != "evaluate_first"
    assert any("evaluation exists" in line for line in answer.assumptions)
    fewer = advise(FailuresFile(failures=(Failure(kind="wrong_tone_style", count=19),)))
    assert fewer.recommendation.step == "evaluate_first"


def test_implications_of_the_state() -> None:
    """Examples in the prompt imply prompting, an accuracy an evaluation, a tuned model both."""
    rows = (Failure(kind="wrong_tone_style"),)
    for state, plan in (
        (State(eval_pipeline=True, few_shot_examples=8), ("finetune",)),
        (State(accuracy=0.7), ("prompt", "few_shot", "finetune")),
        (State(finetuned=True), ("finetune",)),
    ):
        assert advise(FailuresFile(state=state, failures=rows)).plan == plan


def test_shares_have_wilson_intervals_and_unknown_counts_have_none() -> None:
    """7 of 20 is 18 % to 57 %; with a row of unknown number no share is claimed."""
    known = (Failure(kind="wrong_format", count=7), Failure(kind="cost", count=13))
    share = next(s for s in advise(FailuresFile(failures=known)).shares if s.count == 7)
    assert share.low == pytest.approx(0.18119, abs=1e-5)
    assert share.high == pytest.approx(0.56715, abs=1e-5)
    unknown = (*known, Failure(kind="edge_case"))
    shares = advise(FailuresFile(failures=unknown)).shares
    assert all(s.share is None and s.low is None for s in shares)
    assert [s.count for s in shares if s.kind == "wrong_format"] == [7]


def test_harness_errors_do_not_count() -> None:
    """Infrastructure errors are excluded from the shares and reported as such."""
    rows = (Failure(kind="wrong_format", count=30), Failure(kind="infrastructure_error", count=5))
    answer = advise(FailuresFile(failures=rows))
    assert [s.share for s in answer.shares] == [1.0]
    assert (answer.evidence.failures, answer.evidence.excluded) == (35, 5)


def test_a_kind_of_ones_own_is_kept() -> None:
    """A name that is not in the list stays, with its class."""
    rows = (Failure(kind="price_list", class_="information", count=30),)
    answer = advise(FailuresFile(state=State(rag="none"), failures=rows))
    assert (answer.shares[0].kind, answer.shares[0].class_) == ("price_list", "information")
    assert answer.destination.step == "rag_basic"


def test_json_has_the_fields_of_the_contract() -> None:
    """The answer as JSON: names and nesting that scripts rely on."""
    rows = (Failure(id="a", kind="outdated_knowledge", count=30),)
    data = advice_to_dict(advise(FailuresFile(state=State(rag="none"), failures=rows)))
    wanted = {
        "schema_version", "tool_version", "recommendation", "destination", "alternatives",
        "blocked", "undetermined", "next_test", "shares", "evidence", "plan",
    }  # fmt: skip
    assert wanted <= set(data)
    assert set(data["recommendation"]) == {
        "step", "title", "reason", "rules", "strength", "stop_when", "flips_if",
    }  # fmt: skip
    assert set(data["destination"]) == {"step", "reason", "rules"}
    assert set(data["shares"][0]) == {"class", "kind", "count", "share", "low", "high"}
    assert set(data["evidence"]) == {"failures", "labelled", "suggested", "excluded"}
    assert set(data["next_test"]) == {"name", "why", "how", "items"}
    assert set(data["undetermined"][0]) == {"rule", "needs"}
    assert set(data["blocked"][0]) == {"step", "rule", "reason"}
    assert json.loads(json.dumps(data)) == data


def test_method_follows_data_and_memory() -> None:
    """LoRA by default, QLoRA when only that fits, full for running text when it fits."""
    state = State(labelled_examples=800)
    by_data = choose_method("finetune", state)
    by_memory = choose_method("finetune", state, fits={"lora": False, "qlora": True})
    text = choose_method("continued_pretrain", state, fits={"full": True, "lora": True})
    thumbs = choose_method("preference_finetune", State(unpaired_feedback=900))
    assert by_data is not None and (by_data.objective, by_data.kind) == ("sft", "lora")
    assert by_memory is not None and by_memory.kind == "qlora"
    assert text is not None and (text.objective, text.kind) == ("pt", "full")
    assert thumbs is not None and thumbs.objective == "kto"
    assert choose_method("rag_basic", state) is None
