"""torchtitan as its own Trainer ran it: what the walk of its modules must not lose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftplan.errors import UnsupportedError
from ftplan.front.assembling import job_of
from ftplan.front.resolve import Resolved, resolve
from ftplan.memory.estimate import Structure
from ftplan.trace.job import plan_from

TRACES = Path(__file__).parents[1] / "validation" / "trainers" / "torchtitan-0.3.0.json"


def resolved(model: str = "llama-3.1-8b", world: int = 8, **changes: Any) -> Resolved:
    plan = {
        "model": model, "stack": "torchtitan", "task": "pt", "method": {"kind": "full"},
        "precision": {"mixed": "bf16"}, "batch": {"micro": 1, "seq_len": 2048},
        "hardware": {"gpu": "h100-80gb", "count": world}, **changes,
    }  # fmt: skip
    return resolve(plan_from(plan))


def structure(model: str = "llama-3.1-8b", world: int = 8, **changes: Any) -> Structure:
    return Structure(job_of(resolved(model, world, **changes)))


def test_phases_are_those_of_the_trainer() -> None:
    """Of every job of the trace not the peak alone but that of each phase is met, within 0.01 %."""
    lines = json.loads(TRACES.read_text("ascii"))["jobs"]
    assert len(lines) >= 59
    for line in lines:
        job = job_of(resolve(plan_from(line["plan"])))
        cut = {**job.config, "num_hidden_layers": line["layers"]}
        found = Structure(_with(job, cut))
        phases = dict(found.phases(job.micro, job.seq_len, job.loss_chunk))
        for name, true in line["phases"].items():
            assert abs(phases[name] / true - 1) < 1e-4, (line["name"], name)


def _with(job: Any, config: dict[str, Any]) -> Any:
    from dataclasses import replace

    return replace(job, config=config)


@pytest.mark.parametrize("world", [1, 8])
def test_a_plan_that_says_little_is_what_the_trainer_does(world: int) -> None:
    """FSDP2 on one GPU too, reduced in fp32, weights in fp32, checkpointed by operation, a loss of
    eight chunks, gradients that stay: each from the profile, none asked for."""
    found = resolved(world=world)
    plan, job = found.plan, job_of(found)
    assert (plan.sharding.kind, plan.sharding.reduce_dtype) == ("fsdp", "fp32")
    assert plan.sharding.apart == ("embeddings", "head")
    assert plan.precision.weights == "fp32"
    assert plan.loss is not None and (plan.loss.kind, plan.loss.chunk) == ("chunked", 256)
    assert job.modules == "torchtitan" and job.keeps_gradients
    assert job.environment.keeps_products and not job.environment.early_stop
    names = {term.name for term in Structure(job).static}
    assert "gradients/accumulated" in names


def test_experts_on_other_ranks_let_gradients_go() -> None:
    """CUDA graphs, which keep gradients from step to step, do not take experts on other ranks."""
    apart = structure("qwen3-30b-a3b", 16, sharding={"ep": 8})
    whole = structure("qwen3-30b-a3b", 16)
    assert "gradients/accumulated" in {term.name for term in whole.static}
    assert "gradients/accumulated" not in {term.name for term in apart.static}
    assert apart.total_params == whole.total_params


def test_uneven_routing_reaches_a_rank() -> None:
    """At worst a rank is sent rows of all ranks: that is more than an even share."""
    apart = structure("qwen3-30b-a3b", 16, sharding={"ep": 8})
    assert apart.uneven_bytes(4, 4096, 512) > 0


def test_experts_that_a_degree_does_not_divide_are_refused() -> None:
    """The refusal names a remedy."""
    with pytest.raises(UnsupportedError) as caught:
        structure("qwen3-30b-a3b", 12, sharding={"ep": 12})
    assert "128" in caught.value.remedy


def test_tied_embeddings_are_one_unit_that_reduces_twice() -> None:
    """The chunked loss reduces the head's gradient before the embeddings' has come: the final
    norm's gradient is a view of that second sum, and holds as much again."""

    def held(loss: str) -> int:
        made = structure("llama-3.2-1b", 8, loss=loss)
        (term,) = [t for t in made.static if t.name == "gradients/accumulated"]
        return term.bytes

    assert held("chunked") - held("full") == 128_256 * 2048 * 4 // 8


@pytest.mark.parametrize(
    ("changes", "modules"),
    [
        ({"sharding": {"tp": 2}}, "torchtitan"),
        ({"sharding": {"tp": 2, "sequence_parallel": False}}, ""),
        ({"sharding": {"kind": "ddp"}}, ""),
        ({"sharding": {"kind": "fsdp", "version": 1}}, ""),
        ({"sharding": {"kind": "fsdp", "offload": "params"}}, ""),
        ({"attention": "eager"}, ""),
        ({"model": "gpt2-xl"}, ""),
        ({"model": "deepseek-v3"}, "torchtitan"),
        ({"model": "deepseek-v3", "sharding": {"tp": 2}}, ""),
        ({"model": "qwen3-30b-a3b", "sharding": {"tp": 2, "ep": 2}}, ""),
    ],
)
def test_only_what_was_run_is_walked_in_its_modules(changes: dict[str, Any], modules: str) -> None:
    """Anything else is walked as transformers' model, and the answer says so."""
    assert job_of(resolved(**changes)).modules == modules
