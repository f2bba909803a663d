"""Serving: weights, the key-value cache, and one prefill on top of them.

The cache holds a key and a value of every key-value head for each token of the context, in every
layer that attends; a layer with a sliding window holds the window at most; a layer of latent
attention holds the latent and the rotated part of the key (DeepSeek-V2, arXiv 2405.04434,
section 2.1), which is what engines that serve it keep. Layers without attention hold a state that
does not grow with the context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftplan.dtypes import Format
from ftplan.memory.cache import CacheLayer, cache_bytes, cache_layers
from ftplan.memory.env import Environment
from ftplan.memory.estimate import Estimate
from ftplan.memory.families import build, complete
from ftplan.memory.prepare import counted_parameters
from ftplan.memory.quantized import quantize
from ftplan.memory.record import record_serving
from ftplan.memory.replay import Program
from ftplan.memory.statics import StaticTerm, weight_bytes
from ftplan.memory.tape import ITEM_BYTES

__all__ = ["CacheLayer", "ServingJob", "cache_bytes", "cache_layers", "serve"]


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
    tp: int = 1
    """Tensor parallel degree: heads and matrices are split over so many GPUs."""


def _cache_term(layers: list[CacheLayer], job: ServingJob) -> StaticTerm:
    total = cache_bytes(layers, job.cache_format, job.concurrency, job.context)
    groups: dict[CacheLayer, int] = {}
    for layer in layers:
        groups[layer] = groups.get(layer, 0) + 1
    parts = [
        f"{count} {layer.kind} layers x {layer.values:,} values x "
        f"{min(job.context, layer.window or job.context):,} tokens"
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
    """The worst moment of serving: the cache is full and one prompt of full length goes through."""
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
    static = [
        StaticTerm(
            name="weights/all",
            bytes=-(-weights // job.tp),
            formula=f"{sum(p.numel * n for p, n, _ in counted):,} parameters in {job.weights.name}"
            + (f" / {job.tp} GPUs" if job.tp > 1 else ""),
            source="shapes from config.json",
        ),
        _cache_term(layers, job),
    ]
    recording = record_serving(network, job.environment)
    program = Program(recording, recording.phases())
    moment = program.moment(1, job.context)
    base = sum(term.bytes for term in static)
    return Estimate(
        peak_bytes=base + moment.peak_bytes,
        peak_phase="prefill",
        phases=(("load", static[0].bytes), ("prefill", base + moment.peak_bytes)),
        static=tuple(static),
        alive=moment.alive,
        step_temporary_bytes=0,
        total_params=sum(p.numel * n for p, n, _ in counted),
        trainable_params=0,
    )
