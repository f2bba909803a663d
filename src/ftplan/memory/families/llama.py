"""The Llama line: pre-norm decoder, rotary positions, grouped-query attention, gated MLP.

Most decoders since 2023 are this one with a few things done differently: where the norms stand,
whether queries and keys are normed, which half of a head is rotated, which linears have a bias.
:class:`Traits` names those things, :data:`TRAITS` says who does what.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ftplan.dataclass import dataclass
from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend, make_mask
from ftplan.memory.nn import (
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Network,
    RMSNorm,
    Shared,
    Stack,
    Stage,
    activation,
    gated_mlp,
    project,
    rope_table,
)
from ftplan.memory.tape import SEQ, TOKENS, Tape, Tensor

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What one architecture of the line does differently."""

    norm: Literal["rms", "late", "offset", "plain", "layer", "layer_1p", "cohere"] = "rms"
    """``late`` and ``offset``: see RMSNorm; ``plain``: OLMo's without weight; ``layer``: PyTorch's
    layer norm; ``layer_1p``: Nemotron's, whose weight is stored minus one."""
    block: Literal["pre", "post", "sandwich", "parallel"] = "pre"
    norm_names: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    qk_norm: Literal["none", "head", "whole", "rotated", "optional"] = "none"
    """``head``: each head by itself; ``whole``: all heads as one vector; ``rotated``: each head
    after the rotation; ``optional``: Cohere's ``use_qk_norm``."""
    qkv_bias: str | bool = "attention_bias"
    """The config's field, or a constant."""
    out_bias: str | bool = "attention_bias"
    mlp_bias: str | bool = False
    mlp: Literal["gated", "fused", "plain", "starcoder"] = "gated"
    fused_qkv: bool = False
    rotation: Literal["half", "table_fp32", "pairs", "pairs_fp32", "fp32"] = "half"
    """``table_fp32``: sines stay fp32; ``pairs``: neighbours are rotated, with sines spread anew in
    every layer; ``pairs_fp32``: so, in fp32; ``fp32``: queries and keys are cast to fp32 first."""
    ropes_by_type: bool = False
    """One table of sines for each layer type."""
    rejoins: bool = False
    """The rotated part of a head and the rest are joined again, even where there is no rest."""
    residual_dropout: str | None = None
    """The config's field for the dropout of what is added to the residual stream."""
    dropout_site: Literal["block", "module", "mlp"] = "block"
    embedding_dropout: str | None = None
    rope_per_sequence: bool = False
    """Positions differ between the sequences of a batch."""
    no_sdpa: bool = False
    """Eager attention takes the place of SDPA, which knows no soft cap (Gemma 2)."""
    scaled_embedding: bool = False
    """The embedding module multiplies its output (Gemma)."""


_GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_GLM_NORMS = (
    "input_layernorm",
    "post_self_attn_layernorm",
    "post_attention_layernorm",
    "post_mlp_layernorm",
)
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")

