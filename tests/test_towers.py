"""Towers of vision-language models: who is shown images, and what images do to memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftplan.catalog.models import MODELS
from ftplan.errors import UnsupportedError
from ftplan.files.document import parse_document
from ftplan.files.plan import parse_plan
from ftplan.front.assembling import job_of
from ftplan.front.resolve import resolve
from ftplan.memory.attention import KeptStates
from ftplan.memory.env import Environment
from ftplan.memory.estimate import Structure
from ftplan.memory.families.vision import VisionLanguage
from ftplan.memory.images import image_of
from ftplan.memory.tape import Tape

SHOWN = {
    "gemma3", "gemma4", "glm46v", "glm4v", "idefics3", "internvl", "kimi_k25", "llama4", "llava",
    "llava_next", "llava_onevision", "mistral3", "mllama", "paligemma", "qwen2_5_vl", "qwen2_vl",
    "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
}  # fmt: skip
REFUSED = {
    "ernie4_5_vl_moe", "gemma3n", "qwen2_5_omni_thinker", "qwen2_audio", "qwen3_omni_moe_thinker",
    "voxtral",
}  # fmt: skip
SIZES: dict[str, Any] = json.loads((Path(__file__).parent / "cases/image_sizes.json").read_text())


def sighted() -> dict[str, Any]:
    """One model of each type that has a tower or ears: its row."""
    found: dict[str, Any] = {}
    for row in MODELS:
        if {"vision_config", "audio_config"} & set(row.config):
            found.setdefault(row.config["model_type"], row)
    return found


def structure(model: str, *, images: int = 1, **changes: Any) -> Structure:
    """A job with images, recorded."""
    batch = {"micro": 1, "seq_len": 4096, **changes.pop("batch", {})}
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
        shown = structure(rows[kind].name).at(1, 4096)
        blind = structure(rows[kind].name, images=0).at(1, 4096)
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
        return [dict(each.phases(1, 4096))["forward"] for each in made]

    filled = forwards()
    monkeypatch.setattr(KeptStates, "join", lambda _self, x: x)
    empty = forwards()
    assert filled[0] > empty[0] and filled[1:] == empty[1:]


@pytest.mark.parametrize("model", sorted(SIZES["tokens"]))
def test_an_image_has_the_tokens_that_its_processor_gives_it(model: str) -> None:
    """For images of many shapes, what the processors' own functions say."""
    config = MODELS.find(model).config
    made = [image_of(config, tuple(s), images=1, seq_len=8192) for s in SIZES["sizes"]]
    assert [image and image.tokens for image in made] == SIZES["tokens"][model]


def test_an_image_in_tiles_takes_the_tower_more_often() -> None:
    """LLaVA-NeXT runs its tower on the whole image and on each tile: pixels say how many."""
    pixels = {}
    for side in (336, 672):
        made = structure("llava-1.6-7b", batch={"image_size": [side, side]})
        (values,) = made.network.inputs(Tape(Environment()))
        pixels[side] = values.numel.at((1,) * 9)
    assert pixels == {side: tiles * 3 * 336**2 for side, tiles in ((336, 3), (672, 5))}


def test_llava_onevision_cuts_up_no_image_that_is_one_of_several() -> None:
    """Two images are one tile each; their size no longer matters, and is refused."""
    config = MODELS.find("llava-onevision-0.5b").config
    two = image_of(config, None, images=2, seq_len=4096)
    assert two is not None and (two.tiles, two.tokens) == (1, 27**2 + 1)
    assert image_of(config, (600, 500), images=2, seq_len=4096) is None


def test_gemma_4_pads_every_image_to_as_many_patches() -> None:
    """Its tower sees 2,520 patches whatever the shape; only the tokens differ."""
    made = {
        tuple(size): structure("gemma-4-e2b", batch={"image_size": size})
        for size in ([768, 768], [672, 960])
    }
    square, full = (vars(each.network)["tower"] for each in made.values())
    assert (square.tokens, full.tokens) == (256, 280) and square.patches == full.patches == 2520


def test_features_among_the_outputs_live_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper that returns ``image_hidden_states`` holds them while the loss is computed."""

    def forward() -> int:
        return dict(structure("llava-1.5-7b", method={"kind": "full"}).phases(1, 4096))["forward"]

    held = forward()
    nothing = property(lambda _: False, lambda *_: None)
    monkeypatch.setattr(VisionLanguage, "returns_features", nothing, raising=False)
    assert held - forward() == 576 * 4096 * 2


@pytest.mark.parametrize("model", ["gemma-4-e2b", "llama-4-scout"])
def test_a_tower_whose_patches_go_through_a_linear_layer_may_be_quantised(model: str) -> None:
    """Pixels are not cast to a dtype that is none of floating point."""
    nf4 = {"method": {"kind": "qlora"}, "precision": {"weights": "nf4", "mixed": "bf16"}}
    shown, blind = (structure(model, images=n, **nf4).at(1, 4096).peak_bytes for n in (1, 0))
    assert shown > blind
