"""LLaMA-Factory: classic YAML, command lines and an export; v1 is read in a file of its own.

Keys and defaults read from hiyouga/LLaMA-Factory src/llamafactory/hparams/*.py,
model/adapter.py and model/model_utils/checkpointing.py, commit ff6d4d12e.
"""

from __future__ import annotations

from typing import Any

from ftplan.catalog.stacks import find_stack
from ftplan.errors import InputError
from ftplan.spec import Plan
from ftplan.trainers import writing
from ftplan.trainers.draft import Draft
from ftplan.trainers.keys import Keys
from ftplan.trainers.launch import Context, surroundings
from ftplan.trainers.transformers import put_attention, training_arguments
from ftplan.trainers.words import model_name, targets

__all__ = ["NAME", "export", "matches", "read", "refuse"]

NAME = "llamafactory"
SOURCE = "hiyouga/LLaMA-Factory src/llamafactory/%s, commit ff6d4d12e"

STAGES = {"sft": "sft", "pt": "pt", "dpo": "dpo", "kto": "kto", "rm": "rm", "ppo": "ppo"}
QUANT = {
    "bnb": {4: "nf4", 8: "int8"}, "gptq": {4: "gptq-int4"}, "awq": {4: "awq-int4"},
    "hqq": {4: "int4", 8: "int8"}, "eetq": {8: "int8"}, "mxfp4": {4: "mxfp4"}, "fp8": {8: "fp8"},
    "quanto": {4: "int4", 8: "int8"},
}  # fmt: skip
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_FLAG_OPTIMIZERS = {
    "use_badam": "badam", "use_adam_mini": "adam_mini", "use_muon": "muon",
}  # fmt: skip


def matches(data: dict[str, Any]) -> bool:
    """Whether a mapping is a LLaMA-Factory training configuration, classic or v1."""
    classic = "finetuning_type" in data or "stage" in data
    return classic or ("model" in data and "train_dataset" in data)


def refuse(data: dict[str, Any], keys: Keys) -> InputError | None:
    """Why a mapping that looks like LLaMA-Factory's is no training job."""
    give = "give the file with stage, finetuning_type and a dataset"
    peft = data.get("peft_config")
    if data.get("do_train") is True or "per_device_train_batch_size" in data:
        return None
    if "export_dir" in data or (isinstance(peft, dict) and "export_dir" in peft):
        return keys.error(
            "this LLaMA-Factory file merges or exports a model, it does not train",
            "export_dir",
            remedy=give,
        )
    if "model_name_or_path" in data and "infer_backend" in data:
        return keys.error(
            "this LLaMA-Factory file is for inference, it does not train",
            "infer_backend",
            remedy=give,
        )
    if data.get("do_predict") is True and data.get("do_train") is not True:
        return keys.error(
            "this LLaMA-Factory file predicts, it does not train", "do_predict", remedy=give
        )
    if "task" in data and "n_shot" in data:
        return keys.error(
            "this LLaMA-Factory file evaluates a model, it does not train", "task", remedy=give
        )
    if "model_name_or_path" in data and "template" in data and "dataset" not in data:
        return keys.error(
            "this LLaMA-Factory file is for inference (a model and a template, no dataset)",
            "template",
            remedy=give,
        )
    if "model" in data and "sample_backend" in data and "train_dataset" not in data:
        return keys.error(
            "this LLaMA-Factory v1 file is for inference, it does not train",
            "sample_backend",
            remedy=give,
        )
    return None


def read(context: Context, keys: Keys, verb: str | None = None) -> None:
    """Fill the draft from a LLaMA-Factory configuration; ``verb`` is v1's stage."""
    if "model" in keys.data and "model_name_or_path" not in keys.data:
        from ftplan.trainers import llamafactory_v1

        llamafactory_v1.read(context, keys, verb)
    else:
        _read_classic(context, keys)


