"""What a user writes about a system that is not good enough yet: its state, and what goes wrong.

``None`` everywhere means *not known*, which is neither false nor zero. A key that is left out is
not known either. Shares and accuracies are fractions of one.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar, Literal

from ftplan.dataclass import dataclass
from ftplan.errors import InputError

__all__ = [
    "STATE_BOUNDS",
    "Failure",
    "FailureClass",
    "FailuresFile",
    "KnowledgeChanges",
    "Rag",
    "State",
    "TestResult",
]

FailureClass = Literal["information", "behavior", "capability", "evaluation", "operational"]
Rag = Literal["none", "full_context", "term", "embedding", "hybrid"]
KnowledgeChanges = Literal["never", "yearly", "monthly", "weekly", "daily"]
TestResult = Literal["pass", "fail"]

LARGEST_COUNT = 2**53

STATE_BOUNDS: dict[str, tuple[float, float]] = {
    "annotator_agreement": (-1.0, 1.0),
    "accuracy": (0.0, 1.0),
    "target_accuracy": (0.0, 1.0),
    "retrieval_recall": (0.0, 1.0),
    "oracle_context_fixes": (0.0, 1.0),
    "larger_model_fixes": (0.0, 1.0),
    "share": (0.0, 1.0),
    "sft_gain": (-1e6, 1e6),
    "eval_examples": (0, LARGEST_COUNT),
    "prompt_iterations": (0, LARGEST_COUNT),
    "few_shot_examples": (0, LARGEST_COUNT),
    "oracle_context_tested": (0, LARGEST_COUNT),
    "corpus_tokens": (0, LARGEST_COUNT),
    "labelled_examples": (0, LARGEST_COUNT),
    "preference_pairs": (0, LARGEST_COUNT),
    "unpaired_feedback": (0, LARGEST_COUNT),
    "monthly_calls": (0, LARGEST_COUNT),
    "saving_per_call": (-1e12, 1e12),
    "tuning_cost_per_month": (0.0, 1e15),
    "count": (0, LARGEST_COUNT),
}
"""Smallest and largest value of each number, for readers that check before they build."""


def _without_underscore(name: str) -> str:
    """``class`` is a word of Python: the field is ``class_``, the key in files is ``class``."""
    return name.rstrip("_")


_CONFIG: dict[str, Any] = {"extra": "forbid", "use_attribute_docstrings": True}
_ALIASED: dict[str, Any] = {
    **_CONFIG,
    "alias_generator": _without_underscore,
    "validate_by_name": True,
}


def _in_bounds(owner: object, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is None or isinstance(value, bool):
            continue
        low, high = STATE_BOUNDS[name]
        if not low <= value <= high:
            hint = "a share is written as a fraction of one: 0.85, not 85" if high == 1.0 else ""
            raise InputError(
                f"{name} is {value}, outside {low:g} to {high:g}",
                remedy=hint or "check the number",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where the project stands. Every key may be left out: unknown is not false."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG

    eval_pipeline: bool | None = None
    """There is an evaluation with criteria and ground truth that runs the same way every time."""
    eval_examples: int | None = None
    """How many examples with ground truth it has."""
    labels_audited: bool | None = None
    """Somebody checked that the references themselves are right."""
    annotator_agreement: float | None = None
    """Agreement of two people on the same items, corrected for chance (kappa or alpha)."""
    accuracy: float | None = None
    """Share of evaluation examples that are right, 0 to 1."""
    target_accuracy: float | None = None
    """The share at which the system is good enough, 0 to 1."""
    prompt_iterations: int | None = None
    """How many versions of the prompt were measured against each other."""
    prompts_versioned: bool | None = None
    """Prompts are kept in versions with their scores."""
    few_shot_examples: int | None = None
    """How many examples the prompt holds."""
    few_shot_helps: bool | None = None
    """Examples in the prompt raised the score."""
    prompt_optimizer_tried: bool | None = None
    """An automatic prompt optimizer was run."""
    constrained_decoding_tried: bool | None = None
    """Constrained decoding (structured outputs, a grammar) or a validator with retry was tried."""
    rag: Rag | None = None
    """Retrieval in place: `none`, all documents in the prompt, or by which search."""
    rag_rerank: bool | None = None
    """Retrieved passages are reranked."""
    retrieval_recall: float | None = None
    """Share of questions whose gold passage is among the retrieved ones, 0 to 1."""
    oracle_context_fixes: float | bool | None = None
    """Share of factual failures that are fixed when the gold passage is pasted in, 0 to 1."""
    oracle_context_tested: int | None = None
    """On how many failures that was tried."""
    gold_context_in_prompt: bool | None = None
    """What the model needs to know is in its prompt already, on every item."""
    corpus_tokens: int | None = None
    """Size of the documents in tokens."""
    knowledge_changes: KnowledgeChanges | None = None
    """How often the facts change."""
    needs_citations: bool | None = None
    """Answers must point at their source."""
    labelled_examples: int | None = None
    """Pairs of input and right output that could be trained on."""
    preference_pairs: int | None = None
    """Pairs of a better and a worse answer to the same input."""
    unpaired_feedback: int | None = None
    """Single answers with a thumb up or down."""
    grader_verifiable: bool | None = None
    """A program, or a judge that experts agree with, can score an answer."""
    pass_at_k_above_zero: bool | None = None
    """Of several tries at a failed item, at least some are right now and then."""
    larger_model_fixes: float | bool | None = None
    """A larger or reasoning model gets the failed items right: yes, no, or which share."""
    teacher_available: bool | None = None
    """A stronger model meets the quality and its outputs may be trained on."""
    finetuned: bool | None = None
    """The model in use has been finetuned for this task."""
    sft_gain: float | bool | None = None
    """What the pilot finetuning gained on held-out examples (0 or less: nothing)."""
    niche_syntax: bool | None = None
    """The output's language is rare in public text, or has no grammar for constrained decoding."""
    latency_limited: bool | None = None
    """The present system, or a larger model, is too slow."""
    cost_limited: bool | None = None
    """The present system, or a larger model, is too expensive."""
    privacy_on_prem: bool | None = None
    """Data may not leave the house."""
    can_serve_weights: bool | None = None
    """The team can serve a model of its own."""
    hosted_tuning_available: bool | None = None
    """A provider would tune and serve for this team."""
    ml_owner: bool | None = None
    """Somebody who can train models will look after this one, with time and budget."""
    base_model_churn: Literal["low", "high"] | None = None
    """How quickly better base models replace the one in use."""
    task_diversity: str | None = None
    """`low`: one narrow task. `high`: one general assistant for many tasks."""
    monthly_calls: int | None = None
    """Calls a month, for the break-even of tuning for cost."""
    saving_per_call: float | None = None
    """What a tuned model would save per call, in money."""
    tuning_cost_per_month: float | None = None
    """Training, labels, serving and upkeep per month, in the same money."""

    def __post_init__(self) -> None:
        _in_bounds(self, tuple(n for n in STATE_BOUNDS if n not in ("count", "share")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One failure, or one group of failures of the same kind."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _ALIASED

    id: str | None = None
    """Name of the item in the evaluation."""
    kind: str | None = None
    """What went wrong: one of the 33 kinds, or a name of your own."""
    class_: FailureClass | None = None
    """`class` in files: for a kind of your own, or to overrule the kind's usual class."""
    count: int | None = None
    """How many failures this row stands for."""
    share: float | None = None
    """... or which share of all failures, 0 to 1. Neither: seen, how often is unknown."""
    description: str | None = None
    """What happened, in a few words."""
    input: str | None = None
    """What the system was asked."""
    output: str | None = None
    """What it answered."""
    expected: str | None = None
    """What it should have answered."""
    context: tuple[str, ...] | None = None
    """Passages that were in the prompt."""
    tests: dict[str, TestResult] | None = None
    """What was tried on this very item: `oracle_context`, `retrieval`, `few_shot`, `instruction`,
    `constrained`, `pass_at_k`, `larger_model`, `trimmed_context`, `closed_book`, `label_audit`."""
    checks: tuple[str, ...] | None = None
    """Names of the evaluation's checks that failed here."""
    suggested: bool | None = None
    """The kind is a tool's suggestion that nobody has confirmed."""
    annotator: str | None = None
    """Who labelled it."""
    note: str | None = None
    """Anything else."""

    def __post_init__(self) -> None:
        _in_bounds(self, ("count", "share"))
        if self.count is not None and self.share is not None:
            raise InputError(
                "a failure has a count or a share, not both", remedy="keep one of the two keys"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FailuresFile:
    """The failures file: the task, the state of the project, and what goes wrong."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG

    version: Literal[1] = 1
    """Version of the format."""
    task: str | None = None
    """What the system is for, in one sentence."""
    state: State = field(default_factory=State)
    """Where the project stands."""
    failures: tuple[Failure, ...] = ()
    """What goes wrong."""
