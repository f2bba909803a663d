"""From a resolved plan to the calculator's job: formats, optimizer, adapter, environment, sharding.

Nothing is decided here that a user could see as a default: :mod:`ftplan.front.resolve` has done
that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ftplan.catalog.gpus import GpuRow
from ftplan.catalog.models import resolve_model
from ftplan.catalog.optimizers import find_optimizer
from ftplan.catalog.stacks import PLANNED, RINGS, Stack
from ftplan.dtypes import Format, find_format
from ftplan.errors import InputError, UnsupportedError
from ftplan.front.resolve import Resolved, fused_loss, image, native_dtype
from ftplan.memory.env import Environment
from ftplan.memory.images import Image
from ftplan.memory.job import AdapterSpec, Job, ShardingSpec
from ftplan.memory.kernels import LIBRARIES, Kernels, Lora, kernels_of
from ftplan.memory.lengths import Lengths
from ftplan.memory.optimizer import OptimizerSpec, State
from ftplan.memory.parallel import local_config, local_seq_len
from ftplan.memory.serving import ServingJob
from ftplan.memory.tape import ITEM_BYTES
from ftplan.memory.tasks import HEADS
from ftplan.spec import Checkpointing, Method, OptimizerChoice, Plan

__all__ = ["job_of", "lengths_of", "modules_of", "serving_job_of"]


def job_of(resolved: Resolved) -> Job:
    """The calculator's job of a resolved training plan whose model has a known shape."""
    plan, stack, gpu = resolved.plan, resolved.stack, resolved.gpu
    method, batch = plan.method, plan.batch
    assert resolved.config is not None and method is not None and plan.optimizer is not None
    assert plan.gradient_checkpointing is not None and plan.loss is not None
    assert batch.micro and batch.seq_len and batch.accumulation
    storage = _stored(plan.precision.weights or "bf16", double_quant=bool(method.double_quant))
    mixed = None if plan.precision.mixed in (None, "no") else plan.precision.mixed
    engine = _engine_dtype(plan, storage, mixed)
    if engine is not None and storage.name in ITEM_BYTES:
        storage = find_format(engine)
    checkpointing = plan.gradient_checkpointing
    quantised = storage.name not in ITEM_BYTES
    # accelerate hands FSDP2 a mixed-precision policy, and DeepSpeed's engine casts the model:
    # neither autocasts
    policy = plan.sharding.kind == "fsdp" and plan.sharding.version != 1
    around = plan.loss.kind == "chunked" and plan.task in stack.without_autocast
    autocast = None if policy or around or engine is not None else mixed
    sharding = replace(
        _sharding(plan, resolved.config),
        adapters_apart=stack.name != "pytorch" and not stack.own_modules,
        megatron=stack.name == "megatron",
        own_plan=stack.name not in PLANNED,
        deep_ep=stack.name == "axolotl",
        own_spread=stack.name == "nemo" or _is_titan(stack),
        keeps_last=stack.name == "nemo" and plan.sharding.reshard_after_forward is None,
    )
    kernels = _kernels(resolved, storage)
    if kernels.lora == "automodel" and checkpointing.kind == "selective":
        _refuse_selective(method)
    if stack.loss_twice and plan.loss.kind != "full" and plan.task in (None, "sft", "pt"):
        raise UnsupportedError(
            f"a {plan.loss.kind} loss on {stack.title}",
            because="its trainer takes a second loss out of all logits",
            remedy="use loss: full",
        )
    environment = Environment(
        autocast=autocast,
        attention=plan.attention or "sdpa",
        repeats_heads=_repeats_heads(plan, stack, resolved.config),
        fills_cache=resolved.config.get("model_type") in stack.caching_models,
        copies_to_cache=stack.leaves_cache_on and checkpointing.kind == "none",
        capability=_capability(gpu),
        padding_mask=batch.padding == "right",
        kernels=kernels,
        loss=plan.loss.kind,
        loss_by=fused_loss(plan),
        casts_products=stack.casts_products,
        loss_shifts=stack.loss_shifts,
        loss_upcasts=stack.loss_upcasts
        and resolved.config.get("model_type") not in stack.uncast_losses,
        logits_cast=stack.logits_cast,
        loss_keeps_chunks=stack.loss_keeps_chunks,
        loss_compiled=stack.loss_compiled,
        loss_columns=stack.loss_columns or 0,
        log_probs=stack.log_probs,
        rolls_labels=plan.task in stack.rolled_labels,
        logit_metrics=stack.logit_metrics,
        asks_at_blocks=stack.asks_at_blocks and method.kind == "partial",
        offload_checkpoints=_offloads(checkpointing.kind, sharding),
        checkpoint_attention=_core_alone(checkpointing, stack),
        checkpoint_parts=kernels.in_parts and checkpointing.kind == "full",
        keeps_products=checkpointing.kind == "selective"
        and (stack.name == "nemo" or _is_titan(stack)),
        packed=bool(batch.packing),
        hooks_hold_inputs=_hooks_hold_inputs(plan),
        keep_outputs=stack.keeps_outputs,
        outputs_to_fp32=autocast is not None and stack.outputs_to_fp32,
        sequence_parts=sharding.token_parts,
        ring=sharding.cp if stack.name in RINGS and sharding.kind == "fsdp" else 1,
        seq_len=local_seq_len(batch.seq_len, sharding),
        one_sequence=batch.micro == 1,
        returns_cache=checkpointing.kind == "none",
        holds_4bit_inputs=stack.holds_4bit_inputs,
        unpacks_gptq=stack.unpacks_gptq,
        dora_names_identity=stack.dora_names_identity,
        early_stop=stack.early_stop,
        reentrant=bool(checkpointing.reentrant),
        dropout=plan.task not in stack.dropout_off,
    )
    native = native_dtype(resolved.config) or "bf16"
    unquantised = native if stack.base_of_checkpoint else method.compute_dtype or native
    modules = modules_of(resolved)
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
        adapter=_adapter(method, plan.task, engine)
        if method.kind not in ("full", "partial")
        else None,
        weights=storage,
        base_dtype=(engine or unquantised) if quantised else storage.name,
        compute_dtype=method.compute_dtype or "bf16",
        prepare_kbit=quantised and bool(method.prepare_kbit) and engine is None,
        kbit_casts_back=plan.task in stack.kbit_casts_back and mixed == "bf16",
        # trl/experimental/ppo/ppo_trainer.py 1.12: peft_module_casting_to_bf16 of a 4-bit policy
        norms_in_fp32=plan.task == "ppo" and mixed == "bf16" and storage.name[:3] in ("nf4", "fp4"),
        separate_experts=stack.separate_experts,
        trainable_dtype=_trained(plan, stack) if engine is None else None,
        asks_input_grads=stack.asks_input_grads and method.kind not in ("full", "partial"),
        loss_twice=stack.loss_twice,
        loss_outside=stack.loss_outside,
        reference_frozen=stack.references_frozen,
        reference_weights=find_format("fp32")
        if plan.task in stack.fp32_references and engine is None
        else None,
        pairs_joined=stack.pairs_joined and plan.task == "rm",
        value_head=stack.reward_head == "value",
        norm_dtype=plan.precision.norms if engine is None else None,
        embedding_dtype=plan.precision.embeddings if engine is None else None,
        environment=environment,
        micro=batch.micro,
        seq_len=local_seq_len(batch.seq_len, sharding),
        accumulation=batch.accumulation,
        # CUDA graphs, which keep them, take neither a pipeline nor experts on other ranks
        keeps_gradients=stack.keeps_gradients and sharding.pp == sharding.ep == 1,
        fetches_ahead=stack.fetches_ahead,
        eval_micro=batch.eval_micro or 0,
        checkpoint_every=0
        if checkpointing.kind == "none"
        or environment.checkpoint_attention
        or environment.checkpoint_parts
        or plan.task == "ppo"
        else checkpointing.every,
        loss_chunk=plan.loss.chunk or (stack.loss_chunk if modules else None) or 0,
        card_bytes=gpu.usable_bytes if gpu is not None else 0,
        images=batch.images or 0,
        image=image(batch, resolved.config) or Image(),
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
    from ftplan.memory.families.native import parallel, runs, shows, wraps

    method = plan.method
    weights = _stored(plan.precision.weights or "bf16", double_quant=bool(method.double_quant))
    split = {n for n in ("tp", "pp", "cp", "ep") if (getattr(plan.sharding, n) or 1) > 1}
    unseen = "pp" in split or not shows(modules, resolved.config)
    others = (
        method.modules_to_save, method.rank_pattern, method.layers_to_transform,
        method.target_parameters, method.use_dora, method.fused_lora, method.options,
        plan.batch.images and unseen, split - {*parallel(modules)}, (plan.sharding.etp or 1) > 1,
        plan.batch.padding == "right", plan.kernels not in (None, "none"),
        not wraps(modules, plan.sharding, resolved.config),
        weights.layout != "plain" and plan.precision.mixed != "no",
    )  # fmt: skip
    if any(others):
        return ""
    loss = plan.loss.kind if plan.loss is not None else "full"
    known = runs(
        modules, resolved.config, task=plan.task or "sft", method=method.kind,
        weights=weights.name, loss=loss, attention=plan.attention or "sdpa",
    )  # fmt: skip
    return modules if known else ""


