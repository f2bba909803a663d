"""Floating point operations of a step, counted on the tape where the calculator multiplies.

Every product of matrices that the walk meets says how large it is (:class:`Product` in
:mod:`ftplan.memory.tape`), forward and on the way back: a frozen matrix has no gradient of its own,
what no gradient reaches is not gone back through, a checkpointed block runs again up to the last
tensor that it saves, experts count with the rows that are sent to them, and a family, an adapter or
a task that is written for memory is counted by the same lines. Elementwise operations are not in
it: they are bound by memory, and their bytes are on the tape as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.memory.replay import Program

__all__ = ["Compute", "Work", "hidden_of"]

_WIDTH = ("hidden_size", "d_model", "n_embd", "dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Operations of one micro batch on one GPU."""

    forward: int
    """With those of a reference, a teacher, a vision tower."""
    backward: int
    recompute: int
    """Computed a second time: by checkpoints, and by kernels that keep no scores."""
    attention: int
    """Of all these, what is spent on scores and their product with the values."""
    hidden: int
    """Scores that a mask hides and the kernel does not compute: in none of the others."""

    @property
    def total(self) -> int:
        """All that the card computes."""
        return self.forward + self.backward + self.recompute

    @property
    def model(self) -> int:
        """What the model asks for: without what is computed twice."""
        return self.forward + self.backward


class Compute:
    """A recorded step's operations as a function of its batch."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._operations = program.operations()
        self.born = program.born()
        self.births = program.births()

    def at(self, micro: int, seq_len: int, chunk: int = 0) -> Work:
        """Operations for ``micro`` samples of ``seq_len`` tokens."""
        point = self._program.point(micro, seq_len, chunk)
        sums = dict.fromkeys(("forward", "backward", "recompute", "attention", "hidden"), 0)
        for part in self._operations:
            count = part.size.at(point)
            if part.kind == "hidden":
                sums["hidden"] += count
                count = -count
            back = part.phase == "backward"
            sums["recompute" if part.again else "backward" if back else "forward"] += count
            if part.kind != "linear":
                sums["attention"] += count
        return Work(**sums)

    def born_bytes(self, micro: int, seq_len: int, chunk: int = 0) -> int:
        """Bytes that are allocated, and so written, in a micro batch."""
        return self.born.at(self._program.point(micro, seq_len, chunk))


def hidden_of(config: Mapping[str, Any]) -> int:
    """Width of the model."""
    text = config.get("text_config")
    for source in (config, text if isinstance(text, Mapping) else {}):
        for name in _WIDTH:
            if isinstance(source.get(name), int):
                return int(source[name])
    return 2048
