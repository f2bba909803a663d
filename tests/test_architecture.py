"""The table of rooms, walked: every import goes to the same room or to one above it.

``docs`` and the house rules describe the architecture; this file is what holds it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ftplan

SOURCE = Path(ftplan.__file__).parent

VALUES = "values"
ROOMS = {
    # stdlib only: what a user writes and what we answer with
    "dataclass": VALUES,
    "errors": VALUES,
    "units": VALUES,
    "dtypes": VALUES,
    "spec": VALUES,
    "adapting": VALUES,
    "report": VALUES,
    "failures": VALUES,
    "advice": VALUES,
    "results": VALUES,
    "fitting": VALUES,
    "difference": VALUES,
    "stacks": VALUES,
    # reasoning: pure functions
    "memory": "memory",
    "fit": "fit",
    "advise": "advise",
    # shelves
    "catalog": "catalog",
    "files": "files",
    "trainers": "trainers",
    "evals": "evals",
    # windows
    "render": "render",
    # the front: joins shelves and reasoning for the library's verbs
    "front": "front",
    # the door, and the annex that only the door opens
    "cli": "door",
    "__main__": "door",
    "trace": "annex",
    "hub": "annex",
}

MAY_IMPORT = {
    VALUES: {VALUES},
    "memory": {VALUES, "memory"},
    "fit": {VALUES, "memory", "fit"},
    "advise": {VALUES, "advise"},
    "catalog": {VALUES, "memory", "fit", "catalog"},
    "files": {VALUES, "files"},
    "trainers": {VALUES, "catalog", "files", "trainers"},
    "evals": {VALUES, "advise", "files", "evals"},
    "render": {VALUES, "render"},
    "front": {VALUES, "memory", "fit", "advise", "catalog", "files", "trainers", "evals", "front"},
    "annex": {VALUES, "memory", "catalog", "files", "front", "annex"},
    "door": {
        *("memory", "fit", "advise", "catalog", "files", "trainers", "evals", "render", "front"),
        *(VALUES, "annex", "door"),
    },
}
PURE = {VALUES, "memory", "fit", "advise"}
NOT_PURE = {"pydantic", "yaml", "rich", "typer", "os", "pathlib", "json"}
ONLY_IN = {
    "rich": {"render", "door"},
    "typer": {"door"},
    "torch": {"annex"},
    "transformers": {"annex"},
    "peft": {"annex"},
}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str | None:
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return None if first == "__init__" else ROOMS.get(first, f"no room for {first}")


def is_typing_only(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it; imports for types alone do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and is_typing_only(node)
        for part in node.body
        for child in ast.walk(part)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            yield module
            if module == "ftplan":
                yield from (f"ftplan.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_rooms(path: Path) -> None:
    """A file imports only from its own room and the rooms that its room may see."""
    room = room_of(path)
    if room is None:
        return
    assert room in MAY_IMPORT, f"{path.name}: {room}; give it a place in this table"
    for module in imports(path):
        parts = module.split(".")
        if parts[0] != "ftplan" or len(parts) < 2 or parts[1] == "__version__":
            continue
        other = ROOMS.get(parts[1])
        assert other is not None, f"{path}: imports {module}, which has no room"
        assert other in MAY_IMPORT[room], f"{path}: {room} must not import {module} ({other})"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_outside_packages(path: Path) -> None:
    """Reasoning is pure; rich, typer and torch stay in the rooms that are theirs."""
    room = room_of(path)
    for module in imports(path):
        top = module.split(".")[0]
        if room in PURE:
            assert top not in NOT_PURE, f"{path}: {room} is pure, it must not import {top}"
        if top in ONLY_IN:
            assert room in ONLY_IN[top], f"{path}: {top} is imported only in {ONLY_IN[top]}"


def test_the_walk_saw_the_house() -> None:
    """The two tests above looked at every room that exists."""
    seen = {room_of(path) for path in modules()} - {None}
    rooms = {ROOMS[p.name] for p in SOURCE.iterdir() if p.is_dir() and p.name in ROOMS}
    assert rooms <= seen
    assert len(modules()) > 40


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SOURCE.parent
    )
    return {name.split(".")[0] for name in done.stdout.split()}


HEAVY = {"typer", "rich", "pydantic", "yaml", "torch", "transformers", "numpy"}


@pytest.mark.parametrize(
    "statement",
    [
        "import ftplan",
        "import ftplan.spec, ftplan.report",
        "import ftplan; ftplan.__version__; dir(ftplan)",
        "import sys; sys.argv = ['ftplan', '--version']; from ftplan.cli import main; main()",
    ],
)
def test_light_imports(statement: str) -> None:
    """Importing the package, its values, or asking for the version loads nothing heavy."""
    assert not loaded_by(statement) & HEAVY


def test_help_is_light() -> None:
    """Help needs typer and nothing else that is heavy of ours."""
    statement = "from ftplan.cli.app import help_text; help_text('memory')"
    assert not loaded_by(statement) & {"rich", "yaml", "torch", "transformers"}


def test_public_names() -> None:
    """The names of the library are frozen: a change here is a change of the contract."""
    assert ftplan.__all__ == [
        "FtplanError",
        "Plan",
        "advise",
        "check",
        "compare_stacks",
        "diff",
        "estimate",
        "explain",
        "export_plan",
        "find_gpu",
        "find_model",
        "find_optimizer",
        "fit",
        "import_file",
        "load_failures",
        "load_plan",
    ]


@pytest.mark.parametrize("name", ftplan.__all__)
def test_public_names_exist(name: str) -> None:
    """Every public name can be had, and says what it is."""
    assert getattr(ftplan, name).__doc__


def test_verbs_are_not_shadowed_by_rooms() -> None:
    """`ftplan.advise` is the verb, whether the room of that name was imported or not."""
    import ftplan.advise
    from ftplan.advise import RULES

    assert RULES
    assert callable(ftplan.advise)


def test_unknown_names_are_refused() -> None:
    """The facade has no names but its own."""
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ftplan.nothing  # noqa: B018


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_dataclasses_are_ours(path: Path) -> None:
    """The standard library's take their time at each start: see ``ftplan.dataclass``."""
    text = path.read_text(encoding="utf-8")
    if path.name != "dataclass.py":
        assert not re.search(r"from dataclasses import [^\n]*\bdataclass\b", text)
