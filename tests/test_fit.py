"""fit: the search is exact, the table is what the calculator says, the exit code is the answer."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import PLAN, Terminal
from hypothesis import given, settings
from hypothesis import strategies as st

import ftplan
from ftplan.fit.changes import apply_change
from ftplan.fit.sizer import largest
from ftplan.fit.ways import ways_to_train
from ftplan.fitting import FitReport, FitRow
from ftplan.sizing import Workload, sizer_of
from ftplan.spec import (
    Batch,
    Checkpointing,
    Hardware,
    Loss,
    Method,
    Model,
    Plan,
    Precision,
    Sharding,
)


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


# --- Ways ---------------------------------------------------------------------------------------


def test_ways_keep_what_the_plan_says() -> None:
    """What a plan fixes is not varied; what it leaves open is set, and said."""
    plan = Plan(
        model=Model(name="gpt2"),
        gradient_checkpointing=Checkpointing(kind="none"),
        loss=Loss(kind="fused"),
        precision=Precision(weights="fp32"),
    )
    for way in ways_to_train(plan):
        assert way.plan.gradient_checkpointing == plan.gradient_checkpointing
        assert way.plan.loss == plan.loss
        assert way.plan.precision.weights in ("fp32", "int8", "nf4")
    opened = {way.name: way for way in ways_to_train(Plan(model=Model(name="gpt2")))}
    assert {"full", "lora", "dora", "qlora", "last 2 blocks"} <= set(opened)
    assert opened["lora"].sets["gradient_checkpointing"] is True
    assert opened["qlora"].sets["precision"] == {"weights": "nf4"}


def test_a_way_is_its_changes() -> None:
    """Laying a way's fragment over the plan makes the way's plan: what is shown is what is run."""
    plan = Plan(model=Model(name="gpt2"), batch=Batch(micro=3))
    for way in ways_to_train(plan):
        assert apply_change(plan, way.sets) == way.plan


def test_an_adapter_keeps_the_plan_s_rank() -> None:
    """The adapter's own settings are carried over to other adapters."""
    plan = Plan(model=Model(name="gpt2"), method=Method(kind="lora", rank=64))
    ways = {way.name: way.plan for way in ways_to_train(plan)}
    assert ways["as planned"] is plan
    assert ways["qlora"].method is not None
    assert ways["qlora"].method.rank == 64


# --- Rows against check -------------------------------------------------------------------------

CARDS = {
    "a 24 GB card": Plan(model=Model(name="llama-3.1-8b"), hardware=Hardware(gpu="a10g")),
    "a 16 GB card without bf16": Plan(
        model=Model(name="qwen2.5-1.5b"), hardware=Hardware(gpu="t4"), batch=Batch(seq_len=1024)
    ),
    "8 x 80 GB": Plan(
        model=Model(name="llama-3.1-70b"), hardware=Hardware(gpu="h100-80gb", count=8)
    ),
    "a window": Plan(
        model=Model(name="mistral-7b-v0.1"),
        hardware=Hardware(gpu="a100-80gb"),
        batch=Batch(seq_len=4096),
    ),
    "trl, whose chunks of the loss": Plan(
        model=Model(name="llama-3.1-8b"), hardware=Hardware(gpu="l4"), stack="trl"
    ),
    "pairs and a reference": Plan(
        model=Model(name="qwen2.5-1.5b"), hardware=Hardware(gpu="l4"), stack="trl", task="dpo"
    ),
    "torchtune, whose chunks grow with the batch": Plan(
        model=Model(name="llama-3.1-8b"), hardware=Hardware(gpu="a100-40gb"), stack="torchtune"
    ),
}


@cache
def answered(case: str) -> FitReport:
    return ftplan.fit(CARDS[case])


def rows(case: str) -> Iterator[tuple[FitRow, Plan]]:
    for row in answered(case).rows:
        if row.peak_bytes is not None:
            yield row, apply_change(CARDS[case], row.change)


def verdict(plan: Plan, micro: int, seq_len: int) -> tuple[Any, Any]:
    from ftplan import api

    sized = replace(plan, batch=replace(plan.batch, micro=micro, seq_len=seq_len))
    report = api.estimate(sized, with_remedies=False)
    return report.verdict, report.device_bytes


