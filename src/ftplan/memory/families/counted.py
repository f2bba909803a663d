"""Families whose weights are counted and whose forward is not modelled: training is refused.

Source: transformers 5.23.0, models/mllama, glm4v, glm46v, glm_moe_dsa, kimi_linear.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from ftplan.errors import UnsupportedError
from ftplan.memory.experts import Experts
from ftplan.memory.families.decoder import Config, filled
from ftplan.memory.families.patches import plant, weight
from ftplan.memory.nn import (
    Embedding,
    Linear,
    Module,
    Network,
    RMSNorm,
    Shared,
    Stack,
    Stage,
)
from ftplan.memory.tape import Tape, Tensor

__all__ = ["MODEL_TYPES", "Counted"]


class Counted(Network):
    """Weights by name and shape; what would run them raises UnsupportedError."""

    def __init__(
        self, kind: str, layers: str, count: int, build: Callable[[int], Module],
        difference: Callable[[int], Hashable] = lambda _layer: 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kind = kind
        self.stages = [Stage(Stack(layers, count, build, difference), self._enter, self._leave)]

    def refusal(self) -> UnsupportedError:
        """Why nothing is run."""
        return UnsupportedError(
            f"the memory that model_type {self.kind!r} takes to run",
            remedy="its weights are counted; give --params for the textbook's sums of training",
        )

    def _enter(self, _tape: Tape, _shared: Shared) -> Tensor:
        raise self.refusal()

    def _leave(self, _x: Tensor, _shared: Shared) -> Tensor:
        raise self.refusal()

    def head(self, x: Tensor) -> Tensor:
        raise self.refusal()

    def classify(self, labels: int) -> None:
        raise self.refusal()


def _linears(
    root: Module, path: str, shapes: dict[str, tuple[int, int]], *, bias: bool = False
) -> None:
    for name, (width_in, width_out) in shapes.items():
        plant(root, f"{path}.{name}" if path else name, Linear(width_in, width_out, bias=bias))


def _norms(root: Module, width: int, *paths: str) -> None:
    for path in paths:
        plant(root, path, RMSNorm(width))


def _decoder(network: Counted, path: str, config: Config, *, tied: bool, rows: int = 0) -> None:
    """Table, last norm and head; ``rows`` of the table beyond the vocabulary."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    plant(network, f"{path}.embed_tokens", Embedding(vocabulary + rows, hidden))
    plant(network, f"{path}.norm", RMSNorm(hidden))
    network.lm_head = Linear(hidden, vocabulary)
    network.embedding_names = (f"{path}.embed_tokens",)
    if tied:
        network.tie("lm_head.weight", f"{path}.embed_tokens.weight")


def _gated(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}


def _sparse(root: Module, hidden: int, inner: int, count: int, shared: int) -> None:
    """Routed experts, their router, and experts that every token passes."""
    plant(root, "mlp.experts", Experts(hidden, inner, count))
    weight(root, "mlp.gate.weight", count, hidden)
    _linears(root, "mlp.shared_experts", _gated(hidden, inner * shared))


def kimi_linear(raw: Config) -> Network:
    """``KimiLinearForCausalLM``: delta-rule attention, and latent attention in some layers."""
    config = filled(raw)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    types, kinds = list(config["layer_types"]), list(config["mlp_layer_types"])
    size, count = config["linear_head_dim"], config["linear_num_heads"]
    latent, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    plain, value = config["qk_nope_head_dim"], config["v_head_dim"]
    wide = size * count

    def linear_attention(root: Module) -> None:
        _linears(
            root, "self_attn",
            {
                "q_proj": (hidden, wide), "k_proj": (hidden, wide), "v_proj": (hidden, wide),
                "forget_gate.f_a_proj": (hidden, size), "forget_gate.f_b_proj": (size, wide),
                "b_proj": (hidden, count), "g_a_proj": (hidden, size), "g_b_proj": (size, wide),
                "o_proj": (wide, hidden),
            },
        )  # fmt: skip
        weight(root, "self_attn.conv1d.weight", 3 * wide, 1, config.get("linear_conv_kernel") or 4)
        weight(root, "self_attn.forget_gate.dt_bias", wide)
        weight(root, "self_attn.forget_gate.A_log", 1, 1, count, 1)
        _norms(root, size, "self_attn.o_norm")

    def block(layer: int) -> Module:
        root = Module()
        if types[layer] == "linear_attention":
            linear_attention(root)
        else:
            _linears(
                root, "self_attn",
                {
                    "q_proj": (hidden, heads * (plain + turned)),
                    "kv_a_proj_with_mqa": (hidden, latent + turned),
                    "kv_b_proj": (latent, heads * (plain + value)),
                    "o_proj": (heads * value, hidden),
                },
            )  # fmt: skip
            _norms(root, latent, "self_attn.kv_a_layernorm")
        _norms(root, hidden, "input_layernorm", "post_attention_layernorm")
        if kinds[layer] == "sparse":
            _sparse(
                root, hidden, config["moe_intermediate_size"], config["num_experts"],
                config["num_shared_experts"],
            )  # fmt: skip
        else:
            _linears(root, "mlp", _gated(hidden, config["intermediate_size"]))
        return root

    network = Counted(
        "kimi_linear", "model.layers", config["num_hidden_layers"], block,
        lambda layer: (types[layer], kinds[layer]),
    )  # fmt: skip
    _decoder(network, "model", config, tied=bool(config.get("tie_word_embeddings")))
    return network


MODEL_TYPES = {"kimi_linear": kimi_linear}
