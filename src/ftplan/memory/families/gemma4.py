"""Gemma 4: layers of two kinds of attention that may share keys and values, an input of its own for
each layer, experts beside the MLP.

Source: transformers 5.23.0, models/gemma4/modeling_gemma4.py.
"""

from __future__ import annotations

from typing import Any

from ftplan.memory import ops
from ftplan.memory.attention import Heads, attend
from ftplan.memory.experts import Experts, Routing, gather_rows, normalize_, topk
from ftplan.memory.families.decoder import MLP, Config, Decoder, Rope, filled
from ftplan.memory.families.gemma4_towers import ImageTower, Norm, sound_tower
from ftplan.memory.families.llama import ScaledEmbedding, rotate
from ftplan.memory.families.patches import plant
from ftplan.memory.families.vision import VisionLanguage
from ftplan.memory.images import Image
from ftplan.memory.nn import Linear, Module, Shared, activation
from ftplan.memory.tape import SCORES, Parameter, Tape, Tensor

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_types(config: Config) -> list[str]:
    """The kind of attention of each layer; the last one's is full in any case."""
    count = config["num_hidden_layers"]
    types = list(config.get("layer_types") or ())[:count]
    types = types or [SLIDING if (layer + 1) % 6 else FULL for layer in range(count)]
    return [*types[:-1], FULL]


def sharing(config: Config, types: list[str]) -> list[str]:
    """Which layers ``store`` keys and values, which ``reuse`` them, and which have their own."""
    shared = config.get("num_kv_shared_layers") or 0
    own = types[: len(types) - shared]
    modes = [""] * len(own) + ["reuse"] * shared
    for kind in set(own) if shared else ():
        modes[len(own) - 1 - own[::-1].index(kind)] = "store"
    return modes


class Attention(Module):
    """Grouped-query attention whose values, keys and queries are normed by head."""

    def __init__(self, config: Config, kind: str, mode: str) -> None:
        super().__init__()
        self.kind, self.mode = kind, mode
        full = kind == FULL
        alike = bool(config.get("attention_k_eq_v")) and full
        hidden, count = config["hidden_size"], config["num_attention_heads"]
        size = config.get("global_head_dim") or 512 if full else config["head_dim"]
        kv_count = config["num_key_value_heads"]
        if alike:
            kv_count = config.get("num_global_key_value_heads") or kv_count
        bias = bool(config.get("attention_bias"))
        self.heads = Heads(
            count=count, kv_count=kv_count, size=size, value_size=size,
            dropout=config.get("attention_dropout") or 0.0,
        )  # fmt: skip
        self.q_proj = Linear(hidden, count * size, bias=bias)
        self.q_norm = Norm(size)
        if mode != "reuse":
            self.k_norm, self.v_norm = Norm(size), Norm(size, scaled=False)
            self.k_proj = Linear(hidden, kv_count * size, bias=bias)
            if not alike:
                self.v_proj = Linear(hidden, kv_count * size, bias=bias)
        self.o_proj = Linear(count * size, hidden, bias=bias)

    def forward(self, x: Tensor, shared: Shared, held: list[Tensor]) -> Tensor:
        cos, sin = shared.rope[self.kind]
        q = rotate(self.normed(self.q_norm, self.q_proj.forward(x)), cos, sin)
        if self.mode == "reuse":
            k, v = shared.kept[self.kind]
        else:
            k, v = self.keys_and_values(x, cos, sin)
        if self.mode == "store":
            shared.kept[self.kind] = k, v
        out = attend(q, k, v, self.heads, shared.masks[self.kind], held=held)
        return self.o_proj.forward(out)

    def keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Values are the keys as projected, where they have no matrix of their own."""
        k = self.k_proj.forward(x)
        v = self.v_proj.forward(x) if "v_proj" in self.children else k
        k = rotate(self.normed(self.k_norm, k), cos, sin)
        return k, self.normed(self.v_norm, v)

    def normed(self, norm: Norm, x: Tensor) -> Tensor:
        """A norm over each head."""
        heads = x.width // self.heads.size
        out = norm.forward(ops.view(x, x.rows * heads, self.heads.size))
        return ops.view(out, x.rows, x.width)


class Router(Module):
    """``Gemma4TextRouter``: a normed input, and a learnt number for each expert."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, experts = config["hidden_size"], config["num_experts"]
        self.top_k = config["top_k_experts"]
        self.norm = Norm(hidden, scaled=False)
        self.proj = Linear(hidden, experts)
        self.scale = self.parameter("scale", hidden)
        self.per_expert_scale = self.parameter("per_expert_scale", experts)

    def forward(self, x: Tensor) -> Routing:
        x = self.norm.forward(x)
        x = ops.scale(ops.mul(x, x.tape.leaf(self.scale)))
        scores = self.proj.forward(x)
        probabilities = ops.softmax(scores, "fp32")
        weights, index = topk(probabilities, self.top_k)
        weights = normalize_(weights)
        scales = x.tape.leaf(self.per_expert_scale)
        scales = gather_rows(scales, index, weights.rows, weights.width)
        return Routing(probabilities, ops.mul(weights, scales), index)


