"""Documents: strict data, exact positions, no surprise from a hostile file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.errors import InputError
from ftplan.files.document import Document, parse_document, parse_documents, read_document


def read(text: str, file: str = "f.yaml") -> Document:
    return parse_document(text, file=file)


def refusal(text: str, file: str = "f.yaml") -> InputError:
    with pytest.raises(InputError) as caught:
        read(text, file)
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("13e9", 13e9),
        ("1.5e+3", 1500.0),
        (".5", 0.5),
        ("010", 10),
        ("0x10", 16),
        ("0o17", 15),
        ("1_000", 1000),
        ("-3", -3),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("yes", True),
        ("off", False),
        ("'no'", "no"),
        ("~", None),
        ("null", None),
        ("", None),
        ("!!str 12", "12"),
        ("1e", "1e"),
        ("bf16", "bf16"),
    ],
)
def test_scalars(text: str, value: object) -> None:
    """Numbers are YAML 1.2's, booleans YAML 1.1's, dates and times stay text."""
    found = read(f"a: {text}\n").data["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("", "empty", None),
        ("  \n\n", "empty", None),
        ("# only\n# comments\n", "only comments", None),
        ("a: 1\nb: 2\na: 3\n", "'a' is given twice (first on line 1)", 3),
        ("a:\n\tb: 1\n", "a tab where YAML wants spaces", 2),
        ("a: *nowhere\n", "undefined alias", 1),
        ("a: &x [*x]\n", "contains itself", 1),
        ("a: &x {<<: *x}\n", "merges other mappings", 1),
        ("a: !!python/object/apply:os.system ['true']\n", "is not read", 1),
        ("a: !!binary aGk=\n", "is not read", 1),
        ("a: 1\n---\nb: 2\n", "2 documents", 3),
        ("? [a, b]\n: 1\n", "cannot be a key", 1),
        ("a: b: c\n", "': ' where no key can stand", 1),
        ("a: [1, 2\n", "not YAML", 2),
        ("x: \x07\n", "control characters", 1),
        ("a: " + "9" * 5000 + "\n", "not a number that can be read", 1),
        ("[" * 5000, "nested deeper", None),
        ("{a: " * 5000 + "\n", "nested deeper", 1),
        ("".join(" " * n + "a:\n" for n in range(200)), "nested deeper", 61),
    ],
)
def test_refusals(text: str, message: str, line: int | None) -> None:
    """Whatever cannot be read without guessing is refused where it stands."""
    error = refusal(text)
    assert message in error.message
    assert error.location is not None
    assert error.location.file == "f.yaml"
    assert error.location.line == line


def test_anchor_bomb() -> None:
    """A file whose anchors expand to billions of values is refused in no time."""
    names = "abcdefghijkl"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for previous, name in itertools.pairwise(names):
        lines.append(f"{name}: &{name} [{', '.join([f'*{previous}'] * 9)}]")
    assert "anchors are expanded" in refusal("\n".join(lines)).message


def test_merge_chains() -> None:
    """Merged mappings are merged once each, however often they are named."""
    lines = ["k0: &k0 {x: 1}"]
    lines += [f"k{n}: &k{n} {{<<: [*k{n - 1}, *k{n - 1}]}}" for n in range(1, 50)]
    assert read("\n".join(lines)).data["k49"] == {"x": 1}


def test_merge_prefers_own_keys() -> None:
    """A mapping's own key wins over a merged one, and each is located where it is written."""
    document = read("base: &b {rank: 8, alpha: 16}\njob:\n  <<: *b\n  rank: 32\n")
    assert document.data["job"] == {"rank": 32, "alpha": 16}
    assert document.locate(("job", "rank")).line == 4
    assert document.locate(("job", "alpha")).line == 1


