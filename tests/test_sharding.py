"""Sharding: documented model-state formulas, FSDP1 and 2, ZeRO's buckets, host memory, traffic."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftplan.errors import UnsupportedError
from ftplan.front.api import estimate
from ftplan.front.assembling import job_of
from ftplan.front.resolve import resolve
from ftplan.memory.estimate import Structure
from ftplan.memory.host import pinned, wire_of
from ftplan.memory.zero import layout_of
from ftplan.report import Report
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


def plan(kind: str, gpus: int, **more: Any) -> Plan:
    """A full finetuning job of a small model, in bf16."""
    return Plan(
        model=Model(name=more.pop("model", "qwen2.5-0.5b")),
        stack=more.pop("stack", "transformers"),
        method=more.pop("method", Method(kind="full")),
        precision=more.pop("precision", Precision(weights="bf16", mixed="no")),
        batch=Batch(
            micro=1, seq_len=256, accumulation=more.pop("accumulation", 1), padding="none"
        ),
        optimizer=OptimizerChoice(name="adamw_torch_fused"),
        gradient_checkpointing=Checkpointing(kind="full"),
        hardware=Hardware(
            count=gpus, nodes=more.pop("nodes", None), gpu=more.pop("gpu", None),
            host_ram=more.pop("host_ram", None),
        ),
        sharding=Sharding(kind=kind, **more),  # type: ignore[arg-type]
    )  # fmt: skip


def structure(kind: str, gpus: int, **more: Any) -> Structure:
    """The record of such a job."""
    return Structure(job_of(resolve(plan(kind, gpus, **more))))


def report(kind: str, gpus: int, **more: Any) -> Report:
    """The report of such a job."""
    return estimate(plan(kind, gpus, **more))


def per_parameter(record: Structure, *names: str) -> float:
    """Static bytes of these terms for each parameter."""
    found = sum(term.bytes for term in record.static if term.name in names)
    return found / record.total_params


STATES = ("optimizer/main_weights", "optimizer/states")


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_zero_papers_model_states(gpus: int) -> None:
    """arXiv 1910.02054: 2 + K / N of ZeRO-1 and 2, (2 + 2 + K) / N of ZeRO-3, with K = 12."""
    for kind in ("zero1", "zero2"):
        record = structure(kind, gpus)
        assert per_parameter(record, "weights/trainable") == pytest.approx(2, rel=0.01)
        assert per_parameter(record, *STATES) == pytest.approx(12 / gpus, rel=0.01)
    record = structure("zero3", gpus)
    names = ("weights/trainable", "gradients/partition", *STATES)
    assert per_parameter(record, *names) == pytest.approx(16 / gpus, rel=0.02)


@pytest.mark.parametrize(("gpus", "tp"), [(1, None), (8, None), (8, 2)])
def test_megatrons_model_states(gpus: int, tp: int | None) -> None:
    """18 bytes a parameter; 6 + 12 / d where the distributed optimizer shards over d ranks."""
    kind = "zero1" if gpus > 1 else "none"
    record = structure(kind, gpus, stack="megatron", model="llama-3.1-8b", tp=tp)
    ranks = gpus // (tp or 1)
    expected = 6 + 12 / ranks
    names = ("weights/trainable", "gradients/main", *STATES)
    assert per_parameter(record, *names) == pytest.approx(expected, rel=0.01)


def test_deepspeeds_estimate_leaves_out_what_is_live() -> None:
    """ZeRO-3 on many GPUs: 18 N / n and the largest layer are some 70 % of the peak."""
    gpus = 64
    record = structure("zero3", gpus, model="llama-3.1-8b")
    largest = 128256 * 4096
    formula = 18 * record.total_params // gpus + 4 * largest
    assert record.peak(1, 256) > 1.4 * formula


def test_a_bucket_is_there_whole() -> None:
    """However little is trained, the bucket has all of its elements; overlapping makes it two."""
    lora = Method(kind="lora", rank=8, targets=("q_proj",))

    def backward(**more: Any) -> int:
        return dict(structure("zero2", 4, method=lora, **more).phases(1, 16))["backward"]

    one, two = backward(), backward(overlap_comm=True)
    assert one - backward(bucket_elements=1_000_000) > 0.9 * (500_000_000 - 1_000_000) * 2
    assert two - one == pytest.approx(10**9, rel=0.01)


def test_partitions_cover_what_is_trained() -> None:
    """The partitions of all ranks hold every trained element, and no rank owns less than its."""
    for gpus in (1, 2, 5, 8):
        record = structure("zero2", gpus)
        layout = layout_of(record.network, job_of(resolve(plan("zero2", gpus))).sharding)
        assert layout.part * gpus >= layout.total == record.trainable_params
        assert layout.first_owned >= layout.part
        assert layout.largest <= layout.first_owned


@pytest.mark.parametrize("version", [1, 2])
def test_whole_gradients_until_the_last_micro_batch(version: int) -> None:
    """With no_sync a rank holds all gradients, without it its shard: what Trainer does is said."""
    whole = report("fsdp", 8, version=version, accumulation=4)
    shards = report("fsdp", 8, version=version, accumulation=4, no_sync=False)
    assert whole.allocated_bytes is not None and shards.allocated_bytes is not None
    params = whole.model.trainable_params if whole.model else 0
    more = whole.allocated_bytes.expected - shards.allocated_bytes.expected
    assert more > params  # about 2 bytes each, some of them freed by then
    assert "sharding.no_sync" in {a.key for a in whole.assumptions}
    terms = {t.name: t.bytes for t in whole.terms if t.at_peak}
    assert terms["gradients/accumulated"] >= 0


def test_terms_add_up_where_gradients_are_freed_on_the_way() -> None:
    """The terms of such a job still add up to its peak, to the byte."""
    for kind, more in (
        ("fsdp", {"no_sync": True}),
        ("zero1", {}),
        ("zero2", {}),
        ("zero3", {}),
    ):
        told = report(kind, 4, accumulation=2, **more)
        assert told.allocated_bytes is not None
        assert sum(t.bytes for t in told.terms if t.at_peak) == told.allocated_bytes.expected


def test_fsdp1_gathers_once_and_joins_gradients() -> None:
    """FSDP1's units are one flat buffer, FSDP2's two; frozen weights beside adapters count."""
    flat = dict(structure("fsdp", 8, version=1).phases(1, 64))
    two = dict(structure("fsdp", 8, version=2).phases(1, 64))
    assert flat["forward"] < two["forward"]
    lora = Method(kind="lora", rank=8, targets="all-linear", adapter_dtype="bf16")
    apart = structure("fsdp", 8, version=1, method=lora, model="llama-3.1-8b")
    joined = structure("fsdp", 8, version=1, method=lora, model="llama-3.1-8b", stack="pytorch")
    block = 218_112_000 * 2
    assert joined.peak(1, 64) - apart.peak(1, 64) > block
    codes = {f.code for f in report("fsdp", 8, version=1, method=lora, stack="pytorch").findings}
    assert "FIT004" in codes


def test_replicas_share_the_rest() -> None:
    """Hybrid sharding over replicas is sharding over fewer ranks, and no more."""
    hybrid = structure("fsdp", 16, dp_replicate=4).static_bytes
    assert hybrid == structure("fsdp", 4).static_bytes


def test_a_sequence_in_parts_still_shards_over_all_ranks() -> None:
    """Ranks of a context-parallel group hold shards too (accelerate's dp_shard_cp)."""
    assert structure("fsdp", 8, cp=2).static_bytes == structure("fsdp", 8).static_bytes


@given(st.integers(min_value=1, max_value=1 << 40))
def test_page_locked_blocks_are_powers_of_two(size: int) -> None:
    """A page-locked block is the least power of two that holds what was asked for."""
    block = pinned(size)
    assert block >= size > block // 2
    assert block & (block - 1) == 0


def test_offload_takes_from_the_card_and_gives_to_the_host() -> None:
    """What leaves the GPUs is at least what the host takes on, for each way of offloading."""
    for kind, offload in (("zero2", "optimizer"), ("zero3", "params"), ("fsdp", "params")):
        here, there = report(kind, 4), report(kind, 4, offload=offload)
        assert here.allocated_bytes and there.allocated_bytes
        assert here.host_bytes and there.host_bytes
        assert there.allocated_bytes.expected < here.allocated_bytes.expected
        params = here.model.total_params if here.model else 0
        assert there.host_bytes.expected - here.host_bytes.expected > 8 * params


def test_a_host_too_small_is_said() -> None:
    """FIT003 comes when a node's RAM is less than what is expected of it, and not before."""
    codes = [
        {f.code for f in report("zero2", 4, offload="optimizer", host_ram=ram).findings}
        for ram in (8 * 2**30, 2**40)
    ]
    assert "FIT003" in codes[0] and "FIT003" not in codes[1]


def test_loading_as_it_is_costs_no_copies() -> None:
    """Weights in the checkpoint's dtype are pages of a file; converted ones a copy a rank."""
    same = report("ddp", 8)
    other = report("ddp", 8, precision=Precision(weights="fp32", mixed="bf16"))
    assert same.host_bytes and other.host_bytes and same.model
    more = other.host_bytes.expected - same.host_bytes.expected
    assert more > 8 * 3 * same.model.total_params


def test_traffic_is_what_the_collectives_move() -> None:
    """DDP 2 (n-1)/n of the gradients, ZeRO-3 and FSDP 3 (n-1)/n of the weights, times batches."""
    for gpus in (2, 8):
        share = (gpus - 1) / gpus
        for kind, times in (("ddp", 2), ("fsdp", 3), ("zero3", 3), ("zero1", 2)):
            job = job_of(resolve(plan(kind, gpus)))
            record = Structure(job)
            wire = wire_of(job, record.counted)
            assert wire is not None
            expected = times * 2 * record.total_params * share
            assert wire.bytes_per_step == pytest.approx(expected, rel=0.01), kind


def test_a_job_that_crawls_is_said() -> None:
    """Full sharding of few tokens over PCIe waits for the wire; one GPU has none."""
    slow = report("fsdp", 8, gpu="a10g", model="llama-3.1-8b")
    assert "PAR002" in {f.code for f in slow.findings}
    alone = report("none", 1, gpu="h100-80gb")
    assert "PAR002" not in {f.code for f in alone.findings}


@pytest.mark.parametrize(
    ("kind", "offload", "able"),
    [
        ("ddp", "optimizer", "zero1"), ("none", "params", "zero3"), ("fsdp", "optimizer", "zero2"),
        ("fsdp", "nvme", "zero3"), ("zero2", "params", "fsdp"), ("zero1", "nvme", "zero3"),
    ],
)  # fmt: skip
def test_nothing_leaves_the_gpu_by_itself(kind: str, offload: str, able: str) -> None:
    """What no library moves is refused by name, with those that do: bytes that leave the GPU lie on
    a host that is sized."""
    with pytest.raises(UnsupportedError, match=f"offload of {offload} with {kind}") as refused:
        report(kind, 2, offload=offload)
    assert able in (refused.value.remedy or "")
    for mover in ("zero2", "zero3", "fsdp"):
        where = "optimizer" if mover == "zero2" else "params"
        moved, kept = report(mover, 2, offload=where), report(mover, 2)
        assert moved.host_bytes and kept.host_bytes
        assert moved.host_bytes.expected > kept.host_bytes.expected


def test_fsdp1_joins_adapters_and_frozen_weights_as_views_alone() -> None:
    """Without original parameters PyTorch refuses a block of both; PEFT's policy makes none."""
    lora = Method(kind="lora", rank=8)
    given: dict[str, Any] = {"version": 1, "method": lora}
    with pytest.raises(UnsupportedError, match="use_orig_params"):
        report("fsdp", 2, stack="pytorch", use_orig_params=False, **given)
    sizes = {
        report("fsdp", 2, use_orig_params=views, **given).allocated_bytes for views in (True, False)
    }
    assert len(sizes) == 1
