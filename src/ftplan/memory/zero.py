"""DeepSpeed's ZeRO on the tape: buckets that fill and are reduced, and what a rank owns.

Stages 1 and 2 keep all weights; stage 3 gathers them a module at a time and lets go of them only
beyond ``stage3_max_live_parameters``. Every stage keeps an fp32 copy and fp32 states of its own
partition. Gradients are copied into a bucket of ``reduce_bucket_size`` elements, which is there
whole however few there are; a full bucket is copied once more to be reduced
(deepspeed/runtime/zero/stage_1_and_2.py and stage3.py, 0.19.8, traced: ``setup_buckets``,
``reduce_independent_p_g_buckets_and_remove_grads``, ``allreduce_bucket``,
``copy_grads_in_partition``, ``independent_gradient_partition_epilogue``, ``step``).

What a rank owns in stages 1 and 2 is an even cut of one flat buffer, but the gradients that it
keeps are whole ones of every weight that the cut touches: with a large table of embeddings more
than its share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from ftplan.dataclass import dataclass
from ftplan.memory.fsdp import ACCUMULATED, Fsdp
from ftplan.memory.gathering import Gathering
from ftplan.memory.hooks import BESIDE, SECOND, Hooks, Visit
from ftplan.memory.job import ShardingSpec
from ftplan.memory.nn import Network
from ftplan.memory.statics import weight_bytes
from ftplan.memory.tape import ITEM_BYTES, ONE, Label, Parameter, Played, Storage, Tape
from ftplan.memory.units import Unit

__all__ = ["Layout", "Zero", "layout_of", "partition", "step_temporaries"]

GRADIENTS = Label("gradients", "parameters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How what is trained is cut over the ranks, in elements; of the worst rank."""

    item: int
    """Bytes of one element of a gradient."""
    total: int
    """All that is trained."""
    part: int
    """One rank's partition."""
    owned: int
    """Whole gradients of the weights that a partition touches, of the worst rank (stages 1 and 2).
    Tables of embeddings are left out: their gradients come last."""
    first_owned: int
    """The same with them."""
    sub_group: int
    """Elements of a partition that are updated at once; stages 1 and 2: all of a kind."""
    slice: int
    """The largest slice of one gradient in a partition."""
    slices: int
    """Elements of the slices of one large gradient that are reduced together (stages 1 and 2)."""
    largest: int
    """The largest gradient."""
    quiet: int
    """Blocks before the last one whose gradients still go into the first bucket."""
    block: int
    """One block."""
    calm: int
    """Blocks whose gradients go into one later bucket, at least."""
    first: int
    """What fills the first bucket, where it fills when backward has ended (stage 1)."""
    gradients: tuple[Parameter, ...]
    """Whose gradients there may be, one entry for each tensor."""


def trained_in_order(network: Network) -> list[Parameter]:
    """What is trained, one entry for each tensor, as the model registers it."""
    own = {id(parameter) for _, parameter in network.named_parameters()}
    found = [p for _, p in network.all_parameters() if p.trainable]
    tables = [p for p in found if id(p) in own and p.embedding]
    blocks = [p for p in found if id(p) not in own]
    return [*tables, *blocks, *(p for p in found if id(p) in own and not p.embedding)]


