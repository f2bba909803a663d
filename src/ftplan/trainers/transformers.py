"""transformers' TrainingArguments: flags of scripts around the stock Trainer, and the part that
TRL, LLaMA-Factory and ms-swift share with it.

Keys read from huggingface/transformers src/transformers/training_args.py, 5.23.0, and the
examples' run_clm.py; the FastChat and Alpaca scripts use the same ones.
"""

from __future__ import annotations

from typing import Any

from ftplan.trainers import deepspeed
from ftplan.trainers.accelerate import apply_fsdp
from ftplan.trainers.draft import Draft
from ftplan.trainers.keys import Keys
from ftplan.trainers.launch import Context, surroundings
from ftplan.trainers.words import (
    attention,
    dtype,
    model_name,
    optimizer_name,
    peft_default_targets,
    targets,
)

__all__ = ["NAME", "matches", "model_arguments", "put_lora", "read", "training_arguments"]

NAME = "transformers"
SOURCE = "huggingface/transformers src/transformers/training_args.py, 5.23.0"


def matches(data: dict[str, Any]) -> bool:
    """Whether a mapping holds flags of transformers' example scripts (or FastChat's), not TRL's."""
    ours = any(key in data for key in _SCRIPT_KEYS)
    return "model_name_or_path" in data and ours and not any(key in data for key in _TRL_KEYS)


_SCRIPT_KEYS = (
    "block_size", "train_file", "validation_file", "task_name", "model_max_length", "data_path",
    "q_lora", "max_source_length", "source_prefix", "max_train_samples", "pad_to_max_length",
)  # fmt: skip
_TRL_KEYS = (
    "use_peft", "packing", "loss_type", "dataset_mixture", "max_length", "beta", "reward_funcs",
    "dataset_mixer", "max_prompt_length", "num_generations",
)  # fmt: skip


def read(context: Context, keys: Keys) -> None:
    """Fill the draft from the flags of a script around transformers' Trainer."""
    draft = context.draft
    draft.keys(keys)
    draft.put("task", _task(keys))
    model_arguments(draft, keys)
    lengths = ("model_max_length", "block_size", "max_seq_length", "max_length", "cutoff_len")
    for name in lengths:
        draft.put("batch.seq_len", keys.count(name), keys.at(name))
    if keys.flag("use_peft") or keys.flag("use_lora") or keys.flag("q_lora") or keys.has("lora_r"):
        put_lora(draft, keys, kind="lora", rank=8, default_targets=None)
        if keys.flag("q_lora"):
            put_quantised(draft, "nf4", keys, "q_lora")
    else:
        draft.put("method.kind", "full")
    training_arguments(context, keys, micro=8)
    surroundings(context, keys)


def _task(keys: Keys) -> str:
    program = " ".join(keys.words("$words") or ())
    if keys.has("task_name") or "glue" in program:
        return "classify"
    return "sft"


def model_arguments(draft: Draft, keys: Keys) -> None:
    """The model, its dtype and attention from ``ModelArguments``-like keys."""
    for name in ("model_name_or_path", "model_name", "model_id"):
        value = keys.text(name)
        draft.put("model.name", model_name(value), keys.at(name))
    for name in ("torch_dtype", "dtype"):
        put_dtype(draft, keys, name)
    put_attention(draft, keys, "attn_implementation")
    if keys.flag("use_flash_attention_2") or keys.flag("use_flash_attn"):
        draft.put("attention", "flash", keys.at("use_flash_attention_2"))


def put_dtype(draft: Draft, keys: Keys, *path: str) -> None:
    """Storage of the base weights; ``auto`` is the checkpoint's own."""
    text = keys.word(*path)
    if text is None:
        return
    if text == "auto":
        draft.put("precision.auto", True)
        return
    found = dtype(text)
    if found is None:
        draft.find("IMP005", f"the dtype {text!r} is not known", keys.at(*path))
    draft.put("precision.weights", found, keys.at(*path))


def put_attention(draft: Draft, keys: Keys, *path: str) -> None:
    """Attention implementation; an unknown one is a finding."""
    text = keys.text(*path)
    if text is None:
        return
    found = attention(text)
    if found is None:
        draft.find("IMP005", f"the attention {text!r} is not known", keys.at(*path))
    draft.put("attention", found, keys.at(*path))


