"""Operations of fused kernels: several steps in one function, which keeps less and overwrites.

What each one keeps and makes was read off the libraries' autograd functions, run with their
launches left out (tests/cases/kernels.json, tools/kernel_cases.py): liger_kernel 0.8.5, unsloth
2026.10.9, fms_acceleration_foak 0.7.4, axolotl 0.18.
"""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.tape import ONE, Grads, Tensor

__all__ = ["cross_entropy", "gate", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    """Keeps its input and an fp32 number a row; see :class:`ftplan.memory.kernels.Kernels`."""
    tape, kernels = x.tape, x.tape.env.kernels
    if kernels.norm_wide and weight is not None:
        return _wide_rms_norm(x, weight)
    out = tape.tensor(x.rows, x.width, x.dtype, "rms norm")
    saved = (x, tape.tensor(x.rows, 1, "fp32", "rms norm statistics"))
    trains = weight is not None and weight.requires_grad and kernels.norm_trains
    inputs = [x] if weight is None else [x, weight]
    make = ops.like(x.rows, x.width, x.dtype, True)
    wants = x.requires_grad

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        made = grad if kernels.norm_in_place else make(grad)
        grads: list[Tensor | None] = [made if wants else None]
        rows = kernels.norm_partials if trains else 0
        _sums = grad.tape.tensor(ONE * rows, grad.width, "fp32", "partial sums") if rows else None
        if weight is not None:
            shape = weight.rows, weight.width, weight.dtype
            grads.append(grad.tape.tensor(*shape, "gradient") if trains else None)
        return tuple(grads)

    ops.record([out], "rms norm", inputs, apply)
    return out


def _wide_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """AutoModel's: the input is cast, normed and cast back; its way back is one compiled kernel."""
    with x.tape.no_grad():
        wide = ops.to(x, "fp32")
        _scale = ops.to(weight, "fp32")
        normed = x.tape.tensor(x.rows, x.width, "fp32", "rms norm")
        rows = x.tape.tensor(x.rows, 1, "fp32", "rms norm statistics")
        del wide, _scale, rows
        out = ops.to(normed, x.dtype)
        del normed
    saved = (x.alias(), weight)
    makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in (x, weight)]

    def apply(grad: Tensor) -> Grads:
        kept, _ = saved
        _rows = grad.tape.tensor(kept.rows, 1, "fp32", "rms norm statistics")
        return tuple(make(grad) for make in makers)

    ops.record([out], "rms norm", [x, weight], apply)
    return out


def gate(gate: Tensor, up: Tensor) -> Tensor:
    """``act(gate) * up``: keeps both, and writes their gradients over them."""
    out = gate.tape.tensor(gate.rows, gate.width, gate.dtype, "gated")
    saved = (gate.alias(), up.alias())
    wants = (gate.requires_grad, up.requires_grad)

    def apply(_grad: Tensor) -> Grads:
        return tuple(t if want else None for t, want in zip(saved, wants, strict=True))

    ops.record([out], "gated", [gate, up], apply)
    return out


LARGEST_BLOCK = 65_536
"""Columns of the vocabulary that one block of Unsloth's cross entropy takes (MAX_FUSED_SIZE)."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Keeps the logits, a log-sum-exp a row and the targets; the gradient replaces the logits.

    Unsloth's of 2026.10.9 keeps the losses too and leaves the logits as they are.
    """
    tape = logits.tape
    losses = tape.tensor(logits.rows, 1, "fp32", "loss per token")
    blocks = -(-logits.width // LARGEST_BLOCK)
    sums = tape.tensor(logits.rows, blocks, "fp32", "log-sum-exp of blocks")
    if blocks > 1:
        sums = tape.tensor(logits.rows, 1, "fp32", "log-sum-exp")
    saved = [logits.alias(), sums, targets]
    loss = tape.tensor(ONE, 1, "fp32", "loss")
    make = ops.like(logits.rows, logits.width, logits.dtype, True)
    in_place = tape.env.kernels.loss_in_place
    if not in_place:
        saved.append(losses)
    del losses

    def apply(grad: Tensor) -> Grads:
        made = saved[0] if in_place else make(grad)
        saved.clear()
        return (made,)

    ops.record([loss], "fused cross entropy", [logits], apply)
    return loss
