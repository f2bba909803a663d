"""Random jobs through the trace and through the walk: where do they part?

    python -m ftplan.trace.differential [--seed 0] [--minutes 10] [--shapes tests/cases/families]
        [--only gemma2 ...] [--log found.jsonl]

Each draw takes a shape (a small config of tests/cases, or one of the catalogue cut to a few
layers), changes what moves no other size, and draws a plan for it. What the walk refuses is
counted and named; the worst jobs are printed at the end with all that is needed to run them again.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

import argparse
import collections
import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.errors import FtplanError

__all__ = ["Found", "draw", "predict", "shapes", "truth"]

Draw = Mapping[str, Any]

LENGTHS = (48, 64, 96, 127, 160, 200, 256, 333, 384, 512, 700, 1024)
MICRO = (1, 1, 2, 2, 3, 4, 8)
OPTIMIZERS = (
    "adamw_torch_fused", "adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit",
    "sgd", "sgd_momentum", "adafactor", "adagrad", "rmsprop",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One draw and what came of it."""

    name: str
    plan: Draw
    config: Draw
    layers: int
    true_bytes: int = 0
    predicted_bytes: int = 0
    refused: str = ""

    @property
    def error(self) -> float:
        """The walk's error as a share of the truth."""
        return self.predicted_bytes / self.true_bytes - 1 if self.true_bytes else 0.0


def shapes(folder: Path | None) -> dict[str, tuple[dict[str, Any], int]]:
    """Configs by name, and how many layers of each are kept (0: all)."""
    if folder is not None:
        files = sorted(folder.glob("*.json"))
        return {path.stem: (json.loads(path.read_text())["config"], 0) for path in files}
    from ftplan.trace.bench import catalogue

    return {name: (dict(config), 2) for name, config in catalogue().items()}


def draw(dice: random.Random, config: Draw) -> tuple[dict[str, Any], dict[str, Any]]:
    """A plan, and the config with what may be changed alone."""
    changed = dict(config)
    if isinstance(changed.get("vocab_size"), int):
        changed["vocab_size"] = max(changed["vocab_size"], dice.choice((1000, 5003, 32000)))
    for key in ("attention_dropout", "hidden_dropout_prob", "resid_pdrop", "dropout"):
        if key in changed:
            changed[key] = dice.choice((0.0, 0.1))
    method, precision = _method(dice)
    plan: dict[str, Any] = {
        "version": 1, "model": "drawn", "stack": "transformers", "task": "sft",
        "method": method, "precision": precision,
        "batch": {
            "micro": dice.choice(MICRO), "seq_len": dice.choice(LENGTHS),
            "accumulation": dice.choice((1, 1, 1, 2)),
            "padding": dice.choice(("none", "none", "right")),
        },
        "optimizer": dice.choice(OPTIMIZERS),
        "gradient_checkpointing": _checkpointing(dice),
        "attention": dice.choice(("sdpa", "sdpa", "eager", "flash")),
        "loss": "full", "sharding": {"kind": "none"},
        "hardware": {"gpu": "a100-80gb", "count": 1},
    }  # fmt: skip
    if precision.get("mixed") == "fp16":
        plan["hardware"]["gpu"] = "t4-16gb"
        plan["attention"] = dice.choice(("sdpa", "eager"))
    elif dice.random() < 0.2:
        plan["hardware"]["gpu"] = "h100-80gb"
    if plan["attention"] == "flash" and precision["weights"] == "fp32" and "mixed" not in precision:
        plan["attention"] = "sdpa"  # flash wants halves
    return plan, changed


