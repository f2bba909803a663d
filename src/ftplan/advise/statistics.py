"""Statistics for small samples, from the standard library alone.

Every function takes plain counts and returns fractions of one. Intervals are two-sided at 95 %
unless ``confidence`` says otherwise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist

from ftplan.dataclass import dataclass
from ftplan.errors import InputError

__all__ = [
    "Coverage",
    "Range",
    "break_even_calls",
    "chance_of_seeing",
    "cohen_kappa",
    "coverage",
    "gwet_ac1",
    "holm",
    "judge_corrected_rate",
    "krippendorff_alpha",
    "labels_for_half_width",
    "labels_to_settle_lead",
    "labels_to_settle_majority",
    "mcnemar_exact",
    "multinomial_difference",
    "newcombe",
    "paired_difference",
    "pass_at_k",
    "rule_of_three",
    "wilson",
]

LEAST_JUDGE_SKILL = 1.2
"""True positive rate + true negative rate: a coin has 1.0, and the correction divides by the
excess over it, so that near 1 it multiplies the noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def _z(confidence: float) -> float:
    assert 0 < confidence < 1
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _clip(x: float, low: float = 0.0, high: float = 1.0) -> float:
    return min(high, max(low, x))


def wilson(successes: float, trials: float, *, confidence: float = 0.95) -> Range:
    """Wilson's score interval of a share; with no trials the whole of 0 to 1.

    Source: E. B. Wilson, JASA 22 (1927); recommended for small n by Brown, Cai, DasGupta (2001).
    """
    assert 0 <= successes <= trials
    if trials == 0:
        return Range(value=0.5, low=0.0, high=1.0)
    z2 = _z(confidence) ** 2
    p = successes / trials
    scale = 1 + z2 / trials
    centre = (p + z2 / (2 * trials)) / scale
    half = math.sqrt(z2) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2)) / scale
    # rounding must not push an end past the estimate itself
    return Range(value=p, low=min(p, _clip(centre - half)), high=max(p, _clip(centre + half)))


def newcombe(
    successes_a: int, trials_a: int, successes_b: int, trials_b: int, *, confidence: float = 0.95
) -> Range:
    """Interval of the difference a - b of two shares measured on different items.

    Source: R. G. Newcombe, Statistics in Medicine 17 (1998), the hybrid score method.
    """
    a = wilson(successes_a, trials_a, confidence=confidence)
    b = wilson(successes_b, trials_b, confidence=confidence)
    difference = a.value - b.value
    return Range(
        value=difference,
        low=_clip(difference - math.hypot(a.value - a.low, b.high - b.value), -1.0),
        high=_clip(difference + math.hypot(a.high - a.value, b.value - b.low), -1.0),
    )


def multinomial_difference(a: int, b: int, total: int, *, confidence: float = 0.95) -> Range:
    """Interval of the difference of two shares of the *same* ``total`` failures.

    The two shares are not independent: more of one leaves less for the other.
    """
    assert min(a, b) >= 0 and a + b <= total
    if total == 0:
        return Range(value=0.0, low=-1.0, high=1.0)
    difference = (a - b) / total
    error = math.sqrt(max(0.0, a + b - (a - b) ** 2 / total)) / total
    half = _z(confidence) * error
    return Range(
        value=difference,
        low=_clip(difference - half, -1.0),
        high=_clip(difference + half, -1.0),
    )


def mcnemar_exact(broke: int, fixed: int) -> float:
    """Two-sided exact p of ``broke`` against ``fixed`` items, before and after on the same items.

    Items that did not change say nothing about the direction and do not enter.
    Source: Q. McNemar, Psychometrika 12 (1947), with the binomial in place of chi-squared.
    """
    assert broke >= 0 and fixed >= 0
    discordant = broke + fixed
    if discordant == 0:
        return 1.0
    ways = tail = 1
    for i in range(min(broke, fixed)):
        ways = ways * (discordant - i) // (i + 1)
        tail += ways
    # integers first: 2**n overflows a float for n > 1023
    return min(1.0, float(2 * tail / 2**discordant))


def paired_difference(broke: int, fixed: int, items: int, *, confidence: float = 0.95) -> Range:
    """Interval of the change in accuracy (after - before), both measured on the same ``items``."""
    return multinomial_difference(fixed, broke, items, confidence=confidence)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """p values adjusted for having tried them all (Holm's step-down), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of what can go wrong has been seen."""

    coverage: float
    """Good-Turing: the chance that the next failure is of a kind seen before."""
    kinds: int
    failures: int
    saturated: bool
    """Coverage of 0.95 or more, and the last 20 failures brought no new kind."""


def coverage(kinds_in_order: Sequence[Hashable], *, quiet: int = 20) -> Coverage:
    """Good-Turing coverage of labels in the order in which they were given.

    Source: I. J. Good, Biometrika 40 (1953): the unseen has the weight of what was seen once.
    """
    total = len(kinds_in_order)
    counts = Counter(kinds_in_order)
    once = sum(1 for n in counts.values() if n == 1)
    share = 1 - once / total if total else 0.0
    earlier = set(kinds_in_order[: max(0, total - quiet)])
    nothing_new = total > quiet and set(kinds_in_order[-quiet:]) <= earlier
    return Coverage(
        coverage=share,
        kinds=len(counts),
        failures=total,
        saturated=share >= 0.95 and nothing_new,
    )


