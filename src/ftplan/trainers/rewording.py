"""A change to a plan in the words of the trainer whose file holds it.

Both plans are written as the trainer's file; the keys in which the files differ are what somebody
has to write. Where the trainer has no key for a plan there are no words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ftplan.errors import UnsupportedError
from ftplan.spec import Plan
from ftplan.trainers.exporting import EXPORTS, export_plan

__all__ = ["reworded"]


def reworded(
    before: Plan, after: Plan, trainer: str, written: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Keys of the trainer's file and what they become, or None when there are no words for it.

    A nested mapping comes whole: its other keys are needed too. Of the keys that are ``written``
    in the file those that have to go become None, and of its lists (plugins) what no plan knows
    stays.
    """
    if trainer not in EXPORTS:
        return None
    try:
        old, new = (_written(plan, trainer) for plan in (before, after))
    except UnsupportedError:
        return None
    changed = {
        key: _beside(written.get(key), old.get(key), value)
        for key, value in new.items()
        if old.get(key) != value
    }
    return changed | {key: None for key in old if key in written and key not in new} or None


def _beside(written: Any, old: Any, new: Any) -> Any:
    if not isinstance(written, list) or not isinstance(new, list):
        return new
    kept = [item for item in written if item in new or item not in (old or ())]
    return [*kept, *(item for item in new if item not in kept)]


def _written(plan: Plan, trainer: str) -> dict[str, Any]:
    return yaml.safe_load(export_plan(plan, to=trainer).text) or {}
