"""The terms of the answer: what is alive at the worst moment, each with its formula and source."""

from __future__ import annotations

from collections.abc import Mapping

from ftplan.memory.estimate import Estimate
from ftplan.memory.fsdp import ACCUMULATED
from ftplan.memory.replay import Alive
from ftplan.memory.tape import NOTHING, Label, Size
from ftplan.report import Term

__all__ = ["all_terms", "formula"]

_GROUPS = {
    "activations": ("activations", "kept by autograd for the way back"),
    "recomputed": ("temporary/recomputed", "a checkpointed block, run again on the way back"),
    "logits": ("logits", "the head and the loss"),
    "gradients": ("gradients", "gradients that have arrived"),
    "temporary": ("temporary", "needed for a moment"),
    "gathered": ("temporary/gathered", "weights or gradients gathered from all ranks"),
}
_SYMBOLS = (
    "", "seq", "micro", "tokens", "micro x seq^2", "seq^2", "chunk tokens", "rank's tokens",
    "micro^2",
)  # fmt: skip


def formula(size: Size) -> str:
    """A size in bytes as a sum: ``163,840 x tokens + 4,096 x seq``."""
    parts = [
        f"{count:,} x {symbol}" if symbol else f"{count:,}"
        for count, symbol in zip(size, _SYMBOLS, strict=True)
        if count
    ]
    return " + ".join(parts).replace("+ -", "- ") or "0"


def moment_terms(alive: Mapping[Label, Alive]) -> list[Term]:
    """Terms of the dynamic part, gradients of all parameters in one, largest first."""
    merged: dict[tuple[str, str], tuple[int, Size, str]] = {}
    for label, entry in alive.items():
        if label == ACCUMULATED:  # taken from the static term of that name
            continue
        group, why = _GROUPS[label.group]
        name = "parameters" if label.group == "gradients" else label.name.replace(" ", "_")
        bytes_, size, _ = merged.get((group, name), (0, NOTHING, ""))
        merged[group, name] = (bytes_ + entry.bytes, size + entry.size, why)
    _fold_negatives(merged)
    terms = [
        Term(
            name=f"{group}/{name}",
            bytes=bytes_,
            at_peak=True,
            formula=formula(size),
            source=f"walk of the network's operations: {why}",
        )
        for (group, name), (bytes_, size, why) in merged.items()
    ]
    return sorted(terms, key=lambda term: -term.bytes)


def _fold_negatives(merged: dict[tuple[str, str], tuple[int, Size, str]]) -> None:
    """What one block made and another one freed under its own name is taken from the largest.

    Blocks of different kinds hand tensors to each other; the sum of a group is exact, and only
    the names within it can be crossed.
    """
    for key, (bytes_, size, _) in list(merged.items()):
        if bytes_ > 0:
            continue
        del merged[key]
        others = [k for k in merged if k[0] == key[0]] or list(merged)
        largest = max(others, key=lambda k: merged[k][0])
        there, there_size, why = merged[largest]
        merged[largest] = (there + bytes_, there_size + size, why)


def all_terms(result: Estimate, workspace: int) -> list[Term]:
    """Every term of the answer; those at the peak add up to it, to the byte."""
    gone = result.alive.get(ACCUMULATED)
    freed = {"/".join((ACCUMULATED.group, ACCUMULATED.name)): gone.bytes} if gone else {}
    terms = [
        Term(
            name=t.name,
            bytes=t.bytes + freed.get(t.name, 0),
            at_peak=True,
            formula=t.formula,
            source=t.source,
        )
        for t in result.static
        if t.bytes + freed.get(t.name, 0)
    ]
    terms += moment_terms(result.alive)
    if result.step_temporary_bytes:
        terms.append(
            Term(
                name="temporary/optimizer_step",
                bytes=result.step_temporary_bytes,
                at_peak=True,
                formula="temporaries of the optimizer's step",
                source="counted while the optimizer ran (catalogue of optimizers)",
            )
        )
    if workspace:
        terms.append(
            Term(
                name="runtime/cublas_workspace",
                bytes=workspace,
                at_peak=True,
                formula=f"{workspace:,}",
                source="aten/src/ATen/cuda/CublasHandlePool.cpp, default workspace by generation",
            )
        )
    return terms
