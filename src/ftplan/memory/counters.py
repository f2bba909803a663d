"""From what is allocated to what the card shows: the allocator's cache, and what lies around it.

Three counters that are never mixed.

``allocated`` is the worst moment of the step: the walk, and cuBLAS's workspaces.

``reserved`` is what PyTorch's caching allocator holds for that: whole segments, and blocks that
were freed and serve nobody. For training it is played (:mod:`ftplan.memory.reserved`); beside that
there is what a job *needs* when the card is full and the allocator has given back what it can:
gaps in segments that are in use, a share of the transient bytes. The verdict goes by the need;
what is held beyond it never keeps a job from running, so it is shown up to what the card has.

``device`` adds what no allocator of PyTorch sees: the CUDA context with the kernels that were
loaded, and NCCL's buffers.

The shares are the width of an interval, and no part of ``allocated``'s expected value
(docs/accuracy.md counts how many readings of others fall inside).
"""

from __future__ import annotations

from ftplan.dataclass import dataclass
from ftplan.report import Interval, Term
from ftplan.units import MIB

__all__ = ["Counters", "counters", "unexplained", "unexplained_routing", "workspace_bytes"]

SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB

WALK = (0.03, 0.05)
"""Share of the transient bytes that a GPU's kernels take less, or more, than the walk: what their
workspaces and the lifetimes of buffers inside them come to."""
UNTRACED = (0.12, 0.20)
"""The same for stacks with modules of their own, that were never traced."""
SERVED = (0.01, 0.03)
"""Share of all that a generation loop and kernels of quantised weights take less, or more: buffers
of their own."""
WASTE = (0.01, 0.12, 0.22)
"""Low, expected, high: gaps in the allocator's segments as a share of the transient bytes, where
all that can be given back has been. The smallest card on which the played allocator gets through
leaves 0 to 0.27 of them, over LoRA, QLoRA and full finetuning of 0.5B to 8B."""

ORDER = 0.02
"""Share of what is held that an order of tensors other than the walk's may add or save: layers
that are cut short in the play, tensors of the load that stay."""

_CONTEXT = {  # compute capability: low, expected, high in MiB, kernels loaded lazily (CUDA 11.7+)
    (7, 0): (270, 310, 450),
    (7, 5): (100, 145, 330),
    (8, 0): (290, 420, 600),
    (8, 6): (200, 300, 520),
    (8, 9): (250, 430, 560),
    (9, 0): (430, 520, 750),
    (10, 0): (450, 600, 900),
    (12, 0): (350, 500, 800),
}
"""Read off by others: 274 MiB beside one tensor (pytorch/pytorch#86509), 300 to 400 MiB
(pytorch/pytorch#107667, #109888), 426 MiB on an RTX 6000 Ada (unslothai/unsloth-zoo#1053), 141 MiB
on a T4 and about 0.5 GiB on an H100. Cards without a reading of their own stand between their
neighbours, with a wider interval."""
_OTHER_CONTEXT = (0, 300, 600)
_NCCL = (100, 400, 1200)
"""MiB: channels and their buffers, of each communicator; they grow with the number of GPUs.
Megatron has several: 6.5 GiB lay outside the allocator on 8 H200 under tensor parallelism 8, its
context among them (28.4 and 49.5 in ms-swift's log, 35 and 56 in nvidia-smi:
basetenlabs/ml-cookbook#105)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What the three counters will show, in bytes on one GPU."""

    allocated: Interval
    reserved: Interval
    device: Interval


