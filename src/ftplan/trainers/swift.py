"""ms-swift: ``swift sft|pt|rlhf`` and ``megatron sft|pt|rlhf`` commands, and their YAML.

Flags and defaults read from modelscope/ms-swift swift/arguments, swift/trainers/arguments.py,
swift/rlhf_trainers, swift/config/*.json and swift/megatron/arguments, 4.6.0.dev0 (3602360a5).
"""

from __future__ import annotations

import math
import re
from typing import Any

from ftplan.catalog.stacks import find_stack
from ftplan.spec import Lengths, Plan
from ftplan.trainers import writing
from ftplan.trainers.accelerate import apply_fsdp
from ftplan.trainers.commands import ENV, LAUNCH
from ftplan.trainers.draft import Draft
from ftplan.trainers.keys import Keys
from ftplan.trainers.launch import Context, surroundings, visible_devices
from ftplan.trainers.transformers import put_attention, put_dtype, training_arguments
from ftplan.trainers.words import model_name, optimizer_name, targets

__all__ = ["NAME", "export", "is_megatron", "matches", "read"]

NAME = "ms-swift"
SOURCE = "modelscope/ms-swift swift/%s, 4.6.0.dev0"

_RLHF = {
    "dpo": "dpo", "kto": "kto", "orpo": "orpo", "cpo": "orpo", "simpo": "orpo", "rm": "rm",
    "ppo": "ppo", "grpo": "grpo", "gkd": "distill", "opsd": "distill",
}  # fmt: skip
_TASKS = {
    "causal_lm": None, "seq_cls": "classify", "embedding": "embed", "reranker": "classify",
    "generative_reranker": "classify",
}  # fmt: skip
_TUNERS = {
    "lora": "lora", "full": "full", "longlora": "lora", "adalora": "lora", "vera": "vera",
    "boft": "boft", "ia3": "ia3", "dora": "dora", "lora_llm": "lora", "oft": "oft",
    "adapter": "houlsby",
}  # fmt: skip
_MEGATRON_NAMES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"), "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"), "linear_fc2": ("down_proj",),
}  # fmt: skip
"""Megatron-core's modules by the names of the model's own class."""
_QUANT = {
    ("bnb", 4): "nf4", ("bnb", 8): "int8", ("hqq", 4): "int4", ("hqq", 8): "int8",
    ("eetq", 8): "int8", ("gptq", 4): "gptq-int4", ("awq", 4): "awq-int4", ("quanto", 8): "int8",
    ("quanto", 4): "int4",
}  # fmt: skip
_BUCKET = 200_000_000
"""``allgather_bucket_size`` and ``reduce_bucket_size`` of swift/config/zero0.json to zero2.json."""


def matches(data: dict[str, Any]) -> bool:
    """Whether a mapping is a configuration of ms-swift's trainers."""
    named = isinstance(data.get("model"), str) or "mcore_model" in data or "load" in data
    tuned = any(
        key in data
        for key in ("tuner_type", "train_type", "rlhf_type", "quant_method", "freeze_vit")
    )
    sized = any(
        key in data for key in ("per_device_train_batch_size", "micro_batch_size", "dataset")
    )
    return named and ((tuned and sized) or (is_megatron(data) and sized))


def is_megatron(data: dict[str, Any]) -> bool:
    """Whether the flags are those of Megatron-SWIFT."""
    marks = (
        "tensor_model_parallel_size",
        "global_batch_size",
        "pipeline_model_parallel_size",
        "recompute_granularity",
        "expert_model_parallel_size",
        "no_save_optim",
        "mcore_model",
    )
    return any(key in data for key in marks)


