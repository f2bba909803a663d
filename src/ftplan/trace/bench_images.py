"""The bench of models that see or hear: true widths, few layers.

    python -m ftplan.trace.bench_images [--out validation/images.json] [--only NAME ...]

Jobs with images run on real tensors, with a small vocabulary; ``text`` ones, of models whose tower
is not run, on fake ones. Each job carries the config it was traced with: a catalogue model cut to
two blocks, and a tower of three. A job that is there already is not traced again (``--fresh``
does).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ftplan.trace.bench import AMP, BF16, BF16_AMP, FULL, Mapping, catalogue
from ftplan.trace.bench_trainers import LORA

__all__ = ["jobs", "main"]

TEXT_ONLY: Mapping = {**LORA, "targets": ["gate_proj", "up_proj", "down_proj"]}
"""Targets that no tower here has: it stays frozen, whole."""
TEXT_BY_PATH: Mapping = {**LORA, "targets": r".*language_model.*\.(gate|up|down)_proj"}
"""The same where a tower has modules of these names too; in Gemma 4 PEFT adapts none of them."""
NO_ROUTER: Mapping = {**LORA, "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]}
"""Linear layers of a tower and of attention: all-linear takes Llama 4's router too, and fails."""
WAYS: dict[str, Mapping] = {
    "full": {"method": FULL, "precision": BF16},
    "full-autocast-checkpointed": {
        "method": FULL, "precision": AMP, "gradient_checkpointing": True,
    },
    "lora": {"method": LORA, "precision": BF16},
    "lora-checkpointed": {"method": LORA, "precision": BF16_AMP, "gradient_checkpointing": True},
    "frozen-tower": {"method": TEXT_ONLY, "precision": BF16_AMP},
}  # fmt: skip
MODELS: dict[str, tuple[int, tuple[int, int] | None]] = {
    "llava-1.5-7b": (640, None),
    "gemma-3-4b": (512, None),
    "paligemma-3b": (512, None),
    "llava-1.6-7b": (2048, (336, 500)),
    "llava-onevision-0.5b": (3584, (600, 500)),
    "glm-4.1v-9b": (512, (224, 336)),
    "llama-4-scout": (512, None),
    "kimi-k2.5": (512, (224, 336)),
    "gemma-4-e2b": (512, (480, 640)),
    "gemma-4-31b": (512, (480, 640)),
    "internvl3-1b": (512, None),
    "qwen2-vl-2b": (512, (224, 336)),
    "qwen2.5-vl-3b": (512, (224, 336)),
    "qwen3-vl-2b": (512, (224, 320)),
    "qwen3.5-0.8b": (512, (224, 320)),
    "smolvlm-2.2b": (512, None),
    "smolvlm2-500m": (512, None),
    "pixtral-12b": (512, (224, 320)),
    "ministral-3-3b": (512, (224, 336)),
    "llama-3.2-11b-vision": (512, None),
}
"""Models with the sequence length and the size of an image, where there is a choice of it."""
TEXT_WAYS = ("full", "lora", "lora-checkpointed")
TEXTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "qwen2-audio-7b", "voxtral-mini-3b", "qwen2.5-omni-7b", "llava-onevision-0.5b",
            "kimi-k2.5", "ernie-4.5-vl-28b-a3b",
        ),
        TEXT_WAYS,
    ),
    "qwen3-omni-30b-a3b": ("full",),  # PEFT's all-linear takes its blocks for layers, and refuses
}  # fmt: skip
"""Models that are trained on text alone here, and how."""
VOCABULARY, BLOCKS, TOWER = 8192, 2, 3
_TOKEN, _OTHER = 100, 101
_OTHERS = (
    "video_token_id", "vision_start_token_id", "vision_end_token_id", "boi_token_index",
    "eoi_token_index",
)  # fmt: skip
_NEWER = (*_OTHERS, "audio_token_id", "image_start_token_id", "image_end_token_id")


