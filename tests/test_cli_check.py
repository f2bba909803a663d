"""check: verdicts and exit codes, many files at once, baselines, and what CI systems get."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_helpers import PLAN, Terminal

from ftplan.front.checking import exit_code, worst
from ftplan.report import CheckReport, Report, Verdict

SMALL = PLAN.replace("a100-80gb", "t4-16gb")  # does not fit there
NO_GPU = PLAN.replace("hardware: {gpu: a100-80gb}\n", "")
HUGE = SMALL.replace("micro: 1", "micro: 8")


@pytest.fixture
def ftplan_(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "FTPLAN_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    for name in ("GITHUB_STEP_SUMMARY", "GITHUB_WORKSPACE", "CI_PROJECT_DIR"):
        monkeypatch.delenv(name, raising=False)
    return Terminal(capsys)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a plan that fits, one that does not, one without a GPU, and a broken one."""
    monkeypatch.chdir(tmp_path)
    Path("fits.yaml").write_text(PLAN)
    Path("over.yaml").write_text(SMALL)
    Path("huge.yaml").write_text(HUGE)
    Path("nogpu.yaml").write_text(NO_GPU)
    Path("broken.yaml").write_text("version: 1\nmodel: [\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "verdict"),
    [
        (("fits.yaml",), 0, "fits"),
        (("over.yaml",), 1, "over"),
        (("nogpu.yaml",), 2, "unknown"),
        (("broken.yaml",), 2, "unknown"),
        (("missing.yaml",), 2, "unknown"),
        (("fits.yaml", "broken.yaml"), 2, "unknown"),
        (("broken.yaml", "over.yaml", "fits.yaml"), 1, "over"),
        (("nogpu.yaml", "--gpu", "a100-80gb"), 0, "fits"),
        (("fits.yaml", "--gpu", "t4-16gb"), 1, "over"),
        (("fits.yaml", "--headroom", "95%"), 1, "over"),
        (("broken.yaml", "--fail-on", "unknown"), 1, "unknown"),
        (("over.yaml", "broken.yaml", "--exit-zero"), 0, "over"),
    ],
)
def test_exit_codes(ftplan_: Terminal, arguments: tuple[str, ...], code: int, verdict: str) -> None:
    """1 when any is over, else 2 when any is unknown, else 0; the JSON says the same."""
    said = ftplan_("check", *arguments, "--format", "json")
    assert (said.code, said.err) == (code, "")
    assert said.data["verdict"] == verdict
    assert said.data["schema_version"] == 1


def test_tight() -> None:
    """Tight passes, unless --fail-on tight; over always fails; an empty answer passes."""

    def answer(*verdicts: Verdict) -> CheckReport:
        empty = dict.fromkeys(
            ("model", "allocated_bytes", "reserved_bytes", "device_bytes", "host_bytes", "gpu")
        )
        results = tuple(
            ("f", Report(verdict=v, job={}, peak_phase=None, **empty))  # type: ignore[arg-type]
            for v in verdicts
        )
        return CheckReport(verdict=worst(verdicts), results=results)

    assert exit_code(answer("tight", "fits")) == 0
    assert exit_code(answer("tight", "fits"), ["tight"]) == 1
    assert exit_code(answer("tight", "unknown")) == 2
    assert exit_code(answer("tight", "unknown", "over")) == 1
    assert exit_code(answer()) == 0


def test_every_file_has_a_result(ftplan_: Terminal) -> None:
    """One bad file never hides the others; results keep the order of the command line."""
    files = ["broken.yaml", "fits.yaml", "missing.yaml", "over.yaml"]
    data = ftplan_("check", *files, "--format", "json").data
    assert [r["file"] for r in data["results"]] == files
    assert [r["verdict"] for r in data["results"]] == ["unknown", "fits", "unknown", "over"]
    refused = data["results"][0]
    assert refused["allocated_bytes"] is None
    assert refused["findings"][0]["code"] == "FIT011"
    assert refused["findings"][0]["location"]["line"] == 3


def test_a_job_without_a_gpu_says_what_to_pass(ftplan_: Terminal) -> None:
    """Unknown comes with what would decide it, and with the numbers that are known."""
    [result] = ftplan_("check", "nogpu.yaml", "--format", "json").data["results"]
    assert result["allocated_bytes"]["expected"] > 0
    [finding] = [f for f in result["findings"] if f["code"] == "FIT013"]
    assert "--gpu" in finding["help"]


def test_over_points_at_the_gpu(ftplan_: Terminal) -> None:
    """The finding of a job that does not fit stands where its GPU is named."""
    text = ftplan_("check", "over.yaml", "--format", "github").out
    line = SMALL.splitlines().index("hardware: {gpu: t4-16gb}") + 1
    assert f"file=over.yaml,line={line},col=12" in text
    assert text.startswith("::error title=ftplan (")