def read(
    context: Context, keys: Keys, verb: str | None = None, *, megatron: bool | None = None
) -> None:
    """Fill the draft from ms-swift's flags; ``verb`` is ``sft``, ``pt`` or ``rlhf``."""
    draft = context.draft
    draft.keys(keys)
    if isinstance(keys.data.get("ENV"), dict):
        keys.data[ENV] = {**keys.data.pop("ENV"), **keys.section(ENV)}
    megatron = is_megatron(keys.data) if megatron is None else megatron
    for name in ("model", "model_id_or_path", "mcore_model"):
        if draft.get("model.name") is None:
            draft.put("model.name", model_name(keys.text(name)), keys.at(name))
    task = _task(draft, keys, verb)
    _method(draft, keys, megatron)
    _vision(draft, keys)
    put_attention(draft, keys, "attn_impl")
    draft.put("batch.packing", keys.flag("packing") or None, keys.at("packing"))
    _length(draft, keys, task)
    _rollout(draft, keys, task, megatron)
    _reference(draft, keys, task)
    if megatron:
        _megatron(context, keys)
    else:
        _swift(context, keys)


def _task(draft: Draft, keys: Keys, verb: str | None) -> str:
    rlhf = keys.word("rlhf_type")
    if rlhf is not None and (verb == "rlhf" or verb is None):
        task = _RLHF.get(rlhf)
        if task is None:
            draft.find(
                "IMP005", f"rlhf_type {rlhf} is not known; it is sized as dpo", keys.at("rlhf_type")
            )
            task = "dpo"
        draft.put("task", task, keys.at("rlhf_type"))
        return task
    if verb == "rlhf":
        draft.assume("task", "dpo", SOURCE % "arguments/rlhf_args.py: rlhf_type = dpo")
        return "dpo"
    kind = keys.word("task_type")
    task = _TASKS.get(kind or "") or ("pt" if verb == "pt" else "sft")
    if keys.count("num_labels") and kind is None:
        task = "classify"
    draft.put("task", task, keys.at("task_type"))
    if kind == "generative_reranker":
        draft.not_modelled(
            keys,
            ("task_type",),
            "the vocabulary's head stays, and meets the last token alone; sized without it",
        )
    if kind in ("embedding", "reranker", "generative_reranker"):
        draft.find(
            "IMP010",
            "a sample is taken to have one positive answer and no negative ones, of which each is "
            "a sequence more",
            keys.at("task_type"),
        )
    return task


def _method(draft: Draft, keys: Keys, megatron: bool) -> None:
    name = keys.word("tuner_type") or keys.word("train_type") or keys.word("sft_type")
    key = next(
        (one for one in ("tuner_type", "train_type", "sft_type") if keys.has(one)), "tuner_type"
    )
    kind = "full" if name is None and megatron else _TUNERS.get(name or "lora")
    if name is None:
        default = (
            "megatron/arguments/megatron_args.py: tuner_type = full"
            if megatron
            else "arguments/base_args/base_args.py: tuner_type = lora"
        )
        draft.assume("method.kind", kind, SOURCE % default)
    if kind is None:
        draft.find("IMP002", f"{key} {name} is not modelled; it is sized as lora", keys.at(key))
        kind = "lora"
    draft.put("method.kind", kind, keys.at(key))
    if name in ("longlora", "adalora"):
        draft.find("IMP010", f"{name} is sized as plain LoRA", keys.at(key))
    ratio = keys.number("freeze_parameters_ratio")
    if kind == "full":
        partly = [
            one
            for one in (
                "freeze_parameters",
                "trainable_parameters",
                "freeze_parameters_regex",
                "trainable_parameters_regex",
            )
            if keys.raw(one)
        ]
        if ratio or partly:
            draft.not_modelled(
                keys,
                (partly[0] if partly else "freeze_parameters_ratio",),
                "part of the model is frozen; sized as full finetuning, which is more",
            )
        return
    rank = {"vera": "vera_rank", "boft": "boft_block_size"}.get(kind, "lora_rank")
    draft.put("method.rank", keys.count(rank), keys.at(rank))
    draft.put("method.alpha", keys.whole("lora_alpha"), keys.at("lora_alpha"))
    draft.put("method.dropout", keys.number("lora_dropout"), keys.at("lora_dropout"))
    regex = keys.text("target_regex")
    if regex is not None:
        draft.put("method.targets", regex, keys.at("target_regex"))
    else:
        found = keys.words("target_modules")
        if found and "all-router" in found:
            found = tuple(one for one in found if one != "all-router")
        if found and megatron:
            found = tuple(part for name in found for part in _MEGATRON_NAMES.get(name, (name,)))
        draft.put("method.targets", targets(found), keys.at("target_modules"))
    draft.assume(
        "method.targets",
        "all-linear",
        SOURCE % "arguments/tuner_args.py: target_modules = all-linear",
    )
    draft.put(
        "method.target_parameters", keys.words("target_parameters"), keys.at("target_parameters")
    )
    draft.put("method.modules_to_save", keys.words("modules_to_save"), keys.at("modules_to_save"))
    dtype = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp32"}.get(
        keys.word("lora_dtype") or ""
    )
    draft.put("method.adapter_dtype", dtype, keys.at("lora_dtype"))
    draft.put("method.use_rslora", keys.flag("use_rslora") or None, keys.at("use_rslora"))
    if keys.flag("use_dora"):
        draft.put("method.kind", "dora", keys.at("use_dora"))
        draft.put("method.use_dora", True, keys.at("use_dora"))
    _quantised(draft, keys)