def cut(config: Mapping) -> Mapping:
    """The config of a small model of the same widths, its special tokens inside the vocabulary."""
    config = copy.deepcopy(config)
    text, vision = config["text_config"], config["vision_config"]
    text |= {"vocab_size": VOCABULARY, "num_hidden_layers": BLOCKS}
    if "layer_types" in text:
        types = text["layer_types"]
        mixed = "linear_attention" in types  # whose last two are one of each
        text["layer_types"] = types[-BLOCKS:] if mixed else types[:BLOCKS]
    if "vocab_size_per_layer_input" in text:
        text["vocab_size_per_layer_input"] = VOCABULARY
    if "cross_attention_layers" in text:
        text |= {"cross_attention_layers": [BLOCKS - 1], "pad_token_id": 0}
    vision |= {key: TOWER for key in ("depth", "num_hidden_layers") if key in vision}
    if "num_global_layers" in vision:
        vision |= {"num_global_layers": BLOCKS, "intermediate_layers_indices": [0, 1]}
        vision |= {"vision_output_dim": 3 * vision["hidden_size"], "image_size": 280}
    if "fullatt_block_indexes" in vision:
        vision["fullatt_block_indexes"] = [TOWER - 1]
    if "deepstack_visual_indexes" in vision:
        vision["deepstack_visual_indexes"] = [0, 1]
    if config["model_type"] == "llama4":
        text["num_local_experts"] = 2
    if "n_routed_experts" in text:
        text |= {"n_routed_experts": 4, "num_experts_per_tok": 2}
    if config.get("audio_config"):
        config["audio_config"] |= {"num_hidden_layers": TOWER}
    if text.get("num_kv_shared_layers"):  # the last ones, of kinds that others are too
        kinds = ["sliding_attention", "full_attention"]
        text |= {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": kinds * 2}
    config |= {"image_token_id": _TOKEN, "image_token_index": _TOKEN}
    if config["model_type"].startswith(("qwen", "gemma3")):
        config |= dict.fromkeys(_OTHERS, _OTHER)
    if config["model_type"].startswith(("gemma4", "glm4", "kimi")):
        config |= dict.fromkeys(_NEWER, _OTHER)
    return config


def jobs() -> Iterator[Mapping]:
    """Every job, always the same ones."""
    from ftplan.trace.build import cut_depth

    configs = catalogue()
    for model, (seq_len, size) in MODELS.items():
        for way in WAYS:
            batch: Mapping = {"micro": 2, "seq_len": seq_len, "images": 1}
            if size is not None:
                batch["image_size"] = list(size)
            yield {
                "name": f"{model} {way}", "plan": _plan(model, way, batch),
                "config": cut(configs[model]),
            }  # fmt: skip
    for model, ways in TEXTS.items():
        for way in ways:
            yield {
                "name": f"{model} text {way}",
                "plan": _plan(model, way, {"micro": 2, "seq_len": 512}),
                "config": cut_depth(configs[model], BLOCKS),
            }


def _plan(model: str, way: str, batch: Mapping) -> Mapping:
    plan = {
        "version": 1, "model": model, "stack": "transformers", "task": "sft", **WAYS[way],
        "batch": batch, "optimizer": "adamw_torch_fused", "loss": "full",
        "attention": "sdpa", "hardware": {"gpu": "a100-80gb", "count": 1},
        "sharding": {"kind": "none"},
    }  # fmt: skip
    plan.setdefault("gradient_checkpointing", False)
    if plan["method"] is LORA and model.startswith("llama-4"):
        plan["method"] = NO_ROUTER
    if plan["method"] is TEXT_ONLY and model.startswith(("gemma-4", "glm-4")):
        plan["method"] = TEXT_BY_PATH
    return plan


def record(job: Mapping) -> Mapping:
    """Trace one job; its line of the bench."""
    from ftplan.trace.core import trace
    from ftplan.trace.job import plan_from

    result = trace(plan_from(job["plan"]), job["config"])
    return {
        **job,
        "allocated_bytes": result.allocated_bytes,
        "peak_phase": result.peak_phase,
        "phases": result.phases,
    }


def write(out: Path, only: Sequence[str], *, fresh: bool) -> int:
    """Trace what is missing; returns how many jobs there are now."""
    from ftplan.trace.core import versions

    kept: dict[str, Mapping] = {}
    if out.exists() and not fresh:
        kept = {job["name"]: job for job in json.loads(out.read_text("utf-8"))["jobs"]}
    wanted = list(jobs())
    for job in wanted:
        if job["name"] in kept or (only and not any(word in job["name"] for word in only)):
            continue
        began = time.monotonic()
        kept[job["name"]] = record(job)
        print(f"{job['name']} {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        lines = ",\n".join("  " + json.dumps(kept[j["name"]]) for j in wanted if j["name"] in kept)
        text = f'{{"versions": {json.dumps(versions())}, "jobs": [\n{lines}\n]}}\n'
        out.write_text(text, encoding="ascii")
    return len(kept)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m ftplan.trace.bench_images")
    parser.add_argument("--out", type=Path, default=Path("validation/images.json"))
    parser.add_argument("--only", nargs="*", default=[], help="words of the names of jobs")
    parser.add_argument("--fresh", action="store_true", help="trace every job again")
    options = parser.parse_args()
    print(f"{write(options.out, options.only, fresh=options.fresh)} jobs", file=sys.stderr)


if __name__ == "__main__":
    main()
