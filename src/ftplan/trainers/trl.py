"""TRL: YAML files and command lines of its trainers and CLI (``trl sft``), and an export.

Keys and defaults read from huggingface/trl trl/trainer/*_config.py and model_config.py, 1.16.0.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ftplan.catalog.stacks import find_stack
from ftplan.spec import Plan
from ftplan.trainers import writing
from ftplan.trainers.draft import Draft
from ftplan.trainers.keys import Keys
from ftplan.trainers.launch import Context, surroundings
from ftplan.trainers.transformers import (
    model_arguments,
    put_lora,
    put_quantised,
    training_arguments,
)

__all__ = ["NAME", "export", "matches", "read"]

NAME = "trl"
SOURCE = "huggingface/trl trl/trainer/%s, 1.16.0"

_TASKS = {
    "sft": "sft", "pt": "pt", "dpo": "dpo", "kto": "kto", "orpo": "orpo", "ppo": "ppo",
    "grpo": "grpo", "rm": "rm", "rloo": "grpo", "online_dpo": "dpo", "cpo": "orpo",
    "simpo": "orpo", "gkd": "distill",
}  # fmt: skip


def matches(data: dict[str, Any]) -> bool:
    """Whether a mapping is a TRL configuration of a training run."""
    trained = ("per_device_train_batch_size", "num_train_epochs", "learning_rate", "max_steps")
    return "model_name_or_path" in data and any(key in data for key in trained)


def read(context: Context, keys: Keys, program: str | None = None) -> None:
    """Fill the draft from a TRL configuration; ``program`` is the command's task, if any."""
    draft = context.draft
    draft.keys(keys)
    name = program or _task(draft, keys)
    task = _TASKS.get(name, "sft")
    draft.put("task", task)
    model_arguments(draft, keys)
    _method(draft, keys)
    _lengths(draft, keys, task)
    if task == "grpo" or name == "online_dpo":
        _rollout(draft, keys)
    _reference(draft, keys, name, task)
    packing = keys.flag("packing")
    draft.put("batch.packing", packing, keys.at("packing"))
    training_arguments(context, keys, micro=8, prefix=SOURCE % "base_config.py")
    if keys.text("teacher_model_name_or_path"):
        draft.put(
            "teacher",
            keys.text("teacher_model_name_or_path"),
            keys.at("teacher_model_name_or_path"),
        )
    surroundings(context, keys)
    if draft.get("sharding.kind") == "zero3" and draft.get("method.kind") in ("lora", "dora"):
        draft.assume(
            "method.adapter_dtype",
            draft.get("precision.weights") or "bf16",
            SOURCE % "sft_trainer.py: autocast_adapter_dtype=False under ZeRO-3",
        )


def _task(draft: Draft, keys: Keys) -> str:
    """What a file without a program trains, from the keys only one trainer has."""
    if keys.has("reward_funcs") or keys.has("num_generations") or keys.has("max_completion_length"):
        return "grpo"
    if keys.has("desirable_weight") or keys.has("undesirable_weight"):
        return "kto"
    if keys.has("reward_model_path"):
        return "ppo"
    if keys.has("center_rewards_coefficient"):
        return "rm"
    if keys.has("teacher_model_name_or_path"):
        return "gkd"
    preference = (
        keys.has("beta") or keys.has("max_prompt_length") or keys.has("precompute_ref_log_probs")
    )
    if not preference and not keys.has("rpo_alpha"):
        return "sft"
    hint = re.search(r"(?:^|[/_.\-])(dpo|kto|orpo|cpo|simpo)(?:[/_.\-]|$)", keys.file.lower())
    found = hint[1] if hint else "dpo"
    draft.find(
        "IMP010",
        f"the task is taken to be {found}: the file has a preference trainer's keys"
        + (", its path names the trainer" if hint else " and does not name the trainer"),
        keys.at("beta") if keys.has("beta") else keys.at("max_prompt_length"),
        help="pass --task kto or --task orpo when it is one of those",
    )
    return found


