"""From a job to its worst moment: what is static, the step played on top of it, the terms."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from ftplan.dataclass import dataclass
from ftplan.errors import UnsupportedError
from ftplan.memory.families.native import Native
from ftplan.memory.fsdp import BUFFERS, shard_shape
from ftplan.memory.gathering import stored
from ftplan.memory.job import Job, ShardingSpec
from ftplan.memory.loss import chunk_tokens, head_weight
from ftplan.memory.nn import Network
from ftplan.memory.optimizer import rounded, state_bytes, step_bytes
from ftplan.memory.pipeline import candidates, cut, one_chunk, stages_of
from ftplan.memory.prepare import counted_parameters, prepare
from ftplan.memory.replay import Alive, Program
from ftplan.memory.rollout import Rollout, Stage
from ftplan.memory.statics import Counted, StaticTerm, weight_bytes, weights_term
from ftplan.memory.steps import record_evaluation, record_step
from ftplan.memory.tape import ITEM_BYTES, Label, Parameter, Played
from ftplan.memory.tasks import Objective, Resident, objective_of
from ftplan.memory.units import stays_gathered
from ftplan.memory.zero import Layout, layout_of, partition, step_temporaries
from ftplan.units import MIB

__all__ = ["Estimate", "StaticTerm", "Structure", "estimate", "structure_of"]


DEEP_EP_BUFFER = 256 * MIB
"""axolotl 0.19: ``expert_parallel_num_nvl_bytes``, over NVLink; DeepEP allocates it by itself."""


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


def main_weights(updated: Counted) -> StaticTerm:
    """The fp32 copy that the optimizer updates beside 2-byte weights."""
    return weights_term(
        updated, "optimizer/main_weights", "fp32 copy of what is trained, updated by the optimizer"
    )


def zero_terms(job: Job, updated: Counted, layout: Layout) -> list[StaticTerm]:
    """What ZeRO adds for good: main weights, stage 3's bucket and gradients."""
    spec = job.sharding
    terms = [main_weights(updated)] if spec.offload in ("none", "activations") else []
    bucket = StaticTerm(
        name="runtime/reduce_buckets",
        bytes=spec.bucket_elements * layout.item,
        formula=f"{spec.bucket_elements:,} elements x {layout.item} bytes",
        source="DeepSpeed: reduce_bucket_size",
    )
    if spec.kind == "zero1" and job.accumulation > 1 and not spec.overlap_comm:
        terms.append(bucket)
    if spec.kind != "zero3":
        if spec.offload == "optimizer":
            terms.append(
                StaticTerm(
                    name="runtime/offload_buffer",
                    bytes=layout.largest * layout.item,
                    formula=f"{layout.largest:,} elements of the largest gradient",
                    source="DeepSpeed stage_1_and_2.py: temp_grad_buffer_for_gpu_offload",
                )
            )
        return terms
    terms.append(bucket)
    if spec.offload in ("none", "activations"):
        terms.append(
            StaticTerm(
                name="gradients/partition",
                bytes=layout.part * layout.item,
                formula=f"{layout.part:,} elements x {layout.item} bytes",
                source="DeepSpeed stage3.py: grad_partitions_flat_buffer",
            )
        )
    return terms