def layout_of(network: Network, spec: ShardingSpec, second: Network | None = None) -> Layout:
    """The cut: weights of two dimensions and the others are groups of their own (Trainer).

    ``second``: what is trained with the first, in one wrapper around both.
    """
    trained = trained_in_order(network)
    if second is not None:
        trained += trained_in_order(second)
    ranks = spec.data_ranks
    kinds = [
        [p for p in trained if len(p.shape) > 1],
        [p for p in trained if len(p.shape) <= 1],
    ]
    groups = [[p.numel for p in kind] for kind in kinds]
    parts = [-(-sum(sizes) // (2 * ranks)) * 2 for sizes in groups]
    if spec.kind == "zero3":
        parts = [sum(-(-size // ranks) for size in sizes) for sizes in groups]
    owned, tables = [0] * ranks, [0] * ranks
    largest_slice = 0
    for kind, sizes, part in zip(kinds, groups, parts, strict=True):
        for start, parameter, size in zip([0, *accumulate(sizes)], kind, sizes, strict=False):
            largest_slice = max(largest_slice, min(size, part))
            for rank in range(start // part, min(ranks, (start + size - 1) // part + 1)):
                (tables if parameter.embedding else owned)[rank] += size
    return Layout(
        item=max((ITEM_BYTES[p.dtype] for p in trained), default=2),
        total=sum(map(sum, groups)),
        part=sum(parts),
        owned=max(owned),
        first_owned=max(map(sum, zip(owned, tables, strict=True))),
        sub_group=max(_sub_groups(groups, ranks, spec.sub_group_elements), default=0)
        if spec.kind == "zero3"
        else sum(parts),
        slice=-(-max(map(max, filter(None, groups)), default=0) // ranks)
        if spec.kind == "zero3"
        else largest_slice,
        slices=(spec.bucket_elements // max(1, parts[0]) + 1) * parts[0],
        largest=max(map(max, filter(None, groups)), default=0),
        quiet=_blocks(network, spec.bucket_elements, first=True),
        calm=_blocks(network, spec.bucket_elements, first=False),
        block=_block(network),
        first=_first_fill([*groups[0], *groups[1]], spec.bucket_elements),
        gradients=tuple(trained),
    )


def _blocks(network: Network, bucket: int, *, first: bool) -> int:
    """Blocks that are done while a bucket fills; the first one has the head and a block in it."""
    head = [p.numel for _, p in network.named_parameters() if p.trainable and not p.embedding]
    filled = sum(size for size in head if size <= bucket) if first else 0
    block = _block(network)
    if not block:
        return network.stages[-1].stack.count
    return max(0, (bucket - filled) // block - 1)


def _block(network: Network) -> int:
    stack = network.stages[-1].stack
    return sum(p.numel for p in stack.parameters() if p.trainable) // max(1, len(stack.kinds))


def _sub_groups(groups: Sequence[Sequence[int]], ranks: int, limit: int) -> Iterator[int]:
    """``_create_fp16_sub_groups``: weights until a group is full, the last of which fills it."""
    for sizes in groups:
        filled = 0
        for size in sizes:
            filled += -(-size // ranks)
            if filled >= limit:
                yield filled
                filled = 0
        yield filled


def _first_fill(sizes: Iterable[int], bucket: int) -> int:
    """Elements that are reduced at once the first time."""
    filled = 0
    for size in sizes:
        if filled and filled + size > bucket:
            break
        filled += size
    return filled


class Zero(Fsdp):
    """Hooks of ZeRO: each gradient goes into the bucket when it arrives, or at the end (stage 1).

    Stage 1 does it at the end unless ``overlap_comm`` is on, and then keeps its own part alone too.
    """

    by_module = True

    def __init__(
        self,
        tape: Tape,
        spec: ShardingSpec,
        layout: Layout,
        *,
        accumulated: bool,
        unseen: bool = False,
    ) -> None:
        super().__init__(tape, spec, accumulated=accumulated)
        self.layout = layout
        self.waits = spec.kind == "zero1" and not spec.overlap_comm
        """Gradients stay where they are until backward has ended."""
        self.units: list[Unit] = []
        self._unit_of: dict[int, Unit] = {}
        self._buckets: list[Storage] = []
        self._parts: list[Storage] = []
        self._filled = 0
        self._turn = self._quiet = 0
        self._begun = False
        self.unseen = unseen
        """There is a forward without a graph before each batch, which is not recorded."""
        self.input_grads = False
        """What the embedding returns asks for a gradient (``enable_input_require_grads``)."""
        self._hooks = Hooks(tape) if spec.kind == "zero3" else None
        self._whole: dict[int, Visit] = {}
        """Units as modules, which have others in them."""
        self._large: Parameter | None = None
        """Stage 3: whose gradient is larger than the bucket, and waits for the next one to come."""
        tape.step_of = self._arrive
        tape.own_linear = spec.kind == "zero3"

    @property
    def gathers(self) -> bool:
        """Weights are gathered as modules ask for them."""
        return self._hooks is not None

    def place(self, layer: int, count: int) -> int | str | None:
        """Blocks that are recorded by themselves: the first, the last, that of the first bucket.

        Those after it are ``quiet``: no bucket is reduced while they run backward.
        """
        if self.second:  # its gradients come when the bucket has begun
            return layer if layer in (0, count - 1) else None
        self._turn = max(0, count - 2 - self.layout.quiet)
        self._quiet = count - 2 - self._turn
        if layer in (0, self._turn, count - 1):
            return layer
        return "quiet" if layer >= self._turn - self.layout.calm else None

    def adopt(self, unit: Unit) -> None:
        """Know the unit of each gradient; stage 1 adds to those of earlier micro batches."""
        self.units.append(unit)
        if unit.name == "block":
            self._watch(unit, adapted=not self.again)
        for parameter in unit.parameters:
            self._unit_of[id(parameter)] = unit
            if self.waits and self.accumulated and parameter.trainable:
                parameter.grad = self.tape.leaf(parameter)

    def begin_forward(self, unit: Unit) -> None:
        """Stage 3 fetches weights as modules ask for them; a block is one that has none."""
        if self._hooks is not None and id(unit) in self._whole:
            asked = self.again and self.input_grads and unit.place == 0
            self._hooks.enter(self._whole[id(unit)], 1, asked=asked)
        self._mark(unit, fetches=True, forward=True)

    def end_forward(self, unit: Unit) -> None:
        """The module has ended."""
        self._mark(unit, fetches=False, forward=True)

    def _watch(self, unit: Unit, *, adapted: bool = True) -> None:
        if self._hooks is None:
            return
        model = BESIDE if self.beside else SECOND if self.second else 0
        self._hooks.run(model, adapted=not self.again)
        if id(unit) not in self._whole:
            self._whole[id(unit)] = self._hooks.watch(unit, model, adapted=adapted)

    def outer_units(self, network: Network, *, held: bool = False) -> list[Unit]:
        """The root alone: an engine gathers any model a module at a time."""
        own = {id(p): p for _, p in network.named_parameters()}  # tied weights once
        unit = Unit("root", list(own.values()), module=network)
        unit.place = -1 if held else None  # of no other
        return [unit]

    def share_units(self, network: Network, like: Network, units: Sequence[Unit]) -> None:
        """The layers around the blocks of the model with its adapters off have hooks too."""
        self._watch(self.outer_units(network, held=True)[0], adapted=False)

    def begin_model(self, root: Unit) -> None:
        """``_start_of_forward_hook``: the model is the first module, inside PEFT's if need be."""
        self._watch(root)
        if self._hooks is None:
            return
        if not self._begun:
            self._hooks.begin(self._whole[id(root)])
        self._begun = self.second  # the wrapper around both has one forward
        if not self.beside and any(p.added for p in self.layout.gradients):
            for _ in ("PeftModel", "LoraModel"):
                self._hooks.mark(self._hooks.nameless(), fetches=True, forward=True)
        self._mark(root, fetches=True, forward=True)

    def end_model(self, root: Unit) -> None:
        """The model has ended, and with it what it looked at of the modules inside."""
        self._mark(root, fetches=False, forward=True)

    def begin_backward(self, unit: Unit) -> None:
        """A gradient of its output wakes the module."""
        self._mark(unit, fetches=True, forward=False)

    def _mark(self, unit: Unit, *, fetches: bool, forward: bool) -> None:
        if self._hooks is not None and id(unit) in self._whole:
            self._hooks.mark(self._whole[id(unit)], fetches=fetches, forward=forward)

    def end_backward(self, unit: Unit) -> None:
        """Gradients have gone as they arrived, and weights with the last use of them."""
        if unit.place == self._turn > 0 and not self.waits:
            self._own_part()
        whole = self._whole.get(id(unit))
        if unit.name == "block" and self._hooks and whole and self._hooks.ends(whole):
            self._mark(unit, fetches=False, forward=False)

    def played(self, trained: Played | None = None) -> Played | None:
        """Stage 3: the live weights, which between two steps are those of the batch before too."""
        if self._hooks is None:
            return None
        self._hooks.unhook()
        before = trained if isinstance(trained, Gathering) else None
        batches = 2 if self.accumulated or before else 1
        return Gathering(self._hooks, self.spec, batches, self.unseen, before)

    def _arrive(self, parameter: Parameter) -> int | None:
        """A gradient is there: bytes needed to reduce a bucket now; None: it stays as it is."""
        self._fill_up()
        self._reduce_large()
        if self.waits:
            return None
        if self.spec.kind == "zero3" and parameter.numel > self.spec.bucket_elements:
            self._large = parameter
            return None
        filled = self._reduced_now(parameter)
        needs = filled * self.layout.item
        if filled and self.spec.offload in ("optimizer", "params", "nvme"):
            needs = max(needs, 8 * self.layout.slice)  # the norm is taken as gradients leave
        if filled and not self._repeats(parameter):
            self._named(ONE * needs, "gradients to reduce")  # gone before the rank's own are kept
            self._own_part(first=parameter.embedding)
            return 0
        return needs

    def _reduce_large(self) -> None:
        """Stage 3 scatters a gradient that is larger than the bucket from where it is."""
        if self._large is not None:
            self._large.grad = None
        self._large = None

    def _reduced_now(self, parameter: Parameter) -> int:
        """Elements that are copied and reduced as this gradient arrives.

        Between the first block and the last it is any gradient that fills the bucket, sooner or
        later: there each may be the one.
        """
        bucket, size = self.spec.bucket_elements, parameter.numel
        if size > bucket:  # ``allreduce_and_scatter``: ranks' slices until they fill a bucket
            return min(size, self.layout.slices)
        unit = self._unit_of.get(id(parameter))
        if unit is not None and unit.place == "quiet":
            return 0
        if unit is not None and unit.place == self._turn:  # those after it have gone before
            self._filled += self._quiet * self.layout.block
            self._quiet = 0
        if self._repeats(parameter):
            return bucket if self.layout.total > bucket else 0
        filled = self._filled if self._filled + size > bucket else 0
        self._filled += size - filled
        return filled

    def _repeats(self, parameter: Parameter) -> bool:
        """Whether what is recorded for this gradient is played for other layers too."""
        unit = self._unit_of.get(id(parameter))
        return unit is not None and unit is not self.units[0] and not isinstance(unit.place, int)

    def _fill_up(self) -> None:
        """The buckets come alive with the first gradient; stage 3 has one from the start."""
        if not self._buckets and self.spec.kind != "zero3" and not self._kept_bucket:
            for _ in range(2 if self.spec.overlap_comm else 1):
                size = ONE * (self.spec.bucket_elements * self.layout.item)
                self._buckets.append(self._named(size, "gradient bucket"))

    @property
    def _kept_bucket(self) -> bool:
        return self.waits and self.accumulated

    def _named(self, size: object, name: str) -> Storage:
        storage = self.tape.allocate(size, name)  # type: ignore[arg-type]
        self.tape.labels[storage.index - 1] = Label("gathered", name)
        return storage

    def _own_part(self, *, first: bool = False) -> None:
        """Stages 1 and 2: a buffer for every gradient that the partition touches.

        ``first``: when the first rank's gradients come, which may be more.
        """
        if self.spec.kind == "zero3" or self.spec.offload in ("optimizer", "params", "nvme"):
            return
        wanted = max(self.layout.owned, self.layout.first_owned if first else 0)
        there = self.layout.owned if self._parts else 0
        if wanted > there and len(self._parts) < 2:
            part = self.tape.allocate(ONE * ((wanted - there) * self.layout.item), "own part")
            self.tape.labels[part.index - 1] = GRADIENTS
            self._parts.append(part)

    def finish(self, units: Sequence[Unit]) -> None:
        """``independent_gradient_partition_epilogue``: what is left in the bucket is reduced."""
        self._reduce_large()
        if self.waits and self.layout.first <= self.spec.bucket_elements:
            self._drop_gradients()  # copied into the bucket first
        elements = self.layout.first if self.waits else min(self._left(), self.layout.total)
        self._named(ONE * (elements * self.layout.item), "gradients to reduce")
        self._own_part(first=True)
        if self.waits:
            self._drop_gradients()
        self._buckets.clear()
        if self.accumulated and not self.waits:
            self._parts.clear()  # added to the part of earlier micro batches

    def _left(self) -> int:
        repeated = any(unit.place is None for unit in self.units[1:])
        return self.spec.bucket_elements if repeated else self._filled

    def _drop_gradients(self) -> None:
        """Every gradient has gone into a bucket: those of the layers that are like these, too."""
        own = self._own_gradients()
        if not own:
            return
        size = sum(weight_bytes(p) for p in self.layout.gradients if p.reached)
        if not self.accumulated:
            size -= sum(weight_bytes(p) for p in own)
        for parameter in own:
            parameter.grad = None
        # of earlier micro batches, which were static until now; or those of the other layers
        self.tape.before(ONE * size, ACCUMULATED if self.accumulated else GRADIENTS)

    def _own_gradients(self) -> list[Parameter]:
        found = {id(p): p for unit in self.units for p in unit.parameters if p.grad is not None}
        return list(found.values())


def partition(parameter: Parameter, ranks: int) -> Parameter:
    """The fp32 part of one weight that a rank updates: flat, evenly cut."""
    part = Parameter(parameter.name, (-(-parameter.numel // ranks),), "fp32", True)
    part.embedding = parameter.embedding
    return part


def step_temporaries(spec: ShardingSpec, layout: Layout, optimizer_bytes: int) -> int:
    """Bytes that the step needs beside the gradients that a rank owns.

    The norm of each gradient in fp64; a flat copy of the partition and the fp32 gradient made
    from it (stage 3: of one sub-group at a time); then the optimizer's own.
    """
    if spec.offload in ("optimizer", "params", "nvme"):
        return 0
    part = layout.sub_group
    owned = 0 if spec.kind == "zero3" else max(layout.owned, layout.first_owned)
    return max(
        8 * layout.slice,
        (layout.item + 4) * part,
        4 * part + optimizer_bytes - owned * layout.item,
    )
