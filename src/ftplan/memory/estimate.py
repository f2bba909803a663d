"""From a job to its worst moment: what is static, the step played on top of it, the terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ftplan.dtypes import find_format
from ftplan.errors import UnsupportedError
from ftplan.memory.cache import CacheLayer, cache_bytes, cache_layers
from ftplan.memory.families import complete
from ftplan.memory.families.native import Native
from ftplan.memory.fsdp import BUFFERS, shard_shape
from ftplan.memory.job import Job, ShardingSpec
from ftplan.memory.nn import Network
from ftplan.memory.optimizer import rounded, state_bytes, step_bytes
from ftplan.memory.prepare import counted_parameters, prepare
from ftplan.memory.record import record_evaluation, record_serving, record_step
from ftplan.memory.replay import Alive, Program
from ftplan.memory.tape import ITEM_BYTES, Label, Parameter
from ftplan.memory.tasks import Objective, objective_of
from ftplan.memory.zero import bucket_bytes, live_bytes, partition

__all__ = ["Estimate", "StaticTerm", "Structure", "estimate"]

Counted = Sequence[tuple[Parameter, int, bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticTerm:
    """Bytes that are there at every moment of the step."""

    name: str
    bytes: int
    formula: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The worst moment of a step, in bytes on one GPU, and what is alive at it."""

    peak_bytes: int
    peak_phase: str
    phases: tuple[tuple[str, int], ...]
    static: tuple[StaticTerm, ...]
    alive: Mapping[Label, Alive]
    """What is alive at the peak beside what is static."""
    step_temporary_bytes: int
    """Temporaries of the optimizer, when the step is the worst moment."""
    total_params: int
    trainable_params: int

    @property
    def static_bytes(self) -> int:
        """Everything that does not come and go within a step."""
        return sum(term.bytes for term in self.static)


def weight_bytes(parameter: Parameter) -> int:
    """Bytes of one weight as it is stored, each tensor rounded as the allocator does."""
    if parameter.dtype in ITEM_BYTES:
        return rounded(parameter.numel * ITEM_BYTES[parameter.dtype])
    storage = find_format(parameter.dtype)
    # what is sharded is the packed values: every rank has all of their scales (bitsandbytes'
    # Linear4bit keeps its quant_state beside the weight: fix_4bit_weight_quant_state_from_module)
    parts = (storage.storages(parameter.shape)[0], *storage.storages(parameter.whole)[1:])
    return sum(rounded(part) for part in parts)


def _weights(counted: Counted, name: str, source: str) -> StaticTerm:
    total = sum(weight_bytes(parameter) * times for parameter, times, _ in counted)
    by_dtype: dict[str, int] = {}
    for parameter, times, _ in counted:
        by_dtype[parameter.dtype] = by_dtype.get(parameter.dtype, 0) + parameter.numel * times
    parts = [f"{count:,} x {dtype}" for dtype, count in by_dtype.items()]
    return StaticTerm(name=name, bytes=total, formula=" + ".join(parts), source=source)


def main_weights(updated: Counted) -> StaticTerm:
    """The fp32 copy that the optimizer updates beside 2-byte weights."""
    return _weights(
        updated, "optimizer/main_weights", "fp32 copy of what is trained, updated by the optimizer"
    )


def zero_terms(job: Job, whole: Counted, updated: Counted) -> list[StaticTerm]:
    """What ZeRO adds: main weights, buckets, gathered weights."""
    spec = job.sharding
    trained = [entry for entry in whole if entry[0].trainable]
    terms = [main_weights(updated)]
    terms.append(
        StaticTerm(
            name="runtime/reduce_buckets",
            bytes=bucket_bytes(spec, trained),
            formula=f"2 x {spec.bucket_elements:,} elements (or all there are)",
            source="DeepSpeed: reduce_bucket_size, overlap_comm",
        )
    )
    if spec.kind == "zero3":
        terms.append(
            StaticTerm(
                name="weights/gathered",
                bytes=live_bytes(spec, whole),
                formula=f"{spec.max_live_elements:,} live + {spec.prefetch_elements:,} ahead",
                source="DeepSpeed: stage3_max_live_parameters, stage3_prefetch_bucket_size",
            )
        )
    return terms


