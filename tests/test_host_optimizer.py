"""torchao's CPUOffloadOptimizer: what stays on the card, and what lies on the host."""

from __future__ import annotations

from typing import Any

import pytest

from ftplan.errors import UnsupportedError
from ftplan.front.api import estimate
from ftplan.front.assembling import job_of
from ftplan.front.resolve import resolve
from ftplan.memory.estimate import Structure
from ftplan.memory.host import offloaded_bytes, pinned
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
)

SMALL = 4096
"""``minimal_size`` of torchao 0.18: smaller tensors stay on the card."""


def plan(name: str = "cpu_offload_adamw", accumulation: int = 1, **choice: Any) -> Plan:
    """A full finetuning job in bf16 on one card."""
    return Plan(
        model=Model(name="qwen2.5-0.5b"),
        stack="pytorch",
        method=Method(kind="full"),
        precision=Precision(weights="bf16", mixed="no"),
        batch=Batch(micro=1, seq_len=512, accumulation=accumulation),
        optimizer=OptimizerChoice(name=name, **choice),
        gradient_checkpointing=Checkpointing(kind="full"),
        hardware=Hardware(gpu="l4-24gb"),
    )


def terms(report: Report) -> dict[str, int]:
    """Bytes of each term."""
    return {term.name: term.bytes for term in report.terms}


def test_weights_and_gradients_stay_and_states_go() -> None:
    """The forward runs on the card's weights and backward leaves its gradients there: the peak is
    that of AdamW without the states of tensors of 4,096 elements and more."""
    usual, moved = (Structure(job_of(resolve(plan(n)))) for n in ("adamw", "cpu_offload_adamw"))
    states = [
        sum(term.bytes for term in each.static if term.name == "optimizer/states")
        for each in (usual, moved)
    ]
    assert usual.peak(1, 512) - moved.peak(1, 512) == states[0] - states[1]
    small = [(p, n) for p, n, _ in moved.counted if p.numel < SMALL]
    blocks = sum(n * (2 * (-(-2 * p.numel // 512) * 512) + 512) for p, n in small)
    assert small and states[1] == blocks


def test_the_host_has_a_copy_of_weight_and_gradient_and_the_states() -> None:
    """Each copy is a page-locked block of its own, the next power of two; states are as large as
    the weights, twice."""
    record = Structure(job_of(resolve(plan())))
    moved = [(p, n) for p, n, _ in record.counted if p.numel >= SMALL]
    copies = sum(2 * n * pinned(2 * p.numel) for p, n in moved)
    states = sum(2 * n * (-(-2 * p.numel // 512) * 512) for p, n in moved)
    assert offloaded_bytes(job_of(resolve(plan())), record.counted) == copies + states
    usual, without = estimate(plan()), estimate(plan("adamw"))
    assert usual.host_bytes and without.host_bytes
    assert usual.host_bytes.expected - without.host_bytes.expected == copies + states


def test_gradients_go_as_they_come_where_they_are_offloaded() -> None:
    """``offload_gradients`` frees each gradient of 4,096 elements and more once it is copied."""
    kept, gone = (estimate(plan(in_backward=on)) for on in (None, True))
    held, left = (
        sum(size for name, size in terms(one).items() if name.startswith("gradients"))
        for one in (kept, gone)
    )
    assert left < 1_000_000 < 500_000_000 < held
    assert gone.allocated_bytes and kept.allocated_bytes
    assert gone.allocated_bytes.expected < kept.allocated_bytes.expected
    assert gone.host_bytes == kept.host_bytes


def test_offloaded_gradients_do_not_accumulate() -> None:
    """torchao: not compatible with gradient accumulation, and refused so."""
    with pytest.raises(UnsupportedError, match="accumulation"):
        estimate(plan(in_backward=True, accumulation=2))


def test_it_is_found_by_the_names_that_configurations_give_it() -> None:
    """torchtune names the class by its path, an older one too."""
    for name in ("torchao.optim.CPUOffloadOptimizer", "CPUOffloadOptimizer",
                 "torchao.prototype.low_bit_optim.CPUOffloadOptimizer"):  # fmt: skip
        assert job_of(resolve(plan(name))).optimizer.name == "cpu_offload_adamw"
