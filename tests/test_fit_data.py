"""Training data: counted exactly, in one pass, whatever the format."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Terminal
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.errors import InputError, MissingExtraError
from ftplan.files.dataset import estimate_tokens, packed, read_dataset, tokenizer_of
from ftplan.fitting import Spread


@pytest.fixture
def ftplan_(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys)


def words(text: str) -> Spread:
    """One token a word, for sums that can be checked by hand."""
    count = float(len(text.split()))
    return Spread(low=count, expected=count, high=count)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: (an example, one with nothing to learn)
    "chat": (
        {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]},
        {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": " "}]},
    ),
    "prompt and completion": (
        {"instruction": "a", "input": "b", "output": "c"},
        {"prompt": "a b", "completion": ""},
    ),
    "preference pairs": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
    ),
    "unpaired preference": (
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "completion": "", "label": False},
    ),
    "text": ({"text": "a b c"}, {"text": ""}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, tmp_path: Path) -> None:
    """Each format is told by its keys, and an example with nothing to learn is found."""
    example, empty = FORMATS[name]
    summary = read_dataset(write(tmp_path / "a.jsonl", [example, example, empty]), count=words)
    assert summary.format == name
    assert summary.examples == 3
    assert (summary.empty_targets, summary.first_empty_line) == (1, 3)
    assert summary.duplicates == 1
    assert not summary.mixed_formats


def test_sharegpt_and_parts_of_content(tmp_path: Path) -> None:
    """ShareGPT's from and value, and content in parts, are conversations too."""
    rows = [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a b"}]}]},
    ]
    summary = read_dataset(write(tmp_path / "a.jsonl", rows), count=words)
    assert (summary.format, summary.empty_targets) == ("chat", 0)


def test_the_longest_sample_has_its_line(tmp_path: Path) -> None:
    """The sample that would kill the run is named by its line, and cut tokens are counted."""
    rows = [{"text": "w " * n} for n in (5, 999, 20)]
    path = write(tmp_path / "a.jsonl", rows)
    path.write_text("\n" + path.read_text())
    summary = read_dataset(path, count=words, seq_len=100)
    assert (summary.longest_tokens, summary.longest_line) == (1000, 3)
    assert summary.covering_seq_len == 1024
    assert summary.truncated_examples == 1
    assert summary.lost_tokens_share == pytest.approx(900 / 1027)
    assert sum(count for _, count in summary.histogram) == 3


def test_unreadable_lines_are_counted_not_fatal(tmp_path: Path) -> None:
    """A line that is no JSON is named; the others are counted."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nnot json\n{"text": "b"}\n')
    summary = read_dataset(path)
    assert (summary.examples, summary.unreadable, summary.first_unreadable_line) == (2, 1, 2)
    assert any(finding.code == "DAT001" for finding in summary.findings)


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "csv"])
def test_containers(kind: str, tmp_path: Path) -> None:
    """Lines, an array, gzip and CSV hold the same examples."""
    rows = [{"prompt": f"p {n}", "completion": "c, d\n[e]"} for n in range(300)]
    path = tmp_path / f"a.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "csv":
        body = "".join(f'"{row["prompt"]}","{row["completion"]}"\n' for row in rows)
        path.write_text("prompt,completion\n" + body)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    summary = read_dataset(path, count=words)
    assert (summary.examples, summary.format) == (300, "prompt and completion")
    assert summary.duplicates == 0
    assert summary.tokens.expected == 300 * (2 + 3 + 1)


def test_a_large_array_is_read_in_pieces(tmp_path: Path) -> None:
    """An array that is larger than one read of the file loses nothing at the borders."""
    rows = [{"text": f"{n} " + "x" * 997} for n in range(4000)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    told: list[int] = []
    summary = read_dataset(path, count=words, told=lambda done, _: told.append(done))
    assert summary.examples == 4000
    assert len(told) > 3
    assert max(told) == path.stat().st_size


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(8, 32))
def test_packing_is_a_packing(lengths: list[int], seq_len: int) -> None:
    """As many sequences as best fit decreasing, done one example at a time, needs."""
    rooms: list[int] = []
    for length in sorted((min(n, seq_len) for n in lengths), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(seq_len - length)
    made = packed(Counter(lengths), seq_len)
    total = sum(min(n, seq_len) for n in lengths)
    assert -(-total // seq_len) <= made <= len(lengths)
    assert abs(made - len(rooms)) <= 1 + len(rooms) // 10


@given(st.text(max_size=300))
def test_the_estimate_is_an_interval(text: str) -> None:
    """Low, expected and high are in order, for every script."""
    spread = estimate_tokens(text)
    assert 0 <= spread.low <= spread.expected <= spread.high


def test_scripts_differ() -> None:
    """A character of Chinese is about a token, one of English a quarter."""
    assert estimate_tokens("中文字符" * 10).expected > 3 * estimate_tokens("abcd" * 10).expected


def test_a_tokenizer_counts_exactly(tmp_path: Path) -> None:
    """With a tokenizer.json the counts are its own; without the package the extra is named."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers
    except ImportError:
        with pytest.raises(MissingExtraError):
            tokenizer_of(tmp_path)
        pytest.skip("the package tokenizers is not installed")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_of(tmp_path)("a b b a").expected == 4
    with pytest.raises(InputError):
        tokenizer_of(tmp_path / "nothing.json")


