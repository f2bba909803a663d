"""Mappings to the dataclasses of the core, with errors a user can act on.

:func:`build` first checks what YAML said against the annotations, strictly (the text ``"2"`` is
no number, ``true`` is no number), and only then lets pydantic construct the value, which would
have coerced them. Every refusal points at the key and says what to write instead.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from ftplan.errors import FtplanError
from ftplan.files.document import Document, Key, describe

__all__ = ["Bounds", "adapter", "build", "name_of", "nearest"]

T = TypeVar("T")

Bounds = Mapping[str, tuple[float, float]]
"""Smallest and largest value by key; keys not named hold a count from 1 to 2^53."""

LARGEST = 2**53
"""No count of anything in a job is larger, and floats are exact up to here."""


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """The known names that ``name`` was most likely meant to be, best first."""
    known = list(known)
    folded = {k.lower().replace("-", "_"): k for k in known}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), folded, n=limit, cutoff=0.6)
    return [folded[c] for c in close]


def build(cls: type[T], data: Any, document: Document, *, bounds: Bounds | None = None) -> T:
    """``data`` as ``cls`` (a dataclass of the core), or :class:`InputError` at the key at fault."""
    _Checker(document, bounds or {}).check(cls, data, ())
    try:
        value: T = adapter(typing.cast(Any, cls)).validate_python(data)
    except Exception as error:
        raise _translate(error, document) from error
    return value


@functools.cache
def adapter(cls: Any) -> Any:
    """pydantic's reader of a core dataclass (imported here: it is slow to load)."""
    import pydantic

    return pydantic.TypeAdapter(cls)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Annotation by key in files: a field named like a word of Python (``class_``) drops its _."""
    hints = typing.get_type_hints(cls)
    return {f.name.rstrip("_"): hints[f.name] for f in dataclasses.fields(cls)}


class _Checker:
    def __init__(self, document: Document, bounds: Bounds) -> None:
        self._document = document
        self._bounds = bounds

    def check(self, hint: Any, value: Any, path: tuple[Key, ...]) -> None:
        """Refuse ``value`` when it is not what ``hint`` says, without any coercion."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            return
        if dataclasses.is_dataclass(hint):
            self._dataclass(typing.cast(type, hint), value, path)
        elif origin in (typing.Union, types.UnionType):
            self._union(arguments, value, path)
        elif origin is Literal:
            self._literal(arguments, value, path)
        elif origin is tuple:
            self._items(arguments[0], value, path)
        elif origin in (dict, Mapping) or hint is dict:
            self._mapping(arguments, value, path)
        else:
            self._scalar(hint, value, path)

    def _refuse(self, path: tuple[Key, ...], message: str, remedy: str = "") -> Exception:
        return self._document.error(message, path, remedy=remedy)

    def _dataclass(self, cls: type, value: Any, path: tuple[Key, ...]) -> None:
        hints = _hints(cls)
        if not isinstance(value, dict):
            raise self._refuse(
                path,
                f"{name_of(path)} is a mapping, this is {describe(value)}",
                f"write {leaf_of(path)}: {{key: value, ...}} with keys of {', '.join(hints)}",
            )
        for key in value:
            if key not in hints:
                near = nearest(str(key), hints)
                raise self._refuse(
                    (*path, key),
                    f"unknown key {str(key)!r}" + (f" in {name_of(path)}" if path else ""),
                    f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(hints)}",
                )
        for field in dataclasses.fields(cls):
            name = field.name.rstrip("_")
            missing = (
                field.default is dataclasses.MISSING
                and field.default_factory is dataclasses.MISSING
            )
            if name in value:
                self.check(hints[name], value[name], (*path, name))
            elif missing:
                where = f"{name_of(path)} has no {name!r}" if path else f"no {name!r} given"
                raise self._refuse(path, where, f"add {name}: ...")

    def _union(self, arguments: Sequence[Any], value: Any, path: tuple[Key, ...]) -> None:
        """Check against the one branch that was meant, so that one error is shown and not four."""
        branches = [a for a in arguments if a is not types.NoneType]
        if value is None:
            if len(branches) < len(arguments):
                return
        elif len(branches) > 1:
            wanted: Any = branches[0]
            for branch in branches:
                kind = typing.get_origin(branch) or branch
                is_list = kind is tuple and isinstance(value, list)
                is_map = dataclasses.is_dataclass(branch) and isinstance(value, dict)
                same = kind in (str, bool, int, float) and type(value) is kind
                if is_list or is_map or same:
                    wanted = branch
            branches = [wanted]
        self.check(branches[0], value, path)

    def _literal(self, choices: Sequence[Any], value: Any, path: tuple[Key, ...]) -> None:
        if any(value == c and type(value) is type(c) for c in choices):
            return
        near = (
            nearest(value, [c for c in choices if isinstance(c, str)])
            if isinstance(value, str)
            else []
        )
        raise self._refuse(
            path,
            f"{name_of(path)} cannot be {describe(value)}",
            (f"did you mean {near[0]}? " if near else "")
            + ("write one of " if len(choices) > 1 else "write ")
            + ", ".join(map(str, choices)),
        )

    def _items(self, hint: Any, value: Any, path: tuple[Key, ...]) -> None:
        if not isinstance(value, list):
            raise self._refuse(
                path,
                f"{name_of(path)} is a list, this is {describe(value)}",
                f"write {leaf_of(path)}: [{value if isinstance(value, str | int) else '...'}]",
            )
        for index, item in enumerate(value):
            self.check(hint, item, (*path, index))

    def _mapping(self, arguments: Sequence[Any], value: Any, path: tuple[Key, ...]) -> None:
        if not isinstance(value, dict):
            raise self._refuse(path, f"{name_of(path)} is a mapping, this is {describe(value)}")
        for key, item in value.items():
            if arguments:
                self.check(arguments[1], item, (*path, key))

    def _scalar(self, hint: Any, value: Any, path: tuple[Key, ...]) -> None:
        name, leaf = name_of(path), leaf_of(path)
        if hint is str:
            if not isinstance(value, str):
                quoted = (
                    f'write {name}: "{str(value).lower() if isinstance(value, bool) else value}"'
                )
                is_plain = isinstance(value, bool | int | float)
                raise self._refuse(
                    path,
                    f"{name} is a text, this is {describe(value)}",
                    f"if that is meant, quote it: {quoted}" if is_plain else f"write {leaf}: text",
                )
            if not value.strip():
                raise self._refuse(path, f"{name} is empty", f"give {leaf} a value or leave it out")
        elif hint is bool:
            if not isinstance(value, bool):
                raise self._refuse(
                    path,
                    f"{name} is true or false, this is {describe(value)}",
                    f"write {leaf}: true",
                )
        elif hint in (int, float):
            self._number(hint, value, path)
        else:
            raise AssertionError(f"no check for {hint}")

    def _number(self, hint: Any, value: Any, path: tuple[Key, ...]) -> None:
        name, leaf = name_of(path), leaf_of(path)
        if isinstance(value, bool) or not isinstance(value, int | float):
            remedy = f"write {leaf}: {value}" if _is_number(value) else f"write a number: {leaf}: 1"
            raise self._refuse(path, f"{name} is a number, this is {describe(value)}", remedy)
        low, high = self._bounds.get(leaf, (1, LARGEST) if hint is int else (-math.inf, math.inf))
        if not (low <= value <= high):  # nan too
            raise self._refuse(
                path,
                f"{name} cannot be {_shown(value)}",
                f"write a number from {_shown(low)} to {_shown(high)}",
            )
        if hint is int and value != int(value):
            raise self._refuse(
                path,
                f"{name} is a whole number, this is {value:g}",
                f"write {leaf}: {round(value)}",
            )


def _shown(value: float) -> str:
    if isinstance(value, int) and abs(value) > LARGEST:
        return "so large"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def name_of(path: tuple[Key, ...]) -> str:
    """A path as a user says it: ``batch.micro``, ``failures[3].kind``."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f"{'.' if text else ''}{step}"
    return text or "the file"


def leaf_of(path: tuple[Key, ...]) -> str:
    """The key that ends a path (a list item: the list's)."""
    return next((step for step in reversed(path) if isinstance(step, str)), "the file")


def _translate(error: Exception, document: Document) -> Exception:
    """What pydantic still refuses after the strict check, at its place in the file."""
    errors = getattr(error, "errors", None)
    if not callable(errors):
        return error
    first = errors(include_url=False)[0]
    ours = first.get("ctx", {}).get("error")
    if isinstance(ours, FtplanError):  # a class refuses a combination of its own fields
        return document.error(ours.message, first["loc"], remedy=ours.remedy)
    return document.error(f"{name_of(first['loc'])}: {first['msg'].lower()}", first["loc"])
