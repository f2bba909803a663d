"""The verb ``explain`` of the library: one page for a rule, a finding, a term, a format, a stack
or an optimizer, always as headings and text.

Part of the library's front: it joins the pages that the rooms keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftplan.catalog.stacks import StackRow

__all__ = ["FENCE", "contents", "explain"]

FENCE = "```"
"""Lines between two of these are shown as they are."""


def explain(name: str) -> list[tuple[str, str]]:
    """The page called ``name`` as (heading, text), the title first.

    Raises :class:`ftplan.errors.UnknownNameError` with the names that are near.
    """
    for look in (_rule, _finding, _written, _stack, _optimizer):
        found = look(name)
        if found is not None:
            return found
    from ftplan.catalog.pages import suggestions
    from ftplan.errors import UnknownNameError

    raise UnknownNameError(
        "page",
        name,
        suggestions=suggestions(name),
        remedy="`ftplan explain` lists the terms, `ftplan rules` the rules",
    )


def _rule(name: str) -> list[tuple[str, str]] | None:
    from ftplan.advise import RULES, explain_page

    if name.strip().upper() not in RULES:
        return None
    page = explain_page(name)
    sections = [(s.heading, _fenced(s.text) if s.code else s.text) for s in page.sections]
    return [("Name", page.code), ("Title", page.title), *sections]


def _fenced(text: str) -> str:
    return f"{FENCE}yaml\n{text}\n{FENCE}"


def _finding(name: str) -> list[tuple[str, str]] | None:
    from ftplan.trainers import finding_codes, finding_page

    if name.strip().upper() not in finding_codes():
        return None
    page = finding_page(name.strip().upper())
    return [
        ("Name", page.code),
        ("Title", page.title),
        ("What", page.what),
        ("Why", page.why),
        ("Fix", page.fix),
        ("Source", page.source),
    ]


def _written(name: str) -> list[tuple[str, str]] | None:
    from ftplan.catalog.pages import find_page

    page = find_page(name)
    if page is None:
        return None
    sections = [("Name", page.name), ("Title", page.title)]
    if page.formula not in ("", "none"):
        sections.append(("Formula", page.formula))
    return [*sections, ("Why", page.why), ("Source", page.source)]


def _stack(name: str) -> list[tuple[str, str]] | None:
    from ftplan.catalog.stacks import stack_page
    from ftplan.errors import FtplanError

    try:
        stack, rows = stack_page(name)
    except FtplanError:
        return None
    usual = {row.key: row.value for row in stack_page("transformers")[1]}
    own = [row for row in rows if usual.get(row.key) != row.value or stack.name == "transformers"]
    shared = [row for row in rows if row not in own]
    sections = [
        ("Name", stack.name),
        ("Title", f"{stack.title} ({stack.versions})"),
        ("Why", "What a plan of this stack means where it says nothing else."),
        ("Formula", "\n".join(_read(row) for row in own)),
    ]
    if shared:
        sections.append(("As transformers' Trainer", "\n".join(_read(row) for row in shared)))
    if stack.notes:
        sections.append(("Notes", "\n".join(f"- {note}" for note in stack.notes)))
    return [*sections, ("Source", "beside each value")]


def _read(row: StackRow) -> str:
    """A value in words, and where it was read."""
    value = row.value
    if value is None:
        value = "-"
    elif isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, tuple):
        value = ", ".join(value)
    return f"- {row.key}: {value}  [{row.source}]"


def _optimizer(name: str) -> list[tuple[str, str]] | None:
    from ftplan.catalog.optimizers import find_optimizer
    from ftplan.errors import FtplanError

    try:
        row = find_optimizer(name)
    except FtplanError:
        return None
    states = ", ".join(f"{s.name} ({s.shape}, {s.dtype})" for s in row.states) or "none"
    return [
        ("Name", row.name),
        ("Title", getattr(row, "title", "") or f"The optimizer {row.name}"),
        ("Formula", f"states per trainable tensor: {states}"),
        ("Why", getattr(row, "notes", "") or "States are kept from the first step on."),
        ("Source", row.source),
    ]


def contents() -> list[tuple[str, str]]:
    from ftplan.catalog.pages import all_pages

    kinds: dict[str, list[str]] = {}
    for page in all_pages():
        kinds.setdefault(page.kind, []).append(page.name)
    rows = [(f"{kind}s" if kind != "sharding" else kind, ", ".join(n)) for kind, n in kinds.items()]
    from ftplan.dtypes import format_names
    from ftplan.trainers import finding_codes

    return [
        ("Title", "What can be explained"),
        *((kind.capitalize(), names) for kind, names in rows),
        ("Findings of trainers' configs", ", ".join(finding_codes())),
        ("Formats", ", ".join(format_names())),
        ("And", "every rule of `ftplan rules`, every stack, every optimizer"),
    ]
