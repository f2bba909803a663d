"""Stack profiles: what each trainer does that a plan does not say, read from its source.

A profile says which operations run and in which dtypes; it never multiplies a sum. Each value of
``data/stacks.json`` stands there with the repository, path and version where it was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any, Literal

from ftplan.catalog.shelf import read_data
from ftplan.dataclass import dataclass
from ftplan.errors import UnknownNameError, UnsupportedError

__all__ = [
    "PLANNED",
    "RINGS",
    "Stack",
    "StackRow",
    "find_stack",
    "is_stack",
    "stack_names",
    "stack_page",
]

UNMODELLED = {"mlx": "training with MLX on Apple silicon (unified memory, no CUDA allocator)"}
"""Stacks that are recognised and refused, and what is not modelled."""

OWN_MODULES = frozenset(
    {"torchtune", "litgpt", "nemo", "megatron", "unsloth", "torchtitan", "torchtitan-2024"}
)
"""Stacks that run their own model code, which the walk was not held against."""

RINGS = ("transformers", "trl", "pytorch")
"""Stacks whose context parallelism is PyTorch's ring attention, by way of accelerate."""

PLANNED = ("transformers", "trl", "axolotl", "llamafactory", "ms-swift")
"""Stacks whose tensor parallelism is transformers', by the plan of the model's own class."""

