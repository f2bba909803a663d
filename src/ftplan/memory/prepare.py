"""The network as the job trains it: storage dtypes, what is frozen, adapters in place."""

from __future__ import annotations

from collections.abc import Iterator

from ftplan.errors import InputError, UnsupportedError
from ftplan.memory.adapters import adapt, distinguish
from ftplan.memory.adapters.lora import LoraLinear
from ftplan.memory.dispatch import spread_experts
from ftplan.memory.families import build
from ftplan.memory.families.native import native
from ftplan.memory.job import Job
from ftplan.memory.nn import Network
from ftplan.memory.parallel import refuse_whole_attention
from ftplan.memory.planned import follow_plan, refuse_adapters, split_vocabulary
from ftplan.memory.quantized import KEPT_BY_PREPARATION, QuantizedLinear, quantize
from ftplan.memory.sequence import split_sequence
from ftplan.memory.tape import ITEM_BYTES, Parameter

__all__ = ["counted_parameters", "prepare"]

HEADS = ("score", "classifier")
"""Linear layers outside the blocks that are never quantised."""


def prepare(job: Job) -> Network:
    """Build the model of the job and bring every weight to the state it is trained in."""
    if job.modules:
        return native(job)
    labels = {"rm": None if job.value_head else 1, "classify": job.labels}.get(job.task)
    network = build(job.config, labels=labels)
    if job.checkpoint_every and not network.checkpoints:
        raise UnsupportedError(
            f"gradient checkpointing of model_type {job.config.get('model_type')!r}",
            remedy="set gradient_checkpointing: false; transformers has none for its class",
        )
    if job.sharding.tp > 1 and not job.sharding.planned:
        refuse_whole_attention(network, job.config)
    if job.images:
        network.show(job.images, job.image, checkpointed=job.checkpoint_every > 0)
    if job.task == "embed":
        network.drop_head()
    if job.method == "partial":
        last = network.stages[-1].stack
        if last.shared:
            raise UnsupportedError(
                "partial finetuning of layers that share their weights",
                remedy="use the method full or lora",
            )
        if job.last_layers > last.count:
            raise InputError(
                f"last_layers is {job.last_layers}, the model has {last.count}",
                remedy=f"write at most {last.count}, or the method full",
            )
        last.split(lambda layer: layer >= last.count - job.last_layers)
    if job.sharding.planned:
        follow_plan(network, job.config, job.sharding)
    elif job.sharding.tp > 1 and not job.sharding.megatron:
        split_vocabulary(network, job.sharding.tp)
    distinguish(network, job)
    if job.sharding.spread:
        spread_experts(network, job.sharding)
    quantized = job.weights.name not in ITEM_BYTES
    casts = job.prepare_kbit and not job.weights.name.startswith(KEPT_BY_PREPARATION)
    plain = ("fp32" if casts else job.base_dtype) if quantized else job.weights.name
    network.loaded_dtype = job.base_dtype
    for parameter in _everything(network):
        parameter.dtype = plain
        parameter.trainable = job.method == "full" and not parameter.fixed
    for parameter in _kept_in_fp32(network, norms=job.norms_in_fp32):
        parameter.dtype = "fp32"
    for dtype, cast in ((job.norm_dtype, _norms), (job.embedding_dtype, _embeddings)):
        if dtype is not None:
            for parameter in cast(network):
                parameter.dtype = dtype
    if quantized and casts and job.kbit_casts_back:
        for matrix in _embeddings_and_head(network):
            matrix.dtype = job.base_dtype
    if job.method == "partial":
        _train_last(network, job.last_layers)
    if quantized:
        skipped = (*network.unquantised, network.head_name.rpartition(".")[2], *HEADS)
        quantize(network, job.weights, job.compute_dtype, whole=skipped)
        for stage in network.stages:
            for block in stage.stack.kinds:
                quantize(
                    block, job.weights, job.compute_dtype, whole=network.unquantised,
                    experts=job.separate_experts,
                )  # fmt: skip
    if job.adapter is not None:
        adapt(network, job)
        if quantized:
            _refuse_packed(network, job.adapter.kind)
        if job.sharding.planned:
            refuse_adapters(network, job.config)
        if job.environment.kernels.lora == "unsloth":
            network.buffer_bytes += _expanded_buffer(network)
    if job.sharding.sequence_parallel and job.sharding.tp > 1:
        split_sequence(network, job.config, job.sharding)
    if job.task == "rm" and job.value_head:
        network.value()
    if job.trainable_dtype is not None:
        for parameter in _everything(network):
            if parameter.trainable:
                parameter.dtype = job.trainable_dtype
    return network


