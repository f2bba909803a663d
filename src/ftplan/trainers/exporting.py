"""From a plan to a trainer's file."""

from __future__ import annotations

import difflib

from ftplan.errors import UnknownNameError
from ftplan.spec import Plan
from ftplan.trainers import accelerate, axolotl, deepspeed, llamafactory, swift, torchtune, trl
from ftplan.trainers.writing import Exported

__all__ = ["EXPORTS", "export_plan"]

EXPORTS = ("axolotl", "llamafactory", "trl", "torchtune", "accelerate", "deepspeed", "ms-swift")
"""Names that ``--to`` takes."""


def export_plan(plan: Plan, *, to: str) -> Exported:
    """The plan as a file that the trainer ``to`` accepts.

    Reading the file again gives the same plan, but for what a note names. What the trainer has no
    key for is refused (:class:`ftplan.errors.UnsupportedError`); an unknown ``to`` is an
    :class:`ftplan.errors.UnknownNameError`.
    """
    if to == "axolotl":
        return axolotl.export(plan)
    if to == "llamafactory":
        return llamafactory.export(plan)
    if to == "trl":
        return trl.export(plan)
    if to == "torchtune":
        return torchtune.export(plan)
    if to == "ms-swift":
        return swift.export(plan)
    if to == "accelerate":
        return Exported(text=accelerate.export(plan), trainer=to, notes=())
    if to == "deepspeed":
        return Exported(text=deepspeed.export(plan), trainer=to, notes=())
    raise UnknownNameError(
        "trainer",
        to,
        suggestions=difflib.get_close_matches(to, EXPORTS, n=2),
        remedy="a plan can be exported to " + ", ".join(EXPORTS),
    )
