"""What ``fit --for`` asks: one thing solved, as a value and as a change to the plan.

Part of the library's front.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ftplan.dataclass import dataclass
from ftplan.errors import InputError
from ftplan.fit.changes import merge
from ftplan.fit.flops import hidden_of
from ftplan.fit.sizer import Sizer, largest
from ftplan.fit.ways import Way
from ftplan.fitting import FitRow, GpuOption, Solution
from ftplan.front.resolve import Resolved, resolve
from ftplan.front.searching import sized, sizer_for

__all__ = ["Question", "Tried", "solution_of"]

Question = Literal["micro-batch", "seq-len", "gpu", "gpus", "method", "rank"]
MOST_RANK = 1024
_SETTINGS = ("gradient_checkpointing", "loss", "kernels")
"""Of a change, what is said beside the way: what it took to fit and loses nothing."""


@dataclass(slots=True)
class Tried:
    """A way, and what came of it."""

    way: Way
    row: FitRow
    resolved: Resolved | None = None
    sizer: Sizer | None = None


def solution_of(
    of: Question,
    one: Tried,
    chosen: Tried | None,
    gpus: tuple[GpuOption, ...],
    many: GpuOption | None,
    *,
    has_gpu: bool,
    micro: int,
    seq_len: int,
    base: Path | None,
) -> Solution:
    """The answer to one question. ``one`` is the plan's own way, ``chosen`` the one to take."""
    value: int | str | None = None
    change: dict[str, Any] = {}
    way = one.row.way
    if of == "method":
        value = chosen.row.way if chosen is not None else None
        change = dict(chosen.way.sets) if chosen is not None else {}
        way = str(value)
    elif of == "gpu":
        if gpus:
            value, way = gpus[0].gpu, gpus[0].way
            change = {"hardware": {"gpu": value}}
    elif of == "gpus":
        if many is not None:
            value, way, change = many.count, many.way, _spread_over(many.count)
        elif not has_gpu:
            raise InputError("--for gpus needs the kind of GPU", remedy="add --gpu NAME")
    elif not has_gpu:
        raise InputError(f"--for {of} needs a GPU", remedy="add --gpu NAME")
    elif of == "micro-batch":
        best = chosen or one if one.row.largest_micro is None else one
        value, way = best.row.largest_micro, best.row.way
        change = {**best.way.sets, "batch": {"micro": value}} if value else {}
    elif of == "seq-len":
        best = chosen or one if one.row.longest_seq_len is None else one
        value, way = best.row.longest_seq_len, best.row.way
        change = {**best.way.sets, "batch": {"seq_len": value}} if value else {}
    else:
        value, way, change = _rank(one, chosen, micro, seq_len, base)
    noun = of.replace("-", " ")
    settings = [f"{key}: {given}" for key, given in change.items() if key in _SETTINGS]
    told = ", ".join([way, *settings])
    text = f"{noun}: {value} ({told})" if value is not None else f"{noun}: nothing fits"
    return Solution(of=of, value=value, way=way if value else None, change=change, text=text)


def _rank(
    one: Tried, chosen: Tried | None, micro: int, seq_len: int, base: Path | None
) -> tuple[int | None, str, dict[str, Any]]:
    """The largest rank of an adapter that fits."""
    adapters = (
        tried
        for tried in (one, chosen)
        if tried and tried.way.plan.method and tried.way.plan.method.kind not in ("full", "partial")
    )
    best = next(adapters, None)
    if best is None:
        raise InputError("--for rank needs an adapter", remedy="add --method lora or qlora")
    way = best.way

    def fits(rank: int) -> bool:
        assert way.plan.method is not None
        plan = replace(way.plan, method=replace(way.plan.method, rank=rank))
        resolved = resolve(sized(plan, micro, seq_len), base=base)
        return sizer_for(resolved, plan, base).fits(micro, seq_len)

    assert best.resolved is not None
    rank = largest(fits, most=min(MOST_RANK, hidden_of(best.resolved.config or {})))
    change = dict(merge(way.sets, {"method": {"rank": rank}})) if rank else {}
    return rank or None, way.name, change


def _spread_over(count: int) -> dict[str, Any]:
    hardware: dict[str, Any] = {"count": min(8, count)}
    if count > 8:
        hardware["nodes"] = count // 8
    return {"hardware": hardware, "sharding": {"kind": "fsdp"}} if count > 1 else {}
