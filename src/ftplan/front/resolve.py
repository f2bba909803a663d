"""From what a user wrote to a job with every choice made, and the list of what was assumed.

The only place where defaults live: contract defaults first, then the stack's own profile. Names
are looked up in the catalogues; a config.json is read from beside the plan, never from a network.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ftplan.adapting import RANKS, check_options
from ftplan.catalog.gpus import GpuRow, find_gpu
from ftplan.catalog.models import resolve_model
from ftplan.catalog.stacks import Stack, find_stack
from ftplan.dataclass import dataclass
from ftplan.dtypes import Format, find_format
from ftplan.errors import InputError, UnsupportedError
from ftplan.front.unused import idle_keys, sentence, shapeless_keys, without
from ftplan.memory.images import Image, image_of
from ftplan.report import Assumption, Finding
from ftplan.spec import (
    Batch,
    Checkpointing,
    Lengths,
    Loss,
    Method,
    OptimizerChoice,
    Plan,
    Precision,
    Rollout,
    Sharding,
)

__all__ = ["Resolved", "fused_loss", "image", "native_dtype", "resolve"]

CONTRACT = "ftplan's default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A plan after defaults, and what its names stand for."""

    plan: Plan
    """Every key that matters has a value."""
    assumptions: tuple[Assumption, ...]
    findings: tuple[Finding, ...]
    name: str
    """The model, for people."""
    config: Mapping[str, Any] | None
    """The model's config.json; None for a bare parameter count."""
    stack: Stack
    gpu: GpuRow | None
    shapeless: tuple[str, ...] = ()
    """Keys that were given and that need the shape which a bare parameter count has not."""


class _Filler:
    """Collects what was assumed while values are filled in."""

    def __init__(self) -> None:
        self.assumptions: list[Assumption] = []
        self.findings: list[Finding] = []

    def fill(self, key: str, given: Any, default: Any, source: str = CONTRACT) -> Any:
        """``given``, or ``default`` with a note of it."""
        if given is not None:
            return given
        if default is not None:
            self.assumptions.append(Assumption(key=key, value=default, source=source))
        return default


def _model(plan: Plan, base: Path) -> tuple[str, Mapping[str, Any] | None, tuple[Finding, ...]]:
    model = plan.model
    if model.config is not None:
        from ftplan.front.model_config import read_model

        config, findings = read_model(base / model.config)
        return model.config, config, tuple(findings)
    if model.name is not None:
        row = resolve_model(model.name).row
        return row.name, row.config, ()
    return f"{model.params:,} parameters", None, ()


def resolve(
    plan: Plan, *, base: Path | None = None, stated: Collection[str] | None = None
) -> Resolved:
    """Fill every default and look up every name. Relative paths start at ``base``.

    Keys that this job has no use for are taken out, and named when they are among those that
    somebody has ``stated`` (None: all were).
    """
    name, config, findings = _model(plan, base or Path())
    resolved = _filled(plan, name, config)
    idle = idle_keys(plan, resolved.plan, resolved.stack, config)
    kept = without(plan, idle)
    shapeless = shapeless_keys(kept) if config is None else []
    spread = [key for key in shapeless if key.startswith("sharding.")]
    if idle or spread:
        resolved = _filled(without(kept, spread), name, config)
    said = {key: why for key, why in idle.items() if _stated(key, stated)}
    return replace(
        resolved,
        findings=(*findings, *resolved.findings, *([_idle_finding(said)] if said else [])),
        shapeless=tuple(key for key in shapeless if _stated(key, stated)),
    )


def _stated(key: str, stated: Collection[str] | None) -> bool:
    """Whether somebody wrote the key, one within it, or the section it is in."""
    return stated is None or any(
        f"{one}.".startswith(f"{key}.") or key.startswith(f"{one}.") for one in stated
    )


def _idle_finding(idle: Mapping[str, str]) -> Finding:
    one = len(idle) == 1
    return Finding(
        code="MEM005",
        severity="info",
        message=f"nothing here depends on {sentence(idle)}",
        help=f"leave {'it' if one else 'them'} out, or change what "
        f"{'it goes' if one else 'they go'} with",
    )


