"""How fast things are, as ratios to what any program must pay. It asserts nothing.

Run: python benchmarks/run.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from statistics import median

import ftplan
from ftplan.front.assembling import job_of
from ftplan.front.resolve import resolve
from ftplan.memory.estimate import Structure
from ftplan.memory.terms import all_terms
from ftplan.report import Report
from ftplan.spec import (
    Batch,
    Checkpointing,
    Hardware,
    Method,
    Model,
    Plan,
    Precision,
    Sharding,
)

PLAN = Plan(
    model=Model(name="llama-3.1-8b"),
    stack="transformers",
    method=Method(kind="lora", rank=16, targets="all-linear"),
    precision=Precision(weights="bf16"),
    batch=Batch(micro=2, seq_len=2048),
    gradient_checkpointing=Checkpointing(),
)
SHARDED = replace(
    PLAN, hardware=Hardware(gpu="h100-80gb", count=8), sharding=Sharding(kind="zero3")
)
"""The same under ZeRO-3, where every layer's weights come and go."""
MEMORY = ["memory", "--model", "llama-3.1-8b", "--method", "lora", "--gpu", "a100-80gb"]
COMMANDS = {
    "import ftplan": ["-c", "import ftplan"],
    "ftplan --version": ["-m", "ftplan", "--version"],
    "ftplan memory --params 13e9": ["-m", "ftplan", "memory", "--params", "13e9"],
    "ftplan memory, 8B LoRA": ["-m", "ftplan", *MEMORY],
    "ftplan memory, a plan file": ["-m", "ftplan", "memory", "examples/plan-qlora-8b.yaml"],
}
PRICES = {
    "a10g-24gb": 1.0, "l4-24gb": 0.7, "l40s-48gb": 1.6, "a100-40gb": 1.5, "a100-80gb": 2.0,
    "h100-80gb": 3.0, "h200-141gb": 4.0, "rtx-4090-24gb": 0.5,
}  # fmt: skip
"""Any: a search without them looks at fewer cards."""
REPEATS = 9
SECONDS = 0.5


def started(arguments: list[str], bytecode: str) -> float:
    """Median seconds of a fresh interpreter with these arguments.

    Modules are compiled before, as an installer does: without it Python compiles them every time
    where the environment forbids it to keep what it compiled.
    """
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    taken = []
    for _ in range(1 + REPEATS):
        before = time.perf_counter()
        subprocess.run(
            [sys.executable, *arguments], check=True, capture_output=True, env=environment
        )
        taken.append(time.perf_counter() - before)
    return median(taken[1:])


def per_second(call: Callable[[int], object]) -> float:
    """Calls a second of this process's own time, the best of a few rounds."""
    best = 0.0
    for _ in range(REPEATS):
        number, before = 0, time.process_time()
        while (spent := time.process_time() - before) < SECONDS / REPEATS or number < 2:
            call(number)
            number += 1
        best = max(best, number / spent)
    return best


def reports(plan: Plan) -> float:
    """Reports a second. Each is of another length, so that none has a record to go by."""
    lengths = count(512)

    def report(_: int) -> Report:
        return ftplan.estimate(replace(plan, batch=replace(plan.batch, seq_len=next(lengths))))

    return per_second(report)


def searched(plan: Plan) -> float:
    """Plans a second that a search chooses from."""
    before = time.process_time()
    answer = ftplan.fit(plan, prices=PRICES)
    return answer.candidates / (time.process_time() - before)


def main() -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory() as bytecode:
        bare = started(["-c", "pass"], bytecode)
        print(f"{'bare python':32} {1000 * bare:8.0f} ms")
        for name, arguments in COMMANDS.items():
            taken = started(arguments, bytecode)
            print(f"{name:32} {1000 * taken:8.0f} ms {taken / bare:6.1f} x bare python")
    job = job_of(resolve(PLAN))
    structure = Structure(job)
    recorded = per_second(lambda _: Structure(job))
    peaks = per_second(lambda n: structure.peak(1 + n % 8, 512 + n))
    terms = per_second(lambda n: all_terms(structure.at(1 + n % 8, 512 + n), 0))
    print(f"{'steps recorded':32} {recorded:8.0f} a second")
    print(f"{'peaks of a recorded step':32} {peaks:8.0f} a second {peaks / 10_000:6.1f} x 10,000")
    print(f"{'their terms':32} {terms:8.0f} a second {terms / 1000:6.1f} x 1,000")
    plain, sharded = reports(PLAN), reports(SHARDED)
    print(f"{'reports':32} {plain:8.0f} a second")
    print(f"{'... under ZeRO-3':32} {sharded:8.0f} a second {plain / sharded:6.1f} x slower")
    plain, sharded = (
        searched(Plan(model=plan.model, hardware=plan.hardware, sharding=plan.sharding))
        for plan in (PLAN, SHARDED)
    )
    print(f"{'plans searched':32} {plain:8.0f} a second {plain / 20_000:6.1f} x 20,000")
    print(f"{'... under ZeRO-3':32} {sharded:8.0f} a second {plain / sharded:6.1f} x slower")


if __name__ == "__main__":
    main()
