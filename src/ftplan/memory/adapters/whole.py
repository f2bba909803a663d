"""Adapters that make a matrix as large as the layer's own in each forward.

Source: peft 0.21.2, ``tuners/{fourierft,hira,hra,shira,miss,trainable_tokens}/layer.py``.
"""

from __future__ import annotations

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.adapters.lora import Adapted, Named, learned
from ftplan.memory.adapters.lycoris import WholeUpdate
from ftplan.memory.adapters.products import leaf
from ftplan.memory.job import AdapterSpec
from ftplan.memory.nn import Embedding, Linear, Module
from ftplan.memory.tape import ONE, TOKENS, Grads, Size, Tape, Tensor

__all__ = [
    "FourierLinear", "HiraLinear", "HraLinear", "MissBatLinear", "ShiraLinear", "TokenHead",
    "TokenRows",
]  # fmt: skip


class FourierLinear(WholeUpdate):
    """A matrix of which a few frequencies are learned: a sparse spectrum, transformed back."""

    def __init__(self, base: Linear, spec: AdapterSpec, _rank: int) -> None:
        super().__init__(base, spec)
        count = int(spec.options.get("n_frequency", 1000))
        self.fourierft_spectrum = Named.of("fourierft_spectrum", (count,), spec.dtype)

    def update(self, tape: Tape) -> Tensor:
        spectrum = leaf(tape, self.fourierft_spectrum)
        rows, width = ONE * self.out_features, self.in_features

        def whole(times: int = 1) -> Tensor:
            return tape.tensor(rows, width * times, "fp32", "spectrum")

        with tape.no_grad():
            dense = whole()
            turned = whole(2)  # complex
            scaled = whole()
            del dense, turned
        out = scaled
        shape = spectrum.rows, spectrum.width, spectrum.dtype

        def apply(_grad: Tensor) -> Grads:
            scaled = whole()
            real = whole(2)
            del scaled
            turned = whole(2)
            del real
            made = tape.tensor(*shape, "gradient")
            del turned
            return (made,)

        ops.record([out], "inverse transform", [spectrum], apply)
        return out


class HiraLinear(Adapted):
    """The base's weight times a low-rank product, element by element."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int) -> None:
        super().__init__(base)
        self.hira_A = Named.of("hira_A", (rank, base.in_features), spec.dtype)
        self.hira_B = Named.of("hira_B", (base.out_features, rank), spec.dtype)
        self.dropout = spec.dropout

    def forward(self, x: Tensor) -> Tensor:
        tape = x.tape
        result = self.base_layer.forward(x)
        before = result.dtype
        down, up = leaf(tape, self.hira_A), leaf(tape, self.hira_B)
        product = ops.matmul(
            up, down, ONE * self.out_features, self.in_features, "product", inner=up.width
        )
        x = ops.to(x, down.dtype)
        weight = ops.mul(tape.leaf(self.base_layer.weight), product)
        update = ops.linear(ops.dropout(x, self.dropout), weight)
        return ops.to(ops.add(result, update), before)


class ShiraLinear(Adapted):
    """A copy of the weight, to which a sparse tensor is added.

    Derived, not traced: fake tensors have no sparse gradient. The sum of dense and sparse is made
    in the wider dtype (``add_out_dense_sparse_cuda``); its gradient is dense in the sparse
    tensor's dtype, of which ``sparse_mask`` takes the values.
    """

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int) -> None:
        super().__init__(base)
        self.count = rank * (base.in_features + base.out_features)
        if self.count > base.in_features * base.out_features:
            raise UnsupportedError(
                f"shira of rank {rank} on a layer of {base.in_features} x {base.out_features}",
                remedy="use a lower rank: PEFT refuses more numbers than the layer has",
            )
        self.shira_weight = Named.of("shira_weight", (self.count,), spec.dtype)
        self.shira_indices = Module()
        self.shira_indices.parameters["default"] = learned(
            "shira_indices", (2, self.count), "int32", trainable=False
        )

    def forward(self, x: Tensor) -> Tensor:
        bias = self.base_layer.bias
        weight = self._updated(x.tape)
        return ops.linear(x, weight, x.tape.leaf(bias) if bias else None)

    def _updated(self, tape: Tape) -> Tensor:
        sparse, dtype = leaf(tape, self.shira_weight), self.base_layer.weight.dtype
        rows, width, wide = ONE * self.out_features, self.in_features, sparse.dtype
        weight = tape.tensor(rows, width, dtype, "copied weight")
        indices = tape.tensor(ONE * 2, self.count, "int64", "indices")
        saved = (indices, ops.scale(sparse))
        with tape.no_grad():
            sums = [ops.to(weight, wide), tape.tensor(rows, width, wide, "sum")]
            del sums
        shape = sparse.rows, sparse.width, wide

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            dense = ops.to(grad, wide)
            flat = tape.tensor(ONE, shape[1], "int64", "places")
            made = tape.tensor(*shape, "gradient")
            del dense, flat
            return (made,)

        ops.record([weight], "sparse update", [sparse], apply)
        return weight


class HraLinear(Adapted):
    """The weight after ``r`` reflections, each of them a matrix of (in x in)."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int) -> None:
        super().__init__(base)
        self.rank = rank
        self.hra_u = Named.of("hra_u", (base.in_features, rank), spec.dtype)

    def forward(self, x: Tensor) -> Tensor:
        tape, before = x.tape, x.dtype
        width = self.in_features
        vectors = leaf(tape, self.hra_u)
        normed = ops.mul(vectors, ops.unary(_norms(vectors), "reciprocal", "output"))
        identity = tape.tensor(ONE * width, width, vectors.dtype, "identity")
        product = tape.tensor(ONE * width, width, vectors.dtype, "identity")
        for _ in range(self.rank):
            vector = ops.part(normed, 1)
            doubled = ops.scale(product)
            column = ops.matmul(doubled, vector, ONE * width, 1, inner=width)
            outer = ops.matmul(column, vector, ONE * width, width, inner=1)
            product = ops.add(product, outer)
            del outer
            del doubled, column, vector
        product = ops.matmul(identity, product, ONE * width, width, inner=width)
        del identity
        weight = ops.to(tape.leaf(self.base_layer.weight), product.dtype)
        weight = ops.matmul(weight, product, ONE * self.out_features, width, inner=width)
        bias = self.base_layer.bias
        result = ops.linear(ops.to(x, weight.dtype), weight, tape.leaf(bias) if bias else None)
        return ops.to(result, before)


