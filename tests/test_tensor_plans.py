"""Tensor parallelism by transformers' own plans: what is cut, what is whole, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ftplan.errors import UnsupportedError
from ftplan.files.document import parse_document
from ftplan.files.plan import parse_plan
from ftplan.front.api import estimate
from ftplan.memory.families import build
from ftplan.memory.families.plans import HEADS, PLANS
from ftplan.memory.job import ShardingSpec
from ftplan.memory.parallel import local_config
from ftplan.memory.planned import follow_plan, plan_of
from ftplan.memory.prepare import counted_parameters
from ftplan.report import Report

CASES = Path(__file__).parent / "cases"
GOLDEN = json.loads((CASES / "tensor_ranks.json").read_text(encoding="ascii"))
REFUSED = {
    # one head of keys is not cut in two: the library's forward fails, though its weights are cut
    "families/gemma.json", "families/gemma4_text.json", "families/gemma4_text_moe.json",
    "mixtures/gemma4.json",
    # a head that is cut, tied to a table that is not
    "mixtures/lfm2.json",
}  # fmt: skip
OTHER = {
    "families/cohere-2.json": "norms over each head on its own: the library leaves them whole",
    "mixtures/ernie4_5_vl_moe.json": "its image tower is cut too",
    "mixtures/llama4.json": "its image tower is cut too",
}
COUNTED = [
    name for name, left in GOLDEN["left"].items()
    if isinstance(left, int) and name not in REFUSED and name not in OTHER
]  # fmt: skip


def _config(name: str) -> dict[str, Any]:
    return dict(json.loads((CASES / name).read_text(encoding="utf-8"))["config"])


def _left(name: str) -> int:
    config, spec = _config(name), ShardingSpec(world=GOLDEN["ranks"], tp=GOLDEN["ranks"])
    network = build(local_config(config, spec))
    follow_plan(network, config, spec)
    return sum(math.prod(p.shape) * times for p, times, _ in counted_parameters(network))


@pytest.mark.parametrize("name", COUNTED)
def test_a_rank_has_the_numbers_that_transformers_leaves_it(name: str) -> None:
    """Every small model cut in two: heads, widths, experts, tables and heads as its plan says."""
    assert _left(name) == GOLDEN["left"][name]


@pytest.mark.parametrize("name", [n for n, left in GOLDEN["left"].items() if left == "no plan"])
def test_a_model_without_a_plan_is_refused_as_transformers_refuses_it(name: str) -> None:
    """The refusal names the type and the version, and offers another way."""
    with pytest.raises(UnsupportedError, match="has no tp_plan") as refused:
        _left(name)
    assert str(_config(name)["model_type"]) in str(refused.value) and refused.value.remedy


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_fails_in_the_forward_is_refused(name: str) -> None:
    """Weights can be cut so, but no step can be run."""
    with pytest.raises(UnsupportedError, match=r"key-value heads|tied to a table"):
        _left(name)


def test_a_plan_of_the_head_alone_leaves_the_rest_whole() -> None:
    """GPT-OSS: transformers has a plan for its head and for nothing else."""
    assert "gpt_oss" in HEADS and "gpt_oss" not in PLANS
    assert plan_of({"model_type": "gpt_oss"}) == {"lm_head": "colwise_gather_output"}


def _sized(stack: str, model: str, tp: int, targets: list[str] | None = None) -> Report:
    method = {"kind": "lora", "targets": targets} if targets else {"kind": "full"}
    plan = {
        "version": 1, "model": model, "stack": stack, "method": method,
        "precision": {"weights": "bf16", "mixed": "no"}, "batch": {"micro": 1, "seq_len": 512},
        "hardware": {"gpu": "h100-80gb", "count": tp}, "sharding": {"kind": "none", "tp": tp},
    }  # fmt: skip
    parsed = parse_plan(parse_document(json.dumps(plan), file="plan.json"))
    return estimate(parsed, with_remedies=False)


def test_more_ranks_do_not_help_what_no_plan_cuts() -> None:
    """Two ranks or eight: GPT-OSS keeps its experts whole on each, Mixtral shares them out."""
    oss, mixtral = (
        [_sized("transformers", model, tp).allocated_bytes for tp in (2, 8)]
        for model in ("gpt-oss-20b", "mixtral-8x7b")
    )
    assert oss[0] and oss[1] and mixtral[0] and mixtral[1]
    assert 0.9 < oss[1].expected / oss[0].expected < 1
    assert mixtral[1].expected < 0.4 * mixtral[0].expected


@pytest.mark.parametrize("stack", ["transformers", "trl", "axolotl", "llamafactory"])
def test_trainers_on_transformers_refuse_what_it_refuses(stack: str) -> None:
    """A trainer that has no plan of its own cannot cut OPT; one that has may."""
    with pytest.raises(UnsupportedError, match="has no tp_plan"):
        _sized(stack, "opt-1.3b", 2)
    assert _sized("deepspeed", "opt-1.3b", 2).allocated_bytes


@pytest.mark.parametrize(
    ("model", "target"),
    [("llama-3.1-8b", "o_proj"), ("llama-3.1-8b", "down_proj"), ("olmo-2-7b", "q_proj")],
)
def test_adapters_are_sized_where_columns_are_cut_and_refused_elsewhere(
    model: str, target: str
) -> None:
    """PEFT's forward fails beside rows and gathered features: the layer and a way out are named."""
    with pytest.raises(UnsupportedError, match=target) as refused:
        _sized("transformers", model, 2, ["up_proj", target])
    assert "up_proj" in str(refused.value.remedy)
    assert _sized("transformers", model, 2, ["up_proj"]).allocated_bytes
    assert _sized("deepspeed", model, 2, ["up_proj", target]).allocated_bytes
