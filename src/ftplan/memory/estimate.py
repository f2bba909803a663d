"""From a job to its worst moment: what is static, the step played on top of it, the terms."""

from __future__ import annotations

from dataclasses import dataclass

from ftplan.dtypes import find_format
from ftplan.memory.job import Job
from ftplan.memory.nn import Network
from ftplan.memory.optimizer import rounded, state_bytes, step_bytes
from ftplan.memory.prepare import counted_parameters, prepare
from ftplan.memory.record import record_step
from ftplan.memory.replay import Program
from ftplan.memory.tape import ITEM_BYTES, Parameter

__all__ = ["Estimate", "Static", "estimate", "program_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Static:
    """What is there at every moment of the step from the second one on, in bytes."""

    frozen: int
    trainable: int
    adapters: int
    states: int
    gradients: int
    """Gradients of all trainable parameters: static only between micro batches."""
    step: int
    """Temporaries of the optimizer's step."""
    total_params: int
    trainable_params: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The peak of a step, in bytes, and its phases."""

    peak_bytes: int
    peak_phase: str
    phases: tuple[tuple[str, int], ...]
    static: Static


def weight_bytes(parameter: Parameter) -> int:
    """Bytes of one weight as it is stored, each tensor rounded as the allocator does."""
    if parameter.dtype in ITEM_BYTES:
        return rounded(parameter.numel * ITEM_BYTES[parameter.dtype])
    return sum(rounded(part) for part in find_format(parameter.dtype).storages(parameter.shape))


def static_of(job: Job, counted: list[tuple[Parameter, int]]) -> Static:
    """Add up what does not depend on the batch."""
    trainable = [(p, times) for p, times in counted if p.trainable]
    frozen = [(p, times) for p, times in counted if not p.trainable]
    learned = sum(weight_bytes(p) * times for p, times in trainable)
    is_adapter = job.method == "adapter"
    return Static(
        frozen=sum(weight_bytes(p) * times for p, times in frozen),
        trainable=0 if is_adapter else learned,
        adapters=learned if is_adapter else 0,
        states=state_bytes(job.optimizer, trainable),
        gradients=learned,
        step=step_bytes(job.optimizer, trainable),
        total_params=sum(p.numel * times for p, times in counted),
        trainable_params=sum(p.numel * times for p, times in trainable),
    )


def estimate(job: Job) -> Estimate:
    """The peak of the second step of ``job`` on one GPU."""
    network = prepare(job)
    static = static_of(job, counted_parameters(network))
    program = program_of(job, network)
    base = static.frozen + static.trainable + static.adapters + static.states
    if job.accumulation > 1:
        base += static.gradients
    phases = [(n, base + b) for n, b in program.phase_peaks(job.micro, job.seq_len, job.loss_chunk)]
    step = base + static.step + (0 if job.accumulation > 1 else static.gradients)
    phases.append(("step", step))
    name, peak = max(phases, key=lambda item: item[1])
    return Estimate(peak_bytes=peak, peak_phase=name, phases=tuple(phases), static=static)


def program_of(job: Job, network: Network) -> Program:
    """Record the job's step."""
    recording = record_step(
        network,
        job.environment,
        checkpoint_every=job.checkpoint_every,
        input_grads=job.checkpoint_every > 0 or job.prepare_kbit,
        accumulated=job.accumulation > 1,
    )
    return Program(recording, recording.phases())
