"""Which keys of a plan count, and why the others do nothing: the table behind MEM005 and MEM001.

A key that cannot change the answer is named, never dropped in silence. The table below says of
each key when it is idle; :func:`ftplan.front.resolve.resolve` names what it finds and takes it out
of the plan, so that what is named has no effect by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from ftplan.adapting import OPTIONS, RANKS
from ftplan.catalog.optimizers import find_optimizer
from ftplan.catalog.stacks import RINGS, Stack
from ftplan.dtypes import find_format
from ftplan.spec import Plan

__all__ = ["TRAINING_TASKS", "idle_keys", "sentence", "shapeless_keys", "without"]

TRAINING_TASKS = ("pt", "rm", "dpo", "kto", "orpo", "ppo", "grpo", "distill")
"""Tasks that say nothing about a model that is only run; the others are what it was made for."""


class _Job:
    """What decides which keys count: facts of a plan with its defaults filled in."""

    def __init__(self, plan: Plan, stack: Stack, config: Mapping[str, Any] | None) -> None:
        self.plan, self.stack, self.config = plan, stack, config
        method, sharding, weights = plan.method, plan.sharding, plan.precision.weights
        self.task = plan.task or "sft"
        self.trains = method is not None and self.task != "serve"
        self.kind = method.kind if method is not None and self.trains else ""
        self.adapts = self.trains and self.kind not in ("full", "partial")
        self.shaped = config is not None
        self.weights = find_format(weights or "bf16")
        self.quantised = self.weights.layout != "plain" or not self.weights.trainable
        self.mixed = plan.precision.mixed not in (None, "no")
        self.sharding = sharding.kind or "none"
        self.version = sharding.version or 2
        self.world = (plan.hardware.count or 1) * (plan.hardware.nodes or 1)
        self.loss = plan.loss.kind if plan.loss is not None else "full"
        lengths = plan.batch.lengths
        self.even = lengths is None or lengths.kind == "fixed"
        checkpointing = plan.gradient_checkpointing
        self.recomputes = checkpointing is not None and checkpointing.kind != "none"
        choice = plan.optimizer
        self.optimizer = find_optimizer(choice.name) if choice is not None else None
        self.momentum = choice.momentum if choice is not None else None

    @property
    def engine_casts(self) -> bool:
        """DeepSpeed's engine casts the whole model: see :func:`ftplan.front.assembling.job_of`."""
        zero = self.sharding in _ZERO and self.stack.name != "megatron"
        return zero and (self.mixed or self.weights.name in ("bf16", "fp16"))

    @property
    def kbit_in_fp32(self) -> bool:
        """What is not quantised has been brought to fp32."""
        method = self.plan.method
        return self.quantised and method is not None and bool(method.prepare_kbit)

    @property
    def goes_around_autocast(self) -> bool:
        """The chunked loss of this task leaves out the forward that autocast encloses."""
        around = self.loss == "chunked" and self.task in self.stack.without_autocast
        return around and not self.quantised and self.sharding in ("none", "ddp")


def _of_method(*names: str) -> tuple[str, ...]:
    return tuple(f"method.{name}" for name in names)


def _of_sharding(*names: str) -> tuple[str, ...]:
    return tuple(f"sharding.{name}" for name in names)


_ZERO = ("zero1", "zero2", "zero3")
_TOKENS = ("prompt_tuning", "prefix_tuning", "p_tuning")
_INSERTED = (*_TOKENS, "houlsby", "pfeiffer", "bitfit", "llama_adapter", "llama_adapter_v2")
"""Adapters that take no target modules."""
_LORA = ("lora", "qlora", "dora")
_DROPPING = (*_LORA, "vera", "adalora", "miss", "randlora", "vblora", "pvera", "hira", "gralora",
             "psoft")  # fmt: skip
_PATTERNED = (*_LORA, "loha", "lokr", "hira", "delora")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _has_experts(config: Mapping[str, Any] | None) -> bool:
    text = (config or {}).get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    return any(bool((config or {}).get(name) or inner.get(name)) for name in _EXPERTS)


_CAST = ("precision.trained", "precision.norms", "precision.embeddings")
"""What is cast once it is loaded."""

Rule = tuple[tuple[str, ...], str, Callable[[_Job], bool]]

