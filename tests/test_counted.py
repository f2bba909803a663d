"""Weights that are counted and never trained, and images in a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftplan.catalog.models import MODELS
from ftplan.errors import FtplanError, UnsupportedError
from ftplan.front import api
from ftplan.memory.env import Environment
from ftplan.memory.families import build
from ftplan.memory.loss import compute_loss
from ftplan.memory.prepare import counted_parameters
from ftplan.memory.tape import TOKENS, Tape
from ftplan.spec import Batch, Method, Model, Plan, Precision


def test_a_layer_that_shares_an_indexer_has_none() -> None:
    """GLM-5.2 is GLM-5 without the indexers of the layers that take an earlier one's keys: per
    indexer wq_b (2048 x 4096), wk (6144 x 128), weights_proj (6144 x 32) and a LayerNorm."""
    counts = {}
    for name in ("glm-5", "glm-5.2"):
        parameters = counted_parameters(build(MODELS.find(name).config))
        counts[name] = sum(parameter.numel * times for parameter, times, _ in parameters)
    shared = MODELS.find("glm-5.2").config["indexer_types"].count("shared")
    indexer = 2048 * 4096 + 6144 * 128 + 6144 * 32 + 2 * 128
    assert shared == 57 and counts["glm-5"] - counts["glm-5.2"] == shared * indexer


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


def test_an_image_takes_the_tokens_of_its_size() -> None:
    """Any resolution: by its size in pixels; what does not fit, or has one size, is said."""

    def peak(name: str, seq_len: int = 2048, **batch: object) -> int:
        plan = Plan(
            model=Model(name=name),
            method=Method(kind="lora"),
            batch=Batch(micro=1, seq_len=seq_len, images=1, **batch),  # type: ignore[arg-type]
        )
        report = api.estimate(plan)
        assert report.allocated_bytes is not None
        return report.allocated_bytes.expected

    small, large = (peak("qwen2.5-vl-3b", image_size=(side, side)) for side in (224, 1120))
    assert small < large
    with pytest.raises(FtplanError, match="one size"):
        peak("llava-1.5-7b", image_size=(224, 224))
    with pytest.raises(FtplanError, match="part of the sequence"):
        peak("qwen2.5-vl-3b", seq_len=512, image_size=(1120, 1120))
    with pytest.raises(FtplanError, match="height and width"):
        peak("qwen2.5-vl-3b", image_size=(224,))


def test_of_an_omni_model_the_thinker_is_sized(tmp_path: Path) -> None:
    """A config.json with a thinker, a talker and a vocoder is sized as its thinker, and says so."""
    row = MODELS.find("qwen2.5-omni-7b")
    whole = {"model_type": "qwen2_5_omni", "torch_dtype": "bfloat16", "talker_config": {},
             "thinker_config": {**row.config}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(whole))
    reports = [
        api.estimate(
            Plan(
                model=model, stack="llama-factory", method=Method(kind="lora"), batch=Batch(micro=1)
            )
        )
        for model in (Model(config=str(tmp_path / "config.json")), Model(name=row.name))
    ]
    assert reports[0].allocated_bytes == reports[1].allocated_bytes
    assert any("thinker" in str(assumed.value) for assumed in reports[0].assumptions)


def test_logits_picked_by_a_mask_are_a_copy() -> None:
    """Qwen2-Audio shifts its logits by the padding mask, also those of a single sequence."""
    network = build(MODELS.find("qwen2-audio-7b").config)
    assert (network.loss_shifts, network.loss_in_fp32) == ("picked", False)
    tapes = [Tape(Environment(one_sequence=True, padding_mask=masked)) for masked in (False, True)]
    for tape in tapes:
        x = tape.tensor(TOKENS, 4096, "bf16", "hidden states")
        compute_loss(network, x)
    copies = [sum(label.name == "gather" for label in tape.labels) for tape in tapes]
    assert copies == [0, 1]
