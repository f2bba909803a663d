"""The hub is asked only on request, for one small file, and never needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from cli_helpers import Terminal

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
    "tie_word_embeddings": False,
}  # fmt: skip


def _hub(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> list[tuple[str, str]]:
    asked: list[tuple[str, str]] = []

    def hf_hub_download(name: str, file: str) -> str:
        asked.append((name, file))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    def get_safetensors_metadata(name: str) -> SimpleNamespace:
        asked.append((name, "headers"))
        tensors = {"model.norm.weight": SimpleNamespace(dtype="BF16", shape=[65])}
        return SimpleNamespace(files_metadata={"a": SimpleNamespace(tensors=tensors)})

    module = ModuleType("huggingface_hub")
    module.hf_hub_download = hf_hub_download  # type: ignore[attr-defined]
    module.get_safetensors_metadata = get_safetensors_metadata  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


def test_a_model_from_the_hub(
    ftplan: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """config.json and headers are all that is fetched; where they disagree there is a finding."""
    file = tmp_path / "got.json"
    file.write_text(json.dumps(CONFIG))
    asked = _hub(monkeypatch, file)
    said = ftplan("memory", "--model", "someone/new-model", "--hub", "--format", "json")
    assert said.code == 0, said.err
    assert asked == [("someone/new-model", "config.json"), ("someone/new-model", "headers")]
    assert "MEM002" in {finding["code"] for finding in said.data["findings"]}


def test_a_repository_without_safetensors(
    ftplan: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where there are no headers config.json alone gives the shape."""
    file = tmp_path / "got.json"
    file.write_text(json.dumps(CONFIG))
    _hub(monkeypatch, file)
    monkeypatch.delattr(sys.modules["huggingface_hub"], "get_safetensors_metadata")
    said = ftplan("memory", "--model", "someone/new-model", "--hub", "--format", "json")
    assert said.code == 0, said.err
    assert said.data["model"]["total_params"] == 2 * 1000 * 64 + 2 * (12288 + 24576 + 128) + 64


def test_without_the_flag_nothing_is_asked(
    ftplan: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown name is an error with a remedy, not a look-up."""
    asked = _hub(monkeypatch, RuntimeError("must not be called"))
    assert ftplan("memory", "--model", "someone/new-model").code == 2
    assert asked == []


def test_a_hub_that_says_no(ftplan: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub answers is told in one error with what to do instead."""
    _hub(monkeypatch, RuntimeError("401 Client Error: gated"))
    said = ftplan("memory", "--model", "someone/gated", "--hub")
    assert (said.code, said.out) == (2, "")
    assert "gated" in said.err and "--config" in said.err


def test_without_the_extra(ftplan: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the error names what to install."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = ftplan("memory", "--model", "someone/new-model", "--hub")
    assert said.code == 2 and "ftplan[hub]" in said.err
