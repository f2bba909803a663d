"""Write src/ftplan/memory/families/plans.py: what transformers' tensor parallelism cuts of a model.

``tp_plan="auto"`` follows a plan that the configuration class has for the blocks and the model
class for its head. Needs transformers; run it when a new version is followed::

    python tools/tensor_plans.py            # write
    python tools/tensor_plans.py --check    # exit 1 if the file would change
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import transformers
from family_defaults import TYPES
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

TARGET = Path(__file__).parents[1] / "src/ftplan/memory/families/plans.py"
CLASSES = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)  # fmt: skip
BLOCKS = "layers.*."
HEAD = {"lm_head": "colwise_gather_output"}


def blocks_of(model_type: str) -> dict[str, str]:
    """The plan of a type's blocks, paths counted from a block; and of a table that it names."""
    plan = getattr(CONFIG_MAPPING[model_type], "base_model_tp_plan", None) or {}
    tables = {path: style for path, style in plan.items() if style == "embedding_rowwise"}
    blocks = {
        path.removeprefix(BLOCKS): style for path, style in plan.items() if path.startswith(BLOCKS)
    }
    return {**tables, **blocks}


def cuts_head(model_type: str) -> bool:
    """Whether the class that has the type's output head cuts it. All that do, do it in one way."""
    config = CONFIG_MAPPING[model_type]
    plans: list[Any] = [getattr(m[config], "_tp_plan", None) for m in CLASSES if config in m]
    assert all(plan in (None, HEAD) for plan in plans), (model_type, plans)
    return any(plans)


def rendered() -> str:
    """The whole file."""
    types: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for model_type in TYPES:
        plan = blocks_of(model_type)
        if plan:
            types.setdefault(tuple(plan.items()), []).append(model_type)
    lines = [
        '"""Tensor parallelism: what a model\'s own plan in transformers cuts, and how.',
        "",
        "Written by tools/tensor_plans.py from models/*/configuration_*.py",
        "(``base_model_tp_plan``) and modeling_*.py (``_tp_plan``) of",
        f"transformers {transformers.__version__}. Do not edit.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        '__all__ = ["HEADS", "PLANS", "VERSION"]',
        "",
        f'VERSION = "{transformers.__version__}"',
        "",
        "# fmt: off",
        "_GROUPS: tuple[tuple[tuple[str, ...], dict[str, str]], ...] = (",
    ]
    for plan, names in types.items():
        lines += ["    ((", *_filled((f'"{name}",' for name in names), 8), "    ), {"]
        lines += [*_filled((f'"{path}": "{style}",' for path, style in plan), 8), "    }),"]
    lines += [
        ")",
        "",
        "PLANS = {name: plan for names, plan in _GROUPS for name in names}",
        '"""Styles by path within a block (tables: within the model), by ``model_type``."""',
        "",
        "HEADS = frozenset({",
        *_filled((f'"{name}",' for name in TYPES if cuts_head(name)), 4),
        "})",
        '"""Types whose class cuts the output head by columns and gathers all logits."""',
        "",
    ]
    return "\n".join(lines)


def _filled(items: Any, indent: int) -> list[str]:
    """Lines of at most 100 columns."""
    lines = [" " * (indent - 1)]
    for item in items:
        if len(lines[-1]) + len(item) + 1 > 100:
            lines.append(" " * (indent - 1))
        lines[-1] += f" {item}"
    return lines


if __name__ == "__main__":
    text = rendered()
    if "--check" in sys.argv[1:]:
        sys.exit(TARGET.read_text() != text)
    TARGET.write_text(text)
