"""The operations of a network, each with its autograd contract.

An operation says three things: what it makes, what it keeps for backward, and what it needs for a
moment on either way. The kinds are few; the formulas follow PyTorch's
(tools/autograd/derivatives.yaml and torch/csrc/autograd/FunctionsManual.cpp):

    linear, matmul     keep the operand that the other one's gradient needs
    add, neg, scale    keep nothing                     mul       keeps the other factor
    unary              keeps its input or its output    to        keeps nothing, copies
    split, cat, view   share storage or copy            softmax   keeps its output
    layer_norm         keeps input, mean, rstd          dropout   keeps a one-byte mask
    sdpa               the attention kernels            embedding keeps its indices
    cross_entropy      keeps log-probabilities          gather .. keep indices
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from ftplan.memory.tape import (
    ONE,
    Grads,
    Kind,
    Node,
    Parameter,
    Size,
    Tape,
    Tensor,
    fit,
)

__all__ = [
    "add",
    "add_",
    "cat",
    "cross_entropy",
    "dropout",
    "embedding",
    "expand_heads",
    "fit",
    "layer_norm",
    "linear",
    "masked_fill",
    "matmul",
    "mean",
    "mean_square",
    "mul",
    "neg",
    "power",
    "scale",
    "softmax",
    "split",
    "to",
    "unary",
    "view",
    "where",
]

_RANK = {
    "bool": 0, "int8": 1, "int32": 2, "int64": 3, "fp8": 4, "bf16": 5, "fp16": 5, "fp32": 6,
    "fp64": 7,
}  # fmt: skip


def promote(*dtypes: str) -> str:
    """The dtype of an operation on tensors of several dtypes."""
    best = max(dtypes, key=_RANK.__getitem__)
    return "fp32" if {"bf16", "fp16"} <= set(dtypes) else best


def edge(tensor: Tensor) -> tuple[Node, int] | Parameter | None:
    """Where the gradient of ``tensor`` goes."""
    if not tensor.requires_grad or tensor.node is None:
        return None
    return tensor.node if isinstance(tensor.node, Parameter) else (tensor.node, tensor.output_nr)


def record(
    outputs: Sequence[Tensor], name: str, inputs: Sequence[Tensor], apply: Callable[..., Grads]
) -> None:
    """Make the outputs of an operation part of the graph, if anything asks for a gradient."""
    tape = outputs[0].tape
    if not tape.grad_enabled or not any(tensor.requires_grad for tensor in inputs):
        return
    node = Node(tape, name, [edge(tensor) for tensor in inputs], apply, len(outputs))
    node.shapes = tuple((tensor.rows, tensor.width, tensor.dtype) for tensor in inputs)
    if not tape.saves:
        node.apply, node.edges = None, ()
    if tape.rerun is not None:
        node.unpacks = tape.rerun.deferred
        tape.rerun.note(apply, outputs[0])
    for number, output in enumerate(outputs):
        output.requires_grad = True
        output.node = node
        output.output_nr = number


def records(*inputs: Tensor) -> bool:
    """Whether an operation on these inputs keeps anything."""
    return inputs[0].tape.grad_enabled and any(tensor.requires_grad for tensor in inputs)


def like(
    rows: Size, width: int, dtype: str, needed: bool, name: str = "gradient"
) -> Callable[[Tensor], Tensor | None]:
    """A maker of gradients for an input of this shape; it must not hold the input itself."""
    return lambda grad: grad.tape.tensor(rows, width, dtype, name) if needed else None


def view(x: Tensor, rows: Size, width: int) -> Tensor:
    """The same bytes in another shape."""
    out = x.alias(rows, width)
    old_rows, old_width = x.rows, x.width
    record([out], "view", [x], lambda grad: (grad.alias(old_rows, old_width),))
    return out


def to(x: Tensor, dtype: str) -> Tensor:
    """A cast: a copy when the dtype differs, else the tensor itself."""
    if x.dtype == dtype:
        return x
    out = x.tape.tensor(x.rows, x.width, dtype, "cast")
    source = x.dtype
    record([out], "to", [x], lambda grad: (_cast(grad, source),))
    return out


def _cast(grad: Tensor, dtype: str) -> Tensor:
    return grad.tape.tensor(grad.rows, grad.width, dtype, "gradient cast")


def copy(x: Tensor, name: str = "copy") -> Tensor:
    """``contiguous()`` or ``clone()`` where it has to copy."""
    out = x.tape.tensor(x.rows, x.width, x.dtype, name)
    record([out], name, [x], lambda grad: (grad,))
    return out


def autocast(x: Tensor) -> Tensor:
    """A matmul's operand under autocast. Casts of weights are cached until autocast ends.

    Only fp32 leaves that ask for a gradient are cached (aten/src/ATen/autocast_mode.cpp,
    ``cached_cast``).
    """
    tape = x.tape
    dtype = tape.env.autocast
    if dtype is None or x.dtype not in ("fp32", "bf16", "fp16") or x.dtype == dtype:
        return x
    if x.dtype == "fp32" and isinstance(x.node, Parameter) and x.storage is None:
        key = id(x.node)
        if key not in tape.weight_cache:
            tape.weight_cache[key] = to(x, dtype)
        return tape.weight_cache[key]
    return to(x, dtype)


def autocast_fp32(x: Tensor) -> Tensor:
    """An operand of an operation that autocast runs in fp32 (layer_norm, softmax, pow ...)."""
    return to(x, "fp32") if x.tape.env.autocast is not None and x.dtype != "fp64" else x


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, name: str = "linear", *,
    plain: bool = False,
) -> Tensor:  # fmt: skip
    """``x`` (rows x in) times a weight (out x in), plus a bias (out).

    ``plain``: written as a product, not as ``F.linear``, which a library may have replaced.
    """
    own = x.tape.own_linear and not plain
    # operands are cast from the last to the first, as compilers evaluate autocast's arguments
    bias = None if bias is None else autocast(bias)
    weight = autocast(weight)
    x = autocast(x)
    out_features = weight.rows[0]
    counted = x.tape.multiply(x.rows, x.width, out_features)
    make = x.tape.product if bias is None else x.tape.tensor
    out = make(x.rows, out_features, x.dtype, name)
    part = x if x.part is None else x.part  # of tokens that other ranks have too
    saved_x = part if records(x, weight) and (weight.requires_grad or own) else None
    saved_weight = weight if x.requires_grad else None
    rows, width, dtype = x.rows, x.width, x.dtype
    again = saved_x is not None and x.part is not None
    wants = x.requires_grad + weight.requires_grad
    make_x = like(x.rows, x.width, dtype, x.requires_grad)
    make_weight = like(weight.rows, x.width, dtype, weight.requires_grad, "weight gradient")
    wants_bias = bias is not None and bias.requires_grad

    def apply(grad: Tensor) -> Grads:
        _kept = saved_x, saved_weight
        gathered = grad.tape.tensor(rows, width, dtype, "gathered") if again else None
        grad.tape.multiply(counted, width, out_features, times=wants)
        # autograd's order is that of the operands' names: mm(self, mat2), addmm(mat1, mat2, self)
        grad_x = make_x(grad) if has_bias else None
        grad_weight = make_weight(grad)
        grad_x = grad_x if has_bias else make_x(grad)
        for product in (grad_x, grad_weight):
            if product is not None:
                product.based = not own  # seen through a view or a transpose
        del gathered
        if not has_bias:
            return grad_x, grad_weight
        tape = grad.tape
        grad_bias = tape.tensor(ONE, bias_width, dtype, "bias gradient") if wants_bias else None
        return grad_x, grad_weight, grad_bias

    has_bias, bias_width = bias is not None, 0 if bias is None else bias.width
    inputs = [x, weight] if bias is None else [x, weight, bias]
    record([out], name, inputs, apply)
    return out


def matmul(
    a: Tensor, b: Tensor, rows: Size, width: int, name: str = "matmul", *, exact: bool = False,
    inner: int | None = None, counted: Size | None = None,
) -> Tensor:  # fmt: skip
    """A batched product of two activations; ``rows`` x ``width`` is the shape of the result.

    ``exact``: inside a kernel, where autocast does not reach. ``inner``: over how many numbers
    each of the result is summed; left out where a table of scores, made or used, tells it.
    ``counted``: rows of such sums, where they are not those of the result.
    """
    if not exact:
        b = autocast(b)
        a = autocast(a)
    summed = _summed(a, rows, width) if inner is None else (counted or rows, inner, width)
    kind: Kind = "attention" if inner is None else "linear"
    a.tape.multiply(*summed, name, kind=kind)
    out = a.tape.tensor(rows, width, a.dtype, name)
    saved_a = a if b.requires_grad else None
    saved_b = b if a.requires_grad else None
    make_a = like(a.rows, a.width, a.dtype, a.requires_grad)
    make_b = like(b.rows, b.width, b.dtype, b.requires_grad)

    wants = a.requires_grad + b.requires_grad

    def apply(grad: Tensor) -> Grads:
        _kept = saved_a, saved_b
        grad.tape.multiply(*summed, name, times=wants, kind=kind)
        grad_b = make_b(grad)  # mat2 before self
        return make_a(grad), grad_b

    record([out], name, [a, b], apply)
    return out


def _summed(a: Tensor, rows: Size, width: int) -> tuple[Size, int | None, int]:
    """A product that makes a table of scores, or uses one: its rows are pairs x heads."""
    for table, across in ((rows, a.width), (a.rows, width)):
        if table[4]:
            return table, across // table[4], 1
    return rows, None, width


_LARGE = (1, 4096, 64, 64 * 4096, 64 * 4096 * 4096, 4096 * 4096, 256, 64 * 1024, 64 * 64)


def _broadcast(a: Tensor, b: Tensor) -> tuple[Size, int]:
    """The shape of an elementwise result: the larger operand's."""
    larger = a if a.numel.at(_LARGE) >= b.numel.at(_LARGE) else b
    return larger.rows, larger.width


