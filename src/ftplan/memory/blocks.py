"""A stage of the network: its blocks, each kind once, and what stands before and behind them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, cast

from ftplan.memory import ops
from ftplan.memory.adapters.lora import LoraLinear
from ftplan.memory.checkpointing import checkpoint, checkpoint_all
from ftplan.memory.experts import Experts, Routing
from ftplan.memory.fsdp import Fsdp
from ftplan.memory.nn import Module, Shared, Stack, Stage
from ftplan.memory.record import BOUNDARY, HANDED, Recorder
from ftplan.memory.tape import Node, Parameter, Tape, Tensor
from ftplan.memory.units import Unit

if TYPE_CHECKING:
    from ftplan.memory.families.native.torchtitan_spread import Grouped

__all__ = ["ask_for_gradient", "run_stage"]


def run_stage(
    recorder: Recorder,
    stage: Stage,
    shared: Shared,
    checkpoint_every: int,
    input_grads: bool,
) -> Tensor:
    """Blocks with what stands around them."""
    order = recorder.order
    x = stage.enter(recorder.tape, shared)
    received = input_grads and not x.requires_grad
    if received:
        ask_for_gradient(x, outlives=False)  # a pipeline sends its gradient on
    for held in recorder.tape.collecting:
        if (checkpoint_every or received) and held and held[0].storage is x.storage:
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
        if checkpointed and recorder.tape.env.asks_at_blocks:
            checkpointed = _trains(stage.stack.kinds[kind])
            if checkpointed and not x.requires_grad:
                ask_for_gradient(x)
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
        idle = _switched_off(recorder, stage, layer)
        x = _run_block(recorder, block, x, shared, checkpointed=checkpointed, idle=idle)
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


def _switched_off(recorder: Recorder, stage: Stage, layer: int) -> list[Parameter]:
    """The layer's adapters where they are off: a unit gathers them all the same."""
    if recorder.adapted is None:
        return []
    stack = recorder.adapted.stages[recorder.network.stages.index(stage)].stack
    block = stack.kinds[stack.pattern[layer]]
    return [parameter for _, parameter in block.named_parameters() if parameter.added]


def _run_block(
    recorder: Recorder,
    block: Module,
    x: Tensor,
    shared: Shared,
    *,
    checkpointed: bool,
    idle: Sequence[Parameter] = (),
) -> Tensor:
    """A block's forward, as a unit of FSDP where the job is sharded.

    ``idle``: what the unit has beside the block's weights.
    """
    run = _checkpoint if checkpointed else _run
    if recorder.tape.env.checkpoint_parts:
        run = _checkpoint_parts
    if recorder.fsdp is None or recorder.fsdp.spec.wrap == "model":
        return run(block, x, shared)
    if groups := recorder.fsdp.groups(block):
        return _run_groups(recorder, groups, block, x, shared, run)
    apart = _spread(block) if recorder.fsdp.spec.ep > 1 else []
    hooked = recorder.tape.env.kernels.lora == "none"  # else a function gathers them by itself
    thin = _thin_layers(block) if hooked and "adapters" in recorder.fsdp.spec.apart else []
    own = {id(p) for module in (*apart, *thin) for _, p in module.named_parameters()}
    held = recorder.fsdp.beside and not recorder.fsdp.spec.reshard_after_forward
    weights = [p for _, p in block.named_parameters() if id(p) not in own and not held]
    if "adapters" not in recorder.fsdp.spec.apart and not recorder.fsdp.by_module:
        weights += idle
    unit = Unit("block", weights, place=recorder.place, module=block)
    unit.stays = recorder.fsdp.keeps(recorder.place) or None
    recorder.units.append(unit)
    recorder.fsdp.adopt(unit)
    for experts in apart:
        _shard_experts(recorder, recorder.fsdp, experts)
    for module in thin:
        _shard_adapter(recorder, recorder.fsdp, module)
    recorder.fsdp.begin_forward(unit)
    out = run(block, recorder.fsdp.enter(unit, x)[0], shared)
    recorder.fsdp.end_forward(unit)
    return recorder.fsdp.leave(unit, out)


def _run_groups(
    recorder: Recorder, groups: Sequence[list[Parameter]], block: Module, x: Tensor,
    shared: Shared, run: Callable[[Module, Tensor, Shared], Tensor],
) -> Tensor:  # fmt: skip
    """A block whose experts, if it has any, are a group of their own."""
    fsdp = cast("Grouped", recorder.fsdp)
    units = [
        Unit("block", weights, place=recorder.place, module=block, experts=weights[0].expert)
        for weights in groups
    ]
    recorder.units += units
    for unit in units:
        fsdp.adopt(unit)
    fsdp.begin_groups(units)
    out = run(block, fsdp.enter_groups(units, x), shared)
    for unit in units:
        fsdp.end_forward(unit)
    return fsdp.leave_groups(units, out)


