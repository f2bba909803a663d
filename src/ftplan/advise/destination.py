"""Where the evidence points: each failure votes for a step, the axis that holds most decides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from math import fsum
from typing import Literal

from ftplan.advice import STEPS, Step
from ftplan.advise.facts import Facts, Row
from ftplan.advise.rules.retrieval import SEARCHING
from ftplan.advise.support import MAYBE, NO, WEAK, ladder_of, support
from ftplan.advise.taxonomy import Kind
from ftplan.dataclass import dataclass
from ftplan.failures import FailureClass

__all__ = ["Aim", "Axis", "Vote", "find_aim"]

Axis = Literal["evaluation", "information", "form", "operational"]
"""``form``: behavior and capability together, what prompts, examples and weights change."""

MOSTLY_FORM = 0.8
"""Share of behaviour from which it goes before missing information (RAG005)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """The step that one row calls for."""

    row: Row
    kind: Kind
    """Whose ladder it climbs after the tests' evidence."""
    axis: Axis
    step: Step
    level: int
    others: tuple[Step, ...]
    """Further steps that the state supports for this row."""
    closed: tuple[Step, ...]
    """Steps that the row called for and that a rule blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """The destination with the votes that made it."""

    step: Step
    axis: Axis | None
    votes: tuple[Vote, ...]
    """All votes; those of ``axis`` decided."""
    why: str
    """What on the failures' side made it, in a sentence."""

    @property
    def deciding(self) -> tuple[Vote, ...]:
        """The votes on the deciding axis."""
        return tuple(v for v in self.votes if v.axis == self.axis)


def find_aim(f: Facts, fired: frozenset[str], blocked: Mapping[Step, str]) -> Aim:
    """The destination. ``blocked`` maps steps to the rule that closes them; none is returned."""
    votes = tuple(v for row in f.rows if (v := _vote(f, row, blocked)) is not None)
    stop = _stop(f, fired, votes)
    if stop is not None:
        return stop
    if not votes:
        return Aim(step="evaluate_first", axis=None, votes=(), why=_nothing_to_count(f))
    axis = _axis(f, votes)
    step = _elect([v for v in votes if v.axis == axis])
    if step == "finetune" and _keeps_retrieval(f, votes) and "rag_and_finetune" not in blocked:
        step = "rag_and_finetune"
    return Aim(step=step, axis=axis, votes=votes, why=_because(f, axis, votes))


def _stop(f: Facts, fired: frozenset[str], votes: tuple[Vote, ...]) -> Aim | None:
    if any(v.axis == "evaluation" for v in votes) and f.share_at_least(0.1, "evaluation").value in (
        True,
        None,
    ):
        return Aim(
            step="evaluate_first",
            axis="evaluation",
            votes=votes,
            why="Some of the failures are failures of the labels, the task or the judge, and "
            "everything else rests on those.",
        )
    pressed = f.pressed or any(v.axis == "operational" for v in votes)
    if ("FTN008" in fired and not pressed) or fired & {"EVL005", "EVL007"}:
        return Aim(step="do_nothing", axis=None, votes=votes, why="The accuracy is at its target.")
    if "OPS012" in fired:
        return Aim(
            step="do_nothing",
            axis="operational",
            votes=votes,
            why="The volume does not pay for a tuned model.",
        )
    return None


def _nothing_to_count(f: Facts) -> str:
    if f.excluded:
        return "Only the harness failed; nothing is known of the system yet."
    if f.rows:
        return "The failures carry no kind and no class yet: label them first."
    return "No failures were given: collect and label them first."


def _vote(f: Facts, row: Row, blocked: Mapping[Step, str]) -> Vote | None:
    resolved = f.resolve(row)
    if resolved is None or row.kind is None:
        return None
    kind, ladder = ladder_of(f, row, resolved)
    levels = {step: support(f, kind, step) for step in ladder}
    ranked = sorted(ladder, key=lambda step: -levels[step])  # stable: the ladder's order
    ranked = [step for step in ranked if levels[step] > NO]
    wanted = ranked[0] if ranked else None
    closed = tuple(step for step in ladder if step in blocked)
    open_steps = [step for step in ranked if step not in blocked]
    if wanted is not None and wanted not in blocked:
        choice, level = wanted, levels[wanted]
    elif (best := _second_best(resolved, wanted, open_steps, levels, blocked)) is not None:
        choice, level = best, levels[best]
    else:
        first_closed = wanted or (closed[0] if closed else None)
        rule = blocked.get(first_closed) if first_closed is not None else None
        choice = _instead(f, rule, resolved)
        level = MAYBE
    axis: Axis = "form" if resolved in ("behavior", "capability") else resolved  # type: ignore[assignment]
    return Vote(
        row=row,
        kind=kind,
        axis=axis,
        step=choice,
        level=level,
        others=tuple(s for s in open_steps if s != choice and levels[s] >= MAYBE),
        closed=closed,
    )


