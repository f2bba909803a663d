"""Command lines and job scripts as configurations: what would be run, without running anything.

Enough of the shell is read to find the words of each command with their places: quotes, line
continuations, comments, here-documents, variables and arrays that the script itself sets,
``$((...))`` and ``$(expr ...)`` over whole numbers. Whatever only running would tell becomes
:class:`ftplan.trainers.keys.Unresolved`.
"""

from __future__ import annotations

import json
import re
from dataclasses import field
from typing import Any

from ftplan.dataclass import dataclass
from ftplan.errors import InputError, Location
from ftplan.files.document import Document, Key
from ftplan.trainers.keys import Unresolved

__all__ = ["Command", "CommandDocument", "Script", "Word", "Written", "parse_flags", "parse_script"]

MAX_WORDS = 50_000
"""Longer scripts are no job."""


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a command, and where it begins (from 1)."""

    text: str
    line: int
    column: int
    unresolved: bool = False


@dataclass(slots=True)
class Command:
    """One simple command: the variables in front of it, the script's, and its words."""

    words: list[Word]
    env: dict[str, Word] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Written:
    """A file that a script writes from a here-document."""

    text: str
    """It begins with as many empty lines as the script has before it."""
    is_filled: bool
    """Whether the shell fills it in: a dollar that is left is something only running would tell."""


@dataclass(slots=True)
class Script:
    """What a script runs, in order, and the files that it writes from here-documents."""

    commands: list[Command]
    files: dict[str, Written]


class CommandDocument(Document):
    """A command's flags as a document, with the place of each flag."""

    def __init__(
        self, *, data: dict[str, Any], file: str, text: str, marks: dict[tuple[Key, ...], Word]
    ) -> None:
        super().__init__(data=data, file=file, text=text)
        self.marks = marks

    def locate(self, path: tuple[Key, ...] = (), *, value: bool = False) -> Location:
        """Where the flag stands; its nearest parent, or the command, when it does not."""
        while path and path not in self.marks:
            path = path[:-1]
        word = self.marks.get(path)
        if word is None:
            return Location(file=self.file, line=1, column=1)
        return Location(file=self.file, line=word.line, column=word.column)


_SEPARATORS = ("&&", "||", ";;", ";", "|&", "|", "&", "\n", "(", ")")
_KEYWORDS = {
    "if", "then", "else", "elif", "fi", "for", "do", "done", "while", "until", "case", "esac",
    "in", "{", "}", "!", "function", "select", "time",
}  # fmt: skip
_ASSIGN = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\+?)=")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SBATCH = re.compile(r"^#SBATCH\s+--(nodes|gpus-per-node|gres)[= ](\S+)", re.MULTILINE)
_SLURM = {
    "nodes": ("SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
    "gpus-per-node": ("SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"),
    "gres": ("SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"),
}
_HEREDOC = re.compile(r"<<-?\s*(['\"]?)([A-Za-z_][A-Za-z0-9_]*)\1")
_REDIRECT = re.compile(r"(?:\d*|&)(?:<<<|>>|>&|<&|>|<)")
_ARRAY = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\[[@*]\]\}")


def parse_script(text: str, *, file: str) -> Script:
    """The simple commands of a script, in order, with the variables known at each.

    Raises :class:`InputError` for text that is no script (an unclosed quote, far too long).
    """
    parser = _Parser(text, file)
    return Script(parser.run(), parser.files)


