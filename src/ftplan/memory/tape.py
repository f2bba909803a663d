"""A tape of what is allocated and freed while a network runs forward and backward.

The calculator does what PyTorch does, with sizes in place of numbers. A :class:`Tensor` has a
size and a dtype but no values; when its last reference goes, its bytes are freed, as in PyTorch,
because Python counts references here just as it does there. Every operation (:mod:`ops`) says
what autograd keeps for the way back, and :func:`backward` walks the graph in autograd's order.
What comes out is a tape of events: so many bytes come alive, so many bytes are freed.

Sizes are kept as expressions in the batch (:class:`Size`), so a tape is recorded once for a
network and a way of training it, and is then played for any micro batch and sequence length.
Each event is rounded up to 512 bytes, the granularity of PyTorch's caching allocator
(c10/cuda/CUDACachingAllocator.cpp, ``kMinBlockSize``).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field
from sys import getrefcount
from typing import Any, Literal, NamedTuple, Protocol

from ftplan.dataclass import dataclass
from ftplan.memory.env import Environment

__all__ = [
    "BATCH",
    "CHUNK",
    "CROSSED",
    "NOTHING",
    "ONE",
    "PART",
    "SCORES",
    "SEQ",
    "SQUARE",
    "TOKENS",
    "Kind",
    "Label",
    "Node",
    "Parameter",
    "Phases",
    "Played",
    "Product",
    "Rerun",
    "Segment",
    "Size",
    "Storage",
    "Tape",
    "Tensor",
    "backward",
    "fit",
]

BLOCK_BYTES = 512
ITEM_BYTES = {
    "fp64": 8, "int64": 8, "fp32": 4, "int32": 4, "bf16": 2, "fp16": 2, "int16": 2,
    "int8": 1, "bool": 1, "fp8": 1,
}  # fmt: skip


class Size(tuple[int, ...]):
    """A number of elements or bytes, as coefficients of what the batch is made of.

    The basis is (1, s, b, b s, b s^2, s^2, c, r, b^2) with b the micro batch (sequences), s the
    sequence length (tokens), c the tokens of one chunk of the loss, and r a rank's part of the
    tokens where a sequence is split over ranks (b s / t).
    """

    __slots__ = ()

    # written out, because a step makes hundreds of sizes

    def __add__(self, other: object) -> Size:
        assert isinstance(other, Size)
        a, b, c, d, e, f, g, r, t = self
        h, i, j, k, m, n, o, q, u = other
        return Size((a + h, b + i, c + j, d + k, e + m, f + n, g + o, r + q, t + u))

    def __mul__(self, factor: object) -> Size:
        assert isinstance(factor, int)
        a, b, c, d, e, f, g, r, t = self
        k = factor
        return Size((a * k, b * k, c * k, d * k, e * k, f * k, g * k, r * k, t * k))

    __rmul__ = __mul__

    def alone(self) -> Size:
        """The same for a batch of one sequence: b is 1."""
        one, s, b, bs, bss, ss, c, r, bb = self
        return Size((one + b + bb, s + bs, 0, 0, 0, bss + ss, c, r, 0))

    def at(self, point: Sequence[int]) -> int:
        """The value where the basis has the values ``point`` (see :func:`basis`)."""
        return sum(a * x for a, x in zip(self, point, strict=True))


def basis(micro: int, seq_len: int, chunk: int = 0, parts: int = 1) -> tuple[int, ...]:
    """The values of the basis for a micro batch, sequence length, loss chunk (tokens), and into
    how many parts a sequence is split."""
    tokens, square = micro * seq_len, seq_len * seq_len
    part = micro * -(-seq_len // parts)
    crossed = micro * micro
    return (1, seq_len, micro, tokens, micro * square, square, min(chunk, tokens), part, crossed)


NOTHING = Size((0,) * 9)
ONE, SEQ, BATCH, TOKENS, SCORES, SQUARE, CHUNK, PART, CROSSED = (
    Size(int(i == j) for j in range(9)) for i in range(9)
)


@dataclass(frozen=True, slots=True)
class Label:
    """What a storage is, for the terms of the answer."""

    group: str
    """``activations``, ``gradients``, ``logits``, ``temporary`` ...: a group of the contract."""
    name: str
    """The part of the block, or else the operation, that made it."""


class Segment(NamedTuple):
    """A run of events ``[start, stop)`` of the tape."""

    name: str
    start: int
    stop: int
    layer: int = -1
    """Of a block in the model at full depth."""


Phases = list[tuple[str, list[Segment]]]
"""What a step plays, in order, by phase."""
Played = Callable[[Phases], Phases]
"""Puts what is gathered for a while between what was recorded."""
Kind = Literal["linear", "attention", "hidden"]
"""Of a product. ``hidden``: scores that a mask hides and the kernel does not compute, to be taken
off what it would compute without one."""


class Product(NamedTuple):
    """Matrix products: what a step computes, beside what it allocates."""

    event: int
    """How many events were on the tape before it."""
    rows: Size
    each: int | None
    """Floating point operations for each of the rows; None: nobody said."""
    kind: Kind
    again: bool
    """Computed before: by a checkpoint, or by the backward of a kernel that kept nothing."""
    name: str


class Joins(Protocol):
    """What attention does to keys and to values before it uses them."""

    @property
    def tokens(self) -> int:
        """How many come before those of the sequence."""
        ...

    @property
    def mask(self) -> Tensor | None:
        """What attention needs because of them."""
        ...

    def join(self, x: Tensor) -> Tensor:
        """Keys or values, longer."""
        ...


@dataclass(slots=True)
class Selected:
    """Outputs that a checkpointed block holds in order, until it runs again."""

    held: list[Tensor] = field(default_factory=list)
    again: bool = False
    count: int = 0
    """Products of matrices so far."""


@dataclass(slots=True)
class Tape:
    """Events in order. An event is ``+k`` where storage k-1 is born and ``-k`` where it dies."""

    env: Environment
    events: list[int] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    grad_enabled: bool = True
    saves: bool = True
    """Whether the graph keeps what it needs for the way back."""
    scope: str = "activations"
    module: str = ""
    """The part of the block that is running; empty: events are named by operation."""
    weight_cache: dict[int, Tensor] = field(default_factory=dict)
    """Autocast's casts of weights, by the weight: alive until autocast ends."""
    cached: list[Tensor] = field(default_factory=list)
    """What is held beside the graph: keys and values in the model's cache, inputs in hooks."""
    sequence: int = 0
    prefix: Joins | None = None
    """Learned keys and values before those of every layer (prefix tuning), or the model's cache."""
    escaped: list[Tensor] | None = None
    """Inside a checkpoint: what its functions hold by themselves, out of the checkpoint's sight."""
    attributes: list[object] = field(default_factory=list)
    """What functions keep as attributes: alive as long as the graph."""
    step_of: Callable[[Parameter], int | None] | None = None
    """A hook that takes each gradient as it arrives (an optimizer in backward, ZeRO): the bytes
    that it needs for a moment; None: it leaves the gradient where it is."""
    collecting: list[list[Tensor]] = field(default_factory=list)
    """Tensors that are leaves of the graph, held until their gradient arrives."""
    recalled: list[Tensor] | None = None
    """While a checkpoint runs again: what escaped the first time, in order."""
    rerun: Rerun | None = None
    """The checkpoint that runs again now, and stops where nothing more is saved."""
    known: dict[tuple[str, str], Label] = field(default_factory=dict)
    """Labels that were made before."""
    products: list[Product] = field(default_factory=list)
    stands_for: dict[Size, Size] = field(default_factory=dict)
    """Rows that are played for others beside themselves (chunks of a loss that are all alike)."""
    chunks_played: int = 1
    """How many chunks of the loss are on the tape for all there are; 0: the others are there too,
    as one."""
    own_linear: bool = False
    """``F.linear`` is a function of DeepSpeed's (``LinearFunctionForZeroStage3``): it keeps its
    input whatever trains. What PyTorch's hands out are views, which autograd will not add to in
    place; this one's are products."""
    viewed: Callable[[Parameter], Storage] | None = None
    """Where weights are gathered for a while: stands for a view that the graph keeps of one."""
    module_hook: Callable[[Tensor | None, Callable[[Any], Any]], Any] | None = None
    """Runs a function that is a module without weights, where modules have hooks."""
    selected: Selected | None = None
    """Inside a block that is checkpointed by operation."""
    asks_count: bool = False
    """Whether anything was done otherwise than it would be for another number of sequences."""

    @property
    def alone(self) -> bool:
        """Whether the micro batch is a single sequence; asked only where that decides."""
        self.asks_count = True
        return self.env.one_sequence

    def allocate(self, size: Size, name: str) -> Storage:
        """A storage of ``size`` bytes comes alive."""
        self.sizes.append(size)
        key = (self.scope, self.module or name)
        label = self.known.get(key)
        if label is None:
            label = self.known[key] = Label(*key)
        self.labels.append(label)
        index = len(self.sizes)
        self.events.append(index)
        return Storage(self, index)

    def before(self, size: Size, label: Label) -> Storage:
        """A storage that was there before the tape began: static bytes that may be freed on it."""
        self.sizes.append(size)
        self.labels.append(label)
        return Storage(self, len(self.sizes))

    def hold(self, x: Tensor) -> Held | None:
        """What a Python function keeps as an attribute instead of ``save_for_backward``.

        Checkpointing without reentry sees only the latter: the first forward's tensor stays. The
        function is a node of the graph, and keeps its attributes until the graph is gone.
        """
        if not self.saves and self.escaped is None:  # a checkpoint with reentry makes no graph
            return None
        self.attributes.append(x.alias())
        if self.recalled is not None:
            return Held(self.recalled.pop(0))
        if self.escaped is not None:
            self.escaped.append(x.alias())
            return None
        return Held(x)

    def tensor(self, rows: Size, width: int, dtype: str, name: str) -> Tensor:
        """A fresh tensor of ``rows`` x ``width`` elements."""
        storage = self.allocate(rows * (width * ITEM_BYTES[dtype]), name)
        return Tensor(self, storage, rows, width, dtype)

    def multiply(
        self, rows: Size, inner: int | None, width: int = 1, name: str = "linear", *,
        times: int = 1, kind: Kind = "linear", again: bool = False,
    ) -> Size:  # fmt: skip
        """Count ``times`` products of (rows x inner) and (inner x width), before they are made.

        ``hidden`` rows are twice as many: half of a square has no whole number of them. Returns
        the rows that were counted, for the way back.
        """
        if not times:
            return rows
        each = None if inner is None else (1 if kind == "hidden" else 2) * inner * width * times
        rows = self.stands_for.get(rows, rows) if self.stands_for else rows
        again = again or self.rerun is not None
        self.products.append(Product(len(self.events), rows, each, kind, again, name))
        return rows

    def product(self, rows: Size, width: int, dtype: str, name: str) -> Tensor:
        """What a product of matrices writes; checkpointing by operation keeps every second one."""
        if self.selected is None:
            return self.tensor(rows, width, dtype, name)
        self.selected.count += 1
        return self.kept(rows, width, dtype, name, keep=self.selected.count % 2 == 1)

    def kept(self, rows: Size, width: int, dtype: str, name: str, *, keep: bool = True) -> Tensor:
        """An output that checkpointing by operation keeps: fresh at first, the same one again."""
        selected = self.selected if keep else None
        if selected is not None and selected.again:
            return selected.held.pop(0)
        out = self.tensor(rows, width, dtype, name)
        if selected is not None:
            selected.held.append(out.alias())
        return out

    def leaf(self, parameter: Parameter) -> Tensor:
        """A weight as an operand: a view of static bytes."""
        *lead, width = parameter.shape
        rows = 1
        for extent in lead:
            rows *= extent
        tensor = Tensor(self, None, ONE * rows, width, parameter.dtype)
        tensor.requires_grad = parameter.trainable or parameter.joined
        tensor.node = parameter if tensor.requires_grad else None
        return tensor

    def runs(self, x: Tensor | None, forward: Callable[[Any], Any]) -> Any:
        """What is a function here and a module without weights there."""
        return forward(x) if self.module_hook is None else self.module_hook(x, forward)

    def view(self, parameter: Parameter) -> Tensor:
        """A view of a weight: what keeps it keeps the weight as it was when it was gathered."""
        tensor = self.leaf(parameter)
        if self.viewed is not None:
            tensor.storage = self.viewed(parameter)
        return tensor

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """Run without building a graph."""
        before, self.grad_enabled = self.grad_enabled, False
        try:
            yield
        finally:
            self.grad_enabled = before

    @contextmanager
    def unsaved(self) -> Iterator[None]:
        """Run with a graph that keeps nothing (inside a checkpoint)."""
        before, self.saves = self.saves, False
        try:
            yield
        finally:
            self.saves = before

    @contextmanager
    def counting(self, stands_for: dict[Size, Size]) -> Iterator[None]:
        """Products over some rows are played for those over others beside them."""
        before, self.stands_for = self.stands_for, stands_for
        try:
            yield
        finally:
            self.stands_for = before

    @contextmanager
    def scoped(self, group: str) -> Iterator[None]:
        """Name the group of the storages that are born inside."""
        before, self.scope = self.scope, group
        try:
            yield
        finally:
            self.scope = before


