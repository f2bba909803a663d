"""Mixtures that route in ways of their own: Llama 4, Phi-3.5 MoE, ERNIE 4.5, MiniMax M2, Hunyuan.

Source: transformers 5.23.0, models/<type>/modeling_<type>.py.
"""

from __future__ import annotations

from dataclasses import replace

from ftplan.memory import ops
from ftplan.memory.attention import attend
from ftplan.memory.experts import (
    Experts,
    ExpertWeights,
    Router,
    Routing,
    batched_linear,
    gather_rows,
    masked,
    repeat_rows,
    sum_of_groups,
    topk,
)
from ftplan.memory.families import llama
from ftplan.memory.families.decoder import (
    MLP,
    Attention,
    Block,
    Config,
    Decoder,
    Rope,
    filled,
    head_size,
    rotate_complex,
)
from ftplan.memory.families.mixture import Mixture, act
from ftplan.memory.nn import LayerNorm, Linear, Module, Network, RMSNorm, Shared, activation
from ftplan.memory.tape import SEQ, Grads, Tensor


class Llama4Attention(Attention):
    """Complex rotation and normed heads, or no positions and a scale by position."""

    def __init__(self, config: Config, layer: int, mask: str, turned: bool) -> None:
        super().__init__(config, mask=mask)
        self.heads = replace(self.heads, softmax_fp32=False)
        self.rotates = turned
        self.tuned = bool(config.get("attn_temperature_tuning")) and not turned
        if config["use_qk_norm"] and turned:
            self.qk_norm_all = RMSNorm(self.heads.size, weight=False)
        self.normed_heads = bool(config["use_qk_norm"]) and turned

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor] | None = None) -> Tensor:
        q, k, v = self.q_proj.forward(x), self.k_proj.forward(x), self.v_proj.forward(x)
        if self.rotates:
            cos, sin = shared.rope[""]
            q, k = rotate_complex(q, cos, sin), rotate_complex(k, cos, sin)
        if self.normed_heads:
            q, k = self.normed(self.qk_norm_all, q), self.normed(self.qk_norm_all, k)
        if self.tuned:
            scales = x.tape.tensor(SEQ, 1, "fp32", "attention scales")
            q = ops.to(ops.mul(q, scales), q.dtype)
        out = self.out(attend(q, k, v, self.heads, shared.masks[self.mask], held=held))
        if held is not None:
            held.append(out)  # the block names it until its end
        return out


