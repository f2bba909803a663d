"""Ring attention: a rank's queries meet the keys and values of all ranks of a sequence, in turns.

PyTorch's (``torch.distributed.tensor.experimental``, 2.13, which accelerate's context parallelism
runs; traced): all keys and values are gathered at the first turn, forward and once more backward;
outputs of the turns are merged in fp32; gradients are summed in fp32 and go round by an
all-to-all. The rank is the last one, which merges whole outputs: from its second turn on it needs
the first half of the others' tokens (load balancing), so that half of their gradients come.
Source: ``_templated_ring_attention``, ``_SDPAMerger`` and ``_templated_ring_attention_backward``.
"""

from __future__ import annotations

from collections.abc import Callable

from ftplan.memory import ops
from ftplan.memory.tape import ONE, Grads, Size, Tape, Tensor

__all__ = ["ring_attention"]

Kernel = Callable[[Tape, int], None]
"""What the attention kernel's way back needs for a moment; of one of so many parts of the keys."""


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, heads: int, width: int, ranks: int, back: Kernel
) -> Tensor:
    """Attention of ``heads`` heads over ``ranks`` turns; tokens x ``width`` comes out."""
    tape, rows, dtype = q.tape, q.rows, q.dtype
    merged, lse = _forward(q, k, v, (heads, width), ranks)
    out = tape.kept(rows, width, dtype, "ring attention")
    del merged
    saved = (q, k, v, out.alias(), lse, tape.allocate(ONE * 16, "ring attention"))
    widths = (q.width, k.width, v.width)
    wants = [t.requires_grad for t in (q, k, v)]

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        grads = _backward(grad.tape, rows, widths, dtype, ranks, back)
        return tuple(g if wanted else None for g, wanted in zip(grads, wants, strict=True))

    ops.record([out], "ring attention", [q, k, v], apply)
    return out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, int], ranks: int
) -> tuple[tuple[object, ...], Tensor]:
    """The merged output in fp32 with what lives until it has been cast, and its log-sum-exp."""
    tape, rows, dtype = q.tape, q.rows, q.dtype
    heads, width = shape
    own: list[Tensor] = [tape.tensor(rows, t.width, dtype, "contiguous") for t in (k, v)]
    gathered = block = merged = lse = None
    for turn in range(ranks):
        if turn == 0:
            gathered = _gathered(tape, rows, k.width + v.width, dtype, ranks)
        else:
            own.clear()
            if turn < ranks - 1:
                joined = tape.tensor(rows, k.width + v.width, dtype, "keys and values")
                del joined
        block = tape.tensor(rows, width, dtype, "ring attention")
        block_lse = tape.tensor(rows, heads, "fp32", "log-sum-exp")
        accurate = tape.tensor(rows, width, "fp32", "merged")
        if merged is None or lse is None:
            merged, lse = accurate, block_lse
        else:
            merged, lse = _merge(tape, merged, lse)
        del accurate, block_lse
    assert lse is not None
    return (merged, gathered, block), lse


def _merge(tape: Tape, merged: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """``out - sigmoid(block_lse - lse) * (out - block_out)``, and the new log-sum-exp."""
    rows, width, heads = merged.rows, merged.width, lse.width
    share = tape.tensor(rows, heads, "fp32", "merged")
    difference = tape.tensor(rows, width, "fp32", "merged")
    product = tape.tensor(rows, width, "fp32", "merged")
    del share, difference
    out = tape.tensor(rows, width, "fp32", "merged")
    del product
    return out, tape.tensor(rows, heads, "fp32", "log-sum-exp")


def _gathered(tape: Tape, rows: Size, width: int, dtype: str, ranks: int) -> Tensor:
    """Keys and values of all ranks, gathered from one tensor of this rank's."""
    joined = tape.tensor(rows, width, dtype, "keys and values")
    out = tape.tensor(rows * ranks, width, dtype, "gathered keys and values")
    del joined
    return out


def _backward(
    tape: Tape, rows: Size, widths: tuple[int, int, int], dtype: str, ranks: int, back: Kernel
) -> list[Tensor]:
    """Gradients of queries, and of keys and values, which are two views of one tensor."""
    width, *narrow = widths
    both = sum(narrow)
    sums = [tape.tensor(rows, each, "fp32", "gradient") for each in widths]
    own = [tape.tensor(rows, each, dtype, "contiguous") for each in narrow]
    joined: Tensor | None = tape.tensor(rows, both, dtype, "keys and values")
    gathered = tape.tensor(rows * ranks, both, dtype, "gathered keys and values")
    sent = received = turned = None
    for turn in range(ranks):
        if 0 < turn < ranks - 1:
            joined = tape.tensor(rows, both, dtype, "keys and values")
        if turn == 1:
            own.clear()
        parts = 1 if turn == 0 else 2
        made = [
            tape.tensor(rows, each, dtype, "gradient")
            for each in (width, *(-(-n // parts) for n in narrow))
        ]
        back(tape, parts)
        turned = made  # those of the turn before lived until now
        if turn:  # the sums that came from the rank before, with half of them added to
            del sums[1:]
            sent = received
            sums += [tape.tensor(rows, each, "fp32", "gradient") for each in narrow]
        sent = tape.tensor(rows, both, "fp32", "gradients sent")
        received = tape.tensor(rows, both, "fp32", "gradients received")
    query = tape.tensor(rows, width, dtype, "gradient")
    del sums[0]
    keys = tape.tensor(rows, both, dtype, "gradient")
    del gathered, joined, sent, received, turned, made
    return [query, keys.alias(width=narrow[0]), keys.alias(width=narrow[1])]
