"""Labelling failures one by one: the session without the terminal.

A :class:`Session` is a value; :func:`answer` takes one line of input and returns the next session
with what to say. The door prints, reads and saves; this module never does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Any, get_args

from ftplan.advise.statistics import cohen_kappa, gwet_ac1
from ftplan.advise.taxonomy import KINDS, TESTS, kind_of
from ftplan.dataclass import dataclass
from ftplan.errors import InputError
from ftplan.evals.convert import failure_of, redacted
from ftplan.evals.labelled_file import LabelledFile
from ftplan.evals.suggest import suggest
from ftplan.failures import FailureClass
from ftplan.results import Agreement, EvalRun, ResultRow, Suggestion

__all__ = [
    "Label",
    "Session",
    "Turn",
    "agreement",
    "answer",
    "conflicts",
    "entries",
    "start_session",
]

CLASSES: tuple[str, ...] = get_args(FailureClass)
SHORTLIST = 9
_COMMON = (
    "missing_private_knowledge", "hallucinated_fact", "irrelevant_but_correct", "wrong_format",
    "inconsistent_instruction_following", "reasoning_error", "wrong_label", "edge_case",
    "wrong_tone_style",
)  # fmt: skip
"""Offered under a number while the session has no labels of its own to learn from."""

HELP = (
    "Enter  accept the suggestion        1-9    a kind of the list\n"
    "NAME   a kind by name or a part     +NAME CLASS  a kind of your own\n"
    "n TEXT note on this failure         t TEST=pass|fail  a test you ran\n"
    "s skip   u undo   m more   ? kinds  q save and quit"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What a person said about one failure. ``kind`` is None for a note without a label yet."""

    kind: str | None = None
    failure_class: str | None = None
    """Only for a kind that is not in the list."""
    note: str | None = None
    tests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Where the labelling stands."""

    rows: tuple[ResultRow, ...]
    """The failures to label in this session, in order."""
    suggestions: tuple[Suggestion, ...]
    """One for each row."""
    already: int = 0
    """Failures that were labelled before this session."""
    annotator: str | None = None
    position: int = 0
    labels: Mapping[str, Label] = field(default_factory=dict)
    """By row id, in the order given."""
    history: tuple[tuple[int, Mapping[str, Label]], ...] = ()
    """(position, labels) before each answer, for undo."""
    skipped: int = 0

    @property
    def row(self) -> ResultRow | None:
        """The failure on the screen, or None at the end."""
        return self.rows[self.position] if self.position < len(self.rows) else None

    @property
    def suggestion(self) -> Suggestion | None:
        """What the checks say about it."""
        return self.suggestions[self.position] if self.position < len(self.rows) else None

    @property
    def labelled(self) -> int:
        """Failures labelled in this session."""
        return sum(label.kind is not None for label in self.labels.values())

    @property
    def shortlist(self) -> tuple[str, ...]:
        """Kinds under the numbers: the suggestion, what was used here, then common ones."""
        used = Counter(label.kind for label in self.labels.values() if label.kind)
        first = [self.suggestion.kind] if self.suggestion and self.suggestion.kind else []
        ranked = [*first, *(kind for kind, _ in used.most_common()), *_COMMON]
        return tuple(dict.fromkeys(ranked))[:SHORTLIST]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The outcome of one line of input."""

    session: Session
    message: str = ""
    show: str = "row"
    """What the screen shows next: `row`, `more` (nothing cut), `kinds`, `nothing`."""
    changed: bool = False
    """The labels changed: save."""
    done: bool = False


def start_session(
    run: EvalRun,
    *,
    labelled: Mapping[str, str] | None = None,
    annotator: str | None = None,
    overrides: Mapping[str, str] | None = None,
) -> Session:
    """A session over the failing rows of a run that are not labelled yet."""
    known = labelled or {}
    rows = tuple(row for row in run.failures if row.id not in known)
    return Session(
        rows=rows,
        suggestions=tuple(suggest(row, overrides) for row in rows),
        already=len(run.failures) - len(rows),
        annotator=annotator,
    )


