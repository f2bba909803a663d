"""Optimizers: the real ones where they run on CPU tensors, exact stand-ins where they do not."""

from __future__ import annotations

from typing import Any

import torch

from ftplan.errors import UnsupportedError
from ftplan.trace.job import Job

__all__ = ["host_scalars", "make_optimizer"]


def make_optimizer(job: Job, groups: Any) -> Any:
    """The optimizer of the job over parameter groups."""
    how: dict[str, Any] = {
        "fused": job.implementation == "fused",
        "foreach": job.implementation == "foreach",
    }
    if job.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=1e-4, **how)
    if job.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=1e-4, momentum=job.momentum, **how)
    raise UnsupportedError(f"tracing the optimizer {job.optimizer!r}")


def host_scalars(job: Job, optimizer: Any) -> list[Any]:
    """State tensors that a CUDA run keeps on the host: step counters, unless fused."""
    if job.implementation == "fused":
        return []
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim == 0
    ]