class Block(Module):
    """``Gemma4TextDecoderLayer``."""

    def __init__(self, config: Config, kind: str, mode: str) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.act = config["hidden_activation"]
        self.scalar = [Parameter("layer_scalar", (1,), "fp32", False)]  # a buffer
        wide = bool(config.get("use_double_wide_mlp")) and mode == "reuse"
        self.self_attn = Attention(config, kind, mode)
        self.mlp = MLP(hidden, inner * (2 if wide else 1), self.act)
        self.input_layernorm = Norm(hidden)
        self.post_attention_layernorm = Norm(hidden)
        self.pre_feedforward_layernorm = Norm(hidden)
        self.post_feedforward_layernorm = Norm(hidden)
        self.own = config.get("hidden_size_per_layer_input") or 0
        if self.own:
            self.per_layer_input_gate = Linear(hidden, self.own)
            self.per_layer_projection = Linear(self.own, hidden)
            self.post_per_layer_input_norm = Norm(hidden)
        self.mixed = bool(config.get("enable_moe_block"))
        if self.mixed:
            self.router = Router(config)
            self.experts = Experts(
                hidden, config["moe_intermediate_size"], config["num_experts"], act=self.act
            )
            self.post_feedforward_layernorm_1 = Norm(hidden)
            self.post_feedforward_layernorm_2 = Norm(hidden)
            self.pre_feedforward_layernorm_2 = Norm(hidden)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        own = ops.part(shared.layer_inputs[0], self.own) if self.own else None
        residual = x
        x = self.input_layernorm.forward(x)
        x = self.self_attn.forward(x, shared, held)
        x = self.post_attention_layernorm.forward(x)
        x = ops.add(residual, x)
        residual = x
        x = self.pre_feedforward_layernorm.forward(x)
        x = self.mlp.forward(x)
        if self.mixed:
            first = self.post_feedforward_layernorm_1.forward(x)
            routing = self.router.forward(residual)
            held.clear()  # the name of attention's weights is used again
            second = self.pre_feedforward_layernorm_2.forward(residual)
            second = self.experts.forward(second, routing)
            second = self.post_feedforward_layernorm_2.forward(second)
            x = ops.add(first, second)
        x = self.post_feedforward_layernorm.forward(x)
        x = ops.add(residual, x)
        if own is not None:
            residual = x
            x = activation(self.per_layer_input_gate.forward(x), self.act)
            x = self.per_layer_projection.forward(ops.mul(x, own))
            x = self.post_per_layer_input_norm.forward(x)
            x = ops.add(residual, x)
        return ops.mul_(x, x.tape.leaf(self.scalar[0]))


