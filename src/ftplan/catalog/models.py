"""Models by name: catalogue names, aliases, hub ids and the spellings that configs use.

A row's ``config`` is the released model's own, as `config.json` has it, cut to the fields that
fix shape and memory. Parameter counts are published ones: what is computed from the config must
agree with them, and is never written here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ftplan.catalog.shelf import Shelf, canonical
from ftplan.dataclass import dataclass

__all__ = ["MODELS", "ModelMatch", "ModelRow", "find_model", "resolve_model", "search_models"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelRow:
    """One released model shape."""

    name: str
    """Family and size (`llama-3.1-8b`)."""
    family: str
    """What it is listed under (`llama-3.1`)."""
    hub_ids: tuple[str, ...]
    """Hub ids with this shape, the original first: tunes and mirrors included."""
    aliases: tuple[str, ...]
    """Usual spellings."""
    config: Mapping[str, Any]
    """Fields of `config.json` that fix shape and memory."""
    total_params: int | None
    """Published exact count, where there is one."""
    published_params_approx: str | None = None
    """Published rounded count as printed (`7.62e9`), where there is no exact one."""
    source: str
    """Where the config comes from."""
    date: str
    """When the row was last checked."""
    checked: tuple[str, ...] = ()
    """Independent places that give the same shape."""
    notes: str = ""
    """What a reader of the row must know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMatch:
    """A model found for a name, and how."""

    row: ModelRow
    how: Literal["name", "alias", "hub-id", "file-name", "normalised"]
    """`file-name`: the last part of a path or of another owner's hub id. `normalised`: only after
    the endings in ``dropped`` were taken off."""
    dropped: tuple[str, ...] = ()
    """Endings taken off, last first (`bnb-4bit`, `instruct`): they name a storage format or a
    tune, never a size."""


# Path components that name no model: Meta's checkpoints lie in a folder "original", and trainers
# save under output/MODEL/v0-DATE/checkpoint-N or saves/MODEL/METHOD/STAGE.
_SKIPPED = re.compile(
    r"|\.|original|checkpoint-.*|v(?:\d+|x)-.*|epoch[-_]?\d+|full|freeze|q?lora|oft|sft|pt|rm|dpo|kto|ppo",
    re.IGNORECASE,
)

# Endings that say how the weights are stored or what they were tuned for. None of them changes
# the shape; a size, a version or a date is never taken off. Most names need no such search, so
# the pattern is compiled when one does.
_ENDINGS = (
    r"-(unsloth|(?:unsloth-)?bnb-(?:4|8)bit|bnb-(?:nf4|fp4|int8)(?:-bf16)?|(?:4|8|16)-?bits?"
    r"|gptq(?:-int[2348]|-[2348]bit)?(?:-128g)?|awq(?:-int4|-4bit)?|int[48]|fp8"
    r"|(?:quantized\.)?w[48]a(?:8|16)"
    r"|fp8-dynamic|fp8-block|nvfp4|mxfp4|nf4|fp4|dynamic|quantized|marlin|hqq|gguf|ggml|exl2|mlx"
    r"|bf16|fp16|fp32|f16|f32|safetensors|sharded|hf|transformers"
    r"|instruct|chat|it|base|pt|sft|dpo|orpo|kto|rlhf|ppo|grpo|thinking|reasoning|lora|qlora"
    r"|original|merged|latest|v1\.0)$"
)


def _row(row: Mapping[str, Any]) -> ModelRow:
    return ModelRow(
        name=row["name"],
        family=row["family"],
        hub_ids=tuple(row["hub_ids"]),
        aliases=tuple(row["aliases"]),
        config=row["config"],
        total_params=row["total_params"],
        published_params_approx=row.get("published_params_approx"),
        source=row["source"],
        date=row["date"],
        checked=tuple(row.get("checked", ())),
        notes=row.get("notes", ""),
    )


def _file_names(row: ModelRow) -> Iterable[str]:
    return (hub_id.rsplit("/", 1)[-1] for hub_id in row.hub_ids)


MODELS: Shelf[ModelRow] = Shelf(
    "model",
    "models",
    "models.json",
    _row,
    ids=lambda row: row.hub_ids,
    spellings=_file_names,
    otherwise="; a finetuned model has the shape of the one it was made from: pass --model with "
    "that name, or --config with its config.json",
)
"""All models."""


def resolve_model(name: str) -> ModelMatch:
    """The model that ``name`` means, and how it was found.

    Tried in turn: the whole name against names, aliases and hub ids (letter case, `_` and `-` do
    not matter); its last two and its last path component (`checkpoints/google/gemma-7b`,
    `/tmp/gemma-7b/`, another owner's copy); the last component without endings that name a
    storage format or a tune. Sizes, versions and dates are never guessed.

    Raises ``UnknownNameError`` with suggestions, or ``AmbiguousNameError`` with the candidates.
    """
    parts = [part for part in name.strip().replace("\\", "/").split("/") if part != "."]
    cached = [part for part in parts if part.startswith("models--")]
    if cached:  # a folder of the hub's cache, snapshots and all
        parts = cached[-1].split("--")[1:]
    while parts and _SKIPPED.fullmatch(parts[-1]):
        parts.pop()
    if len(parts) > 1 and (found := MODELS.lookup("/".join(parts[-2:]))):
        return ModelMatch(row=MODELS.only(name, found), how="hub-id")
    last = canonical(parts[-1]) if parts else ""
    found = MODELS.lookup(last)
    if found:
        row = MODELS.only(name, found)
        return ModelMatch(row=row, how=_how(row, last, alone=len(parts) == 1))
    dropped: list[str] = []
    while match := re.search(_ENDINGS, last):
        dropped.append(match[1])
        last = last[: match.start()]
        found = MODELS.lookup(last)
        if found:
            return ModelMatch(
                row=MODELS.only(name, found), how="normalised", dropped=tuple(dropped)
            )
    return ModelMatch(row=MODELS.only(name, ()), how="normalised")


def _how(row: ModelRow, key: str, *, alone: bool) -> Literal["name", "alias", "file-name"]:
    if not alone:
        return "file-name"
    if key == canonical(row.name):
        return "name"
    return "alias" if key in (canonical(alias) for alias in row.aliases) else "file-name"


def find_model(name: str) -> ModelRow:
    """The model that ``name`` means: :func:`resolve_model` without how it was found."""
    return resolve_model(name).row


def search_models(query: str = "") -> tuple[ModelRow, ...]:
    """Models whose name, aliases or hub ids hold every word of ``query``."""
    return MODELS.search(query)
