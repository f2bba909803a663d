"""The search's path and the report's: two ways to the worst moment, one integer."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.front.api import estimate
from ftplan.front.assembling import job_of
from ftplan.front.resolve import resolve
from ftplan.memory.estimate import Structure
from ftplan.memory.moments import WorstMoments, chains_of, undominated
from ftplan.memory.replay import rounded
from ftplan.memory.tape import ONE, Size, basis
from ftplan.spec import Batch, Checkpointing, Loss, Method, Model, Plan, Precision

PLANS = [
    Plan(model=Model(name="llama-3.1-8b"), method=Method(kind="lora"),
         gradient_checkpointing=Checkpointing()),
    Plan(model=Model(name="gpt2"), method=Method(kind="full"), precision=Precision(mixed="bf16"),
         batch=Batch(accumulation=2)),
    Plan(model=Model(name="mixtral-8x7b"), method=Method(kind="qlora"), stack="trl"),
]  # fmt: skip
STRUCTURES = [Structure(job_of(resolve(plan))) for plan in PLANS]

sizes = st.lists(
    st.tuples(*[st.integers(0, 3)] * 9).map(lambda values: Size(v * 100 for v in values)),
    min_size=1, max_size=5, unique=True,
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(STRUCTURES), st.integers(1, 64), st.integers(1, 20_000), st.integers(0, 4096)
)
def test_the_searchs_peak_is_the_reports(
    structure: Structure, micro: int, seq_len: int, chunk: int
) -> None:
    """Whatever the batch, the quick peak is the largest of the phases that a report lists."""
    slow = max(peak for _, peak in structure.phases(micro, seq_len, chunk))
    assert structure.peak(micro, seq_len, chunk) == slow


@settings(deadline=None, max_examples=200)
@given(sizes, st.data())
def test_no_moment_that_is_left_out_is_larger(table: list[Size], data: st.DataObject) -> None:
    """The largest of the kept moments is the largest of all, at every batch."""
    count = st.tuples(*[st.integers(0, 4)] * len(table))
    moments = data.draw(st.lists(count, min_size=1, max_size=8))
    point = basis(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 999)), 7)
    worth = [rounded(size.at(point)) for size in table]

    def largest(chosen: list[tuple[int, ...]]) -> int:
        return max(sum(a * b for a, b in zip(moment, worth, strict=True)) for moment in chosen)

    assert largest(undominated(moments, chains_of(table))) == largest(moments)


def test_a_step_that_is_played_again_and_again_grows() -> None:
    """A segment that leaves something behind is the worst in its last run."""
    worst = WorstMoments([ONE * 512], [[0, 0, 1]], [(0, 5)])
    assert worst.at(basis(1, 1)) == (6 * 512, 5 * 512)


@pytest.mark.parametrize("eval_micro", [1, 32])
@pytest.mark.parametrize("loss", ["full", "fused"])
def test_an_evaluation_is_sized_when_it_is_asked_for(
    eval_micro: int, loss: Literal["full", "fused"]
) -> None:
    """A large evaluation batch is the worst moment, and a small one where training makes no
    logits (Liger's loss makes them in evaluation); terms add up in both."""
    plan = Plan(
        model=Model(name="llama-3.2-1b"),
        method=Method(kind="lora"),
        batch=Batch(micro=2, seq_len=1024, eval_micro=eval_micro, accumulation=4),
        gradient_checkpointing=Checkpointing(),
        loss=Loss(kind=loss),
    )
    report = estimate(plan)
    phases = {phase.name: phase.peak_bytes for phase in report.phases}
    worst = eval_micro == 32 or loss == "fused"
    assert (report.peak_phase == "evaluation") == worst
    assert report.allocated_bytes is not None
    assert max(phases.values()) == report.allocated_bytes.expected == report.total()
    job = job_of(resolve(plan))
    assert Structure(job).peak(2, 1024) == report.allocated_bytes.expected
