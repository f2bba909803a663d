"""Tasks: what is done with the model's outputs, how many sequences there are, who else is there.

A language model's own loss (:mod:`loss`) needs nothing of this. The others are written after the
trainers that people run; the file and version that each mirrors:

    rm        trl/trainer/reward_trainer.py 1.16: chosen and rejected in one batch, a head of one
              label, the loss outside the model
    classify  transformers/modeling_layers.py 5.23, ``GenericForSequenceClassification``
    dpo       trl/trainer/dpo_trainer.py 1.10 (all logits) and 1.16 (log-probabilities in tiles):
              chosen and rejected in one batch, then the reference's forward without a graph
    kto       trl/trainer/kto_trainer.py 1.16: one completion a sample, then the reference's
              forward; the forwards over mismatched pairs need no more than the reference's
    orpo      trl/experimental/orpo/orpo_trainer.py 1.16: chosen and rejected in one batch, a
              cross entropy of the chosen half beside the log-probabilities, no reference
    grpo      trl/trainer/grpo_trainer.py 1.16: the old and the reference's log-probabilities are
              made without a graph before the step; the loss looks at completions alone
    distill   trl/experimental/gkd/gkd_trainer.py 1.16: the teacher's forward without a graph, a
              generalised Jensen-Shannon divergence over all logits; in tiles where the loss is
              chunked (trl/trainer/distillation_trainer.py 1.16)
    embed     sentence_transformers MultipleNegativesRankingLoss: anchors and positives, pooled
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.families.native import Native
from ftplan.memory.job import Job
from ftplan.memory.loss import tiled_divergence
from ftplan.memory.nn import Network
from ftplan.memory.prepare import prepare
from ftplan.memory.tape import BATCH, ONE, SEQ, TOKENS, Grads, Size, Tensor

__all__ = [
    "FULL_LOSS",
    "HEADS",
    "MODELLED",
    "Objective",
    "Resident",
    "objective_of",
    "sequences_of",
]

Kind = Literal["tokens", "labels", "rewards", "pairs", "unpaired", "odds", "policy", "teacher",
               "contrast", "native"]  # fmt: skip

_KINDS: dict[str, Kind] = {
    "sft": "tokens", "pt": "tokens", "classify": "labels", "rm": "rewards", "dpo": "pairs",
    "kto": "unpaired", "orpo": "odds", "grpo": "policy", "distill": "teacher", "embed": "contrast",
}  # fmt: skip
MODELLED = tuple(_KINDS)
"""Tasks that are sized."""
_PAIRED = ("rm", "dpo", "orpo", "embed")
FULL_LOSS = ("classify", "rm", "embed", "orpo")
"""Tasks whose loss takes what the model returns whole."""
HEADS = ("classifier", "score")
"""Heads that PEFT trains beside an adapter that classifies (peft_model.py, 0.21)."""

Again = Callable[[Network], Tensor]
"""Another network's outputs on the same batch, without a graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A frozen model that lies beside the one that is trained."""

    name: str
    """Name of its term (`weights/reference`)."""
    network: Network
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A task, as the step sees it."""

    kind: Kind
    sequences: int = 1
    """Sequences that go through the model for each of the micro batch."""
    other: Network | None = None
    """Whose forward runs without a graph on the same batch: the reference, or the teacher."""
    before: bool = False
    """It runs before the policy's forward, with nothing saved yet."""
    states: bool = False
    """The loss takes hidden states: it meets the head itself, a tile at a time."""
    completion: int = 0
    """Tokens of each sequence that the loss looks at; 0: all."""
    resident: tuple[Resident, ...] = ()
    """Frozen models that the job holds."""

    @property
    def inside(self) -> bool:
        """The model computes its loss by itself."""
        return self.kind in ("tokens", "labels")

    def loss(self, network: Network, held: list[Tensor], again: Again) -> Tensor:
        """From the model's outputs, which the loss function holds until it returns, to the loss.

        ``held`` is what the caller keeps: the policy's logits (or states, or log-probabilities).
        """
        if isinstance(network, Native):
            return network.loss(held)
        outputs = held[0]
        if self.kind == "rewards":
            return _scalar([outputs])
        if self.kind == "contrast":
            return _in_batch(outputs)
        if self.kind == "odds":
            return _scalar([_half_cross_entropy(outputs), _log_probs(outputs, self.completion)])
        if self.kind == "teacher":
            assert self.other is not None
            with outputs.tape.no_grad():
                told = again(self.other)
            if self.states:
                return tiled_divergence(network, self.other, outputs, told)
            return _divergence(outputs, told)
        mine = _log_probs(outputs, self.completion)
        if self.other is not None and not self.before:
            with outputs.tape.no_grad():
                told = again(self.other)
                theirs = _log_probs(told, self.completion)
            return _scalar([mine, theirs])
        return _scalar([mine])

    def scores(self, outputs: Tensor) -> Tensor:
        """Log-probabilities alone, for later."""
        return _log_probs(outputs, self.completion)


