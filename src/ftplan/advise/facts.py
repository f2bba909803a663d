"""What the failures file says, as facts that rules can ask for.

A fact is a :class:`~ftplan.advise.truth.Truth`. Implications of the state are made here and
nowhere else: examples in the prompt imply prompting, an accuracy implies an evaluation, a
finetuned model implies both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from math import fsum
from typing import Any

from ftplan.advise.statistics import Range, multinomial_difference, wilson
from ftplan.advise.taxonomy import Kind, kind_of, suggest_kind
from ftplan.advise.truth import FALSE, TRUE, Truth, all_of, any_of, unknown
from ftplan.dataclass import dataclass
from ftplan.failures import Failure, FailureClass, FailuresFile, State

__all__ = ["BASELINE", "SHARED_FIX", "Facts", "Row"]

BASELINE = 20
"""Examples with ground truth, and labelled failures, below which nothing is a baseline (F2)."""
SHARED_FIX = 0.7
"""Share of failures that a larger model must fix to be called the cure (K5)."""
CLASSES: tuple[FailureClass, ...] = (
    "evaluation",
    "information",
    "behavior",
    "capability",
    "operational",
)
QUALITY: tuple[FailureClass, ...] = ("information", "behavior", "capability")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the file with what is known about it."""

    failure: Failure
    name: str | None
    """The kind as written or suggested."""
    kind: Kind | None
    given: FailureClass | None
    """The class the row counts under before any test spoke: as written, else the kind's."""
    suggested: bool
    weight: float | None
    """Share among the failures that count, 0 to 1; None: unknown."""


