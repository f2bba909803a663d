"""Fused kernels: what their functions keep and make, against the libraries' own functions traced.

``tests/cases/kernels.json`` was written by ``tools/kernel_cases.py``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftplan.dtypes import find_format
from ftplan.files.document import parse_document
from ftplan.files.plan import parse_plan
from ftplan.front.api import estimate
from ftplan.memory import fused
from ftplan.memory.adapters.lora import LoraLinear
from ftplan.memory.env import Environment
from ftplan.memory.job import AdapterSpec
from ftplan.memory.kernels import LIBRARIES, kernels_of
from ftplan.memory.loss import chunk_tokens, compute_loss
from ftplan.memory.nn import Linear, Network
from ftplan.memory.quantized import QuantizedLinear
from ftplan.memory.replay import rounded
from ftplan.memory.tape import ONE, TOKENS, Node, Parameter, Tape, Tensor, backward, basis

DOCUMENT = json.loads((Path(__file__).parent / "cases/kernels.json").read_text(encoding="utf-8"))
SHAPE, CASES = DOCUMENT["shape"], DOCUMENT["cases"]
MICRO, SEQ, HIDDEN, INNER = (SHAPE[key] for key in ("micro", "seq_len", "hidden", "inner"))


def _name(case: dict[str, Any]) -> str:
    return "-".join(str(value) for key, value in case.items() if key != "bytes")


def _tape(case: dict[str, Any], **conditions: Any) -> Tape:
    lora: Any = case["library"] if case["op"].startswith("lora") else "none"
    library = case["library"] if case["library"] in LIBRARIES else "none"
    kernels = kernels_of(library, case["model"], lora=lora)
    kernels = replace(kernels, norm_partials=case.get("partials", kernels.norm_partials))
    return Tape(Environment(kernels=kernels, **conditions))


def _made(tape: Tape, width: int) -> Tensor:
    """A tensor with a graph behind it, where its gradient ends."""
    x = tape.tensor(TOKENS, width, "bf16", "x")
    x.requires_grad, x.node = True, Node(tape, "x", [], lambda _grad: ())
    return x


def _parameter(*shape: int, dtype: str = "bf16", trained: bool = True) -> Parameter:
    return Parameter("weight", shape, dtype, trained)


def _level(tape: Tape, events: int, chunk: int) -> list[int]:
    """Bytes alive after each event since ``events``, on top of what was alive then."""
    point, level, levels = basis(MICRO, SEQ, chunk), 0, [0]
    for event in tape.events[events:]:
        size = rounded(tape.sizes[abs(event) - 1].at(point))
        level += size if event > 0 else -size
        levels.append(level)
    return levels


def _measured(tape: Tape, call: Any, chunk: int = 0) -> dict[str, int]:
    """The same three figures as the trace's."""
    start = len(tape.events)
    outputs = call()
    outputs = outputs if isinstance(outputs, list) else [outputs]
    levels = _level(tape, start, chunk)
    results = sum(rounded((o.numel * 2).at(basis(MICRO, SEQ))) if o.rows != ONE else 512
                  for o in outputs)  # fmt: skip
    forward, kept = max(levels), levels[-1] - results
    # one root for all results: their gradients are there when backward begins
    nodes = [(output.node, output.output_nr) for output in outputs]
    grads = [tape.tensor(o.rows, o.width, o.dtype, "gradient") for o in outputs]
    root = tape.tensor(ONE, 1, "fp32", "root")
    root.requires_grad = True
    root.node = Node(tape, "root", nodes, lambda _grad: tuple(grads.pop(0) for _ in nodes))
    seed = [tape.tensor(ONE, 1, "fp32", "seed")]
    del outputs
    start = len(tape.events)
    backward(root, seed.pop())
    return {"forward": forward, "kept": kept, "backward": max(_level(tape, start, chunk))}


def _adapted(case: dict[str, Any], inner: int, outer: int) -> LoraLinear:
    base = Linear(inner, outer)
    base.weight.dtype, base.weight.trainable = "bf16", False
    if case["packed"]:
        base = QuantizedLinear(base, find_format("nf4"), "bf16")
    spec = AdapterSpec(kind="lora", rank=SHAPE["rank"], targets=None, dtype="fp32",
                       dropout=case["dropout"])  # fmt: skip
    return LoraLinear(base, spec, SHAPE["rank"])


