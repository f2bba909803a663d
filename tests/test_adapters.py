"""Adapters against peft: what is trained, tensor by tensor, for small configs of many families.

The case files were written by tools/adapter_cases.py from peft on the real classes.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ftplan.dtypes import find_format
from ftplan.errors import UnsupportedError
from ftplan.memory.adapters.lycoris import factorization
from ftplan.memory.adapters.rotations import nearest_divisor
from ftplan.memory.env import Environment
from ftplan.memory.estimate import estimate
from ftplan.memory.job import AdapterSpec, Job
from ftplan.memory.optimizer import OptimizerSpec, State, Step
from ftplan.memory.prepare import counted_parameters, prepare

CASES = sorted((Path(__file__).parent / "cases/adapters").glob("*.json"))
LOADED = {path.stem: json.loads(path.read_text()) for path in CASES}
ROWS = [(name, index) for name, case in LOADED.items() for index in range(len(case["methods"]))]
ADAM = OptimizerSpec(
    name="adamw",
    states=(
        State(name="exp_avg", dtype="param", shape="full"),
        State(name="exp_avg_sq", dtype="param", shape="full"),
    ),
    step=Step(),
    step_counter_on_gpu=True,
)
UNRANKED = ("ia3", "ln_tuning", "oft", "boft", "prompt_tuning", "prefix_tuning", "p_tuning")


def job_of(config: dict[str, Any], method: dict[str, Any], **changed: Any) -> Job:
    """A plain bf16 job with this adapter."""
    given = dict(method)
    kind = given.pop("kind")
    targets = given.pop("targets", None)
    for name in ("targets", "modules_to_save", "layers_to_transform", "target_parameters"):
        if isinstance(given.get(name), list):
            given[name] = tuple(given[name])
    spec = AdapterSpec(
        kind=kind,
        rank=given.pop("rank", 0 if kind in UNRANKED else 16),
        targets=tuple(targets) if isinstance(targets, list) else targets,
        dtype=given.pop("dtype", "fp32"),
        use_dora=given.pop("use_dora", False) or kind == "dora",
        virtual_tokens=given.pop("virtual_tokens", 20),
        **given,
    )
    settings: dict[str, Any] = {
        "weights": find_format("bf16"), "base_dtype": "bf16", "compute_dtype": "bf16",
        "environment": Environment(), "micro": 2, "seq_len": 64, "accumulation": 1,
        "optimizer": ADAM, **changed,
    }  # fmt: skip
    return Job(config=config, task="sft", method="adapter", adapter=spec, **settings)


def shapes_of(job: Job) -> dict[str, int]:
    """How many trained tensors of each shape, sides in order of size."""
    found: Counter[str] = Counter()
    for parameter, times, _ in counted_parameters(prepare(job)):
        if parameter.trainable:
            found["x".join(map(str, sorted(parameter.shape)))] += times
    return dict(found)


def test_corpus_is_there() -> None:
    """The cases are as many as were written: an empty glob proves nothing."""
    assert len(CASES) >= 14
    assert len(ROWS) >= 200
    assert {m["method"]["kind"] for c in LOADED.values() for m in c["methods"]} >= {
        "lora", "dora", "vera", "loha", "lokr", "oft", "boft", "ia3", "ln_tuning",
        "prompt_tuning", "prefix_tuning", "p_tuning",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "index"), ROWS)
def test_what_is_trained_is_what_peft_trains(name: str, index: int) -> None:
    """An adapter trains as many tensors of each shape as peft, or is refused where peft refuses."""
    case = LOADED[name]
    row = case["methods"][index]
    job = job_of(case["config"], row["method"])
    if "refused" in row:
        with pytest.raises(UnsupportedError):
            prepare(job)
        return
    assert shapes_of(job) == row["shapes"]


@pytest.mark.parametrize(("name", "index"), ROWS)
def test_every_adapter_runs(name: str, index: int) -> None:
    """What peft accepts has a forward and a backward here, and a peak above its static bytes."""
    case = LOADED[name]
    row = case["methods"][index]
    if "refused" in row:
        pytest.skip("peft refuses it")
    job = job_of(case["config"], row["method"])
    result = estimate(job)
    assert result.trainable_params == row["trained"]
    assert result.peak_bytes > result.static_bytes
