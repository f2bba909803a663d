"""The door: parse, call, print, exit. The only place with streams, environment and exit codes."""

from __future__ import annotations

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
    from ftplan.cli.app import run

    sys.exit(run(arguments))
