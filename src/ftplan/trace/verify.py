"""The ledger against a witness: torch's own MemTracker watching the very same run.

    python -m ftplan.trace.verify [--out validation/mem_tracker.json]

The witness counts storages by its own code (torch.distributed._tools.mem_tracker). It does not
know that step counters live on the host, so jobs are taken whose optimizer keeps none there.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ftplan.trace.core import trace_job, versions
from ftplan.trace.job import plan_from, resolve

__all__ = ["JOBS", "against_mem_tracker", "main"]

Mapping = dict[str, Any]

_LORA: Mapping = {"kind": "lora", "rank": 16, "targets": "all-linear"}
_SMALL: Mapping = {"micro": 2, "seq_len": 512}
JOBS: tuple[tuple[str, Mapping], ...] = (
    ("llama-3.2-1b", {"method": {"kind": "full"}}),
    ("llama-3.2-1b", {"method": _LORA, "gradient_checkpointing": True}),
    (
        "llama-2-7b",
        {"method": {"kind": "full"}, "precision": {"weights": "fp32", "mixed": "bf16"}},
    ),
    ("llama-2-7b", {"method": _LORA, "precision": {"weights": "bf16", "mixed": "bf16"}}),
    ("qwen2.5-0.5b", {"method": {"kind": "full"}, "attention": "eager"}),
    ("gpt2", {"method": {"kind": "full"}, "precision": {"weights": "fp32"}}),
    (
        "mistral-7b-v0.1",
        {
            "method": {**_LORA, "kind": "qlora", "prepare_kbit": True},
            "precision": {"weights": "nf4", "mixed": "bf16"},
            "gradient_checkpointing": True,
        },
    ),
    ("olmoe-1b-7b", {"method": {"kind": "full"}, "optimizer": "sgd"}),
    ("t5-base", {"method": _LORA}),
    ("bert-base", {"method": {"kind": "partial", "last_layers": 2}}),
)
"""Catalogue name and plan of each verified job; two layers of each model."""


def against_mem_tracker(plan: Mapping, config: Mapping, layers: int = 2) -> tuple[int, int]:
    """(ledger's peak, MemTracker's peak) over the run, in bytes."""
    from torch.distributed._tools.mem_tracker import MemTracker

    trackers: list[Any] = []

    class Witness(MemTracker):
        # its hooks on gradients only name them, and cannot be set on frozen parameters
        def _track_module_params_and_buffers(
            self, module: Any, install_grad_hooks: bool = True
        ) -> Any:
            return super()._track_module_params_and_buffers(module, install_grad_hooks=False)

    def witness(model: Any) -> Any:
        tracker = Witness()
        tracker.track_external(model, *_scales(model))
        trackers.append(tracker)
        return tracker

    job = resolve(plan_from({"model": "verified", "batch": _SMALL, **plan}))
    result = trace_job(job, config, layers=layers, around=witness)
    begin = next(clock for clock, step, _ in result.marks if step == 1)
    ours = max(live for clock, live in result.curve if clock >= begin)
    snapshot = trackers[0].get_tracker_snapshot("peak")
    theirs = snapshot[torch.device("cpu")]["Total"]
    return ours, int(theirs)


def _scales(model: Any) -> list[Any]:
    """The statistics of quantised weights, which are no parameters."""
    found: dict[int, Any] = {}
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            for tensor in (getattr(part, name, None) for name in ("absmax", "code", "offset")):
                if isinstance(tensor, torch.Tensor):
                    found[id(tensor)] = tensor
    return list(found.values())


def main() -> None:
    """Verify the jobs and write what was found."""
    from ftplan.trace.bench import catalogue

    parser = argparse.ArgumentParser(prog="python -m ftplan.trace.verify", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("validation/mem_tracker.json"))
    options = parser.parse_args()
    configs = catalogue()
    rows = []
    for name, plan in JOBS:
        ours, theirs = against_mem_tracker(plan, configs[name])
        print(f"{name}: {ours:,} and {theirs:,}: {ours - theirs:+,}", file=sys.stderr, flush=True)
        rows.append({"model": name, "plan": plan, "ledger_bytes": ours, "witness_bytes": theirs})
    document = {"versions": versions(), "layers": 2, "batch": _SMALL, "jobs": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
