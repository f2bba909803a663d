"""Trainers with modules of their own: what is walked, what is not and says so, what they offer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ftplan.errors import UnsupportedError
from ftplan.files.document import parse_document
from ftplan.files.plan import parse_plan
from ftplan.fit.changes import Change
from ftplan.fit.remedies import LADDER, Card
from ftplan.front import api
from ftplan.front.assembling import job_of
from ftplan.front.resolve import resolve
from ftplan.memory.estimate import Structure
from ftplan.report import Report
from ftplan.spec import Plan
from ftplan.trainers import import_text

LITGPT = ("litgpt", "litgpt-0.4", "litgpt-0.3", "litgpt-2023")
TORCHTUNE = ("torchtune", "torchtune-0.6", "torchtune-0.4", "torchtune-0.1")


def plan(stack: str, **changes: Any) -> Plan:
    """A LoRA job of Llama 2 on one GPU."""
    mapping = {
        "version": 1, "model": "llama-2-7b", "stack": stack, "method": {"kind": "lora"},
        "precision": {"weights": "bf16", "mixed": "no"}, "batch": {"micro": 2, "seq_len": 512},
        "hardware": {"gpu": "a100-80gb"}, **changes,
    }  # fmt: skip
    return parse_plan(parse_document(repr(mapping), file="plan"))


def unexplained(report: Report) -> bool:
    """Whether the report says that the trainer's own modules were not walked."""
    return any(term.name.startswith("unexplained") for term in report.terms)


def products(stack: str, **changes: Any) -> int:
    """Floating point operations of a micro batch's matrix products."""
    job = job_of(resolve(plan(stack, gradient_checkpointing=False, loss="full", **changes)))
    job = replace(job, environment=replace(job.environment, loss="full"))
    program = Structure(job).program
    point = program.point(job.micro, job.seq_len, job.loss_chunk)
    signs = {"hidden": -1}
    return sum(signs.get(part.kind, 1) * part.size.at(point) for part in program.operations())


@pytest.mark.parametrize("stack", [*LITGPT, *TORCHTUNE])
def test_a_trainers_own_modules_compute_what_transformers_do(stack: str) -> None:
    """Full finetuning multiplies the same matrices, however the model code is written."""
    full = {"method": {"kind": "full"}}
    assert products(stack, **full) == products("transformers", **full)


@pytest.mark.parametrize(
    ("stack", "changes"),
    [
        ("litgpt-0.3", {"model": "gemma-2-2b"}),
        ("litgpt-2023", {"model": "qwen2.5-0.5b"}),
        ("torchtune-0.1", {"model": "gemma-2b"}),
        ("torchtune-0.4", {"model": "qwen3-1.7b"}),
        ("torchtune-0.1", {"loss": "chunked"}),
        (
            "torchtune",
            {"method": {"kind": "qlora", "double_quant": False}, "precision": {"weights": "nf4"}},
        ),
        ("torchtune", {"gradient_checkpointing": "selective"}),
        ("litgpt", {"gradient_checkpointing": True}),
        ("litgpt", {"method": {"kind": "dora"}}),
        ("litgpt", {"task": "dpo"}),
        ("litgpt", {"batch": {"micro": 1, "seq_len": 512, "eval_micro": 4}}),
        ("torchtune", {"optimizer": {"name": "adamw_torch", "in_backward": True}}),
        ("torchtune", {"gradient_checkpointing": True, "sharding": {"offload": "activations"}}),
        ("litgpt", {"hardware": {"gpu": "a100-80gb", "count": 2}, "sharding": {"kind": "fsdp"}}),
    ],
)
def test_what_a_version_cannot_do_or_was_not_traced_says_so(
    stack: str, changes: dict[str, Any]
) -> None:
    """A model, loss, method or layout beyond the traced loop has a visible term; the same stack's
    plain LoRA job has none."""
    assert not unexplained(api.estimate(plan(stack)))
    assert unexplained(api.estimate(plan(stack, **changes)))


@pytest.mark.parametrize("kind", ["llama_adapter", "llama_adapter_v2"])
def test_llama_adapters_are_litgpts_alone(kind: str) -> None:
    """Where no code of theirs is walked they are refused by name."""
    api.estimate(plan("litgpt", method={"kind": kind}))
    with pytest.raises(UnsupportedError, match=kind):
        api.estimate(plan("trl", method={"kind": kind}))


def test_the_second_adapter_trains_what_the_first_does_and_every_linear_layer() -> None:
    """LLaMA-Adapter of Llama 2: 32 gates in each layer from the third on. The second adds norms,
    and a scale and a bias for every output of every matrix (litgpt/adapter_v2.py)."""
    trained = [
        Structure(job_of(resolve(plan("litgpt", method={"kind": kind})))).trainable_params
        for kind in ("llama_adapter", "llama_adapter_v2")
    ]
    outputs = 32 * (4 * 4096 + 2 * 11008 + 4096) + 32000
    assert trained == [30 * 32, 30 * 32 + 65 * 4096 + 2 * outputs]


@pytest.mark.parametrize(("verb", "kind"), [("adapter", "llama_adapter"),
                                            ("adapter_v2", "llama_adapter_v2")])  # fmt: skip
def test_commands_of_litgpts_adapters_are_read(verb: str, kind: str) -> None:
    """``litgpt finetune_adapter`` names its method, its storage and how that is scaled."""
    command = f"litgpt finetune_{verb} meta-llama/Llama-2-7b-hf --quantize bnb.nf4-dq"
    method = import_text(command, file="run.sh").plan.method
    assert method is not None
    assert (method.kind, method.double_quant, method.adapter_dtype) == (kind, True, "bf16")


def offered(stack: str) -> list[Change]:
    """Every change that the ladder proposes for a plan of a stack."""
    given = resolve(plan(stack, gradient_checkpointing=False, loss="full")).plan
    card = Card(capability=(8, 0))
    return [change for rung in LADDER for change in rung.propose(given, card)]


def test_remedies_are_what_the_trainer_has() -> None:
    """No fused loss for either; a chunked one where torchtune has it; checkpoints in LitGPT only
    under FSDP."""
    for stack in (*LITGPT, *TORCHTUNE):
        changes = offered(stack)
        assert {"loss": "fused"} not in changes
        assert ({"loss": "chunked"} in changes) == (stack in TORCHTUNE[:-1])
        assert ({"gradient_checkpointing": True} in changes) == (stack in TORCHTUNE)
