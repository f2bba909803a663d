"""What fits, on the screen and in Markdown: the way to take first, then all ways, then cards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from ftplan.fitting import FastestPlan, FitReport, FitRow, GpuOption, Spread, TimeEstimate
from ftplan.render.markdown import escape, remedy_lines
from ftplan.render.markdown import table as markdown_table
from ftplan.render.table import STYLE, Page, grid, show_assumptions, show_findings, show_remedies
from ftplan.render.words import gib
from ftplan.units import format_count

__all__ = ["render", "render_markdown"]

_WAYS = ("way", "verdict", "peak", "free", "trained", "batch", "tokens")
_TIMES = ("way", "how", "batch", "most", "tokens/s", "hours", "cost", "per M tokens", "kWh")
_PRICED = ("card", "way", "batch", "tokens/s", "hours", "cost", "per M tokens", "per hour")
_SIZED = ("card", "way", "peak GiB", "usable GiB", "per hour")
_WORDS = ("way", "verdict", "how", "card")
"""Columns of words, to the left."""
_LEGEND = "peak, free: GiB; batch: most at this length; tokens: longest at this batch"

Rows = list[tuple[str, ...]]


# --- What the tables hold -----------------------------------------------------------------------


def _title(answer: FitReport) -> str:
    name = answer.model.name if answer.model is not None else "the model"
    where = ""
    if answer.gpu is not None:
        many = f"{answer.gpu.count} x " if answer.gpu.count > 1 else ""
        where = f" on {many}{answer.gpu.name} ({gib(answer.gpu.usable_bytes)} GiB usable)"
    return f"{name}{where}, {answer.micro} x {answer.seq_len} tokens"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _expected(spread: Spread | None) -> str:
    return "" if spread is None else _short(spread.expected)


def _spread(spread: Spread) -> str:
    """``3.1 (2.3-5.2)``: expected, low and high."""
    return f"{_short(spread.expected)} ({_short(spread.low)}-{_short(spread.high)})"


def _way_row(row: FitRow) -> tuple[str, ...]:
    if row.peak_bytes is None:
        return (row.way, row.verdict, *("",) * (len(_WAYS) - 2))
    free = ""
    if row.headroom_bytes is not None:
        sign = "-" if row.headroom_bytes < 0 else ""
        free = f"{sign}{gib(abs(row.headroom_bytes))}"
    return (
        row.way,
        row.verdict if row.headroom_bytes is not None else "",
        gib(row.peak_bytes),
        free,
        format_count(row.trainable_params) if row.trainable_params else "",
        str(row.largest_micro or ("-" if free else "")),
        str(row.longest_seq_len or ("-" if free else "")),
    )


def _how(fastest: FastestPlan, recomputed: str = "ckpt") -> str:
    """The settings of a plan in a few words."""
    change = fastest.change
    words = [recomputed] if change.get("gradient_checkpointing") is True else []
    if change.get("kernels"):
        words.append(str(change["kernels"]))
    elif change.get("loss"):
        words.append(f"{change['loss']} loss")
    return ", ".join(words) or "plain"


def _amounts(time: TimeEstimate) -> tuple[str, str, str]:
    """Hours, cost, and cost by the token where the tokens are not known."""
    each = time.cost_per_million_tokens if time.cost is None else None
    return _expected(time.hours), _expected(time.cost), _expected(each)


def _time_rows(answer: FitReport) -> Rows:
    """The fastest plan of each way."""
    return [
        (
            row.way,
            _how(row.fastest),
            str(row.fastest.micro),
            str(row.fastest.largest_micro),
            _short(row.time.tokens_per_second.expected),
            *_amounts(row.time),
            _expected(row.time.energy_kwh),
        )
        for row in answer.rows
        if row.time is not None and row.fastest is not None
    ]


def _named(option: GpuOption) -> str:
    return f"{option.count} x {option.gpu}" if option.count > 1 else option.gpu


def _priced_rows(options: Sequence[GpuOption]) -> Rows:
    """Cards by what the data cost on them."""
    return [
        (
            _named(option),
            option.way,
            str(option.fastest.micro),
            _short(option.time.tokens_per_second.expected),
            *_amounts(option.time),
            f"{option.price_per_hour:g}",
        )
        for option in options
        if option.time is not None and option.fastest is not None
    ]


def _sized_rows(options: Sequence[GpuOption]) -> Rows:
    """Cards by how much they hold."""
    return [
        (
            _named(option),
            option.way,
            gib(option.peak_bytes),
            gib(option.usable_bytes),
            "" if option.price_per_hour is None else f"{option.price_per_hour:g}",
        )
        for option in options
    ]


def _filled(head: tuple[str, ...], rows: Rows) -> tuple[tuple[str, ...], Rows]:
    """A table without the columns of which nothing is known."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return tuple(head[i] for i in kept), [tuple(row[i] for i in kept) for row in rows]


