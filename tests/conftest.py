"""Fixtures that several files share."""

from __future__ import annotations

import pytest
from cli_helpers import Terminal


@pytest.fixture
def ftplan(capsys: pytest.CaptureFixture[str]) -> Terminal:
    """The command line, run in this process."""
    return Terminal(capsys)
