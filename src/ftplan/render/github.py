"""GitHub Actions: workflow commands that become annotations, and the step's summary."""

from __future__ import annotations

from ftplan.render import markdown
from ftplan.render.findings import Placed, placed, relative
from ftplan.report import CheckReport

__all__ = ["ANNOTATIONS_PER_STEP", "SUMMARY_BYTES", "render_check", "summary"]

ANNOTATIONS_PER_STEP = 10
"""GitHub shows ten annotations of a step and drops the rest without a word."""
SUMMARY_BYTES = 1024 * 1024
"""A longer summary is not shown at all."""
_LEVEL = {"error": "error", "warning": "warning", "info": "notice"}
_RANK = {"error": 0, "warning": 1, "info": 2}


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _command(item: Placed, base: str) -> str:
    finding = item.finding
    message = finding.message + (f"\nhelp: {finding.help}" if finding.help else "")
    return (
        f"::{_LEVEL[finding.severity]} title={_property(f'ftplan ({finding.code})')},"
        f"file={_property(relative(item.file, base))},line={item.line},col={item.column}"
        f"::{_data(message)}"
    )


def render_check(check: CheckReport, *, base: str = "") -> str:
    """At most ten workflow commands: the worst finding of each file first, then the others.

    What is left out is in :func:`summary`, and the last line says how much that is.
    """
    first: list[Placed] = []
    rest: list[Placed] = []
    for file, report in check.results:
        found = placed(file, report)
        first += found[:1]
        rest += found[1:]
    ranked = [sorted(items, key=lambda i: _RANK[i.finding.severity]) for items in (first, rest)]
    everything = ranked[0] + ranked[1]
    lines = [_command(item, base) for item in everything[:ANNOTATIONS_PER_STEP]]
    left = len(everything) - len(lines)
    lines.append(f"ftplan: {check.verdict}, {len(check.results)} file(s)")
    if left:
        lines[-1] += f", {left} more finding(s) in the step summary"
    return "\n".join(lines) + "\n"


def summary(check: CheckReport, *, limit: int = SUMMARY_BYTES) -> str:
    """The step summary in Markdown, shortened to ``limit`` bytes when it has to be."""
    text = markdown.render_check(check) + "\n"
    if len(text.encode()) <= limit:
        return text
    note = "\n\n_The summary was longer than GitHub shows; `--format json` has all of it._\n"
    if limit < len(note.encode()):
        return ""
    cut = text.encode()[: max(0, limit - len(note.encode()))].decode(errors="ignore")
    return cut[: cut.rfind("\n") + 1] + note