class Gemma4(Decoder):
    """``Gemma4ForCausalLM``."""

    def __init__(self, raw: Config) -> None:
        config = filled(raw, "gemma4_text")
        config["num_key_value_heads"] = (
            config.get("num_key_value_heads") or config["num_attention_heads"]
        )
        types = layer_types(config)
        modes = sharing(config, types)
        sizes = {FULL: config.get("global_head_dim") or 512, SLIDING: config["head_dim"]}
        super().__init__(
            config,
            lambda config, layer: Block(config, types[layer], modes[layer]),
            kind=lambda layer: (types[layer], modes[layer]),
            ropes={kind: Rope(width=sizes[kind]) for kind in sorted(set(types))},
            windows={FULL: None, SLIDING: config["sliding_window"]},
            norm=Norm, table=ScaledEmbedding,
            softcap=config.get("final_logit_softcapping") is not None,
        )  # fmt: skip
        self.stages[0].stack.hands_on = True
        self.buffer_elements = config["num_hidden_layers"]  # each layer's scalar
        self.own = config.get("hidden_size_per_layer_input") or 0
        self.wrapped = False
        """Inside a model that looks for images, and holds what it found."""
        if self.own:
            wide = self.own * config["num_hidden_layers"]
            self.body.embed_tokens_per_layer = ScaledEmbedding(
                config["vocab_size_per_layer_input"], wide
            )
            self.body.per_layer_model_projection = Linear(config["hidden_size"], wide)
            self.body.per_layer_projection_norm = Norm(self.own)

    def enter(self, tape: Tape, shared: Shared) -> Tensor:
        """Embed, and make what each layer is given for itself."""
        return self.given(tape, shared, *self.embedded(tape, shared))

    def embedded(self, tape: Tape, shared: Shared) -> tuple[Tensor, Tensor | None]:
        """Rows of the tables of all layers, and of what each layer has for itself."""
        x = self.body.embed(tape)
        if not self.own:
            return x, None
        if self.wrapped:  # embeddings without images' places
            shared.held.append(_without_images(x))
        table = self.body.children["embed_tokens_per_layer"].forward(tape)
        if self.wrapped:
            shared.held.append(table)
        return x, table

    def given(self, tape: Tape, shared: Shared, x: Tensor, table: Tensor | None) -> Tensor:
        """What the blocks are handed, made of the embeddings."""
        if table is not None:
            shared.layer_inputs = [self.layer_inputs(x, table)]
        del table
        self.prepare(tape, shared, x.dtype)
        return x

    def layer_inputs(self, x: Tensor, table: Tensor) -> Tensor:
        """Tokens x (layers x width): of the text so far, and of a table."""
        projected = ops.scale(self.body.children["per_layer_model_projection"].forward(x))
        times = projected.width // self.own
        projected = ops.view(projected, projected.rows * times, self.own)
        projected = self.body.children["per_layer_projection_norm"].forward(projected)
        projected = ops.view(projected, x.rows, self.own * times)
        return ops.scale(ops.add(projected, table))


def _without_images(x: Tensor) -> Tensor:
    """``where(mask, padding, x)``."""
    mask = x.tape.tensor(x.rows, 1, "bool", "image mask")
    return ops.where(mask, x, x)


class Gemma4WithTowers(VisionLanguage):
    """``Gemma4ForConditionalGeneration``; nothing is shown to the tower of sound."""

    def __init__(self, raw: Config) -> None:
        config = filled(raw)
        text = filled(raw.get("text_config") or {}, "gemma4_text")
        vision = filled(raw.get("vision_config") or {}, "gemma4_vision")
        language = Gemma4({**text, "tie_word_embeddings": False})
        language.wrapped = True
        tower = ImageTower(vision)
        super().__init__(
            language, tower, tied=bool(config.get("tie_word_embeddings", True)),
            tower_name="vision_tower", text_name="language_model",
        )  # fmt: skip
        self.language, self.padded = [language], [tower]
        self.buffer_elements = language.buffer_elements
        self.joins, self.caches = True, False
        self.bidirectional = text.get("use_bidirectional_attention") == "vision"
        wide = text["hidden_size"]
        projection = Linear(vision["hidden_size"], wide)
        plant(self.model, "embed_vision.embedding_projection", projection)
        self.normed = [Norm(vision["hidden_size"], scaled=False)]
        if raw.get("audio_config"):
            sound = filled(raw.get("audio_config") or {}, "gemma4_audio")
            plant(self.model, "audio_tower", sound_tower(sound))
            inner = sound["output_proj_dims"]
            plant(self.model, "embed_audio.embedding_projection", Linear(inner, wide))

    def show(self, images: int, image: Image, *, checkpointed: bool) -> None:
        """Put ``images`` in each sequence."""
        super().show(images, image, checkpointed=checkpointed)
        self.padded[0].tokens = image.tokens

    def further_inputs(self) -> list[Module]:
        """The tower's class tells nobody where its embeddings are."""
        return []

    def enter(self, tape: Tape, shared: Shared) -> Tensor:
        """Embed; put image features in place; what each layer is given is made of both."""
        if not self.images:
            return super().enter(tape, shared)
        language = self.language[0]
        x, table = language.embedded(tape, shared)
        x = self.placed(tape, shared, x)
        x = language.given(tape, shared, x, table)
        if self.bidirectional and tape.env.attention != "flash":  # within a window, no further
            dtype = x.dtype if tape.env.attention == "eager" else "bool"
            shared.masks[SLIDING] = tape.tensor(SCORES, 1, dtype, "mask")
        return x

    def project(self, x: Tensor) -> Tensor:
        """``Gemma4MultimodalEmbedder``."""
        linear = self.model.child("embed_vision.embedding_projection")
        assert isinstance(linear, Linear)
        return linear.forward(self.normed[0].forward(x))


MODEL_TYPES: dict[str, Any] = {"gemma4_text": Gemma4, "gemma4": Gemma4WithTowers}
