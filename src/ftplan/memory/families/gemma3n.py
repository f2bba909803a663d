"""Gemma 3n: four streams of hidden states, of which each layer works on one and corrects the rest.

Beside that (AltUp): a low-rank residual (LAuReL), an input of its own for each layer, keys and
values that later layers share, and gates of which only the largest few are let through.
Source: transformers 5.23.0, models/gemma3n/modeling_gemma3n.py. Towers of images and sound are
counted; what is not there is not run, but their embeddings are looked up for every token.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.families.decoder import MLP, Config, Decoder, Rope, filled
from ftplan.memory.families.gemma4 import FULL, SLIDING, Attention, sharing
from ftplan.memory.families.gemma4_towers import Norm
from ftplan.memory.families.llama import ScaledEmbedding
from ftplan.memory.families.patches import Conv, Tower, plant, weight
from ftplan.memory.families.vision import VisionLanguage
from ftplan.memory.nn import (
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Network,
    Shared,
    activation,
    project,
)
from ftplan.memory.tape import Grads, Tape, Tensor


def _added_(x: Tensor, other: Tensor) -> Tensor:
    """``x += other``: in place, in the dtype of x."""
    out, dtype = x.alias(), other.dtype
    wants = other.requires_grad

    def apply(grad: Tensor) -> Grads:
        return grad, ops.to(grad, dtype) if wants else None

    ops.record([out], "add", [x, other], apply)
    return out


def _repeated(x: Tensor, times: int) -> Tensor:
    """``x.repeat(times, 1, 1, 1)``: a copy for each stream; the way back sums them."""
    out = x.tape.tensor(x.rows, x.width * times, x.dtype, "repeat")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "repeat", [x], lambda grad: (make(grad),))
    return out


def _raised(x: Tensor, first: Tensor) -> Tensor:
    """``x[1:] += first``: added and put back, each way back a copy of all streams and of a part."""
    out = x.alias()
    rows, width, dtype, part = x.rows, x.width, x.dtype, x.width - first.width
    make = ops.like(first.rows, first.width, first.dtype, first.requires_grad)

    def apply(grad: Tensor) -> Grads:
        tape = grad.tape
        whole = tape.tensor(rows, width, dtype, "gradient")
        piece = tape.tensor(rows, part, dtype, "gradient")
        padded = tape.tensor(rows, width, dtype, "gradient")
        del piece, padded
        again = tape.tensor(rows, width, dtype, "gradient")
        del whole
        piece = tape.tensor(rows, part, dtype, "gradient")
        return again, make(piece)

    ops.record([out], "add to a part", [x, first], apply)
    return out


def _averaged(x: Tensor, streams: int) -> Tensor:
    """The mean over streams; the way back is a full tensor."""
    out = x.tape.tensor(x.rows, x.width // streams, x.dtype, "mean")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "mean", [x], lambda grad: (make(grad),))
    return out


def _deviation(x: Tensor) -> Tensor:
    """``std``: keeps x and its result."""
    out = x.tape.tensor(x.rows, 1, x.dtype, "std")
    saved = (x, out.alias())
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        steps = [make(grad) for _ in range(2)]
        return (steps.pop(),)

    ops.record([out], "std", [x], apply)
    return out


def _magnitude(x: Tensor) -> Tensor:
    """The root of the mean square of each token."""
    mean = ops.mean_square(ops.autocast_fp32(x))
    return ops.unary(ops.unary(mean, "clamp", "input"), "sqrt", "output")


class AltUp(Module):
    """``Gemma3nTextAltUp``: streams x streams numbers for each token, from the active stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.streams, hidden = config["altup_num_inputs"], config["hidden_size"]
        self.clips = config.get("altup_coef_clip") is not None
        self.correct_output_scale = self.parameter("correct_output_scale", hidden)
        self.correction_coefs = Linear(self.streams, self.streams)
        self.prediction_coefs = Linear(self.streams, self.streams**2)
        self.modality_router = Linear(hidden, self.streams)
        self.router_norm = Norm(hidden)

    def modalities(self, x: Tensor) -> Tensor:
        """A number for each stream."""
        routed = self.modality_router.forward(ops.scale(self.router_norm.forward(x)))
        return ops.to(ops.unary(ops.to(routed, "fp32"), "tanh", "output"), x.dtype)

    def predict(self, x: Tensor) -> Tensor:
        """Every stream from all of them."""
        modalities = self.modalities(ops.part(x, x.width // self.streams))
        mixing = self.prediction_coefs.forward(modalities)
        out = ops.matmul(x, mixing, x.rows, x.width, "predictions", inner=self.streams)
        out = _added_(out, x)
        return ops.to(ops.copy(out, "contiguous"), x.dtype)

    def correct(self, predictions: Tensor, activated: Tensor) -> Tensor:
        """Every stream, by how far the active one's prediction was off."""
        modalities = self.modalities(activated)
        off = ops.add(activated, ops.part(predictions, activated.width))
        off = _repeated(off, self.streams)
        if self.clips:
            tape = modalities.tape
            weight = ops.unary(tape.leaf(self.correction_coefs.weight), "clamp", "input")
            weight = weight.alias(rows=tape.leaf(self.correction_coefs.weight).rows)
            mixing = ops.shift(ops.linear(modalities, weight))
        else:
            mixing = ops.shift(self.correction_coefs.forward(modalities))
        out = _added_(ops.mul(off, mixing), predictions)
        return ops.to(out, activated.dtype)

    def scaled(self, x: Tensor) -> Tensor:
        """The active stream, weighed."""
        weight = x.tape.leaf(self.correct_output_scale)
        return ops.to(ops.mul(ops.to(x, weight.dtype), weight), x.dtype)


class Laurel(Module):
    """``Gemma3nTextLaurelBlock``: through a narrow place and back."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, rank = config["hidden_size"], config["laurel_rank"]
        self.linear_left = Linear(hidden, rank)
        self.linear_right = Linear(rank, hidden)
        self.post_laurel_norm = Norm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear_right.forward(self.linear_left.forward(x))
        return ops.add(x, self.post_laurel_norm.forward(out))


class SparseMLP(MLP):
    """``Gemma3nTextMLP``: gates below a multiple of their deviation are cut to zero."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.children[name] for name in self.names)
        assert isinstance(gate, Linear)
        (gates,) = project(x, gate)
        cutoff = ops.add(ops.mean(gates), ops.scale(_deviation(gates)))
        gates = ops.unary(ops.add(gates, cutoff), "relu", "output")
        activations = activation(gates, self.act)
        wide = up.forward(x)
        out: Tensor = down.forward(ops.mul(activations, wide))
        return out


class Block(Module):
    """``Gemma3nTextDecoderLayer``."""

    def __init__(self, config: Config, layer: int, kind: str, mode: str) -> None:
        super().__init__()
        hidden, own = config["hidden_size"], config["hidden_size_per_layer_input"]
        self.act, self.own = config["hidden_activation"], own
        inner = config["intermediate_size"][layer]
        self.self_attn = Attention(config, kind, mode)
        mlp = SparseMLP if config["activation_sparsity_pattern"][layer] else MLP
        self.mlp = mlp(hidden, inner, self.act)
        for name in (
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
            "post_feedforward_layernorm", "post_per_layer_input_norm",
        ):  # fmt: skip
            setattr(self, name, Norm(hidden))
        self.altup = AltUp(config)
        self.laurel = Laurel(config)
        self.per_layer_input_gate = Linear(hidden, own)
        self.per_layer_projection = Linear(own, hidden)
        self.scales = bool(config["altup_correct_scale"])

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        held: list[Tensor] = []
        own = ops.part(shared.layer_inputs[0], self.own)
        predictions = self.altup.predict(x)
        active = ops.part(predictions, predictions.width // self.altup.streams)
        normed = self.children["input_layernorm"].forward(active)
        laurel = self.laurel.forward(normed)
        attended = self.self_attn.forward(normed, shared, held)
        attended = self.children["post_attention_layernorm"].forward(attended)
        gated = ops.add(active, attended)
        joined = ops.scale(ops.add(gated, laurel))
        fed = self.children["pre_feedforward_layernorm"].forward(joined)
        made = self.mlp.forward(fed)
        made = self.children["post_feedforward_layernorm"].forward(made)
        activated = ops.add(joined, made)
        corrected = self.altup.correct(predictions, activated)
        first = ops.copy(ops.part(corrected, activated.width), "clone")
        if self.scales:
            first = self.altup.scaled(first)
        first = activation(self.per_layer_input_gate.forward(first), self.act)
        first = self.per_layer_projection.forward(ops.mul(first, own))
        first = self.children["post_per_layer_input_norm"].forward(first)
        return _raised(corrected, first)


def completed(raw: Config) -> dict[str, Any]:
    """With what the class makes of one number for all layers, or of none."""
    config = filled(raw, "gemma3n_text")
    count = config["num_hidden_layers"]
    types = list(config.get("layer_types") or ())[:count]
    config["layer_types"] = types or [
        SLIDING if (layer + 1) % 5 else FULL for layer in range(count)
    ]
    if isinstance(config["intermediate_size"], int):
        config["intermediate_size"] = [config["intermediate_size"]] * count
    sparsity = config.get("activation_sparsity_pattern")
    if sparsity is None:
        sparse = 10 if count > 10 else 0
        sparsity = [0.95] * sparse + [0.0] * (count - sparse)
    elif isinstance(sparsity, (int, float)):
        sparsity = [sparsity] * count
    return config | {"activation_sparsity_pattern": sparsity, "global_head_dim": config["head_dim"]}


class Embedder(Module):
    """``Gemma3nMultimodalEmbedder``: of tokens; features of a tower have a norm of their own."""

    def __init__(self, config: Config, hidden: int) -> None:
        super().__init__()
        own = config["hidden_size"]
        self.embedding = Embedding(config["vocab_size"], own)
        self.hard_embedding_norm = Norm(own)
        self.soft_embedding_norm = Norm(own)
        self.embedding_projection = Linear(own, hidden)
        self.post = [Norm(hidden, scaled=False)]

    def forward(self, tape: Tape) -> Tensor:
        normed = self.hard_embedding_norm.forward(self.embedding.forward(tape))
        out: Tensor = self.post[0].forward(self.embedding_projection.forward(normed))
        return out


class Gemma3n(Decoder):
    """``Gemma3nForCausalLM``."""

    def __init__(self, raw: Config) -> None:
        config = completed(raw)
        types, hidden = config["layer_types"], config["hidden_size"]
        modes = sharing(config, types)

        def kind(layer: int) -> Hashable:
            sparse = bool(config["activation_sparsity_pattern"][layer])
            return types[layer], modes[layer], sparse, config["intermediate_size"][layer]

        super().__init__(
            config, lambda config, layer: Block(config, layer, types[layer], modes[layer]),
            kind=kind, ropes={name: Rope(width=config["head_dim"]) for name in sorted(set(types))},
            windows={FULL: None, SLIDING: config["sliding_window"]}, norm=Norm,
            table=ScaledEmbedding, softcap=config.get("final_logit_softcapping") is not None,
        )  # fmt: skip
        self.stages[0].stack.hands_on = True
        self.unquantised = ("altup",)  # packed coefficients could not be clamped
        self.own, self.streams = config["hidden_size_per_layer_input"], config["altup_num_inputs"]
        wide = self.own * config["num_hidden_layers"]
        body = self.body
        body.embed_tokens_per_layer = ScaledEmbedding(config["vocab_size_per_layer_input"], wide)
        body.per_layer_model_projection = Linear(hidden, wide)
        body.per_layer_projection_norm = Norm(self.own)
        for name in ("altup_projections", "altup_unembed_projections"):
            setattr(body, name, Module())
            for number in range(self.streams - 1):
                setattr(body.children[name], str(number), Linear(hidden, hidden))

        self.embedders: list[Embedder] = []
        """Of images' and sound's own tokens, inside a model that has them."""
        self.made: list[Tensor] = []
        """The streams, which the model's forward names until it makes others."""

    def enter(self, tape: Tape, shared: Shared) -> Tensor:
        """Embed, make what each layer is given for itself, and spread the tokens over streams."""
        x = self.body.embed(tape)
        table = self.body.children["embed_tokens_per_layer"].forward(tape)
        if self.embedders:
            shared.held.append(table)
        for embedder in self.embedders:
            other = ops.to(embedder.forward(tape), x.dtype)
            shared.held.append(other)
            x = ops.where(tape.tensor(x.rows, 1, "bool", "tokens of its own"), other, x)
            del other
        shared.held.append(x)
        shared.layer_inputs = [self.layer_inputs(x, table)]
        del table
        self.made = self.streams_of([x] * self.streams, "altup_projections")
        self.prepare(tape, shared, x.dtype)
        return ops.cat(self.made, "stack")

    def streams_of(self, parts: list[Tensor], name: str) -> list[Tensor]:
        """The first as it is, the others through matrices of their own, to the first's size."""
        first = parts.pop(0)
        magnitude = ops.unary(ops.mean_square(ops.autocast_fp32(first)), "pow", "input")
        made = [first]
        for number, part in enumerate(parts):
            out = ops.to(self.body.children[name].children[str(number)].forward(part), first.dtype)
            size = _magnitude(out)
            out = ops.mul(ops.mul(out, magnitude), size)
            made.append(out)
        return made

    def leave(self, x: Tensor, shared: Shared) -> Tensor:
        """The streams brought together, and the final norm."""
        wide = x.width // self.streams
        self.made.clear()
        parts = [ops.part(x, wide) for _ in range(self.streams)]
        self.made = self.streams_of(parts, "altup_unembed_projections")
        x = _averaged(ops.cat(self.made, "stack"), self.streams)
        x = self.body.last(x)
        self.made.clear()
        return x

    def layer_inputs(self, x: Tensor, table: Tensor) -> Tensor:
        """Tokens x (layers x width): of the text so far, and of a table."""
        projected = self.body.children["per_layer_model_projection"].forward(x)
        times = projected.width // self.own
        projected = ops.view(_scaled_(projected), projected.rows * times, self.own)
        projected = self.body.children["per_layer_projection_norm"].forward(projected)
        projected = ops.view(projected, x.rows, self.own * times)
        return ops.scale(ops.add(projected, table))


def _scaled_(x: Tensor) -> Tensor:
    """Times a number, in place."""
    out = x.alias()
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    ops.record([out], "mul", [x], lambda grad: (make(grad),))
    return out


_VISION = {"mobilenetv5_300m_enc": 294_126_912}
"""Weights of timm's encoders (timm 1.0.31, ``num_classes=0``), none of them in a linear layer."""


def gemma3n(raw: Config) -> Network:
    """``Gemma3nForConditionalGeneration``: beside the text, towers that nothing is shown to."""
    config = filled(raw)
    language = Gemma3n({**(raw.get("text_config") or {}), "tie_word_embeddings": False})
    vision = filled(raw.get("vision_config") or {}, "gemma3n_vision")
    if vision["architecture"] not in _VISION:
        raise UnsupportedError(
            f"the vision tower {vision['architecture']!r} of Gemma 3n",
            remedy="its tower is mobilenetv5_300m_enc",
        )
    sound = filled(raw.get("audio_config") or {}, "gemma3n_audio")
    network = VisionLanguage(
        language, Tower(), tied=bool(config.get("tie_word_embeddings", True)),
        tower_name="vision_tower", text_name="language_model",
    )  # fmt: skip
    network.shows, network.unquantised = False, language.unquantised
    weight(network.tower, "timm_model.weights", _VISION[vision["architecture"]])
    plant(network.model, "audio_tower", sound_tower(sound))
    for name, tower in (("embed_vision", vision), ("embed_audio", sound)):
        embedder = Embedder(tower, language.config["hidden_size"])
        plant(network.model, name, embedder)
        language.embedders.append(embedder)
    return network


def sound_tower(config: Config) -> Module:
    """``Gemma3nAudioEncoder``: names and shapes."""
    tower, hidden = Module(), config["hidden_size"]
    channels, bins = 1, config["input_feat_size"]
    for number, count in enumerate(config.get("sscp_conv_channel_size") or (128, 32)):
        path = f"subsample_conv_projection.conv_{number}"
        plant(tower, f"{path}.conv", Conv(channels, count, 3, 3, bias=False))
        plant(tower, f"{path}.norm", LayerNorm(count, bias=False))
        channels, bins = count, -(-bins // 2)
    plant(tower, "subsample_conv_projection.input_proj_linear", Linear(bins * channels, hidden))
    for layer in range(config["conf_num_hidden_layers"]):
        root = plant(tower, f"conformer.{layer}", Module())
        for name in ("ffw_layer_start", "ffw_layer_end"):
            plant(root, f"{name}.ffw_layer_1", Linear(hidden, 4 * hidden))
            plant(root, f"{name}.ffw_layer_2", Linear(4 * hidden, hidden))
            plant(root, f"{name}.pre_layer_norm", Norm(hidden))
            plant(root, f"{name}.post_layer_norm", Norm(hidden))
        for name in ("q_proj", "k_proj", "v_proj", "relative_position_embedding.pos_proj"):
            plant(root, f"attention.attn.{name}", Linear(hidden, hidden))
        size = hidden // config["conf_num_attention_heads"]
        weight(root, "attention.attn.per_dim_scale", size)
        plant(root, "attention.post", Linear(hidden, hidden))
        plant(root, "lconv1d.linear_start", Linear(hidden, 2 * hidden))
        plant(root, "lconv1d.linear_end", Linear(hidden, hidden))
        weight(root, "lconv1d.depthwise_conv1d.weight", hidden, 1, config["conf_conv_kernel_size"])
        for name in (
            "attention.pre_attn_norm", "attention.post_norm", "lconv1d.pre_layer_norm",
            "lconv1d.conv_norm", "norm",
        ):  # fmt: skip
            plant(root, name, Norm(hidden))
    return tower


MODEL_TYPES: dict[str, Any] = {"gemma3n_text": Gemma3n, "gemma3n": gemma3n}
