"""Optimizers: the states kept for each trainable tensor, and what a step needs for a moment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ftplan.memory.tape import BLOCK_BYTES, ITEM_BYTES, Parameter

__all__ = ["OptimizerSpec", "StateSpec", "rounded", "state_bytes", "step_bytes"]


def rounded(size: int) -> int:
    """Bytes as the caching allocator hands them out: whole blocks of 512."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpec:
    """One state tensor of an optimizer."""

    name: str
    dtype: str
    """``param`` (the parameter's own), a plain dtype, or a block format such as ``8bit-256``."""
    shape: Literal["full", "factored", "low-rank", "scalar"] = "full"
    min_elements: int = 0
    """Below this many elements the state is kept in fp32 (bitsandbytes: 4096)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """What the calculator needs to know of an optimizer."""

    name: str
    states: tuple[StateSpec, ...]
    step: Literal["fused", "foreach", "loop"]
    """How PyTorch runs it: decides the temporaries of the step."""
    copies: int = 1
    """``foreach``: copies of all trainable parameters; ``loop``: of the largest one."""
    on_device_steps: bool = False
    """A step counter per tensor lives on the GPU."""
    paged: bool = False
    in_backward: bool = False
    rank: int = 0
    source: str = ""


def _one_state(state: StateSpec, parameter: Parameter, dtype: str, rank: int) -> int:
    count = parameter.numel
    if state.shape == "scalar":
        return rounded(4)
    if state.shape == "factored" and len(parameter.shape) >= 2:
        *lead, rows, columns = parameter.shape
        batch = 1
        for extent in lead:
            batch *= extent
        return rounded(batch * rows * 4) + rounded(batch * columns * 4)
    if state.shape == "low-rank" and len(parameter.shape) == 2 and rank:
        count = min(parameter.shape) if rank >= min(parameter.shape) else rank
        count *= max(parameter.shape)
    if state.dtype.endswith(tuple("0123456789")) and "bit-" in state.dtype:
        if parameter.numel < state.min_elements:
            return rounded(count * 4)
        bits, block = state.dtype.split("bit-")
        return rounded(-(-count * int(bits) // 8)) + rounded(-(-count // int(block)) * 4)
    return rounded(count * ITEM_BYTES[dtype if state.dtype == "param" else state.dtype])


def state_bytes(optimizer: OptimizerSpec, parameters: Iterable[tuple[Parameter, int]]) -> int:
    """Bytes of all states for (parameter, how many such tensors)."""
    total = 0
    for parameter, times in parameters:
        one = sum(
            _one_state(state, parameter, parameter.dtype, optimizer.rank)
            for state in optimizer.states
        )
        if optimizer.on_device_steps:
            one += rounded(4)
        total += times * one
    return total


def step_bytes(optimizer: OptimizerSpec, parameters: Iterable[tuple[Parameter, int]]) -> int:
    """Bytes that are needed only during the step."""
    sizes = [(rounded(p.numel * ITEM_BYTES[p.dtype]), times) for p, times in parameters]
    if optimizer.step == "foreach":
        return optimizer.copies * sum(size * times for size, times in sizes)
    if optimizer.step == "loop":
        return optimizer.copies * max((size for size, _ in sizes), default=0)
    return 0
