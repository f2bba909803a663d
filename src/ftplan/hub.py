"""The Hugging Face hub, asked only on request (``--hub``, extra ``hub``).

One small file is fetched for a model that is not in the catalogue, its config.json. No weights
and no code are downloaded, and nothing is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftplan.errors import InputError, MissingExtraError

__all__ = ["fetch_model"]


def fetch_model(name: str, folder: Path) -> Path:
    """Write ``config.json`` of a hub model into ``folder`` and give its path.

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
    path = folder / "config.json"
    path.write_text(text, encoding="utf-8")
    return path
