"""The kinds of failure: what tells each from the others, what it calls for, what does not help.

A row's ``ladder`` lists the steps that the kind calls for, in the order of preference among steps
that are equally well supported; the cheap rungs on the way stand in ``rungs``. Which of them is
open, done or closed is the engine's affair, not the kind's.
"""

from __future__ import annotations

from collections.abc import Mapping

from ftplan.advice import Step
from ftplan.dataclass import dataclass
from ftplan.failures import Failure, FailureClass

__all__ = ["CUSTOM", "KINDS", "TESTS", "Kind", "Test", "kind_of", "suggest_kind"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """A cheap experiment that separates causes."""

    __test__ = False  # the name is the field's own; pytest must not collect it

    code: str
    name: str
    """Its key under ``tests`` of a failure."""
    title: str
    how: str


TESTS: dict[str, Test] = {
    test.name: test
    for test in (
        Test(
            code="T0",
            name="label_audit",
            title="Label audit",
            how="Let two people judge each item without seeing the reference: is the reference "
            "right, and do they agree? Report kappa.",
        ),
        Test(
            code="T1",
            name="oracle_context",
            title="Oracle context test",
            how="Paste the passage that holds the answer into the prompt and ask again. Fixed: "
            "the information was missing. Still wrong: it was not.",
        ),
        Test(
            code="T2",
            name="retrieval",
            title="Retrieval check",
            how="Look whether the passage that holds the answer is among the retrieved ones "
            "(recall at k). Absent: retrieval failed. Present: generation did.",
        ),
        Test(
            code="T3",
            name="instruction",
            title="Instruction test",
            how="State the missing rule in plain words in the prompt and ask again. Fixed: the "
            "prompt was unclear.",
        ),
        Test(
            code="T4",
            name="few_shot",
            title="Few-shot test",
            how="Put 5 or more representative examples (not these items) in the prompt and ask "
            "again; compare with McNemar's test. A gain means behaviour, not knowledge.",
        ),
        Test(
            code="T5",
            name="constrained",
            title="Constrained decoding test",
            how="Turn on structured outputs or a grammar, or validate and retry, and count what "
            "is still invalid.",
        ),
        Test(
            code="T6",
            name="pass_at_k",
            title="pass@k test",
            how="Sample 8 to 16 answers per item at temperature 0.8 to 1 and count how often one "
            "is right. Never: the model cannot do it yet.",
        ),
        Test(
            code="T7",
            name="larger_model",
            title="Larger model test",
            how="Run the same prompt on the strongest model you may use. 70 % or more fixed: it "
            "is capability, and there is a teacher.",
        ),
        Test(
            code="T8",
            name="trimmed_context",
            title="Context trimming test",
            how="Cut the prompt to what the answer needs, or move that part to the front, and ask "
            "again. Fixed: length or noise is the cause.",
        ),
        Test(
            code="T9",
            name="closed_book",
            title="Closed-book probe",
            how="Ask for the bare fact without any context. Known: the fact is not what is "
            "missing.",
        ),
    )
}
"""By the name used under ``tests`` in the failures file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of failure."""

    number: int
    name: str
    classes: tuple[FailureClass, ...]
    """Usually one; two where only a test tells which."""
    evidence: str
    """What distinguishes it."""
    tests: tuple[str, ...]
    """The tests that decide, cheapest and most telling first."""
    rungs: tuple[Step, ...]
    """Cheap rungs on the way."""
    ladder: tuple[Step, ...]
    """What it calls for after them."""
    not_helping: tuple[Step, ...]
    aliases: tuple[str, ...] = ()

    @property
    def factual(self) -> bool:
        """An answer that a missing fact explains: the oracle test can refute it."""
        return "information" in self.classes and not self.name.startswith("retrieval_")


PROMPT: tuple[Step, ...] = ("prompt",)
SHOTS: tuple[Step, ...] = ("prompt", "few_shot")
FORM: tuple[Step, ...] = ("prompt", "constrain_output", "few_shot")
WEIGHTS: tuple[Step, ...] = (
    "finetune",
    "preference_finetune",
    "reinforcement_finetune",
    "distill",
)
RETRIEVAL: tuple[Step, ...] = ("full_context", "rag_basic", "rag_advanced", "rag_and_finetune")

_ROWS = (
    Kind(
        number=1,
        name="missing_private_knowledge",
        classes=("information",),
        evidence="fails closed-book, passes with the passage in the prompt",
        tests=("oracle_context", "closed_book"),
        rungs=PROMPT,
        ladder=("full_context", "rag_basic", "rag_advanced", "rag_and_finetune"),
        not_helping=WEIGHTS,
    ),
    Kind(
        number=2,
        name="missing_public_knowledge",
        classes=("information",),
        evidence="a long-tail fact: fails closed-book, passes with the passage; a larger model "
        "may know it",
        tests=("oracle_context", "closed_book", "larger_model"),
        rungs=PROMPT,
        ladder=("full_context", "rag_basic", "rag_advanced", "rag_and_finetune"),
        not_helping=WEIGHTS,
    ),
    Kind(
        number=3,
        name="outdated_knowledge",
        classes=("information",),
        evidence="was true before the model's cutoff; passes with the passage",
        tests=("oracle_context",),
        rungs=PROMPT,
        ladder=("full_context", "rag_basic", "rag_advanced", "rag_and_finetune"),
        not_helping=WEIGHTS,
    ),
    Kind(
        number=4,
        name="hallucinated_fact",
        classes=("information", "behavior"),
        evidence="an invented fact; fixed by the passage: information; not fixed: the context is "
        "ignored; no source exists: it should have abstained",
        tests=("oracle_context",),
        rungs=PROMPT,
        ladder=("full_context", "rag_basic", "rag_advanced", "rag_and_finetune"),
        not_helping=("finetune", "preference_finetune"),
    ),
    Kind(
        number=5,
        name="retrieval_miss",
        classes=("information",),
        evidence="the passage exists but is not among the retrieved ones; context recall is low",
        tests=("retrieval", "oracle_context"),
        rungs=(),
        ladder=("rag_basic", "rag_advanced"),
        not_helping=("prompt", *WEIGHTS),
    ),
    Kind(
        number=6,
        name="retrieval_noise",
        classes=("information",),
        evidence="the passage is retrieved, and dropping the others fixes the answer",
        tests=("trimmed_context", "retrieval"),
        rungs=(),
        ladder=("rag_basic", "rag_advanced", "rag_and_finetune"),
        not_helping=("finetune", "preference_finetune"),
    ),
    Kind(
        number=7,
        name="context_ignored",
        aliases=("unfaithful_to_context",),
        classes=("behavior",),
        evidence="the context suffices and the answer contradicts or ignores it",
        tests=("oracle_context", "retrieval", "larger_model"),
        rungs=PROMPT,
        ladder=("switch_model", "rag_and_finetune", "reinforcement_finetune", "finetune"),
        not_helping=("rag_basic", "rag_advanced", "full_context"),
    ),
    Kind(
        number=8,
        name="irrelevant_but_correct",
        classes=("behavior",),
        evidence="the facts are true, and a rater cannot use the answer",
        tests=("few_shot", "instruction"),
        rungs=SHOTS,
        ladder=("finetune", "preference_finetune"),
        not_helping=RETRIEVAL[:3],
    ),
    Kind(
        number=9,
        name="wrong_format",
        classes=("behavior",),
        evidence="a parser rejects it, the content is right",
        tests=("constrained", "few_shot"),
        rungs=FORM,
        ladder=("constrain_output", "finetune"),
        not_helping=(*RETRIEVAL[:3], "reinforcement_finetune"),
    ),
    Kind(
        number=10,
        name="invalid_json",
        classes=("behavior",),
        evidence="does not parse; constrained decoding makes it valid",
        tests=("constrained",),
        rungs=FORM,
        ladder=("constrain_output", "finetune"),
        not_helping=RETRIEVAL[:3],
    ),
    Kind(
        number=11,
        name="invalid_dsl_syntax",
        classes=("behavior",),
        evidence="the language is rare in public text; examples in the prompt reach a plateau",
        tests=("constrained", "few_shot"),
        rungs=FORM,
        ladder=("constrain_output", "finetune"),
        not_helping=("rag_advanced",),
    ),
    Kind(
        number=12,
        name="wrong_tone_style",
        classes=("behavior",),
        evidence="the facts are right; raters can rank answers more easily than write them",
        tests=("few_shot", "instruction"),
        rungs=SHOTS,
        ladder=("finetune", "preference_finetune"),
        not_helping=(*RETRIEVAL[:3], "reinforcement_finetune"),
    ),
    Kind(
        number=13,
        name="unsafe_output",
        classes=("behavior",),
        evidence="violates a policy; do a system rule and a guardrail remove it?",
        tests=("instruction", "few_shot"),
        rungs=SHOTS,
        ladder=("finetune", "preference_finetune"),
        not_helping=RETRIEVAL[:3],
    ),
    Kind(
        number=14,
        name="over_refusal",
        classes=("behavior",),
        evidence="harmless requests are refused far more often than wanted",
        tests=("instruction", "few_shot"),
        rungs=SHOTS,
        ladder=("finetune", "preference_finetune"),
        not_helping=RETRIEVAL[:3],
    ),
    Kind(
        number=15,
        name="inconsistent_instruction_following",
        classes=("behavior",),
        evidence="the same input comes out differently; a long list of rules loses rules",
        tests=("few_shot", "instruction", "pass_at_k"),
        rungs=(*SHOTS, "prompt_optimizer"),
        ladder=("finetune", "reinforcement_finetune"),
        not_helping=RETRIEVAL[:3],
    ),
    Kind(
        number=16,
        name="wrong_tool_call",
        classes=("behavior",),
        evidence="the schema is valid, the tool or its arguments are wrong",
        tests=("instruction", "few_shot", "constrained"),
        rungs=FORM,
        ladder=("finetune", "reinforcement_finetune"),
        not_helping=RETRIEVAL[:3],
    ),
    Kind(
        number=17,
        name="reasoning_error",
        classes=("capability",),
        evidence="neither context nor examples help, a larger model does, and some samples are "
        "right",
        tests=("larger_model", "pass_at_k"),
        rungs=PROMPT,
        ladder=("switch_model", "reinforcement_finetune", "distill"),
        not_helping=(*RETRIEVAL[:3], "preference_finetune", "finetune"),
    ),
    Kind(
        number=18,
        name="numeric_error",
        classes=("capability",),
        evidence="the inputs are right and the arithmetic is wrong",
        tests=("larger_model", "pass_at_k"),
        rungs=PROMPT,
        ladder=("switch_model", "finetune", "reinforcement_finetune"),
        not_helping=(*RETRIEVAL[:3], "preference_finetune"),
    ),
    Kind(
        number=19,
        name="classification_error",
        classes=("behavior",),
        evidence="confusion sits on a few pairs of labels, and people agree on them",
        tests=("few_shot", "instruction", "label_audit"),
        rungs=SHOTS,
        ladder=("finetune", "reinforcement_finetune"),
        not_helping=("rag_advanced",),
    ),
    Kind(
        number=20,
        name="edge_case",
        classes=("behavior",),
        evidence="fails on a rare slice that can be described",
        tests=("few_shot", "instruction"),
        rungs=SHOTS,
        ladder=("finetune",),
        not_helping=("continued_pretrain",),
    ),
    Kind(
        number=21,
        name="wrong_code",
        classes=("capability",),
        evidence="unit tests fail; if the documentation in the prompt fixes it, knowledge was "
        "missing",
        tests=("oracle_context", "pass_at_k", "larger_model"),
        rungs=PROMPT,
        ladder=("switch_model", "reinforcement_finetune", "rag_basic", "finetune", "distill"),
        not_helping=("preference_finetune",),
    ),
    Kind(
        number=22,
        name="long_context_failure",
        classes=("capability",),
        evidence="passes when the prompt is trimmed or the part is moved; fails by position or "
        "length",
        tests=("trimmed_context", "larger_model"),
        rungs=PROMPT,
        ladder=("rag_basic", "rag_advanced", "switch_model", "long_context_finetune"),
        not_helping=("full_context", "finetune"),
    ),
    Kind(
        number=23,
        name="multi_turn_drift",
        classes=("behavior",),
        evidence="the first turn passes and a later one fails; repeating the state fixes it",
        tests=("instruction", "few_shot"),
        rungs=SHOTS,
        ladder=("finetune",),
        not_helping=RETRIEVAL[:3],
    ),
    Kind(
        number=24,
        name="language_mix",
        classes=("capability",),
        evidence="the same item in English passes",
        tests=("larger_model", "few_shot"),
        rungs=SHOTS,
        ladder=("switch_model", "continued_pretrain", "finetune", "reinforcement_finetune"),
        not_helping=RETRIEVAL[:3],
    ),
    Kind(
        number=25,
        name="latency",
        classes=("operational",),
        evidence="quality is met and the answer comes too late",
        tests=("larger_model",),
        rungs=PROMPT,
        ladder=("distill", "finetune", "switch_model"),
        not_helping=RETRIEVAL[:3],
    ),
    Kind(
        number=26,
        name="cost",
        classes=("operational",),
        evidence="quality is met and the calls cost too much",
        tests=("larger_model",),
        rungs=PROMPT,
        ladder=("distill", "finetune", "switch_model"),
        not_helping=(*RETRIEVAL[:3], "reinforcement_finetune"),
    ),
    Kind(
        number=27,
        name="prompt_too_long",
        classes=("operational",),
        evidence="instructions and examples are most of the tokens",
        tests=("larger_model",),
        rungs=PROMPT,
        ladder=("distill", "finetune"),
        not_helping=("few_shot", *RETRIEVAL[:3]),
    ),
    Kind(
        number=28,
        name="privacy",
        classes=("operational",),
        evidence="the provider is not allowed",
        aliases=("on_prem",),
        tests=("larger_model",),
        rungs=PROMPT,
        ladder=("distill", "finetune", "switch_model"),
        not_helping=(),
    ),
    Kind(
        number=29,
        name="model_drift",
        classes=("operational",),
        evidence="nothing was changed and the score moved",
        tests=(),
        rungs=(),
        ladder=("evaluate_first", "switch_model"),
        not_helping=("finetune",),
    ),
    Kind(
        number=30,
        name="ambiguous_task",
        aliases=("wrong_label",),
        classes=("evaluation",),
        evidence="raters disagree, or the reference is wrong",
        tests=("label_audit",),
        rungs=(),
        ladder=("evaluate_first",),
        not_helping=("prompt", *RETRIEVAL, *WEIGHTS, "switch_model"),
    ),
    Kind(
        number=31,
        name="judge_error",
        classes=("evaluation",),
        evidence="the judge model and people disagree",
        tests=("label_audit",),
        rungs=(),
        ladder=("evaluate_first",),
        not_helping=("switch_model", *WEIGHTS),
    ),
    Kind(
        number=32,
        name="unrepresentative_training_data",
        classes=("behavior",),
        evidence="the tuned model copies what its data look like instead of doing the task",
        tests=("instruction", "label_audit"),
        rungs=PROMPT,
        ladder=("evaluate_first", "finetune"),
        not_helping=RETRIEVAL[:3],
    ),
    Kind(
        number=33,
        name="infrastructure_error",
        classes=("operational",),
        evidence="a timeout, a rate limit, an exception of the harness",
        tests=(),
        rungs=(),
        ladder=("evaluate_first",),
        not_helping=("prompt", *RETRIEVAL, *WEIGHTS, "switch_model"),
    ),
)

KINDS: dict[str, Kind] = {row.name: row for row in _ROWS}
"""The 33 kinds by name."""
_BY_ANY_NAME = {name: row for row in _ROWS for name in (row.name, *row.aliases)}

CUSTOM: dict[FailureClass, Kind] = {
    "information": Kind(
        number=0,
        name="information",
        classes=("information",),
        evidence="a kind of your own, given as information",
        tests=("oracle_context", "closed_book"),
        rungs=PROMPT,
        ladder=KINDS["missing_private_knowledge"].ladder,
        not_helping=WEIGHTS,
    ),
    "behavior": Kind(
        number=0,
        name="behavior",
        classes=("behavior",),
        evidence="a kind of your own, given as behavior",
        tests=("few_shot", "instruction"),
        rungs=SHOTS,
        ladder=("finetune", "preference_finetune", "reinforcement_finetune"),
        not_helping=RETRIEVAL[:3],
    ),
    "capability": Kind(
        number=0,
        name="capability",
        classes=("capability",),
        evidence="a kind of your own, given as capability",
        tests=("larger_model", "pass_at_k"),
        rungs=PROMPT,
        ladder=(
            "switch_model",
            "reinforcement_finetune",
            "continued_pretrain",
            "distill",
            "finetune",
        ),
        not_helping=RETRIEVAL[:3],
    ),
    "evaluation": Kind(
        number=0,
        name="evaluation",
        classes=("evaluation",),
        evidence="a kind of your own, given as evaluation",
        tests=("label_audit",),
        rungs=(),
        ladder=("evaluate_first",),
        not_helping=("prompt", *RETRIEVAL, *WEIGHTS, "switch_model"),
    ),
    "operational": Kind(
        number=0,
        name="operational",
        classes=("operational",),
        evidence="a kind of your own, given as operational",
        tests=("larger_model",),
        rungs=PROMPT,
        ladder=("distill", "finetune", "switch_model"),
        not_helping=RETRIEVAL[:3],
    ),
}
"""How a kind that is not in the list is treated, by the class it was given."""


def kind_of(name: str | None, given: FailureClass | None) -> Kind | None:
    """The taxonomy's row for a label; for a name of the user's own the row of its class."""
    if name is not None and (row := _BY_ANY_NAME.get(name)) is not None:
        return row
    return CUSTOM[given] if given is not None else None


def suggest_kind(failure: Failure) -> str | None:
    """A kind for an unlabelled item from the tests that were run on it; None when they are mute.

    The first cause in the trace wins: reference, retrieval, generation, capability.
    """
    tests: Mapping[str, str] = failure.tests or {}
    passed = {name for name, result in tests.items() if result == "pass"}
    failed = {name for name, result in tests.items() if result == "fail"}
    table: tuple[tuple[set[str], set[str], str], ...] = (
        (set(), {"label_audit"}, "wrong_label"),
        ({"oracle_context"}, {"retrieval"}, "retrieval_miss"),
        ({"retrieval", "trimmed_context"}, set(), "retrieval_noise"),
        ({"oracle_context"}, set(), "missing_private_knowledge"),
        ({"trimmed_context"}, set(), "long_context_failure"),
        (set(), {"oracle_context"}, "context_ignored"),
        ({"constrained"}, set(), "wrong_format"),
        ({"larger_model"}, {"few_shot"}, "reasoning_error"),
        ({"instruction"}, set(), "inconsistent_instruction_following"),
        ({"few_shot"}, set(), "inconsistent_instruction_following"),
    )
    for needs_pass, needs_fail, kind in table:
        if needs_pass <= passed and needs_fail <= failed:
            return kind
    return None