class Facts:
    """Everything the rules may ask about one file. Built once, never changed."""

    def __init__(self, file: FailuresFile) -> None:
        self.file = file
        self.state: State = file.state
        self.rows, self.excluded = self._rows(file.failures)
        self._classified: dict[tuple[int, FailureClass], Truth] = {}
        self._present: dict[tuple[FailureClass, ...], Truth] = {}

    # --- rows ---------------------------------------------------------------------------------

    @staticmethod
    def _rows(failures: Iterable[Failure]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
        labelled = [(f, f.kind or suggest_kind(f)) for f in failures if f.count != 0]
        kinds = [kind_of(name, f.class_) for f, name in labelled]
        excluded = [k is not None and k.name == "infrastructure_error" for k in kinds]
        weights = _weights([f for (f, _), out in zip(labelled, excluded, strict=True) if not out])
        kept: list[Row] = []
        dropped: list[Row] = []
        remaining = iter(weights)
        for (failure, name), kind, out in zip(labelled, kinds, excluded, strict=True):
            row = Row(
                failure=failure,
                name=name,
                kind=kind,
                given=failure.class_ or (kind.classes[0] if kind is not None else None),
                suggested=bool(failure.suggested) or failure.kind is None,
                weight=None if out else next(remaining),
            )
            (dropped if out else kept).append(row)
        return tuple(kept), tuple(dropped)

    @cached_property
    def counted(self) -> int | None:
        """Failures of the system (not of the harness), or None when rows lack counts."""
        return _total(self.rows)

    @cached_property
    def labelled(self) -> int | None:
        """Those of them that carry a class, or None when rows lack counts."""
        return None if self.counted is None else _total([r for r in self.rows if r.given])

    @cached_property
    def at_least_labelled(self) -> int:
        """Labelled failures that were surely supplied: a row without a count is one."""
        return sum(
            1 if r.failure.count is None else r.failure.count
            for r in self.rows
            if r.name is not None and not r.suggested
        )

    @cached_property
    def infrastructure_share(self) -> float | None:
        """Share of all rows that are the harness's own errors; None when unknown."""
        if not self.excluded:
            return 0.0
        if not self.rows:
            return 1.0
        weights = _weights([r.failure for r in (*self.excluded, *self.rows)])
        mine = weights[: len(self.excluded)]
        return None if any(w is None for w in mine) else fsum(w for w in mine if w is not None)

    # --- the state ----------------------------------------------------------------------------

    def _known(self, key: str) -> Any:
        return getattr(self.state, key)

    def yes(self, key: str) -> Truth:
        """The key is known to be true."""
        value = self._known(key)
        return unknown(key) if value is None else Truth(bool(value))

    def no(self, key: str) -> Truth:
        """The key is known to be false."""
        return ~self.yes(key)

    def at_least(self, key: str, least: float) -> Truth:
        """A number of the state is ``least`` or more."""
        value = self._known(key)
        return unknown(key) if value is None else Truth(value >= least)

    def below(self, key: str, bar: float) -> Truth:
        """A number of the state is less than ``bar``."""
        return ~self.at_least(key, bar)

    def among(self, key: str, *values: str) -> Truth:
        """The key has one of these values."""
        value = self._known(key)
        return unknown(key) if value is None else Truth(value in values)

    def known_true(self, *keys: str) -> Truth:
        """Some key is known to be true; what is unknown counts as not known.

        Only for facts that make a rule *not* hold: never where unknown must stay unknown.
        """
        return Truth(any(self._known(key) is True for key in keys))

    # --- implications ---------------------------------------------------------------------------

    @cached_property
    def examples_in_prompt(self) -> Truth:
        """The prompt holds examples, or held some when their effect was measured."""
        state = self.state
        if state.few_shot_helps is not None:
            return TRUE
        if state.few_shot_examples is not None:
            return Truth(state.few_shot_examples > 0)
        return unknown("few_shot_examples")

    @cached_property
    def evaluation(self) -> Truth:
        """There is an evaluation: as said, or as implied by what only an evaluation yields."""
        state = self.state
        if state.eval_pipeline is not None:
            return Truth(state.eval_pipeline)
        implied = (
            state.accuracy is not None
            or state.finetuned is True
            or state.sft_gain is not None
            or (state.eval_examples or 0) >= BASELINE
            or self.assumed_evaluation
        )
        return TRUE if implied else unknown("eval_pipeline")

    @property
    def evaluated_for_sure(self) -> bool:
        """An evaluation is there, and not merely implied by a model having been tuned."""
        state = self.state
        return bool(self.evaluation) and (
            state.eval_pipeline is True
            or state.accuracy is not None
            or (state.eval_examples or 0) >= BASELINE
        )

    @cached_property
    def assumed_evaluation(self) -> bool:
        """Nothing is said of an evaluation, but this many failures were labelled from one."""
        return self.state.eval_pipeline is None and self.at_least_labelled >= BASELINE

    @cached_property
    def prompting(self) -> Truth:
        """The prompt was worked on: 5 versions measured, or, where their number is not known, what
        only comes after that."""
        state = self.state
        if state.prompt_iterations is not None:
            return self.at_least("prompt_iterations", 5)
        implied = state.prompt_optimizer_tried or self.examples_in_prompt or state.finetuned
        return TRUE if implied else unknown("prompt_iterations")

    @cached_property
    def shots(self) -> Truth:
        """Five or more representative examples were tried, or are beside the point."""
        state = self.state
        if state.finetuned is True:
            return TRUE  # the examples are in the weights
        if state.few_shot_examples is not None:
            return Truth(state.few_shot_examples >= 5)
        return TRUE if state.few_shot_helps is not None else unknown("few_shot_examples")

    # --- oracle test and classes ----------------------------------------------------------------

    @cached_property
    def oracle(self) -> Range | None:
        """Share of factual failures that the gold passage fixes; the interval is wide open when
        it is not known on how many it was tried."""
        state = self.state
        stated = state.oracle_context_fixes
        if stated is not None and state.oracle_context_tested:
            tested = state.oracle_context_tested
            return wilson(min(tested, round(float(stated) * tested)), tested)
        results = [
            r.failure.tests["oracle_context"]
            for r in self.rows
            if r.failure.tests and "oracle_context" in r.failure.tests
        ]
        if results:
            return wilson(results.count("pass"), len(results))
        return None if stated is None else Range(value=float(stated), low=0.0, high=1.0)

    @property
    def _oracle_needs(self) -> tuple[str, ...]:
        if self.state.oracle_context_fixes is not None and not self.state.oracle_context_tested:
            return ("oracle_context_tested",)
        return ("oracle_context_fixes",)

    @cached_property
    def oracle_fixes(self) -> Truth:
        """The gold passage fixes a majority of the factual failures (K1)."""
        return self._oracle_says(above=True)

    @cached_property
    def oracle_does_not_fix(self) -> Truth:
        """The gold passage fixes only a minority (K2), or is in the prompt already."""
        return self._oracle_says(above=False)

    def _oracle_says(self, *, above: bool) -> Truth:
        if self.state.gold_context_in_prompt is True:
            return Truth(not above)
        oracle = self.oracle
        if oracle is None or (oracle.low, oracle.high) == (0.0, 1.0):
            return unknown(*self._oracle_needs)
        if oracle.low > 0.5:
            return Truth(above)
        if oracle.high < 0.5:
            return Truth(not above)
        return FALSE

    @cached_property
    def oracle_straddles(self) -> Truth:
        """The gold passage fixes some and not others: the interval holds one half (K3)."""
        return ~self.oracle_fixes & ~self.oracle_does_not_fix

    def row_is(self, row: Row, wanted: FailureClass) -> Truth:
        """Does the row belong to the class, by its label and by the tests' evidence?"""
        key = (id(row), wanted)
        if key not in self._classified:
            self._classified[key] = self._classify(row, wanted)
        return self._classified[key]

    @cached_property
    def _some_unlabelled(self) -> bool:
        return any(row.given is None for row in self.rows)

    def _classify(self, row: Row, wanted: FailureClass) -> Truth:
        tests = row.failure.tests or {}
        if tests.get("label_audit") == "fail":
            return Truth(wanted == "evaluation")
        if row.given is None:
            return unknown("failures.kind")
        on_item = tests.get("oracle_context")
        if row.kind is not None and row.kind.name == "wrong_code" and on_item == "pass":
            return Truth(wanted == "information")
        overruled = row.failure.class_ not in (None, "information")
        if row.kind is None or not row.kind.factual or overruled:
            return Truth(row.given == wanted)
        fixed = Truth(on_item == "pass") if on_item else self.oracle_fixes
        not_fixed = Truth(on_item == "fail") if on_item else self.oracle_does_not_fix
        if wanted == "information":
            if not_fixed:
                return FALSE
            # untested, the label is taken at its word; not where it names two classes, nor
            # next to rows without any, for then a test that refutes it would leave the question
            # open, and not having tested would settle it
            ambiguous = len(row.kind.classes) > 1 and row.failure.class_ is None
            doubtful = ambiguous or self._some_unlabelled
            return unknown(*self._oracle_needs) if doubtful and fixed.value is None else TRUE
        if wanted == "behavior":
            if fixed:
                return FALSE
            # the test ran: fixed it is not; straddling, it is on some of the items
            return TRUE if fixed.value is False else unknown(*self._oracle_needs)
        return FALSE

    def resolve(self, row: Row) -> FailureClass | None:
        """The class a row is treated as when one has to be picked: the likelier one."""
        for wanted in CLASSES:
            if self.row_is(row, wanted):
                if wanted == "information" and self._leans_to_behavior(row):
                    return "behavior"
                return wanted
        return "behavior" if self._leans_to_behavior(row) else row.given

    def _leans_to_behavior(self, row: Row) -> bool:
        """An oracle test of unknown size that mostly failed is a hint, though no evidence."""
        if row.kind is None or not row.kind.factual or row.given != "information":
            return False
        if (row.failure.tests or {}).get("oracle_context"):
            return False
        return self.oracle is not None and self.oracle.value < 0.5

    def has(self, *classes: FailureClass) -> Truth:
        """Some failure is of one of these classes."""
        if classes not in self._present:
            self._present[classes] = any_of(
                self.row_is(row, wanted) for row in self.rows for wanted in classes
            )
        return self._present[classes]

    def has_kind(self, *names: str) -> Truth:
        """Some failure is of one of these kinds."""
        return any_of(
            unknown("failures.kind")
            if row.name is None and row.given is None
            else Truth(row.kind is not None and row.kind.name in names)
            for row in self.rows
        )

    def only_kinds(self, *names: str) -> Truth:
        """There are failures and all of them are of these kinds."""
        if not self.rows:
            return FALSE
        return all_of(
            unknown("failures.kind")
            if row.name is None and row.given is None
            else Truth(row.kind is not None and row.kind.name in names)
            for row in self.rows
        )

    def only(self, *classes: FailureClass) -> Truth:
        """There are failures and all of them are of these classes."""
        if not self.rows:
            return FALSE
        return all_of(any_of(self.row_is(row, c) for c in classes) for row in self.rows)

    # --- shares -----------------------------------------------------------------------------------

    @cached_property
    def class_weights(self) -> dict[FailureClass | None, float] | None:
        """Share of each resolved class, or None when some row's share is unknown."""
        parts: dict[FailureClass | None, list[float]] = defaultdict(list)
        for row in self.rows:
            if row.weight is None:
                return None
            parts[self.resolve(row)].append(row.weight)
        return {mine: fsum(weights) for mine, weights in parts.items()}

    def share_at_least(self, least: float, *classes: FailureClass) -> Truth:
        """These classes are ``least`` or more of the failures that count."""
        inside = [any_of(self.row_is(row, c) for c in classes) for row in self.rows]
        if not self.rows or not any(t.value is not False for t in inside):
            return FALSE
        if all(inside):
            return TRUE
        needs: set[str] = set().union(*(t.needs for t in inside))
        weights = [row.weight for row in self.rows if row.weight is not None]
        if len(weights) < len(self.rows):
            return unknown("failures.count", *needs)
        pairs = list(zip(inside, weights, strict=True))
        # fsum: the same total whatever the order of the rows
        high = fsum(weight for truth, weight in pairs if truth.value is not False)
        low = fsum(weight for truth, weight in pairs if truth.value is True)
        if low >= least - 1e-12:
            return TRUE
        return FALSE if high < least - 1e-12 else unknown(*needs)

    @cached_property
    def single_class(self) -> Truth:
        """All failures are surely of one and the same class."""
        return any_of(
            self.only(mine) & ~self.has(*(c for c in CLASSES if c != mine)) for mine in CLASSES
        )

    @cached_property
    def unanimous(self) -> Truth:
        """All failures are labelled with one and the same class."""
        classes = {row.given for row in self.rows}
        return unknown("failures.kind") if None in classes else Truth(len(classes) == 1)

    @cached_property
    def undecided(self) -> Truth:
        """Two classes lead, neither with 60 %, and their difference may be chance (G6)."""
        if not self.rows:
            return unknown("failures")
        if self.single_class:
            return FALSE
        weights, total = self.class_weights, self.counted
        if weights is None or not total:
            return unknown("failures.count", *self.single_class.needs)
        ranked = [*sorted(weights.values(), reverse=True), 0.0]
        if ranked[0] >= 0.6:
            return FALSE
        first, second = (round(share * total) for share in ranked[:2])
        lead = multinomial_difference(first, min(second, total - first), total)
        return Truth(lead.low <= 0)

    # --- accuracy ---------------------------------------------------------------------------

    @cached_property
    def at_target(self) -> Truth:
        """The lower end of the accuracy's interval is at or above the target (G5)."""
        point = self.at_target_by_point
        if not point:
            return point
        examples = self.state.eval_examples
        if not examples:
            return unknown("eval_examples")
        assert self.state.accuracy is not None and self.state.target_accuracy is not None
        right = round(self.state.accuracy * examples)
        return Truth(wilson(right, examples).low >= self.state.target_accuracy)

    @cached_property
    def at_target_by_point(self) -> Truth:
        """The measured accuracy is at or above the target, significantly or not."""
        accuracy, target = self.state.accuracy, self.state.target_accuracy
        missing = [k for k in ("accuracy", "target_accuracy") if self._known(k) is None]
        if accuracy is None or target is None:
            return unknown(*missing)
        return Truth(accuracy >= target)

    @cached_property
    def larger_model_fixes(self) -> Truth:
        """A larger model gets 70 % or more of the failures right (K5)."""
        value = self.state.larger_model_fixes
        if value is not None:
            return Truth(value if isinstance(value, bool) else value >= SHARED_FIX)
        results = [
            r.failure.tests["larger_model"]
            for r in self.rows
            if r.failure.tests and "larger_model" in r.failure.tests
        ]
        if not results:
            return unknown("larger_model_fixes")
        return Truth(results.count("pass") >= SHARED_FIX * len(results))

    @cached_property
    def disputed(self) -> bool:
        """Experts are known to disagree too much for a reward (MTH011)."""
        agreement = self.state.annotator_agreement
        return agreement is not None and agreement < 0.8

    @cached_property
    def pressed(self) -> bool:
        """Cost, latency or privacy is known to rule out a larger hosted model."""
        state = self.state
        return bool(state.cost_limited or state.latency_limited or state.privacy_on_prem)


def _total(rows: Iterable[Row]) -> int | None:
    counts = [row.failure.count for row in rows]
    return None if any(c is None for c in counts) else sum(c for c in counts if c is not None)


def _weights(failures: list[Failure]) -> list[float | None]:
    """Each row's share of them all; None where neither its count nor the rest's says it.

    Next to shares, counts stand for what the shares leave over.
    """
    if any(f.count is None and f.share is None for f in failures) and len(failures) > 1:
        return [None] * len(failures)
    if len(failures) == 1:
        return [1.0]
    shares = fsum(f.share or 0.0 for f in failures)
    counts = sum(f.count or 0 for f in failures)
    left = max(0.0, 1.0 - shares)
    scale = 1.0 if counts else max(shares, 1e-300)
    if counts and shares >= 1.0:
        return [None] * len(failures)
    return [
        f.share / scale if f.share is not None else left * (f.count or 0) / counts for f in failures
    ]
