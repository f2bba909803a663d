"""``ftplan advise``: prompt, retrieve or finetune - the next step, from observed failures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftplan.cli.output import (
    Format,
    FormatOption,
    OutputOption,
    emit,
    note,
    screen_width,
    use_colour,
)
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
    from ftplan.cli.advise_sizing import Sized
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
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="NAME",
            help="Model to finetune, if it comes to that: what fits follows, with --gpu.",
            rich_help_panel="Sizing",
            show_default=False,
        ),
    ] = "",
    gpu: Annotated[
        str,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help="GPU to finetune on, with --model.",
            rich_help_panel="Sizing",
            show_default=False,
        ),
    ] = "",
    format: FormatOption = "table",
    output: OutputOption = None,
) -> int:
    """Prompt, RAG or finetune: the next step, from observed failures."""
    from ftplan import __version__
    from ftplan.advise import advise as decide
    from ftplan.errors import InputError

    if bool(model) != bool(gpu):
        raise InputError(
            "--model and --gpu belong together",
            remedy="give both to have the job sized, or neither",
        )
    together = read_inputs(files, map=map, columns=columns, threshold=threshold, tool=tool)
    answer = decide(together, tool_version=__version__)
    sized = None
    if model and answer.method is not None:
        from ftplan.cli.advise_sizing import size

        answer, sized = size(answer, together.state, model=model, gpu=gpu)
    elif model:
        note(f"nothing to size: {answer.destination.step} does not train")
    emit(rendered(answer, format, output, sized), output)
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


def rendered(
    answer: Advice, format: Format, output: Path | None, sized: Sized | None = None
) -> str:
    """The answer in the format that was asked for, the sizing of its job below it."""
    if format in ("json", "yaml"):
        from ftplan.advice import advice_to_dict
        from ftplan.render import json, yaml

        data = advice_to_dict(answer)
        if sized is not None:
            data["sizing"] = {"plan": sized.plan_text, "fit": sized.fit}
        return json.render(data) if format == "json" else yaml.render(data)
    from ftplan.render.advice import render_advice, render_advice_markdown

    if format == "markdown":
        text = render_advice_markdown(answer)
    else:
        text = render_advice(answer, width=screen_width(output), colour=use_colour(output))
    if sized is None:
        return text
    from ftplan.render import fit

    if format == "markdown":
        return (
            f"{text}\n{fit.render_markdown(sized.fit)}\n"
            f"## The plan to start from\n\n```yaml\n{sized.plan_text}```\n"
        )
    table = fit.render(sized.fit, width=screen_width(output), colour=use_colour(output))
    indented = "".join(f"  {line}\n" for line in sized.plan_text.splitlines())
    return f"{text}\n{table}\nThe plan to start from\n{indented}"
