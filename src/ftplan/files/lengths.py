"""Sums over the lengths of samples: quantiles, a histogram, padding, packing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Mapping, Sequence

__all__ = ["cut_to", "histogram", "packed", "padded_tokens", "quantile"]

Lengths = Mapping[int, int]
"""How many samples there are of each length in tokens."""


def cut_to(lengths: Lengths, seq_len: int) -> Counter[int]:
    """The samples, cut to at most ``seq_len`` tokens."""
    cut: Counter[int] = Counter()
    for length, times in lengths.items():
        cut[min(length, seq_len)] += times
    return cut


def quantile(lengths: Sequence[tuple[int, int]], share: float) -> int:
    """The smallest length that at least ``share`` of the samples do not exceed."""
    wanted = share * sum(times for _, times in lengths)
    seen = 0
    for length, times in lengths:
        seen += times
        if seen >= wanted:
            return length
    return lengths[-1][0]


def histogram(lengths: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Counts up to powers of two (and the halves between them)."""
    edges = sorted({2**n for n in range(4, 32)} | {3 * 2 ** (n - 1) for n in range(4, 32)})
    counts: Counter[int] = Counter()
    for length, times in lengths:
        counts[edges[bisect_left(edges, length)]] += times
    used = [edge for edge in edges if min(counts) <= edge <= max(counts)]
    return tuple((edge, counts[edge]) for edge in used)


def padded_tokens(lengths: Lengths, seq_len: int, batch: int) -> float:
    """Tokens that are computed when each of a batch's samples is padded to its longest.

    Samples come in random order: the expected longest of ``batch`` of them.
    """
    cut = sorted(cut_to(lengths, seq_len).items())
    count = sum(times for _, times in cut)
    longest, below, seen = 0.0, 0.0, 0
    for length, times in cut:
        seen += times
        up_to = (seen / count) ** batch
        longest += length * (up_to - below)
        below = up_to
    return longest * count


def packed(lengths: Lengths, seq_len: int) -> int:
    """How many sequences of ``seq_len`` best-fit-decreasing packs the samples in.

    Longer samples are cut to ``seq_len``. Samples of one length are placed together, so the work
    grows with the number of different lengths and not with that of samples.
    """
    cut = cut_to(lengths, seq_len)
    free: Counter[int] = Counter()  # room left: in how many sequences
    rooms: list[int] = []
    total = 0

    def put(room: int, times: int) -> None:
        if room and times:
            if not free[room]:
                insort(rooms, room)
            free[room] += times

    for length in sorted(cut, reverse=True):
        left = cut[length]
        while left:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                each = seq_len // length
                whole, rest = divmod(left, each)
                total += whole + bool(rest)
                put(seq_len - each * length, whole)
                put(seq_len - rest * length if rest else 0, 1)
                break
            room = rooms[at]
            used = min(left, free[room])
            free[room] -= used
            if not free[room]:
                rooms.pop(at)
            put(room - length, used)
            left -= used
    return total
