"""The verb ``fit`` of the library: what fits, how far it goes, how long it takes.

Part of the library's front: names from the catalogues in, answers out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftplan import __version__
from ftplan.catalog.gpus import GpuRow, find_gpu
from ftplan.catalog.models import resolve_model
from ftplan.errors import FtplanError, InputError, describe_fault
from ftplan.fit.changes import apply_change, merge
from ftplan.fit.sizer import Sizer, largest
from ftplan.fit.ways import Way, lean_settings
from ftplan.fitting import FitReport, FitRow, GpuOption
from ftplan.front import api
from ftplan.front.offering import Offering, cost_of
from ftplan.front.resolve import resolve
from ftplan.front.searching import Search, Workload, sized, sizer_for
from ftplan.front.solving import Question, Tried, solution_of
from ftplan.report import Report, Verdict
from ftplan.spec import Plan

__all__ = ["Question", "Workload", "fit", "sizer_of"]

MOST_SEQ_LEN = 131_072
"""Longest sequence that is searched when the model does not say its own."""


def sizer_of(given: Plan, *, base: Path | None = None) -> Sizer:
    """The sizes of a training job on its card."""
    return sizer_for(resolve(given, base=base), given, base)


def fit(
    plan: Plan,
    *,
    base: Path | None = None,
    workload: Workload | None = None,
    solve: Question | None = None,
    prices: Mapping[str, float] | None = None,
    stated: Collection[str] | None = None,
) -> FitReport:
    """What fits: the ways of finetuning the plan's model x how far each goes on the plan's GPU.

    Each way that fits comes with the fastest of its plans: settings that lose nothing x micro
    batches. Without a GPU in the plan: the smallest cards that fit; with prices the cheapest for
    the data, and how many. ``solve`` asks for one thing. A plan that serves is searched for its
    batch and context. ``stated``: keys that somebody wrote, as for ``estimate``.
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
    return _Fit(plan, base, workload, solve, stated).answer()


