"""``ftplan explain``: the page of a rule, a finding, a term, a format, a stack or an optimizer."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftplan.cli.output import FormatOption, OutputOption, emit, screen_width

if TYPE_CHECKING:
    from ftplan.render.findings import RuleText

__all__ = ["explain", "rule_texts"]


def explain(
    *,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="RAG002, FIT001, activations, nf4, axolotl, ...; left out: a list.",
            show_default=False,
        ),
    ] = "",
    format: FormatOption = "table",
    output: OutputOption = None,
) -> int:
    """What a rule, a finding, a term or a format means: formula, why, source."""
    from ftplan.front.explaining import contents
    from ftplan.front.explaining import explain as explain_page

    sections = explain_page(name) if name else contents()
    if format in ("json", "yaml"):
        from ftplan.render import json, yaml

        answer = {"schema_version": 1, **{title.lower(): text for title, text in sections}}
        emit(json.render(answer) if format == "json" else yaml.render(answer), output)
    else:
        emit(_text(sections, format == "markdown", output), output)
    return 0


def _text(sections: list[tuple[str, str]], markdown: bool, output: Path | None) -> str:
    from ftplan.front.explaining import FENCE

    found = dict(sections)
    title = " - ".join(part for part in (found.get("Name"), found.get("Title")) if part)
    lines = [f"# {title}" if markdown else title]
    width = screen_width(output)
    for heading, text in sections:
        if heading in ("Name", "Title"):
            continue
        lines += ["", f"## {heading}" if markdown else heading, ""]
        if not markdown:
            lines.pop()
        verbatim = False
        for paragraph in text.splitlines():
            if paragraph.startswith(FENCE):
                verbatim = not verbatim
                lines += [paragraph] if markdown else []
            elif markdown:
                is_plain = not (verbatim or paragraph.startswith("-"))
                lines.append(f"{paragraph}  " if is_plain else paragraph)
            elif verbatim:
                lines.append(f"  {paragraph}")
            else:
                lines += textwrap.wrap(
                    paragraph,
                    width - 2,
                    initial_indent="  ",
                    subsequent_indent="    " if paragraph.startswith("-") else "  ",
                    break_long_words=False,
                    break_on_hyphens=False,
                ) or [""]
    return "\n".join(line.rstrip() if not markdown else line for line in lines) + "\n"


def rule_texts(codes: Iterable[str]) -> Mapping[str, RuleText]:
    """What each code means, for formats that list their rules."""
    from ftplan.errors import UnknownNameError
    from ftplan.front.explaining import explain as explain_page
    from ftplan.render.findings import RuleText

    texts: dict[str, Any] = {}
    for code in codes:
        try:
            page = dict(explain_page(code))
        except UnknownNameError:
            continue
        texts[code] = RuleText(title=page.get("Title", code), text=page.get("Why", code))
    return texts