def _read_classic(context: Context, keys: Keys) -> None:
    draft = context.draft
    draft.keys(keys)
    draft.put(
        "model.name", model_name(keys.text("model_name_or_path")), keys.at("model_name_or_path")
    )
    stage = keys.word("stage") or "sft"
    task = STAGES.get(stage)
    if task is None:
        draft.find("IMP005", f"the stage {stage!r} is not known", keys.at("stage"))
        task = "sft"
    if task == "dpo" and keys.word("pref_loss") in ("orpo", "simpo"):
        task = "orpo"
    draft.put("task", task, keys.at("stage"))
    draft.put("batch.seq_len", keys.count("cutoff_len"), keys.at("cutoff_len"))
    draft.assume("batch.seq_len", 2048, SOURCE % "hparams/data_args.py: cutoff_len = 2048")
    neat = keys.flag("neat_packing")
    packing = keys.flag("packing")
    draft.put("batch.packing", packing if not neat else True, keys.at("packing"))
    draft.assume(
        "batch.packing",
        task == "pt",
        SOURCE % "hparams/parser.py: packing is on for stage pt alone",
    )
    _classic_method(draft, keys)
    _classic_quantised(draft, keys)
    put_attention(draft, keys, "flash_attn")
    draft.assume("attention", "sdpa", SOURCE % "model/model_utils/attention.py: flash_attn auto")
    training_arguments(context, keys, micro=8, prefix=SOURCE % "hparams/training_args.py")
    if neat and draft.get("attention") != "flash":
        # data/collator.py: a mask of every token by every token keeps samples apart
        draft.put("batch.packing", False, keys.at("neat_packing"))
        draft.put("batch.padding", "right", keys.at("neat_packing"))
        draft.find(
            "IMP010",
            "neat_packing without flash_attn: fa2 keeps samples apart by a mask: sized as rows "
            "that are masked, not packed",
            keys.at("neat_packing"),
        )
    elif neat and (draft.get("batch.micro") or 1) > 1:
        draft.find(
            "CFG007",
            "neat_packing with flash_attn: fa2 takes one row at a time: LLaMA-Factory stops at "
            "the first batch",
            keys.at("neat_packing"),
            help="set per_device_train_batch_size: 1, and a larger cutoff_len",
        )
    _classic_precision(draft, keys)
    _classic_checkpointing(draft, keys)
    _classic_optimizer(draft, keys)
    if keys.flag("enable_liger_kernel"):
        draft.put("kernels", "liger", keys.at("enable_liger_kernel"))
        draft.put(
            "loss.kind",
            "fused" if task in ("sft", "pt") else "full",
            keys.at("enable_liger_kernel"),
        )
    if keys.flag("use_unsloth"):
        draft.put("kernels", "unsloth", keys.at("use_unsloth"))
        draft.put("loss.kind", "fused", keys.at("use_unsloth"))
    _classic_reference(draft, keys, task)
    for name, plan_key in (
        ("tensor_model_parallel_size", "sharding.tp"),
        ("pipeline_model_parallel_size", "sharding.pp"),
        ("expert_model_parallel_size", "sharding.ep"),
        ("context_parallel_size", "sharding.cp"),
    ):
        degree = keys.count(name)
        if degree is not None and degree > 1:
            draft.put(plan_key, degree, keys.at(name))
    if keys.flag("sequence_parallel") and (draft.get("sharding.tp") or 1) > 1:
        draft.put("sharding.sequence_parallel", True, keys.at("sequence_parallel"))
    workers = keys.count("ray_num_workers")
    draft.put("hardware.count", workers, keys.at("ray_num_workers"))
    surroundings(context, keys)


