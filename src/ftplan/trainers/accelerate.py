"""accelerate's YAML: an overlay that says how many processes run and how they share the job.

Keys read from huggingface/accelerate src/accelerate/commands/config/config_args.py and
src/accelerate/utils/dataclasses.py, 1.x. The FSDP part is shared with every trainer that hands
``fsdp_config`` on to accelerate.
"""

from __future__ import annotations

from typing import Any, Protocol

from ftplan.errors import UnsupportedError
from ftplan.files.document import Document, Key
from ftplan.spec import Plan
from ftplan.trainers import deepspeed
from ftplan.trainers.draft import Draft
from ftplan.trainers.keys import Keys

__all__ = ["NAME", "apply", "apply_fsdp", "export", "matches"]

NAME = "accelerate"


class Reads(Protocol):
    """Reads a file that a configuration names (its name, and where it is named)."""

    def __call__(self, name: str, keys: Keys, *path: Key) -> Document | None: ...


def matches(data: dict[str, Any]) -> bool:
    """Whether a mapping is an accelerate configuration."""
    return "distributed_type" in data or "compute_environment" in data


def apply(draft: Draft, keys: Keys, reads: Reads) -> None:
    """Take processes, precision and sharding from an accelerate configuration."""
    draft.keys(keys)
    processes(draft, keys)
    precision(draft, keys, ("mixed_precision",))
    kind = (keys.word("distributed_type") or "no").upper()
    at = keys.at("distributed_type")
    if kind == "NO":
        draft.put("sharding.kind", "none", at)
    elif kind in ("MULTI_GPU", "MULTI_NPU", "MULTI_XPU"):
        draft.put("sharding.kind", "ddp", at)
    elif kind == "FSDP":
        apply_fsdp(draft, keys, ("fsdp_config",))
    elif kind == "DEEPSPEED":
        _deepspeed(draft, keys, ("deepspeed_config",), reads)
    elif kind == "TP":
        draft.put("sharding.tp", keys.count("tp_config", "tp_size"), at)
    else:
        draft.find("IMP002", f"distributed_type {kind} is not modelled", at)
    _parallelism(draft, keys)


