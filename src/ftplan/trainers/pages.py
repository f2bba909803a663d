"""The page of each finding code, for ``ftplan explain IMP002`` and the documentation alike."""

from __future__ import annotations

from functools import cache

from ftplan.catalog.shelf import read_data
from ftplan.catalog.stacks import stack_names, stack_page
from ftplan.dataclass import dataclass
from ftplan.errors import UnknownNameError

__all__ = ["Page", "finding_codes", "finding_page", "findings_markdown", "stacks_markdown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a code means, under the same headings for every code."""

    code: str
    """``IMP002``, ``CFG004``: permanent."""
    title: str
    """One line."""
    what: str
    """What was found."""
    why: str
    """Why it matters for memory."""
    fix: str
    """What to write instead."""
    source: str
    """Where the fact stands."""


@cache
def _pages() -> dict[str, Page]:
    raw = read_data("pages.json", "ftplan.trainers")
    return {code: Page(code=code, **page) for code, page in raw.items()}


def finding_codes() -> tuple[str, ...]:
    """All codes of this room, sorted."""
    return tuple(sorted(_pages()))


def finding_page(code: str) -> Page:
    """The page of a code in any case. Raises :class:`UnknownNameError`."""
    page = _pages().get(code.strip().upper())
    if page is None:
        raise UnknownNameError("code", code, remedy="known here are " + ", ".join(_pages()))
    return page


def findings_markdown() -> str:
    """All pages as one document: ``docs/trainers/findings.md`` is this text."""
    parts = ["# Findings of trainers' files", "", "Codes are permanent. `ftplan explain CODE`.", ""]
    for code in finding_codes():
        page = finding_page(code)
        parts += [f"## {code}: {page.title}", "", "### What", "", page.what, ""]
        parts += ["### Why it matters", "", page.why, "", "### What to write instead", "", page.fix]
        parts += ["", "### Source", "", page.source, ""]
    return "\n".join(parts)


def stacks_markdown() -> str:
    """All stack profiles as one document: ``docs/trainers/stacks.md`` is this text."""
    parts = [
        "# Stack profiles",
        "",
        "What each trainer does when a plan says nothing, and where it was read. A profile says",
        "which operations run and in which dtypes; it multiplies nothing. `ftplan explain NAME`.",
        "",
    ]
    for name in stack_names():
        stack, rows = stack_page(name)
        parts += [f"## {name}: {stack.title}", "", f"Read: {stack.versions}", ""]
        parts += ["| key | value | source |", "| --- | --- | --- |"]
        for row in rows:
            source = row.source.replace("|", "\\|")
            parts.append(f"| {row.key} | {_cell(row.value)} | {source} |")
        parts += ["", *(f"- {note}" for note in stack.notes), ""]
    return "\n".join(parts)


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value)
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
