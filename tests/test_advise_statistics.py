"""Small-sample statistics against published and computed numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.advise import statistics as s
from ftplan.errors import InputError


@pytest.mark.parametrize(
    ("n", "thirty", "fifty", "seventy"),
    [
        (10, (0.11, 0.60), (0.24, 0.76), (0.40, 0.89)),
        (20, (0.15, 0.52), (0.30, 0.70), (0.48, 0.85)),
        (30, (0.17, 0.48), (0.33, 0.67), (0.52, 0.83)),
        (50, (0.19, 0.44), (0.37, 0.63), (0.56, 0.81)),
        (100, (0.22, 0.40), (0.40, 0.60), (0.60, 0.78)),
        (200, (0.24, 0.37), (0.43, 0.57), (0.63, 0.76)),
        (400, (0.26, 0.35), (0.45, 0.55), (0.65, 0.74)),
    ],
)
def test_wilson_table(
    n: int, thirty: tuple[float, float], fifty: tuple[float, float], seventy: tuple[float, float]
) -> None:
    """Wilson's interval of 30, 50 and 70 % at common sample sizes."""
    for share, (low, high) in ((0.3, thirty), (0.5, fifty), (0.7, seventy)):
        interval = s.wilson(round(share * n), n)
        assert (round(interval.low, 2), round(interval.high, 2)) == (low, high)


def test_wilson_agrees_with_statsmodels() -> None:
    """7 of 20: 0.18119 to 0.56715."""
    interval = s.wilson(7, 20)
    assert interval.low == pytest.approx(0.18119, abs=5e-6)
    assert interval.high == pytest.approx(0.56715, abs=5e-6)


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_wilson_holds_its_estimate(a: int, b: int) -> None:
    """The interval lies in 0 to 1 and holds the share."""
    interval = s.wilson(a, a + b)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


@pytest.mark.parametrize(("width", "labels"), [(0.15, 39), (0.10, 93), (0.075, 167), (0.05, 381)])
def test_labels_for_a_width(width: float, labels: int) -> None:
    """Labels for a worst-case interval of +- 15, 10, 7.5 and 5 points."""
    assert s.labels_for_half_width(width) == labels
    half = s.wilson(labels / 2, labels)
    assert (half.high - half.low) / 2 <= width


@pytest.mark.parametrize(("share", "labels"), [(0.65, 43), (0.75, 16)])
def test_labels_to_settle_a_majority(share: float, labels: int) -> None:
    """After that many labels Wilson's bound excludes one half, and not after fewer."""
    assert s.labels_to_settle_majority(share) == labels
    assert s.wilson(share * labels, labels).low > 0.5
    assert s.wilson(share * (labels - 1), labels - 1).low <= 0.5
    assert s.labels_to_settle_majority(0.5) is None


@pytest.mark.parametrize(("lead", "total"), [(15, 20), (21, 30), (32, 50), (60, 100), (114, 200)])
def test_leads_that_settle_two_classes(lead: int, total: int) -> None:
    """Of two classes, these leads are significant, and one failure less is not."""
    assert s.multinomial_difference(lead, total - lead, total).low > 0
    assert s.multinomial_difference(lead - 1, total - lead + 1, total).low <= 0


def test_labels_to_settle_a_lead() -> None:
    """At 60 to 40 about a hundred labels settle it; level classes are never settled."""
    needed = s.labels_to_settle_lead(0.6, 0.4)
    assert needed is not None and 90 <= needed <= 100
    assert s.labels_to_settle_lead(0.5, 0.5) is None


@pytest.mark.parametrize(
    ("broke", "discordant"),
    [(0, 6), (1, 9), (1, 10), (2, 12), (3, 15), (5, 20), (7, 25), (9, 30), (13, 40)],
)
def test_mcnemar_losses_allowed(broke: int, discordant: int) -> None:
    """With so many changed items at most so many may have broken, at 5 %."""
    assert s.mcnemar_exact(broke, discordant - broke) <= 0.05
    assert s.mcnemar_exact(broke + 1, discordant - broke - 1) > 0.05


def test_mcnemar_published() -> None:
    """2 broke, 10 fixed: p = 0.03857; nothing changed: 1; huge counts do not overflow."""
    assert s.mcnemar_exact(2, 10) == pytest.approx(0.03857, abs=5e-6)
    assert s.mcnemar_exact(0, 0) == 1.0
    assert s.mcnemar_exact(3_000, 4_000) < 1e-20


