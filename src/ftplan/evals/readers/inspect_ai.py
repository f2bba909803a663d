"""Inspect: JSON logs (`version` 2, and 1) and `.eval` archives.

Scores are letters (C correct, I incorrect, P partial, N no answer), numbers, booleans, or mappings
of these. A sample with an `error` has no answer to judge. `.eval` members written since 0.3.1xx
are compressed with Zstandard (zip method 93), which Python reads from 3.14 on, or with the package
zstandard; without either the error says how to convert the log.
Source: https://inspect.aisi.org.uk/eval-logs.html and files written by 0.3.285.
"""

from __future__ import annotations

import importlib
import io
import json
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

from ftplan.errors import InputError
from ftplan.evals.document import Document
from ftplan.evals.options import ReadOptions
from ftplan.evals.readers import Reader
from ftplan.evals.scores import judged_check, threshold_note
from ftplan.evals.values import (
    as_contexts,
    as_dict,
    as_list,
    as_number,
    as_text,
    as_verdict,
    decide,
    is_missing,
    reasons,
)
from ftplan.results import Aggregate, Check, EvalRun, ResultRow

Json = Any
_ZSTANDARD = 93
_LETTERS: dict[str, tuple[bool, float]] = {
    "C": (True, 1.0),
    "I": (False, 0.0),
    "P": (False, 0.5),
    "N": (False, 0.0),
}
_ATTACHMENT = "attachment://"
_MEMBER_LIMIT_BYTES = 2**30
"""A member that claims to be larger is refused, not unpacked."""


def recognises(document: Document) -> bool:
    if document.archive:
        return True
    log = as_dict(document.value)
    evaluation = as_dict(log.get("eval"))
    if "task" in evaluation and ("model" in evaluation or "samples" in log):
        return True
    return any(
        "scores" in each and "epoch" in each and "target" in each
        for _, each in document.objects[:5]
    )


def read(document: Document, options: ReadOptions) -> EvalRun:
    log = _unpack(document) if document.archive else as_dict(document.value)
    samples = log.get("samples")
    if not as_dict(log.get("eval")):
        samples = [each for _, each in document.objects]
    evaluation = as_dict(log.get("eval"))
    rows = tuple(
        _row(sample, number, options)
        for number, sample in enumerate(as_list(samples))
        if isinstance(sample, dict)
    )
    notes = [*_status_notes(log, samples), *threshold_note(rows)]
    aggregates = () if rows else _aggregates(log)
    return EvalRun(
        tool="inspect",
        version=as_text(as_dict(evaluation.get("packages")).get("inspect_ai")),
        rows=rows,
        aggregates=aggregates,
        notes=tuple(notes),
    )


def _status_notes(log: Mapping[str, Json], samples: Json) -> list[str]:
    notes = []
    status = as_text(log.get("status"))
    if status not in ("", "success"):
        why = as_text(as_dict(log.get("error")).get("message")).split("\n")[0]
        notes.append(f"the evaluation ended with status {status}{f': {why}' if why else ''}")
    if log.get("invalidated") is True:
        notes.append("the log is marked as invalidated")
    if not as_list(samples):
        notes.append("the log holds no samples: run without --no-log-samples")
    return notes


def _row(sample: dict[str, Json], number: int, options: ReadOptions) -> ResultRow:
    attachments = as_dict(sample.get("attachments"))
    error = sample.get("error")
    message = as_text(as_dict(error).get("message") if isinstance(error, dict) else error)
    scores = sample.get("scores")
    if not isinstance(scores, dict) and isinstance(sample.get("score"), dict):
        scores = {"score": sample["score"]}
    checks = tuple(
        check
        for scorer, score in as_dict(scores).items()
        for check in _checks(as_text(scorer), score, options)
    )
    name = as_text(sample.get("id")) or f"sample-{number + 1}"
    epoch = sample.get("epoch")
    identity = f"{name}-epoch-{epoch}" if isinstance(epoch, int) and epoch != 1 else name
    return ResultRow(
        id=identity,
        item=name,
        passed=None if message else decide(checks),
        checks=checks,
        input=_resolved(as_text(sample.get("input")), attachments),
        output=_resolved(_output(sample), attachments),
        expected=_target(sample),
        contexts=_contexts(sample),
        reason=reasons(checks),
        error=message,
    )


def _checks(scorer: str, score: Json, options: ReadOptions) -> list[Check]:
    fields = as_dict(score) if isinstance(score, dict) and "value" in score else {"value": score}
    value = fields["value"]
    reason = as_text(fields.get("explanation"))
    if isinstance(value, dict):
        return [
            _check(f"{scorer}/{as_text(key)}", each, reason, options, signal=as_text(key))
            for key, each in value.items()
        ]
    if isinstance(value, list):
        return [
            _check(f"{scorer}/{index}", each, reason, options, signal=scorer)
            for index, each in enumerate(value)
        ]
    return [_check(scorer, value, reason, options)]


def _check(name: str, value: Json, reason: str, options: ReadOptions, signal: str = "") -> Check:
    if is_missing(value):  # NaN is how a scorer says that it could not score
        return Check(name=name, signal=signal, reason=reason)
    if isinstance(value, str) and value.strip().upper() in _LETTERS:
        letter = value.strip().upper()
        passed, worth = _LETTERS[letter]
        because = f"partially correct. {reason}".strip() if letter == "P" else reason
        return Check(
            name=name, signal=signal, passed=passed, score=worth, threshold=1.0, reason=because
        )
    if isinstance(value, str) and as_number(value) is None and as_verdict(value) is not None:
        return Check(name=name, signal=signal, passed=as_verdict(value), reason=reason)
    number = as_number(value)
    exact = number in (0.0, 1.0)
    if exact and number is not None and name not in options.thresholds:
        return Check(name=name, signal=signal, passed=number == 1.0, score=number, reason=reason)
    return judged_check(
        name=name, value=value, thresholds=options.thresholds, reason=reason, signal=signal
    )


