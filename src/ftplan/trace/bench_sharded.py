"""The sharded jobs of the bench: FSDP2 and DDP over two to many GPUs, traced for one rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["SHARDED_REGIMES", "sharded_jobs_of"]

Mapping = dict[str, Any]

BF16: Mapping = {"weights": "bf16", "mixed": "no"}
AMP: Mapping = {"weights": "fp32", "mixed": "bf16"}
FULL: Mapping = {"kind": "full"}
LORA: Mapping = {
    "kind": "lora", "rank": 16, "targets": "all-linear", "dropout": 0.0, "adapter_dtype": "fp32",
}  # fmt: skip

SHARDED_REGIMES: dict[str, Mapping] = {
    "fsdp2-full-bf16": {"method": FULL, "precision": BF16},
    "fsdp2-full-mixed": {"method": FULL, "precision": AMP},
    "fsdp2-lora": {"method": LORA, "precision": BF16, "gradient_checkpointing": True},
    "fsdp2-full-mixed-checkpointed": {
        "method": FULL, "precision": AMP, "gradient_checkpointing": True,
    },
    "fsdp2-full-kept": {
        "method": FULL, "precision": BF16, "sharding": {"reshard_after_forward": False},
    },
    "fsdp2-full-fp32-reduced": {
        "method": FULL, "precision": {"weights": "fp32", "mixed": "no"},
        "sharding": {"param_dtype": "bf16", "reduce_dtype": "fp32"},
        "gradient_checkpointing": True,
    },
    "fsdp2-lora-kept": {
        "method": LORA, "precision": BF16, "sharding": {"reshard_after_forward": False},
    },
    "fsdp2-full-bf16-checkpointed": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True,
        "optimizer": "adamw_torch",
    },
    "fsdp2-full-one-unit": {
        "method": FULL, "precision": BF16, "sharding": {"wrap": "model"},
        "gradient_checkpointing": True,
    },
    "fsdp2-full-accumulated": {
        "method": FULL, "precision": AMP, "batch": {"accumulation": 4},
        "sharding": {"no_sync": False}, "gradient_checkpointing": True,
    },
    "fsdp2-lora-mixed": {
        "method": LORA, "precision": {"weights": "bf16", "mixed": "bf16"},
        "gradient_checkpointing": True,
    },
    "fsdp2-full-hybrid": {
        "method": FULL, "precision": {"weights": "fp32", "mixed": "no"},
        "sharding": {"param_dtype": "bf16", "reduce_dtype": "bf16", "dp_replicate": 2},
    },
    "fsdp2-full-offloaded": {
        "method": FULL, "precision": AMP, "sharding": {"offload": "params"},
        "gradient_checkpointing": True,
    },
    "fsdp2-full-not-synced": {
        "method": FULL, "precision": BF16, "batch": {"accumulation": 4},
        "sharding": {"no_sync": True}, "gradient_checkpointing": True,
    },
    "fsdp2-qlora": {
        "method": {**LORA, "kind": "qlora", "prepare_kbit": False, "double_quant": False},
        "precision": {"weights": "nf4", "mixed": "bf16"}, "gradient_checkpointing": True,
    },
    "fsdp2-lora-hybrid": {
        "method": LORA, "precision": BF16, "sharding": {"dp_replicate": 2},
        "gradient_checkpointing": True,
    },
    "fsdp2-lora-offloaded": {
        "method": LORA, "precision": BF16, "sharding": {"offload": "params"},
    },
    "fsdp2-full-fp32-not-synced": {
        "method": FULL, "precision": {"weights": "fp32", "mixed": "no"},
        "batch": {"accumulation": 2}, "gradient_checkpointing": True,
        "sharding": {"param_dtype": "bf16", "reduce_dtype": "fp32", "no_sync": True},
    },
    "ddp-full": {"method": FULL, "precision": BF16, "gradient_checkpointing": True},
    "ddp-lora": {"method": LORA, "precision": BF16},
}  # fmt: skip
"""Regimes by name."""

FLAT_REGIMES: dict[str, Mapping] = {
    "fsdp1-full-bf16": {"method": FULL, "precision": BF16, "sharding": {"use_orig_params": True}},
    "fsdp1-full-mixed-checkpointed": {
        "method": FULL, "precision": AMP, "gradient_checkpointing": True,
    },
    "fsdp1-lora": {
        "method": {**LORA, "adapter_dtype": "bf16"}, "precision": BF16,
        "gradient_checkpointing": True,
    },
    "fsdp1-full-kept": {
        "method": FULL, "precision": BF16, "sharding": {"reshard_after_forward": False},
    },
    "fsdp1-full-fp32-reduced": {
        "method": FULL, "precision": {"weights": "fp32", "mixed": "no"},
        "sharding": {"param_dtype": "bf16", "reduce_dtype": "fp32"},
        "gradient_checkpointing": True,
    },
    "fsdp1-qlora": {
        "method": {
            **LORA, "kind": "qlora", "prepare_kbit": False, "double_quant": False,
            "adapter_dtype": "bf16",
        },
        "precision": {"weights": "nf4", "mixed": "no"}, "gradient_checkpointing": True,
    },
    "fsdp1-full-not-synced": {
        "method": FULL, "precision": BF16, "batch": {"accumulation": 2},
        "sharding": {"no_sync": True}, "gradient_checkpointing": True,
    },
}  # fmt: skip
"""Regimes of FSDP1."""
TENSOR_REGIMES: dict[str, Mapping] = {
    "tp-full": {"method": FULL, "precision": BF16},
    "tp-full-checkpointed": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True,
    },
}  # fmt: skip
"""Regimes of tensor parallelism."""
SPLIT = (
    "llama-3.1-8b", "llama-2-7b", "qwen2.5-7b", "mistral-7b-v0.1", "qwen3-8b", "llama-3.1-70b",
)  # fmt: skip
"""Architectures whose plan splits heads, MLP, embeddings and head alone."""
PLANNED = {
    "gpt-oss-20b": (8, 4), "olmo-2-7b": (4, 4), "phi-3-mini": (4, 4), "mixtral-8x7b": (8, 4),
    "olmoe-1b-7b": (8, 2), "deepseek-v2-lite": (8, 4), "pythia-1.4b": (4, 2),
}  # fmt: skip
"""Architectures whose plan is another one, with the micro batch and the ranks of their jobs: the
head alone; attention, or the MLP too, of gathered features; experts; latent attention; a table that
is whole."""
PLANNED_REGIMES: dict[str, Mapping] = {
    "tp-full-planned-checkpointed": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True,
        "optimizer": {"name": "adamw_torch", "implementation": "loop"},
    },
    "tp-full-planned": {
        "method": FULL, "precision": BF16,
        "optimizer": {"name": "adamw_torch", "implementation": "loop"},
    },
}  # fmt: skip
"""Regimes of theirs. What steps many weights at once refuses DTensors among others."""
COLUMNS = {
    "llama-3.1-8b": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
    "olmo-2-7b": ["gate_proj", "up_proj"],
}  # fmt: skip
"""What peft 0.21 can adapt under tensor parallelism: layers that are cut by columns."""
RING_REGIMES: dict[str, Mapping] = {
    "cp-full-checkpointed": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True, "sharding": {"cp": 2},
    },
    "cp-full": {"method": FULL, "precision": BF16, "sharding": {"cp": 4}},
    "cp-lora": {
        "method": LORA, "precision": BF16, "gradient_checkpointing": True, "sharding": {"cp": 8},
    },
    "cp-full-mixed": {
        "method": FULL, "precision": AMP, "gradient_checkpointing": True, "sharding": {"cp": 4},
    },
}  # fmt: skip
"""Regimes of context parallelism: PyTorch's ring attention under FSDP2."""
RINGED = (
    "llama-3.1-8b", "llama-2-7b", "qwen2.5-7b", "mistral-7b-v0.1", "pythia-1.4b", "opt-1.3b",
    "mixtral-8x7b", "smollm2-1.7b", "qwen3-4b", "phi-3-mini", "olmo-2-7b", "granite-3.1-2b",
    "tinyllama-1.1b", "llama-3.2-1b",
)  # fmt: skip
RING_TOKENS = {"pythia-1.4b": 2048, "opt-1.3b": 2048}
"""Tokens of a sequence, where there are no more positions; else 16,384."""
ZERO_REGIMES: dict[str, Mapping] = {
    "zero2-full": {"method": FULL, "precision": BF16, "gradient_checkpointing": True},
    "zero3-full": {"method": FULL, "precision": BF16, "gradient_checkpointing": True},
    "zero2-lora": {"method": LORA, "precision": AMP, "gradient_checkpointing": True},
    "zero1-full": {"method": FULL, "precision": AMP},
    "zero3-lora": {"method": LORA, "precision": BF16, "gradient_checkpointing": True},
    "zero2-full-overlapped": {
        "method": FULL, "precision": AMP, "sharding": {"overlap_comm": True},
    },
    "zero3-full-small-buckets": {
        "method": FULL, "precision": AMP, "gradient_checkpointing": True,
        "sharding": {
            "bucket_elements": 16_777_216, "prefetch_elements": 15_099_494,
            "persistence_elements": 40_960,
        },
    },
    "zero2-full-accumulated": {
        "method": FULL, "precision": BF16, "batch": {"accumulation": 2},
        "gradient_checkpointing": True,
    },
    "zero2-full-small-buckets": {
        "method": FULL, "precision": BF16, "sharding": {"bucket_elements": 16_777_216},
    },
    "zero2-qlora": {
        "method": {**LORA, "kind": "qlora", "prepare_kbit": True, "double_quant": False},
        "precision": {"weights": "nf4", "mixed": "bf16"}, "gradient_checkpointing": True,
    },
    "zero1-full-accumulated": {
        "method": FULL, "precision": BF16, "batch": {"accumulation": 2},
    },
    "zero3-full-accumulated": {
        "method": FULL, "precision": {"weights": "fp32", "mixed": "fp16"},
        "batch": {"accumulation": 2}, "gradient_checkpointing": True,
    },
}  # fmt: skip
"""Regimes of DeepSpeed, which has to be installed to trace them."""
OFFLOAD_REGIMES: dict[str, Mapping] = {
    "zero2-full-offloaded": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True,
        "sharding": {"offload": "optimizer"},
    },
    "zero3-full-offloaded": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True,
        "sharding": {"offload": "optimizer"},
    },
    "zero3-full-params-offloaded": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True,
        "batch": {"accumulation": 2}, "sharding": {"offload": "params"},
    },
}  # fmt: skip
"""The same with states, or weights too, on the host."""
SMALL: Mapping = {
    "bucket_elements": 16_777_216, "prefetch_elements": 15_099_494, "persistence_elements": 40_960,
}  # fmt: skip
GATHER_REGIMES: dict[str, Mapping] = {
    "zero3-full-small-buckets-kept": {"method": FULL, "precision": BF16, "sharding": SMALL},
    "zero3-lora-small-buckets": {
        "method": LORA, "precision": BF16, "gradient_checkpointing": True, "sharding": SMALL,
    },
    "zero3-full-few-live": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True,
        "sharding": {"max_live_elements": 200_000_000, "prefetch_elements": 20_000_000},
    },
    "zero3-lora-kept": {"method": LORA, "precision": BF16},
    "zero3-full-offloaded-small-buckets": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True,
        "sharding": {**SMALL, "offload": "optimizer"},
    },
    "zero3-full-params-offloaded-few-live": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True,
        "sharding": {"offload": "params", "max_live_elements": 100_000_000},
    },
    "zero3-full-accumulated-kept": {
        "method": FULL, "precision": BF16, "batch": {"accumulation": 4}, "sharding": SMALL,
    },
    "zero3-full-fp32": {
        "method": FULL, "precision": {"weights": "fp32", "mixed": "no"},
        "sharding": {"max_live_elements": 300_000_000},
    },
    "zero3-full-little-prefetched": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True,
        "sharding": {"prefetch_elements": 1, "bucket_elements": 50_000_000},
    },
}  # fmt: skip
"""Regimes of ZeRO-3 that differ in what is gathered when."""
EVALUATED: Mapping = {"batch": {"eval_micro": 8}, "gradient_checkpointing": True}
EVALUATED_REGIMES: dict[str, Mapping] = {
    "zero3-lora-evaluated": {
        **EVALUATED, "precision": BF16,
        "method": {**LORA, "targets": "attention", "adapter_dtype": "bf16"},
        "sharding": {**SMALL, "max_live_elements": 200_000_000},
    },
    "fsdp2-full-evaluated": {**EVALUATED, "method": FULL, "precision": BF16},
    "zero3-full-evaluated": {**EVALUATED, "method": FULL, "precision": BF16},
    "fsdp1-full-mixed-evaluated": {**EVALUATED, "method": FULL, "precision": AMP},
    "zero3-full-params-offloaded-evaluated": {
        **EVALUATED, "method": FULL, "precision": BF16, "sharding": {**SMALL, "offload": "params"},
    },
    "fsdp2-lora-kept-evaluated": {
        **EVALUATED, "method": LORA, "precision": BF16,
        "sharding": {"reshard_after_forward": False},
    },
    "ddp-full-evaluated": {**EVALUATED, "method": FULL, "precision": BF16},
    "zero3-full-small-buckets-evaluated": {
        "batch": {"eval_micro": 4, "accumulation": 2}, "gradient_checkpointing": True,
        "method": FULL, "precision": BF16, "sharding": SMALL,
    },
}  # fmt: skip
"""Regimes with an evaluation between two steps."""
PAIRED_REGIMES: dict[str, Mapping] = {
    "fsdp2-full-dpo": {
        "task": "dpo", "method": FULL, "precision": BF16, "gradient_checkpointing": True,
    },
    "fsdp2-lora-dpo": {
        "task": "dpo", "method": LORA, "precision": BF16, "gradient_checkpointing": True,
    },
}  # fmt: skip
"""Regimes with a reference: a model beside the trained one, or the same with its adapters off."""
GATHERED = (
    "llama-3.1-8b", "qwen2.5-7b", "mistral-7b-v0.1", "pythia-1.4b", "opt-1.3b", "smollm2-1.7b",
    "qwen3-4b", "phi-3-mini", "olmo-2-7b", "granite-3.1-2b", "gpt2-xl", "gemma-2-2b",
    "olmoe-1b-7b", "llama-3.2-1b", "qwen2.5-0.5b", "falcon-7b",
)  # fmt: skip