def _quantised(draft: Draft, keys: Keys) -> None:
    method, bits = keys.word("quant_method"), keys.count("quant_bits")
    at = keys.at("quant_bits") if keys.has("quant_bits") else keys.at("quant_method")
    weights = None
    if method == "fp8":
        weights = "fp8"
    elif method is not None or bits is not None:
        weights = _QUANT.get((method or "bnb", bits or 4))
        if weights is None:
            draft.not_modelled(keys, ("quant_bits",), f"{bits} bits by {method}")
            return
        if weights == "nf4" and (keys.word("bnb_4bit_quant_type") or "nf4") == "fp4":
            weights = "fp4"
    else:
        name = (draft.get("model.name") or "").lower()
        for part, stored in (
            ("gptq-int4", "gptq-int4"),
            ("gptq-int8", "gptq-int8"),
            ("gptq", "gptq-int4"),
            ("awq", "awq-int4"),
            ("-fp8", "fp8"),
        ):
            if part in name and weights is None:
                weights = stored
                at = keys.at("model")
                draft.find("IMP010", f"the base is taken to be {stored}: its name says so", at)
    if weights is None:
        return
    draft.put("precision.weights", weights, at)
    if draft.get("method.kind") in ("lora", "dora"):
        draft.put("method.kind", "qlora", at)
        if weights in ("nf4", "fp4"):
            draft.put(
                "method.double_quant",
                keys.flag("bnb_4bit_use_double_quant"),
                keys.at("bnb_4bit_use_double_quant"),
            )


def _vision(draft: Draft, keys: Keys) -> None:
    towers = [
        name
        for name in ("freeze_vit", "freeze_llm", "freeze_aligner")
        if keys.flag(name) is not None
    ]
    pixels = [
        name
        for name in ("MAX_PIXELS", "IMAGE_MAX_TOKEN_NUM", "VIDEO_MAX_PIXELS", "VIDEO_MAX_TOKEN_NUM")
        if keys.has(ENV, name)
    ]
    if towers or pixels or keys.has("max_pixels"):
        at = (
            keys.at(towers[0])
            if towers
            else keys.at(ENV, pixels[0])
            if pixels
            else keys.at("max_pixels")
        )
        draft.find(
            "IMP007",
            "a multimodal run: towers and image tokens are not sized beyond the sequence length, "
            "the text model is",
            at,
        )
    if keys.flag("freeze_llm") and draft.get("method.kind") == "full":
        draft.not_modelled(
            keys, ("freeze_llm",), "the language model is frozen; sized as if it were trained"
        )
    for name in ("vit_gradient_checkpointing", "max_pixels", "vit_lr", "aligner_lr"):
        keys.raw(name)


