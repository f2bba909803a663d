"""From a resolved plan to the calculator's job: formats, optimizer, adapter, environment, sharding.

Nothing is decided here that a user could see as a default: :mod:`ftplan.resolve` has done that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ftplan.catalog.gpus import GpuRow
from ftplan.catalog.models import resolve_model
from ftplan.catalog.optimizers import find_optimizer
from ftplan.catalog.stacks import Stack
from ftplan.dtypes import Format, find_format
from ftplan.errors import InputError, UnsupportedError
from ftplan.memory.env import Environment
from ftplan.memory.job import AdapterSpec, Job, ShardingSpec
from ftplan.memory.optimizer import OptimizerSpec, State
from ftplan.memory.parallel import local_config, local_seq_len
from ftplan.memory.serving import ServingJob
from ftplan.memory.tape import ITEM_BYTES
from ftplan.memory.tasks import HEADS
from ftplan.resolve import IMAGE_TOKENS, Resolved, native_dtype
from ftplan.spec import Checkpointing, Method, OptimizerChoice, Plan

__all__ = ["job_of", "modules_of", "serving_job_of"]


def job_of(resolved: Resolved) -> Job:
    """The calculator's job of a resolved training plan whose model has a known shape."""
    plan, stack, gpu = resolved.plan, resolved.stack, resolved.gpu
    method, batch = plan.method, plan.batch
    assert resolved.config is not None and method is not None and plan.optimizer is not None
    assert plan.gradient_checkpointing is not None and plan.loss is not None
    assert batch.micro and batch.seq_len and batch.accumulation
    storage = _stored(plan.precision.weights or "bf16", double_quant=bool(method.double_quant))
    mixed = None if plan.precision.mixed in (None, "no") else plan.precision.mixed
    checkpointing = plan.gradient_checkpointing
    quantised = storage.name not in ITEM_BYTES
    # accelerate hands FSDP2 a mixed-precision policy and does not autocast
    policy = plan.sharding.kind == "fsdp" and plan.sharding.version != 1
    autocast = None if policy else mixed
    sharding = _sharding(plan, resolved.config)
    environment = Environment(
        autocast=autocast,
        attention=plan.attention or "sdpa",
        capability=_capability(gpu),
        padding_mask=batch.padding == "right",
        kernels=plan.kernels or "none",
        loss=plan.loss.kind,
        loss_shifts=stack.loss_shifts,
        loss_upcasts=stack.loss_upcasts
        and resolved.config.get("model_type") not in stack.uncast_losses,
        loss_keeps_chunks=stack.loss_keeps_chunks,
        loss_columns=stack.loss_columns or 0,
        offload_checkpoints=_offloads(checkpointing.kind, sharding),
        checkpoint_attention=_core_alone(checkpointing, stack),
        packed=bool(batch.packing),
        keep_outputs=stack.keeps_outputs,
        outputs_to_fp32=autocast is not None and stack.outputs_to_fp32,
        seq_len=local_seq_len(batch.seq_len, sharding),
        reentrant=bool(checkpointing.reentrant),
    )
    native = native_dtype(resolved.config) or "bf16"
    modules = modules_of(resolved)
    adapter = _adapter(method, plan.task) if method.kind not in ("full", "partial") else None
    return Job(
        config=local_config(resolved.config, sharding),
        modules=modules,
        task=plan.task or "sft",
        method="full"
        if method.kind == "full"
        else "partial"
        if method.kind == "partial"
        else "adapter",
        last_layers=method.last_layers or 0,
        adapter=adapter,
        weights=storage,
        base_dtype=(method.compute_dtype or native) if quantised else storage.name,
        compute_dtype=method.compute_dtype or "bf16",
        prepare_kbit=quantised and bool(method.prepare_kbit),
        trainable_dtype=stack.trainable_dtype if method.kind in ("full", "partial") else None,
        environment=environment,
        micro=batch.micro,
        seq_len=local_seq_len(batch.seq_len, sharding),
        accumulation=batch.accumulation,
        eval_micro=batch.eval_micro or 0,
        checkpoint_every=0
        if checkpointing.kind == "none" or environment.checkpoint_attention
        else checkpointing.every,
        loss_chunk=plan.loss.chunk or (stack.loss_chunk if modules else None) or 0,
        images=batch.images or 0,
        image_tokens=min(IMAGE_TOKENS, batch.seq_len // (batch.images or 1)),
        optimizer=_optimizer(plan.optimizer, stack),
        main_weights=stack.main_weights and storage.name in ("bf16", "fp16"),
        sharding=sharding,
        labels=_labels(resolved.config),
        reference=plan.reference or "none",
        completion_tokens=(plan.rollout.completion_tokens or 0) if plan.rollout else 0,
        teacher=_teacher(plan),
        generates=plan.rollout is not None and plan.rollout.sampler == "trainer",
        sampler_bytes=_sampler_bytes(plan, gpu),
    )


def modules_of(resolved: Resolved) -> str:
    """The stack's own model code, where this job of it is walked; empty: transformers' is."""
    plan, modules = resolved.plan, resolved.stack.modules
    if modules is None or plan.method is None or resolved.config is None:
        return ""
    from ftplan.memory.families.native import runs

    method, weights = plan.method, _stored(plan.precision.weights or "bf16", double_quant=False)
    others = (
        method.modules_to_save, method.rank_pattern, method.layers_to_transform,
        method.target_parameters, method.use_dora, plan.batch.images,
        (plan.sharding.tp or 1) > 1, plan.batch.padding == "right",
        plan.attention not in (None, "sdpa"), plan.kernels not in (None, "none"),
        weights.layout != "plain" and plan.precision.mixed != "no",
    )  # fmt: skip
    if any(others):
        return ""
    loss = plan.loss.kind if plan.loss is not None else "full"
    known = runs(
        modules, resolved.config, task=plan.task or "sft", method=method.kind,
        weights=weights.name, loss=loss,
    )  # fmt: skip
    return modules if known else ""


def _offloads(kind: str, sharding: ShardingSpec) -> bool:
    """Whether checkpoints wait in host memory."""
    if sharding.offload != "activations":
        return kind == "offload"
    if kind in ("none", "selective"):
        raise UnsupportedError(
            "activations that are offloaded without being checkpointed",
            remedy="use gradient_checkpointing: {kind: offload}",
        )
    return True


def _core_alone(checkpointing: Checkpointing, stack: Stack) -> bool:
    """``selective``: Megatron's, of attention's core; torchtune's is of every n-th block."""
    selective = checkpointing.kind == "selective" and checkpointing.every == 1
    return selective and not (stack.modules or "").startswith("torchtune")


def _labels(config: Mapping[str, Any]) -> int:
    """How many labels a config.json names; two where it names none, as transformers has it."""
    named = config.get("id2label")
    return int(config.get("num_labels") or (len(named) if isinstance(named, Mapping) else 0) or 2)


def _teacher(plan: Plan) -> Mapping[str, Any] | None:
    return resolve_model(plan.teacher).row.config if plan.teacher is not None else None


def _sampler_bytes(plan: Plan, gpu: GpuRow | None) -> int:
    """What an engine reserves that generates on the same card."""
    rollout = plan.rollout
    if rollout is None or rollout.sampler != "colocate":
        return 0
    if gpu is None:
        raise InputError(
            "a sampler on the same card reserves a share of it, and no card is named",
            remedy="name one (--gpu h100-80gb), or use rollout.sampler: server",
        )
    return int((rollout.sampler_share or 0.0) * gpu.usable_bytes)


def _stored(name: str, *, double_quant: bool) -> Format:
    """The format as a library stores it: bitsandbytes' for plain int8 and int4."""
    name = find_format(name).name
    name = {"int8": "bnb-int8", "int4": "nf4"}.get(name, name)
    if double_quant and name in ("nf4", "fp4"):
        name = f"{name}-dq"
    return find_format(name)


def serving_job_of(resolved: Resolved) -> ServingJob:
    """The calculator's job of a model that is served."""
    plan = resolved.plan
    assert resolved.config is not None and plan.batch.micro and plan.batch.seq_len
    storage = _stored(plan.precision.weights or "bf16", double_quant=False)
    native = native_dtype(resolved.config) or "bf16"
    base = native if storage.name not in ITEM_BYTES else storage.name
    if base not in ITEM_BYTES:
        base = "bf16"
    return ServingJob(
        config=resolved.config,
        weights=storage,
        base_dtype=base,
        compute_dtype=base,
        cache_format=find_format(plan.precision.kv_cache or base),
        environment=Environment(
            attention=plan.attention or "sdpa",
            capability=_capability(resolved.gpu),
            seq_len=plan.batch.seq_len,
            training=False,
        ),
        concurrency=plan.batch.micro,
        context=plan.batch.seq_len,
        tp=plan.sharding.tp or 1,
    )


def _capability(gpu: GpuRow | None) -> tuple[int, int] | None:
    """Compute capability of the card; Ampere's where none is named, None for other vendors."""
    if gpu is None:
        return (8, 0)
    if gpu.compute_capability is None:
        return None
    major, minor = gpu.compute_capability.split(".")
    return int(major), int(minor)


def _adapter(method: Method, task: str | None) -> AdapterSpec:
    heads = HEADS if task in ("rm", "classify") else ()
    return AdapterSpec(
        kind=method.kind,
        rank=method.rank or 0,
        targets=method.targets,
        dtype=find_format(method.adapter_dtype or "fp32").name,
        dropout=method.dropout or 0.0,
        use_dora=bool(method.use_dora) or method.kind == "dora",
        modules_to_save=(*(method.modules_to_save or ()), *heads),
        rank_pattern=method.rank_pattern or {},
        layers_to_transform=method.layers_to_transform,
        target_parameters=tuple(method.target_parameters or ()),
        virtual_tokens=method.virtual_tokens or 20,
        bottleneck=method.bottleneck or 0,
    )


def _optimizer(choice: OptimizerChoice, stack: Stack) -> OptimizerSpec:
    # the Trainer of transformers registers fp32 states for embeddings; other loops do not
    trainer = stack.modules is None and stack.name != "pytorch"
    row = find_optimizer(choice.name)
    implementation = choice.implementation or row.implementation
    if implementation not in row.steps:
        raise InputError(
            f"optimizer {row.name} has no {implementation} implementation",
            remedy=f"use one of: {', '.join(row.steps)}",
        )
    states = row.states
    if row.name == "sgd" and choice.momentum:
        states = (State(name="momentum_buffer", dtype="param", shape="full"),)
    if choice.state_dtype is not None:
        dtype = find_format(choice.state_dtype).name
        states = tuple(replace(state, dtype=dtype) for state in states)
    others = row.others if row.applies_to != "all" else None
    return OptimizerSpec(
        name=row.name,
        states=states,
        step=row.steps[implementation],
        step_counter_on_gpu=implementation in row.step_counter_on_gpu,
        paged=row.paged,
        keeps_embeddings_fp32=trainer and "embeddings" in row.keeps_fp32,
        in_backward=row.in_backward if choice.in_backward is None else choice.in_backward,
        others=_optimizer(OptimizerChoice(name=others), stack) if others else None,
        rank=choice.rank or row.rank or 0,
        source=row.source,
    )


def _auto_buckets(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``auto`` stands for in a DeepSpeed file under transformers.

    transformers/integrations/deepspeed.py 5.23, ``trainer_config_finalize``: hidden size squared,
    0.9 of it, and ten times the hidden size.
    """
    text = config.get("text_config")
    hidden = config.get("hidden_size") or (text or {}).get("hidden_size")
    if not isinstance(hidden, int):
        return {}
    return {
        "bucket_elements": hidden * hidden,
        "prefetch_elements": hidden * hidden * 9 // 10,
        "persistence_elements": 10 * hidden,
    }


def _sharding(plan: Plan, config: Mapping[str, Any]) -> ShardingSpec:
    sharding, hardware = plan.sharding, plan.hardware
    given: dict[str, Any] = _auto_buckets(config) if sharding.auto_buckets else {}
    given |= {
        name: getattr(sharding, name)
        for name in ShardingSpec.__dataclass_fields__
        if name not in ("world",) and getattr(sharding, name, None) is not None
    }
    mixed = plan.precision.mixed
    if sharding.kind == "fsdp" and mixed not in (None, "no"):
        # accelerate's policy: everything in the dtype of mixed precision
        given.setdefault("param_dtype", mixed)
        given.setdefault("reduce_dtype", given["param_dtype"])
    return ShardingSpec(world=(hardware.count or 1) * (hardware.nodes or 1), **given)
