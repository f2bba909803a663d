"""A job with every choice made: what the calculator is asked.

The door resolves names and defaults (:mod:`ftplan.resolve`); nothing in here is optional unless
``None`` means "there is none".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ftplan.dtypes import Format
from ftplan.memory.env import Environment
from ftplan.memory.optimizer import OptimizerSpec

__all__ = ["AdapterSpec", "Job", "ShardingSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """An adapter method with its settings."""

    kind: str
    rank: int
    targets: tuple[str, ...] | str | None
    """None: what PEFT targets in this architecture (IA3, layer-norm tuning)."""
    dtype: str
    """Storage of the adapter's parameters."""
    dropout: float = 0.0
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    target_parameters: tuple[str, ...] = ()
    virtual_tokens: int = 0
    bottleneck: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingSpec:
    """How the job is spread; degrees are 1 where a dimension is not used."""

    kind: Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp"] = "none"
    world: int = 1
    """GPUs in all."""
    version: int = 2
    param_dtype: str | None = None
    reduce_dtype: str | None = None
    reshard_after_forward: bool = True
    wrap: Literal["block", "model"] = "block"
    offload: Literal["none", "optimizer", "params", "activations", "nvme"] = "none"
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    dp_replicate: int = 1
    bucket_elements: int = 500_000_000
    prefetch_elements: int = 50_000_000
    max_live_elements: int = 1_000_000_000
    persistence_elements: int = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training job, resolved."""

    config: Mapping[str, Any]
    """The model's config.json."""
    modules: str = ""
    """Whose modules run, where they are not transformers' (`litgpt`, `torchtune-0.4`)."""
    task: str
    method: Literal["full", "partial", "adapter"]
    last_layers: int = 0
    """``partial``: how many of the last blocks are trained."""
    adapter: AdapterSpec | None = None
    weights: Format
    """Storage of the base weights."""
    base_dtype: str
    """Dtype of what a quantised format leaves alone, before k-bit preparation."""
    compute_dtype: str
    """What quantised weights are expanded to."""
    prepare_kbit: bool = False
    trainable_dtype: str | None = None
    """What the trainer casts every trainable parameter to; None: nothing."""
    environment: Environment
    micro: int
    """Sequences per GPU per forward pass."""
    seq_len: int
    """Tokens per sequence."""
    accumulation: int
    """Micro batches per optimizer step."""
    images: int = 0
    """Images per sequence; their tokens are part of ``seq_len``."""
    image_tokens: int = 0
    """Tokens of one image where the model takes any resolution."""
    eval_micro: int = 0
    """Sequences per GPU in evaluation; 0: it is not sized."""
    checkpoint_every: int = 0
    """Recompute every n-th block; 0: none."""
    loss_chunk: int = 0
    """Tokens per chunk of a chunked loss."""
    optimizer: OptimizerSpec
    main_weights: bool = False
    """An fp32 copy of each 2-byte trainable parameter, and an fp32 gradient."""
    sharding: ShardingSpec = ShardingSpec()
    labels: int = 2
    """``classify``: how many labels there are."""
    reference: Literal["none", "adapter", "model", "precomputed"] = "none"
    """Preference and RL tasks: where the reference's log-probabilities come from."""
    completion_tokens: int = 0
    """Reinforcement finetuning: tokens of a sequence that the loss looks at; 0: all."""
    teacher: Mapping[str, Any] | None = None
    """Distillation: the config.json of the teacher."""
    generates: bool = False
    """The model that is trained also generates the completions, all of a step at once."""
    sampler_bytes: int = 0
    """What a sampler that shares the GPU reserves."""