def _classic_method(draft: Draft, keys: Keys) -> None:
    kind = keys.word("finetuning_type") or "lora"
    at = keys.at("finetuning_type")
    if not keys.has("finetuning_type"):
        draft.assume(
            "method.kind", "lora", SOURCE % "hparams/finetuning_args.py: finetuning_type = lora"
        )
    lora = ("lora_rank", "lora_target", "lora_alpha", "lora_dropout", "additional_target")
    if kind in ("lora", "oft"):
        draft.put("method.kind", kind, at)
        draft.put("method.rank", keys.count("lora_rank"), keys.at("lora_rank"))
        draft.put("method.alpha", keys.whole("lora_alpha"), keys.at("lora_alpha"))
        draft.put("method.dropout", keys.number("lora_dropout"), keys.at("lora_dropout"))
        draft.assume(
            "method.dropout", 0.0, SOURCE % "hparams/finetuning_args.py: lora_dropout = 0.0"
        )
        name = "lora_target" if kind == "lora" else "oft_target"
        draft.put("method.targets", targets(keys.words(name)), keys.at(name))
        draft.assume(
            "method.targets", "all-linear", SOURCE % "hparams/finetuning_args.py: lora_target = all"
        )
        draft.put(
            "method.modules_to_save", keys.words("additional_target"), keys.at("additional_target")
        )
        draft.put("method.use_rslora", keys.flag("use_rslora") or None, keys.at("use_rslora"))
        if keys.flag("use_dora"):
            draft.put("method.use_dora", True, keys.at("use_dora"))
            draft.put("method.kind", "dora", keys.at("use_dora"))
        if kind == "oft":
            block = keys.count("oft_block_size")
            draft.put("method.rank", block, keys.at("oft_block_size"))
        keys.known("oft_block_size", "oft_target", *lora)
        return
    if kind == "freeze":
        layers = keys.whole("freeze_trainable_layers")
        layers = 2 if layers is None else layers
        draft.put("method.kind", "partial", at)
        if keys.flag("use_llama_pro"):
            draft.not_modelled(
                keys,
                ("use_llama_pro",),
                "the trained blocks are spread over the depth; sized as the last ones",
            )
        if layers < 0:
            draft.not_modelled(
                keys,
                ("freeze_trainable_layers",),
                "the first blocks are trained; sized as the last ones",
            )
        draft.put("method.last_layers", abs(layers), keys.at("freeze_trainable_layers"))
        modules = keys.words("freeze_trainable_modules")
        if modules and modules != ("all",):
            draft.not_modelled(
                keys,
                ("freeze_trainable_modules",),
                "only some modules of the blocks are trained; whole blocks are sized",
            )
        if keys.words("freeze_extra_modules"):
            draft.not_modelled(
                keys, ("freeze_extra_modules",), "modules beside the last blocks are trained too"
            )
    elif kind == "full":
        draft.put("method.kind", "full", at)
    else:
        raise keys.error(
            f"finetuning_type {kind!r} does not exist",
            "finetuning_type",
            remedy="write lora, full, freeze or oft",
        )
    keys.known("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")
    given = [name for name in lora if keys.has(name)]
    if given:
        draft.find(
            "CFG001",
            f"{', '.join(given)} do nothing with finetuning_type: {kind}",
            keys.at(given[0]),
            help="set finetuning_type: lora, or remove these keys",
        )
    keys.known(*lora)


def _classic_quantised(draft: Draft, keys: Keys) -> None:
    bits = keys.count("quantization_bit")
    method = keys.word("quantization_method") or "bnb"
    method = {"bitsandbytes": "bnb", "bnb": "bnb"}.get(method, method)
    double = keys.flag("double_quantization")
    kind = draft.get("method.kind")
    if bits is None and method in ("mxfp4", "fp8") and keys.has("quantization_method"):
        bits = 4 if method == "mxfp4" else 8
    if bits is None:
        name = (draft.get("model.name") or "").lower()
        guess = next(
            (
                fmt
                for part, fmt in (
                    ("gptq", "gptq-int4"),
                    ("awq", "awq-int4"),
                    ("aqlm", "aqlm"),
                    ("bnb-4bit", "nf4"),
                )
                if part in name
            ),
            None,
        )
        if guess is not None and kind in ("lora", "dora"):
            draft.put("precision.weights", guess, keys.at("model_name_or_path"))
            draft.put("method.kind", "qlora", keys.at("model_name_or_path"))
            draft.find(
                "IMP010",
                f"the base is taken to be {guess}: its name says so",
                keys.at("model_name_or_path"),
            )
        return
    weights = QUANT.get(method, {}).get(bits)
    if weights is None:
        draft.not_modelled(keys, ("quantization_bit",), f"{bits} bits by {method}")
        return
    if kind not in ("lora", "dora", "oft"):
        draft.find(
            "CFG006",
            f"quantization_bit: {bits} with finetuning_type: {kind}: LLaMA-Factory trains "
            "adapters only on a quantised base",
            keys.at("quantization_bit"),
            help="set finetuning_type: lora, or remove quantization_bit",
        )
    draft.put("precision.weights", weights, keys.at("quantization_bit"))
    if kind in ("lora", "dora"):
        draft.put("method.kind", "qlora", keys.at("quantization_bit"))
        if weights == "nf4":
            draft.put("method.double_quant", double, keys.at("double_quantization"))