TRAITS: dict[str, Traits] = {
    "llama": Traits(mlp_bias="mlp_bias"),
    "mistral": Traits(qkv_bias=False, out_bias=False),
    "ministral": Traits(qkv_bias=False, out_bias=False),
    "ministral3": Traits(qkv_bias=False, out_bias=False),
    "qwen2": Traits(qkv_bias=True, out_bias=False),
    "qwen3": Traits(qk_norm="head"),
    "smollm3": Traits(mlp_bias="mlp_bias"),
    "granite": Traits(mlp_bias="mlp_bias"),
    "internlm3": Traits(out_bias="mlp_bias", mlp_bias="mlp_bias"),
    "gemma": Traits(norm="offset", scaled_embedding=True),
    "gemma2": Traits(
        norm="offset",
        scaled_embedding=True,
        no_sdpa=True,
        block="sandwich",
        norm_names=_GEMMA_NORMS,
    ),
    "gemma3_text": Traits(
        norm="offset",
        scaled_embedding=True,
        block="sandwich",
        norm_names=_GEMMA_NORMS,
        qk_norm="head",
        ropes_by_type=True,
    ),
    "phi3": Traits(
        qkv_bias=False,
        out_bias=False,
        mlp="fused",
        fused_qkv=True,
        rejoins=True,
        residual_dropout="resid_pdrop",
    ),
    "olmo": Traits(norm="plain", rotation="table_fp32"),
    "olmo2": Traits(
        norm="late",
        block="post",
        norm_names=_POST_NORMS,
        qk_norm="whole",
        rotation="table_fp32",
    ),
    "olmo3": Traits(
        norm="late",
        block="post",
        norm_names=_POST_NORMS,
        qk_norm="whole",
        rotation="table_fp32",
        ropes_by_type=True,
    ),
    "starcoder2": Traits(
        norm="layer",
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        mlp="starcoder",
        residual_dropout="residual_dropout",
        dropout_site="module",
        embedding_dropout="embedding_dropout",
    ),
    "glm": Traits(out_bias=False, mlp="fused", rotation="pairs", rejoins=True),
    "glm4": Traits(
        out_bias=False,
        mlp="fused",
        rotation="pairs",
        rejoins=True,
        block="sandwich",
        norm_names=_GLM_NORMS,
    ),
    "glm4v_text": Traits(
        qkv_bias=True,
        out_bias=False,
        mlp="fused",
        rejoins=True,
        rope_per_sequence=True,
        block="sandwich",
        norm_names=_GLM_NORMS,
    ),
    "cohere": Traits(
        norm="cohere",
        block="parallel",
        norm_names=("input_layernorm",),
        qk_norm="optional",
        rotation="fp32",
    ),
    "cohere2": Traits(
        norm="cohere", block="parallel", norm_names=("input_layernorm",), rotation="fp32"
    ),
    "exaone4": Traits(
        qkv_bias=False, out_bias=False, block="post", norm_names=_POST_NORMS, qk_norm="head"
    ),
    "nemotron": Traits(norm="layer_1p", mlp="plain", mlp_bias="mlp_bias", rejoins=True),
    "arcee": Traits(mlp="plain", mlp_bias="mlp_bias"),
    "apertus": Traits(
        mlp="plain", qk_norm="head", norm_names=("attention_layernorm", "feedforward_layernorm")
    ),
    "seed_oss": Traits(
        out_bias="attention_out_bias",
        mlp_bias="mlp_bias",
        residual_dropout="residual_dropout",
        dropout_site="module",
    ),
    "helium": Traits(norm="late", out_bias=False, mlp_bias="mlp_bias", rotation="pairs"),
    "ernie4_5": Traits(
        qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", rotation="pairs_fp32"
    ),
    "hunyuan_v1_dense": Traits(qk_norm="rotated"),
    "cwm": Traits(qkv_bias=False, out_bias=False),
    "iquestcoder": Traits(mlp_bias="mlp_bias"),
    "jais2": Traits(norm="layer", mlp="plain", mlp_bias="mlp_bias"),
    "vaultgemma": Traits(
        norm="offset",
        scaled_embedding=True,
        no_sdpa=True,
        norm_names=("input_layernorm", "pre_feedforward_layernorm"),
    ),
}
SOFTCAPPED = ("gemma2", "gemma3_text", "vaultgemma")
"""Types whose logits, and in part scores, go through a tanh."""

_ALL_SLIDING = ("mistral", "ministral", "ministral3", "phi3", "starcoder2")
_PERIOD = {"gemma2": 2, "vaultgemma": 2, "gemma3_text": 6, "cohere2": 4, "olmo3": 4, "exaone4": 4}


def traits_of(config: Config) -> Traits:
    """The traits of a config's ``model_type``; Llama's where it has none of its own."""
    return TRAITS.get(config.get("model_type", ""), TRAITS["llama"])


def layer_type(config: Config, layer: int) -> str:
    """``full_attention`` or ``sliding_attention``, as the configuration classes decide."""
    if config.get("layer_types"):
        return str(config["layer_types"][layer])
    name, window = config.get("model_type"), config.get("sliding_window")
    sliding = False
    if name in _ALL_SLIDING:
        sliding = window is not None
    elif name in _PERIOD:
        period = config.get("sliding_window_pattern") or _PERIOD[name]
        sliding = (layer + 1) % int(period) != 0 and window is not None
    elif name == "cwm":
        sliding = layer % 4 != 0 and window is not None
    elif name in ("qwen2", "qwen3"):
        used = bool(config.get("use_sliding_window")) and window is not None
        sliding = used and layer >= int(config.get("max_window_layers", 28))
    elif name == "smollm3":
        used = bool(config.get("use_sliding_window")) and window is not None
        sliding = used and not has_rope(config, layer)
    return "sliding_attention" if sliding else "full_attention"


