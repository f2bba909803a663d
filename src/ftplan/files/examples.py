"""Examples of a training file, one after the other: JSON Lines, arrays, CSV, text, Parquet.

A file may be larger than memory: it is read in pieces, and each example is handed out in turn.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ftplan.errors import InputError, Location

__all__ = ["examples_of"]

CHUNK = 1 << 20
MOST_VALUE = 1 << 28
"""Characters of one JSON value: what is longer is taken for broken."""
ROWS = 1024
"""Rows of a table that are read at once."""
_UNREAD = {".bin": "Tokenized", ".npy": "NumPy", ".zst": "Zstandard", ".xlsx": "Excel"}
_PACKED = (".gz", ".bz2", ".xz")
_HELD = re.compile(
    r'\{\s*"(?:data|examples|instances|items|records|rows|samples|train)"\s*:\s*\[\s*(?=\{)'
)
"""An object around a list of examples (what `datasets` reads with ``field=``)."""

Told = Callable[[int], None]
"""Hears how many bytes of the file have been read."""


def examples_of(path: Path, told: Told) -> Iterator[tuple[int, Any]]:
    """(line, value) of every example; a line that is no JSON has the value None.

    Raises InputError for a file that cannot be read, or is of a kind that is not.
    """
    inner = Path(path.stem) if path.suffix in _PACKED else path
    if inner.suffix in _UNREAD:
        raise InputError(
            f"{_UNREAD[inner.suffix]} files are not read",
            location=Location(file=str(path)),
            remedy="export it as JSON Lines: datasets.load_dataset(...).to_json('train.jsonl')",
        )
    if path.suffix in (".parquet", ".arrow"):
        yield from _columns(path, told)
        return
    with _open(path, told) as stream:
        if inner.suffix in (".csv", ".tsv"):
            csv.field_size_limit(1 << 30)
            reader = csv.DictReader(stream, delimiter="\t" if inner.suffix == ".tsv" else ",")
            for row in reader:
                yield reader.line_num, row
        elif inner.suffix == ".txt":
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
        else:
            yield from _json(stream)


# --- Bytes --------------------------------------------------------------------------------------


class _Counted(io.RawIOBase):
    """A file that tells how far it was read."""

    def __init__(self, raw: Any, told: Told) -> None:
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


def _open(path: Path, told: Told) -> io.TextIOWrapper:
    try:
        raw: Any = io.BufferedReader(_Counted(path.open("rb"), told), CHUNK)
    except OSError as error:
        raise InputError(
            f"cannot read the data: {error.strerror or error}", location=Location(file=str(path))
        ) from None
    if path.suffix == ".gz":
        raw = gzip.GzipFile(fileobj=raw)
    elif path.suffix == ".bz2":
        import bz2

        raw = bz2.BZ2File(raw)
    elif path.suffix == ".xz":
        import lzma

        raw = lzma.open(raw)  # noqa: SIM115 - closed with the stream around it
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="")


def _columns(path: Path, told: Told) -> Iterator[tuple[int, Any]]:
    """Rows of a Parquet or Arrow file, by pyarrow where it is installed."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise InputError(
            f"{path.suffix} files are read by pyarrow, which is not installed",
            location=Location(file=str(path)),
            remedy="pip install pyarrow, or export the data as JSON Lines: "
            "datasets.load_dataset(...).to_json('train.jsonl')",
        ) from None
    size = path.stat().st_size
    try:
        if path.suffix == ".parquet":
            table = parquet.ParquetFile(path)
            total, batches = table.metadata.num_rows, table.iter_batches(batch_size=ROWS)
        else:
            source = pyarrow.memory_map(str(path))
            total, batches = 0, ipc.open_stream(source)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, row
            told(min(size, size * number // total) if total else size)
    except pyarrow.ArrowException as error:
        raise InputError(
            f"pyarrow cannot read it: {error}", location=Location(file=str(path))
        ) from None


# --- JSON ---------------------------------------------------------------------------------------


def _json(stream: io.TextIOWrapper) -> Iterator[tuple[int, Any]]:
    """Lines, one array, an object around an array, or objects written over several lines."""
    first, line = stream.read(1), 1
    while first and first.isspace():
        line += first == "\n"
        first = stream.read(1)
    if first == "[":
        yield from _values(stream, "")
        return
    head = first + stream.readline()
    goes_on = head.rstrip().endswith(("{", "[", ","))  # an object over several lines
    if goes_on:
        head += stream.read(CHUNK)
    held = _HELD.match(head)
    if held or goes_on:
        yield from _values(stream, head[held.end() :] if held else head)
    else:
        yield from _lines(stream, head, line)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def _lines(stream: io.TextIOWrapper, head: str, start: int) -> Iterator[tuple[int, Any]]:
    if head.strip():
        yield start, _parsed(head)
    for number, line in enumerate(stream, start=start + 1):
        if line.strip():
            yield number, _parsed(line)


def _values(stream: io.TextIOWrapper, buffer: str) -> Iterator[tuple[int, Any]]:
    """Values after each other, with or without commas, up to a closing bracket."""
    decoder = json.JSONDecoder()
    number, ended = 0, False
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
            if ended or len(buffer) > MOST_VALUE:
                if buffer:
                    yield number + 1, None
                return
            more = stream.read(CHUNK)
            buffer, ended = buffer + more, not more
            continue
        number += 1
        yield number, value
        buffer = buffer[end:]
