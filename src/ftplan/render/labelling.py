"""The label screen: one failure as plain text, for a terminal of any width (80 over ssh).

Answers of a model are untrusted text: control characters are shown, never sent to the terminal.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from ftplan.results import Agreement, Check, ResultRow, Suggestion

__all__ = ["agreement_text", "failure_screen", "kinds_screen", "visible"]

_LINES = 8
"""Of each text, unless the user asks for more."""


def visible(text: str) -> str:
    """The text with control characters spelled out (`\\x1b`); newlines stay, tabs are spaces."""
    return "".join(
        each if each == "\n" or each.isprintable() else "    " if each == "\t" else _spelled(each)
        for each in text.replace("\r\n", "\n")
    )


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def failure_screen(
    row: ResultRow,
    suggestion: Suggestion,
    *,
    number: int,
    total: int,
    labelled: int,
    shortlist: Sequence[str],
    note: str | None = None,
    whole: bool = False,
    width: int = 80,
) -> str:
    """One failure: what was asked, answered and wanted, what the checks say, and the keys.

    ``whole`` cuts nothing.
    """
    head = f"failure {number} of {total}"
    state = f"{labelled} labelled"
    lines = ["-" * width, f"{head}  {visible(row.id)}  ({state})"]
    if row.variant:
        lines += _clipped(visible(row.variant), width, 2, prefix="from ")
    texts = [
        ("input", row.input),
        *((f"context {n}", text) for n, text in enumerate(row.contexts, start=1)),
        ("output", row.output),
        ("expected", row.expected),
    ]
    for label, text in texts:
        if text:
            limit = 10**9 if whole else _LINES // 2 if label.startswith("context") else _LINES
            lines += ["", f"{label}:", *_indented(text, width, limit)]
    if row.checks:
        lines += ["", "checks:", *(line for each in row.checks for line in _check(each, width))]
    if note:
        lines += ["", f"note: {visible(note)}"]
    lines += ["", *_suggestion(suggestion, width), *_keys(shortlist, width)]
    return "\n".join(lines) + "\n"


def _check(check: Check, width: int) -> list[str]:
    mark = {True: "pass", False: "FAIL", None: "?   "}[check.passed]
    score = "" if check.score is None else f" {check.score:g}"
    if check.threshold is not None and check.score is not None:
        score += f" (passes at {check.threshold:g}{', assumed' if check.threshold_assumed else ''})"
    said = check.error or check.reason
    why = f": {' '.join(visible(said).split())}" if said else ""
    return _clipped(f"{visible(check.name)}{score}{why}", width, 3, prefix=f"  {mark} ")


def _suggestion(suggestion: Suggestion, width: int) -> list[str]:
    if suggestion.kind:
        text = f"{visible(suggestion.kind)} - {' '.join(visible(suggestion.reason).split())}"
        lines = _clipped(text, width, 3, prefix="suggested: ")
    else:
        text = " ".join(visible(suggestion.reason).split())
        lines = _clipped(text, width, 3, prefix="no suggestion: ")
    if suggestion.ask:
        lines += _clipped(visible(suggestion.ask), width, 2, prefix="to find out: ")
    return lines


def _keys(shortlist: Sequence[str], width: int) -> list[str]:
    named = [f"{number} {visible(kind)}" for number, kind in enumerate(shortlist, start=1)]
    lines = textwrap.wrap(
        "   ".join(each.replace(" ", "\0") for each in named), width, break_on_hyphens=False
    )
    keys = "Enter accept  s skip  u undo  n NOTE  t TEST=pass|fail  m more  ? kinds  q quit"
    return [line.replace("\0", " ") for line in lines] + textwrap.wrap(keys, width)


def _indented(text: str, width: int, limit: int) -> list[str]:
    lines: list[str] = []
    for line in visible(text).split("\n"):
        lines += textwrap.wrap(line, width - 2, replace_whitespace=False) or [""]
        if len(lines) > limit:
            break
    if len(lines) > limit:
        lines = [*lines[: limit - 1], "... (m shows all)"]
    return [f"  {line}".rstrip() for line in lines]


def _clipped(text: str, width: int, limit: int, *, prefix: str = "") -> list[str]:
    return textwrap.wrap(
        prefix + text,
        width,
        subsequent_indent=" " * min(len(prefix), 8),
        max_lines=limit,
        placeholder=" ...",
        drop_whitespace=True,
    )


def kinds_screen(kinds: Mapping[str, Sequence[str]], help_text: str, *, width: int = 80) -> str:
    """All kinds by class, and the keys."""
    lines: list[str] = []
    for name, members in kinds.items():
        lines.append(f"{name}:")
        lines += textwrap.wrap(
            ", ".join(members), width, initial_indent="  ", subsequent_indent="  "
        )
    return "\n".join([*lines, "", help_text]) + "\n"


def agreement_text(agreement: Agreement, *, width: int = 80) -> str:
    """How far two annotators agree, and on which failures they do not."""
    first, second = agreement.names
    lines = [f"{first} and {second}: {agreement.items} failures labelled by both"]
    if agreement.items:
        lines += [
            f"  same kind   {agreement.same_kind} of {agreement.items}"
            f"   Cohen's kappa {_number(agreement.kappa_kind)}"
            f"   Gwet's AC1 {_number(agreement.ac1_kind)}",
            f"  same class  {agreement.same_class} of {agreement.items}"
            f"   Cohen's kappa {_number(agreement.kappa_class)}",
        ]
    lines += [
        f"  only {name}: {count}"
        for name, count in ((first, agreement.only_first), (second, agreement.only_second))
        if count
    ]
    if agreement.disagreements:
        lines += ["", "They differ on:"]
        for name, one, other in agreement.disagreements:
            text = f"{visible(name)}: {visible(one)} / {visible(other)}"
            lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2f}"
