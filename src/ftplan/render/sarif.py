"""SARIF 2.1.0, as GitHub code scanning and editors read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ftplan.render.findings import RuleText, fingerprints, uri
from ftplan.report import CheckReport

__all__ = ["render_check"]

_LEVEL = {"error": "error", "warning": "warning", "info": "note"}
_PROBLEM = {"error": "error", "warning": "warning", "info": "recommendation"}


def render_check(
    check: CheckReport,
    *,
    base: str = "",
    version: str = "",
    rules: Mapping[str, RuleText] | None = None,
) -> str:
    """One run with a result per finding; ``rules`` says what each code means."""
    texts = rules or {}
    found: dict[str, dict[str, Any]] = {}
    results = []
    for item, identity in fingerprints(check):
        finding = item.finding
        if finding.code not in found:
            text = texts.get(finding.code)
            title = text.title if text is not None else finding.message
            body = text.text if text is not None else (finding.help or finding.message)
            found[finding.code] = {
                "id": finding.code,
                "shortDescription": {"text": title},
                "fullDescription": {"text": body},
                "help": {"text": f"{body}\n\nftplan explain {finding.code}"},
                "properties": {
                    "name": finding.code,
                    "problem.severity": _PROBLEM[finding.severity],
                },
            }
        message = finding.message + (f"\n{finding.help}" if finding.help else "")
        results.append(
            {
                "ruleId": finding.code,
                "ruleIndex": list(found).index(finding.code),
                "level": _LEVEL[finding.severity],
                "message": {"text": message},
                "locations": [
                    {
                        "physicalLocation": {
                            "artifactLocation": {"uri": uri(item.file, base)},
                            "region": {"startLine": item.line, "startColumn": item.column},
                        }
                    }
                ],
                "partialFingerprints": {"ftplan/v1": identity},
            }
        )
    driver: dict[str, Any] = {"name": "ftplan", "rules": list(found.values())}
    if version:
        driver["version"] = version
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
        ],
    }
    return json.dumps(log, indent=2, ensure_ascii=False) + "\n"
