"""``ftplan label``: label failures one by one, saved after every answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftplan.cli.output import FormatOption, emit, note, screen_width, write_file
from ftplan.cli.results import (
    ColumnsOption,
    MapOption,
    ThresholdOption,
    ToolOption,
    kind_overrides,
    read_options,
)
from ftplan.errors import InputError, Location

if TYPE_CHECKING:
    from ftplan.evals.labelled_file import LabelledFile
    from ftplan.evals.labelling import Session, Turn
    from ftplan.failures import FailuresFile, State
    from ftplan.results import EvalRun


def label(
    results: Annotated[
        Path | None,
        typer.Argument(
            help="Result file of an evaluation tool, or a failures file.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Failures file to write, or to go on with."
        ),
    ] = Path("failures.yaml"),
    annotator: Annotated[
        str,
        typer.Option(metavar="NAME", help="Who labels; kept with each label.", show_default=False),
    ] = "",
    redact: Annotated[
        bool, typer.Option("--redact", help="Write ids, kinds and checks only, no texts.")
    ] = False,
    agreement: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="A B", help="Report how far two labelled files agree.", show_default=False
        ),
    ] = None,
    columns: ColumnsOption = None,
    threshold: ThresholdOption = None,
    tool: ToolOption = "",
    map: MapOption = None,
    format: FormatOption = "table",
) -> int:
    """Label failures one by one in the terminal; saved after each answer, resumable."""
    if agreement is not None and all(agreement):
        return _agreement(agreement[0], agreement[1], format)
    if results is None:
        raise InputError(
            "no results to label",
            remedy="ftplan label results.json -o failures.yaml",
        )
    from ftplan import evals
    from ftplan.evals.labelling import start_session

    by_hand = _failures_file(results) if not tool and not columns else None
    if by_hand is not None:
        run, state = evals.run_of(by_hand, str(results)), by_hand.state
    else:
        run = evals.read_results(results, read_options(columns, threshold, tool))
        state = evals.state_of(run)
    for said in run.notes:
        note(f"note: {said}")
    sheet = _Sheet(output, run, state, annotator, redact=redact)
    session = start_session(
        run,
        labelled=sheet.file.labels,
        annotator=annotator or None,
        overrides=kind_overrides(map),
    )
    session = _ask(session, sheet)
    if format in ("json", "yaml"):
        _emit_data(_counts(session, run, output), format)
    else:
        emit(_summary(session, run, output))
    return 0


def _failures_file(path: Path) -> FailuresFile | None:
    """The file as a failures file, where it is one: its rows can be labelled too."""
    from ftplan.files.document import read_document
    from ftplan.files.failures import looks_like_failures, parse_failures

    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        return None
    try:
        document = read_document(path)
    except InputError:
        if path.suffix.lower() == ".json":
            return None  # a tool's JSON may hold what no failures file does
        raise
    return parse_failures(document) if looks_like_failures(document) else None


class _Sheet:
    """The failures file on disk."""

    def __init__(
        self, path: Path, run: EvalRun, state: State, annotator: str, *, redact: bool
    ) -> None:
        from ftplan.evals.labelled_file import open_labelled, start_text
        from ftplan.evals.labelling import conflicts

        self.path = path
        self.redact = redact
        on_disk = _text(path)
        self.on_disk = on_disk
        text = on_disk
        if text is None:
            text = start_text(state, source=Path(run.source).name)
        self.file: LabelledFile = open_labelled(text, str(path))
        clashing = conflicts(run, self.file)
        if clashing:
            raise InputError(
                f"{clashing[0]!r} is another item in this file than in {run.source}",
                location=Location(file=str(path)),
                remedy="the tests were renumbered: write to another file with -o",
            )
        others = [name for name in self.file.annotators if annotator and name != annotator]
        if others:
            raise InputError(
                f"the file holds labels of {', '.join(others)}",
                location=Location(file=str(path)),
                remedy=f"give {annotator} a file of their own with -o, and compare the two with "
                "ftplan label --agreement A.yaml B.yaml",
            )

    def save(self, session: Session) -> None:
        """Write the labels of this session into the file, whole or not at all."""
        from ftplan.evals.labelled_file import open_labelled
        from ftplan.evals.labelling import entries

        current = _text(self.path)
        if current is not None and current != self.on_disk:
            note(f"note: {self.path} was changed by someone else; the labels go into what is there")
            self.file = open_labelled(current, str(self.path))
        text = self.file.with_labels(entries(session, redact=self.redact))
        write_file(self.path, text)
        self.on_disk = text


def _text(path: Path) -> str | None:
    """The file's text, or None where there is none yet."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}",
            location=Location(file=str(path)),
            remedy="write to another file with -o",
        ) from None


