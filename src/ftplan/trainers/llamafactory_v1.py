"""LLaMA-Factory's v1 engine: its YAML.

Keys and defaults read from hiyouga/LLaMA-Factory src/llamafactory/v1, commit ff6d4d12e.
"""

from __future__ import annotations

from ftplan.catalog.stacks import find_stack
from ftplan.trainers import deepspeed
from ftplan.trainers.draft import Draft
from ftplan.trainers.keys import Keys
from ftplan.trainers.launch import Context, surroundings
from ftplan.trainers.llamafactory import DTYPES, QUANT, SOURCE, STAGES
from ftplan.trainers.transformers import put_attention, stage_of
from ftplan.trainers.words import model_name, optimizer_name, targets

__all__ = ["read"]


def read(context: Context, keys: Keys, verb: str | None = None) -> None:
    """Fill the draft from a v1 configuration; ``verb`` of the command is its stage."""
    draft = context.draft
    draft.stack = find_stack("llamafactory-v1")
    draft.keys(keys)
    source = SOURCE % "v1/config/training_args.py"
    draft.put("model.name", model_name(keys.text("model")), keys.at("model"))
    task = _task(draft, keys, verb)
    draft.put("batch.micro", keys.count("micro_batch_size"), keys.at("micro_batch_size"))
    draft.assume("batch.micro", 1, f"{source}: micro_batch_size = 1")
    draft.put("batch.seq_len", keys.count("cutoff_len"), keys.at("cutoff_len"))
    draft.assume("batch.seq_len", 2048, f"{source}: cutoff_len = 2048")
    cp = keys.count("cp_size") or keys.count("dist_config", "cp_size") or 1
    ranks = (draft.get("hardware.count") or 1) // cp or 1
    batch = keys.count("global_batch_size")
    if batch is not None:
        steps = max(batch // ranks // draft.get("batch.micro"), 1)
        draft.put("batch.accumulation", steps, keys.at("global_batch_size"))
    _strategy(draft, keys)
    on = keys.flag("enable_activation_checkpointing")
    if on is not None:
        draft.put(
            "gradient_checkpointing.kind",
            "full" if on else "none",
            keys.at("enable_activation_checkpointing"),
        )
    draft.assume(
        "gradient_checkpointing.kind", "full", f"{source}: enable_activation_checkpointing = True"
    )
    if draft.get("gradient_checkpointing.kind") == "full":
        draft.assume(
            "gradient_checkpointing.reentrant",
            False,
            SOURCE % "v1/core/base_trainer.py: use_reentrant False",
        )
    _method(draft, keys)
    if task == "rm" and draft.get("method.kind") not in ("full", "partial"):
        draft.find(
            "CFG007",
            "peft_config: lora asks PEFT for a causal language model, which a reward model is not: "
            "v1 stops here",
            keys.at("peft_config", "name"),
            help="train the whole model, or its last layers (peft_config: freeze)",
        )
    kernels = keys.text("kernel_config", "name") or ""
    if "liger" in kernels and "qwen3" in (draft.get("model.name") or "").lower():
        # it knows qwen3 alone, and with logits required it fuses no loss (liger_kernel_ops.py)
        draft.put("kernels", "liger", keys.at("kernel_config"))
        draft.put("loss.kind", "full", keys.at("kernel_config"))
    elif "liger" in kernels:
        draft.find(
            "CFG001",
            "kernel_config: liger_kernel does nothing unless the model is a Qwen3; sized without",
            keys.at("kernel_config"),
        )
    keys.mapping("kernel_config")
    put_attention(draft, keys, "flash_attn")
    name, known = optimizer_name(keys.text("optim_config", "name"))
    if name is not None:
        draft.put("optimizer.name", name, keys.at("optim_config", "name"))
        if not known:
            draft.find(
                "IMP005", f"the optimizer {name} is not known", keys.at("optim_config", "name")
            )
    keys.mapping("optim_config")
    _sharding(context, keys)
    if draft.get("sharding.kind") not in ("zero1", "zero2", "zero3"):
        draft.assume(
            "precision.mixed",
            "no",
            SOURCE
            % "v1/plugins/trainer_plugins/distributed/fsdp2.py: bf16 parameters, no autocast",
        )
    if draft.get("method.kind") == "full" and draft.get("sharding.kind") in (
        None,
        "none",
        "ddp",
        "fsdp",
    ):
        draft.assume(
            "precision.weights",
            "fp32",
            SOURCE % "v1/core/model_engine.py: full training keeps fp32 parameters, FSDP2 "
            "computes in bf16",
        )
    bf16 = keys.flag("bf16")  # of FSDP2's policy: there is no autocast
    if draft.get("sharding.kind") == "fsdp":
        draft.assume(
            "sharding.param_dtype",
            "fp32" if bf16 is False else "bf16",
            SOURCE % "v1/plugins/trainer_plugins/distributed/fsdp2.py: MixedPrecisionPolicy",
        )
        draft.assume(
            "sharding.reduce_dtype",
            "fp32",
            SOURCE % "v1/plugins/trainer_plugins/distributed/fsdp2.py: MixedPrecisionPolicy",
        )
    adapter = draft.get("method.kind") not in ("full", "partial")
    if task == "dpo":
        draft.assume(
            "reference",
            "adapter" if adapter else "model",
            SOURCE % "v1/trainers: reference by adapter off",
        )
    elif task == "orpo":
        draft.put("reference", "none", keys.at("pref_loss"))
    surroundings(context, keys)


def _task(draft: Draft, keys: Keys, verb: str | None) -> str:
    """The command's stage; what a file says of a loss of preferences is for a trainer to come."""
    loss = keys.word("pref_loss")
    stage = keys.word("stage") or verb or ("dpo" if loss else "sft")
    task = "orpo" if loss in ("orpo", "simpo") else STAGES.get(stage, "sft")
    draft.put("task", task, keys.at("stage"))
    if task not in ("sft", "rm"):
        draft.find(
            "CFG007",
            f"{stage} is a stage that v1 of LLaMA-Factory does not have yet: it stops here",
            keys.at("stage" if keys.has("stage") else "pref_loss"),
            help="use the classic engine (model_name_or_path, stage), without USE_V1=1",
        )
    return task


def _strategy(draft: Draft, keys: Keys) -> None:
    """How micro batches are filled: rows of samples, or one row of them all.

    Source: v1/plugins/trainer_plugins/batching.py, 0.9.5.
    """
    strategy, at = keys.word("batching_strategy"), keys.at("batching_strategy")
    if strategy in ("padding_free", "dynamic_padding_free"):
        draft.put("batch.packing", True, at)
        draft.put("batch.seq_len", draft.get("batch.micro") * draft.get("batch.seq_len"), at)
        draft.put("batch.micro", 1, at)


def _method(draft: Draft, keys: Keys) -> None:
    peft = ("peft_config",)
    kind = keys.word(*peft, "name")
    if kind is None:
        draft.put("method.kind", "full")
    elif kind == "freeze":
        draft.put("method.kind", "partial", keys.at(*peft, "name"))
        layers = keys.whole(*peft, "freeze_trainable_layers")
        draft.put(
            "method.last_layers",
            abs(2 if layers is None else layers),
            keys.at(*peft, "freeze_trainable_layers"),
        )
        if keys.flag(*peft, "cast_trainable_params_to_fp32") is False:
            draft.put("precision.trained", "bf16", keys.at(*peft, "cast_trainable_params_to_fp32"))
        if keys.words(*peft, "freeze_extra_modules"):
            draft.not_modelled(
                keys,
                (*peft, "freeze_extra_modules"),
                "modules beside the last blocks are trained too",
            )
    else:
        draft.put("method.kind", "lora", keys.at(*peft, "name"))
        draft.put("method.rank", keys.count(*peft, "r"), keys.at(*peft, "r"))
        draft.put("method.alpha", keys.whole(*peft, "lora_alpha"), keys.at(*peft, "lora_alpha"))
        draft.put(
            "method.dropout", keys.number(*peft, "lora_dropout"), keys.at(*peft, "lora_dropout")
        )
        draft.put(
            "method.targets",
            targets(keys.words(*peft, "target_modules")),
            keys.at(*peft, "target_modules"),
        )
        draft.put(
            "method.modules_to_save",
            keys.words(*peft, "modules_to_save"),
            keys.at(*peft, "modules_to_save"),
        )
        if keys.flag(*peft, "use_dora"):
            draft.put("method.kind", "dora", keys.at(*peft, "use_dora"))
            draft.put("method.use_dora", True, keys.at(*peft, "use_dora"))
        draft.put("method.adapter_dtype", "fp32")
    keys.mapping(*peft)
    _quantised(draft, keys)


def _quantised(draft: Draft, keys: Keys) -> None:
    """``quant_config``: bitsandbytes; products in fp16 unless it says otherwise.

    Source: v1/plugins/model_plugins/quantization.py, 0.9.5.
    """
    quant = ("quant_config",)
    name = keys.word(*quant, "name")
    bits = keys.count(*quant, "quantization_bit") or (4 if name == "bnb" else 0)
    weights = QUANT["bnb"].get(bits) if name in ("auto", "bnb") else None
    if weights == "nf4":
        weights = keys.word(*quant, "quantization_type") or weights
    if weights is not None:
        draft.put("precision.weights", weights, keys.at(*quant))
        if draft.get("method.kind") in ("lora", "dora"):
            draft.put("method.kind", "qlora", keys.at(*quant))
        if bits == 4:
            named = keys.word(*quant, "compute_dtype") or "float16"
            draft.put("method.compute_dtype", DTYPES.get(named), keys.at(*quant, "compute_dtype"))
            double = keys.flag(*quant, "double_quantization")
            draft.put("method.double_quant", double, keys.at(*quant, "double_quantization"))
    elif name is not None:
        draft.not_modelled(keys, (*quant, "name"), "a quantisation of another name than bnb")
    keys.mapping(*quant)


def _sharding(context: Context, keys: Keys) -> None:
    draft = context.draft
    dist = ("dist_config",)
    name = keys.word(*dist, "name")
    if name in ("fsdp2", "fsdpturbo"):
        draft.put("sharding.kind", "fsdp", keys.at(*dist, "name"))
        draft.put("sharding.version", 2, keys.at(*dist, "name"))
        draft.put("sharding.wrap", "block", keys.at(*dist, "name"))
        if keys.flag(*dist, "offload_params"):
            draft.put("sharding.offload", "params", keys.at(*dist, "offload_params"))
        reshard = keys.flag(*dist, "reshard_after_forward")
        draft.put(
            "sharding.reshard_after_forward", reshard, keys.at(*dist, "reshard_after_forward")
        )
    elif name == "deepspeed":
        named = keys.text(*dist, "config_file")
        if named is not None:
            document = context.reads(named, keys, *dist, "config_file")
            if document is not None:
                deepspeed.apply(draft, Keys(document))
            else:
                draft.put("sharding.kind", stage_of(named), keys.at(*dist, "config_file"))
    elif name is not None and name != "ddp":
        draft.not_modelled(keys, (*dist, "name"), "an unknown distributed backend")
    ep = keys.count(*dist, "ep_size")
    if ep is not None and ep > 1:
        draft.put("sharding.ep", ep, keys.at(*dist, "ep_size"))
    for path in (("cp_size",), (*dist, "cp_size")):
        cp = keys.count(*path)
        if cp is not None and cp > 1:
            draft.put("sharding.cp", cp, keys.at(*path))
    replicate = keys.count("mp_replicate_size") or keys.count(*dist, "mp_replicate_size")
    if replicate is not None and replicate > 1:
        draft.put("sharding.dp_replicate", replicate, keys.at("mp_replicate_size"))
    keys.mapping(*dist)
