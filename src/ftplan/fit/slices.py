"""What ``nvidia-smi`` says of the cards here, and slices of a card (MIG)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ftplan.dataclass import dataclass
from ftplan.errors import InputError
from ftplan.units import MIB

__all__ = [
    "QUERY", "Found", "FoundCard", "FoundSlice", "Slice", "choose", "parse_query", "parse_slice",
    "parse_slices", "slice_of", "visible_to",
]  # fmt: skip

QUERY = ("index", "uuid", "name", "memory.total", "memory.free")
"""What is asked of each card: ``nvidia-smi --query-gpu=... --format=csv``."""
MEMORY_PARTS = 8
"""A card's memory is cut into eight parts, whatever the number of its compute slices."""
OWN_SHARE = 0.99
"""Of a slice's memory what a program gets: 39.25 GiB of half an A100 80GB and 9.75 of an eighth of
an H100, where whole cards have 79.25 and 79.1 (as PyTorch and nvidia-smi mig -lgip print them)."""
NEARLY = 0.9
"""A card with this share of the freest one's free memory counts as free."""
_PROFILE = re.compile(r"(\d)g\.(\d+)gb(?:\+\S*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCard:
    """One line of the query."""

    index: str
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int | None
    """None: nvidia-smi does not say (a card that is sliced, or whose memory it may not see)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSlice:
    """One line of ``nvidia-smi -L`` below a card's."""

    card: str
    """Index of the card that it is cut from."""
    profile: str
    uuid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The hardware that a job here would use."""

    name: str
    """Product name of the card."""
    count: int
    """Cards alike that are free, or slices alike."""
    total_bytes: int
    free_bytes: int | None
    """On the fullest of them."""
    profile: str | None
    """The slice that is used; None: whole cards."""
    others: tuple[str, ...]
    """What is here and not used, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A part of a card."""

    usable_bytes: int
    compute_share: float


# --- Reading ------------------------------------------------------------------------------------


def parse_query(text: str) -> list[FoundCard]:
    """Cards of the query's CSV, with or without its heading and units (MiB)."""
    found: list[FoundCard] = []
    columns = list(QUERY)
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if "name" in cells:
            columns = [cell.partition(" ")[0] for cell in cells]
            continue
        row = dict(zip(columns, cells, strict=False))
        total, free = (_mib(row.get(f"memory.{what}", "")) for what in ("total", "free"))
        if total is None or not row.get("name"):
            continue
        found.append(
            FoundCard(
                index=row.get("index", str(len(found))),
                uuid=row.get("uuid", ""),
                name=row["name"],
                total_bytes=total,
                free_bytes=free,
            )
        )
    return found


def _mib(text: str) -> int | None:
    match = re.fullmatch(r"(\d+)(?:\s*MiB)?", text)
    return int(match[1]) * MIB if match is not None else None


def parse_slices(text: str) -> list[FoundSlice]:
    """MIG devices of ``nvidia-smi -L``: ``MIG 3g.40gb  Device 0: (UUID: MIG-...)``."""
    found: list[FoundSlice] = []
    card = "0"
    for line in text.splitlines():
        if match := re.match(r"GPU (\d+):", line):
            card = match[1]
        elif match := re.match(r"\s*MIG (\d+g\.\d+gb\S*)\s+Device\s+\d+:(.*)", line):
            uuid = re.search(r"UUID:\s*([^)\s]+)", match[2])
            found.append(
                FoundSlice(card=card, profile=match[1], uuid=uuid[1] if uuid is not None else "")
            )
    return found


def visible_to(
    devices: str | None, cards: Sequence[FoundCard], slices: Sequence[FoundSlice]
) -> tuple[list[FoundCard], list[FoundSlice]]:
    """What ``CUDA_VISIBLE_DEVICES`` leaves of them: indices or (the beginnings of) UUIDs.

    None: it is not set. What stands behind an entry that names nothing is not seen, as in CUDA.
    """
    if devices is None:
        return list(cards), list(slices)
    left: list[FoundCard] = []
    parts: list[FoundSlice] = []
    for name in filter(None, (entry.strip() for entry in devices.split(","))):
        card = next((c for c in cards if name in (c.index, c.uuid) or _begins(c.uuid, name)), None)
        part = next((s for s in slices if _begins(s.uuid, name)), None)
        if card is None and part is None:
            break
        left += [card] if card is not None else []
        parts += (
            [part] if part is not None else [s for s in slices if card and s.card == card.index]
        )
    wanted = {part.card for part in parts}
    left += [card for card in cards if card.index in wanted and card not in left]
    return left, parts


def _begins(uuid: str, name: str) -> bool:
    return name.startswith(("GPU-", "MIG-")) and uuid.startswith(name)


# --- Choosing -----------------------------------------------------------------------------------


def choose(cards: Sequence[FoundCard], slices: Sequence[FoundSlice]) -> Found | None:
    """What to use of them: the largest slices, else the kind of card with most free memory.

    None: there is no card. Of cards alike those are used that are about as free as the freest.
    """
    if not cards:
        return None
    if slices:
        return _sliced(cards, slices)
    best = max(cards, key=lambda card: (_free(card), card.total_bytes))
    alike = [card for card in cards if card.name == best.name]
    used = [card for card in alike if _free(card) >= NEARLY * _free(best)]
    others = [card.name for card in cards if card.name != best.name]
    others += [f"{card.name} {card.index}, taken" for card in alike if card not in used]
    known = [card.free_bytes for card in used if card.free_bytes is not None]
    return Found(
        name=best.name,
        count=len(used),
        total_bytes=best.total_bytes,
        free_bytes=min(known, default=None),
        profile=None,
        others=tuple(others),
    )


def _sliced(cards: Sequence[FoundCard], slices: Sequence[FoundSlice]) -> Found:
    best = max(slices, key=_size)
    alike = [part for part in slices if part.profile == best.profile]
    card = next((card for card in cards if card.index == best.card), cards[0])
    return Found(
        name=card.name,
        count=1,  # NCCL does not join slices
        total_bytes=card.total_bytes,
        free_bytes=None,
        profile=best.profile,
        others=tuple(
            [part.profile for part in slices if part.profile != best.profile]
            + [best.profile] * (len(alike) - 1)
        ),
    )


def _free(card: FoundCard) -> int:
    return card.total_bytes if card.free_bytes is None else card.free_bytes


def _size(part: FoundSlice) -> tuple[int, int]:
    match = _PROFILE.fullmatch(part.profile)
    return (int(match[2]), int(match[1])) if match is not None else (0, 0)


# --- Slices -------------------------------------------------------------------------------------


def parse_slice(text: str) -> tuple[str, str | None]:
    """``a100-80gb:3g.40gb`` as card and profile; a plain name has no profile."""
    name, sign, profile = text.partition(":")
    return (name, profile) if sign else (text, None)


def slice_of(
    profile: str, *, name: str, usable_bytes: int, label_gb: int, compute_slices: int | None
) -> Slice:
    """What a profile leaves of a card. Raises InputError for what is no profile of it."""
    if compute_slices is None:
        raise InputError(
            f"{name} is not cut into slices (MIG)", remedy=f"ask for the whole card: --gpu {name}"
        )
    match = _PROFILE.fullmatch(profile)
    parts = round(int(match[2]) * MEMORY_PARTS / label_gb) if match is not None else 0
    compute = int(match[1]) if match is not None else 0
    if not (0 < parts <= MEMORY_PARTS and 0 < compute <= compute_slices):
        half = "3g" if compute_slices > 4 else "2g"
        raise InputError(
            f"{profile!r} is no MIG profile of {name}",
            remedy=f"write it like {half}.{label_gb // 2}gb, as nvidia-smi mig -lgip lists them",
        )
    share = OWN_SHARE if parts < MEMORY_PARTS else 1.0
    return Slice(
        usable_bytes=int(usable_bytes * parts / MEMORY_PARTS * share),
        compute_share=compute / compute_slices,
    )
