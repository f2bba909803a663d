"""Pipeline parallelism: which layers a rank has, and how many micro batches are under way in it.

A rank's share of the model is recorded as any model is: the first stage has the embeddings, the
last one the final norm, the head and the loss, and between them what arrives is an input that
asks for a gradient. What the schedule adds is time: micro batches whose forward is done and whose
backward is not keep what autograd saved (Narayanan et al. 2021, arXiv 2104.04473, section 2;
torch/distributed/pipelining/schedules.py, 2.13; megatron/core/pipeline_parallel/schedules.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ftplan.dataclass import dataclass
from ftplan.errors import InputError, UnsupportedError
from ftplan.memory.job import ShardingSpec
from ftplan.memory.nn import Network, Shared
from ftplan.memory.tape import Tensor

__all__ = ["PipelineStage", "candidates", "cut", "stages_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStage:
    """One rank of a pipeline."""

    rank: int
    ranks: int
    chunks: tuple[tuple[int, int], ...]
    """Ranges of layers, one for each virtual stage."""
    in_flight: int
    """Micro batches (of one chunk) whose activations are kept at once."""
    micro_batches: int
    """Micro batches of a step, of one chunk each."""
    buffered: bool = True
    """Each micro batch has a buffer to receive into (PyTorch's; Megatron makes one as it needs)."""
    fresh: bool = False
    """No backward has ended yet: there are no gradients of earlier micro batches."""

    @property
    def first(self) -> bool:
        """It has the embeddings."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """It has the final norm, the head and the loss."""
        return self.rank == self.ranks - 1

    @property
    def name(self) -> str:
        """For people: which stage, what it has, how much is under way."""
        layers = ", ".join(f"{start}-{stop - 1}" for start, stop in self.chunks)
        has = [f"layers {layers}"]
        has += ["the embeddings"] if self.first else []
        has += ["the head and the loss"] if self.last else []
        return (
            f"pipeline stage {self.rank} of {self.ranks} ({', '.join(has)}; "
            f"{self.in_flight} micro batches under way)"
        )


def _spread(layers: int, parts: int) -> list[tuple[int, int]]:
    """Contiguous ranges, the first ones longer by one where it does not come out even."""
    ranges, start = [], 0
    for part in range(parts):
        stop = start + layers // parts + (part < layers % parts)
        ranges.append((start, stop))
        start = stop
    return ranges


def _in_flight(spec: ShardingSpec, rank: int, micro_batches: int) -> int:
    """Forwards that are done before the first backward ends, of one chunk each.

    GPipe: all micro batches. 1F1B: as many as there are stages from here on. Interleaved:
    ``2 (p - rank - 1) + (v - 1) p`` warm-up forwards and the one under way.
    """
    p, v = spec.pp, spec.virtual_stages
    if spec.schedule == "gpipe":
        return micro_batches * v
    if v == 1:
        return min(p - rank, micro_batches)
    return min(2 * (p - rank - 1) + (v - 1) * p + 1, micro_batches * v)


def stages_of(
    layers: int, spec: ShardingSpec, micro_batches: int, *, buffered: bool = True
) -> list[PipelineStage]:
    """The ranks of a pipeline over ``layers`` blocks."""
    p, v = spec.pp, spec.virtual_stages
    if layers < p * v:
        raise InputError(
            f"{p * v} pipeline stages for {layers} layers", remedy=f"use at most {layers}"
        )
    ranges = _spread(layers, p * v)
    return [
        PipelineStage(
            rank=rank,
            ranks=p,
            chunks=tuple(ranges[chunk * p + rank] for chunk in range(v)),
            in_flight=_in_flight(spec, rank, micro_batches),
            micro_batches=micro_batches * v,
            buffered=buffered,
        )
        for rank in range(p)
    ]


def candidates(stages: Sequence[PipelineStage]) -> list[PipelineStage]:
    """The ranks of which one is the worst: from the second on there is ever less under way."""
    ranks = [stages[rank] for rank in sorted({0, min(1, len(stages) - 1), len(stages) - 1})]
    return [moment for stage in ranks for moment in _moments(stage)]


def _moments(stage: PipelineStage) -> list[PipelineStage]:
    """With everything under way no backward has ended; with one fewer there are gradients."""
    if stage.in_flight < stage.micro_batches:
        return [stage]
    fresh = replace(stage, fresh=True)
    return (
        [fresh, replace(stage, in_flight=stage.in_flight - 1)] if stage.in_flight > 1 else [fresh]
    )


def _pass(x: Tensor, _shared: Shared) -> Tensor:
    return x


def cut(network: Network, stage: PipelineStage) -> None:
    """Leave in the network what the rank has. Its blocks are those of all its chunks."""
    stack = network.stages[0].stack
    if len(network.stages) > 1 or stack.shared or stack.hands_on or network.lends_tables:
        raise UnsupportedError(
            "pipeline parallelism of an encoder-decoder or of layers that share what they make",
            remedy="use tensor parallelism or fsdp",
        )
    part = network.stages[0]
    stack = part.stack
    stack.pattern = [kind for start, stop in stage.chunks for kind in stack.pattern[start:stop]]
    stack.count = len(stack.pattern)
    tables = {
        id(p) for path, p in network.named_parameters()
        if p.embedding or path.startswith(network.entrance)
    }  # fmt: skip
    head = {id(p) for p in network.head_parameters()}
    for _, module in network.named_modules():
        for name, parameter in list(module.parameters.items()):
            key = id(parameter)
            has = (stage.first and key in tables) or (stage.last and key not in tables - head)
            if not has:  # it stays an operand, but is nobody's weight here
                del module.parameters[name]
                parameter.trainable = False
    if not stage.last:
        part.leave = _pass
    network.was_cut(first=stage.first, fresh=stage.fresh)


def one_chunk(network: Network, stage: PipelineStage) -> None:
    """Leave the blocks of one chunk: the last one, which is the only one with a head."""
    start, stop = stage.chunks[-1]
    stack = network.stages[0].stack
    stack.pattern = stack.pattern[len(stack.pattern) - (stop - start) :]
    stack.count = len(stack.pattern)