def conflicts(run: EvalRun, file: LabelledFile) -> tuple[str, ...]:
    """Ids under which the file holds a label of another item than the run: the question differs.

    Ids that a tool counts by position shift when a test is added above.
    """
    asked = {row.id: row.input for row in run.failures}
    return tuple(
        name
        for entry in file.entries
        if (name := str(entry.get("id"))) in asked
        and entry.get("kind")
        and entry.get("input")
        and str(entry["input"]).split() != asked[name].split()
    )


def answer(session: Session, line: str) -> Turn:
    """The session after one line of input."""
    text = line.strip()
    row = session.row
    if text in ("q", "quit", "exit"):
        return Turn(session=session, show="nothing", done=True)
    if text in ("u", "undo"):
        return _undo(session)
    if row is None:
        return Turn(
            session=session, message="no failures are left; u undoes, q ends", show="nothing"
        )
    if text in ("?", "kinds", "help", "h"):
        return Turn(session=session, show="kinds")
    if text in ("m", "more"):
        return Turn(session=session, show="more")
    if text in ("s", "skip"):
        return Turn(session=_moved(session, session.labels, skipped=1))
    if text == "n" or text.startswith("n "):
        return _noted(session, row, text[1:].strip())
    if text == "t" or text.startswith("t "):
        return _tested(session, row, text[1:].strip())
    try:
        kind, failure_class = _kind(session, text)
    except InputError as error:
        said = f"{error.message}. {error.remedy}" if error.remedy else error.message
        return Turn(session=session, message=said, show="nothing")
    known = session.labels.get(row.id, Label())
    label = replace(known, kind=kind, failure_class=failure_class)
    return Turn(
        session=_moved(session, {**session.labels, row.id: label}),
        message=f"{row.id}: {kind}",
        changed=True,
    )


def _moved(session: Session, labels: Mapping[str, Label], skipped: int = 0) -> Session:
    return replace(
        session,
        position=session.position + 1,
        labels=labels,
        history=(*session.history, (session.position, session.labels)),
        skipped=session.skipped + skipped,
    )


def _undo(session: Session) -> Turn:
    if not session.history:
        return Turn(
            session=session,
            message="nothing to undo in this session; labels of earlier ones are in the file",
            show="nothing",
        )
    *earlier, (position, labels) = session.history
    changed = labels != session.labels
    undone = replace(session, position=position, labels=labels, history=tuple(earlier))
    return Turn(session=undone, message="undone", changed=changed)


def _noted(session: Session, row: ResultRow, text: str) -> Turn:
    if not text:
        return Turn(session=session, message="n TEXT: what to note?", show="nothing")
    known = session.labels.get(row.id, Label())
    note = f"{known.note}; {text}" if known.note else text
    labels = {**session.labels, row.id: replace(known, note=note)}
    return _kept(session, labels, "noted; now the kind")


def _tested(session: Session, row: ResultRow, text: str) -> Turn:
    name, _, result = (part.strip() for part in text.partition("="))
    if name not in TESTS or result not in ("pass", "fail"):
        return Turn(
            session=session,
            message=f"t TEST=pass or t TEST=fail, TEST one of {', '.join(TESTS)}",
            show="nothing",
        )
    known = session.labels.get(row.id, Label())
    labels = {**session.labels, row.id: replace(known, tests={**known.tests, name: result})}
    return _kept(session, labels, f"{name}: {result}; now the kind")


def _kept(session: Session, labels: Mapping[str, Label], message: str) -> Turn:
    """Labels changed, the same failure stays on the screen."""
    history = (*session.history, (session.position, session.labels))
    kept = replace(session, labels=labels, history=history)
    return Turn(session=kept, message=message, show="nothing", changed=True)


def _kind(session: Session, text: str) -> tuple[str, str | None]:
    """(kind, class of an own kind) that a line names."""
    if not text:
        suggestion = session.suggestion
        if suggestion is None or suggestion.kind is None:
            raise InputError("there is no suggestion to accept", remedy="Name a kind; ? lists them")
        return suggestion.kind, None
    if text.isdigit():
        number = int(text)
        if not 1 <= number <= len(session.shortlist):
            raise InputError(f"there is no number {number}", remedy="? lists all kinds")
        kind = session.shortlist[number - 1]
        return kind, _own_class(session, kind)
    if text.startswith("+"):
        return _own_kind(text[1:])
    kind = _known_kind(session, text)
    return kind, _own_class(session, kind)