class Storage:
    """Bytes that are alive while something refers to them."""

    __slots__ = ("index", "tape")

    def __init__(self, tape: Tape, index: int) -> None:
        self.tape = tape
        self.index = index

    def __del__(self) -> None:
        self.tape.events.append(-self.index)


class Tensor:
    """A tensor without values: ``rows`` x ``width`` elements of ``dtype`` in a storage."""

    __slots__ = (
        "based", "dtype", "node", "output_nr", "part", "requires_grad", "rows", "storage", "tape",
        "width",
    )  # fmt: skip

    def __init__(
        self, tape: Tape, storage: Storage | None, rows: Size, width: int, dtype: str
    ) -> None:
        self.tape = tape
        self.storage = storage
        self.rows = rows
        self.width = width
        self.dtype = dtype
        self.requires_grad = False
        self.node: Node | Parameter | None = None
        self.output_nr = 0
        self.based = False
        """A view whose base is alive: autograd will not add to it in place."""
        self.part: Tensor | None = None
        """A rank's part of it, from which the way back gathers it again; None: it is kept."""

    @property
    def numel(self) -> Size:
        """Number of elements."""
        return self.rows * self.width

    def alias(self, rows: Size | None = None, width: int | None = None) -> Tensor:
        """The same storage, seen with another shape, outside autograd."""
        return Tensor(
            self.tape,
            self.storage,
            self.rows if rows is None else rows,
            self.width if width is None else width,
            self.dtype,
        )