class _Parser:
    def __init__(self, text: str, file: str) -> None:
        self.text = text.replace("\r\n", "\n")
        self.file = file
        self.place = 0
        self.variables: dict[str, Word] = {}
        self.arrays: dict[str, list[Word]] = {}
        self.files: dict[str, Written] = {}
        self.target: str | None = None
        self.body: Written | None = None
        self.count = 0
        self.starts = [0, *(m.end() for m in re.finditer("\n", self.text))]
        self.row = 0
        for match in _SBATCH.finditer(self.text):
            line, column = self._position(match.start(1))
            count = match[2].rsplit(":", 1)[-1]
            if count.isdigit():
                word = Word(count, line, column)
                for name in _SLURM[match[1]]:
                    self.variables[name] = word

    def run(self) -> list[Command]:
        commands: list[Command] = []
        words: list[Word] = []
        while True:
            try:
                token = self._token()
            except InputError:
                if not commands:
                    raise
                token = None  # the commands before an odd quote are still understood
            if isinstance(token, Word):
                words.append(token)
                self.count += 1
                if self.count > MAX_WORDS:
                    raise InputError("this script is too long to be a job", location=self._at(0))
                continue
            if isinstance(token, list):
                words += token
                continue
            if words:
                self._keep(words)
                command = self._command(words)
                if command is not None:
                    commands.append(command)
                words = []
            self.target = self.body = None
            if token is None:
                return commands

    def _at(self, place: int) -> Location:
        line, column = self._position(place)
        return Location(file=self.file, line=line, column=column)

    def _position(self, place: int) -> tuple[int, int]:
        if self.starts[self.row] > place:
            self.row = 0
        while self.row + 1 < len(self.starts) and self.starts[self.row + 1] <= place:
            self.row += 1
        return self.row + 1, place - self.starts[self.row] + 1

    def _command(self, words: list[Word]) -> Command | None:
        """Assignments become variables; what is left is a command."""
        env: dict[str, Word] = {}
        index = 0
        while index < len(words):
            word = words[index]
            match = _ASSIGN.match(word.text)
            if word.text in ("export", "declare", "local", "readonly", "set", "typeset"):
                index += 1
                continue
            if word.text in _KEYWORDS:
                index += 1
                continue
            if match is None:
                break
            value = word.text[match.end() :]
            old = self.variables.get(match[1])
            if match[2] and old is not None:
                value = old.text + value
            env[match[1]] = Word(value, word.line, word.column, word.unresolved)
            index += 1
        rest = words[index:]
        if not rest:
            self.variables.update(env)
            return None
        if words[0].text == "for" and len(words) > 1:
            return None
        return Command(rest, {**self.variables, **env})

    def _token(self) -> Word | list[Word] | str | None:
        """The next word, the words of an array, a separator, or None at the end."""
        text = self.text
        while self.place < len(text):
            char = text[self.place]
            if char in " \t\r":
                self.place += 1
            elif text.startswith("\\\n", self.place):
                self.place += 2
            elif char == "#":
                end = text.find("\n", self.place)
                self.place = len(text) if end < 0 else end
            elif text.startswith("<<", self.place) and not text.startswith("<<<", self.place):
                self._heredoc()
            elif redirect := _REDIRECT.match(text, self.place):
                self.place = redirect.end()
                self._skip_blanks()
                if self.place < len(text) and text[self.place] not in "\n;|&":
                    target = self._word()
                    if redirect[0] in (">", "1>", ">>") and isinstance(target, Word):
                        self.target = target.text
            else:
                for separator in _SEPARATORS:
                    if text.startswith(separator, self.place):
                        self.place += len(separator)
                        return separator
                return self._word()
        return None

    def _skip_blanks(self) -> None:
        while self.place < len(self.text) and self.text[self.place] in " \t":
            self.place += 1

    def _heredoc(self) -> None:
        match = _HEREDOC.match(self.text, self.place)
        if match is None:
            self.place += 2
            return
        end = re.compile(rf"^\s*{re.escape(match[2])}\s*$", re.MULTILINE)
        line = self.text.find("\n", match.end())
        found = end.search(self.text, line + 1) if line >= 0 else None
        # the rest of the line belongs to the command, the body to nobody
        if found is not None:
            head = self.text[: line + 1]
            body = self.text[line + 1 : found.end()]
            inner = self.text[line + 1 : found.start()]
            blank = "\n" * self.text.count("\n", 0, line + 1)
            filled = not match[1]
            self.body = Written(blank + (self._expanded(inner) if filled else inner), filled)
            self.text = head + re.sub(r"[^\n]", " ", body) + self.text[found.end() :]
        self.place = match.end()

    def _expanded(self, body: str) -> str:
        """A here-document with its variables filled in; what only running would tell stays."""
        inner = _Parser(body, self.file)
        inner.variables = self.variables
        out: list[str] = []
        while inner.place < len(inner.text):
            char = inner.text[inner.place]
            start = inner.place
            if char in "$`":
                piece, unknown = inner._expand()
                out.append(inner.text[start : inner.place] if unknown else piece)
            else:
                out.append(char)
                inner.place += 1
        return "".join(out)

    def _keep(self, words: list[Word]) -> None:
        """``cat > FILE << EOF`` and ``tee FILE << EOF`` write a file."""
        name = words[0].text
        target = self.target if name == "cat" else words[-1].text if name == "tee" else None
        if target is not None and self.body is not None:
            self.files[target] = self.body

    def _word(self) -> Word | list[Word]:
        text, start = self.text, self.place
        line, column = self._position(start)
        assign = _ASSIGN.match(text, start)
        if assign is not None and text[assign.end() : assign.end() + 1] == "(":
            return self._array(assign)
        out: list[str] = []
        unresolved = False
        quoted = False
        opened = 0
        array: list[Word] | None = None
        while self.place < len(text):
            char = text[self.place]
            if char in " \t\n;|&()<>" and not (char in "<>" and not out):
                if char == "(" and out:
                    opened += 1
                elif char != ")" or not opened:
                    break
                else:
                    opened -= 1
                out.append(char)
                self.place += 1
                continue
            if text.startswith("\\\n", self.place):
                self.place += 2
            elif char == "\\" and self.place + 1 < len(text):
                out.append(text[self.place + 1])
                self.place += 2
            elif char == "'":
                end = text.find("'", self.place + 1)
                if end < 0:
                    raise self._unclosed("'", start)
                out.append(text[self.place + 1 : end])
                self.place, quoted = end + 1, True
            elif char == '"':
                piece, bad, words = self._double()
                out.append(piece)
                unresolved |= bad
                quoted = True
                if words is not None:
                    array = words
            elif char in "$`":
                match = _ARRAY.match(text, self.place)
                if match is not None and match[1] in self.arrays:
                    array = list(self.arrays[match[1]])
                    self.place = match.end()
                    continue
                piece, bad = self._expand()
                out.append(piece)
                unresolved |= bad
            else:
                out.append(char)
                self.place += 1
        if array is not None and not "".join(out):
            return array
        value = "".join(out)
        plain = text[start : self.place]
        if not quoted and plain.startswith("$") and not unresolved and re.search(r"\s", value):
            return [Word(part, line, column) for part in value.split()]
        if not quoted and not value and plain.startswith("$") and not unresolved:
            return []
        return Word(plain if unresolved else value, line, column, unresolved)

    def _array(self, assign: re.Match[str]) -> list[Word]:
        self.place = assign.end() + 1
        words: list[Word] = list(self.arrays.get(assign[1], [])) if assign[2] else []
        while self.place < len(self.text):
            while self.place < len(self.text) and self.text[self.place] in " \t\n":
                self.place += 1
            if self.place >= len(self.text) or self.text[self.place] == ")":
                self.place += 1
                break
            token = self._token()
            if isinstance(token, Word):
                words.append(token)
            elif isinstance(token, list):
                words += token
            elif token is None or token == ")":
                break
        self.arrays[assign[1]] = words
        return []

    def _unclosed(self, quote: str, start: int) -> InputError:
        return InputError(
            f"the quote {quote} is not closed", location=self._at(start), remedy="close the quote"
        )

    def _double(self) -> tuple[str, bool, list[Word] | None]:
        text, start = self.text, self.place
        self.place += 1
        out: list[str] = []
        unresolved = False
        array: list[Word] | None = None
        while self.place < len(text):
            char = text[self.place]
            if char == '"':
                self.place += 1
                return "".join(out), unresolved, array
            if char == "\\" and self.place + 1 < len(text):
                follower = text[self.place + 1]
                out.append(
                    "" if follower == "\n" else follower if follower in '"\\$`' else "\\" + follower
                )
                self.place += 2
            elif char in "$`":
                match = _ARRAY.match(text, self.place)
                if match is not None and match[1] in self.arrays:
                    array = list(self.arrays[match[1]])
                    self.place = match.end()
                    continue
                piece, bad = self._expand()
                out.append(piece)
                unresolved |= bad
            else:
                out.append(char)
                self.place += 1
        raise self._unclosed('"', start)

    def _expand(self) -> tuple[str, bool]:
        """What stands after a dollar or a backtick: its value, and whether it is unknown."""
        text, start = self.text, self.place
        if text.startswith("$((", start):
            end = self._closing(start + 1)
            self.place = end + 1
            value = _arithmetic(self._filled(text[start + 3 : end - 1]))
            return (str(value), False) if value is not None else ("", True)
        if text.startswith("$(", start):
            end = self._closing(start + 1)
            self.place = end + 1
            return self._substitution(text[start + 2 : end])
        if text[start] == "`":
            end = text.find("`", start + 1)
            end = len(text) - 1 if end < 0 else end
            self.place = end + 1
            return self._substitution(text[start + 1 : end])
        if text.startswith("${", start):
            end = text.find("}", start)
            end = len(text) - 1 if end < 0 else end
            self.place = end + 1
            inner = text[start + 2 : end]
            match = _NAME.match(inner)
            if match is None:
                return "", True
            known = self.variables.get(match[0])
            rest = inner[match.end() :]
            if known is not None and not rest:
                return known.text, known.unresolved
            if rest.startswith((":-", ":=")) and known is None:
                return rest[2:].strip("\"'"), False
            if rest.startswith((":-", ":=")) and known is not None:
                return known.text, known.unresolved
            if rest.startswith("-") and known is None:
                return rest[1:], False
            return "", True
        match = _NAME.match(text, start + 1)
        if match is None:
            self.place = start + 2
            if start + 1 < len(text) and text[start + 1] in "@*#?0123456789$!":
                return "", True
            self.place = start + 1
            return "$", False
        self.place = match.end()
        known = self.variables.get(match[0])
        return (known.text, known.unresolved) if known is not None else ("", True)

    def _closing(self, opening: int) -> int:
        depth = 0
        for place in range(opening, len(self.text)):
            if self.text[place] == "(":
                depth += 1
            elif self.text[place] == ")":
                depth -= 1
                if depth == 0:
                    return place
        return len(self.text) - 1

    def _substitution(self, inner: str) -> tuple[str, bool]:
        inner = self._filled(inner.strip())
        if inner.startswith("expr "):
            value = _arithmetic(inner[5:].replace("\\*", "*"))
            if value is not None:
                return str(value), False
        if inner.startswith("echo "):
            return inner[5:].strip().strip("\"'"), "$" in inner
        return "", True

    def _filled(self, inner: str) -> str:
        """Variables of the script in an expression; inside ``$((...))`` the dollar is optional."""

        def value(match: re.Match[str]) -> str:
            known = self.variables.get(match[1] or match[2])
            return match[0] if known is None or known.unresolved else known.text

        filled = re.sub(
            r"\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?|\b([A-Za-z_][A-Za-z0-9_]*)\b", value, inner
        )
        return filled if not filled.startswith("expr") else "expr " + filled[4:].lstrip()


