"""What we answer to a failures file: the next step, where it leads, and why.

The JSON of ``ftplan advise`` is :func:`advice_to_dict` of these classes, field for field.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args

from ftplan.dataclass import dataclass
from ftplan.failures import FailureClass

__all__ = [
    "CHEAP_STEPS",
    "STEPS",
    "TITLES",
    "TRAINING_STEPS",
    "Advice",
    "Alternative",
    "Blocked",
    "Destination",
    "Evidence",
    "MethodChoice",
    "NextTest",
    "Recommendation",
    "Share",
    "Station",
    "Step",
    "Strength",
    "Undetermined",
    "advice_to_dict",
]

Step = Literal[
    "evaluate_first", "prompt", "constrain_output", "few_shot", "prompt_optimizer",
    "full_context", "rag_basic", "rag_advanced", "finetune", "rag_and_finetune", "distill",
    "preference_finetune", "reinforcement_finetune", "continued_pretrain",
    "long_context_finetune", "switch_model", "do_nothing",
]  # fmt: skip
Strength = Literal["A", "B", "C", "D"]

STEPS: tuple[Step, ...] = get_args(Step)
CHEAP_STEPS: tuple[Step, ...] = STEPS[:5]
"""The rungs that come before anything that is built or trained, in their order."""
TRAINING_STEPS: tuple[Step, ...] = (
    "finetune", "rag_and_finetune", "distill", "preference_finetune",
    "reinforcement_finetune", "continued_pretrain", "long_context_finetune",
)  # fmt: skip
"""The steps that change weights."""
TITLES: dict[Step, str] = {
    "evaluate_first": "Evaluate first",
    "prompt": "Work on the prompt, systematically",
    "constrain_output": "Constrain the output's form",
    "few_shot": "Put examples in the prompt",
    "prompt_optimizer": "Run a prompt optimizer",
    "full_context": "Put all documents in the prompt",
    "rag_basic": "Add basic retrieval (BM25)",
    "rag_advanced": "Improve retrieval (hybrid, rerank)",
    "finetune": "Finetune on labelled examples",
    "rag_and_finetune": "Finetune on top of retrieval",
    "distill": "Distil into a smaller model",
    "preference_finetune": "Finetune on preferences",
    "reinforcement_finetune": "Finetune by reinforcement",
    "continued_pretrain": "Continue pretraining on domain text",
    "long_context_finetune": "Finetune for longer context",
    "switch_model": "Switch the model",
    "do_nothing": "Stop here and monitor",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The first step that is still to be taken."""

    step: Step
    title: str
    reason: str
    rules: tuple[str, ...]
    strength: Strength
    """How well it is supported: A controlled evidence or a hard limit, B several frameworks
    agree, C one case, D a choice of ours. What is unknown lowers it."""
    stop_when: str
    flips_if: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where the evidence points once the cheap rungs are done."""

    step: Step
    reason: str
    rules: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another step that some rule argues for."""

    step: Step
    why: str
    rules: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked:
    """A step that must not be taken now, and the rule that says so."""

    step: Step
    rule: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Undetermined:
    """A rule that neither fires nor is refuted, and what it needs to know."""

    rule: str
    needs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NextTest:
    """The cheapest thing to find out that could change the answer."""

    name: str
    why: str
    how: str
    items: tuple[str, ...]
    """Ids of the failures to run it on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How much of all failures one kind is, with its 95 % interval where the number is known."""

    class_: FailureClass | None
    kind: str | None
    count: int | None
    share: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """How many failures the answer rests on; a row without a count stands for one."""

    failures: int
    labelled: int
    suggested: int
    """Their kind is a suggestion that nobody confirmed."""
    excluded: int
    """Failures of the harness, not of the system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodChoice:
    """How to train, when training is the destination."""

    objective: Literal["sft", "dpo", "kto", "grpo", "distill", "pt"]
    """The plan's `task`."""
    kind: Literal["lora", "qlora", "full", "partial"]
    """The plan's `method.kind`."""
    why: str
    rules: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """One station of the workflow, for drawing the path."""

    step: Step
    title: str
    status: Literal["done", "assumed", "next", "later", "after", "blocked", "unneeded"]
    note: str
    rule: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The answer of ``ftplan advise``."""

    recommendation: Recommendation
    destination: Destination
    alternatives: tuple[Alternative, ...]
    blocked: tuple[Blocked, ...]
    undetermined: tuple[Undetermined, ...]
    next_test: NextTest | None
    shares: tuple[Share, ...]
    evidence: Evidence
    plan: tuple[Step, ...]
    """From the recommendation to the destination, in order."""
    workflow: tuple[Station, ...]
    method: MethodChoice | None = None
    assumptions: tuple[str, ...] = ()
    """What was taken for granted, in sentences."""
    fired: tuple[str, ...] = ()
    """Codes of all rules whose preconditions hold."""
    task: str | None = None
    schema_version: int = 1
    tool_version: str = ""


_ORDER = (
    "schema_version", "tool_version", "task", "recommendation", "destination", "alternatives",
    "blocked", "undetermined", "next_test", "shares", "evidence", "plan", "workflow", "method",
    "assumptions", "fired",
)  # fmt: skip


def advice_to_dict(advice: Advice) -> dict[str, Any]:
    """The answer as plain dicts and lists, with the JSON's own field names and order."""
    return {name: _plain(getattr(advice, name)) for name in _ORDER}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name.rstrip("_"): _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value
