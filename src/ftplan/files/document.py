"""One YAML or JSON file, read strictly, that still knows where everything stands.

A :class:`Document` is plain Python data (``dict`` with string keys, ``list``, ``str``, ``int``,
``float``, ``bool``, ``None``) together with the line and column of every key, so that an error
can point at ``micro_batch_size`` and not at line 1.

What differs from ``yaml.safe_load``, and why:

* a key given twice is refused (PyYAML silently keeps the last);
* ``1e-4`` and ``13e9`` are numbers (YAML 1.2; PyYAML reads them as strings), ``010`` is ten and
  ``12:30`` is text (YAML 1.1 reads octal and base 60);
* ``yes no on off`` are booleans as in YAML 1.1, because every trainer reads its own files so;
* keys are always the text as written (``no: 1`` has the key ``"no"``), dates stay text;
* tags that would build an object, recursive anchors and anchors that expand to a huge document
  are refused. Nothing that a file names is ever imported, executed or downloaded.

JSON takes a short cut through :mod:`json`; its positions are worked out when one is asked for.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ftplan.errors import InputError, Location

__all__ = ["Document", "Key", "parse_document", "parse_documents", "read_document"]

Key = str | int
"""One step of a path into a document: a mapping's key, or a list's index from 0."""

MAX_BYTES = 16 * 2**20
"""Larger files are no configuration."""
MAX_DEPTH = 60
"""Deepest nesting of mappings and lists."""
MAX_VALUES = 200_000
"""Values of a document after its anchors are expanded."""

_TAG = "tag:yaml.org,2002:"
_CBase: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_CBase):  # type: ignore[misc]
    """A safe loader that resolves plain scalars as the module's docstring says."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own registry


