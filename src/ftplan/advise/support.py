"""How well the state supports a step for one kind of failure.

Three things are kept apart: evidence that the step is the right one (``YES``), nothing against it
(``MAYBE``), and a step that would need evidence which nobody has (``WEAK``). What is known to be
done, exhausted or impossible is ``NO``. Blocking is the rules' affair and not looked at here.
"""

from __future__ import annotations

from ftplan.advice import Step
from ftplan.advise.facts import Facts, Row
from ftplan.advise.rules.finetuning import PILOT
from ftplan.advise.rules.methods import DOMAIN_TOKENS, ENOUGH_PAIRS, trimming_fails
from ftplan.advise.rules.retrieval import ENOUGH_RECALL, FULL_CONTEXT_TOKENS, SEARCHING
from ftplan.advise.taxonomy import KINDS, Kind
from ftplan.failures import FailureClass

__all__ = ["FIRST", "MAYBE", "NO", "WEAK", "YES", "ladder_of", "support"]

NO, WEAK, MAYBE, YES, FIRST = range(5)

GRADED: tuple[str, ...] = ("reasoning_error", "wrong_code", "numeric_error", "capability")
"""Kinds for which a grader alone makes reinforcement the likely way."""


def ladder_of(f: Facts, row: Row, resolved: FailureClass) -> tuple[Kind, tuple[Step, ...]]:
    """The kind whose ladder a row climbs, and the ladder, after the tests' evidence."""
    kind = row.kind
    assert kind is not None
    if resolved == "behavior" and kind.factual:
        kind = KINDS["context_ignored"]
    elif resolved == "information" and "information" not in kind.classes and kind.number:
        kind = KINDS["missing_private_knowledge"]
    elif resolved == "evaluation":
        kind = KINDS["ambiguous_task"]
    ladder = kind.ladder
    if resolved in ("behavior", "capability"):
        if "switch_model" not in ladder and f.larger_model_fixes:
            ladder = (*ladder, "switch_model")
        if f.pressed and "distill" not in ladder:
            ladder = (*ladder, "distill")
    return kind, ladder


def support(f: Facts, kind: Kind, step: Step) -> int:
    """``NO`` to ``FIRST`` for this step against this kind of failure."""
    return _SUPPORT[step](f, kind)


def _evaluate(f: Facts, kind: Kind) -> int:
    if kind.name == "model_drift":
        return NO if f.evaluation else FIRST
    if kind.name == "unrepresentative_training_data":
        # what represents the task can only be told from an evaluation of the task; that the
        # model was tuned, on such data, does not show that there was one
        return NO if f.evaluated_for_sure else FIRST
    return FIRST


def _constrain(f: Facts, kind: Kind) -> int:
    tried = f.state.constrained_decoding_tried
    if tried or f.state.niche_syntax:
        return NO
    if tried is False or kind.name == "invalid_json":
        return FIRST
    return NO  # not known: a rung on the way, not the aim


def _full_context(f: Facts, kind: Kind) -> int:
    tokens = f.state.corpus_tokens
    small = tokens is not None and 0 < tokens < FULL_CONTEXT_TOKENS
    return YES if small and f.state.rag in (None, "none") else NO


def _rag_basic(f: Facts, kind: Kind) -> int:
    rag = f.state.rag
    if rag in SEARCHING:
        return NO
    if kind.name == "wrong_code":
        return MAYBE if rag != "full_context" else NO
    if kind.name == "long_context_failure":
        return NO if trimming_fails(f) else MAYBE
    if kind.name.startswith("retrieval_") and rag is None:
        return NO  # a failure of retrieval is a failure of one that exists
    return MAYBE if rag is None else YES


def _rag_advanced(f: Facts, kind: Kind) -> int:
    state = f.state
    if state.rag is None:
        return YES if kind.name.startswith("retrieval_") else NO
    if state.rag not in SEARCHING:
        return NO
    recall = state.retrieval_recall
    if kind.name == "retrieval_noise":
        return NO if state.rag_rerank else YES
    if kind.name == "long_context_failure":
        return NO if state.rag_rerank else MAYBE
    enough = ENOUGH_RECALL if kind.name == "retrieval_miss" else 0.9
    if recall is not None:
        return NO if recall >= enough else YES
    finished = state.rag == "hybrid" and state.rag_rerank is True
    return MAYBE if finished else YES


def _finetune(f: Facts, kind: Kind) -> int:
    if kind.name == "context_ignored" and f.state.rag != "none":
        return NO  # then it is finetuning on top of retrieval
    artefact = kind.name in ("over_refusal", "unrepresentative_training_data")
    if artefact and f.state.finetuned:
        return YES
    return _by_examples(f)


def _by_examples(f: Facts) -> int:
    examples = f.state.labelled_examples
    if examples is None:
        return MAYBE
    return YES if examples >= PILOT else NO


def _rag_and_finetune(f: Facts, kind: Kind) -> int:
    rag = f.state.rag
    if "information" in kind.classes:
        # only when search has nothing left to give
        return _by_examples(f) if rag in SEARCHING and not _rag_advanced(f, kind) else NO
    return NO if rag == "none" else _by_examples(f)


def _distill(f: Facts, kind: Kind) -> int:
    teacher = f.state.teacher_available
    if teacher or (teacher is None and f.larger_model_fixes):
        return YES
    if teacher is False:
        return NO
    if "operational" in kind.classes:
        if f.at_target_by_point:
            return YES
        # that some prompt meets the quality is what distilling starts from
        return NO if f.prompting.value is False else MAYBE
    return WEAK


def _preference(f: Facts, kind: Kind) -> int:
    state = f.state
    pairs = max(state.preference_pairs or 0, state.unpaired_feedback or 0)
    if pairs < ENOUGH_PAIRS:
        return NO
    return FIRST if state.finetuned else YES


def _reinforce(f: Facts, kind: Kind) -> int:
    state = f.state
    if not state.grader_verifiable or state.pass_at_k_above_zero is False or f.disputed:
        return NO
    if state.pass_at_k_above_zero:
        return YES
    return MAYBE if kind.name in GRADED else WEAK


def _continue_pretraining(f: Facts, kind: Kind) -> int:
    state = f.state
    large = state.corpus_tokens is not None and state.corpus_tokens >= DOMAIN_TOKENS
    static = state.knowledge_changes in (None, "never", "yearly")
    if not large or not static or state.ml_owner is False or state.needs_citations:
        return NO
    return YES if state.ml_owner else MAYBE


def _lengthen(f: Facts, kind: Kind) -> int:
    if f.larger_model_fixes.value is not False:
        return NO
    return YES if trimming_fails(f) else MAYBE


def _switch(f: Facts, kind: Kind) -> int:
    if "operational" in kind.classes:
        return MAYBE if kind.name == "model_drift" else WEAK
    if f.pressed or f.larger_model_fixes.value is False:
        return NO
    return YES if f.larger_model_fixes else WEAK


def _never(f: Facts, kind: Kind) -> int:
    return NO


_SUPPORT = {
    "evaluate_first": _evaluate,
    "prompt": _never,
    "constrain_output": _constrain,
    "few_shot": _never,
    "prompt_optimizer": _never,
    "full_context": _full_context,
    "rag_basic": _rag_basic,
    "rag_advanced": _rag_advanced,
    "finetune": _finetune,
    "rag_and_finetune": _rag_and_finetune,
    "distill": _distill,
    "preference_finetune": _preference,
    "reinforcement_finetune": _reinforce,
    "continued_pretrain": _continue_pretraining,
    "long_context_finetune": _lengthen,
    "switch_model": _switch,
    "do_nothing": _never,
}
