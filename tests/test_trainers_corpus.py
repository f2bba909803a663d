"""Real configurations of other people, when they lie beside the checkout: how many import, why the
others do not, and where every key goes."""

from __future__ import annotations

import collections
from dataclasses import replace
from pathlib import Path

import pytest

from ftplan.errors import FtplanError
from ftplan.front.api import estimate
from ftplan.trainers import Imported, import_file

CORPUS = Path(__file__).resolve().parents[2] / "shared" / "data" / "trainer-configs"
pytestmark = pytest.mark.skipif(
    not CORPUS.is_dir(), reason="the corpus ../shared/data/trainer-configs is not here"
)

REASONS = (
    "accelerate file", "DeepSpeed file", "merges or exports", "is for inference",
    "evaluates a model", "generates text", "quantises a model", "predicts",
)  # fmt: skip
"""All that a file of the corpus may be refused for."""


@pytest.fixture(scope="module")
def results() -> dict[Path, Imported | FtplanError]:
    found: dict[Path, Imported | FtplanError] = {}
    for path in sorted(CORPUS.rglob("*")):
        if path.is_file():
            try:
                found[path] = import_file(path)
            except FtplanError as error:
                found[path] = error
    return found


def test_every_training_file_imports_and_the_rest_is_refused_by_name(
    results: dict[Path, Imported | FtplanError],
) -> None:
    """351 files: 312 training configurations import, 39 others are refused with their kind."""
    refused = {path: one for path, one in results.items() if isinstance(one, FtplanError)}
    assert len(results) == 351
    assert len(results) - len(refused) == 312
    for path, error in refused.items():
        assert any(reason in error.message for reason in REASONS), (path, error)
        assert error.location is not None, path


def test_the_readers_are_the_ones_of_their_folders(
    results: dict[Path, Imported | FtplanError],
) -> None:
    """Detection by content agrees with the project that each file comes from."""
    counts = collections.Counter(
        (path.relative_to(CORPUS).parts[0], one.trainer)
        for path, one in results.items()
        if isinstance(one, Imported)
    )
    assert counts == {
        ("alignment-handbook", "trl"): 11,
        ("axolotl", "axolotl"): 117,
        ("litgpt", "litgpt"): 22,
        ("llamafactory", "llamafactory"): 34,
        ("torchtune", "torchtune"): 91,
        ("unsloth", "unsloth"): 37,
    }


def test_no_key_is_silently_ignored(results: dict[Path, Imported | FtplanError]) -> None:
    """Every key of every file is mapped, in the list of neutral keys, or named in a finding; the
    only unknown one is a misspelling in the file itself."""
    unknown = [
        finding.message
        for one in results.values()
        if isinstance(one, Imported)
        for finding in one.findings
        if finding.code == "IMP003"
    ]
    assert all("context_parapllel_size" in message for message in unknown), unknown


def test_what_decides_memory_is_understood(results: dict[Path, Imported | FtplanError]) -> None:
    """Method, micro batch, optimizer, checkpointing and loss are known for every imported file;
    the model for all but Unsloth's per-model defaults, the length for all that state it."""
    open_lengths: collections.Counter[str] = collections.Counter()
    for path, one in results.items():
        if isinstance(one, FtplanError):
            continue
        plan = one.plan
        assert plan.method is not None, path
        assert plan.batch.micro is not None, path
        assert plan.optimizer is not None, path
        assert plan.gradient_checkpointing is not None, path
        assert plan.loss is not None or plan.task in ("rm", "classify", "embed"), path
        assert plan.model.name is not None or one.trainer == "unsloth", path
        if plan.batch.seq_len is None:
            open_lengths[one.trainer] += 1
            assert "batch.seq_len" in one.missing, path
    assert open_lengths == {"torchtune": 79, "litgpt": 1}


def test_imported_files_are_sized(results: dict[Path, Imported | FtplanError]) -> None:
    """Nineteen in twenty of those with a model get an answer, the rest a refusal that says why."""
    sized, refused = 0, []
    for path, one in results.items():
        if isinstance(one, FtplanError) or one.plan.model.name is None:
            continue
        batch = replace(one.plan.batch, seq_len=one.plan.batch.seq_len or 2048)
        try:
            report = estimate(replace(one.plan, batch=batch), base=path.parent, with_remedies=False)
        except FtplanError as error:
            refused.append((path.name, error.message))
            continue
        sized += 1
        for counter in (report.allocated_bytes, report.reserved_bytes, report.device_bytes):
            assert counter is None or 0 < counter.low <= counter.expected <= counter.high, path
    assert sized >= 0.95 * (sized + len(refused)), refused


def test_findings_point_into_the_file(results: dict[Path, Imported | FtplanError]) -> None:
    """Every finding of an import has a line that exists in the file."""
    for path, one in results.items():
        if isinstance(one, FtplanError):
            continue
        lines = path.read_text(encoding="utf-8").count("\n") + 1
        for finding in one.findings:
            if finding.location is not None and finding.location.file == str(path):
                assert finding.location.line is not None
                assert 1 <= finding.location.line <= lines, (path, finding)
