"""Labelling: a session as a value, a file that keeps what people wrote, a terminal around them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftplan.cli.label import label
from ftplan.cli.output import write_file
from ftplan.errors import InputError
from ftplan.evals.labelled_file import open_labelled, start_text
from ftplan.evals.labelling import Session, agreement, answer, entries, start_session
from ftplan.failures import State
from ftplan.files.failures import read_failures
from ftplan.render.labelling import failure_screen, visible
from ftplan.results import Check, EvalRun, ResultRow, Suggestion


def a_run(count: int = 4) -> EvalRun:
    """A run with this many failures, every other one with a suggestion."""
    rows = tuple(
        ResultRow(
            id=f"t-{number}",
            item=str(number),
            passed=False,
            input=f"question {number}",
            output="line one\nline two",
            expected="yes",
            contexts=("a passage",),
            checks=(Check(name="is-json" if number % 2 == 0 else "em", passed=False),),
        )
        for number in range(count)
    )
    passing = ResultRow(id="ok", item="ok", passed=True)
    crashed = ResultRow(id="dead", item="dead", error="timeout")
    return EvalRun(tool="t", source="r.json", rows=(*rows, passing, crashed))


def play(session: Session, *lines: str) -> Session:
    """The session after these lines."""
    for line in lines:
        session = answer(session, line).session
    return session


def kinds(session: Session) -> dict[str, Any]:
    """Id -> kind of what would be written."""
    return {row["id"]: row["kind"] for row in entries(session)}


def test_only_failures_are_asked() -> None:
    """Passing rows and crashes are not for labelling."""
    session = start_session(a_run())
    assert [row.id for row in session.rows] == ["t-0", "t-1", "t-2", "t-3"]


def test_enter_accepts_only_a_suggestion() -> None:
    """Enter takes the suggestion; without one it is refused and nothing moves."""
    session = play(start_session(a_run()), "")
    assert kinds(session) == {"t-0": "invalid_json"}
    turn = answer(session, "")
    assert turn.session == session and "no suggestion" in turn.message and not turn.changed


def test_names_numbers_and_own_kinds() -> None:
    """A kind by number, by an unambiguous part of its name, or one's own with a class."""
    session = start_session(a_run(5))
    second = session.shortlist[1]
    session = play(session, "2", "outdated", "wrong tone", "+odd_units beh", "odd")
    assert list(kinds(session).values()) == [
        second, "outdated_knowledge", "wrong_tone_style", "odd_units", "odd_units",
    ]  # fmt: skip
    assert [row.get("class") for row in entries(session)][3:] == ["behavior", "behavior"]


@pytest.mark.parametrize("line", ["missing", "zzz", "99", "0", "+name", "+a b c", "n", "t x=y"])
def test_what_is_not_understood_changes_nothing(line: str) -> None:
    """An ambiguous or unknown line keeps the failure on the screen and says why."""
    session = start_session(a_run())
    turn = answer(session, line)
    assert turn.session == session and turn.message and not turn.changed


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.sampled_from(["", "1", "3", "s", "n hm", "t few_shot=pass", "latency", "zzz", "m", "?"]),
        max_size=12,
    )
)
def test_undo_is_the_inverse(lines: list[str]) -> None:
    """Undoing everything leads back to the session's start, whatever was answered."""
    start = start_session(a_run())
    session = play(start, *lines)
    for _ in range(len(lines)):
        session = answer(session, "u").session
    assert (session.position, dict(session.labels)) == (0, {})


def test_skipped_failures_come_again() -> None:
    """A skipped failure is not written, and the next session asks for it."""
    session = play(start_session(a_run()), "s", "latency")
    again = start_session(a_run(), labelled=dict.fromkeys(kinds(session), "x"))
    assert [row.id for row in again.rows] == ["t-0", "t-2", "t-3"]
    assert again.already == 1


def test_notes_and_tests_go_with_the_label() -> None:
    """Notes add up, tests are kept by name, and neither makes a label by itself."""
    session = play(start_session(a_run()), "n odd", "n very", "t oracle_context=fail")
    assert kinds(session) == {} and session.position == 0
    (row,) = entries(play(session, "edge_case"))
    assert row["note"] == "odd; very" and row["tests"] == {"oracle_context": "fail"}


