"""What an image becomes: tokens, and tiles of it, by the arithmetic of a model's processor.

Source: transformers 5.23.0, models/<type>/processing_*.py and image_processing_*.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, sqrt
from typing import Any

from ftplan.dataclass import dataclass

__all__ = ["MOST_TOKENS", "Image", "image_of"]

MOST_TOKENS = 1280
"""Tokens of an image where a model takes any resolution (a square of about 1000 pixels in
Qwen-VL), or fewer where the sequence has no room for them."""
SOFT_TOKENS = 280
"""Tokens of an image of Gemma 4, at most: its patches are padded to so many."""

Config = Mapping[str, Any]
Sides = tuple[int, ...]
"""Height and width in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One image as the processor hands it over."""

    tokens: int = 0
    tiles: int = 1
    """Pieces of it that go through the tower, the whole among them."""
    grid: tuple[int, int] = (0, 0)
    """Rows and columns of features of those pieces side by side, without padding (anyres)."""
    packed: tuple[int, int] = (0, 0)
    """The same after they have been made fewer."""
    assumed: str = ""
    """What was taken for its size where the plan says none."""


def image_of(config: Config, size: Sides | None, *, images: int, seq_len: int) -> Image | None:
    """One of ``images`` in a sequence, of this size; None where a model's images have one size."""
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        return None
    kind = str(config.get("model_type"))
    if kind == "gemma4":
        return _same_area(vision, size)
    if kind in _GRIDS:
        return _in_tiles(config, vision, size, images)
    unit = _unit(kind, config, vision)
    if not unit:
        return None
    if size is None:
        assumed = f"any resolution: at most {MOST_TOKENS} tokens"
        return Image(tokens=min(MOST_TOKENS, seq_len // images), assumed=assumed)
    if kind.startswith("glm4"):
        return _between(unit, *size)
    if kind == "kimi_k25":
        size = _at_most(unit // 2, *size)
    count = ceil if vision.get("model_type") in ("pixtral", "kimi_k25_vision") else round
    high, wide = (max(1, count(extent / unit)) for extent in size)
    return Image(tokens=int(high * wide))


def _unit(kind: str, config: Config, vision: Config) -> int:
    """Pixels along one side of an image token, where any resolution is taken; 0: one size only."""
    if kind.startswith(("qwen", "glm4")):
        return int(vision.get("patch_size") or 14) * int(vision.get("spatial_merge_size") or 2)
    if vision.get("model_type") == "pixtral":
        return int(vision.get("patch_size") or 16) * int(config.get("spatial_merge_size") or 1)
    if kind == "kimi_k25":
        return int(vision.get("patch_size") or 14) * 2
    return 0


def _between(unit: int, high: int, wide: int) -> Image:
    """GLM-4V's ``smart_resize``: whole tokens, neither too few nor too many (an image is shown in
    two frames)."""
    short = max(1.0, unit / min(high, wide))
    high, wide = int(high * short), int(wide * short)
    rows, columns = round(high / unit), round(wide / unit)
    least, most = (pixels / 2 for pixels in _GLM_PIXELS)
    if rows * columns * unit**2 > most:
        factor = sqrt(2 * high * wide / _GLM_PIXELS[1])
        rows, columns = (max(1, int(extent / factor / unit)) for extent in (high, wide))
    elif rows * columns * unit**2 < least:
        factor = sqrt(_GLM_PIXELS[0] / (2 * high * wide))
        rows, columns = (ceil(extent * factor / unit) for extent in (high, wide))
    return Image(tokens=rows * columns)


_GLM_PIXELS = (112 * 112, 14 * 14 * 2 * 2 * 2 * 6144)
"""Of both frames, at least and at most."""


def _at_most(patch: int, high: int, wide: int) -> tuple[int, int]:
    """Kimi's ``navit_resize``: pixels after scaling down to 16,384 patches, 512 along a side."""
    patches = max(1, high // patch) * max(1, wide // patch)
    factor = min(1.0, sqrt(16384 / patches), 512 * patch / high, 512 * patch / wide)
    return max(1, int(high * factor)), max(1, int(wide * factor))


def _same_area(vision: Config, size: Sides | None) -> Image:
    """Gemma 4: scaled to the most tokens that its shape allows, in whole squares of patches."""
    pool = int(vision.get("pooling_kernel_size") or 3)
    assumed = "" if size else "a square"
    high, wide = size or (1, 1)
    factor = sqrt(SOFT_TOKENS * pool**2 / (high * wide))
    rows, columns = (int(factor * extent) // pool for extent in (high, wide))
    if not rows:
        rows, columns = 1, min(wide // high, SOFT_TOKENS)
    elif not columns:
        rows, columns = min(high // wide, SOFT_TOKENS), 1
    return Image(tokens=rows * columns, assumed=assumed)


_GRIDS = {
    "llava_next": ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
    "llava_onevision": tuple((high, wide) for high in range(1, 7) for wide in range(1, 7)),
}
"""Tiles down and across of the resolutions that these take where a config lists none."""


def _in_tiles(config: Config, vision: Config, size: Sides | None, images: int) -> Image | None:
    """LLaVA-NeXT, LLaVA-OneVision: the whole in one tile, and the tiles of the resolution that
    fits best, without what is padding in them, each row with a token at its end. OneVision cuts
    up no image that is one of several."""
    side = int(vision.get("image_size") or 336)
    patches = side // int(vision.get("patch_size") or 14)
    if images > 1 and config["model_type"] == "llava_onevision":
        return Image(tokens=patches**2 + 1) if size is None else None
    assumed = "" if size else f"a square of {2 * side} pixels"
    high, wide = size or (2 * side, 2 * side)
    listed = config.get("image_grid_pinpoints")
    grids = [(h // side, w // side) for h, w in listed] if listed else _GRIDS[config["model_type"]]
    down, across = max(grids, key=lambda grid: _fit(grid, side, high, wide))
    rows, columns = _unpadded(down * patches, across * patches, high, wide)
    packed = _fewer(config, rows, columns, patches)
    tokens = patches**2 + packed[0] * (packed[1] + 1)
    return Image(
        tokens=tokens, tiles=1 + down * across, grid=(rows, columns), packed=packed, assumed=assumed
    )


def _fit(grid: tuple[int, int], side: int, high: int, wide: int) -> tuple[int, int]:
    """Pixels of the image that these tiles show, and (less is better) those they waste."""
    rows, columns = grid[0] * side, grid[1] * side
    scale = min(columns / wide, rows / high)
    shown = min(int(wide * scale) * int(high * scale), wide * high)
    return shown, shown - rows * columns


def _unpadded(rows: int, columns: int, high: int, wide: int) -> tuple[int, int]:
    """``unpad_image``: rows and columns that show something of the image."""
    if wide / high > columns / rows:
        return rows - (rows - int(round(high * (columns / wide), 7))) // 2 * 2, columns
    return rows, columns - (columns - int(round(wide * (rows / high), 7))) // 2 * 2


def _fewer(config: Config, rows: int, columns: int, patches: int) -> tuple[int, int]:
    """LLaVA-OneVision: interpolated to about as many features as so many tiles have."""
    if config["model_type"] != "llava_onevision":
        return rows, columns
    most = int(str(config.get("vision_aspect_ratio") or "anyres_max_9").rpartition("_")[2])
    ratio = sqrt(rows * columns / (most * patches**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
