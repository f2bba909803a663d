"""The terminal's view: the answer first, then what it is made of, then what was assumed."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ftplan.render.words import (
    GROUPS,
    VERDICTS,
    both_units,
    change_text,
    gb,
    gib,
    group_terms,
    headline,
    is_textbook,
    job_line,
    plain_value,
    short_source,
)
from ftplan.report import Assumption, CheckReport, Finding, Interval, Remedy, Report, Term
from ftplan.units import GB

__all__ = ["Page", "grid", "render_check", "render_report", "render_rows"]

STYLE = {
    "fits": "bold green",
    "tight": "bold yellow",
    "over": "bold red",
    "unknown": "bold magenta",
    "error": "bold red",
    "warning": "yellow",
    "info": "cyan",
}
_BAR, _REST = "\u2588", "\u2591"


class Page:
    """A page of text being written: a rich console on a string."""

    def __init__(self, width: int, colour: bool) -> None:
        self._stream = io.StringIO()
        self.colour = colour
        self.console = Console(
            file=self._stream,
            width=width,
            force_terminal=colour,
            no_color=not colour,
            color_system="standard" if colour else None,
            highlight=False,
            markup=False,  # names come from files: brackets and colons in them mean nothing
            emoji=False,
            legacy_windows=False,
        )

    def line(self, *parts: str | tuple[str, str], indent: int = 0) -> None:
        text = Text.assemble(*parts)
        self.console.print(Padding(text, (0, 0, 0, indent)) if indent else text, soft_wrap=False)

    def blank(self) -> None:
        self.console.print()

    def add(self, renderable: Any, indent: int = 2) -> None:
        self.console.print(Padding(renderable, (0, 0, 0, indent)))

    def text(self) -> str:
        text = self._stream.getvalue()
        if not self.colour:  # names come from files: they must not steer the terminal
            text = re.sub("[\x00-\x08\x0b-\x1f\x7f]", "", text)
        lines = (line.rstrip() for line in text.splitlines())
        return "\n".join(lines).strip("\n") + "\n"


def grid(*headers: tuple[str, str]) -> Table:
    """A table without lines; ``headers`` are (title, justify)."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for title, justify in headers:
        side: Any = justify
        table.add_column(title, justify=side, no_wrap=justify == "right", overflow="fold")
    return table


def render_report(
    report: Report, *, width: int = 80, colour: bool = False, explain: bool = False
) -> str:
    """One job on the screen. ``explain`` adds each term's formula and source."""
    page = Page(width, colour)
    _report(page, report, explain)
    return page.text()


def _report(page: Page, report: Report, explain: bool) -> None:
    _answer(page, report)
    page.blank()
    page.line((headline(report), "bold"))
    if report.job:
        page.line((job_line(report), "dim"))
    _counters(page, report)
    _ways(page, report.details)
    if report.terms:
        page.blank()
        _terms(page, report, explain)
    _phases(page, report)
    show_findings(page, report.findings)
    show_remedies(page, report.remedies)
    show_assumptions(page, report.assumptions, explain=explain)


def _answer(page: Page, report: Report) -> None:
    """The first lines are what was asked: does it fit, and what does it take."""
    if report.verdict is not None:
        where = f" {report.gpu.name}" if report.gpu is not None else ""
        count = f" x {report.gpu.count}" if report.gpu and report.gpu.count > 1 else ""
        page.line((f"{VERDICTS[report.verdict]}:{where}{count}", STYLE[report.verdict]))
    if report.allocated_bytes is None:
        return
    if is_textbook(report):
        _textbook_answer(page, report)
        return
    peak = report.device_bytes or report.allocated_bytes
    at = f", in the {report.peak_phase} phase" if report.peak_phase else ""
    page.line((both_units(peak.expected), "bold"), f" per GPU at the worst moment{at}")
    if report.gpu is not None:
        share = peak.expected / max(1, report.gpu.usable_bytes)
        filled = min(40, round(40 * share))
        page.line(
            (_BAR * filled + _REST * (40 - filled), STYLE.get(report.verdict or "", "")),
            f" {share:.0%} of {gib(report.gpu.usable_bytes)} GiB usable",
        )