@pytest.mark.parametrize(
    ("path", "line", "column"),
    [
        ((), 1, 1),
        (("batch",), 2, 1),
        (("batch", "micro"), 3, 3),
        (("batch", "nothing"), 2, 1),
        (("list", 1), 4, 11),
        (("list", 1, "deep"), 4, 12),
        (("list", 9), 4, 1),
        (("nothing", "at", "all"), 1, 1),
    ],
)
def test_positions(path: tuple[str | int, ...], line: int, column: int) -> None:
    """A key is located where it is written; what is missing, at its nearest parent."""
    document = read("model: x\nbatch:\n  micro: 2\nlist: [1, {deep: 2}]\n")
    location = document.locate(path)
    assert (location.line, location.column) == (line, column)


def test_value_position() -> None:
    """A value can be located apart from its key."""
    assert read("a: 1\nlonger:   17\n").locate(("longer",), value=True).column == 11


def test_json_is_read_as_json() -> None:
    """JSON may hold tabs and surrogate pairs, and its keys have positions too."""
    text = '{\n\t"a": [1, {"b": "\\ud83d\\ude00"}],\n\t"c": 1e3\n}'
    document = read(text, "f.json")
    assert document.data == {"a": [1, {"b": "\U0001f600"}], "c": 1000.0}
    assert str(document.locate(("a", 1, "b"))) == "f.json:2:12"
    assert str(document.locate(("c",))) == "f.json:3:2"
    assert str(document.locate(("c", "x"))) == "f.json:3:2"


def test_json_duplicates() -> None:
    """A key given twice is refused in JSON too, at its second place."""
    error = refusal('{"a": 1,\n "b": {"x": 1,\n  "x": 2}}', "f.json")
    assert "'x' is given twice (first on line 2)" in error.message
    assert str(error.location) == "f.json:3:3"


def test_json_mistakes_are_named_as_json() -> None:
    """A file called .json is held to JSON; the same text in a .yaml is YAML's flow style."""
    assert "not JSON" in refusal('{"a": 1,}', "f.json").message
    assert read('{"a": 1,}').data == {"a": 1}


def test_deep_json() -> None:
    """Deeply nested JSON is refused, not a crash."""
    assert "nested deeper" in refusal("[" * 100_000 + "]" * 100_000, "f.json").message


def test_several_documents() -> None:
    """All documents of a file can be had where several make sense."""
    assert [d.data for d in parse_documents("a: 1\n---\nb: 2\n", file="f")] == [{"a": 1}, {"b": 2}]


def test_source_text() -> None:
    """A scalar's own spelling is kept."""
    document = read("a: 1e3\nb: [0x10, x]\n")
    assert document.source_text(("a",)) == "1e3"
    assert document.source_text(("b", 0)) == "0x10"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"a: \x00\x01", "binary"),
        (b"\x80abc", "not UTF-8"),
        ("a: 1".encode("utf-16"), "UTF-16"),
    ],
)
def test_bytes(tmp_path: Path, raw: bytes, message: str) -> None:
    """What is not UTF-8 text is refused by name."""
    path = tmp_path / "f.yaml"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message):
        read_document(path)


def test_byte_order_mark(tmp_path: Path) -> None:
    """A UTF-8 byte order mark is no part of the first key."""
    path = tmp_path / "f.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_document(path).data == {"a": 1}


def test_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    """A slip in a file's name is answered with the name that was meant."""
    (tmp_path / "plan.yaml").write_text("a: 1\n")
    with pytest.raises(InputError) as caught:
        read_document(tmp_path / "plna.yaml")
    assert caught.value.message == "there is no such file"
    assert "plan.yaml" in caught.value.remedy


def test_folders_are_no_files(tmp_path: Path) -> None:
    """A folder is refused as a folder."""
    with pytest.raises(InputError, match="folder"):
        read_document(tmp_path)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=6), children, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(max_size=6), values, min_size=1, max_size=4))
def test_json_means_what_json_says(data: dict[str, object]) -> None:
    """Any JSON object reads as the json module reads it, and every key has a position."""
    document = read(json.dumps(data, indent=1), "f.json")
    assert document.data == data
    for key in data:
        location = document.locate((key,))
        assert json.dumps(key) in document.line_text(location.line)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    """No text whatever makes the reader crash: it answers or it refuses."""
    try:
        read(text)
    except InputError as error:
        assert error.location is not None
