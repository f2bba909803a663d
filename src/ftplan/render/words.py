"""The words that every window for people shares: the job in one line, the verdict in one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ftplan.report import Report, Term
from ftplan.units import GB, GIB, format_count

__all__ = [
    "GROUPS",
    "VERDICTS",
    "both_units",
    "change_text",
    "gb",
    "gib",
    "group_terms",
    "headline",
    "is_textbook",
    "job_line",
    "plain_value",
    "short_source",
]

GROUPS = {
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "logits": "logits",
    "kv_cache": "key-value cache",
    "temporary": "temporaries",
    "runtime": "runtime",
    "overhead": "overhead",
    "unexplained": "unexplained",
}
"""Groups of terms in the order in which a step meets them."""


def gib(count: int) -> str:
    """Bytes in GiB, as a number without its unit."""
    return f"{count / GIB:,.2f}"


def gb(count: int) -> str:
    """Bytes in GB with the unit; whole numbers without a decimal: ``26 GB``, ``31.2 GB``."""
    if count == 0:
        return "0"
    if count < 10**8:
        return f"{count / 10**6:.1f}".removesuffix(".0") + " MB"
    return f"{count / GB:,.1f}".removesuffix(".0") + " GB"


def both_units(count: int) -> str:
    """``13.2 GB (12.3 GiB)``."""
    return f"{gb(count)} ({gib(count)} GiB)"


_PLACES = (
    (r"^https?://(www\.)?", ""),
    (r"^(huggingface\.co/[^/]+/[^/]+)/(blob|raw|resolve)/main/config\.json(?= \(|$)", r"\1"),
    (r"^github\.com/([^/]+/[^/]+)/(?:blob|tree)/([^/]+)/(.+)$", r"\1 \3 @\2"),
    (r"(@[0-9a-f]{8})[0-9a-f]{32}$", r"\1"),
    (r"/$", ""),
)


def short_source(source: str) -> str:
    """A web address as a person says it: ``pytorch/pytorch torch/optim/adam.py @v2.13.0``."""
    for pattern, said in _PLACES:
        source = re.sub(pattern, said, source)
    return source


def is_textbook(report: Report) -> bool:
    """Whether the answer is the textbook's sum over a bare parameter count."""
    return report.details.get("basis") == "textbook"


def _word(job: Mapping[str, Any], section: str, key: str) -> Any:
    value = job.get(section)
    if isinstance(value, Mapping):
        return value.get(key)
    return value if key in ("name", "kind", "gpu") else None


def job_line(report: Report) -> str:
    """The job in one line: ``qlora rank 16, 2 x 2048 tokens, adamw_torch_fused, fsdp x 8``."""
    job = report.job
    parts: list[str] = []
    kind = _word(job, "method", "kind") if job.get("task") != "serve" else None
    batch = job.get("batch") if isinstance(job.get("batch"), Mapping) else {}
    assert isinstance(batch, Mapping)
    if kind is None:
        parts.append("inference")
    else:
        rank = _word(job, "method", "rank")
        layers = _word(job, "method", "last_layers")
        parts.append(
            f"{kind}"
            + (f" rank {rank}" if rank is not None and kind not in ("full", "partial") else "")
            + (f" last {layers} blocks" if layers is not None else "")
        )
    weights = _word(job, "precision", "weights")
    if weights:
        parts.append(f"{weights} weights")
    if batch.get("micro") and batch.get("seq_len") and not is_textbook(report):
        parts.append(f"{batch['micro']} x {batch['seq_len']} tokens")
    if kind is not None:
        optimizer = _word(job, "optimizer", "name")
        checkpointing = _word(job, "gradient_checkpointing", "kind")
        parts += [str(optimizer)] if optimizer else []
        if checkpointing not in (None, "none", False):
            parts.append("gradient checkpointing")
    sharding = _word(job, "sharding", "kind")
    if sharding not in (None, "none"):
        parts.append(str(sharding))
    return ", ".join(parts)


def headline(report: Report) -> str:
    """What was asked, in a few words: the model and how large it is."""
    if report.model is None:
        return "no model"
    name, total = report.model.name, format_count(report.model.total_params)
    trained = report.model.trainable_params
    size = f"{total} parameters" + (f", {format_count(trained)} trained" if trained else "")
    return (
        size
        if not name or is_textbook(report) or name.endswith("parameters")
        else f"{name} ({size})"
    )


VERDICTS = {
    "fits": "fits",
    "tight": "tight: fits as expected, but not in the worst case",
    "over": "does not fit",
    "unknown": "could not decide",
}


def group_terms(terms: tuple[Term, ...]) -> dict[str, list[Term]]:
    """Terms by group, groups in the order of a step, unknown groups last."""
    groups: dict[str, list[Term]] = {name: [] for name in GROUPS}
    for term in terms:
        groups.setdefault(term.name.split("/")[0], []).append(term)
    return {name: found for name, found in groups.items() if found}


def change_text(change: Mapping[str, Any], separator: str = ", ") -> str:
    """A remedy's change as a user writes it: ``batch.micro: 1``; the last may change nothing."""
    if not change:
        return "-"
    return separator.join(
        f"no {key}" if value is None else f"{key}: {_value(value)}"
        for key, value in _flatten(change)
    )


def _flatten(change: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in change.items():
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value)


def plain_value(value: Any) -> str:
    """An assumption's value for the screen."""
    return "none" if value is None else _value(value)
