"""Between a tower and a language model: projectors, and how features take their places.

Source: transformers 5.23.0, models/<type>/modeling_<type>.py.
"""

from __future__ import annotations

from ftplan.memory import ops
from ftplan.memory.families.decoder import Config, filled
from ftplan.memory.families.patches import plant, weight
from ftplan.memory.nn import LayerNorm, Linear, Module, RMSNorm
from ftplan.memory.tape import ONE, TOKENS, Grads, Size, Tensor

__all__ = ["pooled", "projector", "scattered", "stacked"]


def pooled(projector: Module, x: Tensor, rows: Size) -> Tensor:
    """``Gemma3MultiModalProjector``: averaged over squares of patches, normed, multiplied."""
    dtype = x.dtype
    x = ops.copy(x, "contiguous")
    out = x.tape.tensor(rows, x.width, x.dtype, "avg_pool2d")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    saved = x

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    ops.record([out], "avg_pool2d", [x], apply)
    del x
    out = projector.child("mm_soft_emb_norm").forward(out)
    weight = out.tape.leaf(projector.parameters["mm_input_projection_weight"])
    turned = weight.alias(ONE * weight.width, weight.rows[0])
    turned.requires_grad, turned.node = weight.requires_grad, weight.node
    return ops.to(ops.linear(ops.copy(out, "contiguous"), turned), dtype)


def scattered(x: Tensor, features: Tensor) -> Tensor:
    """``masked_scatter``: a copy of the embeddings; keeps the mask."""
    out = x.tape.tensor(x.rows, x.width, x.dtype, "image features in place")
    mask = x.tape.tensor(TOKENS, 1, "bool", "image mask")
    make_x = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    shape = (features.rows, features.width, features.dtype)
    wants = features.requires_grad

    def apply(grad: Tensor) -> Grads:
        _kept = mask
        return make_x(grad), grad.tape.tensor(*shape, "gradient") if wants else None

    ops.record([out], "masked_scatter", [x, features], apply)
    return out


def stacked(x: Tensor, features: Tensor) -> Tensor:
    """``_deepstack_process``: a clone, whose rows of image tokens are added to and put back."""
    features = ops.to(ops.copy(features, "cat"), x.dtype)
    x = ops.copy(x, "clone")
    local = ops.add(ops.gather(x, features.rows), features)
    out = x.alias()
    makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in (x, local)]
    ops.record([out], "index_put", [x, local], lambda grad: tuple(make(grad) for make in makers))
    return out


def projector(model: Module, config: Config, text: Config, vision: Config) -> None:
    kind, wide = config["model_type"], filled(text)["hidden_size"]
    narrow = vision["hidden_size"]
    if kind in ("llava", "llava_next", "llava_onevision"):
        layers = config.get("vision_feature_layer", -2)
        count = 1 if isinstance(layers, int) else len(layers)
        bias = bool(config.get("multimodal_projector_bias", True))
        plant(model, "multi_modal_projector.linear_1", Linear(narrow * count, wide, bias=bias))
        plant(model, "multi_modal_projector.linear_2", Linear(wide, wide, bias=bias))
        if kind != "llava":
            model.parameter("image_newline", wide)
    elif kind == "kimi_k25":
        height, width = vision.get("merge_kernel_size") or (2, 2)
        merged = narrow * height * width
        plant(model, "mm_projector.pre_norm", LayerNorm(config["projection_hidden_size"]))
        plant(model, "mm_projector.in_proj", Linear(merged, merged, bias=True))
        plant(model, "mm_projector.out_proj", Linear(merged, wide, bias=True))
    elif kind == "ernie4_5_vl_moe":
        merged = narrow * vision["spatial_merge_size"] ** 2
        times = vision["temporal_merge_size"]
        for name, width in (("spatial", merged), ("temporal", merged * times)):
            path = f"resampler_model.{name}_linear"
            plant(model, f"{path}.fc1", Linear(width, merged, bias=True))
            plant(model, f"{path}.fc2", Linear(merged, merged, bias=True))
            plant(model, f"{path}.ln", LayerNorm(merged))
        plant(model, "resampler_model.mlp", Linear(merged, wide, bias=True))
        plant(model, "resampler_model.after_norm", RMSNorm(wide))
    elif kind == "mistral3":
        bias, merge = bool(config.get("multimodal_projector_bias")), config["spatial_merge_size"]
        plant(model, "multi_modal_projector.norm", RMSNorm(narrow))
        plant(
            model, "multi_modal_projector.patch_merger.merging_layer",
            Linear(narrow * merge**2, narrow),
        )  # fmt: skip
        plant(model, "multi_modal_projector.linear_1", Linear(narrow, wide, bias=bias))
        plant(model, "multi_modal_projector.linear_2", Linear(wide, wide, bias=bias))
    elif kind == "gemma3":
        weight(model, "multi_modal_projector.mm_input_projection_weight", narrow, wide)
        plant(model, "multi_modal_projector.mm_soft_emb_norm", RMSNorm(narrow, offset=True))
    elif kind == "paligemma":
        projected = config.get("projection_dim") or vision.get("projection_dim") or wide
        plant(model, "multi_modal_projector.linear", Linear(narrow, projected, bias=True))
    elif kind == "internvl":
        merged = int(narrow * (1 / config.get("downsample_ratio", 0.5)) ** 2)
        plant(model, "multi_modal_projector.layer_norm", LayerNorm(merged))
        plant(model, "multi_modal_projector.linear_1", Linear(merged, wide, bias=True))
        plant(model, "multi_modal_projector.linear_2", Linear(wide, wide, bias=True))
    elif kind in ("idefics3", "smolvlm"):
        scale = config.get("scale_factor", 2) ** 2
        plant(model, "connector.modality_projection.proj", Linear(narrow * scale, wide))
