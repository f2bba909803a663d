"""The failures file under the hands of ``ftplan label``: labels go in, everything else stays.

What a person wrote - comments, order, keys of other tools - is kept byte for byte: new failures
are added under the last one, and a failure that is there without a kind gets a ``kind`` line. Only
a file in flow style (JSON) is written anew, since it has no comments to lose.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields
from functools import lru_cache
from typing import Any

import yaml

from ftplan.dataclass import dataclass
from ftplan.errors import InputError, Location
from ftplan.failures import State

__all__ = ["LabelledFile", "open_labelled", "start_text"]

Json = Any
_EDITED = ("kind", "class", "suggested", "annotator", "note", "tests", "count")


class _Dumper(yaml.SafeDumper):
    """Block style for texts of several lines; keys in the order given."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text and text.strip() else None
    if any(mark in text for mark in "\x85\u2028\u2029"):
        style = '"'  # YAML would read them back as spaces
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _dump(value: Json) -> str:
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=88, indent=2
    )
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """Where one failure stands in the text, as offsets of characters."""

    insert: int
    """After the line on which the value of its first key ends."""
    column: int
    """Of its keys."""
    start: int
    end: int
    flow: bool
    keys: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Key -> start of the key, end of the value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledFile:
    """A failures file as text, with what is needed to change labels in it."""

    text: str
    entries: tuple[dict[str, Json], ...]
    """The failures as written."""
    spans: tuple[_Span, ...] = ()
    end: int = 0
    """Offset after the last failure."""
    dash: int = 2
    """Column of the dashes."""
    opening: str = ""
    """What has to be written before the first failure."""
    rewrite: Mapping[str, Json] | None = None
    """The whole document, where it is in flow style and has to be written anew."""

    @property
    def labels(self) -> dict[str, str]:
        """Id -> kind of every failure that a person has labelled (suggestions are not labels)."""
        return {
            str(entry["id"]): str(entry["kind"])
            for entry in self.entries
            if entry.get("id") is not None and entry.get("kind") and not entry.get("suggested")
        }

    @property
    def annotators(self) -> tuple[str, ...]:
        """Who labelled in this file."""
        names = (entry.get("annotator") for entry in self.entries if entry.get("kind"))
        return tuple(dict.fromkeys(str(name) for name in names if name))

    def with_labels(self, failures: Sequence[Mapping[str, Json]]) -> str:
        """The text with these failures added, or, where their id is there, labelled."""
        positions = {str(entry.get("id")): index for index, entry in enumerate(self.entries)}
        changed = {
            positions[str(failure["id"])]: failure
            for failure in failures
            if str(failure["id"]) in positions
        }
        added = [failure for failure in failures if str(failure["id"]) not in positions]
        if self.rewrite is not None:
            return self._rewritten(changed, added)
        text = self.text
        if added:
            block = "".join(_item(failure, self.dash) for failure in added)
            before = text[: self.end]
            newline = "" if not before or before.endswith("\n") else "\n"
            text = before + newline + self.opening + block + text[self.end :]
        for index in sorted(changed, reverse=True):
            text = _edited(text, self.spans[index], self.entries[index], changed[index])
        return text

    def _rewritten(
        self, changed: Mapping[int, Mapping[str, Json]], added: Iterable[Mapping[str, Json]]
    ) -> str:
        entries = [
            entry | _label_keys(changed[index]) if index in changed else entry
            for index, entry in enumerate(self.entries)
        ]
        document = {**(self.rewrite or {}), "failures": [*entries, *map(dict, added)]}
        return _dump(document)


def _item(failure: Mapping[str, Json], dash: int) -> str:
    """One failure as a block item; remembered, since all are written after every answer."""
    return _item_of(json.dumps(failure), dash)


@lru_cache(maxsize=4096)
def _item_of(encoded: str, dash: int) -> str:
    failure = json.loads(encoded)
    # split at \n only: U+2028 and form feeds stand inside of texts
    lines = _dump(dict(failure)).removesuffix("\n").split("\n")
    return "".join(
        (" " * dash + ("- " if number == 0 else "  ") + line if line else "") + "\n"
        for number, line in enumerate(lines)
    )


def _label_keys(failure: Mapping[str, Json]) -> dict[str, Json]:
    return {key: failure[key] for key in _EDITED if failure.get(key) is not None}


def _edited(text: str, span: _Span, entry: dict[str, Json], failure: Mapping[str, Json]) -> str:
    """The text with one failure's label put into it."""
    wanted = _label_keys(failure)
    if "count" in entry or "share" in entry:
        wanted.pop("count", None)
    if span.flow:
        merged = {k: v for k, v in entry.items() if k != "suggested"} | wanted
        flow: str = yaml.dump(
            merged, Dumper=yaml.SafeDumper, sort_keys=False, allow_unicode=True,
            default_flow_style=True, width=10**9,
        )  # fmt: skip
        return text[: span.start] + flow.strip() + text[span.end :]
    edits: list[tuple[int, int, str]] = []
    new = ""
    if "suggested" in span.keys:
        wanted.setdefault("suggested", False)
    for key, value in wanted.items():
        written = _dump({key: value}).rstrip("\n")
        indented = written.replace("\n", "\n" + " " * span.column)
        if key in span.keys:
            start, end = span.keys[key]
            edits.append((start, end, indented))
        else:
            new += " " * span.column + indented + "\n"
    if new:
        broken = text[: span.insert].endswith("\n")
        edits.append((span.insert, span.insert, new if broken else "\n" + new))
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


