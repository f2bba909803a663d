"""torchtitan's mixture of experts, which are all on a rank or spread over several.

Source: pytorch/torchtitan torchtitan/models/common (moe.py, token_dispatcher.py) and
torchtitan/ops/scatter_add.py, 0.3.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.experts import gather_rows, grouped_linear, masked, topk
from ftplan.memory.families.native.torchtitan_spread import send, send_back
from ftplan.memory.job import ShardingSpec
from ftplan.memory.nn import Linear, Module, activation
from ftplan.memory.tape import ONE, Grads, Size, Tensor

__all__ = ["MoE"]


class Router(Module):
    """``TokenChoiceTopKRouter``: the gate in fp32, scores of it, the chosen ones over their sum."""

    def __init__(self, config: Mapping[str, Any], count: int) -> None:
        super().__init__()
        self.gate = Linear(config["hidden_size"], count)
        self.top_k = config["num_experts_per_tok"]
        latent = config["model_type"].startswith("deepseek")
        self.scoring = "sigmoid" if config["model_type"] == "deepseek_v3" else "softmax"
        self.normalises = not latent or self.scoring == "sigmoid"
        groups = (config.get("n_group") or 1) if latent else 1
        self.groups = groups if groups > 1 else 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = ops.unary(self._gate(x), self.scoring, "output")
        choice = ops.shift(scores)  # by what balances the load, for the choice alone
        if self.groups:
            choice = self._limited(choice)
        index, values = _chosen(choice, self.top_k)
        weights = gather_rows(scores, index, scores.rows, self.top_k, "gather")
        weights = ops.scale(_normalised(weights) if self.normalises else weights)
        del choice, values
        return weights, index

    def _limited(self, scores: Tensor) -> Tensor:
        """Scores of the best groups of experts: those of two make a group's."""
        tape = scores.tape
        _, best = _chosen(ops.view(scores, scores.rows * self.groups, 1), 2)
        sums = tape.tensor(scores.rows, self.groups, scores.dtype, "sum")
        picked = _chosen(sums, self.groups // 2)
        mask = tape.tensor(scores.rows, self.groups, "bool", "groups left out")
        out = masked(scores, mask)
        del best, sums, picked
        return out

    def _gate(self, x: Tensor) -> Tensor:
        """Autocast to fp32; selective checkpointing passes this product over."""
        tape = x.tape
        selected, tape.selected = tape.selected, None
        weight = ops.to(tape.leaf(self.gate.weight), "fp32")
        out = ops.linear(ops.to(x, "fp32"), weight)
        tape.selected = selected
        return out


def _chosen(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``torch.topk``, whose outputs selective checkpointing keeps: indices and values."""
    tape = scores.tape
    if tape.selected is None:
        values, index = topk(scores, k)
        return index, values
    values = tape.kept(scores.rows, k, scores.dtype, "topk")
    return tape.kept(scores.rows, k, "int64", "topk indices"), values


def _normalised(x: Tensor) -> Tensor:
    """``x / (x.sum(-1) + 1e-20)``: keeps x and the sum."""
    tape = x.tape
    total = ops.shift(tape.tensor(x.rows, 1, x.dtype, "sum"))
    out = tape.tensor(x.rows, x.width, x.dtype, "div")
    saved = (x, total)
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    ops.record([out], "div", [x], apply)
    return out


class GroupedExperts(Module):
    """Three 3D weights; ``w2(silu(w1(x)) * w3(x))`` of rows sorted by expert, in bf16.

    ``across``: FSDP2 shards them by their second dimension, where there are more ranks than
    experts.
    """

    def __init__(self, hidden: int, inner: int, count: int, *, across: bool) -> None:
        super().__init__()
        self.count = count
        shapes = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
        for name, (rows, columns) in shapes.items():
            first = (rows, count) if across else (count, rows)
            weight = self.parameter(name, *first, columns)
            weight.expert, weight.crosswise = True, across
        self.features = {name: rows for name, (rows, _) in shapes.items()}

    def forward(self, x: Tensor) -> Tensor:
        offsets = x.tape.tensor(ONE, self.count, "int32", "expert offsets")
        h = activation(self._product(x, "w1", offsets), "silu")
        h = ops.mul(h, self._product(x, "w3", offsets))
        return ops.to(self._product(h, "w2", offsets), x.dtype)

    def _product(self, x: Tensor, name: str, offsets: Tensor) -> Tensor:
        parameter = self.parameters[name]
        weight = ops.to(x.tape.leaf(parameter), "bf16")
        return grouped_linear(ops.to(x, "bf16"), weight, offsets, self.features[name])


class MoE(Module):
    """Tokens are copied to their experts, come back weighted in fp32, and are added up."""

    def __init__(
        self, config: Mapping[str, Any], spec: ShardingSpec, shared: Module | None = None
    ) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
        count = config.get("n_routed_experts") or config["num_experts"]
        self.top_k, self.count, self.ranks = config["num_experts_per_tok"], count, spec.ep
        if count % spec.ep:
            raise UnsupportedError(
                f"expert parallelism {spec.ep} of {count} experts",
                remedy=f"use a degree that divides {count}",
            )
        self.router = Router(config, count)
        here = count // spec.ep
        ranks = spec.ranks_of(True) * spec.ep if spec.ep > 1 else spec.data_ranks
        self.experts = GroupedExperts(hidden, inner, here, across=ranks > count)
        self.shared = shared
        self.received = spec.ep * min(self.top_k, here) if spec.worst_routing else self.top_k
        """Rows that this rank's experts run on, for each token of its own."""

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router.forward(x)
        routed = x.tape.tensor(x.rows, self.count, "bool", "routing map")
        out = self._routed(x, weights, index)
        if self.shared is not None:
            out = ops.add(out, self.shared.forward(x))
        del routed
        return out

    def _routed(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """``RoutedExperts``: dispatch, experts, combine."""
        tape, rows = x.tape, x.rows * self.top_k
        tokens, weights = self._order(weights, rows)
        given, made, back = self._made(x, tokens, rows)
        zeros = tape.tensor(x.rows, x.width, x.dtype, "sum over experts")
        weighted = ops.to(ops.mul(ops.to(back, "fp32"), weights), back.dtype)
        del back
        out = _scatter_add(weighted, tokens, x.rows)
        del zeros, index, given, made
        return out

    def _made(self, x: Tensor, tokens: Tensor, rows: Size) -> tuple[Tensor, Tensor, Tensor]:
        """What this rank's experts are given and make, which keep their names, and what comes back
        to it: the same where all experts are here."""
        picked = gather_rows(x, tokens, rows, x.width)
        if self.ranks == 1:
            made = self.experts.forward(picked)
            return picked, made, made
        routed, order = send(picked, x.rows * self.received)
        del picked
        made = self.experts.forward(routed)
        return routed, made, send_back(made, order, rows)

    def _order(self, weights: Tensor, rows: Size) -> tuple[Tensor, Tensor]:
        """``_local_reorder``: which token each row of an expert is, and its weight."""
        tape = weights.tape
        order = tape.tensor(rows, 1, "int64", "sort order")
        weights = gather_rows(ops.view(weights, rows, 1), order, rows, 1)
        return tape.tensor(rows, 1, "int64", "token order"), weights


def _scatter_add(x: Tensor, index: Tensor, rows: Size) -> Tensor:
    """``deterministic_scatter_add``: a new tensor; the way back picks the rows again."""
    out = x.tape.tensor(rows, x.width, x.dtype, "scatter_add")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    saved = index

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    ops.record([out], "scatter_add", [x], apply)
    return out
