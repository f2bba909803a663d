"""The wheel holds everything: it runs alone, in an empty environment, from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _run(*arguments: str | Path, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(a) for a in arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and its run-time dependencies; the command's path."""
    base = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", base, ROOT, cwd=base)
    (wheel,) = base.glob("ftplan-*.whl")
    venv.create(base / "env", with_pip=True)
    python = base / "env" / "bin" / "python"
    _run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", wheel, cwd=base)
    return base / "env" / "bin" / "ftplan"


def test_the_textbook_sum_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """13e9 parameters at fp16 are 26 GB, 31.2 GB in all, with no file of the checkout at hand."""
    told = json.loads(
        _run(installed, "memory", "--params", "13e9", "--dtype", "fp16", "--format", "json",
             cwd=tmp_path)
    )  # fmt: skip
    assert told["allocated_bytes"]["expected"] == 31_200_000_000


def test_a_walk_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """Catalogues and families are in the wheel: the terms at the peak add up."""
    told = json.loads(
        _run(installed, "memory", "--model", "llama-3.1-8b", "--method", "lora", "--format",
             "json", cwd=tmp_path)
    )  # fmt: skip
    at_peak = sum(term["bytes"] for term in told["terms"] if term["at_peak"])
    assert at_peak == told["allocated_bytes"]["expected"]
    assert told["model"]["total_params"] == 8_030_261_248


def test_every_command_answers_help(installed: Path, tmp_path: Path) -> None:
    """No command needs an optional package to say what it is for."""
    listed = _run(installed, "--help", cwd=tmp_path)
    for command in ("memory", "check", "advise", "fit", "import", "trace", "measure", "rules"):
        assert command in listed
        assert "Usage" in _run(installed, command, "--help", cwd=tmp_path)
