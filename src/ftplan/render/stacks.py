"""One job on many stacks, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from ftplan.render.markdown import code, table
from ftplan.render.table import Page, grid
from ftplan.render.words import gib, plain_value
from ftplan.stacks import StackComparison, StackRow

__all__ = ["render", "render_markdown"]


def _usual(comparison: StackComparison) -> dict[str, str]:
    """What most stacks fill in, by key."""
    counts: dict[str, dict[str, int]] = {}
    for row in comparison.rows:
        for key, value in row.defaults.items():
            of_key = counts.setdefault(key, {})
            word = plain_value(value)
            of_key[word] = of_key.get(word, 0) + 1
    most = len(comparison.rows) / 2
    return {
        key: word for key, words in counts.items() for word, count in words.items() if count > most
    }


def _differs(row: StackRow, usual: Mapping[str, str]) -> str:
    if row.allocated_bytes is None:
        return row.note
    own = {key: plain_value(value) for key, value in row.defaults.items()}
    return ", ".join(f"{key} {word}" for key, word in own.items() if word != usual.get(key))


def _peak(row: StackRow) -> str:
    return "-" if row.allocated_bytes is None else gib(row.allocated_bytes)


def render(comparison: StackComparison, *, width: int = 80, colour: bool = False) -> str:
    """The table on the screen, the smallest peak first."""
    page = Page(width, colour)
    page.line((f"{comparison.model} on {len(comparison.rows)} stacks", "bold"))
    page.blank()
    usual = _usual(comparison)
    rows = grid(
        ("stack", "left"), ("GiB", "right"), ("worst in", "left"), ("", "left"),
        ("what it fills in that most do not", "left"),
    )  # fmt: skip
    for row in comparison.rows:
        rows.add_row(
            row.stack, _peak(row), row.peak_phase or "", row.verdict or "", _differs(row, usual)
        )
    page.add(rows)
    if usual:
        page.blank()
        most = ", ".join(f"{key} {word}" for key, word in usual.items())
        page.line((f"Most fill in: {most}", "dim"))
        page.line(
            ("`ftplan diff STACK STACK` with the same flags says what each of them does", "dim")
        )
    return page.text()


def render_markdown(comparison: StackComparison) -> str:
    """The same as a Markdown table."""
    head = ("stack", "GiB", "worst in", "verdict", "what it fills in, where stacks differ")
    rows = [
        (code(row.stack), _peak(row), row.peak_phase or "", row.verdict or "", _differs(row, {}))
        for row in comparison.rows
    ]
    return f"## {comparison.model}\n\n" + table(head, rows, right=(1,))