_RULES: tuple[Rule, ...] = (
    # --- a model that is only run ---------------------------------------------------------------
    (
        ("method", "optimizer", "gradient_checkpointing", "loss", "kernels", "reference", "rollout",
         "teacher", "precision.mixed", *_CAST, "batch.accumulation",
         "batch.padding", "batch.packing",
         "batch.lengths", "batch.eval_micro", "stack", "hardware.host_ram", "hardware.disk",
         *_of_sharding("version", "wrap", "apart", "param_dtype", "reduce_dtype",
                       "reshard_after_forward", "reshard_root", "no_sync", "use_orig_params",
                       "schedule", "virtual_stages",
                       "bucket_elements", "overlap_comm", "sub_group_elements", "bucket_bytes",
                       "auto_buckets", "prefetch_elements", "max_live_elements",
                       "persistence_elements", "sequence_parallel", "etp")),
        "nothing is trained", lambda job: not job.trains,
    ),
    (("task",), "no method says how it is trained: the model is served",
     lambda job: not job.trains and job.task not in ("serve", *TRAINING_TASKS)),
    (_of_sharding("kind", "offload", "dp_replicate"), "of a served model only tp is sized",
     lambda job: not job.trains and job.shaped),
    (("batch.images", "batch.image_size"), "a served model is sized for text",
     lambda job: not job.trains),
    # --- what is trained ------------------------------------------------------------------------
    (("precision.kv_cache", "batch.prompt_len"), "only a served model is asked for it",
     lambda job: job.trains),
    (
        _of_method("rank", "alpha", "targets", "dropout", "adapter_dtype", "modules_to_save",
                   "rank_pattern", "layers_to_transform", "target_parameters", "use_dora",
                   "fused_lora", "use_rslora", "virtual_tokens", "options", "bottleneck"),
        "no adapter is trained", lambda job: job.trains and not job.adapts,
    ),
    (_of_method("rank"), "this kind of adapter has no rank",
     lambda job: job.adapts and job.kind not in RANKS and job.kind != "oft"),
    (_of_method("alpha", "use_rslora"), "this kind of adapter has no alpha",
     lambda job: job.adapts and job.kind in ("ia3", "ln_tuning", *_INSERTED)),
    (_of_method("targets", "modules_to_save"), "this kind of adapter has no target modules",
     lambda job: job.kind in _INSERTED),
    (_of_method("layers_to_transform"), "this kind of adapter chooses no layers",
     lambda job: job.kind in (*_INSERTED, "trainable_tokens")),
    (_of_method("dropout"), "this kind of adapter has no dropout on its input",
     lambda job: job.adapts and job.kind not in _DROPPING),
    (_of_method("dropout"), "the trainer switches dropout off for this task",
     lambda job: job.adapts and job.task in job.stack.dropout_off),
    (_of_method("adapter_dtype"), "what this kind trains has a dtype of its own",
     lambda job: job.kind in (*_TOKENS, "ln_tuning", "bitfit", "c3a")),
    (_of_method("adapter_dtype", "prepare_kbit"), "DeepSpeed's engine casts the whole model",
     lambda job: job.adapts and job.engine_casts),
    (_CAST, "DeepSpeed's engine casts the whole model",
     lambda job: job.trains and job.engine_casts),
    (_CAST[1:], "they are in fp32 already",
     lambda job: job.trains and (job.weights.name == "fp32" or job.kbit_in_fp32)),
    (_of_method("virtual_tokens"), "this kind of adapter learns no tokens",
     lambda job: job.adapts and job.kind not in _TOKENS),
    (_of_method("bottleneck"), "this kind of adapter has no bottleneck",
     lambda job: job.adapts and job.kind not in ("houlsby", "pfeiffer")),
    (_of_method("rank_pattern"), "this kind of adapter has one rank",
     lambda job: job.adapts and job.kind not in _PATTERNED),
    (_of_method("use_dora", "target_parameters"), "this kind of adapter is no LoRA",
     lambda job: job.adapts and job.kind not in _LORA),
    (_of_method("target_parameters"), "this model has no experts",
     lambda job: job.adapts and job.shaped and not _has_experts(job.config)),
    (_of_method("fused_lora"), "this kind of adapter is no LoRA",
     lambda job: job.adapts and job.kind not in ("lora", "qlora")),
    (_of_method("last_layers"), "the method is not partial",
     lambda job: job.trains and job.kind != "partial"),
    (_of_method("trainable"), "the model's shape says how many parameters are trained",
     lambda job: job.trains and job.shaped),
    (_of_method("trainable"), "everything is trained",
     lambda job: job.kind == "full" and not job.shaped),
    (_of_method("double_quant", "prepare_kbit", "compute_dtype"), "the weights are not quantised",
     lambda job: job.trains and not job.quantised),
    (_of_method("double_quant"), "these weights have no blocks of NF4 or FP4",
     lambda job: job.trains and job.weights.name not in ("nf4", "fp4", "int4")),
    (("precision.mixed",), "this task's chunked loss goes around autocast",
     lambda job: job.trains and job.goes_around_autocast),
    # --- the step -------------------------------------------------------------------------------
    (("loss.chunk",), "the loss is not chunked", lambda job: job.trains and job.loss != "chunked"),
    (("loss.by",), "the loss is not fused", lambda job: job.trains and job.loss != "fused"),
    (("gradient_checkpointing.every", "gradient_checkpointing.reentrant"),
     "nothing is checkpointed", lambda job: job.trains and not job.recomputes),
    (tuple(f"batch.lengths.{name}" for name in ("mean", "deviation", "shortest", "longer")),
     "every batch is full", lambda job: job.trains and job.even),
    (("batch.image_size",), "there are no images",
     lambda job: job.trains and not job.plan.batch.images),
    (("optimizer.momentum",), "this optimizer has none",
     lambda job: job.optimizer is not None and job.optimizer.name != "sgd"),
    (("optimizer.rank",), "this optimizer projects nothing",
     lambda job: job.optimizer is not None and job.optimizer.rank is None),
    (("optimizer.state_dtype",), "this optimizer keeps no states",
     lambda job: job.optimizer is not None and not job.optimizer.states and not job.momentum),
    # --- several GPUs ---------------------------------------------------------------------------
    (_of_sharding("schedule", "virtual_stages"), "there is one stage",
     lambda job: (job.plan.sharding.pp or 1) == 1),
    (("batch.packing",), "a ring of ranks gets positions with every batch",
     lambda job: job.trains and (job.plan.sharding.cp or 1) > 1
     and job.sharding == "fsdp" and job.stack.name in RINGS),
    (_of_sharding("sequence_parallel", "etp"), "no layer is split (tp is 1)",
     lambda job: job.trains and (job.plan.sharding.tp or 1) == 1),
    (_of_sharding("etp"), "this model has no experts",
     lambda job: job.trains and job.shaped and not _has_experts(job.config)),
    (
        _of_sharding("version", "wrap", "apart", "param_dtype", "reduce_dtype",
                     "reshard_after_forward", "reshard_root", "no_sync", "use_orig_params"),
        "the sharding is not fsdp", lambda job: job.trains and job.sharding != "fsdp",
    ),
    (_of_sharding("no_sync"), "there is one micro batch in a step",
     lambda job: job.trains and (job.plan.batch.accumulation or 1) == 1),
    (_of_sharding("use_orig_params"), "only FSDP1 has flat parameters",
     lambda job: job.trains and job.version != 1),
    (_of_sharding("apart", "reshard_root"), "only FSDP2 has units like these",
     lambda job: job.trains and job.version == 1),
    (_of_sharding("bucket_elements", "auto_buckets"), "the sharding is no ZeRO",
     lambda job: job.trains and job.sharding not in _ZERO),
    (_of_sharding("overlap_comm"), "only zero1 and zero2 then hold two buckets",
     lambda job: job.trains and job.sharding not in ("zero1", "zero2")),
    (_of_sharding("sub_group_elements", "prefetch_elements", "max_live_elements",
                  "persistence_elements"),
     "the sharding is not zero3", lambda job: job.trains and job.sharding != "zero3"),
    (_of_sharding("bucket_bytes"), "DDP's buckets hold every gradient once, whatever their size",
     lambda job: job.trains),
    (_of_sharding("dp_replicate"), "only fsdp and zero3 shard within replicas",
     lambda job: (job.trains or not job.shaped) and job.sharding not in ("fsdp", "zero3")),
    # --- the card -------------------------------------------------------------------------------
    (("hardware.reserved", "budget.headroom"), "no card is named",
     lambda job: job.plan.hardware.gpu is None),
    # --- a bare parameter count -----------------------------------------------------------------
    (("hardware.host_ram", "hardware.disk"), "host memory and disk need the model's shape",
     lambda job: not job.shaped),
    (_of_sharding("kind"), "one GPU has nobody to share with",
     lambda job: not job.shaped and job.world == 1),
)  # fmt: skip
"""Keys (a section stands for all of its keys), why they do nothing, and for which jobs."""

