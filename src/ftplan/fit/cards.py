"""Which cards are enough for a job: the smallest, the cheapest, the fewest."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ftplan.fitting import GpuOffer, GpuOption
from ftplan.report import Interval

__all__ = ["COUNTS", "enough", "fewest", "ranked"]

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
"""How many cards are tried: whole machines of eight beyond one."""


def ranked(offers: Iterable[GpuOffer]) -> list[GpuOffer]:
    """By price where all have one, else by size."""
    known = list(offers)
    priced = bool(known) and all(offer.price_per_hour is not None for offer in known)
    return sorted(
        known, key=lambda o: (o.price_per_hour or 0.0 if priced else 0.0, o.usable_bytes, o.name)
    )


def enough(
    way: str,
    device: Callable[[GpuOffer], Interval | None],
    offers: Iterable[GpuOffer],
    *,
    headroom: float,
    most: int,
) -> tuple[GpuOption, ...]:
    """The first single cards that hold a job for certain. ``device`` sizes it on a card."""
    options: list[GpuOption] = []
    for offer in offers:
        peak = device(offer)
        usable = int(offer.usable_bytes * (1 - headroom))
        if peak is None or peak.high > usable:
            continue
        options.append(
            GpuOption(
                gpu=offer.name,
                count=1,
                way=way,
                verdict="fits",
                peak_bytes=peak.expected,
                usable_bytes=usable,
                price_per_hour=offer.price_per_hour,
            )
        )
        if len(options) == most:
            break
    return tuple(options)


def fewest(
    way: str,
    device: Callable[[int], Interval | None],
    *,
    gpu: str,
    usable: int,
    price_per_hour: float | None,
) -> GpuOption | None:
    """The fewest cards of one kind that hold a job for certain. ``device`` sizes it on so many."""
    for count in COUNTS:
        peak = device(count)
        if peak is not None and peak.high <= usable:
            return GpuOption(
                gpu=gpu,
                count=count,
                way=way,
                verdict="fits",
                peak_bytes=peak.expected,
                usable_bytes=usable,
                price_per_hour=price_per_hour * count if price_per_hour is not None else None,
            )
    return None