class Parameter:
    """A weight, or any leaf that collects a gradient.

    Weights are static, so they are no part of the tape; their gradients are.
    ``dtype`` is a name of :mod:`ftplan.dtypes` (a weight may be stored in ``nf4``).
    """

    __slots__ = (
        "added",
        "crosswise",
        "dtype",
        "embedding",
        "expert",
        "fixed",
        "grad",
        "idle",
        "joined",
        "name",
        "pending",
        "reached",
        "shape",
        "stored",
        "sum",
        "trainable",
        "twice",
        "whole",
    )

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str, trainable: bool) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.trainable = trainable
        self.grad: Tensor | None = None
        self.stored = dtype
        """Dtype of its shard, where FSDP gathers it in another one."""
        self.pending = 0
        """Gradients that are still to come in this backward."""
        self.sum: Tensor | None = None
        """Gradients that have come and wait for the others."""
        self.reached = False
        """A gradient of it has come: an optimizer makes states for no other weight."""
        self.added = False
        """An adapter's: not counted as the model's own."""
        self.embedding = False
        """A table of embeddings."""
        self.expert = False
        """Of the experts of a mixture, which are spread over ranks by themselves."""
        self.fixed = False
        """Never trained, whatever the method: the real class asks for no gradient of it."""
        self.whole = shape
        """The shape before it was sharded."""
        self.crosswise = False
        """FSDP2 shards it by its second dimension, which comes first in ``shape``."""
        self.twice = False
        """FSDP2 reduces its gradient twice in a micro batch: another weight's gradient is a view of
        the second sum, and holds all of it."""
        self.idle = False
        """It takes gradients that no optimizer uses and nothing clears."""
        self.joined = False
        """It is not trained, but part of a flat parameter that asks for a gradient (FSDP1)."""

    def __deepcopy__(self, memo: dict[int, object]) -> Parameter:
        twin = object.__new__(Parameter)
        memo[id(self)] = twin
        for name in self.__slots__:
            setattr(twin, name, getattr(self, name))
        return twin

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


