"""The answer on the screen, as Markdown and through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from advise_cases import Story, stories

from ftplan.advice import TITLES
from ftplan.advise import advise
from ftplan.cli.app import run
from ftplan.render.advice import render_advice, render_advice_markdown

FILE = """\
version: 1
task: answer questions from the manual
state: {eval_pipeline: true, eval_examples: 200, prompt_iterations: 6, rag: none}
failures:
  - {id: t-17, kind: outdated_knowledge, count: 20}
  - {id: t-19, kind: wrong_tone_style, count: 15}
  - {kind: my_own, class: operational, count: 2}
"""


@pytest.mark.parametrize("story", stories(), ids=lambda story: story.name)
def test_screen_fits_80_columns_and_says_it_all(story: Story) -> None:
    """Plain text, no line over 80 columns, with step, path, closed steps and cited rules."""
    answer = advise(story.file)
    text = render_advice(answer, width=80, colour=False)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    assert f"Next step: {answer.recommendation.title}" in flat
    assert "-->" in text
    assert all(entry.rule in text for entry in answer.blocked)
    assert all(code in text for code in answer.recommendation.rules)
    assert TITLES[answer.destination.step] in flat
    text.encode("ascii")


@pytest.mark.parametrize("story", stories(), ids=lambda story: story.name)
def test_markdown_is_a_document(story: Story) -> None:
    """One title, tables whose rows have as many cells as their heads."""
    text = render_advice_markdown(advise(story.file))
    assert text.startswith("# Next step: ") and text.endswith("\n")
    assert sum(line.startswith("# ") for line in text.splitlines()) == 1
    cells = 0
    for line in text.splitlines():
        here = line.replace("\\|", "").count("|") if line.startswith("|") else 0
        assert not here or not cells or here == cells
        cells = here


def test_users_text_cannot_break_the_windows() -> None:
    """Control characters and Markdown in the user's own words come out harmless."""
    from ftplan.failures import Failure, FailuresFile

    rows = (Failure(id="a|b", kind="x\x1b[31m|\n# y", class_="behavior", count=30),)
    answer = advise(FailuresFile(task="t\x1b]0;title\x07\n# no", failures=rows))
    assert "\x1b" not in render_advice(answer)
    markdown = render_advice_markdown(answer)
    assert "\x1b" not in markdown and "\n# no" not in markdown and "\n# y" not in markdown


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`advise FILE` prints the answer alone on stdout and exits 0, in every format."""
    path = tmp_path / "failures.yaml"
    path.write_text(FILE, encoding="utf-8")
    assert run(["advise", str(path), "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["destination"]["step"] == "rag_basic"
    assert {share["class"] for share in json.loads(out)["shares"]} == {
        "information",
        "behavior",
        "operational",
    }
    assert err == ""
    for format in ("table", "markdown", "yaml"):
        assert run(["advise", str(path), "--format", format]) == 0
        assert "rag_basic" in capsys.readouterr().out.replace("retrieval (BM25)", "rag_basic")


def test_command_line_refuses_with_a_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong key exits 2 with file, line and remedy on stderr and nothing on stdout."""
    path = tmp_path / "failures.yaml"
    path.write_text(FILE.replace("prompt_iterations", "promt_iterations"), encoding="utf-8")
    assert run(["advise", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "failures.yaml:3" in err and "prompt_iterations" in err


def test_rules_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """`rules` lists all, a word narrows, nonsense exits 2 with a remedy."""
    assert run(["rules", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rules"]
    assert len(rows) >= 62 and all(row["sources"] for row in rows)
    assert run(["rules", "BM25"]) == 0
    assert "RAG002" in capsys.readouterr().out
    assert run(["rules", "RAGG02"]) == 2
    assert "RAG002" in capsys.readouterr().err


def test_an_advice_to_finetune_is_sized_on_the_same_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model and a GPU the method, what fits and the plan file to start from follow."""
    file = tmp_path / "failures.yaml"
    file.write_text(
        "version: 1\n"
        "state: {eval_pipeline: true, eval_examples: 200, prompt_iterations: 8,\n"
        "  prompts_versioned: true, few_shot_examples: 12, rag: none, finetuned: false,\n"
        "  labelled_examples: 1800, constrained_decoding_tried: true, ml_owner: true,\n"
        "  oracle_context_fixes: 0, oracle_context_tested: 20, prompt_optimizer_tried: true,\n"
        "  can_serve_weights: true}\n"
        "failures:\n  - {id: a, kind: wrong_tone_style, count: 60}\n"
    )
    arguments = ["advise", str(file), "--model", "llama-3.1-8b", "--gpu", "a10g"]
    assert run(arguments) == 0
    screen = capsys.readouterr().out
    assert "The plan to start from" in screen and "a10g-24gb" in screen
    assert run([*arguments, "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["destination"]["step"] == "finetune"
    assert "version: 1" in told["sizing"]["plan"]
    assert run(arguments[:-2]) == 2
    assert "--model and --gpu belong together" in capsys.readouterr().err
