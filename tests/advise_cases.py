"""Reading golden stories for the tests of advise: plain YAML, no reader of the product's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftplan.failures import Failure, FailuresFile, State

CASES = Path(__file__).parent / "cases" / "advise"


@dataclass(frozen=True)
class Story:
    """A failures file and what the evidence supports."""

    name: str
    header: str
    file: FailuresFile
    destination: tuple[str, ...]
    recommendation: tuple[str, ...]
    never: tuple[str, ...]


def as_file(data: dict[str, Any]) -> FailuresFile:
    """A mapping as a failures file; ``class`` is ``class_`` in Python."""
    state = State(**{k: v for k, v in (data.get("state") or {}).items() if v is not None})
    rows = [
        Failure(**{("class_" if k == "class" else k): v for k, v in row.items()})
        for row in data.get("failures") or []
    ]
    return FailuresFile(task=data.get("task"), state=state, failures=tuple(rows))


def stories() -> list[Story]:
    """All golden stories, by name."""
    found = []
    for path in sorted(CASES.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
        expect = data["expect"]
        found.append(
            Story(
                name=path.stem,
                header="\n".join(line for line in text.splitlines() if line.startswith("#")),
                file=as_file(data["file"]),
                destination=tuple(expect["destination"]),
                recommendation=tuple(expect.get("recommendation", ())),
                never=tuple(expect.get("never", ())),
            )
        )
    return found
