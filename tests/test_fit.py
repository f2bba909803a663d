"""fit: the search is exact, the table is what the calculator says, the exit code is the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import PLAN, Terminal
from hypothesis import given, settings
from hypothesis import strategies as st

import ftplan
from ftplan.fit.reach import largest
from ftplan.fit.ways import ways_to_train
from ftplan.spec import Batch, Checkpointing, Hardware, Loss, Method, Model, Plan, Precision


@pytest.fixture
def ftplan_(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys)


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(1, 4096))
def test_largest_is_exact(limit: int, most: int) -> None:
    """The search finds the last size that fits, never more than it may, in few calls."""
    calls: list[int] = []

    def fits(n: int) -> bool:
        calls.append(n)
        return n <= limit

    assert largest(fits, most=most) == min(limit, most)
    assert len(calls) <= 2 * most.bit_length() + 2


def test_ways_keep_what_the_plan_says() -> None:
    """What a plan fixes is not varied; what it leaves open is."""
    model = Model(name="gpt2")
    open_ways = [way.name for way in ways_to_train(Plan(model=model))]
    fixed = Plan(
        model=model, gradient_checkpointing=Checkpointing(kind="full"), loss=Loss(kind="fused")
    )
    assert [way.name for way in ways_to_train(fixed)] == ["full", "lora", "qlora", "last 2 blocks"]
    assert set(open_ways) > {"full", "full, checkpointed", "qlora, checkpointed, chunked loss"}
    planned = Plan(model=model, method=Method(kind="dora"))
    assert next(iter(ways_to_train(planned))).plan is planned


def test_ways_store_the_base_as_their_method_needs() -> None:
    """QLoRA rounds the base, full finetuning cannot, and a user's own format is kept."""
    bf16 = Plan(model=Model(name="gpt2"), precision=Precision(weights="bf16"))
    stored = {
        way.plan.method.kind: way.plan.precision.weights
        for way in ways_to_train(bf16)
        if way.plan.method
    }
    assert stored == {"full": "bf16", "lora": "bf16", "qlora": "nf4", "partial": "bf16"}
    fp4 = Plan(model=Model(name="gpt2"), precision=Precision(weights="fp4"))
    stored = {
        way.plan.method.kind: way.plan.precision.weights
        for way in ways_to_train(fp4)
        if way.plan.method
    }
    assert stored == {"full": None, "lora": None, "qlora": "fp4", "partial": None}


def small(gpu: str | None = "t4-16gb", **batch: int) -> Plan:
    return Plan(
        model=Model(name="smollm2-135m"),
        gradient_checkpointing=Checkpointing(kind="full"),
        loss=Loss(kind="full"),
        batch=Batch(micro=1, seq_len=1024, **batch),
        hardware=Hardware(gpu=gpu),
    )


def test_limits_are_limits() -> None:
    """At the largest micro batch the job fits, and with one more it does not."""
    from dataclasses import replace

    answer = ftplan.fit(small())
    row = next(r for r in answer.rows if r.way == "lora")
    assert row.largest_micro is not None
    for micro, fits in ((row.largest_micro, True), (row.largest_micro + 1, False)):
        plan = replace(
            small(),
            method=Method(kind="lora"),
            batch=Batch(micro=micro, seq_len=1024),
        )
        assert (ftplan.estimate(plan).verdict == "fits") is fits


def test_rows_are_the_calculator_s() -> None:
    """A row's peak is what estimate says about the same plan."""
    from dataclasses import replace

    answer = ftplan.fit(small())
    row = next(r for r in answer.rows if r.way == "full")
    report = ftplan.estimate(replace(small(), method=Method(kind="full")))
    assert report.device_bytes is not None
    assert row.peak_bytes == report.device_bytes.expected
    assert answer.recommended == "full"


def test_exit_codes(ftplan_: Terminal) -> None:
    """0 when something fits, 1 when nothing does, 2 when it cannot be said."""
    fixed = ("--gradient-checkpointing", "--loss", "full", "--seq-len", "512")
    assert ftplan_("fit", "--model", "smollm2-135m", "--gpu", "t4", *fixed).code == 0
    nothing = ftplan_("fit", "--model", "llama-3.1-405b", "--gpu", "t4", *fixed)
    assert nothing.code == 1
    assert "nothing fits" in nothing.out
    unknown = ftplan_("fit", "--model", "nothing-like-it", "--gpu", "t4")
    assert (unknown.code, unknown.out) == (2, "")
    assert ftplan_("fit", "--params", "13e9", "--gpu", "t4").code == 2


def test_cheapest_card(ftplan_: Terminal) -> None:
    """With prices of the user's own, the cheapest card that fits comes first."""
    said = ftplan_(
        "fit", "--model", "smollm2-135m", "--gpu", "t4", "--gradient-checkpointing",
        "--loss", "full", "--seq-len", "512", "--price", "h100-80gb=1.5", "--price", "t4-16gb=2",
        "--format", "json",
    )  # fmt: skip
    assert [(g["gpu"], g["price_per_hour"]) for g in said.data["gpus"]] == [
        ("h100-80gb", 1.5),
        ("t4-16gb", 2.0),
    ]
    wrong = ftplan_("fit", "--model", "smollm2-135m", "--price", "t4")
    assert (wrong.code, wrong.out) == (2, "")
    assert "--price" in wrong.err


def test_a_plan_file_comes_first(
    ftplan_: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan itself is the first row, and is taken when it fits."""
    monkeypatch.chdir(tmp_path)
    text = PLAN.replace("llama-3.1-8b", "smollm2-135m") + "loss: full\n"
    Path("plan.yaml").write_text(text)
    data = ftplan_("fit", "plan.yaml", "--format", "json").data
    assert data["rows"][0]["way"] == data["recommended"] == "as planned"
    assert data["schema_version"] == 1
    assert "as planned" in ftplan_("fit", "plan.yaml").out
    assert "| as planned |" in ftplan_("fit", "plan.yaml", "--format", "markdown").out
