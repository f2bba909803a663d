"""What an example is: a conversation, a prompt and its answer, a pair, text, token ids.

Told by its keys, as the trainers do: OpenAI's and ShareGPT's conversations, Alpaca's fields,
TRL's pairs and labels, LLaMA-Factory's variants of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.fitting import DataFormat

__all__ = ["Example", "understood"]

_PROMPTS = ("prompt", "instruction", "question", "query", "inputs", "problem", "source")
_TARGETS = ("completion", "output", "response", "answer", "targets", "solution", "target")
_TEXTS = ("text", "content", "body")
_CHATS = ("messages", "conversations", "conversation", "dialog", "chat")
_ANSWERS = ("assistant", "gpt", "model", "bot", "chatgpt")
_LABELS = ("label", "kto_tag")
_MEDIA = ("image", "image_url", "video", "audio", "input_audio")
_MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")


@dataclass(slots=True)
class Example:
    """One example, as texts to be counted."""

    format: DataFormat
    sequences: list[list[str]]
    """Texts of each sequence: one, or chosen and rejected with the prompt before each."""
    is_empty: bool = False
    """There is nothing to learn."""
    messages: int = 0
    """Around each of them a template puts tokens of its own."""
    token_ids: int | None = None
    """How many there are, where the example is tokenized already."""
    has_media: bool = False
    """It holds images, video or sound, whose tokens are not counted."""


@dataclass(slots=True)
class _Chat:
    texts: list[str] = field(default_factory=list)
    says: bool = False
    """Some answer says something."""
    media: bool = False


def understood(row: Any) -> Example:
    """The example that a row is."""
    if isinstance(row, str):
        return Example("text", [[row]], not row.strip())
    if not isinstance(row, Mapping):
        return Example("unknown", [[_text(row)]])
    example = _of_mapping(row)
    example.has_media |= any(row.get(key) for key in _MEDIA_KEYS)
    return example


def _of_mapping(row: Mapping[str, Any]) -> Example:
    ids = row.get("input_ids")
    if isinstance(ids, list):
        return Example("token ids", [[str(ids)]], not ids, token_ids=len(ids))
    chat = _first(row, _CHATS)
    talk = _chat(row[chat]) if chat is not None else _Chat()
    if row.get("tools"):
        talk.texts.append(_text(row["tools"]))
    prompt = [*_before(row), *talk.texts]
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return _pair(prompt, row["chosen"], row["rejected"], talk.media)
    unpaired = any(type(row.get(key)) is bool or row.get(key) in (0, 1) for key in _LABELS)
    if chat is not None:
        name: DataFormat = "unpaired preference" if "kto_tag" in row else "chat"
        return Example(name, [prompt], not talk.says, len(talk.texts), has_media=talk.media)
    target = _first(row, _TARGETS)
    if target is not None and prompt:
        answer = _chat_or_text(row[target])
        name = "unpaired preference" if unpaired else "prompt and completion"
        texts = [*prompt, *answer.texts]
        return Example(name, [texts], not "".join(answer.texts).strip(), has_media=answer.media)
    text = _first(row, _TEXTS)
    if text is not None:
        words = _text(row[text])
        return Example("text", [[words]], not words.strip())
    if prompt:  # what reinforcement finetuning learns from
        return Example("prompts alone", [prompt])
    return Example("unknown", [[_text(value) for value in row.values()]])


def _before(row: Mapping[str, Any]) -> list[str]:
    """What stands before the answer: the system's words, earlier turns, the prompt, its input."""
    texts = [_text(row["system"])] if row.get("system") else []
    history = row.get("history")
    if isinstance(history, list):
        texts += [_text(turn) for pair in history if isinstance(pair, list) for turn in pair]
    prompt = _first(row, _PROMPTS)
    if prompt is not None:
        texts += _chat_or_text(row[prompt]).texts
    return [*texts, _text(row["input"])] if row.get("input") is not None else texts


def _pair(prompt: list[str], good: Any, bad: Any, media: bool) -> Example:
    chosen, rejected = _chat_or_text(good), _chat_or_text(bad)
    same = chosen.texts == rejected.texts or not "".join(chosen.texts).strip()
    sequences = [[*prompt, *chosen.texts], [*prompt, *rejected.texts]]
    return Example(
        "preference pairs", sequences, same, len(chosen.texts),
        has_media=media or chosen.media or rejected.media,
    )  # fmt: skip


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _chat_or_text(value: Any) -> _Chat:
    return _chat(value) if isinstance(value, list) else _Chat([_text(value)])


def _chat(messages: Any) -> _Chat:
    """A conversation's texts."""
    talk = _Chat()
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, Mapping):
            continue
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            talk.media |= any(_is_media(part) for part in content)
        words = _text(content)
        for key in ("reasoning_content", "thinking", "tool_calls"):
            if message.get(key):
                words += _text(message[key])
        talk.texts.append(words)
        role = str(message.get("role", message.get("from", ""))).lower()
        talk.says = talk.says or (role in _ANSWERS and bool(words.strip()))
    return talk


def _is_media(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _MEDIA


def _text(value: Any) -> str:
    """The words of a value: a string, the text parts of a list of parts, or JSON as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_text(part) for part in value)
    if isinstance(value, Mapping):
        if _is_media(value):
            return ""
        for key in ("text", "content", "value"):
            if key in value:
                return _text(value[key])
        return json.dumps(value, ensure_ascii=False) if value else ""
    return "" if value is None else str(value)
