"""axolotl: its YAML, command-line overrides, and an export.

Keys and defaults read from axolotl-ai-cloud/axolotl src/axolotl/utils/schemas/*.py and
src/axolotl/loaders/model.py, 0.18.0 (commit 067b021c8).
"""

from __future__ import annotations

from math import prod
from typing import Any

from ftplan.catalog.stacks import find_stack
from ftplan.errors import InputError
from ftplan.spec import Plan
from ftplan.trainers import deepspeed, writing
from ftplan.trainers.accelerate import apply_fsdp
from ftplan.trainers.draft import Draft
from ftplan.trainers.keys import Keys
from ftplan.trainers.launch import Context, surroundings
from ftplan.trainers.transformers import (
    mixed_precision,
    put_attention,
    put_dtype,
    put_optimizer,
    stage_of,
)
from ftplan.trainers.words import model_name, peft_default_targets, targets

__all__ = ["NAME", "export", "matches", "read"]

NAME = "axolotl"
SOURCE = "axolotl-ai-cloud/axolotl src/axolotl/%s, 0.18.0"

_TASKS = {
    "dpo": "dpo", "ipo": "dpo", "simpo": "orpo", "kto": "kto", "orpo": "orpo", "grpo": "grpo",
    "gdpo": "grpo", "ebft": "grpo", "bco": "kto",
}  # fmt: skip
_LEGACY_ATTENTION = {
    "xformers_attention": "xformers", "sage_attention": "sage", "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager",
}  # fmt: skip
_ADAPTERS = {
    "lora", "qlora", "dora", "oft", "boft", "ia3", "vera", "loha", "lokr", "llama-adapter",
    "prompt_tuning", "prefix_tuning", "p_tuning", "ln_tuning",
}  # fmt: skip


def matches(data: dict[str, Any]) -> bool:
    """Whether a mapping is an axolotl training configuration."""
    return "base_model" in data


def read(context: Context, keys: Keys) -> None:
    """Fill the draft from an axolotl configuration."""
    draft = context.draft
    draft.keys(keys)
    draft.put("model.name", model_name(keys.text("base_model")), keys.at("base_model"))
    task = _task(draft, keys)
    _batch(draft, keys, task)
    _method(draft, keys)
    _quantised(draft, keys)
    _precision(draft, keys)
    _checkpointing(draft, keys)
    _attention(draft, keys)
    put_optimizer(draft, keys, "optimizer")
    if "layerwise" in (draft.get("optimizer.name") or ""):
        draft.put("optimizer.in_backward", True, keys.at("optimizer"))
    draft.assume(
        "optimizer.name", "adamw_torch_fused", SOURCE % "utils/schemas/training.py: optimizer"
    )
    _loss(draft, keys)
    _sharding(context, keys)
    _rollout(draft, keys, task)
    surroundings(context, keys)


def _task(draft: Draft, keys: Keys) -> str:
    rl = keys.word("rl")
    task = "sft"
    if rl is not None:
        if rl not in _TASKS:
            draft.find("IMP005", f"the rl method {rl!r} is not known", keys.at("rl"))
        task = _TASKS.get(rl, "dpo")
        draft.put("task", task, keys.at("rl"))
        if rl == "ebft":
            draft.not_modelled(
                keys, ("rl",), "energy-based finetuning also keeps feature networks; sized as GRPO"
            )
    elif keys.flag("reward_model") or keys.flag("process_reward_model"):
        task = "rm"
        draft.put("task", "rm", keys.at("reward_model"))
    elif keys.raw("pretraining_dataset"):
        task = "pt"
        draft.put("task", "pt", keys.at("pretraining_dataset"))
    elif keys.count("num_labels") and "SequenceClassification" in (keys.text("model_type") or ""):
        task = "classify"
        draft.put("task", "classify", keys.at("num_labels"))
    else:
        draft.put("task", "sft")
    return task