def _engine_dtype(plan: Plan, storage: Format, mixed: str | None) -> str | None:
    """What DeepSpeed's engine casts the whole model to, adapters and norms too; None: nothing.

    ``bf16: {enabled: true}`` or ``fp16``: deepspeed/runtime/engine.py 0.19.8,
    ``_configure_distributed_model``. Two-byte weights without either are refused there.
    """
    if not str(plan.sharding.kind).startswith("zero") or plan.stack == "megatron":
        return None
    if mixed is not None:
        return mixed
    return storage.name if ITEM_BYTES.get(storage.name) == 2 else None


def _trained(plan: Plan, stack: Stack) -> str | None:
    """What the trainer casts every trained parameter to, whole copies beside adapters too."""
    method = plan.method
    assert method is not None
    if stack.base_of_checkpoint and plan.precision.trained == "bf16":
        return None  # LLaMA-Factory's pure_bf16: nothing is cast to fp32, and nothing to bf16
    if plan.precision.trained is not None:
        return plan.precision.trained
    adapts = method.kind not in ("full", "partial")
    return None if adapts and method.adapter_dtype == "bf16" else stack.trainable_dtype


def lengths_of(resolved: Resolved) -> Lengths | None:
    """Lengths of samples, where batches differ in them."""
    given = resolved.plan.batch.lengths
    if given is None or given.kind == "fixed":
        return None
    return Lengths(
        mean=given.mean,
        deviation=given.deviation or 0.0,
        shortest=given.shortest or 1,
        cut=given.longer == "cut",
    )