def chance_of_seeing(share: float, items: int) -> float:
    """The chance that a kind of this true share shows at least once among ``items``."""
    return 1 - (1 - _clip(share)) ** items


def rule_of_three(items: int, *, confidence: float = 0.95) -> float:
    """Upper bound of a share of which nothing was seen in ``items`` (about 3 / items), exact."""
    return 1.0 if items <= 0 else 1 - (1 - confidence) ** (1 / items)


def labels_for_half_width(half_width: float, *, confidence: float = 0.95) -> int:
    """Labels after which a share's Wilson interval is no wider than +- ``half_width``, at worst.

    At a share of one half the Wilson half-width is z / (2 sqrt(n + z^2)), solved here for n.
    """
    assert half_width > 0
    z2 = _z(confidence) ** 2
    return max(1, math.ceil(z2 / (4 * half_width**2) - z2 - 1e-9))


SEARCH_LIMIT = 1_000_000
"""A share closer to the bar than this many labels could tell is a tie: ``None``."""


def labels_to_settle_majority(
    share: float, *, bar: float = 0.5, confidence: float = 0.95
) -> int | None:
    """Labels after which a share that stays what it is now is surely above (or below) ``bar``.

    None when it lies so close to the bar that no practical number would settle it.
    """
    gap = abs(_clip(share) - bar)
    if gap == 0:
        return None
    # the Wilson interval excludes the bar exactly when |p - bar| > z sqrt(bar (1 - bar) / n)
    needed = math.ceil(_z(confidence) ** 2 * bar * (1 - bar) / gap**2 + 1e-9)
    return needed if needed <= SEARCH_LIMIT else None


def labels_to_settle_lead(
    share_a: float, share_b: float, *, confidence: float = 0.95
) -> int | None:
    """Labels after which the lead of one class over the other, if it stays, is significant."""
    difference = abs(share_a - share_b)
    if difference == 0:
        return None
    spread = share_a + share_b - difference**2
    needed = math.ceil(_z(confidence) ** 2 * spread / difference**2 + 1e-9)
    return max(1, needed) if needed <= SEARCH_LIMIT else None


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement of two raters on the same items beyond chance; None where chance is everything.

    Source: J. Cohen, Educational and Psychological Measurement 20 (1960).
    """
    assert len(first) == len(second)
    n = len(first)
    if n == 0:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    one, two = Counter(first), Counter(second)
    expected = sum(one[k] * two[k] for k in one) / n**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def gwet_ac1(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement of two raters that does not collapse when one label is rare.

    Source: K. L. Gwet, British J. of Mathematical and Statistical Psychology 61 (2008).
    """
    assert len(first) == len(second)
    n = len(first)
    labels = set(first) | set(second)
    if n == 0:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    if len(labels) == 1:
        return 1.0
    both = Counter(first) + Counter(second)
    mean = [both[k] / (2 * n) for k in labels]
    expected = sum(p * (1 - p) for p in mean) / (len(labels) - 1)
    return (observed - expected) / (1 - expected)


def krippendorff_alpha(ratings: Sequence[Mapping[str, Hashable]]) -> float | None:
    """Agreement of any number of raters on nominal labels; ratings may be missing.

    ``ratings``: one mapping of rater to label for each item. Items with fewer than two ratings
    say nothing. None when no item has two, or when only one label was ever used.
    Source: K. Krippendorff, Content Analysis (2004), coincidence matrix.
    """
    same = pairs = 0.0
    totals: Counter[Hashable] = Counter()
    for item in ratings:
        counts = Counter(item.values())
        m = sum(counts.values())
        if m < 2:
            continue
        same += sum(c * (c - 1) for c in counts.values()) / (m - 1)
        pairs += m
        totals.update(counts)
    if pairs < 2:
        return None
    by_chance = sum(c * (c - 1) for c in totals.values()) / (pairs - 1)
    expected = pairs - by_chance
    return None if expected == 0 else 1 - (pairs - same) / expected


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased chance that at least one of ``k`` tries is right, from ``samples`` tries.

    Source: Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    assert 0 <= correct <= samples and 1 <= k <= samples
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def judge_corrected_rate(
    observed: float, *, true_positive_rate: float, true_negative_rate: float
) -> float:
    """The share that is really good, from the share that an imperfect judge calls good.

    Refused (:class:`InputError`) for a judge that is hardly better than a coin.
    Source: Rogan and Gladen, American Journal of Epidemiology 107 (1978).
    """
    skill = true_positive_rate + true_negative_rate
    if skill <= LEAST_JUDGE_SKILL:
        raise InputError(
            f"the judge is too weak to correct for: its true positive and true negative rates "
            f"add up to {skill:.2f}, and {LEAST_JUDGE_SKILL} is the least that means something",
            remedy="validate and improve the judge on 100 or more human labels first",
        )
    return _clip((observed + true_negative_rate - 1) / (skill - 1))


def break_even_calls(monthly_cost: float, saving_per_call: float) -> float | None:
    """Calls a month from which tuning for cost pays; None when a call saves nothing."""
    return None if saving_per_call <= 0 else monthly_cost / saving_per_call
