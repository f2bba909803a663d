"""Sequence parallelism: what a paper counts, what it saves, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftplan.errors import UnsupportedError
from ftplan.front.api import estimate
from ftplan.memory.attention import Heads
from ftplan.memory.env import Environment
from ftplan.memory.families import build
from ftplan.memory.job import ShardingSpec
from ftplan.memory.parallel import local_config
from ftplan.memory.prepare import counted_parameters
from ftplan.memory.replay import Program
from ftplan.memory.sequence import split_sequence
from ftplan.memory.steps import record_step
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

SEQUENCES, TOKENS, HIDDEN, HEADS = 2, 512, 1024, 16


def kept(layers: int, spec: ShardingSpec) -> int:
    """Bytes that a GPT's forward leaves for the way back, as the paper has it: dropout, GELU as one
    kernel, attention written out, its softmax in two bytes."""
    shape = {
        "model_type": "opt", "hidden_size": HIDDEN, "ffn_dim": 4 * HIDDEN,
        "num_attention_heads": HEADS, "num_hidden_layers": layers, "vocab_size": 512,
        "max_position_embeddings": TOKENS, "activation_function": "gelu", "dropout": 0.1,
        "attention_dropout": 0.1, "word_embed_proj_dim": HIDDEN,
    }  # fmt: skip
    config = local_config(shape, spec)
    network = build(config)
    for parameter, _, _ in counted_parameters(network):
        parameter.dtype = "bf16"
    attention = network.stages[0].stack.kinds[0].child("self_attn")
    heads = vars(attention)["heads"]
    assert isinstance(heads, Heads)
    vars(attention)["heads"] = replace(heads, softmax_fp32=False)
    if spec.sequence_parallel:
        split_sequence(network, config, spec)
    parts = spec.tp if spec.sequence_parallel else 1
    env = Environment(attention="eager", seq_len=TOKENS, sequence_parts=parts)
    recording = record_step(network, env)
    return Program(recording, recording.phases()[:1]).levels(SEQUENCES, TOKENS)[1]


@pytest.mark.parametrize(
    ("tp", "sequence_parallel"),
    [(1, False), (2, False), (4, False), (8, False), (2, True), (4, True), (8, True)],
)
def test_korthikantis_activations(tp: int, sequence_parallel: bool) -> None:
    """A layer keeps s b h (10 + 24 / t + 5 a s / (h t)) bytes under tensor parallelism, and
    s b h (34 + 5 a s / h) / t with sequence parallelism (arXiv 2205.05198, equations 2 and 4), but
    for a mean and a deviation of each row that a norm keeps in fp32."""
    spec = ShardingSpec(world=tp, tp=tp, megatron=True, sequence_parallel=sequence_parallel)
    layer = kept(3, spec) - kept(2, spec)
    scores = 5 * HEADS * TOKENS / HIDDEN
    whole = 10 + 24 / tp + scores / tp if not sequence_parallel else (34 + scores) / tp
    rows = SEQUENCES * TOKENS // (tp if sequence_parallel else 1)
    assert layer == whole * SEQUENCES * TOKENS * HIDDEN + 2 * 2 * 4 * rows


def job(model: str, gpus: int, sharding: Sharding) -> Plan:
    """A job of Megatron's in bf16."""
    return Plan(
        model=Model(name=model),
        stack="megatron",
        method=Method(kind="full"),
        precision=Precision(weights="bf16", mixed="no"),
        batch=Batch(micro=1, seq_len=4096, accumulation=2, padding="none"),
        optimizer=OptimizerChoice(name="adamw_torch_fused"),
        gradient_checkpointing=Checkpointing(kind="selective"),
        hardware=Hardware(count=gpus, gpu="h100-80gb"),
        sharding=sharding,
    )


