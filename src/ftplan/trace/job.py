"""The plan as the annex needs it: every choice made, nothing left to a default further down."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from ftplan.adapting import RANKS
from ftplan.catalog.stacks import find_stack
from ftplan.dataclass import dataclass
from ftplan.errors import UnsupportedError
from ftplan.memory.families.native import TASKS
from ftplan.spec import Plan, Sharding

__all__ = ["HF_STACKS", "Job", "plan_from", "resolve"]

QUANTIZED = ("nf4", "fp4", "int8", "int4")
_FLOATS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_FP16_ONLY_GPUS = {"t4": (7, 5), "v100": (7, 0), "p100": (6, 0), "rtx-20": (7, 5), "titan": (7, 5)}
_CAPABILITIES = {
    "a100": (8, 0), "a30": (8, 0), "a800": (8, 0), "h100": (9, 0), "h200": (9, 0), "h20": (9, 0),
    "gh200": (9, 0), "h800": (9, 0), "b200": (10, 0), "gb200": (10, 0), "b300": (10, 0),
    "a10": (8, 6), "a40": (8, 6), "a16": (8, 6), "a2": (8, 6), "rtx-30": (8, 6), "rtx-a": (8, 6),
    "l4": (8, 9), "l40": (8, 9), "rtx-40": (8, 9), "rtx-50": (12, 0),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One finetuning job, resolved. Names of dtypes are torch's (``bfloat16``)."""

    stack: str
    task: str
    method: str
    rank: int
    alpha: int
    targets: tuple[str, ...] | str
    dropout: float
    adapter_dtype: str
    """``fp32`` or ``bf16`` (the base's dtype)."""
    modules_to_save: tuple[str, ...]
    rank_pattern: dict[str, int]
    layers_to_transform: tuple[int, ...]
    target_parameters: tuple[str, ...]
    use_dora: bool
    use_rslora: bool
    double_quant: bool
    prepare_kbit: bool
    compute_dtype: str
    last_layers: int
    virtual_tokens: int
    options: dict[str, Any]
    weights: str
    """Storage of the base weights: a float dtype of torch, or a quantised format's name."""
    mixed: str
    """``no``, ``bfloat16`` or ``float16``."""
    micro: int
    seq_len: int
    accumulation: int
    images: int
    image_size: tuple[int, int]
    padding: str
    optimizer: str
    implementation: str
    momentum: float
    checkpointing: str
    every: int
    reentrant: bool
    attention: str
    loss: str
    chunk: int
    kernels: str
    capability: tuple[int, int]
    reference: str
    world: int
    sharding: str
    fsdp_version: int
    wrap: str
    apart: tuple[str, ...]
    reshard_root: bool
    param_dtype: str
    reduce_dtype: str
    reshard_after_forward: bool
    offload: str
    dp_replicate: int
    no_sync: bool
    use_orig_params: bool
    tp: int
    cp: int
    ep: int
    zero: dict[str, Any]
    """DeepSpeed's ``zero_optimization``."""
    eval_micro: int = 0
    """Sequences of a batch that is evaluated after the second step; 0: none is."""
    traced_rank: int = 0
    """ZeRO-1 and 2: 1 stands for the rank that owns the most gradients, but for the first."""

    @property
    def quantized(self) -> bool:
        """The base weights are stored in a 4- or 8-bit format."""
        return self.weights in QUANTIZED


def _capability(gpu: str | None) -> tuple[int, int]:
    """Compute capability by the card's name; Ampere where no card is named."""
    if gpu is None:
        return (8, 0)
    best = ""
    table = {**_CAPABILITIES, **_FP16_ONLY_GPUS}
    for name in table:
        if re.match(rf"{re.escape(name)}", gpu) and len(name) > len(best):
            best = name
    return table.get(best, (8, 0))


HF_STACKS = ("transformers", "pytorch", "trl", "axolotl", "llamafactory", "ms-swift")
"""Stacks that run transformers' own model code, which is what a trace runs."""

OWN_LOOPS = ("litgpt", "torchtune")
"""Stacks whose own model and loop a plan is traced in (:mod:`ftplan.trace.native`)."""