def _method(draft: Draft, keys: Keys) -> None:
    adapter = keys.flag("use_peft")
    if adapter:
        put_lora(
            draft,
            keys,
            kind="lora",
            rank=16,
            default_targets=None,
            source=SOURCE % "model_config.py",
        )
    else:
        draft.put("method.kind", "full")
        named = [key for key in ("lora_r", "lora_target_modules") if keys.has(key)]
        if named:
            draft.find(
                "CFG001",
                f"{' and '.join(named)} do nothing without use_peft: true; every weight is trained",
                keys.at(named[0]),
                help="add use_peft: true, or remove the LoRA keys",
            )
        keys.known(
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "lora_target_modules",
            "lora_modules_to_save",
            "use_dora",
            "use_rslora",
            "lora_target_parameters",
        )
    four, eight = keys.flag("load_in_4bit"), keys.flag("load_in_8bit")
    if four and eight:
        draft.find(
            "CFG007",
            "load_in_4bit and load_in_8bit are both on: TRL refuses this",
            keys.at("load_in_8bit"),
            help="keep one of the two",
        )
    kind = keys.word("bnb_4bit_quant_type") or "nf4"
    if four:
        put_quantised(draft, kind if kind in ("nf4", "fp4") else "nf4", keys, "load_in_4bit")
    elif eight:
        put_quantised(draft, "int8", keys, "load_in_8bit")
    nested = keys.flag("use_bnb_nested_quant")
    if four and draft.get("method.kind") == "qlora":
        draft.put("method.double_quant", nested, keys.at("use_bnb_nested_quant"))
    if (four or eight) and not adapter:
        draft.find(
            "CFG006",
            "a quantised base without an adapter cannot be trained: TRL stops here",
            keys.at("load_in_4bit" if four else "load_in_8bit"),
            help="add use_peft: true",
        )


def _lengths(draft: Draft, keys: Keys, task: str) -> None:
    at = None
    length = None
    given = False
    for name in ("max_seq_length", "max_length"):
        given |= keys.has(name)
        found = keys.count(name)
        if found is not None:
            length, at = found, keys.at(name)
    prompt = keys.count("max_prompt_length")
    if task == "grpo":
        completion = keys.count("max_completion_length")
        if completion is None:
            draft.assume(
                "rollout.completion_tokens",
                512,
                SOURCE % "grpo_config.py: max_completion_length = 512",
            )
            completion = 512
        else:
            draft.put("rollout.completion_tokens", completion, keys.at("max_completion_length"))
        draft.put("rollout.prompt_tokens", prompt, keys.at("max_prompt_length"))
        if prompt is not None:
            draft.put("batch.seq_len", prompt + completion, keys.at("max_prompt_length"))
        elif length is not None:
            draft.put("batch.seq_len", length, at)
        else:
            draft.ask(
                "batch.seq_len",
                "GRPO's sequence is prompt and completion; the file does not bound the prompt",
            )
        return
    if length is not None:
        draft.put("batch.seq_len", length, at)
    elif given:
        draft.ask(
            "batch.seq_len", "max_length is null: samples are not cut, the longest one decides"
        )
    else:
        draft.assume(
            "batch.seq_len", 1024, SOURCE % "sft_config.py and dpo_config.py: max_length = 1024"
        )


def _rollout(draft: Draft, keys: Keys) -> None:
    draft.put("rollout.generations", keys.count("num_generations"), keys.at("num_generations"))
    draft.assume("rollout.generations", 8, SOURCE % "grpo_config.py: num_generations = 8")
    if not keys.flag("use_vllm"):
        draft.assume("rollout.sampler", "trainer", SOURCE % "grpo_config.py: use_vllm = False")
        return
    mode = keys.word("vllm_mode")
    if keys.has("vllm_device") and mode is None:
        mode = "server"  # before 0.16 vLLM had a card of its own
    draft.put(
        "rollout.sampler", mode if mode in ("server", "colocate") else None, keys.at("vllm_mode")
    )
    draft.assume("rollout.sampler", "colocate", SOURCE % "grpo_config.py: vllm_mode = 'colocate'")
    if draft.get("rollout.sampler") == "colocate":
        share = keys.number("vllm_gpu_memory_utilization")
        draft.put("rollout.sampler_share", share, keys.at("vllm_gpu_memory_utilization"))
        draft.assume(
            "rollout.sampler_share",
            0.3,
            SOURCE % "grpo_config.py: vllm_gpu_memory_utilization = 0.3",
        )


