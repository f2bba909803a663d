"""The ways to finetune a model that are worth comparing, as plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ftplan.spec import Checkpointing, Loss, Method, OptimizerChoice, Plan

__all__ = ["Way", "ways_to_train"]

PLAIN_FORMATS = ("fp32", "tf32", "bf16", "fp16", "float32", "bfloat16", "float16")
EIGHT_BIT = "adamw_bnb_8bit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way of running a job."""

    name: str
    """`lora, checkpointed`; `as planned` for the plan itself."""
    sets: Mapping[str, Any]
    """What it sets, as a fragment of a plan file."""
    plan: Plan


def ways_to_train(plan: Plan) -> Iterator[Way]:
    """The ways of finetuning the plan's model, in the order in which to prefer them: everything,
    adapters that reach every layer, adapters on a rounded base, the last blocks alone.

    What the plan says itself (checkpointing, loss, optimizer) is kept and not varied.
    """
    if plan.method is not None:
        yield Way(name="as planned", sets={}, plan=plan)
    weights = plan.precision.weights
    is_plain = weights is None or weights in PLAIN_FORMATS
    plain = weights if is_plain else None
    for method, name, stored in (
        (Method(kind="full"), "full", plain),
        (Method(kind="lora"), "lora", plain),
        (Method(kind="qlora"), "qlora", "nf4" if is_plain else weights),
        (Method(kind="partial", last_layers=2), "last 2 blocks", plain),
    ):
        sets: dict[str, Any] = {"method": {"kind": method.kind}}
        if method.last_layers is not None:
            sets["method"]["last_layers"] = method.last_layers
        if stored != weights:
            sets["precision"] = {"weights": stored}
        changed = replace(plan, method=method, precision=replace(plan.precision, weights=stored))
        yield from _variants(Way(name=name, sets=sets, plan=changed))


def _variants(way: Way) -> Iterator[Way]:
    """Without and with checkpointing; then with a loss that never holds all logits; for full
    finetuning also with an 8-bit optimizer. Only what the plan leaves open."""
    if way.plan.gradient_checkpointing is None:
        yield _with(way, "", {"gradient_checkpointing": False}, Checkpointing(kind="none"))
        way = _with(way, ", checkpointed", {"gradient_checkpointing": True}, Checkpointing())
    yield way
    if way.plan.loss is not None:
        return
    way = Way(
        name=f"{way.name}, chunked loss",
        sets={**way.sets, "loss": "chunked"},
        plan=replace(way.plan, loss=Loss(kind="chunked")),
    )
    yield way
    is_full = way.plan.method is not None and way.plan.method.kind == "full"
    if is_full and way.plan.optimizer is None:
        yield Way(
            name=f"{way.name}, 8-bit Adam",
            sets={**way.sets, "optimizer": EIGHT_BIT},
            plan=replace(way.plan, optimizer=OptimizerChoice(name=EIGHT_BIT)),
        )


def _with(way: Way, label: str, sets: Mapping[str, Any], checkpointing: Checkpointing) -> Way:
    return Way(
        name=way.name + label,
        sets={**way.sets, **sets},
        plan=replace(way.plan, gradient_checkpointing=checkpointing),
    )
