"""The calculator against true jobs: the real libraries, traced, committed as a bench of peaks."""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEAST_JOBS = 400
"""The bench only grows; a run over fewer jobs has lost some."""
MEDIAN, P95, WORST, UNDER = 0.01, 0.04, 0.08, 0.04
MOST_KNOWN = 0.03
"""Share of the bench that may be excepted as known and explained."""


def _tool(name: str) -> ModuleType:
    if not (ROOT / "tools").exists():
        pytest.skip("the tools are not in an installed package")
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


accuracy = _tool("accuracy")


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    """Every job of the bench with its prediction."""
    found: list[Any] = accuracy.predict_all(accuracy.cases(), workers=1)
    return found


def _predicted(rows: Iterable[Any], split: str) -> list[Any]:
    return [
        row
        for row in rows
        if row.case.split == split
        and row.predicted_bytes is not None
        and accuracy.known_reason(row, excepted=True) is None
    ]


def _named(rows: Iterable[Any]) -> str:
    return "\n".join(f"{100 * row.error:+.2f} % {row.name}" for row in rows)


def test_every_job_of_the_bench_is_answered(rows: list[Any]) -> None:
    """No job of the bench is lost, refused or crashes: each has a prediction."""
    assert len(rows) == len(accuracy.cases()) >= LEAST_JOBS
    refused = [f"{r.name}: {r.refusal}" for r in rows if r.predicted_bytes is None]
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize("split", ["build", "held"])
def test_errors_over_all_regimes_are_small(rows: list[Any], split: str) -> None:
    """On either side of the split: median 1 %, 95 of 100 within 4 %, worst 8 %, under at most 4 %.

    The held side is architectures that no one looked at while the calculator was written.
    """
    mine = _predicted(rows, split)
    total = accuracy.summary(row.error for row in mine)
    assert total.median <= MEDIAN and total.p95 <= P95, total
    far = [row for row in mine if abs(row.error) > WORST or row.error < -UNDER]
    assert not far, f"too far from the truth:\n{_named(far)}"


@pytest.mark.parametrize("split", ["build", "held"])
def test_errors_of_each_regime_are_small(rows: list[Any], split: str) -> None:
    """No way of training hides behind the others: the median of each with three jobs or more is
    within 1 %."""
    regimes = defaultdict(list)
    for row in _predicted(rows, split):
        regimes[row.case.regime].append(row)
    worse = []
    for regime, members in regimes.items():
        total = accuracy.summary(row.error for row in members)
        if len(members) >= 3 and total.median > MEDIAN:
            worse.append(f"{regime}: median {total.median:.2%}\n{_named(members)}")
    assert not worse, "\n".join(worse)


def test_every_job_of_zero_3_is_within_one_percent(rows: list[Any]) -> None:
    """What DeepSpeed gathers when is a machine without chance in it: no job is excepted."""
    mine = [row for row in rows if row.case.regime.startswith("zero3")]
    assert len(mine) >= 40
    far = [row for row in mine if abs(row.error) > 0.01]
    assert not far, _named(far)


def test_known_residuals_are_few_and_still_there(rows: list[Any]) -> None:
    """Each exception is a job of the bench that is off for a stated reason, and they are few."""
    excepted = [row for row in rows if accuracy.known_reason(row, excepted=True)]
    assert len(excepted) <= MOST_KNOWN * len(rows)
    healed = [row for row in excepted if row.predicted_bytes and abs(row.error) < MEDIAN]
    assert not healed, f"within 1 % now, take them off the list:\n{_named(healed)}"


def test_every_published_reading_is_compared_or_left_out_with_a_reason() -> None:
    """Readings of others are held against reports of the same jobs; none is dropped silently.

    Where the software ran modules that are walked, with every setting known, on one GPU: of what
    is allocated nine in ten are within 8 %, of what is reserved within 20 % (lengths of samples
    are known by their mean and deviation alone), and nineteen in twenty lie in the interval.
    The page of errors shows the other stacks. PEFT's comparison of methods is one length, found
    from one row of it: three in four of the others are within 2 %, nine in ten within 6 %.
    """
    compared, left_out = accuracy.published()
    assert len(compared) >= 200 and len(compared) + len(left_out) >= 500
    assert all(len(reason) > 10 for _, reason in left_out)
    known = [r for r in compared if r.quality == "A" and r.gpus == 1]
    for counter, median, most in (("allocated", 0.03, 0.08), ("reserved", 0.08, 0.20)):
        mine = [reading for reading in known if reading.counter == counter and reading.walked]
        assert accuracy.summary(reading.error for reading in mine).median <= median
        assert sum(abs(r.error) <= most for r in mine) >= 0.9 * len(mine)
        assert sum(reading.inside for reading in mine) >= 0.95 * len(mine)
    adapters = [reading for reading in compared if reading.source == "peft"]
    assert len(adapters) >= 40
    for most, share in ((0.02, 0.75), (0.06, 0.9)):
        assert sum(abs(r.error) <= most for r in adapters) >= share * len(adapters)
    widths = sorted(reading.width for reading in known)
    assert widths[len(widths) // 2] < 0.15


def test_readings_of_litgpt_are_where_its_own_modules_are_walked() -> None:
    """Two tables of LitGPT (2023: LoRA and both adapters on 40 GB; 2024: its config hub), each row
    at the stack of its time: all within 1 % of what their authors read."""
    compared, _ = accuracy.published()
    readings = [r for r in compared if r.source == "litgpt" and r.gpus == 1]
    assert len(readings) >= 60 and all(r.walked and r.inside for r in readings)
    assert all(abs(r.error) <= 0.01 for r in readings), _named_readings(readings)


def _named_readings(readings: Iterable[Any]) -> str:
    return "\n".join(f"{100 * r.error:+.2f} % {r.identity}" for r in readings)


def test_no_job_that_ran_out_of_memory_is_called_fits() -> None:
    """Jobs that ran out, for a stated cause, are over or tight."""
    judged, left_out = accuracy.out_of_memory()
    assert len(judged) >= 39 and len(judged) + len(left_out) >= 40
    assert not [identity for identity, verdict, _ in judged if verdict == "fits"]