ATTENTION: Mapping = {**LORA, "targets": ["q_proj", "o_proj"]}
"""peft 0.21 cannot adapt experts that are spread: its update and their weights do not mix."""
EXPERT_REGIMES: dict[str, Mapping] = {
    "ep-full-checkpointed": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True,
    },
    "ep-full": {"method": FULL, "precision": BF16},
    "ep-lora": {"method": ATTENTION, "precision": BF16},
    "ep-full-alone": {  # experts whole on their rank
        "method": FULL, "precision": BF16, "gradient_checkpointing": True,
        "sharding": {"ep": 8},
    },
    "ep-full-fp32-reduced": {
        "method": FULL, "precision": {"weights": "fp32", "mixed": "no"},
        "sharding": {"param_dtype": "bf16", "reduce_dtype": "fp32"},
        "gradient_checkpointing": True,
    },
    "ep-lora-checkpointed": {
        "method": ATTENTION, "precision": BF16, "gradient_checkpointing": True,
    },
    "ep-full-shared-batch": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True,
        "sharding": {"kind": "none"},
        # kernels that step many weights at once refuse DTensors among others
        "optimizer": {"name": "adamw_torch", "implementation": "loop"},
    },
    "ep-full-mixed-accumulated": {
        "method": FULL, "precision": AMP, "batch": {"accumulation": 2},
        "sharding": {"no_sync": True},
    },
    "ep-lora-shared-batch": {
        "method": ATTENTION, "precision": BF16, "sharding": {"kind": "none"},
    },
}  # fmt: skip
"""Regimes of expert parallelism, as transformers runs it: all-to-all, with FSDP2 or one batch."""
SPLIT_EXPERT_REGIMES: dict[str, Mapping] = {
    "ep-full-tensor-checkpointed": {
        **EXPERT_REGIMES["ep-full-shared-batch"], "sharding": {"kind": "none", "tp": 4, "ep": 4},
    },
    "ep-full-tensor": {
        **EXPERT_REGIMES["ep-full-shared-batch"], "sharding": {"kind": "none", "tp": 4, "ep": 4},
        "gradient_checkpointing": False,
    },
}  # fmt: skip
"""The same with tensor parallelism of everything else."""
DEEP_EP_REGIMES: dict[str, Mapping] = {
    "ep-deep-full-checkpointed": {
        "method": FULL, "precision": BF16, "stack": "axolotl",
        "gradient_checkpointing": {"kind": "full", "reentrant": False},
    },
    "ep-deep-full": {"method": FULL, "precision": BF16, "stack": "axolotl"},
}  # fmt: skip
"""The same through DeepEP, whose kernels are stubbed: axolotl has to be installed to trace them."""
SPREAD = {
    "mixtral-8x7b": 2, "qwen3-30b-a3b": 8, "gpt-oss-20b": 4, "deepseek-v2-lite": 4,
    "olmoe-1b-7b": 2,
}  # fmt: skip
"""Architectures whose experts are spread, and over how many ranks."""
EXPERT_JOBS_PER_ARCHITECTURE = 5

