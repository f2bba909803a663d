"""How far each way goes: the largest micro batch, the longest sequence, the smallest card."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from ftplan.errors import FtplanError, describe_fault
from ftplan.fit.ways import Way
from ftplan.fitting import FitRow, GpuOffer, GpuOption
from ftplan.report import Interval, Report, Verdict
from ftplan.spec import Plan

__all__ = ["Judge", "fewest_gpus", "fitting_gpus", "largest", "rows_of", "verdict_of"]

Judge = Callable[[Plan], Report]

SEQ_STEP = 128
"""Sequence lengths are searched in these steps: kernels pad to them anyway."""
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)


def largest(fits: Callable[[int], bool], *, most: int) -> int:
    """The largest n from 0 to ``most`` for which ``fits(n)``, for a property that, once lost, is
    not regained; 0 when not even 1 fits. Doubling, then halving: about 2 log2(n) calls."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def rows_of(
    ways: Iterable[Way], judge: Judge, *, micro: int, seq_len: int, most_seq_len: int
) -> list[tuple[Way, FitRow, Report | None]]:
    """A row for each way, judged at ``micro`` x ``seq_len``, with how far it goes from there."""
    rows: list[tuple[Way, FitRow, Report | None]] = []
    for way in ways:
        plan = _sized(way.plan, micro, seq_len)
        try:
            report = judge(plan)
            row = _row(way, plan, report, judge, micro, seq_len, most_seq_len)
        except FtplanError as error:
            rows.append((way, _refused(way, error.message), None))
        except Exception as error:  # our own fault in one way must not hide the others
            rows.append((way, _refused(way, describe_fault(error)), None))
        else:
            rows.append((way, row, report))
    return rows


def _sized(plan: Plan, micro: int, seq_len: int) -> Plan:
    return replace(plan, batch=replace(plan.batch, micro=micro, seq_len=seq_len))


def _refused(way: Way, why: str) -> FitRow:
    return FitRow(
        way=way.name,
        change=way.sets,
        verdict="unknown",
        peak_bytes=None,
        headroom_bytes=None,
        trainable_params=None,
        largest_micro=None,
        longest_seq_len=None,
        note=why,
    )


def _row(
    way: Way,
    plan: Plan,
    report: Report,
    judge: Judge,
    micro: int,
    seq_len: int,
    most_seq_len: int,
) -> FitRow:
    peak = report.device_bytes or report.allocated_bytes
    assert peak is not None
    most_micro: int | None = None
    longest: int | None = None
    if report.gpu is not None:

        def fits_micro(count: int) -> bool:
            return judge(_sized(plan, count, seq_len)).verdict == "fits"

        def fits_length(steps: int) -> bool:
            return judge(_sized(plan, micro, steps * SEQ_STEP)).verdict == "fits"

        most_micro = largest(fits_micro, most=4096) or None
        longest = largest(fits_length, most=most_seq_len // SEQ_STEP) * SEQ_STEP or None
    return FitRow(
        way=way.name,
        change=way.sets,
        verdict=report.verdict or "unknown",
        peak_bytes=peak.expected,
        headroom_bytes=report.gpu.usable_bytes - peak.high if report.gpu is not None else None,
        trainable_params=report.model.trainable_params if report.model is not None else None,
        largest_micro=most_micro,
        longest_seq_len=longest,
    )


def verdict_of(peak: Interval, usable: int) -> Verdict:
    """The contract's verdict for an interval of device bytes on a card."""
    if peak.high <= usable:
        return "fits"
    return "tight" if peak.expected <= usable else "over"


def fitting_gpus(
    ways: Sequence[Way],
    judge: Judge,
    offers: Sequence[GpuOffer],
    *,
    headroom: float,
    most: int = 5,
) -> tuple[GpuOption, ...]:
    """The cheapest single cards (by price where all have one, else the smallest) that hold a job.

    The peak depends on a card only through its compute capability, so one plan is judged per way
    and capability. For each card the first way that fits counts.
    """
    priced = all(offer.price_per_hour is not None for offer in offers) and bool(offers)
    ranked = sorted(
        offers, key=lambda o: (o.price_per_hour if priced else 0, o.usable_bytes, o.name)
    )
    peaks: dict[tuple[str, str | None], Interval | None] = {}
    options: list[GpuOption] = []
    for offer in ranked:
        usable = int(offer.usable_bytes * (1 - headroom))
        for way in ways:
            key = (way.name, offer.compute_capability)
            if key not in peaks:
                peaks[key] = _peak_on(way.plan, offer.name, judge)
            peak = peaks[key]
            if peak is not None and verdict_of(peak, usable) == "fits":
                options.append(
                    GpuOption(
                        gpu=offer.name,
                        count=1,
                        way=way.name,
                        verdict="fits",
                        peak_bytes=peak.expected,
                        usable_bytes=usable,
                        price_per_hour=offer.price_per_hour,
                    )
                )
                break
        if len(options) == most:
            break
    return tuple(options)


def _peak_on(plan: Plan, gpu: str, judge: Judge) -> Interval | None:
    hardware = replace(plan.hardware, gpu=gpu, count=1, nodes=1)
    sharding = replace(plan.sharding, kind=None)
    try:
        report = judge(replace(plan, hardware=hardware, sharding=sharding))
    except Exception:  # refused, or our own fault: nothing is known about this card
        return None
    return report.device_bytes or report.allocated_bytes


def fewest_gpus(way: Way, judge: Judge, *, price_per_hour: float | None) -> GpuOption | None:
    """The fewest cards of the plan's kind on which a way fits, sharded when there are several."""
    for count in COUNTS:
        kind = way.plan.sharding.kind
        if count > 1 and kind not in ("zero3", "fsdp", "zero2", "zero1"):
            kind = "fsdp"
        plan = replace(
            way.plan,
            hardware=replace(way.plan.hardware, count=min(count, 8), nodes=max(1, count // 8)),
            sharding=replace(way.plan.sharding, kind=kind if count > 1 else None),
        )
        try:
            report = judge(plan)
        except Exception:  # refused, or our own fault: nothing is known about this number
            continue
        peak = report.device_bytes or report.allocated_bytes
        if report.verdict == "fits" and peak is not None and report.gpu is not None:
            return GpuOption(
                gpu=report.gpu.name,
                count=count,
                way=way.name,
                verdict="fits",
                peak_bytes=peak.expected,
                usable_bytes=report.gpu.usable_bytes,
                price_per_hour=price_per_hour * count if price_per_hour is not None else None,
            )
    return None
