"""Training data: counted exactly, in one pass, whatever the format."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from array import array
from collections import Counter
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from cli_helpers import Terminal
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.errors import InputError, MissingExtraError
from ftplan.files.dataset import Digests, estimate_tokens, read_dataset, tokenizer_of
from ftplan.files.lengths import packed, padded_tokens
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
    """Tokens in binary are named, with the way to JSON Lines; a missing file is said to be so."""
    (tmp_path / "a.npy").write_bytes(b"NUMPY")
    said = ftplan_("data", str(tmp_path / "a.npy"))
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


# --- Shapes in the wild -------------------------------------------------------------------------

WILD: dict[str, tuple[str, dict[str, Any], str, int]] = {
    # name: (suffix, a row, format, words of all its sequences)
    "ShareGPT": (
        "jsonl",
        {"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}]},
        "chat", 3,
    ),
    "Alpaca with history": (
        "jsonl",
        {"system": "s", "history": [["a", "b"]], "instruction": "c", "input": "d", "output": "e f"},
        "prompt and completion", 7,
    ),
    "pairs in chat form": (
        "jsonl",
        {
            "prompt": [{"role": "user", "content": "a"}],
            "chosen": [{"role": "assistant", "content": "b c"}],
            "rejected": [{"role": "assistant", "content": "d"}],
        },
        "preference pairs", 5,
    ),
    "LLaMA-Factory's pairs": (
        "jsonl",
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt", "value": "c d"},
        },
        "preference pairs", 5,
    ),
    "KTO": (
        "jsonl", {"prompt": "a", "completion": "b c", "label": 0}, "unpaired preference", 3,
    ),
    "LLaMA-Factory's KTO": (
        "jsonl",
        {"messages": [{"role": "assistant", "content": "a b"}], "kto_tag": True},
        "unpaired preference", 2,
    ),
    "tools and reasoning": (
        "jsonl",
        {
            "tools": "t u",
            "messages": [{"role": "assistant", "reasoning_content": " r", "content": "a"}],
        },
        "chat", 4,
    ),
    "prompts of GRPO": ("jsonl", {"prompt": "a b", "solution": None}, "prompts alone", 2),
}  # fmt: skip


@pytest.mark.parametrize("name", WILD)
def test_shapes_in_the_wild(name: str, tmp_path: Path) -> None:
    """What trainers read is told apart, and every text of it is counted, pairs twice."""
    suffix, row, told, count = WILD[name]
    summary = read_dataset(write(tmp_path / f"a.{suffix}", [row]), count=words)
    template = {"chat": 5, "preference pairs": 5, "unpaired preference": 5}.get(told, 0)
    assert summary.format == told
    sequences = 2 if told == "preference pairs" else 1
    plain = summary.tokens.expected - sequences
    assert plain >= count
    assert (plain - count) % 5 == 0 if template else plain == count


def test_token_ids_are_exact(tmp_path: Path) -> None:
    """A tokenized file needs no tokenizer: its ids are counted."""
    rows = [{"input_ids": list(range(n)), "labels": list(range(n))} for n in (3, 700)]
    summary = read_dataset(write(tmp_path / "a.jsonl", rows))
    assert (summary.format, summary.is_exact) == ("token ids", True)
    assert (summary.tokens.expected, summary.longest_tokens) == (703, 700)


def test_images_are_said_not_to_be_counted(tmp_path: Path) -> None:
    """Parts that are no text count nothing, and a finding says how many examples have some."""
    part = {"type": "image_url", "image_url": {"url": "x" * 4000}}
    rows = [
        {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}, part]}]},
        {"images": ["a.png"], "messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "a"}]},
    ]
    summary = read_dataset(write(tmp_path / "a.jsonl", rows), count=words)
    assert summary.with_media == 2
    assert summary.longest_tokens < 20
    assert "DAT008" in {finding.code for finding in summary.findings}


@pytest.mark.parametrize("suffix", ["jsonl.bz2", "jsonl.xz", "txt", "tsv", "json"])
def test_more_containers(suffix: str, tmp_path: Path) -> None:
    """bzip2, xz, plain text, tabs, and an object around a list hold the same examples."""
    rows = [{"text": f"a b {n}"} for n in range(50)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl.bz2":
        path.write_bytes(bz2.compress(lines.encode()))
    elif suffix == "jsonl.xz":
        path.write_bytes(lzma.compress(lines.encode()))
    elif suffix == "txt":
        path.write_text("\n".join(row["text"] for row in rows))
    elif suffix == "tsv":
        path.write_text("text\tlabel\n" + "".join(f"{row['text']}\t1\n" for row in rows))
    else:
        path.write_text(json.dumps({"data": rows}, indent=2))
    summary = read_dataset(path, count=words)
    assert (summary.examples, summary.format) == (50, "text")
    assert summary.tokens.expected == 50 * 4


def test_objects_over_several_lines(tmp_path: Path) -> None:
    """Pretty-printed objects, one after the other, are read; one conversation is one example."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "a.json"
    path.write_text("\n".join(json.dumps({"messages": talk}, indent=2) for _ in range(3)))
    assert read_dataset(path).examples == 3
    path.write_text(json.dumps({"messages": talk}))
    assert read_dataset(path).examples == 1


