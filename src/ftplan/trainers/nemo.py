"""NeMo Automodel: recipe YAML and ``automodel`` command lines.

Keys and defaults read from NVIDIA-NeMo/Automodel nemo_automodel/recipes/llm/train_ft.py,
components/_peft/lora.py and components/distributed/config.py, 0.7.0.
"""

from __future__ import annotations

from typing import Any

from ftplan.errors import InputError
from ftplan.files.document import Key
from ftplan.trainers.draft import Draft
from ftplan.trainers.keys import Keys
from ftplan.trainers.launch import Context, surroundings
from ftplan.trainers.transformers import put_attention, put_dtype
from ftplan.trainers.words import dtype, glob_pattern, model_name, optimizer_name

__all__ = ["NAME", "matches", "read", "refuse"]

NAME = "nemo"
SOURCE = "NVIDIA-NeMo/Automodel nemo_automodel/%s, 0.7.0"

_RECIPES = {
    "TrainFinetuneRecipeForSequenceClassification": "classify", "TrainBiEncoderRecipe": "embed",
    "EmbeddingDistillRecipe": "embed", "TrainCrossEncoderRecipe": "classify",
    "KnowledgeDistillationRecipeForNextTokenPrediction": "distill",
    "KnowledgeDistillationRecipeForVLM": "distill", "PretrainRecipeForMultimodal": "pt",
}  # fmt: skip


def matches(data: dict[str, Any]) -> bool:
    """Whether a mapping is an Automodel recipe's configuration."""
    targets = any(isinstance(value, dict) and "_target_" in value for value in data.values())
    return (
        targets
        or "step_scheduler" in data
        or "recipe_args" in data
        or ("recipe" in data and "model" in data)
    )


def refuse(data: dict[str, Any], keys: Keys) -> InputError | None:
    """Why an Automodel file is no training job, or none whose model and loss are known."""
    give = "give the configuration of a finetuning recipe for a language model"
    recipe = data.get("recipe")
    name = str(recipe.get("_target_", "") if isinstance(recipe, dict) else recipe or "")
    draft = next((part for part in _DRAFT_RECIPES if part in name), None)
    if draft is not None or "recipe_args" in data:
        what = name.rsplit(".", 1)[-1] or "speculative"
        return keys.error(
            f"the recipe {what} trains a draft model for speculative decoding, which is not "
            f"modelled",
            "recipe",
            remedy=give,
        )
    if "flow_matching" in data or (
        "diffusion" in name.lower() and "DiffusionLM" not in name and "Gemma" not in name
    ):
        return keys.error(
            "this NeMo Automodel file trains an image or video diffusion model, which is "
            "not modelled",
            "flow_matching",
            remedy=give,
        )
    if "optimizer" in data or "step_scheduler" in data:
        return None
    return keys.error(
        "this NeMo Automodel file has neither optimizer nor step_scheduler: it does not train",
        remedy=give,
    )


_DRAFT_RECIPES = ("Eagle", "DFlash", "DSpark", "Vispec", "JetSpec", "Domino")


def read(context: Context, keys: Keys) -> None:
    """Fill the draft from an Automodel configuration."""
    draft = context.draft
    draft.keys(keys)
    recipe = keys.text("recipe", "_target_") if keys.section("recipe") else keys.text("recipe")
    recipe = (recipe or "").rsplit(".", 1)[-1]
    draft.put("task", _RECIPES.get(recipe, "sft"), keys.at("recipe"))
    if "Pretrain" in recipe or "pretrain" in keys.file.rsplit("/", 1)[-1]:
        draft.put("task", "pt", keys.at("recipe"))
    _refused_recipes(draft, keys, recipe)
    _model(draft, keys)
    _method(draft, keys)
    _precision(draft, keys)
    _batch(draft, keys)
    _optimizer(draft, keys)
    _loss(draft, keys)
    _teacher(draft, keys)
    surroundings(context, keys)
    _sharding(draft, keys)


def _refused_recipes(draft: Draft, keys: Keys, recipe: str) -> None:
    for part in (
        "Eagle",
        "DFlash",
        "DSpark",
        "Vispec",
        "JetSpec",
        "Domino",
        "DiffusionLM",
        "DiffusionGemma",
    ):
        if part in recipe:
            draft.find(
                "IMP002",
                f"the recipe {recipe} is not modelled: it trains more than a causal model's loss; "
                "the model itself is sized",
                keys.at("recipe"),
            )
    if (
        "VLM" in recipe
        or "Multimodal" in recipe
        or keys.has("freeze_config", "freeze_vision_tower")
    ):
        draft.find(
            "IMP007",
            "a multimodal recipe: towers and image tokens are not sized, the text model is",
            keys.at("recipe"),
        )
    keys.mapping("recipe")


