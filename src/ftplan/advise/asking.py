"""The one cheapest test that could change the answer, the items to run it on, and how."""

from __future__ import annotations

from collections.abc import Callable
from math import fsum

from ftplan.advice import TRAINING_STEPS, NextTest
from ftplan.advise.destination import Aim, Vote
from ftplan.advise.facts import BASELINE, Facts
from ftplan.advise.statistics import (
    labels_for_half_width,
    labels_to_settle_lead,
    labels_to_settle_majority,
)
from ftplan.advise.taxonomy import TESTS
from ftplan.advise.way import Rung

__all__ = ["next_test"]

MOST_ITEMS = 20


def next_test(f: Facts, aim: Aim, way: tuple[Rung, ...]) -> NextTest | None:
    """None when nothing that is unknown could change the answer."""
    for ask in (
        _baseline,
        _confirm,
        _measure_target,
        _per_kind,
        _frequencies,
        _lead,
        _open_rung,
        _before_training,
    ):
        if (test := ask(f, aim, way)) is not None:
            return test
    return None


def _items(votes: tuple[Vote, ...], test: str) -> tuple[str, ...]:
    ids = {
        v.row.failure.id
        for v in votes
        if v.row.failure.id is not None and test not in (v.row.failure.tests or {})
    }
    return tuple(sorted(ids)[:MOST_ITEMS])


def _of(f: Facts, votes: tuple[Vote, ...], name: str, why: str) -> NextTest:
    test = TESTS[name]
    items = _items(votes, name)
    return NextTest(
        name=f"{test.code} {test.title}",
        why=why,
        how=f"{test.how} {_where(items)}",
        items=items,
    )


def _where(items: tuple[str, ...]) -> str:
    if items:
        return f"Run it on these {len(items)} items." if len(items) > 1 else "Run it on this item."
    return "Run it on 20 failures of this kind, or on all if there are fewer."


def _baseline(f: Facts, aim: Aim, way: tuple[Rung, ...]) -> NextTest | None:
    if f.evaluation.value is False:
        return NextTest(
            name="Baseline",
            why="Nothing can be compared before there is a number.",
            how=f"Collect {BASELINE} or more real inputs with right answers, run the system as it "
            "is, and label each failure with a kind (`ftplan label`).",
            items=(),
        )
    return None


def _confirm(f: Facts, aim: Aim, way: tuple[Rung, ...]) -> NextTest | None:
    """Labels before tests, where most of what is counted carries none or none but a guess."""
    bare = [r for r in f.rows if r.given is None or r.suggested]
    firm = (r for r in f.rows if r.given is not None and not r.suggested)
    if not bare or sum(r.failure.count or 1 for r in firm) >= BASELINE:
        return None
    ids = sorted({r.failure.id for r in bare if r.failure.id is not None})[:MOST_ITEMS]
    return NextTest(
        name="Label the failures",
        why="Kinds that a tool suggested, or none at all, carry the answer; a person's labels "
        "may turn it.",
        how=f"Confirm or correct the kind of {BASELINE} or more failures, one by one "
        "(`ftplan label`).",
        items=tuple(ids),
    )


def _measure_target(f: Facts, aim: Aim, way: tuple[Rung, ...]) -> NextTest | None:
    state = f.state
    if aim.step != "do_nothing" or f.at_target or state.accuracy is None:
        return None
    if state.target_accuracy is None:
        return None
    needed = labels_to_settle_majority(state.accuracy, bar=state.target_accuracy)
    number = f"{needed}" if needed is not None else "many more"
    return NextTest(
        name="Held-out measurement",
        why="The accuracy is at the target, but chance has not been ruled out.",
        how=f"Measure on {number} held-out examples; if the accuracy stays what it is, the lower "
        "end of its interval is then at the target.",
        items=(),
    )


def _per_kind(f: Facts, aim: Aim, way: tuple[Rung, ...]) -> NextTest | None:
    if aim.step == "do_nothing":
        return None
    votes = aim.deciding or aim.votes
    if f.below("annotator_agreement", 0.6):
        return _of(f, votes, "label_audit", "People disagree; see on which items, and why.")
    ranked = sorted(
        {v.kind.name: v for v in votes}.values(),
        key=lambda v: (
            -round(fsum(o.row.weight or 0.0 for o in votes if o.kind.name == v.kind.name), 9),
            v.kind.number,
            v.kind.name,
        ),
    )
    for vote in ranked:
        same = tuple(v for v in votes if v.kind.name == vote.kind.name)
        labels = sorted(
            {(v.row.kind.number, v.row.kind.tests) for v in same if v.row.kind is not None}
        )
        original = [name for _, tests in labels for name in tests]
        for name in dict.fromkeys((*original, *vote.kind.tests)):
            if (asks := _OPEN.get(name)) is not None and (why := asks(f, same)) is not None:
                return _of(f, same, name, why)
    return None


def _tested(votes: tuple[Vote, ...], name: str) -> bool:
    return all(name in (v.row.failure.tests or {}) for v in votes)


def _ask_oracle(f: Facts, votes: tuple[Vote, ...]) -> str | None:
    if _tested(votes, "oracle_context"):
        return None
    factual = any(v.row.kind is not None and v.row.kind.factual for v in votes)
    settled = f.oracle_fixes.value is not None and not f.oracle_straddles
    if not factual or settled:
        return None
    return (
        "If the gold passage fixes these, information is missing and retrieval is right; if not, "
        "no retrieval will help."
    )


def _ask_retrieval(f: Facts, votes: tuple[Vote, ...]) -> str | None:
    unknown = f.state.retrieval_recall is None and not _tested(votes, "retrieval")
    if not unknown or f.state.rag in ("none", "full_context"):
        return None
    return "It tells whether search or the answer's generation has to be improved."


