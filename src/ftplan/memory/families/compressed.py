"""DeepSeek-V4: attention to windows that were compressed to one key, and mixed residual streams.

Each token's hidden state is several streams; a layer's parts see one mixture of them and are added
to all (manifold-constrained hyper-connections). Keys are values; beside the tokens of a sliding
window stand keys of compressed windows, some of which an indexer picks. transformers has only eager
attention for it. The indexer's choice has no gradient: what it is made of dies with it.
Source: transformers 5.23.0, models/deepseek_v4/modeling_deepseek_v4.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.experts import Experts, Routing, gather_rows, topk
from ftplan.memory.families.decoder import MLP, Config, Decoder, Rope, filled
from ftplan.memory.families.gpt_oss import minus_maximum, with_sinks, without_sinks
from ftplan.memory.families.hybrid import summed
from ftplan.memory.families.mixture import act
from ftplan.memory.families.patches import plant
from ftplan.memory.families.streams import Connection, Head, spread, unweighted
from ftplan.memory.nn import Linear, Module, RMSNorm, Shared, activation
from ftplan.memory.tape import SCORES, SEQ, TOKENS, Grads, Tape, Tensor

SLIDING = "sliding_attention"
SPARSE = "compressed_sparse_attention"
HEAVY = "heavily_compressed_attention"
LateNorm = partial(RMSNorm, late=True)


def _share(width: int, rate: int) -> int:
    """Numbers for each token of what there is once for each window of ``rate`` tokens."""
    return max(1, -(-width // rate))


def turned(x: Tensor, table: tuple[Tensor, Tensor], rope: int, each: int = 1) -> Tensor:
    """Pairs of the last ``rope`` of ``each`` numbers rotated in fp32, joined with the rest."""
    wide = max(2, x.width * rope // each)
    cos, sin = (t.tape.tensor(t.rows, t.width * 2, t.dtype, "rope") for t in table)
    rest, part = ops.part(x, x.width - wide), ops.part(x, wide)
    straight = ops.mul(ops.to(part, "fp32"), cos)
    halves = ops.cat((ops.neg(ops.part(part, wide // 2)), ops.part(part, wide // 2)))
    whole = ops.add(straight, ops.mul(ops.to(halves, "fp32"), sin))
    del straight, halves
    return ops.cat((rest, ops.to(whole, x.dtype)))


def _summed(x: Tensor, rate: int) -> Tensor:
    """The sum over each window's tokens; the way back is a view."""
    out = x.tape.tensor(x.rows, _share(x.width, rate), x.dtype, "sum over windows")
    rows, width = x.rows, x.width
    ops.record([out], "sum", [x], lambda grad: (grad.alias(rows, width),))
    return out


