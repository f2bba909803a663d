"""GitLab's code quality report."""

from __future__ import annotations

import json

from ftplan.render.findings import fingerprints, relative
from ftplan.report import CheckReport

__all__ = ["render_check"]

_SEVERITY = {"error": "major", "warning": "minor", "info": "info"}


def render_check(check: CheckReport, *, base: str = "") -> str:
    """A list of issues; paths relative to ``base``. The code is repeated in the description,
    because GitLab does not show the check's name."""
    issues = []
    for item, identity in fingerprints(check):
        finding = item.finding
        position = {"line": item.line, "column": item.column}
        issues.append(
            {
                "description": f"{finding.code}: {finding.message}",
                "check_name": finding.code,
                "fingerprint": identity,
                "severity": _SEVERITY[finding.severity],
                "location": {
                    "path": relative(item.file, base),
                    "positions": {"begin": position, "end": position},
                },
            }
        )
    return json.dumps(issues, indent=2, ensure_ascii=False) + "\n"
