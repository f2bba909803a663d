"""One micro batch on tape: each distinct block once, forward and backward, cut into segments.

The blocks of a stack that are alike leave the same events, so the tape holds a short network: one
block of each kind, in order, between the real embedding and the real head. Its events are cut at
the borders of the blocks; :mod:`replay` then plays the segments as often as the model has layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ftplan.memory import ops
from ftplan.memory.checkpointing import checkpoint_all
from ftplan.memory.env import Environment
from ftplan.memory.families.native import Native
from ftplan.memory.flat import Flat
from ftplan.memory.fsdp import Fsdp, Unit
from ftplan.memory.job import ShardingSpec
from ftplan.memory.log_probs import log_probs
from ftplan.memory.loss import classify_loss, compute_loss, model_outputs
from ftplan.memory.nn import Module, Network, Shared, Stack, Stage
from ftplan.memory.pipeline import PipelineStage
from ftplan.memory.tape import (
    BATCH,
    ITEM_BYTES,
    TOKENS,
    Label,
    Node,
    Parameter,
    Size,
    Storage,
    Tape,
    Tensor,
    backward,
)
from ftplan.memory.tasks import Objective
from ftplan.memory.zero import Zero, layout_of

__all__ = [
    "Recording", "Segment", "record_evaluation", "record_scoring", "record_serving", "record_step",
]  # fmt: skip


BOUNDARY = Label("activations", "block inputs")
HANDED = Label("activations", "tokens that a layer picked")
BORDER = Label("temporary", "gradient between blocks")
PREVIOUS = Label("logits", "the batch before")


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of events ``[start, stop)`` of the tape."""

    name: str
    start: int
    stop: int


@dataclass(slots=True)
class Recording:
    """The events of a micro batch, and the order in which a model of full depth runs them."""

    tape: Tape
    forward: list[Segment] = field(default_factory=list)
    autocast_exit: list[Segment] = field(default_factory=list)
    """Per forward segment: what dies when autocast ends."""
    backward: list[Segment] = field(default_factory=list)
    """Per forward segment: its way back."""
    forward_order: list[int] = field(default_factory=list)
    """Indices into ``forward``, one for each block and each part between blocks."""
    before_order: list[int] = field(default_factory=list)
    """The same for what runs before the step, without a graph (GRPO's log-probabilities)."""
    once: list[int] = field(default_factory=list)
    """The same for what is there before the first micro batch of a pipeline."""
    tail_order: list[int] = field(default_factory=list)
    """The same for what a task does with the model's outputs after autocast has ended."""
    buffers: list[Storage] = field(default_factory=list)
    """What a pipeline holds from its first micro batch to its last."""
    regained: dict[int, Segment] = field(default_factory=dict)
    """Per forward segment: what the caller still holds when its way back has let go of it."""
    batch: list[Tensor] = field(default_factory=list)
    """What the loop holds until the step has ended: the batch, and those fetched with it."""
    outputs: list[Tensor] = field(default_factory=list)
    """The model's outputs, where the caller keeps them until backward has ended."""
    dropped: list[Segment] = field(default_factory=list)
    """Per forward segment: what dies when backward has ended: with the graph, with hooks, or with
    the model's cache, where the caller keeps that."""
    after: Segment = Segment("", 0, 0)
    """What else dies then."""
    saved: set[int] = field(default_factory=set)
    """Storages that are alive between forward and backward."""
    carried: list[Segment] = field(default_factory=list)
    """Per forward segment: what of it the loop still holds when the next batch enters."""
    replaced: list[Segment] = field(default_factory=list)
    """The same, where the next batch's outputs take its place."""

    def phases(self, *, under_way: int = 0) -> list[tuple[str, list[Segment]]]:
        """Forward and backward of the model at full depth, as segments in order.

        ``under_way``: other micro batches of a pipeline whose forward is done before, and whose
        backward comes after.
        """
        order = self.forward_order
        everything = [*order, *self.tail_order] if self.carried else []
        forward = [self.carried[index] for index in everything]
        forward += [self.forward[index] for index in order]
        forward += [self.autocast_exit[index] for index in order]
        forward += [self.replaced[index] for index in everything]
        forward += [self.forward[index] for index in self.tail_order]
        phases = [("forward", forward)]
        if self.before_order:
            phases.insert(0, ("scoring", [self.forward[index] for index in self.before_order]))
        if self.backward:
            backward: list[Segment] = []
            order = list(reversed(order + self.tail_order))
            for index in order:
                backward.append(self.backward[index])
                if index in self.regained:
                    backward.append(self.regained[index])
            dropped = [self.dropped[index] for index in order]
            phases.append(("backward", [*backward, *dropped, self.after]))
        if under_way:
            phases.insert(0, ("warm-up", forward * under_way))
        if self.once:
            phases.insert(0, ("receive", [self.forward[index] for index in self.once]))
        return phases


