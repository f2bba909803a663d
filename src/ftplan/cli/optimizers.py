"""``ftplan optimizers``: the catalogue of optimizers."""

from __future__ import annotations

from typing import Any

from ftplan.cli.catalogue import QueryArgument, print_rows, search_or_suggest
from ftplan.cli.output import FormatOption, OutputOption


def optimizers(
    *, query: QueryArgument = "", format: FormatOption = "table", output: OutputOption = None
) -> int:
    """Optimizers, the states they keep, and their sources."""
    from ftplan.catalog.optimizers import find_optimizer, search_optimizers

    def shown(row: Any) -> dict[str, Any]:
        states = ", ".join(f"{s.name} {s.dtype}" for s in row.states) or "none"
        return {"name": row.name, "states": states, "source": row.source}

    rows = search_or_suggest(query, search_optimizers, find_optimizer)
    return print_rows("optimizers", rows, shown, format=format, output=output)
