"""What fits, on the screen and in Markdown: the way to take first, then all ways, then cards."""

from __future__ import annotations

from rich.text import Text

from ftplan.fitting import FitReport, FitRow, GpuOption, Spread
from ftplan.render.markdown import code, escape
from ftplan.render.markdown import table as markdown_table
from ftplan.render.table import STYLE, Page, grid, show_assumptions, show_findings, show_remedies
from ftplan.render.words import change_text, gib
from ftplan.units import format_count

__all__ = ["render", "render_markdown"]

_HEADERS = ("way", "verdict", "peak", "free", "trained", "batch", "tokens")
_TIMES = ("way", "batch", "tokens/s", "hours", "cost", "kWh")


def _title(answer: FitReport) -> str:
    name = answer.model.name if answer.model is not None else "the model"
    where = ""
    if answer.gpu is not None:
        many = f"{answer.gpu.count} x " if answer.gpu.count > 1 else ""
        where = f" on {many}{answer.gpu.name} ({gib(answer.gpu.usable_bytes)} GiB usable)"
    return f"{name}{where}, {answer.micro} x {answer.seq_len} tokens"


def _time_rows(answer: FitReport) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """How fast each way is; hours, cost and energy only where something is known of them."""
    timed = [(row.way, row.time) for row in answer.rows if row.time is not None]
    rows = [
        (
            way,
            str(time.micro),
            _short(time.tokens_per_second.expected),
            _spread(time.hours),
            _spread(time.cost),
            _spread(time.energy_kwh),
        )
        for way, time in timed
    ]
    filled = [i for i in range(len(_TIMES)) if any(row[i] for row in rows)]
    return tuple(_TIMES[i] for i in filled), [tuple(row[i] for i in filled) for row in rows]


def _spread(spread: Spread | None) -> str:
    """``3.1 (2.3-5.2)``: expected, low and high."""
    if spread is None:
        return ""
    return f"{_short(spread.expected)} ({_short(spread.low)}-{_short(spread.high)})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _cells(row: FitRow) -> tuple[str, ...]:
    if row.peak_bytes is None:
        return (row.way, row.verdict, *("",) * (len(_HEADERS) - 2))
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


def _card(option: GpuOption) -> tuple[str, ...]:
    price = "" if option.price_per_hour is None else f"{option.price_per_hour:g} per hour"
    many = f"{option.count} x " if option.count > 1 else ""
    return (
        f"{many}{option.gpu}",
        option.way,
        gib(option.peak_bytes),
        gib(option.usable_bytes),
        price,
    )


def render(answer: FitReport, *, width: int = 80, colour: bool = False) -> str:
    """The answer on the screen."""
    page = Page(width, colour)
    page.line((_title(answer), "bold"))
    if answer.solution is not None:
        style = STYLE["fits"] if answer.solution.value is not None else STYLE["over"]
        page.line((answer.solution.text, style))
    if answer.recommended is not None:
        page.line((f"take: {answer.recommended}", STYLE["fits"]), f"  {answer.reason}")
    else:
        page.line((answer.reason, STYLE[answer.verdict]))
    page.blank()
    table = grid(*((name, "left" if i < 2 else "right") for i, name in enumerate(_HEADERS)))
    for row in answer.rows:
        cells = _cells(row)
        style = "bold" if row.way == answer.recommended else ""
        table.add_row(Text(cells[0], style), Text(cells[1], STYLE.get(cells[1], "")), *cells[2:])
    page.add(table)
    for row in answer.rows:
        if row.note:
            page.line((f"{row.way}: {row.note}", "dim"), indent=2)
    page.line((_LEGEND, "dim"), indent=2)
    head, times = _time_rows(answer)
    if times:
        page.blank()
        table = grid(*((name, "left" if i < 1 else "right") for i, name in enumerate(head)))
        for cells in times:
            table.add_row(*cells)
        page.add(table)
        for text in _notes(answer):
            page.line((text, "dim"), indent=2)
    if answer.gpus:
        page.blank()
        priced = answer.gpus[0].price_per_hour is not None
        page.line((f"{'Cheapest' if priced else 'Smallest'} single cards that fit", "bold"))
        _cards(page, answer.gpus)
    if answer.fewest is not None and answer.fewest.count > 1:
        page.blank()
        page.line(("Fewest cards of this kind", "bold"))
        _cards(page, (answer.fewest,))
    show_remedies(page, answer.remedies)
    show_findings(page, answer.findings)
    show_assumptions(page, answer.assumptions, explain=True)
    return page.text()


_LEGEND = "peak and free in GiB; batch: most at this length; tokens: longest at this batch"


def _notes(answer: FitReport) -> list[str]:
    time = next(row.time for row in answer.rows if row.time is not None)
    texts = [f"expected (low-high), all cards together; the first is bound by {time.bound}"]
    if time.tokens is not None:
        texts.append(f"{format_count(time.tokens)} tokens, {time.steps:,} steps of the first way")
    return texts


def _cards(page: Page, options: tuple[GpuOption, ...]) -> None:
    table = grid(
        ("card", "left"),
        ("way", "left"),
        ("peak GiB", "right"),
        ("usable GiB", "right"),
        ("", "left"),
    )
    for option in options:
        table.add_row(*_card(option))
    page.add(table)


def render_markdown(answer: FitReport) -> str:
    """The answer as Markdown tables."""
    parts = [f"## {escape(_title(answer))}\n"]
    if answer.solution is not None:
        parts.append(f"**{escape(answer.solution.text)}**\n")
    take = f"**take: {escape(answer.recommended)}** " if answer.recommended else ""
    parts.append(f"{take}{escape(answer.reason)}\n")
    rows = [tuple(escape(cell) for cell in _cells(row)) for row in answer.rows]
    parts += [markdown_table(_HEADERS, rows, right=range(2, len(_HEADERS))), f"{_LEGEND}\n"]
    head, times = _time_rows(answer)
    if times:
        escaped = [tuple(escape(cell) for cell in cells) for cells in times]
        parts.append(markdown_table(head, escaped, right=range(1, len(head))))
        parts += [f"{escape(text)}\n" for text in _notes(answer)]
    parts += [f"- {escape(row.way)}: {escape(row.note)}\n" for row in answer.rows if row.note]
    options = [*answer.gpus, *([answer.fewest] if answer.fewest is not None else [])]
    if options:
        head = ("card", "way", "peak GiB", "usable GiB", "price")
        cards = [tuple(escape(cell) for cell in _card(option)) for option in options]
        parts += ["### Cards that fit\n", markdown_table(head, cards, right=(2, 3))]
    if answer.remedies:
        remedies = [
            (
                code(change_text(r.change)),
                gib(max(0, r.saves_bytes)),
                r.verdict or "",
                escape(r.costs),
            )
            for r in answer.remedies
        ]
        titles = ("change", "saves GiB", "then", "cost")
        parts += ["### What would help, in order\n", markdown_table(titles, remedies, right=(1,))]
    return "\n".join(parts)