@dataclass(slots=True)
class _Region:
    """What was recorded between two borders; its nodes have sequence numbers up to ``last``."""

    name: str
    last: int
    segment: int


class _Recorder:
    def __init__(self, network: Network, env: Environment) -> None:
        self.network = network
        self.recording = Recording(Tape(env))
        self.tape = self.recording.tape
        self.order = self.recording.forward_order
        """Which of the recording's orders is being recorded."""
        self.regions: list[_Region] = []
        self.casts: list[dict[int, Tensor]] = []
        self.caches: list[list[Tensor]] = []
        """Per forward segment: what is held beside the graph."""
        self.attributes: list[list[object]] = []
        """The same of what the graph's functions hold as attributes."""
        self.start = 0
        self.fsdp: Fsdp | None = None
        self.units: list[Unit] = []
        self.place: int | str | None = None
        """Of the block that is recorded next (:meth:`Fsdp.place`)."""
        self.blocks = 0
        """Blocks of the stages before: every n-th of all is checkpointed, not of a stage's."""
        self.states: _States | None = None
        """Every hidden state, where the caller asked for them."""
        self.critic_states: _States | None = None
        self.copies: list[Module] = []
        """Blocks beside the network's own: the real model holds them, and with them their
        gradients, so no garbage collection may take them while the step is recorded."""

    def shard(self, fsdp: Fsdp) -> None:
        """Make the root a unit; blocks become one as they run."""
        self.fsdp = fsdp
        own = {id(p): p for _, p in self.network.named_parameters()}  # tied weights once
        root = Unit("root", list(own.values()))
        if fsdp.spec.wrap == "model":
            for stage in self.network.stages:
                root.times.update(stage.stack.times())
                root.parameters += stage.stack.parameters()
        self.units.append(root)
        fsdp.adopt(root)

    @contextmanager
    def apart(self, network: Network, *, beside: bool) -> Iterator[None]:
        """Run another network without a graph, sharded like the first.

        ``beside``: it is a model of its own, whose root was gathered once and has stayed so (its
        bytes are static): FSDP2 reshards a root in backward, and it runs none. Else it is the
        first one with its adapters off, whose root may still be gathered.
        """
        before = (self.network, self.fsdp, self.units)
        blocks, self.blocks = self.blocks, 0
        self.network = network
        if self.fsdp is not None:
            order = list(self.fsdp.order)
            self.units = [Unit("root", [])] if beside else self.units[:1]
        yield
        self.network, fsdp, self.units = before
        self.blocks = blocks
        if fsdp is not None:
            fsdp.order = order

    def begin_root(self) -> None:
        """Gather what belongs to no block."""
        if self.fsdp is not None:
            self.fsdp.begin_model(self.units[0])

    def end_root(self, loss: Tensor) -> Tensor:
        """The model's forward is over."""
        if self.fsdp is None:
            return loss
        self.fsdp.end_model(self.units[0])
        return self.fsdp.leave(self.units[0], loss)

    def run_block(self, block: Module, x: Tensor, shared: Shared, *, checkpointed: bool) -> Tensor:
        """A block's forward, as a unit of FSDP where the job is sharded."""
        run = _checkpoint if checkpointed else _run
        if self.fsdp is None or self.fsdp.spec.wrap == "model":
            return run(block, x, shared)
        unit = Unit("block", [p for _, p in block.named_parameters()], place=self.place)
        self.units.append(unit)
        self.fsdp.adopt(unit)
        self.fsdp.begin_forward(unit)
        out = run(block, self.fsdp.enter(unit, x), shared)
        self.fsdp.end_forward(unit)
        return self.fsdp.leave(unit, out)

    def cut(self, name: str) -> int:
        """End a forward segment here."""
        stop = len(self.tape.events)
        self.recording.forward.append(Segment(name, self.start, stop))
        self.start = stop
        index = len(self.recording.forward) - 1
        self.regions.append(_Region(name, self.tape.sequence, index))
        self.casts.append(self.tape.weight_cache)
        self.caches.append(self.tape.cached)
        self.attributes.append(self.tape.attributes)
        self.tape.weight_cache, self.tape.cached, self.tape.attributes = {}, [], []
        return index

    def end_step(self, shared: Shared) -> None:
        """The caller lets go of what the model returned, and of what every block was handed."""
        own = self.network if isinstance(self.network, Native) else None
        outlive = own is not None and own.outputs_outlive_step
        both = zip(self.caches, self.attributes, strict=True)
        self.recording.dropped = [self._drop() if outlive else self._drop(*held) for held in both]
        start = len(self.tape.events)
        if not outlive:
            self.recording.outputs.clear()
        shared.zeros.clear()
        self.recording.after = Segment("outputs dropped", start, len(self.tape.events))
        if own is not None and own.meets_previous:
            self._carry()

    def _carry(self) -> None:
        """What the loop holds of this batch is there when the next one enters."""
        recording, tape = self.recording, self.tape
        self.attributes[-1] += recording.outputs
        copies: list[list[Storage]] = []
        for held in self.attributes:
            start = len(tape.events)
            tensors = [t for t in held if isinstance(t, Tensor)]
            storages = {t.storage.index: t.storage for t in tensors if t.storage is not None}
            copies.append([])
            for index in storages:
                copies[-1].append(tape.allocate(tape.sizes[index - 1], "previous batch"))
                tape.labels[-1] = PREVIOUS
            recording.carried.append(Segment("previous batch", start, len(tape.events)))
        for storages_of in copies:
            start = len(tape.events)
            storages_of.clear()
            recording.replaced.append(Segment("previous batch goes", start, len(tape.events)))

    def end_autocast(self) -> None:
        """Autocast drops its casts of weights, those of each block when the model is deep.

        Unless the caller keeps what the model returned, its cache goes too.
        """
        tape = self.tape
        for casts, cached in zip(self.casts, self.caches, strict=True):
            held = [] if tape.env.keep_outputs else cached
            self.recording.autocast_exit.append(self._drop(casts, held))
        self.start = len(tape.events)

    def _drop(self, *held: dict[int, Tensor] | list[Tensor] | list[object]) -> Segment:
        start = len(self.tape.events)
        for tensors in held:
            tensors.clear()
        return Segment("dropped", start, len(self.tape.events))


