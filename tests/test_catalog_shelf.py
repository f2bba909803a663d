"""A row that is read alone is the row that is read with all others."""

from __future__ import annotations

import pytest

from ftplan.catalog.shelf import read_row, read_rows


@pytest.mark.parametrize("file", ["models.json", "gpus.json", "optimizers.json"])
def test_a_row_alone(file: str) -> None:
    """Every row is a line that begins with its name; no part of a name finds a row."""
    for row in read_rows(file):
        assert read_row(file, row["name"]) == row
    for name in ("", row["name"][:-1], row["name"] + ".", ".*", '"', "\n", "ä"):
        assert read_row(file, name) is None
