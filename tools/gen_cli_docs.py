"""Write docs/cli.md from the command line itself, or with --check say whether it is current.

Run: python tools/gen_cli_docs.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from ftplan.cli.app import COMMANDS, help_text

PATH = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEAD = """\
# The command line

Generated from the program: `python tools/gen_cli_docs.py` writes it anew. The formats of plans and
answers are in [schema/](schema/), the use in CI is in [ci.md](ci.md).

Only the answer goes to stdout; progress, warnings and errors go to stderr. `--format` gives table,
json, yaml or markdown; `--output FILE` writes the file whole or not at all. NO_COLOR and
FORCE_COLOR are honoured; FTPLAN_DEBUG=1 shows where a fault of ftplan itself happened.

| exit code | meaning |
| --- | --- |
| 0 | answered: for `check`, every job fits |
| 1 | the answer is no: a job does not fit (`check`), or nothing does (`fit`) |
| 2 | could not answer: bad input, an unknown name, a fault |

"""


def text() -> str:
    """The whole page."""
    parts = [HEAD, "```text\n", help_text(None), "```\n"]
    for command in COMMANDS:
        parts += [f"\n## ftplan {command.name}\n\n```text\n", help_text(command.name), "```\n"]
    return "".join(parts)


def main(check: bool) -> int:
    """Returns 1 when the page is stale and ``check`` was asked for."""
    page = text()
    if PATH.is_file() and PATH.read_text(encoding="utf-8") == page:
        return 0
    if check:
        print("stale: docs/cli.md; run: python tools/gen_cli_docs.py", file=sys.stderr)
        return 1
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
