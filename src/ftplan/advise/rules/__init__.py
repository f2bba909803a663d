"""All rules, by permanent code. A code is never given to another rule."""

from __future__ import annotations

from ftplan.advise.rules import (
    evaluation,
    finetuning,
    methods,
    operations,
    prompting,
    retrieval,
)
from ftplan.advise.rules.base import MARKS, STRENGTHS, Mark, Rule, Source, describe_case

__all__ = ["MARKS", "RULES", "STRENGTHS", "Mark", "Rule", "Source", "describe_case", "rules"]

RULES: dict[str, Rule] = {
    rule.code: rule
    for room in (evaluation, prompting, retrieval, finetuning, methods, operations)
    for rule in room.RULES
}
"""By code, in the order in which the engine reads them: gates, prompt, retrieval, weights."""


def rules(query: str | None = None) -> tuple[Rule, ...]:
    """All rules, or those whose code, title or text holds every word of ``query``."""
    words = (query or "").lower().split()
    return tuple(
        rule
        for rule in RULES.values()
        if all(
            word in f"{rule.code} {rule.title} {rule.checks} {rule.reason} {rule.step}".lower()
            for word in words
        )
    )
