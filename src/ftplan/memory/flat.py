"""FSDP1 on the tape: one flat parameter for each unit, of which the weights are views.

Gathering makes one flat buffer and nothing beside it. Autograd reaches the flat parameter through
the split that made the views: it waits for the gradients of all weights of the unit, joins them
in one more flat buffer (weights that have none count as zeros there), and only then are weights
freed and the flat gradient reduced and scattered (torch/distributed/fsdp/_flat_param.py and
_runtime_utils.py, torch 2.13, traced: ``_use_unsharded_views``, ``_pre_backward_hook``,
``_post_backward_hook``, ``_reduce_grad``).
"""

from __future__ import annotations

from ftplan.errors import UnsupportedError
from ftplan.memory.fsdp import ACCUMULATED, Fsdp
from ftplan.memory.job import ShardingSpec
from ftplan.memory.tape import ITEM_BYTES, ONE, Label, Parameter, Tape, Tensor
from ftplan.memory.units import Unit

__all__ = ["Flat"]


class Flat(Fsdp):
    """Hooks of FullyShardedDataParallel (FSDP1)."""

    def __init__(self, tape: Tape, spec: ShardingSpec, *, accumulated: bool) -> None:
        super().__init__(tape, spec, accumulated=accumulated)
        self._last_adapter: dict[int, Unit] = {}
        """The adapter of a block whose turn comes last on the way back."""
        if spec.adapters_apart:
            tape.step_of = self._arrived

    def _arrived(self, parameter: Parameter) -> None:
        """The last adapter of a block gathers what comes next; gradients stay where they are."""
        unit = self._last_adapter.get(id(parameter))
        if unit is not None:
            self._ahead(unit)

    def _gather(self, unit: Unit) -> None:
        """``unshard``: a low-precision copy of the shard for a moment, then the flat buffer."""
        if unit.gathered:
            return
        total = self._total(unit, unit.parameters)
        copies = self.spec.param_dtype is not None or self.spec.offload == "params"
        shard = self._allocate(total // self.ranks(unit), "shards") if copies else None
        unit.gathered = [self._allocate(total, "flat weights")]
        del shard

    def begin_forward(self, unit: Unit) -> None:
        """``pre_forward``: the unit is gathered."""
        self._gather(unit)

    def begin_backward(self, unit: Unit) -> None:
        """``pre_backward``: gather this unit, and the next one ahead (``BACKWARD_PRE``).

        Where its adapters are units of their own, the next one is one of them, and the last of
        them gathers the block before.
        """
        self._gather(unit)
        if not self._apart(unit):
            self._ahead(unit)

    def _apart(self, unit: Unit) -> bool:
        return self.spec.adapters_apart and any(p.added for p in unit.parameters)

    def _ahead(self, unit: Unit) -> None:
        index = self.order.index(unit) if unit in self.order else 0
        if index > 0:
            self._gather(self.order[index - 1])

    def adopt(self, unit: Unit) -> None:
        """The flat gradient that earlier micro batches left, where they are not reduced each."""
        for parameter in unit.parameters:
            if self._apart(unit) and parameter.added and parameter.trainable:
                self._last_adapter[id(parameter)] = unit
                break
        if not self.spec.adapters_apart and any(p.trainable for p in unit.parameters):
            for parameter in unit.parameters:
                parameter.joined = parameter.dtype in ITEM_BYTES
        if self.accumulated and self.spec.no_sync:
            trained = self._joined(unit)
            if trained:
                size = ONE * self._total(unit, trained)
                unit.accumulated.append(self.tape.before(size, ACCUMULATED))

    def _joined(self, unit: Unit) -> list[Parameter]:
        """The weights that have a place in the flat gradient: the whole unit's, if any trains.

        Adapters may be units of their own (:attr:`ShardingSpec.adapters_apart`).
        """
        if not self.spec.adapters_apart:
            return unit.parameters
        added = [p for p in unit.parameters if p.added and p.trainable]
        own = [p for p in unit.parameters if not p.added]
        return [*added, *(own if any(p.trainable for p in own) else [])]

    def end_backward(self, unit: Unit) -> None:
        """``post_backward``: join, free the weights, reduce and scatter."""
        if unit.reduced:
            return
        unit.reduced = True
        trained = [p for p in unit.parameters if p.grad is not None]
        joined = self._joined(unit) if trained else []
        total = self._total(unit, joined)
        missing = self._total(unit, [p for p in joined if p.grad is None])
        zeros = self._allocate(missing, "zeros for frozen weights")
        flat = self._allocate(total, "flat gradients") if joined else None
        for parameter in trained:
            parameter.grad = None
        del zeros
        unit.gathered = []
        unit.accumulated.clear()
        if flat is None:
            return
        held, orig = joined[0].dtype, trained[0].stored
        if held not in ITEM_BYTES:
            raise UnsupportedError(
                "FSDP1 with quantised weights and adapters in one flat parameter",
                remedy="use version: 2, or a trainer that wraps adapters apart (PEFT's policy)",
            )
        dtype = self.spec.reduce_dtype or held
        cast = None
        if dtype != held:  # the hook holds what autograd computed until it returns
            cast = self._allocate(total // ITEM_BYTES[held] * ITEM_BYTES[dtype], "flat gradients")
        shard = self._allocate(
            total // self.ranks(unit) // ITEM_BYTES[held] * ITEM_BYTES[dtype], "reduced gradients"
        )
        del flat, cast
        if dtype != orig:
            shard = self._allocate(
                total // self.ranks(unit) // ITEM_BYTES[held] * ITEM_BYTES[orig],
                "reduced gradients",
            )
        self.tape.labels[shard.index - 1] = Label("gradients", "parameters")
        if self.spec.offload == "params" or (self.accumulated and not self.spec.no_sync):
            return
        kept = Tensor(self.tape, shard, ONE, 1, orig)
        for parameter in trained:
            parameter.grad = kept
