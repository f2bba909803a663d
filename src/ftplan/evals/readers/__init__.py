"""One file per evaluation tool. A new tool is one new module here with a ``READER``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from ftplan.dataclass import dataclass
from ftplan.evals.document import Document
from ftplan.evals.options import ReadOptions
from ftplan.results import EvalRun

__all__ = ["Reader", "all_readers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """How one tool's files are recognised and read."""

    tool: str
    """The name that users see and pass to `--tool`."""
    title: str
    files: str
    """Which files of the tool are read, for the documentation."""
    how: str
    """How a user gets such a file, for the documentation."""
    recognises: Callable[[Document], bool]
    read: Callable[[Document, ReadOptions], EvalRun]
    order: int = 0
    """Asked in this order; a reader that recognises by weaker signs is asked later."""


def all_readers() -> tuple[Reader, ...]:
    """The readers of this package, the most certain first."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    readers = [importlib.import_module(f"{__name__}.{name}").READER for name in modules]
    return tuple(sorted(readers, key=lambda reader: (reader.order, reader.tool)))
