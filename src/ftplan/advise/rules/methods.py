"""MTH: how to train, once training it is."""

from __future__ import annotations

from ftplan.advise.facts import Facts
from ftplan.advise.rules.base import Rule, Source, case
from ftplan.advise.rules.evaluation import HUYEN, OURS
from ftplan.advise.rules.finetuning import FOUNDRY, PILOT
from ftplan.advise.rules.retrieval import in_place
from ftplan.advise.truth import FALSE, Truth, any_of

ENOUGH_PAIRS = 500
DOMAIN_TOKENS = 100_000_000
FULL_EXAMPLES = 10_000
SUBJECTIVE = ("irrelevant_but_correct", "wrong_tone_style", "unsafe_output", "over_refusal")
RFT = Source(mark="V", text="OpenAI reinforcement fine-tuning guide and use cases")


def subjective(f: Facts) -> Truth:
    """People can rank the answers better than write them."""
    own = any_of(
        Truth(row.kind is not None and row.kind.number == 0 and row.kind.name == "behavior")
        for row in f.rows
    )
    return f.has_kind(*SUBJECTIVE) | own


def trainable_text(f: Facts) -> Truth:
    """The gap is one of language or domain that running text could close."""
    own = any_of(
        Truth(row.kind is not None and row.kind.number == 0 and row.given == "capability")
        for row in f.rows
    )
    return f.has_kind("language_mix") | own


def trimming_fails(f: Facts) -> Truth:
    """Shortening the prompt does not help, or is no option: retrieval runs, or all is needed."""
    results = [
        row.failure.tests["trimmed_context"]
        for row in f.rows
        if row.failure.tests and "trimmed_context" in row.failure.tests
    ]
    tested = Truth(results.count("fail") * 2 > len(results)) if results else FALSE
    return tested | f.yes("gold_context_in_prompt") | in_place(f)


def quality_by_teacher(f: Facts) -> Truth:
    """A larger model meets the quality."""
    return f.yes("teacher_available") | f.larger_model_fixes | f.at_target_by_point


def pressure(f: Facts) -> Truth:
    """Cost, latency or privacy asks for a smaller model of one's own."""
    return (
        f.has("operational")
        | f.yes("cost_limited")
        | f.yes("latency_limited")
        | f.yes("privacy_on_prem")
    )


