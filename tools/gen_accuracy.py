"""Write docs/accuracy.md from the bench and the readings; with --check say whether it is current.

Run: python tools/gen_accuracy.py [--check]
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

import accuracy
from accuracy import Reading, Row, Summary

PATH = accuracy.ROOT / "docs" / "accuracy.md"
HEAD = """\
# How far off the calculator is

Generated: `python tools/gen_accuracy.py` writes this page anew. Errors are (calculated - true) /
true; p95 is the error that 95 of 100 jobs stay within; bias is the mean of the signed errors.
Nothing in the calculator is fitted to any of these numbers.

## Against traced jobs

The real libraries (torch, transformers, peft, accelerate; versions in each file of
`validation/bench`) ran two steps of each job on tensors without memory, and every storage was
counted. The truth is the peak of the second step, `torch.cuda.max_memory_allocated()` without
cuBLAS's workspace. The split into *build* and *held* was fixed by architecture before anything was
compared. Operations were written against *build*; the residuals of *held* were printed too while
faults were hunted, and some (prompt tuning of mixtures) were mended after one was seen there, so
*held* is not blind.
"""
PEERS = """
## Peers

Errors of other estimators on eleven runs of Qwen2.5 on an RTX 4080 (the runs are the raw records
of can-i-finetune-this, `benchmarks/results/*.json`; torch 2.6, transformers 5.8.1, peft 0.19.1;
rank 16 on q, k, v, o, paged 8-bit AdamW). These were measured for this project's brief, not by
this page's generator, and are not the jobs of the tables above.

| estimator | mean error | bias | worst under | worst over |
| --- | ---: | ---: | ---: | ---: |
| fitcheck-llm 0.3.1 | 8.3 % | +1.6 % | -23.0 % | +17.2 % |
| fitscout 0.1.1 | 13.1 % | +3.2 % | -18.4 % | +30.4 % |
| gpu_poor (its formula) | 27.5 % | -27.5 % | -45.9 % | -7.7 % |
| canifinetune 0.4.1 (developed on these runs) | 28.0 % | +27.4 % | -2.9 % | +67.3 % |
| llmcalculator 0.2.3 | 38.8 % | -38.8 % | -61.5 % | -9.4 % |
| Unsloth Studio's formula (meant for its own runtime) | 48.2 % | -48.2 % | -78.6 % | -11.1 % |
| peft-doctor 0.9.2 | 49.0 % | -49.0 % | -77.2 % | -13.3 % |
| ml-memguard 0.5.0 | 66.6 % | -66.6 % | -85.1 % | -49.1 % |
| ftuneai 0.4.1 | 72.3 % | -72.3 % | -89.0 % | -52.6 % |

On 341 other traced jobs the best of these tools had a median error of 8 % with one job in twenty
off by 60 %; the medians of the others were 13 to 51 % (the same brief).

LLMem (arXiv 2404.10933) publishes 1.6 % on one GPU and 3.0 % on several for its own method; it
probes the job on a GPU.
"""
TRAINERS = """
## Against the real trainers

`transformers.Trainer` and TRL's trainers ran two steps by themselves, collator, loss, loop and all,
on tensors without memory (`python -m ftplan.trace.bench_trainers`; versions in each file of
`validation/trainers`). Triton's kernels, TRL's and Liger's, were launched into the void; sampling
was answered with completions of the wanted length. PPO is in no TRL after 1.12.

LLaMA-Factory, ms-swift and axolotl ran a user's own file, from its parser to its optimizer
(`python -m ftplan.trace.bench_commands`); the calculator read the same file.

LitGPT and torchtune run model code of their own: their packages' models, adapters and losses were
traced as their loops call them, one version for each stack of its time
(`python -m ftplan.trace.bench_native`). Megatron-Core's modules and mcore-bridge's adapters were
traced with Transformer Engine's functions stood in for (`python -m ftplan.trace.megatron`).
"""
IMAGES = """
## Models that see or hear

