"""The verb ``fit`` of the library: what fits, and how far it goes.

Part of the library's front: names from the catalogues in, answers out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftplan import __version__, api
from ftplan.catalog.gpus import find_gpu, search_gpus
from ftplan.errors import FtplanError, InputError
from ftplan.fit.reach import fewest_gpus, fitting_gpus, rows_of
from ftplan.fit.ways import Way, ways_to_train
from ftplan.fitting import FitReport, FitRow, GpuOffer
from ftplan.report import Report, Verdict
from ftplan.spec import Plan

__all__ = ["fit"]

MOST_SEQ_LEN = 131_072
"""Longest sequence that is searched when the model does not say its own."""


def fit(
    plan: Plan, *, base: Path | None = None, prices: Mapping[str, float] | None = None
) -> FitReport:
    """What fits: the ways of finetuning the plan's model x how far each goes on the plan's GPU.

    Without a GPU in the plan: the smallest cards that fit (the cheapest, with ``prices`` per hour
    by card). A plan without a method that serves is searched for its batch and context alone.
    """
    if plan.model.params is not None:
        raise InputError(
            "what fits depends on the model's shape, and a parameter count has none",
            remedy="give --model NAME or --config PATH; ftplan memory --params lists the sums",
        )
    serving = plan.task == "serve"
    micro, seq_len = plan.batch.micro or 1, plan.batch.seq_len or 2048
    ways = tuple(ways_to_train(plan))
    if serving:
        ways = (Way(name="as planned", sets={}, plan=replace(plan, method=None)),)

    def judge(changed: Plan) -> Report:
        return api.estimate(changed, base=base, with_remedies=False)

    paid = {find_gpu(name).name: price for name, price in (prices or {}).items()}
    if plan.hardware.gpu is None:
        return _without_gpu(plan, ways, judge, paid, micro, seq_len)
    rows = rows_of(ways, judge, micro=micro, seq_len=seq_len, most_seq_len=_longest(plan, base))
    if all(report is None for _, _, report in rows):
        first = rows[0][1]
        raise InputError(f"no way of running this job can be computed: {first.note}")
    shown = next(report for _, _, report in rows if report is not None)
    chosen = next((row for _, row, _ in rows if row.verdict == "fits"), None)
    planned = next((r for w, _, r in rows if w.name == "as planned" and r is not None), None)
    price = paid.get(find_gpu(plan.hardware.gpu).name)
    best = next((w for w, row, _ in rows if chosen is not None and row is chosen), ways[0])
    return FitReport(
        verdict=_overall([row for _, row, _ in rows]),
        model=replace(shown.model, trainable_params=0) if shown.model is not None else None,
        gpu=shown.gpu,
        micro=micro,
        seq_len=seq_len,
        recommended=chosen.way if chosen is not None else None,
        reason=_reason(chosen, [row for _, row, _ in rows], plan),
        rows=tuple(row for _, row, _ in rows),
        gpus=fitting_gpus(
            [_sized(best, micro, seq_len)],
            judge,
            _offers(paid),
            headroom=plan.budget.headroom or 0.0,
        ),
        fewest=fewest_gpus(_sized(ways[0], micro, seq_len), judge, price_per_hour=price)
        if not serving
        else None,
        remedies=api.estimate(plan, base=base).remedies if planned is not None else (),
        findings=shown.findings,
        assumptions=_shared(rows),
        tool_version=__version__,
    )


def _sized(way: Way, micro: int, seq_len: int) -> Way:
    batch = replace(way.plan.batch, micro=micro, seq_len=seq_len)
    return replace(way, plan=replace(way.plan, batch=batch))


def _without_gpu(
    plan: Plan,
    ways: tuple[Way, ...],
    judge: Any,
    paid: Mapping[str, float],
    micro: int,
    seq_len: int,
) -> FitReport:
    rows = rows_of(ways, judge, micro=micro, seq_len=seq_len, most_seq_len=0)
    reports = [report for _, _, report in rows if report is not None]
    if not reports:
        raise InputError(f"no way of running this job can be computed: {rows[0][1].note}")
    offers = _offers(paid)
    headroom = plan.budget.headroom or 0.0
    options = []
    for way in ways:
        found = fitting_gpus(
            [_sized(way, micro, seq_len)], judge, offers, headroom=headroom, most=1
        )
        options += list(found)
    return FitReport(
        verdict="fits" if options else "over",
        model=replace(reports[0].model, trainable_params=0) if reports[0].model else None,
        gpu=None,
        micro=micro,
        seq_len=seq_len,
        recommended=options[0].way if options else None,
        reason="no GPU is named: for each way the "
        + ("cheapest" if paid else "smallest")
        + " single card that fits",
        rows=tuple(row for _, row, _ in rows),
        gpus=tuple(options),
        fewest=None,
        remedies=(),
        findings=reports[0].findings,
        assumptions=_shared(rows),
        tool_version=__version__,
    )


def _shared(rows: list[tuple[Way, FitRow, Report | None]]) -> tuple[Any, ...]:
    """What was assumed for every way alike."""
    lists = [report.assumptions for _, _, report in rows if report is not None]
    return tuple(a for a in lists[0] if all(a in other for other in lists[1:])) if lists else ()


def _offers(paid: Mapping[str, float]) -> list[GpuOffer]:
    """Cards that can be rented or bought one by one; with prices, those that have one."""
    offers = []
    for row in search_gpus(""):
        if paid and row.name not in paid:
            continue
        if not paid and (row.vendor != "NVIDIA" or row.unified_memory or row.kind == "laptop"):
            continue
        offers.append(
            GpuOffer(
                name=row.name,
                usable_bytes=row.usable_bytes,
                compute_capability=row.compute_capability,
                price_per_hour=paid.get(row.name),
            )
        )
    return offers


def _longest(plan: Plan, base: Path | None) -> int:
    from ftplan.resolve import resolve

    try:
        config = resolve(plan, base=base).config or {}
    except FtplanError:
        return MOST_SEQ_LEN
    text = config.get("text_config")
    nested = text if isinstance(text, Mapping) else {}
    for source in (config, nested):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            value = source.get(key)
            if isinstance(value, int) and 0 < value <= 16 * MOST_SEQ_LEN:
                return min(value, MOST_SEQ_LEN)
    return MOST_SEQ_LEN


_ORDER: tuple[Verdict, ...] = ("fits", "tight", "over", "unknown")


def _overall(rows: list[FitRow]) -> Verdict:
    found = {row.verdict for row in rows}
    return next((verdict for verdict in _ORDER if verdict in found), "unknown")


def _reason(chosen: FitRow | None, rows: list[FitRow], plan: Plan) -> str:
    size = f"{plan.batch.micro or 1} x {plan.batch.seq_len or 2048} tokens"
    if chosen is None:
        return f"nothing fits at {size}; see the fewest GPUs and the remedies"
    if chosen.way == "as planned":
        return f"the plan fits as it is, at {size}"
    earlier = rows[: rows.index(chosen)]
    passed = dict.fromkeys(r.way.split(",")[0] for r in earlier if r.verdict in ("over", "tight"))
    passed.pop(chosen.way.split(",")[0], None)
    verb = "does" if len(passed) == 1 else "do"
    before = f"; {', '.join(passed)} {verb} not" if passed else ""
    return f"the first of these ways that fits at {size}{before}"
