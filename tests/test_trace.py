"""The annex without torch: the bench that is committed, and the windows of a traced job."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ftplan.errors import MissingExtraError
from ftplan.render.trace import (
    render,
    render_markdown,
    render_modules,
    render_reading,
    render_svg,
    render_timeline,
)

BENCH = Path(__file__).parent.parent / "validation" / "bench"
PHASES = {"forward", "backward", "step"}


def bench_files() -> list[dict[str, Any]]:
    """Every file of the bench, parsed."""
    return [json.loads(path.read_text(encoding="ascii")) for path in sorted(BENCH.glob("*.json"))]


def test_bench_is_as_large_as_promised() -> None:
    """At least 400 jobs over 25 architectures, 60 of them sharded, on both sides of the split."""
    files = bench_files()
    jobs = [job for file in files for job in file["jobs"]]
    sharded = [job for job in jobs if job["plan"]["sharding"]["kind"] == "fsdp"]
    splits = Counter(file["split"] for file in files)
    assert len(jobs) >= 400
    assert len(files) >= 25
    assert len(sharded) >= 60
    assert splits["build"] >= 10 and splits["held"] >= 10


def test_every_bench_job_adds_up() -> None:
    """The terms of a job are its peak, to the byte, and its peak is its worst phase's."""
    checked = 0
    for file in bench_files():
        assert {"torch", "transformers", "peft"} <= set(file["versions"])
        for job in file["jobs"]:
            assert sum(job["terms"].values()) == job["allocated_bytes"]
            assert max(job["phases"].values()) == job["allocated_bytes"]
            assert job["phases"][job["peak_phase"]] == job["allocated_bytes"]
            evaluated = {"evaluation"} if job["plan"]["batch"].get("eval_micro") else set()
            assert set(job["phases"]) == PHASES | evaluated
            assert job["trainable_params"] > 0
            checked += 1
    assert checked >= 400


def test_bench_has_no_job_twice() -> None:
    """A plan with its depth stands once in the bench."""
    seen = [
        json.dumps([job["plan"], job["layers"]]) for file in bench_files() for job in file["jobs"]
    ]
    assert len(seen) == len(set(seen))


def test_bench_covers_the_regimes() -> None:
    """No family of regimes is missing, so that no accuracy stands on nothing."""
    kinds: Counter[str] = Counter()
    for file in bench_files():
        for job in file["jobs"]:
            plan = job["plan"]
            kinds[plan["method"]["kind"]] += 1
            kinds[f"mixed {plan['precision']['mixed']}"] += 1
            kinds[f"attention {plan['attention']}"] += 1
            kinds[f"padding {plan['batch']['padding']}"] += 1
            kinds[f"checkpointed {bool(plan['gradient_checkpointing'])}"] += 1
            kinds[f"stack {plan['stack']}"] += 1
    for kind in (
        "full", "partial", "lora", "qlora", "dora", "ia3", "vera", "loha", "lokr", "oft",
        "ln_tuning", "prompt_tuning", "prefix_tuning", "mixed no", "mixed bf16", "mixed fp16",
        "attention eager", "attention sdpa", "attention flash", "padding right",
        "checkpointed True", "checkpointed False", "stack pytorch", "stack transformers",
    ):  # fmt: skip
        assert kinds[kind] >= 3, kind


def test_split_is_by_architecture() -> None:
    """An architecture is on the side of the split that the generator fixed for it."""
    source = (Path(__file__).parent.parent / "src/ftplan/trace/bench.py").read_text()
    for file in bench_files():
        assert f'"{file["architecture"]}": "{file["split"]}"' in source


SUMMARY: dict[str, Any] = {
    "allocated_bytes": {"traced": 10_000_000_000, "predicted": 10_100_000_000},
    "error": 0.01,
    "peak_phase": {"traced": "backward", "predicted": "backward"},
    "phases": [{"name": "backward", "traced": 10_000_000_000, "predicted": None}],
    "terms": [{"name": "weights", "traced": 4_000_000_000, "predicted": 4_000_000_000}],
    "model": {"total_params": 2_000_000_000, "trainable_params": 1_000},
    "versions": {"torch": "2.13.0"},
    "note": "a note",
}


def test_truth_stands_beside_prediction() -> None:
    """The table has both numbers, their difference in percent, and no number made up."""
    text = render(SUMMARY)
    first = next(line for line in text.splitlines() if line.startswith("allocated"))
    assert "10.0 GB" in first and "10.1 GB" in first and "+1.0%" in first
    phase = next(line for line in text.splitlines() if line.startswith("  backward"))
    assert phase.rstrip().endswith("-")
    assert "a note" in text
    assert "| allocated | 10.0 GB | 10.1 GB | +1.0% |" in render_markdown(SUMMARY)


def test_timeline_keeps_its_peak() -> None:
    """However narrow the chart, its highest column is the highest of the run."""
    timeline = {
        "live_bytes": [1, 2, 9, 3] * 50,
        "phases": [{"name": "forward", "at": 0}, {"name": "backward", "at": 100}],
        "peak_bytes": 9,
    }
    for width in (40, 80, 120):
        lines = render_timeline(timeline, width=width).splitlines()
        assert "#" in lines[0]
        assert all(len(line) <= width for line in lines)
        assert "|forward" in lines[-1]


def test_svg_is_well_formed_and_escapes_its_title() -> None:
    """The picture is one XML document whatever the plan's file is called."""
    from xml.etree import ElementTree

    timeline = {"live_bytes": [1, 5, 3], "phases": [{"name": "forward", "at": 0}]}
    picture = render_svg(timeline, 'a <b> & "c"')
    root = ElementTree.fromstring(picture)
    assert root.tag.endswith("svg")