def _kernels(resolved: Resolved, storage: Format) -> Kernels:
    """What is fused: a library's kernels for this architecture, and LoRA's functions."""
    plan, config = resolved.plan, resolved.config or {}
    library, method = plan.kernels or "none", plan.method
    lora: Lora = "none"
    if library == "unsloth":
        lora = "unsloth"
    elif library == "foak" and storage.layout != "plain":
        lora = "foak"
    elif plan.stack == "nemo" and method is not None and method.fused_lora is not False:
        lora = "automodel"
    elif method is not None and method.fused_lora:
        lora = "axolotl"
    text = config.get("text_config")
    kind = config.get("model_type", "")
    inner = text.get("model_type", kind) if isinstance(text, Mapping) else kind
    if library == "automodel" and storage.layout != "plain":
        library = "none"  # quantised models are transformers'
    known = LIBRARIES[library]
    model_type = str(kind if kind in known else inner)
    whole = lora != "automodel" or _fuses_mlp(plan, config, own=model_type in known)
    kernels = kernels_of(library, model_type, lora=lora, lora_mlp=whole)
    if library == "liger" and resolved.stack.loss_twice:
        # v1 of LLaMA-Factory needs logits: for a fused head it has PyTorch's cross entropy replaced
        return replace(kernels, loss=True)
    return kernels


def _fuses_mlp(plan: Plan, config: Mapping[str, Any], *, own: bool) -> bool:
    """Whether AutoModel joins the projections of an adapted MLP.

    It leaves alone what is on the meta device yet: its own models, and all that FSDP2 will shard
    (components/_peft/lora_mlp.py 0.7.0, ``install_fused_lora_mlp``).
    """
    alone = (plan.hardware.count or 1) * (plan.hardware.nodes or 1) == 1
    loaded = plan.sharding.kind == "ddp" or (alone and not own)
    return loaded and config.get("hidden_act", "silu") in ("silu", "swish")


def _refuse_selective(method: Method) -> None:
    """AutoModel adds the base's result to LoRA's product in place, unless dropout has copied it."""
    plain = method.kind in ("lora", "qlora") and not method.use_dora and not method.dropout
    if plain:
        raise UnsupportedError(
            "selective checkpointing of NeMo AutoModel's LoRA",
            because="the checkpoint keeps a product that is then added to, and torch 2.13 refuses "
            "that",
            remedy="use gradient_checkpointing: full, or method.fused_lora: false "
            "(peft.use_memory_efficient_lora)",
        )


def _repeats_heads(plan: Plan, stack: Stack, config: Mapping[str, Any]) -> bool:
    attention = plan.attention or "sdpa"
    repeating = stack.repeating_attention
    return attention in repeating or (
        attention == "flash" and config.get("model_type") in repeating
    )


