"""Prompt, retrieve or finetune: the next step from observed failures.

Pure reasoning. :func:`advise` reads a failures file (a value) and returns an answer (a value);
every rule is a row of :data:`RULES` with its own page (:func:`explain_page`).
"""

from __future__ import annotations

from ftplan.advise.engine import advise
from ftplan.advise.explain import Page, Section, explain_page
from ftplan.advise.method import choose_method
from ftplan.advise.rules import RULES, Rule, rules
from ftplan.advise.taxonomy import KINDS, TESTS, kind_of, suggest_kind

__all__ = [
    "KINDS",
    "RULES",
    "TESTS",
    "Page",
    "Rule",
    "Section",
    "advise",
    "choose_method",
    "explain_page",
    "kind_of",
    "rules",
    "suggest_kind",
]