def static_terms(
    job: Job, counted: Counted, whole: Counted, layout: Layout | None = None
) -> list[StaticTerm]:
    """Weights, adapters and optimizer states. ``whole``: before anything was sharded."""
    frozen = [entry for entry in counted if not entry[0].trainable]
    learned = [entry for entry in counted if entry[0].trainable]
    stepped = [entry for entry in learned if entry[0].reached and not entry[0].idle]
    own = "adapters/parameters" if job.method == "adapter" else "weights/trainable"
    terms = [
        weights_term(frozen, "weights/frozen", "shapes from config.json"),
        weights_term(learned, own, "shapes from config.json"),
    ]
    offload = job.sharding.offload
    if offload in ("params", "nvme"):
        terms = []  # they wait on the host, or on NVMe
    trained = sum(parameter.numel * times for parameter, times, _ in learned)
    states = " + ".join(f"{s.name} ({s.dtype}, {s.shape})" for s in job.optimizer.states)
    updated, parts = stepped, ""
    if layout is not None:
        ranks = job.sharding.data_ranks
        updated = [(partition(p, ranks), times, m) for p, times, m in whole if p.trainable]
        parts = f" in fp32 / {ranks} GPUs"
        terms += zero_terms(job, updated, layout)
    elif job.main_weights:
        # Megatron's distributed optimizer: main weights and states over the data parallel ranks
        updated = [
            (partition(p, job.sharding.optimizer_ranks(p.expert)), n, m) for p, n, m in stepped
        ]
        terms.append(main_weights(updated))
        terms.append(
            weights_term(
                [(partition(p, 1), n, m) for p, n, m in learned],
                "gradients/main",
                "one fp32 buffer that every gradient is added to (main_grad)",
            )
        )
    terms.append(
        StaticTerm(
            name="optimizer/states",
            bytes=state_bytes(job.optimizer, updated),
            formula=f"{job.optimizer.name}: {states} for {trained:,} parameters{parts}",
            source=job.optimizer.source,
            tensors=_state_tensors(job, updated),
        )
    )
    if job.sharding.kind == "ddp" and job.sharding.world > 1 and not job.main_weights:
        terms.append(
            weights_term(
                [entry for entry in learned if not (job.sharding.spread and entry[0].expert)],
                "gradients/ddp_buckets",
                "DDP copies every gradient into flat buckets (gradient_as_bucket_view=False)",
            )
        )
    terms += held_adapter_terms(job, whole)
    return [term for term in terms if term.bytes and not _waits_elsewhere(term, job.sharding)]


def held_adapter_terms(job: Job, whole: Counted) -> list[StaticTerm]:
    """LoRA's matrices that a fused function gathers by itself: hooks free them when all is over.

    So they and their gradients are whole from the first forward to the last backward.
    """
    spec = job.sharding
    if "adapters" not in spec.apart or job.environment.kernels.lora == "none":
        return []
    thin = [
        (_gathered(p, spec.param_dtype), times, inside)
        for p, times, inside in whole
        if p.added and p.trainable and inside
    ]
    why = "axolotl/kernels/lora.py 0.19, get_lora_parameters: unshard() without a reshard"
    return [
        weights_term(thin, "adapters/gathered", why),
        weights_term(thin, "gradients/whole", f"{why}: reduced when backward has ended"),
    ]


def resident_terms(model: Resident, sharding: ShardingSpec) -> list[StaticTerm]:
    """A frozen model beside the trained one: sharded with it, and what ZeRO-3 gathers of it."""
    whole = counted_parameters(model.network)
    terms = [weights_term(_sharded(whole, sharding), model.name, model.why)]
    if sharding.kind == "zero3":
        small = [entry for entry in whole if stored(entry[0])[0] <= sharding.persistence_elements]
        why = "DeepSpeed: stage3_param_persistence_threshold; nothing parts what is never stepped"
        terms.append(weights_term(small, f"{model.name}_gathered", why))
    if sharding.kind == "fsdp" and sharding.version == 2:
        stays = stays_gathered(model.network, sharding)
        left = [
            (_gathered(p, sharding.param_dtype), times, inside)
            for p, times, inside in whole
            if stays(p, inside)
        ]
        why = "what FSDP2 frees in backward alone stays gathered, and this model has no backward"
        terms.append(weights_term(left, f"{model.name}_gathered", why))
    if sharding.kind in ("fsdp", "zero3") and sharding.offload in ("params", "nvme"):
        return terms[1:]  # its shards wait on the host, or on NVMe
    return terms


def _gathered(parameter: Parameter, dtype: str | None) -> Parameter:
    """A weight as FSDP gathers it: in the dtype of its policy."""
    plain = parameter.dtype in ITEM_BYTES
    return Parameter(
        parameter.name, parameter.shape, dtype if plain and dtype else parameter.dtype, False
    )


