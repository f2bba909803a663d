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


_FENCE = "```"


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
    sections = page_sections(name) if name else _contents()
    if format in ("json", "yaml"):
        from ftplan.render import json, yaml

        answer = {"schema_version": 1, **{title.lower(): text for title, text in sections}}
        emit(json.render(answer) if format == "json" else yaml.render(answer), output)
    else:
        emit(_text(sections, format == "markdown", output), output)
    return 0


def page_sections(name: str) -> list[tuple[str, str]]:
    """The page called ``name`` as (heading, text), the title first.

    Raises :class:`ftplan.errors.UnknownNameError` with the names that are near.
    """
    for look in (_rule, _finding, _written, _stack, _optimizer):
        found = look(name)
        if found is not None:
            return found
    from ftplan.catalog.pages import suggestions
    from ftplan.errors import UnknownNameError

    raise UnknownNameError(
        "page",
        name,
        suggestions=suggestions(name),
        remedy="`ftplan explain` lists the terms, `ftplan rules` the rules",
    )


def _rule(name: str) -> list[tuple[str, str]] | None:
    from ftplan.advise import RULES, explain_page

    if name.strip().upper() not in RULES:
        return None
    page = explain_page(name)
    sections = [(s.heading, _fenced(s.text) if s.code else s.text) for s in page.sections]
    return [("Name", page.code), ("Title", page.title), *sections]


def _fenced(text: str) -> str:
    return f"{_FENCE}yaml\n{text}\n{_FENCE}"


def _finding(name: str) -> list[tuple[str, str]] | None:
    from ftplan.trainers import finding_codes, finding_page

    if name.strip().upper() not in finding_codes():
        return None
    page = finding_page(name.strip().upper())
    return [
        ("Name", page.code),
        ("Title", page.title),
        ("What", page.what),
        ("Why", page.why),
        ("Fix", page.fix),
        ("Source", page.source),
    ]


def _written(name: str) -> list[tuple[str, str]] | None:
    from ftplan.catalog.pages import find_page

    page = find_page(name)
    if page is None:
        return None
    sections = [("Name", page.name), ("Title", page.title)]
    if page.formula not in ("", "none"):
        sections.append(("Formula", page.formula))
    return [*sections, ("Why", page.why), ("Source", page.source)]


def _stack(name: str) -> list[tuple[str, str]] | None:
    from ftplan.catalog.stacks import stack_page
    from ftplan.errors import FtplanError

    try:
        stack, rows = stack_page(name)
    except FtplanError:
        return None
    values = "\n".join(f"{row.key} = {row.value}  ({row.source})" for row in rows)
    return [
        ("Name", stack.name),
        ("Title", f"{stack.title} {stack.versions}"),
        ("Formula", values),
        ("Why", "These defaults hold wherever a plan of this stack says nothing else."),
        ("Source", "beside each value"),
    ]


def _optimizer(name: str) -> list[tuple[str, str]] | None:
    from ftplan.catalog.optimizers import find_optimizer
    from ftplan.errors import FtplanError

    try:
        row = find_optimizer(name)
    except FtplanError:
        return None
    states = ", ".join(f"{s.name} ({s.shape}, {s.dtype})" for s in row.states) or "none"
    return [
        ("Name", row.name),
        ("Title", getattr(row, "title", "") or f"The optimizer {row.name}"),
        ("Formula", f"states per trainable tensor: {states}"),
        ("Why", getattr(row, "notes", "") or "States are kept from the first step on."),
        ("Source", row.source),
    ]


def _contents() -> list[tuple[str, str]]:
    from ftplan.catalog.pages import all_pages

    kinds: dict[str, list[str]] = {}
    for page in all_pages():
        kinds.setdefault(page.kind, []).append(page.name)
    rows = [(f"{kind}s" if kind != "sharding" else kind, ", ".join(n)) for kind, n in kinds.items()]
    from ftplan.dtypes import format_names
    from ftplan.trainers import finding_codes

    return [
        ("Title", "What can be explained"),
        *((kind.capitalize(), names) for kind, names in rows),
        ("Findings of trainers' configs", ", ".join(finding_codes())),
        ("Formats", ", ".join(format_names())),
        ("And", "every rule of `ftplan rules`, every stack, every optimizer"),
    ]


def _text(sections: list[tuple[str, str]], markdown: bool, output: Path | None) -> str:
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
            if paragraph.startswith(_FENCE):
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
    from ftplan.render.findings import RuleText

    texts: dict[str, Any] = {}
    for code in codes:
        try:
            page = dict(page_sections(code))
        except UnknownNameError:
            continue
        texts[code] = RuleText(title=page.get("Title", code), text=page.get("Why", code))
    return texts
