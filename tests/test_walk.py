"""The walk goes back as PyTorch's engine does: when a block runs again, what it keeps.

Each rule was read off a trace of the real libraries (see tools/accuracy.py and the module
ftplan.trace.differential) and is held here by itself.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from ftplan.errors import UnsupportedError
from ftplan.files.document import parse_document
from ftplan.files.plan import parse_plan
from ftplan.front.api import estimate
from ftplan.front.assembling import job_of
from ftplan.front.resolve import resolve
from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend, kernel
from ftplan.memory.checkpointing import checkpoint
from ftplan.memory.env import Environment
from ftplan.memory.estimate import Structure
from ftplan.memory.families import TEXT_ALONE, build, text_alone
from ftplan.memory.tape import ONE, TOKENS, Parameter, Tape, Tensor, backward
from ftplan.report import Report

WIDTH = 64


def plan_of(**keys: Any) -> Any:
    base: dict[str, Any] = {
        "version": 1,
        "model": "smollm-135m",
        "stack": "transformers",
        "method": {"kind": "lora"},
        "batch": {"micro": 2, "seq_len": 128},
        "hardware": {"gpu": "a100-80gb"},
    }
    return parse_plan(parse_document(json.dumps({**base, **keys}), file="plan.json"))


def sized(**keys: Any) -> Report:
    return estimate(plan_of(**keys), with_remedies=False)


def played(function: Any, *, reentrant: bool = False) -> tuple[Tape, int]:
    """A checkpointed function forward and backward; the events' number where backward begins."""
    tape = Tape(env=Environment(reentrant=reentrant))
    x = tape.tensor(TOKENS, WIDTH, "bf16", "input")
    x.requires_grad, x.node = True, Parameter("x", (WIDTH,), "bf16", True)
    out = checkpoint(function, x, trains=True)
    start = len(tape.events)
    grad = [tape.tensor(TOKENS, WIDTH, "bf16", "seed")]
    backward(out, grad.pop())
    return tape, start


def born(tape: Tape, since: int) -> list[str]:
    """Names of what comes alive, in order."""
    return [tape.labels[event - 1].name for event in tape.events[since:] if event > 0]


def test_a_block_runs_again_when_its_first_saved_tensor_is_asked_for() -> None:
    """Steps back that need nothing saved go first: their gradients are alive beside the rerun."""

    def function(x: Tensor) -> Tensor:
        hidden = ops.unary(x, "silu", "input")
        return ops.scale(hidden, "last")  # its way back asks for nothing

    tape, start = played(function)
    names = born(tape, start)
    assert names[0] == "seed"
    assert names.index("gradient") < len(names) - 1
    assert "silu" not in names[: names.index("gradient")]


def test_a_rerun_stops_when_the_last_saved_tensor_is_there() -> None:
    """What follows the last operation that saves is not run again; with reentry everything is."""

    def function(x: Tensor) -> Tensor:
        hidden = ops.unary(x, "gelu", "input")
        hidden = ops.unary(hidden, "silu", "input")
        return ops.scale(ops.scale(hidden, "late"), "later")

    tape, start = played(function)
    assert born(tape, start).count("gelu") == 1
    assert not {"silu", "late", "later"} & set(born(tape, start))
    tape, start = played(function, reentrant=True)
    assert {"gelu", "silu", "late", "later"} <= set(born(tape, start))


def test_attributes_of_functions_live_as_long_as_the_graph() -> None:
    """What a function keeps by itself is not released with what it saved."""
    tape = Tape(env=Environment())
    x = tape.tensor(TOKENS, WIDTH, "bf16", "input")
    x.requires_grad, x.node = True, Parameter("x", (WIDTH,), "bf16", True)
    kept = ops.scale(x, "kept")
    index = kept.storage.index if kept.storage else 0
    held = tape.hold(kept)
    out = ops.scale(kept)
    del kept, held
    backward(out, tape.tensor(TOKENS, WIDTH, "bf16", "seed"))
    assert -index not in tape.events
    tape.attributes.clear()
    assert -index in tape.events


@pytest.mark.parametrize("checkpointing", [False, True, {"kind": "full", "reentrant": True}])
@pytest.mark.parametrize(
    "model",
    [
        "t5-base",
        "gemma-4-e2b",
        "falcon-7b",
        "qwen3.5-2b",
        "glm-5",
        "glm-5.2",
        "gemma-3n-e2b",
        "kimi-linear-48b-a3b",
        "deepseek-v4-flash",
    ],
)
def test_nothing_but_gradients_outlives_a_step(model: str, checkpointing: Any) -> None:
    """Blocks that hand things on (position biases, keys and values) free them as well."""
    plan = plan_of(
        model=model, method={"kind": "full"}, gradient_checkpointing=checkpointing,
        precision={"weights": "bf16"},
    )  # fmt: skip
    job = job_of(resolve(plan))
    left = Structure(job).program.rest(job.micro, job.seq_len)
    assert {label.group for label in left} <= {"activations", "logits", "gradients"}
    assert all(alive.bytes > 0 for alive in left.values())


def test_weights_that_no_gradient_reaches_have_no_states() -> None:
    """Llama 3.2 Vision without images passes some layers over: AdamW makes no states for them."""
    report = sized(model="llama-3.2-11b-vision", stack="trl", method={"kind": "full"})
    config = resolve(plan_of(model="llama-3.2-11b-vision")).config or {}
    network = build(config if "vision_config" in config else text_alone(config) or config)
    states = sum(term.bytes for term in report.terms if term.name == "optimizer/states")
    skipped = sum(
        parameter.numel * stack.pattern.count(kind)
        for stack in (stage.stack for stage in network.stages)
        for kind, block in enumerate(stack.kinds)
        if block.skipped
        for _, parameter in block.named_parameters()
    )
    assert report.model is not None and skipped > 10**8
    assert states < 2 * 4 * (report.model.total_params - skipped)


