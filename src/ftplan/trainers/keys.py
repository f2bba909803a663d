"""A trainer's configuration as typed look-ups that remember what was asked for.

A configuration is one or more layers, the highest first: a command line over the file it names.
:class:`Keys` answers for the merged content, points at the layer in which a key stands, and
knows at the end which keys no reader has asked for, so that nothing is ignored by accident.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.errors import InputError, Location
from ftplan.files.document import Document, Key, describe

__all__ = ["Keys", "Path", "Unresolved", "leaves"]

Path = tuple[Key, ...]

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}
_NOTHING = {"", "none", "null", "~"}
_REFERENCE = re.compile(r"\$\{([A-Za-z0-9_.\-]+)\}")


@dataclass(frozen=True, slots=True)
class Unresolved:
    """A value that only running the script would tell (``$MODEL``)."""

    text: str


class Keys:
    """Typed look-ups over the layers of one configuration.

    Every getter takes a path (``"fsdp_config", "offload_params"``), marks it as read and returns
    None for a key that is absent, empty or cannot be told. A value of the wrong type is an
    :class:`InputError` at the key.
    """

    def __init__(self, *layers: Document) -> None:
        assert layers
        self.layers = layers
        self.data: dict[str, Any] = {}
        for layer in reversed(layers):
            if isinstance(layer.data, dict):
                self.data = _merge(self.data, layer.data)
        self.read: set[Path] = set()
        self.unresolved: list[tuple[Path, str]] = []

    @property
    def file(self) -> str:
        """Name of the highest layer's file."""
        return self.layers[0].file

    def at(self, *path: Key) -> Location:
        """Where the key stands: in the highest layer that has it."""
        layer = next((one for one in self.layers if _reaches(one.data, path)), self.layers[0])
        return layer.locate(path)

    def error(self, message: str, *path: Key, remedy: str = "") -> InputError:
        """A refusal at the key, with its line."""
        layer = next((one for one in self.layers if _reaches(one.data, path)), self.layers[0])
        return layer.error(message, path, remedy=remedy)

    def has(self, *path: Key) -> bool:
        """Whether the key is there at all, whatever its value; does not mark it."""
        return _reaches(self.data, path)

    def raw(self, *path: Key) -> Any:
        """The value as it stands (None when absent), references inside the file followed."""
        self.read.add(path)
        value: Any = self.data
        for step in path:
            if not isinstance(value, dict) or step not in value:
                return None
            value = value[step]
        return self._resolve(value, path, depth=0)

    def _resolve(self, value: Any, path: Path, depth: int) -> Any:
        if isinstance(value, Unresolved):
            self.unresolved.append((path, value.text))
            return None
        if not isinstance(value, str) or "${" not in value:
            return value
        match = _REFERENCE.fullmatch(value.strip())
        if match is not None and depth < 8:
            steps = tuple(match[1].split("."))
            if _reaches(self.data, steps):
                target: Any = self.data
                for step in steps:
                    target = target[step]
                return self._resolve(target, path, depth + 1)
        resolved = _REFERENCE.sub(self._text_of, value)
        if "${" in resolved:
            self.unresolved.append((path, value))
            return None
        return resolved

    def _text_of(self, match: re.Match[str]) -> str:
        target: Any = self.data
        for step in match[1].split("."):
            if not isinstance(target, dict) or step not in target:
                return match[0]
            target = target[step]
        return match[0] if isinstance(target, dict | list | Unresolved) else str(target)

    def text(self, *path: Key) -> str | None:
        """A non-empty text; numbers and booleans become text."""
        value = self.raw(*path)
        if value is None or isinstance(value, dict | list):
            if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
                return value[0]
            if value is None or not value:
                return None
            raise self.error(f"{path[-1]} is one text, this is {describe(value)}", *path)
        if isinstance(value, bool):
            return str(value).lower()
        return None if str(value).strip().lower() in _NOTHING else str(value).strip()

    def word(self, *path: Key) -> str | None:
        """A text in lower case."""
        value = self.text(*path)
        return None if value is None else value.lower()

    def flag(self, *path: Key) -> bool | None:
        """A boolean; ``"yes"`` and ``1`` count, other texts are refused."""
        value = self.raw(*path)
        if value is None or isinstance(value, bool):
            return value
        text = str(value).strip().lower()
        if text in _NOTHING:
            return None
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        raise self.error(f"{path[-1]} is true or false, this is {describe(value)}", *path)

    def number(self, *path: Key) -> float | None:
        """A finite number."""
        value = self.raw(*path)
        if value is None or (
            isinstance(value, str) and value.strip().lower() in _NOTHING | {"auto"}
        ):
            return None
        try:
            if isinstance(value, bool | dict | list):
                raise TypeError
            number = float(value)
            if not abs(number) < 1e18:
                raise ValueError
        except (TypeError, ValueError):
            raise self.error(f"{path[-1]} is a number, this is {describe(value)}", *path) from None
        return number

    def whole(self, *path: Key) -> int | None:
        """A whole number (``auto`` and empty count as absent)."""
        number = self.number(*path)
        if number is None:
            return None
        if number != int(number):
            raise self.error(f"{path[-1]} is a whole number, this is {number:g}", *path)
        return int(number)

    def count(self, *path: Key) -> int | None:
        """A whole number of at least one; zero and below count as absent (trainers say -1)."""
        number = self.whole(*path)
        return number if number is not None and number > 0 else None

    def words(self, *path: Key) -> tuple[str, ...] | None:
        """A list of texts; one text is split at commas and blanks outside brackets."""
        value = self.raw(*path)
        if isinstance(value, list):
            found = []
            for item in value:
                if isinstance(item, dict | list):
                    raise self.error(f"{path[-1]} is a list of names", *path)
                if isinstance(item, Unresolved):
                    self.unresolved.append((path, item.text))
                elif item is not None and str(item).strip():
                    found += [str(item).strip()]
            return tuple(found) or None
        if isinstance(value, dict):
            raise self.error(f"{path[-1]} is a list of names, this is a mapping", *path)
        if value is None or str(value).strip().lower() in _NOTHING:
            return None
        text = str(value).strip()
        if re.search(r"[\\()|*?\[\]^$]", text):
            return (text,)
        return tuple(part for part in re.split(r"[,\s]+", text) if part) or None

    def mapping(self, *path: Key) -> dict[str, Any] | None:
        """A mapping (None for anything else); marks all that is in it."""
        value = self.raw(*path)
        return value if isinstance(value, dict) else None

    def section(self, *path: Key) -> dict[str, Any]:
        """A mapping's content without marking it; empty when there is none."""
        value: Any = self.data
        for step in path:
            value = value.get(step) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else {}

    def known(self, *names: Key) -> None:
        """Mark top-level keys as read whose values change nothing."""
        self.read.update((name,) for name in names)

    def unread(self) -> Iterator[tuple[Path, Any]]:
        """Paths and values of the leaves that nobody asked for."""
        for path, value in leaves(self.data):
            if not any(path[: len(seen)] == seen for seen in self.read if len(seen) <= len(path)):
                yield path, value


def leaves(data: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Paths and values of everything that is no non-empty mapping."""
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from leaves(value, (*path, key))
    elif path:
        yield path, data


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, above in high.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(above, dict):
            merged[key] = _merge(below, above)
        else:
            merged[key] = above
    return merged


def _reaches(data: Any, path: Path) -> bool:
    for step in path:
        if not isinstance(data, dict) or step not in data:
            return False
        data = data[step]
    return True
