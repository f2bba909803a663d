"""Normalising what tools write for a verdict, a score, a text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ftplan.evals.document import python_literal
from ftplan.results import Check

__all__ = [
    "all_crashed",
    "as_contexts",
    "as_dict",
    "as_list",
    "as_number",
    "as_text",
    "as_verdict",
    "decide",
    "metric_key",
    "reasons",
    "snake",
]

Json = Any

_YES = {"true", "yes", "y", "pass", "passed", "success", "correct", "c", "ok", "1", "1.0"}
_NO = {"false", "no", "n", "fail", "failed", "failure", "incorrect", "wrong", "i", "0", "0.0"}
_MISSING = {"", "nan", "null", "none", "n/a", "na", "-"}


def as_dict(value: Json) -> dict[str, Json]:
    """The mapping itself, or an empty one: a missing branch reads as empty."""
    return value if isinstance(value, dict) else {}


def as_list(value: Json) -> list[Json]:
    """The list itself, or an empty one."""
    return list(value) if isinstance(value, list | tuple) else []


def as_number(value: Json) -> float | None:
    """A finite score, or None. A bool is 1 or 0; NaN and infinities are no score."""
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            value = float(value.strip())
        except ValueError:
            return None
    if isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            return None
        return number if math.isfinite(number) else None
    return None


def as_verdict(value: Json) -> bool | None:
    """Yes or no, as tools write it (bool, 0 and 1, `yes`, `PASS`, `C`), or None: no verdict."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return {1.0: True, 0.0: False}.get(value)
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _YES:
            return True
        if word in _NO:
            return False
    return None


def is_missing(value: Json) -> bool:
    """Nothing was written here: null, NaN, an empty cell."""
    if value is None:
        return True
    if isinstance(value, float):
        return math.isnan(value)
    return isinstance(value, str) and value.strip().lower() in _MISSING


def as_text(value: Json) -> str:
    """Text of a value for a person to read: chat messages as `role: text`, the rest as JSON."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list | tuple):
        if value and all(_is_message(each) for each in value):
            return _messages(value)
        if len(value) == 1 and isinstance(value[0], str):
            return _encodable(value[0])
        if value and all(_is_part(each) for each in value):
            return "\n".join(filter(None, (_part(each) for each in value)))
    if isinstance(value, dict):
        if _is_message(value):
            return _messages([value])
        if len(value) == 1 and isinstance(only := next(iter(value.values())), str):
            return _encodable(only)
    try:
        return _encodable(json.dumps(value, ensure_ascii=False, default=str))
    except (ValueError, RecursionError):
        return str(type(value).__name__)


def _encodable(text: str) -> str:
    """Half of a surrogate pair is legal in JSON, and can never be written out again."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _is_message(value: Json) -> bool:
    """A chat message of OpenAI's, Inspect's or LangChain's shape."""
    return isinstance(value, dict) and "content" in value and ("role" in value or "type" in value)


def _messages(messages: Iterable[dict[str, Json]]) -> str:
    spoken = [
        (as_text(each.get("role") or each.get("type")), as_text(each.get("content")))
        for each in messages
    ]
    if len(spoken) == 1:
        return spoken[0][1]
    return "\n".join(f"{role}: {text}" for role, text in spoken)


def _is_part(value: Json) -> bool:
    return isinstance(value, str) or (
        isinstance(value, dict) and isinstance(value.get("type"), str)
    )


def _part(value: Json) -> str:
    """One part of a message; a picture or a hidden thought is named, not printed."""
    if isinstance(value, str):
        return _encodable(value)
    for key in ("text", "output_text", "input_text"):
        if isinstance(value.get(key), str):
            return as_text(value[key])
    return f"[{as_text(value['type'])}]"


def as_contexts(value: Json) -> tuple[str, ...]:
    """Passages: a list of texts or documents, one text, or pandas' repr of a list."""
    if isinstance(value, str):
        value = python_literal(value)
    if is_missing(value):
        return ()
    if isinstance(value, list | tuple):
        return tuple(text for each in value if (text := _passage(each)))
    return (_passage(value),)


def _passage(value: Json) -> str:
    if isinstance(value, dict):
        for key in ("page_content", "content", "text", "doc_content", "document"):
            if isinstance(value.get(key), str):
                return as_text(value[key])
    return as_text(value)


def snake(name: str) -> str:
    """`actualOutput` -> `actual_output`: deepeval writes either, by version."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def snake_keys(value: Json) -> dict[str, Json]:
    """A mapping with its own keys (not those below) in snake case."""
    return {snake(str(key)): each for key, each in as_dict(value).items()}


def metric_key(name: str) -> str:
    """A metric's name for lookups: `Contextual Recall`, `ContextualRecallMetric` and
    `factual_correctness(mode=f1)` become `contextual_recall` and `factual_correctness`."""
    bare = re.sub(r"\s*\(\w+=[^)]*\)\s*", "", name)
    key = re.sub(r"[^a-z0-9@:]+", "_", snake(bare.strip())).strip("_")
    return re.sub(r"_(metric|v\d+)$", "", key)


def threshold_for(check_name: str, thresholds: Mapping[str, float]) -> float | None:
    """The user's threshold for a metric, by its name as shown or normalised."""
    if check_name in thresholds:
        return thresholds[check_name]
    wanted = metric_key(check_name)
    for name, threshold in thresholds.items():
        if metric_key(name) == wanted:
            return threshold
    return None


def reasons(checks: Iterable[Check]) -> str:
    """Why the failing checks fail, each reason once."""
    said = (each.reason for each in checks if each.passed is False and each.reason)
    return "; ".join(dict.fromkeys(said))


def all_crashed(checks: Iterable[Check]) -> str:
    """Why there is no verdict, where every check crashed; empty where one of them ran."""
    errors = [check.error for check in checks]
    return errors[0] if errors and all(errors) else ""


def decide(checks: Iterable[Check]) -> bool | None:
    """A row passes when some check decided and none said no; None when none decided."""
    verdicts = [check.passed for check in checks if check.decides and check.passed is not None]
    return all(verdicts) if verdicts else None
