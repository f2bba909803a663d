"""What stands around a trainer's file: launcher, environment, overlays, files by reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath

from ftplan.errors import InputError, Location
from ftplan.files.document import Document, Key
from ftplan.trainers import accelerate, deepspeed
from ftplan.trainers.commands import ENV, LAUNCH
from ftplan.trainers.draft import Draft
from ftplan.trainers.keys import Keys

__all__ = ["Context", "surroundings"]


class Context:
    """What a reader may look at beside its own document.

    ``resolve`` reads a file that the configuration names (relative to it, then to the working
    directory) and returns None when it cannot; nothing else is ever read.
    """

    def __init__(
        self,
        *,
        draft: Draft,
        resolve: Callable[[str], Document | None] | None = None,
        overlays: Iterable[Document] = (),
    ) -> None:
        self.draft = draft
        self.resolve = resolve
        self.overlays = tuple(overlays)

    def reads(self, name: str, keys: Keys, *path: Key) -> Document | None:
        """The file called ``name``; a finding IMP004 when it cannot be read."""
        found: Document | None = None
        if self.resolve is not None:
            try:
                found = self.resolve(name)
            except InputError as error:
                self.draft.find(
                    "IMP004", f"{name} cannot be understood: {error.message}", keys.at(*path)
                )
                return None
        if found is None:
            self.draft.find(
                "IMP004",
                f"{name}, named here, is not to be found beside this file or in the working "
                f"directory",
                keys.at(*path),
                help="pass it with --overlay FILE",
            )
            _told_by_name(self.draft, name, keys.at(*path))
        else:
            self.draft.find("IMP008", f"{name} was read, as this file names it", keys.at(*path))
        return found


_SHARDED = (
    (r"zero-?_?([123])|(?:^|[_-])z([123])(?![0-9])", "zero"), (r"fsdp", "fsdp"),
)  # fmt: skip


def _told_by_name(draft: Draft, name: str, at: Location) -> None:
    """A sharding file that cannot be read usually says in its name which sharding it sets."""
    stem = PurePosixPath(name).stem.lower()
    for pattern, kind in _SHARDED:
        match = re.search(pattern, stem)
        if match is None or draft.get("sharding.kind") is not None:
            continue
        stage = next((part for part in match.groups() if part), "")
        draft.put("sharding.kind", kind + stage, at)
        if kind == "fsdp":
            draft.put("sharding.version", 2 if re.search(r"fsdp_?v?2", stem) else 1, at)
        if "offload" in stem:
            draft.put("sharding.offload", "params" if stage in ("", "3") else "optimizer", at)
        draft.find("IMP010", f"sharding is taken to be {kind}{stage}: the file's name says so", at)


def surroundings(context: Context, keys: Keys) -> None:
    """Apply overlays, launcher flags and environment to the draft, after the reader's own keys."""
    draft = context.draft
    for document in context.overlays:
        _overlay(context, document)
    _launcher(context, keys)
    _environment(draft, keys)
    total = (draft.get("hardware.count") or 0) * (draft.get("hardware.nodes") or 1)
    if draft.get("hardware.count") is not None and draft.get("sharding.kind") is None:
        split = (draft.get("sharding.pp") or 1) * (draft.get("sharding.tp") or 1)
        if total > split:
            draft.assume(
                "sharding.kind", "ddp", f"{total} processes and no sharding: data parallel"
            )
        else:
            draft.assume("sharding.kind", "none", "one process, or one process per model part")


def _overlay(context: Context, document: Document) -> None:
    data = document.mapping("an overlay")
    keys = Keys(document)
    if deepspeed.matches(data):
        deepspeed.apply(context.draft, keys)
    elif accelerate.matches(data):
        accelerate.apply(context.draft, keys, context.reads)
    else:
        raise document.error(
            "an overlay is an accelerate or a DeepSpeed file, this is neither",
            remedy="pass the trainer's own configuration as FILE and only those two with --overlay",
        )


def _launcher(context: Context, keys: Keys) -> None:
    draft = context.draft
    program = keys.text(LAUNCH, "program")
    if program is None and not keys.has(LAUNCH):
        return
    if program == "accelerate":
        accelerate.apply_launch(draft, keys, (LAUNCH,), context.reads)
    for name in ("nproc_per_node", "num_gpus", "n"):
        count = keys.word(LAUNCH, name)
        if count is not None and count.isdigit() and int(count) > 0:
            draft.put("hardware.count", int(count), keys.at(LAUNCH, name))
    for name in ("nnodes", "num_nodes"):
        nodes = (keys.word(LAUNCH, name) or "").split(":")[0]
        if nodes.isdigit() and int(nodes) > 1:
            draft.put("hardware.nodes", int(nodes), keys.at(LAUNCH, name))
    include = keys.text(LAUNCH, "include")
    if include is not None and ":" in include:
        hosts = include.split("@")
        draft.put(
            "hardware.count",
            include.split(":")[1].split("@")[0].count(",") + 1,
            keys.at(LAUNCH, "include"),
        )
        if len(hosts) > 1:
            draft.put("hardware.nodes", len(hosts), keys.at(LAUNCH, "include"))
    keys.mapping(LAUNCH)


def _environment(draft: Draft, keys: Keys) -> None:
    for name in ("NPROC_PER_NODE", "GPUS_PER_NODE", "SLURM_GPUS_PER_NODE"):
        count = keys.word(ENV, name)
        given = draft.get("hardware.count") is not None and name.startswith("SLURM")
        if count is not None and count.isdigit() and int(count) > 0 and not given:
            draft.put("hardware.count", int(count), keys.at(ENV, name))
            break
    nodes = keys.word(ENV, "NNODES") or keys.word(ENV, "SLURM_NNODES")
    if nodes is not None and nodes.isdigit() and int(nodes) > 1:
        draft.put("hardware.nodes", int(nodes), keys.at(ENV, "NNODES"))
    visible = visible_devices(keys)
    if visible is not None and draft.get("hardware.count") is None:
        draft.put("hardware.count", visible, keys.at(ENV, "CUDA_VISIBLE_DEVICES"))
    keys.mapping(ENV)


def visible_devices(keys: Keys) -> int | None:
    """How many GPUs ``CUDA_VISIBLE_DEVICES`` shows; None when it is not set."""
    for name in ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"):
        devices = keys.text(ENV, name)
        if devices is not None:
            found = [one for one in devices.split(",") if one.strip()]
            return len(found) or None
    return None
