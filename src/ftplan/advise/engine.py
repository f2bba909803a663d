"""From a failures file to the next step: gates, classes, axis, rungs, method, feasibility, stop."""

from __future__ import annotations

from math import fsum

from ftplan.advice import (
    CHEAP_STEPS,
    STEPS,
    TITLES,
    Advice,
    Alternative,
    Blocked,
    Destination,
    Evidence,
    Recommendation,
    Share,
    Step,
    Strength,
    Undetermined,
)
from ftplan.advise.asking import next_test
from ftplan.advise.destination import Aim, find_aim
from ftplan.advise.facts import BASELINE, Facts
from ftplan.advise.method import choose_method
from ftplan.advise.rules import RULES, Rule
from ftplan.advise.statistics import wilson
from ftplan.advise.truth import Truth
from ftplan.advise.way import Rung, rungs_to
from ftplan.advise.workflow import workflow
from ftplan.dataclass import dataclass
from ftplan.failures import FailuresFile

__all__ = ["advise"]

ARGUES: dict[Step, tuple[str, ...]] = {
    "evaluate_first": ("EVL001", "EVL003", "EVL004", "EVL002", "OPS014"),
    "prompt": ("PRM001", "PRM008", "PRM006", "FTN003", "OPS011"),
    "constrain_output": ("PRM002", "PRM009"),
    "few_shot": ("PRM003", "PRM004", "FTN009"),
    "prompt_optimizer": ("PRM005",),
    "full_context": ("RAG001", "OPS001"),
    "rag_basic": ("RAG002", "RAG005", "OPS001"),
    "rag_advanced": ("RAG003", "RAG004"),
    "finetune": ("FTN001", "FTN002", "FTN007", "MTH001", "MTH010"),
    "rag_and_finetune": ("FTN004", "OPS002", "OPS007", "MTH001"),
    "distill": ("MTH006",),
    "preference_finetune": ("MTH002", "MTH003"),
    "reinforcement_finetune": ("MTH004", "OPS006"),
    "continued_pretrain": ("MTH007",),
    "long_context_finetune": ("MTH008",),
    "switch_model": ("PRM007", "OPS005", "OPS010", "RAG007"),
    "do_nothing": ("EVL005", "EVL007", "FTN008", "OPS012"),
}
"""Rules that argue for a step, the leading one first."""

DOUBTS = {"EVL006", "OPS003", "OPS013"}
"""Rules that speak against certainty rather than for a step."""
ASIDE = {"EVL007", "FTN008", "MTH010", "OPS012", "OPS014"}
"""Rules that may name a step but hardly ever decide it: their grade says little of the answer's."""
HALF_OPEN, WIDE_OPEN = 8, 24
"""So many step rules waiting for an input make the answer provisional, and a guess."""
_RANK = "ABCD"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdicts:
    """What every rule says of one file."""

    truths: dict[str, Truth]

    @property
    def fired(self) -> frozenset[str]:
        return frozenset(code for code, truth in self.truths.items() if truth.value is True)

    @property
    def open(self) -> frozenset[str]:
        return frozenset(code for code, truth in self.truths.items() if truth.value is None)


def advise(file: FailuresFile, *, tool_version: str = "") -> Advice:
    """The next step for a project, where it leads, and why. Pure; never raises.

    The order of the failures does not matter. Unknown is not false: a rule whose inputs are
    missing neither fires nor blocks, and is listed under ``undetermined``.
    """
    f = Facts(file)
    verdicts = _Verdicts(truths={code: rule.when(f) for code, rule in RULES.items()})
    fired = verdicts.fired
    blocked = _blocked(fired)
    aim = find_aim(f, fired, {step: entry.rule for step, entry in blocked.items()})
    way = rungs_to(f, aim, fired)
    ahead = tuple(rung for rung in way if rung.status != "done")
    plan: tuple[Step, ...] = (*(rung.step for rung in ahead), aim.step)
    assert not set(plan) & set(blocked), (plan, blocked)
    destination = _destination(aim, verdicts)
    return Advice(
        recommendation=_recommendation(f, aim, ahead, destination, verdicts),
        destination=destination,
        alternatives=_alternatives(aim, plan, blocked, verdicts),
        blocked=tuple(blocked.values()),
        undetermined=tuple(
            Undetermined(rule=code, needs=tuple(sorted(verdicts.truths[code].needs)))
            for code in RULES
            if code in verdicts.open
        ),
        next_test=next_test(f, aim, way),
        shares=_shares(f),
        evidence=_evidence(f),
        plan=plan,
        workflow=workflow(f, aim, way, plan, blocked),
        method=choose_method(aim.step, file.state),
        assumptions=_assumptions(f),
        fired=tuple(code for code in RULES if code in fired),
        task=file.task,
        tool_version=tool_version,
    )


