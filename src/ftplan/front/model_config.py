"""A model's config.json, read strictly: what it cannot say is refused, nothing it names is run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftplan.errors import FtplanError, InputError, Location
from ftplan.front.folder import reconciled
from ftplan.memory.families import build, model_types
from ftplan.report import Finding

__all__ = ["read_config", "read_model"]


def read_config(path: Path) -> Mapping[str, Any]:
    """A config.json, or the one in a model folder. Nothing it names is opened or run."""
    file = path / "config.json" if path.is_dir() else path
    where = Location(file=str(file))
    try:
        if file.exists() and not file.is_file():
            raise InputError(f"{file} is not a regular file")
        if file.exists() and file.stat().st_size > MAX_CONFIG_BYTES:
            raise InputError(f"{file} has more than {MAX_CONFIG_BYTES // 2**20} MiB")
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is no text file'}",
            remedy="pass the path of a Hugging Face config.json or of a folder that holds one",
        ) from None
    try:
        config = json.loads(text, parse_constant=_number, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        where = replace(where, line=error.lineno, column=error.colno)
        raise InputError(f"not JSON: {error.msg}", location=where) from None
    except RecursionError:
        raise InputError("it is nested too deep", location=where) from None
    except _BadConfigError as error:
        raise InputError(str(error), location=where) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(
            f"{file} has no model_type", remedy="pass the config.json that lies beside the weights"
        )
    if config["model_type"] in model_types():  # another one is refused by its name
        _check_sizes(config, where)
    return config


MAX_CONFIG_BYTES = 16 * 2**20
_HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model", "dim", "model_dim")
_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip
_LAYER_LISTS = ("layers_block_type", "layer_types")
_VOCABULARY = ("vocab_size", "padded_vocab_size")
_SIZES = (
    *_HIDDEN, *_LAYERS, *_VOCABULARY, "num_decoder_layers", "intermediate_size", "ffn_dim",
    "n_inner", "d_ff", "num_attention_heads", "n_head", "n_heads", "num_heads", "head_dim",
    "num_key_value_heads", "num_local_experts", "n_routed_experts", "moe_intermediate_size",
)  # fmt: skip
_LARGEST = {**dict.fromkeys(_LAYERS, 10_000), "num_decoder_layers": 10_000}


class _BadConfigError(Exception):
    """What a config.json cannot say."""


def _number(text: str) -> float:
    """Limits may be infinite (Mamba 2's ``time_step_limit``); no size is."""
    if text == "NaN":
        raise _BadConfigError("NaN is no size")
    return float(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise _BadConfigError(f"the key {key!r} is given twice")
        content[key] = value
    return content


def _check_sizes(config: Mapping[str, Any], where: Location) -> None:
    """Sizes are whole numbers above zero, and a model without parts of its own has all of them."""
    for key in _SIZES:
        value = config.get(key)
        for number in value if isinstance(value, list) else [value]:
            most = _LARGEST.get(key, 10**8)
            least = 0 if "experts" in key else 1
            if number is not None and (type(number) is not int or not least <= number <= most):
                raise InputError(
                    f"{key} is {number!r}, it must be a whole number from {least} to {most:,}",
                    location=where,
                )
    if any(isinstance(value, dict) and key.endswith("_config") for key, value in config.items()):
        return  # the parts have sizes of their own, or their class's
    for names in (_HIDDEN, (*_LAYERS, *_LAYER_LISTS), _VOCABULARY):
        if not any(config.get(name) for name in names):
            raise InputError(
                f"it has no {names[0]}",
                location=where,
                remedy="pass the config.json that lies beside the weights, or --params for the "
                "textbook's sums",
            )


def read_model(path: Path) -> tuple[Mapping[str, Any], tuple[Finding, ...]]:
    """The config at ``path``, held against the weight files beside it when it is a folder."""
    config = read_config(path)
    try:
        build(config)
    except FtplanError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{path} does not describe a {config['model_type']} model"
            + (f": {reason}" if reason else ""),
            remedy="pass the config.json that lies beside the weights",
        ) from error
    return reconciled(config, path) if path.is_dir() else (config, ())
