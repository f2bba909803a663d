"""Adapters whose update is a product beside the base layer's, by thin or structured matrices.

Source: peft 0.21.2, ``tuners/{adalora,miss,c3a,randlora,road,vblora,delora,pvera}/layer.py``.
"""

from __future__ import annotations

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.adapters.lora import Adapted, Named, learned
from ftplan.memory.job import AdapterSpec
from ftplan.memory.nn import Linear, Module
from ftplan.memory.tape import ONE, Grads, Size, Tape, Tensor

__all__ = [
    "AdaLoraLinear", "Bank", "C3aLinear", "DeloraLinear", "MissLinear", "PveraLinear",
    "RandLoraLinear", "RandomBases", "RoadLinear", "VbLoraLinear",
]  # fmt: skip


def leaf(tape: Tape, holder: Named) -> Tensor:
    """The adapter's one parameter of that name, as an operand."""
    return tape.leaf(holder.parameters["default"])


class Beside(Adapted):
    """A linear layer with something added to its result; the sum returns to the input's dtype."""

    def __init__(self, base: Linear, spec: AdapterSpec) -> None:
        super().__init__(base)
        self.dropout = spec.dropout

    def forward(self, x: Tensor) -> Tensor:
        before = x.dtype
        result = self.base_layer.forward(x)
        return ops.to(ops.add(result, self.update(x)), before)

    def update(self, x: Tensor) -> Tensor:
        """What is added."""
        raise NotImplementedError


class AdaLoraLinear(Adapted):
    """``x (A E)^T B^T``: a product with singular values that are pruned as training goes on."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int) -> None:
        super().__init__(base)
        self.lora_A = Named.of("lora_A", (rank, base.in_features), spec.dtype)
        self.lora_E = Named.of("lora_E", (rank, 1), spec.dtype)
        self.lora_B = Named.of("lora_B", (base.out_features, rank), spec.dtype)
        # frozen, but cast together with what is trained, and PEFT 0.21 trains whatever it casts
        cast = base.weight.dtype in ("bf16", "fp16") and spec.dtype == "fp32"
        self.ranknum = Module()
        self.ranknum.parameters["default"] = learned("ranknum", (1,), spec.dtype, trainable=cast)
        self.dropout = spec.dropout

    def forward(self, x: Tensor) -> Tensor:
        tape = x.tape
        result = self.base_layer.forward(x)
        down, up = leaf(tape, self.lora_A), leaf(tape, self.lora_B)
        x = ops.to(x, down.dtype)
        weighted = ops.mul(down, leaf(tape, self.lora_E))
        thin = ops.linear(ops.dropout(x, self.dropout), weighted)
        scaled = ops.scale(ops.linear(thin, up))
        count = ops.scale(tape.leaf(self.ranknum.parameters["default"]))
        return ops.add_(result, _quotient(scaled, count))


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, where ``b`` is one number; its gradient takes four tensors as large as ``a``."""
    out = a.tape.tensor(a.rows, a.width, a.dtype, "div")
    saved = (a if b.requires_grad else None, b)
    shape = b.rows, b.width, b.dtype

    def apply(grad: Tensor) -> Grads:
        tape, (kept, _divisor) = grad.tape, saved
        made = tape.tensor(a_rows, a_width, a_dtype, "gradient")
        if kept is None:
            return made, None
        parts = [tape.tensor(a_rows, a_width, a_dtype, "quotient") for _ in range(4)]
        del parts[:3]
        return made, ops.fit(parts.pop(), *shape)

    a_rows, a_width, a_dtype = a.rows, a.width, a.dtype
    ops.record([out], "div", [a, b], apply)
    return out


