"""What to change in a plan that does not fit, in the order in which an expert would try.

Each rung of the ladder looks at the plan as it stands and proposes changes, best first. Rungs that
lose nothing come first, then those paid in quality, then hardware. Hardware is tried without what
was paid in quality before it is tried with it. In the end what turned out not to be needed is
taken back, the dearest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum

from ftplan.dataclass import dataclass
from ftplan.fit.changes import Change, apply_change, trainer_of
from ftplan.report import Remedy, Verdict
from ftplan.spec import Plan

__all__ = ["LADDER", "SERVING", "Card", "Judge", "Judged", "Price", "Rung", "remedies"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A plan and what came of it."""

    plan: Plan
    """With every default filled in."""
    allocated_bytes: int
    """Expected peak of the allocator."""
    device_bytes: int
    """Upper bound of what the card shows: what has to go below the card's size."""
    verdict: Verdict


Judge = Callable[[Plan], Judged | None]
"""Sizes a plan; None where it is refused (not modelled, contradictory)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What the ladder needs to know of the card."""

    capability: tuple[int, int] | None
    """CUDA compute capability; None: not NVIDIA's."""
    larger: tuple[str, ...] = ()
    """Cards that hold more, smallest first."""


class Price(IntEnum):
    """What a rung is paid in."""

    NOTHING = 0
    SPEED = 1
    QUALITY = 2
    HARDWARE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One kind of change."""

    name: str
    propose: Callable[[Plan, Card], Iterator[Change]]
    """Changes to the (complete) plan, most wanted first: the first that fits is taken, else the
    last one that can be run."""
    costs: str
    """What is paid, in words."""
    price: Price
    """What is paid decides when the rung is tried, and when it is taken back."""
    sizes: bool = False
    """The changes are one size, going down: when one fits, so do all after it."""


@dataclass(slots=True)
class _Taken:
    rung: Rung
    change: Change
    verdict: Verdict


def _fused_loss(plan: Plan, card: Card) -> Iterator[Change]:
    if plan.loss is None or plan.loss.kind == "fused" or (card.capability or (8, 0)) < (7, 0):
        return
    if plan.stack == "llamafactory-v1":  # its trainer takes the loss out of logits
        return
    # torchtune has a chunked loss of its own and no fused one, LitGPT none to choose
    if trainer_of(plan) == "torchtune":
        if plan.loss.kind == "full" and plan.stack != "torchtune-0.1":
            yield {"loss": "chunked"}
    elif plan.stack is not None and plan.stack.startswith(_BY_LIGER) and _may_be_liger(plan):
        yield {"loss": "fused", "kernels": "liger"}
    elif trainer_of(plan) != "litgpt":
        yield {"loss": "fused"}


_BY_LIGER = ("transformers", "trl", "llamafactory", "ms-swift")
"""Trainers whose one key for a loss without logits is the one for all of Liger's kernels."""


def _may_be_liger(plan: Plan) -> bool:
    return plan.kernels in (None, "none") and plan.task in (None, "sft", "pt")


def _checkpointing(plan: Plan, card: Card) -> Iterator[Change]:
    checkpointing = plan.gradient_checkpointing
    if trainer_of(plan) == "litgpt" and plan.sharding.kind in (None, "none"):
        return  # it checkpoints under FSDP alone
    if checkpointing is None or checkpointing.kind in ("none", "selective"):
        yield {"gradient_checkpointing": True}
    elif checkpointing.every > 1:
        yield {"gradient_checkpointing": {"every": 1}}


def _attention(plan: Plan, card: Card) -> Iterator[Change]:
    if plan.attention == "eager":
        yield {"attention": "sdpa"}
    elif plan.attention == "sdpa" and (card.capability or (0, 0)) >= (8, 0):
        yield {"attention": "flash"}


def _fused_optimizer(plan: Plan, card: Card) -> Iterator[Change]:
    choice = plan.optimizer
    if choice is None:
        return
    if choice.name in ("adamw_torch", "adamw_hf") or (
        choice.name == "adamw_torch_fused" and choice.implementation in ("foreach", "loop")
    ):
        yield {"optimizer": "adamw_torch_fused"}


_ADAM = ("adamw_torch_fused", "adamw_torch", "adamw_bnb_32bit", "adamw_anyprecision",
         "paged_adamw_32bit", "apex_fused_adam")  # fmt: skip