ALIASES = {
    "hf": "transformers",
    "trainer": "transformers",
    "torch": "pytorch",
    "llama-factory": "llamafactory",
    "lit-gpt": "litgpt",
    "swift": "ms-swift",
    "automodel": "nemo",
    "nemo-automodel": "nemo",
    "megatron-lm": "megatron",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """One trainer's defaults, as far as they move memory. ``None``: it has none of its own."""

    name: str
    """Name in a plan (`trl`)."""
    title: str
    """Name for people."""
    versions: str
    """The versions that were read."""
    adapter_dtype: Literal["fp32", "bf16"]
    """Storage of adapters on a base that is not quantised."""
    adapter_dtype_quantized: Literal["fp32", "bf16"]
    """Storage of adapters on a quantised base."""
    trainable_dtype: Literal["fp32"] | None
    """What every trainable parameter is cast to; None: the dtype it was loaded in."""
    whole_in_fp32: tuple[Literal["norms", "embeddings"], ...] = ()
    """What is cast to fp32 of a model that is trained whole, unless flash attention, FSDP or cut
    cross-entropy casts it back."""
    main_weights: bool
    """An fp32 copy and an fp32 gradient beside each trainable 2-byte parameter (18 bytes)."""
    prepare_kbit: bool
    """Whether what is not quantised ends up in fp32 (`prepare_model_for_kbit_training`)."""
    quantized_bf16_tasks: tuple[str, ...] = ()
    """Tasks whose trainer casts the adapters of a quantised model to bf16."""
    prepare_kbit_tasks: tuple[str, ...] = ()
    """Tasks for which it does, where it does not for the others."""
    kbit_casts_back: tuple[str, ...] = ()
    """Tasks for which embeddings and head go back to bf16 after that."""
    dropout_off: tuple[str, ...] = ()
    """Tasks for which the trainer sets every dropout of model and adapters to zero."""
    weights_dtype: Literal["checkpoint", "fp32", "bf16"]
    """Dtype the base weights are loaded in; `checkpoint`: the one they are stored in."""
    mixed: Literal["no", "bf16"]
    """Autocast when nothing is said."""
    optimizer: str
    """Optimizer when nothing is said, a name of the optimizer catalogue."""
    checkpointing: Literal["none", "full", "selective", "offload"]
    """Gradient checkpointing when nothing is said."""
    checkpointing_sharded: Literal["none", "full"] | None
    """The same on more than one GPU, where it differs."""
    reentrant: bool
    """Whether checkpointing is PyTorch's reentrant implementation."""
    asks_at_blocks: bool = False
    """Whether only blocks that train are checkpointed, the first of which asks for its input's
    gradient; else the embedding's output asks."""
    reentrant_but_for: tuple[str, ...] = ()
    """Tasks and model types for which it is the other implementation."""
    reentrant_adapted: tuple[str, ...] = ()
    """Sharding under which that of a model with adapters is reentrant, whatever is asked for."""
    loss: Literal["full", "chunked", "fused"]
    """How the loss meets the logits."""
    loss_chunk: int | None
    """`chunked`: tokens per chunk."""
    loss_chunks: int | None
    """`chunked` by number instead: the tokens are split into this many chunks."""
    loss_keeps_chunks: bool
    """Whether autograd keeps every chunk until backward: no saving but the single allocation."""
    casts_products: bool = False
    """Whether its Liger is one whose fused loss adds to a 2-byte gradient of the head by way of
    fp32."""
    loss_compiled: bool = False
    """Whether a chunked loss takes logits that are whole, and is compiled."""
    loss_methods: tuple[str, ...] | None
    """Methods for which ``loss`` holds (else `full`); None: all."""
    loss_tasks: tuple[str, ...] | None
    """Tasks for which ``loss`` holds (else `full`); None: all."""
    loss_upcasts: bool
    """Whether the loss casts logits to fp32."""
    loss_shifts: Literal["labels", "logits"] = "labels"
    """What the loss moves by one token; moving the logits copies them."""
    logits_cast: Literal["loss", "model"] = "loss"
    """Who casts logits to fp32: a model that does so has let go of the first copy."""
    loss_twice: bool = False
    """Whether the trainer takes the loss out of the logits itself, beside the model's own one."""
    leaves_cache_on: bool = False
    """Whether every layer copies keys and values into a cache, unless it is checkpointed."""
    loss_outside: bool = False
    """Whether the loop takes the loss out of what the model has returned."""
    caching_models: tuple[str, ...] = ()
    """Model types that fill a key-value cache in training, even when they are checkpointed."""
    repeating_attention: tuple[str, ...] = ()
    """Attention implementations, or model types under flash, that copy keys and values to all
    query heads."""
    separate_experts: bool = False
    """Whether experts are linear layers of their own, which quantisation takes."""
    fused_lora: bool = False
    """Whether LoRA's projections run as autograd functions when nothing is said."""
    uncast_losses: tuple[str, ...] = ()
    """Model types whose own loss does not cast logits to fp32."""
    log_probs: Literal["rows", "whole", "kernel", "copied"] = "rows"
    """How a preference task takes log-probabilities out of logits: a sequence at a time, all at
    once, or in a kernel that keeps the logits alone, or a copy of them without the last token's."""
    rolled_labels: tuple[str, ...] = ()
    """Preference tasks that move labels by one token, instead of cutting the last one's logits."""
    logit_metrics: Literal["none", "returned", "measured"] = "none"
    """What a preference task does with logits for its metrics: nothing, KTO's forward returns them
    by label, or they are copied once the loss is there."""
    references_frozen: bool = True
    """Whether a reference's weights ask for no gradient; else autocast keeps their casts."""
    fp32_references: tuple[str, ...] = ()
    """Tasks whose reference is loaded in fp32, whatever the policy is stored in."""
    pairs_joined: bool = False
    """Whether both of a reward model's pair are one row, a mask between them."""
    reward_head: Literal["score", "value"] = "score"
    """A reward model's head: in place of the language model's, or beside it, and both run."""
    outputs_to_fp32: bool
    """Whether mixed precision also casts the returned logits to fp32 (accelerate)."""
    without_autocast: tuple[str, ...] = ()
    """Tasks whose chunked loss goes around the forward that autocast encloses."""
    fetches_ahead: bool = False
    """Whether all micro batches of a step are on the GPU before the first one's forward."""
    keeps_outputs: bool
    """Whether the model's outputs stay alive until backward has ended."""
    attention: Literal["eager", "sdpa", "flash"]
    """Attention when nothing is said."""
    kernels: Literal["none", "liger", "unsloth", "foak", "automodel"]
    """Fused kernels when nothing is said."""
    rank: int
    """Adapter rank of the trainer's own configuration."""
    targets: tuple[str, ...] | str
    """Adapter targets of the trainer's own configuration."""
    dropout: float
    """Adapter dropout of the trainer's own configuration."""
    base_of_checkpoint: bool = False
    """Whether what quantisation leaves alone stays in the checkpoint's dtype, whatever products
    are computed in."""
    double_quant: bool
    """Whether NF4's block scales are quantised when nothing is said."""
    micro: int
    """Micro batch when nothing is said."""
    seq_len: int
    """Sequence length in tokens when nothing is said."""
    packing: bool
    """Whether samples are joined when nothing is said."""
    padding: Literal["none", "right"]
    """Whether a padding mask reaches attention in a batch of samples of full length."""
    pad_rule: str
    """To what length a batch is padded."""
    modules: str | None = None
    """Model code of its own that is walked, and of which time; None: transformers' is."""
    keeps_gradients: bool = False
    """Whether gradients are set to zero and stay, instead of going, when a step begins."""
    sharding: Literal["fsdp"] | None = None
    """What the model is sharded by when nothing is said, on one GPU too."""
    sequence_parallel: bool = False
    """Whether tensor parallel ranks share the tokens of norms and residuals when nothing is said.
    """
    early_stop: bool = True
    """Whether a checkpointed block that runs again stops when the last saved tensor is there."""
    param_dtype: Literal["bf16"] | None = None
    """What FSDP's policy gathers weights in; None: what mixed precision computes in."""
    reduce_dtype: Literal["fp32"] | None = None
    """What it reduces gradients in."""
    no_sync: bool = False
    """Whether FSDP reduces gradients with the last micro batch alone; whole ones until then."""
    apart: tuple[Literal["embeddings", "head", "adapters", "untied"], ...] = ()
    """What FSDP2 wraps apart from blocks: embeddings, the final norm with the head, adapters."""
    reshard_root: bool = False
    """Whether FSDP2 frees what belongs to no unit between forward and backward."""
    holds_4bit_inputs: bool = False
    """Whether bitsandbytes' 4-bit product holds its input, out of a checkpoint's sight (< 0.44)."""
    asks_input_grads: bool = False
    """Whether inputs of an adapted model ask for gradients even where nothing is checkpointed."""
    dora_names_identity: bool = False
    """Whether DoRA's forward names the identity matrix until it returns (peft before 0.19)."""
    unpacks_gptq: bool = False
    """Whether GPTQ weights are unpacked by elementwise steps and kept for backward (auto_gptq)."""
    lengths: Literal["fixed", "varied"] = "fixed"
    """Whether batches differ in length when nothing is said."""
    loss_columns: int | None = None
    """`chunked`: columns of the vocabulary that are met at a time; None: all."""
    text_class: bool = False
    """Whether a model is loaded by `AutoModelForCausalLM`, which leaves the tower of some
    vision-language models out."""
    readings_above: float = 0.0
    """By what share of all published readings lie above the walk, nobody knows why."""
    notes: tuple[str, ...]
    """What no field can say, and what differs between versions."""
    sources: Mapping[str, str]
    """Per field: repository, path and version where its value was read."""

    @property
    def own_modules(self) -> bool:
        """It runs its own model code instead of transformers'."""
        return self.name in OWN_MODULES or self.modules is not None

    def chunk_tokens(self, tokens: int) -> int | None:
        """Tokens of one chunk of the loss when ``tokens`` go through it; None: not chunked."""
        if self.loss_chunks is not None:
            return -(-tokens // self.loss_chunks)
        return self.loss_chunk

    def of_task(self, task: str) -> Stack:
        """The profile as it is for one task."""
        two_bytes = task in self.quantized_bf16_tasks
        return replace(
            self,
            prepare_kbit=self.prepare_kbit or task in self.prepare_kbit_tasks,
            adapter_dtype_quantized="bf16" if two_bytes else self.adapter_dtype_quantized,
        )

    def reenters(self, task: str, model_type: str = "") -> bool:
        """Whether checkpointing is the reentrant implementation for this task and model."""
        return self.reentrant == {task, model_type}.isdisjoint(self.reentrant_but_for)

    def loss_kind(self, *, method: str | None, task: str) -> Literal["full", "chunked", "fused"]:
        """How the loss meets the logits for this method (None: inference) and task."""
        if self.loss_methods is not None and method not in self.loss_methods:
            return "full"
        if self.loss_tasks is not None and task not in self.loss_tasks:
            return "full"
        return self.loss


@dataclass(frozen=True, slots=True, kw_only=True)
class StackRow:
    """One line of a profile's page."""

    key: str
    value: Any
    source: str


@cache
def _entries() -> Mapping[str, Mapping[str, Any]]:
    entries: Mapping[str, Mapping[str, Any]] = read_data("stacks.json")["stacks"]
    return entries


@cache
def _stack(name: str) -> Stack:
    entry = _entries()[name]
    rows = _rows(name)
    values = {key: _tuple(row["value"]) for key, row in rows.items()}
    return Stack(
        name=name,
        title=entry["title"],
        versions=entry["versions"],
        notes=tuple(entry["notes"]),
        sources={key: row["source"] for key, row in rows.items()},
        **values,
    )


def _rows(name: str) -> dict[str, Any]:
    """A profile may be like another one but for a few fields: an earlier version of it."""
    entry = _entries()[name]
    others = _rows(entry["like"]) if "like" in entry else {}
    return {**others, **entry["fields"]}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def stack_names() -> tuple[str, ...]:
    """Names of all profiles, in the order of the data file."""
    return tuple(_entries())


def is_stack(name: str) -> bool:
    """Whether ``name`` is a stack's, or an alias of one."""
    key = name.strip().lower().replace("_", "-")
    return ALIASES.get(key, key) in _entries()


def find_stack(name: str) -> Stack:
    """The profile called ``name`` (or an alias, in any case).

    Raises :class:`UnknownNameError` with the nearest names, and :class:`UnsupportedError` for a
    stack that is known but not modelled.
    """
    key = name.strip().lower().replace("_", "-")
    key = ALIASES.get(key, key)
    if key in UNMODELLED:
        raise UnsupportedError(UNMODELLED[key], remedy=f"name one of {', '.join(_entries())}")
    if key not in _entries():
        from difflib import get_close_matches  # worth its import only after a mistake

        raise UnknownNameError(
            "stack",
            name,
            suggestions=get_close_matches(key, list(_entries()), n=2),
            remedy=f"the stacks are {', '.join(_entries())}",
        )
    return _stack(key)


def stack_page(name: str) -> tuple[Stack, tuple[StackRow, ...]]:
    """What ``ftplan explain NAME`` prints for a stack: each value and where it comes from."""
    stack = find_stack(name)
    rows = [
        StackRow(key=field.name, value=getattr(stack, field.name), source=stack.sources[field.name])
        for field in fields(Stack)
        if field.name in stack.sources
    ]
    return stack, tuple(rows)
