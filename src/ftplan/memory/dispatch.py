"""Expert parallelism: whole experts on each rank, and the tokens that travel to them.

Each rank has a share of every layer's experts. It sorts its (token, expert) pairs by expert, sends
each to the rank that has the expert in one all-to-all, runs its own experts on what it received
(one expert a row, weight one), and gets the results back in a second one, which it weights and
sums (transformers/distributed/expert_parallel.py 5.23, ``AllToAllEP``). Ranks that share a batch
(``tp_size == ep_size``) each take a slice of its tokens first and gather the sums.

How many rows a rank receives depends on the router. A balanced one, which auxiliary losses and
biases work towards, sends as many as it would keep; at worst every rank of the group sends every
token to this one, as often as it has experts for it.

axolotl's plugin leaves travelling to DeepEP (:class:`DeepEP`), whose kernels no trace can run: that
is read from its Python alone.
"""

from __future__ import annotations

from math import ceil, comb

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.experts import Experts, Routing, gather_rows, masked
from ftplan.memory.job import ShardingSpec
from ftplan.memory.nn import Network
from ftplan.memory.tape import PART, TOKENS, Grads, Size, Tensor

__all__ = ["AllToAll", "spread_experts"]


def spread_experts(network: Network, spec: ShardingSpec) -> None:
    """Leave each rank its experts, and a way to the others.

    Raises UnsupportedError for models without experts that transformers has a plan for, for
    degrees that do not divide them, and for what it cannot be combined with.
    """
    _refuse(spec)
    blocks = [block for stage in network.stages for block in stage.stack.kinds]
    modules = [module for block in blocks for _, module in block.named_modules()]
    mixtures = [module for module in modules if isinstance(module, Experts)]
    if not mixtures:
        raise UnsupportedError(
            "expert parallelism of a model without experts that transformers has a plan for",
            remedy="use sharding.kind: fsdp or zero3 without sharding.ep",
        )
    for experts in mixtures:
        _keep_share(experts, spec)


def _refuse(spec: ShardingSpec) -> None:
    """What expert parallelism is not run with (``DistributedConfig``, transformers 5.23)."""
    if spec.kind == "zero3":
        raise UnsupportedError(
            f"expert parallelism of {spec.ep} with zero3",
            remedy="use sharding: {kind: fsdp, version: 2}",
        )
    if spec.own_spread:
        return
    kind = "ddp" if spec.deep_ep else "none"
    name = "FSDP1" if spec.kind == "fsdp" and spec.version == 1 else spec.kind
    alone = spec.kind == kind and spec.world == max(spec.ep, spec.tp)
    if not alone and (spec.kind != "fsdp" or spec.version == 1 or spec.wrap == "model"):
        raise UnsupportedError(
            f"expert parallelism of {spec.ep} with {name} on {spec.world} GPUs",
            remedy=f"use sharding: {{kind: fsdp, version: 2, wrap: block}}, or kind: {kind} on as "
            f"many GPUs as there are expert ranks ({spec.ep})",
        )
    if spec.pp > 1:
        raise UnsupportedError(
            "expert parallelism in a pipeline",
            because="transformers refuses it",
            remedy="use the stack megatron, or sharding.pp: 1",
        )
    ranks = spec.world // spec.dp_replicate
    if spec.deep_ep and spec.tp > 1:
        raise UnsupportedError(
            "expert with tensor parallelism in axolotl", remedy="set tensor_parallel_size: 1"
        )
    if spec.ep % spec.tp or ranks % spec.ep:
        raise UnsupportedError(
            f"expert parallelism {spec.ep} with tensor parallelism {spec.tp} on {ranks} GPUs",
            remedy="make ep a multiple of tp and a divisor of the GPUs of a replica",
        )


def _keep_share(experts: Experts, spec: ShardingSpec) -> None:
    if experts.count % spec.ep:
        raise UnsupportedError(
            f"expert parallelism {spec.ep} of {experts.count} experts",
            remedy=f"use a degree that divides {experts.count}",
        )
    whole = experts.count
    experts.count //= spec.ep
    for parameter in experts.parameters.values():
        parameter.shape = (experts.count, *parameter.shape[1:])
        parameter.whole = parameter.shape
    experts.exchange = DeepEP(spec, whole) if spec.deep_ep else AllToAll(spec)


