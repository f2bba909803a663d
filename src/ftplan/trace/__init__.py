"""The annex: a job run for real on fake tensors, or measured on a GPU (extra ``trace``).

Only the door imports this package, inside its commands; importing it loads no torch.
"""

from __future__ import annotations

import importlib.util

from ftplan.errors import MissingExtraError

__all__ = ["PACKAGES", "require"]

PACKAGES = ("torch", "transformers", "peft", "accelerate")
"""What the extra ``trace`` installs."""


def require(needed_for: str) -> None:
    """Raise MissingExtraError, naming what to install, unless the extra is there."""
    if any(importlib.util.find_spec(package) is None for package in PACKAGES):
        raise MissingExtraError("trace", needed_for)
