"""Fixtures that several files share."""

from __future__ import annotations

import os

import pytest
from cli_helpers import Terminal
from hypothesis import settings

# The same examples on every run: a red CI is a change's fault, never the dice's.
# HYPOTHESIS_PROFILE=default goes looking for new ones.
settings.register_profile("same", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture
def ftplan(capsys: pytest.CaptureFixture[str]) -> Terminal:
    """The command line, run in this process."""
    return Terminal(capsys)
