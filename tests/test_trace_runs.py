"""The annex with torch: small jobs traced for real, against formulas and a witness."""

from __future__ import annotations

import importlib.util
import json
from importlib.resources import files
from typing import Any

import pytest

pytestmark = [
    pytest.mark.trace,
    pytest.mark.skipif(
        any(importlib.util.find_spec(p) is None for p in ("torch", "transformers", "peft")),
        reason="needs the extra 'trace'",
    ),
    # the libraries under trace warn in their own time about things of their own
    pytest.mark.filterwarnings("ignore"),
]

Mapping = dict[str, Any]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BATCH = {"micro": 2, "seq_len": 512}
TOKENS = 1024


def config_of(name: str) -> Mapping:
    """A model's config from the catalogue."""
    rows = json.loads(files("ftplan.catalog").joinpath("data/models.json").read_text("utf-8"))
    found: Mapping = next(row["config"] for row in rows if row["name"] == name)
    return found


def traced(name: str, plan: Mapping, layers: int = 3, **options: Any) -> Any:
    """Trace a plan on a model cut to a few layers."""
    from ftplan.trace.core import trace
    from ftplan.trace.job import plan_from

    whole = {"model": name, "batch": BATCH, **plan}
    return trace(plan_from(whole), config_of(name), layers=layers, **options)


H, KV, FF, A = 4096, 4096, 11008, 32  # llama-2-7b
FACTS = [
    ({"method": {"kind": "full"}}, 20 * H + 4 * KV + 8 * FF + 4 * A + 8),
    (
        {"method": {"kind": "full"}, "precision": {"weights": "fp32"}},
        32 * H + 8 * KV + 16 * FF + 4 * A + 8,
    ),
    (
        {"method": {"kind": "full"}, "precision": {"weights": "fp32", "mixed": "bf16"}},
        30 * H + 4 * KV + 8 * FF + 4 * A + 8,
    ),
    (
        {"method": {"kind": "lora", "targets": ATTENTION}},
        28 * H + 4 * KV + 6 * FF + 4 * A + 8 + 16 * 16,
    ),
    ({"method": {"kind": "lora"}}, 36 * H + 4 * KV + 10 * FF + 4 * A + 8 + 28 * 16),
    (
        {"method": {"kind": "lora"}, "precision": {"weights": "bf16", "mixed": "bf16"}},
        24 * H + 4 * KV + 8 * FF + 4 * A + 8 + 14 * 16,
    ),
    (
        {"method": {"kind": "lora", "targets": ATTENTION, "adapter_dtype": "bf16"}},
        14 * H + 4 * KV + 6 * FF + 4 * A + 8 + 8 * 16,
    ),
]


@pytest.mark.parametrize(("plan", "per_token"), FACTS)
def test_saved_bytes_per_token(plan: Mapping, per_token: int) -> None:
    """A layer keeps what the linear formula of its ops says, to the byte.

    Left out: the two philox words of the flash kernel and the cast weights under autocast.
    """
    result = traced("llama-2-7b", plan)
    kept = [
        entry
        for entry in result.saved("layers.1.")
        if entry.dtype != "int64" and entry.shape[0] in (BATCH["micro"], TOKENS)
    ]
    assert sum(entry.bytes for entry in kept) == per_token * TOKENS


def test_the_terms_are_the_peak() -> None:
    """What is alive at the peak adds up to it, and the groups are the right ones."""
    result = traced("llama-3.2-1b", {"method": {"kind": "full"}})
    terms = result.at_peak()
    assert sum(terms.values()) == result.allocated_bytes
    weights = result.total_params * 2
    assert abs(terms["weights/trainable"] - weights) < 1e4
    assert abs(terms["optimizer"] - 2 * weights) < 1e5
    assert result.allocated_bytes == max(result.phases.values())


def test_priming_is_a_whole_first_step() -> None:
    """Giving the optimizer its states leaves the second step's peaks as they are."""
    plan = {
        "method": {"kind": "lora"}, "precision": {"weights": "bf16", "mixed": "bf16"},
        "gradient_checkpointing": True,
    }  # fmt: skip
    quick = traced("qwen2.5-0.5b", plan)
    whole = traced("qwen2.5-0.5b", plan, full=True)
    assert quick.phases == whole.phases


def test_a_witness_counts_the_same() -> None:
    """torch's MemTracker, watching the same run, finds the same peak but for rounding up."""
    from ftplan.trace.verify import against_mem_tracker

    plan = {"method": {"kind": "lora", "rank": 16}, "gradient_checkpointing": True}
    ours, theirs = against_mem_tracker(plan, config_of("llama-3.2-1b"))
    assert 0 <= ours - theirs < 100_000


