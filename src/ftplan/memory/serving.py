"""Serving: weights, the key-value cache, and one prefill on top of them.

The cache holds a key and a value of every key-value head for each token of the context, in every
layer that attends; a layer with a sliding window holds the window at most; a layer of latent
attention holds the latent and the rotated part of the key (DeepSeek-V2, arXiv 2405.04434,
section 2.1), which is what engines that serve it keep. Layers without attention hold a state that
does not grow with the context.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.dtypes import Format
from ftplan.memory.cache import CacheLayer, cache_bytes, cache_layers
from ftplan.memory.env import Environment
from ftplan.memory.estimate import Estimate
from ftplan.memory.families import build, complete
from ftplan.memory.prepare import counted_parameters
from ftplan.memory.quantized import quantize
from ftplan.memory.replay import Moment, Program
from ftplan.memory.statics import StaticTerm, weight_bytes
from ftplan.memory.steps import record_serving
from ftplan.memory.tape import ITEM_BYTES

__all__ = ["CacheLayer", "ServingJob", "cache_bytes", "cache_layers", "serve"]


@dataclass(frozen=True, slots=True)
class _Phase:
    """One of the moments that can be the worst."""

    name: str
    static: tuple[StaticTerm, ...]
    moment: Moment

    @property
    def bytes(self) -> int:
        return sum(term.bytes for term in self.static) + self.moment.peak_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingJob:
    """A model to be served, resolved."""

    config: Mapping[str, Any]
    weights: Format
    base_dtype: str
    """Dtype of what a quantised format leaves alone."""
    compute_dtype: str
    cache_format: Format
    environment: Environment
    concurrency: int
    """Sequences in the cache at once."""
    context: int
    """Tokens of each, prompt and answer together."""
    prompt: int = 0
    """Tokens of a prompt, the rest is generated; 0: all of the context."""
    tp: int = 1
    """Tensor parallel degree: heads and matrices are split over so many GPUs."""


def _cache_term(layers: list[CacheLayer], job: ServingJob, context: int) -> StaticTerm:
    """The cache with one sequence at ``context`` tokens and the others full."""
    total = cache_bytes(layers, job.cache_format, job.concurrency - 1, job.context)
    total += cache_bytes(layers, job.cache_format, 1, context)
    groups: dict[CacheLayer, int] = {}
    for layer in layers:
        groups[layer] = groups.get(layer, 0) + 1
    parts = [
        f"{count} {layer.kind} layers x {layer.values:,} values x "
        f"{min(context, layer.window or context):,} tokens"
        for layer, count in groups.items()
        if layer.values
    ]
    parts += [
        f"{count} layers x {layer.state:,} values of state"
        for layer, count in groups.items()
        if layer.state
    ]
    return StaticTerm(
        name="kv_cache/keys_and_values",
        bytes=-(-total // job.tp),
        formula=f"{job.concurrency} sequences x ({' + '.join(parts)}) in {job.cache_format.name}",
        source="one key and one value per key-value head, layer and token",
    )


def serve(job: ServingJob) -> Estimate:
    """The worst moment of serving: a prompt goes through, or the cache grows to its full size.

    A prompt of the whole length finds the cache full; after a shorter one each token generated
    copies the keys of a layer into a longer tensor, at the end of all tokens.
    """
    network = build(job.config)
    quantized = job.weights.name not in ITEM_BYTES
    for parameter, _, _ in counted_parameters(network):
        parameter.dtype = job.base_dtype if quantized else job.weights.name
        parameter.trainable = False
    if quantized:
        for stage in network.stages:
            for block in stage.stack.kinds:
                quantize(block, job.weights, job.compute_dtype)
    counted = counted_parameters(network)
    weights = sum(weight_bytes(parameter) * times for parameter, times, _ in counted)
    layers = cache_layers(network, complete(job.config))
    held = StaticTerm(
        name="weights/all",
        bytes=-(-weights // job.tp),
        formula=f"{sum(p.numel * n for p, n, _ in counted):,} parameters in {job.weights.name}"
        + (f" / {job.tp} GPUs" if job.tp > 1 else ""),
        source="shapes from config.json",
    )
    recording = record_serving(network, job.environment)
    program = Program(recording, recording.phases())
    prompt = min(job.prompt or job.context, job.context)
    prefill = _Phase("prefill", (held, _cache_term(layers, job, prompt)), program.moment(1, prompt))
    phases = [prefill]
    if prompt < job.context:
        cache = _cache_term(layers, job, job.context)
        growth = _growth_term(layers, job)
        phases.append(_Phase("generation", (held, cache, growth), program.moment(1, 1)))
    worst = max(phases, key=lambda phase: phase.bytes)
    return Estimate(
        peak_bytes=worst.bytes,
        peak_phase=worst.name,
        phases=(("load", held.bytes), *((phase.name, phase.bytes) for phase in phases)),
        static=worst.static,
        alive=worst.moment.alive,
        step_temporary_bytes=0,
        total_params=sum(p.numel * n for p, n, _ in counted),
        trainable_params=0,
    )


def _growth_term(layers: list[CacheLayer], job: ServingJob) -> StaticTerm:
    """``torch.cat`` of a layer's keys and the new token's: the longer tensor beside the old one."""
    keys = max(cache_bytes([layer], job.cache_format, job.concurrency, job.context)
               for layer in layers) // 2  # fmt: skip
    return StaticTerm(
        name="kv_cache/growth",
        bytes=-(-keys // job.tp),
        formula="the keys of one layer, once more",
        source="transformers src/transformers/cache_utils.py: DynamicLayer.update, 5.23.0",
    )
