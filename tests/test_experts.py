"""Expert parallelism: what lies where, what travels, and what nobody knows before a run."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from ftplan.errors import UnsupportedError
from ftplan.front.api import estimate
from ftplan.front.assembling import job_of
from ftplan.front.resolve import resolve
from ftplan.memory.dispatch import DeepEP
from ftplan.memory.estimate import Structure
from ftplan.memory.experts import Experts
from ftplan.memory.job import ShardingSpec
from ftplan.memory.prepare import prepare
from ftplan.report import Report
from ftplan.spec import (
    Batch,
    Checkpointing,
    Hardware,
    Method,
    Model,
    Plan,
    Precision,
    Sharding,
)

ATTENTION = Method(kind="lora", rank=16, targets=("q_proj", "o_proj"))
MIXTRAL = {"layers": 32, "hidden": 4096, "inner": 14336, "experts": 8, "top_k": 2}


def plan(ep: int, gpus: int, **more: Any) -> Plan:
    """A job of Mixtral (or ``model``) with its experts on ``ep`` ranks."""
    return Plan(
        model=Model(name=more.pop("model", "mixtral-8x7b")),
        stack=more.pop("stack", "transformers"),
        method=more.pop("method", Method(kind="full")),
        precision=Precision(weights="bf16", mixed="no"),
        batch=Batch(micro=1, seq_len=1024, eval_micro=more.pop("eval_micro", None)),
        gradient_checkpointing=Checkpointing(kind=more.pop("checkpointing", "full")),
        hardware=Hardware(count=gpus, nodes=more.pop("nodes", None), gpu="h200-141gb"),
        sharding=Sharding(ep=ep, **more),
    )


def record(ep: int, gpus: int, **more: Any) -> Structure:
    """The record of such a job."""
    return Structure(job_of(resolve(plan(ep, gpus, **more))))


def report(ep: int, gpus: int, **more: Any) -> Report:
    """The report of such a job."""
    return estimate(plan(ep, gpus, **more))


def experts_of(parts: int) -> int:
    """Bytes of a part of Mixtral's experts in bf16."""
    matrices = 3 * MIXTRAL["hidden"] * MIXTRAL["inner"]
    return 2 * MIXTRAL["layers"] * MIXTRAL["experts"] * matrices // parts


@pytest.mark.parametrize(("ep", "gpus"), [(2, 8), (4, 8), (2, 4), (8, 8)])
def test_experts_are_sharded_over_those_ranks_alone_that_have_the_same_ones(
    ep: int, gpus: int
) -> None:
    """Of n ranks each has 1 / ep of the experts, and FSDP a part of that over n / ep: in all an
    n-th, while everything else is over all n ranks."""
    counted = record(ep, gpus).counted
    here = sum(p.numel * times for p, times, _ in counted if p.expert)
    assert 2 * here == experts_of(ep)
    rest = sum(2 * p.numel * times for p, times, _ in counted if not p.expert)
    static = {term.name: term.bytes for term in record(ep, gpus).static}
    assert static["weights/trainable"] == pytest.approx(experts_of(gpus) + rest / gpus, rel=1e-4)


def test_one_expert_on_two_ranks_is_whole_on_the_first() -> None:
    """FSDP2 cuts the first dimension, which is the experts': with one left there is nothing to cut,
    and the first rank has it whole (traced: as much as on half as many GPUs)."""
    sixteen, eight = (record(8, gpus) for gpus in (16, 8))
    experts = [
        sum(term.bytes for term in each.static if term.name == "weights/trainable")
        for each in (sixteen, eight)
    ]
    assert experts_of(8) < experts[0] < experts[1] < 1.05 * experts_of(8)


def test_every_rank_routes_to_all_experts() -> None:
    """The router is whole: it has a row for each expert of the model, not of the rank."""
    network = prepare(job_of(resolve(plan(4, 8))))
    rows = {
        path: parameter.shape[0]
        for path, parameter in network.stages[0].stack.kinds[0].named_parameters()
    }
    assert rows["mlp.gate.weight"] == MIXTRAL["experts"]
    assert rows["mlp.experts.gate_up_proj"] == MIXTRAL["experts"] // 4


