"""Tensor parallelism by the model's own plan, as transformers runs it (``tp_plan="auto"``).

A plan names modules of a block and how each is cut: ``colwise`` and ``rowwise`` leave features
split between two products; ``colwise_gather_output`` has every rank make its columns and then all
of them in one tensor (Phi-3's fused matrices, norms over all heads); ``rowwise_split_input`` takes
a rank's share of whole features. What a plan does not name is whole on every rank: of GPT-OSS, all
but the head. Heads are cut in the shape, which is what an attention counts them by
(:func:`ftplan.memory.parallel.local_config`); everything else here.

Source: transformers/distributed/tensor_parallel.py and mixin.py 5.23, traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ftplan.errors import UnsupportedError
from ftplan.memory.adapters.lora import Adapted
from ftplan.memory.experts import ExpertWeights
from ftplan.memory.families.plans import HEADS, PLANS, VERSION
from ftplan.memory.job import ShardingSpec
from ftplan.memory.nn import Embedding, Linear, Module, Network
from ftplan.memory.ops import like, record
from ftplan.memory.tape import ONE, TOKENS, Grads, Size, Tape, Tensor

__all__ = ["cuts_heads", "follow_plan", "plan_of", "refuse_adapters", "split_vocabulary"]

Plan = Mapping[str, str]
_ATTENTION = ("self_attn.", "attention.")
_HEAD = "lm_head"
_TABLE = "embed_tokens"


def plan_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Styles by path: those of a block, of tables and of the head. Empty where there are none."""
    kind = str(config.get("model_type"))
    text = config.get("text_config")
    inner = kind
    if isinstance(text, Mapping):
        inner = str(text.get("model_type") or f"{kind.removesuffix('_thinker')}_text")
    blocks = PLANS.get(inner) or PLANS.get(f"{inner}_text", {})
    table = {_TABLE: "embedding_rowwise"} if blocks else {}
    head = {_HEAD: "colwise_gather_output"} if kind in HEADS else {}
    return {**table, **blocks, **head}


def cuts_heads(plan: Plan) -> bool:
    """Whether each rank has some of attention's heads."""
    return any(s == "rowwise" and path.startswith(_ATTENTION) for path, s in plan.items())


def follow_plan(network: Network, config: Mapping[str, Any], spec: ShardingSpec) -> None:
    """Cut what the plan names, heads excepted, which the network was built with a share of.

    Raises UnsupportedError where the library itself refuses or fails.
    """
    plan = plan_of(config)
    head = network.children.get(network.head_name)
    head = head if isinstance(head, Linear) and network.head_name in plan else None
    if head is None:
        plan.pop(_HEAD, None)
    _refuse(network, config, plan, head)
    for name in network.embedding_names:
        table = network.child(name)
        if plan.get(name.rpartition(".")[2]) and isinstance(table, Embedding):
            _split_table(table, spec.tp)
    if head is not None:
        _split_head(network, head, spec.tp)
    for stage in network.stages:
        for block in stage.stack.kinds:
            _cut_block(dict(block.named_modules()), plan, spec)


def split_vocabulary(network: Network, tp: int) -> None:
    """Table and head where a trainer's own plan cuts them, as transformers' plans do."""
    for name in network.embedding_names:
        table = network.child(name)
        if isinstance(table, Embedding):
            _split_table(table, tp)
    head = network.children.get(network.head_name)
    if isinstance(head, Linear):
        _split_head(network, head, tp)


def _refuse(network: Network, config: Mapping[str, Any], plan: Plan, head: Linear | None) -> None:
    kind = config.get("model_type")
    if not plan:
        raise UnsupportedError(
            f"tensor parallelism of {kind}",
            because=f"transformers {VERSION} has no tp_plan for it and refuses",
            remedy="use sharding.kind: fsdp or zero3",
        )
    tables = [network.child(name) for name in network.embedding_names]
    tied = head is not None and any(getattr(t, "weight", None) is head.weight for t in tables)
    if tied and _TABLE not in plan:
        raise UnsupportedError(
            f"tensor parallelism of {kind}",
            because=f"transformers {VERSION} has a plan for the output head alone, which is tied "
            "to a table that is whole, and the forward fails",
            remedy="use sharding.kind: fsdp or zero3",
        )


