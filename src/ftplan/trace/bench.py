"""The bench: true jobs, traced once and committed, that the calculator is held against.

    python -m ftplan.trace.bench [--out validation/bench] [--only NAME ...] [--list]

One JSON file per architecture, and one for its sharded jobs; a job that is there already is not
traced again (``--fresh`` does).
Which architectures the calculator may be built on and which are held back is fixed here, by
architecture, before any comparison: no constant of the calculator comes from a held one.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

__all__ = ["ARCHITECTURES", "REGIMES", "jobs_of", "main", "write_bench"]

Mapping = dict[str, Any]

OWN_CODE: dict[str, str] = {"qwen-7b": "build"}
"""Architectures whose code is none of transformers': traced by themselves, kept as they are."""

ARCHITECTURES: dict[str, str] = {
    "llama-3.1-8b": "build",
    "llama-2-7b": "build",
    "qwen2.5-7b": "build",
    "qwen2.5-0.5b": "build",
    "mistral-7b-v0.1": "build",
    "gemma-7b": "build",
    "phi-2": "build",
    "pythia-1.4b": "build",
    "gpt2": "build",
    "opt-1.3b": "build",
    "falcon-7b": "build",
    "bert-base": "build",
    "t5-base": "build",
    "mixtral-8x7b": "build",
    "olmoe-1b-7b": "build",
    "smollm2-1.7b": "build",
    "starcoder2-3b": "build",
    "qwen3-4b": "build",
    "llama-3.2-1b": "held",
    "qwen3-8b": "held",
    "gemma-2-2b": "held",
    "gemma-3-1b": "held",
    "phi-3-mini": "held",
    "gpt2-xl": "held",
    "bloom-560m": "held",
    "stablelm-2-1.6b": "held",
    "granite-3.1-2b": "held",
    "olmo-2-7b": "held",
    "qwen3-30b-a3b": "held",
    "cohere-command-r": "held",
    "gpt-j-6b": "held",
    "roberta-base": "held",
    "flan-t5-large": "held",
    "deepseek-v2-lite": "held",
    "tinyllama-1.1b": "held",
    "modernbert-base": "held",
    "gpt-oss-20b": "held",
    "llama-3.1-70b": "held",
}
"""Catalogue names and the side of the split they are on."""

FULL: Mapping = {"kind": "full"}
BF16: Mapping = {"weights": "bf16", "mixed": "no"}
FP32: Mapping = {"weights": "fp32", "mixed": "no"}
AMP: Mapping = {"weights": "fp32", "mixed": "bf16"}
BF16_AMP: Mapping = {"weights": "bf16", "mixed": "bf16"}
T4: Mapping = {"gpu": "t4-16gb"}


def _lora(**more: Any) -> Mapping:
    return {"kind": "lora", "rank": 16, "targets": "all-linear", **more}


def _qlora(**more: Any) -> Mapping:
    return {**_lora(), "kind": "qlora", "prepare_kbit": True, "double_quant": False, **more}


