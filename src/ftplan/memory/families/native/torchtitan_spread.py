"""torchtitan's expert parallelism: tokens that travel, and blocks of two groups under FSDP2.

A block's experts lie on other ranks than the rest of it, so ``fully_shard`` makes two groups of
weights of it, which are gathered one after the other when it begins; and each module is told which
one to gather ahead (``set_modules_to_forward_prefetch``, ``set_modules_to_backward_prefetch``).

Source: pytorch/torchtitan torchtitan/distributed/fsdp.py (``apply_fsdp_to_decoder``) and
torchtitan/models/common/token_dispatcher.py (``AllToAllTokenDispatcher``), 0.3.0;
torch/distributed/fsdp/_fully_shard, torch 2.13.
"""

from __future__ import annotations

from collections.abc import Sequence

from ftplan.memory import ops
from ftplan.memory.experts import gather_rows
from ftplan.memory.fsdp import Fsdp
from ftplan.memory.nn import Module, Stack
from ftplan.memory.tape import Grads, Parameter, Size, Storage, Tensor
from ftplan.memory.units import Unit

__all__ = ["Grouped", "Mixed", "send", "send_back"]


def send(x: Tensor, received: Size) -> tuple[Tensor, Tensor]:
    """Rows to the ranks that have their experts, there in the experts' order; and that order."""
    tape = x.tape
    arrived = _travel(x, received)
    order = tape.tensor(received, 1, "int64", "order of received rows")
    return gather_rows(arrived, order, received, x.width, "sorted rows"), order


def send_back(x: Tensor, order: Tensor, rows: Size) -> Tensor:
    """What the experts made, in the order of the ranks, and back to where the rows came from."""
    placed = x.tape.tensor(x.rows, x.width, x.dtype, "rows in order")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = order
        return (make(grad),)

    ops.record([placed], "index_put", [x], apply)
    return _travel(placed, rows)


def _travel(x: Tensor, rows: Size) -> Tensor:
    """``all_to_all_single``, whose output selective checkpointing keeps."""
    out = x.tape.kept(rows, x.width, x.dtype, "all_to_all")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "all_to_all", [x], lambda grad: (make(grad),))
    return out


class Mixed(Fsdp):
    """FSDP2 of blocks that are not all as large as each other."""

    stack: Stack
    latest: Unit
    """What follows the blocks."""
    layer = 0
    """Of the block that runs next."""

    def prepare(self, stack: Stack, last: Unit) -> None:
        """Say which blocks there are, and what comes after them."""
        self.stack, self.latest = stack, last

    def place(self, layer: int, count: int) -> int | str | None:
        """A block is one by itself where the one before or after it is of another kind, too: what
        it frees is theirs."""
        self.layer, pattern = layer, self.stack.pattern
        changes = len(set(pattern[max(0, layer - 1) : layer + 2])) > 1
        return layer if changes else super().place(layer, count)


class Grouped(Mixed):
    """FSDP2 of blocks that are two groups each, gathered ahead as the trainer says."""

    ahead: list[Storage]
    """Flat weights of the block that runs next."""

    def prepare(self, stack: Stack, last: Unit) -> None:
        super().prepare(stack, last)
        self.ahead = []

    def groups(self, block: Module) -> list[list[Parameter]]:
        """What is gathered together: all but the experts, then those."""
        weights = [parameter for _, parameter in block.named_parameters()]
        both = ([p for p in weights if p.expert is spread] for spread in (False, True))
        return [group for group in both if group]

    def begin_forward(self, unit: Unit) -> None:
        fresh = not unit.gathered
        super().begin_forward(unit)
        if fresh and unit.name == "embeddings":
            self._gather_ahead(0)

    def begin_groups(self, units: Sequence[Unit]) -> None:
        """A block's ``pre_forward``: each group in turn is copied out; then the next block."""
        for unit in units:
            unit.flat = self.ahead.pop(0) if self.ranks(unit) > 1 else None
            self._copy_out(unit)
            self.previous = [] if unit.flat is None else [unit.flat]
            unit.flat = None
        if self.layer == self.stack.count - 1:
            self._gather(self.latest)
        else:
            self._gather_ahead(self.layer + 1)

    def _gather_ahead(self, layer: int) -> None:
        for parameters in self.groups(self.stack.kinds[self.stack.pattern[layer]]):
            unit = Unit("ahead", parameters, experts=parameters[0].expert)
            self._gather(unit)
            if unit.flat is not None:
                self.ahead.append(unit.flat)

    def enter_groups(self, units: Sequence[Unit], x: Tensor) -> Tensor:
        """Mark where the way back leaves the block: the last group is reduced first."""
        seen = x.alias()

        def apply(grad: Tensor) -> Grads:
            for unit in reversed(units):
                self.end_backward(unit)
            return (grad,)

        ops.record([seen], "post_backward", [x], apply)
        return seen

    def leave_groups(self, units: Sequence[Unit], x: Tensor) -> Tensor:
        """Mark where the way back enters the block."""
        seen = x.alias()

        def apply(grad: Tensor) -> Grads:
            for unit in units:
                self._ready(unit)
            self._gather_before(units[0])
            return (grad,)

        ops.record([seen], "pre_backward", [x], apply)
        return seen

    def begin_backward(self, unit: Unit) -> None:
        if unit.parameters:
            self._ready(unit)
            self._gather_before(unit)

    def _ready(self, unit: Unit) -> None:
        if not unit.gathered:
            self._gather(unit)
            self._copy_out(unit)
            unit.flat = None

    def _gather_before(self, unit: Unit) -> None:
        """What ran before this one, its last group first."""
        index = self.order.index(unit)
        before = self.order[:index][-1:]
        if before and before[0].module is not None:
            before = [other for other in self.order if other.module is before[0].module]
        for other in reversed(before):
            if not other.gathered:
                self._gather(other)

    def _recycle(self, unit: Unit) -> None:
        """Flat gradients of the modules before go when a module's last group is reduced."""
        if (
            unit.module is None
            or [other for other in self.order if other.module is unit.module][-1] is unit
        ):
            super()._recycle(unit)
