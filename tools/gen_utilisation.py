"""Read utilisation off the published readings that are not kept apart, and try it on the others.

    python tools/gen_utilisation.py            # write catalog/data/utilisation.json and the page
    python tools/gen_utilisation.py --check    # exit 1 if they would change

What depends on no card is read off A100s, of which there are most readings: the hidden size at
which matmuls reach half of their best share, the share of attention kernels relative to it, the
bytes that cross the memory for each that is allocated, and what hides of the communication. Each
class of cards then has one factor on both shares: the geometric mean over its sources of what
makes the estimate the reading. A source counts as one, however many rows it has. The spread is a
prediction interval of 90 % for a source that is new (Student's t), from the variance between the
sources of a class, pooled over classes; a class without a source has that between classes on top.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import exp, log, sqrt
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any

from ftplan.catalog.gpus import find_gpu
from ftplan.catalog.throughput import Reading, readings, speed_of, utilisation_of
from ftplan.fit.sizer import Room, Sizer
from ftplan.fit.time import Load, Speed, Utilisation, micro_step, tokens_per_second
from ftplan.front.assembling import job_of
from ftplan.front.resolve import resolve
from ftplan.trace.job import plan_from

ROOT = Path(__file__).parents[1]
DATA = ROOT / "src/ftplan/catalog/data/utilisation.json"
PAGE = ROOT / "docs/throughput.md"
HEAD = """\
# How fast: estimates against published readings

Generated from the program: `python tools/gen_utilisation.py` writes it anew.