def _length(draft: Draft, keys: Keys, task: str) -> None:
    length = keys.count("max_length")
    packed = keys.count("packing_length")
    at = keys.at("max_length")
    completion = keys.count("max_completion_length") or keys.count("response_length")
    if packed is not None and draft.get("batch.packing"):
        draft.put("batch.seq_len", packed, keys.at("packing_length"))
    elif task in ("grpo", "ppo") and length is not None:
        # in reinforcement finetuning max_length bounds the prompt alone
        tail = completion or 512
        draft.put("rollout.prompt_tokens", length, at)
        draft.put("batch.seq_len", length + tail, at)
    elif length is not None:
        draft.put("batch.seq_len", length, at)
    if task in ("grpo", "ppo", "distill"):
        draft.put("rollout.completion_tokens", completion, keys.at("max_completion_length"))
        if task != "distill":
            draft.assume(
                "rollout.completion_tokens",
                512,
                SOURCE % "arguments/rlhf_args.py: max_completion_length = 512",
            )
    if draft.stack.name == NAME and not draft.get("batch.packing"):
        # how much shorter the samples are is the dataset's: batches of the longest are sized
        draft.put("batch.lengths", Lengths(kind="fixed"))
    if draft.get("batch.seq_len") is None:
        draft.ask(
            "batch.seq_len", "max_length is not given: ms-swift cuts at the model's own maximum"
        )


def _rollout(draft: Draft, keys: Keys, task: str, megatron: bool) -> None:
    if task != "grpo":
        return
    draft.put("rollout.generations", keys.count("num_generations"), keys.at("num_generations"))
    draft.assume("rollout.generations", 8, SOURCE % "arguments/rlhf_args.py: num_generations = 8")
    used = keys.flag("use_vllm")
    used = megatron if used is None else used
    if not used:
        draft.put("rollout.sampler", "trainer", keys.at("use_vllm"))
        return
    mode = keys.word("vllm_mode")
    if mode is None:
        mode = (
            "server" if keys.has("vllm_server_host") or keys.has("vllm_server_port") else "colocate"
        )
        draft.assume("rollout.sampler", mode, SOURCE % "arguments/rlhf_args.py: vllm_mode")
    draft.put(
        "rollout.sampler",
        mode if mode in ("server", "colocate") else "server",
        keys.at("vllm_mode"),
    )
    if draft.get("rollout.sampler") == "colocate":
        share = keys.number("vllm_gpu_memory_utilization")
        draft.put("rollout.sampler_share", share, keys.at("vllm_gpu_memory_utilization"))
        draft.assume(
            "rollout.sampler_share",
            0.9,
            SOURCE % "rlhf_trainers/args_mixin.py: vllm_gpu_memory_utilization = 0.9",
        )
        if keys.count("sleep_level"):
            draft.find(
                "IMP010",
                "sleep_level lets vLLM give its memory back while training: the reserve is "
                "an upper bound",
                keys.at("sleep_level"),
            )
    for name in ("offload_model", "offload_optimizer"):
        if keys.flag(name):
            draft.find(
                "IMP010",
                f"{name} empties the card while samples are generated; the training step is "
                f"as sized",
                keys.at(name),
            )


def _reference(draft: Draft, keys: Keys, task: str) -> None:
    full = draft.get("method.kind") == "full"
    beta = keys.number("beta")
    source = (
        SOURCE % "arguments/rlhf_args.py: ref_model is the model itself for full finetuning, else "
        "the adapter is switched off"
    )
    if task in ("dpo", "kto", "ppo"):
        draft.assume("reference", "model" if full else "adapter", source)
    elif task == "grpo":
        if beta == 0:
            draft.put("reference", "none", keys.at("beta"))
        draft.assume("reference", "model" if full else "adapter", source)
    elif task == "orpo":
        draft.put("reference", "none", keys.at("rlhf_type"))
    elif task == "distill":
        teacher = model_name(keys.text("teacher_model"))
        draft.put("teacher", teacher, keys.at("teacher_model"))
    if keys.text("ref_model"):
        draft.put("reference", "model", keys.at("ref_model"))
    for name in ("reward_model", "value_model"):
        if keys.raw(name) and task in ("ppo", "grpo"):
            draft.not_modelled(
                keys, (name,), "a second model is resident; its weights are not in this plan"
            )