def _batch(draft: Draft, keys: Keys, task: str) -> None:
    draft.put("batch.seq_len", keys.count("sequence_len"), keys.at("sequence_len"))
    draft.assume("batch.seq_len", 512, SOURCE % "utils/schemas/config.py: sequence_len = 512")
    draft.put("batch.micro", keys.count("micro_batch_size"), keys.at("micro_batch_size"))
    draft.assume("batch.micro", 1, SOURCE % "utils/schemas/training.py: micro_batch_size = 1")
    steps = keys.count("gradient_accumulation_steps")
    total = keys.count("batch_size")
    if steps is None and total is not None:
        steps = max(total // draft.get("batch.micro"), 1)
    draft.put("batch.accumulation", steps, keys.at("gradient_accumulation_steps"))
    packing = keys.flag("sample_packing")
    draft.put(
        "batch.packing",
        bool(packing) or keys.count("max_packed_sequence_len") is not None,
        keys.at("sample_packing"),
    )
    if keys.flag("pad_to_sequence_len") and not packing and task in ("sft", "pt"):
        draft.find(
            "CFG005",
            "every sample is padded to sequence_len and none is packed: short samples "
            "cost as much memory as the longest",
            keys.at("pad_to_sequence_len"),
            help="set sample_packing: true, or pad_to_sequence_len: false",
        )
    evaluates = keys.number("val_set_size") or keys.raw("test_datasets")
    if evaluates:
        draft.put("batch.eval_micro", keys.count("eval_batch_size"), keys.at("eval_batch_size"))
    keys.count("eval_batch_size")
    keys.raw("test_datasets")


def _method(draft: Draft, keys: Keys) -> None:
    adapter = keys.word("adapter")
    names = (
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "lora_target_linear",
        "lora_modules_to_save",
        "lora_target_parameters",
        "peft_use_dora",
        "peft_use_rslora",
        "peft_layers_to_transform",
        "lora_rank_pattern",
        "lora_fan_in_fan_out",
        "peft_autocast_adapter_dtype",
        "lora_mlp_kernel",
        "lora_qkv_kernel",
        "lora_o_kernel",
        "oft_block_size",
    )
    unfrozen = (
        keys.words("unfrozen_parameters")
        if isinstance(keys.raw("unfrozen_parameters"), list)
        else None
    )
    if adapter is None:
        draft.put("method.kind", "full")
        if unfrozen:
            _partial(draft, keys, unfrozen)
        set_ = [
            name for name in names[:6] if keys.has(name) and keys.raw(name) not in (None, False)
        ]
        if set_:
            draft.find(
                "CFG001",
                f"{', '.join(set_)} do nothing without an adapter; every weight is trained",
                keys.at(set_[0]),
                help="set adapter: lora or adapter: qlora, or remove these keys",
            )
        for name in names:
            keys.raw(name)
        return
    if adapter not in _ADAPTERS:
        draft.find(
            "IMP005",
            f"the adapter {adapter!r} is not known; it is sized as lora",
            keys.at("adapter"),
        )
    kind = adapter if adapter in _ADAPTERS and adapter != "llama-adapter" else "lora"
    draft.put("method.kind", "lora" if kind == "qlora" else kind, keys.at("adapter"))
    draft.put("method.rank", keys.count("lora_r"), keys.at("lora_r"))
    draft.put("method.alpha", keys.whole("lora_alpha"), keys.at("lora_alpha"))
    draft.put("method.dropout", keys.number("lora_dropout"), keys.at("lora_dropout"))
    draft.assume("method.dropout", 0.0, SOURCE % "utils/schemas/peft.py: lora_dropout = 0.0")
    linear = keys.flag("lora_target_linear")
    chosen = targets(keys.words("lora_target_modules"))
    if linear:
        draft.put("method.targets", "all-linear", keys.at("lora_target_linear"))
    else:
        draft.put("method.targets", chosen, keys.at("lora_target_modules"))
    parameters = keys.words("lora_target_parameters")
    draft.put("method.target_parameters", parameters, keys.at("lora_target_parameters"))
    if draft.get("method.targets") is None and parameters is None:
        default, source = peft_default_targets(draft.get("model.name"))
        draft.assume("method.targets", default, source)
    draft.put(
        "method.modules_to_save",
        keys.words("lora_modules_to_save"),
        keys.at("lora_modules_to_save"),
    )
    if keys.flag("peft_use_dora"):
        draft.put("method.use_dora", True, keys.at("peft_use_dora"))
        if draft.get("method.kind") == "lora":
            draft.put("method.kind", "dora", keys.at("peft_use_dora"))
    draft.put("method.use_rslora", keys.flag("peft_use_rslora") or None, keys.at("peft_use_rslora"))
    layers = keys.raw("peft_layers_to_transform")
    if isinstance(layers, list) and all(isinstance(layer, int) for layer in layers):
        draft.put("method.layers_to_transform", tuple(layers), keys.at("peft_layers_to_transform"))
    pattern = keys.mapping("lora_rank_pattern")
    if pattern and all(isinstance(rank, int) and rank > 0 for rank in pattern.values()):
        draft.put("method.rank_pattern", pattern, keys.at("lora_rank_pattern"))
    if keys.flag("peft_autocast_adapter_dtype") is False:
        draft.put("method.adapter_dtype", "bf16", keys.at("peft_autocast_adapter_dtype"))
    keys.known("lora_fan_in_fan_out")
    _lora_functions(draft, keys)
    if unfrozen:
        draft.put("method.modules_to_save", tuple(unfrozen), keys.at("unfrozen_parameters"))


def _partial(draft: Draft, keys: Keys, patterns: tuple[str, ...]) -> None:
    draft.not_modelled(
        keys,
        ("unfrozen_parameters",),
        f"only {len(patterns)} pattern(s) of parameters are trained; sized as full "
        f"finetuning, which is more",
    )


def _quantised(draft: Draft, keys: Keys) -> None:
    adapter = keys.word("adapter")
    four, eight = keys.flag("load_in_4bit"), keys.flag("load_in_8bit")
    kind = draft.get("method.kind")
    if four and eight:
        draft.find(
            "CFG007",
            "load_in_4bit and load_in_8bit are both on: axolotl refuses this",
            keys.at("load_in_8bit"),
            help="keep one of the two",
        )
    if (four or eight) and adapter is None:
        name = "load_in_4bit" if four else "load_in_8bit"
        draft.find(
            "CFG006",
            f"{name} without an adapter: a quantised base cannot be trained in full",
            keys.at(name),
            help="set adapter: qlora (4 bit) or adapter: lora (8 bit), or remove it",
        )
    if adapter == "qlora" and not four and not keys.flag("gptq"):
        draft.find(
            "CFG007",
            "adapter: qlora needs load_in_4bit: true; axolotl stops here",
            keys.at("adapter"),
            help="set load_in_4bit: true",
        )
        four = True
    if keys.flag("gptq"):
        _base(draft, keys, "gptq-int4", "gptq")
    elif four:
        options = keys.mapping("bnb_config_kwargs") or {}
        quant = str(options.get("bnb_4bit_quant_type", "nf4"))
        _base(draft, keys, quant if quant in ("nf4", "fp4") else "nf4", "load_in_4bit")
        double = options.get("bnb_4bit_use_double_quant")
        if draft.get("method.kind") == "qlora" and isinstance(double, bool):
            draft.put("method.double_quant", double, keys.at("bnb_config_kwargs"))
    elif eight and kind is not None:
        _base(draft, keys, "int8", "load_in_8bit")
    experts = keys.flag("quantize_moe_experts")
    if experts and not (four or eight):
        draft.not_modelled(keys, ("quantize_moe_experts",), "only experts are quantised")
    keys.mapping("bnb_config_kwargs")


def _base(draft: Draft, keys: Keys, weights: str, name: str) -> None:
    draft.put("precision.weights", weights, keys.at(name))
    if draft.get("method.kind") in ("lora", "dora"):
        draft.put("method.kind", "qlora", keys.at("adapter"))


def _precision(draft: Draft, keys: Keys) -> None:
    """``bf16`` is ``auto`` where nothing is said, and the weights' dtype follows it."""
    dtype = SOURCE % "utils/config/__init__.py: resolve_dtype"
    if keys.word("bf16") == "full":  # what the trainer's code still asks for (builders/base.py)
        draft.find(
            "CFG007",
            "bf16: full is described and not accepted: axolotl's schema stops at it",
            keys.at("bf16"),
            help="set bf16: true; axolotl has no training in bf16 without autocast",
        )
        draft.put("precision.mixed", "no", keys.at("bf16"))
        draft.put("precision.weights", "bf16", keys.at("bf16"))
        return
    draft.put("precision.mixed", mixed_precision(draft, keys))
    if keys.flag("bfloat16") and draft.get("precision.mixed") != "fp16":
        draft.put("precision.mixed", "bf16", keys.at("bfloat16"))
    elif not keys.has("bf16") and not keys.flag("fp16"):
        draft.assume("precision.mixed", "bf16", SOURCE % "utils/schemas/config.py: bf16 = auto")
    put_dtype(draft, keys, "torch_dtype")
    mixed = draft.get("precision.mixed")
    half = keys.flag("float16") or keys.flag("load_in_8bit")
    plain = "fp16" if half else "fp32"
    draft.assume("precision.weights", mixed if mixed in ("bf16", "fp16") else plain, dtype)
    keys.raw("float32")


def _checkpointing(draft: Draft, keys: Keys) -> None:
    raw = keys.word("gradient_checkpointing")
    offload = keys.word("activation_offloading")
    at = keys.at("gradient_checkpointing")
    if raw in ("offload", "offload_disk") or raw == "unsloth":
        draft.put("gradient_checkpointing.kind", "offload", at)
    else:
        on = keys.flag("gradient_checkpointing")
        if on is not None:
            draft.put("gradient_checkpointing.kind", "full" if on else "none", at)
            if on and offload not in (None, "false"):
                draft.put(
                    "gradient_checkpointing.kind", "offload", keys.at("activation_offloading")
                )
        if not on and offload not in (None, "false"):
            draft.find(
                "CFG007",
                "activation_offloading needs gradient_checkpointing: axolotl stops here",
                keys.at("activation_offloading"),
                help="set gradient_checkpointing: true",
            )
    selective = keys.raw("selective_checkpointing")
    if selective:
        draft.put("gradient_checkpointing.kind", "selective", keys.at("selective_checkpointing"))
    kwargs = keys.mapping("gradient_checkpointing_kwargs")
    reentrant = None if kwargs is None else kwargs.get("use_reentrant")
    if draft.get("gradient_checkpointing.kind") in (None, "none"):
        return
    if isinstance(reentrant, bool):
        draft.put(
            "gradient_checkpointing.reentrant", reentrant, keys.at("gradient_checkpointing_kwargs")
        )
    elif keys.raw("unfrozen_parameters") or "gemma-4" in (draft.get("model.name") or "").lower():
        source = SOURCE % "utils/config/__init__.py: normalize_config, use_reentrant"
        draft.assume("gradient_checkpointing.reentrant", False, source)


def _attention(draft: Draft, keys: Keys) -> None:
    for name, implementation in _LEGACY_ATTENTION.items():
        if keys.flag(name):
            legacy = {"sdpa": "sdpa", "eager": "eager"}.get(implementation, "flash")
            draft.put("attention", legacy, keys.at(name))
    put_attention(draft, keys, "attn_implementation")
    packing = draft.get("batch.packing")
    if packing and draft.get("attention") in ("eager", "sdpa"):
        draft.find(
            "CFG008",
            f"sample_packing with {draft.get('attention')} attention builds a block mask or "
            "lets samples see each other",
            keys.at("sample_packing"),
            help="set attn_implementation: flash_attention_2",
        )


_LORA_FUNCTIONS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


def _lora_functions(draft: Draft, keys: Keys) -> None:
    """LoRA's fused functions: the plan has one switch for three, which the MLP's decides."""
    told = [keys.flag(name) for name in _LORA_FUNCTIONS]
    _refuse_functions(draft, keys, told)
    if any(flag is not None for flag in told):
        draft.put("method.fused_lora", bool(told[0]), keys.at(_LORA_FUNCTIONS[0]))
    if any(bool(flag) != bool(told[0]) for flag in told):
        draft.find(
            "IMP002",
            "LoRA's functions for a part of the layers are not told apart: as lora_mlp_kernel says",
            next(
                keys.at(n)
                for n, flag in zip(_LORA_FUNCTIONS, told, strict=True)
                if flag is not None
            ),
        )


def _refuse_functions(draft: Draft, keys: Keys, told: list[bool | None]) -> None:
    """They are put into a causal language model that has its adapter (``apply_lora_kernel_patches``
    of monkeypatch/lora_kernels.py, ``_load_adapters`` of loaders/model.py, 0.19)."""
    adapter, task = keys.word("adapter"), draft.get("task")
    of_8_bit = adapter == "lora" and keys.flag("load_in_8bit")
    silent = not any(keys.has(name) for name in _LORA_FUNCTIONS)
    usual = silent and not of_8_bit and not keys.flag("trust_remote_code")
    if adapter in ("lora", "qlora") and task == "rm" and (usual or any(told)):
        draft.find(
            "CFG007",
            "LoRA's fused functions, which are on where nothing is said, take no reward model: "
            "axolotl stops here",
            keys.at("reward_model"),
            help="set lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel to false",
        )
    elif task in ("dpo", "kto") and any(told):
        draft.find(
            "CFG007",
            f"with {task} the trainer adapts the model after axolotl has looked for adapters to "
            "fuse: axolotl stops here",
            keys.at(_LORA_FUNCTIONS[told.index(True)]),
            help="leave lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel out",
        )


_FUSED_LOSSES = {
    "cut_cross_entropy": "cut", "liger_fused_linear_cross_entropy": "liger",
    "unsloth_cross_entropy_loss": "unsloth",
}  # fmt: skip
"""Keys of a loss without logits, and whose function it is."""


def _loss(draft: Draft, keys: Keys) -> None:
    plugins = " ".join(keys.words("plugins") or ())
    fused = None
    if "CutCrossEntropyPlugin" in plugins and keys.flag("cut_cross_entropy") is not False:
        fused = "plugins"
    for name in _FUSED_LOSSES:
        if keys.flag(name):
            fused = name
    if fused is not None:
        draft.put("loss.kind", "fused", keys.at(fused))
    elif keys.flag("chunked_cross_entropy"):
        draft.put("loss.kind", "chunked", keys.at("chunked_cross_entropy"))
        draft.places["loss.chunk"] = keys.at("chunked_cross_entropy_num_chunks")
        chunks = keys.count("chunked_cross_entropy_num_chunks") or 8
        tokens = draft.get("batch.micro") * draft.get("batch.seq_len")
        draft.put("loss.chunk", -(-tokens // chunks))
    elif draft.get("task") in ("orpo", "dpo", "kto", "grpo"):
        draft.assume(
            "loss.kind",
            "full",
            SOURCE % "core/trainers: preference trainers take full log-probabilities",
        )
    layers = ("liger_rms_norm", "liger_glu_activation", "liger_rope", "liger_layer_norm")
    if "LigerPlugin" in plugins and any(keys.flag(name) for name in layers):
        draft.put("kernels", "liger", keys.at("plugins"))
    for name in layers:
        keys.flag(name)
    if fused is not None:
        by = _FUSED_LOSSES.get(fused, "cut")
        usual = "liger" if draft.get("kernels") == "liger" else "cut"
        draft.put("loss.by", None if by == usual else by, keys.at(fused))


def _sharding(context: Context, keys: Keys) -> None:
    draft = context.draft
    named = keys.text("deepspeed")
    if named is not None:
        document = context.reads(named, keys, "deepspeed")
        if document is not None:
            deepspeed.apply(draft, Keys(document))
        else:
            guessed = stage_of(named)
            if guessed is not None:
                draft.put("sharding.kind", guessed, keys.at("deepspeed"))
                offload = (
                    "params" if "cpuoffload_all" in named or "cpuoffload_params" in named else None
                )
                draft.put("sharding.offload", offload, keys.at("deepspeed"))
                draft.find(
                    "IMP010", f"{guessed} is taken from the name {named}", keys.at("deepspeed")
                )
    options = keys.words("fsdp") if not isinstance(keys.raw("fsdp"), bool) else ("full_shard",)
    if options or keys.section("fsdp_config"):
        split = tuple(part for option in options or () for part in option.split())
        apply_fsdp(draft, keys, ("fsdp_config",), split)
        if "auto_wrap" in split:
            draft.put("sharding.wrap", "block", keys.at("fsdp"))
    for name, plan_key in (
        ("tensor_parallel_size", "sharding.tp"),
        ("context_parallel_size", "sharding.cp"),
        ("sequence_parallel_degree", "sharding.cp"),
        ("expert_parallel_size", "sharding.ep"),
        ("dp_replicate_size", "sharding.dp_replicate"),
    ):
        degree = keys.count(name)
        if degree is not None and degree > 1:
            draft.put(plan_key, degree, keys.at(name))
    shard = keys.count("dp_shard_size") or 1
    if shard > 1:
        draft.put("sharding.kind", draft.get("sharding.kind") or "fsdp", keys.at("dp_shard_size"))
    spread = draft.get("sharding.ep") or 1
    if max(shard, spread) > 1:  # the plugin refuses another product than the number of GPUs
        product = shard
        for name in ("tp", "cp", "ep", "dp_replicate"):
            product *= draft.get(f"sharding.{name}") or 1
        key = "dp_shard_size" if shard > 1 else "expert_parallel_size"
        draft.put("hardware.count", product, keys.at(key))
    cap = keys.count("ddp_bucket_cap_mb")
    if cap is not None:
        draft.put("sharding.bucket_bytes", cap * 2**20, keys.at("ddp_bucket_cap_mb"))


def _rollout(draft: Draft, keys: Keys, task: str) -> None:
    adapter = draft.get("method.kind") != "full"
    if task in ("dpo", "kto"):
        precomputed = keys.flag("precompute_ref_log_probs")
        if precomputed:
            draft.put("reference", "precomputed", keys.at("precompute_ref_log_probs"))
        draft.assume(
            "reference",
            "adapter" if adapter else "model",
            SOURCE % "train.py: setup_reference_model loads none when an adapter is trained",
        )
    elif task == "orpo":
        draft.put("reference", "none")
    if task != "grpo":
        keys.mapping("trl")
        keys.mapping("vllm")
        return
    trl = ("trl",)
    draft.put(
        "rollout.generations", keys.count(*trl, "num_generations"), keys.at(*trl, "num_generations")
    )
    completion = keys.count(*trl, "max_completion_length")
    draft.put("rollout.completion_tokens", completion, keys.at(*trl, "max_completion_length"))
    beta = keys.number(*trl, "beta")
    kind = "none" if not beta else "adapter" if adapter else "model"
    draft.put("reference", kind, keys.at(*trl, "beta"))
    if keys.flag(*trl, "use_vllm"):
        mode = keys.word(*trl, "vllm_mode") or "server"
        draft.put(
            "rollout.sampler",
            mode if mode in ("server", "colocate") else "server",
            keys.at(*trl, "use_vllm"),
        )
        if mode == "colocate":
            share = keys.number("vllm", "gpu_memory_utilization") or keys.number(
                *trl, "vllm_gpu_memory_utilization"
            )
            draft.put("rollout.sampler_share", share, keys.at("vllm", "gpu_memory_utilization"))
    else:
        draft.put("rollout.sampler", "trainer")
    keys.mapping("trl")
    keys.mapping("vllm")


def refuse(data: dict[str, Any], keys: Keys) -> InputError | None:
    """Why a mapping that looks like axolotl's is no training job."""
    if "provider" in data and "gpu_count" in data:
        return keys.error(
            "this is an axolotl cloud file: it says where a job runs, not which",
            "provider",
            remedy="give the axolotl configuration with base_model",
        )
    return None


def export(plan: Plan) -> writing.Exported:
    """The plan as an axolotl configuration.

    Raises :class:`ftplan.errors.UnsupportedError` for what axolotl has no key for.
    """
    out = writing.Writer(plan, trainer=NAME)
    out.tasks("sft", "dpo", "kto", "orpo", "rm")
    out.methods("full", "lora", "qlora", "dora")
    out.profile(find_stack(NAME))
    out.line("base_model", out.model())
    method = plan.method
    weights = plan.precision.weights
    if method is not None and method.kind != "full":
        out.line(
            "adapter", "qlora" if method.kind == "qlora" and weights in ("nf4", "fp4") else "lora"
        )
        out.lora(
            rank="lora_r",
            targets="lora_target_modules",
            modules="lora_modules_to_save",
            parameters="lora_target_parameters",
            linear="lora_target_linear",
            dora="peft_use_dora",
            rslora="peft_use_rslora",
        )
        if method.fused_lora is not None:
            for name in _LORA_FUNCTIONS:
                out.line(name, method.fused_lora)
        if method.layers_to_transform is not None:
            out.line("peft_layers_to_transform", list(method.layers_to_transform))
        if method.rank_pattern is not None:
            out.mapping("lora_rank_pattern", dict(method.rank_pattern))
        if method.kind == "qlora":
            out.quantised(double=None)
            if weights in ("nf4", "fp4"):
                options: dict[str, Any] = {}
                if weights == "fp4":
                    options["bnb_4bit_quant_type"] = "fp4"
                if method.double_quant is not None:
                    options["bnb_4bit_use_double_quant"] = method.double_quant
                if options:
                    out.mapping("bnb_config_kwargs", options)
    if plan.task in ("dpo", "kto", "orpo"):
        out.line("rl", plan.task)
        quantised = method is not None and method.kind == "qlora"
        if quantised and plan.sharding.kind == "fsdp":
            out.refuse(f"{plan.task} on a quantised base under FSDP2")
    if plan.task == "kto":
        out.line("remove_unused_columns", False)
    if plan.task == "rm":
        out.line("reward_model", True)
    if plan.reference == "precomputed":
        out.line("precompute_ref_log_probs", True)
    out.line("sequence_len", plan.batch.seq_len)
    out.line("micro_batch_size", plan.batch.micro)
    out.line("gradient_accumulation_steps", plan.batch.accumulation)
    out.line("sample_packing", plan.batch.packing)
    _export_precision(out, plan)
    out.attention(
        "attn_implementation", {"eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2"}
    )
    out.checkpointing()
    out.optimizer("optimizer")
    if plan.kernels == "unsloth":
        out.refuse("kernels: unsloth")
    if plan.loss is not None and plan.loss.kind == "chunked":
        out.refuse("a chunked loss")
    _loss_plugins(out, plan)
    out.fsdp(prefix="")
    out.degrees(
        tp="tensor_parallel_size",
        cp="context_parallel_size",
        ep="expert_parallel_size",
        dp_replicate="dp_replicate_size",
    )
    sharding = plan.sharding
    if (sharding.ep or 1) > 1:
        others = prod(getattr(sharding, n) or 1 for n in ("tp", "cp", "ep", "dp_replicate"))
        shard = (plan.hardware.count or 1) * (plan.hardware.nodes or 1) // others
        out.line("dp_shard_size", shard if shard > 1 else None)
    return out.done(hint="launch with: axolotl train FILE")


def _loss_plugins(out: writing.Writer, plan: Plan) -> None:
    """Liger's kernels, and the loss without logits: Liger's, or cut cross entropy."""
    fused = plan.loss is not None and plan.loss.kind == "fused"
    by = plan.loss.by if plan.loss is not None else None
    cut = fused and by != "liger" and (by == "cut" or plan.kernels != "liger")
    plugins = []
    if cut:
        plugins.append("axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin")
    if plan.kernels == "liger" or (fused and not cut):
        plugins.append("axolotl.integrations.liger.LigerPlugin")
    if (plan.sharding.ep or 1) > 1:
        plugins.append("axolotl.integrations.expert_parallel.ExpertParallelPlugin")
    if plugins:
        out.line("plugins", plugins)
    if plan.kernels == "liger":
        for name in ("liger_rms_norm", "liger_glu_activation", "liger_rope"):
            out.line(name, True)
    if fused and not cut:
        out.line("liger_fused_linear_cross_entropy", True)


def _export_precision(out: writing.Writer, plan: Plan) -> None:
    """``bf16`` and ``fp16`` are autocast and the weights' dtype in one."""
    mixed, weights = plan.precision.mixed, plan.precision.weights
    if mixed in ("bf16", "fp16"):
        out.line(mixed, True)
        if weights in ("bf16", "fp16", "fp32") and weights != mixed:
            why = f"axolotl loads in {mixed} when it trains in {mixed}"
            out.differs("precision.weights", weights, why)
    elif weights == "bf16":
        out.line("bf16", True)
        out.differs("precision.mixed", "no", "axolotl autocasts whenever it loads in bf16")
    elif weights in ("fp16", "fp32") or mixed == "no":
        out.line("bf16", False)
        out.line("float16", True if weights == "fp16" else None)