def _blocked(fired: frozenset[str]) -> dict[Step, Blocked]:
    entries: dict[Step, Blocked] = {}
    for code, rule in RULES.items():
        if code in fired:
            for step in rule.blocks:
                entries.setdefault(step, Blocked(step=step, rule=code, reason=rule.reason))
    return dict(sorted(entries.items(), key=lambda entry: STEPS.index(entry[0])))


def _arguing(step: Step, verdicts: _Verdicts) -> tuple[str, ...]:
    """Rules for a step: those that fire, or else the leading one that may yet fire."""
    fired = tuple(code for code in ARGUES[step] if code in verdicts.fired)
    if fired:
        return fired
    return tuple(code for code in ARGUES[step] if code in verdicts.open)[:1]


def _destination(aim: Aim, verdicts: _Verdicts) -> Destination:
    codes = _arguing(aim.step, verdicts)
    reason = aim.why
    if codes:
        reason += " " + RULES[codes[0]].reason
        if codes[0] not in verdicts.fired:
            needs = ", ".join(sorted(verdicts.truths[codes[0]].needs))
            reason += f" (Provisional: {codes[0]} waits for {needs}.)"
    return Destination(step=aim.step, reason=reason, rules=codes)


_UNKNOWN = {
    "evaluate_first": "It is not known whether there is an evaluation; without one no later step "
    "can be judged. If there is, say so, and this step falls away.",
    "prompt": "It is not known how far prompting was taken, and it is the cheapest thing that "
    "could be enough. If 5 or more versions were measured, say so, and this step falls away.",
    "constrain_output": "It is not known whether the form was constrained at decoding time, which "
    "makes it right without training. If it was, say so, and this step falls away.",
    "few_shot": "It is not known whether examples were put in the prompt; 5 representative ones "
    "may be enough, and they tell whether it is behaviour. If they were, say so.",
    "prompt_optimizer": "Answers are scored automatically, so a prompt optimizer can run; it is "
    "not known whether one did.",
}


def _recommendation(
    f: Facts,
    aim: Aim,
    ahead: tuple[Rung, ...],
    destination: Destination,
    verdicts: _Verdicts,
) -> Recommendation:
    rung = ahead[0] if ahead else None
    step = rung.step if rung else aim.step
    codes = _arguing(step, verdicts) if rung else destination.rules
    if rung is None:
        reason = destination.reason
    elif rung.status == "unknown":
        reason = _UNKNOWN[step]
    else:
        reason = RULES[codes[0]].reason if codes else f"{TITLES[step]} comes first."
    rules = [RULES[code] for code in codes]
    return Recommendation(
        step=step,
        title=TITLES[step],
        reason=reason,
        rules=codes,
        strength=_strength(f, verdicts),
        stop_when=_first_text(rules, "stop_when")
        or "the target is met on a held-out set, or two steps in a row bring no gain",
        flips_if=tuple(dict.fromkeys(r.flips_if for r in rules if r.flips_if not in ("-", ""))),
    )


def _first_text(rules: list[Rule], name: str) -> str:
    texts = (getattr(rule, name) for rule in rules)
    return next((text for text in texts if text not in ("-", "")), "")


def _strength(f: Facts, verdicts: _Verdicts) -> Strength:
    """The weakest rule that decides or might yet decide, lowered by what is unknown.

    Everything in here can only get worse when evidence is taken away: a rule that fires or waits
    keeps doing one of the two, and what waits only grows.
    """
    deciding = {code for code, rule in RULES.items() if rule.step is not None} - DOUBTS
    alive = (verdicts.fired | verdicts.open) & (deciding - ASIDE)
    worst = max((_RANK.index(RULES[code].strength) for code in alive), default=0)
    waiting = len(verdicts.open & deciding)
    doubts = [0 if waiting == 0 else 1 if waiting < HALF_OPEN else 2 if waiting < WIDE_OPEN else 3]
    if f.state.prompts_versioned is not True:
        doubts.append(1)  # the best grade needs everything on the table
    if f.evaluation.value is None or "EVL006" in verdicts.fired | verdicts.open:
        doubts.append(2)
    if "OPS012" in verdicts.fired | verdicts.open:
        doubts.append(2)
    if f.labelled is None or f.labelled < BASELINE or any(row.suggested for row in f.rows):
        doubts.append(2)
    strengths: tuple[Strength, ...] = ("A", "B", "C", "D")
    return strengths[max(worst, *doubts)]


