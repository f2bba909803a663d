"""Batches with images, in the shapes that the real processors hand over.

A vision-language model asks its batch for values (how many patches an image has, where its tokens
are), so such a job is traced on real tensors: small, with memory, and with nothing else different.
Source of the shapes: transformers 5.23, models/*/processing_*.py and image_processing_*.py.
"""

# torch is not installed where types are checked: its classes are Any there
# mypy: disable-error-code="misc"

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ftplan.errors import UnsupportedError

__all__ = ["Unmultiplied", "image_batch", "is_vision_language"]

Batch = dict[str, Any]


class Unmultiplied(TorchDispatchMode):
    """Real tensors, but what is slow and whose values nobody asks for is left undone.

    Products are empty, the optimizer changes nothing. What a model does ask for (positions, masks,
    which tokens are an image) are sums and comparisons of integers, and runs.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.bmm.default):
            left, right = args
            return left.new_empty((*left.shape[:-1], right.shape[-1]))
        if func is aten.addmm.default:
            _, left, right = args
            return left.new_empty((left.shape[0], right.shape[1]))
        if func in (aten.gelu.default, aten.gelu_backward.default):
            return torch.empty_like(args[-1])
        if func is aten._fused_adamw_.default:
            return None
        return func(*args, **(kwargs or {}))


def is_vision_language(config: Any) -> bool:
    """The config has a tower of its own."""
    return hasattr(config, "vision_config")


def image_batch(
    config: Any, ids: Any, images: int, size: tuple[int, int], dtype: Any = torch.float32
) -> Batch:
    """Pixel values for ``images`` in each sequence of ``ids``, among whose first tokens theirs are.

    ``size``: height and width in pixels, where the model takes any resolution. ``dtype``: of
    pixels, where the model does not cast them itself.
    """
    maker = _MAKERS.get(config.model_type)
    several = config.model_type == "llava_onevision" and images > 1
    maker = _whole if several else maker
    if maker is None:
        raise UnsupportedError(f"tracing images of {config.model_type}")
    vision = config.vision_config
    tokens, batch = maker(config, vision, int(ids.shape[0]) * images, size)
    token = getattr(config, "image_token_id", None)
    token = config.image_token_index if token is None else token
    for start in range(0, images * (tokens + 1) if tokens else 0, tokens + 1):
        ids[:, start : start + tokens] = token  # and a token of text after each
    if config.model_type.startswith(("gemma", "paligemma", "qwen", "glm4")):
        old = config.model_type in ("gemma3", "paligemma")
        batch["token_type_ids" if old else "mm_token_type_ids"] = (ids == token).to(torch.int64)
    if several:
        batch["batch_num_images"] = torch.tensor([images] * int(ids.shape[0]))
    if config.model_type in ("llama4", "kimi_k25"):
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    if config.model_type in ("idefics3", "smolvlm", "mllama"):
        batch = {name: _by_sequence(value, images) for name, value in batch.items()}
    if config.model_type == "mllama":
        tiles = batch["pixel_values"].shape[2]
        shape = (*ids.shape, images, tiles)
        batch["cross_attention_mask"] = torch.ones(shape, dtype=torch.int64)
    return batch


def _by_sequence(value: Any, images: int) -> Any:
    return value.reshape(-1, images, *value.shape[1:])


def _side(value: Any) -> int:
    return int(value if isinstance(value, int) else value[0])


def _fixed(config: Any, vision: Any, count: int, _size: tuple[int, int]) -> tuple[int, Batch]:
    """One size for all: CLIP, SigLIP, InternViT."""
    side, patch = _side(vision.image_size), _side(vision.patch_size)
    tokens = (side // patch) ** 2
    if config.model_type == "gemma3":
        tokens = config.mm_tokens_per_image
    if config.model_type == "llama4":
        tokens = int(tokens * vision.pixel_shuffle_ratio**2)
    if config.model_type == "internvl":
        tokens = int(tokens * config.downsample_ratio**2)
    return tokens, {"pixel_values": torch.zeros(count, 3, side, side)}


def _cropped(config: Any, vision: Any, count: int, _size: tuple[int, int]) -> tuple[int, Batch]:
    """Idefics 3: crops of one size and which of their pixels are real; a crop of zeros is none."""
    side = _side(vision.image_size)
    return (side // _side(vision.patch_size)) ** 2 // config.scale_factor**2, {
        "pixel_values": torch.ones(count, 3, side, side),
        "pixel_attention_mask": torch.ones(count, side, side, dtype=torch.int64),
    }


def _patched(config: Any, vision: Any, count: int, size: tuple[int, int]) -> tuple[int, Batch]:
    """Qwen-VL: patches of all images in a row, and how many there are each way."""
    patch, merge = vision.patch_size, vision.spatial_merge_size
    high, wide = (extent // (patch * merge) * merge for extent in size)
    channels = getattr(vision, "in_channels", None) or vision.in_chans
    width = channels * vision.temporal_patch_size * patch * patch
    return high * wide // merge**2, {
        "pixel_values": torch.zeros(count * high * wide, width),
        "image_grid_thw": torch.tensor([[1, high, wide]] * count),
    }


def _separate(_config: Any, vision: Any, count: int, size: tuple[int, int]) -> tuple[int, Batch]:
    """Kimi: a tensor for each patch, and how many there are each way."""
    patch = vision.patch_size
    high, wide = (extent // (patch * 2) * 2 for extent in size)
    return high * wide // 4, {
        "pixel_values": torch.zeros(count * high * wide, 3, patch, patch),
        "image_grid_thw": torch.tensor([[1, high, wide]] * count),
    }


def _sized(config: Any, vision: Any, count: int, size: tuple[int, int]) -> tuple[int, Batch]:
    """Pixtral's tower: any size, rounded up to whole patches and said beside the pixels."""
    unit = vision.patch_size * getattr(config, "spatial_merge_size", 1)
    high, wide = (-(-extent // unit) * unit for extent in size)
    return high * wide // unit**2, {
        "pixel_values": torch.zeros(count, 3, high, wide),
        "image_sizes": torch.tensor([[high, wide]] * count),
    }


def _llava(config: Any, vision: Any, count: int, size: tuple[int, int]) -> tuple[int, Batch]:
    return (_sized if vision.model_type == "pixtral" else _fixed)(config, vision, count, size)


def _tiled(_config: Any, vision: Any, count: int, _size: tuple[int, int]) -> tuple[int, Batch]:
    """Llama 3.2 Vision: four tiles an image, seen through cross attention, no tokens."""
    tiles, side = vision.max_num_tiles, vision.image_size
    return 0, {
        "pixel_values": torch.zeros(count, tiles, 3, side, side),
        "aspect_ratio_ids": torch.ones(count, dtype=torch.int64),
        "aspect_ratio_mask": torch.ones(count, tiles, dtype=torch.int64),
    }


def _padded(_config: Any, vision: Any, count: int, size: tuple[int, int]) -> tuple[int, Batch]:
    """Gemma 4: as many patches as 280 tokens have, of the image's own shape and then of padding."""
    most, pool = 280 * vision.pooling_kernel_size**2, vision.pooling_kernel_size
    factor = (most / (size[0] * size[1])) ** 0.5
    high, wide = (int(factor * extent) // pool * pool for extent in size)
    positions = torch.full((count, most, 2), -1)
    grid = torch.cartesian_prod(torch.arange(high), torch.arange(wide)).flip(-1)
    positions[:, : high * wide] = grid
    return high * wide // pool**2, {
        "pixel_values": torch.zeros(count, most, 3 * vision.patch_size**2),
        "image_position_ids": positions,
    }


def _cut_up(config: Any, vision: Any, count: int, size: tuple[int, int]) -> tuple[int, Batch]:
    """LLaVA-NeXT, LLaVA-OneVision: tiles; the model's functions say how many features are left."""
    from transformers.models.llava_next import modeling_llava_next as source

    side, pinpoints = vision.image_size, config.image_grid_pinpoints
    tiles = source.image_size_to_num_patches(size, pinpoints, side)
    down, across = source.get_anyres_image_grid_shape(size, pinpoints, side)
    patches = side // vision.patch_size
    grid = torch.empty(1, down * patches, across * patches)
    _, rows, columns = source.unpad_image(grid, size).shape
    if config.model_type == "llava_onevision":
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = (rows * columns / (most * patches**2)) ** 0.5
        rows, columns = (int(n // ratio) if ratio > 1.1 else n for n in (rows, columns))
    return patches**2 + rows * (columns + 1), {
        "pixel_values": torch.zeros(count, tiles, 3, side, side),
        "image_sizes": torch.tensor([size] * count),
    }


def _whole(_config: Any, vision: Any, count: int, size: tuple[int, int]) -> tuple[int, Batch]:
    """LLaVA-OneVision: images that are several are not cut up; a token ends each."""
    side = vision.image_size
    return (side // vision.patch_size) ** 2 + 1, {
        "pixel_values": torch.zeros(count, 1, 3, side, side),
        "image_sizes": torch.tensor([size] * count),
    }


_MAKERS = {
    "llava_next": _cut_up,
    "llava_onevision": _cut_up,
    "gemma4": _padded,
    **dict.fromkeys(("gemma3", "paligemma", "internvl", "llama4"), _fixed),
    **dict.fromkeys(("idefics3", "smolvlm"), _cropped),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"), _patched),
    **dict.fromkeys(("glm4v", "glm46v", "glm4v_moe"), _patched),
    "kimi_k25": _separate,
    "llava": _llava,
    "mistral3": _sized,
    "mllama": _tiled,
}
