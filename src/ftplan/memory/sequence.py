"""Sequence parallelism: what tensor parallelism leaves whole is cut along the sequence.

Norms, residuals and their dropout see b s / t tokens on each of t ranks (:data:`PART`); products
that tensor parallelism cuts see them all. In front of those that are cut by columns stands an
all-gather, whose way back is a reduce-scatter; behind those cut by rows it is the other way round.
Megatron saves the rank's part of a gathered input and gathers it again for the weight's gradient;
DTensor's plans save what was gathered.

Sources: arXiv 2205.05198, section 4.2; NVIDIA/Megatron-LM, megatron/core/tensor_parallel/layers.py
and mappings.py, 0.20. Gathered inputs are tensors of their own, as in Transformer Engine's layers,
which ms-swift and NeMo run; Megatron's own layers gather into one buffer that is there for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ftplan.errors import UnsupportedError
from ftplan.memory import ops
from ftplan.memory.adapters.lora import Adapted
from ftplan.memory.experts import Experts
from ftplan.memory.job import ShardingSpec
from ftplan.memory.nn import Linear, Module, Network, Shared, Stage
from ftplan.memory.parallel import cut_layers
from ftplan.memory.tape import PART, TOKENS, Tape, Tensor

__all__ = ["split_sequence"]

Around = Callable[[Tensor], Tensor]


def split_sequence(network: Network, config: Mapping[str, Any], spec: ShardingSpec) -> None:
    """Give each rank its part of the tokens wherever ``config`` (a rank's) has whole features.

    Raises UnsupportedError for models of which tensor parallelism leaves a layer whole, and for
    experts that it cuts: those would see the tokens of all ranks.
    """

    def gathered(x: Tensor) -> Tensor:
        return gather(x, regathers=spec.megatron)

    if len(network.stages) > 1 or network.stages[0].stack.shared:
        raise UnsupportedError(
            "sequence parallelism of an encoder-decoder or of shared layers",
            remedy="leave sharding.sequence_parallel out",
        )
    for block, columns, rows in list(cut_layers(network, config)):
        modules = dict(block.named_modules())
        entrances = _entrances(columns)
        mixtures = _mixtures(modules)
        if mixtures and spec.expert_tp > 1:
            raise UnsupportedError(
                "sequence parallelism of experts that are cut themselves",
                remedy="set sharding.etp: 1",
            )
        _refuse_the_rest(modules, (*entrances, *rows, *mixtures), config)
        for path in entrances:
            _become(modules[path], gathered, None)
        for path in rows:
            for module in _summed(modules[path]):
                _become(module, None, scatter)
    _split_ends(network, network.stages[0], gathered)


def _entrances(columns: list[str]) -> list[str]:
    """Where tokens are gathered: once for the layers of one module that are cut by columns."""
    parents = dict.fromkeys(path.rpartition(".")[0] or path for path in columns)
    return [path for path in parents if not _under(path.rpartition(".")[0], parents)]


def _under(path: str, above: Iterable[str]) -> bool:
    return any(f"{path}.".startswith(f"{each}.") for each in above)


def _mixtures(modules: Mapping[str, Module]) -> list[str]:
    """Mixtures of experts, which route a rank's own tokens."""
    held = (path for path, module in modules.items() if isinstance(module, Experts))
    return [path.rpartition(".")[0] for path in held]


def _refuse_the_rest(
    modules: Mapping[str, Module], known: Sequence[str], config: Mapping[str, Any]
) -> None:
    """A layer that nothing cuts may need tokens that the rank has no part of."""
    for path, module in modules.items():
        if isinstance(module, Linear) and not _under(path, known):
            raise UnsupportedError(
                f"sequence parallelism of {config.get('model_type')}: {path} is not cut",
                remedy="leave sharding.sequence_parallel out",
            )


def _summed(module: Module) -> Iterator[Module]:
    """A layer cut by rows, or its parts: with an adapter, the base and the first thin matrix."""
    if not isinstance(module, Adapted):
        yield module
        return
    yield module.children["base_layer"]
    for name, child in module.children.items():
        if name == "lora_A":
            yield child.children["default"]


def _become(module: Module, before: Around | None, after: Around | None) -> None:
    """Let the module see what ``before`` makes of its input, and return what ``after`` makes.

    A class of its own rather than a function in its place: copies of a block are of that class too.
    """
    kind = type(module)

    def forward(self: Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = kind.forward(self, before(x) if before else x, *args, **kwargs)
        return after(out) if after else out

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def gather(x: Tensor, *, regathers: bool) -> Tensor:
    """All tokens of what each rank has a part of; the way back is a reduce-scatter."""
    if x.rows != PART:  # where parts begin and end in these blocks is not known
        raise UnsupportedError(
            "sequence parallelism of this model's blocks", remedy="set sequence_parallel: false"
        )
    out = x.tape.tensor(TOKENS, x.width, x.dtype, "gathered")
    make = ops.like(PART, x.width, x.dtype, x.requires_grad)
    ops.record([out], "gather", [x], lambda grad: (make(grad),))
    if regathers:
        out.part = x
    return out


def scatter(x: Tensor) -> Tensor:
    """A rank's part of a sum over ranks; the way back is an all-gather."""
    out = x.tape.tensor(PART, x.width, x.dtype, "scattered")
    make = ops.like(TOKENS, x.width, x.dtype, x.requires_grad)
    ops.record([out], "scatter", [x], lambda grad: (make(grad),))
    return out


def _split_ends(network: Network, stage: Stage, gathered: Around) -> None:
    """Embeddings are summed into parts; the head sees all tokens again."""
    enter, leave = stage.enter, stage.leave

    def entered(tape: Tape, shared: Shared) -> Tensor:
        return scatter(enter(tape, shared))

    def left(x: Tensor, shared: Shared) -> Tensor:
        return gathered(leave(x, shared))

    stage.enter, stage.leave = entered, left
    after: Callable[[int, Tensor], Tensor] = network.after_block

    def between(_layer: int, x: Tensor) -> Tensor:
        out = after(_layer, x)
        if out.rows != x.rows:
            raise UnsupportedError(
                "sequence parallelism of images that are added between blocks",
                remedy="leave sharding.sequence_parallel out",
            )
        return out

    network.after_block = between  # type: ignore[method-assign]
