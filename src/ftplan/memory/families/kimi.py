"""Kimi K2.5: a tower of images of any size beside DeepSeek-V3's text.

Source: transformers 5.23.0, models/kimi_k25/modeling_kimi_k25.py.
"""

from __future__ import annotations

from typing import Any

from ftplan.memory import ops
from ftplan.memory.families.decoder import Config
from ftplan.memory.families.patches import divided, run_linear
from ftplan.memory.families.vision import VisionLanguage, vision_language
from ftplan.memory.nn import Module, Network, activation
from ftplan.memory.tape import Tensor

__all__ = ["MODEL_TYPES", "Kimi"]


class Kimi(VisionLanguage):
    """``Kimi_K25ForConditionalGeneration``."""

    def further_inputs(self) -> list[Module]:
        """The tower's class tells nobody where its embeddings are."""
        return []

    def project(self, x: Tensor) -> Tensor:
        """Neighbours are gathered, averaged over time (of which an image has one moment), normed
        and projected side by side."""
        pooled = ops.scale(ops.gather(x), "mean")
        projector, merge = self.model.child("mm_projector"), self.tower.merge
        x = projector.child("pre_norm").forward(pooled)
        x = ops.view(x, divided(x.rows, merge), x.width * merge)
        x = activation(run_linear(projector.child("in_proj"), x), "gelu")
        return run_linear(projector.child("out_proj"), x)


def _build(raw: Config) -> Network:
    return vision_language(raw, Kimi)


MODEL_TYPES: dict[str, Any] = {"kimi_k25": _build}