def _model(draft: Draft, keys: Keys) -> None:
    for path in (
        ("model", "pretrained_model_name_or_path"),
        ("model", "config", "pretrained_model_name_or_path"),
        ("model", "config", "name_or_path"),
        ("model_name_or_path",),
        ("model", "pretrained_path"),
        ("model", "name_or_path"),
    ):
        if draft.get("model.name") is None:
            draft.put("model.name", model_name(keys.text(*path)), keys.at(*path))
    put_attention(draft, keys, "model", "attn_implementation")
    if draft.get("attention") is None:
        put_attention(draft, keys, "model", "backend", "attn")
    if keys.flag("model", "use_liger_kernel"):
        draft.put("kernels", "liger", keys.at("model", "use_liger_kernel"))
    elif keys.flag("model", "force_hf"):
        draft.put("kernels", "none", keys.at("model", "force_hf"))
    layers = keys.count("model", "config", "num_hidden_layers") or keys.count(
        "model", "num_hidden_layers"
    )
    if layers is not None:
        draft.find(
            "IMP002",
            "model overrides num_hidden_layers: the catalogue's full model is sized",
            keys.at("model", "config", "num_hidden_layers"),
            help="pass --config PATH with the changed shape",
        )


def _method(draft: Draft, keys: Keys) -> None:
    peft = ("peft",)
    section = keys.section(*peft)
    if not section:
        draft.put("method.kind", "full")
        return
    draft.put("method.kind", "lora", keys.at(*peft))
    draft.put("method.rank", keys.count(*peft, "dim"), keys.at(*peft, "dim"))
    draft.put("method.alpha", keys.whole(*peft, "alpha"), keys.at(*peft, "alpha"))
    draft.put("method.dropout", keys.number(*peft, "dropout"), keys.at(*peft, "dropout"))
    names = keys.words(*peft, "target_modules")
    if keys.flag(*peft, "match_all_linear"):
        draft.put("method.targets", "all-linear", keys.at(*peft, "match_all_linear"))
    elif names is not None:
        draft.put("method.targets", glob_pattern(names), keys.at(*peft, "target_modules"))
    if keys.words(*peft, "exclude_modules"):
        draft.find(
            "IMP010",
            "peft.exclude_modules is not applied: a few more modules are sized",
            keys.at(*peft, "exclude_modules"),
        )
    if keys.flag(*peft, "use_memory_efficient_lora") is False:
        draft.put("method.fused_lora", False, keys.at(*peft, "use_memory_efficient_lora"))
    draft.put("method.adapter_dtype", dtype(keys.text(*peft, "lora_dtype")), keys.at(*peft))
    if keys.flag(*peft, "use_dora"):
        draft.put("method.kind", "dora", keys.at(*peft, "use_dora"))
        draft.put("method.use_dora", True, keys.at(*peft, "use_dora"))
    keys.mapping(*peft)
    quant = ("quantization",)
    if keys.flag(*quant, "load_in_4bit"):
        kind = keys.word(*quant, "bnb_4bit_quant_type") or "nf4"
        draft.put("precision.weights", kind if kind in ("nf4", "fp4") else "nf4", keys.at(*quant))
        draft.put("method.kind", "qlora", keys.at(*quant))
        computed = dtype(keys.text(*quant, "bnb_4bit_compute_dtype"))
        draft.put("method.compute_dtype", computed, keys.at(*quant, "bnb_4bit_compute_dtype"))
        double = keys.flag(*quant, "bnb_4bit_use_double_quant")
        draft.put("method.double_quant", double, keys.at(*quant, "bnb_4bit_use_double_quant"))
    elif keys.flag(*quant, "load_in_8bit"):
        draft.put("precision.weights", "int8", keys.at(*quant))
        draft.put("method.kind", "qlora", keys.at(*quant))
    keys.mapping(*quant)
    keys.mapping("qat")


def _precision(draft: Draft, keys: Keys) -> None:
    if draft.get("precision.weights") is None:
        for name in ("torch_dtype", "dtype"):
            put_dtype(draft, keys, "model", name)
    draft.assume(
        "precision.mixed",
        "no",
        SOURCE % "recipes/llm/train_ft.py: parameters in torch_dtype, no autocast",
    )
    for name in ("param_dtype", "reduce_dtype"):
        path: tuple[Key, ...] = ("distributed", "mp_policy", name)
        found = dtype(keys.text(*path))
        draft.put(f"sharding.{name}", found, keys.at(*path))
    if keys.flag("fp8", "enabled"):
        draft.not_modelled(keys, ("fp8", "enabled"), "fp8 matmuls keep scales and extra copies")


