"""Latent attention (DeepSeek-V2, V3, Kimi, GLM-4.7 Flash) and the mixtures with its router.

Keys and values are made from a narrow latent; keys are joined in a fresh tensor, which two copies
fill. Source: transformers 5.23.0, models/deepseek_v2, deepseek_v3, glm4_moe, glm4_moe_lite, dots1.
"""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend
from ftplan.memory.experts import Experts, Router
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
from ftplan.memory.families.llama import ScaledEmbedding, rotate
from ftplan.memory.families.mixture import Mixture, act
from ftplan.memory.nn import Embedding, Linear, Module, Network, RMSNorm, Shared
from ftplan.memory.tape import SEQ, TOKENS, Grads, Tensor


class LatentAttention(Module):
    """Multi-head latent attention. ``rotation``: ``pairs``, ``half`` or ``complex``."""

    def __init__(self, config: Config, rotation: str, *, scaled: bool = False) -> None:
        super().__init__()
        self.scaled = scaled
        hidden, count = config["hidden_size"], config["num_attention_heads"]
        self.plain, self.turned = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        self.rank, value = config["kv_lora_rank"], config["v_head_dim"]
        size = self.plain + self.turned
        self.heads = Heads(
            count=count, kv_count=count, size=size, value_size=value,
            dropout=config.get("attention_dropout") or 0.0,
        )  # fmt: skip
        bias = bool(config.get("attention_bias"))
        low = config.get("q_lora_rank")
        self.low_rank_q = low is not None
        if low is None:
            self.q_proj = Linear(hidden, count * size)
        else:
            self.q_a_proj = Linear(hidden, low, bias=bias)
            self.q_a_layernorm = RMSNorm(low)
            self.q_b_proj = Linear(low, count * size)
        self.kv_a_proj_with_mqa = Linear(hidden, self.rank + self.turned, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.rank)
        self.kv_b_proj = Linear(self.rank, count * (self.plain + value))
        self.o_proj = Linear(count * value, hidden, bias=bias)
        self.rotation = rotation

    def queries(self, x: Tensor) -> Tensor:
        """Through a latent of their own, or straight."""
        if not self.low_rank_q:
            return self.q_proj.forward(x)
        return self.q_b_proj.forward(self.q_a_layernorm.forward(self.q_a_proj.forward(x)))

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor] | None = None) -> Tensor:
        count = self.heads.count
        q = self.queries(x)
        q_plain, q_turned = ops.split(q, [count * self.plain, count * self.turned])
        latent = self.kv_a_proj_with_mqa.forward(x)
        kv, k_turned = ops.split(latent, [self.rank, self.turned])
        kv = self.kv_a_layernorm.forward(kv)
        cos, sin = shared.rope[""]
        q_turned, k_turned = self.turn(q_turned, cos, sin), self.turn(k_turned, cos, sin)
        query = ops.cat((q_plain, q_turned))
        if self.scaled:  # by position, beyond the trained length (Mistral 4)
            query = ops.mul(query, x.tape.tensor(SEQ, 1, query.dtype, "attention scales"))
        key, value = self.expand(kv, k_turned)
        out = attend(query, key, value, self.heads, shared.masks[""], by_head=True, held=held)
        return self.o_proj.forward(out)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary positions of the part of each head that has them."""
        if self.rotation == "complex":
            return rotate_complex(x, cos, sin)
        if self.rotation == "half":
            return rotate(x, cos, sin)
        cos, sin = cos.alias(width=cos.width // 2), sin.alias(width=sin.width // 2)
        first, second = ops.part(x, x.width // 2), ops.part(x, x.width // 2)
        left = ops.add(ops.mul(first, cos), ops.mul(second, sin))
        right = ops.add(ops.mul(second, cos), ops.mul(first, sin))
        return ops.cat((left, right))

    def expand(self, kv: Tensor, k_turned: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads from the latent."""
        count = self.heads.count
        both = self.kv_b_proj.forward(kv)
        k_plain, value = ops.split(both, [count * self.plain, count * self.heads.value_size])
        return _assembled(k_plain, k_turned, count), value


def _assembled(plain: Tensor, turned: Tensor, heads: int) -> Tensor:
    """Two copies into slices of an empty tensor (``CopySlices``): each way back copies it whole."""
    width, dtype = plain.width + heads * turned.width, plain.dtype
    out = plain.tape.tensor(TOKENS, width, dtype, "keys")
    wide, narrow, turned_dtype = plain.width, turned.width, turned.dtype
    wants = plain.requires_grad, turned.requires_grad

    def apply(grad: Tensor) -> Grads:
        tape = grad.tape
        whole = tape.tensor(TOKENS, width, dtype, "gradient")
        part = tape.tensor(TOKENS, heads * narrow, dtype, "gradient")
        grad_turned = tape.tensor(TOKENS, narrow, turned_dtype, "gradient") if wants[1] else None
        del part
        again = tape.tensor(TOKENS, width, dtype, "gradient")
        del whole
        grad_plain = tape.tensor(TOKENS, wide, dtype, "gradient") if wants[0] else None
        del again
        return grad_plain, grad_turned

    ops.record([out], "keys", [plain, turned], apply)
    return out


def deepseek_mixture(config: Config, router: Router, experts: int) -> Module:
    """``DeepseekV3MoE``: routed experts, plus shared ones as one MLP."""
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    return Mixture(
        router,
        Experts(hidden, inner, experts, act=act(config)),
        shared=("shared_experts", MLP(hidden, inner * config["n_shared_experts"], act(config))),
    )


