"""The errors a user can meet, as a tree.

    FtplanError (ValueError)
    |-- UnitError          a quantity without a unit, or one that cannot be read
    |-- UnknownNameError   a model, GPU, optimizer, rule ... that is not in a catalogue
    |-- AmbiguousNameError a short name that several catalogue rows answer to
    |-- InputError         a file that cannot be read or does not say what it must
    |-- UnsupportedError   a job that is understood but not modelled: a refusal with a name
    `-- MissingExtraError  an optional package is needed for this command

Each error carries its operands, so that every window can print it in its own way, and a remedy:
what the user writes instead. A mistake of ours is an ``AssertionError``, never one of these.
"""

from __future__ import annotations

from collections.abc import Sequence

from ftplan.dataclass import dataclass

__all__ = [
    "AmbiguousNameError",
    "FtplanError",
    "InputError",
    "Location",
    "MissingExtraError",
    "UnitError",
    "UnknownNameError",
    "UnsupportedError",
    "describe_fault",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where in a user's file something stands. Lines and columns count from 1."""

    file: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        parts = [self.file, *(str(n) for n in (self.line, self.column) if n is not None)]
        return ":".join(parts)


class FtplanError(ValueError):
    """A mistake in what the user gave: what is wrong, where, and what to do instead."""

    def __init__(
        self,
        message: str,
        *,
        remedy: str = "",
        location: Location | None = None,
        source_line: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.location = location
        self.source_line = source_line

    def __str__(self) -> str:
        where = f"{self.location}: " if self.location else ""
        line = f"\n    {self.source_line.strip()}" if self.source_line.strip() else ""
        remedy = f"\n  help: {self.remedy}" if self.remedy else ""
        return f"{where}{self.message}{line}{remedy}"


class UnitError(FtplanError):
    """A quantity that cannot be read, or a bare number where a unit is needed."""


class UnknownNameError(FtplanError):
    """A name that is not in its catalogue; ``suggestions`` holds the nearest names that are."""

    def __init__(
        self,
        kind: str,
        name: str,
        *,
        suggestions: Sequence[str] = (),
        remedy: str = "",
        location: Location | None = None,
    ) -> None:
        nearest = f"did you mean {' or '.join(suggestions)}?" if suggestions else ""
        super().__init__(
            f"unknown {kind} {name!r}",
            remedy=" ".join(part for part in (nearest, remedy) if part),
            location=location,
        )
        self.kind = kind
        self.name = name
        self.suggestions = tuple(suggestions)


class AmbiguousNameError(FtplanError):
    """A short name that several catalogue rows answer to; ``candidates`` holds their names."""

    def __init__(
        self,
        kind: str,
        name: str,
        *,
        candidates: Sequence[str],
        location: Location | None = None,
    ) -> None:
        super().__init__(
            f"{kind} {name!r} is ambiguous",
            remedy=f"write one of {', '.join(candidates)}",
            location=location,
        )
        self.kind = kind
        self.name = name
        self.candidates = tuple(candidates)


class InputError(FtplanError):
    """A file that is missing, unreadable, or does not say what it must."""


class UnsupportedError(FtplanError):
    """A job that is understood but not modelled. ``what`` names the unmodelled thing, ``because``
    says why: that the library itself refuses it, mostly."""

    def __init__(
        self, what: str, *, because: str = "", remedy: str = "", location: Location | None = None
    ) -> None:
        message = f"{what} is not modelled" + (f": {because}" if because else "")
        super().__init__(message, remedy=remedy, location=location)
        self.what = what


class MissingExtraError(FtplanError):
    """An optional package is needed: ``extra`` names what to install."""

    def __init__(self, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the optional extra '{extra}'",
            remedy=f"pip install 'ftplan[{extra}]'",
        )
        self.extra = extra


def describe_fault(error: BaseException) -> str:
    """A fault of ours in one line: what it was and where in the code."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    where = ""
    if frames:
        file = frames[-1].filename.replace("\\", "/").rsplit("/", 1)[-1]
        where = f" in {file}:{frames[-1].lineno}"
    detail = str(error).splitlines()[:1]
    return f"internal error: {type(error).__name__}{where}" + (f": {detail[0]}" if detail else "")
