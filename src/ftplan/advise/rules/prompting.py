"""PRM: the cheap rungs. Most failures of prompting are failures of prompting work."""

from __future__ import annotations

from ftplan.advise.facts import Facts
from ftplan.advise.rules.base import Rule, Source, case
from ftplan.advise.rules.evaluation import HUYEN, OPENAI, OURS
from ftplan.advise.truth import Truth, all_of

FORMAT_KINDS = ("wrong_format", "invalid_json", "invalid_dsl_syntax")
STRUCTURED = Source(
    mark="S", text="OpenAI Structured Outputs: under 40 % valid by prompt, 100 % constrained"
)
LINKEDIN = Source(
    mark="R", text="LinkedIn engineering: tolerant parser, 10 % broken YAML to about 0.01 %"
)


def _only_form(f: Facts) -> Truth:
    """Everything that is wrong with the answers is their form."""
    quality = [r for r in f.rows if f.resolve(r) != "operational"]
    if not quality:
        return Truth(False)
    return all_of(
        Truth(r.kind is not None and r.kind.name in FORMAT_KINDS)
        if r.given is not None
        else Truth(None, frozenset({"failures.kind"}))
        for r in quality
    )


def _measured_examples(f: Facts) -> Truth:
    return f.at_least("eval_examples", 20) | f.at_least("labelled_examples", 20)


