"""Quantities as people write them: bytes, counts, percentages, and how they are printed.

GB is 10^9 bytes and GiB is 2^30 bytes; both are defined here and nowhere else. Bytes and
parameter counts are integers.
"""

from __future__ import annotations

import re
from fractions import Fraction

from ftplan.errors import UnitError

__all__ = [
    "GB",
    "GIB",
    "KIB",
    "MIB",
    "format_bytes",
    "format_count",
    "parse_bytes",
    "parse_count",
    "parse_percent",
]

KIB = 2**10
MIB = 2**20
GIB = 2**30
GB = 10**9

_BYTE_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": GB,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 2**40,
}
_COUNT_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
# Separators stand between digits: _ anywhere, commas in groups of three (1,5 is refused, since
# half the world reads it as one and a half).
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+(?:_[0-9]+)*)(?:\.[0-9]*)?|\.[0-9]+"
_QUANTITY = re.compile(rf"\s*((?:{_NUMBER})(?:[eE][+-]?[0-9]{{1,2}})?)\s*([A-Za-z%]*)\s*")
_LARGEST = 10**18
"""More bytes or parameters than any machine or model has: a slip of the keyboard."""


def _split(text: str, what: str, example: str) -> tuple[Fraction, str]:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise UnitError(f"{text!r} is not {what}", remedy=f"write it like {example}")
    return Fraction(match[1].replace("_", "").replace(",", "")), match[2].lower()


def parse_bytes(text: str) -> int:
    """Bytes from ``80GB``, ``79.6 GiB``, ``512MiB``. A bare number is refused (UnitError)."""
    number, unit = _split(str(text), "an amount of memory", "80GB (10^9) or 79.6GiB (2^30)")
    if unit not in _BYTE_UNITS:
        problem = "has no unit" if not unit else f"has the unknown unit {unit!r}"
        raise UnitError(f"{text!r} {problem}", remedy="write GB (10^9 bytes) or GiB (2^30 bytes)")
    count = round(number * _BYTE_UNITS[unit])
    if count > _LARGEST:
        raise UnitError(f"{text!r} is more memory than there is", remedy="check the unit")
    return count


def parse_count(text: str | int | float) -> int:
    """A positive count from ``13e9``, ``13B``, ``13_000_000_000`` (B is 10^9 here)."""
    number, suffix = _split(str(text), "a count", "13e9, 13B or 13_000_000_000")
    if suffix not in _COUNT_SUFFIXES:
        raise UnitError(f"{text!r} has the unknown suffix {suffix!r}", remedy="write K, M, B or T")
    count = number * _COUNT_SUFFIXES[suffix]
    if count.denominator != 1 or count <= 0:
        raise UnitError(f"{text!r} is not a whole positive count", remedy="write it like 13e9")
    if count > _LARGEST:
        raise UnitError(f"{text!r} is more than any model has", remedy="write it like 13e9 or 13B")
    return int(count)


def parse_percent(text: str) -> float:
    """A share from 0 to 1 from ``5%``. A bare number is refused: 5 and 0.05 are both plausible."""
    number, unit = _split(str(text), "a percentage", "5%")
    if unit != "%":
        raise UnitError(f"{text!r} has no percent sign", remedy="write it like 5%")
    if number > 100:
        raise UnitError(f"{text!r} is more than 100%", remedy="write a share from 0% to 100%")
    return float(number / 100)


def format_bytes(count: int, unit: str = "GB") -> str:
    """Bytes with one decimal and their unit: ``26.0 GB``; small amounts step down to MB or kB."""
    binary = unit == "GiB"
    sign = "-" if count < 0 else ""
    for name, size in (
        (("GiB", GIB), ("MiB", MIB), ("KiB", KIB))
        if binary
        else (
            ("GB", GB),
            ("MB", 10**6),
            ("kB", 10**3),
        )
    ):
        if abs(count) >= size / 10:
            return f"{sign}{abs(count) / size:.1f} {name}"
    return f"{count} B"


def format_count(count: int) -> str:
    """A count for the screen: ``8.03 B``, ``41.9 M``, ``512``."""
    for suffix, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if abs(count) >= size:
            return (
                f"{count / size:.3g} {suffix}"
                if count / size < 100
                else f"{count / size:.0f} {suffix}"
            )
    return str(count)
