"""``ftplan models``: the catalogue of models."""

from __future__ import annotations

from typing import Any

from ftplan.cli.catalogue import QueryArgument, print_rows, search_or_suggest
from ftplan.cli.output import FormatOption, OutputOption


def models(
    *, query: QueryArgument = "", format: FormatOption = "table", output: OutputOption = None
) -> int:
    """Models whose shape is known, each with its source."""
    from ftplan.catalog.models import find_model, search_models
    from ftplan.units import format_count

    def shown(row: Any) -> dict[str, Any]:
        total = row.total_params or round(float(row.published_params_approx))
        return {"name": row.name, "parameters": format_count(total), "source": row.source}

    rows = search_or_suggest(query, search_models, find_model)
    return print_rows("models", rows, shown, format=format, output=output)