def _hooks_hold_inputs(plan: Plan) -> bool:
    """FSDP1 around blocks that train nothing: adapters are units of their own (peft's policy)."""
    assert plan.method is not None and plan.gradient_checkpointing is not None
    sharding = plan.sharding
    apart = sharding.kind == "fsdp" and sharding.version == 1 and sharding.wrap != "model"
    adapts = plan.method.kind not in ("full", "partial", "bitfit")
    return (
        apart and adapts and plan.stack != "pytorch" and bool(plan.gradient_checkpointing.reentrant)
    )


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
    """``selective``: Megatron's, of attention's core; torchtune's is of every n-th block, and
    torchtitan's of every block, by operation."""
    selective = checkpointing.kind == "selective" and checkpointing.every == 1
    own = (stack.modules or stack.name).partition("-")[0]
    return selective and own not in ("torchtune", "nemo") and not _is_titan(stack)


def _is_titan(stack: Stack) -> bool:
    return stack.name.partition("-")[0] == "torchtitan"


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


_NOT_SERVED = {"pipeline": "pp", "context": "cp", "expert": "ep"}


def serving_job_of(resolved: Resolved) -> ServingJob:
    """The calculator's job of a model that is served."""
    plan = resolved.plan
    assert resolved.config is not None and plan.batch.micro and plan.batch.seq_len
    for way, degree in _NOT_SERVED.items():
        if (getattr(plan.sharding, degree) or 1) > 1:
            raise UnsupportedError(
                f"a model served under {way} parallelism ({degree})",
                remedy="use tensor parallelism (tp)",
            )
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
        prompt=plan.batch.prompt_len or 0,
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


def _adapter(method: Method, task: str | None, engine: str | None) -> AdapterSpec:
    heads = HEADS if task in ("rm", "classify") else ()
    return AdapterSpec(
        kind=method.kind,
        rank=method.rank or 0,
        targets=method.targets,
        dtype=engine or find_format(method.adapter_dtype or "fp32").name,
        dropout=method.dropout or 0.0,
        use_dora=bool(method.use_dora) or method.kind == "dora",
        modules_to_save=(*(method.modules_to_save or ()), *heads),
        rank_pattern=method.rank_pattern or {},
        layers_to_transform=method.layers_to_transform,
        target_parameters=tuple(method.target_parameters or ()),
        virtual_tokens=method.virtual_tokens or 20,
        bottleneck=method.bottleneck or 0,
        options=method.options or {},
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
        offloads_from=row.offloads_from,
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
    world = (hardware.count or 1) * (hardware.nodes or 1)
    if plan.stack == "nemo" and world == 1 and sharding.kind == "fsdp":
        # components/distributed/fsdp2.py 0.7.0: one rank is not wrapped, nor cast by a policy
        given["kind"] = "none"
    _refuse_offload(plan)
    _refuse_flat(plan)
    mixed = plan.precision.mixed
    if sharding.kind == "fsdp" and mixed not in (None, "no"):
        # accelerate's policy: everything in the dtype of mixed precision
        given.setdefault("param_dtype", mixed)
        given.setdefault("reduce_dtype", given["param_dtype"])
    return ShardingSpec(world=world, **given)


_MOVERS = {
    "optimizer": ("zero1", "zero2", "zero3"),
    "params": ("zero3", "fsdp"),
    "nvme": ("zero3",),
}
"""Who moves what off the GPU: DeepSpeed's stages, and FSDP its shards with their states."""


def _refuse_offload(plan: Plan) -> None:
    """Nothing leaves the GPU by itself: name what no library moves."""
    kind, offload = plan.sharding.kind or "none", plan.sharding.offload or "none"
    movers = _MOVERS.get(offload, (kind,))
    if kind not in movers and plan.stack != "megatron":
        raise UnsupportedError(
            f"offload of {offload} with {kind}",
            because="no library does it",
            remedy=f"use sharding.kind: {' or '.join(movers)}; on one GPU torchao's "
            "CPUOffloadOptimizer keeps states on the host (optimizer: cpu_offload_adamw)",
        )


def _refuse_flat(plan: Plan) -> None:
    """FSDP1 joins weights of a block that train and that do not only as views of the original ones.

    torch 2.13 raises ValueError; with a policy that wraps adapters apart (Trainer's, by PEFT) there
    is no such block. What is allocated is the same with either (traced).
    """
    sharding, method = plan.sharding, plan.method
    flat = sharding.kind == "fsdp" and sharding.version == 1 and sharding.use_orig_params is False
    apart = plan.stack != "pytorch" or method is None or method.kind in ("full", "partial")
    if flat and not apart:
        raise UnsupportedError(
            "adapters under FSDP1 without use_orig_params",
            because="PyTorch refuses them",
            remedy="set sharding.use_orig_params: true, or sharding.version: 2",
        )