@pytest.mark.parametrize("case", CARDS)
def test_every_row_is_what_check_says(case: str) -> None:
    """Verdict and peak of a row are those of its plan; both limits fit and one more does not."""
    answer = answered(case)
    assert sum(1 for _ in rows(case)) >= 5
    for row, plan in rows(case):
        said, device = verdict(plan, answer.micro, answer.seq_len)
        assert said == row.verdict, row
        assert device.expected == row.peak_bytes, row
        if row.largest_micro is not None:
            assert verdict(plan, row.largest_micro, answer.seq_len)[0] == "fits", row
            assert verdict(plan, row.largest_micro + 1, answer.seq_len)[0] != "fits", row
        else:
            assert verdict(plan, 1, answer.seq_len)[0] != "fits", row
        if row.longest_seq_len is not None:
            assert verdict(plan, answer.micro, row.longest_seq_len)[0] == "fits", row
            if row.longest_seq_len < 32768:
                assert verdict(plan, answer.micro, row.longest_seq_len + 1)[0] != "fits", row


@pytest.mark.parametrize("case", CARDS)
def test_the_recommended_row_is_first_and_fits(case: str) -> None:
    """What is recommended stands first, fits, and a reason is given."""
    answer = answered(case)
    assert answer.recommended == answer.rows[0].way
    assert answer.rows[0].verdict == "fits"
    assert answer.reason


@pytest.mark.parametrize("case", CARDS)
def test_cards_that_are_enough_are(case: str) -> None:
    """Each card offered holds the recommended way, and no smaller one of its list does."""
    answer = answered(case)
    plan = apply_change(CARDS[case], answer.rows[0].change)
    for option in answer.gpus:
        on_it = replace(
            plan,
            hardware=Hardware(gpu=option.gpu),
            sharding=Sharding(),
        )
        assert verdict(on_it, answer.micro, answer.seq_len)[0] == "fits"
    sizes = [option.usable_bytes for option in answer.gpus]
    assert sizes == sorted(sizes)


# --- One thing solved ---------------------------------------------------------------------------


def test_solutions() -> None:
    """--for answers with the limit of the plan's own way: it fits, and one more does not."""
    plan = Plan(
        model=Model(name="smollm2-135m"),
        method=Method(kind="lora"),
        hardware=Hardware(gpu="t4"),
        batch=Batch(seq_len=512),
        precision=Precision(weights="fp16"),
    )
    for of, path in (("micro-batch", "batch"), ("seq-len", "batch"), ("rank", "method")):
        solution = ftplan.fit(plan, solve=of).solution  # type: ignore[arg-type]
        assert solution is not None
        assert isinstance(solution.value, int)
        (section,) = solution.change.values()
        (key,) = section
        for value, expected in ((section[key], True), (section[key] + 1, False)):
            changed = apply_change(plan, {path: {key: value}})
            fits = ftplan.estimate(changed).verdict == "fits"
            capped = of == "rank" and value > 576
            capped = capped or (of == "seq-len" and value > 8192)
            assert fits is expected or capped, (of, value)
    method = ftplan.fit(plan, solve="method").solution
    assert method is not None
    assert method.value == "as planned"
    gpus = ftplan.fit(CARDS["8 x 80 GB"], solve="gpus").solution
    assert gpus is not None
    assert gpus.value in (2, 4, 8)
    smallest = ftplan.fit(Plan(model=Model(name="llama-3.1-8b")), solve="gpu").solution
    assert smallest is not None
    assert smallest.value == "h100-80gb"


def test_without_a_gpu_the_smallest_is_named() -> None:
    """Each way gets its smallest single card, largest need first as the ways are ordered."""
    answer = ftplan.fit(Plan(model=Model(name="llama-3.1-8b")))
    by_way = {option.way: option for option in answer.gpus}
    assert by_way["qlora"].usable_bytes < by_way["lora"].usable_bytes
    assert by_way["lora"].usable_bytes < by_way["full"].usable_bytes
    huge = ftplan.fit(Plan(model=Model(name="llama-3.1-405b"), method=Method(kind="full")))
    assert huge.fewest is None or huge.fewest.count > 8


# --- Search -------------------------------------------------------------------------------------

SMALL = Plan(
    model=Model(name="smollm2-135m"),
    method=Method(kind="lora"),
    precision=Precision(weights="fp16"),
    hardware=Hardware(gpu="t4"),
)


