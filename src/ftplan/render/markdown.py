"""Markdown: for pull requests, step summaries and issues."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
)
from ftplan.report import CheckReport, Finding, Remedy, Report

__all__ = ["render_check", "render_report", "render_rows", "table"]

_MARK = {"fits": "\u2705", "tight": "\u26a0\ufe0f", "over": "\u274c", "unknown": "\u2754"}


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line, inside a table cell too."""
    text = " ".join(str(text).split())
    text = re.sub(r"([\\`*_\[\]|])", r"\\\1", text)
    return text.replace("<", "&lt;").replace(">", "&gt;")


def code(text: str) -> str:
    """A code span that holds ``text``, whatever backticks are in it."""
    text = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()
) -> str:
    """A table; columns whose index is in ``right`` are numbers. Cells are Markdown already."""
    rule = ["---:" if index in right else "---" for index in range(len(headers))]
    lines = [headers, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def render_report(report: Report, *, explain: bool = False) -> str:
    """The answer for one job."""
    parts = [f"## {escape(headline(report))}\n"]
    parts.append(escape(job_line(report)) + "\n" if report.job else "")
    parts += _answer(report)
    ways = report.details.get("ways")
    if isinstance(ways, Sequence) and ways and not isinstance(ways, str):
        parts.append("### Finetuning the same model, without activations\n")
        columns = [key for key in ways[0] if key.endswith("_bytes")]
        rows = [(escape(str(w["name"])), *(gb(w[key]) for key in columns)) for w in ways]
        titles = ["", *(key.removesuffix("_bytes").replace("total", "in all") for key in columns)]
        parts.append(table(titles, rows, right=range(1, len(titles))))
    if report.terms:
        parts.append(f"### What it is made of{_at(report)}\n")
        parts.append(_terms(report, explain))
    if len(report.phases) > 1:
        parts.append("### Peak of each phase\n")
        rows = [(escape(phase.name), gib(phase.peak_bytes)) for phase in report.phases]
        parts.append(table(("phase", "GiB"), rows, right=(1,)))
    parts += _findings(report.findings)
    parts += remedy_lines(report.remedies)
    if report.assumptions:
        parts.append("### Assumed, because it was not given\n")
        parts.append(
            table(
                ("key", "value", "from"),
                [
                    (code(a.key), code(plain_value(a.value)), escape(a.source))
                    for a in report.assumptions
                ],
            )
        )
    return "\n".join(part for part in parts if part)


def _at(report: Report) -> str:
    return f" (at the peak, {report.peak_phase})" if report.peak_phase else ""


def _answer(report: Report) -> list[str]:
    parts = []
    if report.verdict is not None:
        gpu = f" {code(report.gpu.name)} x {report.gpu.count}" if report.gpu else ""
        parts.append(f"{_MARK[report.verdict]} **{VERDICTS[report.verdict]}**{gpu}\n")
    if report.allocated_bytes is None:
        return parts
    if is_textbook(report):
        weights = sum(t.bytes for t in report.terms if t.name.startswith("weights/"))
        total = gb(report.allocated_bytes.expected)
        parts.append(f"**{gb(weights)} of weights, {total} in all** (the textbook's sum)\n")
        return parts
    peak = report.device_bytes or report.allocated_bytes
    usable = f" of {gib(report.gpu.usable_bytes)} GiB usable" if report.gpu else ""
    parts.append(f"**{both_units(peak.expected)}** per GPU at the worst moment{usable}\n")
    rows = [
        (name, gib(i.low), gib(i.expected), gib(i.high), counter)
        for name, i, counter in (
            ("allocated", report.allocated_bytes, "`torch.cuda.max_memory_allocated()`"),
            ("reserved", report.reserved_bytes, "`torch.cuda.max_memory_reserved()`"),
            ("device", report.device_bytes, "`nvidia-smi`"),
            ("host", report.host_bytes, "host memory"),
        )
        if i is not None
    ]
    parts.append(table(("GiB", "low", "expected", "high", "counter"), rows, right=(1, 2, 3)))
    return parts


def _terms(report: Report, explain: bool) -> str:
    rows: list[tuple[str, ...]] = []
    total = report.total()
    for group, terms in group_terms(report.terms).items():
        if not explain:
            alive = [term for term in terms if term.at_peak]
            amount = sum(term.bytes for term in alive)
            if alive:
                share = f"{amount / total:.0%}" if total else ""
                rows.append((GROUPS.get(group, group), gib(amount), share))
        else:
            rows += [
                (
                    code(t.name),
                    gib(t.bytes),
                    "" if t.at_peak else "no",
                    code(t.formula),
                    escape(t.source),
                )
                for t in terms
            ]
    if explain:
        return table(("term", "GiB", "at peak", "formula", "source"), rows, right=(1,))
    rows.append(("**allocated**", f"**{gib(total)}**", ""))
    return table(("term", "GiB", "share"), rows, right=(1, 2))


def _findings(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return []
    lines = []
    for finding in findings:
        where = f" {code(str(finding.location))}" if finding.location else ""
        hint = f" _{escape(finding.help)}_" if finding.help else ""
        lines.append(
            f"- **{finding.severity} {finding.code}**{where} {escape(finding.message)}{hint}"
        )
    return ["### Findings\n", "\n".join(lines) + "\n"]


def remedy_lines(remedies: Sequence[Remedy]) -> list[str]:
    if not remedies:
        return []
    rows = [
        (
            code(change_text(r.in_file or r.change)),
            gib(max(0, r.saves_bytes)),
            r.verdict_alone or "",
            r.verdict or "",
            escape(r.costs),
        )
        for r in remedies
    ]
    head = ("change", "saves GiB", "alone", "then", "cost")
    return ["### What would help, in order\n", table(head, rows, right=(1,))]


def render_check(check: CheckReport) -> str:
    """Every checked file: one table, then what there is to say about each."""
    rows = []
    for file, report in check.results:
        peak = report.device_bytes or report.allocated_bytes
        verdict = report.verdict or "unknown"
        gpu = report.gpu
        rows.append(
            (
                code(file),
                f"{_MARK[verdict]} {verdict}",
                gib(peak.expected) if peak else "",
                gib(gpu.usable_bytes) if gpu else "",
                f"{escape(gpu.name)} x {gpu.count}" if gpu else "",
                escape(report.peak_phase or ""),
            )
        )
    if not rows:
        return "## ftplan: nothing got worse than the baseline\n"
    headers = ("file", "verdict", "peak GiB", "usable GiB", "GPU", "phase")
    parts = [f"## ftplan: {VERDICTS[check.verdict]}\n", table(headers, rows, right=(2, 3))]
    for file, report in check.results:
        body = _findings(report.findings) + remedy_lines(report.remedies)
        if body:
            parts.append(f"## {code(file)}\n")
            parts += body
    return "\n".join(parts)


def render_rows(
    rows: Sequence[Mapping[str, Any]], *, columns: Sequence[str], title: str = ""
) -> str:
    """A catalogue, or any list of mappings with the same keys."""
    numeric = [
        index
        for index, name in enumerate(columns)
        if all(isinstance(row.get(name), int | float | None) for row in rows)
    ]
    cells = [["" if row.get(c) is None else escape(str(row[c])) for c in columns] for row in rows]
    head = f"## {escape(title)}\n\n" if title else ""
    return head + table([c.replace("_", " ") for c in columns], cells, right=numeric)
