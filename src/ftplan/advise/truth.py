"""Three-valued truth: what holds, what does not, and what would have to be known to say.

Kleene's strong logic. Knowing more can only turn *unknown* into true or false, never one of those
into the other; this is what keeps the engine from being surer of less.
"""

from __future__ import annotations

from collections.abc import Iterable

from ftplan.dataclass import dataclass

__all__ = ["FALSE", "TRUE", "Truth", "all_of", "any_of", "unknown"]


@dataclass(frozen=True, slots=True)
class Truth:
    """``value`` is None when it cannot be said; then ``needs`` names the missing inputs."""

    value: bool | None
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        assert self.value is not None or self.needs, "what is unknown has a name"

    def __and__(self, other: Truth) -> Truth:
        if self.value is False or other.value is False:
            return FALSE
        if self.value and other.value:
            return TRUE
        return Truth(None, self.needs | other.needs)

    def __or__(self, other: Truth) -> Truth:
        return ~(~self & ~other)

    def __invert__(self) -> Truth:
        return self if self.value is None else Truth(not self.value)

    def __bool__(self) -> bool:
        """Known to hold. ``not x`` is therefore *not known to hold*; ``~x`` negates."""
        return self.value is True


TRUE = Truth(True)
FALSE = Truth(False)


def unknown(*needs: str) -> Truth:
    """Cannot be said without these inputs."""
    return Truth(None, frozenset(needs))


def any_of(truths: Iterable[Truth]) -> Truth:
    """At least one holds (none of none does)."""
    needs: set[str] = set()
    for truth in truths:
        if truth.value is True:
            return TRUE
        needs |= truth.needs
    return Truth(None, frozenset(needs)) if needs else FALSE


def all_of(truths: Iterable[Truth]) -> Truth:
    """All hold (of none, trivially)."""
    return ~any_of(~truth for truth in truths)