def _norms(x: Tensor) -> Tensor:
    """A norm for each column."""
    out = x.tape.tensor(ONE, x.width, x.dtype, "norm")
    saved = x
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    ops.record([out], "norm", [x], apply)
    return out


class MissBatLinear(Adapted):
    """MiSS as it was first (``bat``): blocks of the weight times a block, added to the weight."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int) -> None:
        super().__init__(base)
        if base.in_features % rank or base.out_features % rank:
            raise UnsupportedError(
                f"miss (bat) of rank {rank} on a layer of {base.in_features} x {base.out_features}",
                remedy="use a rank that divides both; PEFT refuses it too",
            )
        shape = (base.out_features // rank, rank, rank)
        self.miss_block = Named.of("miss_block", shape, spec.dtype)
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        tape, before = x.tape, x.dtype
        block = leaf(tape, self.miss_block)
        rows, width, dtype = ONE * self.out_features, self.in_features, block.dtype
        copied = tape.tensor(rows, width, self.base_layer.weight.dtype, "copied weight")
        with tape.no_grad():
            blocks = ops.copy(ops.to(copied, dtype))
        product = ops.matmul(blocks, block, rows, width, inner=self.rank)
        del blocks
        update = ops.copy(ops.add(product, block))
        del product
        weight = ops.add(copied, update)
        del copied, update
        bias = self.base_layer.bias
        result = ops.linear(ops.to(x, weight.dtype), weight, tape.leaf(bias) if bias else None)
        return ops.to(result, before)


class TokenRows(Embedding):
    """A few rows of a table are learned: the table is copied with them in each forward."""

    def __init__(self, base: Embedding, spec: AdapterSpec) -> None:
        Module.__init__(self)
        self.base_layer = base
        width = base.weight.shape[1]
        object.__setattr__(self, "weight", base.weight)
        tokens = len(spec.options.get("token_indices", (0,)))
        self.trainable_tokens_delta = Named.of("delta", (tokens, width), spec.dtype)
        self.trainable_tokens_original = Module()
        self.trainable_tokens_original.parameters["default"] = learned(
            "original", (tokens, width), spec.dtype, trainable=False
        )

    def merged(self, tape: Tape) -> Tensor:
        """``index_copy``: the whole table anew; the gradient of all its rows gives those few."""
        count, width = self.weight.shape
        rows = ops.to(leaf(tape, self.trainable_tokens_delta), self.weight.dtype)
        out = tape.tensor(ONE * count, width, self.weight.dtype, "copied table")
        make = ops.like(rows.rows, rows.width, rows.dtype, rows.requires_grad)
        ops.record([out], "index_copy", [rows], lambda grad: (make(grad),))
        return out

    def forward(self, tape: Tape, rows: Size = TOKENS) -> Tensor:
        weight = self.merged(tape)  # alive until the call returns
        return ops.embedding(tape, weight, rows)


class TokenHead(Adapted):
    """The output head whose weight is a :class:`TokenRows`'s: it copies the table for itself."""

    def __init__(self, base: Linear, tokens: TokenRows) -> None:
        super().__init__(base)
        object.__setattr__(self, "tokens", tokens)
        self.tokens: TokenRows

    def forward(self, x: Tensor) -> Tensor:
        weight = self.tokens.merged(x.tape)  # alive until the call returns, cast or not
        return ops.linear(x, weight)
