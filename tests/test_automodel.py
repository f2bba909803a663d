"""NeMo AutoModel's own ways, where no trace of its recipe could say no."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_bench import accuracy

from ftplan.errors import InputError, UnsupportedError
from ftplan.front import api
from ftplan.spec import Plan


def _plan(**more: Any) -> Plan:
    plan: Plan = accuracy.plan_of(
        {
            "version": 1, "model": "llama-3.2-1b", "stack": "nemo", "method": {"kind": "full"},
            "batch": {"micro": 1, "seq_len": 512}, "hardware": {"gpu": "h100-80gb", "count": 1},
            **more,
        }
    )  # fmt: skip
    return plan


def _allocated(plan: Plan) -> int:
    allocated = api.estimate(plan, with_remedies=False).allocated_bytes
    assert allocated is not None
    return allocated.expected


def test_one_rank_is_not_wrapped() -> None:
    """FSDP2 of one GPU is no sharding, and casts nothing."""
    policy = {"kind": "fsdp", "version": 2, "param_dtype": "bf16", "reduce_dtype": "fp32"}
    assert _allocated(_plan(sharding=policy)) == _allocated(_plan(sharding={"kind": "none"}))


def test_selective_checkpointing_of_its_lora_is_refused_by_name() -> None:
    """PyTorch raises on the product that is added to; with a dropout between them it does not."""
    lora = {"kind": "lora", "rank": 8, "targets": "all-linear"}
    plan = _plan(method=lora, gradient_checkpointing={"kind": "selective"})
    with pytest.raises(UnsupportedError, match="selective checkpointing"):
        _allocated(plan)
    for change in ({"dropout": 0.1}, {"fused_lora": False}):
        assert plan.method is not None
        assert _allocated(replace(plan, method=replace(plan.method, **change))) > 0


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_its_dora_on_a_quantised_base_is_refused_by_name(weights: str) -> None:
    """It adds the update to the packed weight, which fails."""
    plan = _plan(method={"kind": "dora"}, precision={"weights": weights, "mixed": "no"})
    with pytest.raises(UnsupportedError, match="DoRA on a quantised base"):
        _allocated(plan)


def test_its_model_code_comes_with_no_other_stack() -> None:
    """``kernels: automodel`` is the stack's alone."""
    with pytest.raises(InputError, match="does not come with"):
        _allocated(_plan(stack="transformers", kernels="automodel"))


def test_its_checkpoints_are_of_parts() -> None:
    """Attention, MLP and norms keep an input each: more than transformers' blocks, which keep one,
    and less than no checkpointing."""
    batch = {"micro": 4, "seq_len": 8192}
    kept, parts, blocks = (
        _allocated(_plan(batch=batch, loss="fused", **more))
        for more in (
            {"gradient_checkpointing": False},
            {"gradient_checkpointing": True},
            {"gradient_checkpointing": True, "kernels": "none"},
        )
    )
    assert blocks < parts < kept