def _ask_constrained(f: Facts, votes: tuple[Vote, ...]) -> str | None:
    tried = f.state.constrained_decoding_tried is not None or f.state.niche_syntax is True
    if tried or _tested(votes, "constrained"):
        return None
    return "If constrained decoding makes them valid, nothing has to be trained."


def _ask_few_shot(f: Facts, votes: tuple[Vote, ...]) -> str | None:
    if f.shots.value is True or f.state.few_shot_helps is not None or _tested(votes, "few_shot"):
        return None
    return "A gain tells that it is behaviour, and may be enough by itself."


def _ask_larger(f: Facts, votes: tuple[Vote, ...]) -> str | None:
    if f.larger_model_fixes.value is not None or f.state.teacher_available is not None:
        return None
    return (
        "It tells capability from prompting, and whether there is a model to switch to or to "
        "distil from."
    )


def _ask_pass_at_k(f: Facts, votes: tuple[Vote, ...]) -> str | None:
    if f.state.pass_at_k_above_zero is not None or f.state.grader_verifiable is not True:
        return None
    return "Reinforcement can only raise what is right now and then."


def _ask_trimmed(f: Facts, votes: tuple[Vote, ...]) -> str | None:
    if _tested(votes, "trimmed_context") or f.state.gold_context_in_prompt:
        return None
    return "If the trimmed prompt passes, retrieve or restructure; no training is needed."


def _ask_labels(f: Facts, votes: tuple[Vote, ...]) -> str | None:
    if f.state.annotator_agreement is not None or _tested(votes, "label_audit"):
        return None
    return "A wrong reference or a task that people read differently looks like a failure."


def _ask_instruction(f: Facts, votes: tuple[Vote, ...]) -> str | None:
    if f.prompting.value is not None or _tested(votes, "instruction"):
        return None
    return "If saying it plainly is enough, the prompt was the cause."


_OPEN: dict[str, Callable[[Facts, tuple[Vote, ...]], str | None]] = {
    "oracle_context": _ask_oracle,
    "retrieval": _ask_retrieval,
    "constrained": _ask_constrained,
    "few_shot": _ask_few_shot,
    "larger_model": _ask_larger,
    "pass_at_k": _ask_pass_at_k,
    "trimmed_context": _ask_trimmed,
    "label_audit": _ask_labels,
    "instruction": _ask_instruction,
}


def _frequencies(f: Facts, aim: Aim, way: tuple[Rung, ...]) -> NextTest | None:
    rows = [r for r in f.rows if r.weight is None or r.given is None]
    indifferent = len({v.step for v in aim.votes}) < 2 and all(r.given for r in rows)
    if len(f.rows) < 2 or not rows or indifferent:
        return None
    ids = sorted({r.failure.id for r in rows if r.failure.id is not None})[:MOST_ITEMS]
    return NextTest(
        name="Count the kinds",
        why="It is not known how often each kind occurs, and the order of the steps rests on it.",
        how=f"Label {labels_for_half_width(0.10)} failures for shares within 10 points, or "
        "50 to see which class leads.",
        items=tuple(ids),
    )


def _lead(f: Facts, aim: Aim, way: tuple[Rung, ...]) -> NextTest | None:
    if not f.undecided or f.class_weights is None:
        return None
    first, second = sorted(f.class_weights.values(), reverse=True)[:2]
    needed = labels_to_settle_lead(first, second)
    more = max(1, needed - (f.labelled or 0)) if needed is not None else None
    how = (
        f"Label about {more} more failures; if the shares stay, the lead is then significant."
        if more is not None
        else "The classes are level; more labels alone may not separate them. Take the cheaper "
        "step first and label again."
    )
    return NextTest(
        name="Label more failures",
        why="Two classes of failure are too close to tell which leads.",
        how=how,
        items=(),
    )


_QUESTIONS = {
    "eval_pipeline": "Is there an evaluation with ground truth that runs the same way every time? "
    "If so, say eval_pipeline: true and eval_examples: N.",
    "prompt_iterations": "How many versions of the prompt were measured against each other? Say "
    "prompt_iterations: N.",
    "few_shot_examples": "How many examples are in the prompt? Say few_shot_examples: N.",
    "constrained_decoding_tried": "Was constrained decoding, or a validator with retry, tried? "
    "Say constrained_decoding_tried: true or false.",
    "prompt_optimizer_tried": "Was a prompt optimizer run? Say prompt_optimizer_tried: true or "
    "false.",
}


def _open_rung(f: Facts, aim: Aim, way: tuple[Rung, ...]) -> NextTest | None:
    for rung in way:
        for need in rung.needs:
            if need in _QUESTIONS:
                return NextTest(
                    name=f"Answer: {need}",
                    why="It decides whether this step is still to be taken.",
                    how=_QUESTIONS[need],
                    items=(),
                )
    return None


def _before_training(f: Facts, aim: Aim, way: tuple[Rung, ...]) -> NextTest | None:
    """Before weights are touched: are there data, and would a stronger model do?"""
    if aim.step not in TRAINING_STEPS:
        return None
    if aim.step in ("finetune", "rag_and_finetune") and f.state.labelled_examples is None:
        return NextTest(
            name="Answer: labelled_examples",
            why="With fewer than 50 labelled examples there is nothing to train on.",
            how="How many pairs of input and right output are there? Say labelled_examples: N.",
            items=(),
        )
    if f.pressed or f.larger_model_fixes.value is not None:
        return None
    return _of(
        f,
        aim.deciding,
        "larger_model",
        "If a stronger model fixes these and may be used, nothing has to be trained.",
    )
