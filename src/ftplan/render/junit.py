"""JUnit XML: one test per file, so that every CI system shows which job fits."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from ftplan.render.findings import relative
from ftplan.render.words import VERDICTS, both_units
from ftplan.report import CheckReport, Report

__all__ = ["render_check"]

_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _text(text: str) -> str:
    """Text without the characters that XML 1.0 cannot hold."""
    return _FORBIDDEN.sub("?", text)


def render_check(check: CheckReport, *, base: str = "") -> str:
    """A suite with a test per file: failed when over, in error when it could not be decided."""
    verdicts = [report.verdict or "unknown" for _, report in check.results]
    suite = ET.Element(
        "testsuite",
        name="ftplan",
        tests=str(len(verdicts)),
        failures=str(verdicts.count("over")),
        errors=str(verdicts.count("unknown")),
    )
    for (file, report), verdict in zip(check.results, verdicts, strict=True):
        gpu = f" on {report.gpu.name} x {report.gpu.count}" if report.gpu is not None else ""
        name = _text(relative(file, base))
        case = ET.SubElement(suite, "testcase", classname="org.ftplan.check", name=name + gpu)
        detail = _text(_detail(report))
        if verdict in ("over", "unknown"):
            tag = "failure" if verdict == "over" else "error"
            codes = ", ".join(f.code for f in report.findings if f.severity == "error")
            problem = ET.SubElement(case, tag, type=codes or verdict, message=VERDICTS[verdict])
            problem.text = detail
        elif detail:
            ET.SubElement(case, "system-out").text = detail
    root = ET.Element("testsuites", name="ftplan", tests=suite.get("tests", "0"))
    root.append(suite)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False).join(
        ('<?xml version="1.0" encoding="UTF-8"?>\n', "\n")
    )


def _detail(report: Report) -> str:
    lines = []
    peak = report.device_bytes or report.allocated_bytes
    if peak is not None:
        usable = f" of {both_units(report.gpu.usable_bytes)} usable" if report.gpu else ""
        phase = f", in {report.peak_phase}" if report.peak_phase else ""
        lines.append(f"{both_units(peak.expected)}{usable} per GPU{phase}")
    for finding in report.findings:
        where = f"{finding.location}: " if finding.location else ""
        lines.append(f"{finding.severity} {finding.code} {where}{finding.message}")
        if finding.help:
            lines.append(f"  help: {finding.help}")
    return "\n".join(lines)
