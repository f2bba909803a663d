"""``ftplan fit``: what fits on this GPU, how far each way goes, how long and how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ftplan.cli.flags import JobFlags, with_job_flags
from ftplan.cli.output import FormatOption, OutputOption, emit, note, screen_width, use_colour
from ftplan.errors import FtplanError, InputError

if TYPE_CHECKING:
    from ftplan.catalog.gpus import GpuRow
    from ftplan.fitting import FitReport
    from ftplan.front.jobs import JobInput

_DATA = "Data, time and cost"


@with_job_flags
def fit(
    *,
    flags: JobFlags,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="A plan file or a trainer's config; - reads standard input.",
            show_default=False,
        ),
    ] = None,
    solve: Annotated[
        Literal["micro-batch", "seq-len", "gpu", "gpus", "method", "rank"] | None,
        typer.Option("--for", help="Solve for one thing and say it first.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Training data (JSON Lines): gives the tokens, and a sequence length.",
            rich_help_panel=_DATA,
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens", metavar="COUNT", help="Tokens to process, as in 10M.", rich_help_panel=_DATA
        ),
    ] = None,
    epochs: Annotated[
        float,
        typer.Option("--epochs", min=0.001, help="Passes over the data.", rich_help_panel=_DATA),
    ] = 1.0,
    price: Annotated[
        list[str] | None,
        typer.Option(
            "--price",
            metavar="PRICE",
            help="Per card and hour: 2.49/h, GPU=2.49, or a file of such lines; repeatable.",
            rich_help_panel=_DATA,
            show_default=False,
        ),
    ] = None,
    watts: Annotated[
        float | None,
        typer.Option(
            "--watts", min=1, help="What one card draws.", rich_help_panel=_DATA, show_default=False
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say where each assumption was read.")
    ] = False,
    format: FormatOption = "table",
    output: OutputOption = None,
) -> int:
    """What fits this GPU: methods, the largest batch, the time, the cheapest card.

    -o FILE.yaml with the table writes the plan to take: the recommended way, or the mended plan.
    """
    from ftplan.cli.reading import read_with_flags
    from ftplan.front import sizing
    from ftplan.front.jobs import placed

    flags, reserved, share = _card(flags)
    job = read_with_flags(file, flags, any_method=True)
    if reserved:
        hardware = replace(job.plan.hardware, reserved=reserved)
        job = replace(job, plan=replace(job.plan, hardware=hardware))
    job, asked = _with_data(job, data, tokens, epochs)
    workload = sizing.Workload(**asked, prices=_prices(price or []), watts=watts, slice_share=share)
    try:
        answer = sizing.fit(
            job.plan, base=job.base, workload=workload, solve=solve, stated=job.stated
        )
    except FtplanError as error:
        raise placed(error, job) from error.__cause__
    answer = replace(
        answer,
        findings=job.findings + answer.findings,
        assumptions=job.assumptions + answer.assumptions,
    )
    if format in ("json", "yaml"):
        from ftplan.render import json, yaml

        emit(json.render(answer) if format == "json" else yaml.render(answer), output)
    elif format == "markdown":
        from ftplan.render.fit import render_markdown

        emit(render_markdown(answer), output)
    else:
        from ftplan.render.fit import render

        plan_file = output if output and output.suffix.lower() in (".yaml", ".yml") else None
        target = None if plan_file else output
        width, colour = screen_width(target), use_colour(target)
        emit(render(answer, width=width, colour=colour, explain=explain), target)
        if plan_file is not None:
            _write_plan(job, answer, plan_file)
    if solve is not None:
        return 0 if answer.solution is not None and answer.solution.value is not None else 1
    return {"fits": 0, "tight": 0, "over": 1, "unknown": 2}[answer.verdict]


def _write_plan(job: JobInput, answer: FitReport, path: Path) -> None:
    """The plan to take: with the recommended row's changes, or with the remedies."""
    from ftplan.files.plan import dump_plan
    from ftplan.fit.changes import apply_change

    plan = job.plan
    row = next((row for row in answer.rows if row.way == answer.recommended), None)
    notes = ["written by ftplan fit"]
    if row is not None:
        asked = row.fastest is None or answer.solution is not None
        changes = [row.change if asked or row.fastest is None else row.fastest.change]
        notes.append(f"{row.way}: {answer.reason}")
    else:
        changes = [remedy.change for remedy in answer.remedies]
        if not changes or answer.remedies[-1].verdict != "fits":
            note(f"nothing fits, so {path} was not written")
            return
        notes.append("mended: " + "; ".join(remedy.costs for remedy in answer.remedies))
    if answer.solution is not None:
        changes.append(answer.solution.change)
    if row is not None and row.change:
        plan = apply_change(plan, {"method": None})
    for change in changes:
        plan = apply_change(plan, change)
    if plan.batch.seq_len is None:
        plan = apply_change(plan, {"batch": {"seq_len": answer.seq_len}})
    from ftplan.cli.output import write_file

    write_file(path, dump_plan(plan, notes=notes))
    note(f"wrote {path}")