def _classic_precision(draft: Draft, keys: Keys) -> None:
    pure = keys.flag("pure_bf16")
    if pure:
        draft.put("precision.mixed", "no", keys.at("pure_bf16"))
        draft.put("precision.trained", "bf16", keys.at("pure_bf16"))
    elif keys.flag("use_badam"):
        draft.put("precision.trained", "bf16", keys.at("use_badam"))
    if keys.flag("upcast_layernorm"):
        draft.put("precision.norms", "fp32", keys.at("upcast_layernorm"))


def _classic_checkpointing(draft: Draft, keys: Keys) -> None:
    off = keys.flag("disable_gradient_checkpointing")
    if off is not None:
        draft.put(
            "gradient_checkpointing.kind",
            "none" if off else "full",
            keys.at("disable_gradient_checkpointing"),
        )
    else:
        # LLaMA-Factory switches the Trainer's own checkpointing off and does it itself
        draft.drop("gradient_checkpointing.kind")
        draft.drop("gradient_checkpointing.reentrant")
    if keys.flag("use_unsloth_gc") and not off:
        draft.put("gradient_checkpointing.kind", "offload", keys.at("use_unsloth_gc"))
    reentrant = keys.flag("use_reentrant_gc")
    if reentrant is not None and not off:
        draft.put("gradient_checkpointing.reentrant", reentrant, keys.at("use_reentrant_gc"))
    elif draft.get("sharding.version") == 2 and not off:
        draft.assume(
            "gradient_checkpointing.reentrant",
            False,
            SOURCE % "model/model_utils/checkpointing.py: use_reentrant_gc is False under FSDP2",
        )
    if off:
        draft.drop("gradient_checkpointing.reentrant")


def _classic_optimizer(draft: Draft, keys: Keys) -> None:
    for name, optimizer in _FLAG_OPTIMIZERS.items():
        if keys.flag(name):
            draft.put("optimizer.name", optimizer, keys.at(name))
    for name in ("galore", "apollo"):
        if not keys.flag(f"use_{name}"):
            continue
        layerwise = keys.flag(f"{name}_layerwise")
        eight = "8bit" in (keys.word("optim") or "")
        suffix = ("_8bit" if eight and name == "galore" else "") + (
            "_layerwise" if layerwise else ""
        )
        draft.put("optimizer.name", f"{name}_adamw{suffix}", keys.at(f"use_{name}"))
        draft.put("optimizer.rank", keys.count(f"{name}_rank") or 16, keys.at(f"{name}_rank"))
        if layerwise:
            draft.put("optimizer.in_backward", True, keys.at(f"{name}_layerwise"))


def _classic_reference(draft: Draft, keys: Keys, task: str) -> None:
    adapter = draft.get("method.kind") not in ("full", "partial")
    if keys.text("ref_model"):
        draft.put("reference", "model", keys.at("ref_model"))
    if task == "orpo":
        draft.put("reference", "none", keys.at("pref_loss"))
    elif task in ("dpo", "kto", "ppo"):
        draft.assume(
            "reference",
            "adapter" if adapter else "model",
            SOURCE % "train/trainer_utils.py: create_ref_model returns none for LoRA",
        )


