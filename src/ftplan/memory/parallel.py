"""Tensor, context and expert parallelism: the shapes that one rank sees.

Each is a change of the model's shape, not a division of a sum. Tensor parallelism splits heads and
the inner width of the MLP and leaves the residual stream whole (transformers' ``tp_plan``:
column-wise q, k, v, gate, up; row-wise o and down; each rank has rows of the table of embeddings
and columns of the head, whose logits are then gathered; Megatron splits the vocabulary through the
loss instead); expert parallelism splits the experts; context parallelism splits the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftplan.errors import UnsupportedError
from ftplan.memory.families import build
from ftplan.memory.job import ShardingSpec
from ftplan.memory.nn import Embedding, Linear, Module, Network
from ftplan.memory.ops import like, record
from ftplan.memory.tape import ONE, TOKENS, Grads, Size, Tape, Tensor

__all__ = [
    "cut_layers", "local_config", "local_seq_len", "refuse_whole_attention", "split_vocabulary",
]  # fmt: skip

BLOCK = 128
"""Megatron's make_vocab_size_divisible_by: each rank's share of the vocabulary is a multiple."""
_INNER = ("intermediate_size", "ffn_dim", "shared_expert_intermediate_size")
_LINEAR_HEADS = ("linear_num_key_heads", "linear_num_value_heads")
_HEADS = ("num_attention_heads", "num_key_value_heads", *_LINEAR_HEADS)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def local_seq_len(seq_len: int, spec: ShardingSpec) -> int:
    """Tokens of each sequence that one rank of a context-parallel group holds."""
    return -(-seq_len // spec.cp)


def local_config(config: Mapping[str, Any], spec: ShardingSpec) -> Mapping[str, Any]:
    """The shape of one rank's part. Raises UnsupportedError, by name, for what cannot be split."""
    if spec.pp > 1 and spec.kind in ("zero2", "zero3"):
        raise UnsupportedError(
            f"pipeline parallelism with {spec.kind}, which DeepSpeed refuses",
            remedy="use zero1, fsdp or ddp",
        )
    nested = config.get("text_config")
    if isinstance(nested, Mapping) and (spec.tp > 1 or (spec.ep > 1 and spec.megatron)):
        return {**config, "text_config": local_config(nested, spec)}
    local = dict(config)
    if spec.tp > 1:
        _split_heads(local, spec)
        if spec.megatron and isinstance(local.get("vocab_size"), int):
            local["vocab_size"] = -(-local["vocab_size"] // (BLOCK * spec.tp)) * BLOCK
    if spec.ep > 1 and spec.megatron:  # else the experts are spread once they are built
        _split_experts(local, spec.ep)
    return local


def grown(config: Mapping[str, Any], names: Sequence[str] = (*_HEADS, *_INNER)) -> dict[str, Any]:
    """The shape with twice of what tensor parallelism cuts: of all, or of the fields ``names``."""
    nested = config.get("text_config")
    if isinstance(nested, Mapping):
        return {**config, "text_config": grown(nested, names)}
    wider = {name: config[name] * 2 for name in names if isinstance(config.get(name), int)}
    return {**config, **wider}


def _split_heads(config: dict[str, Any], spec: ShardingSpec) -> None:
    tp = spec.tp
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or "hidden_size" not in config:
        raise UnsupportedError(f"tensor parallelism of {config.get('model_type')}")
    kv = config.get("num_key_value_heads") or heads
    if heads % tp:
        raise UnsupportedError(
            f"tensor parallelism {tp} of {heads} heads", remedy=f"use a degree that divides {heads}"
        )
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    config["num_attention_heads"] = heads // tp
    config["num_key_value_heads"] = max(1, kv // tp)
    routed = any(isinstance(config.get(name), int) and config[name] > 1 for name in _EXPERTS)
    experts = "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
    for name in (*_INNER, "moe_intermediate_size"):
        if isinstance(config.get(name), int):
            degree = spec.expert_tp if routed and name == experts else tp
            config[name] = -(-config[name] // degree)
    if spec.megatron:
        for name in _LINEAR_HEADS:
            if isinstance(config.get(name), int):
                config[name] = max(1, config[name] // tp)


def _split_experts(config: dict[str, Any], ep: int) -> None:
    for name in _EXPERTS:
        count = config.get(name)
        if isinstance(count, int) and count > 1:
            if count % ep:
                raise UnsupportedError(
                    f"expert parallelism {ep} of {count} experts",
                    remedy=f"use a degree that divides {count}",
                )
            config[name] = count // ep
            return
    raise UnsupportedError(f"expert parallelism of {config.get('model_type')}: it has no experts")


def cut_layers(
    network: Network, config: Mapping[str, Any], *names: str
) -> Iterator[tuple[Module, list[str], list[str]]]:
    """Each block with the paths of its linear layers that tensor parallelism cuts by columns, and
    by rows: what widens with heads and the MLP's width (or with the fields ``names``)."""
    wider = build(grown(config, names) if names else grown(config))
    for stage, other in zip(network.stages, wider.stages, strict=True):
        for block, twin in zip(stage.stack.kinds, other.stack.kinds, strict=False):
            twins = {p: m for p, m in twin.named_modules() if isinstance(m, Linear)}
            own = {p: m for p, m in block.named_modules() if p in twins and isinstance(m, Linear)}
            columns = [p for p, m in own.items() if m.out_features != twins[p].out_features]
            rows = [p for p, m in own.items() if m.in_features != twins[p].in_features]
            yield block, columns, rows


def refuse_whole_attention(network: Network, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError where no block's attention is cut with its heads."""
    if not any(rows for _, _, rows in cut_layers(network, config, *_HEADS)):
        raise UnsupportedError(
            f"tensor parallelism of {config.get('model_type')}",
            remedy="use sharding.kind: fsdp or zero3",
        )


def split_vocabulary(network: Network, tp: int) -> None:
    """Give each rank some rows of the table of embeddings and some columns of the output head.

    transformers/distributed/tensor_parallel.py 5.23, traced. ``embedding_rowwise``: the gradient
    is made for the whole table, of which a rank keeps a view of its rows.
    ``colwise_gather_output``: every rank has all logits, gathered into one buffer and copied from
    there into place.
    """
    for name in network.embedding_names:
        table = network.child(name)
        if isinstance(table, Embedding):
            _split_table(table, tp)
    head = network.children.get(network.head_name)
    if isinstance(head, Linear):
        _split_head(network, head, tp)


def _split_table(table: Embedding, tp: int) -> None:
    weight = table.weight
    count, width = weight.shape
    weight.shape = (-(-count // tp), width)

    def looked_up(tape: Tape, rows: Size = TOKENS) -> Tensor:
        leaf = tape.leaf(weight)
        out = tape.tensor(rows, width, leaf.dtype, "embedding")
        make = like(ONE * count, width, leaf.dtype, leaf.requires_grad)
        own = leaf.rows

        def apply(grad: Tensor) -> Grads:
            whole = make(grad)
            return (None if whole is None else whole.alias(own),)

        record([out], "embedding", [leaf], apply)
        return out

    table.forward = looked_up  # type: ignore[method-assign]


def _split_head(network: Network, head: Linear, tp: int) -> None:
    whole, inner = head.out_features, network.head
    for parameter in head.parameters.values():
        if parameter.shape[0] == whole:  # a tied table has been cut already
            parameter.shape = (-(-whole // tp), *parameter.shape[1:])

    def gathered(x: Tensor) -> Tensor:
        part = inner(x)
        tape, rows, width, dtype = part.tape, part.rows, part.width, part.dtype
        buffer = tape.tensor(rows, whole, dtype, "gathered logits")
        out = tape.tensor(rows, whole, dtype, "gathered logits")
        del buffer

        def apply(grad: Tensor) -> Grads:
            return (grad.tape.tensor(rows, width, dtype, "gradient"),)

        record([out], "gather", [part], apply)
        return out

    network.head = gathered  # type: ignore[method-assign]