def test_parquet(tmp_path: Path, ftplan_: Terminal) -> None:
    """Parquet and Arrow are read where pyarrow is installed; else the way out is named."""
    path = tmp_path / "a.parquet"
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        said = ftplan_("data", str(path))
        assert (said.code, said.out) == (2, "")
        assert "pip install pyarrow" in said.err
        return
    table = pyarrow.table({"prompt": ["a", "b c"], "completion": ["d", ""]})
    parquet.write_table(table, path)
    arrow = tmp_path / "a.arrow"
    with ipc.new_stream(str(arrow), table.schema) as stream:
        stream.write_table(table)
    for file in (path, arrow):
        summary = read_dataset(file, count=words)
        assert (summary.examples, summary.format) == (2, "prompt and completion")
        assert (summary.empty_targets, summary.first_empty_line) == (1, 2)
    path.write_bytes(b"PAR1 and nothing else PAR1")
    assert ftplan_("data", str(path)).code == 2


# --- Sums and memory ----------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), max_size=200))
def test_digests_are_a_set(drawn: list[int]) -> None:
    """The flat table says of each text what a set says, also while it grows."""
    table, known = Digests(), set()
    table._table = array("Q", bytes(8 * 4))  # so that it grows early
    for number in drawn:
        text = str(number)
        assert table.seen(text) == (text in known)
        known.add(text)


def test_a_full_table_still_knows_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its limit nothing more is remembered, and the answer says that it is not complete."""
    monkeypatch.setattr(Digests, "MOST", 10)
    table = Digests()
    assert not any(table.seen(str(n)) for n in range(20))
    assert [table.seen(str(n)) for n in range(20)] == [True] * 10 + [False] * 10
    assert table.is_full


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 3))
def test_padding_is_the_mean_of_all_batches(lengths: list[int], batch: int) -> None:
    """The expected longest of a batch is the mean over all batches that can be drawn."""
    mean = fmean(max(drawn) for drawn in product(lengths, repeat=batch))
    found = padded_tokens(Counter(lengths), 7, batch)
    cut = fmean(max(min(n, 7) for n in drawn) for drawn in product(lengths, repeat=batch))
    assert found == pytest.approx(len(lengths) * cut)
    assert mean >= cut


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A file eight times as large takes hardly more memory: 8 bytes an example."""
    used = []
    for count in (5_000, 40_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as stream:
            for n in range(count):
                stream.write(json.dumps({"text": f"{n} " + "word " * 100}) + "\n")
        code = (
            "import resource, sys; from pathlib import Path; "
            "from ftplan.files.dataset import read_dataset; read_dataset(Path(sys.argv[1])); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
        )
        used.append(int(done.stdout))
    assert used[1] - used[0] < 4_000  # KiB; the larger file has 20 MB


def test_progress_only_on_a_terminal(
    tmp_path: Path, ftplan_: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bar is drawn on a terminal's stderr and rubbed out; in a pipe there is none."""
    path = write(tmp_path / "a.jsonl", [{"text": "word " * 200}] * 3000)
    assert ftplan_("data", str(path)).err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    said = ftplan_("data", str(path))
    assert "[###" in said.err
    assert said.err.endswith("\r")
    assert "[###" not in said.out


def test_padding_and_packing_decide_the_hours(tmp_path: Path, ftplan_: Terminal) -> None:
    """Short samples among long ones: packed they take fewer steps than padded, and fewer hours."""
    rows = [{"text": "word " * (40 if n % 10 else 900)} for n in range(400)]
    path = write(tmp_path / "a.jsonl", rows)
    hours, steps = {}, {}
    for packing in ("true", "false"):
        plan = tmp_path / f"{packing}.yaml"
        plan.write_text(
            "version: 1\nmodel: smollm2-135m\nmethod: {kind: lora}\nprecision: {weights: bf16}\n"
            f"batch: {{seq_len: 1024, micro: 8, packing: {packing}}}\nhardware: {{gpu: a10g}}\n"
        )
        time = ftplan_("fit", str(plan), "--data", str(path), "-f", "json").data["rows"][0]["time"]
        hours[packing], steps[packing] = time["hours"]["expected"], time["steps"]
    assert hours["true"] < 0.7 * hours["false"]
    assert steps["false"] == 400 // 8
    assert steps["true"] < steps["false"]
