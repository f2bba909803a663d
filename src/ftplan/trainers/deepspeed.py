"""DeepSpeed's JSON: an overlay that trainers' files name, and an export.

Keys read from the DeepSpeed configuration reference (deepspeed.ai/docs/config-json) and from
huggingface/transformers src/transformers/integrations/deepspeed.py, 5.23.0, which resolves the
values called ``auto``: bucket sizes become the square of the hidden size.
"""

from __future__ import annotations

import json
from typing import Any

from ftplan.errors import UnsupportedError
from ftplan.spec import Plan
from ftplan.trainers.draft import Draft
from ftplan.trainers.keys import Keys
from ftplan.trainers.words import optimizer_name

__all__ = ["NAME", "apply", "export", "matches"]

NAME = "deepspeed"

STAGES = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}


def matches(data: dict[str, Any]) -> bool:
    """Whether a mapping is a DeepSpeed configuration."""
    return "zero_optimization" in data or "train_micro_batch_size_per_gpu" in data


def apply(draft: Draft, keys: Keys) -> None:
    """Take sharding, offload, buckets and precision from a DeepSpeed configuration."""
    draft.keys(keys)
    zero = ("zero_optimization",)
    stage = keys.whole(*zero, "stage")
    if stage is not None and stage not in STAGES:
        raise keys.error(
            f"ZeRO stage {stage} does not exist", *zero, "stage", remedy="write 0, 1, 2 or 3"
        )
    stage_known = 0 if stage is None else stage
    draft.put("sharding.kind", STAGES[stage_known], keys.at(*zero, "stage"))
    _offload(draft, keys)
    _buckets(draft, keys, stage_known)
    _precision(draft, keys)
    for key, plan_key in (
        ("train_micro_batch_size_per_gpu", "batch.micro"),
        ("gradient_accumulation_steps", "batch.accumulation"),
    ):
        value = keys.count(key)
        given = draft.get(plan_key)
        if value is not None and given is not None and value != given:
            draft.find(
                "CFG007",
                f"{key} is {value} here and {given} in the trainer's file",
                keys.at(key),
                help="give both the same value, or write auto here",
            )
        elif value is not None:
            draft.put(plan_key, value, keys.at(key))
    name, known = optimizer_name(keys.text("optimizer", "type"))
    keys.mapping("optimizer")
    if name is not None:
        draft.put("optimizer.name", name, keys.at("optimizer", "type"))
        if not known:
            draft.find("IMP005", f"the optimizer {name} is not known", keys.at("optimizer", "type"))
    tp = keys.count("tensor_parallel", "autotp_size")
    if tp is not None and tp > 1:
        draft.put("sharding.tp", tp, keys.at("tensor_parallel", "autotp_size"))
    cp = keys.count("sequence_parallel_size")
    if cp is not None and cp > 1:
        draft.put("sharding.cp", cp, keys.at("sequence_parallel_size"))


def _offload(draft: Draft, keys: Keys) -> None:
    zero = "zero_optimization"
    optimizer = keys.word(zero, "offload_optimizer", "device")
    params = keys.word(zero, "offload_param", "device")
    legacy = keys.flag(zero, "cpu_offload"), keys.flag(zero, "cpu_offload_params")
    keys.mapping(zero, "offload_optimizer")
    keys.mapping(zero, "offload_param")
    where = offloaded(
        draft.get("sharding.kind"),
        optimizer or ("cpu" if legacy[0] else None),
        params or ("cpu" if legacy[1] else None),
    )
    if where is not None:
        key = "offload_param" if params not in (None, "none") else "offload_optimizer"
        draft.put("sharding.offload", where, keys.at(zero, key))


