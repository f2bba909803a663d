"""Latent attention to the keys that an indexer picks: DeepSeek-V3.2 and GLM-5.

The indexer scores every pair of tokens in every head of its own and asks for no gradient; what it
picked becomes a mask. Source: transformers 5.23.0, models/deepseek_v32, glm_moe_dsa.
"""

from __future__ import annotations

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.attention import attend, make_mask
from ftplan.memory.families.decoder import MLP, Block, Config, Decoder, Rope, filled
from ftplan.memory.families.latent import (
    LatentAttention,
    deepseek_mixture,
    sigmoid_router,
    sparse_layers,
)
from ftplan.memory.families.llama import rotate
from ftplan.memory.families.mixture import act
from ftplan.memory.nn import LayerNorm, Linear, Module, Network, Shared
from ftplan.memory.tape import SCORES, TOKENS, Tape, Tensor


class Indexer(Module):
    """``DeepseekV32Indexer``: the ``top`` best keys of each query."""

    def __init__(self, config: Config, *, pairs: bool) -> None:
        super().__init__()
        self.heads, self.size = config["index_n_heads"], config["index_head_dim"]
        self.turned, self.top, self.pairs = config["qk_rope_head_dim"], config["index_topk"], pairs
        hidden = config["hidden_size"]
        self.wq_b = Linear(config["q_lora_rank"], self.heads * self.size)
        self.wk = Linear(hidden, self.size)
        self.k_norm = LayerNorm(self.size)
        self.weights_proj = Linear(hidden, self.heads)

    def forward(
        self, x: Tensor, latent: Tensor, attention: PickingAttention, shared: Shared
    ) -> Tensor:
        tape = x.tape
        cos, sin = shared.rope[""]
        turn = attention.turn if self.pairs else rotate
        with tape.no_grad():
            q = self.wq_b.forward(latent)
            rest = self.heads * (self.size - self.turned)
            q_turned, q_rest = ops.split(q, [self.heads * self.turned, rest])
            k = self.k_norm.forward(self.wk.forward(x))
            k_turned, k_rest = ops.split(k, [self.turned, self.size - self.turned])
            q_turned, k_turned = turn(q_turned, cos, sin), turn(k_turned, cos, sin)
            q, k = ops.cat((q_turned, q_rest)), ops.cat((k_turned, k_rest))
            scores = ops.scale(self.score(q, k))
            scores = ops.unary(scores, "relu", "output")
            weights = ops.scale(ops.to(self.weights_proj.forward(x), "fp32"))
            total = ops.matmul(weights, scores, SCORES, 1, "index scores")
            mask = shared.masks[""]
            if mask is not None and mask.dtype == "bool":
                inverse = tape.tensor(SCORES, 1, "bool", "inverted mask")
                total = ops.shift(total)
                del inverse
            else:
                total = ops.shift(total)
            top = min(self.top, tape.env.seq_len or self.top)
            best = tape.tensor(TOKENS, top, total.dtype, "topk")
            index = tape.tensor(TOKENS, top, "int64", "topk indices")
            del best
            return ops.to(index, "int32")

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """Products of all pairs, a head at a time: keys are copied for every query of a batch."""
        tape, rows = q.tape, SCORES * self.heads
        q, k = ops.to(q, "fp32"), ops.to(k, "fp32")
        low, turned = ops.autocast(q), ops.autocast(k)
        if not tape.alone:
            turned = tape.tensor(SCORES, self.size, turned.dtype, "keys for each query")
        return ops.matmul(low, turned, rows, 1, "index scores", exact=True)


