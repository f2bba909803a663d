"""The textbook's workflow with this project's place on it, as data for a drawing."""

from __future__ import annotations

from collections.abc import Mapping

from ftplan.advice import CHEAP_STEPS, STEPS, TITLES, Blocked, Station, Step
from ftplan.advise.destination import Aim
from ftplan.advise.facts import Facts
from ftplan.advise.way import Rung

__all__ = ["workflow"]

SPINE: tuple[Step, ...] = (
    "evaluate_first", "prompt", "few_shot", "rag_basic", "rag_advanced", "finetune",
    "rag_and_finetune",
)  # fmt: skip
"""Evaluation, prompting, examples, basic retrieval, better retrieval or finetuning, both."""

ORDER: tuple[Step, ...] = (*STEPS[:5], "full_context", *STEPS[6:])


def workflow(
    f: Facts,
    aim: Aim,
    way: tuple[Rung, ...],
    plan: tuple[Step, ...],
    blocked: Mapping[Step, Blocked],
) -> tuple[Station, ...]:
    """The stations of the spine and of the plan in order, each with where it stands."""
    on_path = set(SPINE) | set(plan) | {rung.step for rung in way}
    stations = []
    for step in sorted(on_path, key=ORDER.index):
        stations.append(_station(f, aim, way, plan, blocked, step))
    return tuple(stations)


def _station(
    f: Facts,
    aim: Aim,
    way: tuple[Rung, ...],
    plan: tuple[Step, ...],
    blocked: Mapping[Step, Blocked],
    step: Step,
) -> Station:
    rung = next((r for r in way if r.step == step), None)
    if step == plan[0]:
        asked = rung is not None and rung.status == "unknown"
        return _make(step, "next", "not known to be done" if asked else "the next step")
    if step in plan:
        note = "where the evidence points" if step == aim.step else "on the way"
        if rung is not None and rung.status == "unknown":
            note = "on the way, not known to be done"
        return _make(step, "later", note)
    if step in blocked:
        return _make(step, "blocked", blocked[step].reason, blocked[step].rule)
    if rung is not None and rung.status == "done":
        said = f.state.eval_pipeline is True or step != "evaluate_first"
        return _make(step, "done" if said else "assumed", "done" if said else "taken for granted")
    if _in_place(f, step):
        return _make(step, "done", "in place")
    if step in CHEAP_STEPS or aim.step == "do_nothing":
        return _make(step, "unneeded", "not on this way")
    later = _afterwards(aim, step)
    return _make(step, "after" if later else "unneeded", later or "no failure calls for it")


def _afterwards(aim: Aim, step: Step) -> str:
    """Under which condition the step comes after the destination; empty: it does not."""
    axes = {vote.axis for vote in aim.votes}
    both = {"information", "form"} <= axes
    if step == "rag_advanced" and aim.step in ("full_context", "rag_basic"):
        return "if information is still missing"
    if step == "rag_and_finetune" and both and aim.step != "do_nothing":
        return "if both kinds of failure remain"
    if step == "finetune" and both and aim.axis == "information":
        return "if behaviour remains"
    if any(step in (vote.step, *vote.others) for vote in aim.votes):
        return "if failures remain"
    return ""


def _make(step: Step, status: str, note: str, rule: str | None = None) -> Station:
    return Station(
        step=step,
        title=TITLES[step],
        status=status,  # type: ignore[arg-type]
        note=note,
        rule=rule,
    )


def _in_place(f: Facts, step: Step) -> bool:
    rag = f.state.rag
    return {
        "prompt": bool(f.prompting),
        "few_shot": bool(f.examples_in_prompt),
        "full_context": rag == "full_context",
        "rag_basic": rag in ("term", "embedding", "hybrid"),
        "rag_advanced": rag == "hybrid" and f.state.rag_rerank is True,
        "finetune": f.state.finetuned is True,
    }.get(step, False)
