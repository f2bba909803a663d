"""Parameter counts are computed from the configs, and agree with what is published."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ftplan.catalog.models import MODELS, ModelRow
from ftplan.errors import UnsupportedError
from ftplan.memory.families import build, model_types
from ftplan.memory.prepare import counted_parameters


def agrees(row: ModelRow, count: int) -> bool:
    """``count`` is the published count, or agrees with the printed digits of a rounded one."""
    if row.total_params is not None:
        return count == row.total_params
    assert row.published_params_approx is not None
    digits, exponent = row.published_params_approx.split("e")
    places = len(digits.partition(".")[2])
    return abs(count / 10.0 ** int(exponent) - float(digits)) <= 0.5 * 10.0**-places + 1e-9


def published(row: ModelRow) -> float:
    """The published count, exact or rounded."""
    return float(row.total_params or row.published_params_approx or 0)


def test_computed_counts_equal_the_published_ones() -> None:
    """The calculator's own inventory gives the published count of every row it models; what it
    does not model it refuses by name."""
    checked = 0
    for row in MODELS:
        try:
            network = build(row.config)
        except UnsupportedError as error:
            assert "model_type" in error.what, row.name
            continue
        parameters = counted_parameters(network)
        count = sum(parameter.numel * times for parameter, times, _ in parameters)
        assert agrees(row, count), (row.name, count)
        checked += 1
    assert checked >= 488


def test_every_model_type_of_the_catalogue_is_modelled() -> None:
    """No row is there whose training cannot be sized for want of its family."""
    assert {row.config["model_type"] for row in MODELS} <= set(model_types())


ENCODERS = {"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "modernbert",
            "deberta-v2", "albert"}  # fmt: skip
ELSEWHERE = {"exaone", "qwen"}  # model types whose code comes with the checkpoint
TIMM = {"gemma3n"}  # whose tower is timm's, which no extra installs


@pytest.mark.trace
def test_transformers_builds_every_family_with_the_published_count() -> None:
    """The smallest row of each model_type up to 10e9 parameters, built by transformers on the meta
    device, has the published count. (All rows were built when they were added.)"""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    smallest: dict[str, ModelRow] = {}
    for row in sorted(MODELS, key=published):
        if published(row) <= 10e9 and row.config["model_type"] not in ELSEWHERE | TIMM:
            smallest.setdefault(row.config["model_type"], row)
    for row in smallest.values():
        config: dict[str, Any] = json.loads(json.dumps(dict(row.config)))
        built = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
        with torch.device("meta"):
            if "architectures" in config:
                model = getattr(transformers, config["architectures"][0])(built)
            elif row.config["model_type"] in ENCODERS:
                model = transformers.AutoModelForMaskedLM.from_config(built)
            elif built.is_encoder_decoder:
                model = transformers.AutoModelForSeq2SeqLM.from_config(built)
            else:
                model = transformers.AutoModelForCausalLM.from_config(built)
        assert agrees(row, sum(p.numel() for p in model.parameters())), row.name
    assert len(smallest) >= 70
