"""Tasks: what is done with the model's outputs, how many sequences there are, who else is there.

A language model's own loss (:mod:`loss`) needs nothing of this. The others are written after the
trainers that people run; the file and version that each mirrors:

    sft       LLaMA-Factory's v1 engine (v1/core/base_trainer.py 0.9.5): the model's own loss is
              computed and left, log-probabilities are taken out of its logits beside it
    rm        trl/trainer/reward_trainer.py 1.16: chosen and rejected in one batch, a head of one
              label, the loss outside the model
    classify  transformers/modeling_layers.py 5.23, ``GenericForSequenceClassification``
    dpo       trl/trainer/dpo_trainer.py 1.10 (all logits) and 1.16 (log-probabilities in tiles):
              chosen and rejected in one batch, then the reference's forward without a graph
    kto       trl/trainer/kto_trainer.py 1.16: one completion a sample, then the reference's
              forward; the forwards over mismatched pairs need no more than the reference's
              LLaMA-Factory's 0.9.5 (train/rm, train/dpo, train/kto): a value head beside the
              language model's, whose loss is computed and left; log-probabilities of all logits
    orpo      trl/experimental/orpo/orpo_trainer.py 1.16: chosen and rejected in one batch, a
              cross entropy of the chosen half beside the log-probabilities, no reference
    grpo      trl/trainer/grpo_trainer.py 1.16: the old and the reference's log-probabilities are
              made without a graph before the step; the loss looks at completions alone
    distill   trl/experimental/gkd/gkd_trainer.py 1.16: the teacher's forward without a graph, a
              generalised Jensen-Shannon divergence over all logits; in tiles where the loss is
              chunked (trl/trainer/distillation_trainer.py 1.16)
    ppo       trl/experimental/ppo/ppo_trainer.py 1.12 (in no later version): policy and critic in
              one wrapper, all hidden states returned; logits divided in place. LLaMA-Factory's is
              that of TRL 0.9, where a head on the policy is the critic: not traced
    embed     sentence_transformers MultipleNegativesRankingLoss: anchors and positives, pooled
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from ftplan.dataclass import dataclass
from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.families.native import Native
from ftplan.memory.job import Job
from ftplan.memory.log_probs import (
    divergence,
    divided_in_place,
    half_cross_entropy,
    log_probs,
    scalar,
)
from ftplan.memory.loss import outside_loss, tiled_divergence
from ftplan.memory.nn import Network
from ftplan.memory.prepare import prepare
from ftplan.memory.tape import BATCH, TOKENS, Tensor

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
               "contrast", "clipped", "values", "weighted", "outside", "native"]  # fmt: skip

_KINDS: dict[str, Kind] = {
    "sft": "tokens", "pt": "tokens", "classify": "labels", "rm": "rewards", "dpo": "pairs",
    "kto": "unpaired", "orpo": "odds", "grpo": "policy", "distill": "teacher", "embed": "contrast",
    "ppo": "clipped",
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
    turns: int = 1
    """Parts of a packed row that go through the model one after another."""
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
    unseen: bool = False
    """The policy runs once more before each batch, without a graph, and needs less than with one;
    with its adapters off once more behind the reference: KTO's mismatched pairs."""
    scores_itself: bool = False
    """The policy's own log-probabilities are made before the step: GRPO's, where vLLM samples and
    TRL corrects what it says (``vllm_importance_sampling_correction``)."""
    critic: Network | None = None
    """A second network that is trained, whose forward runs first on the same batch (PPO)."""
    scorers: tuple[Network, ...] = ()
    """Who scores a rollout: the reference, the critic, the reward model."""

    @property
    def all_states(self) -> bool:
        """Every hidden state is returned, and held as long as the outputs are."""
        return self.kind in ("clipped", "values")

    @property
    def beside(self) -> bool:
        """The other network is a model of its own, not the policy with its adapters off."""
        return any(model.network is self.other for model in self.resident)

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
        if _taken_whole(held[0]) and self.kind in ("pairs", "unpaired", "odds"):
            held[0] = ops.to(held[0], "fp32")  # the trainer holds no other copy
        outputs = held[0]
        if self.kind == "weighted":
            return _weighted(held)
        if self.kind == "outside":
            return outside_loss(network, outputs)
        if self.kind in ("rewards", "values"):
            return scalar([outputs])
        if self.kind == "contrast":
            return _in_batch(outputs)
        if self.kind == "odds" and _taken_whole(outputs):
            return scalar([log_probs(outputs, self.completion)])
        if self.kind == "odds":
            return scalar([half_cross_entropy(outputs), log_probs(outputs, self.completion)])
        if self.kind == "teacher":
            assert self.other is not None
            with outputs.tape.no_grad():
                told = again(self.other)
            if self.states:
                return tiled_divergence(network, self.other, outputs, told, self.completion)
            return divergence(outputs, told)
        if self.kind == "clipped":
            scaled = divided_in_place(outputs, self.completion)
            mine = log_probs(scaled, self.completion, how="rows", scaled=True)
            return scalar([mine, *held[1:]])
        mine = log_probs(outputs, self.completion)
        if self.kind == "unpaired" and _taken_whole(outputs):
            held.append(ops.gather(outputs))  # kto/trainer.py: logits[tags] and logits[~tags]
        if self.other is not None and not self.before:
            with outputs.tape.no_grad():
                known = [self._whole(again)]
                if self.kind == "unpaired" and _taken_whole(known[0]):
                    # kto/trainer.py: the mismatched pairs while the first logits are held
                    known.append(self._whole(again))
                theirs = log_probs(known[-1], self.completion)
            return scalar([mine, theirs])
        return scalar([mine])

    def _whole(self, again: Again) -> Tensor:
        """The other network's logits, as the loss takes them."""
        assert self.other is not None
        told = again(self.other)
        return ops.to(told, "fp32") if _taken_whole(told) else told

    def scores(self, outputs: Tensor) -> Tensor:
        """Log-probabilities alone, for later."""
        return log_probs(outputs, self.completion)


