"""FSDP2 on the tape: what is gathered, for how long, and what becomes of gradients.

The weights of a unit (:mod:`units`) are gathered into one flat buffer and copied out from there;
forward keeps the flat buffer until the next unit has been copied out, backward gathers the next
unit ahead of time; gradients are copied into one flat buffer, reduced and scattered, and that
buffer lives until the next unit's turn
(torch/distributed/fsdp/_fully_shard, torch 2.13: ``wait_for_unshard``, ``foreach_all_gather``,
``_backward_prefetch``, ``post_backward``, ``foreach_reduce``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from ftplan.dtypes import find_format
from ftplan.memory import ops
from ftplan.memory.job import ShardingSpec
from ftplan.memory.nn import Module, Network
from ftplan.memory.tape import ITEM_BYTES, ONE, Label, Parameter, Played, Storage, Tape, Tensor
from ftplan.memory.units import OUTER, Unit, is_adapted, wrapped_apart

__all__ = ["ACCUMULATED", "BUFFERS", "Fsdp", "shard_shape"]

BUFFERS = ("gptq", "awq")
"""Formats whose linear layers hold buffers, which FSDP and ZeRO leave whole on every rank
(``register_buffer("qweight", ...)`` in gptqmodel and autoawq)."""


ACCUMULATED = Label("gradients", "accumulated")
"""Gradients of earlier micro batches: static, but for what the last one frees of them."""


def shard_shape(shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """Rank 0's part of a weight: whole rows, the last rank padded."""
    if not shape:
        return shape
    return (-(-shape[0] // ranks), *shape[1:])


class Fsdp:
    """The state of FSDP while one micro batch is recorded."""

    by_module = False
    """Weights are gathered a module at a time, not by unit."""

    def __init__(self, tape: Tape, spec: ShardingSpec, *, accumulated: bool) -> None:
        self.tape = tape
        self.spec = spec
        self.accumulated = accumulated
        """Shards of gradients are there already: what arrives is added and freed."""
        self.previous: list[Storage] = []
        """The flat buffer of the unit before, until this one has been copied out."""
        self.scattered: list[Storage] = []
        """The flat gradients of the unit before."""
        self.divides = False
        """The trainer sets what gradients are divided by (``set_gradient_divide_factor``)."""
        self.order: list[Unit] = []
        self.last = 0
        """Which block comes last."""
        self.ended = False
        """The model has returned: what runs now is called by the trainer."""
        self.ran_again = False
        """Another pass of the same model came after the one that has a way back."""
        self.beside = False
        """Another network runs, which is sharded by itself."""
        self.again = False
        """The network runs again with its adapters off."""
        self.second = False
        """A second network runs that is trained with the first, in one wrapper around both."""

    def played(self, trained: Played | None = None) -> Played | None:
        """All is recorded: what comes between its segments at full depth, if anything.

        ``trained``: the same of the training that an evaluation interrupts.
        """
        return None

    def ranks(self, unit: Unit) -> int:
        """Over how many ranks it is sharded."""
        return self.spec.ranks_of(unit.experts)

    def _bytes(self, parameter: Parameter, ranks: int) -> int:
        if parameter.dtype.startswith(BUFFERS):
            return 0
        shape = shard_shape(parameter.shape, ranks)
        if parameter.dtype not in ITEM_BYTES:  # packed values; their scales are not gathered
            return find_format(parameter.dtype).storages(shape)[0] * ranks
        return prod(shape) * ranks * ITEM_BYTES[parameter.dtype]

    def _allocate(self, size: int, name: str) -> Storage:
        storage = self.tape.allocate(ONE * size, name)
        self.tape.labels[storage.index - 1] = Label("gathered", name)
        return storage

    def _gather(self, unit: Unit) -> None:
        """``foreach_all_gather``: a cast copy of the shards, then the flat buffer.

        On one rank there is nothing to gather: shards are cast and copied out one by one.
        """
        if unit.flat is not None or unit.gathered or self.ranks(unit) == 1:
            return
        total = self._total(unit, unit.parameters)
        if not unit.parameters:
            return
        casts = (
            self._allocate(total // self.ranks(unit), "shards") if self.spec.param_dtype else None
        )
        unit.flat = self._allocate(total, "flat weights")
        del casts

    def _total(self, unit: Unit, parameters: Sequence[Parameter]) -> int:
        return sum(self._bytes(p, self.ranks(unit)) * unit.times.get(id(p), 1) for p in parameters)

    def _copy_out(self, unit: Unit) -> None:
        cast: Storage | None = None
        chunks: list[Storage] = []  # to be joined in the second dimension
        for parameter in unit.parameters:
            size = self._total(unit, (parameter,))
            if self.ranks(unit) == 1 and parameter.stored != parameter.dtype:
                cast = self._allocate(size, "shards")  # beside the cast of the one before
            unit.gathered.append(self._allocate(size, "weights"))
            if parameter.crosswise and self.ranks(unit) > 1:
                chunks.append(self._allocate(size, "chunks"))
        del cast, chunks

    def place(self, layer: int, count: int) -> int | str | None:
        """Blocks that are recorded by themselves: the first and the last."""
        self.last = count - 1
        return layer if layer in (0, count - 1) else None

    def keeps(self, place: int | str | None) -> bool:
        """Whether a block's weights stay until its way back."""
        return self.spec.keeps_last and place == self.last

    def outer_units(self, network: Network, *, held: bool = False) -> list[Unit]:
        """The root, and before it in turn what is wrapped apart (:attr:`ShardingSpec.apart`).

        ``held``: what is not freed between forward and backward is there already, its bytes static.
        """
        units: list[Unit] = []
        left = {id(p): p for _, p in network.named_parameters()}  # tied weights once
        for name, modules in wrapped_apart(network, self.spec, adapted=is_adapted(network)):
            own = [p for module in modules for _, p in module.named_parameters() if id(p) in left]
            unit = Unit(name, list({id(p): left.pop(id(p), p) for p in own}.values()))
            unit.stays = not network.frees_head if name == "head" else None
            units.append(unit)
            self.enclose(unit, modules)
        units.insert(0, Unit("root", list(left.values()), module=None if held else network))
        for unit in units:
            stays = unit.stays or (unit is units[0] and not self.spec.reshard_root)
            if held and (stays or not self.spec.reshard_after_forward):
                unit.parameters = []
        return units

    def share_units(self, network: Network, like: Network, units: Sequence[Unit]) -> None:
        """The modules of the same model with its adapters off are in the same units."""
        named = {unit.name: unit for unit in units}
        for name, modules in wrapped_apart(network, self.spec, adapted=is_adapted(like)):
            self.enclose(named[name], modules)

    def begin_model(self, root: Unit) -> None:
        """The root's ``pre_forward``."""
        self.ended = False
        self.begin_forward(root)

    def adopt(self, unit: Unit) -> None:
        """Whole gradients that earlier micro batches left, where they are not reduced each time.

        ``to_accumulated_grad_if_needed`` keeps them in the dtype of the reduction.
        """
        if not (self.accumulated and self.spec.no_sync):
            return
        for parameter in unit.parameters:
            if not parameter.trainable:
                continue
            dtype = self.spec.reduce_dtype or parameter.dtype
            size = parameter.numel * ITEM_BYTES[dtype]
            held = self.tape.before(ONE * size, ACCUMULATED)
            if dtype == parameter.dtype:
                rows = ONE * (parameter.numel // parameter.shape[-1])
                parameter.grad = Tensor(self.tape, held, rows, parameter.shape[-1], dtype)
            else:
                unit.accumulated.append(held)

    def begin_forward(self, unit: Unit) -> None:
        """``pre_forward``: gather and copy out; then the unit before gives up its flat buffer."""
        if unit.gathered or not unit.parameters:
            return
        self._gather(unit)
        self._copy_out(unit)
        # the buffer of the unit before still has a local name while this one is copied out
        self.previous = [unit.flat] if unit.flat is not None else []
        unit.flat = None

    def end_forward(self, unit: Unit) -> None:
        """``post_forward``: free what was gathered, unless it is kept for backward."""
        kept = not self.spec.reshard_after_forward
        if not (kept if unit.stays is None else unit.stays):
            unit.gathered = []
        self.order.append(unit)

    def complete(self, unit: Unit, out: Tensor) -> Tensor:
        """Its modules have run, or the model has ended without some of them
        (``_force_complete_incomplete_states``)."""
        unit.entered = False
        unit.waiting.clear()
        if self.tape.rerun is None:  # ``post_forward`` does nothing on the way back
            self.end_forward(unit)
        if self.ended:  # it has a forward of its own, whose end frees the flat buffer
            self.previous.clear()
        return self.leave(unit, out)

    def end_model(self, root: Unit) -> None:
        """The root's ``post_forward`` frees the last flat buffer and keeps the root's weights.

        Backward needs them at once (``_lazy_init``: ``_auto_reshard_after_forward``), unless it was
        told to free them.
        """
        if root.parameters:
            self.order.append(root)
        if self.spec.reshard_root and self.spec.reshard_after_forward:
            root.gathered = []
        self.ended = True
        self.previous.clear()

    def begin_backward(self, unit: Unit) -> None:
        """``pre_backward``: gather (unless that was done ahead), then gather the next one."""
        if not unit.parameters:
            return
        if unit.reduced:
            self._begin_again(unit)
        if not unit.gathered:
            self._gather(unit)
            self._copy_out(unit)
            unit.flat = None
        calls = [index for index, each in enumerate(self.order) if each is unit]
        unit.turns += 1
        index = calls[-min(unit.turns, len(calls))]
        if index > 0 or self.ran_again:  # then the pass before ended with the last of them
            ahead = self.order[index - 1]
            if not ahead.gathered:
                self._gather(ahead)

    def unshard(self, unit: Unit) -> None:
        """``FSDPModule.unshard``, outside of a forward: nothing waits for the flat buffer."""
        self._gather(unit)
        self._copy_out(unit)
        unit.flat = None

    def accumulate(self, unit: Unit, parameter: Parameter, *, reduces: bool) -> None:
        """A backward of a part of the unit: its gradient is added up in the dtype of the
        reduction (``to_accumulated_grad_if_needed``), and reduced with the last such part.

        The weights stay gathered; what was scattered waits for the rest of the unit's.
        """
        grad, parameter.grad = parameter.grad, None
        if grad is None:
            return
        if unit.part is None:
            unit.part = ops.to(grad, self.spec.reduce_dtype or grad.dtype)
        del grad
        if not reduces:
            return
        parameter.grad, unit.part = unit.part, None
        self._reduce(unit)
        unit.scattered[id(parameter)] = parameter.grad
        parameter.grad = None

    def _begin_again(self, unit: Unit) -> None:
        """An earlier call of its modules has a way back of its own: to what is reduced it adds."""
        unit.reduced = False
        unit.shards = {id(p): p.grad for p in unit.parameters if p.grad is not None}
        for parameter in unit.parameters:
            parameter.grad = None

    def end_backward(self, unit: Unit) -> None:
        """``post_backward``: free the weights, reduce and scatter the gradients."""
        if unit.reduced or not unit.parameters:
            return
        unit.reduced = True
        unit.gathered = []
        self._reduce(unit)
        for parameter in unit.parameters:
            parameter.grad = unit.scattered.pop(id(parameter), None) or parameter.grad

    def _recycle(self, _unit: Unit) -> None:
        """Flat gradients of units before go when the next one's are reduced."""
        self.scattered.clear()

    def groups(self, _block: Module) -> list[list[Parameter]]:
        """Groups of weights that a block is gathered in, where they are more than one."""
        return []

    def _reduce(self, unit: Unit) -> None:
        trained = [p for p in unit.parameters if p.grad is not None]
        grads = [parameter.grad for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        self._recycle(unit)
        if not grads:
            return
        ranks = self.ranks(unit)
        dtype = self.spec.reduce_dtype or trained[0].dtype
        orig = trained[0].stored
        unit.across = None
        _last = grads[-1] if ranks > 1 else None  # ``foreach_reduce``: the variable of its loop
        _chunks = None  # ... and what it cut last
        for place, parameter in enumerate(trained):
            if parameter.crosswise and ranks > 1:
                _chunks = grads[place]
                grads[place] = ops.copy(_chunks) if _chunks is not None else None
        if unit.accumulated:  # ``accumulate_unsharded_grad_if_needed``: added and gone before
            grads.clear()
        flat = self._total(unit, trained) // ITEM_BYTES[trained[0].dtype] * ITEM_BYTES[dtype]
        self.scattered.append(self._allocate(flat, "flat gradients"))
        del grads
        unit.accumulated.clear()
        shard = self._allocate(flat // ranks, "reduced gradients")
        if ranks == 1 and (unit.experts or self.divides):  # no collective divides them
            divided = self._allocate(flat, "divided gradients")
            del divided
        if self.spec.dp_replicate > 1:  # ``AllReduceState``
            if unit.name in OUTER:
                unit.across = shard
            else:  # of every layer that the block stands for
                self.tape.cached.append(Tensor(self.tape, shard, ONE, 1, dtype))
        if dtype != orig:
            shard = self._allocate(
                flat // ranks // ITEM_BYTES[dtype] * ITEM_BYTES[orig], "reduced gradients"
            )
        self.tape.labels[shard.index - 1] = Label("gradients", "parameters")
        if self.spec.offload == "params":
            return  # CPUOffloadPolicy copies shards of gradients to the host
        if self.accumulated and not self.spec.no_sync:
            return
        held = Tensor(self.tape, shard, ONE, 1, orig)
        for parameter in trained:
            parameter.grad = unit.shards.pop(id(parameter), held)

    def finish(self, units: Sequence[Unit]) -> None:
        """The callback at the end: the root, and units whose input asked for no gradient."""
        for unit in units:
            self.end_backward(unit)
            unit.flat = None  # ``finalize_backward``: gathered ahead, and nobody came for it
        self.scattered.clear()
        for unit in units:
            unit.across = None

    def enclose(self, unit: Unit, modules: Sequence[Module]) -> None:
        """Make modules one unit: gathered before the first of them runs, left after the last.

        ``fully_shard([a, b])``: ``_register_group_forward_hooks``. Where the first module's inputs
        ask for no gradient, nothing marks where the way back leaves the unit, and it is reduced at
        the end.
        """
        for module in modules:
            self._enclose(unit, module, {id(each) for each in modules})

    def _enclose(self, unit: Unit, module: Module, all_of_them: set[int]) -> None:
        forward = module.forward
        run: Callable[..., Tensor] = getattr(forward, "bare", forward)  # of another recording

        def enclosed(*args: Any) -> Tensor:
            if not unit.waiting:
                unit.waiting |= all_of_them
            self.begin_forward(unit)
            given = [self._given(unit, arg) if isinstance(arg, Tensor) else arg for arg in args]
            unit.entered = True
            out = run(*given)
            unit.waiting.discard(id(module))
            return out if unit.waiting else self.complete(unit, out)

        vars(enclosed)["bare"] = run
        module.forward = enclosed

    def _given(self, unit: Unit, x: Tensor) -> Tensor:
        """``cast_forward_inputs``, and the way back leaves the unit here."""
        if self.spec.param_dtype:
            x = ops.to(x, self.spec.param_dtype)
        return x if unit.entered else self.enter(unit, x)[0]

    def enter(self, unit: Unit, *inputs: Tensor) -> list[Tensor]:
        """Mark where the way back leaves the unit: when the gradients of all inputs are there."""
        seen = [x.alias() for x in inputs]
        fsdp = self

        def apply(*grads: Tensor | None) -> tuple[Tensor | None, ...]:
            fsdp.end_backward(unit)
            return grads

        ops.record(seen, "post_backward", inputs, apply)
        return seen

    def leave(self, unit: Unit, x: Tensor) -> Tensor:
        """Mark where the way back enters the unit."""
        seen = x.alias()
        fsdp = self

        def apply(grad: Tensor) -> tuple[Tensor | None, ...]:
            fsdp.begin_backward(unit)
            return (grad,)

        ops.record([seen], "pre_backward", [x], apply)
        return seen
