"""The verb ``fit`` of the library: what fits, how far it goes, how long it takes.

Part of the library's front: names from the catalogues in, answers out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ftplan import __version__, api
from ftplan.assembling import job_of
from ftplan.catalog.gpus import GpuRow, find_gpu, search_gpus
from ftplan.catalog.models import resolve_model
from ftplan.catalog.throughput import speed_of, utilisation_of
from ftplan.errors import FtplanError, InputError, describe_fault
from ftplan.fit.cards import enough, fewest, ranked
from ftplan.fit.changes import apply_change
from ftplan.fit.flops import hidden_of
from ftplan.fit.sizer import Room, Sizer, largest
from ftplan.fit.time import data_time, micro_step
from ftplan.fit.ways import Way, ways_to_train
from ftplan.fitting import FitReport, FitRow, GpuOffer, GpuOption, Solution, TimeEstimate
from ftplan.memory.job import Job
from ftplan.report import Interval, Report, Verdict
from ftplan.resolve import Resolved, resolve
from ftplan.spec import Plan

__all__ = ["Question", "Workload", "fit", "sizer_of"]

MOST_SEQ_LEN = 131_072
"""Longest sequence that is searched when the model does not say its own."""
Question = Literal["micro-batch", "seq-len", "gpu", "gpus", "method", "rank"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to be processed and what it costs; None: not known."""

    tokens: int | None = None
    """Tokens, all epochs together."""
    prices: Mapping[str, float] | None = None
    """Price of one card per hour by catalogue name; the empty name: of the plan's own card."""
    watts: float | None = None
    """What one card draws."""
    slice_share: float = 1.0
    """Share of the card's compute units (MIG)."""


@dataclass(slots=True)
class _Tried:
    """A way, and what came of it."""

    way: Way
    row: FitRow
    resolved: Resolved | None = None
    sizer: Sizer | None = None


def sizer_of(given: Plan, *, base: Path | None = None) -> Sizer:
    """The sizes of a training job on its card."""
    return _sizer(resolve(given, base=base), given, base)


def _sizer(resolved: Resolved, given: Plan, base: Path | None) -> Sizer:
    plan, stack = resolved.plan, resolved.stack
    gpu = api.gpu_of(resolved)
    world = (plan.hardware.count or 1) * (plan.hardware.nodes or 1)
    room = Room(
        usable_bytes=gpu.usable_bytes if gpu is not None else 0,
        capability=api.capability_of(resolved),
        named=gpu is not None,
        gpus=world,
        traced=api.is_traced(resolved),
    )
    job = job_of(resolved)
    chunks = _chunks(resolved) if stack.loss_chunks else None
    if plan.task not in ("grpo", "ppo"):
        return Sizer(job, room, chunks)

    def job_at(micro: int, seq_len: int) -> Job:
        batch = replace(given.batch, micro=micro, seq_len=seq_len)
        return job_of(resolve(replace(given, batch=batch), base=base))

    return Sizer(job, room, chunks, job_at)


def _chunks(resolved: Resolved) -> Callable[[int], int] | None:
    """A chunk of the loss that grows with the batch: the stack splits it into so many parts."""
    loss = resolved.plan.loss
    assumed = any(a.key == "loss.chunk" for a in resolved.assumptions)
    if loss is None or loss.kind != "chunked" or not assumed:
        return None
    return lambda tokens: resolved.stack.chunk_tokens(tokens) or 256


def fit(
    plan: Plan,
    *,
    base: Path | None = None,
    workload: Workload | None = None,
    solve: Question | None = None,
    prices: Mapping[str, float] | None = None,
) -> FitReport:
    """What fits: the ways of finetuning the plan's model x how far each goes on the plan's GPU.

    Without a GPU in the plan: the smallest cards that fit (the cheapest, with prices), and how
    many. ``solve`` asks for one thing. A plan that serves is searched for its batch and context.
    Raises :class:`ftplan.errors.FtplanError` for names that are unknown.
    """
    if plan.model.params is not None:
        raise InputError(
            "what fits depends on the model's shape, and a parameter count has none",
            remedy="give --model NAME or --config PATH; ftplan memory --params lists the sums",
        )
    if plan.model.name is not None:
        resolve_model(plan.model.name)  # a name that is unknown is unknown to every way
    workload = workload or Workload()
    if prices:
        workload = replace(workload, prices=prices)
    return _Fit(plan, base, workload, solve).answer()


