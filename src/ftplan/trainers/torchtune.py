"""torchtune: recipe YAML, ``tune run`` command lines, and an export.

Keys read from pytorch/torchtune recipes/*.py and torchtune/models/*/_model_builders.py, 0.7.0.
Model builders become hub ids by the table in ``data/words.json``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ftplan.catalog.stacks import find_stack
from ftplan.errors import InputError
from ftplan.files.document import Key
from ftplan.spec import Plan
from ftplan.trainers import writing
from ftplan.trainers.draft import Draft
from ftplan.trainers.keys import Keys
from ftplan.trainers.launch import Context, surroundings
from ftplan.trainers.words import (
    dtype,
    model_name,
    optimizer_name,
    own_names,
    torchtune_model,
)

__all__ = ["NAME", "export", "matches", "read", "refuse"]

NAME = "torchtune"
SOURCE = "pytorch/torchtune %s, 0.7.0"

ATTENTION_NAMES = {
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "output_proj": "o_proj",
}
MLP_NAMES = ("gate_proj", "up_proj", "down_proj")
_LOSSES = {
    "LinearCrossEntropyLoss": "chunked", "CEWithChunkedOutputLoss": "chunked",
    "ForwardKLWithChunkedOutputLoss": "chunked", "CrossEntropyLoss": "full",
    "LinearGRPOLoss": "chunked",
}  # fmt: skip


def matches(data: dict[str, Any]) -> bool:
    """Whether a mapping is a torchtune configuration: components named for torchtune."""
    return any(
        isinstance(value, dict)
        and str(value.get("_component_", "")).startswith(("torchtune.", "torch.", "bitsandbytes."))
        for value in data.values()
    )


def refuse(data: dict[str, Any], keys: Keys) -> InputError | None:
    """Why a torchtune configuration is no training job."""
    give = "give the configuration of a finetuning recipe, with an optimizer"
    if "optimizer" in data or "training" in data:
        return None
    if "tasks" in data:
        return keys.error(
            "this torchtune file evaluates a model, it does not train", "tasks", remedy=give
        )
    if "prompt" in data or "max_new_tokens" in data:
        return keys.error(
            "this torchtune file generates text, it does not train", "prompt", remedy=give
        )
    if "quantizer" in data:
        return keys.error(
            "this torchtune file quantises a model, it does not train", "quantizer", remedy=give
        )
    return keys.error("this torchtune file has no optimizer: it does not train", remedy=give)


def read(context: Context, keys: Keys, recipe: str | None = None) -> None:
    """Fill the draft from a torchtune configuration; ``recipe`` is ``tune run``'s argument."""
    draft = context.draft
    draft.keys(keys)
    base: tuple[Key, ...] = ("training",) if keys.section("training").get("optimizer") else ()
    task = _task(keys, base)
    draft.put("task", task)
    _model(draft, keys)
    draft.put("batch.micro", keys.count(*base, "batch_size"), keys.at(*base, "batch_size"))
    draft.put(
        "batch.accumulation",
        keys.count("gradient_accumulation_steps"),
        keys.at("gradient_accumulation_steps"),
    )
    _length(draft, keys, task)
    packed = keys.flag("dataset", "packed")
    draft.put(
        "batch.packing",
        packed if packed is not None else keys.flag("packed"),
        keys.at("dataset", "packed"),
    )
    if keys.count("run_val_every_n_steps"):
        draft.put("batch.eval_micro", keys.count("batch_size_val"), keys.at("batch_size_val"))
    keys.raw("batch_size_val")
    weights = dtype(keys.text("dtype"))
    draft.put("precision.mixed", "no")
    if draft.get("precision.weights") is None:
        draft.put("precision.weights", weights, keys.at("dtype"))
    if draft.get("method.kind") in ("lora", "qlora", "dora") and weights in ("bf16", "fp32"):
        draft.put("method.adapter_dtype", weights, keys.at("dtype"))
    _checkpointing(draft, keys, base)
    _optimizer(draft, keys, base)
    loss = (keys.text(*base, "loss", "_component_") or "").rsplit(".", 1)[-1]
    draft.put("loss.kind", _LOSSES.get(loss, "full"), keys.at(*base, "loss"))
    keys.mapping(*base, "loss")
    if keys.flag(*base, "compile"):
        draft.not_modelled(
            keys, (*base, "compile"), "torch.compile fuses operations and keeps fewer tensors"
        )
    _reference(draft, keys, task)
    surroundings(context, keys)
    _sharding(draft, keys, recipe)