def _taken_whole(outputs: Tensor) -> bool:
    """LLaMA-Factory's losses: all logits in fp32, one log-softmax of them, no cross entropy.

    Source: src/llamafactory/train/dpo/trainer.py, ``concatenated_forward``, and
    train/trainer_utils.py, ``get_batch_logps``, 0.9.5.
    """
    return outputs.width > 1 and outputs.tape.env.log_probs == "whole"


def _weighted(held: list[Tensor]) -> Tensor:
    """A cross entropy a token of shifted logits in fp32, weighed; the shift copies them.

    What the model returned, its own loss with it, is held until the function returns
    (LLaMA-Factory, v1/core/base_trainer.py, ``compute_log_probs``, 0.9.5).
    """
    logits = ops.to(held[0], "fp32")
    shifted = ops.rows_slice(logits, TOKENS + BATCH * -1)
    if not shifted.tape.alone:  # of a single sequence that is a view
        shifted = ops.copy(shifted, "shifted logits")
    return ops.nll_loss(ops.unary(shifted, "log_softmax", "output"))


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
        # ms-swift packs samples whole: a row has both of a pair, or a completion and a mismatched
        # one, which have a forward each (swift/template/base.py: ``lengths`` of a sample, summed)
        packed = job.environment.packed
        return Objective(
            kind="native",
            sequences=1 if packed else sequences_of(job.task),
            turns=2 if packed and job.task == "kto" else 1,
            resident=_reference(job),
        )
    other: Network | None = None
    resident: tuple[Resident, ...] = ()
    if job.task in ("dpo", "kto", "grpo", "ppo") and job.reference in ("model", "adapter"):
        resident = _reference(job)
        other = resident[0].network if resident else prepare(_frozen(job))
    if job.task == "distill":
        if job.teacher is None:
            raise UnsupportedError(
                "distillation without a teacher",
                remedy="name one (teacher: llama-3.1-8b); distilling from text is task: sft",
            )
        other = prepare(replace(_frozen(job), config=job.teacher))
        why = "the teacher, frozen, beside the student"
        resident = (Resident(name="weights/teacher", network=other, why=why),)
    critic: Network | None = None
    scorers: tuple[Network, ...] = ()
    if job.task == "ppo":
        _refuse_sharded_ppo(job)
        assert other is not None
        # both are what TRL's script loads: the policy's own architecture with a head of one number
        reward = prepare(_scoring(job, "partial"))
        if not job.value_head:  # else a head on the policy is all that there is of a critic
            critic = prepare(_scoring(job, "full"))
        why = "a frozen model scores what was sampled"
        resident += (Resident(name="weights/reward", network=reward, why=why),)
        scorers = tuple(filter(None, (other, critic, reward)))
    tiled = job.environment.loss == "chunked"
    if kind == "tokens" and job.loss_outside:
        return Objective(kind="outside", states=job.environment.loss != "full")
    if kind == "rewards" and job.value_head:
        kind = "values"
    if kind == "tokens" and job.loss_twice:
        kind = "weighted"
    return Objective(
        kind=kind,
        sequences=sequences_of(job.task),
        other=other,
        before=job.task == "grpo",
        unseen=job.task == "kto",
        scores_itself=job.task == "grpo" and not job.generates,
        states=kind == "teacher" and tiled,
        completion=0 if kind == "teacher" and not tiled else job.completion_tokens,
        resident=resident,
        critic=critic,
        scorers=scorers,
    )