@dataclass(slots=True)
class Held:
    """A tensor that is kept out of autograd's sight."""

    tensor: Tensor


Grads = tuple["Tensor | None", ...]
Shape = tuple[Size, int, str]
"""Rows, width and dtype of a tensor."""


def saved(apply: Callable[..., Grads]) -> list[Tensor]:
    """What a step of the way back saves: the tensors that its function closes over."""
    found: list[Tensor] = []
    pending = [cell.cell_contents for cell in apply.__closure__ or ()]
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            pending += value
    return found


class Node:
    """One step of the way back: what it keeps, and what it does with the gradient."""

    __slots__ = (
        "apply", "buffers", "edges", "name", "pending", "recompute", "sequence", "shapes",
        "unpacks",
    )  # fmt: skip

    def __init__(
        self,
        tape: Tape,
        name: str,
        edges: Sequence[tuple[Node, int] | Parameter | None],
        apply: Callable[..., Grads],
        outputs: int = 1,
    ) -> None:
        tape.sequence += 1
        self.sequence = tape.sequence
        self.name = name
        self.edges = tuple(edges)
        self.apply: Callable[..., Grads] | None = apply
        self.buffers: list[Tensor | None] = [None] * outputs
        self.pending = 0
        self.shapes: tuple[Shape, ...] = ()
        """Of its inputs: what their gradients are brought to."""
        self.unpacks = False
        """What it saved is made again by a checkpoint, and dies as soon as it has been used."""
        self.recompute: Callable[[list[Tensor | None]], Rerun] | None = None
        """A checkpoint: builds the graph that stands in for this node."""

    @property
    def saves(self) -> bool:
        """Whether it asks for something that was saved."""
        return self.apply is not None and bool(saved(self.apply))


