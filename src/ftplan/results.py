"""What evaluation tools reported, in one shape for every tool, and how two runs compare.

A reader of :mod:`ftplan.evals` turns a result file into an :class:`EvalRun`. Nothing is concluded
here that the tool did not say: ``passed`` is ``None`` where it judged nothing, a score without a
threshold stays a score unless one was assumed, and an assumed threshold is marked as such.
"""

from __future__ import annotations

from ftplan.dataclass import dataclass

__all__ = [
    "Aggregate",
    "Agreement",
    "Check",
    "EvalRun",
    "ItemChange",
    "ResultRow",
    "RunComparison",
    "Suggestion",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One metric, assertion or scorer on one row."""

    name: str
    """As the tool shows it: a metric's own name or the assertion's type."""
    signal: str = ""
    """What the check is, where that differs from its name: an assertion's type (`is-json`)."""
    passed: bool | None = None
    """None: the tool gave no verdict and no threshold could be applied."""
    score: float | None = None
    threshold: float | None = None
    """In units of ``score``."""
    threshold_assumed: bool = False
    """The tool has no threshold here: ftplan's default was used."""
    reason: str = ""
    error: str = ""
    """The check itself crashed (a judge timed out): it says nothing about the answer."""
    decides: bool = True
    """False: shown, but never makes the row pass or fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRow:
    """One answer of one system to one item, with its checks."""

    id: str
    """Unique within the run."""
    item: str
    """Which item was answered: equal in two runs for the same item, equal among repeats."""
    passed: bool | None = None
    """None: not judged, or ``error`` is set."""
    checks: tuple[Check, ...] = ()
    input: str = ""
    output: str = ""
    expected: str = ""
    contexts: tuple[str, ...] = ()
    """Passages that the system was given to answer from."""
    reason: str = ""
    error: str = ""
    """Why there is no answer to judge: a timeout, a rate limit, a crashed harness."""
    description: str = ""
    variant: str = ""
    """Which prompt, model or epoch setting answered, where one file holds several."""
    kind: str = ""
    """A failure kind that the file itself names; empty in all tools' own formats."""
    line: int | None = None
    """1-based line of the file, where rows have one."""

    @property
    def failing_checks(self) -> tuple[Check, ...]:
        """The checks that say no, deciding ones first."""
        failed = [check for check in self.checks if check.passed is False]
        return tuple(sorted(failed, key=lambda check: not check.decides))


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """A number over many rows, from a file that holds no rows."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    samples: int | None = None
    share_right: bool = False
    """``value`` is a share of right answers, so ``value x samples`` of them were right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRun:
    """One result file."""

    tool: str
    version: str = ""
    source: str = ""
    """The file's name, as the user gave it."""
    rows: tuple[ResultRow, ...] = ()
    aggregates: tuple[Aggregate, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader of the numbers has to know: assumed thresholds, missing rows."""

    @property
    def failures(self) -> tuple[ResultRow, ...]:
        """Rows with a verdict, and the verdict is no."""
        return tuple(row for row in self.rows if row.passed is False and not row.error)

    @property
    def errors(self) -> tuple[ResultRow, ...]:
        """Rows without an answer to judge: they count for nobody."""
        return tuple(row for row in self.rows if row.error)

    @property
    def unjudged(self) -> tuple[ResultRow, ...]:
        """Rows with an answer on which nothing decided."""
        return tuple(row for row in self.rows if row.passed is None and not row.error)

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of the systems in this file, in order of appearance."""
        return tuple(dict.fromkeys(row.variant for row in self.rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """What the checks of one row suggest. A person's label always replaces it."""

    kind: str | None
    """None: the checks do not say."""
    checks: tuple[str, ...]
    """The checks on which it rests."""
    reason: str
    ask: str = ""
    """The test or question that would settle it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemChange:
    """One item in two runs. With repeats the shares are over the repeats."""

    item: str
    before_id: str
    after_id: str
    before: float
    """Share of its judged answers that passed, 0..1."""
    after: float
    repeats_before: int = 1
    repeats_after: int = 1
    input: str = ""
    before_output: str = ""
    after_output: str = ""
    reason: str = ""
    """Why the side that fails does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """The same items answered before and after a change."""

    schema_version: int = 1
    before: str
    """The file, and the variant where one was picked."""
    after: str
    verdict: str
    """`better`, `worse`, `no significant change`, `not comparable`."""
    sentence: str
    paired: int
    """Items with a verdict on both sides."""
    fixed: tuple[ItemChange, ...]
    """Items that pass more often than before (with one answer each: failed, now pass)."""
    broke: tuple[ItemChange, ...]
    unchanged_pass: int
    unchanged_fail: int
    """Items as good as before of which some answer fails."""
    only_before: tuple[str, ...]
    """Items that the other run does not have."""
    only_after: tuple[str, ...]
    not_judged: tuple[str, ...]
    """Items in both runs without a verdict on either side (crashed, timed out, unscored)."""
    before_rate: float | None
    """Share of passes over the paired items, 0..1; None when nothing is paired."""
    after_rate: float | None
    difference: float | None
    """``after_rate - before_rate``, items weighing the same."""
    low: float | None
    """95 % interval of the difference; the item is the unit, so repeats do not narrow it alone."""
    high: float | None
    p_value: float | None
    """Exact two-sided McNemar (with repeats: sign test over items), None when nothing is paired."""
    repeated: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Two annotators on the same failures."""

    names: tuple[str, str]
    items: int
    """Failures that both labelled."""
    only_first: int
    only_second: int
    same_kind: int
    same_class: int
    kappa_kind: float | None
    """Cohen's kappa over kinds, -1..1; None where it is not defined."""
    kappa_class: float | None
    ac1_kind: float | None
    """Gwet's AC1 over kinds: does not collapse where one kind dominates."""
    disagreements: tuple[tuple[str, str, str], ...] = ()
    """(id, first's kind, second's kind)."""