def record_step(
    network: Network,
    env: Environment,
    *,
    checkpoint_every: int = 0,
    input_grads: bool = False,
    share: PipelineStage | None = None,
    accumulated: bool = False,
    ahead: int = 0,
    sharding: ShardingSpec | None = None,
    objective: Objective | None = None,
    step_of: Callable[[Parameter], int | None] | None = None,
) -> Recording:
    """Forward, loss and backward of one micro batch.

    ``checkpoint_every`` n > 0 recomputes every n-th block. ``input_grads`` makes the embedding's
    output ask for a gradient (``enable_input_require_grads``). ``share``: a rank's of a
    pipeline, where what enters may come from another rank, and what leaves go to one.
    ``accumulated``: gradients of earlier micro batches are there already. ``ahead``: further micro
    batches that the loop has fetched. ``sharding``: by FSDP or ZeRO. ``objective``: the task,
    where it is another one than a language model's own loss. ``step_of``: a hook that takes each
    parameter's gradient as it arrives (an optimizer that steps in backward), and needs so many
    bytes for it; None: it leaves the gradient.
    """
    recorder = _Recorder(network, env)
    tape = recorder.tape
    tape.step_of = step_of
    if sharding is not None:
        recorder.shard(_sharded(network, tape, sharding, accumulated=accumulated))
    elif isinstance(network, Native) or accumulated:
        _hold_gradients(network, tape, idle=not accumulated)
    if objective is not None and objective.before:
        _score_before(recorder, objective)
    if share is not None and share.buffered:
        _receive(recorder, share)
    batch = [*_inputs(tape), *network.inputs(tape)]
    further = [
        tape.tensor(t.rows * ahead, t.width, t.dtype, "batches ahead") for t in batch if ahead
    ]
    recorder.recording.batch = batch + further
    before = _left_over(recorder, objective, ahead) if objective is not None else []
    values = _run_critic(recorder, objective, accumulated) if objective is not None else []
    received = share is not None and not share.first
    if input_grads and not received:
        _ask_for_input_grads(network)
    input_grads = input_grads or received
    recorder.begin_root()
    recorder.order.append(recorder.cut("inputs"))
    shared = Shared(checkpointed=checkpoint_every > 0)
    x: Tensor | None = None
    if objective is not None and objective.all_states:
        recorder.states = _States(recorder)
    for number, stage in enumerate(network.stages):
        if x is not None:
            shared.memory = x
        x = _run_stage(recorder, stage, shared, checkpoint_every, input_grads and number == 0)
    assert x is not None
    if share is not None and not share.last:
        root = recorder.end_root(x)
        del x
        recorder.order.append(recorder.cut("the stage returns"))
        recorder.end_autocast()
    elif objective is None or objective.inside:
        states = [x]
        del x
        root = _loss(recorder, states, objective)
        shared.memory = None
        root = recorder.end_root(root)
        recorder.order.append(recorder.cut("the model returns"))
        recorder.end_autocast()
    else:
        held = [x]
        del x
        held = _outputs(recorder, held, objective)
        shared.memory = None
        held.append(recorder.end_root(held.pop()))
        held += values
        values.clear()
        before.clear()
        if recorder.critic_states is not None:
            recorder.order.append(recorder.cut("the critic's outputs"))
            recorder.critic_states.drop()
        recorder.order.append(recorder.cut("the model returns"))
        recorder.end_autocast()
        root = _task_loss(recorder, held, objective)
    recorder.recording.saved = _alive(tape)
    if root.requires_grad:
        _run_backward(recorder, root)
    recorder.end_step(shared)
    return recorder.recording