def _own_class(session: Session, kind: str) -> str | None:
    """The class that the user gave a kind of their own earlier in this session."""
    given = (each.failure_class for each in session.labels.values() if each.kind == kind)
    return next((each for each in given if each), None)


def _own_kind(text: str) -> tuple[str, str]:
    name, _, given = text.strip().partition(" ")
    chosen = [each for each in CLASSES if given.strip() and each.startswith(given.strip().lower())]
    if not re.fullmatch(r"[A-Za-z][\w-]*", name) or len(chosen) != 1:
        raise InputError(
            "a kind of your own needs a name and a class",
            remedy=f"+NAME CLASS, CLASS one of {', '.join(CLASSES)}",
        )
    return name, chosen[0]


def _known_kind(session: Session, text: str) -> str:
    wanted = re.sub(r"[\s-]+", "_", text.lower())
    row = kind_of(wanted, None)
    if row is not None:
        return wanted
    own = [label.kind for label in session.labels.values() if label.kind]
    names = tuple(dict.fromkeys([*KINDS, *own]))
    matching = [name for name in names if name.startswith(wanted)] or [
        name for name in names if wanted in name
    ]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise InputError(f"{text!r} could be {', '.join(matching)}", remedy="Type more of it")
    raise InputError(
        f"{text!r} is no kind of the list", remedy="? lists them; +NAME CLASS adds your own"
    )


def entries(session: Session, *, redact: bool = False) -> list[dict[str, Any]]:
    """The labelled failures of this session as rows of a failures file."""
    rows = {row.id: row for row in session.rows}
    return [
        _entry(rows[name], label, session.annotator, redact=redact)
        for name, label in session.labels.items()
        if label.kind is not None
    ]


def _entry(row: ResultRow, label: Label, annotator: str | None, *, redact: bool) -> dict[str, Any]:
    failure = failure_of(row)
    if redact:
        failure = redacted(failure)
    own_class = label.failure_class if kind_of(label.kind, None) is None else None
    values: dict[str, Any] = {
        "id": row.id,
        "kind": label.kind,
        "class": own_class,
        "count": 1,
        "description": failure.description,
        "input": failure.input,
        "output": failure.output,
        "expected": failure.expected,
        "context": list(failure.context) if failure.context else None,
        "tests": {**(failure.tests or {}), **label.tests} or None,
        "checks": list(failure.checks) if failure.checks else None,
        "annotator": annotator,
        "note": None if redact else label.note,
    }
    return {key: value for key, value in values.items() if value is not None}


def agreement(
    first: LabelledFile, second: LabelledFile, names: Sequence[str] = ("A", "B")
) -> Agreement:
    """How far two annotators agree on the failures that both have labelled."""
    one, two = first.labels, second.labels
    common = [name for name in one if name in two]
    kinds = [(one[name], two[name]) for name in common]
    classes = [(_class_name(first, a, name), _class_name(second, b, name))
               for name, (a, b) in zip(common, kinds, strict=True)]  # fmt: skip
    return Agreement(
        names=(names[0], names[1]),
        items=len(common),
        only_first=len(one) - len(common),
        only_second=len(two) - len(common),
        same_kind=sum(a == b for a, b in kinds),
        same_class=sum(a == b for a, b in classes),
        kappa_kind=cohen_kappa([a for a, _ in kinds], [b for _, b in kinds]),
        kappa_class=cohen_kappa([a for a, _ in classes], [b for _, b in classes]),
        ac1_kind=gwet_ac1([a for a, _ in kinds], [b for _, b in kinds]),
        disagreements=tuple(
            (name, a, b) for name, (a, b) in zip(common, kinds, strict=True) if a != b
        ),
    )


def _class_name(file: LabelledFile, kind: str, name: str) -> str:
    """The class of a label; a kind of one's own without a class is a class by itself."""
    given = next((e.get("class") for e in file.entries if str(e.get("id")) == name), None)
    row = kind_of(kind, None)
    if given:
        return str(given)
    return row.classes[0] if row is not None else kind
