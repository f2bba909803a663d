"""Towers of vision-language models: who is shown images, and what images do to memory."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ftplan.catalog.models import MODELS
from ftplan.errors import UnsupportedError
from ftplan.files.document import parse_document
from ftplan.files.plan import parse_plan
from ftplan.front.assembling import job_of
from ftplan.front.resolve import resolve
from ftplan.memory.attention import KeptStates
from ftplan.memory.estimate import Structure

SHOWN = {
    "gemma3", "idefics3", "internvl", "llava", "mistral3", "mllama", "paligemma", "qwen2_5_vl",
    "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
}  # fmt: skip
REFUSED = {
    "ernie4_5_vl_moe", "gemma3n", "gemma4", "glm46v", "glm4v", "kimi_k25", "llama4", "llava_next",
    "llava_onevision", "qwen2_5_omni_thinker", "qwen2_audio", "qwen3_omni_moe_thinker", "voxtral",
}  # fmt: skip


def sighted() -> dict[str, Any]:
    """One model of each type that has a tower or ears: its row."""
    found: dict[str, Any] = {}
    for row in MODELS:
        if {"vision_config", "audio_config"} & set(row.config):
            found.setdefault(row.config["model_type"], row)
    return found


def structure(model: str, *, images: int = 1, **changes: Any) -> Structure:
    """A job with images, recorded."""
    batch = {"micro": 1, "seq_len": 2048, **changes.pop("batch", {})}
    if images:
        batch["images"] = images
    plan: dict[str, Any] = {
        "version": 1, "model": model, "method": {"kind": "lora", "rank": 8},
        "precision": {"weights": "bf16"}, "batch": batch, "hardware": {"gpu": "a100-80gb"},
        "gradient_checkpointing": False, **changes,
    }  # fmt: skip
    return Structure(job_of(resolve(parse_plan(parse_document(json.dumps(plan), file="plan")))))


def test_every_type_with_a_tower_is_shown_images_or_refuses_them() -> None:
    """No tower is passed over in silence: the catalogue's types are these, and no others."""
    rows = sighted()
    assert set(rows) == SHOWN | REFUSED
    for kind in sorted(REFUSED):
        with pytest.raises(UnsupportedError, match="images"):
            structure(rows[kind].name)
    for kind in sorted(SHOWN):
        shown = structure(rows[kind].name).at(1, 2048)
        blind = structure(rows[kind].name, images=0).at(1, 2048)
        assert shown.peak_bytes > blind.peak_bytes, kind


def test_llama_vision_runs_its_cross_attention_where_there_is_an_image() -> None:
    """Without an image the tower and the blocks that look at it get no gradient."""
    full: dict[str, Any] = {"method": {"kind": "full"}}
    seeing = structure("llama-3.2-11b-vision", **full)
    blind = structure("llama-3.2-11b-vision", images=0, **full)
    for name in ("cross_attn.q_proj.weight", "vision_model.class_embedding", "tile_embedding"):
        reached = [p.reached for path, p in seeing.network.all_parameters() if name in path]
        passed = [p.reached for path, p in blind.network.all_parameters() if name in path]
        assert reached and all(reached) and not any(passed)


def test_pixtral_images_are_one_sequence() -> None:
    """The mask over all patches of a batch is quadratic in it; FlashAttention needs none."""
    grown = {}
    for attention in ("sdpa", "flash"):
        made = structure(
            "pixtral-12b", attention=attention, batch={"image_size": [1024, 1024], "seq_len": 4096}
        )
        one, two, four = (made.program.peak(micro, 4096) for micro in (1, 2, 4))
        grown[attention] = (four - two) - 2 * (two - one)
    assert grown["sdpa"] > 2**20 > grown["flash"]


@pytest.mark.parametrize("model", ["gemma-3-4b", "llava-1.5-7b", "internvl3-1b", "smolvlm-2.2b"])
def test_learned_positions_are_trained(model: str) -> None:
    """A tower's table of positions takes a gradient, and AdamW makes states for it."""
    made = structure(model, method={"kind": "full"})
    tables = [p for path, p in made.network.all_parameters() if "position_embedding" in path]
    assert tables and all(table.reached for table in tables)


def test_a_cache_is_filled_where_the_language_model_looks_at_its_own_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Frozen blocks of a vision-language model hold keys and values until its outputs go; Idefics 3
    hands its own setting down, and checkpointed blocks fill none."""
    jobs = [("qwen2-vl-2b", False), ("qwen2-vl-2b", True), ("smolvlm-2.2b", False)]

    def forwards() -> list[int]:
        partial = {"kind": "partial", "last_layers": 1}
        made = [
            structure(model, images=0, method=partial, gradient_checkpointing=checkpointed)
            for model, checkpointed in jobs
        ]
        return [dict(each.phases(1, 2048))["forward"] for each in made]

    filled = forwards()
    monkeypatch.setattr(KeptStates, "join", lambda _self, x: x)
    empty = forwards()
    assert filled[0] > empty[0] and filled[1:] == empty[1:]