def has_rope(config: Config, layer: int) -> bool:
    """Whether a layer rotates its queries and keys."""
    name = config.get("model_type")
    if name == "smollm3":
        listed = config.get("no_rope_layers")
        if listed is not None:
            return bool(listed[layer])
        return (layer + 1) % int(config.get("no_rope_layer_interval") or 4) != 0
    if name == "cohere2" or (name == "exaone4" and config.get("sliding_window") is not None):
        return layer_type(config, layer) == "sliding_attention"
    return True


def heads_of(config: Config) -> Heads:
    """The shape of attention from the usual fields."""
    count = config["num_attention_heads"]
    kv_count = config.get("num_key_value_heads") or count
    size = config.get("head_dim") or config["hidden_size"] // count
    return Heads(
        count=count,
        kv_count=kv_count,
        size=size,
        value_size=size,
        dropout=config.get("attention_dropout") or 0.0,
        softcap=bool(config.get("attn_logit_softcapping")) and traits_of(config).no_sdpa,
    )


def rotary_width(config: Config, size: int) -> int:
    """How much of a head of ``size`` is rotated (``partial_rotary_factor``)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    older = config.get("rotary_pct", config.get("partial_rotary_factor"))
    factor = rope.get("partial_rotary_factor", older)
    return int(size * factor) if factor is not None else size


def option(config: Config, field: str | bool) -> bool:
    """A trait that is a constant or the name of a field."""
    return field if isinstance(field, bool) else bool(config.get(field))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in elementwise steps (``apply_rotary_pos_emb``)."""
    return ops.add(ops.mul(x, cos), ops.mul(_rotate_half(x), sin))


