"""The page of each finding code, for ``ftplan explain IMP002`` and the documentation alike."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ftplan.errors import UnknownNameError

__all__ = ["Page", "finding_codes", "finding_page"]


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
    path = files("ftplan.trainers").joinpath("data/pages.json")
    raw = json.loads(path.read_text(encoding="utf-8"))
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
