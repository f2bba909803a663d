"""The answer of ``advise`` for people: the path, the next step and why, what fails, what is closed.

Two pure functions of the answer: text for a terminal or a pipe (no colour unless asked for,
nothing lost at 80 columns), and Markdown for a decision document.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ftplan.advice import TITLES, Advice, Share, Station, Step
from ftplan.render.labelling import visible

__all__ = ["render_advice", "render_advice_markdown"]

_BAR = 12
_MARK = {
    "done": "[x]",
    "assumed": "[~]",
    "next": "-->",
    "later": "[ ]",
    "after": "[ ]",
    "blocked": "[!]",
    "unneeded": " . ",
}
_STYLE = {"done": "green", "assumed": "green", "next": "bold", "blocked": "red", "unneeded": "dim"}
_LEGEND = "[x] done  [~] assumed  --> next  [ ] later  [!] closed  . not on this way"
_ASKED = 4
"""Missing inputs on the screen; JSON lists every waiting rule."""


def render_advice(advice: Advice, *, width: int = 80, colour: bool = False) -> str:
    """The answer on the screen, at most ``width`` columns wide."""
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
    _print(console, advice)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _print(console: Console, advice: Advice) -> None:
    recommendation = advice.recommendation
    if advice.task:
        console.print(Text(visible(advice.task), "dim"))
    head = Text("Next step: ", "bold")
    head.append(f"{recommendation.title} ({recommendation.step})", "bold")
    console.print(head)
    console.print(Text(f"strength {recommendation.strength}: {_strength(advice)}", "dim"))
    _paragraph(console, recommendation.reason, codes=recommendation.rules)
    if advice.destination.step != recommendation.step:
        _heading(console, f"It leads to: {TITLES[advice.destination.step]}")
        _paragraph(console, advice.destination.reason, codes=advice.destination.rules)
    if advice.method is not None:
        _heading(console, f"How to train: {advice.method.objective} with {advice.method.kind}")
        _paragraph(console, advice.method.why, codes=advice.method.rules)
    _heading(console, "The way")
    console.print(Padding(_path(advice.workflow), (0, 0, 0, 2)))
    console.print(Padding(Text(_LEGEND, "dim"), (0, 0, 0, 2)))
    if advice.shares:
        _heading(console, f"What fails ({_evidence(advice)})")
        totals = _class_totals(advice.shares)
        if totals:
            console.print(Padding(Text(totals), (0, 0, 0, 2)))
        console.print(Padding(_failing(advice.shares), (0, 0, 0, 2)))
    if advice.next_test is not None:
        test = advice.next_test
        _heading(console, f"Find out first: {test.name}")
        _paragraph(console, f"{test.why} {test.how}")
        if test.items:
            _paragraph(console, "items: " + ", ".join(visible(item) for item in test.items))
    _pairs(console, "Closed", _closed(advice))
    _pairs(
        console,
        "Also possible",
        [(TITLES[a.step], _cited(a.why, a.rules)) for a in advice.alternatives],
    )
    _pairs(
        console,
        "Then",
        [
            ("stop when", recommendation.stop_when),
            *(("it flips if", text) for text in recommendation.flips_if),
        ],
    )
    if advice.assumptions:
        _heading(console, "Taken for granted")
        for line in advice.assumptions:
            _paragraph(console, line)
    if advice.undetermined:
        _heading(console, "Not known")
        _paragraph(console, _waiting(advice))


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, "bold"))


def _paragraph(console: Console, text: str, *, codes: Iterable[str] = ()) -> None:
    body = Text(visible(text))
    listed = ", ".join(codes)
    if listed:
        body.append(f" [{listed}]", "dim")
    console.print(Padding(body, (0, 0, 0, 2)))


def _pairs(console: Console, heading: str, rows: list[tuple[str, str]]) -> None:
    if not rows:
        return
    _heading(console, heading)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(ratio=1, max_width=24)
    table.add_column(ratio=3)
    for name, text in rows:
        table.add_row(Text(name), Text(visible(text)))
    console.print(Padding(table, (0, 0, 0, 2)))


def _path(stations: tuple[Station, ...]) -> Table:
    """One station a line, joined by a line: the spine of the workflow."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for station in stations:
        style = _STYLE.get(station.status, "")
        note = f"{station.rule}, see Closed" if station.rule else station.note
        table.add_row(
            Text(_MARK[station.status], style),
            Text(station.title, style),
            Text(note, "" if station.status == "next" else "dim"),
        )
    return table


