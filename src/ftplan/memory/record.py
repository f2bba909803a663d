"""One micro batch on tape: each distinct block once, forward and backward, cut into segments.

The blocks of a stack that are alike leave the same events, so the tape holds a short network: one
block of each kind, in order, between the real embedding and the real head. Its events are cut at
the borders of the blocks; :mod:`replay` then plays the segments as often as the model has layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

from ftplan.memory import ops
from ftplan.memory.checkpointing import checkpoint
from ftplan.memory.env import Environment
from ftplan.memory.families.native import Native
from ftplan.memory.fsdp import Fsdp, Unit
from ftplan.memory.job import ShardingSpec
from ftplan.memory.loss import classify_loss, compute_loss, model_outputs
from ftplan.memory.nn import Module, Network, Shared, Stack, Stage
from ftplan.memory.tape import (
    BATCH,
    ONE,
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
from ftplan.memory.zero import Zero

__all__ = ["Recording", "Segment", "record_evaluation", "record_serving", "record_step"]


BOUNDARY = Label("activations", "block inputs")
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
    tail_order: list[int] = field(default_factory=list)
    """The same for what a task does with the model's outputs after autocast has ended."""
    outputs: list[Tensor] = field(default_factory=list)
    """The model's outputs, where the caller keeps them until backward has ended."""
    after: Segment = Segment("", 0, 0)
    """What dies when backward has ended."""
    saved: set[int] = field(default_factory=set)
    """Storages that are alive between forward and backward."""
    carried: list[Segment] = field(default_factory=list)
    """Per forward segment: what of it the loop still holds when the next batch enters."""
    dropped: list[Segment] = field(default_factory=list)
    """The same, where the next batch's outputs take its place."""

    def phases(self) -> list[tuple[str, list[Segment]]]:
        """Forward and backward of the model at full depth, as segments in order."""
        order = self.forward_order
        everything = [*order, *self.tail_order] if self.carried else []
        forward = [self.carried[index] for index in everything]
        forward += [self.forward[index] for index in order]
        forward += [self.autocast_exit[index] for index in order]
        forward += [self.dropped[index] for index in everything]
        forward += [self.forward[index] for index in self.tail_order]
        phases = [("forward", forward)]
        if self.before_order:
            phases.insert(0, ("scoring", [self.forward[index] for index in self.before_order]))
        if self.backward:
            backward = [self.backward[index] for index in reversed(order + self.tail_order)]
            phases.append(("backward", [*backward, self.after]))
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
        self.graphs: list[list[Tensor]] = []
        """Per forward segment: what the graph holds until it goes."""
        self.start = 0
        self.fsdp: Fsdp | None = None
        self.units: list[Unit] = []
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

    def begin_root(self) -> None:
        """Gather what belongs to no block."""
        if self.fsdp is not None:
            self.fsdp.begin_forward(self.units[0])

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
        unit = Unit("block", [p for _, p in block.named_parameters()])
        self.units.append(unit)
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
        self.tape.weight_cache = {}
        self.graphs.append(self.tape.graph)
        self.tape.graph = []
        return index

    def end_step(self, shared: Shared) -> None:
        """The caller lets go of what the model returned, and of what every block was handed."""
        start = len(self.tape.events)
        own = self.network if isinstance(self.network, Native) else None
        if own is None or not own.outputs_outlive_step:
            self.recording.outputs.clear()
        shared.let_go()
        self.recording.after = Segment("outputs dropped", start, len(self.tape.events))
        if own is not None and own.meets_previous:
            self._carry()

    def _carry(self) -> None:
        """What the loop holds of this batch is there when the next one enters."""
        recording, tape = self.recording, self.tape
        self.graphs[-1] += recording.outputs
        copies: list[list[Storage]] = []
        for held in self.graphs:
            start = len(tape.events)
            storages = {t.storage.index: t.storage for t in held if t.storage is not None}
            copies.append([])
            for index in storages:
                copies[-1].append(tape.allocate(tape.sizes[index - 1], "previous batch"))
                tape.labels[-1] = PREVIOUS
            recording.carried.append(Segment("previous batch", start, len(tape.events)))
        for storages_of in copies:
            start = len(tape.events)
            storages_of.clear()
            recording.dropped.append(Segment("previous batch goes", start, len(tape.events)))

    def end_autocast(self) -> None:
        """Autocast drops its casts of weights, those of each block when the model is deep."""
        recording, tape = self.recording, self.tape
        for cached in self.casts:
            start = len(tape.events)
            cached.clear()
            recording.autocast_exit.append(Segment("autocast ends", start, len(tape.events)))
        self.start = len(tape.events)