def _ask(session: Session, sheet: _Sheet) -> Session:
    """Show, read a line, save; until the end of the failures, of the input, or `q`."""
    from ftplan.evals.labelling import answer

    width = screen_width()
    if session.row is None:
        return session
    show = "row"
    while True:
        _show(session, show, width)
        line = _line()
        if line is None:
            return session
        turn: Turn = answer(session, line)
        session, show = turn.session, turn.show
        if turn.message:
            note(turn.message)
        if turn.changed:
            sheet.save(session)
        if turn.done:
            return session
        if session.row is None:
            note("that was the last one; u undoes, Enter ends")
            line = _line()
            if line is None or line.strip() not in ("u", "undo"):
                return session
            turn = answer(session, line)
            session, show = turn.session, turn.show
            if turn.changed:
                sheet.save(session)


def _show(session: Session, show: str, width: int) -> None:
    from ftplan.advise.taxonomy import KINDS
    from ftplan.evals.labelling import CLASSES, HELP
    from ftplan.render.labelling import failure_screen, kinds_screen

    row, suggestion = session.row, session.suggestion
    if row is None or suggestion is None or show == "nothing":
        return
    if show == "kinds":
        kinds = {
            name: [kind for kind, known in KINDS.items() if known.classes[0] == name]
            for name in CLASSES
        }
        note(kinds_screen(kinds, HELP, width=width))
        return
    known = session.labels.get(row.id)
    note(
        failure_screen(
            row,
            suggestion,
            number=session.already + session.position + 1,
            total=session.already + len(session.rows),
            labelled=session.already + session.labelled,
            shortlist=session.shortlist,
            note=known.note if known else None,
            whole=show == "more",
            width=width,
        )
    )


def _line() -> str | None:
    """One line of input; None at its end, or when the user interrupts: everything is saved."""
    sys.stderr.write("> ")
    sys.stderr.flush()
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        line = ""
    except UnicodeDecodeError:
        return "?"
    if not line:
        note("")
        return None
    return line.rstrip("\n")


def _emit_data(data: object, format: str) -> None:
    from ftplan.render import json, yaml

    emit(json.render(data) if format == "json" else yaml.render(data))


def _counts(session: Session, run: EvalRun, path: Path) -> dict[str, object]:
    return {
        "schema_version": 1,
        "file": str(path),
        "failures": len(run.failures),
        "labelled": session.already + session.labelled,
        "labelled_now": session.labelled,
        "errors": len(run.errors),
    }


def _summary(session: Session, run: EvalRun, path: Path) -> str:
    total = len(run.failures)
    done = session.already + session.labelled
    if not total:
        return f"{run.source}: no failures among {len(run.rows)} rows"
    lines = [f"{done} of {total} failures labelled in {path}"]
    if run.errors:
        lines.append(f"{len(run.errors)} rows without an answer (errors) are not for labelling")
    if done < total:
        lines.append("the same command goes on where you stopped")
    else:
        lines.append(f"next: ftplan advise {path}")
    return "\n".join(lines)


def _agreement(first: Path, second: Path, format: str) -> int:
    """Report how far two labelled files agree."""
    from ftplan.evals.labelled_file import open_labelled
    from ftplan.evals.labelling import agreement

    files = []
    for path in (first, second):
        text = _text(path)
        if text is None:
            raise InputError("no such file", location=Location(file=str(path)))
        files.append(open_labelled(text, str(path)))
    names = [
        file.annotators[0] if len(file.annotators) == 1 else path.name
        for file, path in zip(files, (first, second), strict=True)
    ]
    if names[0] == names[1]:
        names = [str(first), str(second)]
    found = agreement(files[0], files[1], names)
    if format in ("json", "yaml"):
        _emit_data(found, format)
    else:
        from ftplan.render.labelling import agreement_text

        emit(agreement_text(found, width=screen_width()))
    return 0 if found.items else 2
