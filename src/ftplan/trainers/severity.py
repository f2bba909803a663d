"""How severe each finding of the readers and of the lint is."""

from __future__ import annotations

from ftplan.report import Severity

__all__ = ["SEVERITY"]

SEVERITY: dict[str, Severity] = {
    "IMP001": "warning",
    "IMP002": "warning",
    "IMP003": "info",
    "IMP004": "warning",
    "IMP005": "warning",
    "IMP006": "warning",
    "IMP007": "info",
    "IMP008": "info",
    "IMP009": "warning",
    "IMP010": "info",
    "CFG001": "warning",
    "CFG002": "warning",
    "CFG003": "warning",
    "CFG004": "warning",
    "CFG005": "warning",
    "CFG006": "error",
    "CFG007": "error",
    "CFG008": "warning",
    "CFG009": "warning",
    "CFG010": "warning",
    "CFG011": "error",
    "CFG012": "info",
    "CFG013": "info",
    "CFG014": "warning",
}
"""Severity of each code; a finding may lower it."""
