"""A summary of training data, on the screen and in Markdown."""

from __future__ import annotations

from ftplan.fitting import DataSummary
from ftplan.render.markdown import escape
from ftplan.render.markdown import table as markdown_table
from ftplan.render.table import Page, grid, show_findings
from ftplan.units import format_bytes, format_count

__all__ = ["render", "render_markdown"]

_WIDTH = 30


def _rows(summary: DataSummary) -> list[tuple[str, str]]:
    tokens = summary.tokens
    counted = format_count(round(tokens.expected))
    if not summary.is_exact:
        low, high = format_count(round(tokens.low)), format_count(round(tokens.high))
        counted += f" ({low} to {high})"
    complete = "" if summary.duplicates_are_complete else " at least"
    sequences = sum(count for _, count in summary.histogram)
    return [
        ("examples", f"{summary.examples:,}, {summary.format}"),
        ("tokens", counted),
        (
            "lengths",
            f"median {summary.median_tokens:,}, 95% {summary.p95_tokens:,}, "
            f"99% {summary.p99_tokens:,}",
        ),
        ("longest", f"{summary.longest_tokens:,} tokens, line {summary.longest_line}"),
        (
            f"cut at {summary.seq_len:,}",
            f"{summary.truncated_examples:,} ({summary.truncated_examples / sequences:.1%}), "
            f"{summary.lost_tokens_share:.1%} of the tokens",
        ),
        (
            "padded",
            f"{summary.padded_efficiency:.0%} of the tokens are real; "
            f"{summary.batch_efficiency:.0%} to the longest of {summary.batch}",
        ),
        (
            "packed",
            f"{summary.packing_efficiency:.0%} are, in {summary.packed_sequences:,} sequences",
        ),
        ("copies", f"{summary.duplicates:,}{complete}"),
        ("empty answers", f"{summary.empty_targets:,}"),
    ]


def render(summary: DataSummary, *, width: int = 80, colour: bool = False) -> str:
    """The summary on the screen, with a chart of the lengths."""
    page = Page(width, colour)
    page.line((summary.file, "bold"), f"  {format_bytes(summary.bytes)}")
    table = grid(("", "left"), ("", "left"))
    for cells in _rows(summary):
        table.add_row(*cells)
    page.add(table)
    page.line((f"counted by: {summary.counted_by}", "dim"), indent=2)
    page.blank()
    page.line(("Lengths in tokens", "bold"))
    most = max(count for _, count in summary.histogram)
    chart = grid(("up to", "right"), ("", "left"), ("", "right"))
    for edge, count in summary.histogram:
        bar = "#" * max(bool(count), round(_WIDTH * count / most))
        chart.add_row(f"{edge:,}", bar, f"{count:,}")
    page.add(chart)
    show_findings(page, summary.findings)
    return page.text()


def render_markdown(summary: DataSummary) -> str:
    """The summary as Markdown tables."""
    rows = [(escape(name), escape(value)) for name, value in _rows(summary)]
    lengths = [(f"{edge:,}", f"{count:,}") for edge, count in summary.histogram]
    parts = [
        f"## {escape(summary.file)}\n",
        markdown_table(("", "value"), rows),
        f"Counted by: {escape(summary.counted_by)}\n",
        markdown_table(("up to tokens", "examples"), lengths, right=(0, 1)),
    ]
    parts += [f"- {f.severity} {f.code}: {escape(f.message)}" for f in summary.findings]
    return "\n".join(parts)
