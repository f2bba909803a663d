"""From a job as it was read to its trace and the prediction beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ftplan.errors import FtplanError, UnsupportedError
from ftplan.front.jobs import JobInput, estimate_job
from ftplan.front.resolve import resolve
from ftplan.trace.core import TraceResult, trace
from ftplan.trace.summary import summary

__all__ = ["traced_job"]


def traced_job(
    job: JobInput, *, layers: int | None = None, progress: Callable[[str], None] | None = None
) -> tuple[TraceResult, dict[str, Any]]:
    """The trace of a job, and truth beside prediction as plain data.

    With ``layers`` the model is cut, so there is no prediction to compare. Raises UnsupportedError
    for a job that cannot be traced.
    """
    resolved = resolve(job.plan, base=job.base)
    if resolved.config is None:
        raise UnsupportedError(
            "tracing a bare parameter count", remedy="give --model NAME or --config PATH"
        )
    result = trace(resolved.plan, dict(resolved.config), layers=layers, progress=progress)
    report = None
    reason = f"only {layers} layers were traced" if layers is not None else ""
    if layers is None:
        try:
            report = estimate_job(job)
        except FtplanError as error:
            reason = f"no prediction: {error.message}"
    from ftplan.front.api import job_mapping

    data = summary(result, report, job_mapping(resolved.plan))
    if reason:
        data["note"] = reason
    return result, data