def _counters(page: Page, report: Report) -> None:
    """Three counters that are never mixed, and the host's memory."""
    if report.allocated_bytes is None or is_textbook(report):
        return
    page.blank()
    table = grid(
        ("GiB", "left"), ("low", "right"), ("expected", "right"), ("high", "right"), ("", "left")
    )
    for name, interval, counter in (
        ("allocated", report.allocated_bytes, "torch.cuda.max_memory_allocated()"),
        ("reserved", report.reserved_bytes, "torch.cuda.max_memory_reserved()"),
        ("device", report.device_bytes, "nvidia-smi"),
        ("host", report.host_bytes, "peak host memory"),
    ):
        if interval is not None:
            table.add_row(name, *_interval(interval), Text(counter, "dim"))
    page.add(table)


def _interval(interval: Interval) -> tuple[str, str, str]:
    return gib(interval.low), gib(interval.expected), gib(interval.high)


def _textbook_answer(page: Page, report: Report) -> None:
    assert report.allocated_bytes is not None
    weights = sum(t.bytes for t in report.terms if t.name.startswith("weights/"))
    total = report.allocated_bytes.expected
    training = any(t.name.split("/")[0] in ("gradients", "optimizer") for t in report.terms)
    why = "weights, gradients and optimizer states" if training else "x 1.2"
    sharding = report.job.get("sharding", {})
    divided = sharding.get("kind") not in (None, "none", "ddp") or {"tp", "pp"} & set(sharding)
    where = " on each GPU" if divided else " in all"
    page.line((f"{gb(weights)} of weights, {gb(total)}{where}", "bold"), f" ({why})")
    page.line(("the textbook's sum, GB = 10^9 bytes; exact with --model or --config", "dim"))


def _ways(page: Page, details: Mapping[str, Any]) -> None:
    """The other ways to finetune the same model, one line each."""
    ways = details.get("ways")
    if not isinstance(ways, Sequence) or not ways:
        return
    page.blank()
    page.line(("Finetuning the same model, GB without activations", "bold"))
    parts = [key for key in ways[0] if key.endswith("_bytes")]
    names = (key.removesuffix("_bytes") for key in parts)
    table = grid(("", "left"), *((name.replace("total", "in all"), "right") for name in names))
    for way in ways:
        table.add_row(
            str(way["name"]),
            *(Text(gb(way[key]), "bold" if key == "total_bytes" else "") for key in parts),
        )
    page.add(table)


def _terms(page: Page, report: Report, explain: bool) -> None:
    total = report.total()
    title = "What it is made of" + (f" ({report.peak_phase})" if report.peak_phase else "")
    page.line((title, "bold"))
    if explain:
        _explained_terms(page, report.terms)
        return
    table = grid(
        ("term", "left"), ("GiB", "right"), ("GB", "right"), ("share", "right"), ("", "left")
    )
    for group, terms in group_terms(report.terms).items():
        alive = [term for term in terms if term.at_peak]
        amount = sum(term.bytes for term in alive)
        if not alive:
            continue
        share = amount / total if total else 0
        row = (
            gib(amount),
            _gb(amount),
            f"{share:.0%}",
            _BAR * round(20 * share),
        )
        table.add_row(Text(GROUPS.get(group, group), "bold"), *row)
        if len(alive) > 1:
            for term in _worth_a_line(alive, total):
                table.add_row(
                    Text(f"  {_detail(term)}", "dim"),
                    Text(gib(term.bytes), "dim"),
                    Text(_gb(term.bytes), "dim"),
                )
    row = (gib(total), _gb(total), "100%" if total else "", "")
    table.add_row(Text("allocated", "bold"), *(Text(cell, "bold") for cell in row))
    page.add(table)
    later = [t for t in report.terms if not t.at_peak and t.bytes * 1000 >= total]
    if later:
        names = ", ".join(f"{term.name} {gib(term.bytes)}" for term in later)
        page.line((f"not at the peak (GiB): {names}", "dim"), indent=2)


