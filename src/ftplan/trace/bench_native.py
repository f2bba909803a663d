"""The bench of trainers with modules of their own: LitGPT and torchtune, several versions of each.

    python -m ftplan.trace.bench_native STACK [--out validation/trainers] [--fresh]

STACK is the profile that goes with the version that is installed (``litgpt-0.4`` with LitGPT 0.4.0
to 0.5.0); each version has a file. A job that is there already is not traced again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ftplan.trace.bench import BF16, FULL, Mapping, catalogue
from ftplan.trace.native import OWN

__all__ = ["jobs", "main"]

LORA: Mapping = {"kind": "lora", "rank": 8, "targets": ["q_proj", "v_proj"], "dropout": 0.05}
EVERYWHERE: Mapping = {**LORA, "rank": 64, "targets": "all-linear"}
HEAD: Mapping = {**LORA, "targets": ["q_proj", "k_proj", "v_proj", "lm_head"], "dropout": 0.0}
QLORA: Mapping = {**LORA, "kind": "qlora", "double_quant": False}
EVERYWHERE_4BIT: Mapping = {**EVERYWHERE, "kind": "qlora", "double_quant": False}
FP32: Mapping = {"weights": "fp32", "mixed": "no"}
MIXED: Mapping = {"weights": "fp32", "mixed": "bf16"}
NF4: Mapping = {"weights": "nf4", "mixed": "no"}

LITGPT: dict[str, Mapping] = {
    "lora": {"method": LORA, "precision": BF16},
    "qlora": {"method": QLORA, "precision": NF4, "optimizer": "paged_adamw_32bit"},
    "full": {"method": FULL, "precision": BF16},
    "lora-everywhere": {"method": EVERYWHERE, "precision": BF16},
    "llama-adapter": {"method": {"kind": "llama_adapter"}, "precision": BF16},
    "qlora-everywhere": {"method": EVERYWHERE_4BIT, "precision": NF4},
    "lora-mixed": {"method": {**LORA, "adapter_dtype": "fp32"}, "precision": MIXED},
    "llama-adapter-v2": {"method": {"kind": "llama_adapter_v2"}, "precision": BF16},
    "full-mixed": {"method": FULL, "precision": MIXED, "batch": {"accumulation": 4}},
    "lora-head": {"method": HEAD, "precision": BF16, "batch": {"accumulation": 8}},
    "llama-adapter-v2-4bit": {"method": {"kind": "llama_adapter_v2"}, "precision": NF4},
    "lora-fp32": {"method": {**LORA, "adapter_dtype": "fp32"}, "precision": FP32},
    "qlora-double": {
        "method": {**QLORA, "double_quant": True}, "precision": NF4,
        "optimizer": "paged_adamw_32bit",
    },
}  # fmt: skip
TORCHTUNE: dict[str, Mapping] = {
    "lora": {"method": LORA, "precision": BF16},
    "qlora-checkpointed": {
        "method": {**EVERYWHERE_4BIT, "double_quant": True}, "precision": NF4,
        "gradient_checkpointing": True,
    },
    "full-checkpointed": {"method": FULL, "precision": BF16, "gradient_checkpointing": True},
    "lora-everywhere": {"method": EVERYWHERE, "precision": BF16, "batch": {"accumulation": 4}},
    "full": {"method": FULL, "precision": BF16, "batch": {"accumulation": 2}},
    "lora-checkpointed": {
        "method": EVERYWHERE, "precision": BF16, "gradient_checkpointing": True, "loss": "full",
    },
    "full-8bit": {
        "method": FULL, "precision": BF16, "optimizer": "paged_adamw_8bit",
        "gradient_checkpointing": True, "loss": "full",
    },
    "full-fp32": {"method": FULL, "precision": FP32},
    "qlora": {"method": {**QLORA, "double_quant": True}, "precision": NF4},
}  # fmt: skip
LITGPT_MODELS = (
    "llama-3.2-1b", "pythia-1b", "gemma-2-2b", "phi-2", "mistral-7b-v0.1", "qwen2.5-1.5b",
    "tinyllama-1.1b", "stablelm-base-alpha-3b", "falcon-7b", "gemma-2b", "phi-3-mini",
    "qwen3-1.7b", "olmo-2-1b", "gemma-3-1b", "llama-2-7b",
)  # fmt: skip
TORCHTUNE_MODELS = (
    "llama-3.2-1b", "llama-2-7b", "gemma-2-2b", "qwen2.5-1.5b", "mistral-7b-v0.1", "llama-3.1-8b",
    "phi-3-mini", "gemma-2b", "qwen3-1.7b",
)  # fmt: skip
OLDER: dict[str, tuple[str, ...]] = {
    "litgpt-0.4": (
        "llama-3.1-8b", "gemma-2-2b", "phi-2", "pythia-1b", "phi-3-mini", "mistral-7b-v0.1",
    ),
    "litgpt-0.3": ("llama-2-7b", "gemma-2b", "phi-2", "pythia-1b", "falcon-7b", "mistral-7b-v0.1"),
    "litgpt-2023": ("llama-2-7b", "phi-1.5", "pythia-1b", "falcon-7b", "mistral-7b-v0.1"),
    "torchtune-0.6": ("llama-3.2-1b", "gemma-2-2b", "qwen2.5-1.5b", "phi-3-mini", "llama-3.1-8b"),
    "torchtune-0.4": ("llama-3.2-1b", "gemma-2b", "qwen2.5-1.5b", "phi-3-mini", "llama-3.1-8b"),
    "torchtune-0.1": ("llama-2-7b", "llama-3-8b", "mistral-7b-v0.1", "llama-2-13b"),
}  # fmt: skip
"""What a version of its time could be given."""
UNTIED = ("llama-3.1-8b", "mistral-7b-v0.1")
SHAPES = ((2, 512), (1, 1024), (4, 256), (1, 2048), (2, 1024), (4, 512))
"""(micro batch, sequence length) that the jobs go through in turn."""
WAYS_PER_MODEL = 4


SHARDED = ("llama-3.1-8b", "qwen2.5-1.5b", "gemma-2-2b", "mistral-7b-v0.1", "qwen3-1.7b")
"""Models that are traced on many GPUs."""
APART: Mapping = {"apart": ["embeddings", "output"]}
DISTRIBUTED: dict[str, Mapping] = {
    "full-fsdp": {"method": FULL, "precision": BF16, "gradient_checkpointing": True},
    "full-fsdp-apart": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True, "sharding": APART,
    },
    "lora-fsdp": {"method": EVERYWHERE, "precision": BF16},
    "lora-fsdp-apart-checkpointed": {
        "method": EVERYWHERE, "precision": BF16, "gradient_checkpointing": True, "sharding": APART,
    },
    "full-fsdp-kept": {
        "method": FULL, "precision": BF16, "sharding": {"reshard_after_forward": False},
    },
    "full-fsdp-fp32-apart-accumulated": {
        "method": FULL, "precision": FP32, "batch": {"accumulation": 2}, "sharding": APART,
    },
}  # fmt: skip
"""Ways of its distributed recipes: FSDP2 over eight GPUs."""
FLAT: dict[str, Mapping] = {
    "full-fsdp": {"method": FULL, "precision": BF16, "gradient_checkpointing": True},
    "lora-fsdp": {"method": LORA, "precision": BF16, "gradient_checkpointing": True},
    "lora-everywhere-fsdp-accumulated": {
        "method": EVERYWHERE, "precision": BF16, "gradient_checkpointing": True,
        "batch": {"accumulation": 4}, "sharding": {"no_sync": True},
    },
    "full-fsdp-mixed-accumulated": {
        "method": FULL, "precision": MIXED, "gradient_checkpointing": True,
        "batch": {"accumulation": 2}, "sharding": {"no_sync": True},
    },
    "llama-adapter-v2-fsdp": {
        "method": {"kind": "llama_adapter_v2"}, "precision": BF16, "gradient_checkpointing": True,
    },
}  # fmt: skip
"""Ways of LitGPT on many GPUs: FSDP1 around each block, which is checkpointed."""


def jobs(stack: str) -> Iterator[Mapping]:
    """Every job of a stack, always the same ones."""
    yield from _on_one_gpu(stack)
    if stack in ("torchtune", "torchtune-0.6"):
        yield from _distributed(stack, DISTRIBUTED, {"version": 2})
    if stack in ("litgpt", "litgpt-0.4"):
        yield from _distributed(stack, FLAT, {"version": 1, "use_orig_params": True})


def _distributed(stack: str, known: dict[str, Mapping], fsdp: Mapping) -> Iterator[Mapping]:
    ways = list(known.items())
    tune = stack.startswith("torchtune")
    models = OLDER.get(stack, TORCHTUNE_MODELS if tune else LITGPT_MODELS)
    models = tuple(model for model in models if model in SHARDED)
    for row, model in enumerate(models):
        for column in range(WAYS_PER_MODEL):
            name, way = ways[(row * WAYS_PER_MODEL + column) % len(ways)]
            if model not in UNTIED and "apart" in way.get("sharding", ()):
                continue  # a tied output layer multiplies by a sharded table then, and fails
            plan = _plan(stack, model, way, SHAPES[(row + column) % len(SHAPES)])
            plan["hardware"] = {"gpu": "a100-80gb", "count": 8}
            plan["sharding"] = {"kind": "fsdp", **fsdp, **way.get("sharding", {})}
            if tune:
                plan.setdefault("loss", "chunked")
            yield {"name": f"{stack} {name}", "trainer": stack, "layers": 3, "plan": plan}


def _on_one_gpu(stack: str) -> Iterator[Mapping]:
    own = stack.startswith("litgpt")
    ways = LITGPT if own else TORCHTUNE
    models = OLDER.get(stack, LITGPT_MODELS if own else TORCHTUNE_MODELS)
    names = list(ways)
    for row, model in enumerate(models):
        for column in range(WAYS_PER_MODEL):
            number = row * WAYS_PER_MODEL + column
            way = names[number % len(names)]
            plan = _plan(stack, model, ways[way], SHAPES[(row + number) % len(SHAPES)])
            if not own:  # the first torchtune had one loss
                chunked = stack != "torchtune-0.1" and plan.get("loss") != "full"
                plan["loss"] = "chunked" if chunked else "full"
            # LLaMA-Adapter begins at the third layer
            layers = 3 if way.startswith("llama-adapter") else (2, 3, 4)[number % 3]
            yield {"name": f"{stack} {way}", "trainer": stack, "layers": layers, "plan": plan}


def _plan(stack: str, model: str, way: Mapping, shape: tuple[int, int]) -> Mapping:
    plan: Mapping = {
        "version": 1, "model": model, "stack": stack, "task": "sft", "optimizer": "adamw_torch",
        "gradient_checkpointing": False,
        "hardware": {"gpu": "a100-80gb", "count": 1}, "sharding": {"kind": "none"},
        **way,
    }  # fmt: skip
    plan["batch"] = {
        "micro": shape[0], "seq_len": shape[1], "accumulation": 1, **way.get("batch", {}),
    }  # fmt: skip
    return plan


def record(job: Mapping, config: Mapping) -> tuple[Mapping, Mapping]:
    """Trace one job; its line of the bench, and the versions."""
    from ftplan.trace.core import trace
    from ftplan.trace.job import plan_from

    result = trace(plan_from(job["plan"]), config, layers=job["layers"])
    line = {
        **job,
        "allocated_bytes": result.allocated_bytes,
        "peak_phase": result.peak_phase,
        "phases": result.phases,
        "terms": result.at_peak(),
        "total_params": result.total_params,
        "trainable_params": result.trainable_params,
    }
    return line, result.versions


def write(stack: str, out: Path, *, fresh: bool) -> Path:
    """Trace what is missing and write the file of the installed version."""
    from importlib import metadata

    package = stack.partition("-")[0]
    version = metadata.version("lit-gpt" if stack == "litgpt-2023" else package)
    path, configs = out / f"{package}-{version}.json", catalogue()
    old = [] if fresh or not path.exists() else json.loads(path.read_text("ascii"))["jobs"]
    kept = {_key(job): job for job in old}
    for job in jobs(stack):
        begun = time.monotonic()
        if _key(job) not in kept:
            kept[_key(job)], versions = record(job, configs[job["plan"]["model"]])
            _write(path, versions, [kept[_key(one)] for one in jobs(stack) if _key(one) in kept])
            print(f"{_key(job)[:60]} {time.monotonic() - begun:.1f} s", file=sys.stderr)
    return path


def _key(job: Mapping) -> str:
    return json.dumps([job["name"], job["layers"], job["plan"]])


def _write(path: Path, versions: Mapping, lines: list[Mapping]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join("  " + json.dumps(line) for line in lines)
    path.write_text(f'{{"versions": {json.dumps(versions)}, "jobs": [\n{rows}\n]}}\n', "ascii")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m ftplan.trace.bench_native", description=__doc__
    )
    parser.add_argument("stack", choices=sorted(OWN))
    parser.add_argument("--out", type=Path, default=Path("validation/trainers"))
    parser.add_argument("--fresh", action="store_true", help="trace every job again")
    options = parser.parse_args()
    print(write(options.stack, options.out, fresh=options.fresh), file=sys.stderr)


if __name__ == "__main__":
    main()
