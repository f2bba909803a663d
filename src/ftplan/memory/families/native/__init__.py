"""Trainers that run model code of their own: LitGPT, torchtune and Megatron.

A :class:`Native` network is complete: its weights have their dtypes, what is frozen is frozen, and
the trainer's own adapters are in place. ``job.modules`` says whose code runs, and of which time
(``litgpt``, ``litgpt-0.4``); one file per trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ftplan.memory.families.native.base import Native
from ftplan.memory.job import Job

__all__ = [
    "TASKS",
    "Native",
    "checkpoints",
    "fsdp_version",
    "native",
    "parallel",
    "runs",
    "shards",
    "shows",
    "wraps",
]

TASKS = ("sft", "pt")
"""Tasks whose loop and loss are walked, where the trainer's file names no others."""


def _file(modules: str) -> Any:
    return import_module(f"ftplan.memory.families.native.{modules.partition('-')[0]}")


def runs(
    modules: str, config: Mapping[str, Any], *, task: str, method: str, weights: str, loss: str,
    attention: str,
) -> bool:  # fmt: skip
    """Whether the trainer's code is walked for this model, task, method, storage, loss and
    attention."""
    file = _file(modules)
    if task not in getattr(file, "TASKS", TASKS):
        return False
    if attention not in getattr(file, "ATTENTION", ("sdpa",)):
        return False
    known: bool = config.get("model_type") in file.model_types(modules, method)
    known = known and method in file.METHODS and weights in file.WEIGHTS
    return known and loss in file.losses(modules, method)


def checkpoints(modules: str) -> tuple[str, ...]:
    """Kinds of gradient checkpointing that the trainer has on one GPU, and that were traced."""
    kinds: tuple[str, ...] = _file(modules).CHECKPOINTS
    return kinds


def parallel(modules: str) -> tuple[str, ...]:
    """Degrees of parallelism of which the trainer's code is walked."""
    degrees: tuple[str, ...] = getattr(_file(modules), "PARALLEL", ())
    return degrees


def wraps(modules: str, sharding: Any, config: Mapping[str, Any]) -> bool:
    """Whether the trainer's code is walked under what shards the plan's model."""
    asked = getattr(_file(modules), "wraps", None)
    return asked is None or bool(asked(sharding, config))


def shards(modules: str) -> bool:
    """Whether that was traced, sharded as :func:`wraps` says."""
    return hasattr(_file(modules), "wraps")


def fsdp_version(modules: str) -> int | None:
    """The version of FSDP under which the trainer was traced, nothing offloaded; None: neither."""
    versions: Mapping[str, int] = getattr(_file(modules), "FSDP", {})
    return versions.get(modules)


def shows(modules: str, config: Mapping[str, Any]) -> bool:
    """Whether images in a sequence are walked."""
    asked = getattr(_file(modules), "shows", None)
    return asked is not None and asked(config)


def native(job: Job) -> Native:
    """The network of a job whose stack runs its own modules, as it is trained."""
    network: Native = _file(job.modules).build(job)
    return network