def _reference(job: Job) -> tuple[Resident, ...]:
    """The frozen model that gives the reference's log-probabilities, where it is a second one."""
    if job.task not in ("dpo", "kto", "grpo", "ppo") or job.reference != "model":
        return ()
    why = "a second, frozen model gives the reference's log-probabilities"
    network = prepare(_frozen(job))
    return (Resident(name="weights/reference", network=network, why=why),)


def _refuse_sharded_ppo(job: Job) -> None:
    """What TRL's loop cannot run, by its own code (trl/experimental/ppo/ppo_trainer.py 1.12).

    LLaMA-Factory's (train/ppo/trainer.py 0.9.5, on TRL 0.9) generates with the bare model too.
    """
    kind, world = job.sharding.kind, job.sharding.world
    if kind == "fsdp":
        raise UnsupportedError(
            "ppo under fsdp",
            because="TRL generates with the bare policy and scores with the bare critic, outside "
            "of the wrapper whose forward gathers their weights",
            remedy="use zero2 or zero3, as TRL's own launch files for ppo do, or ddp",
        )
    if kind == "ddp" and world > 1 and job.reference == "adapter" and not job.value_head:
        raise UnsupportedError(
            "ppo under ddp with the policy's adapters off as the reference",
            because="TRL asks the wrapper for `model.policy`, which DistributedDataParallel does "
            "not have",
            remedy="give TRL a ref_model (reference: model), use zero2 or zero3, or one GPU",
        )


def _scoring(job: Job, method: Literal["full", "partial"]) -> Job:
    """A model with a head of one number: the critic, or the reward model.

    TRL's script loads both as it does the policy: of a quantised critic what is not quantised is
    trained, and nobody prepares it.
    """
    return replace(
        job, method=method, last_layers=0, adapter=None, task="rm", prepare_kbit=False,
        norms_in_fp32=False,
    )  # fmt: skip


def _frozen(job: Job) -> Job:
    """The same base model with nothing trained: a reference, or the policy with adapters off."""
    return replace(job, method="partial", last_layers=0, adapter=None, task="sft")


def _in_batch(states: Tensor) -> Tensor:
    """Mean pooling, normalised, and every anchor against every positive.

    The table of similarities is micro x micro numbers, less than a hidden state: not counted.
    """
    masked = ops.mul(ops.to(states, "fp32"), states.tape.tensor(TOKENS, 1, "fp32", "mask"))
    pooled = states.tape.tensor(BATCH, states.width, "fp32", "pooled")
    make = ops.like(masked.rows, masked.width, masked.dtype, masked.requires_grad)
    ops.record([pooled], "sum", [masked], lambda grad: (make(grad),))
    return scalar([ops.unary(pooled, "normalize", "input")])