def _output(sample: dict[str, Json]) -> str:
    output = as_dict(sample.get("output"))
    if as_text(output.get("completion")):
        return as_text(output["completion"])
    for choice in as_list(output.get("choices")):
        content = as_dict(as_dict(choice).get("message")).get("content")
        if content:
            return as_text(content)
    for message in reversed(as_list(sample.get("messages"))):
        if as_dict(message).get("role") == "assistant":
            return as_text(as_dict(message).get("content"))
    return ""


def _target(sample: dict[str, Json]) -> str:
    target = sample.get("target")
    if isinstance(target, list):
        return " | ".join(as_text(each) for each in target)
    choices = as_list(sample.get("choices"))
    text = as_text(target)
    if choices and len(text) == 1 and 0 <= ord(text.upper()) - ord("A") < len(choices):
        return f"{text}) {as_text(choices[ord(text.upper()) - ord('A')])}"
    return text


def _contexts(sample: dict[str, Json]) -> tuple[str, ...]:
    metadata = as_dict(sample.get("metadata"))
    for name in ("context", "contexts", "retrieved_contexts", "documents"):
        if name in metadata:
            return as_contexts(metadata[name])
    return ()


def _resolved(text: str, attachments: Mapping[str, Json]) -> str:
    """Long texts are stored once, under a hash, and referred to."""
    if _ATTACHMENT not in text:
        return text
    for key, value in attachments.items():
        text = text.replace(f"{_ATTACHMENT}{key}", as_text(value))
    return text


def _aggregates(log: Mapping[str, Json]) -> tuple[Aggregate, ...]:
    task = as_text(as_dict(log.get("eval")).get("task"))
    found = []
    for score in as_list(as_dict(log.get("results")).get("scores")):
        fields = as_dict(score)
        metrics = as_dict(fields.get("metrics"))
        scored = as_number(fields.get("scored_samples"))
        spread = as_number(as_dict(metrics.get("stderr")).get("value"))
        for name, metric in metrics.items():
            value = as_number(as_dict(metric).get("value"))
            if value is not None and name != "stderr":
                found.append(
                    Aggregate(
                        task=task,
                        metric=f"{as_text(fields.get('name'))}/{name}",
                        value=value,
                        stderr=spread,
                        samples=int(scored) if scored is not None else None,
                        share_right=name == "accuracy" and 0 <= value <= 1,
                    )
                )
    return tuple(found)


def _unpack(document: Document) -> dict[str, Json]:
    """The log of a `.eval` archive: its header, and its samples in order."""
    try:
        with zipfile.ZipFile(io.BytesIO(document.archive)) as archive:
            names = [info.filename for info in archive.infolist()]
            header_name = next(
                (name for name in ("header.json", "_journal/start.json") if name in names), ""
            )
            if not header_name:
                raise document.error(
                    "a zip archive that is no Inspect log (it has no header.json)",
                    remedy="pass the JSON, JSONL or CSV file that the evaluation tool wrote",
                )
            log = dict(as_dict(_member(archive, header_name, document)))
            log["samples"] = [
                _member(archive, name, document)
                for name in names
                if name.startswith("samples/") and name.endswith(".json")
            ]
            if not log["samples"] and "summaries.json" in names:
                # a log without samples still has their scores, with texts cut short
                log["samples"] = as_list(_member(archive, "summaries.json", document))
            if header_name != "header.json":
                log["status"] = "started"
            return log
    except InputError:
        raise
    except Exception as error:
        # each compression method has errors of its own (zlib, lzma, zstd): all mean damaged
        raise document.error(
            f"a damaged zip archive: {error or type(error).__name__}", remedy="copy it again"
        ) from None


def _member(archive: zipfile.ZipFile, name: str, document: Document) -> Json:
    info = archive.getinfo(name)
    if info.file_size > _MEMBER_LIMIT_BYTES:
        raise document.error(f"{name}: {info.file_size} bytes unpacked is too large for a log")
    if info.compress_type == _ZSTANDARD and not hasattr(zipfile, "ZIP_ZSTANDARD"):
        data = _zstandard_member(info, document)
    else:
        data = archive.read(info)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise document.error(f"{name} is not JSON: {error}") from None


def _zstandard_member(info: zipfile.ZipInfo, document: Document) -> bytes:
    """Unpack by hand what zipfile refuses: the local header, then the compressed bytes."""
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise document.error(
            "the log is compressed with Zstandard, which this Python cannot read",
            remedy="pip install zstandard, or use Python 3.14, or convert the log: "
            "inspect log convert --to json --output-dir json " + document.name,
        ) from None
    data = document.archive
    start = info.header_offset
    name_bytes, extra_bytes = struct.unpack("<HH", data[start + 26 : start + 30])
    begin = start + 30 + name_bytes + extra_bytes
    packed = data[begin : begin + info.compress_size]
    try:
        reader = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
        unpacked: bytes = reader.read(info.file_size)
    except zstandard.ZstdError as error:
        raise document.error(f"{info.filename}: {error}", remedy="copy the log again") from None
    return unpacked


READER = Reader(
    tool="inspect",
    title="Inspect",
    files="`*.json`, `*.eval`",
    how="`inspect eval task.py --log-format json`, or `inspect log convert --to json` of a "
    "`.eval` log (read directly by Python 3.14, or where zstandard is installed)",
    recognises=recognises,
    read=read,
    order=10,
)
