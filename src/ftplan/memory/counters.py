"""From what is allocated to what the card shows: the allocator's cache, and what lies around it.

Three counters that are never mixed. ``allocated`` is the worst moment of the step. ``reserved``
adds what PyTorch's caching allocator holds and does not use: it grows with what comes and goes,
not with what stays, so it is taken as a share of the transient bytes. ``device`` adds what no
allocator of PyTorch sees: the CUDA context and the libraries' own buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftplan.report import Interval
from ftplan.units import MIB

__all__ = [
    "Counters",
    "allocated_interval",
    "context_interval",
    "counters",
    "reserved_interval",
    "workspace_bytes",
]

_CONTEXT = {  # low, expected, high: the CUDA context with its loaded kernels, MiB
    (7, 0): (280, 320, 450),
    (7, 5): (100, 145, 330),
    (8, 0): (350, 420, 600),
    (8, 6): (200, 300, 520),
    (8, 9): (200, 320, 560),
    (9, 0): (450, 520, 750),
    (10, 0): (450, 600, 900),
    (12, 0): (350, 500, 800),
}


def workspace_bytes(capability: tuple[int, int] | None) -> int:
    """cuBLAS's workspaces, which PyTorch allocates through its own allocator.

    ``:4096:2:16:8`` (8,519,680 bytes) before Hopper and 32 MiB from Hopper on
    (aten/src/ATen/cuda/CublasHandlePool.cpp, ``parseChosenWorkspaceSize``), one for the thread
    that runs forward and one for autograd's. None where no GPU is named.
    """
    if capability is None:
        return 0
    return 2 * (32 * MIB if capability >= (9, 0) else 8_519_680)


def allocated_interval(expected: int, transient: int) -> Interval:
    """The uncertainty of the walk itself: kernels' workspaces grow with what is transient."""
    low = expected - round(transient * 0.02)
    high = expected + round(transient * 0.04) + 32 * MIB
    return Interval(low=max(0, low), expected=expected, high=high)


def reserved_interval(allocated: Interval, transient: int) -> Interval:
    """What ``max_memory_reserved`` shows: blocks of 2 and 20 MiB that are not full."""
    return Interval(
        low=allocated.low + round(transient * 0.01),
        expected=allocated.expected + round(transient * 0.06) + 20 * MIB,
        high=allocated.high + round(transient * 0.20) + 64 * MIB,
    )


def context_interval(capability: tuple[int, int] | None, gpus: int) -> Interval:
    """What lies on the card outside PyTorch's allocator, in bytes."""
    low, expected, high = _CONTEXT.get(capability or (0, 0), (0, 300, 600))
    if gpus > 1:  # NCCL's channels and buffers
        low, expected, high = low + 100, expected + 400, high + 1200
    return Interval(low=low * MIB, expected=expected * MIB, high=high * MIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """The three counters of one peak."""

    allocated: Interval
    reserved: Interval
    device: Interval


def counters(
    peak: int, static: int, *, capability: tuple[int, int] | None, named: bool, gpus: int
) -> Counters:
    """All three for a walk's peak of which ``static`` bytes never come and go.

    ``named``: a card is named, so cuBLAS's workspace is known; ``gpus`` is how many there are.
    """
    transient = peak - static
    allocated = allocated_interval(peak + workspace_bytes(capability if named else None), transient)
    reserved = reserved_interval(allocated, transient)
    device = reserved.plus(context_interval(capability, gpus))
    return Counters(allocated=allocated, reserved=reserved, device=device)
