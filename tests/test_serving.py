"""Serving: what the cache holds, by kind of layer."""

from __future__ import annotations

import pytest

from ftplan.front.api import estimate
from ftplan.spec import Batch, Hardware, Model, Plan, Precision


def _cache(name: str, micro: int, context: int, kv_cache: str | None = None) -> int:
    plan = Plan(
        model=Model(name=name),
        batch=Batch(micro=micro, seq_len=context),
        precision=Precision(weights="bf16", kv_cache=kv_cache),
        hardware=Hardware(),
    )
    return sum(t.bytes for t in estimate(plan).terms if t.name.startswith("kv_cache/"))


def test_grouped_query() -> None:
    """A key and a value of each of 8 heads of 128, in 32 layers, 2 bytes each."""
    assert _cache("llama-3.1-8b", 4, 8192) == 4 * 8192 * 32 * 8 * (128 + 128) * 2


def test_latent_attention_keeps_the_latent() -> None:
    """DeepSeek-V2-Lite: 512 latent values and 64 of the turned key, in 27 layers."""
    assert _cache("deepseek-v2-lite", 1, 4096) == 27 * 4096 * (512 + 64) * 2


def test_a_window_bounds_its_layers() -> None:
    """Every second layer of Gemma 2 holds 4,096 tokens at most."""
    per_token = 13 * 4 * (256 + 256) * 2
    assert _cache("gemma-2-2b", 1, 8192) == per_token * (8192 + 4096)


def test_states_do_not_grow_with_the_context() -> None:
    """Mamba's state is the same at any length, and grows with the sequences."""
    assert _cache("falcon-mamba-7b", 1, 256) == _cache("falcon-mamba-7b", 1, 512) > 0
    assert _cache("falcon-mamba-7b", 4, 256) == 4 * _cache("falcon-mamba-7b", 1, 256)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-8b", "phi-2"])
def test_a_quantised_cache_is_smaller(name: str) -> None:
    """int8 halves the cache of two bytes a value."""
    assert _cache(name, 2, 1024, "int8") * 2 == _cache(name, 2, 1024)