def test_newcombe_published() -> None:
    """Newcombe's 1998 example: 56/70 against 48/80 is 0.20, 0.0524 to 0.3339."""
    interval = s.newcombe(56, 70, 48, 80)
    assert interval.value == pytest.approx(0.20)
    assert interval.low == pytest.approx(0.0524, abs=5e-5)
    assert interval.high == pytest.approx(0.3339, abs=5e-5)


def test_paired_difference_has_the_sign_of_the_change() -> None:
    """Ten fixed and two broken of 100: eight points up, interval above zero."""
    change = s.paired_difference(2, 10, 100)
    assert change.value == pytest.approx(0.08)
    assert 0 < change.low < change.value < change.high


def test_good_turing() -> None:
    """Coverage is what is not seen once; saturation needs a quiet end as well."""
    seen = s.coverage(["a"] * 15 + ["b"] * 4 + ["c"])
    assert seen.coverage == pytest.approx(0.95)
    assert not seen.saturated
    assert s.coverage(["a", "b"] * 20 + ["a"] * 20).saturated
    assert s.coverage([]).coverage == 0.0


@pytest.mark.parametrize(("share", "items"), [(0.05, 59), (0.10, 29), (0.02, 149)])
def test_chance_of_seeing(share: float, items: int) -> None:
    """After so many items a kind of this share was seen with 95 %."""
    assert s.chance_of_seeing(share, items) >= 0.95
    assert s.chance_of_seeing(share, items - 1) < 0.95


def test_rule_of_three() -> None:
    """Nothing in 100: under 3 %."""
    assert s.rule_of_three(100) == pytest.approx(0.0295, abs=1e-4)
    assert s.rule_of_three(0) == 1.0


def test_agreement() -> None:
    """Textbook examples of kappa, AC1 on skewed labels, alpha with a missing rating."""
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert s.cohen_kappa(first, second) == pytest.approx(0.4)
    skewed = ["y"] * 118 + ["n"] * 7
    other = ["y"] * 118 + ["n"] * 2 + ["y"] * 5
    kappa, ac1 = s.cohen_kappa(skewed, other), s.gwet_ac1(skewed, other)
    assert kappa is not None and ac1 is not None and ac1 > kappa
    assert s.cohen_kappa(["y"], ["y"]) is None
    assert s.cohen_kappa([], []) is None


def test_krippendorff_published() -> None:
    """Krippendorff's example with four raters, twelve units and missing values: 0.743."""
    raters: dict[str, list[int | None]] = {
        "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        "C": [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    }
    units: list[dict[str, object]] = [
        {name: labels[i] for name, labels in raters.items() if labels[i] is not None}
        for i in range(12)
    ]
    assert s.krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert s.krippendorff_alpha([{"A": 1}]) is None


def test_pass_at_k() -> None:
    """The unbiased estimate: 1 right of 10, k = 1 and 5; never right: 0; too few wrong: 1."""
    assert s.pass_at_k(10, 1, 1) == pytest.approx(0.1)
    assert s.pass_at_k(10, 1, 5) == pytest.approx(0.5)
    assert s.pass_at_k(10, 0, 5) == 0.0
    assert s.pass_at_k(10, 6, 5) == 1.0


def test_judge_corrected_rate() -> None:
    """Rogan and Gladen's correction; a judge near a coin is refused with what to do."""
    corrected = s.judge_corrected_rate(0.7, true_positive_rate=0.9, true_negative_rate=0.8)
    assert corrected == pytest.approx(0.5 / 0.7)
    with pytest.raises(InputError, match="too weak"):
        s.judge_corrected_rate(0.7, true_positive_rate=0.6, true_negative_rate=0.6)


def test_holm() -> None:
    """Step-down adjustment, monotone, in the order given."""
    adjusted = s.holm([0.01, 0.04, 0.03])
    assert adjusted == pytest.approx((0.03, 0.06, 0.06))
    assert s.holm([]) == ()


def test_break_even() -> None:
    """Monthly cost over the saving per call; a call that saves nothing never pays."""
    assert s.break_even_calls(2_000, 0.01) == pytest.approx(200_000)
    assert s.break_even_calls(2_000, 0.0) is None
    assert math.isfinite(s.break_even_calls(1.0, 1e-9) or 0)
