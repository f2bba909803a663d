"""The ways to finetune a model that are worth comparing, as plans at sensible settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.fit.changes import Change, apply_change, merge, trainer_of
from ftplan.spec import Plan

__all__ = ["Way", "free_settings", "lean_settings", "ways_to_train"]

PLAIN_FORMATS = ("fp32", "tf32", "bf16", "fp16", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way of running a job."""

    name: str
    """`lora`; `as planned` for the plan itself."""
    sets: Mapping[str, Any]
    """What it sets, as a fragment of a plan file: laid over the plan it makes :attr:`plan`."""
    plan: Plan


_METHODS: tuple[tuple[str, Change], ...] = (
    ("full", {"method": {"kind": "full"}}),
    ("full, 8-bit Adam", {"method": {"kind": "full"}, "optimizer": "adamw_bnb_8bit"}),
    ("lora", {"method": {"kind": "lora"}}),
    ("dora", {"method": {"kind": "dora"}}),
    ("lora, int8 base", {"method": {"kind": "lora"}, "precision": {"weights": "bnb-int8"}}),
    ("qlora", {"method": {"kind": "qlora", "double_quant": True}, "precision": {"weights": "nf4"}}),
    ("last 2 blocks", {"method": {"kind": "partial", "last_layers": 2}}),
)
"""In the order in which to prefer them: everything, adapters that reach every layer, adapters on a
rounded base, the last blocks alone."""
_ADAPTER_KEYS = ("rank", "alpha", "targets", "dropout", "adapter_dtype", "modules_to_save")


def ways_to_train(plan: Plan, *, has_bf16: bool = True, is_cuda: bool = True) -> Iterator[Way]:
    """The ways of finetuning the plan's model.

    What the plan says itself (checkpointing, loss, optimizer, an adapter's rank and targets) is
    kept and not varied. What it leaves open is set as an expert would: 16-bit weights, a recomputed
    forward, Adam in one fused kernel, weights sharded over several cards. ``has_bf16``: the card
    computes in it; ``is_cuda``: bitsandbytes runs there.
    """
    if plan.method is not None:
        yield Way(name="as planned", sets={}, plan=plan)
    weights = plan.precision.weights
    is_plain = weights is None or weights in PLAIN_FORMATS
    common: dict[str, Any] = {}
    if plan.gradient_checkpointing is None:
        common["gradient_checkpointing"] = True
    many = (plan.hardware.count or 1) * (plan.hardware.nodes or 1) > 1
    if many and plan.sharding.kind is None:
        common["sharding"] = {"kind": "fsdp"}
    for name, given in _METHODS:
        sets = dict(given)
        kind = given["method"]["kind"]
        adapter = kind not in ("full", "partial")
        if not is_cuda and ("8-bit" in name or "int8" in name or kind == "qlora"):
            continue
        if "optimizer" in sets and (plan.optimizer is not None or "sharding" in common):
            continue  # bitsandbytes' optimizers do not step FSDP2's sharded tensors
        if plan.optimizer is None and "optimizer" not in sets:
            sets["optimizer"] = "adamw_torch_fused"
        if adapter and plan.method is not None:
            kept = {k: v for k in _ADAPTER_KEYS if (v := getattr(plan.method, k)) is not None}
            sets["method"] = {**kept, **sets["method"]}
        stored = sets.get("precision", {}).get("weights")
        if not is_plain:  # the user's own format is the base that adapters are put on
            if kind != "qlora" and (not adapter or stored):
                continue
            if kind != "qlora":
                continue
            sets["precision"] = {"weights": weights}
        elif stored is None:
            sets["precision"] = _plain(weights, adapter, has_bf16)
        sets = dict(merge(sets, common))
        if kind == "partial" and "gradient_checkpointing" in sets:
            # frozen blocks keep next to nothing, and would be run again all the same
            sets["gradient_checkpointing"] = False
        if not sets["precision"]:
            del sets["precision"]
        fresh = apply_change(plan, {"method": None})
        yield Way(name=name, sets=sets, plan=apply_change(fresh, sets))


_FUSED: Change = {"loss": "fused"}
_OWN_KERNELS = ("unsloth", "litgpt", "nemo", "megatron")
"""Stacks whose loss and kernels are not to be chosen."""
_LIGER: Change = {"loss": "fused", "kernels": "liger"}


def _losses(plan: Plan) -> tuple[Change, ...]:
    """How to meet the logits, and run norms and gates, with the same result: as the plan lets."""
    if plan.loss is not None:
        return ({},)
    if plan.stack == "torchtune-0.1" or trainer_of(plan) in _OWN_KERNELS:
        return ({},)
    if trainer_of(plan) == "torchtune":
        return ({}, {"loss": "chunked"})
    return ({}, _FUSED) if plan.kernels is not None else ({}, _FUSED, _LIGER)


def lean_settings(plan: Plan, way: Way) -> tuple[Change, ...]:
    """Changes to a way that lose nothing and need less memory, the plainest first."""
    return ({},) if not way.sets else _losses(plan)


def free_settings(plan: Plan, way: Way) -> tuple[Change, ...]:
    """All settings of a way that lose nothing: they differ in memory and in time alone."""
    again: tuple[Change, ...] = ({"gradient_checkpointing": False},)
    if plan.gradient_checkpointing is not None:
        again = ({},)
    elif way.sets.get("gradient_checkpointing") is not False:  # not for the last blocks alone
        again = (*again, {"gradient_checkpointing": True})
    return tuple(merge(first, second) for first in again for second in _losses(plan))


def _plain(weights: str | None, adapter: bool, has_bf16: bool) -> dict[str, Any]:
    """Storage of a base that is not quantised, where the plan leaves it open."""
    if weights is not None:
        return {}
    if has_bf16:
        return {"weights": "bf16"}
    return {"weights": "fp16"} if adapter else {"weights": "fp32", "mixed": "fp16"}