@pytest.mark.parametrize("content", ["", "\n\n", "nothing\n", "[]"])
def test_nothing_in_it_is_refused(content: str, tmp_path: Path, ftplan_: Terminal) -> None:
    """A file without examples is refused, with what to write."""
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    said = ftplan_("data", str(path))
    assert (said.code, said.out) == (2, "")
    assert "help:" in said.err


def test_other_files_are_refused_by_name(tmp_path: Path, ftplan_: Terminal) -> None:
    """Parquet is named, with the way to JSON Lines; a missing file is said to be missing."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    said = ftplan_("data", str(tmp_path / "a.parquet"))
    assert said.code == 2
    assert "to_json" in said.err
    assert ftplan_("data", str(tmp_path / "none.jsonl")).code == 2


def test_the_command(tmp_path: Path, ftplan_: Terminal) -> None:
    """Table, JSON and Markdown say the same; the plan's length judges truncation."""
    path = write(tmp_path / "a.jsonl", [{"text": "word " * n} for n in (10, 400)])
    plan = tmp_path / "plan.yaml"
    plan.write_text("version: 1\nmodel: gpt2\nbatch: {seq_len: 128}\n")
    data = ftplan_("data", str(path), "--plan", str(plan), "--format", "json").data
    assert (data["seq_len"], data["truncated_examples"], data["schema_version"]) == (128, 1, 1)
    table = ftplan_("data", str(path), "--seq-len", "128").out
    assert "cut at 128" in table
    assert "#" in table
    assert "cut at 128" in ftplan_("data", str(path), "--seq-len", "128", "-f", "markdown").out


def test_data_feed_fit(tmp_path: Path, ftplan_: Terminal) -> None:
    """fit --data takes the tokens and, where the plan has none, a length that covers them."""
    path = write(tmp_path / "a.jsonl", [{"text": "word " * 500} for _ in range(50)])
    said = ftplan_(
        "fit", "--model", "smollm2-135m", "--gpu", "t4", "--data", str(path), "--epochs", "2",
        "--format", "json",
    )  # fmt: skip
    summary = ftplan_("data", str(path), "--format", "json").data
    assert said.data["seq_len"] == summary["covering_seq_len"]
    tokens = said.data["rows"][0]["time"]["tokens"]
    assert tokens == round(2 * summary["tokens"]["expected"])
    both = ftplan_("fit", "--model", "gpt2", "--data", str(path), "--tokens", "1M")
    assert both.code == 2