_SUM = re.compile(r"\s*(\d+|[-+*/%()])")


def _arithmetic(text: str) -> int | None:
    """Whole numbers with + - * / % and brackets; None for anything else."""
    tokens: list[str] = []
    place = 0
    text = text.strip()
    while place < len(text):
        match = _SUM.match(text, place)
        if match is None or len(tokens) > 200:
            return None
        tokens.append(match[1])
        place = match.end()
    try:
        value, rest = _sum(tokens)
    except (ValueError, ZeroDivisionError, IndexError, RecursionError):
        return None
    return value if not rest and abs(value) < 10**15 else None


def _sum(tokens: list[str]) -> tuple[int, list[str]]:
    value, tokens = _product(tokens)
    while tokens and tokens[0] in "+-":
        other, rest = _product(tokens[1:])
        value = value + other if tokens[0] == "+" else value - other
        tokens = rest
    return value, tokens


def _product(tokens: list[str]) -> tuple[int, list[str]]:
    value, tokens = _atom(tokens)
    while tokens and tokens[0] in "*/%":
        other, rest = _atom(tokens[1:])
        if tokens[0] == "*":
            value *= other
        else:
            value = value // other if tokens[0] == "/" else value % other
        if abs(value) > 10**15:
            raise ValueError
        tokens = rest
    return value, tokens


