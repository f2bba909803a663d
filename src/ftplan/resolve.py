"""From what a user wrote to a job with every choice made, and the list of what was assumed.

The only place where defaults live: contract defaults first, then the stack's own profile. Names
are looked up in the catalogues; a config.json is read from beside the plan, never from a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftplan.catalog.gpus import GpuRow, find_gpu
from ftplan.catalog.models import resolve_model
from ftplan.catalog.optimizers import find_optimizer
from ftplan.catalog.stacks import Stack, find_stack
from ftplan.dtypes import Format, find_format
from ftplan.errors import FtplanError, InputError, Location, UnsupportedError
from ftplan.memory.env import Environment
from ftplan.memory.families import build, model_types
from ftplan.memory.job import AdapterSpec, Job, ShardingSpec
from ftplan.memory.optimizer import OptimizerSpec, State
from ftplan.memory.parallel import local_config, local_seq_len
from ftplan.memory.tape import ITEM_BYTES
from ftplan.report import Assumption, Finding
from ftplan.spec import Checkpointing, Loss, Method, OptimizerChoice, Plan, Rollout

if TYPE_CHECKING:
    from ftplan.memory.serving import ServingJob

__all__ = ["Resolved", "read_config", "resolve"]

CONTRACT = "ftplan's default"
IMAGE_TOKENS = 1280
"""Tokens of an image where a model takes any resolution (a square of about 1000 pixels in
Qwen-VL), or fewer where the sequence has no room for them."""
ADAPTERS = ("lora", "qlora", "dora")


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


def read_config(path: Path) -> Mapping[str, Any]:
    """A config.json, or the one in a model folder. Nothing it names is opened or run."""
    import json

    file = path / "config.json" if path.is_dir() else path
    where = Location(file=str(file))
    try:
        if file.exists() and not file.is_file():
            raise InputError(f"{file} is not a regular file")
        if file.exists() and file.stat().st_size > MAX_CONFIG_BYTES:
            raise InputError(f"{file} has more than {MAX_CONFIG_BYTES // 2**20} MiB")
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is no text file'}",
            remedy="pass the path of a Hugging Face config.json or of a folder that holds one",
        ) from None
    try:
        config = json.loads(text, parse_constant=_refused_number, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        where = replace(where, line=error.lineno, column=error.colno)
        raise InputError(f"not JSON: {error.msg}", location=where) from None
    except RecursionError:
        raise InputError("it is nested too deep", location=where) from None
    except _BadConfigError as error:
        raise InputError(str(error), location=where) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(
            f"{file} has no model_type", remedy="pass the config.json that lies beside the weights"
        )
    if config["model_type"] in model_types():  # another one is refused by its name
        _check_sizes(config, where)
    return config


MAX_CONFIG_BYTES = 16 * 2**20
_HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model", "dim", "model_dim")
_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip
_VOCABULARY = ("vocab_size", "padded_vocab_size")
_SIZES = (
    *_HIDDEN, *_LAYERS, *_VOCABULARY, "num_decoder_layers", "intermediate_size", "ffn_dim",
    "n_inner", "d_ff", "num_attention_heads", "n_head", "n_heads", "num_heads", "head_dim",
    "num_key_value_heads", "num_local_experts", "n_routed_experts", "moe_intermediate_size",
)  # fmt: skip
_LARGEST = {**dict.fromkeys(_LAYERS, 10_000), "num_decoder_layers": 10_000}


class _BadConfigError(Exception):
    """What a config.json cannot say."""


def _refused_number(text: str) -> float:
    raise _BadConfigError(f"{text} is no size")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise _BadConfigError(f"the key {key!r} is given twice")
        content[key] = value
    return content


def _check_sizes(config: Mapping[str, Any], where: Location) -> None:
    """Sizes are whole numbers above zero, and a model without parts of its own has all of them."""
    for key in _SIZES:
        value = config.get(key)
        for number in value if isinstance(value, list) else [value]:
            most = _LARGEST.get(key, 10**8)
            least = 0 if "experts" in key else 1
            if number is not None and (type(number) is not int or not least <= number <= most):
                raise InputError(
                    f"{key} is {number!r}, it must be a whole number from {least} to {most:,}",
                    location=where,
                )
    if any(isinstance(value, dict) and key.endswith("_config") for key, value in config.items()):
        return  # the parts have sizes of their own, or their class's
    for names in (_HIDDEN, _LAYERS, _VOCABULARY):
        if not any(config.get(name) for name in names):
            raise InputError(
                f"it has no {names[0]}",
                location=where,
                remedy="pass the config.json that lies beside the weights, or --params for the "
                "textbook's sums",
            )


def _folder(path: Path) -> tuple[Mapping[str, Any], tuple[Finding, ...]]:
    """The config at ``path``, held against the weight files beside it when it is a folder."""
    from ftplan.folder import reconciled

    config = read_config(path)
    try:
        build(config)
    except FtplanError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{path} does not describe a {config['model_type']} model"
            + (f": {reason}" if reason else ""),
            remedy="pass the config.json that lies beside the weights",
        ) from error
    return reconciled(config, path) if path.is_dir() else (config, ())


def _model(plan: Plan, base: Path, filler: _Filler) -> tuple[str, Mapping[str, Any] | None]:
    model = plan.model
    if model.config is not None:
        config, findings = _folder(base / model.config)
        filler.findings += findings
        return model.config, config
    if model.name is not None:
        row = resolve_model(model.name).row
        return row.name, row.config
    return f"{model.params:,} parameters", None


def resolve(plan: Plan, *, base: Path | None = None) -> Resolved:
    """Fill every default and look up every name. Relative paths start at ``base``."""
    filler = _Filler()
    name, config = _model(plan, base or Path(), filler)
    stack = find_stack(filler.fill("stack", plan.stack, "transformers"))
    gpu = find_gpu(plan.hardware.gpu) if plan.hardware.gpu else None
    task = filler.fill("task", plan.task, "sft" if plan.method else "serve")
    plan = replace(plan, stack=stack.name, task=task)
    if plan.method is not None and task != "serve":
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


def _native_dtype(config: Mapping[str, Any] | None) -> str | None:
    if config is None:
        return None
    text = config.get("text_config")
    nested = text if isinstance(text, Mapping) else {}
    for source in (config, nested):
        dtype = source.get("dtype") or source.get("torch_dtype")
        if isinstance(dtype, str):
            return find_format(dtype).name
    return None


def _placement(plan: Plan, filler: _Filler) -> Plan:
    hardware, sharding = plan.hardware, plan.sharding
    nodes = hardware.nodes or 1
    split = (sharding.tp or 1) * (sharding.pp or 1) * (sharding.cp or 1)
    ranks = -(-max(split, sharding.ep or 1) // split) * split  # experts lie across the replicas
    least = -(-ranks // nodes)
    source = CONTRACT if least == 1 else "as many as the parallel degrees need"
    count = filler.fill("hardware.count", hardware.count, least, source)
    replicas = count * nodes // split
    if count * nodes % split:
        raise InputError(
            f"{count * nodes} GPUs are no multiple of tp x pp x cp = {split}",
            remedy="make the number of GPUs a multiple of the product of the degrees",
        )
    kind = sharding.kind
    if kind is None:
        kind = "ddp" if replicas > 1 and plan.method is not None else "none"
        if count * nodes > 1:
            filler.fill("sharding.kind", None, kind)
    budget = replace(
        plan.budget, headroom=filler.fill("budget.headroom", plan.budget.headroom, 0.0)
    )
    return replace(
        plan,
        hardware=replace(hardware, count=count, nodes=nodes),
        sharding=replace(sharding, kind=kind),
        budget=budget,
    )


def _serving(plan: Plan, config: Mapping[str, Any] | None, filler: _Filler) -> Plan:
    native = _native_dtype(config)
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


LIGER = frozenset((
    "deepseek_v2", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "gemma3", "glm4", "gpt_oss",
    "internvl", "llama", "llama4_text", "llama4", "llava", "granite", "ministral", "mistral",
    "mixtral", "nemotron", "olmo2", "olmo3", "qwen2", "qwen3", "qwen3_moe", "qwen2_vl",
    "qwen2_5_vl", "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text",
    "qwen3_vl", "qwen3_vl_moe", "smollm3", "phi3", "paligemma", "falcon_h1", "smolvlm",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "exaone4",
))  # fmt: skip
"""liger_kernel/transformers/monkey_patch.py: MODEL_TYPE_TO_APPLY_LIGER_FN, 0.8.5."""


def _check_kernels(plan: Plan, stack: Stack, config: Mapping[str, Any] | None) -> None:
    """Refuse kernels that would not run."""
    model_type = (config or {}).get("model_type")
    if plan.kernels == "liger" and config is not None and model_type not in LIGER:
        raise UnsupportedError(
            f"Liger kernels for model_type {model_type!r}", remedy="use kernels: none"
        )
    if plan.kernels == "unsloth" and stack.name != "unsloth":
        raise InputError(
            f"unsloth's kernels do not come with {stack.title}",
            remedy="use stack: unsloth, or kernels: liger",
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
        default, source = _native_dtype(config) or "bf16", "the checkpoint's dtype"
    else:
        default, source = stack.weights_dtype, own("weights_dtype")
    weights = find_format(filler.fill("precision.weights", plan.precision.weights, default, source))
    mixed = filler.fill("precision.mixed", plan.precision.mixed, "no")
    if config is not None:
        _check_trainable(method, weights)
    precision = replace(plan.precision, weights=weights.name, mixed=mixed)
    batch = replace(
        plan.batch,
        micro=filler.fill("batch.micro", plan.batch.micro, 1),
        seq_len=filler.fill("batch.seq_len", plan.batch.seq_len, 2048),
        accumulation=filler.fill("batch.accumulation", plan.batch.accumulation, 1),
        padding=filler.fill("batch.padding", plan.batch.padding, stack.padding, own("padding")),
        packing=filler.fill("batch.packing", plan.batch.packing, stack.packing, own("packing")),
    )
    if batch.packing and batch.padding == "right":
        raise InputError(
            "packed sequences are full: nothing is padded",
            remedy="use padding: none, or packing: false",
        )
    if batch.images and config is not None and str(config.get("model_type")).startswith("qwen"):
        tokens = min(IMAGE_TOKENS, (batch.seq_len or 1) // batch.images)
        filler.assumptions.append(
            Assumption(
                key="batch.images",
                value=f"{tokens} tokens each",
                source=f"any resolution: at most {IMAGE_TOKENS} tokens, inside batch.seq_len",
            )
        )
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
        checkpointing = replace(checkpointing, reentrant=stack.reentrant)
    loss = plan.loss
    if loss is None:
        kind = stack.loss_kind(method=method.kind, task=plan.task or "sft")
        if plan.kernels == "liger" and kind == "full":
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
    return replace(
        plan,
        method=_method(
            method, stack, weights.layout != "plain", mixed, filler, own, shaped=config is not None
        ),
        precision=precision,
        batch=batch,
        optimizer=optimizer,
        gradient_checkpointing=checkpointing,
        attention=filler.fill("attention", plan.attention, "sdpa"),
        loss=loss,
        kernels=filler.fill("kernels", plan.kernels, stack.kernels, own("kernels")),
    )


_REFERRED = ("dpo", "kto", "grpo")
_NEEDS = {
    "alpha": None, "use_rslora": None,  # move no memory in any method
    "rank": ("lora", "qlora", "dora", "vera", "loha", "lokr", "oft", "boft"),
    "last_layers": ("partial",),
    "trainable": ("partial",),
    "virtual_tokens": ("prompt_tuning", "prefix_tuning", "p_tuning"),
    "bottleneck": ("houlsby", "pfeiffer"),
    "rank_pattern": ("lora", "qlora", "dora", "loha", "lokr"),
    "use_dora": ("lora", "qlora", "dora"),
    "target_parameters": ("lora", "qlora", "dora"),
}  # fmt: skip
"""Keys of a method and the kinds that have a use for them."""


def idle_keys(plan: Plan) -> list[str]:
    """Keys that were given and that this job has no use for."""
    method, optimizer = plan.method, plan.optimizer
    assert method is not None
    idle = [
        f"method.{key}"
        for key, kinds in _NEEDS.items()
        if kinds is not None and getattr(method, key) is not None and method.kind not in kinds
    ]
    quantised = find_format(plan.precision.weights or "bf16").layout != "plain"
    if not quantised:
        keys = ("double_quant", "prepare_kbit", "compute_dtype")
        idle += [f"method.{key}" for key in keys if getattr(method, key)]
    if method.dropout and method.kind in ("full", "partial"):
        idle.append("method.dropout")
    if plan.precision.kv_cache is not None:
        idle.append("precision.kv_cache")
    loss = plan.loss
    if loss is not None and loss.kind == "full" and loss.chunk is not None:
        idle.append("loss.chunk")
    checkpointing = plan.gradient_checkpointing
    if checkpointing is not None and checkpointing.kind == "none" and checkpointing.every != 1:
        idle.append("gradient_checkpointing.every")
    if optimizer is not None:
        row = find_optimizer(optimizer.name)
        if optimizer.momentum and row.name != "sgd":
            idle.append("optimizer.momentum")
        if optimizer.rank is not None and row.rank is None:
            idle.append("optimizer.rank")
    return idle


def _with_task(plan: Plan, config: Mapping[str, Any] | None, filler: _Filler) -> Plan:
    """What a task needs beyond a model and a batch, and what it has no use for."""
    task, method = plan.task or "sft", plan.method
    assert method is not None
    _refuse_unused(plan, task)
    idle = idle_keys(plan)
    if idle:
        filler.findings.append(
            Finding(
                code="MEM005",
                severity="info",
                message=f"nothing here depends on {', '.join(idle)}",
                help="leave it out, or change what it goes with",
            )
        )
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
    if task == "grpo":
        plan = _with_rollout(plan, filler)
    return plan


def _refuse_unused(plan: Plan, task: str) -> None:
    if plan.reference not in (None, "none") and task not in (*_REFERRED, "ppo"):
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
    generations = filler.fill("rollout.generations", given.generations, 8)
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


_RANKED = ("lora", "qlora", "dora", "vera", "loha", "lokr")
_TARGETED = (*_RANKED, "oft", "boft")
_LEARNED_TOKENS = ("prompt_tuning", "prefix_tuning", "p_tuning")


def _adapted(method: Method, stack: Stack, quantised: bool, filler: _Filler, own: Any) -> Method:
    """The defaults of what the kind of adapter has: a rank, targets, learned tokens, a dtype."""
    kind = method.kind
    rank, targets, dtype = method.rank, method.targets, method.adapter_dtype
    if kind in _RANKED:
        rank = filler.fill("method.rank", rank, 16)
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
    sharding = _sharding(plan)
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
        seq_len=local_seq_len(batch.seq_len, _sharding(plan)),
        reentrant=bool(checkpointing.reentrant),
    )
    native = _native_dtype(resolved.config) or "bf16"
    return Job(
        config=local_config(resolved.config, sharding),
        task=plan.task or "sft",
        method="full"
        if method.kind == "full"
        else "partial"
        if method.kind == "partial"
        else "adapter",
        last_layers=method.last_layers or 0,
        adapter=_adapter(method, plan.task) if method.kind not in ("full", "partial") else None,
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
        checkpoint_offload=environment.offload_checkpoints,
        loss_chunk=plan.loss.chunk or 0,
        images=batch.images or 0,
        image_tokens=min(IMAGE_TOKENS, batch.seq_len // (batch.images or 1)),
        optimizer=_optimizer(plan.optimizer),
        main_weights=stack.main_weights and storage.name in ("bf16", "fp16"),
        sharding=sharding,
        labels=_labels(resolved.config),
        reference=plan.reference or "none",
        completion_tokens=(plan.rollout.completion_tokens or 0) if plan.rollout else 0,
        teacher=_teacher(plan),
        generates=plan.rollout is not None and plan.rollout.sampler == "trainer",
        sampler_bytes=_sampler_bytes(plan, gpu),
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
    """``selective``: Megatron's, of attention's core; torchtune's is of every n-th block."""
    selective = checkpointing.kind == "selective" and checkpointing.every == 1
    return selective and stack.name != "torchtune"


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
    from ftplan.memory.serving import ServingJob

    plan = resolved.plan
    assert resolved.config is not None and plan.batch.micro and plan.batch.seq_len
    storage = _stored(plan.precision.weights or "bf16", double_quant=False)
    native = _native_dtype(resolved.config) or "bf16"
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
    from ftplan.memory.tasks import HEADS

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


def _optimizer(choice: OptimizerChoice) -> OptimizerSpec:
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
        keeps_embeddings_fp32="embeddings" in row.keeps_fp32,
        in_backward=row.in_backward if choice.in_backward is None else choice.in_backward,
        others=_optimizer(OptimizerChoice(name=others)) if others else None,
        rank=choice.rank or row.rank or 0,
        source=row.source,
    )


def _sharding(plan: Plan) -> ShardingSpec:
    sharding, hardware = plan.sharding, plan.hardware
    given = {
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
