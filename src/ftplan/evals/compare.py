"""Two runs over the same items: what got fixed, what broke, and whether it is more than luck.

Items are paired by what was asked, not by row number. Where an item was answered more than once
(epochs, repeats, several prompts in one file) its answers are averaged first: repeats of an item
are not independent, so the item stays the unit (Miller 2024, arXiv 2411.00640).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from statistics import NormalDist, mean

from ftplan.advise.statistics import Range, mcnemar_exact, paired_difference
from ftplan.errors import UnknownNameError
from ftplan.results import EvalRun, ItemChange, ResultRow, RunComparison

__all__ = ["compare_runs", "pick_variant"]

ALPHA = 0.05
_LEAST_DISCORDANT = 6
"""Fewer changed items cannot reach p < 0.05, even if all change in one direction."""


def pick_variant(run: EvalRun, name: str) -> EvalRun:
    """The rows of one prompt or model of a file that holds several."""
    matching = [each for each in run.variants if name in (each, each.strip())] or [
        each for each in run.variants if name.lower() in each.lower()
    ]
    if len(matching) != 1:
        raise UnknownNameError(
            "variant",
            name,
            suggestions=tuple(matching) or run.variants,
            remedy=f"{run.source} holds {', '.join(repr(each) for each in run.variants)}",
        )
    rows = tuple(row for row in run.rows if row.variant == matching[0])
    return replace(run, rows=rows, source=f"{run.source} {matching[0]}".strip())


def compare_runs(before: EvalRun, after: EvalRun) -> RunComparison:
    """Compare two runs item by item."""
    old, new = _by_item(before), _by_item(after)
    common = [item for item in old if item in new]
    changes, not_judged = [], []
    for item in common:
        change = _change(item, old[item], new[item])
        if change is None:
            not_judged.append(item)
        else:
            changes.append(change)
    fixed = tuple(each for each in changes if each.after > each.before)
    broke = tuple(each for each in changes if each.after < each.before)
    same = [each for each in changes if each.after == each.before]
    repeated = any(each.repeats_before > 1 or each.repeats_after > 1 for each in changes)
    difference = _difference(changes, len(broke), len(fixed), repeated=repeated)
    p_value = mcnemar_exact(len(broke), len(fixed)) if changes else None
    verdict = _verdict(p_value, len(fixed), len(broke))
    return RunComparison(
        before=before.source,
        after=after.source,
        verdict=verdict,
        sentence=_sentence(verdict, len(fixed), len(broke), len(changes), p_value),
        paired=len(changes),
        fixed=fixed,
        broke=broke,
        unchanged_pass=sum(each.after == 1 for each in same),
        unchanged_fail=sum(each.after < 1 for each in same),
        only_before=tuple(item for item in old if item not in new),
        only_after=tuple(item for item in new if item not in old),
        not_judged=tuple(not_judged),
        before_rate=mean(each.before for each in changes) if changes else None,
        after_rate=mean(each.after for each in changes) if changes else None,
        difference=difference.value if difference else None,
        low=difference.low if difference else None,
        high=difference.high if difference else None,
        p_value=p_value,
        repeated=repeated,
        notes=_notes(before, after, repeated=repeated, unpaired=len(changes) == 0),
    )


def _by_item(run: EvalRun) -> dict[str, list[ResultRow]]:
    """Rows of each item, in order. Whitespace around a question does not make it another one."""
    items: dict[str, list[ResultRow]] = {}
    for row in run.rows:
        items.setdefault(" ".join(row.item.split()), []).append(row)
    return items


def _change(
    item: str, before: Sequence[ResultRow], after: Sequence[ResultRow]
) -> ItemChange | None:
    old = [row for row in before if row.passed is not None]
    new = [row for row in after if row.passed is not None]
    if not old or not new:
        return None
    old_rate, new_rate = (mean(float(row.passed is True) for row in side) for side in (old, new))
    failing = next((row for row in (*new, *old) if row.passed is False), None)
    return ItemChange(
        item=item,
        before_id=old[0].id,
        after_id=new[0].id,
        before=old_rate,
        after=new_rate,
        repeats_before=len(old),
        repeats_after=len(new),
        input=new[0].input or old[0].input,
        before_output=old[0].output,
        after_output=new[0].output,
        reason=_reason(failing) if failing else "",
    )


def _reason(row: ResultRow) -> str:
    names = ", ".join(dict.fromkeys(check.name for check in row.failing_checks))
    return row.reason or names


def _difference(
    changes: Sequence[ItemChange], broke: int, fixed: int, *, repeated: bool
) -> Range | None:
    """The change of the pass rate with its 95 % interval."""
    if not changes:
        return None
    n = len(changes)
    deltas = [each.after - each.before for each in changes]
    centre = mean(deltas)
    z = NormalDist().inv_cdf(1 - ALPHA / 2)
    if len(set(deltas)) == 1:
        # no spread among the items seen is no certainty: half an item more in each cell of the
        # table (Agresti and Min, Statistics in Medicine 24, 2005)
        pull = centre * n / (n + 2)
        changed = abs(centre) * n + 1
        half = z * sqrt(max(0.0, changed - (centre * n) ** 2 / (n + 2))) / (n + 2)
    elif not repeated:
        return paired_difference(broke, fixed, n)
    else:
        pull = centre
        half = z * sqrt(sum((delta - centre) ** 2 for delta in deltas) / (n - 1) / n)
    low, high = max(-1.0, pull - half), min(1.0, pull + half)
    return Range(value=centre, low=min(centre, low), high=max(centre, high))


def _verdict(p_value: float | None, fixed: int, broke: int) -> str:
    if p_value is None:
        return "not comparable"
    if p_value < ALPHA:
        return "better" if fixed > broke else "worse"
    return "no significant change"


def _sentence(verdict: str, fixed: int, broke: int, paired: int, p_value: float | None) -> str:
    if p_value is None:
        return "Not comparable: no item was judged in both runs."
    counts = f"{fixed} fixed, {broke} broke of {paired} paired items"
    if verdict != "no significant change":
        return f"{verdict.capitalize()}: {counts}; luck alone would do that with p = {p_value:.3g}."
    changed = fixed + broke
    if changed == 0:
        return f"No change: none of {paired} paired items passes or fails differently."
    why = f"p = {p_value:.3g}"
    if changed < _LEAST_DISCORDANT:
        why += f"; fewer than {_LEAST_DISCORDANT} changed items can never be significant"
    return f"No significant change: {counts} ({why})."


def _notes(before: EvalRun, after: EvalRun, *, repeated: bool, unpaired: bool) -> tuple[str, ...]:
    notes: list[str] = []
    for label, run in (("before", before), ("after", after)):
        if len(run.variants) > 1:
            names = "; ".join(run.variants)
            notes.append(
                f"{label}: {run.source} holds {len(run.variants)} variants, averaged per item; "
                f"pick one with --{label}-variant ({names})"
            )
        if run.errors:
            notes.append(f"{label}: {len(run.errors)} rows without an answer are left out")
        notes += [f"{label}: {note}" for note in run.notes]
    if repeated:
        notes.append("items with several answers: their pass rates are compared, the item counts")
    if before.tool != after.tool:
        notes.append(f"different tools: {before.tool} and {after.tool}")
    if unpaired and before.rows and after.rows:
        notes.append("items are paired by what was asked (or by id): are these the same items?")
    return tuple(dict.fromkeys(notes))