class _Fit:
    def __init__(
        self,
        plan: Plan,
        base: Path | None,
        workload: Workload,
        solve: Question | None,
        stated: Collection[str] | None,
    ) -> None:
        self.base = base
        self.stated = stated
        self.solve = solve
        self.micro = plan.batch.micro or 1
        self.seq_len = plan.batch.seq_len or _shortened(plan, base)
        self.plan = replace(plan, batch=replace(plan.batch, seq_len=self.seq_len))
        self.gpu = find_gpu(plan.hardware.gpu) if plan.hardware.gpu else None
        self.serving = plan.task == "serve"
        self.most = MOST_SEQ_LEN
        self.search = Search(self.plan, base, workload)
        self.offering = Offering(self.search, self.micro)

    def answer(self) -> FitReport:
        tried = [self._serve()] if self.serving else [self._try(way) for way in self._ways()]
        if all(one.resolved is None for one in tried):
            raise InputError(f"no way of running this job can be computed: {tried[0].row.note}")
        if self.gpu is None:
            return self._without_gpu(tried)
        return self._on_gpu(tried, self.gpu)

    def _ways(self) -> list[Way]:
        return self.offering.ways(self.gpu)

    # --- One card -----------------------------------------------------------------------------

    def _on_gpu(self, tried: list[Tried], gpu: GpuRow) -> FitReport:
        chosen = next((one for one in tried if _goes(one.row)), None)
        known = [one for one in tried if one.resolved is not None]
        best = chosen or min(known, key=lambda one: one.row.peak_bytes or 0)
        planned = tried[0] if tried[0].way.name == "as planned" else None
        asked = planned or (best if chosen is None else None)
        report = None
        if asked is not None:
            plan = sized(asked.way.plan, self.micro, self.seq_len)
            report = api.estimate(plan, base=self.base, stated=self.stated)
        resolved = best.resolved
        assert resolved is not None
        many = self.offering.fewest(best.way, gpu)
        gpus = self.offering.single(best.way, most=5)
        if self.search.prices_by_name and not self.serving:
            gpus = self.offering.cheapest([best.way.name], most=5)
        first = [chosen] if chosen is not None else []
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
            candidates=self.search.candidates,
            evaluated=self.search.evaluated,
            findings=report.findings if report is not None else (),
            assumptions=_shared(tried),
            tool_version=__version__,
        )

    def _try(self, way: Way) -> Tried:
        """A way as it is, or with as much of what loses nothing as it takes to fit."""
        try:
            first: Tried | None = None
            for setting in lean_settings(self.plan, way) if self.gpu else ({},):
                try:
                    one = self._sized(_with(way, setting))
                except FtplanError:
                    if first is None:
                        raise
                    continue
                first = first or one
                if one.row.verdict == "fits":
                    return self._timed(way, one)
            assert first is not None
            return self._timed(way, first)
        except Exception as error:  # one way that cannot be sized must not hide the others
            if "sharding" in way.sets:
                kept = {key: value for key, value in way.sets.items() if key != "sharding"}
                whole = apply_change(way.plan, {"sharding": {"kind": None}})
                return self._try(replace(way, sets=kept, plan=whole))
            message = error.message if isinstance(error, FtplanError) else describe_fault(error)
            return Tried(way, _refused(way, message))

    def _sized(self, way: Way) -> Tried:
        resolved = resolve(sized(way.plan, self.micro, self.seq_len), base=self.base)
        sizer = sizer_for(resolved, way.plan, self.base)
        self.most = _longest(resolved.config)
        device = sizer.counters(self.micro, self.seq_len).device
        structure = sizer.structure(self.seq_len, self.micro)
        micro = longest = 0
        if self.gpu is not None:
            micro = sizer.largest_micro(self.seq_len)
            longest = sizer.longest(self.micro, most=self.most)
        row = FitRow(
            way=way.name,
            change=way.sets,
            verdict=sizer.verdict(self.micro, self.seq_len) if self.gpu else "unknown",
            peak_bytes=device.expected,
            headroom_bytes=sizer.room.usable_bytes - device.high if self.gpu else None,
            trainable_params=structure.trainable_params,
            largest_micro=micro or None,
            longest_seq_len=longest or None,
        )
        return Tried(way, row, resolved, sizer)

    def _timed(self, way: Way, one: Tried) -> Tried:
        """The row with the fastest of the way's plans, or with how many cards it would take."""
        if self.gpu is None:
            return one
        found = self.search.fastest(way, self.gpu)
        if found is not None:
            plan, time = found
            return replace(one, row=replace(one.row, fastest=plan, time=time))
        many = self.offering.fewest(one.way, self.gpu)
        note = f"fits on {many.count} x {many.gpu}" if many is not None else ""
        return replace(one, row=replace(one.row, note=note))

    def _serve(self) -> Tried:
        plan = sized(replace(self.plan, method=None), self.micro, self.seq_len)
        way = Way(name="as planned", sets={}, plan=plan)
        resolved = resolve(plan, base=self.base)
        self.most = _longest(resolved.config)

        def judged(micro: int, seq_len: int) -> Report:
            one = sized(plan, micro, seq_len)
            return api.estimate(one, base=self.base, with_remedies=False)

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
        return Tried(way, row, resolved, None)

    # --- No card ------------------------------------------------------------------------------

    def _without_gpu(self, tried: list[Tried]) -> FitReport:
        known = [one for one in tried if one.resolved is not None]
        if self.search.prices_by_name and not self.serving:
            options = self.offering.cheapest([one.row.way for one in known], most=1)
        else:
            options = tuple(o for one in known for o in self.offering.single(one.way, most=1))
        many = None
        if not options:
            many = self.offering.fewest(known[-1].way, find_gpu("h100-80gb"))
        first = known[0].resolved
        assert first is not None
        best = _best_of(_wanted(known, options))
        reason = "no single card is enough"
        if best is not None:
            word = "cheapest" if cost_of(best) else "smallest"
            count = f"{best.count} x " if best.count > 1 else ""
            reason = f"no GPU is named: the {word} that fits is {count}{best.gpu} ({best.way})"
        return FitReport(
            verdict="fits" if options or many else "over",
            model=api.estimate_summary(first, known[0].sizer),
            gpu=None,
            micro=self.micro,
            seq_len=self.seq_len,
            recommended=best.way if best is not None else None,
            reason=reason,
            rows=tuple(one.row for one in tried),
            gpus=options,
            fewest=many,
            remedies=(),
            solution=self._solution(known[0], known[0], (best,) if best else (), many),
            candidates=self.search.candidates,
            evaluated=self.search.evaluated,
            assumptions=_shared(tried),
            tool_version=__version__,
        )

    # --- Words --------------------------------------------------------------------------------

    def _solution(
        self,
        one: Tried,
        chosen: Tried | None,
        gpus: tuple[GpuOption, ...],
        many: GpuOption | None,
    ) -> Any:
        if self.solve is None:
            return None
        if self.solve in ("micro-batch", "seq-len", "rank"):
            one = self._relaxed(one)
        return solution_of(
            self.solve, one, chosen, gpus, many, has_gpu=self.gpu is not None, base=self.base,
            micro=self.micro, seq_len=self.seq_len,
        )  # fmt: skip

    def _relaxed(self, one: Tried) -> Tried:
        """A way that does not fit as it is, with the settings of its fastest plan if that does."""
        fastest = one.row.fastest
        if one.row.verdict == "fits" or fastest is None:
            return one
        sets = {key: value for key, value in fastest.change.items() if key != "batch"}
        return self._sized(Way(name=one.way.name, sets=sets, plan=apply_change(self.plan, sets)))

    def _reason(self, chosen: Tried | None, tried: list[Tried]) -> str:
        size = f"{self.micro} x {self.seq_len} tokens"
        if chosen is None:
            smaller = [one.row for one in tried if one.row.largest_micro]
            if smaller:
                row = smaller[0]
                return f"nothing fits at {size}; {row.way} fits {row.largest_micro} at once"
            return f"nothing fits at {size}"
        if chosen.way.name == "as planned":
            if chosen.row.verdict == "fits":
                return f"the plan fits as it is, at {size}"
            return f"not as it is, at {size}, but with settings that lose nothing"
        before = [one.row.way for one in tried[: tried.index(chosen)] if one.row.peak_bytes]
        if not before:
            return f"it fits at {size} and gives up nothing"
        return f"it gives up least of those that fit at {size}"