def _task(keys: Keys, base: tuple[Key, ...]) -> str:
    loss = (keys.text(*base, "loss", "_component_") or "").lower()
    if "grpo" in loss or keys.has("grpo_samples"):
        return "grpo"
    if keys.has("policy_model") or "ppo" in loss:
        return "ppo"
    if any(name in loss for name in ("dpo", "rso", "simpo")):
        return "dpo"
    if keys.has("teacher_model"):
        return "distill"
    return "sft"


def _model(draft: Draft, keys: Keys) -> None:
    section = "policy_model" if keys.has("policy_model") else "model"
    component = keys.text(section, "_component_")
    name, method = torchtune_model(component)
    folder = next(
        (
            keys.text(*path)
            for path in (
                ("checkpointer", "checkpoint_dir"),
                ("training", "checkpointer", "checkpoint_dir"),
            )
            if keys.has(*path)
        ),
        None,
    )
    if name is not None:
        draft.put("model.name", name, keys.at(section, "_component_"))
    else:
        builder = (component or "").rsplit(".", 1)[-1]
        method = next((one for one in ("qlora", "lora") if builder.startswith(one)), None)
        tail = model_name(folder)
        draft.put("model.name", tail, keys.at("checkpointer", "checkpoint_dir"))
        if tail is not None:
            draft.find(
                "IMP010",
                f"the model is taken from the checkpoint folder {tail}: the builder "
                f"{builder or 'is not named and'} has sizes of its own",
                keys.at(section, "_component_"),
                help="pass --model NAME or --config PATH when that is another one",
            )
    _adapter(draft, keys, section, method)
    vision = [
        key
        for key in ("decoder_trainable", "encoder_trainable", "fusion_trainable")
        if keys.has(section, key)
    ]
    if vision:
        draft.find(
            "IMP007",
            "a vision-language model: which towers are trained is not sized, the text model is",
            keys.at(section, vision[0]),
        )
    for key in ("policy_model", "model", "teacher_model", "reward_and_value_model"):
        keys.mapping(key)


def _adapter(draft: Draft, keys: Keys, section: str, method: str | None) -> None:
    at = keys.at(section, "_component_")
    if method is None and not keys.has(section, "lora_rank"):
        draft.put("method.kind", "full", at)
        return
    draft.put("method.kind", "lora", at)
    draft.put("method.rank", keys.count(section, "lora_rank"), keys.at(section, "lora_rank"))
    draft.put("method.alpha", keys.whole(section, "lora_alpha"), keys.at(section, "lora_alpha"))
    draft.put(
        "method.dropout", keys.number(section, "lora_dropout"), keys.at(section, "lora_dropout")
    )
    attention = keys.words(section, "lora_attn_modules")
    if attention is not None:
        names = [ATTENTION_NAMES.get(name, name) for name in attention]
        mlp = keys.flag(section, "apply_lora_to_mlp")
        head = keys.flag(section, "apply_lora_to_output")
        if mlp and len(names) == 4 and not head:
            draft.put("method.targets", "all-linear", keys.at(section, "lora_attn_modules"))
        else:
            chosen = [*names, *(MLP_NAMES if mlp else ()), *(["lm_head"] if head else [])]
            named = own_names(draft.get("model.name"), tuple(chosen))
            draft.put("method.targets", named, keys.at(section, "lora_attn_modules"))
    if keys.flag(section, "use_dora"):
        draft.put("method.kind", "dora", keys.at(section, "use_dora"))
        draft.put("method.use_dora", True, keys.at(section, "use_dora"))
    if method == "qlora" or keys.flag(section, "quantize_base"):
        draft.put("method.kind", "qlora", at)
        draft.put("precision.weights", "nf4", at)