def add(a: Tensor, b: Tensor, name: str = "add") -> Tensor:
    """A sum keeps nothing."""
    dtype = promote(a.dtype, b.dtype)
    rows, width = _broadcast(a, b)
    out = a.tape.tensor(rows, width, dtype, name)
    record([out], name, [a, b], lambda grad: (grad, grad))
    return out


def add_(a: Tensor, b: Tensor) -> Tensor:
    """``a += b``: no new tensor forward."""
    out = a.alias()
    wants = (a.requires_grad, b.requires_grad)

    def apply(grad: Tensor) -> Grads:
        return tuple(grad if wanted else None for wanted in wants)

    record([out], "add_", [a, b], apply)
    return out


def mul(a: Tensor, b: Tensor, name: str = "mul") -> Tensor:
    """A product keeps each factor that the other one's gradient needs."""
    dtype = promote(a.dtype, b.dtype)
    rows, width = _broadcast(a, b)
    out = a.tape.tensor(rows, width, dtype, name)
    saved_a = a if b.requires_grad else None
    saved_b = b if a.requires_grad else None
    make_a, make_b = (like(rows, width, dtype, t.requires_grad) for t in (a, b))

    def apply(grad: Tensor) -> Grads:
        _kept = saved_a, saved_b
        grad_b = make_b(grad)  # other before self
        return make_a(grad), grad_b

    record([out], name, [a, b], apply)
    return out


