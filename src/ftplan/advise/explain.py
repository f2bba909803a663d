"""A rule's page, as headings and paragraphs: ``ftplan explain`` and the docs print the same."""

from __future__ import annotations

import difflib

from ftplan.advice import TITLES
from ftplan.advise.rules import MARKS, RULES, STRENGTHS, describe_case
from ftplan.dataclass import dataclass
from ftplan.errors import UnknownNameError

__all__ = ["HEADINGS", "Page", "Section", "explain_page"]

HEADINGS = (
    "What it checks",
    "What follows",
    "Why",
    "Source",
    "Strength",
    "Stop when",
    "What flips it",
    "Example that fires it",
    "Example that does not",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One heading and its text."""

    heading: str
    text: str
    code: bool = False
    """The text is YAML, to be shown as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """All there is to say about one rule."""

    code: str
    title: str
    sections: tuple[Section, ...]

    def markdown(self) -> str:
        """The page as Markdown, with a final newline."""
        blocks = [f"# {self.code}: {self.title}"]
        for section in self.sections:
            body = f"```yaml\n{section.text}\n```" if section.code else section.text
            blocks.append(f"## {section.heading}\n\n{body}")
        return "\n\n".join(blocks) + "\n"


def explain_page(code: str) -> Page:
    """The page of a rule. Raises :class:`UnknownNameError` with the nearest codes."""
    rule = RULES.get(code.strip().upper())
    if rule is None:
        raise UnknownNameError(
            "rule",
            code,
            suggestions=difflib.get_close_matches(code.upper(), RULES, n=3),
            remedy="`ftplan rules` lists them all",
        )
    follows = []
    if rule.step is not None:
        follows.append(f"Step `{rule.step}`: {TITLES[rule.step]}.")
    if rule.blocks:
        follows.append("Closed until then: " + ", ".join(f"`{step}`" for step in rule.blocks) + ".")
    sources = "\n".join(f"- {s.text} [{s.mark}: {MARKS[s.mark]}]" for s in rule.sources)
    texts = (
        rule.checks,
        " ".join(follows) or "It classifies or warns; no step follows from it alone.",
        rule.reason,
        sources,
        f"{rule.strength}: {STRENGTHS[rule.strength]}.",
        _sentence(rule.stop_when, "It has no stop of its own."),
        _sentence(rule.flips_if, "Nothing."),
        describe_case(rule.fires),
        describe_case(rule.rests),
    )
    return Page(
        code=rule.code,
        title=rule.title,
        sections=tuple(
            Section(heading=heading, text=text, code=heading.startswith("Example"))
            for heading, text in zip(HEADINGS, texts, strict=True)
        ),
    )


def _sentence(text: str, empty: str) -> str:
    if text in ("-", ""):
        return empty
    return text[0].upper() + text[1:] + "."