def test_parts_of_the_tokens_save_what_is_whole_without() -> None:
    """Activations shrink, by less than there are ranks; weights and states by nothing.

    Megatron's fused layers keep little that is whole: two norms' inputs and outputs, in bf16."""
    without, parted = (
        estimate(job("llama-3.1-8b", 8, Sharding(kind="zero1", tp=4, sequence_parallel=on)))
        for on in (None, True)
    )
    for name in ("weights/trainable", "optimizer/states", "gradients/main"):
        assert [t.bytes for t in without.terms if t.name == name] == [
            t.bytes for t in parted.terms if t.name == name
        ]
    shares = [
        sum(term.bytes for term in report.terms if term.name.startswith("activations/"))
        for report in (without, parted)
    ]
    assert shares[0] / 4 < shares[1] < shares[0] * 0.65
    sent = [report.details["communication"] for report in (without, parted)]
    assert ["reduce-scatters of activations" in str(each) for each in sent] == [False, True]


def test_experts_are_whole_and_their_states_are_spread_over_who_has_them() -> None:
    """Megatron in ms-swift cuts experts by expert parallelism alone: with tp 4 and ep 8 on 8 GPUs
    each has an eighth of them, and all of that eighth's states."""
    experts = 48 * 128 * 3 * 2048 * 768 // 8
    sharding = Sharding(kind="zero1", tp=4, ep=8, sequence_parallel=True)
    report = estimate(job("qwen3-30b-a3b", 8, sharding))
    terms = {term.name: term.bytes for term in report.terms}
    assert 2 * experts < terms["weights/trainable"] < 2.3 * experts
    assert 8 * experts < terms["optimizer/states"] < 9 * experts
    cut = estimate(job("qwen3-30b-a3b", 8, Sharding(kind="zero1", tp=2, ep=4, etp=2)))
    terms = {term.name: term.bytes for term in cut.terms}
    assert 2 * experts < terms["weights/trainable"] < 2.5 * experts


@pytest.mark.parametrize(
    ("model", "sharding", "what"),
    [
        ("llama-4-scout-17b-16e", Sharding(tp=2, sequence_parallel=True), "is not cut"),
        ("qwen3-30b-a3b", Sharding(tp=2, etp=2, sequence_parallel=True), "experts that are cut"),
        ("bert-base", Sharding(tp=2), "tensor parallelism of bert"),
    ],
)
def test_what_is_not_known_is_refused(model: str, sharding: Sharding, what: str) -> None:
    """Layers that tensor parallelism leaves whole may need all tokens: they are not guessed."""
    with pytest.raises(UnsupportedError, match=what):
        estimate(job(model, 2, sharding))


def test_it_does_nothing_without_tensor_parallelism() -> None:
    """ms-swift turns it off there; a plan that sets it is told so."""
    alone, idle = (
        estimate(job("qwen2.5-0.5b", 2, Sharding(kind="zero1", sequence_parallel=on)))
        for on in (None, True)
    )
    assert alone.allocated_bytes == idle.allocated_bytes
    assert any("sharding.sequence_parallel" in finding.message for finding in idle.findings)


def test_a_ring_needs_more_than_its_part() -> None:
    """Ring attention holds all keys and values for a moment, and sums in fp32: more than a sequence
    of the part's length would, and less than the whole one."""

    def peak(tokens: int, cp: int | None) -> int:
        report = estimate(
            Plan(
                model=Model(name="tinyllama-1.1b"),
                stack="transformers",
                method=Method(kind="full"),
                precision=Precision(weights="bf16", mixed="no"),
                batch=Batch(micro=1, seq_len=tokens, accumulation=1, padding="none"),
                optimizer=OptimizerChoice(name="adamw_torch_fused"),
                gradient_checkpointing=Checkpointing(kind="none"),
                attention="sdpa",
                hardware=Hardware(count=4),
                sharding=Sharding(kind="fsdp", version=2, cp=cp),
            )
        )
        assert report.allocated_bytes is not None
        return report.allocated_bytes.expected

    assert peak(8192, None) < peak(32768, 4) < peak(32768, None)


def test_blocks_whose_parts_are_not_known_are_refused() -> None:
    """Granite's experts gather their tokens themselves: a refusal, not a failure."""
    plan = job(
        "granite-3.1-3b-a800m", 4, Sharding(kind="zero1", tp=2, ep=2, sequence_parallel=True)
    )
    plan = replace(plan, stack="torchtitan", gradient_checkpointing=Checkpointing(kind="none"))
    with pytest.raises(UnsupportedError, match="sequence parallelism"):
        estimate(plan)