@dataclass(slots=True)
class Rerun:
    """A checkpointed function that is run again: its outputs with a graph, and when it runs.

    Without reentry it runs when a node of that graph first asks for what it saved, and it stops
    as soon as the last of that is there (torch/utils/checkpoint.py, ``_checkpoint_hook`` and
    ``_recomputation_hook``). The graph is recorded at once all the same: ``events`` of the run
    are set aside until then.
    """

    start: int
    """Where on the tape its events begin."""
    first: int
    """Its nodes have larger sequence numbers than this."""
    counted: int
    """Products that were counted before it."""
    deferred: bool
    stop: int = 0
    """Where on the tape the last tensor was saved."""
    outputs: list[Tensor] = field(default_factory=list)
    events: list[int] = field(default_factory=list)

    def note(self, apply: Callable[..., Grads], output: Tensor) -> None:
        """An operation was recorded: inputs are saved before it runs, what it makes after."""
        kept = [t.storage.index if t.storage else 0 for t in saved(apply)]
        if not kept:
            return
        events = output.tape.events
        self.stop = len(events)
        if output.storage is None or max(kept) >= output.storage.index:
            return
        born = output.storage.index
        if born in events[self.start :]:
            self.stop = self.start + events[self.start :].index(born)

    def end(self, tape: Tape) -> None:
        """Take the run's events off the tape: those until the last tensor is saved, and deaths."""
        tail = tape.events[self.stop :]
        late = {event for event in tail if event > 0 and -event in tail}
        self.events = tape.events[self.start : self.stop]
        self.events += [event for event in tail if abs(event) not in late]
        del tape.events[self.start :]
        made, tape.products[self.counted :] = tape.products[self.counted :], []
        for product in made:
            if product.event < self.stop:
                tape.products.append(product._replace(event=self.start))