class Compressor(Module):
    """``DeepseekV4HCACompressor``; ``overlapping``: windows see half of the one before, and two
    series of numbers are made for that."""

    def __init__(self, config: Config, size: int, rate: int, *, overlapping: bool) -> None:
        super().__init__()
        wide = size * (2 if overlapping else 1)
        self.rate, self.overlapping, self.rope = rate, overlapping, config["qk_rope_head_dim"]
        self.kv_proj = Linear(config["hidden_size"], wide)
        self.gate_proj = Linear(config["hidden_size"], wide)
        self.position_bias = self.parameter("position_bias", rate, wide)
        self.kv_norm = LateNorm(size)

    def compressed(self, x: Tensor) -> Tensor:
        """A key for each window: its tokens weighed by a softmax of their gates."""
        tape, rate = x.tape, self.rate
        kv, gate = self.kv_proj.forward(x), self.gate_proj.forward(x)
        gate = ops.add(gate, tape.leaf(self.position_bias))
        if self.overlapping:
            kv, gate = _overlapped(kv), _overlapped(gate)
        weights = ops.to(ops.softmax(gate, "fp32"), kv.dtype)
        out = _summed(ops.mul(kv, weights), rate * (2 if self.overlapping else 1))
        assert self.kv_norm.weight is not None
        out = self.kv_norm.forward(out)
        size = self.kv_norm.weight.shape[0]
        table = tape.tensor(SEQ, _share(self.rope // 2, rate), x.dtype, "rope")
        return turned(out, (table, table), self.rope, size)


def _overlapped(x: Tensor) -> Tensor:
    """Two copies into slices of zeros: each way back copies it whole."""
    tape = x.tape
    out = tape.tensor(x.rows, x.width, x.dtype, "overlapping windows")
    rows, width, dtype = x.rows, x.width, x.dtype

    def apply(grad: Tensor) -> Grads:
        tape = grad.tape
        first = tape.tensor(rows, width, dtype, "gradient")
        part = tape.tensor(rows, width // 2, dtype, "gradient")
        back = tape.tensor(rows, width, dtype, "gradient")
        del part
        second = tape.tensor(rows, width, dtype, "gradient")
        del first
        part = tape.tensor(rows, width // 2, dtype, "gradient")
        again = tape.tensor(rows, width, dtype, "gradient")
        del second, part, again
        return (back,)

    ops.record([out], "copies", [x], apply)
    return out


class Indexer(Compressor):
    """``DeepseekV4Indexer``: the windows that each query looks at."""

    def __init__(self, config: Config, rate: int) -> None:
        size, heads = config["index_head_dim"], config["index_n_heads"]
        super().__init__(config, size, rate, overlapping=True)
        self.heads, self.size, self.top = heads, size, config["index_topk"]
        self.q_b_proj = Linear(config["q_lora_rank"], heads * size)
        plant(self, "scorer.weights_proj", Linear(config["hidden_size"], heads))

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        tape = x.tape
        keys = self.compressed(x)
        table = tape.tensor(SEQ, self.rope // 2, x.dtype, "rope")
        q = turned(self.q_b_proj.forward(latent), (table, table), self.rope, self.size)
        scores = self.scores(ops.to(q, "fp32"), ops.to(keys, "fp32"))
        weights = ops.scale(ops.to(self.child("scorer.weights_proj").forward(x), "fp32"))
        scored = spread(weights, scores, scores.width)
        total = tape.tensor(SCORES, 1, "fp32", "index scores")
        del scored, scores, q, keys
        top = min(self.top, -(-(tape.env.seq_len or self.top) // self.rate))
        best = [tape.tensor(TOKENS, top, dtype, "topk") for dtype in ("fp32", "int64")]
        del total
        invalid = tape.tensor(TOKENS, top, "bool", "invalid")
        whole = tape.tensor(TOKENS, top, "int64", "invalid")
        out = tape.tensor(TOKENS, top, "int64", "topk indices")
        del best, invalid, whole
        return out

    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        """Products of every query with every window's key, a head at a time."""
        tape, rate = q.tape, self.rate
        rows = SCORES * _share(self.heads, rate)
        if not tape.env.one_sequence:  # keys are copied for every query of a batch
            keys = tape.tensor(SCORES, _share(self.size, rate), keys.dtype, "keys for each query")
        scores = ops.matmul(q, keys, rows, 1, "index scores", exact=True, inner=self.size)
        return ops.scale(ops.unary(scores, "relu", "output"))


class SparseCompressor(Compressor):
    """``DeepseekV4CSACompressor``."""

    def __init__(self, config: Config, rate: int) -> None:
        super().__init__(config, config["head_dim"], rate, overlapping=True)
        self.indexer = Indexer(config, rate)


def refusal(*, flash: bool) -> UnsupportedError:
    """What transformers and PEFT fail at."""
    if flash:
        return UnsupportedError(
            "flash attention of DeepSeek-V4",
            remedy="set attention: eager; heads of 512 are too wide for the kernel",
        )
    return UnsupportedError(
        "DeepSeek-V4's o_a_proj as an adapted or quantised layer",
        remedy="name targets without it, as [q_a_proj, q_b_proj, kv_proj, o_b_proj], and weights: "
        "bf16; a plain linear layer does not fit its groups, and PEFT's fails in forward",
    )


class Attention(Module):
    """``DeepseekV4Attention``: one key for all heads, which is the value too."""

    def __init__(self, config: Config, kind: str) -> None:
        super().__init__()
        hidden, low = config["hidden_size"], config["q_lora_rank"]
        self.count, self.size = config["num_attention_heads"], config["head_dim"]
        self.rope, self.kind = config["qk_rope_head_dim"], kind
        self.rate = config["compress_rates"].get(kind, 0)
        self.dropout = config.get("attention_dropout") or 0.0
        self.groups, inner = config["o_groups"], config["o_lora_rank"]
        self.q_a_proj = Linear(hidden, low)
        self.q_a_norm = LateNorm(low)
        self.q_b_proj = Linear(low, self.count * self.size)
        self.kv_proj = Linear(hidden, self.size)
        self.kv_norm = LateNorm(self.size)
        self.o_a_proj = Linear(self.count * self.size // self.groups, self.groups * inner)
        self.o_b_proj = Linear(self.groups * inner, hidden)
        self.sinks = self.parameter("sinks", self.count)
        if kind == SPARSE:
            self.compressor: Compressor = SparseCompressor(config, self.rate)
        elif kind == HEAVY:
            self.compressor = Compressor(config, self.size, self.rate, overlapping=False)

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor]) -> Tensor:
        tape, count, size = x.tape, self.count, self.size
        table = shared.rope["main" if self.kind == SLIDING else "compress"]
        latent = self.q_a_norm.forward(self.q_a_proj.forward(x))
        q = ops.view(self.q_b_proj.forward(latent), TOKENS * count, size)
        q = ops.view(unweighted(q), TOKENS, count * size)
        q = turned(q, table, self.rope, size)
        kv = turned(self.kv_norm.forward(self.kv_proj.forward(x)), table, self.rope, size)
        mask = shared.masks[""]
        if self.rate:
            kv = ops.cat((kv, self.compressor.compressed(x)))
            bias = self.bias(x, latent)
            if mask is not None:
                rows = _keys(1, self.rate)
                mask = tape.tensor(rows, 1, mask.dtype, "mask") if bias is not None else mask
        out = self.attended(q, kv, mask, held)
        out = ops.copy(turned(out, table, self.rope, size))
        return self.o_b_proj.forward(ops.copy(self.grouped(out)))

    def bias(self, x: Tensor, latent: Tensor) -> Tensor:
        """Which windows a query sees, of those before it."""
        tape = x.tape
        if self.kind == SPARSE:
            picked = self.compressor.children["indexer"].forward(x, latent)
            safe = tape.tensor(picked.rows, picked.width, "int64", "topk indices")
            out = tape.tensor(_keys(1, self.rate, alone=True), 1, x.dtype, "block bias")
            del safe
            return out
        zeros = tape.tensor(_keys(1, self.rate, alone=True), 1, x.dtype, "block bias")
        out = tape.tensor(zeros.rows, 1, x.dtype, "block bias")
        del zeros
        return out

    def attended(self, q: Tensor, kv: Tensor, mask: Tensor | None, held: list[Tensor]) -> Tensor:
        """``eager_attention_forward``: keys and values are each copied to every head."""
        count, tape = self.count, q.tape
        rows = _keys(count, self.rate)
        keys, values = (ops.expand_heads(kv, count) for _ in range(2))
        weights = ops.scale(ops.matmul(q, keys, rows, 1, "scores", inner=self.size))
        if mask is not None:
            weights = ops.add(weights, mask)
        joined = with_sinks(weights, tape.leaf(self.sinks), count)
        joined = minus_maximum(joined, count)
        weights = ops.softmax(joined, joined.dtype)
        kept = ops.dropout(without_sinks(weights, rows), self.dropout)
        weights = ops.to(kept, values.dtype)
        del kept
        held.append(weights)
        out = ops.matmul(  # a row for each head
            weights, values, TOKENS * count, self.size, "attention", inner=1, counted=rows
        )
        out = ops.view(out, TOKENS, count * self.size)
        return ops.copy(out)

    def grouped(self, x: Tensor) -> Tensor:
        """``DeepseekV4GroupedLinear``: a matrix for each group of heads."""
        tape = x.tape
        if tape.env.attention == "flash" or type(self.children["o_a_proj"]) is not Linear:
            raise refusal(flash=tape.env.attention == "flash")
        weight = tape.leaf(self.o_a_proj.weight)
        width = self.o_a_proj.out_features
        x, weight = ops.autocast(x), ops.autocast(weight)
        tape.multiply(x.rows, self.o_a_proj.in_features, width)
        out = tape.tensor(x.rows, width, x.dtype, "bmm")
        saved = (x if weight.requires_grad else None, weight if x.requires_grad else None)
        makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in (x, weight)]
        rows, inner, wants = (
            x.rows,
            self.o_a_proj.in_features,
            x.requires_grad + (weight.requires_grad),
        )

        def apply(grad: Tensor) -> Grads:
            _kept = saved
            grad.tape.multiply(rows, inner, width, times=wants)
            return tuple(make(grad) for make in makers)

        ops.record([out], "bmm", [x, weight], apply)
        return out


def _keys(heads: int, rate: int, *, alone: bool = False) -> Any:
    """Pairs of a query and a key, of tokens and compressed windows or of the latter ``alone``."""
    windows = SCORES * _share(heads, rate) if rate else SCORES * 0
    return windows if alone else SCORES * heads + windows


class Gate(Module):
    """``DeepseekV4TopKRouter``, ``DeepseekV4HashRouter`` (``hashed``: by a table of token ids)."""

    def __init__(self, config: Config, *, hashed: bool) -> None:
        super().__init__()
        self.weight = self.parameter("weight", config["n_routed_experts"], config["hidden_size"])
        self.top_k, self.hashed = config["num_experts_per_tok"], hashed
        self.scoring = config["scoring_func"]

    def forward(self, x: Tensor) -> Routing:
        tape = x.tape
        logits = ops.linear(x, tape.leaf(self.weight))
        scores = self.scored(logits)
        if self.hashed:
            index = tape.tensor(x.rows, self.top_k, "int64", "experts by token")
        else:
            with tape.no_grad():
                index = topk(ops.scale(scores), self.top_k)[1]
        weights = gather_rows(scores, index, x.rows, self.top_k, "gather")
        weights = ops.mul(weights, ops.shift(summed(weights)))
        return Routing(logits, ops.scale(weights), index)

    def scored(self, logits: Tensor) -> Tensor:
        if self.scoring != "sqrtsoftplus":
            return activation(logits, self.scoring)
        soft = ops.unary(ops.autocast_fp32(logits), "softplus", "input")
        return ops.unary(soft, "sqrt", "output")


class LimitedExperts(Experts):
    """Gates and values are cut off at a limit."""

    def gate(self, both: Tensor) -> Tensor:
        gate, up = ops.split(both, [self.inner, self.inner])
        gate, up = ops.unary(gate, "clamp", "input"), ops.unary(up, "clamp", "input")
        return ops.mul(activation(gate, self.act), up)


class LimitedMLP(MLP):
    """The same of the MLP that every token passes."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.children[name] for name in self.names)
        gates = ops.unary(gate.forward(x), "clamp", "input")
        values = ops.unary(up.forward(x), "clamp", "input")
        out: Tensor = down.forward(ops.mul(activation(gates, self.act), values))
        return out


class Mixture(Module):
    """``DeepseekV4SparseMoeBlock``."""

    def __init__(self, config: Config, *, hashed: bool) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
        self.gate = Gate(config, hashed=hashed)
        self.experts = LimitedExperts(hidden, inner, config["n_routed_experts"], act=act(config))
        self.shared_experts = LimitedMLP(hidden, inner, act(config), bias=bool(config["mlp_bias"]))

    def forward(self, x: Tensor) -> Tensor:
        routed = self.experts.forward(x, self.gate.forward(x))
        return ops.add(routed, self.shared_experts.forward(x))


class Block(Module):
    """``DeepseekV4DecoderLayer``."""

    def __init__(self, config: Config, kind: str, *, hashed: bool) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.self_attn = Attention(config, kind)
        self.mlp = Mixture(config, hashed=hashed)
        self.input_layernorm = LateNorm(hidden)
        self.post_attention_layernorm = LateNorm(hidden)
        self.attn_hc, self.ffn_hc = Connection(config), Connection(config)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        post, comb, collapsed = self.attn_hc.forward(x)
        out = self.self_attn.forward(self.input_layernorm.forward(collapsed), shared, held)
        x = self.taken(post, comb, out, x)
        post, comb, collapsed = self.ffn_hc.forward(x)
        out = self.mlp.forward(self.post_attention_layernorm.forward(collapsed))
        return self.taken(post, comb, out, x)

    def taken(self, post: Tensor, comb: Tensor, out: Tensor, x: Tensor) -> Tensor:
        """A part's output onto every stream, and the streams mixed."""
        onto = spread(ops.to(post, x.dtype), out, x.width)
        mixed = ops.matmul(
            ops.to(comb, x.dtype), x, x.rows, x.width, "streams mixed", inner=self.attn_hc.streams
        )
        return ops.add(onto, mixed)


class DeepseekV4(Decoder):
    """``DeepseekV4ForCausalLM``."""

    def __init__(self, raw: Config) -> None:
        config = completed(raw)
        types, kinds = config["layer_types"], config["mlp_layer_types"]
        half = config["qk_rope_head_dim"] // 2
        super().__init__(
            config,
            lambda config, layer: Block(config, types[layer], hashed=kinds[layer] == "hash_moe"),
            kind=lambda layer: (types[layer], kinds[layer]),
            ropes={"main": Rope(width=half), "compress": Rope(width=half)},
            windows={"": config["sliding_window"]}, norm=LateNorm, eager_only=True,
        )  # fmt: skip
        self.kept_in_fp32 = (
            "attn_hc", "ffn_hc", "hc_head", "sinks", "position_bias", "q_a_norm", "kv_norm",
            "input_layernorm", "post_attention_layernorm", "norm",
        )  # fmt: skip
        self.streams = config["hc_mult"]
        self.body.hc_head = Head(config)
        table = config["vocab_size"] * config["num_experts_per_tok"] * 8
        self.buffer_bytes = kinds.count("hash_moe") * table

    def enter(self, tape: Tape, shared: Shared) -> Tensor:
        x = self.body.embed(tape)
        shared.held.append(x)
        self.prepare(tape, shared, x.dtype)
        return ops.expand_heads(x, self.streams)

    def leave(self, x: Tensor, shared: Shared) -> Tensor:
        return self.body.last(self.body.children["hc_head"].forward(x))


def completed(raw: Config) -> dict[str, Any]:
    """With what the class makes of a config: kinds of layers, and names of earlier checkpoints."""
    config = filled(raw, "deepseek_v4")
    count = config["num_hidden_layers"]
    rates = dict(config.get("compress_rates") or {SPARSE: 4, HEAVY: 128})
    for kind, old in ((SPARSE, "compress_rate_csa"), (HEAVY, "compress_rate_hca")):
        rates[kind] = config.get(old) or rates[kind]
    ratios = {0: SLIDING, 4: SPARSE, 128: HEAVY}
    types = list(config.get("layer_types") or ())
    types = types or [ratios[ratio] for ratio in config.get("compress_ratios") or ()]
    types = types or [SPARSE if layer >= 2 and layer % 2 else HEAVY for layer in range(count)]
    hashed = config.get("num_hash_layers")
    hashed = 3 if hashed is None else hashed
    kinds = list(config.get("mlp_layer_types") or ()) or [
        "hash_moe" if layer < hashed else "moe" for layer in range(count)
    ]
    rope = config.get("qk_rope_head_dim") or config["head_dim"] * (
        config.get("partial_rotary_factor") or 0.125
    )
    return config | {
        "compress_rates": rates, "layer_types": types[:count], "mlp_layer_types": kinds[:count],
        "qk_rope_head_dim": int(rope),
    }  # fmt: skip


MODEL_TYPES = {"deepseek_v4": DeepseekV4}
