"""EVL: the gates. What cannot be measured cannot be improved."""

from __future__ import annotations

from ftplan.advice import TRAINING_STEPS
from ftplan.advise.facts import BASELINE, Facts
from ftplan.advise.rules.base import Rule, Source, case
from ftplan.advise.truth import Truth, unknown

HUYEN = Source(mark="V", text="Chip Huyen, AI Engineering (2025), chapter 7, the workflow")
OPENAI = Source(mark="V", text="OpenAI guide, Optimizing LLM accuracy: 20+ questions with answers")
HUSAIN = Source(mark="V", text="Hamel Husain and Shreya Shankar, evaluation guides")
OURS = Source(mark="D", text="the cut-off is ours")


def _too_few(f: Facts) -> Truth:
    examples = f.below("eval_examples", BASELINE)
    if f.labelled is None:
        return examples | unknown("failures.count")
    few = Truth(f.labelled < BASELINE)
    return examples | (few & ~(Truth(f.labelled >= 4) & f.unanimous))


def _broken_harness(f: Facts) -> Truth:
    share = f.infrastructure_share
    harness = unknown("failures.count") if share is None else Truth(share > 0.2)
    judged = [r for r in f.rows if r.kind is not None and r.kind.name == "judge_error"]
    if not judged:
        return harness
    weights = [r.weight for r in judged]
    if any(w is None for w in weights):
        return harness | unknown("failures.count")
    return harness | Truth(sum(w for w in weights if w is not None) > 0.2)


def _constrained_by_operations(f: Facts) -> Truth:
    """Quality is not all that is asked for (known to be so)."""
    operational = any(f.resolve(row) == "operational" for row in f.rows)
    return f.known_true("cost_limited", "latency_limited", "privacy_on_prem") | Truth(operational)