def export(plan: Plan) -> writing.Exported:
    """The plan as a classic LLaMA-Factory configuration.

    Raises :class:`ftplan.errors.UnsupportedError` for what LLaMA-Factory has no key for.
    """
    out = writing.Writer(plan, trainer=NAME)
    out.tasks("sft", "pt", "dpo", "kto", "orpo", "rm")
    out.methods("full", "lora", "qlora", "dora", "partial")
    out.profile(find_stack(NAME))
    method = plan.method
    out.line("model_name_or_path", out.model())
    out.line("stage", {"orpo": "dpo", None: "sft"}.get(plan.task, plan.task))
    if plan.task == "orpo":
        out.line("pref_loss", "orpo")
    out.line("do_train", True)
    assert method is not None
    kind = {"full": "full", "partial": "freeze"}.get(method.kind, "lora")
    out.line("finetuning_type", kind)
    if kind == "freeze":
        if method.last_layers is None:
            out.refuse("a partial method without last_layers")
        out.line("freeze_trainable_layers", method.last_layers)
    if kind == "lora":
        out.lora(
            rank="lora_rank",
            targets="lora_target",
            modules="additional_target",
            dora="use_dora",
            rslora="use_rslora",
            joined=True,
        )
    if method.kind == "qlora":
        bits = {"nf4": (4, "bnb"), "int8": (8, "bnb")}.get(plan.precision.weights or "")
        if bits is None:
            out.refuse(f"a base quantised as {plan.precision.weights}")
        else:
            out.line("quantization_bit", bits[0])
            out.line("quantization_method", bits[1])
            if plan.precision.weights == "nf4":
                out.line("double_quantization", method.double_quant)
    elif plan.precision.weights is not None:
        why = "LLaMA-Factory loads a checkpoint in its own dtype"
        out.differs("precision.weights", plan.precision.weights, why)
    if plan.precision.norms == "fp32":
        out.line("upcast_layernorm", True)
    out.line("cutoff_len", plan.batch.seq_len)
    out.line("packing", plan.batch.packing)
    out.attention("flash_attn", {"eager": "disabled", "sdpa": "sdpa", "flash": "fa2"})
    checkpointing = plan.gradient_checkpointing
    if checkpointing is not None:
        if checkpointing.kind == "selective" or checkpointing.every != 1:
            out.refuse("checkpointing of a part of the blocks")
        out.line("disable_gradient_checkpointing", checkpointing.kind == "none")
        if checkpointing.kind == "offload":
            out.line("use_unsloth_gc", True)
        if checkpointing.kind != "none":
            out.line("use_reentrant_gc", checkpointing.reentrant)
    if plan.kernels == "liger":
        out.line("enable_liger_kernel", True)
    elif plan.kernels == "unsloth":
        out.line("use_unsloth", True)
    if plan.loss is not None and (plan.loss.kind == "fused") != (
        plan.kernels in ("liger", "unsloth") and plan.task in (None, "sft", "pt")
    ):
        out.refuse(f"loss: {plan.loss.kind} with kernels: {plan.kernels or 'none'}")
    if plan.loss is not None and plan.loss.kind == "chunked":
        out.refuse("a chunked loss")
    if _pure(plan):
        out.line("pure_bf16", True)
    out.training_arguments(checkpointing=False, mixed=not _pure(plan), liger=False)
    out.degrees(tp=None, cp=None, ep=None, dp_replicate=None)
    return out.done(hint="launch with: llamafactory-cli train FILE")


def _pure(plan: Plan) -> bool:
    """Whether nothing is cast to fp32 but what PEFT casts: LLaMA-Factory's pure_bf16."""
    method = plan.method
    if method is None or plan.precision.mixed not in (None, "no"):
        return False
    if plan.precision.trained is None and plan.stack != NAME:
        return method.kind in ("full", "partial") and plan.precision.weights == "bf16"
    return plan.precision.trained == "bf16"
