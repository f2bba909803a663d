"""Jobs of trainers that run model code of their own: LitGPT and torchtune, from their packages.

A :class:`Loop` is the trainer's model and the part of its loop between a batch and its loss. One
file per trainer; the version that is installed must be of the time that the plan's stack names.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from ftplan.errors import UnsupportedError
from ftplan.trace.job import Job
from ftplan.trace.ledger import Ledger

__all__ = ["OWN", "Loop", "loop_of", "require_version"]

OWN: Mapping[str, str] = {
    "litgpt": "ftplan.trace.litgpt",
    "litgpt-0.4": "ftplan.trace.litgpt",
    "litgpt-0.3": "ftplan.trace.litgpt",
    "litgpt-2023": "ftplan.trace.litgpt",
    "torchtune": "ftplan.trace.torchtune",
    "torchtune-0.6": "ftplan.trace.torchtune",
    "torchtune-0.4": "ftplan.trace.torchtune",
    "torchtune-0.1": "ftplan.trace.torchtune",
}
"""Stacks that are traced through their own modules, and by which file."""


class Loop:
    """One job in the trainer's own code."""

    package = ""
    """Name of the distribution."""
    runs_on: tuple[str, ...] = ("torch",)
    """Distributions beside it whose code is run."""

    def __init__(self, job: Job, config: Mapping[str, Any], layers: int | None) -> None:
        self.job = job
        self.model = self.build(config, layers)

    def build(self, config: Mapping[str, Any], layers: int | None) -> Any:
        """The model on the meta device, in the dtypes it is trained in."""
        raise NotImplementedError

    def prepare(self, ledger: Ledger) -> None:
        """What the script does with the model once it has weights."""
        raise NotImplementedError

    def shard(self, mesh: Any) -> Any:
        """The model as its distributed recipe shards it."""
        raise UnsupportedError(
            f"tracing {self.job.stack} on many GPUs", remedy="trace it on one GPU"
        )

    def optimised(self) -> Sequence[Any]:
        """The parameters that the optimizer is given."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def forward(self, input_ids: Any, labels: Any) -> dict[str, Any]:
        """From a batch to its loss, under the name ``loss``."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """Versions of what was run."""
        names = (self.package, *self.runs_on)
        return {name: metadata.version(name).partition("+")[0] for name in names}


def loop_of(job: Job, config: Mapping[str, Any], layers: int | None) -> Loop | None:
    """The loop of a job whose stack has modules of its own; None where it runs transformers'."""
    if job.stack not in OWN:
        return None
    loop: Loop = importlib.import_module(OWN[job.stack]).LOOP(job, config, layers)
    return loop


def require_version(package: str, stack: str, wanted: tuple[str, ...]) -> None:
    """Raise UnsupportedError unless the installed version is of the stack's time."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        version = ""
    if not version.startswith(wanted):
        raise UnsupportedError(
            f"tracing the stack {stack!r} with {package} {version or 'not installed'}",
            remedy=f"install {package} {' or '.join(wanted)} in this environment",
        )