def _receive(recorder: _Recorder, share: PipelineStage) -> None:
    """Buffers for what other ranks send: those of inputs that have come are block inputs.

    torch/distributed/pipelining/stage.py 2.13: ``_prepare_forward_infra`` and
    ``_setup_backward_recv_info`` make one for each micro batch.
    """
    count = 0 if share.first else share.micro_batches - share.in_flight
    count += 0 if share.last else share.micro_batches
    table = recorder.network.child(recorder.network.embedding_names[0]).weight  # type: ignore[attr-defined]
    size = TOKENS * (table.shape[-1] * ITEM_BYTES[table.dtype] * count)
    with recorder.tape.scoped("temporary"):
        recorder.recording.buffers.append(recorder.tape.allocate(size, "receive buffers"))
    recorder.recording.once.append(recorder.cut("receive buffers"))


def _sharded(network: Network, tape: Tape, spec: ShardingSpec, *, accumulated: bool) -> Fsdp:
    if spec.kind == "fsdp":
        kind = Flat if spec.version == 1 else Fsdp
        return kind(tape, spec, accumulated=accumulated)
    return Zero(tape, spec, layout_of(network, spec), accumulated=accumulated)


def record_serving(network: Network, env: Environment) -> Recording:
    """One prompt through the model without a graph; logits of its last token only."""
    recorder = _Recorder(network, env)
    tape = recorder.tape
    order = recorder.order
    with tape.no_grad():
        inputs = [tape.tensor(TOKENS, 1, "int64", "token ids")]
        order.append(recorder.cut("inputs"))
        shared = Shared()
        x: Tensor | None = None
        for stage in network.stages:
            if x is not None:
                shared.memory = x
            x = _run_stage(recorder, stage, shared, 0, False)
        assert x is not None
        with tape.scoped("logits"):
            logits = network.head(x.alias(rows=BATCH))
            del logits, x
        order.append(recorder.cut("last logits"))
    recorder.end_autocast()
    recorder.recording.saved = _alive(tape)
    del inputs, shared
    return recorder.recording


def record_scoring(network: Network, env: Environment, completion: int) -> Recording:
    """A batch through a model without a graph, its hidden states kept; then log-probabilities.

    As PPO scores a rollout: with all logits of the reference, or a head of one number a token.
    """
    recorder = _Recorder(network, env)
    tape = recorder.tape
    recorder.states = _States(recorder)
    with tape.no_grad():
        inputs = _inputs(tape)
        recorder.order.append(recorder.cut("inputs"))
        shared = Shared()
        x: Tensor | None = None
        for stage in network.stages:
            x = _run_stage(recorder, stage, shared, 0, False)
        assert x is not None
        with tape.scoped("logits"):
            logits = network.head(x)
            del x
            scores = log_probs(logits, completion, how="rows", scaled=True)
        recorder.order.append(recorder.cut("scores"))
        del logits, scores
    recorder.end_autocast()
    recorder.recording.saved = _alive(tape)
    del inputs
    return recorder.recording


def record_evaluation(network: Network, env: Environment) -> Recording:
    """A batch that is evaluated: loss and logits without a graph, the logits kept for metrics."""
    # Liger leaves out the logits in training only (liger_kernel: skip_logits = self.training)
    loss = "full" if env.loss == "fused" else env.loss
    env = replace(env, training=False, keep_outputs=True, loss=loss)
    recorder = _Recorder(network, env)
    tape = recorder.tape
    with tape.no_grad():
        inputs = [*_inputs(tape), *network.inputs(tape)]
        recorder.order.append(recorder.cut("inputs"))
        shared = Shared()
        x: Tensor | None = None
        for stage in network.stages:
            if x is not None:
                shared.memory = x
            x = _run_stage(recorder, stage, shared, 0, False)
        assert x is not None
        states = [x]
        del x
        loss_value = _loss(recorder, states, None)
        recorder.order.append(recorder.cut("the model returns"))
    recorder.end_autocast()
    recorder.recording.saved = _alive(tape)
    del inputs, loss_value
    recorder.end_step(shared)
    return recorder.recording


