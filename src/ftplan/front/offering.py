"""Which cards would do: the smallest single ones, the fewest of a kind, the cheapest for the data.

Part of the library's front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from ftplan.catalog.gpus import GpuRow, find_gpu, search_gpus
from ftplan.errors import FtplanError
from ftplan.fit.cards import enough, fewest, ranked
from ftplan.fit.ways import Way, ways_to_train
from ftplan.fitting import GpuOffer, GpuOption
from ftplan.front import api
from ftplan.front.searching import Search, sized
from ftplan.report import Interval
from ftplan.spec import Plan

__all__ = ["Offering", "cost_of"]

PRICED_COUNTS = (1, 2, 4, 8)
"""How many cards of a priced kind are tried: up to one machine."""


class Offering:
    """Cards for the plans of one question."""

    def __init__(self, search: Search, micro: int) -> None:
        self.search = search
        self.plan = search.plan
        self.micro = micro

    def ways(self, gpu: GpuRow | None, plan: Plan | None = None) -> list[Way]:
        """The ways of finetuning the plan's model on a card."""
        return list(
            ways_to_train(
                plan or self.plan,
                has_bf16=gpu is None or gpu.supports_bf16,
                is_cuda=gpu is None or gpu.vendor == "NVIDIA",
            )
        )

    def single(self, way: Way, *, most: int) -> tuple[GpuOption, ...]:
        """The smallest single cards that hold a way for certain."""
        # what a job needs depends on a card only through its compute capability
        sizes: dict[str | None, Interval | None] = {}

        def device(offer: GpuOffer) -> Interval | None:
            key = offer.compute_capability
            if key not in sizes:
                sizes[key] = self._need(way, offer.name, 1)
            return sizes[key]

        found = enough(
            way.name,
            device,
            ranked(_offers(self.search.prices_by_name)),
            headroom=self.plan.budget.headroom or 0.0,
            most=most,
        )
        return tuple(self._shown(option, way) for option in found)

    def fewest(self, way: Way, gpu: GpuRow) -> GpuOption | None:
        """The fewest cards of a kind that hold a way for certain, sharded over them."""
        found = fewest(
            way.name,
            lambda count: self._need(way, gpu.name, count),
            gpu=gpu.name,
            usable=int(gpu.usable_bytes * (1 - (self.plan.budget.headroom or 0.0))),
            price_per_hour=self.search.price_of(gpu),
        )
        return self._shown(found, way) if found is not None else None

    def cheapest(self, names: Sequence[str], *, most: int) -> tuple[GpuOption, ...]:
        """For each of these ways the cards on which a token costs least, of those with a price.

        A card comes once, as many of it as cost least.
        """
        found: dict[tuple[str, str], GpuOption] = {}
        for card, count in product(self.search.prices_by_name, PRICED_COUNTS):
            gpu = find_gpu(card)
            hardware = replace(self.plan.hardware, gpu=card, count=count, nodes=1, reserved=None)
            for way in self.ways(gpu, replace(self.plan, hardware=hardware)):
                option = self._priced(way, gpu, count) if way.name in names else None
                before = found.get((way.name, card))
                if option and (before is None or cost_of(option) < cost_of(before)):
                    found[way.name, card] = option
        ranked = sorted(found.values(), key=lambda o: (names.index(o.way), cost_of(o), o.gpu))
        return tuple(
            option for name in names for option in [o for o in ranked if o.way == name][:most]
        )

    def _priced(self, way: Way, gpu: GpuRow, count: int) -> GpuOption | None:
        found = self.search.fastest(way, gpu)
        price = self.search.price_of(gpu)
        if found is None or price is None:
            return None
        plan, time = found
        return GpuOption(
            gpu=gpu.name,
            count=count,
            way=way.name,
            verdict="fits",
            peak_bytes=plan.peak_bytes,
            usable_bytes=int(gpu.usable_bytes * (1 - (self.plan.budget.headroom or 0.0))),
            price_per_hour=price * count,
            fastest=plan,
            time=time,
        )

    def _shown(self, option: GpuOption, way: Way) -> GpuOption:
        """With what `check` shows on that very card, whose allocator may hold what it does not
        need."""
        plan = self._on(way, option.gpu, option.count)
        device = api.estimate(plan, base=self.search.base, with_remedies=False).device_bytes
        return option if device is None else replace(option, peak_bytes=device.expected)

    def _need(self, way: Way, gpu: str, count: int) -> Interval | None:
        """What a way needs of each of so many cards; None where it is no plan."""
        plan = self._on(way, gpu, count)
        optimizer = plan.optimizer.name if plan.optimizer is not None else ""
        if plan.sharding.kind == "fsdp" and "bnb" in optimizer:
            return None  # bitsandbytes' optimizers do not step FSDP2's sharded tensors
        try:
            return api.needed(plan, base=self.search.base)
        except FtplanError:
            return None
        except Exception:  # a fault of ours in a what-if must not hide the rest of the answer
            return None

    def _on(self, way: Way, gpu: str, count: int) -> Plan:
        """A way on so many cards; sharded where there are several."""
        hardware = replace(
            way.plan.hardware, gpu=gpu, count=min(count, 8), nodes=max(1, count // 8), reserved=None
        )
        sharding = way.plan.sharding
        kind = sharding.kind if sharding.kind in ("fsdp", "zero1", "zero2", "zero3") else "fsdp"
        kind = kind if count > 1 else None  # type: ignore[assignment]
        plan = replace(way.plan, hardware=hardware, sharding=replace(sharding, kind=kind))
        if plan.task == "serve":
            plan = replace(plan, sharding=replace(sharding, tp=count if count > 1 else None))
        return sized(plan, self.micro, self.search.seq_len)


def cost_of(option: GpuOption) -> float:
    """What a million tokens cost on these cards, expected; 0: there is no price."""
    each = option.time.cost_per_million_tokens if option.time is not None else None
    return each.expected if each is not None else 0.0


def _offers(prices: dict[str, float]) -> list[GpuOffer]:
    """Cards that can be rented or bought one by one; with prices by name, those that have one."""
    offers = []
    for row in search_gpus(""):
        if prices and row.name not in prices:
            continue
        desk = row.unified_memory or row.kind == "laptop"
        if not prices and (row.vendor != "NVIDIA" or desk or not row.supports_bf16):
            continue
        offers.append(
            GpuOffer(
                name=row.name,
                usable_bytes=row.usable_bytes,
                compute_capability=row.compute_capability,
                price_per_hour=prices.get(row.name),
            )
        )
    return offers
