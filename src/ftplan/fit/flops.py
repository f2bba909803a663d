"""Floating point operations of a step, from the shapes of the network that is trained.

A matrix of m x n costs 2 m n operations a token forward, as many for the gradient of its input
and as many for its own. Frozen matrices have no gradient of their own, blocks before the first
that is trained have none at all, and a checkpointed block runs forward twice. Experts count with
those that a token is sent to. Attention costs 4 d operations for each head and pair of tokens
forward; a kernel that knows the mask is causal visits half of the pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftplan.memory.attention import Heads
from ftplan.memory.job import Job
from ftplan.memory.nn import Embedding, Module, Network
from ftplan.memory.tape import Parameter

__all__ = ["Compute", "Work", "compute_of", "hidden_of"]

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k",
          "moe_k", "num_selected_experts")  # fmt: skip
_WIDTH = ("hidden_size", "d_model", "n_embd", "dim")
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts",
            "num_routed_experts")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Operations of one micro batch on one GPU."""

    forward: int
    recompute: int
    backward: int
    attention: int
    """Of all these, what is spent on scores and their product with the values."""

    @property
    def total(self) -> int:
        """All that the card computes."""
        return self.forward + self.recompute + self.backward

    @property
    def model(self) -> int:
        """What the model asks for: without what checkpointing computes twice."""
        return self.forward + self.backward


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attention:
    width: int
    """Heads x (key size + value size)."""
    window: int | None
    causal: bool
    skips: bool
    """The kernel does not compute what the mask hides."""
    recomputed: bool
    backward: bool

    def pairs(self, seq_len: int) -> int:
        """Query-key pairs of one sequence that are computed."""
        if not self.skips:
            return seq_len * seq_len
        reach = min(seq_len, self.window or seq_len)
        if not self.causal:
            return seq_len * min(seq_len, 2 * reach)
        return seq_len * reach - reach * (reach - 1) // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """A job's operations as a function of its batch."""

    forward_per_token: int
    recompute_per_token: int
    backward_per_token: int
    attention: tuple[_Attention, ...]
    kernel_flash: bool
    """The backward kernel computes the scores anew: 5 products where there are 4."""

    def at(self, micro: int, seq_len: int) -> Work:
        """Operations for ``micro`` sequences of ``seq_len`` tokens."""
        tokens = micro * seq_len
        forward = recompute = backward = 0
        for layer in self.attention:
            once = 2 * micro * layer.pairs(seq_len) * layer.width
            forward += once
            recompute += once if layer.recomputed else 0
            backward += (once * (5 if self.kernel_flash else 4) // 2) if layer.backward else 0
        attention = forward + recompute + backward
        return Work(
            attention=attention,
            forward=forward + tokens * self.forward_per_token,
            recompute=recompute + tokens * self.recompute_per_token,
            backward=backward + tokens * self.backward_per_token,
        )


def _number(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    text = config.get("text_config")
    for source in (config, text if isinstance(text, Mapping) else {}):
        for name in names:
            if isinstance(source.get(name), int):
                return int(source[name])
    return None


def _per_token(module: Module, config: Mapping[str, Any], *, trained: bool = False) -> int:
    """Forward operations a token of the matrices below ``module``; only trained ones if asked."""
    experts, top_k = _number(config, _EXPERTS), _number(config, _TOP_K)
    total = 0
    seen: set[int] = set()
    for _, owner in module.named_modules():
        if isinstance(owner, Embedding):
            continue
        for parameter in owner.parameters.values():
            if len(parameter.shape) < 2 or id(parameter) in seen:
                continue
            if trained and not parameter.trainable:
                continue
            seen.add(id(parameter))
            total += _product(parameter, experts, top_k)
    return total


def _product(parameter: Parameter, experts: int | None, top_k: int | None) -> int:
    if experts and top_k and len(parameter.shape) == 3 and parameter.shape[0] == experts:
        return 2 * parameter.numel // experts * top_k
    return 2 * parameter.numel


def _attention(
    block: Module,
    config: Mapping[str, Any],
    layer: int,
    job: Job,
    *,
    recomputed: bool,
    backward: bool,
) -> list[_Attention]:
    found: list[_Attention] = []
    capable = (job.environment.capability or (8, 0)) >= (8, 0)
    fused = job.environment.attention != "eager" and not job.environment.padding_mask and capable
    for _, module in block.named_modules():
        heads = getattr(module, "heads", None)
        if not isinstance(heads, Heads):
            continue
        value = heads.value_size or heads.size
        kind = getattr(module, "layer_type", "")
        window = config.get("sliding_window")
        slides = kind in ("sliding_attention", "chunked_attention") or (
            not kind and bool(config.get("use_sliding_window"))
        )
        found.append(
            _Attention(
                width=heads.count * (heads.size + value),
                window=int(window) if slides and window else None,
                causal=heads.causal,
                skips=fused,
                recomputed=recomputed,
                backward=backward,
            )
        )
    if not found and any("attn" in name or "attention" in name for name in block.children):
        # a family whose module does not say its heads: they are as wide as the model
        width = 2 * (_number(config, _WIDTH) or 0)
        found.append(
            _Attention(
                width=width,
                window=None,
                causal=True,
                skips=fused,
                recomputed=recomputed,
                backward=backward,
            )
        )
    return found


def hidden_of(config: Mapping[str, Any]) -> int:
    """Width of the model."""
    return _number(config, _WIDTH) or 2048


def compute_of(network: Network, job: Job) -> Compute:
    """The operations of ``network`` as ``job`` trains it."""
    config = job.config
    forward = recompute = backward = 0
    attention: list[_Attention] = []
    flows = job.checkpoint_every > 0 or any(
        parameter.trainable
        for name, parameter in network.named_parameters()
        if "embed" in name or parameter.added
    )
    for stage in network.stages:
        kinds = [
            (
                _per_token(block, config),
                _per_token(block, config, trained=True),
                any(p.trainable for _, p in block.named_parameters()),
            )
            for block in stage.stack.kinds
        ]
        for layer, kind in enumerate(stage.stack.pattern):
            once, own, trains = kinds[kind]
            again = job.checkpoint_every > 0 and layer % job.checkpoint_every == 0
            back = flows or trains
            forward += once
            recompute += once if again and back else 0
            backward += (once + own) if back else 0
            attention += _attention(
                stage.stack.kinds[kind], config, layer, job,
                recomputed=again and back, backward=back,
            )  # fmt: skip
            flows = flows or trains
    head = network.head_parameters()
    for parameter in head:
        if len(parameter.shape) >= 2:
            forward += 2 * parameter.numel
            backward += 2 * parameter.numel * (1 + parameter.trainable)
    return Compute(
        forward_per_token=forward,
        recompute_per_token=recompute,
        backward_per_token=backward,
        attention=tuple(attention),
        kernel_flash=job.environment.attention != "eager",
    )
