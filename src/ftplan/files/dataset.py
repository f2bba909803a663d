"""Training data, read once from beginning to end: JSON Lines, a JSON array, CSV, or any of them
in gzip. Nothing is kept but counts and a small digest of each example, so a file may be larger
than memory.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from ftplan.errors import InputError, Location, MissingExtraError
from ftplan.fitting import DataFormat, DataSummary, Spread
from ftplan.report import Finding

__all__ = ["Tokens", "estimate_tokens", "read_dataset", "tokenizer_of"]

Tokens = Callable[[str], Spread]
"""Counts the tokens of a text."""
MOST_DIGESTS = 5_000_000
"""Examples whose digest is remembered to find copies: about 0.5 GB."""
WIDE = re.compile("[\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")
NARROW = re.compile("[^\x00-\x7f]")
RULE = "no tokenizer: 4 characters a token (3 to 5.5), wide scripts 0.8 tokens a character"
TEMPLATE = Spread(low=2, expected=5, high=9)
"""Tokens that a chat template puts around each message."""
CHUNK = 1 << 20


def estimate_tokens(text: str) -> Spread:
    """Tokens of a text without its tokenizer: by its characters and the script they are of."""
    wide = len(WIDE.findall(text)) if not text.isascii() else 0
    other = len(NARROW.findall(text)) - wide if not text.isascii() else 0
    plain = len(text) - wide - other
    return Spread(
        low=plain / 5.5 + other * 0.25 + wide * 0.45,
        expected=plain / 4 + other * 0.5 + wide * 0.8,
        high=plain / 3 + other * 1.0 + wide * 1.7,
    )


def tokenizer_of(path: Path) -> Tokens:
    """Exact counts by a ``tokenizer.json`` (or the folder that holds it).

    Needs the package `tokenizers`. Raises MissingExtraError without it, InputError for a file
    that it does not read.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingExtraError("data", "counting with a tokenizer") from None
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"there is no {file}",
            remedy="pass a tokenizer.json or the model's folder that holds it",
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise InputError(f"{file} is no tokenizer: {error}") from None

    def count(text: str) -> Spread:
        number = float(len(tokenizer.encode(text, add_special_tokens=False).ids))
        return Spread(low=number, expected=number, high=number)

    return count


# --- Examples -----------------------------------------------------------------------------------


class _Counted(io.RawIOBase):
    """A file that tells how far it was read."""

    def __init__(self, raw: Any, told: Callable[[int], None]) -> None:
        super().__init__()
        self._raw = raw
        self._told = told
        self.position = 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self.position += len(data)
        self._told(self.position)
        return len(data)


def _open(path: Path, told: Callable[[int], None]) -> io.TextIOWrapper:
    try:
        raw: Any = io.BufferedReader(_Counted(path.open("rb"), told), CHUNK)
    except OSError as error:
        raise InputError(
            f"cannot read the data: {error.strerror or error}", location=Location(file=str(path))
        ) from None
    if path.suffix == ".gz":
        raw = gzip.GzipFile(fileobj=raw)
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="")


_BINARY = {".parquet": "Parquet", ".arrow": "Arrow", ".bin": "tokenized", ".npy": "NumPy"}


def _examples(path: Path, told: Callable[[int], None]) -> Iterator[tuple[int, Any]]:
    """(line, value) of every example; a line that is no JSON has the value None."""
    inner = Path(path.stem) if path.suffix == ".gz" else path
    if inner.suffix in _BINARY:
        raise InputError(
            f"{_BINARY[inner.suffix]} files are not read",
            location=Location(file=str(path)),
            remedy="export it as JSON Lines: datasets.load_dataset(...).to_json('train.jsonl')",
        )
    with _open(path, told) as stream:
        if inner.suffix in (".csv", ".tsv"):
            csv.field_size_limit(1 << 30)
            delimiter = "\t" if inner.suffix == ".tsv" else ","
            reader = csv.DictReader(stream, delimiter=delimiter)
            for row in reader:
                yield reader.line_num, row
            return
        first, line = stream.read(1), 1
        while first and first.isspace():
            line += first == "\n"
            first = stream.read(1)
        if first == "[":
            yield from _array(stream)
            return
        yield from _lines(stream, first, line)


def _lines(stream: io.TextIOWrapper, first: str, start: int) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, start=start):
        text = first + line if number == start else line
        if not text.strip():
            continue
        try:
            yield number, json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            yield number, None