def _swift(context: Context, keys: Keys) -> None:
    draft = context.draft
    if draft.get("precision.weights") is None:
        put_dtype(draft, keys, "torch_dtype")
    stored = draft.get("precision.weights")
    if stored == "fp32":
        draft.put("precision.mixed", "no", keys.at("torch_dtype"))
    elif stored == "fp16":
        draft.put("precision.mixed", "fp16", keys.at("torch_dtype"))
    keys.word("torch_dtype")
    explicit = keys.flag("bf16") is not None or keys.flag("fp16") is not None
    kept = draft.get("precision.mixed")
    preset = _presets(context, keys)
    training_arguments(context, keys, micro=1, prefix=SOURCE % "trainers/arguments.py")
    if not explicit and kept is not None:
        draft.put("precision.mixed", kept)
    named = keys.text("optimizer")
    if named is not None and keys.raw("optim") is None:
        name, known = optimizer_name(named)
        if named not in ("lorap", "multimodal"):
            draft.put("optimizer.name", name if known else None, keys.at("optimizer"))
            if not known:
                draft.find("IMP005", f"the optimizer {named} is not known", keys.at("optimizer"))
    if keys.flag("use_galore"):
        draft.put(
            "optimizer.name",
            "galore_adamw_8bit" if keys.flag("galore_quantization") else "galore_adamw",
            keys.at("use_galore"),
        )
        draft.put("optimizer.rank", keys.count("galore_rank") or 128, keys.at("use_galore"))
    if keys.word("tuner_backend") == "unsloth":
        draft.put("kernels", "unsloth", keys.at("tuner_backend"))
        draft.put("loss.kind", "fused", keys.at("tuner_backend"))
    if preset == "fsdp2" and draft.get("gradient_checkpointing.kind") is None:
        draft.put("gradient_checkpointing.kind", "full", keys.at("fsdp"))
        draft.put("gradient_checkpointing.reentrant", False)
    cp = keys.count("sequence_parallel_size")
    if cp is not None and cp > 1:
        draft.put("sharding.cp", cp, keys.at("sequence_parallel_size"))
    _device_map(draft, keys)
    surroundings(context, keys)
    world = (
        (draft.get("hardware.count") or 1)
        * (draft.get("hardware.nodes") or 1)
        // (draft.get("sharding.pp") or 1)
    )
    if keys.raw("gradient_accumulation_steps") is None and draft.get("task") != "grpo":
        draft.assume(
            "batch.accumulation",
            max(1, math.ceil(16 / draft.get("batch.micro") / max(world, 1))),
            SOURCE % "trainers/arguments.py: gradient_accumulation_steps fills 16 samples",
        )
    ddp = draft.get("sharding.kind") == "ddp"
    if draft.get("gradient_checkpointing.kind") not in (None, "none") and ddp:
        draft.assume(
            "gradient_checkpointing.reentrant",
            False,
            SOURCE % "trainers/mixin.py: use_reentrant is False under plain DDP",
        )


def _presets(context: Context, keys: Keys) -> str | None:
    """``--deepspeed zero3`` and ``--fsdp fsdp2`` name files that ms-swift carries itself."""
    draft = context.draft
    name = keys.word("deepspeed")
    match = re.fullmatch(r"zero([0-3])(_offload)?", name or "")
    if match is not None:
        at = keys.at("deepspeed")
        stage = int(match[1])
        draft.put("sharding.kind", ("ddp", "zero1", "zero2", "zero3")[stage], at)
        if match[2]:
            draft.put("sharding.offload", "params" if stage == 3 else "optimizer", at)
        source = SOURCE % f"config/{name}.json"
        if stage in (1, 2):
            draft.assume("sharding.bucket_elements", _BUCKET, source)
        elif stage == 3:
            draft.assume("sharding.auto_buckets", True, source)
            draft.assume("sharding.max_live_elements", 10**9, source)
        keys.data.pop("deepspeed", None)
        return name
    fsdp = keys.word("fsdp")
    if fsdp == "fsdp2":
        at = keys.at("fsdp")
        draft.put("sharding.kind", "fsdp", at)
        draft.put("sharding.version", 2, at)
        draft.put("sharding.wrap", "block", at)
        draft.put("sharding.reshard_after_forward", True, at)
        keys.data.pop("fsdp", None)
        return "fsdp2"
    if fsdp is not None and fsdp.endswith(".json"):
        document = context.reads(keys.text("fsdp") or "", keys, "fsdp")
        if document is not None:
            inner = draft.keys(Keys(document))
            apply_fsdp(draft, inner, ("fsdp_config",), tuple((inner.text("fsdp") or "").split()))
        keys.data.pop("fsdp", None)
        return "fsdp2"
    return None


