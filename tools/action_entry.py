"""The entry of the GitHub Action: install ftplan, check the files, set the outputs.

Inputs come in environment variables and are handed on as arguments; none is ever part of a shell
command, and only an exact version is accepted for installation.
"""

from __future__ import annotations

import glob
import json
import os
import re
import subprocess
import sys
from pathlib import Path

FORMATS = {"json": "json", "markdown": "md", "sarif": "sarif", "gitlab": "json", "junit": "xml"}


def given(name: str) -> str:
    """An input of the action, stripped; empty when it was not given."""
    return os.environ.get(f"INPUT_{name}", "").strip()


def fail(message: str) -> int:
    """Say what is wrong with the action's inputs; exit code 2."""
    print(f"::error title=ftplan::{message}".replace("\n", "%0A"))
    return 2


def install(version: str) -> int:
    """Install from the action's own folder, or the exact version that was asked for."""
    if version and not re.fullmatch(r"[0-9]+(\.[0-9]+)*((a|b|rc|\.dev|\.post)[0-9]+)?", version):
        return fail("version takes an exact version such as 0.1.0, nothing else")
    folder = os.environ.get("GITHUB_ACTION_PATH") or str(Path(__file__).resolve().parent.parent)
    target = f"ftplan=={version}" if version else folder
    command = [sys.executable, "-m", "pip", "install", "--quiet", target]
    return subprocess.run(command, check=False).returncode


def files_of(text: str) -> list[str]:
    """The files that the input names; a glob that matches nothing stays, to be reported."""
    names: list[str] = []
    for pattern in text.split():
        # glob, because Path.glob takes no absolute pattern
        names += sorted(glob.glob(pattern, recursive=True)) or [pattern]  # noqa: PTH207
    return names


def arguments() -> list[str]:
    """The command line of ``ftplan check`` without its format."""
    options: list[str] = []
    for name in ("GPU", "GPUS", "HEADROOM", "FAIL_ON", "AGAINST"):
        if value := given(name):
            options += [f"--{name.lower().replace('_', '-')}={value}"]
    return [*options, "--", *files_of(given("FILES"))]


def main() -> int:
    """Annotations and summary for people, a report file for machines, outputs for later steps."""
    form = given("FORMAT") or "json"
    if form not in FORMATS:
        return fail(f"format takes one of {', '.join(FORMATS)}")
    if not given("FILES"):
        return fail("files names no file")
    if install(given("VERSION")):
        return fail("ftplan could not be installed")
    program = [sys.executable, "-m", "ftplan", "check"]
    code = subprocess.run([*program, "--format", "github", *arguments()], check=False).returncode
    folder = Path(os.environ.get("RUNNER_TEMP") or ".")
    answer = folder / "ftplan-answer.json"
    report = folder / f"ftplan-report.{FORMATS[form]}"
    for file, kind in ((answer, "json"), (report, form)):
        quiet = [*program, "--exit-zero", "--format", kind, "--output", str(file), *arguments()]
        if subprocess.run(quiet, check=False).returncode:
            return fail("the report could not be written")
    set_outputs(json.loads(answer.read_text(encoding="utf-8")), report)
    return code


def set_outputs(data: dict[str, object], report: Path) -> None:
    """Append the outputs to the file that GitHub reads them from."""
    peaks = []
    results = data.get("results")
    for result in results if isinstance(results, list) else []:
        peak = result.get("device_bytes") or result.get("allocated_bytes")
        peaks += [peak["expected"]] if peak else []
    lines = [
        f"verdict={data.get('verdict')}",
        f"peak-bytes={max(peaks, default='')}",
        f"report-path={report}",
    ]
    if target := os.environ.get("GITHUB_OUTPUT"):
        with Path(target).open("a", encoding="utf-8") as stream:
            stream.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
