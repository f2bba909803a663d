"""FTN: when weights should change, and when they should not."""

from __future__ import annotations

from ftplan.advise.facts import Facts
from ftplan.advise.rules.base import Rule, Source, case
from ftplan.advise.rules.evaluation import HUYEN, OPENAI, OURS
from ftplan.advise.truth import Truth, any_of, unknown

PILOT = 50
"""Labelled examples for a pilot: the least from which a gain is to be expected."""
SFT_GUIDE = Source(mark="V", text="OpenAI supervised fine-tuning guide: gains from 50 to 100")
FOUNDRY = Source(mark="V", text="Microsoft Foundry fine-tuning skill: 50 to 5,000 pairs")
GEKHMAN = Source(mark="E", text="Gekhman et al., arXiv 2405.05904: unknown facts and hallucination")
RAFT = Source(mark="E", text="RAFT, arXiv 2403.10131: training with distractors")


def no_gain(f: Facts) -> Truth:
    """The pilot gained nothing."""
    gain = f.state.sft_gain
    return unknown("sft_gain") if gain is None else Truth(gain <= 0)


def _misused(f: Facts) -> Truth:
    """The context suffices and is not used: by kind, or by the oracle test on factual kinds."""
    factual = any_of(
        Truth(row.kind is not None and row.kind.factual) & f.row_is(row, "behavior")
        for row in f.rows
    )
    return f.has_kind("context_ignored") | factual