def _reference(draft: Draft, keys: Keys, name: str, task: str) -> None:
    if task not in ("dpo", "kto", "orpo", "grpo", "ppo"):
        return
    adapter = draft.get("method.kind") != "full"
    beta = keys.number("beta")
    if task == "orpo":
        draft.put("reference", "none")
    elif keys.flag("precompute_ref_log_probs"):
        draft.put("reference", "precomputed", keys.at("precompute_ref_log_probs"))
    elif task == "grpo":
        wanted = (0.05 if name == "rloo" else 0.0) if beta is None else beta
        if beta is None and wanted == 0:
            draft.assume("reference", "none", SOURCE % "grpo_config.py: beta = 0.0")
        else:
            kind = "none" if wanted == 0 else "adapter" if adapter else "model"
            draft.put("reference", kind, keys.at("beta"))
    else:
        draft.assume(
            "reference",
            "adapter" if adapter else "model",
            SOURCE
            % "dpo_trainer.py: with an adapter the reference is the model with it switched off",
        )
    if keys.text("ref_model_name_or_path") or keys.text("ref_model"):
        draft.put("reference", "model", keys.at("ref_model_name_or_path"))
        if adapter:
            draft.find(
                "CFG014",
                "a second model is held as reference although an adapter is trained",
                keys.at("ref_model_name_or_path"),
                help="leave the reference model out: the base with its adapter off is the same",
            )


def export(plan: Plan) -> writing.Exported:
    """The plan as a file for TRL's CLI (``trl sft --config FILE``).

    Raises :class:`ftplan.errors.UnsupportedError` for a method or task TRL's CLI has no key for.
    """
    out = writing.Writer(plan, trainer=NAME)
    out.tasks("sft", "dpo", "kto", "rm")
    out.methods("full", "lora", "qlora", "dora")
    stack = find_stack(NAME)
    stored: Any = plan.precision.weights
    if plan.sharding.kind == "zero3" and stored in ("fp32", "bf16", "fp16"):
        # PEFT's upcast is off under ZeRO-3: adapters stay in the base's dtype
        out.profile(replace(stack, adapter_dtype=stored))
    else:
        out.profile(stack)
    kind = stack.loss_kind(
        method=plan.method.kind if plan.method else None, task=plan.task or "sft"
    )
    if plan.loss is not None and (
        plan.loss.kind != kind or plan.loss.chunk not in (None, stack.loss_chunk)
    ):
        out.differs("loss", plan.loss.kind, f"TRL's own loss is {kind}")
    out.line("model_name_or_path", out.model())
    if plan.precision.weights in ("bf16", "fp16", "fp32"):
        out.line(
            "dtype",
            {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[plan.precision.weights],
        )
    elif plan.precision.weights is None:
        out.line("dtype", "auto")
    out.attention(
        "attn_implementation", {"eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2"}
    )
    method = plan.method
    if method is not None and method.kind != "full":
        out.line("use_peft", True)
        out.lora(
            rank="lora_r",
            targets="lora_target_modules",
            modules="lora_modules_to_save",
            parameters="lora_target_parameters",
            dora="use_dora",
            rslora="use_rslora",
        )
        out.quantised(double="use_bnb_nested_quant")
    out.line("max_length", plan.batch.seq_len)
    if plan.task in ("dpo", "kto"):
        out.line("beta", 0.1)
        out.line("desirable_weight", 1.0 if plan.task == "kto" else None)
        if plan.reference == "precomputed":
            out.line("precompute_ref_log_probs", True)
    if plan.task == "rm":
        out.lines.append("center_rewards_coefficient: null")
    if plan.task in (None, "sft", "pt"):
        out.line("packing", plan.batch.packing)
    out.training_arguments()
    return out.done(hint="launch with: accelerate launch -m trl.scripts.%s --config FILE")
