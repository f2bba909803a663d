"""Write docs/schema/*.json, or with --check say whether they are what the code says.

Run: python tools/gen_schemas.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from ftplan.files.schema import SCHEMAS, schema
from ftplan.render.json import render

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "schema"


def main(check: bool) -> int:
    """Returns 1 when a file is stale and ``check`` was asked for."""
    stale = []
    for name in SCHEMAS:
        path = FOLDER / f"ftplan-{name}.schema.json"
        text = render(schema(name))
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.name)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"stale: {', '.join(stale)}; run: python tools/gen_schemas.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
