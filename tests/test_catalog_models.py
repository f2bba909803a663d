"""Models: rows are complete, the 46 given shapes are reproduced, and names in configs resolve."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.catalog.models import MODELS, find_model, resolve_model, search_models
from ftplan.catalog.shelf import canonical
from ftplan.errors import UnknownNameError

ROWS = st.sampled_from(MODELS.rows)
SHARED = Path(__file__).parents[2] / "shared" / "data"


def test_rows_are_complete() -> None:
    """Every row has a canonical name, hub ids, an explicit tie, a published count, source, date."""
    assert len(MODELS.rows) >= 470
    for row in MODELS:
        assert re.fullmatch(r"[a-z0-9]+(?:[.-][a-z0-9]+)*", row.name), row.name
        assert row.hub_ids, row.name
        assert "model_type" in row.config and "tie_word_embeddings" in row.config, row.name
        assert row.config["torch_dtype"] in ("bfloat16", "float16", "float32"), row.name
        assert (row.total_params is None) != (row.published_params_approx is None), row.name
        assert row.source.startswith("https://") and len(row.date) == 10, row.name


def test_names_aliases_and_hub_ids_are_unique() -> None:
    """No name, alias or hub id belongs to two rows, in any letter case."""
    seen: dict[str, str] = {}
    for row in MODELS:
        for name in (row.name, *row.aliases, *row.hub_ids):
            assert seen.setdefault(canonical(name), row.name) == row.name, name


@given(ROWS)
@settings(deadline=None)
def test_every_name_alias_and_hub_id_finds_its_row(row: object) -> None:
    """Names, aliases and hub ids are found whatever their letter case, `_` for `-` included."""
    assert hasattr(row, "name") and hasattr(row, "aliases") and hasattr(row, "hub_ids")
    for name in (row.name, *row.aliases, *row.hub_ids):
        assert find_model(name) is row
        assert find_model(name.upper()) is row
        assert find_model(name.replace("-", "_")) is row


# One size each of the families that people finetune.
FAMILIES = """
llama-2-7b llama-3-8b llama-3.1-8b llama-3.2-1b llama-3.3-70b llama-4-scout mistral-7b-v0.3
mixtral-8x7b ministral-8b ministral-3-8b mistral-nemo-12b mistral-small-24b qwen1.5-7b qwen2-7b
qwen2.5-7b qwen3-8b qwen3-30b-a3b qwen3.5-9b qwen3.5-35b-a3b gemma-7b gemma-2-9b gemma-3-4b
gemma-4-31b phi-2 phi-3-mini phi-4 olmo-7b olmo-2-7b olmo-3-7b olmoe-1b-7b smollm2-1.7b smollm3-3b
falcon-7b falcon3-7b falcon-h1-7b gpt2 gpt-j-6b gpt-neox-20b pythia-1.4b opt-1.3b bloom-560m
stablelm-2-1.6b santacoder-1.1b starcoder-15.5b starcoder2-3b codellama-7b deepseek-coder-6.7b
granite-3.1-2b granite-4.0-micro yi-6b internlm3-8b glm-4-9b glm-4.5-air deepseek-v2-lite
deepseek-v3 deepseek-r1 deepseek-r1-distill-qwen-7b cohere-command-r dbrx-132b gpt-oss-20b t5-base
flan-t5-xl bert-base roberta-base modernbert-base mamba-2.8b jamba-1.5-mini lfm2-1.2b qwen2.5-vl-7b
qwen3-vl-8b llava-1.5-7b llama-3.2-11b-vision mistral-small-3.1-24b pixtral-12b
nemotron-3-nano-30b-a3b nemotron-nano-9b-v2 minimax-m2 granite-4.0-h-tiny lfm2-8b-a1b
hunyuan-7b orpheus-3b seed-coder-8b opencoder-8b internvl3.5-8b smolvlm2-500m llava-1.6-7b
cerebras-gpt-1.3b codet5-base byt5-base exaone-3.5-7.8b chatglm3-6b baichuan-7b starchat2-15b
codeqwen1.5-7b hermes-2-pro-mistral-7b tulu-3-8b reka-flash-3 gte-qwen2-7b stories15m
"""


def test_families_that_people_finetune_are_there() -> None:
    """Each of these is the canonical name of a row."""
    for name in FAMILIES.split():
        assert find_model(name).name == name


def test_the_given_shapes_are_reproduced() -> None:
    """The 46 shapes and counts given for the project stand in the catalogue, field by field."""
    path = SHARED / "architectures.json"
    if not path.exists():
        pytest.skip("the shared data are not beside this checkout")
    given_rows = json.loads(path.read_text(encoding="utf-8"))
    assert len(given_rows) == 46
    for name, row in given_rows.items():
        found = find_model(name)
        assert found.name == name and found.total_params == row["total_params"], name
        for key, value in row["config"].items():
            assert found.config[key] == value, (name, key)


@pytest.mark.parametrize(
    ("spelling", "name", "how"),
    [
        ("llama-3.1-8b", "llama-3.1-8b", "name"),
        ("Llama3.1-8B", "llama-3.1-8b", "alias"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b", "hub-id"),
        ("META-LLAMA/LLAMA-3.1-8B", "llama-3.1-8b", "hub-id"),
        ("/tmp/Llama-2-7b-hf/", "llama-2-7b", "file-name"),
        ("/tmp/Meta-Llama-3-8B/original/", "llama-3-8b", "file-name"),
        ("checkpoints/microsoft/phi-2", "phi-2", "hub-id"),
        ("someone/Llama-3.1-8B-Instruct", "llama-3.1-8b", "file-name"),
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "llama-3.2-1b", "normalised"),
        ("unsloth/Qwen3-4B-unsloth-bnb-4bit", "qwen3-4b", "normalised"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "qwen2.5-7b", "normalised"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "qwen2.5-7b", "normalised"),
        ("TheBloke/Mistral-7B-v0.1-GPTQ", "mistral-7b-v0.1", "normalised"),
        ("baichuan-inc/Baichuan2-7B-Chat-4bits", "baichuan2-7b", "normalised"),
        ("RedHatAI/Qwen2.5-7B-Instruct-quantized.w8a8", "qwen2.5-7b", "normalised"),
        ("/hub/models--Qwen--Qwen3-8B/snapshots/0123abcd", "qwen3-8b", "hub-id"),
        ("models--gpt2", "gpt2", "name"),
        ("HuggingFaceH4/starchat2-15b-sft-v0.1", "starchat2-15b", "hub-id"),
        ("agentica-org/DeepCoder-14B-Preview", "deepseek-r1-distill-qwen-14b", "hub-id"),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8", "llama-3.1-8b", "normalised"),
        ("C:\\models\\gemma-2-9b-it", "gemma-2-9b", "file-name"),
        ("output/Qwen3-8B/v0-20260101-120000/checkpoint-500", "qwen3-8b", "file-name"),
        ("saves/llama3-8b/lora/sft", "llama-3-8b", "file-name"),
    ],
)
def test_names_as_configs_write_them(spelling: str, name: str, how: str) -> None:
    """Hub ids, mirrors, folders and quantised copies find the shape, and it is said how."""
    match = resolve_model(spelling)
    assert (match.row.name, match.how) == (name, how)
    assert bool(match.dropped) == (how == "normalised")


@pytest.mark.parametrize(
    "name",
    ["", "/", "foo/bar", "llama", "llama-3.1", "llama-3.1-9b", "qwen3-5b-instruct", "7b", "gpt-5",
     "mistral-7b-v0.9", "qwen2.5-7b-2507", "instruct", "bnb-4bit", "lora/sft", "checkpoint-500",
     "DeepSeek-V3.1-source", "models/llama3-8b-pro", "models--", "models--Qwen--Qwen9-8B"],
)  # fmt: skip
def test_a_size_a_version_or_a_date_is_never_guessed(name: str) -> None:
    """What is not known is refused, with suggestions where there are near names."""
    with pytest.raises(UnknownNameError) as caught:
        find_model(name)
    assert "ftplan models" in caught.value.remedy


@pytest.mark.parametrize(
    ("tune", "base", "tokens"),
    [
        ("teknium/OpenHermes-2.5-Mistral-7B", "mistral-7b-v0.1", 2),
        ("NousResearch/Hermes-2-Pro-Mistral-7B", "mistral-7b-v0.1", 32),
        ("openchat/openchat-3.5-0106", "mistral-7b-v0.1", 2),
        ("allenai/Llama-3.1-Tulu-3-8B", "llama-3.1-8b", 8),
        ("HuggingFaceH4/starchat2-15b-v0.1", "starcoder2-15b", 2),
        ("hfl/chinese-llama-2-7b", "llama-2-7b", 23296),
    ],
)
def test_a_tune_with_more_tokens_has_a_row_of_its_own(tune: str, base: str, tokens: int) -> None:
    """Embeddings and head are larger there, and nothing else of the shape differs."""
    grown, original = dict(find_model(tune).config), dict(find_model(base).config)
    assert grown.pop("vocab_size") - original.pop("vocab_size") == tokens
    for shape in (grown, original):  # context and storage are no part of it
        for key in ("max_position_embeddings", "torch_dtype", "rope_scaling"):
            shape.pop(key, None)
    assert grown == original


def test_an_unknown_model_gets_suggestions() -> None:
    """A slip of the keyboard names the nearest models."""
    with pytest.raises(UnknownNameError) as caught:
        find_model("lama-3.1-8b")
    assert "llama-3.1-8b" in caught.value.suggestions


@given(st.text(max_size=60))
@settings(deadline=None, max_examples=200)
def test_any_text_finds_a_row_or_is_refused(name: str) -> None:
    """No name makes the lookup crash."""
    try:
        assert resolve_model(name).row in MODELS.rows
    except UnknownNameError as error:
        assert error.name == name


def test_search_holds_every_word() -> None:
    """`qwen 7b` lists models whose names hold both words; nothing lists all."""
    found = search_models("qwen 7b")
    assert {"qwen2-7b", "qwen2.5-7b"} <= {row.name for row in found}
    assert not any("llama" in row.name and "qwen" not in row.name for row in found)
    assert search_models() == MODELS.rows


def test_most_models_of_the_corpus_resolve() -> None:
    """Of the models that real training configs name, at least nine in ten are in the catalogue."""
    folder = SHARED / "trainer-configs"
    if not folder.exists():
        pytest.skip("the shared data are not beside this checkout")
    pattern = re.compile(
        r"^\s*(?:base_model|model_name_or_path|checkpoint_dir|model_id)\s*:\s*[\"']?([^\"'#\s]+)"
    )
    names = {
        match[1]
        for path in sorted(folder.rglob("*.y*ml"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if (match := pattern.match(line)) and "/" in match[1] and "$" not in match[1]
    }
    unknown = []
    for name in sorted(names):
        try:
            find_model(name)
        except UnknownNameError:
            unknown.append(name)
    assert len(names) == 153
    assert len(unknown) <= len(names) // 10, unknown
