"""MiniMax-M3: attention to blocks of keys that an indexer picks for each group of heads.

What was picked becomes a mask of every head, which the kernel keeps; the indexer's scores have no
gradient and die with its choice. Source: transformers 5.23.0, models/minimax_m3_vl. The tower of
images is counted.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.attention import attend
from ftplan.memory.experts import Experts, Router
from ftplan.memory.families import decoder
from ftplan.memory.families.decoder import Block, Config, Decoder, Rope, filled, rotate_part
from ftplan.memory.families.patches import Tower, VisionBlock, embed_patches, plant, stack_blocks
from ftplan.memory.families.vision import VisionLanguage
from ftplan.memory.nn import LayerNorm, Linear, Module, Network, RMSNorm, Shared
from ftplan.memory.tape import SCORES, TOKENS, Tensor

Norm = partial(RMSNorm, offset=True)
SPARSE = "minimax_m3_sparse"
_OLDER = {
    "index_n_heads": "sparse_num_index_heads", "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size", "index_topk_blocks": "sparse_topk_blocks",
}  # fmt: skip


def limited(both: Tensor) -> Tensor:
    """``(up + 1) * gate * sigmoid(alpha gate)`` of two halves that are cut off at a limit."""
    gate, up = ops.split(both, [both.width // 2] * 2)
    gate, up = ops.unary(gate, "clamp", "input"), ops.unary(up, "clamp", "input")
    glu = ops.mul(gate, ops.unary(ops.scale(gate), "sigmoid", "output"))
    return ops.mul(ops.shift(up), glu)


class LimitedExperts(Experts):
    """``MiniMaxM3VLExperts``."""

    def gate(self, both: Tensor) -> Tensor:
        return limited(both)


class LimitedMLP(Module):
    """``MiniMaxM3VLDenseMLP``: gate and up in one matrix."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden, 2 * inner)
        self.down_proj = Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up_proj.forward(x)
        return self.down_proj.forward(limited(both))


class Mixture(Module):
    """``MiniMaxM3VLSparseMoeBlock``: what every token passes goes first."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, count = config["hidden_size"], config["num_local_experts"]
        self.gate = Router(
            hidden, count, config["num_experts_per_tok"], scoring="sigmoid", normalize=True,
            float_logits=True, keep_fp32=True,
        )  # fmt: skip
        self.experts = LimitedExperts(hidden, config["intermediate_size"], count)
        self.shared_experts = LimitedMLP(hidden, config["shared_intermediate_size"])

    def forward(self, x: Tensor) -> Tensor:
        every = self.shared_experts.forward(x)
        x = self.experts.forward(x, self.gate.forward(x))
        x = ops.scale(x)
        return ops.add(x, every)


class Indexer(Module):
    """``MiniMaxM3VLIndexer``: the blocks of keys that each group of heads looks at."""

    def __init__(self, config: Config, turned: int) -> None:
        super().__init__()
        hidden, self.size = config["hidden_size"], config["index_head_dim"]
        self.heads, self.count = config["index_n_heads"], config["num_attention_heads"]
        self.block, self.top = config["index_block_size"], config["index_topk_blocks"]
        self.turned = min(turned, self.size)
        self.q_proj = Linear(hidden, self.heads * self.size)
        self.k_proj = Linear(hidden, self.size)
        self.q_norm, self.k_norm = Norm(self.size), Norm(self.size)

    def picked(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Indices of the best blocks."""
        tape, heads = x.tape, self.heads
        q = ops.view(self.q_proj.forward(x), TOKENS * heads, self.size)
        q = ops.view(self.q_norm.forward(q), TOKENS, heads * self.size)
        k = self.k_norm.forward(self.k_proj.forward(x))
        q = rotate_part(q, cos, sin, heads, self.size, self.turned)
        k = rotate_part(k, cos, sin, 1, self.size, self.turned)
        keys = ops.expand_heads(ops.autocast(ops.to(k, "fp32")), heads)  # one key for all heads
        scores = ops.matmul(
            ops.to(q, "fp32"), keys, SCORES * heads, 1, "index scores", inner=self.size
        )
        future = tape.tensor(SCORES, 1, "bool", "future")
        hidden = tape.tensor(scores.rows, 1, scores.dtype, "index scores")
        del scores, future
        blocks = -(-(tape.env.seq_len or self.block) // self.block)
        best = tape.tensor(TOKENS, heads * blocks, hidden.dtype, "blocks")
        index = tape.tensor(TOKENS, heads * min(self.top, blocks), "int64", "topk indices")
        out = tape.tensor(index.rows, index.width, "int64", "topk indices")
        del hidden, best, index
        return out

    def mask(self, picked: Tensor, given: Tensor | None, dtype: str) -> Tensor:
        """An additive mask of every head: blocks spread over their keys, and over heads."""
        tape, rows = picked.tape, SCORES * self.count
        keep = tape.tensor(SCORES * self.heads, 1, "bool", "blocks of keys")
        wide = tape.tensor(rows, 1, "bool", "blocks of keys")
        del keep
        seen = tape.tensor(SCORES, 1, "bool", "past") if given is None else given
        both = tape.tensor(rows, 1, "bool", "keys seen")
        zeros = tape.tensor(rows, 1, dtype, "mask")
        hidden = tape.tensor(rows, 1, "bool", "keys hidden")
        out = tape.tensor(rows, 1, dtype, "mask")
        del wide, seen, both, zeros, hidden
        return out


class Attention(decoder.Attention):
    """``MiniMaxM3VLAttention``."""

    def __init__(self, config: Config, turned: int, *, sparse: bool) -> None:
        super().__init__(
            config, bias=False, qk_norm="head", qk_offset=True, turned=turned, joined=True
        )
        self.sparse = sparse
        if sparse:
            self.indexer = Indexer(config, turned)

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor] | None = None) -> Tensor:
        if x.tape.env.attention == "flash":
            raise UnsupportedError(
                "flash attention of MiniMax-M3", remedy="set attention: sdpa or eager"
            )
        if not self.sparse:
            return super().forward(x, shared, held)
        q, k, v = self.project(x)
        q, k = self.turn(q, k, shared)
        picked = self.indexer.picked(x, *shared.rope[""])
        mask = self.indexer.mask(picked, shared.masks[""], q.dtype)
        return self.out(attend(q, k, v, self.heads, mask, held=held, by_head=True))