def record_step(
    network: Network,
    env: Environment,
    *,
    checkpoint_every: int = 0,
    input_grads: bool = False,
    accumulated: bool = False,
    sharding: ShardingSpec | None = None,
    objective: Objective | None = None,
    step_of: Callable[[Parameter], int] | None = None,
) -> Recording:
    """Forward, loss and backward of one micro batch.

    ``checkpoint_every`` n > 0 recomputes every n-th block. ``input_grads`` makes the embedding's
    output ask for a gradient (``enable_input_require_grads``). ``accumulated``: gradients of
    earlier micro batches are there already. ``sharding``: by FSDP2 or ZeRO. ``objective``: the
    task, where it is another one than a language model's own loss. ``step_of``: the optimizer
    steps in backward, each parameter as its gradient arrives, and needs so many bytes for it.
    """
    recorder = _Recorder(network, env)
    tape = recorder.tape
    tape.step_of = step_of
    if sharding is not None:
        kind = Fsdp if sharding.kind == "fsdp" else Zero
        recorder.shard(kind(tape, sharding, accumulated=accumulated))
    elif isinstance(network, Native) or accumulated:
        _hold_gradients(network, tape, idle=not accumulated)
    if objective is not None and objective.before:
        _score_before(recorder, objective)
    inputs = [*_inputs(tape), *network.inputs(tape)]
    if input_grads:
        _ask_for_input_grads(network)
    recorder.begin_root()
    recorder.order.append(recorder.cut("inputs"))
    shared = Shared()
    x: Tensor | None = None
    for number, stage in enumerate(network.stages):
        if x is not None:
            shared.memory = x
        x = _run_stage(recorder, stage, shared, checkpoint_every, input_grads and number == 0)
    assert x is not None
    if objective is None or objective.inside:
        root = _loss(recorder, x, objective)
        del x
        root = recorder.end_root(root)
        recorder.order.append(recorder.cut("the model returns"))
        recorder.end_autocast()
    else:
        held = [x]
        del x
        held = _outputs(recorder, held, objective)
        held.append(recorder.end_root(held.pop()))
        recorder.order.append(recorder.cut("the model returns"))
        recorder.end_autocast()
        root = _task_loss(recorder, held, objective)
    recorder.recording.saved = _alive(tape)
    del inputs
    if root.requires_grad:
        _run_backward(recorder, root)
    recorder.end_step(shared)
    return recorder.recording


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
        loss_value = _loss(recorder, x, None)
        del x
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
    names = ["token ids", "labels"]
    names += ["padding mask"] if tape.env.padding_mask else []
    names += ["positions"] if tape.env.packed else []
    with tape.scoped("activations"):
        return [tape.tensor(TOKENS, 1, "int64", name) for name in names]


def _alive(tape: Tape) -> set[int]:
    alive: set[int] = set()
    for event in tape.events:
        alive.add(event) if event > 0 else alive.discard(-event)
    return alive


def _run_stage(
    recorder: _Recorder, stage: Stage, shared: Shared, checkpoint_every: int, input_grads: bool
) -> Tensor:
    order = recorder.order
    x = stage.enter(recorder.tape, shared)
    if input_grads and not x.requires_grad:
        _ask_for_gradient(x)
    for held in recorder.tape.collecting:
        if held and held[0].storage is x.storage:
            held.clear()
    _name_boundary(x)
    order.append(recorder.cut("embedding"))
    if stage.stack.shared:
        x = _run_shared(recorder, stage.stack, x, shared)
        x = stage.leave(x, shared)
        order.append(recorder.cut("final norm"))
        return x
    seen: dict[tuple[Hashable, ...], int] = {}
    for layer, kind in enumerate(stage.stack.pattern):
        checkpointed = checkpoint_every > 0 and layer % checkpoint_every == 0
        edge = layer if recorder.fsdp and layer in (0, stage.stack.count - 1) else None
        key = (kind, x.requires_grad, checkpointed, edge)
        last = len(recorder.network.stages) > 1 and _is_last(stage.stack, layer)
        if key in seen and not last:
            order.append(seen[key])
            continue
        block = stage.stack.kinds[kind]
        if any(known[0] == kind for known in seen):
            block = copy.deepcopy(block)  # a layer of its own: its gradients are too
            recorder.copies.append(block)
        _name_parts(block, recorder.tape)
        # the caller's name for the input lives until the block returns
        x = recorder.run_block(block, x, shared, checkpointed=checkpointed)
        _name_boundary(x)
        seen[key] = recorder.cut("block")
        order.append(seen[key])
    if not checkpoint_every:
        _forget(recorder.tape, shared)
    x = stage.leave(x, shared)
    order.append(recorder.cut("final norm"))
    return x


