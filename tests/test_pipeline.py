"""Pipelines: what a rank has, how many micro batches are under way, and traced stages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftplan.catalog.models import resolve_model
from ftplan.errors import FtplanError, UnsupportedError
from ftplan.front.assembling import job_of
from ftplan.front.resolve import resolve
from ftplan.memory.estimate import Structure, structure_of
from ftplan.memory.job import Job, ShardingSpec
from ftplan.memory.pipeline import candidates, stages_of
from ftplan.spec import Batch, Checkpointing, Hardware, Method, Model, Plan, Sharding

TRACED = Path(__file__).parents[1] / "validation" / "pipeline.json"
ROWS: list[dict[str, Any]] = (
    json.loads(TRACED.read_text(encoding="utf-8"))["jobs"] if TRACED.exists() else []
)


def job(name: str, layers: int, *, micro_batches: int, seq_len: int = 512, **sharding: Any) -> Job:
    """A full finetuning job in bf16, cut to so many layers."""
    checkpointed = sharding.pop("checkpointed", False)
    plan = Plan(
        model=Model(name=name),
        stack="pytorch",
        method=Method(kind="full"),
        batch=Batch(micro=1, seq_len=seq_len, accumulation=micro_batches, padding="none"),
        gradient_checkpointing=Checkpointing(kind="full" if checkpointed else "none"),
        hardware=Hardware(count=sharding["pp"]),
        sharding=Sharding(**sharding),
    )
    resolved = resolve(plan)
    config = {**resolve_model(name).row.config, "num_hidden_layers": layers}
    return job_of(replace(resolved, config=config))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']}-{row['rank']}")
def test_stages_are_what_pytorch_runs(row: dict[str, Any]) -> None:
    """Traced stages of PyTorch's 1F1B and GPipe schedules are met within 1 %."""
    sized = job(
        row["model"], row["layers"], micro_batches=row["micro_batches"], seq_len=row["seq_len"],
        pp=row["stages"], schedule=row["schedule"], checkpointed=row["checkpointed"],
    )  # fmt: skip
    stages = stages_of(row["layers"], sized.sharding, row["micro_batches"])
    if row["rank"] not in {stage.rank for stage in candidates(stages)}:
        moments = [stages[row["rank"]]]
    else:
        moments = [stage for stage in candidates(stages) if stage.rank == row["rank"]]
    peak = 0
    for stage in moments:
        phases = Structure(replace(sized, stage=stage)).phases(row["micro"], row["seq_len"])
        peak = max(peak, *(size for name, size in phases if name != "step"))
    assert abs(peak / row["allocated_bytes"] - 1) < 0.01


def test_traced_stages_were_read() -> None:
    """The file of traced stages has not lost its rows."""
    assert len(ROWS) >= 10


def test_every_layer_is_on_one_rank() -> None:
    """Stages cover all layers once, interleaved or not, also where it does not come out even."""
    for layers, ranks, virtual in ((8, 4, 1), (30, 4, 1), (32, 4, 2), (33, 4, 4)):
        spec = ShardingSpec(world=ranks, pp=ranks, virtual_stages=virtual)
        stages = stages_of(layers, spec, 8)
        found = sorted(n for s in stages for a, b in s.chunks for n in range(a, b))
        assert found == list(range(layers))
        assert all(len(stage.chunks) == virtual for stage in stages)


def test_schedules_keep_what_they_say() -> None:
    """GPipe keeps every micro batch, 1F1B as many as stages to come, interleaving more."""
    one = [s.in_flight for s in stages_of(16, ShardingSpec(world=4, pp=4), 8)]
    assert one == [4, 3, 2, 1]
    spec = ShardingSpec(world=4, pp=4, schedule="gpipe")
    assert [s.in_flight for s in stages_of(16, spec, 8)] == [8] * 4
    spec = ShardingSpec(world=4, pp=4, schedule="interleaved", virtual_stages=2)
    assert [s.in_flight for s in stages_of(16, spec, 8)] == [11, 9, 7, 5]
    assert [s.in_flight for s in stages_of(16, ShardingSpec(world=4, pp=4), 2)] == [2, 2, 2, 1]


def test_weights_of_all_stages_are_the_model() -> None:
    """The stages of an untied model have its weights between them, each once."""
    sized = job("llama-3.1-8b", 8, micro_batches=4, pp=4)
    parts = [
        Structure(replace(sized, stage=stage)).total_params
        for stage in stages_of(8, sized.sharding, 4)
    ]
    whole = Structure(replace(sized, sharding=ShardingSpec())).total_params
    assert sum(parts) == whole


def test_a_tied_head_is_on_both_ends() -> None:
    """Tied embeddings are a weight of the first stage and of the last one."""
    sized = job("qwen3-4b", 8, micro_batches=4, pp=4)
    stages = stages_of(8, sized.sharding, 4)
    first, middle, last = (
        Structure(replace(sized, stage=stages[rank])).total_params for rank in (0, 1, 3)
    )
    table = first - middle
    assert table > 0
    assert last - middle >= table


def test_the_worst_rank_is_no_better_than_any() -> None:
    """What is answered is the largest of the ranks looked at, and it has a name."""
    sized = job("llama-3.1-8b", 8, micro_batches=8, pp=4)
    worst = structure_of(sized)
    assert worst.stage is not None and "stage" in worst.stage.name
    for stage in stages_of(8, sized.sharding, 8):
        other = Structure(replace(sized, stage=stage))
        assert other.peak(1, 512) <= worst.peak(1, 512) * 1.001


def test_too_many_stages_are_refused() -> None:
    """A pipeline longer than the model is an error that says the most there can be."""
    with pytest.raises(FtplanError, match="for 8 layers"):
        structure_of(job("llama-3.1-8b", 8, micro_batches=8, pp=16))


def test_a_stage_that_needs_what_another_one_picked_is_refused() -> None:
    """GLM-5.2's layers look at the tokens that an earlier layer picked: no stage sends them on."""
    with pytest.raises(UnsupportedError, match="another one's tokens"):
        structure_of(job("glm-5.2", 8, micro_batches=8, pp=2))