def _batch(draft: Draft, keys: Keys) -> None:
    step = "step_scheduler"
    draft.put(
        "batch.micro", keys.count(step, "local_batch_size"), keys.at(step, "local_batch_size")
    )
    draft.assume(
        "batch.micro", 1, SOURCE % "components/training/step_scheduler.py: local_batch_size = 1"
    )
    packed = keys.count("packed_sequence", "packed_sequence_size") or keys.count(
        "packed_sequence", "pack_size"
    )
    if packed is not None:
        draft.put("batch.packing", True, keys.at("packed_sequence"))
        draft.put("batch.seq_len", packed, keys.at("packed_sequence"))
    for path in (
        ("dataset", "seq_length"),
        ("dataset", "seq_len"),
        ("dataset", "max_seq_length"),
        ("dataset", "block_size"),
        ("dataloader", "collate_fn", "max_length"),
        ("packed_sequence", "max_length"),
        ("recipe_args", "seq_length"),
        ("max_length",),
    ):
        if draft.get("batch.seq_len") is None:
            draft.put("batch.seq_len", keys.count(*path), keys.at(*path))
    if draft.get("batch.seq_len") is None:
        draft.ask(
            "batch.seq_len", "the dataset section bounds no length: the longest sample decides"
        )
        draft.places["batch.seq_len?"] = keys.at("dataset")
    if keys.flag("dataset", "pad_to_max_length") and packed is None:
        draft.find(
            "CFG005",
            "every sample is padded to the full length and none is packed",
            keys.at("dataset", "pad_to_max_length"),
            help="use packed_sequence, or pad to the longest of the batch",
        )
    keys.mapping("packed_sequence")


def _optimizer(draft: Draft, keys: Keys) -> None:
    target = keys.text("optimizer", "_target_")
    name, known = optimizer_name(target)
    if name == "adamw_torch" and keys.flag("optimizer", "fused"):
        name = "adamw_torch_fused"
    if name == "adamw_torch" and keys.flag("optimizer", "foreach") is False:
        draft.put("optimizer.implementation", "loop", keys.at("optimizer", "foreach"))
    draft.put("optimizer.name", name, keys.at("optimizer", "_target_"))
    if not known:
        draft.find(
            "IMP005",
            f"the optimizer {target} is not known: its states cannot be sized",
            keys.at("optimizer", "_target_"),
            help="pass --optimizer NAME",
        )
    if keys.flag("optimizer", "master_weights"):
        draft.not_modelled(
            keys, ("optimizer", "master_weights"), "an fp32 copy of each parameter in the optimizer"
        )
    keys.mapping("optimizer")


def _loss(draft: Draft, keys: Keys) -> None:
    target = keys.text("loss_fn", "_target_") if keys.section("loss_fn") else keys.text("loss_fn")
    name = (target or "").rsplit(".", 1)[-1]
    if "Fused" in name or "Linear" in name:
        draft.put("loss.kind", "fused", keys.at("loss_fn"))
    elif "Chunked" in name:
        draft.put("loss.kind", "chunked", keys.at("loss_fn"))
        draft.put("loss.chunk", keys.count("loss_fn", "chunk_len"), keys.at("loss_fn"))
    keys.mapping("loss_fn")


def _teacher(draft: Draft, keys: Keys) -> None:
    name = keys.text("teacher_model", "pretrained_model_name_or_path")
    draft.put("teacher", model_name(name), keys.at("teacher_model"))
    keys.mapping("teacher_model")


