"""DeepSpeed's ZeRO on the tape: what becomes of gradients, and which weights are live.

Stages 1 and 2 keep all 2-byte weights; stage 3 gathers them a module at a time and lets go of
them only beyond ``stage3_max_live_parameters``. Every stage keeps an fp32 copy and fp32 states of
its own partition. From stage 2 on a gradient is copied into a bucket as it arrives, and only the
rank's own part outlives the bucket (deepspeed/runtime/zero/stage_1_and_2.py and stage3.py,
0.17: ``reduce_independent_p_g_buckets_and_remove_grads``, ``PartitionedParameterCoordinator``).
"""

from __future__ import annotations

from collections.abc import Sequence

from ftplan.memory.fsdp import Fsdp, Unit
from ftplan.memory.job import ShardingSpec
from ftplan.memory.tape import ITEM_BYTES, ONE, Label, Parameter, Tensor

__all__ = ["Zero", "bucket_bytes", "live_bytes", "partition"]


class Zero(Fsdp):
    """Hooks of ZeRO-2 and ZeRO-3: gradients are partitioned when a block's backward ends."""

    def adopt(self, unit: Unit) -> None:
        """ZeRO partitions the gradients of every micro batch."""

    def begin_forward(self, unit: Unit) -> None:
        """Weights are there (stage 2), or counted as live parameters (stage 3)."""

    def end_forward(self, unit: Unit) -> None:
        """Nothing is freed at the borders of blocks."""

    def begin_backward(self, unit: Unit) -> None:
        """Nothing is gathered at the borders of blocks."""

    def end_backward(self, unit: Unit) -> None:
        """Gradients move into the bucket; the rank's own part stays."""
        if unit.reduced:
            return
        unit.reduced = True
        trained = [p for p in unit.parameters if p.grad is not None]
        for parameter in trained:
            parameter.grad = None
        if not trained or self.accumulated or self.spec.offload in ("optimizer", "nvme"):
            return  # with offload the rank's own part goes to the host
        elements = sum(p.numel * unit.times.get(id(p), 1) for p in trained)
        dtype = trained[0].stored
        part = self.tape.allocate(
            ONE * (-(-elements // self.ranks) * ITEM_BYTES[dtype]), "own part"
        )
        self.tape.labels[part.index - 1] = Label("gradients", "parameters")
        held = Tensor(self.tape, part, ONE, 1, dtype)
        for parameter in trained:
            parameter.grad = held


def partition(parameter: Parameter, ranks: int) -> Parameter:
    """The fp32 part of one weight that a rank updates: flat, evenly cut."""
    part = Parameter(parameter.name, (-(-parameter.numel // ranks),), "fp32", True)
    part.embedding = parameter.embedding
    return part


def bucket_bytes(spec: ShardingSpec, trained: Sequence[tuple[Parameter, int, bool]]) -> int:
    """Flat buckets of gradients: two of them, so that one fills while the other is reduced."""
    elements = sum(parameter.numel * times for parameter, times, _ in trained)
    item = max((ITEM_BYTES[parameter.dtype] for parameter, _, _ in trained), default=2)
    return 2 * min(spec.bucket_elements, elements) * item


def live_bytes(spec: ShardingSpec, counted: Sequence[tuple[Parameter, int, bool]]) -> int:
    """Stage 3: weights that are gathered at once, with those fetched ahead."""
    plain = [(p, times) for p, times, _ in counted if p.dtype in ITEM_BYTES]
    elements = sum(parameter.numel * times for parameter, times in plain)
    item = max((ITEM_BYTES[parameter.dtype] for parameter, _ in plain), default=2)
    # weights below the threshold are gathered once and stay
    stay = sum(p.numel * times for p, times in plain if p.numel <= spec.persistence_elements)
    return (stay + min(elements - stay, spec.max_live_elements + spec.prefetch_elements)) * item
