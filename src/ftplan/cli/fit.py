"""``ftplan fit``: what fits on this GPU, how far each way goes, which card is enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ftplan.cli.flags import JobFlags, with_job_flags
from ftplan.cli.output import FormatOption, OutputOption, emit, screen_width, use_colour
from ftplan.errors import InputError


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
    price: Annotated[
        list[str] | None,
        typer.Option(
            "--price",
            metavar="GPU=PRICE",
            help="What a card costs you per hour, to find the cheapest; repeatable.",
            show_default=False,
        ),
    ] = None,
    format: FormatOption = "table",
    output: OutputOption = None,
) -> int:
    """What fits this GPU: the ways to finetune, the largest batch, the cheapest card."""
    from ftplan import sizing
    from ftplan.cli.reading import read_with_flags
    from ftplan.jobs import placed

    job = read_with_flags(file, flags, any_method=True)
    try:
        answer = sizing.fit(job.plan, base=job.base, prices=_prices(price or []))
    except Exception as error:
        from ftplan.errors import FtplanError

        if isinstance(error, FtplanError):
            raise placed(error, job) from error
        raise
    answer = replace(
        answer,
        findings=job.findings + answer.findings,
        assumptions=job.assumptions + answer.assumptions,
    )
    if format in ("json", "yaml"):
        from ftplan.render import json, yaml

        emit(json.render(answer) if format == "json" else yaml.render(answer), output)
    else:
        from ftplan.render.fit import render, render_markdown

        if format == "markdown":
            emit(render_markdown(answer), output)
        else:
            emit(render(answer, width=screen_width(output), colour=use_colour(output)), output)
    return {"fits": 0, "tight": 0, "over": 1, "unknown": 2}[answer.verdict]


def _prices(texts: list[str]) -> Mapping[str, float]:
    prices = {}
    for text in texts:
        name, _, amount = text.partition("=")
        try:
            prices[name.strip()] = float(amount)
        except ValueError:
            prices[name.strip()] = -1.0
        if not name.strip() or not 0 <= prices[name.strip()] < 1e9:
            raise InputError(
                f"--price {text!r} is not a card and what it costs",
                remedy="write it like --price a100-80gb=1.79",
            )
    return prices