def _ask_for_input_grads(network: Network) -> None:
    """``enable_input_require_grads``: what the word embedding returns asks for a gradient."""
    for name in network.embedding_names:
        embedding = network.child(name)
        if "prompt_encoder" in embedding.children:
            embedding = embedding.children["base_layer"]

        def asked(
            tape: Tape, rows: Size = TOKENS, forward: Callable[..., Any] = embedding.forward
        ) -> Tensor:
            out: Tensor = forward(tape, rows)
            if not out.requires_grad:
                _ask_for_gradient(out)
            return out

        embedding.forward = asked
    for module in network.further_inputs():

        def asked_too(x: Tensor, forward: Callable[..., Any] = module.forward) -> Tensor:
            out: Tensor = forward(x)
            if not out.requires_grad:
                _ask_for_gradient(out)
            return out

        module.forward = asked_too


def _ask_for_gradient(x: Tensor) -> None:
    """Make ``x`` the first node of the graph: its gradient arrives outside of the blocks.

    What collects a gradient (``AccumulateGrad``) holds the tensor until then; what passes from
    block to block is held by the blocks anyway (:func:`_run_stage` drops it here).
    """
    held = [x.alias()]
    x.tape.collecting.append(held)

    def apply(_grad: Tensor) -> tuple[Tensor | None, ...]:
        held.clear()
        return ()

    x.requires_grad, x.node = True, Node(x.tape, "input gradient", [], apply)


def _hold_gradients(network: Network, tape: Tape, *, idle: bool = False) -> None:
    """Gradients of earlier micro batches: static bytes, added to in place.

    ``idle``: only those that nothing clears.
    """
    for _, parameter in network.all_parameters():
        if parameter.trainable and (parameter.idle or not idle):
            parameter.grad = tape.leaf(parameter)


def _inputs(tape: Tape) -> list[Tensor]:
    ring = tape.env.ring
    names = ["token ids", "labels"]
    names += ["padding mask"] if tape.env.padding_mask else []
    names += ["positions"] if tape.env.packed or ring > 1 else []
    names += ["shifted labels"] if ring > 1 else []
    rows = TOKENS * ring  # ``context_parallel`` makes buffers shorter, not their storages
    with tape.scoped("activations"):
        return [tape.tensor(rows, 1, "int64", name) for name in names]


def _alive(tape: Tape) -> set[int]:
    alive: set[int] = set()
    for event in tape.events:
        alive.add(event) if event > 0 else alive.discard(-event)
    return alive


def _run_stage(
    recorder: _Recorder,
    stage: Stage,
    shared: Shared,
    checkpoint_every: int,
    input_grads: bool,
) -> Tensor:
    """Blocks with what stands around them."""
    order = recorder.order
    x = stage.enter(recorder.tape, shared)
    if input_grads and not x.requires_grad:
        _ask_for_gradient(x)
    for held in recorder.tape.collecting:
        if held and held[0].storage is x.storage:
            held.clear()
    _name_boundary(x)
    if recorder.states is None:  # else the outputs hold it longer
        shared.held.append(x.alias())
    order.append(recorder.cut("embedding"))
    if stage.stack.shared:
        x = _run_shared(recorder, stage.stack, x, shared)
        x = stage.leave(x, shared)
        shared.held.clear()
        order.append(recorder.cut("final norm"))
        return x
    seen: dict[tuple[Hashable, ...], int] = {}
    picks = _Picks(shared)
    for layer, kind in enumerate(stage.stack.pattern):
        if stage.stack.kinds[kind].skipped:
            continue
        number = recorder.blocks + layer
        checkpointed = checkpoint_every > 0 and number % checkpoint_every == 0
        recorder.place = recorder.fsdp.place(layer, stage.stack.count) if recorder.fsdp else None
        # the model's forward has a name for the first block's input; what it hands to all blocks
        # of a kind dies with the first of them, which runs last on the way back; and the last
        # block to use what the first one made for all is the second
        alike = (kind, x.requires_grad)
        first = all(known[:2] != alike for known in seen)
        place = min(layer, 1 if shared.bias is None else 2 * max(1, checkpoint_every))
        key = (*alike, first, checkpointed, place, recorder.place, picks.fresh)
        handed_on = stage.stack.hands_on or len(recorder.network.stages) > 1
        last = handed_on and _is_last(stage.stack, layer)
        if key in seen and not last and not picks.lets_go(key):
            order.append(seen[key])
            picks.again(key)
            if recorder.states is not None:
                recorder.states.again(seen[key])
            continue
        block = stage.stack.kinds[kind]
        if any(known[0] == kind for known in seen):
            block = copy.deepcopy(block)  # a layer of its own: its gradients are too
            recorder.copies.append(block)
        _name_parts(block, recorder.tape)
        entering = x.storage.index if x.storage is not None else 0
        # the caller's name for the input lives until the block returns
        x = recorder.run_block(block, x, shared, checkpointed=checkpointed)
        x = recorder.network.after_block(layer, x)
        _name_boundary(x)
        picks.note(key)
        seen[key] = recorder.cut("block")
        order.append(seen[key])
        if recorder.states is not None:
            recorder.states.keep(seen[key], entering, x)
    recorder.blocks += stage.stack.count
    shared.forget()
    if not checkpoint_every:
        recorder.tape.prefix = None
    x = stage.leave(x, shared)
    shared.held.clear()
    order.append(recorder.cut("final norm"))
    return x