RULES = (
    Rule(
        code="MTH001",
        title="Labelled pairs with one right way: supervised finetuning",
        when=lambda f: (
            f.has("behavior", "capability")
            & f.at_least("labelled_examples", PILOT)
            & ~f.only_kinds("reasoning_error")
        ),
        checks="There are 50 or more labelled pairs, and not all failures are of reasoning.",
        step="finetune",
        reason="With the right answer at hand, imitating it is the simplest and most stable way "
        "to train.",
        sources=(FOUNDRY,),
        strength="B",
        stop_when="the validation score is flat",
        flips_if="there are many right answers, or they are easier to grade than to write",
        fires=case("classification_error", labelled_examples=400),
        rests=case("classification_error", labelled_examples=30),
    ),
    Rule(
        code="MTH002",
        title="People rank what they cannot write: preference finetuning (DPO)",
        when=lambda f: (
            subjective(f)
            & f.at_least("preference_pairs", ENOUGH_PAIRS)
            & (f.yes("finetuned") | f.below("labelled_examples", PILOT))
        ),
        checks="Tone, safety, relevance or refusals fail, there are 500 or more pairs of a better "
        "and a worse answer, and the model is tuned already or there is nothing to imitate.",
        step="preference_finetune",
        reason="Preferences refine a model that is near the wanted style; they do not teach it "
        "from afar. Start from the supervised model where there is one.",
        sources=(FOUNDRY, Source(mark="E", text="Google Vertex AI: preference tuning after SFT")),
        strength="B",
        stop_when="the interval of the win rate excludes one half",
        flips_if="the base model is at the target already",
        fires=case("wrong_tone_style", preference_pairs=2000, finetuned=True),
        rests=case("wrong_tone_style", preference_pairs=80, finetuned=True),
    ),
    Rule(
        code="MTH003",
        title="Thumbs only: preference finetuning from single answers (KTO)",
        when=lambda f: (
            subjective(f)
            & f.at_least("unpaired_feedback", ENOUGH_PAIRS)
            & f.below("preference_pairs", ENOUGH_PAIRS)
        ),
        checks="Tone, safety, relevance or refusals fail, and there are 500 or more single "
        "answers with a thumb up or down, but no 500 pairs.",
        step="preference_finetune",
        reason="KTO learns from unpaired and unbalanced feedback.",
        sources=(Source(mark="R", text="KTO, arXiv 2402.01306"),),
        strength="C",
        stop_when="the interval of the win rate excludes one half",
        flips_if="pairs can be had",
        fires=case("wrong_tone_style", unpaired_feedback=5000, preference_pairs=0),
        rests=case("wrong_tone_style", unpaired_feedback=50, preference_pairs=0),
    ),
    Rule(
        code="MTH004",
        title="Answers can be graded: reinforcement finetuning",
        when=lambda f: (
            f.has("behavior", "capability")
            & f.yes("grader_verifiable")
            & f.yes("pass_at_k_above_zero")
            & Truth(not f.disputed)
        ),
        checks="A grader that cannot be guessed scores the answers, experts agree with it, and "
        "the model is right now and then.",
        step="reinforcement_finetune",
        reason="Reinforcement makes what sometimes works work often. It needs 50 prompts at the "
        "least, better 200 to 2,000, and a base that fails on a quarter to a half of them.",
        sources=(RFT, FOUNDRY),
        strength="A",
        stop_when="the validation reward is flat, or training and validation reward part by more "
        "than 0.2",
        flips_if="a prompt optimizer reaches the target",
        fires=case("reasoning_error", grader_verifiable=True, pass_at_k_above_zero=True),
        rests=case("reasoning_error", grader_verifiable=False, pass_at_k_above_zero=True),
    ),
    Rule(
        code="MTH005",
        title="Never right: no reinforcement",
        when=lambda f: f.no("pass_at_k_above_zero"),
        checks="Of many tries at the failed items none is right.",
        step=None,
        blocks=("reinforcement_finetune",),
        reason="Without a single success there is no reward to learn from. Use a larger model, "
        "or train on worked solutions first.",
        sources=(RFT,),
        strength="A",
        stop_when="-",
        flips_if="easier items first make the rate greater than zero",
        fires=case("reasoning_error", pass_at_k_above_zero=False),
        rests=case("reasoning_error", pass_at_k_above_zero=True),
    ),
    Rule(
        code="MTH006",
        title="A large model is good enough but too slow, dear or far: distil it",
        when=lambda f: quality_by_teacher(f) & pressure(f),
        checks="A larger model meets the quality, and cost, latency, privacy or prompt length "
        "does not let it stay.",
        step="distill",
        reason="A small model imitates one narrow task well. Start with 200 to 500 outputs of the "
        "teacher, filtered by the evaluation; read the licence of the teacher's outputs.",
        sources=(
            Source(mark="E", text="OpenAI, Indeed: equal quality with 60 % fewer tokens"),
            Source(mark="S", text="Airtrain: small tuned models, 94 % cheaper"),
            FOUNDRY,
            HUYEN,
        ),
        strength="B",
        stop_when="the lower end of student - teacher is above the margin you can accept",
        flips_if="caching, batching or a shorter prompt meets the budget",
        fires=case("latency", teacher_available=True),
        rests=case(
            "wrong_tone_style",
            teacher_available=False,
            larger_model_fixes=False,
            accuracy=0.5,
            target_accuracy=0.9,
        ),
    ),
    Rule(
        code="MTH007",
        title="Much static text in a language the model lacks: continue pretraining",
        when=lambda f: (
            f.at_least("corpus_tokens", DOMAIN_TOKENS)
            & f.among("knowledge_changes", "never", "yearly")
            & trainable_text(f)
            & f.yes("ml_owner")
        ),
        checks="100 million tokens or more of text that does not change, a gap of language or "
        "jargon, and a team that can pretrain.",
        step="continued_pretrain",
        reason="A language is learned from running text, not from pairs. Train on the text first, "
        "on examples after; a few thousand documents are not enough.",
        sources=(
            HUYEN,
            Source(mark="E", text="Meta, When to fine-tune (2024): not for small teams"),
            Source(mark="R", text="the floor of 10^8 tokens"),
        ),
        strength="C",
        stop_when="held-out perplexity and the task both gain, and the general evaluation holds",
        flips_if="retrieval or a stronger multilingual model closes the gap",
        fires=case(
            "language_mix",
            corpus_tokens=2_000_000_000,
            knowledge_changes="never",
            ml_owner=True,
        ),
        rests=case(
            "language_mix", corpus_tokens=3_000_000, knowledge_changes="never", ml_owner=True
        ),
    ),
    Rule(
        code="MTH008",
        title="No model reads that far: finetune for length, last of all",
        when=lambda f: (
            f.has_kind("long_context_failure") & ~f.larger_model_fixes & trimming_fails(f)
        ),
        checks="Items fail by length, shortening does not help or is impossible, and models with "
        "a longer context fail as well.",
        step="long_context_finetune",
        reason="It changes the positional embeddings, is the hardest kind of finetuning, and may "
        "lower quality on short inputs: nothing else may be left.",
        sources=(HUYEN,),
        strength="C",
        stop_when="the evaluation on short items falls",
        flips_if="a model with a longer context appears",
        fires=case("long_context_failure", rag="hybrid", larger_model_fixes=False),
        rests=case("long_context_failure", rag="hybrid", larger_model_fixes=True),
    ),
    Rule(
        code="MTH009",
        title="LoRA or QLoRA; full finetuning only with data and memory for it",
        when=lambda f: f.at_least("labelled_examples", FULL_EXAMPLES),
        checks="There are 10,000 or more good examples.",
        step=None,
        reason="Low-rank adapters equal full finetuning on data sets of this kind up to tens of "
        "thousands of examples and forget less. Raise the rank before training everything. "
        "Training only the last layers needs many parameters for little.",
        sources=(HUYEN, Source(mark="R", text="LoRA Learns Less and Forgets Less, 2405.09673")),
        strength="B",
        stop_when="full finetuning beats the adapter significantly",
        flips_if="many adapters are served from one base: then LoRA always",
        fires=case("wrong_code", labelled_examples=50_000),
        rests=case("wrong_code", labelled_examples=2_000),
    ),
    Rule(
        code="MTH010",
        title="Fixed labels and a thousand of them: consider a small classifier",
        when=lambda f: f.has_kind("classification_error") & f.at_least("labelled_examples", 1_000),
        checks="The task is classification with a fixed set of labels and 1,000 or more examples.",
        step="finetune",
        reason="An encoder or a logistic regression may carry most of the traffic for next to "
        "nothing, and the language model the rest.",
        sources=(Source(mark="S", text="Checkr: logistic regression on 98 % of the cases"),),
        strength="C",
        stop_when="the small classifier is not worse on the same items",
        flips_if="the set of labels is open",
        fires=case("classification_error", labelled_examples=5_000),
        rests=case("classification_error", labelled_examples=200),
    ),
    Rule(
        code="MTH011",
        title="Experts must agree before reinforcement",
        when=lambda f: f.below("annotator_agreement", 0.8),
        checks="Two experts agree with a kappa under 0.8.",
        step=None,
        blocks=("reinforcement_finetune",),
        reason="The reward would be the experts' noise, and the model would learn to exploit it.",
        sources=(RFT, Source(mark="D", text="the 0.8 is ours, after Krippendorff")),
        strength="A",
        stop_when="-",
        flips_if="a rewritten rubric brings agreement to 0.8",
        fires=case("classification_error", annotator_agreement=0.7),
        rests=case("classification_error", annotator_agreement=0.9),
    ),
    Rule(
        code="MTH012",
        title="No grader, no reinforcement",
        when=lambda f: f.no("grader_verifiable"),
        checks="No program and no validated judge can score an answer.",
        step=None,
        blocks=("reinforcement_finetune",),
        reason="There is nothing to reinforce without a score that can be trusted.",
        sources=(RFT,),
        strength="A",
        stop_when="-",
        flips_if="a grader is written, or a judge is validated on 100 or more labels",
        fires=case("reasoning_error", grader_verifiable=False),
        rests=case("reasoning_error", grader_verifiable=True),
    ),
    Rule(
        code="MTH013",
        title="No teacher, no distillation",
        when=lambda f: f.no("teacher_available") & Truth(not f.larger_model_fixes),
        checks="No stronger model meets the quality, or its outputs may not be trained on.",
        step=None,
        blocks=("distill",),
        reason="A student is at best as good as its teacher.",
        sources=(HUYEN, FOUNDRY),
        strength="A",
        stop_when="-",
        flips_if="a larger model meets the quality",
        fires=case("latency", teacher_available=False),
        rests=case("latency", teacher_available=True),
    ),
    Rule(
        code="MTH014",
        title="Too few preferences",
        when=lambda f: (
            f.below("preference_pairs", ENOUGH_PAIRS) & f.below("unpaired_feedback", ENOUGH_PAIRS)
        ),
        checks="There are neither 500 preference pairs nor 500 single judgements.",
        step=None,
        blocks=("preference_finetune",),
        reason="With fewer the win rate's interval holds one half whatever is learned.",
        sources=(FOUNDRY, OURS),
        strength="B",
        stop_when="-",
        flips_if="more preferences are collected",
        fires=case("wrong_tone_style", preference_pairs=100, unpaired_feedback=20),
        rests=case("wrong_tone_style", preference_pairs=900, unpaired_feedback=20),
    ),
)