def test_uneven_routing_widens_the_interval_upwards_and_is_named() -> None:
    """Expected is a balanced router. High has what a rank would take if all of its group sent it
    every token; the line says so, and is no part of the sum."""
    found = report(4, 8, checkpointing="none")
    lines = [term for term in found.terms if term.name == "unexplained/routing"]
    assert len(lines) == 1 and not lines[0].at_peak
    assert found.allocated_bytes is not None
    kept = record(4, 8, checkpointing="none")
    assert lines[0].bytes == kept.uneven_bytes(1, 1024)
    # each layer keeps gate and up, silu, their product and two copies of the input for each row
    width = 2 * (2 + 1 + 1) * MIXTRAL["inner"] + 2 * MIXTRAL["hidden"]
    rows = 1024 * (4 * 2 - MIXTRAL["top_k"])
    assert lines[0].bytes == pytest.approx(MIXTRAL["layers"] * rows * width, rel=0.2)
    above = found.allocated_bytes.high - found.allocated_bytes.expected
    assert above > lines[0].bytes > found.allocated_bytes.expected - found.allocated_bytes.low


def test_without_travelling_tokens_there_is_no_such_line() -> None:
    """Experts that are whole on every rank see the tokens of that rank."""
    found = report(1, 8, kind="fsdp")
    assert not [term for term in found.terms if term.name == "unexplained/routing"]


def test_ranks_of_one_batch_take_a_slice_each() -> None:
    """Without FSDP the ranks share a batch: a rank's experts see a share of its rows. Two ranks
    keep half of what one rank's mixture keeps, but for what is as long as the batch."""
    alone = record(1, 1, kind="none", checkpointing="none", method=ATTENTION)
    shared = record(2, 2, kind="none", checkpointing="none", method=ATTENTION)
    mixtures = [
        {label.name: alive.bytes for label, alive in each.at(1, 1024).alive.items()}["mlp"]
        for each in (alone, shared)
    ]
    assert 0.45 < mixtures[1] / mixtures[0] < 0.75


def test_an_evaluation_on_one_batch_masks_what_is_another_rank_s() -> None:
    """Without a graph nothing travels: each rank runs all rows, as many as without spreading."""
    without = record(1, 1, kind="none", eval_micro=8, method=ATTENTION).evaluation
    spread = record(2, 2, kind="none", eval_micro=8, method=ATTENTION).evaluation
    assert without is not None and spread is not None
    bytes_of = [each.peak(8, 1024) for each in (without, spread)]
    assert bytes_of[0] <= bytes_of[1] < 1.3 * bytes_of[0]


@pytest.mark.parametrize(
    ("ep", "gpus", "more", "what"),
    [
        (3, 6, {}, "of 8 experts"),
        (4, 6, {}, "on 6 GPUs"),
        (4, 8, {"kind": "zero3"}, "with zero3"),
        (2, 2, {"kind": "zero3", "stack": "torchtitan"}, "with zero3"),
        (4, 8, {"kind": "ddp"}, "with ddp"),
        (4, 8, {"kind": "fsdp", "version": 1}, "with FSDP1"),
        (4, 8, {"kind": "none"}, "with none"),
        (4, 8, {"pp": 2}, "pipeline"),
        (2, 8, {"tp": 4}, "tensor parallelism 4"),
        (2, 2, {"model": "llama-3.1-8b"}, "without experts"),
        (4, 8, {"method": Method(kind="lora", targets="all-linear")}, "adapters on"),
        (4, 8, {"stack": "axolotl", "kind": "fsdp", "tp": 2}, "axolotl"),
    ],
)
def test_what_nobody_runs_is_refused_by_name(
    ep: int, gpus: int, more: dict[str, Any], what: str
) -> None:
    """Each combination that transformers, PEFT or axolotl refuse is refused, with a way out."""
    with pytest.raises(UnsupportedError) as refused:
        report(ep, gpus, **more)
    assert what in str(refused.value) and refused.value.remedy


def test_fsdp_is_what_experts_are_spread_with_where_nothing_is_said() -> None:
    """Ranks with batches of their own need FSDP2 (transformers) or DDP (axolotl's plugin)."""
    assert resolve(plan(4, 8)).plan.sharding.kind == "fsdp"
    assert resolve(plan(8, 8, stack="axolotl")).plan.sharding.kind == "ddp"


