"""FILE and flags to a job; FILE may be standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ftplan.cli.flags import JobFlags, apply_flags
from ftplan.errors import InputError

if TYPE_CHECKING:
    from ftplan.front.jobs import JobInput

__all__ = ["read_with_flags"]


def read_with_flags(file: Path | None, flags: JobFlags, *, any_method: bool = False) -> JobInput:
    """The job of ``file`` (``-``: standard input) with the flags over it, or of flags alone."""
    from ftplan.front.jobs import read_job

    if file is None and (flags.trainer is not None or flags.overlay):
        raise InputError("--from and --overlay say how FILE is read, and there is none")
    text = None
    if file is not None and str(file) == "-":
        from ftplan.files.document import decode

        file = Path("standard input")
        text = decode(sys.stdin.buffer.read(), file=str(file))
    return read_job(
        file,
        change=lambda plan: apply_flags(plan, flags, any_method=any_method),
        text=text,
        trainer=flags.trainer,
        overlays=flags.overlay or (),
    )
