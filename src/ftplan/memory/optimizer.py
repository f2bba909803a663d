"""Optimizers: the states kept for each trainable tensor, and what a step needs for a moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from ftplan.memory.tape import BLOCK_BYTES, ITEM_BYTES, Parameter

__all__ = ["OptimizerSpec", "State", "Step", "rounded", "state_bytes", "step_bytes"]

PAGED_ELEMENTS = 100_000
"""bitsandbytes pages the states of tensors of at least so many elements, but never their scales."""


def rounded(size: int) -> int:
    """Bytes as the caching allocator hands them out: whole blocks of 512."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One tensor kept for each trainable tensor."""

    name: str
    """Name in the optimizer's state."""
    dtype: str
    """`param` (the parameter's own), `fp32`, `int8`, or `8bit-256`, `4bit-128` (values in that
    many bits, an fp32 scale per block), `8bit-fp16-32` (an fp16 scale per 32)."""
    shape: str
    """`full` (as the parameter), `factored` (rows + columns; full below two dimensions),
    `factored-2d` (rows + columns; none below), `row` (one per output row), `scalar`, `low-rank`
    (rank x the longer side), `low-rank-factored`, `projector` (rank x the shorter side)."""
    min_elements: int = 0
    """Below this many elements the state is fp32 (bitsandbytes) or the parameter's dtype
    (torchao: where ``block_multiple`` is given)."""
    block_multiple: int = 0
    """The element count must be a multiple of this to be quantised."""
    table_bytes: int = 0
    """Bytes of a look-up table kept beside each quantised state."""
    when: Literal["always", "half"] = "always"
    """`half`: only for parameters of two bytes."""
    on: Literal["gpu", "host"] = "gpu"
    """Where it waits between steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Temporaries of the step, in bytes per element: (4-byte parameters, 2-byte parameters)."""

    all: tuple[float, float] = (0, 0)
    """Of all trainable parameters at once (`foreach`)."""
    current: tuple[float, float] = (0, 0)
    """Of the tensor that is being updated."""
    previous: tuple[float, float] = (0, 0)
    """Of the tensor before it, whose last temporary still has a name in Python."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """What the calculator needs to know of an optimizer."""

    name: str
    states: tuple[State, ...]
    step: Step
    step_counter_on_gpu: bool = False
    """A 4-byte counter per tensor lives on the GPU."""
    paged: bool = False
    """Values are unified memory: not in PyTorch's allocator, and may leave the GPU."""
    in_backward: bool = False
    """Gradients are used as they arrive and never all alive."""
    keeps_embeddings_fp32: bool = False
    """States of embeddings are not quantised (the Trainer's override for bitsandbytes)."""
    others: OptimizerSpec | None = None
    """What handles the parameters that are no hidden matrices; None: this one does."""
    rank: int = 0
    """Rank of low-rank states."""
    offloads_from: int | None = None
    """Tensors of at least so many elements are updated on the host (torchao)."""
    source: str = ""

    def offloads(self, parameter: Parameter) -> bool:
        """Whether states, and copies of weight and gradient, lie on the host."""
        return self.offloads_from is not None and parameter.numel >= self.offloads_from