RULES = (
    Rule(
        code="PRM001",
        title="Prompting was minimal or unsystematic",
        when=lambda f: f.below("prompt_iterations", 5) | f.no("prompts_versioned"),
        checks="Fewer than 5 versions of the prompt were measured, or they are not kept in "
        "versions.",
        step="prompt",
        reason="The usual finding behind a call for finetuning is unclear instructions, "
        "unrepresentative examples and a loose metric. Fix those first.",
        sources=(HUYEN, Source(mark="D", text="the number 5 is ours")),
        strength="B",
        stop_when="3 versions in a row without a significant gain",
        flips_if="the versions were measured elsewhere, by an optimizer for instance",
        fires=case("wrong_tone_style", prompt_iterations=2),
        rests=case("wrong_tone_style", prompt_iterations=8, prompts_versioned=True),
    ),
    Rule(
        code="PRM002",
        title="Constrain the form before training it",
        when=lambda f: (
            f.has_kind(*FORMAT_KINDS, "wrong_tool_call")
            & f.no("constrained_decoding_tried")
            & ~f.known_true("niche_syntax")
        ),
        checks="Outputs break a format, and neither constrained decoding nor a validator with "
        "retry was tried; the format is not one that has no grammar.",
        step="constrain_output",
        reason="A grammar at decoding time makes the form right every time, today, without data. "
        "Parse tolerantly as well: most broken outputs break in the same few ways.",
        sources=(STRUCTURED, LINKEDIN),
        strength="A",
        stop_when="99.9 % or more of the outputs are valid",
        flips_if="the grammar cannot be expressed, or the provider offers no such mode",
        fires=case(("invalid_json", 30), constrained_decoding_tried=False),
        rests=case(("invalid_json", 30), constrained_decoding_tried=True),
    ),
    Rule(
        code="PRM003",
        title="Behaviour, and hardly any examples in the prompt",
        when=lambda f: (
            f.has("behavior") & f.below("few_shot_examples", 5) & ~f.known_true("finetuned")
        ),
        checks="There are failures of behaviour, fewer than 5 examples in the prompt, and no model "
        "that was tuned on more.",
        step="few_shot",
        reason="Examples show form and style better than words do. A few, representative of real "
        "inputs, also tell whether it is behaviour at all.",
        sources=(
            Source(mark="E", text="Applied LLMs (Yan, Husain, Shankar et al.): n of 5 and more"),
            OPENAI,
        ),
        strength="B",
        stop_when="5 representative examples are in and measured; then up to 50",
        flips_if="the context budget or the latency forbids longer prompts",
        fires=case("wrong_tone_style", few_shot_examples=0),
        rests=case("wrong_tone_style", few_shot_examples=10),
    ),
    Rule(
        code="PRM004",
        title="Examples still help: more of them",
        when=lambda f: (
            f.has("behavior")
            & f.at_least("few_shot_examples", 5)
            & f.below("few_shot_examples", 50)
            & f.yes("few_shot_helps")
            & ~f.known_true("cost_limited", "latency_limited")
        ),
        checks="5 to 49 examples are in the prompt, they raised the score, and neither cost nor "
        "latency forbids more.",
        step="few_shot",
        reason="The gain has not run out. Choose examples per input by nearest neighbour before "
        "adding many.",
        sources=(HUYEN, Source(mark="E", text="Medprompt, arXiv 2311.16452: nearest neighbours")),
        strength="B",
        stop_when="2 steps without gain, or 50 examples",
        flips_if="a cache makes hundreds of examples affordable",
        fires=case("wrong_tone_style", few_shot_examples=8, few_shot_helps=True),
        rests=case("wrong_tone_style", few_shot_examples=50, few_shot_helps=True),
    ),
    Rule(
        code="PRM005",
        title="Let an optimizer write the prompt before training",
        when=lambda f: (
            f.has("behavior", "capability")
            & f.yes("grader_verifiable")
            & _measured_examples(f)
            & f.no("prompt_optimizer_tried")
        ),
        checks="Answers are scored automatically, there are 20 or more examples, and no prompt "
        "optimizer was run.",
        step="prompt_optimizer",
        reason="With a metric and 20 examples a prompt optimizer reaches what reinforcement "
        "reaches in many tasks, with a fraction of the samples and nothing to serve.",
        sources=(Source(mark="E", text="GEPA, arXiv 2507.19457: above GRPO with fewer rollouts"),),
        strength="B",
        stop_when="no gain on held-out examples",
        flips_if="a wholly new task or syntax",
        fires=case(
            "inconsistent_instruction_following",
            grader_verifiable=True,
            eval_examples=150,
            prompt_optimizer_tried=False,
        ),
        rests=case(
            "inconsistent_instruction_following",
            grader_verifiable=True,
            eval_examples=150,
            prompt_optimizer_tried=True,
        ),
    ),
    Rule(
        code="PRM006",
        title="Reasoning fails, and the prompt does not ask for it",
        when=lambda f: (
            f.has_kind("reasoning_error", "numeric_error") & f.below("prompt_iterations", 5)
        ),
        checks="Reasoning or arithmetic is wrong, and prompting was minimal.",
        step="prompt",
        reason="Ask for the steps, decompose the task, hand arithmetic to a calculator or code. "
        "None of it needs training.",
        sources=(OPENAI, Source(mark="E", text="Medprompt, arXiv 2311.16452")),
        strength="B",
        stop_when="3 versions in a row without a significant gain",
        flips_if="a reasoning model is in use already",
        fires=case("numeric_error", prompt_iterations=1),
        rests=case("numeric_error", prompt_iterations=9),
    ),
    Rule(
        code="PRM007",
        title="A larger model does it, and may be used",
        when=lambda f: (
            f.has("behavior", "capability")
            & f.larger_model_fixes
            & ~f.known_true("cost_limited", "latency_limited", "privacy_on_prem")
        ),
        checks="Behaviour or capability fails, a larger or reasoning model fixes 70 % or more of "
        "it, and cost, latency and privacy are not known to forbid that model.",
        step="switch_model",
        reason="Buying the capability is cheaper than training it, and there is nothing to keep "
        "current.",
        sources=(
            Source(
                mark="V", text="Hamel Husain: change the model only on evidence of error analysis"
            ),
            Source(mark="D", text="the 70 % is ours"),
        ),
        strength="C",
        stop_when="the target is met on the held-out set",
        flips_if="cost, latency or privacy forbid it: then distil from it",
        fires=case("reasoning_error", larger_model_fixes=0.85),
        rests=case("reasoning_error", larger_model_fixes=0.2),
    ),
    Rule(
        code="PRM008",
        title="No training before prompting was tried",
        when=lambda f: (
            f.has("behavior", "capability", "operational") & f.below("prompt_iterations", 5)
        ),
        checks="Behaviour, capability or operation fails, and fewer than 5 versions of the prompt "
        "were measured.",
        step="prompt",
        blocks=(
            "finetune",
            "preference_finetune",
            "reinforcement_finetune",
            "continued_pretrain",
        ),
        reason="That these failures need training is not shown as long as prompting was hardly "
        "tried; in most projects better prompts were enough.",
        sources=(
            HUYEN,
            Source(
                mark="V", text="Azure OpenAI, When to use fine-tuning: signs of not being ready"
            ),
            OURS,
        ),
        strength="B",
        stop_when="5 measured versions, and failures remain",
        flips_if="the failures remain after systematic prompting",
        fires=case("wrong_tone_style", prompt_iterations=1),
        rests=case("wrong_tone_style", prompt_iterations=6),
    ),
    Rule(
        code="PRM009",
        title="No training for form that a grammar guarantees",
        when=lambda f: (
            _only_form(f) & f.no("constrained_decoding_tried") & ~f.known_true("niche_syntax")
        ),
        checks="All failures of quality are broken formats, and constrained decoding was not "
        "tried.",
        step="constrain_output",
        blocks=(
            "finetune",
            "rag_and_finetune",
            "preference_finetune",
            "reinforcement_finetune",
        ),
        reason="Finetuning makes valid output likely; a grammar makes it certain. What is left "
        "after that is content, and only that may call for training.",
        sources=(STRUCTURED, HUYEN),
        strength="A",
        stop_when="constrained decoding is in and failures remain",
        flips_if="the grammar cannot be expressed, or the form is right and the idiom is wrong",
        fires=case(("wrong_format", 40), constrained_decoding_tried=False),
        rests=case(("wrong_format", 40), constrained_decoding_tried=True),
    ),
)
