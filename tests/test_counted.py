"""Families that are counted and not run, weights that are never trained, and images in a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftplan import api
from ftplan.catalog.models import MODELS
from ftplan.errors import UnsupportedError
from ftplan.memory.env import Environment
from ftplan.memory.families import build
from ftplan.memory.nn import Shared
from ftplan.memory.tape import Tape
from ftplan.spec import Batch, Method, Model, Plan, Precision

COUNTED = ("kimi_linear",)


def test_counted_families_refuse_to_train_by_name() -> None:
    """What is counted and not modelled says its model_type when a job is sized."""
    checked = 0
    for row in MODELS:
        kind = row.config["model_type"]
        if kind in COUNTED:
            network = build(row.config)
            assert next(network.all_parameters())
            with pytest.raises(UnsupportedError, match=kind):
                network.stages[0].enter(Tape(Environment()), Shared())
            checked += 1
    assert checked >= 1


@pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen2.5-vl-3b", "gemma-3-4b", "paligemma-3b"])
def test_images_take_memory_and_no_weights(name: str) -> None:
    """An image in each sequence: the same weights, more at the peak of a full finetuning."""
    plans = [
        Plan(
            model=Model(name=name),
            method=Method(kind="full"),
            precision=Precision(weights="bf16"),  # fp32 may change kernels with the mask
            batch=Batch(micro=1, seq_len=2048, images=images),
        )
        for images in (0, 1)
    ]
    text, image = (api.estimate(plan) for plan in plans)
    assert text.model == image.model
    peaks = [{p.name: p.peak_bytes for p in report.phases} for report in (text, image)]
    assert peaks[1]["backward"] > peaks[0]["backward"]


def test_images_of_a_text_model_are_refused() -> None:
    """No option is parsed and ignored: a model without a tower refuses images."""
    plan = Plan(model=Model(name="llama-3.1-8b"), method=Method(kind="full"), batch=Batch(images=1))
    with pytest.raises(UnsupportedError, match="images"):
        api.estimate(plan)


def test_weights_that_are_never_trained_are_marked() -> None:
    """Pegasus' sinusoids and ERNIE's corrections ask for no gradient in the real classes."""
    cases = Path(__file__).parent / "cases"
    for folder, name in (("families", "pegasus"), ("mixtures", "ernie4_5_moe")):
        case: dict[str, Any] = json.loads((cases / folder / f"{name}.json").read_text())
        fixed = [n for n, p in build(case["config"]).all_parameters() if p.fixed]
        assert fixed, name