ARCHITECTURES = (
    "llama-3.1-8b", "llama-2-7b", "qwen2.5-7b", "mistral-7b-v0.1", "pythia-1.4b", "opt-1.3b",
    "mixtral-8x7b", "smollm2-1.7b", "qwen3-4b", "qwen3-8b", "phi-3-mini", "olmo-2-7b",
    "granite-3.1-2b", "tinyllama-1.1b", "qwen3-30b-a3b", "llama-3.1-70b", "gpt2-xl", "t5-base",
    "gemma-2-2b", "gpt-oss-20b", "deepseek-v2-lite", "olmoe-1b-7b", "llama-3.2-1b",
    "qwen2.5-0.5b", "falcon-7b",
)  # fmt: skip
SHARING = ("t5-base",)
"""Architectures whose encoder and decoder share embeddings, which cannot be a unit apart."""
WORLDS = (8, 2, 4, 16, 32, 64)
SHAPES = ((1, 1024), (2, 512), (1, 2048), (4, 512), (2, 1024))
JOBS_PER_ARCHITECTURE = 6
OTHER_JOBS_PER_ARCHITECTURE = 2


def sharded_jobs_of(name: str, config: Mapping) -> Iterator[tuple[str, Mapping, int]]:
    """(regime, plan mapping, layers) of an architecture's sharded jobs.

    FSDP2's are there with all that is beside the blocks in the root (``wrap: block``), and as
    others wrap them (:func:`_other_units`).
    """
    for number, (regime, plan, layers) in enumerate(_in_one_root(name)):
        yield regime, plan, layers
        sharding = plan["sharding"]
        if name not in SHARING and sharding.get("version") == 2 and plan["stack"] == "transformers":
            for ending, more in _other_units(regime, number).items():
                yield f"{regime}-{ending}", {**plan, "sharding": {**sharding, **more}}, layers


