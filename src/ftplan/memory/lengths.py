"""Lengths of the samples that batches are made of."""

from __future__ import annotations

import math

from ftplan.dataclass import dataclass

__all__ = ["Lengths"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lengths of samples, in tokens: any up to the longest, or a log-normal spread of them."""

    mean: float | None = None
    """None: every length up to the longest is as likely."""
    deviation: float = 0.0
    shortest: int = 1
    cut: bool = False
    """Longer samples are cut to the longest length; else they are left out."""

    def at(self, share: float, longest: int, micro: int) -> int:
        """The longest of ``micro`` samples, at ``share`` of the way through their order."""
        share = share ** (1 / micro)
        if self.mean is None:
            return max(self.shortest, min(longest, round(share * longest)))
        from statistics import NormalDist  # only where lengths are told

        spread = math.log(1 + (self.deviation / self.mean) ** 2) or 1e-9
        logs = NormalDist(math.log(self.mean) - spread / 2, math.sqrt(spread))
        low = logs.cdf(math.log(max(1, self.shortest)))
        high = 1.0 if self.cut else logs.cdf(math.log(longest))
        place = min(max(low + (high - low) * share, 1e-9), 1 - 1e-9)
        return max(self.shortest, min(longest, round(math.exp(logs.inv_cdf(place)))))
