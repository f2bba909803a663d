"""``ftplan gpus``: the catalogue of GPUs."""

from __future__ import annotations

from typing import Any

from ftplan.cli.catalogue import QueryArgument, print_rows, search_or_suggest
from ftplan.cli.output import FormatOption, OutputOption


def gpus(
    *, query: QueryArgument = "", format: FormatOption = "table", output: OutputOption = None
) -> int:
    """GPUs, what the driver lets a program use of them, and their speed."""
    from ftplan.catalog.gpus import find_gpu, search_gpus
    from ftplan.units import GIB

    def shown(row: Any) -> dict[str, Any]:
        rate = row.flops.get("bf16") or row.flops.get("fp16")
        usable = f"{row.usable_bytes / GIB:.2f}"
        return {
            "name": row.name,
            "usable GiB": usable if row.usable_from == "driver" else f"~{usable}",
            "bf16 TFLOPS": f"{rate / 1e12:.0f}" if rate else None,
            "GB/s": round(row.bandwidth_bytes_per_s / 10**9),
            "source": row.source,
        }

    rows = search_or_suggest(query, search_gpus, find_gpu)
    return print_rows("gpus", rows, shown, format=format, output=output)
