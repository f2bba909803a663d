"""Training data, counted in one pass: nothing is kept but counts and a digest of each example, so
a file may be larger than memory.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

from ftplan.dataclass import dataclass
from ftplan.errors import InputError, Location, MissingExtraError
from ftplan.files.examples import examples_of
from ftplan.files.formats import Example, understood
from ftplan.files.lengths import cut_to, histogram, packed, padded_tokens, quantile
from ftplan.fitting import DataFormat, DataSummary, Spread
from ftplan.report import Finding

__all__ = ["Tokens", "count_dataset", "estimate_tokens", "read_dataset", "tokenizer_of"]

Tokens = Callable[[str], Spread]
"""Counts the tokens of a text."""
WIDE = re.compile("[\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")
NARROW = re.compile("[^\x00-\x7f]")
RULE = "no tokenizer: 4 characters a token (3 to 5.5), wide scripts 0.8 tokens a character"
TEMPLATE = Spread(low=2, expected=5, high=9)
"""Tokens that a chat template puts around each message."""
BATCH = 8
"""Samples of a batch, where no plan says how many."""


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


# --- Counting -----------------------------------------------------------------------------------


class Digests:
    """A set of 64-bit numbers in one flat table: 8 bytes each, and at least half as much room.

    Two different texts share a digest once in 10^5 files of ten million examples.
    """

    MOST = 1 << 24
    """Where it stops to grow: 268 MB."""

    def __init__(self) -> None:
        self._table = array("Q", bytes(8 << 16))
        self._count = 0

    @property
    def is_full(self) -> bool:
        """What comes now is looked up and not remembered."""
        return self._count >= self.MOST

    def seen(self, text: str) -> bool:
        """Whether the text came before; from now on it did."""
        number = int.from_bytes(blake2b(text.encode(errors="replace"), digest_size=8).digest())
        table = self._table
        at = self._place(table, number or 1)
        if table[at]:
            return True
        if not self.is_full:
            table[at] = number or 1
            self._count += 1
            if 3 * self._count > 2 * len(table):
                self._grow()
        return False

    @staticmethod
    def _place(table: array[int], number: int) -> int:
        """Where a number is, or would be put: the next free place from its own on."""
        mask = len(table) - 1
        at = number & mask
        while table[at] and table[at] != number:
            at = (at + 1) & mask
        return at

    def _grow(self) -> None:
        old, self._table = self._table, array("Q", bytes(16 * len(self._table)))
        for number in old:
            if number:
                self._table[self._place(self._table, number)] = number


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
    digests: Digests = field(default_factory=Digests)
    duplicates: int = 0
    empty: int = 0
    first_empty: int | None = None
    unreadable: int = 0
    first_unreadable: int | None = None
    with_media: int = 0

    def add(self, line: int, row: Any) -> None:
        if row is None:
            self.unreadable += 1
            self.first_unreadable = self.first_unreadable or line
            return
        example = understood(row)
        if not self.examples:
            self.fields = tuple(map(str, row)) if isinstance(row, Mapping) else ()
        self.examples += 1
        self.formats[example.format] += 1
        self.with_media += example.has_media
        if example.is_empty:
            self.empty += 1
            self.first_empty = self.first_empty or line
        self.duplicates += self.digests.seen("\x00".join(t for s in example.sequences for t in s))
        for texts in example.sequences:
            self._length(line, texts, example)

    def _length(self, line: int, texts: list[str], example: Example) -> None:
        if example.token_ids is not None:
            spread = Spread(low=example.token_ids, expected=example.token_ids,
                            high=example.token_ids)  # fmt: skip
        else:
            spreads = [self.count(text) for text in texts if text]
            messages = example.messages
            spread = Spread(
                low=sum(s.low for s in spreads) + TEMPLATE.low * messages,
                expected=sum(s.expected for s in spreads) + TEMPLATE.expected * messages + 1,
                high=sum(s.high for s in spreads) + TEMPLATE.high * messages + 2,
            )
        self.low += spread.low
        self.expected += spread.expected
        self.high += spread.high
        length = max(1, round(spread.expected))
        self.lengths[length] += 1
        if length > self.longest:
            self.longest, self.longest_line = length, line


def read_dataset(path: Path, **more: Any) -> DataSummary:
    """What :func:`count_dataset` says, without the lengths."""
    return count_dataset(path, **more)[0]


def count_dataset(
    path: Path,
    *,
    seq_len: int | None = None,
    batch: int = BATCH,
    count: Tokens | None = None,
    counted_by: str = RULE,
    told: Callable[[int, int], None] | None = None,
    tool_version: str = "",
) -> tuple[DataSummary, Mapping[int, int]]:
    """Read training data once and count it: the summary, and how many samples have which length.

    ``seq_len`` is the length that truncation and packing are about (left out: one that no example
    exceeds), ``batch`` how many samples are padded to the longest of them. ``count`` counts tokens
    exactly; left out: :func:`estimate_tokens`. ``told`` hears (bytes read, bytes in all). Raises
    InputError for a file that cannot be read or holds nothing.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}", location=Location(file=str(path)))
    size = path.stat().st_size
    tally = _Tally(count or estimate_tokens)
    for line, row in examples_of(path, lambda done: told(done, size) if told else None):
        tally.add(line, row)
    if not tally.examples:
        broken = f": {tally.unreadable} lines are no JSON" if tally.unreadable else ""
        raise InputError(
            f"there are no examples in it{broken}",
            location=Location(file=str(path), line=tally.first_unreadable),
            remedy='write one JSON object a line: {"messages": [...]} or {"text": "..."}',
        )
    lengths = sorted(tally.lengths.items())
    longest = tally.longest
    covering = -(-longest // 64) * 64
    length = seq_len or covering
    sequences = tally.lengths.total()
    total = sum(n * times for n, times in lengths)
    kept = sum(n * times for n, times in cut_to(tally.lengths, length).items())
    bins = packed(tally.lengths, length)
    (main, _), *others = tally.formats.most_common()
    exact = count is not None or set(tally.formats) == {"token ids"}
    summary = DataSummary(
        file=str(path),
        bytes=size,
        examples=tally.examples,
        format=cast("DataFormat", main),
        fields=tally.fields,
        counted_by="the token ids in it" if exact and count is None else counted_by,
        is_exact=exact,
        tokens=Spread(low=tally.low, expected=tally.expected, high=tally.high),
        median_tokens=quantile(lengths, 0.5),
        p95_tokens=quantile(lengths, 0.95),
        p99_tokens=quantile(lengths, 0.99),
        longest_tokens=longest,
        longest_line=tally.longest_line,
        histogram=histogram(lengths),
        covering_seq_len=covering,
        seq_len=length,
        truncated_examples=sum(times for n, times in lengths if n > length),
        lost_tokens_share=(total - kept) / total,
        padded_efficiency=kept / (sequences * length),
        batch=batch,
        batch_efficiency=kept / padded_tokens(tally.lengths, length, batch),
        packing_efficiency=kept / (bins * length),
        packed_sequences=bins,
        duplicates=tally.duplicates,
        duplicates_are_complete=not tally.digests.is_full,
        empty_targets=tally.empty,
        first_empty_line=tally.first_empty,
        unreadable=tally.unreadable,
        first_unreadable_line=tally.first_unreadable,
        with_media=tally.with_media,
        mixed_formats=tuple(name for name, _ in others),
        tool_version=tool_version,
    )
    return _with_findings(summary), tally.lengths


# --- Findings -----------------------------------------------------------------------------------


def many(count: int, noun: str, plural: str = "") -> str:
    """``1 line``, ``2 lines``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def _with_findings(summary: DataSummary) -> DataSummary:
    findings: list[Finding] = []

    def say(code: str, severity: Any, message: str, help: str, line: int | None = None) -> None:
        location = Location(file=summary.file, line=line)
        findings.append(
            Finding(code=code, severity=severity, message=message, location=location, help=help)
        )

    if summary.unreadable:
        say(
            "DAT001", "error", f"{many(summary.unreadable, 'line')} not in JSON",
            "a trainer stops at the first of them", summary.first_unreadable_line,
        )  # fmt: skip
    if summary.empty_targets:
        say(
            "DAT002", "warning",
            f"{many(summary.empty_targets, 'example')} with nothing to learn",
            "drop examples whose answer is missing or empty (or whose pair is the same twice)",
            summary.first_empty_line,
        )  # fmt: skip
    if summary.duplicates:
        copies = many(summary.duplicates, "copy", "copies")
        say(
            "DAT003", "warning", f"{copies} of earlier examples",
            "drop them: a copy in the test set hides what the model has memorised",
        )  # fmt: skip
    if summary.truncated_examples:
        say(
            "DAT004", "warning",
            f"{many(summary.truncated_examples, 'sequence')} longer than {summary.seq_len} tokens: "
            f"cut, with {summary.lost_tokens_share:.1%} of all tokens",
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
    if summary.with_media:
        say(
            "DAT008", "warning",
            f"{many(summary.with_media, 'example')} with images, video or sound, whose tokens are "
            "not counted",
            "add them to the sequence length: batch.images and the model's tokens an image",
        )  # fmt: skip
    return replace(summary, findings=tuple(findings))
