"""Tensor, context and expert parallelism: the shapes that one rank sees.

Each is a change of the model's shape, not a division of a sum. Tensor parallelism splits heads and
the inner width of the MLP and leaves the residual stream whole; Megatron splits the vocabulary
through the loss. Of transformers' plans only the heads are cut here, and the rest once the network
is built (:mod:`ftplan.memory.planned`). Expert parallelism splits the
experts, context parallelism the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftplan.errors import UnsupportedError
from ftplan.memory.families import build, complete
from ftplan.memory.families.defaults import ALIASES
from ftplan.memory.job import ShardingSpec
from ftplan.memory.nn import Linear, Module, Network
from ftplan.memory.planned import cuts_heads, plan_of

__all__ = ["cut_layers", "local_config", "local_seq_len", "refuse_whole_attention"]

BLOCK = 128
"""Megatron's make_vocab_size_divisible_by: each rank's share of the vocabulary is a multiple."""
_INNER = ("intermediate_size", "ffn_dim", "shared_expert_intermediate_size")
_LINEAR_HEADS = ("linear_num_key_heads", "linear_num_value_heads")
_HEADS = ("num_attention_heads", "num_key_value_heads", *_LINEAR_HEADS)
_KEYS = ("num_key_value_heads", "num_global_key_value_heads")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def local_seq_len(seq_len: int, spec: ShardingSpec) -> int:
    """Tokens of each sequence that one rank of a context-parallel group holds."""
    return -(-seq_len // spec.cp)


def local_config(config: Mapping[str, Any], spec: ShardingSpec) -> Mapping[str, Any]:
    """The shape of one rank's part. Raises UnsupportedError, by name, for what cannot be split."""
    if spec.pp > 1 and spec.kind in ("zero2", "zero3"):
        raise UnsupportedError(
            f"pipeline parallelism with {spec.kind}",
            because="DeepSpeed refuses it",
            remedy="use zero1, fsdp or ddp",
        )
    if spec.planned:
        return _local_heads(config, spec.tp) if cuts_heads(plan_of(config)) else config
    nested = config.get("text_config")
    if isinstance(nested, Mapping) and (spec.tp > 1 or (spec.ep > 1 and spec.megatron)):
        return {**config, "text_config": local_config(nested, spec)}
    local = dict(config)
    if spec.tp > 1:
        _split_heads(local, spec.tp)
        _split_widths(local, spec)
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


def _local_heads(config: Mapping[str, Any], tp: int) -> Mapping[str, Any]:
    """The shape with a rank's heads alone. The columns of keys are cut too: all of a head, or the
    forward fails (transformers 5.23, ``view(*input_shape, -1, head_dim)``, run)."""
    nested = config.get("text_config")
    if isinstance(nested, Mapping):
        return {**config, "text_config": _local_heads(nested, tp)}
    local = complete(config)
    for name in _KEYS:
        kv = local.get(name)
        if isinstance(kv, int) and kv % tp:
            raise UnsupportedError(
                f"tensor parallelism {tp} of {kv} key-value heads",
                remedy=f"use a degree that divides {kv}",
            )
    _split_heads(local, tp)
    if local.get(_KEYS[1]):
        local[_KEYS[1]] //= tp
    return local


def _split_heads(config: dict[str, Any], tp: int) -> None:
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or "hidden_size" not in config:
        raise UnsupportedError(f"tensor parallelism of {config.get('model_type')}")
    kv = config.get("num_key_value_heads") or heads
    if heads % tp:
        raise UnsupportedError(
            f"tensor parallelism {tp} of {heads} heads", remedy=f"use a degree that divides {heads}"
        )
    if "head_dim" not in ALIASES.get(
        config.get("model_type", ""), {}
    ):  # GLM-4.7 Flash: another one
        config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    config["num_attention_heads"] = heads // tp
    config["num_key_value_heads"] = max(1, kv // tp)


def _split_widths(config: dict[str, Any], spec: ShardingSpec) -> None:
    """The inner widths of the MLP and of experts; Megatron's linear attention too."""
    routed = any(isinstance(config.get(name), int) and config[name] > 1 for name in _EXPERTS)
    experts = "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
    for name in (*_INNER, "moe_intermediate_size"):
        if isinstance(config.get(name), int):
            degree = spec.expert_tp if routed and name == experts else spec.tp
            config[name] = -(-config[name] // degree)
    if spec.megatron:
        for name in _LINEAR_HEADS:
            if isinstance(config.get(name), int):
                config[name] = max(1, config[name] // spec.tp)


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