_PARTS = (
    ("mlp", "feed_forward", "ffn"),
    ("self_attn", "attention", "attn", "linear_attn"),
    ("input_layernorm", "attention_norm", "layer_norm1", "norm1"),
    ("post_attention_layernorm", "ffn_norm", "layer_norm2", "norm2"),
)
"""Of each the first name that a block has is checkpointed (nemo_automodel/components/distributed/
activation_checkpointing.py 0.7.0, ``apply_submodule_checkpointing``)."""


def _checkpoint_parts(block: Module, x: Tensor, shared: Shared) -> Tensor:
    """The block with parts that keep their input alone."""
    found = [next((name for name in names if name in block.children), "") for names in _PARTS]
    parts = [block.children[name] for name in found if name]
    plain = [part.forward for part in parts]
    for part in parts:
        part.forward = _checkpointed(part)
    out = _run(block, x, copy.copy(shared))
    for part, forward in zip(parts, plain, strict=True):
        part.forward = forward
    return out


def _checkpointed(part: Module) -> Callable[..., Tensor]:
    forward: Callable[..., Tensor] = part.forward
    trains = any(parameter.trainable for _, parameter in part.named_parameters())

    def run(x: Tensor, *rest: Any) -> Tensor:
        return checkpoint(lambda x: forward(x, *rest), x, trains=trains)

    return run


def _thin_layers(block: Module) -> list[Module]:
    """LoRA's matrices, each a module of PEFT's."""
    adapted = [module for _, module in block.named_modules() if isinstance(module, LoraLinear)]
    return [matrix.default for lora in adapted for matrix in (lora.lora_A, lora.lora_B)]


def _shard_adapter(recorder: Recorder, fsdp: Fsdp, matrix: Module) -> None:
    """Make a unit of one matrix."""
    unit = Unit("adapter", [p for _, p in matrix.named_parameters()], place=recorder.place)
    recorder.units.append(unit)
    fsdp.adopt(unit)
    fsdp.enclose(unit, [matrix])


def _spread(block: Module) -> list[Experts]:
    """Experts that lie on several ranks, each a unit of FSDP by itself."""
    experts = (module for _, module in block.named_modules() if isinstance(module, Experts))
    return [module for module in experts if module.exchange is not None]


def _shard_experts(recorder: Recorder, fsdp: Fsdp, experts: Experts) -> None:
    """Gather a layer's experts when its tokens set out, not with the rest of the block.

    A checkpoint without reentry runs the block again when the way back has entered the experts:
    they have been gathered by then, and stay until it has left them. axolotl leaves experts that no
    other rank has to themselves (``ignored_params``).
    """
    if fsdp.spec.deep_ep and fsdp.spec.ranks_of(True) == 1:
        for _, parameter in experts.named_parameters():
            if fsdp.accumulated and parameter.trainable:
                parameter.grad = recorder.tape.leaf(parameter)
        return
    unit = Unit("experts", [p for _, p in experts.named_parameters()], experts=True)
    unit.place = recorder.place
    recorder.units.append(unit)
    fsdp.adopt(unit)
    kind = type(experts)

    def forward(x: Tensor, routing: Routing) -> Tensor:
        again = x.tape.rerun
        if again is None or not again.deferred:
            fsdp.begin_forward(unit)
        dtype = fsdp.spec.param_dtype  # ``cast_forward_inputs``
        given = [ops.to(t, dtype) if dtype else t for t in (x, routing.weights)]
        x, weights = fsdp.enter(unit, *given)
        out = kind.forward(experts, x, Routing(routing.logits, weights, routing.index))
        if again is None:
            fsdp.end_forward(unit)
        return fsdp.leave(unit, out)

    experts.forward = forward  # type: ignore[method-assign]


def _run_shared(recorder: Recorder, stack: Stack, x: Tensor, shared: Shared) -> Tensor:
    """Every layer as it is: gradients of one weight meet, and its cast is made once."""
    for block in stack.kinds:
        _name_parts(block, recorder.tape)
    for kind in stack.pattern:
        x = _run_block(recorder, stack.kinds[kind], x, shared, checkpointed=False)
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


def ask_for_gradient(x: Tensor, *, outlives: bool = True) -> None:
    """Make ``x`` the first node of the graph: its gradient arrives outside of the blocks.

    What collects a gradient (``AccumulateGrad``) holds the tensor until then; what passes from
    checkpointed block to block is held by the blocks anyway (:func:`run_stage` drops it here).
    Where no graph is built nothing collects. ``outlives``: nobody takes the gradient off it, so
    that both are there as long as the graph is.
    """
    if not x.tape.grad_enabled:
        return
    held = [x.alias()]
    x.tape.collecting.append(held)
    attributes = x.tape.attributes
    if outlives:
        attributes.append(x.alias())

    def apply(grad: Tensor) -> tuple[Tensor | None, ...]:
        held.clear()
        if outlives:
            attributes.append(grad)
        return ()

    x.requires_grad, x.node = True, Node(x.tape, "input gradient", [], apply)