def _other_units(regime: str, number: int) -> dict[str, Mapping]:
    """As accelerate wraps since 1.14, until 1.13, and LLaMA-Factory v1 (with LoRA)."""
    units: dict[str, Mapping] = {"apart": {"apart": ["embeddings", "head"]}}
    if number % 2 and regime.startswith("fsdp2"):
        units["root-resharded"] = {"reshard_root": True}
    if number % 2 == 0 and regime.startswith(("fsdp2-lora", "fsdp2-qlora")):
        units["adapters-apart"] = {"apart": ["embeddings", "adapters"], "reshard_root": True}
    return units


def _in_one_root(name: str) -> Iterator[tuple[str, Mapping, int]]:
    if name not in ARCHITECTURES:
        return
    yield from _jobs(name, SHARDED_REGIMES, JOBS_PER_ARCHITECTURE)
    yield from _jobs(name, FLAT_REGIMES, OTHER_JOBS_PER_ARCHITECTURE)
    if name in SPLIT:
        yield from _jobs(name, TENSOR_REGIMES, 1)
    if name in COLUMNS:
        adapted = {
            **PLANNED_REGIMES["tp-full-planned"],
            "method": {**LORA, "targets": COLUMNS[name]},
        }
        yield from _jobs(name, {"tp-lora-columns": adapted}, 1)
    if name in SPLIT:
        yield from _jobs(name, PAIRED_REGIMES, 1)
    if name in PLANNED:
        yield from _jobs(name, PLANNED_REGIMES, 2)
    if name in RINGED:
        yield from _jobs(name, RING_REGIMES, 1)
    if name in SPREAD:
        yield from _jobs(name, EXPERT_REGIMES, EXPERT_JOBS_PER_ARCHITECTURE)
        yield from _jobs(name, DEEP_EP_REGIMES, 1)
    if name in ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b"):
        yield from _jobs(name, SPLIT_EXPERT_REGIMES, 1)
    yield from _jobs(name, ZERO_REGIMES, OTHER_JOBS_PER_ARCHITECTURE)
    if name in RINGED:
        yield from _jobs(name, OFFLOAD_REGIMES, 1)
    if name in GATHERED:
        yield from _jobs(name, GATHER_REGIMES, 1)
        yield from _jobs(name, EVALUATED_REGIMES, 1)