def scale(x: Tensor, name: str = "scale") -> Tensor:
    """Times a number, or plus one: a new tensor forward and backward, nothing kept."""
    out = x.tape.tensor(x.rows, x.width, x.dtype, name)
    make = like(x.rows, x.width, x.dtype, x.requires_grad)
    record([out], name, [x], lambda grad: (make(grad),))
    return out


def mul_(x: Tensor, constant: Tensor) -> Tensor:
    """A product in place, with what asks for no gradient and is kept."""
    out = x.alias()
    saved = constant
    make = like(x.rows, x.width, x.dtype, x.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    record([out], "mul", [x], apply)
    return out


def shift(x: Tensor, name: str = "shift") -> Tensor:
    """Plus a number: a new tensor forward, the same gradient backward."""
    out = x.tape.tensor(x.rows, x.width, x.dtype, name)
    record([out], name, [x], lambda grad: (grad,))
    return out


neg = scale


def unary(x: Tensor, name: str, keeps: Literal["input", "output"]) -> Tensor:
    """An elementwise function: ``silu`` and ``gelu`` keep the input, ``relu`` the output."""
    out = x.tape.tensor(x.rows, x.width, x.dtype, name)
    saved = x if keeps == "input" else out.alias()
    make = like(x.rows, x.width, x.dtype, x.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    record([out], name, [x], apply)
    return out


def power(x: Tensor) -> Tensor:
    """``x.pow(n)``: keeps x."""
    out = x.tape.tensor(x.rows, x.width, x.dtype, "pow")
    saved = x
    make = like(x.rows, x.width, x.dtype, x.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        # grad * (n * x.pow(n - 1)): each step a tensor, all of them alive until the last
        steps = [make(grad) for _ in range(3)]
        return (steps.pop(),)

    record([out], "pow", [x], apply)
    return out


def mean_square(x: Tensor) -> Tensor:
    """``x.pow(2).mean(-1)``: keeps x, one number a row comes out."""
    square = power(x)
    rows, width, dtype = x.rows, x.width, x.dtype
    out = x.tape.tensor(x.rows, 1, x.dtype, "mean")

    def apply_mean(grad: Tensor) -> Grads:
        # the expanded gradient divided by the width: a full tensor
        return (grad.tape.tensor(rows, width, dtype, "gradient"),)

    record([out], "mean", [square], apply_mean)
    return out


def softmax(x: Tensor, dtype: str | None = None, name: str = "softmax") -> Tensor:
    """Keeps its output; computed in ``dtype``."""
    x = x if dtype is None else to(x, dtype)
    return unary(x, name, "output")


def dropout(x: Tensor, probability: float, name: str = "dropout") -> Tensor:
    """``native_dropout``: a one-byte mask is kept."""
    env = x.tape.env
    if probability <= 0 or not (env.training and env.dropout):
        return x
    out = x.tape.tensor(x.rows, x.width, x.dtype, name)
    mask = x.tape.tensor(x.rows, x.width, "bool", "dropout mask")
    make = like(x.rows, x.width, x.dtype, x.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = mask
        return (make(grad),)

    record([out], name, [x], apply)
    return out


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``layer_norm``: in fp32 under autocast."""
    x = autocast_fp32(x)
    weight = None if weight is None else autocast_fp32(weight)
    bias = None if bias is None else autocast_fp32(bias)
    return native_layer_norm(x, weight, bias)


def native_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Keeps its input and an fp32 mean and rstd a row."""
    tape = x.tape
    out = tape.tensor(x.rows, x.width, x.dtype, "layer_norm")
    statistics = (
        tape.tensor(x.rows, 1, "fp32", "layer_norm statistics"),
        tape.tensor(x.rows, 1, "fp32", "layer_norm statistics"),
    )
    saved = x
    affine = [tensor for tensor in (weight, bias) if tensor is not None]
    makers = [like(t.rows, t.width, t.dtype, t.requires_grad) for t in (x, *affine)]

    def apply(grad: Tensor) -> Grads:
        _kept = saved, statistics
        return tuple(make(grad) for make in makers)

    record([out], "layer_norm", [x, *affine], apply)
    return out


def mean(x: Tensor) -> Tensor:
    """The mean of each row keeps nothing; the way back is a full tensor."""
    out = x.tape.tensor(x.rows, 1, x.dtype, "mean")
    make = like(x.rows, x.width, x.dtype, x.requires_grad)
    record([out], "mean", [x], lambda grad: (make(grad),))
    return out


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A choice between two tensors keeps the condition."""
    out = a.tape.tensor(a.rows, a.width, promote(a.dtype, b.dtype), "where")
    saved = condition
    makers = [like(t.rows, t.width, t.dtype, t.requires_grad) for t in (a, b)]

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return tuple(make(grad) for make in makers)

    record([out], "where", [a, b], apply)
    return out


def masked_fill(x: Tensor, mask: Tensor) -> Tensor:
    """A number in place of some of a tensor's: keeps the mask."""
    out = x.tape.tensor(x.rows, x.width, x.dtype, "masked_fill")
    saved = mask
    make = like(x.rows, x.width, x.dtype, x.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    record([out], "masked_fill", [x], apply)
    return out


def split(x: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Views side by side in the last dimension; backward joins them in one buffer."""
    assert sum(widths) == x.width, (widths, x.width)
    outputs = [x.alias(width=width) for width in widths]
    rows, width, dtype = x.rows, x.width, x.dtype

    def apply(*grads: Tensor | None) -> Grads:
        tape = next(grad.tape for grad in grads if grad is not None)
        zeros = [  # a piece that nothing used
            tape.tensor(rows, piece, dtype, "gradient")
            for piece, grad in zip(widths, grads, strict=True)
            if grad is None
        ]
        joined = tape.tensor(rows, width, dtype, "gradient")
        del zeros
        return (joined,)

    record(outputs, "split", [x], apply)
    return outputs


def part(x: Tensor, width: int) -> Tensor:
    """A slice of the last dimension; backward pads it with zeros to the whole."""
    out = x.alias(width=width)
    make = like(x.rows, x.width, x.dtype, x.requires_grad)
    record([out], "slice", [x], lambda grad: (make(grad),))
    return out


def cat(parts: Sequence[Tensor], name: str = "cat") -> Tensor:
    """Joined in the last dimension: a copy; the way back hands out views."""
    width = sum(piece.width for piece in parts)
    dtype = promote(*(piece.dtype for piece in parts))
    out = parts[0].tape.tensor(parts[0].rows, width, dtype, name)
    widths = [piece.width if piece.requires_grad else None for piece in parts]

    def apply(grad: Tensor) -> Grads:
        return tuple(None if piece is None else grad.alias(width=piece) for piece in widths)

    record([out], name, list(parts), apply)
    return out


def expand_heads(x: Tensor, repeats: int, *, copied: bool = True) -> Tensor:
    """``repeat_kv``: keys or values copied to all query heads; ``expand`` where not ``copied``."""
    if repeats == 1:
        return x
    if copied:
        out = x.tape.tensor(x.rows, x.width * repeats, x.dtype, "expanded heads")
    else:
        out = x.alias(width=x.width * repeats)
    make = like(x.rows, x.width, x.dtype, x.requires_grad)
    record([out], "expand", [x], lambda grad: (make(grad),))
    return out


def embedding(tape: Tape, weight: Tensor, rows: Size) -> Tensor:
    """Rows of a table; backward makes a whole table of gradients."""
    out = tape.tensor(rows, weight.width, weight.dtype, "embedding")
    make = like(weight.rows, weight.width, weight.dtype, weight.requires_grad)
    record([out], "embedding", [weight], lambda grad: (make(grad),))
    return out


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``log_softmax`` (keeps its output) and ``nll_loss`` (its targets): a scalar comes out.

    Autocast leaves the first in the logits' dtype, which ``cross_entropy_loss`` names, and runs
    the second in fp32 (aten/src/ATen/native/LossNLL.cpp; aten/src/ATen/autocast_mode.h).
    """
    log_probs = autocast_fp32(unary(logits, "log_softmax", "output"))
    return nll_loss(log_probs, targets)


def nll_loss(log_probs: Tensor, *kept: Tensor) -> Tensor:
    """The negative log likelihood; ``kept`` lives until its gradient has been taken."""
    loss = log_probs.tape.tensor(ONE, 1, log_probs.dtype, "loss")
    saved = (log_probs, kept)
    make = like(log_probs.rows, log_probs.width, log_probs.dtype, log_probs.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    record([loss], "nll_loss", [log_probs], apply)
    return loss


def gather(x: Tensor, rows: Size | None = None, index: Tensor | None = None) -> Tensor:
    """Rows picked by an index, which is kept; backward makes a whole tensor of zeros."""
    rows = x.rows if rows is None else rows
    out = x.tape.tensor(rows, x.width, x.dtype, "gather")
    if index is None:
        index = x.tape.tensor(rows, 1, "int64", "row index")
    make = like(x.rows, x.width, x.dtype, x.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = index
        return (make(grad),)

    record([out], "gather", [x], apply)
    return out


def pad(x: Tensor, rows: Size) -> Tensor:
    """``constant_pad_nd``: a longer copy; the way back copies a slice of the gradient."""
    out = x.tape.tensor(rows, x.width, x.dtype, "pad")
    make = like(x.rows, x.width, x.dtype, x.requires_grad)
    record([out], "pad", [x], lambda grad: (make(grad),))
    return out


def rows_slice(x: Tensor, rows: Size) -> Tensor:
    """The first ``rows`` of a tensor, a view; backward pads with zeros to the whole."""
    out = x.alias(rows=rows)
    make = like(x.rows, x.width, x.dtype, x.requires_grad)
    record([out], "slice", [x], lambda grad: (make(grad),))
    return out
