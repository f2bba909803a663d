"""Run a command line in this process and keep what it said."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from ftplan.cli.app import run

PLAN = """\
version: 1
model: llama-3.1-8b
stack: transformers
method: {kind: lora, rank: 16}
precision: {weights: bf16, mixed: "no"}
batch: {micro: 1, seq_len: 2048}
gradient_checkpointing: true
hardware: {gpu: a100-80gb}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """Exit code, stdout and stderr of one command."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """stdout as JSON; fails when there is anything else on it."""
        return json.loads(self.out)


class Terminal:
    """What the fixture of the same name gives."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | object) -> Said:
        """Run ``ftplan`` with these arguments."""
        self._capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = self._capsys.readouterr()
        return Said(code=code, out=out, err=err)
