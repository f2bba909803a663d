"""OPS: what tests say about causes, what the team can carry, and when to stop."""

from __future__ import annotations

from ftplan.advice import TRAINING_STEPS
from ftplan.advise.facts import Facts
from ftplan.advise.rules.base import Rule, Source, case
from ftplan.advise.rules.evaluation import HUSAIN, HUYEN, OPENAI, OURS
from ftplan.advise.rules.finetuning import no_gain
from ftplan.advise.rules.methods import RFT
from ftplan.advise.statistics import break_even_calls
from ftplan.advise.truth import TRUE, Truth, unknown

SMALL_GAP = 0.05
CLASHEVAL = Source(mark="E", text="ClashEval, arXiv 2404.10198: the right document, 94 %")
SUFFICIENT = Source(mark="E", text="Sufficient Context, arXiv 2411.06037")


def _gap_is_small(f: Facts) -> Truth:
    accuracy, target = f.state.accuracy, f.state.target_accuracy
    if accuracy is None or target is None:
        return unknown(*(k for k in ("accuracy", "target_accuracy") if getattr(f.state, k) is None))
    return Truth(0 < target - accuracy < SMALL_GAP)


def _below_target(f: Facts) -> Truth:
    return ~f.at_target_by_point


def _under_break_even(f: Facts) -> Truth:
    state = f.state
    missing = [
        key
        for key in ("monthly_calls", "saving_per_call", "tuning_cost_per_month")
        if getattr(state, key) is None
    ]
    if state.monthly_calls is None or state.saving_per_call is None:
        return unknown(*missing)
    if state.tuning_cost_per_month is None:
        return unknown(*missing)
    needed = break_even_calls(state.tuning_cost_per_month, state.saving_per_call)
    return Truth(needed is None or state.monthly_calls < needed)