def _with_data(
    job: JobInput, data: Path | None, tokens: str | None, epochs: float
) -> tuple[JobInput, dict[str, Any]]:
    """What is to be processed; data also give a sequence length where the plan has none."""
    from ftplan.units import parse_count

    if data is None:
        return job, {} if tokens is None else {"tokens": round(parse_count(tokens) * epochs)}
    if tokens is not None:
        raise InputError("--data and --tokens both say how much there is", remedy="give one")
    import sys

    from ftplan.cli.data import progress
    from ftplan.files.dataset import count_dataset
    from ftplan.report import Assumption

    summary, lengths = count_dataset(data, told=progress if sys.stderr.isatty() else None)
    if job.plan.batch.seq_len is None:
        # a few giants do not set the length: 99 % decide, and what is cut is said
        whole = summary.longest_tokens <= 2 * summary.p99_tokens
        wanted = summary.covering_seq_len if whole else -(-summary.p99_tokens // 64) * 64
        batch = replace(job.plan.batch, seq_len=wanted)
        assumed = Assumption(
            key="batch.seq_len",
            value=batch.seq_len,
            source=f"{'all' if whole else '99 %'} of the samples of {data} are whole; the longest "
            f"has {summary.longest_tokens} tokens (line {summary.longest_line})",
        )
        job = replace(
            job,
            plan=replace(job.plan, batch=batch),
            assumptions=(*job.assumptions, assumed),
        )
    return job, {"lengths": lengths, "epochs": epochs}


# --- Prices -------------------------------------------------------------------------------------


def _prices(texts: list[str]) -> Mapping[str, float]:
    """Prices by card; the empty name is the plan's own card."""
    prices: dict[str, float] = {}
    for text in texts:
        path = Path(text)
        if "=" not in text and path.suffix and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                bare = line.split("#")[0].strip().replace(":", "=", 1)
                if bare:
                    prices |= _price(bare, where=text)
        else:
            prices |= _price(text)
    return prices


def _price(text: str, where: str = "--price") -> dict[str, float]:
    name, sign, amount = text.rpartition("=")
    number = amount.strip().lower().removesuffix("/h").removesuffix("/hour").strip(" $")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9 or (sign and not name.strip()):
        raise InputError(
            f"{where}: {text!r} is not a price per hour",
            remedy="write 2.49/h for the plan's card, or a100-80gb=1.79",
        )
    return {name.strip().strip("\"'"): value}


# --- Cards --------------------------------------------------------------------------------------


def _card(flags: JobFlags) -> tuple[JobFlags, int, float]:
    """``--gpu auto`` and slices: the card, bytes of it that are not free, share of its units."""
    from ftplan.catalog.gpus import find_gpu
    from ftplan.fit.slices import parse_slice

    if flags.gpu is None:
        return flags, 0, 1.0
    if flags.gpu == "auto":
        return _detected(flags)
    name, profile = parse_slice(flags.gpu)
    return (flags, 0, 1.0) if profile is None else _part(flags, find_gpu(name), profile)


def _part(flags: JobFlags, row: GpuRow, profile: str) -> tuple[JobFlags, int, float]:
    from ftplan.fit.slices import slice_of

    part = slice_of(
        profile, name=row.name, usable_bytes=row.usable_bytes, label_gb=row.label_gb,
        compute_slices=row.mig_slices,
    )  # fmt: skip
    return replace(flags, gpu=row.name), row.usable_bytes - part.usable_bytes, part.compute_share


def _detected(flags: JobFlags) -> tuple[JobFlags, int, float]:
    """The cards that are here and free now, by nvidia-smi and CUDA_VISIBLE_DEVICES."""
    import os

    from ftplan.catalog.gpus import find_gpu
    from ftplan.fit.slices import QUERY, choose, parse_query, parse_slices, visible_to

    cards = parse_query(_nvidia_smi(f"--query-gpu={','.join(QUERY)}", "--format=csv"))
    slices = parse_slices(_nvidia_smi("-L"))
    found = choose(*visible_to(os.environ.get("CUDA_VISIBLE_DEVICES"), cards, slices))
    if found is None:
        hidden = " that CUDA_VISIBLE_DEVICES shows" if cards else ""
        raise InputError(f"nvidia-smi lists no GPU{hidden}", remedy="name one: --gpu a100-80gb")
    row = find_gpu(found.name)
    beside = f"; not used: {', '.join(found.others)}" if found.others else ""
    if found.profile is not None:
        note(f"found {row.name}, slice {found.profile}, taken as empty{beside}")
        return _part(flags, row, found.profile)
    free = found.total_bytes if found.free_bytes is None else found.free_bytes
    # what the driver keeps for itself is not in usable_bytes already
    own = max(0, (row.smi_bytes or found.total_bytes) - row.usable_bytes)
    reserved = max(0, found.total_bytes - free - own)
    told = f"{free / 2**30:.2f} GiB free" if found.free_bytes is not None else "taken as empty"
    note(f"found {found.count} x {row.name}, {told}{beside}")
    gpus = flags.gpus if flags.gpus is not None else found.count
    return replace(flags, gpu=row.name, gpus=gpus), reserved, 1.0


def _nvidia_smi(*arguments: str) -> str:
    import shutil
    import subprocess

    program = shutil.which("nvidia-smi")
    if program is None:
        raise InputError(
            "--gpu auto asks nvidia-smi, which is not installed here",
            remedy="name the GPU: --gpu a100-80gb (ftplan gpus lists them)",
        )
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(
            f"nvidia-smi did not answer: {error}", remedy="name the GPU: --gpu a100-80gb"
        ) from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[:1]
        raise InputError(
            f"nvidia-smi failed: {said[0] if said else done.returncode}",
            remedy="name the GPU: --gpu a100-80gb",
        )
    return done.stdout