class MissLinear(Beside):
    """Sums over groups of the input times a thin matrix; ``mini`` repeats a narrower one."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int) -> None:
        super().__init__(base, spec)
        self.rank = rank
        kind = spec.options.get("init_weights", True)
        width = int(spec.options.get("mini_r", 1)) if kind == "mini" else base.out_features
        self.mini = kind == "mini"
        if base.out_features % width:
            raise UnsupportedError(
                f"miss with mini_r {width} on a layer of {base.out_features} outputs",
                remedy="use options: {mini_r: N} with a divisor of it; PEFT refuses it too",
            )
        self.miss_block = Named.of("miss_block", (rank, width), spec.dtype)

    def update(self, x: Tensor) -> Tensor:
        tape = x.tape
        block = leaf(tape, self.miss_block)
        if self.mini:
            block = _repeated(block, self.out_features)
        x = ops.to(_padded(x, self.rank), block.dtype)
        return _times(_group_sums(ops.dropout(x, self.dropout), self.rank), block)


def _repeated(block: Tensor, width: int) -> Tensor:
    """``repeat(1, times)``: the way back sums."""
    out = block.tape.tensor(block.rows, width, block.dtype, "repeat")
    shape = block.rows, block.width, block.dtype
    make = ops.like(*shape, block.requires_grad)
    ops.record([out], "repeat", [block], lambda grad: (make(grad),))
    return out


def _padded(x: Tensor, group: int) -> Tensor:
    """Filled up with zeros to whole groups; the gradient is a part of what comes back."""
    if x.width % group == 0:
        return x
    out = x.tape.tensor(x.rows, x.width + group - x.width % group, x.dtype, "pad")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "pad", [x], lambda grad: (make(grad),))
    return out


def _group_sums(x: Tensor, rank: int) -> Tensor:
    """``reshape(.., in / r, r).sum(-2)``; the gradient is spread out in a copy."""
    out = x.tape.tensor(x.rows, rank, x.dtype, "group sums")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "sum", [x], lambda grad: (make(grad),))
    return out


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix``, the matrix stored as it is multiplied (in x out)."""
    turned = matrix.alias(ONE * matrix.width, matrix.rows[0])
    turned.requires_grad, turned.node = matrix.requires_grad, matrix.node
    turned.output_nr = matrix.output_nr
    return ops.linear(x, turned)