def counters(
    peak_bytes: int,
    static_bytes: int,
    *,
    capability: tuple[int, int] | None,
    named: bool,
    gpus: int,
    communicators: int = 1,
    traced: bool = True,
    above: float = 0.0,
    cache_bytes: int | None = None,
    prompt_told: bool = False,
    held: Interval | None = None,
    usable_bytes: int = 0,
    uneven: int = 0,
    beside: int = 0,
) -> Counters:
    """The three counters of a job whose walk peaks at ``peak_bytes``.

    ``static_bytes`` of them never come and go. ``capability``: of the card, None for one that is
    not NVIDIA's; ``named``: the plan names a card, so its workspaces are counted.
    ``communicators``: groups of ranks, each with NCCL's buffers of its own. ``traced``: the
    stack's modules are those that the walk was held against. ``above``: by what share of all
    published readings of the stack lie above it. ``cache_bytes``: of the key-value
    cache when a model is served. Prompts may be shorter than the context (unless ``prompt_told``),
    so that less is transient; and a cache that grows by concatenation, token by token, leaves
    blocks that are too small for the next one, so that as much again may lie idle. ``held``: what
    the played allocator reserves, on a card of ``usable_bytes`` (0: none is named).
    ``uneven``: what the most uneven routing to spread experts would add. ``beside``: what libraries
    allocate on the card by themselves.
    """
    transient = peak_bytes - static_bytes
    expected = peak_bytes + (workspace_bytes(capability) if named else 0)
    less, more = WALK if traced else UNTRACED
    if cache_bytes is not None and not prompt_told:
        less = 1.0
    under, over = (round(peak_bytes * share) if prompt_told else 0 for share in SERVED)
    over += round(peak_bytes * above)
    allocated = Interval(
        low=max(0, expected - round(transient * less) - under),
        expected=expected,
        high=expected + round(transient * more) + 2 * SMALL_SEGMENT + over + uneven,
    )
    low, middle, high = WASTE
    segments = SMALL_SEGMENT + LARGE_SEGMENT
    need = Interval(
        low=allocated.low + round(transient * low),
        expected=expected + round(transient * middle) + segments,
        high=allocated.high + round(transient * high) + 2 * segments + (cache_bytes or 0),
    )
    around = _around(capability, gpus, communicators)
    around = around.plus(Interval(low=beside, expected=beside, high=beside))
    reserved = need if held is None else _shown(allocated, need, held, around, usable_bytes)
    return Counters(allocated=allocated, reserved=reserved, device=reserved.plus(around))


def _shown(
    allocated: Interval, need: Interval, held: Interval, around: Interval, usable: int
) -> Interval:
    """What is held, as far off as the walk may be; a card that is enough holds it."""
    order = round(ORDER * held.low)
    below = allocated.expected - allocated.low + order
    above = allocated.high - allocated.expected + order
    expected = max(held.expected, allocated.expected)
    high = max(held.high + above, need.high)
    if need.high + around.high <= usable:
        high = min(high, usable - around.high)
    if need.expected + around.expected <= usable:
        expected = min(expected, usable - around.expected)
    expected = min(expected, high)
    low = min(max(held.low - below, allocated.low), expected)
    return Interval(low=low, expected=expected, high=high)


def unexplained(allocated: Interval, *, stack: str, above: float = 0.0) -> Term:
    """The line of what we do not know: how far a stack's own modules may be from the walk."""
    under, over = allocated.expected - allocated.low, allocated.high - allocated.expected
    why = (
        f"published readings lie up to {above:.0%} above what its modules were traced to take"
        if above
        else "runs modules of its own, which were not traced"
    )
    return Term(
        name="unexplained/stack",
        bytes=over,
        at_peak=False,
        formula=f"low {-under:,}, high +{over:,}",
        source=f"{stack}: {why}; not part of any sum",
    )


def unexplained_routing(uneven: int) -> Term:
    """The line of what nobody knows before a run: how evenly the router sends tokens to ranks."""
    return Term(
        name="unexplained/routing",
        bytes=uneven,
        at_peak=False,
        formula=f"low 0, high +{uneven:,}",
        source="expected: a balanced router; high: each rank of the group sends this one every "
        "token, as often as it has experts for it; not part of any sum",
    )


def workspace_bytes(capability: tuple[int, int] | None) -> int:
    """cuBLAS's workspaces, which PyTorch allocates through its own allocator.

    ``:4096:2:16:8`` (8,519,680 bytes) before Hopper and 32 MiB from Hopper on
    (aten/src/ATen/cuda/CublasHandlePool.cpp, ``parseChosenWorkspaceSize``), one for the thread
    that runs forward and one for autograd's. 0 for cards that are not NVIDIA's.
    """
    if capability is None:
        return 0
    return 2 * (32 * MIB if capability >= (9, 0) else 8_519_680)


def _around(capability: tuple[int, int] | None, gpus: int, communicators: int) -> Interval:
    """What lies on the card outside PyTorch's allocator, in bytes."""
    context = _CONTEXT.get(capability or (0, 0), _OTHER_CONTEXT)
    nccl = [each * communicators if gpus > 1 else 0 for each in _NCCL]
    low, expected, high = (MIB * (c + n) for c, n in zip(context, nccl, strict=True))
    return Interval(low=low, expected=expected, high=high)