def _jobs(name: str, known: dict[str, Mapping], count: int) -> Iterator[tuple[str, Mapping, int]]:
    index = ARCHITECTURES.index(name)
    regimes = list(known)
    for number in range(count):
        regime = regimes[(index * count + number) % len(regimes)]
        micro, seq_len = SHAPES[(index + 2 * number) % len(SHAPES)]
        world = WORLDS[(index + number) % len(WORLDS)]
        more = known[regime]
        if (more.get("sharding") or {}).get("dp_replicate"):
            world = max(world, 4)
        kind = regime.partition("-")[0]
        sharding: Mapping = {"kind": kind}
        if kind == "tp":
            world = min(world, 4)
            if more in PLANNED_REGIMES.values():
                (micro, world), seq_len = PLANNED[name], 1024
            sharding = {"kind": "none", "tp": world}
        if kind == "cp":
            micro, seq_len = 1, RING_TOKENS.get(name, 16_384)
            world = max(world, 8)
        if kind in ("fsdp1", "fsdp2", "cp", "ep"):
            sharding = {
                "kind": "fsdp", "version": 1 if kind == "fsdp1" else 2, "wrap": "block",
                "reshard_after_forward": True, "offload": "none",
            }  # fmt: skip
        plan: Mapping = {
            "version": 1, "model": name, "stack": more.get("stack", "transformers"),
            "task": more.get("task", "sft"), "method": more["method"],
            "precision": more["precision"],
            "batch": {
                "micro": micro, "seq_len": seq_len, "accumulation": 1, "padding": "none",
                **more.get("batch", {}),
            },
            "optimizer": more.get("optimizer", "adamw_torch_fused"),
            "gradient_checkpointing": more.get("gradient_checkpointing", False),
            "attention": "sdpa", "loss": "full",
            "hardware": {"gpu": "a100-80gb", "count": world},
            "sharding": {**sharding, **more.get("sharding", {})},
        }  # fmt: skip
        if kind == "ep":
            _spread(plan, SPREAD[name])
        yield regime, plan, (4, 3, 6)[(index + number) % 3] if index < 6 else 2 + number % 2


def _spread(plan: Mapping, ep: int) -> None:
    """Experts over ``ep`` ranks of twice as many, or over all of them."""
    sharding = plan["sharding"]
    count = ep if sharding["kind"] == "none" or "ep" in sharding else 2 * ep
    if sharding["kind"] == "none":
        kept = {key: sharding[key] for key in ("kind", "tp", "ep") if key in sharding}
        sharding = plan["sharding"] = kept
    sharding.setdefault("ep", ep)
    plan["hardware"]["count"] = max(count, sharding["ep"])
    if "tp" in sharding:
        plan["hardware"]["count"] = sharding["tp"]
