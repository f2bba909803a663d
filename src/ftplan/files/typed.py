"""Mappings to the dataclasses of the core, with errors a user can act on.

:func:`build` reads what YAML said by the annotations, strictly (the text ``"2"`` is no number,
``true`` is no number), where pydantic would coerce. Every refusal points at the key and says what
to write instead. pydantic reads the same classes for the JSON Schemas, and a test holds that both
readers make the same value; loading it takes longer than a whole answer, so no file waits for it.
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
    value: T = _Reader(document, bounds or {}).read(cls, data, ())
    return value


@functools.cache
def adapter(cls: Any) -> Any:
    """pydantic's view of a core dataclass."""
    import pydantic

    return pydantic.TypeAdapter(cls)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Annotation by key in files: a field named like a word of Python (``class_``) drops its _."""
    hints = typing.get_type_hints(cls)
    return {f.name.rstrip("_"): hints[f.name] for f in dataclasses.fields(cls)}


class _Reader:
    def __init__(self, document: Document, bounds: Bounds) -> None:
        self._document = document
        self._bounds = bounds

    def read(self, hint: Any, value: Any, path: tuple[Key, ...]) -> Any:
        """``value`` as what ``hint`` says, without any coercion; refused where it is not."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            return value
        if dataclasses.is_dataclass(hint):
            return self._dataclass(typing.cast(type, hint), value, path)
        if origin in (typing.Union, types.UnionType):
            return self._union(arguments, value, path)
        if origin is Literal:
            return self._literal(arguments, value, path)
        if origin is tuple:
            return self._items(arguments[0], value, path)
        if origin in (dict, Mapping) or hint is dict:
            return self._mapping(arguments, value, path)
        return self._scalar(hint, value, path)

    def _refuse(self, path: tuple[Key, ...], message: str, remedy: str = "") -> Exception:
        return self._document.error(message, path, remedy=remedy)

    def _dataclass(self, cls: type, value: Any, path: tuple[Key, ...]) -> Any:
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
        read = {}
        for field in dataclasses.fields(cls):
            name = field.name.rstrip("_")
            if name in value:
                read[field.name] = self.read(hints[name], value[name], (*path, name))
            elif field.default is field.default_factory is dataclasses.MISSING:
                where = f"{name_of(path)} has no {name!r}" if path else f"no {name!r} given"
                raise self._refuse(path, where, f"add {name}: ...")
        try:
            return cls(**read)
        except FtplanError as error:  # a class refuses a combination of its own fields
            raise self._refuse(path, error.message, error.remedy or "") from error

    def _union(self, arguments: Sequence[Any], value: Any, path: tuple[Key, ...]) -> Any:
        """Read as the one branch that was meant, so that one error is shown and not four."""
        branches = [a for a in arguments if a is not types.NoneType]
        if value is None and len(branches) < len(arguments):
            return None
        wanted: Any = branches[0]
        for branch in branches:
            kind = typing.get_origin(branch) or branch
            is_list = kind is tuple and isinstance(value, list)
            is_map = dataclasses.is_dataclass(branch) and isinstance(value, dict)
            same = kind in (str, bool, int, float) and type(value) is kind
            if is_list or is_map or same:
                wanted = branch
        return self.read(wanted, value, path)

    def _literal(self, choices: Sequence[Any], value: Any, path: tuple[Key, ...]) -> Any:
        if any(value == c and type(value) is type(c) for c in choices):
            return value
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

    def _items(self, hint: Any, value: Any, path: tuple[Key, ...]) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise self._refuse(
                path,
                f"{name_of(path)} is a list, this is {describe(value)}",
                f"write {leaf_of(path)}: [{value if isinstance(value, str | int) else '...'}]",
            )
        return tuple(self.read(hint, item, (*path, index)) for index, item in enumerate(value))

    def _mapping(
        self, arguments: Sequence[Any], value: Any, path: tuple[Key, ...]
    ) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._refuse(path, f"{name_of(path)} is a mapping, this is {describe(value)}")
        hint = arguments[1] if arguments else Any
        return {key: self.read(hint, item, (*path, key)) for key, item in value.items()}

    def _scalar(self, hint: Any, value: Any, path: tuple[Key, ...]) -> Any:
        name, leaf = name_of(path), leaf_of(path)
        if hint in (int, float):
            return self._number(hint, value, path)
        if hint is bool:
            if isinstance(value, bool):
                return value
            raise self._refuse(
                path,
                f"{name} is true or false, this is {describe(value)}",
                f"write {leaf}: true",
            )
        assert hint is str, f"no reader of {hint}"
        if not isinstance(value, str):
            quoted = f'write {name}: "{str(value).lower() if isinstance(value, bool) else value}"'
            is_plain = isinstance(value, bool | int | float)
            raise self._refuse(
                path,
                f"{name} is a text, this is {describe(value)}",
                f"if that is meant, quote it: {quoted}" if is_plain else f"write {leaf}: text",
            )
        if not value.strip():
            raise self._refuse(path, f"{name} is empty", f"give {leaf} a value or leave it out")
        return value

    def _number(self, hint: Any, value: Any, path: tuple[Key, ...]) -> int | float:
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
        number: int | float = hint(value)
        return number


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