def test_modules_beyond_the_list_are_added_up() -> None:
    """What is not shown is shown as a sum: the list adds up to the peak."""
    rows = [{"module": f"m{i}", "term": "activations", "bytes": 10**9} for i in range(5)]
    text = render_modules(rows, most=2)
    assert "(the rest)" in text and "3.0 GB" in text


def test_a_reading_is_written_whole() -> None:
    """A GPU's reading shows each counter by its own name, and an out-of-memory run says so."""
    reading = {
        "allocated_bytes": 10**9, "reserved_bytes": 2 * 10**9, "device_bytes": 3 * 10**9,
        "host_bytes": None, "phases": {"forward": 10**9}, "step_seconds": 0.25, "oom": True,
        "message": "CUDA out of memory", "where": {"gpu": "T4", "cuda": "12.8"},
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    for text in (render_reading(reading), render_reading(reading, markdown=True)):
        for part in ("1.0 GB", "2.0 GB", "3.0 GB", "0.250 s", "out of memory", "T4"):
            assert part in text


def test_without_the_extra_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A missing package is the user's to install: the error names the extra."""
    import ftplan.trace

    monkeypatch.setattr(ftplan.trace, "PACKAGES", ("a_package_that_does_not_exist",))
    with pytest.raises(MissingExtraError) as caught:
        ftplan.trace.require("ftplan trace")
    assert "ftplan[trace]" in str(caught.value)


def test_importing_the_annex_loads_no_torch() -> None:
    """`import ftplan.trace` costs nothing: the commands decide when torch is loaded."""
    import subprocess

    code = "import sys, ftplan.trace; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_suite_is_measured_job_by_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every job of the suite is a line of the readings, a refused one with its error."""
    from ftplan.errors import UnsupportedError
    from ftplan.trace import measure

    def fake(plan: Any, config: Any, **options: Any) -> dict[str, Any]:
        if config["model_type"] == "gpt2":
            raise UnsupportedError("a GPT of another kind")
        return {"allocated_bytes": 1, "layers": options["layers"]}

    monkeypatch.setattr(measure, "measure_plan", fake)
    suite = BENCH.parent / "suite.yaml"
    readings = tmp_path / "deep" / "readings.jsonl"
    count = measure.measure_suite(suite, readings)
    lines = [json.loads(line) for line in readings.read_text().splitlines()]
    assert count == len(lines) >= 20
    refused = [line for line in lines if "error" in line]
    assert len(refused) == 2
    assert all(line["allocated_bytes"] == 1 for line in lines if line not in refused)
    assert {line["layers"] for line in lines if line not in refused} >= {None, 8, 16}


@pytest.mark.parametrize("text", ["", "jobs: []", "[1, 2]", "jobs: {a: 1}"])
def test_a_suite_without_jobs_is_refused(tmp_path: Path, text: str) -> None:
    """An empty suite is a mistake, and the error shows how one is written."""
    from ftplan.errors import InputError
    from ftplan.trace.measure import measure_suite

    suite = tmp_path / "suite.yaml"
    suite.write_text(text)
    with pytest.raises(InputError) as caught:
        measure_suite(suite, tmp_path / "readings.jsonl")
    assert "jobs:" in caught.value.remedy


def test_the_witness_agreed() -> None:
    """On ten jobs MemTracker and the ledger differ by rounding up to 512 bytes, nothing else."""
    document = json.loads((BENCH.parent / "mem_tracker.json").read_text(encoding="ascii"))
    assert len(document["jobs"]) >= 10
    for job in document["jobs"]:
        assert 0 <= job["ledger_bytes"] - job["witness_bytes"] < 100_000


REFUSED: list[dict[str, Any]] = [
    {"method": None},
    {"stack": "nemo"},
    {"stack": "torchtitan"},
    {"stack": "megatron"},
    {"stack": "torchtune", "sharding": {"kind": "fsdp"}},
    {"stack": "litgpt", "task": "dpo"},
    {"kernels": "liger"},
    {"sharding": {"kind": "fsdp", "tp": 2}},
    {"sharding": {"kind": "none", "pp": 2}},
    {"sharding": {"kind": "fsdp", "version": 1, "offload": "params"}},
    {"sharding": {"kind": "zero3", "offload": "nvme"}},
    {"optimizer": {"name": "adamw", "in_backward": True}},
]


@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_be_run_is_refused_by_name(change: dict[str, Any]) -> None:
    """A choice that a trace would not make true is refused, never traced without it."""
    from ftplan.errors import UnsupportedError
    from ftplan.trace.job import plan_from, resolve

    plan = {"model": "llama-3.2-1b", "method": {"kind": "lora"}}
    resolve(plan_from(plan))
    with pytest.raises(UnsupportedError):
        resolve(plan_from({**plan, **change}))


def test_cards_have_their_capability() -> None:
    """The card decides which attention kernel runs: an older one cannot run flash."""
    from ftplan.trace.job import plan_from, resolve

    for gpu, capability in (
        ("t4-16gb", (7, 5)), ("a100-80gb", (8, 0)), ("a10g-24gb", (8, 6)), ("l4-24gb", (8, 9)),
        ("h100-80gb", (9, 0)), ("h200-141gb", (9, 0)), ("rtx-4090-24gb", (8, 9)),
        ("v100-32gb", (7, 0)), (None, (8, 0)),
    ):  # fmt: skip
        plan = {"model": "x", "method": {"kind": "full"}, "hardware": {"gpu": gpu}}
        assert resolve(plan_from(plan)).capability == capability, gpu
