"""Our dataclasses do what the standard library's do."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import field
from typing import Any

import pytest

from ftplan.dataclass import dataclass


@dataclasses.dataclass(frozen=True, slots=True)
class Theirs:
    """The standard library's."""

    rank: int
    alpha: float = 16.0
    targets: list[str] = field(default_factory=list)
    note: str = field(default="", compare=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class Ours:
    """The same, ours."""

    rank: int
    alpha: float = 16.0
    targets: list[str] = field(default_factory=list)
    note: str = field(default="", compare=False, kw_only=True)


@dataclass(slots=True)
class Counter:
    """One that changes."""

    count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """One that looks at what it was given, as a base."""

    low: int

    def __post_init__(self) -> None:
        if self.low < 0:
            raise ValueError("below zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval(Checked):
    """One with a field more than its base, and its own words."""

    high: int = 9

    def __repr__(self) -> str:
        return f"{self.low} to {self.high}"


USES: dict[str, Callable[[Any], Any]] = {
    "positional": lambda kind: kind(8, 32.0, ["q_proj"]),
    "named": lambda kind: kind(targets=["q_proj"], rank=8),
    "mixed": lambda kind: kind(8, note="why"),
    "missing": lambda kind: kind(alpha=1.0),
    "unknown": lambda kind: kind(8, dropout=0.1),
    "twice": lambda kind: kind(8, rank=8),
    "too many": lambda kind: kind(8, 1.0, [], "note"),
    "set": lambda kind: setattr(kind(8), "rank", 9),
    "delete": lambda kind: delattr(kind(8), "rank"),
    "equal": lambda kind: kind(8) == kind(8),
    "differ": lambda kind: kind(8) == kind(9),
    "not compared": lambda kind: kind(8, note="a") == kind(8, note="b"),
    "another kind": lambda kind: kind(8) == (8, 16.0, [], ""),
    "hash": lambda kind: hash(kind(8, 1.0, ())) == hash(kind(8, 1.0, (), note="other")),
    "hash of a list": lambda kind: hash(kind(8)),
    "replace": lambda kind: dataclasses.replace(kind(8), alpha=2.0),
    "replace unknown": lambda kind: dataclasses.replace(kind(8), dropout=0.1),
    "as a mapping": lambda kind: dataclasses.asdict(kind(8, note="why")),
    "made anew": lambda kind: kind(8).targets is kind(8).targets,
    "copy": lambda kind: copy.deepcopy(kind(8, targets=["q_proj"])),
    "pickle": lambda kind: pickle.loads(pickle.dumps(kind(8, note="why"))),
    "no such field": lambda kind: object.__setattr__(kind(8), "dropout", 1),
    "fields": lambda kind: [(f.name, f.default, f.kw_only) for f in dataclasses.fields(kind)],
}


def outcome(use: Callable[[Any], Any], kind: Any) -> str:
    """What comes of it, in words: the value, or the kind of error."""
    try:
        return repr(use(kind)).replace("Theirs", "Ours")
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_as_the_standard_library(use: Callable[[Any], Any]) -> None:
    """Each use ends as it does with a class of the standard library."""
    assert outcome(use, Ours) == outcome(use, Theirs)


def test_what_changes_has_no_hash() -> None:
    """An object that may change can be set, is compared by value and cannot be a key."""
    counter = Counter()
    counter.count += 1
    assert counter == Counter(1) and counter != Counter()
    with pytest.raises(TypeError, match="unhashable"):
        hash(counter)


def test_bases() -> None:
    """Fields and checks of the base hold; a method that the class wrote itself stays."""
    assert str(Interval(low=1)) == "1 to 9"
    assert Interval(low=1) != Checked(low=1)
    with pytest.raises(ValueError, match="below zero"):
        Interval(low=-1)
    with pytest.raises(TypeError):
        Interval(1)  # type: ignore[call-arg]
