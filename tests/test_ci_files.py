"""The files by which CI systems find ftplan: they name commands and inputs that exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from ftplan.cli.app import COMMANDS, help_text
from ftplan.files.document import read_document

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "action.yml").is_file(), reason="the repository's own files are not here"
)


def entry() -> ModuleType:
    spec = importlib.util.spec_from_file_location("action_entry", ROOT / "tools/action_entry.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_action_never_puts_an_input_into_a_shell() -> None:
    """No input is interpolated into a command, and each reaches the entry as a variable."""
    action = read_document(ROOT / "action.yml").data
    [step] = action["runs"]["steps"]
    assert "${{" not in step["run"]
    for name in action["inputs"]:
        variable = f"INPUT_{name.upper().replace('-', '_')}"
        assert step["env"][variable] == f"${{{{ inputs.{name} }}}}"


def test_action_s_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Inputs become options of check that exist; files stand behind the double dash."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("version: 1\n")
    values = {"FILES": "*.yaml -x", "GPU": "t4", "GPUS": "2", "HEADROOM": "5%", "FAIL_ON": "tight"}
    for name, value in values.items():
        monkeypatch.setenv(f"INPUT_{name}", value)
    arguments = entry().arguments()
    assert arguments[arguments.index("--") + 1 :] == ["a.yaml", "b.yaml", "-x"]
    page = help_text("check")
    for argument in arguments[: arguments.index("--")]:
        assert argument.split("=")[0] in page


@pytest.mark.parametrize("version", ["https://x/y.whl", "0.1 --index-url x", ">=0", "git+x", "/a"])
def test_action_installs_exact_versions_only(
    version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Anything that pip could read as a place to install from is refused."""
    assert entry().install(version) == 2
    assert "exact version" in capsys.readouterr().out


def test_action_s_outputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The outputs are appended, and are those that action.yml declares."""
    target = tmp_path / "out"
    target.write_text("before=1\n")
    monkeypatch.setenv("GITHUB_OUTPUT", str(target))
    data = {"verdict": "over", "results": [{"device_bytes": {"expected": 7}}, {}]}
    entry().set_outputs(data, tmp_path / "r.json")
    lines = dict(line.split("=", 1) for line in target.read_text().splitlines())
    assert (lines["before"], lines["verdict"], lines["peak-bytes"]) == ("1", "over", "7")
    assert set(read_document(ROOT / "action.yml").data["outputs"]) <= set(lines)


def test_hook() -> None:
    """The pre-commit hook calls check on files that are called after us."""
    [hook] = read_document(ROOT / ".pre-commit-hooks.yaml").data
    assert hook["entry"] == "ftplan check"
    assert re.search(hook["files"], "configs/ftplan-llama.yaml")
    assert not re.search(hook["files"], "configs/llama.yaml")


def test_the_page_about_ci_names_real_options() -> None:
    """Every ftplan command line in docs/ci.md uses a command and options that exist."""
    text = (ROOT / "docs/ci.md").read_text(encoding="utf-8")
    lines = re.findall(r"ftplan (check [^`'\n]*)", text)
    assert len(lines) >= 8
    names = {command.name for command in COMMANDS}
    for line in lines:
        words = shlex.split(line.split(" #")[0])
        assert words[0] in names
        page = help_text(words[0])
        for word in words[1:]:
            if word.startswith("-"):
                assert re.search(rf"(^|[ ,]){re.escape(word)}\b", page), (line, word)