class C3aLinear(Adapted):
    """A block-circular convolution in fp32, by Fourier transforms of 8 bytes a number."""

    def __init__(self, base: Linear, spec: AdapterSpec, _rank: int) -> None:
        super().__init__(base)
        block = int(spec.options.get("block_size", 256))
        if base.in_features % block or base.out_features % block:
            raise UnsupportedError(
                f"c3a with a block size of {block} on a layer of {base.in_features} x "
                f"{base.out_features}",
                remedy="use options: {block_size: N} with a divisor of both; PEFT refuses it too",
            )
        shape = (base.out_features // block, base.in_features // block, block)
        self.c3a_kernel = Named.of("c3a_kernel", shape, "fp32")

    def forward(self, x: Tensor) -> Tensor:
        before = x.dtype
        result = self.base_layer.forward(x)
        x = ops.to(x, "fp32")
        x = ops.scale(_circular(x, leaf(x.tape, self.c3a_kernel), self.out_features))
        result = ops.add_(result, ops.to(x, result.dtype))
        return ops.to(result, before)


def _circular(x: Tensor, kernel: Tensor, out_features: int) -> Tensor:
    """``BlockCircularConvolution``: keeps its input; spectra are complex (8 bytes a number)."""
    tape, rows, width = x.tape, x.rows, x.width

    def spectrum(size: Size, across: int) -> Tensor:
        return tape.tensor(size, across * 2, "fp32", "spectrum")

    numbers = kernel.numel[0]

    def products(first: int, second: int) -> Tensor:
        """A transform, its product with the kernel's, and the transform back."""
        there, kernels = spectrum(rows, first), spectrum(ONE, numbers)
        product = spectrum(rows, second)
        del there, kernels
        return spectrum(rows, second) if product else product

    with tape.no_grad():
        out = products(width, out_features)
    out = out.alias(width=out_features)
    out.dtype = "fp32"
    saved, wants = (x, kernel), (x.requires_grad, kernel.requires_grad)
    shape = kernel.rows, kernel.width, kernel.dtype

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        there = spectrum(rows, out_features)
        kernels = spectrum(ONE, numbers)
        product = spectrum(rows, width)
        del kernels
        back = spectrum(rows, width)
        del product
        made = tape.tensor(rows, width, "fp32", "gradient") if wants[0] else None
        del back
        inputs, sums = spectrum(rows, width), spectrum(ONE, numbers)
        turned = spectrum(ONE, numbers)
        del inputs, sums, there
        learnt = tape.tensor(*shape, "gradient") if wants[1] else None
        del turned
        return made, learnt

    ops.record([out], "circular convolution", [x, kernel], apply)
    return out


class RandomBases(Module):
    """RandLoRA's random matrices, shared by all layers."""

    def __init__(self, in_features: int, out_features: int, rank: int, dtype: str) -> None:
        super().__init__()
        least, most = sorted((in_features, out_features))
        bases = -(-least // rank)
        self.randlora_A = learned("randlora_A", (rank, 1, least), dtype, trainable=False)
        self.randlora_B = learned("randlora_B", (most, bases, rank), dtype, trainable=False)


class RandLoraLinear(Beside):
    """A sum of random products of rank r, of which diagonal weights are learned: of full rank."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int, shared: RandomBases) -> None:
        super().__init__(base, spec)
        self.least = min(base.in_features, base.out_features)
        self.bases, self.rank = -(-self.least // rank), rank
        self.randlora_lambda = Named.of("randlora_lambda", (rank, self.bases), spec.dtype)
        self.randlora_gamma = Named.of("randlora_gamma", (self.bases, self.least), spec.dtype)
        object.__setattr__(self, "shared", shared)
        self.shared: RandomBases

    def update(self, x: Tensor) -> Tensor:
        tape = x.tape
        weighted = self._weighted(tape)
        most = max(self.in_features, self.out_features)
        flat = tape.leaf(self.shared.randlora_B).alias(ONE * most, self.rank * self.bases)
        x = ops.dropout(ops.to(x, weighted.dtype), self.dropout)
        if self.least == self.in_features:
            return ops.scale(ops.linear(ops.linear(x, weighted), flat))
        return ops.scale(_times(_times(x, flat), weighted))

    def _weighted(self, tape: Tape) -> Tensor:
        """``lambda * A * gamma``: r x bases x least, flattened; the way back sums over each."""
        scales, weights = leaf(tape, self.randlora_lambda), leaf(tape, self.randlora_gamma)
        rows, width = ONE * (self.rank * self.bases), self.least
        with tape.no_grad():
            first = tape.tensor(rows, width, scales.dtype, "weighted bases")
            out = tape.tensor(rows, width, scales.dtype, "weighted bases")
            del first
        shapes = [(t.rows, t.width, t.dtype) for t in (scales, weights)]

        def apply(grad: Tensor) -> Grads:
            made: list[Tensor] = []
            for shape in shapes:
                product = tape.tensor(rows, width, grad.dtype, "product")
                made.append(tape.tensor(*shape, "gradient"))
                del product
            return tuple(made)

        ops.record([out], "weighted bases", [scales, weights], apply)
        return out


class RoadLinear(Adapted):
    """Pairs of outputs are rotated and scaled."""

    def __init__(self, base: Linear, spec: AdapterSpec, _rank: int) -> None:
        super().__init__(base)
        times = {"road_1": 1, "road_2": 2, "road_4": 4}[str(spec.options.get("variant", "road_1"))]
        size = base.out_features * times // 2
        self.road_theta = Named.of("road_theta", (size,), spec.dtype)
        self.road_alpha = Named.of("road_alpha", (size,), spec.dtype)

    def forward(self, x: Tensor) -> Tensor:
        tape = x.tape
        result = self.base_layer.forward(x)
        before = result.dtype
        theta, alpha = leaf(tape, self.road_theta), leaf(tape, self.road_alpha)
        result = ops.to(result, theta.dtype)
        first = ops.mul(alpha, ops.unary(theta, "cos", "input"))
        second = ops.mul(alpha, ops.unary(theta, "sin", "input"))
        columns = [_columns(t, self.out_features) for t in (first, second)]
        half = ops.part(result, self.out_features // 2)
        other = ops.part(result, self.out_features // 2)
        turned = ops.cat((ops.neg(other), half))
        del half, other
        result = ops.add(ops.mul(result, columns[0]), ops.mul(turned, columns[1]))
        return ops.to(result, before)


def _columns(x: Tensor, width: int) -> Tensor:
    """A number for each output, each pair's twice."""
    out = x.tape.tensor(ONE, width, x.dtype, "columns")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "repeat", [x], lambda grad: (make(grad),))
    return out


class Bank(Module):
    """VB-LoRA's vectors, of which all layers are mixed."""

    def __init__(self, count: int, length: int, dtype: str) -> None:
        super().__init__()
        self.vblora_vector_bank = learned("vblora_vector_bank", (count, length), dtype)


class VbLoraLinear(Beside):
    """LoRA whose matrices are mixtures of the ``topk`` best vectors of a bank."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int, bank: Bank) -> None:
        super().__init__(base, spec)
        self.rank, self.topk = rank, int(spec.options.get("topk", 2))
        vectors, length = bank.vblora_vector_bank.shape
        if base.in_features % length or base.out_features % length:
            raise UnsupportedError(
                f"vblora with vectors of {length} on a layer of {base.in_features} x "
                f"{base.out_features}",
                remedy="use options: {vector_length: N} with a divisor of both; PEFT refuses it "
                "too",
            )
        self.pieces = (base.in_features // length, base.out_features // length)
        down, up = ((rank, count, vectors) for count in self.pieces)
        self.vblora_logits_A = Named.of("vblora_logits_A", down, spec.dtype)
        self.vblora_logits_B = Named.of("vblora_logits_B", up, spec.dtype)
        object.__setattr__(self, "bank", bank)
        self.bank: Bank

    def update(self, x: Tensor) -> Tensor:
        down = self._mixed(x.tape, self.vblora_logits_A, self.pieces[0])
        up = self._mixed(x.tape, self.vblora_logits_B, self.pieces[1])
        x = ops.to(x, down.dtype)
        up = ops.copy(up)  # turned
        return _times(
            ops.linear(ops.dropout(x, self.dropout), ops.view(down, ONE * self.rank, x.width)),
            ops.view(up, ONE * self.rank, self.out_features),
        )

    def _mixed(self, tape: Tape, holder: Named, pieces: int) -> Tensor:
        logits, bank = leaf(tape, holder), tape.leaf(self.bank.vblora_vector_bank)
        rows = ONE * (self.rank * pieces)
        values = tape.tensor(rows, self.topk, logits.dtype, "topk")
        index = tape.tensor(rows, self.topk, "int64", "topk indices")
        make = ops.like(logits.rows, logits.width, logits.dtype, True)
        ops.record([values], "topk", [logits], lambda grad: (make(grad),) if index else (None,))
        weights = ops.softmax(values)
        picked = ops.embedding(tape, bank, rows * self.topk)
        mixed = ops.mul(picked, ops.view(weights, rows * self.topk, 1))
        return _summed(mixed, rows, self.topk)


def _summed(x: Tensor, rows: Size, group: int) -> Tensor:
    """A sum over groups of rows; the way back is a copy for each."""
    assert x.rows == rows * group
    out = x.tape.tensor(rows, x.width, x.dtype, "sum")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "sum", [x], lambda grad: (make(grad),))
    return out


class DeloraLinear(Adapted):
    """LoRA with normed vectors and one learned strength."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int) -> None:
        super().__init__(base)
        self.delora_A = Named.of("delora_A", (rank, base.in_features), spec.dtype)
        self.delora_B = Named.of("delora_B", (base.out_features, rank), spec.dtype)
        self.delora_lambda = Named.of("delora_lambda", (1,), spec.dtype)
        self.delora_w_norm = Module()
        self.delora_w_norm.parameters["default"] = learned(
            "delora_w_norm", (base.in_features,), spec.dtype, trainable=False
        )

    def forward(self, x: Tensor) -> Tensor:
        tape, before = x.tape, x.dtype
        result = self.base_layer.forward(x)
        total = tape.tensor(result.rows, result.width, result.dtype, "zeros")
        norm = tape.leaf(self.delora_w_norm.parameters["default"])
        down, up = leaf(tape, self.delora_A), leaf(tape, self.delora_B)
        thin = ops.linear(ops.mul(x, norm), down)
        strength = _strength(down, up, leaf(tape, self.delora_lambda))
        thin = ops.linear(ops.mul(thin, strength), up)
        total = ops.add_(total, thin)
        return ops.to(ops.add(result, total), before)


def _strength(down: Tensor, up: Tensor, learnt: Tensor) -> Tensor:
    """``lambda / r / (|A| |B|)``: a number for each rank; the norms look at both matrices."""
    rank = down.rows[0]
    out = down.tape.tensor(ONE, rank, down.dtype, "strength")
    saved = (down, up)
    makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in (down, up, learnt)]

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return tuple(make(grad) for make in makers)

    ops.record([out], "strength", [down, up, learnt], apply)
    return out