class _Picks:
    """Tokens that a block picks for those after it (GLM-5), which its checkpoint does not keep.

    The next block's does, and lets go of them on its way back: that block is recorded after each
    recorded one that picks, so that each is played as often as the other.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._makers: set[tuple[Hashable, ...]] = set()
        self._before: tuple[Hashable, ...] = ()
        self._recorded = False

    @property
    def fresh(self) -> bool:
        """The block before has picked."""
        return self._before in self._makers

    def lets_go(self, key: tuple[Hashable, ...]) -> bool:
        """The block before was recorded and picked, and is none that is played many times."""
        return self.fresh and self._recorded and key != self._before

    def note(self, key: tuple[Hashable, ...]) -> None:
        """A block was recorded. What it picked has one name, whichever block did."""
        picked = self._shared.picked
        if picked is not None and picked.storage is not None:
            index = picked.storage.index - 1
            if picked.tape.labels[index] != HANDED:
                self._makers.add(key)
                picked.tape.labels[index] = HANDED
        self._before, self._recorded = key, True

    def again(self, key: tuple[Hashable, ...]) -> None:
        """A block like an earlier one."""
        self._before, self._recorded = key, False


class _States:
    """All hidden states (``output_hidden_states=True``), which the model's outputs hold.

    Where the graph keeps the input of a block too, it is counted there, and again from the moment
    the block's way back lets go of it.
    """

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder
        self._held: Tensor | None = None
        self._shape: tuple[Size, int, str] | None = None
        self._segment = 0
        self._kept: dict[int, bool] = {}
        """Per forward segment of a block: whether its input has a tensor of its own here."""
        self._own = 0
        self.count = 0

    def keep(self, segment: int, entering: int, x: Tensor) -> None:
        """A block has run on the storage ``entering``."""
        tape = self._recorder.tape
        self._shape = (x.rows, x.width, x.dtype)
        self._kept[segment] = entering > 0 and -entering in tape.events
        if self._kept[segment] and self._held is None:
            self._held = tape.tensor(*self._shape, "hidden states")
            self._segment = self._recorder.cut("hidden states")
        self.again(segment)

    def again(self, segment: int) -> None:
        """A block like an earlier one has run."""
        self.count += 1
        if self._kept.get(segment):
            self._own += 1
            self._recorder.order.append(self._segment)

    def drop(self) -> None:
        """The outputs go, before anything runs backward."""
        if self._held is not None:
            self._held = None
            segment = self._recorder.cut("hidden states dropped")
            self._recorder.order += [segment] * self._own
        self._own = 0

    def return_them(self) -> None:
        """The outputs reach the caller, in fp32 where mixed precision casts them."""
        recorder, recording = self._recorder, self._recorder.recording
        if self._shape is None:
            return
        tape = recorder.tape
        rows, width, dtype = self._shape
        if tape.env.outputs_to_fp32 and dtype != "fp32":
            cast = tape.tensor(rows, width * (self.count + 1), "fp32", "hidden states")
            recording.batch.append(cast)
            recorder.order.append(recorder.cut("hidden states cast"))
            self.drop()
            return
        recorder.order.append(recorder.cut("outputs"))
        for segment, own in self._kept.items():
            if not own:
                start = len(tape.events)
                recording.batch.append(tape.tensor(rows, width, dtype, "hidden states"))
                recording.regained[segment] = Segment("held", start, len(tape.events))
        recorder.start = len(tape.events)
        if self._held is not None:
            recording.batch.append(self._held)


def _left_over(recorder: _Recorder, objective: Objective, ahead: int) -> list[Tensor]:
    """What PPO's loop still names when a micro batch begins.

    The scores of the rollout, always; after another micro batch of the same step its outputs,
    until the model has run, and the softmax of its logits, until the next one is made.
    """
    if not objective.all_states:
        return []
    tape, recording = recorder.tape, recorder.recording
    network, steps = recorder.network, ahead + 1
    vocabulary = network.head_parameters()[0].shape[0]
    computed = tape.env.autocast or network.head_parameters()[0].dtype
    dtype = "fp32" if tape.env.outputs_to_fp32 else computed
    rows = BATCH * objective.completion
    with tape.scoped("logits"):
        recording.batch.append(tape.tensor(rows * steps, vocabulary, "fp32", "scores"))
        if not ahead:
            return []
        recording.batch.append(tape.tensor(rows, vocabulary, dtype, "softmax of the last batch"))
        layers = sum(stage.stack.count for stage in network.stages)
        hidden = network.head_parameters()[0].shape[-1]
        return [
            tape.tensor(TOKENS, vocabulary, dtype, "outputs of the last batch"),
            tape.tensor(TOKENS, hidden * (layers + 1), dtype, "outputs of the last batch"),
        ]


def _run_critic(recorder: _Recorder, objective: Objective, accumulated: bool) -> list[Tensor]:
    """The value of every token, with a graph of its own; its hidden states go before the policy's
    outputs are there."""
    critic = objective.critic
    if critic is None:
        return []
    if accumulated:
        _hold_gradients(critic, recorder.tape)
    shared = Shared()
    x: Tensor | None = None
    states = recorder.states = _States(recorder)
    with recorder.apart(critic, beside=True):
        for stage in critic.stages:
            x = _run_stage(recorder, stage, shared, 0, False)
        assert x is not None
        values = critic.head(x)
    del x
    recorder.critic_states = states
    recorder.order.append(recorder.cut("values"))
    return [values]


def _run_shared(recorder: _Recorder, stack: Stack, x: Tensor, shared: Shared) -> Tensor:
    """Every layer as it is: gradients of one weight meet, and its cast is made once."""
    for block in stack.kinds:
        _name_parts(block, recorder.tape)
    for kind in stack.pattern:
        x = recorder.run_block(stack.kinds[kind], x, shared, checkpointed=False)
        _name_boundary(x)
    recorder.recording.forward_order.append(recorder.cut("shared blocks"))
    return x


def _name_boundary(x: Tensor) -> None:
    """What passes from block to block has one name, whichever block made it."""
    if x.storage is not None:
        x.tape.labels[x.storage.index - 1] = BOUNDARY


def _is_last(stack: Stack, layer: int) -> bool:
    return stack.pattern[layer] not in stack.pattern[layer + 1 :]


def _name_parts(block: Module, tape: Tape) -> None:
    """Let storages be named after the part of the block that makes them."""
    for name, part in block.children.items():
        vars(part).pop("forward", None)  # a copied block must not run the original's parts
        if hasattr(part, "forward"):
            part.forward = _naming(part.forward, name, tape)


def _naming(forward: Callable[..., Any], name: str, tape: Tape) -> Callable[..., Any]:
    def named(*args: Any, **kwargs: Any) -> Any:
        before, tape.module = tape.module, name
        out = forward(*args, **kwargs)
        tape.module = before
        return out

    return named


def _run(block: Module, x: Tensor, shared: Shared) -> Tensor:
    out: Tensor = block.forward(x, shared)
    return out


def _checkpoint(block: Module, x: Tensor, shared: Shared) -> Tensor:
    given = copy.copy(shared)

    def run(x: Tensor) -> list[Tensor]:
        handed = shared if x.tape.rerun is None else copy.copy(given)
        before = {id(tensor) for tensor in handed.made()}
        out = _run(block, x, handed)
        return [out, *(tensor for tensor in handed.made() if id(tensor) not in before)]

    offload = x.tape.env.offload_checkpoints
    out, *_ = checkpoint_all(run, x, given.given(), trains=_trains(block), offload=offload)
    return out


def _trains(block: Module) -> bool:
    return any(parameter.trainable for _, parameter in block.named_parameters())


def _loss(recorder: _Recorder, states: list[Tensor], objective: Objective | None) -> Tensor:
    """Logits and loss, as the model class computes them inside its forward.

    ``states`` holds the last hidden states, which go when that forward returns.
    """
    tape = recorder.tape
    logits: Tensor | None
    with tape.scoped("logits"):
        x = states.pop()
        if objective is not None and objective.kind == "labels":
            loss, logits = classify_loss(recorder.network, x)
        else:
            loss, logits = compute_loss(recorder.network, x)
        del x
        if logits is not None and tape.env.outputs_to_fp32:
            given, logits = logits, ops.to(logits, "fp32")
            others = [  # every layer's, while what the model returned is still held
                tape.tensor(cached.rows, cached.width, "fp32", "returned cache in fp32")
                for index in recorder.order
                for cached in recorder.caches[index]
                if recorder.network.returns_tuples and cached.dtype != "fp32"
            ]
            del others, given
    if logits is not None and tape.env.keep_outputs:
        recorder.recording.outputs.append(logits)
    del logits
    recorder.order.append(recorder.cut("loss"))
    return loss


def _outputs(recorder: _Recorder, states: list[Tensor], objective: Objective) -> list[Tensor]:
    """What the model returns where the loss is computed outside it; it empties ``states``."""
    network = recorder.network
    with recorder.tape.scoped("logits"):
        if isinstance(network, Native):
            outputs = network.returned(network.outputs(states.pop()))
        else:
            scored = 0 if objective.all_states else objective.completion
            x = states.pop()
            outputs = [model_outputs(network, x, scored, states=objective.states)]
            del x
    recorder.order.append(recorder.cut("logits"))
    return outputs


def _task_loss(recorder: _Recorder, held: list[Tensor], objective: Objective) -> Tensor:
    """The trainer's loss function: it holds the model's outputs until it returns."""
    tape, recording = recorder.tape, recorder.recording
    recorder.order = recording.tail_order
    with tape.scoped("logits"):
        if tape.env.outputs_to_fp32:
            held[0] = ops.to(held[0], "fp32")
    if recorder.states is not None:
        recorder.states.return_them()

    def again(network: Network) -> Tensor:
        recorder.order.append(recorder.cut("the policy's part"))
        return _run_again(recorder, network, objective)

    with tape.scoped("logits"):
        loss = objective.loss(recorder.network, held, again)
    if tape.env.keep_outputs:
        recording.outputs += held
    if recorder.states is not None:  # the names of the loop's body outlive the optimizer's step
        recording.batch += held
    held.clear()
    recorder.order.append(recorder.cut("the task's loss"))
    return loss


def _run_again(recorder: _Recorder, network: Network, objective: Objective) -> Tensor:
    """Another network's outputs on the same batch; the caller has turned the graph off."""
    shared = Shared()
    x: Tensor | None = None
    with recorder.apart(network, beside=objective.beside):
        with recorder.tape.scoped("activations"):
            recorder.begin_root()
            for stage in network.stages:
                if x is not None:
                    shared.memory = x
                x = _run_stage(recorder, stage, shared, 0, False)
        assert x is not None
        outputs = model_outputs(network, x, objective.completion, states=objective.states)
        del x
        outputs = recorder.end_root(outputs)
    if recorder.tape.env.outputs_to_fp32:
        outputs = ops.to(outputs, "fp32")
    recorder.order.append(recorder.cut("the other model's logits"))
    return outputs


