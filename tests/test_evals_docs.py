"""The pages about results and labelling say what the program does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ftplan.evals.labelling import HELP

ROOT = Path(__file__).parents[1]


def test_the_page_about_results_is_current() -> None:
    """docs/evals.md is what the readers and the mapping say."""
    spec = importlib.util.spec_from_file_location("gen", ROOT / "tools" / "gen_evals_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(check=True) == 0, "run: python tools/gen_evals_docs.py"


def test_the_keys_of_the_label_screen_are_documented() -> None:
    """Every key that the help screen names is on the page."""
    page = (ROOT / "docs" / "label.md").read_text(encoding="utf-8")
    for key in ("n TEXT", "t TEST=pass", "+NAME CLASS", "Enter", "`s`", "`u`", "`m`", "`?`", "`q`"):
        assert key in page
        assert key.strip("`") in HELP