def sequences_of(task: str) -> int:
    """Sequences in a batch for each sample: two where samples are pairs."""
    return 2 if task in _PAIRED else 1


def objective_of(job: Job) -> Objective:
    """The task of a job, with the frozen models that it needs.

    Raises UnsupportedError for a task that is not modelled, by name.
    """
    kind = _KINDS.get(job.task)
    if kind is None:
        raise UnsupportedError(
            f"the task {job.task!r}",
            remedy=f"size one of {', '.join(MODELLED)}; its policy's step is that of grpo",
        )
    if job.modules:
        return Objective(kind="native")
    other: Network | None = None
    resident: tuple[Resident, ...] = ()
    if job.task in ("dpo", "kto", "grpo") and job.reference in ("model", "adapter"):
        other = prepare(_frozen(job))
        if job.reference == "model":
            why = "a second, frozen model gives the reference's log-probabilities"
            resident = (Resident(name="weights/reference", network=other, why=why),)
    if job.task == "distill":
        if job.teacher is None:
            raise UnsupportedError(
                "distillation without a teacher",
                remedy="name one (teacher: llama-3.1-8b); distilling from text is task: sft",
            )
        other = prepare(replace(_frozen(job), config=job.teacher))
        why = "the teacher, frozen, beside the student"
        resident = (Resident(name="weights/teacher", network=other, why=why),)
    # ZeRO-2 shards gradients and states alone, whatever computes the loss
    sharded = job.sharding.kind in ("fsdp", "zero3")
    if sharded and kind not in ("tokens", "labels", "rewards"):
        raise UnsupportedError(
            f"the task {job.task!r} sharded by {job.sharding.kind}",
            remedy="size it on one GPU or with sharding: ddp",
        )
    return Objective(
        kind=kind,
        sequences=sequences_of(job.task),
        other=other,
        before=job.task == "grpo",
        states=kind == "teacher" and job.environment.loss == "chunked",
        completion=job.completion_tokens if job.task == "grpo" else 0,
        resident=resident,
    )


def _frozen(job: Job) -> Job:
    """The same base model with nothing trained: a reference, or the policy with adapters off."""
    return replace(job, method="partial", last_layers=0, adapter=None, task="sft")


def _scalar(parts: list[Tensor]) -> Tensor:
    """A scalar out of a few numbers a token or a sequence."""
    tape = parts[0].tape
    loss = tape.tensor(ONE, 1, "fp32", "loss")
    makers = [ops.like(t.rows, t.width, t.dtype, t.requires_grad) for t in parts]
    ops.record([loss], "loss", parts, lambda grad: tuple(make(grad) for make in makers))
    return loss


def _log_probs(outputs: Tensor, completion: int) -> Tensor:
    """Log-probabilities of the labels; already there where the head was fused with the loss."""
    if outputs.width == 1:
        return outputs
    rows = BATCH * completion if completion else TOKENS + BATCH * -1
    shifted = ops.rows_slice(outputs, rows)
    if completion:  # divided by the sampling temperature
        shifted = ops.scale(shifted)
    length = ONE * completion if completion else SEQ + ONE * -1
    return _picked(shifted, length)


def _pick(x: Tensor) -> Tensor:
    """``gather`` of one value a row keeps its input; backward makes a whole tensor of zeros.

    Source: torch/csrc/autograd/FunctionsManual.cpp, ``gather_backward``.
    """
    out = x.tape.tensor(x.rows, 1, x.dtype, "picked")
    make = ops.like(x.rows, x.width, x.dtype, x.requires_grad)
    saved = x.alias()

    def apply(grad: Tensor) -> Grads:
        _kept = saved
        return (make(grad),)

    ops.record([out], "pick", [x], apply)
    return out


def _picked(x: Tensor, length: Size) -> Tensor:
    """``selective_log_softmax``: a sequence of ``length`` rows at a time.

    In fp32 the logits are picked and a log-sum-exp a row is taken off; in two bytes each
    sequence's log-probabilities are made and kept (trl/trainer/utils.py, 1.10).
    """
    if x.dtype == "fp32":
        selected = _pick(x)
        sums = _by_sequence(x, length, _log_sum_exp, keeps="input")
        return ops.add(selected, sums)
    return _by_sequence(x, length, _log_softmax, keeps="output")


def _by_sequence(
    x: Tensor,
    length: Size,
    one: Callable[[Tensor], Tensor],
    *,
    keeps: Literal["input", "output"],
) -> Tensor:
    """``one`` of each sequence: the first of them with what it needs for a moment, then the rest.

    On the way back the first sequence comes last, when all the others' gradients are there: that
    is where its temporaries count, so the others are played without theirs.
    """
    tape = x.tape
    rest = x.rows + length * -1
    rows, width, dtype = x.rows, x.width, x.dtype
    if not ops.records(x):
        if keeps == "output":  # the loop's variable still names the one before
            held = [tape.tensor(length, width, dtype, "log_softmax") for _ in range(2)]
            held.clear()
        else:
            one(x.alias(rows=length))
        return tape.tensor(rows, 1, dtype, "log-probabilities")
    first, others = x.alias(rows=length), x.alias(rows=rest)

    def join(*_grads: Tensor | None) -> Grads:
        return (tape.tensor(rows, width, dtype, "gradient"),)

    ops.record([first, others], "unbind", [x], join)
    head = one(first)
    tail = tape.tensor(rest, 1, dtype, "log-probabilities")
    kept = [others.alias() if keeps == "input" else tape.tensor(rest, width, dtype, "log_softmax")]

    def apply(_grad: Tensor) -> Grads:
        kept.clear()
        return (tape.tensor(rest, width, dtype, "gradient"),)

    ops.record([tail], "each", [others], apply)
    out = tape.tensor(rows, 1, dtype, "log-probabilities")
    ops.record(
        [out], "stack", [head, tail], lambda grad: (grad.alias(rows=length), grad.alias(rows=rest))
    )
    return out


