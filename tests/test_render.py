"""Windows: every format says the same, escapes what it must, and keeps to its system's limits."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.errors import Location
from ftplan.files.document import parse_document
from ftplan.render import github, gitlab, html, junit, markdown, sarif, table, yaml
from ftplan.render import json as json_window
from ftplan.render.findings import RuleText
from ftplan.report import (
    Assumption,
    CheckReport,
    Finding,
    GpuSummary,
    Interval,
    ModelSummary,
    Phase,
    Remedy,
    Report,
    Severity,
    Term,
    Verdict,
)
from ftplan.units import GIB

NASTY = "100% <b>'\"&\n::error::x|`y`,z:\x1b[31m\x00\ufffe"


def interval(size: float) -> Interval:
    return Interval(
        low=int(size * 0.97 * GIB), expected=int(size * GIB), high=int(size * 1.05 * GIB)
    )


def report(findings: tuple[Finding, ...] = ()) -> Report:
    terms = (
        Term(name="weights/frozen", bytes=6 * GIB, at_peak=True, formula="n x b", source="config"),
        Term(name="logits/loss", bytes=3 * GIB, at_peak=True, formula="t x V", source="torch"),
        Term(name="temporary/step", bytes=GIB, at_peak=False, formula="n", source="torch"),
    )
    return Report(
        verdict="tight",
        model=ModelSummary(name="llama", total_params=8_030_261_248, trainable_params=41_943_040),
        job={"method": {"kind": "qlora", "rank": 16}, "batch": {"micro": 2, "seq_len": 2048}},
        allocated_bytes=Interval(low=9 * GIB, expected=9 * GIB, high=10 * GIB),
        reserved_bytes=interval(10),
        device_bytes=interval(10.5),
        host_bytes=interval(20),
        gpu=GpuSummary(name="t4-16gb", usable_bytes=11 * GIB, count=2),
        peak_phase="backward",
        phases=(
            Phase(name="forward", peak_bytes=8 * GIB),
            Phase(name="backward", peak_bytes=9 * GIB),
        ),
        terms=terms,
        findings=findings,
        assumptions=(Assumption(key="attention", value="sdpa", source="the stack"),),
        remedies=(
            Remedy(change={"batch": {"micro": 1}}, saves_bytes=GIB, costs="time", verdict="fits"),
        ),
        tool_version="1",
    )


def finding(
    code: str = "FIT001",
    severity: Severity = "error",
    message: str = "too much",
    line: int | None = 3,
    help: str = "",
    file: str = "plan.yaml",
) -> Finding:
    where = Location(file=file, line=line, column=2 if line else None) if file else None
    return Finding(code=code, severity=severity, message=message, location=where, help=help)


def check(*found: tuple[Finding, ...]) -> CheckReport:
    names = [f"plan{index}.yaml" for index in range(len(found))]
    results = tuple((name, report(f)) for name, f in zip(names, found, strict=True))
    return CheckReport(verdict="tight", results=results)


# --- github -------------------------------------------------------------------------------------

COMMAND = re.compile(
    r"::(error|warning|notice) title=([^,]*),file=([^,]*),line=(\d+),col=(\d+)::(.*)"
)


def commands(text: str) -> list[re.Match[str]]:
    return [m for line in text.splitlines() if (m := COMMAND.fullmatch(line))]


def test_github_command() -> None:
    """An annotation stands at its line, with the code in its title and the help in its text."""
    found = finding(message="50% over, by: 2", help="do less")
    [command] = commands(github.render_check(check((found,))))
    assert command.groups() == (
        "error", "ftplan (FIT001)", "plan.yaml", "3", "2", "50%25 over, by: 2%0Ahelp: do less",
    )  # fmt: skip


@settings(deadline=None)
@given(st.text(max_size=40), st.text(min_size=1, max_size=20))
def test_github_commands_are_one_line(message: str, file: str) -> None:
    """No message and no file name can end a command or begin another one."""
    text = github.render_check(check((finding(message=message, file=file),)))
    lines = text.split("\n")
    assert len(lines) == 3
    assert lines[0].startswith("::error title=ftplan (FIT001),file=")
    assert "\r" not in lines[0]
    assert lines[1].startswith("ftplan: ")


def test_github_limits() -> None:
    """Ten annotations at most: first the worst of each file, errors before the rest."""
    one = (finding(severity="info", code="INF001"), finding(code="FIT001"))
    few = tuple(finding(severity="warning", code=f"WRN{n:03}") for n in range(9))
    text = github.render_check(check(few, one, one, one))
    titles = [m[2] for m in commands(text)]
    assert len(titles) == github.ANNOTATIONS_PER_STEP
    assert titles[:4] == ["ftplan (FIT001)"] * 3 + ["ftplan (WRN000)"]
    assert "5 more finding(s)" in text.splitlines()[-1]


def test_github_severities() -> None:
    """info is a notice."""
    text = github.render_check(check((finding(severity="info"),)))
    assert commands(text)[0][1] == "notice"


def test_summary_limit() -> None:
    """The summary stays within what GitHub shows, and says that it was cut."""
    many = tuple(finding(message=f"{n} \u00e9" * 50) for n in range(200))
    text = github.summary(check(many), limit=5000)
    assert len(text.encode()) <= 5000
    assert "longer than GitHub shows" in text
    assert github.summary(check(())) == markdown.render_check(check(())) + "\n"


# --- gitlab, sarif, junit -----------------------------------------------------------------------


def test_gitlab() -> None:
    """Every issue has a fingerprint of its own, and the code in its description."""
    twice = finding()
    issues = json.loads(gitlab.render_check(check((twice, twice), (twice,))))
    assert len({issue["fingerprint"] for issue in issues}) == 3
    assert issues[0]["description"].startswith("FIT001: ")
    assert issues[0]["severity"] == "major"
    assert issues[0]["location"]["positions"]["begin"] == {"line": 3, "column": 2}


def test_fingerprints_survive_moving() -> None:
    """A finding that moves to another line is the same finding."""
    here, there = (json.loads(gitlab.render_check(check((finding(line=n),)))) for n in (3, 30))
    assert here[0]["fingerprint"] == there[0]["fingerprint"]


def test_sarif() -> None:
    """One run, every result's rule is listed, levels and places are SARIF's."""
    found = (finding(), finding(code="CFG002", severity="info", line=None, file="a b/c.yaml"))
    rules = {"FIT001": RuleText(title="does not fit", text="why")}
    log = json.loads(sarif.render_check(check(found), version="1", rules=rules))
    assert log["version"] == "2.1.0"
    [run] = log["runs"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["FIT001", "CFG002"]
    assert run["tool"]["driver"]["rules"][0]["shortDescription"]["text"] == "does not fit"
    for result in run["results"]:
        rule = run["tool"]["driver"]["rules"][result["ruleIndex"]]
        assert rule["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        place = result["locations"][0]["physicalLocation"]
        assert place["region"]["startLine"] >= 1
        assert " " not in place["artifactLocation"]["uri"]


def test_sarif_schema() -> None:
    """The log is valid by the official schema, whose path FTPLAN_SARIF_SCHEMA gives."""
    path = os.environ.get("FTPLAN_SARIF_SCHEMA")
    if not path:
        pytest.skip("FTPLAN_SARIF_SCHEMA does not name the official schema of SARIF 2.1.0")
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(Path(path).read_text(encoding="utf-8"))
    found = (finding(), finding(code="CFG002", severity="info", line=None, file=""))
    for answer in (check(), check(()), check(found, (finding(message=NASTY),))):
        jsonschema.validate(json.loads(sarif.render_check(answer, version="1")), schema)


def test_junit() -> None:
    """One test per file: failed when over, in error when unknown, passed otherwise."""
    names: tuple[Verdict, ...] = ("fits", "over", "unknown")
    results = tuple((f"{v}.yaml", replace(report((finding(),)), verdict=v)) for v in names)
    root = ET.fromstring(junit.render_check(CheckReport(verdict="over", results=results)))
    cases = root.findall(".//testcase")
    assert [case.find("failure") is not None for case in cases] == [False, True, False]
    assert [case.find("error") is not None for case in cases] == [False, False, True]
    suite = root.find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    assert cases[0].get("name") == "fits.yaml on t4-16gb x 2"


def test_machine_formats_survive_any_text() -> None:
    """Whatever a message holds, the documents are well formed."""
    answer = check((finding(message=NASTY, help=NASTY),))
    ET.fromstring(junit.render_check(answer))
    assert json.loads(gitlab.render_check(answer))
    assert json.loads(sarif.render_check(answer))
    assert json.loads(json_window.render(answer))
    assert len(github.render_check(answer).splitlines()) == 2


# --- for people ---------------------------------------------------------------------------------


def test_json_and_yaml_agree() -> None:
    """YAML is the JSON in other clothes; a check has a result per file with its name first."""
    answer = check((finding(),), ())
    data = json.loads(json_window.render(answer))
    assert parse_document(yaml.render(answer), file="f").data == data
    assert [next(iter(result)) for result in data["results"]] == ["file", "file"]
    location = data["results"][0]["findings"][0]["location"]
    assert location == {"file": "plan.yaml", "line": 3, "column": 2}


def test_markdown_tables_are_rectangular() -> None:
    """No content breaks a table: every row has as many cells as its header."""
    nasty = replace(
        report((finding(message=NASTY, help=NASTY),)),
        model=ModelSummary(name=NASTY, total_params=1, trainable_params=0),
        assumptions=(Assumption(key=NASTY, value=NASTY, source=NASTY),),
    )
    answer = CheckReport(verdict="tight", results=((NASTY, nasty),))
    for text in (markdown.render_report(nasty, explain=True), markdown.render_check(answer)):
        width = 0
        for line in text.splitlines():
            cells = len(re.findall(r"(?<!\\)\|", line))
            if not line.startswith("|"):
                width = 0
            elif width:
                assert cells == width, line
            else:
                width = cells
        assert "<b>" not in re.sub(r"(`+) ?.*?\1", "", text)  # code spans show it as it is


def test_table_keeps_control_characters_out() -> None:
    """A name from a file cannot steer the terminal."""
    text = table.render_report(report((finding(message=NASTY),)))
    assert "\x1b" not in text
    assert "\x00" not in text


def test_table_says_the_answer_first() -> None:
    """The verdict and the number stand before any table, in GB and in GiB."""
    lines = table.render_report(report()).splitlines()
    head = "\n".join(lines[:6])
    assert "tight" in head
    assert "11.3 GB (10.50 GiB) per GPU" in head
    assert "95% of 11.00 GiB usable" in head


def test_table_of_an_undecided_file() -> None:
    """A report without numbers is still a page."""
    empty = Report(
        verdict="unknown", model=None, job={}, allocated_bytes=None, reserved_bytes=None,
        device_bytes=None, host_bytes=None, gpu=None, peak_phase=None, findings=(finding(),),
    )  # fmt: skip
    answer = CheckReport(verdict="unknown", results=(("a.yaml", empty),))
    assert "could not decide" in table.render_check(answer)
    for text in (table.render_report(empty), markdown.render_report(empty)):
        assert "FIT001" in text
    assert "FIT001" in html.render(advice=None, reports=[("a.yaml", empty)])


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)


def test_html_escapes_everything() -> None:
    """Nothing from a file becomes markup, and nothing is loaded from elsewhere."""
    evil = "<script>alert(1)</script><img src=x>"
    nasty = replace(
        report((finding(message=evil, help=evil, code=evil),)),
        model=ModelSummary(name=evil, total_params=1, trainable_params=0),
        assumptions=(Assumption(key=evil, value=evil, source=evil),),
        remedies=(Remedy(change={evil: evil}, saves_bytes=1, costs=evil, verdict=None),),
        peak_phase=evil,
    )
    tags = _Tags()
    tags.feed(html.render(advice=None, reports=[(evil, nasty)], title=evil))
    assert not tags.seen & {"script", "img", "link", "iframe"}
    assert "section" in tags.seen