def _refuse_packed(network: Network, kind: str) -> None:
    """No gradient reaches a packed weight: PEFT's own targets may name one (a projector's)."""
    packed = [
        (name, parameter.dtype)
        for name, parameter in _named(network)
        if parameter.trainable and parameter.dtype not in ITEM_BYTES
    ]
    if packed:
        name, dtype = packed[0]
        raise UnsupportedError(
            f"{kind} of {name}, which is stored in {dtype},",
            because="it cannot be trained",
            remedy="name other targets, or use a base that is not quantised",
        )


def _norms(network: Network) -> Iterator[Parameter]:
    """What LLaMA-Factory (``upcast_layernorm``, 0.9.5) and axolotl cast by name."""
    for path, parameter in _named(network):
        if len(parameter.shape) == 1 and ("norm" in path or "ln" in path):
            yield parameter


EMBEDDINGS = ("embed_tokens", "lm_head", "embed_in", "embed_out", "word_embeddings")
"""Names that axolotl casts by (loaders/utils.py, ``get_linear_embedding_layers``, 0.19.0)."""


def _embeddings(network: Network) -> Iterator[Parameter]:
    for path, parameter in network.named_parameters():
        if any(name in path for name in EMBEDDINGS) and path.endswith("weight"):
            yield parameter


def _named(network: Network) -> Iterator[tuple[str, Parameter]]:
    blocks = [block for stage in network.stages for block in stage.stack.kinds]
    for root in (network, *blocks):
        yield from root.named_parameters()


def _kept_in_fp32(network: Network, *, norms: bool) -> Iterator[Parameter]:
    """What the class loads in fp32 in any case, by parts of its name; with ``norms``, those too."""
    for path, parameter in _named(network):
        kept = any(f".{name}." in f".{path}." for name in network.kept_in_fp32)
        if kept or (norms and "norm" in path):
            yield parameter


def _expanded_buffer(network: Network) -> int:
    """Unsloth's two global buffers: its largest 4-bit matrix in two bytes, and its scales in four.

    ``fast_dequantize`` with ``use_global_buffer``, unsloth/kernels/utils.py 2026.8.19.
    """
    blocks = [block for stage in network.stages for block in stage.stack.kinds]
    modules = [module for root in (network, *blocks) for _, module in root.named_modules()]
    elements = [
        module.in_features * module.out_features
        for module in modules
        if isinstance(module, LoraLinear)
        and isinstance(module.base_layer, QuantizedLinear)
        and module.base_layer.four_bit
    ]
    largest = max(elements, default=0)
    return largest * 2 + largest // 64 * 4


def _embeddings_and_head(network: Network) -> Iterator[Parameter]:
    """What TRL casts back by name (``peft_module_casting_to_bf16``, 0.13)."""
    for name, parameter in network.named_parameters():
        if "norm" not in name and name.endswith("weight") and len(parameter.shape) > 1:
            yield parameter


def _train_last(network: Network, count: int) -> None:
    stack = network.stages[-1].stack
    for kind in set(stack.pattern[stack.count - count :]):
        for _, parameter in stack.kinds[kind].named_parameters():
            parameter.trainable = not parameter.fixed


def _everything(network: Network) -> Iterator[Parameter]:
    """Each parameter object once, of one block of each kind."""
    for parameter, _, _ in counted_parameters(network):
        yield parameter


def counted_parameters(network: Network) -> list[tuple[Parameter, int, bool]]:
    """Every parameter object once: how many tensors it stands for, and whether it is in a block."""
    counted: dict[int, tuple[Parameter, int, bool]] = {}
    for _, parameter in network.named_parameters():
        counted[id(parameter)] = (parameter, 1, False)
    for stage in network.stages:
        stack = stage.stack
        for kind, block in enumerate(stack.kinds):
            times = 1 if stack.shared else stack.pattern.count(kind)
            for _, parameter in block.named_parameters():
                counted[id(parameter)] = (parameter, times, True)
    return list(counted.values())