def _device_map(draft: Draft, keys: Keys) -> None:
    """Several visible GPUs and one process: transformers lays the layers over the GPUs."""
    visible = visible_devices(keys)
    if visible is None or visible < 2 or keys.has(ENV, "NPROC_PER_NODE") or keys.has(LAUNCH):
        return
    at = keys.at(ENV, "CUDA_VISIBLE_DEVICES")
    if draft.get("sharding.kind") not in (None, "none"):
        return
    draft.put("hardware.count", visible, at)
    draft.put("sharding.kind", "none", at)
    draft.put("sharding.pp", visible, at)
    draft.find(
        "IMP010",
        f"one process sees {visible} GPUs: device_map lays the layers over them, "
        f"taken as a pipeline of {visible}",
        at,
        help="set NPROC_PER_NODE for data parallel training",
    )


def _megatron(context: Context, keys: Keys) -> None:
    draft = context.draft
    draft.put("batch.micro", keys.count("micro_batch_size"), keys.at("micro_batch_size"))
    draft.assume(
        "batch.micro", 1, SOURCE % "megatron/arguments/megatron_args.py: micro_batch_size = 1"
    )
    put_attention(draft, keys, "attention_backend")
    granularity = keys.word("recompute_granularity")
    if granularity is not None:
        draft.put(
            "gradient_checkpointing.kind",
            granularity if granularity in ("full", "selective") else "none",
            keys.at("recompute_granularity"),
        )
    layers = keys.count("recompute_num_layers")
    if granularity == "full" and layers is not None and layers > 1:
        if keys.word("recompute_method") == "block":
            draft.not_modelled(
                keys,
                ("recompute_num_layers",),
                "only the first layers of a stage are recomputed; all are sized",
            )
        else:
            draft.put("gradient_checkpointing.every", layers, keys.at("recompute_num_layers"))
    keys.raw("recompute_modules")
    for name, plan_key in (
        ("tensor_model_parallel_size", "sharding.tp"),
        ("pipeline_model_parallel_size", "sharding.pp"),
        ("context_parallel_size", "sharding.cp"),
        ("expert_model_parallel_size", "sharding.ep"),
    ):
        degree = keys.count(name)
        if degree is not None and degree > 1:
            draft.put(plan_key, degree, keys.at(name))
    if keys.flag("sequence_parallel") and (draft.get("sharding.tp") or 1) > 1:
        draft.put("sharding.sequence_parallel", True, keys.at("sequence_parallel"))
    draft.put(
        "sharding.etp",
        keys.count("expert_tensor_parallel_size"),
        keys.at("expert_tensor_parallel_size"),
    )
    virtual = keys.count("virtual_pipeline_model_parallel_size")
    if virtual is not None and virtual > 1:
        at = keys.at("virtual_pipeline_model_parallel_size")
        draft.put("sharding.schedule", "interleaved", at)
        draft.put("sharding.virtual_stages", virtual, at)
    if keys.flag("bf16") is False and keys.flag("fp16"):
        draft.put("precision.weights", "fp16", keys.at("fp16"))
    if draft.get("precision.weights") is None:
        put_dtype(draft, keys, "torch_dtype")
    draft.put("precision.mixed", "no")
    if keys.flag("optimizer_cpu_offload"):
        draft.put("sharding.offload", "optimizer", keys.at("optimizer_cpu_offload"))
        share = keys.number("optimizer_offload_fraction")
        if share is not None and share < 1:
            draft.not_modelled(
                keys,
                ("optimizer_offload_fraction",),
                "part of the optimizer stays on the card; all of it is taken off",
            )
    chosen, known = optimizer_name(keys.text("optimizer"))
    if chosen is not None and known:
        draft.put("optimizer.name", chosen, keys.at("optimizer"))
    for name in ("fp8_format", "fp8_param_gather", "fp8_recipe"):
        if keys.raw(name) and name != "fp8_recipe":
            draft.not_modelled(keys, (name,), "fp8 matmuls keep scales and extra copies")
    if keys.flag("use_precision_aware_optimizer"):
        draft.not_modelled(
            keys,
            ("use_precision_aware_optimizer",),
            "states and main parameters in fewer bits; sized in fp32, which is more",
        )
    surroundings(context, keys)
    total = (draft.get("hardware.count") or 0) * (draft.get("hardware.nodes") or 1)
    split = math.prod(draft.get(f"sharding.{name}") or 1 for name in ("tp", "pp", "cp"))
    data_parallel = max(total // split, 1)
    if total:
        draft.retract("sharding.kind")
        kind = "zero1" if data_parallel > 1 else "none"
        at = keys.at("use_distributed_optimizer")
        if keys.flag("use_distributed_optimizer") is False:
            kind = "ddp" if data_parallel > 1 else "none"
            draft.put("sharding.kind", kind, at)
        else:
            draft.assume(
                "sharding.kind",
                kind,
                SOURCE % "megatron/arguments/megatron_args.py: use_distributed_optimizer = True "
                "shards states over data parallel ranks",
            )
        batch = keys.count("global_batch_size") or 16
        draft.put(
            "batch.accumulation",
            max(batch // data_parallel // draft.get("batch.micro"), 1),
            keys.at("global_batch_size"),
        )
    keys.raw("global_batch_size")


def export(plan: Plan) -> writing.Exported:
    """The plan as a file for ``swift sft|pt|rlhf --config FILE``, on transformers' Trainer.

    Raises :class:`ftplan.errors.UnsupportedError` for what ms-swift has no key for.
    """
    out = writing.Writer(plan, trainer=NAME)
    out.tasks("sft", "pt", "dpo", "kto", "orpo", "rm")
    out.methods("full", "lora", "qlora", "dora")
    out.profile(find_stack(NAME))
    method, stored = plan.method, plan.precision.weights
    assert method is not None
    out.line("model", out.model())
    if plan.task == "pt":
        out.differs("task", "pt", "the command says it")
    elif plan.task not in (None, "sft"):
        out.line("rlhf_type", plan.task)
    out.line("tuner_type", "full" if method.kind == "full" else "lora")
    if method.kind != "full":
        out.lora(
            rank="lora_rank",
            targets="target_modules",
            modules="modules_to_save",
            parameters="target_parameters",
            dora="use_dora",
            rslora="use_rslora",
        )
    if method.kind == "qlora":
        _write_quantised(out, stored, method.double_quant)
    elif stored is not None:
        words = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
        out.line("torch_dtype", words.get(stored) or out.refuse(f"weights in {stored}"))
    out.attention("attn_impl", {"eager": "eager", "sdpa": "sdpa", "flash": "flash_attn"})
    out.line("max_length", plan.batch.seq_len)
    out.line("packing", plan.batch.packing)
    if plan.loss is not None and plan.loss.kind != ("fused" if plan.kernels == "liger" else "full"):
        out.refuse(f"loss: {plan.loss.kind} with kernels: {plan.kernels or 'none'}")
    out.training_arguments()
    out.degrees(tp=None, cp="sequence_parallel_size", ep=None, dp_replicate=None)
    verb = {None: "sft", "sft": "sft", "pt": "pt"}.get(plan.task, "rlhf")
    return out.done(hint=f"launch with: swift {verb} --config FILE")


def _write_quantised(out: writing.Writer, stored: str | None, double: bool | None) -> None:
    if stored not in ("nf4", "fp4", "int8"):
        out.refuse(f"a base quantised as {stored}")
    out.line("quant_method", "bnb")
    out.line("quant_bits", 8 if stored == "int8" else 4)
    if stored != "int8":
        out.line("bnb_4bit_quant_type", "fp4" if stored == "fp4" else None)
        out.line("bnb_4bit_use_double_quant", double)