def processes(draft: Draft, keys: Keys, base: tuple[Key, ...] = ()) -> None:
    """GPUs per node and nodes from ``num_processes`` and ``num_machines``."""
    machines = keys.count(*base, "num_machines") or 1
    total = keys.count(*base, "num_processes")
    if machines > 1:
        draft.put("hardware.nodes", machines, keys.at(*base, "num_machines"))
    if total is None:
        return
    at = keys.at(*base, "num_processes")
    per_node = max(total // machines, 1)
    given = draft.get("hardware.count")
    if given is not None and given != per_node:
        draft.find(
            "IMP009", f"{per_node} GPUs a node here, {given} elsewhere; {per_node} are taken", at
        )
    draft.put("hardware.count", per_node, at)


def precision(draft: Draft, keys: Keys, path: tuple[Key, ...]) -> None:
    """Autocast from ``mixed_precision``, when the trainer's own file asks for none."""
    mixed = keys.word(*path)
    if mixed in ("bf16", "fp16") and draft.get("precision.mixed") in (None, "no"):
        draft.put("precision.mixed", mixed, keys.at(*path))
    elif mixed == "fp8":
        draft.not_modelled(keys, path, "fp8 matmuls keep extra copies and scales")


def _parallelism(draft: Draft, keys: Keys) -> None:
    for name, plan_key in (
        ("tp_size", "sharding.tp"),
        ("cp_size", "sharding.cp"),
        ("sp_size", "sharding.cp"),
        ("dp_replicate_size", "sharding.dp_replicate"),
    ):
        path = ("parallelism_config", f"parallelism_config_{name}")
        degree = keys.count(*path)
        if degree is not None and degree > 1:
            draft.put(plan_key, degree, keys.at(*path))
    shard = keys.count("parallelism_config", "parallelism_config_dp_shard_size")
    if shard is not None and shard > 1 and draft.get("sharding.kind") in (None, "none", "ddp"):
        draft.put("sharding.kind", "fsdp", keys.at("parallelism_config"))


def _deepspeed(draft: Draft, keys: Keys, base: tuple[Key, ...], reads: Reads) -> None:
    path = (*base, "deepspeed_config_file")
    named = keys.text(*path)
    if named is not None:
        document = reads(named, keys, *path)
        if document is not None:
            deepspeed.apply(draft, Keys(document))
        return
    stage = keys.whole(*base, "zero_stage")
    draft.put(
        "sharding.kind",
        deepspeed.STAGES.get(2 if stage is None else stage, "zero2"),
        keys.at(*base, "zero_stage"),
    )
    optimizer = keys.word(*base, "offload_optimizer_device")
    params = keys.word(*base, "offload_param_device")
    where = deepspeed.offloaded(draft.get("sharding.kind"), optimizer, params)
    if where is not None:
        key = "offload_optimizer_device" if where == "optimizer" else "offload_param_device"
        draft.put("sharding.offload", where, keys.at(*base, key))
    steps = keys.count(*base, "gradient_accumulation_steps")
    if steps is not None and draft.get("batch.accumulation") is None:
        draft.put("batch.accumulation", steps, keys.at(*base, "gradient_accumulation_steps"))


_STRATEGIES: dict[str, bool | None] = {
    "FULL_SHARD": True, "1": True, "SHARD_GRAD_OP": False, "2": False, "NO_SHARD": None, "3": None,
    "HYBRID_SHARD": True, "4": True, "HYBRID_SHARD_ZERO2": False, "_HYBRID_SHARD_ZERO2": False,
    "5": False,
}  # fmt: skip


def apply_fsdp(
    draft: Draft, keys: Keys, base: tuple[Key, ...], options: tuple[str, ...] = ()
) -> None:
    """Take FSDP's settings from a section whose keys may or may not begin with ``fsdp_``.

    ``options`` are the words of transformers' older ``fsdp: full_shard auto_wrap offload``.
    """

    def path(name: str) -> tuple[Key, ...]:
        prefixed = (*base, f"fsdp_{name}")
        return prefixed if keys.has(*prefixed) else (*base, name)

    options = tuple(option.lower() for option in options)
    draft.put("sharding.kind", "fsdp", keys.at(*base))
    version = keys.whole(*path("version")) or keys.whole("fsdp_version")
    if version in (1, 2):
        draft.put("sharding.version", version, keys.at(*path("version")))
    strategy = keys.text(*path("sharding_strategy"))
    reshard = keys.text(*path("reshard_after_forward"))
    known: bool | None = True
    if strategy is not None and strategy.upper() in _STRATEGIES:
        known = _STRATEGIES[strategy.upper()]
        if "HYBRID" in strategy.upper() or strategy in ("4", "5"):
            nodes = draft.get("hardware.nodes")
            draft.put("sharding.dp_replicate", nodes, keys.at(*path("sharding_strategy")))
    if "shard_grad_op" in options:
        known = False
    if "no_shard" in options:
        known = None
    if reshard is not None:
        known = _STRATEGIES.get(reshard.upper(), reshard.lower() in ("true", "yes", "1"))
        draft.put("sharding.reshard_after_forward", known, keys.at(*path("reshard_after_forward")))
    elif strategy is not None:
        draft.put("sharding.reshard_after_forward", known, keys.at(*path("sharding_strategy")))
    if known is None:
        draft.put("sharding.kind", "ddp", keys.at(*path("sharding_strategy")))
        draft.drop("sharding.version")
        return
    if keys.flag(*path("offload_params")) or "offload" in options:
        draft.put("sharding.offload", "params", keys.at(*path("offload_params")))
    wrap = (keys.word(*path("auto_wrap_policy")) or "").upper()
    if "TRANSFORMER" in wrap or keys.has(*path("transformer_layer_cls_to_wrap")):
        draft.put("sharding.wrap", "block", keys.at(*path("auto_wrap_policy")))
    elif wrap == "NO_WRAP":
        draft.put("sharding.wrap", "model", keys.at(*path("auto_wrap_policy")))
    original = keys.flag(*path("use_orig_params"))
    if draft.get("sharding.version") != 2:
        draft.put("sharding.use_orig_params", original, keys.at(*path("use_orig_params")))
    if keys.flag(*path("activation_checkpointing")):
        if draft.get("gradient_checkpointing.kind") not in (None, "none"):
            draft.find(
                "CFG009",
                "gradient checkpointing is asked for twice: by the trainer and by FSDP",
                keys.at(*path("activation_checkpointing")),
                help="keep activation_checkpointing in fsdp_config and switch the trainer's off",
            )
        draft.put("gradient_checkpointing.kind", "full", keys.at(*path("activation_checkpointing")))
        draft.put("gradient_checkpointing.reentrant", False)
    keys.text(*path("transformer_layer_cls_to_wrap"))


def apply_launch(draft: Draft, keys: Keys, base: tuple[Key, ...], reads: Reads) -> None:
    """The same facts from the flags of ``accelerate launch``."""
    named = keys.text(*base, "config_file")
    if named is not None:
        document = reads(named, keys, *base, "config_file")
        if document is not None:
            apply(draft, Keys(document), reads)
    processes(draft, keys, base)
    precision(draft, keys, (*base, "mixed_precision"))
    if keys.flag(*base, "use_fsdp"):
        apply_fsdp(draft, keys, base)
    if keys.flag(*base, "use_deepspeed") or keys.has(*base, "zero_stage"):
        _deepspeed(draft, keys, base, reads)
    if keys.flag(*base, "multi_gpu"):
        draft.put("sharding.kind", draft.get("sharding.kind") or "ddp", keys.at(*base, "multi_gpu"))


def export(plan: Plan) -> str:
    """The plan's processes and sharding as an accelerate configuration.

    Raises :class:`UnsupportedError` for what accelerate has no key for.
    """
    sharding = plan.sharding
    per_node = plan.hardware.count or 1
    nodes = plan.hardware.nodes or 1
    lines = [
        "compute_environment: LOCAL_MACHINE",
        f"num_machines: {nodes}",
        f"num_processes: {per_node * nodes}",
        f"mixed_precision: '{plan.precision.mixed or 'no'}'",
    ]
    kind = sharding.kind or ("ddp" if per_node * nodes > 1 else "none")
    if (sharding.pp and sharding.pp > 1) or (sharding.ep and sharding.ep > 1):
        raise UnsupportedError("pipeline or expert parallelism in an accelerate file")
    if kind in ("none", "ddp"):
        lines.append(f"distributed_type: {'MULTI_GPU' if kind == 'ddp' else 'NO'}")
    elif kind == "fsdp":
        lines += ["distributed_type: FSDP", *_fsdp_lines(plan)]
    else:
        lines += ["distributed_type: DEEPSPEED", "deepspeed_config:"]
        if sharding.bucket_elements or sharding.prefetch_elements or sharding.max_live_elements:
            raise UnsupportedError(
                "DeepSpeed bucket sizes in an accelerate file",
                remedy="export to deepspeed and name that file as deepspeed_config_file",
            )
        offload = sharding.offload
        device = "nvme" if offload == "nvme" else "cpu"
        optimizer = device if offload in ("optimizer", "params", "nvme") else "none"
        lines += [
            f"  zero_stage: {kind.removeprefix('zero')}",
            f"  offload_optimizer_device: {optimizer}",
            f"  offload_param_device: {device if offload in ('params', 'nvme') else 'none'}",
        ]
    degrees = {"tp": sharding.tp, "cp": sharding.cp, "dp_replicate": sharding.dp_replicate}
    if any(degree and degree > 1 for degree in degrees.values()):
        lines.append("parallelism_config:")
        lines += [
            f"  parallelism_config_{name}_size: {degree}"
            for name, degree in degrees.items()
            if degree and degree > 1
        ]
    return "\n".join(lines) + "\n"


def _fsdp_lines(plan: Plan) -> list[str]:
    sharding = plan.sharding
    version = sharding.version or 2
    lines = ["fsdp_config:", f"  fsdp_version: {version}"]
    reshard = True if sharding.reshard_after_forward is None else sharding.reshard_after_forward
    if version == 2:
        lines.append(f"  fsdp_reshard_after_forward: {str(reshard).lower()}")
    else:
        lines.append(f"  fsdp_sharding_strategy: {'FULL_SHARD' if reshard else 'SHARD_GRAD_OP'}")
        if sharding.use_orig_params is not None:
            lines.append(f"  fsdp_use_orig_params: {str(sharding.use_orig_params).lower()}")
    offload = sharding.offload == "params"
    lines.append(f"  fsdp_offload_params: {str(offload).lower()}")
    policy = "NO_WRAP" if sharding.wrap == "model" else "TRANSFORMER_BASED_WRAP"
    lines.append(f"  fsdp_auto_wrap_policy: {policy}")
    return lines