def _refuse(plan: Plan) -> None:
    """Name what the plan asks for and a trace cannot run."""
    sharding, choice = plan.sharding, plan.optimizer
    stack = plan.stack or "transformers"
    if stack not in HF_STACKS and stack.partition("-")[0] not in OWN_LOOPS:
        raise UnsupportedError(
            f"tracing the stack {stack!r}, whose model code is its own,",
            remedy=f"trace one of {', '.join(HF_STACKS + OWN_LOOPS)}",
        )
    if find_stack(stack).modules and _beyond_its_loop(plan):
        raise UnsupportedError(
            f"tracing {stack} but for supervised finetuning on one GPU, or with its own FSDP,",
            remedy="trace the task sft without other sharding, images, padding or packing",
        )
    ring = (sharding.cp or 1) > 1
    if ring and (sharding.kind != "fsdp" or (sharding.version or 2) != 2 or (sharding.tp or 1) > 1):
        raise UnsupportedError(
            "tracing a ring of ranks but with FSDP2, as accelerate has it",
            remedy="set sharding: {kind: fsdp, version: 2}",
        )
    if (sharding.pp or 1) > 1:
        raise UnsupportedError("tracing sharding.pp", remedy="leave it at 1")
    if (sharding.ep or 1) > 1 and (ring or sharding.kind not in (None, "none", "fsdp")):
        raise UnsupportedError(
            f"tracing expert parallelism with {sharding.kind}",
            remedy="set sharding.kind: fsdp, or none for one batch of all ranks",
        )
    if (sharding.tp or 1) > 1 and sharding.kind not in (None, "none"):
        raise UnsupportedError(
            f"tracing tensor parallelism with {sharding.kind}", remedy="trace one of them"
        )
    offload = sharding.offload or "none"
    fsdp2 = sharding.kind == "fsdp" and (sharding.version or 2) == 2
    kinds = {"zero2": ("optimizer",), "zero3": ("optimizer", "params")}
    able = ("params",) if fsdp2 else kinds.get(str(sharding.kind), ())
    if offload not in ("none", *able):
        raise UnsupportedError(f"tracing offload of {offload}", remedy="trace offload: none")
    if (plan.kernels or "none") != "none":
        raise UnsupportedError(
            f"tracing {plan.kernels} kernels, which run on a GPU only,",
            remedy="trace with kernels: none",
        )
    if choice is not None and (choice.in_backward or choice.state_dtype):
        raise UnsupportedError(
            "tracing an optimizer that steps in backward or stores its states in another dtype"
        )


def _beyond_its_loop(plan: Plan) -> bool:
    """Whether a job asks for more than the walked loop of a trainer with modules of its own."""
    sharding, batch = plan.sharding, plan.batch
    version = {"torchtune": 2, "litgpt": 1}.get((plan.stack or "").partition("-")[0])
    shards = sharding.kind == "fsdp" and sharding.version == version
    shards = shards and sharding.offload in (None, "none")
    sharded = sharding.kind not in (None, "none") and not shards
    split = (sharding.tp or 1) > 1
    other = batch.images or batch.packing or (batch.padding or "none") != "none"
    return bool(sharded or split or other or plan.task not in (None, *TASKS))


_IMPLEMENTATIONS = {
    "adamw_torch_fused": ("adamw", "fused"),
    "adamw_torch": ("adamw", "foreach"),
    "adamw": ("adamw", "fused"),
    "adam": ("adamw", "fused"),
    "sgd_momentum": ("sgd", "foreach"),
}


def _sides(size: tuple[int, ...] | None) -> tuple[int, int]:
    return (size[0], size[1]) if size else (448, 448)


