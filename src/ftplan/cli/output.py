"""Where answers go: standard output or a file, written whole or not at all."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ftplan.errors import InputError, Location

__all__ = [
    "Format",
    "FormatOption",
    "OutputOption",
    "emit",
    "note",
    "screen_width",
    "use_colour",
    "write_file",
]

Format = Literal["table", "json", "yaml", "markdown"]

FormatOption = Annotated[
    Format, typer.Option("--format", "-f", help="How the answer is written.", show_default=True)
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Write the answer to FILE, not to the screen."
    ),
]


def emit(text: str, output: Path | None = None) -> None:
    """Print the answer on stdout, or write it to ``output`` (whole or not at all)."""
    text = text if text.endswith("\n") or not text else text + "\n"
    if output is not None and str(output) not in ("-", "/dev/stdout"):
        write_file(output, text)
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # `| head` has read enough; the exit code still carries the verdict
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(message: str) -> None:
    """Progress and warnings, on stderr: they are never part of the answer."""
    print(message, file=sys.stderr)


def write_file(path: Path, text: str) -> None:
    """Replace ``path`` with ``text`` in one step: a reader sees the old file or the new one."""
    import tempfile  # most answers go to the screen

    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")  # a pipe or a device: nothing to replace
            return
        path = path.resolve()  # a link keeps pointing, at the new text
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
        ) as temporary:
            temporary.write(text)
        try:
            mode = path.stat().st_mode if path.exists() else 0o666 & ~_umask()
            os.chmod(temporary.name, mode & 0o777)  # noqa: PTH101 - the handle's name is a str
            Path(temporary.name).replace(path)
        except OSError:
            Path(temporary.name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(
            f"cannot write the file: {error.strerror or error}",
            location=Location(file=str(path)),
            remedy="name a file in a folder that exists and that you may write to",
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def use_colour(output: Path | None = None) -> bool:
    """Colour only for a person: a terminal, unless NO_COLOR; FORCE_COLOR always."""
    if output is not None or os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def screen_width(output: Path | None = None) -> int:
    """Columns to write for: the terminal's, between 60 and 120; 80 in a file or a pipe."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:
        return max(60, min(120, int(columns)))
    if output is None and sys.stdout.isatty():
        try:
            return max(60, min(120, os.get_terminal_size(sys.stdout.fileno()).columns))
        except OSError:
            return 80
    return 80
