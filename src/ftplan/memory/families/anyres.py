"""LLaVA-NeXT and LLaVA-OneVision: an image is the whole of it in one tile, and tiles of it.

The features of the tiles are put side by side, what is padding is cut away, and a learned token
ends each row. Source: transformers 5.23.0, models/{llava_next,llava_onevision}/modeling_*.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftplan.memory import ops
from ftplan.memory.families.decoder import Config
from ftplan.memory.families.vision import VisionLanguage, vision_language
from ftplan.memory.images import Image
from ftplan.memory.nn import Network
from ftplan.memory.tape import BATCH, ONE, Grads, Tensor

__all__ = ["MODEL_TYPES", "AnyResolution"]


class AnyResolution(VisionLanguage):
    """A wrapper whose tower is shown tiles."""

    image = Image()
    whole = 0
    """Images per sequence; :attr:`images` counts their tiles."""

    def show(self, images: int, image: Image, *, checkpointed: bool) -> None:
        """Put ``images`` in each sequence, in as many tiles as their size asks for."""
        super().show(images * image.tiles, image, checkpointed=checkpointed)
        self.whole, self.image = images, image

    def picked(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """The tiles of all images in a row, without those that fill up a batch: a copy."""
        return [ops.copy(pixels[0], "tiles")]

    def packed(self, x: Tensor) -> Tensor:
        """``pack_image_features``."""
        newline = x.tape.leaf(self.model.parameters["image_newline"])
        return _packed(x, newline, self.image, self.whole)


def _packed(x: Tensor, newline: Tensor, image: Image, images: int) -> Tensor:
    """Features of tiles (a row for each) to those of images.

    What is made of one image on the way goes before the next one's is made.
    """
    tape, width, dtype, rows = x.tape, x.width, x.dtype, x.rows
    down, across = image.packed
    out = tape.tensor(BATCH * (images * image.tokens), width, dtype, "packed features")
    if down:
        tiles = ONE * (rows[BATCH.index(1)] // (images * image.tiles) * (image.tiles - 1))
        laid = tape.tensor(tiles, width, dtype, "tiles side by side")
        ended = tape.tensor(ONE * (down * (across + 1)), width, dtype, "rows with their ends")
        del laid, ended
    wants, wants_newline, own = x.requires_grad, newline.requires_grad, newline.dtype

    def apply(grad: Tensor) -> Grads:
        tape = grad.tape
        end = tape.tensor(ONE, width, own, "gradient") if wants_newline else None
        if not wants:
            return None, end
        each = tape.tensor(rows, width, dtype, "gradients of tiles")
        joined = tape.tensor(rows, width, dtype, "gradient")
        del each
        return joined, end

    ops.record([out], "pack", [x, newline], apply)
    return out


def _build(raw: Config) -> Network:
    return vision_language(raw, AnyResolution)


MODEL_TYPES: dict[str, Any] = {"llava_next": _build, "llava_onevision": _build}
