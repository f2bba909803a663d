"""Settings of a plan that waste memory, contradict each other or do nothing: the CFG findings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ftplan.errors import Location
from ftplan.report import Finding, Severity
from ftplan.spec import Plan
from ftplan.trainers.severity import SEVERITY

if TYPE_CHECKING:  # a plan of flags alone needs no reader
    from ftplan.trainers.draft import Draft

__all__ = ["lint_draft", "lint_plan"]

LONG_TOKENS = 8192
"""Tokens of a micro batch from which activations without checkpointing dominate."""
EAGER_TOKENS = 2048
"""Sequence length from which eager attention's square is large."""


def lint_draft(plan: Plan, draft: Draft) -> None:
    """Add to a draft what :func:`lint_plan` says about its plan, at the file's own places."""
    draft.findings += lint_plan(plan, where=draft.places.get)


def lint_plan(
    plan: Plan, *, where: Callable[[str], Location | None] = lambda _key: None
) -> tuple[Finding, ...]:
    """CFG findings that a plan alone shows; ``where`` gives the place of a plan key."""
    found: list[Finding] = []

    def add(code: str, message: str, key: str, help: str, severity: Severity | None = None) -> None:
        found.append(
            Finding(
                code=code,
                severity=severity or SEVERITY[code],
                message=message,
                location=where(key),
                help=help,
            )
        )

    method = plan.method
    if method is None or plan.task == "serve":
        return ()
    checkpointing = plan.gradient_checkpointing
    off = checkpointing is not None and checkpointing.kind == "none"
    seq = plan.batch.seq_len or 0
    tokens = seq * (plan.batch.micro or 1)
    if off and tokens >= LONG_TOKENS:
        add(
            "CFG002",
            f"gradient checkpointing is off with {tokens:,} tokens a micro batch: every "
            f"block keeps "
            "its activations",
            "gradient_checkpointing.kind",
            "switch gradient checkpointing on",
        )
    if plan.attention == "eager" and seq > EAGER_TOKENS:
        add(
            "CFG003",
            f"eager attention keeps {seq:,} x {seq:,} values for every head of a block",
            "attention",
            "use sdpa or flash attention",
        )
    weights = plan.precision.weights
    if weights == "fp32" and plan.stack != "llamafactory" and plan.sharding.param_dtype is None:
        add(
            "CFG004",
            "the base weights are held in fp32: twice the bytes of bf16",
            "precision.weights",
            "set the dtype to bfloat16",
            "warning" if method.kind not in ("full", "partial") else "info",
        )
    gpus = (plan.hardware.count or 0) * (plan.hardware.nodes or 1)
    if gpus == 1 and plan.sharding.kind in ("zero1", "zero2", "zero3", "fsdp"):
        offload = plan.sharding.offload not in (None, "none")
        if not offload:
            add(
                "CFG010",
                f"{plan.sharding.kind} on one GPU shards nothing and adds buffers",
                "sharding.kind",
                "leave it out, use more GPUs, or offload",
            )
    if method.modules_to_save and any(
        name.rsplit(".", 1)[-1] in ("embed_tokens", "lm_head", "wte", "output")
        for name in method.modules_to_save
    ):
        add(
            "CFG013",
            "the embedding or the head is trained in full beside the adapter: a copy of it with "
            "gradients and optimizer states",
            "method.modules_to_save",
            "leave it out unless tokens were added",
        )
    if plan.reference == "model" and method.kind not in ("full", "partial"):
        add(
            "CFG014",
            "a second model is held as reference although an adapter is trained",
            "reference",
            "leave the reference model out: the base with its adapter switched off is the same",
        )
    quantised = weights in ("nf4", "fp4", "int8", "int4", "gptq-int4", "awq-int4", "mxfp4")
    if quantised and method.kind in ("full", "partial"):
        add(
            "CFG006",
            f"weights in {weights} cannot be trained in full",
            "precision.weights",
            "train an adapter (qlora), or load the weights in bf16",
        )
    if plan.sharding.kind == "ddp" and method.kind == "full" and gpus > 1 and not quantised:
        add(
            "CFG012",
            "data parallel keeps weights, gradients and optimizer states whole on every GPU",
            "sharding.kind",
            "fsdp or zero2 would share them",
        )
    return tuple(found)
