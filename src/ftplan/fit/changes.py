"""Changes to a plan: fragments of a plan file, laid over a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ftplan.spec import Checkpointing, Loss, Method, OptimizerChoice, Plan

__all__ = ["Change", "apply_change", "merge", "trainer_of"]

Change = Mapping[str, Any]
"""A fragment of a plan file: ``{"batch": {"micro": 1}, "loss": "fused"}``."""

_SECTIONS: dict[str, Any] = {
    "method": Method,
    "optimizer": OptimizerChoice,
    "gradient_checkpointing": Checkpointing,
    "loss": Loss,
}
_WORDS = {"optimizer": "name", "loss": "kind", "gradient_checkpointing": "kind"}


def apply_change(plan: Plan, change: Change) -> Plan:
    """The plan with ``change`` laid over it, as if its keys were written in the file.

    A word in place of a section (``loss: fused``) replaces the whole section, as it does in a
    plan file; a mapping replaces the keys that it names.
    """
    new: dict[str, Any] = {}
    for key, value in change.items():
        old = getattr(plan, key)
        if key in _WORDS and isinstance(value, bool | str):
            word = value if isinstance(value, str) else ("full" if value else "none")
            new[key] = _SECTIONS[key](**{_WORDS[key]: word})
        elif not isinstance(value, Mapping):
            new[key] = value
        elif old is None:
            new[key] = _SECTIONS[key](**_tuples(value))
        else:
            new[key] = dataclasses.replace(old, **_tuples(value))
    return dataclasses.replace(plan, **new)


def _tuples(section: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}


def merge(first: Change, second: Change) -> Change:
    """Both changes as one; the second wins where they meet."""
    merged: dict[str, Any] = dict(first)
    for key, value in second.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = {**old, **value} if both else value  # type: ignore[dict-item]
    return merged


def trainer_of(plan: Plan) -> str:
    """The plan's stack, whatever its version: ``litgpt`` of ``litgpt-0.4``."""
    return (plan.stack or "").partition("-")[0]
