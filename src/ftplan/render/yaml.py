"""YAML: the JSON answer in YAML's clothes, same fields and order."""

from __future__ import annotations

from typing import Any

import yaml

from ftplan.render.data import plain

__all__ = ["render"]


class _Dumper(yaml.SafeDumper):
    """Repeats a value instead of writing anchors, which few readers of a report expect."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def render(answer: Any) -> str:
    """The answer as YAML."""
    return yaml.dump(plain(answer), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