def put_optimizer(draft: Draft, keys: Keys, *path: str) -> None:
    """Optimizer; a name that no table knows is kept and named in a finding."""
    text = keys.text(*path)
    name, known = optimizer_name(text)
    draft.put("optimizer.name", name, keys.at(*path))
    if not known:
        draft.find(
            "IMP005",
            f"the optimizer {text!r} is not known: its states cannot be sized",
            keys.at(*path),
            help="pass --optimizer NAME with the nearest one (`ftplan optimizers` lists them)",
        )


def put_lora(
    draft: Draft,
    keys: Keys,
    *,
    kind: str,
    rank: int,
    default_targets: tuple[str, ...] | str | None,
    source: str = "huggingface/peft src/peft/tuners/lora/config.py, 0.21.2",
) -> None:
    """LoRA from the common spellings of its keys (``lora_r``, ``lora_target_modules`` ...).

    Without targets PEFT chooses by the model's family, unless ``default_targets`` says otherwise.
    """
    draft.put("method.kind", kind)
    for name in ("lora_rank", "lora_r"):
        draft.put("method.rank", keys.count(name), keys.at(name))
    draft.assume("method.rank", rank, source)
    draft.put("method.alpha", keys.whole("lora_alpha"), keys.at("lora_alpha"))
    draft.put("method.dropout", keys.number("lora_dropout"), keys.at("lora_dropout"))
    for name in ("lora_target_modules", "target_modules", "lora_target"):
        draft.put("method.targets", targets(keys.words(name)), keys.at(name))
    if draft.get("method.targets") is None and not keys.has("lora_target_parameters"):
        if default_targets is not None:
            draft.assume("method.targets", default_targets, source)
        else:
            chosen, why = peft_default_targets(draft.get("model.name"))
            draft.assume("method.targets", chosen, why)
    for name in ("lora_modules_to_save", "modules_to_save"):
        draft.put("method.modules_to_save", keys.words(name), keys.at(name))
    draft.put(
        "method.target_parameters",
        keys.words("lora_target_parameters"),
        keys.at("lora_target_parameters"),
    )
    if keys.flag("use_dora"):
        draft.put("method.use_dora", True, keys.at("use_dora"))
        if kind == "lora":
            draft.put("method.kind", "dora", keys.at("use_dora"))
    draft.put("method.use_rslora", keys.flag("use_rslora") or None, keys.at("use_rslora"))


def put_quantised(draft: Draft, weights: str, keys: Keys, *path: str) -> None:
    """A quantised base: under an adapter the method is ``qlora``."""
    draft.put("precision.weights", weights, keys.at(*path))
    if draft.get("method.kind") in ("lora", "dora"):
        if draft.get("method.kind") == "dora":
            draft.put("method.use_dora", True)
        draft.put("method.kind", "qlora", keys.at(*path))


def training_arguments(context: Context, keys: Keys, *, micro: int, prefix: str = SOURCE) -> None:
    """Batch, accumulation, checkpointing, precision, optimizer, sharding of TrainingArguments."""
    draft = context.draft
    for name in ("per_gpu_train_batch_size", "per_device_train_batch_size"):
        draft.put("batch.micro", keys.count(name), keys.at(name))
    if not any(
        keys.has(name) for name in ("per_device_train_batch_size", "per_gpu_train_batch_size")
    ):
        draft.assume("batch.micro", micro, f"{prefix}: per_device_train_batch_size = {micro}")
    steps = keys.count("gradient_accumulation_steps")
    draft.put("batch.accumulation", steps, keys.at("gradient_accumulation_steps"))
    _evaluation(draft, keys)
    _checkpointing(draft, keys)
    mixed = mixed_precision(draft, keys)
    draft.put("precision.mixed", mixed)
    put_optimizer(draft, keys, "optim")
    if keys.flag("adafactor"):
        draft.put("optimizer.name", "adafactor", keys.at("adafactor"))
    if keys.flag("use_liger_kernel"):
        draft.put("kernels", "liger", keys.at("use_liger_kernel"))
        if draft.stack.loss == "full":
            draft.put("loss.kind", "fused", keys.at("use_liger_kernel"))
    cap = keys.count("ddp_bucket_cap_mb")
    if cap is not None:
        draft.put("sharding.bucket_bytes", cap * 2**20, keys.at("ddp_bucket_cap_mb"))
    each = ("accelerator_config", "gradient_accumulation_kwargs", "sync_each_batch")
    if keys.flag(*each):
        draft.put("sharding.no_sync", False, keys.at(*each))
    _sharding(context, keys)