@pytest.mark.parametrize("model", ["smollm2-135m", "mistral-7b-v0.1", "gemma-2-2b"])
def test_frontier_is_brute_force(model: str) -> None:
    """The staircase loses nothing: it is the border that trying every plan finds."""
    plan = replace(SMALL, model=Model(name=model), gradient_checkpointing=Checkpointing())
    plan = replace(plan, hardware=Hardware(gpu="a100-40gb"))
    sizer = sizer_of(plan)
    micros = [1, 2, 3, 5, 8, 13, 40]
    lengths = [64, 500, 1024, 2048, 4000, 4096, 5000, 8192, 16384, 60000]
    border = sizer.frontier(micros, lengths)
    for micro in micros:
        fitting = [n for n in lengths if sizer.fits(micro, n)]
        assert border[micro] == max(fitting, default=0), micro


def test_a_hundred_thousand_plans() -> None:
    """The border of over 100,000 plans is found with a small share of them evaluated, and each of
    its points is on the right side of the verdict."""
    micros, lengths = range(1, 65), range(128, 32769, 128)
    plans = evaluated = 0
    for kind in ("lora", "full", "dora"):
        for checkpointing in ("none", "full"):
            for loss in ("full", "fused"):
                plan = replace(
                    SMALL,
                    method=Method(kind=kind),
                    gradient_checkpointing=Checkpointing(kind=checkpointing),
                    loss=Loss(kind=loss),
                )
                sizer = sizer_of(plan)
                border = sizer.frontier(micros, lengths)
                plans += len(micros) * len(lengths)
                evaluated += sizer.evaluated
                for micro in (1, 7, 64):
                    if border[micro]:
                        assert sizer.fits(micro, border[micro])
                    if border[micro] < lengths[-1]:
                        assert not sizer.fits(micro, border[micro] + 128)
    assert plans > 100_000
    assert evaluated < plans / 20


# --- Time ---------------------------------------------------------------------------------------


def test_hours_cost_and_energy_are_products() -> None:
    """Cost is hours times price, energy hours times watts, both for all cards; prices scale."""
    plan = CARDS["8 x 80 GB"]
    workload = Workload(tokens=10**8, prices={"": 2.0}, watts=700)
    time = ftplan.fit(plan, workload=workload).rows[0].time
    assert time is not None
    assert time.hours is not None
    assert time.cost is not None
    assert time.energy_kwh is not None
    assert time.hours.low < time.hours.expected < time.hours.high
    assert time.cost.expected == pytest.approx(time.hours.expected * 16)
    assert time.energy_kwh.expected == pytest.approx(time.hours.expected * 5.6)
    assert time.tokens_per_second.expected == pytest.approx(1e8 / time.hours.expected / 3600)


def test_no_price_no_cost() -> None:
    """There is no built-in price."""
    time = answered("a 24 GB card").rows[0].time
    assert time is not None
    assert time.cost is None
    assert time.hours is None


# --- The command --------------------------------------------------------------------------------


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
    for wrong in ("t4", "t4=", "=3", "a-lot", "-1"):
        refused = ftplan_("fit", "--model", "smollm2-135m", "--price", wrong)
        assert (refused.code, refused.out) == (2, "")
        assert "price" in refused.err


def test_price_file(ftplan_: Terminal, tmp_path: Path) -> None:
    """Prices can stand in a file, one card a line."""
    prices = tmp_path / "prices.txt"
    prices.write_text("# per hour\nt4-16gb: 0.4\nh100-80gb = 2.5\n")
    said = ftplan_(
        "fit", "--model", "smollm2-135m", "--gpu", "t4", "--price", str(prices), "--tokens", "1M",
        "--format", "json",
    )  # fmt: skip
    assert [g["gpu"] for g in said.data["gpus"]] == ["t4-16gb", "h100-80gb"]
    time = said.data["rows"][0]["time"]
    assert time["cost"]["expected"] == pytest.approx(time["hours"]["expected"] * 0.4)


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


