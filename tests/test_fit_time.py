"""Operations and time: closed forms, monotone laws, and readings that were kept apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ftplan.assembling import job_of
from ftplan.catalog.gpus import find_gpu
from ftplan.catalog.throughput import Reading, readings, speed_of, utilisation_of
from ftplan.fit.flops import Compute, compute_of, hidden_of
from ftplan.fit.sizer import Room, Sizer
from ftplan.fit.time import micro_step, tokens_per_second
from ftplan.memory.job import Job
from ftplan.memory.prepare import prepare
from ftplan.resolve import resolve
from ftplan.spec import Batch, Checkpointing, Hardware, Method, Model, Plan, Sharding


def job(model: str = "llama-3.1-8b", **more: Any) -> Job:
    more.setdefault("method", Method(kind="full"))
    more.setdefault("gradient_checkpointing", Checkpointing(kind="none"))
    return job_of(resolve(Plan(model=Model(name=model), **more)))


def compute(model: str = "llama-3.1-8b", **more: Any) -> Compute:
    one = job(model, **more)
    return compute_of(prepare(one), one)


LLAMA_MATRICES = 8_030_261_248 - 128_256 * 4096 - 65 * 4096
"""Llama 3.1 8B without its embedding (a look-up) and its norms."""


def test_forward_is_two_operations_per_matrix_element() -> None:
    """Forward costs 2 operations per parameter that is multiplied, and attention 4 d a pair."""
    work = compute().at(1, 2048)
    pairs = 2048 * 2049 // 2
    attention = 32 * 2 * pairs * 2 * 32 * 128
    assert work.forward == 2 * LLAMA_MATRICES * 2048 + attention


def test_full_finetuning_is_three_forwards_in_matrices() -> None:
    """Backward is two more products for each matrix; attention's kernel makes five of two."""
    step = compute()
    assert step.backward_per_token == 2 * step.forward_per_token
    assert step.recompute_per_token == 0
    work = step.at(2, 512)
    assert work.total == work.model


def test_frozen_weights_have_no_gradient_of_their_own() -> None:
    """LoRA's backward is one product a frozen matrix and two for its own small ones."""
    lora = compute(method=Method(kind="lora", rank=16))
    full = compute()
    assert lora.forward_per_token > full.forward_per_token
    added = lora.forward_per_token - full.forward_per_token
    assert added == 2 * 41_943_040
    assert lora.backward_per_token == full.forward_per_token + 2 * added


def test_checkpointing_runs_blocks_again_and_the_head_once() -> None:
    """Recomputation is the forward of all blocks, without the head."""
    again = compute(gradient_checkpointing=Checkpointing(kind="full"))
    head = 2 * 128_256 * 4096
    assert again.recompute_per_token == again.forward_per_token - head
    work = again.at(1, 1024)
    assert work.total - work.model == work.recompute


def test_blocks_before_the_first_trained_have_no_backward() -> None:
    """Training the last two blocks goes back through these two and the head."""
    partial = compute(method=Method(kind="partial", last_layers=2))
    block = (partial.forward_per_token - 2 * 128_256 * 4096) // 32
    assert partial.backward_per_token == 2 * (2 * block) + 2 * 128_256 * 4096


def test_experts_count_where_tokens_go() -> None:
    """A token passes two of Mixtral's eight experts: 12.9 B of 46.7 B parameters."""
    active = compute("mixtral-8x7b").forward_per_token / 2
    assert 12.5e9 < active < 13e9


def test_a_window_bounds_attention() -> None:
    """Beyond the window, operations of attention grow with the length and not with its square."""
    mistral = compute("mistral-7b-v0.1")
    short, long = mistral.at(1, 16384).attention, mistral.at(1, 32768).attention
    assert long < 2.4 * short
    llama = compute()
    assert llama.at(1, 32768).attention > 3.9 * llama.at(1, 16384).attention


@pytest.mark.parametrize("model", ["gpt2", "llama-3.1-8b", "qwen3-30b-a3b", "gemma-2-9b"])
def test_work_grows_with_the_batch(model: str) -> None:
    """Twice the sequences are twice the operations; a longer one takes more than its share."""
    step = compute(model)
    once, twice, longer = step.at(1, 512), step.at(2, 512), step.at(1, 1024)
    assert twice.total == 2 * once.total
    assert longer.total > 2 * once.total or model == "gpt2"


def rate(reading: Reading) -> tuple[float, float, float]:
    plan = Plan(
        model=Model(name=reading.model or "llama-2-7b"),
        method=Method(kind=reading.method),  # type: ignore[arg-type]
        gradient_checkpointing=Checkpointing(kind="full" if reading.checkpointing else "none"),
        hardware=Hardware(
            gpu=reading.gpu, count=min(8, reading.gpus), nodes=max(1, reading.gpus // 8)
        ),
        # quantised weights: the reading's sharding is left out of the wire
        sharding=Sharding(kind="fsdp" if reading.sharded and reading.method != "qlora" else None),
        batch=Batch(micro=reading.micro, seq_len=reading.seq_len),
        attention=reading.attention,  # type: ignore[arg-type]
    )
    one = job_of(resolve(plan))
    if reading.config is not None:
        one = replace(one, config=reading.config)
    room = Room(usable_bytes=0, capability=(8, 0), named=True, gpus=reading.gpus)
    sizer = Sizer(one, room)
    gpu = find_gpu(reading.gpu)
    seconds, _ = micro_step(
        sizer.compute.at(reading.micro, reading.seq_len),
        sizer.structure(reading.seq_len),
        one,
        speed_of(gpu, mixed_or_weights="bf16"),
        utilisation_of(gpu),
        hidden_of(one.config),
    )
    spread = tokens_per_second(seconds, reading.micro * reading.seq_len)
    return spread.low, spread.expected, spread.high


def test_readings_kept_apart_fall_inside() -> None:
    """At least 80 % of the readings of sources that no share was read off lie in low to high."""
    kept = [reading for reading in readings() if reading.part == "kept"]
    assert len(kept) == 54
    inside = 0
    for reading in kept:
        low, _, high = rate(reading)
        inside += low <= reading.tokens_per_s_per_gpu <= high
    assert inside >= 0.8 * len(kept), f"{inside} of {len(kept)}"


def test_a_source_is_fitted_or_kept() -> None:
    """No source is in both parts, and every reading has an address."""
    parts: dict[str, set[str]] = {}
    for reading in readings():
        parts.setdefault(reading.source, set()).add(reading.part)
        assert reading.url.startswith("https://")
    assert all(len(part) == 1 for part in parts.values())
    assert sum(1 for _ in readings()) == 93