class AllToAll:
    """Dispatch, a rank's experts, combine."""

    masks = True

    def __init__(self, spec: ShardingSpec) -> None:
        self.ranks, self.adapts = spec.ep, spec.own_spread
        self.shares_batch = spec.shares_batch
        self.worst = spec.worst_routing

    def __call__(self, experts: Experts, x: Tensor, routing: Routing) -> Tensor:
        """``x`` (tokens x hidden) through the experts of all ranks: the same shape."""
        weights, top_k = routing.weights, routing.index.width
        own = x.rows
        if self.shares_batch and not ops.records(x):
            return self._on_all_tokens(experts, x, routing)
        if self.shares_batch:
            own = PART
            x, weights = slice_tokens(x), slice_tokens(weights)
        rows = own * top_k
        order = _index(x, rows, "sort order")
        tokens = self._dispatch(x, rows, self._received(experts, own, top_k))
        if self.shares_batch:
            del x
        routed = _one_each(tokens)
        made = experts.run(tokens, routed)
        total = _combine(made, order, weights, rows)
        return gather_tokens(total) if self.shares_batch else total

    def _on_all_tokens(self, experts: Experts, x: Tensor, routing: Routing) -> Tensor:
        """Without a graph nothing travels (``AllReduceEP``): a rank's experts see all tokens, what
        is another rank's is masked, and the sums are summed over ranks in place."""
        shape = routing.index.rows, routing.index.width
        index = x.tape.tensor(*shape, "int64", "experts of this rank")
        off = x.tape.tensor(*shape, "bool", "rows of other ranks")
        weights = masked(routing.weights, off)
        return experts.run(x, Routing(routing.logits, weights, index))

    def _received(self, experts: Experts, tokens: Size, top_k: int) -> Size:
        """Rows that this rank's experts run on."""
        if self.worst:
            return tokens * (self.ranks * min(top_k, experts.count))
        return tokens * top_k

    def _dispatch(self, x: Tensor, rows: Size, received: Size) -> Tensor:
        places = x.tape.tensor(rows, 1, "int64", "token order")
        sent = gather_rows(x, places, rows, x.width, "dispatched tokens")
        del places
        return exchange(sent, received, "received tokens")


class DeepEP:
    """The same through DeepEP: a token travels once to each rank that has an expert of its own.

    axolotl/integrations/expert_parallel/experts_fn.py 0.19, ``_deep_ep_forward`` with its default
    local kernel, ``grouped_mm``: rows for all of a received token's experts are run, those of other
    ranks with weight zero, so there are ``top_k`` for each token that arrived. In bf16 always.
    """

    masks, adapts = False, True

    def __init__(self, spec: ShardingSpec, whole: int) -> None:
        self.ranks = spec.ep
        self.whole = whole
        self.worst = spec.worst_routing

    def __call__(self, experts: Experts, x: Tensor, routing: Routing) -> Tensor:
        """``x`` (tokens x hidden) through the experts of all ranks: the same shape."""
        tape, top_k = x.tape, routing.index.width
        rows = x.rows * self._copies(experts.count, top_k)
        places = tape.tensor(x.rows, self.ranks, "int32", "dispatch layout")
        sources = tape.tensor(rows, 1, "int32", "dispatch layout")
        handle = [tape.hold(places), tape.hold(sources)]  # both kernels' functions name it
        tokens = exchange(ops.to(x, "bf16"), rows, "received tokens")
        weights = exchange(ops.to(routing.weights, "fp32"), rows, "received weights")
        here = tape.tensor(rows, top_k, "fp32", "rows of this rank")
        index = tape.tensor(rows, top_k, "int64", "experts of received rows")
        made = experts.run(tokens, Routing(index, ops.mul(weights, here), index))
        out = exchange(made, x.rows, "returned tokens")
        del handle
        return out

    def _copies(self, here: int, top_k: int) -> int:
        """Tokens received for each one sent, in whole numbers: of the group's ranks all that have
        one of their experts here, where experts are chosen evenly; at worst all."""
        if self.worst:
            return self.ranks
        elsewhere = comb(self.whole - here, top_k) / comb(self.whole, top_k)
        return ceil(self.ranks * (1 - elsewhere))


def _index(like: Tensor, rows: Size, name: str) -> Tensor:
    return like.tape.tensor(rows, 1, "int64", name)


def _one_each(tokens: Tensor) -> Routing:
    """Each received row is one expert's, with weight one."""
    index = _index(tokens, tokens.rows, "experts of received rows")
    weights = tokens.tape.tensor(tokens.rows, 1, tokens.dtype, "weights of one")
    return Routing(index, weights, index)


def exchange(x: Tensor, rows: Size, name: str) -> Tensor:
    """``all_to_all_single``: other rows of the same width; the way back is another one."""
    out = x.tape.tensor(rows, x.width, x.dtype, name)
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "all_to_all", [x], lambda grad: (make(grad),))
    return out


def _combine(made: Tensor, order: Tensor, weights: Tensor, rows: Size) -> Tensor:
    """Results back in the order of (token, expert) pairs, weighted, and summed for each token."""
    back = exchange(made, rows, "returned tokens")
    placed = _put(back, order)
    weighted = ops.mul(placed, ops.view(weights, rows, 1), "weighted experts")
    out = weighted.tape.tensor(weights.rows, weighted.width, weighted.dtype, "sum over experts")
    width = weighted.width  # the way back reads the gradient of a sum for each expert, uncopied
    ops.record([out], "sum", [weighted], lambda grad: (grad.alias(rows, width),))
    return out


def slice_tokens(x: Tensor) -> Tensor:
    """A copy of a rank's slice of what all have; the way back gathers the slices' gradients."""
    out = x.tape.tensor(PART, x.width, x.dtype, "slice of tokens")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "slice", [x], lambda grad: (make(grad),))
    return out


def gather_tokens(x: Tensor) -> Tensor:
    """Every rank's slice; the way back is a slice."""
    out = x.tape.tensor(TOKENS, x.width, x.dtype, "gathered tokens")
    ops.record([out], "gather", [x], lambda grad: (grad.alias(PART),))
    return out


def _put(x: Tensor, order: Tensor) -> Tensor:
    """``empty_like(x)[order] = x``: keeps the order; the way back picks the rows."""
    out = x.tape.tensor(x.rows, x.width, x.dtype, "rows in order")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    saved = order

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    ops.record([out], "index_put", [x], apply)
    return out
