"""``ftplan data``: training data counted: tokens, lengths, the longest sample, copies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ftplan.cli.output import FormatOption, OutputOption, emit, screen_width, use_colour


def data(
    *,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="JSON Lines, a JSON array, CSV, text, Parquet; also in gzip, bzip2, xz.",
        ),
    ],
    seq_len: Annotated[
        int | None,
        typer.Option(
            "--seq-len", min=1, metavar="N", help="Judge truncation and packing at N tokens."
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan", metavar="FILE", help="Judge them at this plan's length.", show_default=False
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            metavar="PATH",
            help="A tokenizer.json, or the folder that holds it: exact counts.",
            show_default=False,
        ),
    ] = None,
    format: FormatOption = "table",
    output: OutputOption = None,
) -> int:
    """Training data: tokens, lengths, the longest sample, packing, copies, empty answers."""
    from ftplan import __version__
    from ftplan.errors import InputError
    from ftplan.files.dataset import BATCH, RULE, read_dataset, tokenizer_of
    from ftplan.render.dataset import render, render_markdown

    together = BATCH
    if plan is not None:
        if seq_len is not None:
            raise InputError("--seq-len and --plan both give the length", remedy="give one")
        from ftplan.front.jobs import load_plan

        batch = load_plan(plan).batch
        seq_len, together = batch.seq_len or 2048, batch.micro or together
    summary = read_dataset(
        file,
        seq_len=seq_len,
        batch=together,
        count=tokenizer_of(tokenizer) if tokenizer is not None else None,
        counted_by=f"tokenizer {tokenizer}" if tokenizer is not None else RULE,
        told=progress if sys.stderr.isatty() else None,
        tool_version=__version__,
    )
    if format in ("json", "yaml"):
        from ftplan.render import json, yaml

        emit(json.render(summary) if format == "json" else yaml.render(summary), output)
    elif format == "markdown":
        emit(render_markdown(summary), output)
    else:
        emit(render(summary, width=screen_width(output), colour=use_colour(output)), output)
    return 0


def progress(done: int, total: int) -> None:
    """A bar on stderr, rubbed out at the end."""
    share = done / max(1, total)
    if share >= 1:
        sys.stderr.write("\r" + " " * 50 + "\r")
    else:
        bar = "#" * round(30 * share)
        sys.stderr.write(f"\r[{bar:<30}] {share:4.0%}")
    sys.stderr.flush()