def test_redacted_rows_hold_no_text() -> None:
    """With redaction ids, kinds, counts and names of checks are all that is written."""
    session = play(start_session(a_run(), annotator="ann"), "n secret", "")
    assert entries(session, redact=True) == [
        {
            "id": "t-0", "kind": "invalid_json", "count": 1, "checks": ["is-json"],
            "annotator": "ann",
        }
    ]  # fmt: skip


HAND_WRITTEN = """\
# our failures
version: 1
task: support   # one sentence
failures:
  # the first one
  - id: t-0     # from the pilot
    description: says 2023
    kind: outdated_knowledge   # sure
  - {id: t-1, description: flow}
  - id: t-2
    description: |
      several
      lines
    # a remark on t-2
state:
  rag: none
"""


def test_hand_written_text_is_kept() -> None:
    """Comments, order and keys survive; the label goes into the row with its id."""
    file = open_labelled(HAND_WRITTEN, "f.yaml")
    assert file.labels == {"t-0": "outdated_knowledge"}
    session = start_session(a_run(5), labelled=file.labels)
    session = play(session, "latency", "cost", "1", "2")
    text = file.with_labels(entries(session))
    for line in HAND_WRITTEN.splitlines():
        assert line in text or line == "  - {id: t-1, description: flow}"
    rows = yaml.safe_load(text)["failures"]
    assert [row["id"] for row in rows] == ["t-0", "t-1", "t-2", "t-3", "t-4"]
    assert [row["kind"] for row in rows[:3]] == ["outdated_knowledge", "latency", "cost"]
    assert rows[1]["description"] == "flow" and rows[2]["description"] == "several\nlines\n"
    assert yaml.safe_load(text)["state"] == {"rag": "none"}


@pytest.mark.parametrize(
    "text",
    [
        "", "# only a comment\n", "version: 1\n", "version: 1\nfailures:\n", "failures: []\n",
        "failures: null\nversion: 1\n", "failures:\n\nstate: {rag: none} # hi", "version: 1 # x",
        '{"version": 1, "failures": [{"id": "t-9", "kind": "cost"}]}', "failures: [{id: t-9}]\n",
        "failures:\n- id: t-9\n  kind:\n- id: t-0\n", "failures:\n- kind: null\n  id: t-0\n",
        "failures:\n    - id: t-0\n      suggested: true\n      kind: cost\n",
        "failures:\n- id: t-0\n  tests: {few_shot: pass}\n  note: |\n    a\n    b\n\n\nstate:\n",
    ],
)  # fmt: skip
def test_every_way_to_write_a_failures_file(text: str) -> None:
    """Labels can be added to a file however its list of failures is written."""
    file = open_labelled(text, "f.yaml")
    before = yaml.safe_load(text) or {}
    session = play(start_session(a_run(2), labelled=file.labels), "latency", "cost")
    after = yaml.safe_load(file.with_labels(entries(session)))
    rows = {row["id"]: row for row in after["failures"]}
    assert rows["t-0"]["kind"] == "latency" and not rows["t-0"].get("suggested")
    assert rows["t-1"]["kind"] == "cost"
    assert {row["id"] for row in before.get("failures") or ()} <= set(rows)
    assert {key: after[key] for key in before if key != "failures"} == {
        key: value for key, value in before.items() if key != "failures"
    }


@pytest.mark.parametrize(
    ("text", "line"), [("a: [", 1), ("- x\n", 1), ("a: 1\nb: {\n", 3), ("failures: 3\n", None)]
)
def test_what_is_no_failures_file_is_refused(text: str, line: int | None) -> None:
    """A file that is something else is never overwritten."""
    with pytest.raises(InputError) as caught:
        open_labelled(text, "f.yaml")
    assert caught.value.location is not None and caught.value.location.line == line


texts = st.text(max_size=30)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(texts, texts, texts, st.lists(texts, max_size=2))
def test_any_text_survives_the_file(one: str, two: str, note: str, passages: list[str]) -> None:
    """Whatever model and user wrote is read back from the file unchanged."""
    failing = ResultRow(
        id="a", item="a", passed=False, input=one, output=two, contexts=tuple(passages)
    )
    run = EvalRun(tool="t", rows=(failing,))
    session = play(start_session(run), f"n {note}", "cost")
    text = open_labelled(start_text(State(), source="x"), "f").with_labels(entries(session))
    text.encode()
    (written,) = yaml.safe_load(text)["failures"]
    assert written.get("input", "") == one and written.get("output", "") == two
    assert tuple(written.get("context", ())) == tuple(passages)
    assert written.get("note", "") == note.strip()
    again = open_labelled(text, "f")
    assert yaml.safe_load(again.with_labels(entries(session))) == yaml.safe_load(text)


