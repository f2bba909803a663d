"""Unsloth: Studio's YAML, and the flags of ``unsloth-cli.py``.

Keys and defaults read from unslothai/unsloth studio/backend/assets/configs, studio/backend/models/
training.py and unsloth-cli.py, 2026.8.19.
"""

from __future__ import annotations

import re
from typing import Any

from ftplan.trainers.draft import Draft
from ftplan.trainers.keys import Keys
from ftplan.trainers.launch import Context, surroundings
from ftplan.trainers.transformers import put_lora, put_optimizer
from ftplan.trainers.words import model_name, targets

__all__ = ["NAME", "matches", "read"]

NAME = "unsloth"
SOURCE = "unslothai/unsloth studio/backend/%s, 2026.8.19"


def matches(data: dict[str, Any]) -> bool:
    """Whether a mapping is an Unsloth Studio configuration."""
    training = data.get("training")
    return (
        isinstance(training, dict)
        and "max_seq_length" in training
        and ("lora" in data or "training_type" in training)
    )


def read(context: Context, keys: Keys) -> None:
    """Fill the draft from an Unsloth configuration or command line."""
    draft = context.draft
    draft.keys(keys)
    if keys.section("training"):
        _studio(draft, keys)
    else:
        _command(draft, keys)
    draft.put("task", draft.get("task") or "sft")
    draft.assume("hardware.count", 1, "Unsloth trains on one GPU unless a launcher starts more")
    surroundings(context, keys)


def _studio(draft: Draft, keys: Keys) -> None:
    training, lora = "training", "lora"
    name = (
        keys.text("model") or keys.text("model", "name")
        if not keys.section("model")
        else keys.text("model", "name")
    )
    draft.put("model.name", model_name(name), keys.at("model"))
    if name is None:
        match = re.search(r"Model defaults for (\S+)", keys.layers[0].text[:400])
        hint = f"; its first line names {match[1]}" if match else ""
        draft.ask(
            "model.name",
            f"this is a set of defaults, the file does not say which model is trained{hint}",
        )
    draft.put("batch.micro", keys.count(training, "batch_size"), keys.at(training, "batch_size"))
    draft.put(
        "batch.seq_len", keys.count(training, "max_seq_length"), keys.at(training, "max_seq_length")
    )
    steps = keys.count(training, "gradient_accumulation_steps")
    draft.put("batch.accumulation", steps, keys.at(training, "gradient_accumulation_steps"))
    draft.put("batch.packing", keys.flag(training, "packing"), keys.at(training, "packing"))
    _checkpointing(draft, keys, training, "gradient_checkpointing")
    put_optimizer(draft, keys, training, "optim")
    kind = keys.word(training, "training_type") or "lora"
    four = keys.flag(training, "load_in_4bit")
    if "embedding" in keys.file or keys.text("logging", "wandb_project") == "embedding-finetuning":
        draft.put("task", "embed", keys.at(training))
    if kind == "full":
        draft.put("method.kind", "full", keys.at(training, "training_type"))
        if four:
            draft.find(
                "CFG006",
                "load_in_4bit with full finetuning: only adapters train on a quantised base",
                keys.at(training, "load_in_4bit"),
                help="set load_in_4bit: false",
            )
        draft.put("loss.kind", "fused")
    else:
        _lora(draft, keys, lora)
        if four is None:
            draft.assume(
                "precision.weights", "nf4", SOURCE % "models/training.py: load_in_4bit = True"
            )
            draft.put("method.kind", "qlora")
        elif four or kind == "qlora":
            draft.put("precision.weights", "nf4", keys.at(training, "load_in_4bit"))
            draft.put("method.kind", "qlora", keys.at(training, "load_in_4bit"))
    keys.mapping(lora)
    if keys.raw("audio_type") or keys.flag("audio_input") or keys.flag(lora, "vision_all_linear"):
        draft.find(
            "IMP007",
            "audio or vision towers are not sized, the text model is",
            keys.at("audio_type"),
        )


def _lora(draft: Draft, keys: Keys, lora: str) -> None:
    draft.put("method.kind", "lora", keys.at(lora))
    draft.put("method.rank", keys.count(lora, "lora_r"), keys.at(lora, "lora_r"))
    draft.put("method.alpha", keys.whole(lora, "lora_alpha"), keys.at(lora, "lora_alpha"))
    draft.put("method.dropout", keys.number(lora, "lora_dropout"), keys.at(lora, "lora_dropout"))
    draft.put(
        "method.targets",
        targets(keys.words(lora, "target_modules")),
        keys.at(lora, "target_modules"),
    )
    if keys.flag(lora, "use_dora"):
        draft.put("method.use_dora", True, keys.at(lora, "use_dora"))
        draft.put("method.kind", "dora", keys.at(lora, "use_dora"))
    draft.put(
        "method.use_rslora", keys.flag(lora, "use_rslora") or None, keys.at(lora, "use_rslora")
    )
    off = [
        part
        for part in ("language_layers", "attention_modules", "mlp_modules")
        if keys.flag(lora, f"finetune_{part}") is False
    ]
    if off:
        draft.not_modelled(
            keys,
            (lora, f"finetune_{off[0]}"),
            "adapters are left out of part of the model; all targets are sized",
        )


def _checkpointing(draft: Draft, keys: Keys, *path: str) -> None:
    value = keys.word(*path)
    if value is None:
        return
    kind = "offload" if value == "unsloth" else "full" if value in ("true", "yes", "1") else "none"
    draft.put("gradient_checkpointing.kind", kind, keys.at(*path))


def _command(draft: Draft, keys: Keys) -> None:
    draft.put("model.name", model_name(keys.text("model_name")), keys.at("model_name"))
    draft.put("batch.seq_len", keys.count("max_seq_length"), keys.at("max_seq_length"))
    draft.assume("batch.seq_len", 2048, "unslothai/unsloth unsloth-cli.py: max_seq_length = 2048")
    draft.put(
        "batch.micro",
        keys.count("per_device_train_batch_size"),
        keys.at("per_device_train_batch_size"),
    )
    draft.assume(
        "batch.micro", 2, "unslothai/unsloth unsloth-cli.py: per_device_train_batch_size = 2"
    )
    steps = keys.count("gradient_accumulation_steps")
    draft.put("batch.accumulation", steps, keys.at("gradient_accumulation_steps"))
    draft.assume(
        "batch.accumulation", 4, "unslothai/unsloth unsloth-cli.py: gradient_accumulation_steps = 4"
    )
    put_lora(
        draft,
        keys,
        kind="lora",
        rank=16,
        default_targets=(
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ),
        source="unslothai/unsloth unsloth-cli.py, 2026.8.19",
    )
    draft.put("method.rank", keys.count("r"), keys.at("r"))
    if keys.flag("load_in_4bit"):
        draft.put("precision.weights", "nf4", keys.at("load_in_4bit"))
        draft.put("method.kind", "qlora", keys.at("load_in_4bit"))
    _checkpointing(draft, keys, "use_gradient_checkpointing")
    put_optimizer(draft, keys, "optim")
    draft.put("batch.packing", keys.flag("packing"), keys.at("packing"))