RULES = (
    Rule(
        code="OPS001",
        title="The right passage fixes it: information is missing",
        when=lambda f: f.oracle_fixes,
        checks="Pasting the gold passage in fixes a majority of the tested failures, beyond "
        "chance (the lower end of the interval is above one half).",
        step=None,
        reason="What a passage cures was a lack of the passage.",
        sources=(CLASHEVAL, SUFFICIENT, Source(mark="D", text="the cut at one half is ours")),
        strength="A",
        stop_when="-",
        flips_if="the passage gave the answer away rather than the information",
        fires=case("hallucinated_fact", oracle_context_fixes=0.9, oracle_context_tested=20),
        rests=case("hallucinated_fact", oracle_context_fixes=0.1, oracle_context_tested=20),
    ),
    Rule(
        code="OPS002",
        title="The right passage does not fix it: not information",
        when=lambda f: f.oracle_does_not_fix & ~f.has_kind("retrieval_miss", "retrieval_noise"),
        checks="Pasting the gold passage in fixes only a minority of the tested failures, beyond "
        "chance, or the passage is in every prompt already; and no failure is one of search.",
        step=None,
        blocks=("full_context", "rag_basic", "rag_advanced"),
        reason="The model had what it needed and failed. Bringing it more of the same cannot help.",
        sources=(SUFFICIENT, Source(mark="E", text="RAFT, arXiv 2403.10131"), OURS),
        strength="A",
        stop_when="-",
        flips_if="the documents do not hold the answer: then collect documents",
        fires=case("hallucinated_fact", oracle_context_fixes=0.1, oracle_context_tested=20),
        rests=case("hallucinated_fact", oracle_context_fixes=0.9, oracle_context_tested=20),
    ),
    Rule(
        code="OPS003",
        title="The right passage fixes some: split the items",
        when=lambda f: f.oracle_straddles,
        checks="The interval of the share that the gold passage fixes holds one half.",
        step=None,
        reason="Both causes are at work: the fixed items are information, the others behaviour.",
        sources=(OURS, Source(mark="C", text="Wilson interval")),
        strength="D",
        stop_when="the interval excludes one half",
        flips_if="more items are tested",
        fires=case("hallucinated_fact", oracle_context_fixes=0.5, oracle_context_tested=20),
        rests=case("hallucinated_fact", oracle_context_fixes=0.95, oracle_context_tested=40),
    ),
    Rule(
        code="OPS004",
        title="Examples help: the model knows, it behaves wrongly",
        when=lambda f: f.yes("few_shot_helps"),
        checks="Examples in the prompt raised the score.",
        step=None,
        reason="Examples carry form, not facts. That they help says that the form was wrong.",
        sources=(OPENAI,),
        strength="C",
        stop_when="-",
        flips_if="the examples held the missing facts",
        fires=case("wrong_tone_style", few_shot_helps=True),
        rests=case("wrong_tone_style", few_shot_helps=False),
    ),
    Rule(
        code="OPS005",
        title="Only a larger model can: capability",
        when=lambda f: (
            f.has("behavior", "capability") & f.larger_model_fixes & f.no("pass_at_k_above_zero")
        ),
        checks="A larger model fixes 70 % or more, and this one is never right in many tries.",
        step="switch_model",
        reason="The ability is not there to be brought out.",
        sources=(Source(mark="E", text="Anyscale: GSM8k stays far under the large model"), OURS),
        strength="C",
        stop_when="-",
        flips_if="worked solutions make the small model right now and then",
        fires=case("reasoning_error", larger_model_fixes=0.9, pass_at_k_above_zero=False),
        rests=case("reasoning_error", larger_model_fixes=0.9, pass_at_k_above_zero=True),
    ),
    Rule(
        code="OPS006",
        title="Sometimes right: reliability, which training can raise",
        when=lambda f: f.yes("pass_at_k_above_zero"),
        checks="Of several tries at a failed item at least some are right.",
        step=None,
        reason="The ability is there and does not come out every time.",
        sources=(RFT,),
        strength="B",
        stop_when="-",
        flips_if="guessing explains it (few choices)",
        fires=case("reasoning_error", pass_at_k_above_zero=True),
        rests=case("reasoning_error", pass_at_k_above_zero=False),
    ),
    Rule(
        code="OPS007",
        title="Retrieved and still wrong: generation, not retrieval",
        when=lambda f: f.at_least("retrieval_recall", 0.9) & ~f.has_kind("retrieval_miss"),
        checks="The gold passage is retrieved for 90 % or more of the questions.",
        step=None,
        reason="Search did its work; what fails comes after it.",
        sources=(OPENAI, HUSAIN),
        strength="B",
        stop_when="-",
        flips_if="the passage that counts as a hit does not suffice for the answer",
        fires=case("context_ignored", retrieval_recall=0.97),
        rests=case("context_ignored", retrieval_recall=0.6),
    ),
    Rule(
        code="OPS008",
        title="Nobody to train it or nowhere to serve it",
        when=lambda f: (
            f.no("ml_owner")
            | (f.no("can_serve_weights") & f.no("hosted_tuning_available"))
            | (f.no("can_serve_weights") & f.yes("privacy_on_prem"))
        ),
        checks="There is nobody who owns the model, or it can be served neither by the team nor "
        "by a provider that is allowed.",
        step=None,
        blocks=TRAINING_STEPS,
        reason="A tuned model needs somebody to train, serve, watch and renew it, with a budget "
        "for as long as it runs. Do not count on a provider: tuning services are closed too.",
        sources=(
            HUYEN,
            Source(mark="V", text="OpenAI: the fine-tuning platform is being wound down"),
        ),
        strength="A",
        stop_when="-",
        flips_if="an owner and a place to serve are found",
        fires=case("wrong_tone_style", ml_owner=False),
        rests=case("wrong_tone_style", ml_owner=True, can_serve_weights=True),
    ),
    Rule(
        code="OPS009",
        title="Data may not leave: open weights only",
        when=lambda f: f.yes("privacy_on_prem") | f.has_kind("privacy"),
        checks="Data may not leave the house.",
        step=None,
        reason="Hosted models and hosted tuning are out; what is trained and served must be "
        "weights of your own.",
        sources=(Source(mark="S", text="Airtrain: on-premises healthcare chatbot"),),
        strength="B",
        stop_when="-",
        flips_if="a contract or a region makes a provider acceptable",
        fires=case("privacy", privacy_on_prem=True),
        rests=case("wrong_tone_style", privacy_on_prem=False),
    ),
    Rule(
        code="OPS010",
        title="The gap is small and base models improve fast: try the next one",
        when=lambda f: f.among("base_model_churn", "high") & _gap_is_small(f),
        checks="Better base models appear quickly, and less than 5 points are missing.",
        step="switch_model",
        blocks=(
            "finetune",
            "preference_finetune",
            "reinforcement_finetune",
            "continued_pretrain",
        ),
        reason="The next base model may close the gap before a tuned one is in production, and "
        "the tuned one would have to be made again.",
        sources=(HUYEN, Source(mark="E", text="Vercel kept the base model exchangeable"), OURS),
        strength="B",
        stop_when="two base models in turn did not close the gap",
        flips_if="the gap stays across two base models",
        fires=case(
            "wrong_tone_style", base_model_churn="high", accuracy=0.87, target_accuracy=0.90
        ),
        rests=case(
            "wrong_tone_style", base_model_churn="high", accuracy=0.60, target_accuracy=0.90
        ),
    ),
    Rule(
        code="OPS011",
        title="Cost is the motive and quality is not met",
        when=lambda f: f.only("operational") & _below_target(f),
        checks="All failures are operational, and the accuracy is under its target.",
        step="prompt",
        blocks=("distill", "finetune"),
        reason="A cheaper model that imitates one which is not good enough is not good enough.",
        sources=(Source(mark="V", text="Azure OpenAI, When to use fine-tuning: cost as motive"),),
        strength="B",
        stop_when="some model meets the target",
        flips_if="a larger model meets the quality (MTH006)",
        fires=case("cost", accuracy=0.6, target_accuracy=0.9),
        rests=case("cost", accuracy=0.92, target_accuracy=0.9),
    ),
    Rule(
        code="OPS012",
        title="Too few calls to pay for a tuned model",
        when=lambda f: f.only_kinds("cost", "prompt_too_long") & _under_break_even(f),
        checks="Cost is the only motive, and the calls a month are fewer than the monthly cost of "
        "tuning divided by what a call saves.",
        step="do_nothing",
        blocks=("distill", "finetune"),
        reason="Training, labels, serving and upkeep cost more than they save.",
        sources=(Source(mark="C", text="arithmetic"), Source(mark="V", text="Azure OpenAI")),
        strength="D",
        stop_when="-",
        flips_if="the volume grows past the break-even",
        fires=case(
            "cost", monthly_calls=10_000, saving_per_call=0.01, tuning_cost_per_month=2_000.0
        ),
        rests=case(
            "cost", monthly_calls=9_000_000, saving_per_call=0.01, tuning_cost_per_month=2_000.0
        ),
    ),
    Rule(
        code="OPS013",
        title="Stop on held-out examples only",
        when=lambda f: f.at_target_by_point & f.below("eval_examples", 100),
        checks="The target is reached on fewer than 100 examples.",
        step=None,
        reason="A set that the prompt was written on flatters it. Keep 100 examples that nothing "
        "was tuned on.",
        sources=(HUSAIN, Source(mark="D", text="the 100 is ours")),
        strength="A",
        stop_when="the target holds on 100 or more held-out examples",
        flips_if="-",
        fires=case("edge_case", accuracy=0.9, target_accuracy=0.85, eval_examples=40),
        rests=case("edge_case", accuracy=0.9, target_accuracy=0.85, eval_examples=400),
    ),
    Rule(
        code="OPS014",
        title="Two steps without gain: leave the axis",
        when=lambda f: f.no("few_shot_helps") & no_gain(f),
        checks="Neither examples in the prompt nor the pilot finetuning helped.",
        step="evaluate_first",
        reason="Two steps on the same axis that gained nothing say that the axis is wrong: label "
        "the failures again.",
        sources=(OURS,),
        strength="D",
        stop_when="the failures are labelled again",
        flips_if="one of the two was not measured properly",
        fires=case("wrong_tone_style", few_shot_helps=False, sft_gain=0.0),
        rests=case("wrong_tone_style", few_shot_helps=True, sft_gain=0.0),
    ),
    Rule(
        code="OPS015",
        title="After every step: measure, label again, compare",
        when=lambda f: f.evaluation & TRUE,
        checks="There is an evaluation.",
        step=None,
        reason="Run the evaluation again, label 20 to 100 fresh failures, compare on the same "
        "items (McNemar), and look at the slices and at a general set.",
        sources=(HUYEN, HUSAIN),
        strength="B",
        stop_when="-",
        flips_if="-",
        fires=case("wrong_tone_style", eval_pipeline=True),
        rests=case("wrong_tone_style", eval_pipeline=False),
    ),
)

__all__ = ["RULES"]