_SUMMED = (
    "version", "model", "stack", "hardware", "budget", "precision.weights", "method.kind",
    "method.trainable", "optimizer.name", "optimizer.momentum", "optimizer.state_dtype",
    "sharding.kind", "sharding.tp", "sharding.pp", "sharding.offload", "sharding.dp_replicate",
)  # fmt: skip
"""Keys that a sum over a bare parameter count looks at; all others need the model's shape."""
_SUMMED_TASKS = (None, "serve", "sft", "pt")
_WHOLE = ("gradient_checkpointing", "loss", "rollout")
"""Sections of which every key needs the shape: they are named as one."""
_QUIET = ("method.alpha", "method.use_rslora")
"""Keys that move no memory in any job, which their users know: they scale what is learned."""

_OFF: tuple[Any, ...] = (None, False, 0, "none", "no", (), {})
"""Values that say that there is none: they ask for nothing, and are not missed."""
_SAYS_FALSE = ("sharding.reshard_after_forward",)
_NEUTRAL = {
    **dict.fromkeys(("batch.accumulation", "gradient_checkpointing.every", "sharding.tp",
                     "sharding.pp", "sharding.cp", "sharding.ep", "sharding.dp_replicate",
                     "sharding.virtual_stages"), 1),
    "stack": "transformers", "batch.lengths.kind": "fixed",
}  # fmt: skip
"""What a key says that nobody had to write: one of a degree, our own default."""


