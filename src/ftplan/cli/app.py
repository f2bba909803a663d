"""The command line: which commands there are, and what is common to all of them.

CONVENTIONS (for whoever adds a command)

1. One module per command, ``ftplan/cli/<name>.py``, with one function that typer reads its
   arguments from, and ONE ROW in :data:`COMMANDS` below. Nothing else names the command;
   docs/cli.md is generated (``python tools/gen_cli_docs.py``).
2. At the top of the module import only the standard library, typer and values (``ftplan.spec``
   and the like). Everything else - catalogues, files, rich, pydantic, yaml, torch - is imported
   inside the function, so that ``--help`` and the other commands stay fast.
3. The function returns its exit code as an int (None is 0): 0 yes, 1 the answer is no (does not
   fit), 2 could not answer. It never calls ``sys.exit``.
4. Only the answer goes to stdout, through :func:`ftplan.cli.output.emit`, once, at the end.
   Progress and warnings go to stderr through :func:`ftplan.cli.output.note`.
5. A user's mistake is raised as a ``FtplanError`` (what is wrong, where, what to do instead);
   :func:`run` prints it and exits 2. Any other exception is ours: one line on stderr and exit 2,
   never 1, for a crash must not read as "does not fit" (``FTPLAN_DEBUG=1`` shows the traceback).
6. Options that several commands share are defined once: ``FormatOption``, ``OutputOption`` in
   ``ftplan.cli.output``; the flags of a job in ``ftplan.cli.flags``.
7. What a command can do, the Python API can: the body is read arguments, call, render, emit.
8. Help texts are one line each, start with a capital and end with a full stop. Group the options
   of a long command with ``rich_help_panel="..."``.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from ftplan.dataclass import dataclass
from ftplan.errors import FtplanError, describe_fault

__all__ = ["COMMANDS", "Command", "build_app", "help_text", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command: its name on the command line and the function that it calls."""

    name: str
    panel: str
    """Heading under which the overview lists it."""
    function: str = ""
    """Name of the function and of its module in ``ftplan.cli``; empty: the command's name."""

    def load(self) -> Any:
        """The function, its module imported now."""
        name = self.function or self.name
        return getattr(importlib.import_module(f"ftplan.cli.{name}"), name)


COMMANDS: tuple[Command, ...] = (
    Command(name="memory", panel="Memory"),
    Command(name="fit", panel="Memory"),
    Command(name="data", panel="Memory"),
    Command(name="check", panel="Memory"),
    Command(name="compare", panel="Memory"),
    Command(name="trace", panel="Memory"),
    Command(name="measure", panel="Memory"),
    Command(name="advise", panel="Advice"),
    Command(name="label", panel="Advice"),
    Command(name="compare-runs", panel="Advice", function="compare_runs"),
    Command(name="models", panel="Catalogues"),
    Command(name="gpus", panel="Catalogues"),
    Command(name="optimizers", panel="Catalogues"),
    Command(name="rules", panel="Catalogues"),
    Command(name="explain", panel="Catalogues"),
    Command(name="import", panel="Files", function="import_"),
    Command(name="export", panel="Files"),
    Command(name="diff", panel="Files"),
    Command(name="report", panel="Files"),
    Command(name="init", panel="Files"),
    Command(name="schema", panel="Files"),
)


def _coerce_what_needs_it(parameter: Any) -> None:
    """Read what is plainly right ourselves, and leave the rest, and every complaint, to typer.

    typer builds a pydantic adapter for every option that is given, and pydantic takes longer to
    load than a short command does to answer.
    """
    coerce = parameter.process_value

    def process_value(ctx: Any, value: Any) -> Any:
        read = value if value is None or value == () else _plainly(parameter, value)
        if (read is None and value is not None) or (parameter.required and not value):
            return coerce(ctx, value)
        return parameter.callback(ctx, parameter, read) if parameter.callback else read

    parameter.process_value = process_value


def _plainly(parameter: Any, value: Any) -> Any:
    """A given value as the type of its option; None: only typer can tell."""
    descriptor: Any = getattr(parameter, "type_descriptor", None)
    told = getattr(descriptor, "parameter_info", None)
    if told is None or told.parser is not None or getattr(told, "click_type", None) is not None:
        return None
    kind = descriptor.annotation
    if isinstance(value, bool | int | float) or (parameter.default == value and kind is not list):
        return value
    if get_origin(kind) is list and isinstance(value, list | tuple):
        read = [_convert(told, get_args(kind)[0], item) for item in value]
        return None if None in read else read
    return _convert(told, kind, value)