def _forget(tape: Tape, shared: Shared) -> None:
    """Masks and biases are local to the model's forward; only a checkpoint keeps them."""
    shared.mask = shared.bias = shared.cross_bias = tape.prefix = None
    shared.masks = dict.fromkeys(shared.masks)


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
    others = [t for t in (shared.memory, shared.bias) if t is not None]
    return checkpoint(
        lambda x: _run(block, x, shared),
        x,
        others,
        trains=_trains(block),
        offload=x.tape.env.offload_checkpoints,
    )


def _trains(block: Module) -> bool:
    return any(parameter.trainable for _, parameter in block.named_parameters())


def _loss(recorder: _Recorder, x: Tensor, objective: Objective | None) -> Tensor:
    """Logits and loss, as the model class computes them inside its forward."""
    tape = recorder.tape
    logits: Tensor | None
    with tape.scoped("logits"):
        if objective is not None and objective.kind == "labels":
            loss, logits = classify_loss(recorder.network, x)
        else:
            loss, logits = compute_loss(recorder.network, x)
        if logits is not None and tape.env.outputs_to_fp32:
            logits = ops.to(logits, "fp32")
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
            outputs = network.outputs(states.pop())
            outputs = network.returned(outputs)
        else:
            x = states.pop()
            outputs = [model_outputs(network, x, objective.completion, states=objective.states)]
            del x
    recorder.order.append(recorder.cut("logits"))
    return outputs


def _task_loss(recorder: _Recorder, held: list[Tensor], objective: Objective) -> Tensor:
    """The trainer's loss function: it holds the model's outputs until it returns."""
    tape, recording = recorder.tape, recorder.recording
    recorder.order = recording.tail_order
    with tape.scoped("logits"):
        if tape.env.outputs_to_fp32:
            held.append(ops.to(held.pop(), "fp32"))

    def again(network: Network) -> Tensor:
        recorder.order.append(recorder.cut("the policy's part"))
        return _run_again(recorder, network, objective)

    with tape.scoped("logits"):
        loss = objective.loss(recorder.network, held, again)
    if tape.env.keep_outputs:
        recording.outputs += held
    held.clear()
    recorder.order.append(recorder.cut("the task's loss"))
    return loss


def _run_again(recorder: _Recorder, network: Network, objective: Objective) -> Tensor:
    """Another network's outputs on the same batch; the caller has turned the graph off."""
    shared = Shared()
    x: Tensor | None = None
    with recorder.tape.scoped("activations"):
        for stage in network.stages:
            if x is not None:
                shared.memory = x
            x = _run_stage(recorder, stage, shared, 0, False)
    assert x is not None
    outputs = model_outputs(network, x, objective.completion, states=objective.states)
    del x
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

    def on_node(node: Node) -> None:
        nonlocal current, start
        while current > 0 and node.sequence <= regions[current - 1].last:
            stop = len(tape.events)
            cuts[regions[current].segment] = Segment(f"{regions[current].name}", start, stop)
            start = stop
            current -= 1
            for grad in node.buffers:  # whichever block made it, it has one name
                if grad is not None and grad.storage is not None:
                    tape.labels[grad.storage.index - 1] = BORDER

    backward(root, tape.tensor(ONE, 1, "fp32", "loss gradient"), on_node)
    if recorder.fsdp is not None:
        recorder.fsdp.finish(recorder.units)
    cuts[regions[current].segment] = Segment(regions[current].name, start, len(tape.events))
    empty = Segment("", 0, 0)
    recording.backward = [cuts.get(i, empty) for i in range(len(recording.forward))]