RULES = (
    Rule(
        code="FTN001",
        title="Behaviour persists after prompting: finetune a pilot",
        when=lambda f: (
            f.has("behavior")
            & f.prompting
            & (f.at_least("few_shot_examples", 5) | f.yes("finetuned"))
            & f.at_least("labelled_examples", PILOT)
        ),
        checks="Behaviour fails, the prompt was worked on, 5 or more examples were tried (or the "
        "model is tuned already), and there are 50 or more labelled examples.",
        step="finetune",
        reason="Form, style and syntax are what finetuning teaches. Train a pilot on 50, compare "
        "on the same items, and only then label 200 to 500 more.",
        sources=(OPENAI, SFT_GUIDE, FOUNDRY, HUYEN),
        strength="B",
        stop_when="the pilot's gain is significant on the same items (McNemar); without gain "
        "FTN003",
        flips_if="a better base model fixes it",
        fires=case(
            ("wrong_tone_style", 40),
            prompt_iterations=8,
            few_shot_examples=10,
            labelled_examples=800,
        ),
        rests=case(
            ("wrong_tone_style", 40),
            prompt_iterations=8,
            few_shot_examples=10,
            labelled_examples=12,
        ),
    ),
    Rule(
        code="FTN002",
        title="A rare syntax, and data for it: finetune",
        when=lambda f: (
            f.yes("niche_syntax")
            & f.has_kind("invalid_dsl_syntax", "wrong_format", "wrong_code")
            & f.at_least("labelled_examples", 500)
        ),
        checks="The output's language is rare in public text or has no grammar mode, and there "
        "are 500 or more pairs.",
        step="finetune",
        reason="What is hardly in the pretraining text cannot be recalled by a prompt: the manual "
        "and examples reach a plateau, and pairs go past it. Include past failures.",
        sources=(
            Source(mark="E", text="ViGGO and SQL results of a tuned 13B model (Anyscale)"),
            Source(mark="R", text="Honeycomb's query assistant"),
        ),
        strength="B",
        stop_when="validity and content both meet the target",
        flips_if="the provider adds a grammar mode",
        fires=case(("invalid_dsl_syntax", 30), niche_syntax=True, labelled_examples=3000),
        rests=case(("invalid_dsl_syntax", 30), niche_syntax=False, labelled_examples=3000),
    ),
    Rule(
        code="FTN003",
        title="The pilot gained nothing: no more data",
        when=lambda f: no_gain(f) & f.at_least("labelled_examples", PILOT),
        checks="A pilot on 50 or more examples brought no gain.",
        step="prompt",
        blocks=("finetune",),
        reason="More of the data that showed nothing will show nothing. Rethink the task, the "
        "prompt or the labels.",
        sources=(SFT_GUIDE,),
        strength="A",
        stop_when="a data audit explains it",
        flips_if="the audit finds that data and task did not match",
        fires=case("wrong_tone_style", sft_gain=0.0, labelled_examples=60),
        rests=case("wrong_tone_style", sft_gain=4.0, labelled_examples=60),
    ),
    Rule(
        code="FTN004",
        title="Context is there and misused: train on retrieval-shaped examples",
        when=lambda f: (
            f.among("rag", "full_context", "term", "embedding", "hybrid")
            & _misused(f)
            & f.prompting
        ),
        checks="Documents are in the prompt, the answer ignores or contradicts them, and "
        "prompting was done.",
        step="rag_and_finetune",
        reason="Train on the prompts of production, retrieved passages and distractors included, "
        "with answers that quote what they rest on.",
        sources=(OPENAI, RAFT, Source(mark="E", text="Sufficient Context, arXiv 2411.06037")),
        strength="A",
        stop_when="faithfulness meets its target",
        flips_if="a larger model reads the same context right",
        fires=case(("context_ignored", 30), rag="hybrid", prompt_iterations=8),
        rests=case(("context_ignored", 30), rag="none", prompt_iterations=8),
    ),
    Rule(
        code="FTN005",
        title="Missing facts are not trained in",
        when=lambda f: f.only("information"),
        checks="All failures are missing or outdated information.",
        step=None,
        blocks=("finetune", "preference_finetune", "reinforcement_finetune"),
        reason="Examples with facts that the model does not know are learned slowly, and what is "
        "learned is to make facts up. Retrieval did better in every comparison on facts.",
        sources=(
            GEKHMAN,
            Source(mark="E", text="Ovadia et al., arXiv 2312.05934"),
            Source(mark="V", text="OpenAI fine-tuning best practices: no facts absent from inputs"),
        ),
        strength="A",
        stop_when="-",
        flips_if="closed-book knowledge is the aim, the facts are static and there is a budget "
        "for continued pretraining",
        fires=case(("missing_private_knowledge", 30)),
        rests=case(("missing_private_knowledge", 30), ("wrong_tone_style", 30)),
    ),
    Rule(
        code="FTN006",
        title="One assistant for many tasks: others degrade",
        when=lambda f: (
            Truth(None, frozenset({"task_diversity"}))
            if f.state.task_diversity is None
            else Truth(f.state.task_diversity.lower() in ("high", "broad", "diverse", "wide"))
        ),
        checks="The system serves many different tasks.",
        step=None,
        reason="Training on one task lowers others. Keep a general evaluation that is never "
        "trained on, and one adapter per task.",
        sources=(HUYEN,),
        strength="B",
        stop_when="the general evaluation drops by more than 1 or 2 points",
        flips_if="requests are routed to an adapter per task",
        fires=case("wrong_tone_style", task_diversity="high"),
        rests=case("wrong_tone_style", task_diversity="low"),
    ),
    Rule(
        code="FTN007",
        title="The tuned model copies its data: rebalance and tune again",
        when=lambda f: (
            f.yes("finetuned") & f.has_kind("over_refusal", "unrepresentative_training_data")
        ),
        checks="The model was finetuned, and refuses or imitates as its training data do.",
        step="finetune",
        reason="The model learned what it was shown. Make the data look like the traffic, with "
        "refusals as often as they are wanted, and tune again.",
        sources=(
            Source(mark="E", text="OpenAI fine-tuning best practices: 60 % refusals against 5 %"),
        ),
        strength="A",
        stop_when="the artefact's rate in the output equals the wanted one",
        flips_if="the base model shows the same without tuning",
        fires=case(("over_refusal", 25), finetuned=True),
        rests=case(("over_refusal", 25), finetuned=False),
    ),
    Rule(
        code="FTN008",
        title="Tuned and good enough: no retrieval for more",
        when=lambda f: f.yes("finetuned") & f.at_target_by_point,
        checks="The finetuned model is at its target.",
        step="do_nothing",
        blocks=("full_context", "rag_basic", "rag_advanced", "rag_and_finetune"),
        reason="Retrieval added to a tuned model without factual failures brought noise.",
        sources=(OPENAI,),
        strength="C",
        stop_when="monitor",
        flips_if="failures of information appear",
        fires=case("edge_case", finetuned=True, accuracy=0.9, target_accuracy=0.85),
        rests=case("edge_case", finetuned=True, accuracy=0.7, target_accuracy=0.85),
    ),
    Rule(
        code="FTN009",
        title="Too few labelled examples to finetune",
        when=lambda f: f.below("labelled_examples", PILOT),
        checks="There are fewer than 50 labelled examples.",
        step=None,
        blocks=("finetune", "rag_and_finetune"),
        reason="Fewer than 10 examples are refused by tuning services, and 10 to 49 do more in "
        "the prompt than in the weights.",
        sources=(SFT_GUIDE, FOUNDRY, OURS),
        strength="A",
        stop_when="50 examples of good quality, and 100 held out",
        flips_if="a teacher labels more, or a grader replaces the labels",
        fires=case("wrong_tone_style", labelled_examples=20),
        rests=case("wrong_tone_style", labelled_examples=200),
    ),
)