for _name, _pattern, _first in (
    (
        "bool",
        r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF|true|True|TRUE|false|False|FALSE",
        "yYnNoOtTfF",
    ),
    ("int", r"[-+]?(?:0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+|[0-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), list(_first))


class Document:
    """Plain data with the position of every key.

    ``data`` is the content, ``file`` the name that errors show, ``text`` the source. Positions
    count lines and columns from 1 and are worked out only when asked for.
    """

    def __init__(
        self,
        *,
        data: Any,
        file: str,
        text: str,
        root: yaml.Node | None = None,
        entries: dict[int, Any] | None = None,
    ) -> None:
        self.data = data
        self.file = file
        self.text = text
        self._root = root
        self._entries = entries or {}
        self._json_marks: dict[tuple[Key, ...], tuple[int, int]] | None = None

    def locate(self, path: tuple[Key, ...] = (), *, value: bool = False) -> Location:
        """Where the key at ``path`` stands (a list item: where it begins); if it is not there,
        its nearest parent that is. With ``value``, where the key's value begins."""
        if self._root is not None:
            line, column = _locate_node(self._root, self._entries, path, value)
        else:
            if self._json_marks is None:
                self._json_marks = {k: v for k, v, _ in _scan_json(self.text)}
            marks = self._json_marks
            while path and path not in marks:
                path = path[:-1]
            line, column = marks.get(path, (1, 1))
        return Location(file=self.file, line=line, column=column)

    def source_text(self, path: tuple[Key, ...]) -> str:
        """A scalar as it is written in the file (``1e3`` stays ``1e3``)."""
        node = self._root
        for step in path:
            if isinstance(node, yaml.MappingNode):
                entry = (self._entries.get(id(node)) or {}).get(str(step))
                node = entry[1] if entry is not None else None
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
                node = node.value[step]
        if isinstance(node, yaml.ScalarNode):
            return str(node.value)
        return json.dumps(self.get(*path), ensure_ascii=False)

    def line_text(self, line: int | None) -> str:
        """The source line with this number (from 1); empty when there is none."""
        if line is None:
            return ""
        lines = self.text.splitlines()
        return lines[line - 1] if 0 < line <= len(lines) else ""

    def error(self, message: str, path: tuple[Key, ...] = (), *, remedy: str = "") -> InputError:
        """An :class:`InputError` that points at ``path`` and shows the line."""
        location = self.locate(path)
        return InputError(
            message,
            remedy=remedy,
            location=location,
            source_line=clip(self.line_text(location.line), location.column),
        )

    def get(self, *path: Key, default: Any = None) -> Any:
        """The value at ``path``, or ``default`` when any step of the way is missing."""
        value = self.data
        for step in path:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return default
        return value

    def mapping(self, what: str, *, remedy: str = "") -> dict[str, Any]:
        """``data`` as a mapping; anything else is refused as not being ``what``."""
        if not isinstance(self.data, dict):
            raise self.error(
                f"{what} is a mapping of keys to values, this is {describe(self.data)}",
                remedy=remedy or "write one 'key: value' per line",
            )
        return self.data


def describe(value: Any) -> str:
    """A value's kind in the words of a YAML user: ``a list``, ``the text 'two'``."""
    match value:
        case None:
            return "empty"
        case bool():
            return f"the boolean {str(value).lower()}"
        case int() | float():
            return f"the number {value:g}" if abs(value) < 2**53 else "a very large number"
        case str():
            return f"the text {value!r}" if len(value) <= 40 else "a text"
        case list() | tuple():
            return "a list"
        case _:
            return "a mapping"


def clip(line: str, column: int | None = None, width: int = 160) -> str:
    """A source line short enough for an error message, with the part around ``column`` in it."""
    if len(line) <= width:
        return line
    start = max(0, (column or 1) - width // 2)
    end = start + width
    return f"{'...' if start else ''}{line[start:end]}{'...' if end < len(line) else ''}"


def read_document(path: str | Path, *, file: str | None = None) -> Document:
    """Read one YAML or JSON file. ``file`` is the name shown in errors (the path as given).

    Raises :class:`InputError` for a file that is missing, unreadable, too large, binary, not
    UTF-8, empty, or not a single well-formed document.
    """
    path = Path(path)
    name = file if file is not None else str(path)
    return parse_document(read_text(path, file=name), file=name)


def read_text(path: Path, *, file: str, max_bytes: int = MAX_BYTES) -> str:
    """The UTF-8 text of a file, with the errors of :func:`read_document`."""
    where = Location(file=file)
    try:
        if path.is_dir():
            raise InputError(
                "this is a folder, not a file", location=where, remedy="name a file in it"
            )
        if not path.exists():
            raise InputError("there is no such file", location=where, remedy=_nearest_file(path))
        if not path.is_file():
            raise InputError("this is not a regular file", location=where)
        if path.stat().st_size > max_bytes:
            raise InputError(
                f"the file has more than {max_bytes // 2**20} MiB: it is no configuration",
                location=where,
            )
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror or error}", location=where
        ) from error
    return decode(raw, file=file)


def decode(raw: bytes, *, file: str) -> str:
    """UTF-8 bytes as text; a byte order mark is dropped. Binary and other encodings are refused."""
    where = Location(file=file)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError("the file is UTF-16", location=where, remedy="save it as UTF-8")
    if b"\0" in raw:
        raise InputError("the file is binary, not text", location=where)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        raise InputError(
            f"byte 0x{raw[error.start]:02x} is not UTF-8",
            location=Location(file=file, line=line, column=column),
            remedy="save the file as UTF-8",
        ) from error


def parse_document(text: str, *, file: str) -> Document:
    """Read one document from ``text``. ``file`` is the name shown in an :class:`InputError`."""
    document = _json_document(text, file)
    if document is not None:
        return document
    roots = _compose_all(text, file)
    if len(roots) > 1:
        mark = roots[1].start_mark
        raise InputError(
            f"the file holds {len(roots)} documents, one is expected",
            location=Location(file=file, line=mark.line + 1, column=mark.column + 1),
            remedy="put each document ('---') into a file of its own",
        )
    return _yaml_document(text, file, roots)


def parse_documents(text: str, *, file: str) -> list[Document]:
    """Read all documents of ``text`` (separated by ``---``); at least one."""
    document = _json_document(text, file)
    if document is not None:
        return [document]
    roots = _compose_all(text, file)
    return [_yaml_document(text, file, [root]) for root in roots] or [
        _yaml_document(text, file, [])
    ]


def _nearest_file(path: Path) -> str:
    try:
        siblings = (
            [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        )
    except OSError:
        siblings = []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    if near:
        return f"did you mean {path.parent / near[0]}?"
    return "give the path of a file that exists"


# --- YAML ---------------------------------------------------------------------------------------


def _compose_all(text: str, file: str) -> list[yaml.Node]:
    _refuse_deep_flow(text, file)
    loader = _Loader(text)
    roots = []
    try:
        while loader.check_node():
            roots.append(loader.get_node())
    except yaml.YAMLError as error:
        raise _yaml_error(error, text, file) from error
    except RecursionError:
        raise _too_deep(file) from None
    except ValueError as error:  # an escape such as "\Uffffffff" is no character
        raise InputError(f"the file is not YAML: {error}", location=Location(file=file)) from error
    finally:
        loader.dispose()
    return roots


def _too_deep(file: str, line: int | None = None) -> InputError:
    return InputError(
        f"the file is nested deeper than {MAX_DEPTH} levels",
        location=Location(file=file, line=line),
    )


def _refuse_deep_flow(text: str, file: str) -> None:
    """Before the parser, whose own recursion a hostile file could exhaust."""
    if text.count("[") + text.count("{") <= MAX_DEPTH and "\n" in text:
        return
    depth = 0
    for match in re.finditer(r"[\[\]{}]|\n", text):
        char = match[0]
        if char in "[{":
            depth += 1
            if depth > 20 * MAX_DEPTH:
                raise _too_deep(file, text.count("\n", 0, match.start()) + 1)
        elif char in "]}":
            depth = max(0, depth - 1)


def _yaml_error(error: yaml.YAMLError, text: str, file: str) -> InputError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        position = getattr(error, "position", None)
        line = text.count("\n", 0, position) + 1 if isinstance(position, int) else None
        message = getattr(error, "reason", None) or str(error).splitlines()[0]
        return InputError(
            f"the file is not YAML: {message}", location=Location(file=file, line=line)
        )
    lines = text.splitlines()
    line_text = lines[mark.line] if mark.line < len(lines) else ""
    problem = getattr(error, "problem", None) or "it cannot be parsed"
    remedy = ""
    before = line_text[: len(line_text) - len(line_text.lstrip(" \t"))]
    if "\t" in before or "'\\t'" in problem:
        problem, remedy = "a tab where YAML wants spaces", "indent with spaces"
    elif "undefined alias" in problem:
        problem = problem.replace("found undefined alias", "undefined alias")
        remedy = "define it first with &name, or quote the value if it begins with a star"
    elif "mapping values are not allowed" in problem:
        problem = "a ': ' where no key can stand"
        remedy = "quote a value that contains ': ', or mend the indentation"
    elif "could not find expected ':'" in problem:
        remedy = "write 'key: value'"
    elif "cannot start any token" in problem:
        remedy = "quote the value"
    return InputError(
        f"the file is not YAML: {problem}" if not remedy.startswith("indent") else problem,
        remedy=remedy,
        location=Location(file=file, line=mark.line + 1, column=mark.column + 1),
        source_line=clip(line_text),
    )


def _yaml_document(text: str, file: str, roots: list[yaml.Node]) -> Document:
    if not text.strip():
        raise InputError("the file is empty", location=Location(file=file))
    if not roots or (isinstance(roots[0], yaml.ScalarNode) and roots[0].tag == _TAG + "null"):
        raise InputError(
            "the file says nothing: it holds only comments", location=Location(file=file)
        )
    builder = _Builder(text, file)
    data = builder.build(roots[0])
    return Document(data=data, file=file, text=text, root=roots[0], entries=builder.entries)


class _Builder:
    """Node tree to plain data. Anchored nodes are built once; their expanded size is counted."""

    def __init__(self, text: str, file: str) -> None:
        self._lines = text.splitlines()
        self._file = file
        self._open: set[int] = set()
        self._built: dict[int, tuple[Any, int, int]] = {}
        self.entries: dict[int, _Entries | None] = {}

    def build(self, node: yaml.Node) -> Any:
        return self._build(node, 0)[0]

    def _refuse(self, node: yaml.Node, message: str, remedy: str = "") -> InputError:
        line = node.start_mark.line
        return InputError(
            message,
            remedy=remedy,
            location=Location(file=self._file, line=line + 1, column=node.start_mark.column + 1),
            source_line=clip(self._lines[line], node.start_mark.column)
            if line < len(self._lines)
            else "",
        )

    def _build(self, node: yaml.Node, depth: int) -> tuple[Any, int, int]:
        """The value, how many values it holds when anchors are expanded, and its height."""
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node), 1, 0
        key = id(node)
        if key in self._open:
            raise self._refuse(node, "an anchor contains itself")
        if key not in self._built:
            if depth >= MAX_DEPTH:
                raise self._refuse(node, f"the file is nested deeper than {MAX_DEPTH} levels")
            self._open.add(key)
            self._built[key] = self._collection(node, depth)
            self._open.discard(key)
        if depth + self._built[key][2] > MAX_DEPTH:
            raise self._refuse(node, f"the file is nested deeper than {MAX_DEPTH} levels")
        return self._built[key]

    def _collection(self, node: yaml.Node, depth: int) -> tuple[Any, int, int]:
        size, height = 1, 0
        items: list[Any] = []
        if node.tag not in (_TAG + "seq", _TAG + "map"):
            raise self._tag(node)
        if isinstance(node, yaml.SequenceNode):
            names, children = [], node.value
        else:
            self._refuse_duplicates(node)
            entries = _entries(node, self.entries, self._refuse)
            names, children = list(entries), [child for _, child in entries.values()]
        for child in children:
            value, count, below = self._build(child, depth + 1)
            items.append(value)
            size, height = size + count, max(height, below + 1)
            self._limit(node, size)
        is_list = isinstance(node, yaml.SequenceNode)
        return (items if is_list else dict(zip(names, items, strict=True))), size, height

    def _limit(self, node: yaml.Node, size: int) -> None:
        if size > MAX_VALUES:
            raise self._refuse(
                node,
                f"the file holds more than {MAX_VALUES} values once its anchors are expanded",
            )

    def _tag(self, node: yaml.Node) -> InputError:
        return self._refuse(
            node,
            f"the tag {node.tag.replace(_TAG, '!!')!r} is not read: files are data, not code",
            "write the value without a tag",
        )

    def _refuse_duplicates(self, node: yaml.Node) -> None:
        seen: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._refuse(key, "a list or mapping cannot be a key", "write 'key: value'")
            name = str(key.value)
            if name in seen and key.tag != _TAG + "merge":
                first = seen[name].start_mark.line + 1
                raise self._refuse(
                    key,
                    f"the key {name!r} is given twice (first on line {first})",
                    "keep one of the two",
                )
            seen[name] = key

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        tag = node.tag.removeprefix(_TAG) if node.tag.startswith(_TAG) else node.tag
        text = str(node.value)
        try:
            match tag:
                case "str" | "timestamp":
                    return text
                case "null":
                    return None
                case "bool":
                    return text.lower() in ("yes", "on", "true")
                case "int":
                    return _integer(text)
                case "float":
                    return _float(text)
                case "merge":
                    return text
        except ValueError as error:
            raise self._refuse(node, f"{text[:40]!r} is not a number that can be read") from error
        raise self._tag(node)


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    sign = -1 if digits.startswith("-") else 1
    digits = digits.lstrip("+-")
    base = {"0x": 16, "0o": 8, "0b": 2}.get(digits[:2].lower(), 10)
    return sign * int(digits[2:] if base != 10 else digits, base)


def _float(text: str) -> float:
    lowered = text.replace("_", "").lower()
    if lowered.endswith(".inf"):
        return -math.inf if lowered.startswith("-") else math.inf
    return math.nan if lowered == ".nan" else float(lowered)


_Entries = dict[str, tuple[yaml.Node, yaml.Node]]


def _entries(
    node: yaml.Node, cache: dict[int, _Entries | None], refuse: Callable[..., Exception]
) -> _Entries:
    """Key node and value node by key, with ``<<`` merged as YAML 1.1 says: own keys win, then
    those of the first mapping merged. ``cache`` keeps chains of merges from growing."""
    if (known := cache.get(id(node))) is not None:
        return known
    if not isinstance(node, yaml.MappingNode) or id(node) in cache:
        raise refuse(node, "'<<' merges other mappings only", "name an anchor of a mapping")
    cache[id(node)] = None
    own: _Entries = {}
    merged: list[yaml.Node] = []
    for key, value in node.value:
        if key.tag == _TAG + "merge":
            merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
        else:
            own[str(key.value)] = (key, value)
    for source in merged:
        for name, entry in _entries(source, cache, refuse).items():
            own.setdefault(name, entry)
    cache[id(node)] = own
    return own


def _locate_node(
    root: yaml.Node,
    entries: dict[int, _Entries | None],
    path: tuple[Key, ...],
    value: bool,
) -> tuple[int, int]:
    node, mark = root, root.start_mark
    for step in path:
        if isinstance(node, yaml.MappingNode):
            found = (entries.get(id(node)) or {}).get(str(step))
            if found is None:
                break
            mark, node = found[0].start_mark, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            if not 0 <= step < len(node.value):
                break
            node = node.value[step]
            mark = node.start_mark
        else:
            break
    else:
        if value:
            mark = node.start_mark
    return mark.line + 1, mark.column + 1


# --- JSON ---------------------------------------------------------------------------------------


class _TwiceError(Exception):
    """A JSON object gives a key twice; the exact place is found afterwards."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _TwiceError
    return result


def _json_document(text: str, file: str) -> Document | None:
    """The document when ``text`` is JSON; None when it is not, and YAML may say more."""
    head = text.lstrip()[:1]
    if head not in ("{", "["):
        return None
    try:
        data = json.loads(text, object_pairs_hook=_pairs)
    except _TwiceError:
        raise _json_duplicate(text, file) from None
    except RecursionError:
        raise _too_deep(file) from None
    except json.JSONDecodeError as error:
        if not file.endswith((".json", ".ipynb")):
            return None
        line_text = text.splitlines()[error.lineno - 1] if text.splitlines() else ""
        raise InputError(
            f"the file is not JSON: {error.msg[:1].lower()}{error.msg[1:]}",
            location=Location(file=file, line=error.lineno, column=error.colno),
            source_line=clip(line_text, error.colno),
            remedy="JSON has no comments and no comma after the last item",
        ) from error
    except ValueError as error:  # a number with thousands of digits
        raise InputError(f"the file is not JSON: {error}", location=Location(file=file)) from error
    if _depth(data) > MAX_DEPTH:
        raise _too_deep(file)
    return Document(data=data, file=file, text=text)


def _depth(data: Any) -> int:
    deepest, stack = 0, [(data, 1)]
    while stack:
        value, depth = stack.pop()
        deepest = max(deepest, depth)
        children = value.values() if isinstance(value, dict) else value
        if isinstance(value, dict | list):
            stack.extend((child, depth + 1) for child in children if isinstance(child, dict | list))
    return deepest


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')


def _scan_json(text: str) -> Iterator[tuple[tuple[Key, ...], tuple[int, int], bool]]:
    """Path, position, and whether it repeats a key, of every key and item of well-formed JSON."""
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    row = 0
    stack: list[Any] = []  # per level: the set of keys seen (an object) or an index (a list)
    path: list[Key] = []
    want_key = False
    for match in _JSON_TOKEN.finditer(text):
        token, start = match[0], match.start()
        while row + 1 < len(starts) and starts[row + 1] <= start:
            row += 1
        place = (row + 1, start - starts[row] + 1)
        if want_key and token.startswith('"'):
            name = json.loads(token)
            path[-1] = name
            yield tuple(path), place, name in stack[-1]
            stack[-1].add(name)
            want_key = False
            continue
        if token not in ",:]}":
            if stack and isinstance(stack[-1], int):
                yield tuple(path), place, False
            elif not stack:
                yield (), place, False
        if token == "{":
            stack.append(set())
            path.append("")
            want_key = True
        elif token == "[":
            stack.append(0)
            path.append(0)
        elif token in "}]":
            stack.pop()
            path.pop()
            want_key = False
        elif token == ",":
            if isinstance(stack[-1], int):
                stack[-1] += 1
                path[-1] = stack[-1]
            else:
                want_key = True


def _json_duplicate(text: str, file: str) -> InputError:
    seen: dict[tuple[Key, ...], int] = {}
    for path, (line, column), again in _scan_json(text):
        if again:
            return InputError(
                f"the key {path[-1]!r} is given twice (first on line {seen[path]})",
                remedy="keep one of the two",
                location=Location(file=file, line=line, column=column),
                source_line=clip(text.splitlines()[line - 1], column),
            )
        seen.setdefault(path, line)
    raise AssertionError("json reported a duplicate key that the scanner does not find")