def _further(answer: FitReport) -> list[tuple[str, tuple[str, ...], Rows, list[str]]]:
    """The tables after the first: heading, columns, rows, and notes below."""
    tables = []
    times = _time_rows(answer)
    if times:
        title = "The fastest plan of each way that fits"
        tables.append((title, *_filled(_TIMES, times), _notes(answer)))
    if answer.gpus:
        priced = _priced_rows(answer.gpus)
        if priced:
            tables.append(("Cheapest cards for the data", *_filled(_PRICED, priced), []))
        else:
            title = "Smallest single cards that fit"
            tables.append((title, *_filled(_SIZED, _sized_rows(answer.gpus)), []))
    if answer.fewest is not None and answer.fewest.count > 1:
        rows = _sized_rows([answer.fewest])
        tables.append(("Fewest cards of this kind", *_filled(_SIZED, rows), []))
    return tables


# --- Words --------------------------------------------------------------------------------------


def _fastest(answer: FitReport) -> list[str]:
    """What the recommended way does at its fastest."""
    row = next((row for row in answer.rows if row.way == answer.recommended), None)
    if row is None or row.fastest is None or row.time is None:
        return []
    time, fastest = row.time, row.fastest
    steps = f", accumulated {fastest.accumulation} times" if fastest.accumulation > 1 else ""
    texts = [
        f"fastest {_how(fastest, 'checkpointed')}, {fastest.micro} at once{steps}: "
        f"{_spread(time.tokens_per_second)} tokens/s, bound by {time.bound}"
    ]
    if time.hours is not None and time.tokens is not None and time.steps is not None:
        text = f"{format_count(time.tokens)} tokens: {_spread(time.hours)} hours"
        text += f", {time.steps:,} steps"
        text += f", cost {_spread(time.cost)}" if time.cost is not None else ""
        texts.append(text)
    return texts


def _notes(answer: FitReport) -> list[str]:
    """How sure the rates are, and out of how many plans they were chosen."""
    rates = [row.time.tokens_per_second for row in answer.rows if row.time is not None]
    low = min(rate.low / rate.expected for rate in rates)
    high = max(rate.high / rate.expected for rate in rates)
    plans = [row.fastest for row in answer.rows if row.fastest is not None]
    liger = any(plan.change.get("kernels") == "liger" for plan in plans)
    return [
        "how: settings that lose nothing (ckpt: checkpointing); most: largest batch so",
        *(["liger: kernels of the package liger-kernel; --kernels none leaves them out"] * liger),
        f"rates of all cards together, expected; they may be {low:.2f} to {high:.2f} times that",
        f"the fastest of {answer.candidates:,} plans: ways x settings x cards x batches",
    ]


# --- Screen and Markdown ------------------------------------------------------------------------


def render(
    answer: FitReport, *, width: int = 80, colour: bool = False, explain: bool = False
) -> str:
    """The answer on the screen. ``explain`` adds where each assumption was read."""
    page = Page(width, colour)
    if answer.solution is not None:
        style = STYLE["fits"] if answer.solution.value is not None else STYLE["over"]
        page.line((answer.solution.text, style))
    if answer.recommended is not None and answer.gpu is not None:
        page.line((f"take: {answer.recommended}", STYLE["fits"]), f"  {answer.reason}")
    else:
        page.line((answer.reason, STYLE[answer.verdict]))
    for text in _fastest(answer):
        page.line(text, indent=2)
    page.blank()
    page.line((_title(answer), "bold"))
    table = _grid(_WAYS)
    for row in answer.rows:
        cells = _way_row(row)
        style = "bold" if row.way == answer.recommended else ""
        table.add_row(Text(cells[0], style), Text(cells[1], STYLE.get(cells[1], "")), *cells[2:])
    page.add(table)
    for row in answer.rows:
        if row.note:
            page.line((f"{row.way}: {row.note}", "dim"), indent=2)
    page.line((_LEGEND, "dim"), indent=2)
    for title, head, rows, notes in _further(answer):
        page.blank()
        page.line((title, "bold"))
        table = _grid(head)
        for cells in rows:
            table.add_row(*cells)
        page.add(table)
        for text in notes:
            page.line((text, "dim"), indent=2)
    show_remedies(page, answer.remedies)
    show_findings(page, answer.findings)
    show_assumptions(page, answer.assumptions, explain=explain)
    return page.text()


def _grid(head: tuple[str, ...]) -> Any:
    return grid(*((name, "left" if name in _WORDS else "right") for name in head))


def render_markdown(answer: FitReport) -> str:
    """The answer as Markdown tables."""
    parts = [f"## {escape(_title(answer))}\n"]
    if answer.solution is not None:
        parts.append(f"**{escape(answer.solution.text)}**\n")
    take = f"**take: {escape(answer.recommended)}** " if answer.recommended and answer.gpu else ""
    parts.append(f"{take}{escape(answer.reason)}\n")
    parts += [f"{escape(text)}\n" for text in _fastest(answer)]
    parts += [_markdown(_WAYS, [_way_row(row) for row in answer.rows]), f"{_LEGEND}\n"]
    parts += [f"- {escape(row.way)}: {escape(row.note)}\n" for row in answer.rows if row.note]
    for title, head, rows, notes in _further(answer):
        parts += [f"### {title}\n", _markdown(head, rows)]
        parts += [f"{escape(text)}\n" for text in notes]
    return "\n".join([*parts, *remedy_lines(answer.remedies)])


def _markdown(head: tuple[str, ...], rows: Rows) -> str:
    right = [i for i, name in enumerate(head) if name not in _WORDS]
    return markdown_table(head, [tuple(escape(cell) for cell in row) for row in rows], right=right)
