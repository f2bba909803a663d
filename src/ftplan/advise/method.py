"""How to train: the objective by the data, the method by data and memory (rules MTH)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ftplan.advice import MethodChoice, Step
from ftplan.advise.rules.methods import ENOUGH_PAIRS, FULL_EXAMPLES
from ftplan.failures import State

__all__ = ["choose_method"]

Objective = Literal["sft", "dpo", "kto", "grpo", "distill", "pt"]
Kind = Literal["lora", "qlora", "full", "partial"]


def choose_method(
    step: Step, state: State, *, fits: Mapping[str, bool] | None = None
) -> MethodChoice | None:
    """How to train for a step that trains; None for any other step.

    ``fits``: which of ``lora``, ``qlora``, ``full`` the door found to fit the GPU; left out, the
    choice is by data alone, and the sizing follows it.
    """
    objective = _objective(step, state)
    if objective is None:
        return None
    task, why_task, rules = objective
    kind, why_kind = _kind(task, state, fits)
    return MethodChoice(
        objective=task, kind=kind, why=f"{why_task} {why_kind}", rules=(*rules, "MTH009")
    )


def _objective(step: Step, state: State) -> tuple[Objective, str, tuple[str, ...]] | None:
    if step in ("finetune", "rag_and_finetune", "long_context_finetune"):
        what = {
            "finetune": "Supervised, on labelled pairs.",
            "rag_and_finetune": "Supervised, on prompts with retrieved passages and distractors.",
            "long_context_finetune": "Supervised, on long sequences with rescaled positions.",
        }[step]
        return "sft", what, ("MTH008",) if step == "long_context_finetune" else ("MTH001",)
    if step == "distill":
        return "distill", "Supervised on a teacher's filtered outputs.", ("MTH006",)
    if step == "preference_finetune":
        if (state.preference_pairs or 0) >= ENOUGH_PAIRS:
            return "dpo", "DPO, on pairs of a better and a worse answer.", ("MTH002",)
        return "kto", "KTO, on single answers with a thumb up or down.", ("MTH003",)
    if step == "reinforcement_finetune":
        return "grpo", "Reinforcement against the grader.", ("MTH004",)
    if step == "continued_pretrain":
        return "pt", "Next-token prediction on running text, then supervised.", ("MTH007",)
    return None


def _kind(task: Objective, state: State, fits: Mapping[str, bool] | None) -> tuple[Kind, str]:
    if fits is not None:
        return _by_memory(task, state, fits)
    if task == "pt":
        return "full", "Adapters lag behind at the size of pretraining data; full weights."
    if (state.labelled_examples or 0) >= FULL_EXAMPLES:
        return "lora", (
            f"LoRA first: {state.labelled_examples:,} examples would carry full finetuning, but "
            "only a plateau of LoRA at a higher rank justifies its memory."
        )
    return "lora", "LoRA: equal to full finetuning on data of this size, and it forgets less."


def _by_memory(task: Objective, state: State, fits: Mapping[str, bool]) -> tuple[Kind, str]:
    if task == "pt" and fits.get("full"):
        return "full", "Adapters lag behind at the size of pretraining data, and full fits."
    if fits.get("lora"):
        return "lora", "LoRA fits, equals full finetuning on data of this size, forgets less."
    if fits.get("qlora"):
        return "qlora", "LoRA does not fit; over 4-bit base weights it does."
    return "qlora", "Nothing fits as it stands; QLoRA needs the least: see the remedies."
