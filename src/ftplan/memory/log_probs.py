"""Log-probabilities of labels, and divergences of distributions, out of logits that exist.

Trainers differ in how they take one number a token out of a row of the vocabulary
(``Environment.log_probs``): a sequence at a time (``rows``), all at once (``whole``), or in a
kernel that keeps the logits and a few numbers a row (``kernel``), or a copy of them where the last
token's are cut off and the rest is not contiguous (``copied``). A head that is fused with the
loss (:mod:`loss`) hands over log-probabilities instead of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ftplan.memory import ops
from ftplan.memory.tape import BATCH, ONE, SEQ, TOKENS, Grads, Size, Tensor

__all__ = [
    "divergence",
    "divided_in_place",
    "entropies",
    "half_cross_entropy",
    "log_probs",
    "scalar",
]


def scalar(parts: list[Tensor]) -> Tensor:
    """A scalar out of a few numbers a token or a sequence."""
    tape = parts[0].tape
    loss = tape.tensor(ONE, 1, "fp32", "loss")
    makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in parts]
    ops.record([loss], "loss", parts, lambda grad: tuple(make(grad) for make in makers))
    return loss


def log_probs(
    outputs: Tensor, completion: int, *, how: str | None = None, scaled: bool = False
) -> Tensor:
    """Log-probabilities of the labels; already there where the head was fused with the loss.

    ``how``: another way than the trainer's usual one. ``scaled``: the temperature is in already.
    """
    if outputs.width == 1:
        return outputs
    env = outputs.tape.env
    how, last = how or env.log_probs, 0 if env.rolls_labels else -1
    rows = BATCH * completion if completion else TOKENS + BATCH * last
    shifted = outputs if rows == outputs.rows else ops.rows_slice(outputs, rows)
    if completion and not scaled:  # divided by the sampling temperature
        shifted = ops.scale(shifted)
    if how == "copied" and not completion:
        shifted = ops.copy(shifted)
    if how in ("kernel", "copied"):
        return _in_a_kernel(shifted)
    if how == "whole":
        return _log_softmax(shifted)
    length = ONE * completion if completion else SEQ + ONE * last
    return _picked(shifted, length)


def divided_in_place(logits: Tensor, completion: int) -> Tensor:
    """``logits[:, prompt:] /= temperature``: nothing forward, four buffers on the way back.

    Source: torch/csrc/autograd/functions/tensor.cpp, ``CopySlices::apply``: the gradient is copied
    whole, its slice cloned, and the clone divided.
    """
    rows, width, dtype = logits.rows, logits.width, logits.dtype
    out = logits.alias()

    def apply(grad: Tensor) -> Grads:
        whole = grad.tape.tensor(rows, width, dtype, "gradient")
        parts = [grad.tape.tensor(BATCH * completion, width, dtype, "gradient") for _ in range(2)]
        parts.clear()
        return (whole,)

    ops.record([out], "divide in place", [logits], apply)
    return out


def _in_a_kernel(logits: Tensor) -> Tensor:
    """Log-probability and entropy of each row in one pass; the gradient is one buffer.

    Keeps the logits as they are (trl/kernels/logprob_entropy.py, ``_LogProbEntropyFunction``,
    since 1.14, where there is Triton; axolotl/monkeypatch/trainer/utils.py,
    ``selective_log_softmax``, 0.19, which takes contiguous ones).
    """
    tape = logits.tape
    out, *statistics = (tape.tensor(logits.rows, 1, "fp32", "statistics") for _ in range(4))
    saved = (logits.alias(), statistics[1:])
    del statistics
    make = ops.like(logits.rows, logits.width, logits.dtype, logits.requires_grad)

    def apply(_grad: Tensor) -> Grads:
        _kept = saved
        return (make(_grad),)

    ops.record([out], "log-probabilities", [logits], apply)
    return out


def _pick(x: Tensor) -> Tensor:
    """``gather`` of one value a row keeps its input; backward makes a whole tensor of zeros.

    Source: torch/csrc/autograd/FunctionsManual.cpp, ``gather_backward``.
    """
    out = x.tape.tensor(x.rows, 1, x.dtype, "picked")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    saved = x.alias()

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    ops.record([out], "pick", [x], apply)
    return out


def _picked(x: Tensor, length: Size) -> Tensor:
    """``selective_log_softmax``: a sequence of ``length`` rows at a time.

    In fp32 the logits are picked and a log-sum-exp a row is taken off; in two bytes each
    sequence's log-probabilities are made and kept (trl/trainer/utils.py, 1.10).
    """
    if x.dtype == "fp32":
        selected = _pick(x)
        sums = _by_sequence(x, length, _log_sum_exp, keeps="input")
        return ops.add(selected, sums)
    return _by_sequence(x, length, _log_softmax, keeps="output")


def _by_sequence(
    x: Tensor,
    length: Size,
    one: Callable[[Tensor], Tensor],
    *,
    keeps: Literal["input", "output"],
) -> Tensor:
    """``one`` of each sequence: the first of them with what it needs for a moment, then the rest.

    On the way back the first sequence comes last, when all the others' gradients are there: that
    is where its temporaries count, so the others are played without theirs.
    """
    tape = x.tape
    rest = x.rows + length * -1
    rows, width, dtype = x.rows, x.width, x.dtype
    if not ops.records(x):
        if keeps == "output":  # the loop's variable still names the one before
            held = [tape.tensor(length, width, dtype, "log_softmax") for _ in range(2)]
            held.clear()
        else:
            one(x.alias(rows=length))
        return tape.tensor(rows, 1, dtype, "log-probabilities")
    first, others = x.alias(rows=length), x.alias(rows=rest)

    def join(*_grads: Tensor | None) -> Grads:
        return (tape.tensor(rows, width, dtype, "gradient"),)

    ops.record([first, others], "unbind", [x], join)
    head = one(first)
    tail = tape.tensor(rest, 1, dtype, "log-probabilities")
    kept = [others.alias() if keeps == "input" else tape.tensor(rest, width, dtype, "log_softmax")]

    def apply(_grad: Tensor) -> Grads:
        kept.clear()
        return (tape.tensor(rest, width, dtype, "gradient"),)

    ops.record([tail], "each", [others], apply)
    out = tape.tensor(rows, 1, dtype, "log-probabilities")
    ops.record(
        [out], "stack", [head, tail], lambda grad: (grad.alias(rows=length), grad.alias(rows=rest))
    )
    return out


def _log_softmax(row: Tensor) -> Tensor:
    return _pick(ops.unary(row, "log_softmax", "output"))


def _log_sum_exp(row: Tensor) -> Tensor:
    """Keeps its input; needs the exponentials for a moment on either way.

    Source: aten/src/ATen/native/ReduceOps.cpp, ``logsumexp_out_impl``;
    FunctionsManual.cpp, ``logsumexp_backward``.
    """
    tape = row.tape
    exponentials = tape.tensor(row.rows, row.width, row.dtype, "exponentials")
    del exponentials
    out = tape.tensor(row.rows, 1, row.dtype, "log-sum-exp")
    saved, rows, width, dtype = row, row.rows, row.width, row.dtype

    def apply(_grad: Tensor) -> Grads:
        _kept = saved
        difference = tape.tensor(rows, width, dtype, "gradient")
        power = tape.tensor(rows, width, dtype, "gradient")
        product = tape.tensor(rows, width, dtype, "gradient")
        del difference, power
        return (product,)

    ops.record([out], "logsumexp", [row], apply)
    return out


def entropies(logits: Tensor) -> None:
    """Entropy of each row, without a graph: of a flat copy, 128 rows at a time.

    Source: trl/trainer/utils.py, ``entropy_from_logits``, 1.10.
    """
    flat = ops.copy(logits)
    made = [flat.tape.tensor(ONE * 128, flat.width, flat.dtype, "entropy") for _ in range(3)]
    made.clear()


def half_cross_entropy(logits: Tensor) -> Tensor:
    """Cross entropy of the chosen half of the sequences; its shifted logits are copied first."""
    half = logits.alias(width=-(-logits.width // 2))  # half of the rows: half as many numbers
    make = ops.like(logits.rows, logits.width, logits.dtype, logits.requires_grad)
    ops.record([half], "slice", [logits], lambda grad: (make(grad),))
    shifted = ops.rows_slice(half, TOKENS + BATCH * -1)
    return ops.nll_loss(ops.unary(ops.copy(shifted), "log_softmax", "output"))


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Generalised Jensen-Shannon divergence at its default weight, over shifted logits.

    Both are divided by the temperature, both log-softmaxed; a mixture is made of them; two KL
    terms (trl/experimental/gkd/gkd_trainer.py, ``generalized_jsd_loss``, 1.16).
    """
    rows = TOKENS + BATCH * -1
    held = [ops.scale(ops.rows_slice(logits, rows)) for logits in (student, teacher)]
    mine, theirs = (ops.unary(logits, "log_softmax", "output") for logits in held)
    mixture = _log_add(ops.shift(mine), ops.shift(theirs))
    parts = [_kl(mixture, theirs), _kl(mixture, mine)]
    both = ops.add(ops.scale(parts[0]), ops.scale(parts[1]))
    total = scalar([ops.gather(both)])  # the labelled positions
    held.clear()  # the function's names hold all of these until it returns
    return total


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """``logsumexp`` of a stack of two: the stack is kept."""
    tape = a.tape
    stack = tape.tensor(a.rows, a.width * 2, a.dtype, "stack")
    power = tape.tensor(a.rows, a.width * 2, a.dtype, "exponentials")
    out = tape.tensor(a.rows, a.width, a.dtype, "mixture")
    del power
    saved, rows, width, dtype = (stack, out.alias()), a.rows, a.width, a.dtype
    wants = (a.requires_grad, b.requires_grad)

    def apply(_grad: Tensor) -> Grads:
        _kept = saved
        made = [tape.tensor(rows, width * 2, dtype, "gradient") for _ in range(3)]
        joined = made.pop()
        made.clear()
        return tuple(joined.alias(width=width) if want else None for want in wants)

    ops.record([out], "logsumexp", [a, b], apply)
    return out


def _kl(given: Tensor, target: Tensor) -> Tensor:
    """``kl_div(given, target, log_target=True)`` in elementwise steps, as PyTorch composes it.

    Source: aten/src/ATen/native/Loss.cpp, ``kl_div``.
    """
    power = ops.unary(target, "exp", "output")
    return ops.mul(power, ops.add(target, given, "difference"))
