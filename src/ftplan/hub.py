"""The Hugging Face hub, asked only on request (``--hub``, extra ``hub``).

Two small things are fetched for a model that is not in the catalogue: its config.json, and the
headers of its safetensors files (names, shapes, dtypes). No weights and no code are downloaded,
and nothing is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftplan.errors import InputError, MissingExtraError

__all__ = ["fetch_model"]


def fetch_model(name: str, folder: Path) -> Path:
    """Make ``folder`` a model folder without weights: config.json and the files' headers.

    Raises MissingExtraError without the extra, InputError when the hub has no such model or cannot
    be reached; a token of the hub's own command line is used where there is one.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtraError("hub", "asking the hub for a model") from None
    try:
        got = huggingface_hub.hf_hub_download(name, "config.json")
        text = Path(got).read_text(encoding="utf-8")
        config: Any = json.loads(text)
    except Exception as error:  # many kinds: no such model, gated, no network, not JSON
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"the hub gave no config.json for {name!r}: {first}",
            remedy="check the name, log in for a gated model (hf auth login), or pass --config",
        ) from None
    if not isinstance(config, dict):
        raise InputError(f"config.json of {name!r} is not an object", remedy="pass --config")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text, encoding="utf-8")
    headers = _headers(huggingface_hub, name)
    if headers:
        (folder / "model.safetensors").write_bytes(_header_only(headers))
    return folder


def _headers(hub: Any, name: str) -> dict[str, Any]:
    """Every tensor that the repository's safetensors files declare; none where it has none."""
    try:
        metadata = hub.get_safetensors_metadata(name)
        return {
            tensor: {"dtype": str(info.dtype), "shape": list(info.shape), "data_offsets": [0, 0]}
            for file in metadata.files_metadata.values()
            for tensor, info in file.tensors.items()
        }
    except Exception:  # weights in another format, or none: config.json alone has to do
        return {}


def _header_only(headers: dict[str, Any]) -> bytes:
    """A safetensors file that ends after its header, which is all that is read of one."""
    header = json.dumps(headers).encode("utf-8")
    return len(header).to_bytes(8, "little") + header