def test_a_wrong_flag_does_not_blame_the_file(ftplan_: Terminal) -> None:
    """A GPU that only a flag names wrongly is about no line of the file."""
    said = ftplan_("check", "fits.yaml", "--gpu", "a1000x", "--format", "json")
    assert said.code == 2
    finding = said.data["results"][0]["findings"][0]
    assert (finding["code"], finding["location"]["line"]) == ("FIT012", None)
    assert "a1000x" in finding["message"]


def test_wrong_fail_on(ftplan_: Terminal) -> None:
    """A verdict that does not exist is refused."""
    said = ftplan_("check", "fits.yaml", "--fail-on", "maybe")
    assert (said.code, said.out) == (2, "")
    assert "over, tight, unknown" in said.err


def test_step_summary(ftplan_: Terminal, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GitHub's summary is appended to, never replaced, and stays within its limit."""
    summary = folder / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert ftplan_("check", "over.yaml", "--format", "github").code == 1
    text = summary.read_text()
    assert text.startswith("before\n## ftplan: does not fit\n")
    summary.write_text("x" * 2**20)
    ftplan_("check", "over.yaml", "--format", "github")
    assert summary.stat().st_size <= 2**20


@pytest.mark.parametrize(
    ("format", "variable"), [("github", "GITHUB_WORKSPACE"), ("gitlab", "CI_PROJECT_DIR")]
)
def test_paths_are_the_project_s(
    ftplan_: Terminal, folder: Path, monkeypatch: pytest.MonkeyPatch, format: str, variable: str
) -> None:
    """In a subfolder, files are named from the project's folder, as the CI system does."""
    monkeypatch.setenv(variable, str(folder))
    below = folder / "configs"
    below.mkdir()
    (below / "over.yaml").write_text(SMALL)
    monkeypatch.chdir(below)
    assert "configs/over.yaml" in ftplan_("check", "over.yaml", "--format", format).out


@pytest.mark.parametrize("format", ["table", "yaml", "markdown", "gitlab", "sarif", "junit"])
def test_formats(ftplan_: Terminal, format: str) -> None:
    """Every format names each file and keeps the exit code."""
    said = ftplan_("check", "fits.yaml", "over.yaml", "broken.yaml", "--format", format)
    assert (said.code, said.err) == (1, "")
    assert "over.yaml" in said.out
    assert "broken.yaml" in said.out


# --- baselines ----------------------------------------------------------------------------------


def test_against_the_same_plan(ftplan_: Terminal) -> None:
    """What was already so is not reported again, even when it does not fit."""
    said = ftplan_("check", "over.yaml", "--against", "over.yaml", "--format", "json")
    assert said.code == 0
    assert said.data["results"] == []
    assert "nothing got worse" in ftplan_("check", "over.yaml", "--against", "over.yaml").out


def test_against_a_smaller_plan(ftplan_: Terminal) -> None:
    """A job that grew says by how much."""
    said = ftplan_("check", "huge.yaml", "--against", "over.yaml", "--format", "json")
    assert said.code == 1
    [result] = said.data["results"]
    [growth] = [f for f in result["findings"] if f["code"] == "FIT015"]
    assert "GiB more than the baseline" in growth["message"]


def test_against_a_larger_plan(ftplan_: Terminal) -> None:
    """A job that shrank is no news."""
    said = ftplan_("check", "over.yaml", "--against", "huge.yaml", "--format", "json")
    assert (said.code, said.data["results"]) == (0, [])


def test_against_an_earlier_answer(ftplan_: Terminal) -> None:
    """The JSON of an earlier check is a baseline for each of its files."""
    ftplan_("check", "over.yaml", "fits.yaml", "--format", "json", "-o", "main.json")
    Path("fits.yaml").write_text(PLAN.replace("micro: 1", "micro: 2"))
    said = ftplan_("check", "over.yaml", "fits.yaml", "--against", "main.json", "--format", "json")
    assert said.code == 0
    assert [r["file"] for r in said.data["results"]] == ["fits.yaml"]
    assert said.data["results"][0]["findings"][0]["code"] == "FIT015"


def test_a_new_file_is_reported_whole(ftplan_: Terminal) -> None:
    """A file that the baseline does not know is judged as if there were none."""
    ftplan_("check", "fits.yaml", "--format", "json", "-o", "main.json")
    assert ftplan_("check", "over.yaml", "--against", "main.json").code == 1


def test_a_missing_baseline_is_an_error(ftplan_: Terminal) -> None:
    """Without its baseline nothing can be said, and the reason is named."""
    said = ftplan_("check", "fits.yaml", "--against", "nowhere.json")
    assert (said.code, said.out) == (2, "")
    assert "nowhere.json: there is no such file" in said.err


def test_library(folder: Path) -> None:
    """The library's check is the command line's."""
    import ftplan
    from ftplan.render.json import render

    answer = ftplan.check(["fits.yaml", "over.yaml"])
    data = json.loads(render(answer))
    assert [r["verdict"] for r in data["results"]] == ["fits", "over"]
    assert ftplan.load_plan("fits.yaml").batch.micro == 1
