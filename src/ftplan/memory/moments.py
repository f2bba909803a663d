"""Which moments of a step can be the worst: the few that no other one is larger than in every way.

What is alive at a moment is so many storages of each size. A moment is never larger than another
that has, for every size, at least as many storages of that size or above: whatever the batch, each
of its storages has one at least as large to stand against. The largest of the few that are left is
the peak, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from itertools import chain as flatten
from operator import le, mul

from ftplan.memory.tape import BLOCK_BYTES, Size

__all__ = ["Counts", "WorstMoments", "undominated"]

Counts = tuple[int, ...]
"""How many storages of each size are alive."""


def chains_of(sizes: Sequence[Size]) -> list[list[int]]:
    """Numbers of sizes in lists that go down: sizes of one term that grow with the same thing."""
    chains: dict[object, list[int]] = {}
    for number, size in enumerate(sizes):
        grows = [place for place, count in enumerate(size) if count]
        chains.setdefault(grows[0] if len(grows) == 1 else (number,), []).append(number)
    return [sorted(chain, key=lambda n: sum(sizes[n]), reverse=True) for chain in chains.values()]


def undominated(moments: Iterable[Counts], chains: Sequence[Sequence[int]]) -> list[Counts]:
    """Those that no other stands against: has as many of each size or above."""
    alone = [chain[0] for chain in chains if len(chain) == 1]
    longer = [chain for chain in chains if len(chain) > 1]
    ranked: dict[Counts, Counts] = {}
    for moment in moments:
        if moment not in ranked:
            count = moment.__getitem__
            sums = [accumulate(map(count, chain)) for chain in longer]
            ranked[moment] = (*map(count, alone), *flatten.from_iterable(sums))
    kept: list[Counts] = []
    ranks: list[Counts] = []
    # a moment can only be dominated by one whose sum is no smaller
    for moment, rank in sorted(ranked.items(), key=lambda item: sum(item[1]), reverse=True):
        if not any(all(map(le, rank, other)) for other in ranks):
            kept.append(moment)
            ranks.append(rank)
    return kept


def tops_of(
    steps: Sequence[int], chains: Sequence[Sequence[int]], count: int
) -> tuple[list[Counts], Counts]:
    """The moments of a segment that may be its worst, and what is alive at its end.

    ``steps``: the size that is made, by its number; ``count`` is added where it goes.
    """
    alive = [0] * count
    tops: list[Counts] = []
    for position, step in enumerate(steps):
        if step < count:
            alive[step] += 1
            if position + 1 == len(steps) or steps[position + 1] >= count:
                tops.append(tuple(alive))
        else:
            alive[step - count] -= 1
    return undominated(tops, chains), tuple(alive)


class WorstMoments:
    """The candidates for a step's peak, and what is alive at its end.

    ``segments`` are a tape's pieces as steps; ``runs`` says which one is played how many times in
    a row, in order.
    """

    def __init__(
        self,
        sizes: Sequence[Size],
        segments: Sequence[Sequence[int]],
        runs: Iterable[tuple[int, int]],
    ) -> None:
        count = len(sizes)
        chains = chains_of(sizes)
        shapes = [tops_of(steps, chains, count) for steps in segments]
        level = (0,) * count
        found: list[Counts] = []
        for segment, times in runs:
            tops, net = shapes[segment]
            # what a segment leaves behind is the same each time: its first or last run is the worst
            for repeat in {0, times - 1}:
                base = tuple(a + repeat * b for a, b in zip(level, net, strict=True))
                found += (tuple(map(sum, zip(base, top, strict=True))) for top in tops)
            level = tuple(a + times * b for a, b in zip(level, net, strict=True))
        self.tops = undominated(found, chains)
        self.rest = level
        used = [
            number
            for number in range(count)
            if level[number] or any(top[number] for top in self.tops)
        ]
        self._tops = [tuple(top[number] for number in used) for top in self.tops]
        self._rest = tuple(level[number] for number in used)
        self._single: list[tuple[int, int]] = []
        self._sums: list[list[tuple[int, int]]] = []
        order = []
        for position, number in enumerate(used):
            parts = [(c, i) for i, c in enumerate(sizes[number]) if c]
            if len(parts) <= 1:
                self._single += parts or [(0, 0)]
                order.append((0, position))
            else:
                self._sums.append(parts)
                order.append((1, position))
        places = [position for _, position in sorted(order)]
        self._tops = [tuple(top[place] for place in places) for top in self._tops]
        self._rest = tuple(self._rest[place] for place in places)

    def at(self, point: Sequence[int]) -> tuple[int, int]:
        """Bytes at the worst moment and at the end, for values of the basis."""
        mask = -BLOCK_BYTES  # a power of two: whole blocks
        room = BLOCK_BYTES - 1
        table = [(c * point[i] + room) & mask for c, i in self._single]
        for parts in self._sums:
            table.append((sum([c * point[i] for c, i in parts]) + room) & mask)
        worst = max([sum(map(mul, top, table)) for top in self._tops], default=0)
        return max(worst, 0), sum(map(mul, self._rest, table))
