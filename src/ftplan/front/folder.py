"""A model folder: config.json held against what its weight files declare.

Part of the library's front. The headers are the truth: where they disagree with config.json, the
sizes of config.json are put right as far as one of its numbers explains the difference, and a
finding says what was different.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ftplan.errors import FtplanError, Location
from ftplan.files.weights import StoredTensor, read_headers
from ftplan.memory.families import build
from ftplan.report import Finding

__all__ = ["reconciled"]

Shapes = Mapping[str, tuple[int, ...]]

FLOATS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
WORDS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
BUFFERS = re.compile(
    r"(inv_freq|masked_bias|position_ids|\.(attn|attention)\.bias|cos_cached|sin_cached)$"
)
"""What older checkpoints hold beside weights."""
EDITS = 4
"""How many numbers of config.json may be put right."""


def reconciled(
    config: Mapping[str, Any], folder: Path
) -> tuple[Mapping[str, Any], tuple[Finding, ...]]:
    """The config as the weight files of ``folder`` have it, and a finding for each difference.

    Without weight files, or for a model that is not modelled, the config as it is.
    """
    stored = read_headers(folder)
    if not stored:
        return config, ()
    where = Location(file=str(folder / "config.json"))
    config, findings = _dtype(config, stored, where)
    packed = any(t.dtype not in FLOATS for t in stored.values())
    if packed or "quantization_config" in config:
        return config, findings  # packed values have shapes of their own
    shapes = {name: t.shape for name, t in stored.items() if not BUFFERS.search(name)}
    differences = _differences(config, shapes)
    if not differences:
        return config, findings
    fixed, changes = _corrected(config, shapes, differences)
    return fixed, (*findings, _finding(differences, changes, _differences(fixed, shapes), where))


def _dtype(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], where: Location
) -> tuple[Mapping[str, Any], tuple[Finding, ...]]:
    """The dtype that most of the weights have."""
    counted: Counter[str] = Counter()
    for tensor in stored.values():
        if tensor.dtype in FLOATS:
            counted[FLOATS[tensor.dtype]] += prod(tensor.shape)
    if not counted:
        return config, ()
    found = counted.most_common(1)[0][0]
    given = config.get("dtype") or config.get("torch_dtype")
    said = WORDS.get(str(given).removeprefix("torch."), given)
    if found == said:
        return config, ()
    changed = {**config, "dtype": found}
    if given is None:
        return changed, ()
    return changed, (
        Finding(
            code="MEM002",
            severity="warning",
            message=f"the weights are stored in {found}, config.json says {said}",
            location=where,
            help=f"the sums use {found}; --dtype {said} asks for the other one",
        ),
    )


def _described(config: Mapping[str, Any]) -> tuple[Shapes, set[str]] | None:
    """The weights that a config describes, and names that are another weight's."""
    try:
        network = build(config)
        return {name: p.shape for name, p in network.all_parameters()}, set(network.tied)
    except (FtplanError, ArithmeticError, AssertionError, LookupError, TypeError, ValueError):
        return None  # it is refused where it is used


def _core(name: str) -> str:
    """A name without what wrappers put before it: from the layer's number on, or the last two."""
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] - 1 :] if numbers and numbers[0] else parts[-2:])


def _layer(name: str) -> str:
    found = re.match(r".*?\d+(?=\.)", _core(name))
    return found.group() if found else _core(name)


def _differences(config: Mapping[str, Any], stored: Shapes) -> dict[str, tuple[Any, Any]]:
    """By tensor (or by layer, where names differ): what is stored and what is described."""
    described = _described(config)
    if described is None:
        return {}
    expected, tied = described
    aliases = {_core(name) for name in tied}
    has = _by_core({n: s for n, s in stored.items() if _core(n) not in aliases})
    wants = _by_core(expected)
    differences: dict[str, tuple[Any, Any]] = {}
    for core in sorted(has.keys() & wants.keys()):
        if has[core] != wants[core]:
            differences[core] = (has[core], wants[core])
    # what has no counterpart may be stored under another name, as experts one by one are
    left = _by_layer(stored, has.keys() - wants.keys())
    lacking = _by_layer(expected, wants.keys() - has.keys())
    for layer in sorted(left.keys() | lacking.keys()):
        if left[layer] != lacking[layer]:
            differences[layer] = (left[layer], lacking[layer])
    return differences


