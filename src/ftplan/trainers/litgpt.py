"""litgpt: YAML of ``config_hub`` and ``litgpt finetune_*`` / ``pretrain`` command lines.

Keys and defaults read from Lightning-AI/litgpt litgpt/finetune/*.py, litgpt/pretrain.py and
litgpt/args.py, 0.5.13.
"""

from __future__ import annotations

from typing import Any

from ftplan.trainers.draft import Draft
from ftplan.trainers.keys import Keys
from ftplan.trainers.launch import Context, surroundings
from ftplan.trainers.words import litgpt_model, optimizer_name, own_names

__all__ = ["NAME", "matches", "read"]

NAME = "litgpt"
SOURCE = "Lightning-AI/litgpt litgpt/%s, 0.5.13"

_PRECISION = {
    "bf16-true": ("no", "bf16"), "16-true": ("no", "fp16"), "32-true": ("no", "fp32"),
    "bf16-mixed": ("bf16", "fp32"), "16-mixed": ("fp16", "fp32"), "32": ("no", "fp32"),
}  # fmt: skip
_QUANT = {
    "bnb.nf4": ("nf4", False), "bnb.nf4-dq": ("nf4", True), "bnb.fp4": ("fp4", False),
    "bnb.fp4-dq": ("fp4", True), "bnb.int8": ("int8", None), "bnb.int8-training": ("int8", None),
}  # fmt: skip
_ADAPTERS = {"finetune_adapter": "llama_adapter", "finetune_adapter_v2": "llama_adapter_v2"}


def matches(data: dict[str, Any]) -> bool:
    """Whether a mapping is a litgpt training configuration."""
    train = data.get("train")
    named = "checkpoint_dir" in data or "model_name" in data
    return (
        isinstance(train, dict)
        and named
        and ("micro_batch_size" in train or "global_batch_size" in train)
    )


def read(context: Context, keys: Keys, verb: str | None = None) -> None:
    """Fill the draft from a litgpt configuration; ``verb`` is the command (``finetune_lora``)."""
    draft = context.draft
    draft.keys(keys)
    pretrain = verb == "pretrain" or (keys.has("model_name") and not keys.has("checkpoint_dir"))
    draft.put("task", "pt" if pretrain else "sft")
    _model(draft, keys)
    lora = keys.has("lora_r") or verb in ("finetune_lora", "finetune")
    _method(draft, keys, "lora" if lora and verb != "finetune_full" else "full", verb)
    mixed, weights = _PRECISION.get(keys.word("precision") or "", (None, None))
    if keys.has("precision") and mixed is None and keys.word("precision"):
        draft.find(
            "IMP005", f"the precision {keys.word('precision')!r} is not known", keys.at("precision")
        )
    draft.put("precision.mixed", mixed, keys.at("precision"))
    draft.assume(
        "precision.mixed",
        "no",
        SOURCE % "utils.py: get_default_supported_precision gives bf16-true",
    )
    quant = keys.word("quantize")
    if quant is not None:
        stored, double = _QUANT.get(quant, (None, None))
        if stored is None:
            draft.find("IMP005", f"quantize: {quant} is not known", keys.at("quantize"))
        draft.put("precision.weights", stored, keys.at("quantize"))
        if draft.get("method.kind") == "lora":
            draft.put("method.kind", "qlora", keys.at("quantize"))
        if draft.get("method.kind") != "full":
            draft.put("method.double_quant", double, keys.at("quantize"))
        else:
            draft.find(
                "CFG006",
                "quantize with full finetuning: only adapters train on a quantised base",
                keys.at("quantize"),
                help="use finetune_lora, or remove quantize",
            )
    else:
        draft.put("precision.weights", weights, keys.at("precision"))
    if draft.get("method.kind") != "full":
        draft.put(
            "method.adapter_dtype", "fp32" if weights == "fp32" else "bf16", keys.at("precision")
        )
    _batch(context, keys, verb)
    _optimizer(draft, keys, quant)
    for name in ("data", "eval", "log", "model_config"):
        keys.raw(name)


def _model(draft: Draft, keys: Keys) -> None:
    for name in ("checkpoint_dir", "model_name", "initial_checkpoint_dir"):
        value = keys.text(name)
        if value is None or draft.get("model.name") is not None:
            continue
        parts = [
            part for part in value.split("/") if part not in ("", ".", "..", "~", "checkpoints")
        ]
        found = (
            "/".join(parts[-2:])
            if name != "model_name" and len(parts) >= 2
            else litgpt_model(parts[-1] if parts else value)
        )
        draft.put("model.name", found, keys.at(name))
    words = keys.words("$words") or ()
    if words and draft.get("model.name") is None:
        draft.put("model.name", litgpt_model(words[0].removeprefix("checkpoints/")))
    if keys.section("model_config"):
        draft.find(
            "IMP007",
            "model_config gives the shape itself: pass --config for a shape that is not in "
            "the catalogue",
            keys.at("model_config"),
        )


