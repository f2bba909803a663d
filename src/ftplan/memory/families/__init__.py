"""Families: config.json to a network, one file per kind of architecture.

A family file ends in ``MODEL_TYPES``: the ``model_type`` values it builds, each with the function
from config to network. To add a family is to add a file and its row in :data:`_FILES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ftplan.errors import UnsupportedError
from ftplan.memory.nn import Network

__all__ = ["build", "model_types"]

_FILES: dict[str, tuple[str, ...]] = {
    "llama": ("llama", "mistral"),
}


def model_types() -> tuple[str, ...]:
    """Every ``model_type`` that is modelled."""
    return tuple(sorted(name for names in _FILES.values() for name in names))


def build(config: Mapping[str, Any]) -> Network:
    """The network that a config.json describes.

    Raises UnsupportedError, by name, for a ``model_type`` that is not modelled.
    """
    model_type = config.get("model_type")
    for file, names in _FILES.items():
        if model_type in names:
            module = import_module(f"ftplan.memory.families.{file}")
            network: Network = module.MODEL_TYPES[model_type](config)
            return network
    raise UnsupportedError(
        f"model_type {model_type!r}",
        remedy="give --params for the textbook's sums, or the config.json of a modelled family: "
        + ", ".join(model_types()),
    )
