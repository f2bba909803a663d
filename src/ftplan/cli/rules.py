"""``ftplan rules``: the rules by which ``advise`` decides."""

from __future__ import annotations

from typing import Any

from ftplan.cli.catalogue import QueryArgument, print_rows
from ftplan.cli.output import FormatOption, OutputOption


def rules(
    *, query: QueryArgument = "", format: FormatOption = "table", output: OutputOption = None
) -> int:
    """The rules of advise, with their strength and sources."""
    import difflib

    from ftplan.advise import RULES
    from ftplan.advise import rules as search
    from ftplan.errors import UnknownNameError

    found = search(query)
    if not found:
        raise UnknownNameError(
            "rule",
            query,
            suggestions=difflib.get_close_matches(query.upper(), RULES, n=3),
            remedy="`ftplan rules` lists them all",
        )
    rows = [
        {
            "code": rule.code,
            "title": rule.title,
            "checks": rule.checks,
            "step": rule.step,
            "blocks": list(rule.blocks),
            "reason": rule.reason,
            "strength": rule.strength,
            "stop_when": rule.stop_when,
            "flips_if": rule.flips_if,
            "sources": [{"mark": s.mark, "text": s.text} for s in rule.sources],
        }
        for rule in found
    ]

    def shown(row: dict[str, Any]) -> dict[str, Any]:
        step = row["step"] or ("closes " + ", ".join(row["blocks"][:2]) if row["blocks"] else "-")
        return {
            "code": row["code"],
            "": row["strength"],
            "title": row["title"],
            "step": step,
        }

    return print_rows("rules", rows, shown, format=format, output=output)