def static_terms(job: Job, counted: Counted, whole: Counted) -> list[StaticTerm]:
    """Weights, adapters and optimizer states. ``whole``: before anything was sharded."""
    frozen = [entry for entry in counted if not entry[0].trainable]
    learned = [entry for entry in counted if entry[0].trainable]
    own = "adapters/parameters" if job.method == "adapter" else "weights/trainable"
    terms = [
        _weights(frozen, "weights/frozen", "shapes from config.json"),
        _weights(learned, own, "shapes from config.json"),
    ]
    offload = job.sharding.offload
    if offload in ("params", "nvme"):
        terms = []  # they wait on the host, or on NVMe
    trained = sum(parameter.numel * times for parameter, times, _ in learned)
    states = " + ".join(f"{s.name} ({s.dtype}, {s.shape})" for s in job.optimizer.states)
    updated, parts = learned, ""
    if job.sharding.kind.startswith("zero"):
        ranks = job.sharding.world
        updated = [(partition(p, ranks), times, m) for p, times, m in whole if p.trainable]
        parts = f" in fp32 / {ranks} GPUs"
        terms += zero_terms(job, whole, updated)
    elif job.main_weights:
        terms.append(main_weights([(partition(p, 1), n, m) for p, n, m in learned]))
        updated = [(partition(p, 1), times, m) for p, times, m in learned]
    terms.append(
        StaticTerm(
            name="optimizer/states",
            bytes=state_bytes(job.optimizer, [entry for entry in updated if not entry[0].idle]),
            formula=f"{job.optimizer.name}: {states} for {trained:,} parameters{parts}",
            source=job.optimizer.source,
        )
    )
    if job.sharding.kind == "ddp" and job.sharding.world > 1:
        terms.append(
            _weights(
                learned,
                "gradients/ddp_buckets",
                "DDP copies every gradient into flat buckets (gradient_as_bucket_view=False)",
            )
        )
    return [term for term in terms if term.bytes and not _waits_elsewhere(term, job.sharding)]


def _waits_elsewhere(term: StaticTerm, sharding: ShardingSpec) -> bool:
    """States are off the GPU when they, or FSDP's weights with them, are offloaded."""
    if not term.name.startswith("optimizer/"):
        return False
    moved = sharding.offload in ("optimizer", "nvme")
    return moved or (sharding.offload == "params" and sharding.kind == "fsdp")


def _sampler(job: Job) -> StaticTerm:
    """An engine that generates completions on the same card and keeps its share of it."""
    return StaticTerm(
        name="runtime/sampler",
        bytes=job.sampler_bytes,
        formula="vllm_gpu_memory_utilization x the card",
        source="trl/trainer/grpo_trainer.py 1.16: vLLM in the trainer's process, not asleep",
    )


