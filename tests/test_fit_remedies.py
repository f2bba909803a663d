"""What would help: every claim of a remedy is sized again from the plan it leads to."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

import ftplan
from ftplan.errors import FtplanError
from ftplan.files.document import parse_document
from ftplan.files.plan import dump_plan, parse_plan
from ftplan.fit.changes import apply_change
from ftplan.front import api
from ftplan.report import Remedy, Report
from ftplan.spec import (
    Batch,
    Hardware,
    Method,
    Model,
    OptimizerChoice,
    Plan,
    Precision,
)


def plan(model: str = "llama-3.1-8b", gpu: str = "a10g", **more: Any) -> Plan:
    more.setdefault("method", Method(kind="lora"))
    more.setdefault("hardware", Hardware(gpu=gpu))
    return Plan(model=Model(name=model), **more)


CASES = {
    "lora": plan(),
    "lora, large batch": plan(batch=Batch(micro=8, seq_len=4096)),
    "eager": plan(attention="eager", batch=Batch(micro=2, seq_len=4096)),
    "full": plan(method=Method(kind="full")),
    "full, fp32": plan(
        gpu="a100-80gb",
        method=Method(kind="full"),
        precision=Precision(weights="fp32", mixed="bf16"),
        optimizer=OptimizerChoice(name="adamw_torch"),
    ),
    "qlora": plan(method=Method(kind="qlora"), batch=Batch(micro=4)),
    "t4": plan(gpu="t4"),
    "several cards": plan(
        "llama-3.1-70b",
        method=Method(kind="full"),
        hardware=Hardware(gpu="h100-80gb", count=8),
    ),
    "serving": plan("llama-3.1-70b", "a100-80gb", method=None, batch=Batch(micro=32, seq_len=8192)),
    "hopeless": plan("llama-3.1-405b", "t4", method=Method(kind="full")),
}


@cache
def answered(case: str) -> tuple[Plan, Report]:
    given = CASES[case]
    return given, ftplan.estimate(given)


def sized(changed: Plan) -> Report:
    return api.estimate(changed, with_remedies=False)


@pytest.mark.parametrize("case", CASES)
def test_each_verdict_is_that_of_the_changed_plan(case: str) -> None:
    """A remedy's verdict is what `estimate` says of the plan with it and all earlier changes."""
    changed, report = answered(case)
    assert report.verdict in ("over", "tight")
    assert report.remedies
    for remedy in report.remedies:
        changed = apply_change(changed, remedy.change)
        assert sized(changed).verdict == remedy.verdict, remedy


@pytest.mark.parametrize("case", CASES)
def test_the_list_ends_where_it_fits(case: str) -> None:
    """Only the last remedy fits; a list that reaches no fit ends by saying so."""
    _, report = answered(case)
    *before, last = report.remedies
    assert all(remedy.verdict != "fits" for remedy in before)
    assert (last.verdict == "fits") == bool(last.change)
    if not last.change:
        assert "none of these" in last.costs or "no change" in last.costs


@pytest.mark.parametrize("case", CASES)
def test_saves_is_the_change_by_itself(case: str) -> None:
    """`saves_bytes` is how much lower the allocator's peak is with this change alone."""
    given, report = answered(case)
    assert report.allocated_bytes
    for remedy in report.remedies:
        if not remedy.change:
            continue
        try:
            alone = sized(apply_change(given, remedy.change))
        except FtplanError:
            continue
        assert alone.allocated_bytes
        saved = report.allocated_bytes.expected - alone.allocated_bytes.expected
        assert remedy.saves_bytes == saved
        assert remedy.verdict_alone == alone.verdict


def dear(remedy: Remedy) -> int:
    """Rough class of a change: 0 nothing but speed is lost, 1 quality, 2 hardware."""
    change = remedy.change
    if "hardware" in change:
        return 2
    if "offload" in str(change):
        return 1
    lossless = {"loss", "kernels", "gradient_checkpointing", "attention", "optimizer", "sharding"}
    is_micro = set(change.get("batch", {})) <= {"micro", "accumulation", "packing", "padding"}
    return 0 if set(change) <= lossless or (set(change) == {"batch"} and is_micro) else 1


@pytest.mark.parametrize("case", sorted(set(CASES) - {"serving"}))
def test_nothing_lost_comes_first(case: str) -> None:
    """What loses nothing comes before what costs quality, and hardware is last."""
    _, report = answered(case)
    ranks = [dear(remedy) for remedy in report.remedies if remedy.change]
    assert ranks == sorted(ranks)


def test_a_smaller_micro_batch_keeps_the_step() -> None:
    """Accumulation goes up as the micro batch goes down: tokens per step stay the same."""
    given, report = answered("lora, large batch")
    for remedy in report.remedies:
        given = apply_change(given, remedy.change)
    assert given.batch.micro is not None
    assert given.batch.micro < 8
    assert given.batch.micro * (given.batch.accumulation or 1) == 8


def test_nothing_that_is_not_needed() -> None:
    """Leaving out any paid change of a list that fits makes the job not fit."""
    for case in ("lora, large batch", "t4", "full"):
        given, report = answered(case)
        assert report.remedies[-1].verdict == "fits"
        for left_out in report.remedies:
            if left_out.costs.startswith("nothing"):
                continue
            changed = given
            for remedy in report.remedies:
                if remedy is not left_out:
                    changed = apply_change(changed, remedy.change)
            assert sized(changed).verdict != "fits", (case, left_out)


@pytest.mark.parametrize("case", CASES)
def test_the_mended_plan_can_be_written(case: str) -> None:
    """A plan with all changes is a plan file that reads back as the same plan."""
    given, report = answered(case)
    for remedy in report.remedies:
        given = apply_change(given, remedy.change)
    assert parse_plan(parse_document(dump_plan(given), file="plan.yaml")) == given


def test_a_job_that_fits_has_none() -> None:
    """Remedies are for jobs that do not fit."""
    assert ftplan.estimate(plan(gpu="h100-80gb")).remedies == ()
