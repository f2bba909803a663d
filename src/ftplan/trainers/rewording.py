"""A change to a plan in the words of the trainer whose file holds it.

Both plans are written as the trainer's file; the keys in which the files differ are what somebody
has to write. Where the trainer has no key for a plan there are no words.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import yaml

from ftplan.errors import UnsupportedError
from ftplan.spec import Plan
from ftplan.trainers.exporting import EXPORTS, export_plan

__all__ = ["reworded"]


def reworded(
    before: Plan, after: Plan, trainer: str, written: Collection[str] = ()
) -> Mapping[str, Any] | None:
    """Keys of the trainer's file and what they become, or None when there are no words for it.

    A nested mapping comes whole: its other keys are needed too. Of the keys that are ``written``
    in the file those that have to go become None.
    """
    if trainer not in EXPORTS:
        return None
    try:
        old, new = (_written(plan, trainer) for plan in (before, after))
    except UnsupportedError:
        return None
    changed = {key: value for key, value in new.items() if old.get(key) != value}
    return changed | {key: None for key in old if key in written and key not in new} or None


def _written(plan: Plan, trainer: str) -> dict[str, Any]:
    return yaml.safe_load(export_plan(plan, to=trainer).text) or {}
