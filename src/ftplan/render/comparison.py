"""Two evaluation runs side by side: the verdict, the numbers behind it, the items that changed."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftplan.render.labelling import visible
from ftplan.results import ItemChange, RunComparison

__all__ = ["render_comparison", "render_comparison_markdown"]

_STYLE = {"better": "bold green", "worse": "bold red"}
_LISTED = 20
"""Changed items on the screen; JSON has them all."""


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.1f}"


def _rows(comparison: RunComparison) -> list[tuple[str, str]]:
    """(name, value) of the numbers, for both windows."""
    c = comparison
    rows = [
        ("before", f"{_percent(c.before_rate)} % pass  {visible(c.before)}"),
        ("after", f"{_percent(c.after_rate)} % pass  {visible(c.after)}"),
    ]
    if c.difference is not None:
        interval = f"95 % interval {_percent(c.low, '+')} to {_percent(c.high, '+')}"
        rows.append(("difference", f"{_percent(c.difference, '+')} points ({interval})"))
    if c.p_value is not None:
        test = "exact sign test over items" if c.repeated else "exact McNemar"
        rows.append(("p value", f"{c.p_value:.3g} ({test})"))
    rows += [
        ("paired items", str(c.paired)),
        ("fixed", str(len(c.fixed))),
        ("broke", str(len(c.broke))),
        ("still pass", str(c.unchanged_pass)),
        ("still fail", str(c.unchanged_fail)),
    ]
    left_out = [
        (len(c.only_before), "only before"),
        (len(c.only_after), "only after"),
        (len(c.not_judged), "without a verdict"),
    ]
    said = ", ".join(f"{count} {name}" for count, name in left_out if count)
    if said:
        rows.append(("left out", said))
    return rows


def _name(change: ItemChange) -> str:
    asked = " ".join(visible(change.input or change.item).split())
    shares = ""
    if change.repeats_before > 1 or change.repeats_after > 1:
        shares = f" ({_percent(change.before)} -> {_percent(change.after)} %)"
    return f"{visible(change.after_id)}{shares}  {asked}"


def render_comparison(comparison: RunComparison, *, width: int = 80, colour: bool = False) -> str:
    """The comparison on the screen."""
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=width,
        force_terminal=colour,
        no_color=not colour,
        color_system="standard" if colour else None,
        highlight=False,
        legacy_windows=False,
    )
    console.print(Text(comparison.sentence, _STYLE.get(comparison.verdict, "bold")))
    console.print()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in _rows(comparison):
        table.add_row(name, Text(value))
    console.print(table)
    for title, changes in (("Broke", comparison.broke), ("Fixed", comparison.fixed)):
        _list(console, title, changes)
    for note in comparison.notes:
        console.print(Text(f"note: {visible(note)}", "dim"))
    lines = (line.rstrip() for line in stream.getvalue().splitlines())
    return "\n".join(lines).strip("\n") + "\n"


def _list(console: Console, title: str, changes: Sequence[ItemChange]) -> None:
    if not changes:
        return
    console.print()
    console.print(Text(title, "bold"))
    for change in changes[:_LISTED]:
        console.print(Text(f"  {_name(change)}"), no_wrap=True, overflow="ellipsis")
        if change.reason:
            reason = " ".join(visible(change.reason).split())
            console.print(Text(f"      {reason}", "dim"), no_wrap=True, overflow="ellipsis")
    if len(changes) > _LISTED:
        console.print(Text(f"  and {len(changes) - _LISTED} more (--format json lists all)", "dim"))
    console.print()


def render_comparison_markdown(comparison: RunComparison) -> str:
    """The comparison for a pull request."""
    lines = [f"**{_cell(comparison.sentence)}**", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in _rows(comparison)]
    for title, changes in (("Broke", comparison.broke), ("Fixed", comparison.fixed)):
        if changes:
            lines += ["", f"### {title}", "", "| item | why it fails or failed |", "| --- | --- |"]
            lines += [f"| {_cell(_name(each))} | {_cell(each.reason)} |" for each in changes]
    if comparison.notes:
        lines += ["", *(f"- {_cell(note)}" for note in comparison.notes)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    line = " ".join(visible(text).split())
    for mark in ("\\", "|", "<", "`", "*", "["):
        line = line.replace(mark, f"\\{mark}" if mark != "<" else "&lt;")
    return line if len(line) <= 300 else f"{line[:297]}..."