class PveraLinear(Beside):
    """VeRA whose hidden numbers are drawn: half of them are means, half log-variances."""

    def __init__(self, base: Linear, spec: AdapterSpec, rank: int, shared: Module) -> None:
        super().__init__(base, spec)
        self.pvera_lambda_b = Named.of("pvera_lambda_b", (base.out_features,), spec.dtype)
        self.pvera_lambda_d = Named.of("pvera_lambda_d", (2 * rank,), spec.dtype)
        object.__setattr__(self, "shared", shared)
        self.shared: Module
        self.rank = rank

    def update(self, x: Tensor) -> Tensor:
        tape = x.tape
        d, b = leaf(tape, self.pvera_lambda_d), leaf(tape, self.pvera_lambda_b)
        down = tape.leaf(self.shared.parameters["pvera_A"]).alias(width=self.in_features)
        up = tape.leaf(self.shared.parameters["pvera_B"]).alias(rows=ONE * self.out_features)
        x = ops.to(x, d.dtype)
        both = ops.mul(d, ops.linear(ops.dropout(x, self.dropout), down))
        mean, spread = ops.split(both, (self.rank, self.rank))
        del both
        deviation = ops.unary(ops.scale(spread), "exp", "output")
        noise = tape.tensor(x.rows, self.rank, d.dtype, "noise")
        drawn = ops.add(mean, ops.mul(noise, deviation))
        return ops.mul(b, ops.linear(drawn, up))
