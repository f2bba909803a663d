"""Every example is read, answered, and says what its comment promises."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from cli_helpers import Terminal

ROOT = Path(__file__).parent.parent
PLANS = sorted((ROOT / "examples").glob("plan-*.yaml"))
FAILURES = sorted((ROOT / "examples").glob("failures-*.yaml"))


def test_there_are_examples_of_both_kinds() -> None:
    """The folder is not empty, so the tests below cover something."""
    assert len(PLANS) >= 2 and FAILURES


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_example_plans_fit_their_gpu(path: Path, ftplan: Terminal) -> None:
    """An example that we hand out fits the card it names."""
    done = ftplan("check", str(path), "--format", "json")
    assert done.code == 0, done.err
    assert done.data["verdict"] in ("fits", "tight")


@pytest.mark.parametrize("path", FAILURES, ids=lambda path: path.stem)
def test_example_failures_are_answered(path: Path, ftplan: Terminal) -> None:
    """The example with information failures and a worked-on prompt leads to retrieval."""
    done = ftplan("advise", str(path), "--format", "json")
    assert done.code == 0, done.err
    assert done.data["recommendation"]["step"] == "rag_basic"


def _commands() -> list[str]:
    """The commands of README that need no file of the reader's own."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (?:pip install \. && )?ftplan (.+)$", text, re.MULTILINE)
    return [line for line in lines if line.startswith(("memory", "fit"))]


@pytest.mark.parametrize("line", _commands())
def test_commands_of_the_readme_run(line: str, ftplan: Terminal) -> None:
    """What the README says to type works as it stands there."""
    done = ftplan(*shlex.split(line))
    assert done.code == 0, done.err


def test_the_answer_shown_in_the_readme_is_the_answer(ftplan: Terminal) -> None:
    """The lines that the README shows below its second command are what the command prints."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^    (fits: .+|.+ per GPU at the worst moment.+)$", text, re.MULTILINE)
    assert len(shown) == 2
    line = next(line for line in _commands() if "--gpu a10g" in line and line.startswith("memory"))
    printed = ftplan(*shlex.split(line)).out
    assert all(each in printed for each in shown), printed