def text(raw: Config) -> Decoder:
    """``MiniMaxM3VLForCausalLM``."""
    config = filled(raw, "minimax_m3_vl_text")
    count, older = config["num_hidden_layers"], config.get("sparse_attention_config") or {}
    config |= {name: older[old] for name, old in _OLDER.items() if old in older}
    types = list(config.get("layer_types") or ()) or [
        SPARSE if sparse else "full_attention"
        for sparse in older.get("sparse_attention_freq") or [0] * count
    ]
    kinds = list(config.get("mlp_layer_types") or ()) or [
        "sparse" if sparse else "dense" for sparse in config.get("moe_layer_freq") or [1] * count
    ]
    turned = config.get("rotary_dim") or config["head_dim"]

    def block(config: Config, layer: int) -> Module:
        attention = Attention(config, turned, sparse=types[layer] == SPARSE)
        mlp: Module = LimitedMLP(config["hidden_size"], config["dense_intermediate_size"])
        mlp = Mixture(config) if kinds[layer] == "sparse" else mlp
        return Block(config, attention, mlp, norm=Norm)

    return Decoder(
        config, block, kind=lambda layer: (types[layer], kinds[layer]), norm=Norm,
        ropes={"": Rope(width=turned)},
    )  # fmt: skip


def minimax_m3(raw: Config) -> Network:
    """``MiniMaxM3SparseForConditionalGeneration``."""
    config, given = filled(raw), raw.get("text_config") or {}
    vision = filled(raw.get("vision_config") or {}, "minimax_m3_vl_vision")
    language = text({**given, "tie_word_embeddings": False})
    tied = config.get("tie_word_embeddings") or given.get("tie_word_embeddings")
    network = VisionLanguage(
        language, tower(vision), tied=bool(tied), tower_name="vision_tower",
        text_name="language_model",
    )  # fmt: skip
    network.shows = False
    wide, inner = language.config["hidden_size"], config["projector_hidden_size"]
    for name, (width_in, width_out) in {
        "linear_1": (vision["hidden_size"], inner), "linear_2": (inner, wide),
        "merge_linear_1": (wide * vision["spatial_merge_size"] ** 2, inner),
        "merge_linear_2": (inner, wide),
    }.items():  # fmt: skip
        path = f"multi_modal_projector.{name}"
        plant(network.model, path, Linear(width_in, width_out, bias=True))
    return network


def tower(config: Config) -> Tower:
    """``MiniMaxM3VLVisionModel``: names and shapes."""
    root, hidden, patch = Tower(), config["hidden_size"], config["patch_size"]
    window = (config["temporal_patch_size"], patch, patch)
    embed_patches(root, "embeddings.proj", config["num_channels"], hidden, *window, bias=False)
    plant(root, "pre_layrnorm", LayerNorm(hidden))
    stack_blocks(
        root, "layers", config["num_hidden_layers"],
        lambda: VisionBlock(hidden, config["intermediate_size"], config["num_attention_heads"]),
    )  # fmt: skip
    return root


MODEL_TYPES: dict[str, Any] = {"minimax_m3_vl_text": text, "minimax_m3_vl": minimax_m3}
