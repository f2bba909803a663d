"""Every plan of a way on a card: settings that lose nothing x micro batches, and which is fastest.

Part of the library's front: it turns plans into the cells that :mod:`ftplan.fit.search` asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

from ftplan.catalog.gpus import GpuRow, find_gpu
from ftplan.catalog.throughput import speed_of, utilisation_of
from ftplan.dataclass import dataclass
from ftplan.errors import FtplanError
from ftplan.files.lengths import cut_to, packed, padded_tokens
from ftplan.fit.changes import Change, apply_change, merge
from ftplan.fit.search import Best, Cell, fastest
from ftplan.fit.sizer import Records, Room, Sizer
from ftplan.fit.time import Amount, data_time, micro_step
from ftplan.fit.ways import Way, free_settings
from ftplan.fitting import FastestPlan, Spread, TimeEstimate
from ftplan.front import api
from ftplan.front.assembling import job_of, lengths_of
from ftplan.front.resolve import Resolved, resolve
from ftplan.memory.job import Job
from ftplan.spec import Plan

__all__ = ["MOST_MICRO", "Search", "Workload", "sized", "sizer_for"]

MOST_MICRO = 512
"""Largest micro batch that is searched where the plan gives none."""
PADDED_MICROS = tuple(sorted({2**n for n in range(10)} | {3 * 2**n for n in range(8)}))
"""Micro batches that are tried where padding makes larger ones slower: 2^n and 3 x 2^n."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to be processed and what it costs; None: not known."""

    tokens: int | None = None
    """Tokens, all epochs together, in full sequences."""
    lengths: Mapping[int, int] | None = None
    """Or: how many samples there are of each length in tokens."""
    epochs: float = 1.0
    """Passes over the samples."""
    prices: Mapping[str, float] | None = None
    """Price of one card per hour by catalogue name; the empty name: of the plan's own card."""
    watts: float | None = None
    """What one card draws."""
    slice_share: float = 1.0
    """Share of the card's compute units (MIG)."""


def sized(plan: Plan, micro: int, seq_len: int) -> Plan:
    """The plan at a batch."""
    return replace(plan, batch=replace(plan.batch, micro=micro, seq_len=seq_len))


def sizer_for(
    resolved: Resolved,
    given: Plan,
    base: Path | None,
    records: Records | None = None,
) -> Sizer:
    """The sizes of a training job on its card. ``records``: of a job that is alike."""
    plan, stack = resolved.plan, resolved.stack
    gpu = api.gpu_of(resolved)
    room = Room(
        usable_bytes=gpu.usable_bytes if gpu is not None else 0,
        capability=api.capability_of(resolved),
        named=gpu is not None,
        gpus=(plan.hardware.count or 1) * (plan.hardware.nodes or 1),
        traced=api.is_traced(resolved),
        above=stack.readings_above,
        lengths=lengths_of(resolved),
    )
    chunks = _chunks(resolved) if stack.loss_chunks else None
    job = job_of(resolved)
    if plan.task not in ("grpo", "ppo"):
        return Sizer(job, room, chunks, records=records)

    def job_at(micro: int, seq_len: int) -> Job:
        return job_of(resolve(sized(given, micro, seq_len), base=base))

    return Sizer(job, room, chunks, job_at)


def _chunks(resolved: Resolved) -> Callable[[int], int] | None:
    """A chunk of the loss that grows with the batch: the stack splits it into so many parts."""
    loss = resolved.plan.loss
    assumed = any(a.key == "loss.chunk" for a in resolved.assumptions)
    if loss is None or loss.kind != "chunked" or not assumed:
        return None
    return lambda tokens: resolved.stack.chunk_tokens(tokens) or 256


