"""Megatron-Core's own modules on the tape: what is walked, what is refused, how ranks share."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from ftplan.errors import UnsupportedError
from ftplan.files.document import parse_document
from ftplan.files.plan import parse_plan
from ftplan.front.assembling import job_of, modules_of
from ftplan.front.resolve import resolve
from ftplan.memory.estimate import Structure
from ftplan.memory.pipeline import stages_of

SHOWN = {"micro": 1, "seq_len": 4096, "accumulation": 4, "packing": True, "image_size": [560, 560]}
LORA = {"kind": "lora", "rank": 8, "targets": "all-linear", "adapter_dtype": "bf16"}


def resolved(**more: Any) -> Any:
    """A job of ms-swift's Megatron commands, packed."""
    sharding = more.pop("sharding", {})
    ranks = sharding.get("tp", 1) * sharding.get("ep", 1) * sharding.get("pp", 1)
    plan = {
        "version": 1, "model": "qwen3-8b", "stack": "megatron", "method": {"kind": "full"},
        "batch": {"micro": 1, "seq_len": 4096, "accumulation": 4, "packing": True},
        "gradient_checkpointing": {"kind": "full"},
        "hardware": {"gpu": "a100-80gb", "count": ranks},
        "sharding": {"kind": "zero1", "sequence_parallel": sharding.get("tp", 1) > 1, **sharding},
        **more,
    }  # fmt: skip
    return resolve(parse_plan(parse_document(json.dumps(plan), file="plan")))


def structure(**more: Any) -> Structure:
    """The record of such a job."""
    return Structure(job_of(resolved(**more)))


def peak(**more: Any) -> int:
    """Its worst moment, in bytes, at its own batch."""
    return structure(**more).peak(1, 4096)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"sharding": {"tp": 4}},
        {"sharding": {"pp": 2}},
        {"method": LORA},
        {"model": "qwen3-30b-a3b", "sharding": {"ep": 4}},
        {"task": "dpo"},
        {"task": "rm", "method": LORA},
        {"gradient_checkpointing": {"kind": "selective"}},
        {"model": "qwen2.5-vl-7b", "batch": {**SHOWN, "images": 2}},
    ],
)
def test_what_ms_swift_runs_is_walked(more: dict[str, Any]) -> None:
    """Dense and mixed models, full and LoRA, split and whole, and four tasks."""
    assert modules_of(resolved(**more)) == "megatron"


@pytest.mark.parametrize(
    "more",
    [
        {"sharding": {"cp": 2, "tp": 1}, "hardware": {"gpu": "a100-80gb", "count": 2}},
        {"model": "qwen3-30b-a3b", "sharding": {"tp": 2, "etp": 2}},
        {"method": {"kind": "dora"}},
        {"model": "gemma-2-2b"},
        {"attention": "eager"},
        {"model": "qwen3-vl-8b", "batch": {**SHOWN, "images": 2}},
    ],
)
def test_what_was_not_traced_is_walked_as_another_model(more: dict[str, Any]) -> None:
    """Context parallelism, split experts, other adapters, models and attention."""
    assert modules_of(resolved(**more)) == ""


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["lm_head", "q_proj", "k_proj"]])
def test_a_part_of_a_fused_layer_has_no_adapter(targets: list[str]) -> None:
    """Queries, keys and values are one layer, and the output layer has none."""
    with pytest.raises(UnsupportedError):
        structure(method={**LORA, "targets": targets})


def test_more_ranks_never_take_more() -> None:
    """Splitting over twice as many ranks takes less on each, with sequence parallelism too."""
    peaks = [peak(sharding={"tp": tp}) for tp in (1, 2, 4)]
    assert peaks == sorted(peaks, reverse=True)
    assert peak(sharding={"tp": 2}) < peak(sharding={"tp": 2, "sequence_parallel": False})


def test_a_reference_is_a_second_set_of_weights() -> None:
    """Full preference finetuning holds the frozen model too; an adapter is its own reference."""
    whole = {t.name: t.bytes for t in structure(task="dpo").static}
    assert whole["weights/reference"] == whole["weights/trainable"]
    adapted = {t.name for t in structure(task="dpo", method=LORA).static}
    assert "weights/reference" not in adapted


def test_a_packed_pair_is_as_long_as_the_row() -> None:
    """Both of a pair are in one packed row; a row of KTO has a forward for each half of it."""
    sft, dpo, kto = (
        structure(task=task, method=LORA).program.point(1, 4096) for task in ("sft", "dpo", "kto")
    )
    assert sft == dpo
    assert kto == structure(method=LORA).program.point(1, 2048)


def test_a_head_of_one_number_meets_no_vocabulary() -> None:
    """A reward model has no logits: its peak is lower by more than their softmax."""
    softmax = 4096 * 151936 * 4
    assert peak(method=LORA) - peak(method=LORA, task="rm") > softmax


def test_dropout_before_an_adapter_is_kept() -> None:
    """Each adapted layer of a block that runs again keeps what dropout made, and its mask."""
    without = peak(method={**LORA, "dropout": 0.0}, gradient_checkpointing=False)
    assert peak(method={**LORA, "dropout": 0.05}, gradient_checkpointing=False) > without


def test_experts_of_a_rank_get_an_even_share() -> None:
    """Over more ranks a rank has fewer experts and as many tokens."""
    few, many = (
        structure(model="qwen3-30b-a3b", sharding={"ep": ep}, method=LORA) for ep in (2, 8)
    )
    assert few.static_bytes > many.static_bytes
    assert few.program.peak(1, 4096) == many.program.peak(1, 4096)


def test_a_frozen_tower_keeps_nothing_of_an_image_but_its_pixels() -> None:
    """Images add their pixels to the backward's peak, and to the forward's no more than a layer:
    a tower of 32 layers that kept its inputs would add 32 of them."""
    patches, hidden, layers = 2 * 400 * 4, 1280, 32
    pixels = patches * 3 * 2 * 14 * 14 * 4
    plain, shown = (
        structure(model="qwen2.5-vl-7b", method=LORA, batch={**SHOWN, "images": images})
        for images in (None, 2)
    )
    more = shown.peak(1, 4096) - plain.peak(1, 4096)
    assert pixels <= more < pixels + layers * patches * hidden * 2
    assert shown.static_bytes == plain.static_bytes


def test_a_tower_is_on_the_first_stage_of_a_pipeline() -> None:
    """mcore-bridge builds the tower where the embeddings are."""
    model = {"model": "qwen2.5-vl-7b", "method": LORA}
    job = job_of(resolved(**model, sharding={"pp": 2}))
    first, last = (
        Structure(replace(job, stage=stage)).static_bytes
        for stage in stages_of(28, job.sharding, 4)
    )
    tower = 676_550_144 * 2
    assert abs(first - last - tower) < 50e6


def test_a_stage_has_buffers_for_its_own_weights() -> None:
    """Transformer Engine's stand-ins for gradients: the output layer's is on the last stage."""
    job = job_of(resolved(sharding={"pp": 2}))
    first, last = (
        {t.name: t.bytes for t in Structure(replace(job, stage=stage)).static}["weights/buffers"]
        for stage in stages_of(36, job.sharding, 4)
    )
    assert last - first == 151936 * 4096 * 2