def _worth_a_line(terms: Sequence[Term], total: int) -> list[Term]:
    """Terms of at least a thousandth of the whole, largest first; --explain shows all."""
    ranked = sorted(terms, key=lambda term: -term.bytes)
    return [term for term in ranked if term.bytes * 1000 >= total]


def _gb(count: int) -> str:
    return f"{count / GB:,.2f}"


def _detail(term: Term) -> str:
    return term.name.split("/", 1)[-1].replace("_", " ")


def _explained_terms(page: Page, terms: Iterable[Term]) -> None:
    for group in group_terms(tuple(terms)).values():
        for term in group:
            note = "" if term.at_peak else " (not at the peak)"
            page.line((f"{term.name}", "bold"), f"  {both_units(term.bytes)}{note}", indent=2)
            page.line(term.formula, indent=6)
            page.line((term.source, "dim"), indent=6)


def _phases(page: Page, report: Report) -> None:
    if len(report.phases) < 2:
        return
    most = max(phase.peak_bytes for phase in report.phases) or 1
    page.blank()
    page.line(("Peak of each phase", "bold"))
    table = grid(("", "left"), ("GiB", "right"), ("", "left"))
    for phase in report.phases:
        bar = _BAR * max(1, round(30 * phase.peak_bytes / most)) if phase.peak_bytes else ""
        style = "bold" if phase.name == report.peak_phase else ""
        table.add_row(Text(phase.name, style), Text(gib(phase.peak_bytes), style), bar)
    page.add(table)


def show_findings(page: Page, findings: Sequence[Finding]) -> None:
    if not findings:
        return
    page.blank()
    page.line(("Findings", "bold"))
    _finding_lines(page, findings)


def _place(finding: Finding, file: str | None) -> str:
    """Where a finding is; under the heading of its own file the line is enough."""
    where = finding.location
    if where is None:
        return ""
    if where.file != file:
        return f"{where}: "
    return f"line {where.line}: " if where.line is not None else ""


def _finding_lines(page: Page, findings: Sequence[Finding], file: str | None = None) -> None:
    for finding in findings:
        where = _place(finding, file)
        page.line(
            (f"{finding.severity} {finding.code}", STYLE[finding.severity]),
            f"  {where}{finding.message}",
            indent=2,
        )
        if finding.help:
            page.line((finding.help, "dim"), indent=6)


def show_remedies(page: Page, remedies: Sequence[Remedy]) -> None:
    if not remedies:
        return
    page.blank()
    page.line(("What would help, in order", "bold"))
    _remedy_table(page, remedies)


MOST_CHANGE = 34
"""Columns of a remedy's change that are kept when the line is short of them."""


def _remedy_table(page: Page, remedies: Sequence[Remedy], indent: int = 2) -> None:
    columns = ("change", "saves GiB", "alone", "then", "cost")
    table = grid(*((name, "right" if name == "saves GiB" else "left") for name in columns))
    changes = [change_text(r.in_file or r.change, separator="\n") for r in remedies]
    if page.console.width >= 80:  # a key in two halves reads badly: the cost is what wraps
        longest = max(len(line) for change in changes for line in change.splitlines())
        table.columns[0].width = kept = min(longest, MOST_CHANGE)
        others = indent + kept + len("  saves GiB  alone  fits  ")
        table.columns[-1].max_width = page.console.width - others
    for remedy, change in zip(remedies, changes, strict=True):
        verdicts = (remedy.verdict_alone or "", remedy.verdict or "")
        table.add_row(
            change,
            gib(max(0, remedy.saves_bytes)),
            *(Text(verdict, STYLE.get(verdict, "")) for verdict in verdicts),
            Text(remedy.costs, "dim"),
        )
    page.add(table, indent)