def test_agreement_of_two_annotators() -> None:
    """Kappa over the failures that both labelled; suggestions are nobody's label."""
    one = "failures:\n" + "".join(
        f"- {{id: {n}, kind: {'cost' if n < 5 else 'latency'}, annotator: ann}}\n"
        for n in range(10)
    )
    two = one.replace("id: 0, kind: cost", "id: 0, kind: edge_case").replace("ann}", "bob}")
    two += "- {id: 11, kind: cost}\n- {id: 12, kind: cost, suggested: true}\n"
    found = agreement(open_labelled(one, "a"), open_labelled(two, "b"), ("ann", "bob"))
    assert (found.items, found.same_kind, found.only_second) == (10, 9, 1)
    assert found.kappa_kind == pytest.approx((0.9 - 0.45) / (1 - 0.45))
    assert found.same_class == 9
    assert found.disagreements == (("0", "cost", "edge_case"),)


def test_the_screen_fits_and_cannot_be_hijacked() -> None:
    """Eighty columns, nothing longer, and a model's control characters never reach a terminal."""
    evil = ResultRow(
        id="x\x1b[2J",
        item="x",
        passed=False,
        input="word " * 200,
        output="\x1b]0;title\x07" + "y" * 300 + "\r\nnext\ttab",
        contexts=("\x9b31m",),
        variant="p" * 200,
        checks=(Check(name="c" * 100, passed=False, score=0.1, reason="\x1b[31mred"),),
    )
    suggestion = Suggestion(kind=None, checks=(), reason="why\x1b " * 30, ask="how")
    for whole in (False, True):
        screen = failure_screen(
            evil, suggestion, number=1, total=2, labelled=0, shortlist=["cost"] * 9,
            note="\x1b", whole=whole,
        )  # fmt: skip
        assert all(len(line) <= 80 for line in screen.split("\n"))
        assert all(each == "\n" or each.isprintable() for each in screen)
    assert visible("a\x00b") == "a\\x00b"


class Terminal:
    """``ftplan label`` with lines of input, in a folder of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.results = folder / "r.jsonl"
        rows = [
            {"id": f"t-{n}", "input": f"q{n}", "output": "o", "passed": False, "score": 0}
            for n in range(3)
        ]
        self.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.output = folder / "failures.yaml"

    def run(self, typed: str, **options: Any) -> int:
        """Run the command with this standard input."""
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        return label(results=self.results, output=self.output, **options)


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in a fresh folder."""
    return Terminal(tmp_path, monkeypatch)