def _lengths(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(matrices, rows, columns) of a weight of two or more dimensions."""
    return prod(shape[:-2]), shape[-2], shape[-1]


def _elements(state: State, shape: tuple[int, ...], rank: int) -> list[int]:
    """Elements of each tensor that a state consists of."""
    count = prod(shape)
    if state.shape == "full":
        return [count]
    if state.shape == "scalar":
        return [1]
    if len(shape) < 2:
        return [] if state.shape in ("factored-2d", "projector") else [count]
    matrices, rows, columns = _lengths(shape)
    short, long = min(rows, columns), max(rows, columns)
    low = min(rank or short, short)
    return {
        "factored": [matrices * rows, matrices * columns],
        "factored-2d": [matrices * rows, matrices * columns],
        "row": [matrices * rows],
        "low-rank": [matrices * low * long],
        "low-rank-factored": [matrices * low, matrices * long],
        "projector": [matrices * low * short],
    }[state.shape]


def _storage(state: State, count: int, item: int, *, whole: bool = False) -> tuple[int, int]:
    """Bytes of the values and of the scales of a state of ``count`` elements.

    ``item``: bytes of a value of the parameter. ``whole``: a state that would be quantised stays
    in fp32.
    """
    if state.dtype == "param":
        return rounded(count * item), 0
    if state.dtype in ITEM_BYTES:
        return rounded(count * ITEM_BYTES[state.dtype]), 0
    if whole:
        return rounded(count * 4), 0
    bits, *scale, block = state.dtype.split("-")
    if count < state.min_elements or (state.block_multiple and count % state.block_multiple):
        return rounded(count * (item if state.block_multiple else 4)), 0
    values = rounded(-(-count * int(bits.removesuffix("bit")) // 8))
    scales = rounded(-(-count // int(block)) * (2 if scale else 4))
    return values, scales + rounded(state.table_bytes)


def tensor_state_bytes(optimizer: OptimizerSpec, parameter: Parameter, on: str = "gpu") -> int:
    """Bytes of all states of one trainable tensor."""
    item = ITEM_BYTES[parameter.dtype]
    moved = optimizer.offloads(parameter)
    total = rounded(4) if optimizer.step_counter_on_gpu and on == "gpu" and not moved else 0
    for state in optimizer.states:
        if ("host" if moved else state.on) != on or (state.when == "half" and item != 2):
            continue
        paged = optimizer.paged and parameter.numel >= PAGED_ELEMENTS
        whole = optimizer.keeps_embeddings_fp32 and parameter.embedding
        for count in _elements(state, parameter.shape, optimizer.rank):
            values, scales = _storage(state, count, item, whole=whole)
            total += scales if paged else values + scales
    return total


def _handler(optimizer: OptimizerSpec, parameter: Parameter, is_matrix: bool) -> OptimizerSpec:
    if optimizer.others is None or (is_matrix and len(parameter.shape) >= 2):
        return optimizer
    return optimizer.others


def state_bytes(
    optimizer: OptimizerSpec, parameters: Sequence[tuple[Parameter, int, bool]], on: str = "gpu"
) -> int:
    """Bytes of all states, for (parameter, how many such tensors, is it a hidden matrix)."""
    return sum(
        times * tensor_state_bytes(_handler(optimizer, parameter, matrix), parameter, on)
        for parameter, times, matrix in parameters
    )


def step_bytes(optimizer: OptimizerSpec, parameters: Sequence[tuple[Parameter, int, bool]]) -> int:
    """Bytes that are needed only during the step: the worst of its moments.

    Tensors are updated in the order of the model, matrices first: the Trainer puts what is not
    decayed (norms, biases) in a group of its own.
    """
    at_once = worst = 0
    for parameter, times, matrix in parameters:
        step = _handler(optimizer, parameter, matrix).step
        size = int(parameter.numel * step.all[ITEM_BYTES[parameter.dtype] == 2])
        at_once += times * rounded(size)
    before: Parameter | None = None
    for parameter, matrix in _update_order(parameters):
        step = _handler(optimizer, parameter, matrix).step
        moment = _temporary(parameter, step.current)
        if before is not None:
            moment += _temporary(before, step.previous)
        worst = max(worst, moment)
        before = parameter
    return at_once + worst


def _temporary(parameter: Parameter, per_element: tuple[float, float]) -> int:
    return rounded(int(parameter.numel * per_element[ITEM_BYTES[parameter.dtype] == 2]))


def _update_order(
    parameters: Sequence[tuple[Parameter, int, bool]],
) -> list[tuple[Parameter, bool]]:
    """Embeddings, the blocks (twice, so that each one's first follows a last), the head, norms."""
    outside = [(p, block) for p, _, block in parameters if not block]
    blocks = [(p, block) for p, _, block in parameters if block]
    tables = [entry for entry in outside if entry[0].embedding]
    rest = [entry for entry in outside if not entry[0].embedding]
    order = tables + blocks + blocks + rest
    return sorted(order, key=lambda entry: len(entry[0].shape) < 2)