def _log_softmax(row: Tensor) -> Tensor:
    return _pick(ops.unary(row, "log_softmax", "output"))


def _log_sum_exp(row: Tensor) -> Tensor:
    """Keeps its input; needs the exponentials for a moment on either way.

    Source: aten/src/ATen/native/ReduceOps.cpp, ``logsumexp_out_impl``;
    FunctionsManual.cpp, ``logsumexp_backward``.
    """
    tape = row.tape
    exponentials = tape.tensor(row.rows, row.width, row.dtype, "exponentials")
    del exponentials
    out = tape.tensor(row.rows, 1, row.dtype, "log-sum-exp")
    saved, rows, width, dtype = row, row.rows, row.width, row.dtype

    def apply(_grad: Tensor) -> Grads:
        _kept = saved
        difference = tape.tensor(rows, width, dtype, "gradient")
        power = tape.tensor(rows, width, dtype, "gradient")
        product = tape.tensor(rows, width, dtype, "gradient")
        del difference, power
        return (product,)

    ops.record([out], "logsumexp", [row], apply)
    return out


def _half_cross_entropy(logits: Tensor) -> Tensor:
    """Cross entropy of the chosen half, shifted: its logits are copied first."""
    half = ops.rows_slice(logits, TOKENS + BATCH * -1)
    half.width = -(-logits.width // 2)  # half of the sequences: half as many numbers
    return ops.nll_loss(ops.unary(ops.copy(half), "log_softmax", "output"))


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Generalised Jensen-Shannon divergence at its default weight, over shifted logits.

    Both are divided by the temperature, both log-softmaxed; a mixture is made of them; two KL
    terms (trl/experimental/gkd/gkd_trainer.py, ``generalized_jsd_loss``, 1.16).
    """
    rows = TOKENS + BATCH * -1
    held = [ops.scale(ops.rows_slice(logits, rows)) for logits in (student, teacher)]
    mine, theirs = (ops.unary(logits, "log_softmax", "output") for logits in held)
    mixture = _log_add(ops.shift(mine), ops.shift(theirs))
    parts = [_kl(mixture, theirs), _kl(mixture, mine)]
    both = ops.add(ops.scale(parts[0]), ops.scale(parts[1]))
    total = _scalar([ops.gather(both)])  # the labelled positions
    held.clear()  # the function's names hold all of these until it returns
    return total


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """``logsumexp`` of a stack of two: the stack is kept."""
    tape = a.tape
    stack = tape.tensor(a.rows, a.width * 2, a.dtype, "stack")
    power = tape.tensor(a.rows, a.width * 2, a.dtype, "exponentials")
    out = tape.tensor(a.rows, a.width, a.dtype, "mixture")
    del power
    saved, rows, width, dtype = (stack, out.alias()), a.rows, a.width, a.dtype
    wants = (a.requires_grad, b.requires_grad)

    def apply(_grad: Tensor) -> Grads:
        _kept = saved
        made = [tape.tensor(rows, width * 2, dtype, "gradient") for _ in range(3)]
        joined = made.pop()
        made.clear()
        return tuple(joined.alias(width=width) if want else None for want in wants)

    ops.record([out], "logsumexp", [a, b], apply)
    return out


def _kl(given: Tensor, target: Tensor) -> Tensor:
    """``kl_div(given, target, log_target=True)`` in elementwise steps, as PyTorch composes it.

    Source: aten/src/ATen/native/Loss.cpp, ``kl_div``.
    """
    power = ops.unary(target, "exp", "output")
    return ops.mul(power, ops.add(target, given, "difference"))


def _in_batch(states: Tensor) -> Tensor:
    """Mean pooling, normalised, and every anchor against every positive.

    The table of similarities is micro x micro numbers, less than a hidden state: not counted.
    """
    masked = ops.mul(ops.to(states, "fp32"), states.tape.tensor(TOKENS, 1, "fp32", "mask"))
    pooled = states.tape.tensor(BATCH, states.width, "fp32", "pooled")
    make = ops.like(masked.rows, masked.width, masked.dtype, masked.requires_grad)
    ops.record([pooled], "sum", [masked], lambda grad: (make(grad),))
    return _scalar([ops.unary(pooled, "normalize", "input")])