REGIMES: dict[str, Mapping] = {
    "full-bf16": {"method": FULL, "precision": BF16},
    "lora-checkpointed": {"method": _lora(), "precision": BF16, "gradient_checkpointing": True},
    "full-autocast": {"method": FULL, "precision": AMP},
    "qlora-autocast-checkpointed": {
        "method": _qlora(),
        "precision": {"weights": "nf4", "mixed": "bf16"},
        "gradient_checkpointing": True,
    },
    "lora": {"method": _lora(), "precision": BF16},
    "full-fp32": {"method": FULL, "precision": FP32},
    "full-eager": {"method": FULL, "precision": BF16, "attention": "eager"},
    "lora-autocast": {"method": _lora(targets="ATTENTION"), "precision": BF16_AMP},
    "partial": {"method": {"kind": "partial", "last_layers": 2}, "precision": BF16},
    "full-pytorch-foreach": {
        "stack": "pytorch", "method": FULL, "precision": BF16, "optimizer": "adamw_torch",
    },
    "lora-padded": {"method": _lora(), "precision": BF16, "batch": {"padding": "right"}},
    "full-checkpointed": {"method": FULL, "precision": BF16, "gradient_checkpointing": True},
    "dora": {"method": _lora(kind="dora"), "precision": BF16},
    "qlora": {"method": _qlora(), "precision": {"weights": "nf4", "mixed": "bf16"}},
    "lora-bf16-adapters": {"method": _lora(rank=64, adapter_dtype="bf16"), "precision": BF16},
    "full-autocast-checkpointed": {
        "method": FULL, "precision": AMP, "gradient_checkpointing": True,
    },
    "lora-dropout": {"method": _lora(dropout=0.1), "precision": BF16},
    "full-8bit-adam": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True,
        "optimizer": "adamw_bnb_8bit",
    },
    "lora-eager-checkpointed": {
        "method": _lora(), "precision": BF16, "attention": "eager", "gradient_checkpointing": True,
    },
    "full-padded-autocast": {
        "method": FULL, "precision": AMP, "batch": {"padding": "right"},
    },
    "lora-pytorch": {"stack": "pytorch", "method": _lora(targets="ATTENTION"), "precision": BF16},
    "full-fp16-autocast-t4": {
        "method": FULL, "precision": {"weights": "fp32", "mixed": "fp16"}, "hardware": T4,
    },
    "ia3": {"method": {"kind": "ia3"}, "precision": BF16},
    "full-accumulated": {
        "method": FULL, "precision": BF16, "batch": {"accumulation": 4},
        "gradient_checkpointing": True,
    },
    "lora-fp16-t4": {
        "method": _lora(), "precision": {"weights": "fp16", "mixed": "no"}, "hardware": T4,
        "gradient_checkpointing": True,
    },
    "full-sgd-momentum": {
        "method": FULL, "precision": BF16, "optimizer": {"name": "sgd", "momentum": 0.9},
    },
    "qlora-double-quant": {
        "method": _qlora(double_quant=True, rank=64),
        "precision": {"weights": "nf4", "mixed": "no"},
        "gradient_checkpointing": True,
    },
    "vera": {"method": {"kind": "vera", "rank": 64, "targets": "all-linear"}, "precision": BF16},
    "full-adafactor": {
        "method": FULL, "precision": BF16, "optimizer": "adafactor", "gradient_checkpointing": True,
    },
    "lora-saved-modules": {
        "method": _lora(modules_to_save=["EMBEDDING", "HEAD"]), "precision": BF16,
        "gradient_checkpointing": True,
    },
    "full-fp32-loop": {
        "method": FULL, "precision": FP32, "gradient_checkpointing": True,
        "optimizer": {"name": "adamw", "implementation": "loop"},
    },
    "lora-reentrant": {
        "method": _lora(), "precision": BF16,
        "gradient_checkpointing": {"kind": "full", "reentrant": True},
    },
    "qlora-int8": {
        "method": _qlora(), "precision": {"weights": "int8", "mixed": "bf16"},
        "gradient_checkpointing": True,
    },
    "oft": {"method": {"kind": "oft", "targets": "all-linear"}, "precision": BF16},
    "partial-autocast": {"method": {"kind": "partial", "last_layers": 1}, "precision": AMP},
    "lora-autocast-dropout": {
        "method": _lora(dropout=0.05), "precision": BF16_AMP, "gradient_checkpointing": True,
    },
    "full-paged-8bit": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True,
        "optimizer": "paged_adamw_8bit",
    },
    "loha": {
        "method": {"kind": "loha", "rank": 8, "targets": "ATTENTION"}, "precision": BF16,
    },
    "full-fp32-eager-padded": {
        "method": FULL, "precision": FP32, "attention": "eager", "batch": {"padding": "right"},
    },
    "prefix-tuning": {
        "method": {"kind": "prefix_tuning", "virtual_tokens": 20}, "precision": BF16,
    },
    "qlora-unprepared": {
        "method": _qlora(prepare_kbit=False), "precision": {"weights": "nf4", "mixed": "no"},
    },
    "lora-accumulated": {
        "method": _lora(rank=128), "precision": BF16, "batch": {"accumulation": 8},
    },
    "lokr": {"method": {"kind": "lokr", "rank": 8, "targets": "ATTENTION"}, "precision": BF16},
    "prompt-tuning": {
        "method": {"kind": "prompt_tuning", "virtual_tokens": 32}, "precision": BF16,
    },
    "full-flash": {"method": FULL, "precision": BF16, "attention": "flash"},
    "ln-tuning": {"method": {"kind": "ln_tuning"}, "precision": BF16},
    "lora-fp32": {"method": _lora(), "precision": FP32},
    "qlora-eager": {
        "method": _qlora(), "precision": {"weights": "nf4", "mixed": "bf16"}, "attention": "eager",
        "gradient_checkpointing": True,
    },
    "full-every-second-block": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": {"kind": "full", "every": 2},
    },
    "lora-flash": {"method": _lora(), "precision": BF16, "attention": "flash"},
}  # fmt: skip
"""Regimes by name. ATTENTION, EMBEDDING and HEAD stand for the architecture's module names."""