def _alternatives(
    aim: Aim, plan: tuple[Step, ...], blocked: dict[Step, Blocked], verdicts: _Verdicts
) -> tuple[Alternative, ...]:
    taken = {*plan, *blocked}
    found: dict[Step, Alternative] = {}
    by_rule = {
        step
        for code in verdicts.fired
        if (step := RULES[code].step) is not None and code not in ("PRM008", "PRM006")
    }
    by_failure = {step for vote in aim.votes for step in (vote.step, *vote.others)}
    for step in sorted(by_rule | by_failure, key=STEPS.index):
        if step in taken or (step == "do_nothing" and "EVL005" not in verdicts.fired):
            continue
        fired = tuple(c for c in ARGUES[step] if c in verdicts.fired)
        if step in CHEAP_STEPS and not fired:
            continue
        names = sorted(
            {v.row.name or v.kind.name for v in aim.votes if step in (v.step, *v.others)}
        )
        why = RULES[fired[0]].title if fired else f"Also an answer to {', '.join(names[:3])}"
        found[step] = Alternative(step=step, why=why, rules=fired or _arguing(step, verdicts))
    return tuple(found.values())


def _shares(f: Facts) -> tuple[Share, ...]:
    total = f.counted
    groups: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(f.rows):
        resolved = f.resolve(row)
        groups.setdefault((resolved or "", row.name or ""), []).append(index)
    shares = []
    for (_, _), indices in groups.items():
        rows = [f.rows[i] for i in indices]
        counts = [r.failure.count for r in rows]
        count = None if any(c is None for c in counts) else sum(c for c in counts if c is not None)
        weights = [r.weight for r in rows]
        known = total is None or total > 0
        share = (
            None
            if any(w is None for w in weights) or not known
            else min(1.0, fsum(w for w in weights if w is not None))
        )
        if share is not None and all(w == 1.0 for w in weights) and count is None:
            # a lone row says nothing of how often, unless it gives its share
            share = rows[0].failure.share
        interval = wilson(count, total) if total and count is not None else None
        shares.append(
            Share(
                class_=f.resolve(rows[0]),
                kind=rows[0].name,
                count=count,
                share=share,
                low=interval.low if interval else None,
                high=interval.high if interval else None,
            )
        )
    return tuple(
        sorted(
            shares,
            key=lambda s: (
                -(s.share if s.share is not None else -1.0),
                s.class_ or "",
                s.kind or "",
            ),
        )
    )


def _evidence(f: Facts) -> Evidence:
    def number(rows: tuple[object, ...] | list[object]) -> int:
        counts = [row.failure.count for row in rows]  # type: ignore[attr-defined]
        return sum(1 if count is None else count for count in counts)

    named = [r for r in f.rows if r.name is not None or r.failure.class_ is not None]
    return Evidence(
        failures=number([*f.rows, *f.excluded]),
        labelled=number([r for r in named if not r.suggested]),
        suggested=number([r for r in named if r.suggested]),
        excluded=number(list(f.excluded)),
    )


def _assumptions(f: Facts) -> tuple[str, ...]:
    state = f.state
    said = []
    if f.assumed_evaluation:
        said.append(
            f"An evaluation exists: nothing was said of one, but {f.at_least_labelled} labelled "
            "failures were supplied."
        )
    elif state.eval_pipeline is None and f.evaluation:
        said.append(
            "An evaluation exists: an accuracy, a finetuned model or examples with ground truth "
            "cannot be had without one."
        )
    if state.prompt_iterations is None and f.prompting:
        said.append(
            "The prompt was worked on: examples in it, an optimizer's run or a finetuned model "
            "come after that."
        )
    if any(r.suggested for r in f.rows):
        said.append("Suggested kinds were taken as they are; nobody has confirmed them.")
    shares = any(r.failure.share is not None for r in f.rows)
    counts = any(r.failure.count is not None for r in f.rows)
    if shares and counts:
        said.append("Counts stand for what the given shares leave over.")
    if f.excluded:
        said.append("Failures of the harness were left out of the shares.")
    if state.oracle_context_fixes is not None and not state.oracle_context_tested:
        said.append(
            "On how many failures the oracle context was tested is not known, so its result is a "
            "hint and no evidence."
        )
    return tuple(said)