class Llama4Mixture(Module):
    """Every expert sees every token, weighed by its score: E x tokens rows (``Llama4TextMoe``)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.count, self.act = config["num_local_experts"], act(config)
        self.top_k = config["num_experts_per_tok"]
        self.experts = ExpertWeights()
        self.experts.inner, self.experts.transposed = inner, True
        self.experts.parameter("gate_up_proj", self.count, hidden, 2 * inner)
        self.experts.parameter("down_proj", self.count, inner, hidden)
        self.router = Linear(hidden, self.count)
        self.shared_expert = MLP(hidden, inner, self.act)

    def forward(self, x: Tensor) -> Tensor:
        tape, experts, inner = x.tape, self.experts.parameters, self.experts.inner
        logits = self.router.forward(x)
        scores = self.scores(logits)
        routed = repeat_rows(x, self.count)
        column = ops.copy(scores)
        column = ops.view(column, x.rows * self.count, 1)
        routed = ops.mul(routed, column)
        del column
        out = batched_linear(routed, tape.leaf(experts["gate_up_proj"]), 2 * inner)
        gate, up = ops.split(out, [inner, inner])
        del out
        out = batched_linear(
            ops.mul(up, activation(gate, self.act)), tape.leaf(experts["down_proj"]), x.width
        )
        del gate, up
        every = self.shared_expert.forward(x)
        return _added(every, sum_of_groups(out, self.count, x.rows))

    def scores(self, logits: Tensor) -> Tensor:
        """The chosen logits through a sigmoid; the others are minus infinity before it."""
        values, index = topk(logits, self.top_k)
        scattered = logits.tape.tensor(logits.rows, logits.width, logits.dtype, "scatter")
        rows, width, saved = values.rows, values.width, index
        make = ops.like(rows, width, values.dtype, values.requires_grad)

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            return (make(grad),)

        ops.record([scattered], "scatter", [values], apply)
        scores = ops.unary(ops.to(scattered, "fp32"), "sigmoid", "output")
        return ops.to(scores, logits.dtype)


def _added(out: Tensor, more: Tensor) -> Tensor:
    """``out.add_(more)``."""
    total = out.alias()
    ops.record([total], "add", [out, more], lambda grad: (grad, grad))
    return total


def llama4_text(raw: Config) -> Network:
    """``Llama4ForCausalLM``."""
    config = filled(raw)
    count = config["num_hidden_layers"]
    every, step = config["no_rope_layer_interval"], config["interleave_moe_layer_step"]
    turned = list(config.get("no_rope_layers") or ()) or [
        int((layer + 1) % every != 0) for layer in range(count)
    ]
    sparse = config.get("moe_layers")
    sparse = set(range(step - 1, count, step) if sparse is None else sparse)
    types = list(config.get("layer_types") or ()) or [
        "chunked_attention" if flag else "full_attention" for flag in turned
    ]

    def block(config: Config, layer: int) -> Module:
        attention = Llama4Attention(config, layer, types[layer], bool(turned[layer]))
        if layer in sparse:
            mlp: Module = Llama4Mixture(config)
        else:
            mlp = MLP(config["hidden_size"], config["intermediate_size_mlp"], act(config))
        return Block(config, attention, mlp, mlp_name="feed_forward")

    return Decoder(
        config, block, kind=lambda layer: (types[layer], bool(turned[layer]), layer in sparse),
        ropes={"": Rope(width=head_size(config), complex_pairs=True)},
        windows={"full_attention": None, "chunked_attention": config["attention_chunk_size"]},
    )  # fmt: skip


class PhiRouter(Router):
    """``sparsemixer``: two rounds, each a masked softmax and a sampled expert."""

    def forward(self, x: Tensor) -> Routing:
        logits = self._logits(x)
        first, index = self._round(logits)
        second, _ = self._round(ops.scale(logits), index)
        weights = ops.cat((first, second))
        return Routing(logits, weights, x.tape.tensor(x.rows, 2, "int64", "experts"))

    def _round(self, scores: Tensor, taken: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tape = scores.tape
        gates = ops.softmax(ops.autocast_fp32(masked(scores)))
        index = tape.tensor(scores.rows, 1, "int64", "experts")
        chosen = gather_rows(gates, index, scores.rows, 1, "gather")
        out = tape.tensor(scores.rows, 1, gates.dtype, "multiplier")
        make = ops.like(scores.rows, scores.width, scores.dtype, scores.requires_grad)
        saved = (chosen, index, gates.alias(), taken)  # the way back through it stays, unused

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            return (make(grad),)

        ops.record([out], "multiplier", [scores], apply)
        return out, index


def phimoe(raw: Config) -> Network:
    """``PhimoeForCausalLM``."""
    config = filled(raw)

    def block(config: Config, layer: int) -> Module:
        hidden, count = config["hidden_size"], config["num_local_experts"]
        router = PhiRouter(hidden, count, config["num_experts_per_tok"])
        experts = Experts(hidden, config["intermediate_size"], count, act=act(config))
        return Block(
            config, Attention(config), Mixture(router, experts, router_name="router"),
            norm=LayerNorm,
        )  # fmt: skip

    return Decoder(
        config, block, norm=LayerNorm, head_bias=bool(config["lm_head_bias"]),
        windows={"": config.get("sliding_window")},
    )  # fmt: skip


class ErnieRouter(Router):
    """In fp32 whatever autocast says; a correction that is not trained helps to choose."""

    def __init__(self, config: Config) -> None:
        super().__init__(config["hidden_size"], config["num_experts"], config["moe_k"], upcast=True)
        self.moe_statics = Module()
        bias = self.moe_statics.parameter("e_score_correction_bias", 1, config["num_experts"])
        bias.trainable, bias.fixed = False, True

    def forward(self, x: Tensor) -> Routing:
        tape = x.tape
        before, tape.env = tape.env, replace(tape.env, autocast=None)
        logits = self._logits(x)
        scores = ops.softmax(logits, "fp32")
        index = tape.tensor(x.rows, self.top_k, "int64", "topk indices")
        weights = gather_rows(scores, index, x.rows, self.top_k, "gather")
        weights = _divided(weights)
        tape.env = before
        return Routing(logits, ops.to(weights, x.dtype), index)


def _divided(x: Tensor) -> Tensor:
    """By the clamped sum: keeps both."""
    tape = x.tape
    sums = tape.tensor(x.rows, 1, x.dtype, "sum")
    clamped = tape.tensor(x.rows, 1, x.dtype, "clamp")
    out = tape.tensor(x.rows, x.width, x.dtype, "div")
    saved = (x, sums, clamped)
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    ops.record([out], "div", [x], apply)
    return out


def ernie_moe(raw: Config) -> Network:
    """``Ernie4_5_MoeForCausalLM``."""
    config = filled(raw)
    last = config["moe_layer_end_index"]
    last = config["num_hidden_layers"] - 1 if last == -1 else last
    every, start = config["moe_layer_interval"], config["moe_layer_start_index"]
    bias = bool(config["use_bias"])

    def sparse(layer: int) -> bool:
        return bool((layer + 1) % every == 0 and start <= layer <= last)

    def block(config: Config, layer: int) -> Module:
        hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
        attention = llama.Attention({**config, "model_type": "ernie4_5"}, layer)
        if not sparse(layer):
            return Block(
                config, attention, MLP(hidden, config["intermediate_size"], act(config), bias=bias)
            )
        count = config["moe_num_shared_experts"]
        shared = ("shared_experts", MLP(hidden, inner * count, act(config), bias=bias))
        mixture = Mixture(
            ErnieRouter(config), Experts(hidden, inner, config["num_experts"], act=act(config)),
            shared=shared if count else None, shared_first=bool(count),
        )  # fmt: skip
        return Block(config, attention, mixture)

    ropes = {"": Rope(width=head_size(config), fp32=True)}
    return Decoder(config, block, kind=sparse, ropes=ropes)


class PairAttention(Attention):
    """Pairs of numbers rotated in fp32, by tables of every sequence's own."""

    def turn(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        cos, sin = shared.rope[""]
        dtype = q.dtype
        q, k = (self.embedded(x, cos, sin) for x in (q, k))
        return ops.to(q, dtype), ops.to(k, dtype)

    def embedded(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries or keys in fp32."""
        straight = ops.mul(ops.to(x, "fp32"), cos)
        first, second = ops.part(x, x.width // 2), ops.part(x, x.width // 2)
        halves = ops.cat((ops.neg(second), first))
        return ops.add(straight, ops.mul(ops.to(halves, "fp32"), sin))


class SightedMixture(Module):
    """``Ernie4_5_VLMoeMoeBlock``: experts for text, experts for images, and some for every token.

    Without images in the batch those of images are not run.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config.get("moe_intermediate_size") or (1536, 512)
        for name, width in zip(("text_moe", "vision_moe"), inner, strict=True):
            part = Module()
            part.gate = ErnieRouter(config)
            part.experts = Experts(hidden, width, config["num_experts"], act=act(config))
            setattr(self, name, part)
        count, bias = config["moe_num_shared_experts"], bool(config["use_bias"])
        self.shares = bool(count)
        if count:
            self.shared_experts = MLP(hidden, inner[0] * count, act(config), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        every = self.shared_experts.forward(x) if self.shares else None
        text = self.children["text_moe"].children
        routed: Tensor = text["experts"].forward(x, text["gate"].forward(x))
        return routed if every is None else ops.add(routed, every)


def ernie_vl(raw: Config) -> Network:
    """The text of ``Ernie4_5_VLMoeForConditionalGeneration``: positions in three directions."""
    config = filled(raw)
    kinds = list(config.get("mlp_layer_types") or ()) or [
        "sparse" if layer else "dense" for layer in range(config["num_hidden_layers"])
    ]
    inner, bias = config["intermediate_size"], bool(config["use_bias"])

    def block(config: Config, layer: int) -> Module:
        attention = PairAttention(config, bias=bias)
        if kinds[layer] == "sparse":
            return Block(config, attention, SightedMixture(config))
        mlp = MLP(config["hidden_size"], inner, act(config), bias=bias)
        return Block(config, attention, mlp)

    ropes = {"": Rope(width=head_size(config), fp32=True, per_sequence=True)}
    return Decoder(config, block, kind=lambda layer: kinds[layer], ropes=ropes)


def minimax_m2(raw: Config) -> Network:
    """``MiniMaxM2ForCausalLM``."""
    config = filled(raw)
    size = head_size(config)
    turned = int(config.get("rotary_dim") or size * (config.get("partial_rotary_factor") or 1.0))

    def block(config: Config, layer: int) -> Module:
        hidden, count = config["hidden_size"], config["num_local_experts"]
        router = Router(
            hidden, count, config["num_experts_per_tok"], scoring="sigmoid", normalize=True,
            float_logits=True, keep_fp32=True,
        )  # fmt: skip
        experts = Experts(hidden, config["intermediate_size"], count, act=act(config))
        attention = Attention(config, bias=False, qk_norm="full", turned=turned, joined=True)
        return Block(config, attention, Mixture(router, experts))

    return Decoder(config, block, ropes={"": Rope(width=turned)})


class HunyuanMixture(Mixture):
    """``HunYuanMoEV1Moe``."""

    def __init__(self, config: Config, layer: int) -> None:
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        count, top_k = (
            value if isinstance(value, int) else value[layer]
            for value in (config["num_experts"], config["moe_topk"])
        )
        router = Router(hidden, count, top_k, upcast=True, normalize=True)
        super().__init__(
            router, Experts(hidden, inner, count, act=act(config)), router_name="wg",
            shared=("shared_mlp", MLP(hidden, inner, act(config))), shared_first=True,
        )  # fmt: skip
        self.gate = Module()
        self.gate.wg = router
        del self.children["wg"]
        self.router = router
        del self.children["router"]

    def route(self) -> Router:
        return self.router


def hunyuan_moe(raw: Config) -> Network:
    """``HunYuanMoEV1ForCausalLM``."""
    config = filled(raw)

    def block(config: Config, layer: int) -> Module:
        attention = llama.Attention({**config, "model_type": "hunyuan_v1_dense"}, layer)
        return Block(config, attention, HunyuanMixture(config, layer))

    return Decoder(config, block)


MODEL_TYPES = {
    "llama4_text": llama4_text,
    "phimoe": phimoe,
    "ernie4_5_moe": ernie_moe,
    "ernie4_5_vl_moe_text": ernie_vl,
    "minimax_m2": minimax_m2,
    "hunyuan_v1_moe": hunyuan_moe,
}