def _failing(shares: tuple[Share, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("kind", overflow="fold")
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("share", no_wrap=True)
    table.add_column("", no_wrap=True)
    for share in shares:
        table.add_row(
            Text(visible(share.kind or "(no kind yet)")),
            Text("-" if share.count is None else str(share.count)),
            Text(_share(share)),
            Text(_bar(share)),
        )
    return table


def _class_totals(shares: tuple[Share, ...]) -> str:
    """``information 69%, behavior 31%``; empty where a share is not known."""
    if any(share.share is None for share in shares):
        return ", ".join(sorted({share.class_ or "no class" for share in shares}))
    totals: Counter[str] = Counter()
    for share in shares:
        totals[share.class_ or "no class"] += share.share or 0.0  # type: ignore[assignment]
    return ", ".join(f"{name} {part:.0%}" for name, part in totals.most_common())


def _share(share: Share) -> str:
    if share.share is None:
        return "unknown"
    if share.low is None or share.high is None:
        return f"{share.share:.0%}"
    return f"{share.share:.0%} ({share.low:.0%} to {share.high:.0%})"


def _bar(share: Share) -> str:
    """The sure part as ``#``, what chance leaves open as ``-``."""
    if share.share is None:
        return ""
    low = share.share if share.low is None else share.low
    high = share.share if share.high is None else share.high
    sure, open_to = round(low * _BAR), round(high * _BAR)
    return "#" * sure + "-" * (open_to - sure) + " " * (_BAR - open_to) + "|"


def _evidence(advice: Advice) -> str:
    e = advice.evidence
    parts = [f"{e.failures} failure{'' if e.failures == 1 else 's'}"]
    if e.suggested:
        parts.append(f"{e.suggested} with a suggested kind")
    if e.excluded:
        parts.append(f"{e.excluded} of the harness left out")
    unlabelled = e.failures - e.labelled - e.suggested - e.excluded
    if unlabelled > 0:
        parts.append(f"{unlabelled} without a kind")
    return ", ".join(parts)


def _strength(advice: Advice) -> str:
    return {
        "A": "controlled evidence, nothing that decides is unknown",
        "B": "several frameworks agree, little that decides is unknown",
        "C": "provisional, some of what decides is unknown or thin",
        "D": "a guess, most of what decides is unknown",
    }[advice.recommendation.strength]


def _closed(advice: Advice) -> list[tuple[str, str]]:
    """Steps closed by the same rule on one line."""
    by_rule: dict[str, tuple[list[Step], str]] = {}
    for entry in advice.blocked:
        by_rule.setdefault(entry.rule, ([], entry.reason))[0].append(entry.step)
    return [
        (", ".join(steps), _cited(reason, (rule,))) for rule, (steps, reason) in by_rule.items()
    ]


def _cited(text: str, codes: Iterable[str]) -> str:
    listed = ", ".join(codes)
    return f"{text} [{listed}]" if listed else text


def _waiting(advice: Advice) -> str:
    needs = Counter(need for entry in advice.undetermined for need in entry.needs)
    most = sorted(needs, key=lambda need: (-needs[need], need))[:_ASKED]
    rules = len(advice.undetermined)
    return (
        f"{rules} rule{' waits' if rules == 1 else 's wait'} for what the file does not say; "
        f"most often for {', '.join(most)}."
    )


def render_advice_markdown(advice: Advice) -> str:
    """The answer as Markdown, to paste into a decision document."""
    r = advice.recommendation
    out = [f"# Next step: {r.title}"]
    if advice.task:
        out.append(f"Task: {_md(advice.task)}")
    out.append(f"Strength {r.strength}: {_strength(advice)}.")
    out.append(_cited(_md(r.reason), r.rules))
    if advice.destination.step != r.step:
        out.append(f"## It leads to: {TITLES[advice.destination.step]}")
        out.append(_cited(_md(advice.destination.reason), advice.destination.rules))
    if advice.method is not None:
        out.append(f"## How to train: {advice.method.objective} with {advice.method.kind}")
        out.append(_cited(advice.method.why, advice.method.rules))
    out.append("## The way")
    out.append(
        _md_table(
            ("", "Step", "Where it stands"),
            [
                (s.status, s.title, f"{s.note} [{s.rule}]" if s.rule else s.note)
                for s in advice.workflow
            ],
        )
    )
    if advice.shares:
        out.append(f"## What fails ({_evidence(advice)})")
        out.append(
            _md_table(
                ("Kind", "Class", "Count", "Share (95 % interval)"),
                [
                    (
                        s.kind or "(no kind yet)",
                        s.class_ or "-",
                        "-" if s.count is None else str(s.count),
                        _share(s),
                    )
                    for s in advice.shares
                ],
            )
        )
    if advice.next_test is not None:
        t = advice.next_test
        out += [f"## Find out first: {t.name}", f"{t.why} {t.how}"]
        if t.items:
            out.append("Items: " + ", ".join(f"`{_md(item)}`" for item in t.items))
    if advice.blocked:
        out.append("## Closed")
        out.append("\n".join(f"- **{_md(name)}**: {text}" for name, text in _closed(advice)))
    if advice.alternatives:
        out.append("## Also possible")
        out.append(
            "\n".join(
                f"- **{TITLES[a.step]}**: {_cited(_md(a.why), a.rules)}"
                for a in advice.alternatives
            )
        )
    out.append("## Then")
    flips = [f"- It flips if {text}." for text in r.flips_if]
    out.append("\n".join([f"- Stop when {r.stop_when}.", *flips]))
    if advice.assumptions:
        out.append("## Taken for granted")
        out.append("\n".join(f"- {line}" for line in advice.assumptions))
    if advice.undetermined:
        out += ["## Not known", _waiting(advice)]
    return "\n\n".join(out) + "\n"


def _md(text: str) -> str:
    """User's text that must not start a heading, a table cell or HTML."""
    flat = " ".join(visible(text).split())
    for character in "\\`*_<>|#":
        flat = flat.replace(character, "\\" + character)
    return flat


def _md_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_md(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