@dataclass(frozen=True, slots=True)
class _Place:
    """A cell's plan, and what is needed to size it and to time it."""

    sizer: Sizer
    resolved: Resolved
    change: Change
    """Settings of the way."""
    whole_batch: int | None
    """Sequences of one step on one card, where the plan fixes them."""

    def batch(self, micro: int) -> Change:
        """The micro batch as a change to the plan; accumulation keeps a step that is fixed."""
        if self.whole_batch is None:
            return {"batch": {"micro": micro}}
        return {"batch": {"micro": micro, "accumulation": self.whole_batch // micro}}

    def accumulation(self, micro: int) -> int:
        """Micro batches of one step."""
        job = self.sizer.job
        return job.accumulation if self.whole_batch is None else self.whole_batch // micro


class Search:
    """The plans of one question: a model, a sequence length, what is to be processed."""

    def __init__(self, plan: Plan, base: Path | None, workload: Workload) -> None:
        self.plan = plan
        self.base = base
        self.workload = workload
        prices = dict(workload.prices or {})
        self._own_price = prices.pop("", None)
        self.prices_by_name = {find_gpu(name).name: price for name, price in prices.items()}
        """Price of one card and hour by catalogue name."""
        self.seq_len = plan.batch.seq_len or 2048
        self.candidates = 0
        """Plans that the answers were chosen from."""
        self.evaluated = 0
        """Sizes that were asked of a record for that."""
        self._records: dict[object, Records] = {}
        self._padded: dict[int, int] = {}
        self._packed: int | None = None

    def price_of(self, gpu: GpuRow) -> float | None:
        """Per card and hour, as the user gave it: by name, or for the plan's own card."""
        own = self.plan.hardware.gpu
        if own is not None and find_gpu(own).name == gpu.name and self._own_price is not None:
            return self._own_price
        return self.prices_by_name.get(gpu.name)

    def fastest(self, way: Way, gpu: GpuRow) -> tuple[FastestPlan, TimeEstimate] | None:
        """The fastest plan of a way that fits the card (``way.plan`` says how many of them)."""
        cells = [cell for setting in free_settings(self.plan, way)
                 for cell in self._cells(way, setting, gpu)]  # fmt: skip
        self.candidates += sum(len(cell.micros) for cell in cells)
        best = fastest(cells)
        self.evaluated += sum(cell.key.sizer.evaluated for cell in cells)
        return None if best is None else self._told(best, way, gpu)

    def _told(self, best: Best[_Place], way: Way, gpu: GpuRow) -> tuple[FastestPlan, TimeEstimate]:
        place, micro = best.key, best.micro
        device = place.sizer.counters(micro, self.seq_len).device
        found = FastestPlan(
            change=merge(merge(way.sets, place.change), place.batch(micro)),
            micro=micro,
            largest_micro=best.most,
            accumulation=place.accumulation(micro),
            peak_bytes=device.expected,
            headroom_bytes=place.sizer.room.usable_bytes - device.high,
        )
        return found, self.time(place.sizer, gpu, micro, place.accumulation(micro))

    def _cells(self, way: Way, setting: Change, gpu: GpuRow) -> list[Cell[_Place]]:
        """One cell, or one for each micro batch of a step that is fixed: what a step has fetched
        goes by its accumulation, so each has a record of its own."""
        batch = self.plan.batch
        if batch.micro is None:
            padded = self.workload.lengths is not None and not batch.packing
            micros = PADDED_MICROS if padded else range(1, MOST_MICRO + 1)
            return self._cell(way, setting, gpu, micros, None, {})
        whole = batch.micro * (batch.accumulation or 1)
        return [
            cell
            for micro in range(1, whole + 1)
            if whole % micro == 0
            for cell in self._cell(
                way, setting, gpu, [micro], whole, {"accumulation": whole // micro}
            )
        ]

    def _cell(
        self,
        way: Way,
        setting: Change,
        gpu: GpuRow,
        micros: Sequence[int],
        whole: int | None,
        batch: Mapping[str, Any],
    ) -> list[Cell[_Place]]:
        plan = apply_change(way.plan, setting)
        plan = replace(plan, batch=replace(plan.batch, **{"micro": 1, **batch}))
        try:
            resolved = resolve(sized(plan, 1, self.seq_len), base=self.base)
            key = (way.name, repr(setting), *_traits(resolved))
            sizer = sizer_for(resolved, plan, self.base, self._records.setdefault(key, Records()))
            sizer.record(1, self.seq_len)
        except FtplanError:
            return []  # a setting that this model or stack does not have
        place = _Place(sizer, resolved, setting, whole)
        return [
            Cell(
                key=place,
                micros=micros,
                fits=lambda micro: sizer.fits(micro, self.seq_len),
                rate=lambda micro: self.rate(sizer, gpu, micro, place.accumulation(micro)),
                grows=self.workload.lengths is None or sizer.job.environment.packed,
            )
        ]

    # --- Time ---------------------------------------------------------------------------------

    def rate(self, sizer: Sizer, gpu: GpuRow, micro: int, accumulation: int) -> float:
        """Tokens a second of all cards, expected: of the data, or else in full sequences."""
        time = self.time(sizer, gpu, micro, accumulation)
        if self.workload.lengths is None or time.hours is None or time.tokens is None:
            return time.tokens_per_second.expected
        return time.tokens / (3600 * time.hours.expected)

    def time(self, sizer: Sizer, gpu: GpuRow, micro: int, accumulation: int) -> TimeEstimate:
        """How long a micro batch takes, and the data with it."""
        job, gpus = sizer.job, sizer.room.gpus
        dtype = job.environment.autocast or job.compute_dtype
        if job.weights.layout == "plain" and job.environment.autocast is None:
            dtype = job.weights.name
        part = self.workload.slice_share
        speed = speed_of(gpu, mixed_or_weights=dtype, gpus=gpus, share=part)
        load = sizer.load(micro, self.seq_len, accumulation)
        share = utilisation_of(gpu)
        seconds, bound = micro_step(load, speed, share)
        length = self._length(sizer, micro)
        data_seconds = seconds
        if length != self.seq_len:
            data_seconds = micro_step(sizer.load(micro, length, accumulation), speed, share)[0]
        return data_time(
            seconds,
            bound,
            load,
            speed,
            micro=micro,
            sequences=sizer.record(micro, self.seq_len).program.sequences,
            seq_len=self.seq_len,
            accumulation=accumulation,
            gpus=gpus,
            amount=self._amount(sizer, data_seconds),
            price_per_hour=self.price_of(gpu),
            watts=self.workload.watts,
        )

    def _length(self, sizer: Sizer, micro: int) -> int:
        """How long the data's sequences are in the mean: padded to a batch's longest, or packed."""
        lengths = self.workload.lengths
        if lengths is None or sizer.job.environment.packed:
            return self.seq_len
        if micro not in self._padded:
            count = sum(lengths.values())
            self._padded[micro] = ceil(padded_tokens(lengths, self.seq_len, micro) / count)
        return self._padded[micro]

    def _amount(self, sizer: Sizer, seconds: Spread) -> Amount | None:
        """The data, as sequences of which a micro batch takes so many seconds."""
        lengths, epochs = self.workload.lengths, self.workload.epochs
        if lengths is None:
            tokens = self.workload.tokens
            if tokens is None:
                return None
            return Amount(tokens=tokens, sequences=tokens / self.seq_len, seconds=seconds)
        tokens = sum(n * times for n, times in cut_to(lengths, self.seq_len).items())
        if self._packed is None and sizer.job.environment.packed:
            self._packed = packed(lengths, self.seq_len)
        count = self._packed if sizer.job.environment.packed else sum(lengths.values())
        return Amount(
            tokens=round(tokens * epochs), sequences=(count or 0) * epochs, seconds=seconds
        )


def _traits(resolved: Resolved) -> tuple[object, ...]:
    """What a record of one way and setting depends on beside its batch: not on the card itself."""
    job, hardware = job_of(resolved), resolved.plan.hardware
    environment = replace(job.environment, capability=(8, 0) if job.environment.modern else (7, 0))
    return (
        environment,
        job.weights.name,
        job.base_dtype,
        job.compute_dtype,
        job.accumulation > 1,
        job.sampler_bytes,
        hardware.count,
        hardware.nodes,
        resolved.plan.sharding,
    )
