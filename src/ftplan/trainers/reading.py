"""From a file or a text to a plan: which trainer wrote it, and what it says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ftplan.catalog.stacks import find_stack
from ftplan.errors import FtplanError, InputError, Location, UnknownNameError
from ftplan.files.document import Document, parse_document, read_document, read_text
from ftplan.files.plan import looks_like_plan, parse_plan
from ftplan.trainers import (
    accelerate,
    axolotl,
    deepspeed,
    litgpt,
    llamafactory,
    nemo,
    swift,
    torchtune,
    transformers,
    trl,
    unsloth,
)
from ftplan.trainers.commands import Job, find_job, looks_like_script
from ftplan.trainers.draft import Draft, Imported
from ftplan.trainers.keys import Keys, Unresolved
from ftplan.trainers.launch import Context
from ftplan.trainers.lint import lint_draft, lint_plan

__all__ = ["TRAINERS", "detect", "detect_file", "import_document", "import_file", "import_text"]

TRAINERS = (
    "axolotl", "llamafactory", "trl", "transformers", "torchtune", "litgpt", "unsloth", "nemo",
    "ms-swift", "plan",
)  # fmt: skip
"""Names that ``--from`` takes."""

Resolve = Callable[[str], Document | None]

_OTHER_FILES = (
    (("jobs", "on"), "a GitHub workflow"), (("services",), "a compose file"),
    (("hidden_size", "model_type"), "a model's config.json: pass it with --config"),
    (("peft_type",), "an adapter's adapter_config.json: it holds no batch and no sequence length"),
    (("architectures", "model_type"), "a model's config.json: pass it with --config"),
    (("apiVersion", "kind"), "a Kubernetes manifest"), (("repos",), "a pre-commit configuration"),
)  # fmt: skip


# --- detection -----------------------------------------------------------------------------------


def detect(document: Document) -> str:
    """The trainer whose configuration a document is.

    Raises :class:`InputError` for a document that is no training job, saying what it is: an
    overlay alone, inference, evaluation, merging, or nothing that is known.
    """
    data = document.mapping(
        "a trainer's configuration", remedy="give a YAML or JSON file with keys, or a job script"
    )
    if looks_like_plan(document) and not axolotl.matches(data):
        return "plan"
    keys = Keys(document)
    for test, name, module in (
        (torchtune.matches, torchtune.NAME, torchtune),
        (nemo.matches, nemo.NAME, nemo),
    ):
        if test(data):
            refusal = module.refuse(data, keys)
            if refusal is not None:
                raise refusal
            return name
    if axolotl.matches(data):
        return axolotl.NAME
    _refuse_overlay(data, keys)
    refusal = axolotl.refuse(data, keys)
    if refusal is not None:
        raise refusal
    if litgpt.matches(data):
        return litgpt.NAME
    if unsloth.matches(data):
        return unsloth.NAME
    refusal = llamafactory.refuse(data, keys)
    if refusal is not None:
        raise refusal
    if llamafactory.matches(data):
        return llamafactory.NAME
    if swift.matches(data):
        return swift.NAME
    if transformers.matches(data):
        return transformers.NAME
    if trl.matches(data):
        return trl.NAME
    raise _unknown(data, keys)


def _refuse_overlay(data: dict[str, Any], keys: Keys) -> None:
    for matches, name in ((deepspeed.matches, "DeepSpeed"), (accelerate.matches, "accelerate")):
        if matches(data) and "model_name_or_path" not in data:
            raise keys.error(
                f"this is {'an' if name[0] == 'a' else 'a'} {name} file: it says how a job "
                f"is spread, not which job",
                remedy="give the trainer's configuration, and this file with --overlay",
            )


def _unknown(data: dict[str, Any], keys: Keys) -> InputError:
    for marks, what in _OTHER_FILES:
        if all(mark in data for mark in marks):
            return keys.error(f"this is {what}, not a training job", marks[0])
    if "model_name_or_path" in data or "model" in data:
        return keys.error(
            "this file names a model but no trainer's settings (no batch size, no epochs, no data)",
            remedy="name its trainer with --from: " + ", ".join(TRAINERS),
        )
    return keys.error(
        "no trainer that ftplan knows writes such a file",
        remedy="known are " + ", ".join(TRAINERS) + "; name one with --from",
    )


def detect_file(path: str | Path) -> str:
    """The trainer whose configuration, command or script a file is (see :func:`detect`)."""
    text = read_text(Path(path), file=str(path))
    if looks_like_script(text, str(path)):
        return find_job(text, file=str(path)).trainer
    return detect(_document(text, str(path)))


def _document(text: str, file: str) -> Document:
    """The text as YAML or JSON; a text that is neither and names no suffix may be a script."""
    try:
        return parse_document(text, file=file)
    except InputError as error:
        if file.lower().endswith((".yaml", ".yml", ".json")):
            raise
        try:
            find_job(text, file=file)
        except InputError:
            raise error from None
        raise _ScriptError from None


class _ScriptError(Exception):
    """The text turned out to be a script."""


# --- import --------------------------------------------------------------------------------------


def import_file(
    path: str | Path,
    *,
    overlays: Sequence[str | Path] = (),
    trainer: str | None = None,
) -> Imported:
    """Read a trainer's configuration, command line or job script as a plan.

    ``overlays`` are accelerate and DeepSpeed files; ``trainer`` overrules detection. Files that
    the configuration names are looked for beside it, then in the working directory. Raises
    :class:`InputError` for what cannot be read or is no training job.
    """
    path = Path(path)
    text = read_text(path, file=str(path))
    layers = tuple(read_document(one) for one in overlays)
    return import_text(
        text, file=str(path), overlays=layers, trainer=trainer, resolve=_beside(path)
    )


def _beside(path: Path) -> Resolve:
    def resolve(name: str) -> Document | None:
        named = Path(name)
        if named.is_absolute() or name.startswith("~"):
            return None
        # scripts are written for the root of their repository: the file itself lies beside them
        for candidate in (path.parent / named, Path() / named, path.parent / named.name):
            if candidate.is_file():
                return read_document(candidate)
        return None

    return resolve


def import_text(
    text: str,
    *,
    file: str,
    overlays: Iterable[Document] = (),
    trainer: str | None = None,
    resolve: Resolve | None = None,
) -> Imported:
    """The same for a text: YAML, JSON, a command line or a script (told apart by content)."""
    _known(trainer)
    script = looks_like_script(text, file)
    if not script:
        try:
            document = _document(text, file)
        except _ScriptError:
            script = True
        else:
            return import_document(document, overlays=overlays, trainer=trainer, resolve=resolve)
    return _import_job(find_job(text, file=file), tuple(overlays), trainer, resolve)


def _known(trainer: str | None) -> None:
    if trainer is not None and trainer not in TRAINERS:
        import difflib

        raise UnknownNameError(
            "trainer",
            trainer,
            suggestions=difflib.get_close_matches(trainer, TRAINERS, n=2),
            remedy="known are " + ", ".join(TRAINERS),
        )


def import_document(
    document: Document,
    *,
    overlays: Iterable[Document] = (),
    trainer: str | None = None,
    resolve: Resolve | None = None,
) -> Imported:
    """The same for a document that has been parsed. Pure: reads nothing but through ``resolve``."""
    _known(trainer)
    name = trainer or detect(document)
    document.mapping("a trainer's configuration")
    if name == "plan":
        return _import_plan(document)
    return _import(name, (document,), tuple(overlays), resolve, job=None)


def _import_plan(document: Document) -> Imported:
    plan = parse_plan(document)
    data = document.data
    places: dict[str, Location] = {}
    for key, value in data.items():
        places[key] = document.locate((key,))
        if isinstance(value, dict):
            places |= {f"{key}.{inner}": document.locate((key, inner)) for inner in value}
    for section, inner in (
        ("model", "name"),
        ("optimizer", "name"),
        ("loss", "kind"),
        ("gradient_checkpointing", "kind"),
    ):
        if section in places:
            places.setdefault(f"{section}.{inner}", places[section])
    return Imported(
        plan=plan,
        trainer="plan",
        findings=lint_plan(plan, where=places.get),
        assumptions=(),
        places=places,
    )


def _left_open(value: Any) -> Any:
    """Values in which a shell's expression is left are those that only running would tell."""
    if isinstance(value, dict):
        return {key: _left_open(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_left_open(inner) for inner in value]
    return Unresolved(value) if isinstance(value, str) and re.search(r"[$`]", value) else value


def _within(job: Job, resolve: Resolve | None) -> Resolve:
    """Files that the script writes itself come before those that lie beside it."""

    def found(name: str) -> Document | None:
        if name in job.files:
            written = job.files[name]
            document = parse_document(written.text, file=job.document.file)
            if written.is_filled:
                document.data = _left_open(document.data)
            return document
        return resolve(name) if resolve is not None else None

    return found


def _import_job(
    job: Job, overlays: tuple[Document, ...], trainer: str | None, resolve: Resolve | None
) -> Imported:
    resolve = _within(job, resolve)
    layers: list[Document] = [job.document]
    unread: list[tuple[str, Location]] = []
    for word in reversed(job.configs):
        where = Location(file=job.document.file, line=word.line, column=word.column)
        found = None if resolve is None else resolve(word.text)
        if found is None:
            unread.append((word.text, where))
        elif isinstance(found.data, dict) and (
            accelerate.matches(found.data) or deepspeed.matches(found.data)
        ):
            overlays = (*overlays, found)
        elif isinstance(found.data, dict):
            layers.append(found)
    name = trainer or job.trainer
    if name == "config":
        if len(layers) == 1:
            raise InputError(
                f"the command names "
                f"{job.configs[-1].text if job.configs else 'a configuration'}, which is "
                f"not to be found",
                location=Location(file=job.document.file, line=1, column=1),
                remedy="give that file itself, or run where it is",
            )
        name = detect(layers[1])
        if name == "plan":
            return _import_plan(layers[1])
    return _import(name, tuple(layers), overlays, resolve, job=job, unread=unread)


def _import(
    name: str,
    layers: tuple[Document, ...],
    overlays: tuple[Document, ...],
    resolve: Resolve | None,
    *,
    job: Job | None,
    unread: Sequence[tuple[str, Location]] = (),
) -> Imported:
    keys = Keys(*layers)
    program = job.task if job is not None else None
    stack = name
    megatron = False
    if name == swift.NAME:
        megatron = (
            job.program.startswith("megatron") if job is not None else swift.is_megatron(keys.data)
        )
        stack = "megatron" if megatron else "ms-swift"
    find_stack(stack)
    draft = Draft(trainer=name, stack=stack)
    context = Context(draft=draft, resolve=resolve, overlays=overlays)
    for text, where in unread:
        draft.find(
            "IMP004",
            f"{text}, which the command names, is not to be found beside this file or in "
            f"the working directory",
            where,
            help="run where it is, or give that file itself",
        )
    draft.incomplete = bool(unread) and len(layers) == 1
    if job is not None and job.others:
        draft.find(
            "IMP008",
            f"the script holds {job.others} more training command(s); the first, "
            f"`{job.program}`, was read",
            job.document.locate(()),
        )
    try:
        _read(name, context, keys, program, megatron)
        return draft.finish(keys, lint=lint_draft)
    except FtplanError:
        raise
    except RecursionError:
        raise InputError(
            "the file is nested too deeply", location=Location(file=keys.file)
        ) from None


def _read(name: str, context: Context, keys: Keys, program: str | None, megatron: bool) -> None:
    if name == axolotl.NAME:
        axolotl.read(context, keys)
    elif name == llamafactory.NAME:
        llamafactory.read(context, keys, program)
    elif name == trl.NAME:
        trl.read(context, keys, program)
    elif name == transformers.NAME:
        transformers.read(context, keys)
    elif name == torchtune.NAME:
        torchtune.read(context, keys, program)
    elif name == litgpt.NAME:
        litgpt.read(context, keys, program)
    elif name == unsloth.NAME:
        unsloth.read(context, keys)
    elif name == nemo.NAME:
        nemo.read(context, keys)
    else:
        assert name == swift.NAME, name
        swift.read(context, keys, program, megatron=megatron)
