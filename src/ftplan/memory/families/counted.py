"""Families whose weights are counted and whose forward is not modelled: training is refused.

Source: transformers 5.23.0, models/mllama, glm4v, glm46v, deberta_v2, glm_moe_dsa, kimi_linear.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from ftplan.errors import UnsupportedError
from ftplan.memory.experts import Experts
from ftplan.memory.families.decoder import Config, filled
from ftplan.memory.families.patches import Conv, plant, weight
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


def glm_dsa(raw: Config) -> Network:
    """``GlmMoeDsaForCausalLM`` (GLM-5): latent attention whose keys an indexer picks.

    From GLM-5.2 on some layers take the keys that an earlier layer's indexer picked.
    """
    config = {"first_k_dense_replace": 3, **filled(raw)}
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    types = list(config.get("mlp_layer_types") or ())
    rank, latent, turned = (
        config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"],
    )  # fmt: skip
    plain, value = config["qk_nope_head_dim"], config["v_head_dim"]
    index_heads, index_size = config["index_n_heads"], config["index_head_dim"]
    indexers = list(config.get("indexer_types") or ())

    def picks(layer: int) -> bool:
        return not indexers or bool(indexers[layer] == "full")

    def sparse(layer: int) -> bool:
        if types:
            return bool(types[layer] == "sparse")
        return bool(layer >= config["first_k_dense_replace"])

    def block(layer: int) -> Module:
        root = Module()
        _linears(
            root, "self_attn",
            {
                "q_a_proj": (hidden, rank), "q_b_proj": (rank, heads * (plain + turned)),
                "kv_a_proj_with_mqa": (hidden, latent + turned),
                "kv_b_proj": (latent, heads * (plain + value)), "o_proj": (heads * value, hidden),
            },
        )  # fmt: skip
        _norms(root, rank, "self_attn.q_a_layernorm")
        _norms(root, latent, "self_attn.kv_a_layernorm")
        if picks(layer):
            indexer = {
                "wq_b": (rank, index_heads * index_size), "wk": (hidden, index_size),
                "weights_proj": (hidden, index_heads),
            }  # fmt: skip
            _linears(root, "self_attn.indexer", indexer)
            plant(root, "self_attn.indexer.k_norm", LayerNorm(index_size))
        _norms(root, hidden, "input_layernorm", "post_attention_layernorm")
        if sparse(layer):
            _sparse(
                root, hidden, config["moe_intermediate_size"], config["n_routed_experts"],
                config["n_shared_experts"],
            )  # fmt: skip
        else:
            _linears(root, "mlp", _gated(hidden, config["intermediate_size"]))
        return root

    network = Counted(
        "glm_moe_dsa", "model.layers", config["num_hidden_layers"], block,
        lambda layer: (sparse(layer), picks(layer)),
    )  # fmt: skip
    _decoder(network, "model", config, tied=bool(config.get("tie_word_embeddings")))
    return network


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


def mllama(raw: Config) -> Network:
    """``MllamaForConditionalGeneration`` (Llama 3.2 Vision): text that attends to an image."""
    text = filled(raw["text_config"], "mllama_text_model")
    vision = filled(raw["vision_config"], "mllama_vision_model")
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    size = hidden // heads
    narrow = text["num_key_value_heads"] * size
    crossed = set(text.get("cross_attention_layers") or (3, 8, 13, 18, 23, 28, 33, 38))

    def block(layer: int) -> Module:
        root = Module()
        name = "cross_attn" if layer in crossed else "self_attn"
        shapes = {"q_proj": (hidden, hidden), "k_proj": (hidden, narrow),
                  "v_proj": (hidden, narrow), "o_proj": (hidden, hidden)}  # fmt: skip
        _linears(root, name, shapes)
        if layer in crossed:
            _norms(root, size, "cross_attn.q_norm", "cross_attn.k_norm")
            weight(root, "cross_attn_attn_gate", 1)
            weight(root, "cross_attn_mlp_gate", 1)
        _linears(root, "mlp", _gated(hidden, text["intermediate_size"]))
        _norms(root, hidden, "input_layernorm", "post_attention_layernorm")
        return root

    network = Counted(
        "mllama", "model.language_model.layers", text["num_hidden_layers"], block,
        lambda layer: layer in crossed,
    )  # fmt: skip
    _decoder(network, "model.language_model", text, tied=False, rows=8)
    _mllama_tower(network, vision)
    out = vision["vision_output_dim"]
    plant(network, "model.multi_modal_projector", Linear(out, hidden, bias=True))
    return network


def _mllama_tower(network: Network, config: Config) -> None:
    path, wide, patch = "model.vision_model", config["hidden_size"], config["patch_size"]
    inner, tiles = config["intermediate_size"], config["max_num_tiles"]
    rows = (config["image_size"] // patch) ** 2 + 1
    ratios = 1 + sum(tiles // height for height in range(1, tiles + 1))  # and one for no image
    weight(network, f"{path}.class_embedding", wide)
    plant(
        network, f"{path}.patch_embedding",
        Conv(config["num_channels"], wide, patch, patch, bias=False),
    )  # fmt: skip
    weight(network, f"{path}.gated_positional_embedding.gate", 1)
    weight(network, f"{path}.gated_positional_embedding.embedding", rows, wide)
    tile = f"{path}.gated_positional_embedding.tile_embedding"
    plant(network, tile, Embedding(ratios, tiles * rows * wide))
    for name in ("pre_tile_positional_embedding", "post_tile_positional_embedding"):
        weight(network, f"{path}.{name}.gate", 1)
        plant(network, f"{path}.{name}.embedding", Embedding(ratios, tiles * wide))
    for name in ("layernorm_pre", "layernorm_post"):
        plant(network, f"{path}.{name}", LayerNorm(wide))
    names = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (wide, wide))
    for part, count in (
        ("transformer", config["num_hidden_layers"]),
        ("global_transformer", config["num_global_layers"]),
    ):
        for layer in range(count):
            root = Module()
            _linears(root, "self_attn", names)
            _linears(root, "mlp", {"fc1": (wide, inner), "fc2": (inner, wide)}, bias=True)
            plant(root, "input_layernorm", LayerNorm(wide))
            plant(root, "post_attention_layernorm", LayerNorm(wide))
            if part == "global_transformer":
                weight(root, "gate_attn", 1)
                weight(root, "gate_ffn", 1)
            plant(network, f"{path}.{part}.layers.{layer}", root)


def glm4v(raw: Config) -> Network:
    """``Glm4vForConditionalGeneration``, ``Glm46VForConditionalGeneration``."""
    text = filled(raw["text_config"], "glm4v_text")
    vision = filled(raw["vision_config"], "glm4v_vision")
    hidden, heads, inner = (
        text["hidden_size"], text["num_attention_heads"], text["intermediate_size"],
    )  # fmt: skip
    narrow = text["num_key_value_heads"] * (hidden // heads)

    def block(_layer: int) -> Module:
        root = Module()
        shapes = {"q_proj": (hidden, hidden), "k_proj": (hidden, narrow),
                  "v_proj": (hidden, narrow)}  # fmt: skip
        _linears(root, "self_attn", shapes, bias=True)
        _linears(root, "self_attn", {"o_proj": (hidden, hidden)})
        _linears(root, "mlp", {"gate_up_proj": (hidden, 2 * inner), "down_proj": (inner, hidden)})
        _norms(
            root, hidden, "input_layernorm", "post_attention_layernorm",
            "post_self_attn_layernorm", "post_mlp_layernorm",
        )  # fmt: skip
        return root

    kind = raw["model_type"]
    network = Counted(kind, "model.language_model.layers", text["num_hidden_layers"], block)
    tied = bool(filled(raw).get("tie_word_embeddings"))
    _decoder(network, "model.language_model", text, tied=tied)
    _glm_tower(network, vision)
    return network


def _glm_tower(network: Network, config: Config) -> None:
    path, wide, out = "model.visual", config["hidden_size"], config["out_hidden_size"]
    patch, merge = config["patch_size"], config["spatial_merge_size"]
    rows = (config["image_size"] // patch) ** 2
    bias = bool(config.get("attention_bias"))
    plant(network, f"{path}.embeddings.position_embedding", Embedding(rows, wide))
    plant(
        network, f"{path}.patch_embed.proj",
        Conv(config["in_channels"], wide, config["temporal_patch_size"], patch, patch, bias=True),
    )  # fmt: skip
    for layer in range(config["depth"]):
        root = Module()
        _norms(root, wide, "norm1", "norm2")
        _linears(root, "attn", {"qkv": (wide, 3 * wide)}, bias=bias)
        _linears(root, "attn", {"proj": (wide, wide)})
        _linears(root, "mlp", _gated(wide, out))
        plant(network, f"{path}.blocks.{layer}", root)
    _linears(network, f"{path}.merger", {"proj": (out, out)})
    _linears(network, f"{path}.merger", _gated(out, config["intermediate_size"]))
    plant(network, f"{path}.merger.post_projection_norm", LayerNorm(out))
    _norms(network, wide, f"{path}.post_conv_layernorm", f"{path}.post_layernorm")
    plant(network, f"{path}.downsample", Conv(wide, out, merge, merge, bias=True))


def deberta(raw: Config) -> Network:
    """``DebertaV2ForMaskedLM`` with shared keys of positions (version 3)."""
    config = filled(raw)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    if not config.get("share_att_key") or config.get("conv_kernel_size"):
        raise UnsupportedError(
            "model_type 'deberta-v2' without share_att_key or with a convolution",
            remedy="use DeBERTa v3's config.json, or give --params for the textbook's sums",
        )

    def block(_layer: int) -> Module:
        root = Module()
        names = dict.fromkeys(("query_proj", "key_proj", "value_proj"), (hidden, hidden))
        _linears(root, "attention.self", names, bias=True)
        _linears(root, "attention.output", {"dense": (hidden, hidden)}, bias=True)
        plant(root, "attention.output.LayerNorm", LayerNorm(hidden))
        _linears(root, "intermediate", {"dense": (hidden, inner)}, bias=True)
        _linears(root, "output", {"dense": (inner, hidden)}, bias=True)
        plant(root, "output.LayerNorm", LayerNorm(hidden))
        return root

    layers = "deberta.encoder.layer"
    network = Counted("deberta-v2", layers, config["num_hidden_layers"], block)
    vocabulary, table = config["vocab_size"], "deberta.embeddings.word_embeddings"
    plant(network, table, Embedding(vocabulary, hidden))
    if config.get("position_biased_input", True):
        rows = config["max_position_embeddings"]
        plant(network, "deberta.embeddings.position_embeddings", Embedding(rows, hidden))
    if config.get("type_vocab_size"):
        types = Embedding(config["type_vocab_size"], hidden)
        plant(network, "deberta.embeddings.token_type_embeddings", types)
    plant(network, "deberta.embeddings.LayerNorm", LayerNorm(hidden))
    if config.get("relative_attention"):
        most = config.get("max_relative_positions") or -1
        span = config.get("position_buckets") or 0
        if span <= 0:
            span = most if most > 0 else config["max_position_embeddings"]
        plant(network, "deberta.encoder.rel_embeddings", Embedding(2 * span, hidden))
    if "layer_norm" in str(config.get("norm_rel_ebd") or ""):
        plant(network, "deberta.encoder.LayerNorm", LayerNorm(hidden))
    network.embedding_names = (table,)
    network.head_name = "cls.predictions.decoder"
    plant(network, "cls.predictions.transform.dense", Linear(hidden, hidden, bias=True))
    plant(network, "cls.predictions.transform.LayerNorm", LayerNorm(hidden))
    plant(network, network.head_name, Linear(hidden, vocabulary, bias=True))
    weight(network, "cls.predictions.bias", vocabulary)
    network.tie("cls.predictions.decoder.weight", f"{table}.weight")
    network.tie("cls.predictions.decoder.bias", "cls.predictions.bias")
    return network


MODEL_TYPES = {
    "glm_moe_dsa": glm_dsa, "kimi_linear": kimi_linear, "mllama": mllama, "glm4v": glm4v,
    "glm46v": glm4v, "deberta-v2": deberta,
}  # fmt: skip