SHAPES = (
    (2, 512), (1, 1024), (4, 512), (1, 2048), (2, 1024), (8, 256), (1, 512), (4, 1024), (2, 2048),
)  # fmt: skip
"""(micro batch, sequence length) that the jobs go through in turn."""
JOBS_PER_ARCHITECTURE = 12

_ATTENTION = {
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "falcon": ["query_key_value", "dense"],
    "bloom": ["query_key_value"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "phi": ["q_proj", "k_proj", "v_proj"],
    "phi3": ["qkv_proj", "o_proj"],
    "bert": ["query", "key", "value"],
    "roberta": ["query", "key", "value"],
    "modernbert": ["Wqkv"],
    "t5": ["q", "k", "v", "o"],
    "gptj": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "deepseek_v2": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
}
_EMBEDDING = {
    "gpt2": "wte", "gpt_neox": "embed_in", "falcon": "word_embeddings", "gptj": "wte",
    "bloom": "word_embeddings", "bert": "word_embeddings", "roberta": "word_embeddings",
    "modernbert": "tok_embeddings", "t5": "shared",
}  # fmt: skip
_HEAD = {"gpt_neox": "embed_out", "bert": "decoder", "roberta": "decoder", "modernbert": "decoder"}
_ENCODERS = ("bert", "roberta", "modernbert", "t5")
_CAUSAL_ONLY = ("prefix-tuning", "prompt-tuning")


def catalogue() -> dict[str, Mapping]:
    """Configs by catalogue name."""
    from importlib.resources import files

    text = files("ftplan.catalog").joinpath("data/models.json").read_text(encoding="utf-8")
    return {row["name"]: row["config"] for row in json.loads(text)}


def _written(value: Any, model_type: str) -> Any:
    if isinstance(value, dict):
        return {key: _written(item, model_type) for key, item in value.items()}
    if isinstance(value, list):
        return [_written(item, model_type) for item in value]
    if value == "ATTENTION":
        return _ATTENTION.get(model_type, ["q_proj", "k_proj", "v_proj", "o_proj"])
    if value == "EMBEDDING":
        return _EMBEDDING.get(model_type, "embed_tokens")
    if value == "HEAD":
        return _HEAD.get(model_type, "lm_head")
    return value


def jobs_of(name: str, config: Mapping) -> Iterator[tuple[str, Mapping, int]]:
    """(regime, plan mapping, layers) of an architecture's jobs, always the same ones."""
    index = list(ARCHITECTURES).index(name)
    regimes = list(REGIMES)
    model_type = config["model_type"]
    depth = next(
        config[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in config
    )
    longest = min(config.get(key, 1 << 30) for key in ("max_position_embeddings", "n_positions"))
    for number in range(JOBS_PER_ARCHITECTURE):
        # a stride that shares no factor with the number of regimes visits all of them in turn
        regime = regimes[(index * JOBS_PER_ARCHITECTURE + number) % len(regimes)]
        if regime in _CAUSAL_ONLY and model_type in _ENCODERS:
            continue
        micro, seq_len = SHAPES[(index * 5 + number * 2) % len(SHAPES)]
        if model_type == "roberta":
            longest = 512
        if seq_len > longest:
            micro, seq_len = micro * seq_len // longest, longest
        # the held side is shallower: what is held back is its architectures, not its depth
        deep = 6 if depth > 16 else depth
        pattern = (2, deep, 4, 3) if depth <= 16 else (2, 4, 3, deep)
        if ARCHITECTURES[name] == "held":
            pattern = (2, 3, 2, 4)
        layers = min(depth, pattern[(index + number) % 4])
        plan: Mapping = {"version": 1, "model": name, "stack": "transformers", "task": "sft"}
        for key, value in _written(REGIMES[regime], model_type).items():
            plan[key] = {**value} if isinstance(value, dict) else value
        plan["batch"] = {
            "micro": micro, "seq_len": seq_len, "accumulation": 1, "padding": "none",
            **plan.get("batch", {}),
        }  # fmt: skip
        plan.setdefault("optimizer", "adamw_torch_fused")
        plan.setdefault("gradient_checkpointing", False)
        plan.setdefault("attention", "sdpa")
        plan.setdefault("loss", "full")
        plan.setdefault("hardware", {"gpu": "a100-80gb"})
        plan["hardware"] = {**plan["hardware"], "count": 1}
        plan.setdefault("sharding", {"kind": "none"})
        if plan["method"]["kind"] in ("lora", "qlora", "dora"):
            plan["method"].setdefault("dropout", 0.0)
            plan["method"].setdefault("adapter_dtype", "fp32")
        yield regime, plan, layers


def record(regime: str, plan: Mapping, layers: int | None, config: Mapping) -> Mapping:
    """Trace one job; its line of the bench."""
    from ftplan.trace.core import trace
    from ftplan.trace.job import plan_from

    result = trace(plan_from(plan), config, layers=layers)
    return {
        "regime": regime,
        "layers": layers,
        "plan": plan,
        "allocated_bytes": result.allocated_bytes,
        "peak_phase": result.peak_phase,
        "phases": result.phases,
        "terms": result.at_peak(),
        "total_params": result.total_params,
        "trainable_params": result.trainable_params,
    }


def _recorded(regime: str, plan: Mapping, layers: int | None, config: Mapping) -> Mapping:
    """The line of a job; DeepSpeed's are traced in a process each, where no other job has been.

    After another one autograd was seen to add gradients in place that it does not add so alone.
    """
    if not regime.startswith("zero"):
        return record(regime, plan, layers, config)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(record, regime, plan, layers, config).result()


def write_bench(
    out: Path, only: list[str] | None = None, fresh: bool = False, seconds: float | None = None
) -> int:
    """Trace what is missing and write the files; returns how many jobs there are now."""
    from ftplan.trace.bench_adapters import adapter_jobs_of
    from ftplan.trace.bench_sharded import sharded_jobs_of
    from ftplan.trace.core import versions

    configs = catalogue()
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    total = 0
    sets = {"": jobs_of, "-sharded": sharded_jobs_of, "-adapters": adapter_jobs_of}
    for (name, split), (end, made) in product(ARCHITECTURES.items(), sets.items()):
        if only and name + end not in only and name not in only:
            continue
        path = out / f"{name}{end}.json"
        old = json.loads(path.read_text()) if path.exists() and not fresh else {"jobs": []}
        config = configs[name]
        wanted = list(made(name, config))
        if not wanted:
            continue
        kept = {json.dumps([job["plan"], job["layers"]]): job for job in old["jobs"]}
        refused = dict(old.get("refused", {}))
        keys = [json.dumps([plan, layers]) for _, plan, layers in wanted]

        def save() -> int:
            jobs = [kept[key] for key in keys if key in kept]  # noqa: B023 - called in this turn
            document = {
                "architecture": name,  # noqa: B023
                "split": split,  # noqa: B023
                "versions": {**old.get("versions", {}), **versions()},  # noqa: B023
                "refused": refused,  # noqa: B023
                "jobs": jobs,
            }
            path.write_text(_compact(document), encoding="ascii")  # noqa: B023
            return len(jobs)

        for key, (regime, plan, layers) in zip(keys, wanted, strict=True):
            if key in kept:
                refused.pop(regime, None)
                continue
            if seconds is not None and time.monotonic() - started > seconds:
                break
            begun = time.monotonic()
            try:
                kept[key] = _recorded(regime, plan, layers, config)
                refused.pop(regime, None)
            except Exception as error:
                refused[regime] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                print(f"{name} {regime}: {refused[regime]}", file=sys.stderr, flush=True)
            gc.collect()
            save()
            print(f"{name} {regime} {time.monotonic() - begun:.1f} s", file=sys.stderr)
        total += save()
    return total


def _compact(document: Mapping) -> str:
    """JSON with one job a line."""
    head = {key: value for key, value in document.items() if key != "jobs"}
    lines = ",\n".join("  " + json.dumps(job) for job in document["jobs"])
    return json.dumps(head)[:-1] + ', "jobs": [\n' + lines + "\n]}\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m ftplan.trace.bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("validation/bench"))
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--fresh", action="store_true", help="trace every job again")
    parser.add_argument("--seconds", type=float, help="stop starting jobs after this long")
    parser.add_argument("--list", action="store_true", help="print the jobs, trace nothing")
    options = parser.parse_args()
    if options.list:
        for name, config in catalogue().items():
            if name in ARCHITECTURES:
                for regime, plan, layers in jobs_of(name, config):
                    print(name, regime, layers, json.dumps(plan["batch"]))
        return
    total = write_bench(options.out, options.only, options.fresh, options.seconds)
    print(f"{total} jobs in {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
