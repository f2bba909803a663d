"""Trainers' own configurations as plans, and plans as trainers' configurations.

For the commands (``ftplan import``, ``export``, ``check``, and FILE of ``memory`` and ``fit``)::

    detect_file("config.yaml")                   -> "axolotl"   (or InputError with the reason)
    import_file("config.yaml", overlays=("accelerate.yaml",), trainer=None) -> Imported
        .plan          spec.Plan; what the file does not say is None
        .findings      report.Finding (IMP..., CFG...), each at its place in the file
        .assumptions   report.Assumption: each default of the trainer that was filled in
        .places        plan key ("batch.micro") -> errors.Location in the file
        .missing       plan keys that are still open
    export_plan(plan, to="axolotl")              -> Exported(text, notes, file)
    lint_plan(plan, where=...)                   -> CFG findings for a plan of any origin
    finding_page("IMP002")                       -> Page(code, title, what, why, fix, source)
    TRAINERS, EXPORTS                            names for --from and --to

``import_file`` also takes our own plan files (trainer "plan"), job scripts and text files that
hold a command line. A file that is no training job is refused with :class:`InputError`, saying
what it is. Nothing that a file names is executed, imported or downloaded; other files are read
only when the configuration names them (DeepSpeed, FSDP, accelerate, a command's YAML), relative
to it and then to the working directory, through ``ftplan.files``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftplan.trainers.draft import Imported
    from ftplan.trainers.exporting import EXPORTS, export_plan
    from ftplan.trainers.lint import lint_plan
    from ftplan.trainers.pages import Page, finding_codes, finding_page
    from ftplan.trainers.reading import (
        TRAINERS,
        detect,
        detect_file,
        import_document,
        import_file,
        import_text,
    )
    from ftplan.trainers.writing import Exported

__all__ = [
    "EXPORTS",
    "TRAINERS",
    "Exported",
    "Imported",
    "Page",
    "detect",
    "detect_file",
    "export_plan",
    "finding_codes",
    "finding_page",
    "import_document",
    "import_file",
    "import_text",
    "lint_plan",
]

_HOME = {
    "Imported": "draft",
    "EXPORTS": "exporting",
    "export_plan": "exporting",
    "lint_plan": "lint",
    "Page": "pages",
    "finding_codes": "pages",
    "finding_page": "pages",
    "Exported": "writing",
}


def __getattr__(name: str) -> Any:
    """Readers and writers are loaded when one is asked for: most commands need none."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"ftplan.trainers.{_HOME.get(name, 'reading')}"), name)
