"""A job with every choice made: what the calculator is asked.

The front resolves names and defaults (:mod:`ftplan.front.resolve`); nothing in here is optional
unless ``None`` means "there is none".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any, Literal

from ftplan.dataclass import dataclass
from ftplan.dtypes import Format
from ftplan.memory.env import Environment
from ftplan.memory.images import Image
from ftplan.memory.optimizer import OptimizerSpec

if TYPE_CHECKING:
    from ftplan.memory.pipeline import PipelineStage

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
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the kind, by PEFT's names."""


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
    no_sync: bool = False
    """Gradients are reduced with the last micro batch alone."""
    wrap: Literal["block", "model"] = "block"
    apart: tuple[str, ...] = ()
    """FSDP2: what is a unit by itself beside blocks: `embeddings`, `head`, `output`, `adapters`."""
    reshard_root: bool = False
    """FSDP2: what belongs to no unit is freed between forward and backward too."""
    keeps_last: bool = False
    """FSDP2: the last block is not freed between forward and backward (NeMo AutoModel)."""
    adapters_apart: bool = True
    """FSDP1: adapters are units of their own (PEFT's wrapping policy, which Trainer asks for)."""
    offload: Literal["none", "optimizer", "params", "activations", "nvme"] = "none"
    tp: int = 1
    sequence_parallel: bool = False
    """Tensor parallel ranks share the tokens of norms, residuals and dropout too."""
    etp: int | None = None
    """Tensor parallel degree of experts; None: Megatron's default in ms-swift, 1, else `tp`."""
    megatron: bool = False
    """Megatron-Core's ways: the vocabulary is split too, gradients are summed in one fp32 buffer,
    and `zero1` is its distributed optimizer."""
    own_plan: bool = False
    """Tensor parallelism cuts what the trainer says, not what transformers' class plans."""
    pp: int = 1
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    virtual_stages: int = 1
    """Pipeline: stages on each rank."""
    cp: int = 1
    ep: int = 1
    """Ranks that each have a part of the experts."""
    deep_ep: bool = False
    """Tokens travel to their experts through DeepEP (axolotl)."""
    own_spread: bool = False
    """Experts are spread, put in pipelines and adapted by the stack's own code (NeMo AutoModel,
    torchtitan), which is walked as transformers' is."""
    worst_routing: bool = False
    """Expert parallelism: every rank sends this one all that its experts can take."""
    dp_replicate: int = 1
    bucket_elements: int = 500_000_000
    overlap_comm: bool = False
    sub_group_elements: int = 1_000_000_000
    prefetch_elements: int = 50_000_000
    max_live_elements: int = 1_000_000_000
    persistence_elements: int = 100_000

    @property
    def is_zero(self) -> bool:
        """DeepSpeed runs the step."""
        return self.kind.startswith("zero") and not self.megatron

    @property
    def planned(self) -> bool:
        """Tensor parallelism follows the plan of transformers' class."""
        return self.tp > 1 and not self.own_plan and not self.megatron

    @property
    def data_ranks(self) -> int:
        """Ranks that have the same part of the model; those of a sequence are among them."""
        return max(1, self.world // (self.tp * self.pp))

    @property
    def shard_ranks(self) -> int:
        """Over how many of them what is sharded is split."""
        return max(1, self.data_ranks // self.dp_replicate)

    @property
    def expert_tp(self) -> int:
        """Over how many ranks an expert's own matrices are cut."""
        return self.etp or (1 if self.megatron or self.ep > 1 else self.tp)

    @property
    def spread(self) -> bool:
        """Experts lie on ranks of their own, other than Megatron's."""
        return self.ep > 1 and not self.megatron

    @property
    def shares_batch(self) -> bool:
        """Ranks of an expert parallel group have one batch (transformers: ``tp_size`` above 1)."""
        return self.spread and not self.deep_ep and (self.kind == "none" or self.tp > 1)

    @property
    def token_parts(self) -> int:
        """Among how many ranks a micro batch's tokens are shared out, somewhere in the model."""
        if self.shares_batch:
            return self.tp if self.tp > 1 else self.ep
        return self.tp if self.sequence_parallel else 1

    def ranks_of(self, expert: bool) -> int:
        """Over how many ranks a parameter is sharded."""
        if not expert or self.ep == 1:
            return self.shard_ranks
        return max(1, self.expert_ranks // self.dp_replicate)

    @property
    def expert_ranks(self) -> int:
        """Ranks that have the same experts."""
        return max(1, self.world // (self.ep * self.expert_tp * self.pp))

    @property
    def communicators(self) -> int:
        """Groups of more than one rank that a step talks in: one, but for Megatron's.

        All ranks, and those of each degree; tensor and pipeline ranks together for the norm of
        gradients (megatron/core/parallel_state.py, ``initialize_model_parallel``).
        """
        if not self.megatron:
            return 1
        degrees = (self.world, self.tp, self.pp, self.ep, self.data_ranks, self.tp * self.pp)
        return max(1, sum(degree > 1 for degree in degrees))

    def optimizer_ranks(self, expert: bool) -> int:
        """Over how many ranks Megatron's distributed optimizer cuts a parameter's states."""
        if self.kind != "zero1":
            return 1
        return self.expert_ranks if expert else self.data_ranks


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
    kbit_casts_back: bool = False
    """After the preparation embeddings and head go back to the base's dtype; norms do not."""
    norms_in_fp32: bool = False
    """Norms of quantised weights are cast without any preparation."""
    separate_experts: bool = False
    """Experts are linear layers, which quantisation takes (transformers until 4.57)."""
    trainable_dtype: str | None = None
    """What the trainer casts every trainable parameter to; None: nothing."""
    asks_input_grads: bool = False
    """What the embedding returns asks for a gradient even where nothing is checkpointed."""
    loss_twice: bool = False
    """A language model's own loss is computed and left: the trainer takes one out of the logits."""
    loss_outside: bool = False
    """A language model's loss is the loop's own, of what the model has returned."""
    pairs_joined: bool = False
    """Both of a pair are one row: as many sequences as samples."""
    value_head: bool = False
    """A reward model's head lies beside the language model's, which runs too."""
    norm_dtype: str | None = None
    """What the trainer casts the weights of norms to; None: nothing."""
    embedding_dtype: str | None = None
    """What the trainer casts word embeddings and output head to; None: nothing."""
    environment: Environment
    micro: int
    """Sequences per GPU per forward pass."""
    seq_len: int
    """Tokens per sequence."""
    accumulation: int
    """Micro batches per optimizer step."""
    keeps_gradients: bool = False
    """Gradients of the step before are zeros that are added to, not gone."""
    fetches_ahead: bool = False
    """All of them are on the GPU before the first one's forward."""
    images: int = 0
    """Images per sequence; their tokens are part of ``seq_len``."""
    image: Image = Image()
    """What each of them becomes, where a model's images differ in size."""
    eval_micro: int = 0
    """Sequences per GPU in evaluation; 0: it is not sized."""
    checkpoint_every: int = 0
    """Recompute every n-th block; 0: none."""
    loss_chunk: int = 0
    """Tokens per chunk of a chunked loss; 0: by the loss's own rule."""
    card_bytes: int = 0
    """What the driver reports of the card; 0: no card is named."""
    optimizer: OptimizerSpec
    main_weights: bool = False
    """An fp32 copy of each 2-byte trainable parameter, and an fp32 gradient."""
    sharding: ShardingSpec = ShardingSpec()
    labels: int = 2
    """``classify``: how many labels there are."""
    reference: Literal["none", "adapter", "model", "precomputed"] = "none"
    """Preference and RL tasks: where the reference's log-probabilities come from."""
    reference_weights: Format | None = None
    """Storage of a reference that the trainer loads by itself; None: that of the policy's."""
    reference_frozen: bool = True
    """Its weights ask for no gradient: autocast keeps no cast of them."""
    completion_tokens: int = 0
    """Reinforcement finetuning: tokens of a sequence that the loss looks at; 0: all."""
    teacher: Mapping[str, Any] | None = None
    """Distillation: the config.json of the teacher."""
    generates: bool = False
    """The model that is trained also generates the completions, all of a step at once."""
    stage: PipelineStage | None = None
    """The rank of a pipeline that is sized; None: the model is whole."""
    sampler_bytes: int = 0
    """What a sampler that shares the GPU reserves."""

    @property
    def adds_up(self) -> bool:
        """A micro batch meets gradients that are there already."""
        return self.accumulation > 1 or self.keeps_gradients