def _method(dice: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    floats: tuple[dict[str, Any], ...] = (
        {"weights": "bf16"}, {"weights": "bf16", "mixed": "bf16"},
        {"weights": "fp32", "mixed": "bf16"}, {"weights": "fp32", "mixed": "fp16"},
        {"weights": "fp32"},
    )  # fmt: skip
    kind = dice.choice(
        ("full", "full", "partial", "lora", "lora", "lora", "qlora", "qlora", "dora")
    )
    if kind == "full":
        return {"kind": "full"}, dict(dice.choice(floats))
    if kind == "partial":
        return {"kind": "partial", "last_layers": 1}, dict(dice.choice(floats))
    method: dict[str, Any] = {
        "kind": kind, "rank": dice.choice((4, 8, 16, 64, 256)), "alpha": 16,
        "dropout": dice.choice((0.0, 0.0, 0.05)),
        "targets": dice.choice(("all-linear", "all-linear", "attention")),
        "adapter_dtype": dice.choice(("fp32", "fp32", "bf16")),
    }  # fmt: skip
    if dice.random() < 0.2:
        method["use_rslora"] = True
    if kind == "qlora":
        method["prepare_kbit"] = dice.random() < 0.7
        method["double_quant"] = dice.random() < 0.5
        weights = dice.choice(("nf4", "nf4", "fp4", "int8"))
        return method, {"weights": weights, "mixed": dice.choice(("bf16", "bf16", "no"))}
    return method, dict(dice.choice(floats[:3]))


def _checkpointing(dice: random.Random) -> Any:
    kind = dice.random()
    if kind < 0.4:
        return False
    if kind < 0.75:
        return True
    if kind < 0.9:
        return {"kind": "full", "every": 2}
    return {"kind": "full", "reentrant": True}


def truth(plan: Draw, config: Draw, layers: int) -> int:
    """The trace's peak in bytes."""
    from ftplan.trace.core import trace
    from ftplan.trace.job import plan_from

    return trace(plan_from(dict(plan)), dict(config), layers=layers or None).allocated_bytes


def predict(plan: Draw, config: Draw, layers: int) -> int:
    """The walk's peak in bytes."""
    from ftplan.files.document import parse_document
    from ftplan.files.plan import parse_plan
    from ftplan.front.assembling import job_of
    from ftplan.front.resolve import resolve
    from ftplan.memory.estimate import Structure
    from ftplan.trace.build import cut_depth

    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config))
        document = json.dumps({**plan, "model": {"config": str(file)}})
        parsed = parse_plan(parse_document(document, file="plan"))
        resolved = resolve(parsed, base=Path(folder))
    if layers:
        resolved = replace(resolved, config=cut_depth(dict(resolved.config or {}), layers))
    job = job_of(resolved)
    return Structure(job).at(job.micro, job.seq_len, job.loss_chunk).peak_bytes


def found(dice: random.Random, name: str, shape: tuple[dict[str, Any], int]) -> Found:
    """One draw for a shape, played both ways: the walk first, it is quick to refuse."""
    config, layers = shape
    plan, changed = draw(dice, config)
    drawn = Found(name=name, plan=plan, config=changed, layers=layers)
    try:
        drawn = replace(drawn, predicted_bytes=predict(plan, changed, layers))
    except FtplanError as error:
        return replace(drawn, refused=f"walk: {str(error).splitlines()[0]}")
    try:
        return replace(drawn, true_bytes=truth(plan, changed, layers))
    except Exception as error:  # whatever a library raises: this job cannot be run there either
        return replace(drawn, refused=f"trace: {type(error).__name__}: {str(error)[:90]}")


def drawn(seed: int, minutes: float, pool: Mapping[str, Any]) -> Iterator[Found]:
    """Draws until the time is over."""
    dice, stop = random.Random(seed), time.monotonic() + 60 * minutes
    names = sorted(pool)
    while time.monotonic() < stop:
        name = dice.choice(names)
        yield found(dice, name, pool[name])


def main() -> None:
    """Draw, print each job that is off, and the worst at the end."""
    import gc

    parser = argparse.ArgumentParser(
        prog="python -m ftplan.trace.differential", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--shapes", type=Path, help="a folder of cases; the catalogue otherwise")
    parser.add_argument("--only", nargs="*", help="names of shapes")
    parser.add_argument("--log", type=Path, help="append every draw as a line of JSON")
    options = parser.parse_args()
    pool = shapes(options.shapes)
    if options.only:
        pool = {name: pool[name] for name in options.only}
    done: list[Found] = []
    refusals: collections.Counter[str] = collections.Counter()
    for one in drawn(options.seed, options.minutes, pool):
        gc.collect()
        if options.log:
            fields = {name: getattr(one, name) for name in Found.__slots__}
            with options.log.open("a") as file:
                file.write(json.dumps(fields) + "\n")
        if one.refused:
            refusals[one.refused] += 1
            continue
        done.append(one)
        if abs(one.error) > 0.001:
            print(f"{one.error:+.3%} {one.name} {json.dumps(one.plan)}", flush=True)
    errors = sorted(abs(one.error) for one in done)
    if errors:
        worst = max(done, key=lambda one: abs(one.error))
        print(
            f"{len(done)} jobs: median {errors[len(errors) // 2]:.3%}, "
            f"95 % {errors[int(len(errors) * 0.95)]:.3%}, worst {worst.error:+.3%} ({worst.name})"
        )
    for reason, times in refusals.most_common():
        print(f"{times} refused: {reason}")


if __name__ == "__main__":
    main()
