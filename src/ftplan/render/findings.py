"""What every format for CI shares: each finding with its file, in the order of importance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import PurePath
from urllib.parse import quote

from ftplan.dataclass import dataclass
from ftplan.report import CheckReport, Finding, Report

__all__ = ["Placed", "RuleText", "fingerprints", "placed", "relative", "uri"]

_RANK = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleText:
    """What a code means, for formats that list their rules."""

    title: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A finding at a place: every CI system wants a file and a line."""

    file: str
    line: int
    column: int
    finding: Finding


def placed(file: str, report: Report) -> list[Placed]:
    """The findings of one file, the worst first; one without a place stands at its file's top."""
    found = []
    for finding in sorted(report.findings, key=lambda f: _RANK[f.severity]):
        where = finding.location
        found.append(
            Placed(
                file=(where.file if where and where.file else file),
                line=(where.line if where and where.line else 1),
                column=(where.column if where and where.column else 1),
                finding=finding,
            )
        )
    return found


def fingerprints(check: CheckReport) -> Iterator[tuple[Placed, str]]:
    """Every finding with an identity that survives moving to another line."""
    seen: set[str] = set()
    for file, report in check.results:
        for item in placed(file, report):
            text = f"{item.file}\0{item.finding.code}\0{item.finding.message}"
            identity = hashlib.sha256(text.encode()).hexdigest()
            while identity in seen:  # the same thing twice in one file
                identity = hashlib.sha256(identity.encode()).hexdigest()
            seen.add(identity)
            yield item, identity


def relative(file: str, base: str) -> str:
    """``file`` relative to the project's folder ``base``, with forward slashes."""
    path = PurePath(file)
    if base and path.is_absolute() and path.is_relative_to(base):
        path = path.relative_to(base)
    return path.as_posix()


def uri(file: str, base: str) -> str:
    """``file`` as a relative reference of RFC 3986."""
    return quote(relative(file, base), safe="/")