def _length(draft: Draft, keys: Keys, task: str) -> None:
    at = keys.at("tokenizer", "max_seq_len")
    length = keys.count("tokenizer", "max_seq_len")
    generated = keys.count("max_generated_tokens") or keys.count(
        "inference", "max_generated_tokens"
    )
    if task in ("grpo", "ppo"):
        draft.put("rollout.completion_tokens", generated, keys.at("max_generated_tokens"))
        draft.put(
            "rollout.generations",
            keys.count("grpo_samples") or keys.count("inference", "group_size"),
            keys.at("grpo_samples"),
        )
        if length is not None and generated is not None:
            draft.put("rollout.prompt_tokens", length, at)
            draft.put("batch.seq_len", length + generated, at)
            return
    draft.put("batch.seq_len", length, at)
    if length is None:
        draft.ask(
            "batch.seq_len",
            "tokenizer.max_seq_len is null: samples are not cut, the longest one decides",
        )
        draft.places["batch.seq_len?"] = at


def _checkpointing(draft: Draft, keys: Keys, base: tuple[Key, ...]) -> None:
    on = keys.flag(*base, "enable_activation_checkpointing")
    offload = keys.flag(*base, "enable_activation_offloading")
    at = keys.at(*base, "enable_activation_checkpointing")
    if on is not None:
        draft.put("gradient_checkpointing.kind", "full" if on else "none", at)
    mode = keys.word("ac_mode")
    option = keys.word("ac_option")
    if mode == "selective" and on is not False:
        if option is not None and option.isdigit() and int(option) > 0:
            draft.put("gradient_checkpointing.kind", "full", keys.at("ac_mode"))
            draft.put("gradient_checkpointing.every", int(option), keys.at("ac_option"))
        else:
            draft.put("gradient_checkpointing.kind", "selective", keys.at("ac_mode"))
    elif mode == "full":
        draft.put("gradient_checkpointing.kind", "full", keys.at("ac_mode"))
    if offload:
        if on is False:
            draft.not_modelled(
                keys,
                (*base, "enable_activation_offloading"),
                "offloading every activation without checkpointing; sized as checkpoints "
                "that are offloaded",
            )
        draft.put(
            "gradient_checkpointing.kind", "offload", keys.at(*base, "enable_activation_offloading")
        )


def _optimizer(draft: Draft, keys: Keys, base: tuple[Key, ...]) -> None:
    component = keys.text(*base, "optimizer", "_component_")
    name, known = optimizer_name(component)
    fused = keys.flag(*base, "optimizer", "fused")
    if name == "adamw_torch" and fused:
        name = "adamw_torch_fused"
    draft.put("optimizer.name", name, keys.at(*base, "optimizer", "_component_"))
    if not known:
        draft.find(
            "IMP005",
            f"the optimizer {component} is not known: its states cannot be sized",
            keys.at(*base, "optimizer", "_component_"),
            help="pass --optimizer NAME",
        )
    if name == "sgd":
        draft.put(
            "optimizer.momentum",
            keys.number(*base, "optimizer", "momentum"),
            keys.at(*base, "optimizer"),
        )
    lets_go: dict[tuple[Key, ...], str] = {  # of a gradient as soon as it has come
        ("optimizer_in_bwd",): "torchtune refuses this",
        (*base, "optimizer", "offload_gradients"): "torchao keeps the last micro batch's alone",
    }
    asked = [path for path in lets_go if keys.flag(*path)]
    keys.mapping(*base, "optimizer")
    for path in asked:
        draft.put("optimizer.in_backward", True, keys.at(*path))
        steps = draft.get("batch.accumulation") or 1
        if steps > 1:
            draft.find(
                "CFG011",
                f"{path[-1]} with gradient_accumulation_steps: {steps}: {lets_go[path]}",
                keys.at(*path),
                help="set gradient_accumulation_steps: 1",
            )