def _state_tensors(job: Job, updated: Counted) -> tuple[tuple[int, int], ...]:
    """The states of each weight, as so many tensors of one size."""
    count = max(1, len(job.optimizer.states))
    return tuple(
        (rounded(state_bytes(job.optimizer, [(parameter, 1, matrix)]) // count), count * times)
        for parameter, times, matrix in updated
    )


def _waits_elsewhere(term: StaticTerm, sharding: ShardingSpec) -> bool:
    """States are off the GPU when they, or weights with them, are offloaded."""
    if not term.name.startswith("optimizer/"):
        return False
    return sharding.offload in ("optimizer", "nvme", "params")


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
        self._job = job
        self.stage = job.stage
        if job.stage is not None:
            cut(network, job.stage)
        objective = objective_of(job)
        own = counted_parameters(network)
        counted = own + (counted_parameters(objective.critic) if objective.critic else [])
        local = _sharded(counted, job.sharding)
        layout = None
        if job.sharding.is_zero:
            layout = layout_of(network, job.sharding, objective.critic)
        if job.stage is not None:
            one_chunk(network, job.stage)
        self.program = program_of(job, network, objective)
        for (part, *_), (whole, *_) in zip(local, counted, strict=True):
            part.reached = whole.reached or job.stage is not None
        learned = [entry for entry in local if entry[0].trainable and entry[0].reached]
        static = static_terms(job, local, counted, layout)
        buffers = network.buffer_bytes + network.buffer_elements * ITEM_BYTES[network.loaded_dtype]
        if buffers:
            static.append(
                StaticTerm(
                    name="weights/buffers",
                    bytes=buffers,
                    formula=f"{buffers:,}",
                    source="masks, tables and buffers that are kept beside the weights",
                )
            )
        idle = [entry for entry in learned if entry[0].idle]
        if idle and not job.adds_up:
            why = "gradients that nothing clears"
            static.append(weights_term(idle, "gradients/idle", why))
        for model in objective.resident:
            static += resident_terms(model, job.sharding)
        if job.sampler_bytes:
            static.append(_sampler(job))
        if job.adds_up and not job.main_weights and not (job.stage is not None and job.stage.fresh):
            static.append(
                weights_term(
                    _accumulated(job, counted, learned, layout),
                    "gradients/accumulated",
                    "gradients of earlier micro batches",
                )
            )
        self.static = tuple(static)
        self.static_bytes = sum(term.bytes for term in static)
        in_backward = job.optimizer.in_backward
        stepped = [entry for entry in learned if not entry[0].idle]
        self.step_bytes = 0 if in_backward else step_bytes(job.optimizer, stepped)
        views = not job.sharding.megatron and not job.modules  # transformers' plan makes them
        if job.sharding.tp > 1 and views and self.step_bytes == 0:
            # a rank's rows of the table's gradient are a view, which is copied to be stepped with
            tables = [weight_bytes(p) for p, _, _ in learned if p.embedding]
            self.step_bytes = max(tables, default=0)
        if layout is not None:
            ranks = job.sharding.data_ranks
            parts = [(partition(p, ranks), n, m) for p, n, m in counted if p.trainable]
            needs = step_bytes(job.optimizer, parts)
            self.step_bytes = step_temporaries(job.sharding, layout, needs)
        self.learned = learned
        self.network = network
        self.counted = counted
        self._fused = _fused_chunk(job, network, self.static_bytes)
        self.eval_micro = job.eval_micro
        evaluated = job.eval_micro and job.stage is None
        trained, self.program.gathered = self.program.gathered, None  # it holds the whole record
        self.evaluation = _evaluation_of(job, network, objective, trained) if evaluated else None
        self.rollout = Rollout(job, network, objective) if job.generates else None
        beside = self.evaluation is not None or self.rollout is not None
        self.asks_count = self.program.asks_count or beside
        """Whether it is another one for one sequence than for several."""
        self.total_params = self._count(p for p in own if _is_base(p[0]))
        self.trainable_params = self._count(
            entry for entry in counted if entry[0].trainable and not entry[0].idle
        )

    def _count(self, counted: Iterable[tuple[Parameter, int, bool]]) -> int:
        """Parameters, with the experts of all ranks."""
        ranks = self._job.sharding.ep if self._job.sharding.spread else 1
        return sum(p.numel * times * (ranks if p.expert else 1) for p, times, _ in counted)

    def _chunk(self, micro: int, seq_len: int, given: int) -> int:
        """Tokens of a chunk of the loss: ``given``, or by the rule of a fused one."""
        if given or self._fused is None:
            return given
        return self._fused(micro * self.program.sequences * seq_len)

    def phases(self, micro: int, seq_len: int, chunk: int = 0) -> list[tuple[str, int]]:
        """The most that is alive in each phase, in bytes."""
        chunk = self._chunk(micro, seq_len, chunk)
        played, rest = self.program.levels(micro, seq_len, chunk)
        phases = [(name, self.static_bytes + peak) for name, peak in played]
        phases.append(("step", self.static_bytes + self.step_bytes + rest))
        if self.evaluation is not None:
            phases.append(("evaluation", self._evaluated(seq_len, chunk)))
        phases += [
            (stage.phase, self._at_rest + stage.bytes) for stage in self._stages(micro, seq_len)
        ]
        return phases

    def _stages(self, micro: int, seq_len: int) -> list[Stage]:
        """What happens before the step, where the model itself generates."""
        return self.rollout.worst(micro, seq_len) if self.rollout is not None else []

    @property
    def _at_rest(self) -> int:
        """What is static while there are no gradients."""
        return sum(term.bytes for term in _without_gradients(self.static))

    def _evaluated(self, seq_len: int, chunk: int) -> int:
        """The worst moment of an evaluation, which comes when gradients have gone."""
        assert self.evaluation is not None
        return self._at_rest + self.evaluation.peak(self.eval_micro, seq_len, chunk)

    def peak(self, micro: int, seq_len: int, chunk: int = 0) -> int:
        """The worst moment in bytes: the integer of :meth:`at`, without what is alive at it."""
        chunk = self._chunk(micro, seq_len, chunk)
        worst, rest = self.program.peak_and_rest(micro, seq_len, chunk)
        peak = self.static_bytes + max(worst, self.step_bytes + rest)
        peak = max(peak, self._evaluated(seq_len, chunk)) if self.evaluation else peak
        stages = [self._at_rest + stage.bytes for stage in self._stages(micro, seq_len)]
        return max([peak, *stages])

    @cached_property
    def _uneven(self) -> Structure | None:
        """The same job where the router sends this rank all that it can; None: nothing travels."""
        sharding = self._job.sharding
        if sharding.ep == 1 or sharding.worst_routing:
            return None
        return Structure(replace(self._job, sharding=replace(sharding, worst_routing=True)))

    def uneven_bytes(self, micro: int, seq_len: int, chunk: int = 0) -> int:
        """What the most uneven routing adds to the worst moment, where experts are spread."""
        if self._uneven is None:
            return 0
        return self._uneven.peak(micro, seq_len, chunk) - self.peak(micro, seq_len, chunk)

    @property
    def beside_bytes(self) -> int:
        """What libraries hold on the card outside of PyTorch's allocator."""
        return DEEP_EP_BUFFER if self._job.sharding.spread and self._job.sharding.deep_ep else 0

    def at(self, micro: int, seq_len: int, chunk: int = 0) -> Estimate:
        """The worst moment for a micro batch, a sequence length and a chunk of the loss."""
        chunk = self._chunk(micro, seq_len, chunk)
        phases = self.phases(micro, seq_len, chunk)
        phase, _ = max(phases, key=lambda item: item[1])
        is_step = phase == "step"
        if phase == "evaluation" and self.evaluation is not None:
            return self._estimate(
                phases,
                _without_gradients(self.static),
                self.evaluation.moment(self.eval_micro, seq_len, chunk).alive,
            )
        for stage in self._stages(micro, seq_len):
            if stage.phase == phase:
                static = (*_without_gradients(self.static), *stage.terms)
                return self._estimate(phases, static, stage.alive)
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


def _fused_chunk(job: Job, network: Network, static_bytes: int) -> Callable[[int], int] | None:
    """Tokens of a chunk of a fused loss as a function of all tokens; None: the loss is another."""
    headless = job.stage is not None and not job.stage.last
    if job.environment.loss != "fused" or headless:
        return None
    vocabulary, hidden = head_weight(network)[0].shape
    free = max(1, job.card_bytes - static_bytes) if job.card_bytes else 0
    by = job.environment.loss_by
    return lambda tokens: chunk_tokens(by, tokens, vocabulary, hidden, free)


def _without_gradients(static: Sequence[StaticTerm]) -> tuple[StaticTerm, ...]:
    """``zero_grad`` drops gradients; the buffers that DDP, ZeRO-3 and Megatron keep stay."""
    return tuple(term for term in static if term.name != "gradients/accumulated")


_RECENT: deque[tuple[Job, Structure]] = deque(maxlen=16)
"""Records of a search, the last ones: half a megabyte each. Jobs have no hash to be found by."""


def structure_of(job: Job) -> Structure:
    """The record of a job; of a pipeline, that of its worst rank at the job's own batch.

    A search comes back to jobs that it has seen, so the last few records are kept. One that
    generates goes on recording later and is not shared.
    """
    for known, structure in tuple(_RECENT):
        if known == job:
            return structure
    structure = _recorded(job)
    if not job.generates:
        _RECENT.append((job, structure))
    return structure


def _recorded(job: Job) -> Structure:
    if job.sharding.pp == 1:
        return Structure(job)
    _refuse_stages(job)
    layers = prepare(job).stages[0].stack.count
    ranks = [
        Structure(replace(job, stage=stage))
        for stage in candidates(
            stages_of(layers, job.sharding, job.accumulation, buffered=not job.main_weights)
        )
    ]
    return max(ranks, key=lambda rank: rank.peak(job.micro, job.seq_len, job.loss_chunk))


def estimate(job: Job) -> Estimate:
    """The peak of the second step of ``job`` on one GPU."""
    return structure_of(job).at(job.micro, job.seq_len, job.loss_chunk)


def _accumulated(job: Job, whole: Counted, learned: Counted, layout: Layout | None) -> Counted:
    """Gradients between micro batches: under ZeRO each rank keeps those that it owns.

    FSDP keeps shards too, or the host does, or whole gradients where it waits for the last batch;
    of a flat parameter all of it.
    """
    spec = job.sharding
    if layout is not None and (spec.kind != "zero1" or spec.overlap_comm):
        if spec.kind == "zero3" or spec.offload in ("optimizer", "nvme"):
            return []  # in the partition's own buffer, or on the host
        dtype = next(name for name in ("bf16", "fp32") if ITEM_BYTES[name] == layout.item)
        return [
            (Parameter("own part", (max(layout.owned, layout.first_owned),), dtype, True), 1, False)
        ]
    if spec.kind != "fsdp":
        return learned
    joined = spec.version == 1 and not spec.adapters_apart
    trains = {inside for p, _, inside in whole if p.trainable}
    parts = [entry for entry in whole if entry[0].trainable or (joined and entry[2] in trains)]
    if not spec.no_sync:
        shards = _sharded(parts, spec) if joined else learned
        return [] if spec.offload == "params" else [*shards, *(e for e in shards if e[0].twice)]
    return [
        (_as(p, spec.reduce_dtype or spec.param_dtype or p.dtype), times, inside)
        for p, times, inside in parts
    ]


def _as(parameter: Parameter, dtype: str) -> Parameter:
    return Parameter(parameter.name, parameter.shape, dtype, True)


def _is_base(parameter: Parameter) -> bool:
    return not parameter.added


def _sharded(counted: Counted, sharding: ShardingSpec) -> Counted:
    """A rank's part of every weight."""
    if sharding.kind not in ("fsdp", "zero3"):
        return [(_shard(p, 1), times, inside) for p, times, inside in counted]
    return [(_shard(p, sharding.ranks_of(p.expert)), times, i) for p, times, i in counted]


_SHARED = ("vera", "pvera", "trainable_tokens")
"""Adapters whose layers share parameters: what a stage without their owner holds is not known."""


def _refuse_stages(job: Job) -> None:
    """Tasks and adapters that no pipeline of ours can cut."""
    shared = job.adapter is not None and job.adapter.kind in _SHARED
    if shared or job.task not in ("sft", "pt", "classify"):
        what = f"the adapter {job.adapter.kind!r}" if shared and job.adapter else ""
        raise UnsupportedError(
            f"{what or f'the task {job.task!r}'} under pipeline parallelism",
            remedy="use tensor parallelism, fsdp or zero3",
        )


def _shard(parameter: Parameter, ranks: int) -> Parameter:
    """Rank 0's part of a weight."""
    if parameter.dtype.startswith(BUFFERS):
        return parameter
    shape = shard_shape(parameter.shape, ranks)
    part = Parameter(parameter.name, shape, parameter.dtype, parameter.trainable)
    part.added, part.embedding = parameter.added, parameter.embedding
    part.idle, part.twice, part.crosswise = parameter.idle, parameter.twice, parameter.crosswise
    part.expert = parameter.expert
    part.whole = parameter.shape
    return part


def _step_of(job: Job) -> Callable[[Parameter], int | None] | None:
    """What the step of one parameter needs, for an optimizer that steps in backward, or lets go of
    the gradients that it has copied to the host; None: its gradient stays."""
    if job.main_weights and not job.sharding.is_zero:
        return lambda _parameter: 0  # added to the buffer and let go
    if not job.optimizer.in_backward:
        return None
    if job.accumulation > 1 or job.sharding.kind in ("fsdp", "zero1", "zero2", "zero3"):
        raise UnsupportedError(
            "an optimizer that steps in backward with gradient accumulation or sharding",
            remedy="use accumulation: 1 on one GPU: no gradient outlives its parameter's turn",
        )
    optimizer = job.optimizer

    def needs(parameter: Parameter) -> int | None:
        if optimizer.offloads_from is not None and not optimizer.offloads(parameter):
            return None
        return step_bytes(optimizer, [(parameter, 1, len(parameter.shape) > 1)])

    return needs


def program_of(job: Job, network: Network, objective: Objective) -> Program:
    """Record the job's step."""
    sharded = job.sharding.is_zero or job.sharding.kind == "fsdp"
    sharding = job.sharding if sharded else None
    if sharding is not None and sharding.kind == "fsdp":
        for each in (network, *((objective.other,) if objective.other else ())):
            _gathered_as(each, sharding.param_dtype)
    stage = job.stage
    environment = job.environment
    if objective.sequences > 1 and environment.one_sequence:
        environment = replace(environment, one_sequence=False)
    if network.virtual_tokens and environment.seq_len:
        environment = replace(environment, seq_len=environment.seq_len + network.virtual_tokens)
    recording = record_step(
        network,
        environment,
        checkpoint_every=job.checkpoint_every,
        input_grads=(job.checkpoint_every > 0 or job.asks_input_grads)
        and not job.modules
        and not environment.asks_at_blocks,
        share=stage,
        accumulated=job.adds_up and not (stage is not None and stage.fresh),
        ahead=job.accumulation - 1 if job.fetches_ahead else 0,
        sharding=sharding,
        objective=objective,
        step_of=_step_of(job),
    )
    under_way = stage.in_flight - 1 if stage is not None else 0
    program = Program(recording, recording.phases(under_way=under_way))
    program.virtual_tokens = network.virtual_tokens
    program.sequences, program.turns = objective.sequences, objective.turns
    program.chunked_by_sequence = isinstance(network, Native) and network.chunked_by_sequence
    program.completion = objective.completion
    program.shifted = job.environment.loss_columns > 0
    return program


def _gathered_as(network: Network, dtype: str | None) -> None:
    """Weights as FSDP's units run with them: in the dtype of its policy."""
    for parameter, _, _ in counted_parameters(network):
        parameter.stored = parameter.dtype
        if parameter.dtype in ITEM_BYTES:
            parameter.dtype = dtype or parameter.dtype


def _evaluation_of(
    job: Job, network: Network, objective: Objective, trained: Played | None
) -> Program | None:
    """A batch of the evaluation, where it is the model's own loss.

    None for others: the answer is then about training alone, and has to say so.
    """
    if not objective.inside:
        return None
    sharded = job.sharding if job.sharding.kind in ("fsdp", "zero3") else None
    recording = record_evaluation(network, job.environment, sharding=sharded, trained=trained)
    program = Program(recording, recording.phases())
    program.virtual_tokens = network.virtual_tokens
    return program
