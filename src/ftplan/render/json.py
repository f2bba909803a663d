"""JSON: any answer, field for field, bytes as integers."""

from __future__ import annotations

import json
from typing import Any

from ftplan.render.data import plain

__all__ = ["render"]


def render(answer: Any) -> str:
    """The answer as indented JSON. Infinities and NaN are a fault of ours, never written."""
    return json.dumps(plain(answer), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
