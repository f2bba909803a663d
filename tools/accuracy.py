"""How far the calculator is from what is known to be true: the bench, and published readings.

The library behind ``gen_accuracy.py`` and the tests; it prints nothing. A job of the bench is a
plan and the peak of the real libraries' second step, traced (``validation/bench``); some are traced
with fewer layers than the model has, and are calculated so too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ftplan.errors import FtplanError
from ftplan.files.document import parse_document
from ftplan.files.plan import parse_plan
from ftplan.front.api import estimate
from ftplan.front.assembling import job_of
from ftplan.front.resolve import resolve
from ftplan.memory.estimate import estimate as walk
from ftplan.report import Interval, Verdict
from ftplan.spec import Plan
from ftplan.trainers.reading import import_text

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "validation" / "bench"
TRAINERS = ROOT / "validation" / "trainers"
IMAGES = ROOT / "validation" / "images.json"
PUBLISHED = ROOT / "validation" / "published.json"
OUT_OF_MEMORY = ROOT / "validation" / "oom.json"
KNOWN = ROOT / "validation" / "known_residuals.json"
LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
LAYER_KEYS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers",
    "encoder_layers", "decoder_layers",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One traced job of the bench."""

    architecture: str
    split: str
    """``build``: what operations were written against; ``held``: the other architectures."""
    regime: str
    number: int
    """Position in the file of its architecture."""
    layers: int | None
    """Layers it was traced with; None: all."""
    plan: Mapping[str, Any]
    true_bytes: int
    config: Mapping[str, Any] | None = None
    """The model it was traced with, where that is no cut of the catalogue's."""
    file: str = ""
    """The trainer's own file or command in place of a plan: its reader is tried too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A case and what the calculator says of it."""

    case: Case
    predicted_bytes: int | None
    refusal: str = ""
    """Why there is no prediction: a named refusal, or an error of ours."""

    @property
    def error(self) -> float:
        """Relative error, negative when the calculator is under the truth."""
        assert self.predicted_bytes is not None
        return self.predicted_bytes / self.case.true_bytes - 1

    @property
    def name(self) -> str:
        """The case in one line."""
        return f"{self.case.architecture} {self.case.regime}"


def cases() -> list[Case]:
    """Every job of the bench, in the order of its files."""
    return [case for path in sorted(BENCH.glob("*.json")) for case in _cases_of(path)]


def _cases_of(path: Path) -> Iterator[Case]:
    document = json.loads(path.read_text(encoding="utf-8"))
    for number, job in enumerate(document["jobs"]):
        yield Case(
            architecture=document["architecture"],
            split=document["split"],
            regime=job["regime"],
            number=number,
            layers=job.get("layers"),
            plan=job["plan"],
            true_bytes=job["allocated_bytes"],
        )


def trainer_cases() -> list[Case]:
    """Jobs that real trainers ran by themselves; the regime begins with the task."""
    return [
        Case(
            architecture=job["plan"]["model"] if "plan" in job else job["model"],
            split="trainers",
            regime=job["name"],
            number=number,
            layers=job["layers"],
            plan=job.get("plan", {}),
            true_bytes=job["allocated_bytes"],
            file=_file_of(job.get("settings", {})),
        )
        for path in sorted(TRAINERS.glob("*.json"))
        for number, job in enumerate(json.loads(path.read_text(encoding="utf-8"))["jobs"])
    ]


def _file_of(settings: Mapping[str, Any]) -> str:
    """What a user writes: a YAML file, which JSON is, or a command."""
    return str(settings.get("command") or json.dumps(settings))


def image_cases() -> list[Case]:
    """Vision-language jobs, traced on real tensors."""
    jobs = json.loads(IMAGES.read_text(encoding="utf-8"))["jobs"] if IMAGES.exists() else []
    return [
        Case(
            architecture=job["plan"]["model"],
            split="images",
            regime=job["name"].partition(" ")[2],
            number=number,
            layers=None,
            plan=job["plan"],
            true_bytes=job["allocated_bytes"],
            config=job["config"],
        )
        for number, job in enumerate(jobs)
    ]


def plan_of(mapping: Mapping[str, Any]) -> Plan:
    """A plan, read as a plan file is read."""
    return parse_plan(parse_document(json.dumps(mapping), file="plan"))


def _plan(case: Case) -> Plan:
    """The plan of a case: its own, or what a reader makes of a trainer's file, on A100s."""
    if case.plan:
        return plan_of(case.plan)
    plan = import_text(case.file, file="job").plan
    count = plan.hardware.count or 1
    return replace(plan, hardware=replace(plan.hardware, gpu="a100-80gb", count=count))


