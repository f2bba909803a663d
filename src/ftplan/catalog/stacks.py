"""Stack profiles: what each trainer does that a plan does not say, read from its source.

A profile says which operations run and in which dtypes; it never multiplies a sum. Each value of
``data/stacks.json`` stands there with the repository, path and version where it was read.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from ftplan.errors import UnknownNameError, UnsupportedError

__all__ = ["Stack", "StackRow", "find_stack", "is_stack", "stack_names", "stack_page"]

UNMODELLED = {"mlx": "training with MLX on Apple silicon (unified memory, no CUDA allocator)"}
"""Stacks that are recognised and refused, and what is not modelled."""

OWN_MODULES = frozenset({"torchtune", "litgpt", "nemo", "megatron", "unsloth"})
"""Stacks that run their own model code, which the walk was not held against."""

ALIASES = {
    "hf": "transformers",
    "trainer": "transformers",
    "torch": "pytorch",
    "llama-factory": "llamafactory",
    "lit-gpt": "litgpt",
    "swift": "ms-swift",
    "automodel": "nemo",
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
    main_weights: bool
    """An fp32 copy and an fp32 gradient beside each trainable 2-byte parameter (18 bytes)."""
    prepare_kbit: bool
    """Whether what is not quantised ends up in fp32 (`prepare_model_for_kbit_training`)."""
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
    loss: Literal["full", "chunked", "fused"]
    """How the loss meets the logits."""
    loss_chunk: int | None
    """`chunked`: tokens per chunk."""
    loss_chunks: int | None
    """`chunked` by number instead: the tokens are split into this many chunks."""
    loss_keeps_chunks: bool
    """Whether autograd keeps every chunk until backward: no saving but the single allocation."""
    loss_methods: tuple[str, ...] | None
    """Methods for which ``loss`` holds (else `full`); None: all."""
    loss_tasks: tuple[str, ...] | None
    """Tasks for which ``loss`` holds (else `full`); None: all."""
    loss_upcasts: bool
    """Whether the loss casts logits to fp32."""
    loss_shifts: Literal["labels", "logits"] = "labels"
    """What the loss moves by one token; moving the logits copies them."""
    uncast_losses: tuple[str, ...] = ()
    """Model types whose own loss does not cast logits to fp32."""
    outputs_to_fp32: bool
    """Whether mixed precision also casts the returned logits to fp32 (accelerate)."""
    keeps_outputs: bool
    """Whether the model's outputs stay alive until backward has ended."""
    attention: Literal["eager", "sdpa", "flash"]
    """Attention when nothing is said."""
    kernels: Literal["none", "liger", "unsloth"]
    """Fused kernels when nothing is said."""
    rank: int
    """Adapter rank of the trainer's own configuration."""
    targets: tuple[str, ...] | str
    """Adapter targets of the trainer's own configuration."""
    dropout: float
    """Adapter dropout of the trainer's own configuration."""
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
    loss_columns: int | None = None
    """`chunked`: columns of the vocabulary that are met at a time; None: all."""
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
def _stacks() -> dict[str, Stack]:
    path = files("ftplan.catalog").joinpath("data/stacks.json")
    raw = json.loads(path.read_text(encoding="utf-8"))["stacks"]
    return {name: _stack(name, entry, raw) for name, entry in raw.items()}


def _stack(name: str, entry: Mapping[str, Any], raw: Mapping[str, Any]) -> Stack:
    # a profile may be like another one but for a few fields: an earlier version of it
    rows = {**(raw[entry["like"]]["fields"] if "like" in entry else {}), **entry["fields"]}
    values = {key: _tuple(row["value"]) for key, row in rows.items()}
    return Stack(
        name=name,
        title=entry["title"],
        versions=entry["versions"],
        notes=tuple(entry["notes"]),
        sources={key: row["source"] for key, row in rows.items()},
        **values,
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def stack_names() -> tuple[str, ...]:
    """Names of all profiles, in the order of the data file."""
    return tuple(_stacks())


def is_stack(name: str) -> bool:
    """Whether ``name`` is a stack's, or an alias of one."""
    key = name.strip().lower().replace("_", "-")
    return ALIASES.get(key, key) in _stacks()


def find_stack(name: str) -> Stack:
    """The profile called ``name`` (or an alias, in any case).

    Raises :class:`UnknownNameError` with the nearest names, and :class:`UnsupportedError` for a
    stack that is known but not modelled.
    """
    key = name.strip().lower().replace("_", "-")
    key = ALIASES.get(key, key)
    if key in UNMODELLED:
        raise UnsupportedError(UNMODELLED[key], remedy=f"name one of {', '.join(_stacks())}")
    stack = _stacks().get(key)
    if stack is None:
        raise UnknownNameError(
            "stack",
            name,
            suggestions=difflib.get_close_matches(key, list(_stacks()), n=2),
            remedy=f"the stacks are {', '.join(_stacks())}",
        )
    return stack


def stack_page(name: str) -> tuple[Stack, tuple[StackRow, ...]]:
    """What ``ftplan explain NAME`` prints for a stack: each value and where it comes from."""
    stack = find_stack(name)
    rows = [
        StackRow(key=field.name, value=getattr(stack, field.name), source=stack.sources[field.name])
        for field in fields(Stack)
        if field.name in stack.sources
    ]
    return stack, tuple(rows)