A source is kept apart when the SHA-256 of its name is odd; the shares of `ftplan fit` are read off
the other sources alone ([how](../tools/gen_utilisation.py)). Not used on either side: 8 readings
in fp8 or fp4, 7 without a rate (hours for data of unknown length), 4 of adapters that are not
modelled, 1 of tensor and pipeline parallelism.
"""
ANY = ("", (), (), ())
CLASSES: tuple[tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "A100 and its kin", (), (),
        ("a100-40gb", "a100-pcie-40gb", "a100-80gb", "a100-pcie-80gb", "a800-80gb", "a30-24gb"),
    ),
    ("Hopper", ("Hopper",), (), ()),
    ("Blackwell of the data centre", ("Blackwell", "Blackwell Ultra"), ("data-centre",), ()),
    ("Ampere with GDDR memory", ("Ampere",), ("data-centre", "workstation"), ()),
    ("Ada of the data centre and workstations", ("Ada Lovelace",), ("data-centre", "workstation"),
     ()),
    ("GeForce", ("Ampere", "Ada Lovelace", "Blackwell", "Turing"), ("consumer", "laptop"), ()),
    ("others", (), (), ()),
)  # fmt: skip
"""Name, generations, kinds, cards; the first that a card belongs to is its own."""
T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
"""Student's t at 95 %, by degrees of freedom from 1."""
GRID = {
    "half_width": (300, 500, 700, 900),
    "attention": (0.2, 0.3, 0.4, 0.5),
    "traffic": (0.4, 0.8, 1.2, 1.6, 2.0),
    "overlap": (0.0, 0.5, 1.0),
    "best": (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
}

Measured = tuple[Reading, Load, Speed, float]
"""A reading, its load, its card's speed, and the seconds of one micro batch."""


def measured(reading: Reading) -> Measured:
    """The reading as the calculator sees it."""
    plan = plan_from({"model": "llama-2-7b", **reading.plan})
    job = job_of(resolve(plan))
    if reading.config is not None:
        job = replace(job, config=reading.config)
    gpus = (plan.hardware.count or 1) * (plan.hardware.nodes or 1)
    room = Room(usable_bytes=0, capability=None, named=True, gpus=gpus)
    load = Sizer(job, room).load(job.micro, job.seq_len)
    assert plan.hardware.gpu is not None
    speed = speed_of(find_gpu(plan.hardware.gpu), mixed_or_weights="bf16", gpus=gpus)
    return reading, load, speed, job.micro * job.seq_len / reading.tokens_per_s_per_gpu


def class_of(reading: Reading) -> str:
    """The class of the reading's card."""
    gpu = find_gpu(reading.plan["hardware"]["gpu"])
    return next(
        name
        for name, generations, kinds, gpus in CLASSES
        if (not generations or gpu.generation in generations)
        and (not kinds or gpu.kind in kinds)
        and (not gpus or gpu.name in gpus)
    )


def by_source(rows: Sequence[tuple[Reading, float]]) -> dict[str, list[float]]:
    """Values of readings by their source."""
    sources: dict[str, list[float]] = defaultdict(list)
    for reading, value in rows:
        sources[reading.source].append(value)
    return sources


def expected(load: Load, speed: Speed, share: Utilisation) -> float:
    """Seconds of a micro batch."""
    return micro_step(load, speed, share)[0].expected


def fitted(rows: Sequence[Measured]) -> Utilisation:
    """The point of the grid whose squares are least, each source weighed by the root of its rows.

    The grid is coarse: the class's factor comes on top.
    """
    count = {source: len(v) for source, v in by_source([(r[0], 0.0) for r in rows]).items()}

    def squares(share: Utilisation) -> float:
        return sum(
            log(expected(load, speed, share) / seconds) ** 2 / sqrt(count[reading.source])
            for reading, load, speed, seconds in rows
        )

    points: list[dict[str, Any]] = [
        dict(zip(GRID, values, strict=True)) for values in product(*GRID.values())
    ]
    return min((Utilisation(**point, spread=1.0, source="") for point in points), key=squares)


def factor(row: Measured, share: Utilisation) -> float:
    """By what the shares have to be multiplied for the estimate to be the reading."""
    _, load, speed, seconds = row
    low, high = 0.02, 50.0
    for _ in range(60):
        middle = sqrt(low * high)
        if expected(load, speed, scaled(share, middle)) > seconds:
            low = middle
        else:
            high = middle
    return sqrt(low * high)


def moves(row: Measured, share: Utilisation) -> bool:
    """Links or the host take most of the time: such a reading says little of the shares."""
    _, load, speed, seconds = row
    return 2 * expected(load, speed, scaled(share, 1e6)) > seconds


def scaled(share: Utilisation, times: float) -> Utilisation:
    """Both shares times a factor."""
    return replace(share, best=share.best * times, attention=share.attention * times)


def rows_of_file() -> list[dict[str, Any]]:
    """The classes with their shares."""
    build = [measured(reading) for reading in readings() if not reading.kept]
    base = fitted([row for row in build if class_of(row[0]) == CLASSES[0][0]])
    logs: dict[str, dict[str, float]] = {}
    for name, *_ in CLASSES:
        found = [
            (row[0], log(factor(row, base)))
            for row in build
            if class_of(row[0]) == name and not moves(row, base)
        ]
        logs[name] = {source: fmean(values) for source, values in by_source(found).items()}
    several = [list(means.values()) for means in logs.values() if len(means) > 1]
    freedom = sum(len(means) - 1 for means in several)
    within = sum(variance(means) * (len(means) - 1) for means in several) / freedom
    centres = {name: fmean(means.values()) for name, means in logs.items() if means}
    between = variance(list(centres.values()))
    lines = []
    for name, generations, kinds, gpus in CLASSES:
        means = logs[name]
        centre = centres.get(name, fmean(centres.values()))
        square = within * (1 + 1 / len(means)) if means else within + between
        share = scaled(base, exp(centre))
        count = sum(class_of(r[0]) == name and not moves(r, base) for r in build)
        lines.append(
            {
                "name": name, "generations": generations, "kinds": kinds, "gpus": gpus,
                "best": round(share.best, 3), "half_width": int(base.half_width),
                "attention": round(share.attention, 3), "traffic": base.traffic,
                "overlap": base.overlap, "spread": round(exp(T_95[freedom - 1] * sqrt(square)), 2),
                "source": f"data/throughput.json: readings {count}, sources {len(means)}"
                if means else "the mean of the other classes: no reading of such a card",
            }
        )  # fmt: skip
    return lines


def tried(reading: Reading) -> tuple[float, float, float]:
    """Tokens a second and card: low, expected, high."""
    _, load, speed, _ = measured(reading)
    share = utilisation_of(find_gpu(reading.plan["hardware"]["gpu"]))
    batch: Mapping[str, int] = reading.plan["batch"]
    spread = tokens_per_second(micro_step(load, speed, share)[0], batch["micro"] * batch["seq_len"])
    return spread.low, spread.expected, spread.high


def classes(rows: Sequence[Mapping[str, Any]]) -> str:
    """The classes of cards with their shares, as Markdown."""
    lines = [
        "## Shares of the data sheet's rate\n",
        "| cards | matmuls, at best | attention | low and high | read off |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['best']:.2f} | {row['attention']:.2f} | "
            f"x {1 / row['spread']:.2f} to {row['spread']:.2f} | {row['source']} |"
        )
    base = rows[0]
    lines.append(
        f"\nMatmuls reach `best x hidden / (hidden + {base['half_width']})`; "
        f"{base['traffic']} bytes cross the memory for each that is allocated; "
        f"{base['overlap']:.0%} of the communication hides behind the computation."
    )
    return "\n".join(lines)


def stacks() -> str:
    """What each source's stack does to the rate: the mean of read over expected, as Markdown."""
    ratios = by_source([(r, log(r.tokens_per_s_per_gpu / tried(r)[1])) for r in readings()])
    kept = {reading.source: reading.kept for reading in readings()}
    lines = [
        "## By source, that is by stack\n",
        "| source | side | readings | read / expected | least | most |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for source, logs in sorted(ratios.items()):
        numbers = (fmean(logs), min(logs), max(logs))
        cells = " | ".join(f"{exp(number):.2f}" for number in numbers)
        side = "kept apart" if kept[source] else "read off"
        lines.append(f"| {source} | {side} | {len(logs)} | {cells} |")
    return "\n".join(lines)


def table() -> str:
    """The readings kept apart, the worst first, as Markdown."""
    lines = []
    for reading in readings():
        if reading.kept:
            low, middle, high = tried(reading)
            lines.append((log(middle / reading.tokens_per_s_per_gpu), reading, low, middle, high))
    lines.sort(key=lambda line: -abs(line[0]))
    inside = [low <= reading.tokens_per_s_per_gpu <= high for _, reading, low, _, high in lines]
    text = [
        "## Readings kept apart, the worst first\n",
        f"{sum(inside)} of {len(inside)} lie between low and high; the median of high / low is "
        f"{median(high / low for *_, low, _, high in lines):.2f}, the median error "
        f"{median(abs(exp(error) - 1) for error, *_ in lines):.0%}. Tokens a second and card.\n",
        "| reading | cards | read | low | expected | high | inside |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for (_, reading, low, middle, high), within in zip(lines, inside, strict=True):
        hardware = reading.plan["hardware"]
        cards = hardware["count"] * hardware.get("nodes", 1)
        text.append(
            f"| {reading.id.removeprefix('tp-')} | {cards} x {hardware['gpu']} | "
            f"{reading.tokens_per_s_per_gpu:,.0f} | {low:,.0f} | {middle:,.0f} | {high:,.0f} | "
            f"{'yes' if within else 'NO'} |"
        )
    return "\n".join(text)


def main() -> int:
    """Write or check."""
    check = "--check" in sys.argv
    rows = rows_of_file()
    data = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    stale = data != DATA.read_text()
    if not check:
        DATA.write_text(data)
    page = f"{HEAD}\n{classes(rows)}\n\n{stacks()}\n\n{table()}\n"
    stale = stale or not PAGE.exists() or page != PAGE.read_text()
    if not check:
        PAGE.write_text(page)
    return int(stale and check)


if __name__ == "__main__":
    sys.exit(main())