Towers and language models of true widths, few layers and a small vocabulary, traced on real tensors
(`python -m ftplan.trace.bench_images`): one image in each of two sequences. Those called *text* are
of models whose tower is counted and not run: their batch has none.
"""
READINGS = """\
Read by others on real GPUs, each with its source in `validation/published.json`. All were made with
older software than the calculator mirrors; its versions stand beside each reading there, and a
plan names the stack of that time where there is a profile of it (`transformers-4.46`,
`ms-swift-2`, `litgpt-0.3`). Of LitGPT, torchtune and Megatron their own modules are walked; what
others run of their own is not: their errors are what a plan that names such a stack must expect.
Readings of LitGPT's config hub are of the time at which the number first stood there. Where batches
differ in length (ms-swift 1.6), what is reserved depends on the order of the samples: their mean
and deviation are known, no more. Comments in ms-swift's example scripts are rounded, many
to 5 GiB, and say neither which version was read nor which counter.
`inside`: the reading lies between low and high; `width`: (high - low) / expected, the median.
"""
GPU = """
## Against our own GPU readings

None yet. `ftplan measure --suite validation/suite.yaml` on a machine with a GPU makes them.
"""


def percent(value: float, sign: bool = False) -> str:
    """A share in percent: three digits where it is small. No minus before a zero."""
    places = 3 if abs(value) < 0.00095 else 2 if abs(value) < 0.095 else 1
    text = f"{100 * value:{'+' if sign else ''}.{places}f} %"
    return text if text.strip("+-0. %") else "0 %"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table whose columns after the first ``words`` are numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    lines = [head, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def figures(total: Summary) -> list[str]:
    """A summary as cells."""
    shares = [percent(share) for share in (total.median, total.p95, total.worst)]
    return [str(total.count), *shares, percent(total.bias, sign=True)]


FIGURES = ["jobs", "median", "p95", "worst", "bias"]


def bench_tables(rows: Sequence[Row]) -> str:
    """The bench by side of the split, by regime, by architecture."""
    answered = [row for row in rows if row.predicted_bytes is not None]
    names = sorted({row.case.architecture for row in rows})
    parts = [f"\n{len(rows)} jobs over {len(names)} architectures.\n"]
    sides = [("all", answered)]
    sides += [
        (side, [row for row in answered if row.case.split == side]) for side in ("build", "held")
    ]
    parts.append(
        table(
            ["side", *FIGURES],
            ([name, *figures(_summary(members))] for name, members in sides if members),
        )
    )
    for title, key in (("regime", _regime), ("architecture", _architecture)):
        grouped: Mapping[str, list[Row]] = _grouped(answered, key)
        parts.append(f"### By {title}\n")
        lines = ([name, *figures(_summary(members))] for name, members in sorted(grouped.items()))
        parts.append(table([title, *FIGURES], lines))
    refused = [row for row in rows if row.predicted_bytes is None]
    if refused:
        parts.append("### Not answered\n")
        parts.append("\n".join(f"- {row.name}: {row.refusal}" for row in refused) + "\n")
    return "\n".join(parts)


def worst_ten(rows: Sequence[Row]) -> str:
    """The ten largest residuals by name, with the reason where it is known."""
    answered = [row for row in rows if row.predicted_bytes is not None]
    ranked = sorted(answered, key=lambda row: (-abs(row.error), row.name))[:10]
    lines = (
        [
            row.name,
            accuracy.known_reason(row) or "not explained yet",
            f"{row.case.true_bytes:,}",
            percent(row.error, sign=True),
        ]
        for row in ranked
    )
    return "### The ten worst\n\n" + table(["job", "why", "true bytes", "error"], lines, words=2)


def extra_table(head: str, rows: Sequence[Row], title: str, key: Callable[[Row], str]) -> str:
    """A further bench in one table, and what is off by more than half a percent."""
    grouped = _grouped([row for row in rows if row.predicted_bytes is not None], key)
    lines = ([name, *figures(_summary(members))] for name, members in grouped.items())
    far = [row for row in rows if row.predicted_bytes is not None and abs(row.error) > 0.005]
    named = "\n".join(f"- {row.name}: {percent(row.error, sign=True)}" for row in far)
    return head + "\n" + table([title, *FIGURES], lines) + (f"\n{named}\n" if named else "")


def readings_table() -> str:
    """Published readings by source and counter, then one by one, then what was left out."""
    compared, left_out = accuracy.published()
    parts = [
        "\n## Against published readings\n",
        READINGS,
    ]
    groups: dict[tuple[str, ...], list[Reading]] = defaultdict(list)
    for reading in compared:
        kind = "training" if reading.training else "serving"
        cards = "1 GPU" if reading.gpus == 1 else "more"
        groups[reading.source, kind, cards, reading.counter].append(reading)
    lines = ([*key, *_readings(members)] for key, members in sorted(groups.items()))
    head = ["source", "job", "GPUs", "counter", "n", "median", "worst", "bias", "inside", "width"]
    parts.append(table(head, lines, words=4))
    sums = ([name, *_readings(chosen)] for name, chosen in _slices(compared) if chosen)
    parts.append(table(["slice", *head[4:]], sums))
    ranked = sorted(compared, key=lambda r: (-abs(r.error), r.identity))[:10]
    worst = ([r.identity, r.counter, percent(r.error, sign=True)] for r in ranked)
    parts.append(
        "### The ten worst readings\n\n" + table(["reading", "counter", "error"], worst, 2)
    )
    reasons = Counter(reason for _, reason in left_out)
    parts.append(f"### Not compared: {len(left_out)} readings\n")
    parts.append(table(["why", "readings"], ([why, str(n)] for why, n in sorted(reasons.items()))))
    return "\n".join(parts)


def _slices(compared: Sequence[Reading]) -> list[tuple[str, list[Reading]]]:
    one = [r for r in compared if r.quality == "A" and r.gpus == 1]
    walked = [r for r in one if r.walked]
    return [
        ("quality A, one GPU, allocated", [r for r in one if r.counter == "allocated"]),
        ("the same, modules that are walked", [r for r in walked if r.counter == "allocated"]),
        ("quality A, one GPU, reserved", [r for r in one if r.counter == "reserved"]),
        ("the same, modules that are walked", [r for r in walked if r.counter == "reserved"]),
        ("all", list(compared)),
    ]


def _readings(members: Sequence[Reading]) -> list[str]:
    total = accuracy.summary(reading.error for reading in members)
    inside = sum(reading.inside for reading in members)
    return [
        str(total.count),
        percent(total.median),
        percent(total.worst),
        percent(total.bias, sign=True),
        f"{inside}/{len(members)}",
        percent(median(reading.width for reading in members)),
    ]


def oom_table() -> str:
    """Jobs that ran out of memory, by verdict."""
    judged, left_out = accuracy.out_of_memory()
    verdicts = Counter(str(verdict) for _, verdict, _ in judged)
    fits = [f"- called fits: {identity} ({cause})" for identity, v, cause in judged if v == "fits"]
    lines = ([verdict, str(count)] for verdict, count in sorted(verdicts.items()))
    return "\n".join(
        [
            "\n## Jobs that ran out of memory\n",
            f"{len(judged)} jobs with a stated cause (`validation/oom.json`); {len(left_out)} more "
            "are left out\nbecause the cause or a knob is not stated. None may be called *fits*.\n",
            table(["verdict", "jobs"], lines),
            *fits,
        ]
    )


def _summary(rows: Iterable[Row]) -> Summary:
    return accuracy.summary(row.error for row in rows)


def _regime(row: Row) -> str:
    return row.case.regime


def _architecture(row: Row) -> str:
    return f"{row.case.architecture} ({row.case.split})"


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> Mapping[str, list[Row]]:
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[key(row)].append(row)
    return grouped


def page() -> str:
    """The whole page."""
    rows = accuracy.predict_all(accuracy.cases())
    parts = [HEAD, bench_tables(rows), worst_ten(rows)]
    trained = accuracy.predict_all(accuracy.trainer_cases())
    parts.append(
        extra_table(TRAINERS, trained, "task or trainer", lambda row: row.case.regime.split()[0])
    )
    shown = accuracy.predict_all(accuracy.image_cases())
    if shown:
        parts.append(extra_table(IMAGES, shown, "model", lambda row: row.case.architecture))
    if accuracy.PUBLISHED.exists():
        parts.append(readings_table())
    if accuracy.OUT_OF_MEMORY.exists():
        parts.append(oom_table())
    return "\n".join(part.rstrip("\n") + "\n" for part in (*parts, GPU, PEERS))


def main() -> int:
    """Write the page, or say whether it is current: 0 when it is."""
    made = page()
    if "--check" not in sys.argv[1:]:
        PATH.write_text(made, encoding="utf-8")
        return 0
    if PATH.exists() and PATH.read_text(encoding="utf-8") == made:
        return 0
    print("docs/accuracy.md is stale: run python tools/gen_accuracy.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