def _evaluation(draft: Draft, keys: Keys) -> None:
    strategy = keys.word("eval_strategy") or keys.word("evaluation_strategy")
    wanted = strategy in ("steps", "epoch") or keys.flag("do_eval") is True
    size = keys.count("per_device_eval_batch_size")
    if wanted and strategy != "no" and keys.flag("do_eval") is not False:
        draft.put("batch.eval_micro", size, keys.at("per_device_eval_batch_size"))


def _checkpointing(draft: Draft, keys: Keys) -> None:
    raw = keys.word("gradient_checkpointing")
    if raw in ("unsloth", "offload"):
        draft.put("gradient_checkpointing.kind", "offload", keys.at("gradient_checkpointing"))
    else:
        on = keys.flag("gradient_checkpointing")
        if on is not None:
            kind = "full" if on else "none"
            draft.put("gradient_checkpointing.kind", kind, keys.at("gradient_checkpointing"))
    kwargs = keys.mapping("gradient_checkpointing_kwargs")
    reentrant = None if kwargs is None else kwargs.get("use_reentrant")
    if isinstance(reentrant, bool):
        at = keys.at("gradient_checkpointing_kwargs")
        kind = draft.get("gradient_checkpointing.kind") or draft.stack.checkpointing
        if kind != "none":
            draft.put("gradient_checkpointing.reentrant", reentrant, at)
    if isinstance(kwargs, dict) and kwargs.get("selective") is True:
        draft.put(
            "gradient_checkpointing.kind", "selective", keys.at("gradient_checkpointing_kwargs")
        )
    if keys.flag("activation_offloading"):
        draft.put("gradient_checkpointing.kind", "offload", keys.at("activation_offloading"))


def mixed_precision(draft: Draft, keys: Keys) -> str | None:
    """Autocast from ``bf16`` and ``fp16``; both at once is a contradiction."""
    bf16, fp16 = _auto(keys, "bf16"), _auto(keys, "fp16")
    if bf16 and fp16:
        draft.find(
            "CFG007",
            "bf16 and fp16 are both on: the trainer refuses this",
            keys.at("fp16"),
            help="keep one of the two",
        )
    if bf16:
        draft.places["precision.mixed"] = keys.at("bf16")
        return "bf16"
    if fp16:
        draft.places["precision.mixed"] = keys.at("fp16")
        return "fp16"
    return "no" if bf16 is False or (fp16 is False and draft.stack.mixed == "no") else None


def _auto(keys: Keys, name: str) -> bool | None:
    return True if keys.word(name) == "auto" else keys.flag(name)


def _sharding(context: Context, keys: Keys) -> None:
    draft = context.draft
    inline = keys.mapping("deepspeed")
    if inline is not None:
        from ftplan.files.document import Document

        nested = Document(data=inline, file=keys.file, text="")
        deepspeed.apply(draft, Keys(nested))
    else:
        named = keys.text("deepspeed")
        if named is not None and named != "false":
            document = context.reads(named, keys, "deepspeed")
            if document is not None:
                deepspeed.apply(draft, Keys(document))
            elif draft.get("sharding.kind") is None:
                guessed = stage_of(named)
                if guessed is not None:
                    draft.put("sharding.kind", guessed, keys.at("deepspeed"))
                    draft.find(
                        "IMP010",
                        f"{guessed} is taken from the name {named}; its offload and buckets "
                        f"are unknown",
                        keys.at("deepspeed"),
                    )
    options = keys.words("fsdp") if not isinstance(keys.raw("fsdp"), bool) else ("full_shard",)
    if options and options[0].lower() not in ("false", "none"):
        split = tuple(part for option in options for part in option.split())
        apply_fsdp(draft, keys, ("fsdp_config",), split)
        named = keys.text("fsdp_config") if not keys.section("fsdp_config") else None
        if named is not None:
            document = context.reads(named, keys, "fsdp_config")
            if document is not None:
                apply_fsdp(draft, draft.keys(Keys(document)), (), split)
        layers = keys.words("fsdp_transformer_layer_cls_to_wrap")
        if layers or "auto_wrap" in split:
            draft.put("sharding.wrap", "block", keys.at("fsdp"))


def stage_of(name: str) -> str | None:
    """The ZeRO stage that a DeepSpeed file's name states (``ds_z3_offload.json``), if it does."""
    import re

    match = re.search(r"(?:zero|z|stage|_s)_?-?([0-3])(?![0-9])", name.lower())
    return None if match is None else deepspeed.STAGES[int(match[1])]