def _reference(draft: Draft, keys: Keys, task: str) -> None:
    adapter = draft.get("method.kind") != "full"
    if task == "dpo":
        draft.put("reference", "adapter" if adapter else "model", keys.at("ref_checkpointer"))
    elif task in ("grpo", "ppo"):
        draft.put("reference", "model", keys.at("ref_checkpointer"))
    elif task == "distill":
        name, _ = torchtune_model(keys.text("teacher_model", "_component_"))
        draft.put(
            "teacher",
            name or model_name(keys.text("teacher_checkpointer", "checkpoint_dir")),
            keys.at("teacher_model"),
        )


def _sharding(draft: Draft, keys: Keys, recipe: str | None) -> None:
    degrees = (
        ("tensor_parallel_dim", "sharding.tp"),
        ("context_parallel_dim", "sharding.cp"),
        ("data_parallel_replicate_dim", "sharding.dp_replicate"),
    )
    for name, plan_key in degrees:
        degree = keys.count(name)
        if degree is not None and degree > 1:
            draft.put(plan_key, degree, keys.at(name))
    shard = keys.count("data_parallel_shard_dim")
    cpu = keys.flag("fsdp_cpu_offload") or keys.flag("fsdp", "cpu_offload")
    marks = (
        "fsdp_cpu_offload",
        "custom_sharded_layers",
        "tensor_parallel_dim",
        "tensor_parallel_plan",
        "data_parallel_shard_dim",
        "fsdp",
        "fsdp_reshard_after_forward",
    )
    name = f"{recipe or ''} {keys.file}"
    count = (draft.get("hardware.count") or 0) * (draft.get("hardware.nodes") or 1)
    distributed = any(keys.has(mark) for mark in marks) or "distributed" in name or count > 1
    if "single_device" in name and count <= 1:
        draft.assume("hardware.count", 1, "the name single_device")
        draft.assume("sharding.kind", "none", "the name single_device")
        return
    if not distributed:
        return
    draft.retract("sharding.kind")
    draft.put(
        "sharding.kind", "fsdp", next((keys.at(mark) for mark in marks if keys.has(mark)), None)
    )
    draft.put("sharding.version", 2)
    draft.put("sharding.wrap", "block")
    _apart(keys, draft)
    reshard = keys.flag("fsdp_reshard_after_forward")
    draft.put("sharding.reshard_after_forward", reshard, keys.at("fsdp_reshard_after_forward"))
    if cpu:
        draft.put("sharding.offload", "params", keys.at("fsdp_cpu_offload"))
    if shard is not None and shard > 1:
        product = shard
        for key in ("tp", "cp", "dp_replicate"):
            product *= draft.get(f"sharding.{key}") or 1
        draft.put(
            "hardware.count",
            draft.get("hardware.count") or product,
            keys.at("data_parallel_shard_dim"),
        )
    for key in (
        "tensor_parallel_plan",
        "fsdp",
        "memory_efficient_fsdp_wrap",
    ):
        keys.raw(key)


_APART = {"tok_embeddings": "embeddings", "output": "output"}


def _apart(keys: Keys, draft: Draft) -> None:
    """``custom_sharded_layers``: modules beside the layers that FSDP2 wraps by themselves."""
    names = keys.words("custom_sharded_layers") or ()
    if not names:
        return
    known = tuple(apart for name, apart in _APART.items() if name in names)
    draft.put("sharding.apart", known, keys.at("custom_sharded_layers"))
    if others := [name for name in names if name not in _APART]:
        draft.not_modelled(
            keys, ("custom_sharded_layers",), f"{', '.join(others)} as a unit of its own"
        )