RULES = (
    Rule(
        code="EVL001",
        title="No evaluation, no adaptation",
        when=lambda f: ~f.evaluation,
        checks="There is no evaluation with criteria and ground truth.",
        step="evaluate_first",
        blocks=TRAINING_STEPS,
        reason="Without an evaluation nobody can tell whether a step helped, so no step that "
        "changes weights may be taken, and every other step is a guess.",
        sources=(
            HUYEN,
            OPENAI,
            Source(mark="V", text="Azure OpenAI, When to use fine-tuning: measure a baseline"),
            HUSAIN,
        ),
        strength="B",
        stop_when="20 or more examples with ground truth run the same way every time; aim at "
        "100 traces",
        flips_if="nothing: an evaluation has to exist first",
        fires=case("wrong_tone_style", eval_pipeline=False),
        rests=case("wrong_tone_style", eval_pipeline=True),
    ),
    Rule(
        code="EVL002",
        title="Too few examples to call it a baseline",
        when=_too_few,
        checks="Fewer than 20 evaluation examples, or fewer than 20 labelled failures that are "
        "not all (4 or more) of one class.",
        step="evaluate_first",
        reason="With fewer than 20 labels the interval of a share is wider than the difference "
        "that is to be decided.",
        sources=(OPENAI, Source(mark="C", text="Wilson intervals of small samples")),
        strength="B",
        stop_when="20 labelled failures for a baseline, 50 to rank classes, about 100 to be at "
        "ease",
        flips_if="all of 4 or more failures are of one class: then it is a hint, and cheap steps "
        "may follow it",
        fires=case(("wrong_format", 5), ("outdated_knowledge", 4), eval_examples=12),
        rests=case(("wrong_format", 30), ("outdated_knowledge", 10), eval_examples=200),
    ),
    Rule(
        code="EVL003",
        title="The task or its labels are in doubt",
        when=lambda f: f.below("annotator_agreement", 0.6) | f.share_at_least(0.1, "evaluation"),
        checks="Two people agree with a kappa under 0.6, or 10 % or more of the failures are "
        "wrong labels, an ambiguous task or a judge's errors.",
        step="evaluate_first",
        blocks=TRAINING_STEPS,
        reason="Where careful people disagree, a model can learn nothing but their disagreement: "
        "rewrite the rubric or split the task first.",
        sources=(
            Source(mark="V", text="OpenAI reinforcement fine-tuning guide: remove doubt first"),
            Source(mark="R", text="Landis and Koch's bands of kappa"),
            OURS,
        ),
        strength="B",
        stop_when="kappa of 0.6 or more on 50 items labelled twice, 0.8 before reinforcement",
        flips_if="one accountable expert decides, and no reinforcement finetuning is planned",
        fires=case(("classification_error", 40), annotator_agreement=0.35),
        rests=case(("classification_error", 40), annotator_agreement=0.85),
    ),
    Rule(
        code="EVL004",
        title="The harness or the judge fails, not the system",
        when=_broken_harness,
        checks="More than 20 % of the failures are infrastructure errors or judge errors.",
        step="evaluate_first",
        reason="Timeouts and a wrong judge look like failures of the model and would be trained "
        "against.",
        sources=(OURS, Source(mark="V", text="Hamel Husain: validate a judge on 100+ labels")),
        strength="D",
        stop_when="fewer than 5 % of the failures are the harness's or the judge's",
        flips_if="the errors are excluded and enough failures remain",
        fires=case(("infrastructure_error", 30), ("wrong_tone_style", 40)),
        rests=case(("infrastructure_error", 2), ("wrong_tone_style", 40)),
    ),
    Rule(
        code="EVL005",
        title="Good enough: stop",
        when=lambda f: f.at_target & ~_constrained_by_operations(f),
        checks="The lower end of the accuracy's interval is at or above the target, and neither "
        "cost, latency nor privacy asks for more.",
        step="do_nothing",
        blocks=("preference_finetune",),
        reason="The target is met beyond chance. More work adds cost, upkeep and risk.",
        sources=(
            Source(mark="V", text="OpenAI guide, Optimizing LLM accuracy: break-even accuracy"),
            HUYEN,
        ),
        strength="B",
        stop_when="monitor: 100 fresh traces every month",
        flips_if="the target, the cost of a failure or the traffic changes",
        fires=case(("edge_case", 30), accuracy=0.93, target_accuracy=0.88, eval_examples=400),
        rests=case(("edge_case", 30), accuracy=0.80, target_accuracy=0.88, eval_examples=400),
    ),
    Rule(
        code="EVL006",
        title="Which class leads is undecided",
        when=lambda f: f.undecided,
        checks="The largest class has less than 60 % of the failures, and its lead over the "
        "second may be chance.",
        step=None,
        reason="The order of the classes may turn with the next few labels. One test on the "
        "failures in hand decides more cheaply than a step in the wrong direction.",
        sources=(Source(mark="C", text="difference of two multinomial shares"), OURS),
        strength="D",
        stop_when="the interval of the difference excludes zero",
        flips_if="more labels, or the oracle context test on the factual ones",
        fires=case(("outdated_knowledge", 26), ("wrong_tone_style", 24)),
        rests=case(("outdated_knowledge", 80), ("wrong_tone_style", 20)),
    ),
    Rule(
        code="EVL007",
        title="The target is reached, but not beyond chance",
        when=lambda f: (
            f.at_target_by_point & Truth(not f.at_target) & ~_constrained_by_operations(f)
        ),
        checks="The measured accuracy is at or above the target, but its interval reaches below "
        "it, or the number of examples is not known.",
        step="do_nothing",
        reason="As far as measured the target is met. What is left to do is to measure better, "
        "not to build more.",
        sources=(Source(mark="C", text="Wilson interval of the accuracy"), OURS),
        strength="C",
        stop_when="the lower end of the interval on a held-out set is at or above the target",
        flips_if="a larger held-out set puts the accuracy under the target",
        fires=case(("edge_case", 8), accuracy=0.90, target_accuracy=0.88, eval_examples=60),
        rests=case(("edge_case", 8), accuracy=0.70, target_accuracy=0.88, eval_examples=60),
    ),
)