def _array(stream: io.TextIOWrapper) -> Iterator[tuple[int, Any]]:
    """Elements of one array, a chunk of text at a time."""
    decoder = json.JSONDecoder()
    buffer, number, ended = "", 0, False
    while True:
        buffer = buffer.lstrip(" \t\r\n,")
        if buffer.startswith("]"):
            return
        try:
            if not buffer:
                raise json.JSONDecodeError("more", buffer, 0)
            value, end = decoder.raw_decode(buffer)
            if end == len(buffer) and not ended:  # a number may go on in the next chunk
                raise json.JSONDecodeError("more", buffer, 0)
        except json.JSONDecodeError:
            more = stream.read(CHUNK)
            if not more:
                if buffer.strip():
                    yield number + 1, None
                return
            buffer += more
            ended = len(more) < CHUNK
            continue
        number += 1
        yield number, value
        buffer = buffer[end:]


# --- What an example is -------------------------------------------------------------------------

_PROMPTS = ("prompt", "instruction", "question", "query", "inputs", "problem", "source")
_TARGETS = ("completion", "output", "response", "answer", "targets", "solution", "target")
_TEXTS = ("text", "content", "body")
_CHATS = ("messages", "conversations", "conversation", "dialog", "chat")


@dataclass(slots=True)
class _Example:
    format: DataFormat
    texts: list[str]
    is_empty: bool
    """There is nothing to learn."""
    messages: int = 0
    pair: tuple[list[str], list[str]] | None = None
    """Chosen and rejected, each with the prompt: two sequences."""


def _text(value: Any) -> str:
    """The words of a message: a string, or the text parts of a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_text(part) for part in value)
    if isinstance(value, Mapping):
        for key in ("text", "content", "value"):
            if key in value:
                return _text(value[key])
        return json.dumps(value, ensure_ascii=False) if value else ""
    return "" if value is None else str(value)


_ANSWERS = ("assistant", "gpt", "model", "bot", "chatgpt")


def _chat(messages: Any) -> tuple[list[str], bool]:
    """Texts of a conversation, and whether no answer in it says anything."""
    texts: list[str] = []
    says = False
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, Mapping):
            continue
        words = _text(message.get("content", message.get("value")))
        calls = message.get("tool_calls")
        if calls:
            words += json.dumps(calls, ensure_ascii=False)
        texts.append(words)
        role = str(message.get("role", message.get("from", ""))).lower()
        says = says or (role in _ANSWERS and bool(words.strip()))
    return texts, not says


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _understood(row: Any) -> _Example:
    if isinstance(row, str):
        return _Example("text", [row], not row.strip())
    if not isinstance(row, Mapping):
        return _Example("unknown", [_text(row)], False)
    prompt = _text_or_chat(row.get(_first(row, _PROMPTS) or ""))
    if row.get("chosen") is not None and row.get("rejected") is not None:
        chosen, rejected = _text_or_chat(row["chosen"]), _text_or_chat(row["rejected"])
        same = chosen == rejected or not "".join(chosen).strip()
        pair = ([*prompt, *chosen], [*prompt, *rejected])
        return _Example("preference pairs", [*pair[0], *pair[1]], same, len(chosen), pair)
    chat = _first(row, _CHATS)
    if chat is not None:
        texts, empty = _chat(row[chat])
        return _Example("chat", texts, empty, len(texts))
    target = _first(row, _TARGETS)
    if target is not None and (prompt or row.get("input") is not None):
        answer = _text_or_chat(row[target])
        texts = [*prompt, _text(row.get("input")), *answer]
        unpaired = isinstance(row.get("label"), bool)
        name: DataFormat = "unpaired preference" if unpaired else "prompt and completion"
        return _Example(name, texts, not "".join(answer).strip())
    text = _first(row, _TEXTS)
    if text is not None:
        words = _text(row[text])
        return _Example("text", [words], not words.strip())
    if prompt:  # prompts alone: what GRPO learns from
        return _Example("text", prompt, False)
    return _Example("unknown", [_text(value) for value in row.values()], False)


def _text_or_chat(value: Any) -> list[str]:
    if isinstance(value, list):
        return _chat(value)[0]
    return [_text(value)] if value is not None else []


# --- Counting -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tally:
    count: Tokens
    lengths: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    low: float = 0.0
    expected: float = 0.0
    high: float = 0.0
    examples: int = 0
    longest: int = 0
    longest_line: int = 0
    fields: tuple[str, ...] = ()
    digests: set[bytes] = field(default_factory=set)
    duplicates: int = 0
    empty: int = 0
    first_empty: int | None = None
    unreadable: int = 0
    first_unreadable: int | None = None

    def add(self, line: int, row: Any) -> None:
        if row is None:
            self.unreadable += 1
            self.first_unreadable = self.first_unreadable or line
            return
        example = _understood(row)
        if not self.examples:
            self.fields = tuple(map(str, row)) if isinstance(row, Mapping) else ()
        self.examples += 1
        self.formats[example.format] += 1
        if example.is_empty:
            self.empty += 1
            self.first_empty = self.first_empty or line
        self._copy_of_another(example)
        sequences = example.pair or (example.texts,)
        for texts in sequences:
            self._length(line, texts, example.messages)

    def _length(self, line: int, texts: list[str], messages: int) -> None:
        spreads = [self.count(text) for text in texts if text]
        low = sum(s.low for s in spreads) + TEMPLATE.low * messages
        expected = sum(s.expected for s in spreads) + TEMPLATE.expected * messages + 1
        self.low += low
        self.expected += expected
        self.high += sum(s.high for s in spreads) + TEMPLATE.high * messages + 2
        length = max(1, round(expected))
        self.lengths[length] += 1
        if length > self.longest:
            self.longest, self.longest_line = length, line

    def _copy_of_another(self, example: _Example) -> None:
        digest = hashlib.blake2b("\x00".join(example.texts).encode(), digest_size=10).digest()
        if digest in self.digests:
            self.duplicates += 1
        elif len(self.digests) < MOST_DIGESTS:
            self.digests.add(digest)


def read_dataset(
    path: Path,
    *,
    seq_len: int | None = None,
    count: Tokens | None = None,
    counted_by: str = RULE,
    told: Callable[[int, int], None] | None = None,
    tool_version: str = "",
) -> DataSummary:
    """Read training data once and count it.

    ``seq_len`` is the length that truncation and packing are about (left out: one that no example
    exceeds). ``count`` counts tokens exactly; left out: :func:`estimate_tokens`. ``told`` hears
    (bytes read, bytes in all). Raises InputError for a file that cannot be read or holds nothing.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}", location=Location(file=str(path)))
    size = path.stat().st_size
    tally = _Tally(count or estimate_tokens)
    for line, row in _examples(path, lambda done: told(done, size) if told else None):
        tally.add(line, row)
    if not tally.examples:
        broken = f": {tally.unreadable} lines are no JSON" if tally.unreadable else ""
        raise InputError(
            f"there are no examples in it{broken}",
            location=Location(file=str(path), line=tally.first_unreadable),
            remedy='write one JSON object a line: {"messages": [...]} or {"text": "..."}',
        )
    return _summary(path, size, tally, seq_len, count is not None, counted_by, tool_version)


