"""``ftplan advise``: prompt, retrieve or finetune - the next step, from observed failures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftplan.cli.output import Format, FormatOption, OutputOption, emit, screen_width, use_colour
from ftplan.cli.results import (
    ColumnsOption,
    MapOption,
    ThresholdOption,
    ToolOption,
    kind_overrides,
    read_options,
)

if TYPE_CHECKING:
    from ftplan.advice import Advice
    from ftplan.failures import FailuresFile


def advise(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Failures files and result files of evaluation tools, taken together.",
            show_default=False,
        ),
    ],
    map: MapOption = None,
    columns: ColumnsOption = None,
    threshold: ThresholdOption = None,
    tool: ToolOption = "",
    format: FormatOption = "table",
    output: OutputOption = None,
) -> int:
    """Prompt, RAG or finetune: the next step, from observed failures."""
    from ftplan import __version__
    from ftplan.advise import advise as decide

    together = read_inputs(files, map=map, columns=columns, threshold=threshold, tool=tool)
    answer = decide(together, tool_version=__version__)
    emit(rendered(answer, format, output), output)
    return 0


def read_inputs(
    files: list[Path],
    *,
    map: list[str] | None = None,
    columns: list[str] | None = None,
    threshold: list[str] | None = None,
    tool: str = "",
) -> FailuresFile:
    """Failures files and result files as one failures file, suggestions marked as such."""
    from ftplan import evals
    from ftplan.errors import InputError
    from ftplan.files.document import read_document
    from ftplan.files.failures import looks_like_failures, parse_failures

    options = read_options(columns, threshold, tool)
    overrides = kind_overrides(map)
    labelled: list[FailuresFile] = []
    results: list[FailuresFile] = []
    for path in files:
        document = None
        if not tool and path.suffix.lower() in (".yaml", ".yml", ".json"):
            try:
                document = read_document(path)
            except InputError:
                if path.suffix.lower() != ".json":
                    raise  # no tool writes YAML: it is meant as a failures file
        if document is not None and (
            looks_like_failures(document) or path.suffix.lower() != ".json"
        ):
            labelled.append(evals.with_suggestions(parse_failures(document), overrides=overrides))
        else:
            run = evals.read_results(path, options)
            results.append(evals.to_failures(run, overrides=overrides))
    return evals.join_failures(labelled, results)


def rendered(answer: Advice, format: Format, output: Path | None) -> str:
    """The answer in the format that was asked for."""
    if format in ("json", "yaml"):
        from ftplan.advice import advice_to_dict
        from ftplan.render import json, yaml

        data = advice_to_dict(answer)
        return json.render(data) if format == "json" else yaml.render(data)
    from ftplan.render.advice import render_advice, render_advice_markdown

    if format == "markdown":
        return render_advice_markdown(answer)
    return render_advice(answer, width=screen_width(output), colour=use_colour(output))
