"""Vision-language models: a tower of patches, a projector, and a language model of another family.

The language model's forward is that of its own family; image tokens are part of the sequence
length. The tower runs before it, where :attr:`VisionLanguage.images` asks for it: in full where it
is trained, for a moment where it is frozen.
Source: transformers 5.23.0, models/<type>/modeling_<type>.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftplan.memory import families, ops
from ftplan.memory.attention import KeptStates
from ftplan.memory.families.decoder import (
    MLP,
    Attention,
    Block,
    Config,
    Decoder,
    Rope,
    filled,
    head_size,
)
from ftplan.memory.families.mixture import act, qwen_kind, qwen_mixture
from ftplan.memory.families.patches import Tower, divided, grouped, merged, run_linear
from ftplan.memory.families.projectors import pooled, projector, scattered, stacked
from ftplan.memory.families.towers import vision_tower
from ftplan.memory.images import Image
from ftplan.memory.nn import LayerNorm, Module, Network, Shared, Stage, activation
from ftplan.memory.tape import BATCH, SCORES, Tape, Tensor

__all__ = ["MODEL_TYPES", "VisionLanguage"]


class VisionLanguage(Network):
    """A tower, a projector and a language model, under the names of one wrapper class."""

    def __init__(self, text: Network, tower: Tower, *, tied: bool, tower_name: str, text_name: str):
        super().__init__()
        self.text = text
        inner = text.children["model"]
        del self.children["text"]
        self.model = Module()
        setattr(self.model, tower_name, tower)
        self.tower = tower
        del self.children["tower"]
        setattr(self.model, text_name, inner)
        self.text_path = f"model.{text_name}"
        self.lm_head = text.children["lm_head"]
        stack = text.stages[0].stack
        stack.name = stack.name.replace("model", self.text_path, 1)
        self.embedding_names = tuple(
            name.replace("model", self.text_path, 1) for name in text.embedding_names
        )
        if tied:
            self.tie("lm_head.weight", f"{self.embedding_names[0]}.weight")
        self.stages = [Stage(stack, self.enter, self.leave)]
        self.entrance = tuple(
            f"model.{name}." for name in (tower_name, "multi_modal_projector", "connector")
        )
        self.images = 0
        """Images per sequence: the tower runs where there is at least one."""
        self.pixels: list[Tensor] = []
        """The caller's pixel values, until the tower takes them."""
        self.image_tokens = 0
        """Tokens that an image becomes, where the config says."""
        self.shows = True
        """The tower's forward is modelled."""
        self.joins = False
        """The features of all images are joined into one tensor."""
        self.returns_features = True
        """Features are among the outputs (``image_hidden_states``), and live as long."""
        self.caches = True
        """Keys and values fill a cache: the Trainer turns it off in the wrapper's config alone
        (``model.config.use_cache``), and the language model looks into its own."""
        self.bidirectional = False
        """Image tokens see each other: a mask of its own for every sequence."""

    def enter(self, tape: Tape, shared: Shared) -> Tensor:
        """Embed the text; put projected image features in the places of image tokens."""
        x = self.text.stages[0].enter(tape, shared)
        if self.caches and not shared.checkpointed and tape.prefix is None:
            tape.prefix = KeptStates()
        if not self.images:
            return x
        if self.bidirectional:
            for name in shared.masks:
                shared.masks[name] = self._image_mask(tape, x.dtype)
        return self.placed(tape, shared, x)

    def placed(self, tape: Tape, shared: Shared, x: Tensor) -> Tensor:
        """Image features in the places of image tokens."""
        found = self.features(tape, x.dtype)
        shared.held += found
        if self.returns_features:
            tape.cached.append(found[-1].alias())
        return scattered(x, found[-1])

    def features(self, tape: Tape, dtype: str) -> list[Tensor]:
        """What the tower makes of the images and ``forward`` has names for; the last is what takes
        the places of image tokens."""
        tower = self.tower
        picked = self.picked(self.pixels or tower.pixel_values(tape, self.images))
        self.pixels = []
        returned = tower.forward(picked[0], self.images)
        features = self.packed(self.project(tower.chosen[0] if tower.chosen else returned))
        del picked
        found = [returned, *tower.chosen, features, *tower.stacked]
        tower.chosen.clear()
        if self.joins:
            features = ops.copy(features, "cat")
        return [*found, ops.to(features, dtype)]

    def picked(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """What the wrapper makes of the caller's tensors and holds until it has features."""
        return self.tower.picked(pixels)

    def packed(self, x: Tensor) -> Tensor:
        """What becomes of projected features before the images are joined: nothing, usually."""
        return x

    def leave(self, x: Tensor, shared: Shared) -> Tensor:
        """The text's final norm; the deep stack's features go with the model's forward."""
        x = self.text.stages[0].leave(x, shared)
        self.tower.stacked.clear()
        return x

    def show(self, images: int, image: Image, *, checkpointed: bool) -> None:
        """Put ``images`` in each sequence; ``image``: of what size, where it is left open."""
        if not self.shows:
            super().show(images, image, checkpointed=checkpointed)
        self.images = images
        self.tower.checkpointed = checkpointed
        deep = len(self.tower.stacks)
        if deep:  # the first blocks are each followed by features of their own
            self.stages[0].stack.split(lambda layer: min(layer, deep))
        if not self.tower.patches:
            self.tower.patches = image.tokens * self.tower.merge
            self.image_tokens = image.tokens

    def after_block(self, layer: int, x: Tensor) -> Tensor:
        """Qwen3-VL's deep stack: features of a block of the tower onto the image tokens."""
        if layer >= len(self.tower.stacked):
            return x
        return stacked(x, self.tower.stacked[layer])

    def inputs(self, tape: Tape) -> list[Tensor]:
        """Pixel values, which the caller holds."""
        if not self.images:
            return []
        self.pixels = self.tower.pixel_values(tape, self.images)
        return list(self.pixels)

    def further_inputs(self) -> list[Module]:
        return [self.tower.first] if self.images else []

    def _image_mask(self, tape: Tape, dtype: str) -> Tensor | None:
        if tape.env.attention == "flash":
            return None
        return tape.tensor(SCORES, 1, dtype if tape.env.attention == "eager" else "bool", "mask")

    def project(self, x: Tensor) -> Tensor:
        """From patches to the language model's width."""
        children = self.model.children
        projector = children.get("multi_modal_projector")
        if "merger" in self.tower.children:
            return merged(self.tower.child("merger"), x, self.tower.merge)
        if projector is None:  # Idefics 3: patches side by side, one linear layer
            linear = self.model.child("connector.modality_projection.proj")
            return run_linear(linear, ops.copy(ops.copy(grouped(x, linear))))
        if "linear" in projector.children:
            return run_linear(projector.child("linear"), x)
        if "mm_soft_emb_norm" in projector.children:
            rows = BATCH * (self.images * self.image_tokens)
            return pooled(projector, x, rows)
        if self.tower.classed:
            rows = BATCH * (self.images * (self.tower.patches - 1))
            x = ops.copy(ops.rows_slice(x, rows))
        if "layer_norm" in projector.children:  # InternVL: neighbours side by side
            norm = projector.child("layer_norm")
            assert isinstance(norm, LayerNorm)
            assert norm.weight is not None
            times = norm.weight.shape[0] // x.width
            x = norm.forward(ops.copy(ops.view(x, divided(x.rows, times), x.width * times)))
        if "norm" in projector.children:  # Mistral 3
            x = projector.child("norm").forward(x)
            linear = projector.child("patch_merger.merging_layer")
            x = run_linear(linear, ops.copy(grouped(x, linear)))
        linear_1, linear_2 = projector.child("linear_1"), projector.child("linear_2")
        return run_linear(linear_2, activation(run_linear(linear_1, x), "gelu"))

    def head(self, x: Tensor) -> Tensor:
        return self.text.head(x)


def _sub(config: Config, key: str, model_type: str) -> dict[str, Any]:
    raw = config.get(key) or {}
    return filled(raw, raw.get("model_type") or model_type)


def _text(config: Config, default: str) -> dict[str, Any]:
    text = config.get("text_config")
    if not text:  # configs from before the text had a config of its own
        text = {
            key: value for key, value in config.items()
            if key not in ("model_type", "vision_config", "architectures")
        }  # fmt: skip
    kind = text.get("model_type") or default
    return {**text, "model_type": _TEXT_NAMES.get(kind, kind)}


_TEXT_NAMES = {"kimi_k2": "deepseek_v3"}
"""Types of code that lay beside the weights, and what transformers builds."""


def _text_network(text: Mapping[str, Any]) -> Network:
    kind = text["model_type"]
    if kind in QWEN_TEXT:
        return qwen_text(text)
    return families.build(text)


QWEN_TEXT = {
    "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "qwen2_vl",
    "qwen2_5_vl",
}  # fmt: skip


def qwen_text(raw: Mapping[str, Any]) -> Network:
    """The text part of Qwen-VL: positions in three directions, a table for each sequence."""
    kind = raw["model_type"]
    kind = kind if kind.endswith("_text") else f"{kind}_text"
    config = filled(raw, kind)
    new = kind.startswith("qwen3")
    mixed = kind.endswith("_moe_text")
    windowed = not new and config.get("use_sliding_window")
    types = list(config.get("layer_types") or ()) or [
        "sliding_attention"
        if windowed and layer >= config["max_window_layers"]
        else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    if new:
        types = [""] * config["num_hidden_layers"]

    def block(config: Config, layer: int) -> Module:
        attention = (
            Attention(config, qk_norm="head")
            if new
            else Attention(config, bias=True, out_bias=False, mask=types[layer])
        )
        if mixed and qwen_kind(config, layer):
            return Block(config, attention, qwen_mixture(config))
        mlp = MLP(config["hidden_size"], config["intermediate_size"], act(config))
        return Block(config, attention, mlp)

    windows = {
        name: config.get("sliding_window") if name == "sliding_attention" else None
        for name in dict.fromkeys(types)
    }
    if mixed:
        config.setdefault("norm_topk_prob", True)
        config.pop("shared_expert_intermediate_size", None)
    return Decoder(
        {**config, "tie_word_embeddings": False}, block,
        kind=lambda layer: (types[layer], mixed and qwen_kind(config, layer)),
        ropes={"": Rope(width=head_size(config), per_sequence=True)}, windows=windows,
    )  # fmt: skip


_WRAPPERS: dict[str, tuple[str, str, str, str]] = {
    # wrapper: (text default, vision default, tower's name, language model's name)
    "llava": ("llama", "clip_vision_model", "vision_tower", "language_model"),
    "llava_next": ("llama", "clip_vision_model", "vision_tower", "language_model"),
    "llava_onevision": ("qwen2", "siglip_vision_model", "vision_tower", "language_model"),
    "ernie4_5_vl_moe": (
        "ernie4_5_vl_moe_text",
        "ernie4_5_vl_moe_vision",
        "vision_tower",
        "language_model",
    ),
    "kimi_k25": ("deepseek_v3", "kimi_k25_vision", "vision_tower", "language_model"),
    "mistral3": ("mistral", "pixtral", "vision_tower", "language_model"),
    "gemma3": ("gemma3_text", "siglip_vision_model", "vision_tower", "language_model"),
    "paligemma": ("gemma", "siglip_vision_model", "vision_tower", "language_model"),
    "internvl": ("qwen2", "internvl_vision", "vision_tower", "language_model"),
    "idefics3": ("llama", "idefics3_vision", "vision_model", "text_model"),
    "smolvlm": ("llama", "smolvlm_vision", "vision_model", "text_model"),
    "qwen2_vl": ("qwen2_vl_text", "qwen2_vl_vision", "visual", "language_model"),
    "qwen2_5_vl": ("qwen2_5_vl_text", "qwen2_5_vl_vision", "visual", "language_model"),
    "qwen3_vl": ("qwen3_vl_text", "qwen3_vl_vision", "visual", "language_model"),
    "qwen3_5": ("qwen3_5_text", "qwen3_5_vision", "visual", "language_model"),
    "qwen3_5_moe": ("qwen3_5_moe_text", "qwen3_5_moe_vision", "visual", "language_model"),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", "qwen3_vl_moe_vision", "visual", "language_model"),
}
_ONEVISION = {
    "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14, "image_size": 384,
    "num_hidden_layers": 26, "num_attention_heads": 16, "vision_use_head": False,
}  # fmt: skip
"""Of a LLaVA-OneVision without a vision_config."""
_SHOWN = (
    "llava", "gemma3", "paligemma", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
    "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "idefics3", "smolvlm", "mistral3", "llava_next",
    "llava_onevision", "kimi_k25",
)  # fmt: skip
"""Wrappers whose tower is run; the others' weights are counted."""
_JOINED = (
    "llava", "llava_next", "llava_onevision", "mistral3", "idefics3", "smolvlm", "qwen2_vl",
    "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "kimi_k25",
)  # fmt: skip
"""Wrappers that call ``torch.cat`` on the features of each image."""
_HANDED_DOWN = ("idefics3", "smolvlm", "mistral3", "llava_next", "llava_onevision")
"""Wrappers that tell the language model whether to fill a cache, by their own config."""
_TEXT_TIES = ("llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "glm4v")


def vision_language(raw: Config, made: type[VisionLanguage] = VisionLanguage) -> Network:
    """A wrapper by its ``model_type``."""
    config = filled(raw)
    kind = config["model_type"]
    text_default, vision_default, tower_name, text_name = _WRAPPERS[kind]
    text = _text(raw, text_default)
    vision = _sub(config, "vision_config", vision_default)
    if kind == "llava_onevision" and not config.get("vision_config"):
        vision |= _ONEVISION
    tied = bool(config.get("tie_word_embeddings"))
    if kind in _TEXT_TIES:
        tied = tied or bool(text.get("tie_word_embeddings"))
    network = made(
        _text_network({**text, "tie_word_embeddings": False}), vision_tower(vision), tied=tied,
        tower_name=tower_name, text_name=text_name,
    )  # fmt: skip
    network.joins = kind in _JOINED
    # Kimi's cache is of latents, which the product that expands them keeps anyway
    network.caches = kind not in (*_HANDED_DOWN, "kimi_k25")
    network.bidirectional = kind in ("gemma3", "paligemma")
    network.shows = kind in _SHOWN
    network.returns_features = not kind.startswith(("qwen", "kimi"))
    network.image_tokens = _image_tokens(config, network.tower)
    if kind in ("llava", "llava_next", "llava_onevision", "mistral3"):
        last = kind in ("llava_onevision", "mistral3")
        layer = config.get("vision_feature_layer", -1 if last else -2)
        network.tower.layer = layer if isinstance(layer, int) else layer[-1]
    projector(network.model, config, text, vision)
    return network


def _image_tokens(config: Config, tower: Tower) -> int:
    """Tokens of one image (of one crop of it, where the processor cuts it up); 0: any number."""
    kind, patches = config["model_type"], tower.patches - tower.classed
    if kind == "gemma3":
        return int(config.get("mm_tokens_per_image") or 256)
    if kind in ("idefics3", "smolvlm"):
        return int(patches // config.get("scale_factor", 2) ** 2)
    if kind == "internvl":
        return int(patches * config.get("downsample_ratio", 0.5) ** 2)
    if tower.packs:  # any size
        tower.patches, tower.merge = 0, config.get("spatial_merge_size", 1) ** 2
        return 0
    return patches if tower.patches else 0


MODEL_TYPES: dict[str, Any] = dict.fromkeys(
    set(_WRAPPERS) - {"llava_next", "llava_onevision", "kimi_k25"}, vision_language
)