def _atom(tokens: list[str]) -> tuple[int, list[str]]:
    if tokens[0] == "-":
        value, rest = _atom(tokens[1:])
        return -value, rest
    if tokens[0] == "(":
        value, rest = _sum(tokens[1:])
        if not rest or rest[0] != ")":
            raise ValueError
        return value, rest[1:]
    return int(tokens[0]), tokens[1:]


# --- words to flags ------------------------------------------------------------------------------

_FLAG = re.compile(r"--?([A-Za-z][A-Za-z0-9_.\-]*)(?:=(.*))?\Z", re.DOTALL)
_PLACEHOLDER = re.compile(r"<[A-Za-z][\w .-]*>\Z|xxx+(\.xxx+)*\Z")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\Z")


def parse_flags(
    words: list[Word],
) -> tuple[dict[str, Any], dict[tuple[Key, ...], Word], list[Word]]:
    """``--key value ...`` as data, the place of each key, and the words that belong to none.

    Hyphens in a flag become underscores; a flag without a value is true; several values are a
    list; ``--a.b 1`` nests. A flag given twice keeps its last value, as every parser does.
    """
    data: dict[str, Any] = {}
    marks: dict[tuple[Key, ...], Word] = {}
    loose: list[Word] = []
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        match = (
            None if word.unresolved and not word.text.startswith("-") else _FLAG.match(word.text)
        )
        if match is None or _NUMBER.match(word.text):
            loose.append(word)
            continue
        values: list[Word] = []
        if match[2] is not None:
            values = [Word(match[2], word.line, word.column, word.unresolved)]
        else:
            while index < len(words) and not _is_flag(words[index]):
                values.append(words[index])
                index += 1
        path = tuple(match[1].replace("-", "_").split("."))
        _store(data, path, _value(values))
        for length in range(1, len(path) + 1):
            marks[path[:length]] = word
    return data, marks, loose


def _is_flag(word: Word) -> bool:
    return word.text.startswith("-") and len(word.text) > 1 and not _NUMBER.match(word.text)


def _store(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for step in path[:-1]:
        inner = data.get(step)
        if not isinstance(inner, dict):
            inner = {}
            data[step] = inner
        data = inner
    data[path[-1]] = value


def _value(words: list[Word]) -> Any:
    if not words:
        return True
    values = [scalar(word) for word in words]
    return values[0] if len(values) == 1 else values


def scalar(word: Word) -> Any:
    """One word as a value: a number, a boolean, JSON in braces or brackets, or text."""
    if word.unresolved:
        return Unresolved(word.text)
    text = word.text
    if _PLACEHOLDER.match(text):
        return Unresolved(text)
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("none", "null"):
        return None
    if _NUMBER.match(text) and len(text) < 40:
        number = float(text)
        plain = re.fullmatch(r"[-+]?\d+", text)
        return int(text) if plain else number
    if text[:1] in "{[" and len(text) < 100_000:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            if text.startswith("[") and text.endswith("]"):
                parts = [part.strip().strip("\"'") for part in text[1:-1].split(",")]
                return [part for part in parts if part]
    return text
