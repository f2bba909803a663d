"""The bench of torchtitan: jobs as its users start them, run once by its own Trainer and committed.

    python -m ftplan.trace.bench_torchtitan [--out validation/trainers] [--only NAME ...]

One file for each version. A job that is there already is not run again (``--fresh``).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

__all__ = ["JOBS", "main", "record"]

Job = Mapping[str, Any]
"""A line of the bench: a user's command and the model's flavor, and the plan that means them."""


def _job(
    name: str, module: str, flavor: str, layers: int, *arguments: str, world: int = 8,
    shape: tuple[int, int] = (1, 1024), checkpointing: str = "selective", batches: int = 1,
    **plan: Any,
) -> Job:  # fmt: skip
    """``arguments`` are the user's beside those that say what the plan's own keys do."""
    micro, seq_len = shape
    tp = plan.get("sharding", {}).get("tp", 1)
    command = [
        "--module", module, "--config", _CONFIGS.get(flavor, _CONFIGS[module]),
        "--training.local_batch_size", str(micro), "--training.seq_len", str(seq_len),
        "--training.global_batch_size", str(micro * batches * world // tp),
        "--parallelism.spmd_backend", "partial_dtensor",  # the other one asks for a later torch
        *_UNLIKE.get(module, ()), *arguments, f"activation_checkpoint:{checkpointing}",
    ]  # fmt: skip
    sharding = {"kind": "fsdp", "version": 2, "reduce_dtype": "fp32", **plan.pop("sharding", {})}
    means = {
        "version": 1, "model": _MODELS[flavor], "stack": "torchtitan", "task": "pt",
        "method": {"kind": "full"}, "precision": {"weights": "fp32", "mixed": "bf16"},
        "batch": {"micro": micro, "seq_len": seq_len, "accumulation": batches},
        "optimizer": "adamw_torch_fused", "gradient_checkpointing": {"kind": checkpointing},
        "loss": "chunked", "hardware": {"gpu": "h100-80gb", "count": world}, "sharding": sharding,
        **plan,
    }  # fmt: skip
    line = {"name": f"torchtitan {name}", "flavor": flavor, "layers": layers}
    return {**line, "command": shlex.join(command), "plan": means}


_CONFIGS = {
    "llama3": "llama3_8b",
    "qwen3": "qwen3_14b",
    "30B-A3B": "qwen3_30b_a3b",
    "deepseek_v3": "deepseek_v3_16b",
}
"""Configurations of the trainer by module, or by flavor."""
_UNLIKE = {
    "deepseek_v3": (
        "--compile.no-enable", "--training.no-disable_cuda_graphs",
        "--parallelism.expert_parallel_degree", "1",
    ),
}  # fmt: skip
"""What its configuration says otherwise than the others."""
_MODELS = {
    "1B": "llama-3.2-1b", "3B": "llama-3.2-3b", "8B": "llama-3.1-8b", "70B": "llama-3.1-70b",
    "0.6B": "qwen3-0.6b", "1.7B": "qwen3-1.7b", "4B": "qwen3-4b", "14B": "qwen3-14b",
    "32B": "qwen3-32b", "30B-A3B": "qwen3-30b-a3b", "16B": "deepseek-v2-lite",
    "671B": "deepseek-v3",
}  # fmt: skip
"""Flavors by the names of the catalogue."""
_NEVER = "--parallelism.fsdp_reshard_after_forward never"


def _spread(ranks: int) -> tuple[str, ...]:
    """Expert parallelism, which CUDA graphs do not take."""
    return "--parallelism.expert_parallel_degree", str(ranks), "--training.disable_cuda_graphs"


def _split(ranks: int) -> tuple[str, str]:
    """Tensor parallelism, with the sequence split beside it."""
    return "--parallelism.tensor_parallel_degree", str(ranks)


JOBS: tuple[Job, ...] = (
    _job("selective", "llama3", "8B", 2),
    _job("full", "llama3", "8B", 3, shape=(2, 2048), checkpointing="full"),
    _job("none", "llama3", "8B", 2, shape=(1, 2048), checkpointing="none", world=2),
    _job("one-gpu", "llama3", "8B", 2, shape=(2, 2048), world=1),
    _job("one-gpu-none", "llama3", "8B", 3, checkpointing="none", world=1, shape=(1, 4096)),
    _job("tied", "llama3", "1B", 4, shape=(4, 1024)),
    _job("tied-full", "llama3", "3B", 3, shape=(2, 4096), checkpointing="full", world=16),
    _job("tied-one-gpu", "llama3", "1B", 4, shape=(4, 1024), world=1, checkpointing="none"),
    _job("qwen3", "qwen3", "14B", 2, shape=(1, 2048)),
    _job("qwen3-full", "qwen3", "32B", 3, shape=(2, 2048), checkpointing="full", world=64),
    _job("qwen3-none", "qwen3", "4B", 3, shape=(4, 1024), checkpointing="none", world=2),
    _job("qwen3-tied", "qwen3", "0.6B", 4, shape=(8, 1024)),
    _job("whole-loss", "llama3", "8B", 2, shape=(1, 4096), loss="full"),
    _job("whole-loss-tied", "qwen3", "1.7B", 4, shape=(2, 2048), loss="full", world=4,
         checkpointing="full"),
    _job("whole-loss-one-gpu", "llama3", "1B", 4, shape=(2, 2048), loss="full", world=1),
    _job("accumulated", "llama3", "8B", 2, shape=(1, 2048), batches=4),
    _job("accumulated-full", "qwen3", "0.6B", 3, shape=(4, 2048), batches=2, checkpointing="full"),
    _job("hybrid", "llama3", "8B", 2, "--parallelism.data_parallel_replicate_degree", "2",
         sharding={"dp_replicate": 2}),
    _job("kept", "llama3", "8B", 3, *shlex.split(_NEVER), shape=(2, 1024),
         sharding={"reshard_after_forward": False}),
    _job("bf16", "llama3", "8B", 3, "--training.dtype", "bfloat16", shape=(2, 2048),
         precision={"weights": "bf16", "mixed": "bf16"}),
    _job("fp32", "llama3", "1B", 3, "--training.mixed_precision_param", "float32",
         shape=(2, 1024), precision={"weights": "fp32", "mixed": "no"}),
    _job("deep", "llama3", "1B", 8, shape=(8, 2048), checkpointing="none", world=4),
    _job("deep-one-gpu", "qwen3", "0.6B", 9, shape=(16, 1024), loss="full", world=1),
    _job("deep-kept", "qwen3", "1.7B", 6, *shlex.split(_NEVER), shape=(4, 2048), world=32,
         sharding={"reshard_after_forward": False}, checkpointing="full"),
    _job("qwen3-bf16-one-gpu", "qwen3", "4B", 3, "--training.dtype", "bfloat16", world=1,
         shape=(2, 4096), precision={"weights": "bf16", "mixed": "bf16"}, checkpointing="none"),
    _job("hybrid-tied", "qwen3", "0.6B", 4, "--parallelism.data_parallel_replicate_degree", "4",
         shape=(8, 2048), sharding={"dp_replicate": 4}, loss="full", checkpointing="full"),
    _job("experts", "qwen3", "30B-A3B", 2, shape=(2, 1024)),
    _job("experts-full", "qwen3", "30B-A3B", 3, shape=(4, 2048), checkpointing="full", world=32),
    _job("experts-none", "qwen3", "30B-A3B", 2, shape=(2, 2048), checkpointing="none", world=2),
    _job("experts-one-gpu", "qwen3", "30B-A3B", 1, shape=(1, 4096), loss="full", world=1),
    _job("spread", "qwen3", "30B-A3B", 3, *_spread(8), shape=(2, 1024), world=16,
         sharding={"ep": 8}),
    _job("spread-full", "qwen3", "30B-A3B", 4, *_spread(8), shape=(4, 2048), world=8,
         sharding={"ep": 8}, checkpointing="full"),
    _job("spread-none", "qwen3", "30B-A3B", 3, *_spread(4), shape=(1, 4096), world=32,
         sharding={"ep": 4}, checkpointing="none", loss="full"),
    _job("spread-accumulated", "qwen3", "30B-A3B", 3, *_spread(16), shape=(2, 2048), world=64,
         sharding={"ep": 16}, batches=2),
    _job("split", "llama3", "8B", 3, *_split(2), shape=(2, 2048), sharding={"tp": 2}),
    _job("split-full", "llama3", "70B", 3, *_split(8), shape=(1, 8192), sharding={"tp": 8},
         checkpointing="full", world=64),
    _job("split-none", "qwen3", "14B", 3, *_split(4), shape=(4, 2048), sharding={"tp": 4},
         checkpointing="none", loss="full"),
    _job("split-tied", "llama3", "3B", 4, *_split(4), shape=(2, 4096), sharding={"tp": 4},
         world=4),
    _job("split-tied-full", "qwen3", "1.7B", 3, *_split(2), shape=(4, 2048), sharding={"tp": 2},
         checkpointing="full", loss="full"),
    _job("split-accumulated", "qwen3", "32B", 4, *_split(8), shape=(2, 4096), sharding={"tp": 8},
         world=16, batches=2, loss="full", checkpointing="full"),
    _job("split-3b-none", "llama3", "3B", 5, *_split(2), shape=(1, 4096), world=16,
         checkpointing="none", sharding={"tp": 2}),
    _job("whole-loss-full", "llama3", "70B", 4, shape=(2, 2048), world=32, loss="full",
         checkpointing="full"),
    _job("hybrid-short", "qwen3", "0.6B", 6, "--parallelism.data_parallel_replicate_degree", "2",
         shape=(16, 512), world=16, sharding={"dp_replicate": 2}),
    _job("spread-two", "qwen3", "30B-A3B", 2, *_spread(2), shape=(3, 1024), world=2,
         sharding={"ep": 2}),
    _job("spread-long", "qwen3", "30B-A3B", 4, *_spread(32), shape=(1, 8192), world=32,
         sharding={"ep": 32}, checkpointing="full", loss="full"),
    _job("kept-accumulated", "llama3", "8B", 5, *shlex.split(_NEVER), shape=(3, 1024), world=8,
         checkpointing="none", loss="full", sharding={"reshard_after_forward": False}, batches=3),
    _job("split-long", "qwen3", "32B", 3, *_split(4), shape=(1, 8192), world=32,
         sharding={"tp": 4}, batches=2),
    _job("bf16-full", "qwen3", "4B", 5, "--training.dtype", "bfloat16", shape=(2, 4096), world=4,
         precision={"weights": "bf16", "mixed": "bf16"}, checkpointing="full"),
    _job("whole-model", "llama3", "1B", 16, shape=(8, 4096), world=8),
    _job("spread-hybrid", "qwen3", "30B-A3B", 3, "--parallelism.data_parallel_replicate_degree",
         "2", *_spread(4), shape=(2, 2048), world=16, sharding={"ep": 4, "dp_replicate": 2},
         checkpointing="none"),
    _job("experts-wide", "qwen3", "30B-A3B", 2, shape=(2, 1024), world=256, checkpointing="full"),
    _job("spread-wide", "qwen3", "30B-A3B", 3, *_spread(8), shape=(2, 2048), world=256,
         sharding={"ep": 8}, checkpointing="full"),
    _job("spread-wide-none", "qwen3", "30B-A3B", 3, *_spread(64), shape=(1, 4096), world=256,
         sharding={"ep": 64}, checkpointing="none", loss="full"),
    _job("latent", "deepseek_v3", "16B", 3, shape=(2, 1024)),
    _job("latent-full", "deepseek_v3", "671B", 4, shape=(1, 2048), world=64, checkpointing="full"),
    _job("latent-none", "deepseek_v3", "16B", 3, shape=(2, 2048), world=2, checkpointing="none",
         loss="full"),
    _job("latent-spread", "deepseek_v3", "16B", 4, *_spread(8), shape=(2, 2048), world=16,
         sharding={"ep": 8}),
    _job("latent-spread-full", "deepseek_v3", "671B", 5, *_spread(32), shape=(1, 4096), world=64,
         sharding={"ep": 32}, checkpointing="full"),
    _job("wide", "llama3", "70B", 2, shape=(1, 4096), world=128, checkpointing="full"),
)  # fmt: skip


def record(job: Job) -> Job:
    """Run one job; its line of the bench."""
    from ftplan.trace.torchtitan import run

    result = run(job)
    return {
        **job,
        "allocated_bytes": result.allocated_bytes,
        "peak_phase": result.peak_phase,
        "phases": result.phases,
        "total_params": result.total_params,
    }


def write(out: Path, only: Sequence[str], *, fresh: bool) -> int:
    """Run what is missing, each job in a process of its own; returns how many there are now."""
    versions = {name: metadata.version(name).partition("+")[0] for name in ("torch", "torchtitan")}
    path = out / f"torchtitan-{versions['torchtitan']}.json"
    out.mkdir(parents=True, exist_ok=True)
    old = [] if fresh or not path.exists() else json.loads(path.read_text("ascii"))["jobs"]
    kept = {_key(line): line for line in old}
    for job in JOBS:
        if _key(job) in kept or (only and not any(word in job["name"] for word in only)):
            continue
        began = time.monotonic()
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            kept[_key(job)] = pool.submit(record, job).result()
        print(f"{job['name']} {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        lines = [json.dumps(kept[_key(each)]) for each in JOBS if _key(each) in kept]
        rows = ",\n".join(f"  {line}" for line in lines)
        path.write_text(f'{{"versions": {json.dumps(versions)}, "jobs": [\n{rows}\n]}}\n', "ascii")
    return len(kept)


def _key(job: Job) -> str:
    return json.dumps([job[name] for name in ("name", "flavor", "layers", "command", "plan")])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m ftplan.trace.bench_torchtitan")
    parser.add_argument("--out", type=Path, default=Path("validation/trainers"))
    parser.add_argument("--only", nargs="*", default=[], help="words of the names of jobs")
    parser.add_argument("--fresh", action="store_true", help="run every job again")
    options = parser.parse_args()
    print(f"{write(options.out, options.only, fresh=options.fresh)} jobs", file=sys.stderr)


if __name__ == "__main__":
    main()