def _with(way: Way, setting: Mapping[str, Any]) -> Way:
    """A way with a setting laid over what it sets."""
    if not setting:
        return way
    return replace(way, sets=merge(way.sets, setting), plan=apply_change(way.plan, setting))


def _goes(row: FitRow) -> bool:
    return row.verdict == "fits" or row.fastest is not None


def _wanted(known: list[Tried], options: tuple[GpuOption, ...]) -> list[GpuOption]:
    """Cards for the plan's own way; for a plan without one, for all but the last blocks alone."""
    own = [o for o in options if o.way == "as planned"]
    methods = {one.row.way: one.way.plan.method for one in known}
    whole = [o for o in options if (m := methods[o.way]) is not None and m.kind != "partial"]
    return own or whole or list(options)


def _best_of(options: list[GpuOption]) -> GpuOption | None:
    """The cheapest of several for the data, or else the smallest."""
    if not options:
        return None
    return min(options, key=lambda o: (cost_of(o), o.count * o.usable_bytes, o.gpu))


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


def _shared(tried: list[Tried]) -> tuple[Any, ...]:
    """What was assumed for every way alike."""
    lists = [one.resolved.assumptions for one in tried if one.resolved is not None]
    return tuple(a for a in lists[0] if all(a in other for other in lists[1:])) if lists else ()


def _shortened(plan: Plan, base: Path | None) -> int:
    """A length that nobody asked for is no longer than the model's own."""
    return min(2048, _longest(resolve(plan, base=base).config))


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
    found: set[Verdict] = {"fits" if _goes(row) else row.verdict for row in rows}
    return next((verdict for verdict in _ORDER if verdict in found), "unknown")