def sigmoid_router(config: Config) -> Router:
    """``DeepseekV3TopkRouter``."""
    return Router(
        config["hidden_size"], config["n_routed_experts"], config["num_experts_per_tok"],
        scoring="sigmoid", upcast=True, keep_fp32=True, scaled=True,
        normalize=bool(config["norm_topk_prob"]),
    )  # fmt: skip


def softmax_router(config: Config) -> Router:
    """``DeepseekV2TopkRouter``."""
    return Router(
        config["hidden_size"], config["n_routed_experts"], config["num_experts_per_tok"],
        upcast=True, keep_fp32=True, scaled=True,
        masked=config.get("topk_method") == "group_limited_greedy",
    )  # fmt: skip


def mistral_router(config: Config) -> Router:
    """``Mistral4TopkRouter``."""
    return Router(
        config["hidden_size"], config["n_routed_experts"], config["num_experts_per_tok"],
        scoring="gathered", keep_fp32=True, scaled=True, normalize=bool(config["norm_topk_prob"]),
    )  # fmt: skip


def sparse_layers(config: Config) -> list[bool]:
    """Which layers have experts."""
    count = config["num_hidden_layers"]
    types = config.get("mlp_layer_types")
    if types:
        return [name == "sparse" for name in types]
    first = config.get("first_k_dense_replace", 1)
    return [layer >= first for layer in range(count)]


def deepseek(raw: Config) -> Network:
    """``DeepseekV2ForCausalLM``, ``DeepseekV3ForCausalLM``, ``Glm4MoeLiteForCausalLM``."""
    config = filled(raw)
    sparse = sparse_layers(config)
    second, fourth = config["model_type"] == "deepseek_v2", config["model_type"] == "mistral4"
    rotation = "complex" if second else "pairs" if config["rope_interleave"] else "half"

    def block(config: Config, layer: int) -> Module:
        attention = LatentAttention(config, rotation, scaled=fourth)
        if not sparse[layer]:
            mlp = MLP(
                config["hidden_size"], config["intermediate_size"], act(config),
                bias=bool(config.get("mlp_bias")),
            )  # fmt: skip
            return Block(config, attention, mlp)
        router = softmax_router(config) if second else sigmoid_router(config)
        if fourth:
            router = mistral_router(config)
        return Block(
            config, attention, deepseek_mixture(config, router, config["n_routed_experts"])
        )

    width = config["qk_rope_head_dim"]
    return Decoder(
        config, block, kind=lambda layer: sparse[layer],
        ropes={"": Rope(width=width, complex_pairs=second)},
    )  # fmt: skip


def dense(raw: Config) -> Network:
    """``YoutuForCausalLM`` and ``MiniCPM3ForCausalLM``: latent attention, an MLP in every layer."""
    config = filled(raw)
    mini = config["model_type"] == "minicpm3"
    if mini:
        config["v_head_dim"] = config.get("v_head_dim") or (
            config["hidden_size"] // config["num_attention_heads"]
        )
    rotation = "pairs" if not mini and config.get("rope_interleave", True) else "half"

    def block(config: Config, _layer: int) -> Module:
        mlp = MLP(
            config["hidden_size"], config["intermediate_size"], act(config),
            bias=bool(config.get("mlp_bias")),
        )  # fmt: skip
        return Block(config, LatentAttention(config, rotation), mlp, scaled=mini)

    return Decoder(
        config, block, ropes={"": Rope(width=config["qk_rope_head_dim"])},
        table=ScaledEmbedding if mini else Embedding, states_scaled=mini,
    )  # fmt: skip


def grouped(raw: Config) -> Network:
    """``Glm4MoeForCausalLM``, ``Dots1ForCausalLM``: the same router, ordinary attention."""
    config = filled(raw)
    sparse = sparse_layers(config)
    vision = config["model_type"] == "glm4v_moe_text"
    glm = vision or config["model_type"] == "glm4_moe"
    types = [""] * config["num_hidden_layers"]
    windows: dict[str, int | None] = {"": None}
    if not glm and "sliding_attention" in (config.get("layer_types") or ()):
        types = list(config["layer_types"])
        windows = {"full_attention": None, "sliding_attention": config.get("sliding_window")}
    size = head_size(config)
    turned = int(size * (config.get("partial_rotary_factor") or 1.0))

    def block(config: Config, layer: int) -> Module:
        normed = not glm or (config.get("use_qk_norm") and not vision)
        attention = Attention(
            config, qk_norm="head" if normed else None, out_bias=False if glm else None,
            turned=turned, mask=types[layer],
        )  # fmt: skip
        if not sparse[layer]:
            mlp = MLP(config["hidden_size"], config["intermediate_size"], act(config))
            return Block(config, attention, mlp)
        mixture = deepseek_mixture(config, sigmoid_router(config), config["n_routed_experts"])
        return Block(config, attention, mixture)

    return Decoder(
        config, block, kind=lambda layer: (sparse[layer], types[layer]),
        ropes={"": Rope(width=turned, per_sequence=vision)}, windows=windows,
    )  # fmt: skip


MODEL_TYPES = {
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "mistral4": deepseek,
    "youtu": dense,
    "minicpm3": dense,
    "glm4_moe_lite": deepseek,
    "glm4_moe": grouped,
    "dots1": grouped,
}