class Structure:
    """A job but for the sizes of its batch: every weight placed, one step recorded.

    What is static does not depend on the batch, and what comes and goes is a sum of sizes that
    grow with it: the peak never falls as the micro batch or the sequence length goes up.
    """

    def __init__(self, job: Job) -> None:
        network = prepare(job)
        counted = counted_parameters(network)
        ranks = shard_ranks(job.sharding)
        local = [(_shard(p, ranks), times, matrix) for p, times, matrix in counted]
        learned = [entry for entry in local if entry[0].trainable]
        static = static_terms(job, local, counted)
        if network.buffer_bytes:
            static.append(
                StaticTerm(
                    name="weights/buffers",
                    bytes=network.buffer_bytes,
                    formula=f"{network.buffer_bytes:,}",
                    source="masks and tables that the model keeps beside its weights",
                )
            )
        idle = [entry for entry in learned if entry[0].idle]
        if idle and job.accumulation == 1:
            static.append(_weights(idle, "gradients/idle", "gradients that nothing clears"))
        objective = objective_of(job)
        for model in objective.resident:
            static.append(_weights(counted_parameters(model.network), model.name, model.why))
        if job.sampler_bytes:
            static.append(_sampler(job))
        if job.accumulation > 1:
            static.append(
                _weights(
                    _accumulated(job, learned),
                    "gradients/accumulated",
                    "gradients of earlier micro batches",
                )
            )
        self.static = tuple(static)
        self.static_bytes = sum(term.bytes for term in static)
        in_backward = job.optimizer.in_backward
        stepped = [entry for entry in learned if not entry[0].idle]
        self.step_bytes = 0 if in_backward else step_bytes(job.optimizer, stepped)
        self.network = network
        self.counted = counted
        self.program = program_of(job, network, objective)
        self.eval_micro = job.eval_micro
        self.evaluation = _evaluation_of(job, network, objective) if job.eval_micro else None
        self.rollout = _rollout_of(job, network) if job.generates else None
        self.total_params = sum(
            parameter.numel * times for parameter, times, _ in counted if _is_base(parameter)
        )
        self.trainable_params = sum(
            parameter.numel * times
            for parameter, times, _ in counted
            if parameter.trainable and not parameter.idle
        )

    def phases(self, micro: int, seq_len: int, chunk: int = 0) -> list[tuple[str, int]]:
        """The most that is alive in each phase, in bytes."""
        played, rest = self.program.levels(micro, seq_len, chunk)
        phases = [(name, self.static_bytes + peak) for name, peak in played]
        phases.append(("step", self.static_bytes + self.step_bytes + rest))
        if self.evaluation is not None:
            phases.append(("evaluation", self._evaluated(seq_len, chunk)))
        if self.rollout is not None:
            phases.append(("rollout", self._rolled_out(micro, seq_len)))
        return phases

    def _rolled_out(self, micro: int, seq_len: int) -> int:
        """The worst moment while completions are generated, with neither gradients nor a graph."""
        assert self.rollout is not None
        static = sum(term.bytes for term in _without_gradients(self.static))
        return static + self.rollout.cache(micro, seq_len).bytes + self.rollout.peak(micro, seq_len)

    def _evaluated(self, seq_len: int, chunk: int) -> int:
        """The worst moment of an evaluation, which comes when gradients have gone."""
        assert self.evaluation is not None
        static = sum(term.bytes for term in _without_gradients(self.static))
        return static + self.evaluation.peak(self.eval_micro, seq_len, chunk)

    def peak(self, micro: int, seq_len: int, chunk: int = 0) -> int:
        """The worst moment in bytes: the integer of :meth:`at`, without what is alive at it."""
        worst, rest = self.program.peak_and_rest(micro, seq_len, chunk)
        peak = self.static_bytes + max(worst, self.step_bytes + rest)
        peak = max(peak, self._evaluated(seq_len, chunk)) if self.evaluation else peak
        return max(peak, self._rolled_out(micro, seq_len)) if self.rollout else peak

    def at(self, micro: int, seq_len: int, chunk: int = 0) -> Estimate:
        """The worst moment for a micro batch, a sequence length and a chunk of the loss."""
        phases = self.phases(micro, seq_len, chunk)
        phase, _ = max(phases, key=lambda item: item[1])
        is_step = phase == "step"
        if phase == "evaluation" and self.evaluation is not None:
            return self._estimate(
                phases,
                _without_gradients(self.static),
                self.evaluation.moment(self.eval_micro, seq_len, chunk).alive,
            )
        if phase == "rollout" and self.rollout is not None:
            cache = self.rollout.cache(micro, seq_len)
            static = (*_without_gradients(self.static), cache)
            return self._estimate(phases, static, self.rollout.alive(micro, seq_len))
        resting = self.program.rest(micro, seq_len, chunk) if is_step else None
        return self._estimate(
            phases,
            self.static,
            self.program.moment(micro, seq_len, chunk).alive if resting is None else resting,
            step_bytes=self.step_bytes if is_step else 0,
        )

    def _estimate(
        self,
        phases: Sequence[tuple[str, int]],
        static: Sequence[StaticTerm],
        alive: Mapping[Label, Alive],
        *,
        step_bytes: int = 0,
    ) -> Estimate:
        phase, peak = max(phases, key=lambda item: item[1])
        return Estimate(
            peak_bytes=peak,
            peak_phase=phase,
            phases=tuple(phases),
            static=tuple(static),
            alive=alive,
            step_temporary_bytes=step_bytes,
            total_params=self.total_params,
            trainable_params=self.trainable_params,
        )


class Rollout:
    """Completions generated by the model itself: a cache that fills, and a forward of prompts."""

    def __init__(self, program: Program, job: Job, layers: list[CacheLayer]) -> None:
        self._program = program
        self._layers = layers
        self._at_once = job.accumulation
        self._completion = job.completion_tokens
        self._format = find_format(job.environment.autocast or job.base_dtype)

    def cache(self, micro: int, seq_len: int) -> StaticTerm:
        """Keys and values of all sequences when the last token is there."""
        count = micro * self._at_once
        return StaticTerm(
            name="kv_cache/rollout",
            bytes=cache_bytes(self._layers, self._format, count, seq_len),
            formula=f"{count:,} sequences x {seq_len:,} tokens in {self._format.name}",
            source="trl/trainer/grpo_trainer.py 1.16: one generation for all of a step's batches",
        )

    def _shape(self, micro: int, seq_len: int) -> tuple[int, int]:
        return micro * self._at_once, max(1, seq_len - self._completion)

    def peak(self, micro: int, seq_len: int) -> int:
        """The most that the prompts' forward needs, in bytes."""
        return self._program.peak(*self._shape(micro, seq_len))

    def alive(self, micro: int, seq_len: int) -> Mapping[Label, Alive]:
        """What is alive at that moment."""
        return self._program.moment(*self._shape(micro, seq_len)).alive