def test_outputs_are_dropped_before_backward_by_trainer_only() -> None:
    """A plain loop holds the logits through backward: V values of two bytes a token more."""
    plans = [{"stack": s, "method": {"kind": "lora"}, "optimizer": "adamw_torch_fused"}
             for s in ("transformers", "pytorch")]  # fmt: skip
    dropped, held = (traced("llama-3.2-1b", plan, layers=2) for plan in plans)
    vocabulary = config_of("llama-3.2-1b")["vocab_size"]
    difference = held.phases["backward"] - dropped.phases["backward"]
    # the loop's last reference to the batch makes the rest
    assert abs(difference - 2 * vocabulary * TOKENS) < 5e4


def test_four_bits_are_four_and_a_half() -> None:
    """NF4 keeps half a byte and 4/64 of one per weight; what is prepared goes to fp32."""
    config = config_of("llama-2-7b")
    plan = {
        "method": {"kind": "qlora", "prepare_kbit": True},
        "precision": {"weights": "nf4", "mixed": "bf16"},
        "gradient_checkpointing": True,
    }
    pytest.importorskip("bitsandbytes")
    result = traced("llama-2-7b", plan)
    linear = 3 * (4 * H * H + 3 * H * FF)
    whole = 2 * config["vocab_size"] * H + (2 * 3 + 1) * H
    expected = linear * 4.5 / 8 + whole * 4
    assert abs(result.at_peak()["weights/frozen"] - expected) < 1e5


def test_shards_are_shares_and_units_are_gathered() -> None:
    """FSDP2: four times the GPUs, a quarter of the states; the gathered unit does not shrink."""
    plan = {"method": {"kind": "full"}, "sharding": {"kind": "fsdp", "version": 2}}
    two, eight = (
        traced("tinyllama-1.1b", {**plan, "hardware": {"count": count}}, layers=2)
        for count in (2, 8)
    )
    assert two.at_peak()["optimizer"] == pytest.approx(4 * eight.at_peak()["optimizer"], rel=1e-2)
    assert two.at_peak()["gathered"] == eight.at_peak()["gathered"]


def test_ddp_buckets_are_a_second_copy_of_the_gradients() -> None:
    """DDP adds exactly one copy of what is trained."""
    plan = {"method": {"kind": "full"}, "gradient_checkpointing": True}
    alone = traced("tinyllama-1.1b", plan, layers=2)
    two = traced(
        "tinyllama-1.1b", {**plan, "sharding": {"kind": "ddp"}, "hardware": {"count": 2}}, layers=2
    )
    added = two.allocated_bytes - alone.allocated_bytes
    assert abs(added - 2 * alone.trainable_params) < 1e5


def test_the_kernel_that_a_gpu_would_pick() -> None:
    """Flash where it can, memory-efficient under a mask, math for grouped heads without flash."""
    import torch

    from ftplan.trace.cuda import pick_sdpa

    def pick(dtype: Any, kv_heads: int, capability: tuple[int, int], mask: Any = None,
             head: int = 64) -> str:  # fmt: skip
        query = torch.empty(1, 8, 16, head, dtype=dtype, device="meta")
        key = torch.empty(1, kv_heads, 16, head, dtype=dtype, device="meta")
        return pick_sdpa(query, key, key, mask, 0.0, mask is None, capability)

    mask = torch.empty(1, 1, 16, 16, device="meta")
    assert pick(torch.bfloat16, 2, (8, 0)) == "flash"
    assert pick(torch.float32, 8, (8, 0)) == "efficient"
    assert pick(torch.float32, 2, (8, 0)) == "math"
    assert pick(torch.float16, 2, (7, 5)) == "math"
    assert pick(torch.bfloat16, 8, (8, 0), mask) == "efficient"
    assert pick(torch.bfloat16, 8, (8, 0), head=512) == "efficient"


def test_a_failed_trace_leaves_no_trace() -> None:
    """A refused job, whatever it left half done, does not change the next one's numbers."""
    from ftplan.errors import UnsupportedError

    plan = {"method": {"kind": "full"}, "precision": {"weights": "fp32", "mixed": "bf16"}}
    before = traced("gpt2", plan, layers=2)
    with pytest.raises(UnsupportedError):
        traced("gpt2", {**plan, "optimizer": "an_optimizer_of_tomorrow"}, layers=2)
    after = traced("gpt2", plan, layers=2)
    assert before.phases == after.phases


def test_measuring_without_a_gpu_is_refused_politely() -> None:
    """No CUDA device: one error with what to do instead, never a traceback of torch's."""
    import torch

    from ftplan.errors import FtplanError
    from ftplan.trace.measure import require_gpu

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(FtplanError) as caught:
        require_gpu()
    assert "ftplan trace" in caught.value.remedy