@pytest.mark.parametrize("name", ["qwen3.5-2b", "llama-4-scout"])
def test_text_jobs_load_the_language_model_alone(name: str) -> None:
    """Where ``AutoModelForCausalLM`` builds a part of the model, no tower is loaded."""
    config = resolve(plan_of(model=name, stack="axolotl")).config or {}
    alone = resolve(plan_of(model=name, stack="transformers")).config or {}
    assert alone["model_type"] in TEXT_ALONE.values()
    counts = [sum(p.numel for _, p in build(c).all_parameters()) for c in (config, alone)]
    assert counts[1] <= counts[0]


@pytest.mark.parametrize(
    ("plan", "reentrant"),
    [
        ({"stack": "axolotl"}, True),
        ({"stack": "axolotl", "task": "dpo"}, False),
        ({"stack": "axolotl", "model": "gemma-4-e2b"}, False),
        ({"stack": "trl"}, False),
        ({"stack": "trl", "gradient_checkpointing": {"kind": "full", "reentrant": True}}, True),
    ],
)
def test_checkpointing_is_reentrant_as_the_stack_has_it(plan: Any, reentrant: bool) -> None:
    """axolotl asks for the reentrant implementation, but not for preferences and Gemma 4."""
    told = {"method": {"kind": "lora"}, "gradient_checkpointing": True}
    checkpointing = resolve(plan_of(**{**told, **plan})).plan.gradient_checkpointing
    assert checkpointing is not None and checkpointing.reentrant is reentrant


@pytest.mark.parametrize(
    ("plan", "cast"),
    [
        ({}, "fp32"),
        ({"attention": "flash"}, None),
        ({"loss": "fused"}, None),
        ({"loss": "fused", "kernels": "liger"}, "fp32"),
        ({"sharding": {"kind": "fsdp"}, "hardware": {"count": 2}}, None),
        ({"precision": {"weights": "fp32"}}, None),
        ({"precision": {}}, "fp32"),
        ({"precision": {"mixed": "no"}}, None),
        ({"method": {"kind": "lora"}}, None),
        ({"stack": "trl"}, None),
    ],
)
def test_axolotl_casts_norms_and_embeddings_of_a_whole_model(plan: Any, cast: Any) -> None:
    """They stay in fp32 where nothing that it trains with casts them back: in a plan as in a file
    of its own."""
    told = {"method": {"kind": "full"}, "stack": "axolotl", "precision": {"mixed": "bf16"}}
    precision = resolve(plan_of(model="llama-3.2-1b", **{**told, **plan})).plan.precision
    assert (precision.norms, precision.embeddings) == (cast, cast)


def test_operands_of_one_sequence_are_views() -> None:
    """Batched products copy operands of several sequences, and view those of one (eager)."""
    heads = Heads(count=4, kv_count=4, size=16, value_size=16)
    copies = []
    for alone in (True, False):
        tape = Tape(env=Environment(attention="eager", one_sequence=alone))
        q, k, v = (tape.tensor(TOKENS, WIDTH, "bf16", "input") for _ in range(3))
        attend(q, k, v, heads)
        copies.append(born(tape, 0).count("copy"))
    assert copies[0] < copies[1]


@pytest.mark.parametrize(
    ("size", "groups", "masked", "dtype", "chosen"),
    [
        (128, 4, False, "bf16", "flash"),
        (128, 4, True, "bf16", "efficient"),
        (128, 4, False, "fp32", "math"),
        (512, 4, False, "bf16", "efficient"),
        (512, 4, False, "fp32", "efficient"),
    ],
)
def test_kernels_are_chosen_as_pytorch_and_transformers_do(
    size: int, groups: int, masked: bool, dtype: str, chosen: str
) -> None:
    """Heads beyond 256 are repeated for the memory-efficient kernel (``use_gqa_in_sdpa``)."""
    heads = Heads(count=8, kv_count=8 // groups, size=size, value_size=size)
    assert kernel(Environment(), heads, dtype, masked=masked) == chosen


@pytest.mark.parametrize("model", ["albert-base-v2"])
def test_checkpointing_is_refused_where_the_class_has_none(model: str) -> None:
    """ALBERT's class does not support it: nothing is silently ignored."""
    with pytest.raises(UnsupportedError, match="checkpointing"):
        sized(model=model, method={"kind": "full"}, gradient_checkpointing=True)


def test_layers_that_share_weights_are_not_trained_in_part() -> None:
    """ALBERT's last layer is its first one."""
    with pytest.raises(UnsupportedError, match="share"):
        sized(model="albert-base-v2", method={"kind": "partial", "last_layers": 1})


def test_the_scales_of_paged_states_stay_on_the_gpu() -> None:
    """Paged 8-bit states are managed memory; their fp32 maxima are not."""
    report = sized(method={"kind": "full"}, optimizer="paged_adamw_8bit")
    states = sum(term.bytes for term in report.terms if term.name == "optimizer/states")
    assert report.model is not None and 0 < states < report.model.total_params


def test_gradients_are_brought_to_the_shape_of_their_input() -> None:
    """A broadcast operand's gradient is summed by the engine, after the function returns it."""
    tape = Tape(env=Environment())
    x = tape.tensor(TOKENS, WIDTH, "bf16", "input")
    weight = Parameter("weight", (WIDTH,), "fp32", True)
    out = ops.mul(x, tape.leaf(weight))
    start = len(tape.events)
    backward(out, tape.tensor(TOKENS, WIDTH, "fp32", "seed"))
    assert weight.grad is not None
    assert weight.grad.rows == ONE
    assert len(born(tape, start)) == 3  # the seed, the product, its sum