def _rollout_of(job: Job, network: Network) -> Rollout:
    if job.sharding.kind in ("fsdp", "zero3"):
        raise UnsupportedError(
            f"generating with weights that are sharded by {job.sharding.kind}",
            remedy="use rollout.sampler: server, or colocate",
        )
    layers = cache_layers(network, complete(job.config))
    recording = record_serving(network, replace(job.environment, training=False))
    return Rollout(Program(recording, recording.phases()), job, layers)


def _without_gradients(static: Sequence[StaticTerm]) -> tuple[StaticTerm, ...]:
    return tuple(term for term in static if not term.name.startswith("gradients/"))


def estimate(job: Job) -> Estimate:
    """The peak of the second step of ``job`` on one GPU."""
    return Structure(job).at(job.micro, job.seq_len, job.loss_chunk)


def _accumulated(job: Job, learned: Counted) -> Counted:
    """Gradients between micro batches: under ZeRO-2 each rank keeps its own part of them."""
    if job.sharding.kind != "zero2":
        return learned
    return [(_shard(p, job.sharding.world), times, matrix) for p, times, matrix in learned]


def _is_base(parameter: Parameter) -> bool:
    return not parameter.added


def shard_ranks(sharding: ShardingSpec) -> int:
    """Over how many ranks each weight is split."""
    if sharding.kind not in ("fsdp", "zero3"):
        return 1
    return sharding.world // (sharding.tp * sharding.pp * sharding.cp * sharding.dp_replicate)


def _shard(parameter: Parameter, ranks: int) -> Parameter:
    """Rank 0's part of a weight."""
    if parameter.dtype.startswith(BUFFERS):
        return parameter
    shape = shard_shape(parameter.shape, ranks)
    part = Parameter(parameter.name, shape, parameter.dtype, parameter.trainable)
    part.added, part.embedding = parameter.added, parameter.embedding
    part.idle = parameter.idle
    part.whole = parameter.shape
    return part


def _step_of(job: Job) -> Callable[[Parameter], int] | None:
    """What the step of one parameter needs, for an optimizer that steps in backward."""
    if not job.optimizer.in_backward:
        return None
    if job.accumulation > 1 or job.sharding.kind in ("fsdp", "zero1", "zero2", "zero3"):
        raise UnsupportedError(
            "an optimizer that steps in backward with gradient accumulation or sharding",
            remedy="use accumulation: 1 on one GPU: no gradient outlives its parameter's turn",
        )
    return lambda parameter: step_bytes(job.optimizer, [(parameter, 1, len(parameter.shape) > 1)])


def program_of(job: Job, network: Network, objective: Objective) -> Program:
    """Record the job's step."""
    sharding = job.sharding if job.sharding.kind in ("fsdp", "zero2", "zero3") else None
    if sharding is not None and sharding.kind == "fsdp":
        for parameter, _, _ in counted_parameters(network):
            parameter.stored = parameter.dtype
            if parameter.dtype in ITEM_BYTES:
                parameter.dtype = sharding.param_dtype or parameter.dtype
    recording = record_step(
        network,
        job.environment,
        checkpoint_every=job.checkpoint_every,
        input_grads=job.checkpoint_every > 0 and not job.modules,
        accumulated=job.accumulation > 1,
        sharding=sharding,
        objective=objective,
        step_of=_step_of(job),
    )
    program = Program(recording, recording.phases())
    program.virtual_tokens = network.virtual_tokens
    program.sequences = objective.sequences
    program.chunked_by_sequence = isinstance(network, Native) and network.chunked_by_sequence
    return program


def _evaluation_of(job: Job, network: Network, objective: Objective) -> Program | None:
    """A batch of the evaluation, where it is the model's own loss on one GPU's whole weights.

    None for others: the answer is then about training alone, and has to say so.
    """
    if not objective.inside or job.sharding.kind in ("fsdp", "zero3"):
        return None
    recording = record_evaluation(network, job.environment)
    program = Program(recording, recording.phases())
    program.virtual_tokens = network.virtual_tokens
    return program
