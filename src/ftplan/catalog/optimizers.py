"""Optimizers by name: the states they keep, and what a step needs for a moment.

Temporaries were counted on the CPU build of each package while one real step ran, as bytes per
element of the tensors concerned; states were counted from the optimizer's own ``state``. A row
that could not be run says so (``measured`` false).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ftplan.catalog.shelf import Shelf, read_rows
from ftplan.memory.optimizer import State, Step

__all__ = [
    "OPTIMIZERS",
    "OptimizerRow",
    "State",
    "Step",
    "find_optimizer",
    "search_optimizers",
]

Implementation = Literal["fused", "foreach", "loop"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OptimizerRow:
    """One optimizer of one package."""

    name: str
    """The `optim` name of transformers where there is one."""
    title: str
    """Name for people."""
    package: str
    """Where it comes from."""
    states: tuple[State, ...]
    """What is kept per trainable tensor."""
    implementation: Implementation
    """How it runs unless the job says otherwise. Kernels of one launch count as `fused`."""
    steps: Mapping[str, Step]
    """Temporaries by implementation."""
    step_counter_on_gpu: tuple[str, ...]
    """Implementations that keep a 4-byte step counter per tensor on the GPU."""
    paged: bool
    """States are unified memory that may leave the GPU."""
    in_backward: bool
    """Updates as gradients arrive: gradients are never all alive."""
    applies_to: Literal["all", "matrices", "targets", "block"]
    """What it handles: all trainable tensors, hidden matrices, the modules named in
    `optim_target_modules`, or one block of layers at a time."""
    others: str | None
    """The optimizer of what it does not handle."""
    keeps_fp32: tuple[str, ...]
    """Parameter groups whose states stay fp32 under the Trainer of transformers."""
    rank: int | None
    """Default rank of low-rank states."""
    aliases: tuple[str, ...]
    """Other names."""
    source: str
    """Where this was read."""
    date: str
    """When the row was last checked."""
    measured: bool
    """States and temporaries were counted while it ran."""
    notes: str = ""
    """What a reader of the row must know."""
    offloads_from: int | None = None
    """Tensors of at least so many elements are updated on the host: states, and page-locked copies
    of weight and gradient, lie there."""


def _rows() -> Iterator[OptimizerRow]:
    for row in read_rows("optimizers.json"):
        yield OptimizerRow(
            **{
                **row,
                "states": tuple(State(**state) for state in row["states"]),
                "steps": {name: _step(step) for name, step in row["steps"].items()},
                "step_counter_on_gpu": tuple(row["step_counter_on_gpu"]),
                "keeps_fp32": tuple(row["keeps_fp32"]),
                "aliases": tuple(row["aliases"]),
            }
        )


def _step(step: Mapping[str, Any]) -> Step:
    return Step(**{name: (pair[0], pair[1]) for name, pair in step.items()})


OPTIMIZERS: Shelf[OptimizerRow] = Shelf("optimizer", "optimizers", _rows)
"""All optimizers."""


def find_optimizer(name: str) -> OptimizerRow:
    """The optimizer called ``name``: `adamw_torch_fused`, `adamw`, `torch.optim.AdamW`, ...

    Raises ``UnknownNameError`` with suggestions.
    """
    return OPTIMIZERS.find(name)


def search_optimizers(query: str = "") -> tuple[OptimizerRow, ...]:
    """Optimizers whose name or aliases hold every word of ``query``."""
    return OPTIMIZERS.search(query)
