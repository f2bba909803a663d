"""What holds for every job, whatever its numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftplan.front.api import estimate
from ftplan.spec import (
    Batch,
    Checkpointing,
    Hardware,
    Method,
    Model,
    OptimizerChoice,
    Plan,
    Precision,
    Sharding,
)

MODELS = ("smollm2-135m", "qwen2.5-0.5b", "gpt2", "pythia-1.4b", "bert-base", "gemma-3-1b")
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])

methods = st.one_of(
    st.just(Method(kind="full")),
    st.integers(1, 4).map(lambda k: Method(kind="partial", last_layers=k)),
    st.integers(1, 64).map(lambda r: Method(kind="lora", rank=r)),
    st.integers(1, 64).map(lambda r: Method(kind="qlora", rank=r)),
)


@st.composite
def plans(draw: st.DrawFn, /, **fixed: Any) -> Plan:
    """Jobs of small models over methods, precisions, checkpointing, attention and optimizers."""
    method = fixed.get("method") or draw(methods)
    quantised = method.kind == "qlora"
    return Plan(
        model=Model(name=draw(st.sampled_from(MODELS))),
        method=method,
        precision=Precision(
            weights="nf4" if quantised else draw(st.sampled_from(("bf16", "fp32"))),
            mixed=draw(st.sampled_from(("no", "bf16"))),
        ),
        batch=Batch(
            micro=draw(st.integers(1, 8)),
            seq_len=draw(st.integers(16, 512)),
            accumulation=draw(st.integers(1, 2)),
        ),
        attention=draw(st.sampled_from(("eager", "sdpa"))),
        gradient_checkpointing=Checkpointing(kind=draw(st.sampled_from(("none", "full")))),
        optimizer=OptimizerChoice(
            name=draw(st.sampled_from(("adamw_torch_fused", "adamw_torch", "sgd", "adafactor")))
        ),
    )


def _peak(plan: Plan) -> int:
    interval = estimate(plan).allocated_bytes
    assert interval is not None
    return interval.expected


@few
@given(plans())
def test_terms_add_up_and_intervals_are_ordered(plan: Plan) -> None:
    """Terms at the peak add up to it to the byte, none is negative, low <= expected <= high."""
    report = estimate(plan)
    assert report.allocated_bytes and report.reserved_bytes and report.device_bytes
    assert report.total() == report.allocated_bytes.expected
    assert all(term.bytes > 0 for term in report.terms)
    assert report.allocated_bytes.expected <= report.reserved_bytes.expected
    assert report.reserved_bytes.expected <= report.device_bytes.expected
    assert max(phase.peak_bytes for phase in report.phases) == report.allocated_bytes.expected


KINDS = ("ddp", "zero1", "zero2", "zero3", "fsdp")
small_buckets = st.sampled_from((None, 1_000_000))


@few
@given(plans(), st.sampled_from(KINDS), st.integers(1, 4), st.booleans(), small_buckets)
def test_no_term_is_below_zero_however_the_job_is_spread(
    plan: Plan, kind: Any, accumulation: int, flag: bool, bucket: int | None
) -> None:
    """Over several GPUs too, terms at the peak add up to it and each is above zero: gradients of
    earlier micro batches are never more than there were, nor are gathered weights."""
    zero = kind.startswith("zero")
    sharding = Sharding(
        kind=kind, bucket_elements=bucket if zero else None,
        overlap_comm=flag if kind in ("zero1", "zero2") else None,
        no_sync=flag if kind == "fsdp" else None,
        max_live_elements=bucket if kind == "zero3" and flag else None,
    )  # fmt: skip
    assert plan.batch.seq_len
    batch = replace(plan.batch, accumulation=accumulation)
    report = estimate(replace(plan, sharding=sharding, batch=batch, hardware=Hardware(count=4)))
    assert report.allocated_bytes and report.total() == report.allocated_bytes.expected
    assert all(term.bytes > 0 for term in report.terms)


@pytest.mark.parametrize("model", ["llava-onevision-0.5b", "t5-base", "gemma-3n-e2b"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradients_that_do_not_come_do_not_go(model: str, accumulation: int) -> None:
    """ZeRO-1 lets go of every gradient at the end of backward: a tower that no image wakes has
    none, and what is left is what a rank owns. The step of so short a batch is the worst moment."""
    report = estimate(
        Plan(
            model=Model(name=model),
            method=Method(kind="full"),
            precision=Precision(weights="bf16", mixed="no"),
            batch=Batch(micro=1, seq_len=16, accumulation=accumulation),
            optimizer=OptimizerChoice(name="adamw_torch"),
            sharding=Sharding(kind="zero1"),
            hardware=Hardware(count=8),
        )
    )
    assert all(term.bytes > 0 for term in report.terms)
    assert any(term.name.startswith("gradients/") for term in report.terms)


@few
@given(plans(), st.integers(1, 4), st.integers(1, 200))
def test_memory_never_falls_with_the_batch(plan: Plan, more: int, longer: int) -> None:
    """A larger micro batch or a longer sequence never takes less."""
    before = _peak(plan)
    batch = plan.batch
    assert batch.micro and batch.seq_len
    assert _peak(replace(plan, batch=replace(batch, micro=batch.micro + more))) >= before
    assert _peak(replace(plan, batch=replace(batch, seq_len=batch.seq_len + longer))) >= before


@few
@given(plans(method=Method(kind="lora", rank=8)), st.integers(1, 56))
def test_memory_never_falls_with_the_rank(plan: Plan, more: int) -> None:
    """A higher rank never takes less."""
    higher = replace(plan, method=Method(kind="lora", rank=8 + more))
    assert _peak(higher) >= _peak(plan)


def _static(plan: Plan) -> int:
    groups = ("weights/", "adapters/", "optimizer/")
    return sum(t.bytes for t in estimate(plan).terms if t.name.startswith(groups))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_static_share_never_rises_with_sharding(kind: Any) -> None:
    """Weights and states on one GPU: DDP >= ZeRO-1 >= ZeRO-3, FSDP falls with every doubling."""
    base = Plan(
        model=Model(name="qwen2.5-0.5b"),
        method=Method(kind=kind),
        precision=Precision(weights="fp32"),
        batch=Batch(micro=1, seq_len=256),
    )

    def at(count: int, sharding: Any) -> int:
        return _static(
            replace(base, hardware=Hardware(count=count), sharding=Sharding(kind=sharding))
        )

    fsdp = [at(count, "fsdp") for count in (2, 4, 8, 16, 32)]
    assert fsdp == sorted(fsdp, reverse=True)
    zero1 = [at(count, "zero1") for count in (2, 4, 8, 16)]
    assert zero1 == sorted(zero1, reverse=True)
    assert at(8, "fsdp") <= at(8, "ddp")


@few
@given(plans(method=Method(kind="full")))
def test_checkpointing_never_keeps_more_between_forward_and_backward(plan: Plan) -> None:
    """Recomputing a block never raises the peak of forward where every block is trained.

    (A frozen prefix keeps nothing without checkpointing, and its inputs with it: then the
    embedding's output is made to ask for a gradient.)
    """
    forward = {}
    for kind in ("none", "full"):
        checkpointed = replace(plan, gradient_checkpointing=Checkpointing(kind=kind))
        report = estimate(checkpointed)
        forward[kind] = {p.name: p.peak_bytes for p in report.phases}["forward"]
    assert forward["full"] <= forward["none"] * 1.001