def export(plan: Plan) -> writing.Exported:
    """The plan as a configuration of torchtune's finetuning recipes.

    Raises :class:`ftplan.errors.UnsupportedError` for what torchtune has no key for.
    """
    out = writing.Writer(plan, trainer=NAME)
    out.tasks("sft", "dpo")
    out.methods("full", "lora", "qlora", "dora")
    out.profile(
        replace(find_stack(NAME), adapter_dtype="fp32") if _in_fp32(plan) else find_stack(NAME)
    )
    method = plan.method
    assert method is not None
    builder = out.torchtune_builder()
    section: dict[str, Any] = {"_component_": builder}
    if method.kind != "full":
        section |= out.torchtune_adapter(ATTENTION_NAMES, MLP_NAMES)
        # one ``dtype`` for base and adapter, which fp16 is not among
        if plan.precision.weights == "fp16":
            out.refuse("weights in fp16")
    elif plan.precision.weights not in ("bf16", "fp32"):
        out.refuse(f"weights in {plan.precision.weights}")
    out.mapping("model", section)
    out.mapping(
        "tokenizer",
        {"_component_": out.torchtune_tokenizer(builder), "max_seq_len": plan.batch.seq_len},
        keep_null=True,
    )
    out.mapping(
        "dataset",
        {
            "_component_": "torchtune.datasets.alpaca_cleaned_dataset",
            "packed": bool(plan.batch.packing),
        },
    )
    stored = plan.precision.weights if method.kind == "full" else method.adapter_dtype
    out.line("dtype", stored or "bf16")
    out.line("batch_size", plan.batch.micro)
    out.line("gradient_accumulation_steps", plan.batch.accumulation)
    out.torchtune_checkpointing()
    out.torchtune_optimizer()
    task_loss = {"dpo": "torchtune.rlhf.loss.DPOLoss"}.get(plan.task or "sft")
    kind = plan.loss.kind if plan.loss is not None else "chunked"
    plain = {
        "chunked": "torchtune.modules.loss.LinearCrossEntropyLoss",
        "full": "torch.nn.CrossEntropyLoss",
    }
    if task_loss is None and kind not in plain:
        out.refuse(f"loss: {kind}")
    if task_loss is not None and kind != "full":
        out.refuse(f"loss: {kind} with task {plan.task}")
    out.mapping("loss", {"_component_": task_loss or plain[kind]})
    if plan.attention not in (None, "sdpa"):
        out.refuse(f"attention: {plan.attention}")
    if out.plan.kernels not in (None, "none"):
        out.refuse(f"kernels: {plan.kernels}")
    if plan.precision.mixed not in (None, "no"):
        out.refuse(f"mixed precision {plan.precision.mixed}: torchtune's recipes are pure")
    if plan.sharding.kind == "fsdp":
        out.line("fsdp_cpu_offload", plan.sharding.offload == "params")
        out.line("fsdp_reshard_after_forward", plan.sharding.reshard_after_forward)
        apart = [name for name, unit in _APART.items() if unit in (plan.sharding.apart or ())]
        out.line("custom_sharded_layers", apart or None)
        out.degrees(
            tp="tensor_parallel_dim",
            cp="context_parallel_dim",
            ep=None,
            dp_replicate="data_parallel_replicate_dim",
        )
    elif plan.sharding.kind not in (None, "none"):
        out.refuse(f"sharding: {plan.sharding.kind}; its distributed recipes use FSDP2")
    return out.done(
        hint="launch with: tune run RECIPE --config FILE (the recipe's own keys, as paths, "
        "are yours to add)"
    )


def _in_fp32(plan: Plan) -> bool:
    """Whether everything is in fp32: torchtune's ``dtype: fp32``."""
    return plan.method is not None and plan.method.adapter_dtype == "fp32"