def _sharding(draft: Draft, keys: Keys) -> None:
    dist = "distributed"
    strategy = keys.word(dist, "strategy") or (keys.word(dist, "_target_") or "").rsplit(".", 1)[-1]
    for name in ("tp", "cp", "pp", "ep"):
        degree = (
            keys.count(dist, f"{name}_size")
            if keys.word(dist, f"{name}_size") not in (None, "none")
            else None
        )
        if degree is not None and degree > 1:
            draft.put(f"sharding.{name}", degree, keys.at(dist, f"{name}_size"))
    if keys.flag(dist, "sequence_parallel") and (draft.get("sharding.tp") or 1) > 1:
        draft.put("sharding.sequence_parallel", True, keys.at(dist, "sequence_parallel"))
    replicate = keys.word(dist, "dp_replicate_size")
    if replicate is not None and replicate.isdigit() and int(replicate) > 1:
        draft.put("sharding.dp_replicate", int(replicate), keys.at(dist, "dp_replicate_size"))
    mode = keys.word(dist, "activation_checkpointing")
    if mode is not None:
        kind = {"true": "full", "full": "full", "selective": "selective"}.get(mode, "none")
        draft.put("gradient_checkpointing.kind", kind, keys.at(dist, "activation_checkpointing"))
    elif keys.flag("parallelizer", "activation_checkpointing") or keys.flag(
        "model", "gradient_checkpointing"
    ):
        draft.put("gradient_checkpointing.kind", "full", keys.at("parallelizer"))
    _hardware(draft, keys)
    batch = keys.count("step_scheduler", "global_batch_size") or _GLOBAL_BATCH
    size = keys.word(dist, "dp_size")
    count = (draft.get("hardware.count") or 0) * (draft.get("hardware.nodes") or 1)
    if size is not None and size.isdigit() and int(size) > 0 and not count:
        total = int(size)
        for name in ("tp", "cp", "pp"):
            total *= draft.get(f"sharding.{name}") or 1
        draft.put("hardware.count", total, keys.at(dist, "dp_size"))
        count = total
    split = 1
    for name in ("tp", "cp", "pp"):
        split *= draft.get(f"sharding.{name}") or 1
    steps = max(batch // max(count // split, 1) // draft.get("batch.micro"), 1)
    draft.put("batch.accumulation", steps, keys.at("step_scheduler", "global_batch_size"))
    if strategy == "ddp" or "ddp" in strategy:
        draft.put("sharding.kind", "ddp", keys.at(dist))
    elif strategy or keys.section(dist):
        draft.retract("sharding.kind")
        draft.put("sharding.kind", "fsdp" if count != 1 else "none", keys.at(dist, "strategy"))
        if count != 1:
            draft.put("sharding.version", 2)
            for name, value in _POLICY.items():
                draft.put(f"sharding.{name}", draft.get(f"sharding.{name}") or value, keys.at(dist))
    if "ddp" not in strategy:
        _cast_adapters(draft, keys, alone=count <= 1)
    if keys.flag(dist, "offload") or keys.has(dist, "offload_policy"):
        draft.put("sharding.offload", "params", keys.at(dist, "offload_policy"))
    reshard = keys.flag(dist, "reshard_after_forward")
    draft.put("sharding.reshard_after_forward", reshard, keys.at(dist, "reshard_after_forward"))


_GLOBAL_BATCH = 32
"""components/training/step_scheduler.py 0.7.0, where the file gives none."""
_POLICY = {"param_dtype": "bf16", "reduce_dtype": "fp32"}
"""components/distributed/config.py 0.7.0, ``FSDP2Config``."""


def _cast_adapters(draft: Draft, keys: Keys, *, alone: bool) -> None:
    """Frozen weights are stored as they are computed with, whatever ``torch_dtype`` says.

    On one rank nothing is wrapped, and adapters are cast with what they lie beside
    (components/models/common/utils.py 0.7.0, ``prepare_frozen_parameters_for_sharding``,
    ``cast_frozen_modules_to_compute_dtype``).
    """
    where = keys.at("peft")
    computed = draft.get("sharding.param_dtype") or _POLICY["param_dtype"]
    stored = draft.get("precision.weights")
    if draft.get("method.kind") == "full" or stored not in ("fp32", "bf16", "fp16", None):
        return
    own = draft.get("method.adapter_dtype") or (stored if stored == "fp32" else None)
    draft.retract("method.adapter_dtype")
    draft.put("method.adapter_dtype", computed if alone and own else own, where)
    if stored == "fp32":
        draft.retract("precision.weights")
        draft.put("precision.weights", computed, keys.at("model", "torch_dtype"))


def _hardware(draft: Draft, keys: Keys) -> None:
    count = keys.count("nproc_per_node")
    draft.put("hardware.count", count, keys.at("nproc_per_node"))
    accelerators = keys.text("skypilot", "accelerators")
    if accelerators is not None and ":" in accelerators:
        name, _, number = accelerators.partition(":")
        draft.put("hardware.gpu", name.lower(), keys.at("skypilot", "accelerators"))
        if number.isdigit() and int(number) > 0:
            draft.put("hardware.count", int(number), keys.at("skypilot", "accelerators"))
    for path in (("skypilot", "num_nodes"), ("slurm", "nodes")):
        nodes = keys.count(*path)
        if nodes is not None and nodes > 1:
            draft.put("hardware.nodes", nodes, keys.at(*path))
    draft.put(
        "hardware.count",
        keys.count("slurm", "ntasks_per_node"),
        keys.at("slurm", "ntasks_per_node"),
    )
    keys.mapping("skypilot")
    keys.mapping("slurm")
