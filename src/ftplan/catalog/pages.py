"""The pages of ``ftplan explain``: what a term, a knob or a finding means, why, and the source.

Numeric formats, stacks and optimizers have pages too, made from their own rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftplan.catalog.shelf import Shelf
from ftplan.dataclass import dataclass

__all__ = ["Page", "all_pages", "find_page", "format_page"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One page, always under the same headings."""

    name: str
    """What ``ftplan explain`` is asked for."""
    kind: str
    """`term`, `counter`, `knob`, `method`, `sharding`, `format`, `finding`, ..."""
    title: str
    formula: str
    why: str
    source: str
    aliases: tuple[str, ...] = ()


def _page(row: Mapping[str, Any]) -> Page:
    return Page(**{**row, "aliases": tuple(row["aliases"])})


_PAGES: Shelf[Page] = Shelf("page", "explain", "pages.json", _page)


def all_pages() -> tuple[Page, ...]:
    """Every page that is written by hand, in order."""
    return _PAGES.rows


def find_page(name: str) -> Page | None:
    """The page called ``name`` (``activations``, ``weights/frozen``, ``nf4``), or None."""
    found = _PAGES.lookup(name) or _PAGES.lookup(name.split("/")[0])
    return found[0] if len(found) == 1 else format_page(name)


def suggestions(name: str) -> tuple[str, ...]:
    """Names of pages near ``name``."""
    return _PAGES.suggestions(name)


def format_page(name: str) -> Page | None:
    """The page of a numeric format, or None when there is no such format."""
    from ftplan.dtypes import find_format
    from ftplan.errors import UnknownNameError

    try:
        row = find_format(name)
    except UnknownNameError:
        return None
    bits = float(row.bits_per_value)
    parts = [f"{float(row.bits):g} bits a value"]
    if row.scale_bits:
        covers = {"flat": "values", "groups": "input features", "tile": "x as many values"}
        span = (
            f"{row.block} {covers.get(row.layout, 'values')}" if row.block else f"one {row.layout}"
        )
        parts.append(f"a scale of {row.scale_bits} bits for {span}")
    if row.zero_bits:
        parts.append(f"a zero point of {row.zero_bits} bits")
    if row.nested_block:
        parts.append(f"{row.nested_block} scales share an fp32 scale of their own")
    if row.index_bits:
        parts.append(f"{row.index_bits} bits of index per input feature")
    kept = ", ".join(row.unquantised)
    why = f"{bits:g} bits a parameter in a large matrix: 1e9 parameters are {bits / 8:.3g} GB."
    if kept:
        why += f" Not stored so, but in the model's own dtype: {kept}."
    if row.expands_to:
        why += f" Expanded to {row.expands_to} for a matmul, one matrix at a time."
    return Page(
        name=row.name,
        kind="format",
        title=row.label,
        formula=", ".join(parts),
        why=why,
        source=row.source,
        aliases=row.aliases,
    )
