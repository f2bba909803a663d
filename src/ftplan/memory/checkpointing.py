"""Activation checkpointing: keep a function's input, run it again on the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ftplan.memory import ops
from ftplan.memory.tape import Node, Selected, Tape, Tensor

__all__ = ["checkpoint"]


def checkpoint(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    others: Sequence[Tensor] = (),
    *,
    trains: bool,
    offload: bool = False,
) -> Tensor:
    """``torch.utils.checkpoint``: ``function(x)``, of which autograd keeps ``x`` alone.

    ``others`` are further inputs that may ask for a gradient; ``trains`` says whether the function
    has weights that do. ``offload``: ``x`` waits in host memory.
    """
    tape = x.tape
    inputs = [x, *others]
    if not tape.grad_enabled or not (trains or any(t.requires_grad for t in inputs)):
        return function(x)
    held: list[Tensor] = []
    selected = Selected() if tape.env.keeps_products else None
    inputs_edges = [ops.edge(t) for t in inputs]
    with tape.no_grad():
        tape.escaped = None if tape.env.reentrant else held
        tape.selected = selected
        out = function(x)
        tape.escaped = tape.selected = None

    stored: Callable[[], Tensor] = _host_copy(x) if offload else lambda: x

    def forward_again(grad: Tensor | None) -> Tensor:
        casts, cached = tape.weight_cache, tape.cached
        tape.weight_cache, tape.cached = {}, []
        before, tape.again = tape.again, True
        counted = len(tape.products)
        with tape.scoped("recomputed"):
            start = stored()
            kept: list[Tensor | None] = [start]
            tape.recalled = held if held else None
            tape.selected = None if selected is None else Selected(selected.held, again=True)
            again = function(_entry(start, kept))
            del start
            tape.recalled = tape.selected = None
        tape.weight_cache, tape.cached = casts, cached
        tape.again = before
        if tape.env.reentrant:  # its backward holds the gradient and the output on the stack
            kept += [grad, again]
        else:
            _stop_early(tape, counted, again)
        return again

    node = Node(tape, "checkpoint", inputs_edges, _never)
    node.recompute = forward_again
    out.requires_grad, out.node = True, node
    return out


_RUNS_AFTER_SAVING = ("linear", "matmul", "grouped_mm", "bmm", "scores", "attention", "einsum")
"""Products: they save their operands before they run. Others save what they have made."""
_UNSEEN = ("checkpoint input", "int8 matmul")
"""Nodes that hold tensors by themselves, where saved-tensor hooks do not see them."""


def _stop_early(tape: Tape, counted: int, out: Tensor) -> None:
    """Recomputing ends when the last tensor is saved: products from there on are not computed.

    Source: torch/utils/checkpoint.py 2.13, ``_StopRecomputationError``.
    """
    last = _last_to_save(out)
    if last is not None:
        end = last.sequence - (last.name in _RUNS_AFTER_SAVING)
        tape.products[counted:] = [p for p in tape.products[counted:] if p.sequence < end]


def _last_to_save(out: Tensor) -> Node | None:
    """The latest node that keeps a tensor: what a node keeps is what its function closes over."""
    nodes = {out.node.sequence: out.node} if isinstance(out.node, Node) else {}
    while nodes:
        latest = nodes.pop(max(nodes))
        if latest.name not in _UNSEEN and _keeps(latest.apply):
            return latest
        nodes |= {edge[0].sequence: edge[0] for edge in latest.edges if isinstance(edge, tuple)}
    return None


def _keeps(apply: Callable[..., object] | None) -> bool:
    cells = getattr(apply, "__closure__", None) or ()
    return any(_holds_tensor(cell.cell_contents) for cell in cells)


def _holds_tensor(value: object) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)


def _host_copy(x: Tensor) -> Callable[[], Tensor]:
    """The tensor moved to host memory: its bytes here are free until it is asked back.

    Source: unsloth_zoo/gradient_checkpointing.py, ``Unsloth_Offloaded_Gradient_Checkpointer``;
    trl/models/activation_offloading.py, 1.16.
    """
    tape, rows, width, dtype = x.tape, x.rows, x.width, x.dtype
    wants, node, number = x.requires_grad, x.node, x.output_nr

    def back() -> Tensor:
        copy = tape.tensor(rows, width, dtype, "block input from the host")
        copy.requires_grad, copy.node, copy.output_nr = wants, node, number
        return copy

    return back


def _entry(x: Tensor, kept: list[Tensor | None]) -> Tensor:
    """The input as the recomputed function sees it; what is ``kept`` lives until its gradient."""
    seen = x.alias()

    def apply(grad: Tensor) -> tuple[Tensor | None, ...]:
        if grad.tape.env.hooks_hold_inputs:
            grad.tape.cached += [tensor.alias() for tensor in (kept[0], grad) if tensor]
        kept.clear()
        return (grad,)

    ops.record([seen], "checkpoint input", [x], apply)
    return seen


def _never(*_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise AssertionError("a checkpoint is recomputed, not applied")