def idle_keys(
    given: Plan, filled: Plan, stack: Stack, config: Mapping[str, Any] | None
) -> dict[str, str]:
    """Keys that ``given`` says and this job has no use for, and why; ``filled``: with defaults."""
    job = _Job(filled, stack, config)
    idle: dict[str, str] = {}
    for keys, why, holds in _RULES:
        if holds(job):
            for key in keys:
                if _says(given, key):
                    idle.setdefault(key, why)
    method = given.method
    if method is not None and job.adapts:
        known = OPTIONS.get(method.kind, ())
        for name in method.options or ():
            if name not in known:
                idle[f"method.options.{name}"] = f"no setting of {method.kind} that moves memory"
    return idle


def shapeless_keys(given: Plan) -> list[str]:
    """Keys that a plan of a bare parameter count says and that need the model's shape."""
    return [
        key
        for key in _keys(given)
        if key not in _SUMMED
        and key not in _QUIET
        and _says(given, key)
        and not (key == "task" and given.task in _SUMMED_TASKS)
    ]


def _keys(given: Plan) -> Iterator[str]:
    for section in fields(given):
        value, name = getattr(given, section.name), section.name
        if name in _WHOLE or name in _SUMMED or not is_dataclass(value):
            yield name
        else:
            yield from (f"{name}.{field.name}" for field in fields(value))


def _says(plan: Plan, key: str) -> bool:
    value: Any = plan
    for step in key.split("."):
        value = getattr(value, step, None)
        if value is None:
            return False
    if value in _OFF:
        return value is False and key in _SAYS_FALSE
    return bool(_NEUTRAL.get(key) != value)


def without(plan: Plan, keys: Collection[str]) -> Plan:
    """The plan as if these keys had not been written."""
    for key in keys:
        plan = _without(plan, key.split("."))
    return plan


def _without(owner: Any, path: list[str]) -> Any:
    name, *rest = path
    if isinstance(owner, dict):
        return {key: value for key, value in owner.items() if key != name} or None
    value = getattr(owner, name)
    if rest and value is None:
        return owner
    new = _without(value, rest) if rest else type(owner).__dataclass_fields__[name].default
    return replace(owner, **{name: new})


def sentence(idle: Mapping[str, str]) -> str:
    """``optimizer, loss (nothing is trained); sharding.wrap (the sharding is not fsdp)``."""
    reasons = dict.fromkeys(idle.values())
    parts = (", ".join(key for key, why in idle.items() if why == reason) for reason in reasons)
    return "; ".join(f"{keys} ({why})" for keys, why in zip(parts, reasons, strict=True))