def test_rows_travel_to_their_experts_and_back() -> None:
    """Dispatch and combine, there and back, and again where blocks run again: 6 times tokens x top
    k x hidden in bf16, but for the share that stays; between nodes only where the group is larger
    than one."""
    rows = 1024 * MIXTRAL["top_k"] * MIXTRAL["hidden"] * 2 * MIXTRAL["layers"]
    for checkpointing, times in (("full", 6), ("none", 4)):
        apart = report(4, 8, checkpointing=checkpointing, nodes=2)
        sent = apart.details["communication"]
        assert f"{times} all-to-alls" in sent["collective"]
        wider = report(8, 4, checkpointing=checkpointing, nodes=2).details["communication"]
        within = sent["bytes_per_step"] - sent["bytes_per_step_between_nodes"]
        assert within == times * rows * 3 // 4
        assert wider["bytes_per_step"] == wider["bytes_per_step_between_nodes"]


def test_the_checkpoint_has_the_experts_of_all_ranks() -> None:
    """What is written does not depend on how experts are spread."""
    sizes = [report(ep, 8, kind="fsdp").details["disk_bytes"]["weights"] for ep in (1, 4)]
    assert sizes[0] == sizes[1]
    counts = {record(ep, 8, kind="fsdp").trainable_params for ep in (1, 4)}
    assert len(counts) == 1


@pytest.mark.parametrize(("whole", "here", "top_k"), [(8, 2, 2), (16, 4, 4), (8, 1, 2), (12, 6, 3)])
def test_deep_ep_sends_a_token_once_to_each_rank_that_has_one_of_its_experts(
    whole: int, here: int, top_k: int
) -> None:
    """Over all choices of top k experts, a rank of ``whole / here`` receives the tokens that chose
    one of its own; at worst those of all."""
    choices = list(combinations(range(whole), top_k))
    ranks = whole // here
    met = sum(any(expert < here for expert in choice) for choice in choices) / len(choices)
    even = DeepEP(ShardingSpec(kind="fsdp", world=ranks, ep=ranks), whole)
    assert 0 <= even._copies(here, top_k) - ranks * met < 1 + 1e-9
    worst = DeepEP(ShardingSpec(kind="fsdp", world=ranks, ep=ranks, worst_routing=True), whole)
    assert worst._copies(here, top_k) == ranks


def test_axolotl_runs_a_row_for_each_expert_of_a_token_that_arrived() -> None:
    """DeepEP with the default kernel runs more rows than were routed, adapts the experts of a rank
    by themselves, and has a buffer beside PyTorch's allocator."""
    job = {"kind": "fsdp", "checkpointing": "none", "method": ATTENTION}
    peaks = [record(8, 16, stack=stack, **job).peak(1, 1024) for stack in ("axolotl", "pytorch")]
    assert peaks[0] > 1.1 * peaks[1]
    adapted = record(8, 16, stack="axolotl", kind="fsdp", method=Method(kind="lora"))
    assert adapted.beside_bytes == 256 << 20
    shapes = {p.shape for p, _, _ in adapted.counted if p.added}
    assert (16, MIXTRAL["inner"]) in shapes and (16 * 8, MIXTRAL["inner"]) not in shapes
    network = prepare(job_of(resolve(plan(8, 16, stack="axolotl", kind="fsdp"))))
    block = network.stages[0].stack.kinds[0]
    assert [m.count for _, m in block.named_modules() if isinstance(m, Experts)] == [1]


@pytest.mark.parametrize("stack", ["nemo", "torchtitan"])
def test_stacks_with_expert_parallelism_of_their_own(stack: str) -> None:
    """What transformers and PEFT refuse, stages of a pipeline and adapted experts, is sized for
    stacks that do it by code of their own, with their own interval; with half of the layers on a
    rank there are half of its experts."""
    adapted = Method(kind="lora", rank=16, targets="all-linear")
    for more in ({"pp": 2}, {"method": adapted}):
        with pytest.raises(UnsupportedError):
            report(4, 8, **more)
        found = report(4, 8, stack=stack, **more)
        assert any(term.name == "unexplained/stack" for term in found.terms)
    whole, half = (
        sum(t.bytes for t in report(4, 8 * pp, stack=stack, pp=pp).terms if "weights/tr" in t.name)
        for pp in (1, 2)
    )
    assert half < 0.55 * whole