def start_text(state: State, *, source: str, task: str | None = None) -> str:
    """A new failures file: what the results show of the state, and no failure yet."""
    known = {
        each.name: value
        for each in fields(State)
        if (value := getattr(state, each.name)) is not None
    }
    head: dict[str, Json] = {"version": 1}
    if task:
        head["task"] = task
    comment = f"# failures of {' '.join(source.split())}, labelled with ftplan label\n"
    return comment + _dump(head | {"state": known}) + "failures:\n"


def open_labelled(text: str, name: str) -> LabelledFile:
    """Read a failures file for labelling.

    Raises :class:`~ftplan.errors.InputError` with the line where it is no YAML or no failures file.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(
            f"not a failures file: {getattr(error, 'problem', None) or type(error).__name__}",
            location=Location(file=name, line=mark.line + 1 if mark else None),
            remedy="repair it, or write to another file with -o",
        ) from None
    if root is None:
        opening = "version: 1\nfailures:\n"
        return LabelledFile(text=text, entries=(), end=len(text), opening=opening)
    if not isinstance(root, yaml.MappingNode) or not isinstance(document, dict):
        raise InputError(
            "not a failures file: no mapping with the key 'failures'",
            location=Location(file=name, line=1),
            remedy="write to another file with -o",
        )
    listed = document.get("failures")
    if listed is not None and not (
        isinstance(listed, list) and all(isinstance(each, dict) for each in listed)
    ):
        raise InputError(
            "'failures' is no list of mappings",
            location=Location(file=name),
            remedy="repair it, or write to another file with -o",
        )
    return _positions(text, root, document)


def _positions(text: str, root: yaml.MappingNode, document: dict[str, Json]) -> LabelledFile:
    entries = tuple(document.get("failures") or ())
    key, node = next(((k, v) for k, v in root.value if k.value == "failures"), (None, None))
    if root.flow_style or (isinstance(node, yaml.SequenceNode) and node.flow_style and node.value):
        return LabelledFile(text=text, entries=entries, rewrite=document)
    if key is None or node is None:
        body = _line_end(text, _content_end(text, root))
        return LabelledFile(text=text, entries=(), end=body, opening="failures:\n")
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        # `failures:`, `failures: null` or `failures: []`: the value gives way to a block
        line_end = _line_end(text, key.end_mark.index)
        kept = text[: key.end_mark.index] + ":\n" + text[line_end:]
        return LabelledFile(text=kept, entries=(), end=key.end_mark.index + 2)
    spans = tuple(_span(text, item) for item in node.value)
    return LabelledFile(
        text=text,
        entries=entries,
        spans=spans,
        end=_after_comments(text, _line_end(text, spans[-1].end), node.start_mark.column),
        dash=node.start_mark.column,
    )


def _span(text: str, item: yaml.Node) -> _Span:
    assert isinstance(item, yaml.MappingNode)
    keys = {
        str(key.value): (key.start_mark.index, _content_end(text, value))
        for key, value in item.value
    }
    first = next(iter(keys.values()), (item.start_mark.index, item.start_mark.index))
    return _Span(
        insert=_line_end(text, first[1]),
        column=item.start_mark.column,
        start=item.start_mark.index,
        end=item.end_mark.index if item.flow_style else _content_end(text, item),
        flow=bool(item.flow_style),
        keys=keys,
    )


def _content_end(text: str, node: yaml.Node) -> int:
    """Where a node's own text ends: end marks of blocks reach to the next token."""
    if isinstance(node, yaml.MappingNode | yaml.SequenceNode) and not node.flow_style:
        children = (
            [part for pair in node.value for part in pair]
            if isinstance(node, yaml.MappingNode)
            else node.value
        )
        if children:
            return max(_content_end(text, child) for child in children)
    end = node.end_mark.index
    return len(text[:end].rstrip("\n ")) if end > node.start_mark.index else end


def _line_end(text: str, index: int) -> int:
    """Offset after the newline that ends this line."""
    found = text.find("\n", index)
    return len(text) if found < 0 else found + 1


def _after_comments(text: str, index: int, dash: int) -> int:
    """Skip comment lines that belong to the item above: indented deeper than its dash."""
    while index < len(text):
        end = _line_end(text, index)
        line = text[index:end]
        indent = len(line) - len(line.lstrip(" "))
        if not line.lstrip().startswith("#") or indent <= dash:
            return index
        index = end
    return index