def _by_core(shapes: Shapes) -> dict[str, list[tuple[int, ...]]]:
    grouped: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        grouped.setdefault(_core(name), []).append(shape)
    return {core: sorted(found) for core, found in grouped.items()}


def _by_layer(shapes: Shapes, cores: Any) -> Counter[str]:
    counted: Counter[str] = Counter()
    for name, shape in shapes.items():
        if _core(name) in cores:
            counted[_layer(name)] += prod(shape)
    return counted


def _weight(differences: Mapping[str, tuple[Any, Any]]) -> int:
    """How far apart the two are, in values; a tensor that differs counts for something too."""

    def count(value: Any) -> int:
        return value if isinstance(value, int) else sum(prod(shape) for shape in value)

    return sum(abs(count(a) - count(b)) + 1 for a, b in differences.values())


def _corrected(
    config: Mapping[str, Any], stored: Shapes, differences: Mapping[str, tuple[Any, Any]]
) -> tuple[Mapping[str, Any], dict[str, tuple[Any, Any]]]:
    """The config with the numbers changed that explain most of the differences."""
    changes: dict[str, tuple[Any, Any]] = {}
    for _ in range(EDITS):
        best, gain = None, _weight(differences)
        for key, value in _edits(config, stored, differences):
            after = _differences({**config, key: value}, stored)
            if _described({**config, key: value}) is not None and _weight(after) < gain:
                best, gain = (key, value), _weight(after)
        if best is None:
            break
        key, value = best
        changes[key] = (config.get(key), value)
        config = {**config, key: value}
        differences = _differences(config, stored)
    return config, changes


def _edits(
    config: Mapping[str, Any], stored: Shapes, differences: Mapping[str, tuple[Any, Any]]
) -> Iterator[tuple[str, Any]]:
    """Numbers of config.json that could be meant, and what the files would have them be."""
    pairs = {
        (was, now)
        for has, wants in differences.values()
        if isinstance(has, list) and len(has) == len(wants)
        for one, other in zip(has, wants, strict=True)
        if len(one) == len(other)
        for now, was in zip(one, other, strict=True)
        if now != was
    }
    numbers = {k: v for k, v in config.items() if type(v) is int and v > 0}
    for was, now in sorted(pairs):
        for key, value in numbers.items():
            if value == was:
                yield key, now
            elif value * now % was == 0 and key.startswith("num_"):
                yield key, value * now // was  # heads x head size
    layers = {int(found.group(1)) for n in stored if (found := re.search(r"\.(\d+)\.", n))}
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if key in config and layers:
            yield key, max(layers) + 1
    yield "tie_word_embeddings", not config.get("tie_word_embeddings", False)


def _finding(
    differences: Mapping[str, tuple[Any, Any]],
    changes: Mapping[str, tuple[Any, Any]],
    rest: Mapping[str, tuple[Any, Any]],
    where: Location,
) -> Finding:
    name, (has, wants) = next(iter(differences.items()))
    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
    if changes:
        told = ", ".join(f"{key} {now} instead of {was}" for key, (was, now) in changes.items())
        help = f"the sums follow the files: {told}"
    else:
        help = "the sums follow config.json: no one number of it explains the files"
    if changes and rest:
        help += f"; {len(rest)} tensors still differ"
    return Finding(
        code="MEM002",
        severity="warning",
        message=f"the weight files and config.json disagree: {name} is {_told(has)} in the files "
        f"and {_told(wants)} by config.json{more}",
        location=where,
        help=help,
    )


def _told(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,} values" if value else "missing"
    return " and ".join(" x ".join(map(str, shape)) for shape in value)
