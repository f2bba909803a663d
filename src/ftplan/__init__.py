"""Prompt, retrieve or finetune, and whether the job fits the GPU.

The verbs of the command line, without a terminal::

    import ftplan

    plan = ftplan.load_plan("plan.yaml")        # or any trainer's config
    report = ftplan.estimate(plan)              # memory, term by term; bytes are integers
    report = ftplan.check(["plan.yaml"])        # does each job fit its GPU?
    answer = ftplan.fit(plan)                   # what fits on the plan's GPU
    advice = ftplan.advise(ftplan.load_failures("failures.yaml"))

Importing this package loads none of them: each is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftplan.advise import advise
    from ftplan.catalog.gpus import find_gpu
    from ftplan.catalog.models import find_model
    from ftplan.catalog.optimizers import find_optimizer
    from ftplan.errors import FtplanError
    from ftplan.files.failures import read_failures as load_failures
    from ftplan.front.api import estimate
    from ftplan.front.checking import check
    from ftplan.front.explaining import explain
    from ftplan.front.jobs import diff, load_plan
    from ftplan.front.sizing import fit
    from ftplan.spec import Plan
    from ftplan.trainers import export_plan, import_file

__version__ = "0.1.0"

__all__ = [
    "FtplanError",
    "Plan",
    "advise",
    "check",
    "compare_stacks",
    "diff",
    "estimate",
    "explain",
    "export_plan",
    "find_gpu",
    "find_model",
    "find_optimizer",
    "fit",
    "import_file",
    "load_failures",
    "load_plan",
]

_PLACES = {
    "FtplanError": ("ftplan.errors", "FtplanError"),
    "Plan": ("ftplan.spec", "Plan"),
    "advise": ("ftplan.advise", "advise"),
    "check": ("ftplan.front.checking", "check"),
    "compare_stacks": ("ftplan.front.comparing", "compare_stacks"),
    "diff": ("ftplan.front.jobs", "diff"),
    "estimate": ("ftplan.front.api", "estimate"),
    "explain": ("ftplan.front.explaining", "explain"),
    "export_plan": ("ftplan.trainers", "export_plan"),
    "find_gpu": ("ftplan.catalog.gpus", "find_gpu"),
    "find_model": ("ftplan.catalog.models", "find_model"),
    "find_optimizer": ("ftplan.catalog.optimizers", "find_optimizer"),
    "fit": ("ftplan.front.sizing", "fit"),
    "import_file": ("ftplan.trainers", "import_file"),
    "load_failures": ("ftplan.files.failures", "read_failures"),
    "load_plan": ("ftplan.front.jobs", "load_plan"),
}


def _load(name: str) -> Any:
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)


class _Facade(types.ModuleType):
    """This package, whose verbs `advise` and `fit` have the names of the rooms they live in.

    Python would bind each room to its name here when it is imported; a property keeps the verb.
    """

    @property
    def advise(self) -> Any:
        return _load("advise")

    @advise.setter
    def advise(self, room: types.ModuleType) -> None:
        """The room is in ``sys.modules``; the name stays the verb's."""

    @property
    def fit(self) -> Any:
        return _load("fit")

    @fit.setter
    def fit(self, room: types.ModuleType) -> None:
        """As above."""


sys.modules[__name__].__class__ = _Facade


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return _load(name)
    raise AttributeError(f"module 'ftplan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