def _count_dependencies(roots: Sequence[Node], since: int = 0) -> None:
    """How many gradients each node waits for, in the part of the graph made after ``since``."""
    seen = {id(root) for root in roots}
    stack = list(roots)
    for root in roots:
        root.pending = 0
    while stack:
        node = stack.pop()
        for edge in node.edges:
            if isinstance(edge, Parameter):
                edge.pending += 1
            elif edge is not None:
                child = edge[0]
                if child.sequence > since and id(child) not in seen:
                    seen.add(id(child))
                    child.pending = 0
                    stack.append(child)
                child.pending += 1


def _expand(node: Node, tape: Tape) -> tuple[list[Node], Rerun]:
    """Run a checkpointed function again: the graph that it leaves takes the place of ``node``.

    Returns the nodes of that graph whose gradients are all there, and those before it that were
    waiting for no more than to see what it does with its inputs.
    """
    assert node.recompute is not None
    run = node.recompute(node.buffers)
    roots: list[Node] = []
    for output, grad in zip(run.outputs, node.buffers, strict=True):
        if grad is None:
            continue
        root = output.node
        assert isinstance(root, Node), "a checkpointed block whose output asks for no gradient"
        root.buffers[output.output_nr] = grad
        roots.append(root)
    _count_dependencies(roots, run.first)
    for edge in node.edges:
        if isinstance(edge, Parameter):
            edge.pending -= 1
        elif edge is not None:
            edge[0].pending -= 1
            if edge[0].pending == 0 and any(edge[0].buffers):  # an input that it does not use
                roots.append(edge[0])
    node.buffers = []
    node.recompute = None
    run.outputs = []
    del output, grad
    if run.deferred:
        run.end(tape)
    return [root for root in roots if root.pending == 0], run


def _arrive(parameter: Parameter, grad: Tensor | None) -> None:
    """Gradients of one parameter are summed."""
    held = parameter.sum
    if grad is not None:
        parameter.sum = _own(grad) if held is None else _sum(held, grad)
    parameter.pending -= 1


def _settle(parameter: Parameter) -> None:
    """The last gradient to come makes ``.grad``, when only the sum is left of them."""
    if parameter.pending == 0 and parameter.sum is not None:
        total, parameter.sum = parameter.sum, None
        _accumulate(parameter, total)


def _accumulate(parameter: Parameter, grad: Tensor) -> None:
    """A parameter's gradient is the incoming buffer; an earlier one is added to in place."""
    tape = grad.tape
    parameter.reached = True
    if tape.step_of is not None and parameter.name:  # a leaf that is no weight has no hook
        taken = tape.step_of(parameter)
        if taken is not None:  # the hook lets go of the gradient
            needs = tape.allocate(ONE * taken, "gradient hook")
            del needs
            return
    if parameter.grad is None:
        parameter.grad = grad
        if grad.storage is not None and parameter.name:
            grad.tape.labels[grad.storage.index - 1] = Label("gradients", parameter.name)


