"""The door: parse, call, print, exit. The only place with streams, environment and exit codes."""

from __future__ import annotations

import gc
import sys

__all__ = ["main"]


def main() -> None:
    """The console script. Ends the process with the exit code of the contract: 0, 1 or 2."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("--version", "-V"):
        # answered before typer is imported: editors and CI jobs ask for it often
        from ftplan import __version__

        print(f"ftplan {__version__}")
        return
    # a command makes hundreds of classes and ends: looking for cycles among them frees nothing
    # and is a fifth of the time; what grows without end is still collected
    gc.set_threshold(200_000)
    from ftplan.cli.app import run

    code = run(arguments)
    gc.freeze()  # nor does the end search them for cycles, which took as long as the answer's sums
    sys.exit(code)
