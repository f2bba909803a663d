"""Decoders whose modeling code is published beside their weights, and two of transformers.

InternLM 2 and EXAONE 3 are no classes of transformers: names and shapes are those of their
repositories' modeling files (internlm/internlm2-7b modeling_internlm2.py,
LGAI-EXAONE/EXAONE-3.0-7.8B modeling_exaone.py), the order of operations is Llama's, which both
follow. BitNet: transformers 5.23.0, models/bitnet.
"""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.attention import attend
from ftplan.memory.families.decoder import MLP, Attention, Block, Config, Decoder, filled
from ftplan.memory.families.mixture import act
from ftplan.memory.nn import Linear, Module, Network, RMSNorm, Shared, activation
from ftplan.memory.tape import Tensor


class FusedAttention(Module):
    """Queries, keys and values in one matrix; ``names`` of it and of the projection back."""

    def __init__(self, config: Config, names: tuple[str, str], *, bias: bool, out_bias: bool):
        super().__init__()
        plain = Attention(config, bias=False)
        self.heads, hidden = plain.heads, config["hidden_size"]
        self.wide = self.heads.count * self.heads.size
        self.narrow = self.heads.kv_count * self.heads.size
        self.names = names
        self.replace(names[0], Linear(hidden, self.wide + 2 * self.narrow, bias=bias))
        self.replace(names[1], Linear(self.wide, hidden, bias=out_bias))
        self.turn = plain.turn

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor] | None = None) -> Tensor:
        both = self.child(self.names[0]).forward(x)
        q, k, v = ops.split(both, [self.wide, self.narrow, self.narrow])
        del both
        q, k = self.turn(q, k, shared)
        out = attend(q, k, v, self.heads, shared.masks.get(""), held=held)
        projected: Tensor = self.child(self.names[1]).forward(out)
        return projected


class InternDecoder(Decoder):
    """``InternLM2ForCausalLM``: its head is called ``output``."""

    def __init__(self, config: Config) -> None:
        def block(config: Config, _layer: int) -> Module:
            bias = bool(config["bias"])
            attention = FusedAttention(config, ("wqkv", "wo"), bias=bias, out_bias=bias)
            mlp = MLP(
                config["hidden_size"], config["intermediate_size"], act(config),
                names=("w1", "w3", "w2"),
            )  # fmt: skip
            return Block(
                config, attention, mlp, mixer_name="attention", mlp_name="feed_forward",
                norms=("attention_norm", "ffn_norm"),
            )  # fmt: skip

        super().__init__({**config, "tie_word_embeddings": False}, block,
                         embed_name="tok_embeddings")  # fmt: skip
        self.children["output"] = self.children.pop("lm_head")
        self.head_name = "output"
        if config["tie_word_embeddings"]:
            self.tie("output.weight", "model.tok_embeddings.weight")


def internlm2(raw: Config) -> Network:
    """``InternLM2ForCausalLM``."""
    return InternDecoder(
        {
            "vocab_size": 103168, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu",
            "tie_word_embeddings": False, "bias": True, **filled(raw),
        }
    )  # fmt: skip


class Exaone(Module):
    """The attention of an EXAONE block stands in a module of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config, bias=False, out_name="out_proj")

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor] | None = None) -> Tensor:
        return self.attention.forward(x, shared, held)


def exaone(raw: Config) -> Network:
    """``ExaoneForCausalLM`` (EXAONE 3.0 and 3.5)."""
    config = {
        "vocab_size": 102400, "hidden_size": 2048, "num_attention_heads": 32,
        "tie_word_embeddings": True, "activation_function": "silu", **filled(raw),
    }  # fmt: skip
    config["num_hidden_layers"] = config.get("num_layers") or config.get("num_hidden_layers") or 32
    config["intermediate_size"] = config.get("intermediate_size") or 4 * config["hidden_size"]

    def block(config: Config, _layer: int) -> Module:
        mlp = MLP(
            config["hidden_size"], config["intermediate_size"], config["activation_function"],
            names=("c_fc_0", "c_fc_1", "c_proj"),
        )  # fmt: skip
        return Block(config, Exaone(config), mlp, mixer_name="attn", norms=("ln_1", "ln_2"))

    return Decoder(
        config, block, path="transformer", embed_name="wte", layers_name="h", norm_name="ln_f"
    )


class NormedAttention(Attention):
    """BitNet's: a norm before the projection back."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.attn_sub_norm = RMSNorm(config["hidden_size"])

    def out(self, x: Tensor) -> Tensor:
        return super().out(self.attn_sub_norm.forward(x))


class NormedMLP(MLP):
    """BitNet's: a norm before the last matrix."""

    def __init__(self, config: Config) -> None:
        super().__init__(config["hidden_size"], config["intermediate_size"], act(config))
        self.ffn_sub_norm = RMSNorm(config["intermediate_size"])

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.child(name) for name in self.names)
        wide = ops.mul(activation(gate.forward(x), self.act), up.forward(x))
        out: Tensor = down.forward(self.ffn_sub_norm.forward(wide))
        return out


def bitnet(raw: Config) -> Network:
    """``BitNetForCausalLM``, with full weights."""

    def block(config: Config, _layer: int) -> Module:
        return Block(config, NormedAttention(config), NormedMLP(config))

    return Decoder(filled(raw), block)


MODEL_TYPES = {"internlm2": internlm2, "exaone": exaone, "bitnet": bitnet}
