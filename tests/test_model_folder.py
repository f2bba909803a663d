"""A model folder: config.json, and the headers of its weight files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ftplan.catalog.models import resolve_model
from ftplan.errors import FtplanError, InputError
from ftplan.files.weights import read_headers
from ftplan.front.api import estimate
from ftplan.front.folder import reconciled
from ftplan.front.model_config import read_config
from ftplan.memory.families import build
from ftplan.report import Report
from ftplan.spec import Model, Plan

Shapes = dict[str, tuple[int, ...]]


def header(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> bytes:
    """The start of a safetensors file; no values follow."""
    entries: dict[str, Any] = {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": [0, 0]}
        for name, shape in shapes.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    return len(text).to_bytes(8, "little") + text


def config_of(name: str) -> dict[str, Any]:
    config = resolve_model(name).row.config
    assert config is not None
    return dict(config)


def shapes_of(config: Mapping[str, Any]) -> Shapes:
    return {name: p.shape for name, p in build(config).all_parameters()}


def model_folder(
    folder: Path, config: Mapping[str, Any], shapes: Shapes, dtype: str = "BF16"
) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(header(shapes, dtype))
    return folder


def sized(folder: Path) -> Report:
    return estimate(Plan(model=Model(config=str(folder))))


def one_by_one(shapes: Shapes) -> Shapes:
    """Experts as checkpoints have them: a matrix each."""
    stored: Shapes = {}
    for name, shape in shapes.items():
        if name.endswith("experts.gate_up_proj"):
            for expert in range(shape[0]):
                for part in ("gate_proj", "up_proj"):
                    stored[name.replace("gate_up_proj", f"{expert}.{part}.weight")] = (
                        shape[1] // 2, shape[2],
                    )  # fmt: skip
        elif name.endswith("experts.down_proj"):
            for expert in range(shape[0]):
                stored[name.replace("down_proj", f"{expert}.down_proj.weight")] = shape[1:]
        else:
            stored[name] = shape
    return stored


def without_prefix(shapes: Shapes) -> Shapes:
    """GPT-2 as it was published: no wrapper's name, and masks beside the weights."""
    stored = {name.removeprefix("transformer."): shape for name, shape in shapes.items()}
    return {**stored, "h.0.attn.bias": (1, 1, 1024, 1024)}


@pytest.mark.parametrize(
    ("name", "dtype", "stored"),
    [
        ("llama-3.2-1b", "BF16", dict),
        ("gemma-3-4b", "BF16", dict),
        ("t5-base", "F32", dict),
        ("gpt2", "F32", without_prefix),
        ("qwen3-30b-a3b", "BF16", one_by_one),
    ],
)
def test_files_that_agree_say_nothing(
    tmp_path: Path, name: str, dtype: str, stored: Callable[[Shapes], Shapes]
) -> None:
    """Tied heads, other names for the same tensors and buffers are no disagreement."""
    config = config_of(name)
    model_folder(tmp_path, config, stored(shapes_of(config)), dtype)
    assert reconciled(config, tmp_path) == (config, ())


@pytest.mark.parametrize(
    "wrong",
    [
        {"vocab_size": 1000},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 40},
        {"num_key_value_heads": 16},
        {"hidden_size": 4096, "num_attention_heads": 64},
        {"tie_word_embeddings": False},
        {"vocab_size": 1000, "intermediate_size": 512},
    ],
    ids=str,
)
def test_the_headers_are_the_truth(tmp_path: Path, wrong: dict[str, Any]) -> None:
    """The sums follow the files, and one finding names what config.json has wrong."""
    right = config_of("llama-3.2-1b")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = sized(model_folder(tmp_path / "a", right, shapes_of(right)))
    report = sized(model_folder(tmp_path / "b", {**right, **wrong}, shapes_of(right)))
    assert report.allocated_bytes == expected.allocated_bytes
    assert expected.findings == ()
    assert [finding.code for finding in report.findings] == ["MEM002"]
    assert next(iter(wrong)) in report.findings[0].help


def test_the_dtype_is_the_files(tmp_path: Path) -> None:
    """Weights stored in fp32 are fp32, whatever config.json says."""
    config = config_of("llama-3.2-1b")
    report = sized(model_folder(tmp_path, config, shapes_of(config), "F32"))
    assert report.job["precision"]["weights"] == "fp32"
    assert "stored in fp32" in report.findings[0].message


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    """The tensors of all files that the index names, and of no other file."""
    for name in ("model-1.safetensors", "model-2.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(header({f"{name}.weight": (2, 3)}))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = read_headers(tmp_path)
    assert sorted(tensors) == ["model-1.safetensors.weight", "model-2.safetensors.weight"]
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match="1 of 2 files are not there"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"\xff" * 8 + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"\xff\xfe{}",
        (2000).to_bytes(8, "little") + b"[" * 2000,
        (12).to_bytes(8, "little") + b'{"a": [1,2]}',
        (29).to_bytes(8, "little") + b'{"a":{"dtype":1,"shape":[1]}}',
        (33).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[-1]}}'[:33],
    ],
)
def test_broken_weight_files_are_refused(tmp_path: Path, content: bytes) -> None:
    """What is no safetensors file is refused by name, never half read."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="no safetensors file"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON"),
        ("[]", "no model_type"),
        ('{"model_type": 3}', "no model_type"),
        ('{"model_type": "llama"}', "no hidden_size"),
        ('{"model_type": "llama", "hidden_size": NaN}', "NaN"),
        ('{"model_type": "llama", "hidden_size": -1}', "hidden_size is -1"),
        ('{"model_type": "llama", "hidden_size": "4096"}', "hidden_size is '4096'"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000000}', "num_hidden_layers"),
        ('{"model_type": "llama", "a": 1, "a": 2}', "given twice"),
        ('{"model_type": "no-such-model", "hidden_size": 8, "n_layer": 1, "vocab_size": 9}', "no-"),
        ('{"a":' * 5000, "nested"),
    ],
)
def test_configs_that_describe_nothing_are_refused(tmp_path: Path, content: str, says: str) -> None:
    """Every refusal names what is wrong; nothing is filled in by guess."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(FtplanError) as caught:
        sized(tmp_path / "config.json")
    assert says in str(caught.value) or "not JSON" in str(caught.value)


def test_every_config_of_the_catalogue_can_be_passed_as_a_file(tmp_path: Path) -> None:
    """What is asked of a config.json is what real ones have."""
    from ftplan.catalog.models import search_models

    rows = search_models()
    for row in rows:
        (tmp_path / "config.json").write_text(json.dumps(row.config))
        read_config(tmp_path)
    assert len(rows) >= 120


def test_a_code_reference_is_never_followed(tmp_path: Path) -> None:
    """``auto_map`` names Python files; they are not run."""
    config = {**config_of("llama-3.2-1b"), "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    model_folder(tmp_path, config, shapes_of(config))
    assert sized(tmp_path).findings == ()
