"""Mixtures, latent attention, hybrids and vision-language models against the real classes.

The case files were written by tools/mixture_cases.py from transformers on fake tensors.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_families import played

from ftplan.memory.families import build, model_types

CASES = sorted((Path(__file__).parent / "cases/mixtures").glob("*.json"))
RUNS = [(path.stem, mode) for path in CASES for mode in json.loads(path.read_text())["traced"]]
# what a scan of chunks keeps under autocast is cast piece by piece: near, not exact
NEAR = {
    "qwen3_next", "qwen3_next_lin", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text",
    "mamba",
}  # fmt: skip


def case_of(name: str) -> dict[str, Any]:
    path = Path(__file__).parent / f"cases/mixtures/{name}.json"
    case: dict[str, Any] = json.loads(path.read_text())
    return case


def test_corpus_is_there() -> None:
    """The cases are as many as were written: an empty glob proves nothing."""
    assert len(CASES) >= 47
    assert len(RUNS) >= 130


@pytest.mark.parametrize("name", [path.stem for path in CASES])
def test_weights_are_those_of_transformers(name: str) -> None:
    """A family has the same weights as the real class, by name and shape."""
    case = case_of(name)
    mine = {n: list(p.shape) for n, p in build(case["config"]).all_parameters()}
    assert merged(mine) == merged(case["parameters"])


def merged(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The shapes, those of a timm encoder as one count: its weights have no names of their own."""
    own = {name: shape for name, shape in shapes.items() if ".timm_model." not in name}
    rest = sum(math.prod(shape) for name, shape in shapes.items() if name not in own)
    return {**own, "timm": [rest]}


@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_bytes_are_those_of_the_real_step(name: str, mode: str) -> None:
    """What is alive after forward, and at both peaks, is what the real class has alive."""
    case = case_of(name)
    end, forward, peak = played(build(case["config"]), mode)
    wanted = case["traced"][mode]
    assert end == pytest.approx(wanted[0], rel=0.025 if name in NEAR else 0.005)
    assert forward == pytest.approx(wanted[1], rel=0.03)
    assert peak == pytest.approx(wanted[2], rel=0.025 if name in NEAR else 0.005)


def test_every_model_type_builds_from_its_defaults() -> None:
    """A config.json that names only its model_type is that class's default model."""
    types = {json.loads(path.read_text())["config"]["model_type"] for path in CASES}
    assert len(types) >= 30
    for model_type in types - {"dots1"}:  # whose own defaults leave out the experts
        assert model_type in model_types()
        assert next(build({"model_type": model_type}).all_parameters())


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_text_fields_may_stand_beside_the_vision_config(model_type: str) -> None:
    """Older Qwen-VL configs have no text_config: the text's fields stand at the top."""
    case = case_of(model_type)["config"]
    flat = {key: value for key, value in case.items() if key != "text_config"}
    flat |= {key: value for key, value in case["text_config"].items() if key != "model_type"}
    shapes = [
        {name: p.shape for name, p in build(config).all_parameters()} for config in (case, flat)
    ]
    assert shapes[0] == shapes[1]


def test_experts_are_sized_by_tokens_and_top_k_alone() -> None:
    """More experts, as many a token: more weights, and activations the same but the router's."""
    case = case_of("mixtral")["config"]
    few, many = (
        played(build({**case, "num_local_experts": count}), "frozen/sdpa")[0] for count in (4, 8)
    )
    assert 0 <= many - few < 0.02 * few