def _convert(told: Any, kind: Any, text: Any) -> Any:
    if not isinstance(text, str):
        return None
    if kind is str:
        return text
    if get_origin(kind) is Literal:
        return text if text in get_args(kind) else None
    if kind is int and text.isascii() and text.isdigit():
        number = int(text)
        is_inside = (told.min is None or told.min <= number) and (
            told.max is None or number <= told.max
        )
        return number if is_inside and not told.clamp else None
    if kind is Path and not (told.exists or told.resolve_path or told.allow_dash):
        return Path(text)
    return None


def _help_option(option: Any) -> Any:
    if option is not None and "process_value" not in vars(option):
        _coerce_what_needs_it(option)
    return option


class _Grouped(TyperCommand):
    """A command whose help lists its options under headings, without importing rich."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for parameter in self.params:
            _coerce_what_needs_it(parameter)

    def get_help_option(self, ctx: Any) -> Any:
        """``--help``, which is asked for on every run and hardly ever given."""
        return _help_option(super().get_help_option(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                # the range of a count says no more than its name does
                record = (record[0], re.sub(r"  \[\d+<=x(<=\d+)?\]", "", record[1]))
                is_argument = parameter.param_type_name == "argument"
                panel = "Arguments" if is_argument else "Options"
                panel = getattr(parameter, "rich_help_panel", None) or panel
                panels.setdefault(panel, []).append(record)
        for panel in sorted(panels, key=lambda name: (name != "Arguments", name == "Options")):
            with formatter.section(panel):
                formatter.write_dl(panels[panel])


class _Overview(TyperGroup):
    """The list of commands under their headings, in the order of :data:`COMMANDS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def get_help_option(self, ctx: Any) -> Any:
        """``--help`` of the whole program."""
        return _help_option(super().get_help_option(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)
        with formatter.section("Options"):
            formatter.write_dl([p.get_help_record(ctx) for p in self.get_params(ctx)])

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for command in COMMANDS:
            loaded = self.commands.get(command.name)
            if loaded is not None:
                row = (command.name, loaded.get_short_help_str(limit=200))
                panels.setdefault(command.panel, []).append(row)
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)


def build_app(only: str | None = None) -> typer.Typer:
    """The typer application with all commands, or with one of them alone (it starts faster)."""
    app = typer.Typer(
        name="ftplan",
        cls=_Overview,
        help="Prompt, retrieve or finetune - and will the job fit the GPU?",
        epilog="Exit codes: 0 yes, 1 the job does not fit, 2 could not decide or bad input.",
        add_completion=False,
        no_args_is_help=False,
        invoke_without_command=True,
        # plain text: instant, and the same in a terminal, a pipe and a CI log
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )

    @app.callback()
    def overview(
        ctx: typer.Context,
        version: bool = typer.Option(False, "--version", "-V", help="Print the version and exit."),
    ) -> None:
        if version:
            from ftplan import __version__

            typer.echo(f"ftplan {__version__}")
            raise typer.Exit(0)
        if ctx.invoked_subcommand is None:
            typer.echo(ctx.get_help())
            raise typer.Exit(0)

    for command in COMMANDS:
        if only is None or command.name == only:
            app.command(command.name, cls=_Grouped)(command.load())
    return app


def help_text(command: str | None) -> str:
    """The help page of a command, or the overview, for docs/cli.md: 80 columns, no colour."""
    root: Any = typer.main.get_command(build_app(command))
    context = root.make_context("ftplan", [], resilient_parsing=True, terminal_width=80)
    if command is None:
        return f"{context.get_help()}\n"
    leaf = root.commands[command]
    below = leaf.make_context(
        command, [], parent=context, resilient_parsing=True, terminal_width=80
    )
    return f"{below.get_help()}\n"


def run(arguments: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return its exit code."""
    names = {command.name for command in COMMANDS}
    only = arguments[0] if arguments and arguments[0] in names else None
    try:
        code = build_app(only)(list(arguments), prog_name="ftplan", standalone_mode=False)
        sys.stdout.flush()
    except FtplanError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone, and with it the question
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 2
    except KeyboardInterrupt:
        return 130
    except typer.Abort:
        return _fail("interrupted")
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: a wrong command line
            return _usage(error)
        if os.environ.get("FTPLAN_DEBUG"):
            raise_traceback(error)
        return _fail(
            f"{describe_fault(error)}\n"
            "  help: this is a fault of ftplan; FTPLAN_DEBUG=1 shows where it happened"
        )
    return code if isinstance(code, int) else 0


def raise_traceback(error: Exception) -> None:
    """Print where our own fault happened."""
    import traceback

    traceback.print_exception(error, file=sys.stderr)


def _usage(error: Any) -> int:
    message = error.format_message().replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "ftplan"
    return _fail(f"{message}\n  help: {path} --help")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