def resolve(plan: Plan) -> Job:
    """Fill what the plan leaves out with the stack's defaults (contract, section 3)."""
    method = plan.method
    if method is None:
        raise UnsupportedError(
            "tracing inference", remedy="give the plan a method, as {kind: lora}"
        )
    _refuse(plan)
    stack = plan.stack or "transformers"
    kind = method.kind
    rank = method.rank or RANKS.get(kind, 16)
    precision, batch, sharding = plan.precision, plan.batch, plan.sharding
    choice = plan.optimizer
    name = choice.name if choice else "adamw_torch_fused"
    momentum = (choice.momentum if choice else None) or 0.0
    if name == "sgd_momentum":
        momentum = momentum or 0.9
    name, implementation = _IMPLEMENTATIONS.get(name, (name, "foreach"))
    if choice and choice.implementation:
        implementation = choice.implementation
    checkpointing = plan.gradient_checkpointing
    weights = precision.weights or ("nf4" if kind == "qlora" else "bf16")
    mixed = precision.mixed or "no"
    own, loss = find_stack(stack), plan.loss
    usual = own.loss_kind(method=kind, task=plan.task or "sft") if own.modules else "full"
    world = (plan.hardware.count or 1) * (plan.hardware.nodes or 1)
    param_dtype = sharding.param_dtype or (mixed if mixed != "no" else "")
    return Job(
        stack=stack,
        task=plan.task or "sft",
        method=kind,
        rank=rank,
        alpha=method.alpha or 2 * rank,
        targets=method.targets or "all-linear",
        dropout=method.dropout or 0.0,
        adapter_dtype=method.adapter_dtype or "fp32",
        modules_to_save=tuple(method.modules_to_save or ()),
        rank_pattern=dict(method.rank_pattern or {}),
        layers_to_transform=tuple(method.layers_to_transform or ()),
        target_parameters=tuple(method.target_parameters or ()),
        use_dora=bool(method.use_dora) or kind == "dora",
        use_rslora=bool(method.use_rslora),
        double_quant=bool(method.double_quant),
        prepare_kbit=method.prepare_kbit if method.prepare_kbit is not None else kind == "qlora",
        compute_dtype=_FLOATS[method.compute_dtype or "bf16"],
        last_layers=method.last_layers or 1,
        virtual_tokens=method.virtual_tokens or 20,
        options={
            name: list(value) if isinstance(value, tuple) else value
            for name, value in (method.options or {}).items()
        },
        weights=_FLOATS.get(weights, weights),
        mixed=_FLOATS.get(mixed, "no"),
        micro=batch.micro or 1,
        seq_len=batch.seq_len or 2048,
        accumulation=batch.accumulation or 1,
        images=batch.images or 0,
        image_size=_sides(batch.image_size),
        padding=batch.padding or "none",
        optimizer=name,
        implementation=implementation,
        momentum=momentum,
        checkpointing=checkpointing.kind if checkpointing else "none",
        every=checkpointing.every if checkpointing else 1,
        reentrant=bool(checkpointing and checkpointing.reentrant),
        attention=plan.attention or "sdpa",
        loss=loss.kind if loss else usual,
        chunk=(loss.chunk if loss else None) or 256,
        kernels=plan.kernels or "none",
        capability=_capability(plan.hardware.gpu),
        reference=plan.reference or "none",
        world=world,
        sharding=sharding.kind or ("ddp" if world > 1 else "none"),
        fsdp_version=sharding.version or 2,
        wrap=sharding.wrap or "block",
        apart=sharding.apart or (() if sharding.wrap else own.apart),
        reshard_root=bool(sharding.reshard_root) or (not sharding.wrap and own.reshard_root),
        param_dtype=_FLOATS.get(param_dtype, ""),
        reduce_dtype=_FLOATS.get(sharding.reduce_dtype or param_dtype, ""),
        reshard_after_forward=(
            True if sharding.reshard_after_forward is None else sharding.reshard_after_forward
        ),
        offload=sharding.offload or "none",
        dp_replicate=sharding.dp_replicate or 1,
        no_sync=bool(sharding.no_sync),
        use_orig_params=bool(sharding.use_orig_params),
        tp=sharding.tp or 1,
        cp=sharding.cp or 1,
        ep=sharding.ep or 1,
        zero=_zero(sharding),
        eval_micro=plan.batch.eval_micro or 0,
    )


def _zero(sharding: Sharding) -> dict[str, Any]:
    """What a plan says of ZeRO, in DeepSpeed's words."""
    given: dict[str, Any] = {
        "stage": int(sharding.kind[-1]) if sharding.kind and sharding.kind[:4] == "zero" else 0,
        "reduce_bucket_size": sharding.bucket_elements,
        "overlap_comm": sharding.overlap_comm,
        "sub_group_size": sharding.sub_group_elements,
        "stage3_prefetch_bucket_size": sharding.prefetch_elements,
        "stage3_max_live_parameters": sharding.max_live_elements,
        "stage3_param_persistence_threshold": sharding.persistence_elements,
    }
    host = {"device": "cpu", "pin_memory": True}
    if sharding.offload in ("optimizer", "params"):
        given["offload_optimizer"] = host
    if sharding.offload == "params":
        given["offload_param"] = host
    return {key: value for key, value in given.items() if value is not None}


def plan_from(mapping: dict[str, Any]) -> Plan:
    """A plan from the mapping of a plan file, without the strict reader (for scripts here)."""
    data = dict(mapping)
    if isinstance(data.get("model"), str):
        data["model"] = {"name": data["model"]}
    if isinstance(data.get("optimizer"), str):
        data["optimizer"] = {"name": data["optimizer"]}
    if isinstance(data.get("loss"), str):
        data["loss"] = {"kind": data["loss"]}
    checkpointing = data.get("gradient_checkpointing")
    if isinstance(checkpointing, bool):
        data["gradient_checkpointing"] = {"kind": "full" if checkpointing else "none"}
    precision = data.get("precision")
    if isinstance(precision, dict) and precision.get("mixed") is False:
        data["precision"] = {**precision, "mixed": "no"}
    plan: Plan = _reader().validate_python(data)
    return plan


@cache
def _reader() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Plan)
