"""The bench's jobs of PEFT's rarer adapters, on one architecture of each side of the split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["adapter_jobs_of"]

Mapping = dict[str, Any]

ARCHITECTURES = ("smollm2-1.7b", "qwen3-8b")
BF16: Mapping = {"weights": "bf16", "mixed": "no"}
AMP: Mapping = {"weights": "bf16", "mixed": "bf16"}

METHODS: dict[str, Mapping] = {
    "adalora": {"kind": "adalora", "rank": 12, "options": {"total_step": 100}},
    "miss": {"kind": "miss", "rank": 64},
    "miss-bat": {"kind": "miss", "rank": 64, "options": {"init_weights": "bat"}},
    "miss-mini": {"kind": "miss", "rank": 64, "options": {"init_weights": "mini", "mini_r": 64}},
    "c3a": {"kind": "c3a", "options": {"block_size": 64}},
    "fourierft": {"kind": "fourierft"},
    "hra": {"kind": "hra", "rank": 4},
    "randlora": {"kind": "randlora", "rank": 32},
    "road": {"kind": "road", "options": {"variant": "road_2"}},
    "vblora": {"kind": "vblora", "rank": 4},
    "delora": {"kind": "delora", "rank": 8},
    "pvera": {"kind": "pvera", "rank": 256},
    "hira": {"kind": "hira", "rank": 32},
    "beft": {"kind": "beft"},
    "gralora": {"kind": "gralora", "rank": 32},
    "glora": {"kind": "glora", "rank": 8},
    "peanut": {"kind": "peanut", "rank": 32, "options": {"depth": 1}},
    "psoft": {"kind": "psoft", "rank": 64},
    "lokr-factor": {"kind": "lokr", "rank": 32, "options": {"decompose_factor": 4}},
}
"""Methods by name, on the projections of queries and values."""


def adapter_jobs_of(name: str, _config: Mapping) -> Iterator[tuple[str, Mapping, int]]:
    """(regime, plan mapping, layers); every second job casts under autocast and checkpoints."""
    if name not in ARCHITECTURES:
        return
    jobs = {kind: {**method, "targets": ["q_proj", "v_proj"]} for kind, method in METHODS.items()}
    jobs["trainable-tokens"] = {"kind": "trainable_tokens", "options": {"token_indices": [1, 2]}}
    jobs["prefix-in-a-loop"] = {"kind": "prefix_tuning", "virtual_tokens": 50}
    for number, (regime, method) in enumerate(jobs.items()):
        loop = method["kind"] == "prefix_tuning"
        cast = (number + ARCHITECTURES.index(name)) % 2 == 1 and not loop
        yield regime, {
            "version": 1, "model": name, "stack": "pytorch" if loop else "transformers",
            "task": "sft", "method": method, "precision": AMP if cast else BF16,
            "gradient_checkpointing": cast,
            "batch": {"micro": 2, "seq_len": 512, "accumulation": 1, "padding": "none"},
            "optimizer": "adamw_torch_fused", "attention": "sdpa", "loss": "full",
            "hardware": {"gpu": "a100-80gb", "count": 1}, "sharding": {"kind": "none"},
        }, 2  # fmt: skip