def _summary(
    path: Path,
    size: int,
    tally: _Tally,
    seq_len: int | None,
    is_exact: bool,
    counted_by: str,
    tool_version: str,
) -> DataSummary:
    covering = -(-tally.longest // 64) * 64
    length = seq_len or covering
    lengths = sorted(tally.lengths.items())
    sequences = sum(tally.lengths.values())
    total = sum(n * times for n, times in lengths)
    kept = sum(min(n, length) * times for n, times in lengths)
    bins = packed(tally.lengths, length)
    (main, _), *others = tally.formats.most_common()
    summary = DataSummary(
        file=str(path),
        bytes=size,
        examples=tally.examples,
        format=cast("DataFormat", main),
        fields=tally.fields,
        counted_by=counted_by,
        is_exact=is_exact,
        tokens=Spread(low=tally.low, expected=tally.expected, high=tally.high),
        median_tokens=_quantile(lengths, 0.5),
        p95_tokens=_quantile(lengths, 0.95),
        p99_tokens=_quantile(lengths, 0.99),
        longest_tokens=tally.longest,
        longest_line=tally.longest_line,
        histogram=_histogram(lengths),
        covering_seq_len=covering,
        seq_len=length,
        truncated_examples=sum(times for n, times in lengths if n > length),
        lost_tokens_share=(total - kept) / total,
        padded_efficiency=kept / (sequences * length),
        packing_efficiency=kept / (bins * length),
        packed_sequences=bins,
        duplicates=tally.duplicates,
        duplicates_are_complete=len(tally.digests) < MOST_DIGESTS,
        empty_targets=tally.empty,
        first_empty_line=tally.first_empty,
        unreadable=tally.unreadable,
        first_unreadable_line=tally.first_unreadable,
        mixed_formats=tuple(name for name, _ in others),
        tool_version=tool_version,
    )
    return _with_findings(summary)


def _quantile(lengths: list[tuple[int, int]], share: float) -> int:
    """The smallest length that at least ``share`` of the examples do not exceed."""
    wanted = share * sum(times for _, times in lengths)
    seen = 0
    for length, times in lengths:
        seen += times
        if seen >= wanted:
            return length
    return lengths[-1][0]


def _histogram(lengths: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Counts up to powers of two (and the halves between them)."""
    edges = sorted({2**n for n in range(4, 32)} | {3 * 2 ** (n - 1) for n in range(4, 32)})
    counts: Counter[int] = Counter()
    for length, times in lengths:
        counts[edges[bisect_left(edges, length)]] += times
    used = [edge for edge in edges if min(counts) <= edge <= max(counts)]
    return tuple((edge, counts[edge]) for edge in used)


def packed(lengths: Mapping[int, int], seq_len: int) -> int:
    """How many sequences of ``seq_len`` best-fit-decreasing packs the examples in.

    Longer examples are cut to ``seq_len``. Examples of one length are placed together, so the
    work grows with the number of different lengths and not with that of examples.
    """
    cut: Counter[int] = Counter()
    for length, times in lengths.items():
        cut[min(length, seq_len)] += times
    free: Counter[int] = Counter()  # room left: in how many sequences
    rooms: list[int] = []
    total = 0

    def put(room: int, times: int) -> None:
        if room and times:
            if not free[room]:
                insort(rooms, room)
            free[room] += times

    for length in sorted(cut, reverse=True):
        left = cut[length]
        while left:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                each = seq_len // length
                whole, rest = divmod(left, each)
                total += whole + bool(rest)
                put(seq_len - each * length, whole)
                put(seq_len - rest * length if rest else 0, 1)
                break
            room = rooms[at]
            used = min(left, free[room])
            free[room] -= used
            if not free[room]:
                rooms.pop(at)
            put(room - length, used)
            left -= used
    return total


def _with_findings(summary: DataSummary) -> DataSummary:
    findings: list[Finding] = []

    def say(code: str, severity: Any, message: str, help: str, line: int | None = None) -> None:
        location = Location(file=summary.file, line=line)
        findings.append(
            Finding(code=code, severity=severity, message=message, location=location, help=help)
        )

    if summary.unreadable:
        say(
            "DAT001", "error", f"{summary.unreadable} lines are no JSON",
            "a trainer stops at the first of them", summary.first_unreadable_line,
        )  # fmt: skip
    if summary.empty_targets:
        say(
            "DAT002", "warning", f"{summary.empty_targets} examples have nothing to learn",
            "drop examples whose answer is missing or empty (or whose pair is the same twice)",
            summary.first_empty_line,
        )  # fmt: skip
    if summary.duplicates:
        say(
            "DAT003", "warning", f"{summary.duplicates} examples are copies of earlier ones",
            "drop them: a copy in the test set hides what the model has memorised",
        )  # fmt: skip
    if summary.truncated_examples:
        say(
            "DAT004", "warning",
            f"{summary.truncated_examples} sequences are longer than {summary.seq_len} tokens and "
            f"are cut: {summary.lost_tokens_share:.1%} of all tokens",
            f"a length of {summary.covering_seq_len} cuts nothing", summary.longest_line,
        )  # fmt: skip
    if summary.longest_tokens > 4 * summary.p99_tokens:
        say(
            "DAT005", "warning",
            f"the longest sample has {summary.longest_tokens} tokens, 99% have at most "
            f"{summary.p99_tokens}: the batch that holds it decides the peak",
            "cut or drop it, or sort by length so that the peak comes first",
            summary.longest_line,
        )  # fmt: skip
    if summary.mixed_formats:
        say(
            "DAT006", "warning",
            f"not all examples are {summary.format}: also {', '.join(summary.mixed_formats)}",
            "most trainers expect one format in a file",
        )  # fmt: skip
    if summary.format == "unknown":
        say(
            "DAT007", "warning", f"no known format: the keys are {', '.join(summary.fields)}",
            "messages, prompt and completion, chosen and rejected, or text",
        )  # fmt: skip
    return replace(summary, findings=tuple(findings))