def show_assumptions(
    page: Page, assumptions: Sequence[Assumption], *, explain: bool = False
) -> None:
    """What was filled in. ``explain`` adds where each value was read."""
    if not assumptions:
        return
    page.blank()
    page.line(("Assumed, because it was not given", "bold"))
    groups: dict[str, list[str]] = {}
    for assumption in assumptions:
        said = f"{assumption.key} = {plain_value(assumption.value)}"
        groups.setdefault(assumption.source, []).append(said)
    if not explain:
        page.line(", ".join(said for all_said in groups.values() for said in all_said), indent=2)
        page.line(("--explain says where each was read", "dim"), indent=2)
        return
    for source, all_said in sorted(groups.items(), key=lambda group: -len(group[1])):
        page.line(", ".join(all_said), indent=2)
        page.line((source, "dim"), indent=6)


def render_check(
    check: CheckReport, *, width: int = 80, colour: bool = False, explain: bool = False
) -> str:
    """Every checked file: verdict, peak and its phase, the three largest terms, findings.

    ``explain``: every term, with its formula and source, and where each assumption was read.
    """
    page = Page(width, colour)
    if not check.results:
        page.line(("nothing got worse than the baseline", STYLE["fits"]))
        return page.text()
    for file, report in check.results:
        verdict = report.verdict or "unknown"
        page.line((file, "bold"), "  ", (VERDICTS[verdict], STYLE[verdict]))
        if report.model is not None:
            page.line((f"{headline(report)}, {job_line(report)}", "dim"), indent=2)
        peak = report.device_bytes or report.allocated_bytes
        if peak is not None:
            usable = " GiB"
            if report.gpu is not None:
                usable = f" of {gib(report.gpu.usable_bytes)} GiB usable on {report.gpu.name}"
                usable += f" x {report.gpu.count}" if report.gpu.count > 1 else ""
            at = f", peak in {report.peak_phase}" if report.peak_phase else ""
            spread = f"{gib(peak.low)} to {gib(peak.high)}"
            page.line(f"{gib(peak.expected)} ({spread}){usable}{at}", indent=2)
        largest = sorted((t for t in report.terms if t.at_peak), key=lambda t: -t.bytes)[:3]
        if explain and report.terms:
            _explained_terms(page, report.terms)
        elif largest:
            page.line(
                "largest: " + ", ".join(f"{t.name} {gib(t.bytes)} GiB" for t in largest), indent=2
            )
        _finding_lines(page, report.findings, file)
        if report.remedies:
            page.line("would help, in order:", indent=2)
            _remedy_table(page, report.remedies, indent=4)
        if explain:
            show_assumptions(page, report.assumptions, explain=True)
        page.blank()
    counts = {v: sum(r.verdict == v for _, r in check.results) for v in VERDICTS}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    files = len(check.results)
    page.line((f"{files} file{'s' if files != 1 else ''}: {summary}", STYLE[check.verdict]))
    return page.text()


def render_rows(
    rows: Sequence[Mapping[str, Any]],
    *,
    columns: Sequence[str],
    title: str = "",
    width: int = 80,
    colour: bool = False,
) -> str:
    """A catalogue: one line per row; numbers to the right."""
    page = Page(width, colour)
    if title:
        page.line((title, "bold"))
        page.blank()
    numeric = {c for c in columns if all(_is_numeric(row.get(c)) for row in rows)}
    table = grid(*((c.replace("_", " "), "right" if c in numeric else "left") for c in columns))
    for row in rows:
        table.add_row(*(_cell(column, row.get(column)) for column in columns))
    page.add(table, indent=0)
    return page.text()


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    return short_source(value) if column == "source" else str(value)


def _is_numeric(value: Any) -> bool:
    return value is None or re.fullmatch(r"~?[0-9][0-9.,]*( [KMBT%])?", str(value)) is not None
