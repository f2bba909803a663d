"""``python -m ftplan.trace``: trace a plan and list what is alive, for those who write formulas.

    python -m ftplan.trace '{model: x, method: {kind: lora, targets: attention}, ...}' \
        --config config.json [--arch NAME --shapes architectures.json] [--layers 4] \
        [--saved layers.1] [--alive] [--job] [--json]

The plan is a file or YAML given in place; ``model`` may be anything, as the shape is in --config.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import yaml


def _mapping(text: str) -> dict[str, Any]:
    path = Path(text)
    raw = path.read_text() if len(text) < 4096 and "{" not in text and path.exists() else text
    data = yaml.safe_load(raw)
    data.setdefault("model", "traced")
    return dict(data)


def main() -> None:
    """Parse, trace, print."""
    parser = argparse.ArgumentParser(prog="python -m ftplan.trace", description=__doc__)
    parser.add_argument("plan", help="plan file, or YAML in place")
    parser.add_argument("--config", help="config.json")
    parser.add_argument("--shapes", help="JSON of many shapes: {name: {config: {...}}}")
    parser.add_argument("--arch", help="the name in --shapes")
    parser.add_argument("--layers", type=int, help="cut the depth to this many layers")
    parser.add_argument("--saved", help="list what modules with this path keep for backward")
    parser.add_argument("--alive", type=int, nargs="?", const=40, help="the largest at the peak")
    parser.add_argument("--job", action="store_true", help="print the resolved job")
    parser.add_argument("--json", action="store_true", help="print totals as JSON")
    parser.add_argument("--full", action="store_true", help="run the first step as well")
    options = parser.parse_args()

    from ftplan.trace.core import trace
    from ftplan.trace.job import plan_from, resolve

    if options.config:
        config = json.loads(Path(options.config).read_text())
    else:
        config = json.loads(Path(options.shapes).read_text())[options.arch]["config"]
    plan = plan_from(_mapping(options.plan))
    started = time.time()
    result = trace(plan, config, layers=options.layers, full=options.full)
    tokens = (plan.batch.micro or 1) * (plan.batch.seq_len or 2048)
    if options.job:
        print(resolve(plan))
    if options.json:
        print(
            json.dumps(
                {
                    "allocated_bytes": result.allocated_bytes,
                    "peak_phase": result.peak_phase,
                    "phases": result.phases,
                    "at_peak": result.at_peak(),
                    "total_params": result.total_params,
                    "trainable_params": result.trainable_params,
                }
            )
        )
    else:
        print(f"allocated  {result.allocated_bytes:>16,}  peak in {result.peak_phase}")
        for phase, peak in result.phases.items():
            print(f"  {phase:<9}{peak:>16,}")
        print("alive at the peak:")
        for group, size in result.at_peak().items():
            print(f"  {group:<20}{size:>16,}")
        print(f"parameters {result.total_params:,}, trained {result.trainable_params:,}")
    if options.saved is not None:
        listed = result.saved(options.saved)
        print(f"\nsaved by {options.saved!r}: (bytes per token in the last column)")
        for entry in listed:
            print(
                f"  {entry.module:<46} {entry.op:<22} {entry.dtype:<9} "
                f"{entry.shape!s:<24} {entry.bytes:>13,} {entry.bytes / tokens:>10.2f}"
            )
        total = sum(entry.bytes for entry in listed)
        print(f"  total {total:,} bytes = {total / tokens:.3f} per token")
    if options.alive:
        print("\nlargest alive at the peak:")
        for entry in result.alive()[: options.alive]:
            print(
                f"  {result.group_of(entry):<18} {entry.phase:<9} {entry.module:<46} "
                f"{entry.op:<34} {entry.dtype:<9} {entry.shape!s:<24} {entry.bytes:>13,}"
            )
    print(f"{time.time() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