def _validate(node: Node, results: list[Tensor | None]) -> None:
    """Gradients are summed where an input was broadcast, then cast (``validate_outputs``)."""
    for place, shape in enumerate(node.shapes):
        if node.edges[place] is not None:
            results[place] = fit(results[place], *shape)


def fit(grad: Tensor | None, rows: Size, width: int, dtype: str) -> Tensor | None:
    """A gradient brought to the shape and dtype of its input: summed where it was broadcast."""
    if grad is None:
        return None
    if not _as_many(grad, rows, width):
        grad = grad.tape.tensor(rows, width, grad.dtype, "gradient sum")
    if grad.dtype != dtype:
        grad = grad.tape.tensor(rows, width, dtype, "gradient cast")
    return grad


def _as_many(grad: Tensor, rows: Size, width: int) -> bool:
    if grad.width == width and grad.rows == rows:
        return True
    size = rows * width
    return grad.numel == size or (grad.numel.alone() == size.alone() and grad.tape.alone)


def _own(grad: Tensor) -> Tensor:
    """A gradient that somebody else holds too is copied (``AccumulateGrad::accumulateGrad``)."""
    # references here: backward's variable, two arguments, getrefcount's own
    return (
        grad
        if getrefcount(grad) <= 4
        else grad.tape.tensor(grad.rows, grad.width, grad.dtype, "gradient copy")
    )


def _sum(old: Tensor, new: Tensor) -> Tensor:
    """Two gradients of one tensor: added in place unless somebody else holds the first one."""
    # references here: the caller's list and variable, this argument, getrefcount's own
    if not old.based and getrefcount(old) <= 4 and getrefcount(old.storage) <= 2:
        return old
    return old.tape.tensor(old.rows, old.width, new.dtype, "gradient sum")


def backward(
    root: Tensor, grad: Tensor, on_node: Callable[[Node], None] = lambda _node: None
) -> None:
    """Walk the graph from ``root`` in autograd's order: the latest made node first.

    The references of the caller count: pass ``grad`` without keeping it
    (torch/csrc/autograd/engine.cpp, ``evaluate_function``). ``on_node`` sees each node before it
    runs.
    """
    start, tape = root.node, root.tape
    assert isinstance(start, Node), "backward from something without a graph"
    _count_dependencies([start])
    start.buffers[root.output_nr] = grad
    del grad, root
    ready = [(-start.sequence, start)]
    waiting: Rerun | None = None
    while ready:
        _, node = heapq.heappop(ready)
        on_node(node)
        if waiting and (node.recompute or (node.sequence > waiting.first and node.saves)):
            tape.events += waiting.events
            waiting = None
        if node.recompute is not None:
            roots, waiting = _expand(node, tape)
            for root_node in roots:
                heapq.heappush(ready, (-root_node.sequence, root_node))
            continue
        grads = node.buffers
        node.buffers = []
        assert node.apply is not None, f"{node.name} ran backward twice"
        results = list(node.apply(*grads))
        if node.unpacks:
            node.apply = None
        _validate(node, results)
        del grads
        node.apply = None  # what was saved for this node is released
        edges, node.edges = node.edges, ()
        assert len(edges) == len(results), node.name
        for place, edge in enumerate(edges):
            result, results[place] = results[place], None
            if edge is None:
                continue
            if isinstance(edge, Parameter):
                _arrive(edge, result)
                result = None
                _settle(edge)
                continue
            child, number = edge
            held = child.buffers[number]
            if result is not None:
                child.buffers[number] = result if held is None else _sum(held, result)
            held = None
            child.pending -= 1
            if child.pending == 0:
                heapq.heappush(ready, (-child.sequence, child))
        results = []
        result = None
