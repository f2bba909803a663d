"""The fastest of many plans that fit, found without looking at most of them, and exactly.

Plans are held in cells: all that differ in nothing but the micro batch. Within a cell two things
are known, and nothing else is used:

- What does not fit does not fit with more. Every moment of a recorded step is a sum of sizes that
  grow with the batch, so the peak never falls, and neither does anything that is added to it.
- More at once is never slower by the token. A step's time is the larger of a sum that grows with
  the batch in proportion, but for a part that is paid once, and of what the host needs, which does
  not grow at all; both over the batch never rise.

So of each cell one plan is wanted: the largest that fits, or a smaller one that is as good as that.
Both are found by halving. A test compares the answer with every plan, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from ftplan.dataclass import dataclass
from ftplan.fit.sizer import largest

__all__ = ["AS_GOOD", "Best", "Cell", "best_of", "fastest"]

AS_GOOD = 0.98
"""A rate of this share of the best one is as good: the smaller micro batch, or the plan that comes
first, is taken."""
KeyT = TypeVar("KeyT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(Generic[KeyT]):
    """Plans that differ in the micro batch alone."""

    key: KeyT
    """What they have in common."""
    micros: Sequence[int]
    """Micro batches, going up."""
    fits: Callable[[int], bool]
    """Whether a micro batch fits for certain."""
    rate: Callable[[int], float]
    """Tokens a second, expected."""
    grows: bool = True
    """The rate never falls as the micro batch grows. It may where samples are padded to the longest
    of their batch: then every micro batch that fits is rated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Best(Generic[KeyT]):
    """The plan of a cell that is wanted."""

    key: KeyT
    micro: int
    most: int
    """The largest micro batch of the cell that fits."""
    rate: float


def best_of(cell: Cell[KeyT]) -> Best[KeyT] | None:
    """The smallest micro batch that fits and is as good as the best that does."""
    micros = cell.micros
    count = largest(lambda n: cell.fits(micros[n - 1]), most=len(micros))
    if not count:
        return None
    if cell.grows:
        top = cell.rate(micros[count - 1])
        less = largest(lambda n: cell.rate(micros[n - 1]) < AS_GOOD * top, most=count - 1)
    else:
        rates = [cell.rate(micro) for micro in micros[:count]]
        top = max(rates)
        less = next(n for n, rate in enumerate(rates) if rate >= AS_GOOD * top)
    rate = cell.rate(micros[less])
    return Best(key=cell.key, micro=micros[less], most=micros[count - 1], rate=rate)


def fastest(cells: Iterable[Cell[KeyT]]) -> Best[KeyT] | None:
    """The first of the cells' plans that is as good as the fastest of all."""
    found = [best for cell in cells if (best := best_of(cell)) is not None]
    top = max((best.rate for best in found), default=0.0)
    return next((best for best in found if best.rate >= AS_GOOD * top), None)
