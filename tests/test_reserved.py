"""What PyTorch's caching allocator holds: its rules, and the steps that are played on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftplan.errors import InputError
from ftplan.front.api import estimate
from ftplan.front.assembling import job_of
from ftplan.front.resolve import resolve
from ftplan.memory.allocator import Allocator, Block, OutOfSegmentsError
from ftplan.memory.estimate import Structure
from ftplan.memory.lengths import Lengths
from ftplan.memory.reserved import reserved
from ftplan.report import Interval
from ftplan.spec import Batch, Checkpointing, Hardware, Method, Model, Plan
from ftplan.spec import Lengths as Told

MIB = 2**20


@pytest.mark.parametrize(
    ("size", "held"),
    [(1, 2), (MIB, 2), (MIB + 512, 20), (10 * MIB - 512, 20), (10 * MIB, 10), (11 * MIB + 512, 12)],
)
def test_segments_have_the_sizes_of_pytorch(size: int, held: int) -> None:
    """2 MiB up to 1 MiB, 20 MiB below 10 MiB, and above in steps of 2 MiB."""
    allocator = Allocator()
    allocator.allocate(size)
    assert allocator.reserved_bytes == held * MIB


def test_a_freed_block_serves_what_fits_into_it() -> None:
    """The smallest that is enough is taken and its rest stays usable; segments are never joined."""
    allocator = Allocator()
    first, second = allocator.allocate(30 * MIB), allocator.allocate(40 * MIB)
    allocator.release(first)
    allocator.release(second)
    allocator.place([25 * MIB, 5 * MIB, 40 * MIB])
    assert allocator.reserved_bytes == 70 * MIB
    allocator.place([2 * MIB])
    assert allocator.reserved_bytes == 90 * MIB


def test_a_full_card_gets_back_whole_segments_only() -> None:
    """What is cached is given back before a request fails; a segment in use is not."""
    allocator = Allocator(capacity=100 * MIB)
    allocator.release(allocator.allocate(60 * MIB))
    allocator.place([80 * MIB])
    assert allocator.reserved_bytes == 80 * MIB
    assert allocator.peak_bytes == 80 * MIB
    pinned = Allocator(capacity=100 * MIB)
    block = pinned.allocate(60 * MIB)
    pinned.release(block)
    pinned.place([20 * MIB])
    with pytest.raises(OutOfSegmentsError):
        pinned.allocate(80 * MIB)


@given(st.lists(st.tuples(st.integers(1, 64 * MIB), st.integers(0, 40)), max_size=60))
def test_no_byte_is_lost(requests: list[tuple[int, int]]) -> None:
    """Never less is reserved than is in use; when all is freed every segment is whole again."""
    allocator = Allocator()
    alive: list[tuple[Block | int, int]] = []
    for wanted, index in requests:
        size = -(-wanted // 512) * 512
        alive.append((allocator.allocate(size), size))
        if index < len(alive):
            allocator.release(alive.pop(index)[0])
        assert allocator.reserved_bytes >= sum(size for _, size in alive)
    for block, _ in alive:
        allocator.release(block)
    full = Allocator(capacity=allocator.reserved_bytes)
    vars(full).update({**vars(allocator), "capacity": allocator.reserved_bytes})
    small = full._small_segments
    full._give_back()
    assert full.reserved_bytes == small


def plan(**changes: object) -> Plan:
    base = Plan(
        model=Model(name="qwen2.5-0.5b"),
        method=Method(kind="lora"),
        batch=Batch(micro=2, seq_len=512),
        gradient_checkpointing=Checkpointing(kind="full"),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["lora", "full", "qlora"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "gpt2", "gemma-3-1b", "qwen-1.8b"])
def test_a_step_tensor_by_tensor_has_the_walk_s_peak(
    model: str, checkpointing: Any, kind: Any
) -> None:
    """Unrolled in full, births and deaths add up to the peak that the segments have, and what is
    left at the end is what rests."""
    job = job_of(
        resolve(
            plan(
                model=Model(name=model),
                method=Method(kind=kind, targets=None if kind == "full" else "all-linear"),
                gradient_checkpointing=Checkpointing(kind=checkpointing),
            )
        )
    )
    program = Structure(job).program
    script = program.script(10**9)
    sizes = program.sizes_at(2, 512)
    level = peak = 0
    for event in script.events:
        size = sizes[script.slots[event if event >= 0 else ~event]]
        level += size if event >= 0 else -size
        peak = max(peak, level)
    assert (peak, level) == program.peak_and_rest(2, 512)
    assert level == sum(sizes[script.slots[slot]] for slot in script.left)


def test_cutting_layers_short_moves_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is reserved with the layers of a deep model cut short is within 2 % of all of them."""
    from ftplan.memory import reserved as module

    structure = Structure(job_of(resolve(plan(model=Model(name="llama-3.1-8b")))))
    short = reserved(structure, 2, 2048).expected
    monkeypatch.setattr(module, "EVENTS", 10**9)
    whole = reserved(structure, 2, 2048).expected
    assert short != whole
    assert abs(short / whole - 1) < 0.02


def test_batches_of_differing_lengths_hold_more() -> None:
    """One length: a second step finds the places of the first. Many: new longest ones add theirs,
    and never less than one length is held."""
    structure = Structure(job_of(resolve(plan())))
    one = reserved(structure, 2, 2048)
    many = reserved(structure, 2, 2048, lengths=Lengths())
    assert one.low == one.expected == one.high == many.low
    assert many.low < many.expected <= many.high


def test_a_card_caps_what_is_held() -> None:
    """The same job on a smaller card holds no more than the card has."""
    given = plan(batch=Batch(micro=8, seq_len=2048, lengths=Told()))
    free = estimate(given, with_remedies=False)
    small = estimate(replace(given, hardware=Hardware(gpu="a10g-24gb")), with_remedies=False)
    assert isinstance(free.reserved_bytes, Interval) and isinstance(small.device_bytes, Interval)
    assert small.gpu is not None
    if small.verdict == "fits":
        assert small.device_bytes.high <= small.gpu.usable_bytes
    assert small.device_bytes.expected < free.reserved_bytes.high


@given(
    st.floats(0, 1), st.floats(0, 1), st.integers(2, 32768), st.integers(1, 16),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_lengths_stay_between_the_shortest_and_the_longest(
    low: float, high: float, longest: int, micro: int, told: bool, cut: bool
) -> None:
    """A length is within bounds, grows with its share, and the last one is the longest."""
    lengths = Lengths(mean=900.0, deviation=700.0, cut=cut) if told else Lengths()
    low, high = sorted((low, high))
    assert 1 <= lengths.at(low, longest, micro) <= lengths.at(high, longest, micro) <= longest
    assert lengths.at(1.0, longest, micro) == longest or cut


@pytest.mark.parametrize(
    ("batch", "word"),
    [
        (Batch(packing=True, lengths=Told()), "packed"),
        (Batch(lengths=Told(mean=800.0)), "deviation"),
        (Batch(lengths=Told(mean=-1.0, deviation=2.0)), "above zero"),
    ],
)
def test_lengths_that_say_nothing_are_refused(batch: Batch, word: str) -> None:
    """Packed batches are full; a mean needs its deviation; lengths are above zero."""
    with pytest.raises(InputError, match=word):
        estimate(plan(batch=batch))