def _eight_bit(plan: Plan, card: Card) -> Iterator[Change]:
    if plan.sharding.kind == "fsdp":
        return  # bitsandbytes' optimizers do not step FSDP2's sharded tensors
    if plan.optimizer is not None and plan.optimizer.name in _ADAM and card.capability:
        yield {"optimizer": "adamw_bnb_8bit"}


def _paged(plan: Plan, card: Card) -> Iterator[Change]:
    names = (*_ADAM, "adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit")
    if plan.sharding.kind == "fsdp":
        return
    if plan.optimizer is not None and plan.optimizer.name in names and card.capability:
        yield {"optimizer": "paged_adamw_8bit"}


def _micro(plan: Plan, card: Card) -> Iterator[Change]:
    micro, accumulation = plan.batch.micro or 1, plan.batch.accumulation or 1
    for smaller in range(micro // 2, 0, -1):
        if micro % smaller == 0:
            yield {"batch": {"micro": smaller, "accumulation": accumulation * micro // smaller}}


def _packing(plan: Plan, card: Card) -> Iterator[Change]:
    if plan.batch.padding == "right" and not plan.batch.packing:
        yield {"batch": {"packing": True, "padding": "none"}}


def _world(plan: Plan) -> int:
    return (plan.hardware.count or 1) * (plan.hardware.nodes or 1)


def _shard(plan: Plan, card: Card) -> Iterator[Change]:
    if _world(plan) == 1 or plan.sharding.kind in ("fsdp", "zero3"):
        return
    if trainer_of(plan) == "megatron":  # its optimizer is spread already: what is left is to cut
        degrees = (d for d in (2, 4, 8) if (plan.hardware.count or 1) % d == 0)
        for degree in (d for d in degrees if d > (plan.sharding.tp or 1)):
            yield {"sharding": {"tp": degree, "sequence_parallel": True}}
        return
    deepspeed = plan.stack == "deepspeed" or (plan.sharding.kind or "").startswith("zero")
    yield {"sharding": {"kind": "zero3" if deepspeed else "fsdp"}}


def _adapter_dtype(plan: Plan, card: Card) -> Iterator[Change]:
    method = plan.method
    if method is not None and method.adapter_dtype == "fp32" and (card.capability or (8, 0))[0] > 7:
        yield {"method": {"adapter_dtype": "bf16"}}


def _half_weights(plan: Plan, card: Card) -> Iterator[Change]:
    if plan.precision.weights != "fp32" or plan.method is None:
        return
    if (card.capability or (8, 0)) >= (8, 0):
        yield {"precision": {"weights": "bf16"}}
    elif plan.method.kind not in ("full", "partial"):
        yield {"precision": {"weights": "fp16"}}


def _double_quant(plan: Plan, card: Card) -> Iterator[Change]:
    method = plan.method
    if method is not None and method.kind == "qlora" and method.double_quant is False:
        yield {"method": {"double_quant": True}}


def _no_kbit(plan: Plan, card: Card) -> Iterator[Change]:
    method = plan.method
    if method is not None and method.prepare_kbit:
        yield {"method": {"prepare_kbit": False}}


def _to_host(plan: Plan, card: Card) -> Iterator[Change]:
    checkpointing = plan.gradient_checkpointing
    if checkpointing is not None and checkpointing.kind == "full":
        yield {"gradient_checkpointing": {"kind": "offload"}}


def _to_lora(plan: Plan, card: Card) -> Iterator[Change]:
    if plan.method is not None and plan.method.kind in ("full", "partial"):
        plain = {"bf16"} if (card.capability or (8, 0)) >= (8, 0) else {"fp16"}
        method: dict[str, object] = {"kind": "lora", "rank": 16, "targets": "all-linear"}
        if plan.method.last_layers is not None:
            method["last_layers"] = None
        change: dict[str, object] = {"method": method}
        if plan.precision.weights not in plain | {"bf16", "fp16"}:
            change["precision"] = {"weights": next(iter(plain))}
        yield change


def _rank(plan: Plan, card: Card) -> Iterator[Change]:
    rank = plan.method.rank if plan.method is not None else None
    while rank is not None and rank > 8:
        rank = max(8, rank // 2)
        yield {"method": {"rank": rank}}


_PLAIN = ("bf16", "fp16", "fp32")


def _quantise(plan: Plan, card: Card) -> Iterator[Change]:
    method = plan.method
    if method is None or plan.precision.weights not in (*_PLAIN, "int8", "fp8"):
        return
    if method.kind in ("lora", "dora"):
        change: dict[str, object] = {"kind": "qlora", "double_quant": True}
        if method.kind == "dora":
            change["use_dora"] = True
        if method.prepare_kbit is None:
            change["prepare_kbit"] = False
        yield {"method": change, "precision": {"weights": "nf4"}}
    elif method.kind not in ("full", "partial", "bitfit", "ln_tuning"):
        yield {"precision": {"weights": "nf4"}}


def _shorter(plan: Plan, card: Card) -> Iterator[Change]:
    length = plan.batch.seq_len or 2048
    step = max(256, length // 32 // 256 * 256)
    shorter = (length - 1) // step * step
    while shorter >= 512:
        yield {"batch": {"seq_len": shorter}}
        shorter -= step


def _offload(plan: Plan, card: Card) -> Iterator[Change]:
    if plan.sharding.offload not in (None, "none"):
        return
    kind = plan.sharding.kind
    zero = kind if kind in ("zero1", "zero2", "zero3") else "zero2"
    if kind == "fsdp":
        yield {"sharding": {"offload": "params"}}
        return
    yield {"sharding": {"kind": zero, "offload": "optimizer"}}
    yield {"sharding": {"kind": "zero3", "offload": "params"}}


def _more_gpus(plan: Plan, card: Card) -> Iterator[Change]:
    world, nodes = _world(plan), plan.hardware.nodes or 1
    kind = "zero3" if plan.stack == "deepspeed" or plan.sharding.kind == "zero3" else "fsdp"
    for count in (2, 4, 8, 16, 32, 64):
        if count <= world:
            continue
        per_node = min(8, count) if nodes == 1 else plan.hardware.count or 8
        if count % per_node:
            continue
        change: dict[str, object] = {"count": per_node}
        if count // per_node > 1:
            change["nodes"] = count // per_node
        yield {"hardware": change, "sharding": {"kind": kind}}


def _larger_card(plan: Plan, card: Card) -> Iterator[Change]:
    for name in card.larger:
        yield {"hardware": {"gpu": name}}


def _cache_dtype(plan: Plan, card: Card) -> Iterator[Change]:
    if plan.precision.kv_cache in (None, *_PLAIN):
        yield {"precision": {"kv_cache": "fp8"}}


def _serve_weights(plan: Plan, card: Card) -> Iterator[Change]:
    weights = plan.precision.weights
    if weights == "fp32":
        yield {"precision": {"weights": "bf16"}}
    if weights in _PLAIN:
        yield {"precision": {"weights": "int8"}}
    if weights in (*_PLAIN, "int8", "fp8"):
        yield {"precision": {"weights": "awq-int4"}}


def _concurrency(plan: Plan, card: Card) -> Iterator[Change]:
    for smaller in range((plan.batch.micro or 1) - 1, 0, -1):
        yield {"batch": {"micro": smaller}}


def _tensor_parallel(plan: Plan, card: Card) -> Iterator[Change]:
    for count in (2, 4, 8):
        if count > _world(plan):
            yield {"hardware": {"count": count}, "sharding": {"tp": count}}


def _rung(
    name: str,
    propose: Callable[[Plan, Card], Iterator[Change]],
    price: Price,
    costs: str,
    *,
    sizes: bool = False,
) -> Rung:
    return Rung(name=name, propose=propose, costs=costs, price=price, sizes=sizes)


_FREE, _SPEED, _QUALITY, _HARDWARE = Price.NOTHING, Price.SPEED, Price.QUALITY, Price.HARDWARE
LADDER: tuple[Rung, ...] = (
    _rung("fused loss", _fused_loss, _FREE, "nothing: the same loss without whole logits"),
    _rung("checkpointing", _checkpointing, _SPEED, "a second forward: about a third more compute"),
    _rung("attention", _attention, _FREE, "nothing: the same attention without a score matrix"),
    _rung("shard", _shard, _SPEED, "each block waits for the links"),
    _rung("fused optimizer", _fused_optimizer, _FREE, "nothing: the same update in one kernel"),
    _rung("8-bit optimizer", _eight_bit, _SPEED, "next to nothing: states in 8 bits, scaled"),
    _rung("paged optimizer", _paged, _SPEED, "steps wait for the host when the card is full"),
    _rung(
        "micro batch", _micro, _SPEED, "smaller matmuls; accumulation keeps the step", sizes=True
    ),
    _rung("packing", _packing, _FREE, "nothing: samples are joined, no mask is needed"),
    _rung("bf16 adapter", _adapter_dtype, _QUALITY, "adapter updates are rounded to bf16"),
    _rung("half weights", _half_weights, _QUALITY, "weights and updates in 16 bits"),
    _rung("double quantisation", _double_quant, _QUALITY, "block scales in 8 bits"),
    _rung("k-bit preparation", _no_kbit, _QUALITY, "norms and residual stream stay in bf16"),
    _rung("checkpoints to host", _to_host, _QUALITY, "slower: block inputs cross the bus"),
    _rung("LoRA", _to_lora, _QUALITY, "low-rank updates instead of all weights"),
    _rung("rank", _rank, _QUALITY, "capacity of the adapter", sizes=True),
    _rung("quantise", _quantise, _QUALITY, "a 4-bit base: slower steps, slightly worse"),
    _rung("sequence", _shorter, _QUALITY, "longer samples are cut", sizes=True),
    _rung("offload", _offload, _QUALITY, "slower steps, and host memory"),
    _rung("more GPUs", _more_gpus, _HARDWARE, "more GPUs"),
    _rung("larger GPU", _larger_card, _HARDWARE, "a larger card"),
)
"""Training: nothing lost first, then what is paid in quality or speed, then hardware."""

SERVING: tuple[Rung, ...] = (
    _rung("attention", _attention, _FREE, "nothing: the same attention without a score matrix"),
    _rung("cache", _cache_dtype, _QUALITY, "keys and values in 8 bits"),
    _rung("weights", _serve_weights, _QUALITY, "quantised weights"),
    _rung("concurrency", _concurrency, _QUALITY, "fewer sequences at once", sizes=True),
    _rung("context", _shorter, _QUALITY, "a shorter context", sizes=True),
    _rung("more GPUs", _tensor_parallel, _HARDWARE, "more GPUs, split by tensor parallelism"),
    _rung("larger GPU", _larger_card, _HARDWARE, "a larger card"),
)
"""Inference."""


_LACKS = {
    "megatron": (
        "fused loss", "fused optimizer", "8-bit optimizer", "paged optimizer", "attention",
        "bf16 adapter", "double quantisation", "k-bit preparation", "checkpoints to host",
        "quantise",
    ),
}  # fmt: skip
"""Rungs for which a trainer has no key."""


def remedies(plan: Plan, before: Judged, judge: Judge, card: Card) -> tuple[Remedy, ...]:
    """What would help a job that is over or tight, ordered and cumulative.

    ``plan`` is as the user wrote it, ``before`` what came of it. Each verdict is after the change
    and all earlier ones, ``saves_bytes`` is what the change saves of the allocator's peak by
    itself (negative: alone it would add). The list ends at the first that fits; when none does,
    its last entry changes nothing and says so.
    """
    ladder = SERVING if before.plan.task == "serve" else LADDER
    lacks = _LACKS.get(trainer_of(before.plan), ())
    ladder = tuple(rung for rung in ladder if rung.name not in lacks)
    taken = _Climb(plan, before, judge, card).run(ladder)
    result = []
    verdict: Verdict = before.verdict
    for step in taken:
        alone = judge(apply_change(plan, step.change))
        saved = before.allocated_bytes - alone.allocated_bytes if alone is not None else 0
        verdict = step.verdict
        result.append(
            Remedy(
                change=step.change,
                saves_bytes=saved,
                costs=step.rung.costs,
                verdict=verdict,
                verdict_alone=alone.verdict if alone is not None else None,
            )
        )
    if verdict != "fits":
        text = "none of these changes makes the job fit" if taken else "no change makes it fit"
        if verdict == "tight":
            text += " for certain"
        result.append(Remedy(change={}, saves_bytes=0, costs=text, verdict=verdict))
    return tuple(result)


class _Climb:
    """One way up the ladder."""

    def __init__(self, plan: Plan, before: Judged, judge: Judge, card: Card) -> None:
        self.start = plan
        self.before = before
        self.judge = judge
        self.card = card
        self.taken: list[_Taken] = []
        self.now = before

    def run(self, ladder: Sequence[Rung]) -> list[_Taken]:
        """The steps that are needed, up to the first that fits."""
        early = [rung for rung in ladder if rung.price < Price.QUALITY]
        waiting = [rung for rung in early if not self._climb(rung)]
        waiting = [rung for rung in waiting if not self._climb(rung)]
        if self._fits():
            return self._needed()
        for rung in waiting:  # the peak is elsewhere; it may move to where these act
            self._climb(rung, idle=True)
        free, now = list(self.taken), self.now
        for rung in ladder:
            if rung.price == Price.QUALITY:
                self._climb(rung)
        if self._fits():
            return self._needed()
        dear, dear_now = list(self.taken), self.now
        ways = [self._on_hardware(ladder, free, now), self._on_hardware(ladder, dear, dear_now)]
        found = [way for way in ways if way[1].verdict == "fits"]
        if not found:
            self.taken, self.now = dear, dear_now
            return self._needed()
        fewest = min(_world(after.plan) for _, after in found)
        # quality is kept unless that takes more than twice the hardware
        self.taken, self.now = next(w for w in found if _world(w[1].plan) <= 2 * fewest)
        return self._needed()

    def _fits(self) -> bool:
        return self.now.verdict == "fits"

    def _on_hardware(
        self, ladder: Sequence[Rung], taken: Sequence[_Taken], now: Judged
    ) -> tuple[list[_Taken], Judged]:
        self.taken, self.now = list(taken), now
        for rung in ladder:
            if rung.price == Price.HARDWARE:
                self._climb(rung, must_fit=True)
        return self.taken, self.now

    def _climb(self, rung: Rung, *, idle: bool = False, must_fit: bool = False) -> bool:
        """Take the rung's first change that fits, else the last one that lowers the peak."""
        if self.now.verdict == "fits":
            return False
        plan = self._plan(self.taken)
        changes = list(rung.propose(self.now.plan, self.card))
        if rung.sizes:
            found = _largest(plan, self.judge, changes)
        else:
            found = _first(plan, self.judge, changes)
        if found is None:
            return False
        change, after = found
        lower = after.device_bytes < self.now.device_bytes + idle
        if after.verdict != "fits" and (must_fit or not lower):
            return False
        self.taken.append(_Taken(rung, change, after.verdict))
        self.now = after
        return True

    def _plan(self, steps: Sequence[_Taken]) -> Plan:
        plan = self.start
        for step in steps:
            plan = apply_change(plan, step.change)
        return plan

    def _needed(self) -> list[_Taken]:
        """Take back what is paid and was not needed in the end, the dearest first."""
        kept = list(self.taken)
        reached = self.now
        for step in sorted(self.taken, key=lambda step: -step.rung.price):
            rest = [other for other in kept if other is not step]
            after = self.judge(self._plan(rest))
            if after is None:
                continue
            free = step.rung.price == Price.NOTHING
            if after.device_bytes <= reached.device_bytes or (
                not free and after.verdict == reached.verdict == "fits"
            ):
                kept, reached = rest, after
        result: list[_Taken] = []
        for count, step in enumerate(kept, start=1):
            after = self.judge(self._plan(kept[:count]))
            if after is None:  # it made sense only with what was taken back
                return self.taken
            result.append(_Taken(step.rung, step.change, after.verdict))
            if after.verdict == "fits":
                break
        return result


def _first(plan: Plan, judge: Judge, changes: Sequence[Change]) -> tuple[Change, Judged] | None:
    """The first change that fits, else the last one that can be sized."""
    last = None
    for change in changes:
        after = judge(apply_change(plan, change))
        if after is None:
            continue
        last = change, after
        if after.verdict == "fits":
            break
    return last


def _largest(plan: Plan, judge: Judge, changes: Sequence[Change]) -> tuple[Change, Judged] | None:
    """The first of descending sizes that fits, by bisection; the smallest when none does."""
    if not changes:
        return None
    low, high = 0, len(changes) - 1
    after = judge(apply_change(plan, changes[high]))
    if after is None:
        return None
    found = changes[high], after
    while low < high and found[1].verdict == "fits":
        middle = (low + high) // 2
        after = judge(apply_change(plan, changes[middle]))
        if after is not None and after.verdict == "fits":
            found, high = (changes[middle], after), middle
        else:
            low = middle + 1
    return found