def _score_before(recorder: _Recorder, objective: Objective) -> None:
    """Log-probabilities that are made before the step: a forward with nothing else alive."""
    if objective.other is None:
        return
    recorder.order = recorder.recording.before_order
    with recorder.tape.no_grad(), recorder.tape.scoped("logits"):
        held = [_run_again(recorder, objective.other, objective)]
        objective.scores(held.pop())
    recorder.order.append(recorder.cut("log-probabilities"))
    recorder.order = recorder.recording.forward_order


def _run_backward(recorder: _Recorder, root: Tensor) -> None:
    tape, recording = recorder.tape, recorder.recording
    regions = recorder.regions
    current = len(regions) - 1
    cuts: dict[int, Segment] = {}
    start = len(tape.events)

    def cut(region: _Region) -> None:
        nonlocal start
        stop = len(tape.events)
        cuts[region.segment] = Segment(region.name, start, stop)
        recorder.caches[region.segment] += tape.cached
        start, tape.cached = stop, []

    def on_node(node: Node) -> None:
        nonlocal current
        while current > 0 and node.sequence <= regions[current - 1].last:
            cut(regions[current])
            current -= 1
            for grad in node.buffers:  # whichever block made it, it has one name
                if grad is not None and grad.storage is not None:
                    tape.labels[grad.storage.index - 1] = BORDER

    backward(root, tape.tensor(root.rows, root.width, root.dtype, "output gradient"), on_node)
    if recorder.fsdp is not None:
        recorder.fsdp.finish(recorder.units)
    cut(regions[current])
    empty = Segment("", 0, 0)
    recording.backward = [cuts.get(i, empty) for i in range(len(recording.forward))]