def _filled(plan: Plan, name: str, config: Mapping[str, Any] | None) -> Resolved:
    filler = _Filler()
    stack = find_stack(filler.fill("stack", plan.stack, "transformers"))
    gpu = find_gpu(plan.hardware.gpu) if plan.hardware.gpu else None
    task = filler.fill("task", plan.task, "sft" if plan.method else "serve")
    plan = replace(plan, stack=stack.name, task=task)
    if plan.method is not None and task != "serve":
        config = _loaded(config, stack, plan, filler)
        plan = _with_task(_training(plan, stack, config, filler), config, filler)
    else:
        plan = _serving(plan, config, filler)
    plan = _placement(plan, filler)
    return Resolved(
        plan=plan,
        assumptions=tuple(filler.assumptions),
        findings=tuple(filler.findings),
        name=name,
        config=config,
        stack=stack,
        gpu=gpu,
    )


THINKER = "LLaMA-Factory 0.9.4, src/llamafactory/model/loader.py: of Qwen-Omni, model.thinker"


def _loaded(
    config: Mapping[str, Any] | None, stack: Stack, plan: Plan, filler: _Filler
) -> Mapping[str, Any] | None:
    """What the stack's class makes of a config where no image is in the batch."""
    from ftplan.memory.families import text_alone, thinker_alone

    thinker = thinker_alone(config) if config is not None else None
    if thinker is not None:
        filler.fill("model", None, "its thinker alone", THINKER)
        config = thinker
    if config is None or plan.batch.images or not stack.text_class:
        return config
    text = text_alone(config)
    if text is None:
        return config
    filler.fill("model", None, "its language model alone", stack.sources["text_class"])
    return text


def native_dtype(config: Mapping[str, Any] | None) -> str | None:
    if config is None:
        return None
    text = config.get("text_config")
    nested = text if isinstance(text, Mapping) else {}
    for source in (config, nested):
        dtype = source.get("dtype") or source.get("torch_dtype")
        if isinstance(dtype, str):
            return find_format(dtype).name
    return None


def _micro_batches(plan: Plan, filler: _Filler) -> int:
    """Micro batches of a step: a pipeline has as many as stages, or it would stand still."""
    stages = plan.sharding.pp or 1
    source = CONTRACT if stages == 1 else "as many as a 1F1B schedule takes at least"
    count: int = filler.fill("batch.accumulation", plan.batch.accumulation, stages, source)
    return count


