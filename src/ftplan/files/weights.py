"""The headers of a model folder's safetensors files: names, shapes and dtypes, no weights.

A file starts with eight bytes, the length of its header, little-endian; the header is JSON, a
mapping from a tensor's name to its dtype, shape and place
(https://github.com/huggingface/safetensors#format). Nothing behind the header is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.errors import InputError, Location

__all__ = ["StoredTensor", "read_headers"]

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_OTHERS = ("adapter", "consolidated", "optimizer", "training")
"""Beginnings of files that are not the model in transformers' layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as a file declares it."""

    dtype: str
    """The format's word: `BF16`, `F32`, `U8` ..."""
    shape: tuple[int, ...]
    file: str
    """Name of the file in the folder."""


def read_headers(folder: Path) -> Mapping[str, StoredTensor]:
    """Every tensor that the model files of ``folder`` declare; empty where there are none.

    Raises :class:`ftplan.errors.InputError` for a file that is no safetensors file, and for an
    index that names files which are not there while others are.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _model_files(folder):
        tensors.update(_header(path))
    return tensors


def _model_files(folder: Path) -> list[Path]:
    found = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = _indexed(index)
        missing = [name for name in named if name not in found]
        if missing and len(missing) < len(named):
            raise InputError(
                f"{len(missing)} of {len(named)} files are not there: {missing[0]}",
                location=Location(file=str(index)),
                remedy="finish the download, or pass the config.json itself",
            )
        return [] if missing else [found[name] for name in named]
    if "model.safetensors" in found:
        return [found["model.safetensors"]]
    return [path for name, path in found.items() if not name.startswith(_OTHERS)]


def _indexed(index: Path) -> list[str]:
    where = Location(file=str(index))
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the index cannot be read: {error}", location=where) from None
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(v, str) for v in weights.values()):
        raise InputError("the index has no weight_map of names", location=where)
    return sorted(set(weights.values()))


def _header(path: Path) -> dict[str, StoredTensor]:
    def refused(why: str) -> InputError:
        return InputError(
            f"this is no safetensors file: {why}",
            location=Location(file=str(path)),
            remedy="fetch it again, or pass the config.json itself",
        )

    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise refused("it has no header of the length that it declares")
            content = json.loads(stream.read(length).decode("utf-8"))
    except OSError as error:
        raise refused(f"it cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError):
        raise refused("its header is not JSON") from None
    if not isinstance(content, dict):
        raise refused("its header is no mapping")
    tensors = {}
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        if not _is_tensor(entry):
            raise refused(f"tensor {name!r} has no dtype and shape")
        tensors[name] = StoredTensor(
            dtype=entry["dtype"], shape=tuple(entry["shape"]), file=path.name
        )
    return tensors


def _is_tensor(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and isinstance(entry.get("shape"), list)
        and all(type(extent) is int and extent >= 0 for extent in entry["shape"])
    )
