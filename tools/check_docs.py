"""Check every generated page against its generator. Each prints the command that mends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parent
GENERATORS = (
    "gen_cli_docs.py",
    "gen_evals_docs.py",
    "gen_schemas.py",
    "generate_rule_docs.py",
    "gen_accuracy.py",
    "gen_utilisation.py",
)


def main() -> int:
    """Run all generators in check mode; 1 when any page is stale."""
    stale = [
        name
        for name in GENERATORS
        if subprocess.run([sys.executable, str(TOOLS / name), "--check"], check=False).returncode
    ]
    for name in stale:
        print(f"stale: run python tools/{name}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
