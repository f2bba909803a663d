"""The families against the real classes: weights by name and shape, bytes by moment.

The case files were written by tools/family_cases.py from transformers on fake tensors.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.env import Environment
from ftplan.memory.families import build, model_types
from ftplan.memory.nn import Network, Shared, Stage
from ftplan.memory.tape import ONE, TOKENS, Parameter, Tape, Tensor, backward, basis

CASES = sorted((Path(__file__).parent / "cases/families").glob("*.json"))
MICRO, SEQ_LEN = 2, 192
RUNS = [
    (path.stem, mode) for path in CASES for mode in json.loads(path.read_text()).get("traced", {})
]


def case_of(name: str) -> dict[str, Any]:
    case: dict[str, Any] = json.loads(
        (Path(__file__).parent / f"cases/families/{name}.json").read_text()
    )
    return case


def test_corpus_is_there() -> None:
    """The cases are as many as were written: an empty glob proves nothing."""
    assert len(CASES) >= 60
    assert len(RUNS) >= 150


@pytest.mark.parametrize("name", [path.stem for path in CASES])
def test_weights_are_those_of_transformers(name: str) -> None:
    """A family has the same weights as the real class, by name and shape."""
    case = case_of(name)
    mine = {n: list(p.shape) for n, p in build(case["config"]).all_parameters()}
    assert mine == case["parameters"]


@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_bytes_are_those_of_the_real_step(name: str, mode: str) -> None:
    """What is alive after forward, and at both peaks, is what the real class has alive."""
    case = case_of(name)
    end, forward, peak = played(build(case["config"]), mode)
    wanted = case["traced"][mode]
    assert end == pytest.approx(wanted[0], rel=0.01)
    assert forward == pytest.approx(wanted[1], rel=0.03)
    assert peak == pytest.approx(wanted[2], rel=0.01)


def test_every_model_type_builds_from_its_defaults() -> None:
    """A config.json that names only its model_type is that class's default model."""
    for path in CASES:
        model_type = json.loads(path.read_text())["config"]["model_type"]
        assert model_type in model_types()
        assert next(build({"model_type": model_type}).all_parameters())


def test_unknown_family_is_refused_by_name() -> None:
    """A model_type that is not modelled is named in the refusal."""
    with pytest.raises(UnsupportedError, match="made_up"):
        build({"model_type": "made_up"})


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "gpt_neox", "opt"])
def test_decoders_classify_with_a_score(model_type: str) -> None:
    """With labels, a decoder has a score over them in place of its head."""
    plain = {n: p.numel for n, p in build({"model_type": model_type}).all_parameters()}
    scored = {n: p.numel for n, p in build({"model_type": model_type}, labels=3).all_parameters()}
    assert "score.weight" in scored
    assert set(scored) - {"score.weight"} == set(plain) - {"lm_head.weight"}


def test_encoder_decoders_refuse_to_classify() -> None:
    """What is not modelled is refused, not guessed."""
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        build({"model_type": "t5"}, labels=2)


def played(network: Network, mode: str) -> list[int]:
    """One step on a tape: bytes at the end of forward and at the peaks."""
    precision, attention = mode.split("/")
    dtype = "fp32" if precision in ("amp", "fp32") else "bf16"
    for stage in network.stages:  # every layer its own weights
        if stage.stack.shared:
            continue
        kinds = [copy.deepcopy(stage.stack.kinds[kind]) for kind in stage.stack.pattern]
        stage.stack.kinds, stage.stack.pattern = kinds, list(range(len(kinds)))
    network.loaded_dtype = dtype
    for _, parameter in network.all_parameters():
        parameter.dtype = dtype
        parameter.trainable = parameter.trainable and precision != "frozen"
    env = Environment(
        autocast="bf16" if precision == "amp" else None,
        attention="eager" if attention == "eager" else "sdpa",
        seq_len=SEQ_LEN,
    )
    tape = Tape(env=env)
    kept: list[Tensor] = []
    if precision == "frozen":
        _ask_for_gradients(network, kept)
    loss = _forward(tape, network)
    tape.weight_cache.clear()
    tape.cached.clear()  # with the model's outputs
    middle = len(tape.events)
    backward(loss, tape.tensor(ONE, 1, "fp32", "seed"))
    sizes = [-(-size.at(basis(MICRO, SEQ_LEN)) // 512) * 512 for size in tape.sizes]
    live = end = before = after = 0
    for number, event in enumerate(tape.events):
        live += sizes[event - 1] if event > 0 else -sizes[-event - 1]
        if number < middle:
            before, end = max(before, live), live
        else:
            after = max(after, live)
    return [end, before, after]


def _ask_for_gradients(network: Network, kept: list[Tensor]) -> None:
    """``enable_input_require_grads``: a leaf, which its gradient's accumulator holds."""
    table = network.child(network.embedding_names[0])
    plain = table.forward

    def forward(*arguments: Any) -> Tensor:
        out: Tensor = plain(*arguments)
        out.requires_grad, out.node = True, Parameter("", (1,), out.dtype, True)
        kept.append(out.alias())
        return out

    table.forward = forward


def _forward(tape: Tape, network: Network) -> Tensor:
    shared = Shared()
    x = _stage(network.stages[0], tape, shared)
    for stage in network.stages[1:]:
        shared.memory = x
        x = _stage(stage, tape, shared)
    if len(network.stages) == 1:
        del shared  # the inner model has returned
    logits = network.head(x)
    full = ops.to(logits, "fp32") if network.loss_in_fp32 else logits
    if network.loss_shifts:
        full = ops.copy(full, "shifted logits")
    return ops.cross_entropy(full, tape.tensor(TOKENS, 1, "int64", "labels"))


def _stage(stage: Stage, tape: Tape, shared: Shared) -> Tensor:
    x = stage.enter(tape, shared)
    for kind in stage.stack.pattern:
        block = stage.stack.kinds[kind]
        x = x if block.skipped else block.forward(x, shared)
    shared.forget()
    return stage.leave(x, shared)