def _method(draft: Draft, keys: Keys, kind: str, verb: str | None) -> None:
    kind = _ADAPTERS.get(verb or "", kind)
    draft.put("method.kind", kind)
    if kind != "lora":
        return
    draft.put("method.rank", keys.count("lora_r"), keys.at("lora_r"))
    draft.put("method.alpha", keys.whole("lora_alpha"), keys.at("lora_alpha"))
    draft.put("method.dropout", keys.number("lora_dropout"), keys.at("lora_dropout"))
    on = {
        name: keys.flag(f"lora_{name}")
        for name in ("query", "key", "value", "projection", "mlp", "head")
    }
    default = {"query": True, "key": False, "value": True}
    chosen = {
        name: default.get(name, False) if value is None else value for name, value in on.items()
    }
    attention = [name for name in ("query", "key", "value", "projection") if chosen[name]]
    if len(attention) == 4 and chosen["mlp"] and not chosen["head"]:
        draft.put("method.targets", "all-linear", keys.at("lora_mlp"))
        return
    names = {
        "query": ("q_proj",),
        "key": ("k_proj",),
        "value": ("v_proj",),
        "projection": ("o_proj",),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
        "head": ("lm_head",),
    }
    picked = tuple(module for name, modules in names.items() if chosen[name] for module in modules)
    if picked and any(value is not None for value in on.values()):
        model = draft.get("model.name")
        draft.put("method.targets", own_names(model, picked), keys.at("lora_query"))
    else:
        usual = own_names(draft.get("model.name"), ("q_proj", "v_proj"))
        draft.assume("method.targets", usual, SOURCE % "finetune/lora.py: lora_query, lora_value")


def _batch(context: Context, keys: Keys, verb: str | None) -> None:
    draft = context.draft
    pretrain = draft.get("task") == "pt"
    source = SOURCE % ("pretrain.py" if pretrain else "finetune/lora.py")
    draft.put(
        "batch.micro", keys.count("train", "micro_batch_size"), keys.at("train", "micro_batch_size")
    )
    draft.assume("batch.micro", 4 if pretrain else 1, f"{source}: train.micro_batch_size")
    length = keys.count("train", "max_seq_length")
    draft.put("batch.seq_len", length, keys.at("train", "max_seq_length"))
    if length is None:
        draft.ask(
            "batch.seq_len", "train.max_seq_length is null: the longest sample of the data decides"
        )
        draft.places["batch.seq_len?"] = keys.at("train", "max_seq_length")
    devices = keys.word("devices")
    nodes = keys.count("num_nodes")
    if devices is not None and devices.lstrip("-").isdigit() and int(devices) > 0:
        draft.put("hardware.count", int(devices), keys.at("devices"))
    elif devices is None and not pretrain:
        draft.assume("hardware.count", 1, f"{source}: devices = 1")
    if nodes is not None and nodes > 1:
        draft.put("hardware.nodes", nodes, keys.at("num_nodes"))
    surroundings(context, keys)
    total = (draft.get("hardware.count") or 1) * (draft.get("hardware.nodes") or 1)
    if total > 1:
        draft.retract("sharding.kind")
        draft.put("sharding.kind", "fsdp", keys.at("devices"))
        draft.put("sharding.wrap", "block")
        draft.put("sharding.version", 1)
        draft.put("sharding.use_orig_params", True)  # lightning/fabric/strategies/fsdp.py
        draft.put("sharding.reshard_after_forward", True)
    batch = keys.count("train", "global_batch_size")
    if batch is not None:
        steps = max(batch // total // draft.get("batch.micro"), 1)
        draft.put("batch.accumulation", steps, keys.at("train", "global_batch_size"))
    keys.mapping("train")


def _optimizer(draft: Draft, keys: Keys, quant: str | None) -> None:
    text = (
        keys.text("optimizer", "class_path")
        if keys.section("optimizer")
        else keys.text("optimizer")
    )
    name, known = optimizer_name(text)
    if text is not None and "." not in text and text.lower() == "adamw":
        name, known = "adamw_torch", True
    if quant is not None and draft.get("method.kind") == "qlora":
        draft.assume(
            "optimizer.name", "paged_adamw_32bit", SOURCE % "utils.py: instantiate_bnb_optimizer"
        )
    else:
        draft.put("optimizer.name", name, keys.at("optimizer"))
        if not known:
            draft.find("IMP005", f"the optimizer {text} is not known", keys.at("optimizer"))
        if keys.flag("optimizer", "init_args", "fused") and name == "adamw_torch":
            draft.put("optimizer.name", "adamw_torch_fused", keys.at("optimizer"))
    keys.raw("optimizer")