def _placement(plan: Plan, filler: _Filler) -> Plan:
    hardware, sharding = plan.hardware, plan.sharding
    nodes = hardware.nodes or 1
    split = (sharding.tp or 1) * (sharding.pp or 1) * (sharding.cp or 1)
    ranks = -(-max(split, sharding.ep or 1) // split) * split  # experts lie across the replicas
    least = -(-ranks // nodes)
    source = CONTRACT if least == 1 else "as many as the parallel degrees need"
    count = filler.fill("hardware.count", hardware.count, least, source)
    replicas = count * nodes // split
    own = find_stack(plan.stack or "transformers") if plan.method is not None else None
    if sharding.kind is None and own is not None and own.sharding is not None:
        source = own.sources["sharding"]
        sharding = replace(sharding, kind=filler.fill("sharding.kind", None, own.sharding, source))
    if (sharding.tp or 1) > 1 and own is not None and own.sequence_parallel:
        source = own.sources["sequence_parallel"]
        shares = filler.fill("sharding.sequence_parallel", sharding.sequence_parallel, True, source)
        sharding = replace(sharding, sequence_parallel=shares)
    if (kind := sharding.kind) == "fsdp" and own and (plan.batch.accumulation or 1) > 1:
        no_sync = filler.fill(
            "sharding.no_sync",
            sharding.no_sync,
            own.no_sync,
            own.sources.get("no_sync", CONTRACT),
        )
        sharding = replace(sharding, no_sync=no_sync)
    if count * nodes % split:
        raise InputError(
            f"{count * nodes} GPUs are no multiple of tp x pp x cp = {split}",
            remedy="make the number of GPUs a multiple of the product of the degrees",
        )
    if kind is None:
        kind = "ddp" if replicas > 1 and plan.method is not None else "none"
        if kind == "ddp" and (sharding.ep or 1) > 1 and plan.stack not in ("megatron", "axolotl"):
            kind = "fsdp"  # what transformers spreads experts with
        if count * nodes > 1:
            filler.fill("sharding.kind", None, kind)
    if kind == "fsdp" and own is not None:
        if sharding.version != 1 and sharding.wrap is None:
            sharding = _units(sharding, own, filler)
        sharding = _policy(sharding, own, filler)
    budget = replace(
        plan.budget, headroom=filler.fill("budget.headroom", plan.budget.headroom, 0.0)
    )
    return replace(
        plan,
        hardware=replace(hardware, count=count, nodes=nodes),
        sharding=replace(sharding, kind=kind),
        budget=budget,
    )


def _policy(sharding: Sharding, stack: Stack, filler: _Filler) -> Sharding:
    """The dtypes of the stack's own policy; without one it follows mixed precision."""
    given = {
        name: filler.fill(f"sharding.{name}", getattr(sharding, name), value, source)
        for name, value, source in (
            ("param_dtype", stack.param_dtype, stack.sources.get("param_dtype", CONTRACT)),
            ("reduce_dtype", stack.reduce_dtype, stack.sources.get("reduce_dtype", CONTRACT)),
        )
        if value is not None
    }
    return replace(sharding, **given)


def _units(sharding: Sharding, stack: Stack, filler: _Filler) -> Sharding:
    """What the stack's FSDP2 wraps beside the blocks, where the plan does not say what a unit is.

    With ``wrap: block`` all that is beside the blocks is the root's (contract, section 3).
    """
    given = {
        name: filler.fill(
            f"sharding.{name}",
            getattr(sharding, name),
            getattr(stack, name) or None,
            stack.sources.get(name, CONTRACT),
        )
        for name in ("apart", "reshard_root")
    }
    return replace(sharding, **given)


def _serving(plan: Plan, config: Mapping[str, Any] | None, filler: _Filler) -> Plan:
    native = native_dtype(config)
    weights = filler.fill(
        "precision.weights", plan.precision.weights, native or "bf16", "the checkpoint's dtype"
    )
    weights = find_format(weights).name
    batch = replace(
        plan.batch,
        micro=filler.fill("batch.micro", plan.batch.micro, 1),
        seq_len=filler.fill("batch.seq_len", plan.batch.seq_len, 2048),
    )
    attention = filler.fill("attention", plan.attention, "sdpa")
    precision = replace(plan.precision, weights=weights, mixed=plan.precision.mixed or "no")
    return replace(plan, precision=precision, batch=batch, attention=attention)


def _check_kernels(plan: Plan, stack: Stack, config: Mapping[str, Any] | None) -> None:
    """Refuse kernels that would not run."""
    from ftplan.memory.kernels import LIBRARIES

    model_type = (config or {}).get("model_type")
    known = LIBRARIES[plan.kernels or "none"]
    if plan.kernels in ("liger", "foak") and config is not None and model_type not in known:
        raise UnsupportedError(
            f"{plan.kernels} kernels for model_type {model_type!r}", remedy="use kernels: none"
        )
    if plan.kernels == "unsloth" and stack.name != "unsloth":
        raise InputError(
            f"unsloth's kernels do not come with {stack.title}",
            remedy="use stack: unsloth, or kernels: liger",
        )
    if plan.kernels == "automodel" and stack.name != "nemo":
        raise InputError(
            f"NeMo AutoModel's model code does not come with {stack.title}",
            remedy="use stack: nemo, or kernels: none",
        )


def _training(plan: Plan, stack: Stack, config: Mapping[str, Any] | None, filler: _Filler) -> Plan:
    from ftplan.memory.tasks import FULL_LOSS

    def own(field: str) -> str:
        return stack.sources.get(field, f"{stack.title} {stack.versions}")

    assert plan.method is not None
    _check_kernels(plan, stack, config)
    method = plan.method
    quantised = method.kind == "qlora"
    if quantised:
        default, source = "nf4", CONTRACT
    elif stack.weights_dtype == "checkpoint":
        default, source = native_dtype(config) or "bf16", "the checkpoint's dtype"
    else:
        default, source = stack.weights_dtype, own("weights_dtype")
    weights = find_format(filler.fill("precision.weights", plan.precision.weights, default, source))
    if weights.name in _RUN_AS and config is not None and method.kind not in ("full", "partial"):
        weights = find_format(
            filler.fill("precision.weights", None, _RUN_AS[weights.name], "bitsandbytes' format")
        )
    told = plan.precision.mixed
    mixed = filler.fill("precision.mixed", told, "no")
    if config is not None:
        _check_trainable(method, weights)
    precision = replace(plan.precision, weights=weights.name, mixed=mixed)
    batch = replace(
        plan.batch,
        micro=filler.fill("batch.micro", plan.batch.micro, 1),
        seq_len=filler.fill("batch.seq_len", plan.batch.seq_len, 2048),
        accumulation=_micro_batches(plan, filler),
        padding=filler.fill("batch.padding", plan.batch.padding, stack.padding, own("padding")),
        packing=filler.fill("batch.packing", plan.batch.packing, stack.packing, own("packing")),
    )
    batch = replace(batch, lengths=_lengths(batch, stack, filler, own("lengths")))
    if batch.packing and batch.padding == "right":
        raise InputError(
            "packed sequences are full: nothing is padded",
            remedy="use padding: none, or packing: false",
        )
    if batch.images and config is not None:
        _image_size(batch, config, filler)
    optimizer = plan.optimizer or OptimizerChoice(
        name=filler.fill("optimizer", None, stack.optimizer, own("optimizer"))
    )
    world = (plan.hardware.count or 1) * (plan.hardware.nodes or 1)
    checkpointing = plan.gradient_checkpointing
    if checkpointing is None:
        kind: Any = stack.checkpointing
        if world > 1 and stack.checkpointing_sharded is not None:
            kind = stack.checkpointing_sharded
        filler.fill("gradient_checkpointing", None, kind, own("checkpointing"))
        checkpointing = Checkpointing(kind=kind)
    if checkpointing.reentrant is None:
        kind = str((config or {}).get("model_type"))
        reentrant = stack.reenters(plan.task or "sft", kind)
        checkpointing = replace(checkpointing, reentrant=reentrant)
    adapts = method.kind not in ("full", "partial", "bitfit")
    if adapts and plan.sharding.kind in stack.reentrant_adapted and checkpointing.kind != "none":
        name = "gradient_checkpointing.reentrant"
        reentrant = filler.fill(name, None, True, own("reentrant_adapted"))
        checkpointing = replace(checkpointing, reentrant=reentrant)
    loss = plan.loss
    if loss is None:
        kind = stack.loss_kind(method=method.kind, task=plan.task or "sft")
        model_type = (config or {}).get("model_type")
        if plan.kernels == "liger" and kind == "full" and model_type != "granite":
            kind = "fused"  # apply_liger_kernel_to_*: fused_linear_cross_entropy=True
        if plan.task in FULL_LOSS or (kind == "fused" and plan.task not in ("sft", "pt")):
            kind = "full"
        filler.fill("loss", None, kind, own("loss"))
        loss = Loss(kind=kind)
    task = plan.task or "sft"
    if loss.kind != "full" and task in FULL_LOSS:
        raise UnsupportedError(
            f"a {loss.kind} loss for the task {task!r}", remedy="leave loss out, or use loss: full"
        )
    if loss.kind == "fused" and task not in ("sft", "pt"):
        raise UnsupportedError(
            f"a fused loss for the task {task!r}", remedy="use loss: chunked, or loss: full"
        )
    if loss.kind == "chunked" and loss.chunk is None:
        tokens = (batch.micro or 1) * (batch.seq_len or 1)
        loss = replace(
            loss,
            chunk=filler.fill("loss.chunk", None, stack.chunk_tokens(tokens) or 256, own("loss")),
        )
    method = _method(
        method,
        stack.of_task(task),
        weights.layout != "plain",
        mixed,
        filler,
        own,
        shaped=config is not None,
    )
    if stack.fused_lora and method.kind in ("lora", "qlora") and task in ("sft", "pt"):
        fuses = weights.name != "bnb-int8" and (plan.sharding.kind, plan.sharding.version) != (
            "fsdp",
            1,
        )
        fused = filler.fill("method.fused_lora", method.fused_lora, fuses, own("fused_lora"))
        method = replace(method, fused_lora=fused)
    plan = replace(
        plan,
        method=method,
        precision=precision,
        batch=batch,
        optimizer=optimizer,
        gradient_checkpointing=checkpointing,
        attention=_attention(plan.attention, config, filler),
        loss=loss,
        kernels=filler.fill("kernels", plan.kernels, stack.kernels, own("kernels")),
    )
    if config is None or told == "no":  # axolotl has no loop without autocast to cast for
        return plan
    return replace(plan, precision=_cast_in_part(plan, stack, filler, own("whole_in_fp32")))


def fused_loss(plan: Plan) -> Literal["liger", "unsloth", "cut", "foak", "automodel"]:
    """Whose function a fused loss is, or one in chunks."""
    assert plan.loss is not None
    if plan.stack == "nemo":
        return "automodel"
    if plan.loss.by is not None:
        return plan.loss.by
    if plan.kernels in ("unsloth", "foak"):
        return plan.kernels
    return "cut" if plan.stack == "axolotl" and plan.kernels != "liger" else "liger"


def _cast_in_part(plan: Plan, stack: Stack, filler: _Filler, source: str) -> Precision:
    """What the stack keeps in fp32 of a model that is trained whole, but for what casts it back."""
    assert plan.method is not None and plan.loss is not None
    precision, kind = plan.precision, plan.sharding.kind or "none"
    whole = plan.method.kind in ("full", "partial") and precision.weights != "fp32"
    back = plan.attention == "flash" or kind == "fsdp" or kind.startswith("zero")
    back = back or (plan.loss.kind == "fused" and fused_loss(plan) == "cut")
    if not whole or back:
        return precision
    return replace(
        precision,
        **{
            name: filler.fill(f"precision.{name}", getattr(precision, name), "fp32", source)
            for name in stack.whole_in_fp32
        },
    )


def _attention(
    asked: str | None, config: Mapping[str, Any] | None, filler: _Filler
) -> Literal["eager", "sdpa", "flash"]:
    from ftplan.memory.families import NO_FLASH

    attention: Literal["eager", "sdpa", "flash"] = filler.fill("attention", asked, "sdpa")
    kind = (config or {}).get("model_type")
    if attention != "flash" or kind not in NO_FLASH:
        return attention
    filler.findings.append(
        Finding(
            code="MEM007",
            severity="warning",
            message=f"transformers has no FlashAttention for {kind} and refuses to load it so: "
            "this is its size with sdpa",
            help="use attention: sdpa",
        )
    )
    return "sdpa"


def image(batch: Batch, config: Mapping[str, Any]) -> Image | None:
    """What an image of the batch becomes; None where all have one size."""
    images, seq_len = batch.images or 1, batch.seq_len or 1
    return image_of(config, batch.image_size, images=images, seq_len=seq_len)


def _image_size(batch: Batch, config: Mapping[str, Any], filler: _Filler) -> None:
    """How many tokens an image takes; a size is refused where the model has one of its own."""
    size = batch.image_size
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise InputError(
            f"batch.image_size has {len(size)} numbers, or none above zero",
            remedy="write height and width in pixels: image_size: [448, 672]",
        )
    made = image(batch, config)
    if made is None:
        if size is not None:
            raise InputError(
                "this model's images have one size, or are cut into crops of one",
                remedy="leave image_size out; count the crops of an image as batch.images",
            )
        return
    if made.tokens * (batch.images or 1) > (batch.seq_len or 1):
        raise InputError(
            f"{batch.images} images of {made.tokens:,} tokens in a sequence of {batch.seq_len:,}",
            remedy="image tokens are part of the sequence: raise batch.seq_len, or show smaller "
            "images (batch.image_size)",
        )
    if made.assumed:
        source = f"{made.assumed}; batch.image_size says it"
        filler.assumptions.append(
            Assumption(key="batch.images", value=f"{made.tokens} tokens each", source=source)
        )


def _lengths(batch: Batch, stack: Stack, filler: _Filler, source: str) -> Lengths | None:
    """Lengths of samples; None where every batch is full."""
    given = batch.lengths
    if given is None:
        if batch.packing or stack.lengths == "fixed":
            return None
        filler.fill("batch.lengths", None, stack.lengths, source)
        return Lengths()
    if given.kind == "fixed":
        return None
    if batch.packing:
        raise InputError(
            "packed sequences are full: they do not differ in length",
            remedy="leave batch.lengths out, or use packing: false",
        )
    if (given.mean is None) != (given.deviation is None):
        raise InputError(
            "lengths have a mean and a deviation, and one of them is missing",
            remedy="write batch.lengths: {mean: 800, deviation: 600}, or varied",
        )
    if min(given.mean or 1, given.deviation or 1, given.shortest or 1) <= 0:
        raise InputError("lengths are above zero", remedy="write the tokens of the samples")
    return given


_REFERRED = ("dpo", "kto", "grpo", "ppo")


def _with_task(plan: Plan, config: Mapping[str, Any] | None, filler: _Filler) -> Plan:
    """What a task needs beyond a model and a batch, and what it has no use for."""
    task, method = plan.task or "sft", plan.method
    assert method is not None
    _refuse_unused(plan, task)
    if task in _REFERRED:
        adapted = method.kind not in ("full", "partial")
        default = "adapter" if adapted else "model"
        if task == "grpo":
            default = "none"
        reference = filler.fill(
            "reference", plan.reference, default, "trl/trainer/*_trainer.py 1.16"
        )
        if reference == "adapter" and not adapted:
            raise InputError(
                f"method {method.kind!r} has no adapter to switch off for the reference",
                remedy="use reference: model, or reference: precomputed",
            )
        if reference == "none" and task != "grpo":
            raise InputError(
                f"the task {task!r} compares with a reference",
                remedy="use reference: model, adapter or precomputed; orpo has none",
            )
        plan = replace(plan, reference=reference)
    if task in ("grpo", "ppo") or (task == "distill" and plan.rollout is not None):
        plan = _with_rollout(plan, filler)
    return plan


def _refuse_unused(plan: Plan, task: str) -> None:
    if plan.reference not in (None, "none") and task not in _REFERRED:
        raise InputError(
            f"the task {task!r} has no reference model",
            remedy=f"leave reference out; {', '.join(_REFERRED)} have one",
        )
    if plan.rollout is not None and task not in ("grpo", "ppo", "distill"):
        raise InputError(f"the task {task!r} generates nothing", remedy="leave rollout out")
    if plan.teacher is not None and task != "distill":
        raise InputError(f"the task {task!r} has no teacher", remedy="leave teacher out")


def _with_rollout(plan: Plan, filler: _Filler) -> Plan:
    """Prompt and completion make the sequence; a group is so many sequences."""
    given = plan.rollout or Rollout()
    seq_len = plan.batch.seq_len or 2048
    source = "trl/trainer/grpo_config.py 1.16: use_vllm=False"
    sampler = filler.fill("rollout.sampler", given.sampler, "trainer", source)
    share = given.sampler_share
    if sampler == "colocate":
        source = "trl/trainer/grpo_config.py 1.16: vllm_gpu_memory_utilization"
        share = filler.fill("rollout.sampler_share", share, 0.3, source)
    elif share is not None:
        raise InputError(
            f"sampler_share has no meaning with sampler: {sampler}",
            remedy="use sampler: colocate, or leave sampler_share out",
        )
    prompt, completion = given.prompt_tokens, given.completion_tokens
    if prompt is not None and completion is not None:
        seq_len = prompt + completion
    elif completion is None:
        half = seq_len - prompt if prompt is not None else seq_len // 2
        completion = filler.fill("rollout.completion_tokens", None, half, CONTRACT)
    if completion >= seq_len and any(a.key == "batch.seq_len" for a in filler.assumptions):
        # nobody said how long a sequence is: it is the prompt and what is generated
        filler.assumptions = [a for a in filler.assumptions if a.key != "batch.seq_len"]
        source = "trl/trainer/grpo_config.py before 1.0: max_prompt_length=512"
        prompt = filler.fill("rollout.prompt_tokens", prompt, 512, source)
        seq_len = prompt + completion
    if completion >= seq_len:
        raise InputError(
            f"a completion of {completion:,} tokens in a sequence of {seq_len:,}",
            remedy="give prompt_tokens and completion_tokens; their sum is the sequence",
        )
    group = 8 if plan.task == "grpo" else 1
    generations = filler.fill("rollout.generations", given.generations, group)
    world = (plan.hardware.count or 1) * (plan.hardware.nodes or 1)
    at_once = (plan.batch.micro or 1) * (plan.batch.accumulation or 1) * world
    if at_once % generations:
        filler.findings.append(
            Finding(
                code="MEM004",
                severity="warning",
                message=f"{at_once} completions a step are no whole groups of {generations}: "
                "TRL refuses this",
                help="make micro x accumulation x GPUs a multiple of rollout.generations",
            )
        )
    return replace(
        plan,
        batch=replace(plan.batch, seq_len=seq_len),
        rollout=replace(
            given, sampler=sampler, sampler_share=share, completion_tokens=completion,
            prompt_tokens=seq_len - completion, generations=generations,
        ),
    )  # fmt: skip


_RUN_AS = {"int8": "bnb-int8", "int4": "nf4"}
"""What trainers load a base in that is asked for by its bits alone."""


def _check_trainable(method: Method, weights: Format) -> None:
    """Weights in few bits take no gradients, and QLoRA is LoRA on such weights."""
    if method.kind in ("full", "partial") and not weights.trainable:
        raise InputError(
            f"weights in {weights.name} cannot be trained: method {method.kind!r} needs others",
            remedy="use bf16 or fp32 weights, or an adapter on the quantised ones (qlora)",
        )
    if method.kind == "qlora" and weights.layout == "plain" and weights.trainable:
        raise InputError(
            f"qlora trains adapters on quantised weights, and these are {weights.name}",
            remedy="use nf4 (or another quantised format) for the weights, or the method lora",
        )


def _method(
    method: Method,
    stack: Stack,
    quantised: bool,
    mixed: str,
    filler: _Filler,
    own: Any,
    *,
    shaped: bool,
) -> Method:
    if method.kind == "full":
        return method
    if method.kind == "partial":
        if method.last_layers is None and method.trainable is None:
            raise InputError(
                "method 'partial' does not say what is trained",
                remedy="add last_layers: K, or --last-layers K",
            )
        if method.last_layers is None and shaped:
            raise InputError(
                "which parameters are trained is not said, and this model has a shape",
                remedy="use last_layers: K; a count alone goes with --params",
            )
        return method
    method = _adapted(method, stack, quantised, filler, own)
    if not quantised:
        return method
    return replace(
        method,
        double_quant=filler.fill(
            "method.double_quant", method.double_quant, stack.double_quant, own("double_quant")
        ),
        prepare_kbit=filler.fill(
            "method.prepare_kbit", method.prepare_kbit, stack.prepare_kbit, own("prepare_kbit")
        ),
        compute_dtype=filler.fill(
            "method.compute_dtype", method.compute_dtype, mixed if mixed != "no" else "bf16"
        ),
    )


_TARGETED = (*RANKS, "oft", "boft", "c3a", "fourierft", "road", "beft")
_LEARNED_TOKENS = ("prompt_tuning", "prefix_tuning", "p_tuning")


def _adapted(method: Method, stack: Stack, quantised: bool, filler: _Filler, own: Any) -> Method:
    """The defaults of what the kind of adapter has: a rank, targets, learned tokens, a dtype."""
    kind = method.kind
    check_options(method)
    rank, targets, dtype = method.rank, method.targets, method.adapter_dtype
    if kind in RANKS:
        rank = filler.fill("method.rank", rank, RANKS[kind])
    if kind in _TARGETED:
        targets = filler.fill("method.targets", targets, "all-linear")
    tokens = method.virtual_tokens
    if kind in _LEARNED_TOKENS:
        tokens = filler.fill("method.virtual_tokens", tokens, 20)
    elif kind != "bitfit":
        default = stack.adapter_dtype_quantized if quantised else stack.adapter_dtype
        dtype = filler.fill("method.adapter_dtype", dtype, default, own("adapter_dtype"))
    return replace(
        method, rank=rank, targets=targets, adapter_dtype=dtype, virtual_tokens=tokens,
        dropout=method.dropout or 0.0,
    )  # fmt: skip
