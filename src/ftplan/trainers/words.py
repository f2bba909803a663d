"""The trainers' words for the same things, as one vocabulary: dtypes, attention, optimizers,
adapter targets, model names. The tables are ``data/words.json``; nothing here guesses.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Literal

from ftplan.catalog.shelf import read_data

__all__ = [
    "attention",
    "dtype",
    "model_name",
    "optimizer_name",
    "own_names",
    "peft_default_targets",
    "targets",
    "torchtune_model",
]

Attention = Literal["eager", "sdpa", "flash"]

ALL_LINEAR = "all-linear"
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven projections of a Llama block."""


@cache
def _words() -> dict[str, Any]:
    data: dict[str, Any] = read_data("words.json", "ftplan.trainers")
    return data


def dtype(name: str | None) -> str | None:
    """``bf16`` for ``torch.bfloat16``; None for `auto` and for what is no dtype."""
    if name is None:
        return None
    found: str | None = _words()["dtypes"].get(name.lower().removeprefix("torch."))
    return found


def attention(name: str | None) -> Attention | None:
    """``eager``, ``sdpa`` or ``flash`` for a trainer's name; None when it is not known."""
    if name is None:
        return None
    name = name.lower()
    found: Attention | None = _words()["attention"].get(name)
    if found is None and "flash" in name:
        return "flash"
    return found


def optimizer_name(name: str | None) -> tuple[str | None, bool]:
    """The name in transformers' list for any trainer's spelling, and whether it is a known one.

    ``torch.optim.AdamW`` becomes ``adamw_torch``, ``bitsandbytes.optim.PagedAdamW8bit``
    ``paged_adamw_8bit``.
    """
    if name is None:
        return None, True
    words = _words()["optimizers"]
    key = name.strip()
    for candidate in (key, key.lower(), key.rsplit(".", 1)[-1].lower()):
        if candidate in words:
            return words[candidate], True
        if candidate in words.values():
            return candidate, True
    return key.lower(), False


def targets(names: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
    """Adapter targets as a plan writes them: names, one regular expression, or `all-linear`."""
    if names is None:
        return None
    if isinstance(names, str):
        names = (names,)
    if not names:
        return None
    if len(names) == 1:
        only = names[0]
        if only.lower() in ("all-linear", "all_linear", "all"):
            return ALL_LINEAR
        return only if is_pattern(only) else (only,)
    if "all-linear" in names:
        return ALL_LINEAR
    if any(is_pattern(name) for name in names):
        return "|".join(f"(?:{name})" for name in names)
    return tuple(names)


def is_pattern(name: str) -> bool:
    """Whether a target is a regular expression and not a module's name."""
    return bool(re.search(r"[\\()|*?\[\]^$+]", name))


def glob_pattern(names: tuple[str, ...]) -> tuple[str, ...] | str:
    """Targets given as shell patterns (``*_proj``) as one regular expression."""
    if names in (("*",), ("*_proj",)):
        return ALL_LINEAR if names == ("*",) else r".*_proj"
    if all(not is_pattern(name) for name in names):
        return names
    parts = [re.escape(name).replace(r"\*", ".*").replace(r"\?", ".") for name in names]
    return parts[0] if len(parts) == 1 else "|".join(f"(?:{part})" for part in parts)


def peft_default_targets(model: str | None) -> tuple[tuple[str, ...] | str, str]:
    """What PEFT adapts when no target is named, by the model's family, and the source."""
    words = _words()["peft_defaults"]
    name = (model or "").lower()
    for part, names in words["families"]:
        if part in name:
            return (tuple(names) if isinstance(names, list) else names), words["source"]
    return tuple(words["other"]), words["source"]


def own_names(model: str | None, names: tuple[str, ...]) -> tuple[str, ...]:
    """Llama's module names as the model's own family calls them (``qkv_proj``), each once.

    litgpt and torchtune name the parts of every network alike; a plan names modules of the model.
    """
    name = (model or "").lower()
    for part, table in _words()["own_names"]["families"]:
        if part in name:
            return tuple(dict.fromkeys(table.get(one, one) for one in names))
    return names


def model_name(name: str | None) -> str | None:
    """A model's name as written: a hub id, or the tail of a local path."""
    if name is None:
        return None
    name = name.strip().rstrip("/").removeprefix("hf://").removeprefix("models--")
    if not name or name in (".", ".."):
        return None
    local = name.startswith(("/", "./", "../", "~", "checkpoints/")) or name.count("/") > 1
    if not local:
        return name
    parts = [part for part in name.split("/") if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else None


def torchtune_model(component: str | None) -> tuple[str | None, str | None]:
    """Hub id and method prefix (``lora``, ``qlora`` or None) of a torchtune model builder.

    ``torchtune.models.llama3_1.qlora_llama3_1_8b`` is ``meta-llama/Llama-3.1-8B`` and ``qlora``.
    """
    if component is None:
        return None, None
    builder = component.rsplit(".", 1)[-1]
    method = None
    for prefix in ("qlora", "lora"):
        if builder.startswith(prefix + "_"):
            method, builder = prefix, builder[len(prefix) + 1 :]
    words = _words()
    found: str | None = words["torchtune_models"].get(builder)
    return found or words["torchtune_other_names"].get(builder), method


def litgpt_model(name: str) -> str:
    """Hub id of a litgpt model name (``tiny-llama-1.1b``); the name itself when unknown."""
    found: str = _words()["litgpt_models"].get(name, name)
    return found


def torchtune_component(name: str, prefix: str) -> str | None:
    """The full name of the builder for a hub id, ``lora_`` in front; None when there is none."""
    words: dict[str, str] = _words()["torchtune_models"]
    for builder, hub in words.items():
        if hub.lower() == name.lower():
            package = next(p for p in _PACKAGES if builder.startswith(p))
            return f"torchtune.models.{package}.{prefix}{builder}"
    return None


_PACKAGES = (
    "llama3_2_vision", "llama3_1", "llama3_2", "llama3_3", "llama3", "llama4", "llama2", "gemma2",
    "gemma", "mistral", "phi3", "phi4", "qwen2_5", "qwen2", "qwen3", "smol",
)  # fmt: skip
"""torchtune's model packages, the longer names first."""