class _Fit:
    def __init__(
        self, plan: Plan, base: Path | None, workload: Workload, solve: Question | None
    ) -> None:
        self.plan = plan
        self.base = base
        self.workload = workload
        self.solve = solve
        self.micro = plan.batch.micro or 1
        self.seq_len = plan.batch.seq_len or 2048
        self.gpu = find_gpu(plan.hardware.gpu) if plan.hardware.gpu else None
        self.serving = plan.task == "serve"
        self.most = MOST_SEQ_LEN
        self.paid = {
            (find_gpu(name).name if name else ""): price
            for name, price in (workload.prices or {}).items()
        }

    def answer(self) -> FitReport:
        self._shorten()
        tried = [self._serve()] if self.serving else [self._try(way) for way in self._ways()]
        if all(one.resolved is None for one in tried):
            raise InputError(f"no way of running this job can be computed: {tried[0].row.note}")
        chosen = next((one for one in tried if one.row.verdict == "fits"), None)
        if self.gpu is None:
            return self._without_gpu(tried)
        sized = [one for one in tried if one.resolved is not None]
        best = chosen or min(sized, key=lambda one: one.row.peak_bytes or 0)
        planned = tried[0] if tried[0].way.name == "as planned" else None
        asked = planned or (best if chosen is None else None)
        report = api.estimate(self._sized(asked.way.plan), base=self.base) if asked else None
        resolved = best.resolved
        assert resolved is not None
        first = [chosen] if chosen is not None else []
        gpus = self._cards(best, most=5)
        many = self._fewest(best)
        return FitReport(
            verdict=_overall([one.row for one in tried]),
            model=api.estimate_summary(resolved, best.sizer),
            gpu=api.gpu_of(resolved),
            micro=self.micro,
            seq_len=self.seq_len,
            recommended=chosen.row.way if chosen is not None else None,
            reason=self._reason(chosen, tried),
            rows=tuple(one.row for one in (*first, *(t for t in tried if t is not chosen))),
            gpus=gpus,
            fewest=many,
            remedies=report.remedies if report is not None else (),
            solution=self._solution(planned or best, chosen, gpus, many),
            candidates=sum(one.sizer.evaluated for one in tried if one.sizer is not None),
            findings=report.findings if report is not None else (),
            assumptions=_shared(tried),
            tool_version=__version__,
        )

    def _shorten(self) -> None:
        """A length that nobody asked for is no longer than the model's own."""
        if self.plan.batch.seq_len is None:
            longest = _longest(resolve(self.plan, base=self.base).config)
            self.seq_len = min(self.seq_len, longest)

    def _ways(self) -> list[Way]:
        gpu = self.gpu
        return list(
            ways_to_train(
                self.plan,
                has_bf16=gpu is None or gpu.supports_bf16,
                is_cuda=gpu is None or gpu.vendor == "NVIDIA",
            )
        )

    def _sized(self, plan: Plan) -> Plan:
        batch = replace(plan.batch, micro=self.micro, seq_len=self.seq_len)
        return replace(plan, batch=batch)

    def _try(self, way: Way) -> _Tried:
        try:
            resolved = resolve(self._sized(way.plan), base=self.base)
            sizer = _sizer(resolved, way.plan, self.base)
            self.most = _longest(resolved.config)
            return _Tried(way, self._row(way, resolved, sizer), resolved, sizer)
        except Exception as error:  # one way that cannot be sized must not hide the others
            if "sharding" in way.sets:
                kept = {key: value for key, value in way.sets.items() if key != "sharding"}
                whole = apply_change(way.plan, {"sharding": {"kind": None}})
                return self._try(replace(way, sets=kept, plan=whole))
            message = error.message if isinstance(error, FtplanError) else describe_fault(error)
            return _Tried(way, _refused(way, message))

    def _row(self, way: Way, resolved: Resolved, sizer: Sizer) -> FitRow:
        device = sizer.counters(self.micro, self.seq_len).device
        structure = sizer.structure(self.seq_len, self.micro)
        micro = longest = 0
        if self.gpu is not None:
            micro = sizer.largest_micro(self.seq_len)
            longest = sizer.longest(self.micro, most=self.most)
        return FitRow(
            way=way.name,
            change=way.sets,
            verdict=sizer.verdict(self.micro, self.seq_len) if self.gpu else "unknown",
            peak_bytes=device.expected,
            headroom_bytes=sizer.room.usable_bytes - device.high if self.gpu else None,
            trainable_params=structure.trainable_params,
            largest_micro=micro or None,
            longest_seq_len=longest or None,
            time=self._time(resolved, sizer, micro) if micro else None,
        )

    def _time(self, resolved: Resolved, sizer: Sizer, largest_micro: int) -> TimeEstimate | None:
        """At the micro batch that was asked for, or at the largest up to 16 (more gains little)."""
        gpu = resolved.gpu
        assert gpu is not None
        given = self.plan.batch.micro
        micro = given if given and given <= largest_micro else min(largest_micro, 16)
        record = sizer.record(micro, self.seq_len)
        sequences = record.program.sequences  # a pair is two
        job, work = sizer.job, sizer.compute.at(micro * sequences, self.seq_len)
        dtype = job.environment.autocast or job.compute_dtype
        if job.weights.layout == "plain" and job.environment.autocast is None:
            dtype = job.weights.name
        speed = speed_of(gpu, mixed_or_weights=dtype, share=self.workload.slice_share)
        if not speed.flops:
            return None
        seconds, bound = micro_step(
            work,
            record,
            job,
            speed,
            utilisation_of(gpu),
            hidden_of(job.config),
        )
        return data_time(
            seconds,
            bound,
            work,
            micro=micro,
            sequences=sequences,
            seq_len=self.seq_len,
            accumulation=job.accumulation,
            gpus=sizer.room.gpus,
            tokens=self.workload.tokens,
            price_per_hour=self.paid.get(gpu.name, self.paid.get("")),
            watts=self.workload.watts,
        )

    def _serve(self) -> _Tried:
        plan = self._sized(replace(self.plan, method=None))
        way = Way(name="as planned", sets={}, plan=plan)
        resolved = resolve(plan, base=self.base)
        self.most = _longest(resolved.config)

        def judged(micro: int, seq_len: int) -> Report:
            batch = replace(plan.batch, micro=micro, seq_len=seq_len)
            return api.estimate(replace(plan, batch=batch), base=self.base, with_remedies=False)

        report = judged(self.micro, self.seq_len)
        assert report.device_bytes is not None
        micro = longest = 0
        if self.gpu is not None:
            micro = largest(lambda n: judged(n, self.seq_len).verdict == "fits", most=4096)
            steps = largest(
                lambda n: judged(self.micro, 128 * n).verdict == "fits", most=self.most // 128
            )
            longest = 128 * steps
        device = report.device_bytes
        row = FitRow(
            way=way.name,
            change=way.sets,
            verdict=report.verdict or "unknown",
            peak_bytes=device.expected,
            headroom_bytes=report.gpu.usable_bytes - device.high if report.gpu else None,
            trainable_params=None,
            largest_micro=micro or None,
            longest_seq_len=longest or None,
        )
        return _Tried(way, row, resolved, None)

    # --- Cards --------------------------------------------------------------------------------

    def _on(self, way: Way, gpu: str, count: int) -> Interval | None:
        """What a way takes on each of so many cards; sharded where there are several."""
        hardware = replace(
            way.plan.hardware, gpu=gpu, count=min(count, 8), nodes=max(1, count // 8), reserved=None
        )
        sharding = way.plan.sharding
        kind = sharding.kind if sharding.kind in ("fsdp", "zero1", "zero2", "zero3") else "fsdp"
        kind = kind if count > 1 else None  # type: ignore[assignment]
        plan = replace(way.plan, hardware=hardware, sharding=replace(sharding, kind=kind))
        if self.serving:
            plan = replace(plan, sharding=replace(sharding, tp=count if count > 1 else None))
        try:
            report = api.estimate(self._sized(plan), base=self.base, with_remedies=False)
            return report.device_bytes
        except FtplanError:
            return None
        except Exception:  # a fault of ours in a what-if must not hide the rest of the answer
            return None

    def _cards(self, one: _Tried, *, most: int) -> tuple[GpuOption, ...]:
        # a job's size depends on a card only through its compute capability
        sizes: dict[str | None, Interval | None] = {}

        def device(offer: GpuOffer) -> Interval | None:
            key = offer.compute_capability
            if key not in sizes:
                sizes[key] = self._on(one.way, offer.name, 1)
            return sizes[key]

        return enough(
            one.row.way,
            device,
            ranked(_offers(self.paid)),
            headroom=self.plan.budget.headroom or 0.0,
            most=most,
        )

    def _fewest(self, one: _Tried, gpu: GpuRow | None = None) -> GpuOption | None:
        gpu = gpu or self.gpu
        if gpu is None:
            return None
        usable = int(gpu.usable_bytes * (1 - (self.plan.budget.headroom or 0.0)))
        name = gpu.name
        return fewest(
            one.row.way,
            lambda count: self._on(one.way, name, count),
            gpu=name,
            usable=usable,
            price_per_hour=self.paid.get(name, self.paid.get("")),
        )

    def _without_gpu(self, tried: list[_Tried]) -> FitReport:
        usable = [one for one in tried if one.resolved is not None]
        options = [option for one in usable for option in self._cards(one, most=1)]
        many = None
        if not options:
            many = self._fewest(usable[-1], find_gpu("h100-80gb"))
        first = usable[0].resolved
        assert first is not None
        word = "cheapest" if self.paid else "smallest"
        reason = f"no GPU is named: for each way the {word} single card that fits"
        if not options:
            reason = "no single card is enough"
        return FitReport(
            verdict="fits" if options or many else "over",
            model=api.estimate_summary(first, usable[0].sizer),
            gpu=None,
            micro=self.micro,
            seq_len=self.seq_len,
            recommended=options[0].way if options else None,
            reason=reason,
            rows=tuple(one.row for one in tried),
            gpus=tuple(options),
            fewest=many,
            remedies=(),
            solution=self._solution(usable[0], usable[0], tuple(options), many),
            assumptions=_shared(tried),
            tool_version=__version__,
        )

    # --- Words --------------------------------------------------------------------------------

    def _reason(self, chosen: _Tried | None, tried: list[_Tried]) -> str:
        size = f"{self.micro} x {self.seq_len} tokens"
        if chosen is None:
            smaller = [one.row for one in tried if one.row.largest_micro]
            if smaller:
                row = smaller[0]
                return f"nothing fits at {size}; {row.way} fits {row.largest_micro} at once"
            return f"nothing fits at {size}"
        if chosen.way.name == "as planned":
            return f"the plan fits as it is, at {size}"
        before = [one.row.way for one in tried[: tried.index(chosen)] if one.row.peak_bytes]
        if not before:
            return f"it fits at {size} and gives up nothing"
        return f"the first that fits at {size}: {', '.join(before)} would not"

    def _solution(
        self,
        one: _Tried,
        chosen: _Tried | None,
        gpus: tuple[GpuOption, ...],
        many: GpuOption | None,
    ) -> Solution | None:
        of = self.solve
        if of is None:
            return None
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
                value, way = many.count, many.way
                change = _spread_over(many.count)
            elif self.gpu is None:
                raise InputError("--for gpus needs the kind of GPU", remedy="add --gpu NAME")
        elif self.gpu is None:
            raise InputError(f"--for {of} needs a GPU", remedy="add --gpu NAME")
        elif of == "micro-batch":
            best = chosen or one if one.row.largest_micro is None else one
            value, way = best.row.largest_micro, best.row.way
            change = {"batch": {"micro": value}} if value else {}
        elif of == "seq-len":
            best = chosen or one if one.row.longest_seq_len is None else one
            value, way = best.row.longest_seq_len, best.row.way
            change = {"batch": {"seq_len": value}} if value else {}
        else:
            value, way, change = self._rank(one, chosen)
        noun = of.replace("-", " ")
        text = f"{noun}: {value} ({way})" if value is not None else f"{noun}: nothing fits"
        return Solution(of=of, value=value, way=way if value else None, change=change, text=text)

    def _rank(self, one: _Tried, chosen: _Tried | None) -> tuple[int | None, str, dict[str, Any]]:
        best = next(
            (
                c
                for c in (one, chosen)
                if c and c.way.plan.method and c.way.plan.method.kind not in ("full", "partial")
            ),
            None,
        )
        if best is None:
            raise InputError("--for rank needs an adapter", remedy="add --method lora or qlora")
        way = best.way

        def fits(rank: int) -> bool:
            assert way.plan.method is not None
            plan = replace(way.plan, method=replace(way.plan.method, rank=rank))
            return sizer_of(self._sized(plan), base=self.base).fits(self.micro, self.seq_len)

        assert best.resolved is not None
        most = min(1024, hidden_of(best.resolved.config or {}))
        rank = largest(fits, most=most)
        return rank or None, way.name, {"method": {"rank": rank}} if rank else {}


def _spread_over(count: int) -> dict[str, Any]:
    hardware: dict[str, Any] = {"count": min(8, count)}
    if count > 8:
        hardware["nodes"] = count // 8
    return {"hardware": hardware, "sharding": {"kind": "fsdp"}} if count > 1 else {}


def _refused(way: Way, message: str) -> FitRow:
    return FitRow(
        way=way.name,
        change=way.sets,
        verdict="unknown",
        peak_bytes=None,
        headroom_bytes=None,
        trainable_params=None,
        largest_micro=None,
        longest_seq_len=None,
        note=message,
    )


def _shared(tried: list[_Tried]) -> tuple[Any, ...]:
    """What was assumed for every way alike."""
    lists = [one.resolved.assumptions for one in tried if one.resolved is not None]
    return tuple(a for a in lists[0] if all(a in other for other in lists[1:])) if lists else ()


def _offers(paid: Mapping[str, float]) -> list[GpuOffer]:
    """Cards that can be rented or bought one by one; with prices by name, those that have one."""
    named = {name for name in paid if name}
    offers = []
    for row in search_gpus(""):
        if named and row.name not in named:
            continue
        desk = row.unified_memory or row.kind == "laptop"
        if not named and (row.vendor != "NVIDIA" or desk or not row.supports_bf16):
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


def _longest(config: Mapping[str, Any] | None) -> int:
    config = config or {}
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