def test_a_scripted_session(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    """End of input saves and quits; the next session goes on where it stopped."""
    assert terminal.run("cost\nn slow\nlatency\n") == 0
    out, err = capsys.readouterr()
    assert out.startswith("2 of 3 failures labelled") and "q0" not in out
    assert "q0" in err and "failure 3 of 3" in err
    assert terminal.run("", format="json") == 0
    assert json.loads(capsys.readouterr().out)["labelled"] == 2
    assert terminal.run("u\n?\nm\nedge_case\n\n") == 0
    out, err = capsys.readouterr()
    assert out.startswith("3 of 3 failures labelled") and "ftplan advise" in out
    assert "q0" not in err and "nothing to undo" in err
    file = read_failures(terminal.output)
    assert [(each.id, each.kind) for each in file.failures] == [
        ("t-0", "cost"), ("t-1", "latency"), ("t-2", "edge_case"),
    ]  # fmt: skip
    assert file.failures[1].note == "slow"
    assert file.state.eval_examples == 3 and file.state.accuracy == 0.0


def test_saved_after_every_answer(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each answer the file on disk is complete, valid, and holds all answers so far."""
    seen: list[int] = []

    def checked(path: Path, text: str) -> None:
        write_file(path, text)
        seen.append(len(read_failures(path).failures))

    monkeypatch.setattr("ftplan.cli.label.write_file", checked)
    terminal.run("cost\ncost\nu\ncost\ncost\nu\n")
    assert seen == [1, 2, 1, 2, 3, 2]


def test_a_write_that_fails_leaves_the_old_file(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is replaced in one step: when that fails, the old one stands and nothing else."""
    terminal.run("cost\n")
    before = terminal.output.read_bytes()

    def broken(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(InputError, match="No space"):
        terminal.run("cost\n")
    assert terminal.output.read_bytes() == before
    assert {path.name for path in terminal.folder.iterdir()} == {"r.jsonl", "failures.yaml"}


def test_two_annotators(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    """Each has a file of their own; labelling in the other's is refused; agreement is reported."""
    terminal.run("cost\ncost\n", annotator="ann")
    with pytest.raises(InputError, match="labels of ann") as caught:
        terminal.run("cost\n", annotator="bob")
    assert "--agreement" in caught.value.remedy
    first, terminal.output = terminal.output, terminal.folder / "bob.yaml"
    terminal.run("cost\nlatency\n", annotator="bob")
    capsys.readouterr()
    assert label(agreement=(first, terminal.output)) == 0
    out = capsys.readouterr().out
    assert "ann and bob: 2 failures" in out and "t-1: cost / latency" in out
    label(agreement=(first, terminal.output), format="json")
    assert json.loads(capsys.readouterr().out)["same_kind"] == 1


def test_a_file_that_changed_meanwhile_is_not_lost(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What somebody else writes into the file during the session is still there after it."""

    class Typing:
        lines = iter(["cost\n", "latency\n", ""])

        def readline(self) -> str:
            line = next(self.lines)
            if line == "latency\n":
                text = terminal.output.read_text()
                terminal.output.write_text(text + "  - {id: other, kind: edge_case}\n")
            return line

    monkeypatch.setattr(sys, "stdin", Typing())
    label(results=terminal.results, output=terminal.output)
    found = {each.id: each.kind for each in read_failures(terminal.output).failures}
    assert found == {"t-0": "cost", "t-1": "latency", "other": "edge_case"}


def test_interrupting_keeps_the_labels(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the session like the end of input."""

    class Interrupted:
        lines = iter(["cost\n"])

        def readline(self) -> str:
            for line in self.lines:
                return line
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted())
    assert label(results=terminal.results, output=terminal.output) == 0
    assert len(read_failures(terminal.output).failures) == 1


def test_redact_and_nothing_to_label(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    """--redact writes no texts; a run without failures says so and writes nothing."""
    terminal.run("n private\ncost\n", redact=True)
    text = terminal.output.read_text()
    assert "q0" not in text and "private" not in text and "t-0" in text
    terminal.results.write_text('{"input": "q", "passed": true}\n')
    terminal.output = terminal.folder / "none.yaml"
    capsys.readouterr()
    assert terminal.run("") == 0
    assert "no failures" in capsys.readouterr().out and not terminal.output.exists()


def test_a_failures_file_can_be_labelled(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that were collected by hand get their kinds, in their own file or in another."""
    terminal.results = terminal.output
    terminal.output.write_text(HAND_WRITTEN)
    assert terminal.run("latency\ncost\n") == 0
    assert capsys.readouterr().out.startswith("3 of 3 failures labelled")
    file = read_failures(terminal.output)
    assert [each.kind for each in file.failures] == ["outdated_knowledge", "latency", "cost"]
    terminal.output = terminal.folder / "bob.yaml"
    assert terminal.run("\nlatency\nedge_case\n", annotator="bob") == 0
    second = read_failures(terminal.output)
    assert [each.kind for each in second.failures] == ["outdated_knowledge", "latency", "edge_case"]
    assert second.state == file.state


def test_renumbered_tests_do_not_inherit_labels(terminal: Terminal) -> None:
    """Where an id now means another question, the old label is neither reused nor overwritten."""
    terminal.run("cost\n")
    before = terminal.output.read_bytes()
    terminal.results.write_text('{"id": "t-0", "input": "new question", "passed": false}\n')
    with pytest.raises(InputError, match="another item"):
        terminal.run("latency\n")
    assert terminal.output.read_bytes() == before
