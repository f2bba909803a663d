"""The bench of real trainers: their own steps, traced once and committed.

    python -m ftplan.trace.bench_trainers [--out validation/trainers] [--only NAME ...]

One file for each version of TRL that jobs were run with (PPO is in none after 1.12: run it again
with that version first on the path), and one for those that DeepSpeed ran, which has to be
installed. A job that is there already is not run again (``--fresh``).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from ftplan.trace.bench import AMP, BF16, BF16_AMP, FULL, Mapping, catalogue

__all__ = ["jobs", "main"]

LORA: Mapping = {
    "kind": "lora", "rank": 16, "targets": "all-linear", "dropout": 0.0, "adapter_dtype": "fp32",
}  # fmt: skip
QLORA: Mapping = {
    **LORA, "kind": "qlora", "prepare_kbit": False, "adapter_dtype": "bf16", "double_quant": False,
}  # fmt: skip
NF4: Mapping = {"weights": "nf4", "mixed": "bf16"}
WAYS: dict[str, Mapping] = {
    "lora": {"method": LORA, "precision": BF16_AMP},
    "lora-checkpointed": {
        "method": LORA, "precision": BF16_AMP, "gradient_checkpointing": True,
    },
    "lora-dropout": {"method": {**LORA, "dropout": 0.05}, "precision": BF16_AMP},
    "qlora-checkpointed": {"method": QLORA, "precision": NF4, "gradient_checkpointing": True},
    "full-autocast": {"method": FULL, "precision": AMP},
    "full-autocast-checkpointed": {
        "method": FULL, "precision": AMP, "gradient_checkpointing": True,
    },
    "full-bf16": {"method": FULL, "precision": BF16},
    "full-bf16-checkpointed": {
        "method": FULL, "precision": BF16, "gradient_checkpointing": True,
    },
    "lora-accumulated": {
        "method": LORA, "precision": BF16_AMP, "batch": {"accumulation": 4},
    },
}  # fmt: skip
MODELS = ("llama-3.2-1b", "qwen2.5-0.5b", "qwen3-4b", "smollm2-1.7b", "mistral-7b-v0.1")
ROLLOUT: Mapping = {"prompt_tokens": 128, "completion_tokens": 384, "sampler": "server"}
TASKS: dict[str, tuple[str, Mapping, Mapping, Sequence[str]]] = {
    "transformers": ("transformers.Trainer", {"stack": "transformers"}, {}, tuple(WAYS)),
    "sft": ("trl.SFTTrainer", {}, {}, tuple(WAYS)),
    "sft-packed": (
        "trl.SFTTrainer", {"attention": "flash", "batch": {"packing": True}},
        {"packing": True}, ("lora", "full-bf16"),
    ),
    "dpo": ("trl.DPOTrainer", {"task": "dpo"}, {}, tuple(WAYS)),
    "dpo-precomputed": (
        "trl.DPOTrainer", {"task": "dpo", "reference": "precomputed"},
        {"precompute_ref_log_probs": True}, ("lora", "full-autocast"),
    ),
    "kto": ("trl.KTOTrainer", {"task": "kto"}, {}, tuple(WAYS)),
    "reward": ("trl.RewardTrainer", {"task": "rm"}, {}, tuple(WAYS)),
    "orpo": ("trl.experimental.ORPOTrainer", {"task": "orpo"}, {}, tuple(WAYS)),
    "grpo": (
        "trl.GRPOTrainer", {"task": "grpo", "rollout": ROLLOUT, "reference": "none"}, {},
        tuple(WAYS),
    ),
    "grpo-reference": (
        "trl.GRPOTrainer", {"task": "grpo", "rollout": ROLLOUT}, {"beta": 0.04},
        ("lora", "lora-accumulated", "full-autocast-checkpointed"),
    ),
    "rloo": (
        "trl.RLOOTrainer", {"task": "grpo", "rollout": ROLLOUT}, {},
        ("lora", "full-autocast-checkpointed"),
    ),
    "distillation": (
        "trl.DistillationTrainer", {"task": "distill", "rollout": ROLLOUT}, {},
        ("lora", "full-bf16-checkpointed", "full-autocast"),
    ),
    "gkd": (
        "trl.experimental.GKDTrainer", {"task": "distill", "loss": "full"}, {},
        ("lora", "full-bf16-checkpointed", "full-autocast"),
    ),
    "ppo": (
        "trl.experimental.PPOTrainer",
        {"task": "ppo", "rollout": {**ROLLOUT, "sampler": "trainer"}}, {},
        ("lora", "lora-accumulated", "full-bf16-checkpointed", "full-autocast",
         "qlora-checkpointed"),
    ),
    # last: Liger puts its functions into the modules of transformers, for good
    "sft-liger": (
        "trl.SFTTrainer", {"kernels": "liger"}, {"use_liger_kernel": True},
        ("lora", "full-bf16-checkpointed"),
    ),
}  # fmt: skip
"""Task: the trainer, the plan's own keys, the trainer's own arguments, the ways of training."""
REENTRANT: Mapping = {
    "method": {**LORA, "adapter_dtype": "bf16"}, "precision": BF16_AMP,
    "gradient_checkpointing": {"kind": "full", "reentrant": True},
}  # fmt: skip
"""What TRL makes of any other checkpointing of an adapted model under ZeRO-3."""
ZERO_WAYS: dict[str, tuple[str, Mapping]] = {
    "zero3-full-checkpointed": ("zero3", WAYS["full-autocast-checkpointed"]),
    "zero3-full": ("zero3", WAYS["full-autocast"]),
    "zero3-full-accumulated": (
        "zero3", {**WAYS["full-autocast-checkpointed"], "batch": {"accumulation": 2}},
    ),
    "zero3-lora-checkpointed": ("zero3", REENTRANT),
    "zero3-lora": ("zero3", {**REENTRANT, "gradient_checkpointing": False}),
    "zero2-full-checkpointed": ("zero2", WAYS["full-autocast-checkpointed"]),
    "zero2-lora-checkpointed": ("zero2", REENTRANT),
}  # fmt: skip
SAMPLED_ELSEWHERE = "trl.GRPOTrainer, vLLM"
ZERO_TASKS: dict[str, tuple[str, Mapping, Mapping, Sequence[str]]] = {
    "sft": ("trl.SFTTrainer", {}, {}, tuple(ZERO_WAYS)),
    "dpo": ("trl.DPOTrainer", {"task": "dpo"}, {}, tuple(ZERO_WAYS)),
    "kto": ("trl.KTOTrainer", {"task": "kto"}, {}, tuple(ZERO_WAYS)),
    "reward": (
        "trl.RewardTrainer", {"task": "rm"}, {},
        ("zero3-full-checkpointed", "zero2-lora-checkpointed"),
    ),
    "grpo": (
        SAMPLED_ELSEWHERE, {"task": "grpo", "rollout": ROLLOUT, "reference": "none"}, {},
        tuple(ZERO_WAYS),
    ),
    "grpo-reference": (
        SAMPLED_ELSEWHERE, {"task": "grpo", "rollout": ROLLOUT}, {"beta": 0.04},
        ("zero3-full-checkpointed", "zero3-full-accumulated", "zero3-lora-checkpointed",
         "zero2-full-checkpointed"),
    ),
    "distillation": (
        "trl.DistillationTrainer", {"task": "distill", "rollout": ROLLOUT}, {},
        ("zero3-full-checkpointed", "zero2-full-checkpointed"),
    ),
    "ppo": (
        "trl.experimental.PPOTrainer",
        {"task": "ppo", "rollout": {**ROLLOUT, "sampler": "trainer"}}, {"num_ppo_epochs": 2},
        tuple(ZERO_WAYS),
    ),
}  # fmt: skip
"""The same under DeepSpeed."""
ZERO_MODELS = ("llama-3.1-8b", "qwen2.5-7b", "mistral-7b-v0.1", "qwen3-4b")
_REFERRED = ("dpo", "kto", "grpo", "ppo")


def jobs() -> Iterator[Mapping]:
    """Every job, always the same ones: what is run, and the plan that means it."""
    for row, (task, (trainer, keys, arguments, ways)) in enumerate(TASKS.items()):
        for column, way in enumerate(ways):
            model = MODELS[(row + column) % len(MODELS)]
            yield {
                "name": f"{task} {way}",
                "trainer": trainer,
                "arguments": dict(arguments),
                "layers": (2, 3)[(row + column) % 2],
                "plan": _plan(model, keys, WAYS[way]),
            }
    for row, (task, (trainer, keys, arguments, ways)) in enumerate(ZERO_TASKS.items()):
        for column, way in enumerate(ways):
            kind, how = ZERO_WAYS[way]
            plan = _plan(ZERO_MODELS[(row + column) % len(ZERO_MODELS)], keys, how)
            plan["hardware"] = {"gpu": "a100-80gb", "count": (8, 4, 16)[(row + column) % 3]}
            plan["sharding"] = {"kind": kind}
            yield {
                "name": f"{task} {way}",
                "trainer": trainer,
                "arguments": dict(arguments),
                "layers": (6, 4)[(row + column) % 2],
                "plan": plan,
            }


def _plan(model: str, keys: Mapping, way: Mapping) -> Mapping:
    plan: Mapping = {
        "version": 1, "model": model, "stack": "trl", "task": "sft",
        "optimizer": "adamw_torch_fused", "gradient_checkpointing": False, "attention": "sdpa",
        "hardware": {"gpu": "a100-80gb", "count": 1}, "sharding": {"kind": "none"},
        **keys, **way,
    }  # fmt: skip
    plan["batch"] = {
        "micro": 2, "seq_len": 512, "accumulation": 1, "padding": "none",
        **keys.get("batch", {}), **way.get("batch", {}),
    }  # fmt: skip
    if plan["task"] in _REFERRED:
        plan.setdefault("reference", "adapter" if way["method"] is not FULL else "model")
    if plan["task"] == "orpo" and way["method"] is QLORA:  # it prepares the model by itself
        plan["method"] = {**QLORA, "prepare_kbit": True, "adapter_dtype": "fp32"}
    if plan["task"] == "ppo" and way["method"] is QLORA:  # PEFT's own dtype, and it is never cast
        plan["method"] = {**QLORA, "adapter_dtype": "fp32"}
    if plan["task"] == "distill":
        plan["teacher"] = model
    if plan.get("rollout") and "generations" not in plan["rollout"]:
        plan["rollout"] = {**plan["rollout"], **_group(plan)}
    return plan


def _group(plan: Mapping) -> Mapping:
    batch = plan["batch"]
    return {"generations": batch["micro"] * batch["accumulation"]} if plan["task"] == "grpo" else {}


def record(job: Mapping) -> Mapping:
    """Run one job; its line of the bench."""
    from ftplan.trace.job import plan_from, resolve
    from ftplan.trace.trainers import run_trainer

    configs, plan = catalogue(), job["plan"]
    # kernels that the trainer puts in by itself are run, launched into the void
    run = {key: value for key, value in plan.items() if key != "kernels"}
    result = run_trainer(
        job["trainer"], resolve(plan_from(run)), configs[plan["model"]],
        layers=job["layers"], arguments=job["arguments"],
        teacher=configs.get(plan.get("teacher", "")),
        prompt_tokens=plan.get("rollout", {}).get("prompt_tokens", 1),
    )  # fmt: skip
    return {
        **job,
        "allocated_bytes": result.allocated_bytes,
        "peak_phase": result.peak_phase,
        "phases": result.phases,
        "trainable_params": result.trainable_params,
    }


def write(out: Path, only: Sequence[str], *, fresh: bool) -> int:
    """Run what is missing; returns how many jobs there are now."""
    from ftplan.trace.trainers import trainer_versions

    versions = trainer_versions()
    single = [job for job in jobs() if job["plan"]["sharding"]["kind"] == "none"]
    path = out / f"trl-{versions['trl']}"
    count = _write(path.with_name(f"{path.name}.json"), single, versions, only, fresh=fresh)
    if find_spec("deepspeed") is None:
        return count
    versions["deepspeed"] = version("deepspeed")
    sharded = [job for job in jobs() if job["plan"]["sharding"]["kind"] != "none"]
    path = path.with_name(f"{path.name}-deepspeed-{versions['deepspeed']}.json")
    return count + _write(path, sharded, versions, only, fresh=fresh)


def _write(
    path: Path,
    wanted: Sequence[Mapping],
    versions: Mapping,
    only: Sequence[str],
    *,
    fresh: bool,
) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {} if fresh or not path.exists() else _kept(path)
    for job in wanted:
        key = json.dumps(job)
        if key in kept or (only and not any(word in job["name"] for word in only)):
            continue
        began = time.monotonic()
        try:
            kept[key] = record(job)
        except Exception as error:
            print(f"{job['name']}: {error!r}"[:300], file=sys.stderr, flush=True)
            continue
        print(f"{job['name']} {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    ordered = [kept[key] for key in map(json.dumps, wanted) if key in kept]
    lines = ",\n".join("  " + json.dumps(job) for job in ordered)
    if ordered:
        path.write_text(f'{{"versions": {json.dumps(versions)}, "jobs": [\n{lines}\n]}}\n', "ascii")
    return len(ordered)


def _kept(path: Path) -> dict[str, Mapping]:
    found: list[Mapping] = json.loads(path.read_text(encoding="utf-8"))["jobs"]
    asked = ("name", "trainer", "arguments", "layers", "plan")
    return {json.dumps({name: job[name] for name in asked}): job for job in found}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m ftplan.trace.bench_trainers")
    parser.add_argument("--out", type=Path, default=Path("validation/trainers"))
    parser.add_argument("--only", nargs="*", default=[], help="words of the names of jobs")
    parser.add_argument("--fresh", action="store_true", help="run every job again")
    options = parser.parse_args()
    total = write(options.out, options.only, fresh=options.fresh)
    print(f"{total} jobs in {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
