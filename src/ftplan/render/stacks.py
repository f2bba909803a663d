"""One job on many stacks, for the terminal and for Markdown."""

from __future__ import annotations

from ftplan.render.markdown import code, table
from ftplan.render.table import Page, grid
from ftplan.render.words import gib, plain_value
from ftplan.stacks import StackComparison, StackRow

__all__ = ["render", "render_markdown"]


def _differs(row: StackRow) -> str:
    if row.allocated_bytes is None:
        return row.note
    return ", ".join(f"{key}: {plain_value(value)}" for key, value in row.defaults.items())


def _peak(row: StackRow) -> str:
    return "-" if row.allocated_bytes is None else gib(row.allocated_bytes)


def render(comparison: StackComparison, *, width: int = 80, colour: bool = False) -> str:
    """The table on the screen, the smallest peak first."""
    page = Page(width, colour)
    page.line((f"{comparison.model} on {len(comparison.rows)} stacks", "bold"))
    page.blank()
    rows = grid(
        ("stack", "left"), ("GiB", "right"), ("worst in", "left"), ("", "left"),
        ("what it fills in, where stacks differ", "left"),
    )  # fmt: skip
    for row in comparison.rows:
        rows.add_row(row.stack, _peak(row), row.peak_phase or "", row.verdict or "", _differs(row))
    page.add(rows)
    return page.text()


def render_markdown(comparison: StackComparison) -> str:
    """The same as a Markdown table."""
    head = ("stack", "GiB", "worst in", "verdict", "what it fills in, where stacks differ")
    rows = [
        (code(row.stack), _peak(row), row.peak_phase or "", row.verdict or "", _differs(row))
        for row in comparison.rows
    ]
    return f"## {comparison.model}\n\n" + table(head, rows, right=(1,))
