"""LitGPT's own modules: ``GPT``, its blocks, and the loop that finetunes them.

Source: Lightning-AI/litgpt litgpt/model.py, finetune/{lora,full,adapter,adapter_v2}.py and
utils.py (``chunked_cross_entropy``), 0.5.13; :data:`ERAS` says what was otherwise before. Fabric
stands around the model: what it returns is cast to fp32 (lightning/fabric/wrappers.py,
``_FabricModule.forward``; plugins/precision/half.py, ``convert_output``), and a model that is not
quantised is in the precision's dtype throughout.

The loop calls the logits ``logits`` and the loss ``loss``: both names, and through them the graph,
last until the next batch has gone through the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ftplan.dataclass import dataclass
from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend
from ftplan.memory.families import complete
from ftplan.memory.families.native.base import (
    Native,
    capped_streamed,
    cast_streamed,
    repeated,
    shifted,
    streamed_loss,
    targets,
    without_bytes,
)
from ftplan.memory.job import Job
from ftplan.memory.nn import (
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Shared,
    Stack,
    Stage,
    activation,
)
from ftplan.memory.tape import CHUNK, ONE, SEQ, SQUARE, TOKENS, Grads, Tape, Tensor

__all__ = [
    "CHECKPOINTS",
    "ERAS",
    "METHODS",
    "WEIGHTS",
    "Era",
    "Shape",
    "build",
    "losses",
    "model_types",
    "shape_of",
]

Config = Mapping[str, Any]

HEAD_CHUNK = 128
"""``lm_head_chunk_size``: so many tokens of each sequence meet the output matrix together."""
METHODS = ("full", "lora", "qlora", "llama_adapter", "llama_adapter_v2")
WEIGHTS = ("bf16", "fp16", "fp32", "nf4", "nf4-dq", "fp4", "fp4-dq")
CHECKPOINTS: tuple[str, ...] = ()
FSDP = {"litgpt": 1, "litgpt-0.4": 1}


_FIRST = ("llama", "mistral", "phi", "gpt_neox", "falcon", "stablelm")
_KNOWN = {
    "litgpt-2023": _FIRST,
    "litgpt-0.3": (*_FIRST, "gemma"),
    "litgpt-0.4": (*_FIRST, "gemma", "gemma2", "phi3"),
    "litgpt": (*_FIRST, "gemma", "gemma2", "gemma3_text", "phi3", "qwen2", "qwen3", "olmo2"),
}


def model_types(modules: str, _method: str) -> tuple[str, ...]:
    """Architectures in the ``config.py`` of the time."""
    return _KNOWN[modules]


def losses(_modules: str, method: str) -> tuple[str, ...]:
    """How the loop meets the logits: no key of LitGPT changes it."""
    return ("full",) if method == "full" else ("chunked",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Era:
    """What LitGPT did at a time, and the libraries it was pinned to."""

    interleaved: bool = False
    """Queries, keys and values of a group lie together: they are copied apart."""
    caps_chunks: bool = True
    """Logits in chunks are capped as well (Gemma 2)."""
    pads_by_copy: bool = False
    """``zero_pad`` fills another tensor, out of place."""
    index: Literal["made", "kept", "cloned"] = "cloned"
    """Where ``zero_pad`` has its indices from: made anew, kept, or a copy of what is kept."""
    weight_after_cast: bool = False
    """RMSNorm casts back before it multiplies by its weight."""
    windows: Literal["all", "interleaved", "none"] = "all"
    """Layers with a sliding window make a mask: all of them, or those of Gemma 2 alone (Mistral's
    and Phi-3's had none until be8b28da, 0.5.0)."""
    stable_embedding: bool = True
    """A quantised model gets a second embedding, which takes gradients that nothing clears."""
    longest_first: bool = False
    """The batch of the longest sample is the first: none of full length comes before it."""

    def slides(self, shape: Shape, layer: int) -> bool:
        """Whether a layer has a sliding window."""
        indices = shape.sliding_window_indices
        if (
            not indices
            or self.windows == "none"
            or (self.windows == "interleaved" and all(indices))
        ):
            return False
        return bool(indices[layer])


ERAS = {
    "litgpt": Era(),
    "litgpt-0.4": Era(
        interleaved=True, caps_chunks=False, index="kept", windows="interleaved",
        stable_embedding=False,
    ),
    "litgpt-0.3": Era(
        interleaved=True, caps_chunks=False, pads_by_copy=True, index="made",
        weight_after_cast=True, windows="none", stable_embedding=False,
    ),
    "litgpt-2023": Era(
        interleaved=True, caps_chunks=False, pads_by_copy=True, index="made",
        windows="none", stable_embedding=False, longest_first=True,
    ),
}  # fmt: skip
"""0.5.13; 0.4.0 to 0.4.13; March to May 2024 (commit 5895df10); lit-gpt of October 2023
(commit 0cc02afa)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """An architecture in the words of ``litgpt.config.Config``."""

    n_layer: int
    n_embd: int
    n_head: int
    n_query_groups: int
    head_size: int
    intermediate_size: int
    padded_vocab_size: int
    norm_class_name: str = "RMSNorm"
    mlp_class_name: str = "LLaMAMLP"
    bias: bool = False
    attn_bias: bool = False
    lm_head_bias: bool = False
    parallel_residual: bool = False
    shared_attention_norm: bool = False
    rotary_percentage: float = 1.0
    scale_embeddings: bool = False
    norm_1: bool = True
    norm_2: bool = True
    post_attention_norm: bool = False
    post_mlp_norm: bool = False
    norm_qk: bool = False
    norm_qk_type: str = "default"
    attention_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window_size: int | None = None
    sliding_window_indices: tuple[int, ...] | None = None
    rope_local_base_freq: float | None = None

    @property
    def offset(self) -> bool:
        """Gemma's RMSNorm adds one to its weight."""
        return self.scale_embeddings

    @property
    def rope_n_elem(self) -> int:
        """How much of a head is rotated."""
        return int(self.rotary_percentage * self.head_size)


_NEOX = {"norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP"}
_GEMMA = {"mlp_class_name": "GemmaMLP", "scale_embeddings": True}
_SANDWICH = {"post_attention_norm": True, "post_mlp_norm": True}


def _fields(config: Config, kind: str) -> dict[str, Any]:
    """What an architecture does differently from Llama (litgpt/config.py)."""
    if kind in ("gpt_neox", "phi"):
        return {
            **_NEOX, "bias": True,
            "lm_head_bias": kind == "phi",
            "parallel_residual": kind == "phi" or bool(config.get("use_parallel_residual", True)),
            "shared_attention_norm": kind == "phi",
        }  # fmt: skip
    if kind == "falcon":
        two_norms = config.get("new_decoder_architecture") and (
            config.get("num_ln_in_parallel_attn") in (None, 2)
        )
        return {**_NEOX, "parallel_residual": True, "shared_attention_norm": not two_norms}
    if kind == "stablelm":
        return {"norm_class_name": "LayerNorm", "attn_bias": bool(config.get("use_qkv_bias"))}
    if kind == "qwen2":
        return {"attn_bias": True}
    if kind == "qwen3":
        return {"norm_qk": True}
    if kind == "olmo2":
        return {**_SANDWICH, "norm_1": False, "norm_2": False, "norm_qk": True,
                "norm_qk_type": "olmo2"}  # fmt: skip
    if kind == "gemma":
        return dict(_GEMMA)
    if kind == "gemma2":
        return {
            **_GEMMA, **_SANDWICH,
            "attention_logit_softcapping": config.get("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": config.get("final_logit_softcapping", 30.0),
        }  # fmt: skip
    if kind == "gemma3_text":
        return {**_GEMMA, **_SANDWICH, "norm_qk": True, "rope_local_base_freq": 10000.0}
    return {}


def _windows(config: Config, kind: str, layers: int) -> tuple[int, ...] | None:
    """Which layers have a window (``sliding_window_indices``)."""
    if not config.get("sliding_window") or kind not in ("mistral", "phi3", "gemma2", "gemma3_text"):
        return None
    every = {"gemma2": 2, "gemma3_text": 6}.get(kind)
    if every == 2:
        return tuple(1 - layer % 2 for layer in range(layers))
    return tuple(1 if every is None else int((layer + 1) % every != 0) for layer in range(layers))


def shape_of(raw: Config) -> Shape:
    """A config.json in LitGPT's words."""
    config = complete(raw)
    kind = str(config["model_type"])
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    if kind == "falcon":
        many = config.get("new_decoder_architecture")
        groups = (config.get("num_kv_heads") or heads) if many else 1
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    share = rope.get("partial_rotary_factor")
    share = share or config.get("rotary_pct", config.get("partial_rotary_factor"))
    layers = config["num_hidden_layers"]
    windows = _windows(config, kind, layers)
    return Shape(
        n_layer=layers,
        n_embd=hidden,
        n_head=heads,
        n_query_groups=groups,
        head_size=config.get("head_dim") or hidden // heads,
        intermediate_size=config.get("intermediate_size")
        or config.get("ffn_hidden_size")
        or 4 * hidden,
        padded_vocab_size=config["vocab_size"],
        rotary_percentage=1.0 if share is None else float(share),
        sliding_window_size=config["sliding_window"] if windows else None,
        sliding_window_indices=windows,
        **_fields(config, kind),
    )


class RMSNorm(Module):
    """In fp32, written out in elementwise steps."""

    def __init__(self, width: int, *, offset: bool, era: Era) -> None:
        super().__init__()
        self.offset = offset
        self.late = not era.weight_after_cast
        self.weight = self.parameter("weight", width)

    def forward(self, x: Tensor) -> Tensor:
        dtype, weight = x.dtype, x.tape.leaf(self.weight)
        hidden = ops.to(x, "fp32")
        mean = ops.mean(ops.mul(hidden, hidden))
        normed = ops.mul(hidden, ops.unary(ops.shift(mean), "rsqrt", "output"))
        if not self.late:
            normed = ops.to(normed, dtype)
            return ops.mul(normed, ops.shift(weight) if self.offset else weight)
        weight = ops.shift(weight) if self.offset else weight
        return ops.to(ops.mul(normed, ops.to(weight, "fp32")), dtype)


def _norm(shape: Shape, era: Era, width: int) -> Module:
    if shape.norm_class_name == "LayerNorm":
        return LayerNorm(width)
    return RMSNorm(width, offset=shape.offset, era=era)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions with fp32 sines: each product in fp32, the sum cast back."""
    half = x.width // 2
    first, second = ops.part(x, half), ops.part(x, half)
    rotated = ops.cat((ops.neg(second), first))
    return ops.to(ops.add(ops.mul(x, cos), ops.mul(rotated, sin)), x.dtype)


class CausalSelfAttention(Module):
    """Queries, keys and values in one matrix, keys and values repeated for each query head."""

    def __init__(self, shape: Shape, era: Era, layer: int) -> None:
        super().__init__()
        self.shape, self.era = shape, era
        count, groups, size = shape.n_head, shape.n_query_groups, shape.head_size
        self.wide, self.narrow = count * size, groups * size
        self.qkv: Module = Linear(
            shape.n_embd, self.wide + 2 * self.narrow, bias=shape.bias or shape.attn_bias
        )
        self.proj: Module = Linear(self.wide, shape.n_embd, bias=shape.bias)
        self.heads = Heads(
            count=count, kv_count=count, size=size, value_size=size,
            softcap=shape.attention_logit_softcapping is not None,
        )  # fmt: skip
        self.slides = era.slides(shape, layer)
        if shape.norm_qk:
            whole = shape.norm_qk_type == "olmo2"
            self.norm_q = _norm(shape, era, self.wide if whole else size)
            self.norm_k = _norm(shape, era, self.narrow if whole else size)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        qkv = self.qkv.forward(x)
        q, k, v = ops.split(qkv, [self.wide, self.narrow, self.narrow])
        whole = self.shape.norm_qk_type == "olmo2"
        if self.shape.norm_qk and whole:
            q, k = self.norm_q.forward(q), self.norm_k.forward(k)
        if self.era.interleaved:
            q, k, v = self._apart(q, k, v)
        if self.shape.norm_qk and not whole:
            q, k = self._by_head(self.norm_q, q), self._by_head(self.norm_k, k)
        q_roped, k_roped = self._roped(q, shared), self._roped(k, shared)
        q, k = self._joined(q_roped, q), self._joined(k_roped, k)
        if not self.era.interleaved:
            repeats = self.shape.n_head // self.shape.n_query_groups
            k, v = ops.expand_heads(k, repeats), ops.expand_heads(v, repeats)
        y = self.attend(q, k, v, self._window(q.tape, q.dtype) if self.slides else None)
        out: Tensor = self.proj.forward(y)
        return out

    def _apart(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Until 0.5.4 the parts of a group lay side by side: all but one head a group is copied."""
        repeats = self.shape.n_head // self.shape.n_query_groups
        if repeats == 1:
            return q, k, v
        size = self.shape.head_size
        q = ops.copy(q) if self.shape.n_query_groups > 1 else q
        return q, repeated(k, repeats, size), repeated(v, repeats, size)

    def _by_head(self, norm: Module, x: Tensor) -> Tensor:
        rows = x.rows * (x.width // self.shape.head_size)
        out: Tensor = norm.forward(ops.view(x, rows, self.shape.head_size))
        return ops.view(out, x.rows, x.width)

    def _turned(self, x: Tensor) -> int:
        return x.width // self.shape.head_size * self.shape.rope_n_elem

    def _roped(self, x: Tensor, shared: Shared) -> Tensor:
        cos, sin = shared.rope[""]
        turned = self._turned(x)
        return apply_rope(x if turned == x.width else ops.part(x, turned), cos, sin)

    def _joined(self, roped: Tensor, x: Tensor) -> Tensor:
        """The rotated part and the rest, even where there is no rest."""
        return ops.cat((roped, ops.part(x, x.width - self._turned(x))))

    def _window(self, tape: Tape, dtype: str) -> Tensor:
        """The mask of a sliding window, made anew in every layer."""
        causal = tape.tensor(SQUARE, 1, dtype, "mask")
        mask = tape.tensor(SQUARE, 1, dtype, "mask")
        del causal
        return mask

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention proper; adapters add to it."""
        return attend(q, k, v, self.heads, mask, by_head=True, eager=self.heads.softcap)


class GptNeoxMLP(Module):
    """``proj(gelu(fc(x)))``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc: Module = Linear(shape.n_embd, shape.intermediate_size, bias=shape.bias)
        self.proj: Module = Linear(shape.intermediate_size, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc.forward(x)
        x = activation(x, "gelu")
        out: Tensor = self.proj.forward(x)
        return out


class LLaMAMLP(Module):
    """``proj(act(fc_1(x)) * fc_2(x))``; Gemma's activation is gelu."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc_1: Module = Linear(shape.n_embd, shape.intermediate_size, bias=shape.bias)
        self.fc_2: Module = Linear(shape.n_embd, shape.intermediate_size, bias=shape.bias)
        self.proj: Module = Linear(shape.intermediate_size, shape.n_embd, bias=shape.bias)
        self.act = "gelu" if shape.mlp_class_name == "GemmaMLP" else "silu"

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fc_1.forward(x), self.fc_2.forward(x)
        x = ops.mul(activation(first, self.act), second)
        out: Tensor = self.proj.forward(x)
        return out


class Block(Module):
    """One layer: the residual stream is added to, attention first."""

    def __init__(self, shape: Shape, era: Era, layer: int) -> None:
        super().__init__()
        self.shape, self.era = shape, era

        def norm(given: bool) -> Module | None:
            return _norm(shape, era, shape.n_embd) if given else None

        self.norm_1 = norm(shape.norm_1)
        self.attn = CausalSelfAttention(shape, era, layer)
        self.post_attention_norm = norm(shape.post_attention_norm)
        self.norm_2 = norm(shape.norm_2 and not shape.shared_attention_norm)
        kind = GptNeoxMLP if shape.mlp_class_name == "GptNeoxMLP" else LLaMAMLP
        self.mlp: Module = kind(shape)
        self.post_mlp_norm = norm(shape.post_mlp_norm)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        x_normed = _through(self.norm_1, x)
        attended = _through(self.post_attention_norm, self.attn.forward(x_normed, shared))
        if self.shape.parallel_residual:
            if not self.shape.shared_attention_norm:
                x_normed = _through(self.norm_2, x)
            if self.era.interleaved:
                return ops.add(ops.add(self.mlp.forward(x_normed), attended), x)
            x = ops.add(attended, x)
        else:
            x = ops.add(attended, x)
            if self.era.interleaved:  # the first norm's output keeps its name
                fed = self.mlp.forward(_through(self.norm_2, x))
                return ops.add(_through(self.post_mlp_norm, fed), x)
            x_normed = _through(self.norm_2, x)
        return ops.add(_through(self.post_mlp_norm, self.mlp.forward(x_normed)), x)


def _through(norm: Module | None, x: Tensor) -> Tensor:
    """A norm, or ``nn.Identity``."""
    if norm is None:
        return x
    out: Tensor = norm.forward(x)
    return out


class Transformer(Module):
    """What ``GPT.transformer`` holds beside its blocks."""

    def __init__(self, shape: Shape, era: Era) -> None:
        super().__init__()
        self.wte: Module = Embedding(shape.padded_vocab_size, shape.n_embd)
        self.ln_f = _norm(shape, era, shape.n_embd)


class GPT(Native):
    """The model, and the loop's cross entropy."""

    outputs_outlive_step = True

    def __init__(self, shape: Shape, era: Era, *, chunks_head: bool) -> None:
        super().__init__()
        self.shape, self.era = shape, era
        self.meets_previous = not era.longest_first
        self.chunks_head = self.chunked_by_sequence = chunks_head
        self.lm_head: Module = Linear(
            shape.n_embd, shape.padded_vocab_size, bias=shape.lm_head_bias
        )
        self.transformer = Transformer(shape, era)
        self.embedding_names = ("transformer.wte",)
        stack = Stack(
            "transformer.h",
            shape.n_layer,
            self.block,
            lambda layer: era.slides(shape, layer),
        )
        self.stages = [Stage(stack, self._enter, self._leave)]

    def block(self, layer: int) -> Module:
        """One layer; adapters have others."""
        return Block(self.shape, self.era, layer)

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        # cos and sin are made in fp32 for the longest sample, whatever the precision
        tables = 2 if self.shape.rope_local_base_freq else 1
        cos, sin = (tape.tensor(SEQ, self.shape.rope_n_elem * tables, "fp32", "rope")
                    for _ in range(2))  # fmt: skip
        if tables > 1:
            cos, sin = (t.alias(width=self.shape.rope_n_elem) for t in (cos, sin))
        shared.rope[""] = (cos, sin)
        x: Tensor = self.transformer.wte.forward(tape)
        return ops.scale(x) if self.shape.scale_embeddings else x

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        out: Tensor = self.transformer.ln_f.forward(x)
        return out

    def _head(self, x: Tensor, *, streamed: bool = False) -> Tensor:
        """``streamed``: x is many chunks, one after the other."""
        logits: Tensor = self.lm_head.forward(x)
        caps = self.era.caps_chunks or not self.chunks_head
        if self.shape.final_logit_softcapping is None or not caps:
            return logits
        if streamed:
            logits = without_bytes(logits, logits.dtype)
            return capped_streamed(logits)
        return ops.scale(ops.unary(ops.scale(logits), "tanh", "output"))

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Logits: all chunks but one together, then that one; or all at once."""
        if not self.chunks_head:
            return [self._head(x)]
        rest, piece = rows_apart(x)
        earlier = self._casts_kept(self._head(rest, streamed=True))
        return [earlier, self._head(piece)]

    def _casts_kept(self, earlier: Tensor) -> Tensor:
        """Autocast keeps no cast of a frozen weight for the next to use: every chunk has its own,
        and two have been made."""
        tape, shape = earlier.tape, self.shape
        dtype = tape.env.autocast
        stored = next(p.dtype for _, p in self.lm_head.named_parameters() if not p.added)
        if dtype is None or stored == dtype:
            return earlier
        weight = shape.padded_vocab_size * shape.n_embd
        others = SEQ * (weight // HEAD_CHUNK) + ONE * (-2 * weight)
        casts = tape.tensor(others, 1, dtype, "cast")
        out = earlier.alias()

        def apply(grad: Tensor) -> Grads:
            _kept = casts
            return (grad,)

        ops.record([out], "casts", [earlier], apply)
        return out

    def returned(self, outputs: list[Tensor]) -> list[Tensor]:
        """In fp32, while the others are still there."""
        self.dtype = outputs[0].dtype
        if not self.chunks_head:
            return [ops.to(outputs[0], "fp32")]
        return [cast_streamed(outputs[0], "fp32"), ops.to(outputs[1], "fp32")]

    def loss(self, held: list[Tensor]) -> Tensor:
        """``chunked_cross_entropy``: nothing is recomputed."""
        if not self.chunks_head:
            return self._whole_loss(held[0])
        earlier = streamed_loss(held[0], self.dtype)
        return ops.add(earlier, ops.cross_entropy(held[1], targets(held[1])))

    def _whole_loss(self, logits: Tensor) -> Tensor:
        """All logits but each sequence's last; the gradients of the chunks are joined again."""
        rest, last = rows_apart(shifted(logits))
        earlier = streamed_loss(rest, rest.dtype)
        return ops.add(earlier, ops.cross_entropy(last, targets(last)))


def rows_apart(x: Tensor) -> tuple[Tensor, Tensor]:
    """All rows but one chunk's, and those; the way back joins both gradients in a new tensor."""
    pieces = x.alias(rows=TOKENS + CHUNK * -1), x.alias(rows=CHUNK)
    rows, width, dtype = x.rows, x.width, x.dtype

    def apply(*grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tape = next(grad.tape for grad in grads if grad is not None)
        return (tape.tensor(rows, width, dtype, "gradient"),)

    ops.record(list(pieces), "split", [x], apply)
    return pieces


def build(job: Job) -> Native:
    """The network of a job, as the finetuning script of its method makes it."""
    from ftplan.memory.families.native.litgpt_adapters import build as adapted

    return adapted(job)