def _rotate_half(x: Tensor) -> Tensor:
    first, second = ops.part(x, x.width // 2), ops.part(x, x.width - x.width // 2)
    return ops.cat((ops.neg(second), first))


def rotate_part(x: Tensor, cos: Tensor, sin: Tensor, share: float) -> Tensor:
    """Rotate a ``share`` of each head and let the rest pass."""
    width = int(x.width * share)
    if width == x.width:
        return ops.cat((rotate(x, cos, sin),))
    turned, rest = ops.part(x, width), ops.part(x, x.width - width)
    return ops.cat((rotate(turned, cos, sin), rest))


class CohereNorm(Module):
    """Cohere's layer norm: without bias, in fp32, written out in elementwise steps."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = self.parameter("weight", *shape)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        weight = x.tape.leaf(self.weight)
        if len(self.weight.shape) > 1:  # a weight for each head
            rows = x.rows * self.weight.shape[0]
            x = ops.view(x, rows, self.weight.shape[1])
        hidden = ops.to(x, "fp32")
        del x
        mean = ops.mean(hidden)
        variance = ops.mean_square(ops.add(hidden, mean))
        centred = ops.add(hidden, mean)
        hidden = ops.mul(centred, ops.unary(ops.shift(variance), "rsqrt", "output"))
        del centred
        hidden = ops.mul(ops.to(weight, "fp32"), hidden)
        return ops.to(hidden, dtype)


class LayerNorm1P(LayerNorm):
    """Nemotron's: one is added to the weight; under autocast it runs in the low precision."""

    def forward(self, x: Tensor) -> Tensor:
        tape = x.tape
        assert self.weight is not None and self.bias is not None
        weight, bias = ops.shift(tape.leaf(self.weight)), tape.leaf(self.bias)
        if tape.env.autocast is not None:
            x, weight, bias = (ops.to(t, tape.env.autocast) for t in (x, weight, bias))
        return ops.native_layer_norm(x, weight, bias)


class PlainNorm(Module):
    """OLMo's: no weight, computed in fp32 and cast back."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.to(ops.layer_norm(ops.to(x, "fp32"), None, None), x.dtype)


def norm_of(config: Config, width: int) -> Module:
    """The norm of the architecture."""
    kind = traits_of(config).norm
    if kind == "layer":
        return LayerNorm(width)
    if kind == "layer_1p":
        return LayerNorm1P(width)
    if kind == "plain":
        return PlainNorm()
    if kind == "cohere":
        return CohereNorm(width)
    return RMSNorm(width, offset=kind == "offset", late=kind == "late")


class Attention(Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: Config, layer: int = 0) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.traits = traits = traits_of(config)
        self.heads = heads = heads_of(config)
        self.layer_type = layer_type(config, layer)
        self.rotates = has_rope(config, layer)
        self.rotary_share = rotary_width(config, heads.size) / heads.size
        wide, narrow = heads.count * heads.size, heads.kv_count * heads.size
        bias, out_bias = option(config, traits.qkv_bias), option(config, traits.out_bias)
        if traits.fused_qkv:
            self.qkv_proj = Linear(hidden, wide + 2 * narrow, bias=bias)
        else:
            self.q_proj = Linear(hidden, wide, bias=bias)
            self.k_proj = Linear(hidden, narrow, bias=bias)
            self.v_proj = Linear(hidden, narrow, bias=bias)
        self.o_proj = Linear(wide, hidden, bias=out_bias)
        self.dropout = _residual_dropout(config) if traits.dropout_site == "module" else 0.0
        self.normed = self._add_norms(config)

    def _add_norms(self, config: Config) -> bool:
        kind, heads = self.traits.qk_norm, self.heads
        if kind == "whole":
            self.q_norm: Module = norm_of(config, heads.count * heads.size)
            self.k_norm: Module = norm_of(config, heads.kv_count * heads.size)
        elif kind == "head":
            self.q_norm, self.k_norm = norm_of(config, heads.size), norm_of(config, heads.size)
        elif kind == "rotated":
            self.query_layernorm = norm_of(config, heads.size)
            self.key_layernorm = norm_of(config, heads.size)
        elif kind == "optional" and config.get("use_qk_norm"):
            self.q_norm = CohereNorm(heads.count, heads.size)
            self.k_norm = CohereNorm(heads.kv_count, heads.size)
        else:
            return False
        return True

    def by_head(self, norm: Module, x: Tensor) -> Tensor:
        """A norm over each head."""
        heads = x.width // self.heads.size
        out: Tensor = norm.forward(ops.view(x, x.rows * heads, self.heads.size))
        return ops.view(out, x.rows, x.width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, normed where the architecture does so first."""
        kind = self.traits.qk_norm
        if self.traits.fused_qkv:
            qkv = self.qkv_proj.forward(x)
            wide = self.heads.count * self.heads.size
            narrow = self.heads.kv_count * self.heads.size
            return ops.part(qkv, wide), ops.part(qkv, narrow), ops.part(qkv, narrow)
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        if kind == "head":
            q, k = self.by_head(self.q_norm, q), self.by_head(self.k_norm, k)
        elif self.normed and kind in ("whole", "optional"):
            q, k = self.q_norm.forward(q), self.k_norm.forward(k)
            q, k = ops.view(q, v.rows, q.width), ops.view(k, v.rows, k.width)
            if kind == "optional":
                q = ops.view(q, v.rows, self.heads.count * self.heads.size)
                k = ops.view(k, v.rows, self.heads.kv_count * self.heads.size)
        return q, k, v

    def place(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys."""
        kind, share = self.traits.rotation, self.rotary_share
        if q.tape.env.kernels.rope:  # a kernel rotates them where they are, forward and backward
            return ops.view(q, q.rows, q.width), ops.view(k, k.rows, k.width)
        cos, sin = shared.rope[self.layer_type if self.traits.ropes_by_type else ""]
        dtype = q.dtype
        kind = "fp32" if q.tape.env.kernels.rope_wide else kind
        if kind in ("pairs", "pairs_fp32"):
            tape = q.tape
            cos = tape.tensor(SEQ, cos.width, cos.dtype, "rope")
            sin = tape.tensor(SEQ, sin.width, sin.dtype, "rope")
        if kind == "pairs_fp32":
            q, k = _rotate_fp32(q, cos, sin), _rotate_fp32(k, cos, sin)
            return ops.to(q, dtype), ops.to(k, dtype)
        if kind == "fp32":
            q, k = ops.to(q, "fp32"), ops.to(k, "fp32")
        if self.traits.rejoins:
            q, k = rotate_part(q, cos, sin, share), rotate_part(k, cos, sin, share)
        else:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if kind in ("fp32", "table_fp32"):
            q, k = ops.to(q, dtype), ops.to(k, dtype)
        return q, k

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor] | None = None) -> Tensor:
        q, k, v = self.project(x)
        if self.rotates:
            q, k = self.place(q, k, shared)
        if self.traits.qk_norm == "rotated":
            q, k = self.by_head(self.query_layernorm, q), self.by_head(self.key_layernorm, k)
        mask = shared.masks.get(self.layer_type, shared.mask)
        out = attend(
            q,
            k,
            v,
            self.heads,
            mask,
            eager=self.traits.no_sdpa,
            by_head=self.traits.rejoins,
            held=held,
            window=shared.windows.get(self.layer_type),
        )
        (out,) = project(out, self.o_proj)
        return ops.dropout(out, self.dropout)


def _rotate_fp32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """ERNIE 4.5: both terms are cast on their own."""
    return ops.add(ops.mul(ops.to(x, "fp32"), cos), ops.mul(ops.to(_rotate_half(x), "fp32"), sin))


def _residual_dropout(config: Config) -> float:
    field = traits_of(config).residual_dropout
    return (config.get(field) or 0.0) if field else 0.0


class GatedMLP(Module):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        bias = option(config, traits_of(config).mlp_bias)
        self.gate_proj = Linear(hidden, inner, bias=bias)
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)
        self.act = act_of(config)
        site = traits_of(config).dropout_site
        self.dropout = _residual_dropout(config) if site == "module" else 0.0

    def forward(self, x: Tensor) -> Tensor:
        out = gated_mlp(x, self.gate_proj, self.up_proj, self.down_proj, self.act)
        return ops.dropout(out, self.dropout)


def act_of(config: Config) -> str:
    """The activation function's name."""
    return str(config.get("hidden_activation") or config.get("hidden_act") or "silu")


class FusedMLP(Module):
    """The gated MLP with gate and up in one matrix (Phi-3, GLM)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_up_proj = Linear(hidden, 2 * inner)
        self.down_proj = Linear(inner, hidden)
        self.act = act_of(config)

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up_proj.forward(x)
        gate, up = ops.split(both, (both.width // 2, both.width // 2))
        del both
        up = ops.mul(up, activation(gate, self.act))
        return self.down_proj.forward(up)


class PlainMLP(Module):
    """``down(act(up(x)))``; StarCoder 2 gives the two matrices GPT-2's names."""

    def __init__(self, config: Config, names: tuple[str, str] = ("up_proj", "down_proj")) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        bias = option(config, traits_of(config).mlp_bias)
        self.names = names
        self.replace(names[0], Linear(hidden, inner, bias=bias))
        self.replace(names[1], Linear(inner, hidden, bias=bias))
        self.act = act_of(config)
        if self.act == "xielu":
            self.act_fn = XIELU()
        site = traits_of(config).dropout_site
        self.dropout = _residual_dropout(config) if site == "module" else 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.child(self.names[0]).forward(x)
        x = self.act_fn.forward(x) if self.act == "xielu" else activation(x, self.act)
        x = self.child(self.names[1]).forward(x)
        return ops.dropout(x, self.dropout)


class XIELU(Module):
    """Apertus' activation with two learnt numbers, in elementwise steps (``_xielu_python``)."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = self.parameter("alpha_p", 1)
        self.alpha_n = self.parameter("alpha_n", 1)

    def forward(self, x: Tensor) -> Tensor:
        tape = x.tape
        alphas = [ops.autocast_fp32(tape.leaf(p)) for p in (self.alpha_p, self.alpha_n)]
        positive = ops.unary(alphas[0], "softplus", "input")
        negative = ops.shift(ops.unary(alphas[1], "softplus", "input"))
        above = tape.tensor(x.rows, x.width, "bool", "sign")
        high = ops.add(ops.mul(ops.mul(positive, x), x), ops.scale(x))
        low = _expm1(ops.unary(x, "minimum", "input"))
        low = ops.add(low, x)
        low = ops.mul(low, negative)
        low = ops.add(low, ops.scale(x))
        return ops.where(above, high, low)


def _expm1(x: Tensor) -> Tensor:
    return ops.unary(ops.autocast_fp32(x), "expm1", "output")


def mlp_of(config: Config) -> Module:
    """The MLP of the architecture."""
    kind = traits_of(config).mlp
    if kind == "fused":
        return FusedMLP(config)
    if kind == "plain":
        return PlainMLP(config)
    if kind == "starcoder":
        return PlainMLP(config, ("c_fc", "c_proj"))
    return GatedMLP(config)


class Block(Module):
    """One decoder layer."""

    def __init__(self, config: Config, layer: int = 0) -> None:
        super().__init__()
        traits = traits_of(config)
        self.self_attn = Attention(config, layer)
        self.mlp = mlp_of(config)
        self.kind = traits.block
        self.names = traits.norm_names
        for name in traits.norm_names:
            self.replace(name, norm_of(config, config["hidden_size"]))
        self.dropout = _residual_dropout(config) if traits.dropout_site == "block" else 0.0
        # a multiplier of one is multiplied all the same
        self.multiplied = config.get("model_type") == "granite"

    def norm(self, number: int, x: Tensor) -> Tensor:
        """The ``number``-th norm of the block."""
        out: Tensor = self.child(self.names[number]).forward(x)
        return out

    def join(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add to the residual stream."""
        x = ops.scale(x) if self.multiplied else ops.dropout(x, self.dropout)
        return ops.add(residual, x)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        residual = x
        if self.kind == "parallel":
            x = self.norm(0, x)
            attended = self.self_attn.forward(x, shared, held)
            fed = self.mlp.forward(x)
            return ops.add(ops.add(residual, attended), fed)
        if self.kind == "post":
            x = self.self_attn.forward(x, shared, held)
            x = self.norm(0, x)
            x = self.join(residual, x)
            residual = x
            x = self.mlp.forward(x)
            x = self.norm(1, x)
            return self.join(residual, x)
        sandwich = self.kind == "sandwich"
        x = self.norm(0, x)
        x = self.self_attn.forward(x, shared, held)
        if sandwich:
            x = self.norm(1, x)
        x = self.join(residual, x)
        residual = x
        x = self.norm(2 if sandwich else 1, x)
        x = self.mlp.forward(x)
        if sandwich:
            x = self.norm(3, x)
        return self.join(residual, x)


class ScaledEmbedding(Embedding):
    """Gemma's: the rows are multiplied by a number inside the module."""

    def forward(self, tape: Tape, *rows: Any) -> Tensor:
        return ops.scale(super().forward(tape, *rows))


class Body(Module):
    """``LlamaModel`` but for its blocks: the table before them and the norm after."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        table = ScaledEmbedding if traits_of(config).scaled_embedding else Embedding
        self.embed_tokens = table(config["vocab_size"], config["hidden_size"])
        self.norm = norm_of(config, config["hidden_size"])


class Llama(Network):
    """``LlamaForCausalLM``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.traits = traits_of(config)
        self.model = Body(config)
        self.lm_head = Linear(config["hidden_size"], config["vocab_size"])
        if config.get("tie_word_embeddings"):
            self.tie("lm_head.weight", "model.embed_tokens.weight")
        count = config["num_hidden_layers"]
        stack = Stack(
            "model.layers",
            count,
            lambda layer: self.block(config, layer),
            lambda layer: (layer_type(config, layer), has_rope(config, layer)),
        )
        self.rope_width = rotary_width(config, heads_of(config).size)
        self.layer_types = sorted({layer_type(config, layer) for layer in range(count)})
        self.stages = [Stage(stack, self._enter, self._leave)]

    def block(self, config: Config, layer: int) -> Module:
        """A decoder layer; a family with other blocks overrides this."""
        return Block(config, layer)

    def _enter(self, tape: Tape, shared: Shared) -> Tensor:
        x: Tensor = self.model.embed_tokens.forward(tape)
        config, traits = self.config, self.traits
        if config.get("model_type") == "granite":
            x = ops.scale(x)
        for name in self.layer_types:
            window = config.get("sliding_window") if name == "sliding_attention" else None
            shared.windows[name] = window
            shared.masks[name] = make_mask(tape, x.dtype, window=window, eager=traits.no_sdpa)
        if traits.embedding_dropout:
            x = ops.dropout(x, config.get(traits.embedding_dropout) or 0.0)
        wide = traits.rotation in ("table_fp32", "pairs_fp32") or tape.env.kernels.rope_wide
        dtype = "fp32" if wide else x.dtype
        for name in self.layer_types if traits.ropes_by_type else ("",):
            rows = TOKENS if traits.rope_per_sequence else SEQ
            shared.rope[name] = rope_table(tape, self.rope_width, dtype, rows)
        return x

    def tables(self, tape: Tape) -> list[Tensor]:
        """AutoModel's sines and cosines stay from batch to batch."""
        count = 2 if tape.env.kernels.rope_wide else 0
        return [tape.tensor(SEQ, self.rope_width, "fp32", "rope") for _ in range(count)]

    def _leave(self, x: Tensor, shared: Shared) -> Tensor:
        out: Tensor = self.model.norm.forward(x)
        return out

    def head(self, x: Tensor) -> Tensor:
        logits = self.lm_head.forward(x)
        name = self.config.get("model_type")
        if name in ("granite", "cohere", "cohere2"):
            logits = ops.scale(logits)
        if self.config.get("final_logit_softcapping") and name in SOFTCAPPED:
            logits = ops.scale(logits)
            logits = ops.unary(logits, "tanh", "output")
            logits = ops.scale(logits)
        return logits


MODEL_TYPES = dict.fromkeys(TRAITS, Llama)