def _split_table(table: Embedding, tp: int) -> None:
    """A rank has some rows; their gradient is a view of one that is made for the whole table."""
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
    """A rank has some columns; every rank has all logits."""
    whole, inner = head.out_features, network.head
    for parameter in head.parameters.values():
        if parameter.shape[0] == whole:  # a tied table has been cut already
            parameter.shape = (-(-whole // tp), *parameter.shape[1:])
    network.head = lambda x: _gathered_columns(inner(x), whole)  # type: ignore[method-assign]


def refuse_adapters(network: Network, config: Mapping[str, Any]) -> None:
    """PEFT 0.21 makes an adapter of a rank's shape; its forward runs where columns are cut alone.

    Elsewhere the product fails, of whole features with a rank's or the other way round (run).
    """
    plan = plan_of(config)
    blocks = [block for stage in network.stages for block in stage.stack.kinds]
    for root in (network, *blocks):
        for path, module in root.named_modules():
            style = plan.get(path, "colwise")
            if isinstance(module, Adapted) and style != "colwise":
                columns = dict.fromkeys(
                    name.rpartition(".")[2] for name, kind in plan.items() if kind == "colwise"
                )
                raise UnsupportedError(
                    f"an adapter on {path}, which tensor parallelism cuts as {style},",
                    because=f"in PEFT 0.21 on transformers {VERSION} its forward fails",
                    remedy=f"target what is cut by columns ({', '.join(columns) or 'nothing'}), or "
                    "use sharding.kind: fsdp",
                )


def _cut_block(modules: Mapping[str, Module], plan: Plan, spec: ShardingSpec) -> None:
    for path, style in plan.items():
        module = modules.get(path)
        if isinstance(module, ExpertWeights) and style == "moe_tp_experts" and spec.ep == 1:
            _cut_experts(module, spec.tp)
        elif isinstance(module, Linear) and style in _WHOLE_FEATURES:
            _WHOLE_FEATURES[style](module, spec.tp)
        elif isinstance(module, Linear) and not path.startswith(_ATTENTION):
            if style == "colwise":
                _cut_columns(module, spec.tp)
                module.out_features = module.weight.shape[0]
            elif style == "rowwise":
                _cut_rows(module, spec.tp)
                module.in_features = module.weight.shape[1]


def _cut_columns(linear: Linear, tp: int) -> None:
    for parameter in linear.parameters.values():
        parameter.shape = (-(-parameter.shape[0] // tp), *parameter.shape[1:])


def _cut_rows(linear: Linear, tp: int) -> None:
    out, width = linear.weight.shape
    linear.weight.shape = (out, -(-width // tp))


def _cut_experts(experts: ExpertWeights, tp: int) -> None:
    """Each rank has a share of the inner width of every expert (``packed_colwise``, ``rowwise``).

    A bias is not in any plan: it is whole.
    """
    whole, experts.inner = experts.inner, -(-experts.inner // tp)
    for name, inner_at in zip(experts.names, (2, 1) if experts.transposed else (1, 2), strict=True):
        parameter = experts.parameters[name]
        shape = list(parameter.shape)
        shape[inner_at] = shape[inner_at] // whole * experts.inner
        parameter.shape = tuple(shape)


def _gather_output(linear: Linear, tp: int) -> None:
    whole = linear.out_features
    _cut_columns(linear, tp)
    _become(linear, lambda inner, x: _gathered_columns(inner(x), whole))


def _split_input(linear: Linear, tp: int) -> None:
    _cut_rows(linear, tp)
    _become(linear, lambda inner, x: inner(_own_columns(x, tp)))


_WHOLE_FEATURES = {"colwise_gather_output": _gather_output, "rowwise_split_input": _split_input}


def _become(module: Linear, run: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
    """Run around the module's own forward: a class of its own, which copies of a block keep."""
    kind = type(module)

    def forward(self: Linear, x: Tensor) -> Tensor:
        return run(lambda held: kind.forward(self, held), x)

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def _gathered_columns(part: Tensor, whole: int) -> Tensor:
    """All columns on every rank: gathered into one buffer and copied from there into place."""
    tape, rows, width, dtype = part.tape, part.rows, part.width, part.dtype
    buffer = tape.tensor(rows, whole, dtype, "gathered columns")
    out = tape.tensor(rows, whole, dtype, "gathered columns")
    del buffer

    def apply(grad: Tensor) -> Grads:
        return (grad.tape.tensor(rows, width, dtype, "gradient"),)

    record([out], "gather", [part], apply)
    return out


def _own_columns(x: Tensor, tp: int) -> Tensor:
    """A rank's share of whole features: a copy, whose gradient is gathered from all ranks."""
    rows, width, dtype = x.rows, x.width, x.dtype
    out = x.tape.tensor(rows, -(-width // tp), dtype, "own columns")
    make = like(rows, width, dtype, x.requires_grad)

    def apply(grad: Tensor) -> Grads:
        buffer = grad.tape.tensor(rows, width, dtype, "gathered gradient")
        whole = make(grad)
        del buffer
        return (whole,)

    record([out], "split", [x], apply)
    return out
