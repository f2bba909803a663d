"""Quantities: what people write is read exactly, what is printed can be read again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.errors import UnitError
from ftplan.units import (
    GB,
    GIB,
    MIB,
    format_bytes,
    format_count,
    parse_bytes,
    parse_count,
    parse_percent,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80GB", 80 * GB),
        ("79.6 GiB", round(79.6 * GIB)),
        ("512MiB", 512 * MIB),
        ("1 tib", 2**40),
        ("1.5e3 MB", 1_500_000_000),
        ("1_024 B", 1024),
        ("1,024 MiB", GIB),
        (".5GB", GB // 2),
        ("0GB", 0),
    ],
)
def test_memory_is_read_with_its_unit(text: str, count: int) -> None:
    """GB is 10^9 and GiB is 2^30, in any letter case, with or without a space."""
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["80", "80 ", "1e9", "24576", "0"])
def test_a_bare_number_is_no_amount_of_memory(text: str) -> None:
    """Without a unit 80 could be GB or GiB, so it is refused and both are offered."""
    with pytest.raises(UnitError, match="has no unit") as caught:
        parse_bytes(text)
    assert "GB" in caught.value.remedy and "GiB" in caught.value.remedy


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-5GB", "1,5GB", "1..5GB", "5 GBs", "5 Gbit", "5%", "inf GB", "nan", "1__0GB",
     "_1GB", "1,00GB", "1e999GB", "9e99 TB", "80 GB GB", "5 G"],
)  # fmt: skip
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    """Signs, stray separators, unknown units and impossible sizes are refused with a remedy."""
    with pytest.raises(UnitError) as caught:
        parse_bytes(text)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "text", ["13e9", "13B", "13_000_000_000", "13,000,000,000", "13 b", "0.013T", "13000M", 13e9]
)
def test_a_count_is_read_in_every_usual_spelling(text: str | float) -> None:
    """13e9, 13B and 13_000_000_000 are the same parameters."""
    assert parse_count(text) == 13 * 10**9


@pytest.mark.parametrize(
    "text", ["0", "-1", "1.5", "13GB", "x", "", "1,3B0", "1.2345e2", "nan", "inf", "1e99", True]
)
def test_what_is_no_count_is_refused(text: str | bool) -> None:
    """A count is whole, positive and possible."""
    with pytest.raises(UnitError) as caught:
        parse_count(text)
    assert caught.value.remedy


@given(st.integers(min_value=1, max_value=10**18))
@settings(deadline=None)
def test_any_whole_count_is_read_back(count: int) -> None:
    """Digits alone, grouped by `_` or by `,` give the number that was written."""
    assert parse_count(count) == count
    assert parse_count(f"{count:_}") == count
    assert parse_count(f"{count:,}") == count


@given(st.integers(min_value=0, max_value=10**17), st.sampled_from(["GB", "GiB"]))
@settings(deadline=None)
def test_what_is_printed_can_be_read(count: int, unit: str) -> None:
    """A printed size parses back to within half of its last printed digit."""
    printed = format_bytes(count, unit)
    step = parse_bytes("0.1" + printed.split()[1])
    assert abs(parse_bytes(printed) - count) <= max(1, step / 2 * 1.0001)


@given(st.integers(min_value=1, max_value=10**15))
@settings(deadline=None)
def test_a_printed_count_is_close(count: int) -> None:
    """A count for the screen keeps at least two significant digits."""
    number, _, suffix = format_count(count).partition(" ")
    shown = float(number) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[suffix]
    assert abs(shown - count) <= 0.01 * count


def test_sizes_are_printed_with_their_unit() -> None:
    """26 GB of weights and 31.2 GB in all read as in the textbook; GiB only when asked for."""
    assert format_bytes(26 * GB) == "26.0 GB"
    assert format_bytes(31_200_000_000) == "31.2 GB"
    assert format_bytes(80 * GIB, "GiB") == "80.0 GiB"
    assert format_bytes(-2 * GB) == "-2.0 GB"
    assert format_bytes(12) == "12 B"


@pytest.mark.parametrize(
    ("text", "share"), [("5%", 0.05), ("0 %", 0.0), ("100%", 1.0), ("2.5%", 0.025)]
)
def test_a_percentage_needs_its_sign(text: str, share: float) -> None:
    """5% is a share of 0.05."""
    assert parse_percent(text) == share


@pytest.mark.parametrize("text", ["5", "0.05", "101%", "-5%", "%", "5 percent", ""])
def test_what_is_no_percentage_is_refused(text: str) -> None:
    """5 and 0.05 are both plausible without a sign, so neither is guessed."""
    with pytest.raises(UnitError) as caught:
        parse_percent(text)
    assert caught.value.remedy
