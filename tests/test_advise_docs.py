"""The pages in docs/rules are the rules' own text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[1] / "tools" / "generate_rule_docs.py"


def test_rule_pages_are_up_to_date() -> None:
    """Every rule has its generated page, and none is stale or left over."""
    result = subprocess.run(
        [sys.executable, str(TOOL), "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