def test_the_plan_to_take_is_written(
    ftplan_: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-o plan.yaml holds a plan that check says fits, and the table is still printed."""
    monkeypatch.chdir(tmp_path)
    said = ftplan_("fit", "--model", "llama-3.1-8b", "--gpu", "a10g", "-o", "plan.yaml")
    assert said.code == 0
    assert "take: lora" in said.out
    assert ftplan_("check", "plan.yaml").code == 0
    Path("over.yaml").write_text(
        "version: 1\nmodel: llama-3.1-8b\nmethod: {kind: lora}\nhardware: {gpu: a10g}\n"
    )
    assert ftplan_("check", "over.yaml").code == 1
    ftplan_("fit", "over.yaml", "-o", "mended.yaml")
    assert ftplan_("check", "mended.yaml", "--fail-on", "tight").code == 0


# --- Cards here, and slices ---------------------------------------------------------------------

SMI = "name, memory.total [MiB], memory.free [MiB]\nNVIDIA A10G, 23028 MiB, 12000 MiB\n"


def test_the_card_that_is_here(ftplan_: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """--gpu auto takes the card that nvidia-smi names and what is free on it now."""
    import importlib

    module = importlib.import_module("ftplan.cli.fit")
    monkeypatch.setattr(module, "_nvidia_smi", lambda *a: "" if a == ("-L",) else SMI)
    said = ftplan_("fit", "--model", "smollm2-135m", "--gpu", "auto", "--format", "json")
    assert said.code == 0
    gpu = said.data["gpu"]
    assert gpu["name"] == "a10g-24gb"
    assert 11.2 * 2**30 < gpu["usable_bytes"] <= 12000 * 2**20
    sliced = "GPU 0: NVIDIA A100\n  MIG 3g.40gb     Device  0: (UUID: MIG-1)\n"
    a100 = "NVIDIA A100-SXM4-80GB, 81920 MiB, 81000 MiB\n"
    monkeypatch.setattr(module, "_nvidia_smi", lambda *a: sliced if a == ("-L",) else a100)
    half = ftplan_("fit", "--model", "smollm2-135m", "--gpu", "auto", "--format", "json").data
    whole = ftplan_("fit", "--model", "smollm2-135m", "--gpu", "a100-80gb", "-f", "json").data
    assert half["gpu"]["usable_bytes"] == whole["gpu"]["usable_bytes"] // 2
    named = ftplan_("fit", "--model", "smollm2-135m", "--gpu", "a100-80gb:3g.40gb", "-f", "json")
    assert named.data["gpu"] == half["gpu"]
    assert ftplan_("fit", "--model", "gpt2", "--gpu", "a100-80gb:9g.99gb").code == 2


def test_no_nvidia_smi_is_said(ftplan_: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no nvidia-smi the remedy is to name the card."""
    monkeypatch.setenv("PATH", "/nowhere")
    said = ftplan_("fit", "--model", "gpt2", "--gpu", "auto")
    assert (said.code, said.out) == (2, "")
    assert "name the GPU" in said.err


def test_json_is_stable(ftplan_: Terminal) -> None:
    """The keys of the JSON answer are frozen: a change here is a change of the contract."""
    data = ftplan_("fit", "--model", "smollm2-135m", "--gpu", "t4", "--format", "json").data
    assert json.dumps(data)
    assert set(data) == {
        "verdict", "model", "gpu", "micro", "seq_len", "recommended", "reason", "rows", "gpus",
        "fewest", "remedies", "solution", "candidates", "findings", "assumptions",
        "schema_version", "tool_version",
    }  # fmt: skip
    assert set(data["rows"][0]) == {
        "way", "change", "verdict", "peak_bytes", "headroom_bytes", "trainable_params",
        "largest_micro", "longest_seq_len", "time", "note",
    }  # fmt: skip


def test_the_record_does_not_depend_on_garbage_collection() -> None:
    """Sizes are the same whether cyclic garbage is collected all the time or never."""
    plan = replace(
        CARDS["a 24 GB card"],
        method=Method(kind="lora"),
        attention="eager",
        loss=Loss(kind="fused"),
        batch=Batch(micro=2, seq_len=4096),
    )
    before = gc.get_threshold()
    peaks = set()
    try:
        for threshold in (1, 10, 0):
            gc.set_threshold(threshold)
            report = ftplan.estimate(plan)
            assert report.allocated_bytes is not None
            peaks.add(report.allocated_bytes.expected)
    finally:
        gc.set_threshold(*before)
    assert len(peaks) == 1


def test_a_length_nobody_asked_for_is_no_longer_than_the_model() -> None:
    """Without a length the rows are judged at 2,048 tokens or the model's own limit."""
    bert = ftplan.fit(Plan(model=Model(name="bert-base"), hardware=Hardware(gpu="t4")))
    assert bert.seq_len == 512
    assert answered("a 24 GB card").seq_len == 2048
