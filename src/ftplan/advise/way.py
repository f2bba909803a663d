"""The way to the destination: which cheap rungs lie on it, and which are done."""

from __future__ import annotations

from typing import Literal

from ftplan.advice import CHEAP_STEPS, Step
from ftplan.advise.destination import Aim
from ftplan.advise.facts import Facts
from ftplan.advise.truth import FALSE, TRUE, Truth, unknown
from ftplan.dataclass import dataclass

__all__ = ["Rung", "rungs_to"]

GATES = ("EVL001", "EVL002", "EVL003", "EVL004")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One cheap step on the way."""

    step: Step
    status: Literal["done", "undone", "unknown"]
    needs: tuple[str, ...]
    """What would have to be known, when it is unknown."""


def rungs_to(f: Facts, aim: Aim, fired: frozenset[str]) -> tuple[Rung, ...]:
    """The cheap rungs before the destination, in their order, done ones included."""
    rungs = []
    for step in CHEAP_STEPS:
        if step == aim.step:
            break
        if _on_the_way(f, aim, step):
            done = _done(f, aim, step, fired)
            status: Literal["done", "undone", "unknown"] = (
                "unknown" if done.value is None else "done" if done.value else "undone"
            )
            rungs.append(Rung(step=step, status=status, needs=tuple(sorted(done.needs))))
    return tuple(rungs)


def _on_the_way(f: Facts, aim: Aim, step: Step) -> bool:
    if step == "evaluate_first":
        return True
    if aim.step in ("evaluate_first", "do_nothing"):
        return False
    deciding = aim.deciding
    asked_for = any(step in vote.kind.rungs for vote in deciding)
    if step == "constrain_output":
        return asked_for and not f.state.niche_syntax
    if step == "prompt_optimizer":
        examples = max(f.state.eval_examples or 0, f.state.labelled_examples or 0)
        automatic = f.state.grader_verifiable is True and examples >= 20
        return automatic and (asked_for or aim.step == "reinforcement_finetune")
    return asked_for


def _done(f: Facts, aim: Aim, step: Step, fired: frozenset[str]) -> Truth:
    state = f.state
    if step == "evaluate_first":
        return FALSE if fired & set(GATES) else f.evaluation
    if step == "prompt":
        if state.prompts_versioned is False:
            return FALSE  # measured, perhaps, but against what?
        retrieves = aim.axis == "information" and state.rag not in (None, "none")
        if f.prompting.value is None and retrieves:
            return TRUE  # a system that retrieves has a prompt that was made for it
        return f.prompting
    if step == "constrain_output":
        return f.yes("constrained_decoding_tried")
    if step == "few_shot":
        return f.shots
    if state.finetuned:
        return TRUE
    tried = state.prompt_optimizer_tried
    return unknown("prompt_optimizer_tried") if tried is None else Truth(tried)