class PickingAttention(LatentAttention):
    """``DeepseekV32Attention``, ``GlmMoeDsaAttention``; without ``indexer`` of its own, it looks
    where the layer before did."""

    def __init__(self, config: Config, *, pairs: bool, indexed: bool, passes_on: bool) -> None:
        super().__init__(config, "pairs")
        self.passes_on = passes_on
        if indexed:
            self.indexer = Indexer(config, pairs=pairs)

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor] | None = None) -> Tensor:
        count, tape = self.heads.count, x.tape
        low = self.q_a_layernorm.forward(self.q_a_proj.forward(x))
        q = self.q_b_proj.forward(low)
        q_plain, q_turned = ops.split(q, [count * self.plain, count * self.turned])
        latent = self.kv_a_proj_with_mqa.forward(x)
        kv, k_turned = ops.split(latent, [self.rank, self.turned])
        kv = self.kv_a_layernorm.forward(kv)
        cos, sin = shared.rope[""]
        q_turned, k_turned = self.turn(q_turned, cos, sin), self.turn(k_turned, cos, sin)
        query = ops.cat((q_plain, q_turned))
        key, value = self.expand(kv, k_turned)
        picked = shared.picked
        if "indexer" in self.children:
            picked = self.indexer.forward(x, low, self, shared)
        if picked is None:
            raise UnsupportedError(
                "a pipeline stage that begins with layers which look at another one's tokens",
                because="transformers hands on what a layer picked within one model alone",
                remedy="use sharding.kind: fsdp, or zero3",
            )
        if self.passes_on:
            shared.picked = picked
        mask: Tensor | None = None
        if tape.env.attention != "flash":
            hidden = _elsewhere(picked)
            mask = _narrowed(hidden, shared.masks[""])
        out = attend(query, key, value, self.heads, mask, by_head=True, held=held)
        return self.o_proj.forward(out)


def _elsewhere(picked: Tensor) -> Tensor:
    """``new_ones(...).scatter``: the pairs that were not picked."""
    tape = picked.tape
    ones = tape.tensor(SCORES, 1, "bool", "ones")
    long = ops.to(picked, "int64")
    hidden = tape.tensor(SCORES, 1, "bool", "index mask")
    del ones, long
    return hidden


def _narrowed(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mask without what was not picked."""
    assert mask is not None
    tape = hidden.tape
    if mask.dtype != "bool":
        return tape.tensor(SCORES, 1, mask.dtype, "mask")
    shown = tape.tensor(SCORES, 1, "bool", "picked")
    out = tape.tensor(SCORES, 1, "bool", "mask")
    del shown
    return out


class Indexed(Decoder):
    """A decoder whose masks are made in any case, for the indexer."""

    def prepare(self, tape: Tape, shared: Shared, dtype: str) -> None:
        super().prepare(tape, shared, dtype)
        shared.masks[""] = make_mask(tape, dtype, always=True)


def indexer_types(config: Config) -> list[str]:
    """Which layers have an indexer (``full``) and which look where the one before did."""
    count = config["num_hidden_layers"]
    if config.get("indexer_types"):
        return list(config["indexer_types"])[:count]
    pattern = config.get("index_topk_pattern")
    if pattern:
        return [{"F": "full", "S": "shared"}[sign] for sign in pattern][:count]
    every, offset = max(config.get("index_topk_freq") or 1, 1), config.get("index_skip_topk_offset")
    start = (offset if offset is not None else 2) - 1
    return ["full" if max(layer - start, 0) % every == 0 else "shared" for layer in range(count)]


def indexed(raw: Config) -> Network:
    """``DeepseekV32ForCausalLM``, ``GlmMoeDsaForCausalLM``."""
    config = {"first_k_dense_replace": 3, **filled(raw)}
    sparse, glm = sparse_layers(config), config["model_type"] == "glm_moe_dsa"
    types = indexer_types(config) if glm else ["full"] * config["num_hidden_layers"]

    def block(config: Config, layer: int) -> Module:
        attention = PickingAttention(
            config, pairs=glm, indexed=types[layer] == "full", passes_on=glm
        )
        if not sparse[layer]:
            mlp = MLP(config["hidden_size"], config["intermediate_size"], act(config))
            return Block(config, attention, mlp)
        router = sigmoid_router(config)
        mixture = deepseek_mixture(config, router, config["n_routed_experts"])
        return Block(config, attention, mixture)

    return Indexed(
        config, block, kind=lambda layer: (sparse[layer], types[layer]),
        ropes={"": Rope(width=config["qk_rope_head_dim"])},
    )  # fmt: skip


MODEL_TYPES = {"deepseek_v32": indexed, "glm_moe_dsa": indexed}