def offloaded(kind: str | None, optimizer: str | None, params: str | None) -> str | None:
    """What a plan calls the two devices; weights, and the disk, are stage 3's alone.

    Stages 1 and 2 take any device of the optimizer's for the host, and read none of the weights'
    (deepspeed/runtime/zero/stage_1_and_2.py 0.19.8).
    """
    devices = [None if device == "none" else device for device in (optimizer, params)]
    if kind != "zero3":
        return "optimizer" if devices[0] and kind is not None else None
    if "nvme" in devices:
        return "nvme"
    return "params" if devices[1] else "optimizer" if devices[0] else None


def _buckets(draft: Draft, keys: Keys, stage: int) -> None:
    zero = "zero_optimization"
    auto = False
    for names, plan_key in (
        (("reduce_bucket_size",), "bucket_elements"),
        (("stage3_prefetch_bucket_size", "prefetch_bucket_size"), "prefetch_elements"),
        (("stage3_max_live_parameters", "max_live_parameters"), "max_live_elements"),
        (("sub_group_size",), "sub_group_elements"),
        (
            ("stage3_param_persistence_threshold", "param_persistence_threshold"),
            "persistence_elements",
        ),
    ):
        for name in names:
            auto |= keys.word(zero, name) == "auto"
            value = keys.whole(zero, name)
            if value is not None and (stage >= 3 or plan_key == "bucket_elements") and stage >= 1:
                draft.put(f"sharding.{plan_key}", value, keys.at(zero, name))
    overlap = keys.flag(zero, "overlap_comm")
    if overlap is not None and stage >= 1:
        draft.put("sharding.overlap_comm", overlap, keys.at(zero, "overlap_comm"))
    if auto and stage >= 1:
        draft.put("sharding.auto_buckets", True, keys.at(zero, "reduce_bucket_size"))


def _precision(draft: Draft, keys: Keys) -> None:
    for name in ("bf16", "fp16"):
        if keys.word(name, "enabled") == "auto":
            continue
        if keys.flag(name, "enabled") and draft.get("precision.mixed") in (None, "no"):
            draft.put("precision.mixed", name, keys.at(name, "enabled"))


def export(plan: Plan) -> str:
    """The plan's sharding as a DeepSpeed file for transformers, axolotl or LLaMA-Factory.

    Raises :class:`UnsupportedError` for a plan that is not sharded by DeepSpeed.
    """
    stages = {kind: stage for stage, kind in STAGES.items()}
    kind = plan.sharding.kind
    if kind not in stages:
        raise UnsupportedError(
            f"sharding {kind or 'none'} in a DeepSpeed file",
            remedy="export to accelerate, or plan sharding: {kind: zero1 | zero2 | zero3}",
        )
    stage = stages[kind]
    sharding = plan.sharding
    auto = sharding.auto_buckets
    zero: dict[str, Any] = {"stage": stage}
    offload = sharding.offload
    device = "nvme" if offload == "nvme" else "cpu"
    if offload in ("optimizer", "params", "nvme"):
        zero["offload_optimizer"] = {"device": device, "pin_memory": True}
    if offload in ("params", "nvme"):
        zero["offload_param"] = {"device": device, "pin_memory": True}
    sizes = {
        "reduce_bucket_size": sharding.bucket_elements,
        "stage3_prefetch_bucket_size": sharding.prefetch_elements,
        "stage3_max_live_parameters": sharding.max_live_elements,
        "stage3_param_persistence_threshold": sharding.persistence_elements,
        "sub_group_size": sharding.sub_group_elements,
    }
    for name, size in sizes.items():
        if size is not None:
            zero[name] = size
        elif auto and (
            name == "reduce_bucket_size" or (stage == 3 and "stage3" in name and "live" not in name)
        ):
            zero[name] = "auto"
    if sharding.overlap_comm is not None:
        zero["overlap_comm"] = sharding.overlap_comm
    document: dict[str, Any] = {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
    }
    if sharding.tp and sharding.tp > 1:
        document["tensor_parallel"] = {"autotp_size": sharding.tp}
    return json.dumps(document, indent=2) + "\n"
