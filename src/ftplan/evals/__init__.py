"""Result files of evaluation tools -> failures, comparisons, labels.

One reader per tool in :mod:`ftplan.evals.readers`; files are recognised by what is in them.
"""

from __future__ import annotations

from ftplan.evals.compare import compare_runs, pick_variant
from ftplan.evals.convert import join_failures, run_of, state_of, to_failures, with_suggestions
from ftplan.evals.options import ReadOptions
from ftplan.evals.reading import is_result_file, parse_results, read_results
from ftplan.evals.suggest import signal_of, signals, suggest

__all__ = [
    "ReadOptions",
    "compare_runs",
    "is_result_file",
    "join_failures",
    "parse_results",
    "pick_variant",
    "read_results",
    "run_of",
    "signal_of",
    "signals",
    "state_of",
    "suggest",
    "to_failures",
    "with_suggestions",
]
