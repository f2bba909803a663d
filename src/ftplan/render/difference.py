"""Two jobs side by side, for the terminal and for Markdown."""

from __future__ import annotations

from typing import Any

from ftplan.difference import BytesChange, Difference, Step
from ftplan.render.markdown import code, table
from ftplan.render.table import Page, grid
from ftplan.render.words import gib, plain_value

__all__ = ["render", "render_markdown"]


def _signed(delta: int) -> str:
    return f"{'+' if delta >= 0 else '-'}{gib(abs(delta))}"


def _rows(changes: tuple[BytesChange, ...]) -> list[tuple[str, str, str, str]]:
    return [(c.name, gib(c.before), gib(c.after), _signed(c.delta)) for c in changes]


def _value(value: Any) -> str:
    return "-" if value is None else plain_value(value)


LEAST = 1 << 20
"""A change of less than a MiB is no effect."""
MOST_TERMS = 8
"""Terms on the screen; `--format json` has them all."""


def _step(step: Step) -> str:
    return ", ".join(f"{k.key} {_value(k.before)} -> {_value(k.after)}" for k in step.keys)


def answer(change: Difference) -> str:
    """How the second differs from the first, and which change most of it comes from."""
    delta = change.totals[0].delta if change.totals else 0
    if not delta:
        return ""
    more = f"{gib(abs(delta))} GiB {'more' if delta > 0 else 'less'}"
    same = [step for step in change.steps if step.delta * delta > 0]
    if not same:
        return f"{change.after} takes {more} than {change.before}"
    most = max(same, key=lambda step: abs(step.delta))
    which = " and ".join(key.key for key in most.keys[:2])
    return f"{change.after} takes {more} than {change.before}, by {which} ({_signed(most.delta)})"


def render(change: Difference, *, width: int = 80, colour: bool = False) -> str:
    """The changes on the screen: the totals, the plan's keys, the terms."""
    page = Page(width, colour)
    page.line((answer(change) or f"{change.before} -> {change.after}", "bold"))
    if change.verdict_before or change.verdict_after:
        page.line(f"{change.verdict_before or 'no GPU'} -> {change.verdict_after or 'no GPU'}")
    page.blank()
    head = (("GiB", "left"), ("before", "right"), ("after", "right"), ("change", "right"))
    totals = grid(*head)
    for row in _rows(change.totals):
        totals.add_row(*row)
    page.add(totals)
    if change.steps:
        page.blank()
        page.line(("One change after another (allocated)", "bold"))
        steps = grid(("GiB", "right"), ("change", "left"))
        for step in change.steps:
            if abs(step.delta) >= LEAST:
                steps.add_row(_signed(step.delta), _step(step))
        page.add(steps)
        idle = [key.key for step in change.steps if abs(step.delta) < LEAST for key in step.keys]
        if idle:
            page.line((f"no effect: {', '.join(idle)}", "dim"), indent=2)
    elif change.plan:
        page.blank()
        page.line(("The plan (after defaults)", "bold"))
        keys = grid(("key", "left"), ("before", "left"), ("after", "left"))
        for key in change.plan:
            keys.add_row(key.key, _value(key.before), _value(key.after))
        page.add(keys)
    if change.terms:
        page.blank()
        page.line(("Terms at the peak", "bold"))
        terms = grid(*head)
        for row in _rows(change.terms[:MOST_TERMS]):
            terms.add_row(*row)
        page.add(terms)
        rest = len(change.terms) - MOST_TERMS
        if rest > 0:
            page.line((f"{rest} smaller ones: --format json", "dim"), indent=2)
    if not change.plan and not change.terms:
        page.line("nothing changed")
    return page.text()


def render_markdown(change: Difference) -> str:
    """The changes as Markdown tables."""
    head = ("GiB", "before", "after", "change")
    parts = [
        f"## {code(change.before)} to {code(change.after)}\n",
        table(head, _rows(change.totals), right=(1, 2, 3)),
    ]
    if change.steps:
        rows_of_steps = [(_signed(step.delta), _step(step)) for step in change.steps]
        parts.append("### One change after another (allocated)\n")
        parts.append(table(("GiB", "change"), rows_of_steps, right=(0,)))
    if change.plan:
        rows = [(code(k.key), code(_value(k.before)), code(_value(k.after))) for k in change.plan]
        parts += ["### The plan (after defaults)\n", table(("key", "before", "after"), rows)]
    if change.terms:
        parts += ["### Terms at the peak\n", table(head, _rows(change.terms), right=(1, 2, 3))]
    return "\n".join(parts)