class _Head(Network):
    def __init__(self, vocabulary: int, trained: bool) -> None:
        super().__init__()
        self.lm_head = Linear(HIDDEN, vocabulary)
        self.lm_head.weight.dtype, self.lm_head.weight.trainable = "bf16", trained


def _call(case: dict[str, Any]) -> dict[str, int]:
    x: Any
    gate: Any
    up: Any
    op = case["op"]
    if op == "norm":
        tape = _tape(case)
        weight, x = tape.leaf(_parameter(HIDDEN, trained=case["trained"])), [_made(tape, HIDDEN)]
        return _measured(tape, lambda: fused.rms_norm(x[0], weight))
    if op == "gate":
        tape = _tape(case)
        gate, up = _made(tape, INNER), _made(tape, INNER)
        return _measured(tape, lambda: fused.gate(gate, up))
    if op == "cross_entropy":
        tape = _tape(case)
        logits, labels = _made(tape, case["vocabulary"]), tape.tensor(TOKENS, 1, "int64", "labels")
        return _measured(tape, lambda: fused.cross_entropy(logits, labels))
    if op == "fused_loss":
        tape = _tape(case, loss="fused", loss_by=case["library"])
        network, x = _Head(case["vocabulary"], case["trained"]), _made(tape, HIDDEN)
        chunk = chunk_tokens(case["library"], MICRO * SEQ, case["vocabulary"], HIDDEN, 0)
        return _measured(tape, lambda: compute_loss(network, x)[0], chunk)
    tape = _tape(case)
    x = _made(tape, HIDDEN)
    if op == "lora_mlp":
        gate, up = (_adapted(case, HIDDEN, INNER) for _ in range(2))
        down = _adapted(case, INNER, HIDDEN)
        return _measured(tape, lambda: down.gated(x, gate, up))
    widths = (HIDDEN, HIDDEN // 2, HIDDEN // 2) if op == "lora_qkv" else (HIDDEN,)
    layers = [_adapted(case, HIDDEN, width) for width in widths]
    return _measured(tape, lambda: layers[0].together(x, layers))


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_fused_functions_keep_and_make_what_the_libraries_do(case: dict[str, Any]) -> None:
    """Bytes kept are equal; the most at once, forward and backward, is within thin matrices."""
    true, found = case["bytes"], _call(case)
    thin = SHAPE["rank"] * HIDDEN * 2
    assert found["kept"] == true["kept"], (found, true)
    for way in ("forward", "backward"):
        assert abs(found[way] - true[way]) <= 2 * thin, (way, found, true)


def test_the_cases_cover_every_library_and_function() -> None:
    """Each library's norm, gate, loss and LoRA functions were traced, some of them both ways."""
    seen = {(case["library"], case["op"]) for case in CASES}
    assert len(CASES) >= 30
    assert {("liger", "norm"), ("liger", "gate"), ("liger", "fused_loss")} <= seen
    assert {(name, "lora_qkv") for name in ("unsloth", "axolotl", "foak")} <= seen


def test_unsloth_expands_into_one_buffer() -> None:
    """The largest 4-bit matrix with an adapter is there in two bytes a number, with its scales in
    four, from the first step on; without quantisation there is none."""

    def buffers(kind: str) -> int:
        plan = parse_plan(
            parse_document(
                json.dumps(
                    {
                        "version": 1, "model": "llama-3.1-8b", "stack": "unsloth",
                        "method": {"kind": kind, "targets": ["q_proj", "down_proj"]},
                        "batch": {"micro": 1, "seq_len": 128}, "hardware": {"gpu": "a100-80gb"},
                    }
                ),
                file="plan.json",
            )
        )  # fmt: skip
        report = estimate(plan, with_remedies=False)
        return sum(term.bytes for term in report.terms if term.name == "weights/buffers")

    elements = 4096 * 14336
    assert buffers("qlora") == elements * 2 + elements // 64 * 4
    assert buffers("lora") == 0
