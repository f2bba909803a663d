"""What a user writes: the plan of one job, as plain dataclasses.

A field that is ``None`` was not given. :func:`ftplan.defaults.complete` fills it from the stack's
own defaults and lists what it filled. These classes are the plan file's schema too: the reader
hands its mappings to pydantic, which knows them from here, and there is no second definition.

Bytes are integers (``512GiB`` is parsed before), dtypes and names are the strings of the
catalogues, degrees and counts are per job unless the name says otherwise.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar, Literal

from ftplan.dataclass import dataclass

__all__ = [
    "Batch",
    "Budget",
    "Checkpointing",
    "Hardware",
    "Loss",
    "Method",
    "Model",
    "OptimizerChoice",
    "Plan",
    "Precision",
    "Rollout",
    "Sharding",
]

_CONFIG: dict[str, Any] = {"extra": "forbid", "use_attribute_docstrings": True}

MethodKind = Literal[
    "full", "partial", "lora", "qlora", "dora", "ia3", "vera", "loha", "lokr", "oft", "boft",
    "ln_tuning", "prompt_tuning", "prefix_tuning", "p_tuning", "houlsby", "pfeiffer", "bitfit",
    "adalora", "miss", "c3a", "fourierft", "hra", "randlora", "road", "shira", "vblora", "delora",
    "pvera", "hira", "trainable_tokens", "beft", "gralora", "glora", "peanut", "psoft",
    "llama_adapter", "llama_adapter_v2",
]  # fmt: skip
Task = Literal[
    "serve", "sft", "pt", "rm", "dpo", "kto", "orpo", "ppo", "grpo", "distill", "classify", "embed"
]
ShardingKind = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp"]
Offload = Literal["none", "optimizer", "params", "activations", "nvme"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The model to finetune or serve: exactly one of ``name``, ``config``, ``params``."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG

    name: str | None = None
    """Catalogue name, alias or hub id (`llama-3.1-8b`)."""
    config: str | None = None
    """Path of a Hugging Face `config.json`, or of a folder that holds one."""
    params: int | None = None
    """Parameter count, when nothing else is known: the textbook's sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """Which parameters are trained, and through what."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG

    kind: MethodKind
    """`full`, `partial`, or the name of the adapter."""
    rank: int | None = None
    """Rank of the adapter's matrices."""
    alpha: int | None = None
    """LoRA's alpha. Moves no memory."""
    targets: tuple[str, ...] | str | None = None
    """Module names, one regular expression, `attention`, or `all-linear` (PEFT's rule)."""
    dropout: float | None = None
    """Dropout on the adapter's input."""
    adapter_dtype: str | None = None
    """Storage of the adapter's parameters: `fp32` or `bf16`."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules trained in full beside the adapter (`embed_tokens`, `lm_head`)."""
    rank_pattern: dict[str, int] | None = None
    """Ranks of single modules, by name or regular expression, as in PEFT."""
    layers_to_transform: tuple[int, ...] | None = None
    """Only these layer indices get an adapter."""
    target_parameters: tuple[str, ...] | None = None
    """Expert parameters that are no modules, adapted by name (PEFT's `target_parameters`)."""
    use_dora: bool | None = None
    """Weight-decomposed adapters; kind `dora` is `lora` with this."""
    fused_lora: bool | None = None
    """LoRA's projections run as autograd functions (axolotl's `lora_qkv_kernel` ...)."""
    use_rslora: bool | None = None
    """Rank-stabilised scaling. Moves no memory."""
    double_quant: bool | None = None
    """NF4's quantised block scales."""
    prepare_kbit: bool | None = None
    """`prepare_model_for_kbit_training`: what is not quantised is cast to fp32."""
    compute_dtype: str | None = None
    """What quantised weights are expanded to for a matmul."""
    last_layers: int | None = None
    """`partial`: train the last K blocks and nothing else."""
    trainable: int | None = None
    """`partial` of a bare parameter count: how many parameters are trained."""
    virtual_tokens: int | None = None
    """Prompt and prefix tuning: how many tokens are learned."""
    options: dict[str, int | str | bool | tuple[int | str, ...]] | None = None
    """Settings of the adapter's kind by PEFT's own names, as `{block_size: 64}` of c3a."""
    bottleneck: int | None = None
    """Houlsby and Pfeiffer adapters: width of the bottleneck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How numbers are stored and computed."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG

    weights: str | None = None
    """Storage of the base weights (`bf16`, `nf4`, ...)."""
    trained: Literal["fp32", "bf16", "fp16"] | None = None
    """Storage of whatever is trained, where that is cast once it is loaded."""
    norms: Literal["fp32"] | None = None
    """Storage of the weights of norms, where they are cast once they are loaded."""
    embeddings: Literal["fp32"] | None = None
    """Storage of word embeddings and output head, where they are cast once they are loaded."""
    mixed: Literal["no", "bf16", "fp16"] | None = None
    """Autocast."""
    kv_cache: str | None = None
    """Storage of the key-value cache when serving."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long the samples are that batches are made of: what is reserved depends on it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG

    kind: Literal["fixed", "varied"] = "varied"
    """`fixed`: every batch is `seq_len` long. `varied`: as long as its longest sample."""
    mean: float | None = None
    """Mean length in tokens; left out: every length up to `seq_len` is as likely."""
    deviation: float | None = None
    """Standard deviation in tokens."""
    shortest: int | None = None
    """Tokens of the shortest sample."""
    longer: Literal["drop", "cut"] | None = None
    """What happens to samples that are longer than `seq_len`; left out: `drop`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What goes through the model at once, on one GPU."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG

    micro: int | None = None
    """Sequences per GPU per forward pass. Serving: concurrent sequences."""
    seq_len: int | None = None
    """Tokens per sequence. Serving: the context held in the cache."""
    prompt_len: int | None = None
    """Serving: tokens of a prompt, the rest of `seq_len` is generated; left out: all of them."""
    accumulation: int | None = None
    """Micro batches per optimizer step."""
    padding: Literal["none", "right"] | None = None
    """`none`: no mask reaches attention."""
    packing: bool | None = None
    """Samples are joined so that every sequence is full."""
    lengths: Lengths | None = None
    """Lengths of samples: `fixed`, `varied`, or `{mean: 800, deviation: 600}`."""
    eval_micro: int | None = None
    """Sequences per GPU in evaluation; left out: evaluation is not sized."""
    images: int | None = None
    """Images per sequence, for vision-language models; crops of one count one by one."""
    image_size: tuple[int, ...] | None = None
    """Height and width of an image in pixels, for models that take any resolution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerChoice:
    """The optimizer: a name of the catalogue, and how it is run."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG

    name: str
    """A `optim` name of transformers (`adamw_torch_fused`) or an alias (`adamw`)."""
    implementation: Literal["fused", "foreach", "loop"] | None = None
    """How PyTorch runs it: decides the temporaries of the step."""
    momentum: float | None = None
    """SGD: above zero there is a momentum buffer."""
    state_dtype: str | None = None
    """Storage of the states where the optimizer lets you choose."""
    rank: int | None = None
    """GaLore, APOLLO: rank of the projection."""
    in_backward: bool | None = None
    """Step each parameter as its gradient arrives: no gradient is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointing:
    """Activation (gradient) checkpointing."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG

    kind: Literal["none", "full", "selective", "offload"] = "full"
    """`offload`: the boundaries wait in host memory."""
    every: int = 1
    """Checkpoint every n-th block."""
    reentrant: bool | None = None
    """PyTorch's older implementation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """How the loss meets the logits."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG

    kind: Literal["full", "chunked", "fused"] = "full"
    """`full`: all logits at once. `chunked`: some tokens at a time. `fused`: never whole."""
    chunk: int | None = None
    """Tokens per chunk."""
    by: Literal["liger", "unsloth", "cut", "foak"] | None = None
    """Whose function a `fused` loss is; `cut`: cut cross entropy (Apple's)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Where the job runs."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG

    gpu: str | None = None
    """Catalogue name (`a100-80gb`)."""
    count: int | None = None
    """GPUs per node."""
    nodes: int | None = None
    """Machines."""
    host_ram: int | None = None
    """Bytes of host memory per node (`512GiB`)."""
    reserved: int | None = None
    """Bytes that other processes hold on each GPU (`1.2GiB`)."""
    disk: int | None = None
    """Bytes of disk for checkpoints and offload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How the job is spread over GPUs, and what is moved off them."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG

    kind: ShardingKind | None = None
    """`none`, `ddp`, DeepSpeed's `zero1` to `zero3`, or PyTorch's `fsdp`."""
    version: Literal[1, 2] | None = None
    """FSDP's version."""
    wrap: Literal["block", "model"] | None = None
    """FSDP: what is one unit. None: what the stack wraps, which may be more than blocks."""
    apart: tuple[Literal["embeddings", "head", "output", "adapters", "untied"], ...] | None = None
    """FSDP2: what is a unit of its own beside the blocks: `embeddings`; `head`, which has the final
    norm too, and tied embeddings, and is not freed between forward and backward; `output`, the
    head's layer alone; `adapters`, each of LoRA's matrices by itself; `untied`, the embeddings and
    the head's layer where both are trained and share no weight."""
    param_dtype: str | None = None
    """FSDP: what is gathered and computed in."""
    reduce_dtype: str | None = None
    """FSDP: what gradients are reduced in."""
    reshard_after_forward: bool | None = None
    """FSDP: free the gathered weights between forward and backward."""
    reshard_root: bool | None = None
    """FSDP2: what belongs to no unit is freed between forward and backward too."""
    no_sync: bool | None = None
    """FSDP: reduce gradients with the last micro batch alone; until then each GPU holds all."""
    use_orig_params: bool | None = None
    """FSDP1: show the original parameters as views of the flat one. Moves no memory."""
    offload: Offload | None = None
    """What waits in host memory or on NVMe."""
    tp: int | None = None
    """Tensor parallel degree."""
    sequence_parallel: bool | None = None
    """Tensor parallel GPUs share the tokens of norms, residuals and dropout too."""
    etp: int | None = None
    """Megatron: tensor parallel degree of experts."""
    pp: int | None = None
    """Pipeline parallel degree."""
    schedule: Literal["gpipe", "1f1b", "interleaved"] | None = None
    """Pipeline: in what order micro batches run forward and backward."""
    virtual_stages: int | None = None
    """Pipeline: stages on each GPU (interleaved)."""
    cp: int | None = None
    """Context parallel degree."""
    ep: int | None = None
    """Expert parallel degree."""
    dp_replicate: int | None = None
    """Hybrid sharding: how many replicas of the sharded group."""
    bucket_elements: int | None = None
    """DeepSpeed: `reduce_bucket_size`. DDP counts bytes instead: `bucket_bytes`."""
    overlap_comm: bool | None = None
    """DeepSpeed: `overlap_comm`; ZeRO-1 and 2 then hold two buckets."""
    sub_group_elements: int | None = None
    """DeepSpeed ZeRO-3: `sub_group_size`, what is updated at once."""
    bucket_bytes: int | None = None
    """DDP: `bucket_cap_mb`, in bytes."""
    auto_buckets: bool | None = None
    """DeepSpeed under transformers: sizes called `auto` come from the hidden size (its square)."""
    prefetch_elements: int | None = None
    """DeepSpeed ZeRO-3: `stage3_prefetch_bucket_size`."""
    max_live_elements: int | None = None
    """DeepSpeed ZeRO-3: `stage3_max_live_parameters`."""
    persistence_elements: int | None = None
    """DeepSpeed ZeRO-3: `stage3_param_persistence_threshold`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Reinforcement finetuning: what is generated, and by whom."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG

    generations: int | None = None
    """Completions per prompt (GRPO's group)."""
    prompt_tokens: int | None = None
    """Longest prompt."""
    completion_tokens: int | None = None
    """Longest completion."""
    sampler: Literal["colocate", "server", "trainer"] | None = None
    """`colocate`: a vLLM engine shares the card and reserves `sampler_share` of it."""
    sampler_share: float | None = None
    """`vllm_gpu_memory_utilization`, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the answer is held against."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG

    headroom: float | None = None
    """Share of the card that must stay free (`5%`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One job. ``method`` None is inference."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG

    version: Literal[1] = 1
    """Version of this format."""
    model: Model
    """Which model."""
    stack: str | None = None
    """The trainer whose defaults and kernels hold (`transformers`, `trl`, `axolotl`, ...)."""
    task: Task | None = None
    """What is done with the model."""
    method: Method | None = None
    """How it is trained; left out: it is served."""
    precision: Precision = field(default_factory=Precision)
    """Number formats."""
    batch: Batch = field(default_factory=Batch)
    """Sizes of a step."""
    optimizer: OptimizerChoice | None = None
    """The optimizer."""
    gradient_checkpointing: Checkpointing | None = None
    """Recompute activations instead of keeping them."""
    attention: Literal["eager", "sdpa", "flash"] | None = None
    """Attention implementation."""
    loss: Loss | None = None
    """Loss implementation."""
    kernels: Literal["none", "liger", "unsloth", "foak", "automodel"] | None = None
    """Fused kernels that replace the model's own; `foak`: fms-acceleration's; `automodel`: NeMo
    AutoModel's model code."""
    hardware: Hardware = field(default_factory=Hardware)
    """GPUs and host."""
    sharding: Sharding = field(default_factory=Sharding)
    """Spread over GPUs."""
    reference: Literal["none", "adapter", "model", "precomputed"] | None = None
    """Preference and RL tasks: where the reference's log-probabilities come from."""
    rollout: Rollout | None = None
    """Reinforcement finetuning."""
    teacher: str | None = None
    """Distillation: catalogue name of a teacher that is resident."""
    budget: Budget = field(default_factory=Budget)
    """Headroom."""
