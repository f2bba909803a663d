"""What ``fit`` answers: which ways of running a job fit a card, and how far each can go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ftplan.dataclass import dataclass
from ftplan.report import Assumption, Finding, GpuSummary, ModelSummary, Remedy, Verdict

__all__ = [
    "DataFormat",
    "DataSummary",
    "FastestPlan",
    "FitReport",
    "FitRow",
    "GpuOffer",
    "GpuOption",
    "Solution",
    "Spread",
    "TimeEstimate",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """An estimate that is no count of bytes: seconds, tokens a second, hours, money."""

    low: float
    expected: float
    high: float

    def times(self, factor: float) -> Spread:
        """Everything times a number."""
        return Spread(
            low=self.low * factor, expected=self.expected * factor, high=self.high * factor
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEstimate:
    """How fast a way runs, all cards together, and what the data costs with it."""

    micro: int
    """Micro batch at which it was estimated."""
    seq_len: int
    flops_per_micro_batch: int
    """What one card computes, recomputation included."""
    model_flops_per_micro_batch: int
    """Without what is computed twice: what utilisation is counted by."""
    flops: Mapping[str, int]
    """The same in parts: `forward`, `backward`, `recompute`; `attention` is in these three."""
    model_flops_utilisation: float
    """Model operations a second over the rate in the data sheet, expected."""
    seconds_per_micro_batch: Spread
    tokens_per_second: Spread
    bound: str
    """What takes most of it: `compute`, `memory bandwidth`, `interconnect`, `host link` or
    `kernel launches`."""
    tokens: int | None = None
    """Tokens to process, without padding and what is cut off; None: not given."""
    steps: int | None = None
    """Optimizer steps for them."""
    hours: Spread | None = None
    """For the data as they are: with padding where samples are padded."""
    cost: Spread | None = None
    """In the currency of the price that was given."""
    cost_per_million_tokens: Spread | None = None
    energy_kwh: Spread | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The answer to ``--for``: one thing solved."""

    of: str
    """`micro-batch`, `seq-len`, `gpu`, `gpus`, `method` or `rank`."""
    value: int | str | None
    """None: nothing fits."""
    way: str | None
    change: Mapping[str, Any]
    """What to write in the plan."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuOffer:
    """A card that could be used: what the search needs to know of a catalogue row."""

    name: str
    usable_bytes: int
    compute_capability: str | None
    price_per_hour: float | None = None
    """As the user gave it; prices are never built in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FastestPlan:
    """The fastest plan of a way that fits."""

    change: Mapping[str, Any]
    """Laid over the plan it makes this one: the way, settings that lose nothing, the batch."""
    micro: int
    """The smallest micro batch that is as fast as the largest."""
    largest_micro: int
    """Most sequences at once that still fit with these settings."""
    accumulation: int
    peak_bytes: int
    """Expected bytes on the device."""
    headroom_bytes: int
    """Usable bytes less the upper end of the peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRow:
    """One way of running the job on the card."""

    way: str
    """`lora, checkpointed`; `as planned` for the plan itself."""
    change: Mapping[str, Any]
    """What differs from the plan, by plan key."""
    verdict: Verdict
    """At the plan's own micro batch and sequence length."""
    peak_bytes: int | None
    """Expected bytes on the device, there; None: it could not be computed."""
    headroom_bytes: int | None
    """Usable bytes less the upper end of the peak; negative: it does not fit for sure."""
    trainable_params: int | None
    largest_micro: int | None
    """Most sequences at once that still fit at the plan's sequence length; None: none does."""
    longest_seq_len: int | None
    """Longest sequence that still fits at the plan's micro batch; None: none does."""
    fastest: FastestPlan | None = None
    """None: no card is named or nothing fits."""
    time: TimeEstimate | None = None
    """How fast :attr:`fastest` runs."""
    note: str = ""
    """Why a row has no numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuOption:
    """A card, or several of them, on which a way fits."""

    gpu: str
    count: int
    way: str
    verdict: Verdict
    peak_bytes: int
    usable_bytes: int
    price_per_hour: float | None = None
    """For all cards together."""
    fastest: FastestPlan | None = None
    """The fastest plan on them, where there is a price."""
    time: TimeEstimate | None = None
    """How fast that plan runs, and what it costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """The answer of ``ftplan fit``."""

    verdict: Verdict
    """`fits` when any row does, else `tight`, else `over`; `unknown` when nothing was decided."""
    model: ModelSummary | None
    gpu: GpuSummary | None
    micro: int
    """Micro batch at which the rows were judged."""
    seq_len: int
    """Sequence length at which the rows were judged."""
    recommended: str | None
    """The way of the row to take."""
    reason: str
    rows: tuple[FitRow, ...]
    gpus: tuple[GpuOption, ...]
    """The cheapest (with prices) or smallest single cards that fit, best first."""
    fewest: GpuOption | None
    """The fewest cards of the plan's kind that fit, sharded."""
    remedies: tuple[Remedy, ...]
    """For the job as planned, when it does not fit."""
    solution: Solution | None = None
    """What ``--for`` asked for."""
    candidates: int = 0
    """Plans that the answer was chosen from: ways x settings x cards x micro batches."""
    evaluated: int = 0
    """Of these, how many sizes were asked of a record; the others need not be."""
    findings: tuple[Finding, ...] = ()
    assumptions: tuple[Assumption, ...] = ()
    schema_version: int = 1
    tool_version: str = ""


DataFormat = Literal[
    "chat", "prompt and completion", "preference pairs", "unpaired preference", "text",
    "prompts alone", "token ids", "unknown",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """What ``ftplan data`` answers: training data, counted in one pass."""

    file: str
    bytes: int
    examples: int
    format: DataFormat
    """What most examples are."""
    fields: tuple[str, ...]
    """Keys of the first example."""
    counted_by: str
    """The tokenizer, or the rule of the estimate."""
    is_exact: bool
    """A tokenizer counted."""
    tokens: Spread
    """All tokens of one pass; low and high are those of the estimate."""
    median_tokens: int
    p95_tokens: int
    p99_tokens: int
    longest_tokens: int
    longest_line: int
    """Line of the longest example (its number in an array)."""
    histogram: tuple[tuple[int, int], ...]
    """Pairs of upper length in tokens and how many examples are at most as long."""
    covering_seq_len: int
    """A sequence length that no example exceeds (a multiple of 64)."""
    seq_len: int
    """The sequence length that the following are about."""
    truncated_examples: int
    """Examples that are longer."""
    lost_tokens_share: float
    """Share of all tokens that is cut off."""
    padded_efficiency: float
    """Share of real tokens when every example is padded to ``seq_len``."""
    batch: int
    """Samples that are padded to the longest of them."""
    batch_efficiency: float
    """Share of real tokens then."""
    packing_efficiency: float
    """Share of real tokens when examples are packed (best fit decreasing)."""
    packed_sequences: int
    duplicates: int
    """Examples that are a copy of an earlier one."""
    duplicates_are_complete: bool
    """Every example was compared; else those beyond memory's limit were not."""
    empty_targets: int
    """Examples without anything to learn: no answer, or an empty one."""
    first_empty_line: int | None
    unreadable: int
    """Lines that are no JSON object."""
    first_unreadable_line: int | None
    with_media: int
    """Examples with images, video or sound, whose tokens are not counted."""
    mixed_formats: tuple[str, ...]
    """Other formats that some examples have."""
    findings: tuple[Finding, ...] = ()
    schema_version: int = 1
    tool_version: str = ""