def predict(case: Case) -> Row:
    """The calculator's peak for one case."""
    try:
        resolved = resolve(_plan(case))
        config = _cut(case.config or resolved.config or {}, case.layers)
        job = job_of(replace(resolved, config=config))
        if job.teacher is not None:
            job = replace(job, teacher=_cut(job.teacher, case.layers))
        peak = walk(job).peak_bytes
    except FtplanError as error:
        return Row(case=case, predicted_bytes=None, refusal=str(error).splitlines()[0])
    except Exception as error:
        return Row(case=case, predicted_bytes=None, refusal=f"crash: {error!r}")
    return Row(case=case, predicted_bytes=peak)


def _cut(config: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    """The config of the same model with fewer layers, as the trace cuts it."""
    cut = dict(config)
    if layers is not None and isinstance(cut.get("text_config"), Mapping):
        cut["text_config"] = _cut(cut["text_config"], layers)
    elif layers is not None:
        cut.update({key: layers for key in LAYER_KEYS if key in cut})
        cut.update(
            {key: cut[key][:layers] for key in LAYER_LISTS if isinstance(cut.get(key), list)}
        )
        if cut.get("num_kv_shared_layers"):
            cut["num_kv_shared_layers"] = min(cut["num_kv_shared_layers"], layers // 2)
    return cut


def predict_all(chosen: Sequence[Case], *, workers: int = 2) -> list[Row]:
    """The calculator's peaks, in the order of the cases."""
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(predict, chosen, chunksize=8))


def known_reason(row: Row, *, excepted: bool = False) -> str | None:
    """Why a residual is there, when it is understood; None when it is not.

    ``excepted``: only where the job is left out of the tests' thresholds for it.
    """
    for known in _known():
        place = (known["architecture"], known["regime"])
        if place == (row.case.architecture, row.case.regime):
            return str(known["reason"]) if known["excepted"] or not excepted else None
    return None


def _known() -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads(KNOWN.read_text(encoding="utf-8"))["residuals"]
    return listed


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Errors of a set of predictions, as shares of the truth."""

    count: int
    median: float
    p95: float
    worst: float
    lowest: float
    """The most that any prediction is under the truth (0: none is)."""
    bias: float
    """Mean of the signed errors."""


def summary(errors: Iterable[float]) -> Summary:
    """The figures of merit of signed relative errors. Raises ValueError for none."""
    signed = list(errors)
    size = sorted(abs(error) for error in signed)
    if not size:
        raise ValueError("no errors to sum up")
    return Summary(
        count=len(size),
        median=median(size),
        p95=size[max(0, -(-95 * len(size) // 100) - 1)],
        worst=size[-1],
        lowest=min([0.0, *signed]),
        bias=sum(signed) / len(signed),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A number that somebody else read off a real GPU, and the report of the same job."""

    identity: str
    source: str
    """Whose reading: the first part of its identity."""
    counter: str
    """``allocated``, ``reserved`` or ``device``."""
    true_bytes: int
    predicted: Interval
    quality: str
    """A: every knob is known. B: nearly."""
    walked: bool
    """Whether its software runs modules that the calculator walks."""
    gpus: int
    training: bool

    @property
    def error(self) -> float:
        """Relative error, negative when the calculator is under the reading."""
        return self.predicted.expected / self.true_bytes - 1

    @property
    def inside(self) -> bool:
        """The reading lies between low and high."""
        return self.predicted.low <= self.true_bytes <= self.predicted.high

    @property
    def width(self) -> float:
        """(high - low) / expected."""
        return (self.predicted.high - self.predicted.low) / self.predicted.expected


def published() -> tuple[list[Reading], list[tuple[str, str]]]:
    """Readings that can be compared, and those that cannot with the reason."""
    document = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    compared, left_out = [], []
    for entry in document["readings"]:
        if "not_comparable" in entry:
            left_out.append((entry["id"], entry["not_comparable"]))
            continue
        report = estimate(plan_of({"version": 1, **entry["plan"]}))
        predicted = getattr(report, f"{entry['counter']}_bytes")
        compared.append(
            Reading(
                identity=entry["id"],
                source=entry["group"],
                counter=entry["counter"],
                true_bytes=entry["bytes"],
                predicted=predicted,
                quality=entry["quality"],
                walked=entry["walked"],
                gpus=entry["plan"].get("hardware", {}).get("count", 1),
                training="method" in entry["plan"],
            )
        )
    return compared, left_out


def out_of_memory() -> tuple[list[tuple[str, Verdict | None, str]], list[tuple[str, str]]]:
    """Jobs that ran out: (identity, verdict, cause), and those left out with the reason."""
    document = json.loads(OUT_OF_MEMORY.read_text(encoding="utf-8"))
    judged, left_out = [], []
    for entry in document["jobs"]:
        if "not_comparable" in entry:
            left_out.append((entry["id"], entry["not_comparable"]))
            continue
        report = estimate(plan_of({"version": 1, **entry["plan"]}))
        judged.append((entry["id"], report.verdict, entry["cause"]))
    return judged, left_out