INSTEAD: dict[str, Step] = {
    "EVL001": "evaluate_first",
    "EVL003": "evaluate_first",
    "PRM008": "prompt",
    "PRM009": "constrain_output",
    "FTN003": "prompt",
    "OPS010": "switch_model",
    "OPS011": "prompt",
    "OPS012": "do_nothing",
}
"""What a closing rule recommends in place of what it closes."""


def _second_best(
    resolved: FailureClass,
    wanted: Step | None,
    open_steps: list[Step],
    levels: Mapping[Step, int],
    blocked: Mapping[Step, str],
) -> Step | None:
    """The next step of the ladder when the wanted one is closed, if the state supports it.

    In operation a step without evidence is still worth naming, unless the closing rule names one.
    """
    gated = wanted is not None and blocked.get(wanted) in INSTEAD
    least = WEAK if resolved == "operational" and not gated else MAYBE
    return next((step for step in open_steps if levels[step] >= least), None)


def _instead(f: Facts, rule: str | None, resolved: FailureClass) -> Step:
    """The best step that is left when what a failure calls for is closed."""
    if rule in INSTEAD:
        return INSTEAD[rule]
    state = f.state
    if resolved in ("information", "operational"):
        # decline what cannot be looked up; shorten, cache: both are work on the prompt
        return "prompt"
    if f.larger_model_fixes and not f.pressed:
        return "switch_model"
    if not f.prompting:
        return "prompt"
    used_up = (state.few_shot_examples or 0) >= 50 or state.few_shot_helps is False
    if not used_up and not (state.cost_limited or state.latency_limited):
        return "few_shot"
    if state.prompt_optimizer_tried is not True:
        return "prompt_optimizer"
    return "prompt" if f.larger_model_fixes.value is False or f.pressed else "switch_model"


def _axis(f: Facts, votes: tuple[Vote, ...]) -> Axis:
    """Information before behaviour while there is no retrieval; then the axis with most."""
    present = {v.axis for v in votes} - {"evaluation"}
    if not present:
        return "evaluation"
    parts: dict[Axis, list[float]] = defaultdict(list)
    known = all(v.row.weight is not None for v in votes)
    for vote in votes:
        parts[vote.axis].append(vote.row.weight or 0.0)
    information, form = fsum(parts["information"]), fsum(parts["form"])
    quality = information + form
    if "operational" in present:
        below_target = f.at_target_by_point.value is False
        if present == {"operational"} or (
            known and fsum(parts["operational"]) > quality and not below_target
        ):
            return "operational"
    if "information" in present and "form" in present:
        if not known:
            return "information"
        if f.state.rag in SEARCHING:
            return "information" if information >= form else "form"
        return "form" if form >= MOSTLY_FORM * quality else "information"
    return "information" if "information" in present else "form"


def _elect(votes: list[Vote]) -> Step:
    """The step with most weight behind it; of equals the one that stands first on the way."""
    known = all(v.row.weight is not None for v in votes)
    tally: dict[Step, float] = defaultdict(float)
    for vote in votes:
        tally[vote.step] += (vote.row.weight or 0.0) if known else 1.0
    return max(sorted(tally, key=STEPS.index), key=lambda step: round(tally[step], 9))


def _keeps_retrieval(f: Facts, votes: tuple[Vote, ...]) -> bool:
    """Facts fail as well and are looked up already: train on top of that, not instead of it."""
    return f.state.rag in SEARCHING and any(v.axis == "information" for v in votes)


def _because(f: Facts, axis: Axis, votes: tuple[Vote, ...]) -> str:
    names = sorted({v.row.name or v.kind.name for v in votes if v.axis == axis})
    weights = [v.row.weight for v in votes if v.axis == axis]
    share = None if any(w is None for w in weights) else fsum(w for w in weights if w is not None)
    label = {
        "evaluation": "the evaluation itself",
        "information": "missing information",
        "form": "behaviour or capability",
        "operational": "cost, speed or operation",
    }[axis]
    listed = ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
    how_much = "What fails" if share is None else f"{share:.0%} of what fails"
    others = {v.axis for v in votes} - {axis}
    tail = ""
    if axis == "information" and "form" in others:
        tail = " Behaviour fails too; information goes first."
    elif axis == "form" and "information" in others:
        tail = " Information is missing too, in fewer cases."
    return f"{how_much} is {label} ({listed}).{tail}"
