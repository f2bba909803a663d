"""Activation checkpointing: keep a function's input, run it again on the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ftplan.memory import ops
from ftplan.memory.tape import Node, Rerun, Selected, Tensor

__all__ = ["checkpoint", "checkpoint_all"]


def checkpoint(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    others: Sequence[Tensor] = (),
    *,
    trains: bool,
    offload: bool = False,
) -> Tensor:
    """``torch.utils.checkpoint``: ``function(x)``, of which autograd keeps ``x`` alone.

    ``others`` are further inputs that may ask for a gradient, which the function holds; ``trains``
    says whether it has weights that do. ``offload``: ``x`` waits in host memory.
    """
    return checkpoint_all(lambda x: [function(x)], x, others, trains=trains, offload=offload)[0]


def checkpoint_all(
    function: Callable[[Tensor], list[Tensor]],
    x: Tensor,
    others: Sequence[Tensor] = (),
    *,
    trains: bool,
    offload: bool = False,
) -> list[Tensor]:
    """:func:`checkpoint` of a function with several outputs that may have a gradient."""
    tape = x.tape
    inputs = [x, *others]
    if not tape.grad_enabled or not (trains or any(t.requires_grad for t in inputs)):
        return function(x)
    if tape.rerun is not None:
        tape.rerun.stop = len(tape.events)  # a checkpoint in a checkpoint saves its inputs
    held: list[Tensor] = []
    selected = Selected() if tape.env.keeps_products else None
    inputs_edges = [ops.edge(t) for t in inputs]
    tape.escaped = None if tape.env.reentrant else held
    tape.selected = selected
    with tape.unsaved():
        outputs = function(x)
    tape.escaped = tape.selected = None

    stored: Callable[[], Tensor] = _host_copy(x) if offload else lambda: x

    def forward_again(grads: list[Tensor | None]) -> Rerun:
        casts, cached = tape.weight_cache, tape.cached
        tape.weight_cache, tape.cached = {}, []
        before, tape.rerun = tape.rerun, Rerun(
            start=len(tape.events), first=tape.sequence, counted=len(tape.products),
            deferred=not tape.env.reentrant,
        )  # fmt: skip
        run = tape.rerun
        with tape.scoped("recomputed"):
            start = stored()
            kept: list[object] = [start, function]
            tape.recalled = held if held else None
            tape.selected = None if selected is None else Selected(selected.held, again=True)
            # with reentry the graph made now is gone back through, else it is dropped at once
            graph, tape.attributes = tape.attributes, kept if tape.env.reentrant else []
            run.outputs = function(_entry(start, kept))
            tape.attributes = graph
            if not tape.env.early_stop:
                run.stop = len(tape.events)
            del start
            tape.recalled = tape.selected = None
        tape.weight_cache, tape.cached, tape.rerun = casts, cached, before
        if tape.env.reentrant:  # its backward holds the gradient and the output on the stack
            kept += [*grads, *run.outputs]
        return run

    node = Node(tape, "checkpoint", inputs_edges, _never, len(outputs))
    node.recompute = forward_again
    for number, out in enumerate(outputs):
        if out.requires_grad and isinstance(out.node, Node):
            out.node, out.output_nr = node, number
    return outputs


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


def _entry(x: Tensor, kept: list[object]) -> Tensor:
    """The input as the recomputed function sees it; what is ``kept`` lives until its gradient."""
    seen = x.alias()

    def apply(grad: Tensor) -> tuple[Tensor | None, ...]:
        if grad.tape.env.hooks_hold_inputs:
            held = [value for value in (kept[0], grad) if isinstance(value, Tensor)]
            grad.tape.cached += [tensor.alias() for tensor in held]
        kept.clear()
        return (grad,)

    ops.record([seen], "checkpoint input", [x], apply)
    return seen


def _never(*_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise AssertionError("a checkpoint is recomputed, not applied")
